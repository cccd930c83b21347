//! What every kernel must compute, straight from the equations in its documentation: f64, naive, element by element, no code shared with the kernels.
//!
//! An oracle reads the operands as they were before the launch, and gives for each what it must hold afterwards. Elements it does not
//! write must keep their bits.

use carrousel::kernels::dropout::Dropout;
use carrousel::kernels::elementwise::{Add, Scale};
use carrousel::kernels::embedding::{EmbeddingGather, EmbeddingGradient};
use carrousel::kernels::gemm::{Gemm, Matrix};
use carrousel::kernels::loss::{SoftmaxCrossEntropy, SquaredError};
use carrousel::kernels::lstm::{Cell, LstmStepBackward, LstmStepForward, NONE};
use carrousel::kernels::pooling::PoolSteps;
use carrousel::kernels::reduce::{BlockSquares, ColumnSums, NonFinite, Sum};
use carrousel::kernels::update::{Adam, Regular, Rmsprop, Sgd};

use crate::compare::kept;

/// What an operand must hold after a launch.
#[derive(Clone, Debug)]
pub enum Want {
    /// The bits it had.
    Unchanged,
    /// These numbers, or the bits it had where `compare::is_kept` says so.
    Floats(Vec<f64>),
    /// These integers.
    Words(Vec<u32>),
}

/// The operands of a launch as they were before it.
pub struct Inputs<'a> {
    operands: &'a [Vec<u32>],
}

impl Inputs<'_> {
    /// Element `at` of operand `i` as a number.
    fn f(&self, i: usize, at: usize) -> f64 {
        f64::from(f32::from_bits(self.operands[i][at]))
    }

    /// Element `at` of operand `i` as an integer.
    fn u(&self, i: usize, at: usize) -> usize {
        self.operands[i][at] as usize
    }

    fn len(&self, i: usize) -> usize {
        self.operands[i].len()
    }

    /// An operand to write over.
    fn target(&self, i: usize) -> Vec<f64> {
        kept(self.len(i))
    }
}

type Oracle = fn(&[u8], &Inputs<'_>) -> Vec<Want>;

const ORACLES: &[(&str, Oracle)] = &[
    ("embedding_gather", embedding_gather),
    ("gemm", gemm),
    ("lstm_step_forward", lstm_step_forward),
    ("dropout", dropout),
    ("pool_steps", pool_steps),
    ("softmax_cross_entropy", softmax_cross_entropy),
    ("squared_error", squared_error),
    ("pool_steps_gradient", pool_steps_gradient),
    ("lstm_step_backward", lstm_step_backward),
    ("column_sums", column_sums),
    ("embedding_gradient", embedding_gradient),
    ("sum", sum),
    ("block_squares", block_squares),
    ("non_finite", non_finite),
    ("add", add),
    ("scale", scale),
    ("sgd", sgd),
    ("rmsprop", rmsprop),
    ("adam", adam),
];

/// What the operands must hold after kernel `name` with these parameters; none where there is no such oracle.
pub fn judge(name: &str, params: &[u8], operands: &[Vec<u32>]) -> Option<Vec<Want>> {
    let (_, oracle) = ORACLES.iter().find(|(known, _)| *known == name)?;
    Some(oracle(params, &Inputs { operands }))
}

fn parse<K: bytemuck::AnyBitPattern>(params: &[u8]) -> K {
    bytemuck::pod_read_unaligned(params)
}

/// Column of a gate (i, f, g, o = 0..4) of a unit in rows of 4H.
pub fn gate_column(unit: usize, gate: usize) -> usize {
    unit / 16 * 64 + gate * 16 + unit % 16
}

/// Where weight (input k, unit, gate) lies in panels `[H / 16][K][64]`.
pub fn weight_at(n_inputs: usize, k: usize, unit: usize, gate: usize) -> usize {
    (unit / 16 * n_inputs + k) * 64 + gate * 16 + unit % 16
}

pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn embedding_gather(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: EmbeddingGather = parse(params);
    let mut out = x.target(2);
    for n in 0..k.n_tokens as usize {
        for e in 0..k.width as usize {
            let token = x.u(0, n);
            out[k.out as usize + n * k.width as usize + e] =
                if token < k.n_classes as usize { x.f(1, k.table as usize + token * k.width as usize + e) } else { 0.0 };
        }
    }
    vec![Want::Unchanged, Want::Unchanged, Want::Floats(out)]
}

fn element(m: &Matrix, row: usize, col: usize) -> usize {
    let panel = m.panel as usize;
    m.offset as usize + col / panel * m.panel_stride as usize + row * m.row_stride as usize + col % panel
}

fn gemm(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let g: Gemm = parse(params);
    let mut c = x.target(3);
    for i in 0..g.m as usize {
        for j in 0..g.n as usize {
            let at = element(&g.c, i, j);
            let mut sum = if g.accumulate == 1 { x.f(3, at) } else { 0.0 };
            for k in 0..g.k as usize {
                let a = if g.trans_a == 1 { element(&g.a, k, i) } else { element(&g.a, i, k) };
                let b = if g.trans_b == 1 { element(&g.b, j, k) } else { element(&g.b, k, j) };
                sum += x.f(0, a) * x.f(1, b);
            }
            if g.use_bias == 1 {
                sum += x.f(2, g.bias_offset as usize + j);
            }
            c[at] = sum;
        }
    }
    vec![Want::Unchanged, Want::Unchanged, Want::Unchanged, Want::Floats(c)]
}

/// Draws of a cell: uniform words of one unit.
fn cell_word(cell: &Cell, purpose: u32, stream: usize, t: u32, unit: usize) -> f64 {
    f64::from(philox([unit as u32 / 4, t, stream as u32, cell.lane << 8 | purpose], [cell.key0, cell.key1])[unit % 4])
}

/// The factor that recurrent dropout gives a unit's h.
pub fn cell_mask(cell: &Cell, stream: usize, unit: usize) -> f64 {
    let is_kept = cell_word(cell, 9, stream, 0, unit) >= f64::from(cell.mask_threshold);
    if cell.mask_scale == 0.0 { 1.0 } else { f64::from(u8::from(is_kept)) * f64::from(cell.mask_scale) }
}

/// How much of the old h (`purpose` 7) or c (8) zoneout keeps.
fn cell_kept(cell: &Cell, purpose: u32, stream: usize, t: u32, unit: usize) -> f64 {
    let p = f64::from(if purpose == 7 { cell.zoneout_h } else { cell.zoneout_c });
    if cell.draws == 0 || p == 0.0 {
        return p;
    }
    f64::from(u8::from(cell_word(cell, purpose, stream, t, unit) < (p * 4_294_967_296.0).floor()))
}

fn limit(clip: f32) -> f64 {
    if clip > 0.0 { f64::from(clip) } else { f64::INFINITY }
}

/// One unit of any cell, in f64: what both the judges of step kernels and of sweeps compute with.
pub struct Unit {
    pub c_prev: f64,
    pub gates: [f64; 4],
    /// The new cell state before its clip, and after.
    pub raw: f64,
    pub new: f64,
    pub h: f64,
    pub c: f64,
    keep_h: f64,
    keep_c: f64,
    peephole: [f64; 3],
}

impl Unit {
    /// From the pre-activations, biases included.
    pub fn forward(cell: &Cell, peephole: [f64; 3], z: [f64; 4], [h_prev, c_prev]: [f64; 2], stream: usize, t: u32, unit: usize) -> Self {
        let i = sigmoid(z[0] + peephole[0] * c_prev);
        let f = if cell.coupled == 1 { 1.0 - i } else { sigmoid(z[1] + peephole[1] * c_prev) };
        let g = z[2].tanh();
        let raw = f * c_prev + i * g;
        let new = raw.max(-limit(cell.cell_clip)).min(limit(cell.cell_clip));
        let o = sigmoid(z[3] + peephole[2] * new);
        Self::of_gates(cell, peephole, [i, f, g, o], [h_prev, c_prev], stream, t, unit)
    }

    /// From the activated gates.
    pub fn of_gates(
        cell: &Cell,
        peephole: [f64; 3],
        gates: [f64; 4],
        [h_prev, c_prev]: [f64; 2],
        stream: usize,
        t: u32,
        unit: usize,
    ) -> Self {
        let raw = gates[1] * c_prev + gates[0] * gates[2];
        let new = raw.max(-limit(cell.cell_clip)).min(limit(cell.cell_clip));
        let (keep_h, keep_c) = (cell_kept(cell, 7, stream, t, unit), cell_kept(cell, 8, stream, t, unit));
        let h = keep_h * h_prev + (1.0 - keep_h) * gates[3] * new.tanh();
        let c = keep_c * c_prev + (1.0 - keep_c) * new;
        Self { c_prev, gates, raw, new, h, c, keep_h, keep_c, peephole }
    }

    /// From the gradients of h and c: dz, the gradients of the old h (past the weights) and the old c, those of the peephole weights.
    pub fn backward(&self, cell: &Cell, dh: f64, dc: f64) -> ([f64; 4], f64, f64, [f64; 3]) {
        let [i, f, g, o] = self.gates;
        let clip = |d: f64| d.max(-limit(cell.grad_clip)).min(limit(cell.grad_clip));
        let d_hat = (1.0 - self.keep_h) * dh;
        let tanh_c = self.new.tanh();
        let dz_o = clip(d_hat * tanh_c * o * (1.0 - o));
        let mut d_new = (1.0 - self.keep_c) * dc + d_hat * o * (1.0 - tanh_c * tanh_c) + dz_o * self.peephole[2];
        if self.raw.abs() > limit(cell.cell_clip) {
            d_new = 0.0;
        }
        let (d_i, d_f) = if cell.coupled == 1 { (d_new * (g - self.c_prev), 0.0) } else { (d_new * g, d_new * self.c_prev) };
        let dz = [clip(d_i * i * (1.0 - i)), clip(d_f * f * (1.0 - f)), clip(d_new * i * (1.0 - g * g)), dz_o];
        let dc_prev = self.keep_c * dc + d_new * f + dz[0] * self.peephole[0] + dz[1] * self.peephole[1];
        (dz, self.keep_h * dh, dc_prev, [dz[0] * self.c_prev, dz[1] * self.c_prev, dz[3] * self.new])
    }
}

fn lstm_step_forward(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    const PARAMS: usize = 0;
    const GATES: usize = 1;
    const H: usize = 2;
    const C: usize = 3;
    const ROWS: usize = 4;
    const BIAS: usize = 6;
    let k: LstmStepForward = parse(params);
    let (hidden, width) = (k.hidden as usize, 4 * k.hidden as usize);
    let (mut gates, mut h, mut c) = (x.target(GATES), x.target(H), x.target(C));
    let mut flags = x.operands[5].clone();
    let is_masked = k.cell.mask_scale != 0.0;
    let product_from = if is_masked { k.masked_prev } else { k.h_prev } as usize;
    for b in 0..k.n_rows as usize {
        let ended = k.use_lengths == 1 && k.t as usize >= x.u(ROWS, b);
        let stream = if is_masked || k.cell.draws == 1 { x.u(ROWS, k.cell.streams as usize + b) } else { 0 };
        for unit in 0..hidden {
            let state = b * hidden + unit;
            let (h_prev, c_prev) = (x.f(H, k.h_prev as usize + state), x.f(C, k.c_prev as usize + state));
            let mask = cell_mask(&k.cell, stream, unit);
            if k.initial == 1 {
                h[k.masked as usize + state] = mask * h_prev;
                continue;
            }
            let column = |gate: usize| k.gates as usize + b * width + gate_column(unit, gate);
            let mut z = [0.0; 4];
            for (gate, z) in z.iter_mut().enumerate() {
                *z = x.f(GATES, column(gate));
                for j in 0..hidden {
                    *z += x.f(H, product_from + b * hidden + j) * x.f(PARAMS, k.weight_hh as usize + weight_at(hidden, j, unit, gate));
                }
                for bias in [k.bias_ih, k.bias_hh] {
                    if bias != NONE {
                        *z += x.f(BIAS, bias as usize + gate_column(unit, gate));
                    }
                }
            }
            if !ended && z.iter().any(|z| !z.is_finite()) {
                flags[0] = 1;
            }
            let peephole = peepholes(x, BIAS, k.cell.peephole, hidden, unit);
            let done = Unit::forward(&k.cell, peephole, z, [h_prev, c_prev], stream, k.t, unit);
            for (gate, value) in done.gates.into_iter().enumerate() {
                gates[column(gate)] = if ended { 0.0 } else { value };
            }
            c[k.c as usize + state] = if ended { c_prev } else { done.c };
            h[k.h as usize + state] = if ended { h_prev } else { done.h };
            if is_masked {
                h[k.masked as usize + state] = if ended { x.f(H, k.masked_prev as usize + state) } else { mask * done.h };
            }
        }
    }
    vec![Want::Unchanged, Want::Floats(gates), Want::Floats(h), Want::Floats(c), Want::Unchanged, Want::Words(flags), Want::Unchanged]
}

fn peepholes(x: &Inputs<'_>, operand: usize, offset: u32, hidden: usize, unit: usize) -> [f64; 3] {
    if offset == NONE {
        return [0.0; 3];
    }
    [0, 1, 2].map(|gate| x.f(operand, offset as usize + gate * hidden + unit))
}

fn lstm_step_backward(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    const PARAMS: usize = 0;
    const GATES: usize = 1;
    const C: usize = 2;
    const DH_OUT: usize = 3;
    const CARRY: usize = 4;
    const ROWS: usize = 5;
    let k: LstmStepBackward = parse(params);
    let (rows, hidden, width) = (k.n_rows as usize, k.hidden as usize, 4 * k.hidden as usize);
    let (mut gates, mut carry) = (x.target(GATES), x.target(CARRY));
    let is_masked = k.cell.mask_scale != 0.0;
    for b in 0..rows {
        let length = if k.use_lengths == 1 { x.u(ROWS, b) } else { usize::MAX };
        let stream = if is_masked || k.cell.draws == 1 { x.u(ROWS, k.cell.streams as usize + b) } else { 0 };
        for unit in 0..hidden {
            let column = |gate: usize| k.gates as usize + b * width + gate_column(unit, gate);
            let state = b * hidden + unit;
            let sum_at = |gate: usize| k.carry as usize + (2 * rows + 3 * b + gate) * hidden + unit;
            let mut sums = if k.cell.peephole == NONE { [0.0; 3] } else { [0, 1, 2].map(|gate| x.f(CARRY, sum_at(gate))) };
            // What reaches h through W_hh from the step after.
            let mut dh = 0.0;
            if k.last == 0 {
                for v in 0..hidden {
                    for gate in 0..4 {
                        dh += x.f(GATES, k.dz_after as usize + b * width + gate_column(v, gate))
                            * x.f(PARAMS, k.weight_hh as usize + weight_at(hidden, unit, v, gate));
                    }
                }
                dh *= cell_mask(&k.cell, stream, unit);
            } else if k.cell.peephole != NONE {
                (0..3).for_each(|gate| sums[gate] = 0.0);
            }
            let carry_at = k.carry as usize + state;
            let mut carry_h = x.f(CARRY, carry_at);
            if k.initial == 1 || k.t as usize >= length {
                carry[carry_at] = carry_h + dh;
                if k.cell.peephole != NONE && k.last == 1 {
                    (0..3).for_each(|gate| carry[sum_at(gate)] = 0.0);
                }
                if k.initial == 0 {
                    (0..4).for_each(|gate| gates[column(gate)] = 0.0);
                }
                continue;
            }
            if k.last == 1 || k.t as usize + 1 == length || k.cell.zoneout_h > 0.0 {
                dh += carry_h;
                carry_h = 0.0;
            }
            if k.dh_out != NONE {
                dh += x.f(DH_OUT, k.dh_out as usize + state);
            }
            let of_step = [0, 1, 2, 3].map(|gate| x.f(GATES, column(gate)));
            let peephole = peepholes(x, 6, k.cell.peephole, hidden, unit);
            let done = Unit::of_gates(&k.cell, peephole, of_step, [0.0, x.f(C, k.c_prev as usize + state)], stream, k.t, unit);
            let dc_at = k.carry as usize + rows * hidden + state;
            let (dz, dh_prev, dc_prev, dp) = done.backward(&k.cell, dh, x.f(CARRY, dc_at));
            (0..4).for_each(|gate| gates[column(gate)] = dz[gate]);
            carry[carry_at] = carry_h + dh_prev;
            carry[dc_at] = dc_prev;
            if k.cell.peephole != NONE {
                (0..3).for_each(|gate| carry[sum_at(gate)] = sums[gate] + dp[gate]);
            }
        }
    }
    vec![Want::Unchanged, Want::Floats(gates), Want::Unchanged, Want::Unchanged, Want::Floats(carry), Want::Unchanged, Want::Unchanged]
}

/// Philox4x32-10 from the paper's text: ten rounds of two 32 x 32 -> 64 bit products.
fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (mut left, mut right) = ([counter[0], counter[2]], [counter[1], counter[3]]);
    for round in 0..10u32 {
        let round_key = [key[0].wrapping_add(0x9E37_79B9u32.wrapping_mul(round)), key[1].wrapping_add(0xBB67_AE85u32.wrapping_mul(round))];
        let products = [u64::from(left[0]) * 0xD251_1F53, u64::from(left[1]) * 0xCD9E_8D57];
        let high = products.map(|p| (p / (1 << 32)) as u32);
        let low = products.map(|p| (p % (1 << 32)) as u32);
        left = [high[1] ^ right[0] ^ round_key[0], high[0] ^ right[1] ^ round_key[1]];
        right = [low[1], low[0]];
    }
    [left[0], right[0], left[1], right[1]]
}

fn dropout(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: Dropout = parse(params);
    let mut to = x.target(2);
    for t in 0..k.n_steps as usize {
        for row in 0..k.n_rows as usize {
            for unit in 0..k.width as usize {
                let at = (t * k.n_rows as usize + row) * k.width as usize + unit;
                let words = philox([unit as u32 / 4, t as u32, x.u(0, row) as u32, k.tag], [k.key0, k.key1]);
                let is_dropped = words[unit % 4] < k.threshold;
                to[k.to as usize + at] = if is_dropped { 0.0 } else { x.f(1, k.start as usize + at) * f64::from(k.scale) };
            }
        }
    }
    vec![Want::Unchanged, Want::Unchanged, Want::Floats(to)]
}

/// How much step `t` of a row counts.
fn step_counts(k: &PoolSteps, lengths: &Inputs<'_>, row: usize, t: usize) -> f64 {
    let n = if k.use_lengths == 1 { lengths.u(1, row) } else { k.n_steps as usize };
    let counts = match k.which {
        0 => t < n,
        1 => t + 1 == n,
        _ => t == 0 && n > 0,
    };
    f64::from(u8::from(counts)) / if k.which == 0 { n.max(1) as f64 } else { 1.0 }
}

fn pool_steps(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: PoolSteps = parse(params);
    let (rows, width) = (k.n_rows as usize, k.width as usize);
    let mut pooled = x.target(2);
    for row in 0..rows {
        for i in 0..width {
            let of_step = |t: usize| x.f(0, k.x as usize + (t * rows + row) * width + i) * step_counts(&k, x, row, t);
            pooled[k.pooled as usize + row * width + i] = (0..k.n_steps as usize).map(of_step).sum();
        }
    }
    vec![Want::Unchanged, Want::Unchanged, Want::Floats(pooled)]
}

fn pool_steps_gradient(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: PoolSteps = parse(params);
    let (rows, width) = (k.n_rows as usize, k.width as usize);
    let mut gradient = x.target(2);
    for (t, row) in (0..k.n_steps as usize).flat_map(|t| (0..rows).map(move |row| (t, row))) {
        let counts = step_counts(&k, x, row, t);
        for i in 0..width {
            gradient[k.x as usize + (t * rows + row) * width + i] = x.f(0, k.pooled as usize + row * width + i) * counts;
        }
    }
    vec![Want::Unchanged, Want::Unchanged, Want::Floats(gradient)]
}

fn softmax_cross_entropy(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: SoftmaxCrossEntropy = parse(params);
    let (mut logits, mut losses, mut flags) = (x.target(0), x.target(3), x.operands[4].clone());
    for (row, loss) in losses.iter_mut().enumerate().take(k.n_rows as usize) {
        let start = row * k.row_stride as usize;
        let (target, weight) = (x.u(1, row), x.f(2, row));
        let counts = weight != 0.0 && target < k.n_classes as usize;
        let values: Vec<f64> = (0..k.n_classes as usize).map(|v| x.f(0, start + v)).collect();
        let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = values.iter().map(|v| (v - max).exp()).sum();
        *loss = if counts { weight * (max + sum.ln() - values[target]) } else { 0.0 };
        if counts && values.iter().any(|v| !v.is_finite()) {
            flags[0] = 1;
        }
        if k.gradient == 1 {
            for v in 0..k.row_stride as usize {
                let probability = values.get(v).map(|v| (v - max).exp() / sum);
                let hit = if v == target { 1.0 } else { 0.0 };
                logits[start + v] = match probability {
                    Some(probability) if counts => weight * (probability - hit) * f64::from(k.scale),
                    _ => 0.0,
                };
            }
        }
    }
    vec![Want::Floats(logits), Want::Unchanged, Want::Unchanged, Want::Floats(losses), Want::Words(flags)]
}

fn squared_error(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: SquaredError = parse(params);
    let (mut predictions, mut losses, mut flags) = (x.target(0), x.target(3), x.operands[4].clone());
    for (row, loss) in losses.iter_mut().enumerate().take(k.n_rows as usize) {
        *loss = 0.0;
        for o in 0..k.row_stride as usize {
            let at = row * k.row_stride as usize + o;
            let mut gradient = 0.0;
            if o < k.n_outputs as usize {
                let dense = row * k.n_outputs as usize + o;
                let (weight, difference) = (x.f(2, dense), x.f(0, at) - x.f(1, dense));
                if weight != 0.0 {
                    *loss += weight * difference * difference;
                    gradient = 2.0 * weight * difference * f64::from(k.scale);
                    if !x.f(0, at).is_finite() {
                        flags[0] = 1;
                    }
                }
            }
            if k.gradient == 1 {
                predictions[at] = gradient;
            }
        }
    }
    vec![Want::Floats(predictions), Want::Unchanged, Want::Unchanged, Want::Floats(losses), Want::Words(flags)]
}

fn column_sums(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: ColumnSums = parse(params);
    let mut sums = x.target(1);
    for col in 0..k.n_cols as usize {
        let total: f64 = (0..k.n_rows as usize).map(|row| x.f(0, k.offset as usize + row * k.row_stride as usize + col)).sum();
        for out in [k.out, k.second_out] {
            if out != NONE {
                let at = out as usize + col;
                sums[at] = total + if k.accumulate == 1 { x.f(1, at) } else { 0.0 };
            }
        }
    }
    vec![Want::Unchanged, Want::Floats(sums)]
}

fn embedding_gradient(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: EmbeddingGradient = parse(params);
    let (n, width) = (k.n_distinct as usize, k.width as usize);
    let mut grad = x.target(2);
    for i in 0..n {
        let token = x.u(0, i);
        let (start, end) = (x.u(0, n + i), x.u(0, n + i + 1));
        let first = start + k.first as usize;
        let last = end.min(first + k.limit as usize);
        for e in 0..width {
            let at = k.grad as usize + token * width + e;
            let places = (first..last).map(|place| x.u(0, 2 * n + 1 + place));
            let added: f64 = places.map(|place| x.f(1, k.dx as usize + place * width + e)).sum();
            grad[at] = x.f(2, at) + added;
        }
    }
    vec![Want::Unchanged, Want::Unchanged, Want::Floats(grad)]
}

fn sum(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: Sum = parse(params);
    let mut total = x.target(1);
    total[k.out as usize] = (0..k.len as usize).map(|i| x.f(0, k.offset as usize + i)).sum();
    vec![Want::Unchanged, Want::Floats(total)]
}

fn block_squares(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: BlockSquares = parse(params);
    let mut squares = x.target(1);
    let len = k.len as usize;
    for (block, first) in (0..len).step_by(4096).enumerate() {
        squares[k.out as usize + block] = (first..len.min(first + 4096)).map(|i| x.f(0, i) * x.f(0, i)).sum();
    }
    vec![Want::Unchanged, Want::Floats(squares)]
}

fn non_finite(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: NonFinite = parse(params);
    let mut count = x.operands[1].clone();
    count[k.out as usize] += (0..k.len as usize).filter(|&i| !x.f(0, k.offset as usize + i).is_finite()).count() as u32;
    vec![Want::Unchanged, Want::Words(count)]
}

fn add(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: Add = parse(params);
    let mut y = x.target(1);
    for i in 0..k.len as usize {
        let at = k.y_offset as usize + i;
        y[at] = x.f(1, at) + f64::from(k.a) * x.f(0, k.x_offset as usize + i);
    }
    vec![Want::Unchanged, Want::Floats(y)]
}

fn scale(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: Scale = parse(params);
    let mut y = x.target(0);
    for i in 0..k.len as usize {
        let at = k.offset as usize + i;
        y[at] = f64::from(k.a) * x.f(0, at);
    }
    vec![Want::Floats(y)]
}

/// The gradient that counts in an update.
fn counting(r: &Regular, grad: f64, p: f64) -> f64 {
    let mut g = f64::from(r.grad_scale) * grad;
    let limit = f64::from(r.clip_value);
    if limit > 0.0 {
        g = g.clamp(-limit, limit);
    }
    let sign = if p == 0.0 { 0.0 } else { p.signum() };
    g + f64::from(r.weight_decay) * p + f64::from(r.l1) * sign
}

fn sgd(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: Sgd = parse(params);
    let (mut p, mut v) = (x.target(0), x.target(2));
    let (lr, momentum) = (f64::from(k.lr), f64::from(k.momentum));
    for i in 0..k.len as usize {
        let g = counting(&k.regular, x.f(1, i), x.f(0, i));
        let mut step = g;
        if momentum != 0.0 {
            v[i] = momentum * x.f(2, i) + g;
            step = if k.nesterov == 1 { g + momentum * v[i] } else { v[i] };
        }
        p[i] = x.f(0, i) - lr * step;
    }
    vec![Want::Floats(p), Want::Unchanged, Want::Floats(v)]
}

fn rmsprop(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: Rmsprop = parse(params);
    let (mut p, mut m, mut v) = (x.target(0), x.target(2), x.target(3));
    let (lr, alpha, momentum) = (f64::from(k.lr), f64::from(k.alpha), f64::from(k.momentum));
    for i in 0..k.len as usize {
        let g = counting(&k.regular, x.f(1, i), x.f(0, i));
        v[i] = alpha * x.f(3, i) + (1.0 - alpha) * g * g;
        let mut step = g / (v[i].sqrt() + f64::from(k.eps));
        if momentum != 0.0 {
            m[i] = momentum * x.f(2, i) + step;
            step = m[i];
        }
        p[i] = x.f(0, i) - lr * step;
    }
    vec![Want::Floats(p), Want::Unchanged, Want::Floats(m), Want::Floats(v)]
}

fn adam(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: Adam = parse(params);
    let (mut p, mut m, mut v) = (x.target(0), x.target(2), x.target(3));
    let (beta1, beta2) = (f64::from(k.beta1), f64::from(k.beta2));
    for i in 0..k.len as usize {
        let g = counting(&k.regular, x.f(1, i), x.f(0, i));
        m[i] = beta1 * x.f(2, i) + (1.0 - beta1) * g;
        v[i] = beta2 * x.f(3, i) + (1.0 - beta2) * g * g;
        p[i] = f64::from(k.shrink) * x.f(0, i) - f64::from(k.step_size) * m[i] / (v[i].sqrt() / f64::from(k.root2) + f64::from(k.eps));
    }
    vec![Want::Floats(p), Want::Unchanged, Want::Floats(m), Want::Floats(v)]
}

#[test]
fn every_kernel_has_exactly_one_oracle() {
    let mut oracles: Vec<&str> = ORACLES.iter().map(|(name, _)| *name).collect();
    let mut kernels: Vec<&str> = carrousel::kernels::ALL.iter().map(|entry| entry.name).collect();
    oracles.sort_unstable();
    kernels.sort_unstable();
    assert_eq!(oracles, kernels);
}

#[test]
fn the_oracles_generator_gives_the_published_vectors() {
    assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    assert_eq!(
        philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
        [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
    );
}
