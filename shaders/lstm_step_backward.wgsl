// One step of the LSTM backward: dh = dz of the step after x W_hh + the output's gradient, then the derivatives of the gates, in place.
//
// A workgroup computes 32 batch rows x one panel of 16 units, an invocation 4 rows x 4 units. Loop trips: H, each four columns of dz.

struct Params {
    @align(16) cell: Cell,
    n_rows: u32, // B
    hidden: u32, // H, a multiple of 16
    width: u32,  // R, floats of h: H without a projection
    weight: u32,
    gates: u32,
    dz_after: u32,
    c_prev: u32,
    dh_out: u32,
    dx: u32,
    carry: u32,
    t: u32,
    last: u32,
    use_lengths: u32,
    initial: u32,
    projected: u32,
}

@group(0) @binding(0) var<uniform> lanes: array<Params, 2>;
@group(0) @binding(1) var<storage, read> params: array<vec4<f32>>;        // weight_hh [H / 16, H, 64], or weight_hr [R, H]
@group(0) @binding(2) var<storage, read_write> gates: array<vec4<f32>>;   // [B, 4H] twice: this step's gates, which become dz, and the dz after
@group(0) @binding(3) var<storage, read> c: array<vec4<f32>>;             // [B, H] before the step
@group(0) @binding(4) var<storage, read> dh_out: array<vec4<f32>>;        // [B, R]
@group(0) @binding(5) var<storage, read_write> carry: array<vec4<f32>>;   // [B, R]: of h what W_hh does not hand on; dc on its way [B, H]; sums of the peepholes [B, 3, H]
@group(0) @binding(6) var<storage, read> rows: array<u32>;                // lengths [B]; stream numbers [B] at cell.streams
@group(0) @binding(7) var<storage, read> bias: array<vec4<f32>>;          // peepholes [3, H]
@group(0) @binding(8) var<storage, read_write> dx: array<vec4<f32>>;      // [B, H]: of a residual layer, what goes to its input past the cell

// The lane of this workgroup: both directions of a layer may share a dispatch, one for each z.
var<private> p: Params;

const STEP_ROWS: u32 = 32u;
const INVOCATION_ROWS: u32 = 4u;

fn row_stream(row: u32) -> u32 {
    if (is_random(p.cell)) {
        return rows[p.cell.streams + row];
    }
    return 0u;
}

// Where the sums of a row's peepholes lie.
fn sums_of(row: u32, gate: u32, panel: u32, quad: u32) -> u32 {
    return units_of(p.carry + p.n_rows * (p.width + p.hidden), row * 3u + gate, p.hidden, panel, quad);
}

fn dc_of(row: u32, panel: u32, quad: u32) -> u32 {
    return units_of(p.carry + p.n_rows * p.width, row, p.hidden, panel, quad);
}

// Takes one row's gradient of h through the gates; `from_after` is what came through the recurrent weights.
fn finish(row: u32, panel: u32, quad: u32, from_after: vec4<f32>) {
    let at = gates_of(p.gates, row, p.hidden, panel, quad);
    let carry_at = units_of(p.carry, row, p.hidden, panel, quad);
    var dh = from_after;
    if (OPTIONS) {
        if (p.cell.mask_scale != 0.0 && p.projected == 0u) {
            dh *= recurrent_mask(p.cell, row_stream(row), panel * (PANEL_UNITS / 4u) + quad);
        }
        if (p.cell.peephole != NONE && p.last == 1u) {
            for (var gate = 0u; gate < 3u; gate += 1u) {
                carry[sums_of(row, gate, panel, quad)] = vec4<f32>();
            }
        }
        if (p.projected == 1u) {
            finish_projected(row, panel, quad, from_after);
            return;
        }
    }
    if (p.initial == 1u) {
        carry[carry_at] += dh;
        return;
    }
    var takes = p.last == 1u || (OPTIONS && p.cell.zoneout_h > 0.0);
    if (p.use_lengths == 1u) {
        if (p.t >= rows[row]) {
            // No step of this row's: dc waits in `carry`, and dh, which comes here only in reverse, from the row's first step.
            gates[at] = vec4<f32>();
            gates[at + GATE_VECTORS] = vec4<f32>();
            gates[at + 2u * GATE_VECTORS] = vec4<f32>();
            gates[at + 3u * GATE_VECTORS] = vec4<f32>();
            carry[carry_at] += dh;
            if (OPTIONS && p.dx != NONE) {
                dx[units_of(p.dx, row, p.hidden, panel, quad)] = vec4<f32>();
            }
            return;
        }
        takes = takes || p.t + 1u == rows[row];
    }
    let dc_at = dc_of(row, panel, quad);
    if (takes) {
        dh += carry[carry_at];
        carry[carry_at] = vec4<f32>();
    }
    if (p.dh_out != NONE) {
        let d = dh_out[units_of(p.dh_out, row, p.hidden, panel, quad)];
        if (OPTIONS) {
            dh += d * drop_mask(p.cell, row_stream(row), p.t, panel * (PANEL_UNITS / 4u) + quad);
            if (p.dx != NONE) {
                dx[units_of(p.dx, row, p.hidden, panel, quad)] = d;
            }
        } else {
            dh += d;
        }
    }
    let i = gates[at];
    let f = gates[at + GATE_VECTORS];
    let g = gates[at + 2u * GATE_VECTORS];
    let o = gates[at + 3u * GATE_VECTORS];
    let c_prev = c[units_of(p.c_prev, row, p.hidden, panel, quad)];
    if (OPTIONS) {
        if (p.cell.zoneout_h > 0.0) {
            let block = panel * (PANEL_UNITS / 4u) + quad;
            let keep = zoneout_kept(p.cell, ZONEOUT_H, p.cell.zoneout_h, row_stream(row), p.t, block);
            carry[carry_at] = keep * dh;
            dh *= 1.0 - keep;
        }
        finish_cell(row, panel, quad, dh, mat4x4<f32>(i, f, g, o), c_prev);
        return;
    }
    let tanh_c = tanh4(f * c_prev + i * g);
    let dc = carry[dc_at] + dh * o * (1.0 - tanh_c * tanh_c);
    gates[at] = dc * g * i * (1.0 - i);
    gates[at + GATE_VECTORS] = dc * c_prev * f * (1.0 - f);
    gates[at + 2u * GATE_VECTORS] = dc * i * (1.0 - g * g);
    gates[at + 3u * GATE_VECTORS] = dh * tanh_c * o * (1.0 - o);
    carry[dc_at] = dc * f;
}

// With a projection the gradient of h has been through all that is h's own; `dm` came through W_hr.
fn finish_projected(row: u32, panel: u32, quad: u32, dm: vec4<f32>) {
    let at = gates_of(p.gates, row, p.hidden, panel, quad);
    if (p.use_lengths == 1u && p.t >= rows[row]) {
        gates[at] = vec4<f32>();
        gates[at + GATE_VECTORS] = vec4<f32>();
        gates[at + 2u * GATE_VECTORS] = vec4<f32>();
        gates[at + 3u * GATE_VECTORS] = vec4<f32>();
        return;
    }
    let of_step = mat4x4<f32>(gates[at], gates[at + GATE_VECTORS], gates[at + 2u * GATE_VECTORS], gates[at + 3u * GATE_VECTORS]);
    finish_cell(row, panel, quad, dm, of_step, c[units_of(p.c_prev, row, p.hidden, panel, quad)]);
}

// From the gradient of o tanh(c), for any cell.
fn finish_cell(row: u32, panel: u32, quad: u32, dh: vec4<f32>, of_step: mat4x4<f32>, c_prev: vec4<f32>) {
    let i = of_step[0];
    let f = of_step[1];
    let g = of_step[2];
    let o = of_step[3];
    let at = gates_of(p.gates, row, p.hidden, panel, quad);
    let dc_at = dc_of(row, panel, quad);
    let block = panel * (PANEL_UNITS / 4u) + quad;
    let stream = row_stream(row);
    let keep_c = zoneout_kept(p.cell, ZONEOUT_C, p.cell.zoneout_c, stream, p.t, block);
    var pi = vec4<f32>();
    var pf = vec4<f32>();
    var po = vec4<f32>();
    if (p.cell.peephole != NONE) {
        pi = bias[units_of(p.cell.peephole, 0u, p.hidden, panel, quad)];
        pf = bias[units_of(p.cell.peephole, 1u, p.hidden, panel, quad)];
        po = bias[units_of(p.cell.peephole, 2u, p.hidden, panel, quad)];
    }
    let limit = limit_of(p.cell.cell_clip);
    let dz_limit = limit_of(p.cell.grad_clip);
    let raw = f * c_prev + i * g;
    let c_new = clip4(raw, limit);
    let tanh_c = tanh4(c_new);
    let dz_o = clip4(dh * tanh_c * o * (1.0 - o), dz_limit);
    let dc = carry[dc_at];
    var d = (1.0 - keep_c) * dc + dh * o * (1.0 - tanh_c * tanh_c) + dz_o * po;
    d = select(d, vec4<f32>(), abs(raw) > vec4<f32>(limit));
    let is_coupled = p.cell.coupled == 1u;
    let d_i = select(d * g, d * (g - c_prev), is_coupled);
    let dz_i = clip4(d_i * i * (1.0 - i), dz_limit);
    let dz_f = clip4(select(d * c_prev * f * (1.0 - f), vec4<f32>(), is_coupled), dz_limit);
    let dz_g = clip4(d * i * (1.0 - g * g), dz_limit);
    gates[at] = dz_i;
    gates[at + GATE_VECTORS] = dz_f;
    gates[at + 2u * GATE_VECTORS] = dz_g;
    gates[at + 3u * GATE_VECTORS] = dz_o;
    carry[dc_at] = keep_c * dc + d * f + dz_i * pi + dz_f * pf;
    if (p.cell.peephole != NONE) {
        carry[sums_of(row, 0u, panel, quad)] += dz_i * c_prev;
        carry[sums_of(row, 1u, panel, quad)] += dz_f * c_prev;
        carry[sums_of(row, 2u, panel, quad)] += dz_o * c_new;
    }
}

@compute @workgroup_size(4, 8)
fn lstm_step_backward(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    p = lanes[wg.z];
    let panel = wg.x;
    let quad = local.x;
    let row = wg.y * STEP_ROWS + local.y * INVOCATION_ROWS;
    if (row >= p.n_rows) {
        return;
    }
    var dh0 = vec4<f32>();
    var dh1 = vec4<f32>();
    var dh2 = vec4<f32>();
    var dh3 = vec4<f32>();
    if (OPTIONS && p.projected == 1u) {
        let four = min(vec4<u32>(row, row + 1u, row + 2u, row + 3u), vec4<u32>(p.n_rows - 1u));
        let dh_at = p.dh_out / 4u + four * (p.width / 4u);
        let step = p.hidden / 4u;
        var w_at = p.weight / 4u + panel * (PANEL_UNITS / 4u) + quad;
        for (var k = 0u; k < p.width / 4u; k += 1u) {
            // Four rows of W_hr: the columns of a matrix that a vector of four gradients is combined by.
            let w = mat4x4<f32>(params[w_at], params[w_at + step], params[w_at + 2u * step], params[w_at + 3u * step]);
            dh0 += w * dh_out[dh_at.x + k];
            dh1 += w * dh_out[dh_at.y + k];
            dh2 += w * dh_out[dh_at.z + k];
            dh3 += w * dh_out[dh_at.w + k];
            w_at += 4u * step;
        }
    } else if (p.last == 0u) {
        // Rows beyond the last one repeat it and are not stored.
        let four = min(vec4<u32>(row, row + 1u, row + 2u, row + 3u), vec4<u32>(p.n_rows - 1u));
        let dz_at = p.dz_after / 4u + four * p.hidden;
        // Weights of this quad's first unit in panel 0: 16 vectors, then those of the next unit; panels are H units apart.
        let w_start = p.weight / 4u + (panel * PANEL_UNITS + quad * 4u) * PANEL_VECTORS;
        for (var k = 0u; k < p.hidden; k += 1u) {
            let w_at = w_start + k / PANEL_VECTORS * p.hidden * PANEL_VECTORS + k % PANEL_VECTORS;
            let w = mat4x4<f32>(
                params[w_at],
                params[w_at + PANEL_VECTORS],
                params[w_at + 2u * PANEL_VECTORS],
                params[w_at + 3u * PANEL_VECTORS],
            );
            // A row vector times the matrix: one dot product with each unit's weights.
            dh0 += gates[dz_at.x + k] * w;
            dh1 += gates[dz_at.y + k] * w;
            dh2 += gates[dz_at.z + k] * w;
            dh3 += gates[dz_at.w + k] * w;
        }
    }
    finish(row, panel, quad, dh0);
    if (row + 1u < p.n_rows) {
        finish(row + 1u, panel, quad, dh1);
    }
    if (row + 2u < p.n_rows) {
        finish(row + 2u, panel, quad, dh2);
    }
    if (row + 3u < p.n_rows) {
        finish(row + 3u, panel, quad, dh3);
    }
}
