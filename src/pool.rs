//! What a CPU kernel is given: threads, scratch memory, the instruction set.
//!
//! Work is cut by the number of threads alone, never by timing, so that sums have the same bits run after run.

use std::ops::Range;

use crate::shape::split_even;

/// The instruction set that kernels use, found at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    Avx512,
    Avx2,
    /// What the compiler assumes for the target: SSE2 on x86-64, NEON on aarch64.
    Baseline,
}

impl Isa {
    /// The widest set that this processor has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Baseline
    }

    /// Its name as recorded in a run.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Baseline => "baseline",
        }
    }
}

/// Compiles `$body` (an `#[inline(always)]` function) once for each instruction set and calls the one in `$isa`.
/// The arithmetic is the same in all of them: no multiplication and addition are fused. (Products are: see `kernels::microkernel`.)
#[macro_export]
macro_rules! for_isa {
    ($isa:expr, $body:ident($($arg:ident: $ty:ty),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
            #[allow(clippy::too_many_arguments, reason = "as many as the body has")]
            fn avx512($($arg: $ty),*) { $body($($arg),*) }
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments, reason = "as many as the body has")]
            fn avx2($($arg: $ty),*) { $body($($arg),*) }
            match $isa {
                // SAFETY: an `Isa` other than the baseline is only made by `Isa::detect`, or by a test that checks it, after the processor reported these features.
                $crate::pool::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                $crate::pool::Isa::Avx2 => unsafe { avx2($($arg),*) },
                $crate::pool::Isa::Baseline => $body($($arg),*),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        $body($($arg),*)
    }};
}

/// Work that can be cut in two at a row, so that two threads share it.
pub trait Divide: Sized + Send {
    /// The first `at` rows and the rest.
    fn divide(self, at: usize) -> (Self, Self);
}

/// Rows of `width` floats.
pub struct Rows<'a> {
    pub data: &'a mut [f32],
    pub width: usize,
}

impl Divide for Rows<'_> {
    fn divide(self, at: usize) -> (Self, Self) {
        let (a, b) = self.data.split_at_mut((at * self.width).min(self.data.len()));
        (Self { data: a, width: self.width }, Self { data: b, width: self.width })
    }
}

impl<D: Divide> Divide for Option<D> {
    fn divide(self, at: usize) -> (Self, Self) {
        self.map_or((None, None), |work| {
            let (a, b) = work.divide(at);
            (Some(a), Some(b))
        })
    }
}

impl<A: Divide, B: Divide> Divide for (A, B) {
    fn divide(self, at: usize) -> (Self, Self) {
        let ((a0, a1), (b0, b1)) = (self.0.divide(at), self.1.divide(at));
        ((a0, b0), (a1, b1))
    }
}

impl<A: Divide, B: Divide, C: Divide> Divide for (A, B, C) {
    fn divide(self, at: usize) -> (Self, Self) {
        let ((a0, a1), (b0, b1), (c0, c1)) = (self.0.divide(at), self.1.divide(at), self.2.divide(at));
        ((a0, b0, c0), (a1, b1, c1))
    }
}

/// The threads of one worker.
pub struct Pool {
    n_threads: usize,
    threads: Option<rayon::ThreadPool>,
}

impl Pool {
    /// A pool of `n_threads`; with one the caller's thread does the work.
    ///
    /// # Errors
    /// The operating system's, when it starts no more threads.
    pub fn new(n_threads: usize) -> anyhow::Result<Self> {
        anyhow::ensure!(n_threads > 0, "a CPU worker needs at least one thread");
        let threads = match n_threads {
            1 => None,
            n => Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(n)
                    .thread_name(|i| format!("carrousel-cpu-{i}"))
                    .build()
                    .map_err(|e| anyhow::anyhow!("cannot start {n} threads: {e}; ask for fewer with --devices cpu:THREADS"))?,
            ),
        };
        Ok(Self { n_threads, threads })
    }

    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// Runs `f(part, rows)` on parts of `work`, which has `n_rows` rows: one part a thread, but none below `min_rows` rows.
    pub fn run<D: Divide>(&self, work: D, n_rows: usize, min_rows: usize, f: &(impl Fn(D, Range<usize>) + Sync)) {
        let n_parts = self.n_threads.min(n_rows / min_rows.max(1)).max(1);
        match &self.threads {
            Some(threads) if n_parts > 1 => threads.install(|| fan_out(work, 0..n_rows, n_parts, f)),
            _ => f(work, 0..n_rows),
        }
    }
}

fn fan_out<D: Divide>(work: D, rows: Range<usize>, n_parts: usize, f: &(impl Fn(D, Range<usize>) + Sync)) {
    if n_parts == 1 {
        return f(work, rows);
    }
    let left_parts = n_parts / 2;
    let parts = split_even(rows.len(), n_parts);
    let at = parts[left_parts].start;
    let (left, right) = work.divide(at);
    let middle = rows.start + at;
    rayon::join(|| fan_out(left, rows.start..middle, left_parts, f), || fan_out(right, middle..rows.end, n_parts - left_parts, f));
}

/// Scratch memory that grows to what the largest kernel needs and is then reused.
#[derive(Default)]
pub struct Arena {
    data: Vec<f32>,
}

impl Arena {
    /// Floats of a cache line.
    const LINE: usize = 16;

    /// `len` floats with unspecified values, from the start of a cache line on: a vector across two lines costs two loads.
    pub fn take(&mut self, len: usize) -> &mut [f32] {
        if self.data.len() < len + Self::LINE {
            // What is there need not be kept, so it is not copied, and never lies twice.
            self.data = Vec::new();
            self.data.resize(len + Self::LINE, 0.0);
        }
        let skip = self.data.as_ptr().align_offset(Self::LINE * 4).min(Self::LINE);
        &mut self.data[skip..skip + len]
    }
}

/// What every CPU kernel is given.
pub struct CpuContext {
    pub pool: Pool,
    pub scratch: Arena,
    pub isa: Isa,
}

impl CpuContext {
    /// A context with `n_threads` threads and the widest instruction set of this processor.
    ///
    /// # Errors
    /// See [`Pool::new`].
    pub fn new(n_threads: usize) -> anyhow::Result<Self> {
        Ok(Self { pool: Pool::new(n_threads)?, scratch: Arena::default(), isa: Isa::detect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_given_to_exactly_one_part() {
        for n_threads in 1..=5 {
            let pool = Pool::new(n_threads).unwrap();
            for n_rows in [0, 1, 2, 7, 64] {
                let mut data = vec![0.0; n_rows * 3];
                pool.run(Rows { data: &mut data, width: 3 }, n_rows, 1, &|part: Rows, rows: Range<usize>| {
                    assert_eq!(part.data.len(), rows.len() * 3);
                    for (row, values) in rows.zip(part.data.chunks_mut(3)) {
                        values.iter_mut().for_each(|v| *v += row as f32 + 1.0);
                    }
                });
                assert!(
                    data.chunks(3).enumerate().all(|(row, v)| v.iter().all(|&x| x == row as f32 + 1.0)),
                    "{n_threads} threads, {n_rows} rows"
                );
            }
        }
    }
}
