// All steps of the plain LSTM forward: a workgroup owns ROWS rows of the batch from the first step to the last, so that only its own invocations wait for each
// other, at a barrier a step. h lies in workgroup memory, c in registers; weights are read anew each step, from caches where they fit.
//
// An invocation computes one row x 4 units. The order of operations is that of lstm_step_forward. Loop trips, with the one that ends each loop, as drivers count
// them: steps x (H / 4 + 2) + 1.

struct Params {
    @align(16) n_rows: u32, // B
    hidden: u32,            // H, a multiple of 16: 4 QUADS
    weight_hh: u32,
    bias_ih: u32,
    bias_hh: u32,
    gates: u32,             // of the first step
    gates_next: u32,        // from step to step; adding wraps, so that it may fall
    h: u32,                 // of the state before the first step
    h_next: u32,
    c: u32,
    c_next: u32,
    t: u32,
    t_next: u32,
    n_steps: u32,
    use_lengths: u32,
    tile_rows: u32,         // ROWS
}

@group(0) @binding(0) var<uniform> lanes: array<Params, 2>;
@group(0) @binding(1) var<storage, read> params: array<vec4<f32>>;          // weight_hh [H / 16, H, 64]
@group(0) @binding(2) var<storage, read_write> gates: array<vec4<f32>>;     // [T, B, 4H]: the input product, then the activated gates
@group(0) @binding(3) var<storage, read_write> h: array<vec4<f32>>;         // [T + 1, B, H]
@group(0) @binding(4) var<storage, read_write> c: array<vec4<f32>>;         // [T + 1, B, H]
@group(0) @binding(5) var<storage, read> rows: array<u32>;                  // lengths [B]
@group(0) @binding(6) var<storage, read_write> flags: array<atomic<u32>>;   // [0]: raised by a pre-activation that is not finite
@group(0) @binding(7) var<storage, read> bias: array<vec4<f32>>;            // b_ih and b_hh [4H]

// Quads of units, and rows of the workgroup.
override QUADS: u32 = 4u;
override ROWS: u32 = 4u;

const NONE: u32 = 0xffffffffu;

// h of the workgroup's rows [ROWS][QUADS], before and after a step in turn.
var<workgroup> sh_h: array<vec4<f32>, 2u * ROWS * QUADS>;

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

@compute @workgroup_size(QUADS, ROWS)
fn lstm_sweep_forward(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    // The same for the whole workgroup, so that all of it meets at the barriers.
    let n_steps = lanes[wg.z].n_steps;
    let p = lanes[wg.z];
    let panel = local.x / (PANEL_UNITS / 4u);
    let quad = local.x % (PANEL_UNITS / 4u);
    let is_row = wg.x * ROWS + local.y < p.n_rows;
    // Rows beyond the last one repeat it and are not stored.
    let row = min(wg.x * ROWS + local.y, p.n_rows - 1u);
    var n_valid = NONE;
    if (p.use_lengths == 1u) {
        n_valid = rows[row];
    }
    var added = Gates();
    if (p.bias_ih != NONE) {
        added = load_bias(gates_of(p.bias_ih, 0u, p.hidden, panel, quad));
    }
    if (p.bias_hh != NONE) {
        added += load_bias(gates_of(p.bias_hh, 0u, p.hidden, panel, quad));
    }
    var gates_offset = p.gates;
    var h_offset = p.h;
    var c_offset = p.c;
    var t = p.t;
    var h_now = h[units_of(h_offset, row, p.hidden, panel, quad)];
    var c_now = c[units_of(c_offset, row, p.hidden, panel, quad)];
    sh_h[local.y * QUADS + local.x] = h_now;
    for (var step = 0u; step < n_steps; step += 1u) {
        // Nobody reads before all have written; what is written in this step lies where nobody reads until the next barrier.
        workgroupBarrier();
        let h_at = ((step % 2u) * ROWS + local.y) * QUADS;
        let gates_at = gates_of(gates_offset, row, p.hidden, panel, quad);
        var z = load_gates(gates_at);
        var w_at = p.weight_hh / 4u + panel * p.hidden * PANEL_VECTORS + quad;
        for (var k = 0u; k < QUADS; k += 1u) {
            let hk = sh_h[h_at + k];
            z += load_params(w_at) * hk.x;
            z += load_params(w_at + PANEL_VECTORS) * hk.y;
            z += load_params(w_at + 2u * PANEL_VECTORS) * hk.z;
            z += load_params(w_at + 3u * PANEL_VECTORS) * hk.w;
            w_at += 4u * PANEL_VECTORS;
        }
        z += added;
        h_offset += p.h_next;
        c_offset += p.c_next;
        // A row that has ended keeps its state.
        var of_step = Gates();
        if (t < n_valid) {
            if (is_row && (any_non_finite4(z[0]) || any_non_finite4(z[1]) || any_non_finite4(z[2]) || any_non_finite4(z[3]))) {
                atomicStore(&flags[0], 1u);
            }
            let i = sigmoid4(z[0]);
            let f = sigmoid4(z[1]);
            let g = tanh4(z[2]);
            let o = sigmoid4(z[3]);
            c_now = f * c_now + i * g;
            h_now = o * tanh4(c_now);
            of_step = Gates(i, f, g, o);
        }
        sh_h[(((step + 1u) % 2u) * ROWS + local.y) * QUADS + local.x] = h_now;
        if (is_row) {
            gates[gates_at] = of_step[0];
            gates[gates_at + GATE_VECTORS] = of_step[1];
            gates[gates_at + 2u * GATE_VECTORS] = of_step[2];
            gates[gates_at + 3u * GATE_VECTORS] = of_step[3];
            h[units_of(h_offset, row, p.hidden, panel, quad)] = h_now;
            c[units_of(c_offset, row, p.hidden, panel, quad)] = c_now;
        }
        gates_offset += p.gates_next;
        t += p.t_next;
    }
}
