//! The loss and the scores of a part of the data; training calls this for its own evaluations.

use std::sync::Arc;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::task::EvalSet;
use crate::data::Batch;
use crate::data::baselines::{Scorer, Scores, baselines};
use crate::data::series::Series;
use crate::model::state::Carried;

/// What computes a batch: one model, or a group of workers. Returns the summed loss and, if wanted, the outputs `[rows, columns]`.
pub trait Forward {
    /// # Errors
    /// The device's.
    fn forward(&mut self, batch: &Arc<Batch>, carried: Option<&mut Carried>, wants_outputs: bool) -> Result<(f64, Vec<f32>)>;
    /// Zero state for that many streams.
    fn carried(&self, n_streams: usize) -> Carried;
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// Mean over terms: nats a token, or the squared error on the normalised scale.
    pub loss: f64,
    /// Terms.
    pub weight: f64,
    pub forecast: Option<ForecastScores>,
}

/// The model beside the naive forecasts, over the same windows.
#[derive(Clone, Debug)]
pub struct ForecastScores {
    pub model: Scores,
    pub baselines: Vec<(&'static str, Scores)>,
    /// Names of the columns that are forecast, as the scores have them.
    pub targets: Vec<String>,
    /// Windows by the row of their last input, and what the model says of each, in the unit, `[O]`.
    pub origins: Vec<u32>,
    pub values: Vec<Vec<f64>>,
}

/// Runs over the whole set.
///
/// # Errors
/// The device's.
pub fn evaluate(set: &EvalSet, forward: &mut dyn Forward) -> Result<Evaluation> {
    evaluate_watched(set, forward, None)
}

/// Gets each batch with the model's outputs for it, `[rows, columns]`.
pub type Watch<'w> = &'w mut dyn FnMut(&Batch, &[f32]);

/// As [`evaluate`]; `watch` sees what the model says.
///
/// # Errors
/// The device's.
pub fn evaluate_watched(set: &EvalSet, forward: &mut dyn Forward, mut watch: Option<Watch<'_>>) -> Result<Evaluation> {
    let mut carried = (set.n_streams > 0).then(|| forward.carried(set.n_streams));
    let (mut loss, mut weight) = (0.0, 0.0);
    let mut scorer = set.series.as_ref().map(|(series, part)| (Scorer::new(series), series, *part, Vec::new(), Vec::new()));
    for idx in 0..set.batches.n_batches() {
        let batch = Arc::new(set.batches.batch(0, idx));
        if let Some(carried) = carried.as_mut().filter(|_| batch.resets) {
            carried.reset();
        }
        let (sum, outputs) = forward.forward(&batch, carried.as_mut(), scorer.is_some() || watch.is_some())?;
        if let Some(watch) = &mut watch {
            watch(&batch, &outputs);
        }
        loss += sum;
        weight += batch.weight;
        if let Some((scorer, series, _, origins, values)) = &mut scorer {
            for (&origin, row) in batch.streams.iter().zip(outputs.chunks_exact(series.spec().n_outputs())) {
                scorer.add_outputs(series, origin, row);
                origins.push(origin);
                values.push(series.denormalise(origin, row));
            }
        }
    }
    let forecast = scorer.map(|(scorer, series, part, origins, values)| ForecastScores {
        model: scorer.scores(),
        baselines: baselines(series, part),
        targets: series.spec().target_columns().map(|column| column.name.clone()).collect(),
        origins,
        values,
    });
    Ok(Evaluation { loss: loss / weight, weight, forecast })
}

impl Evaluation {
    /// The scores beside the loss, as every summary has them.
    pub fn scores(&self) -> Map<String, Value> {
        let mut map = Map::new();
        match &self.forecast {
            None => {
                map.insert("perplexity".into(), json!(self.loss.exp()));
            }
            Some(forecast) => {
                let baselines: Map<String, Value> = forecast.baselines.iter().map(|(name, s)| ((*name).to_owned(), json!(s.mse))).collect();
                map.insert("baselines".into(), Value::Object(baselines));
                let by_target: Vec<(&String, Value)> = forecast
                    .targets
                    .iter()
                    .zip((0..).map(|k| self.rmse(k).into_iter().map(|(name, r)| (name, json!(r))).collect()))
                    .collect();
                map.insert("rmse".into(), by_target.first().map_or(Value::Null, |(_, rmse)| rmse.clone()));
                if by_target.len() > 1 {
                    let named = by_target.into_iter().map(|(name, rmse)| (name.clone(), rmse));
                    map.insert("rmse_by_target".into(), Value::Object(named.collect()));
                }
            }
        }
        map
    }

    /// Root mean squared errors of target `k` at the last step of the horizon in its unit: the model's, then each baseline's.
    pub fn rmse(&self, k: usize) -> Vec<(String, f64)> {
        let Some(forecast) = &self.forecast else { return Vec::new() };
        let all = std::iter::once(("model", &forecast.model)).chain(forecast.baselines.iter().map(|(name, scores)| (*name, scores)));
        all.map(|(name, scores)| (name.to_owned(), scores.rmse.get(k).and_then(|r| r.last().copied()).unwrap_or(f64::NAN))).collect()
    }
}

/// The truth at the last step of the horizon, where it is known: for plots.
pub fn truth_at_end(series: &Series, origin: u32) -> Option<f64> {
    let n_targets = series.spec().targets.len();
    let truth = series.truth(origin);
    truth[truth.len() - n_targets]
}
