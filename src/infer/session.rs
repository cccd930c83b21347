//! A trained model from a run folder, on one device.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::activations::LaneTrace;
use super::evaluate::Forward;
use super::task::{DATA_FILE, DataRecord, DataSpec, model_config};
use crate::backend::{Backend, DeviceInfo, Span, read_now};
use crate::data::{Batch, Input, Target};
use crate::model::config::ModelConfig;
use crate::model::state::Carried;
use crate::model::{Model, Pass, Share, Words};
use crate::store::config::RunConfig;
use crate::store::run_folder::{CONFIG, RunFolder, Which};

/// How long a device may take for a pass, a step, a readback or a message before it counts as stuck.
pub const DEADLINE: Duration = Duration::from_secs(300);

/// A model that is ready to be asked.
pub struct Session {
    pub config: RunConfig,
    pub spec: DataSpec,
    /// The checkpoint's step.
    pub step: u64,
    replica: Replica,
}

/// A model on its device that is asked again and again; what a call reads back lies in memory that the next one takes over.
pub struct Replica {
    backend: Box<dyn Backend>,
    model: Model,
    /// The flag, outputs, the final state: as the last call read them.
    words: Vec<f32>,
    spans: Vec<Span>,
    streams: Vec<u32>,
}

/// Outputs of a call: rows of `stride` floats, the first `n_outputs` of each meant.
#[derive(Clone, Copy, Debug)]
pub struct Outputs<'a> {
    pub words: &'a [f32],
    pub stride: usize,
    pub n_outputs: usize,
}

impl<'a> Outputs<'a> {
    /// Row by row, without padding.
    pub fn rows(self) -> impl Iterator<Item = &'a [f32]> {
        self.words.chunks(self.stride).map(move |row| &row[..self.n_outputs])
    }
}

impl Replica {
    /// Puts parameters (tensors in the table's order, each in PyTorch's) onto `backend`.
    ///
    /// # Errors
    /// A model that does not fit the device, tensors of other shapes.
    pub fn new(config: ModelConfig, params: &[Vec<f32>], mut backend: Box<dyn Backend>) -> Result<Self> {
        let mut model = Model::new(config, backend.as_mut())?;
        model.write_params(backend.as_mut(), params)?;
        Ok(Self { backend, model, words: Vec::new(), spans: Vec::new(), streams: Vec::new() })
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What drives the device.
    pub fn info(&self) -> &DeviceInfo {
        self.backend.info()
    }

    /// Runs time steps `[T, B]` from `state`, or from the beginning where that is empty or not given, and leaves the last state there. The outputs are
    /// those of every row that the head reads (`[T, B]` for classes of steps, else `[B]`), or of the last step's alone.
    ///
    /// # Errors
    /// Something that is not finite; the device's.
    pub fn ask(
        &mut self,
        input: Words<'_>,
        [n_steps, n_rows]: [usize; 2],
        state: Option<&mut Vec<f32>>,
        last_only: bool,
    ) -> Result<Outputs<'_>> {
        let backend = self.backend.as_mut();
        if self.streams.len() != n_rows {
            self.streams = (0..n_rows as u32).collect();
        }
        let share = Share {
            n_steps,
            n_rows,
            input,
            targets: None,
            weights: &[],
            lengths: None,
            streams: &self.streams,
            state: state.as_ref().filter(|state| !state.is_empty()).map(|state| state.as_slice()),
            final_gradient: None,
            scale: 0.0,
        };
        self.model.lower_flags(backend)?;
        self.model.run(backend, &share, Pass { key: None, gradients: false, part: 0 }, &mut |_, _, _| Ok(()))?;
        let (outputs, stride) = self.model.outputs(n_steps, n_rows);
        let n_outputs = self.model.config().n_outputs();
        let outputs = if last_only { outputs.part(outputs.len - n_rows * stride, n_rows * stride) } else { outputs };
        self.spans.clear();
        self.spans.extend([self.model.flag(), outputs]);
        if state.is_some() {
            self.spans.extend(self.model.final_state(n_steps, n_rows));
        }
        self.words = backend.read(&self.spans, std::mem::take(&mut self.words))?.wait(DEADLINE)?;
        let (words, left) = self.words[1..].split_at(outputs.len);
        if let Some(state) = state {
            state.clear();
            state.extend_from_slice(left);
        }
        // What stands in the padding of a row is zero times weights that are zero.
        check_finite(self.words[0].to_bits() == 0 && words.iter().all(|output| output.is_finite()))?;
        Ok(Outputs { words, stride, n_outputs })
    }
}

/// Reads the configuration of a run folder.
///
/// # Errors
/// No such folder; a file that is missing or damaged.
pub fn read_config(folder: &RunFolder) -> Result<RunConfig> {
    let text =
        String::from_utf8(folder.read_file(CONFIG)?).with_context(|| format!("{CONFIG} of {} is not text", folder.path().display()))?;
    toml::from_str(&text).with_context(|| format!("{CONFIG} of {} is not a configuration of this version", folder.path().display()))
}

/// Reads what a run folder says of its data.
///
/// # Errors
/// A file that is missing or damaged.
pub fn read_data(folder: &RunFolder) -> Result<DataRecord> {
    serde_json::from_slice(&folder.read_file(DATA_FILE)?).with_context(|| format!("{DATA_FILE} of {} is damaged", folder.path().display()))
}

impl Session {
    /// Loads the checkpoint that `which` names onto `backend`.
    ///
    /// # Errors
    /// No such run or checkpoint, a damaged file, a model that does not fit the device.
    pub fn open(run: &Path, which: Which, backend: Box<dyn Backend>) -> Result<Self> {
        let folder = RunFolder::read(run)?;
        let (config, spec) = (read_config(&folder)?, read_data(&folder)?.spec);
        let mut checkpoint = folder.load(which)?;
        let table = model_config(&config, &spec).table();
        let params = checkpoint.take_model(table.tensors())?;
        Self::with(config, spec, checkpoint.step()?, &params, backend)
    }

    /// Puts parameters (tensors in the table's order, each in PyTorch's) as they stood after `step` onto `backend`.
    ///
    /// # Errors
    /// A model that does not fit the device, tensors of other shapes.
    pub fn with(config: RunConfig, spec: DataSpec, step: u64, params: &[Vec<f32>], backend: Box<dyn Backend>) -> Result<Self> {
        let replica = Replica::new(model_config(&config, &spec), params, backend)?;
        Ok(Self { config, spec, step, replica })
    }

    /// The device's name.
    pub fn device(&self) -> &str {
        &self.replica.info().spec
    }

    /// Feeds tokens of one stream, carrying its state, and gives the logits after the last of them.
    ///
    /// # Errors
    /// Something that is not finite; the device's.
    pub fn feed(&mut self, tokens: &[u32], state: &mut Vec<f32>) -> Result<Vec<f32>> {
        let outputs = self.replica.ask(Words::Tokens(tokens), [tokens.len(), 1], Some(state), true)?;
        Ok(outputs.words[..outputs.n_outputs].to_vec())
    }
}

impl Session {
    /// What the network consists of.
    pub fn model_config(&self) -> &ModelConfig {
        self.replica.model.config()
    }

    /// Reads one sequence of `n_steps` from the initial state, and gives what the cells did, by lane: layer, then direction.
    ///
    /// # Errors
    /// Something that is not finite; the device's.
    pub fn trace(&mut self, n_steps: usize, input: Words<'_>) -> Result<Vec<LaneTrace>> {
        let Replica { model, backend, .. } = &mut self.replica;
        let backend = backend.as_mut();
        let share = Share {
            n_steps,
            n_rows: 1,
            input,
            targets: None,
            weights: &[],
            lengths: None,
            streams: &[0],
            state: None,
            final_gradient: None,
            scale: 0.0,
        };
        model.lower_flags(backend)?;
        model.run(backend, &share, Pass { key: None, gradients: false, part: 0 }, &mut |_, _, _| Ok(()))?;
        let flag = read_now(backend, model.flag(), DEADLINE)?[0];
        check_finite(flag.to_bits() == 0)?;
        let gates = model.read_gates(backend, n_steps, 1, DEADLINE)?;
        let cells = model.read_cells(backend, n_steps, 1, DEADLINE)?;
        Ok(gates.into_iter().zip(cells).map(|(gates, cells)| LaneTrace { gates, cells }).collect())
    }
}

/// Only a model that is of use is used.
fn check_finite(finite: bool) -> Result<()> {
    ensure!(
        finite,
        "the model's outputs are not finite: its parameters are spoilt, or the data holds extreme values; try --checkpoint with another step"
    );
    Ok(())
}

/// What a forward pass over a batch gives.
pub struct Passed {
    /// Summed over terms.
    pub loss: f64,
    /// A pre-activation or an output was not finite.
    pub non_finite: bool,
    /// The final state of the rows, where it was wanted.
    pub state: Vec<f32>,
    /// `[rows, columns]`, where they were wanted; of the steps of whole sequences row after row, the valid steps of each, so that parts of a batch
    /// follow each other.
    pub outputs: Vec<f32>,
}

/// The state from which some rows of a batch go on: what they carried, or where the text begins the model's own.
pub fn state_of(batch: &Batch, carried: Option<&Carried>, rows: Range<usize>) -> Option<Vec<f32>> {
    carried.filter(|_| !batch.resets).map(|carried| carried.rows(rows))
}

/// A forward pass over a batch from `state`, or from the model's own where there is none.
///
/// # Errors
/// The device's.
pub fn pass_forward(
    backend: &mut dyn Backend,
    model: &mut Model,
    batch: &Batch,
    state: Option<&[f32]>,
    [wants_state, wants_outputs]: [bool; 2],
) -> Result<Passed> {
    model.lower_flags(backend)?;
    let pass = Pass { key: None, gradients: false, part: 0 };
    model.run(backend, &share_of(batch, state, 0.0), pass, &mut |_, _, _| Ok(()))?;
    let mut spans = vec![model.loss(1), model.flag()];
    if wants_state {
        spans.extend(model.final_state(batch.n_steps, batch.n_rows));
    }
    let mut words = backend.read(&spans, Vec::new())?.wait(DEADLINE)?;
    let state = words.split_off(2);
    let mut outputs = Vec::new();
    if wants_outputs {
        let (span, stride) = model.outputs(batch.n_steps, batch.n_rows);
        let padded = read_now(backend, span, DEADLINE)?;
        let n = model.config().n_outputs();
        if batch.is_of_steps() {
            let places = (0..batch.n_rows).flat_map(|row| (0..batch.length(row)).map(move |t| t * batch.n_rows + row));
            outputs.extend(places.flat_map(|place| padded[place * stride..][..n].iter().copied()));
        } else {
            outputs.extend(padded.chunks_exact(stride).flat_map(|row| row[..n].iter().copied()));
        }
    }
    Ok(Passed { loss: f64::from(words[0]), non_finite: words[1].to_bits() != 0, state, outputs })
}

/// A batch as the model takes it.
pub fn share_of<'a>(batch: &'a Batch, state: Option<&'a [f32]>, scale: f32) -> Share<'a> {
    Share {
        n_steps: batch.n_steps,
        n_rows: batch.n_rows,
        input: match &batch.input {
            Input::Tokens(tokens) => Words::Tokens(tokens),
            Input::Values { values, .. } => Words::Values(values),
        },
        targets: Some(match &batch.target {
            Target::Tokens(tokens) | Target::Labels(tokens) => Words::Tokens(tokens),
            Target::Values { values, .. } | Target::Notes { values, .. } => Words::Values(values),
        }),
        weights: &batch.weights,
        lengths: batch.lengths.as_deref(),
        streams: &batch.streams,
        state,
        final_gradient: None,
        scale,
    }
}

impl Forward for Session {
    fn forward(&mut self, batch: &Arc<Batch>, carried: Option<&mut Carried>, wants_outputs: bool) -> Result<(f64, Vec<f32>)> {
        let rows = 0..batch.n_rows;
        let state = state_of(batch, carried.as_deref(), rows.clone());
        let Replica { backend, model, .. } = &mut self.replica;
        let passed = pass_forward(backend.as_mut(), model, batch, state.as_deref(), [carried.is_some(), wants_outputs])?;
        check_finite(!passed.non_finite && passed.loss.is_finite())?;
        if let Some(carried) = carried {
            carried.put(rows, &passed.state);
        }
        Ok((passed.loss, passed.outputs))
    }

    fn carried(&self, n_streams: usize) -> Carried {
        Carried::new(self.replica.model.config(), n_streams)
    }
}
