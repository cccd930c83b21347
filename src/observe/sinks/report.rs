//! `report.html` in the run folder: one page that says what was run, how it went and what came of it, for whoever opens it in a browser.
//! Everything is within the file, nothing is fetched, and there is no script. Not here: what a curve looks like (`plot`).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Map, Value};

use super::metrics::{History, history};
use crate::observe::canvas::escaped;
use crate::observe::plot::{self, ForecastPlot, Series, Trace};
use crate::observe::{Event, Exhibit, Sink, format};

/// What the report is made of and where it goes.
#[derive(Clone, Debug)]
pub struct ReportFiles {
    /// The page to write.
    pub page: PathBuf,
    /// The resolved configuration, TOML.
    pub config: PathBuf,
    /// The metrics of all starts.
    pub metrics: PathBuf,
}

/// Writes the report when a run ends: with its summary, or with the error that ended it.
pub struct Report {
    files: ReportFiles,
    forecast: Option<ForecastPlot>,
    /// The last sample of text, and the step it is from.
    text: Option<(u64, String)>,
}

impl Report {
    /// A report to be written at the end.
    pub fn new(files: ReportFiles) -> Self {
        Self { files, forecast: None, text: None }
    }

    fn write(&self, end: &End<'_>) -> anyhow::Result<()> {
        let path = &self.files.page;
        let config = fs::read_to_string(&self.files.config).with_context(|| format!("cannot read {}", self.files.config.display()))?;
        let history = history(&self.files.metrics)?;
        let page = page(path, &config, &history, end, self)?;
        let temporary = path.with_extension("html.tmp");
        let written = fs::write(&temporary, page).and_then(|()| fs::rename(&temporary, path));
        if written.is_err() {
            // Nobody needs half a page.
            let _ = fs::remove_file(&temporary);
        }
        written.with_context(|| format!("cannot write {}", path.display()))
    }
}

/// How the run ended.
enum End<'a> {
    Summary(&'a Map<String, Value>),
    Error(&'a str),
}

impl Sink for Report {
    fn name(&self) -> String {
        self.files.page.display().to_string()
    }

    fn event(&mut self, event: &Event) -> anyhow::Result<()> {
        match event {
            Event::Summary(summary) => self.write(&End::Summary(summary)),
            Event::Error { message } => self.write(&End::Error(message)),
            _ => Ok(()),
        }
    }

    fn show(&mut self, exhibit: Exhibit<'_>) -> anyhow::Result<()> {
        match exhibit {
            Exhibit::Forecast(plot) => self.forecast = Some(plot.clone()),
            Exhibit::Text { step, text } => self.text = Some((step, text.to_owned())),
            Exhibit::Values { .. } => {}
        }
        Ok(())
    }
}

/// Drawings are made for these widths and shrink with the window.
const WIDE: (u32, u32) = (1160, 380);
const HALF: (u32, u32) = (580, 300);

const STYLE: &str = "\
:root{color-scheme:light dark;--page:#f4f5f7;--card:#fff;--edge:#dfe2e6;--text:#1c2128;--label:#5b6470;--axis:#8c939b;--grid:#e9ebee;--truth:#b3b8be;\
--good:#12703f;--good-back:#dff3e7;--bad:#a3261c;--bad-back:#fbe4e1;--wait:#7a5200;--wait-back:#fbeecf;--heat:0,114,178;\
--curve0:#0072b2;--curve1:#d55e00;--curve2:#009e73;--curve3:#b8578f;--curve4:#c98a00;--curve5:#3a9fd8;--curve6:#333;\
--faint0:#b8d8e9;--faint1:#f4d2b8;--faint2:#b8e4d8;--faint3:#ecd3e3;--faint4:#f0dfb8;--faint5:#cfe8f7;--faint6:#ccc}\
@media(prefers-color-scheme:dark){:root{--page:#0f1318;--card:#171c23;--edge:#2b323b;--text:#e4e8ec;--label:#98a2ae;--axis:#66707b;--grid:#262d36;\
--truth:#6d7782;--good:#74d6a0;--good-back:#15352a;--bad:#ff9d92;--bad-back:#45201d;--wait:#eec36b;--wait-back:#3d3115;--heat:86,180,233;\
--curve0:#58b4ec;--curve1:#ff9550;--curve2:#37cfa3;--curve3:#e5a3cb;--curve4:#f0c04a;--curve5:#a5d8f8;--curve6:#e4e8ec;\
--faint0:#24435a;--faint1:#553521;--faint2:#1b4a3f;--faint3:#4d3745;--faint4:#4d4022;--faint5:#33495a;--faint6:#444b54}}\
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,'Open Sans','DejaVu Sans',sans-serif}\
main{max-width:1220px;margin:0 auto;padding:36px 20px 60px}header{display:flex;flex-wrap:wrap;gap:6px 14px;align-items:baseline;margin-bottom:4px}\
h1{font-size:26px;line-height:1.25;margin:0;font-weight:650;overflow-wrap:anywhere}h2{font-size:15px;margin:0 0 10px;font-weight:650}p{margin:0}.sub{color:var(--label);margin-bottom:22px;overflow-wrap:anywhere}\
.state{font-size:13px;font-weight:600;border-radius:99px;padding:1px 11px;align-self:center}.finished{color:var(--good);background:var(--good-back)}\
.failed{color:var(--bad);background:var(--bad-back)}.interrupted{color:var(--wait);background:var(--wait-back)}.error{white-space:pre-wrap;overflow-wrap:anywhere}\
.grid{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}.card{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:16px 18px;min-width:0}\
.wide{grid-column:1/-1}.tiles{display:flex;flex-wrap:wrap;gap:12px;margin-bottom:16px}\
.tile{flex:1 1 auto;min-width:96px;white-space:nowrap;background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:11px 14px}.tile b{display:block;font-size:21px;font-weight:650;font-variant-numeric:tabular-nums;line-height:1.3}\
.tile span{color:var(--label);font-size:13px}svg{display:block;width:100%;height:auto;font-family:inherit;font-variant-numeric:tabular-nums}\
polyline{fill:none;stroke-linejoin:round;stroke-linecap:round}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px}\
th{text-align:left;color:var(--label);font-weight:500;font-size:13px}th,td{padding:5px 14px 5px 0;border-bottom:1px solid var(--grid)}tr:last-child td{border-bottom:0}\
.number{text-align:right;font-variant-numeric:tabular-nums}.best td{font-weight:650}pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font:13.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace}\
dl{margin:0;columns:3 260px;column-gap:36px;font-size:14px}dl div{display:flex;justify-content:space-between;gap:14px;border-bottom:1px solid var(--grid);padding:3px 0;break-inside:avoid}\
dt{color:var(--label)}dd{margin:0;text-align:right;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}ul{margin:0;padding-left:20px}.confusion td,.confusion th{text-align:center;padding:5px 8px;border:0}\
footer{color:var(--label);font-size:13px;margin-top:22px}@media(max-width:760px){.grid{grid-template-columns:minmax(0,1fr)}.wide{overflow-x:auto}.wide>svg{min-width:680px}}@media print{body{background:#fff}.card,.tile{break-inside:avoid}}";

fn page(path: &Path, config: &str, history: &History, end: &End<'_>, shown: &Report) -> anyhow::Result<String> {
    let config: toml::Table = toml::from_str(config).context("the configuration in the run folder is no TOML")?;
    let empty = Map::new();
    let (summary, state) = match end {
        End::Summary(summary) => (*summary, summary.get("status").and_then(Value::as_str).unwrap_or("finished")),
        End::Error(_) => (&empty, "failed"),
    };
    let folder = path.parent().and_then(|folder| std::path::absolute(folder).ok()).unwrap_or_default();
    let name = folder.file_name().map_or_else(|| "run".into(), |name| name.to_string_lossy());
    let name = escaped(&name);
    let state = escaped(state);
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n\
         <title>{name} - carrousel</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <header><h1>{name}</h1><span class=\"state {state}\">{state}</span></header>\n<p class=\"sub\">{}</p>\n",
        escaped(&subject(&config))
    );
    html += &tiles(summary, history);
    html += "<div class=\"grid\">\n";
    if let End::Error(message) = end {
        html += &card("wide", "What ended the run", &format!("<p class=\"error\">{}</p>", escaped(message)));
    }
    let task = config.get("task").and_then(toml::Value::as_str).unwrap_or_default();
    let unit = match task {
        "lm" => "nats a token",
        "classify" => "nats a sequence",
        "tag" => "nats a step",
        "frames" => "nats a frame",
        "forecast" if config.contains_key("quantiles") => "quantile loss, normalised",
        "forecast" | "regress" => "squared error, normalised",
        _ => "loss",
    };
    let losses = [named("training", &history.train), named("validation", &history.valid)];
    html += &card("wide", "Loss", &plot::curves_markup(WIDE, &losses, Trace::Loss, unit)?);
    if let Some(forecast) = &shown.forecast {
        html += &card("wide", &forecast.title, &plot::forecast_markup(WIDE, forecast)?);
    }
    if let Some((step, text)) = &shown.text {
        let heading = format!("What the model writes after step {}", format::count(*step));
        html += &card("wide", &heading, &format!("<pre>{}</pre>", escaped(text)));
    }
    html += &scores(summary, unit);
    html += &confusion(summary);
    html += &card("", "Learning rate", &plot::curves_markup(HALF, &[named("of each step", &history.lr)], Trace::Exact, "")?);
    let norm = [named("before clipping", &history.grad_norm)];
    html += &card("", "Gradient norm", &plot::curves_markup(HALF, &norm, Trace::Noisy, "")?);
    html += &card("wide", "Throughput", &plot::curves_markup((WIDE.0, HALF.1), &rates(history), Trace::Exact, "tokens a second")?);
    html += &devices(history);
    html += &card("wide", "Configuration", &settings(&config));
    if !history.warnings.is_empty() {
        let list: String = history.warnings.iter().map(|warning| format!("<li>{}</li>", escaped(warning))).collect();
        html += &card("wide", "Warnings", &format!("<ul>{list}</ul>"));
    }
    html += "</div>\n<footer>";
    html += &escaped(&versions(history, &folder));
    html += "</footer>\n</main>\n</body>\n</html>\n";
    Ok(html)
}

fn named(name: &str, points: &[(f64, f64)]) -> Series {
    Series { name: name.to_owned(), points: points.to_vec() }
}

fn card(class: &str, heading: &str, body: &str) -> String {
    format!("<section class=\"card {class}\">\n<h2>{}</h2>\n{body}\n</section>\n", escaped(heading))
}

/// One line on what was trained, on what.
fn subject(config: &toml::Table) -> String {
    let text = |key: &str| config.get(key).map(shown).filter(|text| !text.is_empty());
    let kind = match text("task").as_deref() {
        Some("lm") => "Language model".to_owned(),
        Some("forecast") => "Forecast".to_owned(),
        Some("classify") => "Classes of sequences".to_owned(),
        Some("regress") => "Numbers of sequences".to_owned(),
        Some("tag") => "Classes of steps".to_owned(),
        Some("frames") => "Frames of notes".to_owned(),
        Some(other) => other.to_owned(),
        None => String::new(),
    };
    let size = text("layers").zip(text("hidden")).map(|(layers, hidden)| {
        let plural = if layers == "1" { "layer" } else { "layers" };
        format!("{layers} {plural} of {hidden} units")
    });
    let data = text("data").unwrap_or_else(|| "the built-in example".to_owned());
    [Some(kind), size, Some(data)].into_iter().flatten().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("  ·  ")
}

/// A setting as it would be typed.
fn shown(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Float(x) => format::trimmed(*x, 6),
        toml::Value::Array(items) => items.iter().map(shown).collect::<Vec<_>>().join(", "),
        toml::Value::Table(parts) => parts.iter().map(|(name, part)| format!("{name} {}", shown(part))).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// What one looks for first.
fn tiles(summary: &Map<String, Value>, history: &History) -> String {
    let number = |key: &str| summary.get(key).and_then(Value::as_f64);
    let four = |x: f64| format::number(x, 4);
    let rmse = summary.get("rmse").and_then(|rmse| rmse.get("model")).and_then(Value::as_f64);
    let start = history.starts.last();
    let parameters = start.and_then(|start| start.get("parameters")).and_then(Value::as_f64);
    let whole = |x: f64| format::count(x as u64);
    let tiles = [
        ("test loss", number("test_loss").map(four)),
        ("validation loss", number("valid_loss").map(four)),
        ("test perplexity", number("perplexity").map(four)),
        ("test RMSE", rmse.map(four)),
        ("accuracy", number("accuracy").map(|x| format!("{:.2} %", 100.0 * x))),
        ("macro F1", number("macro_f1").map(four)),
        ("parameters", parameters.map(whole)),
        ("steps", number("steps").map(whole)),
        ("time", number("seconds").map(format::duration)),
        ("tokens/s", number("tokens_per_second").map(format::rate)),
    ];
    let tiles: String = tiles
        .into_iter()
        .filter_map(|(name, value)| Some(format!("<div class=\"tile\"><b>{}</b><span>{name}</span></div>\n", escaped(&value?))))
        .collect();
    if tiles.is_empty() { tiles } else { format!("<div class=\"tiles\">\n{tiles}</div>\n") }
}

/// The errors of the model beside those of simple rules: every object of numbers in the summary is a column.
fn scores(summary: &Map<String, Value>, unit: &str) -> String {
    let mut columns: Vec<(String, Map<String, Value>)> = Vec::new();
    let is_numbers = |fields: &Map<String, Value>| !fields.is_empty() && fields.values().all(|value| value.is_number() || value.is_null());
    for (name, value) in summary {
        let Value::Object(fields) = value else { continue };
        // Always saying the commonest class has an accuracy, the other simple rules have a loss.
        let is_accuracy = name == "baselines" && fields.contains_key("majority");
        let words = match name.as_str() {
            "baselines" if is_accuracy => "accuracy".to_owned(),
            "baselines" => unit.to_owned(),
            "rmse" | "rmse_by_target" => "RMSE, last step, in the unit".to_owned(),
            other => other.replace('_', " "),
        };
        if is_numbers(fields) {
            let mut fields = fields.clone();
            if name == "baselines" {
                let of_model = summary.get(if is_accuracy { "accuracy" } else { "test_loss" });
                fields.extend(of_model.map(|score| ("model".to_owned(), score.clone())));
            }
            columns.push((words, fields));
        } else {
            let parts = fields.iter().filter_map(|(part, fields)| Some((part, fields.as_object()?)));
            let parts = parts.filter(|(_, fields)| is_numbers(fields) && fields.len() > 1);
            columns.extend(parts.map(|(part, fields)| (format!("{words}: {part}"), fields.clone())));
        }
    }
    let mut names: Vec<&String> = Vec::new();
    columns.iter().flat_map(|(_, fields)| fields.keys()).for_each(|name| {
        if !names.contains(&name) {
            names.push(name);
        }
    });
    if names.is_empty() {
        return String::new();
    }
    names.sort_by_key(|name| *name != "model");
    let header: Vec<(&str, bool)> = std::iter::once(("", false)).chain(columns.iter().map(|(name, _)| (name.as_str(), true))).collect();
    let rows = names.iter().map(|name| {
        let values =
            columns.iter().map(|(_, fields)| fields.get(*name).and_then(Value::as_f64).map_or("-".into(), |x| format::number(x, 4)));
        (*name == "model", std::iter::once(name.replace('_', " ")).chain(values).collect())
    });
    card("wide", "Scores on the test part", &table(&header, rows))
}

/// A matrix of counts under `confusion` in the summary: `classes`, and `counts` by true class, by predicted one.
fn confusion(summary: &Map<String, Value>) -> String {
    let Some(confusion) = summary.get("confusion") else { return String::new() };
    let list = |key: &str| confusion.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let (labels, counts) = (list("classes"), list("counts"));
    let label = |value: &Value| escaped(&value.as_str().map_or_else(|| value.to_string(), str::to_owned));
    let head: String = labels.iter().map(|name| format!("<th>{}</th>", label(name))).collect();
    let rows: String = labels
        .iter()
        .zip(counts)
        .map(|(name, row)| {
            let row: Vec<f64> = row.as_array().into_iter().flatten().map(|n| n.as_f64().unwrap_or(0.0)).collect();
            let all = row.iter().sum::<f64>().max(1.0);
            let cells: String = row
                .iter()
                .map(|n| format!("<td style=\"background:rgba(var(--heat),{:.2})\">{}</td>", 0.65 * n / all, format::count(*n as u64)))
                .collect();
            format!("<tr><th>{}</th>{cells}</tr>", label(name))
        })
        .collect();
    if rows.is_empty() {
        return rows;
    }
    let body = format!("<div class=\"scroll\"><table class=\"confusion\"><tr><th></th>{head}</tr>{rows}</table></div>");
    card("wide", "Confusion: true classes in rows, predicted ones in columns", &body)
}

/// Rows with whether each is to stand out; `header` says which columns are numbers.
fn table(header: &[(&str, bool)], rows: impl Iterator<Item = (bool, Vec<String>)>) -> String {
    let class = |is_number: bool| if is_number { " class=\"number\"" } else { "" };
    let head: String = header.iter().map(|(name, is_number)| format!("<th{}>{}</th>", class(*is_number), escaped(name))).collect();
    let rows: String = rows
        .map(|(stands_out, cells)| {
            let cells: String = cells.iter().zip(header).map(|(cell, (_, n))| format!("<td{}>{}</td>", class(*n), escaped(cell))).collect();
            format!("<tr{}>{cells}</tr>\n", if stands_out { " class=\"best\"" } else { "" })
        })
        .collect();
    format!("<div class=\"scroll\"><table>\n<tr>{head}</tr>\n{rows}</table></div>")
}

/// The devices of the last start, by rank: `device`, `name`, `driver`.
fn started(history: &History) -> Vec<[String; 3]> {
    let devices = history.starts.last().and_then(|start| start.get("devices")).and_then(Value::as_array);
    let text = |device: &Value, key: &str| device.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    devices.into_iter().flatten().map(|device| ["device", "name", "driver"].map(|key| text(device, key))).collect()
}

/// Tokens a second: of all, and of each device where there are several.
fn rates(history: &History) -> Vec<Series> {
    let names = started(history);
    let mut series = vec![named("all devices", &history.tokens_per_second)];
    if history.device_tokens_per_second.len() > 1 {
        series.extend(history.device_tokens_per_second.iter().enumerate().map(|(rank, points)| {
            let several = |device: &String| names.iter().filter(|[other, ..]| other == device).count() > 1;
            let name = match names.get(rank) {
                None => format!("worker {rank}"),
                Some([device, ..]) if several(device) => format!("worker {rank}, {device}"),
                Some([device, ..]) => device.clone(),
            };
            named(&name, points)
        }));
    } else if let (Some(first), Some([device, ..])) = (series.first_mut(), names.first()) {
        first.name.clone_from(device);
    }
    series
}

fn devices(history: &History) -> String {
    let names = started(history);
    let header = [
        ("worker", false),
        ("device", false),
        ("name", false),
        ("driver", false),
        ("share", true),
        ("tokens", true),
        ("waited", true),
        ("sent", true),
    ];
    let n_rows = names.len().max(history.devices.len());
    if n_rows == 0 {
        return String::new();
    }
    let rows = (0..n_rows).map(|rank| {
        let told = history.devices.get(rank);
        let number = |key: &str| told.and_then(|told| told.get(key)).and_then(Value::as_f64);
        let [device, name, driver] = names.get(rank).cloned().unwrap_or_default();
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let row = vec![
            rank.to_string(),
            device,
            name,
            if driver.is_empty() { "-".to_owned() } else { driver },
            or_dash(number("share").map(|share| format!("{:.1} %", 100.0 * share))),
            or_dash(number("tokens_per_second").map(|rate| format!("{}/s", format::rate(rate)))),
            or_dash(number("waited_seconds").map(format::duration)),
            or_dash(number("bytes_sent").map(|n| format::bytes(n as u64))),
        ];
        (false, row)
    });
    card("wide", "Devices", &table(&header, rows))
}

fn settings(config: &toml::Table) -> String {
    let rows: String = config
        .iter()
        .map(|(key, value)| {
            let value = shown(value);
            let value = if value.is_empty() { "-".to_owned() } else { value };
            format!("<div><dt>{}</dt><dd>{}</dd></div>\n", escaped(&key.replace('_', " ")), escaped(&value))
        })
        .collect();
    format!("<dl>\n{rows}</dl>")
}

/// What ran it, and where it lies.
fn versions(history: &History, folder: &Path) -> String {
    let start = history.starts.last();
    let text = |key: &str| start.and_then(|start| start.get(key)).and_then(Value::as_str);
    let version = text("version").map_or_else(|| "carrousel".to_owned(), |version| format!("carrousel {version}"));
    let starts = match history.starts.len() {
        0 | 1 => String::new(),
        n => format!("  ·  {n} starts"),
    };
    let system = text("system").map_or_else(String::new, |system| format!("  ·  {system}"));
    format!("{version}{system}{starts}  ·  {}", folder.display())
}
