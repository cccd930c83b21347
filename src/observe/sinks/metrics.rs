//! `metrics.jsonl` in the run folder: every event, one JSON object a line, through all starts of the run.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Map, Value};

use crate::observe::{Event, Sink};

/// Appends events to the metrics file. Where a run is resumed, its lines are sorted out with [`up_to`] first.
pub struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Opens or creates `path` for appending; a last line that a kill left half written is cut off.
    ///
    /// # Errors
    /// The file cannot be opened, read or cut.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .read(true)
            .open(path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        cut_torn_line(&mut file).with_context(|| format!("cannot repair {}", path.display()))?;
        Ok(Self { path: path.to_owned(), file })
    }
}

impl Sink for Metrics {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn event(&mut self, event: &Event) -> anyhow::Result<()> {
        // Unbuffered and in one write: what was reported before a kill is in the file.
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        Ok(self.file.write_all(&line)?)
    }
}

fn cut_torn_line(file: &mut File) -> io::Result<()> {
    let end = file.seek(SeekFrom::End(0))?;
    let mut keep = end;
    let mut chunk = [0_u8; 4096];
    // Backwards, since the file may be long and the torn line is short.
    while keep > 0 {
        let n = keep.min(chunk.len() as u64) as usize;
        file.seek(SeekFrom::Start(keep - n as u64))?;
        file.read_exact(&mut chunk[..n])?;
        if let Some(at) = chunk[..n].iter().rposition(|&byte| byte == b'\n') {
            keep = keep - n as u64 + at as u64 + 1;
            break;
        }
        keep -= n as u64;
    }
    if keep < end { file.set_len(keep) } else { Ok(()) }
}

/// Which lines of the metrics file stay, told one after the other, for a run that goes on from the checkpoint of `step`.
///
/// Events with a step stay where it is at most `step`; events without one stay where they stand before the first later step. A summary or an
/// error goes, since the run is no longer over, and so does a line that is no JSON object.
pub fn up_to(step: u64) -> impl FnMut(&str) -> bool {
    let mut beyond = false;
    move |line| {
        let Ok(Value::Object(object)) = serde_json::from_str(line) else { return false };
        let at = object.get("step").and_then(Value::as_u64);
        beyond |= at.is_some_and(|at| at > step);
        let over = matches!(object.get("event").and_then(Value::as_str), Some("summary" | "error"));
        !over && at.map_or(!beyond, |at| at <= step)
    }
}

/// Points (step, value).
pub type Points = Vec<(f64, f64)>;

/// Beyond what any run has; a damaged file may say anything.
const MOST_DEVICES: u64 = 1024;

/// What a metrics file says of a run, through all its starts. Null numbers are left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// Losses of single training steps.
    pub train: Points,
    /// Losses on the validation part, at the ends of epochs and between.
    pub valid: Points,
    pub lr: Points,
    pub grad_norm: Points,
    pub tokens_per_second: Points,
    /// The same by rank.
    pub device_tokens_per_second: Vec<Points>,
    /// The events of the run's starts, in order.
    pub starts: Vec<Map<String, Value>>,
    /// The events of devices of the last start that told them, by rank.
    pub devices: Vec<Map<String, Value>>,
    pub warnings: Vec<String>,
}

/// Reads a metrics file.
///
/// # Errors
/// The file cannot be read.
pub fn history(path: &Path) -> anyhow::Result<History> {
    let mut history = History::default();
    let read = File::open(path).and_then(|file| for_each_object(file, |object| history.take(object)));
    read.with_context(|| format!("cannot read {}", path.display()))?;
    Ok(history)
}

impl History {
    fn take(&mut self, object: &Map<String, Value>) {
        let number = |field: &str| object.get(field).and_then(Value::as_f64);
        let step = number("step");
        let add = |points: &mut Points, value: Option<f64>| points.extend(step.zip(value));
        match object.get("event").and_then(Value::as_str) {
            Some("step") => {
                add(&mut self.train, number("loss"));
                add(&mut self.lr, number("lr"));
                add(&mut self.grad_norm, number("grad_norm"));
                add(&mut self.tokens_per_second, number("tokens_per_second"));
                let by_rank = object.get("device_tokens_per_second").and_then(Value::as_array);
                for (rank, value) in by_rank.into_iter().flatten().enumerate() {
                    if self.device_tokens_per_second.len() <= rank {
                        self.device_tokens_per_second.push(Points::new());
                    }
                    add(&mut self.device_tokens_per_second[rank], value.as_f64());
                }
            }
            Some("epoch" | "eval") => add(&mut self.valid, number("valid_loss")),
            Some("start") => self.starts.push(object.clone()),
            Some("device") => {
                // At the end all come in order, and the first one begins another list; one that is lost comes alone.
                let rank = object.get("rank").and_then(Value::as_u64).map_or(0, |rank| rank.min(MOST_DEVICES) as usize);
                if rank == 0 {
                    self.devices.clear();
                }
                self.devices.resize(self.devices.len().max(rank + 1), Map::new());
                self.devices[rank] = object.clone();
            }
            Some("warning") => self.warnings.extend(object.get("message").and_then(Value::as_str).map(str::to_owned)),
            _ => {}
        }
    }
}

/// Calls `take` with every line that is a JSON object, without its end of line. Bytes, since a torn line may end within a character.
fn for_each_object(file: File, mut take: impl FnMut(&Map<String, Value>)) -> io::Result<()> {
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        // A line without its end may be a whole object by chance (a number cut short is one as well), so it does not count.
        if line.pop() == Some(b'\n')
            && let Ok(Value::Object(object)) = serde_json::from_slice(&line)
        {
            take(&object);
        }
        line.clear();
    }
    Ok(())
}
