//! What every kernel must compute, straight from the equations in its documentation: f64, naive, element by element, no code shared with the kernels.
//!
//! An oracle reads the operands as they were before the launch, and gives for each what it must hold afterwards. Elements it does not
//! write must keep their bits.

use carrousel::kernels::dropout::Dropout;
use carrousel::kernels::elementwise::Scale;
use carrousel::kernels::embedding::{EmbeddingGather, EmbeddingGradient};
use carrousel::kernels::gemm::{Gemm, Matrix};
use carrousel::kernels::loss::{BinaryCrossEntropy, QuantileLoss, SoftmaxCrossEntropy, SquaredError};
use carrousel::kernels::lstm::{
    Cell, LstmNormBackward, LstmNormForward, LstmNormInput, LstmProject, LstmStateGradient, LstmStepBackward, LstmStepForward,
    LstmSweepBackward, LstmSweepForward, NONE,
};
use carrousel::kernels::pooling::PoolSteps;
use carrousel::kernels::probe::{CHAINS, MultiplyAdd};
use carrousel::kernels::reduce::{BlockSquares, ColumnSums, NonFinite, Sum};
use carrousel::kernels::update::{Adam, Regular, Rmsprop, Sgd};
use carrousel::kernels::weight_drop::WeightDrop;

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
    ("lstm_norm_input", lstm_norm_input),
    ("lstm_step_forward", lstm_step_forward),
    ("lstm_norm_forward", lstm_norm_forward),
    ("lstm_project", lstm_project),
    ("lstm_sweep_forward", lstm_sweep_forward),
    ("dropout", dropout),
    ("weight_drop", weight_drop),
    ("pool_steps", pool_steps),
    ("softmax_cross_entropy", softmax_cross_entropy),
    ("binary_cross_entropy", binary_cross_entropy),
    ("squared_error", squared_error),
    ("quantile_loss", quantile_loss),
    ("pool_steps_gradient", pool_steps_gradient),
    ("lstm_state_gradient", lstm_state_gradient),
    ("lstm_step_backward", lstm_step_backward),
    ("lstm_norm_backward", lstm_norm_backward),
    ("lstm_sweep_backward", lstm_sweep_backward),
    ("column_sums", column_sums),
    ("embedding_gradient", embedding_gradient),
    ("sum", sum),
    ("block_squares", block_squares),
    ("non_finite", non_finite),
    ("scale", scale),
    ("sgd", sgd),
    ("rmsprop", rmsprop),
    ("adam", adam),
    ("multiply_add", multiply_add),
    ("gemm_half", gemm_half),
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

/// Whether a cell's kernels read stream numbers.
fn is_random(cell: &Cell) -> bool {
    cell.mask_scale != 0.0 || cell.drop_scale != 0.0 || cell.draws == 1
}

/// What a unit's h is multiplied by on its way up at step `t`.
pub fn drop_mask(cell: &Cell, stream: usize, t: u32, unit: usize) -> f64 {
    if cell.drop_scale == 0.0 {
        return 1.0;
    }
    let word = philox([unit as u32 / 4, t, stream as u32, cell.drop_tag], [cell.key0, cell.key1])[unit % 4];
    if word < cell.drop_threshold { 0.0 } else { f64::from(cell.drop_scale) }
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
        let d_hat = (1.0 - self.keep_h) * dh;
        let tanh_c = self.new.tanh();
        let dz_o = grad_clip(cell, d_hat * tanh_c * self.gates[3] * (1.0 - self.gates[3]));
        let (dz, dc_prev, dp) = self.backward_cell(cell, dz_o, d_hat * self.gates[3] * (1.0 - tanh_c * tanh_c), dc);
        (dz, self.keep_h * dh, dc_prev, dp)
    }

    /// From dz of o, the gradient of the new cell state through h, and that of c: dz, the gradients of the old c and of the peephole weights.
    pub fn backward_cell(&self, cell: &Cell, dz_o: f64, through_h: f64, dc: f64) -> ([f64; 4], f64, [f64; 3]) {
        let [i, f, g, _] = self.gates;
        let clip = |d: f64| grad_clip(cell, d);
        let mut d_new = (1.0 - self.keep_c) * dc + through_h + dz_o * self.peephole[2];
        if self.raw.abs() > limit(cell.cell_clip) {
            d_new = 0.0;
        }
        let (d_i, d_f) = if cell.coupled == 1 { (d_new * (g - self.c_prev), 0.0) } else { (d_new * g, d_new * self.c_prev) };
        let dz = [clip(d_i * i * (1.0 - i)), clip(d_f * f * (1.0 - f)), clip(d_new * i * (1.0 - g * g)), dz_o];
        let dc_prev = self.keep_c * dc + d_new * f + dz[0] * self.peephole[0] + dz[1] * self.peephole[1];
        (dz, dc_prev, [dz[0] * self.c_prev, dz[1] * self.c_prev, dz[3] * self.new])
    }
}

fn grad_clip(cell: &Cell, d: f64) -> f64 {
    d.max(-limit(cell.grad_clip)).min(limit(cell.grad_clip))
}

/// `(v - mean) / sqrt(variance + 1e-5)`, and the factor.
fn normalise(v: &[f64]) -> (Vec<f64>, f64) {
    let n = v.len() as f64;
    let mean = v.iter().sum::<f64>() / n;
    let variance = v.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
    let factor = 1.0 / (variance + 1e-5).sqrt();
    (v.iter().map(|v| (v - mean) * factor).collect(), factor)
}

/// The gradient of what was normalised to `y`, from that of `y`.
fn normalise_backward(y: &[f64], dy: &[f64], factor: f64) -> Vec<f64> {
    let n = y.len() as f64;
    let mean = dy.iter().sum::<f64>() / n;
    let with_y = dy.iter().zip(y).map(|(d, y)| d * y).sum::<f64>() / n;
    y.iter().zip(dy).map(|(y, d)| factor * (d - mean - y * with_y)).collect()
}

/// A whole row of any cell at one step: norms and projection too. Sizes are the true ones, gates lie one behind another.
#[derive(Clone, Copy)]
pub struct RowCell<'a> {
    pub cell: &'a Cell,
    pub hidden: usize,
    /// `[3, H]`.
    pub peephole: Option<&'a [f64]>,
    /// Gains `[4H]` of both products, gain and bias `[2, H]` of the cell state.
    pub norm: Option<[&'a [f64]; 3]>,
    /// `[R, H]`.
    pub projection: Option<&'a [f64]>,
}

/// What a row has been through.
pub struct RowStep {
    pub units: Vec<Unit>,
    /// Both products, normalised, and their factors.
    x: (Vec<f64>, f64),
    pub y: (Vec<f64>, f64),
    /// The new cell state, normalised, and its factor.
    of_c: (Vec<f64>, f64),
    pub m: Vec<f64>,
    pub h: Vec<f64>,
    pub c: Vec<f64>,
    keep_h: Vec<f64>,
}

/// What comes out of a row backward.
pub struct RowGradient {
    /// Of the products of the input and of h, `[4H]`, and of the biases.
    pub x: Vec<f64>,
    pub y: Vec<f64>,
    pub z: Vec<f64>,
    /// Of the old h past the weights, and of the old c.
    pub h: Vec<f64>,
    pub c: Vec<f64>,
    pub peephole: Vec<f64>,
    pub norm: [Vec<f64>; 3],
    pub projection: Vec<f64>,
}

impl<'a> RowCell<'a> {
    /// From the products of the input and of h, biases apart.
    #[allow(clippy::too_many_arguments, reason = "what a step reads")]
    pub fn forward(&self, x: &[f64], y: &[f64], bias: &[f64], h_prev: &[f64], c_prev: &[f64], stream: usize, t: u32) -> RowStep {
        let x = if self.norm.is_some() { normalise(x) } else { (x.to_vec(), 1.0) };
        self.forward_normed(x, y, bias, h_prev, c_prev, stream, t)
    }

    /// As [`Self::forward`], with the input's product normalised already.
    #[allow(clippy::too_many_arguments, reason = "what a step reads")]
    pub fn forward_normed(
        &self,
        x: (Vec<f64>, f64),
        y: &[f64],
        bias: &[f64],
        h_prev: &[f64],
        c_prev: &[f64],
        stream: usize,
        t: u32,
    ) -> RowStep {
        let hidden = self.hidden;
        let y = if self.norm.is_some() { normalise(y) } else { (y.to_vec(), 1.0) };
        let gains = self.norm.map_or([None; 3], |norm| norm.map(Some));
        let gain = |which: usize, j: usize| gains[which].map_or(1.0, |gain| gain[j]);
        let z: Vec<f64> = (0..4 * hidden).map(|j| gain(0, j) * x.0[j] + gain(1, j) * y.0[j] + bias[j]).collect();
        let units: Vec<Unit> = (0..hidden)
            .map(|u| {
                let peephole = [0, 1, 2].map(|gate| self.peephole.map_or(0.0, |w| w[gate * hidden + u]));
                Unit::forward(self.cell, peephole, [0, 1, 2, 3].map(|gate| z[gate * hidden + u]), [0.0, c_prev[u]], stream, t, u)
            })
            .collect();
        self.of_units(units, x, y, h_prev, stream, t)
    }

    /// From gates that are activated already.
    #[allow(clippy::too_many_arguments, reason = "what a step left")]
    pub fn of_gates(&self, gates: &[f64], x: (Vec<f64>, f64), y: (Vec<f64>, f64), c_prev: &[f64], stream: usize, t: u32) -> RowStep {
        let hidden = self.hidden;
        let unit = |u: usize| {
            let peephole = [0, 1, 2].map(|gate| self.peephole.map_or(0.0, |w| w[gate * hidden + u]));
            Unit::of_gates(self.cell, peephole, [0, 1, 2, 3].map(|gate| gates[gate * hidden + u]), [0.0, c_prev[u]], stream, t, u)
        };
        let old = vec![0.0; self.projection.map_or(hidden, |w| w.len() / hidden)];
        self.of_units((0..hidden).map(unit).collect(), x, y, &old, stream, t)
    }

    fn of_units(&self, units: Vec<Unit>, x: (Vec<f64>, f64), y: (Vec<f64>, f64), h_prev: &[f64], stream: usize, t: u32) -> RowStep {
        let new: Vec<f64> = units.iter().map(|unit| unit.new).collect();
        let of_c = if self.norm.is_some() { normalise(&new) } else { (new, 1.0) };
        let m: Vec<f64> = units.iter().enumerate().map(|(u, unit)| unit.gates[3] * self.inner(&of_c.0, u).tanh()).collect();
        let r = self.projection.map_or_else(|| m.clone(), |w| w.chunks_exact(m.len()).map(|row| dot(row, &m)).collect());
        let keep_h: Vec<f64> = (0..r.len()).map(|u| cell_kept(self.cell, 7, stream, t, u)).collect();
        let h = (0..r.len()).map(|u| keep_h[u] * h_prev[u] + (1.0 - keep_h[u]) * r[u]).collect();
        let c = units.iter().map(|unit| unit.c).collect();
        RowStep { units, x, y, of_c, m, h, c, keep_h }
    }

    /// What tanh is taken of.
    fn inner(&self, of_c: &[f64], u: usize) -> f64 {
        self.norm.map_or(of_c[u], |[.., c]| c[u] * of_c[u] + c[self.hidden + u])
    }

    /// From the gradients of h and c.
    pub fn backward(&self, step: &RowStep, dh: &[f64], dc: &[f64]) -> RowGradient {
        let d_hat: Vec<f64> = dh.iter().zip(&step.keep_h).map(|(d, keep)| (1.0 - keep) * d).collect();
        let dm = match self.projection {
            None => d_hat.clone(),
            Some(w) => (0..self.hidden).map(|u| (0..d_hat.len()).map(|r| d_hat[r] * w[r * self.hidden + u]).sum()).collect(),
        };
        let mut back = self.backward_of_m(step, &dm, dc);
        back.h = dh.iter().zip(&step.keep_h).map(|(d, keep)| keep * d).collect();
        if self.projection.is_some() {
            back.projection = d_hat.iter().flat_map(|d| step.m.iter().map(move |m| d * m)).collect();
        }
        back
    }

    /// From the gradients of m and c.
    pub fn backward_of_m(&self, step: &RowStep, dm: &[f64], dc: &[f64]) -> RowGradient {
        let hidden = self.hidden;
        let of_tanh: Vec<f64> = (0..hidden)
            .map(|u| {
                let tanh_c = self.inner(&step.of_c.0, u).tanh();
                dm[u] * step.units[u].gates[3] * (1.0 - tanh_c * tanh_c)
            })
            .collect();
        let mut norm: [Vec<f64>; 3] = Default::default();
        let through_h = match self.norm {
            None => of_tanh,
            Some([.., c]) => {
                norm[2] = of_tanh.iter().zip(&step.of_c.0).map(|(d, y)| d * y).chain(of_tanh.iter().copied()).collect();
                let dy: Vec<f64> = of_tanh.iter().zip(c).map(|(d, gain)| d * gain).collect();
                normalise_backward(&step.of_c.0, &dy, step.of_c.1)
            }
        };
        let (mut z, mut c, mut peephole) = (vec![0.0; 4 * hidden], vec![0.0; hidden], vec![0.0; 3 * hidden]);
        for (u, unit) in step.units.iter().enumerate() {
            let o = unit.gates[3];
            let dz_o = grad_clip(self.cell, dm[u] * self.inner(&step.of_c.0, u).tanh() * o * (1.0 - o));
            let (dz, dc_prev, dp) = unit.backward_cell(self.cell, dz_o, through_h[u], dc[u]);
            (0..4).for_each(|gate| z[gate * hidden + u] = dz[gate]);
            (0..3).for_each(|gate| peephole[gate * hidden + u] = dp[gate]);
            c[u] = dc_prev;
        }
        let (mut x, mut y) = (z.clone(), z.clone());
        if let Some([ih, hh, _]) = self.norm {
            for (which, (to, (normed, factor), gain)) in [(&mut x, &step.x, ih), (&mut y, &step.y, hh)].into_iter().enumerate() {
                norm[which] = z.iter().zip(normed).map(|(d, v)| d * v).collect();
                let dy: Vec<f64> = z.iter().zip(gain).map(|(d, gain)| d * gain).collect();
                *to = normalise_backward(normed, &dy, *factor);
            }
        }
        RowGradient { x, y, z, h: Vec::new(), c, peephole, norm, projection: Vec::new() }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// What a kernel's row holds: padded gates at `at` of an operand as `[4H]` one gate behind another, true units only.
fn gates_of_row(x: &Inputs<'_>, operand: usize, at: usize, units: usize) -> Vec<f64> {
    (0..4).flat_map(|gate| (0..units).map(move |u| x.f(operand, at + gate_column(u, gate)))).collect()
}

fn floats_of(x: &Inputs<'_>, operand: usize, at: usize, n: usize) -> Vec<f64> {
    (0..n).map(|i| x.f(operand, at + i)).collect()
}

/// Puts gates of true units back, padding zero.
fn put_gates(to: &mut [f64], at: usize, hidden: usize, values: &[f64]) {
    let units = values.len() / 4;
    (0..hidden).for_each(|u| {
        (0..4).for_each(|gate| to[at + gate_column(u, gate)] = if u < units { values[gate * units + u] } else { 0.0 });
    });
}

fn lstm_norm_input(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: LstmNormInput = parse(params);
    let (hidden, units) = (k.hidden as usize, k.units as usize);
    let mut gates = x.target(0);
    for row in 0..k.n_rows as usize {
        let at = k.x as usize + row * 4 * hidden;
        let (normed, factor) = normalise(&gates_of_row(x, 0, at, units));
        put_gates(&mut gates, at, hidden, &normed);
        let at = k.factors as usize + 4 * row;
        gates[at..at + 4].copy_from_slice(&[factor, 0.0, 0.0, 0.0]);
    }
    vec![Want::Floats(gates)]
}

/// The weights of a normalised row, true sizes: peepholes, gains of both products, gain and bias of the cell state.
fn norm_weights(
    x: &Inputs<'_>,
    bias: usize,
    peephole: u32,
    at: [u32; 3],
    hidden: usize,
    units: usize,
) -> (Option<Vec<f64>>, [Vec<f64>; 3]) {
    let of_units = |offset: usize, n: usize| (0..n).flat_map(|row| floats_of(x, bias, offset + row * hidden, units)).collect::<Vec<_>>();
    let peephole = (peephole != NONE).then(|| of_units(peephole as usize, 3));
    let [ih, hh, c] = at.map(|at| at as usize);
    (peephole, [gates_of_row(x, bias, ih, units), gates_of_row(x, bias, hh, units), of_units(c, 2)])
}

fn lstm_norm_forward(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    const GATES: usize = 0;
    const H: usize = 1;
    const C: usize = 2;
    const ROWS: usize = 3;
    const BIAS: usize = 5;
    const INPUT: usize = 6;
    let k: LstmNormForward = parse(params);
    let (hidden, units) = (k.hidden as usize, k.units as usize);
    let (mut gates, mut h, mut c) = (x.target(GATES), x.target(H), x.target(C));
    let (peephole, norm) = norm_weights(x, BIAS, k.cell.peephole, [k.norm_ih, k.norm_hh, k.norm_c], hidden, units);
    let row_cell = RowCell {
        cell: &k.cell,
        hidden: units,
        peephole: peephole.as_deref(),
        norm: Some([&norm[0], &norm[1], &norm[2]]),
        projection: None,
    };
    let mut bias = vec![0.0; 4 * units];
    for at in [k.bias_ih, k.bias_hh].into_iter().filter(|&at| at != NONE) {
        bias.iter_mut().zip(gates_of_row(x, BIAS, at as usize, units)).for_each(|(sum, b)| *sum += b);
    }
    let is_masked = k.cell.mask_scale != 0.0;
    for b in 0..k.n_rows as usize {
        let ended = k.use_lengths == 1 && k.t as usize >= x.u(ROWS, b);
        let stream = if is_random(&k.cell) { x.u(ROWS, k.cell.streams as usize + b) } else { 0 };
        let place = |at: u32| at as usize + b * 4 * hidden;
        let state = |at: u32| at as usize + b * hidden;
        let normed_x = (gates_of_row(x, GATES, place(k.x), units), 1.0);
        let y = gates_of_row(x, GATES, place(k.y), units);
        let c_prev = floats_of(x, C, state(k.c_prev), units);
        let projects = k.m != NONE;
        let h_prev = if projects { vec![0.0; units] } else { floats_of(x, H, state(k.h_prev), units) };
        let step = row_cell.forward_normed(normed_x, &y, &bias, &h_prev, &c_prev, stream, k.t);
        let of_gates: Vec<f64> = (0..4).flat_map(|gate| step.units.iter().map(move |unit| unit.gates[gate])).collect();
        put_gates(&mut gates, place(k.y), hidden, &step.y.0);
        let at = k.factors as usize + 4 * b;
        let factor_x = x.f(GATES, at);
        gates[at..at + 4].copy_from_slice(&[factor_x, step.y.1, 0.0, 0.0]);
        if ended {
            (0..4 * hidden).for_each(|j| gates[place(k.gates) + j] = 0.0);
        } else {
            put_gates(&mut gates, place(k.gates), hidden, &of_gates);
            // What padding makes of zeros.
            for u in units..hidden {
                let i = sigmoid(0.0);
                let of_pad = [i, if k.cell.coupled == 1 { 1.0 - i } else { i }, 0.0, i];
                (0..4).for_each(|gate| gates[place(k.gates) + gate_column(u, gate)] = of_pad[gate]);
            }
        }
        for u in 0..hidden {
            let exists = u < units;
            c[state(k.c) + u] = match (ended, exists) {
                (true, _) => x.f(C, state(k.c_prev) + u),
                (false, true) => step.c[u],
                (false, false) => 0.0,
            };
            if projects {
                c[state(k.m) + u] = if ended || !exists { 0.0 } else { step.m[u] };
                continue;
            }
            let old = x.f(H, state(k.h_prev) + u);
            let pad = cell_kept(&k.cell, 7, stream, k.t, u) * old;
            h[state(k.h) + u] = match (ended, exists) {
                (true, _) => old,
                (false, true) => step.h[u],
                (false, false) => pad,
            };
            if is_masked {
                h[state(k.masked) + u] = cell_mask(&k.cell, stream, u) * h[state(k.h) + u];
            }
            if k.output != NONE {
                let added = if k.input == NONE { 0.0 } else { x.f(INPUT, state(k.input) + u) };
                let handed = drop_mask(&k.cell, stream, k.t, u) * h[state(k.h) + u] + added;
                h[state(k.output) + u] = if ended { 0.0 } else { handed };
            }
        }
    }
    let (gates, h, c) = (Want::Floats(gates), Want::Floats(h), Want::Floats(c));
    vec![gates, h, c, Want::Unchanged, Want::Unchanged, Want::Unchanged, Want::Unchanged]
}

fn lstm_norm_backward(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    const GATES: usize = 0;
    const C: usize = 1;
    const DH: usize = 2;
    const CARRY: usize = 3;
    const ROWS: usize = 4;
    const BIAS: usize = 5;
    let k: LstmNormBackward = parse(params);
    let (rows, hidden, units, width) = (k.n_rows as usize, k.hidden as usize, k.units as usize, k.width as usize);
    let (mut gates, mut carry) = (x.target(GATES), x.target(CARRY));
    let (peephole, norm) = norm_weights(x, BIAS, k.cell.peephole, [k.norm_ih, k.norm_hh, k.norm_c], hidden, units);
    let row_cell = RowCell {
        cell: &k.cell,
        hidden: units,
        peephole: peephole.as_deref(),
        norm: Some([&norm[0], &norm[1], &norm[2]]),
        projection: None,
    };
    let of_peepholes = if peephole.is_some() { 3 * hidden } else { 0 };
    let sums_width = of_peepholes + 10 * hidden;
    for b in 0..rows {
        let ended = k.use_lengths == 1 && k.t as usize >= x.u(ROWS, b);
        let stream = if is_random(&k.cell) { x.u(ROWS, k.cell.streams as usize + b) } else { 0 };
        let place = |at: u32| at as usize + b * 4 * hidden;
        let dc_at = k.carry as usize + rows * width + b * hidden;
        let sums_at = k.carry as usize + rows * (width + hidden) + b * sums_width;
        let before = |i: usize| if k.last == 1 { 0.0 } else { x.f(CARRY, sums_at + i) };
        carry[sums_at..sums_at + sums_width].iter_mut().enumerate().for_each(|(i, sum)| *sum = before(i));
        if ended {
            for at in [k.gates, k.x, k.y] {
                gates[place(at)..place(at) + 4 * hidden].fill(0.0);
            }
            continue;
        }
        let factors = k.factors as usize + 4 * b;
        let of = |at: u32, factor: usize| (gates_of_row(x, GATES, place(at), units), x.f(GATES, factors + factor));
        let c_prev = floats_of(x, C, k.c_prev as usize + b * hidden, units);
        let step = row_cell.of_gates(&gates_of_row(x, GATES, place(k.gates), units), of(k.x, 0), of(k.y, 1), &c_prev, stream, k.t);
        let dm = if k.from_carry == NONE {
            floats_of(x, DH, k.dh as usize + b * hidden, units)
        } else {
            floats_of(x, CARRY, k.from_carry as usize + b * hidden, units)
        };
        let dc = floats_of(x, CARRY, dc_at, units);
        let back = row_cell.backward_of_m(&step, &dm, &dc);
        put_gates(&mut gates, place(k.gates), hidden, &back.z);
        put_gates(&mut gates, place(k.x), hidden, &back.x);
        put_gates(&mut gates, place(k.y), hidden, &back.y);
        carry[dc_at..dc_at + units].copy_from_slice(&back.c);
        // A padded unit has gates of zero in the cases, and forgets; zoneout keeps its share.
        for u in units..hidden {
            let keep = cell_kept(&k.cell, 8, stream, k.t, u);
            carry[dc_at + u] = keep * x.f(CARRY, dc_at + u);
        }
        for u in 0..units {
            if peephole.is_some() {
                (0..3).for_each(|gate| carry[sums_at + gate * hidden + u] += back.peephole[gate * units + u]);
            }
            for (which, start) in [(0, 0), (1, 4 * hidden)] {
                for gate in 0..4 {
                    carry[sums_at + of_peepholes + start + gate_column(u, gate)] += back.norm[which][gate * units + u];
                }
            }
            for row in 0..2 {
                carry[sums_at + of_peepholes + (8 + row) * hidden + u] += back.norm[2][row * units + u];
            }
        }
    }
    vec![Want::Floats(gates), Want::Unchanged, Want::Unchanged, Want::Floats(carry), Want::Unchanged, Want::Unchanged]
}

fn lstm_project(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    const H: usize = 2;
    const ROWS: usize = 3;
    let k: LstmProject = parse(params);
    let (hidden, width) = (k.hidden as usize, k.width as usize);
    let mut h = x.target(H);
    let is_masked = k.cell.mask_scale != 0.0;
    for b in 0..k.n_rows as usize {
        let ended = k.use_lengths == 1 && k.t as usize >= x.u(ROWS, b);
        let stream = if is_random(&k.cell) { x.u(ROWS, k.cell.streams as usize + b) } else { 0 };
        for unit in 0..width {
            let at = b * width + unit;
            let (old, keep) = (x.f(H, k.h_prev as usize + at), cell_kept(&k.cell, 7, stream, k.t, unit));
            let product: f64 =
                (0..hidden).map(|u| x.f(0, k.weight_hr as usize + unit * hidden + u) * x.f(1, k.m as usize + b * hidden + u)).sum();
            let next = if ended { old } else { keep * old + (1.0 - keep) * product };
            h[k.h as usize + at] = next;
            if is_masked {
                let kept = x.f(H, k.masked_prev as usize + at);
                h[k.masked as usize + at] = if ended { kept } else { cell_mask(&k.cell, stream, unit) * next };
            }
            if k.output != NONE {
                let added = if k.input == NONE { 0.0 } else { x.f(4, k.input as usize + at) };
                let handed = drop_mask(&k.cell, stream, k.t, unit) * next + added;
                h[k.output as usize + at] = if ended { 0.0 } else { handed };
            }
        }
    }
    vec![Want::Unchanged, Want::Unchanged, Want::Floats(h), Want::Unchanged, Want::Unchanged]
}

fn lstm_state_gradient(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    const DZ: usize = 1;
    const DH: usize = 3;
    const CARRY: usize = 4;
    const ROWS: usize = 5;
    let k: LstmStateGradient = parse(params);
    let (hidden, width) = (k.hidden as usize, k.width as usize);
    let (mut dh, mut carry, mut dx) = (x.target(DH), x.target(CARRY), x.target(6));
    for b in 0..k.n_rows as usize {
        let length = if k.use_lengths == 1 { x.u(ROWS, b) } else { usize::MAX };
        let stream = if is_random(&k.cell) { x.u(ROWS, k.cell.streams as usize + b) } else { 0 };
        for unit in 0..width {
            let at = b * width + unit;
            let mut d = 0.0;
            if k.last == 0 {
                for (v, gate) in (0..hidden).flat_map(|v| [0, 1, 2, 3].map(|gate| (v, gate))) {
                    d += x.f(DZ, k.dz_after as usize + b * 4 * hidden + gate_column(v, gate))
                        * x.f(0, k.weight_hh as usize + weight_at(width, unit, v, gate));
                }
                d *= cell_mask(&k.cell, stream, unit);
            }
            let carry_at = k.carry as usize + at;
            if k.initial == 1 || k.t as usize >= length {
                carry[carry_at] = x.f(CARRY, carry_at) + d;
                if k.initial == 0 {
                    dh[k.dh as usize + at] = 0.0;
                    if k.dx != NONE {
                        dx[k.dx as usize + at] = 0.0;
                    }
                }
                continue;
            }
            if k.last == 1 || k.t as usize + 1 == length || k.cell.zoneout_h > 0.0 {
                d += x.f(CARRY, carry_at);
                carry[carry_at] = 0.0;
            }
            if k.dh_out != NONE {
                let from_above = x.f(2, k.dh_out as usize + at);
                d += drop_mask(&k.cell, stream, k.t, unit) * from_above;
                if k.dx != NONE {
                    dx[k.dx as usize + at] = from_above;
                }
            }
            let keep = cell_kept(&k.cell, 7, stream, k.t, unit);
            if k.cell.zoneout_h > 0.0 {
                carry[carry_at] = keep * d;
            }
            dh[k.dh as usize + at] = (1.0 - keep) * d;
        }
    }
    let (dh, carry, dx) = (Want::Floats(dh), Want::Floats(carry), Want::Floats(dx));
    vec![Want::Unchanged, Want::Unchanged, Want::Unchanged, dh, carry, Want::Unchanged, dx]
}

fn lstm_step_forward(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    const PARAMS: usize = 0;
    const GATES: usize = 1;
    const H: usize = 2;
    const C: usize = 3;
    const ROWS: usize = 4;
    const BIAS: usize = 6;
    const INPUT: usize = 7;
    let k: LstmStepForward = parse(params);
    let (hidden, width, h_width) = (k.hidden as usize, 4 * k.hidden as usize, k.width as usize);
    let projects = k.m != NONE;
    let (mut gates, mut h, mut c) = (x.target(GATES), x.target(H), x.target(C));
    let mut flags = x.operands[5].clone();
    let is_masked = k.cell.mask_scale != 0.0;
    let product_from = if is_masked { k.masked_prev } else { k.h_prev } as usize;
    for b in 0..k.n_rows as usize {
        let ended = k.use_lengths == 1 && k.t as usize >= x.u(ROWS, b);
        let stream = if is_random(&k.cell) { x.u(ROWS, k.cell.streams as usize + b) } else { 0 };
        for unit in 0..hidden {
            let state = b * hidden + unit;
            let h_prev = if projects { 0.0 } else { x.f(H, k.h_prev as usize + state) };
            let mask = cell_mask(&k.cell, stream, unit);
            if k.initial == 1 {
                h[k.masked as usize + state] = mask * h_prev;
                continue;
            }
            let c_prev = x.f(C, k.c_prev as usize + state);
            let column = |gate: usize| k.gates as usize + b * width + gate_column(unit, gate);
            let mut z = [0.0; 4];
            for (gate, z) in z.iter_mut().enumerate() {
                *z = x.f(GATES, column(gate));
                for j in 0..h_width {
                    *z += x.f(H, product_from + b * h_width + j) * x.f(PARAMS, k.weight_hh as usize + weight_at(h_width, j, unit, gate));
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
            if projects {
                c[k.m as usize + state] = if ended { 0.0 } else { done.gates[3] * done.new.tanh() };
                continue;
            }
            h[k.h as usize + state] = if ended { h_prev } else { done.h };
            if is_masked {
                h[k.masked as usize + state] = if ended { x.f(H, k.masked_prev as usize + state) } else { mask * done.h };
            }
            if k.output != NONE {
                let added = if k.input == NONE { 0.0 } else { x.f(INPUT, k.input as usize + state) };
                let handed = drop_mask(&k.cell, stream, k.t, unit) * done.h + added;
                h[k.output as usize + state] = if ended { 0.0 } else { handed };
            }
        }
    }
    let (gates, h, c) = (Want::Floats(gates), Want::Floats(h), Want::Floats(c));
    vec![Want::Unchanged, gates, h, c, Want::Unchanged, Want::Words(flags), Want::Unchanged, Want::Unchanged]
}

/// The nearest half float, of two as near the even one.
fn nearest_half(x: f64) -> f64 {
    if x.abs() >= 65_520.0 || x == 0.0 || x.is_nan() {
        return if x.abs() >= 65_520.0 { f64::INFINITY.copysign(x) } else { x };
    }
    let spacing = (x.abs().log2().floor().max(-14.0) - 10.0).exp2();
    (x / spacing).round_ties_even() * spacing
}

fn gemm_half(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let half = |word: &u32| (nearest_half(f64::from(f32::from_bits(*word))) as f32).to_bits();
    let mut operands = x.operands.to_vec();
    operands[..2].iter_mut().for_each(|operand| *operand = operand.iter().map(half).collect());
    gemm(params, &Inputs { operands: &operands })
}

/// All steps of the plain cell, row by row.
fn lstm_sweep_forward(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: LstmSweepForward = parse(params);
    let hidden = k.hidden as usize;
    let place = |start: u32, next: u32, step: u32| start.wrapping_add(next.wrapping_mul(step)) as usize;
    let (mut gates, mut h, mut c) = (x.target(1), x.target(2), x.target(3));
    let mut flags = x.operands[5].clone();
    for b in 0..k.n_rows as usize {
        let mut state: Vec<f64> = (0..hidden).map(|u| x.f(2, k.h as usize + b * hidden + u)).collect();
        let mut cell: Vec<f64> = (0..hidden).map(|u| x.f(3, k.c as usize + b * hidden + u)).collect();
        for step in 0..k.n_steps {
            let ended = k.use_lengths == 1 && place(k.t, k.t_next, step) >= x.u(4, b);
            let before = state.clone();
            for unit in 0..hidden {
                let column = |gate: usize| place(k.gates, k.gates_next, step) + b * 4 * hidden + gate_column(unit, gate);
                let z = [0, 1, 2, 3].map(|gate| {
                    let product: f64 =
                        (0..hidden).map(|j| before[j] * x.f(0, k.weight_hh as usize + weight_at(hidden, j, unit, gate))).sum();
                    let biases = [k.bias_ih, k.bias_hh].into_iter().filter(|&bias| bias != NONE);
                    x.f(1, column(gate)) + product + biases.map(|bias| x.f(6, bias as usize + gate_column(unit, gate))).sum::<f64>()
                });
                let values = if ended { [0.0; 4] } else { [sigmoid(z[0]), sigmoid(z[1]), z[2].tanh(), sigmoid(z[3])] };
                if !ended {
                    flags[0] |= u32::from(z.iter().any(|z| !z.is_finite()));
                    cell[unit] = values[1] * cell[unit] + values[0] * values[2];
                    state[unit] = values[3] * cell[unit].tanh();
                }
                (0..4).for_each(|gate| gates[column(gate)] = values[gate]);
                h[place(k.h, k.h_next, step + 1) + b * hidden + unit] = state[unit];
                c[place(k.c, k.c_next, step + 1) + b * hidden + unit] = cell[unit];
            }
        }
    }
    let (gates, h, c) = (Want::Floats(gates), Want::Floats(h), Want::Floats(c));
    vec![Want::Unchanged, gates, h, c, Want::Unchanged, Want::Words(flags), Want::Unchanged]
}

/// All steps of the plain cell backward, row by row.
fn lstm_sweep_backward(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: LstmSweepBackward = parse(params);
    let (rows, hidden) = (k.n_rows as usize, k.hidden as usize);
    let place = |start: u32, next: u32, step: u32| start.wrapping_add(next.wrapping_mul(step)) as usize;
    let (mut gates, mut carry) = (x.target(1), x.target(4));
    for b in 0..rows {
        let length = if k.use_lengths == 1 { x.u(5, b) } else { usize::MAX };
        let of_carry = |at: usize, u: usize| k.carry as usize + (at * rows + b) * hidden + u;
        let mut carried: Vec<f64> = (0..hidden).map(|u| x.f(4, of_carry(0, u))).collect();
        let mut dc: Vec<f64> = (0..hidden).map(|u| x.f(4, of_carry(1, u))).collect();
        // By unit and gate; nothing before the sweep's first step.
        let of_after = |u: usize, gate: usize| x.f(1, k.dz_after as usize + b * 4 * hidden + gate_column(u, gate));
        let mut dz: Option<Vec<[f64; 4]>> =
            (k.dz_after != NONE).then(|| (0..hidden).map(|u| [0, 1, 2, 3].map(|gate| of_after(u, gate))).collect());
        let handed = |dz: &Option<Vec<[f64; 4]>>, unit: usize| -> f64 {
            let terms = dz.iter().flatten().enumerate().flat_map(|(v, dz)| [0, 1, 2, 3].map(|gate| (v, gate, dz[gate])));
            terms.map(|(v, gate, dz)| dz * x.f(0, k.weight_hh as usize + weight_at(hidden, unit, v, gate))).sum()
        };
        for step in 0..k.n_steps {
            let t = place(k.t, k.t_next, step);
            let mut now = vec![[0.0; 4]; hidden];
            for unit in 0..hidden {
                let column = |gate: usize| place(k.gates, k.gates_next, step) + b * 4 * hidden + gate_column(unit, gate);
                let mut dh = handed(&dz, unit);
                if t >= length {
                    carried[unit] += dh;
                } else {
                    if dz.is_none() || t + 1 == length {
                        dh += std::mem::take(&mut carried[unit]);
                    }
                    if k.dh_out != NONE {
                        dh += x.f(3, place(k.dh_out, k.dh_out_next, step) + b * hidden + unit);
                    }
                    let [i, f, g, o] = [0, 1, 2, 3].map(|gate| x.f(1, column(gate)));
                    let before = x.f(2, place(k.c_prev, k.c_next, step) + b * hidden + unit);
                    let tanh = (f * before + i * g).tanh();
                    let d = dc[unit] + dh * o * (1.0 - tanh * tanh);
                    now[unit] = [d * g * i * (1.0 - i), d * before * f * (1.0 - f), d * i * (1.0 - g * g), dh * tanh * o * (1.0 - o)];
                    dc[unit] = d * f;
                }
                (0..4).for_each(|gate| gates[column(gate)] = now[unit][gate]);
            }
            dz = Some(now);
        }
        for u in 0..hidden {
            let initial = if k.initial == 1 { handed(&dz, u) } else { 0.0 };
            carry[of_carry(0, u)] = carried[u] + initial;
            carry[of_carry(1, u)] = dc[u];
        }
    }
    let (gates, carry) = (Want::Floats(gates), Want::Floats(carry));
    vec![Want::Unchanged, gates, Want::Unchanged, Want::Unchanged, carry, Want::Unchanged]
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
    let (rows, hidden, width, h_width) = (k.n_rows as usize, k.hidden as usize, 4 * k.hidden as usize, k.width as usize);
    // With a projection what is h's own has been done.
    let projected = k.projected == 1;
    let cell = if projected { Cell { zoneout_h: 0.0, ..k.cell } } else { k.cell };
    let (mut gates, mut carry, mut dx) = (x.target(GATES), x.target(CARRY), x.target(7));
    for b in 0..rows {
        let length = if k.use_lengths == 1 { x.u(ROWS, b) } else { usize::MAX };
        let stream = if is_random(&k.cell) { x.u(ROWS, k.cell.streams as usize + b) } else { 0 };
        for unit in 0..hidden {
            let column = |gate: usize| k.gates as usize + b * width + gate_column(unit, gate);
            let state = b * hidden + unit;
            let sum_at = |gate: usize| k.carry as usize + rows * (h_width + hidden) + (3 * b + gate) * hidden + unit;
            let mut sums = if k.cell.peephole == NONE { [0.0; 3] } else { [0, 1, 2].map(|gate| x.f(CARRY, sum_at(gate))) };
            // What reaches h through W_hh from the step after.
            let mut dh = 0.0;
            if projected {
                for r in 0..h_width {
                    dh += x.f(DH_OUT, k.dh_out as usize + b * h_width + r) * x.f(PARAMS, k.weight as usize + r * hidden + unit);
                }
            } else if k.last == 0 {
                for v in 0..hidden {
                    for gate in 0..4 {
                        dh += x.f(GATES, k.dz_after as usize + b * width + gate_column(v, gate))
                            * x.f(PARAMS, k.weight as usize + weight_at(hidden, unit, v, gate));
                    }
                }
                dh *= cell_mask(&k.cell, stream, unit);
            }
            if k.last == 1 && k.cell.peephole != NONE {
                (0..3).for_each(|gate| sums[gate] = 0.0);
            }
            let carry_at = k.carry as usize + state;
            let mut carry_h = if projected { 0.0 } else { x.f(CARRY, carry_at) };
            if k.initial == 1 || k.t as usize >= length {
                if !projected {
                    carry[carry_at] = carry_h + dh;
                }
                if k.cell.peephole != NONE && k.last == 1 {
                    (0..3).for_each(|gate| carry[sum_at(gate)] = 0.0);
                }
                if k.initial == 0 {
                    (0..4).for_each(|gate| gates[column(gate)] = 0.0);
                    if k.dx != NONE {
                        dx[k.dx as usize + state] = 0.0;
                    }
                }
                continue;
            }
            if !projected && (k.last == 1 || k.t as usize + 1 == length || k.cell.zoneout_h > 0.0) {
                dh += carry_h;
                carry_h = 0.0;
            }
            if !projected && k.dh_out != NONE {
                let from_above = x.f(DH_OUT, k.dh_out as usize + state);
                dh += drop_mask(&k.cell, stream, k.t, unit) * from_above;
                if k.dx != NONE {
                    dx[k.dx as usize + state] = from_above;
                }
            }
            let of_step = [0, 1, 2, 3].map(|gate| x.f(GATES, column(gate)));
            let peephole = peepholes(x, 6, k.cell.peephole, hidden, unit);
            let done = Unit::of_gates(&cell, peephole, of_step, [0.0, x.f(C, k.c_prev as usize + state)], stream, k.t, unit);
            let dc_at = k.carry as usize + rows * h_width + state;
            let (dz, dh_prev, dc_prev, dp) = done.backward(&cell, dh, x.f(CARRY, dc_at));
            (0..4).for_each(|gate| gates[column(gate)] = dz[gate]);
            if !projected {
                carry[carry_at] = carry_h + dh_prev;
            }
            carry[dc_at] = dc_prev;
            if k.cell.peephole != NONE {
                (0..3).for_each(|gate| carry[sum_at(gate)] = sums[gate] + dp[gate]);
            }
        }
    }
    let (gates, carry, dx) = (Want::Floats(gates), Want::Floats(carry), Want::Floats(dx));
    vec![Want::Unchanged, gates, Want::Unchanged, Want::Unchanged, carry, Want::Unchanged, Want::Unchanged, dx]
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

fn weight_drop(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: WeightDrop = parse(params);
    let mut kept = x.target(1);
    for i in 0..k.len as usize {
        let words = philox([i as u32 / 4, 0, 0, k.tag], [k.key0, k.key1]);
        kept[k.to as usize + i] = if words[i % 4] < k.threshold { 0.0 } else { x.f(0, k.start as usize + i) * f64::from(k.scale) };
    }
    vec![Want::Unchanged, Want::Floats(kept)]
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

fn binary_cross_entropy(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: BinaryCrossEntropy = parse(params);
    let (mut logits, mut losses, mut flags) = (x.target(0), x.target(3), x.operands[4].clone());
    for (row, loss) in losses.iter_mut().enumerate().take(k.n_rows as usize) {
        let weight = x.f(2, row);
        *loss = 0.0;
        for o in 0..k.row_stride as usize {
            let at = row * k.row_stride as usize + o;
            let mut gradient = 0.0;
            if o < k.n_outputs as usize && weight != 0.0 {
                let (z, y) = (x.f(0, at), x.f(1, row * k.n_outputs as usize + o));
                // The likelihood as it is defined; where the odds are too long for f64's 1 - p, the line that it tends to.
                let (p, q) = (1.0 / (1.0 + (-z).exp()), 1.0 / (1.0 + z.exp()));
                let (log_p, log_q) = (if p > 0.0 { p.ln() } else { z }, if q > 0.0 { q.ln() } else { -z });
                *loss -= weight * (y * log_p + (1.0 - y) * log_q);
                gradient = weight * (p - y) * f64::from(k.scale);
                if !z.is_finite() {
                    flags[0] = 1;
                }
            }
            if k.gradient == 1 {
                logits[at] = gradient;
            }
        }
    }
    vec![Want::Floats(logits), Want::Unchanged, Want::Unchanged, Want::Floats(losses), Want::Words(flags)]
}

fn quantile_loss(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: QuantileLoss = parse(params);
    let (mut predictions, mut losses, mut flags) = (x.target(0), x.target(4), x.operands[5].clone());
    let n_levels = k.n_levels as usize;
    for (row, loss) in losses.iter_mut().enumerate().take(k.n_rows as usize) {
        *loss = 0.0;
        for column in 0..k.row_stride as usize {
            let at = row * k.row_stride as usize + column;
            let (o, level) = (column / n_levels, column % n_levels);
            let mut gradient = 0.0;
            if o < k.n_outputs as usize {
                let dense = row * k.n_outputs as usize + o;
                let (weight, d, q) = (x.f(2, dense), x.f(1, dense) - x.f(0, at), x.f(3, level));
                if weight != 0.0 {
                    *loss += weight * (q * d).max((q - 1.0) * d) / n_levels as f64;
                    gradient = weight * f64::from(k.scale) / n_levels as f64 * if d > 0.0 { -q } else { 1.0 - q };
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
    vec![Want::Floats(predictions), Want::Unchanged, Want::Unchanged, Want::Unchanged, Want::Floats(losses), Want::Words(flags)]
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

fn scale(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: Scale = parse(params);
    let mut y = x.target(0);
    for i in 0..k.len as usize {
        let at = k.offset as usize + i;
        y[at] = f64::from(k.a) * x.f(0, at);
    }
    vec![Want::Floats(y)]
}

fn multiply_add(params: &[u8], x: &Inputs<'_>) -> Vec<Want> {
    let k: MultiplyAdd = parse(params);
    let mut out = x.target(0);
    for (i, out) in out.iter_mut().enumerate().take(k.len as usize) {
        let number = |n: u32| {
            let start = f64::from(n) / 32.0 + (i % 16) as f64 / 16.0;
            (0..k.trips).fold(start, |x, _| x * f64::from(k.shrink) + f64::from(k.shift))
        };
        *out = (0..CHAINS).map(number).sum();
    }
    vec![Want::Floats(out)]
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
