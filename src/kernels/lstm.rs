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
//! [`Cell`] adds what papers have added since, each where it stands in the equations (r: the old h, c': the candidate, hats: before zoneout):
//! ```text
//! recurrent dropout   r = m * h_{t-1}, with one m for all steps of a sequence     (Gal and Ghahramani 2016)
//! peepholes           z_i += p_i c_{t-1}   z_f += p_f c_{t-1}   z_o += p_o c'     (Gers, Schraudolph and Schmidhuber 2002)
//! coupled gates       f = 1 - i                                                  (Greff et al. 2017)
//! cell clip           c' = clip(f * c_{t-1} + i * g), with no gradient where clipped
//! zoneout             c_t = d_c c_{t-1} + (1 - d_c) c'    h_t = d_h h_{t-1} + (1 - d_h) o tanh(c')     (Krueger et al. 2017)
//! gradient clip       dz = clip(dz)                                              (Graves 2013)
//! ```
//! Without training, zoneout's d is its probability. A row that has ended keeps its state, so that the last state is that of each row's own end.
//!
//! The order of operations: z starts as the input product, the recurrent product is added, then `b_ih + b_hh`.
//!
//! Layouts, H padded to a multiple of 16: weights `[H / 16][K][64]`, gates `[T, B, 4H]` with column `unit / 16 * 64 + gate * 16 + unit % 16`,
//! h and c `[T + 1, B, H]`. A forward lane reads state t and writes state t + 1 at step t, so that state 0 is the initial and state T the final one;
//! a reverse lane reads t + 1 and writes t. The gates buffer holds z, then the activated gates (a tap on them may read it after the
//! forward sweep), then dz: each step overwrites what the one before left.

use std::ops::Range;

use anyhow::{Result, ensure};
use bytemuck::{Pod, Zeroable};

use super::dropout::PHILOX;
use super::gemm::{Gemm, Matrix};
use super::microkernel::{self, Ends, Factors, Left, MatrixMut, Stored};
use super::reduce::ColumnSums;
use super::{
    AdapterClass, Binding, Case, Dispatch, Entry, Fill, Fragment, Kernel, MAX_LOOP_TRIPS, MAX_WORKGROUPS, ODD, Operand, Shader, ShapeError,
    Span, Tolerance, activations, at_least, kernel_basics, loop_trips, multiple_of, operand, read, read_write,
};
use crate::for_isa;
use crate::pool::{CpuContext, Rows};
use crate::rng::{Purpose, philox, tag};
use crate::shape::{GATES, PANEL, PANEL_UNITS, pad_units};

/// An offset that says: there is no such tensor.
pub const NONE: u32 = u32::MAX;

/// Sigmoid and tanh that keep NaN, and the test for non-finite bits.
pub static ACTIVATIONS: Fragment = Fragment { name: "activations", source: include_str!("../../shaders/shared/activations.wgsl") };
/// Where a unit's gates lie.
pub static GATE_INDEX: Fragment = Fragment { name: "gates", source: include_str!("../../shaders/shared/gates.wgsl") };

/// What makes a cell differ, and its draws; [`PHILOX`] stands before it.
pub static CELL: Fragment = Fragment { name: "cell", source: include_str!("../../shaders/shared/cell.wgsl") };

/// The shader of [`LstmStepForward`].
pub static FORWARD: Shader = Shader {
    name: "lstm_step_forward",
    source: include_str!("../../shaders/lstm_step_forward.wgsl"),
    fragments: &[&ACTIVATIONS, &GATE_INDEX, &PHILOX, &CELL],
};
/// The shader of [`LstmStepBackward`].
pub static BACKWARD: Shader = Shader {
    name: "lstm_step_backward",
    source: include_str!("../../shaders/lstm_step_backward.wgsl"),
    fragments: &[&ACTIVATIONS, &GATE_INDEX, &PHILOX, &CELL],
};

/// Batch rows that one workgroup of a step kernel covers; beside them it covers one panel of 16 units.
pub const STEP_ROWS: u32 = 32;

/// How a cell differs from the plain one; a part of both step kernels' parameters.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Cell {
    /// Offset in `bias` of the peephole weights `[3, H]` of i, f and o, or [`NONE`].
    pub peephole: u32,
    /// 1: f = 1 - i; z_f is unused and its gradient zero.
    pub coupled: u32,
    /// Largest absolute value of the cell state, 0 for any.
    pub cell_clip: f32,
    /// Largest absolute value of dz, 0 for any.
    pub grad_clip: f32,
    /// Probabilities in `0..1` that h and c keep their old values.
    pub zoneout_h: f32,
    pub zoneout_c: f32,
    /// 1: zoneout draws (training); 0: it takes the probabilities.
    pub draws: u32,
    /// Recurrent dropout: an entry of the mask is 0 where the random word is below `mask_threshold`, else `mask_scale`; a scale of 0: no mask.
    pub mask_threshold: u32,
    pub mask_scale: f32,
    /// The step's key, for draws.
    pub key0: u32,
    pub key1: u32,
    /// Which lane draws: twice the layer, and one more in reverse.
    pub lane: u32,
    /// Offset in `rows` of the rows' global stream numbers `[B]`; used by draws.
    pub streams: u32,
    /// A struct within a uniform takes whole vectors.
    pub unused0: u32,
    pub unused1: u32,
    pub unused2: u32,
}

impl Cell {
    /// The plain cell.
    pub const PLAIN: Self = Self {
        peephole: NONE,
        coupled: 0,
        cell_clip: 0.0,
        grad_clip: 0.0,
        zoneout_h: 0.0,
        zoneout_c: 0.0,
        draws: 0,
        mask_threshold: 0,
        mask_scale: 0.0,
        key0: 0,
        key1: 0,
        lane: 0,
        streams: 0,
        unused0: 0,
        unused1: 0,
        unused2: 0,
    };

    /// Whether nothing differs from the plain cell.
    pub fn is_plain(&self) -> bool {
        Self { key0: 0, key1: 0, lane: 0, streams: 0, draws: 0, ..*self } == Self::PLAIN
    }

    /// Whether h is masked on its way into the recurrent product.
    pub fn is_masked(&self) -> bool {
        self.mask_scale != 0.0
    }

    fn has_zoneout(&self) -> bool {
        self.zoneout_h > 0.0 || self.zoneout_c > 0.0
    }

    fn is_random(&self) -> bool {
        self.is_masked() || (self.has_zoneout() && self.draws == 1)
    }

    fn check(&self, kernel: &'static str, lens: (usize, usize), rows: usize, hidden: usize) -> Result<(), ShapeError> {
        if self.peephole != NONE {
            multiple_of(kernel, "an offset", self.peephole, 4)?;
            at_least(kernel, "bias", lens.0, self.peephole as usize + PEEPHOLES * hidden)?;
        }
        if self.is_random() { at_least(kernel, "rows", lens.1, self.streams as usize + rows) } else { Ok(()) }
    }

    fn words(&self, purpose: Purpose, stream: u32, t: u32, block: usize) -> [u32; 4] {
        philox([block as u32, t, stream, tag(purpose, self.lane)], [self.key0, self.key1])
    }

    /// The mask of recurrent dropout for units `4 * block ..`; the same at every step.
    fn mask(&self, stream: u32, block: usize) -> [f32; 4] {
        self.words(Purpose::RecurrentDropout, stream, 0, block).map(|word| if word >= self.mask_threshold { self.mask_scale } else { 0.0 })
    }

    /// How much of the old value a unit keeps: 0 or 1 where zoneout draws, else the probability.
    fn kept(&self, purpose: Purpose, p: f32, stream: u32, t: u32, panel: usize) -> [f32; PANEL_UNITS] {
        let mut kept = [p; PANEL_UNITS];
        if self.draws == 1 && p > 0.0 {
            let threshold = (p * 4_294_967_296.0) as u32;
            for (block, kept) in kept.chunks_exact_mut(4).enumerate() {
                let words = self.words(purpose, stream, t, panel * PANEL_UNITS / 4 + block);
                kept.iter_mut().zip(words).for_each(|(kept, word)| *kept = f32::from(u8::from(word < threshold)));
            }
        }
        kept
    }
}

/// Rows of peephole weights: of i, f and o.
pub const PEEPHOLES: usize = 3;

fn step_grid(n_rows: u32, hidden: u32) -> [u32; 3] {
    let blocks = n_rows.div_ceil(STEP_ROWS).max(1);
    let z = blocks.div_ceil(MAX_WORKGROUPS);
    [hidden / PANEL_UNITS as u32, blocks.div_ceil(z), z]
}

/// One step forward: adds the recurrent product and the biases to z, applies the gates, writes h and c.
/// Rows that have ended (t >= length) get gates of zero and keep h and c.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct LstmStepForward {
    pub cell: Cell,
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
    /// Offsets in `h` of the masked copies of both, [`NONE`] without recurrent dropout: the product reads the one, the step writes the other.
    pub masked_prev: u32,
    pub masked: u32,
    pub c_prev: u32,
    pub c: u32,
    pub t: u32,
    /// 1: the first B words of `rows` are the numbers of valid steps.
    pub use_lengths: u32,
    /// 1: no step of its own, only the masked copy of the state at `h_prev` is written to `masked`.
    pub initial: u32,
}

const FORWARD_BINDINGS: &[Binding] =
    &[read("params"), read_write("gates"), read_write("h"), read_write("c"), read("rows"), read_write("flags"), read("bias")];

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
        if self.cell.is_masked() {
            let needed = if self.initial == 1 { [self.masked; 2] } else { [self.masked_prev, self.masked] };
            for offset in needed {
                multiple_of(NAME, "an offset", offset, 4)?;
                at_least(NAME, "h", lens[2], offset as usize + rows * hidden)?;
            }
        }
        self.cell.check(NAME, (lens[6], lens[4]), rows, hidden)?;
        at_least(NAME, "c", lens[3], self.c.max(self.c_prev) as usize + rows * hidden)?;
        if self.use_lengths == 1 {
            at_least(NAME, "rows", lens[4], rows)?;
        }
        at_least(NAME, "flags", lens[5], 1)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &FORWARD, overrides: variant(&self.cell), grid: step_grid(self.n_rows, self.hidden) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [params, gates, h, c, row_words, flags, bias] = operands else { unreachable!("seven operands") };
        let (rows, hidden) = (self.n_rows as usize, self.hidden as usize);
        let (width, state) = (hidden * GATES, rows * hidden);
        let lengths = (self.use_lengths == 1).then(|| &row_words.as_indices()[..rows]);
        let streams = self.cell.is_random().then(|| &row_words.as_indices()[self.cell.streams as usize..][..rows]);
        let (c_prev, c_next) = two_parts(c.as_mut_slice(), self.c_prev as usize, self.c as usize, state);
        let h = h.as_mut_slice();
        if self.initial == 1 {
            let (h, masked) = two_parts(h, self.h_prev as usize, self.masked as usize, state);
            for (b, (h, masked)) in h.chunks_exact(hidden).zip(masked.chunks_exact_mut(hidden)).enumerate() {
                for (block, (h, masked)) in h.chunks_exact(4).zip(masked.chunks_exact_mut(4)).enumerate() {
                    let mask = self.cell.mask(streams.map_or(0, |streams| streams[b]), block);
                    (0..4).for_each(|u| masked[u] = mask[u] * h[u]);
                }
            }
            return;
        }
        // Four parts of one buffer, in whatever order; without a mask the product reads the old h itself.
        let (h_prev, h_next, masked_prev, masked): (&[f32], &mut [f32], &[f32], &mut [f32]) = if self.cell.is_masked() {
            let offsets = [self.h_prev, self.h, self.masked_prev, self.masked].map(|at| at as usize);
            let [h_prev, h_next, masked_prev, masked] = parts(h, offsets, state);
            (h_prev, h_next, masked_prev, masked)
        } else {
            let (h_prev, h_next) = two_parts(h, self.h_prev as usize, self.h as usize, state);
            (h_prev, h_next, h_prev, &mut [])
        };
        let c_prev = &*c_prev;
        let gates = &mut gates.as_mut_slice()[self.gates as usize..][..rows * width];
        let weight = &params.as_slice()[self.weight_hh as usize..][..hidden * width];
        let at = |offset: u32, len: usize| (offset != NONE).then(|| &bias.as_slice()[offset as usize..][..len]);
        let (bias_ih, bias_hh) = (at(self.bias_ih, width), at(self.bias_hh, width));
        let cell = CellRow { cell: &self.cell, peephole: at(self.cell.peephole, PEEPHOLES * hidden), t: self.t };
        let is_plain = self.cell.is_plain();
        let raised = std::sync::atomic::AtomicBool::new(false);
        let isa = ctx.isa;
        let masked_width = if self.cell.is_masked() { hidden } else { 0 };
        let rows_of = |data, width| Rows { data, width };
        let work = (rows_of(gates, width), (rows_of(h_next, hidden), rows_of(masked, masked_width)), rows_of(c_next, hidden));
        let min_rows = (1usize << 17).div_ceil(hidden * width).max(1);
        ctx.pool.run(work, rows, min_rows, &|(z, (h_out, masked), c_out): (Rows<'_>, (Rows<'_>, Rows<'_>), Rows<'_>),
                                             range: Range<usize>| {
            let n = range.len();
            if n == 0 {
                return;
            }
            let h_in = &masked_prev[range.start * hidden..range.end * hidden];
            let mut to = MatrixMut::row_major(z.data, n, width, width);
            let factors = Factors::of_panels(hidden, Left::Rows(h_in, hidden), weight);
            microkernel::multiply(isa, &mut to, [Some(factors), None], Ends { add: true, bias: None });
            let mut non_finite = 0u32;
            for row in 0..n {
                let b = range.start + row;
                let z = &mut z.data[row * width..][..width];
                let (h_in, c_in) = (&h_prev[b * hidden..][..hidden], &c_prev[b * hidden..][..hidden]);
                let h_out = &mut h_out.data[row * hidden..][..hidden];
                let c_out = &mut c_out.data[row * hidden..][..hidden];
                let masked = &mut masked.data[row * masked_width..][..masked_width];
                if lengths.is_some_and(|l| self.t >= l[b]) {
                    z.fill(0.0);
                    h_out.copy_from_slice(h_in);
                    c_out.copy_from_slice(c_in);
                    if self.cell.is_masked() {
                        masked.copy_from_slice(&masked_prev[b * hidden..][..hidden]);
                    }
                    continue;
                }
                match (bias_ih, bias_hh) {
                    (Some(a), Some(b)) => z.iter_mut().zip(a.iter().zip(b)).for_each(|(z, (a, b))| *z += a + b),
                    (Some(b), None) | (None, Some(b)) => z.iter_mut().zip(b).for_each(|(z, b)| *z += b),
                    (None, None) => {}
                }
                let flag = &mut non_finite;
                if is_plain {
                    for_isa!(isa, gate_forward(z: &mut [f32], c_in: &[f32], h_out: &mut [f32], c_out: &mut [f32], flag: &mut u32));
                    continue;
                }
                let (cell, stream) = (&cell, streams.map_or(0, |streams| streams[b]));
                for_isa!(isa, cell_forward(cell: &CellRow<'_>, stream: u32, z: &mut [f32], h_in: &[f32], c_in: &[f32],
                                           h_out: &mut [f32], masked: &mut [f32], c_out: &mut [f32], flag: &mut u32));
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

/// The shader's variant: what the plain cell does not need is compiled in only where it is.
fn variant(cell: &Cell) -> &'static [(&'static str, f64)] {
    if cell.is_plain() { &[] } else { &[("OPTIONS", 1.0)] }
}

/// A cell with its weights at one step.
struct CellRow<'a> {
    cell: &'a Cell,
    /// `[3, H]`.
    peephole: Option<&'a [f32]>,
    t: u32,
}

impl CellRow<'_> {
    /// The peephole weights of one gate for a panel; zeros where there are none.
    fn peephole(&self, gate: usize, panel: usize, hidden: usize) -> [f32; PANEL_UNITS] {
        let mut weights = [0.0; PANEL_UNITS];
        if let Some(all) = self.peephole {
            weights.copy_from_slice(&all[gate * hidden + panel * PANEL_UNITS..][..PANEL_UNITS]);
        }
        weights
    }

    fn clip(&self) -> f32 {
        if self.cell.cell_clip > 0.0 { self.cell.cell_clip } else { f32::INFINITY }
    }
}

/// `v` within `-limit..=limit`; keeps NaN.
#[inline(always)]
fn clip(v: f32, limit: f32) -> f32 {
    if v > limit {
        limit
    } else if v < -limit {
        -limit
    } else {
        v
    }
}

/// As [`gate_forward`], for any cell; `masked` gets the masked h where there is a mask.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the operands of one row")]
fn cell_forward(
    row: &CellRow<'_>,
    stream: u32,
    z: &mut [f32],
    h_prev: &[f32],
    c_prev: &[f32],
    h: &mut [f32],
    masked: &mut [f32],
    c: &mut [f32],
    non_finite: &mut u32,
) {
    let (cell, hidden, limit) = (row.cell, h.len(), row.clip());
    let has_peephole = row.peephole.is_some();
    let mut bad = 0u32;
    for (p, z) in z.chunks_exact_mut(PANEL).enumerate() {
        let units = p * PANEL_UNITS..(p + 1) * PANEL_UNITS;
        let (h_prev, c_prev) = (&h_prev[units.clone()], &c_prev[units.clone()]);
        let (h, c) = (&mut h[units.clone()], &mut c[units.clone()]);
        for v in z.iter() {
            bad |= u32::from(v.to_bits() & 0x7f80_0000 == 0x7f80_0000);
        }
        let (zi, rest) = z.split_at_mut(PANEL_UNITS);
        let (zf, rest) = rest.split_at_mut(PANEL_UNITS);
        let (zg, zo) = rest.split_at_mut(PANEL_UNITS);
        let mut new = [0.0; PANEL_UNITS];
        if has_peephole {
            let (pi, pf) = (row.peephole(0, p, hidden), row.peephole(1, p, hidden));
            for u in 0..PANEL_UNITS {
                zi[u] += pi[u] * c_prev[u];
                zf[u] += pf[u] * c_prev[u];
            }
        }
        for u in 0..PANEL_UNITS {
            let i = activations::sigmoid(zi[u]);
            let f = if cell.coupled == 1 { 1.0 - i } else { activations::sigmoid(zf[u]) };
            let g = activations::tanh(zg[u]);
            (zi[u], zf[u], zg[u]) = (i, f, g);
            new[u] = clip(f * c_prev[u] + i * g, limit);
        }
        if has_peephole {
            let po = row.peephole(2, p, hidden);
            (0..PANEL_UNITS).for_each(|u| zo[u] += po[u] * new[u]);
        }
        for u in 0..PANEL_UNITS {
            let o = activations::sigmoid(zo[u]);
            zo[u] = o;
            h[u] = o * activations::tanh(new[u]);
            c[u] = new[u];
        }
        if cell.has_zoneout() {
            let keep_h = cell.kept(Purpose::ZoneoutH, cell.zoneout_h, stream, row.t, p);
            let keep_c = cell.kept(Purpose::ZoneoutC, cell.zoneout_c, stream, row.t, p);
            for u in 0..PANEL_UNITS {
                h[u] = keep_h[u] * h_prev[u] + (1.0 - keep_h[u]) * h[u];
                c[u] = keep_c[u] * c_prev[u] + (1.0 - keep_c[u]) * c[u];
            }
        }
        if cell.is_masked() {
            for (block, (to, h)) in masked[units].chunks_exact_mut(4).zip(h.chunks_exact(4)).enumerate() {
                let mask = cell.mask(stream, p * PANEL_UNITS / 4 + block);
                (0..4).for_each(|u| to[u] = mask[u] * h[u]);
            }
        }
    }
    *non_finite |= bad;
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

/// Four parts of one buffer that do not overlap, in whatever order they lie.
fn parts(data: &mut [f32], offsets: [usize; 4], len: usize) -> [&mut [f32]; 4] {
    data.get_disjoint_mut(offsets.map(|at| at..at + len)).expect("the plan lays states out apart")
}

/// One row of the plain cell: activates z in place, updates the state.
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
/// `carry` `[2, B, H]` holds the gradients of the state that were not handed on through W_hh: of the final h until its row's last step takes it, of the
/// old h under zoneout, of rows that have ended; and dc on its way from step to step. With peepholes `[B, 3, H]` behind it gather their gradients.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct LstmStepBackward {
    pub cell: Cell,
    pub n_rows: u32,
    pub hidden: u32,
    pub weight_hh: u32,
    /// Offset of this step's `[B, 4H]` in `gates`.
    pub gates: u32,
    /// Offset of the dz that the step after left in `gates`; unused where `last` is 1.
    pub dz_after: u32,
    /// Offset of `[B, H]` in `c`: the state before this step.
    pub c_prev: u32,
    /// Offset of this step's `[B, H]` in `dh_out`, or [`NONE`].
    pub dh_out: u32,
    /// Offset of `[2, B, H]` in `carry`.
    pub carry: u32,
    pub t: u32,
    /// 1: the first step of this sweep, which no dz comes before.
    pub last: u32,
    pub use_lengths: u32,
    /// 1: no step of its own, only what the one after hands to the initial h is added to `carry`.
    pub initial: u32,
}

const BACKWARD_BINDINGS: &[Binding] =
    &[read("params"), read_write("gates"), read("c"), read("dh_out"), read_write("carry"), read("rows"), read("bias")];

impl Kernel for LstmStepBackward {
    kernel_basics!("lstm_step_backward", BACKWARD_BINDINGS);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "lstm_step_backward";
        let (rows, hidden) = (self.n_rows as usize, self.hidden as usize);
        multiple_of(NAME, "hidden", self.hidden, PANEL_UNITS)?;
        loop_trips(NAME, "4 x hidden", self.hidden * GATES as u32)?;
        at_least(NAME, "params", lens[0], self.weight_hh as usize + hidden * hidden * GATES)?;
        for offset in [self.weight_hh, self.gates, self.c_prev, self.carry] {
            multiple_of(NAME, "an offset", offset, 4)?;
        }
        at_least(NAME, "gates", lens[1], self.gates as usize + rows * hidden * GATES)?;
        if self.last == 0 {
            multiple_of(NAME, "an offset", self.dz_after, 4)?;
            at_least(NAME, "gates", lens[1], self.dz_after as usize + rows * hidden * GATES)?;
        }
        at_least(NAME, "c", lens[2], self.c_prev as usize + rows * hidden)?;
        if self.dh_out != NONE {
            multiple_of(NAME, "an offset", self.dh_out, 4)?;
            at_least(NAME, "dh_out", lens[3], self.dh_out as usize + rows * hidden)?;
        }
        let sums = if self.cell.peephole == NONE { 0 } else { PEEPHOLES };
        at_least(NAME, "carry", lens[4], self.carry as usize + (2 + sums) * rows * hidden)?;
        if self.use_lengths == 1 {
            at_least(NAME, "rows", lens[5], rows)?;
        }
        self.cell.check(NAME, (lens[6], lens[5]), rows, hidden)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &BACKWARD, overrides: variant(&self.cell), grid: step_grid(self.n_rows, self.hidden) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [params, gates, c, dh_out, carry, row_words, bias] = operands else { unreachable!("seven operands") };
        let (rows, hidden) = (self.n_rows as usize, self.hidden as usize);
        let width = hidden * GATES;
        let weight = &params.as_slice()[self.weight_hh as usize..][..hidden * width];
        let lengths = (self.use_lengths == 1).then(|| &row_words.as_indices()[..rows]);
        let streams = self.cell.is_random().then(|| &row_words.as_indices()[self.cell.streams as usize..][..rows]);
        let c_prev = &c.as_slice()[self.c_prev as usize..][..rows * hidden];
        let dh_out = (self.dh_out != NONE).then(|| &dh_out.as_slice()[self.dh_out as usize..][..rows * hidden]);
        let peephole = (self.cell.peephole != NONE).then(|| &bias.as_slice()[self.cell.peephole as usize..][..PEEPHOLES * hidden]);
        let cell = CellRow { cell: &self.cell, peephole, t: self.t };
        let is_plain = self.cell.is_plain();
        let (gates, dz_after): (&mut [f32], &[f32]) = if self.last == 1 {
            (&mut gates.as_mut_slice()[self.gates as usize..][..rows * width], &[])
        } else if self.initial == 1 {
            (&mut [], &gates.as_slice()[self.dz_after as usize..][..rows * width])
        } else {
            let (after, here) = two_parts(gates.as_mut_slice(), self.dz_after as usize, self.gates as usize, rows * width);
            (here, after)
        };
        let sums_width = if self.cell.peephole == NONE { 0 } else { PEEPHOLES * hidden };
        let carry = &mut carry.as_mut_slice()[self.carry as usize..][..rows * (2 * hidden + sums_width)];
        let (carry_h, carry) = carry.split_at_mut(rows * hidden);
        let (dc, sums) = carry.split_at_mut(rows * hidden);
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
        let gates_width = if self.initial == 1 { 0 } else { width };
        let sums = Rows { data: sums, width: sums_width };
        let work = (Rows { data: gates, width: gates_width }, (state(dc), sums), (state(carry_h), state(dh)));
        let min_rows = (1usize << 17).div_ceil(hidden * width).max(1);
        ctx.pool.run(work, rows, min_rows, &|(gates, (dc, sums), (carry_h, dh)): (
            Rows<'_>,
            (Rows<'_>, Rows<'_>),
            (Rows<'_>, Rows<'_>),
        ),
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
            } else {
                dh.data.fill(0.0);
                sums.data.fill(0.0);
            }
            for row in 0..n {
                let b = range.start + row;
                let gates = &mut gates.data[row * gates_width..][..gates_width];
                let dh = &mut dh.data[row * hidden..][..hidden];
                let dc = &mut dc.data[row * hidden..][..hidden];
                let sums = &mut sums.data[row * sums_width..][..sums_width];
                let carry_h = &mut carry_h.data[row * hidden..][..hidden];
                let of_row = b * hidden..(b + 1) * hidden;
                let stream = streams.map_or(0, |streams| streams[b]);
                if self.cell.is_masked() && self.last == 0 {
                    for (block, dh) in dh.chunks_exact_mut(4).enumerate() {
                        let mask = self.cell.mask(stream, block);
                        (0..4).for_each(|u| dh[u] *= mask[u]);
                    }
                }
                let length = lengths.map_or(u32::MAX, |lengths| lengths[b]);
                if self.initial == 1 || self.t >= length {
                    gates.fill(0.0);
                    carry_h.iter_mut().zip(&*dh).for_each(|(carry, dh)| *carry += dh);
                    continue;
                }
                if self.last == 1 || self.t + 1 == length || self.cell.zoneout_h > 0.0 {
                    dh.iter_mut().zip(&*carry_h).for_each(|(dh, carry)| *dh += carry);
                    carry_h.fill(0.0);
                }
                if let Some(dh_out) = dh_out {
                    dh.iter_mut().zip(&dh_out[of_row.clone()]).for_each(|(d, o)| *d += o);
                }
                let (dh, c_prev) = (&*dh, &c_prev[of_row]);
                if is_plain {
                    for_isa!(isa, gate_backward(gates: &mut [f32], dh: &[f32], dc: &mut [f32], c_prev: &[f32]));
                    continue;
                }
                let cell = &cell;
                for_isa!(isa, cell_backward(cell: &CellRow<'_>, stream: u32, gates: &mut [f32], dh: &[f32], carry_h: &mut [f32],
                                            dc: &mut [f32], sums: &mut [f32], c_prev: &[f32]));
            }
        });
    }
}

/// As [`gate_backward`], for any cell; `carry_h` gets what zoneout hands to the old h, `sums` `[3, H]` the gradients of the peepholes.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the operands of one row")]
fn cell_backward(
    row: &CellRow<'_>,
    stream: u32,
    gates: &mut [f32],
    dh: &[f32],
    carry_h: &mut [f32],
    dc: &mut [f32],
    sums: &mut [f32],
    c_prev: &[f32],
) {
    let (cell, hidden, limit) = (row.cell, dh.len(), row.clip());
    let dz_limit = if cell.grad_clip > 0.0 { cell.grad_clip } else { f32::INFINITY };
    for (p, z) in gates.chunks_exact_mut(PANEL).enumerate() {
        let units = p * PANEL_UNITS..(p + 1) * PANEL_UNITS;
        let (dh, c_prev) = (&dh[units.clone()], &c_prev[units.clone()]);
        let (carry_h, dc) = (&mut carry_h[units.clone()], &mut dc[units]);
        let mut new = [0.0; PANEL_UNITS];
        let (zi, rest) = z.split_at_mut(PANEL_UNITS);
        let (zf, rest) = rest.split_at_mut(PANEL_UNITS);
        let (zg, zo) = rest.split_at_mut(PANEL_UNITS);
        let [pi, pf, po] = [0, 1, 2].map(|gate| row.peephole(gate, p, hidden));
        let keep_h = cell.kept(Purpose::ZoneoutH, cell.zoneout_h, stream, row.t, p);
        let keep_c = cell.kept(Purpose::ZoneoutC, cell.zoneout_c, stream, row.t, p);
        for u in 0..PANEL_UNITS {
            let (i, f, g, o) = (zi[u], zf[u], zg[u], zo[u]);
            let raw = f * c_prev[u] + i * g;
            new[u] = clip(raw, limit);
            let tanh_c = activations::tanh(new[u]);
            let d_hat = (1.0 - keep_h[u]) * dh[u];
            carry_h[u] += keep_h[u] * dh[u];
            let dz_o = clip(d_hat * tanh_c * o * (1.0 - o), dz_limit);
            let mut d = (1.0 - keep_c[u]) * dc[u] + d_hat * o * (1.0 - tanh_c * tanh_c) + dz_o * po[u];
            if raw > limit || raw < -limit {
                d = 0.0;
            }
            let (from_f, di) = if cell.coupled == 1 { (0.0, d * (g - c_prev[u])) } else { (d * c_prev[u] * f * (1.0 - f), d * g) };
            let dz_i = clip(di * i * (1.0 - i), dz_limit);
            let dz_f = clip(from_f, dz_limit);
            let dz_g = clip(d * i * (1.0 - g * g), dz_limit);
            (zi[u], zf[u], zg[u], zo[u]) = (dz_i, dz_f, dz_g, dz_o);
            dc[u] = keep_c[u] * dc[u] + d * f + dz_i * pi[u] + dz_f * pf[u];
        }
        if row.peephole.is_some() {
            for (gate, (dz, c)) in [(&*zi, c_prev), (&*zf, c_prev), (&*zo, &new)].into_iter().enumerate() {
                let sums = &mut sums[gate * hidden + p * PANEL_UNITS..][..PANEL_UNITS];
                (0..PANEL_UNITS).for_each(|u| sums[u] += dz[u] * c[u]);
            }
        }
    }
}

/// One row of the plain cell: gates become dz, dc moves one step back.
#[inline(always)]
pub(super) fn gate_backward(gates: &mut [f32], dh: &[f32], dc: &mut [f32], c_prev: &[f32]) {
    for (p, z) in gates.chunks_exact_mut(PANEL).enumerate() {
        let units = p * PANEL_UNITS..(p + 1) * PANEL_UNITS;
        let (dh, dc, c_prev) = (&dh[units.clone()], &mut dc[units.clone()], &c_prev[units]);
        let (zi, rest) = z.split_at_mut(PANEL_UNITS);
        let (zf, rest) = rest.split_at_mut(PANEL_UNITS);
        let (zg, zo) = rest.split_at_mut(PANEL_UNITS);
        for u in 0..PANEL_UNITS {
            let (i, f, g, o) = (zi[u], zf[u], zg[u], zo[u]);
            let tanh_c = activations::tanh(f * c_prev[u] + i * g);
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
    /// What is not a matrix; it lies in one bucket.
    pub vectors: Option<LaneVectors>,
}

/// A layer's vectors: the bucket and the offsets there, [`NONE`] for what does not exist.
#[derive(Clone, Copy, Debug)]
pub struct LaneVectors {
    pub span: Span,
    pub bias_ih: u32,
    pub bias_hh: u32,
    /// `[3, H]`.
    pub peephole: u32,
}

/// Columns of a lane's input, or of its gradient, that lie together: `[T, B, width]` and its offset in the span.
#[derive(Clone, Copy, Debug)]
pub struct LanePart {
    pub span: Span,
    pub offset: u32,
    /// Padded.
    pub width: u32,
}

/// What a backward sweep needs beside the lane.
#[derive(Clone, Debug)]
pub struct LaneGradients {
    /// Gradient of the outputs `[T, B, H]` and its offset in the span; none where only the final state matters.
    pub dh_out: Option<(Span, u32)>,
    /// `[2, B, H]`: gradients of the final h and c come in, of the initial ones go out. With peepholes their sums over time `[B, 3, H]` stand behind.
    pub carry: Span,
    /// Where the gradients of the tensors go.
    pub tensors: LaneTensors,
    /// Whether they are added to what is there.
    pub accumulate: bool,
    /// Where the gradients of the input's parts go, as far as they are wanted.
    pub dx: [Option<LanePart>; 2],
    /// Whether those are added to what is there, as the second lane that reads the same input does.
    pub accumulate_dx: bool,
}

/// One layer in one direction over a range of time.
#[derive(Clone, Debug)]
pub struct Lane {
    /// H, padded.
    pub hidden: u32,
    /// Runs from the end of the range to its start.
    pub reverse: bool,
    pub tensors: LaneTensors,
    /// The input's parts, side by side: both directions of the layer below.
    pub x: [Option<LanePart>; 2],
    /// `[T, B, 4H]`.
    pub gates: Span,
    /// `[T + 1, B, H]`; the caller has put the initial state in its place. With recurrent dropout the masked copy lies behind it, at [`Self::masked`].
    pub h: Span,
    /// Offset of the masked copy in `h`.
    pub masked: u32,
    pub c: Span,
    /// Steps `t0..t1`.
    pub range: Range<u32>,
    /// By row: valid steps `[B]` if `use_lengths`, and the stream numbers at [`Cell::streams`] if the cell draws.
    pub rows: Option<Span>,
    pub use_lengths: bool,
    pub cell: Cell,
    pub backward: Option<LaneGradients>,
}

impl Lane {
    /// K: columns of the input.
    fn inputs(&self) -> u32 {
        self.x.iter().flatten().map(|part| part.width).sum()
    }

    /// The parts and the column of K that each begins at.
    fn parts(parts: &[Option<LanePart>; 2]) -> impl Iterator<Item = (u32, LanePart)> {
        let second = parts[0].map_or(0, |part| part.width);
        parts.iter().zip([0, second]).filter_map(|(part, column)| part.map(|part| (column, part)))
    }
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

/// The default plan: the input product of all steps as one GEMM a part, a fused kernel a step, weight gradients as GEMMs over all steps.
/// Launches: forward 1 + T a lane; backward T + 5 and more where T x B is above 65,535. A second part of the input adds 1 and 2, recurrent dropout 1.
///
/// # Errors
/// The launch's, or a lane that contradicts itself.
pub fn sweep_plan(args: &SweepArgs<'_>, launch: Launch<'_>) -> Result<()> {
    for lane in args.lanes {
        ensure!(lane.rows.is_some() || !(lane.use_lengths || lane.cell.is_random()), "a lane with lengths or draws needs its rows");
        if args.gradients { backward_plan(args, lane, launch)? } else { forward_plan(args, lane, launch)? }
    }
    Ok(())
}

fn forward_plan(args: &SweepArgs<'_>, lane: &Lane, launch: Launch<'_>) -> Result<()> {
    let (rows, state, width) = (args.n_rows, args.n_rows * lane.hidden, lane.hidden * GATES as u32);
    let first = lane.range.start;
    let (weight_ih, weight_hh, vectors) = (lane.tensors.weight_ih, lane.tensors.weight_hh, lane.tensors.vectors);
    for (column, part) in Lane::parts(&lane.x) {
        let product = Gemm {
            m: (lane.range.end - first) * rows,
            n: width,
            k: part.width,
            trans_a: 0,
            trans_b: 0,
            accumulate: u32::from(column > 0),
            use_bias: 0,
            bias_offset: 0,
            a: Matrix::row_major((part.offset + first * rows * part.width) as usize, part.width as usize),
            b: Matrix::panels((weight_ih.1 + column * PANEL as u32) as usize, lane.inputs() as usize),
            c: Matrix::row_major((first * rows * width) as usize, width as usize),
        };
        launch(&product, &[part.span, weight_ih.0, weight_ih.0, lane.gates])?;
    }
    let mut step = |t: u32, initial: bool| {
        let (before, after) = if lane.reverse { (t + 1, t) } else { (t, t + 1) };
        let masked = |at: u32| if lane.cell.is_masked() { lane.masked + at * state } else { NONE };
        let kernel = LstmStepForward {
            n_rows: rows,
            hidden: lane.hidden,
            weight_hh: weight_hh.1,
            bias_ih: vectors.map_or(NONE, |v| v.bias_ih),
            bias_hh: vectors.map_or(NONE, |v| v.bias_hh),
            gates: t * rows * width,
            h_prev: before * state,
            h: after * state,
            masked_prev: masked(before),
            masked: masked(if initial { before } else { after }),
            c_prev: before * state,
            c: after * state,
            t,
            use_lengths: u32::from(lane.use_lengths),
            initial: u32::from(initial),
            cell: Cell { peephole: vectors.map_or(NONE, |v| v.peephole), ..lane.cell },
        };
        let bias = vectors.map_or(weight_hh.0, |v| v.span);
        launch(&kernel, &[weight_hh.0, lane.gates, lane.h, lane.c, lane.rows.unwrap_or(weight_hh.0), args.flags, bias])
    };
    let mut order = steps(lane, false);
    if let (true, Some(first)) = (lane.cell.is_masked(), order.clone().next()) {
        step(first, true)?;
    }
    order.try_for_each(|t| step(t, false))
}

/// A lane's steps in the order of a sweep: that of the state, or of its gradient.
fn steps(lane: &Lane, gradients: bool) -> impl Iterator<Item = u32> + Clone {
    let (start, end, falls) = (lane.range.start, lane.range.end, lane.reverse != gradients);
    (start..end).map(move |t| if falls { end - 1 - (t - start) } else { t })
}

fn backward_plan(args: &SweepArgs<'_>, lane: &Lane, launch: Launch<'_>) -> Result<()> {
    let Some(grads) = &lane.backward else { anyhow::bail!("a lane without places for its gradients cannot be swept backward") };
    let (rows, state, width) = (args.n_rows, args.n_rows * lane.hidden, lane.hidden * GATES as u32);
    let dz_at = |t: u32| t * rows * width;
    let (weight_ih, weight_hh, vectors) = (lane.tensors.weight_ih, lane.tensors.weight_hh, lane.tensors.vectors);
    let cell = Cell { peephole: vectors.map_or(NONE, |v| v.peephole), ..lane.cell };
    let mut step = |t: u32, last: bool, initial: bool| {
        let (before, later) = if lane.reverse { (t + 1, t.wrapping_sub(1)) } else { (t, t + 1) };
        let kernel = LstmStepBackward {
            n_rows: rows,
            hidden: lane.hidden,
            weight_hh: weight_hh.1,
            gates: dz_at(t),
            dz_after: if last { 0 } else { dz_at(if initial { t } else { later }) },
            c_prev: before * state,
            dh_out: grads.dh_out.map_or(NONE, |(_, offset)| offset + t * state),
            carry: 0,
            t,
            last: u32::from(last),
            use_lengths: u32::from(lane.use_lengths),
            initial: u32::from(initial),
            cell,
        };
        let dh_out = grads.dh_out.map_or(lane.c, |(span, _)| span);
        let bias = vectors.map_or(weight_hh.0, |v| v.span);
        launch(&kernel, &[weight_hh.0, lane.gates, lane.c, dh_out, grads.carry, lane.rows.unwrap_or(weight_hh.0), bias])
    };
    let mut first = None;
    for t in steps(lane, true) {
        step(t, first.is_none(), false)?;
        first = Some(t);
    }
    // The initial h's gradient; the initial c's lies in `carry` already.
    if let Some(t) = first {
        step(t, false, true)?;
    }
    let n_steps = lane.range.end - lane.range.start;
    for (column, to) in Lane::parts(&grads.dx) {
        let through = Gemm {
            m: n_steps * rows,
            n: to.width,
            k: width,
            trans_a: 0,
            trans_b: 1,
            accumulate: u32::from(grads.accumulate_dx),
            use_bias: 0,
            bias_offset: 0,
            a: Matrix::row_major(dz_at(lane.range.start) as usize, width as usize),
            b: Matrix::panels((weight_ih.1 + column * PANEL as u32) as usize, lane.inputs() as usize),
            c: Matrix::row_major((to.offset + lane.range.start * rows * to.width) as usize, to.width as usize),
        };
        launch(&through, &[lane.gates, weight_ih.0, weight_ih.0, to.span])?;
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
        let weight = |a: u32, inputs: u32, to: u32, columns: u32| Gemm {
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
            c: Matrix::panels(to as usize, columns as usize),
        };
        let (to_ih, to_hh) = (grads.tensors.weight_ih, grads.tensors.weight_hh);
        for (column, part) in Lane::parts(&lane.x) {
            let product = weight(part.offset + row * part.width, part.width, to_ih.1 + column * PANEL as u32, lane.inputs());
            launch(&product, &[part.span, lane.gates, lane.gates, to_ih.0])?;
        }
        // What the recurrent product read: the states before the steps.
        let h_before = if lane.cell.is_masked() { lane.masked } else { 0 } + row * lane.hidden + u32::from(lane.reverse) * state;
        launch(&weight(h_before, lane.hidden, to_hh.1, lane.hidden), &[lane.h, lane.gates, lane.gates, to_hh.0])?;
        let Some(to) = grads.tensors.vectors else { continue };
        if to.bias_ih != NONE || to.bias_hh != NONE {
            let (out, second_out) = if to.bias_ih == NONE { (to.bias_hh, NONE) } else { (to.bias_ih, to.bias_hh) };
            let sums = ColumnSums { n_rows: k, n_cols: width, row_stride: width, offset: row * width, out, second_out, accumulate };
            launch(&sums, &[lane.gates, to.span])?;
        }
    }
    if let Some(to) = grads.tensors.vectors.filter(|to| to.peephole != NONE) {
        let n_cols = PEEPHOLES as u32 * lane.hidden;
        let accumulate = u32::from(grads.accumulate);
        let sums =
            ColumnSums { n_rows: rows, n_cols, row_stride: n_cols, offset: 2 * state, out: to.peephole, second_out: NONE, accumulate };
        launch(&sums, &[grads.carry, to.span])?;
    }
    Ok(())
}

const SUM_REASON: &str = "sums of up to 80 products of numbers below 1, then functions with errors of a few ulp";

/// Cells of the catalogue's cases: the plain one, each option alone, and all of them.
fn cells(hidden: u32) -> [(&'static str, Cell); 8] {
    let mask = Cell { mask_threshold: 1 << 30, mask_scale: 4.0 / 3.0, ..Cell::PLAIN };
    let peephole = Cell { peephole: 4, ..Cell::PLAIN };
    let zoneout = Cell { zoneout_h: 0.3, zoneout_c: 0.6, draws: 1, ..Cell::PLAIN };
    let all = Cell { coupled: 0, cell_clip: 0.4, grad_clip: 0.1, ..zoneout };
    let cells = [
        ("plain", Cell::PLAIN),
        ("peephole", peephole),
        ("coupled", Cell { coupled: 1, ..Cell::PLAIN }),
        ("clips", Cell { cell_clip: 0.5, grad_clip: 0.05, ..Cell::PLAIN }),
        ("zoneout", zoneout),
        ("expected zoneout", Cell { draws: 0, ..zoneout }),
        ("mask", mask),
        ("all", Cell { peephole: 4, mask_threshold: mask.mask_threshold, mask_scale: mask.mask_scale, ..all }),
    ];
    // Stream numbers behind as many lengths as any odd case has rows.
    cells.map(|(name, cell)| (name, Cell { key0: 17, key1: 23, lane: 3 + hidden, streams: 65, ..cell }))
}

/// The catalogue's line for the step forward.
pub const FORWARD_ENTRY: Entry = Entry {
    name: "lstm_step_forward",
    tolerance: Tolerance { absolute: 3e-6, relative: 1e-5, reason: SUM_REASON },
    cases: || {
        let odd = ODD.iter().enumerate().flat_map(|(i, &b)| {
            let hidden = ODD[(i + 1) % 5];
            cells(hidden).into_iter().map(move |(name, cell)| forward_case(b, hidden, i % 2 == 0, (name, cell), false))
        });
        let masked = cells(17)[6];
        odd.chain([forward_case(70_001, 1, false, ("plain", Cell::PLAIN), false), forward_case(33, 17, false, masked, true)]).collect()
    },
    bench_cases: || [(64, 64), (50, 256), (64, 1024)].map(|(b, h)| forward_case(b, h, false, ("plain", Cell::PLAIN), false)).into(),
    shaders: &[&FORWARD],
};

/// The catalogue's line for the step backward.
pub const BACKWARD_ENTRY: Entry = Entry {
    name: "lstm_step_backward",
    tolerance: Tolerance { absolute: 1e-5, relative: 1e-5, reason: SUM_REASON },
    cases: || {
        let odd = ODD.iter().enumerate().flat_map(|(i, &b)| {
            let hidden = ODD[(i + 1) % 5];
            cells(hidden).into_iter().map(move |(name, cell)| backward_case(b, hidden, i % 2 == 0, i % 3 == 0, (name, cell), false))
        });
        let initial = [0, 7].map(|i| backward_case(33, 17, false, false, cells(17)[i], true));
        odd.chain([backward_case(70_001, 1, false, false, ("plain", Cell::PLAIN), false)]).chain(initial).collect()
    },
    bench_cases: || [(64, 64), (50, 256), (64, 1024)].map(|(b, h)| backward_case(b, h, false, false, ("plain", Cell::PLAIN), false)).into(),
    shaders: &[&BACKWARD],
};

fn forward_case(n_rows: u32, hidden: u32, with_lengths: bool, (name, cell): (&str, Cell), initial: bool) -> Case {
    let h = pad_units(hidden as usize) as u32;
    let (state, width) = ((n_rows * h) as usize, h * 4);
    let state_words = state as u32;
    let copies = if cell.is_masked() { 4 } else { 2 };
    let peephole = if cell.peephole == NONE { 0 } else { PEEPHOLES as u32 * h };
    let kernel = LstmStepForward {
        n_rows,
        hidden: h,
        weight_hh: 0,
        bias_ih: 4 + peephole,
        bias_hh: if with_lengths { 4 + peephole + width } else { NONE },
        gates: 4,
        h_prev: 0,
        h: state_words,
        masked_prev: if cell.is_masked() { 3 * state_words } else { NONE },
        masked: if cell.is_masked() { 2 * state_words } else { NONE },
        c_prev: state_words,
        c: 0,
        t: 2,
        use_lengths: u32::from(with_lengths),
        initial: u32::from(initial),
        cell,
    };
    let random = Fill::Uniform { low: -1.0, high: 1.0 };
    Case {
        label: format!("B{n_rows} H{h} {name} lengths {with_lengths} initial {initial}"),
        operands: vec![
            operand((h * width) as usize, Fill::Uniform { low: -0.3, high: 0.3 }),
            operand(4 + n_rows as usize * width as usize, random.clone()),
            operand(copies * state, random.clone()),
            operand(2 * state, random),
            case_rows(n_rows, &cell),
            operand(1, Fill::Zeros),
            operand((4 + peephole + 2 * width) as usize, Fill::Uniform { low: -0.3, high: 0.3 }),
        ],
        flop: 2 * u64::from(n_rows) * u64::from(h) * u64::from(width),
        kernel: Box::new(kernel),
    }
}

fn backward_case(n_rows: u32, hidden: u32, with_lengths: bool, last: bool, (name, cell): (&str, Cell), initial: bool) -> Case {
    let h = pad_units(hidden as usize) as u32;
    let (state, width) = ((n_rows * h) as usize, h * 4);
    let gates = (n_rows * width) as usize;
    let sums = if cell.peephole == NONE { 0 } else { PEEPHOLES };
    let kernel = LstmStepBackward {
        n_rows,
        hidden: h,
        weight_hh: 0,
        gates: 0,
        dz_after: gates as u32,
        c_prev: 4,
        dh_out: if last { NONE } else { 4 },
        carry: 0,
        t: 2,
        last: u32::from(last),
        use_lengths: u32::from(with_lengths),
        initial: u32::from(initial),
        cell,
    };
    let random = Fill::Uniform { low: -1.0, high: 1.0 };
    Case {
        label: format!("B{n_rows} H{h} {name} lengths {with_lengths} last {last} initial {initial}"),
        operands: vec![
            operand((h * width) as usize, Fill::Uniform { low: -0.3, high: 0.3 }),
            operand(2 * gates, Fill::Uniform { low: 0.0, high: 1.0 }),
            operand(4 + state, random.clone()),
            operand(4 + state, random.clone()),
            operand((2 + sums) * state, random),
            case_rows(n_rows, &cell),
            operand(4 + PEEPHOLES * h as usize, Fill::Uniform { low: -0.3, high: 0.3 }),
        ],
        flop: 2 * u64::from(n_rows) * u64::from(h) * u64::from(width),
        kernel: Box::new(kernel),
    }
}

/// Lengths of 0 to 4 and the stream numbers that the cell draws for.
fn case_rows(n_rows: u32, cell: &Cell) -> super::CaseOperand {
    let lengths = (0..n_rows.max(cell.streams)).map(|b| b * 7 % 5);
    let words: Vec<u32> = lengths.take(cell.streams.max(n_rows) as usize).chain((0..n_rows).map(|b| b * 1009 + 5)).collect();
    operand(words.len(), Fill::Words(words))
}
