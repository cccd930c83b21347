//! Every recipe as it stands, on a little data of the form that it asks for: what one worker learns, several do.

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use serde_json::Value;

use crate::runs::text;

/// Names of all recipes, and how each is started in a folder with [`write_data`].
const RECIPES: [(&str, &[&str]); 7] = [
    ("zaremba-small", &["--data", "ptb"]),
    // Its own width is for a GPU.
    ("zaremba-medium", &["--data", "ptb", "--hidden", "40", "--embedding", "40"]),
    ("word-lm-tied", &["--data", "ptb"]),
    ("jsb-chorales", &["--data", "music"]),
    ("adding-100", &[]),
    ("char-shakespeare", &["--data", "input.txt"]),
    ("japanese-vowels", &["--data", "Vowels_*.ts"]),
];

/// Numbers below `n` that look drawn.
fn drawn(n: u32) -> impl FnMut() -> u32 {
    let mut state = 2026_u32;
    move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) % n
    }
}

/// Words as in the Penn Treebank, frames as in the chorales, channels as in the vowels, characters.
fn write_data(folder: &Path) {
    let mut next = drawn(60);
    fs::create_dir_all(folder.join("ptb")).unwrap();
    for (part, n) in [("train", 400), ("valid", 30), ("test", 30)] {
        let lines = (0..n).map(|_| (0..9).map(|_| format!(" w{}", next() / (1 + next() % 5))).collect::<String>() + " <unk> \n");
        fs::write(folder.join(format!("ptb/ptb.{part}.txt")), lines.collect::<String>()).unwrap();
    }
    fs::create_dir_all(folder.join("music")).unwrap();
    for (part, n) in [("train", 6), ("valid", 2), ("test", 2)] {
        let mut frame = || if next() < 5 { "-".to_owned() } else { format!("{},{}", 20 + next() / 3, 41 + next() / 3) };
        let pieces = (0..n).map(|piece| (0..12 + 5 * (piece % 4)).map(|_| frame() + " ").collect::<String>() + "\n");
        fs::write(folder.join(format!("music/JSB_Chorales.{part}.txt")), pieces.collect::<String>()).unwrap();
    }
    for (part, n) in [("TRAIN", 54), ("TEST", 18)] {
        let header = "@problemName Vowels\n@timeStamps false\n@equalLength false\n@classLabel true 1 2 3 4 5 6 7 8 9\n@data\n";
        let mut channel = |speaker: usize, n_steps: usize| {
            (0..n_steps).map(|_| format!("{}", next() as f64 / 60.0 + speaker as f64 / 9.0)).collect::<Vec<_>>().join(",")
        };
        let lines = (0..n).map(|i| {
            let channels: Vec<String> = (0..12).map(|_| channel(i % 9, 7 + 5 * i % 23)).collect();
            format!("{}:{}\n", channels.join(":"), 1 + i % 9)
        });
        let lines: String = lines.collect();
        fs::write(folder.join(format!("Vowels_{part}.ts")), format!("{header}{lines}")).unwrap();
    }
    fs::write(folder.join("input.txt"), text(12_000)).unwrap();
}

/// Losses and gradient norms of the steps, and the loss of the test part at the end.
fn three_steps(folder: &Path, recipe: &str, own: &[&str], devices: &str) -> Vec<f64> {
    let out = format!("{recipe}-{}", devices.replace([':', '*'], "-"));
    let common = ["train", "--recipe", recipe, "--devices", devices, "--max-steps", "3", "--log-every", "1", "--json", "-q", "--out", &out];
    let output = Command::new(env!("CARGO_BIN_EXE_carrousel")).args(common).args(own).current_dir(folder).output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{recipe} on {devices}: {err}");
    let events: Vec<Value> = String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let number = |event: &Value, key: &str| event[key].as_f64().unwrap_or_else(|| panic!("{recipe} on {devices}: {key} in {event}"));
    let steps: Vec<&Value> = events.iter().filter(|event| event["event"] == "step").collect();
    assert_eq!(steps.len(), 3, "{recipe} on {devices}");
    let mut found: Vec<f64> = steps.iter().flat_map(|step| ["loss", "grad_norm"].map(|key| number(step, key))).collect();
    found.push(number(events.last().unwrap(), "test_loss"));
    found
}

#[test]
fn all_recipes_are_here() {
    let output = Command::new(env!("CARGO_BIN_EXE_carrousel")).args(["recipes", "--json"]).output().unwrap();
    let listed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let listed: Vec<&str> = listed["recipes"].as_array().unwrap().iter().map(|recipe| recipe["name"].as_str().unwrap()).collect();
    assert_eq!(listed, RECIPES.map(|(name, _)| name));
}

/// Twenty and sixteen sequences an update are cut unevenly; where an update has one sequence, two of three workers have none.
#[test]
fn a_recipe_comes_to_the_same_with_one_worker_and_with_three() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    for (recipe, own) in RECIPES {
        let (one, three) = (three_steps(folder.path(), recipe, own, "cpu:1"), three_steps(folder.path(), recipe, own, "cpu:1*3"));
        assert!(one[0] > 0.0 && one[4] != one[0], "{recipe}: {one:?}");
        for (i, (a, b)) in one.iter().zip(&three).enumerate() {
            assert!((a - b).abs() <= 2e-5 * a.abs(), "{recipe}, number {i}: {a} with one worker, {b} with three");
        }
    }
}
