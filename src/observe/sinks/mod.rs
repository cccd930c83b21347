//! Where events go: people, other programs, the run folder.

mod console;
mod json;
mod metrics;

pub use console::{Console, Verbosity};
pub use json::Json;
pub use metrics::{Losses, METRICS_FILE, Metrics, losses, truncate_to};
