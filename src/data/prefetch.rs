//! One thread that prepares batches ahead of the one who trains. It changes when a batch is made, never which.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, bounded};

use super::error::DataError;
use super::{Batch, Batches};

/// Epoch, index and batch, or why there is none.
type Item = Result<(u64, u64, Batch), DataError>;

/// Batches in order, made ahead by a thread of their own. Dropping it ends the thread.
pub struct Prefetch {
    // `None` only while dropping: the thread ends when it finds the channel closed.
    batches: Option<Receiver<Item>>,
    thread: Option<JoinHandle<()>>,
    waited: Duration,
}

impl Prefetch {
    /// Starts at batch `start_idx` of `start_epoch` and goes on to the end of the epoch before `end_epoch` (`u64::MAX`: for ever).
    /// At most `depth` batches (at least 1) wait in the channel, and one more in the thread's hand.
    ///
    /// # Errors
    /// [`DataError::Prefetch`] if the system gives no thread.
    pub fn new(batches: Arc<dyn Batches>, start_epoch: u64, start_idx: u64, depth: usize, end_epoch: u64) -> Result<Self, DataError> {
        let (send, receive) = bounded(depth.max(1));
        let work = move || {
            let n = batches.n_batches();
            // A position at the end of an epoch is the start of the next one.
            let (mut epoch, mut idx) = if start_idx >= n { (start_epoch.saturating_add(1), 0) } else { (start_epoch, start_idx) };
            while epoch < end_epoch && n > 0 {
                let made = catch_unwind(AssertUnwindSafe(|| batches.batch(epoch, idx)));
                let made = made.unwrap_or_else(|panic| Err(DataError::Prefetch { epoch, idx, problem: message(panic.as_ref()) }));
                let failed = made.is_err();
                let item = made.map(|batch| (epoch, idx, batch));
                if send.send(item).is_err() || failed {
                    return;
                }
                idx += 1;
                if idx == n {
                    (epoch, idx) = (epoch + 1, 0);
                }
            }
        };
        let thread = crate::spans::spawn("prefetch".to_string(), work).map_err(|e| DataError::Prefetch {
            epoch: start_epoch,
            idx: start_idx,
            problem: format!("no thread: {e}"),
        })?;
        Ok(Self { batches: Some(receive), thread: Some(thread), waited: Duration::ZERO })
    }

    /// Time that the consumer has spent waiting for batches.
    pub fn waited(&self) -> Duration {
        self.waited
    }
}

impl Iterator for Prefetch {
    type Item = Item;

    /// Epoch, index and batch; an error once, then nothing, if making the batch failed or panicked.
    fn next(&mut self) -> Option<Self::Item> {
        let batches = self.batches.as_ref()?;
        if let Ok(item) = batches.try_recv() {
            return Some(item);
        }
        let start = Instant::now();
        // An error means that the thread has ended and everything it sent was taken.
        let item = batches.recv().ok();
        self.waited += start.elapsed();
        item
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // It caught its panics itself; there is nothing left to report.
            let _ = thread.join();
        }
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string).or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "a panic without a message".to_string())
}
