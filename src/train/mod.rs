//! The training loop: the one place where all parts meet.
//!
//! A coordinator (the caller's thread) draws global batches, cuts them into shares and drives the [`group`] of workers; each [`worker`] owns a
//! device, and beside it a [`ring`] thread carries its gradients. A step is [`commit`]ted on all ranks or on none; where a device is lost,
//! the others form the ring anew and repeat the step with its share.

pub mod balance;
pub mod commit;
pub mod compression;
pub mod devices;
pub mod dry_run;
pub mod group;
pub mod memory;
pub mod profile;
pub mod ring;
pub mod run;
pub mod trainer;
pub mod tuning;
pub mod watched;
pub mod worker;

pub use run::{Outcome, RunOptions, run, run_tuned};
pub use trainer::{Stepped, Trainer, TrainerOptions};
