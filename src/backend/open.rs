//! Opens a backend by what it runs on.

use anyhow::Result;

use super::Backend;
use super::cpu::CpuBackend;
use super::gpu::GpuBackend;

/// The CPU with that many threads.
///
/// # Errors
/// When the operating system starts no more threads.
pub fn cpu(n_threads: usize) -> Result<Box<dyn Backend>> {
    Ok(Box::new(CpuBackend::new(n_threads)?))
}

/// The adapter at that position of `carrousel devices`.
///
/// # Errors
/// There is none (those that exist are listed), or its driver refuses a device.
pub fn gpu(index: usize) -> Result<Box<dyn Backend>> {
    Ok(Box::new(GpuBackend::new(index)?))
}
