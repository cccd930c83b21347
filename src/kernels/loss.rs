//! Losses with their gradient in the same pass: softmax cross-entropy, binary cross-entropy, squared error and the quantile loss.
//!
//! A loss is a weighted sum of terms; what comes out is each row's sum and the gradient times `scale` (1 over the global weight), which overwrites the logits
//! or predictions. Terms of weight 0 (padding) give exactly zero, whatever they hold.

use bytemuck::{Pod, Zeroable};

use super::lstm::{ACTIVATIONS, FLAG_NON_FINITE};
use super::{
    AdapterClass, Case, Dispatch, Entry, Fill, Kernel, ODD, Operand, Shader, ShapeError, Tolerance, activations, at_least, grid_1d,
    kernel_basics, loop_trips, operand, read, read_write,
};
use crate::for_isa;
use crate::pool::{CpuContext, Rows};
use crate::shape::pad_inner;

/// The shader of [`SoftmaxCrossEntropy`]: a workgroup a row.
pub static SOFTMAX: Shader =
    Shader { name: "softmax_cross_entropy", source: include_str!("../../shaders/softmax_cross_entropy.wgsl"), fragments: &[&ACTIVATIONS] };
/// The shader of [`SquaredError`]: an invocation a row.
pub static SQUARED: Shader =
    Shader { name: "squared_error", source: include_str!("../../shaders/squared_error.wgsl"), fragments: &[&ACTIVATIONS] };

/// The shader of [`BinaryCrossEntropy`]: a workgroup a row.
pub static BINARY: Shader =
    Shader { name: "binary_cross_entropy", source: include_str!("../../shaders/binary_cross_entropy.wgsl"), fragments: &[&ACTIVATIONS] };
/// The shader of [`QuantileLoss`]: an invocation a row.
pub static QUANTILE: Shader =
    Shader { name: "quantile_loss", source: include_str!("../../shaders/quantile_loss.wgsl"), fragments: &[&ACTIVATIONS] };

/// Invocations of one workgroup of [`SOFTMAX`] and of [`BINARY`], on software adapters and on others.
pub const SOFTMAX_WORKGROUP: u32 = 64;
/// Rows that one workgroup of [`SQUARED`] and of [`QUANTILE`] covers.
pub const SQUARED_ROWS: u32 = 64;

/// Rows of logits `[n_rows, n_classes]` become gradients; `row_loss[n] = weight[n] * (log sum exp(logits) - logits[target])`.
///
/// The maximum is subtracted first. Floats between `n_classes` and `row_stride` become zero. A target outside the classes is the host's error to find.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct SoftmaxCrossEntropy {
    pub n_rows: u32,
    pub n_classes: u32,
    pub row_stride: u32,
    /// Multiplies the gradient; 1 over the global weight.
    pub scale: f32,
    /// 0: only the loss is wanted, logits stay.
    pub gradient: u32,
}

impl Kernel for SoftmaxCrossEntropy {
    kernel_basics!(
        "softmax_cross_entropy",
        const { &[read_write("logits"), read("targets"), read("weights"), read_write("row_loss"), read_write("flags")] }
    );

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "softmax_cross_entropy";
        at_least(NAME, "a row", self.row_stride as usize, self.n_classes as usize)?;
        at_least(NAME, "logits", lens[0], self.n_rows as usize * self.row_stride as usize)?;
        at_least(NAME, "targets", lens[1], self.n_rows as usize)?;
        at_least(NAME, "weights", lens[2], self.n_rows as usize)?;
        at_least(NAME, "row_loss", lens[3], self.n_rows as usize)?;
        at_least(NAME, "flags", lens[4], 1)?;
        // Three passes and two trees.
        loop_trips(NAME, "passes over the classes", 3 * self.row_stride.div_ceil(SOFTMAX_WORKGROUP) + 2 * SOFTMAX_WORKGROUP.ilog2())
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &SOFTMAX, overrides: &[], grid: grid_1d(u64::from(self.n_rows)) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [logits, targets, weights, row_loss, flags] = operands else { unreachable!("five operands") };
        let (n, stride) = (self.n_rows as usize, self.row_stride as usize);
        let (targets, weights) = (targets.as_indices(), weights.as_slice());
        let raised = std::sync::atomic::AtomicBool::new(false);
        let isa = ctx.isa;
        let work = (
            Rows { data: &mut logits.as_mut_slice()[..n * stride], width: stride },
            Rows { data: &mut row_loss.as_mut_slice()[..n], width: 1 },
        );
        let min_rows = (1usize << 13).div_ceil(stride.max(1));
        ctx.pool.run(work, n, min_rows, &|(logits, losses): (Rows<'_>, Rows<'_>), range: std::ops::Range<usize>| {
            let mut bad = 0u32;
            for ((row, loss), logits) in range.zip(losses.data).zip(logits.data.chunks_exact_mut(stride)) {
                let (this, target, weight, flag) = (self, targets[row] as usize, weights[row], &mut bad);
                for_isa!(isa, fused softmax_row(this: &SoftmaxCrossEntropy, logits: &mut [f32], target: usize, weight: f32, loss: &mut f32, flag: &mut u32));
            }
            if bad != 0 {
                raised.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        });
        if raised.into_inner() {
            flags.as_indices_mut()[FLAG_NON_FINITE] = 1;
        }
    }
}

/// Lanes of the row's maximum and sum.
const LANES: usize = 16;

#[inline(always)]
fn softmax_row<const FUSED: bool>(k: &SoftmaxCrossEntropy, logits: &mut [f32], target: usize, weight: f32, loss: &mut f32, flag: &mut u32) {
    let n = k.n_classes as usize;
    if weight == 0.0 || target >= n {
        *loss = 0.0;
        if k.gradient == 1 {
            logits.fill(0.0);
        }
        return;
    }
    let (row, padding) = logits.split_at_mut(n);
    let mut bad = 0u32;
    let mut max = [f32::MIN; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for c in chunks {
        for i in 0..LANES {
            bad |= u32::from(c[i].to_bits() & 0x7f80_0000 == 0x7f80_0000);
            max[i] = if c[i] > max[i] { c[i] } else { max[i] };
        }
    }
    for (i, &v) in rest.iter().enumerate() {
        bad |= u32::from(v.to_bits() & 0x7f80_0000 == 0x7f80_0000);
        max[i] = if v > max[i] { v } else { max[i] };
    }
    *flag |= bad;
    let max = max.into_iter().fold(f32::MIN, |a, b| if b > a { b } else { a });
    let mut sums = [0f32; LANES];
    let at_target = row[target];
    if k.gradient == 1 {
        let mut chunks = row.chunks_exact_mut(LANES);
        for c in &mut chunks {
            for i in 0..LANES {
                c[i] = activations::exp::<FUSED>(c[i] - max);
                sums[i] += c[i];
            }
        }
        for (i, v) in chunks.into_remainder().iter_mut().enumerate() {
            *v = activations::exp::<FUSED>(*v - max);
            sums[i] += *v;
        }
    } else {
        for c in row.chunks(LANES) {
            for (i, v) in c.iter().enumerate() {
                sums[i] += activations::exp::<FUSED>(v - max);
            }
        }
    }
    let sum: f32 = sums.into_iter().sum();
    *loss = weight * (sum.ln() + max - at_target);
    if bad != 0 {
        // What the clamps of exp hid must not look like a loss.
        *loss = f32::NAN;
    }
    if k.gradient == 1 {
        let (factor, whole) = (weight * k.scale / sum, weight * k.scale);
        row.iter_mut().for_each(|v| *v *= factor);
        row[target] -= whole;
        padding.fill(0.0);
    }
}

/// Rows of predictions `[n_rows, n_outputs]` become gradients `2 weight (y - target) scale`; `row_loss[n] = sum of weight (y - target)^2`.
///
/// Predictions are `row_stride` apart, and floats behind `n_outputs` become zero; targets and weights `[n_rows, n_outputs]` are dense.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct SquaredError {
    pub n_rows: u32,
    pub n_outputs: u32,
    pub row_stride: u32,
    pub scale: f32,
    pub gradient: u32,
}

impl Kernel for SquaredError {
    kernel_basics!(
        "squared_error",
        const { &[read_write("predictions"), read("targets"), read("weights"), read_write("row_loss"), read_write("flags")] }
    );

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "squared_error";
        at_least(NAME, "a row", self.row_stride as usize, self.n_outputs as usize)?;
        at_least(NAME, "predictions", lens[0], self.n_rows as usize * self.row_stride as usize)?;
        at_least(NAME, "targets", lens[1], self.n_rows as usize * self.n_outputs as usize)?;
        at_least(NAME, "weights", lens[2], self.n_rows as usize * self.n_outputs as usize)?;
        at_least(NAME, "row_loss", lens[3], self.n_rows as usize)?;
        at_least(NAME, "flags", lens[4], 1)?;
        loop_trips(NAME, "n_outputs", self.row_stride)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &SQUARED, overrides: &[], grid: grid_1d(u64::from(self.n_rows.div_ceil(SQUARED_ROWS))) }
    }

    fn run(&self, _: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [predictions, targets, weights, row_loss, flags] = operands else { unreachable!("five operands") };
        let (n, outputs, stride) = (self.n_rows as usize, self.n_outputs as usize, self.row_stride as usize);
        let (targets, weights) = (targets.as_slice(), weights.as_slice());
        let mut bad = false;
        for (row, (values, loss)) in
            predictions.as_mut_slice()[..n * stride].chunks_exact_mut(stride).zip(row_loss.as_mut_slice()).enumerate().take(n)
        {
            let mut sum = 0.0;
            for (o, value) in values.iter_mut().enumerate() {
                let weight = if o < outputs { weights[row * outputs + o] } else { 0.0 };
                if weight == 0.0 {
                    *value = if self.gradient == 1 { 0.0 } else { *value };
                    continue;
                }
                bad |= !value.is_finite();
                let difference = *value - targets[row * outputs + o];
                sum += weight * difference * difference;
                if self.gradient == 1 {
                    *value = 2.0 * weight * difference * self.scale;
                }
            }
            *loss = sum;
        }
        if bad {
            flags.as_indices_mut()[FLAG_NON_FINITE] = 1;
        }
    }
}

/// Rows of logits `[n_rows, n_outputs]`, each for itself the log-odds of one thing, become gradients `weight (sigmoid(z) - y) scale`;
/// `row_loss[n] = weight[n] * sum of (max(z, 0) - z y + log(1 + e^-|z|))`, the negative log-likelihood of the row's targets.
///
/// Logits are `row_stride` apart, and floats behind `n_outputs` become zero; targets `[n_rows, n_outputs]`, from 0 to 1, are dense, and a row has one weight.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct BinaryCrossEntropy {
    pub n_rows: u32,
    pub n_outputs: u32,
    pub row_stride: u32,
    pub scale: f32,
    pub gradient: u32,
}

impl Kernel for BinaryCrossEntropy {
    kernel_basics!(
        "binary_cross_entropy",
        const { &[read_write("logits"), read("targets"), read("weights"), read_write("row_loss"), read_write("flags")] }
    );

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "binary_cross_entropy";
        at_least(NAME, "a row", self.row_stride as usize, self.n_outputs as usize)?;
        at_least(NAME, "logits", lens[0], self.n_rows as usize * self.row_stride as usize)?;
        at_least(NAME, "targets", lens[1], self.n_rows as usize * self.n_outputs as usize)?;
        at_least(NAME, "weights", lens[2], self.n_rows as usize)?;
        at_least(NAME, "row_loss", lens[3], self.n_rows as usize)?;
        at_least(NAME, "flags", lens[4], 1)?;
        loop_trips(NAME, "a pass over the outputs", self.row_stride.div_ceil(SOFTMAX_WORKGROUP) + SOFTMAX_WORKGROUP.ilog2())
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &BINARY, overrides: &[], grid: grid_1d(u64::from(self.n_rows)) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [logits, targets, weights, row_loss, flags] = operands else { unreachable!("five operands") };
        let (n, outputs, stride) = (self.n_rows as usize, self.n_outputs as usize, self.row_stride as usize);
        let (targets, weights) = (targets.as_slice(), weights.as_slice());
        let raised = std::sync::atomic::AtomicBool::new(false);
        let isa = ctx.isa;
        let work = (
            Rows { data: &mut logits.as_mut_slice()[..n * stride], width: stride },
            Rows { data: &mut row_loss.as_mut_slice()[..n], width: 1 },
        );
        let min_rows = (1usize << 12).div_ceil(stride.max(1));
        ctx.pool.run(work, n, min_rows, &|(logits, losses): (Rows<'_>, Rows<'_>), range: std::ops::Range<usize>| {
            let mut bad = 0u32;
            for ((row, loss), logits) in range.zip(losses.data).zip(logits.data.chunks_exact_mut(stride)) {
                let (this, targets, weight, flag) = (self, &targets[row * outputs..][..outputs], weights[row], &mut bad);
                for_isa!(isa, fused binary_row(this: &BinaryCrossEntropy, logits: &mut [f32], targets: &[f32], weight: f32, loss: &mut f32, flag: &mut u32));
            }
            if bad != 0 {
                raised.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        });
        if raised.into_inner() {
            flags.as_indices_mut()[FLAG_NON_FINITE] = 1;
        }
    }
}

#[inline(always)]
fn binary_row<const FUSED: bool>(k: &BinaryCrossEntropy, logits: &mut [f32], targets: &[f32], weight: f32, loss: &mut f32, flag: &mut u32) {
    if weight == 0.0 {
        *loss = 0.0;
        if k.gradient == 1 {
            logits.fill(0.0);
        }
        return;
    }
    let (row, padding) = logits.split_at_mut(k.n_outputs as usize);
    let bad = row.iter().fold(0u32, |bad, z| bad | u32::from(z.to_bits() & 0x7f80_0000 == 0x7f80_0000));
    *flag |= bad;
    let mut sum = 0.0;
    for (z, y) in row.iter().zip(targets) {
        let above = if *z > 0.0 { *z } else { 0.0 };
        sum += above - z * y + activations::exp::<FUSED>(-z.abs()).ln_1p();
    }
    // What the clamps of exp hid must not look like a loss.
    *loss = if bad == 0 { weight * sum } else { f32::NAN };
    if k.gradient == 1 {
        let factor = weight * k.scale;
        row.iter_mut().zip(targets).for_each(|(z, y)| *z = (activations::sigmoid::<FUSED>(*z) - y) * factor);
        padding.fill(0.0);
    }
}

/// Most levels that a [`QuantileLoss`] has.
pub const MAX_LEVELS: u32 = 64;

/// Rows of predicted quantiles `[n_rows, n_outputs, n_levels]` become gradients; with `d = y - p` a term is the mean over the levels q of
/// `max(q d, (q - 1) d)` (Koenker and Bassett 1978), and `row_loss[n]` the sum of its terms, each times its weight.
///
/// Predictions of a row lie `row_stride` from the next row's, and floats behind them become zero; targets and weights `[n_rows, n_outputs]` are dense.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct QuantileLoss {
    pub n_rows: u32,
    pub n_outputs: u32,
    pub n_levels: u32,
    pub row_stride: u32,
    pub scale: f32,
    pub gradient: u32,
}

impl Kernel for QuantileLoss {
    kernel_basics!(
        "quantile_loss",
        const { &[read_write("predictions"), read("targets"), read("weights"), read("levels"), read_write("row_loss"), read_write("flags")] }
    );

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "quantile_loss";
        at_least(NAME, "a row", self.row_stride as usize, self.n_outputs as usize * self.n_levels as usize)?;
        at_least(NAME, "predictions", lens[0], self.n_rows as usize * self.row_stride as usize)?;
        at_least(NAME, "targets", lens[1], self.n_rows as usize * self.n_outputs as usize)?;
        at_least(NAME, "weights", lens[2], self.n_rows as usize * self.n_outputs as usize)?;
        at_least(NAME, "levels", lens[3], self.n_levels as usize)?;
        at_least(NAME, "row_loss", lens[4], self.n_rows as usize)?;
        at_least(NAME, "flags", lens[5], 1)?;
        loop_trips(NAME, "columns and outputs", self.row_stride.saturating_add(self.n_outputs))
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &QUANTILE, overrides: &[], grid: grid_1d(u64::from(self.n_rows.div_ceil(SQUARED_ROWS))) }
    }

    fn run(&self, _: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [predictions, targets, weights, levels, row_loss, flags] = operands else { unreachable!("six operands") };
        let (n, outputs, n_levels, stride) =
            (self.n_rows as usize, self.n_outputs as usize, self.n_levels as usize, self.row_stride as usize);
        let (targets, weights, levels) = (targets.as_slice(), weights.as_slice(), &levels.as_slice()[..n_levels]);
        let mut bad = false;
        let rows = predictions.as_mut_slice()[..n * stride].chunks_exact_mut(stride).zip(row_loss.as_mut_slice());
        for (row, (values, loss)) in rows.enumerate() {
            let mut sum = 0.0;
            let (said, padding) = values.split_at_mut(outputs * n_levels);
            for (o, said) in said.chunks_exact_mut(n_levels.max(1)).enumerate() {
                let weight = weights[row * outputs + o];
                let mut term = 0.0;
                for (value, level) in said.iter_mut().zip(levels) {
                    if weight == 0.0 {
                        *value = if self.gradient == 1 { 0.0 } else { *value };
                        continue;
                    }
                    bad |= !value.is_finite();
                    let difference = targets[row * outputs + o] - *value;
                    let slope = if difference > 0.0 { *level } else { *level - 1.0 };
                    term += slope * difference;
                    if self.gradient == 1 {
                        *value = -slope * weight * self.scale / n_levels as f32;
                    }
                }
                sum += if weight == 0.0 { 0.0 } else { weight * term / n_levels as f32 };
            }
            if self.gradient == 1 {
                padding.fill(0.0);
            }
            *loss = sum;
        }
        if bad {
            flags.as_indices_mut()[FLAG_NON_FINITE] = 1;
        }
    }
}

/// Weights as they occur: some terms are not scored.
fn weights(n: u32) -> Fill {
    Fill::Floats((0..n).map(|i| [1.0, 1.0, 0.0, 0.5][i as usize % 4]).collect())
}

/// The catalogue's line.
pub const SOFTMAX_ENTRY: Entry = Entry {
    name: "softmax_cross_entropy",
    tolerance: Tolerance {
        absolute: 1e-5,
        relative: 2e-5,
        reason: "an exponential with 17 ulp on some drivers, a sum of up to 10,000 of them",
    },
    cases: || {
        let sizes = ODD.iter().enumerate().map(|(i, &n)| (n, ODD[(i + 3) % 5])).chain([(5, 10_007), (65_600, 3)]);
        sizes.enumerate().map(|(i, (n, v))| softmax_case(n, v, u32::from(i % 3 != 1), 1.0)).chain([softmax_case(9, 33, 1, 80.0)]).collect()
    },
    bench_cases: || vec![softmax_case(5000, 96, 1, 1.0), softmax_case(400, 10_000, 1, 1.0)],
    sized: |s| vec![softmax_case(s.places(), s.n_classes, 1, 1.0)],
    shaders: &[&SOFTMAX],
};

fn softmax_case(n_rows: u32, n_classes: u32, gradient: u32, range: f32) -> Case {
    let row_stride = pad_inner(n_classes as usize) as u32 + 4;
    Case {
        label: format!("{n_rows}x{n_classes} gradient {gradient} range {range}"),
        kernel: Box::new(SoftmaxCrossEntropy { n_rows, n_classes, row_stride, scale: 0.25, gradient }),
        operands: vec![
            operand((n_rows * row_stride) as usize, Fill::Uniform { low: -range, high: range }),
            operand(n_rows as usize, Fill::Indices { below: n_classes }),
            operand(n_rows as usize, weights(n_rows)),
            operand(n_rows as usize, Fill::Poison),
            operand(1, Fill::Zeros),
        ],
        flop: 0,
    }
}

/// The catalogue's line.
pub const MSE_ENTRY: Entry = Entry {
    name: "squared_error",
    tolerance: Tolerance { absolute: 2e-6, relative: 1e-5, reason: "sums of up to 65 squares" },
    cases: || {
        ODD.iter()
            .enumerate()
            .map(|(i, &n)| squared_case(n, ODD[(i + 3) % 5], u32::from(i != 2)))
            .chain([squared_case(70_001, 1, 1)])
            .collect()
    },
    bench_cases: || vec![squared_case(4096, 26, 1)],
    sized: |s| vec![squared_case(s.n_rows, s.n_classes, 1)],
    shaders: &[&SQUARED],
};

fn squared_case(n_rows: u32, n_outputs: u32, gradient: u32) -> Case {
    let row_stride = pad_inner(n_outputs as usize) as u32 + 4;
    let dense = (n_rows * n_outputs) as usize;
    Case {
        label: format!("{n_rows}x{n_outputs} gradient {gradient}"),
        kernel: Box::new(SquaredError { n_rows, n_outputs, row_stride, scale: 0.25, gradient }),
        operands: vec![
            operand((n_rows * row_stride) as usize, Fill::Uniform { low: -1.0, high: 1.0 }),
            operand(dense, Fill::Uniform { low: -1.0, high: 1.0 }),
            operand(dense, weights(n_rows * n_outputs)),
            operand(n_rows as usize, Fill::Poison),
            operand(1, Fill::Zeros),
        ],
        flop: 0,
    }
}

/// The catalogue's line.
pub const BINARY_ENTRY: Entry = Entry {
    name: "binary_cross_entropy",
    tolerance: Tolerance {
        absolute: 2e-5,
        relative: 1e-5,
        reason: "a logarithm and an exponential with 17 ulp on some drivers, up to 300 of them added",
    },
    cases: || {
        let sizes = ODD.iter().enumerate().map(|(i, &n)| (n, ODD[(i + 3) % 5])).chain([(5, 300), (66_000, 3)]);
        sizes.enumerate().map(|(i, (n, o))| binary_case(n, o, u32::from(i % 3 != 1), 2.0)).chain([binary_case(9, 33, 1, 80.0)]).collect()
    },
    bench_cases: || vec![binary_case(4096, 88, 1, 2.0)],
    sized: |s| vec![binary_case(s.places(), s.n_classes, 1, 2.0)],
    shaders: &[&BINARY],
};

fn binary_case(n_rows: u32, n_outputs: u32, gradient: u32, range: f32) -> Case {
    let row_stride = pad_inner(n_outputs as usize) as u32 + 4;
    let notes = (0..n_rows * n_outputs).map(|i| [0.0, 1.0, 0.0, 0.0, 0.25][i as usize % 5]).collect();
    Case {
        label: format!("{n_rows}x{n_outputs} gradient {gradient} range {range}"),
        kernel: Box::new(BinaryCrossEntropy { n_rows, n_outputs, row_stride, scale: 0.25, gradient }),
        operands: vec![
            operand((n_rows * row_stride) as usize, Fill::Uniform { low: -range, high: range }),
            operand((n_rows * n_outputs) as usize, Fill::Floats(notes)),
            operand(n_rows as usize, weights(n_rows)),
            operand(n_rows as usize, Fill::Poison),
            operand(1, Fill::Zeros),
        ],
        flop: 0,
    }
}

/// The catalogue's line.
pub const QUANTILE_ENTRY: Entry = Entry {
    name: "quantile_loss",
    tolerance: Tolerance { absolute: 5e-6, relative: 1e-5, reason: "sums of up to 65 terms of 5 levels" },
    cases: || {
        let sizes = ODD.iter().enumerate().map(|(i, &n)| (n, ODD[(i + 3) % 5], i as u32 + 1));
        sizes.map(|(n, o, l)| quantile_case(n, o, l, u32::from(l != 3))).chain([quantile_case(70_001, 1, 2, 1)]).collect()
    },
    bench_cases: || vec![quantile_case(4096, 26, 3, 1)],
    sized: |s| vec![quantile_case(s.n_rows, s.n_classes, 3, 1)],
    shaders: &[&QUANTILE],
};

fn quantile_case(n_rows: u32, n_outputs: u32, n_levels: u32, gradient: u32) -> Case {
    let row_stride = pad_inner((n_outputs * n_levels) as usize) as u32 + 4;
    let dense = (n_rows * n_outputs) as usize;
    Case {
        label: format!("{n_rows}x{n_outputs}x{n_levels} gradient {gradient}"),
        kernel: Box::new(QuantileLoss { n_rows, n_outputs, n_levels, row_stride, scale: 0.25, gradient }),
        operands: vec![
            operand((n_rows * row_stride) as usize, Fill::Uniform { low: -1.0, high: 1.0 }),
            operand(dense, Fill::Uniform { low: -1.0, high: 1.0 }),
            operand(dense, weights(n_rows * n_outputs)),
            operand(n_levels as usize, Fill::Floats((1..=n_levels).map(|i| i as f32 / (n_levels + 1) as f32).collect())),
            operand(n_rows as usize, Fill::Poison),
            operand(1, Fill::Zeros),
        ],
        flop: 0,
    }
}
