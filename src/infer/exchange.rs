//! From a run folder to a model file that others read, and from such a file to a run folder.
//!
//! An imported run stands at step 0: it holds configuration, data specification and parameters, so that it can be used at once, and `--resume`
//! begins to train from there. What must not be here: how files look, which is the interchange's.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::session::{read_config, read_data};
use super::task::{Corpus, DATA_FILE, DataRecord, DataSpec, model_config};
use crate::data::sequences::{LabelSpec, Scaled, SequencesSpec, StepSpec};
use crate::data::series::{Column, SeriesSpec};
use crate::model::config::Levels;
use crate::model::init::initial;
use crate::store::checkpoint::{Checkpoint, NamedTensor};
use crate::store::config::RunConfig;
use crate::store::interchange::{About, Format, ModelFile, Part, describe, write};
use crate::store::run_folder::{CONFIG, RunFolder, Which};
use crate::usage::UsageError;

/// Writes the model of a run's checkpoint to `output`. Warnings come back beside the summary.
///
/// # Errors
/// No such run or checkpoint; the format has no words for the model; the file cannot be written.
pub fn export(run: &Path, which: Which, format: Format, part: Part, output: &Path) -> Result<(Map<String, Value>, Vec<String>)> {
    let folder = RunFolder::read(run)?;
    let (config, spec) = (read_config(&folder)?, read_data(&folder)?.spec);
    let mut checkpoint = folder.load(which)?;
    let step = checkpoint.step()?;
    let model = model_config(&config, &spec);
    let network = describe(&model);
    if format == Format::Safetensors {
        let absolute = std::path::absolute(output).unwrap_or_else(|_| output.to_owned());
        let inside = absolute.parent().is_some_and(|dir| dir == folder.path() || dir == folder.path().join("checkpoints"));
        UsageError::unless(!inside, || {
            format!("--output {} lies in the run folder, whose safetensors files are checkpoints: write it beside", output.display())
        })?;
    }
    let table = model.table();
    let params = checkpoint.take_model(table.tensors())?;
    let named = |(t, data): (&crate::params::Tensor, Vec<f32>)| NamedTensor { name: t.name.clone(), shape: t.shape.clone(), data };
    let tensors: Vec<NamedTensor> = table.tensors().iter().zip(params).map(named).collect();
    let about = About {
        part,
        model: serde_json::to_string(&model)?,
        config: toml::to_string(&config).context("the configuration cannot be written as TOML")?,
        data: serde_json::to_string(&spec)?,
        scale: match &spec {
            DataSpec::Series(spec) => Some(scale(spec, config.quantiles).to_string()),
            DataSpec::Sequences(spec) => scale_of_sequences(spec).map(|scale| scale.to_string()),
            DataSpec::Text(_) => None,
        },
        step,
    };
    write(output, format, &network, &about, &tensors)?;
    let written = if part == Part::Lstm { network.lstm_only() } else { network.clone() };
    let mut warnings = Vec::new();
    if let (Format::Safetensors, Some(reason)) = (format, &network.beyond_torch) {
        warnings.push(format!("torch.nn.LSTM computes something else from this file: {reason}"));
    }
    let summary = json!({
        "task": config.task.name(),
        "step": step,
        "format": format,
        "part": part,
        "parameters": written.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum::<usize>(),
        "bytes": std::fs::metadata(output).map(|found| found.len()).ok(),
        "output": output.display().to_string(),
    });
    Ok((summary.as_object().cloned().unwrap_or_default(), warnings))
}

/// How numbers of a series become inputs, `(x - offset) / scale`, and outputs become numbers, `offset + scale * y`. Where a column is relative,
/// its offset is the last value of the window instead.
fn scale(spec: &SeriesSpec, levels: Option<Levels>) -> Value {
    let column =
        |column: &Column, scale: f64| json!({ "name": column.name, "relative": column.relative, "offset": column.mean, "scale": scale });
    let inputs: Vec<Value> = spec.inputs.iter().map(|c| column(c, c.spread)).collect();
    let targets: Vec<Value> = spec.target_columns().map(|c| column(c, c.std)).collect();
    let quantiles: Vec<f64> = levels.iter().flat_map(|levels| levels.values().collect::<Vec<f64>>()).collect();
    json!({
        "quantiles": quantiles,
        "window": spec.window,
        "horizon": spec.horizon,
        "inputs": inputs,
        "calendar": spec.calendar,
        "outputs": targets,
        "rule": "input = (x - offset) / scale; value = offset + scale * output; offset is the window's last value where relative; \
                 output[step * targets + target], with quantiles output[(step * targets + target) * quantiles + quantile]; calendar adds sine and cosine of the season's phase as last inputs",
    })
}

/// As [`scale`], for features and labels of sequences; none where tokens go in and classes come out.
fn scale_of_sequences(spec: &SequencesSpec) -> Option<Value> {
    let column = |column: &Scaled| json!({ "name": column.name, "relative": false, "offset": column.mean, "scale": column.std });
    let inputs: Vec<Value> = match &spec.step {
        StepSpec::Features(features) => features.iter().map(column).collect(),
        StepSpec::Tokens(_) | StepSpec::Notes(_) => Vec::new(),
    };
    let outputs: Vec<Value> = match &spec.label {
        LabelSpec::Number(scale) => vec![column(scale)],
        LabelSpec::Classes(_) | LabelSpec::Tags(_) | LabelSpec::Frames(_) => Vec::new(),
    };
    let rule = "input = (x - offset) / scale; value = offset + scale * output";
    (!inputs.is_empty() || !outputs.is_empty()).then(|| json!({ "inputs": inputs, "outputs": outputs, "rule": rule }))
}

/// Makes a run folder of a model file. `has_data` says that `config.data` was named by the person, not by the file. Warnings come back beside
/// the summary.
///
/// # Errors
/// Tensors that do not fit the configuration, by name; data that cannot be read; a folder that holds a run already.
pub fn import(file: ModelFile, config: &RunConfig, has_data: bool, out: &Path) -> Result<(Map<String, Value>, Vec<String>)> {
    let path = file.path.clone();
    let recorded: Option<DataSpec> = match &file.about {
        Some(about) => Some(
            serde_json::from_str(&about.data).map_err(|e| UsageError(format!("{}: `data` is not of this version: {e}", path.display())))?,
        ),
        None => None,
    };
    let mut warnings = Vec::new();
    let spec = match recorded {
        Some(spec) if !has_data => spec,
        recorded => {
            let corpus = Corpus::load(config, recorded.as_ref())?;
            warnings.extend(corpus.warnings());
            corpus.spec()
        }
    };
    let model = model_config(config, &spec);
    model.check()?;
    let table = model.table();
    let names = || table.tensors().iter().map(|t| (t.name.clone(), t.shape.clone()));
    let fresh = initial(&model, &table, config.init, config.gate_bias, config.seed);
    let fresh: Vec<NamedTensor> = names().zip(fresh).map(|((name, shape), data)| NamedTensor { name, shape, data }).collect();
    let step = file.about.as_ref().map(|about| about.step);
    let (tensors, started) = file.into_parameters(&describe(&model), &fresh)?;
    if !started.is_empty() {
        warnings.push(format!(
            "{} holds no {}: they start as in training (--init {}, --seed {})",
            path.display(),
            started.join(", "),
            config.init,
            config.seed
        ));
    }
    let imported = json!({ "file": path.display().to_string(), "step": step });
    let mut tensors = tensors;
    if let (true, Some(embedding)) = (config.tied, tensors.iter().find(|t| t.name == "embedding.weight").cloned()) {
        tensors.push(NamedTensor { name: "head.weight".to_owned(), ..embedding });
    }
    let mut folder = RunFolder::create(out)?;
    folder.write_file(CONFIG, toml::to_string_pretty(config).context("the configuration cannot be written as TOML")?.as_bytes())?;
    folder.write_file(DATA_FILE, serde_json::to_string(&DataRecord { spec, fingerprint: None })?.as_bytes())?;
    let checkpoint = Checkpoint { meta: json!({ "step": 0, "imported": imported }), tensors };
    let saved = folder.save(&checkpoint, None, config.keep, config.select)?;
    warnings.extend(saved.warnings);
    let summary = json!({
        "task": config.task.name(),
        "imported": imported,
        "parameters": table.n_parameters(),
        "fresh": started,
        "run": folder.path(),
    });
    Ok((summary.as_object().cloned().unwrap_or_default(), warnings))
}
