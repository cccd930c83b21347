//! The program from outside: what it answers, where, and with which exit code.

use std::fs;

use assert_cmd::Command;
use serde_json::{Value, json};

/// One call in an empty folder.
struct Call {
    code: i32,
    out: String,
    err: String,
}

impl Call {
    /// The last line of standard output, all of which must be JSON objects with an `event`.
    fn last_event(&self) -> Value {
        let lines: Vec<Value> = self.out.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect();
        assert!(lines.iter().all(|line| line["event"].is_string()), "{}", self.out);
        lines.last().unwrap_or_else(|| panic!("no event; standard error: {}", self.err)).clone()
    }
}

fn call(args: &[&str]) -> Call {
    call_in(tempfile::tempdir().unwrap().path(), args)
}

fn call_in(folder: &std::path::Path, args: &[&str]) -> Call {
    let output = Command::new(env!("CARGO_BIN_EXE_carrousel")).args(args).current_dir(folder).output().unwrap();
    Call {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

#[test]
fn help_and_version_go_to_standard_output_with_code_0() {
    for args in [&["--help"][..], &["help"], &["train", "--help"], &["help", "generate"], &["profile", "step", "-h"], &["--version"]] {
        let call = call(args);
        assert_eq!((call.code, call.err.as_str()), (0, ""), "{args:?}");
        assert!(!call.out.is_empty(), "{args:?}");
    }
    assert_eq!(call(&["--version"]).out.trim(), concat!("carrousel ", env!("CARGO_PKG_VERSION")));
    let help = call(&["--help"]).out;
    for command in
        ["train", "evaluate", "generate", "forecast", "export", "import", "inspect", "compare", "devices", "profile", "completions"]
    {
        assert!(help.contains(&format!("\n  {command} ")), "{help}");
    }
}

#[test]
fn a_command_line_that_cannot_be_read_is_code_2_and_names_the_nearest() {
    for (args, part) in [
        (&[][..], "Usage: carrousel"),
        (&["trian"], "'train'"),
        (&["classify", "--run", "x"], "classify"),
        (&["profile"], "step"),
        (&["profile", "kernel"], "kernels"),
        (&["profile", "ring", "--algorithm", "star"], "'star'"),
        (&["train", "--hiden", "3"], "'--hidden'"),
        (&["train", "--schedule", "cosin"], "'cosine'"),
        (&["train", "--layers", "two"], "'two'"),
        (&["train", "--layers", "-1"], "-1"),
        (&["train", "--seed", "18446744073709551615"], "18446744073709551615"),
        (&["train", "--split", "0.5,0.5"], "3 numbers"),
        (&["train", "--quiet", "--verbose"], "--verbose"),
        (&["generate"], "--run"),
        (&["inspect"], "<RUN>"),
        (&["compare"], "<RUN>"),
        (&["completions", "csh"], "'csh'"),
        (&["train", "--out", "x", "--resume", "--dry-run"], "--dry-run"),
        (&["evaluate", "--run", "x", "--checkpoint", "worst"], "worst"),
        (&["export", "--run", "x", "--output", "m", "--format", "keras"], "keras"),
    ] {
        let call = call(args);
        assert_eq!((call.code, call.out.as_str()), (2, ""), "{args:?}: {}", call.err);
        assert!(call.err.contains(part), "{args:?}: {}", call.err);
    }
}

#[test]
fn what_was_given_wrongly_is_code_2_with_one_line_on_standard_error() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("key.toml"), "layers = 2\nhiden = 3\n").unwrap();
    fs::write(folder.path().join("value.toml"), "dropout = 1.5\n").unwrap();
    for (name, value) in [("none", "[]"), ("text", "\"x\""), ("float", "2.5"), ("zero", "\"24,0\"")] {
        fs::write(folder.path().join(format!("{name}.toml")), format!("layers = 2\nhidden = {value}\n")).unwrap();
    }
    for (args, part) in [
        (&["train", "--config", "key.toml"][..], "key.toml, line 2: unknown key `hiden`; the nearest is `hidden`"),
        (&["train", "--config", "value.toml"], "dropout (in value.toml) is 1.5, but must be at least 0 and below 1"),
        (&["train", "--config", "none.toml"], "none.toml, line 2: hidden names no layer"),
        (&["train", "--config", "text.toml"], "text.toml, line 2: hidden is \"x\": not a whole number"),
        (&["train", "--config", "float.toml"], "float.toml, line 2: hidden must be a whole number"),
        (&["train", "--config", "zero.toml"], "hidden (in zero.toml) is 24,0, but must be from 1"),
        (&["train", "--config", "nothing.toml"], "cannot read nothing.toml"),
        (&["train", "--lr", "-1"], "--lr is -1, but must be a number above 0"),
        (&["train", "--resume"], "--resume needs --out"),
        (&["train", "--task", "lm"], "--data"),
        (&["train", "--devices", "tpu"], "'tpu' is no device"),
        (&["train", "--devices", "cpu:1*2", "--balance", "1:2:3"], "3 weights for 2 workers"),
        (&["generate", "--run", "x", "--temperature", "-1"], "--temperature is -1"),
        (&["generate", "--run", "x", "--top-k", "0"], "--top-k is 0"),
        (&["inspect", "none"], "none"),
        (&["compare", "none"], "name at least two"),
        (&["compare", "none", "other"], "none"),
        (&["compare", "none", "other", "--output", "x.pdf"], "--output ends in .pdf"),
        (&["generate", "--run", "x", "--devices", "tpu"], "'tpu' is no device"),
        (&["evaluate", "--run", "x", "--eval-batch-size", "0"], "--eval-batch-size is 0"),
        (&["evaluate", "--run", "x", "--output", "said.txt"], "x"),
        (&["import", "--input", "none.onnx"], "import needs --out"),
        (&["import", "--input", "none.onnx", "--out", "run"], "none.onnx does not exist"),
        (&["export", "--run", "x", "--format", "onnx", "--output", "m.onnx"], "x"),
        (&["profile", "step", "--steps", "0"], "--steps is 0"),
        (&["profile", "step", "--workload", "B", "--hidden", "8"], "--hidden cannot be used with --workload B"),
        (&["profile", "step", "--keep", "2"], "--keep means nothing for profile step"),
        (&["profile", "step", "--workload", "A", "--mode", "infer-step", "--lr", "1"], "--lr means nothing for --mode infer-step"),
        (&["profile", "step", "--hidden", "8", "--mode", "infer-step", "--seq-len", "9"], "--seq-len means nothing for --mode infer-step"),
        (&["profile", "step", "--workload", "A", "--mode", "infer-seq", "--devices", "cpu:1*2"], "--devices cpu:1*2 names 2 workers"),
        (&["profile", "step", "--workload", "A", "--mode", "infer-seq", "--lengths", "uniform"], "--lengths uniform is for training"),
        (&["profile", "step", "--workload", "E", "--devices", "cpu:1,cpu:1"], "a layer alone runs on one"),
        (&["profile", "step", "--workload", "E", "--accumulate", "2"], "--accumulate is for training a model"),
        (&["profile", "step", "--workload", "A", "--steps", "1", "--trace", "/nowhere/t.json"], "--trace cannot write /nowhere/t.json"),
        (&["profile", "kernels", "--kernel", "gem"], "--kernel gem is none of the kernels; choose among embedding_gather, dropout"),
        (&["profile", "kernels", "--hidden", "0"], "--hidden is 0, but must be from 1"),
        (&["profile", "kernels", "--hidden", "1M", "--batch-size", "1M"], "million numbers"),
        (&["profile", "kernels", "--devices", "gpu:99"], "gpu:99"),
        (&["profile", "ring", "--world", "1"], "--world is 1, but must be from 2 to 256"),
        (&["profile", "ring", "--bytes", "0"], "--bytes is 0, but must be a multiple of 4"),
        (&["profile", "ring", "--bytes", "4097"], "--bytes is 4097, but must be a multiple of 4"),
        (&["profile", "ring", "--world", "256", "--bytes", "1G"], "256 GB"),
        (&["profile", "ring", "--calls", "0"], "--calls is 0"),
    ] {
        let call = call_in(folder.path(), args);
        assert_eq!((call.code, call.out.as_str()), (2, ""), "{args:?}: {}", call.err);
        assert!(call.err.starts_with("error: ") && call.err.contains(part) && call.err.lines().count() == 1, "{args:?}: {}", call.err);
    }
    let files = fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(files, 6, "a refused command left something behind");
}

#[test]
fn data_devices_and_runs_that_are_not_there_are_code_2() {
    for (args, part) in [
        (&["train", "--devices", "cpu:1", "--data", "none.txt"][..], "none.txt"),
        (&["train", "--devices", "cpu:1", "--data", "none*.csv"], "none*.csv"),
        (&["train", "--devices", "gpu:9999"], "gpu:9999"),
        (&["evaluate", "--run", "none", "--devices", "cpu:1"], "none"),
        (&["generate", "--run", "none", "--devices", "cpu:1"], "none"),
        (&["forecast", "--run", "none", "--devices", "cpu:1"], "none"),
    ] {
        let call = call(args);
        assert_eq!(call.code, 2, "{args:?}: {}", call.err);
        assert!(call.err.lines().any(|line| line.starts_with("error: ") && line.contains(part)), "{args:?}: {}", call.err);
    }
}

#[test]
fn with_json_an_error_is_the_last_event_wherever_the_flag_stands() {
    for args in [
        &["--json", "train", "--lr", "0"][..],
        &["train", "--json", "--lr", "0"],
        &["train", "--lr", "0", "--json"],
        &["train", "--json", "--hiden", "3"],
        &["evaluate", "--run", "none", "--json", "--quiet"],
    ] {
        let call = call(args);
        let event = call.last_event();
        assert_eq!((call.code, event["event"].as_str()), (2, Some("error")), "{args:?}: {}", call.out);
        let message = event["message"].as_str().unwrap();
        assert!(!message.is_empty() && !message.contains('\n') && !message.contains("error: "), "{message}");
        assert!(call.err.starts_with("error: "), "{args:?}: {}", call.err);
    }
}

#[test]
fn devices_are_measured_where_that_is_asked() {
    let summary = call(&["devices", "--measure", "--json"]).last_event();
    let measured = summary["adapters"].as_array().unwrap().iter().chain([&summary["cpu"]]);
    for device in measured {
        for key in ["gflops", "gb_per_second"] {
            assert!(device[key].as_f64().is_some_and(|speed| speed > 0.01 && speed < 1e6), "{key} of {device}");
        }
    }
    assert!(summary["cpu"]["threads"].as_u64().is_some_and(|n| n > 0), "{summary}");
}

#[test]
fn devices_are_listed_for_people_and_for_programs() {
    let call_json = call(&["devices", "--json"]);
    let event = call_json.last_event();
    assert_eq!((call_json.code, event["event"].as_str(), event["status"].as_str()), (0, Some("summary"), Some("finished")));
    let adapters = event["adapters"].as_array().unwrap();
    assert!(adapters.iter().enumerate().all(|(position, adapter)| adapter["index"] == position), "{adapters:?}");
    let call = call(&["devices"]);
    assert_eq!(call.code, 0, "{}", call.err);
    for adapter in adapters {
        assert!(call.out.contains(adapter["name"].as_str().unwrap()), "{}", call.out);
    }
    assert!(!call.out.is_empty());
}

/// A folder with a small text to learn.
fn folder_with_text() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("text.txt"), "the quick brown fox jumps over the lazy dog\n".repeat(60)).unwrap();
    folder
}

const SMALL: [&str; 14] = [
    "train",
    "--data",
    "text.txt",
    "--hidden",
    "8",
    "--layers",
    "1",
    "--batch-size",
    "4",
    "--seq-len",
    "10",
    "--devices",
    "cpu:1",
    "--out=run",
];

#[test]
fn a_trained_network_is_used_from_any_folder_and_a_second_run_does_not_overwrite_it() {
    let folder = folder_with_text();
    let trained = call_in(folder.path(), &[&SMALL[..], &["--max-steps", "5"]].concat());
    assert_eq!(trained.code, 0, "{}", trained.err);
    // The table is the result; progress is not.
    assert!(trained.out.contains("perplexity") && !trained.out.contains("step 5/5"), "{}", trained.out);
    let run = folder.path().join("run");
    let run = ["--run", run.to_str().unwrap(), "--devices", "cpu:1"];

    let evaluated = call(&[&["evaluate", "--json"], &run[..]].concat());
    let event = evaluated.last_event();
    assert_eq!((evaluated.code, event["status"].as_str()), (0, Some("finished")), "{}", evaluated.err);
    assert!((event["loss"].as_f64().unwrap().exp() / event["perplexity"].as_f64().unwrap() - 1.0).abs() < 1e-9);

    let generate = [&["generate", "--prompt", "the ", "--length", "7"], &run[..]].concat();
    let (written, again) = (call(&generate), call(&[&generate[..], &["--json"]].concat()));
    assert_eq!((written.code, written.out.chars().count()), (0, 4 + 7 + 1), "{}{}", written.out, written.err);
    assert!(written.out.starts_with("the ") && written.out.ends_with('\n'));
    assert_eq!(again.last_event()["text"].as_str(), written.out.strip_suffix('\n'));

    for (args, part) in [
        (["forecast"].iter().chain(&run).copied().collect::<Vec<_>>(), "use generate"),
        ([&["generate", "--prompt", "\u{a7}"], &run[..]].concat(), "\u{a7}"),
        ([&["evaluate", "--checkpoint", "3"], &run[..]].concat(), "step 3"),
        ([&["evaluate", "--devices", "cpu:1*2"], &run[..2]].concat(), "2 workers"),
    ] {
        let refused = call(&args);
        assert_eq!(refused.code, 2, "{args:?}: {}", refused.err);
        assert!(refused.err.contains(part), "{args:?}: {}", refused.err);
    }
    let second = call_in(folder.path(), &SMALL);
    assert_eq!(second.code, 2, "{}", second.err);
    assert!(second.err.contains("--resume"), "{}", second.err);
}

#[test]
fn what_training_found_of_the_test_part_is_what_evaluate_finds_again_with_a_learned_state_too() {
    for flags in [&[][..], &["--learned-state"]] {
        let folder = folder_with_text();
        let trained = call_in(folder.path(), &[&SMALL[..], &["--max-steps", "60", "--json"], flags].concat()).last_event();
        let evaluated = call_in(folder.path(), &["evaluate", "--run", "run", "--devices", "cpu:1", "--json"]).last_event();
        let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{trained} {evaluated}"));
        let (found, again) = (number(&trained["test_loss"]), number(&evaluated["loss"]));
        assert!((found - again).abs() < 1e-6 * found, "{flags:?}: training found {found}, evaluate {again}");
    }
}

#[test]
fn a_failed_start_does_not_bar_the_way_of_the_corrected_one() {
    let folder = folder_with_text();
    let wrong = call_in(folder.path(), &[&SMALL[..], &["--max-steps", "2", "--seq-len", "900000", "--batch-size", "5000"]].concat());
    assert_eq!(wrong.code, 2, "{}", wrong.err);
    assert!(!folder.path().join("run").exists());
    // A start that was killed before its first checkpoint recorded other options.
    fs::create_dir_all(folder.path().join("run/checkpoints")).unwrap();
    fs::write(folder.path().join("run/.lock"), "").unwrap();
    fs::write(folder.path().join("run/config.toml"), "hidden = 77\ntask = \"forecast\"\n").unwrap();
    let right = call_in(folder.path(), &[&SMALL[..], &["--max-steps", "2", "--resume"]].concat());
    assert_eq!(right.code, 0, "{}", right.err);
    let config = fs::read_to_string(folder.path().join("run/config.toml")).unwrap();
    assert!(config.contains("hidden = 8") && !config.contains("balance"), "{config}");
}

#[test]
fn a_prompt_of_words_comes_back_as_typed_and_unknown_words_are_told() {
    let folder = folder_with_text();
    let trained = call_in(folder.path(), &[&SMALL[..], &["--level", "word", "--max-steps", "2"]].concat());
    assert_eq!(trained.code, 0, "{}", trained.err);
    let generate = ["generate", "--run", "run", "--devices", "cpu:1", "--length", "2", "--prompt"];
    let call = call_in(folder.path(), &[&generate[..], &["the  quick zebra"]].concat());
    assert!(call.code == 0 && call.out.starts_with("the  quick zebra"), "{}", call.out);
    assert!(call.err.contains("\"zebra\"") && !call.err.contains("quick"), "{}", call.err);
    let known = call_in(folder.path(), &[&generate[..], &["the quick "]].concat());
    assert!(known.out.starts_with("the quick ") && !known.out.starts_with("the quick  "), "{}", known.out);
    assert!(!known.err.contains("warning"), "{}", known.err);
}

#[test]
fn launches_are_whole_numbers() {
    let profile = ["profile", "step", "--task", "lm", "--hidden", "8", "--layers", "1", "--batch-size", "4", "--seq-len", "5"];
    let call = call(&[&profile[..], &["--steps", "1", "--devices", "cpu:1*2", "--json"]].concat());
    let event = call.last_event();
    let kernels = event["kernels"].as_array().unwrap();
    assert!(!kernels.is_empty() && kernels.iter().all(|kernel| kernel["launches"].as_u64().is_some_and(|n| n > 0)), "{kernels:?}");
}

#[test]
fn sequences_of_unequal_length_are_timed_beside_full_ones_in_one_run() {
    let profile = ["profile", "step", "--task", "classify", "--hidden", "8", "--batch-size", "4", "--seq-len", "9", "--lengths", "uniform"];
    let event = call(&[&profile[..], &["--steps", "2", "--devices", "cpu:1*2", "--json"]].concat()).last_event();
    let number = |key: &str| event[key].as_f64().unwrap_or_else(|| panic!("{key} in {event}"));
    assert_eq!((event["lengths"].as_str(), number("batches")), (Some("uniform"), 64.0));
    assert!((number("ratio") / (number("tokens_per_second") / number("dense_tokens_per_second")) - 1.0).abs() < 1e-9);
    assert!(number("padding") < 0.1, "{event}");
    assert!(call(&["profile", "step", "--lengths", "long"]).err.contains("uniform"));
}

#[test]
fn sequences_in_a_table_are_trained_on_judged_and_written_out() {
    let folder = tempfile::tempdir().unwrap();
    let row = |i: usize| {
        (0..3 + i % 4).map(move |t| format!("s{i},{},{}\n", if i.is_multiple_of(2) { "up" } else { "down" }, (i % 2 * t) as f64))
    };
    let csv = format!("id,kind,x\n{}", (0..40).flat_map(row).collect::<String>());
    fs::write(folder.path().join("kinds.csv"), csv).unwrap();
    let run = |args: &[&str]| call_in(folder.path(), &[args, &["--devices", "cpu:1", "--json", "-q"]].concat());
    let train = ["train", "--data", "kinds.csv", "--sequence", "id", "--label", "kind", "--hidden", "8", "--epochs", "2", "--out", "run"];
    let summary = run(&train).last_event();
    assert_eq!((summary["task"].as_str(), summary["confusion"]["classes"].as_array().map(Vec::len)), (Some("classify"), Some(2)));
    let judged = run(&["evaluate", "--run", "run", "--output", "said.csv"]).last_event();
    assert_eq!((&judged["accuracy"], &judged["confusion"]), (&summary["accuracy"], &summary["confusion"]));
    let said = fs::read_to_string(folder.path().join("said.csv")).unwrap();
    assert_eq!(said.lines().next(), Some("sequence,class,truth,down,up"));
    let counts = serde_json::from_value::<Vec<Vec<usize>>>(summary["confusion"]["counts"].clone()).unwrap();
    assert_eq!(said.lines().count() - 1, counts.iter().flatten().sum::<usize>());
    let tensors = run(&["evaluate", "--run", "run", "--output", "said.safetensors"]);
    assert_eq!(tensors.code, 0, "{}", tensors.err);
    assert!(run(&["generate", "--run", "run"]).err.contains("use classify"));
    assert!(
        run(&["train", "--data", "kinds.csv", "--task", "classify", "--out", "other"]).err.contains("--sequence COLUMN --label COLUMN")
    );
}

#[test]
fn classes_are_told_of_data_without_labels_and_judged_where_there_are_some() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    let call = |args: &[&str]| call_in(folder.path(), args);
    let cpu = ["--devices", "cpu:1", "-q"];
    // Rising or falling by the first number, in each form that labels may be missing from.
    let values = |i: usize| (0..3 + i % 4).map(|t| if i.is_multiple_of(2) { t } else { 9 - t }.to_string()).collect::<Vec<_>>();
    let kind = |i: usize| if i.is_multiple_of(2) { "up" } else { "down" };
    let ts = |label: &dyn Fn(usize) -> String, n: usize| {
        let lines: String = (0..n).map(|i| format!("{}:{}\n", values(i).join(","), label(i))).collect();
        format!("@classLabel true up down\n@data\n{lines}")
    };
    write("kinds.ts", &ts(&|i| kind(i).to_owned(), 40));
    write("new.ts", &ts(&|_| "?".to_owned(), 6));
    write("some.ts", &ts(&|i| if i < 4 { kind(i).to_owned() } else { "?".to_owned() }, 6));
    let rows = |i: usize| values(i).iter().map(|v| format!("s{i},{v},{}\n", kind(i))).collect::<String>();
    write("kinds.csv", &format!("id,x,kind\n{}", (0..40).map(rows).collect::<String>()));
    write("new.csv", "id,x\na,0\na,1\nb,9\na,2\nb,8\n");
    write("kinds.txt", &(0..40).map(|i| format!("{}\t{}\n", kind(i), values(i).join(" "))).collect::<String>());
    write("new.txt", "0 1 2\n9 8 7\n");
    let forms: [(&str, &str, &[&str], &[&str]); 3] = [
        ("kinds.ts", "new.ts", &[], &["1", "2", "3", "4", "5", "6"]),
        ("kinds.csv", "new.csv", &["--sequence", "id", "--label", "kind"], &["a", "b"]),
        ("kinds.txt", "new.txt", &["--task", "classify"], &["1", "2"]),
    ];
    for (data, new, own, names) in forms {
        let run = format!("run-{data}");
        let train = ["train", "--data", data, "--hidden", "8", "--epochs", "12", "--lr", "0.02", "--out", &run];
        let trained = call(&[&train[..], own, &cpu[..]].concat());
        assert_eq!(trained.code, 0, "{data}: {}", trained.err);
        let classify = ["classify", "--run", &run, "--data", new, "--output", "said.csv"];
        let told = call(&[&classify[..], &cpu[..], &["--json"]].concat());
        assert_eq!(told.code, 0, "{new}: {}", told.err);
        let event = told.last_event();
        let labels = event["labels"].as_array().unwrap();
        for (label, name) in labels.iter().zip(names) {
            assert!(label["sequence"].as_str().is_some_and(|said| said.contains(name)), "{new}: {label}");
            assert!((0.5..=1.0).contains(&label["probability"].as_f64().unwrap()), "{new}: {label}");
        }
        let said: Vec<&str> = labels.iter().map(|label| label["class"].as_str().unwrap()).collect();
        assert_eq!(said, (0..names.len()).map(kind).collect::<Vec<_>>(), "{new}");
        // Nothing can be right or wrong without a truth.
        assert_eq!((event["scored"].as_u64(), event.get("accuracy")), (Some(0), None), "{new}: {event}");
        let table = fs::read_to_string(folder.path().join("said.csv")).unwrap();
        let header = table.lines().next().unwrap();
        assert!(
            header.starts_with("sequence,class,truth,") && header.contains("up") && table.lines().count() == 1 + names.len(),
            "{table}"
        );
        let shown = call(&[&classify[..5], &cpu[..]].concat());
        assert!(shown.code == 0 && shown.out.contains("up") && shown.out.contains("probability"), "{}", shown.out);
    }
    let half = call(&[&["classify", "--run", "run-kinds.ts", "--data", "some.ts", "--json"], &cpu[..]].concat()).last_event();
    assert_eq!(
        (half["scored"].as_u64(), half["accuracy"].as_f64(), half["labels"].as_array().map(Vec::len)),
        (Some(4), Some(1.0), Some(6))
    );
    for (args, parts) in [
        (&["--data", "none.ts"][..], &["none.ts", "no such file"][..]),
        (&["--data", "new.csv"], &["new.csv", "another form", ".ts files"]),
        (&["--data", "new.ts", "--output", "said.txt"], &["said.txt", ".csv"]),
        (&["--data", "new.ts", "--checkpoint", "999"], &["999"]),
        (&["--data", "new.ts", "--devices", "cpu:1*2"], &["2 workers"]),
    ] {
        let devices = if args.contains(&"--devices") { &[][..] } else { &cpu[..2] };
        let refused = call(&[&["classify", "--run", "run-kinds.ts"], args, devices].concat());
        assert_eq!((refused.code, refused.out.as_str()), (2, ""), "{args:?}: {}", refused.err);
        assert!(parts.iter().all(|part| refused.err.contains(part)) && refused.err.lines().count() == 1, "{args:?}: {}", refused.err);
    }
}

#[test]
fn profile_ring_reports_times_beside_what_memory_allows() {
    for (world, algorithm, chosen) in [("2", "ring", "ring"), ("3", "tree", "tree"), ("3", "groups:2", "groups:2"), ("2", "auto", "direct")]
    {
        let args = ["profile", "ring", "--world", world, "--bytes", "8K", "--algorithm", algorithm, "--calls", "3", "--json"];
        let event = call(&args).last_event();
        assert_eq!((event["event"].as_str(), event["status"].as_str()), (Some("summary"), Some("finished")), "{event}");
        assert_eq!((event["bytes"].as_u64(), event["algorithm"].as_str()), (Some(8192), Some(algorithm)), "{event}");
        assert_eq!((event["chosen"].as_str(), event["calls"].as_u64()), (Some(chosen), Some(3)), "{event}");
        let number = |name: &str| event[name].as_f64().filter(|x| *x > 0.0).unwrap_or_else(|| panic!("{name} in {event}"));
        let p: f64 = world.parse().unwrap();
        assert_eq!(number("world"), p);
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b;
        assert!(close(number("algbw"), 8192.0 / number("seconds")), "{event}");
        assert!(close(number("busbw"), number("algbw") * 2.0 * (p - 1.0) / p), "{event}");
        assert!(close(number("floor_seconds"), (p + 1.0) * 8192.0 / number("memory_bandwidth")), "{event}");
        assert!(close(number("share_of_floor"), number("floor_seconds") / number("seconds")), "{event}");
        assert!(number("min_seconds") <= number("seconds"), "{event}");
    }
    let table = call(&["profile", "ring", "--bytes", "4K", "--calls", "1"]);
    assert!(table.code == 0 && table.out.contains("share of floor"), "{}{}", table.out, table.err);
}

#[cfg(unix)]
#[test]
fn a_signal_ends_training_with_a_checkpoint_and_code_130_and_resume_goes_on_from_there() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    let folder = folder_with_text();
    let mut child = Command::new(env!("CARGO_BIN_EXE_carrousel"))
        .args([&SMALL[..], &["--max-steps", "1000000", "--log-every", "1", "--json", "--quiet"]].concat())
        .current_dir(folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.next().is_some_and(|line| line.unwrap().contains("step")), "training did not begin");
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let last: Value = serde_json::from_str(&lines.map(Result::unwrap).last().unwrap()).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!((last["event"].as_str(), last["status"].as_str()), (Some("summary"), Some("interrupted")));
    let steps = last["steps"].as_u64().unwrap();
    assert!(folder.path().join(format!("run/checkpoints/step-{steps:08}.safetensors")).exists());

    // Nothing but the folder and the new limit need be said again; on the finished run it is a no-op.
    let resume = ["train", "--out", "run", "--resume", "--json", "--max-steps", &(steps + 3).to_string()];
    for _ in 0..2 {
        let resumed = call_in(folder.path(), &resume);
        let event = resumed.last_event();
        assert_eq!(
            (resumed.code, event["status"].as_str(), event["steps"].as_u64()),
            (0, Some("finished"), Some(steps + 3)),
            "{}",
            resumed.err
        );
    }
    let changed = call_in(folder.path(), &[&resume[..], &["--hidden", "9"]].concat());
    assert_eq!(changed.code, 2, "{}", changed.err);
    assert!(changed.err.contains("--hidden"), "{}", changed.err);
}

#[test]
fn a_model_goes_out_and_comes_back_by_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    let call = |args: &[&str]| call_in(folder.path(), args);
    let done = |args: &[&str]| {
        let call = call(args);
        assert_eq!(call.code, 0, "{args:?}: {}", call.err);
        call
    };
    fs::write(folder.path().join("text.txt"), "a wheel turns and turns again\n".repeat(30)).unwrap();
    done(&["train", "--data", "text.txt", "--hidden", "8", "--max-steps", "3", "--devices", "cpu:1", "--out", "run"]);
    let csv = |run: &str| {
        done(&["evaluate", "--run", run, "--devices", "cpu:1", "--output", "said.csv"]);
        fs::read_to_string(folder.path().join("said.csv")).unwrap()
    };
    let said = csv("run");
    assert!(said.starts_with("position,token,text,log_probability\n1,"), "{said}");
    for (format, file) in [("safetensors", "m.safetensors"), ("onnx", "m.onnx")] {
        let exported = done(&["export", "--run", "run", "--format", format, "--output", file, "--json"]).last_event();
        assert_eq!((&exported["format"], &exported["step"]), (&Value::from(format), &Value::from(3)));
        let out = format!("from-{format}");
        let imported = done(&["import", "--input", file, "--out", &out, "--json"]).last_event();
        assert_eq!((&imported["fresh"], &imported["imported"]["step"]), (&Value::Array(Vec::new()), &Value::from(3)));
        assert_eq!(csv(&out), said);
        let trained = done(&["train", "--out", &out, "--resume", "--max-steps", "2", "--devices", "cpu:1", "--json"]).last_event();
        assert_eq!(trained["steps"], 2);
        for (args, part) in [
            (&["import", "--input", file, "--out", "other", "--hidden", "9"][..], "has shape"),
            (&["import", "--input", file, "--out", "other", "--level", "word"], "--level changes how data are read"),
            (&["import", "--input", file, "--out", "run"], "already holds a run"),
        ] {
            let call = call(args);
            assert_eq!(call.code, 2, "{args:?}: {}", call.err);
            assert!(call.err.contains(part), "{args:?}: {}", call.err);
        }
    }
    done(&["export", "--run", "run", "--format", "safetensors", "--part", "lstm", "--output", "lstm.safetensors"]);
    done(&["import", "--input", "lstm.safetensors", "--data", "text.txt", "--out", "tuned"]);
}

#[test]
fn the_shells_get_completions_and_man_its_pages() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let call = call(&["completions", shell]);
        assert_eq!((call.code, call.err.as_str()), (0, ""), "{shell}");
        assert!(call.out.contains("carrousel") && call.out.contains("dry-run"), "{shell}: {}", call.out);
    }
    let bash = call(&["completions", "bash", "--json"]).last_event();
    assert!(bash["text"].as_str().unwrap().contains("complete -F"), "{bash}");
    let page = call(&["man"]).out;
    assert!(page.contains(".TH carrousel 1") && page.contains("carrousel\\-train(1)"), "{page}");
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(call_in(folder.path(), &["man", "--output", "pages"]).code, 0);
    let train = fs::read_to_string(folder.path().join("pages/carrousel-train.1")).unwrap();
    assert!(train.contains("learning") || train.contains("Learning rate"), "{train}");
}

#[test]
fn a_run_leaves_a_report_and_inspect_and_compare_tell_what_it_is() {
    let folder = folder_with_text();
    let common = ["--devices", "cpu:1", "--data", "text.txt", "--layers", "1", "--seq-len", "8", "--batch-size", "4", "--epochs", "2"];
    for own in [&["--out", "narrow", "--hidden", "8"][..], &["--out", "wide", "--hidden", "24", "--lr", "0.01"]] {
        let trained = call_in(folder.path(), &[&["train"], &common[..], own].concat());
        assert_eq!(trained.code, 0, "{}", trained.err);
    }
    let page = fs::read_to_string(folder.path().join("narrow/report.html")).unwrap();
    assert!(page.contains("<h1>narrow</h1>") && page.contains("What the model writes") && page.contains("cpu:1"), "{page}");

    let inspected = call_in(folder.path(), &["inspect", "narrow", "--json"]).last_event();
    assert_eq!((&inspected["state"], &inspected["task"], &inspected["model"]["hidden"]), (&json!("finished"), &json!("lm"), &json!(8)));
    assert_eq!(inspected["devices"][0]["device"], "cpu:1");
    assert_eq!(inspected["version"], env!("CARGO_PKG_VERSION"));
    let checkpoints = inspected["checkpoints"].as_array().unwrap();
    assert_eq!(checkpoints.last().unwrap()["step"], inspected["steps"]);
    for checkpoint in checkpoints {
        let file = folder.path().join("narrow").join(checkpoint["file"].as_str().unwrap());
        assert_eq!(checkpoint["bytes"], fs::metadata(file).unwrap().len());
    }
    let shapes = inspected["model"]["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|tensor| tensor["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).product::<u64>());
    assert_eq!(inspected["model"]["parameters"].as_u64().unwrap(), shapes.sum::<u64>());
    let shown = call_in(folder.path(), &["inspect", "narrow"]);
    assert!(shown.code == 0 && shown.out.contains("finished") && shown.out.contains("Checkpoints"), "{}", shown.out);

    let compared = call_in(folder.path(), &["compare", "narrow", "wide", "--json"]);
    let compared = compared.last_event();
    assert_eq!(compared["differing"], json!(["embedding", "hidden", "lr"]));
    assert_eq!((&compared["runs"][0]["config"]["hidden"], &compared["runs"][1]["config"]["hidden"]), (&json!(8), &json!(24)));
    assert_eq!(
        compared["runs"][1]["results"]["test_loss"],
        call_in(folder.path(), &["inspect", "wide", "--json"]).last_event()["results"]["test_loss"]
    );
    assert!(folder.path().join("compare.png").exists() && folder.path().join("compare.svg").exists());
    let shown = call_in(folder.path(), &["compare", "narrow", "wide", "--output", "two.svg"]).out;
    assert!(shown.contains("narrow") && shown.contains("hidden") && shown.contains("test loss"), "{shown}");
    assert!(folder.path().join("two.png").exists());
}

#[test]
fn a_dry_run_tells_what_training_takes_and_writes_nothing() {
    let folder = folder_with_text();
    let before = fs::read_dir(folder.path()).unwrap().count();
    let run = |more: &[&str]| {
        let common = ["train", "--data", "text.txt", "--hidden", "8", "--layers", "1", "--seq-len", "10", "--epochs", "3"];
        call_in(folder.path(), &[&common[..], more].concat())
    };
    let two = ["--devices", "cpu:1*2", "--batch-size", "4", "--out", "run", "--json"];
    let told = run(&[&two[..], &["--dry-run"]].concat()).last_event();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), before, "a dry run left something behind");
    let trained = run(&two).last_event();
    assert_eq!((&told["parameters"], &told["steps"]), (&trained["parameters"], &trained["steps"]));
    assert_eq!(told["steps"].as_u64().unwrap(), 3 * told["steps_per_epoch"].as_u64().unwrap());
    assert!(told["seconds"].as_f64().unwrap() > 0.0 && told["tokens_per_second"].as_f64().unwrap() > 0.0, "{told}");
    let memory = told["memory"].as_array().unwrap();
    assert_eq!(memory.len(), 2);
    for worker in memory {
        // Parameters, gradients and the two states of Adam at the least.
        let least = 4 * 4 * told["parameters"].as_u64().unwrap();
        assert!(worker["bytes"].as_u64().unwrap() > least && worker["rows"] == 2, "{worker}");
        assert!(worker["largest_bytes"].as_u64().unwrap() < worker["max_buffer_bytes"].as_u64().unwrap());
    }
    let bytes = |batch_size: &str| {
        let told = run(&["--devices", "cpu:1", "--json", "--dry-run", "--batch-size", batch_size]).last_event();
        told["memory"][0]["bytes"].as_u64().unwrap()
    };
    assert!(bytes("16") > bytes("4"), "a larger batch takes no more memory");
    let shown = run(&["--devices", "cpu:1", "--dry-run", "--out", "other"]);
    assert!(shown.code == 0 && shown.out.contains("nothing was written") && shown.out.contains("largest buffer"), "{}", shown.out);
    // What would stop the run stops the dry run as well.
    let taken = run(&["--devices", "cpu:1", "--dry-run", "--out", "run"]);
    assert!(taken.code == 2 && taken.err.contains("run"), "{}", taken.err);
}
