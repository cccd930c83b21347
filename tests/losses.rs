//! Devices that fail, are stuck, slow or too small: what is played, at which call, and what becomes of the run.

use std::collections::BTreeSet;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use carrousel::backend::around::Around;
use carrousel::backend::gpu::GpuBackend;
use carrousel::backend::{Backend, BufferId, DeviceInfo, Limits, Readback, Span};
use carrousel::comm::{Operation, Tap};
use carrousel::compress::Method;
use carrousel::data::{Batch, Input};
use carrousel::kernels::Kernel;
use carrousel::model::config::{self, ModelConfig};
use carrousel::model::init::{Init, initial};
use carrousel::model::state::Carried;
use carrousel::observe::Event;
use carrousel::optim::{OptimizerConfig, Rule};
use carrousel::rng::StepKey;
use carrousel::store::config::{OnDeviceLoss, RunConfig, Task};
use carrousel::train::RunOptions;
use carrousel::train::balance::Balance;
use carrousel::train::devices::{DeviceKind, Resolved};
use carrousel::train::group::{Group, GroupSpec, Loss, Regrouped, Safety, StepNumbers, Tensors, Wrap};
use carrousel::train::memory::most_rows;
use carrousel::train::profile::Workload;
use carrousel::train::ring::Update;
use carrousel::train::worker::WorkerSpec;

use crate::adapters;
use crate::runs::{Ran, config, text, train, train_with};

const WORLD: usize = 3;
/// Every place of a batch has a token of its own, so that what was uploaded tells which samples they were.
const T: usize = 3;
const ROWS: usize = 6;
const N_STEPS: u64 = 4;
/// Far above what anything takes here; the faults that need no deadline must not wait for one.
const PATIENT: Duration = Duration::from_secs(100);

fn workload() -> Workload {
    let model = ModelConfig {
        input: config::Input::Tokens { vocabulary: T * ROWS, width: 8 },
        output: config::Output::Classes { n_classes: T * ROWS },
        n_layers: 1,
        hidden: 16.into(),
        dropout: 0.0,
        bias: true,
        tied: false,
        lstm: Default::default(),
    };
    // With momentum, so that there is state to be lost.
    let optimizer = OptimizerConfig {
        rule: Rule::Sgd,
        lr: 0.5,
        momentum: 0.9,
        nesterov: false,
        weight_decay: 0.0,
        l1: 0.0,
        clip_norm: 1.0,
        clip_value: 0.0,
    };
    Workload { model, optimizer, n_steps: T, n_rows: ROWS, carries: true, layer_alone: false }
}

fn batch(workload: &Workload, step: u64) -> Arc<Batch> {
    let mut batch = workload.batch(step);
    let n = (T * ROWS) as u32;
    batch.input = Input::Tokens((0..n).map(|place| (place * 5 + step as u32) % n).collect());
    Arc::new(batch)
}

fn devices(world: usize) -> Vec<Resolved> {
    vec![Resolved { spec: "cpu:1".into(), kind: DeviceKind::Cpu { threads: 1 } }; world]
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Error,
    Panic,
    /// Until the play is over.
    Hang,
}

/// What is played: at a call of one device in one step, something happens. A call is one of the backend's or of a readback's waits, or a message.
struct Stage {
    seat: usize,
    /// The calls are messages, not the backend's.
    of_ring: bool,
    how: How,
    at: u64,
    is_armed: AtomicBool,
    n_calls: AtomicU64,
    has_fired: AtomicBool,
    /// Its actors note what they upload.
    is_cast: AtomicBool,
    /// By seat: the tokens last uploaded.
    uploads: Mutex<Vec<Vec<u32>>>,
    /// Held open while the play lasts.
    gate: crossbeam::channel::Receiver<()>,
    opener: Mutex<Option<crossbeam::channel::Sender<()>>>,
}

impl Stage {
    fn new(seat: usize, how: How, at: u64) -> Arc<Self> {
        Self::of(seat, how, at, false)
    }

    fn of(seat: usize, how: How, at: u64, of_ring: bool) -> Arc<Self> {
        let (opener, gate) = crossbeam::channel::bounded(0);
        Arc::new(Self {
            seat,
            of_ring,
            how,
            at,
            is_armed: AtomicBool::new(false),
            n_calls: AtomicU64::new(0),
            has_fired: AtomicBool::new(false),
            is_cast: AtomicBool::new(false),
            uploads: Mutex::new(vec![Vec::new(); WORLD]),
            gate,
            opener: Mutex::new(Some(opener)),
        })
    }

    fn open(&self) {
        *self.opener.lock().unwrap() = None;
    }

    fn call(&self, seat: usize) -> Result<()> {
        if self.of_ring { Ok(()) } else { self.meet(seat) }
    }

    fn meet(&self, seat: usize) -> Result<()> {
        if seat != self.seat || !self.is_armed.load(Ordering::SeqCst) || self.n_calls.fetch_add(1, Ordering::SeqCst) != self.at {
            return Ok(());
        }
        self.has_fired.store(true, Ordering::SeqCst);
        match self.how {
            How::Error => bail!("a planted fault"),
            // Not a panic's message on the screen, but its unwinding.
            How::Panic => resume_unwind(Box::new("a planted panic")),
            How::Hang => {
                let _ = self.gate.recv();
                Ok(())
            }
        }
    }
}

/// A backend on the stage.
struct Actor {
    inner: Box<dyn Backend>,
    info: DeviceInfo,
    seat: usize,
    stage: Arc<Stage>,
    tokens: BTreeSet<u32>,
    /// Told of each launch before it is made.
    before: Option<Before>,
}

type Before = Arc<dyn Fn(usize, &'static str) + Send + Sync>;

struct Line {
    inner: Box<dyn Readback>,
    seat: usize,
    stage: Arc<Stage>,
}

impl Readback for Line {
    fn wait(self: Box<Self>, deadline: Duration) -> Result<Vec<f32>> {
        self.stage.call(self.seat)?;
        self.inner.wait(deadline)
    }
}

impl Around for Actor {
    fn inner(&self) -> &dyn Backend {
        self.inner.as_ref()
    }
    fn inner_mut(&mut self) -> &mut dyn Backend {
        self.inner.as_mut()
    }
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn alloc(&mut self, label: &str, len: usize) -> Result<BufferId> {
        let buffer = self.inner.alloc(label, len)?;
        if label == "tokens" {
            self.tokens.insert(buffer.0);
        }
        Ok(buffer)
    }
    fn write(&mut self, to: Span, words: &[f32]) -> Result<()> {
        self.stage.call(self.seat)?;
        if self.tokens.contains(&to.buffer.0) {
            self.stage.uploads.lock().unwrap()[self.seat] = words.iter().map(|word| word.to_bits()).collect();
        }
        self.inner.write(to, words)
    }
    fn copy(&mut self, from: Span, to: Span) -> Result<()> {
        self.stage.call(self.seat)?;
        self.inner.copy(from, to)
    }
    fn clear(&mut self, span: Span) -> Result<()> {
        self.stage.call(self.seat)?;
        self.inner.clear(span)
    }
    fn launch(&mut self, kernel: &dyn Kernel, operands: &[Span]) -> Result<()> {
        self.stage.call(self.seat)?;
        if let Some(before) = &self.before {
            before(self.seat, kernel.name());
        }
        self.inner.launch(kernel, operands)
    }
    fn read(&mut self, spans: &[Span], memory: Vec<f32>) -> Result<Box<dyn Readback>> {
        self.stage.call(self.seat)?;
        let inner = self.inner.read(spans, memory)?;
        Ok(Box::new(Line { inner, seat: self.seat, stage: Arc::clone(&self.stage) }))
    }
    fn submit(&mut self) -> Result<()> {
        self.stage.call(self.seat)?;
        self.inner.submit()
    }
    fn wait(&mut self, deadline: Duration) -> Result<()> {
        self.stage.call(self.seat)?;
        self.inner.wait(deadline)
    }
}

/// Devices on the stage, of one kind or each of its own.
fn actors(stage: &Arc<Stage>, alike: bool) -> Wrap {
    stage.is_cast.store(true, Ordering::SeqCst);
    let stage = Arc::clone(stage);
    Arc::new(move |seat, inner: Box<dyn Backend>| {
        let mut info = inner.info().clone();
        if !alike {
            info.kind = format!("kind {seat}");
        }
        Box::new(Actor { inner, info, seat, stage: Arc::clone(&stage), tokens: BTreeSet::new(), before: None })
    })
}

/// How a few steps went.
struct Told {
    losses: Vec<f64>,
    params: Tensors,
    states: Vec<Tensors>,
    carried: Vec<f32>,
    lost: Vec<Loss>,
    /// Ranks at the end.
    world: usize,
}

/// Asks a group until nobody is lost meanwhile.
fn ask<T>(
    group: &mut Group,
    balance: &mut Balance,
    lost: &mut Vec<Loss>,
    mut of: impl FnMut(&mut Group, &Balance) -> Result<T>,
) -> Result<T> {
    loop {
        let regrouped: Regrouped = match of(group, balance) {
            Ok(done) => return Ok(done),
            Err(error) => error.downcast()?,
        };
        balance.remove(&regrouped.lost.iter().map(|loss| loss.rank).collect::<Vec<_>>());
        lost.extend(regrouped.lost);
    }
}

fn started(workload: &Workload, world: usize, safety: Safety, wrap: Option<&Wrap>) -> Group {
    let spec = GroupSpec {
        model: workload.model.clone(),
        optimizer: workload.optimizer,
        accumulate: 1,
        compress: Method::None,
        shard_optimizer: false,
    };
    let mut group = Group::start_safe(spec, &devices(world), safety, wrap).unwrap();
    let params = initial(&workload.model, group.table(), Init::Uniform(0.5), None, 3);
    let zeros: Tensors = params.iter().map(|values| vec![0.0; values.len()]).collect();
    group.load(params, vec![zeros; workload.optimizer.states().len()]).unwrap();
    group
}

fn numbers(step: u64, batch: &Batch, lr: f64) -> StepNumbers {
    StepNumbers { step: step + 1, lr, key: StepKey::new(1, step + 1), divisor: batch.weight }
}

/// Takes the steps, arming the stage before step `from` if that comes; after each, every sample was uploaded exactly once by those who are left.
fn play(stage: &Arc<Stage>, wrap: Option<&Wrap>, safety: Safety, from: u64) -> Result<Told> {
    let workload = workload();
    let mut group = started(&workload, WORLD, safety, wrap);
    let mut balance = Balance::fixed(vec![3.0, 2.0, 1.0]);
    let mut carried = Carried::new(&workload.model, ROWS);
    let (mut losses, mut lost) = (Vec::new(), Vec::new());
    for step in 0..N_STEPS {
        let batch = batch(&workload, step);
        if step == from {
            // The update before is done when its result has been read.
            (0..WORLD).for_each(|rank| drop(group.params_of(rank).unwrap()));
            stage.is_armed.store(true, Ordering::SeqCst);
        }
        let stepped = ask(&mut group, &mut balance, &mut lost, |group, balance| {
            stage.uploads.lock().unwrap().iter_mut().for_each(Vec::clear);
            group.step(&batch, &balance.shares(ROWS), Some(&mut carried), numbers(step, &batch, workload.optimizer.lr))
        })?;
        losses.push(stepped.loss / batch.weight);
        if stage.is_cast.load(Ordering::SeqCst) {
            let uploads = stage.uploads.lock().unwrap();
            let mut seen: Vec<u32> = (0..group.world()).flat_map(|rank| uploads[group.seat(rank).unwrap()].clone()).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..(T * ROWS) as u32).collect::<Vec<_>>(), "samples of step {step}");
        }
    }
    let of_ranks = ask(&mut group, &mut balance, &mut lost, |group, _| {
        (0..group.world()).map(|rank| group.params_of(rank)).collect::<Result<Vec<Tensors>>>()
    })?;
    for (rank, params) in of_ranks.iter().enumerate() {
        assert!(*params == of_ranks[0], "the replicas of ranks 0 and {rank} differ");
    }
    let states = ask(&mut group, &mut balance, &mut lost, |group, _| group.states())?;
    let params = of_ranks.into_iter().next().unwrap();
    Ok(Told { losses, params, states, carried: carried.into_rows(), lost, world: group.world() })
}

fn far(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Whatever was lost, the others have done what all together would have.
fn assert_undisturbed(what: &str, told: &Told, undisturbed: &Told) {
    for (step, (a, b)) in told.losses.iter().zip(&undisturbed.losses).enumerate() {
        assert!((a - b).abs() <= 1e-5 * b.abs(), "{what}: loss {a} of step {step}, undisturbed {b}");
    }
    let tensors = told.params.iter().zip(&undisturbed.params).chain(told.states.iter().flatten().zip(undisturbed.states.iter().flatten()));
    tensors.enumerate().for_each(|(i, (a, b))| assert!(far(a, b) <= 1e-5, "{what}: tensor {i} is {} off", far(a, b)));
    assert!(far(&told.carried, &undisturbed.carried) <= 1e-5, "{what}: the carried state is off");
}

fn survives(deadline: Duration) -> Safety {
    Safety { survives: true, deadline, ..Safety::default() }
}

#[test]
fn whatever_call_of_whichever_rank_fails_the_others_take_the_step_once_with_all_samples() {
    for alike in [true, false] {
        let unharmed = Stage::new(0, How::Error, u64::MAX);
        let undisturbed = play(&unharmed, Some(&actors(&unharmed, alike)), survives(PATIENT), 0).unwrap();
        let n_of_step = unharmed.n_calls.load(Ordering::SeqCst) / N_STEPS + 3;
        assert!(undisturbed.lost.is_empty() && undisturbed.losses[3] < undisturbed.losses[0], "{:?}", undisturbed.losses);
        for seat in 0..WORLD {
            for from in [0, 2] {
                let mut n_fired = 0;
                for at in 0.. {
                    // Errors everywhere; panics go the same way from where they are caught, so fewer do.
                    let how = if at % 5 == 3 { How::Panic } else { How::Error };
                    let stage = Stage::new(seat, how, at);
                    let what = format!("alike: {alike}, {how:?} at call {at} of seat {seat} from step {from}");
                    let told =
                        play(&stage, Some(&actors(&stage, alike)), survives(PATIENT), from).unwrap_or_else(|e| panic!("{what}: {e:#}"));
                    // What comes after the step's calls is the next step's, which are the same.
                    if !stage.has_fired.load(Ordering::SeqCst) || at > n_of_step {
                        break;
                    }
                    n_fired += 1;
                    let [loss] = &told.lost[..] else { panic!("{what}: lost {:?}", told.lost) };
                    assert_eq!((loss.seat, loss.rank, told.world), (seat, seat, WORLD - 1), "{what}");
                    assert!(loss.why.contains("planted"), "{what}: {}", loss.why);
                    assert_undisturbed(&what, &told, &undisturbed);
                }
                assert!(n_fired > 25, "only {n_fired} calls of seat {seat} were played");
            }
        }
    }
}

#[test]
fn a_rank_that_ends_within_any_phase_of_the_ring_leaves_the_step_to_the_others() {
    for alike in [true, false] {
        let unharmed = Stage::new(0, How::Error, u64::MAX);
        let undisturbed = play(&unharmed, Some(&actors(&unharmed, alike)), survives(PATIENT), 0).unwrap();
        let mut phases = BTreeSet::new();
        for seat in 0..WORLD {
            for from in [0, 1] {
                for at in 0.. {
                    let stage = Stage::of(seat, How::Panic, at, true);
                    let phase = Arc::new(Mutex::new(None));
                    let (played, met) = (Arc::clone(&stage), Arc::clone(&phase));
                    let tap = Tap::new(move |passing| {
                        // Ranks are seats until somebody is lost.
                        if passing.header.generation == 0 && passing.rank == played.seat {
                            *met.lock().unwrap() = Some((passing.header.operation, passing.is_sent));
                            let _ = played.meet(passing.rank);
                        }
                    });
                    let what = format!("alike: {alike}, message {at} of seat {seat} from step {from}");
                    let safety = Safety { tap: Some(tap), ..survives(PATIENT) };
                    let told = play(&stage, Some(&actors(&stage, alike)), safety, from).unwrap_or_else(|e| panic!("{what}: {e:#}"));
                    if !stage.has_fired.load(Ordering::SeqCst) || at > 60 {
                        assert!(at > 10, "only {at} messages were played");
                        break;
                    }
                    phases.insert(phase.lock().unwrap().unwrap());
                    let [loss] = &told.lost[..] else { panic!("{what}: lost {:?}", told.lost) };
                    assert_eq!((loss.seat, told.world), (seat, WORLD - 1), "{what}");
                    assert_undisturbed(&what, &told, &undisturbed);
                }
            }
        }
        let wanted = if alike {
            vec![Operation::AllReduce, Operation::GatherBytes]
        } else {
            vec![Operation::ReduceScatter, Operation::AllGather, Operation::GatherBytes, Operation::PassOn]
        };
        let wanted: BTreeSet<_> = wanted.into_iter().flat_map(|operation| [(operation, true), (operation, false)]).collect();
        assert_eq!(phases, wanted, "alike: {alike}");
    }
}

#[test]
fn two_that_fail_one_after_another_leave_a_single_worker_that_goes_on_alone() {
    for alike in [true, false] {
        let unharmed = Stage::new(0, How::Error, u64::MAX);
        let undisturbed = play(&unharmed, Some(&actors(&unharmed, alike)), survives(PATIENT), 0).unwrap();
        for (first, second) in [(0, 1), (1, 2), (2, 0), (1, 0)] {
            let (stage, other) = (Stage::new(first, How::Error, 20), Stage::new(second, How::Error, 95));
            let (inner, outer) = (actors(&stage, alike), actors(&other, alike));
            let both: Wrap = Arc::new(move |seat, backend| outer(seat, inner(seat, backend)));
            other.is_armed.store(true, Ordering::SeqCst);
            let told = play(&stage, Some(&both), survives(PATIENT), 0).unwrap();
            let seats: Vec<usize> = told.lost.iter().map(|loss| loss.seat).collect();
            assert_eq!((seats, told.world), (vec![first, second], 1));
            assert_undisturbed(&format!("alike: {alike}, {first} and {second}"), &told, &undisturbed);
        }
    }
}

#[test]
fn the_last_device_and_a_segment_lost_with_its_copy_end_the_run_with_the_reason() {
    // All fail.
    let everybody: Wrap = Arc::new(|seat, inner| {
        let stage = Stage::new(seat, How::Error, 60);
        stage.is_armed.store(true, Ordering::SeqCst);
        actors(&stage, true)(seat, inner)
    });
    let stage = Stage::new(0, How::Error, u64::MAX);
    let error = format!("{:#}", play(&stage, Some(&everybody), survives(PATIENT), u64::MAX).err().unwrap());
    assert!(error.contains("no device is left") && error.contains("planted fault"), "{error}");
    // Neighbours fail in the same step, of which one holds the other's copy.
    let neighbours: Wrap = Arc::new(|seat, inner| {
        let stage = Stage::new(if seat == 0 { WORLD } else { seat }, How::Error, 10);
        stage.is_armed.store(true, Ordering::SeqCst);
        actors(&stage, false)(seat, inner)
    });
    let error = format!("{:#}", play(&stage, Some(&neighbours), survives(PATIENT), u64::MAX).err().unwrap());
    assert!(error.contains("state of rank 1 was lost together with its copy") && error.contains("--resume"), "{error}");
}

#[test]
fn a_stuck_worker_is_given_up_at_the_deadline_named_with_what_it_did_and_leaves_when_it_wakes() {
    let unharmed = Stage::new(0, How::Error, u64::MAX);
    let undisturbed = play(&unharmed, Some(&actors(&unharmed, true)), survives(PATIENT), 0).unwrap();
    // In the upload, in the sweep, in its readback on the ring's thread, in a message, and in the update; on a machine that is busy with other things.
    let deadline = Duration::from_secs(8);
    std::thread::scope(|scope| {
        for (seat, at, of_ring, doing) in
            [(0, 2, false, "computing"), (1, 9, false, "computing"), (2, 4, true, "the ring"), (1, 46, false, "")]
        {
            let undisturbed = &undisturbed;
            scope.spawn(move || {
                let stage = Stage::of(seat, How::Hang, at, of_ring);
                let played = Arc::clone(&stage);
                let tap = Tap::new(move |passing| {
                    if of_ring && passing.header.generation == 0 {
                        let _ = played.meet(passing.rank);
                    }
                });
                let safety = Safety { tap: Some(tap), ..survives(deadline) };
                let wrap = actors(&stage, true);
                let told = play(&stage, Some(&wrap), safety, 1).unwrap();
                let what = format!("seat {seat} stuck at call {at}");
                assert!(stage.has_fired.load(Ordering::SeqCst), "{what}: it was not");
                let [loss] = &told.lost[..] else { panic!("{what}: lost {:?}", told.lost) };
                assert_eq!((loss.seat, loss.name.as_str()), (seat, "cpu:1"), "{what}");
                assert!(loss.why.contains("8 s") && loss.why.contains("it was") && loss.why.contains(doing), "{what}: {}", loss.why);
                assert_undisturbed(&what, &told, undisturbed);
                // The play is over for all others; who was stuck still holds the stage, and leaves it on waking.
                drop(wrap);
                assert!(Arc::strong_count(&stage) > 1, "{what}: it did not wait");
                stage.open();
                let patience = Instant::now();
                while Arc::strong_count(&stage) > 1 {
                    assert!(patience.elapsed() < PATIENT, "{what}: it has not left");
                    std::thread::sleep(Duration::from_millis(5));
                }
            });
        }
    });
}

/// A GPU whose device is destroyed as it is about to launch its n-th kernel.
struct Doomed {
    gpu: GpuBackend,
    n_left: u32,
}

impl Around for Doomed {
    fn inner(&self) -> &dyn Backend {
        &self.gpu
    }
    fn inner_mut(&mut self) -> &mut dyn Backend {
        &mut self.gpu
    }
    fn launch(&mut self, kernel: &dyn Kernel, operands: &[Span]) -> Result<()> {
        self.n_left = self.n_left.wrapping_sub(1);
        if self.n_left == 0 {
            self.gpu.destroy_device();
        }
        self.gpu.launch(kernel, operands)
    }
}

#[test]
fn an_adapter_that_is_lost_leaves_its_streams_to_the_processors_beside_it() {
    let Some(&index) = adapters::gpus().first() else { return };
    let stage = Stage::new(WORLD, How::Error, u64::MAX);
    let undisturbed = play(&stage, None, survives(PATIENT), 0).unwrap();
    for doomed in [0, 1] {
        // In the first forward pass, in a later backward pass, in an update.
        for n_left in [1, 25, 40, 60] {
            let wrap: Wrap =
                Arc::new(
                    move |seat, inner| {
                        if seat == doomed { Box::new(Doomed { gpu: GpuBackend::new(index).unwrap(), n_left }) } else { inner }
                    },
                );
            // It runs on an adapter, and is called what the list calls it.
            let what = format!("adapter at seat {doomed}, lost at launch {n_left}");
            let workload = workload();
            let mut group = started(&workload, WORLD, survives(PATIENT), Some(&wrap));
            let mut balance = Balance::fixed(vec![3.0, 2.0, 1.0]);
            let mut carried = Carried::new(&workload.model, ROWS);
            let (mut losses, mut lost) = (Vec::new(), Vec::new());
            for step in 0..N_STEPS {
                let batch = batch(&workload, step);
                let stepped = ask(&mut group, &mut balance, &mut lost, |group, balance| {
                    group.step(&batch, &balance.shares(ROWS), Some(&mut carried), numbers(step, &batch, workload.optimizer.lr))
                });
                losses.push(stepped.unwrap_or_else(|e| panic!("{what}: {e:#}")).loss / batch.weight);
            }
            let [loss] = &lost[..] else { panic!("{what}: lost {lost:?}") };
            // A thread may be refused something before another hears of the loss.
            let told = loss.why.contains("gpu:") && (loss.why.contains("lost") || loss.why.contains("refused"));
            assert!(loss.seat == doomed && told, "{what}: {}", loss.why);
            for (a, b) in losses.iter().zip(&undisturbed.losses) {
                assert!((a - b).abs() <= 1e-3 * b.abs(), "{what}: {losses:?}, undisturbed {:?}", undisturbed.losses);
            }
        }
    }
}

#[test]
fn an_evaluation_during_which_a_device_is_lost_counts_every_row_once() {
    let workload = workload();
    let batch = batch(&workload, 0);
    let whole = started(&workload, 1, Safety::default(), None).evaluate(&batch, std::slice::from_ref(&(0..ROWS)), None, false).unwrap().0;
    for seat in 0..WORLD {
        for at in [0, 5, 9] {
            let stage = Stage::new(seat, How::Error, at);
            let mut group = started(&workload, WORLD, survives(PATIENT), Some(&actors(&stage, true)));
            let mut balance = Balance::fixed(vec![3.0, 2.0, 1.0]);
            let (mut lost, mut carried) = (Vec::new(), Carried::new(&workload.model, ROWS));
            stage.is_armed.store(true, Ordering::SeqCst);
            let (loss, _) = ask(&mut group, &mut balance, &mut lost, |group, balance| {
                group.evaluate(&batch, &balance.eval_shares_of(&batch), Some(&mut carried), false)
            })
            .unwrap();
            assert!((loss - whole).abs() < 1e-5 * whole, "{loss} against {whole}");
            assert_eq!(lost.len(), 1, "seat {seat}, call {at}");
        }
    }
}

#[test]
fn a_share_that_changes_hands_takes_its_carried_state_along() {
    let workload = workload();
    let run = |weights: &dyn Fn(u64) -> Vec<f64>| -> (Vec<f64>, Vec<f32>) {
        let mut group = started(&workload, WORLD, Safety::default(), None);
        let mut carried = Carried::new(&workload.model, ROWS);
        let step = |step: u64| {
            let batch = batch(&workload, step);
            let shares: Vec<Range<usize>> = Balance::fixed(weights(step)).shares(ROWS);
            let numbers = numbers(step, &batch, workload.optimizer.lr);
            group.step(&batch, &shares, Some(&mut carried), numbers).unwrap().loss
        };
        ((0..N_STEPS).map(step).collect(), carried.into_rows())
    };
    let (losses, carried) = run(&|_| vec![1.0; 3]);
    let moved = [vec![7.0, 2.0, 1.0], vec![1.0, 2.0, 7.0], vec![0.0, 1.0, 0.0], vec![1.0, 0.0, 1.0]];
    let (of_moved, carried_of_moved) = run(&|step| moved[step as usize].clone());
    for (a, b) in of_moved.iter().zip(&losses) {
        assert!((a - b).abs() < 1e-5 * b, "{of_moved:?} against {losses:?}");
    }
    assert!(far(&carried, &carried_of_moved) < 1e-5 && carried.iter().any(|h| h.abs() > 0.01));
}

#[test]
fn shares_come_to_follow_the_speed_of_a_slowed_device_while_steps_stay_those_of_fixed_ones() {
    let workload = workload();
    // Seconds a row on a clock of its own: the last device is slowed three times.
    let cost = [1e-3, 1e-3, 3e-3];
    let mut group = started(&workload, WORLD, Safety::default(), None);
    let mut fixed = started(&workload, WORLD, Safety::default(), None);
    let mut balance = Balance::measured(WORLD);
    let mut carried = [Carried::new(&workload.model, ROWS), Carried::new(&workload.model, ROWS)];
    for step in 0..30 {
        let (batch, [of_moving, of_fixed]) = (batch(&workload, step), &mut carried);
        let shares = balance.shares(ROWS);
        let numbers = numbers(step, &batch, 0.05);
        let got = group.step(&batch, &shares, Some(of_moving), numbers).unwrap();
        let want = fixed.step(&batch, &[0..2, 2..4, 4..6], Some(of_fixed), numbers).unwrap();
        assert!((got.loss - want.loss).abs() < 1e-4 * want.loss, "step {step}: {} against {}", got.loss, want.loss);
        let times: Vec<Duration> = shares.iter().zip(cost).map(|(rows, cost)| Duration::from_secs_f64(rows.len() as f64 * cost)).collect();
        balance.observe(&batch, &shares, &times);
    }
    // Six rows at speeds of 3:3:1 are best cut as 3:2:1 or 2:3:1, which ends after three of the slow device's milliseconds.
    let n_rows: Vec<usize> = balance.shares(ROWS).into_iter().map(|rows| rows.len()).collect();
    assert!(n_rows[2] == 1 && n_rows[0].max(n_rows[1]) == 3, "{n_rows:?}");
}

#[test]
fn buckets_go_round_a_slow_link_while_lower_layers_are_still_computed() {
    let mut workload = workload();
    workload.model.n_layers = 3;
    let shares = [0..2, 2..4, 4..6];
    let batch = batch(&workload, 0);
    let plain = Stage::new(WORLD, How::Error, u64::MAX);
    let with = |before: Before| -> Wrap {
        let stage = Arc::clone(&plain);
        Arc::new(move |seat, inner| {
            let info = inner.info().clone();
            Box::new(Actor { inner, info, seat, stage: Arc::clone(&stage), tokens: BTreeSet::new(), before: Some(Arc::clone(&before)) })
        })
    };
    // What each rank launches before its update.
    let launched: Arc<Mutex<Vec<Vec<&str>>>> = Arc::new(Mutex::new(vec![Vec::new(); WORLD]));
    let log = Arc::clone(&launched);
    let wrap = with(Arc::new(move |seat, kernel| log.lock().unwrap()[seat].push(kernel)));
    let mut group = started(&workload, WORLD, survives(PATIENT), Some(&wrap));
    group.step(&batch, &shares, None, numbers(0, &batch, 0.1)).unwrap();
    drop(group);
    let last: Vec<usize> =
        launched.lock().unwrap().iter().map(|kernels| kernels.iter().rposition(|kernel| *kernel != "sgd").unwrap()).collect();
    assert!(last.iter().all(|last| *last > 8), "{last:?}");
    // Now each waits before its last launch until the first bucket has come in from both others. Were buckets sent only when all is
    // computed, nobody would ever go on.
    let n_come: Arc<Vec<AtomicU64>> = Arc::new((0..WORLD).map(|_| AtomicU64::new(0)).collect());
    let n_launched: Vec<AtomicU64> = (0..WORLD).map(|_| AtomicU64::new(0)).collect();
    let come = Arc::clone(&n_come);
    let waited = Arc::new(AtomicU64::new(0));
    let waits = Arc::clone(&waited);
    let wrap = with(Arc::new(move |seat, _| {
        if n_launched[seat].fetch_add(1, Ordering::SeqCst) != last[seat] as u64 {
            return;
        }
        let patience = Instant::now();
        while come[seat].load(Ordering::SeqCst) < WORLD as u64 - 1 {
            assert!(patience.elapsed() < PATIENT / 2, "the first bucket has not come to rank {seat}");
            std::thread::sleep(Duration::from_millis(1));
        }
        waits.fetch_add(1, Ordering::SeqCst);
    }));
    let tap = Tap::new(move |passing| {
        // A link of 1 GB/s.
        if !passing.is_sent {
            std::thread::sleep(Duration::from_secs_f64(passing.n_bytes as f64 / 1e9));
        }
        if !passing.is_sent && passing.header.operation == Operation::AllReduce && passing.header.call == 0 {
            n_come[passing.rank].fetch_add(1, Ordering::SeqCst);
        }
    });
    let mut group = started(&workload, WORLD, Safety { tap: Some(tap), ..survives(PATIENT) }, Some(&wrap));
    group.step(&batch, &shares, None, numbers(0, &batch, 0.1)).unwrap();
    assert_eq!(waited.load(Ordering::SeqCst), WORLD as u64);
}

#[test]
fn a_share_beyond_a_devices_memory_becomes_smaller_and_the_step_is_repeated() {
    let workload = workload();
    let spec = WorkerSpec {
        model: workload.model.clone(),
        optimizer: workload.optimizer,
        accumulate: 1,
        compress: Method::None,
        deadline: PATIENT,
    };
    let limits = Limits { max_buffer_bytes: u64::MAX, max_binding_bytes: u64::MAX };
    let bytes = |n_rows: usize| carrousel::train::worker::weigh(&spec, [0, WORLD], Update::Everywhere, T, n_rows, limits).unwrap();
    let fits = |limit: u64| most_rows(&spec, [0, WORLD], Update::Everywhere, T, ROWS, limits, limit).unwrap();
    assert_eq!((fits(bytes(2)), fits(bytes(3) - 1), fits(bytes(1) - 1)), (Ok(2), Ok(2), Err(bytes(1))));
    let memory_limits = vec![Some(bytes(2)), None, Some(bytes(4))];
    let mut group = started(&workload, WORLD, Safety { memory_limits, ..survives(PATIENT) }, None);
    let mut plain = started(&workload, WORLD, Safety::default(), None);
    let mut carried = [Carried::new(&workload.model, ROWS), Carried::new(&workload.model, ROWS)];
    for step in 0..N_STEPS {
        let (batch, numbers) = (batch(&workload, step), numbers(step, &batch(&workload, step), workload.optimizer.lr));
        let [limited, unlimited] = &mut carried;
        let want = plain.step(&batch, &[0..2, 2..4, 4..6], Some(unlimited), numbers).unwrap();
        let error = group.step(&batch, &[0..3, 3..6, 6..6], Some(limited), numbers).err().unwrap();
        let regrouped = error.downcast::<Regrouped>().unwrap();
        let [cramped] = &regrouped.cramped[..] else { panic!("{regrouped}") };
        assert!(regrouped.lost.is_empty() && (cramped.rank, cramped.n_rows) == (0, 3), "{regrouped}");
        assert!(regrouped.to_string().contains("smaller share") && regrouped.to_string().contains("GB"), "{regrouped}");
        let got = group.step(&batch, &[0..2, 2..4, 4..6], Some(limited), numbers).unwrap();
        assert_eq!(got.loss, want.loss, "step {step}");
    }
    assert_eq!(carried[0], carried[1]);
    // What is only evaluated comes in as many parts as the memory asks for.
    let batch = batch(&workload, 0);
    let evaluated = group.evaluate(&batch, &[0..6, 6..6, 6..6], None, false).unwrap().0;
    let want = plain.evaluate(&batch, &[0..6, 6..6, 6..6], None, false).unwrap().0;
    assert!((evaluated - want).abs() < 1e-5 * want, "{evaluated} against {want}");
    let got = group.step(&batch, &[0..2, 2..4, 4..6], None, numbers(9, &batch, 0.1)).unwrap();
    assert_eq!(got.loss, plain.step(&batch, &[0..2, 2..4, 4..6], None, numbers(9, &batch, 0.1)).unwrap().loss);
}

// Whole runs.

fn small(dir: &std::path::Path) -> RunConfig {
    let file = dir.join("text.txt");
    std::fs::write(&file, text(3000)).unwrap();
    let mut config = config(Task::Lm, &[&file]);
    (config.devices, config.batch_size, config.max_steps, config.balance) = ("cpu:1*3".into(), 12, Some(12), "3:2:1".into());
    (config.eval_every, config.checkpoint_every) = (6, 4);
    config
}

/// Device `seat` fails at each of these calls of a backend's lifetime, in the order in which it is opened anew.
pub fn fails_at(seat: usize, calls: Vec<u64>) -> Wrap {
    let calls = Mutex::new(calls.into_iter());
    Arc::new(move |of, inner| {
        let at = if of == seat { calls.lock().unwrap().next().unwrap_or(u64::MAX) } else { u64::MAX };
        let stage = Stage::new(of, How::Error, at);
        stage.is_armed.store(true, Ordering::SeqCst);
        let info = inner.info().clone();
        Box::new(Actor { inner, info, seat: of, stage, tokens: BTreeSet::new(), before: None })
    })
}

fn options(out: &std::path::Path, wrap: Option<Wrap>) -> RunOptions {
    RunOptions { out: out.to_owned(), resume: false, wrap }
}

fn warnings(ran: &Ran) -> Vec<&str> {
    ran.events.iter().filter_map(|e| if let Event::Warning { message } = e { Some(message.as_str()) } else { None }).collect()
}

fn lost_devices(ran: &Ran) -> Vec<(u64, u64)> {
    let of = |e: &Event| if let Event::Device { step, rank, lost: Some(_), .. } = e { Some((*step, *rank)) } else { None };
    ran.events.iter().filter_map(of).collect()
}

fn assert_curve(what: &str, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    got.iter().zip(want).for_each(|(a, b)| assert!((a - b).abs() < 1e-4 * b, "{what}: {got:?} against {want:?}"));
}

#[test]
fn a_run_that_loses_a_device_says_so_and_ends_as_if_nothing_had_happened() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small(dir.path());
    let whole = train(&config, &dir.path().join("whole"), false);
    let valid = whole.outcome.unwrap().summary["valid_loss"].as_f64().unwrap();
    // Somewhere in training, and in an evaluation, as each lasts some forty calls.
    for (seat, at) in [(0, 100), (1, 275), (2, 330)] {
        let out = dir.path().join(format!("lost-{seat}"));
        let ran = train_with(&config, options(&out, Some(fails_at(seat, vec![at]))), None);
        let outcome = ran.outcome.as_ref().unwrap_or_else(|e| panic!("{e:#}"));
        assert_curve(&format!("seat {seat} lost"), &ran.losses, &whole.losses);
        assert!((outcome.summary["valid_loss"].as_f64().unwrap() - valid).abs() < 1e-4 * valid);
        assert_eq!(outcome.summary["devices"].as_array().unwrap().len(), 2);
        let told = warnings(&ran).into_iter().filter(|w| w.contains("is lost") && w.contains("planted") && w.contains("cpu:1")).count();
        assert_eq!(told, 1, "{:?}", warnings(&ran));
        let lost = lost_devices(&ran);
        assert!(lost.len() == 2 && lost.iter().all(|(_, rank)| *rank == seat as u64), "as it happens, and at the end: {lost:?}");
        assert!(outcome.tables[0].to_string().contains("lost at step"), "{}", outcome.tables[0]);
    }
    config.on_device_loss = OnDeviceLoss::Stop;
    let ran = train_with(&config, options(&dir.path().join("stop"), Some(fails_at(1, vec![100]))), None);
    let error = format!("{:#}", ran.outcome.err().unwrap());
    assert!(error.contains("planted") && error.contains("cpu:1"), "{error}");
}

#[test]
fn a_device_that_is_back_rejoins_at_the_next_checkpoint_with_what_the_others_have() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small(dir.path());
    (config.rejoin, config.hash_every) = (true, 1);
    let whole = train(&config, &dir.path().join("whole"), false);
    for (name, wrap) in [("once", fails_at(1, vec![100])), ("at the second try", fails_at(0, vec![60, 0]))] {
        let ran = train_with(&config, options(&dir.path().join(name), Some(wrap)), None);
        let outcome = ran.outcome.as_ref().unwrap_or_else(|e| panic!("{name}: {e:#}"));
        assert_curve(name, &ran.losses, &whole.losses);
        assert_eq!(outcome.summary["devices"].as_array().unwrap().len(), 3, "{name}");
        let told = warnings(&ran);
        let (lost, back) = (told.iter().filter(|w| w.contains("is lost")).count(), told.iter().filter(|w| w.contains("is back")).count());
        assert!(lost >= 1 && back == lost, "{name}: {told:?}");
        assert!(told.iter().any(|w| w.contains("shares are now 6:4:2")), "{name}: {told:?}");
    }
}

#[test]
fn a_run_that_lost_a_device_is_resumed_with_those_that_are_named_then() {
    let dir = tempfile::tempdir().unwrap();
    let config = small(dir.path());
    let whole = train(&config, &dir.path().join("whole"), false);
    for devices in ["cpu:1*3", "cpu:1*2"] {
        let out = dir.path().join(devices.replace([':', '*'], "-"));
        let first = train_with(&config, options(&out, Some(fails_at(1, vec![100]))), Some(7));
        assert!(first.outcome.unwrap().interrupted);
        let mut config = config.clone();
        (config.devices, config.balance) = (devices.into(), "equal".into());
        let rest = train(&config, &out, true);
        rest.outcome.unwrap();
        assert_curve(devices, &[first.losses, rest.losses].concat(), &whole.losses);
    }
}

#[test]
fn a_memory_limit_bounds_the_shares_and_one_that_is_too_small_is_refused_with_both_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small(dir.path());
    let whole = train(&config, &dir.path().join("whole"), false);
    whole.outcome.unwrap();
    let refused = |config: &RunConfig, name: &str| {
        let error = train(config, &dir.path().join(name), false).outcome.err().unwrap();
        assert!(!dir.path().join(name).exists());
        format!("{error:#}")
    };
    config.memory_limit = vec![1e-5];
    let error = refused(&config, "tiny");
    assert!(
        error.contains("--memory-limit") && error.contains("0.000010 GB") && error.contains("single row") && error.contains("cpu:1"),
        "{error}"
    );
    config.memory_limit = vec![1.0; 2];
    assert!(refused(&config, "two").contains("2 numbers for 3 workers"));
    // As much as two rows take on the first device, which would have six.
    let model = {
        let corpus = carrousel::infer::task::Corpus::load(&config, None).unwrap();
        carrousel::infer::task::model_config(&config, &corpus.spec())
    };
    let spec = WorkerSpec { model, optimizer: config.optimizer, accumulate: 1, compress: Method::None, deadline: PATIENT };
    let limits = Limits { max_buffer_bytes: u64::MAX, max_binding_bytes: u64::MAX };
    let bytes = |n_rows| carrousel::train::worker::weigh(&spec, [0, 3], Update::Everywhere, config.seq_len, n_rows, limits).unwrap();
    let gb = |bytes: u64| bytes as f64 / carrousel::train::memory::GB;
    config.memory_limit = vec![gb(bytes(2)), 1.0, gb(bytes(3))];
    let ran = train(&config, &dir.path().join("bounded"), false);
    ran.outcome.as_ref().unwrap_or_else(|e| panic!("{e:#}"));
    assert_curve("bounded", &ran.losses, &whole.losses);
    assert_eq!(warnings(&ran).iter().filter(|w| w.contains("smaller share")).count(), 0, "{:?}", warnings(&ran));
    config.memory_limit = vec![gb(bytes(2)); 3];
    let error = refused(&config, "too small together");
    assert!(error.contains("holds 6 rows (2 + 2 + 2) of the 12"), "{error}");
}
