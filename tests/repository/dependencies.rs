//! Each direct dependency has a reason in `docs/dependencies.md`.

use std::{collections::BTreeSet, fs, path::Path};

const DOCUMENT: &str = "docs/dependencies.md";
/// The manifests, and where their part of the document begins.
const MANIFESTS: [(&str, &str); 3] = [
    ("Cargo.toml", "`flashinfer-rs`"),
    ("serve/Cargo.toml", "`flashinfer-serve`"),
    ("serve/cpu-kernels/Cargo.toml", "`flashinfer-cpu-kernels`"),
];

fn read(path: &str) -> Option<String> {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).ok()
}

/// The names in the tables of dependencies, also those for some platforms only.
fn dependencies(table: &toml::Table, names: &mut BTreeSet<String>) {
    for (key, value) in table {
        match value.as_table() {
            Some(entries) if key.ends_with("dependencies") => names.extend(entries.keys().cloned()),
            Some(inner) if key != "package" && key != "workspace" => dependencies(inner, names),
            _ => {}
        }
    }
}

/// The names in the rows of a part's tables; a row without a reason is none.
fn reasons(part: &str) -> BTreeSet<String> {
    let row = |line: &str| {
        let (name, reason) = line.strip_prefix("| `")?.split_once("` | ")?;
        let reason = reason.strip_suffix(" |")?;
        (!reason.trim().is_empty()).then(|| name.to_owned())
    };
    part.lines().filter_map(row).collect()
}

#[test]
fn each_dependency_has_a_reason() {
    let document = read(DOCUMENT).unwrap();
    let mut parts = document.split("\n## ").skip(1);
    for (manifest, package) in MANIFESTS {
        let part = parts.next().unwrap_or_default();
        assert!(part.lines().next().unwrap().ends_with(package), "{DOCUMENT} has no part for {package}");
        // The packaged crate has neither the engine nor its manifest.
        let Some(manifest_text) = read(manifest) else { continue };
        let mut names = BTreeSet::new();
        dependencies(&toml::from_str(&manifest_text).unwrap(), &mut names);
        assert!(names.len() > 2, "{manifest}: {names:?}");
        let reasons = reasons(part);
        let (without, gone): (Vec<_>, Vec<_>) =
            (names.difference(&reasons).collect(), reasons.difference(&names).collect());
        assert!(
            without.is_empty() && gone.is_empty(),
            "{DOCUMENT}, {package}: without a reason {without:?}, no longer there {gone:?}"
        );
    }
}
