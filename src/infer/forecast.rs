//! Dated values beyond the end of a series.

use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::evaluate::Forward;
use super::session::Session;
use super::task::{Corpus, DataSpec, OtherData};
use crate::data::series::Dated;

/// Forecasts beyond the end of the run's data, or of a newer file with the same columns.
///
/// # Errors
/// A run that is no forecast; data that cannot be read; the device's.
pub fn forecast(session: &mut Session, data: &[String]) -> Result<Vec<Dated>> {
    if matches!(session.spec, DataSpec::Text(_)) {
        bail!("this run is a language model and forecasts no series: use `carrousel generate`");
    }
    let series = if data.is_empty() {
        match Corpus::load(&session.config, Some(&session.spec))? {
            Corpus::Series(series) => series,
            Corpus::Text(_) => bail!("the run's data is text now"),
        }
    } else {
        match Corpus::load_other(&session.config, data, &session.spec)? {
            OtherData::Series(series) => series,
            OtherData::Text(_) => bail!("the file is text"),
        }
    };
    let batch = Arc::new(series.latest_window());
    let (_, outputs) = session.forward(&batch, None, true).context("the latest window")?;
    Ok(series.forecast(&outputs))
}
