//! A trained model from a run folder, on one device.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::activations::LaneTrace;
use super::evaluate::Forward;
use super::task::{DATA_FILE, DataRecord, DataSpec, model_config};
use crate::backend::{Backend, read_now};
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
    backend: Box<dyn Backend>,
    model: Model,
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
    pub fn with(config: RunConfig, spec: DataSpec, step: u64, params: &[Vec<f32>], mut backend: Box<dyn Backend>) -> Result<Self> {
        let mut model = Model::new(model_config(&config, &spec), backend.as_mut())?;
        model.write_params(backend.as_mut(), params)?;
        Ok(Self { config, spec, step, backend, model })
    }

    /// The device's name.
    pub fn device(&self) -> &str {
        &self.backend.info().spec
    }

    /// Feeds tokens of one stream, carrying its state, and gives the logits after the last of them.
    ///
    /// # Errors
    /// Something that is not finite; the device's.
    pub fn feed(&mut self, tokens: &[u32], state: &mut Vec<f32>) -> Result<Vec<f32>> {
        let (n_steps, n_outputs) = (tokens.len(), self.model.config().n_outputs());
        let backend = self.backend.as_mut();
        let share = Share {
            n_steps,
            n_rows: 1,
            input: Words::Tokens(tokens),
            targets: None,
            weights: &[],
            lengths: None,
            streams: &[0],
            state: (!state.is_empty()).then_some(state.as_slice()),
            final_gradient: None,
            scale: 0.0,
        };
        self.model.lower_flags(backend)?;
        self.model.run(backend, &share, Pass { key: None, gradients: false, part: 0 }, &mut |_, _, _| Ok(()))?;
        let (span, stride) = self.model.outputs(n_steps, 1);
        let last = span.part((n_steps - 1) * stride, n_outputs);
        let mut spans = vec![self.model.flag(), last];
        spans.extend(self.model.final_state(n_steps, 1));
        let mut words = backend.read(&spans, Vec::new())?.wait(DEADLINE)?;
        *state = words.split_off(1 + n_outputs);
        let flag = words.remove(0);
        check_finite(flag.to_bits() == 0 && words.iter().all(|logit| logit.is_finite()))?;
        Ok(words)
    }
}

impl Session {
    /// What the network consists of.
    pub fn model_config(&self) -> &ModelConfig {
        self.model.config()
    }

    /// Reads one sequence of `n_steps` from the initial state, and gives what the cells did, by lane: layer, then direction.
    ///
    /// # Errors
    /// Something that is not finite; the device's.
    pub fn trace(&mut self, n_steps: usize, input: Words<'_>) -> Result<Vec<LaneTrace>> {
        let backend = self.backend.as_mut();
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
        self.model.lower_flags(backend)?;
        self.model.run(backend, &share, Pass { key: None, gradients: false, part: 0 }, &mut |_, _, _| Ok(()))?;
        let flag = read_now(backend, self.model.flag(), DEADLINE)?[0];
        check_finite(flag.to_bits() == 0)?;
        let gates = self.model.read_gates(backend, n_steps, 1, DEADLINE)?;
        let cells = self.model.read_cells(backend, n_steps, 1, DEADLINE)?;
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

/// A forward pass over a batch from `state` (zero if there is none).
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
        let state = carried.as_ref().map(|c| c.rows(rows.clone()));
        let passed = pass_forward(self.backend.as_mut(), &mut self.model, batch, state.as_deref(), [carried.is_some(), wants_outputs])?;
        check_finite(!passed.non_finite && passed.loss.is_finite())?;
        if let Some(carried) = carried {
            carried.put(rows, &passed.state);
        }
        Ok((passed.loss, passed.outputs))
    }

    fn carried(&self, n_streams: usize) -> Carried {
        Carried::new(self.model.config(), n_streams)
    }
}
