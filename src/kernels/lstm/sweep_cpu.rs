//! The sweep as the CPU runs it: one parallel region for all steps, each thread with its own rows of the batch, no barrier inside.
//!
//! Weights are packed once a sweep. A step forward is one product over [x; h], the gates, and with a projection one more product; a step back is
//! one product with the transposed recurrent weights, the gates' derivatives, and the gradient of the input while dz is near. Weight gradients
//! follow as products over all steps. The mathematics of a row is in `rows.rs`. Behind the last row that has not ended no product is computed,
//! so that a batch sorted by falling length costs what it holds.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;

use super::gradients_cpu::gate_gradients;
use super::plan::weight_gradients;
use super::rows::{
    Arrival, CellRow, NormGradient, NormRow, apply_mask, cell_backward, cell_forward, gate_backward, gate_forward, hand_up, norm_gates,
    norm_input, settle, state_gradient,
};
use super::{Cell, FLAG_NON_FINITE, LanePart, LaneShape, LaneVectors, Launch, NONE, PEEPHOLES, SweepArgs};
use crate::for_isa;
use crate::kernels::gemm::{self, Gemm, Matrix};
use crate::kernels::lstm::norm::NORM_FACTORS;
use crate::kernels::microkernel::{self, Ends, Factors, Left, MatrixMut, Steps, Stored};
use crate::kernels::{Binding, Kernel, Operand, ShapeError, Span, at_least, cpu_only, multiple_of, read, read_write};
use crate::pool::{CpuContext, Isa, Pool, Rows};
use crate::shape::{GATES, PANEL, PANEL_UNITS};

/// Runs the sweep of some lanes, one after another.
///
/// # Errors
/// The launch's, or a lane that contradicts itself.
pub fn sweep(args: &SweepArgs<'_>, launch: Launch<'_>) -> Result<()> {
    for lane in args.lanes {
        lane.check(args.gradients)?;
        let one = SweepArgs { lanes: std::slice::from_ref(lane), ..args.clone() };
        let (weight_ih, weight_hh, vectors) = (lane.tensors.weight_ih, lane.tensors.weight_hh, lane.vectors());
        // What is not there is a span of no words.
        let nothing = weight_hh.0.part(0, 0);
        let weight_hr = lane.tensors.weight_hr.unwrap_or((nothing, 0));
        let sweep = Sweep {
            n_rows: args.n_rows as usize,
            shape: lane.shape,
            n_steps: lane.n_steps as usize,
            reverse: lane.reverse,
            range: lane.range.start as usize..lane.range.end as usize,
            inputs: lane.inputs() as usize,
            weights: [weight_ih.1, weight_hh.1, weight_hr.1].map(|at| at as usize),
            vectors,
            use_lengths: lane.use_lengths,
            cell: lane.whole_cell(),
            residual: lane.residual,
        };
        let weights = [weight_ih.0, weight_hh.0, weight_hr.0, vectors.span];
        let rows = lane.rows.unwrap_or(nothing);
        // The lane's own part of arenas that both directions share.
        let (starts, shape, n_rows) = (lane.starts, lane.shape, args.n_rows as usize);
        let places = lane.n_steps as usize * n_rows;
        let own = |span: Span, start: u32, len: usize| span.part(start as usize, len);
        let part_of = |part: Option<LanePart>| part.map_or(nothing, |part| own(part.span, part.offset, places * part.width as usize));
        let widths = |parts: [Option<LanePart>; 2]| parts.map(|part| part.map(|part| part.width as usize));
        let gates = own(lane.gates, starts.gates, shape.gates_len(places));
        let h = own(lane.h, starts.h, shape.h_len(places, n_rows));
        let c = own(lane.c, starts.c, shape.c_len(places, n_rows));
        match &lane.backward {
            Some(grads) if args.gradients => {
                let kernel = SweepBackward {
                    sweep,
                    dh_out: grads.dh_out.map(|(_, offset)| offset as usize),
                    dx: widths(grads.dx),
                    accumulate_dx: grads.accumulate_dx,
                    passed_on: lane.passed_on(),
                };
                let dh_out = grads.dh_out.map_or(nothing, |(span, _)| span);
                let dh = grads.dh.map_or(nothing, |dh| own(dh, starts.dh, shape.dh_len(places)));
                let carry = own(grads.carry, starts.carry, shape.carry_len(n_rows));
                let others = [gates, c, dh_out, dh, carry, rows, part_of(grads.dx[0]), part_of(grads.dx[1])];
                launch_all(launch, &kernel, &weights, &others)?;
                // With norms the two products have each its own dz.
                let together = !lane.shape.norms;
                if together {
                    gate_gradients(&one, lane, grads, launch)?;
                }
                weight_gradients(&one, lane, together, launch)?;
            }
            _ => {
                let kernel = SweepForward { sweep, x: widths(lane.x) };
                let others = [part_of(lane.x[0]), part_of(lane.x[1]), gates, h, c, rows, args.flags];
                launch_all(launch, &kernel, &weights, &others)?;
            }
        }
    }
    Ok(())
}

fn launch_all(launch: Launch<'_>, kernel: &dyn Kernel, weights: &[Span; 4], others: &[Span]) -> Result<()> {
    let mut all = [weights[0]; 12];
    all[..4].copy_from_slice(weights);
    all[4..4 + others.len()].copy_from_slice(others);
    launch(kernel, &all[..4 + others.len()])
}

/// What both sweeps know of a lane.
#[derive(Clone)]
struct Sweep {
    n_rows: usize,
    shape: LaneShape,
    n_steps: usize,
    reverse: bool,
    range: Range<usize>,
    inputs: usize,
    /// Offsets of weight_ih, weight_hh and weight_hr in their operands.
    weights: [usize; 3],
    vectors: LaneVectors,
    use_lengths: bool,
    cell: Cell,
    /// The part of the input that is added to what is handed up.
    residual: Option<usize>,
}

impl Sweep {
    fn hidden(&self) -> usize {
        self.shape.hidden as usize
    }

    fn width(&self) -> usize {
        self.shape.width as usize
    }

    /// Columns of the gates.
    fn gates(&self) -> usize {
        self.hidden() * GATES
    }

    /// Nothing but the plain cell, straight from the product to h.
    fn is_plain(&self) -> bool {
        self.cell.is_plain() && !self.shape.projects && !self.shape.norms
    }

    /// Steps in the order of the forward sweep.
    fn step(&self, i: usize) -> usize {
        if self.reverse { self.range.end - 1 - i } else { self.range.start + i }
    }

    /// Places of the state before and after step `t`.
    fn around(&self, t: usize) -> (usize, usize) {
        if self.reverse { (t + 1, t) } else { (t, t + 1) }
    }

    /// Rows below which a part is not worth a thread: half a million multiplications.
    fn min_rows(&self) -> usize {
        (1usize << 19).div_ceil((self.range.len() * (self.inputs + self.width()) * self.gates()).max(1)).max(2)
    }

    fn check(&self, name: &'static str, lens: &[usize]) -> Result<(), ShapeError> {
        let (hidden, width, gates) = (self.hidden(), self.width(), self.gates());
        multiple_of(name, "hidden", self.shape.hidden, PANEL_UNITS)?;
        multiple_of(name, "width", self.shape.width, PANEL_UNITS)?;
        at_least(name, "weight_ih", lens[0], self.weights[0] + self.inputs * gates)?;
        at_least(name, "weight_hh", lens[1], self.weights[1] + width * gates)?;
        if self.shape.projects {
            at_least(name, "weight_hr", lens[2], self.weights[2] + width * hidden)?;
        }
        let v = &self.vectors;
        let sizes = [
            (v.bias_ih, gates),
            (v.bias_hh, gates),
            (v.peephole, PEEPHOLES * hidden),
            (v.norm_ih, gates),
            (v.norm_hh, gates),
            (v.norm_c, 2 * hidden),
        ];
        for (offset, len) in sizes.into_iter().filter(|&(offset, _)| offset != NONE) {
            at_least(name, "vectors", lens[3], offset as usize + len)?;
        }
        Ok(())
    }

    fn check_rows(&self, name: &'static str, len: usize) -> Result<(), ShapeError> {
        if self.use_lengths {
            at_least(name, "rows", len, self.n_rows)?;
        }
        if self.cell.is_random() { at_least(name, "rows", len, self.cell.streams as usize + self.n_rows) } else { Ok(()) }
    }

    /// Lengths and stream numbers, as far as there are such.
    fn row_words<'a>(&self, rows: &'a Operand<'_>) -> RowWords<'a> {
        let words = rows.as_indices();
        RowWords {
            lengths: self.use_lengths.then(|| &words[..self.n_rows]),
            streams: self.cell.is_random().then(|| &words[self.cell.streams as usize..][..self.n_rows]),
        }
    }

    /// The weights of the cell beside its products.
    fn row<'a>(&'a self, vectors: &'a [f32], t: usize) -> CellRow<'a> {
        let (v, gates) = (&self.vectors, self.gates());
        let at = |offset: u32, len: usize| &vectors[offset as usize..][..len];
        let norm = self.shape.norms.then(|| NormRow {
            units: self.shape.units as usize,
            ih: at(v.norm_ih, gates),
            hh: at(v.norm_hh, gates),
            c: at(v.norm_c, 2 * self.hidden()),
        });
        let peephole = self.shape.peepholes.then(|| at(v.peephole, PEEPHOLES * self.hidden()));
        CellRow { cell: &self.cell, peephole, norm, t: t as u32 }
    }

    /// The product of the steps of one row, `k` columns of them, with the weights from row `first` on; a later part is added to the one before.
    fn input_product(&self, ctx: &mut CpuContext, [first, k]: [usize; 2], x: &[f32], weight_ih: &[f32], gates: &mut [f32]) {
        let (start, n) = (self.range.start, self.gates());
        let product = Gemm {
            m: self.range.len() as u32,
            n: n as u32,
            k: k as u32,
            trans_a: 0,
            trans_b: 0,
            accumulate: u32::from(first > 0),
            use_bias: 0,
            bias_offset: 0,
            a: Matrix::row_major(start * k, k),
            b: Matrix::panels(first * PANEL, self.inputs),
            c: Matrix::row_major(start * n, n),
        };
        gemm::product(ctx, &product, x, weight_ih, None, gates);
    }

    /// The arena of the gates as steps: gates, both normalised products, their factors.
    fn gate_steps<'a>(&self, gates: &'a mut [f32]) -> (Steps<'a>, Option<(Steps<'a>, Steps<'a>, Steps<'a>)>) {
        let (rows, n, width) = (self.n_rows, self.n_steps, self.gates());
        let plane = n * rows * width;
        let (gates, rest) = gates.split_at_mut(plane);
        let norms = self.shape.norms.then(|| {
            let (x, rest) = rest.split_at_mut(plane);
            let (y, factors) = rest.split_at_mut(plane);
            (Steps::new(x, n, rows, width), Steps::new(y, n, rows, width), Steps::new(factors, n, rows, NORM_FACTORS))
        });
        (Steps::new(gates, n, rows, width), norms)
    }
}

/// What is known of each row of the batch.
#[derive(Clone, Copy)]
struct RowWords<'a> {
    lengths: Option<&'a [u32]>,
    streams: Option<&'a [u32]>,
}

impl RowWords<'_> {
    fn length(self, row: usize) -> u32 {
        self.lengths.map_or(u32::MAX, |lengths| lengths[row])
    }

    fn stream(self, row: usize) -> u32 {
        self.streams.map_or(0, |streams| streams[row])
    }

    /// Rows of a part up to the last that has step `t`.
    fn live(self, part: &Range<usize>, t: usize) -> usize {
        let Some(lengths) = self.lengths else { return part.len() };
        lengths[part.clone()].iter().rposition(|&length| t < length as usize).map_or(0, |last| last + 1)
    }
}

/// Packs B `[k, n]` on all threads.
fn pack_all(pool: &Pool, isa: Isa, b: Stored<'_>, k: usize, n: usize, to: &mut [f32]) {
    let cols = microkernel::tile_cols(isa);
    let n_panels = n.div_ceil(cols);
    let min_panels = (1usize << 15).div_ceil((k * cols).max(1));
    pool.run(Rows { data: to, width: k * cols }, n_panels, min_panels, &|to: Rows<'_>, panels: Range<usize>| {
        microkernel::pack(isa, b, 0..k, panels.start * cols..(panels.end * cols).min(n), to.data);
    });
}

/// A row-major matrix.
fn row_major(data: &[f32], stride: usize) -> Stored<'_> {
    Stored { data, row_stride: stride, panel: usize::MAX, panel_stride: 0, transposed: false }
}

/// Weights `[K, 4H]` in panels of 64 columns, packed or as they lie.
#[derive(Clone, Copy)]
struct GateWeights<'a> {
    isa: Isa,
    k: usize,
    weight: &'a [f32],
    packed: Option<&'a [f32]>,
}

impl<'a> GateWeights<'a> {
    /// The product with rows of `k` floats, which meet the weights from row `first` on.
    fn by(&self, first: usize, k: usize, rows: &'a [f32]) -> Factors<'a> {
        let (b, cols) = match self.packed {
            Some(packed) => (packed, microkernel::tile_cols(self.isa)),
            None => (self.weight, PANEL),
        };
        Factors { k, a: Left::Rows(rows, k), b: &b[first * cols..], row_stride: cols, panel: cols, panel_stride: cols * self.k }
    }
}

/// All steps forward: gates, h and c.
struct SweepForward {
    sweep: Sweep,
    /// Widths of the input's parts.
    x: [Option<usize>; 2],
}

const FORWARD_BINDINGS: &[Binding] = &[
    read("weight_ih"),
    read("weight_hh"),
    read("weight_hr"),
    read("vectors"),
    read("x"),
    read("more x"),
    read_write("gates"),
    read_write("h"),
    read_write("c"),
    read("rows"),
    read_write("flags"),
];

impl Kernel for SweepForward {
    cpu_only!("lstm_sweep_forward", FORWARD_BINDINGS);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "lstm_sweep_forward";
        let (s, places) = (&self.sweep, self.sweep.n_steps * self.sweep.n_rows);
        s.check(NAME, lens)?;
        for (width, len) in self.x.iter().flatten().zip(&lens[4..]) {
            at_least(NAME, "x", *len, s.range.end * s.n_rows * width)?;
        }
        at_least(NAME, "gates", lens[6], s.shape.gates_len(places))?;
        at_least(NAME, "h", lens[7], s.shape.h_len(places, s.n_rows))?;
        at_least(NAME, "c", lens[8], s.shape.c_len(places, s.n_rows))?;
        s.check_rows(NAME, lens[9])?;
        at_least(NAME, "flags", lens[10], 1)
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [weight_ih, weight_hh, weight_hr, vectors, x0, x1, gates, h, c, row_words, flags] = operands else {
            unreachable!("eleven operands")
        };
        let s = &self.sweep;
        if s.range.is_empty() {
            return;
        }
        let (rows, inputs, hidden, width, gate_cols, isa) = (s.n_rows, s.inputs, s.hidden(), s.width(), s.gates(), ctx.isa);
        let weight_ih = &weight_ih.as_slice()[s.weights[0]..][..inputs * gate_cols];
        let weight_hh = &weight_hh.as_slice()[s.weights[1]..][..width * gate_cols];
        let vectors = vectors.as_slice();
        let words = s.row_words(row_words);
        let x_parts = [(self.x[0], x0), (self.x[1], x1)];
        let x_parts = x_parts.map(|(width, x)| width.map_or((&[][..], 0), |width| (x.as_slice(), width)));
        // One row alone reads the weights of its input once for all steps, and those of h as they lie.
        let is_single = rows == 1 && s.range.len() > 1 && !s.shape.norms;
        if is_single {
            let mut first = 0;
            for (x, k) in x_parts.into_iter().filter(|&(_, k)| k > 0) {
                s.input_product(ctx, [first, k], x, weight_ih, gates.as_mut_slice());
                first += k;
            }
        }
        // Few rows in all do not pay for packing; with the widest vectors weights lie as they are wanted.
        let does_pack = microkernel::tile_cols(isa) < PANEL && rows > 1 && rows * s.range.len() > 4 * microkernel::TILE_ROWS;
        let packed_len = if does_pack { (inputs + width) * gate_cols } else { 0 };
        let hr_len = if s.shape.projects { microkernel::packed_len(isa, hidden, width) } else { 0 };
        let (packed, rest) = ctx.scratch.take(packed_len + hr_len + gate_cols).split_at_mut(packed_len);
        let (hr, bias_sum) = rest.split_at_mut(hr_len);
        let packed: Option<(&[f32], &[f32])> = does_pack.then(|| {
            let (ih, hh) = packed.split_at_mut(inputs * gate_cols);
            pack_all(&ctx.pool, isa, Stored::panels(weight_ih, inputs), inputs, gate_cols, ih);
            pack_all(&ctx.pool, isa, Stored::panels(weight_hh, width), width, gate_cols, hh);
            (&*ih, &*hh)
        });
        let by_x = GateWeights { isa, k: inputs, weight: weight_ih, packed: packed.map(|(ih, _)| ih) };
        let by_h = GateWeights { isa, k: width, weight: weight_hh, packed: packed.map(|(_, hh)| hh) };
        if s.shape.projects {
            let weight = row_major(&weight_hr.as_slice()[s.weights[2]..][..width * hidden], hidden).transposed();
            pack_all(&ctx.pool, isa, weight, hidden, width, hr);
        }
        let hr = &*hr;
        bias_sum.fill(0.0);
        let biases = [s.vectors.bias_ih, s.vectors.bias_hh];
        for offset in biases.into_iter().filter(|&b| b != NONE) {
            bias_sum.iter_mut().zip(&vectors[offset as usize..]).for_each(|(sum, b)| *sum += b);
        }
        let bias = biases.iter().any(|&b| b != NONE).then_some(&*bias_sum);
        let n_states = s.n_steps + 1;
        let (h, rest) = h.as_mut_slice().split_at_mut(n_states * rows * width);
        let (masked, outputs) = rest.split_at_mut(if s.shape.masks { n_states * rows * width } else { 0 });
        let (c, m) = c.as_mut_slice().split_at_mut(n_states * rows * hidden);
        let work = (
            s.gate_steps(gates.as_mut_slice()),
            (
                Steps::new(h, n_states, rows, width),
                (
                    s.shape.masks.then(|| Steps::new(masked, n_states, rows, width)),
                    s.shape.outputs.then(|| Steps::new(outputs, s.n_steps, rows, width)),
                ),
            ),
            (Steps::new(c, n_states, rows, hidden), s.shape.projects.then(|| Steps::new(m, s.n_steps, rows, hidden))),
        );
        let raised = AtomicBool::new(false);
        type States<'a> = (Steps<'a>, (Option<Steps<'a>>, Option<Steps<'a>>));
        type Work<'a> = ((Steps<'a>, Option<(Steps<'a>, Steps<'a>, Steps<'a>)>), States<'a>, (Steps<'a>, Option<Steps<'a>>));
        ctx.pool.run(work, rows, s.min_rows(), &|((mut gates, mut norms), (mut h, (mut masked, mut outputs)), (mut c, mut m)): Work<
            '_,
        >,
                                                 part: Range<usize>| {
            let n = part.len();
            let mut non_finite = 0u32;
            if let Some(masked) = &mut masked {
                let initial = s.around(s.step(0)).0;
                let states = h.at(initial).chunks_exact(width).zip(masked.at_mut(initial).chunks_exact_mut(width));
                states.zip(part.clone()).for_each(|((h, masked), b)| apply_mask(&s.cell, words.stream(b), h, masked));
            }
            for t in (0..s.range.len()).map(|i| s.step(i)) {
                let (before, after) = s.around(t);
                let live = words.live(&part, t);
                let row = s.row(vectors, t);
                let (h_before, h_out) = h.two(before, after);
                let (masked_before, masked_out): (&[f32], &mut [f32]) = match &mut masked {
                    Some(masked) => masked.two(before, after),
                    None => (h_before, &mut []),
                };
                let masked_width = masked_out.len() / n.max(1);
                let (c_in, c_out) = c.two(before, after);
                let z = gates.at_mut(t);
                let [x0, x1] = x_parts.map(|(x, k)| (k > 0).then(|| (&x[(t * rows + part.start) * k..], k)));
                let first = x0.map_or(0, |(_, k)| k);
                let [x0, x1] = [x0.map(|(x, k)| by_x.by(0, k, x)), x1.map(|(x, k)| by_x.by(first, k, x))];
                let from_h = by_h.by(0, width, masked_before);
                if let Some((x, y, factors)) = &mut norms {
                    let (x, y) = (x.at_mut(t), y.at_mut(t));
                    microkernel::multiply(isa, &mut MatrixMut::row_major(x, live, gate_cols, gate_cols), [x0, x1], Ends::default());
                    microkernel::multiply(
                        isa,
                        &mut MatrixMut::row_major(y, live, gate_cols, gate_cols),
                        [Some(from_h), None],
                        Ends::default(),
                    );
                    let of_rows = x.chunks_exact_mut(gate_cols).zip(y.chunks_exact_mut(gate_cols));
                    let of_rows = of_rows.zip(factors.at_mut(t).chunks_exact_mut(NORM_FACTORS)).zip(z.chunks_exact_mut(gate_cols));
                    for (((x, y), factors), z) in of_rows.take(live) {
                        let Some(norm) = row.norm else { continue };
                        let (units, [of_x, of_y, ..]) = (norm.units, factors) else { continue };
                        let bias = bias.unwrap_or(&[]);
                        for_isa!(isa, norm_input(x: &mut [f32], units: usize, of_x: &mut f32));
                        let x = &*x;
                        for_isa!(isa, norm_gates(norm: NormRow<'_>, z: &mut [f32], x: &[f32], y: &mut [f32], bias: &[f32], of_y: &mut f32));
                    }
                } else {
                    let mut to = MatrixMut::row_major(z, live, gate_cols, gate_cols);
                    if is_single {
                        microkernel::multiply(isa, &mut to, [Some(from_h), None], Ends { add: true, bias });
                    } else if x1.is_some() {
                        microkernel::multiply(isa, &mut to, [x0, x1], Ends::default());
                        microkernel::multiply(isa, &mut to, [Some(from_h), None], Ends { add: true, bias });
                    } else {
                        microkernel::multiply(isa, &mut to, [x0, Some(from_h)], Ends { add: false, bias });
                    }
                }
                let mut m_out = m.as_mut().map(|m| m.at_mut(t));
                let states = c_in.chunks_exact(hidden).zip(c_out.chunks_exact_mut(hidden));
                for (r, (z, (c_in, c_out))) in z.chunks_exact_mut(gate_cols).zip(states).enumerate() {
                    let b = part.start + r;
                    let out = match &mut m_out {
                        Some(m) => &mut m[r * hidden..][..hidden],
                        None => &mut h_out[r * hidden..][..hidden],
                    };
                    if t as u32 >= words.length(b) {
                        // A row that has ended keeps its state.
                        z.fill(0.0);
                        c_out.copy_from_slice(c_in);
                        if s.shape.projects {
                            out.fill(0.0);
                        }
                        continue;
                    }
                    let flag = &mut non_finite;
                    if s.is_plain() {
                        for_isa!(isa, fused gate_forward(z: &mut [f32], c_in: &[f32], out: &mut [f32], c_out: &mut [f32], flag: &mut u32));
                        continue;
                    }
                    let (row, stream) = (&row, words.stream(b));
                    for_isa!(isa, fused cell_forward(row: &CellRow<'_>, stream: u32, z: &mut [f32], c_in: &[f32], out: &mut [f32],
                                               c_out: &mut [f32], flag: &mut u32));
                }
                if let Some(m) = m_out {
                    let factors = Factors::packed(isa, hidden, Left::Rows(m, hidden), hr);
                    microkernel::multiply(
                        isa,
                        &mut MatrixMut::row_major(h_out, live, width, width),
                        [Some(factors), None],
                        Ends::default(),
                    );
                }
                if s.is_plain() && !s.shape.outputs && words.lengths.is_none() {
                    continue;
                }
                let mut outputs = outputs.as_mut().map(|outputs| outputs.at_mut(t));
                let (added, added_width) = s.residual.map_or((&[][..], 0), |part| x_parts[part]);
                for (r, (h_in, h_out)) in h_before.chunks_exact(width).zip(h_out.chunks_exact_mut(width)).enumerate() {
                    let b = part.start + r;
                    let masked = &mut masked_out[r * masked_width..][..masked_width];
                    if t as u32 >= words.length(b) {
                        h_out.copy_from_slice(h_in);
                        masked.copy_from_slice(&masked_before[r * width..][..masked_width]);
                        if let Some(outputs) = &mut outputs {
                            outputs[r * width..][..width].fill(0.0);
                        }
                        continue;
                    }
                    let (row, stream) = (&row, words.stream(b));
                    settle(row, stream, h_in, h_out, masked);
                    if let Some(outputs) = &mut outputs {
                        let (h, input) = (&*h_out, &added[(t * rows + b) * added_width..][..added_width]);
                        let output = &mut outputs[r * width..][..width];
                        for_isa!(isa, hand_up(row: &CellRow<'_>, stream: u32, h: &[f32], input: &[f32], output: &mut [f32]));
                    }
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

/// All steps back: gates become dz; gradients of the input and of the initial state.
struct SweepBackward {
    sweep: Sweep,
    dh_out: Option<usize>,
    /// Widths of the gradients of the input's parts, as far as they are wanted, and whether they are added to what is there.
    dx: [Option<usize>; 2],
    accumulate_dx: bool,
    /// Which of them the gradient of the outputs is added to, as it comes.
    passed_on: Option<usize>,
}

const BACKWARD_BINDINGS: &[Binding] = &[
    read("weight_ih"),
    read("weight_hh"),
    read("weight_hr"),
    read("vectors"),
    read_write("gates"),
    read("c"),
    read("dh_out"),
    read_write("dh"),
    read_write("carry"),
    read("rows"),
    read_write("dx"),
    read_write("more dx"),
];

impl Kernel for SweepBackward {
    cpu_only!("lstm_sweep_backward", BACKWARD_BINDINGS);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "lstm_sweep_backward";
        let (s, places) = (&self.sweep, self.sweep.n_steps * self.sweep.n_rows);
        s.check(NAME, lens)?;
        at_least(NAME, "gates", lens[4], s.shape.gates_len(places))?;
        at_least(NAME, "c", lens[5], s.shape.c_len(places, s.n_rows))?;
        if let Some(offset) = self.dh_out {
            at_least(NAME, "dh_out", lens[6], offset + s.range.end * s.n_rows * s.width())?;
        }
        at_least(NAME, "dh", lens[7], s.shape.dh_len(places))?;
        at_least(NAME, "carry", lens[8], s.shape.carry_len(s.n_rows))?;
        s.check_rows(NAME, lens[9])?;
        for (width, len) in self.dx.iter().zip(&lens[10..]).filter_map(|(dx, len)| dx.map(|dx| (dx, len))) {
            at_least(NAME, "dx", *len, s.range.end * s.n_rows * width)?;
        }
        Ok(())
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [weight_ih, weight_hh, weight_hr, vectors, gates, c, dh_out, dh, carry, row_words, dx0, dx1] = operands else {
            unreachable!("twelve operands")
        };
        let s = &self.sweep;
        if s.range.is_empty() {
            return;
        }
        let (rows, inputs, hidden, width, gate_cols, isa) = (s.n_rows, s.inputs, s.hidden(), s.width(), s.gates(), ctx.isa);
        let weight_ih = &weight_ih.as_slice()[s.weights[0]..][..inputs * gate_cols];
        let weight_hh = &weight_hh.as_slice()[s.weights[1]..][..width * gate_cols];
        let vectors = vectors.as_slice();
        let c = c.as_slice();
        let dh_out = self.dh_out.map(|offset| &dh_out.as_slice()[offset..]);
        let words = s.row_words(row_words);
        // Transposed weights: of the parts of the input, of h, of the projection; then what came through the recurrent product, and dm.
        let dx_widths = self.dx.map(|width| width.unwrap_or(0));
        let [ih0_len, ih1_len] = dx_widths.map(|n| if n == 0 { 0 } else { microkernel::packed_len(isa, gate_cols, n) });
        let hh_len = microkernel::packed_len(isa, gate_cols, width);
        let hr_len = if s.shape.projects { microkernel::packed_len(isa, width, hidden) } else { 0 };
        let dm_width = if s.shape.projects { hidden } else { 0 };
        let scratch = ctx.scratch.take(ih0_len + ih1_len + hh_len + hr_len + rows * (width + dm_width));
        let (ih0, rest) = scratch.split_at_mut(ih0_len);
        let (ih1, rest) = rest.split_at_mut(ih1_len);
        let (hh, rest) = rest.split_at_mut(hh_len);
        let (hr, rest) = rest.split_at_mut(hr_len);
        let (product, dm) = rest.split_at_mut(rows * width);
        let stored = Stored::panels(weight_ih, inputs);
        for (packed, first, n) in [(&mut *ih0, 0, dx_widths[0]), (&mut *ih1, dx_widths[0], dx_widths[1])] {
            if n > 0 {
                pack_all(&ctx.pool, isa, stored.part(first, 0).transposed(), gate_cols, n, packed);
            }
        }
        pack_all(&ctx.pool, isa, Stored::panels(weight_hh, width).transposed(), gate_cols, width, hh);
        if s.shape.projects {
            pack_all(&ctx.pool, isa, row_major(&weight_hr.as_slice()[s.weights[2]..][..width * hidden], hidden), width, hidden, hr);
        }
        let (ih, hh, hr) = ([&*ih0, &*ih1], &*hh, &*hr);
        let sums_width = s.shape.sums_width();
        let (carry_h, rest) = carry.as_mut_slice().split_at_mut(rows * width);
        let (dc, rest) = rest.split_at_mut(rows * hidden);
        let of_rows = |data, width| Rows { data, width };
        let steps_of = |data, width: usize| Steps::new(data, s.range.end, rows, width);
        let dx = (self.dx[0].map(|width| steps_of(dx0.as_mut_slice(), width)), self.dx[1].map(|width| steps_of(dx1.as_mut_slice(), width)));
        let dh = s.shape.needs_dh().then(|| Steps::new(dh.as_mut_slice(), s.n_steps, rows, width));
        let sums = of_rows(&mut rest[..rows * sums_width], sums_width);
        let work = (
            (s.gate_steps(gates.as_mut_slice()), dx),
            (of_rows(carry_h, width), of_rows(dc, hidden), sums),
            (dh, of_rows(product, width), of_rows(dm, dm_width)),
        );
        type Gates<'a> = (Steps<'a>, Option<(Steps<'a>, Steps<'a>, Steps<'a>)>);
        type Work<'a> =
            ((Gates<'a>, (Option<Steps<'a>>, Option<Steps<'a>>)), (Rows<'a>, Rows<'a>, Rows<'a>), (Option<Steps<'a>>, Rows<'a>, Rows<'a>));
        ctx.pool.run(work, rows, s.min_rows(), &|(((mut gates, mut norms), dx), (carry_h, dc, sums), (mut dh, product, dm)): Work<'_>,
                                                part: Range<usize>| {
            let n = part.len();
            let mut dx = [dx.0, dx.1];
            sums.data.fill(0.0);
            // Rows beyond the live ones become zero, or stay where the product is added.
            let through = |live: usize, dz: &[f32], k: usize, weight: &[f32], to: &mut [f32], cols: usize, add: bool| {
                let factors = Factors::packed(isa, k, Left::Rows(dz, k), weight);
                microkernel::multiply(isa, &mut MatrixMut::row_major(to, live, cols, cols), [Some(factors), None], Ends { add, bias: None });
                if !add {
                    to[live * cols..n * cols].fill(0.0);
                }
            };
            for i in (0..s.range.len()).rev() {
                let t = s.step(i);
                let (before, _) = s.around(t);
                let is_last = i + 1 == s.range.len();
                let live = words.live(&part, t);
                let row = s.row(vectors, t);
                let d = match &mut dh {
                    Some(dh) => dh.at_mut(t),
                    None => &mut *product.data,
                };
                if !is_last {
                    let later = s.step(i + 1);
                    let dz = norms.as_ref().map_or_else(|| gates.at(later), |(_, y, _)| y.at(later));
                    through(words.live(&part, later), dz, gate_cols, hh, d, width, false);
                }
                let of_row = |b: usize, width: usize| (t * rows + b) * width..(t * rows + b + 1) * width;
                for (r, (d, carry)) in d.chunks_exact_mut(width).zip(carry_h.data.chunks_exact_mut(width)).enumerate() {
                    let b = part.start + r;
                    let arrival = Arrival::new(t, words.length(b), is_last, false);
                    let out = dh_out.map_or(&[][..], |dh_out| &dh_out[of_row(b, width)]);
                    let (row, stream) = (&row, words.stream(b));
                    for_isa!(isa, state_gradient(row: &CellRow<'_>, stream: u32, arrival: Arrival, d: &mut [f32], carry: &mut [f32],
                                                 out: &[f32]));
                }
                if s.shape.projects {
                    through(live, d, width, hr, dm.data, hidden, false);
                }
                let z = gates.at_mut(t);
                // What goes through the cell: its own memory with a projection, since the gradient of W_hr wants the other.
                let d = if s.shape.projects { &mut *dm.data } else { d };
                for r in 0..n {
                    let b = part.start + r;
                    let z = &mut z[r * gate_cols..][..gate_cols];
                    let mut normed = norms.as_mut().map(|(x, y, factors)| {
                        let (x, y) = (&mut x.at_mut(t)[r * gate_cols..][..gate_cols], &mut y.at_mut(t)[r * gate_cols..][..gate_cols]);
                        let factors = &factors.at(t)[r * NORM_FACTORS..][..2];
                        NormGradient { x, y, factors: [factors[0], factors[1]] }
                    });
                    if t as u32 >= words.length(b) {
                        z.fill(0.0);
                        if let Some(NormGradient { x, y, .. }) = &mut normed {
                            x.fill(0.0);
                            y.fill(0.0);
                        }
                        continue;
                    }
                    let (d, dc) = (&mut d[r * hidden..][..hidden], &mut dc.data[r * hidden..][..hidden]);
                    let c_prev = &c[(before * rows + b) * hidden..][..hidden];
                    if s.is_plain() {
                        let d = &*d;
                        for_isa!(isa, fused gate_backward(z: &mut [f32], d: &[f32], dc: &mut [f32], c_prev: &[f32]));
                        continue;
                    }
                    let (row, stream) = (&row, words.stream(b));
                    let sums = &mut sums.data[r * sums_width..][..sums_width];
                    for_isa!(isa, fused cell_backward(row: &CellRow<'_>, stream: u32, z: &mut [f32], d: &mut [f32], dc: &mut [f32], sums: &mut [f32],
                                                c_prev: &[f32], normed: Option<NormGradient<'_>>));
                }
                let dz = norms.as_ref().map_or_else(|| gates.at(t), |(x, ..)| x.at(t));
                for (i, ((dx, weight), cols)) in dx.iter_mut().zip(ih).zip(dx_widths).enumerate() {
                    let Some(dx) = dx else { continue };
                    let (to, mut add) = (dx.at_mut(t), self.accumulate_dx);
                    if let (Some(dh_out), true) = (dh_out, self.passed_on == Some(i)) {
                        for (b, to) in part.clone().zip(to.chunks_exact_mut(width)) {
                            let from = if t as u32 >= words.length(b) { &[] } else { &dh_out[of_row(b, width)] };
                            take_passed_on(to, from, add);
                        }
                        add = true;
                    }
                    through(live, dz, gate_cols, weight, to, cols, add);
                }
            }
            // Added, since rows that ended before this range have their gradient there, and the others zero.
            let t = s.step(0);
            let dz = norms.as_ref().map_or_else(|| gates.at(t), |(_, y, _)| y.at(t));
            through(words.live(&part, t), dz, gate_cols, hh, product.data, width, false);
            let row = s.row(vectors, t);
            for (r, (d, carry)) in product.data.chunks_exact_mut(width).zip(carry_h.data.chunks_exact_mut(width)).enumerate() {
                state_gradient(&row, words.stream(part.start + r), Arrival::new(t, u32::MAX, false, true), d, carry, &[]);
            }
        });
    }
}

/// The gradient of a residual lane's output on its way past the cell, added to what is there or in its place.
fn take_passed_on(to: &mut [f32], from: &[f32], add: bool) {
    if add {
        to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
    } else if from.is_empty() {
        to.fill(0.0);
    } else {
        to.copy_from_slice(from);
    }
}
