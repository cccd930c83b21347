//! The LSTM cell and its sweep over time (Hochreiter and Schmidhuber 1997; Gers, Schmidhuber and Cummins 2000), with PyTorch's equations:
//!
//! ```text
//! z_t = x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh           split into z_i, z_f, z_g, z_o
//! i = sigmoid(z_i)   f = sigmoid(z_f)   g = tanh(z_g)   o = sigmoid(z_o)
//! c_t = f * c_{t-1} + i * g          h_t = o * tanh(c_t)
//! ```
//! and backwards, with dh_t = (gradient of the output) + dz_{t+1} W_hh:
//! ```text
//! do = dh * tanh(c)          dc = dc_{t+1} * f_{t+1} + dh * o * (1 - tanh(c)^2)
//! di = dc * g    df = dc * c_{t-1}    dg = dc * i
//! dz_i = di * i * (1 - i)   dz_f = df * f * (1 - f)   dz_g = dg * (1 - g^2)   dz_o = do * o * (1 - o)
//! ```
//! The order of operations: z starts as the input product, the recurrent product is added, then `b_ih + b_hh`.
//!
//! Layouts, H padded to a multiple of 16: weights `[H / 16][K][64]`, gates `[T, B, 4H]` with column `unit / 16 * 64 + gate * 16 + unit % 16`,
//! h and c `[T + 1, B, H]`. A forward lane reads state t and writes state t + 1 at step t, so that state 0 is the initial and state T the final one;
//! a reverse lane reads t + 1 and writes t. The gates buffer holds z, then the activated gates (a tap on them may read it after the
//! forward sweep), then dz: each step overwrites what the one before left.

use std::ops::Range;

use anyhow::{Result, ensure};
use bytemuck::{Pod, Zeroable};

use super::gemm::{Gemm, Matrix};
use super::microkernel::{self, Ends, Factors, Left, MatrixMut, Stored};
use super::reduce::ColumnSums;
use super::{
    AdapterClass, Binding, Case, Dispatch, Entry, Fill, Fragment, Kernel, MAX_LOOP_TRIPS, MAX_WORKGROUPS, ODD, Operand, Shader, ShapeError,
    Span, Tolerance, activations, at_least, kernel_basics, loop_trips, multiple_of, operand, read, read_write,
};
use crate::for_isa;
use crate::pool::{CpuContext, Rows};
use crate::shape::{GATES, PANEL, PANEL_UNITS, pad_units};

/// An offset that says: there is no such tensor.
pub const NONE: u32 = u32::MAX;

/// Sigmoid and tanh that keep NaN, and the test for non-finite bits.
pub static ACTIVATIONS: Fragment = Fragment { name: "activations", source: include_str!("../../shaders/shared/activations.wgsl") };
/// Where a unit's gates lie.
pub static GATE_INDEX: Fragment = Fragment { name: "gates", source: include_str!("../../shaders/shared/gates.wgsl") };

/// The shader of [`LstmStepForward`].
pub static FORWARD: Shader = Shader {
    name: "lstm_step_forward",
    source: include_str!("../../shaders/lstm_step_forward.wgsl"),
    fragments: &[&ACTIVATIONS, &GATE_INDEX],
};
/// The shader of [`LstmStepBackward`].
pub static BACKWARD: Shader = Shader {
    name: "lstm_step_backward",
    source: include_str!("../../shaders/lstm_step_backward.wgsl"),
    fragments: &[&ACTIVATIONS, &GATE_INDEX],
};

/// Batch rows that one workgroup of a step kernel covers; beside them it covers one panel of 16 units.
pub const STEP_ROWS: u32 = 32;

fn step_grid(n_rows: u32, hidden: u32) -> [u32; 3] {
    let blocks = n_rows.div_ceil(STEP_ROWS).max(1);
    let z = blocks.div_ceil(MAX_WORKGROUPS);
    [hidden / PANEL_UNITS as u32, blocks.div_ceil(z), z]
}

/// One step forward: adds the recurrent product and the biases to z, applies the gates, writes h and c.
/// Rows that have ended (t >= length) get gates, h and c of zero.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct LstmStepForward {
    /// B.
    pub n_rows: u32,
    /// H, padded.
    pub hidden: u32,
    /// Offset of `weight_hh` in `params`.
    pub weight_hh: u32,
    /// Offsets of the biases in `bias`, or [`NONE`].
    pub bias_ih: u32,
    pub bias_hh: u32,
    /// Offset of this step's `[B, 4H]` in `gates`.
    pub gates: u32,
    /// Offsets of `[B, H]` in `h` and `c`.
    pub h_prev: u32,
    pub h: u32,
    pub c_prev: u32,
    pub c: u32,
    pub t: u32,
    /// 1: `lengths` holds the number of valid steps of each row.
    pub use_lengths: u32,
}

const FORWARD_BINDINGS: &[Binding] =
    &[read("params"), read_write("gates"), read_write("h"), read_write("c"), read("lengths"), read_write("flags"), read("bias")];

/// The word of `flags` that counts as raised when not 0: a pre-activation, a logit or a prediction was not finite.
pub const FLAG_NON_FINITE: usize = 0;

impl Kernel for LstmStepForward {
    kernel_basics!("lstm_step_forward", FORWARD_BINDINGS);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "lstm_step_forward";
        let (rows, hidden) = (self.n_rows as usize, self.hidden as usize);
        multiple_of(NAME, "hidden", self.hidden, PANEL_UNITS)?;
        loop_trips(NAME, "hidden", self.hidden)?;
        for offset in [self.weight_hh, self.gates, self.h_prev, self.h, self.c_prev, self.c] {
            multiple_of(NAME, "an offset", offset, 4)?;
        }
        at_least(NAME, "params", lens[0], self.weight_hh as usize + hidden * hidden * GATES)?;
        for bias in [self.bias_ih, self.bias_hh].into_iter().filter(|&b| b != NONE) {
            multiple_of(NAME, "an offset", bias, 4)?;
            at_least(NAME, "bias", lens[6], bias as usize + hidden * GATES)?;
        }
        at_least(NAME, "gates", lens[1], self.gates as usize + rows * hidden * GATES)?;
        at_least(NAME, "h", lens[2], self.h.max(self.h_prev) as usize + rows * hidden)?;
        at_least(NAME, "c", lens[3], self.c.max(self.c_prev) as usize + rows * hidden)?;
        if self.use_lengths == 1 {
            at_least(NAME, "lengths", lens[4], rows)?;
        }
        at_least(NAME, "flags", lens[5], 1)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &FORWARD, overrides: &[], grid: step_grid(self.n_rows, self.hidden) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [params, gates, h, c, lengths, flags, bias] = operands else { unreachable!("seven operands") };
        let (rows, hidden) = (self.n_rows as usize, self.hidden as usize);
        let width = hidden * GATES;
        let params = params.as_slice();
        let lengths = (self.use_lengths == 1).then(|| lengths.as_indices());
        let (h_prev, h_next) = two_parts(h.as_mut_slice(), self.h_prev as usize, self.h as usize, rows * hidden);
        let (c_prev, c_next) = two_parts(c.as_mut_slice(), self.c_prev as usize, self.c as usize, rows * hidden);
        let (h_prev, c_prev) = (&*h_prev, &*c_prev);
        let gates = &mut gates.as_mut_slice()[self.gates as usize..][..rows * width];
        let weight = &params[self.weight_hh as usize..][..hidden * width];
        let bias_at = |offset: u32| (offset != NONE).then(|| &bias.as_slice()[offset as usize..][..width]);
        let (bias_ih, bias_hh) = (bias_at(self.bias_ih), bias_at(self.bias_hh));
        let raised = std::sync::atomic::AtomicBool::new(false);
        let isa = ctx.isa;
        let work = (Rows { data: gates, width }, Rows { data: h_next, width: hidden }, Rows { data: c_next, width: hidden });
        let min_rows = (1usize << 17).div_ceil(hidden * width).max(1);
        ctx.pool.run(work, rows, min_rows, &|(z, h_out, c_out): (Rows<'_>, Rows<'_>, Rows<'_>), range: Range<usize>| {
            let n = range.len();
            if n == 0 {
                return;
            }
            let h_in = &h_prev[range.start * hidden..range.end * hidden];
            let mut to = MatrixMut::row_major(z.data, n, width, width);
            let factors = Factors::of_panels(hidden, Left::Rows(h_in, hidden), weight);
            microkernel::multiply(isa, &mut to, [Some(factors), None], Ends { add: true, bias: None });
            let mut non_finite = 0u32;
            for row in 0..n {
                let z = &mut z.data[row * width..][..width];
                let c_in = &c_prev[(range.start + row) * hidden..][..hidden];
                let h_out = &mut h_out.data[row * hidden..][..hidden];
                let c_out = &mut c_out.data[row * hidden..][..hidden];
                if lengths.is_some_and(|l| self.t >= l[range.start + row]) {
                    z.fill(0.0);
                    h_out.fill(0.0);
                    c_out.fill(0.0);
                    continue;
                }
                match (bias_ih, bias_hh) {
                    (Some(a), Some(b)) => z.iter_mut().zip(a.iter().zip(b)).for_each(|(z, (a, b))| *z += a + b),
                    (Some(b), None) | (None, Some(b)) => z.iter_mut().zip(b).for_each(|(z, b)| *z += b),
                    (None, None) => {}
                }
                let flag = &mut non_finite;
                for_isa!(isa, gate_forward(z: &mut [f32], c_in: &[f32], h_out: &mut [f32], c_out: &mut [f32], flag: &mut u32));
            }
            if non_finite != 0 {
                raised.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        });
        if raised.into_inner() {
            flags.as_indices_mut()[FLAG_NON_FINITE] = 1;
        }
    }
}

/// `(read, write)` parts of one buffer that do not overlap.
fn two_parts(data: &mut [f32], from: usize, to: usize, len: usize) -> (&mut [f32], &mut [f32]) {
    if from < to {
        let (a, b) = data.split_at_mut(to);
        (&mut a[from..from + len], &mut b[..len])
    } else {
        let (a, b) = data.split_at_mut(from);
        (&mut b[..len], &mut a[to..to + len])
    }
}

/// One row: activates z in place, updates the state.
#[inline(always)]
pub(super) fn gate_forward(z: &mut [f32], c_prev: &[f32], h: &mut [f32], c: &mut [f32], non_finite: &mut u32) {
    let mut bad = 0u32;
    for (((z, c_prev), h), c) in z
        .chunks_exact_mut(PANEL)
        .zip(c_prev.chunks_exact(PANEL_UNITS))
        .zip(h.chunks_exact_mut(PANEL_UNITS))
        .zip(c.chunks_exact_mut(PANEL_UNITS))
    {
        for v in z.iter() {
            bad |= u32::from(v.to_bits() & 0x7f80_0000 == 0x7f80_0000);
        }
        let (zi, rest) = z.split_at_mut(PANEL_UNITS);
        let (zf, rest) = rest.split_at_mut(PANEL_UNITS);
        let (zg, zo) = rest.split_at_mut(PANEL_UNITS);
        for u in 0..PANEL_UNITS {
            let (i, f, o) = (activations::sigmoid(zi[u]), activations::sigmoid(zf[u]), activations::sigmoid(zo[u]));
            let g = activations::tanh(zg[u]);
            let next = f * c_prev[u] + i * g;
            (zi[u], zf[u], zg[u], zo[u], c[u]) = (i, f, g, o, next);
            h[u] = o * activations::tanh(next);
        }
    }
    *non_finite |= bad;
}

/// One step backward: dh = output gradient + dz of the step after times W_hh, then the gates' derivatives; gates become dz.
///
/// `carry` `[2, B, H]` holds the gradient of the final h, then dc on its way from step to step. A row takes the former at the last step it has in
/// this sweep and leaves zero there; a row that ended before this sweep leaves it for the next one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct LstmStepBackward {
    pub n_rows: u32,
    pub hidden: u32,
    pub weight_hh: u32,
    /// Offset of this step's `[B, 4H]` in `gates`.
    pub gates: u32,
    /// Offset of the dz that the step after left in `gates`; unused where `last` is 1.
    pub dz_after: u32,
    /// Offsets of `[B, H]` in `c`: the state before and after this step.
    pub c_prev: u32,
    pub c: u32,
    /// Offset of this step's `[B, H]` in `dh_out`, or [`NONE`].
    pub dh_out: u32,
    /// Offset of `[2, B, H]` in `carry`.
    pub carry: u32,
    pub t: u32,
    /// 1: the first step of this sweep, whose gradient from later steps is in `carry`.
    pub last: u32,
    pub use_lengths: u32,
}

const BACKWARD_BINDINGS: &[Binding] =
    &[read("params"), read_write("gates"), read("c"), read("dh_out"), read_write("carry"), read("lengths")];

impl Kernel for LstmStepBackward {
    kernel_basics!("lstm_step_backward", BACKWARD_BINDINGS);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "lstm_step_backward";
        let (rows, hidden) = (self.n_rows as usize, self.hidden as usize);
        multiple_of(NAME, "hidden", self.hidden, PANEL_UNITS)?;
        loop_trips(NAME, "4 x hidden", self.hidden * GATES as u32)?;
        at_least(NAME, "params", lens[0], self.weight_hh as usize + hidden * hidden * GATES)?;
        for offset in [self.weight_hh, self.gates, self.c_prev, self.c, self.carry] {
            multiple_of(NAME, "an offset", offset, 4)?;
        }
        at_least(NAME, "gates", lens[1], self.gates as usize + rows * hidden * GATES)?;
        if self.last == 0 {
            multiple_of(NAME, "an offset", self.dz_after, 4)?;
            at_least(NAME, "gates", lens[1], self.dz_after as usize + rows * hidden * GATES)?;
        }
        at_least(NAME, "c", lens[2], self.c.max(self.c_prev) as usize + rows * hidden)?;
        if self.dh_out != NONE {
            multiple_of(NAME, "an offset", self.dh_out, 4)?;
            at_least(NAME, "dh_out", lens[3], self.dh_out as usize + rows * hidden)?;
        }
        at_least(NAME, "carry", lens[4], self.carry as usize + 2 * rows * hidden)?;
        if self.use_lengths == 1 {
            at_least(NAME, "lengths", lens[5], rows)?;
        }
        Ok(())
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &BACKWARD, overrides: &[], grid: step_grid(self.n_rows, self.hidden) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [params, gates, c, dh_out, carry, lengths] = operands else { unreachable!("six operands") };
        let (rows, hidden) = (self.n_rows as usize, self.hidden as usize);
        let width = hidden * GATES;
        let weight = &params.as_slice()[self.weight_hh as usize..][..hidden * width];
        let lengths = (self.use_lengths == 1).then(|| lengths.as_indices());
        let c_prev = &c.as_slice()[self.c_prev as usize..][..rows * hidden];
        let c = &c.as_slice()[self.c as usize..][..rows * hidden];
        let dh_out = (self.dh_out != NONE).then(|| &dh_out.as_slice()[self.dh_out as usize..][..rows * hidden]);
        let (gates, dz_after): (&mut [f32], &[f32]) = if self.last == 1 {
            (&mut gates.as_mut_slice()[self.gates as usize..][..rows * width], &[])
        } else {
            let (after, here) = two_parts(gates.as_mut_slice(), self.dz_after as usize, self.gates as usize, rows * width);
            (here, after)
        };
        let (dh_last, dc) = carry.as_mut_slice()[self.carry as usize..][..2 * rows * hidden].split_at_mut(rows * hidden);
        let isa = ctx.isa;
        let (packed, dh) = ctx.scratch.take(microkernel::packed_len(isa, width, hidden) + rows * hidden).split_at_mut(if self.last == 1 {
            0
        } else {
            microkernel::packed_len(isa, width, hidden)
        });
        if self.last == 0 {
            microkernel::pack(isa, Stored::panels(weight, hidden).transposed(), 0..width, 0..hidden, packed);
        }
        let packed = &*packed;
        let state = |data| Rows { data, width: hidden };
        let work = (Rows { data: gates, width }, state(dc), (state(dh_last), state(dh)));
        let min_rows = (1usize << 17).div_ceil(hidden * width).max(1);
        ctx.pool.run(work, rows, min_rows, &|(gates, dc, (dh_last, dh)): (Rows<'_>, Rows<'_>, (Rows<'_>, Rows<'_>)),
                                             range: Range<usize>| {
            let n = range.len();
            if n == 0 {
                return;
            }
            if self.last == 0 {
                let mut to = MatrixMut::row_major(dh.data, n, hidden, hidden);
                let dz = &dz_after[range.start * width..range.end * width];
                let factors = Factors::packed(isa, width, Left::Rows(dz, width), packed);
                microkernel::multiply(isa, &mut to, [Some(factors), None], Ends::default());
            }
            for row in 0..n {
                let b = range.start + row;
                let gates = &mut gates.data[row * width..][..width];
                let dh = &mut dh.data[row * hidden..][..hidden];
                let dc = &mut dc.data[row * hidden..][..hidden];
                let dh_last = &mut dh_last.data[row * hidden..][..hidden];
                let of_row = b * hidden..(b + 1) * hidden;
                let length = lengths.map_or(u32::MAX, |lengths| lengths[b]);
                if self.t >= length {
                    gates.fill(0.0);
                    continue;
                }
                if self.last == 1 || self.t + 1 == length {
                    dh.copy_from_slice(dh_last);
                    dh_last.fill(0.0);
                }
                if let Some(dh_out) = dh_out {
                    dh.iter_mut().zip(&dh_out[of_row.clone()]).for_each(|(d, o)| *d += o);
                }
                let (dh, c_prev, c) = (&*dh, &c_prev[of_row.clone()], &c[of_row]);
                for_isa!(isa, gate_backward(gates: &mut [f32], dh: &[f32], dc: &mut [f32], c_prev: &[f32], c: &[f32]));
            }
        });
    }
}

/// One row: gates become dz, dc moves one step back.
#[inline(always)]
pub(super) fn gate_backward(gates: &mut [f32], dh: &[f32], dc: &mut [f32], c_prev: &[f32], c: &[f32]) {
    for (p, z) in gates.chunks_exact_mut(PANEL).enumerate() {
        let units = p * PANEL_UNITS..(p + 1) * PANEL_UNITS;
        let (dh, dc, c_prev, c) = (&dh[units.clone()], &mut dc[units.clone()], &c_prev[units.clone()], &c[units]);
        let (zi, rest) = z.split_at_mut(PANEL_UNITS);
        let (zf, rest) = rest.split_at_mut(PANEL_UNITS);
        let (zg, zo) = rest.split_at_mut(PANEL_UNITS);
        for u in 0..PANEL_UNITS {
            let (i, f, g, o) = (zi[u], zf[u], zg[u], zo[u]);
            let tanh_c = activations::tanh(c[u]);
            let d = dc[u] + dh[u] * o * (1.0 - tanh_c * tanh_c);
            zi[u] = d * g * i * (1.0 - i);
            zf[u] = d * c_prev[u] * f * (1.0 - f);
            zg[u] = d * i * (1.0 - g * g);
            zo[u] = dh[u] * tanh_c * o * (1.0 - o);
            dc[u] = d * f;
        }
    }
}

/// A layer's tensors, or their gradients: the bucket that each lies in, as one span, and its offset there.
#[derive(Clone, Copy, Debug)]
pub struct LaneTensors {
    pub weight_ih: (Span, u32),
    pub weight_hh: (Span, u32),
    /// `bias_ih` and `bias_hh`, which lie in one bucket.
    pub biases: Option<(Span, u32, u32)>,
}

/// What a backward sweep needs beside the lane.
#[derive(Clone, Debug)]
pub struct LaneGradients {
    /// Gradient of the outputs `[T, B, H]` and its offset in the span; none where only the final state matters.
    pub dh_out: Option<(Span, u32)>,
    /// `[2, B, H]`: gradients of the final h and c come in, of the initial ones go out.
    pub carry: Span,
    /// Where the gradients of the tensors go.
    pub tensors: LaneTensors,
    /// Whether they are added to what is there.
    pub accumulate: bool,
    /// Where the gradient of the input `[T, B, K]` goes, if it is wanted.
    pub dx: Option<Span>,
}

/// One layer in one direction over a range of time.
#[derive(Clone, Debug)]
pub struct Lane {
    /// K: inputs, padded.
    pub inputs: u32,
    /// H, padded.
    pub hidden: u32,
    /// Runs from the end of the range to its start.
    pub reverse: bool,
    pub tensors: LaneTensors,
    /// Input `[T, B, K]` and its offset in the span.
    pub x: (Span, u32),
    /// `[T, B, 4H]`.
    pub gates: Span,
    /// `[T + 1, B, H]`; the caller has put the initial state in its place.
    pub h: Span,
    pub c: Span,
    /// Steps `t0..t1`.
    pub range: Range<u32>,
    /// Valid steps of each row `[B]`.
    pub lengths: Option<Span>,
    pub backward: Option<LaneGradients>,
}

/// A sweep: independent lanes, all forward or all backward in the sense of gradients.
#[derive(Clone, Debug)]
pub struct SweepArgs<'a> {
    /// B.
    pub n_rows: u32,
    pub lanes: &'a [Lane],
    /// Raised by non-finite pre-activations.
    pub flags: Span,
    /// Gradients (needs each lane's `backward`) instead of values.
    pub gradients: bool,
}

/// What runs one kernel of a plan: a backend's launch.
pub type Launch<'l> = &'l mut dyn FnMut(&dyn Kernel, &[Span]) -> Result<()>;

/// The default plan: the input product of all steps as one GEMM, a fused kernel a step, weight gradients as GEMMs over all steps.
/// Launches: forward 1 + T a lane; backward T + 5 and more where T x B is above 65,535.
///
/// # Errors
/// The launch's, or a lane that contradicts itself.
pub fn sweep_plan(args: &SweepArgs<'_>, launch: Launch<'_>) -> Result<()> {
    for lane in args.lanes {
        ensure!(
            !(lane.reverse && lane.lengths.is_some()),
            "lengths with a reverse lane are not supported: reverse each sequence in the data instead"
        );
        if args.gradients { backward_plan(args, lane, launch)? } else { forward_plan(args, lane, launch)? }
    }
    Ok(())
}

fn forward_plan(args: &SweepArgs<'_>, lane: &Lane, launch: Launch<'_>) -> Result<()> {
    let (rows, state, width) = (args.n_rows, args.n_rows * lane.hidden, lane.hidden * GATES as u32);
    let first = lane.range.start;
    let input = Gemm {
        m: (lane.range.end - first) * rows,
        n: width,
        k: lane.inputs,
        trans_a: 0,
        trans_b: 0,
        accumulate: 0,
        use_bias: 0,
        bias_offset: 0,
        a: Matrix::row_major((lane.x.1 + first * rows * lane.inputs) as usize, lane.inputs as usize),
        b: Matrix::panels(lane.tensors.weight_ih.1 as usize, lane.inputs as usize),
        c: Matrix::row_major((first * rows * width) as usize, width as usize),
    };
    let (weight_ih, weight_hh, biases) = (lane.tensors.weight_ih.0, lane.tensors.weight_hh, lane.tensors.biases);
    launch(&input, &[lane.x.0, weight_ih, weight_ih, lane.gates])?;
    let mut step = |t: u32| {
        let (before, after) = if lane.reverse { (t + 1, t) } else { (t, t + 1) };
        let kernel = LstmStepForward {
            n_rows: rows,
            hidden: lane.hidden,
            weight_hh: weight_hh.1,
            bias_ih: biases.map_or(NONE, |(_, ih, _)| ih),
            bias_hh: biases.map_or(NONE, |(_, _, hh)| hh),
            gates: t * rows * width,
            h_prev: before * state,
            h: after * state,
            c_prev: before * state,
            c: after * state,
            t,
            use_lengths: u32::from(lane.lengths.is_some()),
        };
        let bias = biases.map_or(weight_hh.0, |(span, ..)| span);
        launch(&kernel, &[weight_hh.0, lane.gates, lane.h, lane.c, lane.lengths.unwrap_or(weight_hh.0), args.flags, bias])
    };
    if lane.reverse { lane.range.clone().rev().try_for_each(&mut step) } else { lane.range.clone().try_for_each(&mut step) }
}

fn backward_plan(args: &SweepArgs<'_>, lane: &Lane, launch: Launch<'_>) -> Result<()> {
    let Some(grads) = &lane.backward else { anyhow::bail!("a lane without places for its gradients cannot be swept backward") };
    let (rows, state, width) = (args.n_rows, args.n_rows * lane.hidden, lane.hidden * GATES as u32);
    let dz_at = |t: u32| t * rows * width;
    let (weight_ih, weight_hh) = (lane.tensors.weight_ih, lane.tensors.weight_hh);
    let mut step = |t: u32| {
        let (before, after, later) = if lane.reverse { (t + 1, t, t.wrapping_sub(1)) } else { (t, t + 1, t + 1) };
        let last = if lane.reverse { t == lane.range.start } else { t + 1 == lane.range.end };
        let kernel = LstmStepBackward {
            n_rows: rows,
            hidden: lane.hidden,
            weight_hh: weight_hh.1,
            gates: dz_at(t),
            dz_after: if last { 0 } else { dz_at(later) },
            c_prev: before * state,
            c: after * state,
            dh_out: grads.dh_out.map_or(NONE, |(_, offset)| offset + t * state),
            carry: 0,
            t,
            last: u32::from(last),
            use_lengths: u32::from(lane.lengths.is_some()),
        };
        let dh_out = grads.dh_out.map_or(lane.c, |(span, _)| span);
        launch(&kernel, &[weight_hh.0, lane.gates, lane.c, dh_out, grads.carry, lane.lengths.unwrap_or(weight_hh.0)])
    };
    if lane.reverse {
        lane.range.clone().try_for_each(&mut step)?
    } else {
        lane.range.clone().rev().try_for_each(&mut step)?
    }
    let back_through = |weight: u32, inputs: u32, m: u32, dz: u32, to: u32, accumulate: u32| Gemm {
        m,
        n: inputs,
        k: width,
        trans_a: 0,
        trans_b: 1,
        accumulate,
        use_bias: 0,
        bias_offset: 0,
        a: Matrix::row_major(dz as usize, width as usize),
        b: Matrix::panels(weight as usize, inputs as usize),
        c: Matrix::row_major(to as usize, inputs as usize),
    };
    // The initial h's gradient; the initial c's lies in `carry` already. Added, since rows that ended before this range have theirs there, and the others zero.
    let first = if lane.reverse { lane.range.end - 1 } else { lane.range.start };
    launch(&back_through(weight_hh.1, lane.hidden, rows, dz_at(first), 0, 1), &[lane.gates, weight_hh.0, weight_hh.0, grads.carry])?;
    let steps = lane.range.end - lane.range.start;
    if let Some(dx) = grads.dx {
        let to = lane.range.start * rows * lane.inputs;
        let through = back_through(weight_ih.1, lane.inputs, steps * rows, dz_at(lane.range.start), to, 0);
        launch(&through, &[lane.gates, weight_ih.0, weight_ih.0, dx])?;
    }
    weight_gradients(args, lane, launch)
}

/// The last part of a backward plan: gradients of weights and biases from x, h and dz of all steps.
///
/// # Errors
/// The launch's.
pub(super) fn weight_gradients(args: &SweepArgs<'_>, lane: &Lane, launch: Launch<'_>) -> Result<()> {
    let Some(grads) = &lane.backward else { anyhow::bail!("a lane without places for its gradients cannot be swept backward") };
    let (rows, state, width) = (args.n_rows, args.n_rows * lane.hidden, lane.hidden * GATES as u32);
    // Sums over T x B in pieces that one invocation's loop can run; a piece may end within a step.
    let (begin, end) = (lane.range.start * rows, lane.range.end * rows);
    for row in (begin..end).step_by(MAX_LOOP_TRIPS as usize / 2) {
        let k = (end - row).min(MAX_LOOP_TRIPS / 2);
        let accumulate = u32::from(grads.accumulate || row > begin);
        let weight = |a: u32, inputs: u32, to: u32| Gemm {
            m: inputs,
            n: width,
            k,
            trans_a: 1,
            trans_b: 0,
            accumulate,
            use_bias: 0,
            bias_offset: 0,
            a: Matrix::row_major(a as usize, inputs as usize),
            b: Matrix::row_major((row * width) as usize, width as usize),
            c: Matrix::panels(to as usize, inputs as usize),
        };
        let (to_ih, to_hh) = (grads.tensors.weight_ih, grads.tensors.weight_hh);
        launch(&weight(lane.x.1 + row * lane.inputs, lane.inputs, to_ih.1), &[lane.x.0, lane.gates, lane.gates, to_ih.0])?;
        let h_before = row * lane.hidden + u32::from(lane.reverse) * state;
        launch(&weight(h_before, lane.hidden, to_hh.1), &[lane.h, lane.gates, lane.gates, to_hh.0])?;
        if let Some((span, out, second_out)) = grads.tensors.biases {
            let sums = ColumnSums { n_rows: k, n_cols: width, row_stride: width, offset: row * width, out, second_out, accumulate };
            launch(&sums, &[lane.gates, span])?;
        }
    }
    Ok(())
}

const SUM_REASON: &str = "sums of up to 80 products of numbers below 1, then functions with errors of a few ulp";

/// The catalogue's line for the step forward.
pub const FORWARD_ENTRY: Entry = Entry {
    name: "lstm_step_forward",
    tolerance: Tolerance { absolute: 3e-6, relative: 1e-5, reason: SUM_REASON },
    cases: || {
        ODD.iter()
            .enumerate()
            .map(|(i, &b)| forward_case(b, ODD[(i + 1) % 5], i % 2 == 0))
            .chain([forward_case(70_001, 1, false)])
            .collect()
    },
    bench_cases: || vec![forward_case(64, 64, false), forward_case(50, 256, false), forward_case(64, 1024, false)],
    shaders: &[&FORWARD],
};

/// The catalogue's line for the step backward.
pub const BACKWARD_ENTRY: Entry = Entry {
    name: "lstm_step_backward",
    tolerance: Tolerance { absolute: 1e-5, relative: 1e-5, reason: SUM_REASON },
    cases: || {
        ODD.iter()
            .enumerate()
            .map(|(i, &b)| backward_case(b, ODD[(i + 1) % 5], i % 2 == 0, i % 3 == 0))
            .chain([backward_case(70_001, 1, false, false)])
            .collect()
    },
    bench_cases: || vec![backward_case(64, 64, false, false), backward_case(50, 256, false, false), backward_case(64, 1024, false, false)],
    shaders: &[&BACKWARD],
};

fn forward_case(n_rows: u32, hidden: u32, with_lengths: bool) -> Case {
    let h = pad_units(hidden as usize) as u32;
    let (state, width) = ((n_rows * h) as usize, h * 4);
    let kernel = LstmStepForward {
        n_rows,
        hidden: h,
        weight_hh: 0,
        bias_ih: 4,
        bias_hh: if with_lengths { 4 + width } else { NONE },
        gates: 4,
        h_prev: 0,
        h: state as u32,
        c_prev: state as u32,
        c: 0,
        t: 2,
        use_lengths: u32::from(with_lengths),
    };
    let random = Fill::Uniform { low: -1.0, high: 1.0 };
    Case {
        label: format!("B{n_rows} H{h} lengths {with_lengths}"),
        operands: vec![
            operand((h * width) as usize, Fill::Uniform { low: -0.3, high: 0.3 }),
            operand(4 + n_rows as usize * width as usize, random.clone()),
            operand(2 * state, random.clone()),
            operand(2 * state, random),
            operand(n_rows as usize, Fill::Indices { below: 5 }),
            operand(1, Fill::Zeros),
            operand((4 + 2 * width) as usize, Fill::Uniform { low: -0.3, high: 0.3 }),
        ],
        flop: 2 * u64::from(n_rows) * u64::from(h) * u64::from(width),
        kernel: Box::new(kernel),
    }
}

fn backward_case(n_rows: u32, hidden: u32, with_lengths: bool, last: bool) -> Case {
    let h = pad_units(hidden as usize) as u32;
    let (state, width) = ((n_rows * h) as usize, h * 4);
    let gates = (n_rows * width) as usize;
    let kernel = LstmStepBackward {
        n_rows,
        hidden: h,
        weight_hh: 0,
        gates: 0,
        dz_after: gates as u32,
        c_prev: 0,
        c: state as u32,
        dh_out: if last { NONE } else { 4 },
        carry: 0,
        t: 2,
        last: u32::from(last),
        use_lengths: u32::from(with_lengths),
    };
    let random = Fill::Uniform { low: -1.0, high: 1.0 };
    Case {
        label: format!("B{n_rows} H{h} lengths {with_lengths} last {last}"),
        operands: vec![
            operand((h * width) as usize, Fill::Uniform { low: -0.3, high: 0.3 }),
            operand(2 * gates, Fill::Uniform { low: 0.0, high: 1.0 }),
            operand(2 * state, random.clone()),
            operand(4 + state, random.clone()),
            operand(2 * state, random),
            operand(n_rows as usize, Fill::Indices { below: 5 }),
        ],
        flop: 2 * u64::from(n_rows) * u64::from(h) * u64::from(width),
        kernel: Box::new(kernel),
    }
}
