//! Which rows of the global batch each rank gets.
//!
//! Shares are whole rows, by largest remainder; where rows end at different steps, they are cut so that the valid tokens of the ranks follow the
//! weights as near as whole rows allow. With measured speeds they follow the throughput of each rank, smoothed, and change only when the
//! step would become clearly shorter; since changed shares change the order of sums, they are part of the checkpoint.

use std::ops::Range;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::data::Batch;

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
    /// Valid tokens a second of each rank; empty where shares are fixed.
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

    /// Rows of a batch for each rank, in rank order.
    pub fn shares_of(&self, batch: &Batch) -> Vec<Range<usize>> {
        cut(&self.weights, batch)
    }

    /// Takes note of how long each rank computed on its rows of the batch; true when the shares have changed.
    pub fn observe(&mut self, batch: &Batch, shares: &[Range<usize>], times: &[Duration]) -> bool {
        if !self.follows {
            return false;
        }
        self.n_seen += 1;
        if self.n_seen <= WARM_UP {
            return false;
        }
        let tokens = |rows: &Range<usize>| rows.clone().map(|row| batch.length(row)).sum::<usize>() as f64;
        let measured = shares.iter().zip(times).map(|(rows, time)| tokens(rows) / time.as_secs_f64().max(1e-9));
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
        let longest = |shares: &[Range<usize>]| {
            shares.iter().zip(&self.speeds).map(|(rows, speed)| tokens(rows) / speed.max(1e-9)).fold(0.0, f64::max)
        };
        let better = cut(&self.speeds, batch);
        if longest(shares) < GAIN * longest(&better) {
            return false;
        }
        self.weights.clone_from(&self.speeds);
        true
    }
}

/// Cuts a batch's rows in proportion to `weights`: by rows where all are alike, else by valid tokens, each cut at the row where it comes nearest.
fn cut(weights: &[f64], batch: &Batch) -> Vec<Range<usize>> {
    let Some(lengths) = &batch.lengths else { return largest_remainder(weights, batch.n_rows) };
    let total: f64 = weights.iter().sum();
    let mut shares = Vec::with_capacity(weights.len());
    let (mut wanted, mut tokens, mut start) = (0.0, 0.0, 0);
    for (rank, weight) in weights.iter().enumerate() {
        wanted += weight / total * batch.n_tokens as f64;
        let mut end = start;
        // A row is taken if that brings the sum nearer to what is wanted; the first of equally near cuts stays.
        while end < lengths.len() && (rank + 1 == weights.len() || tokens + f64::from(lengths[end]) / 2.0 < wanted) {
            tokens += f64::from(lengths[end]);
            end += 1;
        }
        shares.push(start..end);
        start = end;
    }
    shares
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
    use crate::data::{Input, Target};

    #[test]
    fn shares_cover_all_rows_in_order_and_in_proportion() {
        assert_eq!(largest_remainder(&[7.0, 2.0, 1.0], 13), [0..9, 9..12, 12..13]);
        assert_eq!(largest_remainder(&[1.0; 4], 13), [0..4, 4..7, 7..10, 10..13]);
        assert_eq!(largest_remainder(&[1.0; 3], 2), [0..1, 1..2, 2..2]);
        assert_eq!(largest_remainder(&[0.0, 1.0], 5), [0..0, 0..5]);
    }

    /// A batch of that many rows, or of rows of these lengths.
    fn batch(n_rows: usize, lengths: &[u32]) -> Batch {
        let input = Input::Values { values: Vec::new(), n_features: 0 };
        let target = Target::Labels(vec![0; n_rows]);
        let lengths = if lengths.is_empty() { vec![1; n_rows] } else { lengths.to_vec() };
        let n_steps = lengths.iter().copied().max().unwrap_or(0) as usize;
        Batch::of_sequences(n_steps, input, target, vec![1.0; n_rows], vec![0; n_rows], lengths)
    }

    #[test]
    fn valid_tokens_of_the_ranks_follow_the_weights_as_near_as_rows_allow() {
        let lengths: Vec<u32> = (1..=64).rev().collect();
        let all: u32 = lengths.iter().sum();
        for weights in [vec![1.0, 1.0], vec![7.0, 2.0, 1.0], vec![0.0, 1.0, 3.0], vec![1.0; 5]] {
            let shares = Balance::fixed(weights.clone()).shares_of(&batch(64, &lengths));
            assert_eq!(shares.iter().cloned().flatten().collect::<Vec<_>>(), (0..64).collect::<Vec<_>>(), "{weights:?}");
            for (rank, rows) in shares.into_iter().enumerate() {
                let tokens: u32 = lengths[rows].iter().sum();
                let wanted = weights[rank] / weights.iter().sum::<f64>() * f64::from(all);
                assert!((f64::from(tokens) - wanted).abs() <= 64.0, "{weights:?}, rank {rank}: {tokens} of {wanted}");
            }
        }
        assert_eq!(Balance::fixed(vec![1.0; 3]).shares_of(&batch(2, &[9, 1])), [0..0, 0..1, 1..2]);
    }

    #[test]
    fn shares_follow_speed_and_then_stay() {
        let mut balance = Balance::measured(2);
        let mut changes = 0;
        for _ in 0..100 {
            let shares = balance.shares(40);
            // Rank 0 takes 1 ms a row, rank 1 takes 3.
            let times = [Duration::from_millis(shares[0].len() as u64), Duration::from_millis(3 * shares[1].len() as u64)];
            changes += u32::from(balance.observe(&batch(40, &[]), &shares, &times));
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
            balance.observe(&batch(10, &[]), &shares, &times);
            of_second.push(shares[1].len());
        }
        assert!(of_second[..100].contains(&0), "rank 1 was never left out");
        assert_eq!(of_second[599], 5);
    }
}
