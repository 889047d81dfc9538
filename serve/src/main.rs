//! The program `flashinfer`.

use std::{env, process::ExitCode};

/// With how many blocks NCCL adds up memory that all ranks reach, unless its user says otherwise: fewer were
/// slower for a step's rows, and more no faster (`docs/benchmarks/parallel.md`).
const NCCL_BLOCKS: (&str, &str) = ("NCCL_SYM_CTAS", "16");

fn main() -> ExitCode {
    let (name, blocks) = NCCL_BLOCKS;
    if env::var_os(name).is_none() {
        // SAFETY: no other thread has been started.
        unsafe { env::set_var(name, blocks) };
    }
    flashinfer_serve::cli::main()
}
