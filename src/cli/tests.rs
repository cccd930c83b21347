//! From what was typed to what is run.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use clap::Parser;

use super::args::{self, Cli, Command};
use super::resolve::{self, Layers};
use super::typed::{Size, Typed};
use super::{is_usage, message};
use crate::data::split::Split;
use crate::data::vocab::Level;
use crate::model::config::Hidden;
use crate::model::init::Init;
use crate::optim::Rule;
use crate::optim::schedule::ScheduleKind;
use crate::store::config::{RunConfig, Task};
use crate::store::{Select, StoreError};
use crate::train::devices::DeviceError;
use crate::usage::UsageError;

fn typed(flags: &[&str]) -> Typed {
    let Command::Train(args) = Cli::parse_from(["carrousel", "train"].iter().chain(flags)).command else { unreachable!("train was typed") };
    args.typed
}

fn flags(flags: &[&str]) -> Layers {
    Layers::new(&typed(flags), None).unwrap()
}

fn config(given: &[&str]) -> RunConfig {
    resolve::resolve(&flags(given)).unwrap_or_else(|error| panic!("{given:?}: {error}"))
}

fn refusal(given: &[&str]) -> String {
    resolve::resolve(&flags(given)).expect_err(&format!("{given:?}")).to_string()
}

/// A folder with a configuration file of this text.
fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    fs::write(&path, text).unwrap();
    (folder, path)
}

fn with_file(text: &str, given: &[&str]) -> Result<RunConfig, UsageError> {
    let (_folder, path) = file(text);
    resolve::resolve(&Layers::new(&typed(given), Some(&path))?)
}

#[test]
fn clap_finds_no_fault_in_the_description_of_the_command_line() {
    args::command().debug_assert();
}

#[test]
fn the_task_follows_from_the_data_unless_it_is_given() {
    assert_eq!(config(&[]).task, Task::Forecast);
    assert_eq!(config(&["--data", "a.CSV"]).task, Task::Forecast);
    assert_eq!(config(&["--data", "data/*.tsv"]).task, Task::Forecast);
    assert_eq!(config(&["--data", "a.txt"]).task, Task::Lm);
    assert_eq!(config(&["--data", "-"]).task, Task::Lm);
    assert_eq!(config(&["--data", "a.csv", "--data", "b.txt"]).task, Task::Lm);
    assert_eq!(config(&["--task", "forecast", "--data", "a.txt"]).task, Task::Forecast);
    assert_eq!(config(&["--task", "lm", "--data", "a.csv"]).task, Task::Lm);
    assert_eq!(config(&["--data", "a_TRAIN.ts", "--data", "a_TEST.TS"]).task, Task::Classify);
    assert_eq!(config(&["--data", "a.csv", "--sequence", "id", "--label", "kind"]).task, Task::Classify);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    assert_eq!(config(&["--data", path]).task, Task::Lm);
    fs::write(folder.path().join("train.csv"), "").unwrap();
    fs::write(folder.path().join(".hidden"), "").unwrap();
    assert_eq!(config(&["--data", path]).task, Task::Forecast);
}

#[test]
fn defaults_fit_the_kind_of_work() {
    let text = config(&["--data", "a.txt"]);
    assert_eq!(
        (text.layers, text.hidden, text.embedding, text.seq_len, text.batch_size, text.eval_batch_size),
        (2, 128.into(), 128, 50, 50, 50)
    );
    assert_eq!((text.epochs, text.max_steps, text.select, text.level), (Some(10), None, Select::Best, Level::Char));
    assert_eq!((text.optimizer.rule, text.optimizer.lr, text.schedule.kind), (Rule::Adam, 2e-3, ScheduleKind::Cosine));
    assert_eq!(text.split.to_string(), "0.85,0.05,0.1");
    let words = config(&["--data", "a.txt", "--level", "word"]);
    assert_eq!((words.hidden, words.embedding), (200.into(), 200));
    let example = config(&[]);
    assert_eq!((example.seq_len, example.horizon, example.select), (104, 26, Select::Last));
    assert_eq!(example.split, crate::data::builtin::co2_split());
    assert_eq!((example.embedding, example.data.len()), (0, 0));
    let series = config(&["--data", "a.csv"]);
    assert_eq!((series.select, series.split), (Select::Best, Split::default()));
    // What follows another value follows it when it is given.
    let wide = config(&["--data", "a.txt", "--hidden", "64", "--batch-size", "7"]);
    assert_eq!((wide.embedding, wide.eval_batch_size), (64, 7));
}

#[test]
fn one_limit_alone_switches_the_other_off() {
    let limits = |given: &[&str]| {
        let config = config(given);
        (config.epochs, config.max_steps)
    };
    assert_eq!(limits(&["--max-steps", "60"]), (None, Some(60)));
    assert_eq!(limits(&["--epochs", "3"]), (Some(3), None));
    assert_eq!(limits(&["--epochs", "3", "--max-steps", "60"]), (Some(3), Some(60)));
}

#[test]
fn a_flag_goes_before_the_file_and_the_file_before_the_default() {
    let text = "data = 'a.txt'\nlayers = 3\nhidden = '1K'\nlr = 1\ntied = true\nsplit = [0.5, 0.25, 0.25]\ngate_bias = '0,1,0,0'\n";
    let config = with_file(text, &["--hidden", "96", "--embedding", "96"]).unwrap();
    assert_eq!((config.layers, config.hidden, config.seq_len, config.optimizer.lr, config.tied), (3, 96.into(), 50, 1.0, true));
    assert_eq!((config.split.to_string().as_str(), config.gate_bias), ("0.5,0.25,0.25", Some([0.0, 1.0, 0.0, 0.0])));
    assert!(!with_file(text, &["--tied=false"]).unwrap().tied);
    assert_eq!(with_file(text, &[]).unwrap().embedding, 1024);
    let units = |text: &str, flags: &[&str]| {
        with_file(&format!("data = 'a.txt'\nhidden = {text}\n"), flags).map(|config| (config.layers, config.hidden))
    };
    assert_eq!(units("[64, '1K']", &[]).unwrap(), (2, Hidden::Each(vec![64, 1024])));
    assert_eq!(units("64", &["--hidden", "8,1K,4"]).unwrap(), (3, Hidden::Each(vec![8, 1024, 4])));
    assert!(units("[64, 32]", &["--layers", "3"]).unwrap_err().to_string().contains("--layers 3"));
    assert!(units("64", &["--proj-size", "64"]).unwrap_err().to_string().contains("--proj-size is 64"));
    assert!(units("64", &["--cell", "gru"]).unwrap_err().to_string().contains("take lstm"));
    let lists = with_file("data = ['a.csv', 'b.csv']\ntarget = 'x, y'\nfeatures = ['z']\n", &[]).unwrap();
    assert_eq!((lists.data.len(), lists.target, lists.features), (2, vec!["x".to_owned(), "y".to_owned()], vec!["z".to_owned()]));
}

#[test]
fn a_wrong_file_is_refused_with_its_name_the_line_and_the_nearest_name() {
    for (text, parts) in [
        ("layers = 2\nhiden = 3\n", ["run.toml, line 2", "unknown key `hiden`", "`hidden`"]),
        ("batch-size = 3\n", ["run.toml, line 1", "unknown key `batch-size`", "`batch_size`"]),
        ("[model]\nlayers = 2\n", ["run.toml, line 1", "unknown key `model`", "nearest"]),
        ("\n\nschedule = 'cosin'\n", ["run.toml, line 3", "unknown value `cosin`", "`cosine`"]),
        ("optimizer = 'adm'\n", ["line 1", "unknown value `adm`", "adam"]),
        ("layers = 'two'\n", ["line 1", "\"two\"", "a whole number"]),
        ("layers = -1\n", ["line 1", "-1", "a whole number"]),
        ("split = [1, 2]\n", ["line 1", "2", "3 numbers"]),
        ("init = 'zeros'\n", ["line 1", "zeros", "orthogonal"]),
        ("layers = \n", ["line 1", "", ""]),
        ("encoding = 'utf8'\n", ["line 1", "unknown value `utf8`", "`utf-8`"]),
        ("dropout = 1\n", ["dropout (in ", "run.toml) is 1", "below 1"]),
        ("lr = nan\n", ["lr (in ", "NaN", "above 0"]),
        ("devices = 'tpu'\n", ["devices (in ", "tpu", "gpu:INDEX"]),
    ] {
        let error = with_file(text, &["--data", "a.txt"]).expect_err(text).to_string();
        for part in parts {
            assert!(error.contains(part), "{text:?}: no {part:?} in: {error}");
        }
    }
    let error = Layers::new(&typed(&[]), Some(Path::new("no/such.toml"))).unwrap_err().to_string();
    assert!(error.contains("no/such.toml"), "{error}");
}

#[test]
fn numbers_that_make_no_sense_are_refused_with_flag_value_and_what_is_allowed() {
    for (given, parts) in [
        (&["--layers", "0"][..], ["--layers is 0", "from 1"]),
        (&["--hidden", "0"], ["--hidden is 0", "from 1"]),
        (&["--hidden", "1M"], ["--hidden is 1048576", "to 65536"]),
        (&["--embedding", "0"], ["--embedding is 0", "from 1"]),
        (&["--seq-len", "0"], ["--seq-len is 0", "from 1"]),
        (&["--batch-size", "0"], ["--batch-size is 0", "from 1"]),
        (&["--eval-batch-size", "0"], ["--eval-batch-size is 0", "from 1"]),
        (&["--epochs", "0"], ["--epochs is 0", "at least 1"]),
        (&["--max-steps", "0"], ["--max-steps is 0", "at least 1"]),
        (&["--log-every", "0"], ["--log-every is 0", "at least 1"]),
        (&["--keep", "0"], ["--keep is 0", "at least 1"]),
        (&["--vocab", "1"], ["--vocab is 1", "at least 2"]),
        (&["--dropout", "1"], ["--dropout is 1", "below 1"]),
        (&["--dropout", "-0.1"], ["--dropout is -0.1", "at least 0"]),
        (&["--dropout", "0.1", "--layers", "1"], ["--dropout acts between layers", "--recurrent-dropout"]),
        (&["--lr", "0"], ["--lr is 0", "above 0"]),
        (&["--lr", "-1"], ["--lr is -1", "above 0"]),
        (&["--lr", "inf"], ["--lr is inf", "above 0"]),
        (&["--momentum", "1", "--optimizer", "sgd"], ["--momentum is 1", "below 1"]),
        (&["--weight-decay", "-1"], ["--weight-decay is -1", "0 or more"]),
        (&["--l1", "nan"], ["--l1 is NaN", "0 or more"]),
        (&["--clip-norm", "-5"], ["--clip-norm is -5", "0 or more"]),
        (&["--clip-value", "inf"], ["--clip-value is inf", "0 or more"]),
        (&["--split", "0.8,0.1,0.2"], ["sum 1.1", "add up to 1"]),
        (&["--split", "0,0.5,0.5"], ["--split is 0,0.5,0.5", "above 0"]),
        (&["--split", "-1,1,1"], ["--split is -1,1,1", "add up to 1"]),
        (&["--accumulate", "0"], ["--accumulate is 0", "from 1"]),
        (&["--accumulate", "51"], ["--accumulate is 51", "--batch-size, 50"]),
        (&["--gate-bias", "0,nan,0,0"], ["--gate-bias is 0,NaN,0,0", "finite"]),
        (&["--devices", "gpu"], ["--devices gpu", "index"]),
        (&["--devices", "cpu:1*3", "--balance", "1:2"], ["--balance 1:2", "2 weights for 3 workers"]),
        (&["--balance", "fair"], ["--balance fair", "equal, auto"]),
        (&["--deadline", "0"], ["--deadline is 0", "at least 1"]),
        (&["--memory-limit", "0"], ["--memory-limit is 0", "above 0"]),
        (&["--memory-limit", "1,inf"], ["--memory-limit is 1,inf", "above 0"]),
        (&["--memory-limit", "1,2", "--devices", "cpu:1*3"], ["--memory-limit is 1,2", "each of the 3"]),
    ] {
        let error = refusal(&[&["--data", "a.txt"], given].concat());
        for part in parts {
            assert!(error.contains(part), "{given:?}: no {part:?} in: {error}");
        }
    }
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    for (given, part) in [
        (&["--tied", "--embedding", "64"][..], "--embedding is 64, but must be equal to --hidden, 128"),
        (&["--nesterov", "--optimizer", "sgd"], "--nesterov needs --momentum"),
        (&["--nesterov"], "--nesterov needs --optimizer sgd"),
        (&["--momentum", "0.9"], "--momentum needs --optimizer sgd or rmsprop"),
        (&["--no-bias", "--gate-bias", "0,1,0,0"], "--gate-bias cannot be used with --no-bias"),
        (&["--coupled-gates", "--gate-bias", "-1,1,0,0"], "--gate-bias starts a forget gate at 1, of which --coupled-gates leaves none"),
        (&["--level", "byte", "--vocab", "100"], "--vocab cannot be used with --level byte"),
        (&["--horizon", "3"], "--horizon means nothing for --task lm"),
        (&["--target", "x"], "--target means nothing for --task lm"),
        (&["--label", "x"], "--label means nothing for --task lm"),
        (&["--task", "classify", "--horizon", "3"], "--horizon means nothing for --task classify"),
        (&["--task", "classify", "--sequence", "id", "--embedding", "8"], "--embedding means nothing for sequences of numbers"),
        (&["--task", "regress", "--features", "a,b", "--level", "word"], "--level means nothing for sequences of numbers"),
        (&["--task", "regress", "--seq-len", "3"], "--seq-len means nothing for --task regress"),
        (&["--task", "classify", "--sequence", " "], "--sequence is empty"),
        (&["--task", "classify", "--tolerance", "1"], "--tolerance means nothing for --task classify"),
        (&["--task", "regress", "--tolerance", "-1"], "--tolerance is -1, but must be a number of 0 or more"),
        (&["--data", "-", "--data", "-"], "--data names standard input twice"),
        (&["--rejoin", "--on-device-loss", "stop"], "--rejoin needs a run that goes on"),
        (&["--rejoin", "--devices", "cpu:2"], "--rejoin means nothing with one worker"),
        (&["--shard-optimizer", "--devices", "cpu:2"], "--shard-optimizer means nothing with one worker"),
        (&["--shard-optimizer", "--optimizer", "sgd"], "--shard-optimizer means nothing for an optimizer that keeps no state"),
        (&["--compress", "topk:0.2", "--devices", "cpu:1*8"], "--compress is topk:0.2, but must be below topk:0.167 with 8 workers"),
        (&["--task", "forecast", "--tied"], "--tied means nothing for --task forecast"),
        (&["--task", "forecast", "--level", "word"], "--level means nothing for --task forecast"),
    ] {
        let error = refusal(&[&["--data", "a.txt"], given].concat());
        assert!(error.contains(part), "{given:?}: {error}");
    }
    assert!(refusal(&["--task", "lm"]).contains("--data"));
    for given in
        [&["--momentum", "0.9", "--optimizer", "sgd", "--nesterov"][..], &["--momentum", "0.9", "--optimizer", "rmsprop"], &["--tied"]]
    {
        config(&[&["--data", "a.txt"], given].concat());
    }
}

#[test]
fn a_resolved_configuration_given_as_a_file_resolves_to_itself() {
    for given in [
        &[][..],
        &[
            "--data",
            "a.csv",
            "--target",
            "x,y",
            "--features",
            "z",
            "--season",
            "7",
            "--relative",
            "none",
            "--balance",
            "1:2",
            "--max-steps",
            "9",
        ],
        &[
            "--data",
            "a.txt",
            "--devices",
            "cpu:1*2",
            "--on-device-loss",
            "continue",
            "--rejoin",
            "--shard-optimizer",
            "--compress",
            "topk:0.01",
            "--deadline",
            "20",
            "--memory-limit",
            "1.5,2",
        ],
        &["--data", "a.txt", "--tied", "--no-bias", "--vocab", "30", "--init", "uniform:0.08", "--optimizer", "sgd", "--momentum", "0.9"],
        &[
            "--data",
            "a.txt",
            "--gate-bias",
            "0,-1,0.5,0",
            "--loss-reduction",
            "sum-over-time",
            "--seed",
            "9223372036854775807",
            "--epochs",
            "2",
        ],
    ] {
        let config = config(given);
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<RunConfig>(&text).unwrap(), config, "{text}");
        assert_eq!(with_file(&text, &[]).unwrap(), config, "{text}");
    }
}

#[test]
fn what_a_run_of_any_kind_records_settles_to_the_same_again() {
    for given in [
        &["--data", "a.txt"][..],
        &["--data", "a.txt", "--level", "word", "--vocab", "50", "--tied"],
        &["--data", "a.csv", "--target", "x", "--features", "y,z", "--quantiles", "0.1,0.5,0.9"],
        &["--data", "a.txt", "--task", "classify", "--embedding", "8"],
        &["--data", "a.txt", "--task", "regress", "--level", "word", "--vocab", "9"],
        &["--data", "a.jsonl", "--task", "classify"],
        &["--data", "a.ts", "--class-weights", "balanced"],
        &["--data", "a.csv", "--sequence", "id", "--label", "kind", "--features", "x"],
        &["--data", "a.csv", "--task", "tag", "--sequence", "id", "--label", "kind"],
        &["--data", "music", "--task", "frames"],
        &["--data", "adding:100", "--task", "regress"],
    ] {
        let config = config(given);
        let text = toml::to_string(&config).unwrap();
        let settled = |layers: Layers| resolve::resolve(&layers).unwrap_or_else(|error| panic!("{given:?}: {error}"));
        assert_eq!(settled(flags(&[]).recorded("config.toml", &text).unwrap()), config, "{given:?}");
        assert_eq!(with_file(&text, &[]).unwrap_or_else(|error| panic!("{given:?}: {error}")), config, "{given:?}");
    }
}

#[test]
fn a_resumed_run_starts_from_its_record_and_a_new_limit_takes_the_place_of_the_old_one() {
    let recorded = config(&["--data", "a.txt", "--hidden", "32", "--epochs", "4", "--devices", "cpu:1"]);
    let folder = tempfile::tempdir().unwrap();
    let resume = |given: &[&str]| resolve::resolve(&flags(given).resumed(folder.path()).unwrap()).unwrap();
    // A folder that a kill left without a record: as a new run.
    assert_eq!(resume(&["--data", "b.txt"]).hidden, 128.into());
    fs::write(folder.path().join("config.toml"), toml::to_string(&recorded).unwrap()).unwrap();
    // Nor does the record count that a start without a checkpoint left.
    assert_eq!(resume(&["--data", "b.txt"]).hidden, 128.into());
    fs::create_dir(folder.path().join("checkpoints")).unwrap();
    fs::write(folder.path().join("checkpoints/step-00000001.safetensors"), "").unwrap();
    assert_eq!(resume(&[]), recorded);
    assert_eq!(resume(&["--devices", "cpu:2"]), RunConfig { devices: "cpu:2".to_owned(), ..recorded.clone() });
    assert_eq!(resume(&["--max-steps", "900"]), RunConfig { epochs: None, max_steps: Some(900), ..recorded.clone() });
    assert_eq!(resume(&["--epochs", "9"]), RunConfig { epochs: Some(9), ..recorded });
}

#[test]
fn paths_of_data_are_made_absolute_and_the_rest_stays() {
    let config = config(&["--data", "some/a.txt", "--data", "-", "--data", "some/*.txt", "--data", "/b.txt"]);
    let here = std::env::current_dir().unwrap();
    let below = |path: &str| here.join(path).to_str().unwrap().to_owned();
    assert_eq!(config.data, [below("some/a.txt"), "-".to_owned(), below("some/*.txt"), "/b.txt".to_owned()]);
}

#[test]
fn sizes_take_binary_units() {
    for (text, size) in [("0", 0), ("7", 7), ("2K", 2048), ("3k", 3072), ("1M", 1 << 20), ("1G", 1 << 30)] {
        assert_eq!(text.parse(), Ok(Size(size)), "{text}");
    }
    for text in ["", "K", "-1", "1.5", "1T", "1KK", "99999999999999999999", "99999999999G", "1 K"] {
        assert!(text.parse::<Size>().is_err(), "{text}");
    }
}

#[test]
fn switches_do_not_swallow_what_follows() {
    let typed = typed(&["--tied", "--layers", "3", "--no-bias", "--nesterov=false", "--init", "uniform:0.05"]);
    assert_eq!((typed.tied, typed.layers, typed.no_bias, typed.nesterov), (Some(true), Some(Size(3)), Some(true), Some(false)));
    assert_eq!(typed.init, Some(Init::Uniform(0.05)));
}

#[test]
fn an_unknown_flag_is_answered_with_the_nearest_of_its_command() {
    for (line, flag) in [
        ("train --hiden 3", "--hidden"),
        ("train --hidden-size 3", "--hidden"),
        ("train --clip 3", "--clip-"),
        ("train --zzz", "--"),
        ("generate --run x --temp 1", "--temperature"),
        ("profile step --hash-evry 1", "--"),
    ] {
        let line: Vec<OsString> = ["carrousel"].into_iter().chain(line.split(' ')).map(OsString::from).collect();
        let error = args::parse(&line).unwrap_err().render().to_string();
        let tip = error.lines().find(|line| line.contains("tip:")).unwrap_or_else(|| panic!("no tip: {error}"));
        assert!(tip.contains(flag), "{error}");
    }
}

#[test]
fn the_help_states_the_defaults_that_hold() {
    let mut command = args::command();
    let help = command.find_subcommand_mut("train").unwrap().render_long_help().to_string();
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let text = config(&["--data", "a.txt"]);
    let series = config(&["--data", "a.csv"]);
    let labelled = config(&["--data", "a.ts"]);
    for part in [
        format!(
            "[default: lm {}; lm at word level 200; forecast {}; labelled sequences {}; labelled texts 128]",
            text.hidden, series.hidden, labelled.hidden
        ),
        format!(
            "[default: lm {}; forecast {}; built-in example {}; labelled sequences 0.005; labelled texts 0.002]",
            text.optimizer.lr,
            series.optimizer.lr,
            config(&[]).optimizer.lr
        ),
        format!("[default: {}; built-in example {}]", series.horizon, config(&[]).horizon),
        "[default: best; built-in example last]".to_owned(),
        "[default: auto]".to_owned(),
    ] {
        assert!(help.contains(&part), "no {part} in {help}");
    }
}

#[test]
fn what_the_person_can_mend_is_told_from_what_broke() {
    let usage = || UsageError("wrong".to_owned());
    let missing = || StoreError::NotFound { path: "x".into() };
    for error in [
        usage().into(),
        anyhow!(usage()).context("while reading"),
        anyhow!("the reason").context(usage()),
        anyhow!(DeviceError::TooMany { given: "x".to_owned() }).context("while starting"),
        missing().into(),
    ] {
        assert!(is_usage(&error), "{error:?}");
    }
    let broken = || StoreError::Io { action: "write", path: "x".into(), source: std::io::Error::other("disk full") };
    for error in [anyhow!("lost"), broken().into()] {
        assert!(!is_usage(&error), "{error:?}");
    }
    // The cause stands in the text of this error already.
    assert_eq!(message(&broken().into()), "cannot write x: disk full");
    assert_eq!(message(&anyhow!(broken()).context("no checkpoint")), "no checkpoint: cannot write x: disk full");
}

#[test]
fn the_help_lists_every_command_once_and_each_has_examples() {
    let mut command = args::command();
    let help = command.render_help().to_string();
    let commands: Vec<clap::Command> = command.get_subcommands().filter(|found| !found.is_hide_set()).cloned().collect();
    for found in &commands {
        let name = found.get_name();
        let lines = help.lines().filter(|line| line.starts_with(&format!("  {name} "))).count();
        assert_eq!(lines, 1, "{name} in {help}");
        if name == "help" {
            continue;
        }
        let after = found.get_after_help().map(ToString::to_string).unwrap_or_default();
        assert!(after.contains(&format!("carrousel {name}")), "the help of {name} has no example");
    }
    assert!(!help.contains("Other:") && !help.contains("\n  man "), "{help}");
}

#[test]
fn every_example_of_the_help_is_a_command_line_that_can_be_read() {
    let mut command = args::command();
    command.build();
    let texts = command.get_subcommands().chain([&command]).filter_map(|found| found.get_after_help()).map(ToString::to_string);
    let mut n_examples = 0;
    for line in texts.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>()).filter(|line| line.starts_with("  carrousel ")) {
        // What follows two blanks is a remark, what follows a bar or an angle is the shell's.
        let typed = line.trim().split("  ").next().unwrap().split(['|', '>']).next().unwrap().replace("'It was '", "It");
        let words: Vec<OsString> = typed.split_whitespace().map(OsString::from).collect();
        if let Err(error) = args::parse(&words) {
            assert_eq!(error.kind(), clap::error::ErrorKind::DisplayHelp, "{typed}: {error}");
        }
        n_examples += 1;
    }
    assert!(n_examples > 20, "{n_examples} examples");
}

#[test]
fn every_recipe_is_a_configuration_that_can_be_run_and_tells_how() {
    for recipe in super::recipes::ALL {
        assert!(!recipe.about().is_empty() && recipe.command().starts_with("carrousel train --recipe "), "{}", recipe.name);
        let layers = flags(&["--data", "somewhere"]).with_recipe(Some(recipe.name));
        let layers = if recipe.name == "adding-100" { flags(&[]).with_recipe(Some(recipe.name)) } else { layers };
        let config = resolve::resolve(&layers.unwrap()).unwrap_or_else(|e| panic!("{}: {e}", recipe.name));
        assert!(recipe.command().contains(recipe.name));
        // As a file it is the same run.
        let (_folder, path) = file(recipe.text);
        let data = config.data.clone();
        let given: Vec<&str> = data.iter().flat_map(|data| ["--data", data.as_str()]).collect();
        assert_eq!(resolve::resolve(&Layers::new(&typed(&given), Some(&path)).unwrap()).unwrap(), config, "{}", recipe.name);
    }
}

#[test]
fn a_flag_goes_before_the_file_that_before_the_recipe_and_that_before_the_default() {
    let (_folder, path) = file("lr = 0.5\nhidden = 300\nembedding = 300\n");
    let layers = Layers::new(&typed(&["--data", "ptb", "--lr", "0.25"]), Some(&path)).unwrap();
    let config = resolve::resolve(&layers.with_recipe(Some("zaremba-small")).unwrap()).unwrap();
    assert_eq!((config.optimizer.lr, config.hidden.clone(), config.seq_len, config.keep), (0.25, Hidden::All(300), 20, 3));
    // A limit that is asked for takes the place of the recipe's.
    let layers = flags(&["--data", "ptb", "--max-steps", "7"]).with_recipe(Some("zaremba-small")).unwrap();
    assert_eq!((resolve::resolve(&layers).unwrap().epochs, resolve::resolve(&layers).unwrap().max_steps), (None, Some(7)));
    let refused = |given: &[&str], name: &str| {
        flags(given).with_recipe(Some(name)).and_then(|layers| resolve::resolve(&layers)).unwrap_err().to_string()
    };
    let error = refused(&["--data", "x"], "zaremba");
    assert!(error.contains("no recipe 'zaremba'") && error.contains("the nearest is zaremba-small"), "{error}");
    assert!(refused(&[], "zaremba-small").contains("--data"));
    // What does not go with it names the recipe.
    let error = refused(&["--data", "x", "--no-bias", "--task", "regress"], "adding-100");
    assert!(error.contains("recipe adding-100") || error.contains("built-in"), "{error}");
}

#[test]
fn frames_tags_and_quantiles_are_refused_where_they_mean_nothing() {
    for (given, parts) in [
        (&["--task", "lm", "--data", "a.txt", "--notes", "12"][..], &["--notes", "--task lm"][..]),
        (&["--data", "a.csv", "--class-weights", "balanced"], &["--class-weights", "--task forecast"]),
        (&["--data", "a.txt", "--quantiles", "0.1,0.9"], &["--quantiles", "--task lm"]),
        (&["--task", "frames", "--data", "a.txt", "--bidirectional"], &["--bidirectional", "frame"]),
        (&["--task", "frames", "--data", "a.txt", "--seq-len", "9"], &["--seq-len", "--task frames"]),
        (&["--task", "frames", "--data", "a.txt", "--notes", "0"], &["--notes", "1"]),
        (&["--task", "frames"], &["--task frames", "--data"]),
        (&["--task", "tag", "--data", "a.csv", "--pooling", "mean"], &["--pooling", "--task tag"]),
        (&["--data", "builtin:adding-100", "--task", "classify"], &["--task", "regress"]),
        (&["--data", "a.txt", "--output-dropout", "1"], &["--output-dropout", "below 1"]),
        (&["--data", "a.txt", "--early-stop", "0"], &["--early-stop", "at least 1"]),
        (&["--data", "a.txt", "--init-from", "/nowhere"], &["--init-from", "/nowhere"]),
        (&["--data", "a.txt", "--freeze", "[a"], &["--freeze", "[a"]),
    ] {
        let error = refusal(given);
        assert!(parts.iter().all(|part| error.contains(part)), "{given:?}: {error}");
    }
    assert_eq!(config(&["--data", "builtin:adding-100"]).task, Task::Regress);
    assert_eq!(config(&["--data", "a.csv", "--quantiles", "0.1,0.5,0.9"]).quantiles.unwrap().count(), 3);
    assert!(Cli::try_parse_from(["carrousel", "train", "--quantiles", "0.9,0.1"]).is_err());
}
