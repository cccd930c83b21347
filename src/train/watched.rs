//! A backend around another that notes what is asked of it: memory taken, and the time of each kernel. It changes nothing of what is computed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::backend::around::Around;
use crate::backend::{Backend, BufferId, Limits, Span};
use crate::infer::session::DEADLINE;
use crate::kernels::Kernel;

/// What was noted of one backend.
#[derive(Clone, Debug, Default)]
pub struct Notes {
    /// Launches and their time, by kernel.
    pub kernels: BTreeMap<&'static str, (u32, Duration)>,
    /// Memory in buffers.
    pub bytes: u64,
    /// The largest buffer so far: label and bytes.
    pub largest: (String, u64),
    /// Of the device.
    pub limits: Option<Limits>,
}

/// Notes that a worker's thread writes.
pub type SharedNotes = Arc<Mutex<Notes>>;

impl Notes {
    pub fn shared() -> SharedNotes {
        Arc::default()
    }
}

/// The notes so far; those of a thread that panicked count as well.
pub fn noted(notes: &SharedNotes) -> MutexGuard<'_, Notes> {
    notes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The backend that takes notes.
pub struct Watched {
    inner: Box<dyn Backend>,
    notes: SharedNotes,
    /// Waits after every launch and notes the time.
    times: bool,
}

impl Watched {
    /// Notes memory only.
    pub fn memory(inner: Box<dyn Backend>, notes: &SharedNotes) -> Box<dyn Backend> {
        Self::around(inner, notes, false)
    }

    /// Waits after every launch and notes the time of each kernel.
    pub fn timing(inner: Box<dyn Backend>, notes: &SharedNotes) -> Box<dyn Backend> {
        Self::around(inner, notes, true)
    }

    fn around(inner: Box<dyn Backend>, notes: &SharedNotes, times: bool) -> Box<dyn Backend> {
        noted(notes).limits = Some(inner.limits());
        Box::new(Self { inner, notes: Arc::clone(notes), times })
    }
}

impl Around for Watched {
    fn inner(&self) -> &dyn Backend {
        self.inner.as_ref()
    }
    fn inner_mut(&mut self) -> &mut dyn Backend {
        self.inner.as_mut()
    }
    fn alloc(&mut self, label: &str, len: usize) -> Result<BufferId> {
        let buffer = self.inner.alloc(label, len)?;
        let mut notes = noted(&self.notes);
        let bytes = 4 * len as u64;
        notes.bytes += bytes;
        if bytes > notes.largest.1 {
            notes.largest = (label.to_owned(), bytes);
        }
        Ok(buffer)
    }
    fn free(&mut self, buffer: BufferId) {
        let bytes = 4 * self.inner.len(buffer) as u64;
        self.inner.free(buffer);
        let mut notes = noted(&self.notes);
        notes.bytes = notes.bytes.saturating_sub(bytes);
    }
    fn launch(&mut self, kernel: &dyn Kernel, operands: &[Span]) -> Result<()> {
        if !self.times {
            return self.inner.launch(kernel, operands);
        }
        self.inner.wait(DEADLINE)?;
        let start = Instant::now();
        self.inner.launch(kernel, operands)?;
        self.inner.submit()?;
        self.inner.wait(DEADLINE)?;
        let mut notes = noted(&self.notes);
        let (n, time) = notes.kernels.entry(kernel.name()).or_default();
        *n += 1;
        *time += start.elapsed();
        Ok(())
    }
}
