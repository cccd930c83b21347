//! When the GPU did what: timestamps around compute passes, brought onto this machine's clock. There is a clock only while somebody listens to spans.
//!
//! Ticks of the device become nanoseconds since 1970 by one offset. Passes cannot begin before their submit nor end after they were seen to be done, so
//! every submit bounds it from both sides; it lies half way between the nearest bounds. A few empty passes find the first ones.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crossbeam::channel::{Receiver, bounded};

use crate::spans::GPU_TARGET;

/// Passes of one submit that are timed at most; each takes two places of 4,096 in a query set.
pub(super) const MAX_PASSES: usize = 1024;
/// Empty passes that the offset is found with.
const TRIALS: usize = 9;
const WORD: u64 = 8;

/// Consecutive launches that were recorded in one span.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timed {
    pub(super) name: &'static str,
    pub(super) launches: u32,
}

/// A submit whose timestamps are on their way.
struct Batch {
    staging: wgpu::Buffer,
    told: Receiver<bool>,
    passes: Vec<Timed>,
    before_ns: i128,
}

/// The clock of one device.
pub(super) struct Clock {
    device_name: String,
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    free: Vec<wgpu::Buffer>,
    /// Of the submit that is being encoded.
    passes: Vec<Timed>,
    under_way: VecDeque<Batch>,
    ns_per_tick: f64,
    /// The nearest bounds of the nanoseconds since 1970 at tick 0.
    bounds: [i128; 2],
}

/// A submit with its timestamps encoded.
pub(super) struct Encoded {
    staging: wgpu::Buffer,
    before_ns: i128,
}

fn now_ns() -> i128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i128)
}

impl Clock {
    /// Whether anybody listens, so that a device should be asked for timestamps.
    pub(super) fn is_wanted() -> bool {
        tracing::enabled!(target: GPU_TARGET, tracing::Level::DEBUG)
    }

    /// A clock for a device that has `TIMESTAMP_QUERY`; none where its timestamps do not move.
    pub(super) fn new(device: &wgpu::Device, queue: &wgpu::Queue, device_name: String) -> Option<Self> {
        let queries = device.create_query_set(&wgpu::QuerySetDescriptor {
            label: Some("timestamps"),
            ty: wgpu::QueryType::Timestamp,
            count: 2 * MAX_PASSES as u32,
        });
        let resolved = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("timestamps"),
            size: 2 * MAX_PASSES as u64 * WORD,
            usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        let mut clock = Self {
            device_name,
            queries,
            resolved,
            free: Vec::new(),
            passes: Vec::new(),
            under_way: VecDeque::new(),
            ns_per_tick: f64::from(queue.get_timestamp_period()),
            bounds: [i128::MIN, i128::MAX],
        };
        (0..TRIALS).for_each(|_| clock.trial(device, queue));
        (clock.bounds[0] > i128::MIN).then_some(clock)
    }

    /// One empty pass, waited for.
    fn trial(&mut self, device: &wgpu::Device, queue: &wgpu::Queue) {
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        drop(self.begin(&mut encoder, Timed { name: "trial", launches: 0 }));
        let Some(Encoded { staging, before_ns }) = self.resolve(device, &mut encoder) else { return };
        self.passes.clear();
        let index = queue.submit([encoder.finish()]);
        let told = map(&staging, 1);
        let wait = wgpu::PollType::Wait { submission_index: Some(index), timeout: Some(Duration::from_secs(10)) };
        // A device that gives no times here has no clock.
        let done = device.poll(wait).is_ok() && told.recv_timeout(Duration::from_secs(1)).is_ok_and(|mapped| mapped);
        let after_ns = now_ns();
        if let Some(ticks) = done.then(|| read(&staging, 1)).flatten().filter(|ticks| ticks[0] > 0) {
            self.bound(&ticks, [before_ns, after_ns]);
            self.free.push(staging);
        }
    }

    fn elapsed(&self, tick: u64) -> i128 {
        (tick as f64 * self.ns_per_tick) as i128
    }

    /// Takes into account that what happened at `ticks` happened between two moments.
    fn bound(&mut self, ticks: &[u64], [before_ns, after_ns]: [i128; 2]) {
        let (Some(first), Some(last)) = (ticks.iter().min(), ticks.iter().max()) else { return };
        let [low, high] = [before_ns - self.elapsed(*first), after_ns - self.elapsed(*last)];
        let nearer = [self.bounds[0].max(low), self.bounds[1].min(high)];
        // Two clocks drift apart in time: then the newest bounds count.
        self.bounds = if nearer[0] <= nearer[1] { nearer } else { [low, high] };
    }

    /// A pass with timestamps at both ends, as long as there is room for them.
    pub(super) fn begin<'e>(&mut self, encoder: &'e mut wgpu::CommandEncoder, timed: Timed) -> wgpu::ComputePass<'e> {
        let at = 2 * self.passes.len() as u32;
        let has_room = self.passes.len() < MAX_PASSES;
        let writes = wgpu::ComputePassTimestampWrites {
            query_set: &self.queries,
            beginning_of_pass_write_index: Some(at),
            end_of_pass_write_index: Some(at + 1),
        };
        let pass = encoder
            .begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some(timed.name), timestamp_writes: has_room.then_some(writes) });
        if has_room {
            self.passes.push(timed);
        }
        pass
    }

    /// Has the timestamps of this submit, which follows at once, copied to where they can be read.
    pub(super) fn resolve(&mut self, device: &wgpu::Device, encoder: &mut wgpu::CommandEncoder) -> Option<Encoded> {
        let n = self.passes.len() as u32;
        if n == 0 {
            return None;
        }
        let staging = self.free.pop().unwrap_or_else(|| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("timestamps on their way"),
                size: 2 * MAX_PASSES as u64 * WORD,
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        });
        encoder.resolve_query_set(&self.queries, 0..2 * n, &self.resolved, 0);
        encoder.copy_buffer_to_buffer(&self.resolved, 0, &staging, 0, 2 * u64::from(n) * WORD);
        Some(Encoded { staging, before_ns: now_ns() })
    }

    /// After the submit of what [`Self::resolve`] encoded.
    pub(super) fn submitted(&mut self, Encoded { staging, before_ns }: Encoded) {
        let passes = std::mem::take(&mut self.passes);
        let told = map(&staging, passes.len());
        self.under_way.push_back(Batch { staging, told, passes, before_ns });
    }

    /// Tells the passes of all submits that are known to be done.
    pub(super) fn tell(&mut self) {
        while let Some(is_mapped) = self.under_way.front().and_then(|batch| batch.told.try_recv().ok()) {
            let Some(batch) = self.under_way.pop_front() else { return };
            // A device that was lost tells no more.
            if let Some(ticks) = is_mapped.then(|| read(&batch.staging, batch.passes.len())).flatten() {
                self.tell_batch(&batch, &ticks);
                self.free.push(batch.staging);
            }
        }
    }

    fn tell_batch(&mut self, batch: &Batch, ticks: &[u64]) {
        self.bound(ticks, [batch.before_ns, now_ns()]);
        let offset_ns = self.bounds[0].midpoint(self.bounds[1]);
        for (Timed { name, launches }, ticks) in batch.passes.iter().zip(ticks.chunks_exact(2)) {
            let at = |tick: u64| u64::try_from(self.elapsed(tick) + offset_ns).unwrap_or(0);
            tracing::event!(
                target: GPU_TARGET,
                tracing::Level::DEBUG,
                pass = *name,
                device = self.device_name.as_str(),
                launches = u64::from(*launches),
                start_unix_ns = at(ticks[0]),
                end_unix_ns = at(ticks[1].max(ticks[0])),
            );
        }
    }
}

/// Asks for the mapping of `n` passes' timestamps.
fn map(staging: &wgpu::Buffer, n: usize) -> Receiver<bool> {
    let (tell, told) = bounded(1);
    staging.map_async(wgpu::MapMode::Read, 0..2 * n as u64 * WORD, move |mapped| {
        // Nobody listens where the clock was dropped.
        let _ = tell.send(mapped.is_ok());
    });
    told
}

fn read(staging: &wgpu::Buffer, n: usize) -> Option<Vec<u64>> {
    let ticks = {
        let view = staging.get_mapped_range(0..2 * n as u64 * WORD).ok()?;
        view.chunks_exact(WORD as usize).map(|word| word.try_into().map_or(0, u64::from_le_bytes)).collect()
    };
    staging.unmap();
    Some(ticks)
}
