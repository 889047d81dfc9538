//! What `fuzz/` tries, tests replay.

use std::{collections::BTreeSet, fs, path::Path};

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect()
}

#[test]
fn each_target_has_seeds_and_a_test_that_replays_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // Not in the package that is published.
    if !root.join("fuzz").is_dir() {
        return;
    }
    let targets = names(&root.join("fuzz/fuzz_targets"));
    assert_eq!(targets, names(&root.join("fuzz/seeds")));
    let manifest: toml::Table = fs::read_to_string(root.join("fuzz/Cargo.toml")).unwrap().parse().unwrap();
    let built =
        manifest["bin"].as_array().unwrap().iter().map(|bin| bin["name"].as_str().unwrap().to_owned());
    assert_eq!(targets, built.collect());
    let tests =
        ["src/fuzzing.rs", "serve/src/fuzzing.rs"].map(|path| fs::read_to_string(root.join(path)).unwrap());
    for target in targets {
        let replayed = format!("(\"{target}\", ");
        assert!(tests.iter().any(|test| test.contains(&replayed)), "no test replays {target}");
    }
}
