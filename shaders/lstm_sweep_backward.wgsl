// All steps of the plain LSTM backward: a workgroup owns ROWS rows of the batch from the last step to the first, so that only its own invocations wait for each
// other, at a barrier a step. dz lies in workgroup memory, the gradients of the state in registers; weights are read anew each step.
//
// An invocation computes one row x 4 units. The order of operations is that of lstm_step_backward. Loop trips, with the one that ends each loop, as
// they are written: (steps + 1) x (H + H / 8 + 2) + 6; drivers count somewhat more.

struct Params {
    @align(16) n_rows: u32, // B
    hidden: u32,            // H, a multiple of 16: 4 QUADS
    weight_hh: u32,
    gates: u32,             // of the first step here, which is the last in time
    gates_next: u32,        // from step to step; adding wraps, so that it may fall
    dz_after: u32,          // of the step after the first one here, or NONE: it is the first of the sweep
    c_prev: u32,            // of the state before the first step
    c_next: u32,
    dh_out: u32,            // of the first step, or NONE
    dh_out_next: u32,
    carry: u32,
    t: u32,
    t_next: u32,
    n_steps: u32,
    use_lengths: u32,
    initial: u32,           // 1: what the last step here hands to the initial h is added to carry
    tile_rows: u32,         // ROWS
}

@group(0) @binding(0) var<uniform> lanes: array<Params, 2>;
@group(0) @binding(1) var<storage, read> params: array<vec4<f32>>;        // weight_hh [H / 16, H, 64]
@group(0) @binding(2) var<storage, read_write> gates: array<vec4<f32>>;   // [T, B, 4H]: the gates, which become dz
@group(0) @binding(3) var<storage, read> c: array<vec4<f32>>;             // [T + 1, B, H]
@group(0) @binding(4) var<storage, read> dh_out: array<vec4<f32>>;        // [T, B, H]
@group(0) @binding(5) var<storage, read_write> carry: array<vec4<f32>>;   // [B, H]: of h what W_hh does not hand on; dc [B, H]
@group(0) @binding(6) var<storage, read> rows: array<u32>;                // lengths [B]

// Quads of units, and rows of the workgroup.
override QUADS: u32 = 4u;
override ROWS: u32 = 4u;

const NONE: u32 = 0xffffffffu;

// dz of the workgroup's rows [ROWS][4 QUADS], of the step after and of this one in turn, in the order of memory.
var<workgroup> sh_dz: array<vec4<f32>, 8u * ROWS * QUADS>;

// What comes through the recurrent weights from the dz at `dz_at`.
fn through_weights(dz_at: u32, w_start: u32, hidden: u32) -> vec4<f32> {
    var dh = vec4<f32>();
    for (var first = 0u; first < hidden; first += PANEL_VECTORS) {
        let w_at = w_start + first * hidden;
        for (var k = 0u; k < PANEL_VECTORS; k += 1u) {
            let w = mat4x4<f32>(
                params[w_at + k],
                params[w_at + k + PANEL_VECTORS],
                params[w_at + k + 2u * PANEL_VECTORS],
                params[w_at + k + 3u * PANEL_VECTORS],
            );
            dh += sh_dz[dz_at + first + k] * w;
        }
    }
    return dh;
}

@compute @workgroup_size(QUADS, ROWS)
fn lstm_sweep_backward(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    // The same for the whole workgroup, so that all of it meets at the barriers.
    let n_steps = lanes[wg.z].n_steps;
    let is_first = lanes[wg.z].dz_after == NONE;
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
    let carry_at = units_of(p.carry, row, p.hidden, panel, quad);
    let dc_at = units_of(p.carry + p.n_rows * p.hidden, row, p.hidden, panel, quad);
    var carried = carry[carry_at];
    var dc = carry[dc_at];
    // Weights of this quad's first unit in panel 0: 16 vectors, then those of the next unit; panels are H units apart.
    let w_start = p.weight_hh / 4u + (panel * PANEL_UNITS + quad * 4u) * PANEL_VECTORS;
    // Vectors of one half of the workgroup memory, and of its row; this quad's gates within the row.
    let half = 4u * ROWS * QUADS;
    let row_at = local.y * 4u * QUADS;
    let own = panel * PANEL_VECTORS + quad;
    if (!is_first) {
        let after = gates_of(p.dz_after, row, p.hidden, panel, quad);
        for (var gate = 0u; gate < 4u; gate += 1u) {
            sh_dz[row_at + own + gate * GATE_VECTORS] = gates[after + gate * GATE_VECTORS];
        }
    }
    var gates_offset = p.gates;
    var c_offset = p.c_prev;
    var out_offset = p.dh_out;
    var t = p.t;
    for (var step = 0u; step < n_steps; step += 1u) {
        // Nobody reads before all have written; what is written in this step lies where nobody reads until the next barrier.
        workgroupBarrier();
        var dh = vec4<f32>();
        if (step > 0u || !is_first) {
            dh = through_weights((step % 2u) * half + row_at, w_start, p.hidden);
        }
        let at = gates_of(gates_offset, row, p.hidden, panel, quad);
        var dz = mat4x4<f32>();
        if (t < n_valid) {
            if ((step == 0u && is_first) || t + 1u == n_valid) {
                dh += carried;
                carried = vec4<f32>();
            }
            if (p.dh_out != NONE) {
                dh += dh_out[units_of(out_offset, row, p.hidden, panel, quad)];
            }
            let i = gates[at];
            let f = gates[at + GATE_VECTORS];
            let g = gates[at + 2u * GATE_VECTORS];
            let o = gates[at + 3u * GATE_VECTORS];
            let c_prev = c[units_of(c_offset, row, p.hidden, panel, quad)];
            let tanh_c = tanh4(f * c_prev + i * g);
            let d = dc + dh * o * (1.0 - tanh_c * tanh_c);
            dz = mat4x4<f32>(
                d * g * i * (1.0 - i),
                d * c_prev * f * (1.0 - f),
                d * i * (1.0 - g * g),
                dh * tanh_c * o * (1.0 - o),
            );
            dc = d * f;
        } else {
            // No step of this row's: dc waits, and dh, which comes here only in reverse, from the row's first step.
            carried += dh;
        }
        let to = ((step + 1u) % 2u) * half + row_at + own;
        sh_dz[to] = dz[0];
        sh_dz[to + GATE_VECTORS] = dz[1];
        sh_dz[to + 2u * GATE_VECTORS] = dz[2];
        sh_dz[to + 3u * GATE_VECTORS] = dz[3];
        if (is_row) {
            gates[at] = dz[0];
            gates[at + GATE_VECTORS] = dz[1];
            gates[at + 2u * GATE_VECTORS] = dz[2];
            gates[at + 3u * GATE_VECTORS] = dz[3];
        }
        gates_offset += p.gates_next;
        c_offset += p.c_next;
        out_offset += p.dh_out_next;
        t += p.t_next;
    }
    workgroupBarrier();
    if (p.initial == 1u) {
        carried += through_weights((n_steps % 2u) * half + row_at, w_start, p.hidden);
    }
    if (is_row) {
        carry[carry_at] = carried;
        carry[dc_at] = dc;
    }
}
