//! Data that the program carries with it, so that it does something worth looking at without any file. Sources and licences: `README.md` beside this file.

use super::error::DataError;
use super::series::{Series, SeriesOptions};
use super::split::Split;

/// How the built-in record is named in messages and reports.
pub const CO2_NAME: &str = "built-in CO2 record";

/// The weekly carbon dioxide record of Mauna Loa as CSV: `date` as YYYYMMDD, `co2` in ppm.
pub const CO2_CSV: &str = include_str!("co2_weekly.csv");

/// The split that the built-in example fixes for itself: 0.72, 0.08, 0.2.
pub fn co2_split() -> Split {
    Split { train: 0.72, valid: 0.08, test: 0.2 }
}

/// The weekly carbon dioxide record, cut by `options.split` (the built-in example's own is [`co2_split`]).
///
/// # Errors
/// As [`Series::from_csv`]: a column that does not exist, or a window that does not fit.
pub fn co2(options: &SeriesOptions) -> Result<Series, DataError> {
    Series::from_csv(CO2_NAME, CO2_CSV.as_bytes(), options)
}
