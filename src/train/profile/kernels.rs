//! `profile kernels`: each kernel of the catalogue alone, beside what the device can do at best, measured in the same run.

use std::time::Instant;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::{open_one, time_of};
use crate::backend::{Backend, Span};
use crate::infer::session::DEADLINE;
use crate::kernels::elementwise::Scale;
use crate::kernels::probe::{self, MultiplyAdd};
use crate::kernels::{ALL, Access, AdapterClass, As, Case, Dispatch, Entry, Fill, Kernel, MAX_LOOP_TRIPS, Sizes};
use crate::pool::Isa;
use crate::shape::{ALIGN, round_up};
use crate::train::devices::{DeviceKind, Resolved};
use crate::train::tuning::Autotune;
use crate::usage::UsageError;

/// About how long the launches of one sample take, seconds.
const SAMPLE_SECONDS: f64 = 0.01;
/// Samples, of which the fastest counts.
const SAMPLES: usize = 9;
/// No kernel is measured for longer, seconds, once it has had one sample.
const CASE_SECONDS: f64 = 1.0;
/// Launches of a sample at most; in place fewer, so that numbers neither overflow nor become too small to be normal.
const LAUNCHES: usize = 1000;
const IN_PLACE_LAUNCHES: usize = 64;
/// Bytes that the measurement of memory reads and writes at most: more than caches hold.
const MEMORY_BYTES: u64 = 256 << 20;

/// Which kernels are measured, and at which sizes.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// By name; none: all.
    pub kernels: Vec<String>,
    /// Of a layer; none: the sizes that the benches have.
    pub sizes: Option<Sizes>,
    /// What an earlier measurement found fastest is marked as chosen, not what is fixed for the size.
    pub autotunes: bool,
}

/// What a device can do at best.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Multiplications and additions of registers, operations a second.
    pub flops: f64,
    /// Memory that is read and written, bytes a second.
    pub bandwidth: f64,
}

impl Ceilings {
    /// Measures them.
    ///
    /// # Errors
    /// The device's.
    pub fn of(backend: &mut dyn Backend, device: &Resolved) -> Result<Self> {
        let flops = match device.kind {
            DeviceKind::Cpu { threads } => cpu_flops(threads),
            DeviceKind::Gpu { .. } => gpu_flops(backend)?,
        };
        let limits = backend.limits();
        let most = MEMORY_BYTES.min(limits.max_buffer_bytes).min(limits.max_binding_bytes);
        // A CPU's caches, and an adapter that is one, hold less than 64 MB.
        let bytes = if matches!(device.kind, DeviceKind::Cpu { .. }) || backend.info().is_software { most.min(128 << 20) } else { most };
        let len = (bytes / 4) as usize;
        let buffer = backend.alloc("words", len)?;
        let words = backend.whole(buffer);
        let seconds = time_of(backend, &mut |backend| backend.launch(&Scale { len: len as u32, offset: 0, a: 1.0 }, &[words]));
        backend.free(buffer);
        Ok(Self { flops, bandwidth: 2.0 * bytes as f64 / seconds? })
    }
}

/// All threads at a time, since they may share what they compute with.
fn cpu_flops(threads: usize) -> f64 {
    let isa = Isa::detect();
    std::thread::scope(|scope| {
        let measured: Vec<_> = (0..threads).map(|_| scope.spawn(move || probe::flops(isa))).collect();
        measured.into_iter().map(|thread| thread.join().unwrap_or(0.0)).sum()
    })
}

/// As many invocations as keep every unit busy, for as long as a launch may take.
fn gpu_flops(backend: &mut dyn Backend) -> Result<f64> {
    let (len, mut trips) = if backend.info().is_software { (1 << 14, 64) } else { (1 << 20, 256) };
    let buffer = backend.alloc("outputs", len as usize)?;
    let out = backend.whole(buffer);
    let mut best: f64 = 0.0;
    // Short launches tell more of the way to them than of the device.
    while trips <= MAX_LOOP_TRIPS {
        let kernel = MultiplyAdd::new(len, trips);
        let seconds = time_of(backend, &mut |backend| backend.launch(&kernel, &[out]))?;
        best = best.max(kernel.flop() as f64 / seconds);
        if seconds > 5e-3 {
            break;
        }
        trips *= 4;
    }
    backend.free(buffer);
    Ok(best)
}

/// What one way to launch a case costs.
struct Timed {
    /// Of one launch.
    seconds: f64,
    variant: String,
    /// The way that it is launched elsewhere.
    is_chosen: bool,
}

/// Times every way to launch a case on this device.
fn time_case(backend: &mut dyn Backend, case: &Case) -> Result<Vec<Timed>> {
    let info = backend.info();
    let class = if info.is_software { AdapterClass::Software } else { AdapterClass::Hardware };
    let usual = case.kernel.dispatch(class);
    let launched = backend.variant(&*case.kernel);
    let ways = if info.is_gpu { case.kernel.candidates(class) } else { vec![usual] };
    let mut spans = Vec::with_capacity(case.operands.len());
    let timed = fill_and_time(backend, case, (&ways, &launched), &mut spans);
    spans.iter().for_each(|span| backend.free(span.buffer));
    timed
}

fn fill_and_time(
    backend: &mut dyn Backend,
    case: &Case,
    (ways, launched): (&[Dispatch], &str),
    spans: &mut Vec<Span>,
) -> Result<Vec<Timed>> {
    // Room for all of them first: what is too large is refused before it is made up.
    for (binding, operand) in case.kernel.bindings().iter().zip(&case.operands) {
        let buffer = backend.alloc(binding.name, round_up(operand.len.max(1), ALIGN))?;
        spans.push(Span { buffer, offset: 0, len: operand.len });
    }
    let words: Vec<Vec<u32>> = case.operands.iter().enumerate().map(|(idx, operand)| operand.words(1, idx)).collect();
    for (span, words) in spans.iter().zip(&words) {
        backend.write(*span, bytemuck::cast_slice(words))?;
    }
    let sample = |backend: &mut dyn Backend, kernel: &dyn Kernel, n: usize| -> Result<f64> {
        // What is written in place begins anew.
        for (((binding, operand), words), span) in case.kernel.bindings().iter().zip(&case.operands).zip(&words).zip(&*spans) {
            if binding.access == Access::ReadWrite && !matches!(operand.fill, Fill::Poison) {
                backend.write(*span, bytemuck::cast_slice(words))?;
            }
        }
        backend.wait(DEADLINE)?;
        let start = Instant::now();
        (0..n).try_for_each(|_| backend.launch(kernel, spans))?;
        backend.wait(DEADLINE)?;
        Ok(start.elapsed().as_secs_f64() / n as f64)
    };
    let time = |&dispatch: &Dispatch| -> Result<Timed> {
        let kernel = As { kernel: &*case.kernel, dispatch };
        // The first launch builds what is needed.
        sample(backend, &kernel, 1)?;
        let most = if case.is_in_place() { IN_PLACE_LAUNCHES } else { LAUNCHES };
        let about = sample(backend, &kernel, 1)?.min(sample(backend, &kernel, 4)?);
        let n = ((SAMPLE_SECONDS / about.max(1e-9)) as usize).clamp(1, most);
        let begun = Instant::now();
        let mut seconds = f64::INFINITY;
        for _ in 0..SAMPLES {
            seconds = seconds.min(sample(backend, &kernel, n)?);
            if begun.elapsed().as_secs_f64() > CASE_SECONDS {
                break;
            }
        }
        let variant = backend.variant(&kernel);
        Ok(Timed { seconds, is_chosen: variant == launched, variant })
    };
    ways.iter().map(time).collect()
}

/// Measures kernels on each device: `ceilings` by device, and `kernels` with the time of a launch, speed, share of the ceilings and variant, a row for each
/// variant that the device can run (`chosen` is the one that training launches). Bytes
/// are those that must move at least; what stays in a cache may be faster than memory. A case beyond a device's limits has an `error` instead.
///
/// # Errors
/// A kernel that does not exist, devices that do not exist; the device's.
pub fn profile_kernels(asked: &Asked, devices: &[Resolved]) -> Result<Map<String, Value>> {
    let entries = chosen(&asked.kernels)?;
    let (mut ceilings, mut rows) = (Vec::new(), Vec::new());
    for device in devices {
        let mut backend = open_one(device)?;
        Autotune::of_user(asked.autotunes).begin_on(backend.as_mut());
        let best = Ceilings::of(backend.as_mut(), device)?;
        let info = backend.info().clone();
        ceilings.push(json!({
            "device": device.spec, "name": info.name, "driver": info.driver,
            "gflops": best.flops / 1e9, "gb_per_second": best.bandwidth / 1e9,
        }));
        for entry in &entries {
            let cases = asked.sizes.map_or_else(entry.bench_cases, entry.sized);
            for case in cases {
                let timed = match time_case(backend.as_mut(), &case) {
                    Ok(ways) => ways.into_iter().map(Ok).collect(),
                    Err(error) => vec![Err(error)],
                };
                for way in timed {
                    rows.push(row(entry, &case, device, best, way)?);
                }
            }
        }
    }
    Ok(Map::from_iter([
        ("status".to_owned(), json!("finished")),
        ("ceilings".to_owned(), ceilings.into()),
        ("kernels".to_owned(), rows.into()),
    ]))
}

/// Kernels by name; all where none is named.
///
/// # Errors
/// A name that none has.
pub fn chosen(names: &[String]) -> Result<Vec<&'static Entry>, UsageError> {
    if names.is_empty() {
        return Ok(ALL.iter().collect());
    }
    let find = |name: &String| {
        ALL.iter().find(|entry| entry.name == *name).ok_or_else(|| {
            let known: Vec<&str> = ALL.iter().map(|entry| entry.name).collect();
            UsageError(format!("--kernel {name} is none of the kernels; choose among {}", known.join(", ")))
        })
    };
    names.iter().map(find).collect()
}

fn row(entry: &Entry, case: &Case, device: &Resolved, best: Ceilings, timed: Result<Timed>) -> Result<Value> {
    // Some labels go on with every parameter.
    let label = case.label.split(" {").next().unwrap_or_default();
    let mut row = json!({ "device": device.spec, "kernel": entry.name, "case": label });
    let fields = row.as_object_mut().into_iter();
    let told = match timed {
        Ok(Timed { seconds, variant, is_chosen }) => {
            let (flops, bandwidth) = (case.flop as f64 / seconds, case.bytes() as f64 / seconds);
            let computed = |value: f64| if case.flop > 0 { json!(value) } else { Value::Null };
            vec![
                ("variant", json!(variant)),
                ("chosen", json!(is_chosen)),
                ("us", json!(seconds * 1e6)),
                ("gflops", computed(flops / 1e9)),
                ("gb_per_second", json!(bandwidth / 1e9)),
                ("share_of_gflops", computed(flops / best.flops)),
                ("share_of_bandwidth", json!(bandwidth / best.bandwidth)),
            ]
        }
        // A limit of the device; anything else ends the measurement.
        Err(error) if error.downcast_ref::<UsageError>().is_some() => vec![("error", json!(format!("{error:#}")))],
        Err(error) => return Err(error),
    };
    fields.for_each(|fields| fields.extend(told.iter().map(|(name, value)| ((*name).to_owned(), value.clone()))));
    Ok(row)
}
