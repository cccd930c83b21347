//! The GPU backend: kernels other than the matrix product and the LSTM cell against the CPU backend, order of writes, readbacks, loss.

use std::time::Duration;

use carrousel::backend::cpu::CpuBackend;
use carrousel::backend::gpu::GpuBackend;
use carrousel::backend::gpu::adapters::{self, NoSuchAdapter};
use carrousel::backend::{Backend, DeviceError, read_now};
use carrousel::kernels::elementwise::Scale;
use carrousel::kernels::loss::{BinaryCrossEntropy, SoftmaxCrossEntropy, SquaredError};
use carrousel::kernels::lstm::{ACTIVATIONS, NONE};
use carrousel::kernels::reduce::ColumnSums;
use carrousel::kernels::{
    self, AdapterClass, Binding, Case, Dispatch, Entry, Fill, Kernel, Operand, Shader, ShapeError, activations, read, read_write,
};
use carrousel::pool::CpuContext;
use carrousel::rng::{Purpose, StepKey, Stream};

const PATIENCE: Duration = Duration::from_secs(120);

/// The first adapter, or nothing where the tests are told to do without.
fn gpu() -> Option<GpuBackend> {
    let policy = std::env::var("CARROUSEL_TEST_GPU").unwrap_or_else(|_| "auto".to_owned());
    if policy == "off" || (policy == "auto" && adapters::list().unwrap().is_empty()) {
        println!("skipped: no adapter (CARROUSEL_TEST_GPU={policy})");
        return None;
    }
    Some(GpuBackend::new(0).unwrap())
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

/// What each operand holds after the launch.
fn outcome(backend: &mut dyn Backend, case: &Case, inputs: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let spans: Vec<_> = inputs
        .iter()
        .map(|words| {
            let buffer = backend.alloc("operand", words.len()).unwrap();
            backend.write(backend.whole(buffer), words).unwrap();
            backend.whole(buffer)
        })
        .collect();
    backend.launch(case.kernel.as_ref(), &spans).unwrap();
    let words = spans.iter().map(|&span| read_now(backend, span, PATIENCE).unwrap()).collect();
    spans.iter().for_each(|span| backend.free(span.buffer));
    words
}

fn compare(entry: &Entry, case: &Case, seed: u64, cpu: &[Vec<f32>], gpu: &[Vec<f32>]) {
    for (o, (cpu, gpu)) in cpu.iter().zip(gpu).enumerate() {
        assert_eq!(cpu.len(), gpu.len());
        let name = case.kernel.bindings()[o].name;
        for (i, (c, g)) in cpu.iter().zip(gpu).enumerate() {
            // Equal bits cover indices and places that stay poisoned.
            let close =
                (f64::from(*c) - f64::from(*g)).abs() <= 2.0 * (entry.tolerance.absolute + entry.tolerance.relative * f64::from(c.abs()));
            assert!(
                c.to_bits() == g.to_bits() || (c.is_nan() && g.is_nan()) || (close && g.is_finite()),
                "{} {} seed {seed}: {name}[{i}] is {c} on the CPU, {g} on the GPU",
                entry.name,
                case.label
            );
        }
    }
}

#[test]
fn every_kernel_but_products_and_cells_agrees_with_the_cpu() {
    let Some(mut gpu) = gpu() else { return };
    let mut cpu = CpuBackend::new(1).unwrap();
    for entry in kernels::ALL.iter().filter(|e| !e.name.starts_with("gemm") && !e.name.starts_with("lstm")) {
        for (seed, case) in (1..).zip((entry.cases)()) {
            let inputs: Vec<_> = case.operands.iter().zip(0..).map(|(o, i)| fill(&o.fill, o.len, seed, i)).collect();
            let (on_cpu, on_gpu) = (outcome(&mut cpu, &case, &inputs), outcome(&mut gpu, &case, &inputs));
            compare(entry, &case, seed, &on_cpu, &on_gpu);
        }
    }
}

/// Adds the first operand to the second.
fn adding(len: u32) -> ColumnSums {
    ColumnSums { n_rows: 1, n_cols: len, row_stride: len, offset: 0, out: 0, second_out: NONE, accumulate: 1 }
}

#[test]
fn writes_launches_and_copies_take_effect_in_the_order_of_the_calls() {
    let Some(mut gpu) = gpu() else { return };
    let (x, y, z) = (gpu.alloc("x", 70).unwrap(), gpu.alloc("y", 70).unwrap(), gpu.alloc("z", 70).unwrap());
    let (x, y, z) = (gpu.whole(x), gpu.whole(y), gpu.whole(z));
    let add = adding(70);
    gpu.write(x, &[1.0; 70]).unwrap();
    gpu.launch(&add, &[x, y]).unwrap();
    gpu.write(x, &[10.0; 70]).unwrap();
    gpu.launch(&add, &[x, y]).unwrap();
    gpu.copy(y, z).unwrap();
    gpu.launch(&Scale { len: 70, offset: 0, a: 2.0 }, &[y]).unwrap();
    gpu.clear(x.part(64, 6)).unwrap();
    let words = gpu.read(&[y, z.part(0, 3), x.part(62, 4)], Vec::new()).unwrap().wait(PATIENCE).unwrap();
    assert_eq!(words[..70], [22.0; 70]);
    assert_eq!(words[70..], [11.0, 11.0, 11.0, 10.0, 10.0, 0.0, 0.0]);
}

#[test]
fn more_launches_than_one_submit_holds_run_in_order() {
    let Some(mut gpu) = gpu() else { return };
    let [x, y, z] = ["x", "y", "z"].map(|label| gpu.alloc(label, 1).map(|id| gpu.whole(id)).unwrap());
    gpu.write(x, &[1.0]).unwrap();
    // z sums what y has counted to.
    for i in 0..9000 {
        let operands = if i % 2 == 0 { [x, y] } else { [y, z] };
        gpu.launch(&adding(1), &operands).unwrap();
    }
    assert_eq!(read_now(&mut gpu, z, PATIENCE).unwrap(), [(4500 * 4501 / 2) as f32]);
}

#[test]
fn a_readback_can_be_waited_for_on_another_thread_while_the_device_works_on() {
    let Some(mut gpu) = gpu() else { return };
    let x = gpu.alloc("x", 1000).unwrap();
    let x = gpu.whole(x);
    let mut waiting = Vec::new();
    for i in 0..20 {
        gpu.write(x, &[i as f32; 1000]).unwrap();
        gpu.launch(&Scale { len: 1000, offset: 0, a: 3.0 }, &[x]).unwrap();
        let readback = gpu.read(&[x], Vec::with_capacity(1000)).unwrap();
        waiting.push(std::thread::spawn(move || readback.wait(PATIENCE)));
    }
    for (i, thread) in waiting.into_iter().enumerate() {
        assert_eq!(thread.join().unwrap().unwrap(), [3.0 * i as f32; 1000]);
    }
    drop(gpu.read(&[x], Vec::new()).unwrap());
    gpu.wait(PATIENCE).unwrap();
}

#[test]
fn an_adapter_that_does_not_exist_is_an_error_that_names_those_that_do() {
    let adapters = adapters::list().unwrap();
    let error = GpuBackend::new(99).err().expect("there are fewer than 100 adapters");
    let told = error.downcast_ref::<NoSuchAdapter>().unwrap();
    assert_eq!(told.names, adapters.iter().map(|a| a.name.clone()).collect::<Vec<_>>());
    assert!(error.to_string().contains("gpu:99") && adapters.iter().all(|a| error.to_string().contains(&a.name)), "{error}");
    assert!(adapters.iter().enumerate().all(|(i, a)| a.index == i && a.backend != "noop"));
}

#[test]
fn a_lost_device_makes_every_call_an_error_that_names_it() {
    let Some(mut gpu) = gpu() else { return };
    let x = gpu.alloc("x", 64).unwrap();
    let x = gpu.whole(x);
    let scale = Scale { len: 64, offset: 0, a: 2.0 };
    gpu.launch(&scale, &[x]).unwrap();
    let readback = gpu.read(&[x], Vec::new()).unwrap();
    gpu.destroy_device();
    let name = gpu.info().name.clone();
    let is_lost = |what: &str, result: anyhow::Result<()>| {
        let error = result.expect_err(what);
        assert!(matches!(error.downcast_ref(), Some(DeviceError::Lost { .. })) && error.to_string().contains(&name), "{what}: {error:#}");
    };
    is_lost("write", gpu.write(x, &[0.0; 64]));
    is_lost("launch", gpu.launch(&scale, &[x]));
    is_lost("clear", gpu.clear(x));
    is_lost("alloc", gpu.alloc("y", 1).map(drop));
    is_lost("read", gpu.read(&[x], Vec::new()).map(drop));
    is_lost("submit", gpu.submit());
    is_lost("wait", gpu.wait(PATIENCE));
    // What was submitted before may have come through.
    if let Err(error) = readback.wait(PATIENCE) {
        is_lost("an earlier readback", Err(error));
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_limit_and_both_numbers() {
    let Some(mut gpu) = gpu() else { return };
    let limits = gpu.limits();
    let error = gpu.alloc("gates", (limits.max_buffer_bytes / 4 + 64) as usize).unwrap_err().to_string();
    assert!(error.contains("gates") && error.contains("max_buffer_size") && error.contains("--hidden"), "{error}");
    if limits.max_binding_bytes < limits.max_buffer_bytes.min(1 << 30) {
        let len = (limits.max_binding_bytes / 4 + 64) as usize;
        let big = gpu.alloc("gates", len).unwrap();
        let error = gpu.launch(&Scale { len: 1, offset: 0, a: 1.0 }, &[gpu.whole(big)]).unwrap_err().to_string();
        assert!(error.contains("max_storage_buffer_binding_size"), "{error}");
    }
}

#[test]
fn a_buffer_that_is_read_and_written_in_one_launch_is_refused_by_name() {
    let Some(mut gpu) = gpu() else { return };
    let x = gpu.alloc("x", 128).unwrap();
    let (a, b) = (gpu.whole(x).part(0, 64), gpu.whole(x).part(64, 64));
    let add = adding(64);
    let error = gpu.launch(&add, &[a, b]).unwrap_err().to_string();
    assert!(error.contains("column_sums: data and sums"), "{error}");
    // The refusal leaves the device as it was.
    gpu.launch(&Scale { len: 64, offset: 0, a: 1.0 }, &[b]).unwrap();
    assert_eq!(read_now(&mut gpu, b, PATIENCE).unwrap(), [0.0; 64]);
}

#[test]
fn a_value_that_is_not_finite_raises_the_flag_unless_its_row_is_not_scored() {
    let Some(mut gpu) = gpu() else { return };
    let mut cpu = CpuBackend::new(1).unwrap();
    for (bad, bad_row, raised) in [(f32::NAN, 1, 1), (f32::INFINITY, 1, 1), (f32::NEG_INFINITY, 0, 1), (f32::NAN, 2, 0), (0.5, 1, 0)] {
        let (n_rows, n, row_stride) = (3, 5, 8);
        let mut values: Vec<f32> = (0..24).map(|i| (i as f32 * 0.37).sin()).collect();
        values[bad_row * 8 + 3] = bad;
        let softmax = SoftmaxCrossEntropy { n_rows, n_classes: n, row_stride, scale: 0.5, gradient: 1 };
        let squared = SquaredError { n_rows, n_outputs: n, row_stride, scale: 0.5, gradient: 1 };
        let binary = BinaryCrossEntropy { n_rows, n_outputs: n, row_stride, scale: 0.5, gradient: 1 };
        let targets = [0u32, 4, 2].map(f32::from_bits).to_vec();
        let weights: Vec<f32> = (0..15).map(|i| if i < 10 { 1.0 } else { 0.0 }).collect();
        let of_rows = vec![1.0, 2.0, 0.0];
        let (nothing, flags) = (vec![f32::NAN; 3], vec![0.0]);
        let all: [(Box<dyn Kernel>, _); 3] = [
            (Box::new(softmax), vec![values.clone(), targets, of_rows.clone(), nothing.clone(), flags.clone()]),
            (Box::new(binary), vec![values.clone(), vec![1.0; 15], of_rows, nothing.clone(), flags.clone()]),
            (Box::new(squared), vec![values.clone(), vec![0.25; 15], weights, nothing, flags]),
        ];
        for (kernel, inputs) in all {
            let case = Case { label: format!("{bad} in row {bad_row}"), kernel, operands: Vec::new(), flop: 0 };
            let (on_cpu, on_gpu) = (outcome(&mut cpu, &case, &inputs), outcome(&mut gpu, &case, &inputs));
            for words in [&on_cpu, &on_gpu] {
                assert_eq!(words[4][0].to_bits(), raised, "{} {}", case.kernel.name(), case.label);
                assert_eq!((words[3][2], &words[0][16..21]), (0.0, &[0.0; 5][..]), "{} {}", case.kernel.name(), case.label);
            }
            if raised == 1 && case.kernel.name() != "squared_error" {
                assert!(on_cpu[3][bad_row].is_nan() && on_gpu[3][bad_row].is_nan(), "{}", case.label);
            }
        }
    }
}

/// The shared activation functions as a kernel: for each x, exp, sigmoid and tanh of it.
struct Probe {
    params: [u32; 1],
}

static PROBE: Shader = Shader {
    name: "probe",
    source: "
        struct Params { len: u32 }
        @group(0) @binding(0) var<uniform> params: Params;
        @group(0) @binding(1) var<storage, read> x: array<f32>;
        @group(0) @binding(2) var<storage, read_write> y: array<f32>;
        @compute @workgroup_size(64)
        fn probe(@builtin(global_invocation_id) id: vec3<u32>) {
            if (id.x < params.len) {
                y[3u * id.x] = safe_exp(x[id.x]);
                y[3u * id.x + 1u] = sigmoid(x[id.x]);
                y[3u * id.x + 2u] = safe_tanh(x[id.x]);
            }
        }",
    fragments: &[&ACTIVATIONS],
};

impl Kernel for Probe {
    fn name(&self) -> &'static str {
        "probe"
    }
    fn bindings(&self) -> &'static [Binding] {
        const { &[read("x"), read_write("y")] }
    }
    fn params(&self) -> &[u8] {
        bytemuck::bytes_of(&self.params)
    }
    fn check(&self, _: &[usize]) -> Result<(), ShapeError> {
        Ok(())
    }
    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &PROBE, overrides: &[], grid: [self.params[0].div_ceil(64), 1, 1] }
    }
    fn run(&self, _: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [x, y] = operands else { unreachable!("two operands") };
        for (x, y) in x.as_slice().iter().zip(y.as_mut_slice().chunks_exact_mut(3)) {
            y.copy_from_slice(&[activations::exp::<false>(*x), activations::sigmoid::<false>(*x), activations::tanh::<false>(*x)]);
        }
    }
}

#[test]
fn activations_agree_with_the_cpu_everywhere_and_keep_not_a_number() {
    let Some(mut gpu) = gpu() else { return };
    let mut cpu = CpuBackend::new(1).unwrap();
    let special = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 0.0, 1e-8, -1e-8, 88.5, -88.5, 89.0, -200.0];
    let x: Vec<f32> = special.into_iter().chain((-20_000..=20_000).map(|i| i as f32 / 200.0)).collect();
    let probe = Probe { params: [x.len() as u32] };
    let case = Case { label: "probe".to_owned(), kernel: Box::new(probe), operands: Vec::new(), flop: 0 };
    let inputs = [x.clone(), vec![7.0; 3 * x.len()]];
    let (on_cpu, on_gpu) = (outcome(&mut cpu, &case, &inputs), outcome(&mut gpu, &case, &inputs));
    for (i, x) in x.iter().enumerate() {
        for (f, name) in ["exp", "sigmoid", "tanh"].into_iter().enumerate() {
            let (c, g) = (on_cpu[1][3 * i + f], on_gpu[1][3 * i + f]);
            // WGSL allows exp 3 + 2 |x| ulp; tanh needs it near 1 only.
            let ulp = if name == "tanh" { 8.0 } else { 6.0 + 2.0 * x.abs().min(100.0) };
            let close = (c - g).abs() <= 1e-37 + ulp * f32::EPSILON * c.abs();
            assert!(if x.is_nan() { c.is_nan() && g.is_nan() } else { close }, "{name}({x}) is {c} on the CPU, {g} on the GPU");
        }
    }
}
