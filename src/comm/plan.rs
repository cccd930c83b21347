//! Plans of the collectives as data: which rank sends which segment to whom, and what the receiver does with it.
//!
//! A plan is computed by every rank for itself, from the world's size, its own rank and the message's length, and says nothing of
//! buffers, channels or threads; the executor in the parent module runs it. Never here: anything that moves a byte.
//!
//! | plan | steps | elements a rank sends, of a message of S |
//! | --- | --- | --- |
//! | [`ring_reduce_scatter`] | P-1 | S less its own segment: about S(P-1)/P |
//! | [`ring_all_gather`] | P-1 | S less its successor's segment: about S(P-1)/P |
//! | [`ring_all_reduce`] | 2(P-1) | about 2S(P-1)/P |
//! | [`broadcast`] | M+P-2 for M pieces | S, the last rank of the chain nothing |

use std::ops::Range;

use crate::shape::{ALIGN, BLOCK};

/// One segment's way between two ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The other rank.
    pub peer: usize,
    /// Elements of the message; may be empty, and is then announced all the same, so that both sides stay in step.
    pub segment: Range<usize>,
}

/// What a receiver does with a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Adds it to its own values.
    Accumulate,
    /// Puts it in the place of its own values.
    Copy,
}

/// What one rank does in one step: a segment out and another, disjoint one in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub send: Option<Transfer>,
    pub recv: Option<Transfer>,
    /// What happens to the segment that comes in.
    pub action: Action,
}

/// The steps of one rank, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub steps: Vec<Step>,
}

impl Plan {
    /// Elements that this rank sends in the whole plan.
    pub fn n_sent(&self) -> usize {
        self.steps.iter().filter_map(|step| step.send.as_ref()).map(|send| send.segment.len()).sum()
    }
}

/// Cuts a message of `len` floats into one segment a rank; they follow each other without gaps and may be empty.
///
/// Cuts lie between blocks of [`BLOCK`] floats, with the blocks left over at the first segments and a last, partial block at whoever
/// holds the last block. A message of fewer blocks than ranks is cut between lines of [`ALIGN`] floats in the same way, and one of
/// fewer lines than ranks between single floats.
pub fn segments(world: usize, len: usize) -> Vec<Range<usize>> {
    (0..world).map(|rank| owned_segment(world, rank, len)).collect()
}

/// The segment whose sum `rank` holds after the reduce-scatter, and that it brings to the all-gather: number `rank` of [`segments`].
///
/// # Panics
/// If `rank` is not below `world`.
pub fn owned_segment(world: usize, rank: usize, len: usize) -> Range<usize> {
    assert!(rank < world, "rank {rank} must lie below the world of {world}");
    let unit = [BLOCK, ALIGN].into_iter().find(|unit| len.div_ceil(*unit) >= world).unwrap_or(1);
    let n_units = len.div_ceil(unit);
    let (each, rest) = (n_units / world, n_units % world);
    let start_of = |rank: usize| ((rank * each + rank.min(rest)) * unit).min(len);
    start_of(rank)..start_of(rank + 1)
}

/// Sums every segment at its owner. P-1 steps; a rank sends every segment but its own once.
///
/// In step k rank r sends segment r-k-1 and adds to its segment r-k-2 (mod P) what comes in. So segment s starts at rank s+1, is added
/// to rank by rank in ring order, and ends complete at rank s: the order of its sum depends on P and s only. The other segments hold
/// partial sums afterwards.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn ring_reduce_scatter(world: usize, rank: usize, len: usize) -> Plan {
    ring(world, rank, &segments(world, len), 1, Action::Accumulate)
}

/// Brings every segment from its owner to all. P-1 steps; a rank sends every segment but its successor's once.
///
/// In step k rank r sends segment r-k and takes over segment r-k-1 (mod P), bit for bit.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn ring_all_gather(world: usize, rank: usize, len: usize) -> Plan {
    ring_all_gather_of(rank, &segments(world, len))
}

/// [`ring_all_gather`] with given segments, one a rank in rank order: for messages that do not weigh the same everywhere.
///
/// # Panics
/// If there is no segment for `rank`.
pub fn ring_all_gather_of(rank: usize, segments: &[Range<usize>]) -> Plan {
    ring(segments.len(), rank, segments, 0, Action::Copy)
}

/// [`ring_reduce_scatter`], then [`ring_all_gather`]: all ranks end with the same bits. 2(P-1) steps, about 2S(P-1)/P elements a rank,
/// whatever P, which is the least that an all-reduce can do with.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn ring_all_reduce(world: usize, rank: usize, len: usize) -> Plan {
    let mut plan = ring_reduce_scatter(world, rank, len);
    plan.steps.extend(ring_all_gather(world, rank, len).steps);
    plan
}

/// Brings the root's `len` elements to all, down the chain root, root+1, ... in pieces of `piece_len`, so that all links of the chain
/// are busy at once: M+P-2 steps for M pieces instead of M(P-1).
///
/// In step k the rank at distance d from the root sends piece k-d and takes over piece k-d+1.
///
/// # Panics
/// If `rank` or `root` is not below `world`.
pub fn broadcast(world: usize, rank: usize, root: usize, len: usize, piece_len: usize) -> Plan {
    assert!(rank < world && root < world, "rank {rank} and root {root} must lie below the world of {world}");
    if world == 1 {
        return Plan::default();
    }
    let distance = (rank + world - root) % world;
    let pieces = pieces(0..len, piece_len);
    let piece = |idx: Option<usize>| idx.and_then(|idx| pieces.get(idx)).cloned();
    let n_steps = pieces.len() + world - 2;
    let steps = (0..n_steps).map(|k| Step {
        send: piece(k.checked_sub(distance).filter(|_| distance + 1 < world)).map(|segment| Transfer { peer: (rank + 1) % world, segment }),
        recv: piece((k + 1).checked_sub(distance).filter(|_| 0 < distance))
            .map(|segment| Transfer { peer: (rank + world - 1) % world, segment }),
        action: Action::Copy,
    });
    Plan { steps: steps.collect() }
}

/// Cuts a segment into the pieces in which it travels; an empty one is one empty piece.
pub(super) fn pieces(segment: Range<usize>, piece_len: usize) -> Vec<Range<usize>> {
    (0..n_pieces(segment.len(), piece_len)).map(|idx| piece(&segment, piece_len, idx)).collect()
}

/// How many pieces a segment of `len` elements has, at least one.
pub(super) fn n_pieces(len: usize, piece_len: usize) -> usize {
    len.div_ceil(piece_len.max(1)).max(1)
}

/// Piece number `idx` of a segment.
pub(super) fn piece(segment: &Range<usize>, piece_len: usize, idx: usize) -> Range<usize> {
    let piece_len = piece_len.max(1);
    let start = (segment.start + idx * piece_len).min(segment.end);
    start..(start + piece_len).min(segment.end)
}

/// P-1 steps to the next rank; in step k segment `rank - k - lag` goes out and the one before it comes in.
fn ring(world: usize, rank: usize, segments: &[Range<usize>], lag: usize, action: Action) -> Plan {
    assert!(rank < world, "rank {rank} must lie below the world of {world}");
    let behind = |n: usize| segments[(rank + 2 * world - n) % world].clone();
    let steps = (0..world - 1).map(|k| Step {
        send: Some(Transfer { peer: (rank + 1) % world, segment: behind(k + lag) }),
        recv: Some(Transfer { peer: (rank + world - 1) % world, segment: behind(k + lag + 1) }),
        action,
    });
    Plan { steps: steps.collect() }
}
