//! Channels between ranks that are threads of one process, with flow control, deadlines and the search for who is to blame.
//!
//! Every ordered pair of ranks has a link: one bounded channel, in which handles travel, not what they are handles of. A sender that runs
//! ahead of its receiver by more messages than a link holds waits. That cannot lock up: a link is longer than what one collective sends
//! over it beyond what it waits for, and whoever is calls ahead has read all that the others sent before.
//! Never here: what a message means, sums, plans.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, TryRecvError, TrySendError, bounded};

use super::Communicator;
use super::plan::Algorithm;

/// Messages that a link holds. A collective sends at most four over one link, the ring at most one more than it has received.
const IN_FLIGHT: usize = 8;
/// How often a rank looks for a message before it lets other threads run, where every rank may have a core of its own.
const SPINS: u32 = 50;
/// How long it then goes on looking, other threads running in between, before it goes to sleep. Waking up takes 50 us and more; a rank that
/// slept sooner would keep its peers waiting until they sleep too, and all would be woken at every step from then on.
const LOOK: Duration = Duration::from_micros(300);

/// What holds for all ranks of a group.
#[derive(Clone, Debug)]
pub struct Options {
    /// The longest that a rank waits for one message, or for a buffer, before it gives its peer up.
    pub deadline: Duration,
    /// Membership generation, which every message carries: a group made after a loss has a higher one.
    pub generation: u64,
    /// How collectives over floats go about it; the same on all ranks.
    pub algorithm: Algorithm,
    /// Sees every message at both ends; for tests and measurements.
    pub tap: Option<Tap>,
}

impl Default for Options {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(60), generation: 0, algorithm: Algorithm::Auto, tap: None }
    }
}

/// One end of a message's way, as a [`Tap`] sees it.
#[derive(Clone, Copy, Debug)]
pub struct Passing {
    /// The rank at this end.
    pub rank: usize,
    /// The rank at the other.
    pub peer: usize,
    pub header: Header,
    /// Whether this is the end that hands it over, just before it does; else the one that has just taken it.
    pub is_sent: bool,
    pub n_bytes: usize,
}

/// Called in the thread of each rank for every message that it sends or receives. It may wait, and so make the links slow; or panic, and so
/// end the rank at that very point.
#[derive(Clone)]
pub struct Tap(Arc<dyn Fn(&Passing) + Send + Sync>);

impl Tap {
    pub fn new(tap: impl Fn(&Passing) + Send + Sync + 'static) -> Self {
        Self(Arc::new(tap))
    }

    /// Links on which what is received takes its time: so many bytes a second into each rank.
    pub fn slowed(bytes_per_second: f64) -> Self {
        Self::new(move |passing| {
            if !passing.is_sent {
                std::thread::sleep(Duration::from_secs_f64(passing.n_bytes as f64 / bytes_per_second));
            }
        })
    }
}

impl std::fmt::Debug for Tap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tap")
    }
}

/// Makes a group of `world` ranks: one communicator a rank, in rank order, each to be moved to its thread.
pub fn group(world: usize, options: Options) -> Vec<Communicator> {
    let board = Arc::new(Board { states: Mutex::new(vec![State::Busy; world]) });
    let mut ports: Vec<Port> = (0..world).map(|rank| Port::new(rank, world, &options, &board)).collect();
    for from in 0..world {
        for to in (0..world).filter(|to| *to != from) {
            let (outlet, inlet) = bounded(IN_FLIGHT);
            ports[from].outlets[to] = Some(outlet);
            ports[to].inlets[from] = Some(inlet);
        }
    }
    ports.into_iter().map(|port| Communicator::new(port, options.algorithm)).collect()
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
    GatherBytes,
    ExchangeBytes,
    PassOn,
    Broadcast { root: usize },
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ReduceScatter => f.write_str("reduce-scatter"),
            Self::AllGather => f.write_str("all-gather"),
            Self::AllReduce => f.write_str("all-reduce"),
            Self::GatherBytes => f.write_str("all-gather of bytes"),
            Self::ExchangeBytes => f.write_str("exchange of bytes"),
            Self::PassOn => f.write_str("passing on to the next rank"),
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
    /// Stage of the plan.
    pub stage: usize,
    /// First element of this segment.
    pub start: usize,
    /// Elements of this segment.
    pub n_elements: usize,
}

impl std::fmt::Display for Header {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { generation, call, operation, len, stage, start, n_elements } = self;
        let end = start + n_elements;
        write!(f, "{operation} of {len} (generation {generation}, call {call}, stage {stage}, elements {start}..{end})")
    }
}

/// What is handed to another rank: memory that both may read from now on.
#[derive(Clone)]
pub(super) enum Payload {
    Floats(Arc<Vec<f32>>),
    Bytes(Arc<Vec<u8>>),
}

impl Payload {
    fn n_bytes(&self) -> usize {
        match self {
            Self::Floats(values) => values.len() * size_of::<f32>(),
            Self::Bytes(bytes) => bytes.len(),
        }
    }
}

/// A handle under way.
struct Message {
    header: Header,
    payload: Payload,
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
    /// How often to look before other threads may run.
    spins: u32,
    outlets: Vec<Option<Sender<Message>>>,
    inlets: Vec<Option<Receiver<Message>>>,
    board: Arc<Board>,
    tap: Option<Tap>,
    failure: Option<CommError>,
}

impl Port {
    fn new(rank: usize, world: usize, options: &Options, board: &Arc<Board>) -> Self {
        let Options { deadline, generation, .. } = *options;
        let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
        let spins = if world <= n_cores { SPINS } else { 0 };
        let outlets = (0..world).map(|_| None).collect();
        let inlets = (0..world).map(|_| None).collect();
        let (board, tap) = (Arc::clone(board), options.tap.clone());
        Self { rank, world, generation, n_bytes_sent: 0, deadline, spins, outlets, inlets, board, tap, failure: None }
    }

    fn tap(&self, peer: usize, header: Header, n_bytes: usize, is_sent: bool) {
        if let Some(Tap(tap)) = &self.tap {
            tap(&Passing { rank: self.rank, peer, header, is_sent, n_bytes });
        }
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

    /// Hands `payload` to `peer`; waits only where the link is full.
    pub(super) fn send(&mut self, peer: usize, header: Header, payload: Payload) -> Result<(), CommError> {
        let n_bytes = payload.n_bytes();
        self.tap(peer, header, n_bytes, true);
        let Self { rank, deadline, board, outlets, .. } = self;
        let Some(outlet) = outlets.get(peer).and_then(Option::as_ref) else {
            return Err(CommError::PeerGone { rank: peer });
        };
        match outlet.try_send(Message { header, payload }) {
            Ok(()) => {}
            Err(TrySendError::Disconnected(_)) => return Err(board.blame(peer, header.operation, *deadline)),
            Err(TrySendError::Full(message)) => {
                board.set(*rank, State::WaitsFor(peer));
                outlet.send_timeout(message, *deadline).map_err(|_| board.blame(peer, header.operation, *deadline))?;
                board.set(*rank, State::Busy);
            }
        }
        self.n_bytes_sent += n_bytes as u64;
        Ok(())
    }

    /// What `peer` hands over next, which must carry exactly the header `expected`.
    pub(super) fn receive(&mut self, peer: usize, expected: Header) -> Result<Payload, CommError> {
        let Self { rank, deadline, spins, board, inlets, .. } = self;
        let Some(inlet) = inlets.get(peer).and_then(Option::as_ref) else {
            return Err(CommError::PeerGone { rank: peer });
        };
        let blame = || board.blame(peer, expected.operation, *deadline);
        // In a trace: who waits for whom.
        let _span = tracing::debug_span!("wait", rank = *rank as u64, for_rank = peer as u64).entered();
        let Message { header, payload } = match look(inlet, *spins).map_err(|_| blame())? {
            Some(message) => message,
            None => {
                board.set(*rank, State::WaitsFor(peer));
                // Whoever fails here stays on the board as waiting until it closes, lest another that times out now blames it.
                // Whether time ran out or the link was cut, the board knows the reason.
                let message = inlet.recv_timeout(*deadline).map_err(|_| blame())?;
                board.set(*rank, State::Busy);
                message
            }
        };
        if header == expected {
            self.tap(peer, header, payload.n_bytes(), false);
            Ok(payload)
        } else {
            Err(CommError::Mismatch(Box::new(Mismatch { rank: *rank, mine: expected, peer, theirs: header })))
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

/// The next item of a channel, if it comes soon. An error says that the link is cut.
fn look<T>(channel: &Receiver<T>, spins: u32) -> Result<Option<T>, TryRecvError> {
    let come = || match channel.try_recv() {
        Ok(item) => Ok(Some(item)),
        Err(TryRecvError::Empty) => Ok(None),
        Err(cut) => Err(cut),
    };
    for _ in 0..spins {
        if let Some(item) = come()? {
            return Ok(Some(item));
        }
        std::hint::spin_loop();
    }
    let start = Instant::now();
    loop {
        if let Some(item) = come()? {
            return Ok(Some(item));
        }
        if start.elapsed() > LOOK {
            return Ok(None);
        }
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_another_generation_is_a_mismatch_that_names_both() {
        let mut ranks = group(2, Options { deadline: Duration::from_secs(60), generation: 3, ..Options::default() });
        ranks[1].engine.port.generation = 4;
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
