//! Input that is wrong: every case ends with exit code 2 and a message that names the file, the place and the remedy; whatever a file holds,
//! nothing panics.

use std::fs;
use std::io::Write;
use std::path::Path;

use assert_cmd::Command;
use carrousel::data::DataError;
use carrousel::data::sequences::{Goal, Sequences, SequencesOptions};
use carrousel::data::series::{Missing, Series, SeriesOptions};
use carrousel::data::source::{Source, Sources};
use carrousel::data::split::Split;
use carrousel::data::text::{Encoding, Text, TextOptions};
use carrousel::data::vocab::Level;
use proptest::prelude::*;

/// Files, arguments behind `train`, and what the message must hold.
struct Case {
    files: Vec<(&'static str, Vec<u8>)>,
    args: &'static str,
    says: &'static [&'static str],
}

fn case(name: &'static str, bytes: impl Into<Vec<u8>>, args: &'static str, says: &'static [&'static str]) -> Case {
    Case { files: vec![(name, bytes.into())], args, says }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(bytes).and_then(|()| packed.finish()).expect("memory")
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 1).expect("memory")
}

fn damaged(mut bytes: Vec<u8>) -> Vec<u8> {
    let at = bytes.len() - 6;
    bytes[at] ^= 0x55;
    bytes
}

fn cut(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.len() - 9);
    bytes
}

/// Two columns, so many days.
fn days(n: usize) -> String {
    let rows: String = (0..n).map(|i| format!("2024-{:02}-{:02},{}\n", 1 + i / 28, 1 + i % 28, i % 7)).collect();
    format!("date,units\n{rows}")
}

fn cases() -> Vec<Case> {
    let text = "It was the best of times, it was the worst of times.\n".repeat(200);
    let ts = "@problemName x\n@classLabel true a b\n@data\n";
    let series = "--target units --seq-len 4 --horizon 2";
    let labelled = "--task classify";
    vec![
        // texts
        case("empty.txt", "", "", &["empty.txt is empty", "give a file with text"]),
        case("bom.txt", b"\xEF\xBB\xBF".to_vec(), "", &["bom.txt is empty"]),
        case("latin.txt", b"one\ncaf\xE9\n".to_vec(), "", &["latin.txt: line 2, byte 7", "0xE9", "--encoding latin-1"]),
        case("wide.txt", b"\xFF\xFEa\0b\0".to_vec(), "", &["wide.txt: line 1, byte 0", "UTF-16", "iconv"]),
        case("cut.txt", [text.as_bytes(), b"\xE2\x82"].concat(), "", &["cut.txt: line 201", "0xE2", "--level byte"]),
        case("short.txt", "ten chars.", "", &["short.txt", "8 tokens", "51 are needed", "--seq-len"]),
        case("words.txt", "a few words only\n", "--level word", &["words.txt", "tokens", "36 are needed"]),
        case("cut.txt.gz", cut(gzip(text.as_bytes())), "", &["cut.txt.gz", "gzip stream ends too early", "gzip -t"]),
        case("bad.txt.gz", damaged(gzip(text.as_bytes())), "", &["bad.txt.gz", "gzip stream is damaged", "bytes into", "gzip -t"]),
        case("plain.txt.gz", text.clone(), "", &["plain.txt.gz", "neither gzip nor zstd", "rename it"]),
        case("cut.txt.zst", cut(zstd(text.as_bytes())), "", &["cut.txt.zst", "zstd stream", "zstd -t"]),
        case("nothing.txt.gz", gzip(b""), "", &["nothing.txt.gz is empty"]),
        // sources
        Case { files: vec![], args: "--data none.txt", says: &["none.txt", "no such file", "check the path"] },
        Case { files: vec![], args: "--data none*.txt", says: &["none*.txt", "no file matches", "check the folder"] },
        Case {
            files: vec![("one.txt", text.clone().into()), ("two.txt", text.clone().into())],
            args: "--data .",
            says: &["no file name in this folder contains 'train'", "one.txt, two.txt", "name the files train"],
        },
        Case {
            files: vec![("train.txt", text.clone().into()), ("train-test.txt", text.clone().into())],
            args: "--data .",
            says: &["train-test.txt", "more than one of train, valid and test", "rename"],
        },
        // tables
        case("header.csv", "date,units\n", series, &["header.csv, after the header in line 1", "rows of numbers"]),
        case("few.csv", days(5), series, &["few.csv has 5 rows", "6 are needed", "--seq-len or --horizon"]),
        case(
            "short.csv",
            days(30).replacen("2024-01-09,1", "2024-01-09", 1),
            series,
            &["short.csv, line 10: 1 cells", "first line has 2", "cut off?"],
        ),
        case("comma.csv", days(30).replacen(",3\n", ",3,5\n", 1), series, &["comma.csv, line 5: 3 cells", "decimals need a point"]),
        case(
            "word.csv",
            days(30).replacen(",3\n", ",three\n", 1),
            series,
            &["word.csv, line 5, column 'units'", "'three' is not a number", "correct the cell"],
        ),
        case(
            "point.csv",
            days(30).replace(',', ";").replacen(";3\n", ";1.000,3\n", 1),
            series,
            &["point.csv, line 5, column 'units'", "1.000,3", "between thousands"],
        ),
        case(
            "wide.csv",
            [b"\xFF\xFE".to_vec(), days(3).encode_utf16().flat_map(u16::to_le_bytes).collect()].concat(),
            series,
            &["wide.csv: line 1", "UTF-16"],
        ),
        case(
            "either.csv",
            "day,units\n".to_string() + &(1..=12).map(|i| format!("01/{i:02}/2024,{i}\n")).collect::<String>(),
            series,
            &["either.csv, line 3, column 'day'", "'01/02/2024' may begin with the day or with the month", "2001-12-29"],
        ),
        case("infinite.csv", days(30).replacen(",3\n", ",1e999\n", 1), series, &["infinite.csv, line 5, column 'units'", "1e999"]),
        case(
            "order.csv",
            days(30).replacen("2024-01-05", "2023-01-05", 1),
            series,
            &["order.csv, line 6, column 'date'", "comes before", "sort the rows"],
        ),
        case("twice.csv", days(30).replacen("2024-01-05", "2024-01-04", 1), series, &["twice.csv, line 6, column 'date'", "repeats"]),
        case("month.csv", days(30).replacen("2024-01-05", "2024-13-05", 1), series, &["month.csv, line 6, column 'date'", "2024-13-05"]),
        case(
            "blank.csv",
            days(30)
                .replace(",0\n", ",\n")
                .replace(",1\n", ",\n")
                .replace(",2\n", ",\n")
                .replace(",3\n", ",\n")
                .replace(",4\n", ",\n")
                .replace(",5\n", ",\n")
                .replace(",6\n", ",\n"),
            series,
            &["blank.csv, column 'units'", "all 30 cells are blank"],
        ),
        case("name.csv", days(30), "--target unit", &["--target 'unit'", "name.csv", "did you mean 'units'?", "date, units"]),
        case("names.csv", "who,what\na,b\nc,d\n", "--seq-len 1 --horizon 1", &["names.csv", "number"]),
        case("book.csv", b"PK\x03\x04\x00\x00workbook".to_vec(), series, &["book.csv", "line 1", "no table of text", "saved as CSV"]),
        case("latin.csv", [days(3).as_bytes(), b"2024-01-04,\xB5\n"].concat(), series, &["latin.csv: line 5, byte", "0xB5", "iconv"]),
        case("quote.csv", days(30).replacen("2024-01-05,4", "\"2024-01-05,4", 1), series, &["quote.csv, line 6", "quote"]),
        case("tabs.tsv", days(30).replace(',', "\t").replacen("\t3\n", "\t3\t4\n", 1), series, &["tabs.tsv, line 5: 3 cells"]),
        case(
            "gap.csv",
            days(30).replacen("2024-01-05,4\n", "", 1),
            "--target units --seq-len 4 --horizon 2 --missing refuse",
            &["gap.csv, line 6, column 'date'", "4 rows are missing, the first one 2024-01-05", "--missing fill"],
        ),
        Case {
            files: vec![("a.csv", days(30).into()), ("b.csv", "day,pieces\n2025-01-01,3\n".into())],
            args: "--data a.csv --data b.csv --target units",
            says: &["b.csv", "day, pieces", "date, units", "same columns"],
        },
        // records
        case("list.jsonl", "[{\"text\": \"a\"}]", "", &["list.jsonl, line 1", "no JSON object", "one object on each line", "jq"]),
        case(
            "half.jsonl",
            "{\"text\": \"a\"}\n{\"text\": \"b",
            "",
            &["half.jsonl, line 2", "no JSON object", "EOF", "one whole JSON object"],
        ),
        case("twice.jsonl", "{\"text\": \"a\", \"text\": \"b\"}\n", "", &["twice.jsonl, line 1", "'text' stands twice"]),
        case("key.jsonl", "{\"body\": \"a\"}\n", "", &["key.jsonl, line 1", "there is no 'text'; it has body", "--text"]),
        case("kind.jsonl", "{\"text\": \"a\"}\n{\"text\": 3}\n", "", &["kind.jsonl, line 2", "'text' is a number", "--text"]),
        case("blank.jsonl", "\n\n", "", &["blank.jsonl is empty", "JSON object on each line"]),
        case("deep.jsonl", "{\"units\": 1}\n{\"units\": [1]}\n", series, &["deep.jsonl, line 2, column 'units'", "a list where a number"]),
        case("bytes.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"\xFF\"}\n".to_vec(), "", &["bytes.jsonl, line 2", "no JSON object"]),
        case("label.jsonl", "{\"values\": [1, 2]}\n", labelled, &["label.jsonl, line 1", "there is no 'label'", "--label"]),
        case("null.jsonl", "{\"label\": null, \"values\": [1, 2]}\n", labelled, &["null.jsonl, line 1", "the label 'label' is null"]),
        case(
            "steps.jsonl",
            "{\"label\": 1, \"x\": [1, 2], \"y\": [1]}\n",
            labelled,
            &["steps.jsonl, line 1", "'y' has 1 steps, 'x' has 2", "null for blanks"],
        ),
        case(
            "number.jsonl",
            "{\"label\": 1, \"values\": [1, \"b\"]}\n",
            labelled,
            &["number.jsonl, line 1", "step 2 of 'values' is a text", "write numbers"],
        ),
        case(
            "width.jsonl",
            "{\"label\": 1, \"values\": [[1, 2], [3]]}\n",
            labelled,
            &["width.jsonl, line 1", "step 2 of 'values' has 1 numbers, the first has 2"],
        ),
        case(
            "others.jsonl",
            "{\"label\": 1, \"values\": [1]}\n{\"label\": 2, \"text\": \"a\"}\n",
            labelled,
            &["others.jsonl, line 2", "a text", "the first record has dimension1"],
        ),
        case("nothing.jsonl", "{\"label\": 1}\n", labelled, &["nothing.jsonl, line 1", "neither 'text' nor 'values'", "--features"]),
        // sequences
        case("early.ts", "1,2:a\n", "", &["early.ts, line 1", "before @data"]),
        case("labels.ts", "@data\n1,2:a\n", "", &["labels.ts, line 1", "declares no labels", "@classLabel"]),
        case("colon.ts", format!("{ts}1,2,3\n"), "", &["colon.ts, line 4", "no colon", "VALUE,VALUE,...:LABEL"]),
        case("class.ts", format!("{ts}1,2:a\n1,2:c\n"), "", &["class.ts, line 5", "the label 'c' is not among"]),
        case("number.ts", format!("{ts}1,2:a\n1,x:b\n"), "", &["number.ts, line 5", "'x' in dimension 1 is not a number"]),
        case("steps.ts", format!("{ts}1,2:1:a\n"), "", &["steps.ts, line 4", "dimension 2 has 1 steps, the first has 2"]),
        case("widths.ts", format!("{ts}1,2:1,2:a\n1,2:b\n"), "", &["widths.ts, line 5", "1 dimensions, but the first sequence has 2"]),
        case("times.ts", "@timestamps true\n@data\n", "", &["times.ts, line 1", "time stamps are not read"]),
        case("none.ts", ts, "", &["none.ts is empty", "a sequence a line"]),
        case("tab.txt", "a\tone\nb two\n", labelled, &["tab.txt, line 2", "no tab between label and text"]),
        case("label.txt", "a\tone\n\ttwo\n", labelled, &["label.txt, line 2", "the label is blank"]),
        case("text.txt", "a\tone\nb\t\n", labelled, &["text.txt, line 2", "no step"]),
        case("one.txt", "a\tone\na\ttwo\na\tthree\n", labelled, &["one.txt", "one class only", "--task regress"]),
        case("number.txt", "1\tone\ntwo\ttwo\n", "--task regress", &["number.txt, line 2", "'two' is not a number", "--task classify"]),
        case(
            "id.csv",
            "id,x,class\n1,2,a\n,3,a\n2,2,b\n",
            "--sequence id --label class",
            &["id.csv, line 3, column 'id'", "the cell is blank"],
        ),
        case(
            "both.csv",
            "id,x,class\n1,2,a\n1,3,b\n",
            "--sequence id --label class",
            &["both.csv, line 3, column 'class'", "sequence 1 has the label 'a' in line 2"],
        ),
        // configuration
        case("run.toml", "hidden = 3\nlayers = \"two\"\n", "--config run.toml", &["run.toml, line 2"]),
        #[cfg(not(feature = "parquet"))]
        case("any.parquet", "PAR1", "--target x", &["any.parquet", "does not read Parquet", "--features parquet"]),
        #[cfg(feature = "parquet")]
        case("any.parquet", "PAR1 and no more", "--target x", &["any.parquet", "cannot be read as Parquet", "write it again"]),
    ]
}

#[test]
fn what_is_wrong_with_a_file_is_said_with_place_and_remedy_and_code_2() {
    let cases = cases();
    assert!(cases.len() >= 60, "{} cases", cases.len());
    let mut faults = Vec::new();
    for case in cases {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut args: Vec<&str> = vec!["train", "--devices", "cpu:1", "--max-steps", "1"];
        for (name, bytes) in &case.files {
            fs::write(folder.path().join(name), bytes).expect("a file in a temporary folder");
            if !case.args.contains("--data") && !name.ends_with(".toml") {
                args.extend(["--data", name]);
            }
        }
        args.extend(case.args.split_whitespace());
        let output = Command::new(env!("CARGO_BIN_EXE_carrousel")).args(&args).current_dir(&folder).output().expect("the program");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let missing: Vec<_> = case.says.iter().filter(|part| !said.contains(**part)).collect();
        let left = Path::new("runs");
        if output.status.code() != Some(2) || !missing.is_empty() || said.contains("panic") || folder.path().join(left).exists() {
            faults.push(format!("{args:?}: code {:?}, lacks {missing:?}: {said}", output.status.code()));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

// ---- whatever a file holds ----

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

/// Every way to read a file of this name. What is refused names the file.
fn read_as(name: &str, bytes: &[u8]) {
    let source = || Sources::Whole(vec![Source::from_bytes(name, bytes)]);
    let of_columns = SequencesOptions { sequence: Some("id".into()), label: Some("class".into()), ..options(Goal::Class) };
    let text = |level| TextOptions { level, split: Split { train: 1.0, valid: 0.0, test: 0.0 }, ..TextOptions::default() };
    let errors: Vec<Option<DataError>> = vec![
        Series::from_sources(source(), &SeriesOptions::new(2, 1)).err(),
        Sequences::from_sources(source(), &options(Goal::Class)).err(),
        Sequences::from_sources(source(), &options(Goal::Number)).err(),
        Sequences::from_sources(source(), &of_columns).err(),
        Text::from_sources(source(), &text(Level::Char)).err(),
        Text::from_sources(source(), &text(Level::Word)).err(),
        Text::from_sources(source(), &text(Level::Byte)).err(),
    ];
    for error in errors.into_iter().flatten() {
        let message = error.to_string();
        assert!(error.is_input() && message.contains(name), "{message}");
    }
}

const NAMES: [&str; 9] = ["f.csv", "f.tsv", "f.ts", "f.jsonl", "f.txt", "f.csv.gz", "f.txt.zst", "f", "f.parquet"];

/// Files that are right.
fn right() -> Vec<Vec<u8>> {
    let table = "id,x,class\n1,2,a\n1,3,a\n2,2,b\n2,,b\n3,1.5,a\n3,NA,a\n".to_string();
    let ts = "@classLabel true a b\n@data\n1,2:3,4:a\n1,?,3:1,2,3:b\n".to_string();
    let json = "{\"label\": \"a\", \"values\": [[1, 2], [3, null]]}\n{\"label\": \"b\", \"values\": [[1, 2]]}\n".to_string();
    let lines = "a\tone two\nb\tthree\n".to_string();
    let mut all: Vec<Vec<u8>> = vec![days(20).into(), table.into(), ts.into(), json.into(), lines.into()];
    all.push(gzip(days(20).as_bytes()));
    all.push(zstd(days(20).as_bytes()));
    all
}

#[derive(Clone, Debug)]
enum Edit {
    Put(usize, u8),
    Insert(usize, Vec<u8>),
    Delete(usize, usize),
    Repeat(usize, usize),
}

fn edit() -> impl Strategy<Value = Edit> {
    let special = prop::sample::select(b",;\t\n\r\":@#{}[]?-0e.\0\xEF\xFF '".to_vec());
    prop_oneof![
        (any::<usize>(), special.clone()).prop_map(|(at, byte)| Edit::Put(at, byte)),
        (any::<usize>(), any::<u8>()).prop_map(|(at, byte)| Edit::Put(at, byte)),
        (any::<usize>(), prop::collection::vec(special, 1..4)).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        (any::<usize>(), 1..30_usize).prop_map(|(at, n)| Edit::Delete(at, n)),
        (any::<usize>(), 1..30_usize).prop_map(|(at, n)| Edit::Repeat(at, n)),
    ]
}

fn apply(bytes: &mut Vec<u8>, edit: &Edit) {
    let n = bytes.len();
    let place = |at: usize| at % (n + 1);
    match edit {
        Edit::Put(at, byte) if n > 0 => bytes[at % n] = *byte,
        Edit::Put(..) => {}
        Edit::Insert(at, new) => drop(bytes.splice(place(*at)..place(*at), new.iter().copied())),
        Edit::Delete(at, len) => drop(bytes.drain(place(*at)..(place(*at) + len).min(n))),
        Edit::Repeat(at, len) => {
            let piece = bytes[place(*at)..(place(*at) + len).min(n)].to_vec();
            drop(bytes.splice(place(*at)..place(*at), piece));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_read_or_refused(name in prop::sample::select(NAMES.to_vec()), bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        read_as(name, &bytes);
    }

    #[test]
    fn right_files_with_faults_are_read_or_refused(name in prop::sample::select(NAMES.to_vec()), which in 0..7_usize, edits in prop::collection::vec(edit(), 0..5)) {
        let mut bytes = right()[which].clone();
        edits.iter().for_each(|edit| apply(&mut bytes, edit));
        read_as(name, &bytes);
    }
}
