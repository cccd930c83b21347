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
    /// `2001-12-29`, `2001/12/29` or `20011229`.
    Date {
        /// `-`, `/` or nothing.
        separator: String,
    },
    /// `2001-12` or `2001/12`.
    Month {
        /// `-` or `/`.
        separator: String,
    },
    /// `2001-12-29T13:30:00Z` and its relatives.
    DateTime {
        /// `-` or `/`, within the date.
        separator: String,
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

impl Style {
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

    /// The time as a number for an axis: years for times of a calendar, else the number of the row.
    pub fn axis(&self, tick: i64) -> f64 {
        match self.style {
            Style::Rows => tick as f64,
            Style::Decimal { .. } => tick as f64 / YEAR_TICKS,
            Style::Date { .. } | Style::Month { .. } | Style::DateTime { .. } => 1970.0 + tick as f64 / (YEAR_DAYS * DAY as f64),
        }
    }

    /// The time as the file writes it.
    pub fn print(&self, tick: i64) -> String {
        match &self.style {
            Style::Rows => tick.to_string(),
            Style::Date { separator: s } => {
                let d = moment(tick).date();
                format!("{:04}{s}{:02}{s}{:02}", d.year(), d.month(), d.day())
            }
            Style::Month { separator: s } => {
                let d = moment(tick).date();
                format!("{:04}{s}{:02}", d.year(), d.month())
            }
            Style::DateTime { separator: s, between, seconds, digits, zone } => {
                let at = moment(tick.saturating_add(zone_micros(zone).unwrap_or(0)));
                let mut text =
                    format!("{:04}{s}{:02}{s}{:02}{between}{:02}:{:02}", at.year(), at.month(), at.day(), at.hour(), at.minute());
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
        Style::Date { .. } | Style::DateTime { .. } => {
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

/// Reads a time that cannot be taken for a plain number: ISO dates, months and date-times.
pub fn parse_iso(cell: &str) -> Option<(Style, i64)> {
    let digits =
        |text: &str, n: usize| (text.len() == n && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse::<i16>().ok()).flatten();
    if !cell.is_ascii() || cell.len() < 7 {
        return None;
    }
    let separator = &cell[4..5];
    if separator != "-" && separator != "/" {
        return None;
    }
    let (year, month) = (digits(&cell[..4], 4)?, digits(&cell[5..7], 2)? as i8);
    if cell.len() == 7 {
        let day = Date::new(year, month, 1).ok()?;
        return Some((Style::Month { separator: separator.to_string() }, ticks_of(day.at(0, 0, 0, 0))));
    }
    if cell.len() < 10 || &cell[7..8] != separator {
        return None;
    }
    let day = Date::new(year, month, digits(&cell[8..10], 2)? as i8).ok()?;
    if cell.len() == 10 {
        return Some((Style::Date { separator: separator.to_string() }, ticks_of(day.at(0, 0, 0, 0))));
    }
    let between = char::from(cell.as_bytes()[10]);
    if !matches!(between, 'T' | ' ') {
        return None;
    }
    let rest = &cell[11..];
    let (clock, zone) = rest.split_at(rest.find(['Z', '+', '-']).unwrap_or(rest.len()));
    let zone_us = zone_micros(zone)?;
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, ""));
    let parts: Vec<&str> = clock.split(':').collect();
    let (hour, minute, second) = match parts.as_slice() {
        [h, m] => (digits(h, 2)?, digits(m, 2)?, 0),
        [h, m, s] => (digits(h, 2)?, digits(m, 2)?, digits(s, 2)?),
        _ => return None,
    };
    if fraction.len() > 9 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let micros: i64 = format!("{fraction:0<6}")[..6].parse().ok()?;
    let at = DateTime::new(year, month, day.day(), hour as i8, minute as i8, second as i8, (micros * 1000) as i32).ok()?;
    let style = Style::DateTime {
        separator: separator.to_string(),
        between,
        seconds: parts.len() == 3,
        digits: fraction.len().min(6),
        zone: zone.to_string(),
    };
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
    Some((Style::Date { separator: String::new() }, ticks_of(day.at(0, 0, 0, 0))))
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
