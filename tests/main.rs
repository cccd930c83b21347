//! All integration tests, in one binary so that wgpu links once.

mod adapters;
mod alloc_count;
mod cli;
mod collectives;
mod compare;
mod data;
mod gpu_gemm_lstm;
mod gpu_smoke;
mod kernels;
mod memory;
mod observe;
mod oracle;
mod runs;
mod shaders;
mod store;
mod sweep;
mod training;
