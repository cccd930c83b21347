// Adds the number of floats that are not finite, found by their bits, to word out of count.
//
// Integer additions give the same count in any order, so invocations add straight to it; as a rule there is nothing to add.
// Grid: a workgroup for each 4096 floats, folded into x and y. Loop trips: 16.

struct Params {
    len: u32,
    offset: u32,
    out: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> data: array<f32>;                 // [offset + len]
@group(0) @binding(2) var<storage, read_write> count: array<atomic<u32>>;  // [out + 1]

const WORKGROUP: u32 = 256u;
const BLOCK: u32 = 4096u;

@compute @workgroup_size(WORKGROUP)
fn non_finite(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let first = (wg.y * n_wg.x + wg.x) * BLOCK;
    let end = min(first + BLOCK, params.len);
    var n = 0u;
    for (var i = first + lane; i < end; i += WORKGROUP) {
        n += select(0u, 1u, is_non_finite(data[params.offset + i]));
    }
    if (n > 0u) {
        atomicAdd(&count[params.out], n);
    }
}
