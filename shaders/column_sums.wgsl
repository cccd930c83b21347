// The sum over rows of each column of data [n_rows, n_cols], written or added at out, and at second_out where there is one.
//
// A workgroup owns 64 columns; its 256 invocations split the rows in four (row mod 4), and the four sums are added in order.
// Grid: a workgroup for each 64 columns, folded into x and y. Loop trips: n_rows / 4.

struct Params {
    n_rows: u32,
    n_cols: u32,
    row_stride: u32,
    offset: u32,
    out: u32,
    second_out: u32,
    accumulate: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> data: array<f32>;        // [n_rows, row_stride] from offset on
@group(0) @binding(2) var<storage, read_write> sums: array<f32>;  // [n_cols] from out and from second_out on

const WORKGROUP: u32 = 256u;
const COLUMNS: u32 = 64u;
const PARTS: u32 = WORKGROUP / COLUMNS;
const NONE: u32 = 0xffffffffu;

var<workgroup> sh_sum: array<f32, WORKGROUP>;

@compute @workgroup_size(WORKGROUP)
fn column_sums(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) n_wg: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let column = (wg.y * n_wg.x + wg.x) * COLUMNS + lane % COLUMNS;
    let part = lane / COLUMNS;
    var sum = 0.0;
    if (column < params.n_cols) {
        for (var row = part; row < params.n_rows; row += PARTS) {
            sum += data[params.offset + row * params.row_stride + column];
        }
    }
    sh_sum[lane] = sum;
    workgroupBarrier();
    if (part == 0u && column < params.n_cols) {
        for (var p = 1u; p < PARTS; p++) {
            sum += sh_sum[p * COLUMNS + lane];
        }
        write_sum(params.out, column, sum);
        if (params.second_out != NONE) {
            write_sum(params.second_out, column, sum);
        }
    }
}

fn write_sum(at: u32, column: u32, sum: f32) {
    if (params.accumulate == 1u) {
        sums[at + column] += sum;
    } else {
        sums[at + column] = sum;
    }
}
