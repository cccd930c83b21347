//! Products of f32 matrices on a CPU core: register tiles, and the two loops around them.
//!
//! A tile is up to 6 rows by some vectors of columns: with AVX2 2 vectors (12 of 16 registers hold sums), with AVX-512 and NEON 4. B is read from
//! panels as wide as a tile, `[n / width][k][width]`, packed by [`pack`] or lying so already. Each sum runs over k in order, so an element's bits do
//! not depend on which rows or columns are computed with it. No layer, no kernel and no thread is known here; what is unsafe in the CPU kernels is here.

use crate::for_isa;
use crate::pool::{Isa, LINE};
use crate::shape::{PANEL, round_up};

/// Rows of the highest tile: with 2 vectors of columns it leaves registers for what is loaded.
pub const TILE_ROWS: usize = 6;

/// Floats of B below which the second cache holds all of it, so that nothing needs to be fetched ahead.
const SECOND_CACHE: usize = 1 << 16;

/// Columns of a tile, which is the width of the panels of B.
pub const fn tile_cols(isa: Isa) -> usize {
    match isa {
        Isa::Avx512 => 64,
        Isa::Avx2 | Isa::Baseline => 16,
    }
}

/// What a register of some instruction set can do.
///
/// # Safety
/// The methods may be called only where the processor has the instruction set, with pointers to `LANES` floats (`splat`: one).
trait Simd: Copy {
    const LANES: usize;
    unsafe fn zero() -> Self;
    unsafe fn splat(from: *const f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    /// `self + a * b`.
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    /// Brings a line into the second cache; any address will do.
    #[inline(always)]
    fn prefetch(_: *const f32) {}
}

/// A [`Simd`] of intrinsics.
macro_rules! simd {
    ($(#[$doc:meta])* $name:ident, $register:ty, $lanes:literal, $zero:expr, $splat:ident, $load:ident, $store:ident, $add:ident, |$c:ident, $a:ident, $b:ident| $fma:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(super) struct $name($register);

        // SAFETY (all): the caller keeps the trait's contract, which is the intrinsics' own. (Some of NEON's are safe where the target has it.)
        #[allow(unused_unsafe)]
        impl Simd for $name {
            const LANES: usize = $lanes;
            #[inline(always)]
            unsafe fn zero() -> Self {
                unsafe { Self($zero) }
            }
            #[inline(always)]
            unsafe fn splat(from: *const f32) -> Self {
                unsafe { Self($splat(*from)) }
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self {
                unsafe { Self($load(from)) }
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut f32) {
                unsafe { $store(to, self.0) }
            }
            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self {
                unsafe { Self($add(self.0, other.0)) }
            }
            #[inline(always)]
            unsafe fn fma(self, a: Self, b: Self) -> Self {
                let ($c, $a, $b) = (self.0, a.0, b.0);
                unsafe { Self($fma) }
            }
            #[cfg(target_arch = "x86_64")]
            #[inline(always)]
            fn prefetch(at: *const f32) {
                // SAFETY: a prefetch never faults.
                unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast()) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod vectors {
    use std::arch::x86_64::*;

    use super::Simd;

    simd!(
        /// Eight floats of AVX2 with FMA.
        Avx2, __m256, 8, _mm256_setzero_ps(), _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_add_ps,
        |c, a, b| _mm256_fmadd_ps(a, b, c)
    );
    simd!(
        /// Sixteen floats of AVX-512.
        Avx512, __m512, 16, _mm512_setzero_ps(), _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_add_ps,
        |c, a, b| _mm512_fmadd_ps(a, b, c)
    );
}

#[cfg(target_arch = "aarch64")]
mod vectors {
    use std::arch::aarch64::*;

    use super::Simd;

    simd!(
        /// Four floats of NEON, which every aarch64 has.
        Neon, float32x4_t, 4, vdupq_n_f32(0.0), vdupq_n_f32, vld1q_f32, vst1q_f32, vaddq_f32, |c, a, b| vfmaq_f32(c, a, b)
    );
}

/// Four floats of whatever the compiler has; multiplication and addition are not fused.
#[cfg(any(test, not(target_arch = "aarch64")))]
#[derive(Clone, Copy)]
struct Portable([f32; 4]);

// SAFETY (all): the pointers are valid as the trait asks; no instruction set is needed.
#[cfg(any(test, not(target_arch = "aarch64")))]
impl Simd for Portable {
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; 4])
    }
    #[inline(always)]
    unsafe fn splat(from: *const f32) -> Self {
        unsafe { Self([*from; 4]) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Self(from.cast::<[f32; 4]>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }
    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + a.0[i] * b.0[i]))
    }
}

/// A part of a matrix that is written: some rows and columns of it, disjoint from every other part.
/// Element (row, col) of the whole lies at `col / panel * panel_stride + row * row_stride + col % panel`.
pub struct MatrixMut<'a> {
    start: *mut f32,
    rows: usize,
    first_col: usize,
    cols: usize,
    row_stride: usize,
    panel: usize,
    panel_stride: usize,
    life: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: a part reaches its own elements only, as a `&mut` to them would.
unsafe impl Send for MatrixMut<'_> {}

impl<'a> MatrixMut<'a> {
    /// Row-major rows of `stride` floats.
    pub fn row_major(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(cols <= stride && (rows == 0 || cols == 0 || (rows - 1) * stride + cols <= data.len()), "a matrix within its slice");
        Self::unchecked(data, rows, cols, stride, usize::MAX, 0)
    }

    /// Panels of `panel` columns, rows within one behind another.
    pub fn panels(data: &'a mut [f32], rows: usize, cols: usize, panel: usize, panel_stride: usize) -> Self {
        let n_panels = cols.div_ceil(panel);
        let needed = if rows == 0 || cols == 0 { 0 } else { (n_panels - 1) * panel_stride + (rows - 1) * panel + (cols - 1) % panel + 1 };
        assert!(rows * panel <= panel_stride && needed <= data.len(), "panels within their slice");
        Self::unchecked(data, rows, cols, panel, panel, panel_stride)
    }

    fn unchecked(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize, panel: usize, panel_stride: usize) -> Self {
        Self { start: data.as_mut_ptr(), rows, first_col: 0, cols, row_stride, panel, panel_stride, life: std::marker::PhantomData }
    }

    /// The first `at` rows and the rest.
    pub fn split_rows(self, at: usize) -> (Self, Self) {
        assert!(at <= self.rows, "a row within the matrix");
        // SAFETY: within the slice that the matrix was made of, or one past it where no row is left.
        let start = if at < self.rows { unsafe { self.start.add(at * self.row_stride) } } else { self.start };
        (Self { rows: at, ..self }, Self { start, rows: self.rows - at, ..self })
    }

    /// The first `at` columns and the rest.
    pub fn split_cols(self, at: usize) -> (Self, Self) {
        assert!(at <= self.cols, "a column within the matrix");
        (Self { cols: at, ..self }, Self { first_col: self.first_col + at, cols: self.cols - at, ..self })
    }

    /// Some rows and columns of this part for a while.
    pub fn part(&mut self, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>) -> MatrixMut<'_> {
        let whole = MatrixMut { life: std::marker::PhantomData, ..*self };
        whole.split_rows(rows.end).0.split_rows(rows.start).1.split_cols(cols.end).0.split_cols(cols.start).1
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Where (0, col) of this part lies.
    ///
    /// # Safety
    /// `col` is below `cols`, and there is a row.
    #[inline(always)]
    unsafe fn column(&self, col: usize) -> *mut f32 {
        let col = self.first_col + col;
        // Row-major is one panel of all columns; its division would cost as much as a short tile.
        let at = if self.panel == usize::MAX { col } else { col / self.panel * self.panel_stride + col % self.panel };
        unsafe { self.start.add(at) }
    }
}

/// `[steps, rows, width]` of which each thread has some rows in all steps.
pub struct Steps<'a> {
    start: *mut f32,
    n_steps: usize,
    /// Floats from step to step.
    step: usize,
    rows: usize,
    width: usize,
    life: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: a part reaches its own rows only, as a `&mut` to them would.
unsafe impl Send for Steps<'_> {}

impl<'a> Steps<'a> {
    pub fn new(data: &'a mut [f32], n_steps: usize, rows: usize, width: usize) -> Self {
        assert!(n_steps * rows * width <= data.len(), "steps within their slice");
        Self { start: data.as_mut_ptr(), n_steps, step: rows * width, rows, width, life: std::marker::PhantomData }
    }

    /// This part's rows at one step.
    pub fn at(&self, step: usize) -> &[f32] {
        assert!(step < self.n_steps, "step {step} of {}", self.n_steps);
        // SAFETY: within the slice that it was made of; no other part has these rows.
        unsafe { std::slice::from_raw_parts(self.start.add(step * self.step), self.rows * self.width) }
    }

    /// This part's rows at one step.
    pub fn at_mut(&mut self, step: usize) -> &mut [f32] {
        assert!(step < self.n_steps, "step {step} of {}", self.n_steps);
        // SAFETY: as above, and borrowed for as long as the result.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(step * self.step), self.rows * self.width) }
    }

    /// Two different steps, the second to be written.
    pub fn two(&mut self, from: usize, to: usize) -> (&[f32], &mut [f32]) {
        assert!(from != to && from < self.n_steps && to < self.n_steps, "steps {from} and {to} of {}", self.n_steps);
        let len = self.rows * self.width;
        // SAFETY: as above; two steps share nothing, since `len` is at most a step.
        unsafe {
            (
                std::slice::from_raw_parts(self.start.add(from * self.step), len),
                std::slice::from_raw_parts_mut(self.start.add(to * self.step), len),
            )
        }
    }
}

impl crate::pool::Divide for Steps<'_> {
    fn divide(self, at: usize) -> (Self, Self) {
        assert!(at <= self.rows, "a row of the part");
        // SAFETY: within the slice, or one past it; a part without rows reads nothing.
        let start = if at < self.rows { unsafe { self.start.add(at * self.width) } } else { self.start };
        (Self { rows: at, ..self }, Self { start, rows: self.rows - at, ..self })
    }
}

/// The left factor.
#[derive(Clone, Copy)]
pub enum Left<'a> {
    /// Row-major rows of so many floats.
    Rows(&'a [f32], usize),
    /// As [`pack_left`] leaves it.
    Packed(&'a [f32]),
    /// Columns of rows of so many floats: stored `[k, m]`.
    Columns(&'a [f32], usize),
}

/// One product of a sum: A `[m, k]` by B `[k, n]`.
#[derive(Clone, Copy)]
pub struct Factors<'a> {
    pub k: usize,
    pub a: Left<'a>,
    /// Panels of a multiple of [`tile_cols`] columns: element (k, col) at `col / panel * panel_stride + k * row_stride + col % panel`, whole tiles.
    pub b: &'a [f32],
    pub row_stride: usize,
    pub panel: usize,
    pub panel_stride: usize,
}

impl<'a> Factors<'a> {
    /// B as [`pack`] leaves it.
    pub fn packed(isa: Isa, k: usize, a: Left<'a>, b: &'a [f32]) -> Self {
        let width = tile_cols(isa);
        Self { k, a, b, row_stride: width, panel: width, panel_stride: width * k }
    }

    /// B `[k, n]` as weights lie: panels of 64 columns.
    pub fn of_panels(k: usize, a: Left<'a>, b: &'a [f32]) -> Self {
        Self { k, a, b, row_stride: PANEL, panel: PANEL, panel_stride: PANEL * k }
    }

    /// B where it lies, if it can be read so: not transposed, whole tiles.
    pub fn unpacked(isa: Isa, k: usize, a: Left<'a>, b: Stored<'a>, n: usize) -> Option<Self> {
        let (width, panel) = (tile_cols(isa), b.panel);
        let whole = n.is_multiple_of(width) && (panel == usize::MAX || panel.is_multiple_of(width));
        (whole && !b.transposed).then_some(Self { k, a, b: b.data, row_stride: b.row_stride, panel, panel_stride: b.panel_stride })
    }

    /// Where the tile that starts at `col` lies.
    #[inline(always)]
    fn tile_at(&self, col: usize) -> usize {
        if self.panel == usize::MAX { col } else { col / self.panel * self.panel_stride + col % self.panel }
    }
}

/// What a product starts with and ends with.
#[derive(Clone, Copy, Default)]
pub struct Ends<'a> {
    /// The product is added to C instead of replacing it.
    pub add: bool,
    /// Added to every row, last.
    pub bias: Option<&'a [f32]>,
}

/// C = A B, or C += A B, with the sum of one or two products, and a bias.
pub fn multiply(isa: Isa, c: &mut MatrixMut<'_>, factors: [Option<Factors<'_>>; 2], ends: Ends<'_>) {
    let (m, n, width) = (c.rows, c.cols, tile_cols(isa));
    if m == 0 || n == 0 {
        return;
    }
    for f in factors.iter().flatten().filter(|f| f.k > 0) {
        match f.a {
            Left::Rows(a, stride) => assert!((m - 1) * stride + f.k <= a.len(), "the left factor within its slice"),
            Left::Packed(a) => assert!(m * f.k <= a.len(), "the packed left factor within its slice"),
            Left::Columns(a, stride) => assert!((f.k - 1) * stride + m <= a.len(), "the columns of the left factor within their slice"),
        }
        let last = (n - 1) / width * width;
        // The last tile of the panel before the last one may lie further.
        let before = if last >= f.panel { f.tile_at(last / f.panel * f.panel - width) } else { 0 };
        let end = f.tile_at(last).max(before) + (f.k - 1) * f.row_stride + width;
        assert!(f.panel >= width && end <= f.b.len(), "the panels within their slice");
    }
    assert!(ends.bias.is_none_or(|b| b.len() >= n), "a bias for every column");
    assert!(c.panel == usize::MAX || (c.panel.is_multiple_of(width) && c.first_col.is_multiple_of(width)), "no tile across two panels");
    // SAFETY: lengths are checked above; an `Isa` other than the baseline is only made after the processor reported it.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512(c, &factors, ends),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 if is_one_wide_row(c, &factors) => avx2_row(c, &factors, ends),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2(c, &factors, ends),
            #[cfg(target_arch = "aarch64")]
            _ => tiles::<vectors::Neon, 4>(c, &factors, ends),
            #[cfg(not(target_arch = "aarch64"))]
            _ => tiles::<Portable, 4>(c, &factors, ends),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
unsafe fn avx512(c: &mut MatrixMut<'_>, factors: &[Option<Factors<'_>>; 2], ends: Ends<'_>) {
    unsafe { tiles::<vectors::Avx512, 4>(c, factors, ends) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(c: &mut MatrixMut<'_>, factors: &[Option<Factors<'_>>; 2], ends: Ends<'_>) {
    unsafe { tiles::<vectors::Avx2, 2>(c, factors, ends) }
}

/// Whether there is one row, and B lies in stretches of 64 columns.
#[cfg(target_arch = "x86_64")]
fn is_one_wide_row(c: &MatrixMut<'_>, factors: &[Option<Factors<'_>>; 2]) -> bool {
    let fits = |f: &Factors<'_>| f.k == 0 || f.panel == usize::MAX || f.panel.is_multiple_of(PANEL);
    let whole = c.cols.is_multiple_of(PANEL) && (c.panel == usize::MAX || c.panel.is_multiple_of(PANEL));
    c.rows == 1 && whole && c.first_col.is_multiple_of(PANEL) && factors.iter().flatten().all(fits)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_row(c: &mut MatrixMut<'_>, factors: &[Option<Factors<'_>>; 2], ends: Ends<'_>) {
    unsafe { one_row::<vectors::Avx2, 8>(c, factors, ends) }
}

/// One row: a tile of two vectors would wait for its own sums, and read a panel of weights in four passes; one of eight does neither, and streams.
///
/// # Safety
/// As [`tiles`], and `V::LANES * N` columns of B lie together.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn one_row<V: Simd, const N: usize>(c: &mut MatrixMut<'_>, factors: &[Option<Factors<'_>>; 2], ends: Ends<'_>) {
    for col in (0..c.cols).step_by(V::LANES * N) {
        let walks = factors.each_ref().map(|f| {
            let Some(f) = f.as_ref().filter(|f| f.k > 0) else { return NO_WALK };
            let (a, a_step) = match f.a {
                Left::Rows(a, _) | Left::Packed(a) => (a.as_ptr(), 0),
                Left::Columns(a, stride) => (a.as_ptr(), stride),
            };
            Walk { k: f.k, a, a_step, b: f.b[f.tile_at(col)..].as_ptr(), b_stride: f.row_stride, ..NO_WALK }
        });
        let bias = ends.bias.map_or(std::ptr::null(), |b| b[col..].as_ptr());
        // SAFETY: `col` is below the columns, which are whole tiles.
        unsafe { tile::<V, 1, N>(&walks, c.column(col), 0, ends.add, bias) };
    }
}

/// One row A `[k]` by rows of B `[n, k]`, a transposed matrix: C `[n]` = A B^T, or added to C, with a bias. Sums run over `V::LANES` columns at a time.
pub fn dots(isa: Isa, a: &[f32], b: &[f32], b_stride: usize, c: &mut [f32], ends: Ends<'_>) {
    let (n, k) = (c.len(), a.len());
    assert!(k <= b_stride && (n == 0 || (n - 1) * b_stride + k <= b.len()), "the rows within their slice");
    assert!(ends.bias.is_none_or(|b| b.len() >= n), "a bias for every column");
    // SAFETY: lengths are checked above; an `Isa` other than the baseline is only made after the processor reported it.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512_dots(a, b, b_stride, c, ends),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2_dots(a, b, b_stride, c, ends),
            #[cfg(target_arch = "aarch64")]
            _ => rows_dots::<vectors::Neon>(a, b, b_stride, c, ends),
            #[cfg(not(target_arch = "aarch64"))]
            _ => rows_dots::<Portable>(a, b, b_stride, c, ends),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
unsafe fn avx512_dots(a: &[f32], b: &[f32], b_stride: usize, c: &mut [f32], ends: Ends<'_>) {
    unsafe { rows_dots::<vectors::Avx512>(a, b, b_stride, c, ends) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_dots(a: &[f32], b: &[f32], b_stride: usize, c: &mut [f32], ends: Ends<'_>) {
    unsafe { rows_dots::<vectors::Avx2>(a, b, b_stride, c, ends) }
}

/// Rows of B that [`dots`] reads side by side, so that sums do not wait for themselves.
const DOT_ROWS: usize = 8;

/// # Safety
/// Lengths as [`dots`] checks them; the processor has V's instructions.
#[inline(always)]
unsafe fn rows_dots<V: Simd>(a: &[f32], b: &[f32], b_stride: usize, c: &mut [f32], ends: Ends<'_>) {
    let whole = a.len() / V::LANES * V::LANES;
    for (block, c) in c.chunks_mut(DOT_ROWS).enumerate() {
        let first = block * DOT_ROWS;
        // Rows beyond the last repeat it.
        let rows: [&[f32]; DOT_ROWS] = std::array::from_fn(|r| &b[(first + r.min(c.len() - 1)) * b_stride..][..a.len()]);
        // SAFETY: whole vectors within rows of `a.len()`; `lanes` is the largest vector.
        let sums: [f32; DOT_ROWS] = unsafe {
            let mut sums = [V::zero(); DOT_ROWS];
            for at in (0..whole).step_by(V::LANES) {
                let x = V::load(a.as_ptr().add(at));
                for (sum, row) in sums.iter_mut().zip(&rows) {
                    *sum = sum.fma(x, V::load(row.as_ptr().add(at)));
                }
            }
            sums.map(|sum| {
                let mut lanes = [0f32; 16];
                sum.store(lanes.as_mut_ptr());
                lanes[..V::LANES].iter().sum()
            })
        };
        for (r, (c, sum)) in c.iter_mut().zip(sums).enumerate() {
            let rest: f32 = a[whole..].iter().zip(&rows[r][whole..]).map(|(x, y)| x * y).sum();
            let start = if ends.add { *c } else { 0.0 };
            *c = start + (sum + rest) + ends.bias.map_or(0.0, |bias| bias[first + r]);
        }
    }
}

/// Multiplies and adds registers `trips` times in as many chains as there are sums in the highest tile, and tells how many operations that were.
pub fn multiply_registers(isa: Isa, trips: usize) -> u64 {
    // SAFETY: an `Isa` other than the baseline is only made after the processor reported it.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512_chains(trips),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2_chains(trips),
            #[cfg(target_arch = "aarch64")]
            _ => chains::<vectors::Neon>(trips),
            #[cfg(not(target_arch = "aarch64"))]
            _ => chains::<Portable>(trips),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
unsafe fn avx512_chains(trips: usize) -> u64 {
    unsafe { chains::<vectors::Avx512>(trips) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_chains(trips: usize) -> u64 {
    unsafe { chains::<vectors::Avx2>(trips) }
}

/// # Safety
/// The processor has V's instructions.
#[inline(always)]
unsafe fn chains<V: Simd>(trips: usize) -> u64 {
    const CHAINS: usize = 12;
    let mut lanes = [0f32; 16];
    // SAFETY: one float is splat, and `lanes` is the largest vector.
    unsafe {
        let (shrink, shift) = (V::splat(&0.999_9), V::splat(&1e-4));
        let mut sums = [V::splat(&0.5); CHAINS];
        for _ in 0..trips {
            for sum in &mut sums {
                *sum = shift.fma(shrink, *sum);
            }
        }
        let total = sums.into_iter().fold(V::zero(), |total, sum| total.add(sum));
        total.store(lanes.as_mut_ptr());
    }
    std::hint::black_box(lanes);
    (trips * CHAINS * V::LANES * 2) as u64
}

/// Rows are cut evenly, since a tile of 1 to 3 rows waits for its own sums: 13 are 5 + 4 + 4, not 6 + 6 + 1.
fn row_cuts(m: usize) -> impl Iterator<Item = (usize, usize)> {
    let n = m.div_ceil(TILE_ROWS).max(1);
    let (each, rest) = (m / n, m % n);
    (0..n).map(move |i| (i * each + i.min(rest), each + usize::from(i < rest)))
}

/// The pointers of one tile's factors.
#[derive(Clone, Copy)]
struct Walk {
    k: usize,
    a: *const f32,
    /// From k to k and from row to row; a step of 0 where A is packed.
    a_step: usize,
    a_stride: usize,
    b: *const f32,
    b_stride: usize,
    /// What is brought near meanwhile, one behind another: half of the next panel, if `does_prefetch`. Never read.
    ahead: *const f32,
    does_prefetch: bool,
}

/// A walk over nothing.
const NO_WALK: Walk = Walk {
    k: 0,
    a: std::ptr::null(),
    a_step: 0,
    a_stride: 0,
    b: std::ptr::null(),
    b_stride: 0,
    ahead: std::ptr::null(),
    does_prefetch: false,
};

/// All tiles: panels of B outside, so that one stays in the nearest cache while the rows pass.
///
/// # Safety
/// Lengths as [`multiply`] checks them; the processor has V's instructions.
#[inline(always)]
unsafe fn tiles<V: Simd, const N: usize>(c: &mut MatrixMut<'_>, factors: &[Option<Factors<'_>>; 2], ends: Ends<'_>) {
    let width = V::LANES * N;
    for col in (0..c.cols).step_by(width) {
        let valid = width.min(c.cols - col);
        let bias = ends.bias.map_or(std::ptr::null(), |b| b[col..].as_ptr());
        // Behind the last panel comes the first: a sweep reads it again at once.
        let next = if col + width < c.cols { col + width } else { 0 };
        for (block, (row, n_rows)) in row_cuts(c.rows).enumerate() {
            let mut walks = [NO_WALK; 2];
            for (walk, f) in walks.iter_mut().zip(factors) {
                if let Some(f) = f
                    && f.k > 0
                {
                    let (a, a_step, a_stride) = match f.a {
                        Left::Rows(a, stride) => (a[row * stride..].as_ptr(), 1, stride),
                        Left::Packed(a) => (a[row * f.k..].as_ptr(), 0, 1),
                        Left::Columns(a, stride) => (a[row..].as_ptr(), stride, 1),
                    };
                    *walk = Walk {
                        k: f.k,
                        a,
                        a_step,
                        a_stride,
                        b: f.b[f.tile_at(col)..].as_ptr(),
                        b_stride: f.row_stride,
                        // The first two blocks of rows fetch a half each.
                        ahead: f.b.as_ptr().wrapping_add(f.tile_at(next) + block * (f.k / 2) * width),
                        does_prefetch: block < 2 && f.row_stride == width && f.k * c.cols > SECOND_CACHE,
                    };
                }
            }
            // SAFETY: `col` is below the columns; `row + n_rows` at most the rows.
            unsafe {
                let to = c.column(col).add(row * c.row_stride);
                if valid == width {
                    tile_of::<V, N>(n_rows, &walks, to, c.row_stride, ends.add, bias);
                } else {
                    // The last columns by way of a whole tile beside.
                    let mut whole = [0f32; TILE_ROWS * 64];
                    let mut whole_bias = [0f32; 64];
                    for r in 0..n_rows {
                        std::ptr::copy_nonoverlapping(to.add(r * c.row_stride), whole[r * width..].as_mut_ptr(), valid);
                    }
                    if !bias.is_null() {
                        std::ptr::copy_nonoverlapping(bias, whole_bias.as_mut_ptr(), valid);
                    }
                    tile_of::<V, N>(n_rows, &walks, whole.as_mut_ptr(), width, ends.add, whole_bias.as_ptr());
                    for r in 0..n_rows {
                        std::ptr::copy_nonoverlapping(whole[r * width..].as_ptr(), to.add(r * c.row_stride), valid);
                    }
                }
            }
        }
    }
}

/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn tile_of<V: Simd, const N: usize>(n_rows: usize, walks: &[Walk; 2], c: *mut f32, c_stride: usize, add: bool, bias: *const f32) {
    // SAFETY: handed on.
    unsafe {
        match n_rows {
            1 => tile::<V, 1, N>(walks, c, c_stride, add, bias),
            2 => tile::<V, 2, N>(walks, c, c_stride, add, bias),
            3 => tile::<V, 3, N>(walks, c, c_stride, add, bias),
            4 => tile::<V, 4, N>(walks, c, c_stride, add, bias),
            5 => tile::<V, 5, N>(walks, c, c_stride, add, bias),
            _ => tile::<V, 6, N>(walks, c, c_stride, add, bias),
        }
    }
}

/// R rows by N vectors: sums start at zero, take both products, then C where it is added to, then the bias.
///
/// # Safety
/// Every pointer reaches what R, N and the walks say; the processor has V's instructions.
#[inline(always)]
unsafe fn tile<V: Simd, const R: usize, const N: usize>(walks: &[Walk; 2], c: *mut f32, c_stride: usize, add: bool, bias: *const f32) {
    unsafe {
        // What the end of the tile reads or writes is on its way while the sums grow.
        for r in 0..R {
            for line in 0..(V::LANES * N).div_ceil(LINE) {
                prefetch_near(c.wrapping_add(r * c_stride + line * LINE));
            }
        }
        let mut sums = [[V::zero(); N]; R];
        for walk in walks {
            sums = match walk.a_step {
                0 => walk_along::<V, R, N>(sums, walk, R, 1),
                1 => walk_along::<V, R, N>(sums, walk, 1, walk.a_stride),
                step => walk_along::<V, R, N>(sums, walk, step, 1),
            };
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, &sum) in sums.iter().enumerate() {
                let to = c.add(r * c_stride + v * V::LANES);
                let mut sum = sum;
                if add {
                    sum = V::load(to).add(sum);
                }
                if !bias.is_null() {
                    sum = sum.add(V::load(bias.add(v * V::LANES)));
                }
                sum.store(to);
            }
        }
    }
}

/// The loop over k.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn walk_along<V: Simd, const R: usize, const N: usize>(
    mut sums: [[V; N]; R],
    walk: &Walk,
    a_step: usize,
    a_stride: usize,
) -> [[V; N]; R] {
    unsafe {
        let (mut a, mut b, mut left, mut ahead) = (walk.a, walk.b, walk.k, walk.ahead);
        // Four steps share the arithmetic of addresses.
        while left >= 4 {
            if walk.does_prefetch {
                // Half of four rows, in lines of 16 floats.
                for i in 0..V::LANES * N / 8 {
                    V::prefetch(ahead.wrapping_add(i * 16));
                }
                ahead = ahead.wrapping_add(2 * V::LANES * N);
            }
            for i in 0..4 {
                step_along::<V, R, N>(&mut sums, a.add(i * a_step), a_stride, b.add(i * walk.b_stride));
            }
            a = a.wrapping_add(4 * a_step);
            b = b.wrapping_add(4 * walk.b_stride);
            left -= 4;
        }
        for _ in 0..left {
            step_along::<V, R, N>(&mut sums, a, a_stride, b);
            a = a.wrapping_add(a_step);
            b = b.wrapping_add(walk.b_stride);
        }
    }
    sums
}

/// One k: a row of B's panel, times an element of each row of A.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn step_along<V: Simd, const R: usize, const N: usize>(sums: &mut [[V; N]; R], a: *const f32, a_stride: usize, b: *const f32) {
    unsafe {
        let mut columns = [V::zero(); N];
        for (v, column) in columns.iter_mut().enumerate() {
            *column = V::load(b.add(v * V::LANES));
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            let x = V::splat(a.add(r * a_stride));
            for (sum, &column) in sums.iter_mut().zip(&columns) {
                *sum = sum.fma(x, column);
            }
        }
    }
}

/// Where the elements of a stored B lie, `[k, n]` or, transposed, `[n, k]`: stored (row, col) at
/// `col / panel * panel_stride + row * row_stride + col % panel`.
#[derive(Clone, Copy)]
pub struct Stored<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    /// `usize::MAX` for row-major.
    pub panel: usize,
    pub panel_stride: usize,
    pub transposed: bool,
}

impl<'a> Stored<'a> {
    /// `[k, n]` in panels of 64 columns.
    pub fn panels(data: &'a [f32], k: usize) -> Self {
        Self { data, row_stride: PANEL, panel: PANEL, panel_stride: PANEL * k, transposed: false }
    }

    /// The same memory, rows for columns.
    pub fn transposed(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// The same from stored (row, col) on, of a B that is not transposed; `col` is where a panel starts, or it is row-major.
    pub fn part(&self, row: usize, col: usize) -> Self {
        let panels = if self.panel == usize::MAX { col } else { col / self.panel * self.panel_stride + col % self.panel };
        Self { data: &self.data[(panels + row * self.row_stride).min(self.data.len())..], ..*self }
    }

    /// Stored (row, col) up to the end of its panel, as long as the data goes.
    fn from(&self, row: usize, col: usize) -> &[f32] {
        let (panel, within) = if self.panel == usize::MAX { (0, col) } else { (col / self.panel, col % self.panel) };
        &self.data[panel * self.panel_stride + row * self.row_stride + within..]
    }
}

/// Floats of a packed B `[k, n]`.
pub const fn packed_len(isa: Isa, k: usize, n: usize) -> usize {
    k * round_up(n, tile_cols(isa))
}

/// Packs rows `ks` and columns `cols` of B for tiles: `[cols / width][k][width]`, zero beyond the last column.
/// `to` needs `ks.len() * cols.len()` floats, the latter rounded up to whole panels.
pub fn pack(isa: Isa, b: Stored<'_>, ks: std::ops::Range<usize>, cols: std::ops::Range<usize>, to: &mut [f32]) {
    let width = tile_cols(isa);
    if !ks.is_empty() {
        for_isa!(isa, pack_tiles(width: usize, b: Stored<'_>, ks: std::ops::Range<usize>, cols: std::ops::Range<usize>, to: &mut [f32]));
    }
}

#[inline(always)]
fn pack_tiles(width: usize, b: Stored<'_>, ks: std::ops::Range<usize>, cols: std::ops::Range<usize>, to: &mut [f32]) {
    let (k, panel) = (ks.len(), b.panel);
    let mut first = cols.start;
    // Four tiles at a time, row by row: rows may lie a page apart, and a line at a time from each would wait for memory.
    for to in to.chunks_mut(4 * k * width) {
        if first >= cols.end {
            break;
        }
        let n = (cols.end - first).div_ceil(width).min(4);
        let is_whole = |col: usize| col + width <= cols.end && (panel == usize::MAX || col % panel + width <= panel);
        if !b.transposed && (0..n).all(|i| is_whole(first + i * width)) {
            for (i, row) in ks.clone().enumerate() {
                for (tile, to) in to.chunks_mut(k * width).take(n).enumerate() {
                    let from = b.from(row, first + tile * width);
                    prefetch_near(from.as_ptr().wrapping_add(AHEAD * b.row_stride));
                    copy_columns(&from[..width], &mut to[i * width..][..width]);
                }
            }
        } else {
            for (tile, to) in to.chunks_mut(k * width).take(n).enumerate() {
                let first = first + tile * width;
                let valid = width.min(cols.end - first);
                if b.transposed {
                    transpose(b, ks.clone(), first, valid, width, to);
                } else {
                    for (row, to) in ks.clone().zip(to.chunks_exact_mut(width)) {
                        to.fill(0.0);
                        for (i, to) in to[..valid].iter_mut().enumerate() {
                            *to = b.from(row, first + i)[0];
                        }
                    }
                }
            }
        }
        first += n * width;
    }
}

/// Rows ahead of the one that is packed that are on their way.
const AHEAD: usize = 12;

/// Brings a line into the first cache; any address will do.
#[inline(always)]
fn prefetch_near(at: *const f32) {
    // SAFETY: a prefetch never faults, and every x86-64 has it.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// A copy whose length the compiler knows.
#[inline(always)]
fn copy_columns(from: &[f32], to: &mut [f32]) {
    for (to, from) in to.as_chunks_mut::<16>().0.iter_mut().zip(from.as_chunks::<16>().0) {
        *to = *from;
    }
}

/// One panel from B stored `[n, k]`: blocks of 8 x 8 go through registers.
#[inline(always)]
fn transpose(b: Stored<'_>, ks: std::ops::Range<usize>, first: usize, valid: usize, width: usize, to: &mut [f32]) {
    if valid < width {
        to.fill(0.0);
    }
    let mut k0 = ks.start;
    while k0 < ks.end {
        // Up to 8 of k that lie one behind another in the stored rows.
        let run = (ks.end - k0).min(8).min(if b.panel == usize::MAX { 8 } else { b.panel - k0 % b.panel });
        let to = &mut to[(k0 - ks.start) * width..];
        let mut i = 0;
        if run == 8 {
            while i + 8 <= valid {
                let block: [[f32; 8]; 8] =
                    std::array::from_fn(|r| b.from(first + i + r, k0)[..8].try_into().expect("eight floats of a stored row"));
                for k in 0..8 {
                    let column: [f32; 8] = std::array::from_fn(|r| block[r][k]);
                    to[k * width + i..][..8].copy_from_slice(&column);
                }
                i += 8;
            }
        }
        for i in i..valid {
            for (k, value) in b.from(first + i, k0)[..run].iter().enumerate() {
                to[k * width + i] = *value;
            }
        }
        k0 += run;
    }
}

/// Packs rows `ks` and columns `cols` of a row-major B with `stride` floats a row, as [`pack`] does, and adds the rows up: into both of `sums`,
/// each as long as `cols` or empty. Columns are whole panels of 64.
pub fn pack_and_sum(
    isa: Isa,
    b: &[f32],
    stride: usize,
    ks: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
    to: &mut [f32],
    mut sums: [&mut [f32]; 2],
) {
    let len = ks.len() * PANEL;
    for (panel, (col, to)) in cols.step_by(PANEL).zip(to.chunks_exact_mut(len.max(1))).enumerate() {
        let b = &b[(ks.start * stride + col).min(b.len())..];
        let mut sum = [0.0; PANEL];
        let total = &mut sum;
        match tile_cols(isa) {
            PANEL => for_isa!(isa, pack_panel_whole(b: &[f32], stride: usize, to: &mut [f32], total: &mut [f32; PANEL])),
            _ => for_isa!(isa, pack_panel_in_four(b: &[f32], stride: usize, to: &mut [f32], total: &mut [f32; PANEL])),
        }
        for sums in sums.iter_mut().filter(|sums| !sums.is_empty()) {
            sums[panel * PANEL..][..PANEL].iter_mut().zip(&sum).for_each(|(sums, sum)| *sums += sum);
        }
    }
}

#[inline(always)]
fn pack_panel_whole(b: &[f32], stride: usize, to: &mut [f32], sum: &mut [f32; PANEL]) {
    pack_panel::<PANEL>(b, stride, to, sum);
}

#[inline(always)]
fn pack_panel_in_four(b: &[f32], stride: usize, to: &mut [f32], sum: &mut [f32; PANEL]) {
    pack_panel::<{ PANEL / 4 }>(b, stride, to, sum);
}

/// One panel of 64 columns, in tiles of WIDTH.
#[inline(always)]
fn pack_panel<const WIDTH: usize>(b: &[f32], stride: usize, to: &mut [f32], sum: &mut [f32; PANEL]) {
    let k = to.len() / PANEL;
    let mut sums = [0.0; PANEL];
    for i in 0..k {
        let Some(row) = b[i * stride..].first_chunk::<PANEL>() else { break };
        for line in 0..PANEL / LINE {
            prefetch_near(row.as_ptr().wrapping_add(AHEAD * stride + line * LINE));
        }
        for tile in 0..PANEL / WIDTH {
            if let (Some(to), Some(from)) =
                (to[(tile * k + i) * WIDTH..].first_chunk_mut::<WIDTH>(), row[tile * WIDTH..].first_chunk::<WIDTH>())
            {
                *to = *from;
            }
        }
        (0..PANEL).for_each(|j| sums[j] += row[j]);
    }
    *sum = sums;
}

/// Rows of A, stored `[k, m]`, up to which it is read where it lies: lines that one tile has fetched are there for the next.
const UNPACKED_COLUMNS: usize = 256;

/// A left factor stored `[k, m]` in rows of `stride` floats: rows `ks` of it and columns `rows`, packed into `room` where that pays.
pub fn left_of_columns<'a>(
    a: &'a [f32],
    stride: usize,
    ks: std::ops::Range<usize>,
    rows: std::ops::Range<usize>,
    room: &'a mut [f32],
) -> Left<'a> {
    // A stride of 1 would be taken for rows.
    if (2..=UNPACKED_COLUMNS).contains(&stride) {
        return Left::Columns(&a[(ks.start * stride + rows.start).min(a.len())..], stride);
    }
    pack_left(a, stride, ks, rows, room);
    Left::Packed(room)
}

/// Packs A that is stored `[k, m]` in rows of `stride` floats: rows `ks` of it and columns `rows`, in blocks of a tile's rows, `[k][rows of the tile]`.
pub fn pack_left(a: &[f32], stride: usize, ks: std::ops::Range<usize>, rows: std::ops::Range<usize>, to: &mut [f32]) {
    let k = ks.len();
    for (row, n_rows) in row_cuts(rows.len()).filter(|cut| cut.1 > 0 && k > 0) {
        let to = &mut to[row * k..(row + n_rows) * k];
        let from = &a[ks.start * stride + rows.start + row..];
        // A length that the compiler knows: a call for six floats costs more than they do.
        match n_rows {
            1 => copy_rows::<1>(from, stride, to),
            2 => copy_rows::<2>(from, stride, to),
            3 => copy_rows::<3>(from, stride, to),
            4 => copy_rows::<4>(from, stride, to),
            5 => copy_rows::<5>(from, stride, to),
            _ => copy_rows::<TILE_ROWS>(from, stride, to),
        }
    }
}

fn copy_rows<const R: usize>(from: &[f32], stride: usize, to: &mut [f32]) {
    for (i, to) in to.as_chunks_mut::<R>().0.iter_mut().enumerate() {
        if let Some(from) = from[i * stride..].first_chunk::<R>() {
            prefetch_near(from.as_ptr().wrapping_add(AHEAD * stride));
            *to = *from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two registers as one, so that the widest tiles are tested on any machine.
    #[derive(Clone, Copy)]
    struct Pair<V>(V, V);

    // SAFETY (all): each half keeps its contract within its half of the floats.
    impl<V: Simd> Simd for Pair<V> {
        const LANES: usize = 2 * V::LANES;
        unsafe fn zero() -> Self {
            unsafe { Self(V::zero(), V::zero()) }
        }
        unsafe fn splat(from: *const f32) -> Self {
            unsafe { Self(V::splat(from), V::splat(from)) }
        }
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Self(V::load(from), V::load(from.add(V::LANES))) }
        }
        unsafe fn store(self, to: *mut f32) {
            unsafe {
                self.0.store(to);
                self.1.store(to.add(V::LANES));
            }
        }
        unsafe fn add(self, other: Self) -> Self {
            unsafe { Self(self.0.add(other.0), self.1.add(other.1)) }
        }
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            unsafe { Self(self.0.fma(a.0, b.0), self.1.fma(a.1, b.1)) }
        }
    }

    /// Small whole numbers, whose products and sums are exact in any order.
    fn whole(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7 + seed * 13 + i / 11) % 9) as f32 - 4.0).collect()
    }

    type Tiles = unsafe fn(&mut MatrixMut<'_>, &[Option<Factors<'_>>; 2], Ends<'_>);

    fn products_are_exact(width: usize, tiles: Tiles) {
        for (m, n, k) in (1..=13).flat_map(|m| [1, 16, 17, 64, 130].into_iter().flat_map(move |n| [1, 4, 7, 33].map(|k| (m, n, k)))) {
            let (a, a_t, b, bias) = (whole(m * k, 1), whole(m * k, 2), whole(k * n, 3), whole(n, 4));
            let mut packed = vec![f32::NAN; k * round_up(n, width)];
            let stored = Stored { data: &b, row_stride: n, panel: usize::MAX, panel_stride: 0, transposed: false };
            pack_tiles(width, stored, 0..k, 0..n, &mut packed);
            // B stored [n, k] must pack to the same.
            let turned: Vec<f32> = (0..n * k).map(|i| b[i % k * n + i / k]).collect();
            let mut again = vec![f32::NAN; packed.len()];
            pack_tiles(width, Stored { data: &turned, row_stride: k, transposed: true, ..stored }, 0..k, 0..n, &mut again);
            assert_eq!(packed, again, "{m} x {n} x {k}");
            let mut left = vec![0.0; m * k];
            pack_left(&a_t, m, 0..k, 0..m, &mut left);
            let factors = |a| Factors { k, a, b: &packed, row_stride: width, panel: width, panel_stride: width * k };
            let both = [Some(factors(Left::Rows(&a, k))), Some(factors(Left::Packed(&left)))];
            let before = whole(m * (n + 3), 5);
            // A stride of 1 is that of rows.
            let in_place = [both[0], Some(factors(Left::Columns(&a_t, m)))];
            for (add, both) in [(false, both), (true, both), (false, if m > 1 { in_place } else { both })] {
                let mut c = before.clone();
                let mut to = MatrixMut::row_major(&mut c, m, n, n + 3);
                // SAFETY: lengths are as the factors say; the test picks tiles that this processor runs.
                unsafe { tiles(&mut to, &both, Ends { add, bias: Some(&bias) }) };
                for (i, found) in c.iter().enumerate() {
                    let (row, col) = (i / (n + 3), i % (n + 3));
                    let want = if col >= n {
                        before[i]
                    } else {
                        let sum: f32 = (0..k).map(|j| (a[row * k + j] + a_t[j * m + row]) * b[j * n + col]).sum();
                        sum + bias[col] + if add { before[i] } else { 0.0 }
                    };
                    assert_eq!(*found, want, "{m} x {n} x {k}, row {row}, column {col}, add {add}");
                }
            }
        }
    }

    #[test]
    fn packing_with_sums_packs_as_packing_does_and_adds_every_row_once() {
        for isa in [Isa::Baseline, Isa::detect()] {
            let (k, n, stride) = (19, 3 * PANEL, 4 * PANEL);
            let b = whole(k * stride, 6);
            let stored = Stored { data: &b, row_stride: stride, panel: usize::MAX, panel_stride: 0, transposed: false };
            let (ks, cols) = (2..17, PANEL..PANEL + n);
            let mut want = vec![0.0; ks.len() * n];
            pack(isa, stored, ks.clone(), cols.clone(), &mut want);
            let (mut found, mut sums) = (vec![f32::NAN; want.len()], vec![1.0; n]);
            pack_and_sum(isa, &b, stride, ks.clone(), cols.clone(), &mut found, [&mut [], &mut sums]);
            assert_eq!(found, want);
            for (col, sum) in cols.zip(sums) {
                assert_eq!(sum, 1.0 + ks.clone().map(|row| b[row * stride + col]).sum::<f32>(), "column {col}");
            }
        }
    }

    #[test]
    fn products_of_whole_numbers_are_exact_at_every_height_and_width() {
        products_are_exact(16, tiles::<Portable, 4>);
        products_are_exact(64, tiles::<Pair<Pair<Portable>>, 4>);
        #[cfg(target_arch = "x86_64")]
        if Isa::detect() != Isa::Baseline {
            products_are_exact(16, avx2);
        }
        #[cfg(target_arch = "x86_64")]
        if Isa::detect() == Isa::Avx512 {
            products_are_exact(64, avx512);
        }
    }

    #[test]
    fn one_row_by_panels_or_by_rows_is_exact_in_every_instruction_set() {
        let sets = [Isa::Baseline, Isa::detect()].into_iter();
        #[cfg(target_arch = "x86_64")]
        let sets = sets.chain(is_x86_feature_detected!("fma").then_some(Isa::Avx2).filter(|_| Isa::detect() != Isa::Baseline));
        for (isa, n, k) in sets.flat_map(|isa| [64, 128, 192].into_iter().flat_map(move |n| [1, 5, 33, 70].map(|k| (isa, n, k)))) {
            let (a, b, bias, before) = (whole(k, 1), whole(k * n, 2), whole(n, 3), whole(n, 4));
            let want = |add: bool, b: &dyn Fn(usize, usize) -> f32| -> Vec<f32> {
                let sum = |col: usize| a.iter().enumerate().map(|(i, a)| a * b(i, col)).sum::<f32>();
                (0..n).map(|col| sum(col) + bias[col] + if add { before[col] } else { 0.0 }).collect()
            };
            for add in [false, true] {
                let ends = Ends { add, bias: Some(&bias) };
                let mut c = before.clone();
                let factors = Factors::of_panels(k, Left::Rows(&a, k), &b);
                if tile_cols(isa) <= PANEL {
                    multiply(isa, &mut MatrixMut::row_major(&mut c, 1, n, n), [Some(factors), None], ends);
                    assert_eq!(c, want(add, &|i, col| b[col / PANEL * PANEL * k + i * PANEL + col % PANEL]), "{isa:?} {n} x {k} by panels");
                }
                let mut c = before[..n - 3].to_vec();
                dots(isa, &a, &b, k, &mut c, ends);
                assert_eq!(c, want(add, &|i, col| b[col * k + i])[..n - 3], "{isa:?} {n} x {k} by rows");
            }
        }
    }
}
