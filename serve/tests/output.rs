//! The program when nobody reads what it prints.

use std::{
    io::{Read, pipe},
    process::{Command, Stdio},
};

/// As in `flashinfer list | true`: it ends, and complains of nothing.
#[test]
fn a_closed_output_is_no_failure() {
    for arguments in [&["list"][..], &["show", "tests/data/tiny/llama.gguf"], &["run", "--help"]] {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let (mut errors, stderr) = pipe().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_flashinfer"));
        command.args(arguments).stdin(Stdio::null()).stdout(writer).stderr(stderr);
        let status = command.status().unwrap();
        drop(command);
        let mut said = String::new();
        errors.read_to_string(&mut said).unwrap();
        assert!(status.success() && said.is_empty(), "{arguments:?}: {status}, {said}");
    }
}
