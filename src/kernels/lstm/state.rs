//! What happens to h by itself: its projection forward, and the gradient that reaches it backward.
//! In the plain cell both are part of the step kernels; with a projection or layer normalisation sums over all hidden units stand between.

use bytemuck::{Pod, Zeroable};

use super::rows::{Arrival, CellRow, hand_up, settle, state_gradient};
use super::{CELL_FRAGMENTS, Cell, NONE, SUM_REASON, case_rows, cells, parts, step_grid, step_rows};
use crate::for_isa;
use crate::kernels::microkernel::{self, Ends, Factors, Left, MatrixMut, Stored};
use crate::kernels::{
    AdapterClass, Binding, Case, Dispatch, Entry, Fill, Kernel, Operand, Shader, ShapeError, Sizes, Tolerance, at_least, kernel_basics,
    loop_trips, multiple_of, operand, read, read_write,
};
use crate::pool::CpuContext;
use crate::shape::{GATES, PANEL_UNITS, pad_units};

/// The shader of [`LstmProject`].
pub static PROJECT: Shader =
    Shader { name: "lstm_project", source: include_str!("../../../shaders/lstm_project.wgsl"), fragments: CELL_FRAGMENTS };
/// The shader of [`LstmStateGradient`].
pub static STATE_GRADIENT: Shader =
    Shader { name: "lstm_state_gradient", source: include_str!("../../../shaders/lstm_state_gradient.wgsl"), fragments: CELL_FRAGMENTS };

/// The end of a projected step: `h = W_hr m`, zoneout, the masked copy. Rows that have ended keep h.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct LstmProject {
    pub cell: Cell,
    /// B.
    pub n_rows: u32,
    /// H, padded.
    pub hidden: u32,
    /// R: floats of h, padded.
    pub width: u32,
    /// Offset of `weight_hr` `[R, H]` in `params`.
    pub weight_hr: u32,
    /// Offset of `[B, H]` in `m`.
    pub m: u32,
    /// Offsets of `[B, R]` in `h`.
    pub h_prev: u32,
    pub h: u32,
    /// Offsets in `h` of the masked copies, [`NONE`] without recurrent dropout.
    pub masked_prev: u32,
    pub masked: u32,
    /// Offset in `h` of what the layer hands up from this step `[B, R]`, [`NONE`] where that is h.
    pub output: u32,
    /// Offset in `input` of what a residual layer adds to it `[B, R]`, or [`NONE`].
    pub input: u32,
    pub t: u32,
    pub use_lengths: u32,
}

const PROJECT_BINDINGS: &[Binding] = &[read("params"), read("m"), read_write("h"), read("rows"), read("input")];

impl Kernel for LstmProject {
    kernel_basics!("lstm_project", PROJECT_BINDINGS);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "lstm_project";
        let (rows, hidden, width) = (self.n_rows as usize, self.hidden as usize, self.width as usize);
        step_rows(NAME, self.n_rows)?;
        multiple_of(NAME, "hidden", self.hidden, PANEL_UNITS)?;
        multiple_of(NAME, "width", self.width, PANEL_UNITS)?;
        loop_trips(NAME, "hidden", self.hidden)?;
        let masked = if self.cell.is_masked() { [self.masked_prev, self.masked] } else { [self.h; 2] };
        for offset in [self.weight_hr, self.m, self.h_prev, self.h].into_iter().chain(masked) {
            multiple_of(NAME, "an offset", offset, 4)?;
        }
        at_least(NAME, "params", lens[0], self.weight_hr as usize + hidden * width)?;
        at_least(NAME, "m", lens[1], self.m as usize + rows * hidden)?;
        for offset in [self.h_prev, self.h].into_iter().chain(masked) {
            at_least(NAME, "h", lens[2], offset as usize + rows * width)?;
        }
        super::check_output(NAME, lens[2], self.output, lens[4], self.input, rows * width)?;
        if self.use_lengths == 1 {
            at_least(NAME, "rows", lens[3], rows)?;
        }
        self.cell.check(NAME, (usize::MAX, lens[3]), rows, hidden)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &PROJECT, overrides: &[], grid: step_grid(self.n_rows, self.width) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [params, m, h, row_words, input] = operands else { unreachable!("five operands") };
        let (rows, hidden, width, isa) = (self.n_rows as usize, self.hidden as usize, self.width as usize, ctx.isa);
        let lengths = (self.use_lengths == 1).then(|| &row_words.as_indices()[..rows]);
        let streams = self.cell.is_random().then(|| &row_words.as_indices()[self.cell.streams as usize..][..rows]);
        let place = |at: u32| if at == NONE { (0, 0) } else { (at as usize, rows * width) };
        let is_masked = self.cell.is_masked();
        let mask_of = |at: u32| place(if is_masked { at } else { NONE });
        let places = [place(self.h_prev), place(self.h), mask_of(self.masked_prev), mask_of(self.masked), place(self.output)];
        let [h_prev, h, masked_prev, masked, output] = parts(h.as_mut_slice(), places);
        let (masked_width, output_width) = (if is_masked { width } else { 0 }, output.len() / rows.max(1));
        let weight = Stored {
            data: &params.as_slice()[self.weight_hr as usize..][..hidden * width],
            row_stride: hidden,
            panel: usize::MAX,
            panel_stride: 0,
            transposed: true,
        };
        let packed = ctx.scratch.take(microkernel::packed_len(isa, hidden, width));
        microkernel::pack(isa, weight, 0..hidden, 0..width, packed);
        let factors = Factors::packed(isa, hidden, Left::Rows(&m.as_slice()[self.m as usize..][..rows * hidden], hidden), packed);
        microkernel::multiply(isa, &mut MatrixMut::row_major(h, rows, width, width), [Some(factors), None], Ends::default());
        let cell = CellRow { cell: &self.cell, peephole: None, norm: None, t: self.t };
        for b in 0..rows {
            let (cell, stream) = (&cell, streams.map_or(0, |streams| streams[b]));
            let (h, h_prev) = (&mut h[b * width..][..width], &h_prev[b * width..][..width]);
            let of_row = b * masked_width..(b + 1) * masked_width;
            let (masked, masked_prev) = (&mut masked[of_row.clone()], &masked_prev[of_row]);
            let output = &mut output[b * output_width..][..output_width];
            if lengths.is_some_and(|lengths| self.t >= lengths[b]) {
                h.copy_from_slice(h_prev);
                masked.copy_from_slice(masked_prev);
                output.fill(0.0);
                continue;
            }
            for_isa!(isa, settle(cell: &CellRow<'_>, stream: u32, h_prev: &[f32], h: &mut [f32], masked: &mut [f32]));
            if output_width > 0 {
                let (h, input) = (&*h, super::row_of(input.as_slice(), self.input, b, width));
                for_isa!(isa, hand_up(cell: &CellRow<'_>, stream: u32, h: &[f32], input: &[f32], output: &mut [f32]));
            }
        }
    }
}

/// The gradient of h at a step: what comes through the recurrent product of the step after, from the output, and out of the carry.
/// Zero in rows that have ended, whose share goes to the carry.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct LstmStateGradient {
    pub cell: Cell,
    /// B.
    pub n_rows: u32,
    /// H, padded.
    pub hidden: u32,
    /// R: floats of h, padded.
    pub width: u32,
    /// Offset of `weight_hh` in `params`.
    pub weight_hh: u32,
    /// Offset in `dz` of the gradient `[B, 4H]` of the recurrent product of the step after; unused where `last` is 1.
    pub dz_after: u32,
    /// Offset of this step's `[B, R]` in `dh_out`, or [`NONE`].
    pub dh_out: u32,
    /// Offset of `[B, R]` in `dx`, where a residual layer puts `dh_out` as it came, or [`NONE`].
    pub dx: u32,
    /// Offset of `[B, R]` in `dh`.
    pub dh: u32,
    /// Offset of `[B, R]` in `carry`, whose meaning is that of [`super::LstmStepBackward`].
    pub carry: u32,
    pub t: u32,
    /// 1: the first step of this sweep.
    pub last: u32,
    pub use_lengths: u32,
    /// 1: no step of its own, only what the one after hands to the initial h is added to `carry`.
    pub initial: u32,
}

const STATE_GRADIENT_BINDINGS: &[Binding] =
    &[read("params"), read("dz"), read("dh_out"), read_write("dh"), read_write("carry"), read("rows"), read_write("dx")];

impl Kernel for LstmStateGradient {
    kernel_basics!("lstm_state_gradient", STATE_GRADIENT_BINDINGS);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "lstm_state_gradient";
        let (rows, hidden, width) = (self.n_rows as usize, self.hidden as usize, self.width as usize);
        step_rows(NAME, self.n_rows)?;
        multiple_of(NAME, "hidden", self.hidden, PANEL_UNITS)?;
        multiple_of(NAME, "width", self.width, PANEL_UNITS)?;
        loop_trips(NAME, "4 x hidden", self.hidden * GATES as u32)?;
        for offset in [self.weight_hh, self.dh, self.carry] {
            multiple_of(NAME, "an offset", offset, 4)?;
        }
        at_least(NAME, "params", lens[0], self.weight_hh as usize + width * hidden * GATES)?;
        if self.last == 0 {
            multiple_of(NAME, "an offset", self.dz_after, 4)?;
            at_least(NAME, "dz", lens[1], self.dz_after as usize + rows * hidden * GATES)?;
        }
        if self.dh_out != NONE {
            multiple_of(NAME, "an offset", self.dh_out, 4)?;
            at_least(NAME, "dh_out", lens[2], self.dh_out as usize + rows * width)?;
        }
        if self.dx != NONE {
            multiple_of(NAME, "an offset", self.dx, 4)?;
            at_least(NAME, "dx", lens[6], self.dx as usize + rows * width)?;
        }
        at_least(NAME, "dh", lens[3], self.dh as usize + rows * width)?;
        at_least(NAME, "carry", lens[4], self.carry as usize + rows * width)?;
        if self.use_lengths == 1 {
            at_least(NAME, "rows", lens[5], rows)?;
        }
        self.cell.check(NAME, (usize::MAX, lens[5]), rows, hidden)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &STATE_GRADIENT, overrides: &[], grid: step_grid(self.n_rows, self.width) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [params, dz, dh_out, dh, carry, row_words, dx] = operands else { unreachable!("seven operands") };
        let (rows, hidden, width, isa) = (self.n_rows as usize, self.hidden as usize, self.width as usize, ctx.isa);
        let lengths = (self.use_lengths == 1).then(|| &row_words.as_indices()[..rows]);
        let streams = self.cell.is_random().then(|| &row_words.as_indices()[self.cell.streams as usize..][..rows]);
        let dh = &mut dh.as_mut_slice()[self.dh as usize..][..rows * width];
        let carry = &mut carry.as_mut_slice()[self.carry as usize..][..rows * width];
        let k = GATES * hidden;
        // The initial state's gradient is wanted in the carry alone: what is in dh stays.
        let (packed, product) =
            ctx.scratch.take(microkernel::packed_len(isa, k, width) + rows * width).split_at_mut(microkernel::packed_len(isa, k, width));
        if self.last == 0 {
            let weight = Stored::panels(&params.as_slice()[self.weight_hh as usize..][..width * k], width).transposed();
            microkernel::pack(isa, weight, 0..k, 0..width, packed);
            let dz = &dz.as_slice()[self.dz_after as usize..][..rows * k];
            let factors = Factors::packed(isa, k, Left::Rows(dz, k), packed);
            microkernel::multiply(isa, &mut MatrixMut::row_major(product, rows, width, width), [Some(factors), None], Ends::default());
        }
        let cell = CellRow { cell: &self.cell, peephole: None, norm: None, t: self.t };
        for (b, (product, carry)) in product.chunks_exact_mut(width).zip(carry.chunks_exact_mut(width)).enumerate() {
            let (cell, stream) = (&cell, streams.map_or(0, |streams| streams[b]));
            let arrival = Arrival::new(self.t as usize, lengths.map_or(u32::MAX, |lengths| lengths[b]), self.last == 1, self.initial == 1);
            let out = if self.dh_out == NONE { &[][..] } else { &dh_out.as_slice()[self.dh_out as usize + b * width..][..width] };
            for_isa!(isa, state_gradient(cell: &CellRow<'_>, stream: u32, arrival: Arrival, product: &mut [f32], carry: &mut [f32], out: &[f32]));
            if self.initial == 1 {
                continue;
            }
            dh[b * width..][..width].copy_from_slice(product);
            if self.dx != NONE {
                super::pass_on(arrival.passes, out, &mut dx.as_mut_slice()[self.dx as usize + b * width..][..width]);
            }
        }
    }
}

/// The catalogue's line for the projection.
pub const PROJECT_ENTRY: Entry = Entry {
    name: "lstm_project",
    tolerance: Tolerance { absolute: 3e-6, relative: 1e-5, reason: SUM_REASON },
    cases: || {
        let sizes = [(1, 1, 1), (3, 17, 5), (33, 33, 17), (65, 5, 3), (70_001, 1, 1)];
        let each = |(b, h, r)| (0..if b > 100 { 1 } else { 9 }).map(move |i| project_case(b, h, r, i % 2 == 0, cells(h)[i]));
        sizes.into_iter().flat_map(each).collect()
    },
    bench_cases: || vec![project_case(50, 512, 256, false, ("plain", Cell::PLAIN))],
    sized: |s| vec![project_case(s.n_rows, s.padded_hidden(), projected(s), false, ("plain", Cell::PLAIN))],
    shaders: &[&PROJECT],
};

/// The catalogue's line for the gradient of h.
pub const STATE_GRADIENT_ENTRY: Entry = Entry {
    name: "lstm_state_gradient",
    tolerance: Tolerance { absolute: 1e-5, relative: 1e-5, reason: SUM_REASON },
    cases: || {
        let sizes = [(1, 1, 1), (3, 17, 5), (33, 33, 17), (65, 5, 3), (70_001, 1, 1)];
        let each =
            |(b, h, r)| (0..if b > 100 { 1 } else { 9 }).map(move |i| gradient_case(b, h, r, i % 2 == 0, i % 3 == 0, i == 6, cells(h)[i]));
        sizes.into_iter().flat_map(each).collect()
    },
    bench_cases: || vec![gradient_case(50, 512, 256, false, false, false, ("plain", Cell::PLAIN))],
    sized: |s| vec![gradient_case(s.n_rows, s.padded_hidden(), projected(s), false, false, false, ("plain", Cell::PLAIN))],
    shaders: &[&STATE_GRADIENT],
};

/// Units that a layer of these sizes is projected to: half.
fn projected(s: Sizes) -> u32 {
    crate::shape::pad_units(s.hidden as usize / 2) as u32
}

fn project_case(n_rows: u32, hidden: u32, width: u32, with_lengths: bool, (name, cell): (&str, Cell)) -> Case {
    let (h, r) = (pad_units(hidden as usize) as u32, pad_units(width as usize) as u32);
    let state = n_rows * r;
    let is_masked = cell.is_masked();
    let kernel = LstmProject {
        cell: Cell { peephole: NONE, ..cell },
        n_rows,
        hidden: h,
        width: r,
        weight_hr: 4,
        m: 8,
        h_prev: state,
        h: 0,
        masked_prev: if is_masked { 2 * state } else { NONE },
        masked: if is_masked { 3 * state } else { NONE },
        output: if cell.drops() { 4 * state } else { NONE },
        input: if cell.drops() && !with_lengths { 4 } else { NONE },
        t: 2,
        use_lengths: u32::from(with_lengths),
    };
    let random = Fill::Uniform { low: -1.0, high: 1.0 };
    Case {
        label: format!("B{n_rows} H{h} R{r} {name} lengths {with_lengths}"),
        operands: vec![
            operand((4 + h * r) as usize, Fill::Uniform { low: -0.3, high: 0.3 }),
            operand((8 + n_rows * h) as usize, random.clone()),
            operand(5 * state as usize, random.clone()),
            case_rows(n_rows, &cell),
            operand((4 + state) as usize, random),
        ],
        flop: 2 * u64::from(n_rows) * u64::from(h) * u64::from(r),
        kernel: Box::new(kernel),
    }
}

fn gradient_case(n_rows: u32, hidden: u32, width: u32, with_lengths: bool, last: bool, initial: bool, (name, cell): (&str, Cell)) -> Case {
    let (h, r) = (pad_units(hidden as usize) as u32, pad_units(width as usize) as u32);
    let kernel = LstmStateGradient {
        cell: Cell { peephole: NONE, ..cell },
        n_rows,
        hidden: h,
        width: r,
        weight_hh: 0,
        dz_after: 4,
        dh_out: if with_lengths { 4 } else { NONE },
        dx: if with_lengths && !initial { 4 } else { NONE },
        dh: 8,
        carry: 4,
        t: 2,
        last: u32::from(last && !initial),
        use_lengths: u32::from(with_lengths),
        initial: u32::from(initial),
    };
    let random = Fill::Uniform { low: -1.0, high: 1.0 };
    Case {
        label: format!("B{n_rows} H{h} R{r} {name} lengths {with_lengths} last {last} initial {initial}"),
        operands: vec![
            operand((4 * h * r) as usize, Fill::Uniform { low: -0.3, high: 0.3 }),
            operand((4 + n_rows * 4 * h) as usize, Fill::Uniform { low: -0.5, high: 0.5 }),
            operand((4 + n_rows * r) as usize, random.clone()),
            operand((8 + n_rows * r) as usize, if initial { random.clone() } else { Fill::Poison }),
            operand((4 + n_rows * r) as usize, random),
            case_rows(n_rows, &cell),
            operand((4 + n_rows * r) as usize, Fill::Poison),
        ],
        flop: 2 * u64::from(n_rows) * u64::from(r) * u64::from(4 * h),
        kernel: Box::new(kernel),
    }
}
