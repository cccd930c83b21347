//! What a run tells the outside: the names in the JSON lines, the metrics file through a resume, the table, the plots.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use carrousel::observe::plot::{self, ForecastPlot, Series, Times};
use carrousel::observe::sinks::{Console, History, Json, Metrics, Report, ReportFiles, Verbosity, history, up_to};
use carrousel::observe::{Bus, CheckpointKind, Event, Exhibit, Level, RunInfo, Sink, StartDevice, Table, Throughput, Trend, format};
use carrousel::store::RunFolder;
use carrousel::store::run_folder::METRICS;
use serde_json::{Map, Value, json};

fn step(step: u64, loss: f64) -> Event {
    Event::Step { step, epoch: 1, loss, lr: 0.002, tokens_per_second: 41_234.5, grad_norm: 0.5, device_tokens_per_second: Vec::new() }
}

fn to_json(event: &Event) -> Value {
    serde_json::to_value(event).expect("an event is JSON")
}

/// A writer that several owners can read back.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Shared {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().expect("no test panicked while writing").clone()).expect("sinks write UTF-8")
    }
}

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no test panicked while writing").extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A pipe whose reader has gone.
struct Broken;

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }
    fn flush(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::BrokenPipe.into())
    }
}

#[test]
fn every_event_is_written_under_the_names_of_the_contract() {
    let summary: Map<String, Value> =
        [("status".to_owned(), json!("finished")), ("train_loss".to_owned(), json!(f64::NAN))].into_iter().collect();
    let cases = [
        (
            step(7, 1.5),
            json!({"event": "step", "step": 7, "epoch": 1, "loss": 1.5, "lr": 0.002, "tokens_per_second": 41_234.5, "grad_norm": 0.5}),
        ),
        (
            Event::Start {
                step: 0,
                version: "1.2.3".into(),
                system: "linux".into(),
                parameters: 7,
                devices: vec![StartDevice { device: "cpu:1".into(), name: "a processor".into(), driver: String::new() }],
            },
            json!({"event": "start", "step": 0, "version": "1.2.3", "system": "linux", "parameters": 7,
                   "devices": [{"device": "cpu:1", "name": "a processor", "driver": ""}]}),
        ),
        (
            Event::Step {
                step: 7,
                epoch: 1,
                loss: 1.5,
                lr: 0.002,
                tokens_per_second: 3.0,
                grad_norm: 0.5,
                device_tokens_per_second: vec![1.0, 2.0],
            },
            json!({"event": "step", "step": 7, "epoch": 1, "loss": 1.5, "lr": 0.002, "tokens_per_second": 3.0, "grad_norm": 0.5,
                   "device_tokens_per_second": [1.0, 2.0]}),
        ),
        (
            Event::Epoch { epoch: 2, step: 20, train_loss: 1.25, valid_loss: Some(1.75), seconds: 3.5 },
            json!({"event": "epoch", "epoch": 2, "step": 20, "train_loss": 1.25, "valid_loss": 1.75, "seconds": 3.5}),
        ),
        (
            Event::Epoch { epoch: 2, step: 20, train_loss: 1.25, valid_loss: None, seconds: 3.5 },
            json!({"event": "epoch", "epoch": 2, "step": 20, "train_loss": 1.25, "valid_loss": null, "seconds": 3.5}),
        ),
        (Event::Eval { step: 5, valid_loss: 1.0 }, json!({"event": "eval", "step": 5, "valid_loss": 1.0})),
        (
            Event::Checkpoint { step: 20, path: "a/b".into(), kind: CheckpointKind::Best },
            json!({"event": "checkpoint", "step": 20, "path": "a/b", "kind": "best"}),
        ),
        (
            Event::Device {
                step: 20,
                rank: 1,
                name: "cpu:2".into(),
                share: 0.25,
                loss: Some(1.5),
                tokens_per_second: 10.0,
                waited_seconds: 0.5,
                bytes_sent: 4096,
                lost: None,
            },
            json!({"event": "device", "step": 20, "rank": 1, "name": "cpu:2", "share": 0.25, "loss": 1.5, "tokens_per_second": 10.0,
                "waited_seconds": 0.5, "bytes_sent": 4096}),
        ),
        (Event::Warning { message: "w".into() }, json!({"event": "warning", "message": "w"})),
        (Event::Error { message: "e".into() }, json!({"event": "error", "message": "e"})),
        (Event::Summary(summary), json!({"event": "summary", "status": "finished", "train_loss": null})),
    ];
    for (event, expected) in cases {
        assert_eq!(to_json(&event), expected, "{event:?}");
    }
    for (kind, name) in [(CheckpointKind::Periodic, "periodic"), (CheckpointKind::Best, "best"), (CheckpointKind::Final, "final")] {
        assert_eq!(serde_json::to_value(kind).unwrap(), json!(name));
    }
}

#[test]
fn a_number_that_is_not_finite_is_null_in_the_text_itself() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let text =
            serde_json::to_string(&Event::Epoch { epoch: 1, step: 1, train_loss: bad, valid_loss: Some(bad), seconds: 1.0 }).unwrap();
        assert_eq!(text, r#"{"event":"epoch","epoch":1,"step":1,"train_loss":null,"valid_loss":null,"seconds":1.0}"#);
    }
}

#[test]
fn json_lines_hold_one_object_a_line_also_where_a_message_has_several() {
    let out = Shared::default();
    let mut json = Json::to(Box::new(out.clone()));
    json.event(&step(1, 2.0)).unwrap();
    json.event(&Event::Warning { message: "two\nlines".into() }).unwrap();
    let text = out.text();
    let names: Vec<Value> = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["event"].clone()).collect();
    assert_eq!(names, ["step", "warning"]);
    assert!(text.ends_with('\n'));
}

#[test]
fn a_sink_that_fails_is_reported_once_and_the_others_go_on() {
    let out = Shared::default();
    let console = Console::lines(Verbosity::Quiet, Box::new(out.clone()));
    let mut bus = Bus::new(vec![Box::new(Json::to(Box::new(Broken))), Box::new(console)]);
    for i in 1..=3 {
        bus.send(&step(i, 1.0));
    }
    bus.warn("still here");
    bus.finish();
    let text = out.text();
    assert_eq!(text.matches("cannot write to standard output").count(), 1, "{text}");
    assert!(text.ends_with("warning: still here\n"), "{text}");
}

#[test]
fn a_bus_whose_sinks_all_fail_goes_on_in_silence() {
    let mut bus = Bus::default();
    bus.add(Box::new(Json::to(Box::new(Broken))));
    bus.add(Box::new(Console::lines(Verbosity::Verbose, Box::new(Broken))));
    bus.begin(&RunInfo::default());
    bus.send(&step(1, 1.0));
    bus.log(Level::Info, "nobody reads this");
    bus.finish();
}

#[test]
fn the_console_shows_what_was_asked_for() {
    let told = |verbosity| {
        let out = Shared::default();
        let mut bus = Bus::new(vec![Box::new(Console::lines(verbosity, Box::new(out.clone())).line_every(Duration::MAX))]);
        bus.begin(&RunInfo { total_steps: Some(2000), total_epochs: Some(4), perplexity: true, ..RunInfo::default() });
        bus.log(Level::Info, "chose cpu");
        bus.log(Level::Detail, "variant avx2");
        for i in 1..=50 {
            bus.send(&step(i, 2.0));
        }
        bus.send(&Event::Epoch { epoch: 1, step: 50, train_loss: 2.0, valid_loss: Some(1.0), seconds: 12.34 });
        bus.send(&Event::Checkpoint { step: 50, path: "somewhere".into(), kind: CheckpointKind::Periodic });
        bus.warn("careful");
        bus.finish();
        out.text()
    };
    assert_eq!(told(Verbosity::Quiet), "warning: careful\n");
    let normal = told(Verbosity::Normal);
    let lines: Vec<&str> = normal.lines().collect();
    assert_eq!(lines.len(), 4, "one line for the first step, none for the 49 after it: {normal}");
    assert_eq!(lines[0], "chose cpu");
    assert!(lines[1].starts_with("step 1/2,000  epoch 1/4  loss 2.000  ppl 7.389  lr 0.002  41.2k tokens/s"), "{}", lines[1]);
    assert_eq!(lines[2], "epoch 1/4  step 50/2,000  train 2.000  valid 1.000  ppl 2.718  12.3 s");
    assert_eq!(lines[3], "warning: careful");
    let verbose = told(Verbosity::Verbose);
    assert!(verbose.contains("variant avx2\n") && verbose.contains("wrote somewhere\n"), "{verbose}");
}

#[test]
fn a_progress_line_tells_trend_devices_and_time_left_and_ticks_keep_it_moving() {
    let told = |verbosity| {
        let out = Shared::default();
        let mut bus = Bus::new(vec![Box::new(Console::lines(verbosity, Box::new(out.clone())).line_every(Duration::ZERO))]);
        let devices = vec!["gpu:0".to_owned(), "cpu:4".to_owned()];
        bus.begin(&RunInfo { total_steps: Some(100), total_epochs: Some(2), devices, ..RunInfo::default() });
        for step in 1..=40 {
            std::thread::sleep(Duration::from_millis(1));
            let event = Event::Step {
                step,
                epoch: 1,
                loss: 4.0 - 0.05 * step as f64,
                lr: 0.002,
                tokens_per_second: 41_234.5,
                grad_norm: 0.5,
                device_tokens_per_second: vec![30_100.0, 11_134.5],
            };
            if step % 20 == 0 { bus.send(&event) } else { bus.tick(&event) }
        }
        out.text()
    };
    let normal = told(Verbosity::Normal);
    let last = normal.lines().last().unwrap();
    assert_eq!(normal.lines().count(), 40, "{normal}");
    assert!(last.starts_with("step 40/100  epoch 1/2  loss 2.475 ↓  lr 0.002  41.2k tokens/s (gpu:0 30.1k, cpu:4 11.1k)"), "{last}");
    assert!(last.ends_with(" s left") && !last.contains("norm"), "{last}");
    assert!(told(Verbosity::Verbose).lines().last().unwrap().contains("  norm 0.500"));
    assert_eq!(told(Verbosity::Quiet), "");
}

#[test]
fn a_trend_is_told_only_where_it_stands_out_of_the_noise() {
    let noise = |i: u32| f64::from((i * 7919) % 101) / 101.0 - 0.5;
    let arrow_of = |slope: f64, n: u32| {
        let mut trend = Trend::default();
        (0..n).for_each(|i| trend.add(3.0 + slope * f64::from(i) + noise(i)));
        trend.arrow()
    };
    assert_eq!((arrow_of(0.0, 40), arrow_of(-0.05, 40), arrow_of(0.05, 40)), ("→", "↓", "↑"));
    assert_eq!((arrow_of(-0.05, 7), arrow_of(-0.05, 400)), ("", "↓"));
    let mut trend = Trend::default();
    (0..30).for_each(|_| trend.add(2.0));
    assert_eq!((trend.level(), trend.arrow()), (2.0, "→"));
    trend.add(f64::NAN);
    assert!(trend.level().is_nan() && trend.arrow().is_empty());
}

#[test]
fn without_a_limit_each_step_has_its_line() {
    let out = Shared::default();
    let mut console = Console::lines(Verbosity::Normal, Box::new(out.clone())).line_every(Duration::ZERO);
    console.begin(&RunInfo::default()).unwrap();
    for i in 1..=5 {
        console.event(&step(i, f64::NAN)).unwrap();
    }
    assert_eq!(out.text().lines().filter(|line| line.contains("loss nan")).count(), 5);
}

fn metrics_with(events: &[Event], tail: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(METRICS);
    let mut metrics = Metrics::open(&path).unwrap();
    for event in events {
        metrics.event(event).unwrap();
    }
    drop(metrics);
    fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(tail).unwrap();
    (folder, path)
}

fn run_of_four_steps() -> Vec<Event> {
    vec![
        Event::Warning { message: "early".into() },
        step(1, 4.0),
        step(2, 3.0),
        Event::Epoch { epoch: 1, step: 2, train_loss: 3.5, valid_loss: Some(3.25), seconds: 1.0 },
        Event::Summary([("steps".to_owned(), json!(2))].into_iter().collect()),
        step(3, 2.0),
        Event::Warning { message: "late".into() },
        step(4, 1.0),
    ]
}

fn lines_of(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "{text:?}");
    text.lines().map(str::to_owned).collect()
}

#[test]
fn metrics_are_cut_back_to_a_step_whatever_the_last_line_looks_like() {
    // Half a line; half a character; a line that would be whole but for its end; nothing.
    for tail in [&b"{\"event\":\"step\",\"st"[..], b"{\"event\":\"\xC3", b"{\"event\":\"step\",\"step\":2,\"loss\":1}", b""] {
        let (folder, path) = metrics_with(&run_of_four_steps(), tail);
        RunFolder::open_or_create(folder.path()).unwrap().retain_lines(METRICS, up_to(2)).unwrap();
        let events: Vec<Value> = lines_of(&path).iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        let expected: Vec<Value> = run_of_four_steps()[..4].iter().map(to_json).collect();
        assert_eq!(events, expected, "tail {tail:?}");
    }
}

#[test]
fn metrics_cut_back_to_step_zero_hold_only_what_came_before_the_first_step() {
    let (folder, path) = metrics_with(&run_of_four_steps(), b"");
    RunFolder::open_or_create(folder.path()).unwrap().retain_lines(METRICS, up_to(0)).unwrap();
    assert_eq!(lines_of(&path), [r#"{"event":"warning","message":"early"}"#]);
}

#[test]
fn appending_to_metrics_cuts_off_a_torn_line_and_nothing_else() {
    let long = [b"{\"event\":\"warning\",\"message\":\"".as_slice(), &[b'x'; 10_000]].concat();
    for tail in [&b"{\"ev"[..], &long, b""] {
        let (_folder, path) = metrics_with(&[step(1, 4.0), step(2, 3.0)], tail);
        Metrics::open(&path).unwrap().event(&step(3, 2.0)).unwrap();
        let steps: Vec<Value> = lines_of(&path).iter().map(|line| serde_json::from_str::<Value>(line).unwrap()["step"].clone()).collect();
        assert_eq!(steps, [1, 2, 3]);
    }
    // A file that is one torn line from its beginning.
    let (_folder, path) = metrics_with(&[], b"{\"ev");
    Metrics::open(&path).unwrap().event(&step(1, 4.0)).unwrap();
    assert_eq!(lines_of(&path).len(), 1);
}

#[test]
fn metrics_in_a_folder_that_is_missing_are_an_error_that_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("gone").join(METRICS);
    let error = Metrics::open(&path).err().expect("the folder is missing");
    assert!(format!("{error:#}").contains(&path.display().to_string()), "{error:#}");
}

#[test]
fn losses_are_read_back_from_metrics_without_those_that_are_null() {
    let mut events = run_of_four_steps();
    events.push(step(5, f64::NAN));
    events.push(Event::Eval { step: 5, valid_loss: 2.5 });
    let (_folder, path) = metrics_with(&events, b"{\"event\":\"step\",\"step\":6,\"loss\":1}");
    let History { train, valid, .. } = history(&path).unwrap();
    assert_eq!(train, [(1.0, 4.0), (2.0, 3.0), (3.0, 2.0), (4.0, 1.0)]);
    assert_eq!(valid, [(2.0, 3.25), (5.0, 2.5)]);
}

/// The report of a run with these metrics, after `end`; what it shows is told before.
fn report_of(events: &[Event], shown: &[Exhibit<'_>], end: &Event) -> String {
    let (folder, metrics) = metrics_with(events, b"");
    let files = ReportFiles { page: folder.path().join("report.html"), config: folder.path().join("config.toml"), metrics };
    fs::write(&files.config, "task = \"lm\"\ndata = [\"a <b> & c.txt\"]\nlayers = 2\nhidden = 64\nlr = 0.002\n").unwrap();
    let page = files.page.clone();
    let mut bus = Bus::new(vec![Box::new(Report::new(files))]);
    shown.iter().for_each(|exhibit| bus.show(*exhibit));
    assert!(!page.exists(), "written before the end");
    bus.send(end);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "something was left beside the page");
    fs::read_to_string(page).unwrap()
}

#[test]
fn the_report_is_one_page_that_needs_nothing_else_and_shows_what_was_told() {
    let mut events = run_of_four_steps();
    let device = |device: &str, name: &str| StartDevice { device: device.into(), name: name.into(), driver: "llvm 1".into() };
    let devices = vec![device("gpu:0", "a <fast> card"), device("cpu:4", "a processor")];
    events.insert(0, Event::Start { step: 0, version: "9.8.7".into(), system: "linux x86_64".into(), parameters: 54_321, devices });
    for step in 5..200 {
        events.push(Event::Step {
            step,
            epoch: 1,
            loss: 2.0,
            lr: 0.001,
            tokens_per_second: 30.0,
            grad_norm: 0.5,
            device_tokens_per_second: vec![20.0, 10.0],
        });
    }
    let summary = json!({"status": "finished", "test_loss": 1.25, "perplexity": 3.49, "rmse": {"model": 0.5, "last": 0.75}, "baselines": {"last": 2.5},
        "confusion": {"classes": ["cat", "dog"], "counts": [[7, 1], [0, 9]]}});
    let Value::Object(summary) = summary else { unreachable!() };
    let plot = ForecastPlot {
        title: "units: 3 steps ahead".into(),
        unit: "units".into(),
        times: Times::Numbers(vec![1.0, 2.0, 3.0]),
        truth: vec![1.0, 2.0, f64::NAN],
        forecast: vec![1.5, 1.5, 2.0],
        baseline: None,
    };
    let shown = [Exhibit::Text { step: 4, text: "It was <i>late</i>" }, Exhibit::Forecast(&plot)];
    let page = report_of(&events, &shown, &Event::Summary(summary));
    for foreign in ["http:", "https:", "<script", "<link", "<img", "@import", "url("] {
        assert!(!page.contains(foreign), "the page refers to something outside: {foreign}");
    }
    assert!(page.contains("prefers-color-scheme:dark"));
    assert_eq!(page.matches("<svg").count(), 5, "loss, forecast, learning rate, gradient norm, throughput");
    assert_eq!(page.matches("<section").count(), page.matches("</section>").count());
    for part in [
        "9.8.7",
        "a &lt;fast&gt; card",
        "54,321",
        "gpu:0",
        "It was &lt;i&gt;late&lt;/i&gt;",
        "a &lt;b&gt; &amp; c.txt",
        "units: 3 steps ahead",
        "early",
        "late",
    ] {
        assert!(page.contains(part), "{part} is not on the page");
    }
    for part in [">1.250<", ">3.490<", ">0.5000<", ">0.7500<", ">2.500<", ">cat<", ">9</td>"] {
        assert!(page.contains(part), "{part} is not on the page");
    }
    assert!(!page.contains("NaN") && !page.contains("<i>late"), "raw values on the page");
    // Every variable that a drawing uses has a colour in both schemes.
    let (light, dark) = page.split_once("prefers-color-scheme:dark").unwrap();
    for used in page.split("var(").skip(1).filter_map(|rest| rest.split_once(')')).map(|(name, _)| format!("{name}:")) {
        assert!(light.contains(&used) && dark.contains(&used), "{used} lacks a colour");
    }
}

#[test]
fn a_score_stands_beside_others_of_its_kind_in_the_report() {
    let row = |summary: Value| -> Vec<String> {
        let Value::Object(summary) = summary else { unreachable!() };
        let page = report_of(&run_of_four_steps(), &[], &Event::Summary(summary));
        let scores = page.split_once("Scores on the test part").unwrap().1.split_once("</table>").unwrap().0.to_owned();
        scores
            .split("</tr>")
            .map(|row| row.split('<').filter_map(|part| part.split_once('>')).map(|(_, text)| text.trim()).collect())
            .collect()
    };
    let classes: Vec<String> = row(json!({"test_loss": 0.5, "accuracy": 0.875, "baselines": {"majority": 0.25}}));
    assert_eq!(classes[..3], ["accuracy", "model0.8750", "majority0.2500"]);
    let notes: Vec<String> = row(json!({"test_loss": 0.5, "accuracy": 0.875, "baselines": {"frequency": 0.75}}));
    assert_eq!(notes[..3], ["nats a token", "model0.5000", "frequency0.7500"]);
}

#[test]
fn the_report_of_a_run_that_failed_says_why_and_keeps_the_curves() {
    let page = report_of(&run_of_four_steps(), &[], &Event::Error { message: "the loss at step 5 is not finite".into() });
    assert!(page.contains("the loss at step 5 is not finite") && page.contains("state failed"), "{page}");
    assert!(page.contains("<polyline"));
}

#[test]
fn a_report_that_cannot_be_written_is_a_warning_and_no_end() {
    let files = ReportFiles { page: "/nowhere/report.html".into(), config: "/nowhere/config.toml".into(), metrics: "/nowhere/m".into() };
    let out = Shared::default();
    let mut bus = Bus::new(vec![Box::new(Report::new(files)), Box::new(Json::to(Box::new(out.clone())))]);
    bus.send(&Event::Summary(Map::new()));
    assert!(out.text().contains("warning") && out.text().contains("/nowhere/report.html"), "{}", out.text());
}

#[test]
fn the_table_is_aligned_and_numbers_stand_to_the_right() {
    let row = |cells: [&str; 4]| cells.map(str::to_owned).to_vec();
    let table = Table::new("finished")
        .pairs("losses", [("train", "1.412"), ("validation", "1.580")])
        .pairs("nothing", Vec::<(String, String)>::new())
        .columns(
            "devices",
            &["worker", "device", "tokens/s", "waited"],
            vec![row(["0", "gpu:0 Größe", "41.2k", "0.10 s"]), row(["10", "cpu", "812", "-"]), vec!["11".into()]],
        )
        .pairs("files", [("run", "/tmp/run\u{1b}[2J")]);
    let expected = "\
finished

losses
  train       1.412
  validation  1.580

devices
  worker  device       tokens/s  waited
       0  gpu:0 Größe     41.2k  0.10 s
      10  cpu               812       -
      11

files
  run         /tmp/run [2J
";
    assert_eq!(table.to_string(), expected);
}

#[test]
fn numbers_are_written_as_people_read_them() {
    let cases = [
        (format::count(0), "0"),
        (format::count(999), "999"),
        (format::count(1_234_567), "1,234,567"),
        (format::number(1.62345, 4), "1.623"),
        (format::number(412.06, 4), "412.1"),
        (format::number(0.00001234, 3), "1.23e-5"),
        (format::number(f64::NAN, 3), "nan"),
        (format::number(f64::NEG_INFINITY, 3), "-inf"),
        (format::setting(0.002), "0.002"),
        (format::setting(1.5e-6), "1.5e-6"),
        (format::setting(1.0), "1"),
        (format::setting(100.0), "100"),
        (format::rate(41_234.5), "41.2k"),
        (format::rate(999.7), "1.00k"),
        (format::rate(812.4), "812"),
        (format::rate(3_050_000.0), "3.05M"),
        (format::rate(f64::NAN), "-"),
        (format::bytes(812), "812 B"),
        (format::bytes(4 << 20), "4.00 MiB"),
        (format::duration(0.42), "0.42 s"),
        (format::duration(59.97), "1 min 00 s"),
        (format::duration(130.0), "2 min 10 s"),
        (format::duration(3_599.9), "1 h 00 min"),
        (format::duration(11_100.0), "3 h 05 min"),
        (format::duration(f64::INFINITY), "-"),
    ];
    for (text, expected) in cases {
        assert_eq!(text, expected);
    }
}

#[test]
fn throughput_forgets_what_lies_before_its_window() {
    let start = Instant::now();
    let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
    let mut meter = Throughput::new(Duration::from_secs(10), start);
    assert_eq!(meter.per_second(), None);
    assert_eq!(meter.seconds_for(5), None);
    for i in 1..=1000 {
        meter.add(at(f64::from(i) * 0.1), 10);
    }
    let rate = meter.per_second().unwrap();
    assert!((rate - 100.0).abs() < 1e-6, "{rate}");
    for i in 1..=300 {
        meter.add(at(100.0 + f64::from(i) * 0.1), 30);
    }
    let rate = meter.per_second().unwrap();
    assert!((rate - 300.0).abs() < 1e-6, "{rate}");
    let left = meter.seconds_for(3000).unwrap();
    assert!((left - 10.0).abs() < 1e-6, "{left}");
}

#[test]
fn throughput_of_steps_slower_than_the_window_is_that_of_the_last_one() {
    let start = Instant::now();
    let mut meter = Throughput::new(Duration::from_secs(10), start);
    for i in 1..=3_u64 {
        meter.add(start + Duration::from_secs(60 * i), 120 * i);
    }
    let rate = meter.per_second().unwrap();
    assert!((rate - 6.0).abs() < 1e-9, "{rate}");
}

/// Checks that a plot has left exactly its two files, and hands back the SVG's text.
fn plot_files(folder: &Path, stem: &str, title: &str) -> String {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.trim_start_matches(".").starts_with(&format!("{stem}.")))
        .collect();
    names.sort();
    assert_eq!(names, [format!("{stem}.png"), format!("{stem}.svg")]);
    let png = fs::read(folder.join(format!("{stem}.png"))).unwrap();
    assert_eq!(png[..8], *b"\x89PNG\r\n\x1a\n", "{stem}");
    assert_eq!(png[12..24], *b"IHDR\x00\x00\x04\xB0\x00\x00\x02\xBC", "{stem}: 1200 x 700");
    assert_eq!(png[png.len() - 8..png.len() - 4], *b"IEND", "{stem}");
    let svg = fs::read_to_string(folder.join(format!("{stem}.svg"))).unwrap();
    assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"), "{stem}");
    assert!(svg.contains(title), "{stem}: no {title:?}");
    assert!(!svg.contains("NaN") && !svg.contains("inf\""), "{stem}");
    svg
}

type Points = Vec<(f64, f64)>;

#[test]
fn a_loss_curve_is_drawn_of_whatever_there_is() {
    let folder = tempfile::tempdir().unwrap();
    let points = |values: &[f64]| -> Points { values.iter().enumerate().map(|(i, &v)| ((i + 1) as f64, v)).collect() };
    let huge: Vec<f64> = (0..5000).map(|i| 5.0 / (1.0 + f64::from(i))).collect();
    let cases: Vec<(&str, Vec<Points>)> = vec![
        ("none", vec![]),
        ("empty", vec![vec![]]),
        ("one", vec![vec![(300.0, 1.5)]]),
        ("two-equal-steps", vec![vec![(3.0, 1.5), (3.0, 1.6)]]),
        ("constant", vec![points(&[2.0; 10])]),
        ("zero", vec![points(&[0.0; 10])]),
        ("negative", vec![points(&[-1.0, -2.0, 5.0])]),
        ("not-finite", vec![points(&[4.0, f64::NAN, 3.0, f64::INFINITY, 2.0, f64::NEG_INFINITY])]),
        ("all-nan", vec![points(&[f64::NAN; 100])]),
        ("nan-step", vec![vec![(f64::NAN, 1.0), (2.0, 1.0)]]),
        ("log", vec![points(&huge), points(&[3.0, 0.01])]),
        ("extreme", vec![points(&[1e-300, 1e90, -1e90, f64::MAX, f64::MIN])]),
        ("extreme-log", vec![points(&[f64::MIN_POSITIVE, 1e99])]),
        ("close", vec![points(&[1.0, 1.0 + f64::EPSILON])]),
        ("a.b", vec![points(&[2.0, 1.0])]),
    ];
    for (stem, series) in cases {
        let has_points = series.iter().flatten().any(|(x, y)| x.is_finite() && y.is_finite());
        let series: Vec<Series> = series.into_iter().map(|points| Series { name: format!("{stem} series"), points }).collect();
        plot::loss_curve(&folder.path().join(stem), &series, "Loss <of> a run", "nats a token")
            .unwrap_or_else(|error| panic!("{stem}: {error:#}"));
        let svg = plot_files(folder.path(), stem, "Loss &lt;of&gt; a run").replace("\n", "");
        assert_eq!(svg.contains(&format!("{stem} series")), has_points, "{stem}: a legend where there is a curve");
        assert_eq!(svg.contains("no data"), !has_points, "{stem}");
    }
}

#[test]
fn a_curve_over_a_wide_range_gets_decades_and_one_over_a_narrow_range_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let draw = |stem: &str, last: f64| {
        let series = [Series { name: "train".into(), points: vec![(1.0, 10.0), (2.0, last)] }];
        plot::loss_curve(&folder.path().join(stem), &series, "t", "y").unwrap();
        plot_files(folder.path(), stem, "t")
    };
    let has = |svg: &str, label: &str| svg.lines().any(|line| line == label);
    let wide = draw("wide", 0.001);
    for label in ["0.001", "0.01", "0.1", "1", "10"] {
        assert!(has(&wide, label), "{label}");
    }
    let narrow = draw("narrow", 1.0);
    assert!(has(&narrow, "2") && has(&narrow, "4") && has(&narrow, "8"));
}

#[test]
fn a_forecast_is_drawn_of_whatever_there_is() {
    let folder = tempfile::tempdir().unwrap();
    let texts = |times: &[&str]| Times::Text(times.iter().map(|&time| time.to_owned()).collect());
    let nan = f64::NAN;
    let cases = [
        ("dates", texts(&["2020-01-05", "2020-01-12", "2020-01-19"]), vec![1.0, 2.0, 3.0], vec![nan, 2.5, nan], "2020-01-05"),
        ("years", texts(&["1990-01-01", "2000-01-01", "2010-01-01"]), vec![1.0, 2.0, 3.0], vec![1.0, 2.5, 3.0], "2000"),
        ("months", texts(&["2020-01", "2020-02", "2020-09"]), vec![1.0, 2.0, 3.0], vec![1.0, 2.5, 3.0], "2020-05"),
        ("hours", texts(&["2020-01-05 00:00", "2020-01-05T12:00:00"]), vec![1.0, 2.0], vec![1.0, 2.5], "01-05 06:00"),
        ("words", texts(&["spring", "summer", "autumn"]), vec![1.0, 2.0, 3.0], vec![1.0, 2.5, 3.0], "summer"),
        ("decimal-years", Times::Numbers(vec![1999.5, 2000.0, 2000.5]), vec![1.0, 2.0, 3.0], vec![1.0, 2.5, 3.0], "2000.0"),
        ("no-times", texts(&[]), vec![1.0], vec![1.0], "no data"),
        ("one", texts(&["2020-01-05"]), vec![370.0], vec![371.0], "truth"),
        ("one-number", Times::Numbers(vec![0.0]), vec![0.0], vec![0.0], "truth"),
        ("all-nan", Times::Numbers(vec![1.0, 2.0]), vec![nan, nan], vec![f64::INFINITY, nan], "no data"),
        ("nan-times", Times::Numbers(vec![nan, f64::INFINITY]), vec![1.0, 2.0], vec![1.0, 2.0], "no data"),
        ("shorter", Times::Numbers(vec![1.0, 2.0, 3.0]), vec![1.0], vec![], "truth"),
        ("same-time", Times::Numbers(vec![2.0, 2.0]), vec![1.0, 1.0], vec![2.0, 1.0], "forecast"),
    ];
    for (stem, times, truth, forecast, expected) in cases {
        let plot = ForecastPlot {
            title: "CO₂ & more\u{0}".into(),
            unit: "ppm".into(),
            times,
            truth,
            forecast,
            baseline: Some(("last value".into(), vec![1.0, nan])),
        };
        plot::forecast(&folder.path().join(stem), &plot).unwrap_or_else(|error| panic!("{stem}: {error:#}"));
        let svg = plot_files(folder.path(), stem, "CO₂ &amp; more");
        // The naive forecast has a value wherever the first time is one, so "no data" is only there without any time.
        let expected = if stem == "all-nan" { "last value" } else { expected };
        assert!(svg.lines().any(|line| line == expected), "{stem}: no {expected:?}");
    }
}

#[test]
fn a_plot_in_a_folder_that_is_missing_is_an_error_that_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let stem = folder.path().join("gone").join("loss");
    let error = plot::loss_curve(&stem, &[], "t", "y").expect_err("the folder is missing");
    assert!(format!("{error:#}").contains("loss.svg"), "{error:#}");
}

#[test]
fn a_plot_replaces_the_one_before() {
    let folder = tempfile::tempdir().unwrap();
    for title in ["first title", "second title"] {
        plot::loss_curve(&folder.path().join("loss"), &[], title, "y").unwrap();
    }
    assert!(!plot_files(folder.path(), "loss", "second title").contains("first title"));
}
