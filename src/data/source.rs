//! From what `--data` says to bytes: files, globs, folders, standard input, unpacked where they are packed. What the bytes mean is not known here.
//!
//! A [`Source`] is found before it is read, and may be opened as often as one likes; what comes from a pipe is kept, in memory as long as it is
//! small. Packing is told by the first bytes, whatever the name.

use std::fs::{self, File};
use std::io::{self, BufReader, Cursor, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::DataError;
use super::remote::{fetch, is_url};
use super::tokens::{cache_folder, read_at};

/// What is kept in memory of a pipe; more goes to a file without a name.
const PIPE_IN_MEMORY: u64 = 64 << 20;

/// One file, or what stands for one.
#[derive(Clone, Debug)]
pub struct Source {
    /// The name for messages.
    pub name: String,
    place: Place,
}

#[derive(Clone, Debug)]
enum Place {
    Memory(Arc<[u8]>),
    /// Without a name.
    Kept(Arc<File>),
    Path(PathBuf),
}

/// How the bytes of a source are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Not at all.
    Plain,
    /// gzip, several members too.
    Gzip,
    /// Zstandard, several frames too.
    Zstd,
}

const GZIP: &[u8] = &[0x1F, 0x8B];
const ZSTD: &[u8] = &[0x28, 0xB5, 0x2F, 0xFD];
/// Endings that say that a file is packed.
const PACKED: [&str; 3] = [".gz", ".zst", ".zstd"];

/// A file's name without the ending that says that it is packed.
pub fn unpacked_name(name: &str) -> &str {
    let cut = PACKED.iter().find_map(|end| {
        let at = name.len().checked_sub(end.len())?;
        (name.is_char_boundary(at) && name[at..].eq_ignore_ascii_case(end)).then_some(at)
    });
    &name[..cut.unwrap_or(name.len())]
}

impl Source {
    /// Bytes in memory under a name for messages, whose ending tells what they are.
    pub fn from_bytes(name: impl Into<String>, bytes: impl Into<Arc<[u8]>>) -> Self {
        Self { name: name.into(), place: Place::Memory(bytes.into()) }
    }

    /// The file at `path` or URL, which must be there; a pipe is read to its end, and what is behind a URL is fetched.
    ///
    /// # Errors
    /// [`DataError::Source`] where there is none, [`DataError::Read`] where it cannot be looked at.
    pub fn at(path: &Path) -> Result<Self, DataError> {
        let name = path.display().to_string();
        if is_url(&name) {
            let place = Place::Path(fetch(&name)?);
            return Ok(Self { name, place });
        }
        match fs::metadata(path) {
            Ok(found) if found.is_file() => Ok(Self { name, place: Place::Path(path.to_path_buf()) }),
            Ok(_) => {
                let pipe = File::open(path).map_err(|source| DataError::Read { file: name.clone(), source })?;
                Self::keep(name, pipe)
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(refuse(&name, "no such file", "check the path (a pattern needs * or ?, standard input is -)"))
            }
            Err(source) => Err(DataError::Read { file: name, source }),
        }
    }

    fn standard_input() -> Result<Self, DataError> {
        let stdin = io::stdin().lock();
        if stdin.is_terminal() {
            return Err(refuse("-", "standard input is a terminal", "pipe data into it (zcat FILE | carrousel ...), or name a file"));
        }
        Self::keep("standard input".to_string(), stdin)
    }

    /// All of what can be read but once.
    fn keep(name: String, mut pipe: impl Read) -> Result<Self, DataError> {
        let unreadable = |source| DataError::Read { file: name.clone(), source };
        let mut bytes = Vec::new();
        (&mut pipe).take(PIPE_IN_MEMORY).read_to_end(&mut bytes).map_err(unreadable)?;
        if (bytes.len() as u64) < PIPE_IN_MEMORY {
            return Ok(Self { name, place: Place::Memory(bytes.into()) });
        }
        // A temporary folder may lie in memory, where the cache does not.
        let folder = cache_folder();
        let file = fs::create_dir_all(&folder).and_then(|()| tempfile::tempfile_in(&folder));
        let mut file = file.map_err(|source| DataError::Read { file: format!("{name}, kept in {}", folder.display()), source })?;
        file.write_all(&bytes).and_then(|()| io::copy(&mut pipe, &mut file)).map_err(unreadable)?;
        Ok(Self { name, place: Place::Kept(Arc::new(file)) })
    }

    /// The file, if it is one with a name.
    pub fn path(&self) -> Option<&Path> {
        match &self.place {
            Place::Path(path) => Some(path),
            Place::Memory(_) | Place::Kept(_) => None,
        }
    }

    /// Whether the name, without what says that it is packed, ends so, in any case.
    pub fn is_named(&self, ends: &[&str]) -> bool {
        let name = unpacked_name(&self.name).to_lowercase();
        ends.iter().any(|end| name.ends_with(end))
    }

    /// Bytes as they lie there, packed or not.
    ///
    /// # Errors
    /// [`DataError::Read`].
    pub fn stored_len(&self) -> Result<u64, DataError> {
        let len = match &self.place {
            Place::Memory(bytes) => Ok(bytes.len() as u64),
            Place::Kept(file) => file.metadata().map(|found| found.len()),
            Place::Path(path) => fs::metadata(path).map(|found| found.len()),
        };
        len.map_err(|source| DataError::Read { file: self.name.clone(), source })
    }

    /// The bytes as they lie there, from the first one on.
    pub(super) fn open_stored(&self) -> Result<Box<dyn Read + Send>, DataError> {
        Ok(match &self.place {
            Place::Memory(bytes) => Box::new(Cursor::new(Arc::clone(bytes))),
            Place::Kept(file) => Box::new(BufReader::with_capacity(BUFFER, FromStart { file: Arc::clone(file), at: 0 })),
            Place::Path(path) => {
                let file = File::open(path).map_err(|source| DataError::Read { file: self.name.clone(), source })?;
                Box::new(BufReader::with_capacity(BUFFER, file))
            }
        })
    }

    /// Opens it at its first byte; what is packed comes out unpacked.
    ///
    /// # Errors
    /// [`DataError::Read`]; [`DataError::Source`] where the name says that it is packed, and it is not.
    pub fn open(&self) -> Result<Reader, DataError> {
        let mut stored = self.open_stored()?;
        let mut head = Vec::with_capacity(4);
        (&mut stored).take(4).read_to_end(&mut head).map_err(|source| DataError::Read { file: self.name.clone(), source })?;
        let packing = if head.starts_with(GZIP) {
            Packing::Gzip
        } else if head.starts_with(ZSTD) {
            Packing::Zstd
        } else {
            Packing::Plain
        };
        if packing == Packing::Plain && unpacked_name(&self.name) != self.name && !head.is_empty() {
            return Err(refuse(
                &self.name,
                "the name says that the file is packed, but it is neither gzip nor zstd",
                "rename it, or fetch it again",
            ));
        }
        let whole = Cursor::new(head).chain(stored);
        let inner: Box<dyn Read + Send> = match packing {
            Packing::Plain => Box::new(whole),
            Packing::Gzip => Box::new(flate2::read::MultiGzDecoder::new(whole)),
            Packing::Zstd => {
                Box::new(zstd::stream::read::Decoder::new(whole).map_err(|source| DataError::Read { file: self.name.clone(), source })?)
            }
        };
        Ok(Reader { inner, name: self.name.clone(), packing, at: 0 })
    }

    /// All of it, unpacked, as a file for those who must read it from its end.
    ///
    /// # Errors
    /// As [`Source::open`]; a cache folder that cannot be written to.
    #[cfg(feature = "parquet")]
    pub(super) fn whole_file(&self) -> Result<File, DataError> {
        let mut reader = self.open()?;
        if let (Place::Path(path), Packing::Plain) = (&self.place, reader.packing) {
            return File::open(path).map_err(|source| DataError::Read { file: self.name.clone(), source });
        }
        let folder = cache_folder();
        let failed = |source| DataError::Cache { file: folder.display().to_string(), source };
        let mut file = fs::create_dir_all(&folder).and_then(|()| tempfile::tempfile_in(&folder)).map_err(failed)?;
        let mut bytes = vec![0; BUFFER];
        loop {
            match reader.fill(&mut bytes)? {
                0 => return Ok(file),
                n => file.write_all(&bytes[..n]).map_err(failed)?,
            }
        }
    }

    /// All of it, unpacked.
    ///
    /// # Errors
    /// As [`Source::open`] and [`Reader::fill`].
    pub fn read(&self) -> Result<Vec<u8>, DataError> {
        let mut reader = self.open()?;
        let mut bytes = Vec::new();
        let expected = if reader.packing == Packing::Plain { self.stored_len()? as usize } else { 0 };
        bytes.try_reserve_exact(expected + 1).map_err(|_| {
            let problem = format!("it has {expected} bytes, more than there is memory for");
            refuse(&self.name, &problem, "cut it into several files, or train on less")
        })?;
        loop {
            let n = bytes.len();
            bytes.resize((n + BUFFER).max(bytes.capacity().min(n + READ_AT_ONCE)), 0);
            let got = reader.fill(&mut bytes[n..])?;
            bytes.truncate(n + got);
            if got == 0 {
                return Ok(bytes);
            }
        }
    }
}

const READ_AT_ONCE: usize = 16 << 20;
const BUFFER: usize = 1 << 16;

/// A file read from its start by whoever holds it, whatever others read of it.
struct FromStart {
    file: Arc<File>,
    at: u64,
}

impl Read for FromStart {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = read_at(&self.file, buffer, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

/// An open source, unpacked as it is read.
pub struct Reader {
    inner: Box<dyn Read + Send>,
    name: String,
    packing: Packing,
    at: u64,
}

impl Reader {
    /// How the source is packed.
    pub fn packing(&self) -> Packing {
        self.packing
    }

    /// Reads until `buffer` is full or the source ends; how many bytes that were.
    ///
    /// # Errors
    /// [`DataError::Read`]; [`DataError::Source`] where what is packed is damaged or cut off.
    pub fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, DataError> {
        let mut n = 0;
        while n < buffer.len() {
            match self.inner.read(&mut buffer[n..]) {
                Ok(0) => break,
                Ok(got) => n += got,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.failed(self.at + n as u64, e)),
            }
        }
        self.at += n as u64;
        Ok(n)
    }

    fn failed(&self, at: u64, source: io::Error) -> DataError {
        let (name, test) = match self.packing {
            // The system's own errors say that the disk failed, not the packing.
            _ if source.raw_os_error().is_some() => return DataError::Read { file: self.name.clone(), source },
            Packing::Plain => return DataError::Read { file: self.name.clone(), source },
            Packing::Gzip => ("gzip", "gzip -t FILE"),
            Packing::Zstd => ("zstd", "zstd -t FILE"),
        };
        let how =
            if source.kind() == io::ErrorKind::UnexpectedEof { "ends too early".to_string() } else { format!("is damaged ({source})") };
        refuse(
            &self.name,
            &format!("the {name} stream {how}, {at} bytes into what it unpacks to"),
            &format!("fetch it again; {test} tells more"),
        )
    }
}

/// What `--data` came to.
#[derive(Clone, Debug)]
pub enum Sources {
    /// Files to be taken one after the other, then cut by fractions.
    Whole(Vec<Source>),
    /// Files that say themselves which part they are; at least one for training, the other parts may be empty.
    Parts {
        /// For training.
        train: Vec<Source>,
        /// For validation.
        valid: Vec<Source>,
        /// For the test.
        test: Vec<Source>,
    },
}

impl Sources {
    /// Finds everything that the values of `--data` name: a file, a glob, a URL, `-` (standard input), or a folder whose file names contain
    /// `train`, `valid`, `val` or `dev`, `test` in any case. Files of a glob or a folder come in the order of their names.
    /// Several files of which each is named like a part are taken as parts too.
    ///
    /// # Errors
    /// [`DataError::Source`] where nothing is found, [`DataError::Read`] where it cannot be looked at.
    pub fn find(data: &[String]) -> Result<Self, DataError> {
        if data.is_empty() {
            return Err(refuse("", "nothing was given", "name a file, a glob, a folder, or - for standard input"));
        }
        let mut files = Vec::new();
        let mut folder = None;
        for given in data {
            let path = Path::new(given);
            if given == "-" {
                files.push(None);
            } else if is_url(given) {
                files.push(Some(path.to_path_buf()));
            } else if path.is_dir() {
                folder = Some(given);
                files.extend(list(given)?.into_iter().map(Some));
            } else if !path.exists() && given.contains(['*', '?', '[']) {
                files.extend(expand(given)?.into_iter().map(Some));
            } else {
                files.push(Some(path.to_path_buf()));
            }
        }
        let roles: Vec<Roles> = files.iter().map(|file| file.as_deref().map_or(Roles::default(), Roles::of)).collect();
        let any_train = roles.iter().any(|role| role.train);
        if let Some(folder) = folder {
            if !any_train {
                let names: Vec<String> = files.iter().flatten().map(|path| file_name(path)).collect();
                return Err(refuse(
                    folder,
                    &format!("no file name in this folder contains 'train' ({})", shorten(&names)),
                    "name the files train, valid (or val, dev) and test, or name one file",
                ));
            }
        } else if files.len() < 2 || !any_train || roles.iter().any(|role| role.count() != 1) {
            return Ok(Self::Whole(files.iter().map(|file| open(file.as_deref())).collect::<Result<_, _>>()?));
        }
        let (mut train, mut valid, mut test) = (Vec::new(), Vec::new(), Vec::new());
        for (file, role) in files.iter().zip(roles) {
            if role.count() > 1 {
                let name = file.as_deref().map(|path| path.display().to_string()).unwrap_or_default();
                return Err(refuse(
                    &name,
                    "the name says more than one of train, valid and test",
                    "rename the file or name the files one by one",
                ));
            }
            // Other files of a folder (a README, a licence) are left alone.
            if role.count() == 1 {
                let part = if role.train {
                    &mut train
                } else if role.valid {
                    &mut valid
                } else {
                    &mut test
                };
                part.push(open(file.as_deref())?);
            }
        }
        Ok(Self::Parts { train, valid, test })
    }

    /// For what only looks at data: the test files of a folder that has them, else all files.
    pub fn into_held_out(self) -> Vec<Source> {
        match self {
            Self::Whole(all) => all,
            Self::Parts { train, valid, test } if test.is_empty() => train.into_iter().chain(valid).collect(),
            Self::Parts { test, .. } => test,
        }
    }
}

/// Which parts a file's name speaks of.
#[derive(Clone, Copy, Default)]
struct Roles {
    train: bool,
    valid: bool,
    test: bool,
}

impl Roles {
    fn of(path: &Path) -> Self {
        let name = file_name(path).to_lowercase();
        Self { train: name.contains("train"), valid: name.contains("val") || name.contains("dev"), test: name.contains("test") }
    }

    fn count(self) -> usize {
        [self.train, self.valid, self.test].iter().filter(|&&is| is).count()
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The files of a folder by name, without hidden ones and folders.
fn list(folder: &str) -> Result<Vec<PathBuf>, DataError> {
    let unreadable = |source| DataError::Read { file: folder.to_string(), source };
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.is_file() && !file_name(&path).starts_with('.') {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn expand(pattern: &str) -> Result<Vec<PathBuf>, DataError> {
    let paths =
        glob::glob(pattern).map_err(|e| refuse(pattern, &format!("not a pattern: {e}"), "quote the name or correct the pattern"))?;
    let mut files = Vec::new();
    for path in paths {
        let path = path.map_err(|e| DataError::Read { file: e.path().display().to_string(), source: e.into() })?;
        if path.is_file() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(refuse(pattern, "no file matches", "check the folder and the pattern"));
    }
    files.sort();
    Ok(files)
}

fn open(path: Option<&Path>) -> Result<Source, DataError> {
    path.map_or_else(Source::standard_input, Source::at)
}

fn shorten(names: &[String]) -> String {
    match names.len() {
        0 => "it is empty".to_string(),
        1..=6 => names.join(", "),
        n => format!("{}, and {} more", names[..6].join(", "), n - 6),
    }
}

pub(super) fn refuse(given: &str, problem: &str, remedy: &str) -> DataError {
    DataError::Source { given: given.to_string(), problem: problem.to_string(), remedy: remedy.to_string() }
}
