//! The program `flashinfer`: a file for each command.

pub(crate) mod answers;
mod bench;
mod chat;
mod choices;
mod commands;
mod conversation;
mod interrupt;
mod list;
mod out;
mod precision;
mod prompts;
mod pull;
mod ranks;
mod rm;
pub(crate) mod run;
mod sampling;
mod serve;
mod show;
mod terminal;
#[cfg(all(test, unix))]
mod tests;

use std::{process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};

use self::out::note;
use crate::Result;
#[cfg(unix)]
use crate::text::sandbox;

/// How long graphs are captured before the first request.
const GRAPHS_WITHIN: Duration = Duration::from_secs(60);

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
    Serve(serve::Args),
    Pull(pull::Args),
    List(list::Args),
    Show(show::Args),
    Rm(rm::Args),
    Bench(bench::Args),
}

impl Command {
    fn execute(&self) -> Result<()> {
        match self {
            Self::Run(args) => run::run(args),
            Self::Serve(args) => serve::run(args),
            Self::Pull(args) => pull::run(args),
            Self::List(args) => list::run(args),
            Self::Show(args) => show::run(args),
            Self::Rm(args) => rm::run(args),
            Self::Bench(args) => bench::run(args),
        }
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    #[cfg(unix)]
    sandbox::init();
    match Cli::parse().command.execute() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if out::is_closed(&error) => ExitCode::SUCCESS,
        Err(error) => {
            note!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
