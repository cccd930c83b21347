// Sums over a workgroup of 64 invocations, in a fixed order. Control flow must be uniform.

const ROW_WORKGROUP: u32 = 64u;
var<workgroup> sh_partial: array<vec2<f32>, ROW_WORKGROUP>;

// Both components summed.
fn workgroup_total2(lane: u32, v: vec2<f32>) -> vec2<f32> {
    sh_partial[lane] = v;
    workgroupBarrier();
    for (var half = ROW_WORKGROUP / 2u; half > 0u; half /= 2u) {
        if (lane < half) {
            sh_partial[lane] += sh_partial[lane + half];
        }
        workgroupBarrier();
    }
    let sum = sh_partial[0];
    workgroupBarrier();
    return sum;
}

fn workgroup_total(lane: u32, v: f32) -> f32 {
    return workgroup_total2(lane, vec2<f32>(v, 0.0)).x;
}

fn sum4(v: vec4<f32>) -> f32 {
    return v.x + v.y + v.z + v.w;
}
