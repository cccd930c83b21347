//! Smaller gradients: what ranks hand each other in place of whole sums of `f32`, and what they keep back for later.
//!
//! | method | a value takes | how |
//! | --- | --- | --- |
//! | `fp16` | 2 bytes, 1 a block | half precision, each block scaled by a power of two |
//! | `bf16` | 2 bytes | the upper half of an `f32` |
//! | `int8` | 1 byte, 4 a block | multiples of the block's largest value over 127 |
//! | `onebit` | 1 bit, 2 bytes a block | signs and the mean magnitude of the block (Seide et al. 2014; Karimireddy et al. 2019) |
//! | `topk:RATIO` | 6 bytes for each that is sent | the largest of each tensor, the others wait (Lin et al. 2018) |
//! | `powersgd:RANK` | `RANK (N + M)` floats for `N x M` | a matrix as a product of two thin ones (Vogels et al. 2019) |
//!
//! A block is a row of a tensor as PyTorch has it, or several narrow ones ([`codec::rows_per_block`]). Vectors, and matrices for which a method
//! would save nothing, go whole ([`Method::takes`]).
//!
//! # What is sum, what is residual
//! The gradient is a sum over ranks with one global weight, and so is what the ranks agree on here: no mean is taken anywhere. What a method leaves
//! out of a rank's values is added to the values of the next step (error feedback), so that over time
//!
//! > sum of all that was agreed on + what ranks and owners still hold = sum of all gradients,
//!
//! to the rounding of the additions. A step's new residuals take the place of the old ones at its commit ([`Compressor::commit`]); a step that is
//! repeated begins from the old ones.
//!
//! Blocks (`fp16` to `onebit`) are summed as a ring would: each rank encodes its values for the owner of their segment, the owner adds up and
//! encodes the sum, with a residual of its own, and all decode the same bytes: 2(P-1)/P of a message's encoded bytes a rank, and the same bits
//! everywhere. Of `topk` everyone hands everyone its values with their places, P-1 times its message, and all add them in rank order. The two
//! factors of `powersgd` are summed by owners like blocks, as `f32`, and all orthogonalise the same sum.
//!
//! # When the ring changes
//! What ranks hold is theirs and stays theirs; what an owner holds of a sum is added to its own residual, since segments are cut anew; the guesses of
//! `powersgd` begin anew on all. What a lost device held is lost.
//!
//! Never here: a device, an optimizer, who is in the ring.

pub mod codec;
mod low_rank;
mod method;
mod sparse;
mod sums;

use std::ops::Range;

use anyhow::{Context, Result, ensure};

use self::codec::Codec;
pub use self::method::Method;
use crate::comm::Communicator;
use crate::params::{ParamTable, Tensor};

/// How gradients are made smaller, and what must be done before that and no longer after.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    pub method: Method,
    /// What is left out of a step is added to the next one.
    pub feeds_back: bool,
    /// Momentum is taken of each rank's own gradient, before values are chosen (momentum correction): how much, and whether as Nesterov.
    pub momentum: Option<(f32, bool)>,
    /// Largest norm of the whole gradient, where it is clipped before: each rank's own to this over the root of P. 0: any.
    pub clip_norm: f64,
}

/// What a compressor holds from step to step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// What a rank has not sent yet.
    Residual,
    /// A rank's momentum.
    Momentum,
    /// What an owner has left out of a sum; each rank has its segments of it.
    Owner,
    /// The right factor that `powersgd` begins the next step with, `[columns, rank]`; the same on all ranks.
    Factor,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Residual, Self::Momentum, Self::Owner, Self::Factor];

    /// As in the names of a checkpoint's tensors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Residual => "residual",
            Self::Momentum => "momentum",
            Self::Owner => "owner",
            Self::Factor => "factor",
        }
    }
}

/// A piece of what is held: values of a tensor, from `start` on, in PyTorch's order.
#[derive(Clone, Debug, PartialEq)]
pub struct Held {
    pub kind: Kind,
    /// Of the table.
    pub tensor: usize,
    pub start: usize,
    pub values: Vec<f32>,
}

/// A tensor within its bucket.
struct Member {
    /// Of the table.
    idx: usize,
    tensor: Tensor,
    /// Rows and columns as PyTorch has them.
    shape: [usize; 2],
    /// Where its values lie among those of the bucket that are treated alike.
    values: Range<usize>,
}

/// A bucket's tensors, apart by how they go.
struct Bucket {
    /// Whole.
    whole: Vec<Member>,
    n_whole: usize,
    /// Compressed.
    made_small: Vec<Member>,
    n_small: usize,
    /// Of the compressed values, for methods that go by blocks.
    blocks: Vec<Range<usize>>,
}

/// What is held of one bucket.
#[derive(Clone, Default)]
struct State {
    /// Of the compressed values.
    residual: Vec<f32>,
    /// Of all values, whole ones first.
    momentum: Vec<f32>,
    /// Of the compressed values that this rank owns.
    owner: Vec<f32>,
    /// By compressed tensor, transposed: `[rank, columns]`.
    factors: Vec<Vec<f32>>,
}

/// One rank's part in sums of gradients that are made smaller on their way.
pub struct Compressor {
    settings: Settings,
    buckets: Vec<Bucket>,
    /// By bucket: since the last commit, and what the step at hand makes of it.
    states: Vec<State>,
    next: Vec<State>,
    rank: usize,
    world: usize,
    /// Counted from 1.
    step: u64,
    /// Memory that is used again.
    values: Vec<f32>,
    whole: Vec<f32>,
}

impl Compressor {
    /// For the gradients of these parameters, in a world of one, with nothing held.
    pub fn new(settings: Settings, table: &ParamTable) -> Self {
        let buckets: Vec<Bucket> = (0..table.buckets().len()).map(|bucket| Bucket::new(settings.method, table, bucket)).collect();
        let states = vec![State::default(); buckets.len()];
        let next = states.clone();
        let mut compressor = Self { settings, buckets, states, next, rank: 0, world: 1, step: 1, values: Vec::new(), whole: Vec::new() };
        compressor.make_room();
        compressor
    }

    /// Tensors of a table that a method makes smaller.
    pub fn n_tensors(method: Method, table: &ParamTable) -> usize {
        table.tensors().iter().filter(|tensor| method.takes(shape_of(tensor))).count()
    }

    /// Bytes of a rank's gradient as it goes, once the method is warmed up. A rank sends 2(P-1)/P times as many a step; of `topk` P-1 times the values
    /// with their places and 2(P-1)/P times what goes whole. Cuts between ranks may shift a block from one to another.
    pub fn message_bytes(method: Method, table: &ParamTable) -> u64 {
        let bytes_of = |tensor: &Tensor| {
            let shape @ [rows, cols] = shape_of(tensor);
            let n = rows * cols;
            match method {
                _ if !method.takes(shape) => 4 * n,
                Method::Powersgd { rank } => 4 * rank * (rows + cols),
                Method::Topk { ratio } => sparse::message_bytes(n, ratio),
                _ => method.codec().map_or(4 * n, |codec| encoded_len(codec, &blocks_of(0..n, cols))),
            }
        };
        table.tensors().iter().map(|tensor| bytes_of(tensor) as u64).sum()
    }

    /// Whether all of a step's buckets must be there before the first is sent, since the gradient is clipped before.
    pub fn waits_for_all(&self) -> bool {
        self.settings.clip_norm > 0.0
    }

    /// Takes a place in a ring. Elsewhere than before, what was held as an owner becomes this rank's own residual, and factors begin anew.
    pub fn join(&mut self, rank: usize, world: usize) {
        if (rank, world) == (self.rank, self.world) {
            return;
        }
        for bucket in 0..self.buckets.len() {
            let own = self.buckets[bucket].owned(self.rank, self.world);
            let State { residual, owner, factors, .. } = &mut self.states[bucket];
            if let Some(residual) = residual.get_mut(own) {
                residual.iter_mut().zip(&*owner).for_each(|(residual, owner)| *residual += owner);
            }
            owner.clear();
            factors.clear();
        }
        (self.rank, self.world) = (rank, world);
        self.make_room();
    }

    /// Zeros where nothing is held yet, and the same first factors on all ranks.
    fn make_room(&mut self) {
        let Self { settings, buckets, states, next, rank, world, .. } = self;
        for ((bucket, state), next) in buckets.iter().zip(states).zip(next) {
            if settings.feeds_back {
                state.residual.resize(bucket.n_small, 0.0);
            }
            if settings.momentum.is_some() {
                state.momentum.resize(bucket.n_whole + bucket.n_small, 0.0);
            }
            match settings.method {
                method if method.codec().is_some() && settings.feeds_back => {
                    state.owner.resize(bucket.owned(*rank, *world).len(), 0.0);
                }
                Method::Powersgd { rank } if state.factors.is_empty() => {
                    state.factors = bucket.made_small.iter().map(|member| low_rank::first_factor(member.idx, member.shape, rank)).collect();
                }
                _ => {}
            }
            *next = state.clone();
        }
    }

    /// What is summed from now on is the gradient of this step, counted from 1.
    pub fn begin(&mut self, step: u64) {
        self.step = step;
    }

    /// All ranks hold what the step's update needs: what it made of residuals and the like counts from now on.
    pub fn commit(&mut self) {
        std::mem::swap(&mut self.states, &mut self.next);
    }

    /// The factor that brings this rank's own gradient, given in buckets, down to its part of the norm that is allowed.
    pub fn clip_factor<'g>(&self, buckets: impl Iterator<Item = &'g [f32]>) -> f32 {
        let norm = buckets.flatten().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt();
        let most = self.settings.clip_norm / (self.world as f64).sqrt();
        // What is not finite is left for others to find.
        if most > 0.0 && norm.is_finite() { (most / (norm + 1e-6)).min(1.0) as f32 } else { 1.0 }
    }

    /// Replaces a bucket of this rank's gradient, multiplied by `factor`, by what all ranks agree on as the sum. All ranks call this for the same
    /// buckets in the same order; once a step for each bucket.
    ///
    /// # Errors
    /// Any [`crate::comm::CommError`] but `UnknownRoot`; bytes that are no such bucket's.
    pub fn sum(&mut self, comm: &mut Communicator, bucket: usize, words: &mut [f32], factor: f32) -> Result<()> {
        ensure!((comm.rank(), comm.world()) == (self.rank, self.world), "the compressor has another place than its ring");
        let Self { settings, buckets, states, next, step, values, whole, .. } = self;
        let parts = buckets.get(bucket).context("a bucket of the table")?;
        let (state, next) = (&states[bucket], &mut next[bucket]);
        parts.gather(words, factor, whole, values);
        if let Some((momentum, nesterov)) = settings.momentum {
            let all = whole.iter_mut().chain(values.iter_mut());
            for ((value, old), new) in all.zip(&state.momentum).zip(&mut next.momentum) {
                *new = momentum * old + *value;
                *value = if nesterov { *value + momentum * *new } else { *new };
            }
        }
        if settings.feeds_back {
            values.iter_mut().zip(&state.residual).for_each(|(value, residual)| *value += residual);
        }
        match settings.method {
            Method::None => sums::sum_whole(comm, whole)?,
            Method::Topk { .. } => {
                let density = settings.method.density(*step);
                sparse::sum(comm, parts, density, whole, values, next)?;
            }
            Method::Powersgd { rank } => low_rank::sum(comm, parts, rank, whole, values, state, next)?,
            method => {
                let codec = method.codec().context("a method of blocks")?;
                sums::sum_blocks(comm, parts, codec, settings.feeds_back, whole, values, state, next)?;
            }
        }
        parts.scatter(whole, values, words);
        Ok(())
    }

    /// All that is held since the last commit.
    pub fn held(&self) -> Vec<Held> {
        let mut all = Vec::new();
        for (bucket, state) in self.buckets.iter().zip(&self.states) {
            let mut put = |kind, of: &Member, start, values: &[f32]| {
                all.push(Held { kind, tensor: of.idx, start, values: values.to_vec() });
            };
            for (i, member) in bucket.made_small.iter().enumerate() {
                if let Some(values) = state.residual.get(member.values.clone()) {
                    put(Kind::Residual, member, 0, values);
                }
                let own = bucket.owned(self.rank, self.world);
                let both = own.start.max(member.values.start)..own.end.min(member.values.end);
                if !both.is_empty() && !state.owner.is_empty() {
                    put(Kind::Owner, member, both.start - member.values.start, &state.owner[both.start - own.start..both.end - own.start]);
                }
                if let Some(factor) = state.factors.get(i) {
                    put(Kind::Factor, member, 0, &low_rank::transposed(factor, member.shape[1]));
                }
            }
            for (member, values) in bucket.with_momentum() {
                if let Some(values) = state.momentum.get(values) {
                    put(Kind::Momentum, member, 0, values);
                }
            }
        }
        all
    }

    /// Holds these pieces from now on, whole tensors, of [`Kind::Owner`] what is this rank's; what is not among them is as at the start.
    ///
    /// # Errors
    /// A piece that does not fit.
    pub fn hold(&mut self, pieces: &[Held]) -> Result<()> {
        self.states = vec![State::default(); self.buckets.len()];
        self.make_room();
        let (rank, world) = (self.rank, self.world);
        for (bucket, state) in self.buckets.iter().zip(&mut self.states) {
            let own = bucket.owned(rank, world);
            let of = |kind, member: &Member| pieces.iter().find(|piece| piece.kind == kind && piece.tensor == member.idx);
            for (i, member) in bucket.made_small.iter().enumerate() {
                if let Some(piece) = of(Kind::Residual, member) {
                    put(&mut state.residual, member.values.clone(), &piece.values)?;
                }
                if let Some(piece) = of(Kind::Owner, member) {
                    let both = own.start.max(member.values.start)..own.end.min(member.values.end);
                    if !both.is_empty() {
                        let within = both.start - member.values.start..both.end - member.values.start;
                        let values = piece.values.get(within).context("what owners hold of a tensor is whole")?;
                        put(&mut state.owner, both.start - own.start..both.end - own.start, values)?;
                    }
                }
                if let (Some(piece), Some(factor)) = (of(Kind::Factor, member), state.factors.get_mut(i)) {
                    ensure!(piece.values.len() == factor.len(), "a factor of {} has {} numbers", member.tensor.name, piece.values.len());
                    let rank = factor.len() / member.shape[1].max(1);
                    *factor = low_rank::transposed(&piece.values, rank);
                }
            }
            for (member, at) in bucket.with_momentum() {
                if let Some(piece) = of(Kind::Momentum, member) {
                    put(&mut state.momentum, at, &piece.values)?;
                }
            }
        }
        self.next.clone_from(&self.states);
        Ok(())
    }
}

fn put(all: &mut [f32], at: Range<usize>, values: &[f32]) -> Result<()> {
    let n_room = at.len();
    let room = all.get_mut(at).filter(|room| room.len() == values.len());
    room.with_context(|| format!("{} numbers where {n_room} are held", values.len()))?.copy_from_slice(values);
    Ok(())
}

/// The blocks of a tensor of so many columns.
fn blocks_of(values: Range<usize>, cols: usize) -> Vec<Range<usize>> {
    let len = (cols * codec::rows_per_block(cols)).max(1);
    values.clone().step_by(len).map(|start| start..(start + len).min(values.end)).collect()
}

/// Rows and columns of a tensor; a vector is one row.
fn shape_of(tensor: &Tensor) -> [usize; 2] {
    match tensor.shape.as_slice() {
        [] => [1, 1],
        [n] => [1, *n],
        [rows @ .., cols] => [rows.iter().product(), *cols],
    }
}

impl Bucket {
    fn new(method: Method, table: &ParamTable, bucket: usize) -> Self {
        let members = table.tensors().iter().enumerate().filter(|(_, tensor)| tensor.bucket == bucket);
        let (mut whole, mut made_small, mut blocks) = (Vec::new(), Vec::new(), Vec::new());
        let (mut n_whole, mut n_small) = (0, 0);
        for (idx, tensor) in members {
            let shape @ [rows, cols] = shape_of(tensor);
            let is_small = method.takes(shape);
            let (list, at) = if is_small { (&mut made_small, &mut n_small) } else { (&mut whole, &mut n_whole) };
            let values = *at..*at + rows * cols;
            *at = values.end;
            if is_small {
                blocks.extend(blocks_of(values.clone(), cols));
            }
            list.push(Member { idx, tensor: tensor.clone(), shape, values });
        }
        Self { whole, n_whole, made_small, n_small, blocks }
    }

    /// Tensors with the places of their momentum.
    fn with_momentum(&self) -> impl Iterator<Item = (&Member, Range<usize>)> {
        let behind = |member: &Member| self.n_whole + member.values.start..self.n_whole + member.values.end;
        let whole = self.whole.iter().map(|member| (member, member.values.clone()));
        whole.chain(self.made_small.iter().map(move |member| (member, behind(member))))
    }

    /// The blocks that a rank owns: cut as evenly as blocks allow.
    fn owned_blocks(&self, rank: usize, world: usize) -> Range<usize> {
        let first = |rank: usize| self.blocks.partition_point(|block| block.start * world < self.n_small * rank);
        first(rank)..if rank + 1 == world { self.blocks.len() } else { first(rank + 1) }
    }

    /// The compressed values that a rank owns.
    fn owned(&self, rank: usize, world: usize) -> Range<usize> {
        let blocks = self.owned_blocks(rank, world);
        let start = |block: usize| self.blocks.get(block).map_or(self.n_small, |block| block.start);
        start(blocks.start)..start(blocks.end)
    }

    /// Takes a bucket apart: values in PyTorch's order, multiplied by `factor`.
    fn gather(&self, words: &[f32], factor: f32, whole: &mut Vec<f32>, values: &mut Vec<f32>) {
        for (members, n, to) in [(&self.whole, self.n_whole, whole), (&self.made_small, self.n_small, values)] {
            to.resize(n, 0.0);
            members.iter().for_each(|member| member.tensor.unpack(&words[member.tensor.in_bucket()], &mut to[member.values.clone()]));
            if factor != 1.0 {
                to.iter_mut().for_each(|value| *value *= factor);
            }
        }
    }

    /// Puts it together again.
    fn scatter(&self, whole: &[f32], values: &[f32], words: &mut [f32]) {
        for (members, from) in [(&self.whole, whole), (&self.made_small, values)] {
            members.iter().for_each(|member| member.tensor.pack(&from[member.values.clone()], &mut words[member.tensor.in_bucket()]));
        }
    }
}

/// What goes from one rank to others: floats, then bytes of a codec.
fn packet(floats: &[f32], encode: impl FnOnce(&mut Vec<u8>)) -> std::sync::Arc<Vec<u8>> {
    let mut bytes = Vec::with_capacity(size_of_val(floats));
    floats.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes()));
    encode(&mut bytes);
    std::sync::Arc::new(bytes)
}

/// The first bytes of a packet as floats, and the rest.
fn floats_of(bytes: &[u8], n: usize) -> Result<(impl Iterator<Item = f32>, &[u8])> {
    let (floats, rest) = bytes.split_at_checked(n * size_of::<f32>()).with_context(|| format!("{} bytes for {n} floats", bytes.len()))?;
    Ok((floats.chunks_exact(4).map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])), rest))
}

/// Bytes of encoded blocks.
fn encoded_len(codec: Codec, blocks: &[Range<usize>]) -> usize {
    blocks.iter().map(|block| codec.encoded_len(block.len())).sum()
}
