//! Labelled sequences: each is a row of steps of any number, with a class or a number that belongs to it as a whole, a class for each step, or
//! frames of notes of which the next is to be told.
//!
//! | `--data` | a sequence is | label |
//! | --- | --- | --- |
//! | table with `--sequence COLUMN --label COLUMN` | all rows of a file with the same value in that column, in the order of the file | the same in all its rows; for tags each row's own |
//! | `.ts` (UEA archive) | a line | behind the last colon |
//! | frames | a line, a piece: frames with blanks between, each its notes with commas between, `-` for silence | the frame after each |
//! | `builtin:adding-T` | two numbers a step, drawn | see [`Sequences::adding`] |
//! | JSON lines or Parquet without `--sequence` | a [record](super::records) | its key `label`, or the one that `--label` names |
//! | other files | a line: label, tab, text | before the first tab |
//!
//! **Scale.** Each feature has one affine map, `(x - mean) / std`, fitted on the known values of the training part; so has a label that is a number.
//! Blanks take the feature's last known value in the sequence, or its mean where there is none.
//!
//! **Weights.** Classes may weigh unlike: a term counts as much as its true class does, in training and in what is reported.
//!
//! **Parts.** Files may name their parts. What is cut, is cut at random by the seed, each class by itself, so that all parts have all classes.

use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::error::DataError;
use super::grouping::Grouping;
use super::records;
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
    /// A class for each step.
    Tags,
    /// The next frame of notes at each step.
    Frames,
}

/// How much classes count.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ClassWeights {
    /// In inverse proportion to how often the training part has them: all terms of the training part weigh as much as they are many.
    Balanced,
    /// One number a class, in their order.
    Each(Vec<f64>),
}

impl std::str::FromStr for ClassWeights {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "balanced" {
            return Ok(Self::Balanced);
        }
        let weight = |part: &str| part.trim().parse().ok().filter(|weight: &f64| weight.is_finite() && *weight >= 0.0);
        let weights = text.split(',').map(|part| weight(part).ok_or_else(|| format!("'{part}' is no weight of 0 or more")));
        let weights =
            weights.collect::<Result<Vec<f64>, String>>().map_err(|e| format!("{e}; write balanced, or a number for each class"))?;
        if weights.iter().all(|&weight| weight == 0.0) { Err("all weights are 0".to_owned()) } else { Ok(Self::Each(weights)) }
    }
}

impl TryFrom<String> for ClassWeights {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<ClassWeights> for String {
    fn from(weights: ClassWeights) -> Self {
        match weights {
            ClassWeights::Balanced => "balanced".to_owned(),
            ClassWeights::Each(weights) => weights.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
        }
    }
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
    /// The key of the text in records; none: `text`.
    pub text: Option<String>,
    pub missing: Missing,
    /// What a token of a text is.
    pub level: Level,
    pub encoding: Encoding,
    /// Most entries of the vocabulary.
    pub vocab_limit: Option<usize>,
    /// None: all classes weigh 1.
    pub class_weights: Option<ClassWeights>,
    /// Notes of a frame, numbered from 0.
    pub notes: usize,
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
    Table {
        sequence: String,
        label: String,
    },
    Ts,
    Lines,
    Frames,
    Drawn,
    /// Keys, where they were named.
    Records {
        label: Option<String>,
        text: Option<String>,
    },
}

impl Form {
    /// What such files are called.
    fn files(&self) -> String {
        match self {
            Self::Table { sequence, .. } => format!("tables with a column '{sequence}'"),
            Self::Ts => ".ts files".to_string(),
            Self::Lines => "lines of label, tab, text".to_string(),
            Self::Frames => "a piece a line".to_string(),
            Self::Drawn => "built-in ones".to_string(),
            Self::Records { .. } => "JSON lines or Parquet with a sequence a record".to_string(),
        }
    }
}

/// What goes in at each step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StepSpec {
    Features(Vec<Scaled>),
    Tokens(Vocab),
    /// So many notes, each 1 where it sounds.
    Notes(usize),
}

/// What a label can be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LabelSpec {
    /// In the order of their numbers.
    Classes(Vec<Class>),
    Number(Scaled),
    /// Of each step.
    Tags(Vec<Class>),
    /// The next frame; how often each note sounds in the training part, as a share of its frames.
    Frames(Vec<f64>),
}

/// A class and how often the training part has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Class {
    pub name: String,
    pub count: u64,
    /// Of a term whose true class this is.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

fn is_one(weight: &f64) -> bool {
    *weight == 1.0
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
    /// Empty where there is none, or one for each step.
    pub label: String,
    /// Of each step, where each has one.
    pub tags: Vec<String>,
    pub cells: Cells,
}

/// The steps of a sequence as read.
pub enum Cells {
    /// `[n, I]`, none where blank.
    Values(Vec<Option<f64>>),
    Text(String),
    /// The notes of each frame, rising.
    Frames(Vec<Vec<u16>>),
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
    /// Of all frames, one more a sequence than it has steps.
    Frames(Vec<Vec<u16>>),
}

/// Labels of all sequences; none where a file does not say.
#[derive(Debug)]
enum Labels {
    Classes(Vec<Option<u32>>),
    /// In the unit.
    Numbers(Vec<Option<f64>>),
    /// Of each step.
    Tags(Vec<Option<u32>>),
    /// The frames themselves.
    Frames,
}

/// Labelled sequences in memory.
#[derive(Debug)]
pub struct Sequences {
    spec: SequencesSpec,
    name: String,
    steps: Steps,
    /// First step (or frame) of each sequence, and the end of the last.
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
        if let [given] = data
            && let Some(n_steps) = drawn(given)
        {
            return Self::adding(n_steps?, options.seed, ADDING);
        }
        Self::from_sources(Sources::find(data)?, options)
    }

    /// As [`Sequences::load`], of sources in memory.
    ///
    /// # Errors
    /// As [`Sequences::load`].
    pub fn from_sources(sources: Sources, options: &SequencesOptions) -> Result<Self, DataError> {
        let read = read(sources, options, Labelled::All)?;
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
        let is_text = matches!(read.raws[0].cells, Cells::Text(_));
        let level = (options.level != Level::Char).then(|| ("--level", format!("{:?}", options.level).to_lowercase()));
        let of_tokens = options.vocab_limit.map(|limit| ("--vocab", limit.to_string())).or(level);
        if let (false, Some((flag, value))) = (is_text, of_tokens) {
            let problem = format!("means nothing for {name}, whose sequences consist of numbers");
            return Err(DataError::Option { name: flag, value, problem, remedy: "leave it out".to_string() });
        }
        let step = match &read.raws[0].cells {
            Cells::Text(_) => StepSpec::Tokens(vocabulary(&read.raws, &train, options)?),
            Cells::Values(_) => StepSpec::Features(scales(&read, &train)),
            Cells::Frames(_) => StepSpec::Notes(options.notes),
        };
        let label_name = || options.label.clone().unwrap_or_else(|| "label".to_string());
        let label = match (options.goal, &numbers) {
            (Goal::Number, Some(numbers)) => {
                let (mean, std) = moments(train.iter().map(|&i| numbers[i]));
                LabelSpec::Number(Scaled { name: label_name(), mean, std })
            }
            (Goal::Tags, _) => LabelSpec::Tags(classes(train.iter().flat_map(|&i| &read.raws[i].tags), None, &name, options)?),
            (Goal::Frames, _) => LabelSpec::Frames(frequency(&read.raws, &train, options.notes)),
            _ => {
                let labels = train.iter().map(|&i| &read.raws[i].label);
                LabelSpec::Classes(classes(labels, read.classes.clone(), &name, options)?)
            }
        };
        let spec = SequencesSpec { form: read.form, missing: options.missing, step, label };
        Self::encode(spec, name, &read.raws, parts, Labelled::All)
    }

    /// Reads other files as the run read its own: same columns, scale and classes. All sequences are one part ([`Part::All`]).
    ///
    /// # Errors
    /// As [`Sequences::load`]; a column or a character that the run does not know, and, where all must be labelled, a class.
    pub fn load_with(data: &[String], spec: &SequencesSpec, encoding: Encoding, labelled: Labelled) -> Result<Self, DataError> {
        if let (Form::Drawn, [given]) = (&spec.form, data)
            && let Some(n_steps) = drawn(given)
        {
            // Other sequences than those of the run.
            return Self::adding(n_steps?, HELD_OUT, [0, 0, ADDING[2]]);
        }
        Self::from_held_out(Sources::find(data)?.into_held_out(), spec, encoding, labelled)
    }

    /// As [`Sequences::load_with`], of sources in memory.
    ///
    /// # Errors
    /// As [`Sequences::load_with`].
    pub fn from_held_out(sources: Vec<Source>, spec: &SequencesSpec, encoding: Encoding, labelled: Labelled) -> Result<Self, DataError> {
        let (sequence, label, text) = match &spec.form {
            Form::Table { sequence, label } => (Some(sequence.clone()), Some(label.clone()), None),
            Form::Records { label, text } => (None, label.clone(), text.clone()),
            Form::Ts | Form::Lines | Form::Frames | Form::Drawn => (None, None, None),
        };
        let features = match &spec.step {
            StepSpec::Features(features) if sequence.is_some() => features.iter().map(|feature| feature.name.clone()).collect(),
            _ => Vec::new(),
        };
        let options = SequencesOptions {
            goal: match &spec.label {
                LabelSpec::Number(_) => Goal::Number,
                LabelSpec::Classes(_) => Goal::Class,
                LabelSpec::Tags(_) => Goal::Tags,
                LabelSpec::Frames(_) => Goal::Frames,
            },
            sequence,
            label,
            features,
            text,
            missing: spec.missing,
            level: Level::Char,
            encoding,
            vocab_limit: None,
            class_weights: None,
            notes: if let StepSpec::Notes(n) = spec.step { n } else { 0 },
            split: Split::default(),
            seed: 0,
        };
        let another_form = |given: String| DataError::Source {
            given,
            problem: "the run was trained on files of another form".to_string(),
            remedy: format!("give files like those of the run, {}", spec.form.files()),
        };
        // By their names, before their first line is found to be wrong.
        for source in &sources {
            let (is_ts, is_table) = (ts::is_one(source)?, source.is_named(&[".csv", ".tsv"]));
            let is_other = match &spec.form {
                Form::Ts => !is_ts,
                Form::Table { .. } => is_ts,
                Form::Lines | Form::Frames => is_ts || is_table,
                Form::Drawn | Form::Records { .. } => false,
            };
            if is_other {
                return Err(another_form(source.name.clone()));
            }
        }
        let read = read(Sources::Whole(sources), &options, labelled)?;
        if read.form != spec.form {
            return Err(another_form(name_of(&read.raws)));
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
        Self::encode(spec.clone(), name_of(&read.raws), &read.raws, parts, labelled)
    }

    /// Numbers for everything that was read.
    fn encode(spec: SequencesSpec, name: String, raws: &[Raw], parts: Vec<Part>, labelled: Labelled) -> Result<Self, DataError> {
        let class = |classes: &[Class]| {
            let index: HashMap<String, u32> = classes.iter().enumerate().map(|(i, class)| (class.name.clone(), i as u32)).collect();
            let known = if labelled == Labelled::All { Some(shorten(classes)) } else { None };
            move |raw: &Raw, label: &str| match (index.get(label), &known) {
                (Some(&class), _) => Ok(Some(class)),
                (None, None) => Ok(None),
                (None, Some(known)) => {
                    let problem = format!("the training part has no class '{label}'; it has {known}");
                    Err(raw.wrong(problem, "correct the label, or train on data with that class"))
                }
            }
        };
        let labels = match &spec.label {
            LabelSpec::Number(_) => {
                let number = |raw: &Raw| match labelled {
                    Labelled::Some => Ok(label_number(raw).ok()),
                    Labelled::All => label_number(raw).map(Some),
                };
                Labels::Numbers(raws.iter().map(number).collect::<Result<_, _>>()?)
            }
            LabelSpec::Classes(classes) => {
                let class = class(classes);
                Labels::Classes(raws.iter().map(|raw| class(raw, &raw.label)).collect::<Result<_, _>>()?)
            }
            LabelSpec::Tags(classes) => {
                let class = class(classes);
                let tags = raws.iter().flat_map(|raw| raw.tags.iter().map(move |tag| (raw, tag)));
                Labels::Tags(tags.map(|(raw, tag)| class(raw, tag)).collect::<Result<_, _>>()?)
            }
            LabelSpec::Frames(_) => Labels::Frames,
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
            StepSpec::Notes(_) => {
                let mut all = Vec::new();
                for raw in raws {
                    let Cells::Frames(frames) = &raw.cells else { continue };
                    all.extend(frames.iter().cloned());
                    starts.push(all.len());
                }
                Steps::Frames(all)
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
        // The last frame is only ever the one that is to be told.
        self.starts[i + 1] - self.starts[i] - usize::from(matches!(self.steps, Steps::Frames(_)))
    }

    /// The sequences of a part, in the order of the files.
    pub fn of_part(&self, part: Part) -> Vec<u32> {
        (0..self.len()).filter(|&i| part == Part::All || self.parts[i] == part).map(|i| i as u32).collect()
    }

    /// The class of sequence `i`, where labels are classes and its own is known.
    pub fn class(&self, i: usize) -> Option<u32> {
        match &self.labels {
            Labels::Classes(classes) => classes.get(i).copied().flatten(),
            _ => None,
        }
    }

    /// The class of step `t` of sequence `i`, where steps have classes and its own is known.
    pub fn tag(&self, i: usize, t: usize) -> Option<u32> {
        match &self.labels {
            Labels::Tags(tags) => tags.get(self.starts.get(i)? + t).copied().flatten(),
            _ => None,
        }
    }

    /// The notes that follow on step `t` of sequence `i`, where steps are frames.
    pub fn next_frame(&self, i: usize, t: usize) -> &[u16] {
        match &self.steps {
            Steps::Frames(frames) => frames.get(self.starts[i] + t + 1).map_or(&[], Vec::as_slice),
            _ => &[],
        }
    }

    /// The label of sequence `i` in its unit, where labels are numbers and its own is known.
    pub fn number(&self, i: usize) -> Option<f64> {
        match &self.labels {
            Labels::Numbers(numbers) => numbers.get(i).copied().flatten(),
            _ => None,
        }
    }

    /// All that the data consist of, as numbers, for a hash.
    pub fn words(&self) -> impl Iterator<Item = u64> {
        let steps: Box<dyn Iterator<Item = u64>> = match &self.steps {
            Steps::Values(values) => Box::new(values.iter().map(|v| u64::from(v.to_bits()))),
            Steps::Tokens(tokens) => Box::new(tokens.iter().map(|&t| u64::from(t))),
            Steps::Frames(frames) => Box::new(
                frames.iter().flat_map(|frame| std::iter::once(frame.len() as u64).chain(frame.iter().map(|&note| u64::from(note)))),
            ),
        };
        let labels: Box<dyn Iterator<Item = u64>> = match &self.labels {
            Labels::Classes(classes) | Labels::Tags(classes) => Box::new(classes.iter().map(|c| c.map_or(u64::MAX, u64::from))),
            Labels::Numbers(numbers) => Box::new(numbers.iter().map(|n| n.map_or(u64::MAX, f64::to_bits))),
            Labels::Frames => Box::new(std::iter::empty()),
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
            (Steps::Values(values), _) => Input::Values { values: values.clone(), n_features: 0 },
            (Steps::Tokens(tokens), _) => Input::Tokens(self.time_major(tokens, sequences, t, 1, 0)),
            (Steps::Frames(_), _) => Input::Values { values: self.notes(sequences, t, 0), n_features: self.n_notes() },
        };
        let mut weights = vec![1.0; b];
        let target = match (&self.labels, &self.spec.label) {
            (Labels::Numbers(numbers), LabelSpec::Number(scale)) => {
                let known = |&i: &u32| numbers[i as usize].map_or(0.0, |number| ((number - scale.mean) / scale.std) as f32);
                weights = sequences.iter().map(|&i| f32::from(u8::from(numbers[i as usize].is_some()))).collect();
                Target::Values { values: sequences.iter().map(known).collect(), n_outputs: 1 }
            }
            (Labels::Numbers(_), _) => Target::Values { values: Vec::new(), n_outputs: 1 },
            (Labels::Classes(labels), spec) => {
                let weight = |label: Option<u32>| label.map_or(0.0, |label| spec.weight(label));
                weights = sequences.iter().map(|&i| weight(labels[i as usize])).collect();
                Target::Labels(sequences.iter().map(|&i| labels[i as usize].unwrap_or(0)).collect())
            }
            (Labels::Tags(tags), spec) => {
                let tags = self.time_major(tags, sequences, t, 1, None);
                weights = tags.iter().map(|tag| tag.map_or(0.0, |tag| spec.weight(tag))).collect();
                Target::Tokens(tags.into_iter().map(|tag| tag.unwrap_or(0)).collect())
            }
            (Labels::Frames, _) => {
                weights = (0..t * b).map(|at| if at / b < lengths[at % b] as usize { 1.0 } else { 0.0 }).collect();
                Target::Notes { values: self.notes(sequences, t, 1), n_notes: self.n_notes() }
            }
        };
        Batch::of_sequences(t, input, target, weights, sequences.to_vec(), lengths)
    }

    fn n_notes(&self) -> usize {
        if let StepSpec::Notes(n) = self.spec.step { n } else { 0 }
    }

    /// The frames that lie `ahead` of each step, `[T, B, N]`.
    fn notes(&self, sequences: &[u32], n_steps: usize, ahead: usize) -> Vec<f32> {
        let n_notes = self.n_notes();
        let mut out = vec![0.0; n_steps * sequences.len() * n_notes];
        let Steps::Frames(frames) = &self.steps else { return out };
        for (row, &i) in sequences.iter().enumerate() {
            for t in 0..self.length(i as usize) {
                let place = (t * sequences.len() + row) * n_notes;
                for &note in &frames[self.starts[i as usize] + t + ahead] {
                    out[place + usize::from(note)] = 1.0;
                }
            }
        }
        out
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

/// What a file that a model looks at must say of its sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Labelled {
    /// Each has a label that the run knows.
    All,
    /// Some may have none, or another.
    Some,
}

impl LabelSpec {
    /// How much a term of this class weighs.
    fn weight(&self, class: u32) -> f32 {
        match self {
            Self::Classes(classes) | Self::Tags(classes) => classes.get(class as usize).map_or(1.0, |class| class.weight as f32),
            Self::Number(_) | Self::Frames(_) => 1.0,
        }
    }
}

/// Sequences of the adding problem for training, validation and the test.
pub const ADDING: [usize; 3] = [74_000, 256, 2_560];
/// The seed of sequences that no run was trained on.
const HELD_OUT: u64 = u64::MAX;

/// The steps of `builtin:adding-T`; none for other names.
fn drawn(given: &str) -> Option<Result<usize, DataError>> {
    let name = given.strip_prefix("builtin:")?;
    let n_steps = name.strip_prefix("adding-").and_then(|n| n.parse().ok()).filter(|n| (20..=10_000).contains(n));
    Some(n_steps.ok_or_else(|| DataError::Source {
        given: given.to_owned(),
        problem: "there are no such built-in data".to_owned(),
        remedy: "use builtin:adding-T with T from 20 to 10000, as in builtin:adding-100".to_owned(),
    }))
}

impl Sequences {
    /// The adding problem (Hochreiter and Schmidhuber 1997, experiment 4): sequences of T to T + T / 10 steps. Each has a number drawn from -1 to 1
    /// and a mark: -1 for the first and the last step, 1 for one of the first ten steps and for another of the first T / 2 - 1, else 0. The label
    /// is 0.5 + (X1 + X2) / 4 of the two marked numbers; where the first step is marked, X1 is 0. Nothing is scaled.
    ///
    /// # Errors
    /// None of the sizes that a name gives.
    pub fn adding(n_steps: usize, seed: u64, counts: [usize; 3]) -> Result<Self, DataError> {
        let (mut values, mut starts, mut numbers, mut parts) = (Vec::new(), vec![0], Vec::new(), Vec::new());
        let of_parts = [(Part::Train, counts[0]), (Part::Valid, counts[1]), (Part::Test, counts[2])];
        for (part, i) in of_parts.into_iter().flat_map(|(part, n)| (0..n).map(move |i| (part, i))) {
            let mut random = Stream::new(StepKey::new(seed, 1 + part as u64), Purpose::Split, 0, i as u32);
            let length = n_steps + random.below(n_steps as u32 / 10 + 1) as usize;
            let first = random.below(10) as usize;
            // One of those that are left.
            let second = random.below((n_steps / 2 - 2) as u32) as usize;
            let second = second + usize::from(second >= first);
            let begin = values.len();
            for t in 0..length {
                values.push((2.0 * random.uniform_f64() - 1.0) as f32);
                values.push(if t == 0 || t + 1 == length { -1.0 } else { 0.0 });
            }
            let mut sum = 0.0;
            for t in [first, second].into_iter().filter(|&t| t > 0) {
                values[begin + 2 * t + 1] = 1.0;
                sum += f64::from(values[begin + 2 * t]);
            }
            numbers.push(Some(0.5 + sum / 4.0));
            starts.push(values.len() / 2);
            parts.push(if seed == HELD_OUT { Part::All } else { part });
        }
        let plain = |name: &str| Scaled { name: name.to_string(), mean: 0.0, std: 1.0 };
        let spec = SequencesSpec {
            form: Form::Drawn,
            missing: Missing::Fill,
            step: StepSpec::Features(vec![plain("number"), plain("mark")]),
            label: LabelSpec::Number(plain("sum")),
        };
        let names = (1..=numbers.len()).map(|i| i.to_string()).collect();
        let (steps, labels) = (Steps::Values(values), Labels::Numbers(numbers));
        Ok(Self { spec, name: format!("builtin:adding-{n_steps}"), steps, starts, labels, names, parts, warnings: Vec::new() })
    }
}

/// The classes of the labels of the training part, or those that were declared, with their weights.
fn classes<'a>(
    labels: impl Iterator<Item = &'a String> + Clone,
    declared: Option<Vec<String>>,
    name: &str,
    options: &SequencesOptions,
) -> Result<Vec<Class>, DataError> {
    let mut counts: HashMap<&str, u64> = HashMap::new();
    labels.clone().for_each(|label| *counts.entry(label).or_default() += 1);
    let names = declared.unwrap_or_else(|| classes_of(labels));
    let count = |name: &String| counts.get(name.as_str()).copied().unwrap_or(0);
    let mut classes: Vec<Class> = names.into_iter().map(|name| Class { count: count(&name), name, weight: 1.0 }).collect();
    if classes.len() < 2 {
        return Err(DataError::Column {
            file: name.to_string(),
            column: options.label.clone().unwrap_or_else(|| "label".to_string()),
            problem: format!("the training part has one class only, '{}'", shorten(&classes)),
            remedy: "give data with at least two, or use --task regress for numbers".to_string(),
        });
    }
    let n = classes.len();
    match &options.class_weights {
        None => {}
        Some(ClassWeights::Balanced) => {
            let occurring = classes.iter().filter(|class| class.count > 0).count() as f64;
            let all = classes.iter().map(|class| class.count).sum::<u64>() as f64;
            classes.iter_mut().filter(|class| class.count > 0).for_each(|class| class.weight = all / (occurring * class.count as f64));
        }
        Some(ClassWeights::Each(weights)) if weights.len() == n => {
            classes.iter_mut().zip(weights).for_each(|(class, &weight)| class.weight = weight);
        }
        Some(weights @ ClassWeights::Each(each)) => {
            return Err(DataError::Option {
                name: "--class-weights",
                value: weights.clone().into(),
                problem: format!("{} weights for {n} classes", each.len()),
                remedy: format!("give one for each of {}", shorten(&classes)),
            });
        }
    }
    Ok(classes)
}

/// How often each note sounds, as a share of the frames that are to be told.
fn frequency(raws: &[Raw], train: &[usize], n_notes: usize) -> Vec<f64> {
    let (mut counts, mut n_frames) = (vec![0.0; n_notes], 0.0);
    for &i in train {
        let Cells::Frames(frames) = &raws[i].cells else { continue };
        for frame in frames.iter().skip(1) {
            n_frames += 1.0;
            frame.iter().for_each(|&note| counts[usize::from(note)] += 1.0);
        }
    }
    counts.into_iter().map(|count| count / f64::max(n_frames, 1.0)).collect()
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
                Cells::Text(_) | Cells::Frames(_) => &[],
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
        Cells::Values(_) | Cells::Frames(_) => String::new(),
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
        let mut of_class: Vec<usize> = (0..pool).filter(|&i| options.goal != Goal::Class || read.raws[i].label == class).collect();
        Stream::new(StepKey::new(options.seed, 0), Purpose::Split, c as u32, 0).shuffle(&mut of_class);
        let (valid, test) = fractions.cuts(of_class.len());
        of_class.iter().enumerate().skip(valid).for_each(|(place, &i)| parts[i] = if place < test { Part::Valid } else { Part::Test });
    }
    parts
}

fn read(sources: Sources, options: &SequencesOptions, labelled: Labelled) -> Result<Read, DataError> {
    let (sources, n_files) = match sources {
        Sources::Whole(all) => (all, None),
        Sources::Parts { train, valid, test } => {
            let n = (train.len(), valid.len());
            (train.into_iter().chain(valid).chain(test).collect::<Vec<_>>(), Some(n))
        }
    };
    if options.goal == Goal::Frames {
        let (mut raws, mut counts) = (Vec::new(), Vec::with_capacity(sources.len()));
        for source in &sources {
            let pieces = read_frames(source, options)?;
            counts.push(pieces.len());
            raws.extend(pieces);
        }
        return Ok(Read { raws, files: of_files(n_files, &counts), features: Vec::new(), classes: None, form: Form::Frames });
    }
    if options.goal == Goal::Tags && options.sequence.is_none() {
        return Err(DataError::Source {
            given: sources.first().map_or_else(String::new, |source| source.name.clone()),
            problem: "a label for each step needs a table with a column that tells sequences apart and one of labels".to_string(),
            remedy: "name them with --sequence COLUMN --label COLUMN".to_string(),
        });
    }
    let of_table = sources.iter().any(|source| source.is_named(&[".csv"]));
    let of_records = sources.iter().map(records::holds_records).collect::<Result<Vec<_>, _>>()?;
    let is_records = !of_records.is_empty() && of_records.iter().all(|&is| is);
    if let (false, false, Some(column)) =
        (options.sequence.is_some(), is_records, options.label.as_ref().or(options.features.first()).or(options.text.as_ref()))
    {
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
        return read_table(&sources, n_files, sequence, label, options, labelled);
    }
    let mut raws = Vec::new();
    let mut counts = Vec::with_capacity(sources.len());
    let (mut features, mut classes) = (Vec::new(), None);
    let are_ts = sources.iter().map(ts::is_one).collect::<Result<Vec<_>, _>>()?;
    let is_ts = are_ts.iter().all(|&is| is);
    if (!is_ts && are_ts.contains(&true)) || (!is_records && of_records.contains(&true)) {
        return Err(DataError::Source {
            given: sources.iter().map(|source| source.name.clone()).collect::<Vec<_>>().join(", "),
            problem: "files of several forms are mixed".to_string(),
            remedy: "give files of one form".to_string(),
        });
    }
    for source in &sources {
        let before = raws.len();
        if is_ts {
            let file = ts::read(source, labelled)?;
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
        } else if is_records {
            let (label, text) = (options.label.as_deref(), options.text.as_deref());
            let keys = records::Keys { label, text, features: &options.features, labelled: labelled == Labelled::All };
            let (sequences, names) = records::sequences(source, &keys)?;
            if !raws.is_empty() && features != names {
                return Err(DataError::Source {
                    given: source.name.clone(),
                    problem: "its records hold other things than those of the file before".to_string(),
                    remedy: "files that are read together need the same keys".to_string(),
                });
            }
            features = names;
            raws.extend(sequences);
        } else {
            raws.extend(read_lines(source, options.encoding, labelled)?);
        }
        counts.push(raws.len() - before);
    }
    let form = match (is_ts, is_records) {
        (true, _) => Form::Ts,
        (false, true) => Form::Records { label: options.label.clone(), text: options.text.clone() },
        (false, false) => Form::Lines,
    };
    Ok(Read { raws, files: of_files(n_files, &counts), features, classes, form })
}

/// Sequences of the files for training and for validation.
fn of_files(n_files: Option<(usize, usize)>, counts: &[usize]) -> Option<(usize, usize)> {
    n_files.map(|(train, valid)| (counts[..train].iter().sum(), counts[train..train + valid].iter().sum()))
}

/// Pieces of music: a line each, frames with blanks between, each its notes with commas between, `-` for none.
fn read_frames(source: &Source, options: &SequencesOptions) -> Result<Vec<Raw>, DataError> {
    let text = decode(source, options.encoding)?;
    let mut raws = Vec::new();
    for (idx, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |problem: String, remedy: &str| DataError::Line {
            file: source.name.clone(),
            line: idx as u64 + 1,
            problem,
            remedy: remedy.to_string(),
        };
        let mut frames = Vec::new();
        for frame in line.split_whitespace() {
            let mut notes = Vec::new();
            for note in frame.split(',').filter(|_| frame != "-") {
                let number: u16 = note.parse().map_err(|_| {
                    let problem = format!("frame {} has '{note}', which is no note", frames.len() + 1);
                    wrong(
                        problem,
                        "write the notes of a frame as whole numbers with commas between, - for silence, and blanks between frames",
                    )
                })?;
                if usize::from(number) >= options.notes {
                    let problem = format!("frame {} has the note {number}, but notes go from 0 to {}", frames.len() + 1, options.notes - 1);
                    return Err(wrong(problem, "raise --notes, or correct it"));
                }
                notes.push(number);
            }
            notes.sort_unstable();
            notes.dedup();
            frames.push(notes);
        }
        if frames.len() < 2 {
            return Err(wrong("this piece has one frame, so none follows".to_string(), "take it out, or give it at least two"));
        }
        let name = (raws.len() + 1).to_string();
        let (label, tags) = (String::new(), Vec::new());
        raws.push(Raw { file: source.name.clone(), line: idx as u64 + 1, name, label, tags, cells: Cells::Frames(frames) });
    }
    if raws.is_empty() {
        return Err(DataError::Empty {
            file: source.name.clone(),
            wanted: "a piece a line, frames of notes with blanks between".to_string(),
        });
    }
    Ok(raws)
}

/// Lines of label, tab, text; where labels may be missing, of text alone too.
fn read_lines(source: &Source, encoding: Encoding, labelled: Labelled) -> Result<Vec<Raw>, DataError> {
    let text = decode(source, encoding)?;
    let mut raws = Vec::new();
    for (idx, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let number = idx as u64 + 1;
        let bare = Some(("", line)).filter(|_| labelled == Labelled::Some);
        let Some((label, text)) = line.split_once('\t').or(bare) else {
            return Err(DataError::Line {
                file: source.name.clone(),
                line: number,
                problem: "there is no tab between label and text".to_string(),
                remedy: "write a label, a tab and the text on each line (tables need --sequence, UEA files end in .ts)".to_string(),
            });
        };
        let (label, name) = (label.trim().to_string(), (raws.len() + 1).to_string());
        if label.is_empty() && labelled == Labelled::All {
            return Err(DataError::Line {
                file: source.name.clone(),
                line: number,
                problem: "the label is blank".to_string(),
                remedy: "write a label before the tab".to_string(),
            });
        }
        let cells = Cells::Text(text.trim().to_string());
        raws.push(Raw { file: source.name.clone(), line: number, name, label, tags: Vec::new(), cells });
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
    needed: Labelled,
) -> Result<Read, DataError> {
    let table = Table::read(sources)?;
    let by = table.find("--sequence", sequence)?;
    let labelled = match (table.find("--label", label), needed) {
        (Ok(column), _) => Some(column),
        (Err(_), Labelled::Some) => None,
        (Err(e), Labelled::All) => return Err(e),
    };
    let of_steps = options.goal == Goal::Tags;
    let columns: Vec<usize> = if options.features.is_empty() {
        let usable = |c: usize| c != by && Some(c) != labelled && matches!(table.kind(c), Kind::Numbers | Kind::Flags);
        (0..table.columns.len()).filter(|&c| usable(c)).collect()
    } else {
        options.features.iter().map(|name| table.find("--features", name)).collect::<Result<_, _>>()?
    };
    if columns.is_empty() || columns.iter().any(|&c| Some(c) == labelled) {
        let problem =
            if columns.is_empty() { "there is no column of numbers to read" } else { "it is the label, so it cannot be read too" };
        return Err(DataError::Column {
            file: table.name.clone(),
            column: label.to_string(),
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
    let names: Vec<&str> = table.cells(by).collect();
    let labels: Vec<&str> = labelled.map_or_else(|| vec![""; names.len()], |column| table.cells(column).collect());
    let mut raws: Vec<Raw> = Vec::new();
    let mut counts = Vec::with_capacity(sources.len());
    let mut row = 0;
    for (source, &n_rows) in sources.iter().zip(&table.file_rows) {
        // A name means a sequence of its file.
        let (mut places, before) = (HashMap::<&str, usize>::new(), raws.len());
        for at in row..row + n_rows {
            let is_unlabelled = labels[at].is_empty() && needed == Labelled::All;
            if names[at].is_empty() || is_unlabelled {
                let c = labelled.filter(|_| !names[at].is_empty()).unwrap_or(by);
                return Err(table.cell_error(at, c, "the cell is blank".to_string(), "every row needs its sequence and its label"));
            }
            let place = *places.entry(names[at]).or_insert_with(|| {
                let name = names[at].to_string();
                let label = if of_steps { String::new() } else { labels[at].to_string() };
                let (line, cells) = (table.line(at), Cells::Values(Vec::new()));
                raws.push(Raw { file: source.name.clone(), line, name, label, tags: Vec::new(), cells });
                raws.len() - 1
            });
            let raw = &mut raws[place];
            if of_steps {
                raw.tags.push(labels[at].to_string());
            } else if let (true, Some(labelled)) = (raw.label != labels[at], labelled) {
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
    let form = Form::Table {
        sequence: table.columns[by].clone(),
        label: labelled.map_or_else(|| label.to_string(), |c| table.columns[c].clone()),
    };
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

    fn batch(&self, epoch: u64, idx: u64) -> Result<Batch, DataError> {
        assert!(idx < self.n_batches(), "batch {idx} of {}", self.n_batches());
        let rows: Vec<u32> = self.grouping.batch(epoch, idx as usize).into_iter().map(|i| self.of_part[i as usize]).collect();
        Ok(self.sequences.batch_of(&rows))
    }

    fn largest(&self) -> Result<(usize, usize), DataError> {
        Ok(self.grouping.largest())
    }
}
