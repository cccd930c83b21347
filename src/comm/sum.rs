//! Additions of segments, one pass over memory each. Never here: who adds what.

use std::ops::Range;
use std::sync::Arc;

use crate::for_isa;
use crate::pool::Isa;

/// Memory that several ranks read.
pub(super) type Handle = Arc<Vec<f32>>;

/// Floats of a sum of more than four that are held in the first-level cache at a time.
const PIECE: usize = 1024;

/// `own = ((t0 + t1) + ...) + own`, element by element; all of one length.
pub(super) fn accumulate(isa: Isa, own: &mut [f32], theirs: &[Handle]) {
    match theirs {
        [] => {}
        [a] => for_isa!(isa, last1(own: &mut [f32], a: &[f32])),
        [a, b] => for_isa!(isa, last2(own: &mut [f32], a: &[f32], b: &[f32])),
        [a, b, c] => for_isa!(isa, last3(own: &mut [f32], a: &[f32], b: &[f32], c: &[f32])),
        many => {
            let mut piece = [0.0; PIECE];
            let len = own.len();
            for start in (0..len).step_by(PIECE) {
                let at = start..(start + PIECE).min(len);
                let piece = &mut piece[..at.len()];
                sum(isa, piece, many.len(), |idx| &many[idx][at.clone()]);
                let (own, a) = (&mut own[at], &*piece);
                for_isa!(isa, last1(own: &mut [f32], a: &[f32]));
            }
        }
    }
}

/// `out = (x0 + x1) + ...` over `n` inputs, element by element; each is asked for the elements of `range`, which `out` is.
pub(super) fn sum_range<'a>(isa: Isa, out: &mut [f32], n: usize, range: &Range<usize>, input: impl Fn(usize) -> &'a [f32]) {
    let mut start = range.start;
    for out in out.chunks_mut(PIECE) {
        let at = start..start + out.len();
        sum(isa, out, n, |idx| &input(idx)[at.clone()]);
        start = at.end;
    }
}

/// As above, for a piece that stays in the first-level cache.
fn sum<'a>(isa: Isa, out: &mut [f32], n: usize, input: impl Fn(usize) -> &'a [f32]) {
    let mut done = n.min(4);
    match n {
        0 => out.fill(0.0),
        1 => out.copy_from_slice(input(0)),
        2 => {
            let (a, b) = (input(0), input(1));
            for_isa!(isa, first2(out: &mut [f32], a: &[f32], b: &[f32]));
        }
        3 => {
            let (a, b, c) = (input(0), input(1), input(2));
            for_isa!(isa, first3(out: &mut [f32], a: &[f32], b: &[f32], c: &[f32]));
        }
        _ => {
            let (a, b, c, d) = (input(0), input(1), input(2), input(3));
            for_isa!(isa, first4(out: &mut [f32], a: &[f32], b: &[f32], c: &[f32], d: &[f32]));
        }
    }
    while done < n {
        let a = input(done);
        for_isa!(isa, next(out: &mut [f32], a: &[f32]));
        done += 1;
    }
}

#[inline(always)]
fn last1(own: &mut [f32], a: &[f32]) {
    own.iter_mut().zip(a).for_each(|(own, a)| *own += a);
}

#[inline(always)]
fn last2(own: &mut [f32], a: &[f32], b: &[f32]) {
    own.iter_mut().zip(a.iter().zip(b)).for_each(|(own, (a, b))| *own += a + b);
}

#[inline(always)]
fn last3(own: &mut [f32], a: &[f32], b: &[f32], c: &[f32]) {
    own.iter_mut().zip(a.iter().zip(b.iter().zip(c))).for_each(|(own, (a, (b, c)))| *own += (a + b) + c);
}

#[inline(always)]
fn first2(out: &mut [f32], a: &[f32], b: &[f32]) {
    out.iter_mut().zip(a.iter().zip(b)).for_each(|(out, (a, b))| *out = a + b);
}

#[inline(always)]
fn first3(out: &mut [f32], a: &[f32], b: &[f32], c: &[f32]) {
    out.iter_mut().zip(a.iter().zip(b.iter().zip(c))).for_each(|(out, (a, (b, c)))| *out = (a + b) + c);
}

#[inline(always)]
fn first4(out: &mut [f32], a: &[f32], b: &[f32], c: &[f32], d: &[f32]) {
    out.iter_mut().zip(a.iter().zip(b.iter().zip(c.iter().zip(d)))).for_each(|(out, (a, (b, (c, d))))| *out = ((a + b) + c) + d);
}

#[inline(always)]
fn next(out: &mut [f32], a: &[f32]) {
    out.iter_mut().zip(a).for_each(|(out, a)| *out += a);
}
