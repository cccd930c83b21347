//! One step of the sweep backward.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::rows::{Arrival, CellRow, NormGradient, cell_backward, gate_backward, state_gradient, sums_width};
use super::{CELL_FRAGMENTS, Cell, NONE, PEEPHOLES, SUM_REASON, case_rows, cells, step_grid, step_rows, two_parts, variant};
use crate::for_isa;
use crate::kernels::microkernel::{self, Ends, Factors, Left, MatrixMut, Stored};
use crate::kernels::{
    AdapterClass, Binding, Case, Dispatch, Entry, Fill, Kernel, ODD, Operand, Shader, ShapeError, Tolerance, at_least, kernel_basics,
    loop_trips, multiple_of, operand, read, read_write,
};
use crate::pool::{CpuContext, Rows};
use crate::shape::{GATES, PANEL_UNITS, pad_units};

/// The shader of [`LstmStepBackward`].
pub static BACKWARD: Shader =
    Shader { name: "lstm_step_backward", source: include_str!("../../../shaders/lstm_step_backward.wgsl"), fragments: CELL_FRAGMENTS };

/// One step backward: dh = output gradient + dz of the step after times W_hh, then the gates' derivatives; gates become dz.
///
/// `carry` holds the gradients of the state that were not handed on through W_hh, `[B, R]`: of the final h until its row's last step takes it, of the
/// old h under zoneout, of rows that have ended; then dc `[B, H]` on its way from step to step; with peepholes `[B, 3, H]`, which gather their gradients.
///
/// With a projection [`super::LstmStateGradient`] has done the first half: `dh_out` holds the gradient of h, and dh is that times W_hr.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct LstmStepBackward {
    pub cell: Cell,
    pub n_rows: u32,
    pub hidden: u32,
    /// R: floats of h, padded; H without a projection.
    pub width: u32,
    /// Offset of `weight_hh` in `params`, with a projection of `weight_hr` `[R, H]`.
    pub weight: u32,
    /// Offset of this step's `[B, 4H]` in `gates`.
    pub gates: u32,
    /// Offset of the dz that the step after left in `gates`; unused where `last` is 1 and with a projection.
    pub dz_after: u32,
    /// Offset of `[B, H]` in `c`: the state before this step.
    pub c_prev: u32,
    /// Offset of this step's `[B, R]` in `dh_out`, or [`NONE`].
    pub dh_out: u32,
    /// Offset of `[B, R]` in `dx`, where a residual layer puts `dh_out` as it came, or [`NONE`].
    pub dx: u32,
    /// Offset in `carry`.
    pub carry: u32,
    pub t: u32,
    /// 1: the first step of this sweep, which no dz comes before.
    pub last: u32,
    pub use_lengths: u32,
    /// 1: no step of its own, only what the one after hands to the initial h is added to `carry`.
    pub initial: u32,
    pub projected: u32,
}

const BACKWARD_BINDINGS: &[Binding] =
    &[read("params"), read_write("gates"), read("c"), read("dh_out"), read_write("carry"), read("rows"), read("bias"), read_write("dx")];

impl Kernel for LstmStepBackward {
    kernel_basics!("lstm_step_backward", BACKWARD_BINDINGS);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "lstm_step_backward";
        let (rows, hidden, h_width) = (self.n_rows as usize, self.hidden as usize, self.width as usize);
        step_rows(NAME, self.n_rows)?;
        let is_projected = self.projected == 1;
        multiple_of(NAME, "hidden", self.hidden, PANEL_UNITS)?;
        multiple_of(NAME, "width", self.width, PANEL_UNITS)?;
        loop_trips(NAME, "4 x hidden", self.hidden * GATES as u32)?;
        at_least(NAME, "params", lens[0], self.weight as usize + hidden * h_width * if is_projected { 1 } else { GATES })?;
        for offset in [self.weight, self.gates, self.c_prev, self.carry] {
            multiple_of(NAME, "an offset", offset, 4)?;
        }
        at_least(NAME, "gates", lens[1], self.gates as usize + rows * hidden * GATES)?;
        if self.last == 0 && !is_projected {
            multiple_of(NAME, "an offset", self.dz_after, 4)?;
            at_least(NAME, "gates", lens[1], self.dz_after as usize + rows * hidden * GATES)?;
        }
        at_least(NAME, "c", lens[2], self.c_prev as usize + rows * hidden)?;
        if self.dh_out != NONE || is_projected {
            multiple_of(NAME, "an offset", self.dh_out, 4)?;
            at_least(NAME, "dh_out", lens[3], self.dh_out as usize + rows * h_width)?;
        }
        if self.dx != NONE {
            multiple_of(NAME, "an offset", self.dx, 4)?;
            at_least(NAME, "dx", lens[7], self.dx as usize + rows * h_width)?;
        }
        let sums = sums_width(hidden, self.cell.peephole != NONE, false);
        at_least(NAME, "carry", lens[4], self.carry as usize + rows * (h_width + hidden + sums))?;
        if self.use_lengths == 1 {
            at_least(NAME, "rows", lens[5], rows)?;
        }
        self.cell.check(NAME, (lens[6], lens[5]), rows, hidden)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        let is_plain = self.cell.is_plain() && !self.cell.drops() && self.projected == 0 && self.dx == NONE;
        Dispatch { shader: &BACKWARD, overrides: variant(is_plain), grid: step_grid(self.n_rows, self.hidden) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [params, gates, c, dh_out, carry, row_words, bias, dx] = operands else { unreachable!("eight operands") };
        let (rows, hidden, h_width, is_projected) = (self.n_rows as usize, self.hidden as usize, self.width as usize, self.projected == 1);
        let width = hidden * GATES;
        let lengths = (self.use_lengths == 1).then(|| &row_words.as_indices()[..rows]);
        let streams = self.cell.is_random().then(|| &row_words.as_indices()[self.cell.streams as usize..][..rows]);
        let c_prev = &c.as_slice()[self.c_prev as usize..][..rows * hidden];
        let dh_out = (self.dh_out != NONE).then(|| &dh_out.as_slice()[self.dh_out as usize..][..rows * h_width]);
        let peephole = (self.cell.peephole != NONE).then(|| &bias.as_slice()[self.cell.peephole as usize..][..PEEPHOLES * hidden]);
        let cell = CellRow { cell: &self.cell, peephole, norm: None, t: self.t };
        let is_plain = self.cell.is_plain() && !is_projected;
        // What comes through a product: dz of the step after, or the gradient of h.
        let (k, weight) = if is_projected { (h_width, hidden * h_width) } else { (width, h_width * width) };
        let weight = &params.as_slice()[self.weight as usize..][..weight];
        let (gates, from): (&mut [f32], &[f32]) = if is_projected {
            (&mut gates.as_mut_slice()[self.gates as usize..][..rows * width], dh_out.unwrap_or(&[]))
        } else if self.last == 1 {
            (&mut gates.as_mut_slice()[self.gates as usize..][..rows * width], &[])
        } else if self.initial == 1 {
            (&mut [], &gates.as_slice()[self.dz_after as usize..][..rows * width])
        } else {
            let (after, here) = two_parts(gates.as_mut_slice(), self.dz_after as usize, self.gates as usize, rows * width);
            (here, after)
        };
        let sums_width = sums_width(hidden, peephole.is_some(), false);
        let carry = &mut carry.as_mut_slice()[self.carry as usize..][..rows * (h_width + hidden + sums_width)];
        let (carry_h, carry) = carry.split_at_mut(rows * h_width);
        let (dc, sums) = carry.split_at_mut(rows * hidden);
        let dx_width = if self.dx == NONE { 0 } else { h_width };
        let dx = if self.dx == NONE { &mut [][..] } else { &mut dx.as_mut_slice()[self.dx as usize..][..rows * h_width] };
        let isa = ctx.isa;
        let has_product = is_projected || self.last == 0;
        let packed_len = if has_product { microkernel::packed_len(isa, k, hidden) } else { 0 };
        let (packed, dh) = ctx.scratch.take(packed_len + rows * hidden).split_at_mut(packed_len);
        if has_product {
            let b = if is_projected {
                Stored { data: weight, row_stride: hidden, panel: usize::MAX, panel_stride: 0, transposed: false }
            } else {
                Stored::panels(weight, hidden).transposed()
            };
            microkernel::pack(isa, b, 0..k, 0..hidden, packed);
        }
        let packed = &*packed;
        let of_rows = |data, width| Rows { data, width };
        let gates_width = if self.initial == 1 { 0 } else { width };
        let work = (
            of_rows(gates, gates_width),
            (of_rows(dc, hidden), of_rows(sums, sums_width)),
            ((of_rows(carry_h, h_width), of_rows(dx, dx_width)), of_rows(dh, hidden)),
        );
        let min_rows = (1usize << 17).div_ceil(hidden * k).max(1);
        type Work<'a> = (Rows<'a>, (Rows<'a>, Rows<'a>), ((Rows<'a>, Rows<'a>), Rows<'a>));
        ctx.pool.run(work, rows, min_rows, &|(gates, (dc, sums), ((carry_h, dx), dh)): Work<'_>, range: Range<usize>| {
            let n = range.len();
            if n == 0 {
                return;
            }
            if has_product {
                let mut to = MatrixMut::row_major(dh.data, n, hidden, hidden);
                let factors = Factors::packed(isa, k, Left::Rows(&from[range.start * k..range.end * k], k), packed);
                microkernel::multiply(isa, &mut to, [Some(factors), None], Ends::default());
            }
            if self.last == 1 {
                sums.data.fill(0.0);
            }
            for row in 0..n {
                let b = range.start + row;
                let gates = &mut gates.data[row * gates_width..][..gates_width];
                let dh = &mut dh.data[row * hidden..][..hidden];
                let dc = &mut dc.data[row * hidden..][..hidden];
                let sums = &mut sums.data[row * sums_width..][..sums_width];
                let (cell, stream) = (&cell, streams.map_or(0, |streams| streams[b]));
                let arrival =
                    Arrival::new(self.t as usize, lengths.map_or(u32::MAX, |lengths| lengths[b]), self.last == 1, self.initial == 1);
                if !is_projected {
                    let carry_h = &mut carry_h.data[row * hidden..][..hidden];
                    let out = dh_out.map_or(&[][..], |dh_out| &dh_out[b * hidden..][..hidden]);
                    for_isa!(isa, state_gradient(cell: &CellRow<'_>, stream: u32, arrival: Arrival, dh: &mut [f32], carry_h: &mut [f32],
                                                 out: &[f32]));
                    if dx_width > 0 {
                        super::pass_on(arrival.passes, out, &mut dx.data[row * dx_width..][..dx_width]);
                    }
                }
                if arrival.passes {
                    gates.fill(0.0);
                    continue;
                }
                let c_prev = &c_prev[b * hidden..][..hidden];
                if is_plain {
                    for_isa!(isa, fused gate_backward(gates: &mut [f32], dh: &[f32], dc: &mut [f32], c_prev: &[f32]));
                    continue;
                }
                let normed = None;
                for_isa!(isa, fused cell_backward(cell: &CellRow<'_>, stream: u32, gates: &mut [f32], dh: &mut [f32], dc: &mut [f32],
                                            sums: &mut [f32], c_prev: &[f32], normed: Option<NormGradient<'_>>));
            }
        });
    }
}

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
        let projected = [("plain", Cell::PLAIN), cells(33)[7]].map(|cell| projected_case(17, 33, 5, cell));
        odd.chain(projected).chain([backward_case(70_001, 1, false, false, ("plain", Cell::PLAIN), false)]).chain(initial).collect()
    },
    bench_cases: || [(64, 64), (50, 256), (64, 1024)].map(|(b, h)| backward_case(b, h, false, false, ("plain", Cell::PLAIN), false)).into(),
    sized: |s| vec![backward_case(s.n_rows, s.padded_hidden(), false, false, ("plain", Cell::PLAIN), false)],
    shaders: &[&BACKWARD],
};

fn backward_case(n_rows: u32, hidden: u32, with_lengths: bool, last: bool, (name, cell): (&str, Cell), initial: bool) -> Case {
    let h = pad_units(hidden as usize) as u32;
    let (state, width) = ((n_rows * h) as usize, h * 4);
    let gates = (n_rows * width) as usize;
    let sums = if cell.peephole == NONE { 0 } else { PEEPHOLES };
    let kernel = LstmStepBackward {
        n_rows,
        hidden: h,
        width: h,
        weight: 0,
        gates: 0,
        dz_after: gates as u32,
        c_prev: 4,
        dh_out: if last { NONE } else { 4 },
        dx: if cell.drops() && !last && !initial { 4 } else { NONE },
        carry: 0,
        t: 2,
        last: u32::from(last),
        use_lengths: u32::from(with_lengths),
        initial: u32::from(initial),
        projected: 0,
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
            operand(4 + state, Fill::Poison),
        ],
        flop: 2 * u64::from(n_rows) * u64::from(h) * u64::from(width),
        kernel: Box::new(kernel),
    }
}

/// With a projection to `width` units.
fn projected_case(n_rows: u32, hidden: u32, width: u32, (name, cell): (&str, Cell)) -> Case {
    let (h, r) = (pad_units(hidden as usize) as u32, pad_units(width as usize) as u32);
    let kernel = LstmStepBackward {
        cell,
        n_rows,
        hidden: h,
        width: r,
        weight: 4,
        gates: 4,
        dz_after: NONE,
        c_prev: 0,
        dh_out: 8,
        dx: NONE,
        carry: 0,
        t: 3,
        last: 0,
        use_lengths: 1,
        initial: 0,
        projected: 1,
    };
    let random = Fill::Uniform { low: -1.0, high: 1.0 };
    let sums = sums_width(h as usize, cell.peephole != NONE, false);
    Case {
        label: format!("B{n_rows} H{h} projected to {r} {name}"),
        operands: vec![
            operand((4 + r * h) as usize, Fill::Uniform { low: -0.3, high: 0.3 }),
            operand((4 + n_rows * 4 * h) as usize, Fill::Uniform { low: 0.0, high: 1.0 }),
            operand((n_rows * h) as usize, random.clone()),
            operand((8 + n_rows * r) as usize, random.clone()),
            operand(n_rows as usize * (r as usize + h as usize + sums), random),
            case_rows(n_rows, &cell),
            operand(4 + PEEPHOLES * h as usize, Fill::Uniform { low: -0.3, high: 0.3 }),
            operand(4, Fill::Poison),
        ],
        flop: 2 * u64::from(n_rows) * u64::from(h) * u64::from(r),
        kernel: Box::new(kernel),
    }
}
