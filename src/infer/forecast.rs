//! Dated values beyond the end of a series.

use std::sync::Arc;

use anyhow::{Context, Result};

use super::evaluate::Forward;
use super::session::Session;
use super::task::{Corpus, DataSpec, OtherData};
use crate::data::series::Dated;
use crate::usage::UsageError;

/// Forecasts beyond the end of the run's data, or of a newer file with the same columns.
///
/// # Errors
/// A run that is no forecast; data that cannot be read; the device's.
pub fn forecast(session: &mut Session, data: &[String]) -> Result<Vec<Dated>> {
    if matches!(session.spec, DataSpec::Text(_)) {
        return Err(UsageError("this run is a language model and forecasts no series: use `carrousel generate`".to_owned()).into());
    }
    let series = if data.is_empty() {
        match Corpus::load(&session.config, Some(&session.spec))? {
            Corpus::Series(series) => series,
            Corpus::Text(_) => return Err(UsageError("the run's data is text now: give the series again with --data".to_owned()).into()),
        }
    } else {
        match Corpus::load_other(&session.config, data, &session.spec)? {
            OtherData::Series(series) => series,
            OtherData::Text(_) => {
                return Err(UsageError(
                    "--data is a text, but this run forecasts a series: give a CSV file with the same columns".to_owned(),
                )
                .into());
            }
        }
    };
    let batch = Arc::new(series.latest_window());
    let (_, outputs) = session.forward(&batch, None, true).context("the latest window")?;
    Ok(series.forecast(&outputs))
}
