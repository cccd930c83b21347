//! Labelled sequences: each is a row of steps of any number, with a class or a number that belongs to it as a whole.
//!
//! | `--data` | a sequence is | label |
//! | --- | --- | --- |
//! | table with `--sequence COLUMN --label COLUMN` | all rows of a file with the same value in that column, in the order of the file | the same in all its rows |
//! | `.ts` (UEA archive) | a line | behind the last colon |
//! | other files | a line: label, tab, text | before the first tab |
//!
//! **Scale.** Each feature has one affine map, `(x - mean) / std`, fitted on the known values of the training part; so has a label that is a number.
//! Blanks take the feature's last known value in the sequence, or its mean where there is none.
//!
//! **Parts.** Files may name their parts. What is cut, is cut at random by the seed, each class by itself, so that all parts have all classes.

use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::error::DataError;
use super::grouping::Grouping;
use super::series::{Missing, Order, Part};
use super::source::{Source, Sources};
use super::split::Split;
use super::table::{Kind, Table};
use super::text::{Encoding, decode};
use super::vocab::{Level, Vocab};
use super::{Batch, Batches, Input, Target, ts};
use crate::rng::{Purpose, StepKey, Stream};

/// What a label is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    Class,
    Number,
}

/// How labelled sequences are read.
#[derive(Clone, Debug)]
pub struct SequencesOptions {
    pub goal: Goal,
    /// The column that tells sequences of a table apart; none: the data are no table.
    pub sequence: Option<String>,
    /// The column of labels.
    pub label: Option<String>,
    /// Columns to read; empty: all columns of numbers.
    pub features: Vec<String>,
    pub missing: Missing,
    /// What a token of a text is.
    pub level: Level,
    pub encoding: Encoding,
    /// Most entries of the vocabulary.
    pub vocab_limit: Option<usize>,
    pub split: Split,
    /// Of the split.
    pub seed: u64,
}

/// A feature, or a label that is a number, with its scale.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scaled {
    pub name: String,
    /// Mean of the training part, in the unit.
    pub mean: f64,
    /// Standard deviation of the training part, in the unit; 1 for a constant.
    pub std: f64,
}

/// How the files are written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    Table { sequence: String, label: String },
    Ts,
    Lines,
}

/// What goes in at each step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StepSpec {
    Features(Vec<Scaled>),
    Tokens(Vocab),
}

/// What a label can be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LabelSpec {
    /// In the order of their numbers.
    Classes(Vec<Class>),
    Number(Scaled),
}

/// A class and how often the training part has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Class {
    pub name: String,
    pub count: u64,
}

/// All that a trained model needs to read other files as it read its own: kept in the run folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SequencesSpec {
    pub form: Form,
    pub missing: Missing,
    pub step: StepSpec,
    pub label: LabelSpec,
}

/// A sequence as read, before any scale.
pub struct Raw {
    pub file: String,
    /// Where it begins, from 1.
    pub line: u64,
    /// What it is called.
    pub name: String,
    pub label: String,
    pub cells: Cells,
}

/// The steps of a sequence as read.
pub enum Cells {
    /// `[n, I]`, none where blank.
    Values(Vec<Option<f64>>),
    Text(String),
}

/// The files of the parts, read.
struct Read {
    raws: Vec<Raw>,
    /// Sequences of the files for training, and for validation, where files name their parts.
    files: Option<(usize, usize)>,
    features: Vec<String>,
    classes: Option<Vec<String>>,
    form: Form,
}

/// The steps of all sequences, one after the other.
#[derive(Debug)]
enum Steps {
    /// `[N, I]`, normalised.
    Values(Vec<f32>),
    Tokens(Vec<u32>),
}

/// Labels of all sequences.
#[derive(Debug)]
enum Labels {
    Classes(Vec<u32>),
    /// In the unit.
    Numbers(Vec<f64>),
}

/// Labelled sequences in memory.
#[derive(Debug)]
pub struct Sequences {
    spec: SequencesSpec,
    name: String,
    steps: Steps,
    /// First step of each sequence, and the end of the last.
    starts: Vec<usize>,
    labels: Labels,
    names: Vec<String>,
    parts: Vec<Part>,
    warnings: Vec<String>,
}

impl Sequences {
    /// Reads what `--data` names, cuts it, fits the scale on the training part.
    ///
    /// # Errors
    /// Files that cannot be read or hold something wrong (the file and the line), columns that do not exist, a training part of nothing.
    pub fn load(data: &[String], options: &SequencesOptions) -> Result<Self, DataError> {
        Self::from_sources(Sources::read(data)?, options)
    }

    /// As [`Sequences::load`], of sources in memory.
    ///
    /// # Errors
    /// As [`Sequences::load`].
    pub fn from_sources(sources: Sources, options: &SequencesOptions) -> Result<Self, DataError> {
        let read = read(sources, options)?;
        let name = name_of(&read.raws);
        let numbers =
            (options.goal == Goal::Number).then(|| read.raws.iter().map(label_number).collect::<Result<Vec<f64>, _>>()).transpose()?;
        let parts = cut(&read, options);
        let train: Vec<usize> = (0..parts.len()).filter(|&i| parts[i] == Part::Train).collect();
        if train.is_empty() {
            return Err(DataError::TooShort {
                what: format!("the training part of {name}"),
                has: 0,
                unit: "sequences",
                needs: 1,
                purpose: "training".to_string(),
                remedy: "raise the training fraction of --split, or give more data".to_string(),
            });
        }
        let step = match &read.raws[0].cells {
            Cells::Text(_) => StepSpec::Tokens(vocabulary(&read.raws, &train, options)?),
            Cells::Values(_) => StepSpec::Features(scales(&read, &train)),
        };
        let label = match &numbers {
            Some(numbers) => {
                let (mean, std) = moments(train.iter().map(|&i| numbers[i]));
                LabelSpec::Number(Scaled { name: options.label.clone().unwrap_or_else(|| "label".to_string()), mean, std })
            }
            None => {
                let labels = || train.iter().map(|&i| &read.raws[i].label);
                let names = read.classes.clone().unwrap_or_else(|| classes_of(labels()));
                let count = |name: &String| labels().filter(|label| *label == name).count() as u64;
                LabelSpec::Classes(names.into_iter().map(|name| Class { count: count(&name), name }).collect())
            }
        };
        if let LabelSpec::Classes(classes) = &label
            && classes.len() < 2
        {
            return Err(DataError::Column {
                file: name,
                column: options.label.clone().unwrap_or_else(|| "label".to_string()),
                problem: format!("the training part has one class only, '{}'", shorten(classes)),
                remedy: "give data with at least two, or use --task regress for numbers".to_string(),
            });
        }
        let spec = SequencesSpec { form: read.form, missing: options.missing, step, label };
        Self::encode(spec, name, &read.raws, parts)
    }

    /// Reads other files as the run read its own: same columns, scale and classes. All sequences are one part ([`Part::All`]).
    ///
    /// # Errors
    /// As [`Sequences::load`]; a class, a column or a character that the run does not know.
    pub fn load_with(data: &[String], spec: &SequencesSpec, encoding: Encoding) -> Result<Self, DataError> {
        Self::from_held_out(Sources::read(data)?.into_held_out(), spec, encoding)
    }

    /// As [`Sequences::load_with`], of sources in memory.
    ///
    /// # Errors
    /// As [`Sequences::load_with`].
    pub fn from_held_out(sources: Vec<Source>, spec: &SequencesSpec, encoding: Encoding) -> Result<Self, DataError> {
        let (sequence, label) = match &spec.form {
            Form::Table { sequence, label } => (Some(sequence.clone()), Some(label.clone())),
            Form::Ts | Form::Lines => (None, None),
        };
        let features = match &spec.step {
            StepSpec::Features(features) if sequence.is_some() => features.iter().map(|feature| feature.name.clone()).collect(),
            _ => Vec::new(),
        };
        let options = SequencesOptions {
            goal: if matches!(spec.label, LabelSpec::Number(_)) { Goal::Number } else { Goal::Class },
            sequence,
            label,
            features,
            missing: spec.missing,
            level: Level::Char,
            encoding,
            vocab_limit: None,
            split: Split::default(),
            seed: 0,
        };
        let read = read(Sources::Whole(sources), &options)?;
        if read.form != spec.form {
            return Err(DataError::Source {
                given: name_of(&read.raws),
                problem: "the run was trained on files of another form".to_string(),
                remedy: "give files like those of the run".to_string(),
            });
        }
        if let StepSpec::Features(features) = &spec.step
            && features.len() != read.features.len()
        {
            return Err(DataError::Source {
                given: name_of(&read.raws),
                problem: format!("it has {} numbers a step, the run reads {}", read.features.len(), features.len()),
                remedy: "give files like those of the run".to_string(),
            });
        }
        let parts = vec![Part::All; read.raws.len()];
        Self::encode(spec.clone(), name_of(&read.raws), &read.raws, parts)
    }

    /// Numbers for everything that was read.
    fn encode(spec: SequencesSpec, name: String, raws: &[Raw], parts: Vec<Part>) -> Result<Self, DataError> {
        let labels = match &spec.label {
            LabelSpec::Number(_) => Labels::Numbers(raws.iter().map(label_number).collect::<Result<_, _>>()?),
            LabelSpec::Classes(classes) => {
                let index: HashMap<&str, u32> = classes.iter().enumerate().map(|(i, class)| (class.name.as_str(), i as u32)).collect();
                let class = |raw: &Raw| {
                    index.get(raw.label.as_str()).copied().ok_or_else(|| {
                        let problem = format!("the training part has no class '{}'; it has {}", raw.label, shorten(classes));
                        raw.wrong(problem, "correct the label, or train on data with that class")
                    })
                };
                Labels::Classes(raws.iter().map(class).collect::<Result<_, _>>()?)
            }
        };
        let mut starts = vec![0];
        let mut n_blanks = 0;
        let steps = match &spec.step {
            StepSpec::Tokens(vocab) => {
                let mut tokens = Vec::new();
                for raw in raws {
                    let Cells::Text(text) = &raw.cells else { continue };
                    tokens.extend(vocab.encode_line(&format!("{}, line {}", raw.file, raw.line), text)?);
                    starts.push(tokens.len());
                }
                Steps::Tokens(tokens)
            }
            StepSpec::Features(features) => {
                let mut values = Vec::new();
                for raw in raws {
                    let Cells::Values(cells) = &raw.cells else { continue };
                    // Normalised, a feature's mean is 0.
                    let mut last = vec![0.0; features.len()];
                    for row in cells.chunks_exact(features.len()) {
                        for ((cell, feature), last) in row.iter().zip(features).zip(&mut last) {
                            match cell {
                                Some(value) => *last = ((value - feature.mean) / feature.std) as f32,
                                None if spec.missing == Missing::Refuse => {
                                    let problem = format!("this sequence has a blank in '{}'", feature.name);
                                    return Err(raw.wrong(problem, "fill it, or use --missing fill"));
                                }
                                None => n_blanks += 1,
                            }
                            values.push(*last);
                        }
                    }
                    starts.push(values.len() / features.len());
                }
                Steps::Values(values)
            }
        };
        if let Some(empty) = starts.windows(2).position(|w| w[0] == w[1]) {
            return Err(raws[empty].wrong("this sequence has no step".to_string(), "take it out, or give it one"));
        }
        let warnings = if n_blanks > 0 { vec![format!("{name}: {n_blanks} blanks are filled from the steps before")] } else { Vec::new() };
        let names = raws.iter().map(|raw| raw.name.clone()).collect();
        Ok(Self { spec, name, steps, starts, labels, names, parts, warnings })
    }

    /// How the data were read, for the run folder.
    pub fn spec(&self) -> &SequencesSpec {
        &self.spec
    }

    /// The first file's name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What a person should know.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Sequences of all parts.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// What sequence `i` is called: its value in the column of sequences, or its place in its file, from 1.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn sequence_name(&self, i: usize) -> &str {
        &self.names[i]
    }

    /// Steps of sequence `i`.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn length(&self, i: usize) -> usize {
        self.starts[i + 1] - self.starts[i]
    }

    /// The sequences of a part, in the order of the files.
    pub fn of_part(&self, part: Part) -> Vec<u32> {
        (0..self.len()).filter(|&i| part == Part::All || self.parts[i] == part).map(|i| i as u32).collect()
    }

    /// The class of sequence `i`, where labels are classes.
    pub fn class(&self, i: usize) -> Option<u32> {
        match &self.labels {
            Labels::Classes(classes) => classes.get(i).copied(),
            Labels::Numbers(_) => None,
        }
    }

    /// The label of sequence `i` in its unit, where labels are numbers.
    pub fn number(&self, i: usize) -> Option<f64> {
        match &self.labels {
            Labels::Numbers(numbers) => numbers.get(i).copied(),
            Labels::Classes(_) => None,
        }
    }

    /// All that the data consist of, as numbers, for a hash.
    pub fn words(&self) -> impl Iterator<Item = u64> {
        let steps: Box<dyn Iterator<Item = u64>> = match &self.steps {
            Steps::Values(values) => Box::new(values.iter().map(|v| u64::from(v.to_bits()))),
            Steps::Tokens(tokens) => Box::new(tokens.iter().map(|&t| u64::from(t))),
        };
        let labels: Box<dyn Iterator<Item = u64>> = match &self.labels {
            Labels::Classes(classes) => Box::new(classes.iter().map(|&c| u64::from(c))),
            Labels::Numbers(numbers) => Box::new(numbers.iter().map(|n| n.to_bits())),
        };
        let parts = self.parts.iter().map(|&part| part as u64);
        self.starts.iter().map(|&start| start as u64).chain(parts).chain(labels).chain(steps)
    }

    /// The batch of these sequences, as long as the longest of them, the others filled up with zeros.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn batch_of(&self, sequences: &[u32]) -> Batch {
        let lengths: Vec<u32> = sequences.iter().map(|&i| self.length(i as usize) as u32).collect();
        let (t, b) = (lengths.iter().copied().max().unwrap_or(0) as usize, sequences.len());
        let input = match (&self.steps, &self.spec.step) {
            (Steps::Values(values), StepSpec::Features(features)) => {
                Input::Values { values: self.time_major(values, sequences, t, features.len(), 0.0), n_features: features.len() }
            }
            (Steps::Values(values), StepSpec::Tokens(_)) => Input::Values { values: values.clone(), n_features: 0 },
            (Steps::Tokens(tokens), _) => Input::Tokens(self.time_major(tokens, sequences, t, 1, 0)),
        };
        let target = match (&self.labels, &self.spec.label) {
            (Labels::Numbers(numbers), LabelSpec::Number(scale)) => {
                let values = sequences.iter().map(|&i| ((numbers[i as usize] - scale.mean) / scale.std) as f32).collect();
                Target::Values { values, n_outputs: 1 }
            }
            (Labels::Numbers(_), LabelSpec::Classes(_)) => Target::Values { values: Vec::new(), n_outputs: 1 },
            (Labels::Classes(classes), _) => Target::Labels(sequences.iter().map(|&i| classes[i as usize]).collect()),
        };
        Batch::of_sequences(t, input, target, vec![1.0; b], sequences.to_vec(), lengths)
    }

    fn time_major<T: Copy>(&self, all: &[T], sequences: &[u32], n_steps: usize, width: usize, zero: T) -> Vec<T> {
        let mut out = vec![zero; n_steps * sequences.len() * width];
        for (row, &i) in sequences.iter().enumerate() {
            for t in 0..self.length(i as usize) {
                let from = (self.starts[i as usize] + t) * width;
                out[(t * sequences.len() + row) * width..][..width].copy_from_slice(&all[from..from + width]);
            }
        }
        out
    }
}

impl Raw {
    fn wrong(&self, problem: String, remedy: &str) -> DataError {
        DataError::Line { file: self.file.clone(), line: self.line, problem, remedy: remedy.to_string() }
    }
}

fn name_of(raws: &[Raw]) -> String {
    raws.first().map_or_else(|| "--data".to_string(), |raw| raw.file.clone())
}

fn label_number(raw: &Raw) -> Result<f64, DataError> {
    raw.label
        .trim()
        .parse()
        .ok()
        .filter(|value: &f64| value.is_finite())
        .ok_or_else(|| raw.wrong(format!("the label '{}' is not a number", raw.label), "correct it, or use --task classify for classes"))
}

fn shorten(classes: &[Class]) -> String {
    let names = classes.iter().take(10).map(|class| class.name.as_str()).collect::<Vec<_>>().join(", ");
    if classes.len() <= 10 { names } else { format!("{names} and {} more", classes.len() - 10) }
}

/// Mean and standard deviation; 0 and 1 for nothing, 1 for a constant.
fn moments(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = values.clone().count() as f64;
    if n == 0.0 {
        return (0.0, 1.0);
    }
    let mean = values.clone().sum::<f64>() / n;
    let std = (values.map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt();
    // What rounding leaves of a constant is no deviation.
    (mean, if std > 1e-12 * mean.abs().max(f64::MIN_POSITIVE) { std } else { 1.0 })
}

/// Numbers by size, others by the alphabet.
fn classes_of<'a>(labels: impl Iterator<Item = &'a String>) -> Vec<String> {
    let mut classes: Vec<String> = labels.cloned().collect();
    classes.sort();
    classes.dedup();
    let numbers: Option<Vec<f64>> = classes.iter().map(|class| class.parse().ok()).collect();
    if let Some(numbers) = numbers {
        let mut order: Vec<usize> = (0..classes.len()).collect();
        order.sort_by(|&a, &b| numbers[a].total_cmp(&numbers[b]));
        classes = order.into_iter().map(|i| classes[i].clone()).collect();
    }
    classes
}

fn scales(read: &Read, train: &[usize]) -> Vec<Scaled> {
    let n = read.features.len();
    let of = |(c, name): (usize, &String)| {
        let known = train.iter().flat_map(|&i| {
            match &read.raws[i].cells {
                Cells::Values(cells) => cells.as_slice(),
                Cells::Text(_) => &[],
            }
            .iter()
            .skip(c)
            .step_by(n)
            .filter_map(|cell| *cell)
        });
        let (mean, std) = moments(known);
        Scaled { name: name.clone(), mean, std }
    };
    read.features.iter().enumerate().map(of).collect()
}

/// As for a running text: characters of all parts, words of the training part.
fn vocabulary(raws: &[Raw], train: &[usize], options: &SequencesOptions) -> Result<Vocab, DataError> {
    let text = |raw: &Raw| match &raw.cells {
        Cells::Text(text) => text.clone(),
        Cells::Values(_) => String::new(),
    };
    match options.level {
        Level::Byte => Ok(Vocab::bytes()),
        Level::Char => Vocab::chars(&raws.iter().map(text).collect::<String>(), options.vocab_limit),
        Level::Word => {
            let lines: Vec<String> = train.iter().map(|&i| text(&raws[i])).collect();
            Vocab::words(lines.iter().flat_map(|line| line.split_whitespace()), options.vocab_limit)
        }
    }
}

/// The part of each sequence.
fn cut(read: &Read, options: &SequencesOptions) -> Vec<Part> {
    let n = read.raws.len();
    // What is still to be cut, and where validation and the test begin in it.
    let (pool, fractions) = match read.files {
        None => (n, options.split),
        Some((train, 0)) => {
            let share = options.split.valid_of_rest();
            (train, Split { train: 1.0 - share, valid: share, test: 0.0 })
        }
        Some((train, _)) => (train, Split { train: 1.0, valid: 0.0, test: 0.0 }),
    };
    let mut parts: Vec<Part> = match read.files {
        None => vec![Part::Train; n],
        Some((train, valid)) => (0..n)
            .map(|i| {
                if i < train {
                    Part::Train
                } else if i < train + valid {
                    Part::Valid
                } else {
                    Part::Test
                }
            })
            .collect(),
    };
    let mut classes: Vec<&str> =
        if options.goal == Goal::Class { read.raws[..pool].iter().map(|raw| raw.label.as_str()).collect() } else { vec![""] };
    classes.sort_unstable();
    classes.dedup();
    for (c, class) in classes.into_iter().enumerate() {
        let mut of_class: Vec<usize> = (0..pool).filter(|&i| options.goal == Goal::Number || read.raws[i].label == class).collect();
        Stream::new(StepKey::new(options.seed, 0), Purpose::Split, c as u32, 0).shuffle(&mut of_class);
        let (valid, test) = fractions.cuts(of_class.len());
        of_class.iter().enumerate().skip(valid).for_each(|(place, &i)| parts[i] = if place < test { Part::Valid } else { Part::Test });
    }
    parts
}

fn read(sources: Sources, options: &SequencesOptions) -> Result<Read, DataError> {
    let (sources, n_files) = match sources {
        Sources::Whole(all) => (all, None),
        Sources::Parts { train, valid, test } => {
            let n = (train.len(), valid.len());
            (train.into_iter().chain(valid).chain(test).collect::<Vec<_>>(), Some(n))
        }
    };
    let ends = |source: &Source, end: &str| source.name.to_lowercase().ends_with(end);
    let of_table = sources.iter().any(|source| ends(source, ".csv"));
    if let (false, Some(column)) = (options.sequence.is_some(), options.label.as_ref().or(options.features.first())) {
        let problem = "a column is named, but not which column tells sequences apart".to_string();
        let remedy = "name it with --sequence COLUMN (a .ts file or lines of label, tab, text have no columns)".to_string();
        return Err(DataError::Option { name: "--label or --features", value: column.clone(), problem, remedy });
    }
    if options.sequence.is_none() && of_table {
        let given = sources.first().map_or_else(String::new, |source| source.name.clone());
        let problem = "a table of sequences needs a column that tells them apart and one of labels".to_string();
        return Err(DataError::Source { given, problem, remedy: "name them with --sequence COLUMN --label COLUMN".to_string() });
    }
    if let Some(sequence) = &options.sequence {
        let Some(label) = &options.label else {
            let (problem, remedy) = ("the column of labels is not named".to_string(), "name it with --label COLUMN".to_string());
            return Err(DataError::Option { name: "--sequence", value: sequence.clone(), problem, remedy });
        };
        return read_table(&sources, n_files, sequence, label, options);
    }
    let mut raws = Vec::new();
    let mut counts = Vec::with_capacity(sources.len());
    let (mut features, mut classes) = (Vec::new(), None);
    let is_ts = sources.iter().all(|source| ends(source, ".ts"));
    if !is_ts && sources.iter().any(|source| ends(source, ".ts")) {
        return Err(DataError::Source {
            given: sources.iter().map(|source| source.name.clone()).collect::<Vec<_>>().join(", "),
            problem: ".ts files and others are mixed".to_string(),
            remedy: "give files of one form".to_string(),
        });
    }
    for source in &sources {
        let before = raws.len();
        if is_ts {
            let file = ts::read(source)?;
            let names: Vec<String> = (1..=file.n_features).map(|d| format!("dimension{d}")).collect();
            if !features.is_empty() && features != names {
                return Err(DataError::Source {
                    given: source.name.clone(),
                    problem: format!("{} dimensions, but the file before has {}", names.len(), features.len()),
                    remedy: "files that are read together need the same dimensions".to_string(),
                });
            }
            features = names;
            if classes.is_none() {
                classes = file.classes.filter(|classes| !classes.is_empty());
            }
            raws.extend(file.sequences);
        } else {
            raws.extend(read_lines(source, options.encoding)?);
        }
        counts.push(raws.len() - before);
    }
    let form = if is_ts { Form::Ts } else { Form::Lines };
    Ok(Read { raws, files: of_files(n_files, &counts), features, classes, form })
}

/// Sequences of the files for training and for validation.
fn of_files(n_files: Option<(usize, usize)>, counts: &[usize]) -> Option<(usize, usize)> {
    n_files.map(|(train, valid)| (counts[..train].iter().sum(), counts[train..train + valid].iter().sum()))
}

/// Lines of label, tab, text.
fn read_lines(source: &Source, encoding: Encoding) -> Result<Vec<Raw>, DataError> {
    let text = decode(source, encoding)?;
    let mut raws = Vec::new();
    for (idx, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let number = idx as u64 + 1;
        let Some((label, text)) = line.split_once('\t') else {
            return Err(DataError::Line {
                file: source.name.clone(),
                line: number,
                problem: "there is no tab between label and text".to_string(),
                remedy: "write a label, a tab and the text on each line (tables need --sequence, UEA files end in .ts)".to_string(),
            });
        };
        let (label, name) = (label.trim().to_string(), (raws.len() + 1).to_string());
        raws.push(Raw { file: source.name.clone(), line: number, name, label, cells: Cells::Text(text.trim().to_string()) });
    }
    if raws.is_empty() {
        return Err(DataError::Empty { file: source.name.clone(), wanted: "lines of label, tab, text".to_string() });
    }
    Ok(raws)
}

fn read_table(
    sources: &[Source],
    n_files: Option<(usize, usize)>,
    sequence: &str,
    label: &str,
    options: &SequencesOptions,
) -> Result<Read, DataError> {
    let table = Table::read(sources)?;
    let (by, labelled) = (table.find("--sequence", sequence)?, table.find("--label", label)?);
    let columns: Vec<usize> = if options.features.is_empty() {
        let usable = |c: usize| c != by && c != labelled && matches!(table.kind(c), Kind::Numbers | Kind::Flags);
        (0..table.columns.len()).filter(|&c| usable(c)).collect()
    } else {
        options.features.iter().map(|name| table.find("--features", name)).collect::<Result<_, _>>()?
    };
    if columns.is_empty() || columns.contains(&labelled) {
        let problem =
            if columns.is_empty() { "there is no column of numbers to read" } else { "it is the label, so it cannot be read too" };
        return Err(DataError::Column {
            file: table.name.clone(),
            column: table.columns[labelled].clone(),
            problem: problem.to_string(),
            remedy: "name other columns with --features".to_string(),
        });
    }
    let values = columns.iter().map(|&c| table.numbers(c)).collect::<Result<Vec<_>, _>>()?;
    if options.missing == Missing::Refuse
        && let Some((row, c)) =
            (0..table.n_rows()).flat_map(|row| (0..columns.len()).map(move |c| (row, c))).find(|&(row, c)| values[c][row].is_none())
    {
        return Err(table.cell_error(row, columns[c], "the cell is blank".to_string(), "fill it, or use --missing fill"));
    }
    let (names, labels): (Vec<&str>, Vec<&str>) = (table.cells(by).collect(), table.cells(labelled).collect());
    let mut raws: Vec<Raw> = Vec::new();
    let mut counts = Vec::with_capacity(sources.len());
    let mut row = 0;
    for (source, &n_rows) in sources.iter().zip(&table.file_rows) {
        // A name means a sequence of its file.
        let (mut places, before) = (HashMap::<&str, usize>::new(), raws.len());
        for at in row..row + n_rows {
            if names[at].is_empty() || labels[at].is_empty() {
                let c = if names[at].is_empty() { by } else { labelled };
                return Err(table.cell_error(at, c, "the cell is blank".to_string(), "every row needs its sequence and its label"));
            }
            let place = *places.entry(names[at]).or_insert_with(|| {
                let (name, label) = (names[at].to_string(), labels[at].to_string());
                raws.push(Raw { file: source.name.clone(), line: table.line(at), name, label, cells: Cells::Values(Vec::new()) });
                raws.len() - 1
            });
            let raw = &mut raws[place];
            if raw.label != labels[at] {
                let problem = format!("'{}', but sequence {} has the label '{}' in line {}", labels[at], raw.name, raw.label, raw.line);
                return Err(table.cell_error(at, labelled, problem, "give all rows of a sequence the same label"));
            }
            if let Cells::Values(cells) = &mut raw.cells {
                cells.extend(values.iter().map(|column| column[at]));
            }
        }
        counts.push(raws.len() - before);
        row += n_rows;
    }
    let features = columns.iter().map(|&c| table.columns[c].clone()).collect();
    let form = Form::Table { sequence: table.columns[by].clone(), label: table.columns[labelled].clone() };
    Ok(Read { raws, files: of_files(n_files, &counts), features, classes: None, form })
}

/// Sequences of a part in batches of like length; see [`Grouping`].
#[derive(Debug)]
pub struct SequenceBatches {
    sequences: Arc<Sequences>,
    of_part: Vec<u32>,
    grouping: Grouping,
}

impl SequenceBatches {
    /// # Errors
    /// [`DataError::Option`] for a batch of nothing. A part may be empty.
    pub fn new(sequences: Arc<Sequences>, part: Part, batch_size: usize, order: Order) -> Result<Self, DataError> {
        if batch_size == 0 {
            return Err(DataError::Option {
                name: "--batch-size",
                value: "0".to_string(),
                problem: "nothing would be read".to_string(),
                remedy: "give a number from 1".to_string(),
            });
        }
        let of_part = sequences.of_part(part);
        let lengths = of_part.iter().map(|&i| sequences.length(i as usize) as u32).collect();
        Ok(Self { sequences, of_part, grouping: Grouping::new(lengths, batch_size, order) })
    }

    /// The sequences of the part, in the order of the files.
    pub fn of_part(&self) -> &[u32] {
        &self.of_part
    }
}

impl Batches for SequenceBatches {
    fn n_batches(&self) -> u64 {
        self.grouping.n_batches() as u64
    }

    fn batch(&self, epoch: u64, idx: u64) -> Batch {
        assert!(idx < self.n_batches(), "batch {idx} of {}", self.n_batches());
        let rows: Vec<u32> = self.grouping.batch(epoch, idx as usize).into_iter().map(|i| self.of_part[i as usize]).collect();
        self.sequences.batch_of(&rows)
    }

    fn largest(&self) -> (usize, usize) {
        self.grouping.largest()
    }
}
