//! What each command calls, with what it was given.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context;
use serde_json::{Map, Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::args::{
    ClassifyArgs, CompareArgs, CompletionsArgs, DevicesArgs, EvaluateArgs, ExportArgs, ForecastArgs, GenerateArgs, Global, ImportArgs,
    InspectArgs, ManArgs, PROFILED, ProfileKernelsArgs, ProfileRingArgs, ProfileStepArgs, RecipesArgs, RecipesCommand, TRAINED, TrainArgs,
    Trained,
};
use super::resolve::{self, Layers};
use super::{Done, INTERRUPTED, print, recipes as known, report};
use crate::backend::gpu::adapters;
use crate::backend::open;
use crate::comm::measure::measure;
use crate::data::sequences::Labelled;
use crate::data::series::Part;
use crate::data::vocab::Level as TextLevel;
use crate::infer::activations::{Looking, activations};
use crate::infer::classify as classes;
use crate::infer::exchange;
use crate::infer::forecast as forecasts;
use crate::infer::generate as texts;
use crate::infer::inspect as inspection;
use crate::infer::predictions::Predictions;
use crate::infer::session::Session;
use crate::infer::task::{Corpus, NOTES};
use crate::infer::{evaluate as evaluation, generate::GenerateOptions};
use crate::kernels::Sizes;
use crate::model::config::{Input, ModelConfig, Output, Pooling};
use crate::observe::{Bus, Level, Table, Trace};
use crate::store::config::{RunConfig, Task};
use crate::store::{RunFolder, default_run_path, interchange};
use crate::train::devices::{self, DeviceKind};
use crate::train::dry_run::dry_run;
use crate::train::profile::kernels::{Asked, chosen, profile_kernels as measure_kernels};
use crate::train::profile::{self, Measured, Mode, Workload};
use crate::train::run::{RunOptions, run};
use crate::usage::UsageError;

pub fn train(args: &TrainArgs, bus: &mut Bus) -> anyhow::Result<Done> {
    let layers = Layers::new(&args.typed, args.config.as_deref())?.with_recipe(args.recipe.as_deref())?;
    let out = layers.out().map(PathBuf::from);
    let layers = match (&out, args.resume) {
        (None, true) => return Err(UsageError("--resume needs --out: name the folder of the run to continue".to_owned()).into()),
        (Some(out), true) => layers.resumed(out)?,
        (_, false) => layers,
    };
    let config = resolve::resolve(&layers)?;
    if args.dry_run {
        let summary = dry_run(&config, out.as_deref(), bus)?;
        let table = report::estimate(&summary);
        return Ok(Done::new(summary, vec![table]));
    }
    let out = out.unwrap_or_else(|| default_run_path(config.task.name()));
    let stop = stop_at_signals().context("cannot listen for signals")?;
    let options = RunOptions { out, resume: args.resume, wrap: None };
    let outcome = traced(args.trace.as_deref(), bus, |bus| run(config, options, bus, &stop))?;
    Ok(Done { interrupted: outcome.interrupted, summary: outcome.summary, tables: outcome.tables })
}

/// Does the work, and leaves a trace of it in the file if there is to be one, also of work that failed.
fn traced<T>(path: Option<&Path>, bus: &mut Bus, work: impl FnOnce(&mut Bus) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let Some(path) = path else { return work(bus) };
    let trace = Trace::create(path)?;
    let outcome = trace.watch(|| work(bus));
    let finished = trace.finish();
    let outcome = outcome?;
    let n_lost = finished?;
    if n_lost > 0 {
        bus.warn(format!("{n_lost} events had no place in {}: trace fewer steps", path.display()));
    }
    bus.log(Level::Info, &format!("wrote the trace {}; ui.perfetto.dev or chrome://tracing shows it", path.display()));
    Ok(outcome)
}

/// A flag that the first Ctrl-C or SIGTERM sets; the second one ends the process at once.
fn stop_at_signals() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal finds the flag unset and passes.
        signal_hook::flag::register_conditional_shutdown(signal, i32::from(INTERRUPTED), Arc::clone(&stop))?;
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

fn hold(flag: &str, value: impl std::fmt::Display, fine: bool, allowed: &str) -> Result<(), UsageError> {
    if fine { Ok(()) } else { Err(UsageError(format!("{flag} is {value}, but must be {allowed}"))) }
}

/// The trained network on its device. One device is enough to use it, so `auto` means the first that it finds.
fn session(trained: &Trained, bus: &mut Bus) -> anyhow::Result<Session> {
    let devices = devices::parse(&trained.devices)?;
    if let Some(n) = devices.n_workers().filter(|&n| n > 1) {
        return Err(UsageError(format!("--devices {} names {n} workers, but this command uses one", trained.devices)).into());
    }
    // Looked at before any device is, which takes longer.
    RunFolder::read(&trained.run)?;
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (devices, reasons) = devices::resolve(&devices, devices::adapters, n_cores)?;
    let device = devices.first().context("no device was found")?;
    reasons.iter().for_each(|reason| bus.log(Level::Info, reason));
    if devices.len() > 1 {
        bus.log(Level::Info, &format!("this command uses one device: {}", device.spec));
    }
    let backend = match device.kind {
        DeviceKind::Cpu { threads } => open::cpu(threads)?,
        DeviceKind::Gpu { index } => open::gpu(index)?,
    };
    Session::open(&trained.run, trained.checkpoint, backend)
}

/// Refuses a run of the other task, naming the command for it.
fn needs(session: &Session, trained: &Trained, task: Task) -> Result<(), UsageError> {
    let found = session.config.task;
    if found == task {
        return Ok(());
    }
    let other = match found {
        Task::Lm => "generate",
        Task::Forecast => "forecast",
        Task::Classify | Task::Tag => "classify",
        Task::Regress | Task::Frames => "evaluate",
    };
    Err(UsageError(format!(
        "{} holds a run of --task {}, this command needs one of --task {}; use {other}",
        trained.run.display(),
        found.name(),
        task.name()
    )))
}

/// What every summary of a trained network says of it.
fn about(session: &Session) -> Map<String, Value> {
    Map::from_iter([
        ("task".to_owned(), json!(session.config.task)),
        ("step".to_owned(), json!(session.step)),
        ("device".to_owned(), json!(session.device())),
    ])
}

pub fn evaluate(args: &EvaluateArgs, bus: &mut Bus) -> anyhow::Result<Done> {
    if let Some(size) = args.eval_batch_size {
        hold("--eval-batch-size", size.0, size.0 > 0, "at least 1")?;
    }
    let mut session = session(&args.trained, bus)?;
    let mut config = session.config.clone();
    if let Some(tolerance) = args.tolerance {
        hold("--tolerance", tolerance, tolerance.is_finite() && tolerance >= 0.0, "a number of 0 or more")?;
        let task = session.config.task;
        UsageError::unless(task == Task::Regress, || {
            format!("--tolerance means nothing for a run of --task {}; leave it out", task.name())
        })?;
        config.tolerance = Some(tolerance);
    }
    config.eval_batch_size = args.eval_batch_size.map_or(config.eval_batch_size, |size| size.0);
    if let Some(stride) = args.rolling {
        hold("--rolling", stride.0, stride.0 > 0, "at least 1")?;
        let task = session.config.task;
        UsageError::unless(task == Task::Forecast, || {
            format!("--rolling means nothing for a run of --task {}; leave it out", task.name())
        })?;
    }
    let part = if args.data.is_empty() { Part::Test } else { Part::All };
    let set = if args.data.is_empty() {
        let set = Corpus::load(&config, Some(&session.spec))?.eval_set(&config, Part::Test)?;
        set.ok_or_else(|| UsageError("the run's data has no test part; name what to measure on with --data".to_owned()))?
    } else {
        Corpus::load_other(&config, &args.data, &session.spec, Labelled::All)?.eval_set(&config)?
    };
    let set = match args.rolling {
        Some(stride) => set.rolling(&config, part, stride.0)?,
        None => set,
    };
    let evaluation = match &args.output {
        None => evaluation::evaluate(&set, &mut session)?,
        Some(path) => {
            let mut predictions = Predictions::new(path, &session.spec)?;
            let evaluation = evaluation::evaluate_watched(&set, &mut session, Some(&mut |batch, outputs| predictions.add(batch, outputs)))?;
            predictions.write(&set)?;
            bus.log(Level::Info, &format!("wrote {}", path.display()));
            evaluation
        }
    };
    let mut summary = about(&session);
    summary.insert("loss".to_owned(), json!(evaluation.loss));
    summary.extend(evaluation.scores());
    if let (Some(stride), Some(forecast)) = (args.rolling, evaluation.forecast()) {
        let rolling = json!({ "stride": stride.0, "origins": forecast.origins.len(), "rmse_by_step": evaluation.by_step() });
        summary.insert("rolling".to_owned(), rolling);
        let table =
            report::scores("evaluate", &summary.iter().filter(|(key, _)| *key != "rolling").map(|(k, v)| (k.clone(), v.clone())).collect());
        return Ok(Done::new(summary.clone(), vec![report::rolling(table, &summary)]));
    }
    Ok(Done::new(summary.clone(), vec![evaluation.judged.add_to(report::scores("evaluate", &summary))]))
}

pub fn generate(args: &GenerateArgs, global: Global, bus: &mut Bus) -> anyhow::Result<Done> {
    let top_k = args.top_k.map(|size| size.0);
    hold("--length", args.length.0, args.length.0 > 0, "at least 1")?;
    hold("--temperature", args.temperature, args.temperature.is_finite() && args.temperature >= 0.0, "a number of 0 or more")?;
    hold("--top-k", top_k.unwrap_or_default(), top_k != Some(0), "at least 1")?;
    let mut session = session(&args.trained, bus)?;
    needs(&session, &args.trained, Task::Lm)?;
    let options =
        GenerateOptions { prompt: args.prompt.clone(), length: args.length.0, temperature: args.temperature, top_k, seed: args.seed };
    let unknown: Vec<String> = texts::unknown_in_prompt(&session, &args.prompt).iter().map(|symbol| format!("{symbol:?}")).collect();
    if !unknown.is_empty() {
        bus.warn(format!("the model does not know {} of the prompt and reads <unk> there", unknown.join(", ")));
    }
    // The text may be long in coming, so it is shown as it comes. A reader that has gone away is found out at the end.
    let mut printed = Ok(());
    let mut show = |text: &str| {
        if !global.json && printed.is_ok() {
            printed = print(text);
        }
    };
    let text = texts::generate(&mut session, &options, &mut show)?;
    show("\n");
    printed?;
    let mut summary = about(&session);
    summary.extend(text);
    Ok(Done::new(summary, Vec::new()))
}

pub fn classify(args: &ClassifyArgs, bus: &mut Bus) -> anyhow::Result<Done> {
    let mut session = session(&args.trained, bus)?;
    let task = session.config.task;
    if !matches!(task, Task::Classify | Task::Tag) {
        needs(&session, &args.trained, Task::Classify)?;
    }
    let found = classes::classify(&mut session, &args.data, args.output.as_deref())?;
    if let Some(path) = &args.output {
        bus.log(Level::Info, &format!("wrote {}", path.display()));
    }
    let mut summary = about(&session);
    summary.extend(found);
    let table = report::classes(&summary);
    Ok(Done::new(summary, vec![table]))
}

pub fn forecast(args: &ForecastArgs, bus: &mut Bus) -> anyhow::Result<Done> {
    let mut session = session(&args.trained, bus)?;
    needs(&session, &args.trained, Task::Forecast)?;
    let data: Vec<String> = args.data.iter().cloned().collect();
    let beyond = forecasts::forecast(&mut session, &data)?;
    if let Some(path) = &args.output {
        let file = File::create(path).map_err(|error| UsageError(format!("cannot write {}: {error}", path.display())))?;
        write_csv(file, &beyond).with_context(|| format!("cannot write {}", path.display()))?;
        bus.log(Level::Info, &format!("wrote {}", path.display()));
    }
    let mut summary = about(&session);
    let rows = beyond.values.iter().enumerate().map(|(i, dated)| {
        let mut row = json!({ "time": dated.time, "target": dated.target, "value": dated.value });
        for (level, values) in &beyond.quantiles {
            row[format!("q{level}")] = json!(values[i]);
        }
        row
    });
    summary.insert("values".to_owned(), rows.collect());
    let table = report::values(&summary);
    Ok(Done::new(summary, vec![table]))
}

fn write_csv(file: File, beyond: &forecasts::Beyond) -> anyhow::Result<()> {
    let mut writer = csv::Writer::from_writer(file);
    let levels = beyond.quantiles.iter().map(|(level, _)| format!("q{level}"));
    writer.write_record(["time", "target", "value"].map(str::to_owned).into_iter().chain(levels))?;
    for (i, dated) in beyond.values.iter().enumerate() {
        let cells = [dated.time.clone(), dated.target.clone(), dated.value.to_string()];
        writer.write_record(cells.into_iter().chain(beyond.quantiles.iter().map(|(_, values)| values[i].to_string())))?;
    }
    Ok(writer.flush()?)
}

pub fn export(args: &ExportArgs, bus: &mut Bus) -> anyhow::Result<Done> {
    let (summary, warnings) = exchange::export(&args.run, args.checkpoint, args.format, args.part, &args.output)?;
    warnings.into_iter().for_each(|warning| bus.warn(warning));
    Ok(Done::new(summary.clone(), vec![report::scores("export", &summary)]))
}

/// What the data are and how they are read, which a file of ours has settled for its parameters.
const OF_DATA: [&str; 16] = [
    "task",
    "level",
    "vocab",
    "encoding",
    "target",
    "features",
    "sequence",
    "label",
    "quantiles",
    "class_weights",
    "notes",
    "missing",
    "relative",
    "season",
    "calendar",
    "horizon",
];

pub fn import(args: &ImportArgs, bus: &mut Bus) -> anyhow::Result<Done> {
    let layers = Layers::new(&args.typed, args.config.as_deref())?;
    let out = layers.out().map(PathBuf::from);
    let out = out.ok_or_else(|| UsageError("import needs --out: name the run folder to make".to_owned()))?;
    let file = interchange::read(&args.input)?;
    let recorded = match &file.about {
        Some(about) => about.config.clone(),
        None => file.options()?,
    };
    let has_data = layers.is_given("data");
    if file.about.is_none() && !has_data {
        let problem =
            format!("{} says nothing of its data: name them with --data, and how to read them as for train", args.input.display());
        return Err(UsageError(problem).into());
    }
    if let Some(key) = layers.given().find(|key| OF_DATA.contains(key)).filter(|_| file.about.is_some() && !has_data) {
        let problem = format!("{} changes how data are read, which the file has settled: name the data with --data", layers.name(key));
        return Err(UsageError(problem).into());
    }
    let layers = layers.recorded(&args.input.display().to_string(), &recorded)?;
    let config = resolve::resolve(&layers)?;
    let (summary, warnings) = exchange::import(file, &config, has_data, &out)?;
    warnings.into_iter().for_each(|warning| bus.warn(warning));
    Ok(Done::new(summary.clone(), vec![report::scores("import", &summary)]))
}

pub fn inspect(args: &InspectArgs, bus: &mut Bus) -> anyhow::Result<Done> {
    if let Some(over) = &args.activations {
        let stem = picture_stem(&args.output)?;
        let trained = Trained { run: args.run.clone(), checkpoint: args.checkpoint, devices: args.devices.clone() };
        let mut session = session(&trained, bus)?;
        let looking = Looking { over: over.clone(), layer: args.layer, units: args.units.clone() };
        let found = activations(&mut session, &looking, &stem)?;
        let mut summary = about(&session);
        summary.extend(found);
        let shown: Map<String, Value> =
            summary.iter().filter(|(key, _)| !["steps", "units"].contains(&key.as_str())).map(|(k, v)| (k.clone(), v.clone())).collect();
        // The text that was read is long, and so is what every unit did.
        return Ok(Done::new(summary, vec![report::scores("activations", &shown)]));
    }
    let summary = inspection::inspect(&args.run)?;
    let table = report::run(&summary);
    Ok(Done::new(summary, vec![table]))
}

/// Both pictures are written whichever extension is given.
fn picture_stem(output: &Path) -> Result<PathBuf, UsageError> {
    match output.extension().and_then(|extension| extension.to_str()) {
        Some("png" | "svg") => Ok(output.with_extension("")),
        Some(other) => Err(UsageError(format!("--output ends in .{other}, but the picture is written as .svg and .png"))),
        None => Ok(output.to_owned()),
    }
}

pub fn compare(args: &CompareArgs, bus: &mut Bus) -> anyhow::Result<Done> {
    let stem = picture_stem(&args.output)?;
    let found = inspection::compare(&args.runs, &stem)?;
    found.warnings.into_iter().for_each(|warning| bus.warn(warning));
    let tables = report::comparison(&found.summary);
    Ok(Done::new(found.summary, tables))
}

pub fn recipes(args: &RecipesArgs, global: Global) -> anyhow::Result<Done> {
    if let Some(RecipesCommand::Show { name }) = &args.command {
        return told(known::find(name)?.text.to_owned(), global);
    }
    let rows = known::ALL.iter().map(|recipe| vec![recipe.name.to_owned(), recipe.about().to_owned()]).collect();
    let table = Table::new("").columns("recipes", &["name", "what it is, and what others reached"], rows);
    let listed = known::ALL.iter().map(|recipe| json!({ "name": recipe.name, "about": recipe.about(), "command": recipe.command() }));
    Ok(Done::new(Map::from_iter([("recipes".to_owned(), listed.collect())]), vec![table]))
}

pub fn completions(args: &CompletionsArgs, global: Global) -> anyhow::Result<Done> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::args::command(), "carrousel", &mut script);
    told(String::from_utf8(script)?, global)
}

pub fn man(args: &ManArgs, global: Global) -> anyhow::Result<Done> {
    if let Some(folder) = &args.output {
        let unwritten = || format!("cannot write the manual pages to {}", folder.display());
        fs::create_dir_all(folder).with_context(unwritten)?;
        clap_mangen::generate_to(super::args::command(), folder).with_context(unwritten)?;
        return Ok(Done::new(Map::from_iter([("output".to_owned(), json!(folder))]), Vec::new()));
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(super::args::command()).render(&mut page)?;
    told(String::from_utf8(page)?, global)
}

/// A result that is a text for another program.
fn told(text: String, global: Global) -> anyhow::Result<Done> {
    if !global.json {
        print(&text)?;
    }
    Ok(Done::new(Map::from_iter([("text".to_owned(), json!(text))]), Vec::new()))
}

pub fn devices(args: &DevicesArgs) -> anyhow::Result<Done> {
    let mut adapters = serde_json::to_value(adapters::list()?)?;
    let mut summary = Map::new();
    if args.measure {
        let rows = adapters.as_array_mut().into_iter().flatten();
        for (index, row) in rows.enumerate() {
            let speed = profile::measure(open::gpu(index)?.as_mut())?;
            row.as_object_mut().context("an adapter is listed by its fields")?.extend(speed);
        }
        let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
        let speed = profile::measure(open::cpu(n_cores)?.as_mut())?;
        summary.insert("cpu".to_owned(), Map::from_iter([("threads".to_owned(), n_cores.into())].into_iter().chain(speed)).into());
    }
    let mut tables = vec![report::adapters(&adapters)];
    tables.extend(summary.get("cpu").map(report::cpu));
    summary.insert("adapters".to_owned(), adapters);
    Ok(Done::new(summary, tables))
}

pub fn profile_step(args: &ProfileStepArgs, bus: &mut Bus) -> anyhow::Result<Done> {
    let layers = Layers::new(&args.typed, None)?;
    let steps = args.steps.map_or(args.mode.usual_steps(), |steps| steps.0);
    hold("--steps", steps, steps > 0, "at least 1")?;
    if let Some(key) = layers.given().find(|key| !PROFILED.contains(key)) {
        return Err(UsageError(format!("{} means nothing for profile step, which trains on made-up data", layers.name(key))).into());
    }
    let infers = args.mode != Mode::Train;
    if let Some(key) = layers.given().find(|key| infers && TRAINED.contains(key)) {
        let problem = format!("{} means nothing for --mode infer-step or infer-seq, which trains nothing; leave it out", layers.name(key));
        return Err(UsageError(problem).into());
    }
    if args.mode == Mode::InferStep && layers.is_given("seq_len") {
        return Err(
            UsageError("--seq-len means nothing for --mode infer-step, whose calls are one time step; leave it out".to_owned()).into()
        );
    }
    let free = |key: &&str| {
        let of_workers = ["devices", "balance", "no_autotune", "accumulate", "compress", "shard_optimizer", "seed"];
        of_workers.contains(key) || infers && *key == "batch_size"
    };
    if let (Some(workload), Some(key)) = (&args.workload, layers.given().find(|key| !free(key))) {
        let problem = format!("{} cannot be used with --workload {workload}, whose model is fixed; give one of them", layers.name(key));
        return Err(UsageError(problem).into());
    }
    let config = resolve::settle(&layers)?;
    let named = args.workload.as_deref().and_then(|letter| Workload::named(&letter.to_ascii_uppercase()));
    let mut workload = named.unwrap_or_else(|| workload(&config));
    if infers {
        workload.n_rows = if layers.is_given("batch_size") { config.batch_size } else { 1 };
    }
    let RunConfig { devices, balance, accumulate, compress, shard_optimizer, .. } = &config;
    let (accumulate, compress, shard_optimizer) = (*accumulate, *compress, *shard_optimizer);
    let (autotunes, lengths, scaling) = (!config.no_autotune, args.lengths, args.scaling);
    let mode = args.mode;
    let measured = Measured { mode, devices, balance, accumulate, compress, shard_optimizer, autotunes, steps, lengths, scaling };
    let summary = traced(args.trace.as_deref(), bus, |_| profile::profile_step(&workload, measured))?;
    Ok(Done::new(summary.clone(), vec![report::scores("profile step", &summary)]))
}

/// Floats of the largest operand that a kernel is measured with: 1 GiB, of which there are several.
const MOST_FLOATS: usize = 1 << 28;

pub fn profile_kernels(args: &ProfileKernelsArgs, bus: &mut Bus) -> anyhow::Result<Done> {
    let given = [
        ("--seq-len", args.seq_len, 100),
        ("--batch-size", args.batch_size, 50),
        ("--input", args.input, 128),
        ("--hidden", args.hidden, 256),
        ("--classes", args.classes, 96),
    ];
    for (flag, size, _) in given {
        let size = size.map_or(1, |size| size.0);
        hold(flag, size, (1..=1 << 20).contains(&size), "from 1 to 1048576")?;
    }
    let [t, b, i, h, v] = given.map(|(_, size, usual)| size.map_or(usual, |size| size.0));
    // The largest operands: gates and logits of all steps, and the parameters.
    let floats = (t * b).saturating_mul((4 * h).max(i).max(v)).max((4 * h).saturating_mul(i + h)).max(v.saturating_mul(i));
    if floats > MOST_FLOATS {
        let problem = format!("these sizes need an operand of {} million numbers; stay below {}", floats >> 20, MOST_FLOATS >> 20);
        return Err(UsageError(problem).into());
    }
    let is_sized = given.iter().any(|(_, size, _)| size.is_some());
    let sizes = is_sized.then_some(Sizes { n_steps: t as u32, n_rows: b as u32, inputs: i as u32, hidden: h as u32, n_classes: v as u32 });
    // A wrong name is told before the devices are.
    chosen(&args.kernel)?;
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (devices, reasons) = devices::resolve(&devices::parse(&args.devices)?, devices::adapters, n_cores)?;
    reasons.iter().for_each(|reason| bus.log(Level::Info, reason));
    let summary = measure_kernels(&Asked { kernels: args.kernel.clone(), sizes, autotunes: !args.no_autotune }, &devices)?;
    Ok(Done::new(summary.clone(), vec![report::scores("profile kernels", &summary)]))
}

/// As many features as are named, or as many as sequences of measurements often have.
fn made_up_features(config: &RunConfig) -> Input {
    Input::Values { n_features: if config.features.is_empty() { 12 } else { config.features.len() } }
}

/// The most ranks that are worth measuring on one machine.
const MOST_RANKS: usize = 256;
/// The most memory that `profile ring` takes for messages.
const MOST_MESSAGE_BYTES: usize = 16 << 30;

pub fn profile_ring(args: &ProfileRingArgs) -> anyhow::Result<Done> {
    let (world, n_bytes) = (args.world.0, args.bytes.0);
    hold("--world", world, (2..=MOST_RANKS).contains(&world), "from 2 to 256")?;
    hold("--bytes", n_bytes, n_bytes > 0 && n_bytes.is_multiple_of(size_of::<f32>()), "a multiple of 4, at least 4")?;
    let total = n_bytes.saturating_mul(world);
    if total > MOST_MESSAGE_BYTES {
        return Err(UsageError(format!("--world {world} with --bytes {n_bytes} needs {} GB; stay below 16", total >> 30)).into());
    }
    hold("--calls", args.calls.map_or(1, |n| n.0), args.calls.is_none_or(|n| n.0 > 0), "at least 1")?;
    let asked = args.algorithm;
    let measured = measure(world, n_bytes, asked, args.calls.map(|n| n.0))?;
    let summary = Map::from_iter([
        ("world".to_owned(), json!(world)),
        ("bytes".to_owned(), json!(n_bytes)),
        ("algorithm".to_owned(), json!(asked.to_string())),
        ("chosen".to_owned(), json!(measured.algorithm.to_string())),
        ("calls".to_owned(), json!(measured.n_calls)),
        ("seconds".to_owned(), json!(measured.seconds)),
        ("min_seconds".to_owned(), json!(measured.min_seconds)),
        ("algbw".to_owned(), json!(measured.algbw(n_bytes))),
        ("busbw".to_owned(), json!(measured.busbw(world, n_bytes))),
        ("memory_bandwidth".to_owned(), json!(measured.memory_bandwidth)),
        ("floor_seconds".to_owned(), json!(measured.floor_seconds)),
        ("share_of_floor".to_owned(), json!(measured.floor_seconds / measured.seconds)),
    ]);
    Ok(Done::new(summary.clone(), vec![report::scores("profile ring", &summary)]))
}

/// The step that a run of this configuration would take, on data as large as the task's usually are.
fn workload(config: &RunConfig) -> Workload {
    let (input, output) = match config.task {
        Task::Lm => {
            let usual = match config.level {
                TextLevel::Byte => 256,
                TextLevel::Char => 96,
                TextLevel::Word => 10_000,
            };
            let vocabulary = config.vocab.unwrap_or(usual);
            (Input::Tokens { vocabulary, width: config.embedding }, Output::Classes { n_classes: vocabulary })
        }
        Task::Forecast => {
            let n_targets = config.target.len().max(1);
            let n_features = n_targets + config.features.len();
            let (n_outputs, pooling) = (n_targets * config.horizon, Pooling::Last);
            let output = match config.quantiles {
                None => Output::Values { n_outputs, pooling },
                Some(levels) => Output::Quantiles { n_values: n_outputs, levels, pooling },
            };
            (Input::Values { n_features }, output)
        }
        Task::Classify => (made_up_features(config), Output::Label { n_classes: 10, pooling: config.pooling }),
        Task::Regress => (made_up_features(config), Output::Values { n_outputs: 1, pooling: config.pooling }),
        Task::Tag => (made_up_features(config), Output::Classes { n_classes: 10 }),
        Task::Frames => {
            let n_notes = config.notes.unwrap_or(NOTES);
            (Input::Values { n_features: n_notes }, Output::Notes { n_notes })
        }
    };
    let model = ModelConfig {
        input,
        output,
        n_layers: config.layers,
        hidden: config.hidden.clone(),
        dropout: config.dropout,
        bias: !config.no_bias,
        tied: config.tied,
        lstm: config.lstm,
    };
    Workload {
        model,
        optimizer: config.optimizer,
        n_steps: config.seq_len,
        n_rows: config.batch_size,
        carries: config.task == Task::Lm,
        layer_alone: false,
    }
}
