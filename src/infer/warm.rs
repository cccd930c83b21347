//! Starting from what another run, or another program, has learnt: parameters by name, from a run folder or a safetensors or ONNX file.

use std::path::Path;

use anyhow::Result;

use super::session::read_data;
use super::task::DataSpec;
use crate::data::sequences::{LabelSpec, StepSpec};
use crate::data::vocab::Vocab;
use crate::params::ParamTable;
use crate::store::checkpoint::NamedTensor;
use crate::store::interchange;
use crate::store::run_folder::{RunFolder, Which};
use crate::usage::UsageError;

/// Parameters to start from, and what is known of the data that they come from.
pub struct Warm {
    name: String,
    tensors: Vec<NamedTensor>,
    pub spec: Option<DataSpec>,
}

impl Warm {
    /// Reads the selected checkpoint of a run folder, or a model file.
    ///
    /// # Errors
    /// Nothing is there, or it is damaged.
    pub fn open(from: &Path) -> Result<Self> {
        let name = from.display().to_string();
        if from.is_dir() {
            let folder = RunFolder::read(from)?;
            let tensors = folder.load(Which::Selected)?.tensors;
            return Ok(Self { name, tensors, spec: Some(read_data(&folder)?.spec) });
        }
        let file = interchange::read(from)?;
        let spec = file.about.as_ref().and_then(|about| serde_json::from_str(&about.data).ok());
        Ok(Self { name, tensors: file.tensors, spec })
    }

    /// The vocabulary of a text's model, by which another text is read alike.
    pub fn text_spec(&self) -> Option<&DataSpec> {
        self.spec.as_ref().filter(|spec| matches!(spec, DataSpec::Text(_)))
    }

    /// Puts what fits into `params` (in the table's order) and gives the names of the tensors that start afresh: those that are not there, an
    /// embedding of other symbols, a head for other outputs.
    ///
    /// # Errors
    /// A layer of another shape (both shapes); nothing fits.
    pub fn apply(self, table: &ParamTable, spec: &DataSpec, params: &mut [Vec<f32>]) -> Result<Vec<String>> {
        let (symbols, outputs) = match &self.spec {
            None => (true, true),
            Some(own) => (vocab(own) == vocab(spec), classes(own) == classes(spec)),
        };
        let mut fresh = Vec::new();
        for (tensor, values) in table.tensors().iter().zip(params) {
            let usable = match tensor.name.split('.').next() {
                Some("embedding") => symbols,
                Some("head") => outputs && (symbols || !matches!(spec, DataSpec::Text(_))),
                _ => true,
            };
            let found = self.tensors.iter().find(|found| usable && found.name == tensor.name);
            match found {
                Some(found) if found.shape == tensor.shape => values.clone_from(&found.data),
                Some(found) if tensor.name.starts_with("lstm.") => {
                    return Err(UsageError(format!(
                        "--init-from {}: {} has shape {:?}, but data and options ask for {:?}; give the options of that model",
                        self.name, tensor.name, found.shape, tensor.shape
                    ))
                    .into());
                }
                _ => fresh.push(tensor.name.clone()),
            }
        }
        UsageError::unless(fresh.len() < table.tensors().len(), || {
            format!(
                "--init-from {} holds no parameter that this model has: give a run, or a file with an LSTM under PyTorch's names",
                self.name
            )
        })?;
        Ok(fresh)
    }
}

fn vocab(spec: &DataSpec) -> Option<&Vocab> {
    match spec {
        DataSpec::Text(vocab) => Some(vocab),
        DataSpec::Sequences(spec) => match &spec.step {
            StepSpec::Tokens(vocab) => Some(vocab),
            StepSpec::Features(_) | StepSpec::Notes(_) => None,
        },
        DataSpec::Series(_) => None,
    }
}

fn classes(spec: &DataSpec) -> Option<Vec<&str>> {
    let DataSpec::Sequences(spec) = spec else { return None };
    match &spec.label {
        LabelSpec::Classes(classes) | LabelSpec::Tags(classes) => Some(classes.iter().map(|class| class.name.as_str()).collect()),
        LabelSpec::Number(_) | LabelSpec::Frames(_) => None,
    }
}
