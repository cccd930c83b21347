//! What a run leaves on disk: checkpoints and the run folder that holds them.
//!
//! The promise: whatever moment the process is killed or the power goes, the folder holds the former or the new checkpoint, complete, never a
//! mix; and a damaged file is told from a whole one before anything is done with it. All access goes through [`storage::Storage`], so that
//! tests play faults at every call.
//!
//! What must not be here: what a checkpoint means (which tensors, which state: the caller says), printing, any floor above this one.

pub mod checkpoint;
pub mod config;
mod error;
pub mod interchange;
pub mod run_folder;
pub mod storage;

pub use checkpoint::{Checkpoint, NamedTensor};
pub use error::StoreError;
pub use run_folder::{Entry, RunFolder, Saved, Select, Which, default_run_path, default_run_path_at};

/// What the functions of this floor return.
pub type Result<T> = std::result::Result<T, StoreError>;
