//! What a model said during an evaluation, as a file: a table for people, or tensors for programs.
//!
//! | `.csv` | a row is | columns |
//! | --- | --- | --- |
//! | text | a token, in the order of the text | `position` (in the part, from 0), `token`, `text`, `log_probability` |
//! | series | a target of a window at one step of the horizon | `origin`, `time`, `step`, `target`, `value`, `truth` (in the unit; empty if unknown), then each quantile that is forecast |
//! | classes of sequences | a sequence, in the order of the files | `sequence`, `class` (that was said), `truth`, `probability` of each class by its name |
//! | classes of steps | a step | `sequence`, `step` (from 1), `class`, `truth`, `probability` of each class by its name |
//! | frames | a frame that was told | `sequence`, `step`, `told` and `truth` (notes with blanks between), `log_probability` (of the truth) |
//! | numbers of sequences | a sequence | `sequence`, `value`, `truth` (in the unit) |
//!
//! | `.safetensors` | text | series | sequences | steps of sequences |
//! | --- | --- | --- | --- | --- |
//! | `input` | `[N]` tokens that were read | `[N, T, I]` | `[N, T, I]`, or `[N, T, 1]` tokens, zeros behind a sequence's end | `[N, I]` |
//! | `target` | `[N]` tokens that follow | `[N, O]`, NaN where unknown | `[N]` classes, or `[N, 1]` | `[N]` classes, or `[N, V]` notes |
//! | `output` | `[N, V]` logits | `[N, O]`, on the normalised scale | `[N, V]` logits, or `[N, 1]` on the normalised scale | `[N, V]` logits |
//! | `stream` | `[N]`: within a stream the state is carried | `[N]`: the row of the window's last input | `[N]`: the sequence, from 0 | the same, steps in order |
//! | `length` | | | `[N]` steps | |
//!
//! All tensors are f32. What must not be here: a model, a device.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;

use super::evaluate::{by_level, likeliest, places};
use super::task::{DataSpec, EvalSet, Truth};
use crate::data::sequences::{LabelSpec, Sequences};
use crate::data::vocab::Vocab;
use crate::data::{Batch, Input, Target};
use crate::store::checkpoint::{Checkpoint, NamedTensor};
use crate::usage::UsageError;

/// The largest file of raw outputs, since all of it is gathered in memory.
const MAX_FLOATS: usize = 1 << 30;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Table,
    Tensors,
}

/// One term: a token, or a window.
struct Said {
    stream: u32,
    input: Vec<f32>,
    target: Vec<f32>,
    output: Vec<f32>,
    log_probability: f64,
}

/// Gathers what a model says.
pub struct Predictions {
    path: PathBuf,
    form: Form,
    vocab: Option<Vocab>,
    said: Vec<Said>,
    /// `[T, I]` of a series; of sequences the longest.
    window: Vec<usize>,
    /// Terms are whole sequences.
    of_sequences: bool,
    /// Terms are steps of sequences.
    of_steps: bool,
    n_floats: usize,
}

impl Predictions {
    /// For a file whose name tells the form.
    ///
    /// # Errors
    /// The name ends otherwise, or its folder does not exist.
    pub fn new(path: &Path, spec: &DataSpec) -> Result<Self, UsageError> {
        let form = match path.extension().and_then(|extension| extension.to_str()) {
            Some("csv") => Form::Table,
            Some("safetensors") => Form::Tensors,
            _ => return Err(UsageError(format!("--output {} must end in .csv or .safetensors", path.display()))),
        };
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        UsageError::unless(dir.is_none_or(Path::is_dir), || format!("--output {}: its folder does not exist", path.display()))?;
        let vocab = match spec {
            DataSpec::Text(vocab) => Some(vocab.clone()),
            DataSpec::Series(_) | DataSpec::Sequences(_) => None,
        };
        let of_steps = matches!(spec, DataSpec::Sequences(spec) if matches!(spec.label, LabelSpec::Tags(_) | LabelSpec::Frames(_)));
        let of_sequences = matches!(spec, DataSpec::Sequences(_)) && !of_steps;
        Ok(Self { path: path.to_owned(), form, vocab, said: Vec::new(), window: Vec::new(), of_sequences, of_steps, n_floats: 0 })
    }

    /// Takes a batch and the outputs for it, `[rows, columns]`.
    pub fn add(&mut self, batch: &Batch, outputs: &[f32]) {
        let keeps_outputs = self.form == Form::Tensors && self.n_floats <= MAX_FLOATS;
        if self.of_sequences {
            return self.add_sequences(batch, outputs, keeps_outputs);
        }
        if batch.is_of_steps() {
            return self.add_steps(batch, outputs, keeps_outputs);
        }
        match &batch.target {
            Target::Tokens(targets) | Target::Labels(targets) => {
                let columns = outputs.len() / targets.len().max(1);
                for (term, ((&target, &weight), row)) in
                    targets.iter().zip(&batch.weights).zip(outputs.chunks_exact(columns.max(1))).enumerate()
                {
                    if weight == 0.0 {
                        continue;
                    }
                    self.n_floats += columns;
                    let input = match &batch.input {
                        Input::Tokens(tokens) => tokens.get(term).map(|&token| token as f32),
                        Input::Values { .. } => None,
                    };
                    self.said.push(Said {
                        stream: batch.streams[term % batch.n_rows],
                        input: input.into_iter().collect(),
                        target: vec![target as f32],
                        output: if keeps_outputs { row.to_vec() } else { Vec::new() },
                        log_probability: log_softmax(row, target),
                    });
                }
            }
            Target::Values { values, n_outputs } => {
                // Of each value there may be several quantiles.
                let columns = outputs.len() / batch.n_rows.max(1);
                let n_features = match &batch.input {
                    Input::Values { n_features, .. } => *n_features,
                    Input::Tokens(_) => 0,
                };
                self.window = vec![batch.n_steps, n_features];
                for (b, (&stream, row)) in batch.streams.iter().zip(outputs.chunks_exact(columns.max(1))).enumerate() {
                    self.n_floats += batch.n_steps * n_features;
                    let input = match &batch.input {
                        Input::Values { values, .. } if keeps_outputs => {
                            (0..batch.n_steps).flat_map(|t| &values[(t * batch.n_rows + b) * n_features..][..n_features]).copied().collect()
                        }
                        _ => Vec::new(),
                    };
                    let known = batch.weights[b * n_outputs..][..*n_outputs].iter().map(|&weight| weight != 0.0);
                    let target = values[b * n_outputs..].iter().zip(known).map(|(&value, known)| if known { value } else { f32::NAN });
                    let target = target.collect();
                    self.said.push(Said { stream, input, target, output: row.to_vec(), log_probability: 0.0 });
                }
            }
            // Of steps.
            Target::Notes { .. } => {}
        }
    }

    fn add_steps(&mut self, batch: &Batch, outputs: &[f32], keeps_input: bool) {
        let n_features = match &batch.input {
            Input::Tokens(_) => 1,
            Input::Values { n_features, .. } => *n_features,
        };
        self.window = vec![n_features];
        let columns = outputs.len() / places(batch).count().max(1);
        let row_of = (0..batch.n_rows).flat_map(|row| (0..batch.length(row)).map(move |t| (row, t)));
        for ((row, t), said) in row_of.zip(outputs.chunks_exact(columns.max(1))) {
            let at = t * batch.n_rows + row;
            self.n_floats += n_features + columns;
            let input = match &batch.input {
                _ if !keeps_input => Vec::new(),
                Input::Tokens(tokens) => vec![tokens[at] as f32],
                Input::Values { values, .. } => values[at * n_features..][..n_features].to_vec(),
            };
            let (target, log_probability) = match &batch.target {
                Target::Tokens(classes) | Target::Labels(classes) => (vec![classes[at] as f32], log_softmax(said, classes[at])),
                Target::Notes { values, n_notes } => {
                    let notes = &values[at * n_notes..][..*n_notes];
                    (
                        notes.to_vec(),
                        -said.iter().zip(notes).map(|(&z, &y)| f64::from(-z).exp().ln_1p() + f64::from((1.0 - y) * z)).sum::<f64>(),
                    )
                }
                Target::Values { .. } => (Vec::new(), 0.0),
            };
            self.said.push(Said { stream: batch.streams[row], input, target, output: said.to_vec(), log_probability });
        }
    }

    fn add_sequences(&mut self, batch: &Batch, outputs: &[f32], keeps_input: bool) {
        let n_features = match &batch.input {
            Input::Tokens(_) => 1,
            Input::Values { n_features, .. } => *n_features,
        };
        let longest = self.window.first().copied().unwrap_or(0).max(batch.n_steps);
        self.window = vec![longest, n_features];
        let columns = outputs.len() / batch.n_rows.max(1);
        for (b, (&stream, row)) in batch.streams.iter().zip(outputs.chunks_exact(columns.max(1))).enumerate() {
            self.n_floats += longest * n_features + columns;
            let places = (0..if keeps_input { batch.length(b) } else { 0 }).map(|t| t * batch.n_rows + b);
            let input = match &batch.input {
                Input::Tokens(tokens) => places.map(|at| tokens[at] as f32).collect(),
                Input::Values { values, .. } => places.flat_map(|at| &values[at * n_features..][..n_features]).copied().collect(),
            };
            let target = match &batch.target {
                Target::Tokens(classes) | Target::Labels(classes) => classes[b] as f32,
                Target::Values { values, .. } | Target::Notes { values, .. } => values[b],
            };
            self.said.push(Said { stream, input, target: vec![target], output: row.to_vec(), log_probability: 0.0 });
        }
    }

    /// Writes the file.
    ///
    /// # Errors
    /// It cannot be written; more raw outputs than can be gathered.
    pub fn write(mut self, set: &EvalSet) -> Result<()> {
        // Streams follow each other in the text; within one, terms came in order.
        self.said.sort_by_key(|said| said.stream);
        let bytes = match self.form {
            Form::Table => self.table(set)?,
            Form::Tensors => self.tensors()?,
        };
        let write = || std::fs::File::create(&self.path).and_then(|mut file| file.write_all(&bytes));
        write().with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn table(&self, set: &EvalSet) -> Result<Vec<u8>> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        if let Some(vocab) = &self.vocab {
            writer.write_record(["position", "token", "text", "log_probability"])?;
            for (term, said) in self.said.iter().enumerate() {
                let token = said.target[0] as u32;
                // The very first token is nobody's target.
                writer.write_record([
                    (term + 1).to_string(),
                    token.to_string(),
                    vocab.decode(&[token]),
                    said.log_probability.to_string(),
                ])?;
            }
        } else if let Truth::Series(series, levels) = &set.truth {
            let header = ["origin", "time", "step", "target", "value", "truth"].map(str::to_owned);
            let quantiles = levels.iter().flat_map(|levels| levels.values().map(|level| format!("q{level}")).collect::<Vec<_>>());
            writer.write_record(header.into_iter().chain(quantiles))?;
            let names: Vec<&str> = series.spec().target_columns().map(|column| column.name.as_str()).collect();
            for said in &self.said {
                let origin = said.stream as usize;
                let in_unit = |row: &[f32]| series.denormalise(said.stream, row);
                let quantiles: Vec<Vec<f64>> =
                    levels.map_or(Vec::new(), |levels| by_level(&said.output, levels).iter().map(|row| in_unit(row)).collect());
                let values = levels.map_or_else(|| in_unit(&said.output), |levels| quantiles[levels.middle()].clone());
                let pairs = values.into_iter().zip(series.truth(said.stream));
                for (o, (value, truth)) in pairs.enumerate() {
                    let step = o / names.len() + 1;
                    let cells = [
                        series.time_at(origin),
                        series.time_at(origin + step),
                        step.to_string(),
                        names[o % names.len()].to_owned(),
                        value.to_string(),
                        truth.map(|truth| truth.to_string()).unwrap_or_default(),
                    ];
                    writer.write_record(cells.into_iter().chain(quantiles.iter().map(|quantile| quantile[o].to_string())))?;
                }
            }
        }
        if let Truth::Sequences(sequences, _) = &set.truth {
            if self.of_steps { self.table_of_steps(sequences, &mut writer)? } else { self.table_of_sequences(sequences, &mut writer)? }
        }
        writer.into_inner().map_err(|e| anyhow::anyhow!("cannot write {}: {e}", self.path.display()))
    }

    fn table_of_steps(&self, sequences: &Sequences, writer: &mut csv::Writer<Vec<u8>>) -> Result<()> {
        let classes = match &sequences.spec().label {
            LabelSpec::Tags(classes) => classes.as_slice(),
            _ => &[],
        };
        let names = classes.iter().map(|class| class.name.as_str());
        if classes.is_empty() {
            writer.write_record(["sequence", "step", "told", "truth", "log_probability"])?;
        } else {
            writer.write_record(["sequence", "step", "class", "truth"].into_iter().chain(names))?;
        }
        let mut before = None;
        let mut t = 0;
        for said in &self.said {
            t = if before == Some(said.stream) { t + 1 } else { 0 };
            before = Some(said.stream);
            let i = said.stream as usize;
            let place = [sequences.sequence_name(i).to_owned(), (t + 1).to_string()].into_iter();
            if classes.is_empty() {
                let notes = |sounds: &dyn Fn(usize) -> bool| {
                    let notes = (0..said.output.len()).filter(|&note| sounds(note)).map(|note| note.to_string());
                    notes.collect::<Vec<_>>().join(" ")
                };
                let told = notes(&|note| said.output[note] >= 0.0);
                let truth = notes(&|note| said.target[note] > 0.0);
                writer.write_record(place.chain([told, truth, said.log_probability.to_string()]))?;
                continue;
            }
            let truth = sequences.tag(i, t).map_or("", |truth| classes[truth as usize].name.as_str());
            let probabilities = (0..classes.len()).map(|c| log_softmax(&said.output, c as u32).exp().to_string());
            let said = &classes[likeliest(&said.output)].name;
            writer.write_record(place.chain([said.clone(), truth.to_owned()]).chain(probabilities))?;
        }
        Ok(())
    }

    fn table_of_sequences(&self, sequences: &Sequences, writer: &mut csv::Writer<Vec<u8>>) -> Result<()> {
        match &sequences.spec().label {
            LabelSpec::Classes(classes) => {
                let names = || classes.iter().map(|class| class.name.as_str());
                writer.write_record(["sequence", "class", "truth"].into_iter().chain(names()))?;
                for said in &self.said {
                    let (i, class) = (said.stream as usize, likeliest(&said.output));
                    let truth = sequences.class(i).map_or("", |truth| classes[truth as usize].name.as_str());
                    let probabilities = (0..classes.len()).map(|c| log_softmax(&said.output, c as u32).exp().to_string());
                    let cells = [sequences.sequence_name(i), &classes[class].name, truth].map(str::to_owned);
                    writer.write_record(cells.into_iter().chain(probabilities))?;
                }
            }
            // Of steps.
            LabelSpec::Tags(_) | LabelSpec::Frames(_) => {}
            LabelSpec::Number(scale) => {
                writer.write_record(["sequence", "value", "truth"])?;
                for said in &self.said {
                    let i = said.stream as usize;
                    let value = scale.mean + scale.std * f64::from(said.output[0]);
                    let truth = sequences.number(i).map(|truth| truth.to_string()).unwrap_or_default();
                    writer.write_record([sequences.sequence_name(i).to_owned(), value.to_string(), truth])?;
                }
            }
        }
        Ok(())
    }

    fn tensors(&self) -> Result<Vec<u8>> {
        UsageError::unless(self.n_floats <= MAX_FLOATS, || {
            format!(
                "--output {} would hold {} numbers, more than {MAX_FLOATS}: give less --data, or a .csv file",
                self.path.display(),
                self.n_floats
            )
        })?;
        let n = self.said.len();
        let of = |name: &str, inner: &[usize], part: &dyn Fn(&Said) -> Vec<f32>| NamedTensor {
            name: name.to_owned(),
            shape: [&[n], inner].concat(),
            data: self.said.iter().flat_map(part).collect(),
        };
        let columns = self.said.first().map_or(0, |said| said.output.len());
        let input: &[usize] = if self.vocab.is_some() { &[] } else { &self.window };
        let n_targets = self.said.first().map_or(0, |said| said.target.len());
        let is_class = (self.of_sequences || self.of_steps) && columns > 1 && n_targets == 1;
        let n_values = [n_targets];
        let target = if is_class || self.vocab.is_some() { &[][..] } else { &n_values[..] };
        let len: usize = input.iter().product();
        let padded = |said: &Said| said.input.iter().copied().chain(std::iter::repeat(0.0)).take(len).collect();
        let mut tensors = vec![
            of("input", input, &padded),
            of("target", target, &|said| said.target.clone()),
            of("output", &[columns], &|said| said.output.clone()),
            of("stream", &[], &|said| vec![said.stream as f32]),
        ];
        if self.of_sequences {
            let width = self.window.get(1).copied().unwrap_or(1).max(1);
            tensors.push(of("length", &[], &|said| vec![(said.input.len() / width) as f32]));
        }
        Ok(Checkpoint { meta: json!({ "step": 0, "predictions": true }), tensors }.to_bytes()?)
    }
}

/// The logarithm of a class's probability under its logits.
pub fn log_softmax(logits: &[f32], class: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    logits.get(class as usize).map_or(f64::NAN, |&x| f64::from(x - max) - sum.ln())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_of_all_classes_add_up_to_one() {
        let logits = [1.5, -200.0, 300.0, 299.0];
        let sum: f64 = (0..4).map(|class| log_softmax(&logits, class).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-12, "{sum}");
        assert!((log_softmax(&[0.0, 0.0], 1) + 2f64.ln()).abs() < 1e-15);
    }
}
