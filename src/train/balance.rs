//! Which rows of the global batch each rank gets.
//!
//! Shares are whole rows, by largest remainder; where rows end at different steps, they are cut so that the valid tokens of the ranks follow the
//! weights as near as whole rows allow. With measured speeds they follow the throughput of each rank, smoothed, and change only when the
//! step would become clearly shorter; since changed shares change the order of sums, they are part of the checkpoint. What a device's memory holds
//! bounds its share; the others take the rest, in proportion.

use std::ops::Range;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::data::Batch;
use crate::usage::UsageError;

/// Steps that are not measured: pipelines are built and caches filled.
const WARM_UP: u64 = 3;
/// Steps between looks at the shares.
const INTERVAL: u64 = 10;
/// Weight of a new measurement.
const SMOOTHING: f64 = 0.2;
/// By how much the speed of a rank without rows is thought to grow at each step.
const HOPE: f64 = 1.02;
/// The slowest rank must be expected to become faster by this much.
const GAIN: f64 = 1.05;

/// Weights of the ranks, and how they change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Balance {
    weights: Vec<f64>,
    /// Valid tokens a second of each rank; empty where shares are fixed.
    speeds: Vec<f64>,
    follows: bool,
    n_seen: u64,
    /// Most rows of each rank; empty, or none: any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    most: Vec<Option<usize>>,
}

impl Balance {
    /// Equal shares, or in proportion to `weights`.
    pub fn fixed(weights: Vec<f64>) -> Self {
        Self { weights, speeds: Vec::new(), follows: false, n_seen: 0, most: Vec::new() }
    }

    /// Shares that follow measured speed, equal at first.
    pub fn measured(world: usize) -> Self {
        Self { weights: vec![1.0; world], speeds: Vec::new(), follows: true, n_seen: 0, most: Vec::new() }
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
        within(&self.weights, &self.most, n_rows)
    }

    /// Rows of a batch for each rank, in rank order.
    pub fn shares_of(&self, batch: &Batch) -> Vec<Range<usize>> {
        cut(&self.weights, &self.most, batch)
    }

    /// Rows of a batch for each rank where memory does not count: an evaluation is taken in as many parts as it needs.
    pub fn eval_shares_of(&self, batch: &Batch) -> Vec<Range<usize>> {
        cut(&self.weights, &[], batch)
    }

    /// A rank gets at most so many rows from now on; an earlier bound stays where it is lower.
    pub fn bound(&mut self, rank: usize, n_rows: usize) {
        self.most.resize(self.weights.len(), None);
        if let Some(most) = self.most.get_mut(rank) {
            *most = Some(most.map_or(n_rows, |most| most.min(n_rows)));
        }
    }

    /// Takes on the bounds of another one of the same ranks.
    pub fn bound_as(&mut self, other: &Self) {
        let bounds = other.most.iter().enumerate().filter_map(|(rank, most)| Some((rank, (*most)?)));
        bounds.for_each(|(rank, most)| self.bound(rank, most));
    }

    /// Whether the ranks together can take a batch.
    ///
    /// # Errors
    /// How many rows they can take.
    pub fn check(&self, n_rows: usize) -> Result<(), UsageError> {
        let room: Option<usize> = if self.most.is_empty() { None } else { self.most.iter().copied().sum() };
        UsageError::unless(room.is_none_or(|room| room >= n_rows), || {
            let most: Vec<String> = self.most.iter().flatten().map(ToString::to_string).collect();
            format!(
                "the devices' memory holds {} rows ({}) of the {n_rows} of --batch-size: lower it, --seq-len or --hidden, raise --accumulate or \
                 --memory-limit, or add a device",
                room.unwrap_or(0),
                most.join(" + ")
            )
        })
    }

    /// Takes ranks out; the others keep their proportions, and are equal where nobody with a weight is left.
    pub fn remove(&mut self, ranks: &[usize]) {
        fn keep<T>(values: &mut Vec<T>, ranks: &[usize]) {
            let mut rank = 0;
            values.retain(|_| {
                rank += 1;
                !ranks.contains(&(rank - 1))
            });
        }
        keep(&mut self.weights, ranks);
        keep(&mut self.speeds, ranks);
        keep(&mut self.most, ranks);
        if self.weights.iter().all(|&weight| weight == 0.0) {
            self.weights.fill(1.0);
        }
    }

    /// Puts a rank in, with the weight and the bound that it had in `began`, at that place in the list; measured speeds take it for as fast as the
    /// mean of the others, until it is measured itself.
    pub fn insert(&mut self, rank: usize, began: &Self, seat: usize) {
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let weight = if self.follows { mean(&self.weights) } else { began.weights.get(seat).copied().unwrap_or(1.0) };
        if !self.speeds.is_empty() {
            self.speeds.insert(rank, mean(&self.speeds));
        }
        self.weights.insert(rank, weight);
        let most = began.most.get(seat).copied().flatten();
        if most.is_some() || !self.most.is_empty() {
            self.most.resize(self.weights.len() - 1, None);
            self.most.insert(rank, most);
        }
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
        let better = cut(&self.speeds, &self.most, batch);
        if longest(shares) < GAIN * longest(&better) {
            return false;
        }
        self.weights.clone_from(&self.speeds);
        true
    }
}

/// The most rows of a rank; empty means any.
fn most_of(most: &[Option<usize>], rank: usize) -> usize {
    most.get(rank).copied().flatten().unwrap_or(usize::MAX)
}

/// Cuts a batch's rows in proportion to `weights`: by rows where all are alike, else by valid tokens, each cut at the row where it comes nearest.
/// Nobody gets more than its bound, as long as they are large enough together.
fn cut(weights: &[f64], most: &[Option<usize>], batch: &Batch) -> Vec<Range<usize>> {
    let Some(lengths) = &batch.lengths else { return within(weights, most, batch.n_rows) };
    let total: f64 = weights.iter().sum();
    let mut shares = Vec::with_capacity(weights.len());
    let (mut wanted, mut tokens, mut start) = (0.0, 0.0, 0);
    for (rank, weight) in weights.iter().enumerate() {
        wanted += weight / total * batch.n_tokens as f64;
        // What those behind cannot take is this one's.
        let room_behind = (rank + 1..weights.len()).map(|rank| most_of(most, rank)).fold(0, usize::saturating_add);
        let least = (lengths.len() - start).saturating_sub(room_behind);
        let most = if rank + 1 == weights.len() { usize::MAX } else { most_of(most, rank).max(least) };
        let mut end = start;
        // A row is taken if that brings the sum nearer to what is wanted; the first of equally near cuts stays.
        while end < lengths.len()
            && end - start < most
            && (end - start < least || rank + 1 == weights.len() || tokens + f64::from(lengths[end]) / 2.0 < wanted)
        {
            tokens += f64::from(lengths[end]);
            end += 1;
        }
        shares.push(start..end);
        start = end;
    }
    shares
}

/// [`largest_remainder`] with at most so many rows for each rank: who would get more gets that, and the others share the rest in the same way; those without
/// a weight only what nobody else can take.
fn within(weights: &[f64], most: &[Option<usize>], n_rows: usize) -> Vec<Range<usize>> {
    let mut counts = vec![0; weights.len()];
    let mut open: Vec<f64> = weights.to_vec();
    let mut left = n_rows;
    loop {
        if open.iter().all(|&weight| weight == 0.0) {
            // Nobody with a weight has room: the others fill up.
            for (rank, count) in counts.iter_mut().enumerate() {
                let more = left.min(most_of(most, rank).saturating_sub(*count));
                *count += more;
                left -= more;
            }
            // More than all can hold is for the caller to refuse; nothing is left out.
            counts[0] += left;
            break;
        }
        let shares = largest_remainder(&open, left);
        let full: Vec<usize> = (0..weights.len()).filter(|&rank| open[rank] > 0.0 && shares[rank].len() > most_of(most, rank)).collect();
        if full.is_empty() {
            shares.iter().enumerate().for_each(|(rank, share)| counts[rank] += share.len());
            break;
        }
        for rank in full {
            (counts[rank], open[rank]) = (most_of(most, rank), 0.0);
            left -= counts[rank];
        }
    }
    one_behind_another(counts)
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
    one_behind_another(counts)
}

fn one_behind_another(counts: Vec<usize>) -> Vec<Range<usize>> {
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

    /// Seconds of a step on devices that take so long for a row, and each a fixed time besides.
    fn step_seconds(shares: &[Range<usize>], row_seconds: &[f64], fixed: f64) -> f64 {
        shares.iter().zip(row_seconds).map(|(rows, seconds)| fixed + rows.len() as f64 * seconds).fold(0.0, f64::max)
    }

    #[test]
    fn a_device_slowed_three_times_leaves_the_step_within_a_tenth_of_the_sum_of_the_speeds_and_nobody_starves() {
        use crate::rng::{Purpose, StepKey, Stream};
        // On a clock of their own: seconds a row, with noise of a tenth. From the start, and from a moment on.
        for (n_rows, world) in [(64, 2), (64, 3), (50, 4), (13, 2)] {
            for slow in 0..world {
                for from in [0, 200] {
                    let mut random = Stream::new(StepKey::new(7, slow as u64), Purpose::Test, n_rows as u32, 0);
                    let mut balance = Balance::measured(world);
                    let (mut seconds, mut changes_at_end) = (0.0, 0);
                    let rows =
                        |step: u64| -> Vec<f64> { (0..world).map(|rank| if rank == slow && step >= from { 3e-3 } else { 1e-3 }).collect() };
                    for step in 0..400 {
                        let (shares, rows) = (balance.shares(n_rows), rows(step));
                        assert!(shares.iter().all(|share| !share.is_empty()), "step {step}: {shares:?}");
                        let time = |rank: usize, noise: f64| shares[rank].len() as f64 * rows[rank] * noise;
                        let times: Vec<Duration> =
                            (0..world).map(|rank| Duration::from_secs_f64(time(rank, 0.9 + 0.2 * f64::from(random.uniform())))).collect();
                        let changed = balance.observe(&batch(n_rows, &[]), &shares, &times);
                        if step >= 300 {
                            seconds += step_seconds(&shares, &rows, 0.0) / 100.0;
                            changes_at_end += u32::from(changed);
                        }
                    }
                    let speed: f64 = rows(399).iter().map(|row| 1.0 / row).sum();
                    let ideal = n_rows as f64 / speed;
                    assert!(seconds <= 1.1 * ideal, "{n_rows} rows, rank {slow} of {world} slow from {from}: {seconds} s, ideal {ideal} s");
                    assert!(changes_at_end <= 3, "shares do not settle: {changes_at_end} changes in the last 100 steps");
                }
            }
        }
    }

    #[test]
    fn bounds_hold_and_the_rest_goes_to_the_others_in_proportion() {
        let mut balance = Balance::fixed(vec![7.0, 2.0, 1.0]);
        balance.bound(0, 4);
        assert_eq!(balance.shares(13), [0..4, 4..10, 10..13]);
        balance.bound(1, 3);
        balance.bound(1, 9);
        assert_eq!(balance.shares(13), [0..4, 4..7, 7..13]);
        assert!(balance.check(1 << 40).is_ok(), "rank 2 has no bound");
        balance.bound(2, 6);
        assert_eq!(balance.shares(13), [0..4, 4..7, 7..13]);
        assert!(balance.check(13).is_ok());
        let error = balance.check(14).unwrap_err().to_string();
        assert!(error.contains("holds 13 rows (4 + 3 + 6) of the 14") && error.contains("--accumulate"), "{error}");
        // Who has no weight takes only what nobody else can.
        let mut balance = Balance::fixed(vec![0.0, 1.0]);
        assert_eq!(balance.shares(5), [0..0, 0..5]);
        balance.bound(1, 3);
        assert_eq!(balance.shares(5), [0..2, 2..5]);
        // Rows of unlike lengths.
        let lengths: Vec<u32> = (1..=20).rev().collect();
        let mut balance = Balance::fixed(vec![1.0; 3]);
        for most in [20, 9, 7] {
            (0..3).for_each(|rank| balance.bound(rank, most));
            let shares = balance.shares_of(&batch(20, &lengths));
            assert_eq!(shares.iter().cloned().flatten().collect::<Vec<_>>(), (0..20).collect::<Vec<_>>());
            assert!(shares.iter().all(|share| share.len() <= most), "at most {most}: {shares:?}");
        }
    }

    #[test]
    fn ranks_that_go_leave_their_rows_to_the_others_and_get_them_back() {
        let began = Balance::fixed(vec![7.0, 2.0, 1.0]);
        let mut balance = began.clone();
        balance.remove(&[0]);
        assert_eq!(balance.shares(9), [0..6, 6..9]);
        balance.insert(0, &began, 0);
        assert_eq!(balance, began);
        let mut balance = Balance::fixed(vec![0.0, 1.0, 0.0]);
        balance.remove(&[1]);
        assert_eq!(balance.shares(4), [0..2, 2..4], "somebody must do it");
        let mut balance = Balance { speeds: vec![1.0, 3.0], weights: vec![1.0, 3.0], ..Balance::measured(2) };
        balance.bound(1, 5);
        balance.insert(1, &Balance::measured(3), 1);
        assert_eq!((balance.weights.clone(), balance.most.clone()), (vec![1.0, 2.0, 3.0], vec![None, None, Some(5)]));
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
