// y *= a over len floats.
//
// Grid: a workgroup for each 256 floats (64 invocations, 4 each), folded into x and y.

struct Params {
    len: u32,
    offset: u32,
    a: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;  // [offset + len]

const WORKGROUP: u32 = 64u;
const EACH: u32 = 4u;

@compute @workgroup_size(WORKGROUP)
fn scale(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let first = (wg.y * n_wg.x + wg.x) * WORKGROUP * EACH + lane;
    for (var e = 0u; e < EACH; e++) {
        let i = first + e * WORKGROUP;
        if (i < params.len) {
            y[params.offset + i] *= params.a;
        }
    }
}
