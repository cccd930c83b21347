//! Every kernel of the catalogue, at the sizes that its entry names for benches.

use std::time::{Duration, Instant};

use carrousel::backend::{Backend, Span};
use carrousel::kernels::gemm::Gemm;
use carrousel::kernels::lstm::LstmStepForward;
use carrousel::kernels::{ALL, Case, Entry, Tolerance};
use criterion::{BenchmarkId, Criterion, Throughput};

use crate::adapters::{DEADLINE, Device};
use crate::compare::{Outcome, Source, What, compare, compare_words, is_kept, unchanged};
use crate::memory::{Guarded, floats, words_of};
use crate::oracle::{self, Want};

/// Launches between two uploads of fresh operands: kernels that work in place neither overflow nor reach denormal numbers by then.
const LAUNCHES: u64 = 64;
/// Rows of a product that the oracle computes; the rest is compared with the first device's.
const JUDGED_ROWS: u32 = 16;
/// How much farther from the oracle than the catalogue's tests allow: sums are up to 16 times as long.
const SLACK: f64 = 32.0;

/// Measures all kernels.
pub fn bench(criterion: &mut Criterion) {
    let devices = crate::devices();
    let mut backends: Vec<Box<dyn Backend>> = devices.iter().map(|device| device.open()).collect();
    for entry in ALL {
        let mut group = criterion.benchmark_group(entry.name);
        for (idx, case) in (entry.bench_cases)().iter().enumerate() {
            let inputs: Vec<Vec<u32>> = case.operands.iter().enumerate().map(|(i, o)| words_of(o, 4000 + idx as u64, i)).collect();
            let mut judge = Judge { entry, case, inputs: &inputs, wants: None, first: None };
            // Some labels go on with every parameter.
            let label = case.label.split(" {").next().unwrap_or_default();
            group.throughput(throughput(case));
            for (device, backend) in devices.iter().zip(&mut backends) {
                let backend = &mut **backend;
                if !backend.offers(&*case.kernel) {
                    continue;
                }
                let mut operands: Option<Vec<Guarded>> = None;
                group.bench_function(BenchmarkId::new(label, device), |bencher| {
                    let operands = operands.get_or_insert_with(|| judge.verified(backend, *device));
                    let spans: Vec<Span> = operands.iter().map(|operand| operand.span).collect();
                    bencher.iter_custom(|n| time(backend, case, &inputs, &spans, n));
                });
                operands.into_iter().flatten().for_each(|operand| operand.free(backend));
            }
        }
        group.finish();
    }
}

/// Floating-point operations, or else the bytes that must move.
fn throughput(case: &Case) -> Throughput {
    if case.flop > 0 { Throughput::Elements(case.flop) } else { Throughput::Bytes(case.bytes()) }
}

/// The time of `n` launches, until the device has done them; uploads do not count.
fn time(backend: &mut dyn Backend, case: &Case, inputs: &[Vec<u32>], spans: &[Span], n: u64) -> Duration {
    let mut total = Duration::ZERO;
    let mut left = n;
    while left > 0 {
        for (span, words) in spans.iter().zip(inputs) {
            backend.write(*span, bytemuck::cast_slice(words)).expect("an upload");
        }
        backend.wait(DEADLINE).expect("a device that is ready");
        let n_launches = left.min(LAUNCHES);
        let start = Instant::now();
        for _ in 0..n_launches {
            backend.launch(&*case.kernel, spans).expect("a launch");
        }
        backend.wait(DEADLINE).expect("launches that end");
        total += start.elapsed();
        left -= n_launches;
    }
    total
}

/// Judges one launch of a case on each device: by the oracle, and by the first device that ran it.
struct Judge<'a> {
    entry: &'a Entry,
    case: &'a Case,
    inputs: &'a [Vec<u32>],
    wants: Option<Vec<Want>>,
    first: Option<(Device, Vec<Vec<u32>>)>,
}

impl Judge<'_> {
    /// Uploads the operands, launches once, and judges what came out.
    fn verified(&mut self, backend: &mut dyn Backend, device: Device) -> Vec<Guarded> {
        let bindings = self.case.kernel.bindings();
        let operands: Vec<Guarded> =
            bindings.iter().zip(self.inputs).map(|(binding, words)| Guarded::upload(backend, binding.name, words)).collect();
        let spans: Vec<Span> = operands.iter().map(|operand| operand.span).collect();
        backend.launch(&*self.case.kernel, &spans).expect("a launch");
        let what = What { kernel: self.entry.name, case: &self.case.label, seed: 4000, operand: "" };
        let results = bindings.iter().zip(&operands).map(|(binding, operand)| {
            let what = What { operand: binding.name, ..what };
            operand.download(backend, device, &what)
        });
        let verdict = results.collect::<Result<Vec<_>, _>>().and_then(|results| self.judge(&what, device, results));
        if let Err(fault) = verdict {
            panic!("{fault}");
        }
        operands
    }

    fn judge(&mut self, what: &What<'_>, device: Device, results: Vec<Vec<u32>>) -> Result<(), String> {
        let Tolerance { absolute, relative, reason } = self.entry.tolerance;
        let tolerance = Tolerance { absolute: SLACK * absolute, relative: SLACK * relative, reason };
        let case = self.case;
        let wants = self.wants.get_or_insert_with(|| {
            let params = fewer_rows(self.entry.name, case.kernel.params());
            oracle::judge(self.entry.name, &params, self.inputs).expect("an oracle for every kernel")
        });
        let source = Source::Device(device);
        let mut n_compared = 0;
        for (i, (binding, want)) in case.kernel.bindings().iter().zip(&*wants).enumerate() {
            let what = What { operand: binding.name, ..*what };
            let got = results[i].clone();
            n_compared += match want {
                Want::Unchanged => unchanged(&what, device, &self.inputs[i], &got, |_| true).map(|()| 0)?,
                Want::Words(words) => compare_words(&what, &Outcome::new(Source::Oracle, words.clone()), &Outcome::new(source, got))?,
                Want::Floats(values) => {
                    if let Some((first, theirs)) = &self.first {
                        let theirs = Outcome::new(Source::Device(*first), floats(theirs[i].clone()));
                        compare(&what, &theirs, &Outcome::new(source, floats(got.clone())), &tolerance)?;
                    }
                    let n = values.iter().filter(|value| !is_kept(**value)).count();
                    compare(&what, &Outcome::new(Source::Oracle, values.clone()), &Outcome::new(source, floats(got)), &tolerance)?;
                    n
                }
            };
        }
        self.first.get_or_insert((device, results));
        if n_compared == 0 { Err(format!("{what}: nothing was compared on {device}")) } else { Ok(()) }
    }
}

/// The same kernel on its first rows only, where the naive oracle would take seconds and the number of rows places no operand.
fn fewer_rows(name: &str, params: &[u8]) -> Vec<u8> {
    match name {
        "gemm" => {
            let mut kernel: Gemm = bytemuck::pod_read_unaligned(params);
            kernel.m = kernel.m.min(JUDGED_ROWS);
            bytemuck::bytes_of(&kernel).to_vec()
        }
        "lstm_step_forward" => {
            let mut kernel: LstmStepForward = bytemuck::pod_read_unaligned(params);
            kernel.n_rows = kernel.n_rows.min(JUDGED_ROWS);
            bytemuck::bytes_of(&kernel).to_vec()
        }
        _ => params.to_vec(),
    }
}
