// The gradient of h at a step: through the recurrent product of the step after, from the output, out of the carry.
//
// A workgroup computes 32 batch rows x 16 units of h, an invocation 4 rows x 4 units. Loop trips: H, each four columns of dz.

struct Params {
    @align(16) cell: Cell,
    n_rows: u32, // B
    hidden: u32, // H, a multiple of 16
    width: u32,  // R, a multiple of 16
    weight_hh: u32,
    dz_after: u32,
    dh_out: u32,
    dx: u32,
    dh: u32,
    carry: u32,
    t: u32,
    last: u32,
    use_lengths: u32,
    initial: u32,
}

@group(0) @binding(0) var<uniform> lanes: array<Params, 2>;
@group(0) @binding(1) var<storage, read> params: array<vec4<f32>>;        // weight_hh [H / 16, R, 64]
@group(0) @binding(2) var<storage, read> dz: array<vec4<f32>>;            // [B, 4H]: of the step after
@group(0) @binding(3) var<storage, read> dh_out: array<vec4<f32>>;        // [B, R]
@group(0) @binding(4) var<storage, read_write> dh: array<vec4<f32>>;      // [B, R]
@group(0) @binding(5) var<storage, read_write> carry: array<vec4<f32>>;   // [B, R]: of h what W_hh does not hand on
@group(0) @binding(6) var<storage, read> rows: array<u32>;                // lengths [B]; stream numbers [B] at cell.streams
@group(0) @binding(7) var<storage, read_write> dx: array<vec4<f32>>;      // [B, R]: of a residual layer, what goes to its input past the cell

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

fn finish(row: u32, panel: u32, quad: u32, from_after: vec4<f32>) {
    let carry_at = units_of(p.carry, row, p.width, panel, quad);
    let block = panel * (PANEL_UNITS / 4u) + quad;
    var d = from_after;
    if (p.cell.mask_scale != 0.0) {
        d *= recurrent_mask(p.cell, row_stream(row), block);
    }
    if (p.initial == 1u) {
        carry[carry_at] += d;
        return;
    }
    let dh_at = units_of(p.dh, row, p.width, panel, quad);
    var takes = p.last == 1u || p.cell.zoneout_h > 0.0;
    if (p.use_lengths == 1u) {
        if (p.t >= rows[row]) {
            carry[carry_at] += d;
            dh[dh_at] = vec4<f32>();
            if (p.dx != NONE) {
                dx[units_of(p.dx, row, p.width, panel, quad)] = vec4<f32>();
            }
            return;
        }
        takes = takes || p.t + 1u == rows[row];
    }
    if (takes) {
        d += carry[carry_at];
        carry[carry_at] = vec4<f32>();
    }
    if (p.dh_out != NONE) {
        let from_above = dh_out[units_of(p.dh_out, row, p.width, panel, quad)];
        d += from_above * drop_mask(p.cell, row_stream(row), p.t, block);
        if (p.dx != NONE) {
            dx[units_of(p.dx, row, p.width, panel, quad)] = from_above;
        }
    }
    if (p.cell.zoneout_h > 0.0) {
        let keep = zoneout_kept(p.cell, ZONEOUT_H, p.cell.zoneout_h, row_stream(row), p.t, block);
        carry[carry_at] = keep * d;
        d *= 1.0 - keep;
    }
    dh[dh_at] = d;
}

@compute @workgroup_size(4, 8)
fn lstm_state_gradient(
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
    var d0 = vec4<f32>();
    var d1 = vec4<f32>();
    var d2 = vec4<f32>();
    var d3 = vec4<f32>();
    if (p.last == 0u) {
        // Rows beyond the last one repeat it and are not stored.
        let four = min(vec4<u32>(row, row + 1u, row + 2u, row + 3u), vec4<u32>(p.n_rows - 1u));
        let dz_at = p.dz_after / 4u + four * p.hidden;
        // Weights of this quad's first unit in panel 0: 16 vectors, then those of the next unit; panels are R units apart.
        let w_start = p.weight_hh / 4u + (panel * PANEL_UNITS + quad * 4u) * PANEL_VECTORS;
        for (var k = 0u; k < p.hidden; k += 1u) {
            let w_at = w_start + k / PANEL_VECTORS * p.width * PANEL_VECTORS + k % PANEL_VECTORS;
            // A row vector times the matrix: one dot product with each unit's weights.
            let w = mat4x4<f32>(
                params[w_at],
                params[w_at + PANEL_VECTORS],
                params[w_at + 2u * PANEL_VECTORS],
                params[w_at + 3u * PANEL_VECTORS],
            );
            d0 += dz[dz_at.x + k] * w;
            d1 += dz[dz_at.y + k] * w;
            d2 += dz[dz_at.z + k] * w;
            d3 += dz[dz_at.w + k] * w;
        }
    }
    finish(row, panel, quad, d0);
    if (row + 1u < p.n_rows) {
        finish(row + 1u, panel, quad, d1);
    }
    if (row + 2u < p.n_rows) {
        finish(row + 2u, panel, quad, d2);
    }
    if (row + 3u < p.n_rows) {
        finish(row + 3u, panel, quad, d3);
    }
}
