//! From a run's configuration to its data and its model: what training and everything after it have in common.

use std::sync::Arc;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::data::builtin;
use crate::data::series::{Order, Part, Series, SeriesBatches, SeriesOptions, SeriesSpec};
use crate::data::text::{Text, TextBatches, TextEval, TextOptions, load_tokens};
use crate::data::vocab::Vocab;
use crate::data::{Batches, DataError};
use crate::model::config::{Input, ModelConfig, Output, Pooling};
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
}

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
    /// Tokens or rows.
    pub length: u64,
    /// Over the tokens of all parts, or over times and values of all rows, hexadecimal.
    pub sha256: String,
}

/// Data in memory.
pub enum Corpus {
    Text(Text),
    Series(Arc<Series>),
}

/// A part of the data for evaluation.
pub struct EvalSet {
    pub batches: Arc<dyn Batches>,
    /// Streams whose state is carried; 0 for a series.
    pub n_streams: usize,
    /// The series and its part, for scores beside the loss.
    pub series: Option<(Arc<Series>, Part)>,
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
                let (level, encoding, split) = (config.level, config.encoding, config.split);
                Self::Text(Text::load(&config.data, &TextOptions { level, encoding, split, vocab_limit: config.vocab, vocab })?)
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
        })
    }

    /// Reads other data as the run read its own; all of it is one part.
    ///
    /// # Errors
    /// [`DataError`].
    pub fn load_other(config: &RunConfig, data: &[String], spec: &DataSpec) -> Result<OtherData> {
        Ok(match spec {
            DataSpec::Text(vocab) => OtherData::Text(load_tokens(data, vocab, config.encoding)?),
            DataSpec::Series(spec) => OtherData::Series(Arc::new(Series::load_with(data, spec)?)),
        })
    }

    /// What the run folder keeps.
    pub fn spec(&self) -> DataSpec {
        match self {
            Self::Text(text) => DataSpec::Text(text.vocab.clone()),
            Self::Series(series) => DataSpec::Series(Box::new(series.spec().clone())),
        }
    }

    /// What tells these data from other data read in the same way.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut hasher = Sha256::new();
        let length = match self {
            Self::Text(text) => {
                let parts = [&text.train, &text.valid, &text.test];
                for part in parts {
                    hasher.update((part.len() as u64).to_le_bytes());
                    hasher.update(bytemuck::cast_slice::<u32, u8>(part));
                }
                parts.iter().map(|part| part.len() as u64).sum()
            }
            Self::Series(series) => {
                series.words().for_each(|word| hasher.update(word.to_le_bytes()));
                series.n_rows() as u64
            }
        };
        Fingerprint { length, sha256: hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect() }
    }

    /// Refuses data that are not those that were recorded.
    ///
    /// # Errors
    /// Both lengths, or both hashes, and the file.
    pub fn check_unchanged(&self, recorded: &Fingerprint) -> Result<(), UsageError> {
        let found = self.fingerprint();
        let (name, unit) = match self {
            Self::Text(text) => (text.name.as_str(), "tokens"),
            Self::Series(series) => (series.name(), "rows"),
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
        })
    }

    /// What a person should know.
    pub fn warnings(&self) -> Vec<String> {
        match self {
            Self::Text(_) => Vec::new(),
            Self::Series(series) => series.warnings().to_vec(),
        }
    }

    /// Batches of the training part.
    ///
    /// # Errors
    /// [`DataError`]: too short for a window.
    pub fn train_batches(&self, config: &RunConfig) -> Result<(Arc<dyn Batches>, Vec<String>)> {
        Ok(match self {
            Self::Text(text) => {
                let batches = TextBatches::new(&text.name, Arc::clone(&text.train), config.batch_size, config.seq_len)?;
                let left = batches.n_left_out();
                let note = (left > 0).then(|| {
                    format!("{left} tokens at the end of the training part fill no stream of {} and are left out", batches.stream_len())
                });
                (Arc::new(batches), note.into_iter().collect())
            }
            Self::Series(series) => (
                Arc::new(SeriesBatches::new(Arc::clone(series), Part::Train, config.batch_size, Order::Shuffled { seed: config.seed })?),
                Vec::new(),
            ),
        })
    }

    /// Streams whose state is carried in training; 0 for a series.
    pub fn n_streams(&self, config: &RunConfig) -> usize {
        match self {
            Self::Text(_) => config.batch_size,
            Self::Series(_) => 0,
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
            Self::Series(series) => series_set(series, config.eval_batch_size, part)?,
        })
    }
}

/// Data that a run did not train on.
pub enum OtherData {
    Text(Arc<[u32]>),
    Series(Arc<Series>),
}

impl OtherData {
    /// All of it, for evaluation.
    ///
    /// # Errors
    /// [`DataError`]: too short.
    pub fn eval_set(&self, config: &RunConfig) -> Result<EvalSet> {
        match self {
            Self::Text(tokens) => text_set(tokens, config.eval_batch_size, config.seq_len),
            Self::Series(series) => series_set(series, config.eval_batch_size, Part::All)?
                .ok_or_else(|| UsageError("--data has no window to evaluate; give a longer file".to_owned()).into()),
        }
    }
}

fn text_set(tokens: &Arc<[u32]>, n_streams: usize, window: usize) -> Result<EvalSet> {
    let batches = TextEval::new(Arc::clone(tokens), n_streams, window)?;
    let n_streams = batches.n_streams();
    Ok(EvalSet { batches: Arc::new(batches), n_streams, series: None })
}

fn series_set(series: &Arc<Series>, batch_size: usize, part: Part) -> Result<Option<EvalSet>> {
    let batches: Result<_, DataError> = SeriesBatches::new(Arc::clone(series), part, batch_size, Order::InTime);
    let batches = batches?;
    let empty = batches.origins().is_empty();
    Ok((!empty).then(|| EvalSet { batches: Arc::new(batches), n_streams: 0, series: Some((Arc::clone(series), part)) }))
}

/// The model that a configuration describes for this data.
pub fn model_config(config: &RunConfig, spec: &DataSpec) -> ModelConfig {
    let (input, output) = match spec {
        DataSpec::Text(vocab) => {
            (Input::Tokens { vocabulary: vocab.size(), width: config.embedding }, Output::Classes { n_classes: vocab.size() })
        }
        DataSpec::Series(spec) => {
            (Input::Values { n_features: spec.n_features() }, Output::Values { n_outputs: spec.n_outputs(), pooling: Pooling::Last })
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
