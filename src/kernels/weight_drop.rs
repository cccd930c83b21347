//! Weight drop (Merity, Keskar and Socher 2017; DropConnect, Wan et al. 2013): a step keeps some of a matrix's weights, divided by the probability of
//! keeping them, and its gradient goes through the same mask.
//!
//! One mask serves all steps of time, so it is applied to the matrix once a training step, which the sweep then reads T times: one pass over the
//! weights instead of draws in every product. Whether a weight is kept is a function of (seed, step, lane, place), the same on every device and rank.

use bytemuck::{Pod, Zeroable};

use super::{
    AdapterClass, Case, Dispatch, Entry, Fill, Fragment, Kernel, Operand, Shader, ShapeError, Tolerance, at_least, grid_1d, kernel_basics,
    multiple_of, operand, read, read_write,
};
use crate::for_isa;
use crate::pool::{CpuContext, Rows};
use crate::rng::{Purpose, StepKey, philox, tag};

/// The generator of `rng.rs` in WGSL.
pub static PHILOX: Fragment = Fragment { name: "philox", source: include_str!("../../shaders/shared/philox.wgsl") };
/// The shader of [`WeightDrop`].
pub static WEIGHT_DROP: Shader =
    Shader { name: "weight_drop", source: include_str!("../../shaders/weight_drop.wgsl"), fragments: &[&PHILOX] };

/// Vectors of four floats that one workgroup covers.
pub const DROP_VECTORS: u32 = 64;

/// Vectors of four below which the mask stays on one thread.
const MIN_VECTORS: usize = 1024;

/// `kept[to + i] = weights[start + i] * scale` where kept, else 0, for `i` in `0..len`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct WeightDrop {
    /// A multiple of 4.
    pub len: u32,
    pub start: u32,
    pub to: u32,
    /// The step's key.
    pub key0: u32,
    pub key1: u32,
    /// Purpose and lane.
    pub tag: u32,
    /// Kept where the random word is at least this.
    pub threshold: u32,
    pub scale: f32,
}

impl WeightDrop {
    /// Drops with probability `p` in `0..1`.
    pub fn new(p: f64, key: StepKey, lane: u32, len: u32, start: u32, to: u32) -> Self {
        let (threshold, scale) = drop_numbers(p);
        Self { len, start, to, key0: key.0[0], key1: key.0[1], tag: tag(Purpose::WeightDrop, lane), threshold, scale }
    }
}

/// The word below which a value is dropped with probability `p` in `0..1`, and the factor of those that are kept.
pub fn drop_numbers(p: f64) -> (u32, f32) {
    ((p * 4_294_967_296.0).round().min(f64::from(u32::MAX)) as u32, (1.0 / (1.0 - p)) as f32)
}

impl Kernel for WeightDrop {
    kernel_basics!("weight_drop", const { &[read("weights"), read_write("kept")] });

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        for number in [self.len, self.start, self.to] {
            multiple_of("weight_drop", "a length or offset", number, 4)?;
        }
        at_least("weight_drop", "weights", lens[0], (self.start + self.len) as usize)?;
        at_least("weight_drop", "kept", lens[1], (self.to + self.len) as usize)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &WEIGHT_DROP, overrides: &[], grid: grid_1d(u64::from((self.len / 4).div_ceil(DROP_VECTORS))) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [weights, kept] = operands else { unreachable!("two operands") };
        let (len, isa) = (self.len as usize, ctx.isa);
        let weights = &weights.as_slice()[self.start as usize..][..len];
        let kept = &mut kept.as_mut_slice()[self.to as usize..][..len];
        ctx.pool.run(Rows { data: kept, width: 4 }, len / 4, MIN_VECTORS, &|part: Rows<'_>, range: std::ops::Range<usize>| {
            let (this, first) = (self, range.start);
            let (from, to) = (&weights[range.start * 4..range.end * 4], part.data);
            for_isa!(isa, drop_part(this: &WeightDrop, first: usize, from: &[f32], to: &mut [f32]));
        });
    }
}

#[inline(always)]
fn drop_part(d: &WeightDrop, first: usize, weights: &[f32], kept: &mut [f32]) {
    for (i, (x, y)) in weights.chunks_exact(4).zip(kept.chunks_exact_mut(4)).enumerate() {
        let words = philox([(first + i) as u32, 0, 0, d.tag], [d.key0, d.key1]);
        for j in 0..4 {
            y[j] = if words[j] >= d.threshold { x[j] * d.scale } else { 0.0 };
        }
    }
}

/// The catalogue's line.
pub const ENTRY: Entry = Entry {
    name: "weight_drop",
    tolerance: Tolerance { absolute: 0.0, relative: 2e-7, reason: "one product; what is dropped must be equal bit for bit" },
    cases: || [4, 64, 260, 4096, 66_564, 17_825_792].map(case).into(),
    bench_cases: || vec![case(4 * 256 * 256)],
    sized: |s| vec![case(4 * s.padded_hidden() * s.padded_hidden())],
    shaders: &[&WEIGHT_DROP],
};

fn case(len: u32) -> Case {
    Case {
        label: format!("{len} weights"),
        kernel: Box::new(WeightDrop::new(0.3, StepKey::new(7, 11), 2, len, 4, 8)),
        operands: vec![operand(len as usize + 4, Fill::Uniform { low: 0.5, high: 1.0 }), operand(len as usize + 8, Fill::Poison)],
        flop: 0,
    }
}
