//! Products and LSTM steps on the GPU against the CPU backend: every variant, the edges of dispatches and loops, whole sweeps.

use std::ops::Range;
use std::time::Duration;

use carrousel::backend::cpu::CpuBackend;
use carrousel::backend::gpu::GpuBackend;
use carrousel::backend::gpu::adapters;
use carrousel::backend::{Backend, Span, read_now};
use carrousel::kernels::gemm::{self, DIRECT_BLOCK, Gemm, MAX_K, Matrix, TILED_BLOCK};
use carrousel::kernels::lstm::{
    self, Cell, FLAG_NON_FINITE, Lane, LaneGradients, LanePart, LaneShape, LaneStarts, LaneTensors, LaneVectors, LstmStepForward, NONE,
    SweepArgs,
};
use carrousel::kernels::{AdapterClass, Binding, Case, Dispatch, Entry, Fill, Kernel, MAX_WORKGROUPS, Operand, ShapeError};
use carrousel::pool::CpuContext;
use carrousel::rng::{Purpose, StepKey, Stream};

const PATIENCE: Duration = Duration::from_secs(120);
/// Words before and behind an operand that no kernel may touch.
const GUARD: usize = 64;
const GUARD_BITS: u32 = 0x7fc0_dead;

/// The first adapter, or nothing where the tests are told to do without.
fn gpu() -> Option<GpuBackend> {
    let policy = std::env::var("CARROUSEL_TEST_GPU").unwrap_or_else(|_| "auto".to_owned());
    if policy == "off" || (policy == "auto" && adapters::list().unwrap().is_empty()) {
        println!("skipped: no adapter (CARROUSEL_TEST_GPU={policy})");
        return None;
    }
    Some(GpuBackend::new(0).unwrap())
}

/// A kernel as it runs on another class of adapter than the one at hand.
struct As<'k>(&'k dyn Kernel, AdapterClass);

impl Kernel for As<'_> {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn bindings(&self) -> &'static [Binding] {
        self.0.bindings()
    }
    fn params(&self) -> &[u8] {
        self.0.params()
    }
    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        self.0.check(lens)
    }
    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        self.0.dispatch(self.1)
    }
    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        self.0.run(ctx, operands);
    }
}

fn fill(fill: &Fill, len: usize, seed: u64, operand: u32) -> Vec<f32> {
    let mut stream = Stream::new(StepKey::new(seed, 0), Purpose::Test, operand, 0);
    match fill {
        Fill::Uniform { low, high } => (0..len).map(|_| low + (high - low) * stream.uniform()).collect(),
        Fill::Indices { below } => (0..len).map(|_| f32::from_bits(stream.below(*below))).collect(),
        Fill::Words(words) => words.iter().map(|w| f32::from_bits(*w)).collect(),
        Fill::Floats(floats) => floats.clone(),
        Fill::Zeros => vec![0.0; len],
        Fill::Poison => vec![f32::NAN; len],
    }
}

/// What each operand holds after the launch; fails where a word beside them has changed.
fn outcome(backend: &mut dyn Backend, kernel: &dyn Kernel, label: &str, inputs: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let guard = [f32::from_bits(GUARD_BITS); GUARD];
    let spans: Vec<Span> = inputs
        .iter()
        .map(|words| {
            let buffer = backend.alloc("operand", words.len() + 2 * GUARD).unwrap();
            let all = [&guard, words.as_slice(), &guard].concat();
            backend.write(backend.whole(buffer), &all).unwrap();
            backend.whole(buffer).part(GUARD, words.len())
        })
        .collect();
    backend.launch(kernel, &spans).unwrap();
    spans
        .iter()
        .zip(kernel.bindings())
        .map(|(span, binding)| {
            let whole = backend.whole(span.buffer);
            let all = read_now(backend, whole, PATIENCE).unwrap();
            backend.free(span.buffer);
            let (before, rest) = all.split_at(GUARD);
            let (words, behind) = rest.split_at(span.len);
            let untouched = before.iter().chain(behind).all(|w| w.to_bits() == GUARD_BITS);
            assert!(untouched, "{} {label}: words beside {} were written", kernel.name(), binding.name);
            words.to_vec()
        })
        .collect()
}

/// Fails where two results of one kind differ by more than `absolute + relative * |value|`, or where only one of them is not a number.
fn assert_close(what: &str, cpu: &[f32], gpu: &[f32], absolute: f64, relative: f64) {
    assert_eq!(cpu.len(), gpu.len(), "{what}");
    for (i, (c, g)) in cpu.iter().zip(gpu).enumerate() {
        let close = (f64::from(*c) - f64::from(*g)).abs() <= absolute + relative * f64::from(c.abs());
        let same = c.to_bits() == g.to_bits() || (c.is_nan() && g.is_nan());
        assert!(same || (close && g.is_finite()), "{what}[{i}] is {c} on the CPU, {g} on the GPU");
    }
}

fn agrees(cpu: &mut CpuBackend, gpu: &mut GpuBackend, entry: &Entry, case: &Case, seed: u64, class: AdapterClass) {
    let inputs: Vec<_> = case.operands.iter().zip(0..).map(|(o, i)| fill(&o.fill, o.len, seed, i)).collect();
    let on_cpu = outcome(cpu, case.kernel.as_ref(), &case.label, &inputs);
    let on_gpu = outcome(gpu, &As(case.kernel.as_ref(), class), &case.label, &inputs);
    for ((binding, c), g) in case.kernel.bindings().iter().zip(&on_cpu).zip(&on_gpu) {
        let what = format!("{} {class:?} {} seed {seed}: {}", entry.name, case.label, binding.name);
        // Each may be off by the tolerance against the oracle.
        assert_close(&what, c, g, 2.0 * entry.tolerance.absolute, 2.0 * entry.tolerance.relative);
    }
}

#[test]
fn products_of_every_variant_agree_with_the_cpu() {
    let Some(mut gpu) = gpu() else { return };
    let mut cpu = CpuBackend::new(1).unwrap();
    for class in [AdapterClass::Software, AdapterClass::Hardware] {
        for (seed, case) in (1..).zip((gemm::ENTRY.cases)()) {
            agrees(&mut cpu, &mut gpu, &gemm::ENTRY, &case, seed, class);
        }
    }
}

#[test]
fn lstm_steps_agree_with_the_cpu() {
    let Some(mut gpu) = gpu() else { return };
    let mut cpu = CpuBackend::new(1).unwrap();
    for entry in [lstm::FORWARD_ENTRY, lstm::BACKWARD_ENTRY] {
        for (seed, case) in (1..).zip((entry.cases)()) {
            agrees(&mut cpu, &mut gpu, &entry, &case, seed, AdapterClass::Software);
        }
    }
}

/// op(A) op(B) with matrices that lie without gaps.
fn dense([m, n, k]: [u32; 3], trans: [bool; 2], accumulate: bool) -> Gemm {
    let row_major = |rows: u32, cols: u32, trans: bool| Matrix::row_major(0, if trans { rows } else { cols } as usize);
    Gemm {
        m,
        n,
        k,
        trans_a: u32::from(trans[0]),
        trans_b: u32::from(trans[1]),
        accumulate: u32::from(accumulate),
        use_bias: 0,
        bias_offset: 0,
        a: row_major(m, k, trans[0]),
        b: row_major(k, n, trans[1]),
        c: Matrix::row_major(0, n as usize),
    }
}

#[test]
fn the_longest_sum_is_complete_and_a_longer_one_is_refused() {
    let Some(mut gpu) = gpu() else { return };
    for class in [AdapterClass::Software, AdapterClass::Hardware] {
        for trans in [[false, true], [true, false]] {
            let gemm = dense([2, 3, MAX_K], trans, true);
            let k = MAX_K as usize;
            // Sums of ones are exact, so that one term too few shows.
            let inputs = [vec![1.0; 2 * k], vec![1.0; 3 * k], vec![0.0], vec![1.0; 6]];
            let c = outcome(&mut gpu, &As(&gemm, class), "ones", &inputs).pop().unwrap();
            assert_eq!(c, [MAX_K as f32 + 1.0; 6], "{class:?} {trans:?}");
            assert!(Gemm { k: MAX_K + 1, ..gemm }.check(&[usize::MAX; 4]).is_err());
        }
    }
}

#[test]
fn products_with_nothing_to_sum_or_to_write_leave_what_they_must() {
    let Some(mut gpu) = gpu() else { return };
    let mut cpu = CpuBackend::new(1).unwrap();
    for class in [AdapterClass::Software, AdapterClass::Hardware] {
        for size in [[2, 3, 0], [0, 3, 2], [2, 0, 3]] {
            for accumulate in [false, true] {
                let gemm = dense(size, [false, false], accumulate);
                let inputs = [vec![1.0; 6], vec![1.0; 6], vec![0.0], vec![5.0; 6]];
                let on_cpu = outcome(&mut cpu, &gemm, "empty", &inputs);
                assert_eq!(on_cpu, outcome(&mut gpu, &As(&gemm, class), "empty", &inputs), "{class:?} {size:?} {accumulate}");
            }
        }
    }
}

/// A kernel on a grid with its blocks of rows folded otherwise, as only millions of rows would have it.
struct Folded(Gemm, AdapterClass, [u32; 2]);

impl Kernel for Folded {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn bindings(&self) -> &'static [Binding] {
        self.0.bindings()
    }
    fn params(&self) -> &[u8] {
        self.0.params()
    }
    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        self.0.check(lens)
    }
    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        let dispatch = self.0.dispatch(self.1);
        Dispatch { grid: [dispatch.grid[0], self.2[0], self.2[1]], ..dispatch }
    }
    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        self.0.run(ctx, operands);
    }
}

#[test]
fn blocks_of_rows_folded_over_two_dimensions_are_all_computed() {
    let Some(mut gpu) = gpu() else { return };
    for (class, [rows, _]) in [(AdapterClass::Software, DIRECT_BLOCK), (AdapterClass::Hardware, TILED_BLOCK)] {
        let m = 5 * rows - 3;
        let gemm = dense([m, 1, 1], [false, false], false);
        let a: Vec<f32> = (0..m).map(|i| i as f32).collect();
        let inputs = [a, vec![2.0], vec![0.0], vec![f32::NAN; m as usize]];
        for fold in [[1, 5], [5, 1], [3, 2], [2, 3], [4, 4]] {
            let c = outcome(&mut gpu, &Folded(gemm, class, fold), "rows", &inputs).pop().unwrap();
            assert!(c.iter().zip(0..).all(|(c, i)| *c == 2.0 * i as f32), "{class:?} {fold:?}");
        }
    }
    let most = MAX_WORKGROUPS * DIRECT_BLOCK[0];
    let grid = |m: u32| dense([m, 1, 1], [false, false], false).dispatch(AdapterClass::Software).grid;
    assert_eq!((grid(most), grid(most + 1)), ([1, MAX_WORKGROUPS, 1], [1, MAX_WORKGROUPS / 2 + 1, 2]));
}

#[test]
fn a_pre_activation_that_is_not_finite_raises_the_flag_unless_its_row_has_ended() {
    let Some(mut gpu) = gpu() else { return };
    let mut cpu = CpuBackend::new(1).unwrap();
    let (rows, hidden) = (5, 16);
    let (state, width) = (rows * hidden, 4 * hidden);
    let kernel = LstmStepForward {
        n_rows: rows as u32,
        hidden: hidden as u32,
        width: hidden as u32,
        weight_hh: 0,
        bias_ih: NONE,
        bias_hh: NONE,
        gates: 0,
        h_prev: 0,
        h: state as u32,
        masked_prev: NONE,
        masked: NONE,
        output: NONE,
        input: NONE,
        c_prev: 0,
        c: state as u32,
        m: NONE,
        t: 3,
        use_lengths: 1,
        initial: 0,
        cell: Cell::PLAIN,
    };
    // Row 4 ended at step 2.
    let lengths: Vec<f32> = [4, 9, 4, 9, 2].map(f32::from_bits).to_vec();
    let sane = [
        vec![0.01; hidden * width],
        vec![0.5; rows * width],
        vec![0.1; 2 * state],
        vec![0.1; 2 * state],
        lengths,
        vec![0.0],
        vec![0.0; 4],
        vec![],
    ];
    let mut faults = vec![("nothing", 1, 0, 0.5, 0), ("z of the ended row", 1, 4 * width + 7, f32::NAN, 0)];
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        faults.extend([("weight", 0, 1000, bad, 1), ("z", 1, 3 * width + 63, bad, 1), ("h", 2, 3 * hidden + 15, bad, 1)]);
    }
    for (what, operand, word, bad, raised) in faults {
        let mut inputs = sane.clone();
        inputs[operand][word] = bad;
        for backend in [&mut cpu as &mut dyn Backend, &mut gpu] {
            let words = outcome(backend, &kernel, what, &inputs);
            assert_eq!(words[5][FLAG_NON_FINITE].to_bits(), raised, "{what} {bad} on {}", backend.info().spec);
            assert_eq!(words[2][state + 4 * hidden..], [0.1; 16], "{what} {bad}: an ended row keeps its state");
        }
    }
}

/// A sweep forward and backward over one lane; what it leaves, by name.
struct Sweep {
    n_steps: u32,
    n_rows: u32,
    inputs: u32,
    hidden: u32,
    range: Range<u32>,
    reverse: bool,
    lengths: Option<Vec<u32>>,
    accumulate: bool,
}

impl Sweep {
    fn run(&self, backend: &mut dyn Backend) -> Vec<(&'static str, Vec<f32>)> {
        let (t, b, k, h) = (self.n_steps as usize, self.n_rows as usize, self.inputs as usize, self.hidden as usize);
        let width = 4 * h;
        let mut operand = 0;
        let mut random = |backend: &mut dyn Backend, label: &str, len: usize, scale: f32| {
            operand += 1;
            let buffer = backend.alloc(label, len).unwrap();
            let words = fill(&Fill::Uniform { low: -scale, high: scale }, len, 7, operand);
            backend.write(backend.whole(buffer), &words).unwrap();
            backend.whole(buffer)
        };
        // weight_ih, weight_hh, bias_ih, bias_hh, one behind another.
        let n_params = (k + h) * width + 2 * width;
        let params = random(backend, "params", n_params, 0.3);
        let x = random(backend, "x", t * b * k, 1.0);
        let (h_span, c_span) = (random(backend, "h", (t + 1) * b * h, 0.5), random(backend, "c", (t + 1) * b * h, 0.5));
        let dh_out = random(backend, "dh_out", t * b * h, 1.0 / 64.0);
        let carry = random(backend, "carry", 2 * b * h, 1.0 / 64.0);
        let grads = random(backend, "grads", n_params, 1.0);
        let poisoned = |backend: &mut dyn Backend, label: &str, len: usize| {
            let buffer = backend.alloc(label, len).unwrap();
            backend.write(backend.whole(buffer), &vec![f32::NAN; len]).unwrap();
            backend.whole(buffer)
        };
        let (gates, dx) = (poisoned(backend, "gates", t * b * width), poisoned(backend, "dx", t * b * k));
        let flags = backend.alloc("flags", 1).unwrap();
        let flags = backend.whole(flags);
        let lengths = self.lengths.as_ref().map(|lengths| {
            let buffer = backend.alloc("lengths", b).unwrap();
            backend.write(backend.whole(buffer), bytemuck::cast_slice(lengths)).unwrap();
            backend.whole(buffer)
        });
        let tensors = |bucket: Span| LaneTensors {
            weight_ih: (bucket, 0),
            weight_hh: (bucket, (k * width) as u32),
            weight_hr: None,
            vectors: Some(LaneVectors {
                bias_ih: ((k + h) * width) as u32,
                bias_hh: ((k + h) * width + width) as u32,
                ..LaneVectors::none(bucket)
            }),
        };
        let lane = Lane {
            shape: LaneShape::plain(self.hidden, self.hidden),
            n_steps: self.n_steps,
            reverse: self.reverse,
            tensors: tensors(params),
            x: [Some(LanePart { span: x, offset: 0, width: self.inputs }), None],
            gates,
            residual: None,
            starts: LaneStarts::default(),
            h: h_span,
            c: c_span,
            range: self.range.clone(),
            rows: lengths,
            use_lengths: lengths.is_some(),
            cell: Cell::PLAIN,
            backward: Some(LaneGradients {
                dh_out: Some((dh_out, 0)),
                carry,
                dh: None,
                tensors: tensors(grads),
                accumulate: self.accumulate,
                dx: [Some(LanePart { span: dx, offset: 0, width: self.inputs }), None],
                accumulate_dx: false,
            }),
        };
        let mut args = SweepArgs { n_rows: self.n_rows, lanes: std::slice::from_ref(&lane), flags, gradients: false };
        backend.sweep(&args).unwrap();
        let forward = [("h", h_span), ("c", c_span), ("gates", gates)].map(|(name, s)| (name, read_now(backend, s, PATIENCE).unwrap()));
        args.gradients = true;
        backend.sweep(&args).unwrap();
        let backward = [("dz", gates), ("carry", carry), ("dx", dx), ("grads", grads), ("flags", flags)]
            .map(|(name, s)| (name, read_now(backend, s, PATIENCE).unwrap()));
        forward.into_iter().chain(backward).collect()
    }

    fn agrees(&self, what: &str) {
        let Some(mut gpu) = gpu() else { return };
        let on_cpu = self.run(&mut CpuBackend::new(1).unwrap());
        let on_gpu = self.run(&mut gpu);
        for ((name, c), (_, g)) in on_cpu.iter().zip(&on_gpu) {
            // Sums over T x B terms: in proportion to the largest gradient.
            let scale = c.iter().filter(|v| v.is_finite()).fold(1.0, |m: f32, v| m.max(v.abs()));
            assert_close(&format!("{what}: {name}"), c, g, 2e-5 * f64::from(scale), 1e-4);
        }
        assert!(on_cpu.iter().any(|(name, words)| *name == "dx" && words.iter().any(|g| g.abs() > 1e-4)), "{what}: a sweep of zeros");
    }
}

#[test]
fn whole_sweeps_agree_with_the_cpu() {
    let plain = || Sweep { n_steps: 7, n_rows: 13, inputs: 12, hidden: 48, range: 0..7, reverse: false, lengths: None, accumulate: false };
    plain().agrees("plain");
    Sweep { reverse: true, accumulate: true, n_rows: 33, ..plain() }.agrees("reverse, added up");
    Sweep { range: 2..6, hidden: 16, inputs: 20, n_rows: 1, ..plain() }.agrees("a part of the steps");
    Sweep { lengths: Some((0..13).map(|b| b % 8).collect()), ..plain() }.agrees("rows of every length");
}

#[test]
fn a_sweep_over_more_than_65535_rows_and_steps_agrees_with_the_cpu() {
    let long = Sweep { n_steps: 70, n_rows: 1001, inputs: 4, hidden: 16, range: 0..70, reverse: false, lengths: None, accumulate: false };
    long.agrees("70 x 1001");
}
