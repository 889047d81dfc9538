//! The program `flashinfer serve`: its address, its signals, and what it prints.
#![cfg(unix)]

#[path = "../src/http/tests/client.rs"]
#[expect(dead_code, reason = "the library's tests use the rest")]
mod client;

use std::{
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use client::Stream;
use test_support::required;

/// The program, which is killed when this is dropped.
struct Program {
    child: Child,
    address: SocketAddr,
}

impl Program {
    /// Over the stand-in backend, ready; `None`, after saying why, where the model cannot be reached.
    fn start(arguments: &[&str]) -> Option<Self> {
        let program = Self::listening(&[&["--device", "simulated"], arguments].concat())?;
        let begin = Instant::now();
        while client::send(program.address, "GET", "/ready", &[], None).status != 200 {
            assert!(begin.elapsed() < Duration::from_secs(60));
            thread::sleep(Duration::from_millis(5));
        }
        Some(program)
    }

    /// One that listens, and loads the model.
    fn listening(arguments: &[&str]) -> Option<Self> {
        let pulled =
            Command::new(env!("CARGO_BIN_EXE_flashinfer")).args(["pull", "smollm2"]).output().unwrap();
        if !pulled.status.success() {
            required::skip(required::MODEL, String::from_utf8_lossy(&pulled.stderr));
            return None;
        }
        let mut child = Command::new(env!("CARGO_BIN_EXE_flashinfer"))
            .args(["serve", "smollm2", "--port", "0", "--log-format", "json"])
            .args(arguments)
            .env("FLASHINFER_API_KEY", "sk-test")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening at http://").unwrap_or_else(|| panic!("{line:?}"));
        Some(Self { address: address.parse().unwrap(), child })
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    /// How the program ends, and its log.
    fn end(mut self) -> (ExitStatus, Vec<Value>) {
        let mut log = String::new();
        self.child.stderr.as_mut().unwrap().read_to_string(&mut log).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}")));
        (self.child.wait().unwrap(), lines.collect())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A stream of so many tokens, with a prompt that no log may have.
fn stream(program: &Program, tokens: usize) -> Stream {
    let body = json!({"prompt": "a secret", "max_tokens": tokens, "stream": true, "ignore_eos": true});
    Stream::open_with(program.address, "/v1/completions", &[("Authorization", "Bearer sk-test")], &body)
}

#[test]
fn a_first_signal_lets_requests_end_and_a_second_does_not() {
    let Some(program) = Program::start(&["--served-model-name", "tiny"]) else { return };
    let models =
        client::send(program.address, "GET", "/v1/models", &[("Authorization", "Bearer sk-test")], None);
    assert_eq!(models.ok()["data"][0]["id"], "tiny");
    assert_eq!(client::send(program.address, "GET", "/v1/models", &[], None).status, 401);
    let mut running = stream(&program, 40);
    assert!(running.next_data().is_some());
    program.signal("TERM");
    let chunks = running.chunks();
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
    let (status, log) = program.end();
    assert!(status.success(), "{status}");
    let line = log.iter().find(|line| line["path"] == "/v1/completions").unwrap();
    assert_eq!((&line["status"], &line["completion_tokens"]), (&json!(200), &json!(40)));
    assert!(line["request_id"].is_string() && line["whole"] == true, "{line}");
    assert!(log.iter().all(|line| !line.to_string().contains("secret")));

    let program = Program::start(&["--drain-timeout", "3600"]).unwrap();
    let mut running = stream(&program, 8000);
    assert!(running.next_data().is_some());
    program.signal("INT");
    while client::send(program.address, "GET", "/ready", &[], None).status == 200 {}
    program.signal("TERM");
    let (status, _) = program.end();
    assert_eq!(status.code(), Some(130));
}

/// The thread that loads may be at work on a GPU, where there is one.
#[test]
fn a_signal_ends_a_server_that_still_loads() {
    for milliseconds in [0, 20, 100, 300, 600, 1000] {
        let Some(program) = Program::listening(&[]) else { return };
        // It takes signals once it answers.
        assert_eq!(client::send(program.address, "GET", "/health", &[], None).status, 200);
        thread::sleep(Duration::from_millis(milliseconds));
        program.signal("TERM");
        let begin = Instant::now();
        let (status, _) = program.end();
        assert!(status.success(), "after {milliseconds} ms: {status}");
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    }
}

#[test]
fn what_cannot_be_served_is_an_error() {
    let fails = |arguments: &[&str]| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_flashinfer")).arg("serve").args(arguments).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let error = fails(&["no-such-file.gguf", "--port", "0"]);
    assert!(error.contains("error: ") && error.contains("no-such-file.gguf"), "{error}");
    assert!(fails(&["--cors", "example.org"]).contains("is no origin"));
    assert!(fails(&["--api-key", "a b"]).contains("the API key"));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    assert!(fails(&["--port", &port]).contains("cannot listen at 127.0.0.1"));
}
