//! One checkpoint: named tensors and what else a run needs to go on, in one safetensors file with a checksum.
//!
//! The file is plain safetensors (8 bytes length, a JSON header padded with spaces to a multiple of 8, the data), so that PyTorch reads the
//! tensors as they are. The header's `__metadata__` holds strings:
//!
//! | key | value |
//! | --- | --- |
//! | `carrousel` | the caller's state as JSON, an object with at least `step` |
//! | `format_version` | [`FORMAT_VERSION`] |
//! | `select`, `valid_loss` | what the run folder needs to rebuild `checkpoints.json`, where known |
//! | `sha256` | over the strings above and all tensors in the order of their names, each with name, shape and bytes |
//!
//! The header is written here and not by the `safetensors` crate because the crate orders `__metadata__` by a random hash: same content,
//! same bytes is a promise. What must not be here: which tensors there are, folders, other files.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::storage::{Disk, Storage, StorageFile};
use super::{Result, Select, StoreError};
use crate::params::Tensor;

/// Version of the format written; files of a later version are refused.
pub const FORMAT_VERSION: u32 = 1;
/// The longest header that readers of safetensors accept.
const MAX_HEADER_BYTES: u64 = 100_000_000;
const LEN_BYTES: usize = 8;

/// A tensor by its name at the border: PyTorch's names, shapes and orders; row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    pub name: String,
    pub shape: Vec<usize>,
    /// As many values as the product of `shape`; one for an empty shape.
    pub data: Vec<f32>,
}

/// The state of a run at one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// A JSON object with at least `step`, a whole number. A number that must return bit for bit and may be no number goes in as its bits.
    pub meta: Value,
    /// After loading in the order of their names.
    pub tensors: Vec<NamedTensor>,
}

/// What the run folder writes into a checkpoint besides the caller's content.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Notes {
    /// Mean loss over the validation part; finite.
    pub valid_loss: Option<f64>,
    pub select: Option<Select>,
}

impl Checkpoint {
    /// The step in `meta`.
    ///
    /// # Errors
    /// `meta` has no `step`, or it is no whole number.
    pub fn step(&self) -> Result<u64> {
        self.meta
            .get("step")
            .and_then(Value::as_u64)
            .ok_or_else(|| StoreError::Unwritten { reason: "its state has no `step` that is a whole number".to_owned() })
    }

    /// Moves the values of tensor `name` out.
    ///
    /// # Errors
    /// There is none of that name (or it was taken before), or its shape differs; a tensor of another shape stays where it is.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let idx = self.tensors.iter().position(|t| t.name == name).ok_or_else(|| StoreError::TensorMissing { name: name.to_owned() })?;
        if self.tensors[idx].shape != shape {
            return Err(StoreError::TensorShape {
                name: name.to_owned(),
                found: self.tensors[idx].shape.clone(),
                expected: shape.to_vec(),
            });
        }
        Ok(self.tensors.remove(idx).data)
    }

    /// Moves a model's parameters out, in this order, and sees to it that no other parameter is left: a model that leaves some out computes
    /// something else. A tied head may stand beside its embedding.
    ///
    /// # Errors
    /// As [`Self::take`]; a parameter that the model has no place for.
    pub fn take_model(&mut self, tensors: &[Tensor]) -> Result<Vec<Vec<f32>>> {
        let params = tensors.iter().map(|t| self.take(&t.name, &t.shape)).collect::<Result<_>>()?;
        let is_left = |name: &str| ["embedding.", "lstm."].iter().any(|of_model| name.starts_with(of_model)) || name == "head.bias";
        match self.tensors.iter().find(|t| is_left(&t.name)) {
            Some(left) => Err(StoreError::TensorLeft { name: left.name.clone() }),
            None => Ok(params),
        }
    }

    /// The bytes of the file; the same content gives the same bytes, in whatever order the tensors come.
    ///
    /// # Errors
    /// See [`StoreError::Unwritten`]: no `step`, a name twice, data that does not fill the shape.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let encoded = self.encode(Notes::default())?;
        let mut bytes = encoded.header;
        for tensor in encoded.tensors {
            bytes.extend_from_slice(&le_bytes(&tensor.data));
        }
        Ok(bytes)
    }

    /// Reads what [`Self::to_bytes`] wrote, verifying the checksum. `path` is what errors name.
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self> {
        decode(bytes, path).map(|(checkpoint, _)| checkpoint)
    }

    /// Reads a checkpoint, verifying its checksum.
    ///
    /// # Errors
    /// Typed: not found, cut off, damaged, checksum, foreign, of a newer version.
    pub fn load(path: &Path) -> Result<Self> {
        load(&Disk, path).map(|(checkpoint, _)| checkpoint)
    }

    pub(super) fn encode(&self, notes: Notes) -> Result<Encoded<'_>> {
        let refuse = |reason: String| StoreError::Unwritten { reason };
        self.step()?;
        let tensors = sorted(&self.tensors)?;
        let mut strings = BTreeMap::from([
            ("carrousel", serde_json::to_string(&self.meta).map_err(|e| refuse(e.to_string()))?),
            ("format_version", FORMAT_VERSION.to_string()),
        ]);
        // As strings: what Rust prints, it reads back to the bit.
        notes.valid_loss.and_then(|loss| strings.insert("valid_loss", loss.to_string()));
        notes.select.and_then(|select| strings.insert("select", select.to_string()));

        let mut checksum = Checksum::new(strings.iter().map(|(k, v)| (*k, v.as_str())));
        for tensor in &tensors {
            checksum.tensor(&tensor.name, &tensor.shape, &le_bytes(&tensor.data));
        }
        strings.insert("sha256", checksum.hex());
        encode(&strings, tensors)
    }
}

/// The tensors in the order of their names, which differ, each as long as its shape says.
pub(super) fn sorted(tensors: &[NamedTensor]) -> Result<Vec<&NamedTensor>> {
    let refuse = |reason: String| StoreError::Unwritten { reason };
    let mut tensors: Vec<&NamedTensor> = tensors.iter().collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(refuse(format!("it has two tensors named `{}`", pair[0].name)));
    }
    for tensor in &tensors {
        if tensor.name == "__metadata__" {
            return Err(refuse("`__metadata__` is no name for a tensor".to_owned()));
        }
        let len = tensor.shape.iter().try_fold(1_usize, |len, &n| len.checked_mul(n));
        if len != Some(tensor.data.len()) {
            return Err(refuse(format!("tensor `{}` of shape {:?} has {} values", tensor.name, tensor.shape, tensor.data.len())));
        }
    }
    Ok(tensors)
}

/// A safetensors file of these strings and [`sorted`] tensors.
pub(super) fn encode<'a, K: serde::Serialize + Ord>(strings: &BTreeMap<K, String>, tensors: Vec<&'a NamedTensor>) -> Result<Encoded<'a>> {
    let refuse = |reason: String| StoreError::Unwritten { reason };
    let json = |e: serde_json::Error| refuse(e.to_string());
    let mut text = format!("{{\"__metadata__\":{}", serde_json::to_string(strings).map_err(json)?);
    let mut start = 0;
    for tensor in &tensors {
        let end = start + size_of_val(tensor.data.as_slice());
        let name = serde_json::to_string(&tensor.name).map_err(json)?;
        let shape = serde_json::to_string(&tensor.shape).map_err(json)?;
        text.push_str(&format!(",{name}:{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[{start},{end}]}}"));
        start = end;
    }
    text.push('}');
    let padded = text.len().next_multiple_of(LEN_BYTES);
    if padded as u64 > MAX_HEADER_BYTES {
        return Err(refuse(format!("its header would have {padded} bytes, at most {MAX_HEADER_BYTES} can be read back")));
    }
    let mut header = (padded as u64).to_le_bytes().to_vec();
    header.extend_from_slice(text.as_bytes());
    header.resize(LEN_BYTES + padded, b' ');
    Ok(Encoded { header, tensors })
}

/// A checkpoint ready to be written: the header, then the data of the tensors in this order.
pub(super) struct Encoded<'a> {
    pub header: Vec<u8>,
    pub tensors: Vec<&'a NamedTensor>,
}

impl Encoded<'_> {
    pub fn write(&self, file: &mut dyn StorageFile) -> std::io::Result<()> {
        file.write(&self.header)?;
        self.tensors.iter().try_for_each(|tensor| file.write(&le_bytes(&tensor.data)))
    }
}

/// Reads and verifies the file at `path`.
pub(super) fn load(storage: &dyn Storage, path: &Path) -> Result<(Checkpoint, Notes)> {
    decode(&storage.read(path).map_err(|e| StoreError::io("read", path, e))?, path)
}

/// Reads the tensors of a safetensors file that something else wrote, in the order of their names. Nothing is verified but the form.
///
/// # Errors
/// As [`Checkpoint::load`]; a tensor that is not F32 is refused by its name.
pub fn load_foreign(path: &Path) -> Result<Vec<NamedTensor>> {
    let bytes = Disk.read(path).map_err(|e| StoreError::io("read", path, e))?;
    let (metadata, data) = parse(&bytes, path)?;
    named_tensors(&metadata, data, path)
}

fn decode(bytes: &[u8], path: &Path) -> Result<(Checkpoint, Notes)> {
    let damaged = |reason: String| StoreError::Damaged { path: path.to_path_buf(), reason };
    let (metadata, data) = parse(bytes, path)?;
    let mut strings: BTreeMap<&str, &str> =
        metadata.metadata().iter().flatten().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let Some(&meta) = strings.get("carrousel") else {
        return Err(StoreError::Foreign { path: path.to_path_buf() });
    };
    let version = strings.get("format_version").copied().unwrap_or_default();
    match version.parse::<u32>() {
        Ok(found) if found > FORMAT_VERSION => {
            return Err(StoreError::NewerFormat { path: path.to_path_buf(), found, supported: FORMAT_VERSION });
        }
        Ok(1..) => {}
        _ => return Err(damaged(format!("its format version is `{version}`"))),
    }
    let expected = strings.remove("sha256").ok_or_else(|| damaged("it has no checksum".to_owned()))?;

    let tensors = named_tensors(&metadata, data, path)?;
    let mut checksum = Checksum::new(strings.iter().map(|(k, v)| (*k, *v)));
    for tensor in &tensors {
        checksum.tensor(&tensor.name, &tensor.shape, &le_bytes(&tensor.data));
    }
    let found = checksum.hex();
    if found != expected {
        return Err(StoreError::Checksum { path: path.to_path_buf(), found, expected: expected.to_owned() });
    }

    let meta = serde_json::from_str(meta).map_err(|e| damaged(e.to_string()))?;
    let notes = Notes {
        valid_loss: strings.get("valid_loss").and_then(|loss| loss.parse().ok()),
        select: strings.get("select").and_then(|select| select.parse().ok()),
    };
    Ok((Checkpoint { meta, tensors }, notes))
}

/// Splits a safetensors file into its header and its data. The crate's own entry adds up sizes from the header without a guard, hence this.
pub(super) fn parse<'a>(bytes: &'a [u8], path: &Path) -> Result<(Metadata, &'a [u8])> {
    let found_bytes = bytes.len() as u64;
    let damaged = |reason: String| StoreError::Damaged { path: path.to_path_buf(), reason };
    let truncated = |expected_bytes| StoreError::Truncated { path: path.to_path_buf(), found_bytes, expected_bytes };

    let (len, rest) = bytes.split_first_chunk::<LEN_BYTES>().ok_or_else(|| truncated(LEN_BYTES as u64))?;
    let header_bytes = u64::from_le_bytes(*len);
    if header_bytes > MAX_HEADER_BYTES {
        return Err(damaged(format!("its header claims {header_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed")));
    }
    let data_start = LEN_BYTES as u64 + header_bytes;
    if data_start > found_bytes {
        return Err(truncated(data_start));
    }
    let (header, data) = rest.split_at(header_bytes as usize);
    let metadata: Metadata = serde_json::from_slice(header).map_err(|e| damaged(format!("its header is not readable ({e})")))?;
    let expected_bytes = data_start.saturating_add(metadata.data_len() as u64);
    if found_bytes < expected_bytes {
        return Err(truncated(expected_bytes));
    }
    if found_bytes > expected_bytes {
        return Err(damaged(format!("it has {found_bytes} bytes, its header accounts for {expected_bytes}")));
    }
    Ok((metadata, data))
}

pub(super) fn named_tensors(metadata: &Metadata, data: &[u8], path: &Path) -> Result<Vec<NamedTensor>> {
    let infos: BTreeMap<_, _> = metadata.tensors().into_iter().collect();
    infos
        .into_iter()
        .map(|(name, info)| {
            if info.dtype != Dtype::F32 {
                return Err(StoreError::Dtype { path: path.to_path_buf(), name, dtype: info.dtype.to_string() });
            }
            // The offsets were checked against the shape by the crate and against the file by `parse`.
            let (values, _) = data[info.data_offsets.0..info.data_offsets.1].as_chunks();
            let data = values.iter().map(|&value| f32::from_le_bytes(value)).collect();
            Ok(NamedTensor { name, shape: info.shape.clone(), data })
        })
        .collect()
}

/// The values as they lie in the file: little-endian.
pub(super) fn le_bytes(values: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        Cow::Borrowed(bytemuck::cast_slice(values))
    } else {
        Cow::Owned(values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }
}

/// SHA-256 over strings and tensors. Every part goes in with its length before it, so that no two contents give the same stream.
pub(super) struct Checksum(Sha256);

impl Checksum {
    /// `strings` in the order of their keys.
    pub fn new<'a>(strings: impl ExactSizeIterator<Item = (&'a str, &'a str)>) -> Self {
        let mut checksum = Self(Sha256::new());
        checksum.number(strings.len());
        for (key, value) in strings {
            checksum.part(key.as_bytes());
            checksum.part(value.as_bytes());
        }
        checksum
    }

    pub fn tensor(&mut self, name: &str, shape: &[usize], bytes: &[u8]) {
        self.part(name.as_bytes());
        self.number(shape.len());
        shape.iter().for_each(|&n| self.number(n));
        self.part(bytes);
    }

    fn part(&mut self, bytes: &[u8]) {
        self.number(bytes.len());
        self.0.update(bytes);
    }

    fn number(&mut self, n: usize) {
        self.0.update((n as u64).to_le_bytes());
    }

    pub fn hex(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
