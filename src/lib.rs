//! carrousel trains LSTM networks on every GPU of a machine at once, whatever its maker, and on the CPU where there is none.

pub mod backend;
pub mod cli;
pub mod comm;
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
