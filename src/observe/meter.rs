//! How fast something goes on, over the last few seconds.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Parts of the window that are told apart. Bounded, so that counting every step allocates nothing.
const N_PARTS: u32 = 32;

/// Units (tokens, steps) a second over a sliding window. The caller brings the clock.
#[derive(Clone, Debug)]
pub struct Throughput {
    window: Duration,
    total: u64,
    /// (when, total then), oldest first.
    marks: VecDeque<(Instant, u64)>,
}

impl Throughput {
    /// A meter that looks back over `window` and starts counting at `start`.
    pub fn new(window: Duration, start: Instant) -> Self {
        let mut marks = VecDeque::with_capacity(N_PARTS as usize + 4);
        marks.push_back((start, 0));
        Self { window, total: 0, marks }
    }

    /// `amount` more units were done by `now`.
    pub fn add(&mut self, now: Instant, amount: u64) {
        self.total = self.total.saturating_add(amount);
        let n = self.marks.len();
        let part = self.window / N_PARTS;
        // The last mark moves along until it is a whole part away from the one before it.
        if n >= 2 && now.saturating_duration_since(self.marks[n - 2].0) < part {
            self.marks[n - 1] = (now, self.total);
        } else {
            self.marks.push_back((now, self.total));
        }
        // The oldest mark stays as long as the next one lies within the window, so that slow steps still have a rate.
        while self.marks.len() > 2
            && (now.saturating_duration_since(self.marks[1].0) >= self.window || self.marks.len() > N_PARTS as usize + 2)
        {
            self.marks.pop_front();
        }
    }

    /// Units a second; None until some time has passed.
    pub fn per_second(&self) -> Option<f64> {
        let (&(from, before), &(to, after)) = (self.marks.front()?, self.marks.back()?);
        let seconds = to.saturating_duration_since(from).as_secs_f64();
        (seconds > 0.0).then(|| (after - before) as f64 / seconds)
    }

    /// Seconds that `remaining` units will take at this rate; None where there is no rate yet.
    pub fn seconds_for(&self, remaining: u64) -> Option<f64> {
        self.per_second().filter(|&rate| rate > 0.0).map(|rate| remaining as f64 / rate)
    }
}
