// pooled[b, :] = mean of x[t, b, :] over the valid steps of row b (which 0), or its last (1) or first one (2); zeros for a row without steps.
//
// One invocation owns a vector of 4 floats of pooled and adds in the order of time. Loop trips: n_steps.
// Grid: a workgroup for each 64 vectors of pooled, folded into x and y. Offsets and width are multiples of 4.

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
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;            // [n_steps, n_rows, width / 4]
@group(0) @binding(2) var<storage, read> lengths: array<u32>;            // [n_rows]
@group(0) @binding(3) var<storage, read_write> pooled: array<vec4<f32>>;  // [n_rows, width / 4]

const WORKGROUP: u32 = 64u;

@compute @workgroup_size(WORKGROUP)
fn pool_steps(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wg.y * n_wg.x + wg.x) * WORKGROUP + lane;
    let row_vectors = params.width / 4u;
    let step_vectors = params.n_rows * row_vectors;
    if (i >= step_vectors) {
        return;
    }
    var end = params.n_steps;
    if (params.use_lengths == 1u) {
        end = min(end, lengths[i / row_vectors]);
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
    var sum = vec4<f32>();
    for (var t = start; t < end; t++) {
        sum += x[params.x / 4u + t * step_vectors + i];
    }
    pooled[params.pooled / 4u + i] = sum * factor;
}
