//! Exponential, sigmoid and tanh for CPU kernels: polynomials that the compiler turns into vectors.
//!
//! With `FUSED`, products and sums are fused, for code that is compiled where the processor has an instruction for it (`for_isa!(isa, fused ...)`
//! knows); without that instruction a fused operation would be a call. Errors against f64 over the whole range, both ways: `exp` 1.5 ulp on -87..=88
//! (beyond, clamped), `sigmoid` 2.5 ulp, `tanh` 3 ulp. NaN stays NaN: comparisons with NaN are false, so the clamps let it pass.
//! The WGSL twin is `shaders/shared/activations.wgsl`.

/// `a * b + c`.
#[inline(always)]
pub fn fma<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// `x` within `low..=high`; keeps NaN.
#[inline(always)]
fn clamp(x: f32, low: f32, high: f32) -> f32 {
    let x = if x > high { high } else { x };
    if x < low { low } else { x }
}

/// e^x as `scale * (1 + p)`: the scale is a power of two, p = e^r - 1 with |r| <= ln 2 / 2. For |x| <= 88.
#[inline(always)]
fn parts<const FUSED: bool>(x: f32) -> (f32, f32) {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, the first exact in 9 bits, so that n * LN2_HIGH is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // 1.5 * 2^23: adding it rounds to the nearest integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = fma::<FUSED>(x, LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FUSED>(n, -LN2_LOW, fma::<FUSED>(n, -LN2_HIGH, x));
    // p = r + r^2 q(r), q by interpolation at Chebyshev's nodes.
    let q = fma::<FUSED>(0.001_392_625, r, 0.008_363_233);
    let q = fma::<FUSED>(q, r, 0.041_666_552);
    let q = fma::<FUSED>(q, r, 0.166_665_76);
    let q = fma::<FUSED>(q, r, 0.5);
    let p = fma::<FUSED>(q, r * r, r);
    (f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000)), p)
}

/// e^x; x is clamped to -87..=88, where the result is a normal number.
#[inline(always)]
pub fn exp<const FUSED: bool>(x: f32) -> f32 {
    let (scale, p) = parts::<FUSED>(clamp(x, -87.0, 88.0));
    fma::<FUSED>(scale, p, scale)
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid<const FUSED: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FUSED>(-x))
}

/// Hyperbolic tangent: (e^2x - 1) / (e^2x + 1), whose e^2x - 1 is exact to its last bits near 0 too. Beyond 10 it is 1.
#[inline(always)]
pub fn tanh<const FUSED: bool>(x: f32) -> f32 {
    let x = clamp(x, -10.0, 10.0);
    let (scale, p) = parts::<FUSED>(x + x);
    let less_1 = fma::<FUSED>(scale, p, scale - 1.0);
    less_1 / (less_1 + 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Function = fn(f32) -> f32;

    /// Distance from the exact value, in units of its last place (of the smallest normal number's below that).
    fn ulp(found: f32, exact: f64) -> f64 {
        let place = exact.abs().max(f64::from(f32::MIN_POSITIVE)).log2().floor() as i32;
        (f64::from(found) - exact).abs() / (f64::from(f32::EPSILON) * 2f64.powi(place))
    }

    /// Every 997th float up to `most`, on both sides of 0.
    fn worst_ulp(f: Function, oracle: fn(f64) -> f64, most: f32) -> f64 {
        let floats = (0..=most.to_bits()).step_by(997).map(f32::from_bits);
        floats.flat_map(|x| [x, -x]).fold(0.0, |worst: f64, x| worst.max(ulp(f(x), oracle(f64::from(x)))))
    }

    #[test]
    fn errors_stay_within_what_the_docs_say_over_the_whole_range() {
        for (exp, sigmoid, tanh) in [
            (exp::<true> as Function, sigmoid::<true> as Function, tanh::<true> as Function),
            (exp::<false>, sigmoid::<false>, tanh::<false>),
        ] {
            for (name, worst, most) in [
                ("exp", worst_ulp(exp, f64::exp, 87.0), 1.5),
                ("sigmoid", worst_ulp(sigmoid, |x| 1.0 / (1.0 + (-x).exp()), 87.0), 2.5),
                ("tanh", worst_ulp(tanh, f64::tanh, f32::MAX), 3.0),
            ] {
                assert!(worst < most, "{name}: {worst} ulp");
            }
        }
    }

    #[test]
    fn not_a_number_and_infinity_are_kept_apart() {
        for f in [exp::<true>, exp::<false>, sigmoid::<true>, sigmoid::<false>, tanh::<true>, tanh::<false>] {
            assert!(f(f32::NAN).is_nan());
        }
        for (exp, sigmoid, tanh) in [
            (exp::<true> as Function, sigmoid::<true> as Function, tanh::<true> as Function),
            (exp::<false>, sigmoid::<false>, tanh::<false>),
        ] {
            assert_eq!((tanh(f32::INFINITY), tanh(f32::NEG_INFINITY)), (1.0, -1.0));
            assert_eq!((tanh(0.0), sigmoid(0.0), sigmoid(f32::INFINITY)), (0.0, 0.5, 1.0));
            assert!(sigmoid(f32::NEG_INFINITY) < 1e-37 && exp(f32::INFINITY).is_finite());
        }
    }
}
