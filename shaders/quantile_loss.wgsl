// Rows of predicted quantiles [n_rows, n_outputs, n_levels], row_stride apart, become gradients; with d = y - p a term is the mean over the
// levels q of max(q d, (q - 1) d), and row_loss[n] the sum of its terms, each times its weight.
//
// Terms of weight 0 give exactly zero, whatever they hold. A prediction that is not finite raises flags[0].
// Grid: a workgroup for each 64 rows, an invocation a row, folded into x and y. Loop trips: row_stride + n_outputs.

struct Params {
    n_rows: u32,
    n_outputs: u32,
    n_levels: u32,
    row_stride: u32,
    scale: f32,
    gradient: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> predictions: array<f32>;    // [n_rows, row_stride]
@group(0) @binding(2) var<storage, read> targets: array<f32>;              // [n_rows, n_outputs]
@group(0) @binding(3) var<storage, read> weights: array<f32>;              // [n_rows, n_outputs]
@group(0) @binding(4) var<storage, read> levels: array<f32>;               // [n_levels]
@group(0) @binding(5) var<storage, read_write> row_loss: array<f32>;       // [n_rows]
@group(0) @binding(6) var<storage, read_write> flags: array<atomic<u32>>;  // [1 or more]

const WORKGROUP: u32 = 64u;

@compute @workgroup_size(WORKGROUP)
fn quantile_loss(
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
    let n_levels = f32(params.n_levels);
    var bad = false;
    var sum = 0.0;
    var at = base;
    for (var o = 0u; o < params.n_outputs; o++) {
        let weight = weights[dense + o];
        let scored = !(weight == 0.0);
        let y = targets[dense + o];
        var term = 0.0;
        for (var level = 0u; level < params.n_levels; level++) {
            var g = 0.0;
            if (scored) {
                let p = predictions[at];
                bad = bad || is_non_finite(p);
                let difference = y - p;
                let slope = select(levels[level] - 1.0, levels[level], difference > 0.0);
                term += slope * difference;
                g = -slope * weight * params.scale / n_levels;
            }
            if (params.gradient == 1u) {
                predictions[at] = g;
            }
            at++;
        }
        if (scored) {
            sum += weight * term / n_levels;
        }
    }
    for (; at < base + params.row_stride; at++) {
        if (params.gradient == 1u) {
            predictions[at] = 0.0;
        }
    }
    row_loss[row] = sum;
    if (bad) {
        atomicStore(&flags[0], 1u);
    }
}
