//! How fast something goes on over the last few seconds, and whether a noisy number rises or falls.

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

/// Values that a trend is judged by.
const N_TREND: usize = 40;
/// Fewer than this tell no trend.
const LEAST_TREND: usize = 8;

/// Where a noisy number is heading, from its last values.
#[derive(Clone, Debug, Default)]
pub struct Trend {
    /// The oldest first.
    values: VecDeque<f64>,
}

impl Trend {
    /// Takes the next value; one that is not finite makes everything before it void.
    pub fn add(&mut self, value: f64) {
        if !value.is_finite() {
            self.values.clear();
            return;
        }
        if self.values.len() == N_TREND {
            self.values.pop_front();
        }
        self.values.push_back(value);
    }

    /// The mean of the newer half; NaN where there is nothing.
    pub fn level(&self) -> f64 {
        mean_and_error(self.values.iter().skip(self.values.len() / 2)).0
    }

    /// `↓`, `↑`, or `→` where the halves do not differ by more than twice what chance makes of their means; nothing where it is too early to tell.
    pub fn arrow(&self) -> &'static str {
        let half = self.values.len() / 2;
        if self.values.len() < LEAST_TREND {
            return "";
        }
        let (older, older_error) = mean_and_error(self.values.iter().take(half));
        let (newer, newer_error) = mean_and_error(self.values.iter().skip(half));
        match newer - older {
            change if change.abs() <= 2.0 * older_error.hypot(newer_error) => "→",
            change if change < 0.0 => "↓",
            _ => "↑",
        }
    }
}

/// The mean and its standard error.
fn mean_and_error<'a>(values: impl Iterator<Item = &'a f64> + Clone) -> (f64, f64) {
    let n = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / n;
    let variance = values.map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, (variance / n).sqrt())
}
