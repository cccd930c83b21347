//! A matrix `X [N, M]` as a product of two thin ones (Vogels, Karimireddy and Jaggi, "PowerSGD", NeurIPS 2019): one step of power iteration, begun where the
//! last one ended.
//!
//! With the right factor `Q [M, R]` of the step before: `P = sum over ranks of X Q`, made orthonormal; `Q = sum over ranks of X^T P`; the sum of
//! gradients is taken to be `P Q^T`, which is `P P^T` times the sum of X. What a rank's own `P P^T X` leaves of its X is its residual.

use anyhow::Result;

use super::sums::sum_whole;
use super::{Bucket, State};
use crate::comm::Communicator;
use crate::rng::{Purpose, StepKey, Stream};

/// Lanes of a dot product, which are added up at its end.
const LANES: usize = 16;

/// A right factor to begin with, `[rank, columns]`: random, the same everywhere.
pub(super) fn first_factor(tensor: usize, [_, cols]: [usize; 2], rank: usize) -> Vec<f32> {
    let mut random = Stream::new(StepKey::new(0, 0), Purpose::Factor, tensor as u32, 0);
    (0..rank * cols).map(|_| random.normal() as f32).collect()
}

/// `[M, R]` of `[R, M]` where `n` is M, and the other way round.
pub(super) fn transposed(factor: &[f32], n: usize) -> Vec<f32> {
    (0..n).flat_map(|i| factor.iter().skip(i).step_by(n.max(1)).copied()).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_lanes, b_lanes) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a_lanes.remainder().iter().zip(b_lanes.remainder()).map(|(a, b)| a * b).sum::<f32>();
    for (a, b) in a_lanes.zip(b_lanes) {
        (0..LANES).for_each(|i| lanes[i] += a[i] * b[i]);
    }
    lanes.iter().sum::<f32>() + rest
}

fn add_scaled(to: &mut [f32], factor: f32, from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
}

/// `X Q` as columns, `[R, N]`.
fn times(x: &[f32], cols: usize, factor: &[f32], out: &mut Vec<f32>) {
    for column in factor.chunks_exact(cols) {
        out.extend(x.chunks_exact(cols).map(|row| dot(row, column)));
    }
}

/// `X^T P` as columns, `[R, M]`, of P as columns.
fn transposed_times(x: &[f32], cols: usize, left: &[f32], out: &mut Vec<f32>) {
    for column in left.chunks_exact(x.len() / cols) {
        let start = out.len();
        out.resize(start + cols, 0.0);
        for (row, factor) in x.chunks_exact(cols).zip(column) {
            add_scaled(&mut out[start..], *factor, row);
        }
    }
}

/// `X = X + scale P Q^T`.
fn add_product(x: &mut [f32], cols: usize, scale: f32, left: &[f32], right: &[f32]) {
    let rows = x.len() / cols;
    for (left, right) in left.chunks_exact(rows).zip(right.chunks_exact(cols)) {
        for (row, factor) in x.chunks_exact_mut(cols).zip(left) {
            add_scaled(row, scale * factor, right);
        }
    }
}

/// Makes columns `[R, N]` orthonormal, twice over, in f64. One that lies in the span of those before comes out as zeros, or as what rounding left of it.
fn orthonormalize(columns: &mut [f32], rows: usize) {
    let mut all: Vec<Vec<f64>> = columns.chunks_exact(rows).map(|column| column.iter().map(|&v| f64::from(v)).collect()).collect();
    for i in 0..all.len() {
        let (done, rest) = all.split_at_mut(i);
        let column = &mut rest[0];
        for _ in 0..2 {
            for other in &*done {
                let along: f64 = column.iter().zip(other).map(|(a, b)| a * b).sum();
                column.iter_mut().zip(other).for_each(|(a, b)| *a -= along * b);
            }
            let norm = column.iter().map(|a| a * a).sum::<f64>().sqrt();
            let inverse = if norm == 0.0 { 0.0 } else { 1.0 / norm };
            column.iter_mut().for_each(|a| *a *= inverse);
        }
    }
    columns.iter_mut().zip(all.iter().flatten()).for_each(|(to, from)| *to = *from as f32);
}

/// Replaces a bucket's values by the product of two thin matrices for each tensor that is close to their sum.
pub(super) fn sum(
    comm: &mut Communicator,
    bucket: &Bucket,
    rank: usize,
    whole: &mut Vec<f32>,
    values: &mut [f32],
    state: &State,
    next: &mut State,
) -> Result<()> {
    let n_whole = whole.len();
    // What goes whole and the left factors of all tensors go together.
    for (member, factor) in bucket.made_small.iter().zip(&state.factors) {
        times(&values[member.values.clone()], member.shape[1], factor, whole);
    }
    sum_whole(comm, whole)?;
    let mut lefts = whole.split_off(n_whole);
    let mut rights = Vec::new();
    let mut at = 0;
    for member in &bucket.made_small {
        let [rows, cols] = member.shape;
        let left = &mut lefts[at..at + rank * rows];
        orthonormalize(left, rows);
        let x = &mut values[member.values.clone()];
        let start = rights.len();
        transposed_times(x, cols, left, &mut rights);
        // The rank's own part is taken off what it holds.
        add_product(x, cols, -1.0, left, &rights[start..]);
        at += rank * rows;
    }
    if next.residual.len() == values.len() {
        next.residual.copy_from_slice(values);
    }
    sum_whole(comm, &mut rights)?;
    values.fill(0.0);
    let (mut left_at, mut right_at) = (0, 0);
    for (i, member) in bucket.made_small.iter().enumerate() {
        let [rows, cols] = member.shape;
        let (left, right) = (&lefts[left_at..left_at + rank * rows], &rights[right_at..right_at + rank * cols]);
        (left_at, right_at) = (left_at + rank * rows, right_at + rank * cols);
        add_product(&mut values[member.values.clone()], cols, 1.0, left, right);
        next.factors[i].copy_from_slice(right);
        // A direction in which nothing lay would be looked in for ever.
        let first = first_factor(member.idx, member.shape, rank);
        for (column, first) in next.factors[i].chunks_exact_mut(cols).zip(first.chunks_exact(cols)) {
            if column.iter().all(|value| *value == 0.0) {
                column.copy_from_slice(first);
            }
        }
    }
    Ok(())
}
