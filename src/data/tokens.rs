//! The tokens of a text: in memory while they are few, else in a file of which only what a batch needs is read.
//!
//! A token takes one, two or four bytes, as the vocabulary asks. A file is read by position, a piece a row of a batch, so that nothing of it is
//! resident in this process: what was read lately stays in the system's page cache, which gives way when memory is short. Nothing is mapped;
//! a file that shrinks under the run is an error, not a signal.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::error::DataError;

/// Where what can be made again is kept: `CARROUSEL_CACHE`, else the user's cache folder.
pub fn cache_folder() -> PathBuf {
    let of = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(folder) = of("CARROUSEL_CACHE") {
        return folder;
    }
    let system = if cfg!(target_os = "macos") {
        of("HOME").map(|home| home.join("Library/Caches"))
    } else if cfg!(windows) {
        of("LOCALAPPDATA")
    } else {
        of("XDG_CACHE_HOME").filter(|folder| folder.is_absolute()).or_else(|| of("HOME").map(|home| home.join(".cache")))
    };
    system.unwrap_or_else(std::env::temp_dir).join("carrousel")
}

/// Reads at most `buffer.len()` bytes from byte `at` on, as `read` does, without moving the file's own position where the system can.
pub(super) fn read_at(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_at(file, buffer, at);
    #[cfg(windows)]
    return std::os::windows::fs::FileExt::seek_read(file, buffer, at);
    #[cfg(not(any(unix, windows)))]
    {
        use std::io::{Read, Seek, SeekFrom};
        let mut file = file.try_clone()?;
        file.seek(SeekFrom::Start(at))?;
        file.read(buffer)
    }
}

/// Bytes of a token, by the vocabulary.
pub(super) fn width_of(vocabulary: usize) -> usize {
    match vocabulary {
        0..=0x100 => 1,
        0x101..=0x1_0000 => 2,
        _ => 4,
    }
}

#[derive(Debug)]
enum Bytes {
    Memory(Vec<u8>),
    File(File),
}

#[derive(Debug)]
struct Store {
    /// For messages.
    name: String,
    width: usize,
    bytes: Bytes,
}

/// A piece of a text as token numbers.
#[derive(Clone, Debug)]
pub struct Tokens {
    store: Arc<Store>,
    range: Range<usize>,
}

impl From<&[u32]> for Tokens {
    fn from(tokens: &[u32]) -> Self {
        let largest = tokens.iter().copied().max().unwrap_or(0);
        let mut writer = TokenWriter::in_memory(width_of(largest as usize + 1));
        writer.pack(tokens);
        let (width, bytes) = (writer.width, Bytes::Memory(writer.packed));
        Self { store: Arc::new(Store { name: "memory".to_string(), width, bytes }), range: 0..tokens.len() }
    }
}

impl From<Vec<u32>> for Tokens {
    fn from(tokens: Vec<u32>) -> Self {
        tokens.as_slice().into()
    }
}

impl FromIterator<u32> for Tokens {
    fn from_iter<I: IntoIterator<Item = u32>>(tokens: I) -> Self {
        tokens.into_iter().collect::<Vec<u32>>().into()
    }
}

impl Tokens {
    /// Tokens of `width` bytes each in a file, little-endian, all of it.
    ///
    /// # Errors
    /// [`DataError::Read`].
    pub(super) fn of_file(name: String, file: File, width: usize) -> Result<Self, DataError> {
        let len = file.metadata().map_err(|source| DataError::Read { file: name.clone(), source })?.len();
        let range = 0..len as usize / width;
        Ok(Self { store: Arc::new(Store { name, width, bytes: Bytes::File(file) }), range })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// A piece of the piece; nothing is copied.
    ///
    /// # Panics
    /// If `range` reaches beyond the end.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len(), "tokens {range:?} of {}", self.len());
        Self { store: Arc::clone(&self.store), range: self.range.start + range.start..self.range.start + range.end }
    }

    /// Where it lies in all that the file or the memory holds.
    pub(super) fn place(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Bytes of tokens that are in this process's memory as long as the text is.
    pub fn resident_bytes(&self) -> usize {
        match &self.store.bytes {
            Bytes::Memory(bytes) => bytes.capacity(),
            Bytes::File(_) => 0,
        }
    }

    /// Appends the tokens of `range` to `out`; `scratch` is memory to work with.
    ///
    /// # Errors
    /// [`DataError::Read`] where a file cannot be read, or has become shorter.
    ///
    /// # Panics
    /// If `range` reaches beyond the end.
    pub fn read(&self, range: Range<usize>, scratch: &mut Vec<u8>, out: &mut Vec<u32>) -> Result<(), DataError> {
        assert!(range.start <= range.end && range.end <= self.len(), "tokens {range:?} of {}", self.len());
        let width = self.store.width;
        let bytes = (self.range.start + range.start) * width..(self.range.start + range.end) * width;
        let packed = match &self.store.bytes {
            Bytes::Memory(all) => &all[bytes],
            Bytes::File(file) => {
                scratch.resize(bytes.len(), 0);
                let mut n = 0;
                while n < scratch.len() {
                    let source = match read_at(file, &mut scratch[n..], (bytes.start + n) as u64) {
                        Ok(got) if got > 0 => {
                            n += got;
                            continue;
                        }
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                        Ok(_) => io::Error::new(
                            io::ErrorKind::UnexpectedEof,
                            "it has become shorter since the run began; put it back and resume the run",
                        ),
                        Err(e) => e,
                    };
                    return Err(DataError::Read { file: self.store.name.clone(), source });
                }
                scratch
            }
        };
        match width {
            1 => out.extend(packed.iter().map(|&byte| u32::from(byte))),
            2 => out.extend(packed.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])))),
            _ => out.extend(packed.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        }
        Ok(())
    }

    /// All of them, for short texts.
    ///
    /// # Errors
    /// As [`Tokens::read`].
    pub fn to_vec(&self) -> Result<Vec<u32>, DataError> {
        let mut all = Vec::with_capacity(self.len());
        self.read(0..self.len(), &mut Vec::new(), &mut all)?;
        Ok(all)
    }

    /// Adds their number and all of them to a hash, each as four bytes whatever it takes here.
    pub(super) fn hash(&self, hasher: &mut Sha256) -> Result<(), DataError> {
        const AT_ONCE: usize = 1 << 16;
        hasher.update((self.len() as u64).to_le_bytes());
        let (mut scratch, mut tokens) = (Vec::new(), Vec::with_capacity(AT_ONCE));
        for start in (0..self.len()).step_by(AT_ONCE) {
            tokens.clear();
            self.read(start..(start + AT_ONCE).min(self.len()), &mut scratch, &mut tokens)?;
            hasher.update(bytemuck::cast_slice::<u32, u8>(&tokens));
        }
        Ok(())
    }
}

/// Takes tokens as they are made.
pub(super) struct TokenWriter {
    width: usize,
    n: usize,
    /// All, or what is to be written next.
    packed: Vec<u8>,
    file: Option<(BufWriter<tempfile::NamedTempFile>, PathBuf)>,
}

impl TokenWriter {
    pub fn in_memory(width: usize) -> Self {
        Self { width, n: 0, packed: Vec::new(), file: None }
    }

    /// Into a file that gets the name `path` when it is complete.
    ///
    /// # Errors
    /// [`DataError::Cache`].
    pub fn to_file(width: usize, path: PathBuf) -> Result<Self, DataError> {
        let folder = path.parent().map(PathBuf::from).unwrap_or_default();
        let file = std::fs::create_dir_all(&folder).and_then(|()| tempfile::Builder::new().prefix(".tokens").tempfile_in(&folder));
        let file = file.map_err(|source| DataError::Cache { file: folder.display().to_string(), source })?;
        Ok(Self { width, n: 0, packed: Vec::new(), file: Some((BufWriter::with_capacity(1 << 20, file), path)) })
    }

    /// How many were taken.
    pub fn len(&self) -> usize {
        self.n
    }

    fn pack(&mut self, tokens: &[u32]) {
        self.n += tokens.len();
        match self.width {
            1 => self.packed.extend(tokens.iter().map(|&token| token as u8)),
            2 => self.packed.extend(tokens.iter().flat_map(|&token| (token as u16).to_le_bytes())),
            _ => self.packed.extend(tokens.iter().flat_map(|&token| token.to_le_bytes())),
        }
    }

    /// Takes tokens, each of the vocabulary.
    ///
    /// # Errors
    /// [`DataError::Cache`].
    pub fn push(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        self.pack(tokens);
        if let Some((file, path)) = &mut self.file {
            file.write_all(&self.packed).map_err(|source| DataError::Cache { file: path.display().to_string(), source })?;
            self.packed.clear();
        }
        Ok(())
    }

    /// All of them; a file has its name from now on.
    ///
    /// # Errors
    /// [`DataError::Cache`].
    pub fn finish(mut self) -> Result<Tokens, DataError> {
        let Some((writer, path)) = self.file else {
            self.packed.shrink_to_fit();
            let store = Store { name: "memory".to_string(), width: self.width, bytes: Bytes::Memory(self.packed) };
            return Ok(Tokens { store: Arc::new(store), range: 0..self.n });
        };
        let name = path.display().to_string();
        let failed = |source| DataError::Cache { file: name.clone(), source };
        let file = writer.into_inner().map_err(|e| failed(e.into_error()))?;
        file.persist(&path).map_err(|e| failed(e.error))?;
        Tokens::of_file(name.clone(), File::open(&path).map_err(failed)?, self.width)
    }
}
