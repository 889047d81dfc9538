//! Two types never share a name: a reader who meets one knows which it is.

use std::{collections::BTreeMap, path::Path};

use super::layers::{code, files_below, source};

/// The name of the type that a line declares, and whether another file can name it.
/// Types of a trait's implementation are none of their own.
fn declared(line: &str) -> Option<(&str, bool)> {
    let (indented, line) = (line.starts_with(' '), line.trim_start());
    let (visible, rest) = match line.strip_prefix("pub") {
        Some(rest) if rest.starts_with('(') => (true, rest.split_once(") ")?.1),
        Some(rest) => (true, rest.strip_prefix(' ')?),
        None => (false, line),
    };
    let rest = rest.strip_prefix("unsafe ").unwrap_or(rest);
    let (kind, rest) = rest.split_once(' ')?;
    let is_type = match kind {
        "struct" | "enum" | "union" | "trait" => true,
        "type" => visible || !indented,
        _ => false,
    };
    let name = rest.split(|c: char| !c.is_alphanumeric()).next()?;
    (is_type && !name.is_empty()).then_some((name, visible))
}

#[test]
fn declarations_are_recognized() {
    assert_eq!(declared("pub struct Heads {"), Some(("Heads", true)));
    assert_eq!(declared("    pub(super) enum Keys<'a> {"), Some(("Keys", true)));
    assert_eq!(declared("pub unsafe trait Element: Copy {"), Some(("Element", true)));
    assert_eq!(declared("struct Slot(u8);"), Some(("Slot", false)));
    assert_eq!(declared("    type Value<'a> = $value;"), None);
    assert_eq!(declared("pub fn plan() {}"), None);
}

#[test]
fn two_types_never_share_a_name() {
    let mut types = BTreeMap::<String, Vec<(String, bool)>>::new();
    for path in files_below(&source()) {
        // Tests have types of their own.
        let inside = path.strip_prefix(source()).unwrap();
        if inside.iter().any(|part| Path::new(part).file_stem().is_some_and(|stem| stem == "tests")) {
            continue;
        }
        let file = inside.display().to_string();
        for (name, visible) in code(&path).lines().filter_map(declared) {
            let of_name = types.entry(name.to_owned()).or_default();
            // One of two that a build has, by its platform or features.
            if !of_name.iter().any(|(other, _)| *other == file) {
                of_name.push((file.clone(), visible));
            }
        }
    }
    assert!(types.len() > 300, "{}", types.len());
    let shared = types
        .into_iter()
        .filter(|(_, of_name)| of_name.len() > 1 && of_name.iter().any(|(_, visible)| *visible));
    let shared: Vec<_> = shared.collect();
    assert!(shared.is_empty(), "{shared:#?}");
}
