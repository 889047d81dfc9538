//! The program `flashinfer`.

use std::{env, process::ExitCode};

/// What NCCL does, unless its user says otherwise: graphs and other work have communicators of their
/// own, so that neither waits for the other's events, and this many blocks add up memory that all ranks
/// reach: fewer were slower, and more no faster (`docs/benchmarks/parallel.md`).
const NCCL: [(&str, &str); 2] = [("NCCL_GRAPH_MIXING_SUPPORT", "0"), ("NCCL_SYM_CTAS", "16")];

fn main() -> ExitCode {
    for (name, value) in NCCL {
        if env::var_os(name).is_none() {
            // SAFETY: no other thread has been started.
            unsafe { env::set_var(name, value) };
        }
    }
    flashinfer_serve::cli::main()
}
