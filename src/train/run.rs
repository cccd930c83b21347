//! A run from configuration to trained model: epochs, evaluations, checkpoints, resume.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::balance::Balance;
use super::compression;
use super::devices::{self, Resolved};
use super::group::{Group, GroupSpec, KindChoices, NonFinite, RankStep, Regrouped, Safety, StepNumbers, Tensors, Wrap};
use super::memory;
use super::ring::Update;
use super::tuning::{Autotune, Told};
use crate::backend::{DeviceInfo, open};
use crate::compress::{Compressor, Held, Method};
use crate::data::Batch;
use crate::data::baselines::at_end;
use crate::data::prefetch::Prefetch;
use crate::data::series::Part;
use crate::data::time::Axis;
use crate::infer::evaluate::{Evaluation, Forward, evaluate, truth_at_end};
use crate::infer::generate::{GenerateOptions, generate};
use crate::infer::session::{Session, read_config, read_data};
use crate::infer::task::{Corpus, DATA_FILE, DataRecord, EvalSet, announced, model_config};
use crate::infer::warm::Warm;
use crate::model::init::initial;
use crate::model::state::Carried;
use crate::observe::plot::{self, ForecastPlot, Series as Curve, Times};
use crate::observe::sinks::{Metrics, Report, ReportFiles, TensorBoard, history, up_to};
use crate::observe::{Bus, CheckpointKind, Event, Exhibit, Level, RunInfo, StartDevice, Table, Throughput, format};
use crate::optim::schedule::{Plateau, Schedule, ScheduleKind};
use crate::params::ParamTable;
use crate::rng::StepKey;
use crate::store::checkpoint::{Checkpoint, NamedTensor};
use crate::store::config::{LossReduction, OnDeviceLoss, RunConfig, Task};
use crate::store::run_folder::{CONFIG, Entry, METRICS, RunFolder, SUMMARY, Select, Which};
use crate::usage::UsageError;

/// The page that tells how the run went.
pub const REPORT: &str = "report.html";
/// The folder within the run folder that TensorBoard's files go to.
pub const TENSORBOARD: &str = "tensorboard";
/// The file within the run folder that tells which variants of kernels were chosen, by kind of device.
pub const VARIANTS: &str = "variants.json";
/// A sample of text: its tokens, and what it may cost in all, in parameters times tokens.
const SAMPLE_TOKENS: usize = 300;
const SAMPLE_WORK: usize = 10_000_000_000;
/// Fewer tokens say nothing.
const SAMPLE_LEAST: usize = 20;

/// What is not part of a run's configuration.
pub struct RunOptions {
    pub out: PathBuf,
    /// Continue what is there; start where there is nothing yet.
    pub resume: bool,
    /// Replaces backends, for tests.
    pub wrap: Option<Wrap>,
}

/// How a run ended.
pub struct Outcome {
    /// By a signal, after a checkpoint.
    pub interrupted: bool,
    pub summary: Map<String, Value>,
    pub tables: Vec<Table>,
}

/// What a step depends on beside parameters, optimizer and carried state; the JSON of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Position {
    /// Steps done.
    step: u64,
    /// The next batch.
    epoch: u64,
    batch: u64,
    tokens: u64,
    schedule: Schedule,
    plateau: Plateau,
    balance: Balance,
    /// Sums over the epoch so far.
    epoch_loss: f64,
    epoch_weight: f64,
    /// The devices and the kinds that give the same bits.
    devices: Vec<String>,
    kinds: Vec<String>,
    /// The last loss of a step, and of an epoch.
    last_loss: Option<f64>,
    train_loss: Option<f64>,
    valid_loss: Option<f64>,
    /// The lowest loss of an evaluation, and evaluations since then.
    #[serde(default)]
    lowest: Option<f64>,
    #[serde(default)]
    n_worse: u64,
    /// Nothing is left to do.
    finished: bool,
    /// Variants of kernels that were chosen by measuring, by kind of device.
    #[serde(default)]
    variants: KindChoices,
}

/// The workers as evaluation sees them.
struct Together<'g> {
    group: &'g mut Group,
    balance: &'g mut Balance,
    /// What became of the ring meanwhile.
    regrouped: &'g mut Vec<Regrouped>,
}

impl Balance {
    /// The shares of those who are in the ring now; who was cramped gets three quarters of what was too much, and at least a row less.
    fn follow(&mut self, regrouped: &Regrouped) {
        let lost: Vec<usize> = regrouped.lost.iter().map(|loss| loss.rank).collect();
        self.remove(&lost);
        for cramped in &regrouped.cramped {
            self.bound(cramped.rank, (cramped.n_rows * 3 / 4).min(cramped.n_rows.saturating_sub(1)));
        }
    }
}

impl Forward for Together<'_> {
    fn forward(&mut self, batch: &Arc<Batch>, carried: Option<&mut Carried>, wants_outputs: bool) -> Result<(f64, Vec<f32>)> {
        let mut carried = carried;
        loop {
            let shares = self.balance.eval_shares_of(batch);
            let error = match self.group.evaluate(batch, &shares, carried.as_deref_mut(), wants_outputs) {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            let regrouped = error.downcast::<Regrouped>()?;
            self.balance.follow(&regrouped);
            self.regrouped.push(regrouped);
        }
    }

    fn carried(&self, n_streams: usize) -> Carried {
        Carried::new(&self.group.spec().model, n_streams)
    }
}

/// Settles `--devices` and `--balance` on this machine. Lines tell what was chosen and why.
///
/// # Errors
/// A device that does not exist; weights that do not match the workers.
pub fn settle(devices: &str, balance: &str) -> Result<(Vec<Resolved>, Balance, Vec<String>)> {
    let parsed = devices::parse(devices)?;
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (devices, mut reasons) = devices::resolve(&parsed, devices::adapters, n_cores)?;
    let world = devices.len();
    let alike = devices.windows(2).all(|w| w[0].spec == w[1].spec);
    let balance = match devices::parse_balance(balance, Some(world))? {
        devices::Balance::Equal => Balance::fixed(vec![1.0; world]),
        devices::Balance::Default if alike => Balance::fixed(vec![1.0; world]),
        devices::Balance::Weights(weights) => Balance::fixed(weights),
        devices::Balance::Default | devices::Balance::Auto => {
            reasons.push("shares follow measured speed (--balance equal fixes them)".to_owned());
            Balance::measured(world)
        }
    };
    Ok((devices, balance, reasons))
}

/// Trains.
///
/// # Errors
/// What is wrong with configuration, data, devices or the run folder; a run that turned non-finite (the last good checkpoint stays).
pub fn run(config: RunConfig, options: RunOptions, bus: &mut Bus, stop: &AtomicBool) -> Result<Outcome> {
    run_tuned(config, options, &|is_on| Autotune::of_user(is_on), bus, stop)
}

/// [`run()`] with another cache of variants than the user's; `autotune` is told whether the run measures any.
///
/// # Errors
/// As [`run()`].
pub fn run_tuned(
    config: RunConfig,
    options: RunOptions,
    autotune: &dyn Fn(bool) -> Autotune,
    bus: &mut Bus,
    stop: &AtomicBool,
) -> Result<Outcome> {
    // What can be wrong with data and devices is looked at before a folder is made: a start that fails leaves nothing behind.
    let begun = options.resume && RunFolder::is_begun(&options.out)?;
    let mut config = config;
    let mut found = None;
    if begun {
        let mut folder = RunFolder::open(&options.out)?;
        folder.take_warnings().into_iter().for_each(|w| bus.warn(w));
        config = continued(config, read_config(&folder)?)?;
        let (checkpoint, warnings) = folder.load_newest()?;
        warnings.into_iter().for_each(|w| bus.warn(w));
        if !is_imported(&checkpoint)
            && let Some(outcome) = finished(&folder, &config, &position_of(&checkpoint)?)
        {
            return Ok(outcome);
        }
        let data = read_data(&folder)?;
        found = Some((folder, checkpoint, data));
    } else if !options.resume {
        RunFolder::check_free(&options.out)?;
    }
    let recorded = found.as_ref().map(|(_, _, data)| data);
    announced(&config).into_iter().for_each(|text| bus.log(Level::Info, &text));
    let warm = config.init_from.as_ref().filter(|_| !begun).map(|from| Warm::open(Path::new(from))).transpose()?;
    let known = recorded.map(|data| &data.spec).or(warm.as_ref().and_then(Warm::text_spec));
    let corpus = Corpus::load(&config, known)?;
    if let Some(fingerprint) = recorded.and_then(|data| data.fingerprint.as_ref()) {
        corpus.check_unchanged(fingerprint)?;
    }
    corpus.warnings().into_iter().for_each(|w| bus.warn(w));
    let (batches, notes) = corpus.train_batches(&config)?;
    notes.iter().for_each(|note| bus.log(Level::Info, note));
    let spec = corpus.spec();
    let model = model_config(&config, &spec);
    model.check()?;

    let (devices, mut balance, reasons) = settle(&config.devices, &config.balance)?;
    reasons.iter().for_each(|reason| bus.log(Level::Info, reason));
    let (accumulate, compress) = (config.accumulate, config.compress);
    let group_spec =
        GroupSpec { model: model.clone(), optimizer: config.optimizer, accumulate, compress, shard_optimizer: config.shard_optimizer };
    told_of_compression(&config, &model.table(), devices.len(), bus)?;
    let (n_steps, n_rows) = batches.largest()?;
    let (memory_limits, bounds) = memory::bounds(&group_spec, &devices, &config.memory_limit, [n_steps, n_rows], &mut balance)?;
    bounds.iter().for_each(|bound| bus.log(Level::Info, bound));
    let survives = config.on_device_loss == OnDeviceLoss::Continue;
    let safety = Safety { survives, deadline: Duration::from_secs(config.deadline), memory_limits, tap: None };
    let mut group = Group::start_safe(group_spec, &devices, safety, options.wrap.as_ref())?;
    let frozen = frozen(&config.freeze, &model.table())?;
    if !frozen.is_empty() {
        let n: usize = frozen.iter().map(|&tensor| group.table().tensors()[tensor].layout.torch_len()).sum();
        bus.log(Level::Info, &format!("{} parameters are not trained", format::count(n as u64)));
        group.freeze(frozen)?;
    }
    let kinds: Vec<String> = group.devices().map(|(_, info)| info.kind.clone()).collect();
    if group.update() == Update::ByOwner {
        let why = if config.shard_optimizer { "--shard-optimizer" } else { "devices differ in kind" };
        bus.log(Level::Detail, &format!("{why}: the owner of each segment updates it"));
    }
    bus.log(Level::Info, &format!("{} parameters on {}", format::count(group.table().n_parameters() as u64), describe(&group)));

    let n_batches = batches.n_batches();
    let end = End { epochs: config.epochs, steps: config.max_steps, worse: config.early_stop };
    let total = end.total_steps(n_batches);
    let mut position = Position {
        step: 0,
        epoch: 0,
        batch: 0,
        tokens: 0,
        schedule: config.schedule.over(n_batches, total),
        plateau: Plateau::default(),
        balance,
        epoch_loss: 0.0,
        epoch_weight: 0.0,
        devices: devices.iter().map(|d| d.spec.clone()).collect(),
        kinds: kinds.clone(),
        last_loss: None,
        train_loss: None,
        valid_loss: None,
        lowest: None,
        n_worse: 0,
        finished: false,
        variants: KindChoices::new(),
    };
    let mut state = (corpus.n_streams(&config) > 0).then(|| Carried::new(&model, corpus.n_streams(&config)));
    let valid = corpus.eval_set(&config, Part::Valid)?;
    let began = position.balance.clone();
    while let Err(error) = group.reserve(n_steps, &position.balance.shares(n_rows)) {
        let regrouped = error.downcast::<Regrouped>()?;
        // A device that does not even begin is for the person to look after.
        if !regrouped.lost.is_empty() {
            return Err(regrouped.into());
        }
        position.balance.follow(&regrouped);
        position.balance.check(n_rows).with_context(|| regrouped.to_string())?;
        bus.warn(format!("{regrouped}: shares are now {}", rows_of(&position.balance, n_rows)));
    }
    let folder = match found {
        Some((folder, checkpoint, _)) => {
            let mut held = Vec::new();
            let (params, states) = if is_imported(&checkpoint) {
                let mut checkpoint = checkpoint;
                let params = checkpoint.take_model(group.table().tensors())?;
                let zeros: Tensors = params.iter().map(|values| vec![0.0; values.len()]).collect();
                (params, vec![zeros; config.optimizer.states().len()])
            } else {
                restore(checkpoint, &mut position, state.as_mut(), &group, &config, &mut held, bus)?
            };
            group.load(params, states)?;
            group.hold(&held)?;
            folder.retain_lines(METRICS, up_to(position.step))?;
            folder
        }
        None => {
            let mut params = initial(&model, group.table(), config.init, config.gate_bias, config.seed);
            if let (Some(warm), Some(from)) = (warm, &config.init_from) {
                let fresh = warm.apply(group.table(), &spec, &mut params)?;
                if !fresh.is_empty() {
                    bus.warn(format!("{from} has nothing that fits for {}: they start as --init says", fresh.join(", ")));
                }
            }
            let zeros: Tensors = group.table().tensors().iter().map(|t| vec![0.0; t.layout.torch_len()]).collect();
            group.load(params, vec![zeros; config.optimizer.states().len()])?;
            let mut folder = if options.resume { RunFolder::open_or_create(&options.out)? } else { RunFolder::create(&options.out)? };
            folder.take_warnings().into_iter().for_each(|w| bus.warn(w));
            UsageError::unless(!folder.has_checkpoints(), || {
                format!("another process has begun a run in {} meanwhile: resume it", folder.path().display())
            })?;
            let record = DataRecord { spec, fingerprint: Some(corpus.fingerprint()?) };
            folder.write_file(DATA_FILE, serde_json::to_string(&record)?.as_bytes())?;
            folder.retain_lines(METRICS, |_| false)?;
            folder
        }
    };
    let mut autotune = autotune(!config.no_autotune);
    let told = autotune.begin(&mut group, &position.variants)?;
    told.warnings.into_iter().for_each(|warning| bus.warn(warning));
    position.variants = group.choices().clone();
    keep_variants(&folder, &position.variants, bus);
    folder.write_file(CONFIG, toml::to_string_pretty(&config).context("the configuration cannot be written as TOML")?.as_bytes())?;
    if begun && let Some(warning) = rate_is_gone(&position, total) {
        bus.warn(warning);
    }
    bus.add(Box::new(Metrics::open(&folder.file_path(METRICS)?)?));
    let files = ReportFiles { page: folder.file_path(REPORT)?, config: folder.file_path(CONFIG)?, metrics: folder.file_path(METRICS)? };
    bus.add(Box::new(Report::new(files)));
    if config.tensorboard {
        bus.add(Box::new(TensorBoard::create(&folder.file_path(TENSORBOARD)?)?));
    }
    let perplexity = config.task == Task::Lm;
    let names = position.devices.clone();
    bus.begin(&RunInfo { first_step: position.step, total_steps: total, total_epochs: config.epochs, perplexity, devices: names });
    bus.send(&start_event(&group, position.step));
    let n_seats = devices.len();
    let mut trainer = Trainer {
        config: &config,
        folder,
        group,
        began,
        gone: vec![None; n_seats],
        n_rows,
        position,
        state,
        valid,
        bus,
        n_batches,
        end,
        start: Instant::now(),
        tokens_before: 0,
        meter: Meter::new(n_seats),
        seats: vec![RankTotal::default(); n_seats],
        last: None,
        data_wait: Duration::ZERO,
        autotune,
    };
    trainer.tokens_before = trainer.position.tokens;
    let interrupted = trainer.train(batches, &corpus, stop).map_err(|e| trainer.explain(e))?;
    trainer.finish(&corpus, interrupted)
}

/// What there is to say of `--compress` before a run begins.
///
/// # Errors
/// It would make nothing smaller.
fn told_of_compression(config: &RunConfig, table: &ParamTable, world: usize, bus: &mut Bus) -> Result<(), UsageError> {
    let method = config.compress;
    if method == Method::None {
        return Ok(());
    }
    UsageError::unless(Compressor::n_tensors(method, table) > 0, || {
        format!(
            "--compress {method} makes no tensor of this model smaller (vectors and small matrices go whole): leave it out, or lower its rank"
        )
    })?;
    if world == 1 {
        bus.warn(format!("--compress {method} does nothing with one worker, which sends nothing"));
    } else if let Some(why) = compression::unsuited(method, &config.optimizer) {
        bus.warn(why);
    }
    Ok(())
}

/// Writes down which variants were chosen, if any were; the checkpoints hold them too.
fn keep_variants(folder: &RunFolder, variants: &KindChoices, bus: &mut Bus) {
    if variants.is_empty() {
        return;
    }
    let written = serde_json::to_vec_pretty(variants).context("no JSON").and_then(|bytes| Ok(folder.write_file(VARIANTS, &bytes)?));
    if let Err(error) = written {
        bus.warn(format!("{VARIANTS} was not written: {error:#}"));
    }
}

/// `9:3:1`: the rows of each rank.
fn rows_of(balance: &Balance, n_rows: usize) -> String {
    balance.shares(n_rows).iter().map(|share| share.len().to_string()).collect::<Vec<_>>().join(":")
}

/// What runs from `step` on, and where.
fn start_event(group: &Group, step: u64) -> Event {
    let device = |(device, info): (&str, &DeviceInfo)| StartDevice {
        device: device.to_owned(),
        name: info.name.clone(),
        driver: info.driver.clone(),
    };
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    Event::Start {
        step,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        system: format!("{} {}, {n_cores} cores", std::env::consts::OS, std::env::consts::ARCH),
        parameters: group.table().n_parameters() as u64,
        devices: group.devices().map(device).collect(),
    }
}

/// `cpu:2 (AMD EPYC)`, ...
fn describe(group: &Group) -> String {
    group.devices().map(|(name, info)| format!("{name} ({})", info.name)).collect::<Vec<_>>().join(", ")
}

/// The configuration of a resumed run: the recorded one, with what may differ taken from what is asked now.
fn continued(asked: RunConfig, recorded: RunConfig) -> Result<RunConfig> {
    let mut kept = recorded;
    (kept.devices, kept.balance) = (asked.devices.clone(), asked.balance.clone());
    (kept.epochs, kept.max_steps) = (asked.epochs, asked.max_steps);
    (kept.log_every, kept.eval_every, kept.checkpoint_every) = (asked.log_every, asked.eval_every, asked.checkpoint_every);
    (kept.on_device_loss, kept.rejoin, kept.deadline) = (asked.on_device_loss, asked.rejoin, asked.deadline);
    kept.shard_optimizer = asked.shard_optimizer;
    (kept.tensorboard, kept.memory_limit) = (asked.tensorboard, asked.memory_limit.clone());
    kept.no_autotune = asked.no_autotune;
    let (typed, recorded) = (serde_json::to_value(&asked)?, serde_json::to_value(&kept)?);
    let differing: Vec<String> = typed
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, value)| recorded.get(key.as_str()) != Some(*value))
        .map(|(key, value)| format!("--{} {value} (recorded: {})", key.replace('_', "-"), recorded.get(key).unwrap_or(&Value::Null)))
        .collect();
    UsageError::unless(differing.is_empty(), || {
        format!(
            "a resumed run keeps its configuration, but {} differ: leave them out, or start another run with another --out",
            differing.join(", ")
        )
    })?;
    Ok(kept)
}

/// The tensors that the patterns name.
fn frozen(patterns: &[String], table: &ParamTable) -> Result<Vec<usize>, UsageError> {
    let names: Vec<&str> = table.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
    let mut frozen = vec![false; names.len()];
    for pattern in patterns {
        let glob = glob::Pattern::new(pattern).map_err(|e| UsageError(format!("--freeze {pattern} is no pattern: {e}")))?;
        let hits: Vec<usize> = (0..names.len()).filter(|&i| glob.matches(names[i])).collect();
        UsageError::unless(!hits.is_empty(), || format!("--freeze {pattern} fits no tensor of the model: it has {}", names.join(", ")))?;
        hits.into_iter().for_each(|i| frozen[i] = true);
    }
    UsageError::unless(frozen.contains(&false), || format!("--freeze {} leaves nothing to train: name fewer tensors", patterns.join(",")))?;
    Ok((0..names.len()).filter(|&i| frozen[i]).collect())
}

/// When a run is over.
#[derive(Clone, Copy, Debug)]
pub(super) struct End {
    pub epochs: Option<u64>,
    pub steps: Option<u64>,
    /// Evaluations in a row that found no lower loss.
    pub worse: Option<u64>,
}

impl End {
    /// Steps in all, where that is limited.
    pub fn total_steps(self, n_batches: u64) -> Option<u64> {
        let by_epochs = self.epochs.map(|e| e * n_batches);
        match (by_epochs, self.steps) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    fn reached(self, position: &Position) -> bool {
        self.epochs.is_some_and(|e| position.epoch >= e) || self.steps.is_some_and(|s| position.step >= s) || self.is_stalled(position)
    }

    fn is_stalled(self, position: &Position) -> bool {
        self.worse.is_some_and(|n| position.n_worse >= n)
    }
}

/// An imported model has parameters and nothing else: it is where training begins.
fn is_imported(checkpoint: &Checkpoint) -> bool {
    checkpoint.meta.get("imported").is_some()
}

fn position_of(checkpoint: &Checkpoint) -> Result<Position> {
    serde_json::from_value(checkpoint.meta["position"].clone()).context("the checkpoint's position is not of this version")
}

/// What a run that has nothing left to do came to, as it was kept; its data may be gone.
fn finished(folder: &RunFolder, config: &RunConfig, position: &Position) -> Option<Outcome> {
    let end = End { epochs: config.epochs, steps: config.max_steps, worse: config.early_stop };
    if !position.finished || !end.reached(position) {
        return None;
    }
    // Without one, as after a kill before it was written, it is worked out again.
    let mut summary: Map<String, Value> = serde_json::from_slice(&folder.read_file(SUMMARY).ok()?).ok()?;
    if summary.get("steps").and_then(Value::as_u64) != Some(position.step) {
        return None;
    }
    summary.insert("run".into(), json!(folder.path()));
    let table = losses_table(config, &summary).pairs("Run", [("run folder", folder.path().display().to_string())]);
    Some(Outcome { interrupted: false, summary, tables: vec![table] })
}

/// Says so where a resumed run goes on beyond a schedule that ends at a rate of zero.
fn rate_is_gone(position: &Position, total: Option<u64>) -> Option<String> {
    let Schedule { kind: ScheduleKind::Cosine, horizon, .. } = position.schedule else { return None };
    let ended = position.step >= horizon;
    (horizon < u64::MAX && total.is_none_or(|total| total > horizon && total > position.step)).then(|| {
        let (ends, there) = if ended { ("ended", "here") } else { ("ends", "there") };
        format!("the schedule {ends} at step {horizon}: the learning rate is 0 from {there}; start another run to go on learning")
    })
}

fn losses_table(config: &RunConfig, summary: &Map<String, Value>) -> Table {
    let number = |key: &str| summary.get(key).and_then(Value::as_f64).map_or_else(|| "-".to_owned(), |v| format::number(v, 4));
    let mut losses = vec![("train", number("train_loss")), ("validation", number("valid_loss")), ("test", number("test_loss"))];
    if let Some(perplexity) = summary.get("perplexity").and_then(Value::as_f64) {
        losses.push(("test perplexity", format::number(perplexity, 4)));
    }
    if !matches!(config.task, Task::Lm | Task::Forecast) {
        let scores = [
            ("/accuracy", "test accuracy"),
            ("/baselines/majority", "accuracy of the commonest class"),
            ("/baselines/frequency", "loss of each note's own frequency"),
            ("/macro_f1", "test macro F1"),
            ("/rmse/model", "test RMSE, the label's unit"),
            ("/rmse/mean", "RMSE of the mean"),
            ("/wrong", "further off than --tolerance"),
            ("/of", "of"),
        ];
        let summary = Value::Object(summary.clone());
        let found = scores.iter().filter_map(|(at, name)| Some((*name, format::number(summary.pointer(at)?.as_f64()?, 4))));
        losses.extend(found);
    }
    let unit = match config.task {
        Task::Lm => "Loss, nats a token",
        Task::Classify => "Loss, nats a sequence",
        Task::Tag => "Loss, nats a step",
        Task::Frames => "Negative log-likelihood, nats a frame",
        Task::Forecast if config.quantiles.is_some() => "Loss, quantile loss on the normalised scale",
        Task::Forecast | Task::Regress => "Loss, squared error on the normalised scale",
    };
    Table::new(format!("Run {}", summary.get("status").and_then(Value::as_str).unwrap_or_default())).pairs(unit, losses)
}

/// The carried h (`which` 0) or c (1) of a lane in a checkpoint: `[streams, units]`.
fn state_name(which: usize, lane: usize) -> String {
    format!("state.{}_{lane}", ["h", "c"][which])
}

/// Takes a checkpoint apart: the position, parameters, optimizer state, carried state.
fn restore(
    mut checkpoint: Checkpoint,
    position: &mut Position,
    state: Option<&mut Carried>,
    group: &Group,
    config: &RunConfig,
    held: &mut Vec<Vec<Held>>,
    bus: &mut Bus,
) -> Result<(Tensors, Vec<Tensors>)> {
    let fresh = std::mem::replace(position, position_of(&checkpoint)?);
    let is_same = position.devices == fresh.devices;
    *held = compression::taken(&mut checkpoint, group.table(), position.devices.len(), group.world(), is_same)?;
    if !is_same && group.world() == 1 && held.iter().any(|held| !held.is_empty()) {
        bus.warn(format!("what --compress {} had not sent yet is left out: there is one worker now, which sends nothing", config.compress));
    }
    if position.devices == fresh.devices && position.kinds != fresh.kinds {
        bus.warn(
            "an adapter, a driver or an instruction set has changed since the checkpoint: the run goes on, but not with the same bits",
        );
    }
    if position.devices != fresh.devices || position.balance.follows() != fresh.balance.follows() || !fresh.balance.follows() {
        position.balance = fresh.balance;
    } else {
        position.balance.bound_as(&fresh.balance);
    }
    (position.devices, position.kinds) = (fresh.devices, fresh.kinds);
    position.finished = false;
    let tensors = group.table().tensors();
    let params = checkpoint.take_model(tensors)?;
    let mut take =
        |prefix: &str| tensors.iter().map(|t| checkpoint.take(&format!("{prefix}{}", t.name), &t.shape)).collect::<Result<Tensors, _>>();
    let names = config.optimizer.states();
    let states = names.iter().map(|name| take(&format!("optimizer.{name}."))).collect::<Result<Vec<_>, _>>()?;
    if let Some(state) = state {
        for (lane, units) in group.spec().model.state_units().into_iter().enumerate() {
            for (which, units) in units.into_iter().enumerate() {
                state.set_unpadded(which, lane, &checkpoint.take(&state_name(which, lane), &[state.n_streams(), units])?);
            }
        }
    }
    Ok((params, states))
}

/// Tokens a second over the last seconds of training, of all ranks and of each; evaluations are left out.
struct Meter {
    start: Instant,
    paused: Duration,
    all: Throughput,
    /// By seat.
    seats: Vec<Throughput>,
    last_tick: Instant,
}

/// How far back speed is measured.
const RATE_WINDOW: Duration = Duration::from_secs(10);
/// Time between two signs of life.
const TICK_EVERY: Duration = Duration::from_millis(100);

impl Meter {
    fn new(n_seats: usize) -> Self {
        let start = Instant::now();
        let meter = Throughput::new(RATE_WINDOW, start);
        Self { start, paused: Duration::ZERO, seats: vec![meter.clone(); n_seats], all: meter, last_tick: start }
    }

    /// `seats` are those of the ranks.
    fn add(&mut self, n_tokens: u64, shares: &[Range<usize>], seats: &[usize]) {
        let now = self.start + self.start.elapsed().saturating_sub(self.paused);
        self.all.add(now, n_tokens);
        let n_rows: usize = shares.iter().map(Range::len).sum();
        for (seat, worker) in self.seats.iter_mut().enumerate() {
            let n_own = seats.iter().position(|&other| other == seat).map_or(0, |rank| shares[rank].len());
            worker.add(now, n_tokens * n_own as u64 / n_rows.max(1) as u64);
        }
    }

    fn rate(&self) -> f64 {
        self.all.per_second().unwrap_or(0.0)
    }

    fn by_seat(&self) -> Vec<f64> {
        self.seats.iter().map(|worker| worker.per_second().unwrap_or(0.0)).collect()
    }

    /// Whether a sign of life is due.
    fn tick(&mut self) -> bool {
        let due = self.last_tick.elapsed() >= TICK_EVERY;
        if due {
            self.last_tick = Instant::now();
        }
        due
    }
}

struct Trainer<'a> {
    config: &'a RunConfig,
    folder: RunFolder,
    group: Group,
    /// Shares as the run began, by seat.
    began: Balance,
    /// By seat: why and when a device was lost that is not back.
    gone: Vec<Option<(u64, String)>>,
    /// Of the largest batch.
    n_rows: usize,
    position: Position,
    state: Option<Carried>,
    valid: Option<EvalSet>,
    bus: &'a mut Bus,
    n_batches: u64,
    end: End,
    start: Instant,
    tokens_before: u64,
    meter: Meter,
    /// Totals of the workers over this process's steps, by their places in the list of devices: a rank may change, that does not.
    seats: Vec<RankTotal>,
    /// The last batch and what each seat had of it.
    last: Option<(Arc<Batch>, SeatShares)>,
    data_wait: Duration,
    autotune: Autotune,
}

/// Rows of a batch by seat, of those who had any part in it.
type SeatShares = Vec<(usize, Range<usize>)>;

#[derive(Clone, Copy, Default)]
struct RankTotal {
    tokens: u64,
    last: RankStep,
    /// Bytes that the last step sent.
    sent_last: u64,
    compute: Duration,
    waited: Duration,
}

impl Trainer<'_> {
    /// Steps until the end or a signal; true after a signal.
    fn train(&mut self, batches: Arc<dyn crate::data::Batches>, corpus: &Corpus, stop: &AtomicBool) -> Result<bool> {
        if self.end.reached(&self.position) {
            return Ok(false);
        }
        let end_epoch = self.config.epochs.unwrap_or(u64::MAX);
        let mut prefetch = Prefetch::new(batches, self.position.epoch, self.position.batch, 3, end_epoch)?;
        while !self.end.reached(&self.position) {
            if stop.load(Ordering::Relaxed) {
                self.checkpoint(CheckpointKind::Final, None)?;
                return Ok(true);
            }
            let Some(next) = tracing::debug_span!("data").in_scope(|| prefetch.next()) else { break };
            let (epoch, idx, batch) = next?;
            ensure!((epoch, idx) == (self.position.epoch, self.position.batch), "the data came out of order: {epoch}/{idx}");
            self.step(Arc::new(batch), corpus)?;
        }
        self.data_wait = prefetch.waited();
        Ok(false)
    }

    /// What is not finite says which checkpoint is good: one from whose parameters a step was taken, or at least a finite loss.
    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let Some(found) = error.downcast_ref::<NonFinite>() else { return error };
        let before = self.position.step + u64::from(found.in_gradient);
        let path = |entry: &Entry| self.folder.path().join(&entry.file).display().to_string();
        let good = self.folder.entries().iter().rev().find(|entry| entry.step < before).map(path);
        let bad = self.folder.last().filter(|entry| entry.step >= before).map(path);
        error.context(match (good, bad) {
            (Some(good), None) => format!("training stopped; the last good checkpoint is {good}"),
            (Some(good), Some(bad)) => format!("training stopped; the last good checkpoint is {good}, since this comes from {bad}"),
            (None, Some(bad)) => format!("training stopped; there is no good checkpoint, since this comes from {bad}"),
            (None, None) => "training stopped before the first checkpoint".to_owned(),
        })
    }

    /// Whether the run is looked at closely once the step about to be taken is done: as an epoch ends, at evaluations, and at the end.
    fn is_judged_after(&self, step: u64) -> bool {
        let at_epoch_end = self.position.batch + 1 == self.n_batches;
        let every = self.config.eval_every;
        at_epoch_end || (every > 0 && step.is_multiple_of(every)) || self.end.steps.is_some_and(|last| step >= last)
    }

    fn step(&mut self, batch: Arc<Batch>, corpus: &Corpus) -> Result<()> {
        if let Some(state) = self.state.as_mut().filter(|_| batch.resets) {
            state.reset();
        }
        let position = &self.position;
        let lr = self.config.optimizer.lr * position.schedule.factor(position.step, &position.plateau);
        let shares = position.balance.shares_of(&batch);
        let divisor = match self.config.loss_reduction {
            LossReduction::Mean => batch.weight.max(1.0),
            LossReduction::SumOverTime => batch.n_rows as f64,
        };
        if self.config.tensorboard && self.is_judged_after(position.step + 1) {
            self.group.want_gradients();
        }
        let numbers = StepNumbers { step: position.step + 1, lr, key: StepKey::new(self.config.seed, position.step + 1), divisor };
        let mut shares = shares;
        let stepped = loop {
            match self.group.step(&batch, &shares, self.state.as_mut(), numbers) {
                Ok(stepped) => break stepped,
                Err(error) => self.follow(error)?,
            }
            // The same step with the same data, cut anew; what the lost had carried lies here.
            shares = self.position.balance.shares_of(&batch);
        };
        let seats: Vec<usize> = (0..shares.len()).filter_map(|rank| self.group.seat(rank)).collect();
        let loss = stepped.loss / batch.weight.max(1.0);
        let position = &mut self.position;
        position.step += 1;
        position.batch += 1;
        position.tokens += batch.n_tokens;
        position.epoch_loss += stepped.loss;
        position.epoch_weight += batch.weight;
        position.last_loss = Some(loss);
        self.meter.add(batch.n_tokens, &shares, &seats);
        let times: Vec<Duration> = stepped.ranks.iter().map(|r| r.compute).collect();
        for ((&seat, rank), rows) in seats.iter().zip(&stepped.ranks).zip(&shares) {
            let total = &mut self.seats[seat];
            total.tokens += rows.clone().map(|row| batch.length(row) as u64).sum::<u64>();
            total.sent_last = rank.bytes_sent.saturating_sub(total.last.bytes_sent);
            total.last = *rank;
            total.compute += rank.compute;
            total.waited += rank.ring.waited;
        }
        self.last = Some((Arc::clone(&batch), seats.into_iter().zip(shares.iter().cloned()).collect()));
        if position.balance.observe(&batch, &shares, &times) {
            let (step, text) = (position.step, rows_of(&position.balance, self.config.batch_size));
            self.bus.log(Level::Info, &format!("step {step}: shares of the batch now {text}"));
        }
        let (step, epoch) = (position.step, position.epoch);
        let over = position.batch == self.n_batches;
        let is_last = self.end.steps.is_some_and(|n| step >= n) || (over && self.end.epochs.is_some_and(|n| epoch + 1 >= n));
        let is_reported = step % self.config.log_every.max(1) == 0 || step == 1 || is_last;
        if self.meter.tick() || is_reported {
            let (tokens_per_second, device_tokens_per_second) = (self.meter.rate(), self.meter.by_seat());
            let grad_norm = stepped.norm;
            let event = Event::Step { step, epoch: epoch + 1, loss, lr, tokens_per_second, grad_norm, device_tokens_per_second };
            if is_reported { self.bus.send(&event) } else { self.bus.tick(&event) }
        }
        if over {
            position.train_loss = Some(position.epoch_loss / position.epoch_weight.max(1.0));
            (position.epoch_loss, position.epoch_weight) = (0.0, 0.0);
            (position.epoch, position.batch) = (epoch + 1, 0);
        }
        self.tune()?;
        let mut done = self.end.reached(&self.position);
        let every = |n: u64| if n == 0 { over } else { step % n == 0 };
        if self.config.hash_every > 0 && self.group.world() > 1 && (step % self.config.hash_every == 0 || done) {
            self.survive(|group| group.compare_replicas(step))?;
        }
        let evaluated = if every(self.config.eval_every) || over || done { self.evaluate_valid()? } else { None };
        if !done && self.end.is_stalled(&self.position) {
            done = true;
            self.bus.log(Level::Info, &format!("step {step}: {} evaluations found no lower loss, so the run ends", self.position.n_worse));
        }
        if !stepped.gradients.is_empty() {
            self.show_tensors(corpus, &stepped.gradients)?;
        }
        if over {
            let train_loss = self.position.train_loss.unwrap_or(f64::NAN);
            let seconds = self.start.elapsed().as_secs_f64();
            self.bus.send(&Event::Epoch { epoch: epoch + 1, step, train_loss, valid_loss: evaluated, seconds });
        } else if let Some(valid_loss) = evaluated {
            self.bus.send(&Event::Eval { step, valid_loss });
        }
        if done {
            self.position.finished = true;
            self.checkpoint(CheckpointKind::Final, evaluated)?;
        } else if every(self.config.checkpoint_every) || evaluated.is_some_and(|loss| self.is_best(loss)) {
            self.checkpoint(CheckpointKind::Periodic, evaluated)?;
        }
        Ok(())
    }

    /// Chooses variants for what the step has launched for the first time.
    fn tune(&mut self) -> Result<()> {
        let began = Instant::now();
        let told = loop {
            match self.autotune.after_step(&mut self.group) {
                Ok(told) => break told,
                Err(error) => self.follow(error)?,
            }
        };
        let Some(Told { lines, warnings }) = told else { return Ok(()) };
        lines.iter().for_each(|line| self.bus.log(Level::Detail, line));
        warnings.into_iter().for_each(|warning| self.bus.warn(warning));
        self.position.variants = self.group.choices().clone();
        keep_variants(&self.folder, &self.position.variants, self.bus);
        self.meter.paused += began.elapsed();
        Ok(())
    }

    fn is_best(&self, loss: f64) -> bool {
        self.config.select == Select::Best && self.folder.best().and_then(|b| b.valid_loss).is_none_or(|best| loss < best)
    }

    fn evaluate_valid(&mut self) -> Result<Option<f64>> {
        let Some(valid) = &self.valid else { return Ok(None) };
        let began = Instant::now();
        let mut regrouped = Vec::new();
        let mut together = Together { group: &mut self.group, balance: &mut self.position.balance, regrouped: &mut regrouped };
        let loss = evaluate(valid, &mut together)?.loss;
        regrouped.iter().for_each(|regrouped| self.note(regrouped));
        self.position.valid_loss = Some(loss);
        if self.position.lowest.is_none_or(|lowest| loss < lowest) {
            (self.position.lowest, self.position.n_worse) = (Some(loss), 0);
        } else {
            self.position.n_worse += 1;
        }
        if self.position.schedule.kind == ScheduleKind::Plateau {
            self.position.plateau.observe(loss, &self.position.schedule);
        }
        // Evaluation is not training's speed.
        self.meter.paused += began.elapsed();
        Ok(Some(loss))
    }

    fn checkpoint(&mut self, kind: CheckpointKind, valid_loss: Option<f64>) -> Result<()> {
        let _span = tracing::debug_span!("checkpoint").entered();
        if self.folder.last().is_some_and(|last| last.step == self.position.step) {
            return Ok(());
        }
        let (params, states, held) = self.survive(|group| Ok((group.params_of(0)?, group.states()?, group.held()?)))?;
        let returning = self.config.rejoin && kind != CheckpointKind::Final && !self.group.absent().is_empty();
        let of_peers = returning.then(|| (Arc::new(params.clone()), Arc::new(states.clone())));
        let table = self.group.table();
        let mut tensors = Vec::new();
        let mut add = |prefix: &str, values: Tensors| {
            for (tensor, data) in table.tensors().iter().zip(values) {
                tensors.push(NamedTensor { name: format!("{prefix}{}", tensor.name), shape: tensor.shape.clone(), data });
            }
        };
        if self.config.tied {
            let embedding = table.tensors().iter().position(|t| t.name == "embedding.weight");
            if let Some(at) = embedding {
                let (shape, data) = (table.tensors()[at].shape.clone(), params[at].clone());
                add("", params);
                tensors.push(NamedTensor { name: "head.weight".to_owned(), shape, data });
            }
        } else {
            add("", params);
        }
        for (name, values) in self.config.optimizer.states().iter().zip(states) {
            for (tensor, data) in table.tensors().iter().zip(values) {
                tensors.push(NamedTensor { name: format!("optimizer.{name}.{}", tensor.name), shape: tensor.shape.clone(), data });
            }
        }
        if let Some(state) = &self.state {
            for which in 0..2 {
                for (lane, data) in state.unpadded(which).into_iter().enumerate() {
                    let shape = vec![state.n_streams(), data.len() / state.n_streams().max(1)];
                    tensors.push(NamedTensor { name: state_name(which, lane), shape, data });
                }
            }
        }
        tensors.extend(compression::named(&held, table));
        if let Some(tensor) = tensors.iter().find(|t| t.data.iter().any(|value| !value.is_finite())) {
            let what = format!("tensor {} after step {}", tensor.name, self.position.step);
            let who = self.group.devices().map(|(name, _)| name).collect::<Vec<_>>().join(", ");
            return Err(NonFinite { what, who, in_gradient: false }.into());
        }
        let meta = json!({ "step": self.position.step, "position": self.position });
        let saved = self.folder.save(&Checkpoint { meta, tensors }, valid_loss, self.config.keep, self.config.select)?;
        saved.warnings.into_iter().for_each(|w| self.bus.warn(w));
        let kind = if saved.is_best && kind != CheckpointKind::Final { CheckpointKind::Best } else { kind };
        self.bus.send(&Event::Checkpoint { step: self.position.step, path: saved.path.display().to_string(), kind });
        if let Some((params, states)) = of_peers {
            self.readmit(&params, &states)?;
        }
        Ok(())
    }

    /// Takes back what devices are there again, with what the others have.
    fn readmit(&mut self, params: &Arc<Tensors>, states: &Arc<Vec<Tensors>>) -> Result<()> {
        let absent: Vec<(usize, String)> = self.group.absent().into_iter().map(|(seat, name)| (seat, name.to_owned())).collect();
        for (seat, name) in absent {
            let step = self.position.step;
            match self.group.readmit(seat, params, states) {
                Ok(rank) => {
                    self.position.balance.insert(rank, &self.began, seat);
                    self.gone[seat] = None;
                    self.take_stock();
                    let shares = rows_of(&self.position.balance, self.n_rows);
                    self.bus.warn(format!("step {step}: device {name} is back as rank {rank}, shares are now {shares}"));
                }
                Err(error) if error.is::<Regrouped>() => self.follow(error)?,
                Err(error) => self.bus.log(Level::Detail, &format!("step {step}: device {name} is not back: {error:#}")),
            }
        }
        Ok(())
    }

    /// Asks the workers until nobody is lost meanwhile.
    fn survive<T>(&mut self, mut ask: impl FnMut(&mut Group) -> Result<T>) -> Result<T> {
        loop {
            match ask(&mut self.group) {
                Ok(told) => return Ok(told),
                Err(error) => self.follow(error)?,
            }
        }
    }

    /// Goes on with those who are in the ring now; any other error stays one.
    fn follow(&mut self, error: anyhow::Error) -> Result<()> {
        let regrouped = error.downcast::<Regrouped>()?;
        self.position.balance.follow(&regrouped);
        self.note(&regrouped);
        self.position.balance.check(self.n_rows).with_context(|| regrouped.to_string())
    }

    /// Tells what became of the ring.
    fn note(&mut self, regrouped: &Regrouped) {
        self.take_stock();
        let step = self.position.step + 1;
        for loss in &regrouped.lost {
            self.gone[loss.seat] = Some((step, loss.why.clone()));
            let rate = self.meter.rate();
            self.device_event(loss.seat, &loss.name, rate);
        }
        let (n_left, shares) = (self.group.world(), rows_of(&self.position.balance, self.n_rows));
        let what = match n_left {
            1 => format!("{} goes on alone", self.position.devices.first().map_or("one device", String::as_str)),
            _ => format!("the {n_left} workers go on with shares of {shares}"),
        };
        let is_held = self.config.compress != Method::None && !regrouped.lost.is_empty();
        let left_out = match (is_held, n_left) {
            (false, _) => "nothing is left out",
            // What feeds nothing back holds nothing.
            (true, _) if !compression::settings(self.config.compress, &self.config.optimizer).feeds_back => "nothing is left out",
            (true, 1) => "nothing is left out but what --compress had not sent yet",
            (true, _) => "nothing is left out but what --compress had not sent yet of the lost",
        };
        self.bus.warn(format!("step {step}: {regrouped}; {what}, and {left_out}"));
    }

    /// Who is in the ring, as the checkpoint records it.
    fn take_stock(&mut self) {
        self.position.devices = self.group.devices().map(|(name, _)| name.to_owned()).collect();
        self.position.kinds = self.group.devices().map(|(_, info)| info.kind.clone()).collect();
    }

    /// The selected checkpoint's test, plots, summary and tables.
    fn finish(mut self, corpus: &Corpus, interrupted: bool) -> Result<Outcome> {
        let seconds = self.start.elapsed().as_secs_f64();
        let position = self.position.clone();
        let tokens = position.tokens - self.tokens_before;
        let rate = tokens as f64 / seconds.max(1e-9);
        let mut evaluation = None;
        if !interrupted {
            let selected = self.folder.load(Which::Selected)?;
            if selected.step()? != position.step || tokens == 0 {
                self.load_params(selected)?;
            }
            if let Some(test) = corpus.eval_set(self.config, Part::Test)? {
                let mut regrouped = Vec::new();
                let mut together = Together { group: &mut self.group, balance: &mut self.position.balance, regrouped: &mut regrouped };
                let of = self.folder.selected().map_or(position.step, |entry| entry.step);
                evaluation = Some(evaluate(&test, &mut together).with_context(|| format!("the test of the checkpoint of step {of}"))?);
                regrouped.iter().for_each(|regrouped| self.note(regrouped));
            }
        }
        let selected = self.folder.selected().cloned();
        let valid_loss = selected.as_ref().and_then(|s| s.valid_loss).or(position.valid_loss);
        let train_loss = position.train_loss.or(position.last_loss);
        let mut summary = Map::new();
        let status = if interrupted { "interrupted" } else { "finished" };
        summary.insert("status".into(), json!(status));
        summary.insert("task".into(), json!(self.config.task.name()));
        summary.insert("steps".into(), json!(position.step));
        summary.insert("epochs".into(), json!(position.epoch));
        summary.insert("tokens".into(), json!(position.tokens));
        summary.insert("seconds".into(), json!(seconds));
        summary.insert("tokens_per_second".into(), json!(rate));
        summary.insert("data_wait_share".into(), json!(self.data_share(seconds)));
        summary.insert("train_loss".into(), json!(train_loss));
        summary.insert("valid_loss".into(), json!(valid_loss));
        summary.insert("test_loss".into(), json!(evaluation.as_ref().map(|e| e.loss)));
        summary.insert("devices".into(), json!(position.devices));
        summary.insert("parameters".into(), json!(self.group.table().n_parameters()));
        let sent = |rank: fn(&RankTotal) -> u64| self.seats.iter().map(rank);
        summary.insert("compress".into(), json!(self.config.compress));
        summary.insert("bytes_sent".into(), json!(sent(|rank| rank.last.bytes_sent).sum::<u64>()));
        summary.insert("bytes_sent_per_step".into(), json!(sent(|rank| rank.sent_last).max()));
        summary.insert("selected_step".into(), json!(selected.as_ref().map(|s| s.step)));
        summary.insert("run".into(), json!(self.folder.path()));
        if let Some(evaluation) = &evaluation {
            summary.extend(evaluation.scores());
        }
        if !interrupted && let Err(e) = self.folder.write_file(SUMMARY, &serde_json::to_vec_pretty(&summary)?) {
            self.bus.warn(format!("the summary was not kept: {e}"));
        }
        self.device_events(rate);
        let of = if interrupted { position.step } else { selected.map_or(position.step, |entry| entry.step) };
        if let Err(e) = self.show_text(corpus, of) {
            self.bus.warn(format!("no sample of text was made: {e:#}"));
        }
        let plots = self.plots(corpus, evaluation.as_ref());
        let table = self.table(&summary, evaluation.as_ref(), seconds, &plots);
        Ok(Outcome { interrupted, summary, tables: vec![table] })
    }

    fn load_params(&mut self, mut checkpoint: Checkpoint) -> Result<()> {
        let tensors = self.group.table().tensors();
        let params = checkpoint.take_model(tensors)?;
        let zeros: Tensors = tensors.iter().map(|t| vec![0.0; t.layout.torch_len()]).collect();
        // Nothing is trained after this, so the optimizer's state does not matter.
        let states = vec![zeros; self.config.optimizer.states().len()];
        self.survive(|group| group.load(params.clone(), states.clone()))
    }

    fn device_events(&mut self, rate: f64) {
        let began = self.began_with();
        began.iter().enumerate().for_each(|(seat, (name, _))| self.device_event(seat, name, rate));
    }

    /// Every device of the list that the run began with, as asked for and by its own name.
    fn began_with(&self) -> Vec<(String, String)> {
        let ranks: Vec<(usize, (&str, &DeviceInfo))> =
            self.group.devices().enumerate().filter_map(|(rank, device)| Some((self.group.seat(rank)?, device))).collect();
        let living = ranks.into_iter().map(|(seat, (name, info))| (seat, (name.to_owned(), info.name.clone())));
        let absent = self.group.absent().into_iter().map(|(seat, name)| (seat, (name.to_owned(), "lost".to_owned())));
        let mut all: Vec<_> = living.chain(absent).collect();
        all.sort_by_key(|(seat, _)| *seat);
        all.into_iter().map(|(_, names)| names).collect()
    }

    fn device_event(&mut self, seat: usize, name: &str, rate: f64) {
        let all: u64 = self.seats.iter().map(|total| total.tokens).sum();
        let total = self.seats[seat];
        let share = total.tokens as f64 / all.max(1) as f64;
        let rows =
            |(batch, shares): &(Arc<Batch>, SeatShares)| Some(batch.rows(shares.iter().find(|(of, _)| *of == seat)?.1.clone()).weight);
        let weight = self.last.as_ref().and_then(rows);
        self.bus.send(&Event::Device {
            step: self.position.step,
            rank: seat as u64,
            name: name.to_owned(),
            share,
            loss: weight.filter(|&weight| weight > 0.0).map(|weight| total.last.loss / weight),
            tokens_per_second: rate * share,
            waited_seconds: total.waited.as_secs_f64(),
            bytes_sent: total.last.bytes_sent,
            lost: self.gone[seat].as_ref().map(|(_, why)| why.clone()),
        });
    }

    /// Lets the model, as it stands on the devices after `step`, write a little.
    fn show_text(&mut self, corpus: &Corpus, step: u64) -> Result<()> {
        let n_parameters = self.group.table().n_parameters();
        let length = (SAMPLE_WORK / n_parameters.max(1)).min(SAMPLE_TOKENS);
        if self.config.task != Task::Lm || length < SAMPLE_LEAST {
            return Ok(());
        }
        let params = self.survive(|group| group.params_of(0))?;
        let mut session = Session::with(self.config.clone(), corpus.spec(), step, &params, open::cpu(1)?)?;
        let options = GenerateOptions { prompt: String::new(), length, temperature: 0.8, top_k: None, seed: self.config.seed };
        let said = generate(&mut session, &options, &mut |_| ())?;
        self.bus.show(Exhibit::Text { step, text: said.get("text").and_then(Value::as_str).unwrap_or_default() });
        Ok(())
    }

    /// Shows parameters and gradients by tensor, the gates over the end of the validation part, and what a language model says now.
    fn show_tensors(&mut self, corpus: &Corpus, gradients: &Tensors) -> Result<()> {
        let began = Instant::now();
        let step = self.position.step;
        let params = self.survive(|group| group.params_of(0))?;
        for (kind, tensors) in [("parameters", &params), ("gradients", gradients)] {
            for (tensor, values) in self.group.table().tensors().iter().zip(tensors) {
                self.bus.show(Exhibit::Values { step, name: &format!("{kind}/{}", tensor.name), values });
            }
        }
        let n_directions = self.group.spec().model.n_directions();
        let gates = self.survive(|group| group.gates_of(0))?;
        for (lane, gates) in gates.iter().enumerate() {
            let reverse = if lane % n_directions == 1 { "_reverse" } else { "" };
            for (gate, values) in ["input", "forget", "cell", "output"].into_iter().zip(gates) {
                self.bus.show(Exhibit::Values { step, name: &format!("gates/l{}{reverse}/{gate}", lane / n_directions), values });
            }
        }
        if let Err(e) = self.show_text(corpus, step) {
            self.bus.warn(format!("no sample of text was made: {e:#}"));
        }
        self.meter.paused += began.elapsed();
        Ok(())
    }

    /// Draws what there is to draw; a picture that cannot be written is a warning.
    fn plots(&mut self, corpus: &Corpus, evaluation: Option<&Evaluation>) -> Vec<String> {
        let mut drawn = Vec::new();
        let dir = self.folder.path().to_owned();
        let curve = history(&dir.join(METRICS)).and_then(|history| {
            let series =
                [Curve { name: "training".into(), points: history.train }, Curve { name: "validation".into(), points: history.valid }];
            let label = match self.config.task {
                Task::Lm => "loss, nats a token",
                Task::Classify => "loss, nats a sequence",
                Task::Tag => "loss, nats a step",
                Task::Frames => "negative log-likelihood, nats a frame",
                Task::Forecast if self.config.quantiles.is_some() => "quantile loss, normalised",
                Task::Forecast | Task::Regress => "squared error, normalised",
            };
            plot::loss_curve(&dir.join("loss"), &series, "Loss", label)
        });
        match curve {
            Ok(()) => drawn.push("loss.png".to_owned()),
            Err(e) => self.bus.warn(format!("the loss curve was not drawn: {e:#}")),
        }
        if let (Corpus::Series(series), Some(forecast)) = (corpus, evaluation.and_then(Evaluation::forecast)) {
            let horizon = series.spec().horizon;
            let n_targets = series.spec().targets.len();
            let last = (horizon - 1) * n_targets;
            let name = series.spec().target_columns().next().map_or_else(String::new, |c| c.name.clone());
            let times = forecast.origins.iter().map(|&o| series.axis(o as usize + horizon));
            // All of a series are of one kind.
            let (dates, numbers): (Vec<Axis>, Vec<Axis>) = times.partition(|at| matches!(at, Axis::Date(_)));
            let dates: Vec<String> = dates.into_iter().filter_map(|at| if let Axis::Date(text) = at { Some(text) } else { None }).collect();
            let numbers = numbers.into_iter().filter_map(|at| if let Axis::Number(at) = at { Some(at) } else { None }).collect();
            let times = if dates.is_empty() { Times::Numbers(numbers) } else { Times::Text(dates) };
            let truth = forecast.origins.iter().map(|&o| truth_at_end(series, o).unwrap_or(f64::NAN)).collect();
            let errors = evaluation.map(|e| e.rmse(0)).unwrap_or_default();
            let best = errors.into_iter().skip(1).filter(|(_, rmse)| rmse.is_finite()).min_by(|a, b| a.1.total_cmp(&b.1));
            let plot = ForecastPlot {
                title: format!("{name}: held-out values and forecasts {horizon} steps ahead"),
                unit: format!("{name}, the data's unit"),
                times,
                truth,
                forecast: forecast.values.iter().map(|v| v[last]).collect(),
                baseline: best.map(|(name, _)| {
                    let values = at_end(series, &name, &forecast.origins);
                    (name, values)
                }),
            };
            self.bus.show(Exhibit::Forecast(&plot));
            match plot::forecast(&dir.join("forecast"), &plot) {
                Ok(()) => drawn.push("forecast.png".to_owned()),
                Err(e) => self.bus.warn(format!("the forecast was not drawn: {e:#}")),
            }
        }
        drawn
    }

    /// Share of the time that steps waited for data.
    fn data_share(&self, seconds: f64) -> f64 {
        self.data_wait.as_secs_f64() / seconds.max(1e-9)
    }

    fn table(&self, summary: &Map<String, Value>, evaluation: Option<&Evaluation>, seconds: f64, plots: &[String]) -> Table {
        let mut table = losses_table(self.config, summary);
        if let Some((evaluation, forecast)) = evaluation.and_then(|e| Some((e, e.forecast()?))) {
            let by_target: Vec<Vec<(String, f64)>> = (0..forecast.targets.len()).map(|k| evaluation.rmse(k)).collect();
            let rows = by_target.first().into_iter().flatten().enumerate().map(|(i, (name, _))| {
                let errors = by_target.iter().map(|rmse| format::number(rmse[i].1, 4));
                std::iter::once(name.clone()).chain(errors).collect()
            });
            let headings = match forecast.targets.as_slice() {
                [name] => vec![format!("RMSE of {name}, the data's unit")],
                several => several.iter().map(|name| format!("RMSE of {name}")).collect(),
            };
            let header: Vec<&str> = std::iter::once("forecast").chain(headings.iter().map(String::as_str)).collect();
            table = table.columns(format!("Error on the test part, {} steps ahead", self.config.horizon), &header, rows.collect());
        }
        table = evaluation.into_iter().fold(table, |table, evaluation| evaluation.judged.add_to(table));
        let rate = summary["tokens_per_second"].as_f64().unwrap_or(0.0);
        let all: u64 = self.seats.iter().map(|r| r.tokens).sum();
        let rows = self.began_with().into_iter().zip(&self.seats).zip(&self.gone).map(|(((name, info), total), gone)| {
            let share = total.tokens as f64 / all.max(1) as f64;
            vec![
                name,
                gone.as_ref().map_or(info, |(step, _)| format!("lost at step {step}")),
                format!("{:.1} %", 100.0 * share),
                format!("{}/s", format::rate(rate * share)),
                format!("{:.1} %", 100.0 * total.waited.as_secs_f64() / seconds.max(1e-9)),
                format::bytes(total.last.bytes_sent),
                format::bytes(total.sent_last),
            ]
        });
        let rows = rows.collect();
        table = table.columns("Devices", &["device", "name", "share", "tokens", "waiting", "sent", "a step"], rows);
        let wait = 100.0 * self.data_share(seconds);
        let mut last = vec![
            ("time", format::duration(seconds)),
            ("tokens", format!("{} ({}/s)", format::count(self.position.tokens), format::rate(rate))),
            ("waiting for data", format!("{wait:.1} %")),
            ("run folder", self.folder.path().display().to_string()),
        ];
        if self.config.compress != Method::None && self.seats.len() > 1 {
            last.push(("gradients sent as", self.config.compress.to_string()));
        }
        if !plots.is_empty() {
            last.push(("pictures", plots.join(", ")));
        }
        last.push(("report", REPORT.to_owned()));
        table.pairs("Run", last)
    }
}
