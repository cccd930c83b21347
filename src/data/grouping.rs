//! Which sequences make up which batch: those of like length together, so that little of a batch is padding.
//!
//! The order is random, by seed and epoch: the sequences are shuffled and cut into pools of [`POOL`] batches; those of a pool are sorted by length
//! (equal ones stay as they were shuffled) and cut into batches, of which one may be smaller, at a random place; then the batches of all pools
//! are shuffled. Within a batch the longest come first, so that those that have not ended are always the first ones.

use std::sync::{Arc, Mutex, PoisonError};

use super::series::Order;
use crate::rng::{Purpose, StepKey, Stream};
use crate::shape::split_even;

/// Batches whose sequences are sorted together. The lengths within a batch differ by about one part in so many.
pub const POOL: usize = 64;

/// An epoch and its batches.
type Drawn = (u64, Arc<[Vec<u32>]>);

/// Batches of sequences, as numbers of the sequences.
#[derive(Debug)]
pub struct Grouping {
    lengths: Vec<u32>,
    batch_size: usize,
    order: Order,
    // The batches of the epoch that was asked for last.
    drawn: Mutex<Option<Drawn>>,
}

impl Grouping {
    /// Of sequences `0 .. lengths.len()`; `batch_size` is at least 1.
    pub fn new(lengths: Vec<u32>, batch_size: usize, order: Order) -> Self {
        Self { lengths, batch_size: batch_size.max(1), order, drawn: Mutex::new(None) }
    }

    /// Batches of an epoch.
    pub fn n_batches(&self) -> usize {
        self.lengths.len().div_ceil(self.batch_size)
    }

    /// The longest sequence, and the rows of a full batch.
    pub fn largest(&self) -> (usize, usize) {
        (self.lengths.iter().copied().max().unwrap_or(0) as usize, self.batch_size.min(self.lengths.len()))
    }

    /// The sequences of batch `idx` of `epoch`, the longest first.
    ///
    /// # Panics
    /// If `idx` is not below [`Grouping::n_batches`].
    pub fn batch(&self, epoch: u64, idx: usize) -> Vec<u32> {
        let mut drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        // Without a seed all epochs are alike.
        let epoch = if self.order == Order::InTime { 0 } else { epoch };
        let batches = match drawn.as_ref().filter(|(of, _)| *of == epoch) {
            Some((_, batches)) => Arc::clone(batches),
            None => {
                let batches: Arc<[Vec<u32>]> = self.draw(epoch).into();
                *drawn = Some((epoch, Arc::clone(&batches)));
                batches
            }
        };
        batches[idx].clone()
    }

    fn draw(&self, epoch: u64) -> Vec<Vec<u32>> {
        let n = self.lengths.len();
        let mut order: Vec<u32> = (0..n as u32).collect();
        let mut random = match self.order {
            Order::InTime => None,
            Order::Shuffled { seed } => Some(Stream::new(StepKey::new(seed, 0), Purpose::Shuffle, 0, epoch as u32)),
        };
        if let Some(random) = &mut random {
            random.shuffle(&mut order);
        }
        let n_batches = self.n_batches();
        let n_pools = if random.is_some() { n_batches.div_ceil(POOL).max(1) } else { 1 };
        let mut batches = Vec::with_capacity(n_batches);
        for pool in split_even(n_batches, n_pools) {
            let pooled = &mut order[pool.start * self.batch_size..(pool.end * self.batch_size).min(n)];
            pooled.sort_by_key(|&sample| std::cmp::Reverse(self.lengths[sample as usize]));
            let short = pooled.len() % self.batch_size;
            let short_at = random.as_mut().filter(|_| short > 0).map_or(pool.len(), |random| random.below(pool.len() as u32) as usize);
            let mut rest = &*pooled;
            for i in 0..pool.len() {
                let size = if i == short_at { short } else { self.batch_size.min(rest.len()) };
                let (batch, others) = rest.split_at(size);
                batches.push(batch.to_vec());
                rest = others;
            }
        }
        if let Some(random) = &mut random {
            random.shuffle(&mut batches);
        }
        batches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(n: usize) -> Vec<u32> {
        let mut random = Stream::new(StepKey::new(3, 0), Purpose::Test, 0, 0);
        (0..n).map(|_| 1 + random.below(100)).collect()
    }

    #[test]
    fn every_sequence_comes_once_an_epoch_in_batches_of_which_one_may_be_smaller() {
        for (n, size) in [(1, 8), (8, 8), (9, 8), (270, 32), (5000, 16), (5003, 16)] {
            for order in [Order::InTime, Order::Shuffled { seed: 4 }] {
                let grouping = Grouping::new(lengths(n), size, order);
                for epoch in [0, 1, 7] {
                    let batches: Vec<Vec<u32>> = (0..grouping.n_batches()).map(|idx| grouping.batch(epoch, idx)).collect();
                    let mut all: Vec<u32> = batches.concat();
                    all.sort_unstable();
                    assert_eq!(all, (0..n as u32).collect::<Vec<_>>(), "{n} by {size}");
                    assert!(batches.iter().filter(|b| b.len() != size).count() <= 1 && batches.iter().all(|b| !b.is_empty()));
                    let sorted = |b: &Vec<u32>| b.windows(2).all(|w| grouping.lengths[w[0] as usize] >= grouping.lengths[w[1] as usize]);
                    assert!(batches.iter().all(sorted), "{n} by {size}: the longest come first");
                }
            }
        }
    }

    #[test]
    fn epochs_differ_and_can_be_asked_for_in_any_order() {
        let grouping = Grouping::new(lengths(1000), 20, Order::Shuffled { seed: 4 });
        let epoch = |epoch: u64| (0..50).map(|idx| grouping.batch(epoch, idx)).collect::<Vec<_>>();
        let (first, second) = (epoch(0), epoch(1));
        assert_ne!(first, second);
        assert_eq!(grouping.batch(1, 30), second[30]);
        assert_eq!(grouping.batch(0, 17), first[17]);
        assert_ne!(
            first,
            (0..50).map(|idx| Grouping::new(lengths(1000), 20, Order::Shuffled { seed: 5 }).batch(0, idx)).collect::<Vec<_>>()
        );
    }

    #[test]
    fn less_than_three_in_a_hundred_places_of_uniform_lengths_are_padding() {
        let lengths = lengths(20_000);
        let grouping = Grouping::new(lengths.clone(), 32, Order::Shuffled { seed: 1 });
        let (mut valid, mut places) = (0, 0);
        for idx in 0..grouping.n_batches() {
            let rows = grouping.batch(0, idx);
            valid += rows.iter().map(|&row| lengths[row as usize]).sum::<u32>();
            places += lengths[rows[0] as usize] * rows.len() as u32;
        }
        assert!(f64::from(valid) > 0.97 * f64::from(places), "{valid} of {places}");
    }
}
