//! Where events go: people, other programs, the run folder.

mod console;
mod json;
mod metrics;

pub use console::{Console, Verbosity};
pub use json::Json;
pub use metrics::{Losses, Metrics, losses, up_to};
