//! Layer normalisation inside the cell: the input's products before the sweep, and a step forward and backward after its product.
//! A row needs sums over all its hidden units, so a workgroup takes a row, and the recurrent product is a launch of its own.

use bytemuck::{Pod, Zeroable};

use super::rows::{CellRow, NormGradient, NormRow, cell_backward, cell_forward, hand_up, norm_gates, norm_input, settle, sums_width};
use super::{ACTIVATIONS, CELL, Cell, FLAG_NON_FINITE, GATE_INDEX, NONE, PEEPHOLES, case_rows, cells, parts};
use crate::for_isa;
use crate::kernels::weight_drop::PHILOX;
use crate::kernels::{
    AdapterClass, Binding, Case, Dispatch, Entry, Fill, Fragment, Kernel, Operand, Shader, ShapeError, Tolerance, at_least, grid_1d,
    kernel_basics, loop_trips, multiple_of, operand, read, read_write,
};
use crate::pool::CpuContext;
use crate::shape::{GATES, PANEL_UNITS, pad_units};

/// Sums over a workgroup in a fixed order.
pub static WORKGROUP_TOTAL: Fragment =
    Fragment { name: "workgroup_total", source: include_str!("../../../shaders/shared/workgroup_total.wgsl") };
/// What the kernels of layer normalisation share.
pub static LAYER_NORM: Fragment = Fragment { name: "layer_norm", source: include_str!("../../../shaders/shared/layer_norm.wgsl") };

/// The shader of [`LstmNormInput`].
pub static INPUT: Shader = Shader {
    name: "lstm_norm_input",
    source: include_str!("../../../shaders/lstm_norm_input.wgsl"),
    fragments: &[&GATE_INDEX, &WORKGROUP_TOTAL, &LAYER_NORM],
};
/// The shader of [`LstmNormForward`].
pub static FORWARD: Shader = Shader {
    name: "lstm_norm_forward",
    source: include_str!("../../../shaders/lstm_norm_forward.wgsl"),
    fragments: &[&ACTIVATIONS, &GATE_INDEX, &PHILOX, &CELL, &WORKGROUP_TOTAL, &LAYER_NORM],
};
/// The shader of [`LstmNormBackward`].
pub static BACKWARD: Shader = Shader {
    name: "lstm_norm_backward",
    source: include_str!("../../../shaders/lstm_norm_backward.wgsl"),
    fragments: &[&ACTIVATIONS, &GATE_INDEX, &PHILOX, &CELL, &WORKGROUP_TOTAL, &LAYER_NORM],
};

/// Floats that a row keeps of its norms for the way back: the factors of both products.
pub const NORM_FACTORS: usize = 4;

/// Fails where offsets of rows `[n, 4H]` or of their factors leave the arena.
fn check_arena(
    kernel: &'static str,
    len: usize,
    rows: usize,
    hidden: u32,
    units: u32,
    places: &[u32],
    factors: u32,
) -> Result<(), ShapeError> {
    multiple_of(kernel, "hidden", hidden, PANEL_UNITS)?;
    loop_trips(kernel, "hidden", hidden)?;
    at_least(kernel, "a row's units", units as usize, 1)?;
    at_least(kernel, "a row of units", hidden as usize, units as usize)?;
    for &offset in places {
        multiple_of(kernel, "an offset", offset, 4)?;
        at_least(kernel, "gates", len, offset as usize + rows * hidden as usize * GATES)?;
    }
    multiple_of(kernel, "an offset", factors, 4)?;
    at_least(kernel, "gates", len, factors as usize + rows * NORM_FACTORS)
}

/// Normalises the input's products of all steps in place.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct LstmNormInput {
    /// T x B.
    pub n_rows: u32,
    /// H, padded, and without padding.
    pub hidden: u32,
    pub units: u32,
    /// Offset in `gates` of the products `[T x B, 4H]`.
    pub x: u32,
    /// Offset in `gates` of the rows' factors `[T x B, 4]`, of which the first is written.
    pub factors: u32,
}

impl Kernel for LstmNormInput {
    kernel_basics!("lstm_norm_input", const { &[read_write("gates")] });

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        check_arena("lstm_norm_input", lens[0], self.n_rows as usize, self.hidden, self.units, &[self.x], self.factors)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &INPUT, overrides: &[], grid: grid_1d(u64::from(self.n_rows)) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [gates] = operands else { unreachable!("one operand") };
        let (rows, width, units, isa) = (self.n_rows as usize, self.hidden as usize * GATES, self.units as usize, ctx.isa);
        let places = [(self.x as usize, rows * width), (self.factors as usize, rows * NORM_FACTORS)];
        let [x, factors] = parts(gates.as_mut_slice(), places);
        for (x, factors) in x.chunks_exact_mut(width).zip(factors.chunks_exact_mut(NORM_FACTORS)) {
            factors.fill(0.0);
            let factor = &mut factors[0];
            for_isa!(isa, norm_input(x: &mut [f32], units: usize, factor: &mut f32));
        }
    }
}

/// One step forward after its recurrent product: normalises that, applies the gates, normalises the cell state, writes h (or m) and c.
/// Rows that have ended keep h and c; gates and m are zero there.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct LstmNormForward {
    pub cell: Cell,
    /// B.
    pub n_rows: u32,
    /// H, padded, and without padding.
    pub hidden: u32,
    pub units: u32,
    /// Offsets in `gates` of this step's `[B, 4H]`: the gates, the normalised product of the input, the recurrent product.
    pub gates: u32,
    pub x: u32,
    pub y: u32,
    /// Offset in `gates` of this step's factors `[B, 4]`.
    pub factors: u32,
    /// Offsets of the biases in `bias`, or [`NONE`].
    pub bias_ih: u32,
    pub bias_hh: u32,
    /// Offsets in `bias` of the gains `[4H]` of both products, and of gain and bias `[2, H]` of the cell state.
    pub norm_ih: u32,
    pub norm_hh: u32,
    pub norm_c: u32,
    /// Offsets of `[B, H]` in `h`, or [`NONE`] with a projection; the masked copy only with recurrent dropout.
    pub h_prev: u32,
    pub h: u32,
    pub masked: u32,
    /// Offset in `h` of what the layer hands up from this step `[B, H]`, [`NONE`] where that is h.
    pub output: u32,
    /// Offset in `input` of what a residual layer adds to it `[B, H]`, or [`NONE`].
    pub input: u32,
    /// Offsets of `[B, H]` in `c`; m with a projection, else [`NONE`].
    pub c_prev: u32,
    pub c: u32,
    pub m: u32,
    pub t: u32,
    pub use_lengths: u32,
}

const FORWARD_BINDINGS: &[Binding] =
    &[read_write("gates"), read_write("h"), read_write("c"), read("rows"), read_write("flags"), read("bias"), read("input")];

/// Fails where gains leave the vectors.
fn check_gains(kernel: &'static str, len: usize, hidden: usize, [ih, hh, c]: [u32; 3]) -> Result<(), ShapeError> {
    for (offset, len_needed) in [(ih, GATES * hidden), (hh, GATES * hidden), (c, 2 * hidden)] {
        multiple_of(kernel, "an offset", offset, 4)?;
        at_least(kernel, "bias", len, offset as usize + len_needed)?;
    }
    Ok(())
}

/// The gains in the vectors of a lane.
fn gains(bias: &[f32], units: u32, hidden: usize, [ih, hh, c]: [u32; 3]) -> NormRow<'_> {
    let at = |offset: u32, len: usize| &bias[offset as usize..][..len];
    NormRow { units: units as usize, ih: at(ih, GATES * hidden), hh: at(hh, GATES * hidden), c: at(c, 2 * hidden) }
}

impl Kernel for LstmNormForward {
    kernel_basics!("lstm_norm_forward", FORWARD_BINDINGS);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "lstm_norm_forward";
        let (rows, hidden) = (self.n_rows as usize, self.hidden as usize);
        check_arena(NAME, lens[0], rows, self.hidden, self.units, &[self.gates, self.x, self.y], self.factors)?;
        check_gains(NAME, lens[5], hidden, [self.norm_ih, self.norm_hh, self.norm_c])?;
        for bias in [self.bias_ih, self.bias_hh].into_iter().filter(|&b| b != NONE) {
            multiple_of(NAME, "an offset", bias, 4)?;
            at_least(NAME, "bias", lens[5], bias as usize + hidden * GATES)?;
        }
        let projects = self.m != NONE;
        for offset in [self.c_prev, self.c].into_iter().chain(projects.then_some(self.m)) {
            multiple_of(NAME, "an offset", offset, 4)?;
            at_least(NAME, "c", lens[2], offset as usize + rows * hidden)?;
        }
        if !projects {
            for offset in [self.h_prev, self.h].into_iter().chain(self.cell.is_masked().then_some(self.masked)) {
                multiple_of(NAME, "an offset", offset, 4)?;
                at_least(NAME, "h", lens[1], offset as usize + rows * hidden)?;
            }
        }
        super::check_output(NAME, lens[1], self.output, lens[6], self.input, rows * hidden)?;
        if self.use_lengths == 1 {
            at_least(NAME, "rows", lens[3], rows)?;
        }
        at_least(NAME, "flags", lens[4], 1)?;
        self.cell.check(NAME, (lens[5], lens[3]), rows, hidden)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &FORWARD, overrides: &[], grid: grid_1d(u64::from(self.n_rows)) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [gates, h, c, row_words, flags, bias, input] = operands else { unreachable!("seven operands") };
        let (rows, hidden, isa) = (self.n_rows as usize, self.hidden as usize, ctx.isa);
        let width = hidden * GATES;
        let bias = bias.as_slice();
        let lengths = (self.use_lengths == 1).then(|| &row_words.as_indices()[..rows]);
        let streams = self.cell.is_random().then(|| &row_words.as_indices()[self.cell.streams as usize..][..rows]);
        let mut bias_sum = vec![0.0; width];
        for offset in [self.bias_ih, self.bias_hh].into_iter().filter(|&b| b != NONE) {
            bias_sum.iter_mut().zip(&bias[offset as usize..]).for_each(|(sum, b)| *sum += b);
        }
        let projects = self.m != NONE;
        let norm = gains(bias, self.units, hidden, [self.norm_ih, self.norm_hh, self.norm_c]);
        let peephole = (self.cell.peephole != NONE).then(|| &bias[self.cell.peephole as usize..][..PEEPHOLES * hidden]);
        let cell = CellRow { cell: &self.cell, peephole, norm: Some(norm), t: self.t };
        let arena = |at: u32| (at as usize, rows * width);
        let factors = (self.factors as usize, rows * NORM_FACTORS);
        let [gates, x, y, factors] = parts(gates.as_mut_slice(), [arena(self.gates), arena(self.x), arena(self.y), factors]);
        let state = |at: u32, exists: bool| if exists { (at as usize, rows * hidden) } else { (0, 0) };
        let own = |at: u32| state(at, !projects);
        let masked_place = state(self.masked, !projects && self.cell.is_masked());
        let h_places = [own(self.h_prev), own(self.h), masked_place, state(self.output, self.output != NONE)];
        let [h_prev, h, masked, output] = parts(h.as_mut_slice(), h_places);
        let [c_prev, c, m] = parts(c.as_mut_slice(), [state(self.c_prev, true), state(self.c, true), state(self.m, projects)]);
        let (masked_width, output_width) = (masked.len() / rows.max(1), output.len() / rows.max(1));
        let out = if projects { m } else { h };
        let mut non_finite = 0u32;
        for b in 0..rows {
            let (z, y) = (&mut gates[b * width..][..width], &mut y[b * width..][..width]);
            let (x, factor) = (&x[b * width..][..width], &mut factors[b * NORM_FACTORS + 1..][..NORM_FACTORS - 1]);
            factor.fill(0.0);
            let factor = &mut factor[0];
            let (bias_sum, of_row) = (&bias_sum[..], b * hidden..(b + 1) * hidden);
            let (c_prev, c, out) = (&c_prev[of_row.clone()], &mut c[of_row.clone()], &mut out[of_row.clone()]);
            for_isa!(isa, norm_gates(norm: NormRow<'_>, z: &mut [f32], x: &[f32], y: &mut [f32], bias_sum: &[f32], factor: &mut f32));
            let masked = &mut masked[b * masked_width..][..masked_width];
            let output = &mut output[b * output_width..][..output_width];
            if lengths.is_some_and(|lengths| self.t >= lengths[b]) {
                z.fill(0.0);
                c.copy_from_slice(c_prev);
                if projects {
                    out.fill(0.0);
                } else {
                    out.copy_from_slice(&h_prev[of_row]);
                    if masked_width > 0 {
                        super::rows::apply_mask(&self.cell, streams.map_or(0, |streams| streams[b]), out, masked);
                    }
                    output.fill(0.0);
                }
                continue;
            }
            let (cell, stream, flag) = (&cell, streams.map_or(0, |streams| streams[b]), &mut non_finite);
            for_isa!(isa, fused cell_forward(cell: &CellRow<'_>, stream: u32, z: &mut [f32], c_prev: &[f32], out: &mut [f32], c: &mut [f32],
                                       flag: &mut u32));
            if !projects {
                let h_prev = &h_prev[of_row];
                for_isa!(isa, settle(cell: &CellRow<'_>, stream: u32, h_prev: &[f32], out: &mut [f32], masked: &mut [f32]));
            }
            if output_width > 0 {
                let (h, input) = (&*out, super::row_of(input.as_slice(), self.input, b, hidden));
                for_isa!(isa, hand_up(cell: &CellRow<'_>, stream: u32, h: &[f32], input: &[f32], output: &mut [f32]));
            }
        }
        if non_finite != 0 {
            flags.as_indices_mut()[FLAG_NON_FINITE] = 1;
        }
    }
}

/// One step backward, from the gradient of h (or, with a projection, of m): gates become dz, both normalised products the gradients of the
/// products, dc moves one step back, and the gradients of gains, biases and peepholes are gathered in `carry`, a row of sums for each row.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct LstmNormBackward {
    pub cell: Cell,
    /// B.
    pub n_rows: u32,
    /// H, padded, and without padding.
    pub hidden: u32,
    pub units: u32,
    /// R: floats of h, padded.
    pub width: u32,
    /// Offsets in `gates` as in [`LstmNormForward`].
    pub gates: u32,
    pub x: u32,
    pub y: u32,
    pub factors: u32,
    /// Offsets in `bias` as in [`LstmNormForward`].
    pub norm_ih: u32,
    pub norm_hh: u32,
    pub norm_c: u32,
    /// Offset of `[B, H]` in `c`.
    pub c_prev: u32,
    /// Offset of the gradient `[B, H]` in `dh`, unless `from_carry` is its offset in `carry` (else [`NONE`]).
    pub dh: u32,
    pub from_carry: u32,
    /// Offset in `carry`, whose meaning is that of [`super::LstmStepBackward`], with `[4H]`, `[4H]` and `[2, H]` behind the peepholes of each row.
    pub carry: u32,
    pub t: u32,
    pub last: u32,
    pub use_lengths: u32,
}

const BACKWARD_BINDINGS: &[Binding] = &[read_write("gates"), read("c"), read("dh"), read_write("carry"), read("rows"), read("bias")];

impl Kernel for LstmNormBackward {
    kernel_basics!("lstm_norm_backward", BACKWARD_BINDINGS);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "lstm_norm_backward";
        let (rows, hidden) = (self.n_rows as usize, self.hidden as usize);
        check_arena(NAME, lens[0], rows, self.hidden, self.units, &[self.gates, self.x, self.y], self.factors)?;
        check_gains(NAME, lens[5], hidden, [self.norm_ih, self.norm_hh, self.norm_c])?;
        multiple_of(NAME, "width", self.width, PANEL_UNITS)?;
        multiple_of(NAME, "an offset", self.c_prev, 4)?;
        at_least(NAME, "c", lens[1], self.c_prev as usize + rows * hidden)?;
        multiple_of(NAME, "an offset", self.carry, 4)?;
        let sums = sums_width(hidden, self.cell.peephole != NONE, true);
        at_least(NAME, "carry", lens[3], self.carry as usize + rows * (self.width as usize + hidden + sums))?;
        let (what, len, offset) = if self.from_carry == NONE { ("dh", lens[2], self.dh) } else { ("carry", lens[3], self.from_carry) };
        multiple_of(NAME, "an offset", offset, 4)?;
        at_least(NAME, what, len, offset as usize + rows * hidden)?;
        if self.use_lengths == 1 {
            at_least(NAME, "rows", lens[4], rows)?;
        }
        self.cell.check(NAME, (lens[5], lens[4]), rows, hidden)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &BACKWARD, overrides: &[], grid: grid_1d(u64::from(self.n_rows)) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [gates, c, dh, carry, row_words, bias] = operands else { unreachable!("six operands") };
        let (rows, hidden, h_width, isa) = (self.n_rows as usize, self.hidden as usize, self.width as usize, ctx.isa);
        let width = hidden * GATES;
        let bias = bias.as_slice();
        let lengths = (self.use_lengths == 1).then(|| &row_words.as_indices()[..rows]);
        let streams = self.cell.is_random().then(|| &row_words.as_indices()[self.cell.streams as usize..][..rows]);
        let norm = gains(bias, self.units, hidden, [self.norm_ih, self.norm_hh, self.norm_c]);
        let peephole = (self.cell.peephole != NONE).then(|| &bias[self.cell.peephole as usize..][..PEEPHOLES * hidden]);
        let cell = CellRow { cell: &self.cell, peephole, norm: Some(norm), t: self.t };
        let sums_width = sums_width(hidden, peephole.is_some(), true);
        let arena = |at: u32| (at as usize, rows * width);
        let factors = (self.factors as usize, rows * NORM_FACTORS);
        let [gates, x, y, factors] = parts(gates.as_mut_slice(), [arena(self.gates), arena(self.x), arena(self.y), factors]);
        let dc_at = self.carry as usize + rows * h_width;
        let given = if self.from_carry == NONE { (0, 0) } else { (self.from_carry as usize, rows * hidden) };
        let places = [(dc_at, rows * hidden), (dc_at + rows * hidden, rows * sums_width), given];
        let [dc, sums, given] = parts(carry.as_mut_slice(), places);
        let given = if self.from_carry == NONE { &dh.as_slice()[self.dh as usize..][..rows * hidden] } else { &*given };
        let scratch = ctx.scratch.take(hidden);
        if self.last == 1 {
            sums.fill(0.0);
        }
        for b in 0..rows {
            let of_row = b * width..(b + 1) * width;
            let (z, x, y) = (&mut gates[of_row.clone()], &mut x[of_row.clone()], &mut y[of_row]);
            let of_row = b * hidden..(b + 1) * hidden;
            if lengths.is_some_and(|lengths| self.t >= lengths[b]) {
                for row in [z, x, y] {
                    row.fill(0.0);
                }
                continue;
            }
            scratch.copy_from_slice(&given[of_row.clone()]);
            let (cell, stream, dh) = (&cell, streams.map_or(0, |streams| streams[b]), &mut *scratch);
            let (dc, sums) = (&mut dc[of_row.clone()], &mut sums[b * sums_width..][..sums_width]);
            let c_prev = &c.as_slice()[self.c_prev as usize..][of_row];
            let normed = Some(NormGradient { x, y, factors: [factors[b * NORM_FACTORS], factors[b * NORM_FACTORS + 1]] });
            for_isa!(isa, fused cell_backward(cell: &CellRow<'_>, stream: u32, z: &mut [f32], dh: &mut [f32], dc: &mut [f32], sums: &mut [f32],
                                        c_prev: &[f32], normed: Option<NormGradient<'_>>));
        }
    }
}

const NORM_TOLERANCE: Tolerance =
    Tolerance { absolute: 2e-5, relative: 2e-5, reason: "sums over a few hundred columns, divided by their deviation" };

/// The catalogue's line for the norm of the input's products.
pub const NORM_INPUT_ENTRY: Entry = Entry {
    name: "lstm_norm_input",
    tolerance: NORM_TOLERANCE,
    cases: || [(1, 1), (3, 17), (33, 33), (65, 5), (2, 300), (70_001, 3)].map(|(rows, units)| input_case(rows, units)).into(),
    bench_cases: || vec![input_case(5000, 256)],
    sized: |s| vec![input_case(s.places(), s.hidden)],
    shaders: &[&INPUT],
};

/// The catalogue's line for the step forward.
pub const NORM_FORWARD_ENTRY: Entry = Entry {
    name: "lstm_norm_forward",
    tolerance: NORM_TOLERANCE,
    cases: || {
        let sizes = [(1, 3), (3, 17), (33, 33), (65, 5), (2, 300)];
        let each = |(b, h)| (0..9).map(move |i| forward_case(b, h, i % 2 == 0, i % 3 == 0, cells(h)[i]));
        sizes.into_iter().flat_map(each).chain([forward_case(70_001, 13, false, false, ("plain", Cell::PLAIN))]).collect()
    },
    bench_cases: || vec![forward_case(50, 256, false, false, ("plain", Cell::PLAIN))],
    sized: |s| vec![forward_case(s.n_rows, s.hidden, false, false, ("plain", Cell::PLAIN))],
    shaders: &[&FORWARD],
};

/// The catalogue's line for the step backward.
pub const NORM_BACKWARD_ENTRY: Entry = Entry {
    name: "lstm_norm_backward",
    tolerance: NORM_TOLERANCE,
    cases: || {
        let sizes = [(1, 3), (3, 17), (33, 33), (65, 5), (2, 300)];
        let each = |(b, h)| (0..9).map(move |i| backward_case(b, h, i % 2 == 0, i % 3 == 0, i % 4 == 1, cells(h)[i]));
        sizes.into_iter().flat_map(each).chain([backward_case(70_001, 13, false, false, false, ("plain", Cell::PLAIN))]).collect()
    },
    bench_cases: || vec![backward_case(50, 256, false, false, false, ("plain", Cell::PLAIN))],
    sized: |s| vec![backward_case(s.n_rows, s.hidden, false, false, false, ("plain", Cell::PLAIN))],
    shaders: &[&BACKWARD],
};

fn input_case(n_rows: u32, units: u32) -> Case {
    let hidden = pad_units(units as usize) as u32;
    let len = n_rows * 4 * hidden;
    let kernel = LstmNormInput { n_rows, hidden, units, x: 4, factors: 4 + len };
    Case {
        label: format!("rows {n_rows} units {units}"),
        operands: vec![operand((4 + len + 4 * n_rows) as usize, padded_rows(4, n_rows as usize, hidden, units, 4 * n_rows as usize))],
        flop: 0,
        kernel: Box::new(kernel),
    }
}

/// Rows of four gates with zeros where units are padding, `before` and `behind` floats around them.
fn padded_rows(before: usize, n_rows: usize, hidden: u32, units: u32, behind: usize) -> Fill {
    let value = |i: usize| ((i * 7919) % 2003) as f32 / 1001.5 - 1.0;
    let width = hidden as usize * GATES;
    let of_gates = (0..n_rows * width).map(|i| {
        let unit = i % width / (PANEL_UNITS * GATES) * PANEL_UNITS + i % PANEL_UNITS;
        if unit < units as usize { value(i) } else { 0.0 }
    });
    let filler = |n: usize| (0..n).map(move |i| 0.5 + value(i).abs());
    Fill::Floats(filler(before).chain(of_gates).chain(filler(behind)).collect())
}

/// The vectors of a lane: gains and biases, zero where units are padding; peepholes at 4, as the cells of cases have them.
struct Vectors {
    at: [u32; 4],
    fill: Fill,
    len: usize,
}

fn vectors(hidden: u32, units: u32) -> Vectors {
    let (h, start) = (hidden, 4 + PEEPHOLES as u32 * hidden);
    let at = [start, start + 4 * h, start + 8 * h, start + 10 * h];
    let value = |i: u32, unit: u32| if unit < units { ((i * 31) % 67) as f32 / 67.0 - 0.4 } else { 0.0 };
    let unit_row = |rows: u32| (0..rows * h).map(move |i| value(i, i % h));
    let gate_row = || (0..4 * h).map(move |i| value(i, i / 64 * 16 + i % 16));
    let words: Vec<f32> =
        [0.0; 4].into_iter().chain(unit_row(3)).chain(gate_row()).chain(gate_row()).chain(unit_row(2)).chain(gate_row()).collect();
    Vectors { at, len: words.len(), fill: Fill::Floats(words) }
}

fn forward_case(n_rows: u32, units: u32, with_lengths: bool, projects: bool, (name, cell): (&str, Cell)) -> Case {
    let h = pad_units(units as usize) as u32;
    let (state, len) = (n_rows * h, n_rows * 4 * h);
    let v = vectors(h, units);
    let (is_masked, drops) = (cell.is_masked() && !projects, cell.drops() && !projects);
    let kernel = LstmNormForward {
        cell,
        n_rows,
        hidden: h,
        units,
        gates: 0,
        x: len,
        y: 2 * len,
        factors: 3 * len,
        bias_ih: if with_lengths { NONE } else { v.at[3] },
        bias_hh: v.at[3],
        norm_ih: v.at[0],
        norm_hh: v.at[1],
        norm_c: v.at[2],
        h_prev: if projects { NONE } else { state },
        h: if projects { NONE } else { 0 },
        masked: if is_masked { 2 * state } else { NONE },
        output: if drops { 3 * state } else { NONE },
        input: if drops && !with_lengths { 4 } else { NONE },
        c_prev: 0,
        c: state,
        m: if projects { 2 * state } else { NONE },
        t: 2,
        use_lengths: u32::from(with_lengths),
    };
    let random = Fill::Uniform { low: -1.0, high: 1.0 };
    Case {
        label: format!("B{n_rows} units {units} {name} lengths {with_lengths} projects {projects}"),
        operands: vec![
            operand((3 * len + 4 * n_rows) as usize, padded_rows(0, 3 * n_rows as usize, h, units, 4 * n_rows as usize)),
            operand((4 * state) as usize, random.clone()),
            operand((3 * state) as usize, padded_states(3 * n_rows as usize, h, units)),
            case_rows(n_rows, &cell),
            operand(1, Fill::Zeros),
            operand(v.len, v.fill),
            operand((4 + state) as usize, random),
        ],
        flop: 0,
        kernel: Box::new(kernel),
    }
}

/// Rows of units with zeros where they are padding.
fn padded_states(n_rows: usize, hidden: u32, units: u32) -> Fill {
    let value = |i: usize| ((i * 6007) % 1999) as f32 / 999.5 - 1.0;
    Fill::Floats((0..n_rows * hidden as usize).map(|i| if i % (hidden as usize) < units as usize { value(i) } else { 0.0 }).collect())
}

fn backward_case(n_rows: u32, units: u32, with_lengths: bool, last: bool, projects: bool, (name, cell): (&str, Cell)) -> Case {
    let h = pad_units(units as usize) as u32;
    let (state, len) = (n_rows * h, n_rows * 4 * h);
    let v = vectors(h, units);
    let width = if projects { 16 } else { h };
    let sums = sums_width(h as usize, cell.peephole != NONE, true) as u32;
    let carry_len = n_rows * (width + h + sums);
    let kernel = LstmNormBackward {
        cell,
        n_rows,
        hidden: h,
        units,
        width,
        gates: 0,
        x: len,
        y: 2 * len,
        factors: 3 * len,
        norm_ih: v.at[0],
        norm_hh: v.at[1],
        norm_c: v.at[2],
        c_prev: 0,
        dh: if projects { NONE } else { 4 },
        from_carry: if projects { carry_len } else { NONE },
        carry: 0,
        t: 2,
        last: u32::from(last),
        use_lengths: u32::from(with_lengths),
    };
    // The gradient of m where there is a projection lies behind the carry's own.
    let before = (n_rows * (width + h + sums)) as usize;
    let Fill::Floats(states) = padded_states(n_rows as usize, h, units) else { unreachable!("floats are what it makes") };
    let carry: Vec<f32> = (0..before).map(|i| (i % 13) as f32 / 13.0 - 0.4).chain(states.iter().copied()).collect();
    Case {
        label: format!("B{n_rows} units {units} {name} lengths {with_lengths} last {last} projects {projects}"),
        operands: vec![
            operand((3 * len + 4 * n_rows) as usize, padded_rows(0, 3 * n_rows as usize, h, units, 4 * n_rows as usize)),
            operand(state as usize, padded_states(n_rows as usize, h, units)),
            operand(4 + state as usize, Fill::Floats([0.0; 4].into_iter().chain(states).collect())),
            operand(carry.len(), Fill::Floats(carry)),
            case_rows(n_rows, &cell),
            operand(v.len, v.fill),
        ],
        flop: 0,
        kernel: Box::new(kernel),
    }
}
