//! From a run's configuration to its data and its model: what training and everything after it have in common.

use std::sync::Arc;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::data::builtin;
use crate::data::remote::is_url;
use crate::data::sequences::{Goal, LabelSpec, Labelled, SequenceBatches, Sequences, SequencesOptions, SequencesSpec, StepSpec};
use crate::data::series::{Order, Part, Series, SeriesBatches, SeriesOptions, SeriesSpec};
use crate::data::text::{Text, TextBatches, TextEval, TextOptions, announcement, load_tokens};
use crate::data::tokens::{Tokens, cache_folder};
use crate::data::vocab::Vocab;
use crate::data::{Batches, DataError};
use crate::model::config::{Input, Levels, ModelConfig, Output, Pooling};
use crate::store::config::{RunConfig, Task};
use crate::usage::UsageError;

/// What a model must know of its data to read other data alike; `data.json` in the run folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataSpec {
    /// What tokens stand for.
    Text(Vocab),
    /// Columns, scale, step of time.
    Series(Box<SeriesSpec>),
    /// Features or vocabulary, and labels.
    Sequences(Box<SequencesSpec>),
}

/// Notes of a frame where nothing else is said: the keys of a piano.
pub const NOTES: usize = 88;

/// The file in the run folder that holds a [`DataRecord`].
pub const DATA_FILE: &str = "data.json";

/// [`DATA_FILE`]: what a model must know of its data, and which data those were.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataRecord {
    #[serde(flatten)]
    pub spec: DataSpec,
    /// Missing where a folder comes from elsewhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<Fingerprint>,
}

/// What tells data from other data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Tokens, rows or sequences.
    pub length: u64,
    /// Over the tokens of all parts, or over times and values of all rows, hexadecimal.
    pub sha256: String,
}

/// Data in memory.
pub enum Corpus {
    Text(Box<Text>),
    Series(Arc<Series>),
    Sequences(Arc<Sequences>),
}

/// A part of the data for evaluation.
pub struct EvalSet {
    pub batches: Arc<dyn Batches>,
    /// Streams whose state is carried; 0 where it is not.
    pub n_streams: usize,
    pub truth: Truth,
}

/// What outputs are compared with, for scores beside the loss.
pub enum Truth {
    /// Nothing: the loss says it.
    Text,
    /// The levels beside, where quantiles are forecast.
    Series(Arc<Series>, Option<Levels>),
    /// The tolerance beside, beyond which a number is wrong.
    Sequences(Arc<Sequences>, Option<f64>),
}

impl Truth {
    /// Whether there is something to compare with.
    pub fn wants_outputs(&self) -> bool {
        !matches!(self, Self::Text)
    }
}

impl Corpus {
    /// Reads what the configuration names, with the vocabulary of `spec` where there is one already.
    ///
    /// # Errors
    /// [`DataError`].
    pub fn load(config: &RunConfig, spec: Option<&DataSpec>) -> Result<Self> {
        Ok(match config.task {
            Task::Lm => {
                let vocab = match spec {
                    Some(DataSpec::Text(vocab)) => Some(vocab.clone()),
                    _ => None,
                };
                Self::Text(Box::new(Text::load(&config.data, &TextOptions { vocab, ..text_options(config) })?))
            }
            Task::Forecast => {
                let options = SeriesOptions {
                    target: config.target.clone(),
                    features: config.features.clone(),
                    window: config.seq_len,
                    horizon: config.horizon,
                    missing: config.missing,
                    relative: config.relative,
                    split: config.split,
                    season: config.season,
                    calendar: config.calendar,
                };
                Self::Series(Arc::new(if config.data.is_empty() { builtin::co2(&options)? } else { Series::load(&config.data, &options)? }))
            }
            task @ (Task::Classify | Task::Regress | Task::Tag | Task::Frames) => {
                let options = SequencesOptions {
                    goal: match task {
                        Task::Regress => Goal::Number,
                        Task::Tag => Goal::Tags,
                        Task::Frames => Goal::Frames,
                        _ => Goal::Class,
                    },
                    sequence: config.sequence.clone(),
                    label: config.label.clone(),
                    features: config.features.clone(),
                    text: config.text.clone(),
                    missing: config.missing,
                    level: config.level,
                    encoding: config.encoding,
                    vocab_limit: config.vocab,
                    class_weights: config.class_weights.clone(),
                    notes: config.notes.unwrap_or(NOTES),
                    split: config.split,
                    seed: config.seed,
                };
                Self::Sequences(Arc::new(Sequences::load(&config.data, &options)?))
            }
        })
    }

    /// Reads other data as the run read its own; all of it is one part. `labelled` says whether all sequences must have labels.
    ///
    /// # Errors
    /// [`DataError`].
    pub fn load_other(config: &RunConfig, data: &[String], spec: &DataSpec, labelled: Labelled) -> Result<OtherData> {
        Ok(match spec {
            DataSpec::Text(vocab) => OtherData::Text(load_tokens(data, vocab, &text_options(config))?),
            DataSpec::Series(spec) => OtherData::Series(Arc::new(Series::load_with(data, spec)?)),
            DataSpec::Sequences(spec) => OtherData::Sequences(Arc::new(Sequences::load_with(data, spec, config.encoding, labelled)?)),
        })
    }

    /// What the run folder keeps.
    pub fn spec(&self) -> DataSpec {
        match self {
            Self::Text(text) => DataSpec::Text(text.vocab.clone()),
            Self::Series(series) => DataSpec::Series(Box::new(series.spec().clone())),
            Self::Sequences(sequences) => DataSpec::Sequences(Box::new(sequences.spec().clone())),
        }
    }

    /// What tells these data from other data read in the same way.
    ///
    /// # Errors
    /// [`DataError`]: tokens that cannot be read any more.
    pub fn fingerprint(&self) -> Result<Fingerprint, DataError> {
        let mut hasher = Sha256::new();
        let length = match self {
            Self::Text(text) => {
                let length = [&text.train, &text.valid, &text.test].iter().map(|part| part.len() as u64).sum();
                return Ok(Fingerprint { length, sha256: text.sha256()? });
            }
            Self::Series(series) => {
                series.words().for_each(|word| hasher.update(word.to_le_bytes()));
                series.n_rows() as u64
            }
            Self::Sequences(sequences) => {
                sequences.words().for_each(|word| hasher.update(word.to_le_bytes()));
                sequences.len() as u64
            }
        };
        Ok(Fingerprint { length, sha256: hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect() })
    }

    /// Refuses data that are not those that were recorded.
    ///
    /// # Errors
    /// Both lengths, or both hashes, and the file.
    pub fn check_unchanged(&self, recorded: &Fingerprint) -> Result<()> {
        let found = self.fingerprint()?;
        let (name, unit) = match self {
            Self::Text(text) => (text.name.as_str(), "tokens"),
            Self::Series(series) => (series.name(), "rows"),
            Self::Sequences(sequences) => (sequences.name(), "sequences"),
        };
        let differ = if found.length == recorded.length {
            format!("the sha-256 of its {unit} is {}, not {}", found.sha256, recorded.sha256)
        } else {
            format!("{} {unit} instead of {}", found.length, recorded.length)
        };
        UsageError::unless(found == *recorded, || {
            format!(
                "{name} has changed since the run began ({differ}): put the data back as they were, or start another run with another --out"
            )
        })?;
        Ok(())
    }

    /// What a person should know.
    pub fn warnings(&self) -> Vec<String> {
        match self {
            Self::Text(_) => Vec::new(),
            Self::Series(series) => series.warnings().to_vec(),
            Self::Sequences(sequences) => sequences.warnings().to_vec(),
        }
    }

    /// Batches of the training part.
    ///
    /// # Errors
    /// [`DataError`]: too short for a window.
    pub fn train_batches(&self, config: &RunConfig) -> Result<(Arc<dyn Batches>, Vec<String>)> {
        Ok(match self {
            Self::Text(text) => {
                let batches = TextBatches::new(&text.name, text.train.clone(), config.batch_size, config.seq_len)?;
                let left = batches.n_left_out();
                let note = (left > 0).then(|| {
                    format!("{left} tokens at the end of the training part fill no stream of {} and are left out", batches.stream_len())
                });
                (Arc::new(batches), text.notes.iter().cloned().chain(note).collect())
            }
            Self::Series(series) => (
                Arc::new(SeriesBatches::new(Arc::clone(series), Part::Train, config.batch_size, Order::Shuffled { seed: config.seed })?),
                series.notes().to_vec(),
            ),
            Self::Sequences(sequences) => {
                let order = Order::Shuffled { seed: config.seed };
                (Arc::new(SequenceBatches::new(Arc::clone(sequences), Part::Train, config.batch_size, order)?), Vec::new())
            }
        })
    }

    /// Streams whose state is carried in training; 0 where it is not.
    pub fn n_streams(&self, config: &RunConfig) -> usize {
        match self {
            Self::Text(_) => config.batch_size,
            Self::Series(_) | Self::Sequences(_) => 0,
        }
    }

    /// A held-out part; none if it is empty.
    ///
    /// # Errors
    /// [`DataError`].
    pub fn eval_set(&self, config: &RunConfig, part: Part) -> Result<Option<EvalSet>> {
        Ok(match self {
            Self::Text(text) => {
                let tokens = if part == Part::Valid { &text.valid } else { &text.test };
                // The first token is nobody's target.
                if tokens.len() < 2 { None } else { Some(text_set(tokens, config.eval_batch_size, config.seq_len)?) }
            }
            Self::Series(series) => series_set(series, config, part, 1)?,
            Self::Sequences(sequences) => sequences_set(sequences, config, part)?,
        })
    }
}

/// Data that a run did not train on.
pub enum OtherData {
    Text(Tokens),
    Series(Arc<Series>),
    Sequences(Arc<Sequences>),
}

impl OtherData {
    /// All of it, for evaluation.
    ///
    /// # Errors
    /// [`DataError`]: too short.
    pub fn eval_set(&self, config: &RunConfig) -> Result<EvalSet> {
        match self {
            Self::Text(tokens) => text_set(tokens, config.eval_batch_size, config.seq_len),
            Self::Series(series) => series_set(series, config, Part::All, 1)?
                .ok_or_else(|| UsageError("--data has no window to evaluate; give a longer file".to_owned()).into()),
            Self::Sequences(sequences) => sequences_set(sequences, config, Part::All)?
                .ok_or_else(|| UsageError("--data has no sequence to evaluate".to_owned()).into()),
        }
    }
}

impl EvalSet {
    /// The same for a series with only every `stride`-th of its windows, from the first on; other sets stay.
    ///
    /// # Errors
    /// [`DataError`].
    pub fn rolling(self, config: &RunConfig, part: Part, stride: usize) -> Result<Self> {
        let Truth::Series(series, _) = &self.truth else { return Ok(self) };
        let set = series_set(series, config, part, stride)?;
        Ok(set.unwrap_or(self))
    }
}

fn text_options(config: &RunConfig) -> TextOptions {
    TextOptions {
        level: config.level,
        encoding: config.encoding,
        column: config.text.clone(),
        split: config.split,
        vocab_limit: config.vocab,
        ..TextOptions::default()
    }
}

/// What a person is told before data are read that take a while.
pub fn announced(config: &RunConfig) -> Option<String> {
    let urls: Vec<&str> = config.data.iter().map(String::as_str).filter(|given| is_url(given)).collect();
    if !urls.is_empty() {
        return Some(format!("{} is kept in {} once it is fetched", urls.join(", "), cache_folder().display()));
    }
    (config.task == Task::Lm).then(|| announcement(&config.data, &text_options(config))).flatten()
}

fn text_set(tokens: &Tokens, n_streams: usize, window: usize) -> Result<EvalSet> {
    let batches = TextEval::new(tokens.clone(), n_streams, window)?;
    let n_streams = batches.n_streams();
    Ok(EvalSet { batches: Arc::new(batches), n_streams, truth: Truth::Text })
}

fn series_set(series: &Arc<Series>, config: &RunConfig, part: Part, stride: usize) -> Result<Option<EvalSet>> {
    let batches: Result<_, DataError> = SeriesBatches::new(Arc::clone(series), part, config.eval_batch_size, Order::InTime);
    let batches = batches?.every(stride);
    let empty = batches.origins().is_empty();
    Ok((!empty).then(|| EvalSet { batches: Arc::new(batches), n_streams: 0, truth: Truth::Series(Arc::clone(series), config.quantiles) }))
}

fn sequences_set(sequences: &Arc<Sequences>, config: &RunConfig, part: Part) -> Result<Option<EvalSet>> {
    let batches = SequenceBatches::new(Arc::clone(sequences), part, config.eval_batch_size, Order::InTime)?;
    let empty = batches.of_part().is_empty();
    Ok((!empty).then(|| EvalSet {
        batches: Arc::new(batches),
        n_streams: 0,
        truth: Truth::Sequences(Arc::clone(sequences), config.tolerance),
    }))
}

/// The model that a configuration describes for this data.
pub fn model_config(config: &RunConfig, spec: &DataSpec) -> ModelConfig {
    let (input, output) = match spec {
        DataSpec::Text(vocab) => {
            (Input::Tokens { vocabulary: vocab.size(), width: config.embedding }, Output::Classes { n_classes: vocab.size() })
        }
        DataSpec::Series(spec) => {
            let (n_outputs, pooling) = (spec.n_outputs(), Pooling::Last);
            let output = match config.quantiles {
                None => Output::Values { n_outputs, pooling },
                Some(levels) => Output::Quantiles { n_values: n_outputs, levels, pooling },
            };
            (Input::Values { n_features: spec.n_features() }, output)
        }
        DataSpec::Sequences(spec) => {
            let input = match &spec.step {
                StepSpec::Features(features) => Input::Values { n_features: features.len() },
                StepSpec::Tokens(vocab) => Input::Tokens { vocabulary: vocab.size(), width: config.embedding },
                StepSpec::Notes(n_notes) => Input::Values { n_features: *n_notes },
            };
            let output = match &spec.label {
                LabelSpec::Classes(classes) => Output::Label { n_classes: classes.len(), pooling: config.pooling },
                LabelSpec::Number(_) => Output::Values { n_outputs: 1, pooling: config.pooling },
                LabelSpec::Tags(classes) => Output::Classes { n_classes: classes.len() },
                LabelSpec::Frames(frequency) => Output::Notes { n_notes: frequency.len() },
            };
            (input, output)
        }
    };
    ModelConfig {
        input,
        output,
        n_layers: config.layers,
        hidden: config.hidden.clone(),
        dropout: config.dropout,
        bias: !config.no_bias,
        tied: config.tied,
        lstm: config.lstm,
    }
}
