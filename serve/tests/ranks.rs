//! `flashinfer serve --tensor-parallel 2`: two processes on the CPU against one.
#![cfg(unix)]

#[path = "../src/http/tests/client.rs"]
#[expect(dead_code, reason = "the library's tests use the rest")]
mod client;

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    net::{SocketAddr, TcpListener},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use test_support::required;

/// What a process that fails may take to end, and to be started.
const LIMIT: Duration = Duration::from_secs(60);

/// Whether the model is here; says why, if not.
fn has_model() -> bool {
    let pulled = Command::new(env!("CARGO_BIN_EXE_flashinfer")).args(["pull", "smollm2"]).output().unwrap();
    if !pulled.status.success() {
        required::skip(required::MODEL, String::from_utf8_lossy(&pulled.stderr));
    }
    pulled.status.success()
}

/// `flashinfer`, as no launcher's rank.
fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flashinfer"));
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    for variable in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"] {
        command.env_remove(variable);
    }
    command
}

/// `flashinfer serve` on the CPU, of a model whose 9 heads, in 3 groups, are not divided equally.
fn command(arguments: &[&str]) -> Command {
    let mut command =
        program(&["serve", "smollm2", "--device", "cpu", "--port", "0", "--cache-tokens", "512"]);
    command.args(arguments);
    command
}

/// A server, which is killed when this is dropped.
struct Server {
    child: Child,
    address: SocketAddr,
}

impl Server {
    /// Waits until it is ready.
    fn start(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening at http://").unwrap_or_else(|| panic!("{line:?}"));
        let mut server = Self { address: address.parse().unwrap(), child };
        let begin = Instant::now();
        while client::send(server.address, "GET", "/ready", &[], None).status != 200 {
            assert!(begin.elapsed() < LIMIT && server.child.try_wait().unwrap().is_none());
            thread::sleep(Duration::from_millis(10));
        }
        server
    }

    /// Greedy answers, with the log-probabilities of their tokens.
    fn answers(&self) -> Vec<Value> {
        let ask = |prompt: &str| {
            let body = json!({
                "prompt": prompt, "max_tokens": 12, "temperature": 0, "n": 2,
                "ignore_eos": true, "logprobs": 2,
            });
            client::send(self.address, "POST", "/v1/completions", &[], Some(&body.to_string())).ok()
        };
        ["Once upon a time", "The capital of France is", "Once upon a time, the"].map(ask).to_vec()
    }

    /// The processes that it started.
    fn ranks(&self) -> Vec<u32> {
        let children = format!("/proc/{0}/task/{0}/children", self.child.id());
        fs::read_to_string(children).unwrap().split_whitespace().map(|id| id.parse().unwrap()).collect()
    }

    /// How it ends, within a limit, and what it says.
    fn end(mut self) -> (ExitStatus, String) {
        let begin = Instant::now();
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None => assert!(begin.elapsed() < LIMIT, "it does not end"),
            }
            thread::sleep(Duration::from_millis(10));
        };
        let mut log = String::new();
        self.child.stderr.as_mut().unwrap().read_to_string(&mut log).unwrap();
        (status, log)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn signal(id: u32, name: &str) {
    assert!(Command::new("kill").args(["-s", name, &id.to_string()]).status().unwrap().success());
}

/// Whether a process is there, and no zombie.
fn runs(id: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    status.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with('Z'))
}

fn wait_until_gone(id: u32) {
    let begin = Instant::now();
    while runs(id) {
        assert!(begin.elapsed() < LIMIT, "process {id} stays");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Texts, and log-probabilities, which are as near as rounding lets them: rows that are multiplied by
/// quantized weights have 8 bits on the CPU.
fn check_equal(ours: &[Value], theirs: &[Value]) {
    for (ours, theirs) in ours.iter().zip(theirs) {
        let choices = |answer: &Value| answer["choices"].as_array().unwrap().clone();
        assert_eq!(choices(ours).len(), 2);
        for (ours, theirs) in choices(ours).iter().zip(choices(theirs)) {
            assert_eq!((&ours["text"], &ours["finish_reason"]), (&theirs["text"], &theirs["finish_reason"]));
            let logprobs = |choice: &Value| choice["logprobs"]["token_logprobs"].as_array().unwrap().clone();
            for (a, b) in logprobs(ours).iter().zip(logprobs(&theirs)) {
                let off = (a.as_f64().unwrap() - b.as_f64().unwrap()).abs();
                assert!(off < 5e-3, "{a} and {b}");
            }
        }
        assert_eq!(ours["usage"], theirs["usage"]);
    }
}

#[test]
fn two_processes_answer_as_one_does() {
    if !has_model() {
        return;
    }
    let one = Server::start(command(&[])).answers();
    let two = Server::start(command(&["--tensor-parallel", "2"]));
    check_equal(&two.answers(), &one);
    let ranks = two.ranks();
    assert_eq!(ranks.len(), 1);
    // It drains, and the other rank ends with it.
    signal(two.child.id(), "TERM");
    let (status, log) = two.end();
    assert!(status.success(), "{status}: {log}");
    assert!(!runs(ranks[0]));
}

#[test]
fn a_rank_that_dies_ends_the_others_with_its_name() {
    if !has_model() {
        return;
    }
    let server = Server::start(command(&["--tensor-parallel", "2"]));
    let rank = server.ranks()[0];
    signal(rank, "KILL");
    let (status, log) = server.end();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("error: rank 1 (127.0.0.1, process ") && log.contains("has ended"), "{log}");

    let mut server = Server::start(command(&["--tensor-parallel", "2"]));
    let rank = server.ranks()[0];
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    wait_until_gone(rank);

    // One that is stopped is silent.
    let server = Server::start(command(&["--tensor-parallel", "2"]));
    let rank = server.ranks()[0];
    signal(rank, "STOP");
    let (status, log) = server.end();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("rank 1") && log.contains("was silent for 10 seconds"), "{log}");
    signal(rank, "CONT");
    wait_until_gone(rank);
}

/// A rank that a launcher started, at this port.
fn rank(number: usize, port: u16, arguments: &[&str]) -> Command {
    let mut command = command(arguments);
    let [number, port] = [number.to_string(), port.to_string()];
    let variables = [("RANK", &number), ("LOCAL_RANK", &number), ("MASTER_PORT", &port)];
    command.envs(variables).env("WORLD_SIZE", "2").env("MASTER_ADDR", "127.0.0.1");
    command
}

fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

#[test]
fn processes_of_a_launcher_find_each_other() {
    if !has_model() {
        return;
    }
    let one = Server::start(command(&[])).answers();
    let port = free_port();
    let mut other = rank(1, port, &[]).spawn().unwrap();
    let server = Server::start(rank(0, port, &[]));
    check_equal(&server.answers(), &one);
    // As launchers end processes: rank 0 says when it is over.
    signal(other.id(), "TERM");
    signal(server.child.id(), "TERM");
    let (status, log) = server.end();
    assert!(status.success(), "{status}: {log}");
    assert!(other.wait().unwrap().success());

    // With other settings they do not begin.
    let port = free_port();
    let mut other = rank(1, port, &["--deterministic"]).spawn().unwrap();
    let first = rank(0, port, &[]).output().unwrap();
    let log = String::from_utf8(first.stderr).unwrap();
    assert!(!first.status.success() && log.contains("--deterministic of rank 1 is true"), "{log}");
    assert!(!other.wait().unwrap().success());
}

/// `flashinfer run`, too: an answer, and those to the lines of a file.
#[test]
fn two_processes_answer_prompts_as_one_does() {
    if !has_model() {
        return;
    }
    let lines = tempfile::NamedTempFile::new().unwrap();
    fs::write(lines.path(), "Once upon a time\nThe capital of France is\n").unwrap();
    let lines = lines.path().to_str().unwrap();
    for prompt in [&["Once upon a time"][..], &["--prompts", lines]] {
        let say = |ranks: &str| {
            let mut command = program(&["run", "smollm2", "--device", "cpu", "--raw", "--max-tokens", "12"]);
            let output = command.args(["--tensor-parallel", ranks]).args(prompt).output().unwrap();
            let errors = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{errors}");
            (String::from_utf8(output.stdout).unwrap(), errors)
        };
        let (one, two) = (say("1"), say("2"));
        assert_eq!(one.0, two.0, "{}", two.1);
        assert!(!one.0.trim().is_empty());
    }
    // A prompt is missing before anything is started.
    let output =
        program(&["run", "smollm2", "--tensor-parallel", "2"]).stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("there is no prompt"));
}

#[test]
fn what_cannot_be_divided_is_refused_before_anything_is_started() {
    if !has_model() {
        return;
    }
    let output = command(&["--tensor-parallel", "64"]).output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && log.contains("cannot be divided among 64 ranks"), "{log}");
    let output = rank(1, 1, &["--tensor-parallel", "3"]).output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && log.contains("--tensor-parallel is 3, and 2 processes"), "{log}");
}
