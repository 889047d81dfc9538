//! The licences of all dependencies are among those that `deny.toml` allows, and all come from the
//! registry or are ours: what `cargo deny check licenses sources` looks at, with no program but cargo.

use std::{collections::BTreeSet, path::Path, process::Command};

use serde_json::Value;

/// What stands between an operator, outside of parentheses.
fn split<'a>(expression: &'a str, operator: &str) -> Vec<&'a str> {
    let (mut parts, mut from, mut depth) = (Vec::new(), 0, 0);
    for (at, c) in expression.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ if depth == 0 && at >= from && expression[at..].starts_with(operator) => {
                parts.push(&expression[from..at]);
                from = at + operator.len();
            }
            _ => {}
        }
    }
    parts.push(&expression[from..]);
    parts
}

/// Whether an SPDX expression can be met with allowed licences only.
fn allowed(expression: &str, licences: &BTreeSet<&str>) -> bool {
    let all = |alternative: &str| {
        split(alternative, " AND ").iter().all(|part| {
            match part.strip_prefix('(').and_then(|part| part.strip_suffix(')')) {
                Some(inner) => allowed(inner, licences),
                None => licences.contains(part),
            }
        })
    };
    // An old way to write OR.
    let expression = expression.replace(" / ", " OR ").replace('/', " OR ");
    split(&expression, " OR ").into_iter().any(all)
}

#[test]
fn every_dependency_may_be_used_and_comes_from_the_registry() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // Not in the package that is published.
    let Ok(deny) = std::fs::read_to_string(root.join("deny.toml")) else { return };
    let deny: toml::Table = deny.parse().unwrap();
    let licences = deny["licenses"]["allow"].as_array().unwrap();
    let licences: BTreeSet<_> = licences.iter().map(|name| name.as_str().unwrap()).collect();
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root).args(["metadata", "--format-version", "1", "--offline", "--all-features"]);
    let output = cargo.args(["--filter-platform", "x86_64-unknown-linux-gnu"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100, "{}", packages.len());
    for package in packages {
        let name = package["name"].as_str().unwrap();
        if let Some(source) = package["source"].as_str() {
            assert!(source.starts_with("registry+"), "{name} comes from {source}");
            let licence = package["license"].as_str().unwrap_or("none that it names");
            assert!(allowed(licence, &licences), "{name} has the licence {licence}; see deny.toml");
        }
    }
}

#[test]
fn expressions_of_licences_are_read() {
    let licences = ["MIT", "Zlib", "Apache-2.0"].into();
    for expression in ["MIT", "GPL-3.0 OR MIT", "MIT/Apache-2.0", "MIT AND Zlib", "(MIT OR GPL-3.0) AND Zlib"]
    {
        assert!(allowed(expression, &licences), "{expression}");
    }
    for expression in ["GPL-3.0", "MIT AND GPL-3.0", "GPL-3.0 OR AGPL-3.0", "(MIT OR Zlib) AND GPL-3.0"] {
        assert!(!allowed(expression, &licences), "{expression}");
    }
}
