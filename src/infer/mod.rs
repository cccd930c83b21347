//! Using a trained model: evaluate, generate, forecast from a run folder.

pub mod evaluate;
pub mod forecast;
pub mod generate;
pub mod session;
pub mod task;
