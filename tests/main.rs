//! All integration tests, in one binary so that wgpu links once.

mod adapters;
mod compare;
mod kernels;
mod memory;
mod oracle;
mod sweep;
