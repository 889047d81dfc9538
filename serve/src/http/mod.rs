//! OpenAI's API over the engine: `flashinfer serve`.
//!
//! | module | its job |
//! |---|---|
//! | `router` | which path is whose |
//! | `types`, `extract` | bodies of requests and answers; wrong fields by their names |
//! | `chat`, `completions` | answers, whole or streamed |
//! | `prompt`, `turns` | messages and texts to tokens, and how much of that at a time |
//! | `answers`, `logprobs`, `sse` | what comes of the engine, and how it is sent |
//! | `models`, `tokenize`, `health`, `metrics` | the other endpoints |
//! | `openapi`, `page` | the API's description, and a page to chat |
//! | `error` | errors as OpenAI's API says them |
//! | `auth`, `log` | who may ask, and a line for each request |
//! | `connections`, `life` | sockets with limits and timeouts; from start to shutdown |
//!
//! No module below this one knows of an async runtime. A handler gives a request to
//! [`Engine::submit`](crate::engine::Engine::submit), and takes events in its task.

mod answers;
mod auth;
mod chat;
mod completions;
mod connections;
mod error;
mod extract;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod health;
mod life;
mod log;
mod logprobs;
mod metrics;
mod models;
mod openapi;
mod page;
mod prompt;
mod reply;
mod router;
mod sse;
#[cfg(test)]
mod tests;
mod tokenize;
mod turns;
mod types;

use std::{
    collections::BTreeSet,
    net::TcpListener,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

pub use self::{auth::ApiKey, log::LogFormat};
use self::{error::ApiError, life::Life, metrics::Metrics, turns::Turns};
use crate::{Llm, Result};

/// The most names of fields that are remembered, of those that nobody knows.
const MAX_IGNORED: usize = 256;
/// Threads that serve connections, at most.
const THREADS: usize = 8;

/// How a server is run.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// The names of the model, at least one.
    pub names: Vec<String>,
    /// What clients have to show, if anything.
    pub api_key: Option<ApiKey>,
    /// The origins whose pages may ask, `*` for all.
    pub cors: Vec<String>,
    /// The most connections at a time; further ones wait to be accepted.
    pub max_connections: usize,
    /// How long requests may go on once the server is told to end.
    pub drain_timeout: Duration,
    /// How long the headers of a request may take, and how long a connection may be idle.
    pub header_timeout: Duration,
    /// How long the body of a request may take.
    pub body_timeout: Duration,
    /// How long a client may take nothing of an answer, before it is given up.
    pub write_timeout: Duration,
    /// How long a stream may be silent, before a comment is sent.
    pub keep_alive: Duration,
}

impl ServerOptions {
    /// The defaults, for a model of this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            names: vec![name.into()],
            api_key: None,
            cors: Vec::new(),
            max_connections: 4096,
            drain_timeout: Duration::from_secs(30),
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(30),
            keep_alive: Duration::from_secs(15),
        }
    }
}

/// What all requests share.
pub struct Server {
    options: ServerOptions,
    /// The first of the model's names.
    name: String,
    llm: OnceLock<Llm>,
    /// When it was made, in seconds since 1970.
    created: u64,
    ignored: IgnoredFields,
    turns: Turns,
    metrics: Metrics,
    life: Life,
}

impl Server {
    /// A server without a model.
    ///
    /// # Errors
    /// The model has no name, or there may be no connections.
    pub fn new(options: ServerOptions) -> Result<Self> {
        if options.max_connections == 0 {
            return Err("the most connections are 0; expected at least 1".into());
        }
        let name = options.names.first().ok_or("the model has no name; expected at least one")?;
        Ok(Self {
            name: name.clone(),
            metrics: Metrics::new(name),
            options,
            llm: OnceLock::new(),
            created: seconds_since_1970(),
            ignored: IgnoredFields::default(),
            turns: Turns::default(),
            life: Life::default(),
        })
    }

    /// The model.
    ///
    /// # Errors
    /// It is still loaded, or the server shuts down.
    fn llm(&self) -> Result<&Llm, ApiError> {
        if self.life.drains() {
            return Err(ApiError::unavailable("the server shuts down; ask another one"));
        }
        self.llm.get().ok_or_else(|| ApiError::unavailable("the model is being loaded; try again later"))
    }

    /// The most tokens of a prompt and its answer.
    fn max_model_len(&self, llm: &Llm) -> usize {
        let bounds = llm.engine().bounds();
        bounds.context.min(bounds.cache_tokens)
    }

    /// The name under which a request asks for the model.
    ///
    /// # Errors
    /// There is none of that name.
    fn name(&self, asked: Option<&str>) -> Result<String, ApiError> {
        let Some(asked) = asked else { return Ok(self.name.clone()) };
        match self.options.names.iter().any(|name| name == asked) {
            true => Ok(asked.into()),
            false => Err(ApiError::no_model(asked)),
        }
    }

    /// Has the requests end that are answered, and refuses others: what a first signal does.
    pub fn drain(&self) {
        self.life.drain();
    }

    /// Answers requests until the server is told to end, by a signal or [`drain`](Self::drain).
    /// The model is loaded meanwhile.
    ///
    /// # Errors
    /// The model cannot be loaded, or no runtime be started.
    pub fn run(
        self: &Arc<Self>,
        listener: TcpListener,
        load: impl FnOnce() -> Result<Llm> + Send + 'static,
    ) -> Result<()> {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
        let served = runtime.block_on(life::run(self, listener, Box::new(load)));
        // What is still open was given its time.
        runtime.shutdown_background();
        // Something of it may keep the model for longer than this process lives.
        if let Some(llm) = self.llm.get() {
            llm.end_ranks();
        }
        served
    }
}

/// Names of fields that nobody knows, each of which the log has once.
#[derive(Default)]
struct IgnoredFields(Mutex<BTreeSet<String>>);

impl IgnoredFields {
    fn note(&self, names: Vec<String>) {
        if names.is_empty() {
            return;
        }
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for name in names.iter().map(|name| error::shorten(name)) {
            if known.len() < MAX_IGNORED && known.insert(name.clone()) {
                tracing::warn!(field = name, "requests have a field that is not known, which is ignored");
            }
        }
    }
}

fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
