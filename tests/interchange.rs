//! Models as PyTorch and ONNX have them: names and shapes, round trips to the bit, damaged and foreign files, runs there and back.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

use carrousel::backend::open;
use carrousel::data::series::Part as DataPart;
use carrousel::infer::evaluate::evaluate;
use carrousel::infer::exchange;
use carrousel::infer::session::{Session, read_config};
use carrousel::infer::task::Corpus;
use carrousel::model::config::{Hidden, Input, LstmConfig, ModelConfig, Output, Pooling};
use carrousel::store::config::{RunConfig, Task};
use carrousel::store::interchange::{
    About, Format, GateOrder, Layer, ModelFile, Network, Part, describe, from_bytes, read, to_bytes, turn_gates, write,
};
use carrousel::store::{NamedTensor, RunFolder, Which};

use crate::runs;

const FORMATS: [Format; 2] = [Format::Safetensors, Format::Onnx];

/// Where `tests/interchange/run.sh` wants the samples that no command line can make yet.
const SAMPLES: &str = "CARROUSEL_INTERCHANGE_SAMPLES";

fn tokens(vocabulary: usize, width: usize, layers: Vec<Layer>, tied: bool) -> Network {
    let input = Input::Tokens { vocabulary, width };
    let head = Some(Output::Classes { n_classes: vocabulary });
    Network { input, layers, head, tied, extra: Vec::new(), beyond_torch: None, beyond_onnx: None }
}

fn values(layers: Vec<Layer>, n_outputs: usize) -> Network {
    let input = Input::Values { n_features: layers[0].inputs };
    Network {
        input,
        layers,
        head: Some(Output::Values { n_outputs, pooling: Pooling::Last }),
        tied: false,
        extra: Vec::new(),
        beyond_torch: None,
        beyond_onnx: None,
    }
}

fn both_ways(inputs: usize, hidden: usize) -> Layer {
    Layer { bidirectional: true, ..Layer::plain(inputs, hidden) }
}

fn residual(layer: Layer) -> Layer {
    Layer { residual: true, ..layer }
}

fn learned(layer: Layer) -> Layer {
    Layer { learned_state: true, ..layer }
}

fn mean(network: Network) -> Network {
    Network { head: Some(Output::Values { n_outputs: 2, pooling: Pooling::Mean }), ..network }
}

/// Networks of every kind that the files can hold.
fn networks() -> Vec<(&'static str, Network)> {
    let no_bias = Layer { bias: false, ..Layer::plain(4, 3) };
    let peephole = Layer { peephole: true, ..Layer::plain(4, 3) };
    vec![
        ("tokens", tokens(7, 4, vec![Layer::plain(4, 3), Layer::plain(3, 3)], false)),
        ("tied", tokens(7, 3, vec![Layer::plain(3, 3)], true)),
        ("no bias", values(vec![no_bias], 2)),
        ("three layers", values(vec![Layer::plain(1, 17), Layer::plain(17, 17), Layer::plain(17, 17)], 5)),
        ("bidirectional", tokens(9, 4, vec![both_ways(4, 3), both_ways(6, 3)], false)),
        ("bidirectional values", values(vec![both_ways(4, 3)], 2)),
        ("unlike widths", values(vec![Layer::plain(4, 5), both_ways(5, 3), Layer::plain(6, 2)], 2)),
        ("peephole", values(vec![peephole, Layer { bidirectional: true, ..peephole }].into_iter().take(1).collect(), 2)),
        ("peephole both ways", values(vec![Layer { bidirectional: true, ..peephole }], 2)),
        ("coupled", values(vec![Layer { coupled: true, ..Layer::plain(4, 3) }], 2)),
        ("residual", values(vec![Layer::plain(3, 3), residual(Layer::plain(3, 3))], 2)),
        ("residual both ways", values(vec![both_ways(4, 3), residual(both_ways(6, 3))], 2)),
        ("residual mean", mean(values(vec![Layer::plain(3, 3), residual(Layer::plain(3, 3))], 2))),
        ("residual mean both ways", mean(values(vec![both_ways(6, 3), residual(both_ways(6, 3))], 2))),
        ("residual tokens", tokens(7, 3, vec![Layer::plain(3, 3), residual(Layer::plain(3, 3))], false)),
        ("learned state", values(vec![learned(Layer::plain(4, 3)), learned(Layer::plain(3, 3))], 2)),
        ("learned state both ways", tokens(7, 4, vec![learned(both_ways(4, 3)), learned(both_ways(6, 3))], false)),
        ("learned states of unlike widths", values(vec![learned(both_ways(4, 5)), learned(both_ways(10, 3))], 2)),
    ]
}

/// Parameters of a moderate size, each another number.
fn parameters(network: &Network) -> Vec<NamedTensor> {
    let mut state = 7_u32;
    let mut draw = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let tensor =
        |(name, shape): (String, Vec<usize>)| NamedTensor { name, data: (0..shape.iter().product()).map(|_| draw()).collect(), shape };
    network.tensors().into_iter().map(tensor).collect()
}

fn about(part: Part) -> About {
    About { part, model: "{}".into(), config: "seed = 1\n".into(), data: "{}".into(), scale: Some("[1]".into()), step: 12 }
}

fn file_name(format: Format) -> PathBuf {
    PathBuf::from(if format == Format::Onnx { "m.onnx" } else { "m.safetensors" })
}

fn there_and_back(format: Format, network: &Network, part: Part) -> ModelFile {
    let bytes = to_bytes(format, network, &about(part), &parameters(network)).unwrap();
    from_bytes(&bytes, &file_name(format), format).unwrap()
}

/// A file as PyTorch's users write it.
fn torch_file(tensors: &[(&str, &[usize], Dtype)]) -> Vec<u8> {
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, shape, dtype)| {
            let n: usize = shape.iter().product();
            if *dtype == Dtype::F32 { (0..n).flat_map(|i| (i as f32 / 64.0).to_le_bytes()).collect() } else { vec![0; n * 2] }
        })
        .collect();
    let views =
        tensors.iter().zip(&data).map(|((name, shape, dtype), data)| (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap()));
    safetensors::serialize(views.collect::<HashMap<_, _>>(), None).unwrap()
}

fn error_of(bytes: &[u8], format: Format) -> String {
    from_bytes(bytes, &file_name(format), format).unwrap_err().to_string()
}

#[test]
fn gates_turn_from_torch_to_onnx_and_back() {
    // Two units, two columns: gate g has the values 10 g ..
    let torch: Vec<f32> = (0..4).flat_map(|gate| (0..4).map(move |i| (10 * gate + i) as f32)).collect();
    let onnx = turn_gates(&torch, 4, GateOrder::TorchToOnnx);
    let firsts: Vec<f32> = onnx.iter().step_by(4).copied().collect();
    assert_eq!(firsts, [0.0, 30.0, 10.0, 20.0], "i, o, f, c of i, f, g, o");
    assert_eq!(turn_gates(&onnx, 4, GateOrder::OnnxToTorch), torch);
}

#[test]
fn a_described_model_has_the_tensors_of_its_table() {
    for (n_layers, bias, tied) in [(1, true, false), (2, false, true), (3, true, true), (3, false, false)] {
        let width = if tied { 5 } else { 4 };
        let (input, output) = (Input::Tokens { vocabulary: 11, width }, Output::Classes { n_classes: 11 });
        let text = ModelConfig { input, output, n_layers, hidden: 5.into(), dropout: 0.1, bias, tied, lstm: LstmConfig::default() };
        let (input, output) = (Input::Values { n_features: 3 }, Output::Values { n_outputs: 6, pooling: Pooling::Last });
        let series = ModelConfig { input, output, tied: false, ..text.clone() };
        for config in [text, series] {
            let table: Vec<_> = config.table().tensors().iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
            assert_eq!(describe(&config).tensors(), table, "{config:?}");
        }
    }
}

#[test]
fn safetensors_have_the_names_and_shapes_that_torch_loads_strictly() {
    let shapes = |network: &Network, part| -> Vec<(String, Vec<usize>)> {
        let bytes = to_bytes(Format::Safetensors, network, &about(part), &parameters(network)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut shapes: Vec<_> = file.tensors().iter().map(|(name, view)| (name.clone(), view.shape().to_vec())).collect();
        shapes.sort();
        shapes
    };
    let expect =
        |pairs: &[(&str, &[usize])]| -> Vec<(String, Vec<usize>)> { pairs.iter().map(|(n, s)| ((*n).into(), s.to_vec())).collect() };
    let tied = tokens(7, 3, vec![both_ways(3, 2)], false);
    assert_eq!(
        shapes(&tied, Part::All),
        expect(&[
            ("embedding.weight", &[7, 3]),
            ("head.bias", &[7]),
            ("head.weight", &[7, 4]),
            ("lstm.bias_hh_l0", &[8]),
            ("lstm.bias_hh_l0_reverse", &[8]),
            ("lstm.bias_ih_l0", &[8]),
            ("lstm.bias_ih_l0_reverse", &[8]),
            ("lstm.weight_hh_l0", &[8, 2]),
            ("lstm.weight_hh_l0_reverse", &[8, 2]),
            ("lstm.weight_ih_l0", &[8, 3]),
            ("lstm.weight_ih_l0_reverse", &[8, 3]),
        ])
    );
    let tied = tokens(7, 3, vec![Layer { bias: false, ..Layer::plain(3, 3) }], true);
    let names: Vec<String> = shapes(&tied, Part::All).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["embedding.weight", "head.bias", "head.weight", "lstm.weight_hh_l0", "lstm.weight_ih_l0"], "tied");
    assert_eq!(shapes(&tied, Part::Lstm), expect(&[("weight_hh_l0", &[12, 3]), ("weight_ih_l0", &[12, 3])]), "bare names");
}

#[test]
fn every_kind_of_network_comes_back_to_the_bit_from_both_formats() {
    for (what, network) in networks() {
        for format in FORMATS {
            for part in [Part::All, Part::Lstm] {
                let file = there_and_back(format, &network, part);
                let mut expected = parameters(&network);
                if part == Part::Lstm {
                    expected.retain(|tensor| tensor.name.starts_with("lstm."));
                } else if network.tied && format == Format::Safetensors {
                    let embedding = expected.iter().find(|tensor| tensor.name == "embedding.weight").unwrap();
                    expected.push(NamedTensor { name: "head.weight".into(), ..embedding.clone() });
                }
                expected.sort_by(|a, b| a.name.cmp(&b.name));
                let what = format!("{what}, {format}, {part:?}");
                assert!(file.tensors == expected, "{what}");
                assert_eq!(file.about, Some(about(part)), "{what}");
                let found = file.found().unwrap();
                // PyTorch's names do not tell that gates are coupled, and no tensor that inputs are added.
                let told = |l: &Layer| Layer { coupled: l.coupled && format == Format::Onnx, residual: false, ..*l };
                let layers: Vec<Layer> = network.layers.iter().map(told).collect();
                assert_eq!(found.layers, layers, "{what}");
                let whole = part == Part::All;
                assert_eq!((found.tied, found.has_head), (network.tied && whole, whole), "{what}");
            }
        }
    }
}

#[test]
fn the_same_model_gives_the_same_bytes_in_whatever_order_its_tensors_come() {
    let (_, network) = &networks()[0];
    let mut tensors = parameters(network);
    for format in FORMATS {
        let bytes = to_bytes(format, network, &about(Part::All), &tensors).unwrap();
        tensors.reverse();
        assert!(bytes == to_bytes(format, network, &about(Part::All), &tensors).unwrap(), "{format}");
    }
}

#[test]
fn a_flipped_bit_is_an_error_or_changes_nothing_that_is_read() {
    let network = tokens(5, 2, vec![Layer::plain(2, 2)], false);
    for format in FORMATS {
        let bytes = to_bytes(format, &network, &about(Part::All), &parameters(&network)).unwrap();
        let whole = from_bytes(&bytes, &file_name(format), format).unwrap();
        let mut n_errors = 0;
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            match from_bytes(&damaged, &file_name(format), format) {
                Ok(file) => assert!(file == whole, "{format}: byte {at} of {}", bytes.len()),
                Err(_) => n_errors += 1,
            }
        }
        assert!(n_errors > bytes.len() / 3, "{format}: only {n_errors} of {}", bytes.len());
        for len in 0..bytes.len() {
            assert!(from_bytes(&bytes[..len], &file_name(format), format).is_err(), "{format}: cut at {len} of {}", bytes.len());
        }
    }
}

#[test]
fn damage_is_named_by_its_tensor_or_its_field() {
    let network = tokens(5, 2, vec![Layer::plain(2, 2)], false);
    let tensors = parameters(&network);
    for format in FORMATS {
        let bytes = to_bytes(format, &network, &about(Part::All), &tensors).unwrap();
        let replaced = |from: &[u8], to: &[u8]| {
            let at = bytes.windows(from.len()).position(|window| window == from).unwrap_or_else(|| panic!("{format}: {from:?}"));
            let mut changed = bytes.clone();
            changed[at..at + to.len()].copy_from_slice(to);
            changed
        };
        for name in ["embedding.weight", "lstm.bias_hh_l0", "head.bias"] {
            let values = &tensors.iter().find(|tensor| tensor.name == name).unwrap().data;
            let error = error_of(&replaced(&values[0].to_le_bytes(), &0.5_f32.to_le_bytes()), format);
            assert!(error.contains(&format!("tensor `{name}` is damaged: its checksum does not fit")), "{format}: {error}");
        }
        let error = error_of(&replaced(b"carrousel 0", b"carrousel 9"), format);
        assert!(error.contains("`metadata` is damaged: its checksum does not fit"), "{format}: {error}");
        assert!(error_of(b"", format).contains(file_name(format).to_str().unwrap()));
        assert!(error_of(b"just a text, and no model at all", format).contains(file_name(format).to_str().unwrap()));
    }
}

#[test]
fn a_model_file_is_known_by_its_first_bytes_and_not_by_its_name() {
    let network = tokens(5, 2, vec![Layer::plain(2, 2)], false);
    let folder = tempfile::tempdir().unwrap();
    for format in FORMATS {
        let bytes = to_bytes(format, &network, &about(Part::All), &parameters(&network)).unwrap();
        for name in ["model", "model.onnx", "model.safetensors", "model.bin"] {
            let path = folder.path().join(name);
            fs::write(&path, &bytes).unwrap();
            assert_eq!(carrousel::store::interchange::read(&path).unwrap().format, format, "{format} as {name}");
        }
    }
    for (start, told) in [
        (&b"PK\x03\x04rest"[..], "safetensors.torch.save_file"),
        (b"\x80\x02\x8a\x0alegacy", "before version 1.6"),
        (b"a,b\n1,2\n", "neither a safetensors file nor an ONNX model"),
        (b"\x89HDF\r\n\x1a\n", "export the model to ONNX"),
    ] {
        let path = folder.path().join("model.pt");
        fs::write(&path, start).unwrap();
        let error = carrousel::store::interchange::read(&path).unwrap_err().to_string();
        assert!(error.contains("model.pt") && error.contains(told), "{error}");
    }
}

#[test]
fn a_file_of_a_later_version_is_refused_with_both_versions() {
    let network = values(vec![Layer::plain(2, 2)], 1);
    let bytes = to_bytes(Format::Safetensors, &network, &about(Part::All), &parameters(&network)).unwrap();
    let (from, to) = (br#""format_version":"1""#, br#""format_version":"7""#);
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    let mut later = bytes;
    later[at..at + to.len()].copy_from_slice(to);
    let error = error_of(&later, Format::Safetensors);
    assert!(error.contains("format version 7") && error.contains("reads up to 1"), "{error}");
}

#[test]
fn foreign_files_are_read_by_torchs_names_under_any_prefix() {
    let tensors: &[(&str, &[usize], Dtype)] = &[
        ("rnn.weight_ih_l0", &[12, 5], Dtype::F32),
        ("rnn.weight_hh_l0", &[12, 3], Dtype::F32),
        ("rnn.bias_ih_l0", &[12], Dtype::F32),
        ("rnn.bias_hh_l0", &[12], Dtype::F32),
        ("embedding.weight", &[7, 5], Dtype::F32),
    ];
    let file = from_bytes(&torch_file(tensors), Path::new("torch.safetensors"), Format::Safetensors).unwrap();
    assert_eq!(file.about, None);
    let found = file.found().unwrap();
    assert_eq!((found.layers, found.embedding, found.has_head, found.tied), (vec![Layer::plain(5, 3)], Some((7, 5)), false, false));
    assert_eq!(file.options().unwrap(), "layers = 1\nhidden = 3\nno_bias = false\nembedding = 5\ntied = false\n");
    // The head starts afresh, and that is told.
    let network = tokens(7, 5, vec![Layer::plain(5, 3)], false);
    let fresh = parameters(&network);
    let (params, started) = file.clone().into_parameters(&network, &fresh).unwrap();
    assert_eq!(started, ["head.weight", "head.bias"]);
    let names: Vec<_> = params.iter().map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect();
    assert_eq!(names, network.tensors());
    assert_eq!((&params[0].data, &params[5], &params[6]), (&file.tensors[0].data, &fresh[5], &fresh[6]));
}

#[test]
fn foreign_files_that_do_not_fit_are_refused_by_their_tensor() {
    let lstm: [(&str, &[usize], Dtype); 2] = [("weight_ih_l0", &[12, 5], Dtype::F32), ("weight_hh_l0", &[12, 3], Dtype::F32)];
    let with = |more: &[(&str, &[usize], Dtype)]| torch_file(&[&lstm[..], more].concat());
    let safe = Format::Safetensors;
    let read_of = |more: &[(&str, &[usize], Dtype)]| from_bytes(&with(more), &file_name(safe), safe).unwrap();
    assert!(error_of(&torch_file(&[("w", &[2], Dtype::F32)]), safe).contains("`weight_ih_l0`"));
    let several = error_of(&with(&[("b.weight_ih_l0", &[12, 5], Dtype::F32)]), safe);
    assert!(several.contains("`b.weight_ih_l0`") && several.contains("`weight_ih_l0`"), "{several}");
    assert!(error_of(&with(&[("head.bias", &[2], Dtype::F16)]), safe).contains("tensor `head.bias` is F16"));

    let found = |more: &[(&str, &[usize], Dtype)]| read_of(more).found().unwrap_err().to_string();
    let half = torch_file(&lstm[..1]);
    let half = from_bytes(&half, &file_name(safe), safe).unwrap().found().unwrap_err().to_string();
    assert!(half.contains("tensor `lstm.weight_hh_l0` is missing"), "{half}");
    assert!(found(&[("bias_ih_l0", &[12], Dtype::F32)]).contains("`lstm.bias_hh_l0` is missing"));
    assert!(found(&[("weight_ih_l0_reverse", &[12, 4], Dtype::F32)]).contains("`lstm.weight_ih_l0_reverse` has shape [12, 4]"));
    assert!(found(&[("weight_ih_l1", &[12, 4], Dtype::F32)]).contains("`lstm.weight_ih_l1` reads 4 columns, but the layer below has 3"));
    assert!(found(&[("weight_hr_l0", &[2, 3], Dtype::F32)]).contains("`lstm.weight_hh_l0` has shape [12, 3], but"));

    let network = values(vec![Layer { bias: false, ..Layer::plain(5, 3) }], 2);
    let fresh = parameters(&network);
    let into = |file: ModelFile, network: &Network| file.into_parameters(network, &fresh).unwrap_err().to_string();
    let wider = values(vec![Layer { bias: false, ..Layer::plain(6, 3) }], 2);
    assert!(into(read_of(&[]), &wider).contains("tensor `lstm.weight_ih_l0` has shape [12, 5], but data and options ask for [12, 6]"));
    assert!(into(read_of(&[]), &values(vec![Layer::plain(5, 3)], 2)).contains("tensor `lstm.bias_ih_l0` of shape [12] is missing"));
    assert!(into(read_of(&[("decoder.weight", &[2, 3], Dtype::F32)]), &network).contains("`decoder.weight` of shape [2, 3] has no place"));
    assert!(into(read_of(&[("head.weight", &[2, 3], Dtype::F32)]), &network).contains("`head.bias` of shape [2] is missing"));
    let mut spoilt = read_of(&[]);
    spoilt.tensors[0].data[2] = f32::NAN;
    assert!(into(spoilt, &network).contains("holds NaN"));
    let both = tokens(7, 5, vec![both_ways(5, 3)], false);
    let options = there_and_back(safe, &both, Part::All).options().unwrap();
    assert!(options.contains("bidirectional = true\n"), "{options}");
    let projecting = values(vec![Layer { projection: 2, ..Layer::plain(4, 3) }], 2);
    let options = there_and_back(safe, &projecting, Part::All).options().unwrap();
    assert!(options.contains("proj_size = 2\n") && options.contains("hidden = 3\n"), "{options}");
    let unlike = values(vec![Layer::plain(4, 3), Layer::plain(3, 6)], 2);
    let options = there_and_back(safe, &unlike, Part::All).options().unwrap();
    assert!(options.contains("hidden = [3, 6]\n"), "{options}");
}

#[test]
fn a_models_options_have_their_words_or_the_reason_why_not() {
    let config = |lstm: LstmConfig| ModelConfig {
        input: Input::Values { n_features: 3 },
        output: Output::Values { n_outputs: 2, pooling: Pooling::Last },
        n_layers: 2,
        hidden: 5.into(),
        dropout: 0.1,
        bias: true,
        tied: false,
        lstm,
    };
    let none = LstmConfig::default();
    let all =
        LstmConfig { bidirectional: true, residual: true, learned_state: true, peephole: true, proj_size: 3, layer_norm: true, ..none };
    let network = describe(&config(all));
    let table = config(all).table();
    let named: Vec<_> = table.tensors().iter().map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect();
    let in_any_order = |tensors: Vec<(String, Vec<usize>)>| tensors.into_iter().collect::<std::collections::BTreeMap<_, _>>();
    assert_eq!(in_any_order(network.tensors()), in_any_order(named), "every parameter has its word");
    for (lstm, torch, onnx) in [
        (none, None, None),
        (LstmConfig { bidirectional: true, ..none }, None, None),
        (LstmConfig { recurrent_dropout: 0.1, weight_drop: 0.1, recurrent_grad_clip: 1.0, ..none }, None, None),
        (LstmConfig { peephole: true, ..none }, Some("peepholes"), None),
        (LstmConfig { coupled_gates: true, ..none }, Some("forget gate"), None),
        (LstmConfig { proj_size: 3, ..none }, None, Some("project")),
        (LstmConfig { layer_norm: true, ..none }, Some("normalises"), Some("normalises")),
        (LstmConfig { zoneout_h: 0.1, ..none }, Some("zoneout"), Some("zoneout")),
        (LstmConfig { cell_clip: 1.0, ..none }, Some("clip"), Some("clip")),
        (LstmConfig { residual: true, ..none }, Some("adds the inputs"), None),
        (LstmConfig { learned_state: true, ..none }, Some("learnt"), None),
    ] {
        let network = describe(&config(lstm));
        for (reason, want) in [(&network.beyond_torch, torch), (&network.beyond_onnx, onnx)] {
            assert_eq!(reason.is_some(), want.is_some(), "{lstm:?}: {reason:?}");
            assert!(reason.as_ref().zip(want).is_none_or(|(reason, want)| reason.contains(want)), "{lstm:?}: {reason:?}");
        }
    }
    let unlike = describe(&ModelConfig { hidden: Hidden::Each(vec![5, 7]), ..config(none) });
    assert!(unlike.beyond_torch.is_some_and(|reason| reason.contains("hidden units")) && unlike.beyond_onnx.is_none());
}

#[test]
fn what_a_format_has_no_words_for_is_refused_with_the_reason() {
    let network = Network {
        beyond_onnx: Some("zoneout changes the recurrence".into()),
        beyond_torch: Some("peepholes are unknown to it".into()),
        ..values(vec![Layer::plain(2, 2)], 1)
    };
    let write = |format, part| to_bytes(format, &network, &about(part), &parameters(&network)).map_err(|e| e.to_string());
    assert_eq!(write(Format::Onnx, Part::All).unwrap_err(), "onnx cannot hold this model: zoneout changes the recurrence");
    let error = write(Format::Safetensors, Part::Lstm).unwrap_err();
    assert!(error.starts_with("torch.nn.LSTM cannot compute this model: peepholes are unknown to it; leave --part out"), "{error}");
    assert!(write(Format::Safetensors, Part::All).is_ok(), "all parameters are there, whoever reads them");
    let projecting = values(vec![Layer { projection: 2, ..Layer::plain(4, 3) }], 2);
    let error = to_bytes(Format::Onnx, &projecting, &about(Part::All), &parameters(&projecting)).unwrap_err().to_string();
    assert!(error.contains("`lstm.weight_hr_l0`"), "{error}");
    let file = there_and_back(Format::Safetensors, &projecting, Part::All);
    assert_eq!(file.found().unwrap().layers, projecting.layers);
    assert!(file.options().unwrap().contains("proj_size = 2\n"));
}

#[test]
fn parameters_that_only_this_program_knows_go_along_in_safetensors() {
    let extra = vec![("lstm.norm_l0".to_owned(), vec![8]), ("other.scale".to_owned(), vec![2, 3])];
    let network = Network { extra: extra.clone(), ..values(vec![Layer::plain(2, 2)], 1) };
    let file = there_and_back(Format::Safetensors, &network, Part::All);
    let (params, fresh) = file.into_parameters(&network, &[]).unwrap();
    assert_eq!((params, fresh), (parameters(&network), Vec::new()));
    assert_eq!(network.lstm_only().extra, extra[..1]);
}

#[test]
fn tensors_that_are_not_the_networks_are_not_written() {
    let network = values(vec![Layer::plain(2, 2)], 1);
    for format in FORMATS {
        let error = |tensors: &[NamedTensor]| to_bytes(format, &network, &about(Part::All), tensors).unwrap_err().to_string();
        let mut tensors = parameters(&network);
        tensors[1].shape = vec![2, 8];
        assert!(error(&tensors).contains("`lstm.weight_hh_l0` has shape [2, 8]"));
        assert!(error(&parameters(&network)[..3]).contains("no tensor `lstm.bias_hh_l0`"));
    }
}

/// The networks that the program cannot train yet, in both formats: `check_onnx.py` compares them with an LSTM of its own.
#[test]
fn samples_of_every_kind_are_written_as_files() {
    let kept = std::env::var_os(SAMPLES).map(PathBuf::from);
    let scratch = tempfile::tempdir().unwrap();
    let dir = kept.as_deref().unwrap_or(scratch.path());
    for (what, network) in networks() {
        let stem = what.replace(' ', "_");
        let coupled = network.layers.iter().any(|layer| layer.coupled);
        let residual = network.layers.iter().any(|layer| layer.residual);
        let mean = matches!(network.head, Some(Output::Values { pooling: Pooling::Mean, .. }));
        let model = json!({ "coupled": coupled, "residual": residual, "mean": mean });
        let about = About { model: model.to_string(), ..about(Part::All) };
        for (format, extension) in [(Format::Onnx, "onnx"), (Format::Safetensors, "safetensors")] {
            let path = dir.join(format!("{stem}.{extension}"));
            write(&path, format, &network, &about, &parameters(&network)).unwrap();
            assert_eq!(read(&path).unwrap().about.as_ref(), Some(&about), "{}", path.display());
        }
    }
    let missing = dir.join("no such folder").join("m.onnx");
    let (_, network) = &networks()[0];
    assert!(write(&missing, Format::Onnx, network, &about(Part::All), &parameters(network)).unwrap_err().is_usage());
}

/// Folders with cases that PyTorch computed.
fn vectors() -> Vec<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    std::iter::once(own).chain(std::env::var_os("CARROUSEL_VECTORS").map(PathBuf::from)).collect()
}

/// Beside the other samples, so that `check_onnx.py` compares onnxruntime with PyTorch's own results.
#[test]
fn a_bare_lstm_is_written_as_torch_itself_names_it() {
    let mut n_cases = 0;
    for json in vectors().iter().flat_map(|dir| fs::read_dir(dir).unwrap()).map(|entry| entry.unwrap().path()) {
        let bytes = fs::read(json.with_extension("f32.safetensors"));
        let (Some(true), Ok(bytes)) = (json.extension().map(|extension| extension == "json"), bytes) else { continue };
        let case = SafeTensors::deserialize(&bytes).unwrap();
        let is_parameter = |name: &str| name.starts_with("weight_") || name.starts_with("bias_");
        let mut parameters: Vec<NamedTensor> = Vec::new();
        for (name, view) in case.tensors().into_iter().filter(|(name, _)| is_parameter(name)) {
            let data = view.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            parameters.push(NamedTensor { name, shape: view.shape().to_vec(), data });
        }
        parameters.sort_by(|a, b| a.name.cmp(&b.name));
        let views = parameters.iter().map(|tensor| (tensor.name.as_str(), case.tensor(&tensor.name).unwrap()));
        let torchs = from_bytes(&safetensors::serialize(views, None).unwrap(), &json, Format::Safetensors).unwrap();
        let network = values(torchs.found().unwrap().layers, 1).lstm_only();
        let bytes = to_bytes(Format::Safetensors, &network, &about(Part::Lstm), &torchs.tensors).unwrap();
        let ours = SafeTensors::deserialize(&bytes).unwrap();
        let mut names: Vec<&str> = ours.names();
        names.sort_unstable();
        assert_eq!(names, parameters.iter().map(|tensor| tensor.name.as_str()).collect::<Vec<_>>(), "{}", json.display());
        for tensor in &parameters {
            let view = ours.tensor(&tensor.name).unwrap();
            assert!(view.shape() == tensor.shape && view.data() == case.tensor(&tensor.name).unwrap().data(), "{}", tensor.name);
        }
        n_cases += 1;
        let projects = network.layers.iter().any(|layer| layer.projection > 0);
        let onnx = to_bytes(Format::Onnx, &network, &about(Part::Lstm), &torchs.tensors).map_err(|e| e.to_string());
        if projects {
            assert!(onnx.unwrap_err().contains("does not project its state, as `lstm.weight_hr_l0` does"), "{}", json.display());
        } else if let (Some(dir), Some(stem)) = (std::env::var_os(SAMPLES), json.file_stem()) {
            let dir = PathBuf::from(dir).join("torch");
            fs::create_dir_all(&dir).unwrap();
            fs::copy(&json, dir.join(stem).with_extension("json")).unwrap();
            fs::copy(json.with_extension("f32.safetensors"), dir.join(stem).with_extension("safetensors")).unwrap();
            write(&dir.join(stem).with_extension("onnx"), Format::Onnx, &network, &about(Part::Lstm), &torchs.tensors).unwrap();
        }
    }
    assert!(n_cases >= 4, "only {n_cases} cases");
}

/// A trained run of each task.
fn trained(folder: &Path) -> Vec<(PathBuf, RunConfig)> {
    let text = folder.join("text.txt");
    fs::write(&text, runs::text(900)).unwrap();
    let table = folder.join("series.csv");
    let rows = (0..160).map(|i| format!("{},{}\n", (f64::from(i) / 5.0).sin(), f64::from(i) * 0.1));
    fs::write(&table, format!("a,b\n{}", rows.collect::<String>())).unwrap();
    let lm = RunConfig { tied: true, layers: 2, ..runs::config(Task::Lm, &[&text]) };
    let forecast = RunConfig { no_bias: true, hidden: 9.into(), ..runs::config(Task::Forecast, &[&table]) };
    [("lm", lm), ("forecast", forecast)]
        .into_iter()
        .map(|(name, config)| {
            let out = folder.join(name);
            runs::train(&config, &out, false).outcome.unwrap();
            (out, config)
        })
        .collect()
}

fn test_loss(run: &Path) -> f64 {
    let mut session = Session::open(run, Which::Selected, open::cpu(1).unwrap()).unwrap();
    let (config, spec) = (session.config.clone(), session.spec.clone());
    let set = Corpus::load(&config, Some(&spec)).unwrap().eval_set(&config, DataPart::Test).unwrap().unwrap();
    evaluate(&set, &mut session).unwrap().loss
}

#[test]
fn an_imported_run_says_what_the_exported_one_said_and_trains_on() {
    let folder = tempfile::tempdir().unwrap();
    for (run, config) in trained(folder.path()) {
        for format in FORMATS {
            let file = run.with_extension("onnx").with_extension(format.to_string());
            exchange::export(&run, Which::Selected, format, Part::All, &file).unwrap();
            let read_back = read(&file).unwrap();
            assert_eq!(read_back.about.as_ref().unwrap().step, 20);
            let out = folder.path().join(format!("{}-{format}", config.task.name()));
            let recorded: RunConfig = toml::from_str(&read_back.about.as_ref().unwrap().config).unwrap();
            assert_eq!(recorded, read_config(&RunFolder::read(&run).unwrap()).unwrap());
            let (summary, warnings) = exchange::import(read_back, &recorded, false, &out).unwrap();
            assert_eq!((warnings, &summary["fresh"]), (Vec::new(), &json!([])));
            assert_eq!(test_loss(&out), test_loss(&run), "{format}");
            // Training begins from there: step 1 has the loss of the imported parameters, not of fresh ones.
            let ran = runs::train(&config, &out, true);
            let fresh = runs::train(&config, &folder.path().join(format!("{}-{format}-fresh", config.task.name())), false);
            assert_eq!(ran.outcome.unwrap().summary["steps"], 20);
            assert_ne!(ran.losses[0], fresh.losses[0]);
            assert!(ran.losses[0] < fresh.losses[0], "{} {}", ran.losses[0], fresh.losses[0]);
        }
    }
}

#[test]
fn a_bare_lstm_gets_a_fresh_embedding_and_head_with_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    for (run, config) in trained(folder.path()) {
        let file = run.with_extension("safetensors");
        exchange::export(&run, Which::Last, Format::Safetensors, Part::Lstm, &file).unwrap();
        let out = folder.path().join(format!("{}-again", config.task.name()));
        let (summary, warnings) = exchange::import(read(&file).unwrap(), &config, true, &out).unwrap();
        let fresh = if config.task == Task::Lm { json!(["embedding.weight", "head.bias"]) } else { json!(["head.weight", "head.bias"]) };
        assert_eq!(summary["fresh"], fresh);
        assert!(warnings.iter().any(|w| w.contains("head.bias") && w.contains("--seed 1")), "{warnings:?}");
        assert!(test_loss(&out).is_finite());
    }
}

#[test]
fn what_cannot_be_exported_or_imported_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let (run, config) = trained(folder.path()).remove(0);
    let inside = run.join("model.safetensors");
    let error = exchange::export(&run, Which::Selected, Format::Safetensors, Part::All, &inside).unwrap_err().to_string();
    assert!(error.contains("lies in the run folder") && !inside.exists(), "{error}");
    let checkpoint = fs::read_dir(run.join("checkpoints")).unwrap().next().unwrap().unwrap().path();
    assert!(read(&checkpoint).unwrap_err().to_string().contains("this is a checkpoint"));

    let file = folder.path().join("m.onnx");
    exchange::export(&run, Which::Selected, Format::Onnx, Part::All, &file).unwrap();
    let error = exchange::import(read(&file).unwrap(), &config, false, &run).unwrap_err().to_string();
    assert!(error.contains("already holds a run"), "{error}");
    let out = folder.path().join("other");
    let wider = RunConfig { hidden: 20.into(), embedding: 20, ..config };
    let error = exchange::import(read(&file).unwrap(), &wider, false, &out).unwrap_err().to_string();
    assert!(error.contains("tensor `embedding.weight` has shape") && !out.exists(), "{error}");
}
