//! The way from a run to its observers: one bus, several sinks.

use super::Event;
use super::plot::ForecastPlot;

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
    /// The devices by rank, as they were asked for.
    pub devices: Vec<String>,
}

/// What a run has to show beside its events: too bulky for a line of JSON. Sinks that do not draw ignore it.
#[derive(Clone, Copy, Debug)]
pub enum Exhibit<'a> {
    /// Held-out values beside their forecasts.
    Forecast(&'a ForecastPlot),
    /// What a language model says after so many steps.
    Text { step: u64, text: &'a str },
    /// All values of a tensor after so many steps, called `parameters/...` or `gradients/...`, or of a gate, called `gates/...`.
    Values { step: u64, name: &'a str, values: &'a [f32] },
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

    /// Takes an [`Event::Step`] between two that are reported, some ten a second, for who shows that the run moves on.
    fn tick(&mut self, _step: &Event) -> anyhow::Result<()> {
        Ok(())
    }

    /// Takes something to show.
    fn show(&mut self, _exhibit: Exhibit<'_>) -> anyhow::Result<()> {
        Ok(())
    }

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

    /// Tells that the run moves on, between two reports.
    pub fn tick(&mut self, step: &Event) {
        self.each(|sink| sink.tick(step));
    }

    /// Has something shown.
    pub fn show(&mut self, exhibit: Exhibit<'_>) {
        self.each(|sink| sink.show(exhibit));
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
