//! What a network consists of, and the parameters that follow from it.

use serde::{Deserialize, Serialize};

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
    /// Numbers after the last time step; squared error.
    Values { n_outputs: usize },
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
}

/// Where one layer's tensors stand in the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct LayerParams {
    pub weight_ih: usize,
    pub weight_hh: usize,
    pub biases: Option<(usize, usize)>,
}

/// Where everything stands in the table.
#[derive(Clone, Debug)]
pub(super) struct ModelParams {
    pub embedding: Option<usize>,
    pub layers: Vec<LayerParams>,
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
        UsageError::unless((0.0..1.0).contains(&self.dropout), || {
            format!("--dropout is {}, but must be at least 0 and below 1", self.dropout)
        })?;
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
            Output::Classes { n_classes } => n_classes,
            Output::Values { n_outputs } => n_outputs,
        }
    }

    /// The axis of what goes into `layer`.
    pub(super) fn layer_input(&self, layer: usize) -> Axis {
        match self.input {
            _ if layer > 0 => Axis::units(self.hidden),
            Input::Tokens { width, .. } => Axis::units(width),
            Input::Values { n_features } => Axis::inner(n_features),
        }
    }

    /// All parameters in order of first use: `embedding.weight`, `lstm.*_l0` ..., `head.weight` (unless tied), `head.bias`.
    pub fn table(&self) -> ParamTable {
        self.params().0
    }

    pub(super) fn params(&self) -> (ParamTable, ModelParams) {
        let mut table = ParamTable::new();
        let h = self.hidden;
        let embedding = match self.input {
            Input::Tokens { vocabulary, width } => Some(table.push(
                "embedding.weight",
                0,
                vec![vocabulary, width],
                Layout::Matrix { rows: Axis::inner(vocabulary), cols: Axis::units(width) },
            )),
            Input::Values { .. } => None,
        };
        let layers = (0..self.n_layers)
            .map(|l| {
                let (inputs, hidden) = (self.layer_input(l), Axis::units(h));
                let weight_ih =
                    table.push(format!("lstm.weight_ih_l{l}"), 1 + l, vec![GATES * h, inputs.len()], Layout::Panels { hidden: h, inputs });
                let weight_hh =
                    table.push(format!("lstm.weight_hh_l{l}"), 1 + l, vec![GATES * h, h], Layout::Panels { hidden: h, inputs: hidden });
                // Both biases lie in one bucket, since a step kernel binds them together.
                let room = round_up(Layout::gate_bias(h).packed_len(), ALIGN);
                let mut bias = |which: &str, room| {
                    table.push_with_room(format!("lstm.bias_{which}_l{l}"), 1 + l, vec![GATES * h], Layout::gate_bias(h), room)
                };
                let biases = self.bias.then(|| (bias("ih", room), bias("hh", 0)));
                LayerParams { weight_ih, weight_hh, biases }
            })
            .collect();
        let (head, outputs) = (1 + self.n_layers, self.n_outputs());
        let head_weight = match embedding {
            Some(embedding) if self.tied => embedding,
            _ => table.push("head.weight", head, vec![outputs, h], Layout::Matrix { rows: Axis::inner(outputs), cols: Axis::units(h) }),
        };
        let head_bias = table.push("head.bias", head, vec![outputs], Layout::Matrix { rows: Axis::exact(1), cols: Axis::inner(outputs) });
        (table, ModelParams { embedding, layers, head_weight, head_bias })
    }
}
