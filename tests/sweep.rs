//! A whole LSTM layer swept over time, forward and backward, against an f64 oracle; and the properties a sweep must have whatever its numbers.
//!
//! The oracle knows no padding, panels or chunks: weights lie as `torch.nn.LSTM` has them, sizes are the true ones. [`Placed`] puts a problem where the
//! kernels want it and reads it back, and sees to it that padding stays zero, or untouched, and guard bands intact.

use std::ops::Range;

use carrousel::backend::around::Around;
use carrousel::backend::{Backend, Span, SweepPlan, read_now};
use carrousel::kernels::Tolerance;
use carrousel::kernels::lstm::{
    Cell, FLAG_NON_FINITE, Lane, LaneGradients, LanePart, LaneShape, LaneStarts, LaneTensors, LaneVectors, NONE, SWEEP_ROWS, SweepArgs,
    SweepTrial, SweepWay, carries, fits, most_steps, sweep_plan, whole_sweep_plan,
};
use carrousel::rng::{Purpose, StepKey, Stream};
use carrousel::shape::{ALIGN, pad_inner, pad_units, round_up};

use crate::adapters::{DEADLINE, Device, devices, gpus};
use crate::compare::{Outcome, Source, What, compare};
use crate::memory::{Guarded, POISON_WORD, floats};
use crate::oracle::{RowCell, RowStep, cell_mask, gate_column, weight_at};

/// Sums of up to a few hundred products of numbers below 1, through up to 20 steps of functions with errors of a few ulp.
const TOLERANCE: Tolerance = Tolerance { absolute: 2e-5, relative: 1e-4, reason: "f32 sums through a few steps of recurrence" };
/// A norm divides by the deviation of a few units, which may be small: what is off before is off by so much more.
const NORM_TOLERANCE: Tolerance = Tolerance { absolute: 3e-4, relative: 1e-3, reason: "norms over few units magnify what was rounded" };
/// The same arithmetic in another grouping.
const ROUNDING: Tolerance = Tolerance { absolute: 2e-6, relative: 1e-5, reason: "the same sums, cut elsewhere" };

/// One layer in one direction with all that goes in. Row-major, true sizes.
#[derive(Clone, Debug)]
struct Problem {
    seed: u64,
    n_steps: usize,
    n_rows: usize,
    n_inputs: usize,
    hidden: usize,
    reverse: bool,
    /// `[B]`.
    lengths: Option<Vec<u32>>,
    /// `[T, B, I]`.
    x: Vec<f32>,
    /// `[4H, I]`, `[4H, H]`, gates i f g o.
    weight_ih: Vec<f32>,
    weight_hh: Vec<f32>,
    /// `[4H]`.
    bias_ih: Option<Vec<f32>>,
    bias_hh: Option<Vec<f32>>,
    /// `[B, H]`.
    h0: Vec<f32>,
    c0: Vec<f32>,
    /// Gradient of the outputs `[T, B, H]`.
    dh_out: Option<Vec<f32>>,
    /// Gradients of the final state `[B, H]`.
    dh_last: Vec<f32>,
    dc_last: Vec<f32>,
    /// How the cell differs from the plain one; where the tensors lie is up to [`Placed`].
    cell: Cell,
    /// `[3, H]`.
    peephole: Option<Vec<f32>>,
    /// `[R, H]`; then h, its gradients and the columns of weight_hh are R wide.
    projection: Option<Vec<f32>>,
    /// Gains `[4H]` of both products, gain and bias `[2, H]` of the cell state.
    norm: Option<[Vec<f32>; 3]>,
}

/// Global stream number of a row.
fn stream(row: usize) -> usize {
    1000 + 7 * row
}

/// What comes out of a sweep there and back, true sizes.
#[derive(Clone, Debug)]
struct Solution<F> {
    /// `[T, B, H]`, zero behind the end of a row.
    outputs: Vec<F>,
    /// `[B, H]`, at the end of each row.
    h_last: Vec<F>,
    c_last: Vec<F>,
    dx: Vec<F>,
    dweight_ih: Vec<F>,
    dweight_hh: Vec<F>,
    dbias: Vec<F>,
    dpeephole: Vec<F>,
    dprojection: Vec<F>,
    dnorm: [Vec<F>; 3],
    dh0: Vec<F>,
    dc0: Vec<F>,
}

impl<F: Clone> Solution<F> {
    fn parts(&self) -> [(&'static str, &Vec<F>); 14] {
        [
            ("outputs", &self.outputs),
            ("final h", &self.h_last),
            ("final c", &self.c_last),
            ("dx", &self.dx),
            ("gradient of weight_ih", &self.dweight_ih),
            ("gradient of weight_hh", &self.dweight_hh),
            ("gradient of the biases", &self.dbias),
            ("gradient of the peepholes", &self.dpeephole),
            ("gradient of the projection", &self.dprojection),
            ("gradient of the gain of the input's product", &self.dnorm[0]),
            ("gradient of the gain of the recurrent product", &self.dnorm[1]),
            ("gradient of gain and bias of the cell state", &self.dnorm[2]),
            ("gradient of the initial h", &self.dh0),
            ("gradient of the initial c", &self.dc0),
        ]
    }
}

impl Problem {
    /// Sizes T, B, I, H; everything else is drawn.
    fn new(seed: u64, [n_steps, n_rows, n_inputs, hidden]: [usize; 4]) -> Self {
        let mut tensor = 0;
        let mut draw = |len: usize, range: f32| -> Vec<f32> {
            tensor += 1;
            let mut stream = Stream::new(StepKey::new(seed, 0), Purpose::Test, tensor, 0);
            (0..len).map(|_| (2.0 * stream.uniform() - 1.0) * range).collect()
        };
        let weight = 1.0 / (hidden as f32).sqrt();
        Self {
            seed,
            n_steps,
            n_rows,
            n_inputs,
            hidden,
            reverse: false,
            lengths: None,
            x: draw(n_steps * n_rows * n_inputs, 1.0),
            weight_ih: draw(4 * hidden * n_inputs, weight),
            weight_hh: draw(4 * hidden * hidden, weight),
            bias_ih: Some(draw(4 * hidden, weight)),
            bias_hh: Some(draw(4 * hidden, weight)),
            h0: draw(n_rows * hidden, 0.8),
            c0: draw(n_rows * hidden, 1.5),
            dh_out: Some(draw(n_steps * n_rows * hidden, 1.0)),
            dh_last: draw(n_rows * hidden, 1.0),
            dc_last: draw(n_rows * hidden, 1.0),
            cell: Cell::PLAIN,
            peephole: None,
            projection: None,
            norm: None,
        }
    }

    /// R: floats of h.
    fn width(&self) -> usize {
        self.projection.as_ref().map_or(self.hidden, |w| w.len() / self.hidden)
    }

    fn draw(&self, tensor: u32, len: usize, range: f32) -> Vec<f32> {
        let mut stream = Stream::new(StepKey::new(self.seed, 0), Purpose::Test, tensor, 0);
        (0..len).map(|_| (2.0 * stream.uniform() - 1.0) * range).collect()
    }

    /// With h projected to `width` units.
    fn projected(self, width: usize) -> Self {
        let (t, b, hidden) = (self.n_steps, self.n_rows, self.hidden);
        Self {
            projection: Some(self.draw(101, width * hidden, 1.0 / (hidden as f32).sqrt())),
            weight_hh: self.draw(102, 4 * hidden * width, 1.0 / (width as f32).sqrt()),
            h0: self.draw(103, b * width, 0.8),
            dh_out: self.dh_out.as_ref().map(|_| self.draw(104, t * b * width, 1.0)),
            dh_last: self.draw(105, b * width, 1.0),
            ..self
        }
    }

    /// With layer normalisation.
    fn normed(self) -> Self {
        let hidden = self.hidden;
        let near_one = |values: Vec<f32>| values.into_iter().map(|v| 1.0 + v).collect();
        let gains = [near_one(self.draw(106, 4 * hidden, 0.5)), near_one(self.draw(107, 4 * hidden, 0.5)), self.draw(108, 2 * hidden, 1.0)];
        Self { norm: Some(gains), ..self }
    }

    /// The same with another cell.
    fn with_cell(self, cell: Cell) -> Self {
        Self { cell: Cell { key0: 5, key1: 6, lane: 3, ..cell }, ..self }
    }

    fn with_peepholes(self) -> Self {
        Self { peephole: Some(self.draw(100, 3 * self.hidden, 1.0)), ..self }
    }

    /// Rows of these lengths; what lies behind the end of a row is zero, as the data layer leaves it.
    fn with_lengths(mut self, lengths: &[u32]) -> Self {
        assert_eq!(lengths.len(), self.n_rows);
        let (n_rows, n_inputs) = (self.n_rows, self.n_inputs);
        for (place, row) in self.x.chunks_exact_mut(n_inputs).enumerate() {
            if (place / n_rows) as u32 >= lengths[place % n_rows] {
                row.fill(0.0);
            }
        }
        self.lengths = Some(lengths.to_vec());
        self
    }

    fn reversed(mut self) -> Self {
        self.reverse = true;
        self
    }

    fn length(&self, row: usize) -> usize {
        self.lengths.as_ref().map_or(self.n_steps, |lengths| lengths[row] as usize)
    }

    /// Steps of a row in the order in which the state passes through them.
    fn order(&self, row: usize) -> Vec<usize> {
        let steps = 0..self.length(row);
        if self.reverse { steps.rev().collect() } else { steps.collect() }
    }

    /// Steps `range` with the state handed in.
    fn window(&self, range: Range<usize>, h0: Vec<f32>, c0: Vec<f32>) -> Self {
        let cut = |values: &[f32], width: usize| values[range.start * self.n_rows * width..range.end * self.n_rows * width].to_vec();
        Self {
            n_steps: range.len(),
            x: cut(&self.x, self.n_inputs),
            dh_out: self.dh_out.as_ref().map(|d| cut(d, self.width())),
            h0,
            c0,
            ..self.clone()
        }
    }

    /// Only batch row `row`.
    fn row(&self, row: usize) -> Self {
        let pick = |values: &[f32], width: usize| -> Vec<f32> {
            values.chunks_exact(width).skip(row).step_by(self.n_rows).flatten().copied().collect()
        };
        Self {
            n_rows: 1,
            lengths: self.lengths.as_ref().map(|lengths| vec![lengths[row]]),
            x: pick(&self.x, self.n_inputs),
            h0: pick(&self.h0, self.width()),
            c0: pick(&self.c0, self.hidden),
            dh_out: self.dh_out.as_ref().map(|d| pick(d, self.width())),
            dh_last: pick(&self.dh_last, self.width()),
            dc_last: pick(&self.dc_last, self.hidden),
            ..self.clone()
        }
    }
}

/// The layer forward and back, row by row and step by step, from the equations.
fn solve(p: &Problem) -> Solution<f64> {
    let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|&v| f64::from(v)).collect() };
    let (hidden, width, n_inputs, n_rows) = (p.hidden, p.width(), p.n_inputs, p.n_rows);
    let (x, w, r) = (wide(&p.x), wide(&p.weight_ih), wide(&p.weight_hh));
    let (peephole, projection) = (p.peephole.as_deref().map(wide), p.projection.as_deref().map(wide));
    let norm = p.norm.as_ref().map(|norm| norm.each_ref().map(|gain| wide(gain)));
    let row_cell = RowCell {
        cell: &p.cell,
        hidden,
        peephole: peephole.as_deref(),
        norm: norm.as_ref().map(|norm| norm.each_ref().map(|gain| &gain[..])),
        projection: projection.as_deref(),
    };
    let bias: Vec<f64> =
        (0..4 * hidden).map(|j| [&p.bias_ih, &p.bias_hh].into_iter().flatten().map(|bias| f64::from(bias[j])).sum()).collect();
    let zeros = |of: &Option<Vec<f64>>| vec![0.0; of.as_ref().map_or(0, Vec::len)];
    let mut s = Solution {
        outputs: vec![0.0; p.n_steps * n_rows * width],
        h_last: Vec::new(),
        c_last: Vec::new(),
        dx: vec![0.0; x.len()],
        dweight_ih: vec![0.0; w.len()],
        dweight_hh: vec![0.0; r.len()],
        dbias: vec![0.0; 4 * hidden],
        dpeephole: zeros(&peephole),
        dprojection: zeros(&projection),
        dnorm: norm.as_ref().map_or_else(Default::default, |norm| norm.each_ref().map(|gain| vec![0.0; gain.len()])),
        dh0: Vec::new(),
        dc0: Vec::new(),
    };
    let add = |to: &mut [f64], values: &[f64]| to.iter_mut().zip(values).for_each(|(to, v)| *to += v);
    for b in 0..n_rows {
        let mut h = wide(&p.h0[b * width..][..width]);
        let mut c = wide(&p.c0[b * hidden..][..hidden]);
        let mut past: Vec<(usize, Vec<f64>, RowStep)> = Vec::new();
        for t in p.order(b) {
            let place = t * n_rows + b;
            // What the recurrent product reads.
            let r_in: Vec<f64> = (0..width).map(|u| h[u] * cell_mask(&p.cell, stream(b), u)).collect();
            let by_input: Vec<f64> =
                (0..4 * hidden).map(|j| (0..n_inputs).map(|k| w[j * n_inputs + k] * x[place * n_inputs + k]).sum()).collect();
            let by_state: Vec<f64> = (0..4 * hidden).map(|j| (0..width).map(|u| r[j * width + u] * r_in[u]).sum()).collect();
            let step = row_cell.forward(&by_input, &by_state, &bias, &h, &c, stream(b), t as u32);
            (h, c) = (step.h.clone(), step.c.clone());
            s.outputs[place * width..][..width].copy_from_slice(&h);
            past.push((t, r_in, step));
        }
        s.h_last.extend(&h);
        s.c_last.extend(&c);
        let mut dh = wide(&p.dh_last[b * width..][..width]);
        let mut dc = wide(&p.dc_last[b * hidden..][..hidden]);
        for (t, r_in, step) in past.into_iter().rev() {
            let place = t * n_rows + b;
            if let Some(dh_out) = &p.dh_out {
                (0..width).for_each(|u| dh[u] += f64::from(dh_out[place * width + u]));
            }
            let back = row_cell.backward(&step, &dh, &dc);
            (dh, dc) = (back.h, back.c);
            add(&mut s.dbias, &back.z);
            add(&mut s.dpeephole, &back.peephole);
            add(&mut s.dprojection, &back.projection);
            s.dnorm.iter_mut().zip(&back.norm).for_each(|(to, values)| add(to, values));
            for j in 0..4 * hidden {
                for k in 0..n_inputs {
                    s.dweight_ih[j * n_inputs + k] += back.x[j] * x[place * n_inputs + k];
                    s.dx[place * n_inputs + k] += back.x[j] * w[j * n_inputs + k];
                }
                for (u, r_in) in r_in.iter().enumerate() {
                    s.dweight_hh[j * width + u] += back.y[j] * r_in;
                }
            }
            for u in 0..width {
                dh[u] += cell_mask(&p.cell, stream(b), u) * (0..4 * hidden).map(|j| back.y[j] * r[j * width + u]).sum::<f64>();
            }
        }
        s.dh0.extend(&dh);
        s.dc0.extend(&dc);
    }
    s
}

/// Where the tensors of a lane lie in its bucket: padded sizes, gaps between them.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    n_inputs: usize,
    hidden: usize,
    /// R, padded.
    width: usize,
    weight_ih: usize,
    weight_hh: usize,
    weight_hr: Option<usize>,
    bias_ih: Option<usize>,
    bias_hh: Option<usize>,
    peephole: Option<usize>,
    norm: Option<[usize; 3]>,
    len: usize,
}

impl Bucket {
    fn new(p: &Problem, hidden: usize) -> Self {
        let n_inputs = pad_inner(p.n_inputs);
        let mut next = ALIGN;
        let mut place = |len: usize| {
            let at = next;
            // A gap of one alignment unit, so that a tensor that is read or written too far shows.
            next = round_up(at + len, ALIGN) + ALIGN;
            at
        };
        let weight_ih = place(4 * hidden * n_inputs);
        let width = if p.projection.is_some() { pad_units(p.width()) } else { hidden };
        let weight_hh = place(4 * hidden * width);
        let weight_hr = p.projection.as_ref().map(|_| place(hidden * width));
        let bias_ih = p.bias_ih.as_ref().map(|_| place(4 * hidden));
        let bias_hh = p.bias_hh.as_ref().map(|_| place(4 * hidden));
        let peephole = p.peephole.as_ref().map(|_| place(3 * hidden));
        let norm = p.norm.as_ref().map(|_| [4 * hidden, 4 * hidden, 2 * hidden].map(&mut place));
        Self { n_inputs, hidden, width, weight_ih, weight_hh, weight_hr, bias_ih, bias_hh, peephole, norm, len: next }
    }

    /// The tensors within `span`; some by a part of it that begins elsewhere, as tensors of several buckets do.
    fn tensors(&self, span: Span) -> LaneTensors {
        let from = |at: usize| span.part(at - ALIGN, span.len - (at - ALIGN));
        let norm = self.norm.map_or([None; 3], |norm| norm.map(Some));
        let first = [self.bias_ih, self.bias_hh, self.peephole].into_iter().chain(norm).flatten().min();
        let vectors = first.map(|first| {
            let at = |place: Option<usize>| place.map_or(NONE, |at| (at - first + ALIGN) as u32);
            let [norm_ih, norm_hh, norm_c] = norm.map(at);
            let (bias_ih, bias_hh, peephole) = (at(self.bias_ih), at(self.bias_hh), at(self.peephole));
            LaneVectors { span: from(first), bias_ih, bias_hh, peephole, norm_ih, norm_hh, norm_c }
        });
        let weight_hr = self.weight_hr.map(|at| (from(at), ALIGN as u32));
        LaneTensors { weight_ih: (span, self.weight_ih as u32), weight_hh: (from(self.weight_hh), ALIGN as u32), weight_hr, vectors }
    }

    /// Puts `[4H, K]` of torch's order into panels at `at`.
    fn put_weight(&self, words: &mut [f32], at: usize, k_padded: usize, weight: &[f32], p: &Problem) {
        words[at..at + 4 * self.hidden * k_padded].fill(0.0);
        let n = weight.len() / (4 * p.hidden);
        for (row, values) in weight.chunks_exact(n).enumerate() {
            for (k, value) in values.iter().enumerate() {
                words[at + weight_at(k_padded, k, row % p.hidden, row / p.hidden)] = *value;
            }
        }
    }

    /// The bucket's words: parameters, poison between them.
    fn pack(&self, p: &Problem) -> Vec<f32> {
        let mut words = vec![f32::from_bits(POISON_WORD); self.len];
        self.put_weight(&mut words, self.weight_ih, self.n_inputs, &p.weight_ih, p);
        self.put_weight(&mut words, self.weight_hh, self.width, &p.weight_hh, p);
        let gains = self.norm.map_or([None; 2], |[ih, hh, _]| [Some(ih), Some(hh)]);
        let [gain_ih, gain_hh] = p.norm.as_ref().map_or([None, None], |[ih, hh, _]| [Some(ih.clone()), Some(hh.clone())]);
        let of_gates = [(self.bias_ih, &p.bias_ih), (self.bias_hh, &p.bias_hh), (gains[0], &gain_ih), (gains[1], &gain_hh)];
        for (at, bias) in of_gates {
            if let (Some(at), Some(bias)) = (at, bias) {
                words[at..at + 4 * self.hidden].fill(0.0);
                for (row, value) in bias.iter().enumerate() {
                    words[at + gate_column(row % p.hidden, row / p.hidden)] = *value;
                }
            }
        }
        if let (Some(at), Some(peephole)) = (self.peephole, &p.peephole) {
            words[at..at + 3 * self.hidden].copy_from_slice(&widen(peephole, p.hidden, self.hidden));
        }
        if let (Some([.., at]), Some([.., c])) = (self.norm, &p.norm) {
            words[at..at + 2 * self.hidden].copy_from_slice(&widen(c, p.hidden, self.hidden));
        }
        if let (Some(at), Some(projection)) = (self.weight_hr, &p.projection) {
            words[at..at + self.width * self.hidden].fill(0.0);
            let rows = widen(projection, p.hidden, self.hidden);
            words[at..at + rows.len()].copy_from_slice(&rows);
        }
        words
    }

    /// Reads `[4H, K]` back, and checks that what lies in the padding is `base`, as before.
    fn take(&self, words: &[f32], tensor: &Tensor, p: &Problem, base: f32) -> Vec<f32> {
        let value = |k: usize, unit: usize, gate: usize| words[tensor.at + weight_at(tensor.padded, k, unit, gate)];
        for unit in 0..self.hidden {
            for k in (0..tensor.padded).filter(|&k| unit >= p.hidden || k >= tensor.n_inputs) {
                for gate in 0..4 {
                    let found = value(k, unit, gate);
                    assert!(found == base, "{}: {found} in the padding, unit {unit}, input {k}", tensor.name);
                }
            }
        }
        let rows = (0..4 * p.hidden).flat_map(|row| (0..tensor.n_inputs).map(move |k| (row, k)));
        rows.map(|(row, k)| value(k, row % p.hidden, row / p.hidden)).collect()
    }
}

/// A tensor `[4H, K]` in a bucket; a bias has K = 1.
struct Tensor {
    name: &'static str,
    at: usize,
    /// K and K padded.
    n_inputs: usize,
    padded: usize,
}

/// How a sweep is done.
#[derive(Clone, Debug)]
struct Manner {
    /// Ranges in time, in rising order, together all steps.
    chunks: Vec<Range<u32>>,
    /// Padded hidden size; 0 for the smallest.
    hidden: usize,
    /// What the gradients hold before, where they are added to it.
    accumulate_onto: Option<f32>,
}

impl Manner {
    fn whole(p: &Problem) -> Self {
        Self { chunks: std::iter::once(0..p.n_steps as u32).collect(), hidden: 0, accumulate_onto: None }
    }
}

/// A problem in a device's memory.
struct Placed<'p> {
    problem: &'p Problem,
    device: Device,
    bucket: Bucket,
    manner: Manner,
    params: Guarded,
    x: Guarded,
    gates: Guarded,
    h: Guarded,
    c: Guarded,
    flags: Guarded,
    rows: Option<Guarded>,
    dh_out: Option<Guarded>,
    carry: Guarded,
    dh: Option<Guarded>,
    grads: Guarded,
    dx: Guarded,
}

/// Floats before `x` and `dh_out` in their spans.
const X_OFFSET: usize = 4;
const DH_OFFSET: usize = 8;

/// Rows of `from` floats as rows of `to`, filled up with zeros.
fn widen(values: &[f32], from: usize, to: usize) -> Vec<f32> {
    values.chunks_exact(from).flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0.0, to - from))).collect()
}

/// The other way; the padding must be zero.
fn narrow(values: &[f32], from: usize, to: usize, name: &str) -> Vec<f32> {
    for (row, values) in values.chunks_exact(from).enumerate() {
        assert!(values[to..].iter().all(|v| *v == 0.0), "{name}, row {row}: padding is not zero: {:?}", &values[to..]);
    }
    values.chunks_exact(from).flat_map(|row| &row[..to]).copied().collect()
}

impl<'p> Placed<'p> {
    fn new(backend: &mut dyn Backend, device: Device, problem: &'p Problem, manner: &Manner) -> Self {
        let p = problem;
        let hidden = if manner.hidden == 0 { pad_units(p.hidden) } else { manner.hidden };
        let bucket = Bucket::new(p, hidden);
        let poison = |len: usize| vec![f32::from_bits(POISON_WORD); len];
        let shape = Self::shape_of(p, &bucket);
        let (places, width) = (p.n_steps * p.n_rows, bucket.width);
        let states = |initial: &[f32], units: usize, padded: usize, len: usize| {
            let mut words = poison(len);
            let state = p.n_rows * padded;
            let at = if p.reverse { p.n_steps * state } else { 0 };
            words[at..at + state].copy_from_slice(&widen(initial, units, padded));
            words
        };
        // Lengths, then stream numbers; what is not used is poison.
        let rows = |p: &Problem| {
            let lengths = p.lengths.clone().unwrap_or_else(|| vec![POISON_WORD; p.n_rows]);
            [lengths, (0..p.n_rows).map(|b| stream(b) as u32).collect()].concat()
        };
        let has_rows = p.lengths.is_some() || p.cell.draws == 1 || p.cell.is_masked();
        let behind = |offset: usize, words: Vec<f32>| [poison(offset), words].concat();
        let x = behind(X_OFFSET, widen(&p.x, p.n_inputs, bucket.n_inputs));
        let mut carry = [widen(&p.dh_last, p.width(), width), widen(&p.dc_last, p.hidden, hidden)].concat();
        carry.resize(shape.carry_len(p.n_rows), f32::from_bits(POISON_WORD));
        let dh_out = p.dh_out.as_ref().map(|d| behind(DH_OFFSET, widen(d, p.width(), width)));
        let h = states(&p.h0, p.width(), width, shape.h_len(places, p.n_rows));
        let c = states(&p.c0, p.hidden, hidden, shape.c_len(places, p.n_rows));
        let grads = vec![manner.accumulate_onto.unwrap_or(f32::from_bits(POISON_WORD)); bucket.len];
        let mut put = |label: &str, values: &[f32]| Guarded::upload_f32(backend, label, values);
        Self {
            params: put("params", &bucket.pack(p)),
            x: put("x", &x),
            gates: put("gates", &poison(shape.gates_len(places))),
            h: put("h", &h),
            c: put("c", &c),
            flags: put("flags", &[0.0]),
            rows: has_rows.then(|| put("rows", bytemuck::cast_slice(&rows(p)))),
            dh_out: dh_out.map(|words| put("dh_out", &words)),
            carry: put("carry", &carry),
            dh: (shape.dh_len(places) > 0).then(|| put("dh", &poison(shape.dh_len(places)))),
            grads: put("grads", &grads),
            dx: put("dx", &poison(p.n_steps * p.n_rows * bucket.n_inputs)),
            problem,
            device,
            bucket,
            manner: manner.clone(),
        }
    }

    fn shape_of(p: &Problem, bucket: &Bucket) -> LaneShape {
        LaneShape {
            hidden: bucket.hidden as u32,
            units: p.hidden as u32,
            width: bucket.width as u32,
            projects: p.projection.is_some(),
            norms: p.norm.is_some(),
            peepholes: p.peephole.is_some(),
            masks: p.cell.is_masked(),
            outputs: false,
        }
    }

    fn lane(&self, range: Range<u32>, accumulate: bool, gradients: bool) -> Lane {
        Lane {
            shape: Self::shape_of(self.problem, &self.bucket),
            n_steps: self.problem.n_steps as u32,
            reverse: self.problem.reverse,
            tensors: self.bucket.tensors(self.params.span),
            x: [Some(self.part(self.x.span, X_OFFSET)), None],
            gates: self.gates.span,
            residual: None,
            starts: LaneStarts::default(),
            h: self.h.span,
            c: self.c.span,
            range,
            rows: self.rows.as_ref().map(|rows| rows.span),
            use_lengths: self.problem.lengths.is_some(),
            cell: Cell { streams: self.problem.n_rows as u32, ..self.problem.cell },
            backward: gradients.then(|| LaneGradients {
                dh_out: self.dh_out.as_ref().map(|d| (d.span, DH_OFFSET as u32)),
                carry: self.carry.span,
                dh: self.dh.as_ref().map(|dh| dh.span),
                tensors: self.bucket.tensors(self.grads.span),
                accumulate,
                dx: [Some(self.part(self.dx.span, 0)), None],
                accumulate_dx: false,
            }),
        }
    }

    fn part(&self, span: Span, offset: usize) -> LanePart {
        LanePart { span, offset: offset as u32, width: self.bucket.n_inputs as u32 }
    }

    /// Chunks in the order in which the state passes through them.
    fn chunks_forward(&self) -> Vec<Range<u32>> {
        let mut chunks = self.manner.chunks.clone();
        if self.problem.reverse {
            chunks.reverse();
        }
        chunks
    }

    fn forward(&self, backend: &mut dyn Backend) {
        for range in self.chunks_forward() {
            let lanes = [self.lane(range, false, false)];
            let args = SweepArgs { n_rows: self.problem.n_rows as u32, lanes: &lanes, flags: self.flags.span, gradients: false };
            backend.sweep(&args).expect("a forward sweep");
        }
    }

    fn backward(&self, backend: &mut dyn Backend) {
        for (i, range) in self.chunks_forward().into_iter().rev().enumerate() {
            let lanes = [self.lane(range, i > 0 || self.manner.accumulate_onto.is_some(), true)];
            let args = SweepArgs { n_rows: self.problem.n_rows as u32, lanes: &lanes, flags: self.flags.span, gradients: true };
            backend.sweep(&args).expect("a backward sweep");
        }
    }

    fn what(&self, operand: &'static str) -> What<'static> {
        What { kernel: "sweep", case: "placed", seed: self.problem.seed, operand }
    }

    fn words(&self, backend: &mut dyn Backend, operand: &Guarded, name: &'static str) -> Vec<u32> {
        operand.download(backend, self.device, &self.what(name)).unwrap_or_else(|e| panic!("{e}"))
    }

    /// The word that a non-finite pre-activation raises.
    fn flag(&self, backend: &mut dyn Backend) -> u32 {
        self.words(backend, &self.flags, "flags")[FLAG_NON_FINITE]
    }

    /// What the sweeps left, at true sizes; checks guards, paddings, and what only is read. Frees everything.
    fn finish(self, backend: &mut dyn Backend) -> Solution<f32> {
        let (p, bucket) = (self.problem, self.bucket);
        let (hidden, width, state) = (bucket.hidden, bucket.width, p.n_rows * bucket.width);
        assert_eq!(self.flag(backend), 0, "finite values raised the flag");
        let params: Vec<u32> = bytemuck::cast_vec(bucket.pack(p));
        assert!(self.words(backend, &self.params, "params") == params, "the sweep wrote to its parameters");
        self.words(backend, &self.x, "x");
        self.words(backend, &self.gates, "gates");
        let h = floats(self.words(backend, &self.h, "h"));
        let c = floats(self.words(backend, &self.c, "c"));
        let outputs = if p.reverse { &h[..p.n_steps * state] } else { &h[state..(p.n_steps + 1) * state] };
        let mut outputs = narrow(outputs, width, p.width(), "outputs");
        for (place, output) in outputs.chunks_exact_mut(p.width()).enumerate() {
            let (t, b) = (place / p.n_rows, place % p.n_rows);
            if t >= p.length(b) {
                // What a row that has ended keeps: its last state, or in reverse the one that it has not left yet.
                let kept = if p.reverse { p.n_steps } else { p.length(b) };
                let kept = &h[kept * state + b * width..][..p.width()];
                assert_eq!(output, kept, "row {b} has ended before step {t}");
                output.fill(0.0);
            }
        }
        let last = |states: &[f32], padded: usize, units: usize, name: &str| -> Vec<f32> {
            let (at, state) = (if p.reverse { 0 } else { p.n_steps }, p.n_rows * padded);
            narrow(&states[at * state..(at + 1) * state], padded, units, name)
        };
        let (h_last, c_last) = (last(&h, width, p.width(), "final h"), last(&c, hidden, p.hidden, "final c"));
        let carry = floats(self.words(backend, &self.carry, "carry"));
        let (dh0, dc0) = carry[..p.n_rows * (width + hidden)].split_at(state);
        let grads = floats(self.words(backend, &self.grads, "grads"));
        let base = self.manner.accumulate_onto.unwrap_or(0.0);
        let weight_ih = Tensor { name: "gradient of weight_ih", at: bucket.weight_ih, n_inputs: p.n_inputs, padded: bucket.n_inputs };
        let weight_hh = Tensor { name: "gradient of weight_hh", at: bucket.weight_hh, n_inputs: p.width(), padded: width };
        let of_bias = |at: usize| bucket.take(&grads, &Tensor { name: "gradient of a bias", at, n_inputs: 1, padded: 1 }, p, base);
        let biases: Vec<Vec<f32>> = [bucket.bias_ih, bucket.bias_hh].into_iter().flatten().map(of_bias).collect();
        if let [ih, hh] = &biases[..] {
            assert_eq!(ih, hh, "both biases have the same gradient");
        }
        let before = self.manner.accumulate_onto.map_or(POISON_WORD, f32::to_bits);
        let tensors = [
            Some((bucket.weight_ih, 4 * hidden * bucket.n_inputs)),
            Some((bucket.weight_hh, 4 * hidden * width)),
            bucket.weight_hr.map(|at| (at, width * hidden)),
            bucket.norm.map(|[ih, ..]| (ih, 4 * hidden)),
            bucket.norm.map(|[_, hh, _]| (hh, 4 * hidden)),
            bucket.norm.map(|[.., c]| (c, 2 * hidden)),
            bucket.bias_ih.map(|at| (at, 4 * hidden)),
            bucket.bias_hh.map(|at| (at, 4 * hidden)),
            bucket.peephole.map(|at| (at, 3 * hidden)),
        ];
        // Rows of units whose padding is as before.
        let unit_rows = |at: usize, n: usize, what: &str| -> Vec<f32> {
            let rows = grads[at..at + n * hidden].chunks_exact(hidden);
            rows.flat_map(|row| {
                assert!(row[p.hidden..].iter().all(|v| *v == base), "gradient of {what}: padding");
                &row[..p.hidden]
            })
            .copied()
            .collect()
        };
        let dpeephole = bucket.peephole.map(|at| unit_rows(at, 3, "the peepholes"));
        let dnorm = bucket.norm.map(|[ih, hh, c]| [of_bias(ih), of_bias(hh), unit_rows(c, 2, "the norm of the cell state")]);
        let dprojection = bucket.weight_hr.map(|at| {
            let rows = unit_rows(at, width, "the projection");
            assert!(rows[p.width() * p.hidden..].iter().all(|v| *v == base), "gradient of the projection: padding");
            rows[..p.width() * p.hidden].to_vec()
        });
        for (i, value) in grads.iter().enumerate() {
            let is_tensor = tensors.iter().flatten().any(|&(at, len)| (at..at + len).contains(&i));
            assert!(is_tensor || value.to_bits() == before, "gradients: word {i} lies between tensors and became {value}");
        }
        let dx = floats(self.words(backend, &self.dx, "dx"));
        let solution = Solution {
            outputs,
            h_last,
            c_last,
            dx: narrow(&dx, bucket.n_inputs, p.n_inputs, "dx"),
            dweight_ih: bucket.take(&grads, &weight_ih, p, base),
            dweight_hh: bucket.take(&grads, &weight_hh, p, base),
            dbias: biases.into_iter().next().unwrap_or_default(),
            dpeephole: dpeephole.unwrap_or_default(),
            dprojection: dprojection.unwrap_or_default(),
            dnorm: dnorm.unwrap_or_default(),
            dh0: narrow(dh0, width, p.width(), "gradient of the initial h"),
            dc0: narrow(dc0, hidden, p.hidden, "gradient of the initial c"),
        };
        let operands = [self.params, self.x, self.gates, self.h, self.c, self.flags, self.carry, self.grads, self.dx];
        operands.into_iter().chain(self.rows).chain(self.dh_out).chain(self.dh).for_each(|operand| operand.free(backend));
        solution
    }
}

/// There and back on a device.
fn run(backend: &mut dyn Backend, device: Device, p: &Problem, manner: &Manner) -> Solution<f32> {
    let placed = Placed::new(backend, device, p, manner);
    placed.forward(backend);
    placed.backward(backend);
    placed.finish(backend)
}

/// Compares all parts of two solutions; tensors summed over T x B get an absolute tolerance that grows with its root.
fn agree<W: crate::compare::Number, G: crate::compare::Number>(
    p: &Problem,
    label: &str,
    want: (Source, &Solution<W>),
    got: (Source, &Solution<G>),
    tolerance: &Tolerance,
) {
    let n_terms = ((p.n_steps * p.n_rows) as f64).sqrt();
    for ((name, w), (_, g)) in want.1.parts().into_iter().zip(got.1.parts()) {
        let is_absent = match name {
            "gradient of the biases" => p.bias_ih.is_none() && p.bias_hh.is_none(),
            "gradient of the peepholes" => p.peephole.is_none(),
            "gradient of the projection" => p.projection.is_none(),
            _ if name.starts_with("gradient of the gain") || name.starts_with("gradient of gain") => p.norm.is_none(),
            _ => false,
        };
        if is_absent {
            continue;
        }
        let is_sum = name.starts_with("gradient of") && !name.contains("initial");
        let absolute = tolerance.absolute * if is_sum { n_terms } else { 1.0 };
        let tolerance = Tolerance { absolute, ..*tolerance };
        let case = format!("{label} T{} B{} I{} H{}", p.n_steps, p.n_rows, p.n_inputs, p.hidden);
        let what = What { kernel: "sweep", case: &case, seed: p.seed, operand: name };
        let compared = compare(&what, &Outcome::new(want.0, w.clone()), &Outcome::new(got.0, g.clone()), &tolerance);
        compared.unwrap_or_else(|e| panic!("{e}"));
    }
}

/// Fails where two results of one device are further apart than sums cut elsewhere may be.
fn near(name: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{name}");
    let is_far =
        |a: f32, b: f32| a.is_nan() || b.is_nan() || f64::from(a - b).abs() > ROUNDING.absolute + ROUNDING.relative * f64::from(a.abs());
    if let Some(i) = (0..a.len()).find(|&i| is_far(a[i], b[i])) {
        panic!("{name}[{i}]: {:e} and {:e}", a[i], b[i]);
    }
}

/// Runs a problem on every device in this manner and compares with the oracle, and the others with the first.
fn judge(label: &str, p: &Problem, manner: &Manner) {
    let mut want = solve(p);
    if let Some(base) = manner.accumulate_onto {
        let [of_x, of_h, of_c] = &mut want.dnorm;
        let of_norm = [of_x, of_h, of_c].into_iter();
        for sums in [&mut want.dweight_ih, &mut want.dweight_hh, &mut want.dbias, &mut want.dpeephole, &mut want.dprojection]
            .into_iter()
            .chain(of_norm)
        {
            sums.iter_mut().for_each(|v| *v += f64::from(base));
        }
    }
    let tolerance = if p.norm.is_some() { NORM_TOLERANCE } else { TOLERANCE };
    let mut first = None;
    for device in devices() {
        let got = run(&mut *device.open(), device, p, manner);
        agree(p, label, (Source::Oracle, &want), (Source::Device(device), &got), &tolerance);
        match &first {
            None => first = Some((Source::Device(device), got)),
            Some((source, first)) => agree(p, label, (*source, first), (Source::Device(device), &got), &tolerance),
        }
    }
}

/// T, B, I, H: odd, below, at and above the panel.
const SIZES: [[usize; 4]; 6] = [[1, 1, 1, 1], [2, 3, 5, 3], [7, 5, 3, 17], [5, 17, 33, 16], [4, 33, 1, 33], [3, 65, 17, 5]];

#[test]
fn the_oracles_gradients_are_the_derivatives_of_its_values() {
    let p = Problem { bias_hh: None, ..Problem::new(5, [3, 2, 2, 3]) }.with_lengths(&[3, 2]);
    let more = cells().map(|(_, cell)| {
        let p = Problem::new(7, [3, 2, 2, 3]).with_cell(Cell { grad_clip: 0.0, ..cell }).with_lengths(&[3, 2]);
        if cell.cell_clip > 0.0 { p } else { p.with_peepholes() }
    });
    let wide = cells().map(|(_, cell)| {
        let p = Problem::new(8, [3, 2, 2, 4]).projected(3).with_cell(Cell { grad_clip: 0.0, ..cell }).with_lengths(&[2, 3]).normed();
        if cell.cell_clip > 0.0 { p } else { p.with_peepholes() }
    });
    let wide = wide.into_iter().chain([Problem::new(9, [3, 2, 2, 4]).normed(), Problem::new(9, [3, 2, 2, 4]).projected(2)]);
    for p in [p, Problem::new(6, [3, 2, 2, 3]).reversed()].into_iter().chain(more).chain(wide) {
        let s = solve(&p);
        // The number whose gradient the sweep computes: every output and final state times the gradient that comes in for it.
        let value = |p: &Problem| -> f64 {
            let s = solve(p);
            let dot = |a: &[f64], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum::<f64>();
            dot(&s.outputs, p.dh_out.as_ref().expect("drawn")) + dot(&s.h_last, &p.dh_last) + dot(&s.c_last, &p.dc_last)
        };
        // Steps of 2^-15 are nearly exact in f32 beside values of this size; rounding is divided out below.
        let check = |name: &str, gradient: &[f64], pick: fn(&mut Problem) -> &mut Vec<f32>| {
            for (i, exact) in gradient.iter().enumerate() {
                let (mut up, mut down) = (p.clone(), p.clone());
                pick(&mut up)[i] += 1.0 / 32768.0;
                pick(&mut down)[i] -= 1.0 / 32768.0;
                let width = f64::from(pick(&mut up)[i]) - f64::from(pick(&mut down)[i]);
                let slope = (value(&up) - value(&down)) / width;
                assert!((slope - exact).abs() < 2e-6 * (1.0 + exact.abs()), "{name}[{i}]: slope {slope}, gradient {exact}");
            }
        };
        check("x", &s.dx, |p| &mut p.x);
        check("weight_ih", &s.dweight_ih, |p| &mut p.weight_ih);
        check("weight_hh", &s.dweight_hh, |p| &mut p.weight_hh);
        if p.peephole.is_some() {
            check("peephole", &s.dpeephole, |p| p.peephole.as_mut().expect("drawn"));
        }
        if p.projection.is_some() {
            check("projection", &s.dprojection, |p| p.projection.as_mut().expect("drawn"));
        }
        if p.norm.is_some() {
            check("gain of the input's product", &s.dnorm[0], |p| &mut p.norm.as_mut().expect("drawn")[0]);
            check("gain of the recurrent product", &s.dnorm[1], |p| &mut p.norm.as_mut().expect("drawn")[1]);
            check("norm of the cell state", &s.dnorm[2], |p| &mut p.norm.as_mut().expect("drawn")[2]);
        }
        check("bias_ih", &s.dbias, |p| p.bias_ih.as_mut().expect("drawn"));
        check("h0", &s.dh0, |p| &mut p.h0);
        check("c0", &s.dc0, |p| &mut p.c0);
    }
}

#[test]
fn a_layer_there_and_back_matches_the_oracle_at_odd_sizes() {
    for (i, sizes) in SIZES.into_iter().enumerate() {
        let p = Problem::new(10 + i as u64, sizes);
        judge("plain", &p, &Manner::whole(&p));
    }
}

#[test]
fn a_layer_in_reverse_matches_the_oracle() {
    for (i, sizes) in SIZES.into_iter().enumerate() {
        let p = Problem::new(20 + i as u64, sizes).reversed();
        judge("reverse", &p, &Manner::whole(&p));
    }
}

#[test]
fn rows_of_different_lengths_match_the_oracle() {
    let p = Problem::new(30, [7, 5, 3, 17]).with_lengths(&[7, 1, 4, 6, 2]);
    judge("lengths", &p, &Manner::whole(&p));
    let p = Problem::new(31, [5, 33, 2, 5]).with_lengths(&(0..33).map(|b| b % 5 + 1).collect::<Vec<_>>());
    judge("lengths", &p, &Manner::whole(&p));
}

#[test]
fn a_row_of_no_steps_hands_its_gradients_through() {
    let p = Problem::new(32, [4, 3, 3, 5]).with_lengths(&[0, 4, 2]);
    judge("length 0", &p, &Manner::whole(&p));
}

#[test]
fn biases_and_output_gradients_may_be_absent() {
    let p = Problem::new(35, [4, 3, 5, 17]);
    for p in [
        Problem { bias_ih: None, bias_hh: None, ..p.clone() },
        Problem { bias_ih: None, ..p.clone() },
        Problem { bias_hh: None, ..p.clone() },
        Problem { dh_out: None, ..p },
    ] {
        judge("absent", &p, &Manner::whole(&p));
    }
}

#[test]
fn gradients_are_added_where_that_is_asked() {
    let p = Problem::new(40, [5, 3, 5, 17]);
    judge("accumulate", &p, &Manner { accumulate_onto: Some(0.5), ..Manner::whole(&p) });
}

#[test]
fn chunks_of_time_together_are_one_long_sweep() {
    for reverse in [false, true] {
        let p = Problem { reverse, ..Problem::new(50, [9, 5, 3, 17]) };
        for chunks in [vec![0..4, 4..9], vec![0..1, 1..2, 2..8, 8..9]] {
            judge("chunks", &p, &Manner { chunks, ..Manner::whole(&p) });
        }
    }
}

#[test]
fn chunks_of_time_carry_rows_that_have_ended() {
    let p = Problem::new(51, [9, 6, 3, 5]).with_lengths(&[9, 1, 4, 5, 3, 8]);
    judge("chunks and lengths", &p, &Manner { chunks: vec![0..4, 4..6, 6..9], ..Manner::whole(&p) });
}

/// A problem as it is, and with a projection and norms, on every device.
fn each_kind(p: Problem) -> impl Iterator<Item = (Problem, Device)> {
    let kinds = [p.clone(), p.clone().projected(5), p.clone().normed(), p.projected(5).normed()];
    kinds.into_iter().flat_map(|p| devices().into_iter().map(move |device| (p.clone(), device)))
}

#[test]
fn two_windows_with_the_state_carried_over_are_one_long_window() {
    for (p, device) in each_kind(Problem::new(60, [8, 3, 5, 17])) {
        let mut backend = device.open();
        let long = run(&mut *backend, device, &p, &Manner::whole(&p));
        let first = p.window(0..5, p.h0.clone(), p.c0.clone());
        let first_done = run(&mut *backend, device, &first, &Manner::whole(&first));
        let second = p.window(5..8, first_done.h_last, first_done.c_last);
        let second_done = run(&mut *backend, device, &second, &Manner::whole(&second));
        let outputs = [first_done.outputs, second_done.outputs].concat();
        assert_eq!(outputs, long.outputs, "on {device}");
        assert_eq!((second_done.h_last, second_done.c_last), (long.h_last, long.c_last), "on {device}");
    }
}

#[test]
fn a_batch_equals_its_rows_one_by_one() {
    for (p, device) in each_kind(Problem::new(70, [5, 7, 3, 17]).with_lengths(&[5, 2, 5, 3, 1, 4, 5])) {
        let mut backend = device.open();
        let batch = run(&mut *backend, device, &p, &Manner::whole(&p));
        let mut sums = vec![0.0; batch.dweight_hh.len()];
        for b in 0..p.n_rows {
            let alone = p.row(b);
            let row = run(&mut *backend, device, &alone, &Manner::whole(&alone));
            let of_row = |values: &[f32], width: usize| -> Vec<f32> {
                values.chunks_exact(width).skip(b).step_by(p.n_rows).flatten().copied().collect()
            };
            let picked = [
                ("outputs", of_row(&batch.outputs, p.width()), row.outputs),
                ("final c", of_row(&batch.c_last, p.hidden), row.c_last),
                ("dx", of_row(&batch.dx, p.n_inputs), row.dx),
                ("gradient of the initial h", of_row(&batch.dh0, p.width()), row.dh0),
            ];
            for (name, in_batch, alone) in picked {
                near(&format!("{name} of row {b} on {device}"), &in_batch, &alone);
            }
            sums.iter_mut().zip(row.dweight_hh).for_each(|(sum, d)| *sum += d);
        }
        near(&format!("gradient of weight_hh as a sum over rows on {device}"), &batch.dweight_hh, &sums);
    }
}

#[test]
fn what_lies_behind_the_end_of_a_row_never_changes_a_result() {
    for (p, device) in each_kind(Problem::new(80, [6, 4, 3, 7]).with_lengths(&[6, 2, 3, 1])) {
        let mut filled = p.clone();
        for (place, row) in filled.x.chunks_exact_mut(3).enumerate() {
            if (place / 4) as u32 >= [6, 2, 3, 1][place % 4] {
                row.fill(1000.0);
            }
        }
        let mut dh_out = filled.dh_out.take().expect("drawn");
        for (place, row) in dh_out.chunks_exact_mut(p.width()).enumerate() {
            if (place / 4) as u32 >= [6, 2, 3, 1][place % 4] {
                row.fill(-1000.0);
            }
        }
        filled.dh_out = Some(dh_out);
        let mut backend = device.open();
        let plain = run(&mut *backend, device, &p, &Manner::whole(&p));
        let padded = run(&mut *backend, device, &filled, &Manner::whole(&filled));
        for ((name, a), (_, b)) in plain.parts().into_iter().zip(padded.parts()) {
            assert_eq!(a, b, "{name} on {device}");
        }
    }
}

#[test]
fn padded_hidden_units_never_change_a_result() {
    let p = Problem::new(81, [5, 3, 3, 5]);
    for (p, device) in [p.clone(), p.normed()].into_iter().flat_map(|p| devices().into_iter().map(move |device| (p.clone(), device))) {
        let mut backend = device.open();
        let narrow = run(&mut *backend, device, &p, &Manner::whole(&p));
        let wide = run(&mut *backend, device, &p, &Manner { hidden: 48, ..Manner::whole(&p) });
        for ((name, a), (_, b)) in narrow.parts().into_iter().zip(wide.parts()) {
            near(&format!("{name} on {device}"), a, b);
        }
    }
}

#[test]
fn the_same_sweep_twice_gives_the_same_bits() {
    let p = Problem::new(82, [6, 17, 5, 33]);
    for device in devices() {
        let mut backend = device.open();
        let once = run(&mut *backend, device, &p, &Manner::whole(&p));
        let again = run(&mut *device.open(), device, &p, &Manner::whole(&p));
        for ((name, a), (_, b)) in once.parts().into_iter().zip(again.parts()) {
            assert!(a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()), "{name} on {device}");
        }
    }
}

#[test]
fn more_than_two_to_the_seventeenth_rows_and_steps_are_swept() {
    let plain = [[1320, 100, 1, 1], [1, 70_001, 1, 1]].map(|sizes| Problem::new(90, sizes));
    let wider = [Problem::new(91, [1320, 100, 1, 4]).projected(2), Problem::new(92, [1320, 100, 1, 8]).normed()];
    for p in plain.into_iter().chain(wider) {
        judge("large", &p, &Manner::whole(&p));
    }
}

#[test]
fn two_lanes_of_one_sweep_do_not_disturb_each_other() {
    let forward = Problem::new(91, [6, 5, 3, 17]);
    let reverse = Problem::new(92, [6, 5, 7, 33]).reversed();
    for device in devices() {
        let mut backend = device.open();
        let alone: Vec<_> = [&forward, &reverse].map(|p| run(&mut *backend, device, p, &Manner::whole(p))).into();
        let placed = [&forward, &reverse].map(|p| Placed::new(&mut *backend, device, p, &Manner::whole(p)));
        for gradients in [false, true] {
            let lanes: Vec<Lane> = placed.iter().map(|placed| placed.lane(0..6, false, gradients)).collect();
            let args = SweepArgs { n_rows: 5, lanes: &lanes, flags: placed[0].flags.span, gradients };
            backend.sweep(&args).expect("a sweep of two lanes");
        }
        for (placed, alone) in placed.into_iter().zip(alone) {
            let together = placed.finish(&mut *backend);
            for ((name, a), (_, b)) in alone.parts().into_iter().zip(together.parts()) {
                assert_eq!(a, b, "{name} on {device}");
            }
        }
    }
}

/// Cells that differ from the plain one, but for the peepholes, which are tensors.
fn cells() -> [(&'static str, Cell); 7] {
    let zoneout = Cell { zoneout_h: 0.3, zoneout_c: 0.5, draws: 1, ..Cell::PLAIN };
    let mask = Cell { mask_threshold: 1 << 30, mask_scale: 4.0 / 3.0, ..Cell::PLAIN };
    [
        ("coupled", Cell { coupled: 1, ..Cell::PLAIN }),
        ("cell clip", Cell { cell_clip: 0.4, ..Cell::PLAIN }),
        ("gradient clip", Cell { grad_clip: 0.05, ..Cell::PLAIN }),
        ("zoneout", zoneout),
        ("expected zoneout", Cell { draws: 0, ..zoneout }),
        ("recurrent dropout", mask),
        ("all", Cell { coupled: 1, cell_clip: 0.6, grad_clip: 0.1, ..zoneout }),
    ]
}

#[test]
fn every_cell_matches_the_oracle_in_both_directions_with_and_without_lengths() {
    for (i, (name, cell)) in cells().into_iter().enumerate() {
        let seed = 200 + 10 * i as u64;
        for reverse in [false, true] {
            let p = Problem { reverse, ..Problem::new(seed, [6, 5, 3, 17]).with_cell(cell) };
            judge(name, &p, &Manner::whole(&p));
            let p = Problem {
                reverse,
                ..Problem::new(seed + 1, [7, 5, 5, 33]).with_cell(cell).with_peepholes().with_lengths(&[7, 0, 4, 6, 2])
            };
            judge(name, &p, &Manner::whole(&p));
            judge(name, &p, &Manner { chunks: vec![0..3, 3..4, 4..7], accumulate_onto: Some(0.25), ..Manner::whole(&p) });
        }
    }
}

#[test]
fn projections_and_norms_match_the_oracle_with_every_cell_in_both_directions() {
    type Wider = fn(Problem) -> Problem;
    let wider: [(&str, Wider); 3] =
        [("projected", |p| p.projected(5)), ("normed", Problem::normed), ("projected and normed", |p| p.projected(5).normed())];
    for (w, (what, wider)) in wider.into_iter().enumerate() {
        for (i, (name, cell)) in [("plain", Cell::PLAIN)].into_iter().chain(cells()).enumerate() {
            let (seed, label) = (400 + 100 * w as u64 + 10 * i as u64, format!("{what}, {name}"));
            // Each direction with and without lengths, in turn.
            let reverse = i % 2 == 1;
            let p = Problem { reverse, ..wider(Problem::new(seed, [6, 5, 3, 17])).with_cell(cell) };
            judge(&label, &p, &Manner::whole(&p));
            let p = wider(Problem::new(seed + 1, [7, 5, 5, 33])).with_cell(cell).with_peepholes().with_lengths(&[7, 0, 4, 6, 2]);
            let p = Problem { reverse: !reverse, ..p };
            judge(&label, &p, &Manner { chunks: vec![0..3, 3..4, 4..7], accumulate_onto: Some(0.25), ..Manner::whole(&p) });
        }
    }
}

#[test]
fn projections_and_norms_match_the_oracle_at_odd_sizes() {
    for (i, [t, b, k, h]) in
        [[2, 3, 5, 3], [7, 5, 3, 17], [5, 17, 33, 16], [4, 33, 1, 33], [3, 65, 17, 5], [2, 2, 3, 300]].into_iter().enumerate()
    {
        let p = Problem::new(800 + i as u64, [t, b, k, h]);
        for p in [
            p.clone().projected(h / 2),
            p.clone().normed(),
            Problem { bias_ih: None, bias_hh: None, dh_out: None, ..p.projected(h - 1).normed() },
        ] {
            judge("odd", &p, &Manner::whole(&p));
        }
    }
}

/// Launches of the default plan, forward and backward.
fn launches(p: &Problem) -> [usize; 2] {
    let device = Device::Cpu(1);
    let mut backend = device.open();
    let placed = Placed::new(&mut *backend, device, p, &Manner::whole(p));
    [false, true].map(|gradients| n_launches(&[placed.lane(0..p.n_steps as u32, false, gradients)], gradients))
}

#[test]
fn only_sums_over_the_hidden_units_cost_a_step_more_launches() {
    let problem = |n_steps| Problem::new(99, [n_steps, 3, 5, 17]);
    // Of one more step: a launch forward and one backward, and one more for each sum. The norm of the recurrent product and that of the cell state
    // share theirs, a workgroup a row.
    let per_step = |make: &dyn Fn(Problem) -> Problem| {
        let [[f0, b0], [f1, b1]] = [4, 5].map(|n_steps| launches(&make(problem(n_steps))));
        [f1 - f0, b1 - b0]
    };
    assert_eq!(per_step(&|p| p), [1, 1]);
    for (name, cell) in cells() {
        assert_eq!(per_step(&|p: Problem| p.with_cell(cell).with_peepholes()), [1, 1], "{name}");
    }
    assert_eq!(per_step(&|p: Problem| p.projected(5)), [2, 2]);
    assert_eq!(per_step(&Problem::normed), [2, 2]);
    assert_eq!(per_step(&|p: Problem| p.projected(5).normed()), [3, 3]);
}

/// Launches of the default plan of a sweep of these lanes.
fn n_launches(lanes: &[Lane], gradients: bool) -> usize {
    let flags = lanes[0].tensors.weight_hh.0;
    let mut n = 0;
    let launch = &mut |_: &dyn carrousel::kernels::Kernel, _: &[Span]| {
        n += 1;
        Ok(())
    };
    sweep_plan(&SweepArgs { n_rows: 3, lanes, flags, gradients }, launch).expect("a plan");
    n
}

#[test]
fn both_directions_share_the_launches_of_their_steps_where_they_share_their_buffers() {
    let problem = Problem::new(96, [40, 3, 5, 17]);
    for (p, shared) in [(problem.clone(), [1, 1]), (problem.clone().normed(), [1, 2]), (problem.clone().projected(5), [2, 2])] {
        let device = Device::Cpu(1);
        let mut backend = device.open();
        let placed = Placed::new(&mut *backend, device, &p, &Manner::whole(&p));
        for gradients in [false, true] {
            let forward = placed.lane(0..40, false, gradients);
            let starts = LaneStarts { gates: 64, h: 64, c: 64, carry: 64, dh: 64 };
            let reverse = Lane { reverse: true, starts, ..forward.clone() };
            let alone = n_launches(std::slice::from_ref(&forward), gradients);
            let both = n_launches(&[forward, reverse], gradients);
            // Products stay each lane's own; the initial state's gradient is one more shared launch backward.
            let saved = shared[usize::from(gradients)] * 40 + usize::from(gradients);
            assert_eq!(2 * alone - both, saved, "gradients {gradients}");
        }
    }
}

#[test]
fn directions_that_differ_in_anything_but_their_places_and_draws_do_not_share_launches() {
    type Change = fn(&mut Lane);
    fn grads(lane: &mut Lane) -> &mut LaneGradients {
        lane.backward.as_mut().expect("places for gradients")
    }
    fn elsewhere(span: &mut Span) {
        span.buffer.0 += 100;
    }
    let of_both: [(&str, Change); 16] = [
        ("weight_hh", |l| elsewhere(&mut l.tensors.weight_hh.0)),
        ("weight_hr", |l| elsewhere(&mut l.tensors.weight_hr.as_mut().expect("a projection").0)),
        ("vectors", |l| elsewhere(&mut l.tensors.vectors.as_mut().expect("biases").span)),
        ("gates", |l| elsewhere(&mut l.gates)),
        ("h", |l| elsewhere(&mut l.h)),
        ("c", |l| elsewhere(&mut l.c)),
        ("rows", |l| elsewhere(l.rows.as_mut().expect("lengths"))),
        ("residual input", |l| elsewhere(&mut l.x[0].as_mut().expect("an input").span)),
        ("part of a buffer", |l| l.gates.len -= 64),
        ("units", |l| l.shape.units -= 1),
        ("range", |l| l.range.end -= 1),
        ("lengths", |l| l.use_lengths = false),
        ("cell clip", |l| l.cell.cell_clip = 0.5),
        ("zoneout", |l| l.cell.zoneout_c = 0.5),
        ("drop scale", |l| l.cell.drop_scale = 1.5),
        ("no place of its own", |l| l.starts = LaneStarts::default()),
    ];
    let of_gradients: [(&str, Change); 5] = [
        ("carry", |l| elsewhere(&mut grads(l).carry)),
        ("gradients of h", |l| elsewhere(grads(l).dh.as_mut().expect("a projection"))),
        ("gradient of the outputs", |l| elsewhere(&mut grads(l).dh_out.as_mut().expect("outputs").0)),
        ("no gradient of the outputs", |l| grads(l).dh_out = None),
        ("gradient of the residual input", |l| elsewhere(&mut grads(l).dx[0].as_mut().expect("an input").span)),
    ];
    let p = Problem::new(95, [40, 3, 16, 17]).projected(16).with_lengths(&[40, 3, 17]);
    let device = Device::Cpu(1);
    let mut backend = device.open();
    let placed = Placed::new(&mut *backend, device, &p, &Manner::whole(&p));
    for gradients in [false, true] {
        let lane = placed.lane(0..40, false, true);
        let forward = Lane { residual: Some(0), shape: LaneShape { outputs: true, ..lane.shape }, ..lane };
        let starts = LaneStarts { gates: 64, h: 64, c: 64, carry: 64, dh: 64 };
        let cell = Cell { lane: 1, drop_tag: 7, ..forward.cell };
        let reverse = Lane { reverse: true, starts, cell, ..forward.clone() };
        let alone = |lane: &Lane| n_launches(std::slice::from_ref(lane), gradients);
        let both = |other: &Lane| n_launches(&[forward.clone(), other.clone()], gradients);
        assert!(both(&reverse) < alone(&forward) + alone(&reverse), "gradients {gradients}: the lanes share launches as they are");
        let changes = of_both.iter().chain(of_gradients.iter().filter(|_| gradients));
        for (what, change) in changes {
            let mut other = reverse.clone();
            change(&mut other);
            assert_eq!(both(&other), alone(&forward) + alone(&other), "gradients {gradients}, unlike in: {what}");
        }
    }
}

#[test]
fn ten_thousand_steps_are_swept() {
    let (plain, wider) = (Problem::new(98, [10_000, 1, 1, 1]), Problem::new(97, [10_000, 1, 2, 17]));
    for (what, p) in [
        ("long", plain),
        ("long and projected", wider.clone().projected(9)),
        ("long and normed", wider.clone().normed()),
        ("long, projected and normed", wider.projected(9).normed()),
    ] {
        judge(what, &p, &Manner::whole(&p));
    }
}

#[test]
fn peepholes_match_the_oracle_at_odd_sizes() {
    for (i, sizes) in SIZES.into_iter().enumerate() {
        let p = Problem::new(300 + i as u64, sizes).with_peepholes();
        judge("peepholes", &p, &Manner::whole(&p));
        let p = Problem { bias_ih: None, bias_hh: None, ..p };
        judge("peepholes without biases", &p, &Manner::whole(&p));
    }
}

#[test]
fn a_reverse_lane_starts_at_each_rows_own_end() {
    let p = Problem::new(93, [7, 5, 3, 17]).reversed().with_lengths(&[7, 1, 4, 0, 6]);
    judge("reverse with lengths", &p, &Manner::whole(&p));
    judge("reverse with lengths", &p, &Manner { chunks: vec![0..2, 2..5, 5..7], ..Manner::whole(&p) });
}

#[test]
fn a_reverse_lane_over_reversed_rows_is_a_forward_lane() {
    let lengths = [5u32, 2, 4];
    // Each row's own steps in the other order; padding stays behind.
    let turned = |values: &[f32], width: usize| {
        let mut out = values.to_vec();
        for (b, &length) in lengths.iter().enumerate() {
            for t in 0..length as usize {
                let (from, to) = ((t * 3 + b) * width, ((length as usize - 1 - t) * 3 + b) * width);
                out[to..to + width].copy_from_slice(&values[from..from + width]);
            }
        }
        out
    };
    for (forward, device) in each_kind(Problem::new(97, [5, 3, 3, 7]).with_lengths(&lengths)) {
        let width = forward.width();
        let dh_out = forward.dh_out.as_ref().map(|d| turned(d, width));
        let reverse = Problem { x: turned(&forward.x, 3), dh_out, reverse: true, ..forward.clone() };
        let mut backend = device.open();
        let a = run(&mut *backend, device, &forward, &Manner::whole(&forward));
        let b = run(&mut *backend, device, &reverse, &Manner::whole(&reverse));
        assert_eq!(turned(&a.outputs, width), b.outputs, "on {device}");
        assert_eq!((a.h_last, a.c_last, a.dh0, a.dc0), (b.h_last, b.c_last, b.dh0, b.dc0), "on {device}");
        near("dx", &turned(&a.dx, 3), &b.dx);
        near("gradient of weight_hh", &a.dweight_hh, &b.dweight_hh);
    }
}

/// Sweeps step by step and gives back after how many the flag was raised; none if never.
fn raised_at(backend: &mut dyn Backend, device: Device, p: &Problem) -> Option<usize> {
    let placed = Placed::new(backend, device, p, &Manner::whole(p));
    (0..p.n_steps).find(|&t| {
        let lanes = [placed.lane(t as u32..t as u32 + 1, false, false)];
        let args = SweepArgs { n_rows: p.n_rows as u32, lanes: &lanes, flags: placed.flags.span, gradients: false };
        backend.sweep(&args).expect("a forward sweep");
        placed.flag(backend) != 0
    })
}

#[test]
fn one_non_finite_input_raises_the_flag_at_its_step() {
    let p = Problem::new(94, [5, 3, 3, 17]);
    for device in devices() {
        let mut backend = device.open();
        assert_eq!(raised_at(&mut *backend, device, &p), None, "finite values on {device}");
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
            for t in 0..5 {
                let mut p = p.clone();
                p.x[(t * 3 + 2) * 3 + 1] = wrong;
                assert_eq!(raised_at(&mut *backend, device, &p), Some(t), "{wrong} at step {t} on {device}");
            }
        }
    }
}

#[test]
fn one_non_finite_parameter_or_state_raises_the_flag_at_the_first_step() {
    let p = Problem::new(95, [2, 3, 3, 17]);
    type Place = fn(&mut Problem) -> &mut f32;
    let places: [(&str, Place); 6] = [
        ("weight_ih", |p| &mut p.weight_ih[4 * 17 * 3 - 1]),
        ("weight_hh", |p| &mut p.weight_hh[2 * 17 * 17 + 5]),
        ("bias_ih", |p| &mut p.bias_ih.as_mut().expect("drawn")[20]),
        ("bias_hh", |p| &mut p.bias_hh.as_mut().expect("drawn")[0]),
        ("h0", |p| &mut p.h0[2 * 17 + 16]),
        ("huge weight", |p| &mut p.weight_hh[7]),
    ];
    for device in devices() {
        let mut backend = device.open();
        for (name, place) in places {
            let mut p = p.clone();
            *place(&mut p) = if name == "huge weight" { f32::INFINITY } else { f32::NAN };
            assert_eq!(raised_at(&mut *backend, device, &p), Some(0), "{name} on {device}");
        }
    }
}

#[test]
fn a_non_finite_input_behind_the_end_of_its_row_raises_no_flag() {
    let mut p = Problem::new(96, [3, 2, 1, 1]).with_lengths(&[3, 1]);
    p.x[2 * 2 + 1] = f32::NAN;
    for device in devices() {
        assert_eq!(raised_at(&mut *device.open(), device, &p), None, "on {device}");
    }
}

/// A backend that sweeps by a plan of the test's, and counts launches.
struct Planned {
    inner: Box<dyn Backend>,
    plan: SweepPlan,
    n_launches: usize,
}

impl Around for Planned {
    fn inner(&self) -> &dyn Backend {
        self.inner.as_ref()
    }
    fn inner_mut(&mut self) -> &mut dyn Backend {
        self.inner.as_mut()
    }
    fn launch(&mut self, kernel: &dyn carrousel::kernels::Kernel, operands: &[Span]) -> anyhow::Result<()> {
        self.n_launches += 1;
        self.inner.launch(kernel, operands)
    }
    fn plan(&self) -> SweepPlan {
        self.plan
    }
}

/// The plan of whole sweeps by workgroups of so many rows.
fn whole(tile_rows: u32) -> SweepPlan {
    match tile_rows {
        2 => whole_sweep_plan::<2>,
        4 => whole_sweep_plan::<4>,
        _ => whole_sweep_plan::<8>,
    }
}

#[test]
fn whole_sweeps_leave_what_step_by_step_leaves_in_fewer_launches() {
    let lengths = [7, 1, 4, 0, 6];
    let chunks = vec![0..2, 2..5, 5..7];
    let problems = [
        (Problem::new(200, [7, 5, 3, 17]), None),
        (Problem::new(201, [7, 5, 3, 40]).with_lengths(&lengths), Some(chunks.clone())),
        (Problem::new(202, [7, 5, 3, 64]).reversed().with_lengths(&lengths), Some(chunks)),
        (Problem { dh_out: None, bias_ih: None, ..Problem::new(203, [5, 17, 5, 128]) }, None),
        // More steps than a launch takes, forward and backward.
        (Problem::new(204, [14_000, 1, 1, 1]).reversed(), None),
    ];
    for device in devices() {
        for (i, (p, chunks)) in problems.iter().enumerate() {
            let manner = Manner { chunks: chunks.clone().unwrap_or(Manner::whole(p).chunks), ..Manner::whole(p) };
            let padded = pad_units(p.hidden) as u32;
            let fitting: Vec<u32> = SWEEP_ROWS.into_iter().filter(|&rows| fits(padded, rows)).collect();
            // All tiles at one size, the others in turn.
            let tiles = if i == 1 { &fitting[..] } else { &fitting[i % fitting.len()..][..1] };
            let with = |plan: SweepPlan| {
                let mut backend = Planned { inner: device.open(), plan, n_launches: 0 };
                (run(&mut backend, device, p, &manner), backend.n_launches)
            };
            let (steps, n_launches) = with(sweep_plan);
            for &rows in tiles {
                let (whole, n_whole) = with(whole(rows));
                let n_chunks = manner.chunks.len();
                let (mut saved, n) = (0, manner.chunks.iter().map(Range::len));
                for n in n {
                    let launches = |gradients| n.div_ceil(most_steps(padded, gradients) as usize);
                    saved += n - launches(false) + n + 1 - launches(true);
                }
                assert_eq!(n_launches - n_whole, saved, "{n_chunks} chunks of problem {i} on {device}");
                for ((name, a), (_, b)) in steps.parts().into_iter().zip(whole.parts()) {
                    // Drivers of real GPUs may fuse the one and not the other.
                    let is_same = a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
                    let may_differ = matches!(device, Device::Gpu(_)) && !device.open().info().is_software;
                    assert!(is_same || may_differ, "{name} of problem {i} with {rows} rows on {device}");
                    if may_differ {
                        near(name, a, b);
                    }
                }
            }
        }
    }
}

#[test]
fn trials_of_sweeps_leave_the_same_whichever_way_they_run_and_with_lanes_together() {
    for index in gpus() {
        let device = Device::Gpu(index);
        let p = Problem::new(205, [9, 3, 5, 17]);
        let mut backend = device.open();
        let placed = Placed::new(&mut *backend, device, &p, &Manner::whole(&p));
        for gradients in [false, true] {
            let forward = placed.lane(0..9, false, gradients);
            for n_lanes in [1, 2] {
                let lanes = vec![forward.clone(); n_lanes];
                let args = SweepArgs { n_rows: 3, lanes: &lanes, flags: placed.flags.span, gradients };
                let (class, trial) = SweepTrial::of(&args).expect("a lane");
                assert!(class.to_string().starts_with("lstm_sweep 16x32x16 "), "{class}");
                assert_eq!(trial.ways(), SweepWay::all(&args));
                let mut results: Vec<Vec<f32>> = Vec::new();
                let mut n_launches = Vec::new();
                for way in trial.ways() {
                    let spans = trial.lens().map(|len| {
                        let buffer = backend.alloc("a trial", len).expect("memory");
                        let words: Vec<f32> = (0..len).map(|i| (i * 29 % 113) as f32 / 113.0 - 0.4).collect();
                        backend.write(backend.whole(buffer), &words).expect("a write");
                        backend.whole(buffer)
                    });
                    let mut n = 0;
                    let launch = &mut |kernel: &dyn carrousel::kernels::Kernel, operands: &[Span]| {
                        n += 1;
                        backend.launch(kernel, operands)
                    };
                    trial.run(way, &spans, launch).expect("a sweep");
                    n_launches.push(n);
                    let read = |span: &Span| read_now(&mut *backend, *span, DEADLINE).expect("a readback");
                    results.push(spans[..4].iter().flat_map(read).collect());
                    spans.iter().for_each(|span| backend.free(span.buffer));
                }
                // Both lanes in one launch, and one more for the initial state's gradient.
                let steps = if gradients { 10 } else { 9 };
                assert_eq!(n_launches, [steps, 1, 1, 1], "{class}");
                let is_software = backend.info().is_software;
                for other in &results[1..] {
                    assert!(results[0].iter().any(|v| v.abs() > 0.5) && results[0].iter().all(|v| v.is_finite()), "{class}");
                    if is_software {
                        assert_eq!(*other, results[0], "{class}");
                    } else {
                        near(&class.to_string(), &results[0], other);
                    }
                }
            }
        }
    }
}

#[test]
fn whole_sweeps_are_for_plain_lanes_of_few_units_only() {
    let device = Device::Cpu(1);
    let mut backend = device.open();
    let mut ways = |p: &Problem, edit: &dyn Fn(&mut Lane)| {
        let placed = Placed::new(&mut *backend, device, p, &Manner::whole(p));
        let mut lane = placed.lane(0..p.n_steps as u32, false, true);
        edit(&mut lane);
        let ways = SweepWay::all(&SweepArgs { n_rows: p.n_rows as u32, lanes: &[lane.clone()], flags: placed.flags.span, gradients: true });
        assert_eq!(carries(&lane), ways.len() > 1, "{ways:?}");
        ways.into_iter().map(SweepWay::name).collect::<Vec<_>>()
    };
    let problem = |hidden: usize| Problem::new(206, [2, 3, 3, hidden]);
    let all = ["steps", "whole 2 rows", "whole 4 rows", "whole 8 rows"];
    for (hidden, expected) in [(1, &all[..]), (64, &all[..]), (65, &all[..3]), (128, &all[..3]), (129, &all[..1])] {
        assert_eq!(ways(&problem(hidden), &|_| {}), expected, "{hidden} units");
        assert_eq!(ways(&problem(hidden).with_lengths(&[2, 1, 0]), &|_| {}), expected, "{hidden} units with lengths");
    }
    assert_eq!(ways(&problem(16).projected(5), &|_| {}), ["steps"]);
    assert_eq!(ways(&problem(16).normed(), &|_| {}), ["steps"]);
    assert_eq!(ways(&problem(16).with_peepholes(), &|_| {}), ["steps"]);
    for (name, cell) in cells() {
        assert_eq!(ways(&problem(16).with_cell(cell), &|_| {}), ["steps"], "{name}");
    }
    assert_eq!(ways(&problem(16), &|lane| lane.residual = Some(0)), ["steps"], "residual");
    assert_eq!(ways(&problem(16), &|lane| lane.shape.outputs = true), ["steps"], "dropout on the way up");
    // No loop is longer than what every driver runs, in chunks of these steps.
    for hidden in (16..=128).step_by(16) {
        let (forward, backward) = (most_steps(hidden, false), most_steps(hidden, true));
        assert!(
            forward * (hidden / 4 + 2) < 62_500 && (backward + 1) * (hidden + hidden / 8 + 2) + 6 <= 62_500,
            "{hidden}: {forward}, {backward}"
        );
        assert!(forward > 1800 && backward > 380, "{hidden}: {forward}, {backward}");
    }
}
