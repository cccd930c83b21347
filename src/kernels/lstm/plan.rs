//! A sweep of lanes over time: what it is given, and the default plan of launches.

use std::ops::Range;

use anyhow::{Result, ensure};

use super::norm::NORM_FACTORS;
use super::rows::sums_width;
use super::{
    Cell, LstmNormBackward, LstmNormForward, LstmNormInput, LstmProject, LstmStateGradient, LstmStepBackward, LstmStepForward, NONE,
    PEEPHOLES,
};
use crate::kernels::gemm::{Gemm, Matrix};
use crate::kernels::reduce::ColumnSums;
use crate::kernels::{Kernel, MAX_LOOP_TRIPS, Span};
use crate::shape::{GATES, PANEL};

/// A layer's tensors, or their gradients: the bucket that each lies in, as one span, and its offset there.
#[derive(Clone, Copy, Debug)]
pub struct LaneTensors {
    pub weight_ih: (Span, u32),
    pub weight_hh: (Span, u32),
    /// `[R, H]`, with a projection.
    pub weight_hr: Option<(Span, u32)>,
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
    /// Layer normalisation: gains `[4H]` of the input's and of the recurrent product, gain and bias `[2, H]` of the cell state. All or none.
    pub norm_ih: u32,
    pub norm_hh: u32,
    pub norm_c: u32,
}

impl LaneVectors {
    /// In this bucket, without any vector.
    pub fn none(span: Span) -> Self {
        Self { span, bias_ih: NONE, bias_hh: NONE, peephole: NONE, norm_ih: NONE, norm_hh: NONE, norm_c: NONE }
    }
}

/// Columns of a lane's input, or of its gradient, that lie together: `[T, B, width]` and its offset in the span.
#[derive(Clone, Copy, Debug)]
pub struct LanePart {
    pub span: Span,
    pub offset: u32,
    /// Padded.
    pub width: u32,
}

/// The sizes of a lane, and from them those of its arenas.
///
/// | arena | holds, one after another |
/// | --- | --- |
/// | gates | z, then the gates, then dz `[T, B, 4H]`; with norms both products `[T, B, 4H]`, normalised, then their gradients, and the factors `[T, B, 4]` |
/// | h | states `[T + 1, B, R]`; with recurrent dropout the masked copies; what is handed up `[T, B, R]`, where that is not h |
/// | c | states `[T + 1, B, H]`; with a projection m = o tanh(c) `[T, B, H]` |
/// | carry | gradients of the state: h `[B, R]`, c `[B, H]`; sums over time of the gradients of peepholes and norms, a row for each; with both norm and projection the gradient of m `[B, H]` |
/// | dh | gradients of h `[T, B, R]`, with a projection or norms |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneShape {
    /// H, padded, and without padding.
    pub hidden: u32,
    pub units: u32,
    /// R: floats of h, padded; H without a projection.
    pub width: u32,
    pub projects: bool,
    pub norms: bool,
    pub peepholes: bool,
    /// Recurrent dropout.
    pub masks: bool,
    /// What is handed up is not h itself: dropped, or with the lane's input added.
    pub outputs: bool,
}

impl LaneShape {
    /// The plain lane of so many units, `hidden` with padding.
    pub fn plain(hidden: u32, units: u32) -> Self {
        Self { hidden, units, width: hidden, projects: false, norms: false, peepholes: false, masks: false, outputs: false }
    }

    /// Floats of the gates' arena for `places` T x B.
    pub fn gates_len(self, places: usize) -> usize {
        let plane = places * self.hidden as usize * GATES;
        if self.norms { 3 * plane + places * NORM_FACTORS } else { plane }
    }

    /// Floats of the states of h, for `places` T x B and B rows.
    pub fn h_len(self, places: usize, rows: usize) -> usize {
        let states = (places + rows) * if self.masks { 2 } else { 1 };
        (states + if self.outputs { places } else { 0 }) * self.width as usize
    }

    /// Where what is handed up begins in the arena of h, of T x B places and B rows.
    pub fn outputs_at(self, places: usize, rows: usize) -> usize {
        self.h_len(places, rows) - places * self.width as usize
    }

    /// Floats of the states of c.
    pub fn c_len(self, places: usize, rows: usize) -> usize {
        (places + rows + if self.projects { places } else { 0 }) * self.hidden as usize
    }

    /// Floats of a row of sums.
    pub(super) fn sums_width(self) -> usize {
        sums_width(self.hidden as usize, self.peepholes, self.norms)
    }

    /// Floats of the carry.
    pub fn carry_len(self, rows: usize) -> usize {
        let of_m = if self.norms && self.projects { self.hidden as usize } else { 0 };
        rows * (self.width as usize + self.hidden as usize + self.sums_width() + of_m)
    }

    /// Floats of the gradients of h, 0 where no arena is needed.
    pub fn dh_len(self, places: usize) -> usize {
        if self.needs_dh() { places * self.width as usize } else { 0 }
    }

    pub(super) fn needs_dh(self) -> bool {
        self.projects || self.norms
    }
}

/// What a backward sweep needs beside the lane.
#[derive(Clone, Debug)]
pub struct LaneGradients {
    /// Gradient of the outputs `[T, B, R]` and its offset in the span; none where only the final state matters.
    pub dh_out: Option<(Span, u32)>,
    /// Gradients of the final h and c come in, of the initial ones go out; [`LaneShape`] tells what lies behind.
    pub carry: Span,
    /// Room for gradients of h, where [`LaneShape::dh_len`] is not 0.
    pub dh: Option<Span>,
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
    pub shape: LaneShape,
    /// T of the arenas.
    pub n_steps: u32,
    /// Runs from the end of the range to its start.
    pub reverse: bool,
    pub tensors: LaneTensors,
    /// The input's parts, side by side: both directions of the layer below.
    pub x: [Option<LanePart>; 2],
    pub gates: Span,
    /// The part of the input that is added to what is handed up, as a residual layer does; it is as wide as h.
    pub residual: Option<usize>,
    /// The caller has put the initial states of h and c in their places.
    pub h: Span,
    pub c: Span,
    /// Steps `t0..t1`.
    pub range: Range<u32>,
    /// By row: valid steps `[B]` if `use_lengths`, and the stream numbers at [`Cell::streams`] if the cell draws.
    pub rows: Option<Span>,
    pub use_lengths: bool,
    /// Where its peepholes lie is taken from `tensors`.
    pub cell: Cell,
    pub backward: Option<LaneGradients>,
}

/// Offsets in the arenas of a lane of B rows.
#[derive(Clone, Copy)]
pub(super) struct Places {
    rows: u32,
    n_steps: u32,
    shape: LaneShape,
}

impl Places {
    /// Floats of a step's gates.
    pub fn step(self) -> u32 {
        self.rows * self.shape.hidden * GATES as u32
    }

    /// Of step t: the gates, and with norms the products of the input and of h.
    pub fn gates(self, t: u32) -> u32 {
        t * self.step()
    }

    pub fn x(self, t: u32) -> u32 {
        (self.n_steps + t) * self.step()
    }

    pub fn y(self, t: u32) -> u32 {
        (2 * self.n_steps + t) * self.step()
    }

    pub fn factors(self, t: u32) -> u32 {
        3 * self.n_steps * self.step() + t * self.rows * NORM_FACTORS as u32
    }

    /// Where the gradients of the products of the input and of h end up.
    pub fn dx(self, t: u32) -> u32 {
        if self.shape.norms { self.x(t) } else { self.gates(t) }
    }

    pub fn dy(self, t: u32) -> u32 {
        if self.shape.norms { self.y(t) } else { self.gates(t) }
    }

    /// Of state t.
    pub fn h(self, t: u32) -> u32 {
        t * self.rows * self.shape.width
    }

    pub fn masked(self, t: u32) -> u32 {
        (self.n_steps + 1 + t) * self.rows * self.shape.width
    }

    /// What is handed up from step t.
    pub fn output(self, t: u32) -> u32 {
        self.shape.outputs_at((self.n_steps * self.rows) as usize, self.rows as usize) as u32 + t * self.rows * self.shape.width
    }

    pub fn c(self, t: u32) -> u32 {
        t * self.rows * self.shape.hidden
    }

    pub fn m(self, t: u32) -> u32 {
        (self.n_steps + 1 + t) * self.rows * self.shape.hidden
    }

    /// In the carry: the sums, and the gradient of m.
    pub fn sums(self) -> u32 {
        self.rows * (self.shape.width + self.shape.hidden)
    }

    pub fn dm(self) -> u32 {
        self.sums() + self.rows * self.shape.sums_width() as u32
    }
}

impl Lane {
    /// K: columns of the input.
    pub(super) fn inputs(&self) -> u32 {
        self.x.iter().flatten().map(|part| part.width).sum()
    }

    /// The parts and the column of K that each begins at.
    pub(super) fn parts(parts: &[Option<LanePart>; 2]) -> impl Iterator<Item = (u32, LanePart)> {
        let second = parts[0].map_or(0, |part| part.width);
        parts.iter().zip([0, second]).filter_map(|(part, column)| part.map(|part| (column, part)))
    }

    /// The part of the input that a residual lane adds to its outputs.
    pub(super) fn residual_input(&self) -> Option<LanePart> {
        self.residual.and_then(|part| self.x[part])
    }

    /// The part of dx that takes the gradient of this lane's outputs as it comes: that of the input which was added to them.
    pub(super) fn passed_on(&self) -> Option<usize> {
        let grads = self.backward.as_ref()?;
        self.residual.filter(|&part| grads.dh_out.is_some() && grads.dx[part].is_some())
    }

    pub(super) fn places(&self, n_rows: u32) -> Places {
        Places { rows: n_rows, n_steps: self.n_steps, shape: self.shape }
    }

    /// The vectors; without any the recurrent weights stand for their bucket.
    pub(super) fn vectors(&self) -> LaneVectors {
        self.tensors.vectors.unwrap_or_else(|| LaneVectors::none(self.tensors.weight_hh.0))
    }

    /// The cell with the place of its peepholes.
    pub(super) fn whole_cell(&self) -> Cell {
        Cell { peephole: self.vectors().peephole, ..self.cell }
    }

    /// Fails where the lane contradicts itself.
    pub(super) fn check(&self, gradients: bool) -> Result<()> {
        ensure!(self.rows.is_some() || !(self.use_lengths || self.cell.is_random()), "a lane with lengths or draws needs its rows");
        let vectors = self.vectors();
        ensure!(self.shape.projects == self.tensors.weight_hr.is_some(), "a lane projects where it has a weight_hr");
        ensure!(self.shape.norms == (vectors.norm_c != NONE), "a lane normalises where it has gains");
        ensure!(self.shape.peepholes == (vectors.peephole != NONE), "a lane has peepholes where it has their weights");
        ensure!(self.shape.masks == self.cell.is_masked(), "a lane keeps masked states where its cell masks them");
        ensure!(self.shape.projects || self.shape.width == self.shape.hidden, "h is as wide as c without a projection");
        ensure!(self.shape.outputs == (self.residual.is_some() || self.cell.drops()), "a lane has outputs where they are not h");
        let is_residual = |part: usize| self.x.get(part).is_some_and(|x| x.is_some_and(|x| x.width == self.shape.width));
        ensure!(self.residual.is_none_or(is_residual), "a residual lane's input is as wide as its h");
        if gradients {
            let Some(backward) = &self.backward else { anyhow::bail!("a lane without places for its gradients cannot be swept backward") };
            ensure!(backward.dh.is_some() || !self.shape.needs_dh(), "a lane with a projection or norms needs room for gradients of h");
        }
        Ok(())
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
///
/// Launches: forward 1 + T a lane; backward T + 5 and more where T x B is above 65,535. A second part of the input adds 1 and 2, recurrent dropout 1.
/// Sums over the hidden units want launches of their own: a projection adds T forward, T + 1 backward; norms T + 1 and T + 3; both 2 T + 1 and 2 T + 4.
/// Dropout and residual connections between layers add none.
///
/// # Errors
/// The launch's, or a lane that contradicts itself.
pub fn sweep_plan(args: &SweepArgs<'_>, launch: Launch<'_>) -> Result<()> {
    for lane in args.lanes {
        lane.check(args.gradients)?;
    }
    if !args.gradients {
        return args.lanes.iter().try_for_each(|lane| forward_plan(args, lane, launch));
    }
    // The steps of all lanes first: those of a residual one put down what the products of any of them are added to.
    for lane in args.lanes {
        backward_steps(args, lane, launch)?;
    }
    for lane in args.lanes {
        input_gradients(args, lane, launch)?;
        weight_gradients(args, lane, launch)?;
    }
    Ok(())
}

/// Products of row-major factors, one after another in memory.
fn product([m, n, k]: [u32; 3], a: Matrix, b: Matrix, c: Matrix) -> Gemm {
    Gemm { m, n, k, trans_a: 0, trans_b: 0, accumulate: 0, use_bias: 0, bias_offset: 0, a, b, c }
}

fn row_major(offset: u32, stride: u32) -> Matrix {
    Matrix::row_major(offset as usize, stride as usize)
}

fn panels(offset: u32, columns: u32) -> Matrix {
    Matrix::panels(offset as usize, columns as usize)
}

fn forward_plan(args: &SweepArgs<'_>, lane: &Lane, launch: Launch<'_>) -> Result<()> {
    let (rows, at, shape) = (args.n_rows, lane.places(args.n_rows), lane.shape);
    let (hidden, width, gates) = (shape.hidden, shape.width, shape.hidden * GATES as u32);
    let first = lane.range.start;
    let n_places = (lane.range.end - first) * rows;
    let LaneTensors { weight_ih, weight_hh, weight_hr, .. } = lane.tensors;
    for (column, part) in Lane::parts(&lane.x) {
        let x = row_major(part.offset + first * rows * part.width, part.width);
        let weight = panels(weight_ih.1 + column * PANEL as u32, lane.inputs());
        let to = row_major(if shape.norms { at.x(first) } else { at.gates(first) }, gates);
        let kernel = Gemm { accumulate: u32::from(column > 0), ..product([n_places, gates, part.width], x, weight, to) };
        launch(&kernel, &[part.span, weight_ih.0, weight_ih.0, lane.gates])?;
    }
    if shape.norms {
        let kernel = LstmNormInput { n_rows: n_places, hidden, units: shape.units, x: at.x(first), factors: at.factors(first) };
        launch(&kernel, &[lane.gates])?;
    }
    let (vectors, cell) = (lane.vectors(), lane.whole_cell());
    let row_words = lane.rows.unwrap_or(weight_hh.0);
    let input = lane.residual_input();
    let input_words = input.map_or(weight_hh.0, |input| input.span);
    // What is handed up, and what is added to it.
    let handed = |t: u32, is_own: bool| {
        let output = if shape.outputs && is_own { at.output(t) } else { NONE };
        (output, input.filter(|_| is_own).map_or(NONE, |input| input.offset + at.h(t)))
    };
    let mut step = |t: u32, initial: bool| {
        let (before, after) = if lane.reverse { (t + 1, t) } else { (t, t + 1) };
        let masked = |state: u32| if shape.masks { at.masked(state) } else { NONE };
        if shape.norms && !initial {
            let from = if shape.masks { at.masked(before) } else { at.h(before) };
            let kernel = product([rows, gates, width], row_major(from, width), panels(weight_hh.1, width), row_major(at.y(t), gates));
            launch(&kernel, &[lane.h, weight_hh.0, weight_hh.0, lane.gates])?;
            let own = |offset: u32| if shape.projects { NONE } else { offset };
            let (output, input) = handed(t, !shape.projects);
            let kernel = LstmNormForward {
                cell,
                n_rows: rows,
                hidden,
                units: shape.units,
                gates: at.gates(t),
                x: at.x(t),
                y: at.y(t),
                factors: at.factors(t),
                bias_ih: vectors.bias_ih,
                bias_hh: vectors.bias_hh,
                norm_ih: vectors.norm_ih,
                norm_hh: vectors.norm_hh,
                norm_c: vectors.norm_c,
                h_prev: own(at.h(before)),
                h: own(at.h(after)),
                masked: own(masked(after)),
                output,
                input,
                c_prev: at.c(before),
                c: at.c(after),
                m: if shape.projects { at.m(t) } else { NONE },
                t,
                use_lengths: u32::from(lane.use_lengths),
            };
            launch(&kernel, &[lane.gates, lane.h, lane.c, row_words, args.flags, vectors.span, input_words])?;
        } else {
            let (output, input) = handed(t, !shape.projects && !initial);
            let kernel = LstmStepForward {
                cell,
                n_rows: rows,
                hidden: if initial { width } else { hidden },
                width,
                weight_hh: weight_hh.1,
                bias_ih: vectors.bias_ih,
                bias_hh: vectors.bias_hh,
                gates: at.gates(t),
                h_prev: at.h(before),
                h: at.h(after),
                masked_prev: masked(before),
                masked: masked(if initial { before } else { after }),
                output,
                input,
                c_prev: at.c(before),
                c: at.c(after),
                m: if shape.projects { at.m(t) } else { NONE },
                t,
                use_lengths: u32::from(lane.use_lengths),
                initial: u32::from(initial),
            };
            launch(&kernel, &[weight_hh.0, lane.gates, lane.h, lane.c, row_words, args.flags, vectors.span, input_words])?;
        }
        let Some(weight_hr) = weight_hr.filter(|_| !initial) else { return Ok(()) };
        let (output, input) = handed(t, true);
        let kernel = LstmProject {
            cell: Cell { peephole: NONE, ..cell },
            n_rows: rows,
            hidden,
            width,
            weight_hr: weight_hr.1,
            m: at.m(t),
            h_prev: at.h(before),
            h: at.h(after),
            masked_prev: masked(before),
            masked: masked(after),
            output,
            input,
            t,
            use_lengths: u32::from(lane.use_lengths),
        };
        launch(&kernel, &[weight_hr.0, lane.c, lane.h, row_words, input_words])
    };
    let mut order = steps(lane, false);
    if let (true, Some(first)) = (shape.masks, order.clone().next()) {
        step(first, true)?;
    }
    order.try_for_each(|t| step(t, false))
}

/// A lane's steps in the order of a sweep: that of the state, or of its gradient.
fn steps(lane: &Lane, gradients: bool) -> impl Iterator<Item = u32> + Clone {
    let (start, end, falls) = (lane.range.start, lane.range.end, lane.reverse != gradients);
    (start..end).map(move |t| if falls { end - 1 - (t - start) } else { t })
}

fn backward_steps(args: &SweepArgs<'_>, lane: &Lane, launch: Launch<'_>) -> Result<()> {
    let Some(grads) = &lane.backward else { return Ok(()) };
    let (rows, at, shape) = (args.n_rows, lane.places(args.n_rows), lane.shape);
    let (hidden, width) = (shape.hidden, shape.width);
    let LaneTensors { weight_hh, weight_hr, .. } = lane.tensors;
    let (vectors, cell) = (lane.vectors(), lane.whole_cell());
    let row_words = lane.rows.unwrap_or(weight_hh.0);
    let passed_on = lane.passed_on().and_then(|part| grads.dx[part]);
    // Nothing is written to the flags: they stand where no dx is.
    let dx_span = passed_on.map_or(args.flags, |to| to.span);
    let use_lengths = u32::from(lane.use_lengths);
    let mut step = |t: u32, last: bool, initial: bool| {
        let (before, later) = if lane.reverse { (t + 1, t.wrapping_sub(1)) } else { (t, t + 1) };
        let (last, initial_word) = (u32::from(last), u32::from(initial));
        let dz_after = if last == 1 { 0 } else { at.dy(if initial { t } else { later }) };
        let dh_out = grads.dh_out.map_or(NONE, |(_, offset)| offset + at.h(t));
        let dx = passed_on.filter(|_| !initial).map_or(NONE, |to| to.offset + at.h(t));
        let dh_out_span = grads.dh_out.map_or(lane.c, |(span, _)| span);
        let plain = LstmStepBackward {
            cell,
            n_rows: rows,
            hidden,
            width,
            weight: weight_hh.1,
            gates: at.gates(t),
            dz_after,
            c_prev: at.c(before),
            dh_out,
            dx,
            carry: 0,
            t,
            last,
            use_lengths,
            initial: initial_word,
            projected: 0,
        };
        let Some(dh) = grads.dh.filter(|_| shape.needs_dh()) else {
            return launch(&plain, &[weight_hh.0, lane.gates, lane.c, dh_out_span, grads.carry, row_words, vectors.span, dx_span]);
        };
        let kernel = LstmStateGradient {
            cell: Cell { peephole: NONE, ..cell },
            n_rows: rows,
            hidden,
            width,
            weight_hh: weight_hh.1,
            dz_after,
            dh_out,
            dx,
            dh: at.h(t),
            carry: 0,
            t,
            last,
            use_lengths,
            initial: initial_word,
        };
        launch(&kernel, &[weight_hh.0, lane.gates, dh_out_span, dh, grads.carry, row_words, dx_span])?;
        if initial {
            return Ok(());
        }
        if !shape.norms {
            let Some(weight_hr) = weight_hr else { return Ok(()) };
            let kernel = LstmStepBackward { weight: weight_hr.1, dz_after: NONE, dh_out: at.h(t), dx: NONE, projected: 1, ..plain };
            return launch(&kernel, &[weight_hr.0, lane.gates, lane.c, dh, grads.carry, row_words, vectors.span, args.flags]);
        }
        if let Some(weight_hr) = weight_hr {
            let kernel =
                product([rows, hidden, width], row_major(at.h(t), width), row_major(weight_hr.1, hidden), row_major(at.dm(), hidden));
            launch(&kernel, &[dh, weight_hr.0, weight_hr.0, grads.carry])?;
        }
        let kernel = LstmNormBackward {
            cell,
            n_rows: rows,
            hidden,
            units: shape.units,
            width,
            gates: at.gates(t),
            x: at.x(t),
            y: at.y(t),
            factors: at.factors(t),
            norm_ih: vectors.norm_ih,
            norm_hh: vectors.norm_hh,
            norm_c: vectors.norm_c,
            c_prev: at.c(before),
            dh: if shape.projects { NONE } else { at.h(t) },
            from_carry: if shape.projects { at.dm() } else { NONE },
            carry: 0,
            t,
            last,
            use_lengths,
        };
        launch(&kernel, &[lane.gates, lane.c, dh, grads.carry, row_words, vectors.span])
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
    Ok(())
}

/// The second part of a backward plan: gradients of the input.
fn input_gradients(args: &SweepArgs<'_>, lane: &Lane, launch: Launch<'_>) -> Result<()> {
    let Some(grads) = &lane.backward else { return Ok(()) };
    let (rows, at, hidden, weight_ih) = (args.n_rows, lane.places(args.n_rows), lane.shape.hidden, lane.tensors.weight_ih);
    let n_places = (lane.range.end - lane.range.start) * rows;
    let gates = hidden * GATES as u32;
    for (part, (column, to)) in Lane::parts(&grads.dx).enumerate() {
        let has_passed = args.lanes.iter().any(|lane| lane.passed_on() == Some(part));
        let dz = row_major(at.dx(lane.range.start), gates);
        let weight = panels(weight_ih.1 + column * PANEL as u32, lane.inputs());
        let dx = row_major(to.offset + lane.range.start * rows * to.width, to.width);
        let kernel = Gemm {
            trans_b: 1,
            accumulate: u32::from(grads.accumulate_dx || has_passed),
            ..product([n_places, to.width, gates], dz, weight, dx)
        };
        launch(&kernel, &[lane.gates, weight_ih.0, weight_ih.0, to.span])?;
    }
    Ok(())
}

/// The last part of a backward plan: gradients of weights and vectors from x, h and dz of all steps.
///
/// # Errors
/// The launch's.
pub(super) fn weight_gradients(args: &SweepArgs<'_>, lane: &Lane, launch: Launch<'_>) -> Result<()> {
    let Some(grads) = &lane.backward else { return Ok(()) };
    let (rows, at, shape) = (args.n_rows, lane.places(args.n_rows), lane.shape);
    let (hidden, width, gates) = (shape.hidden, shape.width, shape.hidden * GATES as u32);
    // Sums over T x B in pieces that one invocation's loop can run; a piece may end within a step.
    let (begin, end) = (lane.range.start * rows, lane.range.end * rows);
    for row in (begin..end).step_by(MAX_LOOP_TRIPS as usize / 2) {
        let k = (end - row).min(MAX_LOOP_TRIPS / 2);
        let accumulate = u32::from(grads.accumulate || row > begin);
        // Sums of outer products of rows of a and b.
        let sum = |[m, n]: [u32; 2], a: u32, b: u32, to: Matrix| {
            let kernel = product([m, n, k], row_major(a + row * m, m), row_major(b + row * n, n), to);
            Gemm { trans_a: 1, accumulate, ..kernel }
        };
        let (to_ih, to_hh) = (grads.tensors.weight_ih, grads.tensors.weight_hh);
        for (column, part) in Lane::parts(&lane.x) {
            let to = panels(to_ih.1 + column * PANEL as u32, lane.inputs());
            launch(&sum([part.width, gates], part.offset, at.dx(0), to), &[part.span, lane.gates, lane.gates, to_ih.0])?;
        }
        // What the recurrent product read: the states before the steps.
        let before = u32::from(lane.reverse);
        let h = if shape.masks { at.masked(before) } else { at.h(before) };
        launch(&sum([width, gates], h, at.dy(0), panels(to_hh.1, width)), &[lane.h, lane.gates, lane.gates, to_hh.0])?;
        if let (Some(to), Some(dh)) = (grads.tensors.weight_hr, grads.dh) {
            launch(&sum([width, hidden], 0, at.m(0), row_major(to.1, hidden)), &[dh, lane.c, lane.c, to.0])?;
        }
        let Some(to) = grads.tensors.vectors else { continue };
        if to.bias_ih != NONE || to.bias_hh != NONE {
            let (out, second_out) = if to.bias_ih == NONE { (to.bias_hh, NONE) } else { (to.bias_ih, to.bias_hh) };
            let sums = ColumnSums { n_rows: k, n_cols: gates, row_stride: gates, offset: row * gates, out, second_out, accumulate };
            launch(&sums, &[lane.gates, to.span])?;
        }
    }
    let Some(to) = grads.tensors.vectors else { return Ok(()) };
    let peepholes = if shape.peepholes { PEEPHOLES as u32 * hidden } else { 0 };
    let sums = [
        (to.peephole, 0, PEEPHOLES as u32 * hidden),
        (to.norm_ih, peepholes, gates),
        (to.norm_hh, peepholes + gates, gates),
        (to.norm_c, peepholes + 2 * gates, 2 * hidden),
    ];
    for (out, column, n_cols) in sums.into_iter().filter(|&(out, ..)| out != NONE) {
        let kernel = ColumnSums {
            n_rows: rows,
            n_cols,
            row_stride: shape.sums_width() as u32,
            offset: at.sums() + column,
            out,
            second_out: NONE,
            accumulate: u32::from(grads.accumulate),
        };
        launch(&kernel, &[grads.carry, to.span])?;
    }
    Ok(())
}
