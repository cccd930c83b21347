//! What a network consists of, and the parameters that follow from it.

use serde::{Deserialize, Serialize};

use crate::kernels::lstm::PEEPHOLES;
use crate::params::{Axis, Layout, ParamTable};
use crate::shape::{ALIGN, GATES, round_up};
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

/// What a layer is made of beyond its size. All of it off is the LSTM of PyTorch; the papers stand in `kernels::lstm`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LstmConfig {
    /// Each layer reads its input in both directions; the outputs of both lie side by side.
    pub bidirectional: bool,
    /// A layer's input is added to its output where both have the same width.
    pub residual: bool,
    /// The initial state is a parameter.
    pub learned_state: bool,
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
}

/// An LSTM network: optional embedding, stacked layers with dropout between them, linear head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    pub input: Input,
    pub output: Output,
    pub n_layers: usize,
    pub hidden: usize,
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
    pub biases: Option<(usize, usize)>,
    pub peephole: Option<usize>,
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
    /// Fails on sizes that make no sense together.
    ///
    /// # Errors
    /// Names the sizes and what to change.
    pub fn check(&self) -> Result<(), UsageError> {
        UsageError::unless(self.n_layers > 0 && self.hidden > 0, || {
            format!("a model needs at least one layer and one hidden unit, not --layers {} --hidden {}", self.n_layers, self.hidden)
        })?;
        let l = &self.lstm;
        let shares = [
            ("--dropout", self.dropout),
            ("--recurrent-dropout", l.recurrent_dropout),
            ("--weight-drop", l.weight_drop),
            ("--zoneout-h", l.zoneout_h),
            ("--zoneout-c", l.zoneout_c),
        ];
        for (flag, share) in shares {
            UsageError::unless((0.0..1.0).contains(&share), || format!("{flag} is {share}, but must be at least 0 and below 1"))?;
        }
        for (flag, limit) in [("--cell-clip", l.cell_clip), ("--recurrent-grad-clip", l.recurrent_grad_clip)] {
            UsageError::unless(limit.is_finite() && limit >= 0.0, || format!("{flag} is {limit}, but must be a number of 0 or more"))?;
        }
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
            UsageError::unless(width == self.hidden, || {
                format!("--tied shares the embedding with the head: --embedding {width} must equal --hidden {}", self.hidden)
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
        }
    }

    /// Targets, and weights, of one row of outputs: one for classes, one for each number.
    pub fn n_targets(&self) -> usize {
        match self.output {
            Output::Classes { .. } | Output::Label { .. } => 1,
            Output::Values { n_outputs, .. } => n_outputs,
        }
    }

    pub(super) fn reading(&self) -> Reading {
        match self.output {
            Output::Classes { .. } => Reading::Steps,
            // What a residual layer hands up at a row's end is more than its state.
            Output::Label { pooling, .. } | Output::Values { pooling, .. }
                if pooling == Pooling::Mean || self.is_residual(self.n_layers - 1) =>
            {
                Reading::Pooled(pooling)
            }
            Output::Label { .. } | Output::Values { .. } => Reading::FinalStates,
        }
    }

    /// Whether training draws random numbers.
    pub fn is_random(&self) -> bool {
        let l = &self.lstm;
        [self.dropout, l.recurrent_dropout, l.weight_drop, l.zoneout_h, l.zoneout_c].iter().any(|&p| p > 0.0)
    }

    /// Directions of a layer: 1 or 2.
    pub fn n_directions(&self) -> usize {
        1 + usize::from(self.lstm.bidirectional)
    }

    /// Layers times directions: each has a state of its own.
    pub fn n_lanes(&self) -> usize {
        self.n_layers * self.n_directions()
    }

    /// The axis of what comes out of a layer: both directions side by side.
    fn layer_output(&self) -> Axis {
        Axis { groups: self.n_directions(), ..Axis::units(self.hidden) }
    }

    /// The axis of what goes into `layer`.
    pub(super) fn layer_input(&self, layer: usize) -> Axis {
        match self.input {
            _ if layer > 0 => self.layer_output(),
            Input::Tokens { width, .. } => Axis::units(width),
            Input::Values { n_features } => Axis::inner(n_features),
        }
    }

    /// Whether `layer` adds its input to its output.
    pub(super) fn is_residual(&self, layer: usize) -> bool {
        self.lstm.residual && self.layer_input(layer) == self.layer_output()
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
        let directions = ["", "_reverse"];
        let lanes = (0..self.n_layers).flat_map(|l| directions[..self.n_directions()].iter().map(move |direction| (l, direction)));
        let lanes = lanes.map(|(l, direction)| self.push_lane(&mut table, l, direction)).collect();
        let (head, outputs) = (1 + self.n_layers, self.n_outputs());
        let cols = self.layer_output();
        let head_weight = match embedding {
            Some(embedding) if self.tied => embedding,
            _ => table.push("head.weight", head, vec![outputs, cols.len()], Layout::Matrix { rows: Axis::inner(outputs), cols }),
        };
        let head_bias = table.push("head.bias", head, vec![outputs], Layout::Matrix { rows: Axis::exact(1), cols: Axis::inner(outputs) });
        (table, ModelParams { embedding, lanes, head_weight, head_bias })
    }

    /// The tensors of one layer in one direction, as PyTorch names them where it has them.
    fn push_lane(&self, table: &mut ParamTable, l: usize, direction: &str) -> LayerParams {
        let (h, inputs, units) = (self.hidden, self.layer_input(l), Axis::units(self.hidden));
        let name = |which: &str| format!("lstm.{which}_l{l}{direction}");
        let panels = |inputs| Layout::Panels { hidden: h, inputs };
        let weight_ih = table.push(name("weight_ih"), 1 + l, vec![GATES * h, inputs.len()], panels(inputs));
        let weight_hh = table.push(name("weight_hh"), 1 + l, vec![GATES * h, h], panels(units));
        // The vectors lie in one bucket, since a step kernel binds them together.
        let rows = |n| Layout::Matrix { rows: Axis::exact(n), cols: units };
        let mut vectors: Vec<(&str, Vec<usize>, Layout)> = Vec::new();
        if self.bias {
            vectors.extend(["bias_ih", "bias_hh"].map(|which| (which, vec![GATES * h], Layout::gate_bias(h))));
        }
        if self.lstm.peephole {
            vectors.push(("weight_peephole", vec![PEEPHOLES, h], rows(PEEPHOLES)));
        }
        if self.lstm.learned_state {
            vectors.extend(["initial_h", "initial_c"].map(|which| (which, vec![h], rows(1))));
        }
        let sizes: Vec<usize> = vectors.iter().map(|(_, _, layout)| round_up(layout.packed_len(), ALIGN)).collect();
        let mut places = Vec::new();
        for (i, (which, shape, layout)) in vectors.into_iter().enumerate() {
            let room = sizes[i + 1..].iter().sum();
            places.push((which, table.push_with_room(name(which), 1 + l, shape, layout, room)));
        }
        let at = |which: &str| places.iter().find(|(name, _)| *name == which).map(|(_, at)| *at);
        LayerParams {
            weight_ih,
            weight_hh,
            biases: at("bias_ih").zip(at("bias_hh")),
            peephole: at("weight_peephole"),
            initial: at("initial_h").zip(at("initial_c")),
        }
    }
}
