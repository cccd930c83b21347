// grad[token, :] += sum of dx[place, :] over the token's places first .. first + limit, in their order.
//
// index is [distinct tokens][start of each one's places, and the end][places]. One invocation owns a vector of a table row, so no two write the
// same float and the order of each sum is fixed. Loop trips: limit.
// Grid: a workgroup for each 64 vectors of 4 floats of the distinct rows, folded into x and y. Offsets and width are multiples of 4.

struct Params {
    n_distinct: u32,
    width: u32,
    n_places: u32,
    n_classes: u32,
    grad: u32,
    dx: u32,
    first: u32,
    limit: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> index: array<u32>;             // [2 n_distinct + 1 + n_places]
@group(0) @binding(2) var<storage, read> dx: array<vec4<f32>>;          // [n_places, width / 4]
@group(0) @binding(3) var<storage, read_write> grad: array<vec4<f32>>;  // [n_classes, width / 4]

const WORKGROUP: u32 = 64u;

@compute @workgroup_size(WORKGROUP)
fn embedding_gradient(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wg.y * n_wg.x + wg.x) * WORKGROUP + lane;
    let row_vectors = params.width / 4u;
    if (i >= params.n_distinct * row_vectors) {
        return;
    }
    let entry = i / row_vectors;
    let column = i % row_vectors;
    let token = index[entry];
    let starts = params.n_distinct;
    let places = 2u * params.n_distinct + 1u;
    let last = min(index[starts + entry + 1u], params.n_places);
    // Sums that stay within u32 whatever first and limit are.
    let begin = min(index[starts + entry], last);
    let start = begin + min(params.first, last - begin);
    let end = start + min(params.limit, last - start);
    if (token >= params.n_classes || start == end) {
        return;
    }
    let at = params.grad / 4u + token * row_vectors + column;
    let source = params.dx / 4u + column;
    var sum = grad[at];
    for (var n = start; n < end; n++) {
        sum += dx[source + index[places + n] * row_vectors];
    }
    grad[at] = sum;
}
