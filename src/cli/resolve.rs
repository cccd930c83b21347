//! From what was given to what is run: layers of options (flags, file, recipe, an earlier start of the run), defaults, and whether every number
//! makes sense. Nothing is opened but the configuration file.

use std::fmt::Display;
use std::fs;
use std::path::Path;

use serde::Serialize;
use toml::{Table, Value};

use super::recipes::{self, Recipe};
use super::typed::{Size, Typed};
use crate::compress::Method;
use crate::data::remote::is_url;
use crate::data::series::{Missing, Relative};
use crate::data::source::unpacked_name;
use crate::data::split::Split;
use crate::data::text::Encoding;
use crate::data::vocab::Level;
use crate::model::config::{Hidden, LstmConfig, Pooling};
use crate::model::init::Init;
use crate::optim::schedule::{ScheduleConfig, ScheduleKind};
use crate::optim::{OptimizerConfig, Rule};
use crate::store::config::{DEADLINE_SECONDS, LossReduction, OnDeviceLoss, RunConfig, Task};
use crate::store::{RunFolder, Select, run_folder};
use crate::train::devices;
use crate::usage::UsageError;

/// What stands where nothing was given, one row a kind of work.
struct Defaults {
    split: Split,
    calendar: bool,
    layers: usize,
    hidden: usize,
    /// Columns of the embedding are as many as hidden units; without tokens there is none.
    seq_len: usize,
    horizon: usize,
    batch_size: usize,
    epochs: u64,
    lr: f64,
    select: Select,
    log_every: u64,
}

const SPLIT: Split = Split { train: 0.85, valid: 0.05, test: 0.1 };

/// Text by bytes or characters.
const LETTERS: Defaults = Defaults {
    split: SPLIT,
    calendar: false,
    layers: 2,
    hidden: 128,
    seq_len: 50,
    horizon: 1,
    batch_size: 50,
    epochs: 10,
    lr: 2e-3,
    select: Select::Best,
    log_every: 50,
};

/// Text by words.
const WORDS: Defaults = Defaults { hidden: 200, seq_len: 35, batch_size: 20, ..LETTERS };

/// A series.
const SERIES: Defaults = Defaults {
    split: SPLIT,
    calendar: false,
    layers: 1,
    hidden: 64,
    seq_len: 48,
    horizon: 12,
    batch_size: 32,
    epochs: 40,
    lr: 5e-3,
    select: Select::Best,
    log_every: 50,
};

/// Labelled sequences of measurements.
const SEQUENCES: Defaults = Defaults { hidden: 64, batch_size: 16, ..SERIES };

/// Labelled texts, a line each.
const LINES: Defaults = Defaults { layers: 1, batch_size: 32, select: Select::Best, ..LETTERS };

/// The built-in example: weekly values, two years back, half a year ahead.
const BUILTIN: Defaults = Defaults {
    split: Split { train: 0.72, valid: 0.08, test: 0.2 },
    seq_len: 104,
    horizon: 26,
    epochs: 80,
    // At 5e-3 the first hundred steps are chaotic: what rounding does to them decides between 0.7 and 1.1 ppm.
    lr: 3e-3,
    select: Select::Last,
    ..SERIES
};

const OPTIMIZER: Rule = Rule::Adam;
const SCHEDULE: ScheduleKind = ScheduleKind::Cosine;
const PATIENCE: u32 = 2;
const CLIP_NORM: f64 = 5.0;
const SEED: u64 = 1;
const DEVICES: &str = "auto";
const KEEP: usize = 3;
const HASH_EVERY: u64 = 100;
const INIT: Init = Init::Torch;

/// Largest layer or embedding: four gates of it squared are 64 GiB.
const MAX_UNITS: usize = 65_536;
const MAX_LAYERS: usize = 256;
/// As many as the file's numbers can tell apart.
const MAX_NOTES: usize = 65_536;
/// Largest window, horizon and batch: far above what fits, low enough that products of them do not overflow.
const MAX_LENGTH: usize = 1 << 20;

const LABELLED: &[Task] = &[Task::Classify, Task::Regress];
/// Whole sequences, of whatever length each.
const SEQUENTIAL: &[Task] = &[Task::Classify, Task::Regress, Task::Tag, Task::Frames];
const IN_TABLES: &[Task] = &[Task::Classify, Task::Regress, Task::Tag];
const OF_CLASSES: &[Task] = &[Task::Classify, Task::Tag];
const OF_TEXT: &[Task] = &[Task::Lm, Task::Classify, Task::Regress];
const OF_TABLES: &[Task] = &[Task::Forecast, Task::Classify, Task::Regress, Task::Tag];
/// Keys that do not mean something for every task, and for which they do.
const MEANT_FOR: &[(&str, &[Task])] = &[
    ("encoding", OF_TEXT),
    ("level", OF_TEXT),
    ("vocab", OF_TEXT),
    ("embedding", OF_TEXT),
    ("tied", &[Task::Lm]),
    ("features", OF_TABLES),
    ("missing", OF_TABLES),
    ("text", OF_TEXT),
    ("sequence", IN_TABLES),
    ("label", IN_TABLES),
    ("class_weights", OF_CLASSES),
    ("quantiles", &[Task::Forecast]),
    ("notes", &[Task::Frames]),
    ("pooling", LABELLED),
    ("tolerance", &[Task::Regress]),
    ("target", &[Task::Forecast]),
    ("relative", &[Task::Forecast]),
    ("season", &[Task::Forecast]),
    ("calendar", &[Task::Forecast]),
    ("horizon", &[Task::Forecast]),
];

/// Of these, what only tokens have.
const OF_TOKENS: [&str; 3] = ["level", "vocab", "embedding"];

/// Whether a key means something for a task.
fn is_meant(key: &str, task: Task) -> bool {
    MEANT_FOR.iter().find(|(name, _)| *name == key).is_none_or(|(_, tasks)| tasks.contains(&task))
}

/// The two keys of which one alone switches the other off.
const LIMITS: [&str; 2] = ["epochs", "max_steps"];

/// The options given, by where they come from. Each table holds only what was given there.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    flags: Table,
    file: Option<(String, Table)>,
    recipe: Option<(&'static str, Table)>,
    recorded: Table,
}

impl Layers {
    /// Options typed as flags and those of a configuration file.
    ///
    /// # Errors
    /// A file cannot be read, is no TOML, or holds an unknown key or a value of the wrong kind: its name, the line, the nearest name.
    pub fn new(flags: &Typed, file: Option<&Path>) -> Result<Self, UsageError> {
        let file = file.map(|path| Ok((path.display().to_string(), table(&read(path)?)?))).transpose()?;
        Ok(Self { flags: table(flags)?, file, recipe: None, recorded: Table::new() })
    }

    /// Adds the options of the recipe that is named, if one is, behind flags and file.
    ///
    /// # Errors
    /// There is no such recipe.
    pub fn with_recipe(self, name: Option<&str>) -> Result<Self, UsageError> {
        let read = |recipe: Recipe| Ok((recipe.name, table(&parse_toml(recipe.name, recipe.text)?)?));
        let recipe = name.map(|name| recipes::find(name).and_then(read)).transpose()?;
        Ok(Self { recipe, ..self })
    }

    /// Adds what the run in `folder` recorded, if there is one, in place of the defaults. A start that left no checkpoint is none.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn resumed(self, folder: &Path) -> Result<Self, UsageError> {
        let path = folder.join(run_folder::CONFIG);
        // What cannot be looked into is refused with its reason when the run begins.
        let is_begun = RunFolder::is_begun(folder).unwrap_or(false);
        let recorded = if is_begun && path.exists() { table(&read(&path)?)? } else { Table::new() };
        Ok(Self { recorded, ..self })
    }

    /// Adds options that stand in a file called `name`, in place of the defaults.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn recorded(self, name: &str, options: &str) -> Result<Self, UsageError> {
        Ok(Self { recorded: table(&parse_toml(name, options)?)?, ..self })
    }

    /// What was given in all, flag before file before recipe before record.
    fn merged(&self) -> Result<Typed, UsageError> {
        let mut merged = self.recorded.clone();
        let recipe = self.recipe.iter().flat_map(|(_, table)| table);
        merged.extend(recipe.map(|(key, value)| (key.clone(), value.clone())));
        if LIMITS.iter().any(|key| self.is_given(key)) {
            // A recipe, or what an earlier start settled, is like a default: it does not limit what is asked for now.
            LIMITS.iter().for_each(|&key| drop(merged.remove(key)));
        }
        let file = self.file.iter().flat_map(|(_, table)| table);
        merged.extend(file.chain(&self.flags).map(|(key, value)| (key.clone(), value.clone())));
        merged.try_into().map_err(|error| UsageError(format!("these options do not fit together: {error}")))
    }

    /// Whether a flag or the file gives `key`.
    pub fn is_given(&self, key: &str) -> bool {
        self.flags.contains_key(key) || self.file.as_ref().is_some_and(|(_, table)| table.contains_key(key))
    }

    /// Keys given as flags or in the file.
    pub fn given(&self) -> impl Iterator<Item = &str> {
        self.flags.keys().chain(self.file.iter().flat_map(|(_, table)| table.keys())).map(String::as_str)
    }

    /// How to name `key` to the person who gave it.
    pub fn name(&self, key: &str) -> String {
        match &self.file {
            Some((path, table)) if !self.flags.contains_key(key) && table.contains_key(key) => format!("{key} (in {path})"),
            _ => match &self.recipe {
                Some((name, table)) if !self.is_given(key) && table.contains_key(key) => format!("{key} (in the recipe {name})"),
                _ => format!("--{}", key.replace('_', "-")),
            },
        }
    }

    /// The run folder that was asked for.
    pub fn out(&self) -> Option<&str> {
        let file = self.file.as_ref().and_then(|(_, table)| table.get("out"));
        self.flags.get("out").or(file).and_then(Value::as_str)
    }
}

fn table<T: Serialize>(options: &T) -> Result<Table, UsageError> {
    Table::try_from(options).map_err(|error| UsageError(format!("a value is beyond what a configuration file can hold: {error}")))
}

fn read(path: &Path) -> Result<Typed, UsageError> {
    let text = fs::read_to_string(path).map_err(|error| UsageError(format!("cannot read {}: {error}", path.display())))?;
    parse_toml(&path.display().to_string(), &text)
}

/// Reads the text of a configuration file.
fn parse_toml(name: &str, text: &str) -> Result<Typed, UsageError> {
    toml::from_str(text).map_err(|error: toml::de::Error| {
        let start = error.span().map_or(0, |span| span.start.min(text.len()));
        let line = 1 + text.as_bytes()[..start].iter().filter(|&&byte| byte == b'\n').count();
        UsageError(format!("{name}, line {line}: {}", with_nearest(error.message())))
    })
}

/// serde's "unknown field `x`, expected one of `a`, `b`, ..." with the nearest name instead of all; another message in one line.
fn with_nearest(message: &str) -> String {
    let what = if message.starts_with("unknown field") { Some("key") } else { message.starts_with("unknown variant").then_some("value") };
    let mut quoted = message.split('`').skip(1).step_by(2);
    match (what, quoted.next()) {
        (Some(what), Some(unknown)) => {
            let known: Vec<&str> = quoted.collect();
            let of = if what == "value" { format!(" (of {})", known.join(", ")) } else { String::new() };
            let nearest = nearest(unknown, &known).map(|name| format!("; the nearest is `{name}`")).unwrap_or_default();
            format!("unknown {what} `{unknown}`{nearest}{of}")
        }
        _ => message.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; "),
    }
}

/// The name most like `unknown`, however far it is.
pub fn nearest<'a>(unknown: &str, known: &[&'a str]) -> Option<&'a str> {
    let likeness = |name: &str| strsim::jaro_winkler(unknown, name);
    known.iter().copied().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))
}

/// Settles everything.
///
/// # Errors
/// A value that makes no sense: the name under which it was given, the value, what is allowed.
pub fn resolve(layers: &Layers) -> Result<RunConfig, UsageError> {
    let config = settle(layers)?;
    if let (true, Some((name, _))) = (config.data.is_empty(), &layers.recipe) {
        let command = recipes::find(name)?.command();
        return Err(UsageError(format!("the recipe {name} needs its data: name them with --data, as in {command}")));
    }
    if config.task == Task::Lm && config.data.is_empty() {
        return Err(UsageError("--task lm needs a text: give one with --data".to_owned()));
    }
    if SEQUENTIAL.contains(&config.task) {
        let task = config.task.name();
        UsageError::unless(!config.data.is_empty(), || format!("--task {task} needs labelled sequences: give them with --data"))?;
        // Made-up sequences have as many steps as it says, those of a file their own. The record of a run holds every key.
        let usual = usual(&layers.merged()?, config.task).seq_len;
        let is_told = layers.flags.contains_key("seq_len") || layers.is_given("seq_len") && config.seq_len != usual;
        UsageError::unless(!is_told, || {
            format!("{} means nothing for --task {task}, whose sequences are read whole; leave it out", layers.name("seq_len"))
        })?;
    }
    Ok(config)
}

/// As [`resolve`] where no data are needed, since they are made up.
///
/// # Errors
/// As [`resolve`].
pub fn settle(layers: &Layers) -> Result<RunConfig, UsageError> {
    let typed = layers.merged()?;
    let config = fill(&typed);
    check(layers, &typed, &config)?;
    let data = config.data.iter().map(|given| absolute(given)).collect();
    let init_from = config.init_from.as_deref().map(absolute);
    Ok(RunConfig { data, init_from, ..config })
}

/// Whether it shows already that labelled sequences consist of numbers, not of text.
fn is_of_numbers(typed: &Typed) -> bool {
    let data = typed.data.as_deref().unwrap_or_default();
    let is_ts = !data.is_empty() && data.iter().all(|given| holds(given, &[".ts"]));
    // The record of a run holds every key.
    let has_features = typed.features.as_ref().is_some_and(|features| !features.is_empty());
    is_ts || data.iter().any(|given| is_drawn(given)) || typed.sequence.is_some() || has_features
}

/// What holds for such data where nothing else is given.
fn usual(typed: &Typed, task: Task) -> RunConfig {
    let Typed { data, sequence, features, .. } = typed.clone();
    fill(&Typed { task: Some(task), data, sequence, features, ..Typed::default() })
}

/// Puts defaults where nothing was given.
fn fill(typed: &Typed) -> RunConfig {
    let data = typed.data.clone().unwrap_or_default();
    let is_ts = !data.is_empty() && data.iter().all(|given| holds(given, &[".ts"]));
    let is_drawn = data.iter().any(|given| is_drawn(given));
    let task = typed.task.unwrap_or_else(|| {
        let are_records = !data.is_empty() && data.iter().all(|given| holds(given, &[".jsonl", ".ndjson", ".json", ".parquet", ".pq"]));
        let of_series = typed.target.is_some() || typed.horizon.is_some() || typed.relative.is_some() || typed.season.is_some();
        if is_ts || typed.sequence.is_some() || (are_records && typed.label.is_some()) {
            Task::Classify
        } else if is_drawn {
            Task::Regress
        } else if (are_records && of_series) || data.iter().all(|given| holds(given, &[".csv", ".tsv"])) {
            Task::Forecast
        } else {
            Task::Lm
        }
    });
    let has_tokens = task == Task::Lm || (LABELLED.contains(&task) && !is_of_numbers(typed));
    let level = typed.level.unwrap_or(Level::Char);
    let defaults = match (task, level) {
        (Task::Lm, Level::Word) => WORDS,
        (Task::Lm, _) => LETTERS,
        (Task::Forecast, _) if data.is_empty() => BUILTIN,
        (Task::Forecast, _) => SERIES,
        (Task::Classify | Task::Regress, _) if has_tokens => LINES,
        (Task::Classify | Task::Regress | Task::Tag | Task::Frames, _) => SEQUENCES,
    };
    let size = |given: Option<Size>, default: usize| given.map_or(default, |size| size.0);
    let hidden = match typed.hidden.as_ref().map(|units| &units.0[..]) {
        None => Hidden::All(defaults.hidden),
        Some([all]) => Hidden::All(all.0),
        Some(each) => Hidden::Each(each.iter().map(|units| units.0).collect()),
    };
    let n_layers = size(typed.layers, hidden.n_layers().unwrap_or(defaults.layers));
    // Tied, the embedding is as wide as what the last layer hands up.
    let tied_to = match (typed.proj_size.unwrap_or(0), &hidden) {
        (0, Hidden::Each(units)) => units.last().copied().unwrap_or(0),
        (0, Hidden::All(units)) => *units,
        (projection, _) => projection,
    };
    let columns = match &hidden {
        _ if typed.tied == Some(true) => tied_to,
        Hidden::All(units) => *units,
        Hidden::Each(units) => units.first().copied().unwrap_or(0),
    };
    let batch_size = size(typed.batch_size, defaults.batch_size);
    let text = |given: &Option<String>, default: &str| given.clone().unwrap_or_else(|| default.to_owned());
    RunConfig {
        task,
        data,
        encoding: typed.encoding.unwrap_or(Encoding::Utf8),
        split: typed.split.unwrap_or(defaults.split),
        level,
        vocab: typed.vocab.map(|size| size.0),
        target: typed.target.clone().unwrap_or_default(),
        features: typed.features.clone().unwrap_or_default(),
        sequence: typed.sequence.clone(),
        label: typed.label.clone(),
        text: typed.text.clone(),
        tolerance: typed.tolerance,
        class_weights: typed.class_weights.clone(),
        quantiles: typed.quantiles,
        notes: typed.notes.map(|size| size.0),
        missing: typed.missing.unwrap_or(Missing::Fill),
        relative: typed.relative.unwrap_or(Relative::Auto),
        season: typed.season.map(|size| size.0),
        calendar: typed.calendar.unwrap_or(defaults.calendar),
        layers: n_layers,
        hidden,
        embedding: size(typed.embedding, if has_tokens { columns } else { 0 }),
        tied: typed.tied.unwrap_or(false),
        dropout: typed.dropout.unwrap_or(0.0),
        no_bias: typed.no_bias.unwrap_or(false),
        init: typed.init.unwrap_or(INIT),
        init_from: typed.init_from.clone(),
        freeze: typed.freeze.clone().unwrap_or_default(),
        gate_bias: typed.gate_bias,
        lstm: LstmConfig {
            bidirectional: typed.bidirectional.unwrap_or_default(),
            residual: typed.residual.unwrap_or_default(),
            learned_state: typed.learned_state.unwrap_or_default(),
            proj_size: typed.proj_size.unwrap_or_default(),
            layer_norm: typed.layer_norm.unwrap_or_default(),
            peephole: typed.peephole.unwrap_or_default(),
            coupled_gates: typed.coupled_gates.unwrap_or_default(),
            cell_clip: typed.cell_clip.unwrap_or_default(),
            recurrent_grad_clip: typed.recurrent_grad_clip.unwrap_or_default(),
            recurrent_dropout: typed.recurrent_dropout.unwrap_or_default(),
            weight_drop: typed.weight_drop.unwrap_or_default(),
            zoneout_h: typed.zoneout_h.unwrap_or_default(),
            zoneout_c: typed.zoneout_c.unwrap_or_default(),
            input_dropout: typed.input_dropout.unwrap_or_default(),
            output_dropout: typed.output_dropout.unwrap_or_default(),
        },
        seq_len: size(typed.seq_len, defaults.seq_len),
        horizon: size(typed.horizon, defaults.horizon),
        pooling: typed.pooling.unwrap_or(Pooling::Last),
        batch_size,
        eval_batch_size: size(typed.eval_batch_size, batch_size),
        epochs: typed.epochs.or_else(|| typed.max_steps.is_none().then_some(defaults.epochs)),
        max_steps: typed.max_steps,
        early_stop: typed.early_stop,
        optimizer: OptimizerConfig {
            rule: typed.optimizer.unwrap_or(OPTIMIZER),
            lr: typed.lr.unwrap_or(defaults.lr),
            momentum: typed.momentum.unwrap_or(0.0),
            nesterov: typed.nesterov.unwrap_or(false),
            weight_decay: typed.weight_decay.unwrap_or(0.0),
            l1: typed.l1.unwrap_or(0.0),
            clip_norm: typed.clip_norm.unwrap_or(CLIP_NORM),
            clip_value: typed.clip_value.unwrap_or(0.0),
        },
        schedule: ScheduleConfig {
            kind: typed.schedule.unwrap_or(SCHEDULE),
            warmup_steps: typed.warmup_steps.unwrap_or(0),
            lr_decay: typed.lr_decay,
            decay_after: typed.decay_after,
            decay_every: typed.decay_every,
            patience: typed.patience.unwrap_or(PATIENCE),
        },
        loss_reduction: typed.loss_reduction.unwrap_or(LossReduction::Mean),
        seed: typed.seed.unwrap_or(SEED),
        devices: text(&typed.devices, DEVICES),
        balance: text(&typed.balance, ""),
        on_device_loss: typed.on_device_loss.unwrap_or_default(),
        rejoin: typed.rejoin.unwrap_or(false),
        deadline: typed.deadline.unwrap_or(DEADLINE_SECONDS),
        memory_limit: typed.memory_limit.clone().unwrap_or_default(),
        no_autotune: typed.no_autotune.unwrap_or(false),
        accumulate: size(typed.accumulate, 1),
        compress: typed.compress.unwrap_or_default(),
        shard_optimizer: typed.shard_optimizer.unwrap_or(false),
        select: typed.select.unwrap_or(defaults.select),
        eval_every: typed.eval_every.unwrap_or(0),
        log_every: typed.log_every.unwrap_or(defaults.log_every),
        checkpoint_every: typed.checkpoint_every.unwrap_or(0),
        keep: size(typed.keep, KEEP),
        tensorboard: typed.tensorboard.unwrap_or(false),
        hash_every: typed.hash_every.unwrap_or(HASH_EVERY),
    }
}

/// Whether `--data` names files that end so: by the name alone, or by the names of all files of a folder.
fn holds(given: &str, ends: &[&str]) -> bool {
    let is_one = |name: &str| {
        let name = unpacked_name(name).to_lowercase();
        ends.iter().any(|end| name.ends_with(end))
    };
    match fs::read_dir(given) {
        Ok(entries) => {
            let names =
                entries.flatten().filter(|entry| entry.path().is_file()).map(|entry| entry.file_name().to_string_lossy().into_owned());
            let mut names = names.filter(|name| !name.starts_with('.')).peekable();
            names.peek().is_some() && names.all(|name| is_one(&name))
        }
        Err(_) => is_one(given),
    }
}

/// Whether it names data that are drawn, not read.
fn is_drawn(given: &str) -> bool {
    given.starts_with("builtin:")
}

/// A path that means the same from everywhere, since later commands read the run's data again.
fn absolute(given: &str) -> String {
    let path = Path::new(given);
    if given == "-" || given.is_empty() || is_drawn(given) || is_url(given) || path.is_absolute() {
        return given.to_owned();
    }
    if !path.exists() && given.contains(['*', '?', '[']) {
        // What stands before a pattern is no pattern.
        let folder = std::env::current_dir().ok();
        let folder = folder.as_ref().and_then(|folder| folder.to_str()).map(glob::Pattern::escape);
        return folder.map_or(given.to_owned(), |folder| format!("{folder}/{given}"));
    }
    std::path::absolute(path).ok().and_then(|path| path.to_str().map(str::to_owned)).unwrap_or_else(|| given.to_owned())
}

/// The judge of single values.
struct Judge<'a> {
    layers: &'a Layers,
}

impl Judge<'_> {
    fn hold(&self, key: &str, value: impl Display, fine: bool, allowed: &str) -> Result<(), UsageError> {
        if fine { Ok(()) } else { Err(UsageError(format!("{} is {value}, but must be {allowed}", self.layers.name(key)))) }
    }

    fn size(&self, key: &str, value: usize, max: usize) -> Result<(), UsageError> {
        self.hold(key, value, (1..=max).contains(&value), &format!("from 1 to {max}"))
    }

    fn positive(&self, key: &str, value: u64) -> Result<(), UsageError> {
        self.hold(key, value, value > 0, "at least 1")
    }

    fn at_least_zero(&self, key: &str, value: f64) -> Result<(), UsageError> {
        self.hold(key, value, value.is_finite() && value >= 0.0, "a number of 0 or more")
    }

    fn below_one(&self, key: &str, value: f64) -> Result<(), UsageError> {
        self.hold(key, value, (0.0..1.0).contains(&value), "at least 0 and below 1")
    }

    fn refuse(&self, key: &str, why: &str) -> Result<(), UsageError> {
        Err(UsageError(format!("{} {why}", self.layers.name(key))))
    }
}

/// Judges every value, then what does not go together.
fn check(layers: &Layers, typed: &Typed, config: &RunConfig) -> Result<(), UsageError> {
    let judge = Judge { layers };
    check_foreign(&judge, typed, config.task)?;
    if let Some(cell) = typed.cell.as_ref().filter(|cell| *cell != "lstm") {
        let problem = if cell == "gru" { "is not built: a GRU's three gates want kernels of their own" } else { "is no cell" };
        return judge.refuse("cell", &format!("{cell} {problem}; take lstm"));
    }
    check_data(&judge, config)?;
    check_model(&judge, config)?;
    check_training(&judge, config)?;
    check_run(&judge, config)
}

/// Refuses what means nothing for the task, unless it only says what holds anyway: the record of a run holds every key.
fn check_foreign(judge: &Judge, typed: &Typed, task: Task) -> Result<(), UsageError> {
    let given = table(typed)?;
    let neutral = table(&usual(typed, task))?;
    let is_told = |key: &str| given.contains_key(key) && given.get(key) != neutral.get(key);
    if let Some((key, _)) = MEANT_FOR.iter().find(|(key, _)| !is_meant(key, task) && is_told(key)) {
        return judge.refuse(key, &format!("means nothing for --task {}; leave it out", task.name()));
    }
    if let (true, Some(key)) = (LABELLED.contains(&task) && is_of_numbers(typed), OF_TOKENS.iter().find(|key| is_told(key))) {
        return judge.refuse(key, "means nothing for sequences of numbers, which have no tokens; leave it out");
    }
    Ok(())
}

fn check_data(judge: &Judge, config: &RunConfig) -> Result<(), UsageError> {
    for given in &config.data {
        judge.hold("data", "empty", !given.trim().is_empty(), "a file, a glob, a folder or -")?;
    }
    if config.data.iter().filter(|given| *given == "-").count() > 1 {
        return judge.refuse("data", "names standard input twice; it can be read once");
    }
    for (key, columns) in [("target", &config.target), ("features", &config.features)] {
        judge.hold(key, format!("'{}'", columns.join(",")), columns.iter().all(|name| !name.is_empty()), "names of columns")?;
    }
    for (key, column) in [("sequence", &config.sequence), ("label", &config.label), ("text", &config.text)] {
        judge.hold(key, "empty", column.as_ref().is_none_or(|name| !name.trim().is_empty()), "the name of a column")?;
    }
    if let Some(tolerance) = config.tolerance {
        judge.at_least_zero("tolerance", tolerance)?;
    }
    if let Some(notes) = config.notes {
        judge.hold("notes", notes, (1..=MAX_NOTES).contains(&notes), &format!("from 1 to {MAX_NOTES}"))?;
    }
    if config.data.iter().any(|given| is_drawn(given)) {
        judge.hold("data", config.data.join(", "), config.data.len() == 1, "built-in data alone")?;
        judge.hold("task", config.task.name(), config.task == Task::Regress, "regress, with built-in data of the adding problem")?;
    }
    if let Some(season) = config.season {
        judge.hold("season", season, season <= MAX_LENGTH, &format!("from 0 to {MAX_LENGTH}"))?;
    }
    if let Some(vocab) = config.vocab {
        judge.hold("vocab", vocab, (2..=u32::MAX as usize).contains(&vocab), "at least 2")?;
        if config.level == Level::Byte {
            return judge.refuse("vocab", "cannot be used with --level byte, which has 256 entries always");
        }
    }
    let Split { train, valid, test } = config.split;
    let sum = train + valid + test;
    let shown = format!("{} (sum {})", config.split, (sum * 1e6).round() / 1e6);
    let allowed = "three fractions that add up to 1, the first above 0";
    judge.hold("split", shown, Split::new(train, valid, test).is_ok(), allowed)
}

fn check_model(judge: &Judge, config: &RunConfig) -> Result<(), UsageError> {
    judge.size("layers", config.layers, MAX_LAYERS)?;
    let named = config.hidden.n_layers().unwrap_or(config.layers);
    judge.hold("hidden", &config.hidden, named == config.layers, &format!("one number, or as many as --layers {}", config.layers))?;
    let units: Vec<usize> = (0..config.layers).map(|l| config.hidden.of(l)).collect();
    judge.hold("hidden", &config.hidden, units.iter().all(|units| (1..=MAX_UNITS).contains(units)), &format!("from 1 to {MAX_UNITS}"))?;
    let (narrowest, projection) = (units.iter().min().copied().unwrap_or(0), config.lstm.proj_size);
    judge.hold(
        "proj_size",
        projection,
        projection < narrowest,
        &format!("below the units of the narrowest layer, {narrowest}: it would project to nothing smaller"),
    )?;
    if config.lstm.layer_norm && narrowest == 1 {
        return judge.refuse("layer_norm", "of a single hidden unit is zero whatever comes in; raise --hidden");
    }
    judge.size("seq_len", config.seq_len, MAX_LENGTH)?;
    judge.size("horizon", config.horizon, MAX_LENGTH)?;
    let l = &config.lstm;
    let shares = [
        ("dropout", config.dropout),
        ("recurrent_dropout", l.recurrent_dropout),
        ("weight_drop", l.weight_drop),
        ("zoneout_h", l.zoneout_h),
        ("zoneout_c", l.zoneout_c),
        ("input_dropout", l.input_dropout),
        ("output_dropout", l.output_dropout),
    ];
    for (key, share) in shares {
        judge.below_one(key, share)?;
    }
    if config.dropout > 0.0 && config.layers == 1 {
        return judge
            .refuse("dropout", "acts between layers, and there is one; raise --layers, or take --output-dropout or --recurrent-dropout");
    }
    judge.at_least_zero("cell_clip", l.cell_clip)?;
    judge.at_least_zero("recurrent_grad_clip", l.recurrent_grad_clip)?;
    if l.bidirectional && config.task == Task::Lm {
        return judge.refuse("bidirectional", "lets a language model read the token that it is to predict; leave it out");
    }
    if l.bidirectional && config.task == Task::Frames {
        return judge.refuse("bidirectional", "lets the model read the frame that it is to tell; leave it out");
    }
    // Without tokens there is none.
    if config.embedding > 0 || config.task == Task::Lm {
        judge.size("embedding", config.embedding, MAX_UNITS)?;
    }
    let top = if projection > 0 { projection } else { units.last().copied().unwrap_or(0) };
    if config.tied && config.embedding != top {
        let flag = if projection > 0 { "--proj-size" } else { "--hidden" };
        return judge.hold("embedding", config.embedding, false, &format!("equal to {flag}, {top}, with --tied"));
    }
    if let Init::Uniform(a) = config.init {
        judge.hold("init", config.init, a.is_finite() && a > 0.0, "uniform:A with A above 0")?;
    }
    let Some(biases) = config.gate_bias else { return Ok(()) };
    let shown = biases.map(|bias| bias.to_string()).join(",");
    judge.hold("gate_bias", shown, biases.iter().all(|bias| bias.is_finite()), "four finite numbers")?;
    if config.lstm.coupled_gates && biases[1] != 0.0 {
        let problem =
            format!("starts a forget gate at {}, of which --coupled-gates leaves none (f = 1 - i); give 0 in its place", biases[1]);
        return judge.refuse("gate_bias", &problem);
    }
    if config.no_bias { judge.refuse("gate_bias", "cannot be used with --no-bias: there is no bias to start") } else { Ok(()) }
}

fn check_training(judge: &Judge, config: &RunConfig) -> Result<(), UsageError> {
    let OptimizerConfig { rule, lr, momentum, nesterov, weight_decay, l1, clip_norm, clip_value } = config.optimizer;
    judge.size("batch_size", config.batch_size, MAX_LENGTH)?;
    judge.size("eval_batch_size", config.eval_batch_size, MAX_LENGTH)?;
    for (key, limit) in [("epochs", config.epochs), ("max_steps", config.max_steps)] {
        if let Some(limit) = limit {
            judge.positive(key, limit)?;
        }
    }
    if let Some(n) = config.early_stop {
        judge.positive("early_stop", n)?;
    }
    for pattern in &config.freeze {
        judge.hold(
            "freeze",
            format!("'{pattern}'"),
            glob::Pattern::new(pattern).is_ok() && !pattern.is_empty(),
            "a pattern of tensors' names",
        )?;
    }
    if let Some(from) = &config.init_from {
        judge.hold("init_from", format!("'{from}'"), Path::new(from).exists(), "a run folder or a model file that is there")?;
    }
    judge.hold("lr", lr, lr.is_finite() && lr > 0.0, "a number above 0")?;
    judge.below_one("momentum", momentum)?;
    judge.at_least_zero("weight_decay", weight_decay)?;
    judge.at_least_zero("l1", l1)?;
    judge.at_least_zero("clip_norm", clip_norm)?;
    judge.at_least_zero("clip_value", clip_value)?;
    let ScheduleConfig { kind, lr_decay, decay_after, decay_every, patience, .. } = config.schedule;
    if let Some(decay) = lr_decay {
        judge.hold("lr_decay", decay, decay > 0.0 && decay <= 1.0, "above 0 and at most 1")?;
    }
    if let Some(epochs) = decay_after {
        judge.at_least_zero("decay_after", epochs)?;
    }
    if let Some(epochs) = decay_every {
        judge.hold("decay_every", epochs, epochs.is_finite() && epochs > 0.0, "a number above 0")?;
    }
    judge.positive("patience", u64::from(patience))?;
    let cuts = matches!(kind, ScheduleKind::Step | ScheduleKind::Exponential);
    if !cuts && (decay_after.is_some() || decay_every.is_some()) {
        let key = if decay_after.is_some() { "decay_after" } else { "decay_every" };
        return judge.refuse(key, "needs --schedule step or exponential");
    }
    if lr_decay.is_some() && !cuts && kind != ScheduleKind::Plateau {
        return judge.refuse("lr_decay", "needs --schedule step, exponential or plateau");
    }
    if momentum > 0.0 && !matches!(rule, Rule::Sgd | Rule::Rmsprop) {
        return judge.refuse("momentum", "needs --optimizer sgd or rmsprop; adam and adamw have their own");
    }
    if nesterov && rule != Rule::Sgd {
        return judge.refuse("nesterov", "needs --optimizer sgd");
    }
    if nesterov && momentum == 0.0 {
        return judge.refuse("nesterov", "needs --momentum above 0");
    }
    Ok(())
}

fn check_run(judge: &Judge, config: &RunConfig) -> Result<(), UsageError> {
    let wrong = |key: &str, error: devices::DeviceError| {
        let flag = format!("--{key}");
        UsageError(error.to_string().replacen(&flag, &judge.layers.name(key), 1))
    };
    let list = devices::parse(&config.devices).map_err(|error| wrong("devices", error))?;
    devices::parse_balance(&config.balance, list.n_workers()).map_err(|error| wrong("balance", error))?;
    let n_workers = list.n_workers();
    if config.rejoin && config.on_device_loss == OnDeviceLoss::Stop {
        return judge.refuse("rejoin", "needs a run that goes on without a device: leave --on-device-loss stop out");
    }
    if config.rejoin && n_workers == Some(1) {
        return judge.refuse("rejoin", "means nothing with one worker, whose loss ends the run; name more with --devices, or leave it out");
    }
    if config.shard_optimizer && n_workers == Some(1) {
        return judge.refuse("shard_optimizer", "means nothing with one worker; name more with --devices, or leave it out");
    }
    if config.shard_optimizer && config.optimizer.states().is_empty() {
        let rule = "means nothing for an optimizer that keeps no state, as sgd without --momentum; leave it out";
        return judge.refuse("shard_optimizer", rule);
    }
    judge.positive("deadline", config.deadline)?;
    let limits = &config.memory_limit;
    let shown = limits.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    judge.hold("memory_limit", &shown, limits.iter().all(|gb| gb.is_finite() && *gb > 0.0), "numbers of GB above 0")?;
    if let Some(n) = n_workers.filter(|&n| limits.len() > 1 && limits.len() != n) {
        return judge.hold("memory_limit", &shown, false, &format!("one number for all workers, or one for each of the {n} of --devices"));
    }
    let max = config.batch_size;
    judge.hold("accumulate", config.accumulate, (1..=max).contains(&config.accumulate), &format!("from 1 to --batch-size, {max}"))?;
    if let (Method::Topk { ratio }, Some(n)) = (config.compress, n_workers.filter(|&n| n > 1)) {
        // Each value takes six bytes to each other worker, where a sum takes four twice (P-1)/P times.
        let most = 4.0 / (3.0 * n as f64);
        let allowed = format!("below topk:{most:.3} with {n} workers: from there on it sends more than whole gradients would");
        judge.hold("compress", config.compress, ratio < most, &allowed)?;
    }
    judge.positive("log_every", config.log_every)?;
    judge.positive("keep", config.keep as u64)
}

/// The default of a key as the help shows it, told apart by kind of work where it differs; `None` where there is none to show.
pub fn default_text(key: &str) -> Option<String> {
    if matches!(key, "task" | "data" | "eval_batch_size" | "embedding") {
        return None;
    }
    let example = |task: Task, level: Level, data: &[&str]| {
        let data = Some(data.iter().map(|&name| name.to_owned()).collect());
        let config = fill(&Typed { task: Some(task), level: Some(level), data, ..Typed::default() });
        let text = |value: &Value| match value {
            Value::String(text) => text.clone(),
            Value::Float(number) => number.to_string(),
            Value::Table(parts) => ["train", "valid", "test"].map(|part| parts.get(part).map_or(String::new(), Value::to_string)).join(","),
            Value::Array(items) => items.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
            other => other.to_string(),
        };
        table(&config).ok()?.get(key).map(text).filter(|text| !text.is_empty())
    };
    let of = |task: Task, level: Level, data: &[&str]| {
        example(task, level, data).filter(|_| is_meant(key, task) && !(key == "seq_len" && SEQUENTIAL.contains(&task)))
    };
    let letters = of(Task::Lm, Level::Char, &["text"]);
    let words = of(Task::Lm, Level::Word, &["text"]).filter(|_| key != "level");
    let series = of(Task::Forecast, Level::Char, &["table.csv"]);
    let builtin = of(Task::Forecast, Level::Char, &[]);
    let labelled = of(Task::Classify, Level::Char, &["sequences.ts"]);
    let lines = of(Task::Classify, Level::Char, &["lines.txt"]);
    // What holds wherever it means something needs no name.
    let kinds = [&letters, &series, &labelled];
    let first = kinds.into_iter().flatten().next().cloned();
    let common = first.filter(|first| kinds.into_iter().flatten().all(|value| value == first));
    let named = [
        ("lm", &letters, &common),
        ("lm at word level", &words, &letters),
        ("forecast", &series, &common),
        ("built-in example", &builtin, &series),
        ("labelled sequences", &labelled, &common),
        ("labelled texts", &lines, &labelled),
    ];
    let named = named.into_iter().filter(|(_, value, usual)| value != usual);
    let named = named.filter_map(|(of, value, _)| value.as_ref().map(|value| format!("{of} {value}")));
    let shown: Vec<String> = common.clone().into_iter().chain(named).collect();
    (!shown.is_empty() && shown != ["false"]).then(|| shown.join("; "))
}
