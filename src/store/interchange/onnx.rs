//! ONNX: a graph that an ONNX run-time runs, and the LSTM of a graph that others wrote.
//!
//! | input | type | shape | |
//! | --- | --- | --- | --- |
//! | `input` | int64 or float | `[time, batch]` tokens, or `[time, batch, I]` numbers | |
//! | `lengths` | int32 | `[batch]` | may be left out: all rows are as long as the input |
//! | `h_0`, `c_0` | float | `[L * D, batch, H]` | may be left out: zero, or the state that was learnt |
//!
//! | output | shape | |
//! | --- | --- | --- |
//! | `output` | `[time, batch, classes]` or `[batch, outputs]` | of each step, or after the last one (of each row, where lengths are given) |
//! | `h_n`, `c_n` | `[L * D, batch, H]` | the last state of each row |
//!
//! Where layers differ in width, each has its own `h_0_l0`, `c_0_l0`, `h_n_l0`, ... of shape `[D, batch, H]`.
//! An input that may be left out has a default of one row, which the graph expands to the batch; hence its second axis is named `batch_or_1`.
//!
//! ONNX stacks the directions and both biases, and orders the gates i, o, f, c; [`turn_gates`] is the only place that turns them.
//! The protobuf messages are those of `onnx.proto`, cut down to the fields that are written or read.
//! What must not be here: what the model's options are; they come as [`Network`] or not at all.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use prost::Message;

use super::super::checkpoint::{NamedTensor, le_bytes};
use super::{
    About, EMBEDDING, Format, HEAD_BIAS, HEAD_WEIGHT, InterchangeError, Layer, ModelFile, Network, Result, foreign, sealed, tensor_name,
};
use crate::model::config::{Input, Output, Pooling};
use crate::shape::GATES;

/// Both from 2021; run-times of that time and later read them.
const IR_VERSION: i64 = 7;
const OPSET: i64 = 14;
/// Protobuf's own limit.
const MAX_BYTES: usize = i32::MAX as usize;

/// Which way gates are turned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateOrder {
    /// From PyTorch's i, f, g, o to ONNX's i, o, f, c (c is g by another name).
    TorchToOnnx,
    /// Back.
    OnnxToTorch,
}

/// Turns the gates of a matrix or a bias of four gates, each of `gate` values that follow each other (`hidden * columns`).
///
/// # Panics
/// If `values` are not four gates.
pub fn turn_gates(values: &[f32], gate: usize, order: GateOrder) -> Vec<f32> {
    assert_eq!(values.len(), GATES * gate, "four gates of {gate} values");
    // Which gate of the source stands at each place of the result.
    let from = match order {
        GateOrder::TorchToOnnx => [0, 3, 1, 2],
        GateOrder::OnnxToTorch => [0, 2, 3, 1],
    };
    from.iter().flat_map(|&g| &values[g * gate..(g + 1) * gate]).copied().collect()
}

/// Turns three peephole vectors between the order i, f, o and ONNX's i, o, f; the same both ways.
fn turn_peepholes(values: &[f32]) -> Vec<f32> {
    let hidden = values.len() / 3;
    [0, 2, 1].iter().flat_map(|&g| &values[g * hidden..(g + 1) * hidden]).copied().collect()
}

/// The messages, by the numbers of `onnx.proto`.
mod proto {
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Model {
        #[prost(int64, tag = "1")]
        pub ir_version: i64,
        #[prost(string, tag = "2")]
        pub producer_name: String,
        #[prost(string, tag = "3")]
        pub producer_version: String,
        #[prost(int64, tag = "5")]
        pub model_version: i64,
        #[prost(string, tag = "6")]
        pub doc_string: String,
        #[prost(message, optional, tag = "7")]
        pub graph: Option<Graph>,
        #[prost(message, repeated, tag = "8")]
        pub opset_import: Vec<Opset>,
        #[prost(message, repeated, tag = "14")]
        pub metadata_props: Vec<Entry>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Opset {
        #[prost(string, tag = "1")]
        pub domain: String,
        #[prost(int64, tag = "2")]
        pub version: i64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Entry {
        #[prost(string, tag = "1")]
        pub key: String,
        #[prost(string, tag = "2")]
        pub value: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Graph {
        #[prost(message, repeated, tag = "1")]
        pub node: Vec<Node>,
        #[prost(string, tag = "2")]
        pub name: String,
        #[prost(message, repeated, tag = "5")]
        pub initializer: Vec<Tensor>,
        #[prost(message, repeated, tag = "11")]
        pub input: Vec<ValueInfo>,
        #[prost(message, repeated, tag = "12")]
        pub output: Vec<ValueInfo>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Node {
        #[prost(string, repeated, tag = "1")]
        pub input: Vec<String>,
        #[prost(string, repeated, tag = "2")]
        pub output: Vec<String>,
        #[prost(string, tag = "3")]
        pub name: String,
        #[prost(string, tag = "4")]
        pub op_type: String,
        #[prost(message, repeated, tag = "5")]
        pub attribute: Vec<Attribute>,
        #[prost(string, tag = "7")]
        pub domain: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Attribute {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(float, tag = "2")]
        pub f: f32,
        #[prost(int64, tag = "3")]
        pub i: i64,
        #[prost(bytes = "vec", tag = "4")]
        pub s: Vec<u8>,
        #[prost(message, optional, tag = "5")]
        pub t: Option<Tensor>,
        #[prost(int64, repeated, tag = "8")]
        pub ints: Vec<i64>,
        #[prost(bytes = "vec", repeated, tag = "9")]
        pub strings: Vec<Vec<u8>>,
        #[prost(int32, tag = "20")]
        pub kind: i32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Tensor {
        #[prost(int64, repeated, tag = "1")]
        pub dims: Vec<i64>,
        #[prost(int32, tag = "2")]
        pub data_type: i32,
        #[prost(float, repeated, tag = "4")]
        pub float_data: Vec<f32>,
        #[prost(string, tag = "8")]
        pub name: String,
        #[prost(bytes = "vec", tag = "9")]
        pub raw_data: Vec<u8>,
        #[prost(int32, tag = "14")]
        pub data_location: i32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ValueInfo {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(message, optional, tag = "2")]
        pub r#type: Option<Type>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Type {
        #[prost(message, optional, tag = "1")]
        pub tensor_type: Option<TensorType>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct TensorType {
        #[prost(int32, tag = "1")]
        pub elem_type: i32,
        #[prost(message, optional, tag = "2")]
        pub shape: Option<Shape>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Shape {
        #[prost(message, repeated, tag = "1")]
        pub dim: Vec<Dimension>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Dimension {
        #[prost(oneof = "Size", tags = "1, 2")]
        pub size: Option<Size>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Size {
        #[prost(int64, tag = "1")]
        Value(i64),
        #[prost(string, tag = "2")]
        Param(String),
    }

    pub const FLOAT: i32 = 1;
    pub const INT32: i32 = 6;
    pub const INT64: i32 = 7;
    pub const OF_INT: i32 = 2;
    pub const OF_STRING: i32 = 3;
    pub const OF_TENSOR: i32 = 4;
    pub const OF_INTS: i32 = 7;
    pub const EXTERNAL: i32 = 1;
}

use proto::{Attribute, Dimension, Entry, Graph, Model, Node, Opset, Shape, Size, Tensor, TensorType, Type, ValueInfo};

/// An axis of an input or output: fixed or named.
#[derive(Clone, Copy)]
enum Axis {
    Of(usize),
    Time,
    Batch,
    /// As many as the batch, or one for all.
    BatchOrOne,
}

/// A graph in the making.
#[derive(Default)]
struct Builder {
    graph: Graph,
}

impl Builder {
    fn floats(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        self.constant(name, shape, proto::FLOAT, le_bytes(values).into_owned());
    }

    /// A constant of whole numbers, one axis.
    fn ints(&mut self, name: &str, values: &[usize]) -> String {
        self.constant(name, &[values.len()], proto::INT64, values.iter().flat_map(|&value| (value as i64).to_le_bytes()).collect());
        name.to_owned()
    }

    fn constant(&mut self, name: &str, shape: &[usize], data_type: i32, raw_data: Vec<u8>) {
        let dims = shape.iter().map(|&n| n as i64).collect();
        self.graph.initializer.push(Tensor { dims, data_type, name: name.to_owned(), raw_data, ..Tensor::default() });
    }

    fn node(&mut self, op: &str, inputs: &[&str], outputs: &[&str], attribute: Vec<Attribute>) {
        let strings = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let name = format!("{op}_{}", self.graph.node.len());
        self.graph.node.push(Node {
            input: strings(inputs),
            output: strings(outputs),
            name,
            op_type: op.to_owned(),
            attribute,
            domain: String::new(),
        });
    }

    fn value(name: &str, elem_type: i32, axes: &[Axis]) -> ValueInfo {
        let dim = |axis: &Axis| match axis {
            Axis::Of(n) => Size::Value(*n as i64),
            Axis::Time => Size::Param("time".to_owned()),
            Axis::Batch => Size::Param("batch".to_owned()),
            Axis::BatchOrOne => Size::Param("batch_or_1".to_owned()),
        };
        let shape = Shape { dim: axes.iter().map(|axis| Dimension { size: Some(dim(axis)) }).collect() };
        ValueInfo { name: name.to_owned(), r#type: Some(Type { tensor_type: Some(TensorType { elem_type, shape: Some(shape) }) }) }
    }

    fn input(&mut self, name: &str, elem_type: i32, axes: &[Axis]) {
        self.graph.input.push(Self::value(name, elem_type, axes));
    }

    fn output(&mut self, name: &str, axes: &[Axis]) {
        self.graph.output.push(Self::value(name, proto::FLOAT, axes));
    }
}

fn int(name: &str, i: usize) -> Attribute {
    Attribute { name: name.to_owned(), i: i as i64, kind: proto::OF_INT, ..Attribute::default() }
}

fn ints(name: &str, values: &[i64]) -> Attribute {
    Attribute { name: name.to_owned(), ints: values.to_vec(), kind: proto::OF_INTS, ..Attribute::default() }
}

fn string(name: &str, s: &str) -> Attribute {
    Attribute { name: name.to_owned(), s: s.as_bytes().to_vec(), kind: proto::OF_STRING, ..Attribute::default() }
}

/// The bytes of a model file; `tensors` are those of [`Network::tensors`].
pub(super) fn to_bytes(network: &Network, about: &About, tensors: &[NamedTensor]) -> Result<Vec<u8>> {
    let refuse = |reason: String| Err(InterchangeError::Refused { format: Format::Onnx, reason });
    if let Some(reason) = &network.beyond_onnx {
        return refuse(reason.clone());
    }
    if let Some(l) = network.layers.iter().position(|layer| layer.projection > 0) {
        return refuse(format!("ONNX's LSTM does not project its state, as `{}` does", tensor_name("weight_hr", l, 0)));
    }
    let floats: usize = tensors.iter().map(|tensor| tensor.data.len()).sum();
    let strings = sealed(about, tensors);
    let model = Model {
        ir_version: IR_VERSION,
        producer_name: super::PRODUCER.to_owned(),
        producer_version: env!("CARGO_PKG_VERSION").to_owned(),
        model_version: about.step as i64,
        doc_string: doc(network, about),
        graph: Some(graph(network, tensors)),
        opset_import: vec![Opset { domain: String::new(), version: OPSET }],
        metadata_props: strings.into_iter().map(|(key, value)| Entry { key, value }).collect(),
    };
    let n_bytes = model.encoded_len();
    if n_bytes > MAX_BYTES {
        return refuse(format!(
            "its {floats} parameters make a file of {n_bytes} bytes, but a protobuf has at most {MAX_BYTES}; use safetensors"
        ));
    }
    Ok(model.encode_to_vec())
}

fn doc(network: &Network, about: &About) -> String {
    let input = match network.input {
        Input::Tokens { .. } => "input: tokens [time, batch]",
        Input::Values { .. } => "input: numbers [time, batch, I]",
    };
    let scale = if about.scale.is_some() {
        "; inputs and outputs are on the normalised scale, which metadata_props['scale'] tells as JSON: the graph does not normalise"
    } else {
        ""
    };
    format!("{input}; optional: lengths [batch], h_0 and c_0 [L * D, batch, H]{scale}")
}

/// Tensors by name; the caller has checked that all are there.
struct Params<'a>(HashMap<&'a str, &'a NamedTensor>);

impl Params<'_> {
    fn values(&self, name: &str) -> &[f32] {
        self.0.get(name).map_or(&[], |tensor| tensor.data.as_slice())
    }
}

fn graph(network: &Network, tensors: &[NamedTensor]) -> Graph {
    let params = Params(tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect());
    let mut b = Builder { graph: Graph { name: "carrousel".to_owned(), ..Graph::default() } };

    // Sizes of this call.
    let mut x = "input".to_owned();
    match network.input {
        Input::Tokens { .. } => b.input("input", proto::INT64, &[Axis::Time, Axis::Batch]),
        Input::Values { n_features } => b.input("input", proto::FLOAT, &[Axis::Time, Axis::Batch, Axis::Of(n_features)]),
    }
    let (zero, one) = (b.ints("const.0", &[0]), b.ints("const.1", &[1]));
    b.node("Shape", &["input"], &["shape"], vec![]);
    b.node("Gather", &["shape", &zero], &["n_steps.int64"], vec![]);
    b.node("Gather", &["shape", &one], &["n_rows"], vec![]);
    b.node("Cast", &["n_steps.int64"], &["n_steps"], vec![int("to", proto::INT32 as usize)]);

    // Lengths: the default is longer than any input.
    b.input("lengths", proto::INT32, &[Axis::BatchOrOne]);
    b.constant("lengths", &[1], proto::INT32, i32::MAX.to_le_bytes().to_vec());
    b.node("Min", &["lengths", "n_steps"], &["lengths.cut"], vec![]);
    b.node("Expand", &["lengths.cut", "n_rows"], &["lengths.of_rows"], vec![]);

    let layers = &network.layers;
    let alike = layers.windows(2).all(|pair| pair[0].outputs() == pair[1].outputs() && pair[0].bidirectional == pair[1].bidirectional);
    for which in ["h", "c"] {
        initial_state(&mut b, &params, which, layers, alike);
    }

    if let Input::Tokens { vocabulary, width } = network.input {
        b.floats(EMBEDDING, &[vocabulary, width], params.values(EMBEDDING));
        b.node("Gather", &[EMBEDDING, "input"], &["embedded"], vec![]);
        x = "embedded".to_owned();
    }
    for (l, layer) in layers.iter().enumerate() {
        let is_last = l + 1 == layers.len();
        let out = if is_last && network.head.is_none() { "output".to_owned() } else { format!("lstm.l{l}.output") };
        if layer.residual {
            // Behind a row's end both are zero.
            let plain = format!("lstm.l{l}.plain");
            lstm(&mut b, &params, l, layer, [&x, &plain]);
            b.node("Add", &[&plain, &x], &[&out], vec![]);
        } else {
            lstm(&mut b, &params, l, layer, [&x, &out]);
        }
        x = out;
    }
    let (last, width) = (layers.len().saturating_sub(1), network.width());
    match network.head {
        None => b.output("output", &[Axis::Time, Axis::Batch, Axis::Of(width)]),
        Some(Output::Classes { n_classes } | Output::Notes { n_notes: n_classes }) => {
            head(&mut b, network, &params, n_classes, &x);
            b.output("output", &[Axis::Time, Axis::Batch, Axis::Of(n_classes)]);
        }
        Some(output @ (Output::Label { pooling, .. } | Output::Values { pooling, .. } | Output::Quantiles { pooling, .. })) => {
            let n_outputs = match output {
                Output::Quantiles { n_values, levels, .. } => n_values * levels.count(),
                Output::Label { n_classes: n, .. } | Output::Values { n_outputs: n, .. } | Output::Classes { n_classes: n } => n,
                Output::Notes { n_notes } => n_notes,
            };
            let read = match pooling {
                // More than the state comes out of a residual layer: what stands at each row's own end, in reverse at its first step.
                Pooling::Last if layers[last].residual => {
                    b.node("Sub", &["lengths.of_rows", "const.int32.1"], &["lengths.last"], vec![]);
                    let at_end = last_steps(&mut b, "lengths.last");
                    b.node("Mul", &[&x, &at_end], &["ends"], vec![]);
                    b.node("ReduceSum", &["ends", &zero], &["at_end"], vec![int("keepdims", 0)]);
                    if layers[last].bidirectional {
                        let halves = b.ints("const.halves", &[width / 2; 2]);
                        b.node("Gather", &[&x, "const.scalar.0"], &["at_start"], vec![int("axis", 0)]);
                        b.node("Split", &["at_end", &halves], &["forward.last", "forward.unread"], vec![int("axis", 1)]);
                        b.node("Split", &["at_start", &halves], &["reverse.unread", "reverse.last"], vec![int("axis", 1)]);
                        b.node("Concat", &["forward.last", "reverse.last"], &["last"], vec![int("axis", 1)]);
                        "last"
                    } else {
                        "at_end"
                    }
                }
                Pooling::Last => {
                    // [D, B, H] -> [B, D * H]
                    let flat = b.ints("const.rows_flat", &[0, width]);
                    b.node("Transpose", &[&format!("lstm.l{last}.h_n")], &["last.by_row"], vec![ints("perm", &[1, 0, 2])]);
                    b.node("Reshape", &["last.by_row", &flat], &["last"], vec![]);
                    "last"
                }
                Pooling::Mean => {
                    // Behind a row's end the LSTM gives zeros.
                    let column = b.ints("const.column", &[0, 1]);
                    b.node("ReduceSum", &[&x, &zero], &["sum"], vec![int("keepdims", 0)]);
                    b.node("Cast", &["lengths.of_rows"], &["lengths.float"], vec![int("to", proto::FLOAT as usize)]);
                    b.node("Reshape", &["lengths.float", &column], &["lengths.column"], vec![]);
                    b.node("Div", &["sum", "lengths.column"], &["mean"], vec![]);
                    "mean"
                }
            };
            head(&mut b, network, &params, n_outputs, read);
            b.output("output", &[Axis::Batch, Axis::Of(n_outputs)]);
        }
    }
    for which in ["h", "c"] {
        final_state(&mut b, which, layers, alike);
    }
    b.graph
}

/// 1 where a step has the row's number, else 0: `[T, B, 1]`.
fn last_steps(b: &mut Builder, of_rows: &str) -> String {
    let (scalar, axis) = (b.ints("const.scalar", &[]), b.ints("const.2", &[2]));
    for (name, value) in [("const.scalar.0", 0_i64), ("const.scalar.1", 1)] {
        b.constant(name, &[], proto::INT64, value.to_le_bytes().to_vec());
    }
    b.constant("const.int32.1", &[1], proto::INT32, 1_i32.to_le_bytes().to_vec());
    b.node("Reshape", &["n_steps.int64", &scalar], &["n_steps.scalar"], vec![]);
    b.node("Range", &["const.scalar.0", "n_steps.scalar", "const.scalar.1"], &["steps.int64"], vec![]);
    b.node("Cast", &["steps.int64"], &["steps.flat"], vec![int("to", proto::INT32 as usize)]);
    b.node("Unsqueeze", &["steps.flat", "const.1"], &["steps"], vec![]);
    b.node("Equal", &["steps", of_rows], &["steps.are_last"], vec![]);
    b.node("Cast", &["steps.are_last"], &["steps.last"], vec![int("to", proto::FLOAT as usize)]);
    b.node("Unsqueeze", &["steps.last", &axis], &["steps.mask"], vec![]);
    "steps.mask".to_owned()
}

/// Declares the initial state and cuts it into the layers', each `lstm.l{l}.{which}_0` `[D, B, H]`.
fn initial_state(b: &mut Builder, params: &Params, which: &str, layers: &[Layer], alike: bool) {
    let mut declare = |name: &str, lanes: &[(usize, usize)], hidden: usize, outputs: &[String]| {
        let n = lanes.len();
        b.input(name, proto::FLOAT, &[Axis::Of(n), Axis::BatchOrOne, Axis::Of(hidden)]);
        let learned = lanes.iter().flat_map(|&(l, direction)| params.values(&tensor_name(&format!("initial_{which}"), l, direction)));
        let learned: Vec<f32> = learned.copied().collect();
        b.floats(name, &[n, 1, hidden], &if learned.is_empty() { vec![0.0; n * hidden] } else { learned });
        let (n_axis, h_axis) = (b.ints(&format!("{name}.n"), &[n]), b.ints(&format!("{name}.hidden"), &[hidden]));
        b.node("Concat", &[&n_axis, "n_rows", &h_axis], &[&format!("{name}.shape")], vec![int("axis", 0)]);
        let expanded = if let [output] = outputs { output.clone() } else { format!("{name}.of_rows") };
        b.node("Expand", &[name, &format!("{name}.shape")], &[&expanded], vec![]);
        if outputs.len() > 1 {
            let sizes = b.ints(&format!("{name}.sizes"), &vec![n / outputs.len(); outputs.len()]);
            let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
            b.node("Split", &[&expanded, &sizes], &outputs, vec![int("axis", 0)]);
        }
    };
    let lanes = |l: usize| (0..layers[l].n_directions()).map(|direction| (l, direction)).collect::<Vec<_>>();
    let parts: Vec<String> = (0..layers.len()).map(|l| format!("lstm.l{l}.{which}_0")).collect();
    match layers.first() {
        Some(first) if alike => {
            declare(&format!("{which}_0"), &(0..layers.len()).flat_map(&lanes).collect::<Vec<_>>(), first.hidden, &parts)
        }
        _ => {
            for (l, (layer, part)) in layers.iter().zip(parts).enumerate() {
                declare(&format!("{which}_0_l{l}"), &lanes(l), layer.hidden, &[part]);
            }
        }
    }
}

/// Puts the layers' final states together, or hands each out where they differ in size.
fn final_state(b: &mut Builder, which: &str, layers: &[Layer], alike: bool) {
    let parts: Vec<String> = (0..layers.len()).map(|l| format!("lstm.l{l}.{which}_n")).collect();
    match layers.first() {
        Some(first) if alike => {
            let name = format!("{which}_n");
            let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            b.node("Concat", &parts, &[&name], vec![int("axis", 0)]);
            b.output(&name, &[Axis::Of(layers.len() * first.n_directions()), Axis::Batch, Axis::Of(first.hidden)]);
        }
        _ => {
            for (l, (layer, part)) in layers.iter().zip(parts).enumerate() {
                let name = format!("{which}_n_l{l}");
                b.node("Identity", &[&part], &[&name], vec![]);
                b.output(&name, &[Axis::Of(layer.n_directions()), Axis::Batch, Axis::Of(layer.hidden)]);
            }
        }
    }
}

/// One LSTM node from `[T, B, I]` to `[T, B, D * H]`; final states are `lstm.l{l}.h_n`, `lstm.l{l}.c_n`.
fn lstm(b: &mut Builder, params: &Params, l: usize, layer: &Layer, [x, out]: [&str; 2]) {
    let (n_directions, hidden) = (layer.n_directions(), layer.hidden);
    let directions = 0..n_directions;
    let turned = |what: &str, direction: usize| {
        let values = params.values(&tensor_name(what, l, direction));
        turn_gates(values, values.len() / GATES, GateOrder::TorchToOnnx)
    };
    let [w, r, biases, peepholes] = ["W", "R", "B", "P"].map(|what| format!("lstm.l{l}.{what}"));
    let all = |what: &str| directions.clone().flat_map(|d| turned(what, d)).collect::<Vec<_>>();
    b.floats(&w, &[n_directions, GATES * hidden, layer.inputs], &all("weight_ih"));
    b.floats(&r, &[n_directions, GATES * hidden, hidden], &all("weight_hh"));
    let (h_0, c_0) = (format!("lstm.l{l}.h_0"), format!("lstm.l{l}.c_0"));
    let mut inputs = vec![x, &w, &r, "", "lengths.of_rows", &h_0, &c_0];
    if layer.bias {
        let values: Vec<f32> = directions.clone().flat_map(|d| [turned("bias_ih", d), turned("bias_hh", d)].concat()).collect();
        b.floats(&biases, &[n_directions, 2 * GATES * hidden], &values);
        inputs[3] = &biases;
    }
    if layer.peephole {
        let values: Vec<f32> = directions.flat_map(|d| turn_peepholes(params.values(&tensor_name("weight_peephole", l, d)))).collect();
        b.floats(&peepholes, &[n_directions, 3 * hidden], &values);
        inputs.push(&peepholes);
    }
    let mut attributes =
        vec![int("hidden_size", hidden), string("direction", if layer.bidirectional { "bidirectional" } else { "forward" })];
    if layer.coupled {
        attributes.push(int("input_forget", 1));
    }
    let y = format!("lstm.l{l}.Y");
    b.node("LSTM", &inputs, &[&y, &format!("lstm.l{l}.h_n"), &format!("lstm.l{l}.c_n")], attributes);
    // [T, D, B, H] -> [T, B, D * H]
    let (by_row, shape) = (format!("{y}.by_row"), b.ints(&format!("{y}.shape"), &[0, 0, layer.outputs()]));
    b.node("Transpose", &[&y], &[&by_row], vec![ints("perm", &[0, 2, 1, 3])]);
    b.node("Reshape", &[&by_row, &shape], &[out], vec![]);
}

/// The linear layer at the end, `[.., width]` to `[.., n]`.
fn head(b: &mut Builder, network: &Network, params: &Params, n: usize, x: &str) {
    let weight = if network.tied { EMBEDDING } else { HEAD_WEIGHT };
    if !network.tied {
        b.floats(HEAD_WEIGHT, &[n, network.width()], params.values(HEAD_WEIGHT));
    }
    b.floats(HEAD_BIAS, &[n], params.values(HEAD_BIAS));
    b.node("Transpose", &[weight], &["head.weight.turned"], vec![ints("perm", &[1, 0])]);
    b.node("MatMul", &[x, "head.weight.turned"], &["head.product"], vec![]);
    b.node("Add", &["head.product", HEAD_BIAS], &["output"], vec![]);
}

/// Constants of a graph by name: initializers, and nodes that say nothing but a tensor.
struct Constants<'a> {
    path: &'a Path,
    tensors: HashMap<&'a str, &'a Tensor>,
}

impl Constants<'_> {
    fn wrong(&self, name: &str, problem: impl Into<String>) -> InterchangeError {
        InterchangeError::Tensor { path: self.path.to_path_buf(), name: name.to_owned(), problem: problem.into() }
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Shape and values of a tensor of floats.
    fn floats(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        let tensor =
            self.tensors.get(name).ok_or_else(|| self.wrong(name, "is computed by the graph, not stored: only stored weights are read"))?;
        if tensor.data_location == proto::EXTERNAL {
            return Err(self.wrong(name, "lies in another file: store all data in the model file"));
        }
        if tensor.data_type != proto::FLOAT {
            return Err(self.wrong(name, format!("has ONNX's data type {}, only float (1) is read", tensor.data_type)));
        }
        let shape: Option<Vec<usize>> = tensor.dims.iter().map(|&n| usize::try_from(n).ok()).collect();
        let shape = shape.ok_or_else(|| self.wrong(name, format!("has the impossible shape {:?}", tensor.dims)))?;
        let values: Vec<f32> = if tensor.raw_data.is_empty() {
            tensor.float_data.clone()
        } else {
            let (values, rest) = tensor.raw_data.as_chunks();
            if !rest.is_empty() {
                return Err(self.wrong(name, format!("has {} bytes, which are no whole floats", tensor.raw_data.len())));
            }
            values.iter().map(|&value| f32::from_le_bytes(value)).collect()
        };
        let len = shape.iter().try_fold(1_usize, |len, &n| len.checked_mul(n));
        if len != Some(values.len()) {
            return Err(self.wrong(name, format!("of shape {shape:?} has {} values", values.len())));
        }
        Ok((shape, values))
    }

    /// Values of a tensor that must have this shape.
    fn shaped(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>> {
        let (shape, values) = self.floats(name)?;
        if shape == expected { Ok(values) } else { Err(self.wrong(name, format!("has shape {shape:?}, but its node needs {expected:?}"))) }
    }
}

pub(super) fn from_bytes(bytes: &[u8], path: &Path) -> Result<ModelFile> {
    let model = Model::decode(bytes).map_err(|e| foreign(path, format!("this is no ONNX model, or a damaged one: {e}")))?;
    let graph = model.graph.as_ref().ok_or_else(|| foreign(path, "this is no ONNX model, or a damaged one: it has no `graph`"))?;
    let of_nodes = graph.node.iter().filter(|node| node.op_type == "Constant").filter_map(|node| {
        let tensor = node.attribute.iter().find(|a| a.name == "value" && a.kind == proto::OF_TENSOR)?.t.as_ref()?;
        Some((node.output.first()?.as_str(), tensor))
    });
    let tensors = graph.initializer.iter().map(|tensor| (tensor.name.as_str(), tensor)).chain(of_nodes).collect();
    let constants = Constants { path, tensors };

    let nodes: Vec<&Node> = graph.node.iter().filter(|node| node.op_type == "LSTM").collect();
    if nodes.is_empty() {
        return Err(foreign(path, "the graph holds no `LSTM` node"));
    }
    let is_own = model.producer_name == super::PRODUCER;
    if !is_own {
        check_stack(path, graph, &nodes)?;
    }
    let mut tensors = Vec::new();
    let mut coupled = None;
    for (l, node) in nodes.into_iter().enumerate() {
        let is_coupled = read_lstm(&constants, l, node, &mut tensors)?;
        if !is_own {
            read_initial_state(&constants, l, node, &mut tensors)?;
        }
        if *coupled.get_or_insert(is_coupled) != is_coupled {
            return Err(attribute(path, node, "input_forget", "differs from that of the first LSTM; all layers have the same"));
        }
    }
    for name in [EMBEDDING, HEAD_WEIGHT, HEAD_BIAS].into_iter().filter(|&name| constants.has(name)) {
        let (shape, data) = constants.floats(name)?;
        tensors.push(NamedTensor { name: name.to_owned(), shape, data });
    }
    let strings: BTreeMap<String, String> = model.metadata_props.iter().map(|entry| (entry.key.clone(), entry.value.clone())).collect();
    read_learned_state(&constants, &strings, &mut tensors)?;
    tensors.sort_by(|a: &NamedTensor, b| a.name.cmp(&b.name));
    let about = About::read(path, strings, &tensors)?;
    if about.is_none() && is_own {
        let problem = "is missing or damaged, though carrousel wrote the file".to_owned();
        return Err(InterchangeError::Field { path: path.to_path_buf(), field: "`metadata_props`".to_owned(), problem });
    }
    Ok(ModelFile { path: path.to_path_buf(), format: Format::Onnx, about, tensors, coupled: coupled.unwrap_or_default() })
}

/// A learnt initial state stands in the defaults of `h_0` and `c_0`; that it was learnt shows in the sums of the file's own tensors.
fn read_learned_state(constants: &Constants, strings: &BTreeMap<String, String>, tensors: &mut Vec<NamedTensor>) -> Result<()> {
    let sums = strings.get("sha256").and_then(|sums| serde_json::from_str::<BTreeMap<String, String>>(sums).ok()).unwrap_or_default();
    for which in ["h", "c"] {
        // Lanes so far: in the one default of all layers they lie behind each other.
        let mut first = 0;
        for l in 0.. {
            let lanes: Vec<String> =
                (0..2).map(|d| tensor_name(&format!("initial_{which}"), l, d)).filter(|name| sums.contains_key(name)).collect();
            if lanes.is_empty() {
                break;
            }
            let all = format!("{which}_0");
            let (name, skipped) = if constants.has(&all) { (all, first) } else { (format!("{all}_l{l}"), 0) };
            let (shape, values) = constants.floats(&name)?;
            let [n, 1, hidden] = shape[..] else {
                return Err(
                    constants.wrong(&name, format!("has shape {shape:?}, but a learnt state's default is [directions, 1, hidden units]"))
                );
            };
            if skipped + lanes.len() > n {
                return Err(constants.wrong(&name, format!("has shape {shape:?}, but there are {} states", skipped + lanes.len())));
            }
            first += lanes.len();
            let rows = values.chunks_exact(hidden.max(1)).skip(skipped);
            tensors.extend(lanes.into_iter().zip(rows).map(|(name, row)| NamedTensor { name, shape: vec![hidden], data: row.to_vec() }));
        }
    }
    Ok(())
}

/// Refuses a graph of other origin whose LSTM nodes are no stack: each must read what the one before hands up, and nothing may be done to it between.
fn check_stack(path: &Path, graph: &Graph, nodes: &[&Node]) -> Result<()> {
    /// What only moves numbers, or does so outside of training.
    const MOVES: [&str; 8] = ["Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast", "Dropout", "Concat"];
    if let Some(node) = nodes.iter().find(|node| !["", "ai.onnx"].contains(&node.domain.as_str())) {
        return Err(foreign(path, format!("the LSTM node `{}` is of the domain `{}`, not of ONNX's own", node.name, node.domain)));
    }
    let maker: HashMap<&str, &Node> =
        graph.node.iter().flat_map(|node| node.output.iter().map(move |name| (name.as_str(), node))).collect();
    for pair in nodes.windows(2) {
        let (below, above) = (pair[0], pair[1]);
        let mut open: Vec<&str> = above.input.first().map(String::as_str).into_iter().collect();
        let mut meets = false;
        while let Some(name) = open.pop() {
            // What is stored, or comes in from outside, has no maker.
            let Some(node) = maker.get(name).filter(|node| node.op_type != "Constant") else { continue };
            if node.output.first() == below.output.first() {
                meets = true;
            } else if MOVES.contains(&node.op_type.as_str()) {
                let n_read = if node.op_type == "Concat" { node.input.len() } else { 1 };
                open.extend(node.input.iter().take(n_read).map(String::as_str));
            } else {
                let what =
                    format!("between the LSTM nodes `{}` and `{}` stands `{}` ({})", below.name, above.name, node.name, node.op_type);
                return Err(foreign(path, format!("{what}, but here a layer reads what the one below hands up")));
            }
        }
        if !meets {
            return Err(foreign(
                path,
                format!("the LSTM node `{}` does not read what `{}` hands up: only a stack is read", above.name, below.name),
            ));
        }
    }
    Ok(())
}

/// An initial state that another program stored in a node's inputs is one that was learnt; zero is none.
fn read_initial_state(constants: &Constants, l: usize, node: &Node, tensors: &mut Vec<NamedTensor>) -> Result<()> {
    let stored = [5, 6].map(|idx| node.input.get(idx).map(String::as_str).filter(|name| constants.has(name)));
    let read = |name: Option<&'_ str>| name.map(|name| constants.floats(name).map(|state| (name.to_owned(), state))).transpose();
    let states = [("initial_h", read(stored[0])?), ("initial_c", read(stored[1])?)];
    let is_zero = |values: &[f32]| values.iter().all(|&value| value == 0.0);
    if states.iter().all(|(_, state)| state.as_ref().is_none_or(|(_, (_, values))| is_zero(values))) {
        return Ok(());
    }
    let hidden = tensors.iter().find(|tensor| tensor.name == tensor_name("weight_hh", l, 0)).map_or(0, |tensor| tensor.shape[1]);
    let n_directions = if tensors.iter().any(|tensor| tensor.name == tensor_name("weight_hh", l, 1)) { 2 } else { 1 };
    for (what, state) in states {
        let values = match state {
            None => vec![0.0; n_directions * hidden],
            Some((_, (shape, values))) if shape == [n_directions, 1, hidden] => values,
            Some((name, (shape, _))) => {
                let problem = format!("has shape {shape:?}, but an initial state that all rows share is [{n_directions}, 1, {hidden}]");
                return Err(constants.wrong(&name, problem));
            }
        };
        for (d, row) in values.chunks_exact(hidden.max(1)).enumerate() {
            tensors.push(NamedTensor { name: tensor_name(what, l, d), shape: vec![hidden], data: row.to_vec() });
        }
    }
    Ok(())
}

fn attribute(path: &Path, node: &Node, name: &str, problem: impl Into<String>) -> InterchangeError {
    InterchangeError::Field {
        path: path.to_path_buf(),
        field: format!("attribute `{name}` of the LSTM node `{}`", node.name),
        problem: problem.into(),
    }
}

/// Reads a node's weights under PyTorch's names; returns whether its input and forget gates are coupled.
fn read_lstm(constants: &Constants, l: usize, node: &Node, tensors: &mut Vec<NamedTensor>) -> Result<bool> {
    let refuse = |name: &str, problem: String| attribute(constants.path, node, name, problem);
    let (mut n_directions, mut coupled, mut hidden_size) = (1, false, None);
    for attribute in &node.attribute {
        match attribute.name.as_str() {
            "hidden_size" => hidden_size = Some(attribute.i),
            // How sequences lie, which weights do not know.
            "layout" => {}
            "direction" => match attribute.s.as_slice() {
                b"forward" => {}
                b"bidirectional" => n_directions = 2,
                other => {
                    return Err(refuse(
                        "direction",
                        format!("is `{}`, but a layer here reads forward or both ways", String::from_utf8_lossy(other)),
                    ));
                }
            },
            "input_forget" => coupled = attribute.i != 0,
            "activations" => {
                let usual: [&[u8]; 3] = [b"Sigmoid", b"Tanh", b"Tanh"];
                let as_usual = attribute.strings.iter().zip(usual.iter().cycle()).all(|(name, usual)| name.eq_ignore_ascii_case(usual));
                if !as_usual || !attribute.strings.len().is_multiple_of(usual.len()) {
                    return Err(refuse("activations", "are not Sigmoid, Tanh, Tanh, the only ones here".to_owned()));
                }
            }
            "clip" => {
                let problem = format!("is {}: it limits the inputs of the activations, for which there is no option here", attribute.f);
                return Err(refuse("clip", problem));
            }
            name => return Err(refuse(name, "has no equivalent here".to_owned())),
        }
    }
    let given = |idx: usize| node.input.get(idx).map(String::as_str).filter(|name| !name.is_empty());
    let needed = |idx: usize, what: &str| {
        let field = format!("input `{what}` of the LSTM node `{}`", node.name);
        given(idx).ok_or(InterchangeError::Field { path: constants.path.to_path_buf(), field, problem: "is missing".to_owned() })
    };
    let (w, r) = (needed(1, "W")?, needed(2, "R")?);
    let (shape, w_values) = constants.floats(w)?;
    let [found, rows, inputs] = shape[..] else {
        return Err(constants.wrong(w, format!("has shape {shape:?}, but W is [directions, 4 x hidden units, inputs]")));
    };
    let hidden = rows / GATES;
    if found != n_directions || rows % GATES != 0 || hidden == 0 || inputs == 0 {
        let problem = format!("has shape {shape:?}, but W is [{n_directions} (directions), 4 x hidden units, inputs]");
        return Err(constants.wrong(w, problem));
    }
    if hidden_size.is_some_and(|size| usize::try_from(size) != Ok(hidden)) {
        return Err(refuse("hidden_size", format!("is {}, but `{w}` has {hidden} hidden units", hidden_size.unwrap_or_default())));
    }
    let r_values = constants.shaped(r, &[n_directions, rows, hidden])?;
    let biases = given(3).map(|name| constants.shaped(name, &[n_directions, 2 * rows])).transpose()?;
    let peepholes = given(7).map(|name| constants.shaped(name, &[n_directions, 3 * hidden])).transpose()?;
    for d in 0..n_directions {
        let mut push =
            |what: &str, shape: Vec<usize>, data: Vec<f32>| tensors.push(NamedTensor { name: tensor_name(what, l, d), shape, data });
        let turned = |values: &[f32]| turn_gates(values, values.len() / GATES, GateOrder::OnnxToTorch);
        push("weight_ih", vec![rows, inputs], turned(&w_values[d * rows * inputs..][..rows * inputs]));
        push("weight_hh", vec![rows, hidden], turned(&r_values[d * rows * hidden..][..rows * hidden]));
        if let Some(values) = &biases {
            push("bias_ih", vec![rows], turned(&values[2 * d * rows..][..rows]));
            push("bias_hh", vec![rows], turned(&values[(2 * d + 1) * rows..][..rows]));
        }
        if let Some(values) = &peepholes {
            push("weight_peephole", vec![3, hidden], turn_peepholes(&values[3 * d * hidden..][..3 * hidden]));
        }
    }
    Ok(coupled)
}

#[cfg(test)]
mod tests {
    use super::super::Part;
    use super::*;

    fn network(layers: Vec<Layer>) -> (Network, Vec<NamedTensor>) {
        let n_features = layers[0].inputs;
        let head = Some(Output::Values { n_outputs: 3, pooling: Default::default() });
        let network = Network {
            input: Input::Values { n_features },
            layers,
            head,
            tied: false,
            extra: Vec::new(),
            beyond_torch: None,
            beyond_onnx: None,
        };
        let mut next = 0.0;
        let tensors = network.tensors().into_iter().map(|(name, shape)| {
            let data = (0..shape.iter().product()).map(|_| {
                next += 0.25;
                next
            });
            NamedTensor { name, data: data.collect(), shape }
        });
        let tensors = tensors.collect();
        (network, tensors)
    }

    /// A model with its LSTM nodes changed, as another program could have written it.
    fn changed(change: impl Fn(&mut Node)) -> Vec<u8> {
        let (network, tensors) = network(vec![Layer::plain(2, 3)]);
        let mut model = Model {
            metadata_props: Vec::new(),
            producer_name: "another".to_owned(),
            ..Model::decode(to_bytes(&network, &About { part: Part::All, ..About::default() }, &tensors).unwrap().as_slice()).unwrap()
        };
        model.graph.as_mut().unwrap().node.iter_mut().filter(|node| node.op_type == "LSTM").for_each(change);
        model.encode_to_vec()
    }

    fn error(bytes: &[u8]) -> String {
        from_bytes(bytes, Path::new("m.onnx")).unwrap_err().to_string()
    }

    #[test]
    fn an_lstm_that_others_wrote_is_read_and_what_it_cannot_be_here_is_refused_by_its_attribute() {
        assert_eq!(from_bytes(&changed(|_| ()), Path::new("m.onnx")).unwrap().about, None);
        let with = |attribute: Attribute| error(&changed(|node| node.attribute.push(attribute.clone())));
        let clip = Attribute { name: "clip".to_owned(), f: 3.0, kind: 1, ..Attribute::default() };
        assert!(with(clip).contains("m.onnx: attribute `clip` of the LSTM node `LSTM_"), "clip");
        let strings = ["Relu", "Tanh", "Tanh"].map(|name| name.as_bytes().to_vec()).to_vec();
        assert!(with(Attribute { name: "activations".to_owned(), strings, kind: 8, ..Attribute::default() }).contains("`activations`"));
        assert!(with(string("direction", "reverse")).contains("is `reverse`, but a layer here reads forward or both ways"));
        assert!(with(string("mode", "x")).contains("`mode`"));
        assert!(with(int("hidden_size", 4)).contains("is 4, but `lstm.l0.W` has 3 hidden units"));
        assert!(error(&changed(|node| node.input[2] = "other".to_owned())).contains("tensor `other` is computed by the graph"));
        assert!(error(&changed(|node| node.input[2].clear())).contains("input `R` of the LSTM node"));
        assert!(
            error(&changed(|node| node.input.swap(2, 3))).contains("tensor `lstm.l0.B` has shape [1, 24], but its node needs [1, 12, 3]")
        );
        assert!(error(&changed(|node| node.op_type.push('x'))).contains("no `LSTM` node"));
        assert!(error(&changed(|node| node.domain = "com.other".to_owned())).contains("of the domain `com.other`"));
    }

    /// As another program could have written a network of these layers, its graph changed.
    fn another(layers: Vec<Layer>, change: impl Fn(&mut Graph)) -> Vec<u8> {
        let (network, tensors) = network(layers);
        let bytes = to_bytes(&network, &About { part: Part::All, ..About::default() }, &tensors).unwrap();
        let mut model =
            Model { metadata_props: Vec::new(), producer_name: "another".to_owned(), ..Model::decode(bytes.as_slice()).unwrap() };
        change(model.graph.as_mut().unwrap());
        model.encode_to_vec()
    }

    #[test]
    fn what_another_program_does_between_layers_is_refused_and_an_initial_state_that_it_stored_is_read() {
        let stack = || vec![Layer::plain(2, 3), Layer::plain(3, 3)];
        assert!(from_bytes(&another(stack(), |_| ()), Path::new("m.onnx")).is_ok());
        let residual = vec![Layer::plain(2, 3), Layer { residual: true, ..Layer::plain(3, 3) }, Layer::plain(3, 3)];
        let refused = error(&another(residual, |_| ()));
        assert!(refused.contains("between the LSTM nodes") && refused.contains("(Add)"), "{refused}");
        let apart = error(&another(stack(), |graph| {
            graph.node.iter_mut().filter(|node| node.op_type == "LSTM").for_each(|node| node.input[0] = "input".to_owned());
        }));
        assert!(apart.contains("does not read what"), "{apart}");

        let with_state = |shape: &[usize], values: &[f32]| {
            another(vec![Layer { bidirectional: true, ..Layer::plain(2, 3) }], |graph| {
                let dims = shape.iter().map(|&n| n as i64).collect();
                let tensor = Tensor {
                    dims,
                    data_type: proto::FLOAT,
                    name: "stored".to_owned(),
                    raw_data: le_bytes(values).into_owned(),
                    ..Tensor::default()
                };
                graph.initializer.push(tensor);
                graph.node.iter_mut().filter(|node| node.op_type == "LSTM").for_each(|node| node.input[5] = "stored".to_owned());
            })
        };
        let read = |bytes: &[u8]| from_bytes(bytes, Path::new("m.onnx")).unwrap();
        let learned = read(&with_state(&[2, 1, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        let of = |file: &ModelFile, name: &str| file.tensors.iter().find(|tensor| tensor.name == name).map(|tensor| tensor.data.clone());
        assert_eq!(of(&learned, "lstm.initial_h_l0"), Some(vec![1.0, 2.0, 3.0]));
        assert_eq!(of(&learned, "lstm.initial_h_l0_reverse"), Some(vec![4.0, 5.0, 6.0]));
        assert_eq!(of(&learned, "lstm.initial_c_l0"), Some(vec![0.0; 3]));
        assert!(learned.options().unwrap().contains("learned_state = true"));
        assert_eq!(of(&read(&with_state(&[2, 1, 3], &[0.0; 6])), "lstm.initial_h_l0"), None);
        assert!(error(&with_state(&[2, 2, 3], &[1.0; 12])).contains("tensor `stored` has shape [2, 2, 3]"));
        let usual = ["sigmoid", "tanh", "tanh"].map(|name| name.as_bytes().to_vec()).to_vec();
        let usual = Attribute { name: "activations".to_owned(), strings: usual, kind: 8, ..Attribute::default() };
        let read = from_bytes(&changed(|node| node.attribute.push(usual.clone())), Path::new("m.onnx")).unwrap();
        assert!(!read.coupled && read.tensors.len() == 6);
    }

    #[test]
    fn tensors_in_other_files_of_other_types_or_of_other_length_are_named() {
        let with = |change: &dyn Fn(&mut Tensor)| {
            let (network, tensors) = network(vec![Layer::plain(2, 3)]);
            let mut model = Model::decode(to_bytes(&network, &About::default(), &tensors).unwrap().as_slice()).unwrap();
            model.graph.as_mut().unwrap().initializer.iter_mut().filter(|tensor| tensor.name == "lstm.l0.W").for_each(change);
            error(&model.encode_to_vec())
        };
        assert!(with(&|tensor| tensor.data_location = proto::EXTERNAL).contains("tensor `lstm.l0.W` lies in another file"));
        assert!(with(&|tensor| tensor.data_type = 10).contains("tensor `lstm.l0.W` has ONNX's data type 10"));
        assert!(with(&|tensor| tensor.raw_data.truncate(8)).contains("tensor `lstm.l0.W` of shape [1, 12, 2] has 2 values"));
        assert!(with(&|tensor| tensor.raw_data.truncate(7)).contains("has 7 bytes, which are no whole floats"));
        assert!(with(&|tensor| tensor.dims[0] = -1).contains("impossible shape"));
        assert!(with(&|tensor| tensor.dims = vec![i64::MAX, i64::MAX, 4]).contains("has 24 values"));
        assert!(with(&|tensor| tensor.raw_data[0] ^= 1).contains("tensor `lstm.weight_ih_l0` is damaged"));
    }

    #[test]
    fn layers_of_unlike_width_have_states_of_their_own() {
        let (network, tensors) = network(vec![Layer::plain(2, 3), Layer { bidirectional: true, ..Layer::plain(3, 2) }]);
        let model = Model::decode(to_bytes(&network, &About::default(), &tensors).unwrap().as_slice()).unwrap();
        let graph = model.graph.unwrap();
        let names = |values: &[ValueInfo]| values.iter().map(|value| value.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&graph.input), ["input", "lengths", "h_0_l0", "h_0_l1", "c_0_l0", "c_0_l1"]);
        assert_eq!(names(&graph.output), ["output", "h_n_l0", "h_n_l1", "c_n_l0", "c_n_l1"]);
    }

    #[test]
    fn every_name_that_a_node_reads_was_given_before() {
        for bidirectional in [false, true] {
            let (network, tensors) = network(vec![Layer { bidirectional, ..Layer::plain(2, 3) }; 1]);
            let graph = graph(&network, &tensors);
            let mut known: Vec<&str> = graph.initializer.iter().map(|tensor| tensor.name.as_str()).collect();
            known.extend(graph.input.iter().map(|value| value.name.as_str()));
            for node in &graph.node {
                assert!(node.input.iter().all(|name| name.is_empty() || known.contains(&name.as_str())), "{node:?}");
                assert!(node.output.iter().all(|name| !known.contains(&name.as_str())), "{node:?}");
                known.extend(node.output.iter().map(String::as_str));
            }
            assert!(graph.output.iter().all(|value| known.contains(&value.name.as_str())));
        }
    }
}
