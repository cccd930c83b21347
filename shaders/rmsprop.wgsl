// RMSprop: v = alpha v + (1 - alpha) g^2, d = g / (sqrt(v) + eps); with momentum m = momentum m + d, p -= lr m, else p -= lr d.
// Without momentum, m is neither read nor written.
//
// Grid: a workgroup for each 256 floats (64 invocations, 4 each), folded into x and y.

struct Params {
    len: u32,
    lr: f32,
    alpha: f32,
    eps: f32,
    momentum: f32,
    grad_scale: f32,
    clip_value: f32,
    weight_decay: f32,
    l1: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> p: array<f32>;  // [len]
@group(0) @binding(2) var<storage, read> grad: array<f32>;     // [len]
@group(0) @binding(3) var<storage, read_write> m: array<f32>;  // [len] with momentum
@group(0) @binding(4) var<storage, read_write> v: array<f32>;  // [len]

const WORKGROUP: u32 = 64u;
const EACH: u32 = 4u;

@compute @workgroup_size(WORKGROUP)
fn rmsprop(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let first = (wg.y * n_wg.x + wg.x) * WORKGROUP * EACH + lane;
    for (var e = 0u; e < EACH; e++) {
        let i = first + e * WORKGROUP;
        if (i < params.len) {
            update(i);
        }
    }
}

fn update(i: u32) {
    let regular = Regular(params.grad_scale, params.clip_value, params.weight_decay, params.l1);
    let g = gradient_that_counts(regular, grad[i], p[i]);
    let next = params.alpha * v[i] + (1.0 - params.alpha) * g * g;
    v[i] = next;
    var d = g / (sqrt(next) + params.eps);
    if (!(params.momentum == 0.0)) {
        d += params.momentum * m[i];
        m[i] = d;
    }
    p[i] -= params.lr * d;
}
