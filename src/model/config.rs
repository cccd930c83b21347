//! What a network consists of, and the parameters that follow from it.

use serde::{Deserialize, Serialize};

use crate::kernels::lstm::{LaneShape, PEEPHOLES};
use crate::params::{Axis, Layout, ParamTable};
use crate::shape::{GATES, pad_units};
use crate::usage::UsageError;

/// What goes in at each time step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Input {
    /// Tokens below `vocabulary`, looked up in an embedding of `width` columns.
    Tokens { vocabulary: usize, width: usize },
    /// That many numbers.
    Values { n_features: usize },
}

/// What comes out, and which loss it is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Output {
    /// A class at every time step; softmax cross-entropy.
    Classes { n_classes: usize },
    /// A class of the sequence as a whole; softmax cross-entropy.
    Label { n_classes: usize, pooling: Pooling },
    /// Numbers of the sequence as a whole; squared error.
    Values { n_outputs: usize, pooling: Pooling },
    /// Any number of notes sounding at every time step, each with odds of its own; binary cross-entropy, added up over the notes of a step.
    Notes { n_notes: usize },
    /// Quantiles of numbers of the sequence as a whole, `[n_values, levels]`; the quantile loss.
    Quantiles { n_values: usize, levels: Levels, pooling: Pooling },
}

/// Levels of quantiles, rising, each above 0 and below 1, in ten-thousandths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<f64>", into = "Vec<f64>")]
pub struct Levels {
    n: usize,
    parts: [u16; Levels::MOST],
}

impl Levels {
    /// Most levels.
    pub const MOST: usize = 15;
    const WHOLE: f64 = 10_000.0;

    /// As numbers, rising.
    pub fn values(&self) -> impl Iterator<Item = f64> + Clone + '_ {
        self.parts[..self.n].iter().map(|&part| f64::from(part) / Self::WHOLE)
    }

    /// How many there are, at least one.
    pub fn count(&self) -> usize {
        self.n
    }

    /// Which of them is nearest to one half: what stands for the forecast as one number.
    pub fn middle(&self) -> usize {
        let distance = |i: usize| self.parts[i].abs_diff(5000);
        (0..self.n).min_by_key(|&i| distance(i)).unwrap_or(0)
    }
}

impl TryFrom<Vec<f64>> for Levels {
    type Error = String;

    fn try_from(values: Vec<f64>) -> Result<Self, String> {
        if !(1..=Self::MOST).contains(&values.len()) {
            return Err(format!("{} quantiles, but there must be from 1 to {}", values.len(), Self::MOST));
        }
        let mut levels = Self { n: values.len(), parts: [0; Self::MOST] };
        for (i, &value) in values.iter().enumerate() {
            let part = (value * Self::WHOLE).round();
            if !(part > 0.0 && part < Self::WHOLE && (part / Self::WHOLE - value).abs() < 1e-9) {
                return Err(format!("a quantile of {value}, but it must be above 0 and below 1, with at most four digits"));
            }
            levels.parts[i] = part as u16;
            if i > 0 && levels.parts[i] <= levels.parts[i - 1] {
                return Err(format!("quantiles must rise, but {value} follows {}", values[i - 1]));
            }
        }
        Ok(levels)
    }
}

impl From<Levels> for Vec<f64> {
    fn from(levels: Levels) -> Self {
        levels.values().collect()
    }
}

impl std::str::FromStr for Levels {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let values = text.split(',').map(|part| part.trim().parse().map_err(|_| format!("'{}' is not a number", part.trim())));
        values.collect::<Result<Vec<f64>, String>>()?.try_into()
    }
}

/// What the head reads of a sequence as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// The outputs of the step with which each direction ends: a row's own last one, in reverse the first.
    #[default]
    Last,
    /// The mean over a row's valid steps.
    Mean,
}

/// Which rows the head reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// The outputs of every step.
    Steps,
    /// The states in which the last layer ends.
    FinalStates,
    /// A row a sequence, made of the outputs of its steps.
    Pooled(Pooling),
}

/// Hidden units: the same in all layers, or of each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Hidden {
    All(usize),
    Each(Vec<usize>),
}

impl Hidden {
    /// Of a layer that exists.
    pub fn of(&self, layer: usize) -> usize {
        match self {
            Self::All(units) => *units,
            Self::Each(units) => units[layer],
        }
    }

    /// Layers, where each is named.
    pub fn n_layers(&self) -> Option<usize> {
        match self {
            Self::All(_) => None,
            Self::Each(units) => Some(units.len()),
        }
    }
}

impl From<usize> for Hidden {
    fn from(units: usize) -> Self {
        Self::All(units)
    }
}

impl<const N: usize> From<[usize; N]> for Hidden {
    fn from(units: [usize; N]) -> Self {
        Self::Each(units.to_vec())
    }
}

impl std::fmt::Display for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All(units) => write!(f, "{units}"),
            Self::Each(units) => f.write_str(&units.iter().map(usize::to_string).collect::<Vec<_>>().join(",")),
        }
    }
}

/// What a layer is made of beyond its size. All of it off is the LSTM of PyTorch; the papers stand in `kernels::lstm`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LstmConfig {
    /// Each layer reads its input in both directions; the outputs of both lie side by side.
    pub bidirectional: bool,
    /// What the layer below hands up is added to a layer's output where both have the same width.
    pub residual: bool,
    /// The initial state is a parameter.
    pub learned_state: bool,
    /// Units that h is projected to, 0 for none; then they are the layer's output.
    pub proj_size: usize,
    /// Layer normalisation of both products and of the cell state.
    pub layer_norm: bool,
    /// The gates i and f read the old cell state, o the new one.
    pub peephole: bool,
    /// f = 1 - i.
    pub coupled_gates: bool,
    /// Largest absolute value of the cell state, 0 for any.
    pub cell_clip: f64,
    /// Largest absolute value of the gates' gradients within the recurrence, 0 for any.
    pub recurrent_grad_clip: f64,
    /// In training, the fraction of h that a sequence's recurrent products do not see.
    pub recurrent_dropout: f64,
    /// In training, the fraction of the recurrent weights that a step does without.
    pub weight_drop: f64,
    /// Probabilities that h and c keep their old values.
    pub zoneout_h: f64,
    pub zoneout_c: f64,
    /// In training, the fraction that is dropped of what the first layer reads (an embedding's columns, or features).
    pub input_dropout: f64,
    /// In training, the fraction that is dropped of what the last layer hands up.
    pub output_dropout: f64,
}

/// An LSTM network: optional embedding, stacked layers with dropout between them, linear head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    pub input: Input,
    pub output: Output,
    pub n_layers: usize,
    pub hidden: Hidden,
    /// Between layers, in training.
    pub dropout: f64,
    pub bias: bool,
    /// The head's weight is the embedding's.
    pub tied: bool,
    #[serde(flatten)]
    pub lstm: LstmConfig,
}

/// Where the tensors of one layer in one direction stand in the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct LayerParams {
    pub weight_ih: usize,
    pub weight_hh: usize,
    pub weight_hr: Option<usize>,
    pub biases: Option<(usize, usize)>,
    pub peephole: Option<usize>,
    /// Gains of the input's and of the recurrent product; gain and bias of the cell state.
    pub norms: Option<[usize; 3]>,
    /// h and c.
    pub initial: Option<(usize, usize)>,
}

/// Where everything stands in the table.
#[derive(Clone, Debug)]
pub(super) struct ModelParams {
    pub embedding: Option<usize>,
    /// By layer, and in it by direction.
    pub lanes: Vec<LayerParams>,
    pub head_weight: usize,
    pub head_bias: usize,
}

impl ModelConfig {
    /// One plain layer of `hidden` units, or as many layers as are named.
    pub fn new(input: Input, output: Output, hidden: impl Into<Hidden>) -> Self {
        let hidden = hidden.into();
        let n_layers = hidden.n_layers().unwrap_or(1);
        Self { input, output, n_layers, hidden, dropout: 0.0, bias: true, tied: false, lstm: LstmConfig::default() }
    }

    /// Fails on sizes that make no sense together.
    ///
    /// # Errors
    /// Names the sizes and what to change.
    pub fn check(&self) -> Result<(), UsageError> {
        let named = self.hidden.n_layers().unwrap_or(self.n_layers);
        UsageError::unless(named == self.n_layers, || {
            format!("--hidden {} names {named} layers, but --layers is {}: leave one of them out", self.hidden, self.n_layers)
        })?;
        UsageError::unless(self.n_layers > 0 && (0..self.n_layers).all(|l| self.hidden.of(l) > 0), || {
            format!("a model needs at least one layer and one hidden unit in each, not --layers {} --hidden {}", self.n_layers, self.hidden)
        })?;
        let l = &self.lstm;
        let narrowest = (0..self.n_layers).map(|l| self.hidden.of(l)).min().unwrap_or(0);
        UsageError::unless(l.proj_size < narrowest, || {
            format!(
                "--proj-size {} must be below the hidden units of every layer, --hidden {}, or it projects to nothing smaller",
                l.proj_size, self.hidden
            )
        })?;
        UsageError::unless(!l.layer_norm || narrowest > 1, || {
            format!("--layer-norm over one hidden unit gives zero whatever comes in: raise --hidden {}", self.hidden)
        })?;
        let shares = [
            ("--dropout", self.dropout),
            ("--recurrent-dropout", l.recurrent_dropout),
            ("--weight-drop", l.weight_drop),
            ("--zoneout-h", l.zoneout_h),
            ("--zoneout-c", l.zoneout_c),
            ("--input-dropout", l.input_dropout),
            ("--output-dropout", l.output_dropout),
        ];
        for (flag, share) in shares {
            UsageError::unless((0.0..1.0).contains(&share), || format!("{flag} is {share}, but must be at least 0 and below 1"))?;
        }
        for (flag, limit) in [("--cell-clip", l.cell_clip), ("--recurrent-grad-clip", l.recurrent_grad_clip)] {
            UsageError::unless(limit.is_finite() && limit >= 0.0, || format!("{flag} is {limit}, but must be a number of 0 or more"))?;
        }
        UsageError::unless(!l.residual || (0..self.n_layers).any(|layer| self.is_residual(layer)), || {
            format!(
                "--residual adds nothing here, since no layer is as wide as the one below it: give another layer, or other --hidden than {}",
                self.hidden
            )
        })?;
        if l.bidirectional && matches!((self.input, self.output), (Input::Tokens { .. }, Output::Classes { .. })) {
            return Err(UsageError(
                "--bidirectional lets a language model read the token that it is to predict: leave it out, or choose another task"
                    .to_owned(),
            ));
        }
        if self.tied {
            let Input::Tokens { vocabulary, width } = self.input else {
                return Err(UsageError("--tied needs tokens, which have an embedding to share with the head".to_owned()));
            };
            let top = self.layer_units(self.n_layers - 1);
            UsageError::unless(width == top, || {
                let flag = if l.proj_size > 0 { "--proj-size" } else { "--hidden" };
                format!("--tied shares the embedding with the head: --embedding {width} must equal {flag} {top}")
            })?;
            UsageError::unless(self.output == Output::Classes { n_classes: vocabulary }, || {
                format!("--tied shares the embedding with the head: {vocabulary} tokens go in, so as many classes must come out")
            })?;
        }
        Ok(())
    }

    /// Classes or numbers that come out.
    pub fn n_outputs(&self) -> usize {
        match self.output {
            Output::Classes { n_classes } | Output::Label { n_classes, .. } => n_classes,
            Output::Values { n_outputs, .. } => n_outputs,
            Output::Notes { n_notes } => n_notes,
            Output::Quantiles { n_values, levels, .. } => n_values * levels.count(),
        }
    }

    /// Targets of one row of outputs: one for classes, one for each number or note.
    pub fn n_targets(&self) -> usize {
        match self.output {
            Output::Classes { .. } | Output::Label { .. } => 1,
            Output::Values { n_outputs, .. } => n_outputs,
            Output::Notes { n_notes } => n_notes,
            Output::Quantiles { n_values, .. } => n_values,
        }
    }

    /// Terms, which have a weight each, of one row of outputs: one for classes and for all notes together, one for each number.
    pub fn n_terms(&self) -> usize {
        if matches!(self.output, Output::Notes { .. }) { 1 } else { self.n_targets() }
    }

    pub(super) fn reading(&self) -> Reading {
        match self.output {
            Output::Classes { .. } | Output::Notes { .. } => Reading::Steps,
            // What a residual layer hands up at a row's end is more than its state, and what is dropped is less.
            Output::Label { pooling, .. } | Output::Values { pooling, .. } | Output::Quantiles { pooling, .. }
                if pooling == Pooling::Mean || self.is_residual(self.n_layers - 1) || self.lstm.output_dropout > 0.0 =>
            {
                Reading::Pooled(pooling)
            }
            Output::Label { .. } | Output::Values { .. } | Output::Quantiles { .. } => Reading::FinalStates,
        }
    }

    /// Whether training draws random numbers.
    pub fn is_random(&self) -> bool {
        let l = &self.lstm;
        let shares = [self.dropout, l.recurrent_dropout, l.weight_drop, l.zoneout_h, l.zoneout_c, l.input_dropout, l.output_dropout];
        shares.iter().any(|&p| p > 0.0)
    }

    /// Directions of a layer: 1 or 2.
    pub fn n_directions(&self) -> usize {
        1 + usize::from(self.lstm.bidirectional)
    }

    /// Layers times directions: each has a state of its own.
    pub fn n_lanes(&self) -> usize {
        self.n_layers * self.n_directions()
    }

    /// Units that one direction of a layer hands up.
    pub fn layer_units(&self, layer: usize) -> usize {
        if self.lstm.proj_size > 0 { self.lstm.proj_size } else { self.hidden.of(layer) }
    }

    /// The sizes of a lane of a layer in training.
    pub(super) fn lane_shape(&self, layer: usize) -> LaneShape {
        let (units, l) = (self.hidden.of(layer), &self.lstm);
        LaneShape {
            hidden: pad_units(units) as u32,
            units: units as u32,
            width: pad_units(self.layer_units(layer)) as u32,
            projects: l.proj_size > 0,
            norms: l.layer_norm,
            peepholes: l.peephole,
            masks: l.recurrent_dropout > 0.0,
            outputs: self.is_residual(layer) || self.dropout_above(layer) > 0.0,
        }
    }

    /// Units of h and of c in every lane: what a sequence carries on.
    pub fn state_units(&self) -> Vec<[usize; 2]> {
        let layers = (0..self.n_layers).map(|l| [self.layer_units(l), self.hidden.of(l)]);
        layers.flat_map(|units| std::iter::repeat_n(units, self.n_directions())).collect()
    }

    /// The axis of what comes out of a layer: both directions side by side.
    fn layer_output(&self, layer: usize) -> Axis {
        Axis { groups: self.n_directions(), ..Axis::units(self.layer_units(layer)) }
    }

    /// The axis of what goes into `layer`.
    pub(super) fn layer_input(&self, layer: usize) -> Axis {
        match self.input {
            _ if layer > 0 => self.layer_output(layer - 1),
            Input::Tokens { width, .. } => Axis::units(width),
            Input::Values { n_features } => Axis::inner(n_features),
        }
    }

    /// The fraction that training drops of what `layer` hands up.
    pub(super) fn dropout_above(&self, layer: usize) -> f64 {
        if layer + 1 < self.n_layers { self.dropout } else { self.lstm.output_dropout }
    }

    /// Whether `layer` adds its input, which is what the layer below hands up, to its output.
    pub fn is_residual(&self, layer: usize) -> bool {
        self.lstm.residual && layer > 0 && self.layer_units(layer) == self.layer_units(layer - 1)
    }

    /// All parameters in order of first use: `embedding.weight`, `lstm.*_l0` ..., `head.weight` (unless tied), `head.bias`.
    pub fn table(&self) -> ParamTable {
        self.params().0
    }

    pub(super) fn params(&self) -> (ParamTable, ModelParams) {
        let mut table = ParamTable::new();
        let embedding = match self.input {
            Input::Tokens { vocabulary, width } => Some(table.push(
                "embedding.weight",
                0,
                vec![vocabulary, width],
                Layout::Matrix { rows: Axis::inner(vocabulary), cols: Axis::units(width) },
            )),
            Input::Values { .. } => None,
        };
        let lanes = (0..self.n_layers).flat_map(|l| self.push_layer(&mut table, l)).collect();
        let (head, outputs) = (1 + self.n_layers, self.n_outputs());
        let cols = self.layer_output(self.n_layers - 1);
        let head_weight = match embedding {
            Some(embedding) if self.tied => embedding,
            _ => table.push("head.weight", head, vec![outputs, cols.len()], Layout::Matrix { rows: Axis::inner(outputs), cols }),
        };
        let head_bias = table.push("head.bias", head, vec![outputs], Layout::Matrix { rows: Axis::exact(1), cols: Axis::inner(outputs) });
        (table, ModelParams { embedding, lanes, head_weight, head_bias })
    }

    /// The tensors of one layer, as PyTorch names them where it has them; a lane for each direction. What a step reads lies in one bucket for both,
    /// so that they can share its launch.
    fn push_layer(&self, table: &mut ParamTable, l: usize) -> Vec<LayerParams> {
        let (h, r, inputs) = (self.hidden.of(l), self.layer_units(l), self.layer_input(l));
        let units = Axis::units(h);
        let suffixes = &["", "_reverse"][..self.n_directions()];
        let name = |which: &str, suffix: &str| format!("lstm.{which}_l{l}{suffix}");
        let panels = |inputs| Layout::Panels { hidden: h, inputs };
        let weights_ih: Vec<usize> = suffixes
            .iter()
            .map(|suffix| table.push(name("weight_ih", suffix), 1 + l, vec![GATES * h, inputs.len()], panels(inputs)))
            .collect();
        let mut of_each_direction = |tensors: &[(&str, Vec<usize>, Layout)]| {
            let named =
                |suffix: &&str| tensors.iter().map(|(which, shape, layout)| (name(which, suffix), shape.clone(), *layout)).collect();
            let all: Vec<Vec<_>> = suffixes.iter().map(named).collect();
            table.push_together(1 + l, all.concat())
        };
        let weights_hh = of_each_direction(&[("weight_hh", vec![GATES * h, r], panels(Axis::units(r)))]);
        let layout = Layout::Matrix { rows: Axis::units(r), cols: units };
        let weights_hr = (self.lstm.proj_size > 0).then(|| of_each_direction(&[("weight_hr", vec![r, h], layout)]));
        let rows = |n| Layout::Matrix { rows: Axis::exact(n), cols: units };
        let mut vectors: Vec<(&str, Vec<usize>, Layout)> = Vec::new();
        if self.bias {
            vectors.extend(["bias_ih", "bias_hh"].map(|which| (which, vec![GATES * h], Layout::gate_bias(h))));
        }
        if self.lstm.peephole {
            vectors.push(("weight_peephole", vec![PEEPHOLES, h], rows(PEEPHOLES)));
        }
        if self.lstm.layer_norm {
            vectors.extend(["norm_ih", "norm_hh"].map(|which| (which, vec![GATES * h], Layout::gate_bias(h))));
            vectors.push(("norm_c", vec![2, h], rows(2)));
        }
        if self.lstm.learned_state {
            vectors.push(("initial_h", vec![r], Layout::Matrix { rows: Axis::exact(1), cols: Axis::units(r) }));
            vectors.push(("initial_c", vec![h], rows(1)));
        }
        let first = of_each_direction(&vectors);
        let lane = |direction: usize| {
            let at = |which: &str| vectors.iter().position(|(name, ..)| *name == which).map(|i| first + direction * vectors.len() + i);
            LayerParams {
                weight_ih: weights_ih[direction],
                weight_hh: weights_hh + direction,
                weight_hr: weights_hr.map(|first| first + direction),
                biases: at("bias_ih").zip(at("bias_hh")),
                peephole: at("weight_peephole"),
                norms: at("norm_ih").zip(at("norm_hh")).zip(at("norm_c")).map(|((ih, hh), c)| [ih, hh, c]),
                initial: at("initial_h").zip(at("initial_c")),
            }
        };
        (0..suffixes.len()).map(lane).collect()
    }
}
