//! Naive forecasts and the scores that they and the model are compared by: the same windows, the same weights.
//!
//! With `o` the row of the window's last input, `h` the step ahead, `S` the rows of a season and `k = ceil(h / S)`:
//! - `last`: `y[o]`;
//! - `seasonal`: `y[o + h - k S]`, the value one season ago (`k` seasons, beyond the first);
//! - `seasonal_drift`: `y[o + h - k S] + k (y[o] - y[o - S])`, the same plus the change over the last season;
//! - `climatology_trend`: `f[o + h] + (y[o] - f[o])`, where `f` is a quadratic trend by least squares plus the mean cycle of what it leaves, both
//!   fitted on the training part, and the last value sets the level.
//!
//! Blanks are filled from before, as for the model. A forecast that lacks history for any window of the part is left out.

use serde::{Deserialize, Serialize};

use super::series::{Part, Series};
use super::time::Season;

/// Quadratic trend plus mean cycle, by position in time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Climatology {
    /// Position of the first known row.
    pub origin: f64,
    /// From the first to the last known row; the trend's argument is `(position - origin) / span`.
    pub span: f64,
    /// Constant, linear and quadratic coefficient.
    pub trend: [f64; 3],
    /// Length of the cycle in steps.
    pub period: f64,
    /// Mean of what the trend leaves, by phase.
    pub cycle: Vec<f64>,
}

impl Climatology {
    /// Fits known `(position, value)` pairs; `None` for less than two seasons.
    pub fn fit(known: &[(f64, f64)], season: Season) -> Option<Self> {
        let (&(origin, _), &(end, _)) = (known.first()?, known.last()?);
        let span = end - origin;
        if span < 2.0 * season.period - 1.0 || known.len() < 3 {
            return None;
        }
        let trend = quadratic(known.iter().map(|&(x, y)| ((x - origin) / span, y)))?;
        let mut fitted = Self { origin, span, trend, period: season.period, cycle: vec![0.0; season.steps] };
        let mut sums = vec![(0.0, 0.0); season.steps];
        for &(position, value) in known {
            let (sum, n) = &mut sums[fitted.phase(position)];
            *sum += value - fitted.trend_at(position);
            *n += 1.0;
        }
        fitted.cycle = sums.into_iter().map(|(sum, n)| if n > 0.0 { sum / n } else { 0.0 }).collect();
        Some(fitted)
    }

    /// The fitted value at a position.
    pub fn at(&self, position: f64) -> f64 {
        self.trend_at(position) + self.cycle[self.phase(position)]
    }

    fn trend_at(&self, position: f64) -> f64 {
        let x = (position - self.origin) / self.span;
        self.trend[0] + x * (self.trend[1] + x * self.trend[2])
    }

    fn phase(&self, position: f64) -> usize {
        // A tiny step forward, so that whole positions do not fall back by rounding.
        let turns = (position + 1e-6) / self.period;
        (((turns - turns.floor()) * self.cycle.len() as f64) as usize).min(self.cycle.len().saturating_sub(1))
    }
}

/// Least squares of a quadratic by its normal equations, for arguments from 0 to 1; `None` if they do not determine it.
fn quadratic(points: impl Iterator<Item = (f64, f64)>) -> Option<[f64; 3]> {
    let mut m = [[0.0f64; 4]; 3];
    for (x, y) in points {
        let powers = [1.0, x, x * x];
        for i in 0..3 {
            for j in 0..3 {
                m[i][j] += powers[i] * powers[j];
            }
            m[i][3] += powers[i] * y;
        }
    }
    for i in 0..3 {
        let pivot = (i..3).max_by(|&a, &b| m[a][i].abs().total_cmp(&m[b][i].abs()))?;
        m.swap(i, pivot);
        if m[i][i].abs() < 1e-12 {
            return None;
        }
        let row = m[i];
        for (r, other) in m.iter_mut().enumerate() {
            if r != i {
                let factor = other[i] / row[i];
                for (cell, &base) in other.iter_mut().zip(&row) {
                    *cell -= factor * base;
                }
            }
        }
    }
    Some([m[0][3] / m[0][0], m[1][3] / m[1][1], m[2][3] / m[2][2]])
}

/// Errors of forecasts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// Mean squared error on the normalised scale, over all windows, steps and targets.
    pub mse: f64,
    /// Root mean squared error in the unit of each target, `[n_targets][H]`; NaN where nothing was scored.
    pub rmse: Vec<Vec<f64>>,
    /// Values that were scored.
    pub n: u64,
}

/// Gathers squared errors. Whoever forecasts, the scores come from here.
#[derive(Clone, Debug)]
pub struct Scorer {
    // Normalised, [H * n_targets].
    squares: Vec<f64>,
    counts: Vec<u64>,
    stds: Vec<f64>,
}

impl Scorer {
    /// For forecasts of this series.
    pub fn new(series: &Series) -> Self {
        let spec = series.spec();
        let n = spec.n_outputs();
        Self { squares: vec![0.0; n], counts: vec![0; n], stds: spec.target_columns().map(|column| column.std).collect() }
    }

    /// The forecasts of a window in the unit against the truth (`None`: not scored), both `[O]`.
    pub fn add(&mut self, forecasts: &[f64], truth: &[Option<f64>]) {
        for (o, (forecast, truth)) in forecasts.iter().zip(truth).enumerate().take(self.squares.len()) {
            if let Some(truth) = truth {
                self.squares[o] += ((forecast - truth) / self.stds[o % self.stds.len()]).powi(2);
                self.counts[o] += 1;
            }
        }
    }

    /// What the network said about the window whose last input is row `origin` (`[O]`, normalised).
    ///
    /// # Panics
    /// If `series` has no such row.
    pub fn add_outputs(&mut self, series: &Series, origin: u32, outputs: &[f32]) {
        self.add(&series.denormalise(origin, outputs), &series.truth(origin));
    }

    /// The scores of all that was added.
    pub fn scores(&self) -> Scores {
        let n: u64 = self.counts.iter().sum();
        let rmse = self.stds.iter().enumerate().map(|(k, std)| {
            let own = (k..self.squares.len()).step_by(self.stds.len());
            own.map(|o| std * (self.squares[o] / self.counts[o] as f64).sqrt()).collect()
        });
        Scores { mse: self.squares.iter().sum::<f64>() / n as f64, rmse: rmse.collect(), n }
    }
}

/// What a naive forecast says of a target, by the row of the window's last input, the step ahead and the target; none where history is missing.
type Rule<'a> = Box<dyn Fn(usize, usize, usize) -> Option<f64> + 'a>;

fn rules(series: &Series) -> [(&'static str, Rule<'_>); 4] {
    let spec = series.spec();
    let season = spec.season.map(|season| season.steps).filter(|&s| s > 0);
    let back = move |o: usize, h: usize| {
        let s = season?;
        let k = h.div_ceil(s);
        (o + h).checked_sub(k * s).map(|row| (row, k, s))
    };
    [
        ("last", Box::new(|o, _, k| Some(series.value(o, k)))),
        ("seasonal", Box::new(move |o, h, k| back(o, h).map(|(row, _, _)| series.value(row, k)))),
        (
            "seasonal_drift",
            Box::new(move |o, h, k| {
                let (row, seasons, s) = back(o, h)?;
                let before = o.checked_sub(s)?;
                Some(series.value(row, k) + seasons as f64 * (series.value(o, k) - series.value(before, k)))
            }),
        ),
        (
            "climatology_trend",
            Box::new(|o, h, k| {
                let fitted = spec.climatology.get(k)?.as_ref()?;
                Some(fitted.at(series.position(o + h)) + series.value(o, k) - fitted.at(series.position(o)))
            }),
        ),
    ]
}

/// The naive forecasts of a part by name, those that the data allow, in the order of the module's list. Empty for a part without windows.
pub fn baselines(series: &Series, part: Part) -> Vec<(&'static str, Scores)> {
    baselines_at(series, &series.windows(part))
}

/// As [`baselines`], of these windows, by the row of their last input.
pub fn baselines_at(series: &Series, origins: &[u32]) -> Vec<(&'static str, Scores)> {
    let spec = series.spec();
    if origins.is_empty() {
        return Vec::new();
    }
    rules(series)
        .into_iter()
        .filter_map(|(name, rule)| {
            let mut scorer = Scorer::new(series);
            for &origin in origins {
                let steps = (1..=spec.horizon).flat_map(|h| (0..spec.targets.len()).map(move |k| (h, k)));
                let forecasts: Vec<f64> = steps.map(|(h, k)| rule(origin as usize, h, k)).collect::<Option<_>>()?;
                scorer.add(&forecasts, &series.truth(origin));
            }
            Some((name, scorer.scores()))
        })
        .collect()
}

/// What the naive forecast `name` says of the first target at the last step of the horizon, for each window; NaN where it says nothing.
pub fn at_end(series: &Series, name: &str, origins: &[u32]) -> Vec<f64> {
    let rule = rules(series).into_iter().find(|(other, _)| *other == name);
    let say = |origin: u32| rule.as_ref().and_then(|(_, rule)| rule(origin as usize, series.spec().horizon, 0));
    origins.iter().map(|&origin| say(origin).unwrap_or(f64::NAN)).collect()
}
