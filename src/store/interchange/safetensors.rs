//! PyTorch's names, shapes and orders in a safetensors file.
//!
//! A module with `embedding`, `lstm` and `head` loads the whole file strictly, so `head.weight` is written also where it is the embedding's.
//! The LSTM alone has the bare names of `torch.nn.LSTM`. Read is any file whose LSTM stands under one prefix, whatever that is.
//! What must not be here: what the names mean.

use std::collections::BTreeMap;
use std::path::Path;

use super::super::checkpoint::{self, NamedTensor, le_bytes};
use super::{About, EMBEDDING, Format, HEAD_WEIGHT, InterchangeError, LSTM, ModelFile, Network, Part, Result, foreign, sealed};

/// What tells an LSTM's first tensor, behind its prefix.
const FIRST: &str = "weight_ih_l0";

pub(super) fn to_bytes(network: &Network, about: &About, mut tensors: Vec<NamedTensor>) -> Result<Vec<u8>> {
    if let (Part::Lstm, Some(reason)) = (about.part, &network.beyond_torch) {
        return Err(InterchangeError::BeyondTorch { reason: reason.clone() });
    }
    if network.tied {
        let embedding = tensors.iter().find(|tensor| tensor.name == EMBEDDING).cloned();
        tensors.extend(embedding.map(|embedding| NamedTensor { name: HEAD_WEIGHT.to_owned(), ..embedding }));
    }
    let mut strings = sealed(about, &tensors);
    // What readers of PyTorch's world look for.
    strings.insert("format".to_owned(), "pt".to_owned());
    if about.part == Part::Lstm {
        for tensor in &mut tensors {
            tensor.name = tensor.name.trim_start_matches(LSTM).to_owned();
        }
    }
    let encoded = checkpoint::encode(&strings, checkpoint::sorted(&tensors)?)?;
    let mut bytes = encoded.header;
    encoded.tensors.iter().for_each(|tensor| bytes.extend_from_slice(&le_bytes(&tensor.data)));
    Ok(bytes)
}

pub(super) fn from_bytes(bytes: &[u8], path: &Path) -> Result<ModelFile> {
    let (metadata, data) = checkpoint::parse(bytes, path)?;
    let mut strings: BTreeMap<String, String> =
        metadata.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
    if strings.contains_key("carrousel") {
        return Err(foreign(
            path,
            "this is a checkpoint, which is part of a run, or what `evaluate --output` wrote: write the run's model with `carrousel export`, and import that",
        ));
    }
    strings.remove("format");
    let mut tensors = checkpoint::named_tensors(&metadata, data, path)?;

    let prefixes: Vec<String> = tensors.iter().filter_map(|tensor| tensor.name.strip_suffix(FIRST)).map(str::to_owned).collect();
    let prefix = match &prefixes[..] {
        [prefix] => prefix.clone(),
        [] => return Err(foreign(path, format!("it holds no tensor `{FIRST}` under any prefix, so no LSTM under PyTorch's names"))),
        several => {
            let names: Vec<String> = several.iter().map(|prefix| format!("`{prefix}{FIRST}`")).collect();
            return Err(foreign(path, format!("it holds several LSTMs, of {}: leave one in it", names.join(", "))));
        }
    };
    for tensor in &mut tensors {
        let is_part = |rest: &&str| ["weight_", "bias_", "norm_", "initial_"].iter().any(|start| rest.starts_with(start));
        if let Some(rest) = tensor.name.strip_prefix(&prefix).filter(is_part) {
            tensor.name = format!("{LSTM}{rest}");
        }
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let about = About::read(path, strings, &tensors)?;
    Ok(ModelFile { path: path.to_path_buf(), format: Format::Safetensors, about, tensors, coupled: false })
}
