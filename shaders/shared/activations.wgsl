// Exponential, sigmoid and tanh that overflow nowhere and keep NaN, and the tests for what is not a number.
//
// clamp, min and max drop NaN, and `x != x` is never true, so NaN is found by its bits. Some drivers' tanh overflows to NaN above 88 and is off by
// 1.7e-4 relative near 0: hence the polynomial below 0.6 and the exponential above. The twin is src/kernels/activations.rs.

fn is_non_finite(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) == 0x7f800000u;
}

fn is_nan(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u;
}

// e^x; x is clamped to -87..=88, where the result is a normal number.
fn safe_exp(x: f32) -> f32 {
    return select(exp(clamp(x, -87.0, 88.0)), x, is_nan(x));
}

// 1 / (1 + e^-x).
fn sigmoid(x: f32) -> f32 {
    return 1.0 / (1.0 + safe_exp(-x));
}

// An odd polynomial below 0.6, 1 - 2 / (e^2|x| + 1) above.
fn safe_tanh(x: f32) -> f32 {
    let a = abs(x);
    let s = x * x;
    let p = ((((0.0023707657 * s - 0.008410071) * s + 0.021788321) * s - 0.053961553) * s + 0.13333313) * s - 0.33333334;
    let small = p * s * x + x;
    let large = 1.0 - 2.0 / (safe_exp(2.0 * a) + 1.0);
    let y = select(select(large, -large, x < 0.0), small, a < 0.6);
    return select(y, x, is_nan(x));
}

fn sigmoid4(x: vec4<f32>) -> vec4<f32> {
    return vec4<f32>(sigmoid(x.x), sigmoid(x.y), sigmoid(x.z), sigmoid(x.w));
}

fn tanh4(x: vec4<f32>) -> vec4<f32> {
    return vec4<f32>(safe_tanh(x.x), safe_tanh(x.y), safe_tanh(x.z), safe_tanh(x.w));
}

fn any_non_finite4(x: vec4<f32>) -> bool {
    return is_non_finite(x.x) || is_non_finite(x.y) || is_non_finite(x.z) || is_non_finite(x.w);
}
