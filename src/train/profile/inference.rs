//! What it costs to use a network: time steps one a call with the state carried on, or a whole sequence a call.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::{Workload, median, of_kernels, open_one, peak_rss_bytes};
use crate::backend::Backend;
use crate::data::Input;
use crate::infer::session::{Replica, share_of};
use crate::kernels::probe;
use crate::model::Words;
use crate::model::config::{self, ModelConfig};
use crate::model::init::{Init, initial};
use crate::pool::Isa;
use crate::shape::{GATES, pad_inner, pad_units};
use crate::train::devices::Resolved;
use crate::train::watched::{Notes, Watched, noted};

/// Calls before the clock starts: the workspace grows, weights come into the caches.
const WARM_UP: usize = 20;
/// Calls in which the device is waited for after every kernel.
const WATCHED_CALLS: u32 = 20;

/// A network that is asked.
struct Asked {
    replica: Replica,
    state: Vec<f32>,
    /// Tokens or numbers of all time steps, `[T, B, ..]`.
    input: Input,
    n_steps: usize,
    n_rows: usize,
    by_step: bool,
    next: usize,
}

impl Asked {
    fn new(workload: &Workload, by_step: bool, backend: Box<dyn Backend>) -> Result<Self> {
        let model = workload.model.clone();
        let params = initial(&model, &model.table(), Init::Uniform(0.1), None, 1);
        let replica = Replica::new(model, &params, backend)?;
        let batch = workload.batch(1);
        let input = share_of(&batch, None, 0.0).input;
        let input = match input {
            Words::Tokens(tokens) => Input::Tokens(tokens.to_vec()),
            Words::Values(values) => Input::Values { values: values.to_vec(), n_features: values.len() / (batch.n_steps * batch.n_rows) },
        };
        Ok(Self { replica, state: Vec::new(), input, n_steps: batch.n_steps, n_rows: batch.n_rows, by_step, next: 0 })
    }

    /// Time steps a call.
    fn steps(&self) -> usize {
        if self.by_step { 1 } else { self.n_steps }
    }

    /// One call. A stream of steps goes round the made-up data for ever; a sequence starts from nothing every time.
    fn call(&mut self) -> Result<()> {
        let steps = self.steps();
        let places = self.next * self.n_rows..(self.next + steps) * self.n_rows;
        let words = match &self.input {
            Input::Tokens(tokens) => Words::Tokens(&tokens[places]),
            Input::Values { values, n_features } => Words::Values(&values[places.start * n_features..places.end * n_features]),
        };
        let state = self.by_step.then_some(&mut self.state);
        self.replica.ask(words, [steps, self.n_rows], state, false)?;
        self.next = (self.next + steps) % self.n_steps;
        Ok(())
    }
}

/// Bytes of parameters that one row needs at each time step, whatever came before: those of the sweeps, and where every step has outputs of the head.
/// In a whole sequence the weights of inputs are read once for many steps.
fn weight_bytes(model: &ModelConfig, by_step: bool) -> usize {
    let mut floats = 0;
    let mut width = match model.input {
        config::Input::Tokens { width, .. } => pad_units(width),
        config::Input::Values { n_features } => pad_inner(n_features),
    };
    for layer in 0..model.n_layers {
        let (hidden, out) = (pad_units(model.hidden.of(layer)), pad_units(model.layer_units(layer)));
        let projection = if model.lstm.proj_size > 0 { hidden * out } else { 0 };
        floats += model.n_directions() * (GATES * hidden * (out + if by_step { width } else { 0 }) + projection);
        width = out * model.n_directions();
    }
    if by_step {
        floats += width * pad_inner(model.n_outputs());
    }
    floats * size_of::<f32>()
}

/// Measures `calls` calls on one device.
pub(super) fn measure(workload: &Workload, device: &Resolved, by_step: bool, calls: usize) -> Result<Map<String, Value>> {
    let backend = open_one(device)?;
    let info = backend.info().clone();
    let mut asked = Asked::new(workload, by_step, backend)?;
    (0..WARM_UP.min(calls)).try_for_each(|_| asked.call())?;
    let mut times = Vec::with_capacity(calls);
    for _ in 0..calls {
        let start = Instant::now();
        asked.call()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let (middle, fastest, steps) = (median(&times), times[0], asked.steps() as f64);
    let of_step = |seconds: f64| json!(seconds * 1e6 / steps);
    let mut summary = Map::new();
    summary.insert("status".into(), json!("finished"));
    summary.insert("mode".into(), json!(if by_step { "infer-step" } else { "infer-seq" }));
    summary.insert("ms_per_step".into(), json!(middle * 1e3));
    summary.insert("us_per_time_step".into(), of_step(middle));
    summary.insert("fastest_us_per_time_step".into(), of_step(fastest));
    summary.insert("tokens_per_second".into(), json!(steps * asked.n_rows as f64 / middle));
    summary.insert("batch_size".into(), json!(asked.n_rows));
    summary.insert("calls".into(), json!(calls));
    summary.insert("peak_rss_bytes".into(), json!(peak_rss_bytes()));
    summary.insert("bytes_sent_per_step".into(), json!(0));
    summary.insert("ring_wait_share".into(), json!(0.0));
    summary.insert("devices".into(), json!([{ "device": device.spec, "name": info.name, "driver": info.driver }]));
    summary.insert("parameters".into(), json!(asked.replica.model().table().n_parameters()));
    if !info.is_gpu {
        // A core cannot be faster than it reads what every step needs.
        let bytes = weight_bytes(&workload.model, by_step);
        let bandwidth = probe::read_bandwidth(Isa::detect(), bytes);
        summary.insert("weight_bytes_per_time_step".into(), json!(bytes));
        summary.insert("cache_gb_per_second".into(), json!(bandwidth / 1e9));
        summary.insert("floor_us_per_time_step".into(), json!(bytes as f64 / bandwidth * 1e6));
    }
    drop(asked);
    let notes = Notes::shared();
    let mut asked = Asked::new(workload, by_step, Watched::timing(open_one(device)?, &notes))?;
    (0..2).try_for_each(|_| asked.call())?;
    noted(&notes).kernels.clear();
    (0..WATCHED_CALLS).try_for_each(|_| asked.call())?;
    drop(asked);
    summary.insert("kernels".into(), of_kernels(&noted(&Arc::clone(&notes)), WATCHED_CALLS));
    Ok(summary)
}
