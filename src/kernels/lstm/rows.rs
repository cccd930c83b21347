//! One row of the batch at one step, on the CPU: the mathematics that the step kernels and the sweep share.
//!
//! Every function is compiled once for each instruction set (`for_isa`). With `FUSED`, activations and the plain cell fuse products and sums;
//! the arithmetic and its order are else the same in all of them. Loops with arithmetic are written out: a closure that an iterator calls may be
//! compiled without the instruction set, and a fused product is a call then (a step with layer normalisation took 246 ms so, and takes 211).

use super::{Cell, NORM_EPS, PEEPHOLES};
use crate::kernels::activations::{self, fma};
use crate::rng::Purpose;
use crate::shape::{GATES, PANEL, PANEL_UNITS};

/// A cell with its weights at one step.
pub(super) struct CellRow<'a> {
    pub cell: &'a Cell,
    /// `[3, H]`.
    pub peephole: Option<&'a [f32]>,
    pub norm: Option<NormRow<'a>>,
    pub t: u32,
}

/// Gains and biases of layer normalisation.
#[derive(Clone, Copy)]
pub(super) struct NormRow<'a> {
    /// H without padding.
    pub units: usize,
    /// `[4H]`: gains of the input's and of the recurrent product.
    pub ih: &'a [f32],
    pub hh: &'a [f32],
    /// `[2, H]`: gain and bias of the cell state.
    pub c: &'a [f32],
}

impl CellRow<'_> {
    /// The peephole weights of one gate for a panel; zeros where there are none.
    fn peephole(&self, gate: usize, panel: usize, hidden: usize) -> [f32; PANEL_UNITS] {
        let mut weights = [0.0; PANEL_UNITS];
        if let Some(all) = self.peephole {
            weights.copy_from_slice(&all[gate * hidden + panel * PANEL_UNITS..][..PANEL_UNITS]);
        }
        weights
    }

    fn clip(&self) -> f32 {
        if self.cell.cell_clip > 0.0 { self.cell.cell_clip } else { f32::INFINITY }
    }
}

/// `v` within `-limit..=limit`; keeps NaN.
#[inline(always)]
fn clip(v: f32, limit: f32) -> f32 {
    if v > limit {
        limit
    } else if v < -limit {
        -limit
    } else {
        v
    }
}

/// Gradients of the peepholes and of layer normalisation that a row gathers over time: `[3H]`, then `[4H]`, `[4H]`, `[2, H]`.
pub(super) const fn sums_width(hidden: usize, peepholes: bool, norm: bool) -> usize {
    (if peepholes { PEEPHOLES * hidden } else { 0 }) + if norm { (2 * GATES + 2) * hidden } else { 0 }
}

type Lanes = [f32; PANEL_UNITS];

/// 1 for the units of a panel that exist, 0 for padding.
#[inline(always)]
fn existing(panel: usize, units: usize) -> Lanes {
    if (panel + 1) * PANEL_UNITS <= units {
        return [1.0; PANEL_UNITS];
    }
    let mut lanes = [0.0; PANEL_UNITS];
    lanes.iter_mut().enumerate().for_each(|(u, lane)| *lane = f32::from(u8::from(panel * PANEL_UNITS + u < units)));
    lanes
}

#[inline(always)]
fn total(lanes: Lanes) -> f32 {
    lanes.into_iter().sum()
}

/// `(x - mean) / sqrt(variance + eps)` in place, over what is not padding; padding becomes 0. `gates` values a unit. Returns the factor.
#[inline(always)]
fn normalise(x: &mut [f32], gates: usize, units: usize) -> f32 {
    let n = (gates * units) as f32;
    let panel = gates * PANEL_UNITS;
    let mut sum = [0.0; PANEL_UNITS];
    for x in x.chunks_exact(PANEL_UNITS) {
        for u in 0..PANEL_UNITS {
            sum[u] += x[u];
        }
    }
    let mean = total(sum) / n;
    let mut squares = [0.0; PANEL_UNITS];
    for (p, x) in x.chunks_exact_mut(panel).enumerate() {
        let exists = existing(p, units);
        for x in x.chunks_exact_mut(PANEL_UNITS) {
            for u in 0..PANEL_UNITS {
                x[u] = (x[u] - mean) * exists[u];
                squares[u] += x[u] * x[u];
            }
        }
    }
    let factor = 1.0 / (total(squares) / n + NORM_EPS).sqrt();
    for x in x {
        *x *= factor;
    }
    factor
}

/// The way back: `dy`, the gradient of the normalised `y`, times `gain` becomes the gradient of what was normalised, in `y`'s place.
#[inline(always)]
fn normalise_backward(y: &mut [f32], dy: &[f32], gain: &[f32], factor: f32, gates: usize, units: usize) {
    let n = (gates * units) as f32;
    let (mut sum, mut with_y) = ([0.0; PANEL_UNITS], [0.0; PANEL_UNITS]);
    for ((y, dy), gain) in y.chunks_exact(PANEL_UNITS).zip(dy.chunks_exact(PANEL_UNITS)).zip(gain.chunks_exact(PANEL_UNITS)) {
        for u in 0..PANEL_UNITS {
            let d = dy[u] * gain[u];
            sum[u] += d;
            with_y[u] += d * y[u];
        }
    }
    let (mean, mean_with_y) = (total(sum) / n, total(with_y) / n);
    let panel = gates * PANEL_UNITS;
    for (p, ((y, dy), gain)) in y.chunks_exact_mut(panel).zip(dy.chunks_exact(panel)).zip(gain.chunks_exact(panel)).enumerate() {
        let exists = existing(p, units);
        let parts = y.chunks_exact_mut(PANEL_UNITS).zip(dy.chunks_exact(PANEL_UNITS)).zip(gain.chunks_exact(PANEL_UNITS));
        for ((y, dy), gain) in parts {
            for u in 0..PANEL_UNITS {
                y[u] = factor * (dy[u] * gain[u] - mean - y[u] * mean_with_y) * exists[u];
            }
        }
    }
}

/// The input's product `[4H]` normalised in place; its factor goes to `factor`.
#[inline(always)]
pub(super) fn norm_input(x: &mut [f32], units: usize, factor: &mut f32) {
    *factor = normalise(x, GATES, units);
}

/// z from both products: the input's is normalised already, the recurrent one becomes so in place. `bias` may be empty.
#[inline(always)]
pub(super) fn norm_gates(norm: NormRow<'_>, z: &mut [f32], x: &[f32], y: &mut [f32], bias: &[f32], factor: &mut f32) {
    *factor = normalise(y, GATES, norm.units);
    let products = norm.ih.iter().zip(x).zip(norm.hh.iter().zip(&*y));
    for (z, ((of_x, x), (of_y, y))) in z.iter_mut().zip(products) {
        *z = of_x * x + of_y * y;
    }
    for (z, b) in z.iter_mut().zip(bias) {
        *z += b;
    }
}

/// Activates z in place. `m` gets o tanh(c), before zoneout and projection, `c` the new cell state.
#[inline(always)]
pub(super) fn cell_forward<const FUSED: bool>(
    row: &CellRow<'_>,
    stream: u32,
    z: &mut [f32],
    c_prev: &[f32],
    m: &mut [f32],
    c: &mut [f32],
    non_finite: &mut u32,
) {
    let (cell, hidden, limit) = (row.cell, m.len(), row.clip());
    let has_peephole = row.peephole.is_some();
    let mut bad = 0u32;
    for (p, z) in z.chunks_exact_mut(PANEL).enumerate() {
        let units = p * PANEL_UNITS..(p + 1) * PANEL_UNITS;
        let c_prev = &c_prev[units.clone()];
        let (m, c) = (&mut m[units.clone()], &mut c[units]);
        for v in z.iter() {
            bad |= u32::from(v.to_bits() & 0x7f80_0000 == 0x7f80_0000);
        }
        let (zi, rest) = z.split_at_mut(PANEL_UNITS);
        let (zf, rest) = rest.split_at_mut(PANEL_UNITS);
        let (zg, zo) = rest.split_at_mut(PANEL_UNITS);
        let mut new = [0.0; PANEL_UNITS];
        if has_peephole {
            let (pi, pf) = (row.peephole(0, p, hidden), row.peephole(1, p, hidden));
            for u in 0..PANEL_UNITS {
                zi[u] += pi[u] * c_prev[u];
                zf[u] += pf[u] * c_prev[u];
            }
        }
        for u in 0..PANEL_UNITS {
            let i = activations::sigmoid::<FUSED>(zi[u]);
            let f = if cell.coupled == 1 { 1.0 - i } else { activations::sigmoid::<FUSED>(zf[u]) };
            let g = activations::tanh::<FUSED>(zg[u]);
            (zi[u], zf[u], zg[u]) = (i, f, g);
            new[u] = clip(f * c_prev[u] + i * g, limit);
        }
        if has_peephole {
            let po = row.peephole(2, p, hidden);
            for u in 0..PANEL_UNITS {
                zo[u] += po[u] * new[u];
            }
        }
        for u in 0..PANEL_UNITS {
            let o = activations::sigmoid::<FUSED>(zo[u]);
            zo[u] = o;
            c[u] = new[u];
        }
        if row.norm.is_some() {
            m.copy_from_slice(&new);
        } else {
            for u in 0..PANEL_UNITS {
                m[u] = zo[u] * activations::tanh::<FUSED>(new[u]);
            }
        }
        if cell.zoneout_c > 0.0 {
            let keep = cell.kept(Purpose::ZoneoutC, cell.zoneout_c, stream, row.t, p);
            for u in 0..PANEL_UNITS {
                c[u] = keep[u] * c_prev[u] + (1.0 - keep[u]) * c[u];
            }
        }
    }
    if let Some(norm) = row.norm {
        let (gain, bias) = norm.c.split_at(hidden);
        normalise(m, 1, norm.units);
        for (p, (z, m)) in z.chunks_exact(PANEL).zip(m.chunks_exact_mut(PANEL_UNITS)).enumerate() {
            let o = &z[3 * PANEL_UNITS..];
            let (gain, bias) = (&gain[p * PANEL_UNITS..][..PANEL_UNITS], &bias[p * PANEL_UNITS..][..PANEL_UNITS]);
            for u in 0..PANEL_UNITS {
                m[u] = o[u] * activations::tanh::<FUSED>(gain[u] * m[u] + bias[u]);
            }
        }
    }
    *non_finite |= bad;
}

/// Zoneout of the new h, and its masked copy where there is a mask; the last things that happen to h in a step.
#[inline(always)]
pub(super) fn settle(row: &CellRow<'_>, stream: u32, h_prev: &[f32], h: &mut [f32], masked: &mut [f32]) {
    let cell = row.cell;
    if cell.zoneout_h > 0.0 {
        for (p, (h, h_prev)) in h.chunks_exact_mut(PANEL_UNITS).zip(h_prev.chunks_exact(PANEL_UNITS)).enumerate() {
            let keep = cell.kept(Purpose::ZoneoutH, cell.zoneout_h, stream, row.t, p);
            for u in 0..PANEL_UNITS {
                h[u] = keep[u] * h_prev[u] + (1.0 - keep[u]) * h[u];
            }
        }
    }
    if cell.is_masked() {
        apply_mask(cell, stream, h, masked);
    }
}

/// What the layer hands up where that is not h: dropped, and with the layer's input added (empty where it is not).
#[inline(always)]
pub(super) fn hand_up(row: &CellRow<'_>, stream: u32, h: &[f32], input: &[f32], output: &mut [f32]) {
    if row.cell.drops() {
        for (block, (to, h)) in output.chunks_exact_mut(4).zip(h.chunks_exact(4)).enumerate() {
            let mask = row.cell.drop_mask(stream, row.t, block);
            for u in 0..4 {
                to[u] = mask[u] * h[u];
            }
        }
    } else {
        output.copy_from_slice(h);
    }
    output.iter_mut().zip(input).for_each(|(to, x)| *to += x);
}

/// `masked` = the mask of recurrent dropout times h.
#[inline(always)]
pub(super) fn apply_mask(cell: &Cell, stream: u32, h: &[f32], masked: &mut [f32]) {
    for (block, (to, h)) in masked.chunks_exact_mut(4).zip(h.chunks_exact(4)).enumerate() {
        let mask = cell.mask(stream, block);
        for u in 0..4 {
            to[u] = mask[u] * h[u];
        }
    }
}

/// Where a row stands when a gradient reaches its h.
#[derive(Clone, Copy)]
pub(super) struct Arrival {
    /// Nothing comes through the recurrent product: the first step of a sweep.
    pub is_last: bool,
    /// No step of this row's: it has ended, or the gradient is the initial state's.
    pub passes: bool,
    /// The row's last step, which takes what waits in the carry.
    pub takes: bool,
}

impl Arrival {
    pub fn new(t: usize, length: u32, is_last: bool, is_initial: bool) -> Self {
        Self { is_last, passes: is_initial || t as u32 >= length, takes: is_last || t as u32 + 1 == length }
    }
}

/// The gradient of h: `dh` holds what came through the recurrent product, and gets what goes on through the cell (or the projection);
/// what goes elsewhere stays in `carry`. Nothing goes on where the row passes.
#[inline(always)]
pub(super) fn state_gradient(row: &CellRow<'_>, stream: u32, arrival: Arrival, dh: &mut [f32], carry: &mut [f32], dh_out: &[f32]) {
    let cell = row.cell;
    if arrival.is_last {
        dh.fill(0.0);
    } else if cell.is_masked() {
        for (block, dh) in dh.chunks_exact_mut(4).enumerate() {
            let mask = cell.mask(stream, block);
            for u in 0..4 {
                dh[u] *= mask[u];
            }
        }
    }
    if arrival.passes {
        carry.iter_mut().zip(&*dh).for_each(|(carry, dh)| *carry += dh);
        dh.fill(0.0);
        return;
    }
    if arrival.takes || cell.zoneout_h > 0.0 {
        dh.iter_mut().zip(&*carry).for_each(|(dh, carry)| *dh += carry);
        carry.fill(0.0);
    }
    if cell.drops() {
        for (block, (dh, out)) in dh.chunks_exact_mut(4).zip(dh_out.chunks_exact(4)).enumerate() {
            let mask = cell.drop_mask(stream, row.t, block);
            for u in 0..4 {
                dh[u] += mask[u] * out[u];
            }
        }
    } else {
        dh.iter_mut().zip(dh_out).for_each(|(dh, out)| *dh += out);
    }
    if cell.zoneout_h > 0.0 {
        for (p, (dh, carry)) in dh.chunks_exact_mut(PANEL_UNITS).zip(carry.chunks_exact_mut(PANEL_UNITS)).enumerate() {
            let keep = cell.kept(Purpose::ZoneoutH, cell.zoneout_h, stream, row.t, p);
            for u in 0..PANEL_UNITS {
                carry[u] = keep[u] * dh[u];
                dh[u] *= 1.0 - keep[u];
            }
        }
    }
}

/// What a normalised row takes back beside its gates: both normalised products, which become their gradients, and their factors.
pub(super) struct NormGradient<'a> {
    pub x: &'a mut [f32],
    pub y: &'a mut [f32],
    pub factors: [f32; 2],
}

/// Gates become dz, dc moves one step back; `dh`, the gradient of o tanh(c), is overwritten. `sums` gathers the gradients of peepholes and norms.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the operands of one row")]
pub(super) fn cell_backward<const FUSED: bool>(
    row: &CellRow<'_>,
    stream: u32,
    gates: &mut [f32],
    dh: &mut [f32],
    dc: &mut [f32],
    sums: &mut [f32],
    c_prev: &[f32],
    normed: Option<NormGradient<'_>>,
) {
    let (cell, hidden, limit) = (row.cell, dh.len(), row.clip());
    let dz_limit = if cell.grad_clip > 0.0 { cell.grad_clip } else { f32::INFINITY };
    let (peephole_sums, norm_sums) = sums.split_at_mut(if row.peephole.is_some() { PEEPHOLES * hidden } else { 0 });
    if let Some(norm) = row.norm {
        norm_of_cell_backward::<FUSED>(norm, [limit, dz_limit], gates, dh, c_prev, &mut norm_sums[2 * GATES * hidden..]);
    }
    for (p, z) in gates.chunks_exact_mut(PANEL).enumerate() {
        let units = p * PANEL_UNITS..(p + 1) * PANEL_UNITS;
        let (dh, c_prev, dc) = (&dh[units.clone()], &c_prev[units.clone()], &mut dc[units]);
        let mut new = [0.0; PANEL_UNITS];
        let (zi, rest) = z.split_at_mut(PANEL_UNITS);
        let (zf, rest) = rest.split_at_mut(PANEL_UNITS);
        let (zg, zo) = rest.split_at_mut(PANEL_UNITS);
        let [pi, pf, po] = [0, 1, 2].map(|gate| row.peephole(gate, p, hidden));
        let keep_c = cell.kept(Purpose::ZoneoutC, cell.zoneout_c, stream, row.t, p);
        // dz of o in o's place, and the gradient of the new cell state through h; with a norm both are done already.
        let mut through_h = [0.0; PANEL_UNITS];
        if row.norm.is_some() {
            through_h.copy_from_slice(dh);
        } else {
            for u in 0..PANEL_UNITS {
                let (o, tanh_c) = (zo[u], activations::tanh::<FUSED>(clip(zf[u] * c_prev[u] + zi[u] * zg[u], limit)));
                zo[u] = clip(dh[u] * tanh_c * o * (1.0 - o), dz_limit);
                through_h[u] = dh[u] * o * (1.0 - tanh_c * tanh_c);
            }
        }
        for u in 0..PANEL_UNITS {
            let (i, f, g, o) = (zi[u], zf[u], zg[u], zo[u]);
            let raw = f * c_prev[u] + i * g;
            new[u] = clip(raw, limit);
            let (dz_o, through_h) = (o, through_h[u]);
            let mut d = (1.0 - keep_c[u]) * dc[u] + through_h + dz_o * po[u];
            if raw > limit || raw < -limit {
                d = 0.0;
            }
            let (from_f, di) = if cell.coupled == 1 { (0.0, d * (g - c_prev[u])) } else { (d * c_prev[u] * f * (1.0 - f), d * g) };
            let dz_i = clip(di * i * (1.0 - i), dz_limit);
            let dz_f = clip(from_f, dz_limit);
            let dz_g = clip(d * i * (1.0 - g * g), dz_limit);
            (zi[u], zf[u], zg[u], zo[u]) = (dz_i, dz_f, dz_g, dz_o);
            dc[u] = keep_c[u] * dc[u] + d * f + dz_i * pi[u] + dz_f * pf[u];
        }
        if row.peephole.is_some() {
            for (gate, (dz, c)) in [(&*zi, c_prev), (&*zf, c_prev), (&*zo, &new)].into_iter().enumerate() {
                let sums = &mut peephole_sums[gate * hidden + p * PANEL_UNITS..][..PANEL_UNITS];
                for u in 0..PANEL_UNITS {
                    sums[u] += dz[u] * c[u];
                }
            }
        }
    }
    if let (Some(norm), Some(NormGradient { x, y, factors })) = (row.norm, normed) {
        let (of_ih, rest) = norm_sums.split_at_mut(GATES * hidden);
        for (sums, normed) in [(of_ih, &*x), (&mut rest[..GATES * hidden], &*y)] {
            for (sum, (dz, y)) in sums.iter_mut().zip(gates.iter().zip(normed)) {
                *sum += dz * y;
            }
        }
        normalise_backward(x, gates, norm.ih, factors[0], GATES, norm.units);
        normalise_backward(y, gates, norm.hh, factors[1], GATES, norm.units);
    }
}

/// The clipped new cell state of a panel.
#[inline(always)]
fn new_cell(z: &[f32], c_prev: &[f32], limit: f32) -> Lanes {
    let mut new = [0.0; PANEL_UNITS];
    for u in 0..PANEL_UNITS {
        new[u] = clip(z[PANEL_UNITS + u] * c_prev[u] + z[u] * z[2 * PANEL_UNITS + u], limit);
    }
    new
}

/// Through h = o tanh(gain n(c) + bias): o's gate becomes dz_o, `dh` the gradient of c; `sums` `[2, H]` gathers those of gain and bias.
#[inline(always)]
fn norm_of_cell_backward<const FUSED: bool>(
    norm: NormRow<'_>,
    [limit, dz_limit]: [f32; 2],
    gates: &mut [f32],
    dh: &mut [f32],
    c_prev: &[f32],
    sums: &mut [f32],
) {
    let (hidden, n) = (dh.len(), norm.units as f32);
    let mut sum = [0.0; PANEL_UNITS];
    for (z, c_prev) in gates.chunks_exact(PANEL).zip(c_prev.chunks_exact(PANEL_UNITS)) {
        let new = new_cell(z, c_prev, limit);
        for u in 0..PANEL_UNITS {
            sum[u] += new[u];
        }
    }
    let mean = total(sum) / n;
    let mut squares = [0.0; PANEL_UNITS];
    for (p, (z, c_prev)) in gates.chunks_exact(PANEL).zip(c_prev.chunks_exact(PANEL_UNITS)).enumerate() {
        let (new, exists) = (new_cell(z, c_prev, limit), existing(p, norm.units));
        for u in 0..PANEL_UNITS {
            squares[u] += (new[u] - mean) * (new[u] - mean) * exists[u];
        }
    }
    let factor = 1.0 / (total(squares) / n + NORM_EPS).sqrt();
    let (gain, bias) = norm.c.split_at(hidden);
    let (of_gain, of_bias) = sums.split_at_mut(hidden);
    let (mut sum, mut with_y) = ([0.0; PANEL_UNITS], [0.0; PANEL_UNITS]);
    let panels = gates.chunks_exact_mut(PANEL).zip(dh.chunks_exact_mut(PANEL_UNITS)).zip(c_prev.chunks_exact(PANEL_UNITS));
    for (p, ((z, dh), c_prev)) in panels.enumerate() {
        let (new, exists, at) = (new_cell(z, c_prev, limit), existing(p, norm.units), p * PANEL_UNITS);
        let o = &mut z[3 * PANEL_UNITS..];
        for u in 0..PANEL_UNITS {
            let y = (new[u] - mean) * factor * exists[u];
            let tanh_c = activations::tanh::<FUSED>(gain[at + u] * y + bias[at + u]);
            let d = dh[u] * o[u] * (1.0 - tanh_c * tanh_c);
            o[u] = clip(dh[u] * tanh_c * o[u] * (1.0 - o[u]), dz_limit);
            of_gain[at + u] += d * y;
            of_bias[at + u] += d;
            dh[u] = d * gain[at + u];
            sum[u] += dh[u];
            with_y[u] += dh[u] * y;
        }
    }
    let (mean_d, mean_with_y) = (total(sum) / n, total(with_y) / n);
    let panels = gates.chunks_exact(PANEL).zip(dh.chunks_exact_mut(PANEL_UNITS)).zip(c_prev.chunks_exact(PANEL_UNITS));
    for (p, ((z, dh), c_prev)) in panels.enumerate() {
        let (new, exists) = (new_cell(z, c_prev, limit), existing(p, norm.units));
        for u in 0..PANEL_UNITS {
            let y = (new[u] - mean) * factor;
            dh[u] = factor * (dh[u] - mean_d - y * mean_with_y) * exists[u];
        }
    }
}

/// One row of the plain cell: activates z in place, updates the state.
#[inline(always)]
pub(super) fn gate_forward<const FUSED: bool>(z: &mut [f32], c_prev: &[f32], h: &mut [f32], c: &mut [f32], non_finite: &mut u32) {
    // Stays 0 as long as every z is finite.
    let mut probe = [0.0; PANEL_UNITS];
    let panels = z.as_chunks_mut::<PANEL>().0.iter_mut().zip(c_prev.as_chunks::<PANEL_UNITS>().0);
    let states = h.as_chunks_mut::<PANEL_UNITS>().0.iter_mut().zip(c.as_chunks_mut::<PANEL_UNITS>().0);
    for ((z, c_prev), (h, c)) in panels.zip(states) {
        let [i, f, g, o] = of_gates(z);
        for u in 0..PANEL_UNITS {
            let of_two = fma::<FUSED>(i[u], 0.0, fma::<FUSED>(f[u], 0.0, probe[u]));
            probe[u] = fma::<FUSED>(g[u], 0.0, fma::<FUSED>(o[u], 0.0, of_two));
        }
        // A loop a function: its constants stay in registers.
        for gate in [&mut *i, &mut *f, &mut *o] {
            gate.iter_mut().for_each(|z| *z = activations::sigmoid::<FUSED>(*z));
        }
        g.iter_mut().for_each(|z| *z = activations::tanh::<FUSED>(*z));
        for u in 0..PANEL_UNITS {
            c[u] = fma::<FUSED>(f[u], c_prev[u], i[u] * g[u]);
            h[u] = o[u] * activations::tanh::<FUSED>(c[u]);
        }
    }
    *non_finite |= u32::from(probe.into_iter().any(|p| p != 0.0));
}

/// One row of the plain cell: gates become dz, dc moves one step back.
#[inline(always)]
pub(super) fn gate_backward<const FUSED: bool>(gates: &mut [f32], dh: &[f32], dc: &mut [f32], c_prev: &[f32]) {
    let panels = gates.as_chunks_mut::<PANEL>().0.iter_mut().zip(dh.as_chunks::<PANEL_UNITS>().0);
    let states = dc.as_chunks_mut::<PANEL_UNITS>().0.iter_mut().zip(c_prev.as_chunks::<PANEL_UNITS>().0);
    for ((z, dh), (dc, c_prev)) in panels.zip(states) {
        let [zi, zf, zg, zo] = of_gates(z);
        for u in 0..PANEL_UNITS {
            let (i, f, g, o) = (zi[u], zf[u], zg[u], zo[u]);
            let tanh_c = activations::tanh::<FUSED>(fma::<FUSED>(f, c_prev[u], i * g));
            let through_o = dh[u] * o;
            let d = fma::<FUSED>(through_o, fma::<FUSED>(-tanh_c, tanh_c, 1.0), dc[u]);
            let (di, df) = (d * i, d * f);
            zi[u] = di * g * (1.0 - i);
            zf[u] = df * c_prev[u] * (1.0 - f);
            zg[u] = di * fma::<FUSED>(-g, g, 1.0);
            zo[u] = through_o * tanh_c * (1.0 - o);
            dc[u] = df;
        }
    }
}

/// The gates of a panel's units.
#[inline(always)]
fn of_gates(z: &mut [f32; PANEL]) -> [&mut Lanes; GATES] {
    let [i, f, g, o] = z.as_chunks_mut::<PANEL_UNITS>().0 else { unreachable!("a panel holds four gates") };
    [i, f, g, o]
}
