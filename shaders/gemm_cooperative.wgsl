// C = op(A) op(B) + bias, or added to C, with operands rounded to half floats and sums in f32: matrices of 16 x 16 that a subgroup multiplies together, on the
// units that a GPU has for that.
//
// A workgroup is one subgroup and computes 32 x 32 elements of C. Slices of 16 along K go through workgroup memory as half floats; so do the sums on their way
// out, since edges, bias and what is added to stand element by element. Loop trips: 18 K / 16 + 34 with 32 invocations.

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

const BLOCK: u32 = 32u;
const SLICE: u32 = 16u;
// Invocations: those of a subgroup.
const SUBGROUP: u32 = 32u;

// Slices [row][k] of op(A) and [k][col] of op(B), and the block of C.
var<workgroup> sh_a: array<f16, 512>;
var<workgroup> sh_b: array<f16, 512>;
var<workgroup> sh_c: array<f32, 1024>;

// An element of op(A) or op(B), zero beyond the edges.
fn load_a(row: u32, k: u32) -> f16 {
    if (row >= p.m || k >= p.k) {
        return f16();
    }
    return f16(a[p.a.offset + select(row * p.a.row_stride + k, k * p.a.row_stride + row, TRANS_A)]);
}

fn load_b(k: u32, col: u32) -> f16 {
    if (k >= p.k || col >= p.n) {
        return f16();
    }
    if (TRANS_B) {
        return f16(b[column_start(p.b, k) + col * p.b.row_stride]);
    }
    return f16(b[column_start(p.b, col) + k * p.b.row_stride]);
}

@compute @workgroup_size(SUBGROUP)
fn gemm_cooperative(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let block_row = (wg.z * n_wg.y + wg.y) * BLOCK;
    let block_col = wg.x * BLOCK;
    // A block beyond the edges sums zeros and stores nothing: matrices ask for control flow that cannot diverge.
    var sum00 = coop_mat16x16<f32, C>();
    var sum01 = coop_mat16x16<f32, C>();
    var sum10 = coop_mat16x16<f32, C>();
    var sum11 = coop_mat16x16<f32, C>();
    for (var k = 0u; k < p.k; k += SLICE) {
        // Nobody overwrites a slice that others still read, nobody reads before all have written.
        workgroupBarrier();
        for (var i = lane; i < BLOCK * SLICE; i += SUBGROUP) {
            sh_a[i] = load_a(block_row + i / SLICE, k + i % SLICE);
            sh_b[i] = load_b(k + i / BLOCK, block_col + i % BLOCK);
        }
        workgroupBarrier();
        let x0 = coopLoadT<coop_mat16x16<f16, A>>(&sh_a[0], 16u);
        let x1 = coopLoadT<coop_mat16x16<f16, A>>(&sh_a[256], 16u);
        let y0 = coopLoadT<coop_mat16x16<f16, B>>(&sh_b[0], 32u);
        let y1 = coopLoadT<coop_mat16x16<f16, B>>(&sh_b[16], 32u);
        sum00 = coopMultiplyAdd(x0, y0, sum00);
        sum01 = coopMultiplyAdd(x0, y1, sum01);
        sum10 = coopMultiplyAdd(x1, y0, sum10);
        sum11 = coopMultiplyAdd(x1, y1, sum11);
    }
    // What is stored is a value of its own, not a variable.
    let r00 = sum00;
    let r01 = sum01;
    let r10 = sum10;
    let r11 = sum11;
    coopStoreT(r00, &sh_c[0], 32u);
    coopStoreT(r01, &sh_c[16], 32u);
    coopStoreT(r10, &sh_c[512], 32u);
    coopStoreT(r11, &sh_c[528], 32u);
    workgroupBarrier();
    for (var i = lane; i < BLOCK * BLOCK; i += SUBGROUP) {
        let row = block_row + i / BLOCK;
        let col = block_col + i % BLOCK;
        if (row < p.m && col < p.n) {
            let at = column_start(p.c, col) + row * p.c.row_stride;
            var value = sh_c[i];
            if (p.use_bias == 1u) {
                value += bias[p.bias_offset + col];
            }
            if (p.accumulate == 1u) {
                value += c[at];
            }
            c[at] = value;
        }
    }
}
