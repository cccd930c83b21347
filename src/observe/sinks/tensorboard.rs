//! TensorBoard's event files: scalars, samples of text, histograms of tensors, for who has a dashboard of their own.
//!
//! A file is a row of records: length, its checksum, a protobuf message, its checksum (TFRecord). Messages have the fields of `event.proto`,
//! `summary.proto`, `tensor.proto` that are used here and their numbers there; readers ignore what is missing.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use prost::Message;
use serde_json::Value as Json;

use crate::observe::{Event, Exhibit, RunInfo, Sink};

/// Writes one file of events into a folder.
pub struct TensorBoard {
    path: PathBuf,
    file: File,
    /// The devices by rank, as tags call them.
    devices: Vec<String>,
    last_step: u64,
}

impl TensorBoard {
    /// Makes `folder` and a new file in it; those of earlier starts stay beside it.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn create(folder: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let seconds = now() as u64;
        for n in 0_u32.. {
            // Readers take files by `tfevents` in their names, in the order of their names.
            let path = folder.join(format!("events.out.tfevents.{seconds:010}.carrousel.{n}"));
            let file = match OpenOptions::new().write(true).create_new(true).open(&path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                other => other.with_context(|| format!("cannot make {}", path.display()))?,
            };
            let mut sink = Self { path, file, devices: Vec::new(), last_step: 0 };
            sink.record(0, What::FileVersion("brain.Event:2".to_owned()))?;
            return Ok(sink);
        }
        anyhow::bail!("{} is full of event files", folder.display())
    }

    /// Appends one record, in one write.
    fn record(&mut self, step: u64, what: What) -> anyhow::Result<()> {
        let message = Record { wall_time: now(), step: i64::try_from(step)?, what: Some(what) }.encode_to_vec();
        Ok(self.file.write_all(&framed(&message))?)
    }

    fn values(&mut self, step: u64, values: Vec<Value>) -> anyhow::Result<()> {
        if values.is_empty() { Ok(()) } else { self.record(step, What::Summary(Summary { values })) }
    }

    fn scalars<'a>(&mut self, step: u64, scalars: impl IntoIterator<Item = (&'a str, f64)>) -> anyhow::Result<()> {
        let values = scalars.into_iter().map(|(tag, value)| Value::new(tag, Content::Simple(value as f32)));
        self.values(step, values.collect())
    }
}

impl Sink for TensorBoard {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn begin(&mut self, info: &RunInfo) -> anyhow::Result<()> {
        let is_alone = |name: &String| info.devices.iter().filter(|other| *other == name).count() == 1;
        let tag = |(rank, name): (usize, &String)| if is_alone(name) { name.clone() } else { format!("worker {rank} {name}") };
        self.devices = info.devices.iter().enumerate().map(tag).collect();
        // What an earlier start wrote beyond the checkpoint that this one goes on from is void.
        self.record(info.first_step + 1, What::Session(SessionLog { status: SESSION_START }))
    }

    fn event(&mut self, event: &Event) -> anyhow::Result<()> {
        match event {
            Event::Step { step, loss, lr, tokens_per_second, grad_norm, device_tokens_per_second, .. } => {
                self.last_step = *step;
                let all = [
                    ("loss/train", *loss),
                    ("learning_rate", *lr),
                    ("gradient_norm", *grad_norm),
                    ("tokens_per_second/all", *tokens_per_second),
                ];
                let mut values: Vec<Value> = all.iter().map(|(tag, value)| Value::new(tag, Content::Simple(*value as f32))).collect();
                if device_tokens_per_second.len() > 1 {
                    let devices = self.devices.iter().zip(device_tokens_per_second);
                    values.extend(
                        devices.map(|(name, rate)| Value::new(&format!("tokens_per_second/{name}"), Content::Simple(*rate as f32))),
                    );
                }
                self.values(*step, values)
            }
            Event::Epoch { step, train_loss, valid_loss, .. } => {
                self.scalars(*step, [("loss/epoch", *train_loss)].into_iter().chain(valid_loss.map(|loss| ("loss/valid", loss))))
            }
            Event::Eval { step, valid_loss } => self.scalars(*step, [("loss/valid", *valid_loss)]),
            Event::Summary(summary) => {
                let step = summary.get("steps").and_then(Json::as_u64).unwrap_or(self.last_step);
                let scores = ["test_loss", "perplexity", "accuracy", "macro_f1"];
                let scores = scores.into_iter().filter_map(|key| Some((format!("scores/{key}"), summary.get(key)?.as_f64()?)));
                let values = scores.map(|(tag, value)| Value::new(&tag, Content::Simple(value as f32)));
                self.values(step, values.collect())
            }
            _ => Ok(()),
        }
    }

    fn show(&mut self, exhibit: Exhibit<'_>) -> anyhow::Result<()> {
        match exhibit {
            Exhibit::Text { step, text } => self.values(step, vec![sample(text)]),
            Exhibit::Values { step, name, values } => self.values(step, vec![Value::new(name, Content::Histogram(histogram(values)))]),
            Exhibit::Forecast(_) => Ok(()),
        }
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// A record around a message.
fn framed(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(message.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked_checksum(&length).to_le_bytes());
    record.extend_from_slice(message);
    record.extend_from_slice(&masked_checksum(message).to_le_bytes());
    record
}

/// CRC-32C by bytes: the remainders of one byte each.
const REMAINDERS: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut remainder = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            // Castagnoli's polynomial, its lowest bit first.
            remainder = if remainder & 1 == 1 { (remainder >> 1) ^ 0x82F6_3B78 } else { remainder >> 1 };
            bit += 1;
        }
        table[byte] = remainder;
        byte += 1;
    }
    table
};

fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| (crc >> 8) ^ REMAINDERS[usize::from(crc as u8 ^ byte)])
}

/// TFRecord's checksum, altered so that a checksum of data that holds checksums stays one.
fn masked_checksum(bytes: &[u8]) -> u32 {
    checksum(bytes).rotate_right(15).wrapping_add(0xA282_EAD8)
}

const N_BINS: usize = 40;

/// Counts in bins of equal width from the lowest value to the highest; values that are not finite are left out.
fn histogram(values: &[f32]) -> Histogram {
    let finite = || values.iter().map(|value| f64::from(*value)).filter(|value| value.is_finite());
    let (min, max) = finite().fold((f64::INFINITY, f64::NEG_INFINITY), |(min, max), x| (min.min(x), max.max(x)));
    let n = finite().count();
    if n == 0 {
        return Histogram::default();
    }
    let width = (max - min) / N_BINS as f64;
    let n_bins = if width > 0.0 { N_BINS } else { 1 };
    let mut bucket = vec![0.0; n_bins];
    for value in finite() {
        let bin = if width > 0.0 { ((value - min) / width) as usize } else { 0 };
        bucket[bin.min(n_bins - 1)] += 1.0;
    }
    let bucket_limit = (1..=n_bins).map(|bin| if bin == n_bins { max } else { min + width * bin as f64 }).collect();
    Histogram { min, max, num: n as f64, sum: finite().sum(), sum_squares: finite().map(|x| x * x).sum(), bucket_limit, bucket }
}

/// A text for the text plugin, which reads Markdown: four blanks before each line keep it as it is.
fn sample(text: &str) -> Value {
    let markdown: String = text.lines().map(|line| format!("    {line}\n")).collect();
    let tensor = Tensor { dtype: DT_STRING, shape: Some(Shape { dims: vec![Dim { size: 1 }] }), string_val: vec![markdown.into_bytes()] };
    let plugin = Plugin { plugin_name: "text".to_owned() };
    let metadata = Metadata { plugin: Some(plugin), data_class: DATA_CLASS_TENSOR };
    Value { metadata: Some(metadata), ..Value::new("sample", Content::Tensor(tensor)) }
}

const SESSION_START: i32 = 1;
const DT_STRING: i32 = 7;
const DATA_CLASS_TENSOR: i32 = 2;

/// `Event`.
#[derive(Clone, PartialEq, Message)]
struct Record {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    Session(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Value>,
}

/// `Summary.Value`.
#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(message, optional, tag = "9")]
    metadata: Option<Metadata>,
    #[prost(oneof = "Content", tags = "2, 5, 8")]
    content: Option<Content>,
}

impl Value {
    fn new(tag: &str, content: Content) -> Self {
        Self { tag: tag.to_owned(), metadata: None, content: Some(content) }
    }
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Content {
    #[prost(float, tag = "2")]
    Simple(f32),
    #[prost(message, tag = "5")]
    Histogram(Histogram),
    #[prost(message, tag = "8")]
    Tensor(Tensor),
}

/// `HistogramProto`: bin `i` ends at `bucket_limit[i]`.
#[derive(Clone, PartialEq, Message)]
struct Histogram {
    #[prost(double, tag = "1")]
    min: f64,
    #[prost(double, tag = "2")]
    max: f64,
    #[prost(double, tag = "3")]
    num: f64,
    #[prost(double, tag = "4")]
    sum: f64,
    #[prost(double, tag = "5")]
    sum_squares: f64,
    #[prost(double, repeated, tag = "6")]
    bucket_limit: Vec<f64>,
    #[prost(double, repeated, tag = "7")]
    bucket: Vec<f64>,
}

/// `SummaryMetadata`.
#[derive(Clone, PartialEq, Message)]
struct Metadata {
    #[prost(message, optional, tag = "1")]
    plugin: Option<Plugin>,
    #[prost(int32, tag = "4")]
    data_class: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Plugin {
    #[prost(string, tag = "1")]
    plugin_name: String,
}

/// `TensorProto`.
#[derive(Clone, PartialEq, Message)]
struct Tensor {
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    shape: Option<Shape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    string_val: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct Shape {
    #[prost(message, repeated, tag = "2")]
    dims: Vec<Dim>,
}

#[derive(Clone, PartialEq, Message)]
struct Dim {
    #[prost(int64, tag = "1")]
    size: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_standard() {
        assert_eq!(checksum(b"123456789"), 0xE306_9283);
        assert_eq!(checksum(&[0; 32]), 0x8A91_36AA);
        assert_eq!(checksum(b""), 0);
    }

    #[test]
    fn every_value_lies_in_one_bin() {
        let values: Vec<f32> = (0..1000).map(|i| (i as f32 / 100.0).sin()).chain([f32::NAN, f32::INFINITY]).collect();
        let h = histogram(&values);
        assert_eq!((h.bucket.iter().sum::<f64>(), h.num, h.bucket.len()), (1000.0, 1000.0, N_BINS));
        assert!(h.bucket_limit.windows(2).all(|pair| pair[0] < pair[1]) && h.bucket_limit[N_BINS - 1] == h.max);
        let constant = histogram(&[2.0; 5]);
        assert_eq!((constant.bucket.as_slice(), constant.bucket_limit.as_slice()), (&[5.0][..], &[2.0][..]));
        assert_eq!(histogram(&[]), Histogram::default());
    }
}
