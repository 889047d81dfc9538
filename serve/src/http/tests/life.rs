//! From start to shutdown, and clients that leave, wait or do not read.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::mpsc,
};

use serde_json::json;

use super::*;
use crate::http::ApiKey;

fn endless(prompt: &str) -> serde_json::Value {
    with(completion(prompt, 390), json!({"stream": true}))
}

#[test]
fn requests_while_the_model_is_loaded_are_refused() {
    let (loaded, load) = mpsc::channel();
    let server = TestServer::loading(options(), move || Ok(load.recv().unwrap()));
    server.get("/health").ok();
    let refused = server.chat(&chat("x", 1));
    refused.error(503);
    assert_eq!(refused.header("retry-after"), Some("5"));
    for path in ["/ready", "/v1/models"] {
        server.get(path).error(503);
    }
    assert_eq!(server.get("/metrics").status, 200);
    loaded.send(llm(config(), |backend| backend)).unwrap();
    until(|| server.get("/ready").status == 200);
    server.chat(&chat("x", 1)).ok();
}

#[test]
fn a_model_that_cannot_be_loaded_ends_the_server() {
    let mut server = TestServer::loading(options(), || Err("no such file".into()));
    assert_eq!(server.thread.take().unwrap().join().unwrap(), Err("no such file".into()));
    let mut server = TestServer::loading(options(), || panic!("a fault"));
    let error = server.thread.take().unwrap().join().unwrap().unwrap_err();
    assert!(error.contains("panicked"), "{error}");
}

#[test]
fn running_requests_end_when_the_server_does() {
    let mut server = TestServer::with(options(), llm(config(), slow));
    let mut stream = server.stream("/v1/completions", &endless("x"));
    assert!(stream.next_data().is_some());
    server.server.drain();
    server.get("/ready").error(503);
    assert_eq!(server.get("/health").status, 200);
    let refused = server.chat(&chat("x", 1));
    refused.error(503);
    assert!(refused.header("retry-after").is_some());
    let chunks = stream.chunks();
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert_eq!(server.end(), Ok(()));
    assert!(TcpStream::connect(server.address).is_err());
}

#[test]
fn requests_that_take_too_long_are_given_up_at_the_end() {
    let gate = Gate::default();
    let at = gate.clone();
    let drain_timeout = Duration::from_millis(100);
    let llm = llm(config(), move |backend| at.before(backend));
    let mut server = TestServer::with(ServerOptions { drain_timeout, ..options() }, llm);
    let mut stream = server.stream("/v1/completions", &endless("x"));
    let begin = Instant::now();
    assert_eq!(server.end(), Ok(()));
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert_eq!(stream.next_data(), None);
    gate.open();
}

#[test]
fn a_client_that_leaves_ends_its_request() {
    let server = TestServer::with(options(), llm(config(), slow));
    let mut stream = server.stream("/v1/completions", &endless("left"));
    assert!(stream.next_data().is_some());
    stream.leave();
    server.until_idle();
    assert!(server.status().stats.decoded < 300, "{:?}", server.status());
    // Its prompt was read.
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("vllm:prompt_tokens_total{model_name=\"test\",engine=\"0\"} 4\n"), "{metrics}");
    // One that waits for a whole answer, too.
    let mut waiting = TcpStream::connect(server.address).unwrap();
    let body = with(endless("waits"), json!({"stream": false})).to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    waiting.write_all((head + &body).as_bytes()).unwrap();
    until(|| server.status().running == 1);
    drop(waiting);
    server.until_idle();
    assert!(server.status().stats.decoded < 600, "{:?}", server.status());
    assert!(
        server.get("/metrics").body.contains("finished_reason=\"abort\"} 2"),
        "{}",
        server.get("/metrics").body
    );
}

#[test]
fn a_client_that_does_not_read_is_given_up() {
    let write_timeout = Duration::from_millis(300);
    let limits = Limits { context: 1 << 20, ..config().limits };
    let config = EngineConfig { num_pages: 1 << 17, limits, ..config() };
    let options = ServerOptions { write_timeout, ..options() };
    let server = TestServer::with(options, llm(config, |backend| backend));
    // An answer that is larger than all buffers on its way.
    let body = with(completion("x", 400_000), json!({"stream": true, "logprobs": 20}));
    let mut stream = server.stream("/v1/completions", &body);
    assert!(stream.next_data().is_some());
    until(|| server.status().running == 1);
    server.until_idle();
    assert!(server.status().stats.decoded < 400_000, "{:?}", server.status());
}

#[test]
fn silence_is_broken_by_comments() {
    let gate = Gate::default();
    let at = gate.clone();
    let options = ServerOptions { keep_alive: Duration::from_millis(50), ..options() };
    let server = TestServer::with(options, llm(config(), move |backend| at.before(backend)));
    let mut stream = server.stream("/v1/completions", &with(completion("x", 3), json!({"stream": true})));
    for _ in 0..2 {
        assert_eq!(stream.next_raw().as_deref(), Some(": keep-alive"));
    }
    gate.open();
    assert!(!stream.chunks().is_empty());
}

#[test]
fn headers_that_do_not_come_end_the_connection() {
    let options = ServerOptions { header_timeout: Duration::from_millis(200), ..options() };
    let server = TestServer::with(options, llm(config(), |backend| backend));
    let mut slow = TcpStream::connect(server.address).unwrap();
    slow.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    slow.write_all(b"GET /health HTTP/1.1\r\nHost:").unwrap();
    let mut rest = Vec::new();
    slow.read_to_end(&mut rest).unwrap();
    assert!(!rest.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&rest));
}

#[test]
fn bodies_that_do_not_come_are_an_error() {
    let options = ServerOptions { body_timeout: Duration::from_millis(200), ..options() };
    let server = TestServer::with(options, llm(config(), |backend| backend));
    let head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100\r\n\
                 Content-Type: application/json\r\n\r\n{";
    client::send_raw(server.address, head).error(408);
}

#[test]
fn connections_beyond_the_limit_wait() {
    let options = ServerOptions { max_connections: 1, ..options() };
    let server = TestServer::with(options, llm(config(), |backend| backend));
    let first = TcpStream::connect(server.address).unwrap();
    let (sent, came) = mpsc::channel();
    let address = server.address;
    let second = thread::spawn(move || sent.send(client::send(address, "GET", "/health", &[], None).status));
    assert!(came.recv_timeout(Duration::from_millis(200)).is_err());
    drop(first);
    assert_eq!(came.recv_timeout(Duration::from_secs(30)), Ok(200));
    second.join().unwrap().unwrap();
}

#[test]
fn a_key_is_needed_where_there_is_one() {
    let options = ServerOptions { api_key: Some(ApiKey::new("sk-secret").unwrap()), ..options() };
    let server = TestServer::with(options, llm(config(), |backend| backend));
    let body = chat("x", 1).to_string();
    let send = |headers: &[(&str, &str)]| {
        client::send(server.address, "POST", "/v1/chat/completions", headers, Some(&body))
    };
    for headers in [&[][..], &[("Authorization", "Bearer sk-wrong")], &[("Authorization", "sk-secret")]] {
        let refused = send(headers);
        assert_eq!(refused.error(401)["code"], "invalid_api_key");
        assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
    }
    send(&[("Authorization", "Bearer sk-secret")]).ok();
    for path in ["/v1/models", "/v1/models/test"] {
        server.get(path).error(401);
    }
    for path in ["/tokenize", "/detokenize", "/v1/completions"] {
        server.post(path, &json!({})).error(401);
    }
    for path in ["/health", "/ready", "/version", "/metrics", "/openapi.json", "/"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
}

#[test]
fn a_failure_in_a_stream_is_an_event_and_says_nothing_of_the_server() {
    let llm = llm(config(), |backend| {
        backend.with_failure(|tokens| tokens.contains(&33).then(|| "cannot read /secret/path".into()))
    });
    let server = TestServer::with(options(), llm);
    let error = server.complete(&completion("a!", 5)).error(500);
    assert!(!error.to_string().contains("secret"), "{error}");
    let chunks =
        server.stream("/v1/completions", &with(completion("a!", 5), json!({"stream": true}))).chunks();
    assert_eq!(chunks.last().unwrap()["error"]["type"], "server_error");
    assert!(!chunks.last().unwrap().to_string().contains("secret"));
    server.complete(&completion("a", 2)).ok();
}

#[test]
fn a_dead_engine_is_told_to_who_asks_for_health() {
    let llm = llm(config(), |backend| {
        backend.with_failure(|tokens| {
            assert!(!tokens.contains(&33), "a fault of the backend");
            None
        })
    });
    let server = TestServer::with(options(), llm);
    server.complete(&completion("a!", 5)).error(500);
    until(|| server.get("/health").status == 503);
    server.get("/ready").error(503);
    server.complete(&completion("a", 5)).error(500);
}
