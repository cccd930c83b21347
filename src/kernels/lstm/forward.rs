//! One step of the sweep forward.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use bytemuck::{Pod, Zeroable};

use super::rows::{CellRow, apply_mask, cell_forward, gate_forward, hand_up, settle};
use super::{
    CELL_FRAGMENTS, Cell, FLAG_NON_FINITE, NONE, PEEPHOLES, SUM_REASON, case_rows, cells, parts, step_grid, step_rows, two_parts, variant,
};
use crate::for_isa;
use crate::kernels::microkernel::{self, Ends, Factors, Left, MatrixMut};
use crate::kernels::{
    AdapterClass, Binding, Case, Dispatch, Entry, Fill, Kernel, ODD, Operand, Shader, ShapeError, Tolerance, at_least, kernel_basics,
    loop_trips, multiple_of, operand, read, read_write,
};
use crate::pool::{CpuContext, Rows};
use crate::shape::{GATES, PANEL_UNITS, pad_units};

/// The shader of [`LstmStepForward`].
pub static FORWARD: Shader =
    Shader { name: "lstm_step_forward", source: include_str!("../../../shaders/lstm_step_forward.wgsl"), fragments: CELL_FRAGMENTS };

/// One step forward: adds the recurrent product and the biases to z, applies the gates, writes h and c.
/// Rows that have ended (t >= length) get gates of zero and keep h and c.
///
/// With a projection (`m` is not [`NONE`]) h is left to [`super::LstmProject`]: o tanh(c) goes to `c` at `m`, zero where a row has ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct LstmStepForward {
    pub cell: Cell,
    /// B.
    pub n_rows: u32,
    /// H, padded.
    pub hidden: u32,
    /// R: floats of h, padded; H without a projection.
    pub width: u32,
    /// Offset of `weight_hh` in `params`.
    pub weight_hh: u32,
    /// Offsets of the biases in `bias`, or [`NONE`].
    pub bias_ih: u32,
    pub bias_hh: u32,
    /// Offset of this step's `[B, 4H]` in `gates`.
    pub gates: u32,
    /// Offsets of `[B, R]` in `h`.
    pub h_prev: u32,
    pub h: u32,
    /// Offsets in `h` of the masked copies of both, [`NONE`] without recurrent dropout: the product reads the one, the step writes the other.
    pub masked_prev: u32,
    pub masked: u32,
    /// Offset in `h` of what the layer hands up from this step `[B, R]`, [`NONE`] where that is h.
    pub output: u32,
    /// Offset in `input` of what a residual layer adds to it `[B, R]`, or [`NONE`].
    pub input: u32,
    /// Offsets of `[B, H]` in `c`.
    pub c_prev: u32,
    pub c: u32,
    pub m: u32,
    pub t: u32,
    /// 1: the first B words of `rows` are the numbers of valid steps.
    pub use_lengths: u32,
    /// 1: no step of its own, only the masked copy of the state at `h_prev` is written to `masked`; H stands for R then.
    pub initial: u32,
}

const FORWARD_BINDINGS: &[Binding] = &[
    read("params"),
    read_write("gates"),
    read_write("h"),
    read_write("c"),
    read("rows"),
    read_write("flags"),
    read("bias"),
    read("input"),
];

impl LstmStepForward {
    /// The only thing that happens at the initial state: recurrent dropout masks it.
    fn mask_initial(&self, h: &mut [f32], streams: &[u32]) {
        let (rows, hidden) = (self.n_rows as usize, self.hidden as usize);
        let (h, masked) = two_parts(h, self.h_prev as usize, self.masked as usize, rows * hidden);
        for ((h, masked), stream) in h.chunks_exact(hidden).zip(masked.chunks_exact_mut(hidden)).zip(streams) {
            apply_mask(&self.cell, *stream, h, masked);
        }
    }
}

impl Kernel for LstmStepForward {
    kernel_basics!("lstm_step_forward", FORWARD_BINDINGS);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "lstm_step_forward";
        let (rows, hidden, width) = (self.n_rows as usize, self.hidden as usize, self.width as usize);
        step_rows(NAME, self.n_rows)?;
        multiple_of(NAME, "hidden", self.hidden, PANEL_UNITS)?;
        multiple_of(NAME, "width", self.width, PANEL_UNITS)?;
        loop_trips(NAME, "width", self.width)?;
        self.cell.check(NAME, (lens[6], lens[4]), rows, hidden)?;
        if self.cell.is_masked() {
            let copies = match (self.initial, self.m) {
                (1, _) => [self.masked; 2],
                (_, NONE) => [self.masked_prev, self.masked],
                _ => [self.masked_prev; 2],
            };
            for offset in copies {
                multiple_of(NAME, "an offset", offset, 4)?;
                at_least(NAME, "h", lens[2], offset as usize + rows * width)?;
            }
        }
        at_least(NAME, "h", lens[2], self.h_prev as usize + rows * width)?;
        if self.initial == 1 {
            return Ok(());
        }
        for offset in [self.weight_hh, self.gates, self.h_prev, self.c_prev, self.c] {
            multiple_of(NAME, "an offset", offset, 4)?;
        }
        at_least(NAME, "params", lens[0], self.weight_hh as usize + width * hidden * GATES)?;
        for bias in [self.bias_ih, self.bias_hh].into_iter().filter(|&b| b != NONE) {
            multiple_of(NAME, "an offset", bias, 4)?;
            at_least(NAME, "bias", lens[6], bias as usize + hidden * GATES)?;
        }
        at_least(NAME, "gates", lens[1], self.gates as usize + rows * hidden * GATES)?;
        at_least(NAME, "c", lens[3], self.c.max(self.c_prev) as usize + rows * hidden)?;
        let (out, len, offset) = if self.m == NONE { ("h", lens[2], self.h) } else { ("c", lens[3], self.m) };
        multiple_of(NAME, "an offset", offset, 4)?;
        at_least(NAME, out, len, offset as usize + rows * hidden)?;
        super::check_output(NAME, lens[2], self.output, lens[7], self.input, rows * hidden)?;
        if self.use_lengths == 1 {
            at_least(NAME, "rows", lens[4], rows)?;
        }
        at_least(NAME, "flags", lens[5], 1)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        let is_plain = self.cell.is_plain() && self.m == NONE && self.output == NONE;
        Dispatch { shader: &FORWARD, overrides: variant(is_plain), grid: step_grid(self.n_rows, self.hidden) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [params, gates, h, c, row_words, flags, bias, input] = operands else { unreachable!("eight operands") };
        let (rows, hidden, h_width) = (self.n_rows as usize, self.hidden as usize, self.width as usize);
        let width = hidden * GATES;
        let lengths = (self.use_lengths == 1).then(|| &row_words.as_indices()[..rows]);
        let streams = self.cell.is_random().then(|| &row_words.as_indices()[self.cell.streams as usize..][..rows]);
        if self.initial == 1 {
            self.mask_initial(h.as_mut_slice(), streams.unwrap_or(&[]));
            return;
        }
        let (is_masked, projects) = (self.cell.is_masked(), self.m != NONE);
        // Parts that do not exist are empty.
        let state = |at: u32, width: usize| if at == NONE { (0, 0) } else { (at as usize, rows * width) };
        let own = |at: u32| state(if projects { NONE } else { at }, h_width);
        let mask_of = |at: u32| state(if is_masked { at } else { NONE }, h_width);
        let h_places = [
            state(self.h_prev, h_width),
            own(self.h),
            mask_of(self.masked_prev),
            mask_of(if projects { NONE } else { self.masked }),
            state(self.output, h_width),
        ];
        let [h_prev, h_next, masked_prev, masked, output] = parts(h.as_mut_slice(), h_places);
        let input = input.as_slice();
        let (h_prev, masked_prev) = (&*h_prev, if is_masked { &*masked_prev } else { &*h_prev });
        let [c_prev, c_next, m] = parts(c.as_mut_slice(), [state(self.c_prev, hidden), state(self.c, hidden), state(self.m, hidden)]);
        let c_prev = &*c_prev;
        let gates = &mut gates.as_mut_slice()[self.gates as usize..][..rows * width];
        let weight = &params.as_slice()[self.weight_hh as usize..][..h_width * width];
        let at = |offset: u32, len: usize| (offset != NONE).then(|| &bias.as_slice()[offset as usize..][..len]);
        let (bias_ih, bias_hh) = (at(self.bias_ih, width), at(self.bias_hh, width));
        let cell = CellRow { cell: &self.cell, peephole: at(self.cell.peephole, PEEPHOLES * hidden), norm: None, t: self.t };
        let is_plain = self.cell.is_plain();
        let raised = AtomicBool::new(false);
        let isa = ctx.isa;
        let rows_of = |data, width| Rows { data, width };
        // Whichever of h and m takes o tanh(c).
        let out = if projects { m } else { h_next };
        let (masked_width, output_width) = (masked.len() / rows.max(1), output.len() / rows.max(1));
        let beside = (rows_of(masked, masked_width), rows_of(output, output_width));
        let work = (rows_of(gates, width), (rows_of(out, hidden), beside), rows_of(c_next, hidden));
        let min_rows = (1usize << 17).div_ceil(h_width * width).max(1);
        type Work<'a> = (Rows<'a>, (Rows<'a>, (Rows<'a>, Rows<'a>)), Rows<'a>);
        ctx.pool.run(work, rows, min_rows, &|(z, (out, (masked, output)), c_out): Work<'_>, range: Range<usize>| {
            let n = range.len();
            if n == 0 {
                return;
            }
            let h_in = &masked_prev[range.start * h_width..range.end * h_width];
            let mut to = MatrixMut::row_major(z.data, n, width, width);
            let factors = Factors::of_panels(h_width, Left::Rows(h_in, h_width), weight);
            microkernel::multiply(isa, &mut to, [Some(factors), None], Ends { add: true, bias: None });
            let mut non_finite = 0u32;
            for row in 0..n {
                let b = range.start + row;
                let z = &mut z.data[row * width..][..width];
                let c_in = &c_prev[b * hidden..][..hidden];
                let h_in = &h_prev[b * h_width..][..h_width];
                let out = &mut out.data[row * hidden..][..hidden];
                let c_out = &mut c_out.data[row * hidden..][..hidden];
                let masked = &mut masked.data[row * masked_width..][..masked_width];
                let output = &mut output.data[row * output_width..][..output_width];
                if lengths.is_some_and(|l| self.t >= l[b]) {
                    z.fill(0.0);
                    c_out.copy_from_slice(c_in);
                    if projects {
                        out.fill(0.0);
                    } else {
                        out.copy_from_slice(h_in);
                        masked.copy_from_slice(&masked_prev[b * h_width..][..masked_width]);
                        output.fill(0.0);
                    }
                    continue;
                }
                match (bias_ih, bias_hh) {
                    (Some(a), Some(b)) => z.iter_mut().zip(a.iter().zip(b)).for_each(|(z, (a, b))| *z += a + b),
                    (Some(b), None) | (None, Some(b)) => z.iter_mut().zip(b).for_each(|(z, b)| *z += b),
                    (None, None) => {}
                }
                let flag = &mut non_finite;
                let (cell, stream) = (&cell, streams.map_or(0, |streams| streams[b]));
                if is_plain {
                    for_isa!(isa, fused gate_forward(z: &mut [f32], c_in: &[f32], out: &mut [f32], c_out: &mut [f32], flag: &mut u32));
                } else {
                    for_isa!(isa, fused cell_forward(cell: &CellRow<'_>, stream: u32, z: &mut [f32], c_in: &[f32], out: &mut [f32],
                                               c_out: &mut [f32], flag: &mut u32));
                }
                if projects {
                    continue;
                }
                for_isa!(isa, settle(cell: &CellRow<'_>, stream: u32, h_in: &[f32], out: &mut [f32], masked: &mut [f32]));
                if output_width > 0 {
                    let (h, input) = (&*out, super::row_of(input, self.input, b, hidden));
                    for_isa!(isa, hand_up(cell: &CellRow<'_>, stream: u32, h: &[f32], input: &[f32], output: &mut [f32]));
                }
            }
            if non_finite != 0 {
                raised.store(true, Ordering::Relaxed);
            }
        });
        if raised.into_inner() {
            flags.as_indices_mut()[FLAG_NON_FINITE] = 1;
        }
    }
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
        let projected = [("plain", Cell::PLAIN), cells(33)[7]].map(|cell| projected_case(17, 33, 5, cell));
        odd.chain(projected)
            .chain([forward_case(70_001, 1, false, ("plain", Cell::PLAIN), false), forward_case(33, 17, false, masked, true)])
            .collect()
    },
    bench_cases: || [(64, 64), (50, 256), (64, 1024)].map(|(b, h)| forward_case(b, h, false, ("plain", Cell::PLAIN), false)).into(),
    sized: |s| vec![forward_case(s.n_rows, s.padded_hidden(), false, ("plain", Cell::PLAIN), false)],
    shaders: &[&FORWARD],
};
fn forward_case(n_rows: u32, hidden: u32, with_lengths: bool, (name, cell): (&str, Cell), initial: bool) -> Case {
    let h = pad_units(hidden as usize) as u32;
    let (state, width) = ((n_rows * h) as usize, h * 4);
    let state_words = state as u32;
    let copies = if cell.is_masked() { 4 } else { 2 };
    let drops = cell.drops() && !initial;
    let peephole = if cell.peephole == NONE { 0 } else { PEEPHOLES as u32 * h };
    let kernel = LstmStepForward {
        n_rows,
        hidden: h,
        width: h,
        weight_hh: 0,
        bias_ih: 4 + peephole,
        bias_hh: if with_lengths { 4 + peephole + width } else { NONE },
        gates: 4,
        h_prev: 0,
        h: state_words,
        masked_prev: if cell.is_masked() { 3 * state_words } else { NONE },
        masked: if cell.is_masked() { 2 * state_words } else { NONE },
        output: if drops { copies * state_words } else { NONE },
        input: if drops && !with_lengths { 8 } else { NONE },
        c_prev: state_words,
        c: 0,
        m: NONE,
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
            operand((copies as usize + 1) * state, random.clone()),
            operand(2 * state, random.clone()),
            case_rows(n_rows, &cell),
            operand(1, Fill::Zeros),
            operand((4 + peephole + 2 * width) as usize, Fill::Uniform { low: -0.3, high: 0.3 }),
            operand(8 + state, random),
        ],
        flop: 2 * u64::from(n_rows) * u64::from(h) * u64::from(width),
        kernel: Box::new(kernel),
    }
}

/// With a projection to `width` units: h is only read, m is written.
fn projected_case(n_rows: u32, hidden: u32, width: u32, (name, cell): (&str, Cell)) -> Case {
    let (h, r) = (pad_units(hidden as usize) as u32, pad_units(width as usize) as u32);
    let (state, peephole) = (n_rows * h, PEEPHOLES as u32 * h);
    let kernel = LstmStepForward {
        cell,
        n_rows,
        hidden: h,
        width: r,
        weight_hh: 4,
        bias_ih: NONE,
        bias_hh: 4 + peephole,
        gates: 0,
        h_prev: 0,
        h: NONE,
        masked_prev: n_rows * r,
        masked: NONE,
        output: NONE,
        input: NONE,
        c_prev: 0,
        c: 2 * state,
        m: state,
        t: 3,
        use_lengths: 1,
        initial: 0,
    };
    let random = Fill::Uniform { low: -1.0, high: 1.0 };
    Case {
        label: format!("B{n_rows} H{h} projected to {r} {name}"),
        operands: vec![
            operand((4 + 4 * r * h) as usize, Fill::Uniform { low: -0.3, high: 0.3 }),
            operand((n_rows * 4 * h) as usize, random.clone()),
            operand((2 * n_rows * r) as usize, random.clone()),
            operand((3 * state) as usize, random),
            case_rows(n_rows, &cell),
            operand(1, Fill::Zeros),
            operand((4 + peephole + 4 * h) as usize, Fill::Uniform { low: -0.3, high: 0.3 }),
            operand(0, Fill::Zeros),
        ],
        flop: 2 * u64::from(n_rows) * u64::from(r) * u64::from(4 * h),
        kernel: Box::new(kernel),
    }
}
