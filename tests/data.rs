//! Claims about `data`: what is read, what is refused and how, and in which order it is trained on.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;

use carrousel::data::baselines::{Scorer, baselines};
use carrousel::data::prefetch::Prefetch;
use carrousel::data::series::{Missing, Order, Part, Relative, Series, SeriesBatches, SeriesOptions, SeriesSpec};
use carrousel::data::split::Split;
use carrousel::data::text::{Encoding, Text, TextBatches, TextEval, TextOptions, load_tokens};
use carrousel::data::tokens::Tokens;
use carrousel::data::vocab::{EOS, Level, UNK, Vocab};
use carrousel::data::{Batch, Batches, DataError, Input, Target, builtin};
use proptest::prelude::*;

fn tokens(n: usize) -> Tokens {
    (0..n as u32).collect()
}

fn all(tokens: &Tokens) -> Vec<u32> {
    tokens.to_vec().expect("tokens")
}

fn token_parts(batch: &Batch) -> (&[u32], &[u32]) {
    match (&batch.input, &batch.target) {
        (Input::Tokens(input), Target::Tokens(target)) => (input, target),
        _ => panic!("not a batch of tokens"),
    }
}

fn value_parts(batch: &Batch) -> (&[f32], &[f32]) {
    match (&batch.input, &batch.target) {
        (Input::Values { values, .. }, Target::Values { values: targets, .. }) => (values, targets),
        _ => panic!("not a batch of values"),
    }
}

/// Writes files to a folder that lives as long as the result.
fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).expect("a file in a temporary folder");
    }
    folder
}

fn path(folder: &tempfile::TempDir, name: &str) -> String {
    folder.path().join(name).display().to_string()
}

fn text_of(files: &[(&str, &[u8])], data: &str, options: &TextOptions) -> Result<Text, DataError> {
    let folder = folder(files);
    Text::load(&[path(&folder, data)], options)
}

fn series_of(csv: &str, options: &SeriesOptions) -> Result<Series, DataError> {
    Series::from_csv("x.csv", csv.as_bytes(), options)
}

/// Rows `date,value` from 1 January 2001 on, a day apart.
fn daily(n: usize, value: impl Fn(usize) -> String) -> String {
    let first = jiff::civil::date(2001, 1, 1);
    let mut csv = "date,value\n".to_string();
    for i in 0..n {
        let day = first.checked_add(jiff::Span::new().days(i as i64)).expect("a date");
        csv.push_str(&format!("{day},{}\n", value(i)));
    }
    csv
}

fn assert_says(error: &DataError, wanted: &[&str]) {
    let message = error.to_string();
    for part in wanted {
        assert!(message.contains(part), "the message lacks {part:?}: {message}");
    }
    assert!(!message.ends_with('.'), "{message}");
    assert!(error.is_input(), "{message}");
}

// ---- batches ----

#[test]
fn shares_of_a_batch_hold_all_rows_once_with_their_own_weights() {
    let text = TextEval::new(tokens(23), 5, 4).expect("streams");
    let whole = text.batch(0, text.n_batches() - 1).expect("a batch");
    let shares = [whole.rows(0..2), whole.rows(2..2), whole.rows(2..5)];
    assert_eq!(shares.iter().map(|s| s.weight).sum::<f64>(), whole.weight);
    assert_eq!(shares.iter().map(|s| s.n_tokens).sum::<u64>(), whole.n_tokens);
    assert_eq!((shares[1].n_rows, shares[1].weight, shares[1].n_tokens), (0, 0.0, 0));
    assert_eq!(shares.iter().flat_map(|s| s.streams.clone()).collect::<Vec<_>>(), whole.streams);
    let (input, target) = token_parts(&whole);
    for (share, first) in [(&shares[0], 0), (&shares[2], 2)] {
        let (own_input, own_target) = token_parts(share);
        for t in 0..whole.n_steps {
            for r in 0..share.n_rows {
                let (own, of_whole) = (t * share.n_rows + r, t * whole.n_rows + first + r);
                assert_eq!(
                    (own_input[own], own_target[own], share.weights[own]),
                    (input[of_whole], target[of_whole], whole.weights[of_whole])
                );
            }
        }
    }
}

#[test]
fn shares_of_windows_keep_features_and_outputs_together() {
    let csv = "a,b\n".to_string() + &(0..30).map(|i| format!("{},{}\n", i * i % 17, (i * 7) % 11)).collect::<String>();
    let options = SeriesOptions {
        target: vec!["a".into(), "b".into()],
        split: Split { train: 1.0, valid: 0.0, test: 0.0 },
        ..SeriesOptions::new(4, 3)
    };
    let series = Arc::new(series_of(&csv, &options).expect("a series"));
    let batches = SeriesBatches::new(series.clone(), Part::Train, 5, Order::InTime).expect("batches");
    let whole = batches.batch(0, 0).expect("a batch");
    let share = whole.rows(3..5);
    let alone = SeriesBatches::new(series, Part::Train, 1, Order::InTime).expect("batches");
    let joined = [alone.batch(0, 3).expect("a batch"), alone.batch(0, 4).expect("a batch")];
    for (row, one) in joined.iter().enumerate() {
        let cut = share.rows(row..row + 1);
        assert_eq!(&cut, one);
    }
    assert_eq!((share.n_tokens, share.weight), (8, 12.0));
}

// ---- text: order ----

#[test]
fn training_streams_follow_the_text_and_carry_from_window_to_window() {
    let text = TextBatches::new("x", tokens(47), 4, 5).expect("streams");
    assert_eq!((text.stream_len(), text.n_left_out(), text.n_batches()), (11, 3, 3));
    let mut rows = vec![Vec::new(); 4];
    for idx in 0..text.n_batches() {
        let batch = text.batch(7, idx).expect("a batch");
        assert_eq!(batch, text.batch(0, idx).expect("a batch"), "the order does not depend on the epoch");
        assert_eq!((batch.resets, batch.carries), (idx == 0, true));
        assert_eq!(batch.n_steps, if idx == 2 { 1 } else { 5 });
        assert_eq!(batch.n_tokens as usize, batch.n_steps * 4);
        let (input, target) = token_parts(&batch);
        for t in 0..batch.n_steps {
            for r in 0..4 {
                rows[r].push(input[t * 4 + r]);
                assert_eq!(target[t * 4 + r], input[t * 4 + r] + 1);
            }
        }
    }
    for (r, row) in rows.iter().enumerate() {
        assert_eq!(*row, (r as u32 * 11..r as u32 * 11 + 11).collect::<Vec<_>>());
    }
}

proptest! {
    #[test]
    fn training_reads_every_token_of_the_streams_once(n in 2usize..300, streams in 1usize..12, window in 1usize..40) {
        prop_assume!(n > window && n >= 2 * streams);
        let text = TextBatches::new("x", tokens(n), streams, window).expect("streams");
        let mut seen = vec![0; n];
        let mut weight = 0.0;
        for idx in 0..text.n_batches() {
            let batch = text.batch(0, idx).expect("a batch");
            prop_assert!(batch.weight > 0.0);
            weight += batch.weight;
            let (input, target) = token_parts(&batch);
            for ((&i, &t), &w) in input.iter().zip(target).zip(&batch.weights) {
                seen[i as usize] += 1;
                prop_assert!(w == 0.0 || t == i + 1);
            }
        }
        let used = n - text.n_left_out();
        let inputs = used.min(n - usize::from(streams == 1));
        prop_assert!(seen[..inputs].iter().all(|&k| k == 1) && seen[inputs..].iter().all(|&k| k == 0));
        prop_assert_eq!(weight as usize, used.min(n - 1));
        prop_assert!(text.n_left_out() < streams);
    }

    #[test]
    fn evaluation_scores_every_token_but_the_first_exactly_once(n in 0usize..300, streams in 1usize..12, window in 1usize..40) {
        let text = TextEval::new(tokens(n), streams, window).expect("streams");
        let mut seen = vec![0; n];
        let mut rows = vec![Vec::new(); text.n_streams()];
        for idx in 0..text.n_batches() {
            let batch = text.batch(0, idx).expect("a batch");
            prop_assert_eq!(batch.weight, batch.n_tokens as f64);
            let (input, target) = token_parts(&batch);
            for (at, &w) in batch.weights.iter().enumerate() {
                if w > 0.0 {
                    seen[target[at] as usize] += 1;
                    prop_assert_eq!(target[at], input[at] + 1);
                    rows[at % batch.n_rows].push(target[at]);
                }
            }
        }
        prop_assert!(seen.iter().skip(1).all(|&k| k == 1), "{:?}", seen);
        prop_assert!(seen.first().is_none_or(|&k| k == 0));
        // Streams are pieces of the text, in order, and differ by at most one token.
        let joined: Vec<u32> = rows.concat();
        prop_assert_eq!(joined, (1..n.max(1) as u32).collect::<Vec<_>>());
        let lens: Vec<usize> = rows.iter().map(Vec::len).collect();
        prop_assert!(lens.iter().max().unwrap() - lens.iter().min().unwrap() <= 1);
    }
}

#[test]
fn one_evaluation_stream_reads_the_text_as_it_stands() {
    let text = TextEval::new(tokens(10), 1, 4).expect("a stream");
    assert_eq!(text.n_batches(), 3);
    let steps: Vec<usize> = (0..3).map(|idx| text.batch(0, idx).expect("a batch").n_steps).collect();
    assert_eq!(steps, [4, 4, 1]);
    assert!(text.batch(0, 0).expect("a batch").resets && !text.batch(0, 1).expect("a batch").resets);
}

// ---- text: reading ----

#[test]
fn one_file_is_cut_into_validation_training_test_in_this_order() {
    let text: String = (0..100).map(|i| char::from(b'a' + (i / 4) as u8)).collect();
    let read = text_of(&[("t.txt", text.as_bytes())], "t.txt", &TextOptions::default()).expect("text");
    let decode = |part: &Tokens| read.vocab.decode(&all(part));
    assert_eq!((read.valid.len(), read.train.len(), read.test.len()), (5, 85, 10));
    assert_eq!(decode(&read.valid) + &decode(&read.train) + &decode(&read.test), text);
    // Characters that occur only outside the training part have entries of their own.
    assert_eq!((read.vocab.size(), read.vocab.unk()), (25, None));
}

#[test]
fn a_folder_gives_parts_by_name_and_validation_from_the_end_of_training_without_a_file() {
    let train: String = (0..180).map(|i| char::from(b'a' + (i % 26) as u8)).collect();
    let files: [(&str, &[u8]); 3] = [("my.TRAIN.txt", train.as_bytes()), ("my.test.txt", b"xyz"), ("README", b"not read")];
    let folder = folder(&files);
    let data = [folder.path().display().to_string()];
    let read = Text::load(&data, &TextOptions::default()).expect("text");
    assert_eq!((read.train.len(), read.valid.len(), read.test.len()), (170, 10, 3));
    assert_eq!(read.vocab.decode(&all(&read.valid)), train[170..]);
    fs::write(folder.path().join("my.dev.txt"), "abba").expect("a file");
    let read = Text::load(&data, &TextOptions::default()).expect("text");
    assert_eq!((read.train.len(), read.valid.len()), (180, 4));
    // Evaluation of a folder takes its test files.
    assert_eq!(load_tokens(&data, &read.vocab, &TextOptions::default()).expect("tokens").len(), 3);
}

#[test]
fn globs_and_repeated_files_are_read_in_order() {
    let folder = folder(&[("b1.txt", b"two "), ("b0.txt", b"one "), ("c.txt", b"three")]);
    let data = [path(&folder, "b*.txt"), path(&folder, "c.txt")];
    let options = TextOptions { split: Split { train: 1.0, valid: 0.0, test: 0.0 }, ..TextOptions::default() };
    let read = Text::load(&data, &options).expect("text");
    assert_eq!(read.vocab.decode(&all(&read.train)), "one two three");
}

#[test]
fn words_follow_the_convention_of_the_penn_treebank() {
    let files: [(&str, &[u8]); 3] =
        [("ptb.train.txt", b" the cat <unk> \n the dog \n"), ("ptb.valid.txt", b" the bird \n"), ("ptb.test.txt", b"a cat")];
    let folder = folder(&files);
    let options = TextOptions { level: Level::Word, ..TextOptions::default() };
    let read = Text::load(&[folder.path().display().to_string()], &options).expect("text");
    // <unk>, <eos>, the, cat, dog: the literal <unk> of the text is the entry, words of the other parts have none.
    assert_eq!(read.vocab.size(), 5);
    assert_eq!(read.train.len(), 7);
    assert_eq!(read.vocab.decode(&all(&read.train)), "the cat <unk>\nthe dog\n");
    assert_eq!(all(&read.train)[2], read.vocab.unk().expect("unk"));
    assert_eq!(read.vocab.decode(&all(&read.valid)), "the <unk>\n");
    assert_eq!(read.vocab.decode(&all(&read.test)), "<unk> cat\n", "a last line without a line end ends too");
    assert_eq!(all(&read.train)[3], read.vocab.eos().expect("eos"));
}

#[test]
fn crlf_and_byte_order_mark_change_nothing_for_words_and_characters() {
    for level in [Level::Word, Level::Char] {
        let options = TextOptions { level, split: Split { train: 1.0, valid: 0.0, test: 0.0 }, ..TextOptions::default() };
        let plain = text_of(&[("t", "ä b\n\nc d\n".as_bytes())], "t", &options).expect("text");
        let dos = text_of(&[("t", "\u{FEFF}ä b\r\n\r\nc d\r\n".as_bytes())], "t", &options).expect("text");
        assert_eq!((all(&plain.train), &plain.vocab), (all(&dos.train), &dos.vocab));
    }
}

#[test]
fn a_limit_keeps_the_most_frequent_entries_and_maps_the_rest_to_unk() {
    let options = TextOptions {
        level: Level::Word,
        vocab_limit: Some(4),
        split: Split { train: 1.0, valid: 0.0, test: 0.0 },
        ..TextOptions::default()
    };
    let read = text_of(&[("t", b"b a b c a b d")], "t", &options).expect("text");
    assert_eq!(read.vocab.size(), 4);
    assert_eq!(read.vocab.decode(&all(&read.train)), "b a b <unk> a b <unk>\n");
    let options = TextOptions { level: Level::Char, vocab_limit: Some(3), ..options };
    let read = text_of(&[("t", b"aaabbc d")], "t", &options).expect("text");
    assert_eq!((read.vocab.size(), read.vocab.unk().is_some()), (3, true));
    assert_eq!(read.vocab.decode(&all(&read.train)), "aaabb<unk><unk><unk>");
}

#[test]
fn bytes_take_any_file() {
    let bytes: Vec<u8> = (0..=255).collect();
    let options = TextOptions { level: Level::Byte, split: Split { train: 1.0, valid: 0.0, test: 0.0 }, ..TextOptions::default() };
    let read = text_of(&[("t", &bytes)], "t", &options).expect("bytes");
    assert_eq!((read.vocab.size(), all(&read.train)), (256, (0..256).collect()));
}

#[test]
fn latin_1_is_read_when_asked_for() {
    let options = TextOptions { encoding: Encoding::Latin1, split: Split { train: 1.0, valid: 0.0, test: 0.0 }, ..TextOptions::default() };
    let read = text_of(&[("t", b"caf\xE9")], "t", &options).expect("text");
    assert_eq!(read.vocab.decode(&all(&read.train)), "café");
}

#[test]
fn vocabularies_survive_the_run_folder() {
    let words = Vocab::words(["b", "a", "b", EOS, UNK], None).expect("words");
    for vocab in [Vocab::bytes(), Vocab::chars("héllo\n", None).expect("characters"), words] {
        let json = serde_json::to_string(&vocab).expect("json");
        let back: Vocab = serde_json::from_str(&json).expect("a vocabulary");
        assert_eq!(back, vocab);
        let prompt = "b a";
        if vocab.level() != Level::Char {
            assert_eq!(back.decode(&back.encode_prompt(prompt).expect("tokens")), prompt);
        }
    }
}

#[test]
fn a_damaged_vocabulary_is_refused() {
    for json in [
        r#"{"level":"char","entries":[]}"#,
        r#"{"level":"char","entries":["a","a"]}"#,
        r#"{"level":"char","entries":["ab"]}"#,
        r#"{"level":"word","entries":["a"]}"#,
        r#"{"level":"byte","entries":["a"]}"#,
    ] {
        let error = serde_json::from_str::<Vocab>(json).expect_err(json);
        assert!(error.to_string().contains("vocabulary is damaged"), "{error}");
    }
}

#[test]
fn a_prompt_keeps_its_last_line_open_and_unknown_words_become_unk() {
    let vocab = Vocab::words(["to", "be"], None).expect("words");
    assert_eq!(vocab.decode(&vocab.encode_prompt("to be\nor to").expect("tokens")), "to be\n<unk> to");
    assert!(vocab.encode_prompt("").expect("nothing").is_empty());
}

// ---- text: refused ----

#[test]
fn text_that_cannot_be_used_is_refused_with_place_and_remedy() {
    let chars = TextOptions::default();
    let words = TextOptions { level: Level::Word, ..TextOptions::default() };
    let bytes = TextOptions { level: Level::Byte, ..TextOptions::default() };
    let cases: Vec<(&str, &[u8], &TextOptions, Vec<&str>)> = vec![
        ("e.txt", b"", &chars, vec!["e.txt", "is empty"]),
        ("e.txt", b"", &bytes, vec!["e.txt", "is empty"]),
        ("bom.txt", b"\xEF\xBB\xBF", &words, vec!["bom.txt", "is empty"]),
        ("l.txt", b"caf\xE9 au lait", &chars, vec!["l.txt", "byte 3", "0xE9", "--encoding latin-1", "--level byte"]),
        ("l.txt", b"\xEF\xBB\xBFcaf\xE9", &words, vec!["l.txt", "byte 6", "0xE9"]),
        ("u.txt", b"\xFF\xFEa\0", &chars, vec!["u.txt", "byte 0", "0xFF", "UTF-16"]),
        ("z.gz", b"\x1F\x8B\x08\0", &chars, vec!["z.gz", "gzip", "gzip -t"]),
    ];
    for (name, content, options, wanted) in cases {
        assert_says(&text_of(&[(name, content)], name, options).expect_err(name), &wanted);
    }
    let limited = TextOptions { vocab_limit: Some(10), ..bytes };
    assert_says(&text_of(&[("t", b"abc")], "t", &limited).expect_err("a limit"), &["--vocab 10", "256", "--level char"]);
}

#[test]
fn sources_that_do_not_exist_are_refused_with_their_names() {
    let folder = folder(&[("a.txt", b"abc"), ("train.test.txt", b"abc")]);
    let load = |data: String| Text::load(&[data], &TextOptions::default()).expect_err("no such data");
    assert_says(&load(path(&folder, "b.txt")), &["b.txt", "no such file"]);
    assert_says(&load(path(&folder, "*.csv")), &["*.csv", "no file matches"]);
    assert_says(&load(folder.path().display().to_string()), &["train.test.txt", "more than one of train, valid and test"]);
    fs::remove_file(folder.path().join("train.test.txt")).expect("removed");
    assert_says(&load(folder.path().display().to_string()), &["contains 'train'", "a.txt", "name one file"]);
    assert_says(&Text::load(&[], &TextOptions::default()).expect_err("nothing"), &["nothing was given"]);
}

#[test]
fn text_shorter_than_a_window_is_refused_with_both_numbers() {
    let error = TextBatches::new("t.txt", tokens(50), 1, 50).expect_err("too short");
    assert_says(&error, &["t.txt", "50 tokens", "51", "--seq-len"]);
    let error = TextBatches::new("t.txt", tokens(50), 30, 10).expect_err("too short");
    assert_says(&error, &["t.txt", "50 tokens", "60", "30 streams", "--batch-size"]);
    assert_says(&TextBatches::new("t", tokens(50), 0, 10).expect_err("no streams"), &["--batch-size 0"]);
    assert_says(&TextEval::new(tokens(50), 1, 0).expect_err("no window"), &["--seq-len 0"]);
}

#[test]
fn a_character_that_the_vocabulary_lacks_is_named() {
    let vocab = Vocab::chars("abc\n", None).expect("characters");
    let error = vocab.encode_prompt("abXa").expect_err("X");
    assert_says(&error, &["prompt, character 3", "'X'", "U+0058", "4 characters"]);
    let folder = folder(&[("new.txt", b"abc\nabc\nab7")]);
    let error = load_tokens(&[path(&folder, "new.txt")], &vocab, &TextOptions::default()).expect_err("7");
    assert_says(&error, &["new.txt", "line 3", "'7'", "--level byte"]);
}

#[test]
fn splits_that_make_no_sense_are_refused() {
    assert_eq!("0.72, 0.08,0.2".parse::<Split>().expect("a split"), Split { train: 0.72, valid: 0.08, test: 0.2 });
    for (text, wanted) in [
        ("0.8,0.1", "2 given"),
        ("0.8,0.1,x", "'x'"),
        ("0.8,0.1,0.2", "add up to 1.1"),
        ("0,0.5,0.5", "training"),
        ("1.5,-0.5,0", "0 to 1"),
    ] {
        assert_says(&text.parse::<Split>().expect_err(text), &["--split", wanted, "0.85,0.05,0.1"]);
    }
}

#[test]
fn a_split_cuts_whole_numbers_exactly() {
    assert_eq!(Split { train: 0.72, valid: 0.08, test: 0.2 }.cuts(100), (72, 80));
    assert_eq!(Split { train: 0.72, valid: 0.08, test: 0.2 }.cuts(2284), (1645, 1828));
    assert_eq!(Split { train: 1.0, valid: 0.0, test: 0.0 }.cuts(7), (7, 7));
}

// ---- series: reading ----

#[test]
fn delimiters_and_headers_are_recognised() {
    for delimiter in [",", ";", "\t", "|"] {
        let rows: Vec<String> =
            (1..=40).map(|i| ["2001-01-01".to_string(), format!("{}.5", i * i % 7), i.to_string()].join(delimiter)).collect();
        let rows: Vec<String> = rows
            .iter()
            .enumerate()
            .map(|(i, row)| {
                row.replace("2001-01-01", &format!("2001-{:02}-01", i % 12 + 1)).replacen("2001", &(2001 + i / 12).to_string(), 1)
            })
            .collect();
        let body = rows.join("\n");
        let header = ["when", "a", "b"].join(delimiter);
        let options = SeriesOptions::new(3, 2);
        let with = series_of(&format!("{header}\n{body}\n"), &options).expect("a series");
        let without = series_of(&body.replace('\n', "\r\n"), &options).expect("a series");
        let names = |series: &Series| series.spec().inputs.iter().map(|c| c.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&with), ["a", "b"]);
        assert_eq!(names(&without), ["column2", "column3"]);
        assert_eq!((with.n_rows(), without.n_rows()), (40, 40));
        assert_eq!(with.spec().targets, [1], "the last column is the target");
        assert_eq!(with.time_after(1), "2004-05-01");
    }
}

#[test]
fn the_time_column_is_recognised_and_goes_on_in_its_own_style() {
    // Name, times, times after them, rows of a season.
    type Case<'a> = (&'a str, &'a [&'a str], &'a [&'a str], Option<usize>);
    let cases: [Case; 18] = [
        ("date", &["2001-12-15", "2001-12-22", "2001-12-29"], &["2002-01-05", "2002-01-12"], Some(52)),
        ("date", &["20011215", "20011222", "20011229"], &["20020105", "20020112"], Some(52)),
        ("m", &["2001-10", "2001-11", "2001-12"], &["2002-01", "2002-02"], Some(12)),
        ("d", &["2001/01/31", "2001/02/28", "2001/03/31"], &["2001/04/30", "2001/05/31"], Some(12)),
        ("d", &["2001-01-01", "2001-04-01", "2001-07-01"], &["2001-10-01", "2002-01-01"], Some(4)),
        ("t", &["2011-12-31T23:00:00Z", "2011-12-31T23:30:00Z", "2012-01-01T00:00:00Z"], &["2012-01-01T00:30:00Z"], Some(48)),
        ("t", &["2011-12-31 22:00", "2011-12-31 23:00", "2012-01-01 00:00"], &["2012-01-01 01:00"], Some(24)),
        (
            "t",
            &["2011-03-27T01:30:00+01:00", "2011-03-27T03:00:00+02:00", "2011-03-27T03:30:00+02:00"],
            &["2011-03-27T04:00:00+02:00"],
            Some(48),
        ),
        ("time", &["1949", "1949.08333333333", "1949.16666666667", "1949.25"], &["1949.33333333333"], Some(12)),
        ("time", &["1958.21", "1958.29", "1958.38", "1958.46"], &["1958.54"], Some(12)),
        ("year", &["1949", "1950", "1951"], &["1952", "1953"], None),
        ("date", &["2001-01-01", "2001-01-02", "2001-01-03"], &["2001-01-04"], Some(7)),
        (
            "date",
            &["2001-01-04", "2001-01-05", "2001-01-08", "2001-01-09"],
            &["2001-01-10", "2001-01-11", "2001-01-12", "2001-01-15"],
            Some(5),
        ),
        ("Datum", &["29.12.2001", "30.12.2001", "31.12.2001"], &["01.01.2002"], Some(7)),
        ("date", &["12/29/2001", "12/30/2001", "12/31/2001"], &["01/01/2002"], Some(7)),
        ("d", &["29-1-2001", "30-1-2001", "31-1-2001"], &["1-2-2001"], Some(7)),
        ("t", &["1/9/2001 22:00", "1/9/2001 23:00", "1/10/2001 0:00"], &["1/10/2001 1:00"], Some(24)),
        ("t", &["31.12.2001 23:30:00", "01.01.2002 00:00:00", "01.01.2002 00:30:00"], &["01.01.2002 01:00:00"], Some(48)),
    ];
    for (name, times, after, season) in cases {
        let csv = format!("{name},y\n") + &times.iter().enumerate().map(|(i, t)| format!("{t},{}\n", i * i)).collect::<String>();
        let options = SeriesOptions { split: Split { train: 1.0, valid: 0.0, test: 0.0 }, ..SeriesOptions::new(2, 1) };
        let series = series_of(&csv, &options).unwrap_or_else(|e| panic!("{csv}{e}"));
        assert!(series.warnings().is_empty(), "{:?}", series.warnings());
        assert_eq!(series.spec().inputs.len(), 1, "{csv}");
        assert_eq!(series.n_rows(), times.len());
        let said: Vec<String> = (0..times.len()).map(|row| series.time_at(row)).collect();
        if !times[0].contains("+01") {
            assert_eq!(said, times);
        }
        assert_eq!((1..=after.len()).map(|n| series.time_after(n)).collect::<Vec<_>>(), after, "{csv}");
        assert_eq!(series.time_at(times.len()), after[0]);
        assert_eq!(series.spec().season.map(|s| s.steps), season, "{csv}");
    }
}

#[test]
fn a_column_that_numbers_the_rows_is_no_feature_and_words_are_left_out() {
    let csv = "rownames,time,value,flag,note\n".to_string()
        + &(0..40).map(|i| format!("{},{},{},{},x{i}\n", i + 1, 1749.0 + i as f64 / 12.0, i % 5, i % 2 == 0)).collect::<String>();
    let series = series_of(&csv.replace("true", "TRUE"), &SeriesOptions::new(4, 1)).expect("a series");
    let names: Vec<&str> = series.spec().inputs.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names, ["value", "flag"]);
    assert_eq!(series.spec().target_columns().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["value"]);
    assert!(series.warnings()[0].contains("left out: note"), "{:?}", series.warnings());
}

#[test]
fn dates_that_cannot_be_read_or_may_be_two_days_are_told() {
    let csv =
        |date: &dyn Fn(usize) -> String| "when,y\n".to_string() + &(1..=11).map(|i| format!("{},{}\n", date(i), i % 3)).collect::<String>();
    let options = SeriesOptions { split: Split { train: 1.0, valid: 0.0, test: 0.0 }, ..SeriesOptions::new(2, 1) };
    let short = series_of(&csv(&|i| format!("{:02}.12.01", i)), &options).expect("a series without dates");
    assert_eq!(short.time_after(1), "12");
    let said = &short.warnings()[0];
    assert!(["'when'", "01.12.01", "no season", "2001-12-29"].iter().all(|part| said.contains(part)), "{said}");
    // The first of eleven months, or eleven days of January.
    let either = csv(&|i| format!("01/{i:02}/2001"));
    let refused = series_of(&either, &options).expect_err("either");
    assert_says(&refused, &["x.csv", "line 3", "'when'", "01/02/2001", "the day or with the month", "2001-12-29"]);
    // A run knows what its own file told.
    let days = series_of(&csv(&|i| format!("{:02}/05/2001", i + 4)), &options).expect("days");
    assert_eq!(days.time_after(1), "16/05/2001");
    let newer = Series::from_csv_with("x.csv", csv(&|i| format!("{i:02}/11/2001")).as_bytes(), days.spec()).expect("days");
    assert_eq!(newer.time_after(1), "12/11/2001");
}

#[test]
fn features_are_those_named_and_the_targets() {
    let csv = "a,b,c,d\n".to_string() + &(0..40).map(|i| format!("{},{},{},{}\n", i % 3, i % 5, i % 7, i % 11)).collect::<String>();
    let options = SeriesOptions { target: vec!["d".into(), "a".into()], features: vec!["C".into()], ..SeriesOptions::new(4, 2) };
    let series = series_of(&csv, &options).expect("a series");
    assert_eq!(series.spec().inputs.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["a", "c", "d"]);
    assert_eq!(series.spec().target_columns().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["d", "a"]);
    assert_eq!((series.spec().n_features(), series.spec().n_outputs()), (3, 4));
    // Step after step, the targets in order.
    let truth: Vec<f64> = series.truth(10).into_iter().flatten().collect();
    assert_eq!(truth, [0.0, 2.0, 1.0, 0.0]);
}

#[test]
fn blanks_are_filled_from_before_only_and_never_scored() {
    let csv = "a,b\nNA,1\n2,\n,3\n4,NaN\n5,5\n6,6\n7,7\n8,8\n";
    let options =
        SeriesOptions { relative: Relative::None, split: Split { train: 1.0, valid: 0.0, test: 0.0 }, ..SeriesOptions::new(2, 2) };
    let series = series_of(csv, &options).expect("a series");
    // The first row goes, since `a` is not known yet.
    assert_eq!(series.n_rows(), 7);
    assert!(series.warnings()[0].contains("first 1 rows"), "{:?}", series.warnings());
    assert_eq!((0..7).map(|row| series.value(row, 0)).collect::<Vec<_>>(), [1.0, 3.0, 3.0, 5.0, 6.0, 7.0, 8.0]);
    let batches = SeriesBatches::new(Arc::new(series), Part::Train, 8, Order::InTime).expect("batches");
    let batch = batches.batch(0, 0).expect("a batch");
    assert_eq!(batch.streams, [1, 2, 3, 4]);
    assert_eq!(batch.weights, [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
    assert_eq!(batch.weight, 7.0);
}

#[test]
fn rows_that_the_file_leaves_out_count_as_blanks() {
    let csv = "date,y\n2001-01-01,1\n2001-01-02,2\n2001-01-03,3\n2001-01-05,5\n2001-01-06,6\n2001-01-07,7\n";
    let options = SeriesOptions { split: Split { train: 1.0, valid: 0.0, test: 0.0 }, ..SeriesOptions::new(2, 1) };
    let series = series_of(csv, &options).expect("a series");
    assert_eq!((series.n_rows(), series.time_at(3).as_str()), (7, "2001-01-04"));
    assert_eq!((series.value(3, 0), series.known_value(3, 0)), (3.0, None));
    assert!(series.warnings()[0].contains("2001-01-04"), "{:?}", series.warnings());
    let refused = series_of(csv, &SeriesOptions { missing: Missing::Refuse, ..options }).expect_err("a gap");
    assert_says(&refused, &["x.csv", "line 5", "'date'", "2001-01-04", "--missing fill"]);
}

#[test]
fn the_scale_is_fitted_on_the_training_part_alone() {
    let level = |i: usize| if i < 72 { [1.0, 3.0][i % 2] } else { 1000.0 + i as f64 };
    let csv = daily(100, |i| level(i).to_string());
    let options = SeriesOptions { split: Split { train: 0.72, valid: 0.08, test: 0.2 }, ..SeriesOptions::new(4, 2) };
    let series = series_of(&csv, &options).expect("a series");
    assert_eq!(series.cuts(), (72, 80));
    let column = &series.spec().inputs[0];
    assert!((column.mean - 2.0).abs() < 1e-12 && (column.std - 1.0).abs() < 1e-12 && !column.relative, "{column:?}");
    let batches = SeriesBatches::new(Arc::new(series), Part::Test, 100, Order::InTime).expect("batches");
    let batch = batches.batch(0, 0).expect("a batch");
    let (_, targets) = value_parts(&batch);
    assert_eq!(targets[batch.n_rows * 2 - 1], 1000.0 + 99.0 - 2.0);
}

#[test]
fn a_window_belongs_to_the_part_of_its_last_target() {
    let csv = daily(100, |i| (i % 5).to_string());
    let options = SeriesOptions { split: Split { train: 0.72, valid: 0.08, test: 0.2 }, ..SeriesOptions::new(10, 3) };
    let series = series_of(&csv, &options).expect("a series");
    let last_targets = |part| series.windows(part).into_iter().map(|o| o as usize + 3).collect::<Vec<_>>();
    assert_eq!(last_targets(Part::Train), (12..72).collect::<Vec<_>>());
    assert_eq!(last_targets(Part::Valid), (72..80).collect::<Vec<_>>());
    assert_eq!(last_targets(Part::Test), (80..100).collect::<Vec<_>>());
    assert_eq!(last_targets(Part::All), (12..100).collect::<Vec<_>>());
}

#[test]
fn files_that_name_their_parts_are_cut_where_they_end() {
    let csv = daily(60, |i| (i % 5).to_string());
    let lines: Vec<&str> = csv.lines().collect();
    let part = |rows: &[&str]| format!("date,value\n{}\n", rows.join("\n"));
    let (train, valid, test) = (part(&lines[1..41]), part(&lines[41..46]), part(&lines[46..]));
    let folder = folder(&[("train.csv", train.as_bytes()), ("val.csv", valid.as_bytes()), ("test.csv", test.as_bytes())]);
    let series = Series::load(&[folder.path().display().to_string()], &SeriesOptions::new(5, 2)).expect("a series");
    assert_eq!((series.n_rows(), series.cuts()), (60, (40, 45)));
}

// ---- series: relative windows, scale, order ----

#[test]
fn drifting_columns_are_found_and_others_left_alone() {
    let noise = |i: usize| ((i * 7919) % 101) as f64 / 101.0;
    type Shape = Box<dyn Fn(usize) -> f64>;
    let cases: Vec<(&str, Shape, bool)> = vec![
        ("trend with a cycle", Box::new(move |i| 300.0 + 0.03 * i as f64 + (i as f64 / 8.0).sin() + noise(i)), true),
        ("trend downwards", Box::new(move |i| -(i as f64)), true),
        ("sine", Box::new(move |i| (i as f64 / 8.0).sin()), false),
        ("noise", Box::new(noise), false),
        ("constant", Box::new(|_| 4.0), false),
    ];
    for (name, shape, drifts) in cases {
        let series = series_of(&daily(500, |i| shape(i).to_string()), &SeriesOptions::new(20, 5)).expect(name);
        assert_eq!(series.spec().inputs[0].relative, drifts, "{name}");
        let forced = SeriesOptions { relative: Relative::Last, ..SeriesOptions::new(20, 5) };
        assert!(series_of(&daily(500, |i| shape(i).to_string()), &forced).expect(name).spec().inputs[0].relative);
    }
}

#[test]
fn relative_windows_subtract_the_last_value_and_keep_the_scale_of_losses() {
    let csv = daily(200, |i| (100 + 3 * i + i % 4).to_string());
    for relative in [Relative::Last, Relative::None] {
        let series = Arc::new(series_of(&csv, &SeriesOptions { relative, ..SeriesOptions::new(6, 3) }).expect("a series"));
        let column = series.spec().inputs[0].clone();
        let batches = SeriesBatches::new(series.clone(), Part::Test, 4, Order::InTime).expect("batches");
        let batch = batches.batch(0, 0).expect("a batch");
        let (inputs, targets) = value_parts(&batch);
        for b in 0..4 {
            let origin = batch.streams[b];
            let base = if relative == Relative::Last { series.value(origin as usize, 0) } else { column.mean };
            for t in 0..6 {
                let wanted = (series.value(origin as usize + t - 5, 0) - base) / column.spread;
                assert!((f64::from(inputs[t * 4 + b]) - wanted).abs() < 1e-5);
            }
            // The targets, taken back, are the truth; their scale is that of the column either way.
            let back = series.denormalise(origin, &targets[b * 3..b * 3 + 3]);
            for (value, truth) in back.iter().zip(series.truth(origin)) {
                assert!((value - truth.expect("known")).abs() < 1e-3);
            }
            assert!((f64::from(targets[b * 3]) - (series.value(origin as usize + 1, 0) - base) / column.std).abs() < 1e-5);
        }
    }
}

#[test]
fn every_window_comes_once_an_epoch_in_an_order_of_seed_and_epoch() {
    let series = Arc::new(series_of(&daily(120, |i| (i % 9).to_string()), &SeriesOptions::new(8, 2)).expect("a series"));
    let make = |seed| SeriesBatches::new(series.clone(), Part::Train, 7, Order::Shuffled { seed }).expect("batches");
    let order = |batches: &SeriesBatches, epoch| {
        (0..batches.n_batches()).flat_map(|idx| batches.batch(epoch, idx).expect("a batch").streams).collect::<Vec<_>>()
    };
    let batches = make(3);
    let (first, second) = (order(&batches, 0), order(&batches, 1));
    assert_ne!(first, second);
    for epoch in [&first, &second] {
        let mut sorted = epoch.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, series.windows(Part::Train));
    }
    assert_eq!(order(&make(3), 1), second, "whoever asks, and without having asked for epoch 0");
    assert_eq!(order(&batches, 0), first, "going back");
    assert_ne!(order(&make(4), 0), first);
    let last = batches.batch(0, batches.n_batches() - 1).expect("a batch");
    assert_eq!(last.n_rows, first.len() % 7);
    assert_eq!((last.resets, last.carries), (true, false));
}

#[test]
fn the_calendar_adds_sine_and_cosine_of_the_season() {
    let options = SeriesOptions { calendar: true, relative: Relative::None, ..SeriesOptions::new(14, 1) };
    let series = series_of(&daily(60, |i| (i % 7).to_string()), &options).expect("a series");
    assert_eq!(series.spec().n_features(), 3);
    let window = series.latest_window();
    let (inputs, _) = value_parts(&window);
    for t in 0..7 {
        let (now, later) = (&inputs[t * 3 + 1..t * 3 + 3], &inputs[(t + 7) * 3 + 1..(t + 7) * 3 + 3]);
        assert!((now[0] - later[0]).abs() < 1e-5 && (now[1] - later[1]).abs() < 1e-5);
        assert!((now[0].hypot(now[1]) - 1.0).abs() < 1e-5);
    }
    let unknown = SeriesOptions { calendar: true, ..SeriesOptions::new(2, 1) };
    assert_says(&series_of("y\n1\n2\n3\n4\n5\n", &unknown).expect_err("no season"), &["--calendar", "--season"]);
}

#[test]
fn a_newer_file_is_forecast_with_the_scale_of_the_run() {
    let options = SeriesOptions { split: Split { train: 0.8, valid: 0.1, test: 0.1 }, ..SeriesOptions::new(6, 2) };
    let first = series_of(&daily(100, |i| (2 * i).to_string()), &options).expect("a series");
    let json = serde_json::to_string(first.spec()).expect("json");
    let spec: SeriesSpec = serde_json::from_str(&json).expect("a spec");
    assert_eq!(spec, *first.spec());
    let newer = Series::from_csv_with("new.csv", daily(110, |i| (2 * i + 1000).to_string()).as_bytes(), &spec).expect("a series");
    assert_eq!(newer.spec().inputs, first.spec().inputs);
    let window = newer.latest_window();
    assert_eq!((window.n_rows, window.n_steps, window.weight), (1, 6, 0.0));
    let forecast = newer.forecast(&[0.0, 1.0]);
    assert_eq!((forecast[0].time.as_str(), forecast[1].time.as_str()), ("2001-04-21", "2001-04-22"));
    assert_eq!(forecast[0].value, 1218.0, "the last value of the window, since the column is relative");
    assert!((forecast[1].value - 1218.0 - spec.inputs[0].std).abs() < 1e-6);
    assert_eq!(forecast[0].target, "value");
    // A file shorter than a window and horizon can still be forecast from.
    let short = Series::from_csv_with("s.csv", daily(6, |i| i.to_string()).as_bytes(), &spec).expect("a series");
    assert_eq!(short.latest_window().n_steps, 6);
    assert!(short.windows(Part::All).is_empty());
    let error = Series::from_csv_with("s.csv", daily(5, |i| i.to_string()).as_bytes(), &spec).expect_err("too short");
    assert_says(&error, &["s.csv", "5 rows", "6"]);
    let error =
        Series::from_csv_with("s.csv", daily(20, |i| i.to_string()).replace("value", "valu").as_bytes(), &spec).expect_err("a column");
    assert_says(&error, &["s.csv", "'value'", "did you mean 'valu'"]);
    let months = "date,value\n".to_string() + &(1..=12).map(|m| format!("2001-{m:02}-01,{m}\n")).collect::<String>();
    let error = Series::from_csv_with("m.csv", months.as_bytes(), &spec).expect_err("another step");
    assert_says(&error, &["m.csv", "1 month", "1 day", "same step"]);
}

// ---- series: baselines ----

#[test]
fn the_naive_forecasts_of_the_co2_record_have_their_known_errors() {
    let options = SeriesOptions { split: builtin::co2_split(), ..SeriesOptions::new(104, 26) };
    let series = builtin::co2(&options).expect("the built-in record");
    assert_eq!((series.n_rows(), series.cuts().1, series.windows(Part::Test).len()), (2284, 1828, 456));
    assert!(series.spec().inputs[0].relative && series.warnings().is_empty(), "{:?}", series.warnings());
    assert_eq!(series.time_after(1), "20020105");
    let found: BTreeMap<&str, f64> = baselines(&series, Part::Test).into_iter().map(|(name, scores)| (name, scores.rmse[0][25])).collect();
    for (name, known) in [("last", 4.301), ("seasonal", 1.844), ("seasonal_drift", 0.977), ("climatology_trend", 0.85)] {
        assert!((found[name] - known).abs() < 0.01, "{name}: {} instead of {known}", found[name]);
    }
}

#[test]
fn naive_forecasts_are_right_where_they_must_be() {
    let season = |i: usize| [3.0, -1.0, 2.0, 0.0, -2.0, 5.0, 1.0][i % 7];
    let options = SeriesOptions { split: Split { train: 0.7, valid: 0.1, test: 0.2 }, ..SeriesOptions::new(14, 10) };
    let mse = |csv: &str| -> BTreeMap<&'static str, f64> {
        let series = series_of(csv, &options).expect("a series");
        baselines(&series, Part::Test).into_iter().map(|(name, scores)| (name, scores.mse)).collect()
    };
    let cycle = mse(&daily(200, |i| season(i).to_string()));
    assert!(
        cycle["seasonal"] < 1e-20 && cycle["seasonal_drift"] < 1e-20 && cycle["climatology_trend"] < 1e-3 && cycle["last"] > 0.1,
        "{cycle:?}"
    );
    let trend = mse(&daily(200, |i| (season(i) + 2.0 * i as f64).to_string()));
    assert!(trend["seasonal_drift"] < 1e-20 && trend["seasonal"] > 1e-3 && trend["climatology_trend"] < 1e-3, "{trend:?}");
    let constant = mse(&daily(200, |_| "4".to_string()));
    assert!(constant.values().all(|&mse| mse < 1e-20), "{constant:?}");
}

#[test]
fn a_forecast_without_enough_history_is_left_out() {
    let series = series_of("y\n1\n2\n4\n2\n1\n3\n5\n2\n3\n1\n", &SeriesOptions::new(2, 1)).expect("a series");
    assert_eq!(baselines(&series, Part::Test).iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["last"]);
    let seasonal = SeriesOptions { season: Some(3), ..SeriesOptions::new(2, 1) };
    let series = series_of("y\n1\n2\n4\n2\n1\n3\n5\n2\n3\n1\n", &seasonal).expect("a series");
    let names = |part| baselines(&series, part).iter().map(|(name, _)| *name).collect::<Vec<_>>();
    assert_eq!(names(Part::Test), ["last", "seasonal", "seasonal_drift", "climatology_trend"]);
    assert_eq!(names(Part::Train), ["last", "climatology_trend"], "the first windows have no season before them");
}

#[test]
fn model_and_naive_forecasts_are_scored_alike() {
    let csv = daily(120, |i| if i % 13 == 5 { String::new() } else { (i * i % 23).to_string() });
    let options =
        SeriesOptions { split: Split { train: 0.7, valid: 0.1, test: 0.2 }, relative: Relative::Last, ..SeriesOptions::new(7, 3) };
    let series = series_of(&csv, &options).expect("a series");
    // A network that always says 0 of relative windows is the forecast `last`.
    let mut scorer = Scorer::new(&series);
    for origin in series.windows(Part::Test) {
        scorer.add_outputs(&series, origin, &[0.0; 3]);
    }
    let (model, naive) = (scorer.scores(), baselines(&series, Part::Test).remove(0).1);
    assert!((model.mse - naive.mse).abs() < 1e-12 && model.n == naive.n);
    assert!(model.n < 3 * series.windows(Part::Test).len() as u64, "blanks are not scored");
    assert!((model.rmse[0][2] - naive.rmse[0][2]).abs() < 1e-9);
}

#[test]
fn decimal_commas_are_read_between_semicolons() {
    let o = SeriesOptions { target: vec!["b".into()], ..SeriesOptions::new(2, 1) };
    let rows = |decimal: &str| (0..9).map(|i| format!("2001-01-0{};{i}{decimal}5;-1{decimal}25e1\n", i + 1)).collect::<String>();
    let [comma, point] = [",", "."].map(|decimal| series_of(&format!("date;a;b\n{}", rows(decimal)), &o).expect("a series"));
    assert!(comma.words().eq(point.words()));
    assert_eq!(comma.value(3, 0), -12.5);
    // Between commas a comma is no part of a number.
    assert!(series_of("a,b\n1,5,2\n", &o).is_err());
}

#[test]
fn text_decoded_token_by_token_is_the_text_of_all_tokens() {
    let bytes = Vocab::bytes();
    let long = "a\u{e9}\u{20ac}\u{1f600}".as_bytes();
    for cut in 0..long.len() {
        for bytes_of in [&long[..cut], &long[cut..], &[&long[cut..], &long[..cut]].concat(), &[0xFF, 0xC3, b'x', 0xE2, 0x82, 0xE2]] {
            let tokens = bytes.encode_bytes(bytes_of);
            let mut decoder = bytes.decoder_after("");
            let pieces: String = tokens.iter().map(|&token| decoder.push(token)).collect();
            assert_eq!(pieces + decoder.finish(), String::from_utf8_lossy(bytes_of), "{bytes_of:?}");
        }
    }
    let words = Vocab::words(["to", "be", EOS], None).expect("words");
    let to = words.encode_words(["to"])[0];
    for (prompt, piece) in [("", "to"), ("to", " to"), ("to ", "to"), ("be\n", "to")] {
        assert_eq!(words.decoder_after(prompt).push(to), piece, "{prompt:?}");
    }
    assert_eq!(words.unknown_in("to do or to  do"), ["do", "or"]);
}

#[test]
fn an_unknown_character_is_answered_with_those_that_there_are_blanks_in_a_form_that_is_seen() {
    let error = Vocab::chars("b a\n\u{a0}", None).expect("characters").encode_prompt("a\tb").expect_err("a tab");
    assert_says(&error, &["'\\t'", r"'\n' ' ' '\u{a0}' ab"]);
}

// ---- series: refused ----

#[test]
fn series_that_cannot_be_used_are_refused_with_place_and_remedy() {
    let o = || SeriesOptions::new(2, 1);
    let target = |name: &str| SeriesOptions { target: vec![name.into()], ..o() };
    let features = |name: &str| SeriesOptions { features: vec![name.into()], ..o() };
    let good = "date,temp,rain\n2001-01-01,1,2\n2001-01-02,2,3\n2001-01-03,3,4\n2001-01-04,4,5\n";
    let cases: Vec<(&str, SeriesOptions, Vec<&str>)> = vec![
        ("", o(), vec!["x.csv", "is empty"]),
        ("\n\n", o(), vec!["x.csv", "is empty"]),
        ("date,y\n", o(), vec!["x.csv", "line 1", "is empty"]),
        ("a,b\n1,2\n3\n5,6\n", o(), vec!["x.csv", "line 3", "1 cells", "has 2", "same number"]),
        ("a,b\n1,2\n\n# note\n3,4,5\n5,6\n", o(), vec!["x.csv", "line 5", "3 cells", "has 2", "quotes"]),
        ("a,b\r\n1,2\r\n\r\n3,4,5\r\n", o(), vec!["x.csv", "line 4", "3 cells"]),
        ("a,b\n1,2\n3,oops\n5,6\n7,8\n", o(), vec!["x.csv", "line 3", "'b'", "'oops'", "--features"]),
        ("a;b\n1.5;2\n3;4,5\n5;6\n7;8\n", o(), vec!["x.csv", "line 3", "'b'", "'4,5'", "decimals with a point"]),
        ("a;b\n1;2,5\n3;4,5,6\n5;6,5\n", target("b"), vec!["x.csv", "line 3", "'b'", "'4,5,6'"]),
        ("y\n1\ninf\n3\n4\n", o(), vec!["x.csv", "line 3", "'y'", "'inf'"]),
        ("y\na\nb\nc\n", o(), vec!["x.csv", "'a'", "not a number"]),
        (good, target("tmp"), vec!["--target 'tmp'", "x.csv", "did you mean 'temp'", "date, temp, rain"]),
        (good, features("zzzzzz"), vec!["--features 'zzzzzz'", "x.csv", "date, temp, rain"]),
        (good, target("date"), vec!["x.csv", "'date'", "times", "--target"]),
        (
            "date,y\n2001-01-01,1\n2001-01-03,2\n2001-01-02,3\n",
            o(),
            vec!["x.csv", "line 4", "'date'", "2001-01-02 comes before 2001-01-03", "sort"],
        ),
        (
            "date,y\n20010101,1\n20010102,2\n20010102,3\n",
            o(),
            vec!["x.csv", "line 4", "'date'", "20010102 repeats", "one row for each time"],
        ),
        ("time,y\n1949.5,1\n1949.75,2\n1949.25,3\n", o(), vec!["x.csv", "line 4", "'time'", "comes before"]),
        (
            "date,y\n2001-01-01,1\n2001-02-30,2\n2001-01-03,3\n",
            o(),
            vec!["x.csv", "line 3", "'date'", "'2001-02-30' is not a date", "2001-01-01"],
        ),
        ("date,y\n2001-01-01,1\n,2\n2001-01-03,3\n", o(), vec!["x.csv", "line 3", "'date'", "blank date"]),
        ("a,b\n1,\n3,NA\n5,\n7,\n", o(), vec!["x.csv", "'b'", "all 4 cells are blank", "--features"]),
        (
            "a,b\n1,2\n3,\n5,6\n7,8\n",
            SeriesOptions { missing: Missing::Refuse, ..o() },
            vec!["x.csv", "line 3", "'b'", "blank", "--missing fill"],
        ),
        ("y\n1\n2\n3\n", SeriesOptions::new(5, 2), vec!["x.csv", "3 rows", "7", "--seq-len"]),
        ("y\n1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n", SeriesOptions::new(8, 2), vec!["training part", "x.csv", "9 rows", "10", "--split"]),
        (good, SeriesOptions::new(0, 1), vec!["--seq-len 0"]),
        (good, SeriesOptions::new(1, 0), vec!["--horizon 0"]),
    ];
    for (csv, options, wanted) in cases {
        let error = series_of(csv, &options).err().unwrap_or_else(|| panic!("accepted:\n{csv}"));
        assert_says(&error, &wanted);
    }
    let error = Series::from_csv("l.csv", b"a,b\n1,2\ncaf\xE9,3\n", &o()).expect_err("not UTF-8");
    assert_says(&error, &["l.csv", "line 3", "byte 11", "0xE9", "UTF-8"]);
}

#[test]
fn files_that_are_read_together_need_the_same_columns() {
    let folder = folder(&[("a.csv", b"x,y\n1,2\n2,3\n"), ("b.csv", b"x,z\n3,4\n4,5\n")]);
    let error = Series::load(&[path(&folder, "*.csv")], &SeriesOptions::new(1, 1)).expect_err("other columns");
    assert_says(&error, &["b.csv", "x, z", "a.csv", "x, y", "same columns"]);
}

proptest! {
    #[test]
    fn no_bytes_make_reading_panic(bytes in proptest::collection::vec(prop_oneof![Just(b','), Just(b'\n'), Just(b'"'), Just(b'1'), Just(b'-'), Just(b'#'), any::<u8>()], 0..80)) {
        // Whether it is accepted does not matter here.
        let _ = Series::from_csv("x.csv", &bytes, &SeriesOptions::new(1, 1)).map(|series| series.time_after(3));
        let _ = Series::from_csv("x.csv", String::from_utf8_lossy(&bytes).as_bytes(), &SeriesOptions::new(1, 1));
    }

    #[test]
    fn no_times_make_reading_panic(times in proptest::collection::vec("[0-9]{4}[-/][0-9]{2}([-/][0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2})?(Z|[+-][0-9]{2}(:[0-9]{2})?)?)?)?", 1..5)) {
        let csv: String = times.iter().map(|time| format!("{time},1\n")).collect();
        let _ = Series::from_csv("x.csv", csv.as_bytes(), &SeriesOptions::new(1, 1)).map(|series| series.time_after(1_000_000));
    }
}

// ---- prefetch ----

struct Counting {
    n: u64,
    panics_at: Option<u64>,
}

impl Batches for Counting {
    fn n_batches(&self) -> u64 {
        self.n
    }

    fn batch(&self, epoch: u64, idx: u64) -> Result<Batch, DataError> {
        assert!(Some(idx) != self.panics_at, "planted fault at {idx}");
        let text = TextEval::new(vec![epoch as u32, idx as u32], 1, 1).expect("a stream");
        text.batch(0, 0)
    }
}

#[test]
fn prefetch_gives_the_batches_in_order_from_any_position() {
    for (start, wanted) in [
        ((0, 0), vec![(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]),
        ((0, 2), vec![(0, 2), (1, 0), (1, 1), (1, 2)]),
        ((0, 3), vec![(1, 0), (1, 1), (1, 2)]),
        ((2, 0), vec![]),
    ] {
        for depth in [0, 1, 8] {
            let batches = Arc::new(Counting { n: 3, panics_at: None });
            let prefetch = Prefetch::new(batches, start.0, start.1, depth, 2).expect("a thread");
            let got: Vec<(u64, u64)> = prefetch
                .map(|item| {
                    let (epoch, idx, batch) = item.expect("a batch");
                    assert_eq!(token_parts(&batch), (&[epoch as u32][..], &[idx as u32][..]));
                    (epoch, idx)
                })
                .collect();
            assert_eq!(got, wanted);
        }
    }
}

#[test]
fn prefetch_without_end_stops_when_it_is_dropped() {
    let mut prefetch = Prefetch::new(Arc::new(Counting { n: 3, panics_at: None }), 0, 0, 2, u64::MAX).expect("a thread");
    assert_eq!(prefetch.by_ref().take(100).filter(Result::is_ok).count(), 100);
    // Returns only when the thread has ended.
    drop(prefetch);
}

#[test]
fn a_panic_while_preparing_is_an_error_at_the_consumer_and_then_the_end() {
    let mut prefetch = Prefetch::new(Arc::new(Counting { n: 5, panics_at: Some(2) }), 0, 0, 1, 9).expect("a thread");
    assert!(prefetch.next().is_some_and(|item| item.is_ok()));
    assert!(prefetch.next().is_some_and(|item| item.is_ok()));
    let error = prefetch.next().expect("an item").expect_err("the planted fault");
    assert!(error.to_string().contains("batch 2 of epoch 0") && error.to_string().contains("planted fault at 2"), "{error}");
    assert!(!error.is_input());
    assert!(prefetch.next().is_none());
}

#[test]
fn the_built_in_record_is_whole() {
    assert_eq!(builtin::CO2_CSV.lines().count(), 2285);
}
