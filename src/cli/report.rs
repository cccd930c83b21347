//! Results for people: tables from the fields of a summary.

use serde_json::{Map, Value};

use crate::observe::{Table, format};

/// Every field with its value; the fields of nested objects in sections of their own.
pub fn scores(title: &str, summary: &Map<String, Value>) -> Table {
    // Whoever reads a table sees that the command has ended.
    let plain = summary.iter().filter(|(name, value)| *name != "status" && !value.is_object() && !is_table(value));
    let mut table = Table::new(title).pairs("result", plain.map(|(name, value)| (words(name), text(value))));
    for (name, value) in summary {
        match value {
            // It has a table of its own.
            Value::Object(_) if name == "confusion" => {}
            // Of several targets each has its own section.
            Value::Object(_) if summary.contains_key(&format!("{name}_by_target")) => {}
            Value::Object(parts) if !parts.is_empty() && parts.values().all(Value::is_object) => {
                for (part, fields) in parts.iter().filter_map(|(part, fields)| Some((part, fields.as_object()?))) {
                    let title = format!("{}: {part}", words(name));
                    table = table.pairs(title, fields.iter().map(|(name, value)| (words(name), text(value))));
                }
            }
            Value::Object(fields) => table = table.pairs(words(name), fields.iter().map(|(name, value)| (words(name), text(value)))),
            Value::Array(rows) if is_table(value) => {
                let Some(Value::Object(first)) = rows.first() else { continue };
                let names: Vec<&str> = first.keys().map(String::as_str).collect();
                table = table.columns(words(name), &names, rows.iter().map(|row| cells(row, &names)).collect());
            }
            _ => {}
        }
    }
    table
}

/// The values of a forecast, one line a time and target.
pub fn values(summary: &Map<String, Value>) -> Table {
    let names = ["time", "target", "value"];
    let rows = summary.get("values").and_then(Value::as_array);
    let rows: Vec<Vec<String>> = rows.into_iter().flatten().map(|row| cells(row, &names)).collect();
    if rows.is_empty() {
        return scores("forecast", summary);
    }
    Table::new("").columns("forecast", &names, rows)
}

/// The adapters, or that there is none. Limits and features are many, so they are in the JSON only.
pub fn adapters(adapters: &Value) -> Table {
    let rows = adapters.as_array().map(Vec::as_slice).unwrap_or_default();
    if rows.is_empty() {
        return Table::new("no graphics adapter was found; training runs on the CPU");
    }
    let names = ["index", "name", "maker", "kind", "backend", "driver", "gflops", "gb_per_second"];
    let names: Vec<&str> = names.into_iter().filter(|&name| rows.iter().any(|row| row.get(name).is_some())).collect();
    Table::new("").columns("adapters", &names, rows.iter().map(|row| cells(row, &names)).collect())
}

/// What was measured on the CPU.
pub fn cpu(speed: &Value) -> Table {
    let names = ["threads", "gflops", "gb_per_second"];
    Table::new("").columns("cpu", &names, vec![cells(speed, &names)])
}

fn is_table(value: &Value) -> bool {
    value.as_array().is_some_and(|rows| !rows.is_empty() && rows.iter().all(Value::is_object))
}

fn cells(row: &Value, names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| row.get(name).map(text).unwrap_or_default()).collect()
}

fn words(name: &str) -> String {
    name.replace('_', " ")
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::Bool(is) => if *is { "yes" } else { "no" }.to_owned(),
        Value::Number(number) => match (number.as_u64(), number.as_f64()) {
            (Some(n), _) => n.to_string(),
            (None, Some(x)) => format::number(x, 5),
            (None, None) => number.to_string(),
        },
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(text).collect::<Vec<_>>().join(", "),
        Value::Object(_) => value.to_string(),
    }
}
