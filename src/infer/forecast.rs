//! Dated values beyond the end of a series, and their quantiles.

use std::sync::Arc;

use anyhow::{Context, Result};

use super::evaluate::{Forward, by_level};
use super::session::Session;
use super::task::{Corpus, DataSpec, OtherData};
use crate::data::sequences::Labelled;
use crate::data::series::Dated;
use crate::usage::UsageError;

/// What is said of the time to come.
pub struct Beyond {
    /// One value a step and target; of quantiles that of the level nearest to one half.
    pub values: Vec<Dated>,
    /// Levels with their values, in parallel with `values`.
    pub quantiles: Vec<(f64, Vec<f64>)>,
}

/// Forecasts beyond the end of the run's data, or of a newer file with the same columns.
///
/// # Errors
/// A run that is no forecast; data that cannot be read; the device's.
pub fn forecast(session: &mut Session, data: &[String]) -> Result<Beyond> {
    if !matches!(session.spec, DataSpec::Series(_)) {
        let problem = format!("a run of --task {} forecasts no series: give one of --task forecast", session.config.task.name());
        return Err(UsageError(problem).into());
    }
    let series = if data.is_empty() {
        match Corpus::load(&session.config, Some(&session.spec))? {
            Corpus::Series(series) => Some(series),
            Corpus::Text(_) | Corpus::Sequences(_) => None,
        }
    } else {
        match Corpus::load_other(&session.config, data, &session.spec, Labelled::All)? {
            OtherData::Series(series) => Some(series),
            OtherData::Text(_) | OtherData::Sequences(_) => None,
        }
    };
    let series = series.context("a run of --task forecast reads a series")?;
    let batch = Arc::new(series.latest_window());
    let (_, outputs) = session.forward(&batch, None, true).context("the latest window")?;
    let Some(levels) = session.config.quantiles else {
        return Ok(Beyond { values: series.forecast(&outputs), quantiles: Vec::new() });
    };
    let by_level: Vec<Vec<Dated>> = by_level(&outputs, levels).iter().map(|row| series.forecast(row)).collect();
    let values = by_level[levels.middle()].clone();
    let numbers = by_level.into_iter().map(|dated| dated.into_iter().map(|dated| dated.value).collect());
    Ok(Beyond { values, quantiles: levels.values().zip(numbers).collect() })
}
