//! README.md and docs/modules-and-cache.md say what the sources say.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

const README: &str = include_str!("../../README.md");
const SETTINGS: &str = include_str!("../../docs/modules-and-cache.md");
const LIB: &str = include_str!("../../src/lib.rs");

#[test]
fn its_example_is_the_crate_docs_tested_one() {
    let (_, rest) = LIB.split_once("//! ```no_run\n").unwrap();
    let (block, _) = rest.split_once("//! ```\n").unwrap();
    let code: String = block
        .lines()
        .map(|line| line.trim_start_matches("//!").strip_prefix(' ').unwrap_or_default())
        .filter(|line| !line.starts_with("# "))
        .map(|line| format!("{line}\n"))
        .collect();
    assert!(README.contains(&format!("```rust\n{code}```\n")), "README.md lacks this example:\n{code}");
}

#[test]
fn every_variable_that_the_sources_read_is_listed() {
    // Set by the build script for the library, and by a test for itself.
    let internal = ["FLASHINFER_RS_SELECTED_CUDA", "FLASHINFER_RS_TEST_PART"];
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = vec![root.join("build.rs")];
    for folder in ["src", "tests", "benches", "examples"] {
        rust_files(&root.join(folder), &mut files);
    }
    let mut variables = BTreeSet::new();
    for file in files {
        let text = fs::read_to_string(file).unwrap();
        for (at, _) in text.match_indices("\"FLASHINFER_RS_") {
            let name = text[at + 1..].split('"').next().unwrap_or_default();
            // Not a prefix, and not the start of a message.
            if name.chars().all(|c| c.is_ascii_uppercase() || c == '_') && !name.ends_with('_') {
                variables.insert(name.to_owned());
            }
        }
    }
    assert!(variables.len() >= 7, "{variables:?}");
    let table = |name: &String| SETTINGS.contains(&format!("`{name}`")) || internal.contains(&name.as_str());
    let missing: Vec<_> = variables.iter().filter(|name| !table(name)).collect();
    assert!(missing.is_empty(), "docs/modules-and-cache.md lacks {missing:?}");
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}
