//! Progress for people, on standard error: a bar on a terminal, plain lines now and then elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::observe::{Event, Level, RunInfo, Sink, Throughput, Trend, format};

/// How much a person wants to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verbosity {
    /// Warnings and errors only (`-q`).
    Quiet,
    /// Progress and what was chosen.
    #[default]
    Normal,
    /// Checkpoints, devices, the norm of the gradient and details as well (`-v`).
    Verbose,
}

/// Time between two lines about steps where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// Speed and time left are judged over this long.
const RATE_WINDOW: Duration = Duration::from_secs(30);

/// The console sink.
pub struct Console {
    verbosity: Verbosity,
    line_every: Duration,
    bar: Option<ProgressBar>,
    /// None on a terminal, where a bar may have to step aside for each line.
    lines: Option<Box<dyn Write + Send>>,
    info: RunInfo,
    /// Steps done and how fast; set by the first step or by `begin`.
    pace: Option<(u64, Throughput)>,
    last_line: Option<Instant>,
    loss: Trend,
}

impl Console {
    /// Standard error: a bar where it is a terminal, else lines.
    pub fn stderr(verbosity: Verbosity) -> Self {
        if std::io::stderr().is_terminal() {
            Self { lines: None, ..Self::lines(verbosity, Box::new(std::io::sink())) }
        } else {
            Self::lines(verbosity, Box::new(std::io::stderr()))
        }
    }

    /// Plain lines to any writer.
    pub fn lines(verbosity: Verbosity, out: Box<dyn Write + Send>) -> Self {
        Self {
            verbosity,
            line_every: LINE_EVERY,
            bar: None,
            lines: Some(out),
            info: RunInfo::default(),
            pace: None,
            last_line: None,
            loss: Trend::default(),
        }
    }

    /// Sets the shortest time between two lines about steps (5 s by default); a terminal's bar is not affected.
    pub fn line_every(mut self, time: Duration) -> Self {
        self.line_every = time;
        self
    }

    /// Writes one line, above the bar where there is one.
    fn say(&mut self, text: &str) -> anyhow::Result<()> {
        match (&mut self.lines, &self.bar) {
            (Some(out), _) => {
                writeln!(out, "{text}")?;
                out.flush()?;
            }
            // Not eprintln, which panics where standard error is gone.
            (None, Some(bar)) => bar.suspend(|| writeln!(std::io::stderr(), "{text}"))?,
            (None, None) => writeln!(std::io::stderr(), "{text}")?,
        }
        Ok(())
    }

    fn perplexity(&self, loss: f64) -> String {
        if self.info.perplexity { format!("  ppl {}", format::number(loss.exp(), 4)) } else { String::new() }
    }

    fn epoch_of(&self, epoch: u64) -> String {
        match self.info.total_epochs {
            Some(total) => format!("epoch {epoch}/{total}"),
            None => format!("epoch {epoch}"),
        }
    }

    fn step_of(&self, step: u64) -> String {
        match self.info.total_steps {
            Some(total) => format!("step {}/{}", format::count(step), format::count(total)),
            None => format!("step {}", format::count(step)),
        }
    }

    /// Counts the steps up to `step` and says how many seconds are left, where that is known.
    fn seconds_left(&mut self, step: u64, now: Instant) -> Option<f64> {
        let (done, pace) = self.pace.get_or_insert_with(|| (step, Throughput::new(RATE_WINDOW, now)));
        pace.add(now, step.saturating_sub(*done));
        *done = step;
        pace.seconds_for(self.info.total_steps?.saturating_sub(step))
    }

    /// The speed, and that of each device where there are several: `41.2k tokens/s (gpu:0 30.1k, cpu:4 11.1k)`.
    fn rate(&self, all: f64, devices: &[f64]) -> String {
        let all = format!("{} tokens/s", format::rate(all));
        if devices.len() < 2 {
            return all;
        }
        let name = |rank: usize| self.info.devices.get(rank).cloned().unwrap_or_else(|| format!("worker {rank}"));
        let parts = devices.iter().enumerate().map(|(rank, rate)| format!("{} {}", name(rank), format::rate(*rate)));
        format!("{all} ({})", parts.collect::<Vec<_>>().join(", "))
    }

    /// Moves the bar, or writes a line where it is time for one.
    fn step(&mut self, event: &Event) -> anyhow::Result<()> {
        let Event::Step { step, epoch, loss, lr, tokens_per_second, grad_norm, device_tokens_per_second } = event else { return Ok(()) };
        let now = Instant::now();
        let left = self.seconds_left(*step, now);
        // An estimate has no hundredths.
        let left = left.map(|left| if left < 59.5 { format!("{left:.0} s left") } else { format!("{} left", format::duration(left)) });
        self.loss.add(*loss);
        // A single step's loss is noise; where it is not finite, that is what one must see.
        let level = if loss.is_finite() { self.loss.level() } else { *loss };
        let arrow = self.loss.arrow();
        let arrow = if arrow.is_empty() { String::new() } else { format!(" {arrow}") };
        let loss = format!("loss {}{arrow}", format::number(level, 4));
        let (epoch, lr, rate) =
            (self.epoch_of(*epoch), format!("lr {}", format::setting(*lr)), self.rate(*tokens_per_second, device_tokens_per_second));
        let perplexity = self.perplexity(level);
        let norm = format!("norm {}", format::number(*grad_norm, 3));
        let is_verbose = self.verbosity == Verbosity::Verbose;
        if let Some(bar) = &self.bar {
            // What a narrow terminal cuts off stands last.
            let mut text = format!("{epoch}  {loss}  {lr}  {rate}{perplexity}");
            if is_verbose {
                text += &format!("  {norm}");
            }
            bar.set_prefix(left.unwrap_or_default());
            bar.set_message(text);
            bar.set_position(*step);
        } else if self.last_line.is_none_or(|last| now.saturating_duration_since(last) >= self.line_every) {
            self.last_line = Some(now);
            let mut text = format!("{}  {epoch}  {loss}{perplexity}  {lr}  {rate}", self.step_of(*step));
            if is_verbose {
                text += &format!("  {norm}");
            }
            self.say(&left.map_or(text.clone(), |left| format!("{text}  {left}")))?;
        }
        Ok(())
    }
}

impl Sink for Console {
    fn name(&self) -> String {
        "standard error".into()
    }

    fn begin(&mut self, info: &RunInfo) -> anyhow::Result<()> {
        self.finish()?;
        self.info = info.clone();
        self.pace = Some((info.first_step, Throughput::new(RATE_WINDOW, Instant::now())));
        self.last_line = None;
        self.loss = Trend::default();
        if self.lines.is_none() && self.verbosity > Verbosity::Quiet {
            let target = ProgressDrawTarget::stderr_with_hz(8);
            let (bar, template) = match info.total_steps {
                Some(total) => (
                    ProgressBar::with_draw_target(Some(total), target),
                    "{bar:10.cyan/black.bright} {human_pos}/{human_len}  {prefix}  {wide_msg}",
                ),
                None => (ProgressBar::with_draw_target(None, target), "{spinner:.cyan} step {human_pos}  {wide_msg}"),
            };
            bar.set_style(ProgressStyle::with_template(template)?.progress_chars("━╸─"));
            bar.set_position(info.first_step);
            self.bar = Some(bar);
        }
        Ok(())
    }

    fn event(&mut self, event: &Event) -> anyhow::Result<()> {
        match event {
            Event::Warning { message } => return self.say(&format!("warning: {message}")),
            Event::Error { message } => return self.say(&format!("error: {message}")),
            _ if self.verbosity == Verbosity::Quiet => return Ok(()),
            _ => {}
        }
        let verbose = self.verbosity == Verbosity::Verbose;
        match event {
            Event::Step { .. } => self.step(event),
            Event::Epoch { epoch, step, train_loss, valid_loss, seconds } => {
                // The step may fall between two step events.
                self.seconds_left(*step, Instant::now());
                if let Some(bar) = &self.bar {
                    bar.set_position(*step);
                }
                let shown = match valid_loss {
                    Some(loss) => format!("  valid {}{}", format::number(*loss, 4), self.perplexity(*loss)),
                    None => self.perplexity(*train_loss),
                };
                self.say(&format!(
                    "{}  {}  train {}{shown}  {}",
                    self.epoch_of(*epoch),
                    self.step_of(*step),
                    format::number(*train_loss, 4),
                    format::duration(*seconds)
                ))
            }
            Event::Eval { step, valid_loss } => {
                self.say(&format!("{}  valid {}{}", self.step_of(*step), format::number(*valid_loss, 4), self.perplexity(*valid_loss)))
            }
            Event::Checkpoint { path, .. } if verbose => self.say(&format!("wrote {path}")),
            Event::Device { rank, name, share, tokens_per_second, waited_seconds, bytes_sent, .. } if verbose => self.say(&format!(
                "worker {rank} {name}  share {:.1} %  {} tokens/s  waited {}  sent {}",
                share * 100.0,
                format::rate(*tokens_per_second),
                format::duration(*waited_seconds),
                format::bytes(*bytes_sent)
            )),
            _ => Ok(()),
        }
    }

    fn tick(&mut self, step: &Event) -> anyhow::Result<()> {
        if self.verbosity == Verbosity::Quiet { Ok(()) } else { self.step(step) }
    }

    fn log(&mut self, level: Level, text: &str) -> anyhow::Result<()> {
        let wanted = match level {
            Level::Info => Verbosity::Normal,
            Level::Detail => Verbosity::Verbose,
        };
        if self.verbosity >= wanted { self.say(text) } else { Ok(()) }
    }

    fn finish(&mut self) -> anyhow::Result<()> {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        Ok(())
    }
}
