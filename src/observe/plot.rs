//! The plots of a run: loss curves, and a forecast beside the truth, each as SVG and PNG, or as a drawing for an HTML page.
//!
//! Values that are not finite are never drawn.

use std::path::Path;

use jiff::civil::{Date, DateTime};

use super::canvas::{self, Anchor, Canvas, Ink, Sheet};
use super::format;

/// One curve of [`loss_curve`]: `points` are (step, value).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    /// What the legend says.
    pub name: String,
    /// (step, value), in any order.
    pub points: Vec<(f64, f64)>,
}

/// Where the values of a forecast stand in time.
#[derive(Clone, Debug, PartialEq)]
pub enum Times {
    /// Decimal years or any other numbers.
    Numbers(Vec<f64>),
    /// As in the data's file. Dates and numbers are placed at their distance, anything else one after the other.
    Text(Vec<String>),
}

/// What [`forecast`] draws. The lists run in parallel with `times`; what is not known is NaN, and what is beyond the shortest is not drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct ForecastPlot {
    pub title: String,
    /// What stands beside the vertical axis, for instance `CO2 [ppm]`.
    pub unit: String,
    pub times: Times,
    /// Observed values, in the data's unit.
    pub truth: Vec<f64>,
    /// What the model said, in the data's unit.
    pub forecast: Vec<f64>,
    /// A naive forecast's name and values.
    pub baseline: Option<(String, Vec<f64>)>,
}

/// What one unit did at each step.
#[derive(Clone, Debug, PartialEq)]
pub struct UnitTrace {
    pub name: String,
    /// The tanh of its cell state.
    pub cell: Vec<f64>,
    /// Its gates i, f, g, o, activated.
    pub gates: [Vec<f64>; 4],
}

impl UnitTrace {
    /// Without the first steps.
    pub fn from(&self, first: usize) -> Self {
        let rest = |values: &[f64]| values.get(first..).unwrap_or_default().to_vec();
        Self { name: self.name.clone(), cell: rest(&self.cell), gates: self.gates.each_ref().map(|gate| rest(gate)) }
    }
}

/// What [`activations`] draws.
#[derive(Clone, Debug, PartialEq)]
pub struct Activations {
    pub title: String,
    /// What was read at each step: drawn where it has one character, else every tenth.
    pub steps: Vec<String>,
    pub units: Vec<UnitTrace>,
}

/// Draws what units do while they read into `STEM.svg` and `STEM.png`: for each the cell state behind what is read, then its gates. Red is 1, white
/// 0, blue -1.
///
/// # Errors
/// The files cannot be written.
pub fn activations(path_stem: &Path, plot: &Activations) -> anyhow::Result<()> {
    canvas::write(path_stem, &|canvas| draw_activations(canvas, plot))
}

fn draw_activations(canvas: &mut dyn Canvas, plot: &Activations) -> anyhow::Result<()> {
    /// Rows of gates beside that of the cell, which is twice as high.
    const GATE_ROWS: [(usize, &str); 4] = [(0, "input"), (1, "forget"), (2, "candidate"), (3, "output")];
    let Sheet { width, height, margin } = canvas.sheet();
    let (left, top) = (margin + 110.0, margin + 26.0);
    let step = (width - margin - left) / plot.steps.len().max(1) as f64;
    let block = (height - margin - top) / plot.units.len().max(1) as f64;
    // The cell's row, four rows of gates, and air.
    let row = (block / 7.0).min(18.0);
    canvas.text(&plot.title, (margin, margin + 8.0), 17.0, Ink::Text, Anchor::Start)?;
    canvas.text("red 1, white 0, blue -1", (width - margin, margin + 8.0), 13.0, Ink::Label, Anchor::End)?;
    let is_text = plot.steps.iter().all(|step| step.chars().count() <= 1);
    for (u, unit) in plot.units.iter().enumerate() {
        let y = top + u as f64 * block;
        let cells = |canvas: &mut dyn Canvas, values: &[f64], y: f64, high: f64| -> anyhow::Result<()> {
            for (t, &value) in values.iter().enumerate() {
                let x = left + t as f64 * step;
                canvas.rect((x, y), (x + step, y + high), Ink::Level(value))?;
            }
            Ok(())
        };
        cells(canvas, &unit.cell, y, 2.0 * row)?;
        canvas.text(&unit.name, (left - 8.0, y + 1.4 * row), 13.0, Ink::Text, Anchor::End)?;
        for (i, (gate, name)) in GATE_ROWS.into_iter().enumerate() {
            let y = y + (2 + i) as f64 * row;
            cells(canvas, &unit.gates[gate], y + 1.0, row - 1.0)?;
            canvas.text(name, (left - 8.0, y + 0.8 * row), (0.8 * row).clamp(6.0, 12.0), Ink::Label, Anchor::End)?;
        }
        for (t, read) in plot.steps.iter().enumerate().filter(|(t, _)| is_text || t % 10 == 9) {
            let dark = unit.cell.get(t).is_some_and(|value| value.abs() > 0.55);
            let shown = match read.as_str() {
                "\n" => "\\n",
                " " => continue,
                read => read,
            };
            let x = left + (t as f64 + 0.5) * step;
            let ink = if dark { Ink::Level(0.0) } else { Ink::Text };
            canvas.text(shown, (x, y + 1.45 * row), (1.3 * row).clamp(8.0, 1.6 * step.max(6.0)), ink, Anchor::Middle)?;
        }
    }
    Ok(())
}

/// Above this ratio of the largest to the smallest value the vertical axis is logarithmic.
const LOG_RATIO: f64 = 20.0;
/// A curve of more points than this is noisy and gets a smoothed line over the faint points.
const SMOOTH_FROM: usize = 60;
/// More points than this are not told apart on the page.
const N_DRAWN: usize = 1500;
/// Values beyond this have no use and would overflow in the differences below.
const LARGEST: f64 = 1e100;

fn is_drawable(x: f64) -> bool {
    x.is_finite() && x.abs() < LARGEST
}

/// What the points of a curve are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trace {
    /// Losses, noisy ones too: many points get a smoothed line over the faint points, few ones tell their lowest.
    Loss,
    /// Other measurements.
    Noisy,
    /// Settings and rates, which are drawn as they are, from zero on.
    Exact,
}

/// Draws curves over steps into `STEM.svg` and `STEM.png`; the vertical axis is logarithmic where all values are positive and far apart.
///
/// # Errors
/// The files cannot be written.
pub fn loss_curve(path_stem: &Path, series: &[Series], title: &str, y_label: &str) -> anyhow::Result<()> {
    let curves = Curves::new(series, Trace::Loss);
    canvas::write(path_stem, &|canvas| curves.draw(canvas, title, y_label))
}

/// The same as an `<svg>` element of that size for an HTML page; its colours are variables of the style sheet: `--text`, `--label`, `--axis`,
/// `--grid`, `--truth`, `--curve0` to `--curve6`, `--faint0` to `--faint6`.
///
/// # Errors
/// The font is damaged.
pub fn curves_markup(size: (u32, u32), series: &[Series], trace: Trace, y_label: &str) -> anyhow::Result<String> {
    let curves = Curves::new(series, trace);
    canvas::markup(size.0, size.1, y_label, &|canvas| curves.draw(canvas, "", y_label))
}

/// Curves with their axes.
struct Curves {
    series: Vec<Series>,
    trace: Trace,
    x: Axis,
    y: Axis,
    keys: Vec<Key>,
}

impl Curves {
    fn new(series: &[Series], trace: Trace) -> Self {
        let series: Vec<Series> = series
            .iter()
            .map(|one| {
                let mut points: Vec<_> = one.points.iter().copied().filter(|&(x, y)| is_drawable(x) && is_drawable(y)).collect();
                points.sort_by(|a, b| a.0.total_cmp(&b.0));
                Series { name: one.name.clone(), points }
            })
            .collect();
        let all = || series.iter().flat_map(|one| one.points.iter().copied());
        let x = Axis::steps(all().map(|(x, _)| x));
        let y = match trace {
            Trace::Loss | Trace::Noisy => Axis::values(all().map(|(_, y)| y)),
            Trace::Exact => Axis::from_zero(all().map(|(_, y)| y)),
        };
        let keys = series.iter().enumerate().filter(|(_, one)| !one.points.is_empty());
        let legend = |one: &Series| if trace == Trace::Loss { legend_of(one) } else { one.name.clone() };
        let keys = keys.map(|(i, one)| Key { name: legend(one), ink: Ink::Curve(i), width: 2.5 }).collect();
        Self { trace, x, y, keys, series }
    }

    fn draw(&self, canvas: &mut dyn Canvas, title: &str, y_label: &str) -> anyhow::Result<()> {
        let frame = Frame::draw(canvas, title, y_label, "step", &self.x, &self.y, &self.keys)?;
        let is_noise = |one: &Series| self.trace != Trace::Exact && one.points.len() > SMOOTH_FROM;
        // All faint points lie beneath all lines.
        for (i, one) in self.series.iter().enumerate().filter(|(_, one)| is_noise(one)) {
            canvas.line(&frame.place(&thin(&one.points)), Ink::Faint(i), 1.0)?;
        }
        for (i, one) in self.series.iter().enumerate() {
            if is_noise(one) {
                canvas.line(&frame.place(&thin(&smooth(&one.points, self.y.is_log))), Ink::Curve(i), 2.5)?;
                continue;
            }
            let points = frame.place(&thin(&one.points));
            canvas.line(&points, Ink::Curve(i), 2.5)?;
            if self.trace != Trace::Exact && one.points.len() <= SMOOTH_FROM {
                points.into_iter().try_for_each(|point| canvas.disc(point, 4.0, Ink::Curve(i)))?;
            }
        }
        Ok(())
    }
}

/// A series of few points is a judgement (a validation loss), whose lowest value is what one looks for.
fn legend_of(series: &Series) -> String {
    let lowest = series.points.iter().min_by(|a, b| a.1.total_cmp(&b.1));
    match lowest {
        Some(&(step, value)) if series.points.len() > 1 && series.points.len() <= SMOOTH_FROM => {
            format!("{} (lowest {} at step {})", series.name, format::trimmed(value, 4), step_label(step))
        }
        _ => series.name.clone(),
    }
}

/// Draws a forecast over the truth into `STEM.svg` and `STEM.png`. A line is broken where a value is not finite.
///
/// # Errors
/// The files cannot be written.
pub fn forecast(path_stem: &Path, plot: &ForecastPlot) -> anyhow::Result<()> {
    let drawing = Forecast::new(plot);
    canvas::write(path_stem, &|canvas| drawing.draw(canvas, &plot.title))
}

/// The same as an `<svg>` element of that size, as [`curves_markup`] makes them; the title stays outside.
///
/// # Errors
/// The font is damaged.
pub fn forecast_markup(size: (u32, u32), plot: &ForecastPlot) -> anyhow::Result<String> {
    let drawing = Forecast::new(plot);
    canvas::markup(size.0, size.1, &plot.title, &|canvas| drawing.draw(canvas, ""))
}

/// A forecast with its axes.
struct Forecast<'a> {
    plot: &'a ForecastPlot,
    /// From the lowest layer to the topmost: what its key says, the points, how they are drawn.
    curves: Vec<(Key, Vec<(f64, f64)>)>,
    x: Axis,
    y: Axis,
}

fn is_shown(&(x, y): &(f64, f64)) -> bool {
    is_drawable(x) && is_drawable(y)
}

impl<'a> Forecast<'a> {
    fn new(plot: &'a ForecastPlot) -> Self {
        let (times, x) = Axis::times(&plot.times);
        let curve = |values: &[f64]| -> Vec<(f64, f64)> { times.iter().copied().zip(values.iter().copied()).collect() };
        let key = |name: &str, ink: Ink, width: f64| Key { name: name.to_owned(), ink, width };
        // The truth is broad and pale, so that a forecast that hits it stays visible on it.
        let mut curves = vec![(key("truth", Ink::Truth, 5.0), curve(&plot.truth))];
        if let Some((name, values)) = &plot.baseline {
            curves.push((key(name, Ink::Curve(4), 1.6), curve(values)));
        }
        curves.push((key("forecast", Ink::Curve(0), 2.2), curve(&plot.forecast)));
        curves.retain(|(_, points)| points.iter().any(is_shown));
        let y = Axis::linear(curves.iter().flat_map(|(_, points)| points.iter().filter(|point| is_shown(point)).map(|point| point.1)));
        Self { plot, curves, x, y }
    }

    fn draw(&self, canvas: &mut dyn Canvas, title: &str) -> anyhow::Result<()> {
        let keys: Vec<Key> = self.curves.iter().map(|(key, _)| key.clone()).collect();
        let frame = Frame::draw(canvas, title, &self.plot.unit, "", &self.x, &self.y, &keys)?;
        for (key, points) in &self.curves {
            for piece in points.split(|point| !is_shown(point)) {
                match piece {
                    [] => {}
                    [alone] => canvas.disc(frame.place(&[*alone])[0], key.width.max(3.0), key.ink)?,
                    _ => canvas.line(&frame.place(&thin(piece)), key.ink, key.width)?,
                }
            }
        }
        Ok(())
    }
}

/// At most about [`N_DRAWN`] points with the same outline: of each stretch the lowest and the highest, in their order.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= N_DRAWN {
        return points.to_vec();
    }
    let mut kept = Vec::with_capacity(N_DRAWN + 2);
    for stretch in points.chunks((2 * points.len()).div_ceil(N_DRAWN)) {
        let by_value = |&a: &usize, &b: &usize| stretch[a].1.total_cmp(&stretch[b].1);
        let lowest = (0..stretch.len()).min_by(by_value).unwrap_or(0);
        let highest = (0..stretch.len()).max_by(by_value).unwrap_or(0);
        kept.push(stretch[lowest.min(highest)]);
        if lowest != highest {
            kept.push(stretch[lowest.max(highest)]);
        }
    }
    // The ends tell where training began and ended.
    if kept.first() != points.first() {
        kept.insert(0, points[0]);
    }
    if kept.last() != points.last() {
        kept.push(points[points.len() - 1]);
    }
    kept
}

/// The points averaged over their neighbours, three times a moving mean, which is close to a bell, over fewer neighbours early on, where a
/// loss falls steeply. At the ends it goes on over those that are left, or a single point would bend the line. `is_log`: means of logarithms,
/// so that the line runs through the middle of what is shown.
fn smooth(points: &[(f64, f64)], is_log: bool) -> Vec<(f64, f64)> {
    let n = points.len();
    let half = (n / 100).max(2);
    let mut values: Vec<f64> = points.iter().map(|point| if is_log { point.1.ln() } else { point.1 }).collect();
    for _ in 0..3 {
        let mut sums = Vec::with_capacity(n + 1);
        sums.push(0.0);
        for &value in &values {
            sums.push(sums[sums.len() - 1] + value);
        }
        for (i, value) in values.iter_mut().enumerate() {
            let reach = half.min(i / 2 + 3);
            let (from, to) = (i.saturating_sub(reach), (i + reach + 1).min(n));
            *value = (sums[to] - sums[from]) / (to - from) as f64;
        }
    }
    points.iter().zip(values).map(|(point, value)| (point.0, if is_log { value.exp() } else { value })).collect()
}

/// A direction of the page: the range shown and what is written beside it.
struct Axis {
    min: f64,
    max: f64,
    is_log: bool,
    ticks: Vec<(f64, String)>,
}

impl Axis {
    /// Linear, with a little room above and below.
    fn linear(values: impl Iterator<Item = f64>) -> Self {
        let (min, max) = padded(range(values), 0.04);
        let ticks = linear_ticks(min, max, 7);
        Self { min, max, is_log: false, ticks }
    }

    /// Linear, and from zero on where nothing lies below.
    fn from_zero(values: impl Iterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.chain([0.0]).collect();
        let is_above = values.iter().all(|value| *value >= 0.0);
        let mut axis = Self::linear(values.into_iter());
        if is_above {
            axis.min = 0.0;
            axis.ticks.retain(|(at, _)| *at >= 0.0);
        }
        axis
    }

    /// Logarithmic where that shows more.
    fn values(values: impl Iterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.collect();
        match range(values.iter().copied()) {
            Some((min, max)) if min > 1.0 / LARGEST && max / min > LOG_RATIO => {
                let room = (max / min).powf(0.04);
                let (min, max) = (min / room, max * room);
                Self { min, max, is_log: true, ticks: log_ticks(min, max) }
            }
            _ => Self::linear(values.into_iter()),
        }
    }

    /// Steps, from edge to edge.
    fn steps(values: impl Iterator<Item = f64>) -> Self {
        let (min, max) = match range(values) {
            Some((min, max)) if min < max => (min, max),
            // A single step stands in the middle.
            Some((at, _)) => (at - 1.0, at + 1.0),
            None => (0.0, 1.0),
        };
        let (step, at) = nice_ticks(min, max, 9);
        // Half a step is no step.
        let ticks = at.into_iter().filter(|t| step >= 1.0 || t.fract() == 0.0).map(|t| (t, step_label(t))).collect();
        Self { min, max, is_log: false, ticks }
    }

    /// The place of each time, and the axis.
    fn times(times: &Times) -> (Vec<f64>, Self) {
        let linear = |at: Vec<f64>| {
            let (min, max) = padded(range(at.iter().copied().filter(|&t| is_drawable(t))), 0.0);
            let ticks = linear_ticks(min, max, 9).into_iter().map(|(t, label)| (t, without_commas(label))).collect();
            (at, Self { min, max, is_log: false, ticks })
        };
        let texts = match times {
            Times::Numbers(at) => return linear(at.clone()),
            Times::Text(texts) => texts,
        };
        if let Some(at) = texts.iter().map(|text| text.trim().parse().ok()).collect::<Option<Vec<f64>>>() {
            return linear(at);
        }
        if let Some(dates) = texts.iter().map(|text| date_of(text)).collect::<Option<Vec<DateTime>>>() {
            let at: Vec<f64> = dates.into_iter().map(days_of).collect();
            let (min, max) = padded(range(at.iter().copied()), 0.0);
            return (at, Self { min, max, is_log: false, ticks: date_ticks(min, max) });
        }
        let (min, max) = padded(range([0.0, texts.len().saturating_sub(1) as f64].into_iter()), 0.0);
        let (_, at) = nice_ticks(min, max, 6);
        let ticks = at
            .into_iter()
            .filter(|t| t.fract() == 0.0 && *t >= 0.0)
            .filter_map(|t| texts.get(t as usize).map(|text| (t, text.trim().chars().take(20).collect())))
            .collect();
        ((0..texts.len()).map(|i| i as f64).collect(), Self { min, max, is_log: false, ticks })
    }

    /// 0 at the beginning of the axis, 1 at its end.
    fn place(&self, value: f64) -> f64 {
        let (value, min, max) = if self.is_log { (value.ln(), self.min.ln(), self.max.ln()) } else { (value, self.min, self.max) };
        ((value - min) / (max - min)).clamp(0.0, 1.0)
    }
}

fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |range, value| match range {
        None => Some((value, value)),
        Some((min, max)) => Some((f64::min(min, value), f64::max(max, value))),
    })
}

/// A range with a share of room at both ends, never empty: a constant stands in the middle.
fn padded(range: Option<(f64, f64)>, room: f64) -> (f64, f64) {
    let (min, max) = range.unwrap_or((0.0, 1.0));
    let largest = min.abs().max(max.abs());
    if max - min <= 1e-9 * largest || max - min < 1e-250 {
        let reach = if largest < 1e-200 { 1.0 } else { 0.1 * largest };
        return (min - reach, max + reach);
    }
    let room = room * (max - min);
    (min - room, max + room)
}

/// Multiples of 1, 2 or 5 times a power of ten within a range, about `n`, and their distance.
fn nice_ticks(min: f64, max: f64, n: usize) -> (f64, Vec<f64>) {
    let rough = (max - min) / n as f64;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|&step| step >= rough).unwrap_or(10.0 * power);
    // A little beyond the ends, against rounding.
    let (first, last) = ((min / step - 1e-9).ceil(), (max / step + 1e-9).floor());
    let n_ticks = (last - first + 1.0).clamp(0.0, 50.0) as usize;
    // Adding zero turns the negative zero into zero.
    (step, (0..n_ticks).map(|i| (first + i as f64) * step + 0.0).collect())
}

fn linear_ticks(min: f64, max: f64, n: usize) -> Vec<(f64, String)> {
    let (step, at) = nice_ticks(min, max, n);
    let largest = min.abs().max(max.abs());
    let label = |t: f64| {
        if !(1e-4..1e7).contains(&largest) {
            // As many digits as tell neighbours apart.
            let digits = (largest.log10().floor() - step.log10().floor()).clamp(0.0, 12.0) as usize;
            if t == 0.0 { "0".to_owned() } else { format!("{t:.digits$e}") }
        } else {
            let decimals = (-(step * (1.0 + 1e-9)).log10().floor()).max(0.0) as usize;
            let text = format!("{:.decimals$}", t.abs());
            let (whole, fraction) = text.split_at(text.find('.').unwrap_or(text.len()));
            let whole = whole.parse().map(format::count).unwrap_or_else(|_| whole.to_owned());
            format!("{}{whole}{fraction}", if t < 0.0 { "−" } else { "" })
        }
    };
    at.into_iter().map(|t| (t, label(t))).collect()
}

/// Years are not written `2,024`.
fn without_commas(label: String) -> String {
    label.replace(',', "")
}

fn log_ticks(min: f64, max: f64) -> Vec<(f64, String)> {
    let (first, last) = (min.log10().floor() as i32, max.log10().ceil() as i32);
    let n_decades = last - first;
    let factors: &[i32] = if n_decades <= 4 { &[1, 2, 5] } else { &[1] };
    let every = (n_decades / 8).max(1);
    let mut ticks = Vec::new();
    for exponent in (first..=last).filter(|exponent| exponent.rem_euclid(every) == 0) {
        for &factor in factors {
            // Parsed, not computed: 0.1 is then the number that is written.
            let Ok(at) = format!("{factor}e{exponent}").parse::<f64>() else { continue };
            if at < min || at > max {
                continue;
            }
            let label = if (-4..=5).contains(&exponent) {
                if at < 1.0 { format!("{at}") } else { format::count(at as u64) }
            } else {
                format!("{factor}e{exponent}")
            };
            ticks.push((at, label));
        }
    }
    ticks
}

/// `500`, `12,000`, `150k`, `2.5M`.
fn step_label(step: f64) -> String {
    if step.abs() >= 1e15 || step.fract() != 0.0 || step < 0.0 {
        return format::number(step, 4);
    }
    let whole = step as u64;
    match whole {
        0..100_000 => format::count(whole),
        _ if whole.is_multiple_of(100_000) && whole >= 1_000_000 => format!("{}M", whole as f64 / 1e6),
        _ if whole.is_multiple_of(1_000) => format!("{}k", format::count(whole / 1_000)),
        _ => format::count(whole),
    }
}

/// Dates as CSV files have them: `2024-05-01`, with a time of day behind a blank or a T, or `2024-05` for a month.
fn date_of(text: &str) -> Option<DateTime> {
    let text = text.trim().trim_end_matches('Z');
    let text = if text.len() == 7 { format!("{text}-01") } else { text.to_owned() };
    if let Ok(date) = text.parse::<DateTime>() {
        return Some(date);
    }
    // A time without seconds.
    format!("{text}:00").parse().ok()
}

/// Days since 1970, with the time of day as a fraction.
fn days_of(date: DateTime) -> f64 {
    let days = day_number(date.date());
    days + (f64::from(date.hour()) * 3600.0 + f64::from(date.minute()) * 60.0 + f64::from(date.second())) / 86_400.0
}

fn day_number(date: Date) -> f64 {
    date.duration_since(Date::constant(1970, 1, 1)).as_secs_f64() / 86_400.0
}

/// The beginnings of years, months, days or hours, whichever are few enough.
fn date_ticks(min: f64, max: f64) -> Vec<(f64, String)> {
    const N: f64 = 10.0;
    let days = max - min;
    let year_of = |day: f64| 1970 + (day / 365.2425).floor() as i32;
    if days / 365.25 > 2.0 {
        let years = days / 365.25;
        let every =
            [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].into_iter().find(|&every| years / f64::from(every) <= N + 2.0).unwrap_or(2000);
        let first_of = |year: i32| Date::new(i16::try_from(year).ok()?, 1, 1).ok();
        return (year_of(min) - 1..=year_of(max) + 1)
            .filter(|year| year.rem_euclid(every) == 0)
            .filter_map(|year| Some((day_number(first_of(year)?), year.to_string())))
            .filter(|(at, _)| (min..=max).contains(at))
            .collect();
    }
    if days > 50.0 {
        let every = [1, 2, 3].into_iter().find(|&every| days / 30.44 / f64::from(every) <= N).unwrap_or(3);
        return (year_of(min) - 1..=year_of(max) + 1)
            .flat_map(|year| (1..=12).map(move |month| (year, month)))
            .filter(|(_, month)| (month - 1) % every == 0)
            .filter_map(|(year, month)| {
                let first = Date::new(i16::try_from(year).ok()?, i8::try_from(month).ok()?, 1).ok()?;
                Some((day_number(first), format!("{year}-{month:02}")))
            })
            .filter(|(at, _)| (min..=max).contains(at))
            .collect();
    }
    // Days and parts of days, in minutes so that their multiples are exact.
    let minutes = days * 1440.0;
    let every = [1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 180.0, 360.0, 720.0, 1440.0, 2.0 * 1440.0, 7.0 * 1440.0, 14.0 * 1440.0]
        .into_iter()
        .find(|every| minutes / every <= N - 2.0)
        .unwrap_or(14.0 * 1440.0);
    // Several days are counted from the first one shown, shorter steps from midnight.
    let origin = if every > 1440.0 { min.ceil() * 1440.0 } else { 0.0 };
    let (first, last) = (((min * 1440.0 - origin) / every - 1e-6).ceil(), ((max * 1440.0 - origin) / every + 1e-6).floor());
    let n_ticks = (last - first + 1.0).clamp(0.0, 50.0) as usize;
    (0..n_ticks)
        .map(|i| {
            let minute = origin + (first + i as f64) * every;
            let date = DateTime::constant(1970, 1, 1, 0, 0, 0, 0).saturating_add(jiff::SignedDuration::from_mins(minute as i64));
            let label = if every >= 1440.0 {
                date.date().to_string()
            } else {
                format!("{:02}-{:02} {:02}:{:02}", date.month(), date.day(), date.hour(), date.minute())
            };
            (minute / 1440.0, label)
        })
        .collect()
}

/// One entry of the legend.
#[derive(Clone)]
struct Key {
    name: String,
    ink: Ink,
    width: f64,
}

const TITLE_SIZE: f64 = 23.0;
const TEXT_SIZE: f64 = 15.0;
const ROW: f64 = 25.0;
const SWATCH: f64 = 28.0;
const GAP: f64 = 34.0;

/// The field that the curves lie in, with its axes.
struct Frame<'a> {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    x: &'a Axis,
    y: &'a Axis,
}

impl<'a> Frame<'a> {
    /// Draws title, legend, grid and axes, and says where the curves go.
    fn draw(
        canvas: &mut dyn Canvas,
        title: &str,
        y_label: &str,
        x_label: &str,
        x: &'a Axis,
        y: &'a Axis,
        keys: &[Key],
    ) -> anyhow::Result<Self> {
        let Sheet { width, height, margin } = canvas.sheet();
        let page = width - 2.0 * margin;
        if !title.is_empty() {
            canvas.text(&shortened(canvas, title, TITLE_SIZE, page)?, (margin, 48.0), TITLE_SIZE, Ink::Text, Anchor::Start)?;
        }

        // The legend flows in rows beneath the title; what the vertical axis means stands below it, at the axis.
        let mut row = if title.is_empty() { 18.0 } else { 80.0 };
        let mut at = margin;
        for key in keys {
            let name = shortened(canvas, &key.name, TEXT_SIZE, page - SWATCH - 10.0)?;
            let needed = SWATCH + 10.0 + canvas.text_width(&name, TEXT_SIZE)?;
            if at > margin && at + needed > width - margin {
                at = margin;
                row += ROW;
            }
            canvas.line(&[(at, row - 5.0), (at + SWATCH, row - 5.0)], key.ink, key.width.max(2.5))?;
            canvas.text(&name, (at + SWATCH + 10.0, row), TEXT_SIZE, Ink::Text, Anchor::Start)?;
            at += needed + GAP;
        }
        let label_row = if keys.is_empty() || y_label.is_empty() { row } else { row + ROW + 6.0 };
        canvas.text(&shortened(canvas, y_label, TEXT_SIZE, page)?, (margin, label_row), TEXT_SIZE, Ink::Label, Anchor::Start)?;

        let mut tick_width = 0.0;
        for (_, label) in &y.ticks {
            tick_width = f64::max(tick_width, canvas.text_width(label, TEXT_SIZE)?);
        }
        let left = margin + tick_width + 12.0;
        let below = if title.is_empty() { 16.0 } else { 0.0 };
        let bottom = height + below - if x_label.is_empty() { 52.0 } else { 76.0 };
        let frame = Self { left, right: width - margin, top: label_row + 18.0, bottom, x, y };

        for (value, label) in &y.ticks {
            let (_, at) = frame.at(x.min, *value);
            canvas.line(&[(frame.left, at), (frame.right, at)], Ink::Grid, 1.0)?;
            canvas.text(label, (frame.left - 12.0, at + 5.0), TEXT_SIZE, Ink::Label, Anchor::End)?;
        }
        let mut free_from = f64::NEG_INFINITY;
        for (value, label) in &x.ticks {
            let (at, _) = frame.at(*value, y.min);
            canvas.line(&[(at, frame.top), (at, frame.bottom)], Ink::Grid, 1.0)?;
            canvas.line(&[(at, frame.bottom), (at, frame.bottom + 6.0)], Ink::Axis, 1.0)?;
            // Pushed in at the edges of the page, and left out where it would touch the one before.
            let half = canvas.text_width(label, TEXT_SIZE)? / 2.0;
            let middle = at.min(width - 8.0 - half).max(8.0 + half);
            if middle - half > free_from {
                canvas.text(label, (middle, frame.bottom + 25.0), TEXT_SIZE, Ink::Label, Anchor::Middle)?;
                free_from = middle + half + 10.0;
            }
        }
        canvas.line(&[(frame.left, frame.bottom), (frame.right, frame.bottom)], Ink::Axis, 1.5)?;
        canvas.text(
            x_label,
            (f64::midpoint(frame.left, frame.right), height + below / 1.3 - 24.0),
            TEXT_SIZE,
            Ink::Label,
            Anchor::Middle,
        )?;
        if keys.is_empty() {
            let middle = (f64::midpoint(frame.left, frame.right), f64::midpoint(frame.top, frame.bottom));
            canvas.text("no data", middle, TITLE_SIZE, Ink::Axis, Anchor::Middle)?;
        }
        Ok(frame)
    }

    fn at(&self, x: f64, y: f64) -> (f64, f64) {
        (self.left + self.x.place(x) * (self.right - self.left), self.bottom - self.y.place(y) * (self.bottom - self.top))
    }

    fn place(&self, points: &[(f64, f64)]) -> Vec<(f64, f64)> {
        points.iter().map(|&(x, y)| self.at(x, y)).collect()
    }
}

/// A text cut so that it fits into `room` pixels, ending in an ellipsis then.
fn shortened(canvas: &dyn Canvas, text: &str, size: f64, room: f64) -> anyhow::Result<String> {
    if canvas.text_width(text, size)? <= room {
        return Ok(text.to_owned());
    }
    let chars: Vec<char> = text.chars().collect();
    let cut = |n: usize| chars[..n].iter().collect::<String>() + "…";
    let (mut fits, mut too_long) = (0, chars.len());
    while too_long - fits > 1 {
        let middle = usize::midpoint(fits, too_long);
        if canvas.text_width(&cut(middle), size)? <= room { fits = middle } else { too_long = middle }
    }
    Ok(cut(fits))
}
