//! Matrix product with operands rounded to half floats and sums in f32: C = op(A) op(B) (+ bias), or added to C. What mixed precision computes with.
//!
//! Memory holds f32 all the same, and sizes and layouts are those of [`Gemm`]. A product of two half floats is exact in f32, so that results differ from those
//! of [`Gemm`] by the operands' rounding alone: to the nearest, 2^-11 relative, infinite above 65,504. Other bits than [`Gemm`]'s: never chosen by measuring.

use super::gemm::{BINDINGS, Gemm, MATRIX, problem, product};
use super::{
    AdapterClass, Binding, COOPERATIVE, Case, Dispatch, Entry, HALF, Kernel, MAX_LOOP_TRIPS, ODD, Operand, Shader, ShapeError, Tolerance,
};
use crate::pool::CpuContext;

/// Register tiles over workgroup memory of half floats.
pub static GEMM_HALF: Shader =
    Shader { name: "gemm_half", source: include_str!("../../shaders/gemm_half.wgsl"), fragments: &[&HALF, &MATRIX] };
/// Matrices of 16 x 16 that a subgroup of 32 multiplies together.
pub static GEMM_COOPERATIVE: Shader =
    Shader { name: "gemm_cooperative", source: include_str!("../../shaders/gemm_cooperative.wgsl"), fragments: &[&COOPERATIVE, &MATRIX] };

/// Rows and columns of C that one workgroup computes, of [`GEMM_HALF`] and of [`GEMM_COOPERATIVE`].
pub const HALF_BLOCK: [u32; 2] = [64, 64];
pub const COOPERATIVE_BLOCK: [u32; 2] = [32, 32];
/// The largest K of [`GEMM_COOPERATIVE`], whose loops run 18 K / 16 + 34 times.
pub const MAX_COOPERATIVE_K: u32 = (MAX_LOOP_TRIPS - 34) / 18 * 16;

/// [`Gemm`] with operands rounded to half floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HalfGemm {
    pub gemm: Gemm,
    /// On the units that a GPU has for matrices; only where the adapter has [`super::Extension::Cooperative`].
    pub cooperative: bool,
}

/// The nearest half float, of two as near the even one, as f32.
pub fn to_half(x: f32) -> f32 {
    let (bits, sign) = (x.to_bits() & 0x7fff_ffff, x.to_bits() & 0x8000_0000);
    let rounded = if bits >= 0x7f80_0000 {
        // Not a number, or infinite.
        bits
    } else if bits >= 0x477f_f000 {
        // Half way between 65,504 and what would follow it, or more.
        0x7f80_0000
    } else if bits >= 0x3880_0000 {
        // A normal half: 13 bits go, a tie to the even neighbour.
        (bits + 0x0fff + ((bits >> 13) & 1)) & !0x1fff
    } else {
        // A multiple of 2^-24: added to 0.5, where that is the last place, and taken off again.
        (f32::from_bits(bits) + 0.5 - 0.5).to_bits()
    };
    f32::from_bits(rounded | sign)
}

impl Kernel for HalfGemm {
    fn name(&self) -> &'static str {
        "gemm_half"
    }

    fn bindings(&self) -> &'static [Binding] {
        BINDINGS
    }

    fn params(&self) -> &[u8] {
        bytemuck::bytes_of(&self.gemm)
    }

    fn check(&self, lens: &[usize]) -> Result<(), ShapeError> {
        const NAME: &str = "gemm_half";
        self.gemm.check(lens).map_err(|e| ShapeError { kernel: NAME, ..e })?;
        if self.cooperative && self.gemm.k > MAX_COOPERATIVE_K {
            let (got, needed) = (self.gemm.k as usize, MAX_COOPERATIVE_K as usize);
            return Err(ShapeError { kernel: NAME, what: "k of cooperative matrices (at most)".into(), got, needed });
        }
        Ok(())
    }

    fn dispatch(&self, _: AdapterClass) -> Dispatch {
        if self.cooperative {
            self.gemm.in_blocks(&GEMM_COOPERATIVE, COOPERATIVE_BLOCK)
        } else {
            self.gemm.in_blocks(&GEMM_HALF, HALF_BLOCK)
        }
    }

    fn run(&self, ctx: &mut CpuContext, operands: &mut [Operand<'_>]) {
        let [a, b, bias, c] = operands else { unreachable!("gemm_half has four operands") };
        let rounded = |words: &[f32]| -> Vec<f32> { words.iter().map(|&x| to_half(x)).collect() };
        let (a, b, g) = (rounded(a.as_slice()), rounded(b.as_slice()), &self.gemm);
        let bias = (g.use_bias == 1).then(|| &bias.as_slice()[g.bias_offset as usize..][..g.n as usize]);
        product(ctx, g, &a, &b, bias, c.as_mut_slice());
    }
}

/// The catalogue's line.
pub const ENTRY: Entry = Entry {
    name: "gemm_half",
    tolerance: Tolerance {
        absolute: 1e-4,
        relative: 1e-5,
        reason: "sums in f32 of up to 300 exact products, once the operands are rounded to the nearest half; those below 2^-14 may become zero",
    },
    cases: || {
        let odd = ODD.into_iter().enumerate().flat_map(|(i, m)| {
            ODD.into_iter().enumerate().map(move |(j, n)| {
                let trans = [(0, 0), (0, 1), (1, 0), (1, 1)][(i + j) % 4];
                let flags = ((i + j) as u32 % 2, (i * j) as u32 % 2);
                case([m, n, ODD[(i + 2 * j + 1) % ODD.len()]], trans, flags, (false, false, false), (i + 3 * j) % 5 == 4)
            })
        });
        let panels = [false, true].into_iter().flat_map(|cooperative| {
            [
                case([17, 128, 300], (0, 0), (0, 0), (false, true, false), cooperative),
                case([65, 192, 16], (1, 0), (1, 0), (false, false, true), cooperative),
                case([3, 64, 33], (0, 1), (0, 1), (false, true, false), cooperative),
            ]
        });
        odd.chain(panels).collect()
    },
    bench_cases: || {
        let both = [false, true].into_iter();
        both.flat_map(|cooperative| {
            [
                case([512, 512, 512], (0, 0), (0, 0), (false, false, false), cooperative),
                case([5000, 1024, 256], (0, 0), (0, 0), (false, true, false), cooperative),
                case([5000, 256, 1024], (0, 1), (0, 0), (false, true, false), cooperative),
            ]
        })
        .collect()
    },
    sized: |s| {
        let (places, gates, inputs) = (s.places(), 4 * s.padded_hidden(), s.padded_inputs());
        let both = [false, true].into_iter();
        both.map(|cooperative| case([places, gates, inputs], (0, 0), (0, 0), (false, true, false), cooperative)).collect()
    },
    shaders: &[&GEMM_HALF, &GEMM_COOPERATIVE],
};

fn case([m, n, k]: [u32; 3], trans: (u32, u32), flags: (u32, u32), panels: (bool, bool, bool), cooperative: bool) -> Case {
    let (label, gemm, operands) = problem(m, n, k, trans, flags, panels);
    let label = if cooperative { format!("{label} cooperative") } else { label };
    Case { label, operands, flop: gemm.flop(), kernel: Box::new(HalfGemm { gemm, cooperative }) }
}

#[cfg(test)]
mod tests {
    use super::to_half;

    #[test]
    fn halves_are_the_nearest_ones_of_two_as_near_the_even_one() {
        for (x, expected) in [
            (0.0, 0.0),
            (1.0, 1.0),
            (-1.0 / 3.0, -0.333_251_95),
            // Ties: to the even neighbour, down and up.
            (1.0 + 1.0 / 2048.0, 1.0),
            (1.0 + 3.0 / 2048.0, 1.0 + 2.0 / 1024.0),
            (65_504.0, 65_504.0),
            (65_519.99, 65_504.0),
            (65_520.0, f32::INFINITY),
            (-1e9, f32::NEG_INFINITY),
            // The smallest normal one, the smallest of all, half of that, and a hair more.
            (6.103_515_6e-5, 6.103_515_6e-5),
            (5.960_464_5e-8, 5.960_464_5e-8),
            (2.980_232_2e-8, 0.0),
            (2.980_233e-8, 5.960_464_5e-8),
            (f32::INFINITY, f32::INFINITY),
        ] {
            assert_eq!(to_half(x), expected, "{x:e}");
            assert_eq!(to_half(-x), -expected, "{x:e}");
        }
        assert!(to_half(f32::NAN).is_nan() && to_half(-0.0).is_sign_negative());
        // A half is its own nearest one, and no other lies nearer to anything between.
        for bits in (0x3380_0000_u32..0x4780_0000).step_by(99_991) {
            let x = f32::from_bits(bits);
            let half = to_half(x);
            assert_eq!(to_half(half), half, "{x:e}");
            let spacing = if x < 6.103_515_6e-5 { 5.960_464_5e-8 } else { (x.log2().floor() - 10.0).exp2() };
            assert!(half.is_infinite() || (half - x).abs() <= spacing / 2.0, "{x:e} became {half:e}");
        }
    }
}
