// The end of a projected step: h = W_hr m, then zoneout and the copy that recurrent dropout masks. Rows that have ended keep h.
//
// A workgroup computes 32 batch rows x 16 units of h, an invocation 4 rows x 4 units. Loop trips: H / 4.

struct Params {
    @align(16) cell: Cell,
    n_rows: u32, // B
    hidden: u32, // H, a multiple of 16
    width: u32,  // R, a multiple of 16
    weight_hr: u32,
    m: u32,
    h_prev: u32,
    h: u32,
    masked_prev: u32,
    masked: u32,
    output: u32,
    input: u32,
    t: u32,
    use_lengths: u32,
}

@group(0) @binding(0) var<uniform> lanes: array<Params, 2>;
@group(0) @binding(1) var<storage, read> params: array<vec4<f32>>;     // weight_hr [R, H]
@group(0) @binding(2) var<storage, read> m: array<vec4<f32>>;          // [B, H]: o tanh(c)
@group(0) @binding(3) var<storage, read_write> h: array<vec4<f32>>;    // [B, R] before and after the step, both masked, what is handed up
@group(0) @binding(4) var<storage, read> rows: array<u32>;             // lengths [B]; stream numbers [B] at cell.streams
@group(0) @binding(5) var<storage, read> input: array<vec4<f32>>;      // [B, R]: what a residual layer adds to h

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

fn finish(row: u32, panel: u32, quad: u32, projected: vec4<f32>) {
    let h_at = units_of(p.h, row, p.width, panel, quad);
    let old = h[units_of(p.h_prev, row, p.width, panel, quad)];
    if (p.use_lengths == 1u && p.t >= rows[row]) {
        h[h_at] = old;
        if (p.cell.mask_scale != 0.0) {
            h[units_of(p.masked, row, p.width, panel, quad)] = h[units_of(p.masked_prev, row, p.width, panel, quad)];
        }
        if (p.output != NONE) {
            h[units_of(p.output, row, p.width, panel, quad)] = vec4<f32>();
        }
        return;
    }
    let block = panel * (PANEL_UNITS / 4u) + quad;
    let stream = row_stream(row);
    var next = projected;
    if (p.cell.zoneout_h > 0.0) {
        let keep = zoneout_kept(p.cell, ZONEOUT_H, p.cell.zoneout_h, stream, p.t, block);
        next = keep * old + (1.0 - keep) * next;
    }
    h[h_at] = next;
    if (p.cell.mask_scale != 0.0) {
        h[units_of(p.masked, row, p.width, panel, quad)] = recurrent_mask(p.cell, stream, block) * next;
    }
    if (p.output != NONE) {
        hand_up(row, panel, quad, stream, next);
    }
}

// What the layer hands up, where that is not h: dropped, and with the layer's input added.
fn hand_up(row: u32, panel: u32, quad: u32, stream: u32, h_next: vec4<f32>) {
    var y = h_next * drop_mask(p.cell, stream, p.t, panel * (PANEL_UNITS / 4u) + quad);
    if (p.input != NONE) {
        y += input[units_of(p.input, row, p.width, panel, quad)];
    }
    h[units_of(p.output, row, p.width, panel, quad)] = y;
}

@compute @workgroup_size(4, 8)
fn lstm_project(
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
    // Rows beyond the last one repeat it and are not stored.
    let four = min(vec4<u32>(row, row + 1u, row + 2u, row + 3u), vec4<u32>(p.n_rows - 1u));
    let depth = p.hidden / 4u;
    let m_at = p.m / 4u + four * depth;
    let w_at = p.weight_hr / 4u + (panel * PANEL_UNITS + quad * 4u) * depth;
    var r0 = vec4<f32>();
    var r1 = vec4<f32>();
    var r2 = vec4<f32>();
    var r3 = vec4<f32>();
    for (var k = 0u; k < depth; k += 1u) {
        // A row vector times the matrix: one dot product with each unit's weights.
        let w = mat4x4<f32>(params[w_at + k], params[w_at + depth + k], params[w_at + 2u * depth + k], params[w_at + 3u * depth + k]);
        r0 += m[m_at.x + k] * w;
        r1 += m[m_at.y + k] * w;
        r2 += m[m_at.z + k] * w;
        r3 += m[m_at.w + k] * w;
    }
    finish(row, panel, quad, r0);
    if (row + 1u < p.n_rows) {
        finish(row + 1u, panel, quad, r1);
    }
    if (row + 2u < p.n_rows) {
        finish(row + 2u, panel, quad, r2);
    }
    if (row + 3u < p.n_rows) {
        finish(row + 3u, panel, quad, r3);
    }
}
