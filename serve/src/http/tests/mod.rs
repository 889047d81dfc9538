//! A server in this process, over a real socket and the simulated backend, whose tokens are the
//! bytes of ASCII.

mod chat;
mod client;
mod completions;
mod endpoints;
mod large;
mod life;
mod load;
mod refused;
mod tools;

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use flashinfer_rs::kv::PageAllocator;
use serde_json::{Value, json};

use self::client::{Response, Stream};
use super::{Server, ServerOptions};
use crate::{
    Llm, Result,
    backend::{
        Backend,
        simulated::{Language, Simulated},
    },
    engine::{
        Engine, EngineConfig, Status,
        testing::{ASCII, Gate},
    },
    scheduler::Limits,
    tests::bytes,
};

/// Writes `role: content` in a line for each message.
const TEMPLATE: &str = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}\
                        {% if add_generation_prompt %}assistant: {% endif %}";
const CONTEXT: usize = 400;

fn config() -> EngineConfig {
    let limits = Limits {
        step_tokens: 64,
        chunk_tokens: 64,
        max_running: 32,
        context: CONTEXT,
        draft: 0,
        ends: [0].into(),
    };
    EngineConfig { page_size: 4, num_pages: 1600, ..EngineConfig::new(limits) }
}

fn options() -> ServerOptions {
    ServerOptions { drain_timeout: Duration::from_secs(20), ..ServerOptions::new("test") }
}

/// A model with this chat template that knows all of its tokenizer's tokens.
fn llm_with(template: &str) -> Llm {
    let text = bytes::chat_text(template);
    let language = Language { vocab_size: text.vocab_size(), nan: 0 };
    let limits = Limits { context: 4000, ends: text.ends().clone(), ..config().limits };
    let load = move |pool: &PageAllocator, limits: &mut Limits| {
        Ok(Simulated::new(pool, limits.step_capacity(), language))
    };
    Llm::of_engine(Engine::start(EngineConfig { limits, ..config() }, text, load).unwrap())
}

/// A model on a backend that `change` makes of the simulated one.
fn llm<B: Backend + 'static>(
    config: EngineConfig,
    change: impl FnOnce(Simulated) -> B + Send + 'static,
) -> Llm {
    let load = |pool: &PageAllocator, limits: &mut Limits| {
        Ok(change(Simulated::new(pool, limits.step_capacity(), ASCII)))
    };
    Llm::of_engine(Engine::start(config, bytes::chat_text(TEMPLATE), load).unwrap())
}

/// A server, which ends when this is dropped.
struct TestServer {
    server: Arc<Server>,
    address: SocketAddr,
    thread: Option<JoinHandle<std::result::Result<(), String>>>,
}

impl TestServer {
    /// A server whose model is loaded.
    fn start() -> Self {
        Self::with(options(), llm(config(), |backend| backend))
    }

    fn with(options: ServerOptions, llm: Llm) -> Self {
        let server = Self::loading(options, || Ok(llm));
        until(|| server.get("/ready").status == 200);
        server
    }

    /// A server that may not have its model yet.
    fn loading(options: ServerOptions, load: impl FnOnce() -> Result<Llm> + Send + 'static) -> Self {
        let server = Arc::new(Server::new(options).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let running = server.clone();
        let run = move || running.run(listener, load).map_err(|error| error.to_string());
        Self { server, address, thread: Some(thread::spawn(run)) }
    }

    fn get(&self, path: &str) -> Response {
        client::send(self.address, "GET", path, &[], None)
    }

    fn post(&self, path: &str, body: &Value) -> Response {
        client::send(self.address, "POST", path, &[], Some(&body.to_string()))
    }

    fn chat(&self, body: &Value) -> Response {
        self.post("/v1/chat/completions", body)
    }

    fn complete(&self, body: &Value) -> Response {
        self.post("/v1/completions", body)
    }

    fn stream(&self, path: &str, body: &Value) -> Stream {
        Stream::open(self.address, path, body)
    }

    fn status(&self) -> Status {
        self.server.llm.get().unwrap().engine().status()
    }

    /// Waits until the engine has nothing to do and holds no pages.
    fn until_idle(&self) {
        until(|| {
            let status = self.status();
            status.running + status.waiting == 0 && status.held_pages == 0
        });
    }

    /// Ends the server, and says how it ended.
    fn end(&mut self) -> std::result::Result<(), String> {
        self.server.drain();
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.server.drain();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits until something holds.
fn until(holds: impl Fn() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < Duration::from_secs(60), "it does not come to hold");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A backend whose steps take a while.
fn slow(backend: Simulated) -> Simulated {
    backend.with_failure(|_| {
        thread::sleep(Duration::from_millis(2));
        None
    })
}

/// A chat of one greedy answer of so many tokens.
fn chat(text: &str, max_tokens: usize) -> Value {
    json!({
        "model": "test", "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
    })
}

/// A prompt with one greedy answer of so many tokens.
fn completion(prompt: impl Into<Value>, max_tokens: usize) -> Value {
    json!({
        "model": "test", "prompt": prompt.into(), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
    })
}

/// The first with the fields of the second.
fn with(mut body: Value, fields: Value) -> Value {
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}
