//! Checkpoints and the run folder: same content same bytes, every damage is noticed, and a kill or a power cut at any call leaves the former
//! or the new checkpoint.

mod sim_disk;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use carrousel::store::checkpoint::load_foreign;
use carrousel::store::storage::{Storage, TEMP_SUFFIX};
use carrousel::store::{Checkpoint, NamedTensor, RunFolder, Select, StoreError, Which, default_run_path, default_run_path_at};
use proptest::prelude::*;
use serde_json::json;

use sim_disk::{Fault, SimDisk};

fn tensor(name: &str, shape: &[usize], data: &[f32]) -> NamedTensor {
    NamedTensor { name: name.to_owned(), shape: shape.to_vec(), data: data.to_vec() }
}

/// A small checkpoint whose content says its step; its tensors are in the order of their names, as after loading.
fn checkpoint(step: u64) -> Checkpoint {
    let x = step as f32;
    Checkpoint {
        meta: json!({ "step": step, "epoch": 1, "seed": u64::MAX, "data": { "position": [step, 2] } }),
        tensors: vec![
            tensor("head.bias", &[3], &[x, -0.0, f32::NEG_INFINITY]),
            tensor("lstm.weight_ih_l0", &[2, 2], &[x + 0.5, 1e-45, -1.0, 3.0]),
            tensor("state.h", &[0, 4], &[]),
        ],
    }
}

fn write_step(dir: &Path, step: u64, valid_loss: Option<f64>) {
    RunFolder::open_or_create(dir).unwrap().save(&checkpoint(step), valid_loss, 9, Select::Best).unwrap();
}

fn checkpoint_path(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("checkpoints/step-{step:08}.safetensors"))
}

fn checkpoint_files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir.join("checkpoints")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn flip_last_byte(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 0x10;
    fs::write(path, bytes).unwrap();
}

/// Writes another version into the bytes of a checkpoint.
fn set_version(bytes: &mut [u8], version: u8) {
    let key = br#""format_version":""#;
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len();
    bytes[at] = version;
}

// One checkpoint.

#[test]
fn a_checkpoint_returns_bit_for_bit() {
    let mut saved = checkpoint(300);
    saved.tensors[0].data[1] = f32::from_bits(0x7fc0_1234);
    let loaded = Checkpoint::from_bytes(&saved.to_bytes().unwrap(), Path::new("x")).unwrap();
    assert_eq!(loaded.meta, saved.meta);
    for (a, b) in loaded.tensors.iter().zip(&saved.tensors) {
        assert_eq!((&a.name, &a.shape), (&b.name, &b.shape));
        assert_eq!(a.data.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), b.data.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
    }
    assert_eq!(loaded.tensors.len(), saved.tensors.len());
}

#[test]
fn numbers_in_the_state_return_bit_for_bit() {
    let mut bits: u64 = 1;
    for _ in 0..2000 {
        bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let value = f64::from_bits(bits);
        if value.is_finite() {
            let saved = Checkpoint { meta: json!({ "step": 1, "lr": value }), tensors: vec![] };
            let loaded = Checkpoint::from_bytes(&saved.to_bytes().unwrap(), Path::new("x")).unwrap();
            assert_eq!(loaded.meta["lr"].as_f64().unwrap().to_bits(), value.to_bits(), "{value:e}");
        }
    }
}

#[test]
fn the_same_content_gives_the_same_bytes_in_whatever_order_it_comes() {
    let bytes = checkpoint(7).to_bytes().unwrap();
    for _ in 0..20 {
        let mut other = checkpoint(7);
        other.tensors.reverse();
        assert_eq!(other.to_bytes().unwrap(), bytes);
    }
    let loaded = Checkpoint::from_bytes(&bytes, Path::new("x")).unwrap();
    assert_eq!(loaded.to_bytes().unwrap(), bytes);
    assert_ne!(checkpoint(8).to_bytes().unwrap(), bytes);
}

#[test]
fn the_safetensors_crate_reads_what_we_write() {
    let bytes = checkpoint(5).to_bytes().unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let weight = file.tensor("lstm.weight_ih_l0").unwrap();
    assert_eq!((weight.dtype(), weight.shape()), (safetensors::Dtype::F32, [2, 2].as_slice()));
    assert_eq!(weight.data()[..4], 5.5_f32.to_le_bytes());
    let (header_bytes, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header_bytes % 8, 0);
    let mut keys: Vec<_> = metadata.metadata().as_ref().unwrap().keys().cloned().collect();
    keys.sort();
    assert_eq!(keys, ["carrousel", "format_version", "sha256"]);
}

#[test]
fn any_changed_byte_is_an_error_or_blank_padding() {
    let saved = checkpoint(3);
    let bytes = saved.to_bytes().unwrap();
    let header_end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut n_harmless = 0;
    for byte_idx in 0..bytes.len() {
        for mask in 1..=255_u8 {
            let mut damaged = bytes.clone();
            damaged[byte_idx] ^= mask;
            if let Ok(loaded) = Checkpoint::from_bytes(&damaged, Path::new("x")) {
                assert_eq!(loaded.to_bytes().unwrap(), bytes, "byte {byte_idx} changed by {mask:#x} went unnoticed");
                assert!((8..header_end).contains(&byte_idx) && bytes[byte_idx] == b' ', "byte {byte_idx} is no padding");
                n_harmless += 1;
            }
        }
    }
    assert!(n_harmless < 8 * 3, "{n_harmless} changes went through, more than blanks for blanks");
}

#[test]
fn any_cut_or_addition_is_an_error_that_says_so() {
    let bytes = checkpoint(3).to_bytes().unwrap();
    for len in 0..bytes.len() {
        let error = Checkpoint::from_bytes(&bytes[..len], Path::new("x/step-3")).unwrap_err();
        assert!(matches!(error, StoreError::Truncated { found_bytes, .. } if found_bytes == len as u64), "length {len}: {error}");
        assert!(error.to_string().contains("x/step-3"), "{error}");
    }
    let longer = [bytes.as_slice(), b"\0"].concat();
    assert!(matches!(Checkpoint::from_bytes(&longer, Path::new("x")), Err(StoreError::Damaged { .. })));
}

#[test]
fn a_wrong_checksum_names_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("one.safetensors");
    let mut bytes = checkpoint(3).to_bytes().unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = Checkpoint::load(&path).unwrap_err();
    assert!(matches!(error, StoreError::Checksum { .. }), "{error}");
    assert!(error.to_string().contains("one.safetensors"), "{error}");
}

#[test]
fn a_missing_file_is_an_error_of_its_own() {
    let error = Checkpoint::load(Path::new("/nowhere/at/all.safetensors")).unwrap_err();
    assert!(matches!(error, StoreError::NotFound { .. }));
    assert_eq!(error.to_string(), "/nowhere/at/all.safetensors does not exist");
}

/// A safetensors file as other programs write it.
fn foreign_bytes(dtype: &str, value_bytes: usize) -> Vec<u8> {
    let header = format!(
        r#"{{"b":{{"dtype":"F32","shape":[],"data_offsets":[0,4]}},"a":{{"dtype":"{dtype}","shape":[2],"data_offsets":[4,{}]}}}}"#,
        4 + 2 * value_bytes
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.extend(1.5_f32.to_le_bytes());
    bytes.extend(std::iter::repeat_n(0, 2 * value_bytes));
    bytes
}

#[test]
fn a_foreign_safetensors_file_is_no_checkpoint_but_gives_its_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("torch.safetensors");
    fs::write(&path, foreign_bytes("F32", 4)).unwrap();
    assert!(matches!(Checkpoint::load(&path), Err(StoreError::Foreign { .. })));
    assert_eq!(load_foreign(&path).unwrap(), [tensor("a", &[2], &[0.0, 0.0]), tensor("b", &[], &[1.5])]);
}

#[test]
fn a_foreign_tensor_of_another_type_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("torch.safetensors");
    fs::write(&path, foreign_bytes("F64", 8)).unwrap();
    let error = load_foreign(&path).unwrap_err().to_string();
    assert!(error.contains("tensor `a` is F64"), "{error}");
}

#[test]
fn a_newer_format_is_refused_with_both_versions() {
    let mut newer = checkpoint(3).to_bytes().unwrap();
    set_version(&mut newer, b'7');
    let error = Checkpoint::from_bytes(&newer, Path::new("x")).unwrap_err();
    assert!(matches!(error, StoreError::NewerFormat { found: 7, supported: 1, .. }), "{error}");
}

#[test]
fn headers_with_absurd_sizes_are_errors() {
    let huge = usize::MAX / 32;
    let mut headers = vec!["{}".to_owned(), "[]".to_owned(), r#"{"__metadata__":{"carrousel":"{}"}}"#.to_owned()];
    headers.push(format!(r#"{{"a":{{"dtype":"F32","shape":[{huge},{huge}],"data_offsets":[0,4]}}}}"#));
    // Each tensor as large as can be counted in bits, up to the last byte that can be addressed.
    let step = (1_u64 << 59) - 1;
    let tensors: Vec<String> = (0..8)
        .map(|i| format!(r#""t{i}":{{"dtype":"F32","shape":[{step}],"data_offsets":[{},{}]}}"#, i * step * 4, (i + 1) * step * 4))
        .collect();
    headers.push(format!("{{{}}}", tensors.join(",")));
    for header in headers {
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
        assert!(Checkpoint::from_bytes(&bytes, Path::new("x")).is_err(), "{header}");
    }
    assert!(Checkpoint::from_bytes(&[0xff; 64], Path::new("x")).is_err());
}

proptest! {
    #[test]
    fn no_bytes_make_loading_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), header_bytes in 0_u64..220) {
        let _ = Checkpoint::from_bytes(&bytes, Path::new("x"));
        let framed = [&header_bytes.to_le_bytes(), bytes.as_slice()].concat();
        prop_assert!(Checkpoint::from_bytes(&framed, Path::new("x")).is_err());
    }
}

#[test]
fn tensors_are_taken_by_name_and_shape() {
    let mut loaded = checkpoint(4);
    let error = loaded.take("head.bias", &[3, 1]).unwrap_err().to_string();
    assert_eq!(error, "tensor `head.bias` has shape [3] in the checkpoint, [3, 1] is expected");
    assert_eq!(loaded.take("head.bias", &[3]).unwrap()[0], 4.0);
    let error = loaded.take("head.bias", &[3]).unwrap_err().to_string();
    assert_eq!(error, "the checkpoint has no tensor `head.bias`");
}

#[test]
fn what_could_not_be_read_back_is_not_written() {
    let with = |meta, tensors| Checkpoint { meta, tensors }.to_bytes().map_err(|e| e.to_string());
    let step = json!({ "step": 1 });
    assert!(with(json!({}), vec![]).unwrap_err().contains("no `step`"));
    assert!(with(json!({ "step": -1 }), vec![]).unwrap_err().contains("no `step`"));
    assert!(with(json!([1]), vec![]).unwrap_err().contains("no `step`"));
    assert!(with(step.clone(), vec![tensor("a", &[], &[1.0]), tensor("a", &[], &[1.0])]).unwrap_err().contains("two tensors named `a`"));
    assert!(with(step.clone(), vec![tensor("a", &[2, 3], &[1.0])]).unwrap_err().contains("`a` of shape [2, 3] has 1 values"));
    assert!(with(step.clone(), vec![tensor("__metadata__", &[], &[1.0])]).unwrap_err().contains("no name"));
    assert!(with(step, vec![tensor("\"odd\\ \u{1f600}", &[], &[1.0])]).is_ok());
}

// The run folder.

#[test]
fn a_fresh_start_in_the_folder_of_another_run_is_refused_with_the_remedy() {
    for file in ["config.toml", "metrics.jsonl", "checkpoints.json", "checkpoints/step-00000001.safetensors"] {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("checkpoints")).unwrap();
        fs::write(dir.path().join(file), "").unwrap();
        let error = RunFolder::create(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::HoldsRun { .. }), "{file}: {error}");
        let message = error.to_string();
        assert!(message.contains(dir.path().to_str().unwrap()) && message.contains("--resume") && message.contains("--out"), "{message}");
        assert!(RunFolder::check_free(dir.path()).is_err(), "{file}");
        assert!(!dir.path().join(".lock").exists(), "a refused folder was touched");
    }
}

#[test]
fn what_a_start_without_a_checkpoint_left_is_no_run() {
    let dir = tempfile::tempdir().unwrap();
    let first = RunFolder::create(dir.path()).unwrap();
    for file in ["config.toml", "metrics.jsonl"] {
        first.write_file(file, b"left").unwrap();
    }
    drop(first);
    assert!(!RunFolder::is_begun(dir.path()).unwrap());
    RunFolder::check_free(dir.path()).unwrap();
    let mut second = RunFolder::create(dir.path()).unwrap();
    second.save(&checkpoint(1), None, 1, Select::Last).unwrap();
    drop(second);
    assert!(RunFolder::is_begun(dir.path()).unwrap());
    assert!(matches!(RunFolder::create(dir.path()), Err(StoreError::HoldsRun { .. })));
}

#[test]
fn a_fresh_start_takes_an_empty_folder_a_new_one_and_one_with_other_files() {
    let dir = tempfile::tempdir().unwrap();
    drop(RunFolder::create(dir.path().join("a/b/c")).unwrap());
    fs::write(dir.path().join("notes.txt"), "mine").unwrap();
    let run = RunFolder::create(dir.path()).unwrap();
    assert!(run.path().is_absolute());
    assert!(!run.has_checkpoints());
    assert_eq!(fs::read(dir.path().join("notes.txt")).unwrap(), b"mine");
    drop(run);
    // Refused as to its lock only: nothing was written yet.
    drop(RunFolder::create(dir.path()).unwrap());
}

#[test]
fn a_folder_that_cannot_be_written_is_refused_with_path_and_reason() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let path = dir.path().join("file/run");
    for error in [RunFolder::create(&path).unwrap_err(), RunFolder::open_or_create(&path).unwrap_err()] {
        let StoreError::Unwritable { source, .. } = &error else { panic!("{error}") };
        assert!(error.to_string().contains(path.to_str().unwrap()) && error.to_string().contains(&source.to_string()), "{error}");
    }
    for k in 0..2 {
        let disk = SimDisk::new();
        disk.fail_at(k, Fault::Error);
        assert!(matches!(RunFolder::create_with(Arc::new(disk), "/run"), Err(StoreError::Unwritable { .. })));
    }
}

#[test]
fn a_second_opener_is_refused_while_the_first_lives() {
    let dir = tempfile::tempdir().unwrap();
    let first = RunFolder::create(dir.path()).unwrap();
    first.write_file("config.toml", b"").unwrap();
    for second in [RunFolder::create(dir.path()), RunFolder::open(dir.path()), RunFolder::open_or_create(dir.path())] {
        let error = second.unwrap_err();
        assert!(matches!(error, StoreError::Locked { .. }), "{error}");
        assert!(error.to_string().contains("in use by another process"), "{error}");
    }
    drop(RunFolder::read(dir.path()).unwrap());
    drop(first);
    drop(RunFolder::open(dir.path()).unwrap());
}

#[test]
fn opening_a_folder_without_a_run_is_an_error_and_leaves_it_alone() {
    let dir = tempfile::tempdir().unwrap();
    for path in [dir.path().to_path_buf(), dir.path().join("missing")] {
        assert!(matches!(RunFolder::open(&path), Err(StoreError::NotARun { .. })));
        assert!(matches!(RunFolder::read(&path), Err(StoreError::NotARun { .. })));
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_half_written_folder_can_be_started_again_under_resume() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("checkpoints")).unwrap();
    fs::write(dir.path().join("config.toml"), "lr = 0.").unwrap();
    fs::write(dir.path().join(format!("config.toml{TEMP_SUFFIX}")), "lr").unwrap();
    fs::write(dir.path().join(format!("checkpoints/step-00000001.safetensors{TEMP_SUFFIX}")), "half").unwrap();
    let mut run = RunFolder::open_or_create(dir.path()).unwrap();
    assert!(!run.has_checkpoints());
    assert!(matches!(run.load_newest(), Err(StoreError::NoCheckpoint { .. })));
    assert!(run.take_warnings().is_empty());
    assert!(checkpoint_files(dir.path()).is_empty(), "the temporary file of a killed process is cleared away");
    run.write_file("config.toml", b"lr = 0.1\n").unwrap();
    assert_eq!(run.read_file("config.toml").unwrap(), b"lr = 0.1\n");
    run.save(&checkpoint(1), None, 1, Select::Best).unwrap();
    let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, [".lock", "checkpoints", "checkpoints.json", "config.toml"]);
}

#[test]
fn a_reader_sees_a_run_in_training_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = RunFolder::create(dir.path()).unwrap();
    run.save(&checkpoint(1), Some(2.0), 1, Select::Best).unwrap();
    let mut reader = RunFolder::read(dir.path()).unwrap();
    assert!(matches!(reader.save(&checkpoint(2), None, 1, Select::Best), Err(StoreError::ReadOnly { .. })));
    assert!(matches!(reader.write_file("config.toml", b""), Err(StoreError::ReadOnly { .. })));
    run.save(&checkpoint(2), Some(1.0), 1, Select::Best).unwrap();
    assert_eq!(checkpoint_files(dir.path()), ["step-00000002.safetensors"]);
    // What the reader knows was pruned meanwhile: it looks again.
    assert_eq!(reader.load(Which::Selected).unwrap(), checkpoint(2));
}

#[test]
fn best_last_and_selected_are_named_and_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = RunFolder::create(dir.path()).unwrap();
    assert!(matches!(run.load(Which::Selected), Err(StoreError::NoCheckpoint { .. })));
    run.save(&checkpoint(100), None, 5, Select::Best).unwrap();
    assert!(matches!(run.load(Which::Best), Err(StoreError::NoBest { .. })));
    assert_eq!(run.load(Which::Selected).unwrap(), checkpoint(100), "without any validation loss the last is selected");

    let saved = run.save(&checkpoint(200), Some(1.25), 5, Select::Best).unwrap();
    assert!(saved.is_best && saved.warnings.is_empty());
    assert_eq!(saved.path, std::path::absolute(checkpoint_path(dir.path(), 200)).unwrap());
    assert!(!run.save(&checkpoint(300), Some(1.25), 5, Select::Best).unwrap().is_best, "of equals the earlier one is the best");
    assert!(!run.save(&checkpoint(400), Some(f64::NAN), 5, Select::Best).unwrap().is_best);
    assert_eq!(run.load(Which::Best).unwrap(), checkpoint(200));
    assert_eq!(run.load(Which::Selected).unwrap(), checkpoint(200));
    assert_eq!(run.load(Which::Last).unwrap(), checkpoint(400));
    assert_eq!(run.load(Which::Step(300)).unwrap(), checkpoint(300));

    let json: serde_json::Value = serde_json::from_slice(&fs::read(dir.path().join("checkpoints.json")).unwrap()).unwrap();
    assert_eq!(json["best"], json!({ "step": 200, "file": "checkpoints/step-00000200.safetensors", "valid_loss": 1.25 }));
    assert_eq!((&json["selected"], &json["last"]["step"], &json["last"]["valid_loss"]), (&json["best"], &json!(400), &json!(null)));

    run.save(&checkpoint(500), Some(3.0), 5, Select::Last).unwrap();
    assert_eq!(run.load(Which::Selected).unwrap(), checkpoint(500));
    drop(run);
    assert_eq!(RunFolder::open(dir.path()).unwrap().load(Which::Selected).unwrap(), checkpoint(500), "the choice is remembered");
}

#[test]
fn a_step_that_is_missing_lists_those_that_exist() {
    let dir = tempfile::tempdir().unwrap();
    write_step(dir.path(), 100, None);
    write_step(dir.path(), 250, None);
    let run = RunFolder::read(dir.path()).unwrap();
    let error = run.load(Which::Step(200)).unwrap_err().to_string();
    assert!(error.ends_with("has no checkpoint of step 200; there are: 100, 250"), "{error}");
    assert_eq!("250".parse(), Ok(Which::Step(250)));
    assert_eq!("best".parse(), Ok(Which::Best));
    assert!("newest".parse::<Which>().unwrap_err().contains("`newest`"));
}

#[test]
fn the_last_ones_and_the_best_are_kept() {
    let losses = [3.0, 1.0, 2.0, 2.5, 0.5, 0.9, 0.8, 0.7];
    for (keep, select, expected) in [
        (1, Select::Best, vec![vec![1], vec![2], vec![2, 3], vec![2, 4], vec![5], vec![5, 6], vec![5, 7], vec![5, 8]]),
        (0, Select::Last, vec![vec![1], vec![2], vec![2, 3], vec![2, 4], vec![5], vec![5, 6], vec![5, 7], vec![5, 8]]),
        (2, Select::Last, vec![vec![1], vec![1, 2], vec![2, 3], vec![2, 3, 4], vec![4, 5], vec![5, 6], vec![5, 6, 7], vec![5, 7, 8]]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut run = RunFolder::create(dir.path()).unwrap();
        for (i, steps) in expected.into_iter().enumerate() {
            run.save(&checkpoint(i as u64 + 1), Some(losses[i]), keep, select).unwrap();
            let names: Vec<String> = steps.iter().map(|step| format!("step-{step:08}.safetensors")).collect();
            assert_eq!(checkpoint_files(dir.path()), names, "keep {keep} after step {}", i + 1);
            assert_eq!(run.entries().iter().map(|entry| entry.step).collect::<Vec<_>>(), steps);
        }
    }
}

#[test]
fn an_old_file_that_cannot_be_removed_is_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = RunFolder::create(dir.path()).unwrap();
    run.save(&checkpoint(1), None, 1, Select::Best).unwrap();
    fs::remove_file(checkpoint_path(dir.path(), 1)).unwrap();
    let saved = run.save(&checkpoint(2), None, 1, Select::Best).unwrap();
    assert_eq!(saved.warnings.len(), 1);
    assert!(saved.warnings[0].contains("step-00000001"), "{:?}", saved.warnings);
}

#[test]
fn the_same_step_is_replaced_and_an_earlier_one_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = RunFolder::create(dir.path()).unwrap();
    run.save(&checkpoint(2), None, 1, Select::Best).unwrap();
    run.save(&checkpoint(2), Some(1.0), 1, Select::Best).unwrap();
    assert_eq!(run.best().unwrap().valid_loss, Some(1.0));
    assert!(matches!(run.save(&checkpoint(1), None, 1, Select::Best), Err(StoreError::OutOfOrder { step: 1, last: 2, .. })));
    assert_eq!(checkpoint_files(dir.path()), ["step-00000002.safetensors"]);
}

#[test]
fn a_damaged_newest_is_passed_over_with_a_warning_and_stays_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    for step in [100, 200, 300] {
        write_step(dir.path(), step, Some(1.0 / step as f64));
    }
    flip_last_byte(&checkpoint_path(dir.path(), 300));
    let damaged = fs::read(checkpoint_path(dir.path(), 300)).unwrap();

    let mut run = RunFolder::open_or_create(dir.path()).unwrap();
    assert!(matches!(run.load(Which::Selected), Err(StoreError::Checksum { .. } | StoreError::Damaged { .. })), "never replaced silently");
    let (loaded, warnings) = run.load_newest().unwrap();
    assert_eq!(loaded, checkpoint(200));
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].contains("step-00000300.safetensors"), "{warnings:?}");
    assert_eq!(run.last().unwrap().step, 200);

    // The run goes on from there; what it saves counts as the last, and the damaged file neither counts nor vanishes.
    run.save(&checkpoint(250), None, 1, Select::Best).unwrap();
    assert_eq!(fs::read(checkpoint_path(dir.path(), 300)).unwrap(), damaged);
    drop(run);
    let mut run = RunFolder::open(dir.path()).unwrap();
    assert!(run.take_warnings().iter().any(|warning| warning.contains("step-00000300")));
    assert_eq!(run.load_newest().unwrap(), (checkpoint(250), vec![]));
    assert_eq!(run.load(Which::Best).unwrap(), checkpoint(200));
    run.save(&checkpoint(300), None, 1, Select::Best).unwrap();
    assert_eq!(run.load(Which::Last).unwrap(), checkpoint(300));
}

#[test]
fn with_no_whole_checkpoint_the_run_stops() {
    let dir = tempfile::tempdir().unwrap();
    for step in [100, 200] {
        write_step(dir.path(), step, None);
    }
    fs::write(checkpoint_path(dir.path(), 100), b"").unwrap();
    fs::write(checkpoint_path(dir.path(), 200), foreign_bytes("F32", 4)).unwrap();
    let check = |error: StoreError| {
        assert!(matches!(error, StoreError::NoneWhole { .. }), "{error}");
        assert!(error.to_string().contains("step-00000100") && error.to_string().contains("step-00000200"), "{error}");
    };
    let mut run = RunFolder::open_or_create(dir.path()).unwrap();
    assert!(run.has_checkpoints());
    check(run.load_newest().unwrap_err());
    check(run.load_newest().unwrap_err());
    drop(run);
    fs::remove_file(dir.path().join("checkpoints.json")).unwrap();
    let mut run = RunFolder::open_or_create(dir.path()).unwrap();
    assert!(run.has_checkpoints());
    check(run.load_newest().unwrap_err());
    check(run.load(Which::Selected).unwrap_err());
}

#[test]
fn a_checkpoint_of_a_newer_carrousel_stops_the_resume() {
    let dir = tempfile::tempdir().unwrap();
    write_step(dir.path(), 1, None);
    write_step(dir.path(), 2, None);
    let path = checkpoint_path(dir.path(), 2);
    let mut bytes = fs::read(&path).unwrap();
    set_version(&mut bytes, b'2');
    fs::write(&path, bytes).unwrap();
    assert!(matches!(RunFolder::open(dir.path()).unwrap().load_newest(), Err(StoreError::NewerFormat { found: 2, .. })));
}

#[test]
fn a_damaged_or_missing_index_is_rebuilt_from_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let index = dir.path().join("checkpoints.json");
    let mut run = RunFolder::create(dir.path()).unwrap();
    run.write_file("config.toml", b"").unwrap();
    for (step, loss) in [(1, Some(0.1 + 0.2)), (2, None), (3, Some(0.7))] {
        run.save(&checkpoint(step), loss, 9, Select::Last).unwrap();
    }
    drop(run);
    let whole = fs::read(&index).unwrap();

    for n_bytes in (0..whole.len()).step_by(7) {
        fs::write(&index, &whole[..n_bytes]).unwrap();
        let mut run = RunFolder::open(dir.path()).unwrap();
        let warnings = run.take_warnings();
        assert!(warnings.len() == 1 && warnings[0].contains("checkpoints.json is damaged"), "cut to {n_bytes}: {warnings:?}");
        assert_eq!(fs::read(&index).unwrap(), whole, "cut to {n_bytes}");
    }
    fs::write(&index, String::from_utf8(whole.clone()).unwrap().replacen("0.7", "0.2", 1)).unwrap();
    assert!(RunFolder::open(dir.path()).unwrap().take_warnings()[0].contains("contradicts itself"));
    assert_eq!(fs::read(&index).unwrap(), whole);

    fs::remove_file(&index).unwrap();
    // A reader finds its way without writing.
    assert_eq!(RunFolder::read(dir.path()).unwrap().load(Which::Best).unwrap(), checkpoint(1));
    assert!(!index.exists());
    assert!(RunFolder::open(dir.path()).unwrap().take_warnings()[0].contains("checkpoints.json is missing"));
    assert_eq!(fs::read(&index).unwrap(), whole);
}

#[test]
fn a_file_that_the_index_names_and_is_gone_is_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    write_step(dir.path(), 1, Some(1.0));
    write_step(dir.path(), 2, Some(2.0));
    fs::remove_file(checkpoint_path(dir.path(), 1)).unwrap();
    let mut run = RunFolder::open(dir.path()).unwrap();
    assert!(run.take_warnings()[0].contains("checkpoints/step-00000001.safetensors"));
    assert_eq!(run.load(Which::Best).unwrap(), checkpoint(2));
}

#[test]
fn files_of_the_folder_have_plain_names() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunFolder::create(dir.path()).unwrap();
    for name in ["", "..", "a/b", "a\\b", ".lock", "x.safetensors", "checkpoints.json", "checkpoints", "c:x"] {
        assert!(matches!(run.write_file(name, b""), Err(StoreError::FileName { .. })), "{name}");
    }
    run.write_file("loss.svg", b"<svg/>").unwrap();
    assert_eq!(run.read_file("loss.svg").unwrap(), b"<svg/>");
    assert!(matches!(run.read_file("loss.png"), Err(StoreError::NotFound { .. })));
}

#[test]
fn lines_are_cut_back_with_the_one_that_a_kill_tore() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunFolder::create(dir.path()).unwrap();
    run.retain_lines("metrics.jsonl", |_| true).unwrap();
    assert!(!dir.path().join("metrics.jsonl").exists());
    fs::write(dir.path().join("metrics.jsonl"), b"{\"step\":1}\n{\"step\":2}\n{\xff\n{\"step\":3}\n{\"step\":1").unwrap();
    run.retain_lines("metrics.jsonl", |line| line != "{\"step\":3}").unwrap();
    assert_eq!(run.read_file("metrics.jsonl").unwrap(), b"{\"step\":1}\n{\"step\":2}\n");
}

#[test]
fn a_run_without_a_name_is_named_by_task_and_time() {
    let time = "2026-11-21T14:30:15Z".parse().unwrap();
    assert_eq!(default_run_path_at("lm", time), Path::new("runs/lm-20261121-143015"));
    assert!(default_run_path("forecast").to_str().unwrap().starts_with("runs/forecast-20"));
}

// Faults at every call.

const RUN: &str = "/runs/x";
const LOSSES: [f64; 4] = [2.0, 1.5, 1.6, 1.0];

/// What a process does: opens the folder and saves steps 100, 200, ...; returns the last step that it was told is saved.
fn train(disk: &SimDisk, keep: usize) -> (Option<u64>, Option<u64>) {
    let (mut saved, mut tried) = (None, None);
    let Ok(mut run) = RunFolder::open_or_create_with(Arc::new(disk.clone()), RUN) else { return (saved, tried) };
    if run.write_file("config.toml", b"lr = 1\n").is_err() {
        return (saved, tried);
    }
    for (i, loss) in LOSSES.into_iter().enumerate() {
        let step = 100 * (i as u64 + 1);
        tried = Some(step);
        match run.save(&checkpoint(step), Some(loss), keep, Select::Best) {
            Ok(_) => saved = tried,
            Err(_) => break,
        }
    }
    (saved, tried)
}

/// After whatever happened: what was saved, or what was being saved, is there and whole, and the run can go on. `Err` says what is wrong.
fn check_after(disk: &SimDisk, (saved, tried): (Option<u64>, Option<u64>)) -> Result<(), String> {
    let mut run = RunFolder::open_or_create_with(Arc::new(disk.clone()), RUN).map_err(|e| format!("cannot be opened: {e}"))?;
    let newest = match run.load_newest() {
        Ok((loaded, warnings)) if warnings.is_empty() && run.take_warnings().is_empty() => {
            let step = loaded.step().unwrap();
            if loaded != checkpoint(step) { Err(format!("step {step} is a mix")) } else { Ok(Some(step)) }
        }
        Ok(_) => Err("something is damaged".to_owned()),
        Err(StoreError::NoCheckpoint { .. }) => Ok(None),
        Err(e) => Err(e.to_string()),
    }?;
    if newest != saved && newest != tried {
        return Err(format!("{saved:?} was saved, {tried:?} was tried, {newest:?} is there"));
    }
    if let Some(newest) = newest {
        let best = LOSSES[..newest as usize / 100].iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u64 * 100 + 100;
        for (which, step) in [(Which::Best, best), (Which::Selected, best), (Which::Last, newest)] {
            let loaded = run.load(which).map_err(|e| format!("{which:?}: {e}"))?;
            if loaded != checkpoint(step) {
                return Err(format!("{which:?} is {}, not {step}", loaded.step().unwrap()));
            }
        }
    }
    if disk.file_names().iter().any(|name| name.ends_with(TEMP_SUFFIX)) {
        return Err("a temporary file is left".to_owned());
    }
    run.save(&checkpoint(900), None, 1, Select::Last).map_err(|e| format!("cannot go on: {e}"))?;
    drop(run);
    let mut run = RunFolder::open_with(Arc::new(disk.clone()), RUN).map_err(|e| e.to_string())?;
    let (loaded, _) = run.load_newest().map_err(|e| e.to_string())?;
    if loaded == checkpoint(900) { Ok(()) } else { Err("it did not go on".to_owned()) }
}

/// Calls that an undisturbed [`train`] makes.
fn n_calls(keep: usize) -> usize {
    let disk = SimDisk::new();
    assert_eq!(train(&disk, keep).0, Some(400));
    check_after(&disk, (Some(400), Some(400))).unwrap();
    let disk = SimDisk::new();
    train(&disk, keep);
    disk.n_calls()
}

#[test]
fn a_kill_at_any_call_leaves_the_former_or_the_new_checkpoint() {
    for keep in [1, 2] {
        for k in 0..n_calls(keep) {
            let disk = SimDisk::new();
            disk.fail_at(k, Fault::Death);
            let steps = train(&disk, keep);
            disk.restart();
            check_after(&disk, steps).unwrap_or_else(|e| panic!("keep {keep}, killed at call {k}: {e}"));
        }
    }
}

#[test]
fn a_power_cut_at_any_call_leaves_the_former_or_the_new_checkpoint() {
    for keep in [1, 2] {
        for k in 0..=n_calls(keep) {
            for seed in 0..24 {
                let disk = SimDisk::new();
                disk.fail_at(k, Fault::Death);
                let steps = train(&disk, keep);
                disk.power_cut(seed);
                check_after(&disk, steps).unwrap_or_else(|e| panic!("keep {keep}, power cut at call {k}, seed {seed}: {e}"));
            }
        }
    }
}

#[test]
fn a_kill_while_a_step_is_saved_again_leaves_one_of_the_two() {
    for k in 0.. {
        let disk = SimDisk::new();
        let mut run = RunFolder::create_with(Arc::new(disk.clone()), RUN).unwrap();
        run.save(&checkpoint(1), Some(2.0), 2, Select::Best).unwrap();
        run.save(&checkpoint(2), None, 2, Select::Best).unwrap();
        disk.fail_at(k, Fault::Death);
        let done = run.save(&checkpoint(2), Some(1.0), 2, Select::Best).is_ok();
        drop(run);
        disk.power_cut(k as u64);
        let mut run = RunFolder::open_with(Arc::new(disk), RUN).unwrap();
        assert_eq!(run.load_newest().unwrap(), (checkpoint(2), vec![]));
        let best = run.load(Which::Best).unwrap().step().unwrap();
        assert!(best == 2 || !done, "killed at call {k}");
        if done {
            break;
        }
    }
}

#[test]
fn a_failing_call_is_an_error_and_the_next_save_succeeds() {
    for k in 0..n_calls(1) {
        let disk = SimDisk::new();
        disk.fail_at(k, Fault::Error);
        let steps = train(&disk, 1);
        // Without a restart: the fault was a passing one.
        check_after(&disk, steps).unwrap_or_else(|e| panic!("failed at call {k}: {e}"));
    }
    // The same, the process going on with the folder in hand.
    for k in 0.. {
        let disk = SimDisk::new();
        let mut run = RunFolder::create_with(Arc::new(disk.clone()), RUN).unwrap();
        run.save(&checkpoint(100), Some(1.0), 1, Select::Best).unwrap();
        disk.fail_at(k, Fault::Error);
        let failed = run.save(&checkpoint(200), Some(0.5), 1, Select::Best).map(|saved| saved.warnings.len());
        if matches!(failed, Ok(0)) {
            break;
        }
        assert!(matches!(failed, Err(_) | Ok(1)), "call {k}");
        assert!(run.load(Which::Selected).is_ok(), "failed at call {k}");
        run.save(&checkpoint(300), Some(0.7), 1, Select::Best).unwrap();
        assert_eq!(run.load(Which::Last).unwrap(), checkpoint(300));
        assert!(run.load(Which::Best).is_ok());
    }
}

#[test]
fn a_failing_call_while_opening_never_gives_a_wrong_checkpoint() {
    for k in 0.. {
        let disk = SimDisk::new();
        train(&disk, 2);
        let before = disk.n_calls();
        disk.fail_at(k, Fault::Error);
        let opened = RunFolder::open_with(Arc::new(disk.clone()), RUN).and_then(|mut run| run.load_newest());
        if let Ok((loaded, warnings)) = opened {
            let step = loaded.step().unwrap();
            assert_eq!(loaded, checkpoint(step));
            assert_eq!(step == 400, warnings.is_empty(), "call {k}");
        }
        if disk.n_calls() - before <= k {
            break;
        }
    }
}

#[test]
fn the_simulated_disk_catches_a_missing_sync() {
    let mut n_caught = 0;
    for k in 0..n_calls(1) {
        for seed in 0..8 {
            let disk = SimDisk::new();
            disk.lie_about_sync();
            disk.fail_at(k, Fault::Death);
            let steps = train(&disk, 1);
            disk.power_cut(seed);
            n_caught += usize::from(check_after(&disk, steps).is_err());
        }
    }
    assert!(n_caught > 20, "only {n_caught} power cuts did harm on a disk that does not sync: the other tests could not fail");
}

#[test]
fn the_simulated_disk_is_a_disk() {
    let disk = SimDisk::new();
    disk.create_dir(Path::new("/d")).unwrap();
    disk.create(Path::new("/d/a")).unwrap().write(b"abc").unwrap();
    disk.rename(Path::new("/d/a"), Path::new("/d/b")).unwrap();
    assert_eq!(disk.read(Path::new("/d/b")).unwrap(), b"abc");
    assert_eq!(disk.list(Path::new("/d")).unwrap(), ["b"]);
    assert!(!disk.exists(Path::new("/d/a")).unwrap());
    disk.power_cut(0);
    assert!(disk.list(Path::new("/d")).unwrap().is_empty());
}
