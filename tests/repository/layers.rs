//! The crate's layers, as ARCHITECTURE.md has them: no file names a higher one, and no two files
//! of a folder name each other, be it by a detour.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// From the lowest to the highest. A name is a file or a folder of `src`.
const LAYERS: &[&[&str]] = &[
    &["artifacts", "sync"],
    &["once_table"],
    &["progress"],
    &["error", "dtype", "device", "stream", "tensor", "capture"],
    &["loader", "library_file", "cuda", "ffi"],
    &["cuda_library", "cublas", "module"],
    &["runtime"],
    &["indices"],
    &["kv"],
    &["ops", "reference"],
    &["graph", "uploads"],
    &["gpu", "candle", "fuzzing"],
];

/// Which names each name mentions.
type Graph = BTreeMap<String, BTreeSet<String>>;

pub(super) fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn layer_of(name: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&name))
}

/// A file's code: no comments, no tests.
pub(super) fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap();
    text.lines().filter(|line| !line.trim_start().starts_with("//")).flat_map(|line| [line, "\n"]).collect()
}

pub(super) fn files_below(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

fn is_part_of_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The first names of the paths that follow `prefix`, those in braces too.
fn named_after(code: &str, prefix: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (at, _) in code.match_indices(prefix) {
        if code[..at].ends_with(|c| is_part_of_name(c) || c == ':') {
            continue;
        }
        let rest = &code[at + prefix.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            names.insert(rest.chars().take_while(|&c| is_part_of_name(c)).collect());
            continue;
        };
        let (mut depth, mut first) = (0, true);
        let mut name = String::new();
        for c in group.chars() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => first = true,
                c if first && is_part_of_name(c) => name.push(c),
                _ if !name.is_empty() => {
                    names.insert(std::mem::take(&mut name));
                    first = false;
                }
                _ => {}
            }
            if c == ',' && depth == 0 {
                names.extend(Some(std::mem::take(&mut name)).filter(|name| !name.is_empty()));
                first = true;
            }
        }
        names.extend(Some(name).filter(|name| !name.is_empty()));
    }
    names
}

/// What the root exports, and of which file or folder it is. Of `ops` it is everything.
fn exports() -> BTreeMap<String, String> {
    let root = code(&source().join("lib.rs"));
    let ops = code(&source().join("ops/mod.rs"));
    let modules = LAYERS.concat();
    let of = |module: &str| {
        let mut names = named_after(&root, &format!("{module}::"));
        if module == "ops" {
            names.extend(named_after(&ops, "pub mod "));
        }
        names.into_iter().map(|name| (name, module.to_owned())).collect::<Vec<_>>()
    };
    modules.into_iter().flat_map(of).collect()
}

/// A loop in the graph, if there is one.
fn circle(graph: &Graph) -> Option<Vec<&str>> {
    fn walk<'g>(
        graph: &'g Graph,
        at: &'g str,
        path: &mut Vec<&'g str>,
        done: &mut BTreeSet<&'g str>,
    ) -> bool {
        if let Some(start) = path.iter().position(|&name| name == at) {
            path.drain(..start);
            return true;
        }
        if !done.contains(at) {
            path.push(at);
            if graph.get(at).is_some_and(|next| next.iter().any(|next| walk(graph, next, path, done))) {
                return true;
            }
            path.pop();
            done.insert(at);
        }
        false
    }
    let (mut path, mut done) = (Vec::new(), BTreeSet::new());
    graph.keys().any(|name| walk(graph, name, &mut path, &mut done)).then_some(path)
}

#[test]
fn no_file_names_a_higher_layer() {
    let exports = exports();
    assert!(exports.contains_key("TensorRef") && exports.contains_key("attention"), "{exports:?}");
    let (mut seen, mut wrong) = (0, Vec::new());
    for path in files_below(&source()) {
        let inside = path.strip_prefix(source()).unwrap();
        let first = Path::new(inside.iter().next().unwrap()).with_extension("");
        let own = first.to_str().unwrap();
        if matches!(own, "lib" | "bin") {
            continue;
        }
        let layer = layer_of(own).unwrap_or_else(|| panic!("{own} has no layer: add it to LAYERS"));
        for name in named_after(&code(&path), "crate::") {
            let module = exports.get(&name).unwrap_or(&name);
            // A macro of `ffi`.
            if name == "args" {
                continue;
            }
            let named =
                layer_of(module).unwrap_or_else(|| panic!("{}: what is crate::{name}?", path.display()));
            seen += 1;
            if named > layer {
                wrong.push(format!("{} names {module}", inside.display()));
            }
        }
    }
    assert!(seen > 200, "{seen}");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn no_files_of_the_root_name_each_other() {
    let exports = exports();
    let mut graph = Graph::new();
    for path in files_below(&source()) {
        let inside = path.strip_prefix(source()).unwrap();
        let own = Path::new(inside.iter().next().unwrap()).with_extension("").to_str().unwrap().to_owned();
        if matches!(&*own, "lib" | "bin" | "ops" | "reference") {
            continue;
        }
        let names = named_after(&code(&path), "crate::").into_iter();
        let modules = names.map(|name| exports.get(&name).cloned().unwrap_or(name));
        graph.entry(own.clone()).or_default().extend(modules.filter(|name| *name != own));
    }
    assert_eq!(circle(&graph), None);
}

#[test]
fn no_files_of_a_folder_name_each_other() {
    for folder in [
        "artifacts",
        "artifacts/embed",
        "cuda",
        "indices",
        "kv",
        "ops/attention",
        "ops/sampling",
        "ops/rope",
        "ops/norm",
        "ops/gemm",
        "candle",
    ] {
        let folder = source().join(folder);
        let mut graph = Graph::new();
        let paths = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        let files: BTreeMap<String, PathBuf> = paths
            .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
            .map(|path| (path.file_stem().unwrap().to_str().unwrap().to_owned(), path))
            .filter(|(name, _)| name != "mod")
            .collect();
        for (name, path) in &files {
            let named = named_after(&code(path), "super::").into_iter();
            graph.insert(name.clone(), named.filter(|other| files.contains_key(other)).collect());
        }
        assert_eq!(circle(&graph), None, "{}", folder.display());
    }
}

#[test]
fn paths_and_circles_are_found() {
    let code = "use crate::{\n    a::{B, c},\n    D,\n    e::f,\n};\nlet x = crate::g::h(my_crate::i);";
    assert_eq!(named_after(code, "crate::"), ["D", "a", "e", "g"].map(str::to_owned).into());
    let graph = |edges: &[(&str, &str)]| {
        let mut graph = Graph::new();
        for (from, to) in edges {
            graph.entry((*from).into()).or_default().insert((*to).into());
        }
        graph
    };
    assert_eq!(circle(&graph(&[("a", "b"), ("b", "c"), ("a", "c")])), None);
    assert_eq!(circle(&graph(&[("a", "b"), ("b", "c"), ("c", "b")])), Some(vec!["b", "c"]));
}
