//! Exponential, sigmoid and tanh for CPU kernels: polynomials that the compiler turns into vectors.
//!
//! Errors against f64: `exp` 1 ulp on -87..=88 (beyond, clamped), `sigmoid` and `tanh` below 3 ulp, 1.5e-7 absolute. NaN stays NaN: comparisons with NaN
//! are false, so the clamps let it pass. The WGSL twin is `shaders/shared/activations.wgsl`.

/// e^x; x is clamped to -87..=88, where the result is a normal number.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, the first exact in 9 bits, so that n * LN2_HIGH is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // 1.5 * 2^23: adding it rounds to the nearest integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = if x > 88.0 { 88.0 } else { x };
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    // e^r = 1 + r + r^2 q(r) on |r| <= ln 2 / 2, q by interpolation at Chebyshev's nodes.
    let q = (((0.001_392_625 * r + 0.008_363_233) * r + 0.041_666_552) * r + 0.166_665_76) * r + 0.5;
    let y = q * r * r + r + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    y * scale
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Hyperbolic tangent: an odd polynomial below 0.6, `1 - 2 / (e^2|x| + 1)` above.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let s = x * x;
    let p = ((((0.002_370_765_7 * s - 0.008_410_071) * s + 0.021_788_321) * s - 0.053_961_553) * s + 0.133_333_13) * s - 0.333_333_34;
    let small = p * s * x + x;
    let a = x.abs();
    let large = (1.0 - 2.0 / (exp(2.0 * a) + 1.0)).copysign(x);
    if a < 0.6 { small } else { large }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worst_ulp(f: fn(f32) -> f32, oracle: fn(f64) -> f64, low: f32, high: f32) -> f64 {
        let n = 400_000;
        (0..=n).map(|i| low + (high - low) * (i as f32 / n as f32)).fold(0.0, |worst: f64, x| {
            let exact = oracle(f64::from(x));
            let ulp = f64::from(f32::EPSILON) * 2f64.powi(exact.abs().log2().floor() as i32);
            worst.max((f64::from(f(x)) - exact).abs() / ulp)
        })
    }

    #[test]
    fn errors_stay_within_what_the_docs_say() {
        assert!(worst_ulp(exp, f64::exp, -87.0, 88.0) < 1.5);
        assert!(worst_ulp(sigmoid, |x| 1.0 / (1.0 + (-x).exp()), -80.0, 40.0) < 3.0);
        assert!(worst_ulp(tanh, f64::tanh, -12.0, 12.0) < 3.0);
        assert!(worst_ulp(tanh, f64::tanh, 1e-6, 1e-2) < 3.0);
    }

    #[test]
    fn not_a_number_and_infinity_are_kept_apart() {
        for f in [exp, sigmoid, tanh] {
            assert!(f(f32::NAN).is_nan());
        }
        assert_eq!((tanh(f32::INFINITY), tanh(f32::NEG_INFINITY)), (1.0, -1.0));
        assert_eq!(sigmoid(f32::INFINITY), 1.0);
        assert!(sigmoid(f32::NEG_INFINITY) < 1e-37 && exp(f32::INFINITY).is_finite());
    }
}
