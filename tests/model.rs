//! Whole networks: losses, outputs, states and gradients of [`Model`] on every device against the same network in naive f64, one row at a time,
//! and that network against central differences of its own loss.

use std::collections::BTreeMap;

use carrousel::backend::around::Around;
use carrousel::backend::{Backend, BufferId, Limits, Span, SweepPlan, read_now};
use carrousel::kernels::Kernel;
use carrousel::kernels::lstm::{Cell, sweep_plan};
use carrousel::model::config::{Hidden, Input, Levels, LstmConfig, ModelConfig, Output, Pooling};
use carrousel::model::init::{Init, initial};
use carrousel::model::{Model, Pass, Share, Words, read_buckets};
use carrousel::params::ParamTable;
use carrousel::rng::{Purpose, StepKey, Stream};
use carrousel::shape::pad_units;

use crate::adapters::{DEADLINE, Device, devices};
use crate::oracle::{RowCell, RowStep, cell_mask};

/// A network's parameters or gradients by name, in PyTorch's order.
type Tensors = BTreeMap<String, Vec<f64>>;

/// Largest error of a gradient's element, as a share of the tensor's largest element: sums of a few hundred f32 products, through a few dozen steps.
const GRADIENT_TOLERANCE: f64 = 2e-5;
/// Largest error of a state or an output, whose size is about 1.
const OUTPUT_TOLERANCE: f64 = 5e-6;

/// Words that go in, or that should come out.
#[derive(Clone, Debug)]
enum Data {
    Tokens(Vec<u32>),
    Values(Vec<f32>),
}

impl Data {
    fn words(&self) -> Words<'_> {
        match self {
            Self::Tokens(tokens) => Words::Tokens(tokens),
            Self::Values(values) => Words::Values(values),
        }
    }

    /// Rows `rows` of `[t, b, width]`.
    fn rows(&self, [t, b, width]: [usize; 3], rows: &std::ops::Range<usize>) -> Self {
        match self {
            Self::Tokens(tokens) => Self::Tokens(columns(tokens, [t, b, width], rows)),
            Self::Values(values) => Self::Values(columns(values, [t, b, width], rows)),
        }
    }
}

fn columns<T: Copy>(values: &[T], [t, b, width]: [usize; 3], rows: &std::ops::Range<usize>) -> Vec<T> {
    (0..t).flat_map(|step| &values[(step * b + rows.start) * width..(step * b + rows.end) * width]).copied().collect()
}

/// A network with parameters and a share to compute.
#[derive(Clone, Debug)]
struct Case {
    name: &'static str,
    config: ModelConfig,
    /// By tensor of the table.
    params: Vec<Vec<f32>>,
    n_steps: usize,
    n_rows: usize,
    input: Data,
    targets: Data,
    weights: Vec<f32>,
    /// Valid steps of each row; none: all of all.
    lengths: Option<Vec<u32>>,
    streams: Vec<u32>,
    /// `[L, 2, B, H]` without padding; none: zero.
    state: Option<Vec<f32>>,
    scale: f32,
    key: Option<StepKey>,
}

impl Case {
    /// Draws parameters of the size that networks start with, inputs, targets, and weights of which one is zero.
    fn new(name: &'static str, config: ModelConfig, [n_steps, n_rows]: [usize; 2], seed: u64) -> Self {
        let mut stream = Stream::new(StepKey::new(seed, 0), Purpose::Test, 900, 0);
        let mut uniform = |n: usize, size: f32| -> Vec<f32> { (0..n).map(|_| (2.0 * stream.uniform() - 1.0) * size).collect() };
        let table = config.table();
        let params = table.tensors().iter().map(|t| uniform(t.layout.torch_len(), 0.5)).collect();
        let tb = n_steps * n_rows;
        let input = match config.input {
            Input::Tokens { .. } => None,
            Input::Values { n_features } => Some(Data::Values(uniform(tb * n_features, 1.0))),
        };
        let (targets, mut weights) = match config.output {
            Output::Classes { .. } => (None, uniform(tb, 0.5)),
            Output::Notes { n_notes } => {
                let notes = uniform(tb * n_notes, 1.0).into_iter().map(|u| if u > 0.4 { 1.0 } else { 0.0 }).collect();
                (Some(Data::Values(notes)), uniform(tb, 0.5))
            }
            Output::Label { .. } => (None, uniform(n_rows, 0.5)),
            Output::Values { n_outputs, .. } | Output::Quantiles { n_values: n_outputs, .. } => {
                (Some(Data::Values(uniform(n_rows * n_outputs, 1.5))), uniform(n_rows * n_outputs, 0.5))
            }
        };
        weights.iter_mut().for_each(|w| *w += 1.0);
        if weights.len() > 1 {
            let middle = weights.len() / 2;
            weights[middle] = 0.0;
        }
        let mut tokens = |n: usize, below: usize| Data::Tokens((0..n).map(|_| stream.below(below as u32)).collect());
        let input = input.unwrap_or_else(|| match config.input {
            Input::Tokens { vocabulary, .. } => tokens(tb, vocabulary),
            Input::Values { .. } => unreachable!("values were drawn"),
        });
        let targets = targets.unwrap_or_else(|| tokens(weights.len(), config.n_outputs()));
        let scale = 1.0 / weights.iter().sum::<f32>();
        let streams = (0..n_rows as u32).map(|b| 1000 + 7 * b).collect();
        let l = &config.lstm;
        let draws = [config.dropout, l.recurrent_dropout, l.weight_drop, l.zoneout_h, l.zoneout_c];
        let at_ends = [l.input_dropout, l.output_dropout];
        let key = draws.iter().chain(&at_ends).any(|&p| p > 0.0).then(|| StepKey::new(seed, 17));
        Self { name, config, params, n_steps, n_rows, input, targets, weights, lengths: None, streams, state: None, scale, key }
    }

    fn with_state(mut self) -> Self {
        let mut stream = Stream::new(StepKey::new(41, 0), Purpose::Test, 901, 0);
        let len = self.config.state_units().iter().flatten().sum::<usize>() * self.n_rows;
        self.state = Some((0..len).map(|_| 2.0 * stream.uniform() - 1.0).collect());
        self
    }

    /// With rows that end; a row of no steps must have weight 0.
    fn with_lengths(mut self, lengths: &[u32]) -> Self {
        let per_row = self.weights.len() / self.n_rows;
        if !self.is_per_step() {
            for (weights, _) in self.weights.chunks_exact_mut(per_row).zip(lengths).filter(|(_, length)| **length == 0) {
                weights.fill(0.0);
            }
        }
        self.lengths = Some(lengths.to_vec());
        self.scale = 1.0 / (0..self.weights.len()).filter(|&at| self.counts(at)).map(|at| self.weights[at]).sum::<f32>();
        self
    }

    fn is_per_step(&self) -> bool {
        matches!(self.config.output, Output::Classes { .. } | Output::Notes { .. })
    }

    /// Valid steps of a row.
    fn length(&self, row: usize) -> usize {
        self.lengths.as_ref().map_or(self.n_steps, |lengths| lengths[row] as usize)
    }

    /// Whether a row of outputs lies before its sequence's end.
    fn counts(&self, at: usize) -> bool {
        !self.is_per_step() || at / self.n_rows < self.length(at % self.n_rows)
    }

    /// With other numbers of steps: what lies beyond is cut off, what is missing filled with garbage.
    fn with_steps(&self, n_steps: usize) -> Self {
        let tb = n_steps * self.n_rows;
        fn cut<T: Copy>(values: &[T], len: usize, garbage: T) -> Vec<T> {
            values.iter().copied().chain(std::iter::repeat(garbage)).take(len).collect()
        }
        let cut_all = |data: &Data, garbage: f32| match data {
            Data::Tokens(tokens) => Data::Tokens(cut(tokens, tb, 1)),
            Data::Values(values) => Data::Values(cut(values, values.len() / self.n_steps * n_steps, garbage)),
        };
        let lengths = (0..self.n_rows).map(|row| self.length(row) as u32).collect();
        let (mut targets, mut weights) = (self.targets.clone(), self.weights.clone());
        if self.is_per_step() {
            // What the targets behind a row's end hold does not count.
            (targets, weights) = (cut_all(&targets, 0.5), cut(&weights, tb, 3.0));
        }
        Self { n_steps, input: cut_all(&self.input, f32::NAN), targets, weights, lengths: Some(lengths), ..self.clone() }
    }

    /// The state with H padded, as a share takes it.
    fn padded_state(&self) -> Option<Vec<f32>> {
        let state = self.state.as_ref()?;
        let padded = self.blocks().flat_map(|(start, units)| {
            let rows = state[start..start + self.n_rows * units].chunks_exact(units);
            rows.flat_map(move |row| row.iter().copied().chain(std::iter::repeat_n(0.0, pad_units(units) - units)))
        });
        Some(padded.collect())
    }

    /// Of the state without padding: where h and c of every lane start, and their units.
    fn blocks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (n_rows, mut next) = (self.n_rows, 0);
        self.config.state_units().into_iter().flatten().map(move |units| {
            let start = next;
            next += n_rows * units;
            (start, units)
        })
    }

    fn share<'a>(&'a self, state: Option<&'a [f32]>) -> Share<'a> {
        Share {
            n_steps: self.n_steps,
            n_rows: self.n_rows,
            input: self.input.words(),
            targets: Some(self.targets.words()),
            weights: &self.weights,
            lengths: self.lengths.as_deref(),
            streams: &self.streams,
            state,
            final_gradient: None,
            scale: self.scale,
        }
    }

    /// Only these rows, with the whole's scale.
    fn rows(&self, rows: std::ops::Range<usize>) -> Self {
        let (t, b) = (self.n_steps, self.n_rows);
        let width = match self.config.input {
            Input::Tokens { .. } => 1,
            Input::Values { n_features } => n_features,
        };
        let terms = match self.config.output {
            Output::Classes { .. } | Output::Notes { .. } => [t, b, 1],
            Output::Label { .. } => [1, b, 1],
            Output::Values { n_outputs, .. } | Output::Quantiles { n_values: n_outputs, .. } => [1, b, n_outputs],
        };
        let targets = [terms[0], terms[1], if terms[2] == 1 { self.config.n_targets() } else { terms[2] }];
        Self {
            n_rows: rows.len(),
            input: self.input.rows([t, b, width], &rows),
            targets: self.targets.rows(targets, &rows),
            weights: columns(&self.weights, terms, &rows),
            lengths: self.lengths.as_ref().map(|lengths| lengths[rows.clone()].to_vec()),
            streams: self.streams[rows.clone()].to_vec(),
            state: self.state.as_ref().map(|state| {
                let blocks = self.blocks();
                blocks.flat_map(|(start, units)| &state[start + rows.start * units..start + rows.end * units]).copied().collect()
            }),
            ..self.clone()
        }
    }

    fn named(&self) -> Tensors {
        let table = self.config.table();
        let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect();
        table.tensors().iter().zip(&self.params).map(|(t, values)| (t.name.clone(), wide(values))).collect()
    }
}

fn tokens(vocabulary: usize, width: usize) -> Input {
    Input::Tokens { vocabulary, width }
}

/// Networks with every choice that a configuration has.
fn cases() -> Vec<Case> {
    let lm = |v: usize, width: usize, n_layers: usize, hidden: usize| ModelConfig {
        input: tokens(v, width),
        output: Output::Classes { n_classes: v },
        n_layers,
        hidden: hidden.into(),
        dropout: 0.0,
        bias: true,
        tied: false,
        lstm: Default::default(),
    };
    let regression = ModelConfig {
        input: Input::Values { n_features: 3 },
        output: Output::Values { n_outputs: 5, pooling: Pooling::Last },
        ..lm(1, 1, 1, 20)
    };
    let deep = ModelConfig { n_layers: 2, hidden: 9.into(), ..regression.clone() };
    let labels = ModelConfig { input: Input::Values { n_features: 5 }, output: Output::Classes { n_classes: 6 }, ..lm(1, 1, 2, 9) };
    vec![
        Case::new("two layers over tokens", lm(11, 12, 2, 17), [6, 3], 1),
        Case::new("tied", ModelConfig { tied: true, ..lm(13, 16, 1, 16) }, [5, 4], 2),
        Case::new("tied with padding, dropout and state", ModelConfig { tied: true, dropout: 0.3, ..lm(6, 18, 2, 18) }, [7, 3], 3)
            .with_state(),
        Case::new("values to values", regression.clone(), [9, 4], 4),
        Case::new("two layers of values with dropout and state", ModelConfig { n_layers: 2, dropout: 0.25, ..regression }, [5, 3], 5)
            .with_state(),
        Case::new("values to classes", labels, [4, 5], 6),
        Case::new("dropout of 0.4 in three layers", ModelConfig { dropout: 0.4, ..lm(11, 10, 3, 17) }, [6, 5], 7),
        Case::new("no bias", ModelConfig { bias: false, ..lm(7, 5, 2, 12) }, [5, 3], 8),
        Case::new("state carried in", lm(9, 16, 2, 16), [3, 2], 9).with_state(),
        Case::new("one step, one row, one unit", lm(2, 1, 1, 1), [1, 1], 10),
    ]
    .into_iter()
    .chain(options(&lm(5, 9, 3, 9), &deep))
    .chain(wider(&lm(5, 9, 3, 9), &deep))
    .chain(of_lengths(&lm(5, 9, 2, 9), &deep))
    .chain(of_other_losses(&deep))
    .chain(dropped_at_the_ends(&lm(5, 9, 2, 9), &deep))
    .collect()
}

/// Notes at every step, and quantiles.
fn of_other_losses(values: &ModelConfig) -> Vec<Case> {
    let notes = |n_notes| ModelConfig { output: Output::Notes { n_notes }, input: Input::Values { n_features: n_notes }, ..values.clone() };
    let levels = |levels: &[f64]| Levels::try_from(levels.to_vec()).expect("levels");
    let quantiles =
        |of: &[f64], pooling| ModelConfig { output: Output::Quantiles { n_values: 3, levels: levels(of), pooling }, ..values.clone() };
    vec![
        Case::new("notes", notes(7), [6, 3], 100),
        Case::new("notes of rows that end, dropout", ModelConfig { dropout: 0.3, ..notes(5) }, [6, 4], 101).with_lengths(&[4, 6, 1, 3]),
        Case::new("quantiles", quantiles(&[0.1, 0.5, 0.9], Pooling::Last), [6, 3], 102),
        Case::new("quantiles of rows that end, by the mean", quantiles(&[0.25, 0.975], Pooling::Mean), [6, 4], 103)
            .with_lengths(&[4, 6, 1, 3]),
    ]
}

/// Dropout of what the first layer reads and of what the last one hands up.
fn dropped_at_the_ends(lm: &ModelConfig, values: &ModelConfig) -> Vec<Case> {
    let with = |config: &ModelConfig, input_dropout, output_dropout, bidirectional| ModelConfig {
        lstm: LstmConfig { input_dropout, output_dropout, bidirectional, ..LstmConfig::default() },
        ..config.clone()
    };
    let label = |config: &ModelConfig, pooling| ModelConfig { output: Output::Label { n_classes: 4, pooling }, ..config.clone() };
    let tied = ModelConfig { tied: true, dropout: 0.3, ..with(lm, 0.2, 0.4, false) };
    let residual = ModelConfig {
        lstm: LstmConfig { residual: true, input_dropout: 0.25, output_dropout: 0.25, ..LstmConfig::default() },
        dropout: 0.3,
        ..lm.clone()
    };
    vec![
        Case::new("inputs of tokens dropped", with(lm, 0.3, 0.0, false), [5, 3], 110),
        Case::new("outputs of steps dropped", with(lm, 0.0, 0.3, false), [5, 3], 111),
        Case::new("tied, dropped everywhere", tied, [5, 3], 112).with_state(),
        Case::new("residual, dropped everywhere", residual, [5, 3], 113),
        Case::new("numbers dropped at both ends", with(values, 0.4, 0.3, false), [5, 4], 114),
        Case::new("a label, dropped at both ends, both directions", with(&label(values, Pooling::Last), 0.3, 0.4, true), [5, 4], 115)
            .with_lengths(&[5, 2, 4, 1]),
        Case::new("a label by the mean, dropped at both ends", with(&label(lm, Pooling::Mean), 0.3, 0.4, true), [5, 4], 116)
            .with_lengths(&[5, 2, 4, 1]),
    ]
}

/// Sequences as a whole, and rows that end at different steps.
fn of_lengths(lm: &ModelConfig, values: &ModelConfig) -> Vec<Case> {
    let with = |config: &ModelConfig, lstm: LstmConfig, dropout: f64| ModelConfig { lstm, dropout, ..config.clone() };
    let label = |config: &ModelConfig, pooling| ModelConfig { output: Output::Label { n_classes: 4, pooling }, ..config.clone() };
    let mean = |config: &ModelConfig| ModelConfig { output: Output::Values { n_outputs: 2, pooling: Pooling::Mean }, ..config.clone() };
    let none = LstmConfig::default();
    let both = LstmConfig { bidirectional: true, ..none };
    let residual = LstmConfig { residual: true, ..both };
    let random = LstmConfig { recurrent_dropout: 0.25, weight_drop: 0.3, zoneout_h: 0.2, zoneout_c: 0.4, learned_state: true, ..residual };
    let (last, all) = (Pooling::Last, Pooling::Mean);
    vec![
        Case::new("a label by the last state", label(lm, last), [5, 4], 50),
        Case::new("a label by the mean", label(lm, all), [5, 4], 51),
        Case::new("steps of rows that end", with(lm, none, 0.0), [6, 4], 52).with_lengths(&[4, 6, 1, 3]),
        Case::new("a label of rows that end", label(lm, last), [6, 5], 53).with_lengths(&[4, 6, 1, 3, 0]),
        Case::new("a label of rows that end, both directions, dropout", with(&label(values, last), both, 0.3), [6, 4], 54)
            .with_lengths(&[2, 5, 6, 1]),
        Case::new("a label by the mean of rows that end, both directions, dropout", with(&label(values, all), both, 0.3), [6, 5], 55)
            .with_lengths(&[2, 0, 5, 6, 1]),
        Case::new("numbers of rows that end", values.clone(), [5, 4], 56).with_lengths(&[5, 2, 4, 1]).with_state(),
        Case::new("numbers by the mean of rows that end", mean(values), [5, 4], 57).with_lengths(&[3, 2, 5, 1]),
        Case::new("numbers of rows that end, residual", with(values, residual, 0.2), [5, 4], 58).with_lengths(&[3, 2, 4, 1]),
        Case::new("a label by the mean, all that draws", with(&label(values, all), random, 0.2), [5, 4], 59).with_lengths(&[5, 2, 4, 1]),
        Case::new("steps of rows that end, peepholes", with(lm, LstmConfig { peephole: true, ..none }, 0.3), [5, 3], 60)
            .with_lengths(&[1, 5, 4])
            .with_state(),
    ]
}

/// Projections, layer normalisation, and layers of unlike widths.
fn wider(lm: &ModelConfig, values: &ModelConfig) -> Vec<Case> {
    let with = |config: &ModelConfig, lstm: LstmConfig| ModelConfig { lstm, ..config.clone() };
    let none = LstmConfig::default();
    let each = |config: &ModelConfig, units: &[usize]| ModelConfig {
        hidden: Hidden::Each(units.to_vec()),
        n_layers: units.len(),
        ..config.clone()
    };
    let dropped = |config: &ModelConfig| ModelConfig { dropout: 0.2, ..config.clone() };
    let labels = ModelConfig { output: Output::Classes { n_classes: 6 }, ..values.clone() };
    let projected = LstmConfig { proj_size: 4, ..none };
    let both = LstmConfig { bidirectional: true, proj_size: 3, layer_norm: true, ..none };
    let all = LstmConfig { peephole: true, residual: true, learned_state: true, cell_clip: 0.8, ..both };
    let random = LstmConfig { recurrent_dropout: 0.25, weight_drop: 0.3, zoneout_h: 0.2, zoneout_c: 0.4, ..all };
    vec![
        Case::new("projected", with(lm, projected), [5, 3], 70),
        Case::new("projected with state", with(lm, projected), [5, 3], 71).with_state(),
        Case::new("projected, residual, dropout", dropped(&with(lm, LstmConfig { residual: true, ..projected })), [5, 3], 72),
        Case::new("projected and tied", ModelConfig { tied: true, input: tokens(5, 4), ..with(lm, projected) }, [5, 3], 73),
        Case::new("normed", with(values, LstmConfig { layer_norm: true, ..none }), [5, 4], 74),
        Case::new("normed without bias", ModelConfig { bias: false, ..with(lm, LstmConfig { layer_norm: true, ..none }) }, [5, 3], 75),
        Case::new("widths of each layer", each(lm, &[7, 18, 9]), [5, 3], 76).with_state(),
        Case::new(
            "widths of each layer, both directions, residual",
            each(&with(&labels, LstmConfig { residual: true, ..both }), &[9, 17, 5]),
            [5, 3],
            77,
        ),
        Case::new("projected and normed in both directions", dropped(&with(values, both)), [5, 4], 78),
        Case::new("projected and normed, rows that end", with(&labels, both), [6, 4], 79).with_lengths(&[4, 6, 1, 3]),
        Case::new("projected and normed, all at once", dropped(&each(&with(&labels, all), &[9, 12])), [5, 3], 80),
        Case::new("projected and normed, all that draws", dropped(&each(&with(&labels, random), &[9, 12])), [5, 3], 81),
        Case::new(
            "projected, all that draws",
            dropped(&with(lm, LstmConfig { bidirectional: false, layer_norm: false, ..random })),
            [5, 3],
            82,
        )
        .with_state(),
    ]
}

/// Every option of the cell and the stack alone, then many together.
fn options(lm: &ModelConfig, values: &ModelConfig) -> Vec<Case> {
    let with = |config: &ModelConfig, lstm: LstmConfig| ModelConfig { lstm, ..config.clone() };
    let none = LstmConfig::default();
    let both = LstmConfig { bidirectional: true, ..none };
    let random = LstmConfig { recurrent_dropout: 0.25, weight_drop: 0.3, zoneout_h: 0.2, zoneout_c: 0.4, ..none };
    let shaped = LstmConfig { peephole: true, residual: true, learned_state: true, ..none };
    let dropped = |config: &ModelConfig| ModelConfig { dropout: 0.2, ..config.clone() };
    let labels = ModelConfig { output: Output::Classes { n_classes: 6 }, ..values.clone() };
    vec![
        Case::new("both directions", with(values, both), [5, 4], 20),
        Case::new("both directions, labels, dropout", dropped(&with(&labels, both)), [5, 3], 21),
        Case::new("residual", with(lm, LstmConfig { residual: true, ..none }), [4, 3], 22),
        Case::new("residual with dropout", dropped(&with(lm, LstmConfig { residual: true, ..none })), [4, 3], 23),
        Case::new("residual to values", dropped(&with(values, LstmConfig { residual: true, ..none })), [4, 3], 24),
        Case::new("residual in both directions", with(&labels, LstmConfig { residual: true, ..both }), [4, 3], 25),
        Case::new("learned state", with(values, LstmConfig { learned_state: true, ..both }), [4, 3], 26),
        Case::new("learned state, but another is given", with(lm, LstmConfig { learned_state: true, ..none }), [4, 3], 27).with_state(),
        Case::new("peepholes", with(lm, LstmConfig { peephole: true, ..none }), [4, 3], 28),
        Case::new("peepholes without bias", ModelConfig { bias: false, ..with(lm, LstmConfig { peephole: true, ..none }) }, [4, 3], 29),
        Case::new("coupled gates", with(lm, LstmConfig { coupled_gates: true, ..none }), [4, 3], 30),
        Case::new("cell clip", with(lm, LstmConfig { cell_clip: 0.1, ..none }), [4, 3], 31),
        Case::new("recurrent dropout", with(lm, LstmConfig { recurrent_dropout: 0.25, ..none }), [4, 3], 32).with_state(),
        Case::new("weight drop", with(lm, LstmConfig { weight_drop: 0.3, ..none }), [4, 3], 33),
        Case::new("zoneout", with(lm, LstmConfig { zoneout_h: 0.2, zoneout_c: 0.4, ..none }), [4, 3], 34),
        Case::new("all that draws", dropped(&with(lm, random)), [5, 3], 35).with_state(),
        Case::new("all in both directions", dropped(&with(values, LstmConfig { bidirectional: true, ..shaped })), [5, 3], 36),
        Case::new(
            "all at once",
            dropped(&with(&labels, LstmConfig { bidirectional: true, peephole: true, residual: true, learned_state: true, ..random })),
            [5, 3],
            37,
        ),
    ]
}

fn case(name: &str) -> Case {
    cases().into_iter().find(|c| c.name == name).expect("a case of that name")
}

/// `w x` for `w` `[rows, x.len()]`.
fn product(w: &[f64], x: &[f64]) -> Vec<f64> {
    w.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
}

/// `to += d x^T`, and `w^T d` for `w` of the same shape.
fn product_backward(w: &[f64], x: &[f64], d: &[f64], to: &mut [f64]) -> Vec<f64> {
    let mut dx = vec![0.0; x.len()];
    for ((row, to), d) in w.chunks_exact(x.len()).zip(to.chunks_exact_mut(x.len())).zip(d) {
        for k in 0..x.len() {
            to[k] += d * x[k];
            dx[k] += d * row[k];
        }
    }
    dx
}

fn add(to: &mut [f64], values: &[f64]) {
    to.iter_mut().zip(values).for_each(|(to, v)| *to += v);
}

/// What one layer saw in one direction, in the order of its steps: the time, what its recurrent product read, the step.
type Past = Vec<(usize, Vec<f64>, RowStep)>;

/// The cell of a lane with its weights.
fn row_cell<'a>(params: &'a Tensors, suffix: &str, cell: &'a Cell, hidden: usize) -> RowCell<'a> {
    let of = |what: &str| params.get(&format!("lstm.{what}_{suffix}")).map(|values| &values[..]);
    let norm = of("norm_c").map(|c| [of("norm_ih").expect("a gain"), of("norm_hh").expect("a gain"), c]);
    RowCell { cell, hidden, peephole: of("weight_peephole"), norm, projection: of("weight_hr") }
}

/// What a network makes of a share, in f64.
struct Solution {
    /// Sum over the terms.
    loss: f64,
    grads: Tensors,
    /// `[rows, O]`: `T x B` rows for classes, `B` for values.
    outputs: Vec<f64>,
    /// `[L, 2, B, H]`, both directions of a layer one after the other.
    state: Vec<f64>,
}

/// The factor of a unit of what a layer hands up in one direction: zero where it is dropped.
fn kept(case: &Case, lane: usize, row: usize, t: usize, unit: usize) -> f64 {
    let n = case.config.n_directions();
    let (layer, direction) = ((lane / n) as u32, (lane % n) as u32);
    let is_last = layer as usize + 1 == case.config.n_layers;
    let p = if is_last { case.config.lstm.output_dropout } else { case.config.dropout };
    let Some(key) = case.key else { return 1.0 };
    let word = key.draw(Purpose::Dropout, layer | direction << 16, case.streams[row], t as u32, unit as u32 / 4)[unit % 4];
    survives(word, p)
}

/// 1 / (1 - p) where the word says that a value is kept, else 0.
fn survives(word: u32, p: f64) -> f64 {
    if f64::from(word) >= p * 4_294_967_296.0 { 1.0 / (1.0 - p) } else { 0.0 }
}

/// The factor of a value that dropout of probability `p` may have dropped.
fn dropped(case: &Case, p: f64, layer: u32, stream: u32, t: usize, unit: usize) -> f64 {
    match case.key.filter(|_| p > 0.0) {
        Some(key) => survives(key.draw(Purpose::Dropout, layer, stream, t as u32, unit as u32 / 4)[unit % 4], p),
        None => 1.0,
    }
}

/// The factor of each recurrent weight, in torch's order; drawn by the place where it lies in the program.
fn weight_mask(case: &Case, name: &str, lane: usize) -> Vec<f64> {
    let tensor = case.config.table().get(name).expect("a weight").clone();
    let mut mask = vec![1.0; tensor.layout.torch_len()];
    if let Some(key) = case.key.filter(|_| case.config.lstm.weight_drop > 0.0) {
        tensor.layout.for_each(|at, place| {
            let word = key.draw(Purpose::WeightDrop, lane as u32, 0, 0, place as u32 / 4)[place % 4];
            mask[at] = survives(word, case.config.lstm.weight_drop);
        });
    }
    mask
}

/// The cell of a lane as the oracle of the kernels knows it.
fn cell(case: &Case, lane: usize) -> Cell {
    let c = &case.config.lstm;
    let cell = Cell {
        coupled: u32::from(c.coupled_gates),
        cell_clip: c.cell_clip as f32,
        grad_clip: c.recurrent_grad_clip as f32,
        zoneout_h: c.zoneout_h as f32,
        zoneout_c: c.zoneout_c as f32,
        lane: lane as u32,
        ..Cell::PLAIN
    };
    let Some(key) = case.key else { return cell };
    let cell = Cell { draws: 1, key0: key.0[0], key1: key.0[1], ..cell };
    if c.recurrent_dropout == 0.0 {
        return cell;
    }
    Cell { mask_threshold: (c.recurrent_dropout * 4_294_967_296.0) as u32, mask_scale: (1.0 / (1.0 - c.recurrent_dropout)) as f32, ..cell }
}

/// Loss and, if wanted, gradients of one term's outputs.
fn term(case: &Case, at: usize, outputs: &[f64]) -> (f64, Vec<f64>) {
    let (n, weight) = (outputs.len(), |i: usize| f64::from(case.weights[i]));
    match &case.targets {
        Data::Tokens(targets) => {
            let max = outputs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = outputs.iter().map(|v| (v - max).exp()).sum();
            let target = targets[at] as usize;
            let probability = |v: usize| (outputs[v] - max).exp() / sum;
            let gradient = (0..n).map(|v| weight(at) * (probability(v) - if v == target { 1.0 } else { 0.0 })).collect();
            (weight(at) * (max + sum.ln() - outputs[target]), gradient)
        }
        Data::Values(targets) if matches!(case.config.output, Output::Notes { .. }) => {
            let target = |o: usize| f64::from(targets[at * n + o]);
            let p = |o: usize| 1.0 / (1.0 + (-outputs[o]).exp());
            let loss: f64 = (0..n).map(|o| -target(o) * p(o).ln() - (1.0 - target(o)) * (1.0 - p(o)).ln()).sum();
            (weight(at) * loss, (0..n).map(|o| weight(at) * (p(o) - target(o))).collect())
        }
        Data::Values(targets) if matches!(case.config.output, Output::Quantiles { .. }) => {
            let Output::Quantiles { n_values, levels, .. } = case.config.output else { unreachable!("it was just looked at") };
            let levels: Vec<f64> = levels.values().collect();
            let q = levels.len();
            let (mut loss, mut gradient) = (0.0, vec![0.0; n]);
            for (o, said) in outputs.iter().enumerate() {
                let (value, level) = (at * n_values + o / q, levels[o % q]);
                let d = f64::from(targets[value]) - said;
                loss += weight(value) / q as f64 * (level * d).max((level - 1.0) * d);
                gradient[o] = weight(value) / q as f64 * if d > 0.0 { -level } else { 1.0 - level };
            }
            (loss, gradient)
        }
        Data::Values(targets) => {
            let difference = |o: usize| outputs[o] - f64::from(targets[at * n + o]);
            let loss = (0..n).map(|o| weight(at * n + o) * difference(o).powi(2)).sum();
            (loss, (0..n).map(|o| 2.0 * weight(at * n + o) * difference(o)).collect())
        }
    }
}

/// The network forward, and backward where `gradients` says so.
fn solve(case: &Case, params: &Tensors, gradients: bool) -> Solution {
    let (n_layers, n_outputs) = (case.config.n_layers, case.config.n_outputs());
    let units = case.config.state_units();
    let blocks: Vec<(usize, usize)> = case.blocks().collect();
    let n = case.config.n_directions();
    let (n_steps, n_rows) = (case.n_steps, case.n_rows);
    let head = if case.config.tied { "embedding.weight" } else { "head.weight" };
    let per_step = case.is_per_step();
    let name = |lane: usize, what: &str| format!("lstm.{what}_l{}{}", lane / n, if lane % n == 1 { "_reverse" } else { "" });
    let mut grads: Tensors = params.iter().map(|(name, values)| (name.clone(), vec![0.0; values.len()])).collect();
    let mut outputs = vec![0.0; if per_step { n_steps * n_rows } else { n_rows } * n_outputs];
    let mut state = vec![0.0; units.iter().flatten().sum::<usize>() * n_rows];
    let mut loss = 0.0;
    let masks: Vec<Vec<f64>> = (0..n_layers * n).map(|lane| weight_mask(case, &name(lane, "weight_hh"), lane)).collect();
    let kept_weights: Vec<Vec<f64>> =
        (0..n_layers * n).map(|lane| params[&name(lane, "weight_hh")].iter().zip(&masks[lane]).map(|(w, m)| w * m).collect()).collect();
    for row in 0..n_rows {
        // Of a row: where h (0) or c (1) of a lane lie in the state.
        let place = |lane: usize, which: usize| {
            let (start, units) = blocks[2 * lane + which];
            start + row * units..start + (row + 1) * units
        };
        let given = |lane: usize, which: usize| -> Vec<f64> {
            match (&case.state, params.get(&name(lane, ["initial_h", "initial_c"][which]))) {
                (Some(state), _) => state[place(lane, which)].iter().map(|&v| f64::from(v)).collect(),
                (None, Some(learned)) => learned.clone(),
                (None, None) => vec![0.0; units[lane][which]],
            }
        };
        let n_valid = case.length(row);
        if n_valid == 0 {
            assert!(case.state.is_none() && !case.config.lstm.learned_state, "of a row without steps only zeros are known");
            outputs[row * n_outputs..][..n_outputs].copy_from_slice(&params["head.bias"]);
            continue;
        }
        let mut flow: Vec<Vec<f64>> = (0..n_valid)
            .map(|t| match &case.input {
                Data::Tokens(tokens) => {
                    let width = params["embedding.weight"].len() / n_tokens(case);
                    params["embedding.weight"][tokens[t * n_rows + row] as usize * width..][..width].to_vec()
                }
                Data::Values(values) => {
                    let width = values.len() / (n_steps * n_rows);
                    values[(t * n_rows + row) * width..][..width].iter().map(|&v| f64::from(v)).collect()
                }
            })
            .collect();
        let stream = case.streams[row];
        for (t, x) in flow.iter_mut().enumerate() {
            x.iter_mut().enumerate().for_each(|(i, x)| *x *= dropped(case, case.config.lstm.input_dropout, 1 << 15, stream, t, i));
        }
        let mut past: Vec<Past> = Vec::new();
        let mut inputs: Vec<Vec<Vec<f64>>> = Vec::new();
        let is_residual =
            |layer: usize, flow: &[Vec<f64>]| case.config.lstm.residual && layer > 0 && flow[0].len() == n * units[layer * n][0];
        for layer in 0..n_layers {
            let [width, hidden] = units[layer * n];
            let mut above = vec![vec![0.0; n * width]; n_valid];
            for direction in 0..n {
                let lane = layer * n + direction;
                let of = |what: &str| params.get(&name(lane, what));
                let cell = cell(case, lane);
                let row_cell = row_cell(params, &name(lane, "")["lstm._".len()..], &cell, hidden);
                let stream = case.streams[row] as usize;
                let (mut h, mut c) = (given(lane, 0), given(lane, 1));
                let mut moments = Past::new();
                let order: Vec<usize> = if direction == 1 { (0..n_valid).rev().collect() } else { (0..n_valid).collect() };
                for t in order {
                    let r_in: Vec<f64> = h.iter().enumerate().map(|(u, h)| h * cell_mask(&cell, stream, u)).collect();
                    let mut bias = vec![0.0; 4 * hidden];
                    for part in [of("bias_ih"), of("bias_hh")].into_iter().flatten() {
                        add(&mut bias, part);
                    }
                    let by_input = product(of("weight_ih").expect("a weight"), &flow[t]);
                    let step = row_cell.forward(&by_input, &product(&kept_weights[lane], &r_in), &bias, &h, &c, stream, t as u32);
                    (h, c) = (step.h.clone(), step.c.clone());
                    (0..width).for_each(|u| above[t][direction * width + u] = h[u] * kept(case, lane, row, t, u));
                    moments.push((t, r_in, step));
                }
                state[place(lane, 0)].copy_from_slice(&h);
                state[place(lane, 1)].copy_from_slice(&c);
                past.push(moments);
            }
            if is_residual(layer, &flow) {
                above.iter_mut().zip(&flow).for_each(|(above, x)| add(above, x));
            }
            inputs.push(std::mem::replace(&mut flow, above));
        }
        // Gradients of what each layer hands up, by step.
        let top = units[(n_layers - 1) * n][0];
        let mut above = vec![vec![0.0; n * top]; n_valid];
        // By row of outputs: the steps that the head reads, how much each counts in the one direction and in the other.
        let mean = 1.0 / n_valid as f64;
        let reads: Vec<Vec<(usize, [f64; 2])>> = match case.config.output {
            Output::Classes { .. } | Output::Notes { .. } => (0..n_valid).map(|t| vec![(t, [1.0; 2])]).collect(),
            Output::Label { pooling: Pooling::Mean, .. }
            | Output::Values { pooling: Pooling::Mean, .. }
            | Output::Quantiles { pooling: Pooling::Mean, .. } => {
                vec![(0..n_valid).map(|t| (t, [mean; 2])).collect()]
            }
            Output::Label { .. } | Output::Values { .. } | Output::Quantiles { .. } => {
                vec![vec![(n_valid - 1, [1.0, 0.0]), (0, [0.0, 1.0])]]
            }
        };
        for (i, steps) in reads.into_iter().enumerate() {
            let at = if per_step { i * n_rows + row } else { row };
            let mut x = vec![0.0; n * top];
            for (t, counts) in &steps {
                x.iter_mut().enumerate().for_each(|(j, x)| *x += counts[j / top] * flow[*t][j]);
            }
            let mut y = product(&params[head], &x);
            add(&mut y, &params["head.bias"]);
            let (term_loss, mut dy) = term(case, at, &y);
            outputs[at * n_outputs..][..n_outputs].copy_from_slice(&y);
            loss += term_loss;
            if gradients {
                dy.iter_mut().for_each(|d| *d *= f64::from(case.scale));
                let dx = product_backward(&params[head], &x, &dy, grads.get_mut(head).expect("the head's"));
                for (t, counts) in &steps {
                    above[*t].iter_mut().enumerate().for_each(|(j, above)| *above += counts[j / top] * dx[j]);
                }
                add(grads.get_mut("head.bias").expect("the head's"), &dy);
            }
        }
        if !gradients {
            continue;
        }
        for layer in (0..n_layers).rev() {
            let x = &inputs[layer];
            let [width, hidden] = units[layer * n];
            let mut below = if is_residual(layer, x) { above.clone() } else { vec![vec![0.0; x[0].len()]; n_valid] };
            for direction in 0..n {
                let lane = layer * n + direction;
                let cell = cell(case, lane);
                let row_cell = row_cell(params, &name(lane, "")["lstm._".len()..], &cell, hidden);
                let stream = case.streams[row] as usize;
                let (mut dh, mut dc) = (vec![0.0; width], vec![0.0; hidden]);
                for (t, r_in, step) in past[lane].iter().rev() {
                    (0..width).for_each(|u| dh[u] += above[*t][direction * width + u] * kept(case, lane, row, *t, u));
                    let back = row_cell.backward(step, &dh, &dc);
                    (dh, dc) = (back.h, back.c);
                    let of_cell = [
                        ("bias_ih", &back.z),
                        ("bias_hh", &back.z),
                        ("weight_peephole", &back.peephole),
                        ("weight_hr", &back.projection),
                        ("norm_ih", &back.norm[0]),
                        ("norm_hh", &back.norm[1]),
                        ("norm_c", &back.norm[2]),
                    ];
                    for (what, values) in of_cell {
                        if let Some(to) = grads.get_mut(&name(lane, what)) {
                            add(to, values);
                        }
                    }
                    let (ih, hh) = (name(lane, "weight_ih"), name(lane, "weight_hh"));
                    add(&mut below[*t], &product_backward(&params[&ih], &x[*t], &back.x, grads.get_mut(&ih).expect("a weight")));
                    let mut to = vec![0.0; kept_weights[lane].len()];
                    let dr = product_backward(&kept_weights[lane], r_in, &back.y, &mut to);
                    grads.get_mut(&hh).expect("a weight").iter_mut().zip(to.iter().zip(&masks[lane])).for_each(|(g, (d, m))| *g += d * m);
                    (0..width).for_each(|u| dh[u] += dr[u] * cell_mask(&cell, stream, u));
                }
                for (which, d) in [("initial_h", &dh), ("initial_c", &dc)] {
                    if let (None, Some(to)) = (&case.state, grads.get_mut(&name(lane, which))) {
                        add(to, d);
                    }
                }
            }
            above = below;
        }
        if let Data::Tokens(tokens) = &case.input {
            let to = grads.get_mut("embedding.weight").expect("tokens are embedded");
            for (t, dx) in above.iter_mut().enumerate() {
                dx.iter_mut().enumerate().for_each(|(i, dx)| *dx *= dropped(case, case.config.lstm.input_dropout, 1 << 15, stream, t, i));
                add(&mut to[tokens[t * n_rows + row] as usize * dx.len()..][..dx.len()], dx);
            }
        }
    }
    Solution { loss, grads, outputs, state }
}

fn n_tokens(case: &Case) -> usize {
    match case.config.input {
        Input::Tokens { vocabulary, .. } => vocabulary,
        Input::Values { .. } => 0,
    }
}

/// What a device makes of a share.
#[derive(Clone, Debug, PartialEq)]
struct Computed {
    loss: f32,
    grads: Vec<Vec<f32>>,
    /// `[L, 2, B, H]` without padding.
    state: Vec<f32>,
}

/// A replica with the case's parameters.
fn replica(backend: &mut dyn Backend, case: &Case) -> Model {
    let mut model = Model::new(case.config.clone(), backend).expect("a model");
    model.write_params(backend, &case.params).expect("parameters");
    model
}

/// One pass, as part `part` of its step.
fn pass(backend: &mut dyn Backend, model: &mut Model, case: &Case, part: usize) {
    let state = case.padded_state();
    let pass = Pass { key: case.key, gradients: true, part };
    model.run(backend, &case.share(state.as_deref()), pass, &mut |_, _, _| Ok(())).expect("a pass");
}

fn grads(backend: &mut dyn Backend, model: &Model) -> Vec<Vec<f32>> {
    read_buckets(model.table(), backend, model.grads(), DEADLINE).expect("gradients")
}

fn compute(backend: &mut dyn Backend, model: &mut Model, case: &Case) -> Computed {
    pass(backend, model, case, 0);
    let loss = read_now(backend, model.loss(1), DEADLINE).expect("a loss")[0];
    let spans = model.final_state(case.n_steps, case.n_rows);
    let state = backend.read(&spans, Vec::new()).and_then(|r| r.wait(DEADLINE)).expect("a state");
    let mut rest = &state[..];
    let mut unpadded = Vec::new();
    for (_, units) in case.blocks() {
        let (block, behind) = rest.split_at(case.n_rows * pad_units(units));
        for row in block.chunks_exact(pad_units(units)) {
            assert!(row[units..].iter().all(|&v| v == 0.0), "{}: the state's padding is not zero", case.name);
            unpadded.extend_from_slice(&row[..units]);
        }
        rest = behind;
    }
    let state = unpadded;
    assert_eq!(read_now(backend, model.flag(), DEADLINE).expect("a flag")[0].to_bits(), 0, "{}: finite values raised the flag", case.name);
    Computed { loss, grads: grads(backend, model), state }
}

/// A device that sweeps kernel by kernel; counts launches by name, and binds no more than it is told.
struct KernelByKernel {
    inner: Box<dyn Backend>,
    launches: BTreeMap<&'static str, usize>,
    most_bytes: Option<u64>,
    /// Bytes of the largest buffer so far.
    largest: u64,
}

impl KernelByKernel {
    fn new(device: Device, most_bytes: Option<u64>) -> Self {
        Self { inner: device.open(), launches: BTreeMap::new(), most_bytes, largest: 0 }
    }
}

impl Around for KernelByKernel {
    fn inner(&self) -> &dyn Backend {
        self.inner.as_ref()
    }
    fn inner_mut(&mut self) -> &mut dyn Backend {
        self.inner.as_mut()
    }
    fn limits(&self) -> Limits {
        let limits = self.inner.limits();
        Limits { max_binding_bytes: self.most_bytes.unwrap_or(limits.max_binding_bytes), ..limits }
    }
    fn alloc(&mut self, label: &str, len: usize) -> anyhow::Result<BufferId> {
        self.largest = self.largest.max(4 * len as u64);
        self.inner.alloc(label, len)
    }
    fn launch(&mut self, kernel: &dyn Kernel, operands: &[Span]) -> anyhow::Result<()> {
        *self.launches.entry(kernel.name()).or_default() += 1;
        self.inner.launch(kernel, operands)
    }
    fn plan(&self) -> SweepPlan {
        sweep_plan
    }
}

/// Fails where `got` lies further from `want` than `tolerance` times `size`; NaN lies far.
fn near(what: &str, want: &[f64], got: &[f32], size: f64, tolerance: f64) {
    assert_eq!(want.len(), got.len(), "{what}");
    for (i, (&want, &got)) in want.iter().zip(got).enumerate() {
        let error = (want - f64::from(got)).abs();
        assert!(
            error <= tolerance * size,
            "{what}, element {i}: the oracle has {want}, got {got}, {error:.2e} off, allowed {tolerance:e} x {size}"
        );
    }
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |a, b| a.max(b.abs()))
}

fn gradients_near(label: &str, table: &ParamTable, want: &Tensors, got: &[Vec<f32>]) {
    for (tensor, got) in table.tensors().iter().zip(got) {
        let want = &want[&tensor.name];
        near(&format!("{label}: gradient of {}", tensor.name), want, got, largest(want), GRADIENT_TOLERANCE);
    }
}

fn label(device: Device, case: &Case) -> String {
    format!("{device}, {}", case.name)
}

#[test]
fn the_oracle_s_gradients_are_central_differences_of_its_loss() {
    // Norms over a few units bend sharply: a longer step would show that.
    const STEP: f64 = 2e-6;
    for case in cases() {
        let mut params = case.named();
        let solution = solve(&case, &params, true);
        for (name, grads) in &solution.grads {
            let size = largest(grads);
            let is_unused = case.n_steps == 1 || (name.contains(".initial_") && case.state.is_some());
            assert!(size > 0.0 || is_unused, "{}: the gradient of {name} is zero, so nothing is tested", case.name);
            // A prime stride visits all gates, units and inputs without visiting every element.
            let stride = [1, 3, 13, 31, 61][grads.len().checked_ilog(4).unwrap_or(0).saturating_sub(2).min(4) as usize];
            for i in (0..grads.len()).step_by(stride) {
                let value = params[name][i];
                let mut loss_at = |v: f64| {
                    params.get_mut(name).expect("a parameter")[i] = v;
                    solve(&case, &params, false).loss * f64::from(case.scale)
                };
                let difference = (loss_at(value + STEP) - loss_at(value - STEP)) / (2.0 * STEP);
                loss_at(value);
                let error = (difference - grads[i]).abs();
                assert!(error <= 1e-8, "{}: {name}[{i}]: {} by the oracle, {difference} by differences", case.name, grads[i]);
            }
        }
    }
}

#[test]
fn every_network_has_the_loss_state_and_gradients_of_the_oracle_on_every_device() {
    for device in devices() {
        let mut backend = device.open();
        let backend = backend.as_mut();
        for case in cases() {
            let (label, want) = (label(device, &case), solve(&case, &case.named(), true));
            let mut model = replica(backend, &case);
            let got = compute(backend, &mut model, &case);
            near(&format!("{label}: loss"), &[want.loss], &[got.loss], want.loss.abs(), 2e-6);
            near(&format!("{label}: final state"), &want.state, &got.state, 1.0, OUTPUT_TOLERANCE);
            gradients_near(&label, model.table(), &want.grads, &got.grads);
            // Gradients of a step replace those of the one before.
            assert_eq!(compute(backend, &mut model, &case), got, "{label}: computed twice");
        }
    }
}

#[test]
fn a_device_s_own_loss_falls_along_its_gradient_as_fast_as_the_gradient_is_long() {
    for device in devices() {
        let mut backend = device.open();
        let backend = backend.as_mut();
        for case in cases().into_iter().filter(|c| c.n_steps > 1) {
            let mut model = replica(backend, &case);
            let gradient = compute(backend, &mut model, &case).grads;
            let norm = gradient.iter().flatten().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            let mut loss_at = |step: f64| {
                let moved = |(p, g): (&f32, &f32)| (f64::from(*p) + step * f64::from(*g) / norm) as f32;
                let params: Vec<Vec<f32>> = case.params.iter().zip(&gradient).map(|(p, g)| p.iter().zip(g).map(moved).collect()).collect();
                let case = Case { params, ..case.clone() };
                let mut model = replica(backend, &case);
                f64::from(compute(backend, &mut model, &case).loss) * f64::from(case.scale)
            };
            // Norms over a few units bend sharply.
            let step = if case.config.lstm.layer_norm { 5e-4 } else { 1e-2 };
            let slope = (loss_at(step) - loss_at(-step)) / (2.0 * step);
            assert!((slope - norm).abs() < 2e-3 * norm, "{}: slope {slope}, norm {norm}", label(device, &case));
        }
    }
}

#[test]
fn a_share_in_three_parts_has_the_gradients_of_the_whole() {
    for device in devices() {
        let mut backend = device.open();
        let backend = backend.as_mut();
        for case in cases().into_iter().filter(|c| c.n_rows >= 3) {
            let (label, want) = (label(device, &case), solve(&case, &case.named(), true));
            let mut model = replica(backend, &case);
            let cuts = [0..1, 1..2, 2..case.n_rows];
            model.reserve(backend, case.n_steps, case.n_rows, true).expect("memory");
            for (part, rows) in cuts.into_iter().enumerate() {
                pass(backend, &mut model, &case.rows(rows), part);
            }
            let losses = read_now(backend, model.loss(3), DEADLINE).expect("losses");
            near(&format!("{label}: loss"), &[want.loss], &[losses.iter().sum::<f32>()], want.loss.abs(), 2e-6);
            gradients_near(&label, model.table(), &want.grads, &grads(backend, &model));
        }
    }
}

#[test]
fn a_share_of_more_than_seventy_thousand_tokens_has_the_gradients_of_its_parts() {
    let config = ModelConfig {
        input: tokens(3, 4),
        output: Output::Classes { n_classes: 3 },
        n_layers: 1,
        hidden: 2.into(),
        dropout: 0.0,
        bias: true,
        tied: false,
        lstm: LstmConfig::default(),
    };
    let whole = Case::new("many tokens", config, [2, 35_100], 60);
    for device in devices() {
        let mut backend = device.open();
        let mut model = replica(backend.as_mut(), &whole);
        let at_once = compute(backend.as_mut(), &mut model, &whole);
        for (part, start) in (0..35_100).step_by(1_170).enumerate() {
            pass(backend.as_mut(), &mut model, &whole.rows(start..start + 1_170), part);
        }
        for (tensor, (whole, parts)) in model.table().tensors().iter().zip(at_once.grads.iter().zip(grads(backend.as_mut(), &model))) {
            let wide: Vec<f64> = parts.iter().map(|&v| f64::from(v)).collect();
            near(&format!("{device}: gradient of {}", tensor.name), &wide, whole, largest(&wide), 1e-4);
        }
    }
}

#[test]
fn a_share_without_rows_has_zero_loss_and_leaves_the_gradients_of_earlier_parts() {
    for device in devices() {
        let mut backend = device.open();
        let backend = backend.as_mut();
        let case = case("two layers over tokens");
        let empty = case.rows(0..0);
        let mut model = replica(backend, &case);
        let full = compute(backend, &mut model, &case);
        pass(backend, &mut model, &empty, 1);
        assert_eq!(read_now(backend, model.loss(2), DEADLINE).expect("losses"), [full.loss, 0.0], "{device}");
        assert_eq!(grads(backend, &model), full.grads, "{device}");
        pass(backend, &mut model, &empty, 0);
        assert_eq!(read_now(backend, model.loss(1), DEADLINE).expect("a loss"), [0.0], "{device}");
        assert!(grads(backend, &model).iter().flatten().all(|&g| g == 0.0), "{device}");
    }
}

#[test]
fn buckets_are_ready_once_each_from_last_to_first_with_zero_padding() {
    for device in devices() {
        let mut backend = device.open();
        let backend = backend.as_mut();
        for case in cases() {
            let label = label(device, &case);
            let mut model = replica(backend, &case);
            let (state, table) = (case.padded_state(), model.table().clone());
            let mut ready = Vec::new();
            let pass = Pass { key: case.key, gradients: true, part: 0 };
            let run = model.run(backend, &case.share(state.as_deref()), pass, &mut |backend, bucket, span| {
                ready.push((bucket, read_now(backend, span, DEADLINE)?));
                Ok(())
            });
            run.expect("a pass");
            let order: Vec<usize> = ready.iter().map(|(bucket, _)| *bucket).collect();
            assert_eq!(order, (0..table.buckets().len()).rev().collect::<Vec<_>>(), "{label}");
            for (bucket, words) in &ready {
                let whole = backend.whole(model.grads()[*bucket]);
                let after = read_now(backend, whole, DEADLINE).expect("gradients");
                assert_eq!(words, &after, "{label}: bucket {bucket} changed after it was ready");
                let mut is_padding = vec![true; words.len()];
                for tensor in &table.tensors()[table.buckets()[*bucket].tensors.clone()] {
                    tensor.layout.for_each(|_, packed| is_padding[tensor.offset + packed] = false);
                }
                let odd = words.iter().zip(&is_padding).position(|(&word, &padding)| padding && word != 0.0);
                assert_eq!(odd, None, "{label}: bucket {bucket} holds {words:?} in its padding");
            }
        }
    }
}

#[test]
fn both_directions_of_a_layer_share_the_launches_of_their_steps() {
    for (name, kernels) in [
        ("both directions, labels, dropout", &[("lstm_step_forward", 1, 0), ("lstm_step_backward", 1, 1)][..]),
        ("residual in both directions", &[("lstm_step_forward", 1, 0), ("lstm_step_backward", 1, 1)]),
        (
            "projected and normed, rows that end",
            &[("lstm_norm_forward", 1, 0), ("lstm_project", 1, 0), ("lstm_state_gradient", 1, 1), ("lstm_norm_backward", 1, 0)],
        ),
    ] {
        let case = case(name);
        let mut backend = KernelByKernel::new(Device::Cpu(1), None);
        let mut model = replica(&mut backend, &case);
        let computed = compute(&mut backend, &mut model, &case);
        let want = solve(&case, &case.named(), true);
        near(&format!("{name}: final state"), &want.state, &computed.state, 1.0, OUTPUT_TOLERANCE);
        gradients_near(name, model.table(), &want.grads, &computed.grads);
        for &(kernel, each, more) in kernels {
            let wanted = case.config.n_layers * (each * case.n_steps + more);
            assert_eq!(backend.launches.get(kernel), Some(&wanted), "{name}: {kernel}");
        }
    }
}

/// Everything that a pass leaves, bit for bit, where at most so many bytes of the pass's memory can be bound at once. Also the largest buffer of that.
fn left(device: Device, case: &Case, most_bytes: Option<u64>) -> anyhow::Result<((Computed, Vec<f32>), u64)> {
    let mut own = KernelByKernel::new(device, None);
    let backend = &mut own;
    let mut model = replica(backend, case);
    (backend.most_bytes, backend.largest) = (most_bytes, 0);
    model.reserve(backend, case.n_steps, case.n_rows, true)?;
    let largest = backend.largest;
    let backend: &mut dyn Backend = backend;
    let computed = compute(backend, &mut model, case);
    let initial = backend.read(&model.initial_gradient(case.n_rows), Vec::new())?.wait(DEADLINE)?;
    Ok(((computed, initial), largest))
}

#[test]
fn directions_whose_memory_lies_apart_or_together_compute_the_same_bits() {
    for device in devices() {
        // Adapters take some seconds for each way that memory falls apart: the widest of the cases.
        let widest = ["residual in both directions", "all in both directions", "projected and normed, all at once"];
        let is_tried = |case: &Case| matches!(device, Device::Cpu(_)) || widest.contains(&case.name);
        for case in cases().into_iter().filter(|case| case.config.lstm.bidirectional && is_tried(case)) {
            let label = label(device, &case);
            let (want, mut largest) = left(device, &case, None).expect("a pass");
            // From the largest buffer of both directions on, more and more of them fall apart, until the largest of one does not fit.
            let mut n_apart = 0;
            while let Ok((got, now)) = left(device, &case, Some(largest - 1)) {
                assert!(got == want, "{label}, at most {} bytes bound: {got:?} instead of {want:?}", largest - 1);
                assert!(now < largest, "{label}: a buffer of {now} bytes where at most {} can be bound", largest - 1);
                (largest, n_apart) = (now, n_apart + 1);
            }
            assert!(n_apart > 0, "{label}: nothing ever lay apart");
        }
    }
}

#[test]
fn directions_of_any_width_share_launches_until_their_weights_cannot_be_bound_together() {
    let case = case("both directions, labels, dropout");
    for (hidden, shares) in [(200, true), (256, true), (520, true), (1600, true), (2100, false)] {
        let config = ModelConfig { hidden: Hidden::All(hidden), ..case.config.clone() };
        let table = config.table();
        let bucket = |name: &str| table.get(name).expect("a tensor").bucket;
        let together = [["weight_hh_l1", "weight_hh_l1_reverse"], ["bias_ih_l1", "bias_hh_l1_reverse"]]
            .map(|names| names.map(|name| bucket(&format!("lstm.{name}"))))
            .map(|[a, b]| a == b);
        assert_eq!(together, [shares, true], "{hidden} units");
    }
}

#[test]
fn the_gradient_of_the_initial_state_summed_over_the_rows_is_that_of_the_learned_one() {
    for device in devices() {
        for name in ["learned state", "all in both directions", "projected and normed, all at once"] {
            let case = case(name);
            let mut backend = device.open();
            let mut model = replica(backend.as_mut(), &case);
            let grads = compute(backend.as_mut(), &mut model, &case).grads;
            let spans = model.initial_gradient(case.n_rows);
            let [n, b] = [case.config.n_directions(), case.n_rows];
            assert_eq!(spans.len(), case.config.n_lanes());
            for (i, (span, [width, hidden])) in spans.into_iter().zip(case.config.state_units()).enumerate() {
                let words = read_now(backend.as_mut(), span, DEADLINE).expect("a gradient");
                let (of_h, of_c) = words.split_at(b * pad_units(width));
                for (which, values, units) in [("h", of_h, width), ("c", of_c, hidden)] {
                    let name = format!("lstm.initial_{which}_l{}{}", i / n, ["", "_reverse"][i % n]);
                    let at = model.table().tensors().iter().position(|t| t.name == name).expect("a learned state");
                    let sums: Vec<f32> = (0..units).map(|unit| values.chunks_exact(pad_units(units)).map(|row| row[unit]).sum()).collect();
                    let want: Vec<f64> = grads[at].iter().map(|&v| f64::from(v)).collect();
                    assert!(largest(&want) > 0.0, "{device}, {name}: nothing is tested");
                    near(&format!("{device}, {name}"), &want, &sums, largest(&want), 1e-6);
                }
            }
        }
    }
}

#[test]
fn the_gates_and_cells_of_a_reverse_direction_are_those_of_a_forward_one_over_the_input_turned_around() {
    for device in devices() {
        let mut backend = device.open();
        let backend = backend.as_mut();
        let straight = case("both directions, labels, dropout");
        let straight = Case { key: None, config: ModelConfig { n_layers: 1, dropout: 0.0, ..straight.config }, ..straight };
        let straight = Case::new(straight.name, straight.config, [straight.n_steps, straight.n_rows], 91);
        let Data::Values(values) = &straight.input else { unreachable!("a case of numbers") };
        let steps = values.chunks_exact(values.len() / straight.n_steps);
        let turned = Case {
            input: Data::Values(steps.rev().flatten().copied().collect()),
            // Each direction has the other's parameters.
            params: {
                let table = straight.config.table();
                let other = |name: &str| name.strip_suffix("_reverse").map_or_else(|| format!("{name}_reverse"), str::to_owned);
                let of = |name: &str| table.tensors().iter().position(|t| t.name == name);
                let at = |(i, t): (usize, &carrousel::params::Tensor)| of(&other(&t.name)).unwrap_or(i);
                table.tensors().iter().enumerate().map(at).map(|i| straight.params[i].clone()).collect()
            },
            ..straight.clone()
        };
        let looked_at = [&straight, &turned].map(|case| {
            let mut model = replica(backend, case);
            let pass = Pass { key: None, gradients: false, part: 0 };
            model.run(backend, &case.share(None), pass, &mut |_, _, _| Ok(())).expect("a pass");
            let gates = model.read_gates(backend, case.n_steps, case.n_rows, DEADLINE).expect("gates");
            let cells = model.read_cells(backend, case.n_steps, case.n_rows, DEADLINE).expect("cells");
            let of_lane = |(gates, cells): ([Vec<f32>; 4], Vec<f32>)| gates.into_iter().chain([cells]).collect::<Vec<_>>();
            gates.into_iter().zip(cells).map(of_lane).collect::<Vec<_>>()
        });
        for direction in 0..2 {
            for (which, (a, b)) in looked_at[0][direction].iter().zip(&looked_at[1][1 - direction]).enumerate() {
                let back: Vec<f64> = b.chunks_exact(b.len() / straight.n_steps).rev().flatten().map(|&v| f64::from(v)).collect();
                assert!(largest(&back) > 0.0, "{device}: nothing is tested");
                near(&format!("{device}, direction {direction}, values {which}"), &back, a, 1.0, 1e-6);
            }
        }
    }
}

#[test]
fn a_forward_pass_alone_gives_the_oracle_s_outputs_without_dropout() {
    for device in devices() {
        let mut backend = device.open();
        let backend = backend.as_mut();
        for case in cases() {
            let case = Case { key: None, ..case };
            let want = solve(&case, &case.named(), false);
            let mut model = replica(backend, &case);
            let state = case.padded_state();
            let share = Share { targets: None, weights: &[], scale: 0.0, ..case.share(state.as_deref()) };
            let pass = Pass { key: None, gradients: false, part: 0 };
            model.run(backend, &share, pass, &mut |_, _, _| Ok(())).expect("a pass");
            let (span, stride) = model.outputs(case.n_steps, case.n_rows);
            let rows = read_now(backend, span, DEADLINE).expect("outputs");
            let (n, case) = (case.config.n_outputs(), &case);
            // Behind a row's end outputs mean nothing.
            let got: Vec<f32> = rows
                .chunks_exact(stride)
                .enumerate()
                .flat_map(|(at, row)| row[..n].iter().map(move |&y| if case.counts(at) { y } else { 0.0 }))
                .collect();
            near(&format!("{}: outputs", label(device, case)), &want.outputs, &got, largest(&want.outputs).max(1.0), OUTPUT_TOLERANCE);
        }
    }
}

#[test]
fn what_was_computed_before_leaves_no_trace_in_a_share_of_another_size() {
    for device in devices() {
        let mut backend = device.open();
        let backend = backend.as_mut();
        let whole = case("tied with padding, dropout and state");
        let shares = [whole.clone(), whole.rows(1..2), whole.rows(0..2), whole.clone()];
        let mut model = replica(backend, &whole);
        // From the smallest up, so that the workspace grows; then down again.
        for share in [&shares[1], &shares[2], &shares[0], &shares[1], &shares[3]] {
            let mut fresh = replica(backend, share);
            let want = compute(backend, &mut fresh, share);
            assert_eq!(compute(backend, &mut model, share), want, "{device}: {} rows", share.n_rows);
        }
    }
}

#[test]
fn a_window_and_the_next_with_its_state_end_as_one_long_window() {
    for device in devices() {
        let mut backend = device.open();
        let backend = backend.as_mut();
        let long = case("two layers over tokens");
        let mut model = replica(backend, &long);
        let want = compute(backend, &mut model, &long).state;
        let (Data::Tokens(input), Data::Tokens(targets)) = (&long.input, &long.targets) else { unreachable!("a case of tokens") };
        let mut state = None;
        for range in [0..2, 2..long.n_steps] {
            let words = range.start * long.n_rows..range.end * long.n_rows;
            let window = Case {
                n_steps: range.len(),
                input: Data::Tokens(input[words.clone()].to_vec()),
                targets: Data::Tokens(targets[words.clone()].to_vec()),
                weights: long.weights[words].to_vec(),
                state,
                ..long.clone()
            };
            state = Some(compute(backend, &mut model, &window).state);
        }
        let want: Vec<f64> = want.into_iter().map(f64::from).collect();
        near(&format!("{device}: final state"), &want, &state.expect("two windows"), 1.0, 1e-6);
    }
}

#[test]
fn what_stands_behind_a_row_s_end_and_how_long_it_goes_on_changes_nothing() {
    for device in devices() {
        let mut backend = device.open();
        let backend = backend.as_mut();
        for case in cases().into_iter().filter(|c| c.lengths.is_some()) {
            let label = label(device, &case);
            let mut model = replica(backend, &case);
            let want = compute(backend, &mut model, &case);
            let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
            let got = compute(backend, &mut model, &case.with_steps(case.n_steps + 3));
            near(&format!("{label}: loss"), &[f64::from(want.loss)], &[got.loss], f64::from(want.loss), 1e-6);
            near(&format!("{label}: final state"), &wide(&want.state), &got.state, 1.0, 0.0);
            for (tensor, (want, got)) in model.table().tensors().iter().zip(want.grads.iter().zip(&got.grads)) {
                let want = wide(want);
                near(&format!("{label}: gradient of {}", tensor.name), &want, got, largest(&want), 2e-6);
            }
        }
    }
}

#[test]
fn rows_that_end_have_the_loss_and_the_gradients_that_each_has_alone() {
    for device in devices() {
        let mut backend = device.open();
        let backend = backend.as_mut();
        for case in cases().into_iter().filter(|c| c.lengths.is_some()) {
            let (label, want) = (label(device, &case), solve(&case, &case.named(), true));
            let mut model = replica(backend, &case);
            let rows = (0..case.n_rows).filter(|&row| case.length(row) > 0);
            let mut n = 0;
            model.reserve(backend, case.n_steps, case.n_rows, true).expect("memory");
            for (part, row) in rows.enumerate() {
                // Alone it has no lengths and no step too many.
                let alone = Case { lengths: None, ..case.rows(row..row + 1).with_steps(case.length(row)) };
                pass(backend, &mut model, &alone, part);
                n += 1;
            }
            let losses = read_now(backend, model.loss(n), DEADLINE).expect("losses");
            near(&format!("{label}: loss"), &[want.loss], &[losses.iter().sum::<f32>()], want.loss.abs(), 2e-6);
            gradients_near(&label, model.table(), &want.grads, &grads(backend, &model));
        }
    }
}

#[test]
fn the_gradient_of_a_long_window_is_that_of_two_the_second_handing_its_own_to_the_first() {
    for device in devices() {
        let mut backend = device.open();
        let backend = backend.as_mut();
        let names = [
            "two layers over tokens",
            "widths of each layer",
            "projected with state",
            "learned state, but another is given",
            "values to values",
        ];
        for name in names {
            let long = case(name);
            fn cut<T: Copy>(values: &[T], range: &std::ops::Range<usize>, n_steps: usize) -> Vec<T> {
                let width = values.len() / n_steps;
                values[range.start * width..range.end * width].to_vec()
            }
            let window = |range: std::ops::Range<usize>, state: Option<Vec<f32>>| {
                let part = |data: &Data| match data {
                    Data::Tokens(tokens) => Data::Tokens(cut(tokens, &range, long.n_steps)),
                    Data::Values(values) => Data::Values(cut(values, &range, long.n_steps)),
                };
                let (mut targets, mut weights) = (long.targets.clone(), long.weights.clone());
                if long.is_per_step() {
                    (targets, weights) = (part(&targets), cut(&weights, &range, long.n_steps));
                } else if range.start == 0 {
                    // Numbers of the sequence as a whole are read from the second window alone.
                    weights.fill(0.0);
                }
                Case { n_steps: range.len(), input: part(&long.input), targets, weights, state, ..long.clone() }
            };
            let mut model = replica(backend, &long);
            let read = |backend: &mut dyn Backend, spans: &[carrousel::backend::Span]| {
                backend.read(spans, Vec::new()).and_then(|r| r.wait(DEADLINE)).expect("a readback")
            };
            let want = compute(backend, &mut model, &long).grads;
            let want_initial = read(backend, &model.initial_gradient(long.n_rows));
            let first = window(0..2, long.state.clone());
            let state = compute(backend, &mut model, &first).state;
            let second = window(2..long.n_steps, Some(state));
            let of_second = compute(backend, &mut model, &second).grads;
            let handed = read(backend, &model.initial_gradient(long.n_rows));
            let state = first.padded_state();
            let share = Share { final_gradient: Some(&handed), ..first.share(state.as_deref()) };
            let pass = Pass { key: None, gradients: true, part: 0 };
            model.run(backend, &share, pass, &mut |_, _, _| Ok(())).expect("a pass");
            let of_first = grads(backend, &model);
            let initial = read(backend, &model.initial_gradient(long.n_rows));
            let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
            near(&format!("{device}, {name}: the initial state's"), &wide(&want_initial), &initial, 1.0, 1e-6);
            for ((tensor, want), (a, b)) in model.table().tensors().iter().zip(&want).zip(of_first.iter().zip(&of_second)) {
                let both: Vec<f32> = a.iter().zip(b).map(|(a, b)| a + b).collect();
                near(&format!("{device}, {name}: {}", tensor.name), &wide(want), &both, largest(&wide(want)), 3e-6);
            }
        }
    }
}

#[test]
fn a_share_that_contradicts_the_model_is_refused_by_name() {
    let mut backend = Device::Cpu(1).open();
    let backend = backend.as_mut();
    let case = case("two layers over tokens");
    let mut model = replica(backend, &case);
    let mut refused = |share: Share<'_>, part: usize| {
        let pass = Pass { key: None, gradients: true, part };
        format!("{:#}", model.run(backend, &share, pass, &mut |_, _, _| Ok(())).expect_err("a wrong share"))
    };
    let outside = vec![11; case.n_steps * case.n_rows];
    let share = case.share(None);
    assert!(refused(Share { input: Words::Tokens(&outside), ..share }, 0).contains("token 11 is outside the vocabulary of 11"));
    assert!(refused(Share { targets: Some(Words::Tokens(&outside)), ..share }, 0).contains("target 11 is outside the 11 classes"));
    assert!(refused(Share { input: Words::Tokens(&outside[1..]), ..share }, 0).contains("17 tokens for 6 steps of 3 rows"));
    assert!(refused(Share { input: Words::Values(&[0.0; 18]), ..share }, 0).contains("kind"));
    assert!(refused(Share { weights: &[1.0], ..share }, 0).contains("1 weights for 18 terms"));
    assert!(refused(share, 64).contains("at most 64 parts"));
    assert!(refused(Share { lengths: Some(&[6, 6]), ..share }, 0).contains("2 lengths for 3 rows"));
    assert!(refused(Share { lengths: Some(&[6, 7, 1]), ..share }, 0).contains("a row has 7 valid steps of 6"));
}

#[test]
fn initial_parameters_depend_on_seed_and_tensor_and_on_nothing_else() {
    let config = case("two layers over tokens").config;
    let deeper = ModelConfig { n_layers: 3, ..config.clone() };
    for init in [Init::Uniform(0.1), Init::Torch, Init::Xavier, Init::He, Init::Orthogonal] {
        let draw = |config: &ModelConfig, seed: u64| initial(config, &config.table(), init, None, seed);
        let first = draw(&config, 5);
        assert_eq!(first, draw(&config, 5), "{init}");
        assert_ne!(first, draw(&config, 6), "{init}");
        // The layers below do not change when one is put on top.
        let n_shared = config.table().tensors().iter().take_while(|t| !t.name.starts_with("head")).count();
        assert_eq!(first[..n_shared], draw(&deeper, 5)[..n_shared], "{init}");
        let weights: Vec<&Vec<f32>> = first.iter().filter(|v| v.iter().any(|&x| x != 0.0)).collect();
        for (i, a) in weights.iter().enumerate() {
            assert!(a.iter().all(|x| x.is_finite()), "{init}");
            assert!(weights[..i].iter().all(|b| a[..4] != b[..4]), "{init}: two tensors start with the same numbers");
        }
    }
}

#[test]
fn uniform_initial_values_reach_their_bounds_and_have_their_variance() {
    let config = ModelConfig {
        input: tokens(40, 24),
        output: Output::Classes { n_classes: 40 },
        n_layers: 2,
        hidden: 24.into(),
        dropout: 0.0,
        bias: true,
        tied: true,
        lstm: LstmConfig::default(),
    };
    let table = config.table();
    let fan = 1.0 / 24f64.sqrt();
    for (init, bound) in [
        (Init::Torch, Box::new(move |_: &str| fan) as Box<dyn Fn(&str) -> f64>),
        (Init::Uniform(0.3), Box::new(|_: &str| 0.3)),
        (Init::Xavier, Box::new(|name: &str| if name == "embedding.weight" { (6.0f64 / 64.0).sqrt() } else { (6.0f64 / 48.0).sqrt() })),
    ] {
        for (tensor, values) in table.tensors().iter().zip(initial(&config, &table, init, None, 8)) {
            if values.len() < 500 {
                continue;
            }
            let a = bound(&tensor.name);
            let wide: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
            let variance = wide.iter().map(|v| v * v).sum::<f64>() / wide.len() as f64;
            assert!((0.98 * a..=a * (1.0 + 1e-6)).contains(&largest(&wide)), "{init}, {}: {} against {a}", tensor.name, largest(&wide));
            assert!((variance / (a * a / 3.0) - 1.0).abs() < 0.15, "{init}, {}: variance {variance}", tensor.name);
        }
    }
}
