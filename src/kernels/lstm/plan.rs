//! A sweep of lanes over time: what it is given, and the default plan of launches.

use std::ops::Range;

use anyhow::{Result, ensure};
use bytemuck::Pod;

use super::norm::NORM_FACTORS;
use super::rows::sums_width;
use super::whole::{LstmSweepBackward, LstmSweepForward, SweepWay, most_steps, step_by};
use super::{
    BothLanes, Cell, LstmNormBackward, LstmNormForward, LstmNormInput, LstmProject, LstmStateGradient, LstmStepBackward, LstmStepForward,
    NONE, PEEPHOLES,
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

/// Where a lane's arenas begin in their spans: those of both directions of a layer may lie in one buffer, and the lanes then share launches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneStarts {
    pub gates: u32,
    pub h: u32,
    pub c: u32,
    pub carry: u32,
    pub dh: u32,
}

/// One layer in one direction over a range of time.
#[derive(Clone, Debug)]
pub struct Lane {
    pub shape: LaneShape,
    pub starts: LaneStarts,
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
    starts: LaneStarts,
}

impl Places {
    /// Floats of a step's gates.
    pub fn step(self) -> u32 {
        self.rows * self.shape.hidden * GATES as u32
    }

    /// Of step t: the gates, and with norms the products of the input and of h.
    pub fn gates(self, t: u32) -> u32 {
        self.starts.gates + t * self.step()
    }

    pub fn x(self, t: u32) -> u32 {
        self.gates(self.n_steps + t)
    }

    pub fn y(self, t: u32) -> u32 {
        self.gates(2 * self.n_steps + t)
    }

    pub fn factors(self, t: u32) -> u32 {
        self.gates(3 * self.n_steps) + t * self.rows * NORM_FACTORS as u32
    }

    /// Where the gradients of the products of the input and of h end up.
    pub fn dx(self, t: u32) -> u32 {
        if self.shape.norms { self.x(t) } else { self.gates(t) }
    }

    pub fn dy(self, t: u32) -> u32 {
        if self.shape.norms { self.y(t) } else { self.gates(t) }
    }

    /// Of step t in anything `[T, B, R]` that begins at 0.
    pub fn outer(self, t: u32) -> u32 {
        t * self.rows * self.shape.width
    }

    /// Of state t.
    pub fn h(self, t: u32) -> u32 {
        self.starts.h + self.outer(t)
    }

    pub fn masked(self, t: u32) -> u32 {
        self.h(self.n_steps + 1 + t)
    }

    /// What is handed up from step t.
    pub fn output(self, t: u32) -> u32 {
        self.h(t) + self.shape.outputs_at((self.n_steps * self.rows) as usize, self.rows as usize) as u32
    }

    pub fn c(self, t: u32) -> u32 {
        self.starts.c + t * self.rows * self.shape.hidden
    }

    pub fn m(self, t: u32) -> u32 {
        self.c(self.n_steps + 1 + t)
    }

    /// Of the gradient of h at step t.
    pub fn dh(self, t: u32) -> u32 {
        self.starts.dh + self.outer(t)
    }

    /// In the carry: the sums, and the gradient of m.
    pub fn sums(self) -> u32 {
        self.starts.carry + self.rows * (self.shape.width + self.shape.hidden)
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

    /// Whether each step of both can be one launch: like lanes, whose operands are the same spans.
    fn can_share_launches(&self, other: &Self) -> bool {
        let spans = |lane: &Self| {
            let LaneTensors { weight_hh, weight_hr, .. } = lane.tensors;
            let of_grads = lane.backward.as_ref().map(|grads| {
                let dx = lane.passed_on().and_then(|part| grads.dx[part]).map(|to| to.span);
                (grads.dh_out.map(|(span, _)| span), dx, grads.carry, grads.dh)
            });
            let input = lane.residual_input().map(|input| input.span);
            ([weight_hh.0, lane.vectors().span, lane.gates, lane.h, lane.c], weight_hr.map(|(span, _)| span), lane.rows, input, of_grads)
        };
        let unlike_in_draws_only = |cell: Cell| Cell { lane: 0, drop_tag: 0, peephole: 0, ..cell };
        self.shape == other.shape
            && (self.range.clone(), self.use_lengths) == (other.range.clone(), other.use_lengths)
            && unlike_in_draws_only(self.cell) == unlike_in_draws_only(other.cell)
            && self.starts != other.starts
            && spans(self) == spans(other)
    }

    pub(super) fn places(&self, n_rows: u32) -> Places {
        Places { rows: n_rows, n_steps: self.n_steps, shape: self.shape, starts: self.starts }
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
/// Dropout and residual connections between layers add none. Both directions of a layer share their step kernels, a lane for each z of the grid,
/// where their arenas lie in the same buffers and their weights in one bucket.
///
/// # Errors
/// The launch's, or a lane that contradicts itself.
pub fn sweep_plan(args: &SweepArgs<'_>, launch: Launch<'_>) -> Result<()> {
    plan_of(args, SweepWay::Steps, launch)
}

/// The plan with all steps of a sweep in one launch of workgroups of ROWS rows; those of lanes that this is not for one by one.
///
/// # Errors
/// As [`sweep_plan`].
pub fn whole_sweep_plan<const ROWS: u32>(args: &SweepArgs<'_>, launch: Launch<'_>) -> Result<()> {
    let way = SweepWay::Whole { tile_rows: ROWS };
    plan_of(args, if SweepWay::all(args).contains(&way) { way } else { SweepWay::Steps }, launch)
}

fn plan_of(args: &SweepArgs<'_>, way: SweepWay, launch: Launch<'_>) -> Result<()> {
    for lane in args.lanes {
        lane.check(args.gradients)?;
    }
    if !args.gradients {
        for lane in args.lanes {
            input_products(args, lane, launch)?;
        }
        return recurrence(args, way, launch);
    }
    // The steps of all lanes first: those of a residual one put down what the products of any of them are added to.
    recurrence(args, way, launch)?;
    for lane in args.lanes {
        input_gradients(args, lane, launch)?;
        weight_gradients(args, lane, false, launch)?;
    }
    Ok(())
}

/// The steps of a sweep without the products before and after them.
///
/// # Errors
/// The launch's.
pub(super) fn recurrence(args: &SweepArgs<'_>, way: SweepWay, launch: Launch<'_>) -> Result<()> {
    let together = matches!(args.lanes, [a, b] if a.can_share_launches(b));
    args.lanes.chunks(if together { 2 } else { 1 }).try_for_each(|group| match (way, args.gradients) {
        (SweepWay::Steps, false) => forward_steps(args, group, launch),
        (SweepWay::Steps, true) => backward_steps(args, group, launch),
        (SweepWay::Whole { tile_rows }, false) => forward_whole(args, group, tile_rows, launch),
        (SweepWay::Whole { tile_rows }, true) => backward_whole(args, group, tile_rows, launch),
    })
}

/// Numbers of the steps that one launch takes, in the order of the sweep.
fn launches_of(lane: &Lane, gradients: bool) -> impl Iterator<Item = Range<u32>> + use<> {
    let (n, most) = (lane.range.end - lane.range.start, most_steps(lane.shape.hidden, gradients));
    (0..n).step_by(most as usize).map(move |first| first..n.min(first + most))
}

/// The time of a step by its number in the order of the sweep, and whether time runs back.
fn time_of(lane: &Lane, number: u32, gradients: bool) -> (u32, bool) {
    let falls = lane.reverse != gradients;
    (if falls { lane.range.end - 1 - number } else { lane.range.start + number }, falls)
}

/// All steps forward of lanes that share their launches.
fn forward_whole(args: &SweepArgs<'_>, lanes: &[Lane], tile_rows: u32, launch: Launch<'_>) -> Result<()> {
    let Some(lane) = lanes.first() else { return Ok(()) };
    let (weight_hh, n_rows) = (lane.tensors.weight_hh.0, args.n_rows);
    let row_words = lane.rows.unwrap_or(weight_hh);
    for numbers in launches_of(lane, false) {
        let kernels = lanes.iter().map(|lane| {
            let (at, vectors) = (lane.places(n_rows), lane.vectors());
            let (t, falls) = time_of(lane, numbers.start, false);
            let (before, _) = around(lane, t);
            LstmSweepForward {
                n_rows,
                hidden: lane.shape.hidden,
                weight_hh: lane.tensors.weight_hh.1,
                bias_ih: vectors.bias_ih,
                bias_hh: vectors.bias_hh,
                gates: at.gates(t),
                gates_next: step_by(at.step(), falls),
                h: at.h(before),
                h_next: step_by(at.outer(1), falls),
                c: at.c(before),
                c_next: step_by(at.outer(1), falls),
                t,
                t_next: step_by(1, falls),
                n_steps: numbers.end - numbers.start,
                use_lengths: u32::from(lane.use_lengths),
                tile_rows,
            }
        });
        launch_lanes(launch, kernels, &[weight_hh, lane.gates, lane.h, lane.c, row_words, args.flags, lane.vectors().span])?;
    }
    Ok(())
}

/// All steps backward of lanes that share their launches.
fn backward_whole(args: &SweepArgs<'_>, lanes: &[Lane], tile_rows: u32, launch: Launch<'_>) -> Result<()> {
    let Some((lane, grads)) = lanes.first().and_then(|lane| Some((lane, lane.backward.as_ref()?))) else { return Ok(()) };
    let (weight_hh, n_rows) = (lane.tensors.weight_hh.0, args.n_rows);
    let row_words = lane.rows.unwrap_or(weight_hh);
    let dh_out = grads.dh_out.map_or(lane.c, |(span, _)| span);
    for numbers in launches_of(lane, true) {
        let kernels = lanes.iter().filter_map(|lane| {
            let (at, grads) = (lane.places(n_rows), lane.backward.as_ref()?);
            let (t, falls) = time_of(lane, numbers.start, true);
            Some(LstmSweepBackward {
                n_rows,
                hidden: lane.shape.hidden,
                weight_hh: lane.tensors.weight_hh.1,
                gates: at.gates(t),
                gates_next: step_by(at.step(), falls),
                dz_after: if numbers.start == 0 { NONE } else { at.gates(time_of(lane, numbers.start - 1, true).0) },
                c_prev: at.c(around(lane, t).0),
                c_next: step_by(at.outer(1), falls),
                dh_out: grads.dh_out.map_or(NONE, |(_, offset)| offset + at.outer(t)),
                dh_out_next: step_by(at.outer(1), falls),
                carry: lane.starts.carry,
                t,
                t_next: step_by(1, falls),
                n_steps: numbers.end - numbers.start,
                use_lengths: u32::from(lane.use_lengths),
                initial: u32::from(numbers.end == lane.range.end - lane.range.start),
                tile_rows,
            })
        });
        launch_lanes(launch, kernels, &[weight_hh, lane.gates, lane.c, dh_out, grads.carry, row_words])?;
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

/// Launches the same kernel for one lane, or for both at once.
fn launch_lanes<K: Kernel + Pod>(launch: Launch<'_>, kernels: impl Iterator<Item = K>, operands: &[Span]) -> Result<()> {
    let mut kernels = kernels;
    match (kernels.next(), kernels.next()) {
        (Some(first), Some(second)) => launch(&BothLanes::new([first, second]), operands),
        (Some(only), None) => launch(&only, operands),
        (None, _) => Ok(()),
    }
}

/// The input's products of all steps, with norms normalised.
fn input_products(args: &SweepArgs<'_>, lane: &Lane, launch: Launch<'_>) -> Result<()> {
    let (rows, at, shape) = (args.n_rows, lane.places(args.n_rows), lane.shape);
    let gates = shape.hidden * GATES as u32;
    let first = lane.range.start;
    let n_places = (lane.range.end - first) * rows;
    let weight_ih = lane.tensors.weight_ih;
    for (column, part) in Lane::parts(&lane.x) {
        let x = row_major(part.offset + first * rows * part.width, part.width);
        let weight = panels(weight_ih.1 + column * PANEL as u32, lane.inputs());
        let to = row_major(if shape.norms { at.x(first) } else { at.gates(first) }, gates);
        let kernel = Gemm { accumulate: u32::from(column > 0), ..product([n_places, gates, part.width], x, weight, to) };
        launch(&kernel, &[part.span, weight_ih.0, weight_ih.0, lane.gates])?;
    }
    if shape.norms {
        let kernel =
            LstmNormInput { n_rows: n_places, hidden: shape.hidden, units: shape.units, x: at.x(first), factors: at.factors(first) };
        launch(&kernel, &[lane.gates])?;
    }
    Ok(())
}

/// The steps forward of lanes that share their launches.
fn forward_steps(args: &SweepArgs<'_>, lanes: &[Lane], launch: Launch<'_>) -> Result<()> {
    let Some(lane) = lanes.first() else { return Ok(()) };
    let (n_rows, shape) = (args.n_rows, lane.shape);
    let (weight_hh, vectors) = (lane.tensors.weight_hh.0, lane.vectors().span);
    let row_words = lane.rows.unwrap_or(weight_hh);
    let input_words = lane.residual_input().map_or(weight_hh, |input| input.span);
    if shape.masks && !lane.range.is_empty() {
        let kernels = lanes.iter().filter_map(|lane| steps(lane, false).next().map(|t| forward_kernel(lane, n_rows, t, true)));
        launch_lanes(launch, kernels, &[weight_hh, lane.gates, lane.h, lane.c, row_words, args.flags, vectors, input_words])?;
    }
    let mut orders: Vec<_> = lanes.iter().map(|lane| steps(lane, false)).collect();
    for _ in lane.range.clone() {
        let now: Vec<(&Lane, u32)> = lanes.iter().zip(&mut orders).filter_map(|(lane, order)| Some((lane, order.next()?))).collect();
        if shape.norms {
            for &(lane, t) in &now {
                let kernel = recurrent_product(lane, n_rows, t);
                let (weight_hh, ..) = lane.tensors.weight_hh;
                launch(&kernel, &[lane.h, weight_hh, weight_hh, lane.gates])?;
            }
            let kernels = now.iter().map(|&(lane, t)| norm_kernel(lane, n_rows, t));
            launch_lanes(launch, kernels, &[lane.gates, lane.h, lane.c, row_words, args.flags, vectors, input_words])?;
        } else {
            let kernels = now.iter().map(|&(lane, t)| forward_kernel(lane, n_rows, t, false));
            launch_lanes(launch, kernels, &[weight_hh, lane.gates, lane.h, lane.c, row_words, args.flags, vectors, input_words])?;
        }
        if let Some((weight_hr, _)) = lane.tensors.weight_hr {
            let kernels = now.iter().filter_map(|&(lane, t)| project_kernel(lane, n_rows, t));
            launch_lanes(launch, kernels, &[weight_hr, lane.c, lane.h, row_words, input_words])?;
        }
    }
    Ok(())
}

/// Which states a step of a lane lies between.
fn around(lane: &Lane, t: u32) -> (u32, u32) {
    if lane.reverse { (t + 1, t) } else { (t, t + 1) }
}

/// Where the masked copy of a state lies.
fn masked_of(lane: &Lane, at: Places, state: u32) -> u32 {
    if lane.shape.masks { at.masked(state) } else { NONE }
}

/// What is handed up from a step, and what is added to it.
fn handed(lane: &Lane, at: Places, t: u32) -> (u32, u32) {
    let output = if lane.shape.outputs { at.output(t) } else { NONE };
    (output, lane.residual_input().map_or(NONE, |input| input.offset + at.outer(t)))
}

fn forward_kernel(lane: &Lane, n_rows: u32, t: u32, initial: bool) -> LstmStepForward {
    let (at, shape, vectors, (before, after)) = (lane.places(n_rows), lane.shape, lane.vectors(), around(lane, t));
    let (output, input) = if shape.projects || initial { (NONE, NONE) } else { handed(lane, at, t) };
    LstmStepForward {
        cell: lane.whole_cell(),
        n_rows,
        hidden: if initial { shape.width } else { shape.hidden },
        width: shape.width,
        weight_hh: lane.tensors.weight_hh.1,
        bias_ih: vectors.bias_ih,
        bias_hh: vectors.bias_hh,
        gates: at.gates(t),
        h_prev: at.h(before),
        h: at.h(after),
        masked_prev: masked_of(lane, at, before),
        masked: masked_of(lane, at, if initial { before } else { after }),
        output,
        input,
        c_prev: at.c(before),
        c: at.c(after),
        m: if shape.projects { at.m(t) } else { NONE },
        t,
        use_lengths: u32::from(lane.use_lengths),
        initial: u32::from(initial),
    }
}

/// The recurrent product by itself, where it is normalised.
fn recurrent_product(lane: &Lane, n_rows: u32, t: u32) -> Gemm {
    let (at, LaneShape { hidden, width, masks, .. }, (before, _)) = (lane.places(n_rows), lane.shape, around(lane, t));
    let (gates, from) = (hidden * GATES as u32, if masks { at.masked(before) } else { at.h(before) });
    product([n_rows, gates, width], row_major(from, width), panels(lane.tensors.weight_hh.1, width), row_major(at.y(t), gates))
}

fn norm_kernel(lane: &Lane, n_rows: u32, t: u32) -> LstmNormForward {
    let (at, shape, vectors, (before, after)) = (lane.places(n_rows), lane.shape, lane.vectors(), around(lane, t));
    let own = |offset: u32| if shape.projects { NONE } else { offset };
    let (output, input) = if shape.projects { (NONE, NONE) } else { handed(lane, at, t) };
    LstmNormForward {
        cell: lane.whole_cell(),
        n_rows,
        hidden: shape.hidden,
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
        masked: own(masked_of(lane, at, after)),
        output,
        input,
        c_prev: at.c(before),
        c: at.c(after),
        m: if shape.projects { at.m(t) } else { NONE },
        t,
        use_lengths: u32::from(lane.use_lengths),
    }
}

fn project_kernel(lane: &Lane, n_rows: u32, t: u32) -> Option<LstmProject> {
    let (at, (before, after)) = (lane.places(n_rows), around(lane, t));
    let (output, input) = handed(lane, at, t);
    Some(LstmProject {
        cell: Cell { peephole: NONE, ..lane.cell },
        n_rows,
        hidden: lane.shape.hidden,
        width: lane.shape.width,
        weight_hr: lane.tensors.weight_hr?.1,
        m: at.m(t),
        h_prev: at.h(before),
        h: at.h(after),
        masked_prev: masked_of(lane, at, before),
        masked: masked_of(lane, at, after),
        output,
        input,
        t,
        use_lengths: u32::from(lane.use_lengths),
    })
}

/// A lane's steps in the order of a sweep: that of the state, or of its gradient.
fn steps(lane: &Lane, gradients: bool) -> impl Iterator<Item = u32> + Clone + use<> {
    let (start, end, falls) = (lane.range.start, lane.range.end, lane.reverse != gradients);
    (start..end).map(move |t| if falls { end - 1 - (t - start) } else { t })
}

/// A step of a lane backward.
#[derive(Clone, Copy)]
struct Back<'l> {
    lane: &'l Lane,
    grads: &'l LaneGradients,
    t: u32,
    /// The first of its sweep.
    last: bool,
    /// No step: only the initial h's gradient, which lies behind the one at `t`; the initial c's lies in the carry already.
    initial: bool,
}

/// The steps of lanes that share their launches.
fn backward_steps(args: &SweepArgs<'_>, lanes: &[Lane], launch: Launch<'_>) -> Result<()> {
    let (Some(lane), n_rows) = (lanes.first(), args.n_rows) else { return Ok(()) };
    let Some(grads) = &lane.backward else { return Ok(()) };
    let mut orders: Vec<_> = lanes.iter().map(|lane| steps(lane, true)).collect();
    let mut last_steps: Vec<u32> = Vec::new();
    for i in 0..=lane.range.len() {
        let initial = i == lane.range.len();
        if !initial {
            last_steps = orders.iter_mut().filter_map(Iterator::next).collect();
        }
        if last_steps.is_empty() {
            break;
        }
        let now: Vec<Back<'_>> = lanes
            .iter()
            .zip(&last_steps)
            .filter_map(|(lane, &t)| Some(Back { lane, grads: lane.backward.as_ref()?, t, last: i == 0, initial }))
            .collect();
        backward_step(args.flags, &now, n_rows, lane, grads, launch)?;
    }
    Ok(())
}

/// One step of lanes that share their launches; `lane` and `grads` are the first of them, whose spans are those of all.
fn backward_step(flags: Span, now: &[Back<'_>], n_rows: u32, lane: &Lane, grads: &LaneGradients, launch: Launch<'_>) -> Result<()> {
    let LaneTensors { weight_hh: (weight_hh, _), weight_hr, .. } = lane.tensors;
    let row_words = lane.rows.unwrap_or(weight_hh);
    let vectors = lane.vectors().span;
    let dh_out = grads.dh_out.map_or(lane.c, |(span, _)| span);
    // Nothing is written to the flags: they stand where no dx is.
    let dx = lane.passed_on().and_then(|part| grads.dx[part]).map_or(flags, |to| to.span);
    let Some(dh) = grads.dh.filter(|_| lane.shape.needs_dh()) else {
        let operands = [weight_hh, lane.gates, lane.c, dh_out, grads.carry, row_words, vectors, dx];
        return launch_lanes(launch, now.iter().map(|back| back.step_kernel(n_rows)), &operands);
    };
    let operands = [weight_hh, lane.gates, dh_out, dh, grads.carry, row_words, dx];
    launch_lanes(launch, now.iter().map(|back| back.state_kernel(n_rows)), &operands)?;
    if now.iter().any(|back| back.initial) {
        return Ok(());
    }
    if !lane.shape.norms {
        let Some((weight_hr, _)) = weight_hr else { return Ok(()) };
        let operands = [weight_hr, lane.gates, lane.c, dh, grads.carry, row_words, vectors, flags];
        return launch_lanes(launch, now.iter().filter_map(|back| back.projected_kernel(n_rows)), &operands);
    }
    for back in now {
        let (Some((weight_hr, from)), Some(dh), at) = (back.lane.tensors.weight_hr, back.grads.dh, back.lane.places(n_rows)) else {
            continue;
        };
        let LaneShape { hidden, width, .. } = back.lane.shape;
        let kernel = product([n_rows, hidden, width], row_major(at.dh(back.t), width), row_major(from, hidden), row_major(at.dm(), hidden));
        launch(&kernel, &[dh, weight_hr, weight_hr, back.grads.carry])?;
    }
    let operands = [lane.gates, lane.c, dh, grads.carry, row_words, vectors];
    launch_lanes(launch, now.iter().map(|back| back.norm_kernel(n_rows)), &operands)
}

impl Back<'_> {
    /// The gradient of the recurrent product that the step after left; unused in the first of a sweep.
    fn dz_after(&self, at: Places) -> u32 {
        let later = if self.lane.reverse { self.t.wrapping_sub(1) } else { self.t + 1 };
        if self.last { 0 } else { at.dy(if self.initial { self.t } else { later }) }
    }

    fn dh_out(&self, at: Places) -> u32 {
        self.grads.dh_out.map_or(NONE, |(_, offset)| offset + at.outer(self.t))
    }

    fn dx(&self, at: Places) -> u32 {
        let to = self.lane.passed_on().filter(|_| !self.initial).and_then(|part| self.grads.dx[part]);
        to.map_or(NONE, |to| to.offset + at.outer(self.t))
    }

    fn step_kernel(&self, n_rows: u32) -> LstmStepBackward {
        let (at, shape, lane) = (self.lane.places(n_rows), self.lane.shape, self.lane);
        LstmStepBackward {
            cell: lane.whole_cell(),
            n_rows,
            hidden: shape.hidden,
            width: shape.width,
            weight: lane.tensors.weight_hh.1,
            gates: at.gates(self.t),
            dz_after: self.dz_after(at),
            c_prev: at.c(around(lane, self.t).0),
            dh_out: self.dh_out(at),
            dx: self.dx(at),
            carry: lane.starts.carry,
            t: self.t,
            last: u32::from(self.last),
            use_lengths: u32::from(lane.use_lengths),
            initial: u32::from(self.initial),
            projected: 0,
        }
    }

    /// Behind a projection, from the gradient of h.
    fn projected_kernel(&self, n_rows: u32) -> Option<LstmStepBackward> {
        let (weight, dh_out) = (self.lane.tensors.weight_hr?.1, self.lane.places(n_rows).dh(self.t));
        Some(LstmStepBackward { weight, dz_after: NONE, dh_out, dx: NONE, projected: 1, ..self.step_kernel(n_rows) })
    }

    fn state_kernel(&self, n_rows: u32) -> LstmStateGradient {
        let (at, shape, lane) = (self.lane.places(n_rows), self.lane.shape, self.lane);
        LstmStateGradient {
            cell: Cell { peephole: NONE, ..lane.cell },
            n_rows,
            hidden: shape.hidden,
            width: shape.width,
            weight_hh: lane.tensors.weight_hh.1,
            dz_after: self.dz_after(at),
            dh_out: self.dh_out(at),
            dx: self.dx(at),
            dh: at.dh(self.t),
            carry: lane.starts.carry,
            t: self.t,
            last: u32::from(self.last),
            use_lengths: u32::from(lane.use_lengths),
            initial: u32::from(self.initial),
        }
    }

    fn norm_kernel(&self, n_rows: u32) -> LstmNormBackward {
        let (at, shape, lane) = (self.lane.places(n_rows), self.lane.shape, self.lane);
        let vectors = lane.vectors();
        LstmNormBackward {
            cell: lane.whole_cell(),
            n_rows,
            hidden: shape.hidden,
            units: shape.units,
            width: shape.width,
            gates: at.gates(self.t),
            x: at.x(self.t),
            y: at.y(self.t),
            factors: at.factors(self.t),
            norm_ih: vectors.norm_ih,
            norm_hh: vectors.norm_hh,
            norm_c: vectors.norm_c,
            c_prev: at.c(around(lane, self.t).0),
            dh: if shape.projects { NONE } else { at.dh(self.t) },
            from_carry: if shape.projects { at.dm() } else { NONE },
            carry: lane.starts.carry,
            t: self.t,
            last: u32::from(self.last),
            use_lengths: u32::from(lane.use_lengths),
        }
    }
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

/// The last part of a backward plan: gradients of weights and vectors from x, h and dz of all steps; `without_gates`: but for those of the gates'
/// weights and biases.
///
/// # Errors
/// The launch's.
pub(super) fn weight_gradients(args: &SweepArgs<'_>, lane: &Lane, without_gates: bool, launch: Launch<'_>) -> Result<()> {
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
        if !without_gates {
            let (to_ih, to_hh) = (grads.tensors.weight_ih, grads.tensors.weight_hh);
            for (column, part) in Lane::parts(&lane.x) {
                let to = panels(to_ih.1 + column * PANEL as u32, lane.inputs());
                launch(&sum([part.width, gates], part.offset, at.dx(0), to), &[part.span, lane.gates, lane.gates, to_ih.0])?;
            }
            // What the recurrent product read: the states before the steps.
            let before = u32::from(lane.reverse);
            let h = if shape.masks { at.masked(before) } else { at.h(before) };
            launch(&sum([width, gates], h, at.dy(0), panels(to_hh.1, width)), &[lane.h, lane.gates, lane.gates, to_hh.0])?;
        }
        if let (Some(to), Some(dh)) = (grads.tensors.weight_hr, grads.dh) {
            launch(&sum([width, hidden], at.dh(0), at.m(0), row_major(to.1, hidden)), &[dh, lane.c, lane.c, to.0])?;
        }
        let Some(to) = grads.tensors.vectors else { continue };
        if !without_gates && (to.bias_ih != NONE || to.bias_hh != NONE) {
            let (out, second_out) = if to.bias_ih == NONE { (to.bias_hh, NONE) } else { (to.bias_ih, to.bias_hh) };
            let sums =
                ColumnSums { n_rows: k, n_cols: gates, row_stride: gates, offset: at.gates(0) + row * gates, out, second_out, accumulate };
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
