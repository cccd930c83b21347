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
            Value::Object(fields) => {
                // What it is about stands before what it is compared with.
                let (model, others): (Vec<_>, Vec<_>) = fields.iter().partition(|(name, _)| *name == "model");
                table = table.pairs(words(name), model.into_iter().chain(others).map(|(name, value)| (words(name), text(value))));
            }
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
    let rows = summary.get("values").and_then(Value::as_array);
    let first = rows.and_then(|rows| rows.first()).and_then(Value::as_object);
    let quantiles = first.into_iter().flat_map(Map::keys).filter(|name| name.starts_with('q')).map(String::as_str);
    let names: Vec<&str> = ["time", "target", "value"].into_iter().chain(quantiles).collect();
    let rows: Vec<Vec<String>> = rows.into_iter().flatten().map(|row| cells(row, &names)).collect();
    if rows.is_empty() {
        return scores("forecast", summary);
    }
    Table::new("").columns("forecast", &names, rows)
}

/// The errors of a rolling origin: a line a step of the horizon.
pub fn rolling(table: Table, summary: &Map<String, Value>) -> Table {
    let Some(rolling) = summary.get("rolling") else { return table };
    let show = |key: &str| rolling.get(key).map(text).unwrap_or_default();
    let mut table = table.pairs("Rolling origin", [("origins", show("origins")), ("rows between them", show("stride"))]);
    for (target, forecasts) in rolling.get("rmse_by_step").and_then(Value::as_object).into_iter().flatten() {
        let forecasts: Vec<(&String, &Vec<Value>)> =
            forecasts.as_object().into_iter().flatten().filter_map(|(name, steps)| Some((name, steps.as_array()?))).collect();
        let n_steps = forecasts.first().map_or(0, |(_, steps)| steps.len());
        let header: Vec<&str> = std::iter::once("step").chain(forecasts.iter().map(|(name, _)| name.as_str())).collect();
        let row = |step: usize| {
            std::iter::once((step + 1).to_string()).chain(forecasts.iter().map(move |(_, steps)| text(&steps[step]))).collect()
        };
        table = table.columns(format!("RMSE of {target} by step ahead"), &header, (0..n_steps).map(row).collect());
    }
    table
}

/// What was said of each sequence, or of each step, a line each; of many the first.
pub fn classes(summary: &Map<String, Value>) -> Table {
    const SHOWN: usize = 40;
    let labels = summary.get("labels").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let names: Vec<&str> = ["sequence", "step", "class", "probability"]
        .into_iter()
        .filter(|&name| labels.first().is_some_and(|label| label.get(name).is_some()))
        .collect();
    let rows = labels.iter().take(SHOWN).map(|row| cells(row, &names)).collect();
    let others: Map<String, Value> = summary.iter().filter(|(name, _)| *name != "labels").map(|(k, v)| (k.clone(), v.clone())).collect();
    let table = scores("classify", &others).columns("classes", &names, rows);
    if labels.len() <= SHOWN {
        return table;
    }
    table.pairs("More", [("not shown", format!("{} of {}; --output writes all", labels.len() - SHOWN, labels.len()))])
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

/// What a run would take.
pub fn estimate(summary: &Map<String, Value>) -> Table {
    let number = |key: &str| summary.get(key).and_then(Value::as_f64);
    let count = |key: &str| summary.get(key).and_then(Value::as_u64).map_or_else(|| "no limit".to_owned(), format::count);
    let time = |key: &str| number(key).map_or_else(|| "no limit".to_owned(), format::duration);
    let bytes = |value: Option<&Value>| value.and_then(Value::as_u64).map_or_else(|| "-".to_owned(), format::bytes);
    let run = [
        ("parameters", count("parameters")),
        ("steps an epoch", count("steps_per_epoch")),
        ("epochs", count("epochs")),
        ("steps", count("steps")),
        ("time of a step", number("seconds_per_step").map_or_else(String::new, |s| format!("{} ms", format::number(1e3 * s, 3)))),
        ("tokens", number("tokens_per_second").map_or_else(String::new, |rate| format!("{}/s", format::rate(rate)))),
        ("time of an epoch", time("seconds_per_epoch")),
        ("time in all, about", time("seconds")),
    ];
    let workers = summary.get("memory").and_then(Value::as_array).cloned().unwrap_or_default();
    let rows = workers.iter().map(|worker| {
        let mut row = cells(worker, &["device", "name", "rows"]);
        row.push(bytes(worker.get("bytes")));
        row.push(format!("{} ({})", bytes(worker.get("largest_bytes")), worker.get("largest_buffer").map(text).unwrap_or_default()));
        row.push(bytes(worker.get("max_buffer_bytes")));
        row
    });
    let header = ["device", "name", "rows", "buffers", "largest buffer", "limit of one"];
    let host = [("this process", bytes(summary.get("peak_rss_bytes"))), ("still free", bytes(summary.get("available_bytes")))];
    Table::new("Dry run: nothing was written")
        .pairs("Run", run)
        .columns("Memory by device", &header, rows.collect())
        .pairs("Memory of this machine", host)
}

/// What is in a run folder.
pub fn run(summary: &Map<String, Value>) -> Table {
    let show = |key: &str| summary.get(key).map(text).unwrap_or_default();
    let object = |key: &str| summary.get(key).and_then(Value::as_object).cloned().unwrap_or_default();
    let pairs = |fields: &Map<String, Value>| -> Vec<(String, String)> {
        let plain = fields.iter().filter(|(_, value)| !value.is_object() && !is_table(value));
        plain.map(|(name, value)| (words(name), text(value))).collect()
    };
    let best = summary.get("best").and_then(|best| Some(format!("{} at step {}", text(best.get("valid_loss")?), text(best.get("step")?))));
    let files = object("files");
    let bytes: u64 = files.values().filter_map(Value::as_u64).sum();
    let mut about: Vec<(String, String)> = ["task", "state", "steps"].into_iter().map(|key| (words(key), show(key))).collect();
    about.push(("best validation loss".to_owned(), best.unwrap_or_else(|| "-".to_owned())));
    let is_started = summary.get("version").is_some_and(Value::is_string);
    let ran = if is_started { format!("carrousel {}, {}", show("version"), show("system")) } else { "-".to_owned() };
    about.push(("ran on".to_owned(), ran));
    about.push(("starts".to_owned(), show("starts")));
    about.push(("files".to_owned(), format!("{} ({})", files.keys().cloned().collect::<Vec<_>>().join(", "), format::bytes(bytes))));
    let results = object("results");
    let mut table = Table::new(show("run"))
        .pairs("Run", about)
        .pairs("Model", pairs(&object("model")))
        .pairs("Data", pairs(&object("data")))
        .pairs("Results", pairs(&results));
    for (name, fields) in results.iter().filter_map(|(name, value)| Some((name, value.as_object()?))) {
        table = table.pairs(words(name), pairs(fields));
    }
    let rows = |key: &str| summary.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    let checkpoints = rows("checkpoints").into_iter().map(|row| {
        let size = row.get("bytes").and_then(Value::as_u64).map_or_else(|| "-".to_owned(), format::bytes);
        let mut cells = cells(&row, &["step", "valid_loss", "is"]);
        cells.insert(2, size);
        cells
    });
    table = table.columns("Checkpoints", &["step", "validation loss", "size", ""], checkpoints.collect());
    let devices = rows("devices").iter().map(|row| cells(row, &["device", "name", "driver"])).collect();
    table = table.columns("Devices", &["device", "name", "driver"], devices);
    let warnings = rows("warnings");
    table.columns("Warnings", &[""], warnings.iter().map(|warning| vec![text(warning)]).collect())
}

/// What several runs differ in, and what they came to: a column a run.
pub fn comparison(summary: &Map<String, Value>) -> Vec<Table> {
    let runs = summary.get("runs").and_then(Value::as_array).cloned().unwrap_or_default();
    let names: Vec<String> = runs.iter().map(|run| run.get("name").map(text).unwrap_or_default()).collect();
    let header: Vec<&str> = std::iter::once("").chain(names.iter().map(String::as_str)).collect();
    let rows = |part: &str| -> Vec<Vec<String>> {
        let mut keys: Vec<&String> = runs.iter().filter_map(|run| run.get(part)?.as_object()).flat_map(Map::keys).collect();
        keys.sort_unstable();
        keys.dedup();
        let cell = |run: &Value, key: &str| run.get(part).and_then(|fields| fields.get(key)).map_or_else(|| "-".to_owned(), text);
        keys.into_iter().map(|key| std::iter::once(words(key)).chain(runs.iter().map(|run| cell(run, key))).collect()).collect()
    };
    let same = rows("config").is_empty();
    let table = Table::new(if same { "The configurations are the same." } else { "" });
    let table = table.columns("Configuration, as far as it differs", &header, rows("config")).columns("Results", &header, rows("results"));
    let picture = summary.get("picture").map(text).unwrap_or_default();
    vec![table.pairs("Picture", [("loss curves", picture)])]
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
