//! The test binary's allocator: the system's, with a count for each thread, so that a test can say that a loop allocates nothing
//! whatever other tests do meanwhile.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    // Neither lazily made nor dropped: reading it allocates nothing and works until the thread's end.
    static N_ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    // Bytes taken less bytes given back, and the most that ever were.
    static LIVE: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

/// What `work` comes to, and the most bytes that this thread held meanwhile beyond what it held before.
pub fn peak_of<T>(work: impl FnOnce() -> T) -> (T, i64) {
    let before = LIVE.get();
    PEAK.set(before);
    let made = work();
    (made, PEAK.get() - before)
}

fn grow(bytes: i64) {
    LIVE.set(LIVE.get() + bytes);
    PEAK.set(PEAK.get().max(LIVE.get()));
}

/// Allocations and reallocations of this thread since its start.
pub fn n_allocations() -> u64 {
    N_ALLOCATIONS.get()
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call is handed to the system's allocator unchanged; the count lies in memory that it does not manage.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        N_ALLOCATIONS.set(N_ALLOCATIONS.get() + 1);
        grow(layout.size() as i64);
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        N_ALLOCATIONS.set(N_ALLOCATIONS.get() + 1);
        grow(layout.size() as i64);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        N_ALLOCATIONS.set(N_ALLOCATIONS.get() + 1);
        grow(new_size as i64 - layout.size() as i64);
        // SAFETY: as above.
        unsafe { System.realloc(block, layout, new_size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        grow(-(layout.size() as i64));
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}

#[test]
fn the_count_sees_this_threads_allocations_and_no_others() {
    let before = n_allocations();
    let boxed = std::hint::black_box(Box::new(1));
    assert_eq!(n_allocations(), before + 1);
    drop(boxed);
    let ready = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let other = {
        let ready = std::sync::Arc::clone(&ready);
        std::thread::spawn(move || {
            let many: Vec<Box<usize>> = std::hint::black_box((0..1000).map(Box::new).collect());
            ready.store(many.len() as u64, std::sync::atomic::Ordering::Release);
        })
    };
    let spawned = n_allocations();
    while ready.load(std::sync::atomic::Ordering::Acquire) == 0 {
        std::hint::spin_loop();
    }
    assert_eq!(n_allocations(), spawned);
    other.join().expect("the other thread only allocates");
}
