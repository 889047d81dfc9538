//! The program `flashinfer`: a file for each command.

pub(crate) mod answers;
mod bench;
pub(crate) mod device;
mod list;
mod pull;
mod rm;
pub(crate) mod run;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::{
    Result,
    hub::{Hub, ModelName},
    model::Model,
};

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
    Pull(pull::Args),
    List(list::Args),
    Rm(rm::Args),
    Bench(bench::Args),
}

impl Command {
    fn execute(&self) -> Result<()> {
        match self {
            Self::Run(args) => run::run(args),
            Self::Pull(args) => pull::run(args),
            Self::List(args) => list::run(args),
            Self::Rm(args) => rm::run(args),
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

/// A model, fetched if it is not here.
fn open(name: &ModelName) -> Result<Model> {
    match &Hub::from_env()?.locate(name)?[..] {
        [path] => Model::open(path),
        parts => Err(format!("{name} has {} parts, which are not read yet", parts.len()).into()),
    }
}
