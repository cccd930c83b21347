//! Vocabularies: what a token number stands for. Kept in the run folder as JSON; files are not read here.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::error::DataError;

/// The entry for what the vocabulary does not hold.
pub const UNK: &str = "<unk>";
/// The entry for the end of a line, at word level.
pub const EOS: &str = "<eos>";

/// What one token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// A byte: 256 of them, whatever the encoding.
    Byte,
    /// A character.
    Char,
    /// What stands between white space; a line end is a word of its own.
    Word,
}

impl std::str::FromStr for Level {
    type Err = DataError;

    fn from_str(text: &str) -> Result<Self, DataError> {
        match text {
            "byte" => Ok(Self::Byte),
            "char" => Ok(Self::Char),
            "word" => Ok(Self::Word),
            _ => Err(DataError::Option {
                name: "--level",
                value: text.to_string(),
                problem: "no such level".to_string(),
                remedy: "use byte, char or word".to_string(),
            }),
        }
    }
}

/// Token numbers and what they stand for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Vocab {
    level: Level,
    // Empty at byte level.
    entries: Vec<String>,
    index: HashMap<String, u32>,
    unk: Option<u32>,
}

/// The form on disk.
#[derive(Serialize, Deserialize)]
struct Stored {
    level: Level,
    entries: Vec<String>,
}

impl From<Vocab> for Stored {
    fn from(vocab: Vocab) -> Self {
        Self { level: vocab.level, entries: vocab.entries }
    }
}

impl TryFrom<Stored> for Vocab {
    type Error = DataError;

    fn try_from(stored: Stored) -> Result<Self, DataError> {
        let damaged = |problem: String| Err(DataError::Vocabulary { problem });
        match stored.level {
            Level::Byte if !stored.entries.is_empty() => {
                return damaged(format!("level byte with {} entries", stored.entries.len()));
            }
            Level::Char => {
                if let Some(entry) = stored.entries.iter().find(|entry| *entry != UNK && entry.chars().count() != 1) {
                    return damaged(format!("'{entry}' is not one character"));
                }
            }
            Level::Word => {
                if let Some(name) = [UNK, EOS].iter().find(|name| !stored.entries.iter().any(|entry| entry == *name)) {
                    return damaged(format!("the entry {name} is missing"));
                }
            }
            Level::Byte => {}
        }
        if stored.level != Level::Byte && stored.entries.is_empty() {
            return damaged("it has no entries".to_string());
        }
        let n = stored.entries.len();
        let vocab = Self::from_entries(stored.level, stored.entries);
        if vocab.index.len() != n {
            return damaged(format!("{n} entries, but only {} different ones", vocab.index.len()));
        }
        Ok(vocab)
    }
}

impl Vocab {
    fn from_entries(level: Level, entries: Vec<String>) -> Self {
        let index: HashMap<String, u32> = entries.iter().enumerate().map(|(i, entry)| (entry.clone(), i as u32)).collect();
        let unk = index.get(UNK).copied();
        Self { level, entries, index, unk }
    }

    /// All 256 bytes.
    pub fn bytes() -> Self {
        Self::from_entries(Level::Byte, Vec::new())
    }

    /// The characters of `text` in the order of their code points. With `limit`, the most frequent ones and `<unk>`, together `limit`.
    ///
    /// # Errors
    /// [`DataError::Option`] if the limit leaves no room.
    pub fn chars(text: &str, limit: Option<usize>) -> Result<Self, DataError> {
        let mut counts: HashMap<char, u64> = HashMap::new();
        for c in text.chars() {
            *counts.entry(c).or_default() += 1;
        }
        Self::of_chars(counts, limit)
    }

    /// As [`Vocab::chars`], of characters that were counted already.
    ///
    /// # Errors
    /// As [`Vocab::chars`].
    pub fn of_chars(counts: impl IntoIterator<Item = (char, u64)>, limit: Option<usize>) -> Result<Self, DataError> {
        let mut ranked: Vec<(char, u64)> = counts.into_iter().collect();
        let mut entries = Vec::new();
        if let Some(limit) = limit.filter(|&limit| limit < ranked.len()) {
            check_limit(limit, 2, "a character and <unk>")?;
            ranked.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
            ranked.truncate(limit - 1);
            entries.push(UNK.to_string());
        }
        ranked.sort();
        entries.extend(ranked.iter().map(|(c, _)| c.to_string()));
        Ok(Self::from_entries(Level::Char, entries))
    }

    /// `<unk>`, `<eos>`, then the words of `text` from the most frequent to the rarest (equal ones in alphabetical order).
    /// A literal `<unk>` or `<eos>` in the text is that entry. With `limit`, at most so many entries in all.
    ///
    /// # Errors
    /// [`DataError::Option`] if the limit leaves no room.
    pub fn words<'a>(words: impl IntoIterator<Item = &'a str>, limit: Option<usize>) -> Result<Self, DataError> {
        let mut counts: HashMap<&str, u64> = HashMap::new();
        for word in words {
            *counts.entry(word).or_default() += 1;
        }
        Self::of_words(counts.into_iter().map(|(word, n)| (word.to_string(), n)), limit)
    }

    /// As [`Vocab::words`], of words that were counted already.
    ///
    /// # Errors
    /// As [`Vocab::words`].
    pub fn of_words(counts: impl IntoIterator<Item = (String, u64)>, limit: Option<usize>) -> Result<Self, DataError> {
        if let Some(limit) = limit {
            check_limit(limit, 3, "a word, <unk> and <eos>")?;
        }
        let mut ranked: Vec<(String, u64)> = counts.into_iter().filter(|(word, _)| word != UNK && word != EOS).collect();
        ranked.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        ranked.truncate(limit.map_or(usize::MAX, |limit| limit - 2));
        let entries = [UNK, EOS].map(str::to_string).into_iter().chain(ranked.into_iter().map(|(word, _)| word)).collect();
        Ok(Self::from_entries(Level::Word, entries))
    }

    /// What one token is.
    pub fn level(&self) -> Level {
        self.level
    }

    /// `V`, the number of tokens.
    pub fn size(&self) -> usize {
        if self.level == Level::Byte { 256 } else { self.entries.len() }
    }

    /// The token for what is not in the vocabulary, if there is one.
    pub fn unk(&self) -> Option<u32> {
        self.unk
    }

    /// The token of a line end (word level only).
    pub fn eos(&self) -> Option<u32> {
        if self.level == Level::Word { self.index.get(EOS).copied() } else { None }
    }

    /// Tokens of a prompt. Its last line stays open at word level (no `<eos>` unless the prompt ends with a line end).
    ///
    /// # Errors
    /// [`DataError::UnknownSymbol`] for a character that the vocabulary lacks, if it has no `<unk>`.
    pub fn encode_prompt(&self, prompt: &str) -> Result<Vec<u32>, DataError> {
        match self.level {
            Level::Byte => Ok(self.encode_bytes(prompt.as_bytes())),
            Level::Char => self.encode_chars(prompt, |c, _, at| DataError::UnknownSymbol {
                place: format!("prompt, character {}", at + 1),
                symbol: show(c),
                size: self.size(),
                unit: "characters",
                remedy: format!("write the prompt without it, with {}", self.sample()),
            }),
            Level::Word => {
                let mut tokens = self.encode_words(words(prompt));
                if !prompt.is_empty() && !prompt.ends_with('\n') {
                    tokens.pop();
                }
                Ok(tokens)
            }
        }
    }

    /// Tokens of one line that stands by itself at `place`: at word level without `<eos>`.
    ///
    /// # Errors
    /// [`DataError::UnknownSymbol`] for a character that the vocabulary lacks, if it has no `<unk>`.
    pub fn encode_line(&self, place: &str, line: &str) -> Result<Vec<u32>, DataError> {
        match self.level {
            Level::Byte => Ok(self.encode_bytes(line.as_bytes())),
            Level::Char => self.encode_chars(line, |c, _, _| self.unknown_char(place, c)),
            Level::Word => Ok(self.encode_words(line.split_whitespace())),
        }
    }

    /// Says that the character at `place` is not in this vocabulary.
    pub(super) fn unknown_char(&self, place: &str, c: char) -> DataError {
        DataError::UnknownSymbol {
            place: place.to_string(),
            symbol: show(c),
            size: self.size(),
            unit: "characters",
            remedy: "take it out, or train with --level byte or on text that has it".to_string(),
        }
    }

    /// The token of a word; an unknown one is `<unk>`.
    pub(super) fn word(&self, word: &str) -> u32 {
        self.index.get(word).copied().or(self.unk).unwrap_or(0)
    }

    /// For long texts.
    pub(super) fn char_table(&self) -> CharTable {
        let mut tokens = vec![u32::MAX; char::MAX as usize + 1];
        for (entry, &token) in &self.index {
            let mut chars = entry.chars();
            if let (Some(c), None) = (chars.next(), chars.next()) {
                tokens[c as usize] = token;
            }
        }
        CharTable { tokens, unk: self.unk }
    }

    /// Tokens of bytes: their values.
    pub fn encode_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        bytes.iter().map(|&byte| u32::from(byte)).collect()
    }

    /// Tokens of words; unknown ones are `<unk>`.
    pub fn encode_words<'a>(&self, words: impl IntoIterator<Item = &'a str>) -> Vec<u32> {
        words.into_iter().map(|word| self.word(word)).collect()
    }

    fn encode_chars(&self, text: &str, unknown: impl Fn(char, usize, usize) -> DataError) -> Result<Vec<u32>, DataError> {
        let mut utf8 = [0; 4];
        text.char_indices()
            .enumerate()
            .map(|(at, (byte, c))| self.index.get(&*c.encode_utf8(&mut utf8)).copied().or(self.unk).ok_or_else(|| unknown(c, byte, at)))
            .collect()
    }

    /// The text of tokens: words with spaces between them and a line end for `<eos>`; bytes that are not UTF-8 come out as U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let mut decoder = self.decoder_after("");
        let mut text: String = tokens.iter().map(|&token| decoder.push(token)).collect();
        text.push_str(decoder.finish());
        text
    }

    /// Decodes token by token what follows `text`.
    pub fn decoder_after(&self, text: &str) -> Decoder<'_> {
        Decoder { vocab: self, open: !text.is_empty() && !text.ends_with(char::is_whitespace), bytes: Vec::new() }
    }

    /// The words or characters of a prompt that stand for nothing in this vocabulary, each once.
    pub fn unknown_in<'a>(&self, prompt: &'a str) -> Vec<&'a str> {
        let symbols: Vec<&str> = match self.level {
            Level::Byte => Vec::new(),
            Level::Char => prompt.char_indices().map(|(at, c)| &prompt[at..at + c.len_utf8()]).collect(),
            Level::Word => prompt.split_whitespace().collect(),
        };
        let mut unknown = Vec::new();
        for symbol in symbols {
            if !self.index.contains_key(symbol) && !unknown.contains(&symbol) {
                unknown.push(symbol);
            }
        }
        unknown
    }

    /// Some characters of the vocabulary, blanks and line ends in a form that is seen.
    fn sample(&self) -> String {
        let some: Vec<char> =
            self.entries.iter().filter(|entry| *entry != UNK).filter_map(|entry| entry.chars().next()).take(100).collect();
        let (hidden, seen): (Vec<char>, Vec<char>) = some.into_iter().partition(|c| c.is_whitespace() || c.is_control());
        let mut parts: Vec<String> = hidden.iter().map(|c| format!("{c:?}")).collect();
        parts.extend((!seen.is_empty()).then(|| seen.iter().collect()));
        if self.size() > 100 {
            parts.push("...".to_owned());
        }
        parts.join(" ")
    }
}

/// Tokens by code point.
pub(super) struct CharTable {
    tokens: Vec<u32>,
    unk: Option<u32>,
}

impl CharTable {
    /// The character's token, or that of `<unk>`, if there is one.
    pub fn get(&self, c: char) -> Option<u32> {
        Some(self.tokens[c as usize]).filter(|&token| token != u32::MAX).or(self.unk)
    }
}

/// Text from tokens as they come; the pieces together are what [`Vocab::decode`] makes of all of them.
pub struct Decoder<'a> {
    vocab: &'a Vocab,
    /// The last line has a word already, so that the next one needs a blank before it.
    open: bool,
    /// The beginning of a character.
    bytes: Vec<u8>,
}

impl Decoder<'_> {
    /// The text that `token` adds; empty within a character of several bytes.
    pub fn push(&mut self, token: u32) -> String {
        if self.vocab.level == Level::Byte {
            self.bytes.push(token as u8);
            return self.take_characters();
        }
        let Some(entry) = self.vocab.entries.get(token as usize) else { return String::new() };
        match self.vocab.level {
            Level::Word if entry == EOS => {
                self.open = false;
                "\n".to_owned()
            }
            Level::Word if std::mem::replace(&mut self.open, true) => format!(" {entry}"),
            _ => entry.clone(),
        }
    }

    /// What is left: a character that was cut off counts as one that is none.
    pub fn finish(self) -> &'static str {
        if self.bytes.is_empty() { "" } else { "\u{fffd}" }
    }

    fn take_characters(&mut self) -> String {
        let mut text = String::new();
        loop {
            let error = match std::str::from_utf8(&self.bytes) {
                Ok(rest) => {
                    text.push_str(rest);
                    self.bytes.clear();
                    return text;
                }
                Err(error) => error,
            };
            let bad = error.error_len();
            text.push_str(&String::from_utf8_lossy(&self.bytes[..error.valid_up_to()]));
            if bad.is_some() {
                text.push('\u{fffd}');
            }
            self.bytes.drain(..error.valid_up_to() + bad.unwrap_or(0));
            if bad.is_none() {
                return text;
            }
        }
    }
}

/// The words of `text`, with `<eos>` at each line end, also at the end of a last line that has none.
pub fn words(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| line.split_whitespace().chain(std::iter::once(EOS)))
}

fn show(c: char) -> String {
    format!("character {c:?} (U+{:04X})", u32::from(c))
}

fn check_limit(limit: usize, least: usize, room: &str) -> Result<(), DataError> {
    if limit >= least {
        return Ok(());
    }
    Err(DataError::Option {
        name: "--vocab",
        value: limit.to_string(),
        problem: format!("at least {least} entries are needed ({room})"),
        remedy: "give a larger number, or leave the flag out to keep all".to_string(),
    })
}
