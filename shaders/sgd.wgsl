// SGD: v = momentum v + g, p -= lr v; with Nesterov p -= lr (g + momentum v). Without momentum, v is neither read nor written.
//
// Grid: a workgroup for each 256 floats (64 invocations, 4 each), folded into x and y.

struct Params {
    len: u32,
    nesterov: u32,
    lr: f32,
    momentum: f32,
    grad_scale: f32,
    clip_value: f32,
    weight_decay: f32,
    l1: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> p: array<f32>;  // [len]
@group(0) @binding(2) var<storage, read> grad: array<f32>;     // [len]
@group(0) @binding(3) var<storage, read_write> v: array<f32>;  // [len] with momentum

const WORKGROUP: u32 = 64u;
const EACH: u32 = 4u;

@compute @workgroup_size(WORKGROUP)
fn sgd(
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
    if (params.momentum == 0.0) {
        p[i] -= params.lr * g;
        return;
    }
    let next = params.momentum * v[i] + g;
    v[i] = next;
    p[i] -= params.lr * select(next, g + params.momentum * next, params.nesterov == 1u);
}
