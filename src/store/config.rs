//! A run's configuration, resolved: what `config.toml` in the run folder holds. Keys are the flags' names with underscores.

use serde::{Deserialize, Serialize};

use super::run_folder::Select;
use crate::compress::Method;
use crate::data::sequences::ClassWeights;
use crate::data::series::{Missing, Relative};
use crate::data::split::Split;
use crate::data::text::Encoding;
use crate::data::vocab::Level;
use crate::model::config::{Hidden, Levels, LstmConfig, Pooling};
use crate::model::init::Init;
use crate::optim::OptimizerConfig;
use crate::optim::schedule::ScheduleConfig;

/// What is learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// The next token of a text.
    Lm,
    /// The next values of a series.
    Forecast,
    /// The class of a sequence.
    Classify,
    /// A number that belongs to a sequence.
    Regress,
    /// The class of each step of a sequence.
    Tag,
    /// The notes of the frame after each step.
    Frames,
}

impl Task {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lm => "lm",
            Self::Forecast => "forecast",
            Self::Classify => "classify",
            Self::Regress => "regress",
            Self::Tag => "tag",
            Self::Frames => "frames",
        }
    }
}

/// How a loss over time is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossReduction {
    /// By the number of terms.
    Mean,
    /// By the number of sequences: the sum over the window, averaged over the batch (Zaremba et al. 2014).
    SumOverTime,
}

/// What is done about a device that is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnDeviceLoss {
    /// The others repeat the step and go on.
    #[default]
    Continue,
    /// The run stops.
    Stop,
}

/// How long a device may take before it counts as stuck, seconds.
pub const DEADLINE_SECONDS: u64 = 300;

fn deadline_seconds() -> u64 {
    DEADLINE_SECONDS
}

/// Everything a run depends on. Only devices, balance, on_device_loss, rejoin, shard_optimizer, memory_limit, no_autotune, deadline, epochs, max_steps, log_every, eval_every,
/// checkpoint_every and tensorboard may differ on resume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    pub task: Task,
    /// Files, globs, folders or `-`; empty: the built-in example.
    pub data: Vec<String>,
    pub encoding: Encoding,
    pub split: Split,
    pub level: Level,
    /// Most words kept at word level.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vocab: Option<usize>,
    /// Columns to forecast and columns to read; empty: found by themselves.
    pub target: Vec<String>,
    pub features: Vec<String>,
    /// The columns of a table that tell sequences apart, and of their labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequence: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// The key or column of the text in JSON lines and Parquet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Numbers of sequences that are further off than this, in the label's unit, count as wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tolerance: Option<f64>,
    /// How much classes count; none: all alike.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class_weights: Option<ClassWeights>,
    /// Levels of the quantiles that are forecast; none: the mean.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantiles: Option<Levels>,
    /// Notes of a frame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notes: Option<usize>,
    pub missing: Missing,
    pub relative: Relative,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub season: Option<usize>,
    /// Adds sine and cosine of the season's phase to the inputs.
    pub calendar: bool,
    pub layers: usize,
    pub hidden: Hidden,
    /// Columns of the embedding, for tokens.
    pub embedding: usize,
    pub tied: bool,
    pub dropout: f64,
    pub no_bias: bool,
    pub init: Init,
    /// A run folder or a model file whose parameters the run begins with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_from: Option<String>,
    /// Patterns of tensors' names that are not trained.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub freeze: Vec<String>,
    /// Starting biases of the gates i, f, g, o.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate_bias: Option<[f64; 4]>,
    #[serde(flatten)]
    pub lstm: LstmConfig,
    pub seq_len: usize,
    pub horizon: usize,
    /// What the head reads of a labelled sequence.
    #[serde(default)]
    pub pooling: Pooling,
    /// Global batch: streams of a text, windows of a series.
    pub batch_size: usize,
    pub eval_batch_size: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Evaluations in a row without a lower loss after which training ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_stop: Option<u64>,
    #[serde(flatten)]
    pub optimizer: OptimizerConfig,
    #[serde(flatten)]
    pub schedule: ScheduleConfig,
    pub loss_reduction: LossReduction,
    pub seed: u64,
    pub devices: String,
    /// `equal`, `auto` or `W1:W2:...`; empty, and left out of the file: as the devices are alike or not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub balance: String,
    #[serde(default)]
    pub on_device_loss: OnDeviceLoss,
    /// Devices that are back are taken in again at the next checkpoint.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rejoin: bool,
    /// Seconds that a device may take for a pass or a message.
    #[serde(default = "deadline_seconds")]
    pub deadline: u64,
    /// Memory of each device, or of every device, in GB of 2^30 bytes; empty: what there is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub memory_limit: Vec<f64>,
    /// Variants of kernels are not measured: every one is launched as it says itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_autotune: bool,
    /// Parts that each share is cut into.
    pub accumulate: usize,
    /// How gradients are made smaller on their way between devices.
    #[serde(default)]
    pub compress: Method,
    /// Each device keeps its part of the optimizer's state only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shard_optimizer: bool,
    pub select: Select,
    /// Steps between evaluations; 0: once an epoch.
    pub eval_every: u64,
    pub log_every: u64,
    /// Steps between checkpoints; 0: once an epoch.
    pub checkpoint_every: u64,
    pub keep: usize,
    /// Event files for TensorBoard are written too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tensorboard: bool,
    /// Steps between comparisons of the replicas' hashes.
    pub hash_every: u64,
}
