//! The way from a run to its observers: one bus, several sinks.

use super::Event;

/// Who is to read a line of log text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Everybody who did not ask for silence: which devices were chosen and why.
    Info,
    /// Who asked for more with `-v`: kernel variants, checkpoints.
    Detail,
}

/// What a console needs to know of a training run before its first step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunInfo {
    /// Steps already done, by the run that is resumed.
    pub first_step: u64,
    /// Steps at which the run will end, where known.
    pub total_steps: Option<u64>,
    /// Epochs at which the run will end, where known.
    pub total_epochs: Option<u64>,
    /// Losses are nats a token, so that exp(loss) is worth showing.
    pub perplexity: bool,
}

/// Something that takes events in.
pub trait Sink: Send {
    /// What a warning calls this sink when it has failed, for instance the file's path.
    fn name(&self) -> String;

    /// A training run is about to begin.
    fn begin(&mut self, _info: &RunInfo) -> anyhow::Result<()> {
        Ok(())
    }

    /// Takes one event. After an error the sink gets no more.
    fn event(&mut self, event: &Event) -> anyhow::Result<()>;

    /// Takes one line of log text, which is for people and no event. Most sinks ignore it.
    fn log(&mut self, _level: Level, _text: &str) -> anyhow::Result<()> {
        Ok(())
    }

    /// Everything has been said.
    fn finish(&mut self) -> anyhow::Result<()> {
        Ok(())
    }
}

/// Hands each event to every sink. A sink that fails is dropped, and the others get one warning about it.
#[derive(Default)]
pub struct Bus {
    sinks: Vec<Box<dyn Sink>>,
}

impl Bus {
    /// A bus that hands events to `sinks`, in that order.
    pub fn new(sinks: Vec<Box<dyn Sink>>) -> Self {
        Self { sinks }
    }

    /// Adds a sink, for instance the metrics once the run folder exists.
    pub fn add(&mut self, sink: Box<dyn Sink>) {
        self.sinks.push(sink);
    }

    /// Tells all that a training run is about to begin.
    pub fn begin(&mut self, info: &RunInfo) {
        self.each(|sink| sink.begin(info));
    }

    /// Hands one event to all.
    pub fn send(&mut self, event: &Event) {
        self.each(|sink| sink.event(event));
    }

    /// Sends [`Event::Warning`].
    pub fn warn(&mut self, message: impl Into<String>) {
        self.send(&Event::Warning { message: message.into() });
    }

    /// One line of log text for people.
    pub fn log(&mut self, level: Level, text: &str) {
        self.each(|sink| sink.log(level, text));
    }

    /// Lets every sink write what it holds. The bus may be used again afterwards.
    pub fn finish(&mut self) {
        self.each(|sink| sink.finish());
    }

    fn each(&mut self, mut call: impl FnMut(&mut dyn Sink) -> anyhow::Result<()>) {
        let mut lost = Vec::new();
        self.sinks.retain_mut(|sink| match call(sink.as_mut()) {
            Ok(()) => true,
            Err(error) => {
                lost.push((sink.name(), error));
                false
            }
        });
        // Ends because each round of this recursion has lost at least one sink.
        for (name, error) in lost {
            self.warn(format!("cannot write to {name}, nothing more will be reported there: {error:#}"));
        }
    }
}
