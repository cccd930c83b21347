//! Spans of work that a trace shows, by `tracing`: what their names and fields mean, and threads that note theirs where their parent does.
//!
//! A span is what one thread does for a while; a field `kernel` names it better than its own name. Passes of a GPU run later than they are recorded, so
//! they are told as events of [`GPU_TARGET`] once their times are known. Where nobody listens a span costs one load and a branch.

use std::io;
use std::thread::{Builder, JoinHandle};

use tracing::Dispatch;
use tracing::subscriber::NoSubscriber;

/// Events of this target tell a pass of a GPU: `pass`, the name of the span that it was recorded in; `device`; `launches`; `start_unix_ns` and
/// `end_unix_ns`, nanoseconds since 1970 by this machine's clock.
pub const GPU_TARGET: &str = "carrousel::gpu_pass";

/// Starts a thread that is listened to by whoever listens to this one.
///
/// # Errors
/// When the operating system starts no more threads.
pub fn spawn<T: Send + 'static>(name: String, body: impl FnOnce() -> T + Send + 'static) -> io::Result<JoinHandle<T>> {
    let dispatch = tracing::dispatcher::get_default(Dispatch::clone);
    Builder::new().name(name).spawn(move || {
        // One that is set for a thread makes every span look for it, so none is set where nobody listens.
        if dispatch.is::<NoSubscriber>() { body() } else { tracing::dispatcher::with_default(&dispatch, body) }
    })
}
