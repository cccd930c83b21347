//! All workers of a run, as the coordinator sees them: a step goes to every rank, and happens on all or on none.

use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use crossbeam::channel::{Receiver, Sender, bounded};
use sha2::{Digest, Sha256};

use super::commit::{Decision, StepCommit};
use super::devices::{DeviceKind, Resolved};
use super::ring::{Ring, Update};
use super::worker::{Answer, Command, EvaluateAnswer, EvaluateWork, Gates, StepAnswer, StepWork, WorkerSpec, serve};
use crate::backend::{Backend, DeviceInfo, open};
use crate::comm;
use crate::comm::plan::owned_segment;
use crate::data::Batch;
use crate::infer::session::DEADLINE;
use crate::model::config::ModelConfig;
use crate::model::state::Carried;
use crate::optim::OptimizerConfig;
use crate::params::ParamTable;
use crate::rng::StepKey;

/// What all replicas have in common.
#[derive(Clone, Debug)]
pub struct GroupSpec {
    pub model: ModelConfig,
    pub optimizer: OptimizerConfig,
    pub accumulate: usize,
}

/// Replaces a rank's backend, for tests of what happens when one goes wrong.
pub type Wrap = Arc<dyn Fn(usize, Box<dyn Backend>) -> Box<dyn Backend> + Send + Sync>;

struct Member {
    name: String,
    info: DeviceInfo,
    commands: Option<Sender<Command>>,
    answers: Receiver<Result<Answer>>,
    thread: Option<JoinHandle<()>>,
}

/// Workers, one a device, in the order in which they stand in the ring.
pub struct Group {
    spec: GroupSpec,
    table: ParamTable,
    members: Vec<Member>,
    update: Update,
    /// The next step hands its gradients out.
    wants_gradients: bool,
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
    pub waited: Duration,
    pub ring_time: Duration,
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
        ensure!(!devices.is_empty(), "a run needs at least one device");
        let world = devices.len();
        let mut seats = Vec::with_capacity(world);
        let mut members = Vec::with_capacity(world);
        // A backend lives in its thread. What kinds there are decides who updates, so each thread first tells its own and then waits for its seat.
        for (rank, device) in devices.iter().enumerate() {
            let (commands, inbox) = bounded::<Command>(2);
            let (outbox, answers) = bounded::<Result<Answer>>(2);
            let (seat, seated) = bounded::<(Option<Ring>, Update)>(1);
            let (kind, wrap, group) = (device.kind, wrap.cloned(), spec.clone());
            let body = move || {
                let backend = match open_device(&kind) {
                    Ok(backend) => match wrap {
                        Some(wrap) => wrap(rank, backend),
                        None => backend,
                    },
                    Err(e) => {
                        let _ = outbox.send(Err(e));
                        return;
                    }
                };
                if outbox.send(Ok(Answer::Open(backend.info().clone()))).is_err() {
                    return;
                }
                let Ok((ring, update)) = seated.recv() else { return };
                let GroupSpec { model, optimizer, accumulate } = group;
                let spec = WorkerSpec { model, optimizer, update, rank, world, accumulate, deadline: DEADLINE };
                serve(spec, backend, ring, &inbox, &outbox);
            };
            let thread = std::thread::Builder::new().name(format!("carrousel-{}", device.spec)).spawn(body);
            let thread = thread.with_context(|| format!("cannot start the thread of {}", device.spec))?;
            let mut member =
                Member { name: device.spec.clone(), info: DeviceInfo::default(), commands: Some(commands), answers, thread: Some(thread) };
            let Answer::Open(info) = member.answer()? else { bail!("{} answered out of order", member.name) };
            member.info = info;
            members.push(member);
            seats.push(seat);
        }
        let alike = members.windows(2).all(|w| w[0].info.kind == w[1].info.kind);
        let update = if alike { Update::Everywhere } else { Update::ByOwner };
        let table = spec.model.table();
        let communicators = comm::group(world, comm::Options { deadline: DEADLINE, ..comm::Options::default() });
        for ((seat, communicator), member) in seats.into_iter().zip(communicators).zip(&mut members) {
            let ring = (world > 1).then(|| Ring::start(communicator, update, table.buckets().len(), DEADLINE)).transpose()?;
            seat.send((ring, update)).map_err(|_| anyhow!("{} ended before it began", member.name))?;
        }
        for member in &mut members {
            let Answer::Ready = member.answer()? else { bail!("{} answered out of order", member.name) };
        }
        Ok(Self { spec, table, members, update, wants_gradients: false })
    }

    pub fn world(&self) -> usize {
        self.members.len()
    }

    /// The devices, by rank.
    pub fn devices(&self) -> impl Iterator<Item = (&str, &DeviceInfo)> {
        self.members.iter().map(|m| (m.name.as_str(), &m.info))
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
        for member in &mut self.members {
            member.tell(Command::Load { params: Arc::clone(&params), states: Arc::clone(&states) })?;
        }
        self.members.iter_mut().try_for_each(|m| match m.answer()? {
            Answer::Loaded => Ok(()),
            _ => bail!("{} answered out of order", m.name),
        })
    }

    /// Trains these tensors of the table no more, on any rank.
    ///
    /// # Errors
    /// A worker's.
    pub fn freeze(&mut self, tensors: Vec<usize>) -> Result<()> {
        let tensors = Arc::new(tensors);
        for member in &mut self.members {
            member.tell(Command::Freeze(Arc::clone(&tensors)))?;
        }
        self.gather(|answer| matches!(answer, Answer::Loaded).then_some(())).map(drop)
    }

    /// Lets every rank take the memory that training on `n_steps` of its share needs, so that what does not fit is found before anything begins.
    ///
    /// # Errors
    /// A worker's, which names the device.
    pub fn reserve(&mut self, n_steps: usize, shares: &[Range<usize>]) -> Result<()> {
        for (member, rows) in self.members.iter_mut().zip(shares) {
            member.tell(Command::Reserve { n_steps, n_rows: rows.len() })?;
        }
        self.gather(|answer| matches!(answer, Answer::Reserved).then_some(())).map(drop)
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
        let scale = (1.0 / numbers.divisor) as f32;
        let generation = 0;
        // Owners have sums of their own segments only, others all of them.
        let wants_gradients = std::mem::take(&mut self.wants_gradients);
        let n_askable = if self.update == Update::ByOwner { self.world() } else { 1 };
        for (rank, (member, rows)) in self.members.iter_mut().zip(shares).enumerate() {
            member.tell(Command::Step(StepWork {
                batch: Arc::clone(batch),
                rows: rows.clone(),
                // Where the text begins, the model has its own initial state.
                state: carried.as_ref().filter(|_| !batch.resets).map(|c| c.rows(rows.clone())),
                wants_state: carried.is_some(),
                wants_gradients: wants_gradients && rank < n_askable,
                scale,
                key: numbers.key,
                step: numbers.step,
                lr: numbers.lr,
            }))?;
        }
        let mut commit = StepCommit::new(self.world(), generation);
        let mut answers = self.gather(|answer| match answer {
            Answer::Step(step) => Some(step),
            _ => None,
        })?;
        for (rank, answer) in answers.iter().enumerate() {
            commit.report(rank, generation, !answer.non_finite);
        }
        let decision = commit.decision().unwrap_or(Decision::Abort);
        for member in &mut self.members {
            member.tell(if decision == Decision::Commit { Command::Commit } else { Command::Abort })?;
        }
        if decision == Decision::Abort {
            return Err(self.non_finite(numbers.step, &answers).into());
        }
        if let Some(carried) = carried {
            for (rows, answer) in shares.iter().zip(&answers).filter(|(rows, _)| !rows.is_empty()) {
                carried.put(rows.clone(), &answer.state);
            }
        }
        let ranks: Vec<RankStep> = answers
            .iter()
            .map(|a| RankStep { loss: a.loss, compute: a.compute, waited: a.waited, ring_time: a.ring_time, bytes_sent: a.bytes_sent })
            .collect();
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
        for (member, rows) in self.members.iter_mut().zip(shares) {
            member.tell(Command::Evaluate(EvaluateWork {
                batch: Arc::clone(batch),
                rows: rows.clone(),
                // Where the text begins, the model has its own initial state.
                state: carried.as_ref().filter(|_| !batch.resets).map(|c| c.rows(rows.clone())),
                wants_state: carried.is_some(),
                wants_outputs,
            }))?;
        }
        let answers: Vec<EvaluateAnswer> = self.gather(|answer| match answer {
            Answer::Evaluated(answer) => Some(answer),
            _ => None,
        })?;
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

    /// One answer of each rank, in rank order.
    fn gather<T>(&mut self, take: impl Fn(Answer) -> Option<T>) -> Result<Vec<T>> {
        let mut gathered = Vec::with_capacity(self.members.len());
        let mut errors: Vec<anyhow::Error> = Vec::new();
        for member in &mut self.members {
            match member.answer().and_then(|answer| take(answer).with_context(|| format!("{} answered out of order", member.name))) {
                Ok(value) => gathered.push(value),
                Err(e) => errors.push(e),
            }
        }
        // When one rank fails, the others miss it in the ring; the cause is the error that is not about a peer.
        let about_peer = |e: &anyhow::Error| e.chain().any(|c| c.is::<comm::CommError>());
        if errors.is_empty() {
            return Ok(gathered);
        }
        let cause = errors.iter().position(|e| !about_peer(e)).unwrap_or(0);
        Err(errors.swap_remove(cause))
    }

    /// The parameters of one rank.
    ///
    /// # Errors
    /// The worker's.
    pub fn params_of(&mut self, rank: usize) -> Result<Tensors> {
        let member = &mut self.members[rank];
        member.tell(Command::ReadParams)?;
        match member.answer()? {
            Answer::Params(params) => Ok(params),
            _ => bail!("{} answered out of order", member.name),
        }
    }

    /// The gates of one rank over the last batch that it evaluated; none where it has trained since, or had no rows.
    ///
    /// # Errors
    /// The worker's.
    pub fn gates_of(&mut self, rank: usize) -> Result<Gates> {
        let member = &mut self.members[rank];
        member.tell(Command::ReadGates)?;
        match member.answer()? {
            Answer::Gates(gates) => Ok(gates),
            _ => bail!("{} answered out of order", member.name),
        }
    }

    /// The optimizer's state, put together from the owners of its segments where owners update.
    ///
    /// # Errors
    /// A worker's.
    pub fn states(&mut self) -> Result<Vec<Tensors>> {
        let n_ranks = if self.update == Update::ByOwner { self.world() } else { 1 };
        for member in &mut self.members[..n_ranks] {
            member.tell(Command::ReadStates)?;
        }
        let mut of_ranks = Vec::with_capacity(n_ranks);
        for member in &mut self.members[..n_ranks] {
            match member.answer()? {
                Answer::States(states) => of_ranks.push(states),
                _ => bail!("{} answered out of order", member.name),
            }
        }
        let n_states = of_ranks.first().map_or(0, Vec::len);
        (0..n_states).map(|state| self.joined(of_ranks.iter_mut().map(|states| std::mem::take(&mut states[state])).collect())).collect()
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

fn open_device(kind: &DeviceKind) -> Result<Box<dyn Backend>> {
    match *kind {
        DeviceKind::Cpu { threads } => open::cpu(threads),
        DeviceKind::Gpu { index } => open::gpu(index),
    }
}

impl Member {
    fn tell(&mut self, command: Command) -> Result<()> {
        let told = self.commands.as_ref().is_some_and(|c| c.send_timeout(command, DEADLINE).is_ok());
        if told { Ok(()) } else { Err(self.gone()) }
    }

    fn answer(&mut self) -> Result<Answer> {
        use crossbeam::channel::RecvTimeoutError::{Disconnected, Timeout};
        // The ring's own deadline is as long, and its error tells more: it goes first.
        match self.answers.recv_timeout(DEADLINE + Duration::from_secs(30)) {
            Ok(answer) => answer.with_context(|| format!("device {}", self.name)),
            Err(Timeout) => bail!("device {} has not answered for {} s", self.name, DEADLINE.as_secs() + 30),
            Err(Disconnected) => Err(self.gone()),
        }
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
            if let Some(thread) = member.thread.take() {
                // A panic there was told as an error when it mattered.
                let _ = thread.join();
            }
        }
    }
}
