//! Files as they come: packed, as records, from a pipe, larger than memory. However a text or a table came, it is the same one.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use assert_cmd::Command;
use carrousel::data::Batches;
use carrousel::data::sequences::{Goal, Labelled, Sequences, SequencesOptions};
use carrousel::data::series::{Missing, Part, Series, SeriesOptions};
use carrousel::data::source::{Source, Sources};
use carrousel::data::split::Split;
use carrousel::data::text::{Encoding, Text, TextBatches, TextOptions};
use carrousel::data::tokens::Tokens;
use carrousel::data::vocab::{Level, Vocab};
use serde_json::Value;

use crate::alloc_count::peak_of;
use crate::malformed::{gzip, zstd};

const LEVELS: [Level; 3] = [Level::Byte, Level::Char, Level::Word];

fn one(name: &str, bytes: &[u8]) -> Sources {
    Sources::Whole(vec![Source::from_bytes(name, bytes)])
}

fn all(tokens: &Tokens) -> Vec<u32> {
    tokens.to_vec().expect("tokens")
}

fn parts(text: &Text) -> [Vec<u32>; 3] {
    [&text.train, &text.valid, &text.test].map(all)
}

/// Some kilobytes with characters of one to four bytes, words, and both kinds of line ends.
fn prose(n_lines: usize) -> String {
    let words = ["the", "Straße", "было", "日本", "𝄞", "a", "carrousel", "—", "naïve"];
    (0..n_lines)
        .map(|i| {
            let line: Vec<&str> = (0..i * 7 % 13).map(|k| words[(i * i + k * 5) % words.len()]).collect();
            line.join(" ") + if i % 3 == 0 { "\r\n" } else { "\n" }
        })
        .collect()
}

fn days(n: usize) -> String {
    let rows: String = (0..n).map(|i| format!("2024-{:02}-{:02},{},{}\n", 1 + i / 28, 1 + i % 28, i % 7, i % 3)).collect();
    format!("date,units,price\n{rows}")
}

fn labelled() -> SequencesOptions {
    SequencesOptions {
        goal: Goal::Class,
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

fn words(sequences: &Sequences) -> Vec<u64> {
    sequences.words().collect()
}

// ---- packed ----

#[test]
fn a_packed_file_is_the_file_that_it_unpacks_to() {
    let text = prose(300);
    let (first, second) = text.split_at(text.find("日本").expect("a word"));
    let two_members = [gzip(first.as_bytes()), gzip(second.as_bytes())].concat();
    let two_frames = [zstd(first.as_bytes()), zstd(second.as_bytes())].concat();
    for level in LEVELS {
        let options = TextOptions { level, ..TextOptions::default() };
        let plain = Text::from_sources(one("t.txt", text.as_bytes()), &options).expect("text");
        let packings = [
            ("t.txt.gz", gzip(text.as_bytes())),
            ("t.txt.zst", zstd(text.as_bytes())),
            ("t.gz", two_members.clone()),
            ("t.zst", two_frames.clone()),
        ];
        // What is packed says so by its first bytes, so that the name does not matter.
        for (name, bytes) in packings.into_iter().chain([("t", gzip(text.as_bytes()))]) {
            let packed = Text::from_sources(one(name, &bytes), &options).expect(name);
            assert_eq!((parts(&packed), &packed.vocab), (parts(&plain), &plain.vocab), "{name}, {level:?}");
        }
    }
    let series = |name: &str, bytes: &[u8]| {
        let series = Series::from_sources(one(name, bytes), &SeriesOptions::new(4, 2)).expect(name);
        series.words().collect::<Vec<_>>()
    };
    let csv = days(60);
    assert_eq!(series("d.csv.gz", &gzip(csv.as_bytes())), series("d.csv", csv.as_bytes()));
    assert_eq!(series("d.tsv.zst", &zstd(csv.replace(',', "\t").as_bytes())), series("d.csv", csv.as_bytes()));
    let ts = "@classLabel true a b\n@data\n1,2:3,4:a\n1,?,3:1,2,3:b\n";
    let lines = "a\tone two\nb\tthree\n";
    for (name, packed_name, text) in [("f.ts", "f.ts.gz", ts), ("f.txt", "f.txt.zst", lines)] {
        let bytes = if packed_name.ends_with("gz") { gzip(text.as_bytes()) } else { zstd(text.as_bytes()) };
        let packed = Sequences::from_sources(one(packed_name, &bytes), &labelled()).expect(packed_name);
        assert_eq!(words(&packed), words(&Sequences::from_sources(one(name, text.as_bytes()), &labelled()).expect(name)));
    }
}

#[test]
fn a_tab_separated_table_may_hold_commas() {
    let csv = "date\tunits\tnote\n2024-01-01\t1\ta, b, c\n2024-01-02\t2\td, e, f\n2024-01-03\t3\tg, h, i\n2024-01-04\t4\tj, k, l\n";
    let series = Series::from_sources(one("d.tsv", csv.as_bytes()), &SeriesOptions::new(1, 1)).expect("a table");
    assert_eq!((series.n_rows(), series.value(3, 0)), (4, 4.0));
}

// ---- records ----

#[test]
fn json_lines_are_the_table_that_their_keys_make() {
    let csv = "date,units,open,price\n2024-01-01,1,true,2.5\n2024-01-02,,false,3\n2024-01-03,3,true,\n2024-01-04,4,false,1e2\n";
    // A key that comes up late is blank before; null and a missing key are blanks; order does not matter.
    let json = r#"{"date": "2024-01-01", "units": 1, "open": true, "price": 2.5}
{"date": "2024-01-02", "units": null, "open": false, "price": 3}

{"price": null, "open": true, "date": "2024-01-03", "units": 3}
{"date": "2024-01-04", "open": false, "units": "4", "price": 1e2}
"#;
    let options = SeriesOptions { split: Split { train: 1.0, valid: 0.0, test: 0.0 }, ..SeriesOptions::new(1, 1) };
    let of = |name: &str, text: &str| {
        let series = Series::from_sources(one(name, text.as_bytes()), &options).expect(name);
        (series.words().collect::<Vec<_>>(), series.spec().clone())
    };
    assert_eq!(of("d.jsonl", json), of("d.csv", csv));
    // Without a name the first character tells.
    assert_eq!(of("standard input", json), of("d.csv", csv));
}

#[test]
fn records_hold_labelled_sequences_as_steps_as_lists_and_as_texts() {
    let ts = "@classLabel true a b\n@data\n1,2,3:4,5,?:a\n6:7:b\n8,9:1,2:a\n";
    let expected = words(&Sequences::from_sources(one("f.ts", ts.as_bytes()), &labelled()).expect("a .ts file"));
    let steps = r#"{"label": "a", "values": [[1, 4], [2, 5], [3, null]]}
{"label": "b", "values": [[6, 7]], "note": "kept out"}
{"label": "a", "values": [[8, 1], [9, 2]]}"#;
    let lists = r#"{"who": "x", "x": [1, 2, 3], "y": [4, 5, null], "label": "a"}
{"x": [6], "y": [7], "label": "b"}
{"label": "a", "x": [8, 9], "y": [1, 2]}"#;
    for text in [steps, lists] {
        assert_eq!(words(&Sequences::from_sources(one("f.jsonl", text.as_bytes()), &labelled()).expect("records")), expected, "{text}");
    }
    let named = SequencesOptions { label: Some("class".into()), features: vec!["x".into(), "y".into()], ..labelled() };
    let text = lists.replace("label", "class").replace("\"y\"", "\"z\": [0], \"y\"");
    assert_eq!(words(&Sequences::from_sources(one("f.jsonl", text.as_bytes()), &named).expect("records")), expected);

    let lines = "a\tone two\nb\tthree\n";
    let texts = "{\"label\": \"a\", \"text\": \"one two\"}\n{\"text\": \"three\", \"label\": \"b\"}\n";
    let read = Sequences::from_sources(one("f.jsonl.gz", &gzip(texts.as_bytes())), &labelled()).expect("records");
    assert_eq!(words(&read), words(&Sequences::from_sources(one("f.txt", lines.as_bytes()), &labelled()).expect("lines")));
    // The trained model reads others in the same way.
    let other = Sequences::from_held_out(vec![Source::from_bytes("g.jsonl", texts.as_bytes())], read.spec(), Encoding::Utf8, Labelled::All)
        .expect("records");
    assert_eq!(other.of_part(Part::All).len(), 2);
}

#[test]
fn the_texts_of_records_make_one_text() {
    let json = "{\"text\": \"one two\\nthree\"}\n{\"id\": 7, \"text\": \"four\"}\n";
    for level in [Level::Char, Level::Word] {
        let options = TextOptions { level, ..TextOptions::default() };
        let records = Text::from_sources(one("t.jsonl", json.as_bytes()), &options).expect("records");
        let plain = Text::from_sources(one("t.txt", b"one two\nthree\nfour\n"), &options).expect("text");
        assert_eq!((parts(&records), &records.vocab), (parts(&plain), &plain.vocab));
    }
    let options = TextOptions { column: Some("body".into()), ..TextOptions::default() };
    let named = Text::from_sources(one("t.ndjson", b"{\"text\": 1, \"body\": \"ab\"}"), &options).expect("records");
    assert_eq!(named.train.len() + named.valid.len() + named.test.len(), 3);
    // Byte level takes the file as it is.
    let bytes =
        Text::from_sources(one("t.jsonl", json.as_bytes()), &TextOptions { level: Level::Byte, ..TextOptions::default() }).expect("bytes");
    assert_eq!(parts(&bytes).iter().map(Vec::len).sum::<usize>(), json.len());
}

// ---- larger than memory ----

/// Reads in the way of files that are larger than memory.
fn on_disk(level: Level, cache: &Path) -> TextOptions {
    TextOptions { level, in_memory: 0, cache: cache.to_path_buf(), ..TextOptions::default() }
}

#[test]
fn a_text_that_stays_on_disk_gives_the_same_batches_and_keeps_nothing_in_memory() {
    let folder = tempfile::tempdir().expect("a folder");
    let text = prose(2000);
    // One file that is cut, a packed one, and files that say themselves what they are.
    let layouts: [Vec<(&str, Vec<u8>)>; 3] = [
        vec![("t.txt", text.clone().into())],
        vec![("t.txt.gz", gzip(text.as_bytes()))],
        vec![("p.train.txt", text.clone().into()), ("p.test.txt", b"the a\r\n".to_vec())],
    ];
    for (at, files) in layouts.into_iter().enumerate() {
        let dir = folder.path().join(at.to_string());
        fs::create_dir(&dir).expect("a folder");
        let data: Vec<String> = files
            .iter()
            .map(|(name, bytes)| {
                fs::write(dir.join(name), bytes).expect("a file");
                dir.join(name).display().to_string()
            })
            .collect();
        for level in LEVELS {
            let memory = Text::load(&data, &TextOptions { level, ..TextOptions::default() }).expect("text");
            // Made, then taken from the cache.
            for _ in 0..2 {
                let disk = Text::load(&data, &on_disk(level, &folder.path().join("cache"))).expect("text");
                assert_eq!((parts(&disk), &disk.vocab), (parts(&memory), &memory.vocab), "{data:?}, {level:?}");
                assert_eq!(disk.sha256().expect("a hash"), memory.sha256().expect("a hash"));
                assert_eq!(disk.train.resident_bytes(), 0);
                let of = |text: &Text| TextBatches::new("t", text.train.clone(), 7, 11).expect("batches");
                let (disk, memory) = (of(&disk), of(&memory));
                for idx in 0..memory.n_batches() {
                    assert_eq!(disk.batch(0, idx).expect("a batch"), memory.batch(0, idx).expect("a batch"));
                }
            }
        }
    }
}

#[test]
fn tokens_are_made_once_and_anew_when_the_source_has_changed() {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, cache) = (folder.path().join("t.txt"), folder.path().join("cache"));
    fs::write(&file, prose(50)).expect("a file");
    let data = [file.display().to_string()];
    let load = || Text::load(&data, &on_disk(Level::Char, &cache)).expect("text");
    let kept = || {
        let mut files: Vec<_> = fs::read_dir(&cache).expect("a cache").map(|entry| entry.expect("an entry").path()).collect();
        files.sort();
        files
    };
    let first = load();
    assert!(first.notes.iter().any(|note| note.contains("kept in") && note.contains("deleted")), "{:?}", first.notes);
    let files = kept();
    assert_eq!(files.len(), 2, "tokens, and what is known of them: {files:?}");
    let of_first = parts(&first);
    // A run that is resumed or evaluated brings the vocabulary along, and needs no second copy; another vocabulary is not mixed with it.
    let with = |vocab: Vocab| Text::load(&data, &TextOptions { vocab: Some(vocab), ..on_disk(Level::Char, &cache) }).expect("text");
    assert_eq!((parts(&with(first.vocab.clone())), kept()), (of_first.clone(), files.clone()));
    let symbols: BTreeSet<char> = prose(50).replace("\r\n", "\n").chars().chain(['#']).collect();
    let wider = Vocab::of_chars(symbols.into_iter().map(|c| (c, 1)), None).expect("a vocabulary");
    assert_eq!(with(wider.clone()).vocab, wider);
    kept().into_iter().filter(|file| !files.contains(file)).for_each(|file| fs::remove_file(file).expect("a file"));
    // Taken from there: what is planted there comes out.
    let tokens = files.iter().find(|file| file.extension().is_some_and(|e| e == "tokens")).expect("tokens");
    let mut planted = fs::read(tokens).expect("tokens");
    planted[100] ^= 1;
    fs::write(tokens, &planted).expect("tokens");
    assert_ne!(parts(&load()), of_first);
    // One byte of the source has changed, neither its length nor its time.
    let time = fs::metadata(&file).and_then(|found| found.modified()).expect("a time");
    fs::write(&file, prose(50).replacen("the", "The", 1)).expect("a file");
    fs::File::options().write(true).open(&file).and_then(|file| file.set_modified(time)).expect("a time");
    assert!(load().vocab.unknown_in("T").is_empty(), "the changed file was read");
    assert_eq!(kept(), files, "what is out of date is written over");
    // A cache that was cut off is made anew.
    fs::write(tokens, &planted[..50]).expect("tokens");
    assert_eq!(parts(&load()).map(|part| part.len()), of_first.map(|part| part.len()));
}

#[test]
fn a_file_that_shrinks_under_the_run_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("t.bin");
    fs::write(&file, vec![7; 10_000]).expect("a file");
    let text = Text::load(&[file.display().to_string()], &on_disk(Level::Byte, folder.path())).expect("bytes");
    let batches = TextBatches::new("t", text.train, 5, 10).expect("batches");
    batches.batch(0, 20).expect("a batch");
    fs::write(&file, vec![7; 100]).expect("a file");
    let error = batches.batch(0, 20).expect_err("the file is short");
    assert!(error.to_string().contains("t.bin") && error.to_string().contains("shorter") && error.is_input(), "{error}");
}

#[test]
fn memory_does_not_grow_with_the_text() {
    let folder = tempfile::tempdir().expect("a folder");
    let line = prose(40);
    let mut peaks = Vec::new();
    for (name, n_bytes) in [("small.txt", 3 << 20), ("large.txt", 15 << 20)] {
        let file = folder.path().join(name);
        fs::write(&file, line.repeat(n_bytes / line.len())).expect("a file");
        for level in LEVELS {
            let (text, peak) = peak_of(|| Text::load(&[file.display().to_string()], &on_disk(level, folder.path())).expect("text"));
            let (batch, of_batch) = peak_of(|| TextBatches::new("t", text.train, 10, 50).expect("batches").batch(0, 9).expect("a batch"));
            assert_eq!(batch.n_rows, 10);
            assert!(of_batch < 100_000, "{of_batch} bytes for a batch of 10 by 50");
            peaks.push(peak);
        }
    }
    let (small, large) = peaks.split_at(3);
    for (small, large) in small.iter().zip(large) {
        // Ten megabytes are tables of all characters there are, the rest is pieces; the text itself has twelve megabytes more.
        assert!(*large < 24 << 20 && large - small < 4 << 20, "{peaks:?}");
    }
}

#[test]
fn pieces_of_a_text_are_cut_where_nothing_is_lost() {
    let options = |level| TextOptions { level, split: Split { train: 1.0, valid: 0.0, test: 0.0 }, ..TextOptions::default() };
    // No line end, or no blank, within a piece; a line end or a character across its edge.
    let edge = 1 << 20;
    let texts = [
        "日本\u{10348}".repeat(edge / 8),
        "ab日 ".repeat(edge / 4),
        format!("{}\r\n{}\r\nx", "a".repeat(edge - 1), "b".repeat(edge - 1)),
        format!("{}é{}", "a".repeat(edge - 1), "b".repeat(edge)),
        format!("{}\r\r\n", "é".repeat(edge)),
    ];
    for text in texts {
        let read = Text::from_sources(one("t", text.as_bytes()), &options(Level::Char)).expect("text");
        assert_eq!(read.vocab.decode(&all(&read.train)), text.replace("\r\n", "\n"));
    }
    let text = "word ".repeat(edge / 2) + "\nlast";
    let read = Text::from_sources(one("t", text.as_bytes()), &options(Level::Word)).expect("text");
    assert_eq!((read.train.len(), read.vocab.size()), (edge / 2 + 3, 4));
}

// ---- as a person types it ----

fn run(folder: &Path, args: &[&str], input: Option<&[u8]>) -> (i32, Value, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_carrousel"));
    command.args(args).arg("--json").current_dir(folder).env("CARROUSEL_CACHE", folder.join("cache"));
    if let Some(input) = input {
        command.write_stdin(input);
    }
    let output = command.output().expect("the program");
    let out = String::from_utf8(output.stdout).expect("UTF-8");
    let last = out.lines().last().map_or(Value::Null, |line| serde_json::from_str(line).expect("JSON"));
    (output.status.code().unwrap_or(-1), last, String::from_utf8_lossy(&output.stderr).into_owned())
}

const SMALL: [&str; 8] = ["--hidden", "4", "--devices", "cpu:1", "--max-steps", "2", "--seq-len", "4"];

#[test]
fn standard_input_trains_evaluates_and_forecasts_packed_or_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let csv = days(80);
    let train: Vec<&str> = ["train", "--data", "-", "--task", "forecast", "--target", "units", "--horizon", "2", "--out", "r"]
        .into_iter()
        .chain(SMALL)
        .collect();
    let (code, summary, said) = run(folder.path(), &train, Some(&gzip(csv.as_bytes())));
    assert_eq!((code, summary["status"].as_str()), (0, Some("finished")), "{said}");
    fs::write(folder.path().join("d.csv"), &csv).expect("a file");
    let (code, from_file, said) = run(folder.path(), &["evaluate", "--run", "r", "--data", "d.csv"], None);
    assert_eq!(code, 0, "{said}");
    let (_, from_pipe, _) = run(folder.path(), &["evaluate", "--run", "r", "--data", "-"], Some(csv.as_bytes()));
    assert!(from_file["loss"].is_number());
    assert_eq!(from_pipe["loss"], from_file["loss"]);
    let (code, forecast, said) = run(folder.path(), &["forecast", "--run", "r", "--data", "-"], Some(&zstd(csv.as_bytes())));
    assert_eq!((code, forecast["values"].as_array().map(Vec::len)), (0, Some(2)), "{said}");
    // Nothing is there to be read again.
    let (code, error, _) = run(folder.path(), &["evaluate", "--run", "r"], Some(b""));
    assert_eq!(code, 2, "{error}");
    assert!(error["message"].as_str().is_some_and(|message| message.contains("standard input is empty")), "{error}");
}

#[test]
fn records_and_packed_files_train_from_the_command_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, bytes: Vec<u8>| fs::write(folder.path().join(name), bytes).expect("a file");
    let records: String =
        (0..40).map(|i| format!("{{\"day\": \"2024-{:02}-{:02}\", \"units\": {}}}\n", 1 + i / 28, 1 + i % 28, i % 5)).collect();
    write("d.jsonl.gz", gzip(records.as_bytes()));
    let texts: String = (0..40).map(|i| format!("{{\"text\": \"line {i} of forty\", \"label\": \"{}\"}}\n", i % 2)).collect();
    write("t.jsonl", texts.into_bytes());
    let sequences: String = (0..12).map(|i| format!("{{\"label\": {}, \"values\": [{i}, 2, 3]}}\n", i % 2)).collect();
    write("s.jsonl", sequences.into_bytes());
    write("a.txt.zst", zstd(prose(60).as_bytes()));
    write("b.txt.gz", gzip(prose(60).as_bytes()));
    let small_but_length = &SMALL[..6];
    for (task, args) in [
        ("forecast", &["--data", "d.jsonl.gz", "--target", "units", "--horizon", "1", "--seq-len", "4"][..]),
        ("lm", &["--data", "t.jsonl", "--seq-len", "4", "--batch-size", "4"]),
        ("classify", &["--data", "t.jsonl", "--label", "label"]),
        ("classify", &["--data", "s.jsonl", "--label", "label", "--batch-size", "4"]),
        ("lm", &["--data", "?.txt.*", "--seq-len", "4", "--batch-size", "4", "--level", "word"]),
    ] {
        let args: Vec<&str> = ["train"].into_iter().chain(args.iter().copied()).chain(small_but_length.iter().copied()).collect();
        let (code, summary, said) = run(folder.path(), &args, None);
        assert_eq!((code, summary["task"].as_str()), (0, Some(task)), "{args:?}: {said}");
    }
}

// ---- Parquet ----

#[cfg(feature = "parquet")]
mod of_parquet {
    use std::sync::Arc;

    use parquet::basic::Compression;
    use parquet::data_type::{ByteArray, ByteArrayType, DoubleType, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    /// Rows of a time, a number that may be blank, and a text.
    fn file(compression: Compression, rows: &[(i64, Option<f64>, &str)]) -> Vec<u8> {
        let schema = "message rows { required int64 time (timestamp(nanos,true)); optional double units; required binary text (string); }";
        let schema = Arc::new(parse_message_type(schema).expect("a schema"));
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut bytes = Vec::new();
        let mut writer = SerializedFileWriter::new(&mut bytes, schema, properties).expect("a writer");
        // Several row groups.
        for rows in rows.chunks(7) {
            let mut group = writer.next_row_group().expect("a group");
            let mut column = group.next_column().expect("a column").expect("times");
            let times: Vec<i64> = rows.iter().map(|row| row.0).collect();
            column.typed::<Int64Type>().write_batch(&times, None, None).expect("times");
            column.close().expect("times");
            let mut column = group.next_column().expect("a column").expect("units");
            let known: Vec<f64> = rows.iter().filter_map(|row| row.1).collect();
            let levels: Vec<i16> = rows.iter().map(|row| i16::from(row.1.is_some())).collect();
            column.typed::<DoubleType>().write_batch(&known, Some(&levels), None).expect("units");
            column.close().expect("units");
            let mut column = group.next_column().expect("a column").expect("texts");
            let texts: Vec<ByteArray> = rows.iter().map(|row| ByteArray::from(row.2)).collect();
            column.typed::<ByteArrayType>().write_batch(&texts, None, None).expect("texts");
            column.close().expect("texts");
            group.close().expect("a group");
        }
        writer.close().expect("a file");
        bytes
    }

    fn rows() -> Vec<(i64, Option<f64>, &'static str)> {
        const DAY: i64 = 86_400_000_000_000;
        (0..40).map(|i| (i * DAY, (i % 9 != 4).then_some(i as f64 / 4.0), if i % 2 == 0 { "a b" } else { "c" })).collect()
    }

    #[test]
    fn parquet_is_the_table_that_json_lines_would_be_whatever_its_compression() {
        let first = jiff::civil::date(1970, 1, 1);
        let json: String = rows()
            .iter()
            .enumerate()
            .map(|(i, (_, units, text))| {
                let day = first.checked_add(jiff::Span::new().days(i as i64)).expect("a day");
                let units = units.map_or("null".to_string(), |units| units.to_string());
                format!("{{\"time\": \"{day}T00:00:00\", \"units\": {units}, \"text\": \"{text}\"}}\n")
            })
            .collect();
        let of = |name: &str, bytes: &[u8]| {
            let series = Series::from_sources(one(name, bytes), &SeriesOptions::new(4, 2)).expect(name);
            (series.words().collect::<Vec<_>>(), series.spec().clone())
        };
        let expected = of("r.jsonl", json.as_bytes());
        for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(Default::default())] {
            assert_eq!(of("r.parquet", &file(compression, &rows())), expected, "{compression:?}");
        }
        assert_eq!(of("r.parquet.gz", &gzip(&file(Compression::SNAPPY, &rows()))), expected);
        let text = |name: &str, bytes: &[u8]| parts(&Text::from_sources(one(name, bytes), &TextOptions::default()).expect(name));
        assert_eq!(text("r.parquet", &file(Compression::SNAPPY, &rows())), text("r.jsonl", json.as_bytes()));
        let options = SequencesOptions { label: Some("units".into()), goal: Goal::Number, ..labelled() };
        let full: Vec<_> = rows().into_iter().filter(|row| row.1.is_some()).collect();
        let read = Sequences::from_sources(one("r.parquet", &file(Compression::SNAPPY, &full)), &options).expect("sequences");
        assert_eq!((read.len(), read.number(1)), (full.len(), full[1].1));
    }

    #[test]
    fn a_blank_label_in_parquet_is_refused_with_its_row() {
        let options = SequencesOptions { label: Some("units".into()), goal: Goal::Number, ..labelled() };
        let error = Sequences::from_sources(one("r.parquet", &file(Compression::SNAPPY, &rows())), &options).expect_err("a blank");
        assert!(error.to_string().contains("r.parquet, row 5: the label 'units' is null"), "{error}");
    }

    #[test]
    fn a_damaged_parquet_file_is_refused_not_a_panic() {
        let whole = file(Compression::SNAPPY, &rows());
        let mut n_refused = 0;
        for at in (0..whole.len()).step_by(3) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x41;
            if let Err(error) = Series::from_sources(one("r.parquet", &bytes), &SeriesOptions::new(4, 2)) {
                assert!(error.is_input() && error.to_string().contains("r.parquet"), "{error}");
                n_refused += 1;
            }
            let _ = Series::from_sources(one("r.parquet", &bytes[..at]), &SeriesOptions::new(4, 2)).expect_err("cut off");
        }
        assert!(n_refused > 20, "{n_refused}");
    }
}

// ---- behind URLs ----

#[test]
#[cfg(not(feature = "remote"))]
fn a_url_is_refused_by_a_build_that_cannot_fetch_it() {
    let folder = tempfile::tempdir().expect("a folder");
    for url in ["s3://bucket/book.txt", "https://localhost/book.txt"] {
        let (code, error, _) = run(folder.path(), &["train", "--data", url], None);
        let message = error["message"].as_str().unwrap_or_default();
        assert!(code == 2 && message.contains(url) && message.contains("--features remote") && message.contains("curl"), "{error}");
    }
}

#[cfg(feature = "remote")]
mod of_urls {
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A server of one file that may change; requests are answered one after the other, and counted by status.
    struct Server {
        port: u16,
        content: Arc<Mutex<(String, Vec<u8>)>>,
        answers: Arc<Mutex<Vec<(String, u16)>>>,
    }

    impl Server {
        fn start(path: &'static str, body: &[u8]) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let port = listener.local_addr().expect("an address").port();
            let content = Arc::new(Mutex::new(("\"one\"".to_string(), body.to_vec())));
            let answers = Arc::new(Mutex::new(Vec::new()));
            let (served, noted) = (Arc::clone(&content), Arc::clone(&answers));
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let Ok(mut stream) = stream else { break };
                    let lines: Vec<String> =
                        BufReader::new(&stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
                    let asked = lines.first().and_then(|line| line.split(' ').nth(1)).unwrap_or_default().to_string();
                    let (tag, body) = served.lock().expect("content").clone();
                    let has = lines.iter().any(|line| line.to_lowercase().starts_with("if-none-match") && line.contains(&tag));
                    let (status, body) = match (asked == path, has) {
                        (false, _) => (404, b"none".to_vec()),
                        (true, true) => (304, Vec::new()),
                        (true, false) => (200, body),
                    };
                    noted.lock().expect("answers").push((asked, status));
                    let head = format!(
                        "HTTP/1.1 {status} X\r\nETag: {tag}\r\nLast-Modified: Sat, 01 Jan 2022 00:00:00 GMT\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                        body.len()
                    );
                    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
                }
            });
            Self { port, content, answers }
        }

        fn statuses(&self) -> Vec<u16> {
            self.answers.lock().expect("answers").iter().map(|(_, status)| *status).collect()
        }
    }

    fn train(folder: &Path, url: &str, settings: &[(&str, String)]) -> (i32, Value, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_carrousel"));
        command.args(["train", "--json", "--task", "forecast", "--horizon", "1", "--data", url]).args(SMALL).current_dir(folder);
        command.env("CARROUSEL_CACHE", folder.join("cache")).env("NO_PROXY", "*").env("no_proxy", "*");
        for proxy in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
            command.env_remove(proxy);
        }
        command.envs(settings.iter().map(|(key, value)| (key, value)));
        let output = command.output().expect("the program");
        let out = String::from_utf8(output.stdout).expect("UTF-8");
        let last = out.lines().last().map_or(Value::Null, |line| serde_json::from_str(line).expect("JSON"));
        (output.status.code().unwrap_or(-1), last, String::from_utf8_lossy(&output.stderr).into_owned())
    }

    #[test]
    fn a_file_behind_http_is_fetched_once_and_again_when_it_has_changed() {
        let folder = tempfile::tempdir().expect("a folder");
        let server = Server::start("/data/d.csv.gz", &gzip(days(40).as_bytes()));
        let url = format!("http://127.0.0.1:{}/data/d.csv.gz", server.port);
        for statuses in [&[200][..], &[200, 304]] {
            let (code, summary, said) = train(folder.path(), &url, &[]);
            assert_eq!((code, summary["status"].as_str()), (0, Some("finished")), "{said}");
            assert_eq!(server.statuses(), statuses);
        }
        *server.content.lock().expect("content") = ("\"two\"".to_string(), gzip(b"date,units\n2024-01-01,x\n"));
        let (code, error, said) = train(folder.path(), &url, &[]);
        assert_eq!((code, server.statuses()), (2, vec![200, 304, 200]), "{said}");
        // Messages name the URL, not the copy.
        assert!(error["message"].as_str().is_some_and(|message| message.contains(&url)), "{error}");
        let (code, error, _) = train(folder.path(), &url.replace("d.csv", "e.csv"), &[]);
        assert!(code == 2 && error["message"].as_str().is_some_and(|message| message.contains("no such file")), "{error}");
        let (code, error, _) = train(folder.path(), &format!("{url}?signature=1"), &[]);
        assert!(
            code == 2 && error["message"].as_str().is_some_and(|message| message.contains("query") && message.contains("curl")),
            "{error}"
        );
    }

    #[test]
    fn a_bucket_is_read_at_the_endpoint_that_the_environment_names() {
        let folder = tempfile::tempdir().expect("a folder");
        let server = Server::start("/bucket/deep/d.csv", days(40).as_bytes());
        let settings = [
            ("AWS_ENDPOINT", format!("http://127.0.0.1:{}", server.port)),
            ("AWS_ALLOW_HTTP", "true".to_string()),
            ("AWS_SKIP_SIGNATURE", "true".to_string()),
        ];
        let (code, summary, said) = train(folder.path(), "s3://bucket/deep/d.csv", &settings);
        assert_eq!((code, summary["status"].as_str()), (0, Some("finished")), "{said}; {summary}");
        assert_eq!(server.statuses(), [200]);
    }
}
