//! All integration tests, as modules of one binary, so that wgpu links once.

mod alloc_count;
mod cli;
mod collectives;
mod data;
mod gpu_smoke;
mod observe;
mod runs;
mod store;
mod training;
