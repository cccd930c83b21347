// One step backward with layer normalisation, from the gradient of o tanh(..): gates become dz, both normalised products their gradients,
// dc moves one step back, the gradients of gains, biases and peepholes are gathered row by row.
//
// A workgroup a row, folded into x and y; every invocation reads only what it wrote itself. Loop trips: 13 H / 256 + 30.

struct Params {
    @align(16) cell: Cell,
    n_rows: u32, // B
    hidden: u32, // H, a multiple of 16
    units: u32,  // H without padding
    width: u32,  // R, floats of h
    gates: u32,
    x: u32,
    y: u32,
    factors: u32,
    norm_ih: u32,
    norm_hh: u32,
    norm_c: u32,
    c_prev: u32,
    dh: u32,
    from_carry: u32,
    carry: u32,
    t: u32,
    last: u32,
    use_lengths: u32,
}

@group(0) @binding(0) var<uniform> lanes: array<Params, 2>;
@group(0) @binding(1) var<storage, read_write> gates: array<vec4<f32>>;   // gates [B, 4H]; n(x), n(y) [B, 4H]; the factors of both [B, 4]
@group(0) @binding(2) var<storage, read> c: array<vec4<f32>>;             // [B, H] before the step
@group(0) @binding(3) var<storage, read> dh: array<vec4<f32>>;            // [B, H], unless it lies in carry
@group(0) @binding(4) var<storage, read_write> carry: array<vec4<f32>>;   // [B, R], dc [B, H], sums [B, 3H + 10H]; with a projection dm [B, H]
@group(0) @binding(5) var<storage, read> rows: array<u32>;                // lengths [B]; stream numbers [B] at cell.streams
@group(0) @binding(6) var<storage, read> bias: array<vec4<f32>>;          // gain_ih, gain_hh [4H]; gain_c and bias_c [2, H]; peepholes [3, H]

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

// The new cell state before its clip.
fn raw_cell(at: u32, c_prev: vec4<f32>) -> vec4<f32> {
    return gates[at + GATE_VECTORS] * c_prev + gates[at] * gates[at + 2u * GATE_VECTORS];
}

// The gradient of o tanh(..) for a quad of a row.
fn gradient_of(quad: u32) -> vec4<f32> {
    if (p.from_carry != NONE) {
        return carry[p.from_carry / 4u + quad];
    }
    return dh[p.dh / 4u + quad];
}

// Adds to a sum over time; the first step of a sweep begins it.
fn gather(at: u32, v: vec4<f32>) {
    carry[at] = select(carry[at], vec4<f32>(), p.last == 1u) + v;
}

@compute @workgroup_size(ROW_WORKGROUP)
fn lstm_norm_backward(
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
    let limit = limit_of(p.cell.cell_clip);
    let dz_limit = limit_of(p.cell.grad_clip);
    let n = f32(p.units);
    let dc_start = (p.carry + p.n_rows * p.width) / 4u + state;
    let peephole_quads = select(0u, 3u, p.cell.peephole != NONE) * n_quads;
    let sums = (p.carry + p.n_rows * (p.width + p.hidden)) / 4u + row * (peephole_quads + 10u * n_quads);
    let norm_sums = sums + peephole_quads;

    // The norm of the cell state, as forward.
    var sum_c = vec4<f32>();
    for (var q = lane; q < n_quads; q += ROW_WORKGROUP) {
        let at = gates_of(p.gates, row, p.hidden, q / 4u, q % 4u);
        sum_c += clip4(raw_cell(at, c[p.c_prev / 4u + state + q]), limit);
    }
    let mean = workgroup_total(lane, sum4(sum_c)) / n;
    var squares = vec4<f32>();
    for (var q = lane; q < n_quads; q += ROW_WORKGROUP) {
        let at = gates_of(p.gates, row, p.hidden, q / 4u, q % 4u);
        let v = (clip4(raw_cell(at, c[p.c_prev / 4u + state + q]), limit) - mean) * existing4(q, p.units);
        squares += v * v;
    }
    let factor = norm_factor(workgroup_total(lane, sum4(squares)) / n);

    // Back through h = o tanh(gain n(c) + bias): first the sums, then the same again with them.
    var sum_d = vec4<f32>();
    var sum_dy = vec4<f32>();
    for (var q = lane; q < n_quads; q += ROW_WORKGROUP) {
        let at = gates_of(p.gates, row, p.hidden, q / 4u, q % 4u);
        let normed = (clip4(raw_cell(at, c[p.c_prev / 4u + state + q]), limit) - mean) * existing4(q, p.units) * factor;
        let gain = of_unit(p.norm_c, 0u, q);
        let tanh_c = tanh4(gain * normed + of_unit(p.norm_c, 1u, q));
        let d = select(gradient_of(state + q) * gates[at + 3u * GATE_VECTORS] * (1.0 - tanh_c * tanh_c), vec4<f32>(), ended);
        gather(norm_sums + 8u * n_quads + q, select(d * normed, vec4<f32>(), ended));
        gather(norm_sums + 9u * n_quads + q, d);
        sum_d += d * gain;
        sum_dy += d * gain * normed;
    }
    let means_c = workgroup_total2(lane, vec2<f32>(sum4(sum_d), sum4(sum_dy))) / n;
    var of_x = vec2<f32>();
    var of_y = vec2<f32>();
    for (var q = lane; q < n_quads; q += ROW_WORKGROUP) {
        let at = gates_of(p.gates, row, p.hidden, q / 4u, q % 4u);
        let c_prev = c[p.c_prev / 4u + state + q];
        let raw = raw_cell(at, c_prev);
        let c_new = clip4(raw, limit);
        let exists = existing4(q, p.units);
        let normed = (c_new - mean) * exists * factor;
        let gain = of_unit(p.norm_c, 0u, q);
        let tanh_c = tanh4(gain * normed + of_unit(p.norm_c, 1u, q));
        let d_out = gradient_of(state + q);
        let i = gates[at];
        let f = gates[at + GATE_VECTORS];
        let g = gates[at + 2u * GATE_VECTORS];
        let o = gates[at + 3u * GATE_VECTORS];
        let through_h = factor * (d_out * o * (1.0 - tanh_c * tanh_c) * gain - means_c.x - normed * means_c.y) * exists;
        let dc = carry[dc_start + q];
        let keep = zoneout_kept(p.cell, ZONEOUT_C, p.cell.zoneout_c, stream, p.t, q);
        var dz = mat4x4<f32>();
        dz[3] = clip4(d_out * tanh_c * o * (1.0 - o), dz_limit);
        var pi = vec4<f32>();
        var pf = vec4<f32>();
        var d = (1.0 - keep) * dc + through_h;
        if (p.cell.peephole != NONE) {
            pi = of_unit(p.cell.peephole, 0u, q);
            pf = of_unit(p.cell.peephole, 1u, q);
            d += dz[3] * of_unit(p.cell.peephole, 2u, q);
        }
        d = select(d, vec4<f32>(), abs(raw) > vec4<f32>(limit));
        let is_coupled = p.cell.coupled == 1u;
        let d_i = select(d * g, d * (g - c_prev), is_coupled);
        dz[0] = clip4(d_i * i * (1.0 - i), dz_limit);
        dz[1] = clip4(select(d * c_prev * f * (1.0 - f), vec4<f32>(), is_coupled), dz_limit);
        dz[2] = clip4(d * i * (1.0 - g * g), dz_limit);
        if (!ended) {
            carry[dc_start + q] = keep * dc + d * f + dz[0] * pi + dz[1] * pf;
        }
        if (p.cell.peephole != NONE) {
            gather(sums + q, select(dz[0] * c_prev, vec4<f32>(), ended));
            gather(sums + n_quads + q, select(dz[1] * c_prev, vec4<f32>(), ended));
            gather(sums + 2u * n_quads + q, select(dz[3] * c_new, vec4<f32>(), ended));
        }
        let x_at = gates_of(p.x, row, p.hidden, q / 4u, q % 4u);
        let y_at = gates_of(p.y, row, p.hidden, q / 4u, q % 4u);
        // Gains lie as gates do: a panel's 16 vectors for each 4 quads.
        let gain_at = norm_sums + q / 4u * PANEL_VECTORS + q % 4u;
        for (var gate = 0u; gate < 4u; gate += 1u) {
            let dz_gate = select(dz[gate], vec4<f32>(), ended);
            gates[at + gate * GATE_VECTORS] = dz_gate;
            let x = select(gates[x_at + gate * GATE_VECTORS], vec4<f32>(), ended);
            let y = select(gates[y_at + gate * GATE_VECTORS], vec4<f32>(), ended);
            gather(gain_at + gate * GATE_VECTORS, dz_gate * x);
            gather(gain_at + 4u * n_quads + gate * GATE_VECTORS, dz_gate * y);
            let dx = dz_gate * of_gate(p.norm_ih, q, gate);
            let dy = dz_gate * of_gate(p.norm_hh, q, gate);
            of_x += vec2<f32>(sum4(dx), sum4(dx * x));
            of_y += vec2<f32>(sum4(dy), sum4(dy * y));
        }
    }

    // Back through both norms of products.
    let means_x = workgroup_total2(lane, of_x) / (4.0 * n);
    let means_y = workgroup_total2(lane, of_y) / (4.0 * n);
    let factors = gates[p.factors / 4u + row];
    for (var q = lane; q < n_quads; q += ROW_WORKGROUP) {
        let at = gates_of(p.gates, row, p.hidden, q / 4u, q % 4u);
        let x_at = gates_of(p.x, row, p.hidden, q / 4u, q % 4u);
        let y_at = gates_of(p.y, row, p.hidden, q / 4u, q % 4u);
        let exists = existing4(q, p.units);
        for (var gate = 0u; gate < 4u; gate += 1u) {
            let dz = gates[at + gate * GATE_VECTORS];
            let x = gates[x_at + gate * GATE_VECTORS];
            let y = gates[y_at + gate * GATE_VECTORS];
            let dx = factors.x * (dz * of_gate(p.norm_ih, q, gate) - means_x.x - x * means_x.y) * exists;
            let dy = factors.y * (dz * of_gate(p.norm_hh, q, gate) - means_y.x - y * means_y.y) * exists;
            gates[x_at + gate * GATE_VECTORS] = select(dx, vec4<f32>(), ended);
            gates[y_at + gate * GATE_VECTORS] = select(dy, vec4<f32>(), ended);
        }
    }
}
