//! Matrix product C = op(A) op(B) (+ bias), or added to C; op is nothing or the transpose.
//!
//! Matrices lie row-major or in panels (see [`Matrix`]), anywhere within their binding. On the CPU the arithmetic is `matrixmultiply`'s,
//! by way of ndarray. 2 M N K floating-point operations.

use bytemuck::{Pod, Zeroable};
use ndarray::{ArrayView2, ArrayViewMut2, ShapeBuilder, linalg::general_mat_mul};

use super::{
    AdapterClass, Binding, Case, Dispatch, Entry, Fill, Fragment, Kernel, MAX_WORKGROUPS, ODD, Operand, Shader, ShapeError, Tolerance,
    at_least, kernel_basics, operand, read, read_write,
};
use crate::pool::{CpuContext, Divide};
use crate::shape::PANEL;

/// Columns a row-major matrix reports as its panel width.
const ONE_PANEL: u32 = u32::MAX;

/// Where a stored matrix lies: element (row, col) at `offset + col / panel * panel_stride + row * row_stride + col % panel`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Matrix {
    pub offset: u32,
    pub row_stride: u32,
    pub panel: u32,
    pub panel_stride: u32,
}

impl Matrix {
    /// Row-major with `row_stride` floats from row to row.
    pub const fn row_major(offset: usize, row_stride: usize) -> Self {
        Self { offset: offset as u32, row_stride: row_stride as u32, panel: ONE_PANEL, panel_stride: 0 }
    }

    /// Panels of 64 columns with `rows` rows each, one behind another.
    pub const fn panels(offset: usize, rows: usize) -> Self {
        Self { offset: offset as u32, row_stride: PANEL as u32, panel: PANEL as u32, panel_stride: (rows * PANEL) as u32 }
    }

    fn is_panels(self) -> bool {
        self.panel != ONE_PANEL
    }

    /// One past the last float of a stored matrix of this size.
    fn end(self, rows: u32, cols: u32) -> usize {
        if rows == 0 || cols == 0 {
            return 0;
        }
        let last = cols as usize - 1;
        let (panel, within) = if self.is_panels() { (last / self.panel as usize, (self.panel as usize - 1).min(last)) } else { (0, last) };
        self.offset as usize + panel * self.panel_stride as usize + (rows as usize - 1) * self.row_stride as usize + within + 1
    }
}

/// C `[m, n]` = op(A) `[m, k]` op(B) `[k, n]`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Gemm {
    pub m: u32,
    pub n: u32,
    pub k: u32,
    /// 1: A is stored `[k, m]`.
    pub trans_a: u32,
    /// 1: B is stored `[n, k]`.
    pub trans_b: u32,
    /// 1: the product is added to C.
    pub accumulate: u32,
    /// 1: `bias[bias_offset + j]` is added to column j.
    pub use_bias: u32,
    pub bias_offset: u32,
    pub a: Matrix,
    pub b: Matrix,
    pub c: Matrix,
}

/// The fragment of row-major and panel addresses.
pub static MATRIX: Fragment = Fragment { name: "matrix", source: include_str!("../../shaders/shared/matrix.wgsl") };

/// Register tiles over workgroup memory, for real GPUs.
pub static GEMM_TILED: Shader = Shader { name: "gemm_tiled", source: include_str!("../../shaders/gemm_tiled.wgsl"), fragments: &[&MATRIX] };
/// Register tiles straight from memory, for software adapters, where a barrier costs more than a load.
pub static GEMM_DIRECT: Shader =
    Shader { name: "gemm_direct", source: include_str!("../../shaders/gemm_direct.wgsl"), fragments: &[&MATRIX] };

/// The largest K: the shaders loop over it, and over what they write.
pub const MAX_K: u32 = 65_367;

/// Rows and columns of C that one workgroup of [`GEMM_TILED`] computes.
pub const TILED_BLOCK: [u32; 2] = [64, 64];
/// Rows and columns of C that one workgroup of [`GEMM_DIRECT`] computes.
pub const DIRECT_BLOCK: [u32; 2] = [8, 128];

const BINDINGS: &[Binding] = &[read("a"), read("b"), read("bias"), read_write("c")];

impl Gemm {
    fn stored_a(&self) -> (u32, u32) {
        if self.trans_a == 1 { (self.k, self.m) } else { (self.m, self.k) }
    }

    fn stored_b(&self) -> (u32, u32) {
        if self.trans_b == 1 { (self.n, self.k) } else { (self.k, self.n) }
    }
}

impl Kernel for Gemm {
    kernel_basics!("gemm", BINDINGS);

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        if self.a.is_panels() {
            return Err(ShapeError {
                kernel: "gemm",
                what: "panel width of a, which must be row-major,".into(),
                got: self.a.panel as usize,
                needed: ONE_PANEL as usize,
            });
        }
        for matrix in [self.b, self.c] {
            if matrix.is_panels() && matrix.panel as usize != PANEL {
                return Err(ShapeError { kernel: "gemm", what: "panel width".into(), got: matrix.panel as usize, needed: PANEL });
            }
        }
        let ((ar, ac), (br, bc)) = (self.stored_a(), self.stored_b());
        at_least("gemm", "a", lens[0], self.a.end(ar, ac))?;
        at_least("gemm", "b", lens[1], self.b.end(br, bc))?;
        if self.use_bias == 1 {
            at_least("gemm", "bias", lens[2], (self.bias_offset + self.n) as usize)?;
        }
        at_least("gemm", "c", lens[3], self.c.end(self.m, self.n))?;
        if self.k > MAX_K {
            return Err(ShapeError { kernel: "gemm", what: "k (at most)".into(), got: self.k as usize, needed: MAX_K as usize });
        }
        Ok(())
    }

    fn dispatch(&self, class: AdapterClass) -> Dispatch {
        let (shader, [rows, cols]) = match class {
            AdapterClass::Hardware => (&GEMM_TILED, TILED_BLOCK),
            AdapterClass::Software => (&GEMM_DIRECT, DIRECT_BLOCK),
        };
        let overrides: &'static [(&'static str, f64)] = match (self.trans_a, self.trans_b) {
            (0, 0) => &[("TRANS_A", 0.0), ("TRANS_B", 0.0)],
            (0, _) => &[("TRANS_A", 0.0), ("TRANS_B", 1.0)],
            (_, 0) => &[("TRANS_A", 1.0), ("TRANS_B", 0.0)],
            _ => &[("TRANS_A", 1.0), ("TRANS_B", 1.0)],
        };
        // x walks columns; rows are folded over y and z, since a long text has more than 65,535 blocks of rows.
        let row_blocks = self.m.div_ceil(rows).max(1);
        let z = row_blocks.div_ceil(MAX_WORKGROUPS);
        Dispatch { shader, overrides, grid: [self.n.div_ceil(cols).max(1), row_blocks.div_ceil(z), z] }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [a, b, bias, c] = operands else { unreachable!("gemm has four operands") };
        let (a, b) = (a.as_slice(), b.as_slice());
        let bias = (self.use_bias == 1).then(|| &bias.as_slice()[self.bias_offset as usize..][..self.n as usize]);
        product(ctx, self, a, b, bias, c.as_mut_slice());
    }
}

/// The rows of C that one thread computes, as a stored matrix from its first row on.
struct RowsOfC<'a> {
    panels: PanelRows<'a>,
}

/// Row-major C is one panel of all its columns.
enum PanelRows<'a> {
    One(ArrayViewMut2<'a, f32>),
    Many(ndarray::ArrayViewMut3<'a, f32>),
}

impl Divide for RowsOfC<'_> {
    fn divide(self, at: usize) -> (Self, Self) {
        match self.panels {
            PanelRows::One(c) => {
                let (x, y) = c.split_at(ndarray::Axis(0), at);
                (Self { panels: PanelRows::One(x) }, Self { panels: PanelRows::One(y) })
            }
            PanelRows::Many(c) => {
                let (x, y) = c.split_at(ndarray::Axis(1), at);
                (Self { panels: PanelRows::Many(x) }, Self { panels: PanelRows::Many(y) })
            }
        }
    }
}

/// Stored columns `cols` (within one panel) of a stored matrix.
fn view<'a>(data: &'a [f32], m: Matrix, rows: u32, cols: std::ops::Range<usize>) -> ArrayView2<'a, f32> {
    let (panel, first) = if m.is_panels() { (cols.start / m.panel as usize, cols.start % m.panel as usize) } else { (0, cols.start) };
    let start = m.offset as usize + panel * m.panel_stride as usize + first;
    let (rows, n) = (rows as usize, cols.len());
    if rows == 0 || n == 0 {
        return ArrayView2::from_shape((rows, n), &[]).expect("nothing has any shape");
    }
    let data = &data[start..start + (rows - 1) * m.row_stride as usize + n];
    ArrayView2::from_shape((rows, n).strides((m.row_stride as usize, 1)), data).expect("the check has compared lengths")
}

/// The product on the CPU, rows of C split over the threads.
pub(crate) fn product(ctx: &CpuContext, g: &Gemm, a: &[f32], b: &[f32], bias: Option<&[f32]>, c: &mut [f32]) {
    let (m, n, k) = (g.m as usize, g.n as usize, g.k as usize);
    if m == 0 || n == 0 {
        return;
    }
    let start = g.c.offset as usize;
    let c = if g.c.is_panels() {
        let n_panels = n.div_ceil(PANEL);
        let len = (n_panels - 1) * g.c.panel_stride as usize + m * PANEL;
        let shape = (n_panels, m, PANEL).strides((g.c.panel_stride as usize, PANEL, 1));
        PanelRows::Many(ndarray::ArrayViewMut3::from_shape(shape, &mut c[start..start + len]).expect("the check has compared lengths"))
    } else {
        let len = (m - 1) * g.c.row_stride as usize + n;
        let shape = (m, n).strides((g.c.row_stride as usize, 1));
        PanelRows::One(ArrayViewMut2::from_shape(shape, &mut c[start..start + len]).expect("the check has compared lengths"))
    };
    // Below about a million operations a second thread costs more than it saves.
    let min_rows = (1usize << 19).div_ceil(n * k.max(1)).max(4);
    let beta = if g.accumulate == 1 { 1.0 } else { 0.0 };
    ctx.pool.run(RowsOfC { panels: c }, m, min_rows, &|part: RowsOfC<'_>, rows| {
        let a_part = |cols: std::ops::Range<usize>| -> ArrayView2<'_, f32> {
            // op(A), rows of this part, columns `cols` of k.
            if g.trans_a == 1 {
                view(a, g.a, g.k, rows.clone()).slice_move(ndarray::s![cols, ..]).reversed_axes()
            } else {
                view(a, g.a, g.m, cols).slice_move(ndarray::s![rows.clone(), ..])
            }
        };
        let into = |mut c: ArrayViewMut2<'_, f32>, cols: std::ops::Range<usize>| {
            let mut beta = beta;
            if g.trans_b == 1 && g.b.is_panels() {
                // B^T in panels along k: one product a panel, added up.
                for k0 in (0..k).step_by(PANEL) {
                    let ks = k0..(k0 + PANEL).min(k);
                    let b = view(b, g.b, g.n, ks.clone()).slice_move(ndarray::s![cols.clone(), ..]).reversed_axes();
                    general_mat_mul(1.0, &a_part(ks), &b, beta, &mut c);
                    beta = 1.0;
                }
            } else if g.trans_b == 1 {
                let b = view(b, g.b, g.n, 0..k).slice_move(ndarray::s![cols.clone(), ..]).reversed_axes();
                general_mat_mul(1.0, &a_part(0..k), &b, beta, &mut c);
            } else {
                general_mat_mul(1.0, &a_part(0..k), &view(b, g.b, g.k, cols.clone()), beta, &mut c);
            }
            if let Some(bias) = bias {
                c.rows_mut().into_iter().for_each(|mut row| row.iter_mut().zip(&bias[cols.clone()]).for_each(|(c, b)| *c += b));
            }
        };
        // Columns go in pieces that lie within one panel of B and of C.
        let piecewise = g.b.is_panels() && g.trans_b == 0;
        match part.panels {
            PanelRows::One(mut c) if piecewise => {
                for (i, piece) in c.axis_chunks_iter_mut(ndarray::Axis(1), PANEL).enumerate() {
                    let cols = i * PANEL..i * PANEL + piece.ncols();
                    into(piece, cols);
                }
            }
            PanelRows::One(c) => into(c, 0..n),
            PanelRows::Many(mut c) => {
                for (i, piece) in c.outer_iter_mut().enumerate() {
                    let cols = i * PANEL..((i + 1) * PANEL).min(n);
                    let width = cols.len();
                    into(piece.slice_move(ndarray::s![.., ..width]), cols);
                }
            }
        }
    });
}

/// The catalogue's line.
pub const ENTRY: Entry = Entry {
    name: "gemm",
    tolerance: Tolerance {
        absolute: 2e-5,
        relative: 1e-5,
        reason: "sums of up to 300 products of numbers below 1, in any order, with or without fusing",
    },
    cases,
    bench_cases,
    shaders: &[&GEMM_TILED, &GEMM_DIRECT],
};

fn case(m: u32, n: u32, k: u32, trans: (u32, u32), accumulate: u32, use_bias: u32, panels: (bool, bool, bool)) -> Case {
    let ((ar, ac), (br, bc)) = (if trans.0 == 1 { (k, m) } else { (m, k) }, if trans.1 == 1 { (n, k) } else { (k, n) });
    // Leading dimensions and offsets that differ from the sizes, so that mistaking one for the other shows.
    let place = |panels: bool, offset: usize, rows: u32, cols: u32| {
        if panels {
            Matrix::panels(offset, rows as usize + 1)
        } else {
            Matrix::row_major(offset, crate::shape::pad_inner(cols as usize) + 4)
        }
    };
    let (a, b, c) = (place(panels.0, 4, ar, ac), place(panels.1, 8, br, bc), place(panels.2, 12, m, n));
    let kernel = Gemm { m, n, k, trans_a: trans.0, trans_b: trans.1, accumulate, use_bias, bias_offset: 4, a, b, c };
    let random = Fill::Uniform { low: -1.0, high: 1.0 };
    let c_fill = if accumulate == 1 { random.clone() } else { Fill::Poison };
    Case {
        label: format!(
            "{m}x{n}x{k} {}{} {} panels {panels:?}",
            ["N", "T"][trans.0 as usize],
            ["N", "T"][trans.1 as usize],
            ["set", "add"][accumulate as usize]
        ),
        operands: vec![
            operand(a.end(ar, ac), random.clone()),
            operand(b.end(br, bc), random.clone()),
            operand(4 + n as usize, random),
            operand(c.end(m, n), c_fill),
        ],
        flop: 2 * u64::from(m) * u64::from(n) * u64::from(k),
        kernel: Box::new(kernel),
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (i, &m) in ODD.iter().enumerate() {
        for (j, &n) in ODD.iter().enumerate() {
            let k = ODD[(i + 2 * j + 1) % ODD.len()];
            for trans in [(0, 0), (0, 1), (1, 0)] {
                let flags = (i + j) as u32 % 2;
                cases.push(case(m, n, k, trans, flags, 1 - flags, (false, false, false)));
            }
        }
    }
    // As the sweep uses them: panels of gates.
    for (m, n, k) in [(17, 128, 33), (65, 192, 16), (3, 64, 1)] {
        cases.push(case(m, n, k, (0, 0), 0, 0, (false, true, false)));
        cases.push(case(m, n, k, (1, 0), 1, 0, (false, false, true)));
        cases.push(case(m, k, n, (0, 1), 0, 0, (false, true, false)));
    }
    cases.push(case(33, 17, 65, (1, 1), 0, 1, (false, false, false)));
    cases.push(case(1, 7, 300, (0, 0), 0, 1, (false, false, false)));
    // More blocks of rows than one dimension of a dispatch holds.
    cases.push(case(65_536 * DIRECT_BLOCK[0] + 5, 3, 1, (0, 0), 0, 0, (false, false, false)));
    cases
}

fn bench_cases() -> Vec<Case> {
    vec![
        case(512, 512, 512, (0, 0), 0, 0, (false, false, false)),
        case(5000, 1024, 256, (0, 0), 0, 0, (false, true, false)),
        case(5000, 256, 1024, (0, 1), 0, 0, (false, true, false)),
        case(256, 1024, 5000, (1, 0), 1, 0, (false, false, true)),
        case(64, 4096, 1024, (0, 0), 1, 0, (false, true, false)),
    ]
}
