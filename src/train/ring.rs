//! The thread beside a worker that carries its gradients round the ring while the worker computes.
//!
//! It owns the rank's [`Communicator`] and takes jobs in order; each bucket arrives as a readback that it waits for itself.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use crossbeam::channel::{Receiver, Sender, bounded};
use tracing::debug_span;

use crate::backend::Readback;
use crate::comm::{Communicator, Shared};
use crate::compress::Compressor;
use crate::kernels::reduce::block_squares;
use crate::pool::CpuContext;
use crate::shape::BLOCK;
use crate::spans;

/// Who updates which part of the parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Update {
    /// All replicas compute the same bits: each has the whole sum and updates everything.
    Everywhere,
    /// Devices differ in the last bit: the rank that holds a segment's sum updates it and the others take the result.
    ByOwner,
}

/// What makes a rank's gradients smaller: its ring's while buckets are under way, its worker's between steps.
#[derive(Clone)]
pub struct SharedCompressor(Arc<Mutex<Compressor>>);

impl SharedCompressor {
    pub fn new(compressor: Compressor) -> Self {
        Self(Arc::new(Mutex::new(compressor)))
    }

    pub fn lock(&self) -> MutexGuard<'_, Compressor> {
        // What a step was at when its thread panicked counts only with its commit.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Job {
    /// Make gradients smaller from now on.
    Compress(SharedCompressor),
    /// Sum a bucket's gradient over the ranks, in the memory of the step before if there was one.
    Reduce { bucket: usize, words: Box<dyn Readback>, message: Option<Shared> },
    /// All buckets of the step are under way: exchange what each rank tells the others.
    Exchange { header: Vec<u8>, computed: Instant },
    /// Spread a bucket's new parameters from their owners; the own segment comes from the device, and with it new state to be copied to the next rank.
    Spread { returned: Returned, own: Box<dyn Readback>, states: Option<Box<dyn Readback>> },
}

/// A bucket back from the ring.
pub struct Returned {
    pub bucket: usize,
    /// The sums, or new parameters, where the ranks that made them have them: read in place, not copied.
    pub message: Shared,
    /// Memory for another readback.
    pub memory: Vec<f32>,
    /// After a spread: the new optimizer state of the segment of the rank before, one state behind another; empty where none is copied.
    pub copy: Arc<Vec<f32>>,
}

/// What the ring cost a rank in a step.
#[derive(Clone, Copy, Debug, Default)]
pub struct RingTimes {
    /// That the step waited for the ring.
    pub waited: Duration,
    /// In the ring.
    pub total: Duration,
    /// What the step had to wait for at least: the last bucket's time in the ring, or what remains of all of them when they begin with the first bucket
    /// and the backward pass hides as much as it can; the larger.
    pub unavoidable: Duration,
}

impl std::ops::AddAssign for RingTimes {
    fn add_assign(&mut self, other: Self) {
        self.waited += other.waited;
        self.total += other.total;
        self.unavoidable += other.unavoidable;
    }
}

/// A step's sums.
pub struct Sums {
    pub buckets: Vec<Returned>,
    /// Of the whole summed gradient.
    pub norm: f64,
    /// What each rank told, in rank order.
    pub headers: Vec<Vec<u8>>,
    /// But for what the rank waited, which it knows itself.
    pub times: RingTimes,
    pub bytes_sent: u64,
}

enum Done {
    Sums(Result<Sums>),
    Spread(Result<Returned>),
}

/// The worker's end.
pub struct Ring {
    jobs: Option<Sender<Job>>,
    done: Receiver<Done>,
    deadline: Duration,
    /// Taken by whoever waits for its end.
    thread: RefCell<Option<JoinHandle<()>>>,
}

impl Ring {
    /// Starts the thread. At most `n_buckets` jobs of a kind are under way.
    ///
    /// # Errors
    /// When the operating system starts no more threads.
    pub fn start(comm: Communicator, update: Update, n_buckets: usize, deadline: Duration) -> Result<Self> {
        let (jobs, inbox) = bounded(2 * n_buckets + 2);
        let (outbox, done) = bounded(n_buckets + 2);
        let name = format!("carrousel-ring-{}", comm.rank());
        let ctx = CpuContext::new(1)?;
        let worker = RingThread {
            comm,
            update,
            ctx,
            deadline,
            compressor: None,
            sums: Vec::new(),
            waiting: Vec::new(),
            squares: Vec::new(),
            first: None,
            last: Duration::ZERO,
            time: Duration::ZERO,
        };
        let thread = spans::spawn(name, move || worker.serve(&inbox, &outbox)).context("cannot start a ring thread")?;
        Ok(Self { jobs: Some(jobs), done, deadline, thread: RefCell::new(Some(thread)) })
    }

    /// The longest that the ring thread may take for a step's last bucket: for its readback, and for a peer.
    fn patience(&self) -> Duration {
        2 * self.deadline + self.deadline / 4
    }

    fn give(&self, job: Job) -> Result<()> {
        use crossbeam::channel::SendTimeoutError::{Disconnected, Timeout};
        let Some(jobs) = &self.jobs else { return Err(self.ended()) };
        match jobs.send_timeout(job, self.patience()) {
            Ok(()) => Ok(()),
            Err(Timeout(_)) => Err(self.is_late()),
            Err(Disconnected(_)) => Err(self.ended()),
        }
    }

    fn answer(&self) -> Result<Done> {
        use crossbeam::channel::RecvTimeoutError::{Disconnected, Timeout};
        self.done.recv_timeout(self.patience()).map_err(|e| match e {
            Timeout => self.is_late(),
            Disconnected => self.ended(),
        })
    }

    fn is_late(&self) -> anyhow::Error {
        anyhow::anyhow!("the ring thread has not answered for {} s", self.patience().as_secs_f64())
    }

    /// Why the thread is no more.
    fn ended(&self) -> anyhow::Error {
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(panic)) => {
                let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
                anyhow::anyhow!("the ring thread panicked: {}", text.unwrap_or_default())
            }
            _ => anyhow::anyhow!("the ring thread has ended"),
        }
    }

    /// Makes gradients smaller from now on; the compressor has this rank's place.
    ///
    /// # Errors
    /// The ring thread is gone.
    pub fn compress(&self, compressor: SharedCompressor) -> Result<()> {
        self.give(Job::Compress(compressor))
    }

    /// Sends a bucket's gradient round; `message` is what the bucket came back in a step before.
    ///
    /// # Errors
    /// The ring thread is gone; its own error comes with [`Self::exchange`].
    pub fn reduce(&self, bucket: usize, words: Box<dyn Readback>, message: Option<Shared>) -> Result<()> {
        self.give(Job::Reduce { bucket, words, message })
    }

    /// Exchanges headers and waits for all buckets of the step, whose gradients the device has computed by now.
    ///
    /// # Errors
    /// A readback's, the ring's, or the deadline.
    pub fn exchange(&self, header: Vec<u8>) -> Result<Sums> {
        self.give(Job::Exchange { header, computed: Instant::now() })?;
        match self.answer()? {
            Done::Sums(sums) => sums,
            Done::Spread(_) => anyhow::bail!("the ring thread answered out of order"),
        }
    }

    /// Sends a bucket's new parameters round, and new optimizer state to the next rank where all ranks give some; [`Self::spread_bucket`] waits for it.
    ///
    /// # Errors
    /// The ring thread is gone.
    pub fn spread(&self, returned: Returned, own: Box<dyn Readback>, states: Option<Box<dyn Readback>>) -> Result<()> {
        self.give(Job::Spread { returned, own, states })
    }

    /// The next bucket of new parameters.
    ///
    /// # Errors
    /// As [`Self::exchange`].
    pub fn spread_bucket(&self) -> Result<Returned> {
        match self.answer()? {
            Done::Spread(returned) => returned,
            Done::Sums(_) => anyhow::bail!("the ring thread answered out of order"),
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // Ends with its inbox; a panic there has been reported as a missing answer.
            let _ = thread.join();
        }
    }
}

struct RingThread {
    comm: Communicator,
    update: Update,
    ctx: CpuContext,
    deadline: Duration,
    compressor: Option<SharedCompressor>,
    sums: Vec<Result<Returned>>,
    /// Buckets that go round only when the last one is there.
    waiting: Vec<(usize, Vec<f32>, Option<Shared>)>,
    /// Sums of squares of blocks: (bucket, first block, sums).
    squares: Vec<(usize, usize, Vec<f32>)>,
    /// When the step's first bucket was ready, how long its last one was in the ring, and all of them.
    first: Option<Instant>,
    last: Duration,
    time: Duration,
}

impl RingThread {
    fn serve(mut self, inbox: &Receiver<Job>, outbox: &Sender<Done>) {
        for job in inbox {
            let done = match job {
                Job::Reduce { bucket, words, message } => {
                    // After an error the communicator repeats it, so the first is what `exchange` reports.
                    let sum = self.reduce(bucket, words, message);
                    self.sums.extend(sum.transpose());
                    continue;
                }
                Job::Compress(compressor) => {
                    self.compressor = Some(compressor);
                    continue;
                }
                Job::Exchange { header, computed } => Done::Sums(self.exchange(header, computed)),
                Job::Spread { returned, own, states } => Done::Spread(self.spread(returned, own, states)),
            };
            if outbox.send_timeout(done, self.deadline).is_err() {
                return;
            }
        }
    }

    /// Whether the segments of a message are whole blocks, so that owners can sum the squares of theirs.
    fn whole_blocks(&self, len: usize) -> bool {
        len.div_ceil(BLOCK) >= self.comm.world()
    }

    /// The squares of the blocks that this rank tells: those of its own segment, or, where segments are no whole blocks, all by rank 0.
    /// So each block is told by one rank, and the sum over ranks is the sum over blocks.
    fn tell_squares(&mut self, bucket: usize, message: &Shared, memory: &mut [f32]) {
        let (whole_blocks, rank) = (self.whole_blocks(message.len()), self.comm.rank());
        let mut tell = |first: usize, words: &[f32]| {
            let mut squares = vec![0.0; words.len().div_ceil(BLOCK)];
            block_squares(&self.ctx, words, &mut squares);
            self.squares.push((bucket, first / BLOCK, squares));
        };
        if whole_blocks {
            let own = message.own_segment();
            // Parts of such a message begin with blocks too.
            for (range, part) in message.parts() {
                let both = own.start.max(range.start)..own.end.min(range.end);
                if !both.is_empty() {
                    tell(both.start, &part[both.start - range.start..both.end - range.start]);
                }
            }
        } else if rank == 0 {
            message.copy_to(memory);
            tell(0, memory);
        }
    }

    /// The sum of a bucket, unless it waits for the others.
    fn reduce(&mut self, bucket: usize, words: Box<dyn Readback>, message: Option<Shared>) -> Result<Option<Returned>> {
        // Nothing is waited for where the step is not to be.
        anyhow::ensure!(self.sums.iter().all(Result::is_ok), "an earlier bucket failed");
        let _span = debug_span!("bucket", bucket).entered();
        let mut memory = debug_span!("readback").in_scope(|| words.wait(self.deadline))?;
        let start = Instant::now();
        self.first.get_or_insert(start);
        if let Some(compressor) = self.compressor.clone() {
            if compressor.lock().waits_for_all() {
                self.waiting.push((bucket, memory, message));
                return Ok(None);
            }
            let returned = self.compressed(&mut compressor.lock(), bucket, memory, message, 1.0);
            self.has_taken(start);
            return returned.map(Some);
        }
        let mut message = message.filter(|message| message.len() == memory.len()).unwrap_or_else(|| self.comm.shared(memory.len()));
        message.fill(&memory);
        match self.update {
            Update::Everywhere => self.comm.all_reduce_shared(&mut message)?,
            Update::ByOwner => {
                self.comm.reduce_scatter_shared(&mut message)?;
                if !self.whole_blocks(memory.len()) {
                    self.comm.all_gather_shared(&mut message)?;
                }
            }
        }
        self.tell_squares(bucket, &message, &mut memory);
        self.has_taken(start);
        Ok(Some(Returned { bucket, message, memory, copy: Arc::default() }))
    }

    /// A bucket is through the ring.
    fn has_taken(&mut self, start: Instant) {
        self.last = start.elapsed();
        self.time += self.last;
    }

    /// The sum of a bucket that goes round in fewer bytes; all ranks have all of it, and so they tell no squares.
    fn compressed(
        &mut self,
        compressor: &mut Compressor,
        bucket: usize,
        mut memory: Vec<f32>,
        message: Option<Shared>,
        factor: f32,
    ) -> Result<Returned> {
        let _span = debug_span!("compressed", bucket).entered();
        compressor.sum(&mut self.comm, bucket, &mut memory, factor)?;
        let mut squares = vec![0.0; memory.len().div_ceil(BLOCK)];
        block_squares(&self.ctx, &memory, &mut squares);
        self.squares.push((bucket, 0, squares));
        let mut message = message.filter(|message| message.len() == memory.len()).unwrap_or_else(|| self.comm.shared(memory.len()));
        message.fill(&memory);
        Ok(Returned { bucket, message, memory, copy: Arc::default() })
    }

    /// Sends the buckets round that have waited for each other, the whole gradient clipped.
    fn send_waiting(&mut self) -> Result<()> {
        let Some(compressor) = self.compressor.clone() else { return Ok(()) };
        let waiting = std::mem::take(&mut self.waiting);
        let mut compressor = compressor.lock();
        let factor = compressor.clip_factor(waiting.iter().map(|(_, memory, _)| memory.as_slice()));
        for (bucket, memory, message) in waiting {
            let sum = self.compressed(&mut compressor, bucket, memory, message, factor)?;
            self.sums.push(Ok(sum));
        }
        Ok(())
    }

    fn exchange(&mut self, header: Vec<u8>, computed: Instant) -> Result<Sums> {
        let _span = debug_span!("exchange").entered();
        let first = self.first.take();
        let start = Instant::now();
        // One that failed has its error among the sums.
        if self.sums.iter().all(Result::is_ok) {
            self.send_waiting()?;
        }
        let buckets: Vec<Returned> = self.sums.drain(..).collect::<Result<_>>()?;
        let mut told = (header.len() as u64).to_le_bytes().to_vec();
        told.extend_from_slice(&header);
        let mut headers = Vec::new();
        let mut blocks = Vec::new();
        for (bucket, first, squares) in self.squares.drain(..) {
            let numbered = squares.iter().enumerate().map(|(i, &square)| (bucket as u32, (first + i) as u32, square));
            if self.compressor.is_some() {
                blocks.extend(numbered);
                continue;
            }
            for (bucket, block, square) in numbered {
                told.extend_from_slice(&bucket.to_le_bytes());
                told.extend_from_slice(&block.to_le_bytes());
                told.extend_from_slice(&square.to_le_bytes());
            }
        }
        for told in self.comm.all_gather_bytes(&told)? {
            let word = |at: usize| told.get(at..at + 4).and_then(|b| b.try_into().ok()).unwrap_or([0; 4]);
            let header_len = u32::from_le_bytes(word(0)) as usize;
            headers.push(told.get(8..8 + header_len).context("a rank told less than its header")?.to_vec());
            let numbers = (8 + header_len..told.len()).step_by(12);
            blocks.extend(
                numbers.map(|at| (u32::from_le_bytes(word(at)), u32::from_le_bytes(word(at + 4)), f32::from_le_bytes(word(at + 8)))),
            );
        }
        // In the order of the address space, whoever summed them.
        blocks.sort_unstable_by_key(|&(bucket, block, _)| (bucket, block));
        let norm = norm_of(blocks.iter().map(|&(.., square)| square));
        let exchange = start.elapsed();
        let total = std::mem::take(&mut self.time) + exchange;
        let hideable = first.map_or(Duration::ZERO, |first| computed.saturating_duration_since(first));
        let unavoidable = (std::mem::take(&mut self.last) + exchange).max(total.saturating_sub(hideable));
        let times = RingTimes { waited: Duration::ZERO, total, unavoidable };
        Ok(Sums { buckets, norm, headers, times, bytes_sent: self.comm.bytes_sent() })
    }

    fn spread(&mut self, mut returned: Returned, own: Box<dyn Readback>, states: Option<Box<dyn Readback>>) -> Result<Returned> {
        let _span = debug_span!("spread", bucket = returned.bucket).entered();
        let own = debug_span!("readback").in_scope(|| own.wait(self.deadline))?;
        let states = states.map(|states| states.wait(self.deadline)).transpose()?;
        let start = Instant::now();
        returned.message.fill_own(&own);
        self.comm.all_gather_shared(&mut returned.message)?;
        if let Some(states) = states {
            returned.copy = self.comm.pass_on(Arc::new(states))?;
        }
        self.time += start.elapsed();
        Ok(returned)
    }
}

/// The norm from the sums of squares of all blocks, in order.
pub fn norm_of(squares: impl Iterator<Item = f32>) -> f64 {
    squares.map(f64::from).sum::<f64>().sqrt()
}
