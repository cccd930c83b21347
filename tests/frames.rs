//! Sequences whose every step is a term: classes of steps, frames of notes; and classes that weigh unlike, classes that are not known.

use std::path::{Path, PathBuf};

use carrousel::backend::open;
use carrousel::data::sequences::{ADDING, ClassWeights, Goal, LabelSpec, Labelled, Sequences, SequencesOptions};
use carrousel::data::series::{Missing, Part};
use carrousel::data::source::{Source, Sources};
use carrousel::data::split::Split;
use carrousel::data::text::Encoding;
use carrousel::data::vocab::Level;
use carrousel::data::{DataError, Input, Target};
use carrousel::infer::classify::classify;
use carrousel::infer::session::Session;
use carrousel::rng::{Purpose, StepKey, Stream};
use carrousel::store::Which;
use carrousel::store::config::{RunConfig, Task};

use crate::adapters;
use crate::runs::{config, train};

fn options(goal: Goal) -> SequencesOptions {
    let is_tags = goal == Goal::Tags;
    SequencesOptions {
        goal,
        sequence: is_tags.then(|| "id".into()),
        label: is_tags.then(|| "tag".into()),
        features: Vec::new(),
        text: None,
        missing: Missing::Fill,
        level: Level::Char,
        encoding: Encoding::Utf8,
        vocab_limit: None,
        class_weights: None,
        notes: 8,
        split: Split { train: 1.0, valid: 0.0, test: 0.0 },
        seed: 1,
    }
}

fn whole(name: &str, text: &str, options: &SequencesOptions) -> Result<Sequences, DataError> {
    Sequences::from_sources(Sources::Whole(vec![Source::from_bytes(name, text.as_bytes())]), options)
}

#[test]
fn a_piece_gives_each_frame_and_as_target_the_one_after() {
    let sequences = whole("x.txt", "1,3 - 7,0\n\n2 2,2 - 4\n", &options(Goal::Frames)).unwrap();
    assert_eq!((sequences.len(), sequences.length(0), sequences.length(1)), (2, 2, 3));
    assert_eq!((sequences.next_frame(0, 0), sequences.next_frame(0, 1), sequences.next_frame(1, 0)), (&[][..], &[0, 7][..], &[2][..]));
    let batch = sequences.batch_of(&[1, 0]);
    let (Input::Values { values, n_features: 8 }, Target::Notes { values: targets, n_notes: 8 }) = (&batch.input, &batch.target) else {
        panic!("{batch:?}")
    };
    let frame =
        |values: &[f32], t: usize, row: usize| -> Vec<usize> { (0..8).filter(|note| values[(t * 2 + row) * 8 + note] == 1.0).collect() };
    assert_eq!((frame(values, 0, 1), frame(targets, 0, 1), frame(targets, 1, 1)), (vec![1, 3], vec![], vec![0, 7]));
    assert_eq!((frame(values, 2, 0), frame(targets, 2, 0)), (vec![], vec![4]));
    // Behind the end of the shorter piece nothing counts.
    assert_eq!((batch.weights.as_slice(), batch.weight, batch.n_tokens), (&[1.0, 1.0, 1.0, 1.0, 1.0, 0.0][..], 5.0, 5));
    let LabelSpec::Frames(frequency) = &sequences.spec().label else { panic!("frames") };
    assert_eq!((frequency[0], frequency[2], frequency[1]), (0.2, 0.2, 0.0));
}

#[test]
fn frames_that_are_none_are_refused_with_the_line_and_the_remedy() {
    let refused = |text: &str| whole("x.txt", text, &options(Goal::Frames)).unwrap_err().to_string();
    for (text, parts) in [
        ("1 2\n1 8\n", &["line 2", "note 8", "0 to 7", "--notes"][..]),
        ("1 2\n1 a,2\n", &["line 2", "'a'", "commas"]),
        ("1,,2 3\n", &["line 1", "''"]),
        ("1,2\n", &["line 1", "one frame"]),
        ("-1 2\n", &["line 1", "'-1'"]),
        ("\n\n", &["empty"]),
    ] {
        let error = refused(text);
        assert!(parts.iter().all(|part| error.contains(part)), "{text:?}: {error}");
    }
}

#[test]
fn every_row_of_a_table_has_its_own_tag() {
    let csv = "id,x,tag\na,1,low\na,5,high\nb,2,low\na,6,high\n";
    let sequences = whole("x.csv", csv, &options(Goal::Tags)).unwrap();
    assert_eq!((sequences.len(), sequences.length(0), sequences.length(1)), (2, 3, 1));
    let LabelSpec::Tags(classes) = &sequences.spec().label else { panic!("tags") };
    assert_eq!(classes.iter().map(|c| (c.name.as_str(), c.count)).collect::<Vec<_>>(), [("high", 2), ("low", 2)]);
    assert_eq!((0..3).map(|t| sequences.tag(0, t)).collect::<Vec<_>>(), [Some(1), Some(0), Some(0)]);
    let batch = sequences.batch_of(&[0, 1]);
    assert_eq!(batch.target, Target::Tokens(vec![1, 1, 0, 0, 0, 0]));
    assert_eq!(batch.weights, [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]);
    let error = whole("x.csv", csv, &SequencesOptions { sequence: None, label: None, ..options(Goal::Tags) }).unwrap_err().to_string();
    assert!(error.contains("--sequence") && error.contains("--label"), "{error}");
}

#[test]
fn balanced_classes_weigh_as_much_as_they_are_many() {
    let csv = "id,x,tag\na,1,low\na,5,high\na,6,high\na,7,high\n";
    let of = |weights: ClassWeights| whole("x.csv", csv, &SequencesOptions { class_weights: Some(weights), ..options(Goal::Tags) });
    let balanced = of(ClassWeights::Balanced).unwrap().batch_of(&[0]);
    assert_eq!(balanced.weights, [2.0, 4.0 / 6.0, 4.0 / 6.0, 4.0 / 6.0]);
    assert!((balanced.weight - 4.0).abs() < 1e-6);
    assert_eq!(of("0.5,3".parse().unwrap()).unwrap().batch_of(&[0]).weights, [3.0, 0.5, 0.5, 0.5]);
    let error = of("1,2,3".parse().unwrap()).unwrap_err().to_string();
    assert!(error.contains("3 weights for 2 classes") && error.contains("high, low"), "{error}");
    for wrong in ["", "0,0", "1,x", "-1,2", "inf,1"] {
        assert!(wrong.parse::<ClassWeights>().is_err(), "{wrong}");
    }
}

#[test]
fn the_adding_problem_is_that_of_the_paper() {
    let sequences = Sequences::adding(100, 7, [500, 20, 30]).unwrap();
    assert_eq!([Part::Train, Part::Valid, Part::Test].map(|part| sequences.of_part(part).len()), [500, 20, 30]);
    assert_eq!(ADDING, [74_000, 256, 2_560]);
    let mut firsts = 0;
    for i in 0..550 {
        let batch = sequences.batch_of(&[i]);
        let (Input::Values { values, n_features: 2 }, Target::Values { values: label, .. }) = (batch.input, batch.target) else { panic!() };
        let (n, mark) = (batch.n_steps, |t: usize| values[2 * t + 1]);
        assert!((100..=110).contains(&n), "{n}");
        assert_eq!((mark(0) == 1.0 || mark(0) == -1.0, mark(n - 1)), (true, -1.0));
        assert!(values.iter().step_by(2).all(|x| (-1.0..=1.0).contains(x)));
        let marked: Vec<usize> = (0..n).filter(|&t| mark(t) == 1.0).collect();
        // The first step is marked in one of ten sequences; then its number does not count, and its mark stays -1.
        firsts += usize::from(marked.len() == 1);
        assert!(marked.len() <= 2 && marked.iter().all(|&t| t < 49) && (marked.iter().any(|&t| t < 10) || marked.len() == 1), "{marked:?}");
        let sum: f64 = marked.iter().map(|&t| f64::from(values[2 * t])).sum();
        assert!((f64::from(label[0]) - (0.5 + sum / 4.0)).abs() < 1e-6);
    }
    assert!((20..=100).contains(&firsts), "{firsts} of 550");
    let others = Sequences::adding(100, 8, [1, 0, 0]).unwrap();
    assert_ne!(others.batch_of(&[0]), sequences.batch_of(&[0]));
}

/// Sequences of numbers of which each step's tag says whether the sum so far is above zero.
fn sums(dir: &Path, n: usize) -> PathBuf {
    let mut random = Stream::new(StepKey::new(5, 0), Purpose::Test, 0, 0);
    let mut csv = "id,x,tag\n".to_owned();
    for i in 0..n {
        let mut sum = 0.0;
        for _ in 0..4 + random.below(9) {
            let x = random.normal();
            sum += x;
            csv.push_str(&format!("s{i},{x:.4},{}\n", if sum > 0.0 { "above" } else { "below" }));
        }
    }
    let path = dir.join("sums.csv");
    std::fs::write(&path, csv).unwrap();
    path
}

fn on_sums(dir: &Path) -> RunConfig {
    let mut config = config(Task::Tag, &[&sums(dir, 200)]);
    (config.sequence, config.label) = (Some("id".into()), Some("tag".into()));
    config.split = Split { train: 0.7, valid: 0.1, test: 0.2 };
    (config.batch_size, config.eval_batch_size, config.optimizer.lr) = (10, 7, 1e-2);
    config
}

#[test]
fn the_tag_of_each_step_is_learnt_and_told_of_data_without_tags() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = on_sums(dir.path());
    config.max_steps = Some(250);
    let run = dir.path().join("run");
    let summary = train(&config, &run, false).outcome.unwrap().summary;
    let (accuracy, majority) = (summary["accuracy"].as_f64().unwrap(), summary["baselines"]["majority"].as_f64().unwrap());
    assert!(accuracy > 0.9 && majority < 0.7 && summary["macro_f1"].as_f64().unwrap() > 0.9, "{accuracy} beside {majority}");
    let new = dir.path().join("new.csv");
    std::fs::write(&new, "id,x\nnew,3\nnew,0.1\nnew,-9\n").unwrap();
    let mut session = Session::open(&run, Which::Selected, open::cpu(1).unwrap()).unwrap();
    let table = dir.path().join("said.csv");
    let found = classify(&mut session, &[new.display().to_string()], Some(&table)).unwrap();
    let said: Vec<(String, u64, String)> = found["labels"]
        .as_array()
        .unwrap()
        .iter()
        .map(|label| (label["sequence"].as_str().unwrap().into(), label["step"].as_u64().unwrap(), label["class"].as_str().unwrap().into()))
        .collect();
    assert_eq!(said, [("new".into(), 1, "above".into()), ("new".into(), 2, "above".into()), ("new".into(), 3, "below".into())]);
    assert_eq!((found["scored"].as_u64(), found.get("accuracy")), (Some(0), None));
    let table = std::fs::read_to_string(table).unwrap();
    assert!(table.starts_with("sequence,step,class,truth,above,below\nnew,1,above,,"), "{table}");
    // Of data with tags they are counted.
    let found = classify(&mut session, &config.data, None).unwrap();
    assert!(found["accuracy"].as_f64().unwrap() > 0.9 && found["scored"].as_u64().unwrap() > 1000);
}

/// Pieces in which a note is followed by the next one, and by a fifth above it.
fn scales(dir: &Path, n: usize) -> PathBuf {
    let mut random = Stream::new(StepKey::new(6, 0), Purpose::Test, 0, 0);
    let mut text = String::new();
    for _ in 0..n {
        let first = random.below(12);
        let frames = (0..5 + random.below(12)).map(|t| format!("{},{}", (first + t) % 12, (first + t + 7) % 12));
        text += &(frames.collect::<Vec<_>>().join(" ") + "\n");
    }
    let path = dir.join("scales.txt");
    std::fs::write(&path, text).unwrap();
    path
}

fn on_scales(dir: &Path) -> RunConfig {
    let mut config = config(Task::Frames, &[&scales(dir, 120)]);
    config.split = Split { train: 0.7, valid: 0.1, test: 0.2 };
    (config.notes, config.batch_size, config.eval_batch_size, config.optimizer.lr) = (Some(12), 6, 5, 2e-2);
    config
}

#[test]
fn the_next_frame_is_learnt_and_beats_how_often_notes_sound() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = on_scales(dir.path());
    config.max_steps = Some(250);
    let summary = train(&config, &dir.path().join("run"), false).outcome.unwrap().summary;
    let (loss, frequency) = (summary["test_loss"].as_f64().unwrap(), summary["baselines"]["frequency"].as_f64().unwrap());
    // Two of twelve notes, each as often as another: -2 ln(1/6) - 10 ln(5/6).
    assert!((frequency - 5.4).abs() < 0.2, "{frequency}");
    assert!(loss < 0.1 * frequency, "{loss} beside {frequency}");
    assert!(summary["accuracy"].as_f64().unwrap() > 0.95 && summary["macro_f1"].as_f64().unwrap() > 0.95, "{summary:?}");
}

#[test]
fn steps_of_sequences_are_scored_alike_on_every_mixture_of_devices() {
    let dir = tempfile::tempdir().unwrap();
    let mut mixtures = vec![("cpu:1*3", "7:2:1"), ("cpu:1*2", "0:1")];
    if !adapters::gpus().is_empty() {
        mixtures.extend([("gpu:0", ""), ("gpu:0,cpu:1", "1:2")]);
    }
    for mut config in [on_sums(dir.path()), on_scales(dir.path())] {
        (config.max_steps, config.layers, config.lstm.output_dropout, config.lstm.input_dropout) = (Some(12), 2, 0.3, 0.2);
        config.dropout = 0.2;
        let task = config.task.name();
        let scores = |config: &RunConfig, name: &str| {
            let ran = train(config, &dir.path().join(name), false);
            let summary = ran.outcome.unwrap_or_else(|e| panic!("{name}: {e:#}")).summary;
            let number = |key: &str| summary[key].as_f64().unwrap_or_else(|| panic!("{key} in {summary:?}"));
            (number("test_loss"), number("accuracy"), number("macro_f1"), ran.losses)
        };
        let one = scores(&config, task);
        for (i, &(devices, balance)) in mixtures.iter().enumerate() {
            (config.devices, config.balance, config.accumulate) = (devices.into(), balance.into(), 1 + i % 2);
            let found = scores(&config, &format!("{task}-{i}"));
            assert!((found.0 - one.0).abs() <= 1e-4 * one.0, "{task} on {devices}: {} against {}", found.0, one.0);
            // A logit next to zero may fall on its other side.
            assert!((found.1 - one.1).abs() < 0.01 && (found.2 - one.2).abs() < 0.01, "{task} on {devices}: {found:?} against {one:?}");
            for (a, b) in found.3.iter().zip(&one.3) {
                assert!((a - b).abs() <= 1e-4 * b, "{task} on {devices}: {a} against {b}");
            }
        }
    }
}

#[test]
fn lines_without_labels_are_told_but_not_trained_on() {
    let spec = whole("x.txt", "good\tab\nbad\tba\n", &options(Goal::Class)).unwrap().spec().clone();
    let source = |text: &str| vec![Source::from_bytes("new.txt", text.as_bytes())];
    let read = |labelled| Sequences::from_held_out(source("abab\nodd\tba\ngood\tb\n"), &spec, Encoding::Utf8, labelled);
    let new = read(Labelled::Some).unwrap();
    assert_eq!((0..3).map(|i| new.class(i)).collect::<Vec<_>>(), [None, None, Some(1)]);
    let batch = new.batch_of(&[0, 2]);
    assert_eq!((batch.weights, batch.target), (vec![0.0, 1.0], Target::Labels(vec![0, 1])));
    assert!(read(Labelled::All).unwrap_err().to_string().contains("tab"));
}
