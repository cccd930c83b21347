// x[t, b, :] = pooled[b, :] times what step t counts in pool_steps; zeros for steps that do not count, and behind a row's end.
//
// Grid: a workgroup for each 64 vectors of 4 floats of x, folded into x and y. Offsets and width are multiples of 4.

struct Params {
    n_steps: u32,
    n_rows: u32,
    width: u32,
    x: u32,
    pooled: u32,
    which: u32,
    use_lengths: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> pooled: array<vec4<f32>>;   // [n_rows, width / 4]
@group(0) @binding(2) var<storage, read> lengths: array<u32>;        // [n_rows]
@group(0) @binding(3) var<storage, read_write> x: array<vec4<f32>>;  // [n_steps, n_rows, width / 4]

const WORKGROUP: u32 = 64u;

@compute @workgroup_size(WORKGROUP)
fn pool_steps_gradient(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wg.y * n_wg.x + wg.x) * WORKGROUP + lane;
    let row_vectors = params.width / 4u;
    let step_vectors = params.n_rows * row_vectors;
    if (i >= params.n_steps * step_vectors) {
        return;
    }
    let t = i / step_vectors;
    let of_row = i % step_vectors;
    var end = params.n_steps;
    if (params.use_lengths == 1u) {
        end = min(end, lengths[of_row / row_vectors]);
    }
    var start = 0u;
    var factor = 1.0 / f32(max(end, 1u));
    if (params.which == 1u) {
        start = max(end, 1u) - 1u;
        factor = 1.0;
    } else if (params.which == 2u) {
        end = min(end, 1u);
        factor = 1.0;
    }
    var value = vec4<f32>();
    if (t >= start && t < end) {
        value = pooled[params.pooled / 4u + of_row] * factor;
    }
    x[params.x / 4u + i] = value;
}
