//! What is in a run folder, and what tells several of them apart. Reads records only: no device is opened, no data is read, nothing is
//! written but the picture that was asked for.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::session::{read_config, read_data};
use super::task::{DataRecord, DataSpec, model_config};
use crate::observe::plot::{self, Series};
use crate::observe::sinks::{History, history};
use crate::store::config::RunConfig;
use crate::store::run_folder::{CONFIG, METRICS, RunFolder, SUMMARY};
use crate::usage::UsageError;

/// The records of a run folder; what a start that was killed early has not written is missing.
struct Records {
    folder: RunFolder,
    config: RunConfig,
    data: Option<DataRecord>,
    history: History,
    /// What the finished run came to.
    summary: Map<String, Value>,
}

impl Records {
    fn read(run: &Path) -> Result<Self> {
        let folder = RunFolder::read(run)?;
        UsageError::unless(folder.path().join(CONFIG).exists(), || {
            format!("{} has no {CONFIG}: its run was ended before it began, and train --out {0} begins it anew", folder.path().display())
        })?;
        let config = read_config(&folder)?;
        let has = |name: &str| folder.path().join(name).exists();
        let data = if has(super::task::DATA_FILE) { Some(read_data(&folder)?) } else { None };
        let history = if has(METRICS) { history(&folder.file_path(METRICS)?)? } else { History::default() };
        let summary = folder.read_file(SUMMARY).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        Ok(Self { folder, config, data, history, summary })
    }

    /// Steps of the last checkpoint.
    fn n_steps(&self) -> u64 {
        self.folder.last().map_or(0, |last| last.step)
    }

    /// `finished`, `unfinished`, or `not begun` where there is no checkpoint of a step.
    fn state(&self) -> &'static str {
        match self.folder.last() {
            None => "not begun",
            Some(last) if self.summary.get("steps").and_then(Value::as_u64) == Some(last.step) => "finished",
            Some(last) if last.step == 0 => "not begun",
            Some(_) => "unfinished",
        }
    }

    fn n_parameters(&self) -> Option<usize> {
        self.data.as_ref().map(|data| model_config(&self.config, &data.spec).table().n_parameters())
    }

    /// A field of the last start's event.
    fn started(&self, key: &str) -> Option<&Value> {
        self.history.starts.last()?.get(key)
    }

    /// What the summary of a finished run says, else what is known so far.
    fn result(&self, key: &str) -> Value {
        let last = |points: &[(f64, f64)]| points.last().map(|point| point.1);
        let known = self.summary.get(key).cloned().filter(|_| self.state() == "finished");
        known.unwrap_or_else(|| match key {
            "train_loss" => json!(last(&self.history.train)),
            "valid_loss" => json!(self.folder.best().and_then(|best| best.valid_loss).or(last(&self.history.valid))),
            "tokens_per_second" => json!(last(&self.history.tokens_per_second)),
            _ => Value::Null,
        })
    }
}

/// What the summary of a run has beside its results.
const NO_SCORES: [&str; 13] = [
    "status",
    "task",
    "steps",
    "epochs",
    "tokens",
    "seconds",
    "tokens_per_second",
    "train_loss",
    "valid_loss",
    "test_loss",
    "devices",
    "run",
    "selected_step",
];

/// What is in a run folder: `run`, `task`, `state`, `steps`, `model`, `data`, `results`, `checkpoints`, `devices`, `version`, `files`.
///
/// # Errors
/// No run there; a record that is damaged.
pub fn inspect(run: &Path) -> Result<Map<String, Value>> {
    let records = Records::read(run)?;
    let config = serde_json::to_value(&records.config)?;
    let marks = |step: u64| -> Vec<&str> {
        let named = [("last", records.folder.last()), ("best", records.folder.best()), ("selected", records.folder.selected())];
        named.into_iter().filter(|(_, entry)| entry.is_some_and(|entry| entry.step == step)).map(|(name, _)| name).collect()
    };
    let size = |path: PathBuf| fs::metadata(path).map(|found| found.len()).ok();
    let checkpoints: Vec<Value> = records
        .folder
        .entries()
        .iter()
        .map(|entry| {
            let bytes = size(records.folder.path().join(&entry.file));
            json!({ "step": entry.step, "valid_loss": entry.valid_loss, "bytes": bytes, "is": marks(entry.step), "file": entry.file })
        })
        .collect();
    let results =
        ["train_loss", "valid_loss", "test_loss", "seconds", "tokens_per_second"].map(|key| (key.to_owned(), records.result(key)));
    let mut results: Map<String, Value> = results.into_iter().filter(|(_, value)| !value.is_null()).collect();
    if records.state() == "finished" {
        let scores = records.summary.iter().filter(|(key, _)| !NO_SCORES.contains(&key.as_str()) && *key != "parameters");
        results.extend(scores.map(|(key, value)| (key.clone(), value.clone())));
    }
    let best = records.folder.best().map(|best| json!({ "step": best.step, "valid_loss": best.valid_loss }));
    let summary = json!({
        "run": records.folder.path(),
        "task": records.config.task.name(),
        "state": records.state(),
        "steps": records.n_steps(),
        "best": best,
        "model": model(&records, &config),
        "data": data(&records),
        "results": results,
        "checkpoints": checkpoints,
        "devices": records.started("devices").cloned().unwrap_or_else(|| json!([])),
        "version": records.started("version"),
        "system": records.started("system"),
        "starts": records.history.starts.len(),
        "warnings": records.history.warnings,
        "files": files(records.folder.path())?,
        "config": config,
    });
    Ok(summary.as_object().cloned().unwrap_or_default())
}

/// Sizes, the options that are switched on, and the tensors.
fn model(records: &Records, config: &Value) -> Value {
    let lstm = serde_json::to_value(records.config.lstm).unwrap_or_default();
    let is_on = |value: &Value| value.as_bool().unwrap_or(false) || value.as_f64().is_some_and(|x| x != 0.0);
    let options = lstm.as_object().into_iter().flatten().filter(|(_, value)| is_on(value));
    let mut model: Map<String, Value> = ["layers", "hidden", "embedding", "tied", "dropout", "seq_len"]
        .into_iter()
        .filter_map(|key| Some((key.to_owned(), config.get(key)?.clone())))
        .filter(|(key, value)| is_on(value) || key == "layers" || key == "hidden")
        .chain(options.map(|(key, value)| (key.clone(), value.clone())))
        .collect();
    if let Some(data) = &records.data {
        let table = model_config(&records.config, &data.spec).table();
        let tensors = table.tensors().iter();
        model.insert("parameters".to_owned(), json!(table.n_parameters()));
        model.insert("tensors".to_owned(), tensors.map(|tensor| json!({ "name": tensor.name, "shape": tensor.shape })).collect());
    }
    model.into()
}

fn data(records: &Records) -> Value {
    let mut about = Map::new();
    about.insert("paths".to_owned(), json!(records.config.data));
    let Some(record) = &records.data else { return about.into() };
    if let DataSpec::Text(vocab) = &record.spec {
        about.insert("level".to_owned(), json!(records.config.level));
        about.insert("vocabulary".to_owned(), json!(vocab.size()));
    } else if let DataSpec::Series(spec) = &record.spec {
        about.insert("inputs".to_owned(), spec.inputs.iter().map(|column| column.name.clone()).collect());
        about.insert("targets".to_owned(), spec.target_columns().map(|column| column.name.clone()).collect());
        about.insert("window".to_owned(), json!(spec.window));
        about.insert("horizon".to_owned(), json!(spec.horizon));
    }
    if let Some(fingerprint) = &record.fingerprint {
        about.insert("length".to_owned(), json!(fingerprint.length));
        about.insert("sha256".to_owned(), json!(fingerprint.sha256));
    }
    about.into()
}

/// The files of the folder itself with their sizes.
fn files(folder: &Path) -> Result<Value> {
    let mut files = Map::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let about = entry.metadata()?;
        if about.is_file() && !name.starts_with('.') {
            files.insert(name, json!(about.len()));
        }
    }
    Ok(files.into())
}

/// A comparison of runs, and what should be known of it.
pub struct Comparison {
    /// `runs` (each with `run`, `name`, `config` as far as it differs, `results`), `differing`, `picture`.
    pub summary: Map<String, Value>,
    pub warnings: Vec<String>,
}

/// More curves than this have no colours of their own.
const MOST_CURVES: usize = 7;

/// What differs between the configurations of runs, and between their results. Their loss curves are drawn into `STEM.svg` and `STEM.png`.
///
/// # Errors
/// Fewer than two runs; no run in a folder; the picture cannot be written.
pub fn compare(runs: &[PathBuf], picture: &Path) -> Result<Comparison> {
    UsageError::unless(runs.len() > 1, || {
        "one run alone is compared with nothing: name at least two, or look at it with inspect".to_owned()
    })?;
    let records = runs.iter().map(|run| Records::read(run)).collect::<Result<Vec<_>>>()?;
    let names = names(&records);
    let configs: Vec<Map<String, Value>> =
        records.iter().map(|one| Ok(serde_json::to_value(&one.config)?.as_object().cloned().unwrap_or_default())).collect::<Result<_>>()?;
    let mut keys: Vec<&String> = configs.iter().flat_map(Map::keys).collect();
    keys.sort_unstable();
    keys.dedup();
    keys.retain(|key| configs.iter().any(|config| config.get(*key) != configs[0].get(*key)));
    let shown = records.iter().zip(&configs).zip(&names).map(|((one, config), name)| {
        let config: Map<String, Value> = keys.iter().map(|&key| (key.clone(), config.get(key).cloned().unwrap_or_default())).collect();
        json!({ "run": one.folder.path(), "name": name, "config": config, "results": results(one) })
    });
    let shown: Vec<Value> = shown.collect();

    let mut warnings = Vec::new();
    let fingerprint = |one: &Records| one.data.as_ref().and_then(|data| data.fingerprint.clone());
    if records.iter().any(|one| fingerprint(one) != fingerprint(&records[0])) {
        warnings.push("these runs were trained on different data, or read them differently: their losses do not compare".to_owned());
    }
    if records.len() > MOST_CURVES {
        warnings.push(format!("{} runs share {MOST_CURVES} colours in the picture", records.len()));
    }
    // The validation part is what runs are judged by; where one has none, all are drawn by the steps of training.
    let valid = records.iter().all(|one| one.history.valid.len() > 1);
    let curves = records.iter().zip(&names).map(|(one, name)| {
        let points = if valid { &one.history.valid } else { &one.history.train };
        Series { name: name.clone(), points: points.clone() }
    });
    let title = if valid { "Loss on the validation part" } else { "Training loss" };
    plot::loss_curve(picture, &curves.collect::<Vec<_>>(), title, "loss")?;
    let written = |extension: &str| format!("{}.{extension}", picture.display());
    let summary = json!({ "runs": shown, "differing": keys, "picture": [written("svg"), written("png")] });
    Ok(Comparison { summary: summary.as_object().cloned().unwrap_or_default(), warnings })
}

/// What a run came to, in one row.
fn results(one: &Records) -> Map<String, Value> {
    let mut results = Map::new();
    let mut add = |key: &str, value: Value| drop(results.insert(key.to_owned(), value));
    add("state", json!(one.state()));
    add("steps", json!(one.n_steps()));
    add("parameters", json!(one.n_parameters()));
    for key in ["seconds", "tokens_per_second", "train_loss", "valid_loss", "test_loss"] {
        add(key, one.result(key));
    }
    for key in ["perplexity", "accuracy", "macro_f1"] {
        let value = one.result(key);
        if !value.is_null() {
            add(key, value);
        }
    }
    if let Some(rmse) = one.result("rmse").get("model") {
        add("rmse", rmse.clone());
    }
    results
}

/// The folders' own names, or their whole paths where names are the same.
fn names(records: &[Records]) -> Vec<String> {
    let path = |one: &Records| one.folder.path().display().to_string();
    let name = |one: &Records| one.folder.path().file_name().map_or_else(|| path(one), |name| name.to_string_lossy().into_owned());
    let mut names: Vec<String> = records.iter().map(name).collect();
    let is_taken = |names: &[String], at: usize| names.iter().enumerate().any(|(i, name)| i != at && *name == names[at]);
    if (0..names.len()).any(|at| is_taken(&names, at)) {
        names = records.iter().map(path).collect();
    }
    names
}
