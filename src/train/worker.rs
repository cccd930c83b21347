//! One worker: a thread that owns a device's backend and a replica, and answers the coordinator's commands.
//!
//! A step is computed, exchanged and held until the coordinator says that every rank has what the update needs ([`Command::Commit`]);
//! before that nothing of the replica changes.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use crossbeam::channel::{Receiver, Sender};
use tracing::debug_span;

use super::compression::{settings, update_rule};
use super::memory::Scale;
use super::ring::{Returned, Ring, RingTimes, SharedCompressor, Sums, Update, norm_of};
use crate::backend::tuning::{Choice, Choices};
use crate::backend::{Backend, BufferId, DeviceError, DeviceInfo, Limits, Span, read_now};
use crate::comm::plan::owned_segment;
use crate::comm::{CommError, Shared};
use crate::compress::{Compressor, Held, Method};
use crate::data::Batch;
use crate::infer::session::{pass_forward, share_of};
use crate::kernels::reduce::{BlockSquares, RowSquares};
use crate::model::config::ModelConfig;
use crate::model::state::Carried;
use crate::model::{EmbeddingRows, Loss, MAX_PARTS, Model, Pass, packed, read_buckets, unpacked, write_buckets};
use crate::optim::OptimizerConfig;
use crate::rng::StepKey;
use crate::shape::{ALIGN, BLOCK, GATES, round_up, split_even};
use crate::usage::UsageError;

/// What the coordinator asks of a worker. Every command but [`Command::Commit`] and [`Command::Abort`] is answered.
pub enum Command {
    /// Take this place in the ring; a step that waits for its commit is forgotten.
    Join(Box<Seat>),
    /// Set parameters and optimizer state (tensors in the table's order, each in PyTorch's).
    Load { params: Arc<Vec<Vec<f32>>>, states: Arc<Vec<Vec<Vec<f32>>>> },
    /// Train these tensors of the table no more.
    Freeze(Arc<Vec<usize>>),
    /// Put a loss of one's own in the place of the model's.
    SetLoss(Arc<dyn Loss>),
    /// Launch these variants of kernels from now on.
    Choose(Arc<Choices>),
    /// Measure the variants of what has been launched so far, for about so long.
    Tune(Duration),
    /// Take the memory for training on so many steps and rows.
    Reserve { n_steps: usize, n_rows: usize },
    /// Compute and exchange a training step.
    Step(StepWork),
    /// All ranks hold what step's update needs: apply it.
    Commit,
    /// Forget the step.
    Abort,
    /// Forward only.
    Evaluate(EvaluateWork),
    /// Read parameters back.
    ReadParams,
    /// Read back the gates of the last evaluation's last pass.
    ReadGates,
    /// Read optimizer state back, whole buckets; only the own segments count where owners update.
    ReadStates,
    /// Read back what is held for gradients that are made smaller.
    ReadHeld,
    /// Hold these pieces.
    Hold(Vec<Held>),
}

/// Activated gates by lane, by gate in the order i, f, g, o: `[T, B, H]`.
pub type Gates = Vec<[Vec<f32>; GATES]>;

/// A place in the ring of one generation, and what the worker must know to take it.
pub struct Seat {
    pub rank: usize,
    pub world: usize,
    /// Of the membership.
    pub generation: u64,
    pub update: Update,
    /// Optimizer state of owned segments is copied to the next rank.
    pub keeps_copies: bool,
    /// None in a world of one.
    pub ring: Option<Ring>,
    /// What the worker is to have from now on; none: what it has.
    pub params: Option<Arc<Vec<Vec<f32>>>>,
    pub states: Option<Arc<Vec<Vec<Vec<f32>>>>>,
}

/// The share is too large for the device's memory; nothing of the replica has changed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{n_rows} rows of {n_steps} steps do not fit into the memory of {device}: lower --batch-size or --seq-len, or raise --accumulate")]
pub struct NoRoom {
    pub device: String,
    pub n_rows: usize,
    pub n_steps: usize,
}

/// What a worker does, for whoever waits for it.
#[derive(Clone, Debug, Default)]
pub struct Whereabouts(Arc<AtomicUsize>);

/// In the order of [`Whereabouts::set`]'s numbers.
const DOINGS: [&str; 10] = [
    "idle",
    "taking its place in the ring",
    "loading parameters",
    "computing gradients",
    "waiting for the device to finish its gradients",
    "waiting for the ring's sums",
    "updating",
    "evaluating",
    "reading back",
    "measuring variants of kernels",
];

impl Whereabouts {
    fn set(&self, doing: &str) {
        self.0.store(DOINGS.iter().position(|&known| known == doing).unwrap_or(0), Ordering::Relaxed);
    }

    /// As in `it was ...`.
    pub fn get(&self) -> &'static str {
        DOINGS.get(self.0.load(Ordering::Relaxed)).copied().unwrap_or_default()
    }
}

/// A rank's part of a training step.
pub struct StepWork {
    pub batch: Arc<Batch>,
    /// Rows of the batch that are this rank's.
    pub rows: Range<usize>,
    /// Their carried state; none: zero.
    pub state: Option<Vec<f32>>,
    pub wants_state: bool,
    /// The summed gradient comes back with the answer.
    pub wants_gradients: bool,
    /// Multiplies the gradient: 1 over the global weight.
    pub scale: f32,
    /// Dropout's key.
    pub key: StepKey,
    /// Counted from 1.
    pub step: u64,
    pub lr: f64,
}

/// A rank's part of an evaluation.
pub struct EvaluateWork {
    pub batch: Arc<Batch>,
    pub rows: Range<usize>,
    pub state: Option<Vec<f32>>,
    pub wants_state: bool,
    /// Outputs of networks with numbers to give, `[rows, O]`.
    pub wants_outputs: bool,
}

/// What a worker answers.
pub enum Answer {
    /// The device is open.
    Open(DeviceInfo),
    /// The replica stands in its place.
    Ready,
    Loaded,
    Reserved,
    Tuned(Vec<Choice>),
    Step(StepAnswer),
    Evaluated(EvaluateAnswer),
    Params(Vec<Vec<f32>>),
    /// Empty where the last pass was none of an evaluation.
    Gates(Gates),
    /// By state, by tensor of the table, in PyTorch's order, each with the ranges that this rank owns.
    States(Vec<Vec<Vec<f32>>>),
    /// Nothing where gradients go whole, or nowhere.
    Held(Vec<Held>),
}

/// A rank's view of a step that waits for its commit.
pub struct StepAnswer {
    /// Of the membership in which the step was taken.
    pub generation: u64,
    /// Sum over the rank's terms.
    pub loss: f64,
    /// Something was not finite: on this rank, or in the sums.
    pub non_finite: bool,
    /// Of the summed gradient, before clipping; the same on all ranks.
    pub norm: f64,
    pub state: Vec<f32>,
    /// Of all ranks, by tensor of the table, each in PyTorch's order, where they were wanted; only the own segments where owners update.
    pub gradients: Vec<Vec<f32>>,
    /// Time until the rank's own gradients were under way.
    pub compute: Duration,
    pub ring: RingTimes,
    /// Since the start.
    pub bytes_sent: u64,
    /// Variants of what was launched could be measured.
    pub wants_tuning: bool,
}

/// A rank's part of an evaluation, done.
pub struct EvaluateAnswer {
    pub loss: f64,
    pub non_finite: bool,
    pub state: Vec<f32>,
    /// `[rows, columns]` without padding.
    pub outputs: Vec<f32>,
}

/// What a worker is made of.
pub struct WorkerSpec {
    pub model: ModelConfig,
    pub optimizer: OptimizerConfig,
    /// Parts that each share is cut into.
    pub accumulate: usize,
    /// How gradients are made smaller on their way to other ranks.
    pub compress: Method,
    pub deadline: Duration,
}

/// A step that is computed and exchanged, and changes nothing until the commit.
enum Pending {
    /// Complete sums lie in the gradient buckets.
    Sums { step: u64, lr: f64, factor: f64 },
    /// New parameters lie in the gradient buckets, new state of the own segments in the second buffers; by bucket that of the segments of the rank
    /// before, where copies are kept.
    NewParams { copies: Vec<Arc<Vec<f32>>> },
}

/// One bucket's own segment, where owners update: its optimizer state lies here only, and where copies are kept at the next rank.
struct Segment {
    range: Range<usize>,
    /// New parameters.
    param: BufferId,
    /// By state: since the last commit, and what a step makes of it.
    states: Vec<BufferId>,
    new_states: Vec<BufferId>,
    /// What the rank before has, by state; empty where no copies are kept.
    before: Range<usize>,
    copies: Vec<BufferId>,
}

impl Segment {
    fn buffers(self) -> impl Iterator<Item = BufferId> {
        [self.param].into_iter().chain(self.states).chain(self.new_states).chain(self.copies)
    }
}

struct Worker {
    spec: WorkerSpec,
    backend: Box<dyn Backend>,
    model: Model,
    rank: usize,
    world: usize,
    generation: u64,
    update: Update,
    keeps_copies: bool,
    /// None in a world of one, and after a step that failed here.
    ring: Option<Ring>,
    /// None in a world of one, and where gradients go whole.
    compressor: Option<SharedCompressor>,
    /// By state, by bucket; empty where owners update.
    states: Vec<Vec<BufferId>>,
    /// By bucket; only where owners update.
    segments: Vec<Segment>,
    /// Sums of squares, in a world of one.
    squares: Option<BufferId>,
    /// Stands in for state that a rule does not have.
    spare: BufferId,
    pending: Option<Pending>,
    /// Memory for readbacks that go to the ring.
    memory: Vec<Vec<f32>>,
    /// By bucket: what it last came back from the ring in.
    messages: Vec<Option<Shared>>,
    tail: Vec<f32>,
    /// Sent in earlier rings, and in this one.
    bytes_sent: [u64; 2],
    whereabouts: Whereabouts,
    /// By bucket: words that are not trained.
    frozen: Vec<Vec<Range<usize>>>,
    /// No step had a ring or several parts so far.
    is_alone: bool,
    /// Of the step at hand, where they are wanted and owners update.
    gradients: Vec<Vec<f32>>,
    /// Steps and rows of an evaluation's last pass, as long as its gates are there.
    evaluated: Option<[usize; 2]>,
}

/// Runs a worker until its commands end; the first of them gives it its place. An error ends the worker after it is told, unless the replica is still
/// what it was before the command: a peer failed, or the memory was too small.
pub fn serve(
    spec: WorkerSpec,
    backend: Box<dyn Backend>,
    whereabouts: Whereabouts,
    commands: &Receiver<Command>,
    answers: &Sender<Result<Answer>>,
) {
    let mut worker = match Worker::new(spec, backend, whereabouts) {
        Ok(worker) => worker,
        Err(e) => {
            // Nobody listens only where the coordinator itself is gone.
            let _ = answers.send(Err(e));
            return;
        }
    };
    for command in commands {
        let changes_nothing = matches!(command, Command::Step(_) | Command::Evaluate(_) | Command::Reserve { .. });
        let answer = worker.obey(command);
        worker.whereabouts.set("idle");
        let goes_on = match &answer {
            Ok(_) => true,
            Err(e) => changes_nothing && worker.stands_after(e),
        };
        let told = match answer.transpose() {
            Some(answer) => answers.send(answer).is_ok(),
            None => true,
        };
        if !goes_on || !told {
            return;
        }
    }
}

fn is_memory(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| matches!(cause.downcast_ref(), Some(DeviceError::OutOfMemory { .. })))
}

/// Whether a step failed for what another rank did or did not do.
pub fn peer_error(error: &anyhow::Error) -> Option<&CommError> {
    error.chain().find_map(|cause| cause.downcast_ref::<CommError>())
}

/// The memory that a worker takes for training on a share of this size, in buffers, while it gets them. Nothing is allocated.
///
/// # Errors
/// A buffer beyond the device's limits.
pub fn weigh(spec: &WorkerSpec, [rank, world]: [usize; 2], update: Update, n_steps: usize, n_rows: usize, limits: Limits) -> Result<u64> {
    let scale = Scale::new(limits);
    let spec = WorkerSpec { model: spec.model.clone(), ..*spec };
    let mut worker = Worker::new(spec, Box::new(scale.clone()), Whereabouts::default())?;
    let keeps_copies = false;
    worker.join(Seat { rank, world, generation: 0, update, keeps_copies, ring: None, params: None, states: None })?;
    worker.reserve(n_steps, n_rows)?;
    Ok(scale.most_bytes())
}

impl Worker {
    fn new(spec: WorkerSpec, mut backend: Box<dyn Backend>, whereabouts: Whereabouts) -> Result<Self> {
        whereabouts.set("taking its place in the ring");
        UsageError::unless((1..=MAX_PARTS).contains(&spec.accumulate), || {
            format!("--accumulate {} is not in 1..={MAX_PARTS}", spec.accumulate)
        })?;
        let backend_ref = backend.as_mut();
        let model = Model::new(spec.model.clone(), backend_ref)?;
        let buckets = model.table().buckets().to_vec();
        let names = spec.optimizer.states();
        let longest = buckets.iter().map(|b| b.range.len()).max().unwrap_or(ALIGN);
        // A rule without momentum still has its binding; a state that is never touched needs no memory of its own.
        let spare = backend_ref.alloc("no state", if names.len() < 2 { longest } else { ALIGN })?;
        Ok(Self {
            spec,
            backend,
            model,
            rank: 0,
            world: 1,
            generation: 0,
            update: Update::Everywhere,
            keeps_copies: false,
            ring: None,
            compressor: None,
            states: Vec::new(),
            segments: Vec::new(),
            squares: None,
            spare,
            pending: None,
            memory: Vec::new(),
            messages: Vec::new(),
            tail: Vec::new(),
            bytes_sent: [0; 2],
            whereabouts,
            frozen: vec![Vec::new(); buckets.len()],
            is_alone: true,
            gradients: Vec::new(),
            evaluated: None,
        })
    }

    /// Whether the replica is as it was after this error of a step; it then waits for another place in the ring.
    fn stands_after(&mut self, error: &anyhow::Error) -> bool {
        let has_no_room = error.downcast_ref::<NoRoom>().is_some();
        let stands = has_no_room || peer_error(error).is_some();
        if stands {
            // Peers learn that this rank is not with them.
            self.leave();
        }
        if has_no_room {
            self.model.release(self.backend.as_mut());
        }
        stands
    }

    fn leave(&mut self) {
        self.ring = None;
        self.pending = None;
        // They are cut as the ring was.
        (self.memory, self.messages) = (Vec::new(), Vec::new());
        self.bytes_sent = [self.bytes_sent.iter().sum(), 0];
    }

    fn join(&mut self, seat: Seat) -> Result<()> {
        self.leave();
        let Seat { rank, world, generation, update, keeps_copies, ring, params, states } = seat;
        // Where somebody has left, all are told the whole state; a place that is the same keeps what it has.
        let is_same = (self.rank, self.world, self.update, self.keeps_copies) == (rank, world, update, keeps_copies);
        (self.rank, self.world, self.generation, self.ring) = (rank, world, generation, ring);
        (self.update, self.keeps_copies) = (update, keeps_copies);
        if !is_same || self.states.is_empty() && self.segments.is_empty() {
            self.make_room_for_states()?;
        }
        let backend = self.backend.as_mut();
        let buckets = self.model.table().buckets();
        if let Some(squares) = self.squares.take_if(|_| world > 1) {
            backend.free(squares);
        }
        if world == 1 && self.squares.is_none() {
            let n_blocks: usize = buckets.iter().map(|b| round_up(b.range.len().div_ceil(BLOCK), ALIGN)).sum();
            self.squares = Some(backend.alloc("squares", n_blocks)?);
        }
        if let Some(params) = params {
            self.model.write_params(backend, &params)?;
        }
        if let Some(states) = states {
            self.write_states(&states)?;
        }
        self.compress()
    }

    /// Makes gradients smaller from now on where that was asked for and there is somebody to send them to.
    fn compress(&mut self) -> Result<()> {
        let Some(ring) = self.ring.as_ref().filter(|_| self.spec.compress != Method::None) else {
            self.compressor = None;
            return Ok(());
        };
        let fresh = || Compressor::new(settings(self.spec.compress, &self.spec.optimizer), self.model.table());
        let compressor = self.compressor.get_or_insert_with(|| SharedCompressor::new(fresh()));
        compressor.lock().join(self.rank, self.world);
        ring.compress(compressor.clone())
    }

    /// The rule as far as it acts on what came from the ring.
    fn rule(&self) -> OptimizerConfig {
        let method = if self.compressor.is_some() { self.spec.compress } else { Method::None };
        update_rule(method, &self.spec.optimizer)
    }

    /// Memory for the optimizer's state, zeros: all of it, or where owners update that of the own segments, and copies of those of the rank before. State that
    /// stays whole is kept.
    fn make_room_for_states(&mut self) -> Result<()> {
        let backend = self.backend.as_mut();
        self.segments.drain(..).flat_map(Segment::buffers).for_each(|buffer| backend.free(buffer));
        let names = self.spec.optimizer.states();
        let buckets = self.model.table().buckets();
        let Self { rank, world, keeps_copies, .. } = *self;
        if world > 1 && self.update == Update::ByOwner {
            self.states.drain(..).flatten().for_each(|buffer| backend.free(buffer));
            let before = (rank + world - 1) % world;
            for bucket in buckets {
                let len = bucket.range.len();
                let (range, before) = (owned_segment(world, rank, len), owned_segment(world, before, len));
                let mut of_states = |label: &str, range: &Range<usize>, wanted: bool| {
                    let names = names.iter().filter(|_| wanted);
                    names.map(|name| backend.alloc(&format!("{label} {name}"), range.len().max(ALIGN))).collect::<Result<Vec<_>>>()
                };
                let states = of_states("optimizer", &range, true)?;
                let new_states = of_states("new optimizer", &range, true)?;
                let copies = of_states("copied optimizer", &before, keeps_copies)?;
                let param = backend.alloc("new parameters", range.len().max(ALIGN))?;
                self.segments.push(Segment { range, param, states, new_states, before, copies });
            }
        } else if self.states.is_empty() {
            for name in names {
                let of_bucket = |b: &crate::params::Bucket| backend.alloc(&format!("optimizer {name}"), b.range.len());
                self.states.push(buckets.iter().map(of_bucket).collect::<Result<Vec<_>>>()?);
            }
        }
        Ok(())
    }

    /// Where state lies: the words of the address space of each bucket, with their buffers by state.
    fn places(segment: &Segment) -> impl Iterator<Item = (&Range<usize>, &Vec<BufferId>)> {
        [(&segment.range, &segment.states), (&segment.before, &segment.copies)].into_iter().filter(|(range, _)| !range.is_empty())
    }

    fn write_states(&mut self, states: &[Vec<Vec<f32>>]) -> Result<()> {
        let (table, backend) = (self.model.table(), self.backend.as_mut());
        for (buckets, values) in self.states.iter().zip(states) {
            write_buckets(table, backend, buckets, values)?;
        }
        for (state, values) in states.iter().enumerate().filter(|_| !self.segments.is_empty()) {
            for (segment, words) in self.segments.iter().zip(packed(table, values)?) {
                for (range, buffers) in Self::places(segment) {
                    if let Some(&buffer) = buffers.get(state) {
                        backend.write(Span { buffer, offset: 0, len: range.len() }, &words[range.clone()])?;
                    }
                }
            }
        }
        Ok(())
    }

    /// By state, by tensor; where owners update zeros but for the own segments, and for copies.
    fn read_states(&mut self) -> Result<Vec<Vec<Vec<f32>>>> {
        let (table, backend, deadline) = (self.model.table(), self.backend.as_mut(), self.spec.deadline);
        if self.segments.is_empty() {
            return self.states.iter().map(|buckets| read_buckets(table, &mut *backend, buckets, deadline)).collect();
        }
        let mut states = Vec::new();
        for state in 0..self.spec.optimizer.states().len() {
            let mut buckets: Vec<Vec<f32>> = table.buckets().iter().map(|bucket| vec![0.0; bucket.range.len()]).collect();
            for (segment, words) in self.segments.iter().zip(&mut buckets) {
                for (range, buffers) in Self::places(segment) {
                    if let Some(&buffer) = buffers.get(state) {
                        words[range.clone()].copy_from_slice(&read_now(backend, Span { buffer, offset: 0, len: range.len() }, deadline)?);
                    }
                }
            }
            states.push(unpacked(table, &buckets));
        }
        Ok(states)
    }

    fn reserve(&mut self, n_steps: usize, n_rows: usize) -> Result<()> {
        let most = split_even(n_rows, self.spec.accumulate).iter().map(Range::len).max().unwrap_or(0);
        if most == 0 {
            return Ok(());
        }
        self.make_room(n_steps, most).map_err(|e| self.no_room(e, n_steps, n_rows))
    }

    /// Memory for a part of a share, with gradients.
    fn make_room(&mut self, n_steps: usize, n_rows: usize) -> Result<()> {
        let backend = self.backend.as_mut();
        let reserved = self.model.reserve(backend, n_steps, n_rows, true);
        if !reserved.as_ref().is_err_and(is_memory) {
            return reserved;
        }
        // It may be what an evaluation left that is too large together with this.
        self.model.release(backend);
        self.model.reserve(backend, n_steps, n_rows, true)
    }

    /// Says which share it was where memory was too small.
    fn no_room(&self, error: anyhow::Error, n_steps: usize, n_rows: usize) -> anyhow::Error {
        let device = self.backend.info().spec.clone();
        if is_memory(&error) { error.context(NoRoom { device, n_rows, n_steps }) } else { error }
    }

    fn obey(&mut self, command: Command) -> Result<Option<Answer>> {
        let deadline = self.spec.deadline;
        self.whereabouts.set(match command {
            Command::Join(_) => "taking its place in the ring",
            Command::Load { .. } | Command::Freeze(_) | Command::SetLoss(_) | Command::Hold(_) | Command::Choose(_) => "loading parameters",
            Command::Reserve { .. } | Command::Step(_) => "computing gradients",
            Command::Commit => "updating",
            Command::Abort => "idle",
            Command::Evaluate(_) => "evaluating",
            Command::Tune(_) => "measuring variants of kernels",
            Command::ReadParams | Command::ReadGates | Command::ReadStates | Command::ReadHeld => "reading back",
        });
        Ok(match command {
            Command::Join(seat) => {
                self.join(*seat)?;
                Some(Answer::Ready)
            }
            Command::Load { params, states } => {
                self.model.write_params(self.backend.as_mut(), &params)?;
                self.write_states(&states)?;
                Some(Answer::Loaded)
            }
            Command::Freeze(tensors) => {
                self.frozen.iter_mut().for_each(Vec::clear);
                for &tensor in tensors.iter() {
                    let tensor = self.model.table().tensors().get(tensor).context("a tensor to freeze is in the table")?;
                    self.frozen[tensor.bucket].push(tensor.in_bucket());
                }
                Some(Answer::Loaded)
            }
            Command::SetLoss(loss) => {
                self.model.set_loss(loss);
                Some(Answer::Loaded)
            }
            Command::Choose(choices) => {
                self.backend.choose(&choices);
                Some(Answer::Loaded)
            }
            Command::Tune(budget) => Some(Answer::Tuned(self.backend.tune(budget)?)),
            Command::Reserve { n_steps, n_rows } => {
                self.reserve(n_steps, n_rows)?;
                Some(Answer::Reserved)
            }
            Command::Step(work) => Some(Answer::Step(self.step(&work)?)),
            Command::Commit => {
                self.commit()?;
                None
            }
            Command::Abort => {
                self.pending = None;
                None
            }
            Command::Evaluate(work) => Some(Answer::Evaluated(self.evaluate(&work)?)),
            Command::ReadParams => Some(Answer::Params(self.model.read_params(self.backend.as_mut(), deadline)?)),
            Command::ReadGates => Some(Answer::Gates(match self.evaluated {
                Some([n_steps, n_rows]) => self.model.read_gates(self.backend.as_mut(), n_steps, n_rows, deadline)?,
                None => Gates::new(),
            })),
            Command::ReadStates => Some(Answer::States(self.read_states()?)),
            Command::ReadHeld => Some(Answer::Held(self.compressor.as_ref().map_or_else(Vec::new, |c| c.lock().held()))),
            Command::Hold(pieces) => {
                if let Some(compressor) = &self.compressor {
                    compressor.lock().hold(&pieces)?;
                }
                Some(Answer::Loaded)
            }
        })
    }

    fn step(&mut self, work: &StepWork) -> Result<StepAnswer> {
        ensure!(self.pending.is_none(), "a step was begun before the one before was committed");
        ensure!(self.ring.is_some() || self.world == 1, "a step was begun before the ring was made anew");
        self.evaluated = None;
        if let Some(compressor) = &self.compressor {
            compressor.lock().begin(work.step);
        }
        let _span = debug_span!("compute", step = work.step, rank = self.rank).entered();
        let start = Instant::now();
        let parts = split_even(work.rows.len(), self.spec.accumulate);
        let parts: Vec<Range<usize>> = parts.into_iter().filter(|p| !p.is_empty()).collect();
        let n_parts = parts.len().max(1);
        let backend = self.backend.as_mut();
        self.model.lower_flags(backend)?;
        // Once sums of other ranks, or of several parts, have lain in the gradients, nobody knows which rows are zero.
        self.is_alone &= self.ring.is_none() && self.spec.accumulate == 1;
        self.model.keep_embedding_sparse(self.is_alone && !backend.info().is_gpu && self.spec.optimizer.spares_zeros());
        let n_rows = work.rows.len();
        let given = work.state.as_ref().map(|rows| Carried::from_rows(&self.spec.model, n_rows, rows.clone()));
        let mut left = Carried::new(&self.spec.model, n_rows);
        if let Some(first) = parts.first() {
            // The first part has the most rows, and the longest.
            let n_steps = work.batch.longest(work.rows.start + first.start..work.rows.start + first.end);
            self.make_room(n_steps, first.len()).map_err(|e| self.no_room(e, n_steps, n_rows))?;
        }
        let backend = self.backend.as_mut();
        for part in 0..n_parts {
            let rows = parts.get(part).cloned().unwrap_or(0..0);
            let batch = work.batch.rows(work.rows.start + rows.start..work.rows.start + rows.end);
            let part_state = given.as_ref().map(|g| g.rows(rows.clone()));
            let share = share_of(&batch, part_state.as_deref(), work.scale);
            let pass = Pass { key: self.spec.model.is_random().then_some(work.key), gradients: true, part };
            let (ring, memory, messages) = (self.ring.as_ref(), &mut self.memory, &mut self.messages);
            let (is_last, frozen) = (part + 1 == n_parts, &self.frozen);
            self.model.run(backend, &share, pass, &mut |backend, bucket, span| {
                if !is_last {
                    return Ok(());
                }
                // What is not trained counts for no norm.
                frozen[bucket].iter().try_for_each(|range| backend.clear(span.part(range.start, range.len())))?;
                let Some(ring) = ring else { return Ok(()) };
                let words = backend.read(&[span], memory.pop().unwrap_or_default())?;
                ring.reduce(bucket, words, messages.get_mut(bucket).and_then(Option::take))
            })?;
            if work.wants_state && n_parts > 1 {
                let spans = self.model.final_state(batch.n_steps, batch.n_rows);
                left.put(rows, &backend.read(&spans, Vec::new())?.wait(self.spec.deadline)?);
            }
        }
        let mut spans = vec![self.model.loss(n_parts), self.model.flag()];
        if let Some(squares) = self.squares {
            let mut at = 0;
            let rows = self.model.embedding_rows();
            for (i, (bucket, &grads)) in self.model.table().buckets().iter().zip(self.model.grads()).enumerate() {
                let (len, n_blocks) = (bucket.range.len(), bucket.range.len().div_ceil(BLOCK));
                let to = Span { buffer: squares, offset: at, len: n_blocks };
                let (len, grads) = (len as u32, backend.whole(grads));
                match rows.as_ref().filter(|rows| rows.bucket == i) {
                    Some(&EmbeddingRows { rows, width, n_distinct, index, .. }) => {
                        backend.launch(&RowSquares { len, out: 0, rows, width, n_distinct }, &[index, grads, to])?;
                    }
                    None => backend.launch(&BlockSquares { len, out: 0 }, &[grads, to])?,
                }
                spans.push(to);
                at += round_up(n_blocks, ALIGN);
            }
        }
        if work.wants_state && n_parts == 1 && !work.rows.is_empty() {
            spans.extend(self.model.final_state(work.batch.n_steps, work.rows.len()));
        }
        let n_squares: usize =
            if self.squares.is_some() { spans[2..].iter().take(self.model.grads().len()).map(|s| s.len).sum() } else { 0 };
        let tail = backend.read(&spans, std::mem::take(&mut self.tail))?;
        backend.submit()?;
        self.whereabouts.set("waiting for the device to finish its gradients");
        let words = debug_span!("readback").in_scope(|| tail.wait(self.spec.deadline))?;
        let compute = start.elapsed();
        let loss: f64 = words[..n_parts].iter().map(|&l| f64::from(l)).sum();
        let mut non_finite = words[n_parts].to_bits() != 0 || !loss.is_finite();
        let squares = &words[n_parts + 1..][..n_squares];
        let mut norm = norm_of(squares.iter().copied());
        if n_parts == 1 && work.wants_state && n_rows > 0 {
            left.put(0..n_rows, &words[n_parts + 1 + n_squares..]);
        }
        let state = if work.wants_state { left.into_rows() } else { Vec::new() };
        self.tail = words;
        let mut times = RingTimes::default();
        self.whereabouts.set("waiting for the ring's sums");
        if let Some(ring) = &self.ring {
            let sums = debug_span!("wait for ring").in_scope(|| ring.exchange(vec![u8::from(non_finite)]))?;
            times = RingTimes { waited: start.elapsed() - compute, ..sums.times };
            (norm, self.bytes_sent[1]) = (sums.norm, sums.bytes_sent);
            non_finite |= sums.headers.iter().any(|h| h.first() != Some(&0)) || !norm.is_finite();
            debug_span!("receive").in_scope(|| self.receive(sums, work, norm, non_finite))?;
        } else {
            non_finite |= !norm.is_finite();
            let factor = self.spec.optimizer.clip_factor(norm);
            self.pending = Some(Pending::Sums { step: work.step, lr: work.lr, factor });
        }
        if non_finite {
            self.pending = None;
        }
        let mut gradients = std::mem::take(&mut self.gradients);
        if work.wants_gradients && matches!(self.pending, Some(Pending::Sums { .. })) {
            gradients = read_buckets(self.model.table(), self.backend.as_mut(), self.model.grads(), self.spec.deadline)?;
        }
        let (generation, bytes_sent) = (self.generation, self.bytes_sent.iter().sum());
        let wants_tuning = self.backend.wants_tuning();
        Ok(StepAnswer { generation, loss, non_finite, norm, state, gradients, compute, ring: times, bytes_sent, wants_tuning })
    }

    /// Puts what came from the ring where the update will find it.
    fn receive(&mut self, sums: Sums, work: &StepWork, norm: f64, non_finite: bool) -> Result<()> {
        let rule = self.rule();
        let (ring, backend) = (self.ring.as_ref().context("sums come from a ring")?, self.backend.as_mut());
        let factor = rule.clip_factor(norm);
        let (memory, messages) = (&mut self.memory, &mut self.messages);
        let mut keep = |returned: Returned| {
            memory.push(returned.memory);
            messages.resize_with(messages.len().max(returned.bucket + 1), || None);
            messages[returned.bucket] = Some(returned.message);
        };
        if non_finite {
            sums.buckets.into_iter().for_each(keep);
            return Ok(());
        }
        if self.update == Update::Everywhere {
            for returned in sums.buckets {
                write_parts(backend, self.model.grads()[returned.bucket], &returned.message)?;
                keep(returned);
            }
            self.pending = Some(Pending::Sums { step: work.step, lr: work.lr, factor });
            return Ok(());
        }
        let n_buckets = sums.buckets.len();
        // New parameters take the place of the sums, so these are kept here.
        let lengths = self.model.table().buckets().iter().map(|bucket| if work.wants_gradients { bucket.range.len() } else { 0 });
        let mut kept: Vec<Vec<f32>> = lengths.map(|len| vec![0.0; len]).collect();
        for returned in sums.buckets {
            let (bucket, segment) = (returned.bucket, &self.segments[returned.bucket]);
            let len = segment.range.len();
            let new = Span { buffer: segment.param, offset: 0, len };
            let front = |&buffer: &BufferId| Span { buffer, offset: 0, len };
            let seconds: Vec<Span> = segment.new_states.iter().map(front).collect();
            if len > 0 {
                let of = |buffer: BufferId| Span { buffer, offset: segment.range.start, len };
                let (param, grad) = (of(self.model.params()[bucket]), of(self.model.grads()[bucket]));
                let sums = returned.message.get(segment.range.clone()).context("the own segment comes in one part")?;
                backend.write(grad, sums)?;
                if work.wants_gradients {
                    let words = read_now(backend, grad, self.spec.deadline)?;
                    kept[bucket][segment.range.clone()].copy_from_slice(&words);
                }
                backend.copy(param, new)?;
                for (state, &second) in segment.states.iter().zip(&seconds) {
                    backend.copy(front(state), second)?;
                }
                let states = with_spare(&seconds, Span { buffer: self.spare, offset: 0, len });
                for range in live(&self.frozen[bucket], segment.range.clone()) {
                    let (at, len) = (range.start - segment.range.start, range.len());
                    let part = |span: Span| span.part(at, len);
                    rule.update(backend, part(new), part(grad), states.map(part), work.step, work.lr, factor)?;
                }
            }
            // A rule without state has none to copy.
            let copied = self.keeps_copies && !seconds.is_empty();
            let states = copied.then(|| backend.read(&seconds, Vec::new())).transpose()?;
            ring.spread(returned, backend.read(&[new], Vec::new())?, states)?;
        }
        let mut copies = vec![Arc::default(); n_buckets];
        for _ in 0..n_buckets {
            let mut returned = ring.spread_bucket()?;
            copies[returned.bucket] = std::mem::take(&mut returned.copy);
            write_parts(backend, self.model.grads()[returned.bucket], &returned.message)?;
            keep(returned);
        }
        if work.wants_gradients {
            self.gradients = unpacked(self.model.table(), &kept);
        }
        self.pending = Some(Pending::NewParams { copies });
        Ok(())
    }

    fn commit(&mut self) -> Result<()> {
        let _span = debug_span!("update").entered();
        let rule = self.rule();
        let backend = self.backend.as_mut();
        if let Some(compressor) = &self.compressor {
            compressor.lock().commit();
        }
        match self.pending.take().context("a commit without a step")? {
            Pending::Sums { step, lr, factor } => {
                let rows = self.model.embedding_rows();
                for (bucket, b) in self.model.table().buckets().iter().enumerate() {
                    let whole = |buffer| Span { buffer, offset: 0, len: b.range.len() };
                    if let Some(r) = rows.as_ref().filter(|rows| rows.bucket == bucket) {
                        let spans = [r.index, whole(self.model.params()[bucket]), whole(self.model.grads()[bucket])];
                        rule.update_rows(backend, spans, [r.rows, r.width, r.n_distinct], lr, factor)?;
                        continue;
                    }
                    let states: Vec<Span> = self.states.iter().map(|s| whole(s[bucket])).collect();
                    let states = with_spare(&states, whole(self.spare));
                    let (param, grad) = (whole(self.model.params()[bucket]), whole(self.model.grads()[bucket]));
                    for range in live(&self.frozen[bucket], 0..b.range.len()) {
                        let part = |span: Span| span.part(range.start, range.len());
                        rule.update(backend, part(param), part(grad), states.map(part), step, lr, factor)?;
                    }
                }
            }
            Pending::NewParams { copies } => {
                for (bucket, segment) in self.segments.iter_mut().enumerate() {
                    self.model.swap_bucket(bucket);
                    std::mem::swap(&mut segment.states, &mut segment.new_states);
                    let len = segment.before.len();
                    for (&buffer, words) in segment.copies.iter().zip(copies[bucket].chunks_exact(len.max(1))) {
                        backend.write(Span { buffer, offset: 0, len }, words)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn evaluate(&mut self, work: &EvaluateWork) -> Result<EvaluateAnswer> {
        let _span = debug_span!("evaluate", rank = self.rank).entered();
        let backend = self.backend.as_mut();
        if work.rows.is_empty() {
            return Ok(EvaluateAnswer { loss: 0.0, non_finite: false, state: Vec::new(), outputs: Vec::new() });
        }
        let n_rows = work.rows.len();
        let given = work.state.as_ref().map(|rows| Carried::from_rows(&self.spec.model, n_rows, rows.clone()));
        let mut left = Carried::new(&self.spec.model, if work.wants_state { n_rows } else { 0 });
        let mut answer = EvaluateAnswer { loss: 0.0, non_finite: false, state: Vec::new(), outputs: Vec::new() };
        // In as many parts as a training step, which bound what the device must hold; in more where its memory is too small for that.
        let mut n_parts = self.spec.accumulate;
        loop {
            let first = split_even(n_rows, n_parts).into_iter().next().unwrap_or(0..0);
            let n_steps = work.batch.longest(work.rows.start..work.rows.end);
            let Err(e) = self.model.reserve(backend, n_steps, first.len(), false) else { break };
            if !is_memory(&e) || first.len() == 1 {
                return Err(e);
            }
            self.model.release(backend);
            n_parts = (2 * n_parts).min(n_rows);
        }
        for part in split_even(n_rows, n_parts).into_iter().filter(|part| !part.is_empty()) {
            let batch = work.batch.rows(work.rows.start + part.start..work.rows.start + part.end);
            let state = given.as_ref().map(|given| given.rows(part.clone()));
            let passed = pass_forward(backend, &mut self.model, &batch, state.as_deref(), [work.wants_state, work.wants_outputs])?;
            self.evaluated = Some([batch.n_steps, batch.n_rows]);
            answer.loss += passed.loss;
            answer.non_finite |= passed.non_finite;
            if work.wants_state {
                left.put(part, &passed.state);
            }
            answer.outputs.extend(passed.outputs);
        }
        answer.state = left.into_rows();
        Ok(answer)
    }
}

/// Writes what came from the ring from where it lies; nothing is put together before.
fn write_parts(backend: &mut dyn Backend, buffer: BufferId, message: &Shared) -> Result<()> {
    for (range, part) in message.parts().filter(|(range, _)| !range.is_empty()) {
        backend.write(Span { buffer, offset: range.start, len: range.len() }, part)?;
    }
    Ok(())
}

/// What of `within` is trained: all but the frozen ranges, which lie apart and rise.
fn live(frozen: &[Range<usize>], within: Range<usize>) -> impl Iterator<Item = Range<usize>> + '_ {
    let inside = move |at: usize| at.clamp(within.start, within.end);
    let starts = std::iter::once(0).chain(frozen.iter().map(|range| range.end));
    let ends = frozen.iter().map(|range| range.start).chain(std::iter::once(usize::MAX));
    starts.zip(ends).map(move |(start, end)| inside(start)..inside(end)).filter(|part| !part.is_empty())
}

/// A rule with less state than its kernel has bindings gets the spare in front: only momenta are ever missing.
fn with_spare(states: &[Span], spare: Span) -> [Span; 2] {
    match *states {
        [m, v] => [m, v],
        [v] => [spare, v],
        _ => [spare, spare],
    }
}
