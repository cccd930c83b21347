//! The one error type of this floor. Every message names the file or folder, what was found, and what to do where something can be done.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a checkpoint or a run folder could not be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StoreError {
    #[error("{} does not exist", path.display())]
    NotFound { path: PathBuf },
    /// Reading, writing, syncing, renaming, ... failed; `action` is the verb.
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },

    // One checkpoint file.
    #[error("{} is cut off: it has {found_bytes} bytes of {expected_bytes}", path.display())]
    Truncated { path: PathBuf, found_bytes: u64, expected_bytes: u64 },
    #[error("{} is damaged: {reason}", path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("{} is damaged: its checksum is {found}, not {expected} as written in it", path.display())]
    Checksum { path: PathBuf, found: String, expected: String },
    #[error("{} is a safetensors file, but no checkpoint of carrousel", path.display())]
    Foreign { path: PathBuf },
    #[error("{} has format version {found}, this carrousel reads up to {supported}: use a newer carrousel", path.display())]
    NewerFormat { path: PathBuf, found: u32, supported: u32 },
    #[error("{}: tensor `{name}` is {dtype}, only F32 is read", path.display())]
    Dtype { path: PathBuf, name: String, dtype: String },
    #[error("the checkpoint has no tensor `{name}`")]
    TensorMissing { name: String },
    #[error(
        "the checkpoint's tensor `{name}` has no place in the model that config.toml describes: the file was changed, or the checkpoint is another run's"
    )]
    TensorLeft { name: String },
    #[error("tensor `{name}` has shape {found:?} in the checkpoint, {expected:?} is expected")]
    TensorShape { name: String, found: Vec<usize>, expected: Vec<usize> },
    /// The caller handed in something that cannot be written as a checkpoint.
    #[error("this checkpoint cannot be written: {reason}")]
    Unwritten { reason: String },

    // The run folder.
    #[error("{} already holds a run: continue it with --resume, or give another folder with --out", path.display())]
    HoldsRun { path: PathBuf },
    #[error("{} is no run folder: it has neither config.toml nor a checkpoint", path.display())]
    NotARun { path: PathBuf },
    #[error("cannot write in {}: {source}; give another folder with --out", path.display())]
    Unwritable { path: PathBuf, source: io::Error },
    #[error("{} is in use by another process, which must end first; or give another folder with --out", path.display())]
    Locked { path: PathBuf },
    #[error("{} was opened for reading only", path.display())]
    ReadOnly { path: PathBuf },
    #[error("`{name}` is no name for a file of the run folder: {reason}")]
    FileName { name: String, reason: &'static str },
    #[error("{} has no checkpoint yet", path.display())]
    NoCheckpoint { path: PathBuf },
    #[error("none of the checkpoints in {} is whole: {}", path.display(), reasons.join("; "))]
    NoneWhole { path: PathBuf, reasons: Vec<String> },
    #[error("no checkpoint in {} has a validation loss, so none is the best: use --checkpoint last", path.display())]
    NoBest { path: PathBuf },
    #[error("{} has no checkpoint of step {step}; there are: {}", path.display(), list(existing))]
    NoSuchStep { path: PathBuf, step: u64, existing: Vec<u64> },
    #[error("a checkpoint of step {step} cannot follow that of step {last} in {}", path.display())]
    OutOfOrder { path: PathBuf, step: u64, last: u64 },
}

fn list(steps: &[u64]) -> String {
    if steps.is_empty() { "none".to_owned() } else { steps.iter().map(u64::to_string).collect::<Vec<_>>().join(", ") }
}

impl StoreError {
    /// Wraps an i/o error; "not found" becomes a case of its own.
    pub(super) fn io(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        if source.kind() == io::ErrorKind::NotFound { Self::NotFound { path } } else { Self::Io { action, path, source } }
    }

    /// The error is about what the user asked for (exit code 2), not about something that broke.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::HoldsRun { .. }
                | Self::NotARun { .. }
                | Self::NotFound { .. }
                | Self::Unwritable { .. }
                | Self::NoCheckpoint { .. }
                | Self::NoBest { .. }
                | Self::NoSuchStep { .. }
                | Self::Foreign { .. }
                | Self::NewerFormat { .. }
                | Self::Dtype { .. }
        )
    }
}
