//! Channels between ranks that are threads of one process, with flow control, deadlines and the search for who is to blame.
//!
//! Every ordered pair of ranks has a link: one bounded channel for messages and one on which the receiver hands the buffers back.
//! A link owns `IN_FLIGHT` buffers, made when it is first used. A message goes out only in one of them, so a sender that runs ahead
//! waits for its receiver, the channels never fill, and nothing is allocated from then on.
//! Never here: what a message means, sums, plans.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, TryRecvError, bounded};

use super::Communicator;

/// Floats of one buffer: 64 KiB, which both ends keep in their second-level cache.
pub(super) const PIECE_FLOATS: usize = 16 * 1024;
/// The same in bytes.
pub(super) const PIECE_BYTES: usize = PIECE_FLOATS * size_of::<f32>();
/// Buffers of one link. The executor runs at most two pieces ahead of what it has received, which needs three.
const IN_FLIGHT: usize = 4;

/// What holds for all ranks of a group.
#[derive(Clone, Debug)]
pub struct Options {
    /// The longest that a rank waits for one message, or for a buffer, before it gives its peer up.
    pub deadline: Duration,
    /// Membership generation, which every message carries: a group made after a loss has a higher one.
    pub generation: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(60), generation: 0 }
    }
}

/// Makes a ring of `world` ranks: one communicator a rank, in rank order, each to be moved to its thread.
pub fn group(world: usize, options: Options) -> Vec<Communicator> {
    let board = Arc::new(Board { states: Mutex::new(vec![State::Busy; world]) });
    let mut ports: Vec<Port> = (0..world).map(|rank| Port::new(rank, world, &options, &board)).collect();
    for from in 0..world {
        for to in (0..world).filter(|to| *to != from) {
            let (messages, inbox) = bounded(IN_FLIGHT);
            let (give_back, returned) = bounded(IN_FLIGHT);
            ports[from].outlets[to] = Some(Outlet { messages, returned, spare: None });
            ports[to].inlets[from] = Some(Inlet { inbox, give_back });
        }
    }
    ports.into_iter().map(Communicator::new).collect()
}

/// What went wrong in a collective. After any of these the communicator is closed: every later call returns the same error, and its
/// peers learn of it at once; only a new group goes on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommError {
    /// `waiting_for` is alive but was not there in time; it need not be a neighbour of the rank that reports it.
    #[error("rank {waiting_for} kept the {what} waiting for more than {after:?}; raise the deadline if it is only slow")]
    Timeout { waiting_for: usize, what: Operation, after: Duration },
    /// The rank has dropped its communicator: its thread ended or panicked, or it was expelled.
    #[error("rank {rank} is gone; go on with a new group without it")]
    PeerGone { rank: usize },
    /// Two ranks are not in the same call.
    #[error("{0}")]
    Mismatch(Box<Mismatch>),
    /// There is no such rank to send from; nothing was sent and the communicator stays open.
    #[error("root {root} is not one of {world} ranks; take one below {world}")]
    UnknownRoot { root: usize, world: usize },
}

/// Two ranks that are not in the same call, with what each is doing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rank {rank} is at {mine}, rank {peer} sent {theirs}; all ranks must make the same calls with the same lengths")]
pub struct Mismatch {
    /// The rank that noticed.
    pub rank: usize,
    pub mine: Header,
    pub peer: usize,
    pub theirs: Header,
}

/// The collective that a message belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    ReduceScatter,
    AllGather,
    AllReduce,
    /// The first half of an all-gather of bytes: how many each rank has.
    GatherLengths,
    GatherBytes,
    /// The first half of a broadcast: how many bytes will come.
    BroadcastLength {
        root: usize,
    },
    Broadcast {
        root: usize,
    },
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ReduceScatter => f.write_str("reduce-scatter"),
            Self::AllGather => f.write_str("all-gather"),
            Self::AllReduce => f.write_str("all-reduce"),
            Self::GatherLengths => f.write_str("all-gather of lengths"),
            Self::GatherBytes => f.write_str("all-gather of bytes"),
            Self::BroadcastLength { root } => write!(f, "broadcast of a length from rank {root}"),
            Self::Broadcast { root } => write!(f, "broadcast from rank {root}"),
        }
    }
}

/// What a message says of itself; the receiver compares all of it with what its own plan expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Membership generation of the group.
    pub generation: u64,
    /// Number of the call on this communicator.
    pub call: u64,
    pub operation: Operation,
    /// Elements of the whole message of the collective.
    pub len: usize,
    /// Step of the plan.
    pub step: usize,
    /// First element of this piece.
    pub start: usize,
    /// Elements of this piece.
    pub n_elements: usize,
}

impl std::fmt::Display for Header {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { generation, call, operation, len, step, start, n_elements } = self;
        let end = start + n_elements;
        write!(f, "{operation} of {len} (generation {generation}, call {call}, step {step}, elements {start}..{end})")
    }
}

/// A piece under way.
struct Message {
    header: Header,
    buffer: Vec<f32>,
}

/// The sending end of a link.
struct Outlet {
    messages: Sender<Message>,
    returned: Receiver<Vec<f32>>,
    /// Buffers at hand; none before the first use.
    spare: Option<Vec<Vec<f32>>>,
}

/// The receiving end of a link.
struct Inlet {
    inbox: Receiver<Message>,
    give_back: Sender<Vec<f32>>,
}

/// What a rank is doing, as far as others must know to tell the rank that fails from those that merely wait for it.
#[derive(Clone, Debug)]
enum State {
    /// Sending, adding, or outside of any call.
    Busy,
    WaitsFor(usize),
    /// Closed its links after this error.
    Failed(CommError),
    /// Dropped its communicator.
    Left,
}

/// The states of all ranks. It is written only where a rank is about to block, and read only after a failure.
struct Board {
    states: Mutex<Vec<State>>,
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, Vec<State>> {
        // A state is replaced as a whole, so one written by a thread that panicked is as good as any.
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, rank: usize, state: State) {
        self.lock()[rank] = state;
    }

    /// The error for one whose peer did not come: follows who waits for whom to the rank where the trouble began.
    fn blame(&self, peer: usize, what: Operation, after: Duration) -> CommError {
        let states = self.lock();
        let mut suspect = peer;
        for _ in 0..states.len() {
            match &states[suspect] {
                State::WaitsFor(next) => suspect = *next,
                State::Failed(error) => return error.clone(),
                State::Left => return CommError::PeerGone { rank: suspect },
                State::Busy => return CommError::Timeout { waiting_for: suspect, what, after },
            }
        }
        // They wait for each other in a circle.
        CommError::Timeout { waiting_for: peer, what, after }
    }
}

/// One rank's end of all its links.
pub(super) struct Port {
    pub(super) rank: usize,
    pub(super) world: usize,
    pub(super) generation: u64,
    /// Payload sent since the start, in bytes.
    pub(super) n_bytes_sent: u64,
    deadline: Duration,
    outlets: Vec<Option<Outlet>>,
    inlets: Vec<Option<Inlet>>,
    board: Arc<Board>,
    failure: Option<CommError>,
}

impl Port {
    fn new(rank: usize, world: usize, options: &Options, board: &Arc<Board>) -> Self {
        let Options { deadline, generation } = *options;
        let outlets = (0..world).map(|_| None).collect();
        let inlets = (0..world).map(|_| None).collect();
        Self { rank, world, generation, n_bytes_sent: 0, deadline, outlets, inlets, board: Arc::clone(board), failure: None }
    }

    /// The error that closed this port, if any.
    pub(super) fn check_open(&self) -> Result<(), CommError> {
        self.failure.clone().map_or(Ok(()), Err)
    }

    /// Records the first error and hangs up on all peers, so that none of them waits for its deadline.
    pub(super) fn close(&mut self, error: &CommError) {
        if self.failure.is_none() {
            self.failure = Some(error.clone());
            // First the reason, then the silence: whoever finds a link cut finds out why.
            self.board.set(self.rank, State::Failed(error.clone()));
            self.outlets.iter_mut().for_each(|outlet| *outlet = None);
            self.inlets.iter_mut().for_each(|inlet| *inlet = None);
        }
    }

    /// Sends `bytes`, at most [`PIECE_BYTES`], to `peer`; waits only for a buffer.
    pub(super) fn send(&mut self, peer: usize, header: Header, bytes: &[u8]) -> Result<(), CommError> {
        let Self { rank, deadline, board, outlets, .. } = self;
        let Some(outlet) = outlets.get_mut(peer).and_then(Option::as_mut) else {
            return Err(CommError::PeerGone { rank: peer });
        };
        let Outlet { messages, returned, spare } = outlet;
        let spare = spare.get_or_insert_with(|| (0..IN_FLIGHT).map(|_| vec![0.0; PIECE_FLOATS]).collect());
        let mut buffer = match spare.pop() {
            Some(buffer) => buffer,
            None => wait(returned, board, *rank, peer, header.operation, *deadline)?,
        };
        bytemuck::cast_slice_mut::<f32, u8>(&mut buffer)[..bytes.len()].copy_from_slice(bytes);
        // There is room: the channel holds as many messages as the link has buffers.
        if messages.send_timeout(Message { header, buffer }, *deadline).is_err() {
            return Err(board.blame(peer, header.operation, *deadline));
        }
        self.n_bytes_sent += bytes.len() as u64;
        Ok(())
    }

    /// The next piece from `peer`, which must carry exactly the header `expected`; its buffer goes to [`Self::give_back`].
    pub(super) fn receive(&mut self, peer: usize, expected: Header) -> Result<Vec<f32>, CommError> {
        let Some(inlet) = self.inlets.get(peer).and_then(Option::as_ref) else {
            return Err(CommError::PeerGone { rank: peer });
        };
        let Message { header, buffer } = wait(&inlet.inbox, &self.board, self.rank, peer, expected.operation, self.deadline)?;
        if header == expected {
            Ok(buffer)
        } else {
            Err(CommError::Mismatch(Box::new(Mismatch { rank: self.rank, mine: expected, peer, theirs: header })))
        }
    }

    /// Hands a received buffer back to `peer`. A peer that has left since needs it no more.
    pub(super) fn give_back(&mut self, peer: usize, buffer: Vec<f32>) {
        if let Some(inlet) = self.inlets.get(peer).and_then(Option::as_ref) {
            let _ = inlet.give_back.try_send(buffer);
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if self.failure.is_none() {
            self.board.set(self.rank, State::Left);
        }
    }
}

/// The next item of a channel whose other end is `peer`, with the reason if none comes.
fn wait<T>(channel: &Receiver<T>, board: &Board, rank: usize, peer: usize, what: Operation, deadline: Duration) -> Result<T, CommError> {
    match channel.try_recv() {
        Ok(item) => return Ok(item),
        Err(TryRecvError::Disconnected) => return Err(board.blame(peer, what, deadline)),
        Err(TryRecvError::Empty) => {}
    }
    board.set(rank, State::WaitsFor(peer));
    // Whoever fails here stays on the board as waiting until it closes, lest another that times out now blames it.
    // Whether time ran out or the link was cut, the board knows the reason.
    let item = channel.recv_timeout(deadline).map_err(|_| board.blame(peer, what, deadline))?;
    board.set(rank, State::Busy);
    Ok(item)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_another_generation_is_a_mismatch_that_names_both() {
        let mut ranks = group(2, Options { deadline: Duration::from_secs(60), generation: 3 });
        ranks[1].port.generation = 4;
        let errors: Vec<CommError> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                ranks.iter_mut().map(|rank| scope.spawn(move || rank.all_reduce(&mut [1.0; 8]).expect_err("generations differ"))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        for error in errors {
            let CommError::Mismatch(mismatch) = error else { panic!("expected a mismatch, got {error}") };
            assert_eq!(mismatch.mine.generation, 3 + mismatch.rank as u64);
            assert_eq!(mismatch.theirs.generation, 3 + mismatch.peer as u64);
        }
    }

    #[test]
    fn blame_follows_the_chain_to_the_rank_that_waits_for_nobody() {
        let after = Duration::from_secs(1);
        let what = Operation::AllReduce;
        let blame = |states: Vec<State>| Board { states: Mutex::new(states) }.blame(2, what, after);
        let timeout = |waiting_for| CommError::Timeout { waiting_for, what, after };
        use State::{Busy, Failed, Left, WaitsFor};
        assert_eq!(blame(vec![WaitsFor(2), Busy, WaitsFor(1)]), timeout(1));
        assert_eq!(blame(vec![WaitsFor(2), WaitsFor(0), WaitsFor(1)]), timeout(2));
        assert_eq!(blame(vec![WaitsFor(2), Left, WaitsFor(1)]), CommError::PeerGone { rank: 1 });
        assert_eq!(blame(vec![WaitsFor(2), Busy, Failed(CommError::PeerGone { rank: 1 })]), CommError::PeerGone { rank: 1 });
    }
}
