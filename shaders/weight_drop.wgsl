// kept[i] = weights[i] * scale where kept, else 0; bit for bit what the CPU drops.
//
// Grid: a workgroup for each 64 vectors of 4 floats, folded into x and y. Length and offsets are multiples of 4.

struct Params {
    len: u32,
    start: u32,
    to: u32,
    key0: u32,
    key1: u32,
    tag: u32,
    threshold: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> weights: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> kept: array<vec4<f32>>;

const WORKGROUP: u32 = 64u;

@compute @workgroup_size(WORKGROUP)
fn weight_drop(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wg.y * n_wg.x + wg.x) * WORKGROUP + lane;
    if (i >= params.len / 4u) {
        return;
    }
    let words = philox(vec4<u32>(i, 0u, 0u, params.tag), vec2<u32>(params.key0, params.key1));
    let is_kept = words >= vec4<u32>(params.threshold);
    kept[params.to / 4u + i] = select(vec4<f32>(), weights[params.start / 4u + i] * params.scale, is_kept);
}
