//! The loss and the scores of a part of the data; training calls this for its own evaluations.

use std::sync::Arc;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::task::{EvalSet, Truth};
use crate::data::Batch;
use crate::data::baselines::{Scorer, Scores, baselines_at};
use crate::data::sequences::{LabelSpec, Sequences};
use crate::data::series::Series;
use crate::model::config::Levels;
use crate::model::state::Carried;
use crate::observe::Table;

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
    /// Mean over terms: nats a token, a step, a frame or a sequence, or the squared error on the normalised scale.
    pub loss: f64,
    /// Terms.
    pub weight: f64,
    pub judged: Judged,
}

/// What there is to say of a model beside its loss.
#[derive(Clone, Debug)]
pub enum Judged {
    Text,
    Forecast(ForecastScores),
    Classes(ClassScores),
    Numbers(NumberScores),
    Frames(FrameScores),
}

/// Notes that were told against those that sounded. A note counts as told where its odds are even or better.
#[derive(Clone, Debug, PartialEq)]
pub struct FrameScores {
    /// By note: told and sounded, told alone, sounded alone.
    pub counts: Vec<[u64; 3]>,
    /// The negative log-likelihood a frame of always giving each note the odds that it has in the training part.
    pub frequency_loss: f64,
}

impl FrameScores {
    /// Notes told rightly, as a share of all that were told or sounded (Bay, Ehmann and Downie 2009).
    pub fn accuracy(&self) -> f64 {
        let sums = self.counts.iter().fold([0, 0], |[hits, all], counts| [hits + counts[0], all + counts.iter().sum::<u64>()]);
        sums[0] as f64 / sums[1] as f64
    }

    /// The mean of all notes' F1; notes that neither sounded nor were told do not count.
    pub fn macro_f1(&self) -> f64 {
        let f1 = |[both, told, sounded]: &[u64; 3]| 2.0 * *both as f64 / (2 * both + told + sounded) as f64;
        let counted: Vec<f64> = self.counts.iter().filter(|counts| counts.iter().any(|&n| n > 0)).map(f1).collect();
        counted.iter().sum::<f64>() / counted.len() as f64
    }
}

/// A classifier against the truth.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassScores {
    pub classes: Vec<String>,
    /// `[truth, predicted]`.
    pub confusion: Vec<Vec<u64>>,
    /// The class that the training part has most of: what a classifier says that has not looked.
    pub majority: usize,
}

impl ClassScores {
    fn new(classes: Vec<String>, majority: usize) -> Self {
        let confusion = vec![vec![0; classes.len()]; classes.len()];
        Self { classes, confusion, majority }
    }

    fn share_of(&self, hits: u64) -> f64 {
        hits as f64 / self.confusion.iter().flatten().sum::<u64>() as f64
    }

    /// Sequences, or steps, whose class was said, as a share of all.
    pub fn accuracy(&self) -> f64 {
        self.share_of((0..self.classes.len()).map(|c| self.confusion[c][c]).sum())
    }

    /// The accuracy of always saying [`Self::majority`].
    pub fn majority_accuracy(&self) -> f64 {
        self.share_of(self.confusion[self.majority].iter().sum())
    }

    /// The mean of all classes' F1, the harmonic mean of precision and recall; classes that neither occur nor were said do not count.
    pub fn macro_f1(&self) -> f64 {
        let f1: Vec<f64> = (0..self.classes.len())
            .filter_map(|c| {
                let (truth, said) = (self.confusion[c].iter().sum::<u64>(), self.confusion.iter().map(|row| row[c]).sum::<u64>());
                (truth + said > 0).then(|| 2.0 * self.confusion[c][c] as f64 / (truth + said) as f64)
            })
            .collect();
        f1.iter().sum::<f64>() / f1.len() as f64
    }
}

/// Numbers of sequences against the truth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NumberScores {
    /// Root mean squared error in the label's unit, the model's and that of always saying the mean of the training part.
    pub rmse: f64,
    pub mean_rmse: f64,
    /// Mean squared error on the normalised scale of always saying that mean.
    pub mean_loss: f64,
    /// Numbers that are further off than the tolerance, where there is one, and how many there are.
    pub wrong: Option<u64>,
    pub of: u64,
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
    /// Where quantiles are forecast; then `values` are those of the level nearest to one half.
    pub quantiles: Option<QuantileScores>,
}

/// Forecast quantiles against the truth.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantileScores {
    pub levels: Levels,
    /// By level: values that lay below the quantile, or on it.
    pub below: Vec<u64>,
    /// Values within the lowest and the highest quantile, ends included.
    pub within: u64,
    /// Values in all.
    pub of: u64,
    /// The sum of the distances from the lowest to the highest quantile, in the unit, of each target, and how many.
    pub widths: Vec<(f64, u64)>,
}

/// The quantiles of each value of a row of outputs `[O, levels]`, by level `[O]`. Quantiles that cross are put in order, which is never worse
/// (Chernozhukov, Fernandez-Val and Galichon 2010).
pub fn by_level(row: &[f32], levels: Levels) -> Vec<Vec<f32>> {
    let n = levels.count();
    let mut by_level = vec![Vec::with_capacity(row.len() / n.max(1)); n];
    for value in row.chunks_exact(n.max(1)) {
        let mut sorted = value.to_vec();
        sorted.sort_by(f32::total_cmp);
        by_level.iter_mut().zip(sorted).for_each(|(of_level, value)| of_level.push(value));
    }
    by_level
}

impl QuantileScores {
    fn new(levels: Levels, n_targets: usize) -> Self {
        Self { levels, below: vec![0; levels.count()], within: 0, of: 0, widths: vec![(0.0, 0); n_targets] }
    }

    /// A window's quantiles by level, in the unit, against its truth.
    fn add(&mut self, quantiles: &[Vec<f64>], truth: &[Option<f64>]) {
        let (lowest, highest) = (&quantiles[0], &quantiles[quantiles.len() - 1]);
        for (o, truth) in truth.iter().enumerate() {
            let Some(truth) = truth else { continue };
            self.below.iter_mut().zip(quantiles).for_each(|(n, quantile)| *n += u64::from(*truth <= quantile[o]));
            self.within += u64::from((lowest[o]..=highest[o]).contains(truth));
            self.of += 1;
            let n_targets = self.widths.len();
            let width = &mut self.widths[o % n_targets];
            *width = (width.0 + highest[o] - lowest[o], width.1 + 1);
        }
    }

    /// As the summary has it.
    fn summary(&self, targets: &[String]) -> Value {
        let share = |n: u64| n as f64 / self.of as f64;
        let levels: Vec<f64> = self.levels.values().collect();
        let below = levels.iter().zip(&self.below).map(|(level, &n)| json!({ "level": level, "below": share(n) }));
        let widths = targets.iter().zip(&self.widths).map(|(name, (sum, n))| (name.clone(), json!(sum / *n as f64)));
        json!({
            "levels": below.collect::<Vec<Value>>(),
            "coverage": share(self.within),
            "nominal": levels[levels.len() - 1] - levels[0],
            "mean_width": widths.collect::<Map<String, Value>>(),
        })
    }
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
    let mut judge = Judge::new(&set.truth);
    for idx in 0..set.batches.n_batches() {
        let batch = Arc::new(set.batches.batch(0, idx)?);
        if let Some(carried) = carried.as_mut().filter(|_| batch.resets) {
            carried.reset();
        }
        let (sum, outputs) = forward.forward(&batch, carried.as_mut(), set.truth.wants_outputs() || watch.is_some())?;
        if let Some(watch) = &mut watch {
            watch(&batch, &outputs);
        }
        loss += sum;
        weight += batch.weight;
        judge.add(&batch, &outputs);
    }
    Ok(Evaluation { loss: loss / weight, weight, judged: judge.judged() })
}

impl Judged {
    /// Adds what does not fit into a line: how often each class was taken for which.
    pub fn add_to(&self, table: Table) -> Table {
        /// Columns that a terminal shows.
        const MOST: usize = 20;
        let Self::Classes(scores) = self else { return table };
        if scores.classes.len() > MOST {
            return table;
        }
        let header: Vec<&str> = std::iter::once("truth").chain(scores.classes.iter().map(String::as_str)).collect();
        let row = |(class, counts): (&String, &Vec<u64>)| std::iter::once(class.clone()).chain(counts.iter().map(u64::to_string)).collect();
        table.columns("What was said of each class", &header, scores.classes.iter().zip(&scores.confusion).map(row).collect())
    }
}

/// Compares what a model says with the truth.
enum Judge<'s> {
    Text,
    Series {
        series: &'s Series,
        quantiles: Option<QuantileScores>,
        scorer: Scorer,
        origins: Vec<u32>,
        values: Vec<Vec<f64>>,
    },
    /// Of sequences, or of steps.
    Classes {
        sequences: &'s Sequences,
        scores: ClassScores,
    },
    /// Beside the counts the losses of the odds of the training part, and how many frames there are.
    Frames {
        sequences: &'s Sequences,
        frequency: &'s [f64],
        counts: Vec<[u64; 3]>,
        loss: f64,
        n: u64,
    },
    /// Sums of squared errors in the unit: the model's, and the mean's; how many; and how many are further off than the tolerance.
    Numbers {
        sequences: &'s Sequences,
        mean: f64,
        std: f64,
        squares: [f64; 2],
        n: u64,
        tolerance: Option<f64>,
        wrong: u64,
    },
}

impl<'s> Judge<'s> {
    fn new(truth: &'s Truth) -> Self {
        match truth {
            Truth::Text => Self::Text,
            Truth::Series(series, levels) => {
                let quantiles = levels.map(|levels| QuantileScores::new(levels, series.spec().targets.len()));
                Self::Series { series, quantiles, scorer: Scorer::new(series), origins: Vec::new(), values: Vec::new() }
            }
            Truth::Sequences(sequences, tolerance) => match &sequences.spec().label {
                LabelSpec::Frames(frequency) => {
                    Self::Frames { sequences, frequency, counts: vec![[0; 3]; frequency.len()], loss: 0.0, n: 0 }
                }
                LabelSpec::Classes(classes) | LabelSpec::Tags(classes) => {
                    // The first of those that are equal.
                    let most = classes.iter().map(|class| class.count).max();
                    let majority = classes.iter().position(|class| Some(class.count) == most).unwrap_or(0);
                    let names = classes.iter().map(|class| class.name.clone()).collect();
                    Self::Classes { sequences, scores: ClassScores::new(names, majority) }
                }
                LabelSpec::Number(scale) => {
                    Self::Numbers { sequences, mean: scale.mean, std: scale.std, squares: [0.0; 2], n: 0, tolerance: *tolerance, wrong: 0 }
                }
            },
        }
    }

    fn add(&mut self, batch: &Batch, outputs: &[f32]) {
        match self {
            Self::Text => {}
            Self::Series { series, quantiles, scorer, origins, values } => {
                let columns = series.spec().n_outputs() * quantiles.as_ref().map_or(1, |q| q.levels.count());
                for (&origin, row) in batch.streams.iter().zip(outputs.chunks_exact(columns)) {
                    let truth = series.truth(origin);
                    let said = match quantiles {
                        None => series.denormalise(origin, row),
                        Some(quantiles) => {
                            let by_level = by_level(row, quantiles.levels);
                            let mut by_level: Vec<Vec<f64>> = by_level.iter().map(|row| series.denormalise(origin, row)).collect();
                            quantiles.add(&by_level, &truth);
                            by_level.swap_remove(quantiles.levels.middle())
                        }
                    };
                    scorer.add(&said, &truth);
                    origins.push(origin);
                    values.push(said);
                }
            }
            Self::Classes { sequences, scores } if batch.is_of_steps() => {
                for ((i, t), row) in places(batch).zip(outputs.chunks_exact(scores.classes.len())) {
                    if let Some(truth) = sequences.tag(i, t) {
                        scores.confusion[truth as usize][likeliest(row)] += 1;
                    }
                }
            }
            Self::Frames { sequences, frequency, counts, loss, n } => {
                let mut sounds = vec![false; counts.len()];
                for ((i, t), row) in places(batch).zip(outputs.chunks_exact(counts.len().max(1))) {
                    sounds.fill(false);
                    sequences.next_frame(i, t).iter().for_each(|&note| sounds[usize::from(note)] = true);
                    for (((logit, &sounds), counts), p) in row.iter().zip(&sounds).zip(counts.iter_mut()).zip(frequency.iter()) {
                        match (*logit >= 0.0, sounds) {
                            (true, true) => counts[0] += 1,
                            (true, false) => counts[1] += 1,
                            (false, true) => counts[2] += 1,
                            (false, false) => {}
                        }
                        // A note that training never had gets odds of one in as many frames.
                        let p = p.clamp(1e-5, 1.0 - 1e-5);
                        *loss -= if sounds { p.ln() } else { (1.0 - p).ln() };
                    }
                    *n += 1;
                }
            }
            Self::Classes { sequences, scores } => {
                for (&i, row) in batch.streams.iter().zip(outputs.chunks_exact(scores.classes.len())) {
                    if let Some(truth) = sequences.class(i as usize) {
                        scores.confusion[truth as usize][likeliest(row)] += 1;
                    }
                }
            }
            Self::Numbers { sequences, mean, std, squares, n, tolerance, wrong } => {
                for (&i, &said) in batch.streams.iter().zip(outputs) {
                    let Some(truth) = sequences.number(i as usize) else { continue };
                    let error = *mean + *std * f64::from(said) - truth;
                    squares[0] += error.powi(2);
                    squares[1] += (*mean - truth).powi(2);
                    *n += 1;
                    *wrong += u64::from(tolerance.is_some_and(|tolerance| error.abs() > tolerance));
                }
            }
        }
    }

    fn judged(self) -> Judged {
        match self {
            Self::Text => Judged::Text,
            Self::Series { series, quantiles, scorer, origins, values } => Judged::Forecast(ForecastScores {
                model: scorer.scores(),
                baselines: baselines_at(series, &origins),
                quantiles,
                targets: series.spec().target_columns().map(|column| column.name.clone()).collect(),
                origins,
                values,
            }),
            Self::Classes { scores, .. } => Judged::Classes(scores),
            Self::Frames { counts, loss, n, .. } => Judged::Frames(FrameScores { counts, frequency_loss: loss / n as f64 }),
            Self::Numbers { std, squares, n, tolerance, wrong, .. } => {
                let [model, mean] = squares.map(|sum| sum / n as f64);
                Judged::Numbers(NumberScores {
                    rmse: model.sqrt(),
                    mean_rmse: mean.sqrt(),
                    mean_loss: mean / (std * std),
                    wrong: tolerance.map(|_| wrong),
                    of: n,
                })
            }
        }
    }
}

/// The sequence and the step of each row of outputs of a batch whose steps are terms.
pub fn places(batch: &Batch) -> impl Iterator<Item = (usize, usize)> + '_ {
    (0..batch.n_rows).flat_map(move |row| (0..batch.length(row)).map(move |t| (batch.streams[row] as usize, t)))
}

/// The class of the largest logit, the first of equal ones.
pub fn likeliest(logits: &[f32]) -> usize {
    (1..logits.len()).fold(0, |best, class| if logits[class] > logits[best] { class } else { best })
}

impl Evaluation {
    /// The scores beside the loss, as every summary has them.
    pub fn scores(&self) -> Map<String, Value> {
        let mut map = Map::new();
        match &self.judged {
            Judged::Text => {
                map.insert("perplexity".into(), json!(self.loss.exp()));
            }
            Judged::Classes(scores) => {
                map.insert("accuracy".into(), json!(scores.accuracy()));
                map.insert("macro_f1".into(), json!(scores.macro_f1()));
                map.insert("baselines".into(), json!({ "majority": scores.majority_accuracy() }));
                map.insert("confusion".into(), json!({ "classes": scores.classes, "counts": scores.confusion }));
            }
            Judged::Frames(scores) => {
                map.insert("accuracy".into(), json!(scores.accuracy()));
                map.insert("macro_f1".into(), json!(scores.macro_f1()));
                map.insert("baselines".into(), json!({ "frequency": scores.frequency_loss }));
            }
            Judged::Numbers(scores) => {
                map.insert("baselines".into(), json!({ "mean": scores.mean_loss }));
                map.insert("rmse".into(), json!({ "model": scores.rmse, "mean": scores.mean_rmse }));
                if let Some(wrong) = scores.wrong {
                    map.insert("wrong".into(), json!(wrong));
                    map.insert("of".into(), json!(scores.of));
                }
            }
            Judged::Forecast(forecast) => {
                let baselines: Map<String, Value> = forecast.baselines.iter().map(|(name, s)| ((*name).to_owned(), json!(s.mse))).collect();
                map.insert("baselines".into(), Value::Object(baselines));
                let by_target: Vec<(&String, Value)> = forecast
                    .targets
                    .iter()
                    .zip((0..).map(|k| self.rmse(k).into_iter().map(|(name, r)| (name, json!(r))).collect()))
                    .collect();
                map.insert("rmse".into(), by_target.first().map_or(Value::Null, |(_, rmse)| rmse.clone()));
                if let Some(quantiles) = &forecast.quantiles {
                    map.insert("mse".into(), json!(forecast.model.mse));
                    map.insert("quantiles".into(), quantiles.summary(&forecast.targets));
                }
                if by_target.len() > 1 {
                    let named = by_target.into_iter().map(|(name, rmse)| (name.clone(), rmse));
                    map.insert("rmse_by_target".into(), Value::Object(named.collect()));
                }
            }
        }
        map
    }

    /// Root mean squared errors by step of the horizon in the unit: of each target by name the model's and each baseline's, one a step.
    pub fn by_step(&self) -> Map<String, Value> {
        let Some(forecast) = self.forecast() else { return Map::new() };
        let all = || std::iter::once(("model", &forecast.model)).chain(forecast.baselines.iter().map(|(name, scores)| (*name, scores)));
        let of = |k: usize| -> Map<String, Value> { all().map(|(name, scores)| (name.to_owned(), json!(scores.rmse[k]))).collect() };
        forecast.targets.iter().enumerate().map(|(k, name)| (name.clone(), Value::Object(of(k)))).collect()
    }

    /// The scores of a forecast, if it is one.
    pub fn forecast(&self) -> Option<&ForecastScores> {
        match &self.judged {
            Judged::Forecast(forecast) => Some(forecast),
            _ => None,
        }
    }

    /// Root mean squared errors of target `k` at the last step of the horizon in its unit: the model's, then each baseline's.
    pub fn rmse(&self, k: usize) -> Vec<(String, f64)> {
        let Some(forecast) = self.forecast() else { return Vec::new() };
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
