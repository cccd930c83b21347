//! How fast an all-reduce is on this machine, and how fast its memory would let it be.
//!
//! Never here: output; the command line prints what this returns.

use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};

use super::plan::Algorithm;
use super::{CommError, Communicator, Options, Shared, group};
use crate::pool::Isa;

/// Calls before the clock starts: memory is touched, plans are made.
const N_WARM_UP: usize = 3;
/// Bytes that the calls of a measurement move together, if nobody says how many to make.
const TOTAL_BYTES: usize = 2 << 30;
/// Calls made if nobody says how many.
const USUAL_CALLS: std::ops::RangeInclusive<usize> = 10..=2000;
/// Bytes of all arrays together in which the memory's bandwidth is measured, and of one array at least.
const MEMORY_BYTES: usize = 256 << 20;
const LEAST_ARRAY_BYTES: usize = 8 << 20;
/// Passes over the arrays; the fastest counts.
const N_PASSES: usize = 5;

/// What was measured. Times are seconds, rates bytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// What was run where `auto` was asked for.
    pub algorithm: Algorithm,
    pub n_calls: usize,
    /// Of the slowest rank, all starting together: the median over the calls, and the fastest call.
    pub seconds: f64,
    pub min_seconds: f64,
    /// Of the machine's memory, all cores adding one array to another, in the same run.
    pub memory_bandwidth: f64,
    /// What that bandwidth needs for the bytes that must be read and written: the messages of all ranks and one sum. A message that
    /// stays in the caches may be faster.
    pub floor_seconds: f64,
}

impl Measured {
    /// The message's bytes by the time of a call.
    pub fn algbw(&self, n_bytes: usize) -> f64 {
        n_bytes as f64 / self.seconds
    }

    /// [`Self::algbw`] x 2(P-1)/P: what each link of a ring would have to carry, which can be compared between worlds.
    pub fn busbw(&self, world: usize, n_bytes: usize) -> f64 {
        self.algbw(n_bytes) * 2.0 * (world as f64 - 1.0) / world as f64
    }
}

/// Times `n_calls` all-reduces of `n_bytes` among `world` threads, and checks each of them.
///
/// # Errors
/// A sum that is wrong, a rank that does not come, or threads that the system does not start.
pub fn measure(world: usize, n_bytes: usize, algorithm: Algorithm, n_calls: Option<usize>) -> Result<Measured> {
    let usual = TOTAL_BYTES / (n_bytes * world).max(1);
    let n_calls = n_calls.unwrap_or(usual.clamp(*USUAL_CALLS.start(), *USUAL_CALLS.end())).max(1);
    let before = memory_bandwidth()?;
    let mut seconds = call_times(world, n_bytes, algorithm, n_calls)?;
    // Whatever else runs on the machine makes memory slower, never faster.
    let memory_bandwidth = before.max(memory_bandwidth()?);
    seconds.sort_unstable_by(f64::total_cmp);
    let floor_seconds = ((world + 1) * n_bytes) as f64 / memory_bandwidth;
    let algorithm = algorithm.resolve();
    Ok(Measured { algorithm, n_calls, seconds: seconds[n_calls / 2], min_seconds: seconds[0], memory_bandwidth, floor_seconds })
}

/// Seconds of each of `n_calls` all-reduces, after a warm-up: those of the slowest rank, all starting together. A call is done when every
/// rank can read the complete sum, which is checked.
///
/// # Errors
/// As [`measure`].
pub fn call_times(world: usize, n_bytes: usize, algorithm: Algorithm, n_calls: usize) -> Result<Vec<f64>> {
    let times = on_ranks(world, algorithm, |comm| rank_times(comm, n_bytes / size_of::<f32>(), n_calls))?;
    let slowest = |call: usize| times.iter().map(|times| times[call]).fold(0.0, f64::max);
    Ok((0..n_calls).map(slowest).collect())
}

/// Runs `work` on a thread a rank; what each returned, in rank order.
fn on_ranks<T: Send>(world: usize, algorithm: Algorithm, work: impl Fn(&mut Communicator) -> Result<T> + Sync) -> Result<Vec<T>> {
    let ranks = group(world, Options { algorithm, ..Options::default() });
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|mut comm| std::thread::Builder::new().spawn_scoped(scope, move || work(&mut comm)))
            .collect::<Result<_, _>>()
            .context("cannot start a thread a rank; try fewer ranks")?;
        // Joined all, then judged: the first error may be about a peer that has the reason.
        let outcomes: Vec<Result<T>> =
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a rank panicked")))).collect();
        outcomes.into_iter().collect()
    })
}

/// Seconds of each call on this rank.
fn rank_times(comm: &mut Communicator, len: usize, n_calls: usize) -> Result<Vec<f64>> {
    let mut message = comm.shared(len);
    let mut times = Vec::with_capacity(n_calls);
    for call in 0..N_WARM_UP + n_calls {
        fill(&mut message, comm.rank());
        start_together(comm)?;
        let start = Instant::now();
        comm.all_reduce_shared(&mut message)?;
        let time = start.elapsed().as_secs_f64();
        if call >= N_WARM_UP {
            times.push(time);
        }
        // The whole sum at first, later a sample.
        check(&message, comm.world(), if call == 0 { 1 } else { 1021 })?;
    }
    Ok(times)
}

fn start_together(comm: &mut Communicator) -> Result<(), CommError> {
    comm.all_reduce(&mut [0.0])
}

/// Whole numbers, small enough to be summed exactly in any order.
fn value(rank: usize, i: usize) -> f32 {
    ((rank + 1) * (i % 61)) as f32
}

fn fill(message: &mut Shared, rank: usize) {
    for (range, part) in message.parts_mut() {
        part.iter_mut().zip(range).for_each(|(to, i)| *to = value(rank, i));
    }
}

fn check(message: &Shared, world: usize, stride: usize) -> Result<()> {
    for (range, part) in message.parts() {
        for (i, got) in range.zip(part).step_by(stride) {
            let wanted: f32 = (0..world).map(|rank| value(rank, i)).sum();
            ensure!(*got == wanted, "the sum over {world} ranks is {got} at element {i}, not {wanted}; this is worth a bug report");
        }
    }
    Ok(())
}

/// Bytes a second that all cores together read and write: `a += b` reads two and writes one.
fn memory_bandwidth() -> Result<f64> {
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let len = (MEMORY_BYTES / 2 / n_threads).max(LEAST_ARRAY_BYTES) / size_of::<f32>();
    let isa = Isa::detect();
    let times = on_ranks(n_threads, Algorithm::Auto, |comm| {
        let mut a = vec![0.0; len];
        let b = [super::sum::Handle::new(vec![1.0; len])];
        (0..=N_PASSES)
            .map(|_| {
                start_together(comm)?;
                let start = Instant::now();
                super::sum::accumulate(isa, &mut a, &b);
                Ok(start.elapsed().as_secs_f64())
            })
            .collect::<Result<Vec<f64>>>()
    })?;
    // The first pass touches pages.
    let slowest = |pass: usize| times.iter().map(|times| times[pass]).fold(0.0, f64::max);
    let fastest = (1..=N_PASSES).map(slowest).fold(f64::INFINITY, f64::min);
    Ok((3 * size_of::<f32>() * len * n_threads) as f64 / fastest)
}
