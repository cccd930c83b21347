//! From files to batches: sources, vocabulary, scaling, the order of training, prefetch.
//!
//! The order of training is a pure function: [`Batches::batch`] gives the same batch for the same epoch and index, whoever asks and
//! whenever; the position of a run is two numbers. Devices and shares are unknown here: a batch is the global one, and
//! [`Batch::rows`] cuts a share from it.
//!
//! Nothing here knows a model, a device or the command line, and nothing prints: what a person should know comes back as a warning.

pub mod baselines;
pub mod builtin;
pub mod error;
pub mod grouping;
#[cfg(feature = "parquet")]
mod parquet;
pub mod prefetch;
pub mod records;
pub mod remote;
pub mod sequences;
pub mod series;
pub mod source;
pub mod split;
pub mod table;
pub mod text;
pub mod time;
pub mod tokens;
pub mod ts;
pub mod vocab;

use std::ops::Range;

pub use error::DataError;

/// What goes into the network. Time-major: step, then row.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// Token numbers, `[T, B]`.
    Tokens(Vec<u32>),
    /// Real values, `[T, B, I]`.
    Values {
        /// The values.
        values: Vec<f32>,
        /// `I`.
        n_features: usize,
    },
}

/// What the network should say.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// The next token, or the class, of each step, `[T, B]`.
    Tokens(Vec<u32>),
    /// The class of each row, `[B]`.
    Labels(Vec<u32>),
    /// Real values, `[B, O]`.
    Values {
        /// The values, on the normalised scale.
        values: Vec<f32>,
        /// `O`.
        n_outputs: usize,
    },
    /// 1 for each note that sounds at a step, `[T, B, N]`.
    Notes {
        /// Zeros and ones.
        values: Vec<f32>,
        /// `N`.
        n_notes: usize,
    },
}

/// One global batch, or a share of one.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// `T`.
    pub n_steps: usize,
    /// `B`.
    pub n_rows: usize,
    /// What goes in.
    pub input: Input,
    /// What should come out.
    pub target: Target,
    /// The weight of each term: `[T, B]` for tokens and notes, `[B]` for labels, `[B, O]` for values; 0 = not scored.
    pub weights: Vec<f32>,
    /// Valid steps of each row, `[B]`, none of them above `T`; none: all steps of all rows.
    pub lengths: Option<Vec<u32>>,
    /// Global stream (text) or sample number (series: the row of the window's last input; else the sequence) of each row, `[B]`.
    pub streams: Vec<u32>,
    /// The carried state starts from zero at this window.
    pub resets: bool,
    /// Rows continue from window to window, so state is carried at all.
    pub carries: bool,
    /// The sum of `weights`.
    pub weight: f64,
    /// Valid time steps of all rows.
    pub n_tokens: u64,
}

impl Batch {
    /// Rows of numbers, each with numbers to be said: `inputs` `[T, B, I]`, `targets` `[B, O]`; every target counts. `streams` tells the rows
    /// apart, since what is dropped in training is drawn by them.
    ///
    /// # Errors
    /// [`DataError::Option`] where lengths do not fit together.
    pub fn of_numbers(n_steps: usize, inputs: Vec<f32>, targets: Vec<f32>, streams: Range<u32>) -> Result<Self, DataError> {
        let n_rows = streams.len();
        let per_row = |what: &'static str, n: usize, each: usize| {
            let fits = each > 0 && n > 0 && n.is_multiple_of(each);
            fits.then(|| n / each).ok_or_else(|| DataError::Option {
                name: "a batch",
                value: format!("of {n_steps} steps and {n_rows} rows"),
                problem: format!("{n} {what} do not make equal rows"),
                remedy: "give [T, B, I] inputs and [B, O] targets".to_string(),
            })
        };
        let n_features = per_row("inputs", inputs.len(), n_steps * n_rows)?;
        let n_outputs = per_row("targets", targets.len(), n_rows)?;
        let weights = vec![1.0; targets.len()];
        let (input, target) = (Input::Values { values: inputs, n_features }, Target::Values { values: targets, n_outputs });
        Ok(Self::new(n_steps, input, target, weights, streams.collect(), true, false))
    }

    /// A batch from its parts, with the shapes that the fields tell; the sums are taken here, in one way for batches and shares.
    pub fn new(n_steps: usize, input: Input, target: Target, weights: Vec<f32>, streams: Vec<u32>, resets: bool, carries: bool) -> Self {
        let n_rows = streams.len();
        let weight = weights.iter().map(|&w| f64::from(w)).sum();
        let n_tokens = match target {
            Target::Tokens(_) => weights.iter().filter(|&&w| w != 0.0).count() as u64,
            Target::Labels(_) | Target::Values { .. } | Target::Notes { .. } => (n_steps * n_rows) as u64,
        };
        Self { n_steps, n_rows, input, target, weights, lengths: None, streams, resets, carries, weight, n_tokens }
    }

    /// A batch of whole sequences, each of so many steps; `n_steps` is the largest number of them.
    pub fn of_sequences(n_steps: usize, input: Input, target: Target, weights: Vec<f32>, sequences: Vec<u32>, lengths: Vec<u32>) -> Self {
        let n_tokens = lengths.iter().map(|&length| u64::from(length)).sum();
        let ends = lengths.iter().any(|&length| (length as usize) < n_steps);
        let batch = Self::new(n_steps, input, target, weights, sequences, true, false);
        Self { n_tokens, lengths: ends.then_some(lengths), ..batch }
    }

    /// Whether each step of whole sequences is a term: what a model says of them comes row after row, the valid steps of each.
    pub fn is_of_steps(&self) -> bool {
        !self.carries && matches!(self.target, Target::Tokens(_) | Target::Notes { .. })
    }

    /// Valid steps of a row.
    pub fn length(&self, row: usize) -> usize {
        self.lengths.as_ref().map_or(self.n_steps, |lengths| lengths[row] as usize)
    }

    /// Steps of the longest of these rows.
    pub fn longest(&self, rows: Range<usize>) -> usize {
        rows.map(|row| self.length(row)).max().unwrap_or(0)
    }

    /// A share: the same steps (as many as its longest row has, where rows end), only the rows of `rows`, with its own `weight` and `n_tokens`. An empty range gives an empty share of weight 0.
    ///
    /// # Panics
    /// If `rows` reaches beyond `n_rows`.
    pub fn rows(&self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.n_rows, "rows {rows:?} of a batch of {} rows", self.n_rows);
        let b = self.n_rows;
        let lengths: Option<Vec<u32>> = self.lengths.as_ref().map(|lengths| lengths[rows.clone()].to_vec());
        let t = lengths.as_ref().map_or(self.n_steps, |lengths| lengths.iter().copied().max().unwrap_or(0) as usize);
        let input = match &self.input {
            Input::Tokens(tokens) => Input::Tokens(columns(tokens, t, b, 1, &rows)),
            Input::Values { values, n_features } => {
                Input::Values { values: columns(values, t, b, *n_features, &rows), n_features: *n_features }
            }
        };
        let (target, weights) = match &self.target {
            Target::Tokens(tokens) => (Target::Tokens(columns(tokens, t, b, 1, &rows)), columns(&self.weights, t, b, 1, &rows)),
            Target::Labels(labels) => (Target::Labels(labels[rows.clone()].to_vec()), self.weights[rows.clone()].to_vec()),
            Target::Notes { values, n_notes } => (
                Target::Notes { values: columns(values, t, b, *n_notes, &rows), n_notes: *n_notes },
                columns(&self.weights, t, b, 1, &rows),
            ),
            Target::Values { values, n_outputs } => (
                Target::Values { values: columns(values, 1, b, *n_outputs, &rows), n_outputs: *n_outputs },
                columns(&self.weights, 1, b, *n_outputs, &rows),
            ),
        };
        let streams = self.streams[rows].to_vec();
        match lengths {
            Some(lengths) => {
                Self { resets: self.resets, carries: self.carries, ..Self::of_sequences(t, input, target, weights, streams, lengths) }
            }
            None => Self::new(t, input, target, weights, streams, self.resets, self.carries),
        }
    }
}

/// The rows `rows` of a `[t, b, width]` array.
fn columns<T: Copy>(values: &[T], t: usize, b: usize, width: usize, rows: &Range<usize>) -> Vec<T> {
    let mut out = Vec::with_capacity(t * rows.len() * width);
    for step in 0..t {
        out.extend_from_slice(&values[(step * b + rows.start) * width..(step * b + rows.end) * width]);
    }
    out
}

/// An order of batches, as a pure function of epoch and index.
pub trait Batches: Send + Sync {
    /// Batches of one epoch; the same for every epoch.
    fn n_batches(&self) -> u64;

    /// Batch `idx` (`< n_batches`) of `epoch`, both from 0.
    ///
    /// # Errors
    /// What cannot be read any more.
    ///
    /// # Panics
    /// If `idx` is not below [`Batches::n_batches`].
    fn batch(&self, epoch: u64, idx: u64) -> Result<Batch, DataError>;

    /// Most steps and most rows of a batch.
    ///
    /// # Errors
    /// As [`Batches::batch`].
    fn largest(&self) -> Result<(usize, usize), DataError> {
        let first = self.batch(0, 0)?;
        Ok((first.n_steps, first.n_rows))
    }
}
