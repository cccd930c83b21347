// C = op(A) op(B) + bias, or added to C, with operands rounded to half floats and sums in f32: register tiles over workgroup memory that takes half the bytes.
//
// A workgroup of 16 x 16 invocations computes 64 x 64 elements of C, an invocation 4 x 4. Slices of 16 along K go through workgroup memory, the next slice while
// this one is multiplied. A product of two half floats is exact in f32, so that nothing but the operands is rounded more than in f32. Loop trips: 5 K / 16 + 25.

struct Params {
    m: u32,
    n: u32,
    k: u32,
    trans_a: u32,
    trans_b: u32,
    accumulate: u32,
    use_bias: u32,
    bias_offset: u32,
    a: Matrix,
    b: Matrix,
    c: Matrix,
}

// Offsets and strides may be odd, so the operands are floats, not vectors.
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;          // [M, K], or [K, M] where TRANS_A; row-major
@group(0) @binding(2) var<storage, read> b: array<f32>;          // [K, N], or [N, K] where TRANS_B
@group(0) @binding(3) var<storage, read> bias: array<f32>;       // [N]
@group(0) @binding(4) var<storage, read_write> c: array<f32>;    // [M, N]

override TRANS_A: bool = false;
override TRANS_B: bool = false;

const BLOCK: u32 = 64u;
const SLICE: u32 = 16u;
const SIDE: u32 = 16u;
// Vectors from one k to the next in workgroup memory: one more than a block needs, so that neighbours in k do not fall on the same banks.
const PITCH: u32 = 17u;

// Slices [k][row / 4] of op(A) and [k][col / 4] of op(B): four rows or columns a vector.
var<workgroup> sh_a: array<vec4<f16>, 272>;
var<workgroup> sh_b: array<vec4<f16>, 272>;

// Which vector of a slice an invocation carries: x its k, y its group of four. Neighbours take what lies next to each other in memory.
fn place(lane: u32, k_is_contiguous: bool) -> vec2<u32> {
    let near = lane % SIDE;
    let far = lane / SIDE;
    return select(vec2<u32>(far, near), vec2<u32>(near, far), k_is_contiguous);
}

// Four rows of op(A) at k, zeros beyond K. Rows beyond the last repeat it and are not stored.
fn load_a(row: u32, k: u32) -> vec4<f16> {
    if (k >= p.k) {
        return vec4<f16>();
    }
    let rows = min(row + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(p.m - 1u));
    var at = p.a.offset + rows * p.a.row_stride + k;
    if (TRANS_A) {
        at = p.a.offset + k * p.a.row_stride + rows;
    }
    return vec4<f16>(vec4<f32>(a[at.x], a[at.y], a[at.z], a[at.w]));
}

// Four columns of op(B) at k; the first is a multiple of 4, so that they lie in one panel.
fn load_b(k: u32, col: u32) -> vec4<f16> {
    if (k >= p.k) {
        return vec4<f16>();
    }
    let cols = min(col + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(p.n - 1u));
    var at = column_start(p.b, cols.x) + cols - cols.x + k * p.b.row_stride;
    if (TRANS_B) {
        at = column_start(p.b, k) + cols * p.b.row_stride;
    }
    return vec4<f16>(vec4<f32>(b[at.x], b[at.y], b[at.z], b[at.w]));
}

// Adds what one k gives to the 4 x 4 elements of an invocation, a matrix column a row of C.
fn add_product(sum: mat4x4<f32>, k: u32, row_group: u32, col_group: u32) -> mat4x4<f32> {
    let x = vec4<f32>(sh_a[k * PITCH + row_group]);
    let y = vec4<f32>(sh_b[k * PITCH + col_group]);
    return mat4x4<f32>(
        fma(vec4<f32>(x.x), y, sum[0]),
        fma(vec4<f32>(x.y), y, sum[1]),
        fma(vec4<f32>(x.z), y, sum[2]),
        fma(vec4<f32>(x.w), y, sum[3]),
    );
}

// Writes four elements of a row of C, as far as they exist.
fn store(row: u32, col: u32, sum: vec4<f32>) {
    if (row >= p.m || col >= p.n) {
        return;
    }
    let at = column_start(p.c, col) + row * p.c.row_stride;
    let n_cols = min(p.n - col, 4u);
    for (var i = 0u; i < n_cols; i += 1u) {
        var value = sum[i];
        if (p.use_bias == 1u) {
            value += bias[p.bias_offset + col + i];
        }
        if (p.accumulate == 1u) {
            value += c[at + i];
        }
        c[at + i] = value;
    }
}

@compute @workgroup_size(256)
fn gemm_half(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let block_row = (wg.z * n_wg.y + wg.y) * BLOCK;
    let block_col = wg.x * BLOCK;
    // The same for the whole workgroup, so that all of it meets at the barriers or none.
    if (block_row >= p.m || block_col >= p.n) {
        return;
    }
    let a_place = place(lane, !TRANS_A);
    let b_place = place(lane, TRANS_B);
    let a_row = block_row + 4u * a_place.y;
    let b_col = block_col + 4u * b_place.y;
    let row_group = lane / SIDE;
    let col_group = lane % SIDE;

    var sum = mat4x4<f32>();
    var next_a = load_a(a_row, a_place.x);
    var next_b = load_b(b_place.x, b_col);
    for (var k = 0u; k < p.k; k += SLICE) {
        // Nobody overwrites a slice that others still read, nobody reads before all have written.
        workgroupBarrier();
        sh_a[a_place.x * PITCH + a_place.y] = next_a;
        sh_b[b_place.x * PITCH + b_place.y] = next_b;
        workgroupBarrier();
        next_a = load_a(a_row, k + SLICE + a_place.x);
        next_b = load_b(k + SLICE + b_place.x, b_col);
        for (var i = 0u; i < SLICE; i += 4u) {
            sum = add_product(sum, i, row_group, col_group);
            sum = add_product(sum, i + 1u, row_group, col_group);
            sum = add_product(sum, i + 2u, row_group, col_group);
            sum = add_product(sum, i + 3u, row_group, col_group);
        }
    }
    let row = block_row + 4u * row_group;
    let col = block_col + 4u * col_group;
    for (var i = 0u; i < 4u; i += 1u) {
        store(row + i, col, sum[i]);
    }
}
