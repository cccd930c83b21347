//! Whole runs: what is learnt, on which devices, with which bits.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;
use carrousel::backend::around::Around;
use carrousel::backend::{Backend, DeviceInfo, Limits, Span};
use carrousel::compress::Method;
use carrousel::kernels::Kernel;
use carrousel::model::init::{Init, initial};
use carrousel::observe::{Bus, Event, Exhibit, Sink};
use carrousel::optim::Rule;
use carrousel::rng::StepKey;
use carrousel::store::checkpoint::Checkpoint;
use carrousel::store::config::{LossReduction, OnDeviceLoss, RunConfig, Task};
use carrousel::store::run_folder::{RunFolder, Which};
use carrousel::train::devices;
use carrousel::train::group::{Group, GroupSpec, StepNumbers, Wrap};
use carrousel::train::profile::Workload;
use carrousel::train::ring::Update;
use carrousel::train::worker::{WorkerSpec, weigh};
use carrousel::train::{RunOptions, run};

use crate::adapters;
use crate::runs::{Ran, config, text, train, train_with};

fn text_file(dir: &Path, n: usize) -> PathBuf {
    let path = dir.join("text.txt");
    std::fs::write(&path, text(n)).unwrap();
    path
}

fn last_checkpoint(run: &Path) -> Checkpoint {
    RunFolder::read(run).unwrap().load(Which::Last).unwrap()
}

/// Every tensor of the last checkpoint, bit for bit.
fn bits(run: &Path) -> Vec<(String, Vec<u32>)> {
    let tensors = last_checkpoint(run).tensors;
    tensors.into_iter().map(|t| (t.name, t.data.into_iter().map(f32::to_bits).collect())).collect()
}

fn options(out: &Path, wrap: Option<Wrap>) -> RunOptions {
    RunOptions { out: out.to_owned(), resume: false, wrap }
}

fn assert_close(what: &str, a: &[f64], b: &[f64], relative: f64) {
    assert_eq!(a.len(), b.len(), "{what}: steps");
    for (step, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= relative * b.abs(), "{what}, step {}: {a} against {b}", step + 1);
    }
}

/// A backend that passes everything on but what a test changes.
struct Changed {
    inner: Box<dyn Backend>,
    info: DeviceInfo,
    /// After each launch: the kernel's name and its operands.
    after: fn(&mut dyn Backend, &'static str, &[Span]) -> Result<()>,
}

impl Around for Changed {
    fn inner(&self) -> &dyn Backend {
        self.inner.as_ref()
    }
    fn inner_mut(&mut self) -> &mut dyn Backend {
        self.inner.as_mut()
    }
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn launch(&mut self, kernel: &dyn Kernel, operands: &[Span]) -> Result<()> {
        self.inner.launch(kernel, operands)?;
        (self.after)(self.inner.as_mut(), kernel.name(), operands)
    }
}

pub fn nothing(_: &mut dyn Backend, _: &'static str, _: &[Span]) -> Result<()> {
    Ok(())
}

/// Shifts what an update wrote by one unit in the last place.
fn shift_updates(backend: &mut dyn Backend, kernel: &'static str, operands: &[Span]) -> Result<()> {
    if kernel == "adam" {
        let words = carrousel::backend::read_now(backend, operands[0], Duration::from_secs(60))?;
        let shifted: Vec<f32> = words.iter().map(|w| if *w == 0.0 { 0.0 } else { f32::from_bits(w.to_bits() + 1) }).collect();
        backend.write(operands[0], &shifted)?;
    }
    Ok(())
}

/// All ranks seem to be of different kinds; `after` is done on rank 1 alone.
pub fn unlike(after: fn(&mut dyn Backend, &'static str, &[Span]) -> Result<()>) -> Wrap {
    Arc::new(move |rank, inner: Box<dyn Backend>| {
        let mut info = inner.info().clone();
        info.kind = format!("kind {rank}");
        let after = if rank == 1 { after } else { nothing };
        Box::new(Changed { inner, info, after })
    })
}

fn alike(after: fn(&mut dyn Backend, &'static str, &[Span]) -> Result<()>) -> Wrap {
    Arc::new(move |rank, inner: Box<dyn Backend>| {
        let info = inner.info().clone();
        let after = if rank == 1 { after } else { nothing };
        Box::new(Changed { inner, info, after })
    })
}

fn small(dir: &Path) -> RunConfig {
    let file = text_file(dir, 4000);
    let mut config = config(Task::Lm, &[&file]);
    (config.layers, config.dropout, config.batch_size, config.max_steps) = (2, 0.2, 13, Some(12));
    config
}

#[test]
fn a_language_model_learns_a_small_text() {
    let dir = tempfile::tempdir().unwrap();
    let file = text_file(dir.path(), 6000);
    let mut config = config(Task::Lm, &[&file]);
    (config.max_steps, config.hidden, config.embedding) = (Some(200), 32.into(), 16);
    let ran = train(&config, &dir.path().join("run"), false);
    let outcome = ran.outcome.unwrap();
    let (first, last) = (ran.losses[0], ran.losses[199]);
    assert!(first > 2.5 && last < 1.0, "{first} -> {last}");
    let test = outcome.summary["test_loss"].as_f64().unwrap();
    assert!(test < 1.1, "{test}");
    for name in ["config.toml", "data.json", "metrics.jsonl", "checkpoints.json", "loss.svg", "loss.png"] {
        assert!(dir.path().join("run").join(name).is_file(), "{name}");
    }
    let steps = ran.events.iter().filter(|e| matches!(e, Event::Step { .. })).count();
    assert_eq!(steps, 200);
}

#[test]
fn every_mixture_of_devices_takes_the_same_steps() {
    let mut mixtures = vec!["cpu:2", "cpu:1*2", "cpu:1*4"];
    let gpus = adapters::gpus();
    if !gpus.is_empty() {
        mixtures.extend(["gpu:0", "gpu:0*2", "gpu:0,cpu:1"]);
    }
    if gpus.len() > 1 {
        mixtures.push("gpu:0,gpu:1");
    }
    for (batch, n_steps) in [(13, 60), (12, 8)] {
        let dir = tempfile::tempdir().unwrap();
        let mut config = small(dir.path());
        (config.batch_size, config.max_steps, config.layers, config.balance) = (batch, Some(n_steps), 1, "equal".into());
        (config.hidden, config.seq_len) = (16.into(), 6);
        let one = train(&config, &dir.path().join("one"), false);
        one.outcome.unwrap();
        for devices in &mixtures {
            config.devices = (*devices).into();
            let ran = train(&config, &dir.path().join(devices.replace([':', '*', ','], "-")), false);
            ran.outcome.unwrap_or_else(|e| panic!("{devices}: {e:#}"));
            assert_close(&format!("{devices}, batch {batch}"), &ran.losses, &one.losses, 1e-4);
        }
    }
}

#[test]
fn uneven_shares_and_dropout_give_the_result_of_one_worker() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small(dir.path());
    config.dropout = 0.5;
    let one = train(&config, &dir.path().join("one"), false);
    one.outcome.unwrap();
    for (devices, balance) in [("cpu:1*3", "7:2:1"), ("cpu:1*3", "0:1:0"), ("cpu:1*2,cpu:2", "1:5:1")] {
        (config.devices, config.balance) = (devices.into(), balance.into());
        let ran = train(&config, &dir.path().join(balance.replace(':', "-")), false);
        ran.outcome.unwrap();
        assert_close(balance, &ran.losses, &one.losses, 1e-5);
    }
}

#[test]
fn parts_of_a_share_add_up_to_the_share() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small(dir.path());
    let whole = train(&config, &dir.path().join("whole"), false);
    (config.accumulate, config.devices) = (4, "cpu:1*2".into());
    let parts = train(&config, &dir.path().join("parts"), false);
    whole.outcome.unwrap();
    parts.outcome.unwrap();
    assert_close("four parts on two workers", &parts.losses, &whole.losses, 1e-5);
}

#[test]
fn owners_update_to_the_same_bits_as_everyone() {
    let dir = tempfile::tempdir().unwrap();
    for (rule, momentum) in [(Rule::Adam, 0.0), (Rule::Sgd, 0.9), (Rule::Rmsprop, 0.0)] {
        let mut config = small(dir.path());
        (config.devices, config.optimizer.rule, config.optimizer.momentum) = ("cpu:1*3".into(), rule, momentum);
        let (everywhere, by_owner) = (dir.path().join(format!("{rule:?}-all")), dir.path().join(format!("{rule:?}-owners")));
        train(&config, &everywhere, false).outcome.unwrap();
        train_with(&config, options(&by_owner, Some(unlike(nothing))), None).outcome.unwrap();
        assert_eq!(bits(&everywhere), bits(&by_owner), "{rule:?}");
    }
}

#[test]
fn a_sharded_optimizer_gives_the_bits_of_a_whole_one_also_when_a_resumed_run_changes_over() {
    let dir = tempfile::tempdir().unwrap();
    for (rule, momentum) in [(Rule::Adam, 0.0), (Rule::Sgd, 0.9), (Rule::Rmsprop, 0.5)] {
        let mut config = small(dir.path());
        (config.devices, config.optimizer.rule, config.optimizer.momentum) = ("cpu:1*3".into(), rule, momentum);
        let name = |what: &str| dir.path().join(format!("{rule:?}-{what}"));
        train(&config, &name("whole"), false).outcome.unwrap();
        config.shard_optimizer = true;
        train(&config, &name("sharded"), false).outcome.unwrap();
        assert_eq!(bits(&name("sharded")), bits(&name("whole")), "{rule:?}");
        for begins_sharded in [true, false] {
            let out = name(&format!("sharded-{begins_sharded}-first"));
            config.shard_optimizer = begins_sharded;
            train_with(&config, options(&out, None), Some(5)).outcome.unwrap();
            config.shard_optimizer = !begins_sharded;
            train(&config, &out, true).outcome.unwrap();
            assert_eq!(bits(&out), bits(&name("whole")), "{rule:?}, sharded first: {begins_sharded}");
        }
    }
}

#[test]
fn a_rank_of_a_sharded_optimizer_takes_memory_for_its_part_alone() {
    let workload = Workload::named("B").unwrap();
    let spec = WorkerSpec {
        model: workload.model.clone(),
        optimizer: workload.optimizer,
        accumulate: 1,
        compress: Method::None,
        deadline: Duration::from_secs(1),
    };
    let limits = Limits { max_buffer_bytes: u64::MAX, max_binding_bytes: u64::MAX };
    let weighed = |world: usize, update| weigh(&spec, [0, world], update, 10, 1, limits).unwrap() as f64;
    let n_bytes = 4.0 * workload.model.table().len() as f64;
    for world in [4, 8] {
        let saved = weighed(world, Update::Everywhere) - weighed(world, Update::ByOwner);
        // Adam's two states; of the own part these, what a step makes of them, and of the parameters.
        let expected = n_bytes * (2.0 - 5.0 / world as f64);
        // Segments are whole blocks, the first rank's the larger.
        assert!((saved - expected).abs() < 0.05 * n_bytes, "world {world}: {saved} bytes saved, {expected} expected");
    }
}

#[test]
fn the_gates_read_after_an_evaluation_give_its_outputs() {
    let mut workload = Workload::named("A").unwrap();
    (workload.n_steps, workload.n_rows, workload.model.hidden) = (4, 5, 20.into());
    let devices = devices::parse("cpu:1").unwrap();
    let (devices, _) = devices::resolve(&devices, || Ok(Vec::new()), 1).unwrap();
    let spec = GroupSpec {
        model: workload.model.clone(),
        optimizer: workload.optimizer,
        accumulate: 1,
        compress: Method::None,
        shard_optimizer: false,
    };
    let mut group = Group::start(spec, &devices, None).unwrap();
    let params = initial(&workload.model, group.table(), Init::Uniform(0.5), None, 3);
    let zeros: Vec<Vec<f32>> = params.iter().map(|values| vec![0.0; values.len()]).collect();
    group.load(params.clone(), vec![zeros.clone(), zeros]).unwrap();
    let batch = Arc::new(workload.batch(1));
    let all = std::slice::from_ref(&(0..5));
    let (_, outputs) = group.evaluate(&batch, all, None, true).unwrap();
    let gates = group.gates_of(0).unwrap();
    assert_eq!(gates.len(), 1);
    let tensor = |name: &str| &params[group.table().tensors().iter().position(|t| t.name == name).unwrap()];
    let (weight, bias) = (tensor("head.weight"), tensor("head.bias")[0]);
    for (row, output) in outputs.iter().enumerate() {
        let mut c = [0.0_f32; 20];
        let mut h = [0.0_f32; 20];
        for t in 0..4 {
            let at = |gate: usize, unit: usize| gates[0][gate][(t * 5 + row) * 20 + unit];
            for unit in 0..20 {
                c[unit] = at(1, unit) * c[unit] + at(0, unit) * at(2, unit);
                h[unit] = at(3, unit) * c[unit].tanh();
            }
        }
        let wanted = bias + h.iter().zip(weight).map(|(h, w)| h * w).sum::<f32>();
        assert!((output - wanted).abs() < 1e-5, "row {row}: {output}, from the gates {wanted}");
    }
    let numbers = StepNumbers { step: 1, lr: 0.1, key: StepKey::new(1, 1), divisor: batch.weight };
    group.step(&batch, all, None, numbers).unwrap();
    assert!(group.gates_of(0).unwrap().is_empty(), "a training step leaves no gates to read");
}

/// The norm of each reported step, and the gradients that were shown, by step and tensor.
#[derive(Default)]
struct Shown {
    norms: BTreeMap<u64, f64>,
    gradients: BTreeMap<(u64, String), Vec<f32>>,
}

struct Watcher(Arc<Mutex<Shown>>);

impl Sink for Watcher {
    fn name(&self) -> String {
        "test".into()
    }

    fn event(&mut self, event: &Event) -> Result<()> {
        if let Event::Step { step, grad_norm, .. } = event {
            self.0.lock().unwrap().norms.insert(*step, *grad_norm);
        }
        Ok(())
    }

    fn show(&mut self, exhibit: Exhibit<'_>) -> Result<()> {
        if let Exhibit::Values { step, name, values } = exhibit
            && let Some(name) = name.strip_prefix("gradients/")
        {
            self.0.lock().unwrap().gradients.insert((step, name.to_owned()), values.to_vec());
        }
        Ok(())
    }
}

#[test]
fn the_gradients_shown_are_those_of_the_step_whoever_updates_and_showing_changes_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    let mut of_first: Option<Shown> = None;
    for (name, devices, wrap) in [("one", "cpu:1", None), ("all", "cpu:1*3", None), ("owners", "cpu:1*3", Some(unlike(nothing)))] {
        let mut config = small(dir.path());
        (config.devices, config.eval_every, config.tensorboard) = (devices.into(), 4, true);
        let shown = Arc::new(Mutex::new(Shown::default()));
        let mut bus = Bus::new(vec![Box::new(Watcher(Arc::clone(&shown)))]);
        let out = dir.path().join(name);
        run(config.clone(), options(&out, wrap.clone()), &mut bus, &AtomicBool::new(false)).unwrap();
        drop(bus);
        let shown = Arc::into_inner(shown).unwrap().into_inner().unwrap();
        let steps: BTreeSet<u64> = shown.gradients.keys().map(|(step, _)| *step).collect();
        assert!(steps.contains(&4) && steps.contains(&8) && steps.contains(&12), "{name}: {steps:?}");
        for step in steps {
            let squares = shown.gradients.iter().filter(|((at, _), _)| *at == step).flat_map(|(_, values)| values);
            let norm = squares.map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let told = shown.norms[&step];
            assert!((norm - told).abs() < 1e-4 * told, "{name}, step {step}: the gradients have norm {norm}, the step told {told}");
        }
        if let Some(first) = &of_first {
            for (key, values) in shown.gradients.iter().filter(|((step, _), _)| *step == 4) {
                let norm = first.norms[&4] as f32;
                let far = values.iter().zip(&first.gradients[key]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(far < 1e-4 * norm, "{name}, {key:?}: {far} apart, norm {norm}");
            }
        } else {
            of_first = Some(shown);
        }
        assert_eq!(std::fs::read_dir(out.join("tensorboard")).unwrap().count(), 1);
        let plain = dir.path().join(format!("{name}-plain"));
        config.tensorboard = false;
        train_with(&config, options(&plain, wrap), None).outcome.unwrap();
        assert_eq!(bits(&out), bits(&plain), "{name}");
    }
}

#[test]
fn a_replica_that_updates_differently_is_found_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small(dir.path());
    config.devices = "cpu:1*2".into();
    let ran = train_with(&config, options(&dir.path().join("alike"), Some(alike(shift_updates))), None);
    let error = format!("{:#}", ran.outcome.err().expect("replicas differ"));
    assert!(error.contains("step 5") && error.contains("rank 1") && error.contains("rank 0"), "{error}");
    // Where owners update, a device with its own rounding does no harm.
    train_with(&config, options(&dir.path().join("owners"), Some(unlike(shift_updates))), None).outcome.unwrap();
}

fn stopped_and_resumed_equals_undisturbed(devices: &str, wrap: Option<&Wrap>) {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small(dir.path());
    (config.devices, config.balance) = (devices.into(), "equal".into());
    config.schedule.kind = carrousel::optim::schedule::ScheduleKind::Cosine;
    let whole = dir.path().join("whole");
    let undisturbed = train_with(&config, options(&whole, wrap.cloned()), None);
    undisturbed.outcome.unwrap();
    for stop_after in [1, 5, 11] {
        let out = dir.path().join(format!("stopped-{stop_after}"));
        let first = train_with(&config, options(&out, wrap.cloned()), Some(stop_after));
        assert!(first.outcome.unwrap().interrupted);
        assert_eq!(first.losses.len() as u64, stop_after);
        let rest = train_with(&config, RunOptions { out: out.clone(), resume: true, wrap: wrap.cloned() }, None);
        assert!(!rest.outcome.unwrap().interrupted);
        let losses: Vec<f64> = first.losses.iter().chain(&rest.losses).copied().collect();
        assert_eq!(losses, undisturbed.losses, "{devices} stopped after {stop_after}");
        assert_eq!(bits(&out), bits(&whole), "{devices} stopped after {stop_after}");
    }
}

#[test]
fn a_run_stopped_and_resumed_has_the_bits_of_an_undisturbed_one() {
    stopped_and_resumed_equals_undisturbed("cpu:1", None);
    stopped_and_resumed_equals_undisturbed("cpu:1*3", None);
    stopped_and_resumed_equals_undisturbed("cpu:1*3", Some(&unlike(nothing)));
    if !adapters::gpus().is_empty() {
        stopped_and_resumed_equals_undisturbed("gpu:0,cpu:1", None);
    }
}

#[test]
fn a_resumed_run_goes_on_with_the_schedule_and_the_sums_of_the_one_that_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small(dir.path());
    // Several epochs of several steps, whose plateau decays at every evaluation.
    (config.batch_size, config.seq_len, config.max_steps, config.epochs) = (8, 25, None, Some(3));
    (config.optimizer.rule, config.optimizer.momentum) = (Rule::Rmsprop, 0.5);
    config.schedule.kind = carrousel::optim::schedule::ScheduleKind::Plateau;
    (config.schedule.patience, config.schedule.lr_decay, config.eval_every) = (1, Some(0.5), 3);
    config.optimizer.lr = 0.05;
    let epochs = |ran: &Ran| -> Vec<(u64, f64, Option<f64>)> {
        let of = |e: &Event| match e {
            Event::Epoch { step, train_loss, valid_loss, .. } => Some((*step, *train_loss, *valid_loss)),
            _ => None,
        };
        ran.events.iter().filter_map(of).collect()
    };
    let rates = |ran: &Ran| -> Vec<f64> {
        ran.events.iter().filter_map(|e| if let Event::Step { lr, .. } = e { Some(*lr) } else { None }).collect()
    };
    let whole = dir.path().join("whole");
    let undisturbed = train(&config, &whole, false);
    let per_epoch = undisturbed.losses.len() / 3;
    assert!(per_epoch >= 3, "{per_epoch} steps an epoch are too few to stop within one");
    let all_rates = rates(&undisturbed);
    assert!(all_rates[0] > all_rates[all_rates.len() - 1], "the plateau never decayed: {all_rates:?}");
    for stop_after in [per_epoch as u64 - 1, per_epoch as u64, per_epoch as u64 + 2] {
        let out = dir.path().join(format!("stopped-{stop_after}"));
        let first = train_with(&config, options(&out, None), Some(stop_after));
        let rest = train(&config, &out, true);
        assert_eq!([rates(&first), rates(&rest)].concat(), all_rates, "rates, stopped after {stop_after}");
        let mut seen = epochs(&first);
        seen.extend(epochs(&rest));
        seen.dedup();
        assert_eq!(seen, epochs(&undisturbed), "epochs, stopped after {stop_after}");
        assert_eq!(bits(&out), bits(&whole), "stopped after {stop_after}");
        let summary = |ran: Ran| ran.outcome.unwrap().summary["train_loss"].clone();
        assert_eq!(summary(rest), epochs(&undisturbed).last().unwrap().1, "stopped after {stop_after}");
    }
}

#[test]
fn an_epoch_has_one_loss_whatever_its_windows() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small(dir.path());
    // A rate that changes nothing: what differs could only be the state, carried from window to window and begun anew with each epoch.
    (config.optimizer.rule, config.optimizer.lr, config.max_steps, config.epochs) = (Rule::Sgd, 1e-30, None, Some(2));
    (config.batch_size, config.eval_batch_size, config.dropout) = (4, 2, 0.0);
    let mut run = |seq_len: usize, devices: &str| -> Vec<(f64, Option<f64>)> {
        (config.seq_len, config.devices) = (seq_len, devices.into());
        let ran = train(&config, &dir.path().join(format!("{seq_len}-{}", devices.replace([':', '*'], "-"))), false);
        ran.outcome.unwrap();
        let of = |e: &Event| match e {
            Event::Epoch { train_loss, valid_loss, .. } => Some((*train_loss, *valid_loss)),
            _ => None,
        };
        ran.events.iter().filter_map(of).collect()
    };
    let long = run(400, "cpu:1");
    assert_eq!(long.len(), 2);
    for got in [run(5, "cpu:1"), run(7, "cpu:1*2")] {
        for ((train, valid), (want_train, want_valid)) in got.iter().zip(&long) {
            let (valid, want_valid) = (valid.unwrap(), want_valid.unwrap());
            assert!((train - want_train).abs() < 1e-5 * want_train, "training: {train} in short windows, {want_train} in one");
            assert!((valid - want_valid).abs() < 1e-5 * want_valid, "validation: {valid} in short windows, {want_valid} in one");
        }
    }
    assert!((long[0].0 - long[1].0).abs() < 1e-6, "the second epoch begins as the first: {long:?}");
}

#[test]
fn a_finished_run_resumes_to_its_summary_and_more_steps_continue_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small(dir.path());
    let out = dir.path().join("run");
    let first = train(&config, &out, false).outcome.unwrap();
    let again = train(&config, &out, true);
    assert!(again.losses.is_empty());
    let again = again.outcome.unwrap();
    for key in ["status", "steps", "test_loss", "train_loss", "valid_loss", "perplexity"] {
        assert_eq!(again.summary[key], first.summary[key], "{key}");
    }
    config.max_steps = Some(15);
    assert_eq!(train(&config, &out, true).losses.len(), 3);
    config.hidden = 32.into();
    let error = format!("{:#}", train(&config, &out, true).outcome.err().expect("another model"));
    assert!(error.contains("--hidden 32") && error.contains("16"), "{error}");
}

#[test]
fn a_run_folder_is_not_started_twice() {
    let dir = tempfile::tempdir().unwrap();
    let config = small(dir.path());
    let out = dir.path().join("run");
    train(&config, &out, false).outcome.unwrap();
    let before = bits(&out);
    let error = format!("{:#}", train(&config, &out, false).outcome.err().expect("the folder is taken"));
    assert!(error.contains("--resume") && error.contains("--out"), "{error}");
    assert_eq!(bits(&out), before);
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint() {
    for devices in ["cpu:1", "cpu:1*3"] {
        let dir = tempfile::tempdir().unwrap();
        let mut config = small(dir.path());
        (config.devices, config.checkpoint_every, config.hash_every) = (devices.into(), 1, 0);
        (config.optimizer.rule, config.optimizer.lr, config.optimizer.clip_norm) = (Rule::Sgd, 1e36, 0.0);
        let out = dir.path().join("run");
        let ran = train(&config, &out, false);
        let error = format!("{:#}", ran.outcome.err().expect("no rate that high goes well"));
        assert!(error.contains("not finite") && error.contains("--lr") && error.contains("checkpoint"), "{error}");
        let named = error.split_whitespace().map(|word| word.trim_matches([',', ':'])).filter(|word| word.ends_with(".safetensors"));
        assert!(named.clone().count() > 0 && named.clone().all(|file| Path::new(file).is_file()), "{error}");
        let last = last_checkpoint(&out);
        assert_eq!(last.step().unwrap(), ran.losses.len() as u64);
        assert!(last.tensors.iter().all(|t| t.data.iter().all(|v| v.is_finite())));
    }
}

#[test]
fn a_checkpoint_whose_next_loss_is_not_finite_is_not_called_good() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small(dir.path());
    (config.optimizer.lr, config.checkpoint_every) = (1e38, 1);
    let error = format!("{:#}", train(&config, &dir.path().join("run"), false).outcome.err().expect("no rate that high goes well"));
    assert!(error.contains("not finite") && !error.contains("the last good"), "{error}");
    assert!(error.contains("no good checkpoint") || error.contains("before the first checkpoint"), "{error}");
}

#[test]
fn parameters_that_a_single_step_ruined_are_an_error_and_no_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small(dir.path());
    (config.optimizer.rule, config.optimizer.lr, config.optimizer.clip_norm) = (Rule::Sgd, 1e38, 0.0);
    config.max_steps = Some(1);
    for split in [[0.85, 0.05, 0.1], [0.9, 0.0, 0.1]] {
        config.split = split.into();
        let out = dir.path().join(format!("run-{}", split[1]));
        let error = train(&config, &out, false).outcome.err().expect("no rate that high goes well");
        assert!(format!("{error:#}").contains("not finite"), "{error:#}");
        if split[1] > 0.0 {
            assert!(RunFolder::read(&out).unwrap().entries().is_empty());
        }
    }
}

#[test]
fn a_spoilt_network_says_nothing() {
    use carrousel::backend::open;
    use carrousel::infer::generate::{GenerateOptions, generate};
    use carrousel::infer::session::Session;

    let dir = tempfile::tempdir().unwrap();
    let (config, out) = (small(dir.path()), dir.path().join("run"));
    train(&config, &out, false).outcome.unwrap();
    let mut folder = RunFolder::open(&out).unwrap();
    let mut spoilt = folder.load(Which::Last).unwrap();
    spoilt.meta["step"] = 13.into();
    spoilt.tensors.iter_mut().filter(|t| t.name == "lstm.weight_hh_l0").for_each(|t| t.data[5] = f32::NAN);
    folder.save(&spoilt, None, 9, carrousel::store::Select::Last).unwrap();
    drop(folder);
    for (which, good) in [(Which::Step(12), true), (Which::Step(13), false)] {
        let mut session = Session::open(&out, which, open::cpu(1).unwrap()).unwrap();
        let options = GenerateOptions { prompt: "the ".into(), length: 3, temperature: 0.0, top_k: None, seed: 1 };
        let result = generate(&mut session, &options, &mut |_| {});
        assert_eq!(result.is_ok(), good, "{which:?}");
        if let Err(error) = result {
            assert!(error.to_string().contains("not finite"), "{error:#}");
        }
    }
}

#[test]
fn a_start_that_fails_leaves_nothing_and_the_folder_can_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let (mut config, out) = (small(dir.path()), dir.path().join("run"));
    let good = config.clone();
    config.devices = "gpu:999".into();
    assert!(train(&config, &out, false).outcome.is_err());
    (config.devices, config.data) = ("cpu:1".into(), vec!["none.txt".into()]);
    assert!(train(&config, &out, false).outcome.is_err());
    assert!(train(&config, &out, true).outcome.is_err());
    assert!(!out.exists());
    // A start that was killed before its first checkpoint.
    let folder = RunFolder::create(&out).unwrap();
    folder.write_file("config.toml", b"hidden = 77\n").unwrap();
    folder.write_file("metrics.jsonl", b"{\"event\":\"warning\",\"message\":\"old\"}\n").unwrap();
    drop(folder);
    train(&good, &out, false).outcome.unwrap();
    assert!(!std::fs::read_to_string(out.join("metrics.jsonl")).unwrap().contains("old"));
}

#[test]
fn a_run_resumed_beyond_its_schedule_says_that_the_rate_is_zero() {
    let dir = tempfile::tempdir().unwrap();
    let (mut config, out) = (small(dir.path()), dir.path().join("run"));
    config.schedule.kind = carrousel::optim::schedule::ScheduleKind::Cosine;
    let warns = |ran: &Ran| ran.events.iter().any(|e| matches!(e, Event::Warning { message } if message.contains("learning rate is 0")));
    let first = train_with(&config, options(&out, None), Some(5));
    assert!(!warns(&first));
    assert!(!warns(&train(&config, &out, true)), "the schedule ends with the run");
    config.max_steps = Some(14);
    let beyond = train(&config, &out, true);
    assert!(warns(&beyond));
    assert_eq!(beyond.losses.len(), 2);
}

#[test]
fn a_finished_run_tells_its_summary_without_its_data_and_a_run_is_not_resumed_on_other_data() {
    let dir = tempfile::tempdir().unwrap();
    let (mut config, out) = (small(dir.path()), dir.path().join("run"));
    let file = dir.path().join("text.txt");
    let first = train(&config, &out, false).outcome.unwrap();
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    let again = train(&config, &out, true).outcome.unwrap();
    assert!(!again.interrupted && again.tables.len() == 1);
    for (key, value) in &first.summary {
        assert_eq!(&again.summary[key], value, "{key}");
    }
    config.max_steps = Some(15);
    for changed in [text.replacen("turns", "snrut", 1), format!("{text}the")] {
        std::fs::write(&file, changed).unwrap();
        let error = format!("{:#}", train(&config, &out, true).outcome.err().expect("other data"));
        assert!(error.contains("text.txt has changed") && error.contains("--out"), "{error}");
    }
    std::fs::write(&file, text).unwrap();
    assert_eq!(train(&config, &out, true).losses.len(), 3);
}

#[test]
fn the_first_and_the_last_step_are_told_however_seldom_steps_are() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small(dir.path());
    config.log_every = 1000;
    for (epochs, max_steps, name) in [(None, Some(12), "steps"), (Some(1), None, "epochs")] {
        (config.epochs, config.max_steps) = (epochs, max_steps);
        let ran = train(&config, &dir.path().join(name), false);
        let n = ran.outcome.unwrap().summary["steps"].as_u64().unwrap();
        let told = ran.events.iter().filter_map(|e| if let Event::Step { step, .. } = e { Some(*step) } else { None });
        assert_eq!(told.collect::<Vec<u64>>(), [1, n], "{name}");
    }
}

#[test]
fn devices_tell_their_mean_loss_of_the_last_step_and_an_interrupted_run_its_final_checkpoint() {
    use carrousel::observe::CheckpointKind;

    let dir = tempfile::tempdir().unwrap();
    let mut config = small(dir.path());
    (config.devices, config.balance) = ("cpu:1*3".into(), "2:1:0".into());
    let ran = train_with(&config, options(&dir.path().join("run"), None), Some(4));
    assert!(ran.outcome.unwrap().interrupted);
    let told = ran.events.iter().filter_map(|e| if let Event::Device { loss, .. } = e { Some(*loss) } else { None });
    let told: Vec<Option<f64>> = told.collect();
    let [Some(a), Some(b), None] = told[..] else { panic!("{told:?}") };
    // 13 rows are shared as 9 and 4.
    let mean = (9.0 * a + 4.0 * b) / 13.0;
    assert!((mean / ran.losses[3] - 1.0).abs() < 1e-6, "{told:?} against {}", ran.losses[3]);
    let kinds: Vec<CheckpointKind> =
        ran.events.iter().filter_map(|e| if let Event::Checkpoint { kind, .. } = e { Some(*kind) } else { None }).collect();
    assert_eq!(kinds, [CheckpointKind::Final]);
}

#[test]
fn errors_of_several_targets_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("two.csv");
    let rows: String = (0..300).map(|i| format!("{i},{},{}\n", (i * 7) % 5, 1000 * ((i * 3) % 7))).collect();
    std::fs::write(&file, format!("row,small,large\n{rows}")).unwrap();
    let mut config = config(Task::Forecast, &[&file]);
    (config.target, config.max_steps) = (vec!["small".into(), "large".into()], Some(3));
    let outcome = train(&config, &dir.path().join("run"), false).outcome.unwrap();
    let (rmse, by_target) = (&outcome.summary["rmse"], &outcome.summary["rmse_by_target"]);
    assert_eq!(rmse, &by_target["small"]);
    assert!(rmse["model"].as_f64().unwrap() < 10.0 && by_target["large"]["last"].as_f64().unwrap() > 100.0, "{by_target}");
    let table = outcome.tables[0].to_string();
    assert!(table.contains("RMSE of small") && table.contains("RMSE of large"), "{table}");
}

#[test]
fn a_sum_over_time_is_a_mean_with_a_higher_rate() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small(dir.path());
    (config.optimizer.rule, config.optimizer.lr, config.optimizer.clip_norm, config.max_steps) = (Rule::Sgd, 0.12, 0.0, Some(8));
    let mean = train(&config, &dir.path().join("mean"), false);
    (config.loss_reduction, config.optimizer.lr) = (LossReduction::SumOverTime, 0.12 / config.seq_len as f64);
    let sum = train(&config, &dir.path().join("sum"), false);
    mean.outcome.unwrap();
    sum.outcome.unwrap();
    assert_close("sum over time", &sum.losses, &mean.losses, 1e-5);
}

#[test]
fn a_worker_that_fails_is_named_and_the_others_do_not_hang() {
    fn fail(_: &mut dyn Backend, kernel: &'static str, _: &[Span]) -> Result<()> {
        anyhow::ensure!(kernel != "softmax_cross_entropy", "the device has gone up in smoke");
        Ok(())
    }
    fn panics(_: &mut dyn Backend, kernel: &'static str, _: &[Span]) -> Result<()> {
        assert_ne!(kernel, "softmax_cross_entropy", "a planted panic");
        Ok(())
    }
    for (after, says) in [(fail as fn(&mut dyn Backend, &'static str, &[Span]) -> Result<()>, "smoke"), (panics, "planted panic")] {
        let dir = tempfile::tempdir().unwrap();
        let mut config = small(dir.path());
        (config.devices, config.on_device_loss) = ("cpu:1*3".into(), OnDeviceLoss::Stop);
        let ran: Ran = train_with(&config, options(&dir.path().join("run"), Some(alike(after))), None);
        let error = format!("{:#}", ran.outcome.err().expect("one worker fails"));
        assert!(error.contains(says) && error.contains("cpu:1"), "{error}");
    }
}

#[test]
fn the_built_in_series_is_forecast_better_than_its_last_value_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(Task::Forecast, &[]);
    (config.split, config.seq_len, config.horizon) = (carrousel::data::builtin::co2_split(), 52, 26);
    (config.hidden, config.batch_size, config.max_steps) = (16.into(), 32, Some(60));
    let outcome = train(&config, &dir.path().join("run"), false).outcome.unwrap();
    let rmse = &outcome.summary["rmse"];
    assert!(rmse["model"].as_f64().unwrap() < rmse["last"].as_f64().unwrap(), "{rmse}");
    assert!((rmse["last"].as_f64().unwrap() - 4.30).abs() < 0.01, "{rmse}");
    assert!(dir.path().join("run/forecast.png").is_file());
}
