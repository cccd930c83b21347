// The sum of squares of each block of 4096 floats of data (the last may be shorter), written from word out of squares on.
//
// Grid: a workgroup a block, folded into x and y; each invocation adds every 256th float of it, then a tree. Loop trips: 16 + 8.

struct Params {
    len: u32,
    out: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> data: array<f32>;           // [len]
@group(0) @binding(2) var<storage, read_write> squares: array<f32>;  // [out + blocks]

const WORKGROUP: u32 = 256u;
const BLOCK: u32 = 4096u;

var<workgroup> sh_sum: array<f32, WORKGROUP>;

@compute @workgroup_size(WORKGROUP)
fn block_squares(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let block = wg.y * n_wg.x + wg.x;
    if (block >= (params.len + BLOCK - 1u) / BLOCK) {
        return;
    }
    let end = min((block + 1u) * BLOCK, params.len);
    var own = 0.0;
    for (var i = block * BLOCK + lane; i < end; i += WORKGROUP) {
        own += data[i] * data[i];
    }
    sh_sum[lane] = own;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        if (lane < half) {
            sh_sum[lane] += sh_sum[lane + half];
        }
        workgroupBarrier();
    }
    if (lane == 0u) {
        squares[params.out + block] = sh_sum[0];
    }
}
