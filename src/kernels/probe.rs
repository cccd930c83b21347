//! What a processor core can do at best: the floors that kernels are held against, measured in the same run.

use std::hint::black_box;
use std::time::Instant;

use super::microkernel;
use crate::for_isa;
use crate::pool::Isa;

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
