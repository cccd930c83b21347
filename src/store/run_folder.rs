//! The folder that a run leaves: configuration, metrics, plots, checkpoints, and which of these is the last, the best and the selected.
//!
//! ```text
//! runs/lm-20261121-143015/
//!     config.toml  metrics.jsonl  *.svg  *.png
//!     checkpoints/step-00000300.safetensors
//!     checkpoints.json      names `last`, `best`, `selected`; can be rebuilt from the files
//!     .lock                 locked by the process that trains here
//! ```
//!
//! A save goes: checkpoint to a temporary file, synced, renamed, folder synced; `checkpoints.json` the same way; only then are the files
//! removed that it no longer names. So at every moment what `checkpoints.json` names is there, and the newest whole file is at least as new.
//! What must not be here: what stands in configuration, metrics or checkpoints.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::checkpoint::{self, Checkpoint, Notes};
use super::storage::{self, Disk, Lock, Storage, TEMP_SUFFIX};
use super::{Result, StoreError};

/// The resolved configuration; a run without it has not started.
pub const CONFIG: &str = "config.toml";
/// What the finished run came to, a JSON object.
pub const SUMMARY: &str = "summary.json";
/// One JSON object a line.
pub const METRICS: &str = "metrics.jsonl";
const CHECKPOINTS: &str = "checkpoints";
const INDEX: &str = "checkpoints.json";
const LOCK: &str = ".lock";

/// Which checkpoint a run hands to those who use the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Select {
    /// The one with the lowest validation loss, the earlier one of equals; the last where none has a validation loss.
    #[default]
    Best,
    Last,
}

impl fmt::Display for Select {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Best => "best",
            Self::Last => "last",
        })
    }
}

impl FromStr for Select {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        match s {
            "best" => Ok(Self::Best),
            "last" => Ok(Self::Last),
            _ => Err(format!("`{s}` is neither `best` nor `last`")),
        }
    }
}

/// Which checkpoint to load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Which {
    #[default]
    Selected,
    Best,
    Last,
    Step(u64),
}

impl FromStr for Which {
    type Err = String;

    /// `selected`, `best`, `last`, or a step.
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        match s {
            "selected" => Ok(Self::Selected),
            "best" => Ok(Self::Best),
            "last" => Ok(Self::Last),
            _ => s.parse().map(Self::Step).map_err(|_| format!("`{s}` is neither `best`, `last` nor a step")),
        }
    }
}

/// A checkpoint as `checkpoints.json` names it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub step: u64,
    /// Relative to the run folder, with `/`.
    pub file: String,
    /// Mean loss over the validation part; `None` where it was not measured or was not finite.
    pub valid_loss: Option<f64>,
}

impl Entry {
    fn new(step: u64, valid_loss: Option<f64>) -> Self {
        Self { step, file: format!("{CHECKPOINTS}/{}", step_file(step)), valid_loss }
    }
}

/// What a save did.
#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    /// Absolute.
    pub path: PathBuf,
    /// This one is the best so far.
    pub is_best: bool,
    /// Something that does not harm the checkpoint: an old file that could not be removed.
    pub warnings: Vec<String>,
}

/// `checkpoints.json`. The first three follow from the rest; they are for readers, and tell a damaged file.
#[derive(PartialEq, Serialize, Deserialize)]
struct Index {
    last: Option<Entry>,
    best: Option<Entry>,
    selected: Option<Entry>,
    select: Select,
    checkpoints: Vec<Entry>,
}

/// The checkpoints that a run counts as its own, in the order of their steps.
#[derive(Clone, Debug, Default, PartialEq)]
struct Shelf {
    entries: Vec<Entry>,
    select: Select,
}

impl Shelf {
    fn last(&self) -> Option<&Entry> {
        self.entries.last()
    }

    fn best(&self) -> Option<&Entry> {
        let loss = |entry: &Entry| entry.valid_loss.unwrap_or(f64::INFINITY);
        // `min_by` returns the first of equals.
        self.entries.iter().filter(|entry| entry.valid_loss.is_some()).min_by(|a, b| loss(a).total_cmp(&loss(b)))
    }

    fn selected(&self) -> Option<&Entry> {
        match self.select {
            Select::Best => self.best().or(self.last()),
            Select::Last => self.last(),
        }
    }

    fn put(&mut self, entry: Entry) {
        match self.entries.binary_search_by_key(&entry.step, |e| e.step) {
            Ok(idx) => self.entries[idx] = entry,
            Err(idx) => self.entries.insert(idx, entry),
        }
    }

    fn drop_step(&mut self, step: u64) {
        self.entries.retain(|entry| entry.step != step);
    }

    /// Takes out what is not kept: all but the last `keep` (at least one), the best and the selected.
    fn prune(&mut self, keep: usize) -> Vec<Entry> {
        let named = [self.best().map(|e| e.step), self.selected().map(|e| e.step)];
        let n_old = self.entries.len().saturating_sub(keep.max(1));
        let old: Vec<Entry> = self.entries[..n_old].iter().filter(|e| !named.contains(&Some(e.step))).cloned().collect();
        self.entries.retain(|entry| !old.contains(entry));
        old
    }

    fn index(&self) -> Index {
        Index {
            last: self.last().cloned(),
            best: self.best().cloned(),
            selected: self.selected().cloned(),
            select: self.select,
            checkpoints: self.entries.clone(),
        }
    }

    /// Reads `checkpoints.json`; the error says what is wrong with it.
    fn from_json(bytes: &[u8]) -> std::result::Result<Self, String> {
        let index: Index = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        let shelf = Self { entries: index.checkpoints.clone(), select: index.select };
        let in_order = shelf.entries.windows(2).all(|pair| pair[0].step < pair[1].step);
        let as_written = shelf.entries.iter().all(|e| *e == Entry::new(e.step, e.valid_loss));
        if in_order && as_written && shelf.index() == index { Ok(shelf) } else { Err("it contradicts itself".to_owned()) }
    }
}

/// A run folder, held against other processes while it lives, or opened for reading only.
pub struct RunFolder {
    path: PathBuf,
    storage: Arc<dyn Storage>,
    shelf: Shelf,
    /// Why files that look like checkpoints are not on the shelf.
    rejected: Vec<String>,
    warnings: Vec<String>,
    /// `None`: for reading only.
    lock: Option<Lock>,
}

impl fmt::Debug for RunFolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunFolder").field("path", &self.path).field("shelf", &self.shelf).finish_non_exhaustive()
    }
}

impl RunFolder {
    /// Whether `path` holds checkpoints, whole or not. Without one, a folder holds no run yet, whatever else lies in it.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn is_begun(path: impl AsRef<Path>) -> Result<bool> {
        Ok(!Self::at(Arc::new(Disk), path.as_ref())?.steps_on_disk()?.is_empty())
    }

    /// Looks whether [`Self::create`] would refuse the folder, and makes nothing.
    ///
    /// # Errors
    /// The folder already holds a run.
    pub fn check_free(path: impl AsRef<Path>) -> Result<()> {
        Self::at(Arc::new(Disk), path.as_ref())?.refuse_taken()
    }

    /// Makes a folder for a new run and locks it. A start that ended before its first checkpoint is no run; what it left is overwritten.
    ///
    /// # Errors
    /// The folder already holds a run, is in use, or cannot be written.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        Self::create_with(Arc::new(Disk), path)
    }

    /// Opens the folder of an existing run and locks it; leftovers of a kill are cleared away.
    ///
    /// # Errors
    /// There is no run, it is in use, or cannot be written.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(Arc::new(Disk), path)
    }

    /// Opens the folder of a run, or makes it where there is none or only the beginning of one: what `--resume` asks for.
    /// Start from the beginning if [`Self::has_checkpoints`] says no, whatever other files there are.
    ///
    /// # Errors
    /// It is in use or cannot be written.
    pub fn open_or_create(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_or_create_with(Arc::new(Disk), path)
    }

    /// Opens a run, finished or being trained by another process, for reading only: nothing is locked, written or cleared away.
    ///
    /// # Errors
    /// There is no run.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Self::read_with(Arc::new(Disk), path)
    }

    /// [`Self::create`] on a storage of the caller's.
    pub fn create_with(storage: Arc<dyn Storage>, path: impl AsRef<Path>) -> Result<Self> {
        // Looked at before anything is made in it, and again when nobody else can begin there.
        Self::at(Arc::clone(&storage), path.as_ref())?.refuse_taken()?;
        let mut run = Self::hold(storage, path.as_ref())?;
        run.refuse_taken()?;
        run.clear_leftovers()?;
        Ok(run)
    }

    /// [`Self::open`] on a storage of the caller's.
    pub fn open_with(storage: Arc<dyn Storage>, path: impl AsRef<Path>) -> Result<Self> {
        // Looked at before anything is made in it.
        let run = Self::at(storage, path.as_ref())?;
        if !run.holds_run()? {
            return Err(StoreError::NotARun { path: run.path });
        }
        Self::open_or_create_with(run.storage, run.path)
    }

    /// [`Self::open_or_create`] on a storage of the caller's.
    pub fn open_or_create_with(storage: Arc<dyn Storage>, path: impl AsRef<Path>) -> Result<Self> {
        let mut run = Self::hold(storage, path.as_ref())?;
        run.clear_leftovers()?;
        if run.take_stock()? {
            run.write_index(&run.shelf)?;
        }
        Ok(run)
    }

    /// [`Self::read`] on a storage of the caller's.
    pub fn read_with(storage: Arc<dyn Storage>, path: impl AsRef<Path>) -> Result<Self> {
        let mut run = Self::at(storage, path.as_ref())?;
        if !run.holds_run()? {
            return Err(StoreError::NotARun { path: run.path });
        }
        run.take_stock()?;
        Ok(run)
    }

    fn at(storage: Arc<dyn Storage>, path: &Path) -> Result<Self> {
        let path = std::path::absolute(path).map_err(|e| StoreError::io("find", path, e))?;
        Ok(Self { path, storage, shelf: Shelf::default(), rejected: Vec::new(), warnings: Vec::new(), lock: None })
    }

    fn hold(storage: Arc<dyn Storage>, path: &Path) -> Result<Self> {
        let mut run = Self::at(storage, path)?;
        let unwritable = |source| StoreError::Unwritable { path: run.path.clone(), source };
        run.storage.create_dir(&run.checkpoints_dir()).map_err(unwritable)?;
        let lock = run.storage.lock(&run.path.join(LOCK)).map_err(unwritable)?;
        run.lock = Some(lock.ok_or_else(|| StoreError::Locked { path: run.path.clone() })?);
        Ok(run)
    }

    /// The folder, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a file of this name lies in the folder, whether it exists or not.
    ///
    /// # Errors
    /// [`StoreError::FileName`].
    pub fn file_path(&self, name: &str) -> Result<PathBuf> {
        let refuse = |reason| StoreError::FileName { name: name.to_owned(), reason };
        if name.is_empty() || name.contains(['/', '\\', ':']) || name.starts_with('.') {
            return Err(refuse("it must be a plain name"));
        }
        if name.ends_with(".safetensors") || name.ends_with(TEMP_SUFFIX) || name == INDEX || name == CHECKPOINTS {
            return Err(refuse("that belongs to the checkpoints"));
        }
        Ok(self.path.join(name))
    }

    /// Writes a file of the folder, whole or not at all.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.writable()?;
        self.file_path(name)?;
        storage::write_atomic(self.storage.as_ref(), &self.path, name, &mut |file| file.write(bytes))
    }

    /// Reads a file of the folder; [`StoreError::NotFound`] where there is none.
    pub fn read_file(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.file_path(name)?;
        self.storage.read(&path).map_err(|e| StoreError::io("read", path, e))
    }

    /// Drops from a file of lines those that `keep` refuses, and a last line without end (a kill cuts there); a missing file stays missing.
    /// What cutting `metrics.jsonl` back to a checkpoint needs.
    pub fn retain_lines(&self, name: &str, mut keep: impl FnMut(&str) -> bool) -> Result<()> {
        self.writable()?;
        let bytes = match self.read_file(name) {
            Err(StoreError::NotFound { .. }) => return Ok(()),
            other => other?,
        };
        // A line that is no UTF-8 was torn by a power cut, and nobody could read it.
        let kept: String = bytes
            .split_inclusive(|&byte| byte == b'\n')
            .filter_map(|line| std::str::from_utf8(line).ok())
            .filter(|line| line.strip_suffix('\n').is_some_and(&mut keep))
            .collect();
        if kept.as_bytes() == bytes { Ok(()) } else { self.write_file(name, kept.as_bytes()) }
    }

    /// What was found to be odd when the folder was opened, for people. Empties the list.
    pub fn take_warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    /// Whether there are checkpoint files, whole or not.
    pub fn has_checkpoints(&self) -> bool {
        !self.shelf.entries.is_empty() || !self.rejected.is_empty()
    }

    /// The checkpoints, in the order of their steps.
    pub fn entries(&self) -> &[Entry] {
        &self.shelf.entries
    }

    /// The checkpoint with the highest step.
    pub fn last(&self) -> Option<&Entry> {
        self.shelf.last()
    }

    /// The checkpoint with the lowest validation loss, the earlier one of equals.
    pub fn best(&self) -> Option<&Entry> {
        self.shelf.best()
    }

    /// The one for those who use the model.
    pub fn selected(&self) -> Option<&Entry> {
        self.shelf.selected()
    }

    /// Writes a checkpoint, then `checkpoints.json`, then removes what is no longer kept: all but the last `keep` (at least one), the best
    /// and the selected. A step that exists is replaced. A validation loss that is not finite counts as none.
    ///
    /// # Errors
    /// After an error the former checkpoints stand, and the new one may stand beside them; the next save may well succeed.
    pub fn save(&mut self, checkpoint: &Checkpoint, valid_loss: Option<f64>, keep: usize, select: Select) -> Result<Saved> {
        self.writable()?;
        let step = checkpoint.step()?;
        if let Some(last) = self.last().filter(|last| last.step > step) {
            return Err(StoreError::OutOfOrder { path: self.path.clone(), step, last: last.step });
        }
        let valid_loss = valid_loss.filter(|loss| loss.is_finite());
        let encoded = checkpoint.encode(Notes { valid_loss, select: Some(select) })?;
        let (dir, name) = (self.checkpoints_dir(), step_file(step));
        storage::write_atomic(self.storage.as_ref(), &dir, &name, &mut |file| encoded.write(file))?;

        // On the shelf before `checkpoints.json` is written: if that fails, the next save names (and prunes) this one too.
        self.shelf.put(Entry::new(step, valid_loss));
        self.shelf.select = select;
        let mut kept = self.shelf.clone();
        let old = kept.prune(keep);
        self.write_index(&kept)?;
        self.shelf = kept;

        let mut warnings = Vec::new();
        for entry in old {
            let path = self.path.join(&entry.file);
            if let Err(e) = self.storage.remove(&path) {
                warnings.push(format!("cannot remove the old checkpoint {}: {e}", path.display()));
            }
        }
        Ok(Saved { path: dir.join(name), is_best: self.best().is_some_and(|best| best.step == step), warnings })
    }

    /// The newest whole checkpoint, and a warning for each newer one that is damaged. Those are taken off the list of checkpoints (the run
    /// goes on from before them), their files stay until the run writes the same step again.
    ///
    /// # Errors
    /// There is no checkpoint; none is whole (with the reason for each); the newest was written by a newer carrousel.
    pub fn load_newest(&mut self) -> Result<(Checkpoint, Vec<String>)> {
        if !self.has_checkpoints() {
            return Err(StoreError::NoCheckpoint { path: self.path.clone() });
        }
        let mut warnings = Vec::new();
        while let Some(entry) = self.shelf.last().cloned() {
            match checkpoint::load(self.storage.as_ref(), &self.path.join(&entry.file)) {
                Ok((checkpoint, notes)) => {
                    // A kill between the two renames of a save leaves the loss in the file only.
                    self.shelf.put(Entry { valid_loss: notes.valid_loss, ..entry });
                    return Ok((checkpoint, warnings));
                }
                Err(e @ StoreError::NewerFormat { .. }) => return Err(e),
                Err(e) => {
                    warnings.push(format!("passed over the checkpoint of step {}: {e}", entry.step));
                    self.rejected.push(e.to_string());
                    self.shelf.drop_step(entry.step);
                }
            }
        }
        Err(StoreError::NoneWhole { path: self.path.clone(), reasons: self.rejected.clone() })
    }

    /// Loads one checkpoint, for those who use the model. A damaged one is an error, never replaced by another.
    ///
    /// # Errors
    /// There is none such (with those that exist), or it cannot be read.
    pub fn load(&self, which: Which) -> Result<Checkpoint> {
        let load = |run: &Self| {
            let entry = run.find(which)?;
            checkpoint::load(run.storage.as_ref(), &run.path.join(&entry.file)).map(|(checkpoint, _)| checkpoint)
        };
        match load(self) {
            // A run that is being trained by another process may have pruned the file since we read its index: look once more.
            Err(StoreError::NotFound { .. }) if self.lock.is_none() => load(&Self::read_with(self.storage.clone(), &self.path)?),
            other => other,
        }
    }

    fn find(&self, which: Which) -> Result<&Entry> {
        let path = || self.path.clone();
        if let Which::Step(step) = which {
            let existing = || self.shelf.entries.iter().map(|entry| entry.step).collect();
            let entry = self.shelf.entries.iter().find(|entry| entry.step == step);
            return entry.ok_or_else(|| StoreError::NoSuchStep { path: path(), step, existing: existing() });
        }
        if self.shelf.entries.is_empty() {
            return Err(match self.rejected.as_slice() {
                [] => StoreError::NoCheckpoint { path: path() },
                reasons => StoreError::NoneWhole { path: path(), reasons: reasons.to_vec() },
            });
        }
        match which {
            Which::Best => self.best(),
            Which::Last => self.last(),
            Which::Selected | Which::Step(_) => self.selected(),
        }
        .ok_or_else(|| StoreError::NoBest { path: path() })
    }

    fn checkpoints_dir(&self) -> PathBuf {
        self.path.join(CHECKPOINTS)
    }

    fn writable(&self) -> Result<()> {
        if self.lock.is_some() { Ok(()) } else { Err(StoreError::ReadOnly { path: self.path.clone() }) }
    }

    fn list(&self, dir: &Path) -> Result<Vec<String>> {
        match self.storage.list(dir).map_err(|e| StoreError::io("list", dir, e)) {
            Err(StoreError::NotFound { .. }) => Ok(Vec::new()),
            other => other,
        }
    }

    /// Steps of the files that are named like checkpoints, in order.
    fn steps_on_disk(&self) -> Result<Vec<u64>> {
        let mut steps: Vec<u64> = self.list(&self.checkpoints_dir())?.iter().filter_map(|name| file_step(name)).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    fn holds_run(&self) -> Result<bool> {
        for name in [CONFIG, METRICS, INDEX] {
            if self.exists(name)? {
                return Ok(true);
            }
        }
        Ok(!self.steps_on_disk()?.is_empty())
    }

    /// Refuses a folder with checkpoints, and one with files of these names that no run of ours has begun: they are somebody's.
    fn refuse_taken(&self) -> Result<()> {
        let taken = match self.exists(LOCK) {
            Ok(true) => self.steps_on_disk().map(|steps| !steps.is_empty()),
            Ok(false) => self.holds_run(),
            Err(e) => Err(e),
        };
        match taken {
            Ok(false) => Ok(()),
            Ok(true) => Err(StoreError::HoldsRun { path: self.path.clone() }),
            Err(StoreError::Io { source, .. }) => Err(StoreError::Unwritable { path: self.path.clone(), source }),
            Err(e) => Err(e),
        }
    }

    fn exists(&self, name: &str) -> Result<bool> {
        let path = self.path.join(name);
        self.storage.exists(&path).map_err(|e| StoreError::io("look for", path, e))
    }

    /// Removes the temporary files of a process that was killed.
    fn clear_leftovers(&mut self) -> Result<()> {
        for dir in [self.path.clone(), self.checkpoints_dir()] {
            for name in self.list(&dir)?.iter().filter(|name| name.ends_with(TEMP_SUFFIX)) {
                let path = dir.join(name);
                if let Err(e) = self.storage.remove(&path) {
                    self.warnings.push(format!("cannot remove the temporary file {}: {e}", path.display()));
                }
            }
        }
        Ok(())
    }

    /// Puts on the shelf what `checkpoints.json` and the files agree on: what it does not name is read and verified first. Returns whether
    /// `checkpoints.json` is to be written anew.
    fn take_stock(&mut self) -> Result<bool> {
        let steps = self.steps_on_disk()?;
        let path = self.path.join(INDEX);
        let listed = match self.storage.read(&path).map_err(|e| StoreError::io("read", &path, e)) {
            Ok(bytes) => Shelf::from_json(&bytes).map_err(|reason| format!("{} is damaged ({reason})", path.display())),
            // Before the first save, or after a kill in the middle of it, it is missing by right.
            Err(StoreError::NotFound { .. }) if steps.len() < 2 => Ok(Shelf::default()),
            Err(StoreError::NotFound { .. }) => Err(format!("{} is missing", path.display())),
            Err(e) => return Err(e),
        };
        let rebuilt = listed.is_err();
        self.shelf = listed.unwrap_or_else(|reason| {
            self.warnings.push(format!("{reason}: rebuilt from the checkpoints"));
            Shelf::default()
        });

        let as_listed = self.shelf.clone();
        for entry in as_listed.entries.iter().filter(|entry| !steps.contains(&entry.step)) {
            self.warnings.push(format!("{} names {}, which is missing", path.display(), entry.file));
            self.shelf.drop_step(entry.step);
        }
        // A kill between renaming a checkpoint and naming it, or before the old ones were removed, leaves whole files that are not named.
        for step in steps.into_iter().filter(|step| !as_listed.entries.iter().any(|entry| entry.step == *step)) {
            match checkpoint::load(self.storage.as_ref(), &self.checkpoints_dir().join(step_file(step))) {
                Ok((_, notes)) => {
                    self.shelf.put(Entry::new(step, notes.valid_loss));
                    if let Some(select) = notes.select.filter(|_| as_listed.entries.is_empty()) {
                        self.shelf.select = select;
                    }
                }
                // Pruned by its trainer while we read on.
                Err(StoreError::NotFound { .. }) => {}
                Err(e) => {
                    self.warnings.push(format!("not used: {e}"));
                    self.rejected.push(e.to_string());
                }
            }
        }
        Ok(rebuilt || self.shelf != as_listed)
    }

    fn write_index(&self, shelf: &Shelf) -> Result<()> {
        let mut json = serde_json::to_vec_pretty(&shelf.index()).map_err(|e| StoreError::Unwritten { reason: e.to_string() })?;
        json.push(b'\n');
        storage::write_atomic(self.storage.as_ref(), &self.path, INDEX, &mut |file| file.write(&json))
    }
}

fn step_file(step: u64) -> String {
    format!("step-{step:08}.safetensors")
}

/// The step in a checkpoint's name; `None` for any other name.
fn file_step(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.strip_suffix(".safetensors")?.parse().ok()?;
    (step_file(step) == name).then_some(step)
}

/// The folder for a run that was given none: `runs/<task>-<time>`, the time in UTC; with `-2`, `-3`, ... where that exists already.
pub fn default_run_path(task: &str) -> PathBuf {
    let path = default_run_path_at(task, jiff::Timestamp::now());
    let numbered = (2_u32..).map(|n| PathBuf::from(format!("{}-{n}", path.display())));
    std::iter::once(path.clone()).chain(numbered).find(|p| !p.exists()).unwrap_or(path)
}

/// `runs/<task>-<time>`, such as `runs/lm-20261121-143015`. UTC, since the system's time zone is not always known.
pub fn default_run_path_at(task: &str, time: jiff::Timestamp) -> PathBuf {
    Path::new("runs").join(format!("{task}-{}", time.strftime("%Y%m%d-%H%M%S")))
}
