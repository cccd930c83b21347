//! All workers of a run, as the coordinator sees them: a step goes to every rank, and happens on all or on none.
//!
//! Where losses are survived ([`Safety`]), whatever finds a worker gone, stuck or out of memory first forms the ring anew without it (or with less for it)
//! and then says so as [`Regrouped`]: the replicas stand as before the call, ranks have moved up, and the caller asks again with other shares.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use crossbeam::channel::{Receiver, Select, Sender, bounded};
use sha2::{Digest, Sha256};

use super::commit::{Decision, Membership, Report, StepCommit, holders};
use super::devices::{DeviceKind, Resolved};
use super::memory::Limited;
use super::ring::{Ring, RingTimes, Update};
use super::worker::{
    Answer, Command, EvaluateAnswer, EvaluateWork, Gates, NoRoom, Seat, StepAnswer, StepWork, Whereabouts, WorkerSpec, peer_error, serve,
};
use crate::backend::tuning::{Choice, Choices};
use crate::backend::{Backend, DeviceInfo, open};
use crate::comm::plan::owned_segment;
use crate::comm::{self, CommError, Tap};
use crate::compress::{Held, Method};
use crate::data::Batch;
use crate::infer::session::{DEADLINE, state_of};
use crate::model;
use crate::model::config::ModelConfig;
use crate::model::state::Carried;
use crate::optim::OptimizerConfig;
use crate::params::ParamTable;
use crate::rng::StepKey;
use crate::spans;
use crate::usage::UsageError;

/// What all replicas have in common.
#[derive(Clone, Debug)]
pub struct GroupSpec {
    pub model: ModelConfig,
    pub optimizer: OptimizerConfig,
    pub accumulate: usize,
    /// How gradients are made smaller on their way to other ranks.
    pub compress: Method,
    /// Owners update also where devices are alike, and each rank keeps its part of the optimizer's state only.
    pub shard_optimizer: bool,
}

impl GroupSpec {
    /// Who updates what, on devices that are alike or not.
    pub fn update(&self, alike: bool) -> Update {
        if alike && !self.shard_optimizer { Update::Everywhere } else { Update::ByOwner }
    }
}

/// Replaces a device's backend, for tests of what happens when one goes wrong. Devices are numbered as in the list that the run began with.
pub type Wrap = Arc<dyn Fn(usize, Box<dyn Backend>) -> Box<dyn Backend> + Send + Sync>;

/// What is done about devices that fail, and how long one may take.
#[derive(Clone, Debug)]
pub struct Safety {
    /// The others go on without a device that is lost.
    pub survives: bool,
    /// How long a device may take for a pass, a readback or a message before it counts as stuck.
    pub deadline: Duration,
    /// Most bytes in buffers, by device; none: what the device has.
    pub memory_limits: Vec<Option<u64>>,
    /// Sees the messages of the ring.
    pub tap: Option<Tap>,
}

impl Default for Safety {
    fn default() -> Self {
        Self { survives: false, deadline: DEADLINE, memory_limits: Vec::new(), tap: None }
    }
}

/// A worker that is no more in the ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    /// The rank that it had.
    pub rank: usize,
    /// The device's place in the list that the run began with.
    pub seat: usize,
    /// The device as it was asked for.
    pub name: String,
    pub why: String,
}

/// A worker that needs a smaller share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cramped {
    /// The rank that it has.
    pub rank: usize,
    pub name: String,
    /// Too many.
    pub n_rows: usize,
    pub why: String,
}

/// Nothing was done: the ring was formed anew first. Ask again, with the shares of those who are there now.
#[derive(Clone, Debug, Default, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.told())]
pub struct Regrouped {
    /// In the order of their ranks, as they were before.
    pub lost: Vec<Loss>,
    pub cramped: Vec<Cramped>,
}

impl Regrouped {
    /// One sentence for each.
    fn told(&self) -> String {
        let lost = self.lost.iter().map(|l| format!("device {} (rank {}) is lost: {}", l.name, l.rank, l.why));
        let cramped = self.cramped.iter().map(|c| format!("device {} (rank {}) needs a smaller share: {}", c.name, c.rank, c.why));
        lost.chain(cramped).collect::<Vec<_>>().join("; ")
    }
}

/// The longest that a device may take to be opened again.
const MOST_FOR_RETURN: Duration = Duration::from_secs(60);
/// The longest that a worker's end is waited for.
const MOST_FOR_END: Duration = Duration::from_secs(30);

struct Member {
    name: String,
    info: DeviceInfo,
    whereabouts: Whereabouts,
    commands: Option<Sender<Command>>,
    answers: Receiver<Result<Answer>>,
    thread: Option<JoinHandle<()>>,
    /// The longest that it may take for an answer.
    patience: Duration,
}

/// Workers, one a device, in the order in which they stand in the ring.
pub struct Group {
    spec: GroupSpec,
    safety: Safety,
    devices: Vec<Resolved>,
    wrap: Option<Wrap>,
    table: ParamTable,
    membership: Membership,
    /// By rank.
    members: Vec<Member>,
    update: Update,
    /// The next step hands its gradients out.
    wants_gradients: bool,
    /// Tensors of the table that are not trained.
    frozen: Arc<Vec<usize>>,
    /// In place of the model's.
    own_loss: Option<Arc<dyn model::Loss>>,
    choices: KindChoices,
    /// By rank, as of the last step: launches wait for a measurement of their variants.
    wanting: Vec<bool>,
}

/// Variants of kernels by the kind of device that they were chosen for.
pub type KindChoices = BTreeMap<String, Choices>;

/// What the measurements on one device came to.
#[derive(Clone, Debug)]
pub struct Tuned {
    /// As it was asked for.
    pub device: String,
    pub info: DeviceInfo,
    pub choices: Vec<Choice>,
}

/// One committed step.
pub struct Stepped {
    /// Sum over the global batch's terms.
    pub loss: f64,
    pub norm: f64,
    /// By rank.
    pub ranks: Vec<RankStep>,
    /// Of the mean loss over the global batch, before clipping; empty where [`Group::want_gradients`] did not ask for it.
    pub gradients: Tensors,
}

/// One rank's part of a step.
#[derive(Clone, Copy, Debug, Default)]
pub struct RankStep {
    /// Sum over the rank's terms.
    pub loss: f64,
    pub compute: Duration,
    pub ring: RingTimes,
    /// Since the start.
    pub bytes_sent: u64,
}

/// A step, an evaluation or a checkpoint that ran into something not finite; no replica was changed by it.
#[derive(Debug, thiserror::Error)]
#[error("the {what} is not finite ({who}): lower --lr, set --clip-norm, or look for extreme values in the data")]
pub struct NonFinite {
    /// `loss at step 7`, ...
    pub what: String,
    pub who: String,
    /// The loss itself was finite: the parameters that it came from may still be of use.
    pub in_gradient: bool,
}

/// What a training step is to do beside its batch.
#[derive(Clone, Copy, Debug)]
pub struct StepNumbers {
    /// Counted from 1.
    pub step: u64,
    pub lr: f64,
    pub key: StepKey,
    /// What the loss is divided by: terms or sequences of the global batch.
    pub divisor: f64,
}

/// Parameters, or one state of the optimizer: tensors in the table's order, each in PyTorch's.
pub type Tensors = Vec<Vec<f32>>;

impl Group {
    /// Starts a worker for each device and puts them in a ring.
    ///
    /// # Errors
    /// A device that cannot be opened, or a model that does not fit it; names the device.
    pub fn start(spec: GroupSpec, devices: &[Resolved], wrap: Option<&Wrap>) -> Result<Self> {
        Self::start_safe(spec, devices, Safety::default(), wrap)
    }

    /// [`Self::start`] with a word on what to do about failures.
    ///
    /// # Errors
    /// As [`Self::start`]: nobody is lost before all have begun.
    pub fn start_safe(spec: GroupSpec, devices: &[Resolved], safety: Safety, wrap: Option<&Wrap>) -> Result<Self> {
        ensure!(!devices.is_empty(), "a run needs at least one device");
        let (table, membership) = (spec.model.table(), Membership::new(devices.len()));
        let (devices, wrap) = (devices.to_vec(), wrap.cloned());
        let mut group = Self {
            spec,
            safety,
            devices,
            wrap,
            table,
            membership,
            members: Vec::new(),
            update: Update::Everywhere,
            wants_gradients: false,
            frozen: Arc::default(),
            own_loss: None,
            choices: KindChoices::new(),
            wanting: Vec::new(),
        };
        for seat in 0..group.devices.len() {
            let member = group.open(seat, group.patience())?;
            group.members.push(member);
        }
        let failures = group.join_all(None, None)?;
        group.first_of(failures)?;
        Ok(group)
    }

    /// Starts the worker of a device, which then waits for its place in the ring.
    fn open(&self, seat: usize, patience: Duration) -> Result<Member> {
        let device = &self.devices[seat];
        let deadline = self.safety.deadline;
        // What a worker may be asked while it is still at something that nobody waits for.
        let (commands, inbox) = bounded::<Command>(4);
        let (outbox, answers) = bounded::<Result<Answer>>(4);
        let (kind, wrap, limit) = (device.kind, self.wrap.clone(), self.safety.memory_limits.get(seat).copied().flatten());
        let GroupSpec { model, optimizer, accumulate, compress, .. } = self.spec.clone();
        let whereabouts = Whereabouts::default();
        let of_worker = whereabouts.clone();
        let body = move || {
            let mut backend = match open_device(&kind) {
                Ok(backend) => backend,
                Err(e) => {
                    let _ = outbox.send(Err(e));
                    return;
                }
            };
            if let Some(limit) = limit {
                backend = Box::new(Limited::new(backend, limit));
            }
            if let Some(wrap) = wrap {
                backend = wrap(seat, backend);
            }
            if outbox.send(Ok(Answer::Open(backend.info().clone()))).is_ok() {
                serve(WorkerSpec { model, optimizer, accumulate, compress, deadline }, backend, of_worker, &inbox, &outbox);
            }
        };
        let thread = spans::spawn(format!("carrousel-{seat}-{}", device.spec), body);
        let thread = thread.with_context(|| format!("cannot start the thread of {}", device.spec))?;
        let mut member = Member {
            name: device.spec.clone(),
            info: DeviceInfo::default(),
            whereabouts,
            commands: Some(commands),
            answers,
            thread: Some(thread),
            patience,
        };
        let Answer::Open(info) = member.answer()? else { bail!("{} answered out of order", member.name) };
        (member.info, member.patience) = (info, self.patience());
        // One that comes later trains what the others do.
        let frozen = (!self.frozen.is_empty()).then(|| Command::Freeze(Arc::clone(&self.frozen)));
        let chosen = self.choices.get(&member.info.kind).map(|choices| Command::Choose(Arc::new(choices.clone())));
        let loss = self.own_loss.iter().map(|loss| Command::SetLoss(Arc::clone(loss)));
        for command in frozen.into_iter().chain(loss).chain(chosen) {
            member.tell(command)?;
            let Answer::Loaded = member.answer()? else { bail!("{} answered out of order", member.name) };
        }
        Ok(member)
    }

    /// The longest that anybody may take for an answer. Its peers find a stuck one a deadline after they have done their own part, and their error tells
    /// more: they go first.
    fn patience(&self) -> Duration {
        2 * self.safety.deadline + self.safety.deadline / 2
    }

    /// Puts all members in a ring of the present generation, with these parameters and optimizer states where they are given. By rank, what failed.
    fn join_all(&mut self, params: Option<&Arc<Tensors>>, states: Option<&Arc<Vec<Tensors>>>) -> Result<Vec<Option<anyhow::Error>>> {
        let world = self.members.len();
        let alike = self.members.windows(2).all(|w| w[0].info.kind == w[1].info.kind);
        self.update = self.spec.update(alike);
        let (update, deadline, generation) = (self.update, self.safety.deadline, self.membership.generation());
        let options = comm::Options { deadline, generation, tap: self.safety.tap.clone(), ..comm::Options::default() };
        let mut failures = Vec::with_capacity(world);
        for (rank, (member, communicator)) in self.members.iter_mut().zip(comm::group(world, options)).enumerate() {
            let ring = (world > 1).then(|| Ring::start(communicator, update, self.table.buckets().len(), deadline)).transpose()?;
            let (params, states) = (params.cloned(), states.cloned());
            let seat = Seat { rank, world, generation, update, keeps_copies: self.safety.survives, ring, params, states };
            failures.push(member.tell(Command::Join(Box::new(seat))).err());
        }
        let answers = self.collect(failures, |answer| matches!(answer, Answer::Ready).then_some(()));
        Ok(answers.into_iter().map(Result::err).collect())
    }

    pub fn world(&self) -> usize {
        self.members.len()
    }

    /// The devices, by rank.
    pub fn devices(&self) -> impl Iterator<Item = (&str, &DeviceInfo)> {
        self.members.iter().map(|m| (m.name.as_str(), &m.info))
    }

    /// The device's place in the list that the run began with.
    pub fn seat(&self, rank: usize) -> Option<usize> {
        self.membership.seat(rank)
    }

    /// How often the ring was formed anew.
    pub fn generation(&self) -> u64 {
        self.membership.generation()
    }

    pub fn table(&self) -> &ParamTable {
        &self.table
    }

    pub fn update(&self) -> Update {
        self.update
    }

    /// Sets all replicas.
    ///
    /// # Errors
    /// A worker's.
    pub fn load(&mut self, params: Tensors, states: Vec<Tensors>) -> Result<()> {
        let (params, states) = (Arc::new(params), Arc::new(states));
        let told = self.tell_all(|_| Command::Load { params: Arc::clone(&params), states: Arc::clone(&states) });
        let answers = self.collect(told, |answer| matches!(answer, Answer::Loaded).then_some(()));
        self.all_of(answers).map(drop)
    }

    /// Trains these tensors of the table no more, on any rank.
    ///
    /// # Errors
    /// A worker's.
    pub fn freeze(&mut self, tensors: Vec<usize>) -> Result<()> {
        self.frozen = Arc::new(tensors);
        let frozen = Arc::clone(&self.frozen);
        let told = self.tell_all(|_| Command::Freeze(Arc::clone(&frozen)));
        let answers = self.collect(told, |answer| matches!(answer, Answer::Loaded).then_some(()));
        self.all_of(answers).map(drop)
    }

    /// Puts a loss of one's own in the place of the model's, on all ranks.
    ///
    /// # Errors
    /// A worker's.
    pub fn set_loss(&mut self, loss: &Arc<dyn model::Loss>) -> Result<()> {
        self.own_loss = Some(Arc::clone(loss));
        let told = self.tell_all(|_| Command::SetLoss(Arc::clone(loss)));
        let answers = self.collect(told, |answer| matches!(answer, Answer::Loaded).then_some(()));
        self.all_of(answers).map(drop)
    }

    /// Has devices of these kinds launch these variants from now on.
    ///
    /// # Errors
    /// A worker's.
    pub fn choose(&mut self, choices: &KindChoices) -> Result<()> {
        for (kind, of_kind) in choices {
            self.choices.entry(kind.clone()).or_default().extend(of_kind.clone());
            self.choose_on(kind, of_kind)?;
        }
        Ok(())
    }

    /// What was chosen so far, here or elsewhere.
    pub fn choices(&self) -> &KindChoices {
        &self.choices
    }

    fn choose_on(&mut self, kind: &str, choices: &Choices) -> Result<()> {
        let choices = Arc::new(choices.clone());
        for rank in 0..self.world() {
            if self.members[rank].info.kind == kind {
                self.ask(rank, Command::Choose(Arc::clone(&choices)), |answer| matches!(answer, Answer::Loaded).then_some(()))?;
            }
        }
        Ok(())
    }

    /// Whether a rank has launched in the last step what several variants could do, and none was chosen for.
    pub fn wants_tuning(&self) -> bool {
        self.wanting.contains(&true)
    }

    /// Has the ranks that want it measure variants, for about `budget` in all, one after another; devices of one kind launch the same from then on.
    ///
    /// # Errors
    /// A worker's.
    pub fn tune(&mut self, budget: Duration) -> Result<Vec<Tuned>> {
        let (start, mut told) = (Instant::now(), Vec::new());
        let wanting = std::mem::take(&mut self.wanting);
        // Nobody is taken for stuck meanwhile.
        let budget = budget.min(self.safety.deadline / 2);
        for rank in 0..self.world() {
            if !wanting.get(rank).copied().unwrap_or(false) {
                continue;
            }
            let left = budget.saturating_sub(start.elapsed());
            let choices = self.ask(rank, Command::Tune(left), |answer| match answer {
                Answer::Tuned(choices) => Some(choices),
                _ => None,
            })?;
            let Member { name, info, .. } = &self.members[rank];
            let tuned = Tuned { device: name.clone(), info: info.clone(), choices };
            let chosen = tuned.choices.iter().map(|choice| (choice.class.clone(), choice.variant.clone())).collect();
            told.push(tuned.clone());
            self.choose(&KindChoices::from([(tuned.info.kind, chosen)]))?;
        }
        Ok(told)
    }

    /// Lets every rank take the memory that training on `n_steps` of its share needs, so that what does not fit is found before anything begins.
    ///
    /// # Errors
    /// A worker's, which names the device.
    pub fn reserve(&mut self, n_steps: usize, shares: &[Range<usize>]) -> Result<()> {
        let told = self.tell_all(|rank| Command::Reserve { n_steps, n_rows: shares.get(rank).map_or(0, Range::len) });
        let answers = self.collect(told, |answer| matches!(answer, Answer::Reserved).then_some(()));
        self.all_of(answers).map(drop)
    }

    /// One training step: computed, exchanged, and committed on all ranks or on none. `shares` are rows of the batch, by rank.
    ///
    /// # Errors
    /// [`NonFinite`], after which all replicas stand as before; or a worker's.
    pub fn step(
        &mut self,
        batch: &Arc<Batch>,
        shares: &[Range<usize>],
        carried: Option<&mut Carried>,
        numbers: StepNumbers,
    ) -> Result<Stepped> {
        let _span = tracing::debug_span!("step", step = numbers.step).entered();
        ensure!(shares.len() == self.world(), "{} shares for {} workers", shares.len(), self.world());
        let scale = (1.0 / numbers.divisor) as f32;
        // Owners have sums of their own segments only, others all of them.
        let wants_gradients = std::mem::take(&mut self.wants_gradients);
        let n_askable = if self.update == Update::ByOwner { self.world() } else { 1 };
        let told = self.tell_all(|rank| {
            let rows = shares[rank].clone();
            Command::Step(StepWork {
                batch: Arc::clone(batch),
                state: state_of(batch, carried.as_deref(), rows.clone()),
                rows,
                wants_state: carried.is_some(),
                wants_gradients: wants_gradients && rank < n_askable,
                scale,
                key: numbers.key,
                step: numbers.step,
                lr: numbers.lr,
            })
        });
        let answers = self.collect(told, |answer| match answer {
            Answer::Step(step) => Some(step),
            _ => None,
        });
        let decision = self.decide(&answers, |answer| (answer.generation, !answer.non_finite));
        let mut answers = match decision {
            Some(Decision::Commit | Decision::Abort) => self.all_of(answers)?,
            _ => {
                self.wants_gradients = wants_gradients;
                return Err(self.recovered(answers));
            }
        };
        let is_committed = decision == Some(Decision::Commit);
        for member in &mut self.members {
            // Whoever does not hear it is lost, which the next command finds out: the step has happened for the others.
            let told = member.tell(if is_committed { Command::Commit } else { Command::Abort });
            if !self.safety.survives {
                told?;
            }
        }
        if !is_committed {
            return Err(self.non_finite(numbers.step, &answers).into());
        }
        if let Some(carried) = carried {
            for (rows, answer) in shares.iter().zip(&answers).filter(|(rows, _)| !rows.is_empty()) {
                carried.put(rows.clone(), &answer.state);
            }
        }
        let ranks: Vec<RankStep> =
            answers.iter().map(|a| RankStep { loss: a.loss, compute: a.compute, ring: a.ring, bytes_sent: a.bytes_sent }).collect();
        self.wanting = answers.iter().map(|a| a.wants_tuning).collect();
        let gradients = answers[..n_askable].iter_mut().map(|a| std::mem::take(&mut a.gradients)).collect();
        let gradients = if wants_gradients { self.joined(gradients)? } else { Tensors::new() };
        Ok(Stepped { loss: ranks.iter().map(|r| r.loss).sum(), norm: answers[0].norm, ranks, gradients })
    }

    /// Has the next step hand out its gradients.
    pub fn want_gradients(&mut self) {
        self.wants_gradients = true;
    }

    /// Puts tensors together of which each rank has the segments that it owns; those of one rank are whole.
    fn joined(&self, of_ranks: Vec<Tensors>) -> Result<Tensors> {
        let n_ranks = of_ranks.len();
        let mut of_ranks = of_ranks.into_iter();
        let mut whole = of_ranks.next().context("one rank was asked")?;
        for (rank, tensors) in (1..n_ranks).zip(of_ranks) {
            for (idx, tensor) in self.table.tensors().iter().enumerate() {
                let bucket = &self.table.buckets()[tensor.bucket];
                let owned = owned_segment(self.world(), rank, bucket.range.len());
                tensor.layout.for_each(|torch, packed| {
                    if owned.contains(&(tensor.offset + packed)) {
                        whole[idx][torch] = tensors[idx][torch];
                    }
                });
            }
        }
        Ok(whole)
    }

    fn non_finite(&self, step: u64, answers: &[StepAnswer]) -> NonFinite {
        let lost = |a: &StepAnswer| !a.loss.is_finite();
        let in_gradient = !answers.iter().any(lost);
        let what = format!("{} at step {step}", if in_gradient { "gradient" } else { "loss" });
        let who = self.ranks_where(answers.iter().map(|a| if in_gradient { a.non_finite } else { lost(a) }));
        NonFinite { what, who, in_gradient }
    }

    /// `rank 1, gpu:0; ...`
    fn ranks_where(&self, holds: impl Iterator<Item = bool>) -> String {
        let named = self.members.iter().zip(holds).enumerate().filter(|(_, (_, holds))| *holds);
        named.map(|(rank, (member, _))| format!("rank {rank}, {}", member.name)).collect::<Vec<_>>().join("; ")
    }

    /// Forward only: the loss summed over the batch's terms, and outputs `[rows, columns]` if they are wanted (only of models with one output a row).
    ///
    /// # Errors
    /// [`NonFinite`] where a loss or an output is not finite; a worker's.
    pub fn evaluate(
        &mut self,
        batch: &Arc<Batch>,
        shares: &[Range<usize>],
        carried: Option<&mut Carried>,
        wants_outputs: bool,
    ) -> Result<(f64, Vec<f32>)> {
        let _span = tracing::debug_span!("evaluate").entered();
        ensure!(shares.len() == self.world(), "{} shares for {} workers", shares.len(), self.world());
        let told = self.tell_all(|rank| {
            let rows = shares[rank].clone();
            Command::Evaluate(EvaluateWork {
                batch: Arc::clone(batch),
                state: state_of(batch, carried.as_deref(), rows.clone()),
                rows,
                wants_state: carried.is_some(),
                wants_outputs,
            })
        });
        let answers = self.collect(told, |answer| match answer {
            Answer::Evaluated(answer) => Some(answer),
            _ => None,
        });
        let answers: Vec<EvaluateAnswer> = self.all_of(answers)?;
        let lost = |a: &EvaluateAnswer| a.non_finite || !a.loss.is_finite();
        if answers.iter().any(lost) {
            let who = self.ranks_where(answers.iter().map(lost));
            return Err(NonFinite { what: "loss of an evaluation".to_owned(), who, in_gradient: false }.into());
        }
        if let Some(carried) = carried {
            for (rows, answer) in shares.iter().zip(&answers).filter(|(rows, _)| !rows.is_empty()) {
                carried.put(rows.clone(), &answer.state);
            }
        }
        let loss = answers.iter().map(|a| a.loss).sum();
        Ok((loss, answers.into_iter().flat_map(|a| a.outputs).collect()))
    }

    /// Gives every rank a command; by rank, why it could not be given.
    fn tell_all(&mut self, command: impl Fn(usize) -> Command) -> Vec<Option<anyhow::Error>> {
        self.members.iter_mut().enumerate().map(|(rank, member)| member.tell(command(rank)).err()).collect()
    }

    /// Gives one rank a command and waits for its answer; nothing is expected of the others.
    fn ask<T>(&mut self, rank: usize, command: Command, take: impl Fn(Answer) -> Option<T>) -> Result<T> {
        let answer = self.ask_only(rank, command, take);
        answer.map_err(|e| {
            let mut answers: Vec<Result<()>> = self.members.iter().map(|_| Ok(())).collect();
            answers[rank] = Err(e);
            self.recovered(answers)
        })
    }

    fn ask_only<T>(&mut self, rank: usize, command: Command, take: impl Fn(Answer) -> Option<T>) -> Result<T> {
        let member = self.members.get_mut(rank).with_context(|| format!("there is no rank {rank}"))?;
        member.tell(command)?;
        let answer = member.answer()?;
        take(answer).with_context(|| format!("{} answered out of order", member.name))
    }

    /// One answer of each rank, in rank order, from those who could be told; nobody waits for a rank of which others say that it was late.
    fn collect<T>(&mut self, told: Vec<Option<anyhow::Error>>, take: impl Fn(Answer) -> Option<T>) -> Vec<Result<T>> {
        let start = Instant::now();
        let mut answers: Vec<Option<Result<T>>> = told.into_iter().map(|failed| failed.map(Err)).collect();
        loop {
            let late = |rank: usize| answers.iter().flatten().any(|a| a.as_ref().err().and_then(late_rank) == Some(rank));
            let pending: Vec<usize> = (0..answers.len()).filter(|&rank| answers[rank].is_none() && !late(rank)).collect();
            if pending.is_empty() {
                break;
            }
            let mut select = Select::new();
            for &rank in &pending {
                select.recv(&self.members[rank].answers);
            }
            let patience = self.members[pending[0]].patience.saturating_sub(start.elapsed());
            let Ok(ready) = select.ready_timeout(patience) else { break };
            let (rank, member) = (pending[ready], &mut self.members[pending[ready]]);
            answers[rank] = Some(match member.answers.try_recv() {
                Ok(Ok(answer)) => take(answer).with_context(|| format!("{} answered out of order", member.name)),
                Ok(Err(e)) => Err(e.context(format!("device {}", member.name))),
                Err(crossbeam::channel::TryRecvError::Empty) => continue,
                Err(crossbeam::channel::TryRecvError::Disconnected) => Err(member.gone()),
            });
        }
        let late: Vec<usize> = answers.iter().flatten().filter_map(|a| late_rank(a.as_ref().err()?)).collect();
        let deadline = self.safety.deadline;
        let unanswered = |rank: usize, member: &Member| match late.contains(&rank) {
            true => member.is_stuck(deadline),
            false => member.is_stuck(member.patience),
        };
        let answers = answers.into_iter().zip(&self.members).enumerate();
        answers.map(|(rank, (answer, member))| answer.unwrap_or_else(|| Err(unanswered(rank, member)))).collect()
    }

    /// What the answers to a step come to.
    fn decide<T>(&self, answers: &[Result<T>], told: impl Fn(&T) -> (u64, bool)) -> Option<Decision> {
        let generation = self.membership.generation();
        let mut commit = StepCommit::new(self.world(), generation);
        for (rank, answer) in answers.iter().enumerate() {
            let (of, report) = match answer {
                Ok(answer) => {
                    let (of, well) = told(answer);
                    (of, if well { Report::Well } else { Report::NonFinite })
                }
                Err(e) => (generation, report_of(e)),
            };
            commit.report(rank, of, report);
        }
        commit.decision()
    }

    /// All answers; where one is missing, why, after the ring was formed anew if that is survived.
    fn all_of<T>(&mut self, answers: Vec<Result<T>>) -> Result<Vec<T>> {
        if answers.iter().all(Result::is_ok) { answers.into_iter().collect() } else { Err(self.recovered(answers)) }
    }

    /// The error that is the cause of the others.
    fn first_of(&self, failures: Vec<Option<anyhow::Error>>) -> Result<()> {
        let mut errors: Vec<anyhow::Error> = failures.into_iter().flatten().collect();
        // When one rank fails, the others miss it in the ring; the cause is the error that is not about a peer.
        let cause = errors.iter().position(|e| peer_error(e).is_none()).unwrap_or(0);
        if errors.is_empty() { Ok(()) } else { Err(errors.swap_remove(cause)) }
    }

    /// Forms the ring anew after these answers, and says so; or says what cannot be survived.
    fn recovered<T>(&mut self, answers: Vec<Result<T>>) -> anyhow::Error {
        let decision = self.decide(&answers, |_| (self.membership.generation(), true));
        let failures: Vec<Option<anyhow::Error>> = answers.into_iter().map(Result::err).collect();
        let is_fatal = |e: &anyhow::Error| e.chain().any(|cause| cause.is::<UsageError>()) || e.is::<NonFinite>();
        let (lost, cramped) = match decision {
            Some(Decision::Repeat { lost, cramped }) => (lost, cramped),
            _ => (Vec::new(), Vec::new()),
        };
        let hopeless = lost.len() == self.world() || (lost.is_empty() && cramped.is_empty());
        // A smaller share is no loss.
        if (!self.safety.survives && !lost.is_empty()) || hopeless || failures.iter().flatten().any(is_fatal) {
            return match self.first_of(failures) {
                Err(e) if lost.len() == self.world() && self.safety.survives => e.context("no device is left"),
                Err(e) => e,
                Ok(()) => anyhow!("a step was neither done nor refused"),
            };
        }
        let why = |rank: usize| match (&failures[rank], self.accusation(&failures, rank)) {
            (Some(e), None) => format!("{e:#}"),
            (_, accusation) => format!("{}; it was {}", accusation.unwrap_or_default(), self.members[rank].whereabouts.get()),
        };
        let loss = |rank: usize| Loss {
            rank,
            seat: self.membership.seat(rank).unwrap_or(rank),
            name: self.members[rank].name.clone(),
            why: why(rank),
        };
        let losses = lost.into_iter().map(loss).collect();
        let cramped = cramped.into_iter().map(|rank| {
            let n_rows = failures[rank].as_ref().and_then(|e| e.downcast_ref::<NoRoom>()).map_or(0, |room| room.n_rows);
            Cramped { rank, name: self.members[rank].name.clone(), n_rows, why: why(rank) }
        });
        let cramped = cramped.collect();
        match self.regroup(losses, cramped) {
            Ok(regrouped) => regrouped.into(),
            Err(e) => e,
        }
    }

    /// What another rank says of one that was late.
    fn accusation(&self, failures: &[Option<anyhow::Error>], rank: usize) -> Option<String> {
        let found = failures.iter().flatten().find(|e| late_rank(e) == Some(rank))?;
        match peer_error(found)? {
            CommError::Timeout { what, after, .. } => {
                Some(format!("the others waited for it for more than {} s in the {what}", after.as_secs_f64()))
            }
            _ => None,
        }
    }

    /// Takes the lost out and puts the others in a ring of their own. More may be lost meanwhile.
    fn regroup(&mut self, mut lost: Vec<Loss>, mut cramped: Vec<Cramped>) -> Result<Regrouped> {
        let mut states = None;
        let mut leaving: Vec<usize> = lost.iter().map(|loss| loss.rank).collect();
        // By present rank: the rank before all this, in which losses are told.
        let mut before: Vec<usize> = (0..self.world()).collect();
        loop {
            // Where losses end the run, nobody holds copies.
            ensure!(self.safety.survives || lost.is_empty(), "{}", Regrouped { lost, cramped });
            if self.update == Update::ByOwner && self.world() > 1 && states.is_none() && !leaving.is_empty() {
                // Segments of the optimizer's state lie with their owners: they are put together before anybody moves.
                states = Some(Arc::new(self.states_without(&mut lost)?));
                leaving = lost.iter().map(|loss| loss.rank).collect();
            }
            self.dismiss(&leaving);
            let n_before = before.len();
            let stays = |at: &usize| !leaving.contains(at);
            before = (0..n_before).filter(stays).map(|at| before[at]).collect();
            ensure!(!self.members.is_empty(), "no device is left: {}", Regrouped { lost, cramped });
            let failures = self.join_all(None, states.as_ref())?;
            let failed = failures.into_iter().enumerate().filter_map(|(rank, failure)| Some((rank, failure?)));
            leaving = Vec::new();
            for (rank, failure) in failed {
                let (seat, name) = (self.membership.seat(rank).unwrap_or(rank), self.members[rank].name.clone());
                lost.push(Loss { rank: before[rank], seat, name, why: format!("{failure:#}") });
                leaving.push(rank);
            }
            if leaving.is_empty() {
                break;
            }
        }
        lost.sort_by_key(|loss| loss.rank);
        cramped.retain(|c| before.contains(&c.rank));
        cramped.iter_mut().for_each(|c| c.rank = before.iter().position(|&rank| rank == c.rank).unwrap_or(c.rank));
        Ok(Regrouped { lost, cramped })
    }

    /// Ends the membership of these ranks; those of them that still do something find nobody when they are done, and leave.
    fn dismiss(&mut self, ranks: &[usize]) {
        self.membership.lose(ranks);
        let mut rank = 0;
        self.members.retain(|_| {
            rank += 1;
            !ranks.contains(&(rank - 1))
        });
    }

    /// The optimizer's state without the lost ranks, whose segments have copies; others may be lost meanwhile.
    fn states_without(&mut self, lost: &mut Vec<Loss>) -> Result<Vec<Tensors>> {
        let mut of_ranks: Vec<Option<Vec<Tensors>>> = vec![None; self.world()];
        loop {
            let gone: Vec<usize> = lost.iter().map(|loss| loss.rank).collect();
            let holders = holders(self.world(), &gone).map_err(|rank| {
                let lost = Regrouped { lost: lost.clone(), cramped: Vec::new() };
                anyhow!(
                    "the optimizer's state of rank {rank} was lost together with its copy: {lost}; go on from the last checkpoint with --resume"
                )
            })?;
            let missing = (0..self.world()).find(|&rank| of_ranks[rank].is_none() && holders.contains(&rank));
            let Some(rank) = missing else {
                let of_holders = |state: usize| {
                    let tensors = holders.iter().map(|&holder| of_ranks[holder].as_ref().map_or_else(Tensors::new, |s| s[state].clone()));
                    self.joined(tensors.collect())
                };
                return (0..self.spec.optimizer.states().len()).map(of_holders).collect();
            };
            let answer = self.ask_only(rank, Command::ReadStates, |answer| match answer {
                Answer::States(states) => Some(states),
                _ => None,
            });
            match answer {
                Ok(states) => of_ranks[rank] = Some(states),
                Err(e) => {
                    let (seat, name) = (self.membership.seat(rank).unwrap_or(rank), self.members[rank].name.clone());
                    lost.push(Loss { rank, seat, name, why: format!("{e:#}") });
                }
            }
        }
    }

    /// The devices that are not in the ring, by their places in the list that the run began with.
    pub fn absent(&self) -> Vec<(usize, &str)> {
        self.membership.absent().map(|seat| (seat, self.devices[seat].spec.as_str())).collect()
    }

    /// Takes a device that was lost back in, with the parameters and the optimizer's state that all have; its rank.
    ///
    /// # Errors
    /// It cannot be opened, or does not take its place, and the ring is as it was; or another rank's, as of a step.
    pub fn readmit(&mut self, seat: usize, params: &Arc<Tensors>, states: &Arc<Vec<Tensors>>) -> Result<usize> {
        ensure!(self.membership.absent().any(|absent| absent == seat), "device {seat} is in the ring");
        // A driver that hangs may not keep those waiting who are there.
        let member = self.open(seat, self.safety.deadline.min(MOST_FOR_RETURN))?;
        let rank = self.membership.admit(seat);
        self.members.insert(rank, member);
        let failures = self.join_all(Some(params), Some(states))?;
        if failures.iter().all(Option::is_none) {
            return Ok(rank);
        }
        // Links are made anew without whoever did not come.
        let answers = failures.into_iter().map(|failure| failure.map_or(Ok(()), Err)).collect();
        let error = self.recovered::<()>(answers);
        let Some(regrouped) = error.downcast_ref::<Regrouped>() else { return Err(error) };
        // Of the newcomer nobody has heard yet.
        let (newcomers, mut lost): (Vec<Loss>, Vec<Loss>) = regrouped.lost.iter().cloned().partition(|loss| loss.rank == rank);
        lost.iter_mut().filter(|loss| loss.rank > rank).for_each(|loss| loss.rank -= 1);
        if lost.is_empty() {
            let why = newcomers.into_iter().map(|loss| loss.why).collect::<Vec<_>>().join("; ");
            bail!("device {} did not come back: {why}", self.devices[seat].spec);
        }
        Err(Regrouped { lost, cramped: Vec::new() }.into())
    }

    /// The parameters of one rank.
    ///
    /// # Errors
    /// The worker's.
    pub fn params_of(&mut self, rank: usize) -> Result<Tensors> {
        self.ask(rank, Command::ReadParams, |answer| match answer {
            Answer::Params(params) => Some(params),
            _ => None,
        })
    }

    /// The gates of one rank over the last batch that it evaluated; none where it has trained since, or had no rows.
    ///
    /// # Errors
    /// The worker's.
    pub fn gates_of(&mut self, rank: usize) -> Result<Gates> {
        self.ask(rank, Command::ReadGates, |answer| match answer {
            Answer::Gates(gates) => Some(gates),
            _ => None,
        })
    }

    /// The optimizer's state, put together from the owners of its segments where owners update.
    ///
    /// # Errors
    /// A worker's.
    pub fn states(&mut self) -> Result<Vec<Tensors>> {
        let n_ranks = if self.update == Update::ByOwner { self.world() } else { 1 };
        let mut of_ranks = Vec::with_capacity(n_ranks);
        for rank in 0..n_ranks {
            of_ranks.push(self.ask(rank, Command::ReadStates, |answer| match answer {
                Answer::States(states) => Some(states),
                _ => None,
            })?);
        }
        let n_states = of_ranks.first().map_or(0, Vec::len);
        (0..n_states).map(|state| self.joined(of_ranks.iter_mut().map(|states| std::mem::take(&mut states[state])).collect())).collect()
    }

    /// What each rank holds for gradients that are made smaller.
    ///
    /// # Errors
    /// A worker's.
    pub fn held(&mut self) -> Result<Vec<Vec<Held>>> {
        let take = |answer| match answer {
            Answer::Held(held) => Some(held),
            _ => None,
        };
        (0..self.world()).map(|rank| self.ask(rank, Command::ReadHeld, take)).collect()
    }

    /// Lets each rank hold these pieces; a rank without any begins with nothing.
    ///
    /// # Errors
    /// A worker's.
    pub fn hold(&mut self, of_ranks: &[Vec<Held>]) -> Result<()> {
        let told = self.tell_all(|rank| Command::Hold(of_ranks.get(rank).cloned().unwrap_or_default()));
        let answers = self.collect(told, |answer| matches!(answer, Answer::Loaded).then_some(()));
        self.all_of(answers).map(drop)
    }

    /// Compares the replicas' parameters.
    ///
    /// # Errors
    /// Names the step, the ranks and their hashes where they differ.
    pub fn compare_replicas(&mut self, step: u64) -> Result<()> {
        let hashes = (0..self.world()).map(|rank| self.params_of(rank).map(|p| hash(&p))).collect::<Result<Vec<_>>>()?;
        let Some(odd) = hashes.iter().position(|h| *h != hashes[0]) else { return Ok(()) };
        bail!(
            "replicas differ after step {step}: rank {odd} ({}) has parameters {}, rank 0 ({}) {}; the last checkpoint is good, and this is worth a bug report",
            self.members[odd].name,
            hashes[odd],
            self.members[0].name,
            hashes[0]
        )
    }

    pub fn spec(&self) -> &GroupSpec {
        &self.spec
    }
}

/// The first 16 hexadecimal digits of the SHA-256 of parameters in PyTorch's order.
pub fn hash(tensors: &Tensors) -> String {
    let mut hasher = Sha256::new();
    tensors.iter().for_each(|t| hasher.update(bytemuck::cast_slice::<f32, u8>(t)));
    hasher.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect()
}

pub(super) fn open_device(kind: &DeviceKind) -> Result<Box<dyn Backend>> {
    match *kind {
        DeviceKind::Cpu { threads } => open::cpu(threads),
        DeviceKind::Gpu { index } => open::gpu(index),
    }
}

/// What a rank's error says of its part of a step.
fn report_of(error: &anyhow::Error) -> Report {
    if error.downcast_ref::<NoRoom>().is_some() {
        return Report::NoMemory;
    }
    match peer_error(error) {
        Some(CommError::Timeout { waiting_for, .. }) => Report::Missed { late: Some(*waiting_for) },
        Some(_) => Report::Missed { late: None },
        None => Report::Lost,
    }
}

/// The rank that was not there in time, where that is the error.
fn late_rank(error: &anyhow::Error) -> Option<usize> {
    match report_of(error) {
        Report::Missed { late } => late,
        _ => None,
    }
}

impl Member {
    fn tell(&mut self, command: Command) -> Result<()> {
        use crossbeam::channel::SendTimeoutError::{Disconnected, Timeout};
        match self.commands.as_ref().map(|commands| commands.send_timeout(command, self.patience)) {
            Some(Ok(())) => Ok(()),
            Some(Err(Timeout(_))) => Err(self.is_stuck(self.patience)),
            Some(Err(Disconnected(_))) | None => Err(self.gone()),
        }
    }

    fn answer(&mut self) -> Result<Answer> {
        use crossbeam::channel::RecvTimeoutError::{Disconnected, Timeout};
        match self.answers.recv_timeout(self.patience) {
            Ok(answer) => answer.with_context(|| format!("device {}", self.name)),
            Err(Timeout) => Err(self.is_stuck(self.patience)),
            Err(Disconnected) => Err(self.gone()),
        }
    }

    fn is_stuck(&self, waited: Duration) -> anyhow::Error {
        anyhow!("device {} has not answered for {} s; it was {}", self.name, waited.as_secs_f64(), self.whereabouts.get())
    }

    /// Why a worker is no more.
    fn gone(&mut self) -> anyhow::Error {
        // An error that it told before it ended comes first.
        if let Ok(Err(e)) = self.answers.try_recv() {
            return e.context(format!("device {}", self.name));
        }
        self.commands = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(panic)) => {
                let what = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
                anyhow!("the worker of device {} panicked: {}", self.name, what.unwrap_or_default())
            }
            _ => anyhow!("the worker of device {} has ended", self.name),
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for member in &mut self.members {
            member.commands = None;
        }
        for member in &mut self.members {
            // Its end of the channel goes with its thread; whoever is stuck is not waited for.
            let ends = loop {
                match member.answers.recv_timeout(member.patience.min(MOST_FOR_END)) {
                    Ok(_) => {}
                    Err(e) => break e == crossbeam::channel::RecvTimeoutError::Disconnected,
                }
            };
            if let Some(thread) = member.thread.take().filter(|_| ends) {
                // A panic there was told as an error when it mattered.
                let _ = thread.join();
            }
        }
    }
}
