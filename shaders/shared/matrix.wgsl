// Where a stored matrix lies within its binding: row-major, or in panels of 64 columns.
struct Matrix {
    offset: u32,
    row_stride: u32,
    panel: u32,
    panel_stride: u32,
}

const PANEL: u32 = 64u;

// The float at row 0 of a stored column; element (row, col) lies `row * row_stride` behind it.
// Columns run on where the matrix is row-major, whose `panel` is wider than any matrix; no division, since software drivers do those one by one.
fn column_start(m: Matrix, col: u32) -> u32 {
    return m.offset + select(col, col / PANEL * m.panel_stride + col % PANEL, m.panel == PANEL);
}
