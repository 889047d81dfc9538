//! `flashinfer run MODEL [PROMPT]`: one answer, those to the lines of a file, or a conversation.
//!
//! All lines of a file (`--prompts`) share the steps of one engine and its KV cache. With
//! `--speculate` or `--draft-model` it guesses what comes next, and computes several tokens of an answer
//! in a step.
//! Neither changes what the model is given for a prompt; but a step with another number of rows
//! rounds in another way, so where two tokens are nearly as likely, an answer may go on otherwise
//! than the one that its prompt gets alone.

use std::{
    io::{self, IsTerminal},
    num::NonZeroUsize,
    path::PathBuf,
    sync::Arc,
};

use super::{
    answers::{Asked, answer},
    chat::Chat,
    conversation::Conversation,
    interrupt::Interrupt,
    out::{Output, note},
    precision::PrecisionArgs,
    prompts::{self, Line},
    ranks,
    sampling::SamplingArgs,
    terminal::PromptLine,
};
use crate::{
    Llm, LlmOptions, Result, SamplingParams,
    backend::device::Device,
    engine::Events,
    group::Parallel,
    hub::{Hub, ModelName},
    request::Request,
};

/// The most tokens of an answer outside of conversations, unless it is said.
const MAX_TOKENS: usize = 256;

/// Answer a prompt, or talk
#[derive(clap::Args)]
pub struct Args {
    /// `smollm2`, `hf.co/ORG/REPO[@REVISION][:FILE or QUANTIZATION]`, `ollama/NAME[:TAG]`,
    /// `https://HOST/FILE#sha256=DIGEST`, or the path of a GGUF file
    pub model: ModelName,
    /// The question; without one it is what is piped in, or a conversation begins
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
    /// Tokens that the KV cache holds, of all prompts that are answered at a time
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub cache_tokens: usize,
    /// Guess up to K tokens, and keep those that are right: by what was said before, or by
    /// --draft-model
    #[arg(long, value_name = "K", num_args = 0..=1, require_equals = true, default_missing_value = "4")]
    pub speculate: Option<usize>,
    /// A smaller model of the same vocabulary that guesses them; K is 4 then, unless it is said
    #[arg(long, value_name = "MODEL")]
    pub draft_model: Option<ModelName>,
    /// Where to compute
    #[arg(long, default_value = "auto")]
    pub device: Device,
    /// Give an answer that does not depend on what else is computed beside it
    #[arg(long)]
    pub deterministic: bool,
    /// Give N answers to each prompt
    #[arg(short, value_name = "N", default_value = "1")]
    pub n: NonZeroUsize,
    /// Show the log-probability of each token, and those of the N likeliest in its place
    #[arg(long, value_name = "N")]
    pub logprobs: Option<usize>,
    /// The bits of what a GPU keeps.
    #[command(flatten)]
    pub precision: PrecisionArgs,
    /// Have N GPUs compute the model together, as of `serve`
    #[arg(long, value_name = "N")]
    pub tensor_parallel: Option<NonZeroUsize>,
    /// How answers are sampled.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
enum Task {
    Answer(String),
    AnswerLines(Vec<Line>),
    Converse,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let parallel = Parallel::of(args.tensor_parallel.map(NonZeroUsize::get))?;
    // Rank 0 has the prompts.
    let follows = parallel.as_ref().is_some_and(Parallel::follows);
    let task = if follows { None } else { Some(task(args)?) };
    let hub = Hub::from_env()?;
    let files = hub.locate(&args.model)?;
    let draft_model = args.draft_model.as_ref().map(|name| hub.locate(name)).transpose()?;
    let options = LlmOptions { parallel, ..llm_options(args, draft_model) };
    let Some(task) = task else { return Llm::follow(&files, &options, ranks::ignore_signals) };
    let llm = Llm::load(&files, &options)?;
    llm.text().warnings().iter().for_each(|warning| note!("warning: {warning}"));
    let asked = |(name, heading, prompt): (String, Option<String>, Result<String>)| {
        let events = prompt.and_then(|prompt| submit(&llm, args, &prompt));
        Asked { name, heading, events }
    };
    let summary = match task {
        Task::Converse => return converse(args, llm, files, &hub),
        Task::Answer(prompt) => {
            let asked = [(String::new(), None, Ok(prompt))].into_iter().map(asked);
            answer(llm.engine(), asked, &mut Output)?
        }
        Task::AnswerLines(lines) => {
            let lines = lines.into_iter().map(|line| {
                let heading = line.prompt.clone().unwrap_or_else(|reason| format!("({reason})"));
                (format!("line {}", line.number), Some(heading), line.prompt.map_err(Into::into))
            });
            answer(llm.engine(), lines.map(asked), &mut Output)?
        }
    };
    note!("{}; {summary}", llm.place());
    summary.check()
}

/// How the arguments have a model loaded, with the files of one that drafts, but for what computes it.
fn llm_options(args: &Args, draft_model: Option<Vec<PathBuf>>) -> LlmOptions {
    let options = LlmOptions {
        device: args.device,
        cache_tokens: args.cache_tokens,
        draft: args.speculate,
        draft_model,
        deterministic: args.deterministic,
        weights: args.precision.weights,
        kv: args.precision.kv,
        max_queued_tokens: usize::MAX,
        ..LlmOptions::default()
    };
    // Whether drafts pay is measured, and steps that capture graphs take longer. Ranks have the same
    // options, and one of them the prompts.
    if options.draft_tokens() == 0 || args.prompts.is_some() || args.tensor_parallel.is_some() {
        return options;
    }
    LlmOptions { graphs_within: Some(super::GRAPHS_WITHIN), max_running: args.n.get(), ..options }
}

/// What the arguments ask for.
fn task(args: &Args) -> Result<Task> {
    match (&args.prompts, &args.prompt) {
        (Some(path), _) => prompts::read(path).map(Task::AnswerLines),
        (None, Some(prompt)) => Ok(Task::Answer(prompt.clone())),
        (None, None) if io::stdin().is_terminal() => match args.n.get() == 1 && args.logprobs.is_none() {
            true => Ok(Task::Converse),
            false => {
                Err("-n and --logprobs are for a prompt or --prompts; a conversation has neither".into())
            }
        },
        (None, None) => {
            let prompt = io::read_to_string(io::stdin());
            let prompt =
                prompt.map_err(|error| format!("cannot read the prompt from the standard input: {error}"))?;
            match prompt.trim().is_empty() {
                true => Err("there is no prompt: neither an argument, nor on the standard input".into()),
                false => Ok(Task::Answer(prompt)),
            }
        }
    }
}

/// Gives a prompt to the engine.
fn submit(llm: &Llm, args: &Args, prompt: &str) -> Result<Events> {
    let prompt = if args.raw {
        llm.text().encode(prompt)
    } else {
        let mut chat = Chat::new(args.system.clone());
        chat.ask(prompt);
        chat.encode(llm.text())?
    };
    let params = args.sampling.params(Some(MAX_TOKENS));
    let params = SamplingParams { n: args.n.get(), logprobs: args.logprobs, ..params };
    Ok(llm.engine().submit(Request::new(prompt, params))?)
}

fn converse(args: &Args, llm: Llm, files: Vec<PathBuf>, hub: &Hub) -> Result<()> {
    let mut conversation = Conversation {
        llm: Arc::new(llm),
        name: args.model.clone(),
        files,
        chat: Chat::new(args.system.clone()),
        raw: args.raw,
        sampling: args.sampling.clone(),
        verbose: false,
        interrupt: Interrupt::install()?,
    };
    note!("{} {}; /help shows what can be said beside questions", args.model, conversation.llm.place());
    let mut line = PromptLine::new(hub.folder().join("history"))?;
    conversation.run(&mut |prompt| line.read(prompt), &mut Output)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        args: Args,
    }

    fn parse(words: &[&str]) -> std::result::Result<Args, clap::Error> {
        Program::try_parse_from([&["run", "smollm2"], words].concat()).map(|program| program.args)
    }

    #[test]
    fn few_graphs_are_captured_early_where_drafts_are_measured() {
        let of = |args: &[&str]| {
            let args = parse(args).unwrap();
            let options = llm_options(&args, args.draft_model.as_ref().map(|_| Vec::new()));
            (options.graphs_within.is_some(), options.max_running)
        };
        assert_eq!(of(&["Hi", "--speculate"]), (true, 1));
        assert_eq!(of(&["Hi", "--draft-model", "ollama/small", "-n", "3"]), (true, 3));
        let many = LlmOptions::default().max_running;
        for other in [
            &["Hi"][..],
            &["Hi", "--speculate=0", "--draft-model", "ollama/small"],
            &["--prompts", "prompts.txt", "--speculate"],
            &["Hi", "--speculate", "--tensor-parallel", "2"],
        ] {
            assert_eq!(of(other), (false, many), "{other:?}");
        }
    }

    #[test]
    fn prompts_and_drafts_come_from_the_command_line() {
        let args = parse(&["--speculate", "Hi"]).unwrap();
        assert_eq!((args.speculate, task(&args).unwrap()), (Some(4), Task::Answer("Hi".into())));
        assert_eq!(parse(&["Hi"]).unwrap().speculate, None);
        assert_eq!(parse(&["Hi", "--speculate=7"]).unwrap().speculate, Some(7));
        let args = parse(&["Hi", "--draft-model", "ollama/small"]).unwrap();
        assert_eq!(
            (args.speculate, args.draft_model.unwrap().to_string()),
            (None, "ollama/small:latest".into())
        );
        assert!(parse(&["Hi", "--prompts", "file"]).is_err());
        assert!(parse(&["Hi", "--raw", "--system", "Be brief."]).is_err());
        let args = parse(&["Hi", "-n", "3", "--logprobs", "2"]).unwrap();
        assert_eq!((args.n.get(), args.logprobs), (3, Some(2)));
        assert!(parse(&["Hi", "-n", "0"]).is_err());

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.txt");
        std::fs::write(&path, "One?\n\nThree").unwrap();
        let args = parse(&["--prompts", path.to_str().unwrap()]).unwrap();
        let line = |number, prompt: &str| Line { number, prompt: Ok(prompt.into()) };
        assert_eq!(task(&args).unwrap(), Task::AnswerLines(vec![line(1, "One?"), line(3, "Three")]));
        std::fs::remove_file(&path).unwrap();
        assert!(task(&args).unwrap_err().to_string().contains("cannot read the prompts"));
    }
}
