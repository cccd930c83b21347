//! All integration tests, in one binary so that wgpu links once.

mod adapters; // which devices are tested: CARROUSEL_TEST_GPU
mod compare; // the comparer, with faults planted for it
mod gpu_smoke; // the GPU backend itself: order, readbacks, loss, limits
mod kernels; // every kernel on every device against the oracle
mod memory; // operands between guard bands
mod oracle; // every kernel in naive f64
mod shaders; // every shader parses, validates, fits its Rust twin, and translates
mod sweep; // a layer over time against an f64 layer

/// The last test by name, so that what was skipped stands at the end.
#[test]
fn zz_adapters_report() {
    adapters::report();
}
