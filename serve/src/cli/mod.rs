//! The program `flashinfer`: a file for each command.

pub(crate) mod answers;
mod bench;
pub(crate) mod device;
pub(crate) mod run;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::Result;

const PAGE_SIZE: usize = 16;

/// Runs language models on FlashInfer's kernels, or on the CPU.
#[derive(Parser)]
#[command(name = "flashinfer", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    Run(run::Args),
    Bench(bench::Args),
}

impl Command {
    fn execute(&self) -> Result<()> {
        match self {
            Self::Run(args) => run::run(args),
            Self::Bench(args) => bench::run(args),
        }
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    match Cli::parse().command.execute() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
