// y += a x over len floats.
//
// Grid: a workgroup for each 256 floats (64 invocations, 4 each), folded into x and y.

struct Params {
    len: u32,
    x_offset: u32,
    y_offset: u32,
    a: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;        // [x_offset + len]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;  // [y_offset + len]

const WORKGROUP: u32 = 64u;
const EACH: u32 = 4u;

@compute @workgroup_size(WORKGROUP)
fn add(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let first = (wg.y * n_wg.x + wg.x) * WORKGROUP * EACH + lane;
    for (var e = 0u; e < EACH; e++) {
        let i = first + e * WORKGROUP;
        if (i < params.len) {
            y[params.y_offset + i] += params.a * x[params.x_offset + i];
        }
    }
}
