//! docs/versions.md has the numbers of the manifest.

use flashinfer_rs::artifacts::FlashInferVersion;
use toml::{Table, Value};

const PAGE: &str = include_str!("../../docs/versions.md");
const MANIFEST: &str = include_str!("../../Cargo.toml");
const ENGINE: &str = include_str!("../../serve/Cargo.toml");
const PATCH: &str = include_str!("../../compat/candle-flash-attn/Cargo.toml");

/// The column of what is tested, in the row of a part.
fn tested(part: &str) -> &'static str {
    let row = PAGE.lines().find_map(|line| line.strip_prefix("| ")?.strip_prefix(part)?.strip_prefix(" | "));
    row.and_then(|rest| rest.split(" | ").next()).unwrap_or_else(|| panic!("no row of {part}"))
}

fn at<'t>(table: &'t Table, path: &[&str]) -> &'t Value {
    let (first, rest) = path.split_first().unwrap();
    rest.iter().fold(&table[*first], |value, key| &value[*key])
}

#[test]
fn the_numbers_are_the_manifests() {
    let manifest: Table = MANIFEST.parse().unwrap();
    let versions: Vec<_> = FlashInferVersion::CALLED.iter().map(ToString::to_string).collect();
    assert_eq!(tested("FlashInfer"), versions.join(", "));
    let engine: Table = ENGINE.parse().unwrap();
    for (part, manifest, package) in [
        ("`libtvm_ffi`", &manifest, "apache_tvm_ffi"),
        ("CUDA runtime", &manifest, "nvidia_cuda_runtime"),
        ("cuBLAS, for `gemm` only", &manifest, "nvidia_cublas"),
        ("NCCL, for several GPUs", &engine, "nvidia_nccl"),
    ] {
        let path = ["package", "metadata", "flashinfer_rs", "pinned_wheels", package, "cu130", "x86_64"];
        let version = at(manifest, &path)["version"].as_str().unwrap();
        assert!(tested(part).split(", ").any(|tested| tested == version), "{part} {version}");
    }
    let of = |path: &[&str]| at(&manifest, path).as_str().unwrap().to_owned();
    assert!(tested("Rust").starts_with(&of(&["package", "rust-version"])));
    assert_eq!(tested("cudarc"), of(&["dependencies", "cudarc", "version"]));
    assert_eq!(tested("candle"), of(&["dependencies", "candle-core", "version"]));
    let patch: Table = PATCH.parse().unwrap();
    let version = at(&patch, &["package", "version"]).as_str().unwrap();
    assert!(PAGE.contains(&format!("the place of candle-flash-attn {version}")), "{version}");
}

#[test]
fn readme_asks_for_the_same_cudarc() {
    let manifest: Table = MANIFEST.parse().unwrap();
    let version = at(&manifest, &["dependencies", "cudarc", "version"]).as_str().unwrap();
    let minor = version.rsplit_once('.').unwrap().0;
    let readme = include_str!("../../README.md");
    assert!(
        readme.contains(&format!("cudarc = {{ version = \"{minor}\"")),
        "README.md asks for another than {minor}"
    );
}
