//! All integration tests, as modules of one binary, so that wgpu links once.

mod adapters;
mod alloc_count;
mod collectives;
mod compare;
mod data;
mod gpu_smoke;
mod kernels;
mod memory;
mod observe;
mod oracle;
mod shaders;
mod store;
mod sweep;

/// The last test by name, so that what was skipped stands at the end.
#[test]
fn zz_adapters_report() {
    adapters::report();
}
