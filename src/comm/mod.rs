//! How ranks exchange gradients: collectives over slices of `f32` and over bytes.
//!
//! [`plan`] says who hands which segment to whom, as data; [`transport`] carries handles of segments between threads; [`Shared`] is the
//! memory behind them; the [`Communicator`] here runs the one on the other; [`measure`] tells how fast that is. Never here: a device, a
//! model, parameters with names.
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
//! # Shared memory
//! Within a process nothing needs to be sent: a rank hands out a handle of a segment, and whoever needs the values reads them where they
//! are. So each rank can add up its own segment of all ranks' messages at once ([`plan::direct_all_reduce`]), and a finished segment is
//! passed on as memory that all read: P messages of S bytes are read once, one is written, no plan can do with less. Short messages
//! save the second step: everyone adds up everything ([`plan::direct_exchange`]). All of it lies in a [`Shared`]; a copy is made only by
//! the calls that take slices.
//!
//! # Steady state
//! Handles travel in channels made with the group, plans are kept by length, and a [`Shared`] has a second buffer for when peers still
//! read the first: after the first call of a kind nothing is allocated.

pub mod measure;
pub mod plan;
mod shared;
mod sum;
pub mod transport;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use plan::{Action, Algorithm, Plan, Step, Transfer};
pub use shared::Shared;
use sum::Handle;
pub use transport::{CommError, Operation, Options, Passing, Tap, group};
use transport::{Header, Payload, Port};

use crate::pool::Isa;

/// Plans kept, and memory for slices; a run has as many as its buckets have different lengths.
const MAX_PLANS: usize = 256;

/// One rank's place in a group. All ranks must make the same calls in the same order, with the same lengths where not said otherwise.
///
/// A call returns when this rank's part is done; others may still be at theirs. After an error the contents of the data are unspecified
/// and the communicator is closed (see [`CommError`]). In a world of one rank every call succeeds and does nothing.
pub struct Communicator {
    engine: Engine,
    /// Memory for the calls that take slices, by number of parts and length, so that calls of different kinds do not cut it anew.
    slices: BTreeMap<(usize, usize), Shared>,
}

impl Communicator {
    fn new(port: Port, algorithm: Algorithm) -> Self {
        let engine = Engine { port, algorithm, isa: Isa::detect(), plans: BTreeMap::new(), handles: Vec::new(), n_calls: 0 };
        Self { engine, slices: BTreeMap::new() }
    }

    /// This rank, `0..world`.
    pub fn rank(&self) -> usize {
        self.engine.port.rank
    }

    /// P, the number of ranks.
    pub fn world(&self) -> usize {
        self.engine.port.world
    }

    /// The membership generation that this group's messages carry.
    pub fn generation(&self) -> u64 {
        self.engine.port.generation
    }

    /// What this rank has handed to others since the group was made, in bytes: what the plans say, read by the receivers or not.
    pub fn bytes_sent(&self) -> u64 {
        self.engine.port.n_bytes_sent
    }

    /// Memory for a message of `len` floats, zeros, cut as its all-reduce wants it. Any collective of this group takes it.
    pub fn shared(&self, len: usize) -> Shared {
        let Port { rank, world, .. } = self.engine.port;
        Shared::new(world, rank, len, &plan::all_reduce(self.engine.algorithm, world, rank, len).parts)
    }

    /// Sums the message over all ranks; all end with the same bits.
    ///
    /// # Errors
    /// Any [`CommError`] but `UnknownRoot`.
    pub fn all_reduce_shared(&mut self, message: &mut Shared) -> Result<(), CommError> {
        self.engine.run(Operation::AllReduce, message)
    }

    /// Sums the message over all ranks, each segment at its owner: on return this rank's segment ([`Shared::own_segment`]) is complete,
    /// and the rest holds partial sums.
    ///
    /// # Errors
    /// Any [`CommError`] but `UnknownRoot`.
    pub fn reduce_scatter_shared(&mut self, message: &mut Shared) -> Result<(), CommError> {
        self.engine.run(Operation::ReduceScatter, message)
    }

    /// Brings each rank's own segment ([`Shared::own_segment`]) to all ranks.
    ///
    /// # Errors
    /// Any [`CommError`] but `UnknownRoot`.
    pub fn all_gather_shared(&mut self, message: &mut Shared) -> Result<(), CommError> {
        self.engine.run(Operation::AllGather, message)
    }

    /// [`Self::reduce_scatter_shared`] of a slice, which is copied in; returns the range of this rank's segment. The rest of `data` stays.
    ///
    /// # Errors
    /// Any [`CommError`] but `UnknownRoot`.
    pub fn reduce_scatter(&mut self, data: &mut [f32]) -> Result<Range<usize>, CommError> {
        let own = plan::owned_segment(self.world(), self.rank(), data.len());
        self.on_slice(Operation::ReduceScatter, data, 0..data.len(), own.clone())?;
        Ok(own)
    }

    /// [`Self::all_gather_shared`] of a slice: brings each rank's own segment, as [`Self::reduce_scatter`] returns it, to all ranks.
    ///
    /// # Errors
    /// Any [`CommError`] but `UnknownRoot`.
    pub fn all_gather(&mut self, data: &mut [f32]) -> Result<(), CommError> {
        let own = plan::owned_segment(self.world(), self.rank(), data.len());
        self.on_slice(Operation::AllGather, data, own, 0..data.len())
    }

    /// [`Self::all_reduce_shared`] of a slice, which is copied in and out.
    ///
    /// # Errors
    /// Any [`CommError`] but `UnknownRoot`.
    pub fn all_reduce(&mut self, data: &mut [f32]) -> Result<(), CommError> {
        self.on_slice(Operation::AllReduce, data, 0..data.len(), 0..data.len())
    }

    /// What every rank has, in rank order; lengths may differ. One step: everyone hands its bytes to everyone.
    ///
    /// # Errors
    /// Any [`CommError`] but `UnknownRoot`.
    pub fn all_gather_bytes(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let all = self.share_bytes(Arc::new(mine.to_vec()))?;
        Ok(all.into_iter().map(Arc::unwrap_or_clone).collect())
    }

    /// [`Self::all_gather_bytes`] without a copy: everyone reads the bytes where they are.
    ///
    /// # Errors
    /// Any [`CommError`] but `UnknownRoot`.
    pub fn share_bytes(&mut self, mine: Arc<Vec<u8>>) -> Result<Vec<Arc<Vec<u8>>>, CommError> {
        let Port { rank, world, .. } = self.engine.port;
        // A message of one element a rank, whatever the length of its bytes.
        let plan = plan::direct_all_gather_of(rank, (0..world).map(|rank| rank..rank + 1).collect());
        let mut all = vec![Arc::default(); world];
        all[rank] = mine;
        self.engine.run_bytes(Operation::GatherBytes, &plan, &mut all)?;
        Ok(all)
    }

    /// Hands each rank bytes of its own, `packets[rank]`, without a copy, and returns what each rank had for this one, in rank order, the own packet
    /// at its place; lengths may differ. One step.
    ///
    /// # Errors
    /// Any [`CommError`] but `UnknownRoot`.
    ///
    /// # Panics
    /// If there is not one packet a rank.
    pub fn exchange_bytes(&mut self, mut packets: Vec<Arc<Vec<u8>>>) -> Result<Vec<Arc<Vec<u8>>>, CommError> {
        let Port { rank, world, .. } = self.engine.port;
        assert_eq!(packets.len(), world, "there must be a packet for each rank");
        let plan = plan::direct_exchange_of_packets(world, rank);
        self.engine.run_packets(&plan, &mut packets)?;
        Ok(packets)
    }

    /// Hands `mine` to the next rank and returns what the one before handed over, without a copy; lengths may differ. One step.
    ///
    /// # Errors
    /// Any [`CommError`] but `UnknownRoot`.
    pub fn pass_on(&mut self, mine: Arc<Vec<f32>>) -> Result<Arc<Vec<f32>>, CommError> {
        let Port { rank, world, .. } = self.engine.port;
        self.engine.pass_on((rank + 1) % world, (rank + world - 1) % world, mine)
    }

    /// Replaces `data` by what rank `root` has in it; only the root's length counts. Down a tree in ceil(log2 P) steps.
    ///
    /// # Errors
    /// Any [`CommError`]. Ranks that name different roots are found out at the next call at the latest.
    pub fn broadcast(&mut self, root: usize, data: &mut Vec<u8>) -> Result<(), CommError> {
        let Port { rank, world, .. } = self.engine.port;
        if root >= world {
            return Err(CommError::UnknownRoot { root, world });
        }
        let mut message = [Arc::new(if rank == root { std::mem::take(data) } else { Vec::new() })];
        let outcome = self.engine.run_bytes(Operation::Broadcast { root }, &plan::broadcast(world, rank, root, 1), &mut message);
        let [message] = message;
        *data = Arc::unwrap_or_clone(message);
        outcome
    }

    /// Copies `given` of the slice in, runs the collective, and copies `wanted` out.
    fn on_slice(&mut self, operation: Operation, data: &mut [f32], given: Range<usize>, wanted: Range<usize>) -> Result<(), CommError> {
        let len = data.len();
        let Self { engine, slices } = self;
        let Port { rank, world, .. } = engine.port;
        let plan = engine.plan(operation, len);
        let key = (plan.parts.len(), len);
        if slices.len() >= MAX_PLANS && !slices.contains_key(&key) {
            slices.clear();
        }
        let message = slices.entry(key).or_insert_with(|| Shared::new(world, rank, len, &plan.parts));
        message.cut(&plan.parts);
        let lies_in = |outer: &Range<usize>, part: &Range<usize>| outer.start <= part.start && part.end <= outer.end;
        for (range, part) in message.parts_mut().filter(|(range, _)| lies_in(&given, range)) {
            part.copy_from_slice(&data[range]);
        }
        engine.run(operation, message)?;
        for (range, part) in message.parts().filter(|(range, _)| lies_in(&wanted, range)) {
            data[range].copy_from_slice(part);
        }
        Ok(())
    }
}

/// Runs plans on a port.
struct Engine {
    port: Port,
    algorithm: Algorithm,
    isa: Isa,
    /// By operation and length, so that a call in the steady state allocates nothing.
    plans: BTreeMap<(Operation, usize), Entry>,
    /// What came in this step.
    handles: Vec<Handle>,
    /// Calls made so far; equal on all ranks as long as they are in step.
    n_calls: u64,
}

/// A plan with what goes with its length.
struct Entry {
    plan: Plan,
    segments: Vec<Range<usize>>,
}

impl Engine {
    /// The plan for a length, made if it is not at hand.
    fn plan(&mut self, operation: Operation, len: usize) -> &Plan {
        let Self { port, algorithm, plans, .. } = self;
        &plan_of(plans, *algorithm, port, operation, len).plan
    }

    /// Runs one call; its error closes the port.
    fn run(&mut self, operation: Operation, message: &mut Shared) -> Result<(), CommError> {
        let Self { port, algorithm, isa, plans, handles, n_calls } = self;
        let header = begin(port, n_calls, operation, message.len())?;
        let Entry { plan, segments } = plan_of(plans, *algorithm, port, operation, message.len());
        message.cut(&plan.parts);
        let outcome = plan
            .steps
            .iter()
            .try_for_each(|step| run_step(port, step, Header { stage: step.stage, ..header }, message, handles, *isa, segments));
        handles.clear();
        outcome.inspect_err(|error| port.close(error))
    }

    /// Runs a plan over `elements` of bytes, each of any length; its error closes the port.
    fn run_bytes(&mut self, operation: Operation, plan: &Plan, elements: &mut [Arc<Vec<u8>>]) -> Result<(), CommError> {
        let port = &mut self.port;
        let header = begin(port, &mut self.n_calls, operation, elements.len())?;
        let run_step = |step: &Step| {
            let of = |transfer: &Transfer| Header { stage: step.stage, start: transfer.segment.start, n_elements: 1, ..header };
            for send in &step.sends {
                port.send(send.peer, of(send), Payload::Bytes(Arc::clone(&elements[send.segment.start])))?;
            }
            for recv in &step.recvs {
                if let Payload::Bytes(bytes) = port.receive(recv.peer, of(recv))? {
                    elements[recv.segment.start] = bytes;
                }
            }
            Ok(())
        };
        let outcome = plan.steps.iter().try_for_each(run_step);
        outcome.inspect_err(|error| port.close(error))
    }

    /// Runs the one step of an exchange of packets; its error closes the port.
    fn run_packets(&mut self, plan: &Plan, packets: &mut [Arc<Vec<u8>>]) -> Result<(), CommError> {
        let port = &mut self.port;
        let header = begin(port, &mut self.n_calls, Operation::ExchangeBytes, plan.parts.len())?;
        let of = |transfer: &Transfer| Header { start: transfer.segment.start, n_elements: 1, ..header };
        let run_step = |step: &Step| {
            for send in &step.sends {
                // What comes from there takes its place.
                port.send(send.peer, of(send), Payload::Bytes(std::mem::take(&mut packets[send.peer])))?;
            }
            for recv in &step.recvs {
                if let Payload::Bytes(bytes) = port.receive(recv.peer, of(recv))? {
                    packets[recv.peer] = bytes;
                }
            }
            Ok(())
        };
        let outcome = plan.steps.iter().try_for_each(run_step);
        outcome.inspect_err(|error| port.close(error))
    }

    /// One handle to `next`, one from `before`; its error closes the port.
    fn pass_on(&mut self, next: usize, before: usize, mine: Handle) -> Result<Handle, CommError> {
        let port = &mut self.port;
        let (rank, world) = (port.rank, port.world);
        let header = begin(port, &mut self.n_calls, Operation::PassOn, world)?;
        if world == 1 {
            return Ok(mine);
        }
        // A message of one element a rank, whatever its length.
        let of = |rank: usize| Header { start: rank, n_elements: 1, ..header };
        let outcome = port.send(next, of(rank), Payload::Floats(mine)).and_then(|()| port.receive(before, of(before)));
        match outcome.inspect_err(|error| port.close(error))? {
            Payload::Floats(theirs) => Ok(theirs),
            // The header says what the payload is.
            Payload::Bytes(_) => Ok(Handle::default()),
        }
    }
}

/// What the messages of a new call say of themselves.
fn begin(port: &Port, n_calls: &mut u64, operation: Operation, len: usize) -> Result<Header, CommError> {
    port.check_open()?;
    let call = *n_calls;
    *n_calls += 1;
    Ok(Header { generation: port.generation, call, operation, len, stage: 0, start: 0, n_elements: 0 })
}

fn plan_of<'a>(
    plans: &'a mut BTreeMap<(Operation, usize), Entry>,
    algorithm: Algorithm,
    port: &Port,
    operation: Operation,
    len: usize,
) -> &'a Entry {
    let key = (operation, len);
    if plans.len() >= MAX_PLANS && !plans.contains_key(&key) {
        plans.clear();
    }
    let Port { rank, world, .. } = *port;
    let make = match operation {
        Operation::ReduceScatter => plan::reduce_scatter,
        Operation::AllGather => plan::all_gather,
        _ => plan::all_reduce,
    };
    plans.entry(key).or_insert_with(|| Entry { plan: make(algorithm, world, rank, len), segments: plan::segments(world, len) })
}

/// Bytes that a step of floats receives.
fn step_bytes(step: &Step) -> u64 {
    let floats: usize = step.recvs.iter().map(|recv| recv.segment.len()).sum();
    (floats * size_of::<f32>()) as u64
}

/// Runs one step: everything out, then everything in.
fn run_step(
    port: &mut Port,
    step: &Step,
    header: Header,
    message: &mut Shared,
    handles: &mut Vec<Handle>,
    isa: Isa,
    segments: &[Range<usize>],
) -> Result<(), CommError> {
    let _span = tracing::debug_span!("phase", operation = %header.operation, stage = header.stage, bytes = step_bytes(step)).entered();
    let of = |segment: &Range<usize>| Header { start: segment.start, n_elements: segment.len(), ..header };
    for Transfer { peer, segment } in &step.sends {
        // The message is cut as the plan is, so there is such a part.
        let values = message.handle(segment).unwrap_or_default();
        port.send(*peer, of(segment), Payload::Floats(values))?;
    }
    for Transfer { peer, segment } in &step.recvs {
        // The header says what the payload is.
        let Payload::Floats(values) = port.receive(*peer, of(segment))? else { continue };
        match step.action {
            Action::Take => message.take(segment, values),
            Action::Accumulate | Action::SumAll => handles.push(values),
        }
    }
    match (step.action, step.recvs.first()) {
        (Action::Accumulate, Some(first)) => message.accumulate(isa, &first.segment, handles),
        (Action::SumAll, Some(_)) => message.sum_all(isa, segments, handles),
        _ => {}
    }
    // Before the next step says that they are read: their owners write there again.
    handles.clear();
    Ok(())
}
