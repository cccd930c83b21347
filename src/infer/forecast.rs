//! Dated values beyond the end of a series.

use std::sync::Arc;

use anyhow::{Context, Result};

use super::evaluate::Forward;
use super::session::Session;
use super::task::{Corpus, DataSpec, OtherData};
use crate::data::sequences::Labelled;
use crate::data::series::Dated;
use crate::usage::UsageError;

/// Forecasts beyond the end of the run's data, or of a newer file with the same columns.
///
/// # Errors
/// A run that is no forecast; data that cannot be read; the device's.
pub fn forecast(session: &mut Session, data: &[String]) -> Result<Vec<Dated>> {
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
    Ok(series.forecast(&outputs))
}
