//! Parquet files as records, row after row: one row group's pages are in memory at a time.

use std::panic::{AssertUnwindSafe, catch_unwind};

use ::parquet::basic::{LogicalType, TimeUnit};
use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::{Field, Row};
use serde_json::{Map, Number, Value};

use super::error::DataError;
use super::records::Record;
use super::source::{Source, refuse};

/// Hands over the rows one after the other, with their number from 1.
///
/// # Errors
/// A file that is no Parquet or is damaged; what `visit` says.
pub fn for_each(source: &Source, visit: &mut dyn FnMut(u64, Record) -> Result<(), DataError>) -> Result<(), DataError> {
    let damaged = |row: u64, problem: String| {
        let place = if row == 0 { String::new() } else { format!(" from row {row} on") };
        refuse(
            &source.name,
            &format!("it cannot be read as Parquet{place}: {problem}"),
            "write it again, or convert it to CSV or JSON lines",
        )
    };
    let file = source.whole_file()?;
    // The format is rich, and its reader gives up on some of what a damaged file may say.
    let careful = |row: u64, what: &mut dyn FnMut() -> Result<(), ParquetError>| match catch_unwind(AssertUnwindSafe(what)) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(e)) => Err(damaged(row, e.to_string().trim_start_matches("Parquet error: ").to_string())),
        Err(_) => Err(damaged(row, "its content contradicts itself, or is of a kind that is not known here".to_string())),
    };
    let mut opened = None;
    let mut file = Some(file);
    careful(0, &mut || {
        if let Some(file) = file.take() {
            opened = Some(SerializedFileReader::new(file)?);
        }
        Ok(())
    })?;
    let Some(reader) = opened else { return Err(damaged(0, "it cannot be opened".to_string())) };
    let schema = reader.metadata().file_metadata().schema_descr();
    // Nanoseconds since 1970 come as plain numbers.
    let nanoseconds: Vec<String> = schema
        .columns()
        .iter()
        .filter(|column| matches!(column.logical_type_ref(), Some(LogicalType::Timestamp(kind)) if kind.unit == TimeUnit::NANOS))
        .map(|column| column.name().to_string())
        .collect();
    let mut rows = None;
    careful(0, &mut || {
        rows = Some(reader.get_row_iter(None)?);
        Ok(())
    })?;
    let mut number = 0;
    loop {
        number += 1;
        let mut next: Option<Row> = None;
        careful(number, &mut || {
            next = rows.as_mut().and_then(Iterator::next).transpose()?;
            Ok(())
        })?;
        let Some(row) = next else { break };
        let pairs = row.get_column_iter().map(|(name, field)| {
            let value = match field {
                Field::Long(value) if nanoseconds.contains(name) => time(jiff::Timestamp::from_nanosecond(i128::from(*value)).ok()),
                field => value_of(field),
            };
            (name.clone(), value)
        });
        visit(number, Record(pairs.collect()))?;
    }
    if number > 1 { Ok(()) } else { Err(DataError::Empty { file: source.name.clone(), wanted: "rows".to_string() }) }
}

fn time(at: Option<jiff::Timestamp>) -> Value {
    at.map_or(Value::Null, |at| Value::String(at.to_zoned(jiff::tz::TimeZone::UTC).datetime().to_string()))
}

fn value_of(field: &Field) -> Value {
    let real = |value: f64| Number::from_f64(value).map_or(Value::Null, Value::Number);
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::Bool(*value),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float16(value) => real(f64::from(value.to_f32())),
        // Its decimal digits, not those of the nearest f64.
        Field::Float(value) => value.to_string().parse().map_or(Value::Null, real),
        Field::Double(value) => real(*value),
        Field::Decimal(_) => field.to_string().parse().map_or(Value::Null, real),
        Field::Str(text) => Value::String(text.clone()),
        Field::Bytes(bytes) => Value::String(String::from_utf8_lossy(bytes.data()).into_owned()),
        Field::Date(days) => {
            let first = jiff::civil::date(1970, 1, 1);
            let day = jiff::Span::new().try_days(*days).ok().and_then(|span| first.checked_add(span).ok());
            day.map_or(Value::Null, |day| Value::String(day.to_string()))
        }
        Field::TimeMillis(value) => (*value).into(),
        Field::TimeMicros(value) => (*value).into(),
        Field::TimestampMillis(at) => time(jiff::Timestamp::from_millisecond(*at).ok()),
        Field::TimestampMicros(at) => time(jiff::Timestamp::from_microsecond(*at).ok()),
        Field::Group(row) => Value::Object(row.get_column_iter().map(|(name, field)| (name.clone(), value_of(field))).collect()),
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(value_of).collect()),
        Field::MapInternal(_) => Value::Object(Map::new()),
    }
}
