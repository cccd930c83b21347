//! Progress, metrics and plots: what a run tells the outside.
//!
//! A run sends values of the closed [`Event`] to a [`Bus`], which hands each to every sink: the console, JSON lines on standard output,
//! `metrics.jsonl`, the report and TensorBoard's files in the run folder. The table and the plots are made once, at the end. Not here: any decision about the run. An observer
//! that fails is reported and dropped; it never stops training. Nothing here reaches a checkpoint.

mod bus;
mod canvas;
mod event;
pub mod format;
mod meter;
pub mod plot;
pub mod sinks;
mod table;
mod trace;

pub use bus::{Bus, Exhibit, Level, RunInfo, Sink};
pub use event::{CheckpointKind, Event, StartDevice};
pub use meter::{Throughput, Trend};
pub use table::Table;
pub use trace::Trace;
