//! Matrix product C = op(A) op(B) (+ bias), or added to C; op is nothing or the transpose.
//!
//! Matrices lie row-major or in panels (see [`Matrix`]), anywhere within their binding. On the CPU blocks of B, and of
//! a transposed A, are packed for the register tiles of [`microkernel`]. 2 M N K floating-point operations.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::microkernel::{self, Ends, Factors, Left, MatrixMut, Stored};
use super::{
    AdapterClass, Binding, Case, CaseOperand, Dispatch, Entry, Fill, Fragment, Kernel, MAX_WORKGROUPS, ODD, Operand, Shader, ShapeError,
    SizeClass, Sizes, Tolerance, Trial, at_least, kernel_basics, operand, read, read_write,
};
use crate::pool::{CpuContext, Divide, Rows};
use crate::shape::{PANEL, round_up};

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

/// A variant of larger register tiles: what it is made of, and the rows and columns of C that one workgroup computes.
#[derive(Debug)]
pub struct Tile {
    pub shader: &'static Shader,
    pub block: [u32; 2],
}

/// A [`Tile`] of `shaders/gemm_blocked.wgsl`, from the largest to the smallest.
macro_rules! tiles {
    ($($fragment:ident, $shader:ident, $name:literal, [$rows:literal, $cols:literal];)*) => {
        $(
            static $fragment: Fragment =
                Fragment { name: $name, source: include_str!(concat!("../../shaders/shared/", $name, ".wgsl")) };
            static $shader: Shader = Shader {
                name: "gemm_blocked",
                source: include_str!("../../shaders/gemm_blocked.wgsl"),
                fragments: &[&MATRIX, &$fragment],
            };
        )*
        /// Register tiles over workgroup memory with vectors of four from memory, for real GPUs and operands that lie at multiples of four.
        pub static TILES: [Tile; 4] = [$(Tile { shader: &$shader, block: [$rows, $cols] }),*];
    };
}

tiles! {
    TILE_128X128, BLOCKED_128X128, "tile_128x128", [128, 128];
    TILE_128X64, BLOCKED_128X64, "tile_128x64", [128, 64];
    TILE_64X128, BLOCKED_64X128, "tile_64x128", [64, 128];
    TILE_32X64, BLOCKED_32X64, "tile_32x64", [32, 64];
}

/// Workgroups that keep a large GPU busy: a larger tile that gives fewer leaves parts of it idle.
const ENOUGH_WORKGROUPS: u32 = 128;

/// The largest K: the shaders loop over it, and over what they write.
pub const MAX_K: u32 = 65_367;

/// Rows and columns of C that one workgroup of [`GEMM_TILED`] computes.
pub const TILED_BLOCK: [u32; 2] = [64, 64];
/// Rows and columns of C that one workgroup of [`GEMM_DIRECT`] computes.
pub const DIRECT_BLOCK: [u32; 2] = [8, 128];

pub(super) const BINDINGS: &[Binding] = &[read("a"), read("b"), read("bias"), read_write("c")];

impl Gemm {
    fn stored_a(&self) -> (u32, u32) {
        if self.trans_a == 1 { (self.k, self.m) } else { (self.m, self.k) }
    }

    fn stored_b(&self) -> (u32, u32) {
        if self.trans_b == 1 { (self.n, self.k) } else { (self.k, self.n) }
    }

    /// Floating-point operations.
    pub fn flop(&self) -> u64 {
        2 * u64::from(self.m) * u64::from(self.n) * u64::from(self.k)
    }

    /// Whether rows of all operands consist of whole vectors of four.
    fn is_aligned(&self) -> bool {
        let lies = |m: Matrix| [m.offset, m.row_stride, m.panel_stride].iter().all(|n| n.is_multiple_of(4));
        lies(self.a) && lies(self.b) && lies(self.c)
    }

    /// A launch of workgroups that compute so many rows and columns of C each.
    pub(super) fn in_blocks(&self, shader: &'static Shader, [rows, cols]: [u32; 2]) -> Dispatch {
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
        match class {
            AdapterClass::Software => self.in_blocks(&GEMM_DIRECT, DIRECT_BLOCK),
            AdapterClass::Hardware if self.is_aligned() => {
                let n_blocks = |tile: &&Tile| self.m.div_ceil(tile.block[0]).saturating_mul(self.n.div_ceil(tile.block[1]));
                let [larger @ .., smallest] = &TILES;
                let tile = larger.iter().find(|tile| n_blocks(tile) >= ENOUGH_WORKGROUPS).unwrap_or(smallest);
                self.in_blocks(tile.shader, tile.block)
            }
            AdapterClass::Hardware => self.in_blocks(&GEMM_TILED, TILED_BLOCK),
        }
    }

    fn candidates(&self, class: AdapterClass) -> Vec<Dispatch> {
        if class == AdapterClass::Software {
            return vec![self.dispatch(class)];
        }
        let tiles = TILES.iter().filter(|_| self.is_aligned()).map(|tile| self.in_blocks(tile.shader, tile.block));
        tiles.chain([self.in_blocks(&GEMM_TILED, TILED_BLOCK)]).collect()
    }

    fn size_class(&self) -> Option<SizeClass> {
        const FORMS: [[&str; 4]; 2] = [["NN unaligned", "NT unaligned", "TN unaligned", "TT unaligned"], ["NN", "NT", "TN", "TT"]];
        let form = FORMS[usize::from(self.is_aligned())][(2 * self.trans_a + self.trans_b) as usize % 4];
        Some(SizeClass { kernel: "gemm", size: [self.m, self.n, self.k].map(SizeClass::rounded), form })
    }

    fn trial(&self) -> Option<Trial> {
        let at_start = |matrix: Matrix| Matrix { offset: 0, ..matrix };
        let (a, b, c) = (at_start(self.a), at_start(self.b), at_start(self.c));
        let kernel = Self { accumulate: 0, use_bias: 0, bias_offset: 0, a, b, c, ..*self };
        let ((ar, ac), (br, bc)) = (self.stored_a(), self.stored_b());
        let lens = vec![a.end(ar, ac), b.end(br, bc), 1, c.end(self.m, self.n)];
        Some(Trial { kernel: Box::new(kernel), lens, flop: self.flop() })
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [a, b, bias, c] = operands else { unreachable!("gemm has four operands") };
        let (a, b) = (a.as_slice(), b.as_slice());
        let bias = (self.use_bias == 1).then(|| &bias.as_slice()[self.bias_offset as usize..][..self.n as usize]);
        product(ctx, self, a, b, bias, c.as_mut_slice());
    }
}

/// Terms of a sum that a tile adds up before it goes on to other columns, columns of B that are packed at a time, and rows of a transposed A:
/// a packed tile of B (16 KiB) stays in the first cache, rows of A (192 KiB) in the second, all packed columns (1 MiB) in the third.
pub(crate) const BLOCK_K: usize = 256;
pub(crate) const BLOCK_N: usize = 1024;
pub(crate) const BLOCK_M: usize = 192;
/// Rows of A up to which B is read where it lies: packing costs about as much as two tiles of rows.
const UNPACKED_ROWS: usize = 2 * microkernel::TILE_ROWS;

/// What one thread computes: rows or columns of C, and memory to pack in.
struct Part<'a> {
    c: MatrixMut<'a>,
    /// Columns in a unit of division; 0 where a unit is a row.
    unit_cols: usize,
    scratch: &'a mut [f32],
    /// Floats of scratch for each unit.
    unit_scratch: usize,
}

impl Divide for Part<'_> {
    fn divide(self, at: usize) -> (Self, Self) {
        let (c, rest) = match self.unit_cols {
            0 => self.c.split_rows(at),
            width => {
                let at = (at * width).min(self.c.cols());
                self.c.split_cols(at)
            }
        };
        let (scratch, more) = self.scratch.split_at_mut(at * self.unit_scratch);
        (Self { c, scratch, ..self }, Self { c: rest, scratch: more, ..self })
    }
}

/// Cuts a range into the fewest pieces of at most `most`, nearly equal and, but for the last, multiples of `of`; one empty piece where there is nothing.
pub(crate) fn pieces(range: Range<usize>, most: usize, of: usize) -> impl Iterator<Item = Range<usize>> {
    let n = range.len().div_ceil(most).max(1);
    let each = round_up(range.len().div_ceil(n).max(1), of);
    (0..n).map(move |i| (range.start + i * each).min(range.end)..(range.start + (i + 1) * each).min(range.end))
}

/// The product on the CPU, columns or rows of C split over the threads. The split changes no bit: each sum runs over k in order.
pub(crate) fn product(ctx: &mut CpuContext, g: &Gemm, a: &[f32], b: &[f32], bias: Option<&[f32]>, c: &mut [f32]) {
    let (m, n, k, isa) = (g.m as usize, g.n as usize, g.k as usize, ctx.isa);
    if m == 0 || n == 0 {
        return;
    }
    let c = &mut c[g.c.offset as usize..];
    if m == 1 && k > 0 && g.trans_a == 0 && g.trans_b == 1 && !g.b.is_panels() && !g.c.is_panels() {
        return one_row(ctx, g, &a[g.a.offset as usize..][..k], &b[g.b.offset as usize..], bias, &mut c[..n]);
    }
    let c = if g.c.is_panels() {
        MatrixMut::panels(c, m, n, g.c.panel as usize, g.c.panel_stride as usize)
    } else {
        MatrixMut::row_major(c, m, n, g.c.row_stride as usize)
    };
    let a = if k == 0 { &[] } else { &a[g.a.offset as usize..] };
    let a_stride = g.a.row_stride as usize;
    let b = Stored {
        data: if k == 0 { &[] } else { &b[g.b.offset as usize..] },
        row_stride: g.b.row_stride as usize,
        panel: if g.b.is_panels() { g.b.panel as usize } else { usize::MAX },
        panel_stride: g.b.panel_stride as usize,
        transposed: g.trans_b == 1,
    };
    let width = microkernel::tile_cols(isa);
    let n_threads = ctx.pool.n_threads();
    let (row_blocks, col_blocks) = (m.div_ceil(microkernel::TILE_ROWS), n.div_ceil(width));
    // Parts of at least eight tiles differ by little; columns leave no column to be packed twice, unless the rows are by far more.
    let by_cols = if col_blocks >= 8 * n_threads && 2 * n >= m {
        true
    } else if row_blocks >= 8 * n_threads {
        false
    } else {
        col_blocks > row_blocks
    };
    let (n_units, unit_cols, unit_work) = if by_cols { (col_blocks, width, m * width * k) } else { (m, 0, n * k) };
    let packed_cols = (col_blocks * width).min(BLOCK_N);
    let left_len = if g.trans_a == 1 { BLOCK_K.min(k) * BLOCK_M.min(m) } else { 0 };
    let needed = BLOCK_K.min(k) * packed_cols + left_len;
    let unit_scratch = needed.div_ceil((n_units / n_threads).max(1));
    // Below about a million operations a second thread costs more than it saves.
    let min_units = (1usize << 19).div_ceil(unit_work.max(1)).max(if by_cols { 1 } else { 4 });
    let work = Part { c, unit_cols, scratch: ctx.scratch.take(unit_scratch * n_units), unit_scratch };
    ctx.pool.run(work, n_units, min_units, &|mut part: Part<'_>, units: Range<usize>| {
        let (rows, cols) = if by_cols { (0..m, units.start * width..(units.end * width).min(n)) } else { (units, 0..n) };
        let (packed_left, packed) = part.scratch.split_at_mut(left_len);
        for cols_now in pieces(cols.clone(), BLOCK_N, PANEL) {
            for ks in pieces(0..k, BLOCK_K, 1) {
                let is_aligned = b.panel == usize::MAX || cols_now.start % b.panel == 0;
                let raw = (rows.len() <= UNPACKED_ROWS && k > 0 && is_aligned)
                    .then(|| Factors::unpacked(isa, ks.len(), Left::Rows(&[], 0), b.part(ks.start, cols_now.start), cols_now.len()))
                    .flatten();
                if raw.is_none() {
                    microkernel::pack(isa, b, ks.clone(), cols_now.clone(), packed);
                }
                for rows_now in pieces(rows.clone(), BLOCK_M, 1) {
                    let left = if g.trans_a == 1 {
                        microkernel::left_of_columns(a, a_stride, ks.clone(), rows_now.clone(), packed_left)
                    } else {
                        Left::Rows(&a[(rows_now.start * a_stride + ks.start).min(a.len())..], a_stride)
                    };
                    let factors = match raw {
                        Some(raw) => Factors { a: left, ..raw },
                        None => Factors::packed(isa, ks.len(), left, packed),
                    };
                    let ends = Ends {
                        add: g.accumulate == 1 || ks.start > 0,
                        bias: bias.filter(|_| ks.end == k).map(|bias| &bias[cols_now.clone()]),
                    };
                    let to = |range: &Range<usize>, first: usize| range.start - first..range.end - first;
                    let mut c = part.c.part(to(&rows_now, rows.start), to(&cols_now, cols.start));
                    microkernel::multiply(isa, &mut c, [Some(factors), None], ends);
                }
            }
        }
    });
}

/// One row by a transposed matrix, as the head reads one step: packing would cost more than the product.
fn one_row(ctx: &CpuContext, g: &Gemm, a: &[f32], b: &[f32], bias: Option<&[f32]>, c: &mut [f32]) {
    let (isa, stride) = (ctx.isa, g.b.row_stride as usize);
    let min_cols = (1usize << 19).div_ceil(a.len());
    let n = c.len();
    ctx.pool.run(Rows { data: c, width: 1 }, n, min_cols, &|c: Rows<'_>, cols: Range<usize>| {
        let ends = Ends { add: g.accumulate == 1, bias: bias.map(|bias| &bias[cols.clone()]) };
        microkernel::dots(isa, a, &b[cols.start * stride..], stride, c.data, ends);
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
    sized,
    shaders: &[&GEMM_TILED, &GEMM_DIRECT, &BLOCKED_128X128, &BLOCKED_128X64, &BLOCKED_64X128, &BLOCKED_32X64],
};

fn case(m: u32, n: u32, k: u32, trans: (u32, u32), accumulate: u32, use_bias: u32, panels: (bool, bool, bool)) -> Case {
    let (label, kernel, operands) = problem(m, n, k, trans, (accumulate, use_bias), panels);
    Case { label, operands, flop: kernel.flop(), kernel: Box::new(kernel) }
}

/// A product with its operands.
pub(super) fn problem(
    m: u32,
    n: u32,
    k: u32,
    trans: (u32, u32),
    (accumulate, use_bias): (u32, u32),
    panels: (bool, bool, bool),
) -> (String, Gemm, Vec<CaseOperand>) {
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
    let label = format!(
        "{m}x{n}x{k} {}{} {} panels {panels:?}",
        ["N", "T"][trans.0 as usize],
        ["N", "T"][trans.1 as usize],
        ["set", "add"][accumulate as usize]
    );
    let operands = vec![
        operand(a.end(ar, ac), random.clone()),
        operand(b.end(br, bc), random.clone()),
        operand(4 + n as usize, random),
        operand(c.end(m, n), c_fill),
    ];
    (label, kernel, operands)
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
    // One row, as a network is asked step by step: by panels of weights, by a head that is stored in rows.
    for (n, k) in [(64, 17), (128, 300)] {
        cases.push(case(1, n, k, (0, 0), 1, 1, (false, true, false)));
        cases.push(case(1, n + 1, k, (0, 1), 1, 1, (false, false, false)));
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

/// The products of a layer over all steps: of the input, of its gradient, of the weights' gradient.
fn sized(s: Sizes) -> Vec<Case> {
    let (places, gates, inputs) = (s.places(), 4 * s.padded_hidden(), s.padded_inputs());
    vec![
        case(places, gates, inputs, (0, 0), 0, 0, (false, true, false)),
        case(places, inputs, gates, (0, 1), 0, 0, (false, true, false)),
        case(inputs, gates, places.min(MAX_K), (1, 0), 1, 0, (false, false, true)),
    ]
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
