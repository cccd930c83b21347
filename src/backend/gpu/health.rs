//! What went wrong with a device: wgpu tells it through callbacks, on whichever thread polls; here it waits for the next call that can return an error.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::backend::DeviceError;

/// The state of one device.
pub(super) struct Health {
    /// As in errors: `gpu:0 (NAME)`.
    device: String,
    /// Whether `state` holds anything; read before every call, so that the lock is taken only in trouble.
    raised: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    lost: Option<String>,
    fault: Option<DeviceError>,
}

impl Health {
    /// Watches `device` from now on.
    pub(super) fn watch(device: &wgpu::Device, name: String) -> Arc<Self> {
        let health = Arc::new(Self { device: name, raised: AtomicBool::new(false), state: Mutex::default() });
        let told = Arc::clone(&health);
        device.set_device_lost_callback(move |reason, message| {
            told.lose(if message.is_empty() { format!("{reason:?}").to_lowercase() } else { message });
        });
        let told = Arc::clone(&health);
        device.on_uncaptured_error(Arc::new(move |error| told.fault(error)));
        health
    }

    /// The device as in errors.
    pub(super) fn device(&self) -> String {
        self.device.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lose(&self, reason: String) {
        self.state().lost.get_or_insert(reason);
        self.raised.store(true, Ordering::Release);
    }

    fn fault(&self, error: wgpu::Error) {
        let device = self.device();
        let fault = match error {
            wgpu::Error::OutOfMemory { source } => DeviceError::OutOfMemory { device, what: source.to_string() },
            wgpu::Error::Validation { description, .. } | wgpu::Error::Internal { description, .. } => {
                DeviceError::Refused { device, message: description.split_whitespace().collect::<Vec<_>>().join(" ") }
            }
        };
        // The first one is the cause, what follows are its consequences.
        self.state().fault.get_or_insert(fault);
        self.raised.store(true, Ordering::Release);
    }

    /// Fails when the device is lost, for good, or when an earlier command was refused, once.
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        if !self.raised.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut state = self.state();
        // What a lost device is asked for is refused, and whichever thread polls tells of the loss a moment later.
        for _ in 0..20 {
            if state.lost.is_some() || !matches!(state.fault, Some(DeviceError::Refused { .. })) {
                break;
            }
            drop(state);
            std::thread::sleep(Duration::from_millis(10));
            state = self.state();
        }
        if let Some(reason) = state.lost.clone() {
            return Err(DeviceError::Lost { device: self.device(), reason });
        }
        self.raised.store(false, Ordering::Release);
        state.fault.take().map_or(Ok(()), Err)
    }

    /// Waits until a submission is done, at most until `end`.
    pub(super) fn wait_for(&self, device: &wgpu::Device, index: &wgpu::SubmissionIndex, end: Deadline) -> Result<(), DeviceError> {
        self.check()?;
        let wait = wgpu::PollType::Wait { submission_index: Some(index.clone()), timeout: Some(end.left()) };
        // wgpu panics in `poll` where the driver reports a loss while it waits.
        let polled = catch_unwind(AssertUnwindSafe(|| device.poll(wait)));
        if polled.is_err() {
            self.lose("the driver gave up while it was waited for".to_owned());
        }
        self.check()?;
        match polled {
            Ok(Err(wgpu::PollError::Timeout)) => Err(self.late(end)),
            Ok(Err(error)) => {
                let fault = DeviceError::Refused { device: self.device(), message: error.to_string() };
                self.state().fault.get_or_insert(fault);
                self.raised.store(true, Ordering::Release);
                self.check()
            }
            Ok(Ok(_)) | Err(_) => Ok(()),
        }
    }

    /// The error that `end` has passed.
    pub(super) fn late(&self, end: Deadline) -> DeviceError {
        DeviceError::Deadline { device: self.device(), seconds: end.given.as_secs_f64() }
    }
}

/// A moment to wait for, and how long that was when it was set.
#[derive(Clone, Copy)]
pub(super) struct Deadline {
    start: Instant,
    given: Duration,
}

impl Deadline {
    pub(super) fn after(given: Duration) -> Self {
        Self { start: Instant::now(), given }
    }

    pub(super) fn left(self) -> Duration {
        self.given.saturating_sub(self.start.elapsed())
    }
}
