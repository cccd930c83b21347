//! The all-reduce between ranks that are threads of one process, without any training around it.

use std::thread;
use std::time::{Duration, Instant};

use carrousel::comm::{Options, group};
use criterion::{BenchmarkId, Criterion, Throughput};

/// Messages measured, bytes: latency counts, in between, bandwidth counts.
const MESSAGE_BYTES: [usize; 3] = [4 << 10, 256 << 10, 4 << 20];
/// P.
const WORLDS: [usize; 2] = [2, 4];

/// Measures the all-reduce; throughput is S/t, the message's bytes by the time.
pub fn bench(criterion: &mut Criterion) {
    let mut benches = criterion.benchmark_group("ring");
    for world in WORLDS {
        for n_bytes in MESSAGE_BYTES {
            benches.throughput(Throughput::Bytes(n_bytes as u64));
            benches.bench_function(BenchmarkId::new(format!("all_reduce P{world}"), size(n_bytes)), |bencher| {
                bencher.iter_custom(|n| time(world, n_bytes / size_of::<f32>(), n));
            });
        }
    }
    benches.finish();
}

fn size(n_bytes: usize) -> String {
    if n_bytes < 1 << 20 { format!("{} KB", n_bytes >> 10) } else { format!("{} MB", n_bytes >> 20) }
}

/// The time that the slowest rank takes for `n` calls. A call before them verifies the sum, makes the buffers and brings the ranks together.
fn time(world: usize, len: usize, n: u64) -> Duration {
    let ranks = group(world, Options::default());
    thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|mut rank| {
                scope.spawn(move || {
                    // Whole numbers that are small enough to be summed exactly.
                    let mine = |rank: usize| move |i: usize| ((rank + 1) * (i % 1000)) as f32;
                    let mut data: Vec<f32> = (0..len).map(mine(rank.rank())).collect();
                    rank.all_reduce(&mut data).expect("ranks that answer");
                    let sum = |i: usize| (0..world).map(|rank| mine(rank)(i)).sum::<f32>();
                    assert!(data.iter().enumerate().all(|(i, got)| *got == sum(i)), "a sum over {world} ranks of {len} floats is wrong");
                    // From here on zeros, which no number of sums makes overflow.
                    data.fill(0.0);
                    let mut nothing = [0.0; 1];
                    rank.all_reduce(&mut nothing).expect("ranks that answer");
                    let start = Instant::now();
                    for _ in 0..n {
                        rank.all_reduce(&mut data).expect("ranks that answer");
                    }
                    start.elapsed()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank that does not panic")).max().unwrap_or_default()
    })
}
