//! Tiny tasks that an LSTM must learn: adding, copying, continuing a sine.

use std::sync::Arc;

use carrousel::compress::Method;
use carrousel::data::series::Relative;
use carrousel::data::split::Split;
use carrousel::data::{Batch, Input, Target};
use carrousel::model::config::{Input as ModelInput, ModelConfig, Output, Pooling};
use carrousel::model::init::{Init, initial};
use carrousel::optim::schedule::ScheduleKind;
use carrousel::optim::{OptimizerConfig, Rule};
use carrousel::rng::{Purpose, StepKey, Stream};
use carrousel::store::config::Task;
use carrousel::train::devices::{DeviceKind, Resolved};
use carrousel::train::group::{Group, GroupSpec, StepNumbers};

use crate::runs::{config, train};

/// Draws the batch of a step, `n` rows.
type Draw = fn(step: u64, n: usize) -> Batch;

/// A network on one CPU worker that is trained on fresh batches.
struct Learner {
    group: Group,
    draw: Draw,
}

impl Learner {
    fn new(model: ModelConfig, draw: Draw) -> Self {
        let optimizer = OptimizerConfig {
            rule: Rule::Adam,
            lr: 0.0,
            momentum: 0.0,
            nesterov: false,
            weight_decay: 0.0,
            l1: 0.0,
            clip_norm: 1.0,
            clip_value: 0.0,
        };
        let devices = [Resolved { spec: "cpu:1".into(), kind: DeviceKind::Cpu { threads: 1 } }];
        let spec = GroupSpec { model: model.clone(), optimizer, accumulate: 1, compress: Method::None, shard_optimizer: false };
        let mut group = Group::start(spec, &devices, None).expect("a worker starts");
        let table = model.table();
        let zeros: Vec<Vec<f32>> = table.tensors().iter().map(|t| vec![0.0; t.layout.torch_len()]).collect();
        let params = initial(&model, &table, Init::Torch, Some([0.0, 1.0, 0.0, 0.0]), 11);
        group.load(params, vec![zeros.clone(), zeros]).expect("parameters are loaded");
        Self { group, draw }
    }

    /// Trains with a rate that falls to zero along half a cosine.
    fn train(&mut self, n_steps: u64, n_rows: usize, lr: f64) {
        for step in 1..=n_steps {
            let batch = Arc::new((self.draw)(step, n_rows));
            let done = step as f64 / n_steps as f64;
            let lr = lr * 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
            let numbers = StepNumbers { step, lr, key: StepKey::new(1, step), divisor: batch.weight };
            self.group.step(&batch, std::slice::from_ref(&(0..n_rows)), None, numbers).expect("a step");
        }
    }

    /// The mean loss of rows that training never saw.
    fn loss(&mut self) -> f64 {
        let n_rows = 500;
        let batch = Arc::new((self.draw)(u64::MAX, n_rows));
        let (loss, _) = self.group.evaluate(&batch, std::slice::from_ref(&(0..n_rows)), None, false).expect("an evaluation");
        loss / batch.weight
    }
}

fn random(step: u64) -> Stream {
    Stream::new(StepKey::new(77, step), Purpose::Test, 0, 0)
}

fn batch(n_steps: usize, n_rows: usize, input: Input, target: Target, weights: Vec<f32>) -> Batch {
    let weight = weights.iter().map(|&w| f64::from(w)).sum();
    let (streams, n_tokens) = ((0..n_rows as u32).collect(), (n_steps * n_rows) as u64);
    Batch { n_steps, n_rows, input, target, weights, lengths: None, streams, resets: true, carries: false, weight, n_tokens }
}

/// Hochreiter and Schmidhuber's adding problem: 20 numbers in 0..1, two of them marked; their sum is asked at the end.
fn adding(step: u64, n_rows: usize) -> Batch {
    const T: usize = 20;
    let mut random = random(step);
    let mut values = vec![0.0; T * n_rows * 2];
    let mut sums = vec![0.0; n_rows];
    for (row, sum) in sums.iter_mut().enumerate() {
        let marked = [random.below(T as u32 / 2) as usize, T / 2 + random.below(T as u32 / 2) as usize];
        for t in 0..T {
            let (value, at) = (random.uniform(), (t * n_rows + row) * 2);
            let is_marked = marked.contains(&t);
            (values[at], values[at + 1]) = (value, f32::from(u8::from(is_marked)));
            *sum += if is_marked { value } else { 0.0 };
        }
    }
    let target = Target::Values { values: sums, n_outputs: 1 };
    batch(T, n_rows, Input::Values { values, n_features: 2 }, target, vec![1.0; n_rows])
}

#[test]
fn the_sum_of_two_marked_numbers_among_twenty_is_learnt() {
    let model = ModelConfig {
        input: ModelInput::Values { n_features: 2 },
        output: Output::Values { n_outputs: 1, pooling: Pooling::Last },
        n_layers: 1,
        hidden: 32.into(),
        dropout: 0.0,
        bias: true,
        tied: false,
        lstm: Default::default(),
    };
    let mut learner = Learner::new(model, adding);
    learner.train(1500, 40, 1e-2);
    let loss = learner.loss();
    println!("[tasks] adding: {loss:.5}");
    // Saying the mean, 1, whatever comes in has a squared error of 1/6.
    assert!(loss < 0.02, "{loss}");
}

const N_SYMBOLS: u32 = 4;
const N_COPIED: usize = 5;
const N_BLANKS: usize = 2;

/// Symbols 0..4, then blanks (4), then five times the question (5), at which the symbols are asked in their order.
fn copying(step: u64, n_rows: usize) -> Batch {
    const T: usize = 2 * N_COPIED + N_BLANKS;
    let mut random = random(step);
    let symbols: Vec<u32> = (0..N_COPIED * n_rows).map(|_| random.below(N_SYMBOLS)).collect();
    let mut tokens = symbols.clone();
    tokens.resize((N_COPIED + N_BLANKS) * n_rows, N_SYMBOLS);
    tokens.resize(T * n_rows, N_SYMBOLS + 1);
    let n_before = (N_COPIED + N_BLANKS) * n_rows;
    let targets = [vec![N_SYMBOLS; n_before], symbols].concat();
    let weights = (0..T * n_rows).map(|at| if at < n_before { 0.0 } else { 1.0 }).collect();
    batch(T, n_rows, Input::Tokens(tokens), Target::Tokens(targets), weights)
}

#[test]
fn five_symbols_are_said_again_after_a_pause() {
    let n_classes = N_SYMBOLS as usize + 2;
    let model = ModelConfig {
        input: ModelInput::Tokens { vocabulary: n_classes, width: 8 },
        output: Output::Classes { n_classes },
        n_layers: 1,
        hidden: 48.into(),
        dropout: 0.0,
        bias: true,
        tied: false,
        lstm: Default::default(),
    };
    let mut learner = Learner::new(model, copying);
    learner.train(700, 40, 2e-2);
    let loss = learner.loss();
    println!("[tasks] copying: {loss:.5}");
    // Guessing costs ln 4 = 1.39.
    assert!(loss < 0.1, "{loss}");
}

#[test]
fn a_sine_is_continued() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("sine.csv");
    let value = |row: u32| (f64::from(row) * std::f64::consts::TAU / 23.7).sin() * 3.0 + 10.0;
    let rows: String = (0..900).map(|row| format!("{row},{:.5}\n", value(row))).collect();
    std::fs::write(&file, format!("row,height\n{rows}")).unwrap();
    let mut config = config(Task::Forecast, &[&file]);
    config.split = Split { train: 0.7, valid: 0.1, test: 0.2 };
    (config.relative, config.seq_len, config.horizon, config.hidden) = (Relative::Auto, 24, 6, 24.into());
    (config.max_steps, config.batch_size, config.optimizer.lr, config.schedule.kind) = (Some(250), 32, 1e-2, ScheduleKind::Cosine);
    let ran = train(&config, &dir.path().join("run"), false);
    let summary = ran.outcome.unwrap().summary;
    let (loss, last) = (summary["test_loss"].as_f64().unwrap(), summary["baselines"]["last"].as_f64().unwrap());
    println!("[tasks] sine: {loss:.5}, the last value {last:.5}");
    assert!(last > 0.3, "the last value is no forecast of a sine: {last}");
    assert!(loss < 0.01 * last, "{loss} against {last} of the last value");
}
