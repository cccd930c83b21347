//! Models as others read and write them: PyTorch's names in safetensors files, and ONNX.
//!
//! Everything here works on a [`Network`], a small description of what is written, and on tensors under PyTorch's names and in its order.
//! [`describe`] is the only place that knows how a [`ModelConfig`] becomes one, and what of it each format cannot say.
//!
//! Both formats carry the same strings ([`About`]): a version, the model's configuration, what else the program needs to use the model again,
//! and checksums tensor by tensor, so that a damaged file is an error that names the tensor. Files of other origin have none of these: what
//! they hold is found by names ([`ModelFile::found`]).
//!
//! What must not be here: run folders, data, what the strings mean beyond their names.

mod onnx;
mod safetensors;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::StoreError;
use super::checkpoint::{Checksum, NamedTensor, le_bytes};
use super::storage::{Disk, Storage, write_atomic};
use crate::model::config::{Input, LstmConfig, ModelConfig, Output};
use crate::shape::GATES;

pub use onnx::{GateOrder, turn_gates};

/// Version of the strings and names written, in both formats; files of a later version are refused.
pub const FORMAT_VERSION: u32 = 1;
/// Begins the string `producer`.
const PRODUCER: &str = "carrousel";
/// The entry of the checksums that is about the strings; no tensor may have this name.
const OF_STRINGS: &str = "__metadata__";

/// The formats that are written and read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// PyTorch's names, shapes and orders.
    Safetensors,
    /// A graph that an ONNX run-time runs.
    Onnx,
}

/// How much of a model is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// Embedding, LSTM and head.
    #[default]
    All,
    /// The LSTM alone; in safetensors under the bare names of `torch.nn.LSTM`.
    Lstm,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Safetensors => "safetensors",
            Self::Onnx => "onnx",
        })
    }
}

/// Why a model could not be written, or a file not be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum InterchangeError {
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A tensor that is missing, damaged, of the wrong size or out of place.
    #[error("{}: tensor `{name}` {problem}", path.display())]
    Tensor { path: PathBuf, name: String, problem: String },
    /// Something else that a file says, by the name of its field.
    #[error("{}: {field} {problem}", path.display())]
    Field { path: PathBuf, field: String, problem: String },
    /// A file that is whole, but holds no model that can be read.
    #[error("{}: {problem}", path.display())]
    Foreign { path: PathBuf, problem: String },
    /// The format has no words for the model.
    #[error("{format} cannot hold this model: {reason}")]
    Refused { format: Format, reason: String },
    /// `torch.nn.LSTM` would compute something else from the tensors.
    #[error("torch.nn.LSTM cannot compute this model: {reason}; leave --part out to write all of its parameters")]
    BeyondTorch { reason: String },
}

impl InterchangeError {
    /// The error is about what the user asked for or handed in (exit code 2), not about something that broke.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Store(e) => e.is_usage() || matches!(e, StoreError::Truncated { .. } | StoreError::Damaged { .. }),
            _ => true,
        }
    }
}

/// What the functions of this folder return.
pub type Result<T> = std::result::Result<T, InterchangeError>;

/// One LSTM layer, all directions of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Columns that go in.
    pub inputs: usize,
    /// `H`, of each direction.
    pub hidden: usize,
    /// Columns that `weight_hr` projects h to (Sak et al. 2014); 0: none.
    pub projection: usize,
    pub bidirectional: bool,
    pub bias: bool,
    /// Has `weight_peephole` `[3, H]`, of the gates i, f, o.
    pub peephole: bool,
    /// Has `initial_h`, as wide as h, and `initial_c` `[H]`.
    pub learned_state: bool,
    /// The forget gate is one minus the input gate (ONNX's `input_forget`).
    pub coupled: bool,
    /// What goes in is added to what comes out.
    pub residual: bool,
}

impl Layer {
    /// A forward layer as PyTorch has it.
    pub const fn plain(inputs: usize, hidden: usize) -> Self {
        Self {
            inputs,
            hidden,
            projection: 0,
            bidirectional: false,
            bias: true,
            peephole: false,
            learned_state: false,
            coupled: false,
            residual: false,
        }
    }

    /// `D`.
    pub const fn n_directions(&self) -> usize {
        if self.bidirectional { 2 } else { 1 }
    }

    /// Columns of h: `H`, or what it is projected to.
    pub const fn state_width(&self) -> usize {
        if self.projection > 0 { self.projection } else { self.hidden }
    }

    /// Columns that come out, of all directions.
    pub const fn outputs(&self) -> usize {
        self.n_directions() * self.state_width()
    }

    /// Names and shapes of layer `l`, as PyTorch has them, of one direction.
    fn tensors(&self, l: usize, direction: usize) -> Vec<(String, Vec<usize>)> {
        let name = |what: &str| tensor_name(what, l, direction);
        let rows = GATES * self.hidden;
        let mut tensors = vec![(name("weight_ih"), vec![rows, self.inputs]), (name("weight_hh"), vec![rows, self.state_width()])];
        if self.bias {
            tensors.extend(["bias_ih", "bias_hh"].map(|what| (name(what), vec![rows])));
        }
        if self.projection > 0 {
            tensors.push((name("weight_hr"), vec![self.projection, self.hidden]));
        }
        if self.peephole {
            tensors.push((name("weight_peephole"), vec![3, self.hidden]));
        }
        if self.learned_state {
            tensors.push((name("initial_h"), vec![self.state_width()]));
            tensors.push((name("initial_c"), vec![self.hidden]));
        }
        tensors
    }
}

/// `lstm.weight_ih_l0_reverse` and the like.
fn tensor_name(what: &str, layer: usize, direction: usize) -> String {
    format!("{LSTM}{what}_l{layer}{}", if direction == 0 { "" } else { "_reverse" })
}

const LSTM: &str = "lstm.";
const EMBEDDING: &str = "embedding.weight";
const HEAD_WEIGHT: &str = "head.weight";
const HEAD_BIAS: &str = "head.bias";

/// What the writers know of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Network {
    pub input: Input,
    pub layers: Vec<Layer>,
    /// None: the last layer's outputs are the network's.
    pub head: Option<Output>,
    /// The head's weight is the embedding's.
    pub tied: bool,
    /// Further parameters, names and shapes, that only this program's own file carries.
    pub extra: Vec<(String, Vec<usize>)>,
    /// Why `torch.nn.LSTM` computes something else from these tensors, where it does.
    pub beyond_torch: Option<String>,
    /// Why ONNX's LSTM computes something else, where it does.
    pub beyond_onnx: Option<String>,
}

/// The network that a configuration stands for, with what each format cannot say of it. An option of the model gets its words here.
pub fn describe(config: &ModelConfig) -> Network {
    // Named one by one, so that a new option cannot be forgotten here.
    let &ModelConfig { input, output, n_layers, ref hidden, dropout: _, bias, tied, lstm } = config;
    let LstmConfig {
        proj_size: projection,
        layer_norm,
        bidirectional,
        residual,
        learned_state,
        peephole,
        coupled_gates,
        cell_clip,
        zoneout_h,
        zoneout_c,
        ..
    } = lstm;
    // These act in training only.
    let LstmConfig { recurrent_grad_clip: _, recurrent_dropout: _, weight_drop: _, .. } = lstm;
    let width = match input {
        Input::Tokens { width, .. } => width,
        Input::Values { n_features } => n_features,
    };
    let mut inputs = width;
    let mut layers = Vec::with_capacity(n_layers);
    for l in 0..n_layers {
        let layer = Layer {
            inputs,
            hidden: hidden.of(l),
            projection,
            bidirectional,
            bias,
            peephole,
            learned_state,
            coupled: coupled_gates,
            residual: config.is_residual(l),
        };
        inputs = layer.outputs();
        layers.push(layer);
    }
    let beyond = [
        (zoneout_h > 0.0 || zoneout_c > 0.0, "zoneout changes the recurrence, without training too"),
        (cell_clip > 0.0, "its clip of the cell state is none that the format has"),
        (layer_norm, "it normalises within the cell"),
    ];
    let unlike = layers.iter().any(|layer| layer.hidden != layers[0].hidden);
    let of_torch = [
        (unlike, "its layers have unlike numbers of hidden units"),
        (peephole, "its gates read the cell state by peepholes"),
        (coupled_gates, "its forget gate is one minus its input gate"),
        (residual, "it adds the inputs of layers to their outputs"),
        (learned_state, "its initial state is learnt"),
    ];
    let of_onnx = [(projection > 0, "its state is projected by `weight_hr`, which ONNX's LSTM does not do")];
    let beyond_both = first_that_holds(&beyond);
    let beyond_onnx = first_that_holds(&of_onnx).or_else(|| beyond_both.clone());
    let beyond_torch = first_that_holds(&of_torch).or(beyond_both);
    let mut network = Network { input, layers, head: Some(output), tied, extra: Vec::new(), beyond_torch, beyond_onnx };
    // A parameter that has no words above is carried along by its name, and never silently left out of what others compute.
    let named = network.tensors();
    let table = config.table();
    let further = table.tensors().iter().filter(|tensor| !named.iter().any(|(name, _)| *name == tensor.name));
    network.extra = further.map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect();
    if let Some((name, _)) = network.extra.first() {
        let reason = format!("it has no word for the parameter `{name}`");
        network.beyond_torch.get_or_insert(reason.clone());
        network.beyond_onnx.get_or_insert(reason);
    }
    network
}

fn first_that_holds(reasons: &[(bool, &str)]) -> Option<String> {
    reasons.iter().find(|(holds, _)| *holds).map(|(_, why)| (*why).to_owned())
}

impl Network {
    /// The LSTM alone, which reads numbers.
    pub fn lstm_only(&self) -> Self {
        let n_features = self.layers.first().map_or(0, |layer| layer.inputs);
        let extra = self.extra.iter().filter(|(name, _)| name.starts_with(LSTM)).cloned().collect();
        Self { input: Input::Values { n_features }, head: None, tied: false, extra, ..self.clone() }
    }

    /// Columns of the last layer's outputs.
    pub fn width(&self) -> usize {
        self.layers.last().map_or(0, Layer::outputs)
    }

    /// The head's `[outputs, columns]`, if there is one.
    fn head_shape(&self) -> Option<Vec<usize>> {
        self.head.map(|head| match head {
            Output::Classes { n_classes } | Output::Label { n_classes, .. } => vec![n_classes, self.width()],
            Output::Values { n_outputs, .. } => vec![n_outputs, self.width()],
            Output::Notes { n_notes } => vec![n_notes, self.width()],
            Output::Quantiles { n_values, levels, .. } => vec![n_values * levels.count(), self.width()],
        })
    }

    /// Names and shapes of all parameters in PyTorch's terms, in order of first use, further ones last; without `head.weight` where that is the embedding's.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = Vec::new();
        if let Input::Tokens { vocabulary, width } = self.input {
            tensors.push((EMBEDDING.to_owned(), vec![vocabulary, width]));
        }
        for (l, layer) in self.layers.iter().enumerate() {
            tensors.extend((0..layer.n_directions()).flat_map(|d| layer.tensors(l, d)));
        }
        if let Some(shape) = self.head_shape() {
            let bias = vec![shape[0]];
            if !self.tied {
                tensors.push((HEAD_WEIGHT.to_owned(), shape));
            }
            tensors.push((HEAD_BIAS.to_owned(), bias));
        }
        tensors.extend(self.extra.iter().cloned());
        tensors
    }
}

/// What a file says of itself beside tensors; each field is a string of the file's metadata.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct About {
    /// How much of the model the file holds.
    pub part: Part,
    /// The model, its run and its data, each in the form that the run folder has it in.
    pub model: String,
    pub config: String,
    pub data: String,
    /// For readers that have no use for the rest: how numbers of the data become numbers of the model, as JSON.
    pub scale: Option<String>,
    /// Step of the checkpoint.
    pub step: u64,
}

impl About {
    fn strings(&self) -> BTreeMap<String, String> {
        let mut strings = BTreeMap::from([
            ("producer".to_owned(), concat!("carrousel ", env!("CARGO_PKG_VERSION")).to_owned()),
            ("format_version".to_owned(), FORMAT_VERSION.to_string()),
            ("part".to_owned(), if self.part == Part::All { "all" } else { "lstm" }.to_owned()),
            ("model".to_owned(), self.model.clone()),
            ("config".to_owned(), self.config.clone()),
            ("data".to_owned(), self.data.clone()),
            ("step".to_owned(), self.step.to_string()),
        ]);
        strings.extend(self.scale.clone().map(|scale| ("scale".to_owned(), scale)));
        strings
    }

    /// Reads and verifies the strings of a file; `None` where another program wrote it.
    fn read(path: &Path, mut strings: BTreeMap<String, String>, tensors: &[NamedTensor]) -> Result<Option<Self>> {
        let field =
            |field: &str, problem: String| InterchangeError::Field { path: path.to_path_buf(), field: format!("`{field}`"), problem };
        // Either one is enough, so that damage to the other does not make a foreign file of ours.
        let has_sums = strings.get("sha256").is_some_and(|sums| sums.contains(OF_STRINGS));
        if !has_sums && !strings.get("producer").is_some_and(|producer| producer.starts_with(PRODUCER)) {
            return Ok(None);
        }
        let version = strings.get("format_version").cloned().unwrap_or_default();
        match version.parse::<u32>() {
            Ok(found) if found > FORMAT_VERSION => {
                return Err(StoreError::NewerFormat { path: path.to_path_buf(), found, supported: FORMAT_VERSION }.into());
            }
            Ok(1..) => {}
            _ => return Err(field("format_version", format!("is `{version}`, which is no version"))),
        }
        let sums = strings.remove("sha256").ok_or_else(|| field("sha256", "is missing".to_owned()))?;
        let sums: BTreeMap<String, String> = serde_json::from_str(&sums).map_err(|e| field("sha256", format!("is damaged: {e}")))?;
        for (name, found) in checksums(&strings, tensors) {
            match sums.get(&name) {
                Some(sum) if *sum == found => {}
                Some(_) if name == OF_STRINGS => return Err(field("metadata", "is damaged: its checksum does not fit".to_owned())),
                sum => {
                    let problem =
                        if sum.is_some() { "is damaged: its checksum does not fit" } else { "was not in the file when it was written" };
                    return Err(InterchangeError::Tensor { path: path.to_path_buf(), name, problem: problem.to_owned() });
                }
            }
        }
        let names: BTreeSet<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        if let Some(name) = sums.keys().find(|name| *name != OF_STRINGS && !names.contains(name.as_str())) {
            return Err(InterchangeError::Tensor { path: path.to_path_buf(), name: name.clone(), problem: "is missing".to_owned() });
        }
        let mut take = |name: &str| strings.remove(name).ok_or_else(|| field(name, "is missing".to_owned()));
        let part = match take("part")?.as_str() {
            "all" => Part::All,
            "lstm" => Part::Lstm,
            other => return Err(field("part", format!("is `{other}`, neither all nor lstm"))),
        };
        let step = take("step")?.parse().map_err(|_| field("step", "is no whole number".to_owned()))?;
        let about = Self { part, model: take("model")?, config: take("config")?, data: take("data")?, scale: None, step };
        Ok(Some(Self { scale: strings.remove("scale"), ..about }))
    }
}

/// SHA-256 of each tensor with its name and shape, and of all strings together.
fn checksums(strings: &BTreeMap<String, String>, tensors: &[NamedTensor]) -> BTreeMap<String, String> {
    let mut sums: BTreeMap<String, String> = tensors
        .iter()
        .map(|tensor| {
            let mut sum = Checksum::new(std::iter::empty());
            sum.tensor(&tensor.name, &tensor.shape, &le_bytes(&tensor.data));
            (tensor.name.clone(), sum.hex())
        })
        .collect();
    sums.insert(OF_STRINGS.to_owned(), Checksum::new(strings.iter().map(|(k, v)| (k.as_str(), v.as_str()))).hex());
    sums
}

/// The strings with the checksums of themselves and of the tensors that go into the file.
fn sealed(about: &About, tensors: &[NamedTensor]) -> BTreeMap<String, String> {
    let mut strings = about.strings();
    let sums = serde_json::json!(checksums(&strings, tensors));
    strings.insert("sha256".to_owned(), sums.to_string());
    strings
}

/// Writes a model to `path`, whole or not at all. `tensors` are those of [`Network::tensors`] in that order.
///
/// # Errors
/// The format has no words for the network; the file cannot be written.
pub fn write(path: &Path, format: Format, network: &Network, about: &About, tensors: &[NamedTensor]) -> Result<()> {
    let bytes = to_bytes(format, network, about, tensors)?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let no_name = || StoreError::FileName { name: path.display().to_string(), reason: "it must be the name of a file" };
    let name = path.file_name().and_then(OsStr::to_str).ok_or_else(no_name)?;
    if Disk.exists(dir).is_ok_and(|exists| !exists) {
        return Err(StoreError::NotFound { path: dir.to_path_buf() }.into());
    }
    Ok(write_atomic(&Disk, dir, name, &mut |file| file.write(&bytes))?)
}

/// The bytes that [`write()`] puts into a file; the same content gives the same bytes.
///
/// # Errors
/// The format has no words for the network; the tensors are not those of the network.
pub fn to_bytes(format: Format, network: &Network, about: &About, tensors: &[NamedTensor]) -> Result<Vec<u8>> {
    let network = if about.part == Part::Lstm { network.lstm_only() } else { network.clone() };
    let expected = network.tensors();
    let mut chosen: Vec<NamedTensor> = Vec::with_capacity(expected.len());
    for (name, shape) in expected {
        let tensor = tensors.iter().find(|tensor| tensor.name == name).ok_or_else(|| StoreError::TensorMissing { name: name.clone() })?;
        if tensor.shape != shape {
            return Err(StoreError::TensorShape { name, found: tensor.shape.clone(), expected: shape }.into());
        }
        chosen.push(tensor.clone());
    }
    match format {
        Format::Safetensors => safetensors::to_bytes(&network, about, chosen),
        Format::Onnx => onnx::to_bytes(&network, about, &chosen),
    }
}

/// A model as it was found in a file.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelFile {
    pub path: PathBuf,
    pub format: Format,
    /// What carrousel wrote about it; none in files of other origin.
    pub about: Option<About>,
    /// In PyTorch's terms, the LSTM's under `lstm.`, sorted by name.
    pub tensors: Vec<NamedTensor>,
    /// What an ONNX graph says of its layers beside tensors: none where nothing was said.
    pub coupled: bool,
}

/// Reads a model file of either format, told by its first bytes, and by its name where those say nothing.
///
/// # Errors
/// Not there, damaged, of a newer version; holds no LSTM, or one that is none of ours: with the tensor or the field.
pub fn read(path: &Path) -> Result<ModelFile> {
    if path.is_dir() {
        return Err(foreign(path, "this is a folder; a run's model is written by `carrousel export`, and that file imported"));
    }
    let bytes = Disk.read(path).map_err(|e| StoreError::io("read", path, e))?;
    from_bytes(&bytes, path, format_of(&bytes, path)?)
}

/// What a file is. A safetensors file begins with the length of its header in eight bytes, and the header is a JSON object; an ONNX model begins
/// with its field 1, `ir_version`.
fn format_of(bytes: &[u8], path: &Path) -> Result<Format> {
    const OLD_TORCH: &str = "a pickle, as torch.save wrote before version 1.6: in Python, load it and write `safetensors.torch.save_file(model.state_dict(), FILE)`";
    let others: [(&[u8], &str); 3] = [
        // A pickle of protocol 2 begins so.
        (b"\x80\x02", OLD_TORCH),
        (
            b"PK\x03\x04",
            "a zip archive, as torch.save and Keras write: in Python, write `safetensors.torch.save_file(model.state_dict(), FILE)`",
        ),
        (b"\x89HDF", "an HDF5 file, as Keras writes: export the model to ONNX"),
    ];
    if let Some((_, what)) = others.iter().find(|(start, _)| bytes.starts_with(start)) {
        return Err(foreign(path, format!("it is {what}, and import that")));
    }
    let is_named = |name: &str| path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(name));
    match bytes {
        [_, _, _, _, _, _, _, _, b'{', ..] => Ok(Format::Safetensors),
        [0x08, ..] => Ok(Format::Onnx),
        _ if is_named("onnx") => Ok(Format::Onnx),
        _ if is_named("safetensors") => Ok(Format::Safetensors),
        _ => Err(foreign(path, "this is neither a safetensors file nor an ONNX model, which are the two that can be imported")),
    }
}

/// As [`read`], of a file in memory; `path` is what errors name.
///
/// # Errors
/// As [`read`].
pub fn from_bytes(bytes: &[u8], path: &Path, format: Format) -> Result<ModelFile> {
    match format {
        Format::Safetensors => safetensors::from_bytes(bytes, path),
        Format::Onnx => onnx::from_bytes(bytes, path),
    }
}

/// What the tensors of a file tell of their network.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    pub layers: Vec<Layer>,
    /// Rows and columns.
    pub embedding: Option<(usize, usize)>,
    pub has_head: bool,
    /// The head's weight equals the embedding's, to the bit.
    pub tied: bool,
}

impl ModelFile {
    fn tensor(&self, name: &str) -> Option<&NamedTensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    fn wrong(&self, name: &str, problem: impl Into<String>) -> InterchangeError {
        InterchangeError::Tensor { path: self.path.clone(), name: name.to_owned(), problem: problem.into() }
    }

    /// Rows and columns of a matrix of four gates.
    fn gates(&self, name: &str) -> Result<(usize, usize)> {
        let tensor = self.tensor(name).ok_or_else(|| self.wrong(name, "is missing"))?;
        match tensor.shape[..] {
            [rows, columns] if rows > 0 && columns > 0 && rows % GATES == 0 => Ok((rows / GATES, columns)),
            _ => Err(self.wrong(name, format!("has shape {:?}, but a layer's is [4 x hidden units, columns]", tensor.shape))),
        }
    }

    /// The network that the tensors stand for.
    ///
    /// # Errors
    /// There is no LSTM in the file, or its layers do not fit together; named by the tensor.
    pub fn found(&self) -> Result<Found> {
        let n_layers = (0..).take_while(|&l| self.tensor(&tensor_name("weight_ih", l, 0)).is_some()).count();
        if n_layers == 0 {
            return Err(self.wrong(&tensor_name("weight_ih", 0, 0), "is missing: the file holds no LSTM layer"));
        }
        let mut layers: Vec<Layer> = Vec::new();
        for l in 0..n_layers {
            let name = tensor_name("weight_ih", l, 0);
            let (hidden, inputs) = self.gates(&name)?;
            if let Some(below) = layers.last().filter(|below| below.outputs() != inputs) {
                let outputs = below.outputs();
                return Err(self.wrong(&name, format!("reads {inputs} columns, but the layer below has {outputs}")));
            }
            let has = |what: &str, direction| self.tensor(&tensor_name(what, l, direction)).is_some();
            let projection = match self.tensor(&tensor_name("weight_hr", l, 0)).map(|tensor| &tensor.shape[..]) {
                None => 0,
                Some(&[columns, _]) if columns > 0 => columns,
                Some(shape) => {
                    let problem = format!("has shape {shape:?}, but a projection's is [columns, hidden units]");
                    return Err(self.wrong(&tensor_name("weight_hr", l, 0), problem));
                }
            };
            let layer = Layer {
                inputs,
                hidden,
                projection,
                bidirectional: has("weight_ih", 1),
                bias: has("bias_ih", 0),
                peephole: has("weight_peephole", 0),
                learned_state: has("initial_h", 0),
                coupled: self.coupled,
                residual: false,
            };
            for (name, shape) in (0..layer.n_directions()).flat_map(|d| layer.tensors(l, d)) {
                let tensor = self.tensor(&name).ok_or_else(|| self.wrong(&name, "is missing"))?;
                if tensor.shape != shape {
                    return Err(self.wrong(
                        &name,
                        format!("has shape {:?}, but with the other tensors of its layer it must be {shape:?}", tensor.shape),
                    ));
                }
            }
            layers.push(layer);
        }
        let embedding = match self.tensor(EMBEDDING) {
            None => None,
            Some(NamedTensor { shape, .. }) => match shape[..] {
                [rows, columns] => Some((rows, columns)),
                _ => return Err(self.wrong(EMBEDDING, format!("has shape {shape:?}, but an embedding has rows and columns"))),
            },
        };
        let bits = |tensor: &NamedTensor| tensor.data.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let head = self.tensor(HEAD_WEIGHT);
        let tied = match (self.tensor(EMBEDDING), head) {
            (Some(embedding), Some(head)) => embedding.shape == head.shape && bits(embedding) == bits(head),
            (Some(_), None) => self.tensor(HEAD_BIAS).is_some(),
            _ => false,
        };
        Ok(Found { layers, embedding, has_head: head.is_some() || tied, tied })
    }

    fn has_norm(&self, layer: usize) -> bool {
        self.tensor(&tensor_name("norm_c", layer, 0)).is_some()
    }

    /// The options of a training run that the tensors stand for, as keys and values of a configuration file.
    ///
    /// # Errors
    /// As [`Self::found`]; a network that this program does not have, by the tensor that shows it.
    pub fn options(&self) -> Result<String> {
        let found = self.found()?;
        let (first, n_layers) = (found.layers[0], found.layers.len());
        for (l, layer) in found.layers.iter().enumerate() {
            let refuse = |what: &str, direction, problem: &str| Err(self.wrong(&tensor_name(what, l, direction), problem));
            let unlike = [
                (layer.bidirectional != first.bidirectional, "weight_ih", "in having two directions"),
                (layer.peephole != first.peephole, "weight_hh", "in having peepholes"),
                (layer.learned_state != first.learned_state, "weight_hh", "in having a learnt initial state"),
                (layer.projection != first.projection, "weight_hh", "in its projection"),
                (self.has_norm(l) != self.has_norm(0), "weight_hh", "in having layer normalisation"),
            ];
            if let Some((_, what, how)) = unlike.iter().find(|(differs, ..)| *differs) {
                return refuse(what, 0, &format!("belongs to a layer that differs from the first one {how}; here all or none have"));
            }
            if layer.bias != first.bias {
                return refuse(
                    "weight_ih",
                    0,
                    "belongs to a layer that differs from the first one in having biases; here all or none have",
                );
            }
        }
        let hidden = if found.layers.iter().all(|layer| layer.hidden == first.hidden) {
            first.hidden.to_string()
        } else {
            format!("{:?}", found.layers.iter().map(|layer| layer.hidden).collect::<Vec<_>>())
        };
        let mut options = format!("layers = {n_layers}\nhidden = {hidden}\nno_bias = {}\n", !first.bias);
        if first.projection > 0 {
            options.push_str(&format!("proj_size = {}\n", first.projection));
        }
        for (key, is_set) in [
            ("bidirectional", first.bidirectional),
            ("peephole", first.peephole),
            ("learned_state", first.learned_state),
            ("coupled_gates", first.coupled),
            ("layer_norm", self.has_norm(0)),
        ] {
            if is_set {
                options.push_str(&format!("{key} = true\n"));
            }
        }
        if let Some((_, width)) = found.embedding {
            options.push_str(&format!("embedding = {width}\ntied = {}\n", found.tied));
        }
        Ok(options)
    }

    /// The parameters of `network`, in the order of [`Network::tensors`]. Where the file has no embedding or no head at all, `fresh` gives them,
    /// and their names come back beside.
    ///
    /// # Errors
    /// A tensor is missing, has another shape, is not finite, or has no place in the network.
    pub fn into_parameters(mut self, network: &Network, fresh: &[NamedTensor]) -> Result<(Vec<NamedTensor>, Vec<String>)> {
        let lacks = |group: &str| !self.tensors.iter().any(|tensor| tensor.name.starts_with(group));
        let absent: Vec<&str> = ["embedding.", "head."].into_iter().filter(|group| lacks(group)).collect();
        if let (true, Some(at)) = (network.tied, self.tensors.iter().position(|tensor| tensor.name == HEAD_WEIGHT)) {
            if !self.found()?.tied {
                return Err(self.wrong(HEAD_WEIGHT, format!("is not equal to {EMBEDDING}, so that --tied cannot hold")));
            }
            self.tensors.remove(at);
        }
        let (mut params, mut started) = (Vec::new(), Vec::new());
        for (name, shape) in network.tensors() {
            let Some(at) = self.tensors.iter().position(|tensor| tensor.name == name) else {
                let start = fresh.iter().find(|tensor| tensor.name == name && tensor.shape == shape);
                let Some(start) = start.filter(|_| absent.iter().any(|group| name.starts_with(group))) else {
                    return Err(self.wrong(&name, format!("of shape {shape:?} is missing")));
                };
                started.push(name);
                params.push(start.clone());
                continue;
            };
            let found = &self.tensors[at];
            if found.shape != shape {
                return Err(self.wrong(&name, format!("has shape {:?}, but data and options ask for {shape:?}", found.shape)));
            }
            if let Some(value) = found.data.iter().find(|value| !value.is_finite()) {
                return Err(self.wrong(&name, format!("holds {value}, which is no finite number")));
            }
            params.push(self.tensors.remove(at));
        }
        match self.tensors.first() {
            Some(left) => {
                Err(self.wrong(&left.name, format!("of shape {:?} has no place in the model: rename it or take it out", left.shape)))
            }
            None => Ok((params, started)),
        }
    }
}

/// A file that is whole, but holds no model that can be read.
fn foreign(path: &Path, problem: impl Into<String>) -> InterchangeError {
    InterchangeError::Foreign { path: path.to_path_buf(), problem: problem.into() }
}
