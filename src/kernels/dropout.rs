//! Dropout (Srivastava et al. 2014) of what goes into a network, inverted: kept values are divided by the probability of keeping them. What
//! layers hand up is dropped by the kernels of their steps.
//!
//! Whether a value is kept is a function of (seed, step, layer, global stream, time, unit), so CPU and GPU, and any split of the batch, drop the same ones.
//! The gradient goes through the same kernel.

use bytemuck::{Pod, Zeroable};

use super::weight_drop::{PHILOX, drop_numbers};
use super::{
    AdapterClass, Case, Dispatch, Entry, Fill, Kernel, ODD, Operand, Shader, ShapeError, Tolerance, at_least, grid_1d, kernel_basics,
    multiple_of, operand, read, read_write,
};
use crate::for_isa;
use crate::pool::{CpuContext, Rows};
use crate::rng::{Purpose, StepKey, philox, tag};
use crate::shape::pad_units;

/// The shader of [`Dropout`].
pub static DROPOUT: Shader = Shader { name: "dropout", source: include_str!("../../shaders/dropout.wgsl"), fragments: &[&PHILOX] };

/// Vectors of four floats that one workgroup covers.
pub const DROPOUT_VECTORS: u32 = 64;

/// `destination[to + (t, b, u)] = source[start + (t, b, u)] * scale` where kept, else 0, over `[n_steps, n_rows, width]`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Dropout {
    pub n_steps: u32,
    pub n_rows: u32,
    /// Units, padded to a multiple of 4.
    pub width: u32,
    pub start: u32,
    pub to: u32,
    /// The step's key.
    pub key0: u32,
    pub key1: u32,
    /// Purpose and layer.
    pub tag: u32,
    /// Kept where the random word is at least this.
    pub threshold: u32,
    pub scale: f32,
}

impl Dropout {
    /// Drops with probability `p` in `0..1`.
    pub fn new(p: f64, key: StepKey, layer: u32, [n_steps, n_rows, width]: [u32; 3], start: u32, to: u32) -> Self {
        let (threshold, scale) = drop_numbers(p);
        Self { n_steps, n_rows, width, start, to, key0: key.0[0], key1: key.0[1], tag: tag(Purpose::Dropout, layer), threshold, scale }
    }
}

impl Kernel for Dropout {
    kernel_basics!("dropout", const { &[read("streams"), read("source"), read_write("destination")] });

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        multiple_of("dropout", "width", self.width, 4)?;
        multiple_of("dropout", "an offset", self.start, 4)?;
        multiple_of("dropout", "an offset", self.to, 4)?;
        let len = self.n_steps as usize * self.n_rows as usize * self.width as usize;
        at_least("dropout", "streams", lens[0], self.n_rows as usize)?;
        at_least("dropout", "source", lens[1], self.start as usize + len)?;
        at_least("dropout", "destination", lens[2], self.to as usize + len)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        let vectors = u64::from(self.n_steps) * u64::from(self.n_rows) * u64::from(self.width / 4);
        Dispatch { shader: &DROPOUT, overrides: &[], grid: grid_1d(vectors.div_ceil(u64::from(DROPOUT_VECTORS))) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [streams, source, target] = operands else { unreachable!("three operands") };
        let (n_rows, width) = (self.n_rows as usize, self.width as usize);
        let len = self.n_steps as usize * n_rows * width;
        let (streams, source) = (streams.as_indices(), &source.as_slice()[self.start as usize..][..len]);
        let target = &mut target.as_mut_slice()[self.to as usize..][..len];
        let isa = ctx.isa;
        let min_rows = 4096usize.div_ceil(width.max(1));
        ctx.pool.run(
            Rows { data: target, width },
            self.n_steps as usize * n_rows,
            min_rows,
            &|part: Rows<'_>, range: std::ops::Range<usize>| {
                for (row, out) in range.zip(part.data.chunks_exact_mut(width)) {
                    let input = &source[row * width..][..width];
                    let (time, stream) = ((row / n_rows) as u32, streams[row % n_rows]);
                    let this = self;
                    for_isa!(isa, drop_row(this: &Dropout, time: u32, stream: u32, input: &[f32], out: &mut [f32]));
                }
            },
        );
    }
}

#[inline(always)]
fn drop_row(d: &Dropout, time: u32, stream: u32, input: &[f32], out: &mut [f32]) {
    for (block, (x, y)) in input.chunks_exact(4).zip(out.chunks_exact_mut(4)).enumerate() {
        let words = philox([block as u32, time, stream, d.tag], [d.key0, d.key1]);
        for i in 0..4 {
            y[i] = if words[i] >= d.threshold { x[i] * d.scale } else { 0.0 };
        }
    }
}

/// The catalogue's line.
pub const ENTRY: Entry = Entry {
    name: "dropout",
    tolerance: Tolerance { absolute: 0.0, relative: 2e-7, reason: "one product; what is dropped must be equal bit for bit" },
    cases: || ODD.iter().enumerate().map(|(i, &t)| case(t, ODD[(i + 1) % 5], ODD[(i + 3) % 5])).chain([case(1100, 65, 256)]).collect(),
    bench_cases: || vec![case(100, 50, 256)],
    sized: |s| vec![case(s.n_steps, s.n_rows, s.padded_inputs())],
    shaders: &[&DROPOUT],
};

fn case(n_steps: u32, n_rows: u32, width: u32) -> Case {
    let width = pad_units(width as usize) as u32;
    let len = (n_steps * n_rows * width) as usize;
    Case {
        label: format!("T{n_steps} B{n_rows} H{width}"),
        kernel: Box::new(Dropout::new(0.3, StepKey::new(7, 11), 2, [n_steps, n_rows, width], 4, 8)),
        operands: vec![
            operand(n_rows as usize, Fill::Indices { below: 100_000 }),
            operand(len + 4, Fill::Uniform { low: 0.5, high: 1.0 }),
            operand(len + 8, Fill::Poison),
        ],
        flop: 0,
    }
}
