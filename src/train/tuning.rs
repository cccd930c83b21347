//! Which variants of kernels a run launches: measured between steps when a size is met for the first time, within a bound of time, and kept in the user's
//! cache folder for the next run on such a device.
//!
//! What a choice may change is how long a step takes. Variants that are measured against each other sum the same terms in the same order: products fuse
//! multiplication and addition explicitly and leave the same bits on one adapter; sweeps step by step and whole leave the same bits on every adapter that the
//! tests have met, though a driver is free to fuse the one and not the other. Whatever rounds otherwise (narrower operands, another order of a sum) is no
//! candidate; it is asked for by name. So that nobody needs to trust a driver, a run writes down what it chose, in its checkpoints and in `variants.json`, and
//! takes it from there when it is resumed, and devices of one kind launch the same.
//!
//! A file of the cache belongs to one adapter, driver and version of the program, whose names it holds; one that is damaged or of another is left alone
//! with a warning, and written anew when something is measured.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::group::{Group, KindChoices, Tuned};
use crate::backend::tuning::{Choice, Choices};
use crate::backend::{Backend, DeviceInfo};
use crate::data::tokens::cache_folder;
use crate::store::storage::{Disk, Storage, write_atomic};

/// Time for measurements in a process, all devices together.
pub const BUDGET: Duration = Duration::from_secs(2);
/// The folder within the cache folder.
const FOLDER: &str = "variants";
/// While it is locked one process writes.
const LOCK: &str = "lock";

/// A file of the cache.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    adapter: String,
    driver: String,
    program: String,
    choices: Choices,
}

/// What is kept of earlier measurements, a file for each adapter, driver and version.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// In the user's cache folder, or where `CARROUSEL_CACHE` says.
    pub fn of_user() -> Self {
        Self::at(cache_folder().join(FOLDER))
    }

    pub fn at(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Whose choices a file holds; the kind of a device also tells which shaders it has.
    fn of(info: &DeviceInfo) -> Kept {
        let program = format!("{} {}", env!("CARGO_PKG_VERSION"), info.kind);
        Kept { adapter: info.name.clone(), driver: info.driver.clone(), program, choices: Choices::new() }
    }

    /// The name of a device's file.
    pub fn file_name(info: &DeviceInfo) -> String {
        let Kept { adapter, driver, program, .. } = Self::of(info);
        let mut hasher = Sha256::new();
        for part in [adapter, driver, program] {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let hex: String = hasher.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        format!("{hex}.json")
    }

    /// What is kept for such a device; nothing where there is no file.
    ///
    /// # Errors
    /// A file that cannot be read, or that is not this device's.
    pub fn load(&self, info: &DeviceInfo) -> Result<Choices> {
        let path = self.folder.join(Self::file_name(info));
        if !Disk.exists(&path).unwrap_or(false) {
            return Ok(Choices::new());
        }
        let read = || -> Result<Choices> {
            let kept: Kept = serde_json::from_slice(&Disk.read(&path)?).context("it is damaged")?;
            let own = Self::of(info);
            let same = (&kept.adapter, &kept.driver, &kept.program) == (&own.adapter, &own.driver, &own.program);
            ensure!(same, "it is of {} with {} and program {}", kept.adapter, kept.driver, kept.program);
            Ok(kept.choices)
        };
        read().with_context(|| format!("{} is left alone and variants are measured again", path.display()))
    }

    /// Adds what was measured to what is kept for such a device; nothing where another process is at it.
    ///
    /// # Errors
    /// The file system's.
    pub fn keep(&self, info: &DeviceInfo, measured: Choices) -> Result<()> {
        let cannot = || format!("measured variants are not kept for the next run in {}", self.folder.display());
        Disk.create_dir(&self.folder).with_context(cannot)?;
        let Some(_lock) = Disk.lock(&self.folder.join(LOCK)).with_context(cannot)? else { return Ok(()) };
        let mut kept = Self::of(info);
        kept.choices = self.load(info).unwrap_or_default();
        kept.choices.extend(measured);
        let bytes = serde_json::to_vec_pretty(&kept)?;
        write_atomic(&Disk, &self.folder, &Self::file_name(info), &mut |file| file.write(&bytes)).with_context(cannot)
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// What measuring came to: lines for people, and what went wrong beside.
#[derive(Clone, Debug, Default)]
pub struct Told {
    pub lines: Vec<String>,
    pub warnings: Vec<String>,
}

/// Chooses variants for the devices of a run.
#[derive(Debug)]
pub struct Autotune {
    is_on: bool,
    cache: Option<Cache>,
    keeps: bool,
    left: Duration,
    /// Of this process, in order.
    tuned: Vec<Tuned>,
}

impl Autotune {
    /// Measures with this cache, or with none; where it is not on, every kernel is launched as it says itself.
    pub fn new(is_on: bool, cache: Option<Cache>) -> Self {
        Self { is_on, cache, keeps: true, left: BUDGET, tuned: Vec::new() }
    }

    /// As a run does it.
    pub fn of_user(is_on: bool) -> Self {
        Self::new(is_on, Some(Cache::of_user()))
    }

    /// Reads the cache, but adds nothing to it.
    pub fn without_keeping(self) -> Self {
        Self { keeps: false, ..self }
    }

    /// What is known of a device before it has done anything.
    fn known(&self, info: &DeviceInfo, told: &mut Told) -> Choices {
        let cache = self.cache.as_ref().filter(|_| self.is_on && info.is_gpu);
        match cache.map(|cache| cache.load(info)) {
            Some(Ok(choices)) => choices,
            Some(Err(error)) => {
                told.warnings.push(format!("{error:#}"));
                Choices::new()
            }
            None => Choices::new(),
        }
    }

    /// Before the first step: what was recorded, for the kinds of devices that it was recorded for, and what is kept for others.
    ///
    /// # Errors
    /// A worker's.
    pub fn begin(&mut self, group: &mut Group, recorded: &KindChoices) -> Result<Told> {
        let mut told = Told::default();
        if !self.is_on {
            return Ok(told);
        }
        let infos: Vec<DeviceInfo> = group.devices().map(|(_, info)| info.clone()).collect();
        let mut choices = KindChoices::new();
        for info in infos {
            if choices.contains_key(&info.kind) {
                continue;
            }
            let of_kind = match recorded.get(&info.kind) {
                Some(recorded) => recorded.clone(),
                None => self.known(&info, &mut told),
            };
            choices.insert(info.kind, of_kind);
        }
        choices.retain(|_, of_kind| !of_kind.is_empty());
        group.choose(&choices)?;
        Ok(told)
    }

    /// After a step: measures what it has met for the first time. None where there was nothing to do.
    ///
    /// # Errors
    /// A worker's.
    pub fn after_step(&mut self, group: &mut Group) -> Result<Option<Told>> {
        if !self.is_on || !group.wants_tuning() {
            return Ok(None);
        }
        let start = Instant::now();
        let tuned = group.tune(self.left);
        self.left = self.left.saturating_sub(start.elapsed());
        let mut told = Told::default();
        tuned?.into_iter().for_each(|tuned| self.note(tuned, &mut told));
        Ok(Some(told))
    }

    /// [`Self::begin`] for a device without a worker around it.
    pub fn begin_on(&mut self, backend: &mut dyn Backend) -> Told {
        let mut told = Told::default();
        let info = backend.info().clone();
        let known = self.known(&info, &mut told);
        backend.choose(&known);
        told
    }

    /// [`Self::after_step`] for a device without a worker around it.
    ///
    /// # Errors
    /// The device's.
    pub fn after_step_on(&mut self, backend: &mut dyn Backend) -> Result<Told> {
        let mut told = Told::default();
        if self.is_on && backend.wants_tuning() {
            let start = Instant::now();
            let choices = backend.tune(self.left)?;
            self.left = self.left.saturating_sub(start.elapsed());
            let info = backend.info().clone();
            self.note(Tuned { device: info.spec.clone(), info, choices }, &mut told);
        }
        Ok(told)
    }

    fn note(&mut self, tuned: Tuned, told: &mut Told) {
        told.lines.extend(tuned.choices.iter().map(|choice| line(&tuned.device, choice)));
        let measured = tuned.choices.iter().filter(|choice| choice.is_measured());
        let measured: Choices = measured.map(|choice| (choice.class.clone(), choice.variant.clone())).collect();
        if let Some(cache) = self.cache.as_ref().filter(|_| self.keeps && !measured.is_empty())
            && let Err(error) = cache.keep(&tuned.info, measured)
        {
            told.warnings.push(format!("{error:#}"));
        }
        self.tuned.push(tuned);
    }

    /// What was chosen in this process, a row each: `device`, `size`, `variant`, its `us` where it was measured, and the `others` with theirs.
    pub fn report(&self) -> Value {
        let rows = self.tuned.iter().flat_map(|tuned| tuned.choices.iter().map(|choice| (&tuned.device, choice)));
        let row = |(device, choice): (&String, &Choice)| {
            let us = choice.times.iter().find(|(name, _)| *name == choice.variant).map(|(_, seconds)| seconds * 1e6);
            json!({ "device": device, "size": choice.class, "variant": choice.variant, "us": us, "others": others(choice) })
        };
        rows.map(row).collect()
    }
}

fn us(seconds: f64) -> String {
    if seconds.is_finite() { format!("{:.0} us", seconds * 1e6) } else { "not possible".to_owned() }
}

/// `a 2000 us, b 300 us`: the candidates that were not chosen.
fn others(choice: &Choice) -> String {
    let others = choice.times.iter().filter(|(name, _)| *name != choice.variant);
    others.map(|(name, seconds)| format!("{name} {}", us(*seconds))).collect::<Vec<_>>().join(", ")
}

/// `gpu:0: gemm 5120x1024x256 NN as gemm_blocked tile_128x64, 310 us (gemm_tiled 420 us)`.
fn line(device: &str, choice: &Choice) -> String {
    match choice.times.iter().find(|(name, _)| *name == choice.variant) {
        Some((_, seconds)) => format!("{device}: {} as {}, {} ({})", choice.class, choice.variant, us(*seconds), others(choice)),
        None => format!("{device}: {} as {}, not measured", choice.class, choice.variant),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(driver: &str) -> DeviceInfo {
        DeviceInfo { name: "Card".into(), driver: driver.into(), kind: format!("Card {driver} 3"), is_gpu: true, ..DeviceInfo::default() }
    }

    fn choices(variant: &str) -> Choices {
        Choices::from([("gemm 16x16x16 NN".to_owned(), variant.to_owned())])
    }

    #[test]
    fn what_is_kept_comes_back_for_the_same_adapter_and_driver_only() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("deep/folder"));
        assert_eq!(cache.load(&info("1")).unwrap(), Choices::new());
        cache.keep(&info("1"), choices("a")).unwrap();
        cache.keep(&info("1"), Choices::from([("other".to_owned(), "b".to_owned())])).unwrap();
        let kept = cache.load(&info("1")).unwrap();
        assert_eq!((kept.len(), kept.get("gemm 16x16x16 NN").map(String::as_str)), (2, Some("a")));
        assert_eq!(cache.load(&info("2")).unwrap(), Choices::new());
        let left: Vec<_> = std::fs::read_dir(cache.folder()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}: the file and the lock");
    }

    #[test]
    fn a_damaged_or_foreign_file_is_left_alone_and_written_anew_by_the_next_measurement() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().to_owned());
        let path = dir.path().join(Cache::file_name(&info("1")));
        cache.keep(&info("2"), choices("a")).unwrap();
        let foreign = std::fs::read(dir.path().join(Cache::file_name(&info("2")))).unwrap();
        let whole = foreign.len();
        for (bytes, part) in
            [(&b""[..], "damaged"), (&foreign[..whole / 2], "damaged"), (b"{\"adapter\":1}", "damaged"), (&foreign, "of Card with 2")]
        {
            std::fs::write(&path, bytes).unwrap();
            let error = format!("{:#}", cache.load(&info("1")).unwrap_err());
            assert!(error.contains(part) && error.contains(&path.display().to_string()), "{error}");
            let mut told = Told::default();
            assert_eq!(Autotune::new(true, Some(cache.clone())).known(&info("1"), &mut told), Choices::new());
            assert_eq!(told.warnings.len(), 1);
            assert_eq!(std::fs::read(&path).unwrap(), bytes, "it was written to");
            cache.keep(&info("1"), choices("b")).unwrap();
            assert_eq!(cache.load(&info("1")).unwrap(), choices("b"));
        }
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_an_error_that_names_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = format!("{:#}", Cache::at(file.join("below")).keep(&info("1"), choices("a")).unwrap_err());
        assert!(error.contains("below"), "{error}");
    }

    #[test]
    fn switched_off_nothing_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().to_owned());
        cache.keep(&info("1"), choices("a")).unwrap();
        let known = |is_on: bool| Autotune::new(is_on, Some(cache.clone())).known(&info("1"), &mut Told::default());
        assert_eq!((known(true), known(false)), (choices("a"), Choices::new()));
    }

    #[test]
    fn a_line_tells_what_was_chosen_and_what_the_others_take() {
        let times = vec![("a".to_owned(), 2e-3), ("b".to_owned(), 1e-3), ("c".to_owned(), f64::INFINITY)];
        let choice = Choice { class: "gemm 16x16x16 NN".into(), variant: "b".into(), times };
        assert_eq!(line("gpu:0", &choice), "gpu:0: gemm 16x16x16 NN as b, 1000 us (a 2000 us, c not possible)");
        let unmeasured = Choice { times: Vec::new(), ..choice };
        assert_eq!(line("gpu:0", &unmeasured), "gpu:0: gemm 16x16x16 NN as b, not measured");
    }
}
