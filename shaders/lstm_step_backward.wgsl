// One step of the LSTM backward: dh = dz of the step after x W_hh + the output's gradient, then the derivatives of the gates, in place.
//
// A workgroup computes 32 batch rows x one panel of 16 units, an invocation 4 rows x 4 units. Loop trips: H, each four columns of dz.

struct Params {
    n_rows: u32, // B
    hidden: u32, // H, a multiple of 16
    weight_hh: u32,
    gates: u32,
    dz_after: u32,
    c_prev: u32,
    c: u32,
    dh_out: u32,
    carry: u32,
    t: u32,
    last: u32,
    use_lengths: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> params: array<vec4<f32>>;        // weight_hh [H / 16, H, 64]
@group(0) @binding(2) var<storage, read_write> gates: array<vec4<f32>>;   // [B, 4H] twice: this step's gates, which become dz, and the dz after
@group(0) @binding(3) var<storage, read> c: array<vec4<f32>>;             // [B, H] twice: before and after the step
@group(0) @binding(4) var<storage, read> dh_out: array<vec4<f32>>;        // [B, H]
@group(0) @binding(5) var<storage, read_write> carry: array<vec4<f32>>;   // [2, B, H]: gradient of the final h; dc on its way
@group(0) @binding(6) var<storage, read> lengths: array<u32>;             // [B]

const NONE: u32 = 0xffffffffu;
const STEP_ROWS: u32 = 32u;
const INVOCATION_ROWS: u32 = 4u;

fn tanh4(x: vec4<f32>) -> vec4<f32> {
    return vec4<f32>(safe_tanh(x.x), safe_tanh(x.y), safe_tanh(x.z), safe_tanh(x.w));
}

// Takes one row's gradient of h through the gates; `from_after` is what came through the recurrent weights.
fn finish(row: u32, panel: u32, quad: u32, from_after: vec4<f32>) {
    let at = gates_of(p.gates, row, p.hidden, panel, quad);
    var is_final = p.last == 1u;
    if (p.use_lengths == 1u) {
        if (p.t >= lengths[row]) {
            // Not begun yet on the way back: dc waits in `carry` for the row's last step.
            gates[at] = vec4<f32>();
            gates[at + GATE_VECTORS] = vec4<f32>();
            gates[at + 2u * GATE_VECTORS] = vec4<f32>();
            gates[at + 3u * GATE_VECTORS] = vec4<f32>();
            return;
        }
        is_final = is_final || p.t + 1u == lengths[row];
    }
    let carry_at = units_of(p.carry, row, p.hidden, panel, quad);
    let dc_at = carry_at + p.n_rows * (p.hidden / 4u);
    var dh = from_after;
    if (is_final) {
        // Taken: what is left there belongs to rows that ended before this sweep.
        dh = carry[carry_at];
        carry[carry_at] = vec4<f32>();
    }
    if (p.dh_out != NONE) {
        dh += dh_out[units_of(p.dh_out, row, p.hidden, panel, quad)];
    }
    let i = gates[at];
    let f = gates[at + GATE_VECTORS];
    let g = gates[at + 2u * GATE_VECTORS];
    let o = gates[at + 3u * GATE_VECTORS];
    let c_prev = c[units_of(p.c_prev, row, p.hidden, panel, quad)];
    let tanh_c = tanh4(c[units_of(p.c, row, p.hidden, panel, quad)]);
    let dc = carry[dc_at] + dh * o * (1.0 - tanh_c * tanh_c);
    gates[at] = dc * g * i * (1.0 - i);
    gates[at + GATE_VECTORS] = dc * c_prev * f * (1.0 - f);
    gates[at + 2u * GATE_VECTORS] = dc * i * (1.0 - g * g);
    gates[at + 3u * GATE_VECTORS] = dh * tanh_c * o * (1.0 - o);
    carry[dc_at] = dc * f;
}

@compute @workgroup_size(4, 8)
fn lstm_step_backward(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    let panel = wg.x;
    let quad = local.x;
    let row = (wg.z * n_wg.y + wg.y) * STEP_ROWS + local.y * INVOCATION_ROWS;
    if (row >= p.n_rows) {
        return;
    }
    var dh0 = vec4<f32>();
    var dh1 = vec4<f32>();
    var dh2 = vec4<f32>();
    var dh3 = vec4<f32>();
    if (p.last == 0u) {
        // Rows beyond the last one repeat it and are not stored.
        let rows = min(vec4<u32>(row, row + 1u, row + 2u, row + 3u), vec4<u32>(p.n_rows - 1u));
        let dz_at = p.dz_after / 4u + rows * p.hidden;
        // Weights of this quad's first unit in panel 0: 16 vectors, then those of the next unit; panels are H units apart.
        let w_start = p.weight_hh / 4u + (panel * PANEL_UNITS + quad * 4u) * PANEL_VECTORS;
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
