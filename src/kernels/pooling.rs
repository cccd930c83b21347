//! From the outputs of all steps to one row a sequence: the mean over a row's valid steps, its last or its first one; and the gradient.
//!
//! ```text
//! all:           pooled[b] = (x[0, b] + ... + x[n - 1, b]) / n       n = length of row b, added in the order of time
//! last, first:   pooled[b] = x[n - 1, b],  x[0, b]
//! ```
//! A row without steps gives zeros. What lies behind a row's end is neither read nor gets a gradient other than zero.

use bytemuck::{Pod, Zeroable};

use super::{
    AdapterClass, Case, Dispatch, Entry, Fill, Kernel, ODD, Operand, Shader, ShapeError, Tolerance, at_least, grid_1d, kernel_basics,
    loop_trips, multiple_of, operand, read, read_write,
};
use crate::for_isa;
use crate::pool::{CpuContext, Rows};
use crate::shape::pad_units;

/// The shader of [`PoolSteps`].
pub static POOL: Shader = Shader { name: "pool_steps", source: include_str!("../../shaders/pool_steps.wgsl"), fragments: &[] };
/// The shader of [`PoolStepsGradient`].
pub static GRADIENT: Shader =
    Shader { name: "pool_steps_gradient", source: include_str!("../../shaders/pool_steps_gradient.wgsl"), fragments: &[] };

/// Vectors of four floats that one workgroup covers.
pub const POOL_VECTORS: u32 = 64;

/// [`PoolSteps::which`]: the mean over all valid steps.
pub const ALL_STEPS: u32 = 0;
/// [`PoolSteps::which`]: the last valid step.
pub const LAST_STEP: u32 = 1;
/// [`PoolSteps::which`]: the first step, which a reverse layer comes to last.
pub const FIRST_STEP: u32 = 2;

/// Valid steps of a row that count: `start .. end`, each times `factor`.
fn counted(which: u32, length: usize) -> (std::ops::Range<usize>, f32) {
    match which {
        LAST_STEP => (length.saturating_sub(1)..length, 1.0),
        FIRST_STEP => (0..length.min(1), 1.0),
        _ => (0..length, 1.0 / length.max(1) as f32),
    }
}

/// `x` `[T, B, width]` to `pooled` `[B, width]`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct PoolSteps {
    /// T.
    pub n_steps: u32,
    /// B.
    pub n_rows: u32,
    /// A multiple of 4.
    pub width: u32,
    /// Offsets in the operands.
    pub x: u32,
    pub pooled: u32,
    /// [`ALL_STEPS`], [`LAST_STEP`] or [`FIRST_STEP`].
    pub which: u32,
    /// 1: the first B words of `lengths` are the numbers of valid steps, at most T; 0: all are.
    pub use_lengths: u32,
}

impl PoolSteps {
    fn check_lens(&self, kernel: &'static str, x: usize, lengths: usize, pooled: usize) -> Result<(), ShapeError> {
        for (what, value) in [("width", self.width), ("an offset", self.x), ("an offset", self.pooled)] {
            multiple_of(kernel, what, value, 4)?;
        }
        let row = self.n_rows as usize * self.width as usize;
        at_least(kernel, "x", x, self.x as usize + self.n_steps as usize * row)?;
        at_least(kernel, "pooled", pooled, self.pooled as usize + row)?;
        at_least(kernel, "lengths", lengths, if self.use_lengths == 1 { self.n_rows as usize } else { 0 })
    }

    fn length(&self, lengths: &[u32], row: usize) -> usize {
        if self.use_lengths == 1 { lengths[row].min(self.n_steps) as usize } else { self.n_steps as usize }
    }
}

impl Kernel for PoolSteps {
    kernel_basics!("pool_steps", const { &[read("x"), read("lengths"), read_write("pooled")] });

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        self.check_lens("pool_steps", lens[0], lens[1], lens[2])?;
        loop_trips("pool_steps", "n_steps", self.n_steps)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        let vectors = u64::from(self.n_rows) * u64::from(self.width / 4);
        Dispatch { shader: &POOL, overrides: &[], grid: grid_1d(vectors.div_ceil(u64::from(POOL_VECTORS))) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [x, lengths, pooled] = operands else { unreachable!("three operands") };
        let (rows, width) = (self.n_rows as usize, self.width as usize);
        let (x, lengths, isa) = (&x.as_slice()[self.x as usize..], lengths.as_indices(), ctx.isa);
        let pooled = &mut pooled.as_mut_slice()[self.pooled as usize..][..rows * width];
        let min_rows = (1usize << 14).div_ceil((width * self.n_steps as usize).max(1));
        ctx.pool.run(Rows { data: pooled, width }, rows, min_rows, &|part: Rows<'_>, range: std::ops::Range<usize>| {
            for (row, sums) in range.zip(part.data.chunks_exact_mut(width)) {
                let (steps, factor) = counted(self.which, self.length(lengths, row));
                sums.fill(0.0);
                for t in steps {
                    let values = &x[(t * rows + row) * width..][..width];
                    for_isa!(isa, add_to(sums: &mut [f32], values: &[f32]));
                }
                sums.iter_mut().for_each(|sum| *sum *= factor);
            }
        });
    }
}

#[inline(always)]
fn add_to(sums: &mut [f32], values: &[f32]) {
    sums.iter_mut().zip(values).for_each(|(sum, v)| *sum += v);
}

/// The gradient of [`PoolSteps`], with the same parameters: all of `x` is written, with zeros for the steps that do not count.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct PoolStepsGradient(pub PoolSteps);

impl Kernel for PoolStepsGradient {
    kernel_basics!("pool_steps_gradient", const { &[read("pooled"), read("lengths"), read_write("x")] });

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        self.0.check_lens("pool_steps_gradient", lens[2], lens[1], lens[0])
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        let PoolSteps { n_steps, n_rows, width, .. } = self.0;
        let vectors = u64::from(n_steps) * u64::from(n_rows) * u64::from(width / 4);
        Dispatch { shader: &GRADIENT, overrides: &[], grid: grid_1d(vectors.div_ceil(u64::from(POOL_VECTORS))) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [pooled, lengths, x] = operands else { unreachable!("three operands") };
        let k = &self.0;
        let (rows, width, n_steps) = (k.n_rows as usize, k.width as usize, k.n_steps as usize);
        let (pooled, lengths) = (&pooled.as_slice()[k.pooled as usize..], lengths.as_indices());
        let x = &mut x.as_mut_slice()[k.x as usize..][..n_steps * rows * width];
        let min_rows = (1usize << 14).div_ceil(width.max(1));
        ctx.pool.run(Rows { data: x, width }, n_steps * rows, min_rows, &|part: Rows<'_>, range: std::ops::Range<usize>| {
            for (place, out) in range.zip(part.data.chunks_exact_mut(width)) {
                let (t, row) = (place / rows, place % rows);
                let (steps, factor) = counted(k.which, k.length(lengths, row));
                if steps.contains(&t) {
                    out.iter_mut().zip(&pooled[row * width..]).for_each(|(out, d)| *out = d * factor);
                } else {
                    out.fill(0.0);
                }
            }
        });
    }
}

/// Shapes, what is read, and whether rows end.
fn sizes() -> impl Iterator<Item = ([u32; 3], u32, bool)> {
    let odd = ODD.iter().enumerate().map(|(i, &t)| ([t, ODD[(i + 2) % 5], ODD[(i + 3) % 5]], i as u32 % 3, i != 3));
    // More than 2^17 places, and more than 65,535 workgroups for the gradient.
    odd.chain([([2100, 65, 128], ALL_STEPS, true), ([7, 20_000, 16], LAST_STEP, true), ([9, 4, 16], FIRST_STEP, false)])
}

fn operands([t, b, width]: [u32; 3], which: u32, use_lengths: bool) -> (PoolSteps, [usize; 2], Vec<u32>) {
    let width = pad_units(width as usize) as u32;
    let kernel = PoolSteps { n_steps: t, n_rows: b, width, x: 4, pooled: 8, which, use_lengths: u32::from(use_lengths) };
    // From none to all of the steps, in no order.
    let lengths = (0..b).map(|row| (row * 7 + t) % (t + 1)).collect();
    (kernel, [(t * b * width) as usize + 4, (b * width) as usize + 8], lengths)
}

/// The catalogue's line.
pub const ENTRY: Entry = Entry {
    name: "pool_steps",
    tolerance: Tolerance { absolute: 2e-6, relative: 1e-5, reason: "up to 2,100 numbers added one after another, divided by as many" },
    cases: || sizes().map(|(size, which, use_lengths)| pool_case(size, which, use_lengths)).collect(),
    bench_cases: || vec![pool_case([100, 64, 256], ALL_STEPS, true)],
    sized: |s| vec![pool_case([s.n_steps, s.n_rows, s.padded_hidden()], ALL_STEPS, true)],
    shaders: &[&POOL],
};

fn pool_case(size: [u32; 3], which: u32, use_lengths: bool) -> Case {
    let (kernel, [n_x, n_pooled], lengths) = operands(size, which, use_lengths);
    Case {
        label: format!("{size:?} which {which} lengths {use_lengths}"),
        kernel: Box::new(kernel),
        operands: vec![
            operand(n_x, Fill::Uniform { low: -1.0, high: 1.0 }),
            operand(lengths.len(), Fill::Words(lengths)),
            operand(n_pooled, Fill::Poison),
        ],
        flop: 0,
    }
}

/// The catalogue's line.
pub const GRADIENT_ENTRY: Entry = Entry {
    name: "pool_steps_gradient",
    tolerance: Tolerance { absolute: 0.0, relative: 5e-7, reason: "a division and a product" },
    cases: || sizes().map(|(size, which, use_lengths)| gradient_case(size, which, use_lengths)).collect(),
    bench_cases: || vec![gradient_case([100, 64, 256], ALL_STEPS, true)],
    sized: |s| vec![gradient_case([s.n_steps, s.n_rows, s.padded_hidden()], ALL_STEPS, true)],
    shaders: &[&GRADIENT],
};

fn gradient_case(size: [u32; 3], which: u32, use_lengths: bool) -> Case {
    let (kernel, [n_x, n_pooled], lengths) = operands(size, which, use_lengths);
    Case {
        label: format!("{size:?} which {which} lengths {use_lengths}"),
        kernel: Box::new(PoolStepsGradient(kernel)),
        operands: vec![
            operand(n_pooled, Fill::Uniform { low: -1.0, high: 1.0 }),
            operand(lengths.len(), Fill::Words(lengths)),
            operand(n_x, Fill::Poison),
        ],
        flop: 0,
    }
}
