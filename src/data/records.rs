//! Records: rows of named values, as JSON lines and Parquet have them. What a column is for is not known here.
//!
//! | a record as | looks like |
//! | --- | --- |
//! | a row of a table | `{"date": "2024-01-01", "units": 12, "open": true}` |
//! | a text | `{"text": "..."}`, or the key that `--text` names |
//! | a labelled sequence | `{"label": "a", "values": [[1, 2], [3, 4]]}`, a list of steps; or `{"label": "a", "x": [1, 3], "y": [2, 4]}`, a list a feature; or `{"label": "a", "text": "..."}` |

use std::ops::Range;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::Value;

use super::error::DataError;
#[cfg(feature = "parquet")]
use super::parquet;
use super::sequences::{Cells, Raw};
use super::source::{Reader, Source};

/// Named values, in the order in which the file has them.
pub struct Record(pub Vec<(String, Value)>);

impl Record {
    fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    fn keys(&self) -> String {
        let some = self.0.iter().take(10).map(|(key, _)| key.as_str()).collect::<Vec<_>>().join(", ");
        if self.0.len() <= 10 { some } else { format!("{some} and {} more", self.0.len() - 10) }
    }
}

impl<'de> Deserialize<'de> for Record {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Record;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Record, A::Error> {
                let mut pairs: Vec<(String, Value)> = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    if pairs.iter().any(|(other, _)| *other == key) {
                        return Err(A::Error::custom(format!("the key '{key}' stands twice")));
                    }
                    pairs.push((key, value));
                }
                Ok(Record(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

const JSON_LINES: [&str; 3] = [".jsonl", ".ndjson", ".json"];
const PARQUET: [&str; 2] = [".parquet", ".pq"];

/// Whether a file of this name holds records.
pub fn is_named(name: &str) -> bool {
    let name = super::source::unpacked_name(name).to_lowercase();
    JSON_LINES.iter().chain(&PARQUET).any(|end| name.ends_with(end))
}

/// Whether a file of this name has rows instead of lines.
pub(super) fn has_rows(name: &str) -> bool {
    let name = super::source::unpacked_name(name).to_lowercase();
    PARQUET.iter().any(|end| name.ends_with(end))
}

/// Whether a source holds records: by its name, or where it has none by its first character.
///
/// # Errors
/// The source's.
pub fn holds_records(source: &Source) -> Result<bool, DataError> {
    if source.path().is_some() || source.name.contains('.') {
        return Ok(is_named(&source.name));
    }
    let mut head = [0; 64];
    let n = source.open()?.fill(&mut head)?;
    let head = head[..n].strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&head[..n]);
    Ok(head.trim_ascii_start().starts_with(b"{"))
}

/// Hands over the records one after the other, each with its line or row, from 1.
///
/// # Errors
/// A line that is no JSON object; a Parquet file that cannot be read, or cannot be read by this build; what `visit` says.
pub fn for_each(source: &Source, visit: &mut dyn FnMut(u64, Record) -> Result<(), DataError>) -> Result<(), DataError> {
    if source.is_named(&PARQUET) {
        #[cfg(feature = "parquet")]
        return parquet::for_each(source, visit);
        #[cfg(not(feature = "parquet"))]
        return Err(super::source::refuse(
            &source.name,
            "this build does not read Parquet",
            "build it with cargo build --release --features parquet, or write the file as JSON lines or CSV",
        ));
    }
    let mut lines = Lines::open(source)?;
    let mut any = false;
    while let Some((number, line)) = lines.next()? {
        let line = if number == 1 { line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(line) } else { line };
        if line.trim_ascii().is_empty() {
            continue;
        }
        any = true;
        let record = serde_json::from_slice(line).map_err(|e| not_json(source, number, &e))?;
        visit(number, record)?;
    }
    if any { Ok(()) } else { Err(DataError::Empty { file: source.name.clone(), wanted: "a JSON object on each line".to_string() }) }
}

fn not_json(source: &Source, line: u64, error: &serde_json::Error) -> DataError {
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or(&text);
    let remedy = if line == 1 && (text.contains("sequence") || error.is_eof()) {
        "write one object on each line (jq -c '.[]' makes lines of a list, jq -c . of one object after another)"
    } else {
        "write one whole JSON object on each line"
    };
    DataError::Line {
        file: source.name.clone(),
        line,
        problem: format!("no JSON object: {what} (character {})", error.column()),
        remedy: remedy.to_string(),
    }
}

/// The lines of a source, one at a time.
struct Lines {
    reader: Reader,
    buffer: Vec<u8>,
    /// What of the buffer was not handed over yet.
    rest: Range<usize>,
    number: u64,
}

impl Lines {
    const AT_ONCE: usize = 1 << 16;

    fn open(source: &Source) -> Result<Self, DataError> {
        Ok(Self { reader: source.open()?, buffer: Vec::new(), rest: 0..0, number: 0 })
    }

    /// The next line, without its end, and its number from 1.
    fn next(&mut self) -> Result<Option<(u64, &[u8])>, DataError> {
        let mut searched = 0;
        loop {
            let rest = &self.buffer[self.rest.clone()];
            if let Some(n) = rest[searched..].iter().position(|&byte| byte == b'\n') {
                let line = self.rest.start..self.rest.start + searched + n;
                self.rest.start = line.end + 1;
                self.number += 1;
                return Ok(Some((self.number, &self.buffer[line])));
            }
            searched = rest.len();
            self.buffer.drain(..self.rest.start);
            self.buffer.resize(searched + Self::AT_ONCE, 0);
            let got = self.reader.fill(&mut self.buffer[searched..])?;
            self.rest = 0..searched + got;
            self.buffer.truncate(self.rest.end);
            if got == 0 {
                if self.rest.is_empty() {
                    return Ok(None);
                }
                self.rest.start = self.rest.end;
                self.number += 1;
                return Ok(Some((self.number, &self.buffer)));
            }
        }
    }
}

/// Columns, and cells by row with the row's line.
pub(super) type Cellular = (Vec<String>, Vec<(u64, Vec<String>)>);

/// The records as the rows of a table: a column for each key, in the order in which they come up; what a record lacks is blank.
///
/// # Errors
/// As [`for_each`]; a list or an object where a cell should be.
pub(super) fn table(source: &Source) -> Result<Cellular, DataError> {
    let mut columns: Vec<String> = Vec::new();
    let mut rows: Vec<(u64, Vec<String>)> = Vec::new();
    for_each(source, &mut |line, record| {
        let mut cells = vec![String::new(); columns.len()];
        for (key, value) in record.0 {
            let c = columns.iter().position(|column| *column == key).unwrap_or_else(|| {
                columns.push(key.clone());
                cells.push(String::new());
                columns.len() - 1
            });
            cells[c] = scalar(&value).ok_or_else(|| DataError::Cell {
                file: source.name.clone(),
                line,
                column: key,
                problem: format!("{} where a number or a text should be", kind_of(&value)),
                remedy: "take the key out, or give it one value a record".to_string(),
            })?;
        }
        rows.push((line, cells));
        Ok(())
    })?;
    rows.iter_mut().for_each(|(_, cells)| cells.resize(columns.len(), String::new()));
    Ok((columns, rows))
}

/// The texts of the records, each with its line.
///
/// # Errors
/// As [`for_each`]; a record without a text under `key`.
pub(super) fn texts(source: &Source, key: &str, visit: &mut dyn FnMut(u64, &str) -> Result<(), DataError>) -> Result<(), DataError> {
    for_each(source, &mut |line, record| match record.get(key) {
        Some(Value::String(text)) => visit(line, text),
        other => {
            let problem = match other {
                Some(value) => format!("'{key}' is {}, not a text", kind_of(value)),
                None => format!("there is no '{key}'; it has {}", record.keys()),
            };
            Err(DataError::Line {
                file: source.name.clone(),
                line,
                problem,
                remedy: "name the key of the text with --text (numbers want --task forecast or classify)".to_string(),
            })
        }
    })
}

/// What a labelled sequence's keys are called.
pub(super) struct Keys<'a> {
    pub label: Option<&'a str>,
    pub text: Option<&'a str>,
    /// Empty: `values`, else all keys that hold lists.
    pub features: &'a [String],
    /// Every record must have a label.
    pub labelled: bool,
}

/// A labelled sequence from each record, and what its features are called.
///
/// # Errors
/// As [`for_each`]; a record without label, without steps, or with others than the first.
pub(super) fn sequences(source: &Source, keys: &Keys<'_>) -> Result<(Vec<Raw>, Vec<String>), DataError> {
    let label_key = keys.label.unwrap_or("label");
    let mut raws: Vec<Raw> = Vec::new();
    let mut features: Option<Vec<String>> = None;
    for_each(source, &mut |line, record| {
        let wrong =
            |problem: String, remedy: &str| Err(DataError::Line { file: source.name.clone(), line, problem, remedy: remedy.to_string() });
        let label = match record.get(label_key).map(|value| (scalar(value), value)) {
            Some((Some(label), _)) if !label.is_empty() => label,
            Some((Some(_), _)) if !keys.labelled => String::new(),
            Some((_, value)) => return wrong(format!("the label '{label_key}' is {}", kind_of(value)), "give every record a label"),
            None if keys.labelled => {
                return wrong(format!("there is no '{label_key}'; it has {}", record.keys()), "name the key of the label with --label");
            }
            None => String::new(),
        };
        let text = keys.text.unwrap_or("text");
        let (cells, names) = match record.get(text) {
            Some(Value::String(text)) if keys.features.is_empty() => (Cells::Text(text.trim().to_string()), Vec::new()),
            other if keys.text.is_some() => {
                let found = other.map_or_else(|| format!("missing; there is {}", record.keys()), |value| kind_of(value).to_string());
                return wrong(format!("the text '{text}' is {found}"), "name the key of the text with --text");
            }
            _ => match steps(&record, label_key, keys.features) {
                Ok((cells, names)) => (Cells::Values(cells), names),
                Err((problem, remedy)) => return wrong(problem, remedy),
            },
        };
        let first = features.get_or_insert_with(|| names.clone());
        if *first != names {
            let of = |names: &[String]| if names.is_empty() { "a text".to_string() } else { names.join(", ") };
            return wrong(format!("it has {}, but the first record has {}", of(&names), of(first)), "give all records the same");
        }
        let name = record.get("id").and_then(scalar).filter(|id| !id.is_empty()).unwrap_or_else(|| (raws.len() + 1).to_string());
        raws.push(Raw { file: source.name.clone(), line, name, label, tags: Vec::new(), cells });
        Ok(())
    })?;
    Ok((raws, features.unwrap_or_default()))
}

/// Cells `[n, I]` of a record, and the features' names.
type Steps = (Vec<Option<f64>>, Vec<String>);

/// The cells of a record; or what is wrong and the remedy.
fn steps(record: &Record, label: &str, features: &[String]) -> Result<Steps, (String, &'static str)> {
    const NUMBERS: &str = "write numbers, or null for a blank";
    let number = |value: &Value, name: &str, step: usize| match value {
        Value::Null => Ok(None),
        Value::Number(number) => Ok(number.as_f64()),
        other => Err((format!("step {} of '{name}' is {}, not a number", step + 1, kind_of(other)), NUMBERS)),
    };
    if let (true, Some(Value::Array(steps))) = (features.is_empty(), record.get("values")) {
        let width = match steps.first() {
            Some(Value::Array(step)) => step.len(),
            _ => 1,
        };
        let mut cells = Vec::with_capacity(steps.len() * width);
        for (t, step) in steps.iter().enumerate() {
            match step {
                Value::Array(step) if step.len() == width => {
                    for value in step {
                        cells.push(number(value, "values", t)?);
                    }
                }
                Value::Array(step) => {
                    let problem = format!("step {} of 'values' has {} numbers, the first has {width}", t + 1, step.len());
                    return Err((problem, "give every step the same numbers, null for a blank"));
                }
                one if width == 1 => cells.push(number(one, "values", t)?),
                other => return Err((format!("step {} of 'values' is {}, the first is a list", t + 1, kind_of(other)), NUMBERS)),
            }
        }
        return Ok((cells, (1..=width).map(|d| format!("dimension{d}")).collect()));
    }
    let names: Vec<String> = if features.is_empty() {
        record.0.iter().filter(|(key, value)| key != label && value.is_array()).map(|(key, _)| key.clone()).collect()
    } else {
        features.to_vec()
    };
    if names.is_empty() {
        return Err((
            format!("there is neither 'text' nor 'values' nor a list; it has {}", record.keys()),
            "name the key of the text with --text, or those of the numbers with --features",
        ));
    }
    let mut columns = Vec::with_capacity(names.len());
    for name in &names {
        let Some(Value::Array(column)) = record.get(name) else {
            let found = record.get(name).map_or("missing", kind_of);
            return Err((format!("'{name}' is {found}, not a list; there is {}", record.keys()), "name lists of numbers with --features"));
        };
        columns.push(column);
    }
    let n_steps = columns[0].len();
    if let Some(d) = columns.iter().position(|column| column.len() != n_steps) {
        let problem = format!("'{}' has {} steps, '{}' has {n_steps}", names[d], columns[d].len(), names[0]);
        return Err((problem, "lists of one record need the same steps; write null for blanks"));
    }
    let mut cells = Vec::with_capacity(n_steps * columns.len());
    for t in 0..n_steps {
        for (column, name) in columns.iter().zip(&names) {
            cells.push(number(&column[t], name, t)?);
        }
    }
    Ok((cells, names))
}

/// A value as a cell; none for lists and objects.
fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::Null => Some(String::new()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Number(number) => Some(number.to_string()),
        Value::String(text) => Some(text.trim().to_string()),
        Value::Array(_) | Value::Object(_) => None,
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(text) if text.is_empty() => "an empty text",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
