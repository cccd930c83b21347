//! Plans of the collectives as data: which rank hands which segment to whom, and what the receiver does with it.
//!
//! A plan is computed by every rank for itself, from the world's size, its own rank and the message's length, and says nothing of
//! memory, channels or threads; the executor in the parent module runs it. Never here: anything that moves a byte.
//!
//! S is the message's length, P the world. A step is one wait; what a rank hands out others may read, which within a process moves
//! nothing by itself. "Read" is what a rank reads of others, which does move: the lines come from their caches or from memory.
//!
//! | plan | steps | handed out by a rank | read by a rank | order of a sum |
//! | --- | --- | --- | --- | --- |
//! | [`ring_reduce_scatter`] | P-1 | S(P-1)/P | S(P-1)/P | s+1, s+2, ..., s |
//! | [`ring_all_gather`] | P-1 | S(P-1)/P | S(P-1)/P, by whoever wants the sum | |
//! | [`ring_all_reduce`] | 2(P-1) | 2S(P-1)/P | both | s+1, s+2, ..., s |
//! | [`direct_reduce_scatter`] | 1 | S(P-1)/P | S(P-1)/P | s+1, s+2, ..., s |
//! | [`direct_all_gather`] | 1 | S(P-1)/P | as the ring's | |
//! | [`direct_all_reduce`] | 2 | 2S(P-1)/P | both | s+1, s+2, ..., s |
//! | [`direct_exchange`] | 1 | S(P-1) | S(P-1) | s+1, s+2, ..., s |
//! | [`direct_exchange_of_packets`] | 1 | P-1 packets | P-1 packets | |
//! | [`tree_all_reduce`] | 2 ceil(log2 P) | at most S log2 P, to children and parent | at most S log2 P | by subtrees |
//! | [`double_tree_all_reduce`] | about 2 log2 P | at most 3S | at most 2S | by subtrees |
//! | [`grouped_all_reduce`] | 4 | at most 2S, of which 2S/g to other groups of g | as much | by groups |
//! | [`broadcast`] | ceil(log2 P) | at most S log2 P | S | |
//!
//! s is the owner of the segment: ring and direct exchange give the same bits, so where the one hands over to the other is a matter of
//! speed alone.

use std::ops::Range;

use crate::shape::{ALIGN, BLOCK};

/// How an all-reduce goes about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Algorithm {
    /// What was fastest in the bench: [`Self::Direct`], at every length and from 2 to 16 ranks, since memory is shared.
    #[default]
    Auto,
    /// Neighbours only.
    Ring,
    /// Subtrees: few steps in large worlds.
    Tree,
    /// Everyone reads from everyone.
    Direct,
    /// Within groups of so many neighbours first, as the ranks of one machine are, then between the groups; at least 1.
    Groups(usize),
}

impl Algorithm {
    /// All of them with the names that people type; of the groups the smallest that are any.
    pub const ALL: [(&'static str, Self); 5] =
        [("auto", Self::Auto), ("ring", Self::Ring), ("tree", Self::Tree), ("direct", Self::Direct), ("groups:2", Self::Groups(2))];

    /// What `Auto` stands for; any other stays what it is.
    pub fn resolve(self) -> Self {
        if self == Self::Auto { Self::Direct } else { self }
    }
}

impl std::fmt::Display for Algorithm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Groups(size) => write!(f, "groups:{size}"),
            other => f.write_str(Self::ALL.into_iter().find(|(_, algorithm)| algorithm == other).map_or("auto", |(name, _)| name)),
        }
    }
}

impl std::str::FromStr for Algorithm {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let of_groups = || name.strip_prefix("groups:")?.parse().ok().filter(|&size: &usize| size > 0).map(Self::Groups);
        let named = Self::ALL.into_iter().find(|(known, _)| *known == name).map(|(_, algorithm)| algorithm);
        named.or_else(of_groups).ok_or_else(|| "one of auto, ring, tree, direct, groups:N with N ranks a group".to_owned())
    }
}

/// The longest message of which every rank adds up the whole for itself, in larger worlds and in a world of two; beyond, reading it P
/// times costs more than a second step. Two ranks have the other's answer sooner than they have read a few kilobytes of the other's cache.
/// These numbers come from `benches/ring.rs`.
const ONE_STEP_FLOATS: usize = 4 << 10;
const ONE_STEP_FLOATS_OF_TWO: usize = 256;
/// The longest message that a tree carries as a whole; beyond, two trees take half of it each.
const ONE_TREE_FLOATS: usize = 16 << 10;

fn one_step_floats(world: usize) -> usize {
    if world == 2 { ONE_STEP_FLOATS_OF_TWO } else { ONE_STEP_FLOATS }
}

/// One segment's way between two ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The other rank.
    pub peer: usize,
    /// Elements of the message: one of the plan's parts. May be empty, and is then announced all the same, so that both sides stay in step.
    pub segment: Range<usize>,
}

/// What a receiver does with what comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Adds all that comes in, which is the same segment from each peer, in the order in which it is listed, and its own values last.
    Accumulate,
    /// The whole message came from every peer: adds up all ranks' values, each segment s of [`segments`] in the order s+1, s+2, ..., s.
    SumAll,
    /// Puts each segment in the place of its own values.
    Take,
}

/// What one rank does in one step: it hands out segments, waits for others, and acts on them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Which stage of the collective this is: the same at both ends of a transfer, though ranks may skip stages.
    pub stage: usize,
    pub sends: Vec<Transfer>,
    pub recvs: Vec<Transfer>,
    pub action: Action,
}

/// The steps of one rank, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The parts in which the message travels; they cover it in order. The same on all ranks.
    pub parts: Vec<Range<usize>>,
    pub steps: Vec<Step>,
}

impl Plan {
    /// Elements that this rank hands out in the whole plan.
    pub fn n_sent(&self) -> usize {
        self.steps.iter().flat_map(|step| &step.sends).map(|send| send.segment.len()).sum()
    }

    fn push(&mut self, stage: usize, sends: Vec<Transfer>, recvs: Vec<Transfer>, action: Action) {
        if !sends.is_empty() || !recvs.is_empty() {
            self.steps.push(Step { stage, sends, recvs, action });
        }
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

/// The all-reduce by `algorithm`, in the form that suits the length.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn all_reduce(algorithm: Algorithm, world: usize, rank: usize, len: usize) -> Plan {
    match algorithm.resolve() {
        Algorithm::Ring => ring_all_reduce(world, rank, len),
        Algorithm::Tree if len <= ONE_TREE_FLOATS => tree_all_reduce(world, rank, len),
        Algorithm::Tree => double_tree_all_reduce(world, rank, len),
        Algorithm::Groups(size) => grouped_all_reduce(size, world, rank, len),
        _ if len <= one_step_floats(world) => direct_exchange(world, rank, len),
        _ => direct_all_reduce(world, rank, len),
    }
}

/// The reduce-scatter by `algorithm`: round the ring, or for all others directly.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn reduce_scatter(algorithm: Algorithm, world: usize, rank: usize, len: usize) -> Plan {
    if algorithm == Algorithm::Ring { ring_reduce_scatter(world, rank, len) } else { direct_reduce_scatter(world, rank, len) }
}

/// The all-gather by `algorithm`: round the ring, or for all others directly.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn all_gather(algorithm: Algorithm, world: usize, rank: usize, len: usize) -> Plan {
    if algorithm == Algorithm::Ring { ring_all_gather(world, rank, len) } else { direct_all_gather(world, rank, len) }
}

/// Sums every segment at its owner. P-1 steps; a rank hands out every segment but its own once.
///
/// In step k rank r hands on segment r-k-1 and adds to its segment r-k-2 (mod P) what comes in. So segment s starts at rank s+1, is added
/// to rank by rank in ring order, and ends complete at rank s: the order of its sum depends on P and s only. The other segments hold
/// partial sums afterwards.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn ring_reduce_scatter(world: usize, rank: usize, len: usize) -> Plan {
    ring(world, rank, len, 1, Action::Accumulate)
}

/// Brings every segment from its owner to all. P-1 steps; a rank hands out every segment but its successor's once.
///
/// In step k rank r hands on segment r-k and takes over segment r-k-1 (mod P), bit for bit.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn ring_all_gather(world: usize, rank: usize, len: usize) -> Plan {
    ring(world, rank, len, 0, Action::Take)
}

/// [`ring_reduce_scatter`], then [`ring_all_gather`]: all ranks end with the same bits. 2(P-1) steps, about 2S(P-1)/P elements a rank,
/// whatever P, which is the least that an all-reduce without shared memory can do with.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn ring_all_reduce(world: usize, rank: usize, len: usize) -> Plan {
    let mut plan = ring_reduce_scatter(world, rank, len);
    plan.steps.extend(ring_all_gather(world, rank, len).steps);
    plan
}

/// Sums every segment at its owner, who reads it from all others. One step.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn direct_reduce_scatter(world: usize, rank: usize, len: usize) -> Plan {
    let parts = checked_segments(world, rank, len);
    let mut plan = Plan::default();
    let sends = others(world, rank).map(|peer| Transfer { peer, segment: parts[peer].clone() }).collect();
    let recvs = others(world, rank).map(|peer| Transfer { peer, segment: parts[rank].clone() }).collect();
    plan.push(0, sends, recvs, Action::Accumulate);
    plan.parts = parts;
    plan
}

/// Brings every segment from its owner to all, without a detour. One step.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn direct_all_gather(world: usize, rank: usize, len: usize) -> Plan {
    direct_all_gather_of(rank, checked_segments(world, rank, len))
}

/// [`direct_all_gather`] with given segments, one a rank in rank order.
///
/// # Panics
/// If there is no segment for `rank`.
pub fn direct_all_gather_of(rank: usize, parts: Vec<Range<usize>>) -> Plan {
    let mut plan = Plan::default();
    let sends = others(parts.len(), rank).map(|peer| Transfer { peer, segment: parts[rank].clone() }).collect();
    let recvs = others(parts.len(), rank).map(|peer| Transfer { peer, segment: parts[peer].clone() }).collect();
    plan.push(1, sends, recvs, Action::Take);
    plan.parts = parts;
    plan
}

/// [`direct_reduce_scatter`], then [`direct_all_gather`]. Two steps; every value is read once and every sum written once, which is the
/// least that an all-reduce in shared memory can do with.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn direct_all_reduce(world: usize, rank: usize, len: usize) -> Plan {
    let mut plan = direct_reduce_scatter(world, rank, len);
    plan.steps.extend(direct_all_gather(world, rank, len).steps);
    plan
}

/// Everyone hands the whole message to everyone and adds all up for itself. One step, P times the additions: for short messages.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn direct_exchange(world: usize, rank: usize, len: usize) -> Plan {
    assert!(rank < world, "rank {rank} must lie below the world of {world}");
    let mut plan = Plan { parts: whole(len), steps: Vec::new() };
    let to_all = || others(world, rank).map(|peer| Transfer { peer, segment: 0..len }).collect();
    plan.push(0, to_all(), to_all(), Action::SumAll);
    plan
}

/// Everyone hands everyone a packet: element `from * world + to` of `world * world`. One step; a rank hands out P-1 elements.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn direct_exchange_of_packets(world: usize, rank: usize) -> Plan {
    assert!(rank < world, "rank {rank} must lie below the world of {world}");
    let mut plan = Plan { parts: (0..world * world).map(|packet| packet..packet + 1).collect(), steps: Vec::new() };
    let packet = |from: usize, to: usize| from * world + to..from * world + to + 1;
    let sends = others(world, rank).map(|peer| Transfer { peer, segment: packet(rank, peer) }).collect();
    let recvs = others(world, rank).map(|peer| Transfer { peer, segment: packet(peer, rank) }).collect();
    plan.push(0, sends, recvs, Action::Take);
    plan
}

/// Sums up a binomial tree to rank 0 and hands the sum down again. 2 ceil(log2 P) steps; all ranks together hand out 2(P-1)S.
///
/// On the way up rank r takes in r+1, r+2, r+4, ... while those bits of r are 0, and then goes to its parent, r less its lowest bit.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn tree_all_reduce(world: usize, rank: usize, len: usize) -> Plan {
    assert!(rank < world, "rank {rank} must lie below the world of {world}");
    let mut plan = Plan { parts: whole(len), steps: Vec::new() };
    let children = || binomial_children(world, rank).map(|peer| Transfer { peer, segment: 0..len });
    let parent = || (rank > 0).then(|| Transfer { peer: rank & (rank - 1), segment: 0..len }).into_iter().collect();
    plan.push(0, vec![], children().collect(), Action::Accumulate);
    plan.push(0, parent(), vec![], Action::Take);
    plan.push(1, vec![], parent(), Action::Take);
    // The child with the largest subtree first.
    plan.push(1, children().rev().collect(), vec![], Action::Take);
    plan
}

/// Two binary trees, each for one half of the message, such that a rank that has children in the one is a leaf in the other (but for one
/// rank where P is odd): inner ranks and leaves work at the same time (Sanders, Speck and Träff, "Two-tree algorithms for full bandwidth
/// broadcast, reduction and scan", Parallel Computing 35(12), 2009). About 2 log2 P steps; all ranks together hand out 2(P-1)S.
///
/// # Panics
/// If `rank` is not below `world`.
pub fn double_tree_all_reduce(world: usize, rank: usize, len: usize) -> Plan {
    assert!(rank < world, "rank {rank} must lie below the world of {world}");
    let halves = segments(2, len);
    let mut plan = Plan { parts: halves.clone(), steps: Vec::new() };
    let trees: Vec<Branch> = [Tree::First, Tree::Second].into_iter().map(|tree| tree.branch(world, rank)).collect();
    let of = |peer: &usize, half: usize| Transfer { peer: *peer, segment: halves[half].clone() };
    // Whoever waits for nobody begins: leaves first.
    for of_leaves in [true, false] {
        for (half, Branch { parent, children }) in trees.iter().enumerate().filter(|(_, branch)| branch.children.is_empty() == of_leaves) {
            plan.push(half, vec![], children.iter().map(|child| of(child, half)).collect(), Action::Accumulate);
            plan.push(half, parent.iter().map(|parent| of(parent, half)).collect(), vec![], Action::Take);
        }
    }
    for (half, Branch { parent, children }) in trees.iter().enumerate() {
        plan.push(2 + half, vec![], parent.iter().map(|parent| of(parent, half)).collect(), Action::Take);
        plan.push(2 + half, children.iter().map(|child| of(child, half)).collect(), vec![], Action::Take);
    }
    plan
}

/// Sums within groups of `size` neighbours, then between the groups, and hands the sums back the same way: what leaves a group is one message, however many
/// ranks it has. For ranks whose neighbours are nearer than others, as on several machines. 4 waits a rank; all ranks together hand out 2(P-1)S, of
/// which 2(G-1)S between the G groups. The last group may be smaller.
///
/// The message is cut into so many parts that each rank of the largest group has one for each group to finish. In every group one member sums a part,
/// and one group's sums those of all groups.
///
/// # Panics
/// If `rank` is not below `world`, or `size` is zero.
pub fn grouped_all_reduce(size: usize, world: usize, rank: usize, len: usize) -> Plan {
    assert!(rank < world && size > 0, "rank {rank} must lie below the world of {world}, and a group have ranks");
    let size = size.min(world);
    let n_groups = world.div_ceil(size);
    let parts = segments(size * n_groups, len);
    let members = |group: usize| group * size..((group + 1) * size).min(world);
    // Who sums a part within a group, and which group sums those of all.
    let summer = |part: usize, group: usize| group * size + part % members(group).len();
    let last_group = |part: usize| part / size;
    let own_group = rank / size;
    let mine: Vec<usize> = (0..parts.len()).filter(|&part| summer(part, own_group) == rank).collect();
    let others_of = |range: Range<usize>, from: usize| {
        let len = range.len();
        (1..len).map(move |distance| range.start + (from - range.start + distance) % len)
    };
    let of = |peer: usize, part: usize| Transfer { peer, segment: parts[part].clone() };
    let mut plan = Plan { parts: parts.clone(), steps: Vec::new() };

    let not_mine = (0..parts.len()).filter(|part| !mine.contains(part));
    plan.push(0, not_mine.map(|part| of(summer(part, own_group), part)).collect(), vec![], Action::Take);
    for &part in &mine {
        plan.push(0, vec![], others_of(members(own_group), rank).map(|peer| of(peer, part)).collect(), Action::Accumulate);
    }
    let (finished, handed): (Vec<usize>, Vec<usize>) = mine.iter().partition(|&&part| last_group(part) == own_group);
    plan.push(1, handed.iter().map(|&part| of(summer(part, last_group(part)), part)).collect(), vec![], Action::Take);
    let summers = |part: usize| others_of(0..n_groups, own_group).map(move |group| (summer(part, group), part));
    for &part in &finished {
        plan.push(1, vec![], summers(part).map(|(peer, part)| of(peer, part)).collect(), Action::Accumulate);
    }
    plan.push(2, finished.iter().flat_map(|&part| summers(part)).map(|(peer, part)| of(peer, part)).collect(), vec![], Action::Take);
    plan.push(2, vec![], handed.iter().map(|&part| of(summer(part, last_group(part)), part)).collect(), Action::Take);
    let neighbours = || others_of(members(own_group), rank);
    plan.push(
        3,
        neighbours().flat_map(|peer| mine.iter().map(move |&part| (peer, part))).map(|(peer, part)| of(peer, part)).collect(),
        vec![],
        Action::Take,
    );
    let theirs =
        neighbours().flat_map(|peer| (0..parts.len()).filter(move |&part| summer(part, own_group) == peer).map(move |part| (peer, part)));
    plan.push(3, vec![], theirs.map(|(peer, part)| of(peer, part)).collect(), Action::Take);
    plan
}

/// Brings the root's message of `len` elements to all down a binomial tree. ceil(log2 P) steps.
///
/// # Panics
/// If `rank` or `root` is not below `world`.
pub fn broadcast(world: usize, rank: usize, root: usize, len: usize) -> Plan {
    assert!(rank < world && root < world, "rank {rank} and root {root} must lie below the world of {world}");
    let distance = (rank + world - root) % world;
    let rank_at = |distance: usize| (distance + root) % world;
    let mut plan = Plan { parts: whole(len), steps: Vec::new() };
    if distance > 0 {
        plan.push(0, vec![], vec![Transfer { peer: rank_at(distance & (distance - 1)), segment: 0..len }], Action::Take);
    }
    // The child with the largest subtree first.
    let sends = binomial_children(world, distance).rev().map(|child| Transfer { peer: rank_at(child), segment: 0..len }).collect();
    plan.push(0, sends, vec![], Action::Take);
    plan
}

/// The message in one part.
fn whole(len: usize) -> Vec<Range<usize>> {
    std::iter::once(0..len).collect()
}

/// All ranks but this one, beginning with the next.
fn others(world: usize, rank: usize) -> impl Iterator<Item = usize> {
    (1..world).map(move |distance| (rank + distance) % world)
}

fn checked_segments(world: usize, rank: usize, len: usize) -> Vec<Range<usize>> {
    assert!(rank < world, "rank {rank} must lie below the world of {world}");
    segments(world, len)
}

/// r+1, r+2, r+4, ... as long as those bits of r are 0.
fn binomial_children(world: usize, rank: usize) -> impl DoubleEndedIterator<Item = usize> {
    let n_bits = if rank == 0 { usize::BITS - world.saturating_sub(1).leading_zeros() } else { rank.trailing_zeros() };
    (0..n_bits).map(move |bit| rank + (1 << bit)).filter(move |child| *child < world)
}

/// A rank's place in a tree.
struct Branch {
    parent: Option<usize>,
    children: Vec<usize>,
}

/// The trees of [`double_tree_all_reduce`].
#[derive(Clone, Copy)]
enum Tree {
    First,
    Second,
}

impl Tree {
    /// The second tree is the first one with ranks in reverse, or shifted by one where P is odd.
    fn place(self, world: usize, rank: usize) -> usize {
        match self {
            Self::First => rank,
            Self::Second if world.is_multiple_of(2) => world - 1 - rank,
            Self::Second => (rank + 1) % world,
        }
    }

    fn branch(self, world: usize, rank: usize) -> Branch {
        let place = self.place(world, rank);
        let rank_at = |wanted: usize| (0..world).find(|rank| self.place(world, *rank) == wanted);
        let children = (0..world).filter(|child| binary_parent(world, self.place(world, *child)) == Some(place)).collect();
        Branch { parent: binary_parent(world, place).and_then(rank_at), children }
    }
}

/// The binary tree in which the odd places are leaves, two steps up are the multiples of 4, and so on; place 0 is the root.
fn binary_parent(world: usize, place: usize) -> Option<usize> {
    if place == 0 {
        return None;
    }
    let bit = 1 << place.trailing_zeros();
    let between = (place ^ bit) | (bit << 1);
    Some(if between < world { between } else { place ^ bit })
}

/// P-1 steps to the next rank; in step k segment `rank - k - lag` goes out and the one before it comes in.
fn ring(world: usize, rank: usize, len: usize, lag: usize, action: Action) -> Plan {
    let parts = checked_segments(world, rank, len);
    let behind = |n: usize| parts[(rank + 2 * world - n) % world].clone();
    let first = if action == Action::Take { world - 1 } else { 0 };
    let steps = (0..world - 1).map(|k| Step {
        stage: first + k,
        sends: vec![Transfer { peer: (rank + 1) % world, segment: behind(k + lag) }],
        recvs: vec![Transfer { peer: (rank + world - 1) % world, segment: behind(k + lag + 1) }],
        action,
    });
    let steps = steps.collect();
    Plan { parts, steps }
}
