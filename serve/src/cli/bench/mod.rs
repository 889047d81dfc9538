//! `flashinfer bench MODEL`: how fast a model is.

mod kernels;
mod prompts;
mod source;
mod steps;
mod table;
mod throughput;

use std::num::NonZeroUsize;

use super::out::say;
use crate::{
    Llm, LlmOptions, Result,
    backend::{device::Device, gpu::GpuOptions},
    cli::precision::PrecisionArgs,
    group::Parallel,
    hub::{Hub, ModelName},
    model::{Model, synthetic::Shape},
};
use prompts::Prompts;
use source::Source;
use steps::Steps;
use throughput::Test;

/// Measure how fast prompts are read and tokens generated
#[derive(clap::Args)]
pub struct Args {
    /// As for `run`
    #[arg(required_unless_present = "shape")]
    model: Option<ModelName>,
    /// Tokens of the prompts that are read
    #[arg(long, short = 'p', value_name = "N,…", value_delimiter = ',', default_value = "512")]
    prompt_tokens: Vec<NonZeroUsize>,
    /// Tokens that are generated
    #[arg(long, short = 'n', value_name = "N,…", value_delimiter = ',', default_value = "128")]
    generate_tokens: Vec<NonZeroUsize>,
    /// How often each is measured
    #[arg(long, short, value_name = "N", default_value = "5")]
    repetitions: NonZeroUsize,
    /// Where to compute
    #[arg(long, default_value = "auto")]
    device: Device,
    /// Measure answers with drafts of up to K tokens, too: by what was said before, or by
    /// --draft-model
    #[arg(
        long, value_name = "K", num_args = 0..=1, require_equals = true, default_missing_value = "4", conflicts_with = "steps"
    )]
    speculate: Option<usize>,
    /// A smaller model of the same vocabulary that drafts; K is 4 then, unless it is said
    #[arg(long, value_name = "MODEL", conflicts_with = "steps")]
    draft_model: Option<ModelName>,
    /// Measure answers that do not depend on what else is computed beside them
    #[arg(long)]
    deterministic: bool,
    /// The bits of what a GPU keeps.
    #[command(flatten)]
    precision: PrecisionArgs,
    /// Measure single decode steps on the GPU instead, of so many requests
    #[arg(long, value_delimiter = ',', value_name = "N,…")]
    steps: Vec<NonZeroUsize>,
    /// Measure prompts of so many tokens on the GPU instead, alone and beside answers that go on
    #[arg(long, value_delimiter = ',', value_name = "N,…", conflicts_with = "steps")]
    prompts: Vec<NonZeroUsize>,
    /// With `--prompts`: the most tokens of a step
    #[arg(long, requires = "prompts", value_name = "N", default_value = "2048")]
    step_tokens: NonZeroUsize,
    /// With `--prompts`: the most of a step that reads beside answers
    #[arg(long, requires = "prompts", value_name = "N", default_value = "512")]
    chunk_tokens: NonZeroUsize,
    /// With `--steps`: what the kernels of each step cost, too
    #[arg(long, requires = "steps", conflicts_with = "tensor_parallel")]
    kernels: bool,
    /// With `--steps` or `--prompts`: a model of this shape with random weights
    #[arg(long, conflicts_with = "model")]
    shape: Option<Shape>,
    /// With `--steps`: so many GPUs compute the model together, as of `serve`
    #[arg(long, requires = "steps", value_name = "N")]
    tensor_parallel: Option<NonZeroUsize>,
    /// With `--steps`: tokens of each request before the first step
    #[arg(long, requires = "steps", value_name = "N", default_value = "128")]
    context: NonZeroUsize,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let PrecisionArgs { weights, kv } = args.precision;
    let hub = Hub::from_env()?;
    let locate = || -> Result<_> {
        let name = args.model.as_ref().ok_or("there is no model to measure")?;
        Ok((name, hub.locate(name)?))
    };
    let source = || -> Result<_> {
        Ok(match args.shape {
            Some(shape) => Source::Shape(shape),
            None => Source::Model(Box::new(Model::open_files(&locate()?.1)?)),
        })
    };
    let gpu = GpuOptions { deterministic: args.deterministic, weights, kv, ..GpuOptions::new(1) };
    if !args.steps.is_empty() {
        let parallel = Parallel::of(args.tensor_parallel.map(NonZeroUsize::get))?;
        let ordinal = parallel.as_ref().map_or(0, Parallel::local_rank);
        let Args { steps, context, kernels, .. } = args;
        let steps = Steps { requests: steps, context: context.get(), kernels: *kernels };
        return steps.run(source()?, parallel.as_ref(), GpuOptions { ordinal, ..gpu });
    }
    if !args.prompts.is_empty() {
        let step_tokens = args.step_tokens.get();
        let chunk_tokens = args.chunk_tokens.get();
        return Prompts { tokens: &args.prompts, step_tokens, chunk_tokens }.run(source()?, gpu);
    }
    let (name, files) = locate()?;
    let most = args.prompt_tokens.iter().chain(&args.generate_tokens).map(|tokens| tokens.get()).max();
    let cache_tokens = most.unwrap_or(1) + 64;
    let options = LlmOptions {
        device: args.device,
        cache_tokens,
        max_running: 1,
        graphs_within: Some(super::GRAPHS_WITHIN),
        deterministic: args.deterministic,
        weights,
        kv,
        ..LlmOptions::default()
    };
    let llm = Llm::load(&files, &options)?;
    say!("{name}, {}; {} repetitions, after one that does not count", llm.place(), args.repetitions);
    table::head(&["test", "tokens/s", "standard deviation", "tokens drafted", "right"])?;
    for tokens in &args.prompt_tokens {
        Test::Prompt(tokens.get()).print(&llm, args.repetitions.get(), "")?;
    }
    let generate = |llm: &Llm, suffix: &str| {
        let mut tests = args.generate_tokens.iter().map(|tokens| Test::Generate(tokens.get()));
        tests.try_for_each(|test| test.print(llm, args.repetitions.get(), suffix))
    };
    generate(&llm, "")?;
    if args.speculate.is_none() && args.draft_model.is_none() {
        return Ok(());
    }
    // One at a time has room.
    drop(llm);
    let draft_model = args.draft_model.as_ref().map(|name| hub.locate(name)).transpose()?;
    generate(
        &Llm::load(&files, &LlmOptions { draft: args.speculate, draft_model, ..options })?,
        " with drafts",
    )
}
