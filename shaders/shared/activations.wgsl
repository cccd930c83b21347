// Sigmoid and tanh that keep NaN and do not overflow, and the test for non-finite bits. The CPU twin is `kernels/activations.rs`.

// Whether x is infinite or not a number. By bits: drivers assume that comparisons and `min`, `max` never see NaN.
fn is_non_finite(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) == 0x7f800000u;
}

fn is_nan(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u;
}

// 1 / (1 + e^-x); beyond 87 e^x leaves the normal numbers.
fn sigmoid(x: f32) -> f32 {
    let y = 1.0 / (1.0 + exp(-clamp(x, -87.0, 87.0)));
    return select(y, x, is_nan(x));
}

// Hyperbolic tangent: an odd polynomial below 0.6, where the exponential would cancel, `1 - 2 / (e^2|x| + 1)` above; built-in tanh overflows on some drivers.
fn tanh_safe(x: f32) -> f32 {
    let s = x * x;
    let p = ((((0.0023707657 * s - 0.008410071) * s + 0.021788321) * s - 0.053961553) * s + 0.13333313) * s - 0.33333334;
    let small = p * s * x + x;
    let a = abs(x);
    let large = sign(x) * (1.0 - 2.0 / (exp(min(2.0 * a, 87.0)) + 1.0));
    let y = select(large, small, a < 0.6);
    return select(y, x, is_nan(x));
}
