//! Where events go: people, other programs, the run folder.

mod console;
mod json;
mod metrics;
mod report;
mod tensorboard;

pub use console::{Console, Verbosity};
pub use json::Json;
pub use metrics::{History, Metrics, Points, history, up_to};
pub use report::{Report, ReportFiles};
pub use tensorboard::TensorBoard;
