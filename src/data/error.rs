//! What can be wrong with input data. All of it is for the person who gave the data: the thing, where it is, both values, the remedy.

use std::io;

use super::records;

/// An error of the data on its way in. Everything but [`DataError::Prefetch`] and [`DataError::Cache`] means that the input (or what was asked of it) is wrong.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file or a folder could not be read.
    #[error("cannot read {file}: {source}")]
    Read {
        /// The file as given.
        file: String,
        /// What the system said.
        source: io::Error,
    },
    /// A file of tokens could not be written.
    #[error("cannot write {file}: {source}; free some space there, or name another folder in CARROUSEL_CACHE")]
    Cache {
        /// The file, or its folder.
        file: String,
        /// What the system said.
        source: io::Error,
    },
    /// `--data` names nothing that can be used.
    #[error("--data {given}: {problem}; {remedy}")]
    Source {
        /// What was given.
        given: String,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// Nothing in the file.
    #[error("{file} is empty; give a file with {wanted}")]
    Empty {
        /// The file.
        file: String,
        /// What it should hold.
        wanted: String,
    },
    /// Bytes that are not text in the encoding asked for.
    #[error("{file}: {place} is 0x{value:02X}, which is not UTF-8; {remedy}")]
    Encoding {
        /// The file.
        file: String,
        /// The byte's offset from the start of the file, and its line where lines matter.
        place: String,
        /// The byte.
        value: u8,
        /// What to do.
        remedy: String,
    },
    /// Fewer tokens or rows than asked for.
    #[error("{what} has {has} {unit}, but {needs} are needed for {purpose}; {remedy}")]
    TooShort {
        /// File or part of a file.
        what: String,
        /// What there is.
        has: usize,
        /// Tokens or rows.
        unit: &'static str,
        /// What there must be.
        needs: usize,
        /// What for.
        purpose: String,
        /// What to do.
        remedy: String,
    },
    /// A line with more or fewer cells than the first one.
    #[error("{file}, line {line}: {has} cells, but the first line has {expected}{hint}; give every line the same number of cells")]
    Ragged {
        /// The file.
        file: String,
        /// Counted from 1.
        line: u64,
        /// Cells of this line.
        has: usize,
        /// Cells of the first line.
        expected: usize,
        /// What may be the reason; empty if unknown.
        hint: String,
    },
    /// A line that is not what it should be.
    #[error("{file}, {} {line}: {problem}; {remedy}", unit_of(file))]
    Line {
        /// The file.
        file: String,
        /// Counted from 1.
        line: u64,
        /// What is wrong.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// A cell that is not what its column is.
    #[error("{file}, {} {line}, column '{column}': {problem}; {remedy}", unit_of(file))]
    Cell {
        /// The file.
        file: String,
        /// Counted from 1.
        line: u64,
        /// The column's name.
        column: String,
        /// What is wrong, with the cell.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// A column as a whole is of no use.
    #[error("{file}, column '{column}': {problem}; {remedy}")]
    Column {
        /// The file.
        file: String,
        /// The column's name.
        column: String,
        /// What is wrong.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// A name that no column has.
    #[error("{flag} '{name}': {file} has no such column{nearest}; its columns are {columns}")]
    UnknownColumn {
        /// The flag that named it.
        flag: &'static str,
        /// The name.
        name: String,
        /// The file.
        file: String,
        /// ` (did you mean 'x'?)`, or empty.
        nearest: String,
        /// All columns.
        columns: String,
    },
    /// Fractions, sizes or levels that make no sense.
    #[error("{name} {value}: {problem}; {remedy}")]
    Option {
        /// The flag.
        name: &'static str,
        /// As given.
        value: String,
        /// What is wrong.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// A symbol that the vocabulary lacks.
    #[error("{place}: {symbol} is not in the vocabulary of {size} {unit}; {remedy}")]
    UnknownSymbol {
        /// File and byte, or the prompt and character.
        place: String,
        /// The symbol.
        symbol: String,
        /// Entries of the vocabulary.
        size: usize,
        /// Characters or words.
        unit: &'static str,
        /// What to do.
        remedy: String,
    },
    /// A vocabulary file that cannot be what this program wrote.
    #[error("the vocabulary is damaged: {problem}; take the file from an intact copy of the run folder")]
    Vocabulary {
        /// What is wrong.
        problem: String,
    },
    /// The thread that prepares batches failed: a fault of this program, not of the input.
    #[error("preparing batch {idx} of epoch {epoch} failed: {problem}")]
    Prefetch {
        /// Epoch, from 0.
        epoch: u64,
        /// Batch within the epoch, from 0.
        idx: u64,
        /// The panic's message.
        problem: String,
    },
}

/// What a file has one after the other.
fn unit_of(file: &str) -> &'static str {
    if records::has_rows(file) { "row" } else { "line" }
}

impl DataError {
    /// Whether the input or the arguments are to blame (exit code 2), not the program.
    pub fn is_input(&self) -> bool {
        !matches!(self, Self::Prefetch { .. } | Self::Cache { .. })
    }
}
