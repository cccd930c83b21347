//! From what `--data` says to bytes: files, globs, folders, standard input. What the bytes mean is not known here.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::error::DataError;

/// One file, read.
#[derive(Clone, Debug)]
pub struct Source {
    /// The name for messages.
    pub name: String,
    /// All of it.
    pub bytes: Vec<u8>,
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
    /// Reads everything that the values of `--data` name: a file, a glob, `-` (standard input), or a folder whose file names contain
    /// `train`, `valid`, `val` or `dev`, `test` in any case. Files of a glob or a folder come in the order of their names.
    /// Several files of which each is named like a part are taken as parts too.
    ///
    /// # Errors
    /// [`DataError::Source`] where nothing is found, [`DataError::Read`] where it cannot be read.
    pub fn read(data: &[String]) -> Result<Self, DataError> {
        if data.is_empty() {
            return Err(refuse("", "nothing was given", "name a file, a glob, a folder, or - for standard input"));
        }
        let mut files = Vec::new();
        let mut folder = None;
        for given in data {
            let path = Path::new(given);
            if given == "-" {
                files.push(None);
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
    let Some(path) = path else {
        let mut bytes = Vec::new();
        io::stdin().lock().read_to_end(&mut bytes).map_err(|source| DataError::Read { file: "standard input".to_string(), source })?;
        return Ok(Source { name: "standard input".to_string(), bytes });
    };
    let name = path.display().to_string();
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(refuse(&name, "no such file", "check the path (a pattern needs * or ?, standard input is -)"));
        }
        Err(source) => return Err(DataError::Read { file: name, source }),
    };
    if bytes.starts_with(&[0x1F, 0x8B]) {
        return Err(refuse(&name, "the file is compressed (gzip)", "unpack it first: gunzip -k FILE"));
    }
    Ok(Source { name, bytes })
}

fn shorten(names: &[String]) -> String {
    match names.len() {
        0 => "it is empty".to_string(),
        1..=6 => names.join(", "),
        n => format!("{}, and {} more", names[..6].join(", "), n - 6),
    }
}

fn refuse(given: &str, problem: &str, remedy: &str) -> DataError {
    DataError::Source { given: given.to_string(), problem: problem.to_string(), remedy: remedy.to_string() }
}
