//! Going on from another run, leaving tensors as they are, ending early; quantiles and their scores; looking inside.

use std::path::Path;

use carrousel::backend::open;
use carrousel::data::series::{Part, Relative};
use carrousel::data::split::Split;
use carrousel::infer::activations::{Looking, activations};
use carrousel::infer::evaluate::{Judged, by_level, evaluate};
use carrousel::infer::forecast::forecast;
use carrousel::infer::session::Session;
use carrousel::infer::task::Corpus;
use carrousel::model::config::Levels;
use carrousel::optim::Rule;
use carrousel::rng::{Purpose, StepKey, Stream};
use carrousel::store::checkpoint::NamedTensor;
use carrousel::store::config::{RunConfig, Task};
use carrousel::store::{RunFolder, Which};
use carrousel::usage::UsageError;

use crate::runs::{config, text, train};

fn tensors(run: &Path) -> Vec<NamedTensor> {
    RunFolder::read(run).unwrap().load(Which::Last).unwrap().tensors
}

fn tensor(run: &Path, name: &str) -> Vec<f32> {
    tensors(run).into_iter().find(|tensor| tensor.name == name).unwrap_or_else(|| panic!("no {name}")).data
}

fn on_text(dir: &Path) -> RunConfig {
    let file = dir.join("a.txt");
    std::fs::write(&file, text(3000)).unwrap();
    config(Task::Lm, &[&file])
}

#[test]
fn a_frozen_tensor_keeps_its_bits_whatever_the_rule_and_the_devices() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = on_text(dir.path());
    (config.layers, config.max_steps) = (2, Some(6));
    let mut runs = vec![(Rule::Adamw, "cpu:1"), (Rule::Sgd, "cpu:1*3")];
    if !crate::adapters::gpus().is_empty() {
        // Unlike devices: the owner of a segment updates it.
        runs.push((Rule::Adam, "gpu:0,cpu:1"));
    }
    for (i, (rule, devices)) in runs.into_iter().enumerate() {
        config.optimizer.rule = rule;
        (config.optimizer.weight_decay, config.optimizer.l1) = (0.1, 0.01);
        config.optimizer.momentum = if rule == Rule::Sgd { 0.5 } else { 0.0 };
        config.devices = devices.into();
        let run = |name: &str, config: &RunConfig| {
            let out = dir.path().join(format!("{name}-{i}"));
            train(config, &out, false).outcome.unwrap_or_else(|e| panic!("{devices}: {e:#}"));
            out
        };
        let started = run(
            "started",
            &RunConfig {
                max_steps: Some(1),
                optimizer: carrousel::optim::OptimizerConfig { lr: 1e-30, ..config.optimizer },
                freeze: vec!["lstm.*".into()],
                ..config.clone()
            },
        );
        let frozen = run("frozen", &RunConfig { freeze: vec!["lstm.*_l0".into(), "embedding.*".into()], ..config.clone() });
        for tensor_now in tensors(&frozen).into_iter().filter(|t| t.name.starts_with("lstm.") || t.name.starts_with("embedding.")) {
            let before = tensor(&started, &tensor_now.name);
            let same = tensor_now.data.iter().zip(&before).all(|(a, b)| a.to_bits() == b.to_bits());
            let expected = tensor_now.name.ends_with("_l0");
            if tensor_now.name.starts_with("lstm.") {
                assert_eq!(same, expected, "{} with {rule:?} on {devices}", tensor_now.name);
            }
        }
        let free = run("free", &config);
        assert_ne!(tensor(&free, "lstm.weight_hh_l0"), tensor(&frozen, "lstm.weight_hh_l0"));
    }
    for (pattern, part) in [("lstm.*_l7", "lstm.weight_ih_l0"), ("*", "nothing to train")] {
        let refused = train(&RunConfig { freeze: vec![pattern.into()], ..config.clone() }, &dir.path().join("no"), false);
        let error = refused.outcome.err().expect("refused");
        assert!(error.is::<UsageError>() && format!("{error:#}").contains(part), "{error:#}");
    }
    assert!(!dir.path().join("no").exists());
}

#[test]
fn a_run_begins_with_what_another_has_learnt_and_says_what_starts_afresh() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = on_text(dir.path());
    config.max_steps = Some(120);
    let first = dir.path().join("first");
    let learnt = train(&config, &first, false);
    // Another text with fewer symbols is read by the first one's vocabulary, so that the embedding fits.
    let other = dir.path().join("b.txt");
    std::fs::write(&other, text(2000).replace("ring", "wing").replace('w', "t")).unwrap();
    let mut tuned = RunConfig { data: vec![other.display().to_string()], init_from: Some(first.display().to_string()), ..config.clone() };
    tuned.max_steps = Some(1);
    let warm = train(&tuned, &dir.path().join("tuned"), false);
    let cold = train(&RunConfig { init_from: None, ..tuned.clone() }, &dir.path().join("cold"), false);
    assert!(warm.losses[0] < 0.8 * cold.losses[0], "{} against {} without", warm.losses[0], cold.losses[0]);
    assert!(warm.losses[0] < learnt.losses[0]);
    // Resumed, it goes on from its own checkpoint.
    tuned.max_steps = Some(3);
    train(&tuned, &dir.path().join("tuned"), true).outcome.unwrap();
    // Other layers do not fit.
    let wide = RunConfig { hidden: 24.into(), embedding: 24, ..tuned.clone() };
    let error = format!("{:#}", train(&wide, &dir.path().join("wide"), false).outcome.err().expect("refused"));
    assert!(error.contains("lstm.weight_ih_l0") && error.contains("[64, 16]") && error.contains("[96, 24]"), "{error}");
    // Lines of labels have other symbols and another head: the recurrent layer alone goes over.
    let lines = dir.path().join("lines.txt");
    let line = |i: usize| format!("{}\t{}\n", i % 2, if i.is_multiple_of(2) { "xyz" } else { "zyx" });
    std::fs::write(&lines, (0..40).map(line).collect::<String>()).unwrap();
    let mut labelled = RunConfig { task: Task::Classify, data: vec![lines.display().to_string()], ..tuned };
    (labelled.split, labelled.max_steps) = (Split { train: 0.6, valid: 0.2, test: 0.2 }, Some(1));
    labelled.optimizer.lr = 1e-30;
    let out = dir.path().join("labelled");
    let ran = train(&labelled, &out, false);
    ran.outcome.unwrap();
    let warned = ran.events.iter().any(|event| format!("{event:?}").contains("embedding.weight, head.weight, head.bias"));
    assert!(warned, "{:?}", ran.events);
    let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
    assert!(near(&tensor(&out, "lstm.weight_hh_l0"), &tensor(&first, "lstm.weight_hh_l0")));
}

#[test]
fn a_run_ends_once_so_many_evaluations_found_nothing_better_and_stays_ended() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = on_text(dir.path());
    // A rate at which nothing gets better after a while.
    (config.max_steps, config.eval_every, config.early_stop, config.optimizer.lr) = (Some(600), 5, Some(3), 0.3);
    let out = dir.path().join("run");
    let ran = train(&config, &out, false);
    let summary = ran.outcome.unwrap().summary;
    let steps = summary["steps"].as_u64().unwrap();
    assert!(steps < 600 && summary["status"] == "finished", "{steps}");
    let again = train(&config, &out, true);
    assert_eq!((again.losses.len(), again.outcome.unwrap().summary["steps"].as_u64()), (0, Some(steps)));
}

/// A sine with noise that is wider where the sine is high.
fn noisy(dir: &Path) -> RunConfig {
    let mut random = Stream::new(StepKey::new(3, 0), Purpose::Test, 0, 0);
    let file = dir.join("noisy.csv");
    let value = |row: u32, random: &mut Stream| {
        let sine = (f64::from(row) * std::f64::consts::TAU / 24.0).sin();
        10.0 + 3.0 * sine + (1.2 + sine) * random.normal()
    };
    let rows: String = (0..1500).map(|row| format!("{row},{:.4}\n", value(row, &mut random))).collect();
    std::fs::write(&file, format!("row,height\n{rows}")).unwrap();
    let mut config = config(Task::Forecast, &[&file]);
    config.split = Split { train: 0.7, valid: 0.1, test: 0.2 };
    (config.relative, config.seq_len, config.horizon, config.batch_size) = (Relative::None, 24, 4, 32);
    config.quantiles = Some("0.1,0.5,0.9".parse().unwrap());
    config
}

#[test]
fn quantiles_hold_as_many_values_as_they_say_and_are_handed_out_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = noisy(dir.path());
    (config.max_steps, config.optimizer.lr, config.eval_batch_size) = (Some(350), 1e-2, 50);
    let run = dir.path().join("run");
    let summary = train(&config, &run, false).outcome.unwrap().summary;
    let quantiles = &summary["quantiles"];
    let below: Vec<f64> = quantiles["levels"].as_array().unwrap().iter().map(|level| level["below"].as_f64().unwrap()).collect();
    assert!((0.03..0.25).contains(&below[0]) && (0.35..0.65).contains(&below[1]) && (0.75..0.97).contains(&below[2]), "{below:?}");
    let (coverage, nominal) = (quantiles["coverage"].as_f64().unwrap(), quantiles["nominal"].as_f64().unwrap());
    assert!((nominal - 0.8).abs() < 1e-9 && (coverage - nominal).abs() < 0.13, "{coverage} instead of {nominal}");
    // The values between the quantiles are the median's, so that their error is one like the naive forecasts'.
    assert!(summary["mse"].as_f64().unwrap() < summary["baselines"]["last"].as_f64().unwrap());
    let mut session = Session::open(&run, Which::Selected, open::cpu(1).unwrap()).unwrap();
    let beyond = forecast(&mut session, &[]).unwrap();
    assert_eq!((beyond.values.len(), beyond.quantiles.len()), (4, 3));
    for h in 0..4 {
        let at: Vec<f64> = beyond.quantiles.iter().map(|(_, values)| values[h]).collect();
        assert!(at[0] <= at[1] && at[1] <= at[2] && at[1] == beyond.values[h].value, "{at:?}");
    }
}

#[test]
fn quantiles_that_cross_are_put_in_order_value_by_value() {
    let levels: Levels = "0.1,0.5,0.9".parse().unwrap();
    assert_eq!(by_level(&[3.0, 1.0, 2.0, -1.0, 0.0, 5.0], levels), [vec![1.0, -1.0], vec![2.0, 0.0], vec![3.0, 5.0]]);
    assert_eq!((levels.middle(), "0.25,0.975".parse::<Levels>().unwrap().middle()), (1, 0));
    for wrong in ["", "0", "1", "0.5,0.5", "0.9,0.1", "0.12345", "x"] {
        assert!(wrong.parse::<Levels>().is_err(), "{wrong}");
    }
}

#[test]
fn a_rolling_origin_takes_every_nth_window_and_tells_errors_by_step() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = noisy(dir.path());
    (config.max_steps, config.quantiles, config.eval_batch_size) = (Some(30), None, 9);
    let run = dir.path().join("run");
    train(&config, &run, false).outcome.unwrap();
    let mut session = Session::open(&run, Which::Selected, open::cpu(1).unwrap()).unwrap();
    let all = || Corpus::load(&config, Some(&session_spec(&run))).unwrap().eval_set(&config, Part::Test).unwrap().unwrap();
    let whole = evaluate(&all(), &mut session).unwrap();
    let rolling = evaluate(&all().rolling(&config, Part::Test, 7).unwrap(), &mut session).unwrap();
    let (Judged::Forecast(whole), Judged::Forecast(of)) = (&whole.judged, &rolling.judged) else { panic!("forecasts") };
    assert_eq!(of.origins, whole.origins.iter().copied().step_by(7).collect::<Vec<_>>());
    let by_step = rolling.by_step();
    let steps = by_step["height"]["last"].as_array().unwrap();
    assert_eq!((steps.len(), by_step["height"]["model"].as_array().unwrap().len()), (4, 4));
    // The last value is the worse a forecast the further ahead, over a part of the season.
    assert!(steps[3].as_f64() > steps[0].as_f64(), "{steps:?}");
    assert_eq!(of.baselines[0].1.n, 4 * of.origins.len() as u64);
}

fn session_spec(run: &Path) -> carrousel::infer::task::DataSpec {
    carrousel::infer::session::read_data(&RunFolder::read(run).unwrap()).unwrap().spec
}

#[test]
fn gates_and_cells_are_drawn_over_what_is_read_and_obey_the_equations() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = on_text(dir.path());
    (config.layers, config.max_steps) = (2, Some(10));
    let run = dir.path().join("run");
    train(&config, &run, false).outcome.unwrap();
    let mut session = Session::open(&run, Which::Selected, open::cpu(1).unwrap()).unwrap();
    let looking = |over: &str, layer: Option<usize>, units: &[usize]| Looking { over: over.into(), layer, units: units.to_vec() };
    let stem = dir.path().join("seen");
    let found = activations(&mut session, &looking("the wheel turns", Some(1), &[3, 16]), &stem).unwrap();
    assert_eq!(found["steps"].as_array().unwrap().len(), 15);
    let unit = &found["units"][0];
    let of = |key: &str| -> Vec<f64> { unit[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect() };
    let (c, i, f, g) = (of("c"), of("input"), of("forget"), of("cell"));
    let mut cell = 0.0;
    for t in 0..15 {
        cell = f[t] * cell + i[t] * g[t];
        assert!((c[t] - f64::tanh(cell)).abs() < 1e-5, "step {t}: {} instead of {}", c[t], f64::tanh(cell));
    }
    for extension in ["svg", "png"] {
        assert!(std::fs::metadata(stem.with_extension(extension)).unwrap().len() > 2000);
    }
    let svg = std::fs::read_to_string(stem.with_extension("svg")).unwrap();
    assert!(svg.contains("unit 3") && svg.contains("unit 16") && svg.contains("forget"), "{}", &svg[..500]);
    for (looking, part) in [
        (looking("a", Some(3), &[]), "layers 1 to 2"),
        (looking("a", None, &[17]), "units 1 to 16"),
        (looking("a", None, &[0]), "units 1 to 16"),
        (looking("", None, &[]), "no step"),
        (looking("Q", None, &[]), "'Q'"),
    ] {
        let error = format!("{:#}", activations(&mut session, &looking, &stem).unwrap_err());
        assert!(error.contains(part), "{error}");
    }
}
