//! A conversation in a terminal: with the program as it is run there, in a process of its own.

use std::{env, fs, process::Command, thread, time::Duration};

use candle_core::quantized::gguf_file::Value;
use clap::Parser;
use rexpect::session::{PtySession, spawn_command};

use super::Cli;
use crate::tests::{bytes, forward};

/// The model that [`conversation_of_a_child`] talks with.
const MODEL: &str = "FLASHINFER_TEST_MODEL";
/// More tokens than are made while the test runs.
const CONTEXT: u32 = 100_000;
/// The longest that anything may take.
const TIMEOUT_MS: u64 = 120_000;

#[test]
#[ignore = "started by a_conversation_in_a_terminal"]
fn conversation_of_a_child() {
    let model = env::var(MODEL).unwrap();
    let tokens = CONTEXT.to_string();
    let words = ["flashinfer", "run", &model, "--device", "cpu", "--ignore-eos", "--cache-tokens", &tokens];
    Cli::parse_from(words).command.execute().unwrap();
}

/// Reads up to the next prompt line, and gives what was there.
fn prompt(terminal: &mut PtySession) -> String {
    terminal.exp_string(">>> ").unwrap()
}

#[test]
fn a_conversation_in_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let mut tiny = forward::BIASES.file();
    bytes::add_tokenizer(&mut tiny, "gpt-2", forward::BIASES.vocab);
    let context = tiny.metadata.keys().find(|key| key.ends_with(".context_length")).copied().unwrap();
    tiny.metadata.insert(context, Value::U32(CONTEXT));
    let mut child = Command::new(env::current_exe().unwrap());
    child
        .args(["--ignored", "--exact", "--nocapture", "cli::tests::conversation_of_a_child"])
        .env(MODEL, tiny.write(&folder))
        .env("FLASHINFER_RS_CACHE_DIR", folder.path())
        .env("TERM", "xterm");
    let mut terminal = spawn_command(child, Some(TIMEOUT_MS)).unwrap();
    terminal.exp_string("/help shows what can be said").unwrap();
    prompt(&mut terminal);
    terminal.send_line("/nonsense").unwrap();
    terminal.exp_string("error: there is no command /nonsense").unwrap();
    prompt(&mut terminal);
    terminal.send_line("/set verbose true").unwrap();
    prompt(&mut terminal);

    // Ctrl-C stops an answer, and not the program.
    terminal.send_line("ok the").unwrap();
    thread::sleep(Duration::from_secs(1));
    terminal.send_control('c').unwrap();
    let (_, tokens) = terminal.exp_regex(r"[0-9]+ of the answer").unwrap();
    let tokens: u32 = tokens.split(' ').next().unwrap().parse().unwrap();
    assert!(tokens < CONTEXT / 2, "{tokens}");
    prompt(&mut terminal);
    // Nor where there is none.
    terminal.send_control('c').unwrap();
    terminal.exp_string("/exit or Ctrl-D ends the program").unwrap();
    prompt(&mut terminal);
    // The line before comes back.
    terminal.send("\u{1b}[A").unwrap();
    terminal.flush().unwrap();
    terminal.exp_string("ok the").unwrap();
    terminal.send_control('u').unwrap();
    terminal.send_line("/set heat 1").unwrap();
    terminal.exp_string("error: there is no option `heat`").unwrap();
    prompt(&mut terminal);
    terminal.send_control('d').unwrap();
    let end = terminal.exp_eof().unwrap();
    assert!(end.contains("1 passed"), "{end}");
    let history = fs::read_to_string(folder.path().join("models/history")).unwrap();
    let lines: Vec<_> = history.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(lines, ["/nonsense", "/set verbose true", "ok the", "/set heat 1"]);
}
