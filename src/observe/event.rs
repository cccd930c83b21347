//! The closed list of things a run reports. Field names are a contract with the programs that read the JSON lines.

use serde::{Deserialize, Serialize};

/// Which rule kept or made a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointKind {
    /// Written every so many steps or at the end of an epoch.
    Periodic,
    /// The best validation loss so far.
    Best,
    /// The last of the run, also of an interrupted one.
    Final,
}

/// A device as a start found it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StartDevice {
    /// As it was asked for: `cpu:2`, `gpu:0`.
    pub device: String,
    /// The processor's or adapter's name.
    pub name: String,
    /// Empty for a processor.
    pub driver: String,
}

/// One event. As JSON it is an object whose field `event` is the variant's name in lower case; a number that is not finite is null.
///
/// Losses are means over terms, without penalties. Steps and epochs count from 1.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// A start of the run, the first one or a resumed one, from `step` on: what runs it and where, for whoever reads the figures later.
    Start { step: u64, version: String, system: String, parameters: u64, devices: Vec<StartDevice> },
    /// One training step, sent every `--log-every` steps, and for the first and the last of the run. `loss` is the loss of that step alone.
    /// `device_tokens_per_second` is the speed by place in the list of devices, 0 for one that is lost.
    Step {
        step: u64,
        epoch: u64,
        loss: f64,
        lr: f64,
        tokens_per_second: f64,
        grad_norm: f64,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        device_tokens_per_second: Vec<f64>,
    },
    /// The end of an epoch; `step` is its last step, `train_loss` the mean over the epoch's terms.
    Epoch { epoch: u64, step: u64, train_loss: f64, valid_loss: Option<f64>, seconds: f64 },
    /// An evaluation on the validation part within an epoch (`--eval-every`).
    Eval { step: u64, valid_loss: f64 },
    /// A checkpoint that is completely written.
    Checkpoint { step: u64, path: String, kind: CheckpointKind },
    /// One worker at the end of the command, or when it was lost, over all steps that it took. `rank` is its place in the list of devices; `share` is its
    /// fraction of the rows; `loss` is the mean over its terms of the last step, null where it had none; `lost` says why it is not there any more.
    Device {
        step: u64,
        rank: u64,
        name: String,
        share: f64,
        loss: Option<f64>,
        tokens_per_second: f64,
        waited_seconds: f64,
        bytes_sent: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        lost: Option<String>,
    },
    /// Something that the person should know and that does not stop the run.
    Warning { message: String },
    /// Why the command failed: its last event. The console shows it, so nobody else prints it.
    Error { message: String },
    /// The result of the command: its last event. Fields differ by command, `status` among them; a field named `event` is not allowed.
    Summary(serde_json::Map<String, serde_json::Value>),
}
