//! Bodies of requests, given to the endpoints without a socket.

use std::sync::{Arc, LazyLock};

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{Request, header},
};
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use tokio::runtime::{Builder, Runtime};

use super::{Server, ServerOptions, router::router};
use crate::{
    Llm,
    backend::simulated::{Language, Simulated},
    engine::{Engine, EngineConfig},
    fuzzing,
    scheduler::Limits,
};

const ENDPOINTS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"];
/// No answer is longer: the context has so few tokens.
const MOST_ANSWERED: usize = 16 << 20;
const CONTEXT: usize = 256;

/// A server on the stand-in backend.
struct Endpoints {
    runtime: Runtime,
    router: TowerToHyperService<Router>,
}

impl Endpoints {
    fn new() -> Self {
        let text = fuzzing::byte_level("gpt-2");
        let language = Language { vocab_size: text.vocab_size(), nan: 0 };
        let ends = text.ends().clone();
        let limits =
            Limits { step_tokens: 64, chunk_tokens: 64, max_running: 32, context: CONTEXT, draft: 0, ends };
        let config = EngineConfig { page_size: 4, num_pages: 8 * CONTEXT, ..EngineConfig::new(limits) };
        let engine = Engine::start(config, text, move |pool, limits| {
            Ok(Simulated::new(pool, limits.step_capacity(), language))
        });
        let server = Arc::new(Server::new(ServerOptions::new("fuzzed")).expect("a server"));
        assert!(server.llm.set(Llm::of_engine(engine.expect("an engine"))).is_ok());
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        Self { runtime, router: TowerToHyperService::new(router(&server)) }
    }
}

/// A request's body: which endpoint reads it is in the first byte.
pub fn http_body(bytes: &[u8]) {
    static ENDPOINTS_OF_SERVER: LazyLock<Endpoints> = LazyLock::new(Endpoints::new);
    let Endpoints { runtime, router } = &*ENDPOINTS_OF_SERVER;
    let Some((&which, body)) = bytes.split_first() else { return };
    let request = Request::post(ENDPOINTS[usize::from(which) % ENDPOINTS.len()])
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(body.to_vec()))
        .expect("a request");
    runtime.block_on(async {
        let response = router.call(request).await.expect("an answer");
        let status = response.status();
        let answer = to_bytes(response.into_body(), MOST_ANSWERED).await.expect("a whole answer");
        assert!(status.is_success() || status.is_client_error(), "{status}: {answer:?}");
        assert!(!answer.is_empty());
        if status.is_client_error() {
            let error: serde_json::Value = serde_json::from_slice(&answer).expect("JSON");
            assert!(error["error"]["message"].is_string(), "{error}");
        }
    });
}
