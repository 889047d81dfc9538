//! Wheels of several versions of FlashInfer, and providers of kernels for one architecture each.

use crate::artifact_support::*;
use flashinfer_rs::artifacts::embed::{Build, CargoCommand, build_from};
use flashinfer_rs::artifacts::{
    ArtifactError, BundledMember, CudaArchitecture, Digest, Fetch, FlashInferVersion, Member, Pins, Source,
    Store, StoreConfig, Wheel,
};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use test_support::required;

const OLD: FlashInferVersion = FlashInferVersion::new(0, 6, 13);
const NEW: FlashInferVersion = FlashInferVersion::new(0, 7, 4);

fn nothing() -> Pins {
    url_pins("http://127.0.0.1:9/none", Digest::of(b"none"))
}

fn write(folder: &Path, name: &str, wheel: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, wheel).unwrap();
    path
}

/// A store that sees these GPUs, by their compute capabilities.
fn store_on(mut config: StoreConfig, gpus: &[(u32, u32)]) -> Store {
    let gpus: Vec<_> = gpus.iter().map(|(major, minor)| CudaArchitecture::of_gpu(*major, *minor)).collect();
    config.gpus = Some(Arc::new(move || gpus.clone()));
    Store::open(config).unwrap()
}

fn found(store: &Store, name: &str) -> (String, Option<FlashInferVersion>) {
    let located = store.locate(&Member::module(name), Fetch::Forbidden).unwrap();
    (fs::read_to_string(located.path).unwrap(), located.version)
}

fn error(store: &Store, name: &str) -> String {
    format!("{:#}", store.locate(&Member::module(name), Fetch::Forbidden).unwrap_err())
}

/// A wheel for all GPUs of a version.
fn monolith(version: &str, modules: &[(&str, &[u8])]) -> Vec<u8> {
    let named: Vec<_> = modules.iter().map(|(name, bytes)| (module_path(name), *bytes)).collect();
    let members: Vec<_> = named.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
    flashinfer_wheel(&format!("flashinfer_jit_cache-{version}"), &members)
}

#[test]
fn a_providers_modules_are_found_and_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let provider = Provider::new("sm90a", &[("norm", b"norm of 9.0"), ("page", b"page of 9.0")]);
    let data = write(dir.path(), "data.whl", &provider.wheel());
    // Also without the folder `.data`, as a wheel may be laid out.
    let members = provider.members();
    let plain: Vec<_> =
        members.iter().map(|(name, bytes)| (name.split_once("purelib/").unwrap().1, &bytes[..])).collect();
    let plain = flashinfer_wheel("flashinfer_jit_cache_sm90a-0.7.4+cu130", &plain);
    let plain = write(dir.path(), "plain.whl", &plain);
    for path in [data, plain] {
        let wheel = Wheel::open(&path).unwrap();
        assert_eq!((wheel.modules(), wheel.version()), (vec!["norm".into(), "page".into()], Some(NEW)));
        assert_eq!(wheel.architectures(), [CudaArchitecture::parse("sm90a").unwrap()]);
        let mut config = config(dir.path(), nothing());
        config.wheels = vec![path];
        let store = store_on(config, &[(9, 0)]);
        assert_eq!(found(&store, "page"), ("page of 9.0".into(), Some(NEW)));
        let report = &store.inventory()[0];
        assert_eq!(
            (report.version.as_deref(), &report.architectures[..]),
            (Some("0.7.4"), &["sm90a".into()][..])
        );
    }
}

#[test]
fn the_gpu_chooses_among_providers() {
    let dir = tempfile::tempdir().unwrap();
    for id in ["sm80", "sm89", "sm90a", "sm120f"] {
        let provider = Provider::new(id, &[("norm", id.as_bytes())]);
        write(dir.path(), &provider.file(), &provider.wheel());
    }
    // One that has a module more.
    let more = Provider::new("sm86", &[("norm", b"sm86"), ("page", b"sm86")]);
    write(dir.path(), &more.file(), &more.wheel());
    let mut config = config(dir.path(), nothing());
    config.env_wheels = vec![dir.path().into()];
    for (gpu, want) in [
        ((8, 0), "sm80"),
        ((8, 6), "sm86"),
        ((8, 7), "sm86"),
        ((8, 9), "sm89"),
        ((9, 0), "sm90a"),
        ((12, 0), "sm120f"),
        ((12, 1), "sm120f"),
    ] {
        assert_eq!(found(&store_on(config.clone(), &[gpu]), "norm").0, want, "{gpu:?}");
    }
    // Of those that fit, the next one serves what the best lacks.
    assert_eq!(found(&store_on(config.clone(), &[(8, 9)]), "page").0, "sm86");
    // Code must run on every GPU of the process.
    assert_eq!(found(&store_on(config.clone(), &[(8, 9), (8, 6), (8, 9)]), "norm").0, "sm86");
    let text = error(&store_on(config.clone(), &[(9, 0), (8, 0)]), "norm");
    for want in ["its code is for sm90a, and the GPUs here are sm80 and sm90a", "CUDA_VISIBLE_DEVICES"] {
        assert!(text.contains(want), "{want} is not in: {text}");
    }
    let text = error(&store_on(config.clone(), &[(10, 0)]), "norm");
    assert!(text.contains("its code is for sm90a, and the GPUs here are sm100a"), "{text}");
    // Libraries are looked for before a GPU can be seen.
    let mut unseen = config.clone();
    unseen.gpus = Some(Arc::new(|| panic!("it was asked for the GPUs")));
    let e = Store::open(unseen).unwrap().locate(&Member::TvmFfi, Fetch::Forbidden).unwrap_err();
    assert!(matches!(e, ArtifactError::NotFound { .. }), "{e}");
    // Where no GPU is seen, the first in order stands for all.
    assert_eq!(found(&store_on(config.clone(), &[]), "norm").0, "sm120f");
    assert_eq!(found(&Store::open(config).unwrap(), "norm").0, "sm120f");
}

#[test]
fn a_manifest_must_describe_its_wheel() {
    let described = |changed| {
        let mut provider = Provider::new("sm90a", &[("norm", b"norm"), ("page", b"page")]);
        provider.changed = changed;
        provider
    };
    for (changed, want) in [
        (("\"schema_version\": 1", "\"schema_version\": 2"), "schema_version is 2; expected 1"),
        (("\"provider_id\": \"sm90a\"", "\"provider_id\": \"sm80\""), "of sm80; expected sm90a"),
        (("\"version\": \"0.7.4+cu130\"", "\"version\": \"0.7.5+cu130\""), "0.7.5+cu130; expected"),
        (("flashinfer-jit-cache-sm90a", "somebody-elses"), "somebody_elses-0.7.4"),
        (("[\"sm90a\"]", "[]"), "it lists no architecture"),
        (("[\"sm90a\"]", "[\"hopper\"]"), "\"hopper\" is no architecture"),
        (("\"page\"]", "\"page\", \"rope\"]"), "it lists the module rope, which the wheel does not hold"),
        ((", \"page\"]", "]"), "it does not list the module page, which the wheel holds"),
        (("\"modules\": ", "\"mods\": "), "missing field `modules`"),
        (("{", "nonsense"), "manifest.json"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), "w.whl", &described(Some(changed)).wheel());
        let text = Wheel::open(&path).unwrap_err().to_string();
        assert!(
            text.contains("w.whl") && text.contains("manifest.json") && text.contains(want),
            "{want}: {text}"
        );
    }

    let dir = tempfile::tempdir().unwrap();
    let distribution = "flashinfer_jit_cache_sm90a-0.7.4+cu130";
    let opened = |members: &[(&str, &[u8])]| {
        let path = write(dir.path(), "w.whl", &flashinfer_wheel(distribution, members));
        Wheel::open(&path).unwrap_err()
    };
    let members = described(None).members();
    let members: Vec<_> = members.iter().map(|(name, bytes)| (name.as_str(), &bytes[..])).collect();
    let (manifest, modules) = members.split_last().unwrap();
    assert!(opened(modules).to_string().contains("there is none of the provider sm90a"));
    let other = modules[0].0.replace("sm90a/jit_cache", "sm80/jit_cache");
    let two = opened(&[&members[..], &[(&other, b"")]].concat()).to_string();
    assert!(two.contains("it holds modules for sm80 and for sm90a; expected a wheel for each"), "{two}");
    let both = opened(&[&members[..], &[(&module_path("norm"), b"")]].concat()).to_string();
    assert!(both.contains("for all GPUs and for sm90a"), "{both}");
    // One that is not what RECORD promises.
    let record: String = members.iter().map(|(name, bytes)| record_line(name, bytes)).collect();
    let damaged = String::from_utf8(manifest.1.to_vec()).unwrap().replace("sm90a\"]", "sm80\"] ");
    let place = format!("{distribution}.dist-info/RECORD");
    let damaged: Vec<_> =
        [modules, &[(manifest.0, damaged.as_bytes()), (&place, record.as_bytes())]].concat();
    let path = write(dir.path(), "damaged.whl", &wheel_bytes(&damaged, None));
    let e = Wheel::open(&path).unwrap_err();
    assert!(
        matches!(&e, ArtifactError::DigestMismatch { file, .. } if file.contains("manifest.json")),
        "{e}"
    );
}

/// The name of a module by version, as specs give it.
fn by_version(version: FlashInferVersion) -> Option<Member> {
    Some(Member::module(if version < FlashInferVersion::PROVIDERS { "attention" } else { "attention_equal" }))
}

#[test]
fn the_first_source_that_holds_a_module_decides_its_version() {
    let dir = tempfile::tempdir().unwrap();
    let old = monolith("0.6.13+cu130", &[("attention", b"old"), ("norm", b"old norm"), ("only_old", b"old")]);
    let old = write(dir.path(), "old.whl", &old);
    let new = Provider::new("sm90a", &[("attention_equal", b"new"), ("norm", b"new norm")]);
    let new = write(dir.path(), "new.whl", &new.wheel());
    let own = write(dir.path(), "own.whl", &module_wheel(&[("attention_equal", b"own")]));
    let located = |wheels: &[&PathBuf]| {
        let mut config = config(dir.path(), nothing());
        config.wheels = wheels.iter().map(|path| (*path).clone()).collect();
        let store = store_on(config, &[(9, 0)]);
        let located = store.locate_of_version(&by_version, Fetch::Forbidden).unwrap();
        let norm = store.locate(&Member::module("norm"), Fetch::Forbidden).ok().and_then(|norm| norm.version);
        assert_eq!(
            store.locate(&Member::module("only_old"), Fetch::Forbidden).is_ok(),
            wheels.contains(&&old)
        );
        (fs::read_to_string(located.path).unwrap(), located.version, norm, store.versions())
    };
    assert_eq!(located(&[&old, &new]), ("old".into(), Some(OLD), Some(OLD), vec![OLD, NEW]));
    assert_eq!(located(&[&new, &old]), ("new".into(), Some(NEW), Some(NEW), vec![OLD, NEW]));
    assert_eq!(located(&[&new]), ("new".into(), Some(NEW), Some(NEW), vec![NEW]));
    // A wheel that tells no version may hold any.
    assert_eq!(located(&[&own, &old]), ("own".into(), None, Some(OLD), vec![OLD]));

    let mut config = config(dir.path(), nothing());
    config.wheels = vec![new];
    let store = store_on(config, &[(9, 0)]);
    let only_old = |version| (version < NEW).then(|| Member::module("only_old"));
    let text = format!("{:#}", store.locate_of_version(&only_old, Fetch::Forbidden).unwrap_err());
    assert!(text.contains("FlashInfer 0.7.4 has no such module"), "{text}");
}

#[test]
fn versions_that_are_not_called_are_refused() {
    for version in ["0.7.2.post1+cu130", "0.7.5+cu130", "0.8.0rc1+cu130", "0.6.18+cu130"] {
        let dir = tempfile::tempdir().unwrap();
        let mut provider = Provider::new("sm90a", &[("norm", b"norm")]);
        provider.version = version;
        let store = store_of(dir.path(), &provider.wheel());
        let text = error(&store, "norm");
        let public = version.split('+').next().unwrap();
        assert!(text.contains(&format!("is of FlashInfer {public}; expected 0.6.13 and 0.7.4")), "{text}");
    }
}

#[test]
fn a_shim_is_recognized_and_explained() {
    let dir = tempfile::tempdir().unwrap();
    let metadata = "Metadata-Version: 2.4\nName: flashinfer-jit-cache\nVersion: 0.7.4+cu130\n\
                    Requires-Dist: flashinfer-jit-cache-sm80==0.7.4+cu130\n\
                    Requires-Dist: flashinfer-jit-cache-sm90a==0.7.4+cu130\n\
                    Requires-Dist: flashinfer-jit-cache-sm120f==0.7.4+cu130\n";
    let shim = flashinfer_wheel(
        "flashinfer_jit_cache-0.7.4+cu130",
        &[
            ("flashinfer_jit_cache/__init__.py", b""),
            ("flashinfer_jit_cache-0.7.4+cu130.dist-info/METADATA", metadata.as_bytes()),
        ],
    );
    let mut config = config(dir.path(), nothing());
    config.wheels = vec![write(dir.path(), "shim.whl", &shim)];
    for (gpus, want) in [
        (&[(9, 0)][..], "flashinfer_jit_cache_sm90a-0.7.4; `flashinfer-doctor pin 0.7.4 sm90a` downloads it"),
        (&[(8, 9)], "flashinfer_jit_cache_sm80-0.7.4;"),
        (&[], "one of sm80, sm90a and sm120f; `flashinfer-doctor pin 0.7.4 ARCHITECTURE`"),
        (&[(10, 0)], "one of sm80, sm90a and sm120f;"),
    ] {
        let store = store_on(config.clone(), gpus);
        let text = error(&store, "norm");
        assert!(text.contains("it is the shim of FlashInfer 0.7.4, which holds no module"), "{text}");
        assert!(text.contains(want), "{want} is not in: {text}");
        let report = &store.inventory()[0];
        assert!(!report.usable && report.problem.as_ref().unwrap().contains("the shim of FlashInfer 0.7.4"));
        assert!(report.remedy.as_ref().unwrap().contains(want), "{report:?}");
    }
    // Of a version that is not called, the one to get is another.
    let later = metadata.replace("0.7.4", "0.7.9");
    let later = flashinfer_wheel(
        "flashinfer_jit_cache-0.7.9+cu130",
        &[("flashinfer_jit_cache-0.7.9+cu130.dist-info/METADATA", later.as_bytes())],
    );
    let text = {
        let mut config = config.clone();
        config.wheels = vec![write(dir.path(), "later.whl", &later)];
        error(&store_on(config, &[(9, 0)]), "norm")
    };
    assert!(text.contains("the shim of FlashInfer 0.7.9") && text.contains("pin 0.7.4 sm90a"), "{text}");
    // The old wheel of that name is none, nor is somebody else's empty one.
    for (distribution, want) in [("flashinfer_jit_cache-0.6.13", "holds no"), ("mine-0.7.4", "holds no")] {
        let mut config = config.clone();
        config.wheels = vec![write(dir.path(), "other.whl", &flashinfer_wheel(distribution, &[("a", b"")]))];
        let text = error(&store_on(config, &[(9, 0)]), "norm");
        assert!(text.contains(want) && !text.contains("shim"), "{text}");
    }
}

#[test]
fn an_embedded_provider_serves_its_gpu_only() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), nothing());
    config.bundle = vec![BundledMember {
        suffix: Member::module("norm").suffix().leak(),
        artifact_hash: "0123456789abcdef01234567",
        version: Some(NEW),
        architectures: vec![CudaArchitecture::parse("sm90a").unwrap()].leak(),
        sha256: Digest::of(b"norm"),
        size: 4,
        zstd: zstd::encode_all(&b"norm"[..], 1).unwrap().leak(),
    }]
    .leak();
    assert_eq!(found(&store_on(config.clone(), &[(9, 0)]), "norm"), ("norm".into(), Some(NEW)));
    assert_eq!(found(&store_on(config.clone(), &[]), "norm"), ("norm".into(), Some(NEW)));
    let text = error(&store_on(config.clone(), &[(8, 0)]), "norm");
    assert!(text.contains("embedded bundle: its code is for sm90a, and the GPUs here are sm80"), "{text}");
}

/// What a build embeds keeps its version and architecture.
#[test]
fn a_build_notes_where_modules_are_from() {
    let dir = tempfile::tempdir().unwrap();
    let provider = Provider::new("sm90a", &[("norm", b"norm")]);
    let wheel = write(dir.path(), &provider.file(), &provider.wheel());
    let cache = dir.path().join("cache");
    let env = |name: &str| match name {
        "FLASHINFER_RS_WHEELS" => wheel.to_str().map(str::to_owned),
        "FLASHINFER_RS_CACHE_DIR" => cache.to_str().map(str::to_owned),
        "FLASHINFER_RS_EMBED_MODULES" => Some("norm".into()),
        _ => None,
    };
    let (root, out_dir, target) = (dir.path(), &dir.path().join("out"), ("linux", "x86_64"));
    let command = CargoCommand::new(["cargo", "check"].map(str::to_owned).to_vec(), root, &env);
    let build = Build { env: &env, command, root, progress: None, out_dir, target, embed: true };
    assert_eq!(build_from(&build, nothing()).unwrap().embedded, 1);
    let code = fs::read_to_string(out_dir.join("bundle.rs")).unwrap();
    for want in [
        "version: Some(FlashInferVersion::new(0, 7, 4).post(0))",
        "architectures: &[CudaArchitecture::new(9, 0, Features::Specific), ]",
    ] {
        assert!(code.contains(want), "{want} is not in: {code}");
    }
}

#[test]
fn a_pinned_provider_comes_before_the_wheel_for_all() {
    let dir = tempfile::tempdir().unwrap();
    let provider = Provider::new("sm90a", &[("norm", b"new"), ("attention_equal", b"new")]);
    let (bytes, file) = (provider.wheel(), provider.file());
    let old = monolith("0.6.13+test", &[("norm", b"old"), ("attention", b"old"), ("only_old", b"old")]);
    let mut pins = url_pins("http://127.0.0.1:9/none", Digest::of(&old));
    pins.extend(&format!(
        "[package.metadata.flashinfer_rs.pinned_wheels.flashinfer_jit_cache_sm90a.cu130.x86_64]\n\
         file = '{file}'\nsha256 = '{}'\nurl = 'http://127.0.0.1:9/{file}'\n",
        Digest::of(&bytes)
    ))
    .unwrap();
    let config = config(dir.path(), pins);
    let wheels = dir.path().join("cache/wheels");
    fs::create_dir_all(&wheels).unwrap();
    write(&wheels, WHEEL, &old);
    let cached = write(&wheels, &file, &bytes);
    let store = store_on(config.clone(), &[(9, 0)]);
    assert_eq!(found(&store, "norm"), ("new".into(), Some(NEW)));
    assert_eq!(found(&store, "only_old"), ("old".into(), Some(OLD)));
    assert_eq!(store.pinned_versions(), [NEW, OLD]);
    let located = store.locate_of_version(&by_version, Fetch::Forbidden).unwrap();
    assert_eq!((located.version, &located.source), (Some(NEW), &Source::CachedWheel(cached)));
    // For another GPU, and where none is seen.
    for gpus in [&[(8, 0)][..], &[]] {
        let store = store_on(config.clone(), gpus);
        assert_eq!(found(&store, "norm"), ("old".into(), Some(OLD)), "{gpus:?}");
        assert_eq!(store.pinned_versions(), [OLD]);
    }
}

#[test]
fn the_real_provider_serves_its_modules() {
    let Some(folder) = required::test_wheels("0.7.4") else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), nothing());
    config.wheels = vec![folder];
    let store = store_on(config.clone(), &[(9, 0)]);
    assert!(store.modules().len() > 20, "{:?}", store.modules());
    for name in ["norm", "topk", "gemm_sm90"] {
        let located = store.locate(&Member::module(name), Fetch::Forbidden).unwrap();
        assert_eq!((located.version, located.architectures.len()), (Some(NEW), 1));
        assert!(fs::read(&located.path).unwrap().starts_with(b"\x7fELF"));
    }
    let text = error(&store_on(config, &[(8, 0)]), "norm");
    assert!(text.contains("its code is for sm90a"), "{text}");
}
