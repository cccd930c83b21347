//! Times of a series as its file writes them: reading, the step between rows, what comes after the last row, the season.

use std::collections::HashMap;

use jiff::civil::{Date, DateTime, date};
use jiff::{SignedDuration, Span};
use serde::{Deserialize, Serialize};

const SECOND: i64 = 1_000_000;
const DAY: i64 = 86_400 * SECOND;
const YEAR_DAYS: f64 = 365.25;
/// Decimal years are counted in units of 1e-12 years.
const YEAR_TICKS: f64 = 1e12;

/// How a file writes its times. A time is kept as ticks: microseconds since 1970, 1e-12 years for decimal years, or the number of the row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Style {
    /// No times: rows are numbered.
    Rows,
    /// `2001-12-29`, `29.12.2001`, `12/29/2001` or `20011229`.
    Date(DateForm),
    /// `2001-12` or `2001/12`.
    Month {
        /// `-` or `/`.
        separator: String,
    },
    /// `2001-12-29T13:30:00Z` and its relatives, with any date.
    DateTime {
        /// The date before it.
        #[serde(flatten)]
        date: DateForm,
        /// `T` or a blank, before the time of day.
        between: char,
        /// Whether seconds are written.
        seconds: bool,
        /// Digits after the seconds.
        digits: usize,
        /// Nothing, `Z`, or an offset such as `+02:00`.
        zone: String,
    },
    /// `2001.95833333333`, or `2001`.
    Decimal {
        /// Most digits after the point.
        digits: usize,
        /// Whether zeros at the end are left out.
        trims: bool,
    },
}

/// How a date is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DateForm {
    /// `-`, `/`, `.` or nothing.
    pub separator: String,
    /// What comes first.
    #[serde(default)]
    pub order: DateOrder,
    /// Without zeros before numbers of one digit.
    #[serde(default)]
    pub short: bool,
}

/// In which order a date is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DateOrder {
    /// `2001-12-29`.
    #[default]
    YearFirst,
    /// `29.12.2001`.
    DayFirst,
    /// `12/29/2001`.
    MonthFirst,
}

impl DateForm {
    fn print(&self, day: Date) -> String {
        let (y, s) = (day.year(), &self.separator);
        let two = |n: i8| if self.short { n.to_string() } else { format!("{n:02}") };
        let (m, d) = (two(day.month()), two(day.day()));
        match self.order {
            DateOrder::YearFirst => format!("{y:04}{s}{m}{s}{d}"),
            DateOrder::DayFirst => format!("{d}{s}{m}{s}{y:04}"),
            DateOrder::MonthFirst => format!("{m}{s}{d}{s}{y:04}"),
        }
    }
}

impl Style {
    /// How its dates are written, if it has days.
    pub fn date(&self) -> Option<&DateForm> {
        match self {
            Self::Date(date) | Self::DateTime { date, .. } => Some(date),
            Self::Rows | Self::Month { .. } | Self::Decimal { .. } => None,
        }
    }

    /// As [`Style::date`], to be changed.
    pub(crate) fn date_mut(&mut self) -> Option<&mut DateForm> {
        match self {
            Self::Date(date) | Self::DateTime { date, .. } => Some(date),
            Self::Rows | Self::Month { .. } | Self::Decimal { .. } => None,
        }
    }

    /// Whether two times are written in one way, but for the zone and digits.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

/// The step from one row to the next.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Rows that are only numbered.
    Rows,
    /// Microseconds: half hours, days, weeks.
    Micros(i64),
    /// Calendar months; `ends`: each time is the last day of its month.
    Months {
        /// How many.
        n: i64,
        /// Last days of months.
        ends: bool,
    },
    /// Monday to Friday.
    Weekdays,
    /// Steps a year, of decimal years.
    PerYear(f64),
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let count = |f: &mut std::fmt::Formatter<'_>, n: i64, unit: &str| write!(f, "{n} {unit}{}", if n == 1 { "" } else { "s" });
        match *self {
            Self::Rows => write!(f, "1 row"),
            Self::Micros(us) if us % DAY == 0 => count(f, us / DAY, "day"),
            Self::Micros(us) if us % (60 * SECOND) == 0 => count(f, us / (60 * SECOND), "minute"),
            Self::Micros(us) => write!(f, "{} seconds", us as f64 / SECOND as f64),
            Self::Months { n, .. } => count(f, n, "month"),
            Self::Weekdays => write!(f, "1 weekday"),
            Self::PerYear(k) => write!(f, "1/{k} year"),
        }
    }
}

impl Step {
    /// Whether two inferred steps are the same, but for the rounding of decimal years.
    pub(crate) fn is_like(self, other: Self) -> bool {
        match (self, other) {
            (Self::PerYear(a), Self::PerYear(b)) => (a - b).abs() < 0.02 * a.abs(),
            (Self::Months { n: a, .. }, Self::Months { n: b, .. }) => a == b,
            // A short file may show no weekend.
            (Self::Weekdays, Self::Micros(DAY)) | (Self::Micros(DAY), Self::Weekdays) => true,
            _ => self == other,
        }
    }
}

/// Where a time stands on an axis.
#[derive(Clone, Debug, PartialEq)]
pub enum Axis {
    /// `2001-12-29T13:30:00`.
    Date(String),
    /// Decimal years, or the number of the row.
    Number(f64),
}

/// A season: whole steps for the naive forecasts, and its exact length for what spans many seasons.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Season {
    /// Rows of one season.
    pub steps: usize,
    /// The same, not rounded: a year has 52.18 weeks.
    pub period: f64,
}

/// How times are written and how far they are apart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Clock {
    /// How times are written.
    pub style: Style,
    /// From one row to the next.
    pub step: Step,
}

impl Clock {
    /// The clock of strictly increasing times, and the number of steps from the first row to each row; `None` for the latter where the rows
    /// do not lie on a regular grid.
    pub fn infer(style: Style, ticks: &[i64]) -> (Self, Option<Vec<usize>>) {
        let step = infer_step(&style, ticks);
        let clock = Self { style, step };
        let Some(&first) = ticks.first() else { return (clock, None) };
        let offsets: Option<Vec<usize>> = ticks.iter().map(|&tick| clock.steps_between(first, tick)).collect();
        let offsets = offsets.filter(|o| o.windows(2).all(|w| w[0] < w[1]) && o.last().is_some_and(|&last| last < 2 * o.len()));
        (clock, offsets)
    }

    /// Whole steps from `from` to `to`, if it is a whole number.
    fn steps_between(&self, from: i64, to: i64) -> Option<usize> {
        let whole = |by: i64, step: i64| (step > 0 && by % step == 0).then(|| usize::try_from(by / step).ok()).flatten();
        match self.step {
            Step::Rows => whole(to - from, 1),
            Step::Micros(us) => whole(to - from, us),
            Step::Months { n, .. } => whole(month_of(to) - month_of(from), n),
            Step::Weekdays => whole(weekday_number(to) - weekday_number(from), 1),
            Step::PerYear(k) => {
                let steps = (to - from) as f64 / YEAR_TICKS * k;
                ((steps - steps.round()).abs() <= 0.25 && steps > -0.5).then_some(steps.round() as usize)
            }
        }
    }

    /// The time `n` steps after `tick`.
    pub fn after(&self, tick: i64, n: usize) -> i64 {
        let n = n as i64;
        match self.step {
            Step::Rows => tick.saturating_add(n),
            Step::Micros(us) => tick.saturating_add(us.saturating_mul(n)),
            Step::Months { n: months, ends } => {
                let start = moment(tick);
                let span = Span::new().try_months(months.saturating_mul(n));
                let end = span.and_then(|span| start.checked_add(span)).unwrap_or(DateTime::MAX);
                ticks_of(if ends { end.last_of_month() } else { end })
            }
            Step::Weekdays => {
                let (week, day) = ((weekday_number(tick) + n).div_euclid(5), (weekday_number(tick) + n).rem_euclid(5));
                (week * 7 + day + MONDAY) * DAY + tick.rem_euclid(DAY)
            }
            Step::PerYear(k) => {
                let at = tick as f64 / YEAR_TICKS * k;
                // A file rounds its decimals; times on the grid of the year stay on it.
                let at = if (at - at.round()).abs() < 0.02 { at.round() } else { at };
                ((at + n as f64) / k * YEAR_TICKS).round() as i64
            }
        }
    }

    /// Steps since a fixed origin: what the phase of a season is taken from.
    pub fn position(&self, tick: i64) -> f64 {
        match self.step {
            Step::Rows => tick as f64,
            Step::Micros(us) => tick as f64 / us as f64,
            Step::Months { n, .. } => month_of(tick) as f64 / n as f64,
            Step::Weekdays => weekday_number(tick) as f64,
            Step::PerYear(k) => tick as f64 / YEAR_TICKS * k,
        }
    }

    /// The time for an axis: a date as ISO 8601 writes it, else years or the number of the row.
    pub fn axis(&self, tick: i64) -> Axis {
        match self.style {
            Style::Rows => Axis::Number(tick as f64),
            Style::Decimal { .. } => Axis::Number(tick as f64 / YEAR_TICKS),
            Style::Date(_) | Style::Month { .. } | Style::DateTime { .. } => {
                let at = moment(tick);
                Axis::Date(format!(
                    "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}",
                    at.year(),
                    at.month(),
                    at.day(),
                    at.hour(),
                    at.minute(),
                    at.second()
                ))
            }
        }
    }

    /// The time as the file writes it.
    pub fn print(&self, tick: i64) -> String {
        match &self.style {
            Style::Rows => tick.to_string(),
            Style::Date(form) => form.print(moment(tick).date()),
            Style::Month { separator: s } => {
                let d = moment(tick).date();
                format!("{:04}{s}{:02}", d.year(), d.month())
            }
            Style::DateTime { date, between, seconds, digits, zone } => {
                let at = moment(tick.saturating_add(zone_micros(zone).unwrap_or(0)));
                let hour = if date.short { at.hour().to_string() } else { format!("{:02}", at.hour()) };
                let mut text = format!("{}{between}{hour}:{:02}", date.print(at.date()), at.minute());
                if *seconds {
                    text.push_str(&format!(":{:02}", at.second()));
                }
                if *digits > 0 {
                    let fraction = format!("{:06}", at.subsec_nanosecond() / 1000);
                    text.push('.');
                    text.push_str(&fraction[..(*digits).min(6)]);
                }
                text + zone
            }
            Style::Decimal { digits, trims } => {
                let text = format!("{:.*}", *digits, tick as f64 / YEAR_TICKS);
                if *trims && text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
            }
        }
    }

    /// The season that goes with the step: a day of hours or half hours, a week of days, a year of weeks, months or quarters; none for years
    /// and for rows without times.
    pub fn season(&self) -> Option<Season> {
        let whole = |steps: i64| Some(Season { steps: steps as usize, period: steps as f64 });
        match self.step {
            Step::Micros(us) if us > 0 && us < DAY && DAY % us == 0 => whole(DAY / us),
            Step::Micros(DAY) => whole(7),
            Step::Micros(us) if us > DAY && us <= 100 * DAY => {
                let period = YEAR_DAYS * DAY as f64 / us as f64;
                Some(Season { steps: period.round() as usize, period })
            }
            Step::Months { n, .. } if n > 0 && n < 12 && 12 % n == 0 => whole(12 / n),
            Step::Weekdays => whole(5),
            Step::PerYear(k) if (1.5..300.0).contains(&k) => Some(Season { steps: k.round() as usize, period: k }),
            Step::PerYear(k) if (360.0..370.0).contains(&k) => whole(7),
            _ => None,
        }
    }
}

/// The first Monday after the epoch, in days.
const MONDAY: i64 = 4;

fn epoch() -> DateTime {
    date(1970, 1, 1).at(0, 0, 0, 0)
}

fn moment(tick: i64) -> DateTime {
    epoch().checked_add(SignedDuration::from_micros(tick)).unwrap_or(if tick < 0 { DateTime::MIN } else { DateTime::MAX })
}

fn ticks_of(at: DateTime) -> i64 {
    // Years -9999 to 9999 are well within 64 bits of microseconds.
    at.duration_since(epoch()).as_micros() as i64
}

fn month_of(tick: i64) -> i64 {
    let at = moment(tick);
    i64::from(at.year()) * 12 + i64::from(at.month()) - 1
}

/// Weekdays since the first Monday; a Saturday or Sunday counts as the Friday before.
fn weekday_number(tick: i64) -> i64 {
    let day = tick.div_euclid(DAY) - MONDAY;
    day.div_euclid(7) * 5 + day.rem_euclid(7).min(4)
}

fn is_weekend(tick: i64) -> bool {
    (tick.div_euclid(DAY) - MONDAY).rem_euclid(7) > 4
}

fn most_common(values: impl Iterator<Item = i64>) -> i64 {
    let mut counts: HashMap<i64, usize> = HashMap::new();
    for value in values {
        *counts.entry(value).or_default() += 1;
    }
    counts.into_iter().max_by(|a, b| a.1.cmp(&b.1).then(b.0.cmp(&a.0))).map_or(1, |(value, _)| value).max(1)
}

fn infer_step(style: &Style, ticks: &[i64]) -> Step {
    let gaps = || ticks.windows(2).map(|w| w[1] - w[0]);
    match style {
        Style::Rows => Step::Rows,
        Style::Decimal { .. } => {
            let mut sorted: Vec<i64> = gaps().collect();
            sorted.sort_unstable();
            let Some(&middle) = sorted.get(sorted.len() / 2) else { return Step::PerYear(1.0) };
            // Written with few digits the gaps differ; their mean is exact where no row is missing.
            let near: Vec<f64> = sorted.iter().filter(|&&gap| (gap as f64) < 1.5 * middle as f64).map(|&gap| gap as f64).collect();
            let k = YEAR_TICKS / (near.iter().sum::<f64>() / near.len().max(1) as f64);
            let round = k.round();
            if k < 0.9 {
                Step::PerYear(1.0 / (1.0 / k).round())
            } else if k <= 24.5 && (k - round).abs() < 0.02 * k {
                Step::PerYear(round)
            } else {
                Step::PerYear(k)
            }
        }
        Style::Month { .. } => Step::Months { n: most_common(ticks.windows(2).map(|w| month_of(w[1]) - month_of(w[0]))), ends: false },
        Style::Date(_) | Style::DateTime { .. } => {
            let least = gaps().min().unwrap_or(DAY);
            let same_time = ticks.windows(2).all(|w| w[0].rem_euclid(DAY) == w[1].rem_euclid(DAY));
            if same_time && least >= 28 * DAY {
                let days: Vec<Date> = ticks.iter().map(|&tick| moment(tick).date()).collect();
                let ends = days.iter().all(|day| *day == day.last_of_month());
                if ends || days.windows(2).all(|w| w[0].day() == w[1].day()) {
                    return Step::Months { n: most_common(ticks.windows(2).map(|w| month_of(w[1]) - month_of(w[0]))), ends };
                }
            }
            if same_time && least == DAY && gaps().any(|gap| gap == 3 * DAY) && !ticks.iter().any(|&tick| is_weekend(tick)) {
                return Step::Weekdays;
            }
            Step::Micros(most_common(gaps()))
        }
    }
}

/// Reads a time that cannot be taken for a plain number: dates with the year first, months and date-times.
pub fn parse_iso(cell: &str) -> Option<(Style, i64)> {
    let is_month = cell.is_ascii() && cell.len() == 7 && matches!(cell.as_bytes()[4], b'-' | b'/');
    if is_month && cell.bytes().enumerate().all(|(i, byte)| i == 4 || byte.is_ascii_digit()) {
        let day = Date::new(cell[..4].parse().ok()?, cell[5..].parse().ok()?, 1).ok()?;
        return Some((Style::Month { separator: cell[4..5].to_string() }, ticks_of(day.at(0, 0, 0, 0))));
    }
    parse_dated(cell, DateOrder::YearFirst)
}

/// Reads `29.12.2001`, `29/12/2001` or `29-12-2001`, with a time of day or without.
pub fn parse_day_first(cell: &str) -> Option<(Style, i64)> {
    parse_dated(cell, DateOrder::DayFirst)
}

/// Reads `12/29/2001` or `12-29-2001`, with a time of day or without. Nobody puts points between them in this order.
pub fn parse_month_first(cell: &str) -> Option<(Style, i64)> {
    parse_dated(cell, DateOrder::MonthFirst).filter(|(style, _)| style.date().is_some_and(|date| date.separator != "."))
}

/// A number of one or two digits, and whether it lacks the zero that would make it two.
fn one_or_two(digits: &str) -> Option<(i8, bool)> {
    let is = matches!(digits.len(), 1 | 2) && digits.bytes().all(|byte| byte.is_ascii_digit());
    if is { Some((digits.parse().ok()?, digits.len() == 1)) } else { None }
}

fn parse_dated(cell: &str, order: DateOrder) -> Option<(Style, i64)> {
    if !cell.is_ascii() || !cell.as_bytes().first()?.is_ascii_digit() {
        return None;
    }
    let date_end = cell.find(['T', ' ']).unwrap_or(cell.len());
    let separator = cell[..date_end].find(['-', '/', '.']).map(|at| &cell[at..=at])?;
    let mut parts = cell[..date_end].split(separator);
    let (Some(first), Some(second), Some(third), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else { return None };
    let (year, month, day) = match order {
        DateOrder::YearFirst => (first, second, third),
        DateOrder::DayFirst => (third, second, first),
        DateOrder::MonthFirst => (third, first, second),
    };
    let year = Some(year).filter(|year| year.len() == 4 && year.bytes().all(|byte| byte.is_ascii_digit()))?.parse().ok()?;
    let ((month, short_month), (day, short_day)) = (one_or_two(month)?, one_or_two(day)?);
    let day = Date::new(year, month, day).ok()?;
    let mut form = DateForm { separator: separator.to_string(), order, short: short_month || short_day };
    let Some(between) = cell[date_end..].chars().next() else { return Some((Style::Date(form), ticks_of(day.at(0, 0, 0, 0)))) };
    let rest = &cell[date_end + 1..];
    let (clock, zone) = rest.split_at(rest.find(['Z', '+', '-']).unwrap_or(rest.len()));
    let zone_us = zone_micros(zone)?;
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, ""));
    let two = |digits: &str| one_or_two(digits).filter(|(_, short)| !short).map(|(number, _)| number);
    let parts: Vec<&str> = clock.split(':').collect();
    let ((hour, short_hour), minute, second) = match parts.as_slice() {
        [h, m] => (one_or_two(h)?, two(m)?, 0),
        [h, m, s] => (one_or_two(h)?, two(m)?, two(s)?),
        _ => return None,
    };
    form.short |= short_hour;
    if fraction.len() > 9 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let micros: i32 = format!("{fraction:0<6}")[..6].parse().ok()?;
    let at = DateTime::new(year, month, day.day(), hour, minute, second, micros * 1000).ok()?;
    let digits = fraction.len().min(6);
    let style = Style::DateTime { date: form, between, seconds: parts.len() == 3, digits, zone: zone.to_string() };
    Some((style, ticks_of(at) - zone_us))
}

/// `Z`, nothing, `+02:00`, `+0200`, `+02` in microseconds.
fn zone_micros(zone: &str) -> Option<i64> {
    if zone.is_empty() || zone == "Z" {
        return Some(0);
    }
    let sign = if zone.starts_with('-') { -1 } else { 1 };
    let digits: String = zone[1..].chars().filter(|c| *c != ':').collect();
    let value: i64 = digits.parse().ok()?;
    match digits.len() {
        2 => Some(sign * value * 3600 * SECOND),
        4 => Some(sign * (value / 100 * 3600 + value % 100 * 60) * SECOND),
        _ => None,
    }
}

/// Reads `20011229`.
pub fn parse_compact(cell: &str) -> Option<(Style, i64)> {
    if cell.len() != 8 || !cell.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let day = Date::new(cell[..4].parse().ok()?, cell[4..6].parse().ok()?, cell[6..].parse().ok()?).ok()?;
    let form = DateForm { separator: String::new(), order: DateOrder::YearFirst, short: false };
    Some((Style::Date(form), ticks_of(day.at(0, 0, 0, 0))))
}

/// Reads a year, whole or decimal, from 1000 to 3000; the digits after the point are in the style.
pub fn parse_decimal(cell: &str) -> Option<(Style, i64)> {
    if !cell.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return None;
    }
    let year: f64 = cell.parse().ok()?;
    let digits = cell.split_once('.').map_or(0, |(_, fraction)| fraction.len());
    (1000.0..=3000.0).contains(&year).then(|| (Style::Decimal { digits, trims: false }, (year * YEAR_TICKS).round() as i64))
}
