// Rows of predictions [n_rows, n_outputs], row_stride apart, become gradients 2 weight (y - target) scale;
// row_loss[n] = sum of weight (y - target)^2.
//
// Terms of weight 0 give exactly zero, whatever they hold. A prediction that is not finite raises flags[0].
// Grid: a workgroup for each 64 rows, an invocation a row, folded into x and y. Loop trips: row_stride.

struct Params {
    n_rows: u32,
    n_outputs: u32,
    row_stride: u32,
    scale: f32,
    gradient: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> predictions: array<f32>;    // [n_rows, row_stride]
@group(0) @binding(2) var<storage, read> targets: array<f32>;              // [n_rows, n_outputs]
@group(0) @binding(3) var<storage, read> weights: array<f32>;              // [n_rows, n_outputs]
@group(0) @binding(4) var<storage, read_write> row_loss: array<f32>;       // [n_rows]
@group(0) @binding(5) var<storage, read_write> flags: array<atomic<u32>>;  // [1 or more]

const WORKGROUP: u32 = 64u;

@compute @workgroup_size(WORKGROUP)
fn squared_error(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = (wg.y * n_wg.x + wg.x) * WORKGROUP + lane;
    if (row >= params.n_rows) {
        return;
    }
    let base = row * params.row_stride;
    let dense = row * params.n_outputs;
    var bad = false;
    var sum = 0.0;
    for (var o = 0u; o < params.row_stride; o++) {
        var weight = 0.0;
        if (o < params.n_outputs) {
            weight = weights[dense + o];
        }
        var g = 0.0;
        if (!(weight == 0.0)) {
            let y = predictions[base + o];
            bad = bad || is_non_finite(y);
            let difference = y - targets[dense + o];
            sum += weight * difference * difference;
            g = 2.0 * weight * difference * params.scale;
        }
        if (params.gradient == 1u) {
            predictions[base + o] = g;
        }
    }
    row_loss[row] = sum;
    if (bad) {
        atomicStore(&flags[0], 1u);
    }
}
