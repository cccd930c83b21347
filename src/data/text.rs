//! Text: reading, cutting into parts, and the order in which its tokens are trained on and scored.
//!
//! A text is read in pieces, whatever its size, and more than once: to count its symbols, then to write its tokens. Tokens of a text that is larger
//! than [`TextOptions::in_memory`] go to a file in the cache folder, which is taken again as long as sources and options are the same; a source
//! is known by its path, length, time of change, and the hash of [`SAMPLES`] blocks of it. At byte level one plain file is its own tokens.

use std::collections::HashMap;
use std::fs::{self, File};
use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::DataError;
use super::records;
use super::source::{Packing, Source, Sources};
use super::split::Split;
use super::tokens::{TokenWriter, Tokens, cache_folder, read_at, width_of};
use super::vocab::{EOS, Level, Vocab};
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
    /// The key or column of the text in JSON lines and Parquet; none: `text`. Byte level takes every file as it is.
    pub column: Option<String>,
    /// How one source is cut; also how much of the training part validates where no file does.
    pub split: Split,
    /// `--vocab`: at most so many entries.
    pub vocab_limit: Option<usize>,
    /// A vocabulary that exists already (a run that is resumed); else it is made from the text.
    pub vocab: Option<Vocab>,
    /// Bytes of text up to which tokens are kept in memory; those of a larger one go to a file in the cache folder.
    pub in_memory: u64,
    /// That folder.
    pub cache: PathBuf,
}

impl Default for TextOptions {
    fn default() -> Self {
        Self {
            level: Level::Char,
            encoding: Encoding::Utf8,
            column: None,
            split: Split::default(),
            vocab_limit: None,
            vocab: None,
            in_memory: 128 << 20,
            cache: cache_folder(),
        }
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
    pub train: Tokens,
    /// For validation; may be empty.
    pub valid: Tokens,
    /// For the test; may be empty.
    pub test: Tokens,
    /// What a person should know: where tokens are kept.
    pub notes: Vec<String>,
    /// Over all tokens, where the cache knows it.
    sha256: Option<String>,
}

/// Sources as they make up the text: all parts in one, to be cut, or each by itself.
struct Plan {
    parts: Vec<Vec<Source>>,
    name: String,
}

impl Plan {
    fn new(sources: Sources) -> Self {
        match sources {
            Sources::Whole(all) => Self { name: name_of(&all), parts: vec![all] },
            Sources::Parts { train, valid, test } => Self { name: name_of(&train), parts: vec![train, valid, test] },
        }
    }

    fn all(&self) -> impl Iterator<Item = &Source> {
        self.parts.iter().flatten()
    }

    /// About how many bytes the text has, unpacked.
    fn size(&self) -> Result<u64, DataError> {
        self.all().map(unpacked_size).sum()
    }

    /// Training, validation and test as places among all tokens, of which each part has so many.
    fn cut(&self, lens: &[usize], split: Split) -> [Range<usize>; 3] {
        if let [n] = *lens {
            let (valid, train, test) = cut_ends(n, split);
            return [train, valid, test];
        }
        let ends: Vec<usize> = lens
            .iter()
            .scan(0, |end, len| {
                *end += len;
                Some(*end)
            })
            .collect();
        let train = if lens[1] == 0 { lens[0] - valid_len(lens[0], split) } else { lens[0] };
        [0..train, train..ends[1], ends[1]..ends[2]]
    }
}

/// Text packs to a quarter or so of its size.
fn unpacked_size(source: &Source) -> Result<u64, DataError> {
    Ok(source.stored_len()? * if source.open()?.packing() == Packing::Plain { 1 } else { 4 })
}

impl Text {
    /// Reads what `--data` names. One source is cut by `split`: validation is the first part, test the last, training all between.
    /// Where files name their parts and none is for validation, it is cut from the end of the training part.
    ///
    /// # Errors
    /// Sources that cannot be read, are empty, or are not text at the level asked for; a cache that cannot be written.
    pub fn load(data: &[String], options: &TextOptions) -> Result<Self, DataError> {
        Self::from_sources(Sources::find(data)?, options)
    }

    /// As [`Text::load`], of sources that were found already.
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
        if let (Level::Byte, Some(limit)) = (options.level, options.vocab_limit) {
            return Err(DataError::Option {
                name: "--vocab",
                value: limit.to_string(),
                problem: "level byte always has 256 entries".to_string(),
                remedy: "leave the flag out, or use --level char or word".to_string(),
            });
        }
        let plan = Plan::new(sources);
        if plan.size()? > options.in_memory { Self::cached(&plan, options) } else { Self::made(&plan, options, None) }
    }

    /// Reads all, and keeps tokens in memory, or in the file `to`.
    fn made(plan: &Plan, options: &TextOptions, to: Option<PathBuf>) -> Result<Self, DataError> {
        let mut notes = Vec::new();
        let vocab = match &options.vocab {
            Some(vocab) => vocab.clone(),
            None => match options.level {
                Level::Byte => Vocab::bytes(),
                Level::Char => count_chars(plan, options)?,
                Level::Word => count_words(plan, options, &mut notes)?,
            },
        };
        let width = width_of(vocab.size());
        let mut writer = to.map_or_else(|| Ok(TokenWriter::in_memory(width)), |path| TokenWriter::to_file(width, path))?;
        let mut lens = Vec::with_capacity(3);
        for part in &plan.parts {
            let before = writer.len();
            for source in part {
                encode(source, &vocab, options, &mut |tokens| writer.push(tokens))?;
            }
            lens.push(writer.len() - before);
        }
        let tokens = writer.finish()?;
        let [train, valid, test] = plan.cut(&lens, options.split).map(|range| tokens.slice(range));
        Ok(Self { name: plan.name.clone(), vocab, train, valid, test, notes, sha256: None })
    }

    /// Takes tokens from the cache, or makes them and keeps them there.
    fn cached(plan: &Plan, options: &TextOptions) -> Result<Self, DataError> {
        // One plain file at byte level is its own tokens; only its hash is kept.
        let itself = match (options.level, plan.parts.as_slice()) {
            (Level::Byte, [sources]) => match sources.as_slice() {
                [source] if source.open()?.packing() == Packing::Plain => source.path(),
                _ => None,
            },
            _ => None,
        };
        let Some(identity) = Identity::of(plan)? else {
            // What came from a pipe cannot be known again.
            let path = options.cache.join(format!("pipe-{}.tokens", std::process::id()));
            let text = Self::made(plan, options, Some(path.clone()))?;
            // Open files live on without a name; where they do not, the folder may be emptied by hand.
            let _ = fs::remove_file(path);
            return Ok(text);
        };
        // A run's own text, read again with the vocabulary that was made from it, is the one that is there.
        let mut names = vec![identity.file_name(options, None)];
        names.extend(options.vocab.as_ref().map(|vocab| identity.file_name(options, Some(vocab))));
        let place = |name: &String| (options.cache.join(format!("{name}.json")), options.cache.join(format!("{name}.tokens")));
        for (about, data) in names.iter().map(place) {
            if let Some(entry) = Entry::read(&about, &identity)
                && options.vocab.as_ref().is_none_or(|vocab| entry.vocab == *vocab)
                && let Ok(text) = entry.text(plan, itself.map_or(data, PathBuf::from))
            {
                return Ok(text);
            }
        }
        // One with a vocabulary from elsewhere leaves the other alone.
        let (about, data) = if options.level == Level::Byte { place(&names[0]) } else { place(&names[names.len() - 1]) };
        let mut text = match itself {
            Some(path) => {
                let file = File::open(path).map_err(|source| DataError::Read { file: plan.name.clone(), source })?;
                let tokens = Tokens::of_file(plan.name.clone(), file, 1)?;
                let [train, valid, test] = plan.cut(&[tokens.len()], options.split).map(|range| tokens.slice(range));
                Self { name: plan.name.clone(), vocab: Vocab::bytes(), train, valid, test, notes: Vec::new(), sha256: None }
            }
            None => Self::made(plan, options, Some(data.clone()))?,
        };
        text.sha256 = Some(text.sha256()?);
        if itself.is_none() {
            text.notes.push(format!("the tokens of {} are kept in {}, which may be deleted at any time", plan.name, data.display()));
        }
        let parts = [&text.train, &text.valid, &text.test].map(|part| part.place());
        let entry = Entry { identity, vocab: text.vocab.clone(), parts, sha256: text.sha256.clone().unwrap_or_default() };
        entry.write(&about)?;
        Ok(text)
    }

    /// SHA-256 over the tokens of all parts and their numbers, hexadecimal.
    ///
    /// # Errors
    /// Tokens that cannot be read any more.
    pub fn sha256(&self) -> Result<String, DataError> {
        if let Some(known) = &self.sha256 {
            return Ok(known.clone());
        }
        let mut hasher = Sha256::new();
        for part in [&self.train, &self.valid, &self.test] {
            part.hash(&mut hasher)?;
        }
        Ok(hex(hasher))
    }
}

/// The tokens of what `--data` names, for evaluation with an existing vocabulary: the test files of a folder that has them, else everything.
///
/// # Errors
/// As [`Text::load`]; a character that the vocabulary lacks.
pub fn load_tokens(data: &[String], vocab: &Vocab, options: &TextOptions) -> Result<Tokens, DataError> {
    let sources = Sources::Whole(Sources::find(data)?.into_held_out());
    let split = Split { train: 1.0, valid: 0.0, test: 0.0 };
    let options = TextOptions { level: vocab.level(), vocab: Some(vocab.clone()), split, ..options.clone() };
    Ok(Text::from_sources(sources, &options)?.train)
}

/// What a person is told before a large text is read; none for a small one.
pub fn announcement(data: &[String], options: &TextOptions) -> Option<String> {
    // Standard input can be read once only, and not here.
    let plan = data.iter().all(|given| given != "-").then(|| Sources::find(data).ok()).flatten().map(Plan::new)?;
    let size = plan.size().ok().filter(|&size| size > options.in_memory)?;
    let gigabytes = size as f64 / f64::from(1 << 30);
    Some(format!("{} has about {gigabytes:.1} GiB of text: it stays on disk; the first reading takes a while", plan.name))
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Blocks of a source that are hashed to know it again, evenly spaced, the first and the last among them.
pub const SAMPLES: u64 = 16;
const SAMPLE_BYTES: u64 = 1 << 16;
/// Of the cache's files: another one is not looked at.
const CACHE_VERSION: u32 = 1;

/// By what a source is known again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    version: u32,
    sources: Vec<SourceIdentity>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SourceIdentity {
    path: PathBuf,
    len: u64,
    /// Nanoseconds since 1970.
    changed: i128,
    samples: String,
}

impl Identity {
    /// None where a source has no name of its own.
    fn of(plan: &Plan) -> Result<Option<Self>, DataError> {
        let mut sources = Vec::new();
        for source in plan.all() {
            let Some(path) = source.path() else { return Ok(None) };
            let failed = |error| DataError::Read { file: source.name.clone(), source: error };
            let file = File::open(path).map_err(failed)?;
            let about = file.metadata().map_err(failed)?;
            let changed = about.modified().map_err(failed)?;
            let changed =
                changed.duration_since(std::time::UNIX_EPOCH).map_or_else(|e| -(e.duration().as_nanos() as i128), |d| d.as_nanos() as i128);
            let mut hasher = Sha256::new();
            let mut block = vec![0; SAMPLE_BYTES as usize];
            let last = about.len().saturating_sub(SAMPLE_BYTES);
            for i in 0..SAMPLES {
                let n = read_at(&file, &mut block, last / (SAMPLES - 1) * i + if i + 1 == SAMPLES { last % (SAMPLES - 1) } else { 0 });
                hasher.update(&block[..n.map_err(failed)?]);
            }
            let path = fs::canonicalize(path).map_err(failed)?;
            sources.push(SourceIdentity { path, len: about.len(), changed, samples: hex(hasher) });
        }
        Ok(Some(Self { version: CACHE_VERSION, sources }))
    }

    /// The same for the same files read in the same way, so that what is out of date is written over.
    fn file_name(&self, options: &TextOptions, vocab: Option<&Vocab>) -> String {
        let paths: Vec<&PathBuf> = self.sources.iter().map(|source| &source.path).collect();
        let vocab = vocab.and_then(|vocab| serde_json::to_string(vocab).ok());
        let how = (options.level, options.encoding, &options.column, options.split, options.vocab_limit, vocab);
        let mut hasher = Sha256::new();
        hasher.update(format!("{paths:?} {how:?}"));
        hex(hasher)[..32].to_string()
    }
}

/// What the cache knows of a text beside its tokens.
#[derive(Serialize, Deserialize)]
struct Entry {
    identity: Identity,
    vocab: Vocab,
    /// Training, validation, test: where each lies.
    parts: [Range<usize>; 3],
    sha256: String,
}

impl Entry {
    /// None where there is none, or not of these sources.
    fn read(path: &PathBuf, identity: &Identity) -> Option<Self> {
        let entry: Self = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        (entry.identity == *identity).then_some(entry)
    }

    fn text(self, plan: &Plan, data: PathBuf) -> Result<Text, DataError> {
        let name = data.display().to_string();
        let file = File::open(&data).map_err(|source| DataError::Read { file: name.clone(), source })?;
        let tokens = Tokens::of_file(name.clone(), file, width_of(self.vocab.size()))?;
        if self.parts.iter().any(|part| part.start > part.end || part.end > tokens.len())
            || self.parts.iter().map(Range::len).sum::<usize>() != tokens.len()
        {
            return Err(DataError::Empty { file: name, wanted: "all tokens".to_string() });
        }
        let [train, valid, test] = self.parts.map(|part| tokens.slice(part));
        Ok(Text { name: plan.name.clone(), vocab: self.vocab, train, valid, test, notes: Vec::new(), sha256: Some(self.sha256) })
    }

    fn write(&self, path: &PathBuf) -> Result<(), DataError> {
        let failed = |source| DataError::Cache { file: path.display().to_string(), source };
        let folder = path.parent().map(PathBuf::from).unwrap_or_default();
        fs::create_dir_all(&folder).map_err(failed)?;
        let file = tempfile::NamedTempFile::new_in(&folder).map_err(failed)?;
        serde_json::to_writer(&file, self).map_err(|e| failed(e.into()))?;
        file.persist(path).map_err(|e| failed(e.error))?;
        Ok(())
    }
}

fn name_of(sources: &[Source]) -> String {
    match sources {
        [] => "no file".to_string(),
        [one] => one.name.clone(),
        [first, rest @ ..] => format!("{} and {} more", first.name, rest.len()),
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

// ---- symbols ----

/// All characters of all parts.
fn count_chars(plan: &Plan, options: &TextOptions) -> Result<Vocab, DataError> {
    let mut counts = vec![0_u64; char::MAX as usize + 1];
    for source in plan.all() {
        read_text(source, options, &mut |piece| {
            piece.text.chars().for_each(|c| counts[c as usize] += 1);
            Ok(())
        })?;
    }
    let counts = (0..=u32::from(char::MAX)).zip(counts).filter(|&(_, n)| n > 0);
    Vocab::of_chars(counts.filter_map(|(c, n)| Some((char::from_u32(c)?, n))), options.vocab_limit)
}

/// Different words that are counted at a time: some 250 MB.
const MOST_WORDS: usize = 3_500_000;

/// The words of the training part.
fn count_words(plan: &Plan, options: &TextOptions, notes: &mut Vec<String>) -> Result<Vocab, DataError> {
    let train = if let [all] = plan.parts.as_slice() {
        let mut n = 0;
        for source in all {
            Words::default().of_source(source, options, &mut |_| {
                n += 1;
                Ok(())
            })?;
        }
        plan.cut(&[n], options.split)[0].clone()
    } else {
        // All of it: what validates is cut from tokens, with the words of the whole file for training.
        0..usize::MAX
    };
    let mut counts: HashMap<Box<str>, u64> = HashMap::new();
    let (mut at, mut floor) = (0, 0);
    for source in &plan.parts[0] {
        Words::default().of_source(source, options, &mut |word| {
            at += 1;
            if !train.contains(&(at - 1)) {
                return Ok(());
            }
            if let Some(count) = counts.get_mut(word) {
                *count += 1;
                return Ok(());
            }
            if counts.len() >= MOST_WORDS {
                if options.vocab_limit.is_none() {
                    return Err(DataError::Option {
                        name: "--vocab",
                        value: "without a number".to_string(),
                        problem: format!("{} has more than {MOST_WORDS} different words", plan.name),
                        remedy: "keep the most frequent ones, as with --vocab 50K, or use --level char".to_string(),
                    });
                }
                // The rarest go; what is left of the table is at most half full.
                while counts.len() > MOST_WORDS / 2 {
                    floor += 1;
                    counts.retain(|_, count| *count > floor);
                }
            }
            counts.insert(word.into(), 1);
            Ok(())
        })?;
    }
    if floor > 0 {
        notes.push(format!("{}: of so many words that those seen up to {floor} times were forgotten in between; such rare ones may be missing from --vocab", plan.name));
    }
    Vocab::of_words(counts.into_iter().map(|(word, n)| (word.into(), n)), options.vocab_limit)
}

/// Hands over the tokens of a source, some at a time.
fn encode(
    source: &Source,
    vocab: &Vocab,
    options: &TextOptions,
    write: &mut dyn FnMut(&[u32]) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let mut tokens = Vec::with_capacity(PIECE);
    match vocab.level() {
        Level::Byte => {
            let mut reader = source.open()?;
            let mut bytes = vec![0; PIECE];
            let mut any = false;
            loop {
                let n = reader.fill(&mut bytes)?;
                if n == 0 {
                    return check_not_empty(source, !any);
                }
                any = true;
                tokens.clear();
                tokens.extend(bytes[..n].iter().map(|&byte| u32::from(byte)));
                write(&tokens)?;
            }
        }
        Level::Char => {
            let table = vocab.char_table();
            read_text(source, options, &mut |piece| {
                tokens.clear();
                for (byte, c) in piece.text.char_indices() {
                    tokens.push(table.get(c).ok_or_else(|| vocab.unknown_char(&piece.place_of(source, byte), c))?);
                }
                write(&tokens)
            })
        }
        Level::Word => {
            Words::default().of_source(source, options, &mut |word| {
                tokens.push(vocab.word(word));
                if tokens.len() < PIECE {
                    return Ok(());
                }
                write(&tokens)?;
                tokens.clear();
                Ok(())
            })?;
            write(&tokens)
        }
    }
}

/// Cuts pieces into words, with `<eos>` at each line end, also at that of a last line that has none.
#[derive(Default)]
struct Words {
    /// Something stands behind the last line end.
    open: bool,
}

impl Words {
    fn of_source(
        mut self,
        source: &Source,
        options: &TextOptions,
        visit: &mut dyn FnMut(&str) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        read_text(source, options, &mut |piece| {
            for line in piece.text.split_inclusive('\n') {
                self.open = !line.ends_with('\n');
                line.split_whitespace().try_for_each(&mut *visit)?;
                if !self.open {
                    visit(EOS)?;
                }
            }
            Ok(())
        })?;
        if self.open { visit(EOS) } else { Ok(()) }
    }
}

// ---- pieces ----

/// Bytes that are read and decoded at a time.
const PIECE: usize = 1 << 20;

/// A part of a text, not cut within a word unless that is longer than [`PIECE`].
struct Piece<'a> {
    text: &'a str,
    /// Where it begins, from 1.
    line: u64,
    /// Line ends in it are line ends of the file.
    has_lines: bool,
}

impl Piece<'_> {
    fn place_of(&self, source: &Source, byte: usize) -> String {
        let before = if self.has_lines { self.text[..byte].matches('\n').count() as u64 } else { 0 };
        format!("{}, {} {}", source.name, if records::has_rows(&source.name) { "row" } else { "line" }, self.line + before)
    }
}

/// Reads a source in pieces of characters: without a byte order mark, line ends as `\n`; of records their texts, each with a line end.
fn read_text(source: &Source, options: &TextOptions, visit: &mut dyn FnMut(Piece<'_>) -> Result<(), DataError>) -> Result<(), DataError> {
    if records::holds_records(source)? {
        let key = options.column.as_deref().unwrap_or("text");
        return records::texts(source, key, &mut |line, text| {
            let text = if text.contains("\r\n") { text.replace("\r\n", "\n") } else { text.to_string() };
            visit(Piece { text: &(text + "\n"), line, has_lines: false })
        });
    }
    let mut reader = source.open()?;
    let mut bytes = Vec::new();
    let (mut at, mut line) = (0_u64, 1);
    loop {
        let kept = bytes.len();
        bytes.resize(kept + PIECE, 0);
        let got = reader.fill(&mut bytes[kept..])?;
        bytes.truncate(kept + got);
        let at_end = got < PIECE;
        let mark = if at == 0 && bytes.starts_with(b"\xEF\xBB\xBF") { 3 } else { 0 };
        if at == 0 && bytes.len() == mark {
            return check_not_empty(source, true);
        }
        let cut = if at_end { bytes.len() } else { cut_of(&bytes) };
        let text = match options.encoding {
            Encoding::Latin1 => bytes[mark..cut].iter().map(|&byte| char::from(byte)).collect(),
            Encoding::Utf8 => utf8(&source.name, &bytes[..cut], mark, (at, line))?.to_string(),
        };
        let text = if text.contains("\r\n") { text.replace("\r\n", "\n") } else { text };
        if !text.is_empty() {
            visit(Piece { text: &text, line, has_lines: true })?;
        }
        if at_end {
            return Ok(());
        }
        line += text.matches('\n').count() as u64;
        at += cut as u64;
        bytes.drain(..cut);
    }
}

/// Where to cut bytes of which more follow: behind the last line end, else the last blank, else between two characters.
fn cut_of(bytes: &[u8]) -> usize {
    let behind = |is: fn(u8) -> bool| bytes.iter().rposition(|&byte| is(byte)).map(|at| at + 1);
    behind(|byte| byte == b'\n').or_else(|| behind(|byte| byte == b' ' || byte == b'\t')).unwrap_or_else(|| {
        // The last character may go on, and the second byte of a line end may follow.
        let whole = bytes.iter().rposition(|&byte| !(0x80..0xC0).contains(&byte)).unwrap_or(0);
        if whole == 0 { bytes.len() } else { whole }
    })
}

fn check_not_empty(source: &Source, empty: bool) -> Result<(), DataError> {
    if empty { Err(DataError::Empty { file: source.name.clone(), wanted: "text".to_string() }) } else { Ok(()) }
}

/// A file as text, its line ends as `\n`, without a byte order mark.
pub(super) fn decode(source: &Source, encoding: Encoding) -> Result<String, DataError> {
    let mut all = String::new();
    let options = TextOptions { encoding, ..TextOptions::default() };
    read_text(source, &options, &mut |piece| {
        all.push_str(piece.text);
        Ok(())
    })?;
    Ok(all)
}

/// `bytes` without the first `mark` of them as characters; they stand at this byte and in this line of their file.
fn utf8<'a>(name: &str, bytes: &'a [u8], mark: usize, (at, line): (u64, u64)) -> Result<&'a str, DataError> {
    std::str::from_utf8(&bytes[mark..]).map_err(|e| {
        let bad = mark + e.valid_up_to();
        let is_utf16 = at == 0 && (bytes.starts_with(b"\xFF\xFE") || bytes.starts_with(b"\xFE\xFF"));
        let line = line + bytes[..bad].iter().filter(|&&byte| byte == b'\n').count() as u64;
        DataError::Encoding {
            file: name.to_string(),
            place: format!("line {line}, byte {}", at + bad as u64),
            value: bytes[bad],
            remedy: if is_utf16 {
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
    tokens: Tokens,
    n_streams: usize,
    stream_len: usize,
    window: usize,
}

impl TextBatches {
    /// `what` names the text in messages; `window` is `T`.
    ///
    /// # Errors
    /// [`DataError::TooShort`] if the text has fewer tokens than a window and its last target, or than two for each stream.
    pub fn new(what: &str, tokens: impl Into<Tokens>, n_streams: usize, window: usize) -> Result<Self, DataError> {
        check_sizes(n_streams, window)?;
        let tokens = tokens.into();
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

    fn batch(&self, _epoch: u64, idx: u64) -> Result<Batch, DataError> {
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
    tokens: Tokens,
    starts: Vec<usize>,
    lens: Vec<usize>,
    window: usize,
}

impl TextEval {
    /// `n_streams` streams (fewer where there are fewer targets), windows of `window` steps. A text of less than two tokens has no batches.
    ///
    /// # Errors
    /// [`DataError::Option`] for no streams or an empty window.
    pub fn new(tokens: impl Into<Tokens>, n_streams: usize, window: usize) -> Result<Self, DataError> {
        check_sizes(n_streams, window)?;
        let tokens = tokens.into();
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

    fn batch(&self, _epoch: u64, idx: u64) -> Result<Batch, DataError> {
        window_of(&self.tokens, &self.starts, &self.lens, self.window, idx)
    }
}

/// Window `idx` of streams that start at token `starts[r]` and have `lens[r]` steps, the first one the longest.
fn window_of(tokens: &Tokens, starts: &[usize], lens: &[usize], window: usize, idx: u64) -> Result<Batch, DataError> {
    let first = idx as usize * window;
    assert!(first < lens[0], "window {idx} of a stream of {} tokens in windows of {window}", lens[0]);
    let (n_steps, n_rows) = (window.min(lens[0] - first), starts.len());
    // A row that has ended reads token 0 and weighs nothing.
    let mut inputs = vec![0; n_steps * n_rows];
    let mut targets = vec![0; n_steps * n_rows];
    let mut weights = vec![0.0; n_steps * n_rows];
    let (mut scratch, mut row) = (Vec::new(), Vec::with_capacity(n_steps + 1));
    for (r, (&start, &len)) in starts.iter().zip(lens).enumerate() {
        let n = n_steps.min(len.saturating_sub(first));
        let at = start + first;
        row.clear();
        tokens.read(at.min(tokens.len())..(at + n + usize::from(n > 0)).min(tokens.len()), &mut scratch, &mut row)?;
        for (t, &token) in row.iter().enumerate() {
            if t < n {
                inputs[t * n_rows + r] = token;
            }
            if t > 0 {
                targets[(t - 1) * n_rows + r] = token;
                weights[(t - 1) * n_rows + r] = 1.0;
            }
        }
    }
    let streams = (0..n_rows as u32).collect();
    Ok(Batch::new(n_steps, Input::Tokens(inputs), Target::Tokens(targets), weights, streams, idx == 0, true))
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
