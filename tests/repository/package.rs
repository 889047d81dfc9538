//! What `cargo package` puts into the crate's archive. That it can be built is a step of `.ci/run`.

use std::{collections::BTreeSet, path::Path, process::Command};

/// What a user of the crate has, beside what cargo adds.
const PARTS: [&str; 10] = [
    "src",
    "docs",
    "examples",
    "build.rs",
    "LICENSE",
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
];
/// What cargo adds, and how a release is made.
const OTHERS: [&str; 5] =
    [".cargo_vcs_info.json", "Cargo.lock", "Cargo.toml", "Cargo.toml.orig", "RELEASING.md"];
/// No file of the archive is larger, and all of them together are not larger than sixteen of these.
const MAX_SIZE: u64 = 256 << 10;

#[test]
fn the_archive_holds_what_a_user_needs_and_nothing_else() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root).args(["package", "--list", "--allow-dirty", "--offline", "-p", "flashinfer-rs"]);
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let listed = String::from_utf8(output.stdout).unwrap();
    let parts: BTreeSet<_> = listed.lines().map(|file| file.split('/').next().unwrap()).collect();
    let known = BTreeSet::from_iter(PARTS.into_iter().chain(OTHERS));
    let unknown: Vec<_> = parts.difference(&known).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
    let missing: Vec<_> = PARTS.iter().filter(|part| !parts.contains(*part)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    // Each file of the sources, also those that are no Rust, and files that cargo makes have no size here.
    let size = |file: &str| root.join(file).metadata().map_or(0, |found| found.len());
    let (largest, total) =
        listed.lines().map(size).fold((0, 0), |(most, sum), size| (size.max(most), size + sum));
    assert!(largest <= MAX_SIZE && total <= 16 * MAX_SIZE, "{largest} {total}");
}
