//! The program `flashinfer`.

use std::process::ExitCode;

fn main() -> ExitCode {
    flashinfer_serve::cli::main()
}
