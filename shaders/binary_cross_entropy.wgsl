// Rows of logits [n_rows, n_outputs], row_stride apart, each for itself the log-odds of one thing, become gradients weight (sigmoid(z) - y) scale;
// row_loss[n] = weight[n] * sum of (max(z, 0) - z y + log(1 + e^-|z|)).
//
// Rows of weight 0 give exactly zero, whatever they hold. A logit that is not finite raises flags[0] and gives a loss of NaN. Floats between
// n_outputs and row_stride become zero where the gradient is wanted.
// Grid: a workgroup a row, folded into x and y. Every invocation reads and writes only its own columns, so storage needs no barrier.
// Loop trips: row_stride / 64 + 6.

struct Params {
    n_rows: u32,
    n_outputs: u32,
    row_stride: u32,
    scale: f32,
    gradient: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> logits: array<f32>;         // [n_rows, row_stride]
@group(0) @binding(2) var<storage, read> targets: array<f32>;              // [n_rows, n_outputs]
@group(0) @binding(3) var<storage, read> weights: array<f32>;              // [n_rows]
@group(0) @binding(4) var<storage, read_write> row_loss: array<f32>;       // [n_rows]
@group(0) @binding(5) var<storage, read_write> flags: array<atomic<u32>>;  // [1 or more]

const WORKGROUP: u32 = 64u;

var<workgroup> sh_sum: array<f32, WORKGROUP>;
var<workgroup> sh_bad: array<u32, WORKGROUP>;

@compute @workgroup_size(WORKGROUP)
fn binary_cross_entropy(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = wg.y * n_wg.x + wg.x;
    if (row >= params.n_rows) {
        return;
    }
    let weight = weights[row];
    let scored = !(weight == 0.0);
    let base = row * params.row_stride;
    let dense = row * params.n_outputs;
    let factor = weight * params.scale;

    var sum = 0.0;
    var bad = 0u;
    for (var i = lane; i < params.row_stride; i += WORKGROUP) {
        var g = 0.0;
        if (scored && i < params.n_outputs) {
            let z = logits[base + i];
            let y = targets[dense + i];
            bad |= select(0u, 1u, is_non_finite(z));
            sum += select(0.0, z, z > 0.0) - z * y + log(1.0 + safe_exp(-abs(z)));
            g = (sigmoid(z) - y) * factor;
        }
        if (params.gradient == 1u) {
            logits[base + i] = g;
        }
    }
    sh_sum[lane] = sum;
    sh_bad[lane] = bad;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        if (lane < half) {
            sh_sum[lane] += sh_sum[lane + half];
            sh_bad[lane] |= sh_bad[lane + half];
        }
        workgroupBarrier();
    }
    if (lane == 0u) {
        var loss = 0.0;
        if (scored) {
            loss = weight * sh_sum[0];
            if (sh_bad[0] != 0u) {
                atomicStore(&flags[0], 1u);
                loss = bitcast<f32>(0x7fc00000u);
            }
        }
        row_loss[row] = loss;
    }
}
