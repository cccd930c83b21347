// One step forward with layer normalisation, after the recurrent product: normalises it, applies the gates, normalises the cell state, writes h and c.
//
// z = gain_ih n(x) + gain_hh n(y) + biases; h = o tanh(gain_c n(c) + bias_c). A workgroup a row, folded into x and y: every sum over the hidden
// units stays within it, and every invocation reads only what it wrote itself. Loop trips: 13 H / 256 + 24.

struct Params {
    @align(16) cell: Cell,
    n_rows: u32, // B
    hidden: u32, // H, a multiple of 16
    units: u32,  // H without padding
    gates: u32,
    x: u32,
    y: u32,
    factors: u32,
    bias_ih: u32,
    bias_hh: u32,
    norm_ih: u32,
    norm_hh: u32,
    norm_c: u32,
    h_prev: u32,
    h: u32,
    masked: u32,
    output: u32,
    input: u32,
    c_prev: u32,
    c: u32,
    m: u32,
    t: u32,
    use_lengths: u32,
}

@group(0) @binding(0) var<uniform> lanes: array<Params, 2>;
@group(0) @binding(1) var<storage, read_write> gates: array<vec4<f32>>;     // gates [B, 4H]; n(x), y [B, 4H]; the factors of both [B, 4]
@group(0) @binding(2) var<storage, read_write> h: array<vec4<f32>>;         // [B, H] before and after the step, both masked, what is handed up
@group(0) @binding(3) var<storage, read_write> c: array<vec4<f32>>;         // [B, H] before and after the step; with a projection m
@group(0) @binding(4) var<storage, read> rows: array<u32>;                  // lengths [B]; stream numbers [B] at cell.streams
@group(0) @binding(5) var<storage, read_write> flags: array<atomic<u32>>;   // [0]: raised by a pre-activation that is not finite
@group(0) @binding(6) var<storage, read> bias: array<vec4<f32>>;            // b_ih, b_hh, gain_ih, gain_hh [4H]; gain_c and bias_c [2, H]; peepholes [3, H]
@group(0) @binding(7) var<storage, read> input: array<vec4<f32>>;           // [B, H]: what a residual layer adds to h

// The lane of this workgroup: both directions of a layer may share a dispatch, one for each z.
var<private> p: Params;

fn row_stream(row: u32) -> u32 {
    if (is_random(p.cell)) {
        return rows[p.cell.streams + row];
    }
    return 0u;
}

fn of_gate(offset: u32, q: u32, gate: u32) -> vec4<f32> {
    return bias[gates_of(offset, 0u, p.hidden, q / 4u, q % 4u) + gate * GATE_VECTORS];
}

fn of_unit(offset: u32, row: u32, q: u32) -> vec4<f32> {
    return bias[offset / 4u + row * (p.hidden / 4u) + q];
}

// z of one gate from both normalised products.
fn pre_activation(q: u32, gate: u32, x: vec4<f32>, y: vec4<f32>) -> vec4<f32> {
    var z = of_gate(p.norm_ih, q, gate) * x + of_gate(p.norm_hh, q, gate) * y;
    if (p.bias_ih != NONE && p.bias_hh != NONE) {
        z += of_gate(p.bias_ih, q, gate) + of_gate(p.bias_hh, q, gate);
    } else if (p.bias_ih != NONE) {
        z += of_gate(p.bias_ih, q, gate);
    } else if (p.bias_hh != NONE) {
        z += of_gate(p.bias_hh, q, gate);
    }
    return z;
}

// The new cell state, clipped, from the gates that this invocation has stored.
fn new_cell(at: u32, c_prev: vec4<f32>) -> vec4<f32> {
    return clip4(gates[at + GATE_VECTORS] * c_prev + gates[at] * gates[at + 2u * GATE_VECTORS], limit_of(p.cell.cell_clip));
}

@compute @workgroup_size(ROW_WORKGROUP)
fn lstm_norm_forward(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    p = lanes[wg.z];
    let row = wg.y * n_wg.x + wg.x;
    if (row >= p.n_rows) {
        return;
    }
    // A row that has ended runs through the same barriers.
    let ended = p.use_lengths == 1u && p.t >= rows[row];
    let stream = row_stream(row);
    let n_quads = p.hidden / 4u;
    let state = row * n_quads;
    var sum = vec4<f32>();
    for (var q = lane; q < n_quads; q += ROW_WORKGROUP) {
        let at = gates_of(p.y, row, p.hidden, q / 4u, q % 4u);
        sum += (gates[at] + gates[at + GATE_VECTORS]) + (gates[at + 2u * GATE_VECTORS] + gates[at + 3u * GATE_VECTORS]);
    }
    let n = 4.0 * f32(p.units);
    let mean = workgroup_total(lane, sum4(sum)) / n;
    var squares = vec4<f32>();
    for (var q = lane; q < n_quads; q += ROW_WORKGROUP) {
        let at = gates_of(p.y, row, p.hidden, q / 4u, q % 4u);
        let exists = existing4(q, p.units);
        for (var gate = 0u; gate < 4u; gate += 1u) {
            let v = (gates[at + gate * GATE_VECTORS] - mean) * exists;
            squares += v * v;
        }
    }
    let factor = norm_factor(workgroup_total(lane, sum4(squares)) / n);
    if (lane == 0u) {
        let at = p.factors / 4u + row;
        gates[at] = vec4<f32>(gates[at].x, factor, 0.0, 0.0);
    }
    var sum_c = vec4<f32>();
    for (var q = lane; q < n_quads; q += ROW_WORKGROUP) {
        let x_at = gates_of(p.x, row, p.hidden, q / 4u, q % 4u);
        let y_at = gates_of(p.y, row, p.hidden, q / 4u, q % 4u);
        let at = gates_of(p.gates, row, p.hidden, q / 4u, q % 4u);
        let exists = existing4(q, p.units);
        var z = mat4x4<f32>();
        for (var gate = 0u; gate < 4u; gate += 1u) {
            let y = (gates[y_at + gate * GATE_VECTORS] - mean) * exists * factor;
            gates[y_at + gate * GATE_VECTORS] = y;
            z[gate] = pre_activation(q, gate, gates[x_at + gate * GATE_VECTORS], y);
        }
        if (!ended && (any_non_finite4(z[0]) || any_non_finite4(z[1]) || any_non_finite4(z[2]) || any_non_finite4(z[3]))) {
            atomicStore(&flags[0], 1u);
        }
        let c_prev = c[p.c_prev / 4u + state + q];
        if (p.cell.peephole != NONE) {
            z[0] += of_unit(p.cell.peephole, 0u, q) * c_prev;
            z[1] += of_unit(p.cell.peephole, 1u, q) * c_prev;
        }
        let i = sigmoid4(z[0]);
        let f = select(sigmoid4(z[1]), 1.0 - i, p.cell.coupled == 1u);
        let g = tanh4(z[2]);
        let c_new = clip4(f * c_prev + i * g, limit_of(p.cell.cell_clip));
        if (p.cell.peephole != NONE) {
            z[3] += of_unit(p.cell.peephole, 2u, q) * c_new;
        }
        let o = sigmoid4(z[3]);
        sum_c += c_new;
        gates[at] = select(i, vec4<f32>(), ended);
        gates[at + GATE_VECTORS] = select(f, vec4<f32>(), ended);
        gates[at + 2u * GATE_VECTORS] = select(g, vec4<f32>(), ended);
        gates[at + 3u * GATE_VECTORS] = select(o, vec4<f32>(), ended);
        let keep = zoneout_kept(p.cell, ZONEOUT_C, p.cell.zoneout_c, stream, p.t, q);
        c[p.c / 4u + state + q] = select(keep * c_prev + (1.0 - keep) * c_new, c_prev, ended);
    }
    let mean_c = workgroup_total(lane, sum4(sum_c)) / f32(p.units);
    var squares_c = vec4<f32>();
    for (var q = lane; q < n_quads; q += ROW_WORKGROUP) {
        let at = gates_of(p.gates, row, p.hidden, q / 4u, q % 4u);
        let v = (new_cell(at, c[p.c_prev / 4u + state + q]) - mean_c) * existing4(q, p.units);
        squares_c += v * v;
    }
    let factor_c = norm_factor(workgroup_total(lane, sum4(squares_c)) / f32(p.units));
    for (var q = lane; q < n_quads; q += ROW_WORKGROUP) {
        let at = gates_of(p.gates, row, p.hidden, q / 4u, q % 4u);
        let normed = (new_cell(at, c[p.c_prev / 4u + state + q]) - mean_c) * existing4(q, p.units) * factor_c;
        var out = gates[at + 3u * GATE_VECTORS] * tanh4(of_unit(p.norm_c, 0u, q) * normed + of_unit(p.norm_c, 1u, q));
        if (p.m != NONE) {
            c[p.m / 4u + state + q] = select(out, vec4<f32>(), ended);
            continue;
        }
        let old = h[p.h_prev / 4u + state + q];
        let keep = zoneout_kept(p.cell, ZONEOUT_H, p.cell.zoneout_h, stream, p.t, q);
        out = select(keep * old + (1.0 - keep) * out, old, ended);
        h[p.h / 4u + state + q] = out;
        if (p.cell.mask_scale != 0.0) {
            // The mask is the same at every step: a row that has ended keeps its masked copy.
            h[p.masked / 4u + state + q] = recurrent_mask(p.cell, stream, q) * out;
        }
        if (p.output != NONE) {
            // Dropped, and with the layer's input added.
            var y = out * drop_mask(p.cell, stream, p.t, q);
            if (p.input != NONE) {
                y += input[p.input / 4u + state + q];
            }
            h[p.output / 4u + state + q] = select(y, vec4<f32>(), ended);
        }
    }
}
