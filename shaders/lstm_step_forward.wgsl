// One step of the LSTM forward: recurrent product of all four gates, biases, activations and the new state in one pass.
//
// A workgroup computes 32 batch rows x one panel of 16 units, an invocation 4 rows x 4 units x 4 gates, so that each vector of weights
// that it loads serves 4 rows. Loop trips: R / 4.

struct Params {
    @align(16) cell: Cell,
    n_rows: u32, // B
    hidden: u32, // H, a multiple of 16
    width: u32,  // R, floats of h: H without a projection
    weight_hh: u32,
    bias_ih: u32,
    bias_hh: u32,
    gates: u32,
    h_prev: u32,
    h: u32,
    masked_prev: u32,
    masked: u32,
    output: u32,
    input: u32,
    c_prev: u32,
    c: u32,
    m: u32,
    t: u32,
    use_lengths: u32,
    initial: u32,
}

@group(0) @binding(0) var<uniform> lanes: array<Params, 2>;
@group(0) @binding(1) var<storage, read> params: array<vec4<f32>>;          // weight_hh [H / 16, R, 64]
@group(0) @binding(2) var<storage, read_write> gates: array<vec4<f32>>;     // [B, 4H]: the input product, then the activated gates
@group(0) @binding(3) var<storage, read_write> h: array<vec4<f32>>;         // [B, R] before and after the step, both masked, what is handed up
@group(0) @binding(4) var<storage, read_write> c: array<vec4<f32>>;         // [B, H] before and after the step; with a projection m
@group(0) @binding(5) var<storage, read> rows: array<u32>;                  // lengths [B]; stream numbers [B] at cell.streams
@group(0) @binding(6) var<storage, read_write> flags: array<atomic<u32>>;   // [0]: raised by a pre-activation that is not finite
@group(0) @binding(7) var<storage, read> bias: array<vec4<f32>>;            // b_ih and b_hh [4H], peepholes [3, H]
@group(0) @binding(8) var<storage, read> input: array<vec4<f32>>;           // [B, H]: what a residual layer adds to h

// The lane of this workgroup: both directions of a layer may share a dispatch, one for each z.
var<private> p: Params;

const STEP_ROWS: u32 = 32u;
const INVOCATION_ROWS: u32 = 4u;
// A step needs no number for its gates: column i, f, g, o of a mat4x4 holds the four units of that gate.
alias Gates = mat4x4<f32>;

fn load_gates(at: u32) -> Gates {
    return Gates(gates[at], gates[at + GATE_VECTORS], gates[at + 2u * GATE_VECTORS], gates[at + 3u * GATE_VECTORS]);
}

fn load_params(at: u32) -> Gates {
    return Gates(params[at], params[at + GATE_VECTORS], params[at + 2u * GATE_VECTORS], params[at + 3u * GATE_VECTORS]);
}

fn load_bias(at: u32) -> Gates {
    return Gates(bias[at], bias[at + GATE_VECTORS], bias[at + 2u * GATE_VECTORS], bias[at + 3u * GATE_VECTORS]);
}

fn store_gates(at: u32, z: Gates) {
    gates[at] = z[0];
    gates[at + GATE_VECTORS] = z[1];
    gates[at + 2u * GATE_VECTORS] = z[2];
    gates[at + 3u * GATE_VECTORS] = z[3];
}

// b_ih + b_hh of a quad, as far as there are such.
fn biases(panel: u32, quad: u32) -> Gates {
    var sum = Gates();
    if (p.bias_ih != NONE) {
        sum = load_bias(gates_of(p.bias_ih, 0u, p.hidden, panel, quad));
    }
    if (p.bias_hh != NONE) {
        sum += load_bias(gates_of(p.bias_hh, 0u, p.hidden, panel, quad));
    }
    return sum;
}

// Activates one row's pre-activations and updates its state.
fn finish(row: u32, panel: u32, quad: u32, z: Gates) {
    let gates_at = gates_of(p.gates, row, p.hidden, panel, quad);
    let h_at = units_of(p.h, row, p.hidden, panel, quad);
    let c_at = units_of(p.c, row, p.hidden, panel, quad);
    let c_prev = c[units_of(p.c_prev, row, p.hidden, panel, quad)];
    if (p.use_lengths == 1u && p.t >= rows[row]) {
        // A row that has ended keeps its state.
        store_gates(gates_at, Gates());
        c[c_at] = c_prev;
        if (OPTIONS && p.m != NONE) {
            c[units_of(p.m, row, p.hidden, panel, quad)] = vec4<f32>();
            return;
        }
        h[h_at] = h[units_of(p.h_prev, row, p.hidden, panel, quad)];
        if (OPTIONS && p.cell.mask_scale != 0.0) {
            h[units_of(p.masked, row, p.hidden, panel, quad)] = h[units_of(p.masked_prev, row, p.hidden, panel, quad)];
        }
        if (OPTIONS && p.output != NONE) {
            h[units_of(p.output, row, p.hidden, panel, quad)] = vec4<f32>();
        }
        return;
    }
    if (any_non_finite4(z[0]) || any_non_finite4(z[1]) || any_non_finite4(z[2]) || any_non_finite4(z[3])) {
        atomicStore(&flags[0], 1u);
    }
    if (OPTIONS) {
        finish_cell(row, panel, quad, z, c_prev);
        return;
    }
    let i = sigmoid4(z[0]);
    let f = sigmoid4(z[1]);
    let g = tanh4(z[2]);
    let o = sigmoid4(z[3]);
    let c_next = f * c_prev + i * g;
    store_gates(gates_at, Gates(i, f, g, o));
    c[c_at] = c_next;
    h[h_at] = o * tanh4(c_next);
}

fn peephole(gate: u32, panel: u32, quad: u32) -> vec4<f32> {
    return bias[units_of(p.cell.peephole, gate, p.hidden, panel, quad)];
}

// The same for any cell.
fn finish_cell(row: u32, panel: u32, quad: u32, given: Gates, c_prev: vec4<f32>) {
    let block = panel * (PANEL_UNITS / 4u) + quad;
    var z = given;
    if (p.cell.peephole != NONE) {
        z[0] += peephole(0u, panel, quad) * c_prev;
        z[1] += peephole(1u, panel, quad) * c_prev;
    }
    let i = sigmoid4(z[0]);
    let f = select(sigmoid4(z[1]), 1.0 - i, p.cell.coupled == 1u);
    let g = tanh4(z[2]);
    var c_next = clip4(f * c_prev + i * g, limit_of(p.cell.cell_clip));
    if (p.cell.peephole != NONE) {
        z[3] += peephole(2u, panel, quad) * c_next;
    }
    let o = sigmoid4(z[3]);
    var h_next = o * tanh4(c_next);
    let stream = row_stream(row);
    if (p.cell.zoneout_c > 0.0) {
        let keep = zoneout_kept(p.cell, ZONEOUT_C, p.cell.zoneout_c, stream, p.t, block);
        c_next = keep * c_prev + (1.0 - keep) * c_next;
    }
    store_gates(gates_of(p.gates, row, p.hidden, panel, quad), Gates(i, f, g, o));
    c[units_of(p.c, row, p.hidden, panel, quad)] = c_next;
    if (p.m != NONE) {
        c[units_of(p.m, row, p.hidden, panel, quad)] = h_next;
        return;
    }
    if (p.cell.zoneout_h > 0.0) {
        let keep = zoneout_kept(p.cell, ZONEOUT_H, p.cell.zoneout_h, stream, p.t, block);
        h_next = keep * h[units_of(p.h_prev, row, p.hidden, panel, quad)] + (1.0 - keep) * h_next;
    }
    h[units_of(p.h, row, p.hidden, panel, quad)] = h_next;
    if (p.cell.mask_scale != 0.0) {
        h[units_of(p.masked, row, p.hidden, panel, quad)] = recurrent_mask(p.cell, stream, block) * h_next;
    }
    if (p.output != NONE) {
        hand_up(row, panel, quad, stream, h_next);
    }
}

// What the layer hands up, where that is not h: dropped, and with the layer's input added.
fn hand_up(row: u32, panel: u32, quad: u32, stream: u32, h_next: vec4<f32>) {
    var y = h_next * drop_mask(p.cell, stream, p.t, panel * (PANEL_UNITS / 4u) + quad);
    if (p.input != NONE) {
        y += input[units_of(p.input, row, p.hidden, panel, quad)];
    }
    h[units_of(p.output, row, p.hidden, panel, quad)] = y;
}

// The global number of a row's sequence; 0 where nothing draws.
fn row_stream(row: u32) -> u32 {
    if (is_random(p.cell)) {
        return rows[p.cell.streams + row];
    }
    return 0u;
}

// The masked copy of the first state.
fn mask_initial(row: u32, panel: u32, quad: u32) {
    let mask = recurrent_mask(p.cell, row_stream(row), panel * (PANEL_UNITS / 4u) + quad);
    h[units_of(p.masked, row, p.hidden, panel, quad)] = mask * h[units_of(p.h_prev, row, p.hidden, panel, quad)];
}

@compute @workgroup_size(4, 8)
fn lstm_step_forward(
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
    if (OPTIONS && p.initial == 1u) {
        for (var i = row; i < min(row + INVOCATION_ROWS, p.n_rows); i += 1u) {
            mask_initial(i, panel, quad);
        }
        return;
    }
    // Rows beyond the last one repeat it and are not stored.
    let four = min(vec4<u32>(row, row + 1u, row + 2u, row + 3u), vec4<u32>(p.n_rows - 1u));
    var z0 = load_gates(gates_of(p.gates, four.x, p.hidden, panel, quad));
    var z1 = load_gates(gates_of(p.gates, four.y, p.hidden, panel, quad));
    var z2 = load_gates(gates_of(p.gates, four.z, p.hidden, panel, quad));
    var z3 = load_gates(gates_of(p.gates, four.w, p.hidden, panel, quad));

    let h_at = select(p.h_prev, p.masked_prev, OPTIONS && p.cell.mask_scale != 0.0) / 4u + four * (p.width / 4u);
    // Row k of the panel's weights, which has a vector for each quad of each gate.
    var w_at = p.weight_hh / 4u + panel * p.width * PANEL_VECTORS + quad;
    for (var k = 0u; k < p.width / 4u; k += 1u) {
        let h0 = h[h_at.x + k];
        let h1 = h[h_at.y + k];
        let h2 = h[h_at.z + k];
        let h3 = h[h_at.w + k];
        let w0 = load_params(w_at);
        z0 += w0 * h0.x;
        z1 += w0 * h1.x;
        z2 += w0 * h2.x;
        z3 += w0 * h3.x;
        let w1 = load_params(w_at + PANEL_VECTORS);
        z0 += w1 * h0.y;
        z1 += w1 * h1.y;
        z2 += w1 * h2.y;
        z3 += w1 * h3.y;
        let w2 = load_params(w_at + 2u * PANEL_VECTORS);
        z0 += w2 * h0.z;
        z1 += w2 * h1.z;
        z2 += w2 * h2.z;
        z3 += w2 * h3.z;
        let w3 = load_params(w_at + 3u * PANEL_VECTORS);
        z0 += w3 * h0.w;
        z1 += w3 * h1.w;
        z2 += w3 * h2.w;
        z3 += w3 * h3.w;
        w_at += 4u * PANEL_VECTORS;
    }

    let added = biases(panel, quad);
    finish(row, panel, quad, z0 + added);
    if (row + 1u < p.n_rows) {
        finish(row + 1u, panel, quad, z1 + added);
    }
    if (row + 2u < p.n_rows) {
        finish(row + 2u, panel, quad, z2 + added);
    }
    if (row + 3u < p.n_rows) {
        finish(row + 3u, panel, quad, z3 + added);
    }
}
