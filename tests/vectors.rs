//! Cases that PyTorch computed (`tests/vectors/README.md`): the sweep of stacked layers and a step of Adam on every device against them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use carrousel::backend::{Backend, Span, read_now};
use carrousel::kernels::lstm::{Cell, Lane, LaneGradients, LanePart, LaneShape, LaneStarts, LaneTensors, LaneVectors, SweepArgs};
use carrousel::model::{read_buckets, write_buckets};
use carrousel::optim::{BETAS, EPS, OptimizerConfig, Rule};
use carrousel::params::{Axis, Layout, ParamTable};
use carrousel::shape::{ALIGN, GATES, pad_inner, pad_units, round_up};
use serde_json::Value;

use crate::adapters::{DEADLINE, Device, devices};

/// Largest error of an output or a state, absolute.
const STATE_TOLERANCE: f64 = 2e-6;
/// Largest error of a gradient, as a share of the tensor's largest element.
const GRADIENT_TOLERANCE: f64 = 1e-5;
/// Largest error of a parameter after a step of Adam, as a share of the tensor's largest element.
const ADAM_TOLERANCE: f64 = 1e-5;

/// A case as it lies in the folder.
struct Case {
    name: String,
    n_steps: usize,
    n_rows: usize,
    n_inputs: usize,
    hidden: usize,
    /// Units that h is projected to; 0 for none.
    projection: usize,
    n_layers: usize,
    n_directions: usize,
    has_bias: bool,
    /// Valid steps of each row.
    lengths: Option<Vec<u32>>,
    tensors: BTreeMap<String, Vec<f64>>,
}

/// The case of a description.
fn read_case(json: &Path) -> Case {
    let text = std::fs::read_to_string(json).unwrap_or_else(|e| panic!("{}: {e}", json.display()));
    let about: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", json.display()));
    let number = |key: &str| about[key].as_u64().unwrap_or_else(|| panic!("{}: {key} is {}", json.display(), about[key])) as usize;
    let is_set = |key: &str| !matches!(&about[key], Value::Null | Value::Bool(false)) && about[key].as_u64() != Some(0);
    let [wide, narrow] = ["f64", "f32"].map(|kind| json.with_extension(format!("{kind}.safetensors")));
    let file = if wide.exists() { wide } else { narrow };
    let bytes = std::fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let mut tensors: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (name, tensor) in file.tensors() {
        let values = match tensor.dtype() {
            safetensors::Dtype::I64 => tensor.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
            safetensors::Dtype::F32 => tensor.data().as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
            safetensors::Dtype::F64 => tensor.data().as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
            other => panic!("{}: {name} is {other:?}", json.display()),
        };
        tensors.insert(name.clone(), values);
    }
    let mut case = Case {
        name: about["name"].as_str().unwrap_or("unnamed").to_owned(),
        n_steps: number("seq_len"),
        n_rows: number("batch"),
        n_inputs: number("input_size"),
        hidden: number("hidden_size"),
        projection: if is_set("proj_size") { number("proj_size") } else { 0 },
        n_layers: number("num_layers"),
        n_directions: 1 + usize::from(is_set("bidirectional")),
        has_bias: is_set("bias"),
        lengths: about["lengths"].as_array().map(|all| all.iter().map(|n| n.as_u64().expect("a length") as u32).collect()),
        tensors,
    };
    if is_set("batch_first") {
        case.make_time_major();
    }
    case
}

impl Case {
    /// `[B, T, ..]` as `[T, B, ..]`, for the tensors that torch leaves in the caller's order.
    fn make_time_major(&mut self) {
        let (t, b) = (self.n_steps, self.n_rows);
        for name in ["input", "output", "target_output", "grad.input"] {
            if let Some(values) = self.tensors.get_mut(name) {
                let width = values.len() / (t * b);
                let place = |row: usize, step: usize| (row * t + step) * width;
                *values = (0..t * b).flat_map(|i| &values[place(i % b, i / b)..][..width]).copied().collect();
            }
        }
    }

    fn get(&self, name: &str) -> &[f64] {
        self.tensors.get(name).unwrap_or_else(|| panic!("{}: there is no tensor {name}", self.name))
    }

    /// The parameters of all layers in the order of the forward pass, under torch's names.
    fn table(&self) -> ParamTable {
        let mut table = ParamTable::new();
        let (hidden, width) = (self.hidden, self.width());
        for layer in 0..self.n_layers {
            let inputs = if layer == 0 { Axis::inner(self.n_inputs) } else { Axis { groups: self.n_directions, ..Axis::units(width) } };
            let weight = |inputs: Axis| Layout::Panels { hidden, inputs };
            for suffix in &["", "_reverse"][..self.n_directions] {
                let name = |what: &str| format!("{what}_l{layer}{suffix}");
                table.push(name("weight_ih"), layer, vec![GATES * hidden, inputs.len()], weight(inputs));
                table.push(name("weight_hh"), layer, vec![GATES * hidden, width], weight(Axis::units(width)));
                if self.projection > 0 {
                    let layout = Layout::Matrix { rows: Axis::units(width), cols: Axis::units(hidden) };
                    table.push(name("weight_hr"), layer, vec![width, hidden], layout);
                }
                for which in ["bias_ih", "bias_hh"].into_iter().filter(|_| self.has_bias) {
                    table.push(name(which), layer, vec![GATES * hidden], Layout::gate_bias(hidden));
                }
            }
        }
        table
    }

    /// Units of h.
    fn width(&self) -> usize {
        if self.projection > 0 { self.projection } else { self.hidden }
    }

    /// Sets what lies behind the end of each row of `[T, B, width]` to zero, as torch has it.
    fn mask(&self, values: &mut [f32], width: usize) {
        let Some(lengths) = &self.lengths else { return };
        for (place, row) in values.chunks_exact_mut(width).enumerate() {
            if (place / self.n_rows) as u32 >= lengths[place % self.n_rows] {
                row.fill(0.0);
            }
        }
    }

    /// Steps that count.
    fn n_valid(&self) -> usize {
        self.lengths.as_ref().map_or(self.n_steps * self.n_rows, |lengths| lengths.iter().map(|&n| n as usize).sum())
    }

    /// The tensors `prefix + name` of all parameters, as f32, in the table's order.
    fn parameters(&self, table: &ParamTable, prefix: &str) -> Vec<Vec<f32>> {
        table.tensors().iter().map(|t| narrow(self.get(&format!("{prefix}{}", t.name)))).collect()
    }
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&v| v as f32).collect()
}

/// Rows of `from` as rows of `to`, filled up with zeros.
fn padded(values: &[f64], from: usize, to: usize) -> Vec<f32> {
    let row = |row: &[f64]| row.iter().map(|&v| v as f32).chain(std::iter::repeat_n(0.0, to - from)).collect::<Vec<_>>();
    values.chunks_exact(from).flat_map(row).collect()
}

/// Rows of `from` without what lies behind their first `to`.
fn cut(values: &[f32], from: usize, to: usize) -> Vec<f32> {
    values.chunks_exact(from).flat_map(|row| &row[..to]).copied().collect()
}

/// Errors of one kind of tensor: the largest, and where it was.
#[derive(Default)]
struct Errors {
    largest: f64,
    at: String,
}

/// What a device makes of a case is compared tensor by tensor; what is too far off is told at the end, with all others.
struct Judge<'c> {
    case: &'c Case,
    device: Device,
    states: Errors,
    gradients: Errors,
    adam: Errors,
    faults: Vec<String>,
}

impl<'c> Judge<'c> {
    fn new(case: &'c Case, device: Device) -> Self {
        Self { case, device, states: Errors::default(), gradients: Errors::default(), adam: Errors::default(), faults: Vec::new() }
    }

    /// The largest error of `got`, in units of `size`. A tensor that is zero in the reference must be exactly zero.
    fn error(&mut self, name: &str, got: &[f32], tolerance: f64, is_relative: bool) -> f64 {
        let want = self.case.get(name);
        assert_eq!(want.len(), got.len(), "{}: {name}", self.case.name);
        let size = want.iter().fold(0.0f64, |a, b| a.max(b.abs()));
        if size == 0.0 {
            if let Some(i) = got.iter().position(|&g| g != 0.0) {
                self.faults.push(format!("{name}[{i}] is {} and must be exactly zero", got[i]));
            }
            return 0.0;
        }
        let unit = if is_relative { size } else { 1.0 };
        let mut largest = 0.0;
        for (i, (&want, &got)) in want.iter().zip(got).enumerate() {
            let error = (want - f64::from(got)).abs() / unit;
            // NaN is not within any tolerance.
            if (error.is_nan() || error > tolerance) && largest <= tolerance {
                self.faults.push(format!("{name}[{i}]: torch has {want}, got {got}, {error:.2e} off where {tolerance:e} is allowed"));
            }
            largest = if error > largest || error.is_nan() { error } else { largest };
        }
        largest
    }

    fn state(&mut self, name: &str, got: &[f32]) {
        let error = self.error(name, got, STATE_TOLERANCE, false);
        self.states.take(error, name);
    }

    fn gradient(&mut self, name: &str, got: &[f32]) {
        let name = format!("grad.{name}");
        let error = self.error(&name, got, GRADIENT_TOLERANCE, true);
        self.gradients.take(error, &name);
    }

    fn adam(&mut self, name: &str, got: &[f32]) {
        let name = format!("adam1.{name}");
        let error = self.error(&name, got, ADAM_TOLERANCE, true);
        self.adam.take(error, &name);
    }

    fn finish(self) -> Vec<String> {
        let line = format!(
            "[vectors] {} on {}: outputs and states {:.1e} ({}), gradients {:.1e} ({}), adam {:.1e} ({})",
            self.case.name,
            self.device,
            self.states.largest,
            self.states.at,
            self.gradients.largest,
            self.gradients.at,
            self.adam.largest,
            self.adam.at,
        );
        println!("{line}");
        self.faults.into_iter().map(|fault| format!("{} on {}: {fault}", self.case.name, self.device)).collect()
    }
}

impl Errors {
    fn take(&mut self, error: f64, name: &str) {
        if error >= self.largest {
            (self.largest, self.at) = (error, name.to_owned());
        }
    }
}

/// A buffer that holds these words.
fn upload(backend: &mut dyn Backend, label: &str, words: &[f32]) -> Span {
    let buffer = backend.alloc(label, round_up(words.len(), ALIGN)).expect("memory");
    let span = backend.whole(buffer).part(0, words.len());
    backend.write(span, words).expect("an upload");
    span
}

fn read(backend: &mut dyn Backend, span: Span) -> Vec<f32> {
    read_now(backend, span, DEADLINE).expect("a readback")
}

/// The gradient of `weight * mean((value - target)^2)` over `n` values.
fn pull(values: &[f32], targets: &[f64], weight: f64, n: usize) -> Vec<f64> {
    let n = n as f64;
    values.iter().zip(targets).map(|(&v, t)| 2.0 * weight * (f64::from(v) - t) / n).collect()
}

/// Words of each direction, in one buffer or in one each: the span and where they start in it.
fn place(backend: &mut dyn Backend, label: &str, words: Vec<Vec<f32>>, together: bool) -> Vec<(Span, u32)> {
    if !together {
        return words.iter().map(|words| (upload(backend, label, words), 0)).collect();
    }
    let mut all: Vec<f32> = Vec::new();
    let starts: Vec<u32> = words
        .into_iter()
        .map(|words| {
            all.resize(round_up(all.len(), ALIGN), f32::NAN);
            let start = all.len() as u32;
            all.extend(words);
            start
        })
        .collect();
    let span = upload(backend, label, &all);
    starts.into_iter().map(|start| (span, start)).collect()
}

/// Sweeps a case forward and backward on a device, then takes Adam's step from torch's gradients. Memory of both directions of a layer lies `together`,
/// so that they share launches, or apart.
fn judge(backend: &mut dyn Backend, device: Device, case: &Case, together: bool) -> Vec<String> {
    let mut judge = Judge::new(case, device);
    let (t, b, h, n) = (case.n_steps, case.n_rows, case.hidden, case.n_directions);
    let r = case.width();
    let (hidden, width) = (pad_units(h), pad_units(r));
    let shape = LaneShape { width: width as u32, projects: case.projection > 0, ..LaneShape::plain(hidden as u32, h as u32) };
    let table = case.table();
    let mut alloc = |label: &str| table.buckets().iter().map(|bucket| backend.alloc(label, bucket.range.len()).expect("memory")).collect();
    let (params, grads): (Vec<_>, Vec<_>) = (alloc("parameters"), alloc("gradients"));
    write_buckets(&table, backend, &params, &case.parameters(&table, "")).expect("parameters");
    let tensors = |backend: &dyn Backend, buckets: &[_], lane: usize| {
        let at = |what: &str| {
            let tensor = table.get(&format!("{what}_l{}{}", lane / n, ["", "_reverse"][lane % n])).expect("a tensor of the table");
            (backend.whole(buckets[tensor.bucket]), tensor.offset as u32)
        };
        let vectors = case.has_bias.then(|| {
            let ((span, bias_ih), (_, bias_hh)) = (at("bias_ih"), at("bias_hh"));
            LaneVectors { bias_ih, bias_hh, ..LaneVectors::none(span) }
        });
        LaneTensors { weight_ih: at("weight_ih"), weight_hh: at("weight_hh"), weight_hr: shape.projects.then(|| at("weight_hr")), vectors }
    };
    let flags = upload(backend, "flags", &[0.0; ALIGN]);
    let rows = case.lengths.as_ref().map(|lengths| upload(backend, "lengths", bytemuck::cast_slice(lengths)));
    let part = |span: Span, offset: usize, width: usize| Some(LanePart { span, offset: offset as u32, width: width as u32 });
    let input = upload(backend, "input", &padded(case.get("input"), case.n_inputs, pad_inner(case.n_inputs)));
    let mut x = [part(input, 0, pad_inner(case.n_inputs)), None];
    let mut lanes: Vec<Lane> = Vec::new();
    for layer in 0..case.n_layers {
        let mut states = |initial: &str, units: usize, to: usize, len: usize| {
            let of_direction = |direction: usize| {
                let (mut words, state) = (vec![f32::NAN; len], b * to);
                let at = (layer * n + direction) * b * units;
                let start = case.tensors.get(initial).map_or(vec![0.0; state], |s| padded(&s[at..][..b * units], units, to));
                words[direction * t * state..][..state].copy_from_slice(&start);
                words
            };
            place(backend, initial, (0..n).map(of_direction).collect(), together)
        };
        let h_states = states("h_0", r, width, shape.h_len(t * b, b));
        let c_states = states("c_0", h, hidden, shape.c_len(t * b, b));
        let gates = place(backend, "gates", vec![vec![f32::NAN; shape.gates_len(t * b)]; n], together);
        for direction in 0..n {
            lanes.push(Lane {
                shape,
                n_steps: t as u32,
                reverse: direction == 1,
                tensors: tensors(backend, &params, layer * n + direction),
                x,
                gates: gates[direction].0,
                residual: None,
                starts: LaneStarts {
                    gates: gates[direction].1,
                    h: h_states[direction].1,
                    c: c_states[direction].1,
                    ..LaneStarts::default()
                },
                h: h_states[direction].0,
                c: c_states[direction].0,
                range: 0..t as u32,
                rows,
                use_lengths: rows.is_some(),
                cell: Cell::PLAIN,
                backward: None,
            });
        }
        let of_layer = &lanes[layer * n..];
        backend.sweep(&SweepArgs { n_rows: b as u32, lanes: of_layer, flags, gradients: false }).expect("a forward sweep");
        let below = |direction: usize| {
            let lane = of_layer.get(direction)?;
            part(lane.h, lane.starts.h as usize + (1 - direction) * b * width, width)
        };
        x = [below(0), below(1)];
    }

    // Both directions side by side.
    let mut output = vec![0.0; t * b * n * r];
    for direction in 0..n {
        let lane = &lanes[lanes.len() - n + direction];
        let first = lane.starts.h as usize + (1 - direction) * b * width;
        let values = cut(&read(backend, lane.h)[first..][..t * b * width], width, r);
        for (row, values) in output.chunks_exact_mut(n * r).zip(values.chunks_exact(r)) {
            row[direction * r..][..r].copy_from_slice(values);
        }
    }
    case.mask(&mut output, n * r);
    let mut last = |which: fn(&Lane) -> (Span, u32), from: usize, to: usize| -> Vec<f32> {
        let end = |lane: &Lane| if lane.reverse { 0 } else { t * b * from };
        let state = |lane: &Lane| {
            let (span, start) = which(lane);
            span.part(start as usize + end(lane), b * from)
        };
        lanes.iter().flat_map(|lane| cut(&read(backend, state(lane)), from, to)).collect()
    };
    let (h_n, c_n) = (last(|lane| (lane.h, lane.starts.h), width, r), last(|lane| (lane.c, lane.starts.c), hidden, h));
    judge.state("output", &output);
    judge.state("h_n", &h_n);
    judge.state("c_n", &c_n);

    let d_output: Vec<f64> = pull(&output, case.get("target_output"), 1.0, case.n_valid() * n * r);
    let (dh_n, dc_n) = (pull(&h_n, case.get("target_h_n"), 1.0, h_n.len()), pull(&c_n, case.get("target_c_n"), 0.5, c_n.len()));
    let of_direction = |direction: usize| {
        let values: Vec<f64> = d_output.chunks_exact(n * r).flat_map(|row| &row[direction * r..][..r]).copied().collect();
        padded(&values, r, width)
    };
    let mut above = place(backend, "gradient of the output", (0..n).map(of_direction).collect(), together);
    let (mut dh_0, mut dc_0) = (Vec::new(), Vec::new());
    for layer in (0..case.n_layers).rev() {
        let columns = if layer == 0 { pad_inner(case.n_inputs) } else { width };
        let n_parts = if layer == 0 { 1 } else { n };
        let below = place(backend, "gradient of the input", vec![vec![f32::NAN; t * b * columns]; n_parts], together);
        let of_direction = |direction: usize| {
            let of_lane = |d: &[f64], from: usize, to: usize| padded(&d[(layer * n + direction) * b * from..][..b * from], from, to);
            let mut carry = [of_lane(&dh_n, r, width), of_lane(&dc_n, h, hidden)].concat();
            carry.resize(shape.carry_len(b), f32::NAN);
            carry
        };
        let carries = place(backend, "carry", (0..n).map(of_direction).collect(), together);
        let dh = shape.projects.then(|| place(backend, "gradients of h", vec![vec![f32::NAN; shape.dh_len(t * b)]; n], together));
        for (direction, &dh_out) in above.iter().enumerate() {
            let lane = layer * n + direction;
            lanes[lane].starts.carry = carries[direction].1;
            lanes[lane].starts.dh = dh.as_ref().map_or(0, |dh| dh[direction].1);
            lanes[lane].backward = Some(LaneGradients {
                dh_out: Some(dh_out),
                carry: carries[direction].0,
                dh: dh.as_ref().map(|dh| dh[direction].0),
                tensors: tensors(backend, &grads, lane),
                accumulate: false,
                dx: [0, 1].map(|i| below.get(i).and_then(|&(span, start)| part(span, start as usize, columns))),
                accumulate_dx: direction > 0,
            });
        }
        let of_layer = &lanes[layer * n..(layer + 1) * n];
        backend.sweep(&SweepArgs { n_rows: b as u32, lanes: of_layer, flags, gradients: true }).expect("a backward sweep");
        let carried: Vec<Vec<f32>> =
            carries.into_iter().map(|(span, start)| read(backend, span)[start as usize..][..shape.carry_len(b)].to_vec()).collect();
        dh_0.splice(0..0, carried.iter().flat_map(|carried| cut(&carried[..b * width], width, r)));
        dc_0.splice(0..0, carried.iter().flat_map(|carried| cut(&carried[b * width..][..b * hidden], hidden, h)));
        above = below;
    }
    judge.gradient("input", &cut(&read(backend, above[0].0), pad_inner(case.n_inputs), case.n_inputs));
    for (name, got) in [("h_0", dh_0), ("c_0", dc_0)] {
        if case.tensors.contains_key(&format!("grad.{name}")) {
            judge.gradient(name, &got);
        }
    }
    for (tensor, got) in table.tensors().iter().zip(read_buckets(&table, backend, &grads, DEADLINE).expect("gradients")) {
        judge.gradient(&tensor.name, &got);
    }
    let flag = read(backend, flags)[0].to_bits();
    assert_eq!(flag, 0, "{} on {device}: finite values raised the flag", case.name);

    if case.tensors.keys().any(|name| name.starts_with("adam1.")) {
        write_buckets(&table, backend, &grads, &case.parameters(&table, "grad.")).expect("gradients");
        for (bucket, (&param, &grad)) in params.iter().zip(&grads).enumerate() {
            let len = table.buckets()[bucket].range.len();
            let states = [0; 2].map(|_| upload(backend, "moments", &vec![0.0; len]));
            let (param, grad) = (backend.whole(param), backend.whole(grad));
            adam().update(backend, param, grad, states, 1, adam().lr, 1.0).expect("an update");
        }
        for (tensor, got) in table.tensors().iter().zip(read_buckets(&table, backend, &params, DEADLINE).expect("parameters")) {
            judge.adam(&tensor.name, &got);
        }
    }
    judge.finish()
}

/// Adam with the numbers of the cases.
fn adam() -> OptimizerConfig {
    assert_eq!((BETAS, EPS), ((0.9, 0.999), 1e-8), "the cases were made with these");
    OptimizerConfig {
        rule: Rule::Adam,
        lr: 0.01,
        momentum: 0.0,
        nesterov: false,
        weight_decay: 0.0,
        l1: 0.0,
        clip_norm: 0.0,
        clip_value: 0.0,
    }
}

/// All cases of a folder, by name.
fn cases(folder: &Path) -> Vec<Case> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry of a folder").path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "json"));
    files.sort();
    files.iter().map(|path| read_case(path)).collect()
}

#[test]
fn reference_vectors() {
    let mut all = cases(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors"));
    assert_eq!(all.len(), 7, "committed cases");
    if let Some(folder) = std::env::var_os("CARROUSEL_VECTORS") {
        all.extend(cases(Path::new(&folder)));
    }
    let mut faults = Vec::new();
    for device in devices() {
        let mut backend = device.open();
        for case in &all {
            for together in [false, true].into_iter().take(case.n_directions) {
                faults.extend(judge(backend.as_mut(), device, case, together));
            }
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn a_reference_that_is_slightly_off_is_found() {
    let mut case = cases(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors")).swap_remove(1);
    let device = Device::Cpu(1);
    for name in ["output", "c_n", "grad.input", "grad.weight_hh_l0", "adam1.bias_ih_l0"] {
        let values = case.tensors.get_mut(name).expect("a tensor");
        let (at, size) = (values.len() / 2, values.iter().fold(0.0f64, |a, b| a.max(b.abs())));
        let good = values[at];
        values[at] += 3e-5 * size;
        let faults = judge(device.open().as_mut(), device, &case, false);
        assert!(faults.len() == 1 && faults[0].contains(&format!("{name}[{at}]")), "{name}: {faults:?}");
        case.tensors.get_mut(name).expect("a tensor")[at] = good;
    }
    let zeroed = case.tensors.get_mut("grad.bias_hh_l0").expect("a tensor");
    zeroed.fill(0.0);
    let faults = judge(device.open().as_mut(), device, &case, false);
    assert!(faults.iter().any(|f| f.contains("must be exactly zero")), "{faults:?}");
}
