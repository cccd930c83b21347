// The sum of len floats at offset, written to word out of total.
//
// One workgroup: each invocation adds every 256th float, then a tree. Grid: 1. Loop trips: len / 256 + 8.

struct Params {
    len: u32,
    offset: u32,
    out: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> data: array<f32>;         // [offset + len]
@group(0) @binding(2) var<storage, read_write> total: array<f32>;  // [out + 1]

const WORKGROUP: u32 = 256u;

var<workgroup> sh_sum: array<f32, WORKGROUP>;

@compute @workgroup_size(WORKGROUP)
fn sum(@builtin(local_invocation_index) lane: u32) {
    var own = 0.0;
    for (var i = lane; i < params.len; i += WORKGROUP) {
        own += data[params.offset + i];
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
        total[params.out] = sh_sum[0];
    }
}
