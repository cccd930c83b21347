// The gradient that counts in an update: clamp(grad_scale * grad, +-clip_value) + weight_decay * p + l1 * sign(p).
// No clamp where clip_value is 0. The twin is `counts` in src/kernels/update.rs.

// Four scalars of the kernel's Params.
struct Regular {
    grad_scale: f32,
    clip_value: f32,
    weight_decay: f32,
    l1: f32,
}

fn gradient_that_counts(r: Regular, grad: f32, p: f32) -> f32 {
    var g = grad * r.grad_scale;
    if (r.clip_value > 0.0) {
        // Comparisons, not clamp: they let NaN pass.
        g = select(g, r.clip_value, g > r.clip_value);
        g = select(g, -r.clip_value, g < -r.clip_value);
    }
    let sign = select(select(0.0, -r.l1, p < 0.0), r.l1, p > 0.0);
    return g + r.weight_decay * p + sign;
}
