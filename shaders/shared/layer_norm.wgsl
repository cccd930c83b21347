// Layer normalisation over the hidden units of a row: what its kernels share. The twin is src/kernels/lstm/rows.rs.

const NORM_EPS: f32 = 1e-5;

// 1 for the units of a quad (four units, counted through all panels) that exist, 0 for padding.
fn existing4(quad_of_row: u32, units: u32) -> vec4<f32> {
    let unit = vec4<u32>(0u, 1u, 2u, 3u) + 4u * quad_of_row;
    return select(vec4<f32>(), vec4<f32>(1.0), unit < vec4<u32>(units));
}

// What a deviation is multiplied by, from the mean of squared deviations.
fn norm_factor(variance: f32) -> f32 {
    return 1.0 / sqrt(variance + NORM_EPS);
}
