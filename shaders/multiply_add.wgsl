// out[i] = the sum of 32 numbers after x = x * shrink + shift, trips times: nothing but registers that are multiplied and added.
//
// Number n of invocation i starts as n / 32 + (i mod 16) / 16. Grid: a workgroup for each 64 outputs, folded into x and y.

struct Params {
    len: u32,
    trips: u32,
    shrink: f32,
    shift: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> out: array<f32>;  // [len]

const WORKGROUP: u32 = 64u;

@compute @workgroup_size(WORKGROUP)
fn multiply_add(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wg.y * n_wg.x + wg.x) * WORKGROUP + lane;
    if (i >= params.len) {
        return;
    }
    let shrink = vec4<f32>(params.shrink);
    let shift = vec4<f32>(params.shift);
    // Eight chains of their own, so that none waits for itself.
    var x0 = vec4<f32>(0.0, 1.0, 2.0, 3.0) / 32.0 + f32(i % 16u) / 16.0;
    var x1 = x0 + 0.125;
    var x2 = x0 + 0.25;
    var x3 = x0 + 0.375;
    var x4 = x0 + 0.5;
    var x5 = x0 + 0.625;
    var x6 = x0 + 0.75;
    var x7 = x0 + 0.875;
    for (var t = 0u; t < params.trips; t++) {
        x0 = fma(x0, shrink, shift);
        x1 = fma(x1, shrink, shift);
        x2 = fma(x2, shrink, shift);
        x3 = fma(x3, shrink, shift);
        x4 = fma(x4, shrink, shift);
        x5 = fma(x5, shrink, shift);
        x6 = fma(x6, shrink, shift);
        x7 = fma(x7, shrink, shift);
    }
    out[i] = dot(((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7)), vec4<f32>(1.0));
}
