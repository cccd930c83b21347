//! What a device can do at best: the floors that kernels are held against, measured in the same run. Of a processor core it is measured here; of an
//! adapter it is what [`MultiplyAdd`] reaches.

use std::hint::black_box;
use std::ops::Range;
use std::time::Instant;

use bytemuck::{Pod, Zeroable};

use super::{
    AdapterClass, Case, Dispatch, Entry, Fill, Kernel, ODD, Operand, Shader, ShapeError, Tolerance, at_least, grid_1d, kernel_basics,
    loop_trips, microkernel, operand, read_write,
};
use crate::for_isa;
use crate::pool::{CpuContext, Isa, Rows};

/// How often a measurement is repeated; the fastest counts, since everything else on the machine only slows it.
const ROUNDS: usize = 7;
/// About how long one round takes.
const ROUND_SECONDS: f64 = 4e-3;

/// The fastest of some rounds, seconds of one call.
fn fastest(mut call: impl FnMut()) -> f64 {
    call();
    let start = Instant::now();
    call();
    let n = (ROUND_SECONDS / start.elapsed().as_secs_f64().max(1e-9)).clamp(1.0, 1e6) as usize;
    let round = |_| {
        let start = Instant::now();
        (0..n).for_each(|_| call());
        start.elapsed().as_secs_f64() / n as f64
    };
    (0..ROUNDS).map(round).fold(f64::INFINITY, f64::min)
}

/// Floating-point operations a second of one core that does nothing but multiply and add registers.
pub fn flops(isa: Isa) -> f64 {
    const TRIPS: usize = 10_000;
    let mut flop = 0;
    let seconds = fastest(|| flop = black_box(microkernel::multiply_registers(isa, black_box(TRIPS))));
    flop as f64 / seconds
}

/// Bytes a second at which one core reads memory that it has just read: that of the cache which is large enough, or else the main memory.
pub fn read_bandwidth(isa: Isa, bytes: usize) -> f64 {
    let data = vec![1.0f32; (bytes / size_of::<f32>()).next_multiple_of(STRETCH)];
    let mut total = 0.0;
    let seconds = fastest(|| {
        let (words, total) = (black_box(data.as_slice()), &mut total);
        for_isa!(isa, add_up(words: &[f32], total: &mut f32));
    });
    black_box(total);
    (data.len() * size_of::<f32>()) as f64 / seconds
}

/// Floats that are added beside each other.
const STRETCH: usize = 64;

#[inline(always)]
fn add_up(words: &[f32], total: &mut f32) {
    let mut sums = [0f32; STRETCH];
    for stretch in words.chunks_exact(STRETCH) {
        sums.iter_mut().zip(stretch).for_each(|(sum, word)| *sum += word);
    }
    *total = sums.iter().sum();
}

/// out `[len]`: each the sum of 32 numbers after `x = x * shrink + shift`, `trips` times; number n of output i starts as n / 32 + (i mod 16) / 16.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct MultiplyAdd {
    pub len: u32,
    pub trips: u32,
    pub shrink: f32,
    pub shift: f32,
}

/// Numbers that one invocation keeps in registers.
pub const CHAINS: u32 = 32;
/// Outputs of one workgroup.
pub const MULTIPLY_ADD_WORKGROUP: u32 = 64;

/// Registers multiplied and added.
pub static MULTIPLY_ADD: Shader = Shader { name: "multiply_add", source: include_str!("../../shaders/multiply_add.wgsl"), fragments: &[] };

impl MultiplyAdd {
    /// As many outputs and trips as asked for; the numbers stay near 1.
    pub fn new(len: u32, trips: u32) -> Self {
        Self { len, trips, shrink: 0.5, shift: 0.625 }
    }

    /// Floating-point operations.
    pub fn flop(&self) -> u64 {
        2 * u64::from(CHAINS) * u64::from(self.len) * u64::from(self.trips)
    }
}

impl Kernel for MultiplyAdd {
    kernel_basics!("multiply_add", const { &[read_write("out")] });

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        at_least("multiply_add", "out", lens[0], self.len as usize)?;
        loop_trips("multiply_add", "trips", self.trips)
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        Dispatch { shader: &MULTIPLY_ADD, overrides: &[], grid: grid_1d(u64::from(self.len.div_ceil(MULTIPLY_ADD_WORKGROUP))) }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [out] = operands else { unreachable!("one operand") };
        let (len, Self { trips, shrink, shift, .. }) = (self.len as usize, *self);
        let out = &mut out.as_mut_slice()[..len];
        ctx.pool.run(Rows { data: out, width: 1 }, len, 64, &|part: Rows<'_>, places: Range<usize>| {
            for (out, place) in part.data.iter_mut().zip(places) {
                let mut numbers: [f32; CHAINS as usize] = std::array::from_fn(|n| n as f32 / 32.0 + (place % 16) as f32 / 16.0);
                for _ in 0..trips {
                    numbers.iter_mut().for_each(|x| *x = *x * shrink + shift);
                }
                *out = numbers.iter().sum();
            }
        });
    }
}

/// The catalogue's line.
pub const MULTIPLY_ADD_ENTRY: Entry = Entry {
    name: "multiply_add",
    tolerance: Tolerance {
        absolute: 0.0,
        relative: 2e-6,
        reason: "sums of 32 numbers, each rounded at every trip and drawn to the same limit",
    },
    cases: || ODD.iter().zip([0, 1, 2, 100, 1000]).map(|(&len, trips)| multiply_add_case(len, trips)).collect(),
    bench_cases: || vec![multiply_add_case(1 << 14, 256)],
    sized: |_| vec![multiply_add_case(1 << 14, 256)],
    shaders: &[&MULTIPLY_ADD],
};

fn multiply_add_case(len: u32, trips: u32) -> Case {
    let kernel = MultiplyAdd::new(len, trips);
    let operands = vec![operand(len as usize, Fill::Poison)];
    Case { label: format!("{len}x{trips}"), kernel: Box::new(kernel), operands, flop: kernel.flop() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floors_are_what_a_processor_may_have() {
        let isa = Isa::detect();
        let flops = flops(isa);
        assert!((1e8..1e13).contains(&flops), "{flops} a second");
        // Less than what a register holds an instruction.
        let bandwidth = read_bandwidth(isa, 1 << 20);
        assert!((1e8..1e13).contains(&bandwidth), "{bandwidth} bytes a second");
    }

    #[test]
    fn what_is_read_is_all_of_it() {
        let words: Vec<f32> = (0..256).map(|i| i as f32).collect();
        let mut total = 0.0;
        add_up(&words, &mut total);
        assert_eq!(total, 255.0 * 128.0);
    }
}
