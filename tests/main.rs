//! All integration tests, in one binary so that wgpu links once.

mod adapters; // which devices are tested: CARROUSEL_TEST_GPU
mod alloc_count; // the counting allocator
mod cli; // the program from outside: exit codes, streams, signals
mod collectives; // plans of the ring as data, and the ring itself
mod compare; // the comparer, with faults planted for it
mod compress; // gradients made smaller on their way
mod cpu_step; // a step on the CPU: no allocation, no row of zeros read
mod data; // texts and series, as files and as batches
mod frames; // classes of steps, frames of notes, weights of classes
mod gpu_gemm_lstm; // products and LSTM steps on the GPU against the CPU, at the edges of dispatches and loops
mod gpu_smoke; // the GPU backend itself: order, readbacks, loss, limits
mod house; // floors, and what may be named where
mod interchange; // models as PyTorch and ONNX have them
mod kernels; // every kernel on every device against the oracle
mod library; // training without the command
mod losses; // devices that fail, are stuck, slow or too small
mod malformed; // what is wrong with files is said, with place and remedy
mod memory; // operands between guard bands
mod model; // whole networks against an f64 network
mod observe; // events, metrics, pictures
mod optim; // update rules against torch.optim in f64; schedules
mod oracle; // every kernel in naive f64
mod profiles; // what measurements measure, and the trace
mod reading; // files as they come: packed, as records, larger than memory
mod recipes; // the recipes on a little data, with one worker and with several
mod runs; // what tests of whole runs share
mod sequences; // labelled sequences from the file to the scores
mod shaders; // every shader parses, validates, fits its Rust twin, and translates
mod store; // checkpoints and run folders through faults
mod sweep; // a layer over time against an f64 layer
mod tasks; // tiny tasks that must be learnt
mod training; // whole runs
mod tuning; // going on from another run, freezing, stopping early, quantiles, looking inside
mod variants; // which variants of kernels are launched: measured, kept, recorded
mod vectors; // cases computed by PyTorch

/// The last test by name, so that what was skipped stands at the end.
#[test]
fn zz_adapters_report() {
    adapters::report();
}
