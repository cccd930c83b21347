//! Text: reading, cutting into parts, and the order in which its tokens are trained on and scored.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::error::DataError;
use super::source::{Source, Sources};
use super::split::Split;
use super::vocab::{Level, Vocab, words};
use super::{Batch, Batches, Input, Target};
use crate::shape::split_even;

/// How bytes become characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Encoding {
    /// UTF-8, with or without a byte order mark.
    #[default]
    #[serde(rename = "utf-8")]
    Utf8,
    /// ISO 8859-1: every byte is a character.
    #[serde(rename = "latin-1")]
    Latin1,
}

impl std::str::FromStr for Encoding {
    type Err = DataError;

    fn from_str(text: &str) -> Result<Self, DataError> {
        match text.to_ascii_lowercase().as_str() {
            "utf-8" | "utf8" => Ok(Self::Utf8),
            "latin-1" | "latin1" | "iso-8859-1" => Ok(Self::Latin1),
            _ => Err(DataError::Option {
                name: "--encoding",
                value: text.to_string(),
                problem: "no such encoding".to_string(),
                remedy: "use utf-8 or latin-1".to_string(),
            }),
        }
    }
}

/// How text is read and cut.
#[derive(Clone, Debug)]
pub struct TextOptions {
    /// What one token is.
    pub level: Level,
    /// How bytes become characters; byte level does not ask.
    pub encoding: Encoding,
    /// How one source is cut; also how much of the training part validates where no file does.
    pub split: Split,
    /// `--vocab`: at most so many entries.
    pub vocab_limit: Option<usize>,
    /// A vocabulary that exists already (a run that is resumed); else it is made from the text.
    pub vocab: Option<Vocab>,
}

impl Default for TextOptions {
    fn default() -> Self {
        Self { level: Level::Char, encoding: Encoding::Utf8, split: Split::default(), vocab_limit: None, vocab: None }
    }
}

/// Text as tokens, in three parts.
///
/// The vocabulary of characters is taken from all parts, that of words from the training part.
#[derive(Clone, Debug)]
pub struct Text {
    /// The name of the training part for messages.
    pub name: String,
    /// What the tokens stand for.
    pub vocab: Vocab,
    /// For training.
    pub train: Arc<[u32]>,
    /// For validation; may be empty.
    pub valid: Arc<[u32]>,
    /// For the test; may be empty.
    pub test: Arc<[u32]>,
}

impl Text {
    /// Reads what `--data` names. One source is cut by `split`: validation is the first part, test the last, training all between.
    /// Where files name their parts and none is for validation, it is cut from the end of the training part.
    ///
    /// # Errors
    /// Sources that cannot be read, are empty, or are not text at the level asked for.
    pub fn load(data: &[String], options: &TextOptions) -> Result<Self, DataError> {
        Self::from_sources(Sources::read(data)?, options)
    }

    /// As [`Text::load`], of sources in memory.
    ///
    /// # Errors
    /// As [`Text::load`].
    pub fn from_sources(sources: Sources, options: &TextOptions) -> Result<Self, DataError> {
        if let Some(vocab) = options.vocab.as_ref().filter(|vocab| vocab.level() != options.level) {
            return Err(DataError::Option {
                name: "--level",
                value: format!("{:?}", options.level).to_lowercase(),
                problem: format!("the run's vocabulary is at level {}", format!("{:?}", vocab.level()).to_lowercase()),
                remedy: "leave the flag out".to_string(),
            });
        }
        let name = match &sources {
            Sources::Whole(all) => name_of(all),
            Sources::Parts { train, .. } => name_of(train),
        };
        if options.level == Level::Byte {
            return Self::from_bytes(name, sources, options);
        }
        match sources {
            Sources::Whole(all) => {
                let text = join(&all, options)?;
                match options.level {
                    Level::Word => {
                        let tokens: Vec<&str> = words(&text).collect();
                        let (valid, train, test) = cut_ends(tokens.len(), options.split);
                        let vocab = match &options.vocab {
                            Some(vocab) => vocab.clone(),
                            None => Vocab::words(tokens[train.clone()].iter().copied(), options.vocab_limit)?,
                        };
                        let part = |range: Range<usize>| Arc::from(vocab.encode_words(tokens[range].iter().copied()));
                        Ok(Self { name, train: part(train), valid: part(valid), test: part(test), vocab })
                    }
                    _ => {
                        let vocab = char_vocab(&[&text], options)?;
                        let tokens = vocab.encode_text(&name, &text)?;
                        let (valid, train, test) = cut_ends(tokens.len(), options.split);
                        let part = |range: Range<usize>| Arc::from(&tokens[range]);
                        Ok(Self { name, train: part(train), valid: part(valid), test: part(test), vocab })
                    }
                }
            }
            Sources::Parts { train, valid, test } => {
                let names = [name.clone(), name_of(&valid), name_of(&test)];
                let [train, valid, test] = [join(&train, options)?, join(&valid, options)?, join(&test, options)?];
                let vocab = match (&options.vocab, options.level) {
                    (Some(vocab), _) => vocab.clone(),
                    (None, Level::Word) => Vocab::words(words(&train), options.vocab_limit)?,
                    (None, _) => char_vocab(&[&train, &valid, &test], options)?,
                };
                let mut train = vocab.encode_text(&names[0], &train)?;
                let mut valid = vocab.encode_text(&names[1], &valid)?;
                let test = vocab.encode_text(&names[2], &test)?;
                if valid.is_empty() {
                    valid = train.split_off(train.len() - valid_len(train.len(), options.split));
                }
                Ok(Self { name, vocab, train: train.into(), valid: valid.into(), test: test.into() })
            }
        }
    }

    fn from_bytes(name: String, sources: Sources, options: &TextOptions) -> Result<Self, DataError> {
        if let Some(limit) = options.vocab_limit {
            return Err(DataError::Option {
                name: "--vocab",
                value: limit.to_string(),
                problem: "level byte always has 256 entries".to_string(),
                remedy: "leave the flag out, or use --level char or word".to_string(),
            });
        }
        let vocab = Vocab::bytes();
        let tokens = |sources: &[Source]| -> Result<Vec<u32>, DataError> {
            let mut tokens = Vec::new();
            for source in sources {
                check_not_empty(source, source.bytes.is_empty())?;
                tokens.extend(vocab.encode_bytes(&source.bytes));
            }
            Ok(tokens)
        };
        let (train, valid, test) = match sources {
            Sources::Whole(all) => {
                let tokens = tokens(&all)?;
                let (valid, train, test) = cut_ends(tokens.len(), options.split);
                (tokens[train].to_vec(), tokens[valid].to_vec(), tokens[test].to_vec())
            }
            Sources::Parts { train, valid, test } => {
                let (mut train, mut valid, test) = (tokens(&train)?, tokens(&valid)?, tokens(&test)?);
                if valid.is_empty() {
                    valid = train.split_off(train.len() - valid_len(train.len(), options.split));
                }
                (train, valid, test)
            }
        };
        Ok(Self { name, vocab, train: train.into(), valid: valid.into(), test: test.into() })
    }
}

/// The tokens of what `--data` names, for evaluation with an existing vocabulary: the test files of a folder that has them, else everything.
///
/// # Errors
/// As [`Text::load`]; a character that the vocabulary lacks.
pub fn load_tokens(data: &[String], vocab: &Vocab, encoding: Encoding) -> Result<Arc<[u32]>, DataError> {
    let sources = Sources::read(data)?.into_held_out();
    if vocab.level() == Level::Byte {
        let mut tokens = Vec::new();
        for source in &sources {
            check_not_empty(source, source.bytes.is_empty())?;
            tokens.extend(vocab.encode_bytes(&source.bytes));
        }
        return Ok(tokens.into());
    }
    let mut tokens = Vec::new();
    for source in &sources {
        tokens.extend(vocab.encode_text(&source.name, &decode(source, encoding)?)?);
    }
    Ok(tokens.into())
}

fn name_of(sources: &[Source]) -> String {
    match sources {
        [] => "no file".to_string(),
        [one] => one.name.clone(),
        [first, rest @ ..] => format!("{} and {} more", first.name, rest.len()),
    }
}

fn char_vocab(texts: &[&str], options: &TextOptions) -> Result<Vocab, DataError> {
    match &options.vocab {
        Some(vocab) => Ok(vocab.clone()),
        None => Vocab::chars(&texts.concat(), options.vocab_limit),
    }
}

fn valid_len(n: usize, split: Split) -> usize {
    ((n as f64 * split.valid_of_rest()).round() as usize).min(n)
}

/// Validation, training, test.
fn cut_ends(n: usize, split: Split) -> (Range<usize>, Range<usize>, Range<usize>) {
    let valid = ((n as f64 * split.valid).round() as usize).min(n);
    let test = ((n as f64 * split.test).round() as usize).min(n - valid);
    (0..valid, valid..n - test, n - test..n)
}

fn check_not_empty(source: &Source, empty: bool) -> Result<(), DataError> {
    if empty { Err(DataError::Empty { file: source.name.clone(), wanted: "text".to_string() }) } else { Ok(()) }
}

/// One part as one text. At word level a file that ends within a line ends it, so that files do not grow together.
fn join(sources: &[Source], options: &TextOptions) -> Result<String, DataError> {
    let mut all = String::new();
    for source in sources {
        let text = decode(source, options.encoding)?;
        all.push_str(&text);
        if options.level == Level::Word && !text.ends_with('\n') {
            all.push('\n');
        }
    }
    Ok(all)
}

/// Bytes as text: without a byte order mark, line ends as `\n`.
/// A file as text, its line ends as `\n`.
pub(super) fn decode(source: &Source, encoding: Encoding) -> Result<String, DataError> {
    let bytes = source.bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&source.bytes);
    check_not_empty(source, bytes.is_empty())?;
    let text = match encoding {
        Encoding::Latin1 => bytes.iter().map(|&byte| char::from(byte)).collect(),
        Encoding::Utf8 => {
            let text = utf8(&source.name, &source.bytes)?;
            text.strip_prefix('\u{FEFF}').unwrap_or(text).to_string()
        }
    };
    Ok(if text.contains("\r\n") { text.replace("\r\n", "\n") } else { text })
}

fn utf8<'a>(name: &str, bytes: &'a [u8]) -> Result<&'a str, DataError> {
    std::str::from_utf8(bytes).map_err(|e| {
        let at = e.valid_up_to();
        let utf16 = bytes.starts_with(b"\xFF\xFE") || bytes.starts_with(b"\xFE\xFF");
        DataError::Encoding {
            file: name.to_string(),
            place: format!("byte {at}"),
            value: bytes[at],
            remedy: if utf16 {
                "it looks like UTF-16: convert it (iconv -f UTF-16 -t UTF-8), or use --level byte".to_string()
            } else {
                "use --encoding latin-1 if it is, or --level byte, which takes any file".to_string()
            },
        }
    })
}

/// Training order of text: `B` streams of equal length side by side, window after window, the state carried along.
///
/// `n` tokens give streams of `n / B` tokens, stream `r` being the `r`-th piece of the text; the `n % B` tokens at the end that
/// fill no stream are left out. Every token of a stream is an input once an epoch and its successor the target, also across the seam to the next
/// stream; only the very last token of the text may have no successor and weighs nothing. The last window of an epoch may be shorter.
#[derive(Clone, Debug)]
pub struct TextBatches {
    tokens: Arc<[u32]>,
    n_streams: usize,
    stream_len: usize,
    window: usize,
}

impl TextBatches {
    /// `what` names the text in messages; `window` is `T`.
    ///
    /// # Errors
    /// [`DataError::TooShort`] if the text has fewer tokens than a window and its last target, or than two for each stream.
    pub fn new(what: &str, tokens: Arc<[u32]>, n_streams: usize, window: usize) -> Result<Self, DataError> {
        check_sizes(n_streams, window)?;
        let short = |needs: usize, purpose: String, remedy: &str| DataError::TooShort {
            what: format!("the training part of {what}"),
            has: tokens.len(),
            unit: "tokens",
            needs,
            purpose,
            remedy: remedy.to_string(),
        };
        if tokens.len() < window + 1 {
            return Err(short(window + 1, format!("one window of {window} and its last target"), "lower --seq-len or give more text"));
        }
        if tokens.len() < 2 * n_streams {
            return Err(short(2 * n_streams, format!("{n_streams} streams"), "lower --batch-size or give more text"));
        }
        // A single stream ends with its last target, so that no window weighs nothing.
        let stream_len = if n_streams == 1 { tokens.len() - 1 } else { tokens.len() / n_streams };
        Ok(Self { tokens, n_streams, stream_len, window })
    }

    /// Tokens at the end of the text that fill no stream.
    pub fn n_left_out(&self) -> usize {
        if self.n_streams == 1 { 0 } else { self.tokens.len() % self.n_streams }
    }

    /// Steps of one stream.
    pub fn stream_len(&self) -> usize {
        self.stream_len
    }
}

impl Batches for TextBatches {
    fn n_batches(&self) -> u64 {
        self.stream_len.div_ceil(self.window) as u64
    }

    fn batch(&self, _epoch: u64, idx: u64) -> Batch {
        let starts: Vec<usize> = (0..self.n_streams).map(|stream| stream * self.stream_len).collect();
        window_of(&self.tokens, &starts, &vec![self.stream_len; self.n_streams], self.window, idx)
    }
}

/// Evaluation order of text: every token but the very first is a target exactly once.
///
/// The targets are cut into streams that follow each other in the text and differ by at most one in length; the state is carried. Rows
/// that have ended weigh nothing.
#[derive(Clone, Debug)]
pub struct TextEval {
    tokens: Arc<[u32]>,
    starts: Vec<usize>,
    lens: Vec<usize>,
    window: usize,
}

impl TextEval {
    /// `n_streams` streams (fewer where there are fewer targets), windows of `window` steps. A text of less than two tokens has no batches.
    ///
    /// # Errors
    /// [`DataError::Option`] for no streams or an empty window.
    pub fn new(tokens: Arc<[u32]>, n_streams: usize, window: usize) -> Result<Self, DataError> {
        check_sizes(n_streams, window)?;
        let n_targets = tokens.len().saturating_sub(1);
        let streams = split_even(n_targets, n_streams.min(n_targets.max(1)));
        let (starts, lens) = streams.into_iter().map(|range| (range.start, range.len())).unzip();
        Ok(Self { tokens, starts, lens, window })
    }

    /// Rows of every batch.
    pub fn n_streams(&self) -> usize {
        self.starts.len()
    }
}

impl Batches for TextEval {
    fn n_batches(&self) -> u64 {
        // The first stream is never shorter than another.
        self.lens[0].div_ceil(self.window) as u64
    }

    fn batch(&self, _epoch: u64, idx: u64) -> Batch {
        window_of(&self.tokens, &self.starts, &self.lens, self.window, idx)
    }
}

/// Window `idx` of streams that start at token `starts[r]` and have `lens[r]` steps, the first one the longest.
fn window_of(tokens: &[u32], starts: &[usize], lens: &[usize], window: usize, idx: u64) -> Batch {
    let first = idx as usize * window;
    assert!(first < lens[0], "window {idx} of a stream of {} tokens in windows of {window}", lens[0]);
    let (n_steps, n_rows) = (window.min(lens[0] - first), starts.len());
    let mut inputs = Vec::with_capacity(n_steps * n_rows);
    let mut targets = Vec::with_capacity(n_steps * n_rows);
    let mut weights = Vec::with_capacity(n_steps * n_rows);
    for t in first..first + n_steps {
        for (&start, &len) in starts.iter().zip(lens) {
            // A row that has ended reads token 0 and weighs nothing.
            let at = start + t;
            let target = tokens.get(at + 1).filter(|_| t < len);
            inputs.push(if t < len { tokens[at] } else { 0 });
            targets.push(target.copied().unwrap_or(0));
            weights.push(if target.is_some() { 1.0 } else { 0.0 });
        }
    }
    let streams = (0..n_rows as u32).collect();
    Batch::new(n_steps, Input::Tokens(inputs), Target::Tokens(targets), weights, streams, idx == 0, true)
}

fn check_sizes(n_streams: usize, window: usize) -> Result<(), DataError> {
    let zero = |name| DataError::Option {
        name,
        value: "0".to_string(),
        problem: "nothing would be read".to_string(),
        remedy: "give a number from 1".to_string(),
    };
    if n_streams == 0 {
        return Err(zero("--batch-size"));
    }
    if window == 0 { Err(zero("--seq-len")) } else { Ok(()) }
}
