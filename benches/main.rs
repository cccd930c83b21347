//! All benches, in one binary so that wgpu links once. `benches/README.md` tells how to run them and how to read the numbers.
//!
//! Every bench verifies its result before the clock starts, and waits for the device before the clock stops.

mod kernels; // every kernel of the catalogue at the sizes of real models
mod options; // the LSTM's options beside the plain cell
mod ring; // all-reduce between threads
mod step; // one training step

// The judges are those of the tests: what is fast and wrong is not measured.
#[path = "../tests/adapters.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod adapters;
#[path = "../tests/compare.rs"]
#[allow(dead_code, unused_imports, reason = "the tests use the rest")]
mod compare;
#[path = "../tests/memory.rs"]
#[allow(dead_code, unused_imports, reason = "the tests use the rest")]
mod memory;
#[path = "../tests/oracle.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod oracle;

use std::time::Duration;

use adapters::Device;
use criterion::Criterion;

/// Adapters to measure beside the CPU: their indices in `carrousel devices`, with commas.
const GPU_VARIABLE: &str = "CARROUSEL_BENCH_GPU";
/// Set to 1: shrunken models and few short samples, to see that the benches still run.
const SMALL_VARIABLE: &str = "CARROUSEL_BENCH_SMALL";

/// Whether the numbers are of no interest.
fn is_small() -> bool {
    std::env::var(SMALL_VARIABLE).is_ok_and(|v| v == "1") || std::env::args().any(|arg| arg == "--test")
}

/// Threads of this machine, as `--devices cpu` takes them.
fn n_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Indices of the adapters that are asked for.
fn gpus() -> Vec<usize> {
    let Ok(typed) = std::env::var(GPU_VARIABLE) else { return Vec::new() };
    let indices: Result<Vec<usize>, _> = typed.split(',').map(|index| index.trim().parse()).collect();
    indices.unwrap_or_else(|_| panic!("{GPU_VARIABLE}={typed} is not a list of indices such as 0 or 0,1; see carrousel devices"))
}

/// The devices that kernels are measured on: the CPU with one thread and with all, and the adapters asked for.
fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu(1), Device::Cpu(n_cores())];
    devices.dedup();
    devices.extend(gpus().into_iter().map(Device::Gpu));
    devices
}

fn main() {
    let (n_samples, warm_up, measurement) = if is_small() { (10, 1, 10) } else { (20, 500, 2000) };
    let mut criterion = Criterion::default()
        .sample_size(n_samples)
        .warm_up_time(Duration::from_millis(warm_up))
        .measurement_time(Duration::from_millis(measurement))
        .configure_from_args();
    kernels::bench(&mut criterion);
    step::bench(&mut criterion);
    options::bench(&mut criterion);
    ring::bench(&mut criterion);
    criterion.final_summary();
}
