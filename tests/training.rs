//! Whole runs: what is learnt, on which devices, with which bits.

use std::path::PathBuf;

use carrousel::store::config::Task;

use crate::runs::{config, text, train};

fn text_file(dir: &std::path::Path, n: usize) -> PathBuf {
    let path = dir.join("text.txt");
    std::fs::write(&path, text(n)).unwrap();
    path
}

#[test]
fn a_language_model_learns_a_small_text() {
    let dir = tempfile::tempdir().unwrap();
    let file = text_file(dir.path(), 6000);
    let mut config = config(Task::Lm, &[&file]);
    (config.max_steps, config.hidden, config.embedding) = (Some(200), 32, 16);
    let ran = train(&config, &dir.path().join("run"), false);
    let outcome = ran.outcome.unwrap();
    let (first, last) = (ran.losses[0], ran.losses[199]);
    assert!(first > 2.5 && last < 1.0, "{first} -> {last}");
    let test = outcome.summary["test_loss"].as_f64().unwrap();
    assert!(test < 1.1, "{test}");
}
