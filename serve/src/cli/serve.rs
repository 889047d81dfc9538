//! `flashinfer serve [MODEL]`: OpenAI's API.

use std::{io::Write, net::TcpListener, num::NonZeroUsize, sync::Arc, time::Duration};

use super::{out::Output, precision::PrecisionArgs, ranks};
use crate::{
    Llm, LlmOptions, Result,
    backend::device::Device,
    exit,
    group::Parallel,
    http::{ApiKey, LogFormat, Server, ServerOptions},
    hub::{Hub, ModelName},
};

/// Answer requests of OpenAI's API
#[derive(clap::Args)]
pub struct Args {
    /// As of `run`
    #[arg(default_value = "smollm2")]
    pub model: ModelName,
    /// The address to listen at; 0.0.0.0 and [::] are all of this machine's
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// The port; 0 takes a free one, which is printed
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Where to compute
    #[arg(long, default_value = "auto")]
    pub device: Device,
    /// What clients call the model, instead of MODEL; the first of several names is in answers to
    /// those who name none
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub served_model_name: Vec<String>,
    /// What clients have to show as `Authorization: Bearer KEY`
    #[arg(long, value_name = "KEY", env = "FLASHINFER_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// An origin whose pages may ask, as `https://example.org`; `*` for all
    #[arg(long, value_name = "ORIGIN")]
    pub cors: Vec<String>,
    /// Tokens that the KV cache holds, of all requests that run
    #[arg(long, value_name = "N", default_value_t = 32_768)]
    pub cache_tokens: usize,
    /// The most answers that run at a time
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_running: usize,
    /// The most answers that run or wait; what comes then is refused, with status 429
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub max_queued: usize,
    /// The most tokens of their prompts
    #[arg(long, value_name = "N", default_value_t = 1 << 22)]
    pub max_queued_tokens: usize,
    /// The most connections; further ones wait
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub max_connections: usize,
    /// Guess up to K tokens, and keep those that are right: by what was said before, or by
    /// --draft-model
    #[arg(long, value_name = "K", num_args = 0..=1, require_equals = true, default_missing_value = "4")]
    pub speculate: Option<usize>,
    /// A smaller model of the same vocabulary that guesses them; K is 4 then, unless it is said
    #[arg(long, value_name = "MODEL")]
    pub draft_model: Option<ModelName>,
    /// Give answers that do not depend on what else is computed beside them
    #[arg(long)]
    pub deterministic: bool,
    /// The bits of what a GPU keeps.
    #[command(flatten)]
    pub precision: PrecisionArgs,
    /// Have N GPUs compute the model together, each in a process of its own, which this one starts; or
    /// the processes of torchrun, mpirun or srun, if it is one of them. 1 takes no notice of those
    #[arg(long, value_name = "N")]
    pub tensor_parallel: Option<NonZeroUsize>,
    /// Seconds that requests may still take after SIGTERM or Ctrl-C; a second one ends at once
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub drain_timeout: u64,
    /// How the log is written
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    args.log_format.install()?;
    let parallel = Parallel::of(args.tensor_parallel.map(NonZeroUsize::get))?;
    if parallel.as_ref().is_some_and(Parallel::follows) {
        let options = LlmOptions { parallel, ..llm_options(args) };
        return Llm::follow(&Hub::from_env()?.locate(&args.model)?, &options, ranks::ignore_signals);
    }
    let server = Arc::new(Server::new(options(args)?)?);
    let listener = TcpListener::bind((args.host.as_str(), args.port))
        .map_err(|error| format!("cannot listen at {} port {}: {error}", args.host, args.port))?;
    // It serves, whether anybody reads this or not.
    let _ = writeln!(Output, "listening at http://{}", listener.local_addr()?);
    let llm_options = LlmOptions { parallel, ..llm_options(args) };
    let (model, draft_model) = (args.model.clone(), args.draft_model.clone());
    let load = move || {
        let hub = Hub::from_env()?;
        let draft_model = draft_model.map(|name| hub.locate(&name)).transpose()?;
        let llm = Llm::load(&hub.locate(&model)?, &LlmOptions { draft_model, ..llm_options })?;
        llm.text().warnings().iter().for_each(|warning| tracing::warn!("{warning}"));
        Ok(llm)
    };
    server.run(listener, load)?;
    // Whoever else has it still loads the model, or answers.
    if Arc::into_inner(server).is_none() {
        exit::at_once(0);
    }
    Ok(())
}

fn options(args: &Args) -> Result<ServerOptions> {
    if let Some(origin) = args.cors.iter().find(|origin| !is_origin(origin)) {
        return Err(format!("`{origin}` is no origin; expected one as https://example.org, or *").into());
    }
    let names = match args.served_model_name.as_slice() {
        [] => vec![default_name(&args.model)],
        names => names.to_vec(),
    };
    Ok(ServerOptions {
        names,
        api_key: args.api_key.clone().map(ApiKey::new).transpose()?,
        cors: args.cors.clone(),
        max_connections: args.max_connections,
        drain_timeout: Duration::from_secs(args.drain_timeout),
        ..ServerOptions::new("")
    })
}

fn llm_options(args: &Args) -> LlmOptions {
    LlmOptions {
        device: args.device,
        cache_tokens: args.cache_tokens,
        max_running: args.max_running,
        max_queued: args.max_queued,
        max_queued_tokens: args.max_queued_tokens,
        draft: args.speculate,
        deterministic: args.deterministic,
        weights: args.precision.weights,
        kv: args.precision.kv,
        graphs_within: Some(super::GRAPHS_WITHIN),
        ..LlmOptions::default()
    }
}

/// What clients call a model: its name, or of a path the file's without the folder.
fn default_name(model: &ModelName) -> String {
    let name = match model {
        ModelName::Path(path) => path.file_stem().map(|stem| stem.to_string_lossy().into_owned()),
        _ => None,
    };
    name.unwrap_or_else(|| model.to_string())
}

fn is_origin(origin: &str) -> bool {
    let (scheme, host) = origin.split_once("://").unwrap_or_default();
    origin == "*" || (matches!(scheme, "http" | "https") && !host.is_empty() && !host.contains(['/', ' ']))
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

    fn parse(words: &[&str]) -> Args {
        Program::parse_from([&["serve"], words].concat()).args
    }

    #[test]
    fn the_model_is_called_by_its_names() {
        let names = |words: &[&str]| options(&parse(words)).unwrap().names;
        assert_eq!(names(&[]), ["smollm2"]);
        assert_eq!(names(&["/models/some-model.gguf"]), ["some-model"]);
        assert_eq!(names(&["hf.co/org/repo:Q8_0"]), ["hf.co/org/repo:Q8_0"]);
        assert_eq!(names(&["--served-model-name", "a", "b"]), ["a", "b"]);
    }

    #[test]
    fn addresses_are_local_unless_it_is_said() {
        let args = parse(&[]);
        assert_eq!((args.host.as_str(), args.port, args.device), ("127.0.0.1", 8000, Device::Auto));
        assert_eq!(parse(&["--device", "simulated"]).device, Device::Simulated);
        let origins = ["*", "https://example.org", "http://localhost:3000"];
        assert!(origins.into_iter().all(is_origin));
        let others = ["", "example.org", "https://", "https://example.org/", "ftp://example.org"];
        assert!(!others.into_iter().any(is_origin));
    }
}
