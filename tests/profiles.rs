//! What `profile` measures is what it says, and traces tell what happened when.

use std::collections::BTreeMap;
use std::sync::Arc;

use carrousel::backend::gpu::adapters;
use carrousel::compress::Method;
use carrousel::infer::session::Replica;
use carrousel::kernels::{ALL, Sizes};
use carrousel::model::Words;
use carrousel::model::config::{Input, ModelConfig, Output};
use carrousel::model::init::{Init, initial};
use carrousel::observe::Trace;
use carrousel::rng::StepKey;
use carrousel::train::devices::{DeviceKind, Resolved};
use carrousel::train::group::{Group, GroupSpec, StepNumbers};
use carrousel::train::profile::kernels::{Asked, profile_kernels};
use carrousel::train::profile::layer::{LayerAlone, LayerSizes};
use carrousel::train::profile::{Lengths, Measured, Mode, Scaling, Workload, profile_step};
use carrousel::train::run::settle;
use serde_json::Value;

use crate::adapters::{devices, distinct_gpus};

#[test]
fn the_gradient_of_a_layer_alone_is_the_derivative_of_its_outputs_sum() {
    let sizes = LayerSizes { n_steps: 5, n_rows: 3, n_inputs: 6, hidden: 20 };
    for device in devices() {
        let mut layer = LayerAlone::new(sizes, device.open()).expect("a layer");
        layer.step().expect("a step");
        let [of_bias, of_input] = layer.gradients().expect("gradients");
        assert!(of_bias.iter().any(|&g| g != 0.0), "no gradient of the weights on {device}");
        assert_eq!(of_input.len(), 5 * 3 * 6);
        for place in [0, 17, 40, 89] {
            const BY: f32 = 1e-2;
            let mut total = |by: f32| {
                layer.nudge(place, by).expect("an input");
                layer.step().expect("a step");
                layer.total().expect("outputs")
            };
            let (above, below) = (total(BY), total(-2.0 * BY));
            total(BY);
            let slope = (above - below) / (2.0 * f64::from(BY));
            let told = f64::from(of_input[place]);
            assert!((slope - told).abs() < 1e-3 + 1e-2 * slope.abs(), "input {place} on {device}: {told}, but the sum changes by {slope}");
        }
    }
}

fn characters(hidden: usize) -> ModelConfig {
    ModelConfig {
        input: Input::Tokens { vocabulary: 11, width: 20 },
        output: Output::Classes { n_classes: 11 },
        n_layers: 2,
        hidden: hidden.into(),
        dropout: 0.0,
        bias: true,
        tied: false,
        lstm: Default::default(),
    }
}

#[test]
fn a_network_asked_step_by_step_says_what_it_says_to_a_whole_sequence() {
    for device in devices() {
        for (n_rows, hidden) in [(1, 33), (1, 64), (3, 33)] {
            let config = characters(hidden);
            let params = initial(&config, &config.table(), Init::Uniform(0.4), None, 3);
            let mut replica = Replica::new(config, &params, device.open()).expect("a replica");
            let tokens: Vec<u32> = (0..30 * n_rows as u32).map(|i| i * i % 11).collect();
            let whole = replica.ask(Words::Tokens(&tokens), [30, n_rows], None, false).expect("outputs");
            let whole: Vec<Vec<f32>> = whole.rows().map(<[f32]>::to_vec).collect();
            assert_eq!((whole.len(), whole[0].len()), (30 * n_rows, 11));
            let mut state = Vec::new();
            for (t, tokens) in tokens.chunks(n_rows).enumerate() {
                let step = replica.ask(Words::Tokens(tokens), [1, n_rows], Some(&mut state), true).expect("outputs");
                for (row, want) in step.rows().zip(&whole[t * n_rows..]) {
                    let far = row.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(far < 2e-5, "step {t} of {n_rows} rows, {hidden} units on {device} is {far} from the whole sequence's");
                }
            }
        }
    }
}

fn cpu(threads: usize) -> Resolved {
    Resolved { spec: format!("cpu:{threads}"), kind: DeviceKind::Cpu { threads } }
}

fn rows<'a>(summary: &'a serde_json::Map<String, Value>, name: &str) -> &'a Vec<Value> {
    summary[name].as_array().expect("a list")
}

#[test]
fn every_kernel_is_measured_and_its_shares_are_its_speed_over_the_ceilings() {
    let sizes = Sizes { n_steps: 3, n_rows: 5, inputs: 16, hidden: 32, n_classes: 7 };
    let gpus = distinct_gpus().into_iter().map(|index| Resolved { spec: format!("gpu:{index}"), kind: DeviceKind::Gpu { index } });
    let on_cpu = profile_kernels(&Asked { kernels: Vec::new(), sizes: Some(sizes), autotunes: false }, &[cpu(1)]).expect("a measurement");
    let measured: Vec<&str> = rows(&on_cpu, "kernels").iter().map(|row| row["kernel"].as_str().expect("a name")).collect();
    for entry in ALL {
        assert!(measured.contains(&entry.name), "{} is not measured", entry.name);
    }
    let few = Asked { kernels: vec!["gemm".to_owned(), "scale".to_owned()], sizes: Some(sizes), autotunes: false };
    let gpus: Vec<Resolved> = gpus.collect();
    let on_gpus = profile_kernels(&few, &gpus).expect("a measurement");
    assert_eq!(rows(&on_gpus, "ceilings").len(), gpus.len());
    for summary in [on_cpu, on_gpus] {
        for row in rows(&summary, "kernels") {
            let best = rows(&summary, "ceilings").iter().find(|best| best["device"] == row["device"]).expect("the device's ceilings");
            let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("no number in {row}"));
            assert!(number(&row["us"]) > 0.0, "{row}");
            let shares = [("gb_per_second", "share_of_bandwidth"), ("gflops", "share_of_gflops")];
            for (speed, share) in shares.into_iter().filter(|(speed, _)| !row[speed].is_null()) {
                let ceiling = number(&best[speed]);
                assert!((number(&row[share]) * ceiling - number(&row[speed])).abs() < 1e-6 * number(&row[speed]), "{row} under {best}");
            }
            let is_gpu = row["device"].as_str().expect("a device").starts_with("gpu");
            let variant = row["variant"].as_str().expect("a variant");
            assert_eq!(variant.starts_with(row["kernel"].as_str().expect("a name")), is_gpu, "{row}");
        }
        let products = rows(&summary, "kernels").iter().filter(|row| row["kernel"] == "gemm");
        assert!(products.clone().count() > 0 || rows(&summary, "ceilings").is_empty());
        products.for_each(|row| assert!(row["gflops"].as_f64() > Some(0.0), "{row}"));
    }
}

#[test]
fn a_layer_beyond_an_adapters_limits_is_told_and_the_others_are_measured() {
    let adapters = adapters::list().expect("adapters");
    // The parameters take 2.3 GB, more than software adapters bind.
    for index in distinct_gpus().into_iter().filter(|&index| adapters[index].limits.max_binding_bytes < 2 << 30) {
        let gpu = Resolved { spec: format!("gpu:{index}"), kind: DeviceKind::Gpu { index } };
        let sizes = Sizes { n_steps: 1, n_rows: 1, inputs: 16, hidden: 12_000, n_classes: 3 };
        let asked = Asked { kernels: vec!["dropout".to_owned(), "scale".to_owned()], sizes: Some(sizes), autotunes: false };
        let summary = profile_kernels(&asked, &[gpu]).expect("a measurement");
        let [dropout, scale] = [0, 1].map(|i| &rows(&summary, "kernels")[i]);
        assert!(dropout["us"].as_f64() > Some(0.0), "{dropout}");
        assert!(scale["error"].as_str().is_some_and(|error| error.contains("MiB")), "{scale}");
    }
}

#[test]
fn inference_is_measured_by_the_time_step_beside_what_reading_the_weights_takes() {
    let mut workload = Workload::named("E").expect("the long layer");
    assert_eq!((workload.n_steps, workload.n_rows, workload.layer_alone), (1024, 16, true));
    (workload.n_steps, workload.n_rows) = (6, 2);
    (workload.model.input, workload.model.hidden) = (Input::Values { n_features: 12 }, 24.into());
    let measured = Measured {
        mode: Mode::Train,
        devices: "cpu:1",
        balance: "",
        accumulate: 1,
        compress: Method::None,
        autotunes: true,
        shard_optimizer: false,
        steps: 3,
        lengths: Lengths::Full,
        scaling: Scaling::Strong,
    };
    let number = |summary: &serde_json::Map<String, Value>, name: &str| summary[name].as_f64().unwrap_or_else(|| panic!("no {name}"));
    for (mode, steps_a_call) in [(Mode::Train, 6.0), (Mode::InferStep, 1.0), (Mode::InferSeq, 6.0)] {
        let summary = profile_step(&workload, Measured { mode, ..measured }).expect("a measurement");
        let per_call = number(&summary, "ms_per_step") * 1e3;
        assert!((per_call / steps_a_call - number(&summary, "us_per_time_step")).abs() < 1e-6 * per_call, "{mode:?}");
        assert!(
            rows(&summary, "kernels").iter().any(|row| row["kernel"].as_str().is_some_and(|name| name.starts_with("lstm"))),
            "{mode:?}"
        );
        if mode != Mode::Train {
            // Weights of h, [32, 128]; a step alone reads those of the input, [12, 128], and of the head, [4, 32], too.
            let floats = 32 * 128 + if mode == Mode::InferStep { 12 * 128 + 4 * 32 } else { 0 };
            assert_eq!(summary["weight_bytes_per_time_step"], 4 * floats, "{mode:?}");
            assert!(number(&summary, "floor_us_per_time_step") > 0.0);
        }
    }
}

#[test]
fn in_weak_scaling_each_worker_has_the_whole_batch_and_the_ring_says_what_could_not_be_hidden() {
    let mut workload = Workload::named("A").expect("a series");
    (workload.n_steps, workload.n_rows, workload.model.hidden) = (4, 6, 16.into());
    let number = |summary: &serde_json::Map<String, Value>, name: &str| summary[name].as_f64().unwrap_or_else(|| panic!("no {name}"));
    for (devices, scaling, n_rows) in [("cpu:1", Scaling::Weak, 6.0), ("cpu:1*3", Scaling::Strong, 6.0), ("cpu:1*3", Scaling::Weak, 18.0)] {
        let measured = Measured {
            mode: Mode::Train,
            devices,
            balance: "equal",
            accumulate: 1,
            compress: Method::None,
            autotunes: false,
            shard_optimizer: false,
            steps: 5,
            lengths: Lengths::Full,
            scaling,
        };
        let summary = profile_step(&workload, measured).expect("a measurement");
        let n_tokens = number(&summary, "tokens_per_second") * number(&summary, "ms_per_step") * 1e-3;
        assert!((n_tokens - 4.0 * n_rows).abs() < 1e-6, "{devices}, {scaling:?}: {n_tokens} tokens a step");
        let ratio = summary.get("ring_wait_over_unavoidable").and_then(Value::as_f64);
        assert!(if devices == "cpu:1" { ratio.is_none() } else { ratio > Some(0.0) }, "{devices}: {ratio:?}");
    }
}

/// One complete event of a trace.
#[derive(Clone, Debug)]
struct Span {
    name: String,
    category: String,
    from: f64,
    to: f64,
    args: Value,
}

/// The rows of a trace by name, each in order of time, outer spans before what they hold.
fn read_trace(path: &std::path::Path) -> BTreeMap<String, Vec<Span>> {
    let whole: Value = serde_json::from_slice(&std::fs::read(path).expect("a trace")).expect("JSON");
    let events = whole["traceEvents"].as_array().expect("events");
    let names = events.iter().filter(|e| e["ph"] == "M" && e["name"] == "thread_name");
    let names: BTreeMap<u64, String> =
        names.map(|e| (e["tid"].as_u64().expect("a row"), e["args"]["name"].as_str().expect("a name").to_owned())).collect();
    let mut rows: BTreeMap<String, Vec<Span>> = BTreeMap::new();
    for event in events.iter().filter(|e| e["ph"] == "X") {
        let text = |field: &str| event[field].as_str().expect("a text").to_owned();
        let (from, dur) = (event["ts"].as_f64().expect("a time"), event["dur"].as_f64().expect("a time"));
        let span = Span { name: text("name"), category: text("cat"), from, to: from + dur, args: event["args"].clone() };
        rows.entry(names[&event["tid"].as_u64().expect("a row")].clone()).or_default().push(span);
    }
    // Times are whole nanoseconds.
    let ns = |us: f64| (us * 1e3).round() as u64;
    rows.values_mut().for_each(|spans| spans.sort_by_key(|span| (ns(span.from), std::cmp::Reverse(ns(span.to)))));
    rows
}

/// Fails where two spans of a row overlap without one holding the other.
fn assert_nested(row: &str, spans: &[Span]) {
    const NS: f64 = 1.5e-3;
    let mut open: Vec<&Span> = Vec::new();
    for span in spans {
        open.retain(|outer| outer.to > span.from + NS);
        if let Some(outer) = open.last() {
            assert!(span.to <= outer.to + NS, "{row}: {span:?} ends after {outer:?}, in which it began");
        }
        open.push(span);
    }
}

/// Trains two steps of a small network under a trace.
fn trace_of(devices: &str) -> BTreeMap<String, Vec<Span>> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("trace.json");
    let trace = Trace::create(&path).expect("a trace");
    trace.watch(|| {
        let workload = Workload { model: characters(16), n_steps: 4, n_rows: 6, ..Workload::named("B").expect("characters") };
        let (resolved, balance, _) = settle(devices, "equal").expect("devices that exist");
        let spec = GroupSpec {
            model: workload.model.clone(),
            optimizer: workload.optimizer,
            accumulate: 1,
            compress: Method::None,
            shard_optimizer: false,
        };
        let mut group = Group::start(spec, &resolved, None).expect("workers");
        let params = initial(&workload.model, group.table(), Init::Uniform(0.1), None, 1);
        let zeros: Vec<Vec<f32>> = params.iter().map(|p| vec![0.0; p.len()]).collect();
        group.load(params, vec![zeros; workload.optimizer.states().len()]).expect("parameters");
        let batch = Arc::new(workload.batch(1));
        for step in 1..=2 {
            let numbers = StepNumbers { step, lr: 1e-3, key: StepKey::new(1, step), divisor: batch.weight };
            group.step(&batch, &balance.shares(batch.n_rows), None, numbers).expect("a step");
        }
        group.params_of(0).expect("the update is done");
    });
    assert_eq!(trace.finish().expect("a file"), 0);
    read_trace(&path)
}

fn named<'a>(spans: &'a [Span], name: &str) -> Vec<&'a Span> {
    spans.iter().filter(|span| span.name == name).collect()
}

/// What a row did between two moments, outermost spans first.
fn within<'a>(spans: &'a [Span], outer: &Span) -> Vec<&'a Span> {
    spans.iter().filter(|span| span.from >= outer.from && span.to <= outer.to + 1e-3 && span.name != outer.name).collect()
}

/// Fails unless `names` begin in this order among the spans.
fn assert_order(row: &str, spans: &[&Span], names: &[&str]) {
    let mut last = f64::NEG_INFINITY;
    for name in names {
        let span = spans.iter().find(|span| span.name == *name).unwrap_or_else(|| panic!("{row} has no {name} in {spans:?}"));
        assert!(span.from >= last, "{row}: {name} begins before what comes before it");
        last = span.from;
    }
}

#[test]
fn a_trace_holds_each_workers_phases_in_order_and_spans_that_nest() {
    let lists = ["cpu:1*2".to_owned()].into_iter().chain(distinct_gpus().first().map(|index| format!("gpu:{index},cpu:1")));
    for devices in lists {
        let rows = trace_of(&devices);
        rows.iter().for_each(|(row, spans)| assert_nested(row, spans));
        let workers: Vec<(&String, &Vec<Span>)> =
            rows.iter().filter(|(row, _)| row.starts_with("carrousel-0-") || row.starts_with("carrousel-1-")).collect();
        let (passes, workers): (Vec<_>, Vec<_>) = workers.into_iter().partition(|(row, _)| row.contains("passes"));
        assert_eq!(workers.len(), 2, "{devices}: {:?}", rows.keys());
        for (row, spans) in &workers {
            let computed = named(spans, "compute");
            assert_eq!(computed.len(), 2, "{row}");
            for (compute, update) in computed.iter().zip(named(spans, "update")) {
                let parts = within(spans, compute);
                assert_order(row, &parts, &["upload", "forward", "loss", "backward", "readback", "wait for ring", "receive"]);
                assert!(update.from >= compute.to, "{row} updates before it has computed");
            }
            if row.contains("cpu") {
                let kernels: Vec<&Span> = spans.iter().filter(|span| span.category == "launch").collect();
                assert!(kernels.iter().any(|span| span.name == "lstm_sweep_forward"), "{row} shows no kernel");
            }
        }
        let rings: Vec<(&String, &Vec<Span>)> = rows.iter().filter(|(row, _)| row.starts_with("carrousel-ring-")).collect();
        assert_eq!(rings.len(), 2, "{devices}");
        for (row, spans) in rings {
            let buckets = named(spans, "bucket");
            assert!(buckets.len() >= 4, "{row}: {spans:?}");
            for bucket in buckets {
                let parts = within(spans, bucket);
                assert_order(row, &parts, &["readback", "phase"]);
                let waits: Vec<&&Span> = parts.iter().filter(|span| span.name == "wait").collect();
                let other = 1 - u64::from(row.ends_with('1'));
                assert!(!waits.is_empty() && waits.iter().all(|wait| wait.args["for_rank"] == other), "{row}: {waits:?}");
            }
            assert_eq!(named(spans, "exchange").len(), 2, "{row}");
        }
        for (row, spans) in &passes {
            // On one time line: a GPU computes after its worker has begun to record, and is done before the worker has read the result.
            let worker = &rows[row.split(':').take(2).collect::<Vec<_>>().join(":").as_str()];
            let computed = named(worker, "compute");
            // Two clocks agree to the time that a submit takes at best.
            const SLACK: f64 = 500.0;
            for compute in &computed {
                let parts: Vec<&Span> = spans.iter().filter(|span| span.from >= compute.from - SLACK && span.from <= compute.to).collect();
                assert_order(row, &parts, &["forward", "loss", "backward"]);
                let fits = |span: &Span| span.to <= compute.to + SLACK && span.args["launches"].as_u64() > Some(0);
                parts.iter().for_each(|span| assert!(fits(span), "{row}: {span:?} within {compute:?}"));
            }
        }
        assert_eq!(passes.len(), usize::from(devices.contains("gpu")), "{devices}: {:?}", rows.keys());
    }
}

#[test]
fn a_thread_that_nobody_listens_to_silences_no_span() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("trace.json");
    let trace = Trace::create(&path).expect("a trace");
    let span = || tracing::debug_span!(target: "carrousel", "first met elsewhere").in_scope(|| ());
    trace.watch(|| {
        std::thread::spawn(span).join().expect("a thread");
        span();
    });
    assert_eq!(trace.finish().expect("a file"), 0);
    let rows = read_trace(&path);
    assert_eq!(rows.values().flatten().filter(|span| span.name == "first met elsewhere").count(), 1);
}

#[test]
fn work_that_nobody_traces_leaves_none() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("trace.json");
    let trace = Trace::create(&path).expect("a trace");
    tracing::debug_span!("outside").in_scope(|| ());
    assert_eq!(trace.finish().expect("a file"), 0);
    assert!(read_trace(&path).is_empty());
}
