//! Which devices the tests run on: CPU backends always, GPUs as `CARROUSEL_TEST_GPU=off|auto|require|require:N` says.
//!
//! `auto`, the default, tests the adapters that are there; `require` fails without any, `require:2` with fewer than two. What was skipped is
//! written to the raw standard error, which the test harness does not swallow.

use std::fmt;
use std::io::Write;
use std::sync::OnceLock;
use std::time::Duration;

use carrousel::backend::Backend;
use carrousel::backend::cpu::CpuBackend;
use carrousel::backend::gpu::{GpuBackend, adapters};

/// The environment variable that sets the policy.
const VARIABLE: &str = "CARROUSEL_TEST_GPU";

/// How long a test waits for a device before it fails.
pub const DEADLINE: Duration = Duration::from_secs(300);

/// What the tests do about GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    Off,
    Auto,
    /// At least so many.
    Require(usize),
}

impl Policy {
    /// The policy as typed; unset means `auto`.
    pub fn parse(text: Option<&str>) -> Result<Self, String> {
        match text {
            None | Some("" | "auto") => Ok(Self::Auto),
            Some("off") => Ok(Self::Off),
            Some("require") => Ok(Self::Require(1)),
            Some(other) => match other.strip_prefix("require:").and_then(|n| n.parse().ok()) {
                Some(n) if n > 0 => Ok(Self::Require(n)),
                _ => Err(format!("{VARIABLE}={other} is none of off, auto, require, require:N with N from 1")),
            },
        }
    }

    /// How many of the adapters found are tested.
    pub fn admit(self, n_found: usize) -> Result<usize, String> {
        match self {
            Self::Off => Ok(0),
            Self::Auto => Ok(n_found),
            Self::Require(needed) if n_found >= needed => Ok(n_found),
            Self::Require(needed) => {
                Err(format!("{VARIABLE} requires {needed} adapters, found are {n_found}; install a driver or set it to auto"))
            }
        }
    }
}

/// A device that a test may open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// With so many threads.
    Cpu(usize),
    /// The adapter's index.
    Gpu(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu(n_threads) => write!(f, "cpu:{n_threads}"),
            Self::Gpu(index) => write!(f, "gpu:{index}"),
        }
    }
}

impl Device {
    /// A backend of its own for the calling test.
    pub fn open(self) -> Box<dyn Backend> {
        match self {
            Self::Cpu(n_threads) => Box::new(CpuBackend::new(n_threads).expect("a CPU backend starts")),
            Self::Gpu(index) => match GpuBackend::new(index) {
                Ok(backend) => Box::new(backend),
                Err(e) => panic!("gpu:{index} was listed but does not open: {e:#}"),
            },
        }
    }
}

/// Names and drivers of all adapters, in the order of their indices.
fn list_gpus() -> Result<Vec<String>, String> {
    let adapters = adapters::list().map_err(|e| format!("adapters cannot be listed: {e:#}"))?;
    Ok(adapters.iter().map(|adapter| format!("{} ({})", adapter.name, adapter.driver)).collect())
}

/// Names of the adapters that may be tested. Fails the calling test where the policy asks for more than there are.
fn admitted() -> &'static [String] {
    static FOUND: OnceLock<Result<Vec<String>, String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let typed = std::env::var(VARIABLE).ok();
        let policy = Policy::parse(typed.as_deref())?;
        let mut names = if policy == Policy::Off { Vec::new() } else { list_gpus()? };
        names.truncate(policy.admit(names.len())?);
        Ok(names)
    });
    match found {
        Ok(names) => names,
        Err(fault) => panic!("{fault}"),
    }
}

/// Indices of all adapters to test on; empty where the policy or the machine has none.
pub fn gpus() -> Vec<usize> {
    (0..admitted().len()).collect()
}

/// One adapter of each name: two that are the same model need their kernels judged once.
pub fn distinct_gpus() -> Vec<usize> {
    let names = admitted();
    gpus().into_iter().filter(|&i| !names[..i].contains(&names[i])).collect()
}

/// The devices on which every kernel is judged: the CPU with one thread and with three, which cut work unevenly, and the GPUs.
pub fn devices() -> Vec<Device> {
    [Device::Cpu(1), Device::Cpu(3)].into_iter().chain(distinct_gpus().into_iter().map(Device::Gpu)).collect()
}

/// Writes past the harness's capture of output.
fn tell(line: &str) {
    // Nobody is left to be told where standard error is closed.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Says what was tested and what was skipped.
pub fn report() {
    let names = admitted();
    for (i, name) in names.iter().enumerate() {
        let first = names.iter().position(|other| other == name);
        let note = if first == Some(i) { "" } else { ", kernels judged on its twin only" };
        tell(&format!("\n[adapters] tested: gpu:{i} {name}{note}"));
    }
    let typed = std::env::var(VARIABLE).unwrap_or_else(|_| "auto".to_owned());
    match names.len() {
        0 => tell(&format!("\n[adapters] SKIPPED every check on a GPU: none admitted with {VARIABLE}={typed}")),
        1 => tell("[adapters] one adapter: tests of several devices run as workers on it"),
        n => tell(&format!("[adapters] {n} adapters: nothing skipped")),
    }
}

#[test]
fn policies_are_read_as_documented() {
    assert_eq!(Policy::parse(None), Ok(Policy::Auto));
    assert_eq!(Policy::parse(Some("auto")), Ok(Policy::Auto));
    assert_eq!(Policy::parse(Some("off")), Ok(Policy::Off));
    assert_eq!(Policy::parse(Some("require")), Ok(Policy::Require(1)));
    assert_eq!(Policy::parse(Some("require:2")), Ok(Policy::Require(2)));
    for wrong in ["on", "require:", "require:0", "require:-1", "Require"] {
        assert!(Policy::parse(Some(wrong)).is_err(), "{wrong}");
    }
}

#[test]
fn a_required_adapter_that_is_missing_is_an_error() {
    assert!(Policy::Require(1).admit(0).is_err());
    assert!(Policy::Require(2).admit(1).is_err());
    assert_eq!(Policy::Require(2).admit(2), Ok(2));
    assert_eq!(Policy::Require(1).admit(3), Ok(3));
    assert_eq!(Policy::Auto.admit(0), Ok(0));
    assert_eq!(Policy::Off.admit(5), Ok(0));
}
