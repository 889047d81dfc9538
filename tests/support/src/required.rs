//! What a machine must have for a test. A test that lacks it says so and is skipped, unless
//! `FLASHINFER_RS_REQUIRE` names what is lacking: then it fails.
use std::{fmt::Display, path::PathBuf};

/// What tests may lack, by the words of `FLASHINFER_RS_REQUIRE`.
pub const LIBTVM_FFI: &str = "libtvm_ffi";
pub const MODULES: &str = "modules";
pub const MODULES_0_7: &str = "modules-0.7";
pub const MODEL: &str = "model";
pub const CC: &str = "cc";
/// Of `serve/tests/clients`.
pub const CHROMIUM: &str = "chromium";

const ALL: [&str; 6] = [LIBTVM_FFI, MODULES, MODULES_0_7, MODEL, CC, CHROMIUM];

/// Whether tests must fail for want of `what`.
pub fn is_required(what: &str) -> bool {
    assert!(ALL.contains(&what), "{what} is none of {ALL:?}");
    let required = std::env::var("FLASHINFER_RS_REQUIRE").unwrap_or_default();
    let required: Vec<_> = required.split([',', ' ']).filter(|word| !word.is_empty()).collect();
    for word in &required {
        assert!(ALL.contains(word), "FLASHINFER_RS_REQUIRE names {word}, which is none of {ALL:?}");
    }
    required.contains(&what)
}

/// Says that a test, or the rest of it, is skipped for want of `what`.
///
/// # Panics
/// `FLASHINFER_RS_REQUIRE` names it.
#[track_caller]
pub fn skip(what: &str, why: impl Display) {
    assert!(!is_required(what), "FLASHINFER_RS_REQUIRE names {what}: {why}");
    eprintln!("skipped for want of {what}: {why}");
}

/// The folder of real kernel wheels of a version of FlashInfer, of those that
/// `FLASHINFER_RS_TEST_WHEELS` lists; `None`, after saying so, where it lists none.
#[track_caller]
pub fn test_wheels(version: &str) -> Option<PathBuf> {
    let listed = std::env::var_os("FLASHINFER_RS_TEST_WHEELS").unwrap_or_default();
    for folder in std::env::split_paths(&listed).filter(|folder| !folder.as_os_str().is_empty()) {
        let wheels =
            folder.read_dir().unwrap_or_else(|e| panic!("FLASHINFER_RS_TEST_WHEELS: {folder:?}: {e}"));
        let names = wheels.map(|wheel| wheel.unwrap().file_name().to_string_lossy().into_owned());
        if names.into_iter().any(|name| name.contains(&format!("-{version}+"))) {
            return Some(folder);
        }
    }
    let what = if version == "0.6.13" { MODULES } else { MODULES_0_7 };
    skip(what, format!("FLASHINFER_RS_TEST_WHEELS lists no folder with wheels of {version}"));
    None
}
