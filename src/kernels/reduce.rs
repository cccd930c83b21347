//! Reductions in a fixed order: column sums, a sum, squares by block, the count of non-finite values.
//!
//! On the GPU a workgroup adds in strides of its size and then in a tree; the order depends on the shader alone, so the same adapter gives the
//! same bits. CPU and GPU agree to rounding.

use bytemuck::{Pod, Zeroable};

use super::lstm::{ACTIVATIONS, NONE};
use super::{
    AdapterClass, Case, Dispatch, Entry, Fill, Kernel, MAX_LOOP_TRIPS, MAX_WORKGROUPS, ODD, Operand, Shader, ShapeError, Tolerance,
    at_least, cpu_only, grid_1d, kernel_basics, loop_trips, multiple_of, operand, read, read_write,
};
use crate::for_isa;
use crate::pool::{CpuContext, Rows};
use crate::shape::BLOCK;

/// The shader of [`ColumnSums`].
pub static COLUMN_SUMS: Shader = Shader { name: "column_sums", source: include_str!("../../shaders/column_sums.wgsl"), fragments: &[] };
/// The shader of [`Sum`].
pub static SUM: Shader = Shader { name: "sum", source: include_str!("../../shaders/sum.wgsl"), fragments: &[] };
/// The shader of [`BlockSquares`].
pub static BLOCK_SQUARES: Shader =
    Shader { name: "block_squares", source: include_str!("../../shaders/block_squares.wgsl"), fragments: &[] };
/// The shader of [`NonFinite`].
pub static NON_FINITE: Shader =
    Shader { name: "non_finite", source: include_str!("../../shaders/non_finite.wgsl"), fragments: &[&ACTIVATIONS] };

/// Invocations of one workgroup of the reduction shaders.
pub const REDUCE_WORKGROUP: u32 = 256;
/// Columns that one workgroup of [`COLUMN_SUMS`] covers.
pub const SUM_COLUMNS: u32 = 64;

/// The sum over rows of each column of `[n_rows, n_cols]`, written or added at `out`, and at `second_out` where that is not [`NONE`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct ColumnSums {
    pub n_rows: u32,
    pub n_cols: u32,
    pub row_stride: u32,
    pub offset: u32,
    pub out: u32,
    pub second_out: u32,
    pub accumulate: u32,
}

impl Kernel for ColumnSums {
    kernel_basics!("column_sums", const { &[read("data"), read_write("sums")] });

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        if self.n_rows > 0 && self.n_cols > 0 {
            at_least(
                "column_sums",
                "data",
                lens[0],
                (self.offset + self.n_cols) as usize + (self.n_rows as usize - 1) * self.row_stride as usize,
            )?;
        }
        let last = if self.second_out == NONE { self.out } else { self.out.max(self.second_out) };
        at_least("column_sums", "sums", lens[1], (last + self.n_cols) as usize)?;
        loop_trips("column_sums", "n_rows", self.n_rows)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &COLUMN_SUMS, overrides: &[], grid: grid_1d(u64::from(self.n_cols.div_ceil(SUM_COLUMNS))) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [data, sums] = operands else { unreachable!("two operands") };
        let (n_cols, stride) = (self.n_cols as usize, self.row_stride as usize);
        let data = &data.as_slice()[self.offset as usize..];
        let n_rows = self.n_rows as usize;
        let totals = ctx.scratch.take(n_cols);
        let isa = ctx.isa;
        // Columns are split over the threads, so the order of each sum does not depend on their number.
        ctx.pool.run(Rows { data: totals, width: 1 }, n_cols, 256, &|part: Rows<'_>, cols: std::ops::Range<usize>| {
            part.data.fill(0.0);
            for row in 0..n_rows {
                let values = &data[row * stride + cols.start..row * stride + cols.end];
                let totals = &mut *part.data;
                for_isa!(isa, add_to(totals: &mut [f32], values: &[f32]));
            }
        });
        let sums = sums.as_mut_slice();
        for out in [self.out, self.second_out].into_iter().filter(|&out| out != NONE) {
            let out = &mut sums[out as usize..][..n_cols];
            if self.accumulate == 1 {
                out.iter_mut().zip(&*totals).for_each(|(o, t)| *o += t);
            } else {
                out.copy_from_slice(totals);
            }
        }
    }
}

#[inline(always)]
fn add_to(totals: &mut [f32], values: &[f32]) {
    totals.iter_mut().zip(values).for_each(|(t, v)| *t += v);
}

/// Lanes of a sum on the CPU: enough to hide the latency of addition.
const LANES: usize = 32;

#[inline(always)]
fn sum_of(data: &[f32], total: &mut f32) {
    let mut lanes = [0f32; LANES];
    let chunks = data.chunks_exact(LANES);
    let rest = chunks.remainder();
    chunks.for_each(|c| (0..LANES).for_each(|i| lanes[i] += c[i]));
    rest.iter().enumerate().for_each(|(i, v)| lanes[i] += v);
    *total = fold(lanes);
}

#[inline(always)]
fn squares_of(data: &[f32], total: &mut f32) {
    let mut lanes = [0f32; LANES];
    let chunks = data.chunks_exact(LANES);
    let rest = chunks.remainder();
    chunks.for_each(|c| (0..LANES).for_each(|i| lanes[i] += c[i] * c[i]));
    rest.iter().enumerate().for_each(|(i, v)| lanes[i] += v * v);
    *total = fold(lanes);
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        (0..half).for_each(|i| lanes[i] += lanes[i + half]);
        half /= 2;
    }
    lanes[0]
}

/// The sum of `len` floats at `offset`, written to word `out`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Sum {
    pub len: u32,
    pub offset: u32,
    pub out: u32,
}

impl Kernel for Sum {
    kernel_basics!("sum", const { &[read("data"), read_write("total")] });

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        at_least("sum", "data", lens[0], (self.offset + self.len) as usize)?;
        at_least("sum", "total", lens[1], self.out as usize + 1)?;
        loop_trips("sum", "len / 256", self.len.div_ceil(REDUCE_WORKGROUP) + REDUCE_WORKGROUP.ilog2())
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &SUM, overrides: &[], grid: [1, 1, 1] }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [data, out] = operands else { unreachable!("two operands") };
        let data = &data.as_slice()[self.offset as usize..][..self.len as usize];
        let total = &mut out.as_mut_slice()[self.out as usize];
        for_isa!(ctx.isa, sum_of(data: &[f32], total: &mut f32));
    }
}

/// The sum of squares of each block of 4,096 floats of `data` (the last may be shorter), written from `out` on.
/// A norm is the sum of these in order, so that it has the same bits however the blocks are spread over ranks.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct BlockSquares {
    pub len: u32,
    pub out: u32,
}

impl Kernel for BlockSquares {
    kernel_basics!("block_squares", const { &[read("data"), read_write("squares")] });

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        at_least("block_squares", "data", lens[0], self.len as usize)?;
        at_least("block_squares", "squares", lens[1], self.out as usize + (self.len as usize).div_ceil(BLOCK))
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &BLOCK_SQUARES, overrides: &[], grid: grid_1d(u64::from(self.len.div_ceil(BLOCK as u32))) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [data, squares] = operands else { unreachable!("two operands") };
        block_squares(ctx, &data.as_slice()[..self.len as usize], &mut squares.as_mut_slice()[self.out as usize..]);
    }
}

/// [`BlockSquares`] on the host, for gradients that lie there after a ring.
pub fn block_squares(ctx: &CpuContext, data: &[f32], squares: &mut [f32]) {
    let n_blocks = data.len().div_ceil(BLOCK);
    let isa = ctx.isa;
    ctx.pool.run(Rows { data: &mut squares[..n_blocks], width: 1 }, n_blocks, 16, &|part: Rows<'_>, blocks: std::ops::Range<usize>| {
        for (block, total) in blocks.zip(part.data) {
            let data = &data[block * BLOCK..((block + 1) * BLOCK).min(data.len())];
            for_isa!(isa, squares_of(data: &[f32], total: &mut f32));
        }
    });
}

/// [`BlockSquares`] of a buffer that is zero but for some rows, bit for bit: only those are read. On the CPU only.
pub struct RowSquares {
    pub len: u32,
    /// The first word of `squares` that is written.
    pub out: u32,
    /// Where row 0 starts, and floats of a row: multiples of 16.
    pub rows: u32,
    pub width: u32,
    /// Rows that are not zero: the first words of `index`, rising.
    pub n_distinct: u32,
}

impl Kernel for RowSquares {
    cpu_only!("row_squares", const { &[read("index"), read("data"), read_write("squares")] });

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        multiple_of("row_squares", "width", self.width, SIXTEEN)?;
        multiple_of("row_squares", "an offset", self.rows, SIXTEEN)?;
        at_least("row_squares", "index", lens[0], self.n_distinct as usize)?;
        at_least("row_squares", "data", lens[1], self.len as usize)?;
        at_least("row_squares", "squares", lens[2], self.out as usize + (self.len as usize).div_ceil(BLOCK))
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [index, data, squares] = operands else { unreachable!("three operands") };
        let rows = &index.as_indices()[..self.n_distinct as usize];
        let data = &data.as_slice()[..self.len as usize];
        let squares = &mut squares.as_mut_slice()[self.out as usize..][..data.len().div_ceil(BLOCK)];
        let place = (self.rows as usize, self.width as usize);
        for_isa!(ctx.isa, row_squares(data: &[f32], rows: &[u32], place: (usize, usize), squares: &mut [f32]));
    }
}

const SIXTEEN: usize = LANES / 2;

#[inline(always)]
fn row_squares(data: &[f32], rows: &[u32], (offset, width): (usize, usize), squares: &mut [f32]) {
    squares.fill(0.0);
    let (mut block, mut lanes) = (0, [0f32; LANES]);
    for &row in rows {
        let start = offset + row as usize * width;
        for at in (start..start + width).step_by(SIXTEEN) {
            let Some(values) = data[at.min(data.len())..].first_chunk::<SIXTEEN>() else { continue };
            if at / BLOCK != block {
                squares[block] = fold(lanes);
                (block, lanes) = (at / BLOCK, [0.0; LANES]);
            }
            // The lane that a float has in its block; zeros add nothing to any.
            let lanes = &mut lanes[at % LANES..][..SIXTEEN];
            lanes.iter_mut().zip(values).for_each(|(lane, v)| *lane += v * v);
        }
    }
    if let Some(last) = squares.get_mut(block) {
        *last = fold(lanes);
    }
}

/// Adds the number of floats that are not finite, found by their bits, to word `out` (an integer).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct NonFinite {
    pub len: u32,
    pub offset: u32,
    pub out: u32,
}

/// Floats that one workgroup of [`NON_FINITE`] looks at.
pub const NON_FINITE_BLOCK: u32 = 4096;

impl Kernel for NonFinite {
    kernel_basics!("non_finite", const { &[read("data"), read_write("count")] });

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        at_least("non_finite", "data", lens[0], (self.offset + self.len) as usize)?;
        at_least("non_finite", "count", lens[1], self.out as usize + 1)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &NON_FINITE, overrides: &[], grid: grid_1d(u64::from(self.len.div_ceil(NON_FINITE_BLOCK))) }
    }

    fn run(&self, _: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [data, count] = operands else { unreachable!("two operands") };
        let data = &data.as_slice()[self.offset as usize..][..self.len as usize];
        let n = data.iter().filter(|v| !v.is_finite()).count() as u32;
        count.as_indices_mut()[self.out as usize] += n;
    }
}

const ORDER: &str = "the oracle adds in f64, the kernels in f32 in another order";

/// The catalogue's line.
pub const COLUMNS_ENTRY: Entry = Entry {
    name: "column_sums",
    tolerance: Tolerance {
        absolute: 3e-3,
        relative: 1e-5,
        reason: "up to 65,535 numbers added one after another in f32: partial sums near 150, each rounded by up to 8e-6",
    },
    cases: || {
        let sizes =
            ODD.iter().enumerate().map(|(i, &n)| (n, ODD[(i + 2) % 5])).chain([(MAX_LOOP_TRIPS, 5), (2, MAX_WORKGROUPS * SUM_COLUMNS + 7)]);
        sizes.enumerate().map(|(i, (n_rows, n_cols))| column_case(n_rows, n_cols, i as u32 % 2, i % 3 == 0)).collect()
    },
    bench_cases: || vec![column_case(5000, 1024, 0, false)],
    sized: |s| vec![column_case(s.places().min(MAX_LOOP_TRIPS), 4 * s.padded_hidden(), 0, false)],
    shaders: &[&COLUMN_SUMS],
};

fn column_case(n_rows: u32, n_cols: u32, accumulate: u32, second: bool) -> Case {
    let row_stride = n_cols + 4;
    let second_out = if second { n_cols + 3 } else { NONE };
    let kernel = ColumnSums { n_rows, n_cols, row_stride, offset: 2, out: 0, second_out, accumulate };
    let fill = if accumulate == 1 { Fill::Uniform { low: -1.0, high: 1.0 } } else { Fill::Poison };
    Case {
        label: format!("{n_rows}x{n_cols} second {second} accumulate {accumulate}"),
        kernel: Box::new(kernel),
        operands: vec![
            operand((n_rows * row_stride + 2) as usize, Fill::Uniform { low: -1.0, high: 1.0 }),
            operand(2 * n_cols as usize + 3, fill),
        ],
        flop: 0,
    }
}

/// The catalogue's line.
pub const SUM_ENTRY: Entry = Entry {
    name: "sum",
    tolerance: Tolerance { absolute: 5e-3, relative: 1e-5, reason: ORDER },
    cases: || ODD.iter().map(|&n| (n, 2)).chain([(0, 0), (300_001, 1)]).map(|(len, offset)| sum_case(len, offset)).collect(),
    bench_cases: || vec![sum_case(1 << 20, 0)],
    sized: |s| vec![sum_case(s.places(), 0)],
    shaders: &[&SUM],
};

fn sum_case(len: u32, offset: u32) -> Case {
    Case {
        label: format!("{len}"),
        kernel: Box::new(Sum { len, offset, out: 1 }),
        operands: vec![operand((len + offset).max(1) as usize, Fill::Uniform { low: -1.0, high: 1.0 }), operand(3, Fill::Poison)],
        flop: 0,
    }
}

/// The catalogue's line.
pub const BLOCK_SQUARES_ENTRY: Entry = Entry {
    name: "block_squares",
    tolerance: Tolerance { absolute: 1e-4, relative: 1e-5, reason: ORDER },
    cases: || [1, 65, 4096, 4097, 3 * 4096 - 1, 70_000 * 4096 / 64].into_iter().map(|len| squares_case(len, 1)).collect(),
    bench_cases: || vec![squares_case(1 << 20, 0)],
    sized: |s| vec![squares_case(s.n_parameters(), 0)],
    shaders: &[&BLOCK_SQUARES],
};

fn squares_case(len: u32, out: u32) -> Case {
    Case {
        label: format!("{len}"),
        kernel: Box::new(BlockSquares { len, out }),
        operands: vec![
            operand(len as usize, Fill::Uniform { low: -1.0, high: 1.0 }),
            operand((len as usize).div_ceil(BLOCK) + 2, Fill::Poison),
        ],
        flop: 0,
    }
}

/// The catalogue's line.
pub const NON_FINITE_ENTRY: Entry = Entry {
    name: "non_finite",
    tolerance: Tolerance { absolute: 0.0, relative: 0.0, reason: "a count is exact" },
    cases: || [0, 1, 65, 4097, 100_000].into_iter().map(non_finite_case).collect(),
    bench_cases: || vec![non_finite_case(1 << 20)],
    sized: |s| vec![non_finite_case(s.n_parameters())],
    shaders: &[&NON_FINITE],
};

fn non_finite_case(len: u32) -> Case {
    let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 0.0, 1.0, f32::MIN_POSITIVE];
    let values = (0..len + 3).map(|i| if i % 13 == 4 { special[i as usize / 13 % 7] } else { i as f32 }).collect();
    Case {
        label: format!("{len}"),
        kernel: Box::new(NonFinite { len, offset: 3, out: 1 }),
        operands: vec![operand(len as usize + 3, Fill::Floats(values)), operand(2, Fill::Words(vec![7, 5]))],
        flop: 0,
    }
}
