// The input's products of all steps, normalised in place: (x - mean) / sqrt(variance + eps) over all gates of the units that exist; padding becomes 0.
//
// A workgroup a row, folded into x and y. Loop trips: 11 H / 256 + 12.

struct Params {
    n_rows: u32,  // T x B
    hidden: u32,  // H, a multiple of 16
    units: u32,   // H without padding
    x: u32,
    factors: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> gates: array<vec4<f32>>;   // [T x B, 4H] at x; at factors a vector a row: the factor first

@compute @workgroup_size(ROW_WORKGROUP)
fn lstm_norm_input(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = wg.y * n_wg.x + wg.x;
    if (row >= p.n_rows) {
        return;
    }
    let n_quads = p.hidden / 4u;
    let n = 4.0 * f32(p.units);
    var sum = vec4<f32>();
    for (var q = lane; q < n_quads; q += ROW_WORKGROUP) {
        let at = gates_of(p.x, row, p.hidden, q / 4u, q % 4u);
        sum += (gates[at] + gates[at + GATE_VECTORS]) + (gates[at + 2u * GATE_VECTORS] + gates[at + 3u * GATE_VECTORS]);
    }
    let mean = workgroup_total(lane, sum4(sum)) / n;
    var squares = vec4<f32>();
    for (var q = lane; q < n_quads; q += ROW_WORKGROUP) {
        let at = gates_of(p.x, row, p.hidden, q / 4u, q % 4u);
        let exists = existing4(q, p.units);
        for (var gate = 0u; gate < 4u; gate += 1u) {
            let v = (gates[at + gate * GATE_VECTORS] - mean) * exists;
            squares += v * v;
        }
    }
    let factor = norm_factor(workgroup_total(lane, sum4(squares)) / n);
    for (var q = lane; q < n_quads; q += ROW_WORKGROUP) {
        let at = gates_of(p.x, row, p.hidden, q / 4u, q % 4u);
        let exists = existing4(q, p.units);
        for (var gate = 0u; gate < 4u; gate += 1u) {
            let v = (gates[at + gate * GATE_VECTORS] - mean) * exists;
            gates[at + gate * GATE_VECTORS] = v * factor;
        }
    }
    if (lane == 0u) {
        gates[p.factors / 4u + row] = vec4<f32>(factor, 0.0, 0.0, 0.0);
    }
}
