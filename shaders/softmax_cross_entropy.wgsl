// Rows of logits [n_rows, n_classes], row_stride apart, become gradients; row_loss[n] = weight[n] (log sum exp(logits) - logits[target]).
//
// The row's maximum is subtracted first. Rows of weight 0 give exactly zero, whatever they hold. A logit that is not finite raises
// flags[0] and gives a loss of NaN. Floats between n_classes and row_stride become zero where the gradient is wanted.
// Grid: a workgroup a row, folded into x and y. Every invocation reads and writes only its own columns, so storage needs no barrier.
// Loop trips: 3 row_stride / 64 + 12.

struct Params {
    n_rows: u32,
    n_classes: u32,
    row_stride: u32,
    scale: f32,
    gradient: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> logits: array<f32>;         // [n_rows, row_stride]
@group(0) @binding(2) var<storage, read> targets: array<u32>;              // [n_rows]
@group(0) @binding(3) var<storage, read> weights: array<f32>;              // [n_rows]
@group(0) @binding(4) var<storage, read_write> row_loss: array<f32>;       // [n_rows]
@group(0) @binding(5) var<storage, read_write> flags: array<atomic<u32>>;  // [1 or more]

const WORKGROUP: u32 = 64u;
const LOWEST: f32 = -3.4028234e38;

var<workgroup> sh_max: array<f32, WORKGROUP>;
var<workgroup> sh_sum: array<f32, WORKGROUP>;
var<workgroup> sh_bad: array<u32, WORKGROUP>;
var<workgroup> sh_at_target: f32;

@compute @workgroup_size(WORKGROUP)
fn softmax_cross_entropy(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = wg.y * n_wg.x + wg.x;
    if (row >= params.n_rows) {
        return;
    }
    let n_classes = params.n_classes;
    let weight = weights[row];
    let goal = targets[row];
    let scored = !(weight == 0.0) && goal < n_classes;
    // A row that is not scored runs through the same barriers with no columns.
    let n = select(0u, n_classes, scored);
    let base = row * params.row_stride;

    var bad = 0u;
    var highest = LOWEST;
    for (var i = lane; i < n; i += WORKGROUP) {
        let v = logits[base + i];
        bad |= select(0u, 1u, is_non_finite(v));
        highest = select(highest, v, v > highest);
        if (i == goal) {
            sh_at_target = v;
        }
    }
    sh_max[lane] = highest;
    sh_bad[lane] = bad;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        if (lane < half) {
            let other = sh_max[lane + half];
            sh_max[lane] = select(sh_max[lane], other, other > sh_max[lane]);
            sh_bad[lane] |= sh_bad[lane + half];
        }
        workgroupBarrier();
    }
    highest = sh_max[0];

    var sum = 0.0;
    for (var i = lane; i < n; i += WORKGROUP) {
        sum += safe_exp(logits[base + i] - highest);
    }
    sh_sum[lane] = sum;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        if (lane < half) {
            sh_sum[lane] += sh_sum[lane + half];
        }
        workgroupBarrier();
    }
    sum = sh_sum[0];

    if (lane == 0u) {
        var loss = 0.0;
        if (scored) {
            loss = weight * (log(sum) + highest - sh_at_target);
            if (sh_bad[0] != 0u) {
                atomicStore(&flags[0], 1u);
                loss = bitcast<f32>(0x7fc00000u);
            }
        }
        row_loss[row] = loss;
    }
    if (params.gradient == 1u) {
        let whole = weight * params.scale;
        let factor = whole / sum;
        for (var i = lane; i < params.row_stride; i += WORKGROUP) {
            var g = 0.0;
            if (i < n) {
                g = safe_exp(logits[base + i] - highest) * factor - select(0.0, whole, i == goal);
            }
            logits[base + i] = g;
        }
    }
}
