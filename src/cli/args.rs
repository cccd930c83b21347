//! The commands and their flags, and nothing but what was typed: what it comes to is settled in `resolve`.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;

use super::resolve::{default_text, nearest};
use super::typed::{RUN, Size, Typed, choice};
use crate::comm::plan::Algorithm;
use crate::store::Which;
use crate::store::interchange::{Format, Part};
use crate::train::profile::{Lengths, Mode, Scaling, Workload};

/// The whole command line.
#[derive(Debug, Parser)]
#[command(name = "carrousel", version, about, max_term_width = 120, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    #[command(flatten)]
    pub global: Global,
}

/// Flags of every command.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Output")]
pub struct Global {
    /// Write JSON lines to standard output, one object an event, the last one summary or error
    #[arg(long, global = true)]
    pub json: bool,
    /// Report only warnings and errors on standard error
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Report more on standard error
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

/// One variant a command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a network; without arguments: the built-in example, half a minute on two cores
    #[command(after_help = TRAIN_EXAMPLES)]
    Train(Box<TrainArgs>),
    /// Measure the loss and the scores of a trained network
    #[command(after_help = EVALUATE_EXAMPLES)]
    Evaluate(EvaluateArgs),
    /// Write text with a trained network
    #[command(after_help = GENERATE_EXAMPLES)]
    Generate(GenerateArgs),
    /// Tell the classes of sequences, or of their steps, with probabilities
    #[command(after_help = CLASSIFY_EXAMPLES)]
    Classify(ClassifyArgs),
    /// Continue a series beyond the end of its data
    #[command(after_help = FORECAST_EXAMPLES)]
    Forecast(ForecastArgs),
    /// Write a trained network for PyTorch or for an ONNX run-time
    #[command(after_help = EXPORT_EXAMPLES)]
    Export(ExportArgs),
    /// Make a run folder of a network in a safetensors or ONNX file, to use it or to train on from it
    #[command(after_help = IMPORT_EXAMPLES)]
    Import(Box<ImportArgs>),
    /// Tell what is in a run folder
    #[command(after_help = INSPECT_EXAMPLES)]
    Inspect(InspectArgs),
    /// Tell what several runs differ in, and draw their loss curves into one picture
    #[command(after_help = COMPARE_EXAMPLES)]
    Compare(CompareArgs),
    /// List the recipes, the well-known pieces of work that train --recipe does again, or show one
    #[command(after_help = RECIPES_EXAMPLES)]
    Recipes(RecipesArgs),
    /// List the graphics adapters that --devices gpu:INDEX can name
    #[command(after_help = DEVICES_EXAMPLES)]
    Devices(DevicesArgs),
    /// Measure where the time goes
    #[command(subcommand, after_help = PROFILE_EXAMPLES)]
    Profile(ProfileCommand),
    /// Write what a shell needs to complete commands and flags
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions(CompletionsArgs),
    /// Write the manual page, or one a command into a folder
    #[command(hide = true, after_help = MAN_EXAMPLES)]
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub typed: Typed,
    /// Continue the run in --out, or start it if there is no checkpoint yet
    #[arg(long, help_heading = RUN)]
    pub resume: bool,
    /// Tell parameters, memory of each device, steps and about how long it will take, from a few measured steps; write nothing
    #[arg(long, help_heading = RUN, conflicts_with = "resume")]
    pub dry_run: bool,
    /// Read options from a TOML file, whose keys are the flags' names with underscores; flags go before it
    #[arg(long, value_name = "FILE", help_heading = RUN)]
    pub config: Option<PathBuf>,
    /// Write what every worker, its ring and its GPU did when, as JSON for ui.perfetto.dev or chrome://tracing
    #[arg(long, value_name = "FILE", help_heading = RUN, conflicts_with = "dry_run")]
    pub trace: Option<PathBuf>,
    /// Take the options of a recipe that comes with the program (see `recipes`); flags and --config go before it
    #[arg(long, value_name = "NAME", help_heading = RUN)]
    pub recipe: Option<String>,
}

/// What every command on a trained network takes.
#[derive(Debug, Args)]
pub struct Trained {
    /// The run folder
    #[arg(long, value_name = "DIR")]
    pub run: PathBuf,
    /// Another checkpoint than the one that the run selected: best, last or a step
    #[arg(long, value_name = "WHICH", default_value = "selected", hide_default_value = true)]
    pub checkpoint: Which,
    /// auto, or a comma list of cpu, cpu:THREADS, gpu:INDEX
    #[arg(long, value_name = "LIST", default_value = "auto")]
    pub devices: String,
}

#[derive(Debug, Args)]
pub struct EvaluateArgs {
    #[command(flatten)]
    pub trained: Trained,
    /// Data to measure on, may be repeated; by default the test part of the run's own
    #[arg(long, value_name = "PATH")]
    pub data: Vec<String>,
    /// Streams of a text or windows of a series at a time; by default as in training; 1 is one stream, as papers do
    #[arg(long, value_name = "N")]
    pub eval_batch_size: Option<Size>,
    /// Count as wrong the numbers of sequences that are further off than this, in the label's unit; by default as in training
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub tolerance: Option<f64>,
    /// Forecast from every N-th origin of the part only, and tell the errors by step ahead, the model's and the naive forecasts'
    #[arg(long, value_name = "N")]
    pub rolling: Option<Size>,
    /// Write what the network says: .csv for predictions beside the truth, .safetensors for its inputs and raw outputs
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub trained: Trained,
    /// Text to go on from
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true, allow_hyphen_values = true)]
    pub prompt: String,
    /// Tokens to write: bytes, characters or words
    #[arg(long, value_name = "N", default_value = "500")]
    pub length: Size,
    /// Below 1 the likelier tokens become likelier still; 0 takes always the likeliest
    #[arg(long, value_name = "X", default_value_t = 0.8, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Choose among the K likeliest tokens only
    #[arg(long, value_name = "K")]
    pub top_k: Option<Size>,
    /// Seed of the choice: the same one gives the same text
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The run folder
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Draw gates and cell states while the network reads this text, or a file like the run's data (of a series its end, of sequences the first one)
    #[arg(long, value_name = "TEXT|FILE", allow_hyphen_values = true)]
    pub activations: Option<String>,
    /// The layer to draw, from 1; by default the last
    #[arg(long, value_name = "N", requires = "activations")]
    pub layer: Option<usize>,
    /// The units to draw, from 1, up to eight; by default those whose cell state changes most
    #[arg(long, value_name = "N,...", value_delimiter = ',', requires = "activations")]
    pub units: Vec<usize>,
    /// The picture of activations to write, as .svg and as .png
    #[arg(long, value_name = "FILE", default_value = "activations.png", requires = "activations")]
    pub output: PathBuf,
    /// Another checkpoint than the one that the run selected: best, last or a step
    #[arg(long, value_name = "WHICH", default_value = "selected", hide_default_value = true, requires = "activations")]
    pub checkpoint: Which,
    /// The device that reads: auto, cpu, cpu:THREADS or gpu:INDEX
    #[arg(long, value_name = "DEVICE", default_value = "auto", requires = "activations")]
    pub devices: String,
}

#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Run folders, two or more
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<PathBuf>,
    /// The picture to write, as .svg and as .png
    #[arg(long, value_name = "FILE", default_value = "compare.png")]
    pub output: PathBuf,
}

#[derive(Debug, Args)]
pub struct RecipesArgs {
    #[command(subcommand)]
    pub command: Option<RecipesCommand>,
}

#[derive(Debug, Subcommand)]
pub enum RecipesCommand {
    /// Print a recipe, a configuration file that --config takes
    Show {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
    },
}

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

#[derive(Debug, Args)]
pub struct ManArgs {
    /// A folder to write a page into for each command, instead of the main page to standard output
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct DevicesArgs {
    /// Measure each adapter, and the CPU beside: products of 1024 x 1024 matrices, and reading and writing memory
    #[arg(long)]
    pub measure: bool,
}

#[derive(Debug, Args)]
pub struct ClassifyArgs {
    #[command(flatten)]
    pub trained: Trained,
    /// Data to look at, like those of the run; labels may be missing; may be repeated
    #[arg(long, value_name = "PATH", required = true)]
    pub data: Vec<String>,
    /// Write the probabilities of all classes to a CSV file
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ForecastArgs {
    #[command(flatten)]
    pub trained: Trained,
    /// A newer file with the same columns; by default the run's own data
    #[arg(long, value_name = "FILE")]
    pub data: Option<String>,
    /// Write the values to a CSV file
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The run folder
    #[arg(long, value_name = "DIR")]
    pub run: PathBuf,
    /// Another checkpoint than the one that the run selected: best, last or a step
    #[arg(long, value_name = "WHICH", default_value = "selected", hide_default_value = true)]
    pub checkpoint: Which,
    /// safetensors: PyTorch's names and layouts; onnx: a graph that onnxruntime runs
    #[arg(long, value_name = "FORMAT", value_parser = choice::<Format>())]
    pub format: Format,
    /// The file to write; one that is there is replaced
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    /// all, or lstm: the LSTM layers alone, in safetensors under the names of torch.nn.LSTM
    #[arg(long, value_name = "PART", default_value = "all", value_parser = choice::<Part>(), hide_possible_values = true)]
    pub part: Part,
}

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// A safetensors file with an LSTM under PyTorch's names, or an .onnx file
    #[arg(long, value_name = "FILE")]
    pub input: PathBuf,
    #[command(flatten)]
    pub typed: Typed,
    /// Read options from a TOML file, whose keys are the flags' names with underscores; flags go before it
    #[arg(long, value_name = "FILE", help_heading = RUN)]
    pub config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum ProfileCommand {
    /// Time training steps on made-up data
    #[command(after_help = PROFILE_EXAMPLES)]
    Step(Box<ProfileStepArgs>),
    /// Time each kernel alone, beside what the device can do at best
    #[command(after_help = PROFILE_KERNELS_EXAMPLES)]
    Kernels(ProfileKernelsArgs),
    /// Time all-reduces between ranks that are threads of this process, beside what the machine's memory allows
    #[command(after_help = PROFILE_RING_EXAMPLES)]
    Ring(ProfileRingArgs),
}

#[derive(Debug, Args)]
pub struct ProfileKernelsArgs {
    /// auto, or a comma list of cpu, cpu:THREADS, gpu:INDEX; each is measured in its turn
    #[arg(long, value_name = "LIST", default_value = "auto")]
    pub devices: String,
    /// Mark as chosen what is fixed for the size, not what an earlier measurement found fastest
    #[arg(long)]
    pub no_autotune: bool,
    /// Kernels to measure, with commas; all by default
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub kernel: Vec<String>,
    /// Time steps of the layer and its batch that kernels are measured for, instead of sizes of real models [default with another size: 100]
    #[arg(long, value_name = "T", help_heading = SIZES)]
    pub seq_len: Option<Size>,
    /// Sequences at a time [default with another size: 50]
    #[arg(long, value_name = "B", help_heading = SIZES)]
    pub batch_size: Option<Size>,
    /// Numbers that the layer reads at each step [default with another size: 128]
    #[arg(long, value_name = "I", help_heading = SIZES)]
    pub input: Option<Size>,
    /// Hidden units [default with another size: 256]
    #[arg(long, value_name = "H", help_heading = SIZES)]
    pub hidden: Option<Size>,
    /// Classes of the head and of the embedding [default with another size: 96]
    #[arg(long, value_name = "V", help_heading = SIZES)]
    pub classes: Option<Size>,
}

/// Flags that say how large a layer is.
const SIZES: &str = "Sizes";

#[derive(Debug, Args)]
pub struct ProfileRingArgs {
    /// Ranks, each a thread
    #[arg(long, value_name = "P", default_value = "2")]
    pub world: Size,
    /// Length of the message, a multiple of 4
    #[arg(long, value_name = "SIZE", default_value = "4M")]
    pub bytes: Size,
    /// How to go about it: ring, tree, direct, groups:N (N neighbours a group), or auto, which takes what a bench found fastest for this world and length
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub algorithm: Algorithm,
    /// Calls that are timed, after the warm-up; by default as many as move 2 GB, from 10 to 2000
    #[arg(long, value_name = "N")]
    pub calls: Option<Size>,
}

#[derive(Debug, Args)]
pub struct ProfileStepArgs {
    #[command(flatten)]
    pub typed: Typed,
    /// A fixed piece of work instead of a model of one's own: A series, B characters, C words, D large, E a long layer alone
    #[arg(long, value_name = "LETTER", help_heading = RUN, ignore_case = true, value_parser = workloads())]
    pub workload: Option<String>,
    /// Steps that are timed, after the warm-up [default: 20; infer-step 2000; infer-seq 100]
    #[arg(long, value_name = "N", help_heading = RUN)]
    pub steps: Option<Size>,
    /// What a step is: training, or using the network at one time step a call or at a whole sequence a call, at batch 1 unless --batch-size says more
    #[arg(long, value_name = "WHAT", help_heading = RUN, default_value = "train", value_parser = choice::<Mode>())]
    pub mode: Mode,
    /// uniform trains on sequences of 1 to --seq-len steps too, in batches of like length, and tells their speed beside that of full ones
    #[arg(long, value_name = "WHICH", help_heading = RUN, default_value = "full", value_parser = choice::<Lengths>())]
    pub lengths: Lengths,
    /// Whose batch it is where several workers share it: strong, of all together; weak, of each worker
    #[arg(long, value_name = "WHICH", help_heading = RUN, default_value = "strong", value_parser = choice::<Scaling>())]
    pub scaling: Scaling,
    /// Write what every worker, its ring and its GPU did when, as JSON for ui.perfetto.dev or chrome://tracing
    #[arg(long, value_name = "FILE", help_heading = RUN)]
    pub trace: Option<PathBuf>,
}

/// The letters of the pieces of work that there are.
fn workloads() -> PossibleValuesParser {
    PossibleValuesParser::new(["A", "B", "C", "D", "E"].into_iter().filter(|letter| Workload::named(letter).is_some()))
}

const EXAMPLES: &str = "\
Examples:
  carrousel train
  carrousel train --data book.txt --out runs/book
  carrousel generate --run runs/book --prompt 'It was '
  carrousel compare runs/book runs/book-wider
  carrousel help train";

/// The commands as the help lists them; those that stand in no group come last.
const GROUPS: [(&str, &[&str]); 5] = [
    ("Train", &["train", "recipes", "devices", "profile"]),
    ("Use a trained network", &["evaluate", "generate", "forecast", "classify"]),
    ("Look at runs", &["inspect", "compare"]),
    ("Exchange", &["export", "import"]),
    ("More", &["completions", "help"]),
];

/// The help of the program as a whole, with the commands in groups.
fn grouped(command: clap::Command) -> clap::Command {
    let styles = command.get_styles().clone();
    let (heading, literal) = (styles.get_header(), styles.get_literal());
    let about = |name: &str| command.find_subcommand(name).filter(|found| !found.is_hide_set()).and_then(clap::Command::get_about);
    let line = |name: &str, about: String| format!("  {literal}{name:<12}{literal:#} {about}\n");
    let mut list = String::new();
    let listed = |name: &str| GROUPS.iter().any(|(_, names)| names.contains(&name));
    let others: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).filter(|name| !listed(name)).collect();
    for (title, names) in GROUPS.into_iter().chain([("Other", others.as_slice())]) {
        let lines: String = names
            .iter()
            .filter_map(|&name| match name {
                "help" => Some(line(name, "Print the help of a command".to_owned())),
                _ => about(name).map(|about| line(name, about.to_string())),
            })
            .collect();
        if !lines.is_empty() {
            list += &format!("{heading}{title}:{heading:#}\n{lines}\n");
        }
    }
    let template =
        format!("{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{list}{heading}Output:{heading:#}\n{{options}}{{after-help}}");
    command.help_template(template)
}

const TRAIN_EXAMPLES: &str = "\
Sizes may be written with K, M or G (1024). A flag goes before the same key of --config, that before --recipe, and that before the default.

Examples:
  carrousel train                                               the built-in example
  carrousel train --data book.txt --layers 2 --dropout 0.1      a text, character by character
  carrousel train --data sales.csv --target units --horizon 14  a series, two weeks ahead
  carrousel train --data 'vowels_*.ts' --pooling mean           the class of each sequence
  carrousel train --data book.txt --devices gpu:0,gpu:1,cpu:4   three workers in one ring
  carrousel train --recipe zaremba-small --data ptb             a published result again
  carrousel train --config book.toml --lr 1e-3                  options from a file, one changed
  carrousel train --out runs/book --resume                      go on where a run was stopped
  carrousel train --data book.txt --hidden 512 --dry-run        what it would take, without training";

const EVALUATE_EXAMPLES: &str = "\
Examples:
  carrousel evaluate --run runs/book
  carrousel evaluate --run runs/sales --rolling 7
  carrousel evaluate --run runs/book --data other.txt --eval-batch-size 1 --json";

const GENERATE_EXAMPLES: &str = "\
Examples:
  carrousel generate --run runs/book --prompt 'It was ' --length 1000
  carrousel generate --run runs/book --temperature 1 --top-k 20 --seed 7";

const CLASSIFY_EXAMPLES: &str = "\
Examples:
  carrousel classify --run runs/vowels --data new.ts
  carrousel classify --run runs/reviews --data lines.txt --output classes.csv --json";

const FORECAST_EXAMPLES: &str = "\
Examples:
  carrousel forecast --run runs/sales
  carrousel forecast --run runs/sales --data sales-until-today.csv --output next.csv";

const EXPORT_EXAMPLES: &str = "\
Examples:
  carrousel export --run runs/book --format safetensors --output book.safetensors
  carrousel export --run runs/book --format safetensors --part lstm --output lstm.safetensors
  carrousel export --run runs/sales --format onnx --output sales.onnx";

const IMPORT_EXAMPLES: &str = "\
A file that carrousel wrote brings its options along; a foreign one needs --data and the flags of train, less those that its tensors tell.
The imported run stands at step 0: its options are settled here, and train --out DIR --resume begins to train from it.

Examples:
  carrousel import --input book.safetensors --out runs/book-again
  carrousel import --input torch.safetensors --data book.txt --level char --lr 5e-4 --out runs/tuned
  carrousel train --out runs/tuned --resume";

const INSPECT_EXAMPLES: &str = "\
Examples:
  carrousel inspect runs/book
  carrousel inspect runs/book --json
  carrousel inspect runs/book --activations wherefore --output wherefore.png";

const COMPARE_EXAMPLES: &str = "\
Examples:
  carrousel compare runs/book runs/book-wider
  carrousel compare runs/book* --output book.png --json";

const RECIPES_EXAMPLES: &str = "\
Examples:
  carrousel recipes
  carrousel recipes show zaremba-small > mine.toml
  carrousel train --config mine.toml --data ptb";

const DEVICES_EXAMPLES: &str = "\
Examples:
  carrousel devices
  carrousel devices --measure --json";

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  carrousel completions bash > ~/.local/share/bash-completion/completions/carrousel
  carrousel completions zsh > ~/.zfunc/_carrousel
  carrousel completions fish > ~/.config/fish/completions/carrousel.fish";

const MAN_EXAMPLES: &str = "\
Examples:
  carrousel man | man -l -
  carrousel man --output ~/.local/share/man/man1";

const PROFILE_EXAMPLES: &str = "\
Examples:
  carrousel profile step --workload B --devices cpu:2 --steps 50 --json
  carrousel profile step --task lm --layers 2 --hidden 512 --devices gpu:0,cpu
  carrousel profile step --task classify --hidden 128 --lengths uniform
  carrousel profile step --workload B --mode infer-step --devices cpu:1
  carrousel profile step --workload B --devices gpu:0,cpu --steps 5 --trace trace.json";

const PROFILE_KERNELS_EXAMPLES: &str = "\
GB/s count what must be read and written once, so a kernel whose operands stay in a cache may be above memory's ceiling.

Examples:
  carrousel profile kernels --devices cpu:1,gpu:0
  carrousel profile kernels --kernel gemm,lstm_step_forward --hidden 1024 --batch-size 64 --json";

const PROFILE_RING_EXAMPLES: &str = "\
Examples:
  carrousel profile ring --world 4 --bytes 64M
  carrousel profile ring --world 2 --bytes 4K --algorithm direct --json";

/// The only keys that say something about one training step on made-up data.
pub const PROFILED: &[&str] = &[
    "task",
    "level",
    "vocab",
    "target",
    "features",
    "layers",
    "hidden",
    "embedding",
    "tied",
    "dropout",
    "input_dropout",
    "output_dropout",
    "proj_size",
    "layer_norm",
    "residual",
    "learned_state",
    "peephole",
    "coupled_gates",
    "cell_clip",
    "recurrent_grad_clip",
    "recurrent_dropout",
    "weight_drop",
    "zoneout_h",
    "zoneout_c",
    "no_bias",
    "init",
    "gate_bias",
    "seq_len",
    "horizon",
    "pooling",
    "notes",
    "quantiles",
    "bidirectional",
    "batch_size",
    "lr",
    "optimizer",
    "momentum",
    "nesterov",
    "weight_decay",
    "l1",
    "clip_norm",
    "clip_value",
    "devices",
    "balance",
    "no_autotune",
    "accumulate",
    "compress",
    "shard_optimizer",
    "seed",
];
/// Of these the ones that say something about training alone.
pub const TRAINED: &[&str] = &[
    "dropout",
    "recurrent_dropout",
    "weight_drop",
    "recurrent_grad_clip",
    "lr",
    "optimizer",
    "momentum",
    "nesterov",
    "weight_decay",
    "l1",
    "clip_norm",
    "clip_value",
    "balance",
    "no_autotune",
    "accumulate",
    "compress",
    "shard_optimizer",
];
/// Flags of `profile step` that are no keys.
const OF_PROFILE: &[&str] = &["workload", "steps", "mode", "lengths", "trace", "json", "quiet", "verbose", "help"];

/// The command line's description, with the defaults in its help.
pub fn command() -> clap::Command {
    let with_default = |arg: clap::Arg| match default_text(&arg.get_id().as_str().replace('-', "_")) {
        Some(default) => {
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
            arg.help(format!("{help} [default: {default}]"))
        }
        None => arg,
    };
    let in_profile = |arg: clap::Arg| {
        let id = arg.get_id().as_str();
        if PROFILED.contains(&id) || OF_PROFILE.contains(&id) { with_default(arg) } else { arg.hide(true) }
    };
    grouped(Cli::command())
        .mut_subcommand("train", |train| train.mut_args(with_default))
        .mut_subcommand("import", |import| import.mut_args(with_default))
        .mut_subcommand("profile", |profile| profile.mut_subcommand("step", |step| step.mut_args(in_profile)))
}

/// Reads the command line.
///
/// # Errors
/// clap's, which may also be a help text. An unknown flag is answered with the nearest one, however far.
pub fn parse(args: &[std::ffi::OsString]) -> Result<Cli, clap::Error> {
    let mut command = command();
    let parsed = command.try_get_matches_from_mut(args).and_then(|matches| Cli::from_arg_matches(&matches));
    parsed.map_err(|mut error| {
        if error.kind() == ErrorKind::UnknownArgument
            && error.get(ContextKind::SuggestedArg).is_none()
            && let Some(ContextValue::String(unknown)) = error.get(ContextKind::InvalidArg)
            && unknown.starts_with("--")
            && let Some(flag) = nearest_flag(&command, args, unknown)
        {
            error.insert(ContextKind::SuggestedArg, ContextValue::String(flag));
        }
        error
    })
}

/// The flag most like `unknown` among those of the command that was typed.
fn nearest_flag(command: &clap::Command, args: &[std::ffi::OsString], unknown: &str) -> Option<String> {
    let mut typed = command;
    for arg in args.iter().skip(1).filter_map(|arg| arg.to_str()) {
        typed = typed.find_subcommand(arg).unwrap_or(typed);
    }
    let flags: Vec<&str> = typed.get_arguments().filter(|arg| !arg.is_hide_set()).filter_map(clap::Arg::get_long).collect();
    nearest(unknown.trim_start_matches('-'), &flags).map(|flag| format!("--{flag}"))
}
