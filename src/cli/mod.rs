//! What a person types becomes a run, and what comes of it becomes output and an exit code. The only floor that reads the command line,
//! prints results, handles signals or ends the process; nothing is computed here.
//!
//! Arguments have two levels: `typed` and `args` hold what was given, `resolve` settles what is meant. With `--json` standard output
//! is JSON lines only; else it takes results, and standard error takes progress and complaints.

mod args;
mod commands;
mod recipes;
mod report;
mod resolve;
mod typed;

use std::any::Any;
use std::ffi::OsString;
use std::io::{self, Write};
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;

use serde_json::{Map, Value};

use self::args::{Command, Global, ProfileCommand};
use crate::backend::gpu::adapters::NoSuchAdapter;
use crate::data::DataError;
use crate::observe::sinks::{Console, Json, Verbosity};
use crate::observe::{Bus, Event, Level, Table};
use crate::store::StoreError;
use crate::store::interchange::InterchangeError;
use crate::train::devices::DeviceError;
use crate::usage::UsageError;

/// Ended by a signal, after a checkpoint was written; also the code of a second signal, which does not wait for one.
const INTERRUPTED: u8 = 130;
const WRONG_USAGE: u8 = 2;
const FAILED: u8 = 1;

/// The whole program.
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let cli = match args::parse(&args) {
        Ok(cli) => cli,
        Err(error) => return refuse(&error, &args),
    };
    let mut bus = bus(cli.global);
    let result = panic::catch_unwind(AssertUnwindSafe(|| run(&cli.command, cli.global, &mut bus)));
    let result = result.unwrap_or_else(|payload| Err(anyhow::anyhow!("internal error, please report it: {}", panic_text(&*payload))));
    // The progress bar goes first, so that what follows stands below it.
    bus.finish();
    let code = match result {
        Ok(done) => done.report(cli.global, &mut bus).map_or_else(|error| fail(&error, &mut bus), |()| done.exit_code()),
        Err(error) => fail(&error, &mut bus),
    };
    bus.finish();
    ExitCode::from(code)
}

fn bus(global: Global) -> Bus {
    let verbosity = match global {
        Global { quiet: true, .. } => Verbosity::Quiet,
        Global { verbose: true, .. } => Verbosity::Verbose,
        _ => Verbosity::Normal,
    };
    let mut bus = Bus::default();
    if global.json {
        bus.add(Box::new(Json::stdout()));
    }
    bus.add(Box::new(Console::stderr(verbosity)));
    bus
}

/// What a command came to.
struct Done {
    interrupted: bool,
    summary: Map<String, Value>,
    /// For standard output, where that is not JSON.
    tables: Vec<Table>,
}

impl Done {
    fn new(summary: Map<String, Value>, tables: Vec<Table>) -> Self {
        Self { interrupted: false, summary, tables }
    }

    fn exit_code(&self) -> u8 {
        if self.interrupted { INTERRUPTED } else { 0 }
    }

    fn report(&self, global: Global, bus: &mut Bus) -> anyhow::Result<()> {
        let tables = || self.tables.iter().map(ToString::to_string);
        if global.json {
            tables().for_each(|table| bus.log(Level::Detail, table.trim_end()));
        }
        let mut summary = self.summary.clone();
        summary.insert("status".to_owned(), if self.interrupted { "interrupted" } else { "finished" }.into());
        // Before what can fail, since the run folder keeps it.
        bus.send(&Event::Summary(summary));
        if global.json { Ok(()) } else { tables().try_for_each(|table| print(&table)) }
    }
}

fn run(command: &Command, global: Global, bus: &mut Bus) -> anyhow::Result<Done> {
    match command {
        Command::Train(args) => commands::train(args, bus),
        Command::Evaluate(args) => commands::evaluate(args, bus),
        Command::Generate(args) => commands::generate(args, global, bus),
        Command::Classify(args) => commands::classify(args, bus),
        Command::Forecast(args) => commands::forecast(args, bus),
        Command::Export(args) => commands::export(args, bus),
        Command::Import(args) => commands::import(args, bus),
        Command::Inspect(args) => commands::inspect(args, bus),
        Command::Recipes(args) => commands::recipes(args, global),
        Command::Compare(args) => commands::compare(args, bus),
        Command::Completions(args) => commands::completions(args, global),
        Command::Man(args) => commands::man(args, global),
        Command::Devices(args) => commands::devices(args),
        Command::Profile(ProfileCommand::Step(args)) => commands::profile_step(args, bus),
        Command::Profile(ProfileCommand::Kernels(args)) => commands::profile_kernels(args, bus),
        Command::Profile(ProfileCommand::Ring(args)) => commands::profile_ring(args),
    }
}

/// Who reads standard output has seen enough, as `head` has: no failure.
#[derive(Debug, thiserror::Error)]
#[error("standard output is no longer read")]
struct ReaderGone;

/// Writes to standard output at once; `println` would panic where a reader has gone away.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => ReaderGone.into(),
        _ => anyhow::Error::new(error).context("cannot write to standard output"),
    })
}

/// The one place where an error becomes an exit code.
fn fail(error: &anyhow::Error, bus: &mut Bus) -> u8 {
    if error.is::<ReaderGone>() {
        return 0;
    }
    bus.send(&Event::Error { message: message(error) });
    if is_usage(error) { WRONG_USAGE } else { FAILED }
}

/// Whether arguments, configuration or input data are wrong, wherever in the chain that is said.
fn is_usage(error: &anyhow::Error) -> bool {
    // An error that was attached as context is no link of the chain of its own.
    error.downcast_ref::<UsageError>().is_some()
        || error.chain().any(|cause| {
            cause.is::<UsageError>()
                || cause.is::<DeviceError>()
                || cause.is::<NoSuchAdapter>()
                || cause.downcast_ref::<DataError>().is_some_and(DataError::is_input)
                || cause.downcast_ref::<StoreError>().is_some_and(StoreError::is_usage)
                || cause.downcast_ref::<InterchangeError>().is_some_and(InterchangeError::is_usage)
        })
}

/// All causes in one line. Some errors end with the text of their cause, which is not said twice.
fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn panic_text(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("unknown")
}

/// Answers a command line that cannot be read, or that asks for help.
fn refuse(error: &clap::Error, args: &[OsString]) -> ExitCode {
    // Nothing is left to say where this cannot be written.
    let _ = error.print();
    if error.use_stderr() && args.iter().any(|arg| arg == "--json") {
        let rendered = error.render().to_string();
        let lines =
            rendered.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"));
        let message = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
        let message = message.trim_start_matches("error: ").to_owned();
        Bus::new(vec![Box::new(Json::stdout())]).send(&Event::Error { message });
    }
    ExitCode::from(if error.use_stderr() { WRONG_USAGE } else { 0 })
}

#[cfg(test)]
mod tests;
