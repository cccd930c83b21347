//! What tests of whole runs share: small configurations, text, a bus that keeps events.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use carrousel::data::series::{Missing, Relative};
use carrousel::data::split::Split;
use carrousel::data::text::Encoding;
use carrousel::data::vocab::Level;
use carrousel::model::init::Init;
use carrousel::observe::{Bus, Event, Sink};
use carrousel::optim::schedule::{ScheduleConfig, ScheduleKind};
use carrousel::optim::{OptimizerConfig, Rule};
use carrousel::store::Select;
use carrousel::store::config::{LossReduction, OnDeviceLoss, RunConfig, Task};
use carrousel::train::{Outcome, RunOptions, run};

/// A small configuration; tests change what they are about.
pub fn config(task: Task, data: &[&Path]) -> RunConfig {
    RunConfig {
        task,
        data: data.iter().map(|p| p.display().to_string()).collect(),
        encoding: Encoding::Utf8,
        split: Split::default(),
        level: Level::Char,
        vocab: None,
        target: Vec::new(),
        features: Vec::new(),
        sequence: None,
        label: None,
        text: None,
        tolerance: None,
        class_weights: None,
        quantiles: None,
        notes: None,
        init_from: None,
        freeze: Vec::new(),
        early_stop: None,
        missing: Missing::Fill,
        relative: Relative::Auto,
        season: None,
        calendar: false,
        layers: 1,
        hidden: 16.into(),
        embedding: 16,
        tied: false,
        dropout: 0.0,
        no_bias: false,
        no_autotune: false,
        init: Init::Torch,
        gate_bias: None,
        lstm: Default::default(),
        seq_len: 12,
        horizon: 3,
        pooling: Default::default(),
        batch_size: 8,
        eval_batch_size: 8,
        epochs: None,
        max_steps: Some(20),
        optimizer: OptimizerConfig {
            rule: Rule::Adam,
            lr: 5e-3,
            momentum: 0.0,
            nesterov: false,
            weight_decay: 0.0,
            l1: 0.0,
            clip_norm: 1.0,
            clip_value: 0.0,
        },
        schedule: ScheduleConfig {
            kind: ScheduleKind::Constant,
            warmup_steps: 0,
            lr_decay: None,
            decay_after: None,
            decay_every: None,
            patience: 2,
        },
        loss_reduction: LossReduction::Mean,
        seed: 1,
        devices: "cpu:1".into(),
        balance: String::new(),
        on_device_loss: OnDeviceLoss::Continue,
        rejoin: false,
        deadline: 300,
        memory_limit: Vec::new(),
        accumulate: 1,
        compress: Default::default(),
        shard_optimizer: false,
        select: Select::Last,
        eval_every: 0,
        log_every: 1,
        checkpoint_every: 0,
        keep: 2,
        tensorboard: false,
        hash_every: 5,
    }
}

/// Keeps events; asks for a stop after a step.
struct Keep {
    events: Arc<Mutex<Vec<Event>>>,
    stop_after: Option<(u64, Arc<AtomicBool>)>,
}

impl Sink for Keep {
    fn name(&self) -> String {
        "test".into()
    }

    fn event(&mut self, event: &Event) -> anyhow::Result<()> {
        self.events.lock().unwrap().push(event.clone());
        if let (Event::Step { step, .. }, Some((last, stop))) = (event, &self.stop_after) {
            stop.store(step >= last, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// A run and the losses of its steps.
pub struct Ran {
    pub outcome: anyhow::Result<Outcome>,
    pub losses: Vec<f64>,
    pub events: Vec<Event>,
}

/// Runs in `out`, starting or resuming.
pub fn train(config: &RunConfig, out: &Path, resume: bool) -> Ran {
    train_with(config, RunOptions { out: out.to_owned(), resume, wrap: None }, None)
}

/// Runs with everything given; stops as a signal would after step `stop_after`.
pub fn train_with(config: &RunConfig, options: RunOptions, stop_after: Option<u64>) -> Ran {
    let (events, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
    let stop_after = stop_after.map(|step| (step, Arc::clone(&stop)));
    let mut bus = Bus::new(vec![Box::new(Keep { events: Arc::clone(&events), stop_after })]);
    let outcome = run(config.clone(), options, &mut bus, &stop);
    drop(bus);
    let events = std::mem::take(&mut *events.lock().unwrap());
    let losses = events.iter().filter_map(|e| if let Event::Step { loss, .. } = e { Some(*loss) } else { None }).collect();
    Ran { outcome, losses, events }
}

/// A text with something to learn: words in a loose order, `n` characters.
pub fn text(n: usize) -> String {
    let words = ["the wheel ", "turns ", "and turns ", "again; ", "a ring ", "of rings, ", "slowly\n"];
    let mut state = 12345u32;
    let mut out = String::new();
    while out.len() < n {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        out.push_str(words[(state >> 24) as usize % words.len()]);
    }
    out.truncate(n);
    out
}
