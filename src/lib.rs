//! carrousel trains LSTM networks on every GPU of a machine at once, whatever its maker, and on the CPU where there is none.

pub mod data;
pub mod rng;
pub mod shape;
