// target[t, b, u] = source[t, b, u] * scale where kept, else 0, over [n_steps, n_rows, width]; bit for bit what the CPU drops.
//
// Grid: a workgroup for each 64 vectors of 4 floats, folded into x and y. Offsets and width are multiples of 4.

struct Params {
    n_steps: u32,
    n_rows: u32,
    width: u32,
    start: u32,
    to: u32,
    key0: u32,
    key1: u32,
    tag: u32,
    threshold: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> streams: array<u32>;             // [n_rows]
@group(0) @binding(2) var<storage, read> source: array<vec4<f32>>;        // [T, B, width / 4]
@group(0) @binding(3) var<storage, read_write> destination: array<vec4<f32>>;  // [T, B, width / 4]

const WORKGROUP: u32 = 64u;

@compute @workgroup_size(WORKGROUP)
fn dropout(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wg.y * n_wg.x + wg.x) * WORKGROUP + lane;
    let row_vectors = params.width / 4u;
    if (i >= params.n_steps * params.n_rows * row_vectors) {
        return;
    }
    let row = i / row_vectors;
    let block = i % row_vectors;
    let words = philox(
        vec4<u32>(block, row / params.n_rows, streams[row % params.n_rows], params.tag),
        vec2<u32>(params.key0, params.key1),
    );
    let kept = words >= vec4<u32>(params.threshold);
    destination[params.to / 4u + i] = select(vec4<f32>(), source[params.start / 4u + i] * params.scale, kept);
}
