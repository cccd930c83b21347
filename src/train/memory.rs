//! What a device's memory bounds: a backend that weighs what would be taken, and one that refuses what is above a limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;

use super::balance::Balance;
use super::devices::Resolved;
use super::group::GroupSpec;
use super::ring::Update;
use super::worker::{WorkerSpec, weigh};
use crate::backend::around::Around;
use crate::backend::{Backend, BufferId, DeviceError, DeviceInfo, Limits, Readback, Span};
use crate::kernels::Kernel;
use crate::usage::UsageError;

/// A backend without memory or arithmetic, that sums up what is asked of it.
#[derive(Clone)]
pub struct Scale {
    info: DeviceInfo,
    limits: Limits,
    /// Words by buffer; what was freed is empty.
    buffers: Vec<usize>,
    bytes: u64,
    most: Arc<AtomicU64>,
}

impl Scale {
    pub fn new(limits: Limits) -> Self {
        Self { info: DeviceInfo::default(), limits, buffers: Vec::new(), bytes: 0, most: Arc::default() }
    }

    /// The most that was held at one time, of this one and its clones.
    pub fn most_bytes(&self) -> u64 {
        self.most.load(Ordering::Relaxed)
    }
}

/// Words of which nobody looks at the values.
struct Zeros(usize);

impl Readback for Zeros {
    fn wait(self: Box<Self>, _: Duration) -> Result<Vec<f32>> {
        Ok(vec![0.0; self.0])
    }
}

impl Backend for Scale {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn limits(&self) -> Limits {
        self.limits
    }
    fn alloc(&mut self, _: &str, len: usize) -> Result<BufferId> {
        self.buffers.push(len);
        self.bytes += 4 * len as u64;
        self.most.fetch_max(self.bytes, Ordering::Relaxed);
        Ok(BufferId(self.buffers.len() as u32 - 1))
    }
    fn free(&mut self, buffer: BufferId) {
        if let Some(len) = self.buffers.get_mut(buffer.0 as usize) {
            self.bytes -= 4 * std::mem::take(len) as u64;
        }
    }
    fn len(&self, buffer: BufferId) -> usize {
        self.buffers.get(buffer.0 as usize).copied().unwrap_or(0)
    }
    fn write(&mut self, _: Span, _: &[f32]) -> Result<()> {
        Ok(())
    }
    fn copy(&mut self, _: Span, _: Span) -> Result<()> {
        Ok(())
    }
    fn clear(&mut self, _: Span) -> Result<()> {
        Ok(())
    }
    fn launch(&mut self, _: &dyn Kernel, _: &[Span]) -> Result<()> {
        Ok(())
    }
    fn read(&mut self, spans: &[Span], _: Vec<f32>) -> Result<Box<dyn Readback>> {
        Ok(Box::new(Zeros(spans.iter().map(|span| span.len).sum())))
    }
    fn submit(&mut self) -> Result<()> {
        Ok(())
    }
    fn wait(&mut self, _: Duration) -> Result<()> {
        Ok(())
    }
}

/// A backend that takes no more memory than it may.
pub struct Limited {
    inner: Box<dyn Backend>,
    bytes: u64,
    most: u64,
}

impl Limited {
    /// At most `most` bytes in buffers.
    pub fn new(inner: Box<dyn Backend>, most: u64) -> Self {
        Self { inner, bytes: 0, most }
    }
}

impl Around for Limited {
    fn inner(&self) -> &dyn Backend {
        self.inner.as_ref()
    }
    fn inner_mut(&mut self) -> &mut dyn Backend {
        self.inner.as_mut()
    }
    fn alloc(&mut self, label: &str, len: usize) -> Result<BufferId> {
        let bytes = 4 * len as u64;
        if self.bytes + bytes > self.most {
            let device = self.inner.info().spec.clone();
            let what = format!("{label} needs {} beside {} of {}", shown(bytes), shown(self.bytes), shown(self.most));
            return Err(DeviceError::OutOfMemory { device, what }.into());
        }
        let buffer = self.inner.alloc(label, len)?;
        self.bytes += bytes;
        Ok(buffer)
    }
    fn free(&mut self, buffer: BufferId) {
        self.bytes -= 4 * self.inner.len(buffer) as u64;
        self.inner.free(buffer);
    }
}

/// Bytes of the unit of `--memory-limit`.
pub const GB: f64 = (1u64 << 30) as f64;

/// In GB, with as many digits as tell something.
fn shown(bytes: u64) -> String {
    let gb = bytes as f64 / GB;
    if gb >= 0.1 { format!("{gb:.3} GB") } else { format!("{gb:.6} GB") }
}

/// What `--memory-limit` says of each device, in bytes: one number for all, or one for each. Bounds their shares of the largest batch, of `[steps, rows]`, and
/// tells how.
///
/// # Errors
/// A number too few or too many; a device that cannot take a single row, or all together not the batch.
pub fn bounds(
    spec: &GroupSpec,
    devices: &[Resolved],
    limits_gb: &[f64],
    [n_steps, n_rows]: [usize; 2],
    balance: &mut Balance,
) -> Result<(Vec<Option<u64>>, Vec<String>)> {
    let world = devices.len();
    let limits: Vec<Option<u64>> = match limits_gb {
        [] => return Ok((vec![None; world], Vec::new())),
        [gb] => vec![Some((gb * GB) as u64); world],
        each => each.iter().map(|gb| Some((gb * GB) as u64)).collect(),
    };
    UsageError::unless(limits.len() == world, || {
        format!("--memory-limit has {} numbers for {world} workers: give one for all, or one for each", limits.len())
    })?;
    // Before devices are opened it is not known whether they are of one kind; if not, owners of segments need somewhat more.
    let alike = devices.windows(2).all(|w| w[0].spec == w[1].spec);
    let update = spec.update(alike);
    let GroupSpec { model, optimizer, accumulate, compress, .. } = spec.clone();
    let spec = WorkerSpec { model, optimizer, accumulate, compress, deadline: Duration::ZERO };
    let of_device = Limits { max_buffer_bytes: u64::MAX, max_binding_bytes: u64::MAX };
    let mut told = Vec::new();
    for (rank, (device, limit)) in devices.iter().zip(&limits).enumerate() {
        let Some(limit) = *limit else { continue };
        let most = most_rows(&spec, [rank, world], update, n_steps, n_rows, of_device, limit)?;
        let most = most.map_err(|least| {
            UsageError(format!(
                "--memory-limit is {}, too little for {}: the model with a single row of {n_steps} steps takes {}; raise it, leave the device \
                 out, or lower --hidden, --layers, --seq-len or --vocab",
                shown(limit),
                device.spec,
                shown(least)
            ))
        })?;
        if most < n_rows {
            balance.bound(rank, most);
            told.push(format!("{}: at most {most} of {n_rows} rows fit into {}", device.spec, shown(limit)));
        }
    }
    balance.check(n_rows)?;
    Ok((limits, told))
}

/// The most rows of `n_steps` steps whose training fits into `limit` bytes, up to `n_rows`; or what a single row would take.
///
/// # Errors
/// Of the inner result: the bytes that one row needs, which is above the limit. Else a buffer beyond the device's limits.
pub fn most_rows(
    spec: &WorkerSpec,
    place: [usize; 2],
    update: Update,
    n_steps: usize,
    n_rows: usize,
    limits: Limits,
    limit: u64,
) -> Result<Result<usize, u64>> {
    let bytes = |n_rows: usize| weigh(spec, place, update, n_steps, n_rows, limits);
    let least = bytes(1)?;
    if least > limit {
        return Ok(Err(least));
    }
    let (mut fits, mut too_many) = (1, n_rows + 1);
    while too_many - fits > 1 {
        let middle = fits.midpoint(too_many);
        // More than the device can bind is too many as well.
        if bytes(middle).is_ok_and(|bytes| bytes <= limit) { fits = middle } else { too_many = middle }
    }
    Ok(Ok(fits))
}
