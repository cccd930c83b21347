// out[n, :] = table[tokens[n], :]; a token outside the table gives zeros.
//
// Grid: a workgroup for each 64 vectors of 4 floats of out, folded into x and y. Offsets and width are multiples of 4.

struct Params {
    n_tokens: u32,
    width: u32,
    n_classes: u32,
    table: u32,
    out: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;          // [n_tokens]
@group(0) @binding(2) var<storage, read> table: array<vec4<f32>>;     // [n_classes, width / 4]
@group(0) @binding(3) var<storage, read_write> out: array<vec4<f32>>;  // [n_tokens, width / 4]

const WORKGROUP: u32 = 64u;

@compute @workgroup_size(WORKGROUP)
fn embedding_gather(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (wg.y * n_wg.x + wg.x) * WORKGROUP + lane;
    let row_vectors = params.width / 4u;
    if (i >= params.n_tokens * row_vectors) {
        return;
    }
    let token = tokens[i / row_vectors];
    var value = vec4<f32>();
    if (token < params.n_classes) {
        value = table[params.table / 4u + token * row_vectors + i % row_vectors];
    }
    out[params.out / 4u + i] = value;
}
