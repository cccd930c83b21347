//! carrousel trains LSTM networks on every GPU of a machine at once, whatever its maker, and on the CPU where there is none.
//!
//! An LSTM that learns to continue a sine, and is held against values that it has not seen:
//!
//! ```
//! use std::sync::Arc;
//! use carrousel::data::series::{Order, Part, Series, SeriesBatches, SeriesOptions};
//! use carrousel::model::config::{Input, ModelConfig, Output, Pooling};
//! use carrousel::train::{Trainer, TrainerOptions};
//!
//! fn main() -> anyhow::Result<()> {
//!     // Windows of 20 values, of which the next 5 are to be said; `Series::load` takes files.
//!     let csv: String = (0..400).map(|i| format!("{}\n", (f64::from(i) / 5.0).sin())).collect();
//!     let series = Arc::new(Series::from_csv("sine.csv", format!("x\n{csv}").as_bytes(), &SeriesOptions::new(20, 5))?);
//!     let train = SeriesBatches::new(Arc::clone(&series), Part::Train, 16, Order::Shuffled { seed: 1 })?;
//!     let test = SeriesBatches::new(series, Part::Test, 16, Order::InTime)?;
//!     // One layer of 16 units; `[32, 16]` would be two.
//!     let output = Output::Values { n_outputs: 5, pooling: Pooling::Last };
//!     let model = ModelConfig::new(Input::Values { n_features: 1 }, output, 16);
//!     let mut trainer = Trainer::new(&model, TrainerOptions::default())?; // or devices: "gpu:0,cpu:2".into()
//!     let before = trainer.evaluate(&test)?;
//!     trainer.fit(&train, 10)?;
//!     assert!(trainer.evaluate(&test)? < before / 10.0);
//!     Ok(())
//! }
//! ```
//!
//! | one's own | is | as in |
//! | --- | --- | --- |
//! | data | a type with [`data::Batches`] | `tests/examples/custom_source.rs` |
//! | loss | a type with [`model::Loss`], for [`train::Trainer::with_loss`] | `tests/examples/custom_loss.rs` |
//! | callback | a closure for [`train::Trainer::fit_with`] | `tests/examples/custom_callback.rs` |
//!
//! [`train::Trainer`] is the short way. [`train::run()`] is what the command does: a run folder with checkpoints, metrics and pictures, which
//! can be stopped, resumed and looked at. Folders are floors: each uses those that stand below it here, never the other way round.
//!
//! | floor | |
//! | --- | --- |
//! | [`cli`] | what a person types becomes a run |
//! | [`train`] | the training loop, where all parts meet |
//! | [`infer`] | evaluate, generate, forecast |
//! | [`store`], [`observe`] | checkpoints and exports; events, metrics, pictures |
//! | [`data`], [`model`], [`optim`], [`compress`] | batches; layers and losses; update rules; smaller gradients |
//! | [`backend`] | where kernels run: the CPU, or one GPU |
//! | [`kernels`], [`comm`] | what is computed; how ranks exchange gradients |

pub mod backend;
pub mod cli;
pub mod comm;
pub mod compress;
pub mod data;
pub mod infer;
pub mod kernels;
pub mod model;
pub mod observe;
pub mod optim;
pub mod params;
pub mod pool;
pub mod rng;
pub mod shape;
pub mod spans;
pub mod store;
pub mod train;
pub mod usage;
