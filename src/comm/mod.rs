//! How ranks exchange gradients: collectives over slices of `f32` and over bytes.
//!
//! [`plan`] says who sends which segment to whom, as data; [`transport`] moves pieces of segments between threads; the
//! [`Communicator`] here runs the one on the other. Never here: a device, a model, parameters with names.
//!
//! # The ring
//! All ranks stand in a circle and everyone speaks to the next one only. An all-reduce cuts the message into as many segments as there
//! are ranks. With three ranks A, B, C that hold a0 a1 a2, b0 b1 b2, c0 c1 c2:
//!
//! | | A (owns 0) | B (owns 1) | C (owns 2) |
//! | --- | --- | --- | --- |
//! | step 0: A sends a2, B b0, C c1; who receives, adds | a0, c1+a1, a2 | b0, b1, a2+b2 | b0+c0, c1, c2 |
//! | step 1: A sends c1+a1, B a2+b2, C b0+c0; who receives, adds | **b0+c0+a0** | **c1+a1+b1** | **a2+b2+c2** |
//! | step 2: A sends segment 0, B 1, C 2; who receives, copies | 0 and 2 complete | 1 and 0 complete | 2 and 1 complete |
//! | step 3: A sends segment 2, B 0, C 1; who receives, copies | all | all | all |
//!
//! The first half is the reduce-scatter, the second the all-gather: 2(P-1) steps, in which each rank sends 2S(P-1)/P bytes of a message
//! of S bytes. No all-reduce can do with fewer, and all links are busy all the time (Patarasuk and Yuan, "Bandwidth optimal all-reduce
//! algorithms for clusters of workstations", J. Parallel Distrib. Comput. 69(2), 2009).
//!
//! A segment is added up along one chain of ranks and then copied, so all ranks end with the same bits; the order of a sum follows from
//! P and the position in the message, never from timing.
//!
//! # Pieces
//! A segment travels in pieces of 16 Ki floats, each in a buffer that the receiver hands back. A rank sends two pieces ahead of what it
//! has received, so that one is on its way while another is added. That cannot lock up: when a rank waits for a buffer, its successor
//! has not finished the same step; if all waited at once, all would be in one step, each at most one piece further than what it took
//! in, while a link holds four.

pub mod plan;
pub mod transport;

use std::collections::BTreeMap;
use std::ops::Range;

use bytemuck::Pod;

use plan::{Action, Plan, Step, Transfer};
pub use transport::{CommError, Operation, Options, group};
use transport::{Header, PIECE_BYTES, Port};

/// Pieces that a rank sends before it takes one in.
const LEAD: usize = 2;
/// Plans kept; a run has as many as its buckets have different lengths.
const MAX_PLANS: usize = 256;
/// Bytes of a length on the way.
const LENGTH_BYTES: usize = size_of::<u64>();

/// One rank's place in a group. All ranks must make the same calls in the same order, with the same lengths where not said otherwise.
///
/// A call returns when this rank's part is done; others may still be at theirs. After an error the contents of the data are unspecified
/// and the communicator is closed (see [`CommError`]). In a world of one rank every call succeeds and does nothing.
pub struct Communicator {
    port: Port,
    /// By operation and length, so that a call in the steady state allocates nothing.
    plans: BTreeMap<(Operation, usize), Plan>,
    /// Calls made so far; equal on all ranks as long as they are in step.
    n_calls: u64,
}

impl Communicator {
    fn new(port: Port) -> Self {
        Self { port, plans: BTreeMap::new(), n_calls: 0 }
    }

    /// This rank, `0..world`.
    pub fn rank(&self) -> usize {
        self.port.rank
    }

    /// P, the number of ranks.
    pub fn world(&self) -> usize {
        self.port.world
    }

    /// The membership generation that this group's messages carry.
    pub fn generation(&self) -> u64 {
        self.port.generation
    }

    /// Payload that this rank has sent since the group was made, in bytes: what the plans move, and 8 bytes for each length that goes
    /// round before bytes do.
    pub fn bytes_sent(&self) -> u64 {
        self.port.n_bytes_sent
    }

    /// Sums `data` over all ranks, each segment at its owner: on return this rank's segment, whose range is returned, is complete, and
    /// the rest of `data` holds partial sums.
    ///
    /// # Errors
    /// Any [`CommError`] but `UnknownRoot`.
    pub fn reduce_scatter(&mut self, data: &mut [f32]) -> Result<Range<usize>, CommError> {
        self.run_cached(Operation::ReduceScatter, data, plan::ring_reduce_scatter)?;
        Ok(plan::owned_segment(self.port.world, self.port.rank, data.len()))
    }

    /// Brings each rank's own segment of `data`, as [`Self::reduce_scatter`] returns it, to all ranks.
    ///
    /// # Errors
    /// Any [`CommError`] but `UnknownRoot`.
    pub fn all_gather(&mut self, data: &mut [f32]) -> Result<(), CommError> {
        self.run_cached(Operation::AllGather, data, plan::ring_all_gather)
    }

    /// Sums `data` over all ranks; all end with the same bits.
    ///
    /// # Errors
    /// Any [`CommError`] but `UnknownRoot`.
    pub fn all_reduce(&mut self, data: &mut [f32]) -> Result<(), CommError> {
        self.run_cached(Operation::AllReduce, data, plan::ring_all_reduce)
    }

    /// What every rank has, in rank order; lengths may differ. 2(P-1) steps: first the lengths, 8 bytes each, then the bytes.
    ///
    /// # Errors
    /// Any [`CommError`] but `UnknownRoot`.
    pub fn all_gather_bytes(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let Port { rank, world, .. } = self.port;
        let mut lengths = vec![0; LENGTH_BYTES * world];
        lengths[LENGTH_BYTES * rank..][..LENGTH_BYTES].copy_from_slice(&(mine.len() as u64).to_le_bytes());
        let of_lengths: Vec<_> = (0..world).map(|rank| LENGTH_BYTES * rank..LENGTH_BYTES * (rank + 1)).collect();
        self.run(Operation::GatherLengths, &mut lengths, &plan::ring_all_gather_of(rank, &of_lengths))?;

        let mut end = 0;
        let segments: Vec<_> = lengths
            .chunks_exact(LENGTH_BYTES)
            .map(|length| {
                let start = end;
                end += length_from(length);
                start..end
            })
            .collect();
        let mut all = vec![0; end];
        all[segments[rank].clone()].copy_from_slice(mine);
        self.run(Operation::GatherBytes, &mut all, &plan::ring_all_gather_of(rank, &segments))?;
        Ok(segments.into_iter().map(|segment| all[segment].to_vec()).collect())
    }

    /// Replaces `data` by what rank `root` has in it; only the root's length counts.
    ///
    /// # Errors
    /// Any [`CommError`]. Ranks that name different roots are found out at the next call at the latest.
    pub fn broadcast(&mut self, root: usize, data: &mut Vec<u8>) -> Result<(), CommError> {
        let Port { rank, world, .. } = self.port;
        if root >= world {
            return Err(CommError::UnknownRoot { root, world });
        }
        let mut length = (data.len() as u64).to_le_bytes();
        let of_length = plan::broadcast(world, rank, root, LENGTH_BYTES, LENGTH_BYTES);
        self.run(Operation::BroadcastLength { root }, &mut length, &of_length)?;
        if rank != root {
            data.resize(length_from(&length), 0);
        }
        let plan = plan::broadcast(world, rank, root, data.len(), PIECE_BYTES);
        self.run(Operation::Broadcast { root }, data, &plan)
    }

    /// Runs the plan for `data`'s length, making it if it is not at hand.
    fn run_cached(
        &mut self,
        operation: Operation,
        data: &mut [f32],
        make: fn(world: usize, rank: usize, len: usize) -> Plan,
    ) -> Result<(), CommError> {
        let Self { port, plans, n_calls } = self;
        let key = (operation, data.len());
        if plans.len() >= MAX_PLANS && !plans.contains_key(&key) {
            plans.clear();
        }
        let plan = plans.entry(key).or_insert_with(|| make(port.world, port.rank, data.len()));
        run(port, n_calls, operation, data, plan)
    }

    fn run(&mut self, operation: Operation, data: &mut [u8], plan: &Plan) -> Result<(), CommError> {
        run(&mut self.port, &mut self.n_calls, operation, data, plan)
    }
}

/// Runs one call; its error closes the port.
fn run<E: Element>(port: &mut Port, n_calls: &mut u64, operation: Operation, data: &mut [E], plan: &Plan) -> Result<(), CommError> {
    port.check_open()?;
    let call = *n_calls;
    *n_calls += 1;
    let header = Header { generation: port.generation, call, operation, len: data.len(), step: 0, start: 0, n_elements: 0 };
    plan.steps
        .iter()
        .enumerate()
        .try_for_each(|(step_idx, step)| run_step(port, step, Header { step: step_idx, ..header }, data))
        .inspect_err(|error| port.close(error))
}

/// Runs one step: pieces of one segment out, pieces of another in, in turns.
fn run_step<E: Element>(port: &mut Port, step: &Step, header: Header, data: &mut [E]) -> Result<(), CommError> {
    let piece_len = PIECE_BYTES / size_of::<E>();
    let n_pieces = |transfer: &Option<Transfer>| transfer.as_ref().map_or(0, |to| plan::n_pieces(to.segment.len(), piece_len));
    let (n_sends, n_receives) = (n_pieces(&step.send), n_pieces(&step.recv));
    let of_piece = |piece: &Range<usize>| Header { start: piece.start, n_elements: piece.len(), ..header };
    let (mut sent, mut received) = (0, 0);
    while sent < n_sends || received < n_receives {
        if let Some(Transfer { peer, segment }) = &step.send
            && sent < n_sends
            && (sent < received + LEAD || received == n_receives)
        {
            let piece = plan::piece(segment, piece_len, sent);
            port.send(*peer, of_piece(&piece), bytemuck::cast_slice(&data[piece]))?;
            sent += 1;
        } else if let Some(Transfer { peer, segment }) = &step.recv {
            let piece = plan::piece(segment, piece_len, received);
            let buffer = port.receive(*peer, of_piece(&piece))?;
            let theirs = &bytemuck::cast_slice::<f32, E>(&buffer)[..piece.len()];
            match step.action {
                Action::Accumulate => E::accumulate(&mut data[piece], theirs),
                Action::Copy => data[piece].copy_from_slice(theirs),
            }
            port.give_back(*peer, buffer);
            received += 1;
        }
    }
    Ok(())
}

/// What a message is made of.
trait Element: Pod {
    /// `mine += theirs`, element by element.
    fn accumulate(mine: &mut [Self], theirs: &[Self]);
}

impl Element for f32 {
    fn accumulate(mine: &mut [Self], theirs: &[Self]) {
        for (mine, theirs) in mine.iter_mut().zip(theirs) {
            *mine += theirs;
        }
    }
}

impl Element for u8 {
    /// Wraps; no plan for bytes adds.
    fn accumulate(mine: &mut [Self], theirs: &[Self]) {
        for (mine, theirs) in mine.iter_mut().zip(theirs) {
            *mine = mine.wrapping_add(*theirs);
        }
    }
}

/// A length as it travels, from exactly [`LENGTH_BYTES`] bytes; it was a `usize` at its sender.
fn length_from(bytes: &[u8]) -> usize {
    bytes.iter().rev().fold(0, |length, byte| length << 8 | usize::from(*byte))
}
