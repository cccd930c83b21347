//! The all-reduce between ranks that are threads of one process, without any training around it.
//!
//! What `auto` takes for which length and world stands in `comm/plan.rs` as constants; this bench is where they come from.

use std::time::Duration;

use carrousel::comm::measure::call_times;
use carrousel::comm::plan::Algorithm;
use criterion::{BenchmarkId, Criterion, Throughput};

use super::is_small;

/// Messages measured, bytes: where latency counts, in between, where bandwidth counts.
const MESSAGE_BYTES: [usize; 6] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 4 << 20, 64 << 20];
/// P.
const WORLDS: [usize; 3] = [2, 4, 8];

/// Measures the all-reduce by each algorithm; throughput is S/t, the message's bytes by the time of the slowest rank.
pub fn bench(criterion: &mut Criterion) {
    let mut benches = criterion.benchmark_group("ring");
    for world in WORLDS {
        for n_bytes in MESSAGE_BYTES.into_iter().filter(|n_bytes| !is_small() || *n_bytes <= 256 << 10) {
            for (name, algorithm) in Algorithm::ALL {
                benches.throughput(Throughput::Bytes(n_bytes as u64));
                benches.bench_function(BenchmarkId::new(format!("all_reduce {name} P{world}"), size(n_bytes)), |bencher| {
                    bencher.iter_custom(|n| {
                        let n_calls = usize::try_from(n).expect("a number of calls fits");
                        let times = call_times(world, n_bytes, algorithm, n_calls).expect("ranks that answer, and right sums");
                        Duration::from_secs_f64(times.iter().sum())
                    });
                });
            }
        }
    }
    benches.finish();
}

fn size(n_bytes: usize) -> String {
    if n_bytes < 1 << 20 { format!("{} KB", n_bytes >> 10) } else { format!("{} MB", n_bytes >> 20) }
}
