//! What goes on inside the cells while a network reads: gates and cell states by step, as Karpathy, Johnson and Fei-Fei 2015 look at them.

use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::session::Session;
use super::task::{Corpus, DataSpec, OtherData};
use crate::data::sequences::Labelled;
use crate::data::{Batch, Input};
use crate::model::Words;
use crate::observe::plot::{self, Activations, UnitTrace};
use crate::shape::GATES;
use crate::usage::UsageError;

/// What is looked at.
#[derive(Clone, Debug)]
pub struct Looking {
    /// A text for a language model, else a file like the run's data: of a series its end is read, of sequences the first one.
    pub over: String,
    /// The layer, from 1; by default the last.
    pub layer: Option<usize>,
    /// Units, from 1; by default those whose cell state changes most.
    pub units: Vec<usize>,
}

/// Steps that a page has room for; the last ones are shown.
const MOST_STEPS: usize = 100;
/// Units that a page has room for.
const MOST_UNITS: usize = 8;

/// Draws the gates and the cell state of some units of a layer over what is read into `STEM.svg` and `STEM.png`. The numbers come back: `steps`
/// (what was read), `units` (each with `unit`, `direction`, `c`, `input`, `forget`, `cell`, `output`), and `saturated`: by gate the share of steps and units
/// of the layer below 0.1 and above 0.9.
///
/// # Errors
/// A text with symbols that the run does not know; data that cannot be read; a layer or a unit that is not there; the device's.
pub fn activations(session: &mut Session, looking: &Looking, stem: &Path) -> Result<Map<String, Value>> {
    let (input, steps) = read(session, &looking.over)?;
    let n_steps = steps.len();
    UsageError::unless(n_steps > 0, || "--activations has no step to look at: give a longer text or file".to_owned())?;
    let traces = session.trace(
        n_steps,
        match &input {
            Input::Tokens(tokens) => Words::Tokens(tokens),
            Input::Values { values, .. } => Words::Values(values),
        },
    )?;
    let model = session.model_config();
    let (n_layers, n_directions) = (model.n_layers, model.n_directions());
    let layer = looking.layer.unwrap_or(n_layers);
    UsageError::unless((1..=n_layers).contains(&layer), || format!("--layer is {layer}, but the model has layers 1 to {n_layers}"))?;
    let n_units = model.hidden.of(layer - 1);
    let lanes = &traces[(layer - 1) * n_directions..layer * n_directions];
    for &unit in &looking.units {
        UsageError::unless((1..=n_units).contains(&unit), || format!("--units names {unit}, but layer {layer} has units 1 to {n_units}"))?;
    }
    UsageError::unless(looking.units.len() <= MOST_UNITS, || {
        format!("--units names {}, but a picture has room for {MOST_UNITS}", looking.units.len())
    })?;
    let mut chosen: Vec<(usize, usize)> = looking.units.iter().map(|unit| (0, unit - 1)).collect();
    if chosen.is_empty() {
        chosen = (0..n_directions).flat_map(|d| (0..n_units).map(move |unit| (d, unit))).collect();
        let spread = |&(d, unit): &(usize, usize)| {
            let values: Vec<f64> = (0..n_steps).map(|t| f64::from(lanes[d].cells[t * n_units + unit]).tanh()).collect();
            let mean = values.iter().sum::<f64>() / n_steps as f64;
            values.iter().map(|v| (v - mean).powi(2)).sum::<f64>()
        };
        chosen.sort_by(|a, b| spread(b).total_cmp(&spread(a)));
        chosen.truncate(MOST_UNITS);
    }
    let units: Vec<UnitTrace> = chosen
        .into_iter()
        .map(|(d, unit)| {
            let of = |values: &[f32]| -> Vec<f64> { values.iter().skip(unit).step_by(n_units).map(|&v| f64::from(v)).collect() };
            let direction = if d == 1 { " reverse" } else { "" };
            UnitTrace {
                name: format!("unit {}{direction}", unit + 1),
                cell: of(&lanes[d].cells).into_iter().map(f64::tanh).collect(),
                gates: std::array::from_fn(|gate| of(&lanes[d].gates[gate])),
            }
        })
        .collect();
    let shown = n_steps.saturating_sub(MOST_STEPS);
    let drawn = Activations {
        title: format!("Layer {layer}: tanh of the cell state, and the gates"),
        steps: steps[shown..].to_vec(),
        units: units.iter().map(|unit| unit.from(shown)).collect(),
    };
    plot::activations(stem, &drawn)?;
    let share = |gate: usize, test: &dyn Fn(f32) -> bool| {
        let all = || lanes.iter().flat_map(|lane| &lane.gates[gate]);
        all().filter(|&&value| test(value)).count() as f64 / all().count().max(1) as f64
    };
    let saturated = [(0, "input"), (1, "forget"), (3, "output")]
        .map(|(gate, name)| (name.to_owned(), json!({ "below_0.1": share(gate, &|v| v < 0.1), "above_0.9": share(gate, &|v| v > 0.9) })));
    let units: Vec<Value> = units
        .iter()
        .map(|unit| {
            let [i, f, g, o] = &unit.gates;
            json!({ "unit": unit.name, "c": unit.cell, "input": i, "forget": f, "cell": g, "output": o })
        })
        .collect();
    let picture = ["svg", "png"].map(|extension| format!("{}.{extension}", stem.display()));
    let found = json!({ "layer": layer, "steps": steps, "units": units, "saturated": Map::from_iter(saturated), "picture": picture });
    Ok(found.as_object().cloned().unwrap_or_default())
}

/// What goes in, and what each step is called.
fn read(session: &Session, over: &str) -> Result<(Input, Vec<String>)> {
    if let DataSpec::Text(vocab) = &session.spec {
        let tokens = vocab.encode_prompt(over)?;
        let steps = tokens.iter().map(|&token| vocab.decode(&[token])).collect();
        return Ok((Input::Tokens(tokens), steps));
    }
    let batch: Batch = match Corpus::load_other(&session.config, &[over.to_owned()], &session.spec, Labelled::Some)? {
        OtherData::Series(series) => series.latest_window(),
        OtherData::Sequences(sequences) => sequences.batch_of(&[0]),
        OtherData::Text(_) => anyhow::bail!("a text is read by a language model"),
    };
    let steps = (1..=batch.n_steps).map(|t| t.to_string()).collect();
    Ok((batch.input, steps))
}

/// What one layer in one direction did at each step, in the order of time.
pub struct LaneTrace {
    /// Activated, in the order i, f, g, o: `[T, H]` each.
    pub gates: [Vec<f32>; GATES],
    /// `[T, H]`.
    pub cells: Vec<f32>,
}
