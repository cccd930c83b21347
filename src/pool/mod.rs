//! What a CPU kernel is given: threads, scratch memory, the instruction set.
//!
//! Work is cut by the number of threads alone, never by timing, so that sums have the same bits run after run.

mod crew;

use std::ops::Range;

use self::crew::Crew;

/// The environment variable that narrows the instruction set.
pub const ISA_VARIABLE: &str = "CARROUSEL_ISA";

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

    /// The set that is asked for by name (`avx512`, `avx2`, `baseline`), nothing or none of them meaning the widest.
    ///
    /// # Errors
    /// A name that is none of these, or a set that this processor does not have.
    pub fn named(name: Option<&str>) -> anyhow::Result<Self> {
        let widest = Self::detect();
        let Some(name) = name.filter(|name| !name.is_empty()) else { return Ok(widest) };
        let sets = [Self::Avx512, Self::Avx2, Self::Baseline];
        let place = |isa: Self| sets.iter().position(|&set| set == isa);
        let asked = sets.into_iter().find(|isa| isa.name() == name);
        let asked = asked.ok_or_else(|| anyhow::anyhow!("{ISA_VARIABLE}={name} is none of avx512, avx2, baseline"))?;
        anyhow::ensure!(
            place(asked) >= place(widest),
            "{ISA_VARIABLE}={name} is more than this processor has, which is {}; leave it out",
            widest.name()
        );
        Ok(asked)
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
/// The arithmetic is the same in all of them: no multiplication and addition are fused. Products are (see `kernels::microkernel`), and so is
/// what a `fused` body says through its constant `FUSED`, which is true where the instruction set has an instruction for it.
#[macro_export]
macro_rules! for_isa {
    ($isa:expr, fused $body:ident($($arg:ident: $ty:ty),* $(,)?)) => {
        $crate::for_isa!($isa, ($body::<true>), ($body::<{ cfg!(target_arch = "aarch64") }>), $($arg: $ty),*)
    };
    ($isa:expr, $body:ident($($arg:ident: $ty:ty),* $(,)?)) => {
        $crate::for_isa!($isa, ($body), ($body), $($arg: $ty),*)
    };
    ($isa:expr, ($wide:expr), ($baseline:expr), $($arg:ident: $ty:ty),*) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
            #[allow(clippy::too_many_arguments, reason = "as many as the body has")]
            fn avx512($($arg: $ty),*) { $wide($($arg),*) }
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments, reason = "as many as the body has")]
            fn avx2($($arg: $ty),*) { $wide($($arg),*) }
            match $isa {
                // SAFETY: an `Isa` other than the baseline is only made by `Isa::detect`, or by a test that checks it, after the processor reported these features.
                $crate::pool::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                $crate::pool::Isa::Avx2 => unsafe { avx2($($arg),*) },
                $crate::pool::Isa::Baseline => $baseline($($arg),*),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            // Every aarch64 has NEON; a test may name the baseline of another.
            let _ = $isa;
            $baseline($($arg),*)
        }
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
    crew: Option<Crew>,
}

impl Pool {
    /// A pool of `n_threads`, of which the caller's is one.
    ///
    /// # Errors
    /// The operating system's, when it starts no more threads.
    pub fn new(n_threads: usize) -> anyhow::Result<Self> {
        anyhow::ensure!(n_threads > 0, "a CPU worker needs at least one thread");
        let crew = |n: usize| {
            Crew::new(n - 1).map_err(|e| anyhow::anyhow!("cannot start {n} threads: {e}; ask for fewer with --devices cpu:THREADS"))
        };
        Ok(Self { n_threads, crew: (n_threads > 1).then(|| crew(n_threads)).transpose()? })
    }

    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// Runs `f(part, rows)` on parts of `work`, which has `n_rows` rows: one part a thread, but none below `min_rows` rows.
    ///
    /// # Panics
    /// When `f` does, on whatever thread.
    pub fn run<D: Divide>(&self, work: D, n_rows: usize, min_rows: usize, f: &(impl Fn(D, Range<usize>) + Sync)) {
        let n_parts = self.n_threads.min(n_rows / min_rows.max(1)).max(1);
        match &self.crew {
            Some(crew) if n_parts > 1 => crew.run(work, n_rows, n_parts, f),
            _ => f(work, 0..n_rows),
        }
    }
}

/// Floats of a cache line.
pub const LINE: usize = 16;

/// The first place of `data` at which a cache line starts; at most [`LINE`].
pub fn line_start(data: &[f32]) -> usize {
    data.as_ptr().align_offset(LINE * 4).min(LINE)
}

/// Scratch memory that grows to what the largest kernel needs and is then reused.
#[derive(Default)]
pub struct Arena {
    data: Vec<f32>,
}

impl Arena {
    /// `len` floats with unspecified values, from the start of a cache line on: a vector across two lines costs two loads.
    pub fn take(&mut self, len: usize) -> &mut [f32] {
        if self.data.len() < len + LINE {
            // What is there need not be kept, so it is not copied, and never lies twice.
            self.data = Vec::new();
            self.data.resize(len + LINE, 0.0);
        }
        let skip = line_start(&self.data);
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
    /// A context with `n_threads` threads and the widest instruction set of this processor, unless [`ISA_VARIABLE`] asks for less.
    ///
    /// # Errors
    /// See [`Pool::new`] and [`Isa::named`].
    pub fn new(n_threads: usize) -> anyhow::Result<Self> {
        Ok(Self { pool: Pool::new(n_threads)?, scratch: Arena::default(), isa: Isa::named(std::env::var(ISA_VARIABLE).ok().as_deref())? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::split_even;

    #[test]
    fn parts_are_cut_as_evenly_as_rows_allow_with_the_remainder_first() {
        for n_threads in 1..=6 {
            let pool = Pool::new(n_threads).unwrap();
            for n_rows in [n_threads, 7, 64, 65] {
                let mut starts = vec![0.0; n_rows];
                pool.run(Rows { data: &mut starts, width: 1 }, n_rows, 1, &|part: Rows<'_>, rows: Range<usize>| {
                    part.data.fill(rows.start as f32);
                });
                let n_parts = n_threads.min(n_rows);
                let want: Vec<f32> =
                    split_even(n_rows, n_parts).into_iter().flat_map(|part| part.clone().map(move |_| part.start as f32)).collect();
                assert_eq!(starts, want, "{n_threads} threads, {n_rows} rows");
            }
        }
    }

    #[test]
    fn an_instruction_set_may_be_narrowed_by_name_and_not_widened() {
        let widest = Isa::detect();
        assert_eq!(Isa::named(None).unwrap(), widest);
        assert_eq!(Isa::named(Some("")).unwrap(), widest);
        assert_eq!(Isa::named(Some("baseline")).unwrap(), Isa::Baseline);
        assert_eq!(Isa::named(Some(widest.name())).unwrap(), widest);
        if widest != Isa::Avx512 {
            let told = Isa::named(Some("avx512")).unwrap_err().to_string();
            assert!(told.contains("avx512") && told.contains(widest.name()), "{told}");
        }
        assert!(Isa::named(Some("sse9")).unwrap_err().to_string().contains("sse9"));
    }

    #[test]
    fn thousands_of_regions_with_pauses_between_lose_no_part() {
        let pool = Pool::new(3).unwrap();
        let mut data = vec![0.0; 30];
        for region in 0..4000 {
            if region % 500 == 0 {
                // Long enough for the threads to fall asleep.
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            pool.run(Rows { data: &mut data, width: 1 }, 30, 1, &|part: Rows<'_>, _: Range<usize>| {
                part.data.iter_mut().for_each(|v| *v += 1.0)
            });
        }
        assert!(data.iter().all(|&v| v == 4000.0), "{data:?}");
    }

    #[test]
    fn a_region_within_a_region_and_one_of_another_thread_see_every_row_once() {
        let pool = Pool::new(2).unwrap();
        let ones = |data: &mut [f32]| {
            let n = data.len();
            pool.run(Rows { data, width: 1 }, n, 1, &|part: Rows<'_>, _: Range<usize>| part.data.iter_mut().for_each(|v| *v += 1.0));
        };
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let mut data = vec![0.0; 16];
                        pool.run(Rows { data: &mut data, width: 4 }, 4, 1, &|part: Rows<'_>, _: Range<usize>| ones(part.data));
                        assert!(data.iter().all(|&v| v == 1.0), "{data:?}");
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_in_a_part_reaches_the_caller_after_all_parts_are_done_and_the_pool_lives_on() {
        let pool = Pool::new(4).unwrap();
        for bad in 0..4 {
            let mut data = vec![0.0; 4];
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                pool.run(Rows { data: &mut data, width: 1 }, 4, 1, &|part: Rows<'_>, rows: Range<usize>| {
                    assert!(rows.start != bad, "planted");
                    part.data.fill(1.0);
                });
            }));
            assert!(outcome.is_err());
            assert_eq!(data.iter().sum::<f32>(), 3.0);
        }
        let mut data = vec![0.0; 8];
        pool.run(Rows { data: &mut data, width: 1 }, 8, 1, &|part: Rows<'_>, _: Range<usize>| part.data.fill(1.0));
        assert_eq!(data, [1.0; 8]);
    }

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
