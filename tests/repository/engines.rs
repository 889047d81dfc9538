//! docs/engines.md shows the code of `examples/raw_pointers`, which is compiled and run.

use std::{fs, path::Path};

const PAGE: &str = include_str!("../../docs/engines.md");
/// Lines that a recipe may have.
const MOST_LINES: usize = 80;

fn example(file: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/raw_pointers");
    fs::read_to_string(folder.join(file)).unwrap()
}

#[test]
fn its_code_is_the_programs() {
    let recipes = ["append.rs", "decode.rs", "prefill.rs", "captured.rs", "sample.rs"];
    let sources: Vec<_> = recipes.into_iter().chain(["views.rs"]).map(example).collect();
    let blocks: Vec<_> =
        PAGE.split("```rust\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(blocks.len() > recipes.len(), "{} blocks", blocks.len());
    for block in blocks {
        let found = sources.iter().any(|source| source.contains(block));
        assert!(found, "examples/raw_pointers does not have this code of docs/engines.md:\n{block}");
    }
}

#[test]
fn recipes_are_short() {
    for file in ["append.rs", "decode.rs", "prefill.rs", "captured.rs", "sample.rs"] {
        let lines = example(file).lines().count();
        assert!(lines < MOST_LINES, "{file} has {lines} lines");
    }
}
