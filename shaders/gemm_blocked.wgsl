// C = op(A) op(B) + bias, or added to C: larger register tiles over workgroup memory than gemm_tiled has, and vectors of four from memory.
//
// All offsets and strides are multiples of 4. A workgroup of ROW_SIDE x COL_SIDE invocations computes 4 ROW_FOURS x 4 COL_FOURS elements of C each, in
// groups of 4 x 4 that lie ROW_SIDE or COL_SIDE groups apart. Slices of 16 along K go through workgroup memory: some invocations carry 4 x 4 blocks of A,
// others of B, the next ones while this slice is multiplied. Each sum runs over K in order, fused, so every tile gives the same bits.
// Loop trips: 5 K / 16 + 10.

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

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;          // [M, K], or [K, M] where TRANS_A; row-major
@group(0) @binding(2) var<storage, read> b: array<vec4<f32>>;          // [K, N], or [N, K] where TRANS_B
@group(0) @binding(3) var<storage, read> bias: array<f32>;             // [N]
@group(0) @binding(4) var<storage, read_write> c: array<vec4<f32>>;    // [M, N]

override TRANS_A: bool = false;
override TRANS_B: bool = false;

const SLICE: u32 = 16u;
const K_FOURS: u32 = 4u;
// Fours of rows and of columns in a block of C.
const ALL_ROW_FOURS: u32 = ROW_FOURS * ROW_SIDE;
const ALL_COL_FOURS: u32 = COL_FOURS * COL_SIDE;
// Blocks of 4 x 4 that a slice of A and one of B consist of.
const A_BLOCKS: u32 = ALL_ROW_FOURS * K_FOURS;
const B_BLOCKS: u32 = ALL_COL_FOURS * K_FOURS;

// Slices [k][row / 4] of op(A) and [k][col / 4] of op(B).
var<workgroup> sh_a: array<vec4<f32>, SLICE * ALL_ROW_FOURS>;
var<workgroup> sh_b: array<vec4<f32>, SLICE * ALL_COL_FOURS>;

// Sums of the groups of 4 x 4, a matrix column a row of C.
struct Sums {
    s00: mat4x4<f32>,
    s01: mat4x4<f32>,
    s10: mat4x4<f32>,
    s11: mat4x4<f32>,
}

// Where the fours of a k lie: turned about, so that what is stored together falls on different banks.
fn turned(four: u32, k: u32) -> u32 {
    return four ^ (2u * ((k / 4u) % 4u));
}

// Zeros at k beyond K.
fn within_k(block: mat4x4<f32>, k: u32) -> mat4x4<f32> {
    let zero = vec4<f32>();
    return mat4x4<f32>(
        block[0],
        select(zero, block[1], k + 1u < p.k),
        select(zero, block[2], k + 2u < p.k),
        select(zero, block[3], k + 3u < p.k),
    );
}

// Four rows of op(A) from `row` on, a matrix column a k. Rows beyond the last repeat others and are not stored.
fn load_a(row: u32, k: u32) -> mat4x4<f32> {
    if (k >= p.k) {
        return mat4x4<f32>();
    }
    if (TRANS_A) {
        // A k beyond K reads the last again.
        let ks = min(k + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(p.k - 1u));
        let at = (p.a.offset + min(row, (p.m - 1u) / 4u * 4u) + ks * p.a.row_stride) / 4u;
        return within_k(mat4x4<f32>(a[at.x], a[at.y], a[at.z], a[at.w]), k);
    }
    let rows = min(row + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(p.m - 1u));
    let at = (p.a.offset + rows * p.a.row_stride + k) / 4u;
    return within_k(transpose(mat4x4<f32>(a[at.x], a[at.y], a[at.z], a[at.w])), k);
}

// Four columns of op(B) from `col` on, a matrix column a k.
fn load_b(k: u32, col: u32) -> mat4x4<f32> {
    if (k >= p.k) {
        return mat4x4<f32>();
    }
    if (TRANS_B) {
        let cols = min(col + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(p.n - 1u));
        let at = (column_start(p.b, k) + cols * p.b.row_stride) / 4u;
        return within_k(transpose(mat4x4<f32>(b[at.x], b[at.y], b[at.z], b[at.w])), k);
    }
    let ks = min(k + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(p.k - 1u));
    let at = (column_start(p.b, min(col, (p.n - 1u) / 4u * 4u)) + ks * p.b.row_stride) / 4u;
    return within_k(mat4x4<f32>(b[at.x], b[at.y], b[at.z], b[at.w]), k);
}

// What one k adds to a group.
fn outer(sum: mat4x4<f32>, x: vec4<f32>, y: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(
        fma(vec4<f32>(x.x), y, sum[0]),
        fma(vec4<f32>(x.y), y, sum[1]),
        fma(vec4<f32>(x.z), y, sum[2]),
        fma(vec4<f32>(x.w), y, sum[3]),
    );
}

fn step(sums: ptr<function, Sums>, k: u32, row_group: u32, col_group: u32) {
    let at_a = k * ALL_ROW_FOURS;
    let at_b = k * ALL_COL_FOURS;
    let x0 = sh_a[at_a + turned(row_group, k)];
    let y0 = sh_b[at_b + turned(col_group, k)];
    (*sums).s00 = outer((*sums).s00, x0, y0);
    if (COL_FOURS > 1u) {
        let y1 = sh_b[at_b + turned(col_group + (COL_FOURS - 1u) * COL_SIDE, k)];
        (*sums).s01 = outer((*sums).s01, x0, y1);
        if (ROW_FOURS > 1u) {
            let x1 = sh_a[at_a + turned(row_group + (ROW_FOURS - 1u) * ROW_SIDE, k)];
            (*sums).s11 = outer((*sums).s11, x1, y1);
        }
    }
    if (ROW_FOURS > 1u) {
        let x1 = sh_a[at_a + turned(row_group + (ROW_FOURS - 1u) * ROW_SIDE, k)];
        (*sums).s10 = outer((*sums).s10, x1, y0);
    }
}

// Writes four elements of a row of C, as far as they exist.
fn store_row(row: u32, col: u32, sum: vec4<f32>) {
    if (row >= p.m || col >= p.n) {
        return;
    }
    let at = (column_start(p.c, col) + row * p.c.row_stride) / 4u;
    var value = sum;
    let n_cols = min(p.n - col, 4u);
    if (p.use_bias == 1u) {
        let last = p.n - 1u;
        let cols = p.bias_offset + min(col + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(last));
        value += vec4<f32>(bias[cols.x], bias[cols.y], bias[cols.z], bias[cols.w]);
    }
    if (n_cols == 4u) {
        if (p.accumulate == 1u) {
            value += c[at];
        }
        c[at] = value;
        return;
    }
    // The last columns, one by one: between them and the end of the vector something else may lie.
    if (p.accumulate == 1u) {
        value += c[at];
    }
    c[at].x = value.x;
    if (n_cols > 1u) {
        c[at].y = value.y;
    }
    if (n_cols > 2u) {
        c[at].z = value.z;
    }
}

fn store_group(row: u32, col: u32, sum: mat4x4<f32>) {
    store_row(row, col, sum[0]);
    store_row(row + 1u, col, sum[1]);
    store_row(row + 2u, col, sum[2]);
    store_row(row + 3u, col, sum[3]);
}

@compute @workgroup_size(ROW_SIDE * COL_SIDE)
fn gemm_blocked(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let block_row = (wg.z * n_wg.y + wg.y) * 4u * ALL_ROW_FOURS;
    let block_col = wg.x * 4u * ALL_COL_FOURS;
    // The same for the whole workgroup, so that all of it meets at the barriers or none.
    if (block_row >= p.m || block_col >= p.n) {
        return;
    }
    // Which block of a slice this invocation carries: its four of k and its four of rows or columns. Neighbours take what lies next to each other.
    let carries_a = lane < A_BLOCKS;
    let carries_b = !carries_a && lane - A_BLOCKS < B_BLOCKS;
    let place = select(lane - A_BLOCKS, lane, carries_a);
    let fours = select(ALL_COL_FOURS, ALL_ROW_FOURS, carries_a);
    let along_k = select(TRANS_B, !TRANS_A, carries_a);
    let k_four = select(place / fours, place % K_FOURS, along_k);
    let four = select(place % fours, place / K_FOURS, along_k);
    let row_group = lane / COL_SIDE;
    let col_group = lane % COL_SIDE;

    var sums = Sums();
    var next = mat4x4<f32>();
    if (carries_a) {
        next = load_a(block_row + 4u * four, 4u * k_four);
    } else if (carries_b) {
        next = load_b(4u * k_four, block_col + 4u * four);
    }
    for (var k = 0u; k < p.k; k += SLICE) {
        // Nobody overwrites a slice that others still read, nobody reads before all have written.
        workgroupBarrier();
        let first = 4u * k_four;
        let to = turned(four, first);
        if (carries_a) {
            sh_a[first * ALL_ROW_FOURS + to] = next[0];
            sh_a[(first + 1u) * ALL_ROW_FOURS + to] = next[1];
            sh_a[(first + 2u) * ALL_ROW_FOURS + to] = next[2];
            sh_a[(first + 3u) * ALL_ROW_FOURS + to] = next[3];
        } else if (carries_b) {
            sh_b[first * ALL_COL_FOURS + to] = next[0];
            sh_b[(first + 1u) * ALL_COL_FOURS + to] = next[1];
            sh_b[(first + 2u) * ALL_COL_FOURS + to] = next[2];
            sh_b[(first + 3u) * ALL_COL_FOURS + to] = next[3];
        }
        workgroupBarrier();
        if (carries_a) {
            next = load_a(block_row + 4u * four, k + SLICE + first);
        } else if (carries_b) {
            next = load_b(k + SLICE + first, block_col + 4u * four);
        }
        for (var i = 0u; i < SLICE; i += 4u) {
            step(&sums, i, row_group, col_group);
            step(&sums, i + 1u, row_group, col_group);
            step(&sums, i + 2u, row_group, col_group);
            step(&sums, i + 3u, row_group, col_group);
        }
    }
    let row = block_row + 4u * row_group;
    let col = block_col + 4u * col_group;
    store_group(row, col, sums.s00);
    if (COL_FOURS > 1u) {
        store_group(row, col + 4u * COL_SIDE, sums.s01);
    }
    if (ROW_FOURS > 1u) {
        store_group(row + 4u * ROW_SIDE, col, sums.s10);
        if (COL_FOURS > 1u) {
            store_group(row + 4u * ROW_SIDE, col + 4u * COL_SIDE, sums.s11);
        }
    }
}
