//! `profile`: what a step costs, on synthetic data of the size that was asked for.

mod inference;
pub mod kernels;
pub mod layer;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use self::layer::{LayerAlone, LayerSizes};
use super::balance::Balance;
use super::devices::Resolved;
use super::group::{Group, GroupSpec, KindChoices, StepNumbers, Wrap, open_device};
use super::ring::RingTimes;
use super::run::settle;
use super::tuning::Autotune;
use super::watched::{Notes, Watched, noted};
use crate::backend::Backend;
use crate::compress::{Compressor, Method};
use crate::data::grouping::{Grouping, POOL};
use crate::data::series::Order;
use crate::data::{Batch, Input, Target};
use crate::infer::session::DEADLINE;
use crate::kernels::elementwise::Scale;
use crate::kernels::gemm::{Gemm, Matrix};
use crate::model::config::{self, ModelConfig};
use crate::model::init::{Init, initial};
use crate::model::state::Carried;
use crate::optim::{OptimizerConfig, Rule};
use crate::rng::{Purpose, StepKey, Stream};
use crate::shape::GATES;
use crate::usage::UsageError;

/// Steps before the clock starts: pipelines are built, memory is touched.
const WARM_UP: usize = 3;

/// A model with the batch that a step of it takes.
#[derive(Clone, Debug)]
pub struct Workload {
    pub model: ModelConfig,
    pub optimizer: OptimizerConfig,
    /// T.
    pub n_steps: usize,
    /// B.
    pub n_rows: usize,
    /// The state is carried from step to step.
    pub carries: bool,
    /// Training is the first layer alone: the gradient of its outputs' sum, of its input too; no head, no update.
    pub layer_alone: bool,
}

fn optimizer(rule: Rule, lr: f64, clip_norm: f64) -> OptimizerConfig {
    OptimizerConfig { rule, lr, momentum: 0.0, nesterov: false, weight_decay: 0.0, l1: 0.0, clip_norm, clip_value: 0.0 }
}

impl Workload {
    /// One of the fixed workloads that tools are compared by: A series, B char-lm, C ptb-small, D large, E long.
    pub fn named(name: &str) -> Option<Self> {
        let tokens = |vocabulary, width, hidden: usize| ModelConfig {
            input: config::Input::Tokens { vocabulary, width },
            output: config::Output::Classes { n_classes: vocabulary },
            n_layers: 2,
            hidden: hidden.into(),
            dropout: 0.0,
            bias: true,
            tied: false,
            lstm: Default::default(),
        };
        let series = |n_features, n_layers, hidden: usize| ModelConfig {
            input: config::Input::Values { n_features },
            output: config::Output::Values { n_outputs: 1, pooling: config::Pooling::Last },
            n_layers,
            hidden: hidden.into(),
            dropout: 0.0,
            bias: true,
            tied: false,
            lstm: Default::default(),
        };
        let adam = optimizer(Rule::Adam, 1e-3, 0.0);
        Some(match name {
            "A" => Self { model: series(8, 1, 64), optimizer: adam, n_steps: 48, n_rows: 64, carries: false, layer_alone: false },
            "B" => Self { model: tokens(96, 128, 256), optimizer: adam, n_steps: 100, n_rows: 50, carries: false, layer_alone: false },
            "C" => Self {
                model: tokens(10_000, 200, 200),
                optimizer: optimizer(Rule::Sgd, 0.1, 5.0),
                n_steps: 20,
                n_rows: 20,
                carries: true,
                layer_alone: false,
            },
            "D" => Self { model: series(512, 2, 1024), optimizer: adam, n_steps: 64, n_rows: 64, carries: false, layer_alone: false },
            "E" => Self { model: series(768, 1, 768), optimizer: adam, n_steps: 1024, n_rows: 16, carries: false, layer_alone: true },
            _ => return None,
        })
    }

    /// Random data of this size.
    pub fn batch(&self, seed: u64) -> Batch {
        let mut random = Stream::new(StepKey::new(seed, 0), Purpose::Test, 0, 0);
        let (t, b) = (self.n_steps, self.n_rows);
        let mut numbers = |n: usize| -> Vec<f32> { (0..n).map(|_| 2.0 * random.uniform() - 1.0).collect() };
        let below = |numbers: Vec<f32>, below: usize| -> Vec<u32> {
            numbers.iter().map(|u| (((u + 1.0) / 2.0 * below as f32) as u32).min(below as u32 - 1)).collect()
        };
        let tokens = match self.model.input {
            config::Input::Tokens { vocabulary, .. } => below(numbers((t + 1) * b), vocabulary),
            config::Input::Values { .. } => Vec::new(),
        };
        let (target, n_terms) = match self.model.output {
            // The token after.
            config::Output::Classes { .. } if !tokens.is_empty() => (Target::Tokens(tokens[b..].to_vec()), t * b),
            config::Output::Classes { n_classes } => (Target::Tokens(below(numbers(t * b), n_classes)), t * b),
            config::Output::Label { n_classes, .. } => (Target::Labels(below(numbers(b), n_classes)), b),
            config::Output::Values { n_outputs, .. } | config::Output::Quantiles { n_values: n_outputs, .. } => {
                (Target::Values { values: numbers(b * n_outputs), n_outputs }, b * n_outputs)
            }
            config::Output::Notes { n_notes } => {
                let values = numbers(t * b * n_notes).into_iter().map(|u| f32::from(u8::from(u > 0.9))).collect();
                (Target::Notes { values, n_notes }, t * b)
            }
        };
        let input = match self.model.input {
            config::Input::Tokens { .. } => Input::Tokens(tokens[..t * b].to_vec()),
            config::Input::Values { n_features } => Input::Values { values: numbers(t * b * n_features), n_features },
        };
        Batch {
            n_steps: t,
            n_rows: b,
            input,
            target,
            weights: vec![1.0; n_terms],
            lengths: None,
            streams: (0..b as u32).collect(),
            resets: false,
            carries: self.carries,
            weight: n_terms as f64,
            n_tokens: (t * b) as u64,
        }
    }

    /// Random data in rows of these lengths.
    fn batch_of(&self, lengths: Vec<u32>, seed: u64) -> Batch {
        let (n_steps, n_rows) = (lengths.iter().copied().max().unwrap_or(0) as usize, lengths.len());
        let mut batch = Self { n_steps, n_rows, carries: false, ..self.clone() }.batch(seed);
        if matches!(batch.target, Target::Tokens(_)) {
            let weights = batch.weights.iter_mut().enumerate();
            weights.filter(|(place, _)| place / n_rows >= lengths[place % n_rows] as usize).for_each(|(_, weight)| *weight = 0.0);
        }
        Batch::of_sequences(n_steps, batch.input, batch.target, batch.weights, batch.streams, lengths)
    }
}

/// How long the sequences of the made-up data are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lengths {
    /// T steps, all of them.
    #[default]
    Full,
    /// As likely one number of steps as another, from 1 to T.
    Uniform,
}

/// What a step is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Forward, loss, backward, update.
    #[default]
    Train,
    /// One time step a call, with the state carried from call to call.
    InferStep,
    /// A whole sequence a call.
    InferSeq,
}

impl Mode {
    /// Steps that are timed where none are given: enough to take a second or so.
    pub fn usual_steps(self) -> usize {
        match self {
            Self::Train => 20,
            Self::InferStep => 2000,
            Self::InferSeq => 100,
        }
    }
}

/// Whose batch the work's is, where several workers share it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scaling {
    /// That of all workers together: the same work, however many there are.
    #[default]
    Strong,
    /// That of each worker: more work with more of them.
    Weak,
}

/// What is measured, and on what.
#[derive(Clone, Copy, Debug)]
pub struct Measured<'a> {
    pub mode: Mode,
    /// As typed.
    pub devices: &'a str,
    pub balance: &'a str,
    pub accumulate: usize,
    pub compress: Method,
    /// Variants of kernels are measured before the clock starts.
    pub autotunes: bool,
    pub shard_optimizer: bool,
    /// Steps or calls that are timed.
    pub steps: usize,
    pub lengths: Lengths,
    pub scaling: Scaling,
}

/// Measures steps of a workload as asked.
///
/// # Errors
/// Devices that do not exist, or more than the work can use; a model that does not fit.
pub fn profile_step(workload: &Workload, measured: Measured<'_>) -> Result<Map<String, Value>> {
    let Measured { mode, devices, accumulate, autotunes, steps, lengths, compress, scaling, .. } = measured;
    UsageError::unless(steps > 0, || "--steps 0 measures nothing: give a number from 1".to_owned())?;
    if mode == Mode::Train && !workload.layer_alone {
        return profile_training(workload, measured);
    }
    let what = if mode == Mode::Train { "a layer alone" } else { "--mode infer-step or infer-seq" };
    UsageError::unless(lengths == Lengths::Full, || format!("--lengths uniform is for training a model, not for {what}: leave it out"))?;
    UsageError::unless(scaling == Scaling::Strong, || format!("--scaling weak is for training a model, not for {what}: leave it out"))?;
    UsageError::unless(!measured.shard_optimizer, || format!("--shard-optimizer is for training a model, not for {what}: leave it out"))?;
    UsageError::unless(compress == Method::None, || format!("--compress is for training a model, not for {what}: leave it out"))?;
    UsageError::unless(accumulate == 1, || format!("--accumulate is for training a model, not for {what}: leave it out"))?;
    let n_workers = super::devices::parse(devices)?.n_workers();
    UsageError::unless(n_workers.is_none_or(|n| n == 1), || {
        format!("--devices {devices} names {} workers, but {what} runs on one: name one", n_workers.unwrap_or(0))
    })?;
    let (devices, ..) = settle(devices, measured.balance)?;
    let device = devices.first().context("no device was found")?;
    match mode {
        Mode::Train => profile_layer(workload, device, steps, autotunes),
        Mode::InferStep => inference::measure(workload, device, true, steps),
        Mode::InferSeq => inference::measure(workload, device, false, steps),
    }
}

/// A device without a worker around it.
fn open_one(device: &Resolved) -> Result<Box<dyn Backend>> {
    open_device(&device.kind)
}

/// Which variants were chosen, where any were.
fn tell_variants(autotune: &Autotune, summary: &mut Map<String, Value>) {
    let variants = autotune.report();
    if variants.as_array().is_some_and(|rows| !rows.is_empty()) {
        summary.insert("variants".into(), variants);
    }
}

/// Of times in order.
fn median(times: &[f64]) -> f64 {
    let n = times.len();
    if n % 2 == 1 { times[n / 2] } else { (times[n / 2 - 1] + times[n / 2]) / 2.0 }
}

/// Measures a layer alone.
fn profile_layer(workload: &Workload, device: &Resolved, steps: usize, autotunes: bool) -> Result<Map<String, Value>> {
    let config::Input::Values { n_features } = workload.model.input else {
        return Err(UsageError("a layer alone reads numbers, not tokens: choose another workload".to_owned()).into());
    };
    let sizes =
        LayerSizes { n_steps: workload.n_steps, n_rows: workload.n_rows, n_inputs: n_features, hidden: workload.model.hidden.of(0) };
    let mut autotune = Autotune::of_user(autotunes);
    let mut layer = LayerAlone::new(sizes, open_one(device)?)?;
    autotune.begin_on(layer.backend_mut());
    // As long as several steps of the other workloads.
    layer.step()?;
    autotune.after_step_on(layer.backend_mut())?;
    let mut times = (0..steps).map(|_| Ok(layer.step()?.as_secs_f64())).collect::<Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    let middle = median(&times);
    let info = layer.backend().info().clone();
    // Products forward, and for each two backward.
    let flop = 6.0 * (sizes.n_steps * sizes.n_rows * GATES * sizes.hidden * (sizes.n_inputs + sizes.hidden)) as f64;
    let mut summary = Map::new();
    summary.insert("status".into(), json!("finished"));
    summary.insert("ms_per_step".into(), json!(middle * 1e3));
    summary.insert("us_per_time_step".into(), json!(middle * 1e6 / sizes.n_steps as f64));
    summary.insert("tokens_per_second".into(), json!((sizes.n_steps * sizes.n_rows) as f64 / middle));
    summary.insert("gflops".into(), json!(flop / middle / 1e9));
    summary.insert("peak_rss_bytes".into(), json!(peak_rss_bytes()));
    summary.insert("bytes_sent_per_step".into(), json!(0));
    summary.insert("ring_wait_share".into(), json!(0.0));
    summary.insert("devices".into(), json!([{ "device": device.spec, "name": info.name, "driver": info.driver }]));
    summary.insert("parameters".into(), json!(layer.n_parameters()));
    summary.insert("loss".into(), json!(layer.total()?));
    tell_variants(&autotune, &mut summary);
    drop(layer);
    let notes = Notes::shared();
    let mut layer = LayerAlone::new(sizes, Watched::timing(open_one(device)?, &notes))?;
    autotune.begin_on(layer.backend_mut());
    layer.step()?;
    noted(&notes).kernels.clear();
    layer.step()?;
    drop(layer);
    summary.insert("kernels".into(), of_kernels(&noted(&notes), 1));
    Ok(summary)
}

/// Measures `steps` training steps. With [`Lengths::Uniform`] an epoch of unequal sequences, in batches of like length, is trained on between them:
/// at least [`POOL`] batches, of which `tokens_per_second` counts the valid tokens, beside `dense_tokens_per_second` and their `ratio`.
fn profile_training(workload: &Workload, measured: Measured<'_>) -> Result<Map<String, Value>> {
    let Measured { devices, balance, accumulate, compress, shard_optimizer, autotunes, steps, lengths, scaling, .. } = measured;
    let (devices, mut balance, _) = settle(devices, balance)?;
    let n_workers = devices.len();
    let n_rows = if scaling == Scaling::Weak { workload.n_rows * n_workers } else { workload.n_rows };
    let workload = &Workload { n_rows, ..workload.clone() };
    let spec = GroupSpec { model: workload.model.clone(), optimizer: workload.optimizer, accumulate, compress, shard_optimizer };
    UsageError::unless(compress == Method::None || Compressor::n_tensors(compress, &workload.model.table()) > 0, || {
        format!("--compress {compress} makes no tensor of this model smaller: leave it out, or lower its rank")
    })?;
    // As after the method's warm-up.
    let warmed_up = compress.warm_up_steps();
    let mut group = Group::start(spec, &devices, None)?;
    let params = initial(&workload.model, group.table(), Init::Uniform(0.1), None, 1);
    let zeros: Vec<Vec<f32>> = params.iter().map(|p| vec![0.0; p.len()]).collect();
    group.load(params, vec![zeros; workload.optimizer.states().len()])?;
    let mut autotune = Autotune::of_user(autotunes);
    autotune.begin(&mut group, &KindChoices::new())?;
    let batch = Arc::new(workload.batch(1));
    let model = &workload.model;
    let mut carried = workload.carries.then(|| Carried::new(model, batch.n_rows));
    let mut times = Vec::with_capacity(steps);
    let (mut ring, mut sent, mut loss) = (RingTimes::default(), 0, 0.0);
    let mut epoch = (lengths == Lengths::Uniform).then(|| Epoch::new(workload, steps.max(POOL)));
    for step in 0..steps + WARM_UP {
        let shares = balance.shares_of(&batch);
        let numbers = StepNumbers {
            step: warmed_up + step as u64 + 1,
            lr: workload.optimizer.lr,
            key: StepKey::new(1, step as u64),
            divisor: batch.weight,
        };
        let start = Instant::now();
        let stepped = group.step(&batch, &shares, carried.as_mut(), numbers)?;
        let time = start.elapsed();
        if step < WARM_UP {
            autotune.after_step(&mut group)?;
        }
        let busy: Vec<Duration> = stepped.ranks.iter().map(|r| r.compute).collect();
        balance.observe(&batch, &shares, &busy);
        let most: u64 = stepped.ranks.iter().map(|r| r.bytes_sent).max().unwrap_or(0);
        if step >= WARM_UP {
            times.push(time.as_secs_f64());
            stepped.ranks.iter().for_each(|rank| ring += rank.ring);
            loss = stepped.loss / batch.weight;
        }
        if step + 1 == WARM_UP {
            sent = most;
        }
        if let Some(epoch) = &mut epoch {
            // Before the clock starts, some of it is seen; then it is spread evenly over the dense steps, whose neighbours on the machine it has too.
            let n = epoch.grouping.n_batches();
            let part = if step < WARM_UP { step..step + 1 } else { n * (step - WARM_UP) / steps..n * (step - WARM_UP + 1) / steps };
            for idx in part {
                let time = epoch.step(workload, &mut group, &balance, idx)?;
                if step >= WARM_UP {
                    epoch.seconds += time.as_secs_f64();
                } else {
                    autotune.after_step(&mut group)?;
                }
            }
        }
        if step + 1 == steps + WARM_UP {
            sent = (most - sent) / steps as u64;
        }
    }
    times.sort_by(f64::total_cmp);
    let median = median(&times);
    let of_waiting = |other: Duration| if other.is_zero() { 0.0 } else { ring.waited.as_secs_f64() / other.as_secs_f64() };
    let mut summary = Map::new();
    summary.insert("status".into(), json!("finished"));
    summary.insert("ms_per_step".into(), json!(median * 1e3));
    summary.insert("us_per_time_step".into(), json!(median * 1e6 / batch.n_steps as f64));
    summary.insert("tokens_per_second".into(), json!(batch.n_tokens as f64 / median));
    summary.insert("peak_rss_bytes".into(), json!(peak_rss_bytes()));
    summary.insert("bytes_sent_per_step".into(), json!(sent));
    summary.insert("ring_wait_share".into(), json!(of_waiting(ring.total)));
    if n_workers > 1 {
        summary.insert("ring_wait_over_unavoidable".into(), json!(of_waiting(ring.unavoidable)));
    }
    let names: Vec<Value> =
        group.devices().map(|(name, info)| json!({ "device": name, "name": info.name, "driver": info.driver })).collect();
    summary.insert("devices".into(), json!(names));
    summary.insert("parameters".into(), json!(group.table().n_parameters()));
    summary.insert("loss".into(), json!(loss));
    if let Some(epoch) = epoch {
        let dense = batch.n_tokens as f64 * steps as f64 / times.iter().sum::<f64>();
        let valid = epoch.n_tokens as f64 / epoch.seconds;
        let n_batches = epoch.grouping.n_batches();
        summary.insert("lengths".into(), json!("uniform"));
        summary.insert("batches".into(), json!(n_batches));
        summary.insert("ms_per_step".into(), json!(epoch.seconds * 1e3 / n_batches as f64));
        summary.insert("tokens_per_second".into(), json!(valid));
        summary.insert("dense_ms_per_step".into(), json!(median * 1e3));
        summary.insert("dense_tokens_per_second".into(), json!(dense));
        summary.insert("ratio".into(), json!(valid / dense));
        summary.insert("padding".into(), json!(1.0 - epoch.n_tokens as f64 / epoch.n_places as f64));
    }
    tell_variants(&autotune, &mut summary);
    let chosen = group.choices().clone();
    drop(group);
    let kernels = tracing::debug_span!("time kernels").in_scope(|| kernels(workload, &devices, measured, &chosen))?;
    summary.insert("kernels".into(), kernels);
    Ok(summary)
}

/// An epoch of sequences of unequal length, as a run would go through it.
struct Epoch {
    lengths: Vec<u32>,
    grouping: Grouping,
    /// Valid steps of all rows, and places of all batches.
    n_tokens: u64,
    n_places: u64,
    seconds: f64,
}

impl Epoch {
    fn new(workload: &Workload, n_batches: usize) -> Self {
        let mut random = Stream::new(StepKey::new(1, 0), Purpose::Test, 1, 0);
        let lengths: Vec<u32> = (0..n_batches * workload.n_rows).map(|_| 1 + random.below(workload.n_steps as u32)).collect();
        let grouping = Grouping::new(lengths.clone(), workload.n_rows, Order::Shuffled { seed: 1 });
        let n_tokens = lengths.iter().map(|&length| u64::from(length)).sum();
        let places = |idx: usize| {
            let rows = grouping.batch(0, idx);
            u64::from(lengths[rows[0] as usize]) * rows.len() as u64
        };
        let n_places = (0..n_batches).map(places).sum();
        Self { lengths, n_tokens, n_places, grouping, seconds: 0.0 }
    }

    /// One step; making the data up is not part of its time.
    fn step(&self, workload: &Workload, group: &mut Group, balance: &Balance, idx: usize) -> Result<Duration> {
        let rows = self.grouping.batch(0, idx);
        let batch = Arc::new(workload.batch_of(rows.iter().map(|&row| self.lengths[row as usize]).collect(), idx as u64));
        let shares = balance.shares_of(&batch);
        let step = idx as u64 + 1;
        let numbers = StepNumbers { step, lr: workload.optimizer.lr, key: StepKey::new(2, step), divisor: batch.weight.max(1.0) };
        let start = Instant::now();
        group.step(&batch, &shares, None, numbers)?;
        Ok(start.elapsed())
    }
}

/// How fast a device is: `gflops` in a product of 1024 x 1024 matrices, f32, and `gb_per_second` that it reads and writes in place, 64 MiB at a time.
///
/// # Errors
/// The device's.
pub fn measure(backend: &mut dyn Backend) -> Result<Map<String, Value>> {
    const N: usize = 1024;
    const WORDS: usize = 1 << 24;
    let mut matrix = |label: &str| backend.alloc(label, N * N);
    let (a, b, c) = (matrix("a")?, matrix("b")?, matrix("c")?);
    let place = Matrix::row_major(0, N);
    let n = N as u32;
    let product = Gemm { m: n, n, k: n, trans_a: 0, trans_b: 0, accumulate: 0, use_bias: 0, bias_offset: 0, a: place, b: place, c: place };
    let [a, b, c] = [a, b, c].map(|buffer| backend.whole(buffer));
    let seconds = time_of(backend, &mut |backend| backend.launch(&product, &[a, b, a, c]))?;
    let flops = 2.0 * (N as f64).powi(3) / seconds;
    let words = backend.alloc("words", WORDS)?;
    let words = backend.whole(words);
    let seconds = time_of(backend, &mut |backend| backend.launch(&Scale { len: WORDS as u32, offset: 0, a: 1.0 }, &[words]))?;
    let bytes = 8.0 * WORDS as f64 / seconds;
    [a, b, c, words].iter().for_each(|span| backend.free(span.buffer));
    Ok(Map::from_iter([("gflops".to_owned(), json!(flops / 1e9)), ("gb_per_second".to_owned(), json!(bytes / 1e9))]))
}

/// Seconds of one launch, from so many that they take a fifth of a second, once the first has built what is needed.
fn time_of(backend: &mut dyn Backend, launch: &mut dyn FnMut(&mut dyn Backend) -> Result<()>) -> Result<f64> {
    launch(backend)?;
    backend.wait(DEADLINE)?;
    let mut n_launches = 1;
    loop {
        let start = Instant::now();
        (0..n_launches).try_for_each(|_| launch(backend))?;
        backend.wait(DEADLINE)?;
        let seconds = start.elapsed().as_secs_f64();
        if seconds > 0.2 {
            return Ok(seconds / f64::from(n_launches));
        }
        n_launches *= 2;
    }
}

/// By kernel: launches and milliseconds a step on rank 0, from steps in which the device is waited for after every launch (so that their sum is above
/// the step's time, and short kernels carry the cost of the wait).
fn kernels(workload: &Workload, devices: &[Resolved], measured: Measured<'_>, chosen: &KindChoices) -> Result<Value> {
    let Measured { accumulate, compress, shard_optimizer, .. } = measured;
    const STEPS: u32 = 2;
    let notes = Notes::shared();
    let of_rank_0 = Arc::clone(&notes);
    let wrap: Wrap = Arc::new(move |rank, inner| if rank == 0 { Watched::timing(inner, &of_rank_0) } else { inner });
    let spec = GroupSpec { model: workload.model.clone(), optimizer: workload.optimizer, accumulate, compress, shard_optimizer };
    let mut group = Group::start(spec, devices, Some(&wrap))?;
    group.choose(chosen)?;
    let params = initial(&workload.model, group.table(), Init::Uniform(0.1), None, 1);
    let zeros: Vec<Vec<f32>> = params.iter().map(|p| vec![0.0; p.len()]).collect();
    group.load(params, vec![zeros; workload.optimizer.states().len()])?;
    let batch = Arc::new(workload.batch(1));
    let shares = Balance::fixed(vec![1.0; devices.len()]).shares(batch.n_rows);
    for step in 0..=STEPS {
        if step == 1 {
            // The first step built pipelines; its update counts as its own only when it is done.
            group.params_of(0)?;
            noted(&notes).kernels.clear();
        }
        let numbers = StepNumbers { step: u64::from(step) + 1, lr: workload.optimizer.lr, key: StepKey::new(1, 0), divisor: batch.weight };
        group.step(&batch, &shares, None, numbers)?;
    }
    // Ends the workers, so that the last update is counted.
    drop(group);
    Ok(of_kernels(&noted(&notes), STEPS))
}

/// By kernel: launches and milliseconds a step, the longest first.
fn of_kernels(notes: &Notes, steps: u32) -> Value {
    let mut rows: Vec<_> = notes.kernels.iter().collect();
    rows.sort_by_key(|row| std::cmp::Reverse(row.1.1));
    let row = |(name, (n, time)): (&&'static str, &(u32, Duration))| json!({ "kernel": name, "launches": n / steps, "ms": time.as_secs_f64() * 1e3 / f64::from(steps) });
    rows.into_iter().map(row).collect()
}

/// The process's largest resident memory so far, where the system tells it.
pub(in crate::train) fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}
