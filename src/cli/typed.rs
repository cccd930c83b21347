//! The options of a training run as a person gives them: each may be missing. One struct for flags and for the keys of a configuration
//! file, so that both have the same names. Whether a value makes sense is not judged here.

use std::fmt;
use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser, ValueParser};
use serde::de::value::{Error as NameError, StrDeserializer};
use serde::de::{self, DeserializeOwned, Deserializer, IntoDeserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use crate::compress::Method;
use crate::data::sequences::ClassWeights;
use crate::data::series::{Missing, Relative};
use crate::data::split::Split;
use crate::data::text::Encoding;
use crate::data::vocab::Level;
use crate::model::config::{Levels, Pooling};
use crate::model::init::Init;
use crate::optim::Rule;
use crate::optim::schedule::ScheduleKind;
use crate::store::Select;
use crate::store::config::{LossReduction, OnDeviceLoss, Task};

/// A number of things: plain, or with K, M, G (1024).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Size(pub usize);

/// As typed: flags with hyphens, keys of a file with underscores. Written out it holds only what was given.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct Typed {
    /// What is learnt: the next token of a text (lm), the next values of a series (forecast), the class (classify) or a number (regress)
    /// of each sequence, the class of each step (tag), the next frame of notes (frames); by default classify for .ts files and with --sequence
    /// (with --label for JSON lines and Parquet), forecast for .csv and .tsv files, with --target or --horizon and for the built-in example, else lm
    #[arg(long, value_name = "TASK", help_heading = DATA, value_parser = choice::<Task>())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<Task>,
    /// A file, a glob, - for standard input, or a folder whose file names contain train, valid and test; may be repeated; .gz and .zst are
    /// unpacked; by default the built-in example
    #[arg(long, value_name = "PATH", help_heading = DATA)]
    #[serde(deserialize_with = "one_or_many", skip_serializing_if = "Option::is_none")]
    pub data: Option<Vec<String>>,
    /// How bytes become characters
    #[arg(long, value_name = "NAME", help_heading = DATA, value_parser = choice::<Encoding>())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoding: Option<Encoding>,
    /// Fractions for training, validation and test where one file holds all
    #[arg(long, value_name = "TRAIN,VALID,TEST", help_heading = DATA, value_parser = split, allow_hyphen_values = true)]
    #[serde(deserialize_with = "split_from_any", skip_serializing_if = "Option::is_none")]
    pub split: Option<Split>,
    /// What a token of a text is
    #[arg(long, value_name = "LEVEL", help_heading = DATA, value_parser = choice::<Level>())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<Level>,
    /// Keep at most so many characters or words, the most frequent ones
    #[arg(long, value_name = "N", help_heading = DATA)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vocab: Option<Size>,
    /// Columns to forecast; by default the last column of numbers
    #[arg(long, value_name = "COLUMN,...", help_heading = DATA, value_delimiter = ',')]
    #[serde(deserialize_with = "comma_list", skip_serializing_if = "Option::is_none")]
    pub target: Option<Vec<String>>,
    /// Column of a table that tells labelled sequences apart (without: .ts files, or lines of label, tab, text)
    #[arg(long, value_name = "COLUMN", help_heading = DATA)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequence: Option<String>,
    /// Column of the sequences' labels, the same in all rows of a sequence; for tag each row's own
    #[arg(long, value_name = "COLUMN", help_heading = DATA)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Key or column of the text in JSON lines and Parquet; by default text
    #[arg(long, value_name = "COLUMN", help_heading = DATA)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Columns to read; by default all columns of numbers
    #[arg(long, value_name = "COLUMN,...", help_heading = DATA, value_delimiter = ',')]
    #[serde(deserialize_with = "comma_list", skip_serializing_if = "Option::is_none")]
    pub features: Option<Vec<String>>,
    /// Count as wrong the numbers that are further off than this, in the label's unit
    #[arg(long, value_name = "X", help_heading = DATA, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tolerance: Option<f64>,
    /// Count classes unlike: balanced (in inverse proportion to how often the training part has them), or a weight for each, in their order
    #[arg(long, value_name = "W,...", help_heading = DATA, value_parser = ClassWeights::from_str, allow_hyphen_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class_weights: Option<ClassWeights>,
    /// Notes of a frame, numbered from 0 [default: 88]
    #[arg(long, value_name = "N", help_heading = DATA)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub notes: Option<Size>,
    /// Forecast quantiles instead of one value: levels between 0 and 1, rising, as in 0.1,0.5,0.9
    #[arg(long, value_name = "LEVEL,...", help_heading = MODEL, value_parser = Levels::from_str)]
    #[serde(deserialize_with = "levels", skip_serializing_if = "Option::is_none")]
    pub quantiles: Option<Levels>,
    /// Fill blanks from what lies before them, or refuse them
    #[arg(long, value_name = "WAY", help_heading = DATA, value_parser = choice::<Missing>())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing: Option<Missing>,
    /// Take windows relative to their last value: the columns that drift, all targets, or none
    #[arg(long, value_name = "WAY", help_heading = DATA, value_parser = choice::<Relative>())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relative: Option<Relative>,
    /// Rows of a season, 0 for none; by default taken from the dates
    #[arg(long, value_name = "ROWS", help_heading = DATA)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub season: Option<Size>,
    /// Read the season's phase beside the columns, as sine and cosine
    #[arg(long, help_heading = DATA, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calendar: Option<bool>,

    /// LSTM layers, one above the other
    #[arg(long, value_name = "N", help_heading = MODEL)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Size>,
    /// Hidden units of each layer: of all, or one after another (256,128)
    #[arg(long, value_name = "N,...", help_heading = MODEL)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden: Option<Units>,
    /// Columns of the embedding of tokens; by default as many as --hidden
    #[arg(long, value_name = "N", help_heading = MODEL)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding: Option<Size>,
    /// Use the embedding's matrix for the output as well
    #[arg(long, help_heading = MODEL, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tied: Option<bool>,
    /// Fraction dropped between layers in training
    #[arg(long, value_name = "P", help_heading = MODEL, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f64>,
    /// Fraction dropped in training of what the first layer reads: an embedding's columns, or features
    #[arg(long, value_name = "P", help_heading = MODEL, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_dropout: Option<f64>,
    /// Fraction dropped in training of what the last layer hands to the output
    #[arg(long, value_name = "P", help_heading = MODEL, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_dropout: Option<f64>,
    /// LSTM layers without biases
    #[arg(long, help_heading = MODEL, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_bias: Option<bool>,
    /// The cell: lstm
    #[arg(long, value_name = "NAME", help_heading = CELL)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cell: Option<String>,
    /// Read the window in both directions, side by side; not for language models
    #[arg(long, help_heading = CELL, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bidirectional: Option<bool>,
    /// Project h to this many units, 0 for none (Sak et al. 2014)
    #[arg(long, value_name = "N", help_heading = CELL)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proj_size: Option<usize>,
    /// Normalise both products and the cell state over the units of a layer (Ba et al. 2016)
    #[arg(long, help_heading = CELL, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer_norm: Option<bool>,
    /// Add what the layer below hands up to a layer's output, where both have the same width
    #[arg(long, help_heading = CELL, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub residual: Option<bool>,
    /// Learn the initial state instead of starting at zero
    #[arg(long, help_heading = CELL, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learned_state: Option<bool>,
    /// Let the gates read the cell state (Gers et al. 2002)
    #[arg(long, help_heading = CELL, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peephole: Option<bool>,
    /// Forget as much as is taken in: f = 1 - i (Greff et al. 2017)
    #[arg(long, help_heading = CELL, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub coupled_gates: Option<bool>,
    /// Largest absolute value of the cell state, 0 for any
    #[arg(long, value_name = "X", help_heading = CELL, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cell_clip: Option<f64>,
    /// Largest absolute value of the gates' gradients within the recurrence, 0 for any (Graves 2013)
    #[arg(long, value_name = "X", help_heading = CELL, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recurrent_grad_clip: Option<f64>,
    /// Fraction of h hidden from the recurrent product, the same at all steps of a sequence (Gal and Ghahramani 2016)
    #[arg(long, value_name = "P", help_heading = CELL, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recurrent_dropout: Option<f64>,
    /// Fraction of recurrent weights dropped in each step (Merity et al. 2017)
    #[arg(long, value_name = "P", help_heading = CELL, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_drop: Option<f64>,
    /// Probability that a unit of h keeps its old value (Krueger et al. 2017)
    #[arg(long, value_name = "P", help_heading = CELL, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zoneout_h: Option<f64>,
    /// Probability that a unit of c keeps its old value
    #[arg(long, value_name = "P", help_heading = CELL, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zoneout_c: Option<f64>,
    /// How weights start: uniform:A, torch, xavier, he or orthogonal
    #[arg(long, value_name = "INIT", help_heading = MODEL, value_parser = Init::from_str)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<Init>,
    /// Begin with the parameters of another run, or of a safetensors or ONNX file, as far as they fit
    #[arg(long, value_name = "RUN|FILE", help_heading = MODEL)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_from: Option<String>,
    /// Tensors that are not trained, by patterns of their names, as in 'embedding.*,lstm.*_l0'
    #[arg(long, value_name = "PATTERN,...", help_heading = TRAINING, value_delimiter = ',')]
    #[serde(deserialize_with = "comma_list", skip_serializing_if = "Option::is_none")]
    pub freeze: Option<Vec<String>>,
    /// Starting biases of the gates; by default those of --init
    #[arg(long, value_name = "I,F,G,O", help_heading = MODEL, value_parser = numbers::<4>, allow_hyphen_values = true)]
    #[serde(deserialize_with = "fixed_numbers", skip_serializing_if = "Option::is_none")]
    pub gate_bias: Option<[f64; 4]>,
    /// Time steps of a window
    #[arg(long, value_name = "N", help_heading = MODEL)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq_len: Option<Size>,
    /// What is read of a labelled sequence: the last step's outputs, in both directions the step with which each ends, or their mean over
    /// all steps
    #[arg(long, value_name = "HOW", help_heading = MODEL, value_parser = choice::<Pooling>())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pooling: Option<Pooling>,
    /// Steps ahead that are forecast, all of them outputs
    #[arg(long, value_name = "N", help_heading = MODEL)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub horizon: Option<Size>,

    /// Streams of a text, windows of a series or labelled sequences in a step, over all devices
    #[arg(long, value_name = "N", help_heading = TRAINING)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch_size: Option<Size>,
    /// The same in evaluation; by default --batch-size
    #[arg(long, value_name = "N", help_heading = TRAINING)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_batch_size: Option<Size>,
    /// Passes over the training part; with --max-steps alone there is no limit of epochs
    #[arg(long, value_name = "N", help_heading = TRAINING, value_parser = whole())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u64>,
    /// Updates after which training ends
    #[arg(long, value_name = "N", help_heading = TRAINING, value_parser = whole())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// End after so many evaluations in a row that found no lower loss; by default never
    #[arg(long, value_name = "N", help_heading = TRAINING, value_parser = whole())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stop: Option<u64>,
    /// Learning rate
    #[arg(long, value_name = "X", help_heading = TRAINING, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Update rule
    #[arg(long, value_name = "RULE", help_heading = TRAINING, value_parser = choice::<Rule>())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<Rule>,
    /// Momentum of sgd and rmsprop
    #[arg(long, value_name = "X", help_heading = TRAINING, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// Nesterov's momentum, of sgd
    #[arg(long, help_heading = TRAINING, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nesterov: Option<bool>,
    /// Weight decay: decoupled for adamw, else L2
    #[arg(long, value_name = "X", help_heading = TRAINING, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// L1 penalty
    #[arg(long, value_name = "X", help_heading = TRAINING, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub l1: Option<f64>,
    /// How the learning rate changes
    #[arg(long, value_name = "KIND", help_heading = TRAINING, value_parser = choice::<ScheduleKind>())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schedule: Option<ScheduleKind>,
    /// Steps of linear warm-up
    #[arg(long, value_name = "N", help_heading = TRAINING, value_parser = whole())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u64>,
    /// What the rate is multiplied by: at each cut of step, over each interval of exponential, at each stall of plateau [default: step 0.1; exponential 0.01; plateau 0.5]
    #[arg(long, value_name = "X", help_heading = TRAINING, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_decay: Option<f64>,
    /// Epochs before the decay begins; by default half of the run for step, none for exponential
    #[arg(long, value_name = "EPOCHS", help_heading = TRAINING, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_after: Option<f64>,
    /// Epochs between decays; by default a quarter of the run for step, all of it for exponential
    #[arg(long, value_name = "EPOCHS", help_heading = TRAINING, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_every: Option<f64>,
    /// Evaluations without improvement that plateau bears before it decays
    #[arg(long, value_name = "N", help_heading = TRAINING)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience: Option<u32>,
    /// Largest global norm of the gradient, 0 for any
    #[arg(long, value_name = "X", help_heading = TRAINING, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
    /// Largest absolute value of a gradient, 0 for any
    #[arg(long, value_name = "X", help_heading = TRAINING, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_value: Option<f64>,
    /// Divide the loss that is trained on by its terms, or by the sequences
    #[arg(long, value_name = "HOW", help_heading = TRAINING, value_parser = choice::<LossReduction>())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_reduction: Option<LossReduction>,
    /// Seed of everything random
    #[arg(long, value_name = "N", help_heading = TRAINING, value_parser = whole())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,

    /// auto, or a comma list of cpu, cpu:THREADS, gpu:INDEX, each with an optional *N for N workers
    #[arg(long, value_name = "LIST", help_heading = DEVICES)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<String>,
    /// equal, auto (by measured speed) or W1:W2:... for the shares of the batch; by default equal where all workers have the same spec,
    /// else auto
    #[arg(long, value_name = "SHARES", help_heading = DEVICES)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balance: Option<String>,
    /// When a device is lost: the others repeat the step and go on without it, or the run stops; continue keeps copies of what only one device
    /// holds
    #[arg(long, value_name = "WHAT", help_heading = DEVICES, value_parser = choice::<OnDeviceLoss>())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_device_loss: Option<OnDeviceLoss>,
    /// Take devices that were lost and are back in again, at the next checkpoint
    #[arg(long, help_heading = DEVICES, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rejoin: Option<bool>,
    /// Seconds after which a device that does not answer counts as lost
    #[arg(long, value_name = "SECONDS", help_heading = DEVICES, value_parser = whole())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<u64>,
    /// Most memory for buffers, in GB (2^30 bytes): of every device, or of each in the order of --devices; bounds their shares
    #[arg(long, value_name = "GB,...", help_heading = DEVICES, value_delimiter = ',', allow_negative_numbers = true)]
    #[serde(deserialize_with = "number_list", skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<Vec<f64>>,
    /// Launch every kernel on a GPU as fixed for its size, instead of measuring its variants where a size is new (at most 2 s) and keeping the fastest
    #[arg(long, help_heading = DEVICES, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_autotune: Option<bool>,
    /// Cut each share into so many parts, to save memory; the result stays
    #[arg(long, value_name = "N", help_heading = DEVICES)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accumulate: Option<Size>,
    /// How gradients are made smaller on their way between devices: none, fp16, bf16, int8, onebit (for adam and the like), topk:RATIO or
    /// powersgd:RANK (for sgd)
    #[arg(long, value_name = "METHOD", help_heading = DEVICES)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compress: Option<Method>,
    /// Let each device keep its part of the optimizer's state only, and update its part of the parameters; the bits stay
    #[arg(long, help_heading = DEVICES, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shard_optimizer: Option<bool>,
    /// Steps between comparisons of the replicas, 0 for none
    #[arg(long, value_name = "STEPS", help_heading = DEVICES, value_parser = whole())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hash_every: Option<u64>,

    /// The run folder; by default runs/<task>-<time>
    #[arg(long, value_name = "DIR", help_heading = RUN)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub out: Option<String>,
    /// Which checkpoint the finished run hands out
    #[arg(long, value_name = "WHICH", help_heading = RUN, value_parser = choice::<Select>())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub select: Option<Select>,
    /// Steps between evaluations, 0 for once an epoch
    #[arg(long, value_name = "STEPS", help_heading = RUN, value_parser = whole())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_every: Option<u64>,
    /// Steps between reports
    #[arg(long, value_name = "STEPS", help_heading = RUN, value_parser = whole())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_every: Option<u64>,
    /// Steps between checkpoints, 0 for once an epoch
    #[arg(long, value_name = "STEPS", help_heading = RUN, value_parser = whole())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_every: Option<u64>,
    /// Write event files for TensorBoard into the run folder as well
    #[arg(long, help_heading = RUN, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL", hide_possible_values = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tensorboard: Option<bool>,
    /// Checkpoints that are kept, beside the best
    #[arg(long, value_name = "N", help_heading = RUN)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<Size>,
}

const DATA: &str = "Data";
const MODEL: &str = "Model";
const CELL: &str = "LSTM";
const TRAINING: &str = "Training";
const DEVICES: &str = "Devices";
pub(super) const RUN: &str = "Run";

/// A flag's parser for a whole number; what a TOML file cannot hold, the run's record could not either.
fn whole() -> impl TypedValueParser<Value = u64> {
    clap::value_parser!(u64).range(..=i64::MAX as u64)
}

/// A flag's parser for an enum, whose names are those that its values have in a file.
pub(super) fn choice<T: DeserializeOwned + Clone + Send + Sync + 'static>() -> ValueParser {
    let parser = PossibleValuesParser::new(names::<T>()).try_map(|name| {
        let name: StrDeserializer<'_, NameError> = name.as_str().into_deserializer();
        T::deserialize(name)
    });
    ValueParser::new(parser)
}

/// The names of an enum's values in a file.
fn names<T: DeserializeOwned>() -> &'static [&'static str] {
    struct Names<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Names<'_> {
        type Error = NameError;

        fn deserialize_enum<V: Visitor<'de>>(
            self,
            _: &'static str,
            variants: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = variants;
            Err(de::Error::custom("only the names were asked for"))
        }

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(de::Error::custom("not an enum"))
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct newtype_struct seq
            tuple tuple_struct map struct identifier ignored_any
        }
    }

    let mut names: &'static [&'static str] = &[];
    // Always an error: the names are taken on the way.
    let _ = T::deserialize(Names(&mut names));
    names
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (digits, unit) = match text.char_indices().last() {
            Some((at, 'K' | 'k')) => (&text[..at], 1_usize << 10),
            Some((at, 'M' | 'm')) => (&text[..at], 1 << 20),
            Some((at, 'G' | 'g')) => (&text[..at], 1 << 30),
            _ => (text, 1),
        };
        let count: usize = digits.parse().map_err(|_| "not a whole number, plain or with K, M, G (1024)".to_owned())?;
        // As for `whole`.
        let size = count.checked_mul(unit).filter(|&size| i64::try_from(size).is_ok());
        size.map(Self).ok_or_else(|| "too large".to_owned())
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sized;

        impl Visitor<'_> for Sized {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number, or one with K, M, G in quotes")
            }

            fn visit_i64<E: de::Error>(self, n: i64) -> Result<Size, E> {
                usize::try_from(n).map(Size).map_err(|_| E::invalid_value(de::Unexpected::Signed(n), &self))
            }

            fn visit_u64<E: de::Error>(self, n: u64) -> Result<Size, E> {
                usize::try_from(n).map(Size).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(n), &self))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }

        deserializer.deserialize_any(Sized)
    }
}

/// Units of all layers, or of one after another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Units(pub Vec<Size>);

impl FromStr for Units {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split(',').map(|part| part.trim().parse()).collect::<Result<_, _>>().map(Self)
    }
}

impl Serialize for Units {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0[..] {
            [one] => one.serialize(serializer),
            each => each.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Units {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Only `hidden` is of this kind.
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "hidden must be a whole number, one with K, M or G in quotes, or a list of such")]
        enum Given {
            All(Size),
            Each(Vec<Size>),
            Text(String),
        }
        let none = || serde::de::Error::custom("hidden names no layer: give one number for all layers, or one for each");
        match Given::deserialize(deserializer)? {
            Given::All(one) => Ok(Self(vec![one])),
            Given::Each(each) if each.is_empty() => Err(none()),
            Given::Each(each) => Ok(Self(each)),
            // As the flag is written.
            Given::Text(text) => text.parse().map_err(|e| serde::de::Error::custom(format!("hidden is \"{text}\": {e}"))),
        }
    }
}

/// `N` numbers with commas between.
fn numbers<const N: usize>(text: &str) -> Result<[f64; N], String> {
    let parts = text.split(',').map(|part| part.trim().parse().map_err(|_| format!("'{}' is not a number", part.trim())));
    let parts = parts.collect::<Result<Vec<f64>, String>>()?;
    let n = parts.len();
    parts.try_into().map_err(|_| format!("{N} numbers with commas between are needed, not {n}"))
}

/// A list, or one string.
struct ListVisitor {
    /// The string is cut at commas.
    commas: bool,
}

impl<'de> Visitor<'de> for ListVisitor {
    type Value = Vec<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or a list of strings")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(if self.commas { text.split(',').map(|part| part.trim().to_owned()).collect() } else { vec![text.to_owned()] })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = seq.next_element()? {
            list.push(item);
        }
        Ok(list)
    }
}

fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<String>>, D::Error> {
    deserializer.deserialize_any(ListVisitor { commas: false }).map(Some)
}

fn comma_list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<String>>, D::Error> {
    deserializer.deserialize_any(ListVisitor { commas: true }).map(Some)
}

/// A list of numbers, or a string as that of the flag.
fn levels<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Levels>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a list of numbers, or a string of them with commas between")]
    enum Given {
        Text(String),
        Numbers(Vec<f64>),
    }
    let levels = match Given::deserialize(deserializer)? {
        Given::Text(text) => text.parse(),
        Given::Numbers(numbers) => numbers.try_into(),
    };
    levels.map(Some).map_err(de::Error::custom)
}

struct NumbersVisitor<const N: usize>;

impl<'de, const N: usize> Visitor<'de> for NumbersVisitor<N> {
    type Value = [f64; N];

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{N} numbers in a list or in a string with commas")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        numbers(text).map_err(E::custom)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut list = Vec::new();
        while let Some(number) = seq.next_element::<f64>()? {
            list.push(number);
        }
        let n = list.len();
        list.try_into().map_err(|_| de::Error::invalid_length(n, &self))
    }
}

fn fixed_numbers<'de, D: Deserializer<'de>, const N: usize>(deserializer: D) -> Result<Option<[f64; N]>, D::Error> {
    deserializer.deserialize_any(NumbersVisitor).map(Some)
}

/// A number, numbers in a list, or in a string with commas.
fn number_list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<f64>>, D::Error> {
    struct AnyNumbers;

    impl<'de> Visitor<'de> for AnyNumbers {
        type Value = Vec<f64>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number, or numbers in a list or in a string with commas")
        }

        fn visit_f64<E: de::Error>(self, number: f64) -> Result<Self::Value, E> {
            Ok(vec![number])
        }

        fn visit_i64<E: de::Error>(self, number: i64) -> Result<Self::Value, E> {
            Ok(vec![number as f64])
        }

        fn visit_u64<E: de::Error>(self, number: u64) -> Result<Self::Value, E> {
            Ok(vec![number as f64])
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            let number = |part: &str| part.trim().parse::<f64>().map_err(|_| E::custom(format!("'{part}' is no number")));
            text.split(',').map(number).collect()
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut list = Vec::new();
            while let Some(number) = seq.next_element::<f64>()? {
                list.push(number);
            }
            Ok(list)
        }
    }

    deserializer.deserialize_any(AnyNumbers).map(Some)
}

/// Only the form is judged here, so that the answer to a wrong sum can name the file that it stands in.
fn split(text: &str) -> Result<Split, String> {
    numbers::<3>(text).map(|[train, valid, test]| Split { train, valid, test })
}

/// Three numbers in a list, or as those of the flag.
fn split_from_any<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Split>, D::Error> {
    struct SplitVisitor;

    impl<'de> Visitor<'de> for SplitVisitor {
        type Value = Split;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("3 numbers in a list or in a string with commas")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Split, E> {
            split(text).map_err(E::custom)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Split, A::Error> {
            NumbersVisitor::<3>.visit_seq(seq).map(|[train, valid, test]| Split { train, valid, test })
        }
    }

    deserializer.deserialize_any(SplitVisitor).map(Some)
}
