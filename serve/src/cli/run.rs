//! `flashinfer run MODEL [PROMPT]`: answers.
//!
//! With `--prompts FILE` it answers each line of a file, and all share the steps
//! of one scheduler and one KV cache. With `--speculate` it guesses what comes
//! next, and computes several tokens of an answer in a step. Neither changes what
//! the model is given for a prompt; but a step with another number of rows rounds
//! in another way, so where two tokens are nearly as likely, an answer may go on
//! otherwise than the one that its prompt gets alone.

use std::{
    fs,
    io::{self, IsTerminal},
    num::NonZeroUsize,
    path::PathBuf,
};

use flashinfer_rs::kv::PageAllocator;

use super::{
    PAGE_SIZE,
    answers::answer,
    device::{self, Device, STEP_TOKENS},
};
use crate::{Result, hub, model::Model, request::Limits, scheduler::Scheduler, text::Text};

/// Answer a prompt, or each prompt of a file
#[derive(clap::Args)]
pub struct Args {
    /// `smollm2`, or the path of a GGUF file
    pub model: String,
    /// The question; what is piped in follows it
    pub prompt: Option<String>,
    /// Answer each line of a file; `-` is the standard input
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompts: Option<PathBuf>,
    /// Continue the prompt, instead of answering it as a chat message
    #[arg(long)]
    pub raw: bool,
    /// The system prompt, instead of the model's own
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub system: Option<String>,
    /// The most tokens of an answer
    #[arg(long, value_name = "N", default_value = "256")]
    pub max_tokens: NonZeroUsize,
    /// Tokens that the KV cache holds, of all prompts that are answered at a time
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub cache_tokens: usize,
    /// Guess up to K tokens from what was said before, and keep those that are right
    #[arg(
        long, value_name = "K", num_args = 0..=1, require_equals = true, default_missing_value = "4",
        default_value = "0", hide_default_value = true
    )]
    pub speculate: usize,
    /// Where to compute
    #[arg(long, default_value = "auto")]
    pub device: Device,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let prompts = prompts(args)?;
    let model = Model::open(&hub::locate(&args.model)?)?;
    let text = Text::from_gguf(&model.content)?;
    let context = model.config.context_length;
    let tokens = args.cache_tokens.min(context.saturating_mul(prompts.len()));
    let pool = PageAllocator::new(tokens / PAGE_SIZE, PAGE_SIZE)?;
    let max_tokens = args.max_tokens.get();
    let ends = text.ends().clone();
    let limits = Limits { step_tokens: STEP_TOKENS, max_tokens, context, draft: args.speculate, ends };
    let mut scheduler = Scheduler::new(&pool, limits);
    for (index, prompt) in prompts.iter().enumerate() {
        let tokens = match args.raw {
            true => text.encode(prompt)?,
            false => text.encode_chat(args.system.as_deref(), prompt)?,
        };
        scheduler.push(tokens).map_err(|error| match &args.prompts {
            Some(_) => format!("prompt {}: {error}", index + 1).into(),
            None => error,
        })?;
    }
    let (mut engine, backend) = device::load(args.device, &model, &pool)?;
    let headings = args.prompts.as_ref().map(|_| prompts.as_slice());
    let summary = answer(&mut *engine, &mut scheduler, &text, headings)?;
    eprintln!("{backend}; {summary}");
    summary.check()
}

/// What is to be answered.
pub fn prompts(args: &Args) -> Result<Vec<String>> {
    let Some(path) = &args.prompts else {
        return match &args.prompt {
            Some(prompt) => Ok(vec![prompt.clone()]),
            None if io::stdin().is_terminal() => Err("no prompt is given".into()),
            None => Ok(vec![io::read_to_string(io::stdin())?]),
        };
    };
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
