//! Which rows of the global batch each rank gets.
//!
//! Shares are whole rows, by largest remainder. With measured speeds they follow the throughput of each rank, smoothed, and change only when the
//! step would become clearly shorter; since changed shares change the order of sums, they are part of the checkpoint.

use std::ops::Range;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Steps that are not measured: pipelines are built and caches filled.
const WARM_UP: u64 = 3;
/// Steps between looks at the shares.
const INTERVAL: u64 = 10;
/// Weight of a new measurement.
const SMOOTHING: f64 = 0.2;
/// By how much the speed of a rank without rows is thought to grow at each step.
const HOPE: f64 = 1.02;
/// The slowest rank must be expected to become faster by this much.
const GAIN: f64 = 1.1;

/// Weights of the ranks, and how they change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Balance {
    weights: Vec<f64>,
    /// Rows a second of each rank; empty where shares are fixed.
    speeds: Vec<f64>,
    follows: bool,
    n_seen: u64,
}

impl Balance {
    /// Equal shares, or in proportion to `weights`.
    pub fn fixed(weights: Vec<f64>) -> Self {
        Self { weights, speeds: Vec::new(), follows: false, n_seen: 0 }
    }

    /// Shares that follow measured speed, equal at first.
    pub fn measured(world: usize) -> Self {
        Self { weights: vec![1.0; world], speeds: Vec::new(), follows: true, n_seen: 0 }
    }

    /// Whether shares follow measured speed.
    pub fn follows(&self) -> bool {
        self.follows
    }

    /// Ranks.
    pub fn world(&self) -> usize {
        self.weights.len()
    }

    /// Rows of each rank, in rank order.
    pub fn shares(&self, n_rows: usize) -> Vec<Range<usize>> {
        largest_remainder(&self.weights, n_rows)
    }

    /// Takes note of how long each rank computed on its rows; true when the shares have changed.
    pub fn observe(&mut self, shares: &[Range<usize>], times: &[Duration]) -> bool {
        if !self.follows {
            return false;
        }
        self.n_seen += 1;
        if self.n_seen <= WARM_UP {
            return false;
        }
        let measured = shares.iter().zip(times).map(|(rows, time)| rows.len() as f64 / time.as_secs_f64().max(1e-9));
        if self.speeds.is_empty() {
            self.speeds = measured.collect();
        } else {
            for (speed, new) in self.speeds.iter_mut().zip(measured) {
                if new > 0.0 {
                    *speed += SMOOTHING * (new - *speed);
                } else {
                    // Without rows there is nothing to measure: the estimate grows until the rank gets a row again.
                    *speed *= HOPE;
                }
            }
        }
        if !self.n_seen.is_multiple_of(INTERVAL) {
            return false;
        }
        let n_rows = shares.iter().map(Range::len).sum();
        let longest = |shares: &[Range<usize>]| {
            shares.iter().zip(&self.speeds).map(|(rows, speed)| rows.len() as f64 / speed.max(1e-9)).fold(0.0, f64::max)
        };
        let better = largest_remainder(&self.speeds, n_rows);
        if longest(shares) < GAIN * longest(&better) {
            return false;
        }
        self.weights.clone_from(&self.speeds);
        true
    }
}

/// Cuts `n_rows` in proportion to `weights`: the floor of each quota, what is left to the largest remainders (the first of equal ones).
pub fn largest_remainder(weights: &[f64], n_rows: usize) -> Vec<Range<usize>> {
    let total: f64 = weights.iter().sum();
    let quotas: Vec<f64> = weights.iter().map(|w| w / total * n_rows as f64).collect();
    let mut counts: Vec<usize> = quotas.iter().map(|q| q.floor() as usize).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| (quotas[b] - quotas[b].floor()).total_cmp(&(quotas[a] - quotas[a].floor())).then(a.cmp(&b)));
    let left = n_rows - counts.iter().sum::<usize>();
    order.iter().cycle().take(left).for_each(|&rank| counts[rank] += 1);
    let mut start = 0;
    counts
        .into_iter()
        .map(|count| {
            start += count;
            start - count..start
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_all_rows_in_order_and_in_proportion() {
        assert_eq!(largest_remainder(&[7.0, 2.0, 1.0], 13), [0..9, 9..12, 12..13]);
        assert_eq!(largest_remainder(&[1.0; 4], 13), [0..4, 4..7, 7..10, 10..13]);
        assert_eq!(largest_remainder(&[1.0; 3], 2), [0..1, 1..2, 2..2]);
        assert_eq!(largest_remainder(&[0.0, 1.0], 5), [0..0, 0..5]);
    }

    #[test]
    fn shares_follow_speed_and_then_stay() {
        let mut balance = Balance::measured(2);
        let mut changes = 0;
        for _ in 0..100 {
            let shares = balance.shares(40);
            // Rank 0 takes 1 ms a row, rank 1 takes 3.
            let times = [Duration::from_millis(shares[0].len() as u64), Duration::from_millis(3 * shares[1].len() as u64)];
            changes += u32::from(balance.observe(&shares, &times));
        }
        assert_eq!((balance.shares(40), changes), (vec![0..30, 30..40], 1));
    }

    #[test]
    fn a_rank_that_was_left_out_gets_another_chance() {
        let mut balance = Balance::measured(2);
        let mut of_second = Vec::new();
        for step in 0..600 {
            let shares = balance.shares(10);
            // Rank 1 is busy with something else for a while, a hundred times slower than rank 0.
            let slow = if step < 100 { 100 } else { 1 };
            let times = [Duration::from_millis(shares[0].len() as u64), Duration::from_millis(slow * shares[1].len() as u64)];
            balance.observe(&shares, &times);
            of_second.push(shares[1].len());
        }
        assert!(of_second[..100].contains(&0), "rank 1 was never left out");
        assert_eq!(of_second[599], 5);
    }
}
