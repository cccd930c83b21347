//! How many commands go into one submit. Display drivers reset a GPU that is busy for about two seconds with one, so a submit is kept well below half a
//! second by what earlier ones took. Nothing is known of the first ones: they are short.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::recording::MAX_LAUNCHES;

/// What a submit may take: half of what the design allows, since commands differ.
const TARGET: Duration = Duration::from_millis(250);
/// Commands of the first submits, and the fewest of any.
const FIRST: usize = 64;
/// By how much submits grow at a time.
const GROWTH: usize = 4;

/// Learns from submits that are done.
pub(super) struct Pace {
    most: usize,
    done: Arc<Mutex<Vec<(usize, Duration)>>>,
}

impl Pace {
    /// A software adapter is no display's: its submits may take any time.
    pub(super) fn new(is_software: bool) -> Self {
        Self { most: if is_software { MAX_LAUNCHES } else { FIRST }, done: Arc::default() }
    }

    /// Commands that the next submit may hold.
    pub(super) fn most(&mut self) -> usize {
        let done = std::mem::take(&mut *self.done.lock().unwrap_or_else(PoisonError::into_inner));
        done.into_iter().for_each(|(n, time)| self.learn(n, time));
        self.most
    }

    /// Watches a submit of `n` commands. The time is seen when the device is next polled, so it is rather too long.
    pub(super) fn watch(&self, queue: &wgpu::Queue, n: usize) {
        let (done, start) = (Arc::clone(&self.done), Instant::now());
        queue.on_submitted_work_done(move || {
            done.lock().unwrap_or_else(PoisonError::into_inner).push((n, start.elapsed()));
        });
    }

    fn learn(&mut self, n: usize, time: Duration) {
        let each = time.as_secs_f64() / n.max(1) as f64;
        let fits = (TARGET.as_secs_f64() / each.max(1e-9)) as usize;
        self.most = fits.clamp(FIRST, MAX_LAUNCHES.min(self.most * GROWTH));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn submits_grow_while_they_are_short_and_shrink_when_they_are_not() {
        let mut pace = Pace::new(false);
        assert_eq!(pace.most(), 64);
        pace.learn(64, Duration::from_millis(1));
        assert_eq!(pace.most(), 256);
        for _ in 0..5 {
            pace.learn(256, Duration::from_millis(4));
        }
        assert_eq!(pace.most(), MAX_LAUNCHES);
        pace.learn(1000, Duration::from_millis(500));
        assert_eq!(pace.most(), 500);
        pace.learn(10, Duration::from_secs(3));
        assert_eq!(pace.most(), 64);
        assert_eq!(Pace::new(true).most(), MAX_LAUNCHES);
    }
}
