//! Shared libraries made by the machine's C compiler.
use std::{fs, path::Path, process::Command};

use crate::required;

/// Compiles C to a shared library. `false`, with the reason printed, where
/// there is no C compiler.
pub fn compile(code: &str, library: &Path, options: &[&str]) -> bool {
    let source = library.with_extension("c");
    fs::write(&source, code).unwrap();
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o"])
        .args([library, &source])
        .args(options)
        .output();
    match compiled {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            true
        }
        Err(error) => {
            required::skip(required::CC, format!("there is no C compiler to make a library with: {error}"));
            false
        }
    }
}

/// A module that exports functions which only say these signatures.
pub fn module_that_says(signatures: &[&str]) -> String {
    let raise = "extern void TVMFFIErrorSetRaisedFromCStr(const char *, const char *);\n";
    let function = |signature: &&str| {
        let name = signature.split('(').next().unwrap();
        format!(
            "int __tvm_ffi_{name}(void) {{\n    TVMFFIErrorSetRaisedFromCStr(\"TypeError\", \"calling: \
             `{signature}`\");\n    return -1;\n}}\n"
        )
    };
    raise.to_owned() + &signatures.iter().map(function).collect::<String>()
}
