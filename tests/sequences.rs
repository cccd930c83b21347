//! Labelled sequences from the file to the scores: what is read and refused, in which batches, and what a run of them comes to.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use carrousel::data::sequences::{Form, Goal, LabelSpec, Labelled, SequenceBatches, Sequences, SequencesOptions, StepSpec};
use carrousel::data::series::{Missing, Order, Part};
use carrousel::data::source::{Source, Sources};
use carrousel::data::split::Split;
use carrousel::data::text::Encoding;
use carrousel::data::vocab::Level;
use carrousel::data::{Batches, DataError, Input, Target};
use carrousel::model::config::Pooling;
use carrousel::observe::Event;
use carrousel::rng::{Purpose, StepKey, Stream};
use carrousel::store::config::{RunConfig, Task};
use carrousel::store::run_folder::{RunFolder, Which};
use carrousel::train::RunOptions;

use crate::adapters;
use crate::runs::{config, train, train_with};

fn options(goal: Goal) -> SequencesOptions {
    SequencesOptions {
        goal,
        sequence: None,
        label: None,
        features: Vec::new(),
        text: None,
        missing: Missing::Fill,
        level: Level::Char,
        encoding: Encoding::Utf8,
        vocab_limit: None,
        class_weights: None,
        notes: 88,
        split: Split { train: 1.0, valid: 0.0, test: 0.0 },
        seed: 1,
    }
}

/// Of a table with the columns `id` and `class`.
fn of_table() -> SequencesOptions {
    SequencesOptions { sequence: Some("id".into()), label: Some("class".into()), ..options(Goal::Class) }
}

fn source(name: &str, text: &str) -> Source {
    Source::from_bytes(name, text.as_bytes())
}

fn whole(name: &str, text: &str, options: &SequencesOptions) -> Result<Sequences, DataError> {
    Sequences::from_sources(Sources::Whole(vec![source(name, text)]), options)
}

/// The values of each sequence, rounded, and its class or number.
fn read(sequences: &Sequences, i: usize) -> (Vec<f32>, f32) {
    let batch = sequences.batch_of(&[i as u32]);
    let values = match batch.input {
        Input::Values { values, .. } => values,
        Input::Tokens(tokens) => tokens.into_iter().map(|token| token as f32).collect(),
    };
    let label = match batch.target {
        Target::Labels(labels) | Target::Tokens(labels) => labels[0] as f32,
        Target::Values { values, .. } | Target::Notes { values, .. } => values[0],
    };
    (values, label)
}

const TS: &str = "# a comment\n@problemName Test\n@timeStamps false\n@dimensions 2\n@classLabel true b a\n@data\n\
1,2,3:10,20,30:a\n5:?:b\n-1,-3:0,40:a\n";

#[test]
fn a_ts_file_gives_a_sequence_a_line_with_the_classes_of_its_header() {
    let sequences = whole("x.ts", TS, &options(Goal::Class)).unwrap();
    assert_eq!((sequences.len(), sequences.length(0), sequences.length(1), sequences.length(2)), (3, 3, 1, 2));
    let spec = sequences.spec();
    let LabelSpec::Classes(classes) = &spec.label else { panic!("classes") };
    assert_eq!(classes.iter().map(|c| (c.name.as_str(), c.count)).collect::<Vec<_>>(), [("b", 1), ("a", 2)]);
    let StepSpec::Features(features) = &spec.step else { panic!("features") };
    // 1 2 3 5 -1 -3, and 10 20 30 0 40 without the blank.
    assert!((features[0].mean - 7.0 / 6.0).abs() < 1e-12 && (features[1].mean - 20.0).abs() < 1e-12);
    assert!((features[1].std - 200f64.sqrt()).abs() < 1e-12);
    let (values, label) = read(&sequences, 1);
    // The blank has the mean, which is 0.
    assert_eq!((values[1], label), (0.0, 0.0));
    assert!((f64::from(values[0]) - (5.0 - features[0].mean) / features[0].std).abs() < 1e-6);
    assert!(sequences.warnings()[0].contains("1 blanks"), "{:?}", sequences.warnings());
}

#[test]
fn rows_of_a_table_with_one_name_are_a_sequence_wherever_they_stand() {
    let csv = "id,t,x,class,y\ns1,0,1,up,4\ns2,0,9,down,4\ns1,1,2,up,4\ns1,2,3,up,\ns2,1,5,down,8\n";
    let sequences = whole("x.csv", csv, &SequencesOptions { features: vec!["y".into(), "x".into()], ..of_table() }).unwrap();
    assert_eq!((sequences.len(), sequences.length(0), sequences.length(1), sequences.sequence_name(1)), (2, 3, 2, "s2"));
    assert_eq!(sequences.spec().form, Form::Table { sequence: "id".into(), label: "class".into() });
    let (first, label) = read(&sequences, 0);
    // y is 4 4 and a blank, which keeps what was before it; mean and deviation of the known 4 4 4 8 are 5 and sqrt 3.
    let y: Vec<f32> = first.iter().step_by(2).copied().collect();
    assert_eq!((y[0], y[1], y[2], label), (-1.0 / 3f32.sqrt(), y[0], y[0], 1.0));
    // Without a list, all columns of numbers are read.
    let StepSpec::Features(all) = whole("x.csv", csv, &of_table()).unwrap().spec().step.clone() else { panic!("features") };
    assert_eq!(all.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["t", "x", "y"]);
}

#[test]
fn lines_of_label_tab_text_are_sequences_of_tokens() {
    let text = "pos\tgood film\n\nneg\tbad\n";
    let sequences = whole("x.txt", text, &SequencesOptions { level: Level::Word, ..options(Goal::Class) }).unwrap();
    assert_eq!((sequences.length(0), sequences.length(1)), (2, 1));
    // <unk>, <eos>, then the words, equally frequent, by the alphabet; neg before pos.
    assert_eq!((read(&sequences, 0), read(&sequences, 1)), ((vec![4.0, 3.0], 1.0), (vec![2.0], 0.0)));
    let numbers = whole("x.txt", "1.5\tab\n3.5\tc\n", &options(Goal::Number)).unwrap();
    assert_eq!((numbers.number(0), read(&numbers, 0), read(&numbers, 1).1), (Some(1.5), (vec![0.0, 1.0], -1.0), 1.0));
}

#[test]
fn the_scale_is_of_the_training_part_alone_and_every_class_is_in_every_part() {
    let rows: String = (0..200).map(|i| format!("s{i},{},{}\n", if i % 2 == 0 { "even" } else { "odd" }, i)).collect();
    let split = Split { train: 0.7, valid: 0.1, test: 0.2 };
    let options = SequencesOptions { split, ..of_table() };
    let sequences = whole("x.csv", &format!("id,class,x\n{rows}"), &options).unwrap();
    let parts = [Part::Train, Part::Valid, Part::Test].map(|part| sequences.of_part(part));
    assert_eq!(parts.each_ref().map(Vec::len), [140, 20, 40]);
    for part in &parts {
        assert_eq!(part.iter().filter(|&&i| sequences.class(i as usize) == Some(0)).count(), part.len() / 2);
    }
    let mean = parts[0].iter().map(|&i| f64::from(i)).sum::<f64>() / 140.0;
    let StepSpec::Features(features) = &sequences.spec().step else { panic!("features") };
    assert!((features[0].mean - mean).abs() < 1e-9 && (mean - 99.5).abs() > 1e-3, "{} against {mean}", features[0].mean);
    let other = |seed: u64| whole("x.csv", &format!("id,class,x\n{rows}"), &SequencesOptions { seed, ..options.clone() }).unwrap();
    assert_eq!(other(1).of_part(Part::Test), parts[2]);
    assert_ne!(other(2).of_part(Part::Test), parts[2]);
}

#[test]
fn files_that_name_their_parts_are_those_parts_and_validation_is_cut_from_training() {
    let lines = |n: usize| (0..n).map(|i| format!("{}\t{}\n", i % 2, "abc")).collect::<String>();
    let of = |valid: Vec<Source>| {
        let sources = Sources::Parts { train: vec![source("train.txt", &lines(40))], valid, test: vec![source("test.txt", &lines(6))] };
        let options = SequencesOptions { split: Split { train: 0.6, valid: 0.2, test: 0.2 }, ..options(Goal::Class) };
        let sequences = Sequences::from_sources(sources, &options).unwrap();
        [Part::Train, Part::Valid, Part::Test].map(|part| sequences.of_part(part).len())
    };
    assert_eq!(of(Vec::new()), [30, 10, 6]);
    assert_eq!(of(vec![source("valid.txt", &lines(8))]), [40, 8, 6]);
}

#[test]
fn a_run_s_other_data_are_read_with_its_scale_classes_and_vocabulary() {
    let sequences = whole("x.ts", TS, &options(Goal::Class)).unwrap();
    let spec = sequences.spec();
    let json = serde_json::to_string(spec).unwrap();
    assert_eq!(&serde_json::from_str::<carrousel::data::sequences::SequencesSpec>(&json).unwrap(), spec);
    let other = TS.replace("b a\n", "a b\n").replace("5:?:b", "1,2,3:10,20,30:b");
    let other = Sequences::from_held_out(vec![source("y.ts", &other)], spec, Encoding::Utf8, Labelled::All).unwrap();
    assert_eq!((other.of_part(Part::All).len(), read(&other, 0), read(&other, 1).1), (3, read(&sequences, 0), 0.0));
    let refused = |name: &str, text: &str| {
        Sequences::from_held_out(vec![source(name, text)], spec, Encoding::Utf8, Labelled::All).unwrap_err().to_string()
    };
    let unknown = TS.replace("b a\n", "b a c\n").replace(":b\n", ":c\n");
    assert!(
        refused("y.ts", &unknown).contains("y.ts, line 8: the training part has no class 'c'; it has b, a"),
        "{}",
        refused("y.ts", &unknown)
    );
    assert!(refused("y.ts", "@classLabel true a\n@data\n1:a\n").contains("it has 1 numbers a step, the run reads 2"));
    assert!(refused("y.txt", "a\tb\n").contains("another form"));
}

#[test]
fn sequences_that_cannot_be_used_are_refused_with_file_and_line() {
    let ts = |text: &str| whole("x.ts", text, &options(Goal::Class)).unwrap_err().to_string();
    let header = "@classLabel true a b\n@data\n";
    for (text, says) in [
        (format!("{header}1,2:1,2:a\n1:a\n"), "x.ts, line 4: 1 dimensions, but the first sequence has 2"),
        (format!("{header}1,2:1:a\n"), "x.ts, line 3: dimension 2 has 1 steps, the first has 2"),
        (format!("{header}1,x:a\n"), "x.ts, line 3: 'x' in dimension 1 is not a number"),
        (format!("{header}1,2:c\n"), "x.ts, line 3: the label 'c' is not among those of @classLabel, a, b"),
        (format!("{header}1,2\n"), "x.ts, line 3: there is no colon"),
        ("1,2:a\n".into(), "x.ts, line 1: values stand before @data"),
        ("@data\n1,2:a\n".into(), "x.ts, line 1: the header declares no labels"),
        (format!("@timeStamps true\n{header}"), "x.ts, line 1: values with time stamps are not read"),
        (header.into(), "x.ts is empty"),
    ] {
        assert!(ts(&text).contains(says), "{}: {says}", ts(&text));
    }
    let table = |csv: &str, options: &SequencesOptions| whole("x.csv", csv, options).unwrap_err().to_string();
    for (csv, says) in [
        ("id,class,x\ns1,a,1\ns1,b,1\n", "x.csv, line 3, column 'class': 'b', but sequence s1 has the label 'a' in line 2"),
        ("id,class,x\ns1,,1\n", "x.csv, line 2, column 'class': the cell is blank"),
        ("id,class,x\ns1,a,1\ns2,a,2\n", "the training part has one class only, 'a'"),
        ("id,class,x\ns1,a,q\ns2,b,r\n", "there is no column of numbers to read"),
        ("id,klass,x\ns1,a,1\n", "--label 'class': x.csv has no such column (did you mean 'klass'?)"),
    ] {
        assert!(table(csv, &of_table()).contains(says), "{}: {says}", table(csv, &of_table()));
    }
    let blank = "id,class,x,y\ns1,a,1,1\ns1,a,,1\ns2,b,2,1\n";
    let refuse = table(blank, &SequencesOptions { missing: Missing::Refuse, ..of_table() });
    assert!(refuse.contains("x.csv, line 3, column 'x': the cell is blank"), "{refuse}");
    assert!(table(blank, &options(Goal::Class)).contains("name them with --sequence COLUMN --label COLUMN"));
    assert!(table(blank, &SequencesOptions { label: None, ..of_table() }).contains("the column of labels is not named"));
    assert!(table(blank, &SequencesOptions { sequence: None, ..of_table() }).contains("name it with --sequence COLUMN"));
    let number = SequencesOptions { goal: Goal::Number, ..of_table() };
    assert!(table(blank, &number).contains("x.csv, line 2: the label 'a' is not a number"));
    let lines = |text: &str| whole("x.txt", text, &options(Goal::Class)).unwrap_err().to_string();
    assert!(lines("a\tb\nc d\n").contains("x.txt, line 2: there is no tab between label and text"));
    assert!(lines("a\tb\nc\t \n").contains("x.txt, line 2: this sequence has no step"));
}

#[test]
fn batches_hold_every_sequence_once_and_shares_of_them_are_no_longer_than_their_rows() {
    let lengths = |i: usize| 1 + (i * 7) % 23;
    let text: String = (0..57).map(|i| format!("{}\t{}\n", i % 3, "ab".repeat(23)[..lengths(i)].to_owned())).collect();
    let sequences = Arc::new(whole("x.txt", &text, &options(Goal::Class)).unwrap());
    let batches = SequenceBatches::new(Arc::clone(&sequences), Part::Train, 8, Order::Shuffled { seed: 3 }).unwrap();
    assert_eq!((batches.n_batches(), batches.largest().expect("a batch")), (8, (23, 8)));
    let mut seen = Vec::new();
    for idx in 0..8 {
        let batch = batches.batch(2, idx).expect("a batch");
        assert_eq!(batch, batches.batch(2, idx).expect("a batch"));
        assert_eq!(batch.n_steps, (0..batch.n_rows).map(|row| batch.length(row)).max().unwrap());
        assert_eq!(batch.n_tokens, (0..batch.n_rows).map(|row| batch.length(row) as u64).sum::<u64>());
        for (row, &i) in batch.streams.iter().enumerate() {
            assert_eq!(batch.length(row), lengths(i as usize));
        }
        let parts: Vec<_> = [0..1, 1..batch.n_rows].map(|rows| batch.rows(rows)).into();
        assert_eq!(parts.iter().map(|part| part.weight).sum::<f64>(), batch.weight);
        for part in parts.into_iter().filter(|part| part.n_rows > 0) {
            let longest = (0..part.n_rows).map(|row| part.length(row)).max().unwrap_or(0);
            assert_eq!(part.n_steps, longest);
            for (row, &i) in part.streams.iter().enumerate() {
                let alone = sequences.batch_of(&[i]);
                let (Input::Tokens(alone), Input::Tokens(tokens)) = (alone.input, &part.input) else { panic!("tokens") };
                let of_row: Vec<u32> = (0..lengths(i as usize)).map(|t| tokens[t * part.n_rows + row]).collect();
                assert_eq!(of_row, alone);
            }
        }
        seen.extend(batch.streams);
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..57).collect::<Vec<_>>());
}

/// Sequences of 3 to 20 steps that rise or fall, with noise; the number is the slope.
fn slopes(dir: &Path, n: usize) -> PathBuf {
    let mut random = Stream::new(StepKey::new(9, 0), Purpose::Test, 0, 0);
    let mut csv = "name,slope,way,x,noise\n".to_owned();
    for i in 0..n {
        let size = 0.3 + 0.7 * random.uniform_f64();
        let slope = if random.below(2) == 0 { size } else { -size };
        let start = random.normal();
        for t in 0..3 + random.below(18) {
            let x = start + slope * f64::from(t) + 0.05 * random.normal();
            let way = if slope > 0.0 { "up" } else { "down" };
            csv.push_str(&format!("n{i},{slope},{way},{x:.4},{:.4}\n", random.normal()));
        }
    }
    let path = dir.join("slopes.csv");
    std::fs::write(&path, csv).unwrap();
    path
}

fn on_slopes(task: Task, dir: &Path) -> RunConfig {
    let mut config = config(task, &[&slopes(dir, 240)]);
    let label = if task == Task::Regress { "slope" } else { "way" };
    (config.sequence, config.label, config.features) = (Some("name".into()), Some(label.into()), vec!["x".into(), "noise".into()]);
    config.split = Split { train: 0.7, valid: 0.1, test: 0.2 };
    (config.batch_size, config.eval_batch_size) = (12, 12);
    config
}

#[test]
fn sequences_are_classified_by_where_they_go() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = on_slopes(Task::Classify, dir.path());
    (config.max_steps, config.optimizer.lr, config.lstm.bidirectional, config.pooling) = (Some(160), 1e-2, true, Pooling::Mean);
    let ran = train(&config, &dir.path().join("run"), false);
    let summary = ran.outcome.unwrap().summary;
    let (accuracy, majority) = (summary["accuracy"].as_f64().unwrap(), summary["baselines"]["majority"].as_f64().unwrap());
    assert!(accuracy > 0.9 && majority < 0.7 && summary["macro_f1"].as_f64().unwrap() > 0.9, "{accuracy} beside {majority}");
    let counts: Vec<Vec<u64>> = serde_json::from_value(summary["confusion"]["counts"].clone()).unwrap();
    let (all, hits) = (counts.iter().flatten().sum::<u64>(), counts[0][0] + counts[1][1]);
    assert_eq!((summary["confusion"]["classes"].clone(), hits as f64 / all as f64), (serde_json::json!(["down", "up"]), accuracy));
    // Tokens are valid steps: all of an epoch have come by after as many steps as it has.
    let tokens = ran.events.iter().filter(|event| matches!(event, Event::Step { .. })).count();
    assert_eq!(tokens, 160);
}

#[test]
fn the_slope_of_sequences_is_learnt_as_a_number() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = on_slopes(Task::Regress, dir.path());
    (config.max_steps, config.optimizer.lr, config.tolerance) = (Some(200), 1e-2, Some(0.0));
    let summary = train(&config, &dir.path().join("run"), false).outcome.unwrap().summary;
    let (loss, mean) = (summary["test_loss"].as_f64().unwrap(), summary["baselines"]["mean"].as_f64().unwrap());
    assert!(loss < 0.2 && (0.5..2.0).contains(&mean), "{loss} beside {mean}");
    // Nothing is exactly right.
    assert_eq!((summary["wrong"].as_u64(), summary["of"].as_u64()), (Some(48), Some(48)));
    let (model, of_mean) = (summary["rmse"]["model"].as_f64().unwrap(), summary["rmse"]["mean"].as_f64().unwrap());
    // In the unit and on the normalised scale it is the same error.
    assert!(((model / of_mean).powi(2) / (loss / mean) - 1.0).abs() < 1e-4, "{model} of {of_mean}, {loss} of {mean}");
}

#[test]
fn every_mixture_of_devices_takes_the_same_steps_over_sequences_of_unequal_length() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = on_slopes(Task::Classify, dir.path());
    (config.layers, config.dropout, config.lstm.bidirectional, config.pooling) = (2, 0.3, true, Pooling::Mean);
    (config.batch_size, config.max_steps) = (13, Some(16));
    let one = train(&config, &dir.path().join("one"), false);
    let scores = |ran: carrousel::train::Outcome| {
        let number = |key: &str| ran.summary[key].as_f64().unwrap_or_else(|| panic!("{key} in {:?}", ran.summary));
        (number("tokens"), number("accuracy"), number("test_loss"))
    };
    let (tokens, accuracy, loss) = scores(one.outcome.unwrap());
    let mut mixtures = vec![("cpu:2", ""), ("cpu:1*3", "7:2:1"), ("cpu:1*3", "0:1:0")];
    if !adapters::gpus().is_empty() {
        mixtures.extend([("gpu:0", ""), ("gpu:0,cpu:1", "1:2")]);
    }
    for (i, (devices, balance)) in mixtures.into_iter().enumerate() {
        (config.devices, config.balance, config.accumulate) = (devices.into(), balance.into(), 1 + i % 2);
        let ran = train(&config, &dir.path().join(format!("mixture-{i}")), false);
        let found = scores(ran.outcome.unwrap_or_else(|e| panic!("{devices}: {e:#}")));
        assert_eq!((found.0, found.1), (tokens, accuracy), "{devices} {balance}");
        assert!((found.2 - loss).abs() <= 1e-4 * loss, "{devices} {balance}: {} against {loss}", found.2);
        for (step, (a, b)) in ran.losses.iter().zip(&one.losses).enumerate() {
            assert!((a - b).abs() <= 1e-4 * b, "{devices} {balance}, step {}: {a} against {b}", step + 1);
        }
    }
}

#[test]
fn a_run_stopped_within_an_epoch_and_resumed_has_the_bits_of_one_that_was_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = on_slopes(Task::Classify, dir.path());
    (config.dropout, config.layers, config.max_steps, config.devices) = (0.3, 2, Some(40), "cpu:1*2".into());
    let bits = |run: &Path| -> Vec<Vec<u32>> {
        let checkpoint = RunFolder::read(run).unwrap().load(Which::Last).unwrap();
        checkpoint.tensors.iter().map(|tensor| tensor.data.iter().map(|value| value.to_bits()).collect()).collect()
    };
    let (straight, stopped) = (dir.path().join("straight"), dir.path().join("stopped"));
    train(&config, &straight, false).outcome.unwrap();
    // 14 batches an epoch: in the middle of the second one.
    let first = train_with(&config, RunOptions { out: stopped.clone(), resume: false, wrap: None }, Some(19));
    assert!(first.outcome.unwrap().interrupted);
    train(&config, &stopped, true).outcome.unwrap();
    assert_eq!(bits(&stopped), bits(&straight));
    // Other labels are other data.
    let file = dir.path().join("slopes.csv");
    let changed = std::fs::read_to_string(&file).unwrap().replacen(",up,", ",down,", 1).replace("n1,", "n_1,");
    std::fs::write(&file, changed).unwrap();
    config.max_steps = Some(60);
    let error = format!("{:#}", train(&config, &stopped, true).outcome.err().expect("other data"));
    assert!(error.contains("slopes.csv"), "{error}");
}
