//! Which devices a run uses: what `--devices` and `--balance` say, and what that comes to on this machine. Pure functions: adapters are
//! handed in, nothing is opened here.

use std::num::NonZeroUsize;

use crate::backend::gpu::{self, adapters::AdapterKind};
use anyhow::Context;
use thiserror::Error;

/// Most workers of one run: far above any machine, so that a slip of the finger does not start a million threads.
pub const MAX_WORKERS: usize = 256;
/// Most threads of one worker.
pub const MAX_THREADS: usize = 1024;

/// Why a list of devices or shares cannot be used. All of it is for the person who typed it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DeviceError {
    #[error("--devices {given}: {problem}; {SYNTAX}")]
    Syntax { given: String, problem: String },
    #[error("--devices {given}: more than {MAX_WORKERS} workers")]
    TooMany { given: String },
    #[error("--devices gpu:{index}: there is no such adapter; {existing}")]
    NoAdapter { index: usize, existing: String },
    #[error("--balance {given}: {problem}; use equal, auto, or one weight a worker as in 2:1:1")]
    Balance { given: String, problem: String },
}

const SYNTAX: &str = "use auto, or a comma list of cpu, cpu:THREADS, gpu:INDEX, each with an optional *N, as in gpu:0*2,cpu:1";

/// One worker's device, as typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceSpec {
    /// A CPU worker; without a number it takes the cores that are left.
    Cpu { threads: Option<NonZeroUsize> },
    /// The adapter at this position of `carrousel devices`.
    Gpu { index: usize },
}

/// What `--devices` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Devices {
    /// Every GPU, else the CPU.
    Auto,
    /// These, one worker each, in this order.
    List(Vec<DeviceSpec>),
}

impl Devices {
    /// Workers, where that is known without looking at the machine.
    pub fn n_workers(&self) -> Option<usize> {
        match self {
            Self::Auto => None,
            Self::List(list) => Some(list.len()),
        }
    }

    /// Whether the machine's adapters must be looked at.
    pub fn needs_adapters(&self) -> bool {
        match self {
            Self::Auto => true,
            Self::List(list) => list.iter().any(|spec| matches!(spec, DeviceSpec::Gpu { .. })),
        }
    }
}

/// Reads `auto` or a comma list of `cpu`, `cpu:THREADS`, `gpu:INDEX`, each with an optional `*N`.
///
/// # Errors
/// [`DeviceError::Syntax`], [`DeviceError::TooMany`].
pub fn parse(text: &str) -> Result<Devices, DeviceError> {
    let wrong = |problem: String| DeviceError::Syntax { given: text.to_owned(), problem };
    if text.trim() == "auto" {
        return Ok(Devices::Auto);
    }
    let mut list = Vec::new();
    for item in text.split(',').map(str::trim) {
        let (device, times) = match item.split_once('*') {
            Some((device, times)) => (device.trim(), Some(times.trim())),
            None => (item, None),
        };
        let n_workers = match times {
            None => 1,
            Some(times) => number(times).filter(|&n| n > 0).ok_or_else(|| wrong(format!("'{times}' is not a number of workers")))?,
        };
        let (kind, number_text) = match device.split_once(':') {
            Some((kind, number)) => (kind, Some(number)),
            None => (device, None),
        };
        let spec = match (kind, number_text) {
            ("cpu", None) => DeviceSpec::Cpu { threads: None },
            ("cpu", Some(threads)) => {
                let n = number(threads).and_then(NonZeroUsize::new).filter(|n| n.get() <= MAX_THREADS);
                let n = n.ok_or_else(|| wrong(format!("'{threads}' is not a number of threads from 1 to {MAX_THREADS}")))?;
                DeviceSpec::Cpu { threads: Some(n) }
            }
            ("gpu", Some(index)) => {
                DeviceSpec::Gpu { index: number(index).ok_or_else(|| wrong(format!("'{index}' is not the index of an adapter")))? }
            }
            ("gpu", None) => return Err(wrong("'gpu' needs the index of an adapter, which `carrousel devices` lists".to_owned())),
            ("auto", _) => return Err(wrong("'auto' stands alone".to_owned())),
            ("", None) => return Err(wrong("a device is missing".to_owned())),
            _ => return Err(wrong(format!("'{device}' is no device"))),
        };
        if n_workers > MAX_WORKERS - list.len() {
            return Err(DeviceError::TooMany { given: text.to_owned() });
        }
        list.extend(std::iter::repeat_n(spec, n_workers));
    }
    Ok(Devices::List(list))
}

/// Digits only: `parse` of the standard library would also take a sign.
fn number(text: &str) -> Option<usize> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// What an adapter is made of, as far as the choice goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterClass {
    Discrete,
    Integrated,
    /// A GPU handed to a virtual machine.
    Virtual,
    /// A CPU that plays a GPU.
    Software,
    /// The driver does not say.
    Unknown,
}

impl AdapterClass {
    fn with_article(self) -> &'static str {
        match self {
            Self::Discrete => "a discrete GPU",
            Self::Integrated => "an integrated GPU",
            Self::Virtual => "a virtual GPU",
            Self::Software => "a software adapter",
            Self::Unknown => "an adapter of unknown kind",
        }
    }

    /// Without the article.
    fn describe(self) -> &'static str {
        self.with_article().split_once(' ').map_or("", |(_, noun)| noun)
    }

    fn is_hardware(self) -> bool {
        matches!(self, Self::Discrete | Self::Integrated | Self::Virtual)
    }
}

/// One adapter of the machine; its index is its position in the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterSummary {
    pub name: String,
    pub class: AdapterClass,
}

/// What a worker runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    Cpu { threads: usize },
    Gpu { index: usize },
}

/// A worker's device with everything settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// As typed and printed, with its number: `cpu:2`, `gpu:0`.
    pub spec: String,
    pub kind: DeviceKind,
}

impl Resolved {
    fn new(kind: DeviceKind) -> Self {
        let spec = match kind {
            DeviceKind::Cpu { threads } => format!("cpu:{threads}"),
            DeviceKind::Gpu { index } => format!("gpu:{index}"),
        };
        Self { spec, kind }
    }
}

/// Settles what `devices` comes to here, with a line for people about each choice that the program made.
///
/// `adapters` is called only where it must be: with CPU workers alone no graphics driver is touched. `auto` takes every discrete, integrated
/// or virtual GPU, else the CPU; software adapters are taken only by index. `cpu` without a number is all `n_cores` less one for each GPU
/// worker beside it; several of them share these cores evenly. A worker has at least one thread.
///
/// # Errors
/// [`DeviceError::NoAdapter`], with the adapters that exist; what `adapters` returns.
pub fn resolve(
    devices: &Devices,
    adapters: impl FnOnce() -> anyhow::Result<Vec<AdapterSummary>>,
    n_cores: usize,
) -> anyhow::Result<(Vec<Resolved>, Vec<String>)> {
    let n_cores = n_cores.max(1);
    let cores = if n_cores == 1 { "1 core".to_owned() } else { format!("{n_cores} cores") };
    let found = if devices.needs_adapters() {
        adapters().context("cannot list the graphics adapters; --devices cpu does without them")?
    } else {
        Vec::new()
    };
    let list = match devices {
        Devices::Auto => return Ok(auto(&found, n_cores, &cores)),
        Devices::List(list) => list,
    };
    let n_gpus = list.iter().filter(|spec| matches!(spec, DeviceSpec::Gpu { .. })).count();
    let n_bare = list.iter().filter(|spec| matches!(spec, DeviceSpec::Cpu { threads: None })).count();
    let mut reasons = Vec::new();
    let mut workers = Vec::with_capacity(list.len());
    for spec in list {
        workers.push(Resolved::new(match *spec {
            DeviceSpec::Gpu { index } if index >= found.len() => {
                return Err(DeviceError::NoAdapter { index, existing: existing(&found) }.into());
            }
            DeviceSpec::Gpu { index } => DeviceKind::Gpu { index },
            DeviceSpec::Cpu { threads: Some(threads) } => DeviceKind::Cpu { threads: threads.get() },
            DeviceSpec::Cpu { threads: None } => DeviceKind::Cpu { threads: (n_cores.saturating_sub(n_gpus) / n_bare).max(1) },
        }));
    }
    if n_bare > 0 {
        let less = if n_gpus > 0 { format!(", less one for each of {n_gpus} GPU workers") } else { String::new() };
        let shared = if n_bare > 1 { format!(", shared by {n_bare} workers") } else { String::new() };
        let threads = (n_cores.saturating_sub(n_gpus) / n_bare).max(1);
        reasons.push(format!("cpu:{threads}: this machine has {cores}{less}{shared}"));
    }
    for worker in &workers {
        let line = match worker.kind {
            DeviceKind::Cpu { threads } if threads > n_cores => format!("{}: more threads than the {cores} of this machine", worker.spec),
            DeviceKind::Gpu { index } => format!("{}: {} ({})", worker.spec, found[index].name, found[index].class.describe()),
            DeviceKind::Cpu { .. } => continue,
        };
        if !reasons.contains(&line) {
            reasons.push(line);
        }
    }
    Ok((workers, reasons))
}

fn auto(found: &[AdapterSummary], n_cores: usize, cores: &str) -> (Vec<Resolved>, Vec<String>) {
    let mut workers = Vec::new();
    let mut reasons = Vec::new();
    for (index, adapter) in found.iter().enumerate() {
        let (name, what) = (&adapter.name, adapter.class.with_article());
        if adapter.class.is_hardware() && workers.len() < MAX_WORKERS {
            reasons.push(format!("gpu:{index}: {name}, chosen because it is {what}"));
            workers.push(Resolved::new(DeviceKind::Gpu { index }));
        } else {
            reasons.push(format!("gpu:{index}: {name}, left out because it is {what} (--devices gpu:{index} takes it)"));
        }
    }
    if workers.is_empty() {
        let why = if found.is_empty() { "no graphics adapter was found" } else { "no adapter is a GPU" };
        reasons.push(format!("cpu:{n_cores}: chosen because {why}; this machine has {cores}"));
        workers.push(Resolved::new(DeviceKind::Cpu { threads: n_cores }));
    }
    (workers, reasons)
}

fn existing(found: &[AdapterSummary]) -> String {
    if found.is_empty() {
        return "no adapter was found on this machine, use --devices cpu".to_owned();
    }
    let list: Vec<String> =
        found.iter().enumerate().map(|(index, adapter)| format!("gpu:{index} ({}, {})", adapter.name, adapter.class.describe())).collect();
    format!("there are {}", list.join(", "))
}

/// How the global batch is cut into shares.
#[derive(Clone, Debug, PartialEq)]
pub enum Balance {
    /// Nothing was asked for: equal where all workers have the same spec, else by measured speed.
    Default,
    Equal,
    /// By measured speed.
    Auto,
    /// In proportion to these, one a worker; not all zero.
    Weights(Vec<f64>),
}

/// Reads `equal`, `auto` or `W1:W2:...`; empty is [`Balance::Default`]. The number of weights is held against `n_workers` where that is known.
///
/// # Errors
/// [`DeviceError::Balance`].
pub fn parse_balance(text: &str, n_workers: Option<usize>) -> Result<Balance, DeviceError> {
    let wrong = |problem: String| DeviceError::Balance { given: text.to_owned(), problem };
    match text.trim() {
        "" => return Ok(Balance::Default),
        "equal" => return Ok(Balance::Equal),
        "auto" => return Ok(Balance::Auto),
        _ => {}
    }
    let weight = |part: &str| part.trim().parse::<f64>().ok().filter(|w| w.is_finite() && *w >= 0.0);
    let weights = text
        .split(':')
        .map(|part| weight(part).ok_or_else(|| wrong(format!("'{part}' is not a weight of zero or more"))))
        .collect::<Result<Vec<f64>, _>>()?;
    if weights.iter().all(|&w| w == 0.0) {
        return Err(wrong("all weights are zero".to_owned()));
    }
    match n_workers {
        Some(n) if n != weights.len() => {
            let s = |n: usize| if n == 1 { "" } else { "s" };
            Err(wrong(format!("{} weight{} for {n} worker{}", weights.len(), s(weights.len()), s(n))))
        }
        _ => Ok(Balance::Weights(weights)),
    }
}

/// The adapters of this machine as [`resolve`] takes them.
///
/// # Errors
/// What the graphics drivers report.
pub fn adapters() -> anyhow::Result<Vec<AdapterSummary>> {
    let class = |kind| match kind {
        AdapterKind::Discrete => AdapterClass::Discrete,
        AdapterKind::Integrated => AdapterClass::Integrated,
        AdapterKind::Virtual => AdapterClass::Virtual,
        AdapterKind::Software => AdapterClass::Software,
        _ => AdapterClass::Unknown,
    };
    Ok(gpu::adapters::list()?.into_iter().map(|a| AdapterSummary { name: a.name, class: class(a.kind) }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(threads: usize) -> DeviceSpec {
        DeviceSpec::Cpu { threads: NonZeroUsize::new(threads) }
    }

    fn gpu(index: usize) -> DeviceSpec {
        DeviceSpec::Gpu { index }
    }

    fn adapter(name: &str, class: AdapterClass) -> AdapterSummary {
        AdapterSummary { name: name.to_owned(), class }
    }

    fn specs(devices: &str, found: Vec<AdapterSummary>, n_cores: usize) -> Vec<String> {
        let (workers, _) = resolve(&parse(devices).unwrap(), || Ok(found), n_cores).unwrap();
        workers.into_iter().map(|worker| worker.spec).collect()
    }

    #[test]
    fn lists_of_devices_are_read_with_threads_indices_and_counts() {
        for (text, expected) in [
            ("cpu", vec![cpu(0)]),
            ("cpu:3", vec![cpu(3)]),
            ("gpu:0", vec![gpu(0)]),
            ("gpu:12", vec![gpu(12)]),
            ("cpu*2", vec![cpu(0), cpu(0)]),
            ("cpu:1*3", vec![cpu(1), cpu(1), cpu(1)]),
            ("gpu:0*2,cpu:1", vec![gpu(0), gpu(0), cpu(1)]),
            (" gpu:1 , gpu:0 * 2 ", vec![gpu(1), gpu(0), gpu(0)]),
        ] {
            assert_eq!(parse(text), Ok(Devices::List(expected)), "{text}");
        }
        assert_eq!(parse("auto"), Ok(Devices::Auto));
    }

    #[test]
    fn what_is_no_list_of_devices_is_refused_with_what_is_wrong() {
        for (text, part) in [
            ("", "a device is missing"),
            ("cpu,", "a device is missing"),
            ("tpu", "'tpu' is no device"),
            ("GPU:0", "'GPU:0' is no device"),
            ("gpu", "needs the index"),
            ("gpu:", "'' is not the index"),
            ("gpu:-1", "'-1' is not the index"),
            ("gpu:+1", "'+1' is not the index"),
            ("gpu:x", "'x' is not the index"),
            ("gpu:99999999999999999999", "is not the index"),
            ("cpu:0", "'0' is not a number of threads"),
            ("cpu:1025", "'1025' is not a number of threads"),
            ("cpu:2:3", "'2:3' is not a number of threads"),
            ("cpu*0", "'0' is not a number of workers"),
            ("cpu*", "'' is not a number of workers"),
            ("cpu*2*2", "'2*2' is not a number of workers"),
            ("auto,cpu", "'auto' stands alone"),
            ("auto*2", "'auto' stands alone"),
            ("cpu:1*257", "more than 256 workers"),
            ("cpu:1*200,cpu:1*57", "more than 256 workers"),
            ("cpu*18446744073709551615", "more than 256 workers"),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn with_cpu_workers_alone_adapters_are_not_looked_at() {
        let devices = parse("cpu:1,cpu*2").unwrap();
        let (workers, _) = resolve(&devices, || panic!("looked"), 8).unwrap();
        assert_eq!(workers.len(), 3);
    }

    #[test]
    fn a_cpu_without_number_takes_the_cores_less_one_a_gpu_worker_and_at_least_one() {
        let two = || vec![adapter("A", AdapterClass::Discrete), adapter("B", AdapterClass::Discrete)];
        assert_eq!(specs("cpu", vec![], 8), ["cpu:8"]);
        assert_eq!(specs("cpu,gpu:0*2", two(), 8), ["cpu:6", "gpu:0", "gpu:0"]);
        assert_eq!(specs("gpu:0,gpu:1,cpu", two(), 2), ["gpu:0", "gpu:1", "cpu:1"]);
        assert_eq!(specs("cpu*2", vec![], 9), ["cpu:4", "cpu:4"]);
        assert_eq!(specs("cpu*4", vec![], 2), ["cpu:1"; 4]);
        assert_eq!(specs("cpu:7", vec![], 2), ["cpu:7"]);
        assert_eq!(specs("cpu", vec![], 0), ["cpu:1"]);
    }

    #[test]
    fn auto_takes_every_gpu_but_no_software_adapter_and_says_why() {
        let found = vec![
            adapter("Radeon", AdapterClass::Discrete),
            adapter("llvmpipe", AdapterClass::Software),
            adapter("Iris", AdapterClass::Integrated),
            adapter("vGPU", AdapterClass::Virtual),
            adapter("Odd", AdapterClass::Unknown),
        ];
        let (workers, reasons) = resolve(&Devices::Auto, || Ok(found), 4).unwrap();
        let chosen: Vec<_> = workers.iter().map(|worker| worker.spec.as_str()).collect();
        assert_eq!(chosen, ["gpu:0", "gpu:2", "gpu:3"]);
        assert_eq!(reasons.len(), 5);
        assert!(reasons[2].contains("Iris") && reasons[2].contains("an integrated GPU"), "{reasons:?}");
        assert!(reasons[1].contains("left out") && reasons[1].contains("software"), "{reasons:?}");
    }

    #[test]
    fn auto_without_a_gpu_is_the_whole_cpu_and_says_why() {
        let (workers, reasons) = resolve(&Devices::Auto, || Ok(vec![adapter("llvmpipe", AdapterClass::Software)]), 4).unwrap();
        assert_eq!(workers, [Resolved { spec: "cpu:4".to_owned(), kind: DeviceKind::Cpu { threads: 4 } }]);
        assert!(reasons[1].contains("no adapter is a GPU"), "{reasons:?}");
        let (_, reasons) = resolve(&Devices::Auto, || Ok(vec![]), 1).unwrap();
        assert_eq!(reasons, ["cpu:1: chosen because no graphics adapter was found; this machine has 1 core"]);
    }

    #[test]
    fn an_unknown_index_names_the_adapters_that_exist() {
        let found = vec![adapter("llvmpipe", AdapterClass::Software)];
        let error = resolve(&parse("gpu:1").unwrap(), || Ok(found), 2).unwrap_err();
        assert_eq!(error.to_string(), "--devices gpu:1: there is no such adapter; there are gpu:0 (llvmpipe, software adapter)");
        assert!(error.downcast_ref::<DeviceError>().is_some());
        let error = resolve(&parse("gpu:0").unwrap(), || Ok(vec![]), 2).unwrap_err();
        assert!(error.to_string().contains("use --devices cpu"), "{error}");
        // A software adapter is taken when it is named.
        assert_eq!(specs("gpu:0", vec![adapter("llvmpipe", AdapterClass::Software)], 2), ["gpu:0"]);
    }

    #[test]
    fn shares_are_read_and_counted_against_the_workers() {
        assert_eq!(parse_balance("", Some(2)), Ok(Balance::Default));
        assert_eq!(parse_balance("equal", None), Ok(Balance::Equal));
        assert_eq!(parse_balance("auto", Some(1)), Ok(Balance::Auto));
        assert_eq!(parse_balance("2:1", Some(2)), Ok(Balance::Weights(vec![2.0, 1.0])));
        assert_eq!(parse_balance("0:1.5:1", None), Ok(Balance::Weights(vec![0.0, 1.5, 1.0])));
        for (text, n, part) in [
            ("2:1", 3, "2 weights for 3 workers"),
            ("1", 2, "1 weight for 2 workers"),
            ("0:0", 2, "all weights are zero"),
            ("1:-1", 2, "'-1' is not a weight"),
            ("1:nan", 2, "'nan' is not a weight"),
            ("1::1", 3, "'' is not a weight"),
            ("fair", 2, "'fair' is not a weight"),
        ] {
            let error = parse_balance(text, Some(n)).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
