// C = op(A) op(B) + bias, or added to C: register tiles straight from memory, for software adapters, where a barrier costs more than a load.
//
// An invocation computes 8 rows x 16 columns, a workgroup 8 x 128. A driver that runs invocations one by one pays for each float that is
// loaded, not for arithmetic: this tile loads 24 floats for 128 products. Loop trips: K + 168.

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

const TILE_ROWS: u32 = 8u;
const TILE_COLS: u32 = 16u;
const WORKGROUP: u32 = 8u;
const FOUR: vec4<u32> = vec4<u32>(0u, 1u, 2u, 3u);

// An element of op(A) lies at `a_row` + `a_k`, one of op(B) at `b_cols` + `b_k`. Rows and columns beyond the last repeat it and are not stored.
fn a_row(row: u32) -> u32 {
    return p.a.offset + min(row, p.m - 1u) * select(p.a.row_stride, 1u, TRANS_A);
}

fn a_k(k: u32) -> u32 {
    return k * select(1u, p.a.row_stride, TRANS_A);
}

// Of four columns; the first is a multiple of 4, so that they lie in one panel.
fn b_cols(col: u32) -> vec4<u32> {
    let cols = min(col + FOUR, vec4<u32>(p.n - 1u));
    if (TRANS_B) {
        return cols * p.b.row_stride;
    }
    return column_start(p.b, cols.x) + cols - cols.x;
}

fn b_k(k: u32) -> u32 {
    if (TRANS_B) {
        return column_start(p.b, k);
    }
    return k * p.b.row_stride;
}

fn b_at(at: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(b[at.x], b[at.y], b[at.z], b[at.w]);
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

@compute @workgroup_size(WORKGROUP)
fn gemm_direct(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = (wg.z * n_wg.y + wg.y) * TILE_ROWS;
    let col = (wg.x * WORKGROUP + lane) * TILE_COLS;
    if (row >= p.m || col >= p.n) {
        return;
    }
    let a0 = a_row(row);
    let a1 = a_row(row + 1u);
    let a2 = a_row(row + 2u);
    let a3 = a_row(row + 3u);
    let a4 = a_row(row + 4u);
    let a5 = a_row(row + 5u);
    let a6 = a_row(row + 6u);
    let a7 = a_row(row + 7u);
    let b0 = b_cols(col);
    let b1 = b_cols(col + 4u);
    let b2 = b_cols(col + 8u);
    let b3 = b_cols(col + 12u);

    // Each holds the 16 columns of one row, four to a matrix column.
    var sum0 = mat4x4<f32>();
    var sum1 = mat4x4<f32>();
    var sum2 = mat4x4<f32>();
    var sum3 = mat4x4<f32>();
    var sum4 = mat4x4<f32>();
    var sum5 = mat4x4<f32>();
    var sum6 = mat4x4<f32>();
    var sum7 = mat4x4<f32>();
    for (var k = 0u; k < p.k; k += 1u) {
        let ak = a_k(k);
        let bk = b_k(k);
        let y = mat4x4<f32>(b_at(b0 + bk), b_at(b1 + bk), b_at(b2 + bk), b_at(b3 + bk));
        sum0 += y * a[a0 + ak];
        sum1 += y * a[a1 + ak];
        sum2 += y * a[a2 + ak];
        sum3 += y * a[a3 + ak];
        sum4 += y * a[a4 + ak];
        sum5 += y * a[a5 + ak];
        sum6 += y * a[a6 + ak];
        sum7 += y * a[a7 + ak];
    }

    // A loop, not 32 copies of `store`, which would double the time that a driver takes to compile this.
    var sums = array<mat4x4<f32>, TILE_ROWS>(sum0, sum1, sum2, sum3, sum4, sum5, sum6, sum7);
    for (var i = 0u; i < TILE_ROWS; i += 1u) {
        for (var j = 0u; j < 4u; j += 1u) {
            store(row + i, col + 4u * j, sums[i][j]);
        }
    }
}
