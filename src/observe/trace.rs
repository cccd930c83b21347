//! `--trace FILE`: a Chrome trace of a command, which chrome://tracing and ui.perfetto.dev show: one row a thread with its spans, and under each thread
//! that drives a GPU one row with that GPU's passes, on the same time line.
//!
//! The file is JSON, `{"traceEvents": [...]}`: complete events (`X`) with `ts` and `dur` in microseconds, and the rows' names (`M`). Events are written
//! as spans end, so children stand before their parents. Not here: which spans there are.

use std::collections::HashMap;
use std::fmt::Debug;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Dispatch, Event, Metadata, Subscriber};
use tracing_core::span::Current;

use crate::spans::GPU_TARGET;
use crate::usage::UsageError;

/// Events that are written at most: about 200 MB. What comes later is counted.
const MAX_EVENTS: u64 = 1 << 20;
/// Rows of GPUs are numbered this much above those of the threads that drive them.
const GPU_ROW: u64 = 1000;

/// A trace that is being written.
pub struct Trace {
    path: PathBuf,
    shared: Arc<Shared>,
}

impl Trace {
    /// Begins a trace; the clock starts here.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(|error| UsageError(format!("--trace cannot write {}: {error}", path.display())))?;
        let mut out = BufWriter::new(file);
        out.write_all(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n").with_context(|| format!("cannot write {}", path.display()))?;
        let unix_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
        let state = State {
            out,
            failure: None,
            n_written: 0,
            n_lost: 0,
            next_span: 1,
            spans: HashMap::new(),
            rows: HashMap::new(),
            max_events: MAX_EVENTS,
        };
        let shared = Shared { start: Instant::now(), unix_ns, state: Mutex::new(state) };
        Ok(Self { path: path.to_owned(), shared: Arc::new(shared) })
    }

    /// Listens to what `work` does, on this thread and on those that it starts by [`crate::spans::spawn`].
    pub fn watch<T>(&self, work: impl FnOnce() -> T) -> T {
        let listen = || Dispatch::new(Listener(Arc::clone(&self.shared)));
        // With a single listener `tracing` asks the thread that first comes to a span whether anybody listens, and one that nobody listens to would
        // silence that span for all; with two it asks the listeners. Nothing is sent to the second.
        let _second = listen();
        tracing::dispatcher::with_default(&listen(), work)
    }

    /// Ends the file. Tells how many events had no place in it.
    ///
    /// # Errors
    /// The file's.
    pub fn finish(self) -> Result<u64> {
        let mut state = self.shared.state();
        let failure = state.failure.take();
        let ended = failure.map_or_else(|| state.out.write_all(b"\n]}\n").and_then(|()| state.out.flush()), Err);
        ended.with_context(|| format!("cannot write {}", self.path.display()))?;
        Ok(state.n_lost)
    }
}

struct Shared {
    start: Instant,
    /// The same moment, nanoseconds since 1970.
    unix_ns: u64,
    state: Mutex<State>,
}

struct State {
    out: BufWriter<File>,
    failure: Option<std::io::Error>,
    n_written: u64,
    n_lost: u64,
    max_events: u64,
    next_span: u64,
    spans: HashMap<u64, Span>,
    rows: HashMap<ThreadId, Row>,
}

/// A span from its making to its end.
struct Span {
    metadata: &'static Metadata<'static>,
    fields: Map<String, Value>,
    n_handles: usize,
}

/// What one thread is doing.
struct Row {
    number: u64,
    name: String,
    has_gpu: bool,
    /// Spans that it is in, with the nanosecond in which it entered each.
    entered: Vec<(u64, u64)>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A thread that panicked within a line may have spoilt that line, no more.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nanoseconds since the start.
    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }
}

fn us(ns: u64) -> Value {
    json!(ns as f64 / 1e3)
}

impl State {
    fn write(&mut self, event: &Value) {
        if self.failure.is_some() {
            return;
        }
        let comma = if self.n_written > 0 { ",\n" } else { "" };
        self.n_written += 1;
        self.failure = write!(self.out, "{comma}{event}").err();
    }

    fn name_row(&mut self, number: u64, name: &str) {
        self.write(&json!({ "ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": { "name": name } }));
        self.write(&json!({ "ph": "M", "name": "thread_sort_index", "pid": 1, "tid": number, "args": { "sort_index": number % GPU_ROW * 2 + number / GPU_ROW } }));
    }

    /// The row of the calling thread.
    fn row(&mut self) -> &mut Row {
        let thread = std::thread::current();
        if !self.rows.contains_key(&thread.id()) {
            let number = self.rows.len() as u64 + 1;
            let name = thread.name().unwrap_or("thread").to_owned();
            self.name_row(number, &name);
            self.rows.insert(thread.id(), Row { number, name, has_gpu: false, entered: Vec::new() });
        }
        self.rows.entry(thread.id()).or_insert_with(|| Row { number: 0, name: String::new(), has_gpu: false, entered: Vec::new() })
    }

    /// A complete event.
    fn complete(&mut self, row: u64, name: &str, category: &str, [from, to]: [u64; 2], args: &Map<String, Value>) {
        if self.n_written >= self.max_events {
            self.n_lost += 1;
            return;
        }
        let dur = us(to.saturating_sub(from));
        self.write(&json!({ "ph": "X", "name": name, "cat": category, "pid": 1, "tid": row, "ts": us(from), "dur": dur, "args": args }));
    }

    fn left(&mut self, id: u64, now: u64) {
        let row = self.row();
        let number = row.number;
        let Some(place) = row.entered.iter().rposition(|(span, _)| *span == id) else { return };
        let (_, from) = row.entered.remove(place);
        let Some(Span { metadata, fields, .. }) = self.spans.get(&id) else { return };
        let (metadata, mut fields) = (*metadata, fields.clone());
        let name = match fields.remove("kernel") {
            Some(Value::String(kernel)) => kernel,
            _ => metadata.name().to_owned(),
        };
        self.complete(number, &name, metadata.name(), [from, now], &fields);
    }

    /// A pass that a GPU has done for the calling thread.
    fn pass(&mut self, mut fields: Map<String, Value>, unix_ns: u64) {
        let row = self.row();
        let (number, is_new) = (GPU_ROW + row.number, !row.has_gpu);
        row.has_gpu = true;
        let name = row.name.clone();
        let device = fields.remove("device");
        if is_new {
            let device = device.as_ref().and_then(Value::as_str).unwrap_or_default();
            self.name_row(number, &format!("{name}: passes on {device}"));
        }
        let mut time = |key: &str| fields.remove(key).and_then(|ns| ns.as_u64()).map_or(0, |ns| ns.saturating_sub(unix_ns));
        let times = [time("start_unix_ns"), time("end_unix_ns")];
        let name = fields.remove("pass");
        self.complete(number, name.as_ref().and_then(Value::as_str).unwrap_or("pass"), "gpu", times, &fields);
    }
}

/// Collects fields.
struct Fields<'a>(&'a mut Map<String, Value>);

impl Visit for Fields<'_> {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().to_owned(), value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name().to_owned(), value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.0.insert(field.name().to_owned(), value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name().to_owned(), value.into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.into());
    }
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}").into());
    }
}

/// What `tracing` calls.
struct Listener(Arc<Shared>);

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("carrousel") && *metadata.level() <= LevelFilter::DEBUG
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::DEBUG)
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut fields = Map::new();
        span.record(&mut Fields(&mut fields));
        let mut state = self.0.state();
        let id = state.next_span;
        state.next_span += 1;
        state.spans.insert(id, Span { metadata: span.metadata(), fields, n_handles: 1 });
        Id::from_u64(id)
    }

    fn record(&self, span: &Id, values: &Record<'_>) {
        if let Some(span) = self.0.state().spans.get_mut(&span.into_u64()) {
            values.record(&mut Fields(&mut span.fields));
        }
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        if event.metadata().target() == GPU_TARGET {
            let mut fields = Map::new();
            event.record(&mut Fields(&mut fields));
            self.0.state().pass(fields, self.0.unix_ns);
        }
    }

    fn enter(&self, span: &Id) {
        let mut state = self.0.state();
        // Within the lock, so that no later moment stands in an earlier event of this row.
        let now = self.0.now();
        state.row().entered.push((span.into_u64(), now));
    }

    fn exit(&self, span: &Id) {
        let now = self.0.now();
        self.0.state().left(span.into_u64(), now);
    }

    fn clone_span(&self, span: &Id) -> Id {
        if let Some(span) = self.0.state().spans.get_mut(&span.into_u64()) {
            span.n_handles += 1;
        }
        span.clone()
    }

    fn try_close(&self, span: Id) -> bool {
        let mut state = self.0.state();
        let Some(found) = state.spans.get_mut(&span.into_u64()) else { return false };
        found.n_handles -= 1;
        let is_last = found.n_handles == 0;
        if is_last {
            state.spans.remove(&span.into_u64());
        }
        is_last
    }

    fn current_span(&self) -> Current {
        let mut state = self.0.state();
        let Some((id, _)) = state.row().entered.last().copied() else { return Current::none() };
        state.spans.get(&id).map_or_else(Current::none, |span| Current::new(Id::from_u64(id), span.metadata))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(path: &Path) -> Vec<Value> {
        let whole: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        whole["traceEvents"].as_array().unwrap().clone()
    }

    #[test]
    fn spans_of_threads_lie_within_each_other_with_their_fields() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let trace = Trace::create(&path).unwrap();
        trace.watch(|| {
            let outer = tracing::debug_span!("outer", step = 7).entered();
            tracing::debug_span!("launch", kernel = "gemm").in_scope(|| ());
            tracing::trace_span!("too fine").in_scope(|| ());
            drop(outer);
            crate::spans::spawn("other".to_owned(), || tracing::debug_span!("there").in_scope(|| ())).unwrap().join().unwrap();
        });
        tracing::debug_span!("unheard").in_scope(|| ());
        assert_eq!(trace.finish().unwrap(), 0);
        let found = events(&path);
        let of = |name: &str| found.iter().find(|e| e["name"] == name && e["ph"] == "X").unwrap_or_else(|| panic!("no {name}"));
        let (outer, gemm, there) = (of("outer"), of("gemm"), of("there"));
        assert_eq!(outer["args"]["step"], 7);
        assert_eq!(gemm["cat"], "launch");
        let span = |e: &Value| [e["ts"].as_f64().unwrap(), e["ts"].as_f64().unwrap() + e["dur"].as_f64().unwrap()];
        assert!(span(outer)[0] <= span(gemm)[0] && span(gemm)[1] <= span(outer)[1] + 1e-6);
        assert_ne!(there["tid"], outer["tid"]);
        assert!(found.iter().any(|e| e["ph"] == "M" && e["args"]["name"] == "other" && e["tid"] == there["tid"]));
        assert!(!found.iter().any(|e| e["name"] == "unheard" || e["name"] == "too fine"));
    }

    #[test]
    fn events_beyond_the_limit_are_counted_and_the_file_stays_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let trace = Trace::create(&path).unwrap();
        trace.shared.state().max_events = 5;
        trace.watch(|| (0..10).for_each(|_| tracing::debug_span!("work").in_scope(|| ())));
        assert_eq!(trace.finish().unwrap(), 7);
        assert_eq!(events(&path).len(), 5);
    }

    #[test]
    fn a_file_that_cannot_be_made_is_refused() {
        let error = Trace::create(Path::new("/nowhere/trace.json")).err().unwrap();
        assert!(error.to_string().contains("--trace cannot write /nowhere/trace.json"), "{error}");
    }
}
