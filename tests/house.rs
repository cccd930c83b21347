//! The order of the house, read from the source: folders import from lower floors only, and some names are at home in one place.

use std::fs;
use std::path::{Path, PathBuf};

/// Folders and files of `src`, floor by floor. What stands on one floor does not import each other.
const FLOORS: [&[&str]; 8] = [
    &["shape", "params", "rng", "pool", "spans", "usage"],
    &["kernels", "comm"],
    &["backend"],
    &["data", "model", "optim", "compress"],
    &["store", "observe"],
    &["infer"],
    &["train"],
    &["cli"],
];

/// Floor 0 is one room: its files may use each other.
const OPEN_FLOOR: usize = 0;

/// A name that only code under these folders may use.
const AT_HOME: [(&str, &[&str]); 6] = [
    ("wgpu", &["backend/gpu"]),
    ("mpi", &["comm"]),
    ("println!", &["cli", "observe"]),
    ("eprintln!", &["cli", "observe"]),
    ("print!", &["cli", "observe"]),
    ("eprint!", &["cli", "observe"]),
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The code without comments. Strings stay: a false alarm is cheap, a missed import is not.
fn code(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Every first name after `crate::`, also those of a list in braces.
fn imports(code: &str) -> Vec<String> {
    let mut names = Vec::new();
    for part in code.split("crate::").skip(1) {
        let Some(list) = part.strip_prefix('{') else {
            names.push(part.chars().take_while(|&c| is_word(c)).collect());
            continue;
        };
        let mut depth = 0;
        let mut name = String::new();
        for c in list.chars() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => names.push(std::mem::take(&mut name)),
                _ if depth == 0 && !c.is_whitespace() => name.push(c),
                _ => {}
            }
        }
        names.push(name);
    }
    names.iter().map(|name| name.split("::").next().unwrap_or_default().to_owned()).filter(|name| !name.is_empty()).collect()
}

fn floor(room: &str) -> Option<usize> {
    FLOORS.iter().position(|rooms| rooms.contains(&room))
}

/// What is wrong with one file; `place` is its path below `src`.
fn complaints(place: &str, text: &str) -> Vec<String> {
    let code = code(text);
    let room = place.split('/').next().unwrap().trim_end_matches(".rs");
    let mut found = Vec::new();
    for (name, homes) in AT_HOME {
        let used = code.match_indices(name).any(|(at, _)| {
            let before = code[..at].chars().next_back().is_none_or(|c| !is_word(c));
            before && code[at + name.len()..].chars().next().is_none_or(|c| !is_word(c) || name.ends_with('!'))
        });
        if used && !homes.iter().any(|home| place.starts_with(home)) {
            found.push(format!("src/{place} names {name}, which is at home in {homes:?} only"));
        }
    }
    if matches!(room, "lib" | "main") {
        return found;
    }
    let Some(here) = floor(room) else {
        found.push(format!("src/{place} stands on no floor; FLOORS lists them"));
        return found;
    };
    for name in imports(&code) {
        match floor(&name) {
            Some(there) if name != room && there >= here && !(here == OPEN_FLOOR && there == OPEN_FLOOR) => {
                found.push(format!("src/{place} on floor {here} imports {name} of floor {there}"));
            }
            _ => {}
        }
    }
    found
}

#[test]
fn folders_import_from_lower_floors_only() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 40, "only {} sources under {}", files.len(), root.display());
    let found: Vec<String> = files
        .iter()
        .flat_map(|file| {
            let place = file.strip_prefix(&root).unwrap().to_string_lossy().replace('\\', "/");
            complaints(&place, &fs::read_to_string(file).unwrap())
        })
        .collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn a_broken_floor_is_found() {
    assert_eq!(complaints("model/mod.rs", "use crate::train::run;").len(), 1);
    assert_eq!(complaints("store/mod.rs", "use crate::{data::X, observe::{A, B}};").len(), 1);
    assert_eq!(complaints("data/mod.rs", "fn f() { crate::model::g() }").len(), 1);
    assert_eq!(complaints("kernels/gemm.rs", "use wgpu::Buffer;").len(), 1);
    assert_eq!(complaints("train/mod.rs", "println!(\"x\")").len(), 1);
    assert_eq!(complaints("new.rs", "").len(), 1);
    assert!(complaints("train/mod.rs", "// println!\nuse crate::{data::{A, B}, comm};").is_empty());
    assert!(complaints("params.rs", "use crate::shape::X;").is_empty());
    assert!(complaints("backend/gpu/mod.rs", "use wgpu::Buffer;").is_empty());
}
