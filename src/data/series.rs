//! Time series: which columns go in and come out, filling, scaling, windows, and the order in which they are trained on.
//!
//! **Scale.** Each column has one affine map, `(x - mean) / std`, fitted on the known values of the training part. Targets and losses are on that
//! scale. Where a target is taken relative to the last value of its window, that value stands in for the mean: `(y - last) / std`, so
//! that losses with and without it compare, and an error on the normalised scale times `std` is an error in the unit.
//! Inputs of relative columns are `(x - last) / spread`, where `spread` is the root mean square of `x - last` in the windows of the training part:
//! the network sees inputs of size one, and no loss is measured on them.
//!
//! **Relative by itself.** A column drifts if more than half of the variance of its training part lies between the means of the five
//! fifths of it: then most of what tells one window from another is its level, and the held-out part may lie at levels that
//! training never saw. A straight line has 0.96, a sine with many periods about 0, a random walk as a rule more than 0.5.
//!
//! **Parts.** A window belongs to the part in which its last target lies; its inputs may reach back into the part before.

use std::sync::{Arc, Mutex, PoisonError};

use ndarray::Array2;
use serde::{Deserialize, Serialize};

use super::baselines::Climatology;
use super::error::DataError;
use super::source::{Source, Sources};
use super::split::Split;
use super::table::{Kind, Table};
use super::time::{Axis, Clock, Season, Style};
use super::{Batch, Batches, Input, Target};
use crate::rng::{Purpose, StepKey, Stream};

/// What to do with blanks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Missing {
    /// Inputs take the last known value before; blank targets are not scored.
    #[default]
    Fill,
    /// A blank is an error.
    Refuse,
}

/// Whether windows are taken relative to their last value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Relative {
    /// Columns that drift are.
    #[default]
    Auto,
    /// All targets, and the other columns that drift.
    Last,
    /// No column.
    None,
}

impl std::str::FromStr for Missing {
    type Err = DataError;

    fn from_str(text: &str) -> Result<Self, DataError> {
        match text {
            "fill" => Ok(Self::Fill),
            "refuse" => Ok(Self::Refuse),
            _ => Err(option("--missing", text, "no such way", "use fill or refuse")),
        }
    }
}

impl std::str::FromStr for Relative {
    type Err = DataError;

    fn from_str(text: &str) -> Result<Self, DataError> {
        match text {
            "auto" => Ok(Self::Auto),
            "last" => Ok(Self::Last),
            "none" => Ok(Self::None),
            _ => Err(option("--relative", text, "no such way", "use auto, last or none")),
        }
    }
}

/// What is predicted from what.
#[derive(Clone, Debug)]
pub struct SeriesOptions {
    /// Columns to predict; empty: the last column of numbers.
    pub target: Vec<String>,
    /// Columns to predict from, beside the targets themselves; empty: all columns of numbers but one that only numbers the rows.
    pub features: Vec<String>,
    /// `--seq-len`: rows that a window looks back, `T`.
    pub window: usize,
    /// Rows ahead, all of them outputs.
    pub horizon: usize,
    /// What to do with blanks.
    pub missing: Missing,
    /// Whether windows are taken relative to their last value.
    pub relative: Relative,
    /// Fractions of the rows, in time.
    pub split: Split,
    /// Rows of a season: `None` takes it from the step, `Some(0)` says that there is none.
    pub season: Option<usize>,
    /// Adds sine and cosine of the season's phase to the inputs.
    pub calendar: bool,
}

impl SeriesOptions {
    /// The defaults for a window and a horizon.
    pub fn new(window: usize, horizon: usize) -> Self {
        Self {
            target: Vec::new(),
            features: Vec::new(),
            window,
            horizon,
            missing: Missing::default(),
            relative: Relative::default(),
            split: Split::default(),
            season: None,
            calendar: false,
        }
    }
}

/// One input column with its scale.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Column {
    /// As in the file.
    pub name: String,
    /// Mean of the training part, in the unit.
    pub mean: f64,
    /// Standard deviation of the training part, in the unit; 1 for a constant column.
    pub std: f64,
    /// Taken relative to the last value of the window.
    pub relative: bool,
    /// What inputs of a relative column are divided by, in the unit.
    pub spread: f64,
}

/// All that a trained model needs to read another file as it read the first: kept in the run folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SeriesSpec {
    /// Rows that a window looks back, `T`.
    pub window: usize,
    /// Rows ahead.
    pub horizon: usize,
    /// What to do with blanks.
    pub missing: Missing,
    /// Sine and cosine of the season's phase are the last two inputs.
    pub calendar: bool,
    /// The inputs, in order.
    pub inputs: Vec<Column>,
    /// Which inputs are predicted, in order.
    pub targets: Vec<usize>,
    /// How times are written, and the step.
    pub clock: Clock,
    /// The season, if there is one.
    pub season: Option<Season>,
    /// Mean cycle and trend of each target in the training part.
    pub climatology: Vec<Option<Climatology>>,
    /// Root mean square of the normalised targets in the training windows: the size of what the network has to say.
    pub target_rms: f64,
}

impl SeriesSpec {
    /// `I`, with the calendar's two.
    pub fn n_features(&self) -> usize {
        self.inputs.len() + if self.calendar { 2 } else { 0 }
    }

    /// `O`: every target at every step of the horizon; output `step * n_targets + target`.
    pub fn n_outputs(&self) -> usize {
        self.horizon * self.targets.len()
    }

    /// The targets' columns, in order.
    pub fn target_columns(&self) -> impl Iterator<Item = &Column> {
        self.targets.iter().map(|&c| &self.inputs[c])
    }
}

/// A part of the series, by the last target of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Trained on.
    Train,
    /// Chosen by.
    Valid,
    /// Held out.
    Test,
    /// All rows: a file that is only evaluated.
    All,
}

/// A forecast value beyond the end of the data.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Dated {
    /// The time, as the file writes times.
    pub time: String,
    /// The column.
    pub target: String,
    /// In the column's unit.
    pub value: f64,
}

/// A series in memory, filled, with its scale.
#[derive(Debug)]
pub struct Series {
    spec: SeriesSpec,
    name: String,
    // [N, I], in the unit, without blanks.
    values: Array2<f64>,
    // [N, I], false where `values` was filled.
    known: Array2<bool>,
    // [N]
    ticks: Vec<i64>,
    // First row of validation, first row of the test.
    cuts: (usize, usize),
    warnings: Vec<String>,
    notes: Vec<String>,
}

/// Columns and rows as read, before any scale.
struct Rows {
    name: String,
    names: Vec<String>,
    targets: Vec<usize>,
    values: Array2<f64>,
    known: Array2<bool>,
    ticks: Vec<i64>,
    clock: Clock,
    // Rows of the files for training, with validation, where files name their parts.
    cuts: Option<(usize, usize)>,
    warnings: Vec<String>,
    notes: Vec<String>,
}

impl Series {
    /// Reads what `--data` names, cuts it in time, fits the scale on the training part.
    ///
    /// # Errors
    /// Files that cannot be read or hold something wrong, columns that do not exist, fewer rows than a window and its horizon.
    pub fn load(data: &[String], options: &SeriesOptions) -> Result<Self, DataError> {
        Self::from_sources(Sources::find(data)?, options)
    }

    /// As [`Series::load`], of one CSV file in memory.
    ///
    /// # Errors
    /// As [`Series::load`].
    pub fn from_csv(name: &str, bytes: &[u8], options: &SeriesOptions) -> Result<Self, DataError> {
        Self::from_sources(Sources::Whole(vec![Source::from_bytes(name, bytes)]), options)
    }

    /// As [`Series::load`], of sources in memory.
    ///
    /// # Errors
    /// As [`Series::load`].
    pub fn from_sources(sources: Sources, options: &SeriesOptions) -> Result<Self, DataError> {
        check_sizes(options.window, options.horizon)?;
        let (sources, files) = flatten(sources);
        let table = Table::read(&sources)?;
        let times = table.times(None)?;
        let time = times.as_ref().map(|times| times.column);
        let (inputs, targets) = choose(&table, time, options)?;
        let mut rows = Rows::take(&table, times, &inputs, targets, options.missing, files)?;
        if options.features.is_empty() {
            rows.warnings.extend(not_read(&table, time, &inputs));
        }
        let name = |&c: &usize| table.columns[c].as_str();
        let targets: Vec<&str> = rows.targets.iter().map(|&place| name(&inputs[place])).collect();
        let why = if options.target.is_empty() { " (the last column of numbers; --target names another)" } else { "" };
        let from: Vec<&str> = inputs.iter().map(name).collect();
        rows.notes.insert(0, format!("forecasts {}{why} from {}", targets.join(", "), from.join(", ")));
        Self::fit(rows, options)
    }

    /// Reads another file as the run read its own: same columns, same scale. All rows are one part ([`Part::All`]).
    ///
    /// # Errors
    /// As [`Series::load`]; a column of the run that the file lacks, another step between rows.
    pub fn load_with(data: &[String], spec: &SeriesSpec) -> Result<Self, DataError> {
        Self::from_held_out(&Sources::find(data)?.into_held_out(), spec)
    }

    /// As [`Series::load_with`], of one CSV file in memory.
    ///
    /// # Errors
    /// As [`Series::load_with`].
    pub fn from_csv_with(name: &str, bytes: &[u8], spec: &SeriesSpec) -> Result<Self, DataError> {
        Self::from_held_out(&[Source::from_bytes(name, bytes)], spec)
    }

    fn from_held_out(sources: &[Source], spec: &SeriesSpec) -> Result<Self, DataError> {
        let table = Table::read(sources)?;
        let times = table.times(spec.clock.style.date().map(|date| date.order))?;
        let inputs: Vec<usize> = spec.inputs.iter().map(|column| table.find("the run's column", &column.name)).collect::<Result<_, _>>()?;
        let time_column = times.as_ref().map_or("", |times| table.columns[times.column].as_str()).to_string();
        let rows = Rows::take(&table, times, &inputs, spec.targets.clone(), spec.missing, None)?;
        let n = rows.values.nrows();
        if n < spec.window {
            return Err(too_short(&rows.name, n, spec.window, "one window", "give a longer file"));
        }
        // Two rows are not enough to tell a step.
        if (spec.clock.style == Style::Rows) != (rows.clock.style == Style::Rows) || n > 2 && !rows.clock.step.is_like(spec.clock.step) {
            return Err(DataError::Column {
                file: rows.name,
                column: time_column,
                problem: format!("rows are {} apart, those of the training data {}", rows.clock.step, spec.clock.step),
                remedy: "give data with the same step".to_string(),
            });
        }
        // Times are printed as the new file writes them; the step is the run's, known from more rows.
        let clock = Clock { style: rows.clock.style, step: spec.clock.step };
        Ok(Self {
            spec: SeriesSpec { clock, ..spec.clone() },
            name: rows.name,
            values: rows.values,
            known: rows.known,
            ticks: rows.ticks,
            cuts: (n, n),
            warnings: rows.warnings,
            notes: rows.notes,
        })
    }

    fn fit(mut rows: Rows, options: &SeriesOptions) -> Result<Self, DataError> {
        let (n, window, horizon) = (rows.values.nrows(), options.window, options.horizon);
        let needs = window + horizon;
        let purpose = format!("one window of {window} and a horizon of {horizon}");
        if n < needs {
            return Err(too_short(&rows.name, n, needs, &purpose, "lower --seq-len or --horizon, or give a longer file"));
        }
        let cuts = rows.cuts.map_or_else(|| options.split.cuts(n), |cuts| part_cuts(cuts, n, options.split));
        if cuts.0 < needs {
            let what = format!("the training part of {}", rows.name);
            return Err(too_short(
                &what,
                cuts.0,
                needs,
                &purpose,
                "lower --seq-len or --horizon, or raise the training fraction of --split",
            ));
        }
        let season = match options.season {
            None => rows.clock.season(),
            Some(steps) if steps < 2 => None,
            Some(steps) => {
                // A season that is the step's own rounded keeps its exact length.
                Some(rows.clock.season().filter(|own| own.steps == steps).unwrap_or(Season { steps, period: steps as f64 }))
            }
        };
        if options.calendar && season.is_none() {
            return Err(option("--calendar", "on", "the data have no season that is known by itself", "name its rows with --season"));
        }
        let mut inputs = Vec::with_capacity(rows.names.len());
        for (c, name) in rows.names.iter().enumerate() {
            let train: Vec<f64> = (0..cuts.0).filter(|&row| rows.known[[row, c]]).map(|row| rows.values[[row, c]]).collect();
            let (mean, std) = moments(&train);
            let relative = match options.relative {
                Relative::None => false,
                Relative::Last if rows.targets.contains(&c) => true,
                Relative::Auto | Relative::Last => drifts(&train),
            };
            let spread = if relative { spread(&rows.values, c, window, cuts.0) } else { std };
            inputs.push(Column { name: name.clone(), mean, std, relative, spread });
        }
        let climatology = rows
            .targets
            .iter()
            .map(|&c| {
                let known: Vec<(f64, f64)> = (0..cuts.0)
                    .filter(|&row| rows.known[[row, c]])
                    .map(|row| (rows.clock.position(rows.ticks[row]), rows.values[[row, c]]))
                    .collect();
                season.and_then(|season| Climatology::fit(&known, season))
            })
            .collect();
        let spec = SeriesSpec {
            window,
            horizon,
            missing: options.missing,
            calendar: options.calendar,
            inputs,
            targets: rows.targets,
            clock: rows.clock,
            season,
            climatology,
            target_rms: 1.0,
        };
        let (warnings, notes) = (std::mem::take(&mut rows.warnings), std::mem::take(&mut rows.notes));
        let mut series = Self { spec, name: rows.name, values: rows.values, known: rows.known, ticks: rows.ticks, cuts, warnings, notes };
        if series.windows(Part::Train).is_empty() {
            return Err(DataError::Column {
                file: series.name.clone(),
                column: series.spec.target_columns().map(|column| column.name.as_str()).collect::<Vec<_>>().join(", "),
                problem: format!("no known value within the first {} rows, the training part, that a window could be scored on", cuts.0),
                remedy: "choose another --target or raise the training fraction of --split".to_string(),
            });
        }
        series.spec.target_rms = series.target_rms();
        Ok(series)
    }

    /// How the data were read, for the run folder.
    pub fn spec(&self) -> &SeriesSpec {
        &self.spec
    }

    /// The file's name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What a person should know: rows left out or put in, steps that are not even.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// What is forecast from what, and what is filled.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Rows, after leading ones without known inputs were left out and missing ones put in.
    pub fn n_rows(&self) -> usize {
        self.ticks.len()
    }

    /// All that the series consists of, as numbers, for a hash: the cuts, then each row's time and what is known of it.
    pub fn words(&self) -> impl Iterator<Item = u64> {
        let cuts = [self.cuts.0 as u64, self.cuts.1 as u64];
        let rows = self.ticks.iter().zip(self.values.outer_iter().zip(self.known.outer_iter()));
        cuts.into_iter().chain(rows.flat_map(|(&tick, (values, known))| {
            let cells: Vec<u64> = values.iter().zip(known).map(|(value, &known)| if known { value.to_bits() } else { u64::MAX }).collect();
            std::iter::once(tick as u64).chain(cells)
        }))
    }

    /// First row of validation and first row of the test.
    pub fn cuts(&self) -> (usize, usize) {
        self.cuts
    }

    /// The value of target `k` at `row` in its unit, filled where it is blank.
    ///
    /// # Panics
    /// If there is no such row or target.
    pub fn value(&self, row: usize, k: usize) -> f64 {
        self.values[[row, self.spec.targets[k]]]
    }

    /// As [`Series::value`], `None` where it is blank.
    ///
    /// # Panics
    /// If there is no such row or target.
    pub fn known_value(&self, row: usize, k: usize) -> Option<f64> {
        self.known[[row, self.spec.targets[k]]].then(|| self.value(row, k))
    }

    /// Steps since a fixed origin of `row`: what the season's phase is taken from.
    pub fn position(&self, row: usize) -> f64 {
        self.spec.clock.position(self.ticks[row])
    }

    /// The time of `row` for an axis.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn axis(&self, row: usize) -> Axis {
        self.spec.clock.axis(self.ticks[row])
    }

    /// The time of `row` as the file writes times; rows beyond the end go on by the step.
    pub fn time_at(&self, row: usize) -> String {
        match self.ticks.get(row) {
            Some(&tick) => self.spec.clock.print(tick),
            None => self.time_after(row - self.ticks.len() + 1),
        }
    }

    /// The time `n` steps after the last row.
    pub fn time_after(&self, n: usize) -> String {
        let last = self.ticks.last().copied().unwrap_or_default();
        self.spec.clock.print(self.spec.clock.after(last, n))
    }

    /// The windows of a part: the row of each one's last input, in order. A window without any known target is none.
    pub fn windows(&self, part: Part) -> Vec<u32> {
        let rows = match part {
            Part::Train => 0..self.cuts.0,
            Part::Valid => self.cuts.0..self.cuts.1,
            Part::Test => self.cuts.1..self.n_rows(),
            Part::All => 0..self.n_rows(),
        };
        let (window, horizon) = (self.spec.window, self.spec.horizon);
        rows.filter(|&end| end + 1 >= window + horizon)
            .map(|end| end - horizon)
            .filter(|&origin| (origin + 1..=origin + horizon).any(|row| self.spec.targets.iter().any(|&c| self.known[[row, c]])))
            .map(|origin| origin as u32)
            .collect()
    }

    /// Targets of a window in their unit, `[O]`; `None` where they are blank or beyond the end.
    pub fn truth(&self, origin: u32) -> Vec<Option<f64>> {
        let at = |row: usize, k: usize| if row < self.n_rows() { self.known_value(row, k) } else { None };
        (1..=self.spec.horizon)
            .flat_map(|h| (0..self.spec.targets.len()).map(move |k| (origin as usize + h, k)))
            .map(|(row, k)| at(row, k))
            .collect()
    }

    /// What the network said (`[O]`, normalised) about the window whose last input is row `origin`, in the unit.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn denormalise(&self, origin: u32, outputs: &[f32]) -> Vec<f64> {
        let n_targets = self.spec.targets.len();
        outputs
            .iter()
            .enumerate()
            .map(|(o, &output)| {
                let column = &self.spec.inputs[self.spec.targets[o % n_targets]];
                self.base(origin as usize, o % n_targets) + f64::from(output) * column.std
            })
            .collect()
    }

    /// What stands for zero on the normalised scale of target `k` in this window.
    fn base(&self, origin: usize, k: usize) -> f64 {
        let column = &self.spec.inputs[self.spec.targets[k]];
        if column.relative { self.value(origin, k) } else { column.mean }
    }

    /// The last window of the data as a batch of one row without targets, to forecast beyond the end.
    pub fn latest_window(&self) -> Batch {
        self.batch_of(&[(self.n_rows() - 1) as u32])
    }

    /// What the network said about [`Series::latest_window`], dated, in the unit: step after step, its targets in order.
    pub fn forecast(&self, outputs: &[f32]) -> Vec<Dated> {
        let n_targets = self.spec.targets.len();
        let names: Vec<&str> = self.spec.target_columns().map(|column| column.name.as_str()).collect();
        self.denormalise((self.n_rows() - 1) as u32, outputs)
            .into_iter()
            .enumerate()
            .map(|(o, value)| Dated { time: self.time_after(o / n_targets + 1), target: names[o % n_targets].to_string(), value })
            .collect()
    }

    /// Windows side by side.
    fn batch_of(&self, origins: &[u32]) -> Batch {
        let spec = &self.spec;
        let (window, n_features, n_outputs, n_targets) = (spec.window, spec.n_features(), spec.n_outputs(), spec.targets.len());
        let mut inputs = vec![0.0; window * origins.len() * n_features];
        let mut targets = vec![0.0; origins.len() * n_outputs];
        let mut weights = vec![0.0; origins.len() * n_outputs];
        for (b, &origin) in origins.iter().enumerate() {
            let origin = origin as usize;
            for t in 0..window {
                let row = origin + 1 - window + t;
                let out = &mut inputs[(t * origins.len() + b) * n_features..][..n_features];
                for (c, column) in spec.inputs.iter().enumerate() {
                    let base = if column.relative { self.values[[origin, c]] } else { column.mean };
                    out[c] = ((self.values[[row, c]] - base) / column.spread) as f32;
                }
                if let (true, Some(season)) = (spec.calendar, spec.season) {
                    let phase = std::f64::consts::TAU * (self.position(row) / season.period).fract();
                    out[n_features - 2] = phase.sin() as f32;
                    out[n_features - 1] = phase.cos() as f32;
                }
            }
            for o in 0..n_outputs {
                let (row, k) = (origin + 1 + o / n_targets, o % n_targets);
                if let Some(value) = if row < self.n_rows() { self.known_value(row, k) } else { None } {
                    targets[b * n_outputs + o] = ((value - self.base(origin, k)) / spec.inputs[spec.targets[k]].std) as f32;
                    weights[b * n_outputs + o] = 1.0;
                }
            }
        }
        let input = Input::Values { values: inputs, n_features };
        Batch::new(window, input, Target::Values { values: targets, n_outputs }, weights, origins.to_vec(), true, false)
    }

    fn target_rms(&self) -> f64 {
        let origins = self.windows(Part::Train);
        let (mut sum, mut n) = (0.0, 0.0);
        for &origin in origins.iter().step_by(origins.len().div_ceil(500)) {
            for (o, value) in self.truth(origin).into_iter().enumerate() {
                let k = o % self.spec.targets.len();
                if let Some(value) = value {
                    sum += ((value - self.base(origin as usize, k)) / self.spec.inputs[self.spec.targets[k]].std).powi(2);
                    n += 1.0;
                }
            }
        }
        if sum > 0.0 { (sum / n).sqrt() } else { 1.0 }
    }
}

impl Rows {
    fn take(
        table: &Table,
        times: Option<super::table::Times>,
        inputs: &[usize],
        targets: Vec<usize>,
        missing: Missing,
        files: Option<(usize, usize)>,
    ) -> Result<Self, DataError> {
        let mut warnings = Vec::new();
        let columns: Vec<Vec<Option<f64>>> = inputs.iter().map(|&c| table.numbers(c)).collect::<Result<_, _>>()?;
        if missing == Missing::Refuse {
            for (column, &c) in columns.iter().zip(inputs) {
                if let Some(row) = column.iter().position(Option::is_none) {
                    return Err(table.cell_error(row, c, "the cell is blank".to_string(), "fill it in, or use --missing fill"));
                }
            }
        }
        let (style, ticks, time_column) = match times {
            Some(times) => (times.style, times.ticks, Some(times.column)),
            None => (Style::Rows, (1..=table.n_rows() as i64).collect(), None),
        };
        let (clock, offsets) = Clock::infer(style, &ticks);
        // Where each row of the file comes to lie; rows that the file leaves out are put in as blanks.
        let places = offsets.unwrap_or_else(|| {
            warnings.push(format!(
                "{}: the times are not evenly spaced (most are {} apart); rows are taken as equal steps",
                table.name, clock.step
            ));
            (0..table.n_rows()).collect()
        });
        let n = places.last().map_or(0, |&last| last + 1);
        if n > table.n_rows() {
            let gap = places.windows(2).position(|w| w[1] > w[0] + 1).unwrap_or(0);
            let missing_time = clock.print(clock.after(ticks[gap], 1));
            let problem = match n - table.n_rows() {
                1 => format!("a row is missing, {missing_time}"),
                several => format!("{several} rows are missing, the first one {missing_time}"),
            };
            if missing == Missing::Refuse {
                let column = time_column.unwrap_or(0);
                return Err(table.cell_error(gap + 1, column, problem, "put the rows in, or use --missing fill"));
            }
            warnings.push(format!("{}: {problem}; what is missing counts as blank", table.name));
        }
        let blanks = columns.iter().zip(inputs).map(|(column, &c)| (c, column.iter().filter(|value| value.is_none()).count()));
        let blanks: Vec<String> = blanks.filter(|&(_, n)| n > 0).map(|(c, n)| format!("{n} in {}", table.columns[c])).collect();
        let notes = if blanks.is_empty() {
            Vec::new()
        } else {
            vec![format!("{}: blank cells are filled from what lies before and are not scored: {}", table.name, blanks.join(", "))]
        };
        let mut all_ticks = vec![0; n];
        let mut file_row = 0;
        for (place, tick) in all_ticks.iter_mut().enumerate() {
            if places.get(file_row) == Some(&place) {
                *tick = ticks[file_row];
                file_row += 1;
            } else {
                *tick = clock.after(ticks[file_row - 1], place - places[file_row - 1]);
            }
        }
        let mut values = Array2::from_elem((n, inputs.len()), f64::NAN);
        let mut known = Array2::from_elem((n, inputs.len()), false);
        let mut first = 0;
        for (c, column) in columns.iter().enumerate() {
            for (&place, value) in places.iter().zip(column) {
                if let Some(value) = *value {
                    values[[place, c]] = value;
                    known[[place, c]] = true;
                }
            }
            let mut last = None;
            for row in 0..n {
                match (known[[row, c]], last) {
                    (true, None) => first = first.max(row),
                    (false, Some(last)) => values[[row, c]] = last,
                    _ => {}
                }
                if known[[row, c]] {
                    last = Some(values[[row, c]]);
                }
            }
        }
        if first > 0 {
            warnings.push(format!("{}: the first {first} rows are left out, since a column has no value yet", table.name));
        }
        let place_of = |n_files: usize| {
            let n_file_rows: usize = table.file_rows.iter().take(n_files).sum();
            places.get(n_file_rows).copied().unwrap_or(n).saturating_sub(first)
        };
        Ok(Self {
            name: table.name.clone(),
            names: inputs.iter().map(|&c| table.columns[c].clone()).collect(),
            targets,
            values: values.slice_move(ndarray::s![first.., ..]),
            known: known.slice_move(ndarray::s![first.., ..]),
            ticks: all_ticks.split_off(first),
            clock,
            cuts: files.map(|(train, valid)| (place_of(train), place_of(train + valid))),
            warnings,
            notes,
        })
    }
}

/// All files in the order of time, and how many of them are for training and for validation, if they say so.
fn flatten(sources: Sources) -> (Vec<Source>, Option<(usize, usize)>) {
    match sources {
        Sources::Whole(all) => (all, None),
        Sources::Parts { train, valid, test } => {
            let files = (train.len(), valid.len());
            (train.into_iter().chain(valid).chain(test).collect(), Some(files))
        }
    }
}

/// Cuts that files gave; where no file validates, validation is cut from the end of training.
fn part_cuts((train, valid): (usize, usize), n: usize, split: Split) -> (usize, usize) {
    let (train, valid) = (train.min(n), valid.min(n));
    if train < valid { (train, valid) } else { (train - (train as f64 * split.valid_of_rest()).round() as usize, train) }
}

/// Inputs and targets, as columns of the table and positions among the inputs.
fn choose(table: &Table, time: Option<usize>, options: &SeriesOptions) -> Result<(Vec<usize>, Vec<usize>), DataError> {
    let find = |flag: &'static str, name: &String| {
        let c = table.find(flag, name)?;
        if Some(c) == time {
            return Err(DataError::Column {
                file: table.name.clone(),
                column: table.columns[c].clone(),
                problem: format!("it holds the times, so it cannot be given to {flag}"),
                remedy: "name a column of values".to_string(),
            });
        }
        Ok(c)
    };
    let kinds: Vec<Kind> = (0..table.columns.len()).map(|c| table.kind(c)).collect();
    let numeric: Vec<usize> = (0..table.columns.len()).filter(|&c| Some(c) != time && kinds[c] == Kind::Numbers).collect();
    let is_index = |c: usize| {
        let name = table.columns[c].to_lowercase();
        let named = ["rownames", "row_names", "index", "idx", "id", "row", "unnamed: 0", "no"].contains(&name.as_str());
        (c == 0 || named) && numeric.len() > 1 && table.is_index(c)
    };
    let usable: Vec<usize> = numeric.iter().copied().filter(|&c| !is_index(c)).collect();
    let targets: Vec<usize> = if options.target.is_empty() {
        let last = usable.last().ok_or_else(|| {
            let some = (0..table.columns.len()).find(|&c| Some(c) != time && kinds[c] == Kind::Text);
            // The first cell that is no number says why.
            match some.map(|c| table.numbers(c)) {
                Some(Err(e)) => e,
                _ => DataError::Column {
                    file: table.name.clone(),
                    column: table.columns.join(", "),
                    problem: "there is no column of numbers to predict".to_string(),
                    remedy: "give a file with at least one column of numbers".to_string(),
                },
            }
        })?;
        vec![*last]
    } else {
        options.target.iter().map(|name| find("--target", name)).collect::<Result<_, _>>()?
    };
    let mut inputs: Vec<usize> = if options.features.is_empty() {
        // A blank column with a name was meant to hold something; one without is a delimiter too many.
        let blank = |c: usize| kinds[c] == Kind::Blank && table.columns[c] != format!("column{}", c + 1);
        (0..table.columns.len()).filter(|&c| Some(c) != time && (usable.contains(&c) || kinds[c] == Kind::Flags || blank(c))).collect()
    } else {
        options.features.iter().map(|name| find("--features", name)).collect::<Result<_, _>>()?
    };
    inputs.extend(&targets);
    inputs.sort_unstable();
    inputs.dedup();
    let mut places = Vec::new();
    for target in targets {
        let place = inputs.iter().position(|&c| c == target).unwrap_or_default();
        if !places.contains(&place) {
            places.push(place);
        }
    }
    Ok((inputs, places))
}

/// What a person should know of columns that nobody named and nobody reads: words, and what may be meant for dates.
fn not_read(table: &Table, time: Option<usize>, inputs: &[usize]) -> Vec<String> {
    let others = (0..table.columns.len()).filter(|c| Some(*c) != time && !inputs.contains(c));
    let of_words = others.filter(|&c| table.kind(c) == Kind::Text);
    let is_like_date = |c: usize| {
        let cell = table.cells(c).find(|cell| !cell.is_empty()).unwrap_or_default();
        cell.starts_with(|first: char| first.is_ascii_digit()) && cell.matches(['-', '/', '.', ':']).count() > 1
    };
    let is_time = |&c: &usize| time.is_none() && (table.is_named_after_time(c) || is_like_date(c));
    let (dates, words): (Vec<usize>, Vec<usize>) = of_words.partition(is_time);
    let mut warnings: Vec<String> = dates
        .into_iter()
        .map(|c| {
            let cell = table.cells(c).find(|cell| !cell.is_empty()).unwrap_or_default();
            let (file, column) = (&table.name, &table.columns[c]);
            format!("{file}, column '{column}': '{cell}' is no date that is known here, so rows are only numbered and have no season; write dates as 2001-12-29 or 2001-12-29 13:30")
        })
        .collect();
    if !words.is_empty() {
        let names: Vec<&str> = words.iter().map(|&c| table.columns[c].as_str()).collect();
        warnings.push(format!("{}: columns of words are left out: {}", table.name, names.join(", ")));
    }
    warnings
}

/// Mean and standard deviation; 0 and 1 for nothing, 1 for a constant.
fn moments(values: &[f64]) -> (f64, f64) {
    if values.is_empty() {
        return (0.0, 1.0);
    }
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let std = (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt();
    // What rounding leaves of a constant is no deviation.
    (mean, if std > 1e-12 * mean.abs().max(f64::MIN_POSITIVE) { std } else { 1.0 })
}

/// More than half of the variance lies between the means of the fifths.
fn drifts(values: &[f64]) -> bool {
    if values.len() < 20 {
        return false;
    }
    let (mean, std) = moments(values);
    let between: f64 = crate::shape::split_even(values.len(), 5)
        .into_iter()
        .map(|range| range.len() as f64 * (moments(&values[range]).0 - mean).powi(2))
        .sum();
    between / values.len() as f64 > 0.5 * std * std
}

/// Root mean square of what the windows that lie in the first `n` rows hold relative to their last value; at most 500 of them are looked at.
fn spread(values: &Array2<f64>, c: usize, window: usize, n: usize) -> f64 {
    let (mut sum, mut count) = (0.0, 0.0);
    for origin in (window - 1..n).step_by((n + 1 - window).div_ceil(500)) {
        for row in origin + 1 - window..origin {
            sum += (values[[row, c]] - values[[origin, c]]).powi(2);
            count += 1.0;
        }
    }
    if sum > 0.0 { (sum / count).sqrt() } else { 1.0 }
}

/// The order in which windows are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As in time, the same every epoch.
    InTime,
    /// Shuffled by seed and epoch.
    Shuffled {
        /// The run's seed.
        seed: u64,
    },
}

/// Windows of a part in batches; the last batch of an epoch may be smaller. Every window comes once an epoch.
#[derive(Debug)]
pub struct SeriesBatches {
    series: Arc<Series>,
    origins: Arc<[u32]>,
    batch_size: usize,
    order: Order,
    // The order of the epoch that was asked for last: kept only so that it is not drawn anew for every batch.
    shuffled: Mutex<Option<(u64, Arc<[u32]>)>>,
}

impl SeriesBatches {
    /// # Errors
    /// [`DataError::TooShort`] if training, or the file as a whole, has no window; validation and test may be empty.
    pub fn new(series: Arc<Series>, part: Part, batch_size: usize, order: Order) -> Result<Self, DataError> {
        if batch_size == 0 {
            return Err(option("--batch-size", "0", "nothing would be read", "give a number from 1"));
        }
        let origins = series.windows(part);
        if origins.is_empty() && matches!(part, Part::Train | Part::All) {
            let (window, horizon) = (series.spec.window, series.spec.horizon);
            return Err(too_short(
                &series.name,
                series.n_rows(),
                window + horizon,
                &format!("one window of {window} and a horizon of {horizon} with a known target"),
                "give a longer file",
            ));
        }
        Ok(Self { series, origins: origins.into(), batch_size, order, shuffled: Mutex::new(None) })
    }

    /// With only every `stride`-th window, from the first on.
    pub fn every(mut self, stride: usize) -> Self {
        self.origins = self.origins.iter().copied().step_by(stride.max(1)).collect();
        self
    }

    /// The windows, by the row of their last input, in time.
    pub fn origins(&self) -> &[u32] {
        &self.origins
    }

    fn order_of(&self, epoch: u64) -> Arc<[u32]> {
        let Order::Shuffled { seed } = self.order else { return self.origins.clone() };
        let mut cache = self.shuffled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, order)) = cache.as_ref().filter(|(of, _)| *of == epoch) {
            return order.clone();
        }
        let mut order = self.origins.to_vec();
        Stream::new(StepKey::new(seed, 0), Purpose::Shuffle, 0, epoch as u32).shuffle(&mut order);
        let order: Arc<[u32]> = order.into();
        *cache = Some((epoch, order.clone()));
        order
    }
}

impl Batches for SeriesBatches {
    fn n_batches(&self) -> u64 {
        self.origins.len().div_ceil(self.batch_size) as u64
    }

    fn batch(&self, epoch: u64, idx: u64) -> Result<Batch, DataError> {
        assert!(idx < self.n_batches(), "batch {idx} of {}", self.n_batches());
        let first = idx as usize * self.batch_size;
        let order = self.order_of(epoch);
        Ok(self.series.batch_of(&order[first..(first + self.batch_size).min(order.len())]))
    }
}

fn check_sizes(window: usize, horizon: usize) -> Result<(), DataError> {
    if window == 0 {
        return Err(option("--seq-len", "0", "a window needs a row", "give a number from 1"));
    }
    if horizon == 0 { Err(option("--horizon", "0", "nothing would be forecast", "give a number from 1")) } else { Ok(()) }
}

fn option(name: &'static str, value: &str, problem: &str, remedy: &str) -> DataError {
    DataError::Option { name, value: value.to_string(), problem: problem.to_string(), remedy: remedy.to_string() }
}

fn too_short(what: &str, has: usize, needs: usize, purpose: &str, remedy: &str) -> DataError {
    DataError::TooShort { what: what.to_string(), has, unit: "rows", needs, purpose: purpose.to_string(), remedy: remedy.to_string() }
}
