//! A disk in memory that can fail, die or lose power at any call.
//!
//! It keeps apart what a process sees and what would survive a power cut: the content of a file survives once it was synced, a name (created,
//! renamed, removed) once its folder was. What was not synced survives a power cut in part, chosen by a seed: any subset of the names, any
//! prefix of the content, or as many bytes of zero. A killed process loses nothing that it wrote.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use carrousel::store::storage::{Lock, Storage, StorageFile};

/// What happens at the call that is chosen; calls count from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails, as with a full disk; all others work.
    Error,
    /// It fails and all later ones do, half of a write having been done: the process is gone.
    Death,
}

type Inode = usize;

#[derive(Clone)]
enum Change {
    Link(PathBuf, Inode),
    Unlink(PathBuf),
    Rename(PathBuf, PathBuf, Inode),
}

impl Change {
    fn dir(&self) -> &Path {
        let (Self::Link(path, _) | Self::Unlink(path) | Self::Rename(_, path, _)) = self;
        path.parent().unwrap()
    }

    fn apply(&self, names: &mut BTreeMap<PathBuf, Inode>) {
        match self {
            Self::Link(path, inode) => {
                names.insert(path.clone(), *inode);
            }
            Self::Unlink(path) => {
                names.remove(path);
            }
            Self::Rename(from, to, inode) => {
                names.remove(from);
                names.insert(to.clone(), *inode);
            }
        }
    }
}

#[derive(Default)]
struct Content {
    seen: Vec<u8>,
    synced: Vec<u8>,
}

#[derive(Default)]
struct State {
    contents: Vec<Content>,
    names: BTreeMap<PathBuf, Inode>,
    synced_names: BTreeMap<PathBuf, Inode>,
    /// Changes of names that are not synced, in order.
    pending: Vec<Change>,
    dirs: BTreeSet<PathBuf>,
    locks: BTreeSet<PathBuf>,
    /// Counts every process that ever ran, so that a lock of a dead one is not given back later.
    n_calls: usize,
    fault: Option<(usize, Fault)>,
    dead: bool,
    /// `sync` of a file does nothing: what the tests must notice.
    pub lies: bool,
}

#[derive(Clone, Default)]
pub struct SimDisk(Arc<Mutex<State>>);

impl SimDisk {
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Plans a fault at the `k`-th call from now.
    pub fn fail_at(&self, k: usize, fault: Fault) {
        let mut state = self.state();
        state.fault = Some((state.n_calls + k, fault));
    }

    pub fn lie_about_sync(&self) {
        self.state().lies = true;
    }

    pub fn n_calls(&self) -> usize {
        self.state().n_calls
    }

    /// A new process after the old one died: faults and locks are gone.
    pub fn restart(&self) {
        let mut state = self.state();
        (state.fault, state.dead) = (None, false);
        state.locks.clear();
    }

    /// The power went and came back. Seed 0: nothing survives that was not synced; 1: everything; else a part.
    pub fn power_cut(&self, seed: u64) {
        let mut state = self.state();
        let mut random = seed;
        let mut draw = move |n: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % n
        };
        let mut names = state.synced_names.clone();
        for change in std::mem::take(&mut state.pending) {
            if seed == 1 || (seed > 1 && draw(2) == 0) {
                change.apply(&mut names);
            }
        }
        for content in &mut state.contents {
            if seed == 0 {
                content.seen = content.synced.clone();
            } else if seed > 1 && content.seen != content.synced {
                let len = draw(content.seen.len() as u64 + 1) as usize;
                match draw(3) {
                    0 => content.seen.truncate(len),
                    1 => content.seen[len..].fill(0),
                    _ => content.seen = content.synced.clone(),
                }
            }
            content.synced = content.seen.clone();
        }
        (state.names, state.synced_names) = (names.clone(), names);
        drop(state);
        self.restart();
    }

    /// The names that are there, for checks of what was removed; counts as no call.
    pub fn file_names(&self) -> Vec<String> {
        self.state().names.keys().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
    }

    /// Counts a call and says whether it fails.
    fn call(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        let n = state.n_calls;
        state.n_calls += 1;
        match state.fault {
            Some((k, fault)) if k == n => {
                state.dead = fault == Fault::Death;
                Err(io::Error::new(io::ErrorKind::StorageFull, format!("planned fault at call {n}")))
            }
            _ if state.dead => Err(io::Error::other("the process is dead")),
            _ => Ok(state),
        }
    }
}

fn not_found() -> io::Error {
    io::Error::from(io::ErrorKind::NotFound)
}

struct SimFile {
    disk: SimDisk,
    inode: Inode,
}

impl StorageFile for SimFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self.disk.call() {
            Ok(mut state) => {
                state.contents[self.inode].seen.extend_from_slice(bytes);
                Ok(())
            }
            Err(e) => {
                // A disk that is full, or a kill, stops in the middle.
                self.disk.state().contents[self.inode].seen.extend_from_slice(&bytes[..bytes.len() / 2]);
                Err(e)
            }
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.disk.call()?;
        if !state.lies {
            let content = &mut state.contents[self.inode];
            content.synced = content.seen.clone();
        }
        Ok(())
    }
}

struct SimLock {
    disk: SimDisk,
    path: PathBuf,
}

impl Drop for SimLock {
    fn drop(&mut self) {
        self.disk.state().locks.remove(&self.path);
    }
}

impl Storage for SimDisk {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.call()?.dirs.extend(dir.ancestors().map(Path::to_path_buf));
        Ok(())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        let mut state = self.call()?;
        assert!(state.dirs.contains(path.parent().unwrap()), "{} is created in a folder that is missing", path.display());
        state.contents.push(Content::default());
        let inode = state.contents.len() - 1;
        state.names.insert(path.to_path_buf(), inode);
        state.pending.push(Change::Link(path.to_path_buf(), inode));
        Ok(Box::new(SimFile { disk: self.clone(), inode }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.call()?;
        let inode = *state.names.get(from).ok_or_else(not_found)?;
        let change = Change::Rename(from.to_path_buf(), to.to_path_buf(), inode);
        change.apply(&mut state.names);
        state.pending.push(change);
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.call()?;
        let (now, later) = std::mem::take(&mut state.pending).into_iter().partition(|change| change.dir() == dir);
        state.pending = later;
        let now: Vec<Change> = now;
        now.iter().for_each(|change| change.apply(&mut state.synced_names));
        Ok(())
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let state = self.call()?;
        let inode = *state.names.get(path).ok_or_else(not_found)?;
        Ok(state.contents[inode].seen.clone())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let state = self.call()?;
        let inside = state.names.keys().filter(|path| path.parent() == Some(dir));
        Ok(inside.map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.call()?;
        state.names.remove(path).ok_or_else(not_found)?;
        state.pending.push(Change::Unlink(path.to_path_buf()));
        Ok(())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let state = self.call()?;
        Ok(state.names.contains_key(path) || state.dirs.contains(path))
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Lock>> {
        if !self.call()?.locks.insert(path.to_path_buf()) {
            return Ok(None);
        }
        Ok(Some(Box::new(SimLock { disk: self.clone(), path: path.to_path_buf() })))
    }
}
