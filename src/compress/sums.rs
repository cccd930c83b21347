//! Sums that owners make: of floats as they are, and of encoded blocks.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, ensure};

use super::codec::Codec;
use super::{Bucket, State, encoded_len, floats_of, packet};
use crate::comm::Communicator;
use crate::shape::split_even;

/// The bytes that each rank adds to what it tells all, by rank.
pub(super) struct Told {
    packets: Vec<Arc<Vec<u8>>>,
    starts: Vec<usize>,
}

impl Told {
    pub(super) fn of(&self, rank: usize) -> &[u8] {
        &self.packets[rank][self.starts[rank]..]
    }
}

/// Replaces floats by their sums over the ranks, in rank order. Each rank sends at most a value more than 2(P-1)/P of them.
pub(super) fn sum_whole(comm: &mut Communicator, whole: &mut [f32]) -> Result<()> {
    sum_and_tell(comm, whole, |_| ()).map(drop)
}

/// [`sum_whole`], and what each rank tells all others beside.
pub(super) fn sum_and_tell(comm: &mut Communicator, whole: &mut [f32], tell: impl FnOnce(&mut Vec<u8>)) -> Result<Told> {
    let (rank, world) = (comm.rank(), comm.world());
    let cuts = split_even(whole.len(), world);
    let own = cuts[rank].clone();
    if !whole.is_empty() {
        let packets =
            cuts.iter().enumerate().map(|(to, cut)| if to == rank { Arc::default() } else { packet(&whole[cut.clone()], |_| ()) });
        let packets = comm.exchange_bytes(packets.collect())?;
        add_floats(&packets, rank, &mut whole[own.clone()])?;
    }
    let packets = comm.share_bytes(packet(&whole[own], tell))?;
    take_floats(&packets, &cuts, whole)?;
    let starts = cuts.iter().map(|cut| cut.len() * size_of::<f32>()).collect();
    Ok(Told { packets, starts })
}

/// Adds the floats at the head of all packets in rank order, this rank's own, which lie in `own`, in their turn.
fn add_floats(packets: &[Arc<Vec<u8>>], rank: usize, own: &mut [f32]) -> Result<()> {
    let mine = own.to_vec();
    own.fill(0.0);
    for (from, packet) in packets.iter().enumerate() {
        if from == rank {
            own.iter_mut().zip(&mine).for_each(|(sum, value)| *sum += value);
        } else {
            let (values, _) = floats_of(packet, own.len())?;
            own.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
    }
    Ok(())
}

fn take_floats(packets: &[Arc<Vec<u8>>], cuts: &[Range<usize>], whole: &mut [f32]) -> Result<()> {
    for (packet, cut) in packets.iter().zip(cuts) {
        let (values, _) = floats_of(packet, cut.len())?;
        whole[cut.clone()].iter_mut().zip(values).for_each(|(whole, value)| *whole = value);
    }
    Ok(())
}

/// Replaces a bucket's values by sums that have gone through `codec` twice: each rank's own on the way to the owner, the sums on the way to all. What is lost
/// on the first way is the rank's residual, what is lost on the second the owner's; an owner's values for itself lose nothing.
#[expect(clippy::too_many_arguments, reason = "one call site; the parts of one bucket")]
pub(super) fn sum_blocks(
    comm: &mut Communicator,
    bucket: &Bucket,
    codec: Codec,
    feeds_back: bool,
    whole: &mut [f32],
    values: &mut [f32],
    state: &State,
    next: &mut State,
) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world());
    let cuts = split_even(whole.len(), world);
    let blocks: Vec<&[Range<usize>]> = (0..world).map(|rank| &bucket.blocks[bucket.owned_blocks(rank, world)]).collect();
    let own = bucket.owned(rank, world);

    if feeds_back {
        next.residual[own.clone()].fill(0.0);
    }
    let mut packets = Vec::with_capacity(world);
    for to in 0..world {
        if to == rank {
            packets.push(Arc::default());
            continue;
        }
        packets.push(packet(&whole[cuts[to].clone()], |bytes| {
            for block in blocks[to] {
                let start = bytes.len();
                codec.encode(&values[block.clone()], bytes);
                if feeds_back {
                    let left = &mut next.residual[block.clone()];
                    codec.decode(&bytes[start..], left);
                    left.iter_mut().zip(&values[block.clone()]).for_each(|(left, value)| *left = value - *left);
                }
            }
        }));
    }
    let packets = comm.exchange_bytes(packets)?;

    let longest = bucket.blocks.iter().map(Range::len).max().unwrap_or(0);
    let mut room = vec![0.0; longest];
    add_floats(&packets, rank, &mut whole[cuts[rank].clone()])?;
    let mine = values[own.clone()].to_vec();
    values[own.clone()].fill(0.0);
    for (from, packet) in packets.iter().enumerate() {
        if from == rank {
            values[own.clone()].iter_mut().zip(&mine).for_each(|(sum, value)| *sum += value);
            continue;
        }
        let n_floats = cuts[rank].len() * size_of::<f32>();
        each_block(codec, packet.get(n_floats..).unwrap_or_default(), blocks[rank], &mut room, |block, decoded| {
            values[block].iter_mut().zip(decoded).for_each(|(sum, value)| *sum += value);
        })?;
    }
    if feeds_back {
        values[own.clone()].iter_mut().zip(&state.owner).for_each(|(sum, left)| *sum += left);
    }
    let told = packet(&whole[cuts[rank].clone()], |bytes| {
        for block in blocks[rank] {
            let start = bytes.len();
            codec.encode(&values[block.clone()], bytes);
            if feeds_back {
                let left = &mut next.owner[block.start - own.start..block.end - own.start];
                codec.decode(&bytes[start..], left);
                left.iter_mut().zip(&values[block.clone()]).for_each(|(left, value)| *left = value - *left);
            }
        }
    });
    let packets = comm.share_bytes(told)?;
    take_floats(&packets, &cuts, whole)?;
    for (owner, packet) in packets.iter().enumerate() {
        let n_floats = cuts[owner].len() * size_of::<f32>();
        each_block(codec, packet.get(n_floats..).unwrap_or_default(), blocks[owner], &mut room, |block, decoded| {
            values[block].copy_from_slice(decoded);
        })?;
    }
    Ok(())
}

/// Decodes the blocks that `bytes` hold, one after another.
fn each_block(
    codec: Codec,
    bytes: &[u8],
    blocks: &[Range<usize>],
    room: &mut [f32],
    mut with: impl FnMut(Range<usize>, &[f32]),
) -> Result<()> {
    let expected = encoded_len(codec, blocks);
    ensure!(bytes.len() == expected, "{} bytes for blocks of {expected}", bytes.len());
    let mut at = 0;
    for block in blocks {
        let decoded = &mut room[..block.len()];
        codec.decode(&bytes[at..], decoded);
        at += codec.encoded_len(block.len());
        with(block.clone(), decoded);
    }
    Ok(())
}
