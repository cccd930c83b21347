//! Where kernels run: the CPU, or one GPU. Knows memory and launches, nothing of layers.
//!
//! A backend belongs to one worker thread. Memory is buffers of 4-byte words; a launch binds spans of them. Launches are in order; a GPU
//! may collect them until [`Backend::submit`] or a readback. What waits for a readback is an owned [`Readback`] that can travel to another thread.

pub mod around;
pub mod cpu;
pub mod gpu;
pub mod open;
pub mod tuning;

use std::time::Duration;

use anyhow::Result;

use self::tuning::{Choice, Choices};
use crate::kernels::Kernel;
use crate::kernels::lstm::{Launch, SweepArgs, sweep_plan};

pub use crate::kernels::{BufferId, Span};

/// What kind of device a backend drives, and the numbers that decide whether two replicas compute the same bits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceInfo {
    /// As typed and printed: `cpu:2`, `gpu:0`.
    pub spec: String,
    /// The processor's or adapter's name.
    pub name: String,
    /// Equal for two devices that give the same bits: adapter model, driver and variants, or instruction set. The number of threads is not part of it.
    pub kind: String,
    pub driver: String,
    /// Whether this is a CPU that plays a GPU.
    pub is_software: bool,
    pub is_gpu: bool,
}

/// Limits that a model must fit in, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub max_buffer_bytes: u64,
    pub max_binding_bytes: u64,
}

/// What may go wrong with a device whatever it is asked; `device` is its spec and name.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum DeviceError {
    /// For good: every later call says the same.
    #[error("{device} is lost: {reason}")]
    Lost { device: String, reason: String },
    #[error("{device} is out of memory: {what}; lower --batch-size, --seq-len or --hidden")]
    OutOfMemory { device: String, what: String },
    #[error("{device} did not finish within {seconds} s")]
    Deadline { device: String, seconds: f64 },
    /// A fault of this program, not of the device.
    #[error("{device} refused a command: {message}")]
    Refused { device: String, message: String },
}

/// Words on their way from a device to the host; owned, so that another thread may wait for it.
pub trait Readback: Send {
    /// The words, in the memory that was handed in where that is possible.
    ///
    /// # Errors
    /// [`DeviceError`]: the device is lost, or `deadline` has passed.
    fn wait(self: Box<Self>, deadline: Duration) -> Result<Vec<f32>>;
}

/// Launches that make up a sweep.
pub type SweepPlan = fn(&SweepArgs<'_>, Launch<'_>) -> Result<()>;

/// Where kernels run. Object-safe; every method may fail when the device is lost.
pub trait Backend {
    fn info(&self) -> &DeviceInfo;
    fn limits(&self) -> Limits;
    /// A buffer of `len` words, zeroed. `label` names it in errors and traces.
    fn alloc(&mut self, label: &str, len: usize) -> Result<BufferId>;
    /// Gives a buffer's memory back.
    fn free(&mut self, buffer: BufferId);
    /// Words of a buffer.
    fn len(&self, buffer: BufferId) -> usize;
    /// The whole buffer as a span.
    fn whole(&self, buffer: BufferId) -> Span {
        Span { buffer, offset: 0, len: self.len(buffer) }
    }
    /// Writes words, in order with launches.
    fn write(&mut self, to: Span, words: &[f32]) -> Result<()>;
    /// Copies within the device; spans of different buffers, equal lengths.
    fn copy(&mut self, from: Span, to: Span) -> Result<()>;
    /// Sets words to zero.
    fn clear(&mut self, span: Span) -> Result<()>;
    /// Runs a kernel on spans, one for each of its bindings.
    fn launch(&mut self, kernel: &dyn Kernel, operands: &[Span]) -> Result<()>;
    /// How this backend runs a kernel: the instruction set, or the shader with its constants.
    fn variant(&self, _kernel: &dyn Kernel) -> String {
        self.info().driver.clone()
    }
    /// Whether this device can run a kernel; some need what not every adapter has.
    fn offers(&self, _kernel: &dyn Kernel) -> bool {
        true
    }
    /// Whether launches have come that several variants could do, and that none was chosen for.
    fn wants_tuning(&self) -> bool {
        false
    }
    /// Measures the variants of such launches on memory of its own, for about `budget` in all, and launches the fastest from now on; those that there is no
    /// time for stay as they are. To be called between steps, when nothing else is under way.
    fn tune(&mut self, _budget: Duration) -> Result<Vec<Choice>> {
        Ok(Vec::new())
    }
    /// Launches these variants from now on, as far as they exist.
    fn choose(&mut self, _choices: &Choices) {}
    /// How this backend sweeps; the default is the plan of launches in `kernels::lstm`.
    fn plan(&self) -> SweepPlan {
        sweep_plan
    }
    /// The plan for these lanes, where it depends on them.
    fn plan_for(&mut self, _args: &SweepArgs<'_>) -> SweepPlan {
        self.plan()
    }
    /// Runs the recurrent sweep of some lanes as [`Self::plan_for`] says.
    fn sweep(&mut self, args: &SweepArgs<'_>) -> Result<()> {
        let plan = self.plan_for(args);
        plan(args, &mut |kernel, operands| self.launch(kernel, operands))
    }
    /// Begins to read spans, one behind another, into `memory` (which is resized); everything launched before is done first.
    fn read(&mut self, spans: &[Span], memory: Vec<f32>) -> Result<Box<dyn Readback>>;
    /// Hands everything collected so far to the device, without waiting.
    fn submit(&mut self) -> Result<()>;
    /// Waits until the device has done everything, at most `deadline`.
    fn wait(&mut self, deadline: Duration) -> Result<()>;
}

/// Reads one span and waits for it.
///
/// # Errors
/// As [`Readback::wait`].
pub fn read_now(backend: &mut dyn Backend, span: Span, deadline: Duration) -> Result<Vec<f32>> {
    backend.read(&[span], Vec::new())?.wait(deadline)
}
