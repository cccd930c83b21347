//! Sizes and paddings that every floor agrees on.
//!
//! Dimension letters: `T` steps, `B` batch, `I` input, `H` hidden, `G` = 4 gates, `L` layers, `V` vocabulary or classes, `P` ranks.

use std::ops::Range;

/// Units of one gate panel: a panel holds 16 units x 4 gates = 64 columns.
pub const PANEL_UNITS: usize = 16;
/// Gates of an LSTM cell, in the order i, f, g, o.
pub const GATES: usize = 4;
/// Columns of one gate panel; within it column = gate * 16 + unit.
pub const PANEL: usize = PANEL_UNITS * GATES;
/// Every tensor starts at a multiple of this many floats, which is 256 bytes: the largest offset alignment that WebGPU may ask for.
pub const ALIGN: usize = 64;
/// Sums over parameters (norms, ring segments) are cut in blocks of this many floats.
pub const BLOCK: usize = 4096;
/// Inner dimensions (features, classes, outputs) are padded to a multiple of this many floats, so that kernels load vectors of four.
pub const INNER: usize = 4;

/// `n` rounded up to a multiple of `to`.
pub const fn round_up(n: usize, to: usize) -> usize {
    n.div_ceil(to) * to
}

/// Hidden units including padding: a multiple of 16; the units added stay exactly zero.
pub const fn pad_units(hidden: usize) -> usize {
    round_up(hidden, PANEL_UNITS)
}

/// Features, classes or outputs including padding: a multiple of 4.
pub const fn pad_inner(n: usize) -> usize {
    round_up(n, INNER)
}

/// Cuts `0..len` into `parts` ranges of nearly equal size; the remainder goes to the first ones.
pub fn split_even(len: usize, parts: usize) -> Vec<Range<usize>> {
    let (each, rest) = (len / parts, len % parts);
    let mut start = 0;
    (0..parts)
        .map(|i| {
            let end = start + each + usize::from(i < rest);
            let range = start..end;
            start = end;
            range
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_even_covers_everything_once_with_the_remainder_first() {
        for len in 0..=64 {
            for parts in 1..=17 {
                let ranges = split_even(len, parts);
                assert_eq!(ranges.len(), parts);
                assert_eq!(ranges.iter().flat_map(Clone::clone).collect::<Vec<_>>(), (0..len).collect::<Vec<_>>());
                assert!(ranges.windows(2).all(|w| w[0].len() >= w[1].len() && w[0].len() - w[1].len() <= 1));
            }
        }
    }
}
