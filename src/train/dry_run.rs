//! What a run would take, found out without one: its memory on each device, its steps, and its time from a few steps that are measured.
//! Nothing is written.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::group::{Group, GroupSpec, KindChoices, Safety, StepNumbers, Wrap};
use super::memory;
use super::profile::peak_rss_bytes;
use super::run::{End, settle};
use super::tuning::Autotune;
use super::watched::{Notes, SharedNotes, Watched, noted};
use crate::data::series::Part;
use crate::infer::task::{Corpus, model_config};
use crate::model::init::initial;
use crate::model::state::Carried;
use crate::observe::{Bus, Level};
use crate::rng::StepKey;
use crate::store::RunFolder;
use crate::store::config::RunConfig;

/// Steps before the clock starts: pipelines are built, memory is touched.
const WARM_UP: u64 = 2;
/// Enough steps to judge by, and time in which they are taken.
const MOST_STEPS: u64 = 50;
const LONGEST: Duration = Duration::from_secs(3);

/// What training with this configuration would take: `parameters`, `memory` by worker, `steps_per_epoch`, `steps`, `seconds_per_step`, `seconds`.
///
/// # Errors
/// Whatever would stop the run before its first step: data, devices, a model that does not fit, `out` that holds a run.
pub fn dry_run(config: &RunConfig, out: Option<&Path>, bus: &mut Bus) -> Result<Map<String, Value>> {
    if let Some(out) = out {
        RunFolder::check_free(out)?;
    }
    let corpus = Corpus::load(config, None)?;
    corpus.warnings().into_iter().for_each(|warning| bus.warn(warning));
    let (batches, notes) = corpus.train_batches(config)?;
    notes.iter().for_each(|note| bus.log(Level::Info, note));
    let model = model_config(config, &corpus.spec());
    model.check()?;
    let (devices, mut balance, reasons) = settle(&config.devices, &config.balance)?;
    reasons.iter().for_each(|reason| bus.log(Level::Info, reason));
    let (accumulate, compress) = (config.accumulate, config.compress);
    let spec =
        GroupSpec { model: model.clone(), optimizer: config.optimizer, accumulate, compress, shard_optimizer: config.shard_optimizer };
    let (n_steps, n_rows) = batches.largest()?;
    let (memory_limits, bounds) = memory::bounds(&spec, &devices, &config.memory_limit, [n_steps, n_rows], &mut balance)?;
    bounds.iter().for_each(|bound| bus.log(Level::Info, bound));

    let watched: Vec<SharedNotes> = devices.iter().map(|_| Notes::shared()).collect();
    let of_ranks = watched.clone();
    let wrap: Wrap = Arc::new(move |rank, inner| Watched::memory(inner, &of_ranks[rank]));
    let mut group = Group::start_safe(spec, &devices, Safety { memory_limits, ..Safety::default() }, Some(&wrap))?;
    group.reserve(n_steps, &balance.shares(n_rows))?;
    let params = initial(&model, group.table(), config.init, config.gate_bias, config.seed);
    let zeros: Vec<Vec<f32>> = params.iter().map(|values| vec![0.0; values.len()]).collect();
    group.load(params, vec![zeros; config.optimizer.states().len()])?;

    let n_batches = batches.n_batches();
    let total = End { epochs: config.epochs, steps: config.max_steps, worse: None }.total_steps(n_batches);
    let n_streams = corpus.n_streams(config);
    let carried = |n: usize| (n > 0).then(|| Carried::new(&model, n));

    // What is known serves; nothing is written.
    let mut autotune = Autotune::of_user(!config.no_autotune).without_keeping();
    autotune.begin(&mut group, &KindChoices::new())?;
    let mut state = carried(n_streams);
    let (mut spent, mut n_tokens, mut n_measured) = (Duration::ZERO, 0, 0);
    for step in 0..WARM_UP + MOST_STEPS {
        // From all over the epoch, since batches may differ in length.
        let batch = Arc::new(batches.batch(0, (step * n_batches / (WARM_UP + MOST_STEPS)).min(n_batches - 1))?);
        let shares = balance.shares_of(&batch);
        let key = StepKey::new(config.seed, step + 1);
        let numbers = StepNumbers { step: step + 1, lr: config.optimizer.lr, key, divisor: batch.weight.max(1.0) };
        let start = Instant::now();
        let stepped = group.step(&batch, &shares, state.as_mut(), numbers)?;
        if step < WARM_UP {
            autotune.after_step(&mut group)?;
        } else {
            spent += start.elapsed();
            n_tokens += batch.n_tokens;
            n_measured += 1;
        }
        let times: Vec<Duration> = stepped.ranks.iter().map(|rank| rank.compute).collect();
        balance.observe(&batch, &shares, &times);
        if spent >= LONGEST {
            break;
        }
    }
    let per_step = spent.as_secs_f64() / f64::from(n_measured.max(1));

    // One batch of the validation part stands for all of them.
    let mut per_evaluation = 0.0;
    if let Some(valid) = corpus.eval_set(config, Part::Valid)? {
        let batch = Arc::new(valid.batches.batch(0, 0)?);
        let mut state = carried(valid.n_streams);
        let start = Instant::now();
        group.evaluate(&batch, &balance.eval_shares_of(&batch), state.as_mut(), false)?;
        per_evaluation = start.elapsed().as_secs_f64() * valid.batches.n_batches() as f64;
    }
    let n_evaluations = |steps: u64| steps.div_ceil(n_batches) + steps.checked_div(config.eval_every).unwrap_or(0);
    let seconds = total.map(|steps| steps as f64 * per_step + n_evaluations(steps) as f64 * per_evaluation);
    let shares = balance.shares(config.batch_size);
    let memory: Vec<Value> = group
        .devices()
        .zip(&watched)
        .zip(&shares)
        .map(|(((device, info), notes), rows)| {
            let notes = noted(notes);
            json!({
                "device": device,
                "name": info.name,
                "rows": rows.len(),
                "bytes": notes.bytes,
                "largest_buffer": notes.largest.0,
                "largest_bytes": notes.largest.1,
                "max_buffer_bytes": notes.limits.map(|limits| limits.max_buffer_bytes.min(limits.max_binding_bytes)),
            })
        })
        .collect();
    let summary = json!({
        "task": config.task.name(),
        "parameters": group.table().n_parameters(),
        "memory": memory,
        "peak_rss_bytes": peak_rss_bytes(),
        "available_bytes": available_bytes(),
        "steps_per_epoch": n_batches,
        "epochs": config.epochs,
        "steps": total,
        "measured_steps": n_measured,
        "seconds_per_step": per_step,
        "tokens_per_second": n_tokens as f64 / spent.as_secs_f64().max(1e-9),
        "seconds_per_epoch": n_batches as f64 * per_step + per_evaluation,
        "seconds": seconds,
    });
    Ok(summary.as_object().cloned().unwrap_or_default())
}

/// Memory that the system could still hand out, where it tells.
fn available_bytes() -> Option<u64> {
    let about = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = about.lines().find(|line| line.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}
