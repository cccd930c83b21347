//! Using a trained model: evaluate, generate, forecast, classify from a run folder; handing it to others and taking theirs.

pub mod activations;
pub mod classify;
pub mod evaluate;
pub mod exchange;
pub mod forecast;
pub mod generate;
pub mod inspect;
pub mod predictions;
pub mod session;
pub mod task;
pub mod warm;
