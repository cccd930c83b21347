//! Threads that wait for parts of a kernel: the first part's thread is the caller's own, the others look out for work a while before they sleep.
//!
//! A step of training is some dozen regions of a millisecond, a few microseconds apart. Waking a thread for each of them would cost more than
//! small ones take, and a woken thread is likely to be put on the core of the one that woke it. So a crew stays awake between the
//! regions of a step; and what no thread has begun when the caller is done with its own part, the caller does too. Neither changes who
//! computes which sum, only when. Nothing is allocated for a region.

use std::cell::Cell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Divide;

/// How long a thread without work looks out for more before it sleeps.
const LOOK_OUT: Duration = Duration::from_micros(200);

/// Looks between two glances at the clock, after which others that want the core may have it.
const LOOKS: usize = 64;

/// A part of a kernel that some thread will run; it lies on the stack of the thread that waits for it.
struct Job {
    /// Called once, with `part`.
    run: unsafe fn(*const ()),
    part: *const (),
}

/// Where a thread finds its next job.
#[repr(align(128))]
#[derive(Default)]
struct Seat {
    /// Null: none. Whoever takes the address out runs the job.
    job: AtomicPtr<Job>,
    sleeps: AtomicBool,
}

#[derive(Default)]
struct Shared {
    seats: Vec<Seat>,
    /// Jobs that are not done.
    open: AtomicUsize,
    has_panicked: AtomicBool,
    closes: AtomicBool,
    /// The caller waits for the last job.
    waits: AtomicBool,
    lock: Mutex<()>,
    done: Condvar,
}

impl Shared {
    /// Takes and runs the job of a seat.
    fn work_at(&self, seat: usize) -> bool {
        let job = self.seats[seat].job.swap(null_mut(), Ordering::AcqRel);
        if job.is_null() {
            return false;
        }
        // SAFETY: the job and its part live until `open` is 0, to which this run counts; swapping it out made it ours alone.
        let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { ((*job).run)((*job).part) }));
        if outcome.is_err() {
            self.has_panicked.store(true, Ordering::Relaxed);
        }
        if self.open.fetch_sub(1, Ordering::SeqCst) == 1 && self.waits.load(Ordering::SeqCst) {
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.done.notify_one();
        }
        true
    }

    /// Looks until `found` says so, at most for a while.
    fn look_out(found: impl Fn() -> bool) -> bool {
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if found() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() > LOOK_OUT {
                return false;
            }
            std::thread::yield_now();
        }
    }

    /// The life of a thread.
    fn serve(&self, idx: usize) {
        let seat = &self.seats[idx];
        let has_work = || !seat.job.load(Ordering::SeqCst).is_null() || self.closes.load(Ordering::SeqCst);
        while !self.closes.load(Ordering::SeqCst) {
            if self.work_at(idx) || Self::look_out(has_work) {
                continue;
            }
            seat.sleeps.store(true, Ordering::SeqCst);
            while !has_work() {
                std::thread::park();
            }
            seat.sleeps.store(false, Ordering::SeqCst);
        }
    }

    fn wait(&self) {
        let all_done = || self.open.load(Ordering::SeqCst) == 0;
        if Self::look_out(all_done) {
            return;
        }
        self.waits.store(true, Ordering::SeqCst);
        let mut held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while !all_done() {
            held = self.done.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        self.waits.store(false, Ordering::SeqCst);
    }
}

/// Some threads beside the caller's.
pub(super) struct Crew {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// A region is under way.
    is_busy: AtomicBool,
}

impl Crew {
    pub fn new(n_threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { seats: (0..n_threads).map(|_| Seat::default()).collect(), ..Shared::default() });
        let mut crew = Self { shared, threads: Vec::with_capacity(n_threads), is_busy: AtomicBool::new(false) };
        for idx in 0..n_threads {
            let shared = Arc::clone(&crew.shared);
            let thread = std::thread::Builder::new().name(format!("carrousel-cpu-{}", idx + 1));
            crew.threads.push(thread.spawn(move || shared.serve(idx))?);
        }
        Ok(crew)
    }

    /// Runs `f` on `n_parts` parts of the work, at most one more than there are threads, and returns when all are done.
    pub fn run<D: Divide>(&self, work: D, n_rows: usize, n_parts: usize, f: &(impl Fn(D, Range<usize>) + Sync)) {
        // A region within a region, or of another thread meanwhile, has the same parts, one after another.
        let crew = (!self.is_busy.swap(true, Ordering::Acquire)).then_some(self);
        let release = Release(crew);
        if crew.is_some() {
            // Left by a region that ended by the caller's own panic.
            self.shared.has_panicked.store(false, Ordering::Relaxed);
        }
        deal(crew, work, 0..n_rows, n_parts, f);
        drop(release);
        if crew.is_some() && self.shared.has_panicked.swap(false, Ordering::Relaxed) {
            panic!("a thread of the CPU backend panicked; its message is above");
        }
    }

    fn give(&self, seat: usize, job: &Job) {
        let shared = &self.shared;
        shared.open.fetch_add(1, Ordering::SeqCst);
        shared.seats[seat].job.store(std::ptr::from_ref(job).cast_mut(), Ordering::SeqCst);
        if shared.seats[seat].sleeps.load(Ordering::SeqCst) {
            self.threads[seat].thread().unpark();
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.shared.closes.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // Its panics were told as they happened.
            let _ = thread.join();
        }
    }
}

/// Ends a region, whatever happened in it.
struct Release<'a>(Option<&'a Crew>);

impl Drop for Release<'_> {
    fn drop(&mut self) {
        if let Some(crew) = self.0 {
            crew.is_busy.store(false, Ordering::Release);
        }
    }
}

/// A part of the work on its way to the thread that will run it.
struct Part<'a, D, F> {
    work: Cell<Option<(D, Range<usize>)>>,
    f: &'a F,
}

/// # Safety
/// `part` is a [`Part`] of these types, alive, and no other thread's.
unsafe fn run_part<D: Divide, F: Fn(D, Range<usize>) + Sync>(part: *const ()) {
    // SAFETY: as the caller says.
    let part = unsafe { &*part.cast::<Part<'_, D, F>>() };
    if let Some((work, rows)) = part.work.take() {
        (part.f)(work, rows);
    }
}

/// When dropped, also by a panic, no job lies on the stack above any more.
struct AllDone<'a>(&'a Crew);

impl Drop for AllDone<'_> {
    fn drop(&mut self) {
        let shared = &self.0.shared;
        if shared.open.load(Ordering::SeqCst) > 0 {
            // What nobody has begun is done here.
            for seat in 0..shared.seats.len() {
                shared.work_at(seat);
            }
            shared.wait();
        }
    }
}

/// Hands out a part for each seat, from the last part's seat down, and runs the last part here. The first parts have the most rows, as `split_even` cuts.
fn deal<D: Divide, F: Fn(D, Range<usize>) + Sync>(crew: Option<&Crew>, work: D, rows: Range<usize>, n_parts: usize, f: &F) {
    if n_parts == 1 {
        return f(work, rows);
    }
    let len = rows.len().div_ceil(n_parts);
    let middle = rows.start + len;
    let (first, rest) = work.divide(len);
    let Some(crew) = crew else {
        f(first, rows.start..middle);
        return deal(None, rest, middle..rows.end, n_parts - 1, f);
    };
    let part = Part { work: Cell::new(Some((first, rows.start..middle))), f };
    let job = Job { run: run_part::<D, F>, part: (&raw const part).cast() };
    // Dropped before `job` and `part` are, which therefore outlive every use.
    let _all_done = AllDone(crew);
    crew.give(n_parts - 2, &job);
    deal(Some(crew), rest, middle..rows.end, n_parts - 1, f);
}
