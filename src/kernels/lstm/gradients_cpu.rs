//! Gradients of a lane's weights and biases as the CPU computes them: one pass over dz for the input's weights, the recurrent ones and the biases.
//!
//! dz is the right factor of all products and the terms of the biases' sums, so each block of it is read and packed once. Columns are split over
//! the threads; every sum runs over time in the same order whatever their number.

use std::ops::Range;

use anyhow::Result;

use super::{Lane, LaneGradients, LaneVectors, Launch, NONE, SweepArgs};
use crate::kernels::gemm::{BLOCK_K, BLOCK_M, BLOCK_N, pieces};
use crate::kernels::microkernel::{self, Ends, Factors, MatrixMut};
use crate::kernels::{Binding, Kernel, Operand, ShapeError, Span, at_least, cpu_only, multiple_of, read, read_write};
use crate::pool::{CpuContext, Divide};
use crate::shape::{GATES, PANEL};

/// Launches the products of a lane without norms.
///
/// # Errors
/// The launch's.
pub(super) fn gate_gradients(args: &SweepArgs<'_>, lane: &Lane, grads: &LaneGradients, launch: Launch<'_>) -> Result<()> {
    let (rows, at, shape) = (args.n_rows as usize, lane.places(args.n_rows), lane.shape);
    let nothing = lane.h.part(0, 0);
    let to = &grads.tensors;
    let bias = |offset: fn(&LaneVectors) -> u32| to.vectors.as_ref().filter(|v| offset(v) != NONE).map(|v| (v.span, offset(v)));
    let tensors = [Some(to.weight_ih), Some(to.weight_hh), bias(|v| v.bias_ih), bias(|v| v.bias_hh)];
    // Tensors of one buffer are one operand, from the first span's start to the last one's end.
    let mut outs = [nothing; 3];
    let mut n_outs = 0;
    for (span, _) in tensors.into_iter().flatten() {
        match outs[..n_outs].iter_mut().find(|out| out.buffer == span.buffer) {
            Some(out) => {
                let (start, end) = (out.offset.min(span.offset), (out.offset + out.len).max(span.offset + span.len));
                *out = Span { offset: start, len: end - start, ..span };
            }
            None => {
                outs[n_outs] = span;
                n_outs += 1;
            }
        }
    }
    let place = |(span, offset): (Span, u32)| {
        let out = outs[..n_outs].iter().position(|out| out.buffer == span.buffer).unwrap_or(0);
        Place { out, offset: span.offset - outs[out].offset + offset as usize }
    };
    let [_, _, bias_ih, bias_hh] = tensors;
    let biases = [bias_ih, bias_hh].map(|tensor| tensor.map(place));
    let places = lane.range.start as usize * rows..lane.range.end as usize * rows;
    let before = u32::from(lane.reverse);
    let kernel = GateGradients {
        places: places.clone(),
        gate_cols: shape.hidden as usize * GATES,
        dz: at.dx(0) as usize,
        x: [lane.x[0], lane.x[1]].map(|part| part.map(|part| (part.offset as usize, part.width as usize))),
        // What the recurrent product read: the states before the steps.
        h: (if shape.masks { at.masked(before) } else { at.h(before) } as usize, shape.width as usize),
        weight_ih: place(to.weight_ih),
        weight_hh: place(to.weight_hh),
        biases,
        accumulate: grads.accumulate,
    };
    let x = lane.x.map(|part| part.map_or(nothing, |part| part.span));
    launch(&kernel, &[x[0], x[1], lane.h, lane.gates, outs[0], outs[1], outs[2]])
}

/// Where a tensor's gradient lies.
#[derive(Clone, Copy)]
struct Place {
    /// Which of the outputs.
    out: usize,
    offset: usize,
}

/// What `gate_gradients` launches: sums over `places`, the T x B of the sweep.
struct GateGradients {
    places: Range<usize>,
    /// 4H.
    gate_cols: usize,
    dz: usize,
    /// Offset and width of the parts of x.
    x: [Option<(usize, usize)>; 2],
    h: (usize, usize),
    weight_ih: Place,
    weight_hh: Place,
    /// One sum, written twice where there are two.
    biases: [Option<Place>; 2],
    accumulate: bool,
}

const BINDINGS: &[Binding] = &[
    read("x"),
    read("more x"),
    read("h"),
    read("dz"),
    read_write("gradients"),
    read_write("more gradients"),
    read_write("other gradients"),
];

impl GateGradients {
    fn inputs(&self) -> usize {
        self.x.iter().flatten().map(|&(_, width)| width).sum()
    }

    /// All outputs with their lengths.
    fn outputs(&self) -> [Option<(Place, usize)>; 4] {
        let [bias_ih, bias_hh] = self.biases.map(|place| place.map(|place| (place, self.gate_cols)));
        [Some((self.weight_ih, self.inputs() * self.gate_cols)), Some((self.weight_hh, self.h.1 * self.gate_cols)), bias_ih, bias_hh]
    }
}

/// The parts of the outputs, which do not overlap.
fn carve<'a>(outs: [&'a mut [f32]; 3], places: [Option<(Place, usize)>; 4]) -> [&'a mut [f32]; 4] {
    let mut order = [0, 1, 2, 3];
    order.sort_by_key(|&i| places[i].map(|(place, _)| place.offset));
    let mut left = outs.map(|out| (0, out));
    let mut parts: [&'a mut [f32]; 4] = Default::default();
    for i in order {
        if let Some((place, len)) = places[i] {
            let (start, rest) = &mut left[place.out];
            let (_, from) = std::mem::take(rest).split_at_mut(place.offset - *start);
            let (part, behind) = from.split_at_mut(len);
            (parts[i], *rest, *start) = (part, behind, place.offset + len);
        }
    }
    parts
}

/// What one thread computes: some panels of 64 columns.
struct Part<'a> {
    /// Of the two parts of x, and of h.
    weights: [Option<MatrixMut<'a>>; 3],
    biases: [&'a mut [f32]; 2],
    scratch: &'a mut [f32],
    /// Floats of scratch for each panel.
    unit_scratch: usize,
}

impl Divide for Part<'_> {
    fn divide(self, at: usize) -> (Self, Self) {
        let mut behind = [const { None }; 3];
        let mut weights = self.weights;
        for (weight, behind) in weights.iter_mut().zip(&mut behind) {
            if let Some(whole) = weight.take() {
                let cols = (at * PANEL).min(whole.cols());
                let (a, b) = whole.split_cols(cols);
                (*weight, *behind) = (Some(a), Some(b));
            }
        }
        let [b0, b1] = self.biases.map(|bias| bias.split_at_mut((at * PANEL).min(bias.len())));
        let (scratch, more) = self.scratch.split_at_mut(at * self.unit_scratch);
        let unit_scratch = self.unit_scratch;
        (
            Self { weights, biases: [b0.0, b1.0], scratch, unit_scratch },
            Self { weights: behind, biases: [b0.1, b1.1], scratch: more, unit_scratch },
        )
    }
}

impl Kernel for GateGradients {
    cpu_only!("lstm_gate_gradients", BINDINGS);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "lstm_gate_gradients";
        multiple_of(NAME, "columns of the gates", self.gate_cols as u32, PANEL)?;
        for (part, len) in self.x.iter().zip(lens) {
            if let Some((offset, width)) = part {
                at_least(NAME, "x", *len, offset + self.places.end * width)?;
            }
        }
        at_least(NAME, "h", lens[2], self.h.0 + self.places.end * self.h.1)?;
        at_least(NAME, "dz", lens[3], self.dz + self.places.end * self.gate_cols)?;
        for (place, len) in self.outputs().into_iter().flatten() {
            at_least(NAME, "gradients", lens[4 + place.out], place.offset + len)?;
        }
        Ok(())
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [x0, x1, h, dz, out0, out1, out2] = operands else { unreachable!("seven operands") };
        let (k, n, isa, inputs) = (self.places.len(), self.gate_cols, ctx.isa, self.inputs());
        let from = |data: &Operand<'_>, offset: usize, width: usize| (offset + self.places.start * width, data.as_slice().len());
        let slice = |range: (usize, usize)| range.0..range.1;
        let dz = &dz.as_slice()[slice(from(dz, self.dz, n))];
        let lefts = [(self.x[0], &*x0), (self.x[1], &*x1), (Some(self.h), &*h)];
        let lefts = lefts.map(|(place, data)| place.map(|(offset, width)| (&data.as_slice()[slice(from(data, offset, width))], width)));
        let outs = [out0.as_mut_slice(), out1.as_mut_slice(), out2.as_mut_slice()];
        let [ih, hh, bias0, bias1] = carve(outs, self.outputs());
        // The parts of x are rows of the same panels.
        let (ih0, ih1) = MatrixMut::panels(ih, inputs, n, PANEL, PANEL * inputs).split_rows(self.x[0].map_or(0, |(_, width)| width));
        let weights = [lefts[0].map(|_| ih0), lefts[1].map(|_| ih1), Some(MatrixMut::panels(hh, self.h.1, n, PANEL, PANEL * self.h.1))];
        let (n_units, n_threads) = (n / PANEL, ctx.pool.n_threads());
        let block_k = BLOCK_K.min(k.max(1));
        let widest = lefts.iter().flatten().map(|&(_, width)| width).max().unwrap_or(0);
        let left_len = block_k * BLOCK_M.min(widest);
        let unit_scratch = (block_k * n.min(BLOCK_N) + left_len).div_ceil((n_units / n_threads).max(1));
        // Below about a million operations a second thread costs more than it saves.
        let min_units = (1usize << 19).div_ceil((k * PANEL * (inputs + self.h.1)).max(1));
        let work = Part { weights, biases: [bias0, bias1], scratch: ctx.scratch.take(unit_scratch * n_units), unit_scratch };
        ctx.pool.run(work, n_units, min_units, &|mut part: Part<'_>, units: Range<usize>| {
            let cols = units.start * PANEL..units.end * PANEL;
            let (packed_left, packed) = part.scratch.split_at_mut(left_len);
            for cols_now in pieces(cols.clone(), BLOCK_N, PANEL) {
                let within = cols_now.start - cols.start..cols_now.end - cols.start;
                for ks in pieces(0..k, BLOCK_K, 1) {
                    let add = self.accumulate || ks.start > 0;
                    for bias in part.biases.iter_mut().filter(|bias| !add && !bias.is_empty()) {
                        bias[within.clone()].fill(0.0);
                    }
                    let [first, second] = &mut part.biases;
                    let sums = [&mut **first, &mut **second].map(|bias| bias.get_mut(within.clone()).unwrap_or_default());
                    microkernel::pack_and_sum(isa, dz, n, ks.clone(), cols_now.clone(), packed, sums);
                    for (weight, left) in part.weights.iter_mut().zip(lefts) {
                        let (Some(weight), Some((left, width))) = (weight, left) else { continue };
                        for rows_now in pieces(0..width, BLOCK_M, 1) {
                            let left = microkernel::left_of_columns(left, width, ks.clone(), rows_now.clone(), packed_left);
                            let factors = Factors::packed(isa, ks.len(), left, packed);
                            let mut to = weight.part(rows_now, within.clone());
                            microkernel::multiply(isa, &mut to, [Some(factors), None], Ends { add, bias: None });
                        }
                    }
                }
            }
        });
    }
}
