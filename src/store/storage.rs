//! The one small interface to the file system.
//!
//! Everything of this floor that touches a disk goes through [`Storage`], call by call, so that a test can put its own in place and let any
//! call fail, or cut the power there. What must not be here: knowledge of checkpoints or names.

use std::any::Any;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Keeps a lock for as long as it lives.
pub type Lock = Box<dyn Any + Send + Sync>;

/// A file being written; dropping it closes it.
pub trait StorageFile {
    /// Appends all of `bytes`.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Returns when the content is on the disk. The *name* is there only after [`Storage::sync_dir`].
    fn sync(&mut self) -> io::Result<()>;
}

/// The calls that a run folder needs of a file system.
pub trait Storage: Send + Sync {
    /// Creates a folder and its missing parents; their names are on the disk when it returns. One that exists is no error.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;
    /// Creates an empty file, or empties the one of this name.
    fn create(&self, path: &Path) -> io::Result<Box<dyn StorageFile>>;
    /// Gives a file another name in the same folder, replacing what had that name, at once and whole.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Returns when all names in a folder (created, renamed, removed) are on the disk.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// The whole content of a file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// The names in a folder, sorted.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Whether there is a file or folder of this name.
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// Locks a file, created if missing, against every other opener; `None`: another holds it. The lock dies with the process.
    fn lock(&self, path: &Path) -> io::Result<Option<Lock>>;
}

/// The real file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disk;

impl StorageFile for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

impl Storage for Disk {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        // A folder whose name is not on the disk would take everything in it along when the power goes.
        let missing: Vec<PathBuf> =
            dir.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists()).map(Path::to_path_buf).collect();
        fs::create_dir_all(dir)?;
        for made in missing.iter().rev() {
            if let Some(parent) = made.parent() {
                self.sync_dir(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })?;
            }
        }
        Ok(())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        Ok(Box::new(File::create(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        // Windows opens no folder as a file, and writes names through its journal.
        if cfg!(windows) { Ok(()) } else { File::open(dir)?.sync_all() }
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            // A name that is no UTF-8 is none of ours.
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        path.try_exists()
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Lock>> {
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Box::new(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(e),
        }
    }
}

/// What is added to a file's name while it is being written.
pub const TEMP_SUFFIX: &str = ".carrousel-tmp";

/// Writes `dir/name` so that at every moment the former or the new content is there, whole: a temporary file, written, synced, renamed, the
/// folder synced. After an error the former content stands, or the new one where only the last sync failed.
pub fn write_atomic(
    storage: &dyn Storage,
    dir: &Path,
    name: &str,
    write: &mut dyn FnMut(&mut dyn StorageFile) -> io::Result<()>,
) -> super::Result<()> {
    let (path, temp) = (dir.join(name), dir.join(format!("{name}{TEMP_SUFFIX}")));
    let written = (|| {
        let mut file = storage.create(&temp)?;
        write(file.as_mut())?;
        file.sync()?;
        drop(file);
        storage.rename(&temp, &path)
    })();
    if let Err(source) = written {
        // Best effort: what stays behind is removed when the folder is opened the next time.
        let _ = storage.remove(&temp);
        return Err(super::StoreError::Io { action: "write", path, source });
    }
    storage.sync_dir(dir).map_err(|source| super::StoreError::Io { action: "sync", path: dir.to_path_buf(), source })
}
