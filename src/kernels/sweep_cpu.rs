//! The sweep as the CPU runs it: one parallel region for all steps, each thread with its own rows of the batch, no barrier inside.
//!
//! Weights are packed once a sweep. A step forward is one product over [x; h] and the gates; a step back is one product with the transposed
//! recurrent weights, the gates' derivatives, and the gradient of the input while dz is near. Weight gradients follow as products over all steps.
//! The cell's mathematics is in [`super::lstm`], row by row; lanes with anything that this file does not know go through its plan of launches.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, ensure};

use super::lstm::{
    FLAG_NON_FINITE, Lane, LaneGradients, LaneTensors, Launch, NONE, SweepArgs, gate_backward, gate_forward, sweep_plan, weight_gradients,
};
use super::microkernel::{self, Ends, Factors, Left, MatrixMut, Steps, Stored};
use super::{AdapterClass, Binding, Dispatch, Kernel, Operand, ShapeError, at_least, multiple_of, read, read_write};
use crate::for_isa;
use crate::pool::{CpuContext, Divide, Isa, Rows};
use crate::shape::{GATES, PANEL_UNITS};

/// Runs the sweep of some lanes, one after another.
///
/// # Errors
/// The launch's, or a lane that contradicts itself.
pub fn sweep(args: &SweepArgs<'_>, launch: Launch<'_>) -> Result<()> {
    for lane in args.lanes {
        let one = SweepArgs { lanes: std::slice::from_ref(lane), ..args.clone() };
        // Every field by name: one that is added later must be done here, or send its lanes to the plan.
        let Lane { inputs, hidden, reverse, tensors, x, gates, h, c, range, lengths, backward } = lane;
        ensure!(
            !(*reverse && lengths.is_some()),
            "lengths with a reverse lane are not supported: reverse each sequence in the data instead"
        );
        if range.is_empty() {
            sweep_plan(&one, launch)?;
            continue;
        }
        let LaneTensors { weight_ih, weight_hh, biases } = *tensors;
        let bias = biases.map_or(weight_hh.0, |(span, ..)| span);
        let shape = Shape {
            n_rows: args.n_rows as usize,
            inputs: *inputs as usize,
            hidden: *hidden as usize,
            reverse: *reverse,
            range: range.start as usize..range.end as usize,
            weight_ih: weight_ih.1 as usize,
            weight_hh: weight_hh.1 as usize,
            use_lengths: lengths.is_some(),
        };
        let or_any = lengths.unwrap_or(weight_hh.0);
        if !args.gradients {
            let biases = biases.map_or([NONE, NONE], |(_, ih, hh)| [ih, hh]);
            let kernel = SweepForward { shape, biases, x: x.1 as usize };
            launch(&kernel, &[weight_ih.0, weight_hh.0, bias, x.0, *gates, *h, *c, or_any, args.flags])?;
        } else if let Some(LaneGradients { dh_out, carry, tensors: _, accumulate: _, dx }) = backward {
            // Where the gradient of the input is not wanted, flags stand in its place, untouched.
            let kernel = SweepBackward { shape, dh_out: dh_out.map(|(_, offset)| offset as usize), wants_dx: dx.is_some() };
            let dh_out = dh_out.map_or(*c, |(span, _)| span);
            launch(&kernel, &[weight_ih.0, weight_hh.0, *gates, *c, dh_out, *carry, or_any, dx.unwrap_or(args.flags)])?;
            weight_gradients(&one, lane, launch)?;
        } else {
            sweep_plan(&one, launch)?;
        }
    }
    Ok(())
}

/// What both sweeps know of a lane.
#[derive(Clone, Debug)]
struct Shape {
    n_rows: usize,
    inputs: usize,
    hidden: usize,
    reverse: bool,
    range: Range<usize>,
    /// Offsets of the weights in their operands.
    weight_ih: usize,
    weight_hh: usize,
    use_lengths: bool,
}

impl Shape {
    fn width(&self) -> usize {
        self.hidden * GATES
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
        (1usize << 19).div_ceil((self.range.len() * (self.inputs + self.hidden) * self.width()).max(1)).max(2)
    }

    fn check(
        &self,
        name: &'static str,
        weight_ih: usize,
        weight_hh: usize,
        gates: usize,
        c: usize,
        lengths: usize,
    ) -> Result<(), ShapeError> {
        multiple_of(name, "hidden", self.hidden as u32, PANEL_UNITS)?;
        at_least(name, "weight_ih", weight_ih, self.weight_ih + self.inputs * self.width())?;
        at_least(name, "weight_hh", weight_hh, self.weight_hh + self.hidden * self.width())?;
        at_least(name, "gates", gates, self.range.end * self.n_rows * self.width())?;
        at_least(name, "c", c, (self.range.end + 1) * self.n_rows * self.hidden)?;
        if self.use_lengths { at_least(name, "lengths", lengths, self.n_rows) } else { Ok(()) }
    }
}

/// Packs B `[k, n]` on all threads.
fn pack_all(ctx_pool: &crate::pool::Pool, isa: Isa, b: Stored<'_>, k: usize, n: usize, to: &mut [f32]) {
    let cols = microkernel::tile_cols(isa);
    let n_panels = n.div_ceil(cols);
    let min_panels = (1usize << 15).div_ceil((k * cols).max(1));
    ctx_pool.run(Rows { data: to, width: k * cols }, n_panels, min_panels, &|to: Rows<'_>, panels: Range<usize>| {
        microkernel::pack(isa, b, 0..k, panels.start * cols..(panels.end * cols).min(n), to.data);
    });
}

/// All steps forward: gates, h and c.
struct SweepForward {
    shape: Shape,
    biases: [u32; 2],
    x: usize,
}

const FORWARD_BINDINGS: &[Binding] = &[
    read("weight_ih"),
    read("weight_hh"),
    read("bias"),
    read("x"),
    read_write("gates"),
    read_write("h"),
    read_write("c"),
    read("lengths"),
    read_write("flags"),
];

/// A kernel that no adapter is asked to run.
macro_rules! cpu_only {
    ($name:literal, $bindings:expr) => {
        fn name(&self) -> &'static str {
            $name
        }
        fn bindings(&self) -> &'static [Binding] {
            $bindings
        }
        fn params(&self) -> &[u8] {
            &[]
        }
        fn dispatch(&self, _: AdapterClass) -> Dispatch {
            unreachable!("only the CPU backend launches a whole sweep")
        }
    };
}

impl Kernel for SweepForward {
    cpu_only!("lstm_sweep_forward", FORWARD_BINDINGS);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "lstm_sweep_forward";
        let s = &self.shape;
        s.check(NAME, lens[0], lens[1], lens[4], lens[6], lens[7])?;
        for bias in self.biases.into_iter().filter(|&b| b != NONE) {
            at_least(NAME, "bias", lens[2], bias as usize + s.width())?;
        }
        at_least(NAME, "x", lens[3], self.x + s.range.end * s.n_rows * s.inputs)?;
        at_least(NAME, "h", lens[5], (s.range.end + 1) * s.n_rows * s.hidden)?;
        at_least(NAME, "flags", lens[8], 1)
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [weight_ih, weight_hh, bias, x, gates, h, c, lengths, flags] = operands else { unreachable!("nine operands") };
        let s = &self.shape;
        let (rows, inputs, hidden, width, isa) = (s.n_rows, s.inputs, s.hidden, s.width(), ctx.isa);
        let weight_ih = &weight_ih.as_slice()[s.weight_ih..][..inputs * width];
        let weight_hh = &weight_hh.as_slice()[s.weight_hh..][..hidden * width];
        let x = &x.as_slice()[self.x..];
        let lengths = s.use_lengths.then(|| lengths.as_indices());
        // Few rows in all do not pay for packing; with the widest vectors weights lie as they are wanted.
        let does_pack = microkernel::tile_cols(isa) < crate::shape::PANEL && rows * s.range.len() > 4 * microkernel::TILE_ROWS;
        let packed_len = if does_pack { (inputs + hidden) * width } else { 0 };
        let (packed, bias_sum) = ctx.scratch.take(packed_len + width).split_at_mut(packed_len);
        if does_pack {
            let (ih, hh) = packed.split_at_mut(inputs * width);
            pack_all(&ctx.pool, isa, Stored::panels(weight_ih, inputs), inputs, width, ih);
            pack_all(&ctx.pool, isa, Stored::panels(weight_hh, hidden), hidden, width, hh);
        }
        let packed = &*packed;
        bias_sum.fill(0.0);
        for offset in self.biases.into_iter().filter(|&b| b != NONE) {
            bias_sum.iter_mut().zip(&bias.as_slice()[offset as usize..]).for_each(|(sum, b)| *sum += b);
        }
        let bias = self.biases.iter().any(|&b| b != NONE).then_some(&*bias_sum);
        let n_steps = s.range.end;
        let work = (
            Steps::new(gates.as_mut_slice(), n_steps, rows, width),
            Steps::new(h.as_mut_slice(), n_steps + 1, rows, hidden),
            Steps::new(c.as_mut_slice(), n_steps + 1, rows, hidden),
        );
        let raised = AtomicBool::new(false);
        ctx.pool.run(work, rows, s.min_rows(), &|(mut gates, mut h, mut c): (Steps<'_>, Steps<'_>, Steps<'_>), part: Range<usize>| {
            let n = part.len();
            let mut non_finite = 0u32;
            for t in (0..s.range.len()).map(|i| s.step(i)) {
                let (before, after) = s.around(t);
                let (h_in, h_out) = h.two(before, after);
                let (c_in, c_out) = c.two(before, after);
                let z = gates.at_mut(t);
                let x = Left::Rows(&x[(t * rows + part.start) * inputs..], inputs);
                let h_in = Left::Rows(h_in, hidden);
                let factors = if does_pack {
                    let (ih, hh) = packed.split_at(inputs * width);
                    [Factors::packed(isa, inputs, x, ih), Factors::packed(isa, hidden, h_in, hh)]
                } else {
                    [Factors::of_panels(inputs, x, weight_ih), Factors::of_panels(hidden, h_in, weight_hh)]
                };
                let mut to = MatrixMut::row_major(z, n, width, width);
                microkernel::multiply(isa, &mut to, factors.map(Some), Ends { add: false, bias });
                let states = c_in.chunks_exact(hidden).zip(h_out.chunks_exact_mut(hidden)).zip(c_out.chunks_exact_mut(hidden));
                for (row, (z, ((c_in, h_out), c_out))) in z.chunks_exact_mut(width).zip(states).enumerate() {
                    if lengths.is_some_and(|l| t as u32 >= l[part.start + row]) {
                        z.fill(0.0);
                        h_out.fill(0.0);
                        c_out.fill(0.0);
                        continue;
                    }
                    let flag = &mut non_finite;
                    for_isa!(isa, gate_forward(z: &mut [f32], c_in: &[f32], h_out: &mut [f32], c_out: &mut [f32], flag: &mut u32));
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
    shape: Shape,
    dh_out: Option<usize>,
    wants_dx: bool,
}

const BACKWARD_BINDINGS: &[Binding] = &[
    read("weight_ih"),
    read("weight_hh"),
    read_write("gates"),
    read("c"),
    read("dh_out"),
    read_write("carry"),
    read("lengths"),
    read_write("dx"),
];

/// The gradient of the input, or nothing, by rows.
struct MaybeSteps<'a>(Option<Steps<'a>>);

impl Divide for MaybeSteps<'_> {
    fn divide(self, at: usize) -> (Self, Self) {
        match self.0 {
            None => (Self(None), Self(None)),
            Some(steps) => {
                let (a, b) = steps.divide(at);
                (Self(Some(a)), Self(Some(b)))
            }
        }
    }
}

impl Kernel for SweepBackward {
    cpu_only!("lstm_sweep_backward", BACKWARD_BINDINGS);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "lstm_sweep_backward";
        let s = &self.shape;
        s.check(NAME, lens[0], lens[1], lens[2], lens[3], lens[6])?;
        if let Some(offset) = self.dh_out {
            at_least(NAME, "dh_out", lens[4], offset + s.range.end * s.n_rows * s.hidden)?;
        }
        at_least(NAME, "carry", lens[5], 2 * s.n_rows * s.hidden)?;
        if self.wants_dx { at_least(NAME, "dx", lens[7], s.range.end * s.n_rows * s.inputs) } else { Ok(()) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [weight_ih, weight_hh, gates, c, dh_out, carry, lengths, dx] = operands else { unreachable!("eight operands") };
        let s = &self.shape;
        let (rows, inputs, hidden, width, isa) = (s.n_rows, s.inputs, s.hidden, s.width(), ctx.isa);
        let weight_ih = &weight_ih.as_slice()[s.weight_ih..][..inputs * width];
        let weight_hh = &weight_hh.as_slice()[s.weight_hh..][..hidden * width];
        let c = c.as_slice();
        let dh_out = self.dh_out.map(|offset| &dh_out.as_slice()[offset..]);
        let lengths = s.use_lengths.then(|| lengths.as_indices());
        let ih_len = if self.wants_dx { microkernel::packed_len(isa, width, inputs) } else { 0 };
        let hh_len = microkernel::packed_len(isa, width, hidden);
        let (ih, rest) = ctx.scratch.take(ih_len + hh_len + rows * hidden).split_at_mut(ih_len);
        let (hh, dh) = rest.split_at_mut(hh_len);
        if self.wants_dx {
            pack_all(&ctx.pool, isa, Stored::panels(weight_ih, inputs).transposed(), width, inputs, ih);
        }
        pack_all(&ctx.pool, isa, Stored::panels(weight_hh, hidden).transposed(), width, hidden, hh);
        let (ih, hh) = (&*ih, &*hh);
        let (dh_last, dc) = carry.as_mut_slice()[..2 * rows * hidden].split_at_mut(rows * hidden);
        let state = |data| Rows { data, width: hidden };
        let dx = MaybeSteps(self.wants_dx.then(|| Steps::new(dx.as_mut_slice(), s.range.end, rows, inputs)));
        let work = ((Steps::new(gates.as_mut_slice(), s.range.end, rows, width), dx), state(dc), (state(dh_last), state(dh)));
        type Work<'a> = ((Steps<'a>, MaybeSteps<'a>), Rows<'a>, (Rows<'a>, Rows<'a>));
        ctx.pool.run(work, rows, s.min_rows(), &|((mut gates, mut dx), dc, (dh_last, dh)): Work<'_>, part: Range<usize>| {
            let n = part.len();
            let through = |dz: &[f32], weight: &[f32], to: &mut [f32], cols: usize, add: bool| {
                let mut to = MatrixMut::row_major(to, n, cols, cols);
                let factors = Factors::packed(isa, width, Left::Rows(dz, width), weight);
                microkernel::multiply(isa, &mut to, [Some(factors), None], Ends { add, bias: None });
            };
            for i in (0..s.range.len()).rev() {
                let t = s.step(i);
                let (before, after) = s.around(t);
                let is_last = i + 1 == s.range.len();
                if !is_last {
                    through(gates.at(s.step(i + 1)), hh, dh.data, hidden, false);
                }
                let z = gates.at_mut(t);
                let rows_of = z
                    .chunks_exact_mut(width)
                    .zip(dh.data.chunks_exact_mut(hidden))
                    .zip(dc.data.chunks_exact_mut(hidden))
                    .zip(dh_last.data.chunks_exact_mut(hidden));
                for (b, (((z, dh), dc), dh_last)) in part.clone().zip(rows_of) {
                    let length = lengths.map_or(u32::MAX, |lengths| lengths[b]);
                    if t as u32 >= length {
                        z.fill(0.0);
                        continue;
                    }
                    if is_last || t as u32 + 1 == length {
                        dh.copy_from_slice(dh_last);
                        dh_last.fill(0.0);
                    }
                    let of_row = |t: usize| (t * rows + b) * hidden..(t * rows + b + 1) * hidden;
                    if let Some(dh_out) = dh_out {
                        dh.iter_mut().zip(&dh_out[of_row(t)]).for_each(|(d, o)| *d += o);
                    }
                    let (dh, c_prev, c) = (&*dh, &c[of_row(before)], &c[of_row(after)]);
                    for_isa!(isa, gate_backward(z: &mut [f32], dh: &[f32], dc: &mut [f32], c_prev: &[f32], c: &[f32]));
                }
                if let Some(dx) = &mut dx.0 {
                    through(gates.at(t), ih, dx.at_mut(t), inputs, false);
                }
            }
            // Added, since rows that ended before this range have their gradient there, and the others zero.
            through(gates.at(s.step(0)), hh, dh_last.data, hidden, true);
        });
    }
}
