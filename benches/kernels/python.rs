//! FlashInfer's Python API, in a process of its own that does what it is told,
//! line by line, so that it is measured in turn with everything else.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use serde_json::Value;

const SCRIPT: &str = include_str!("peer.py");
/// To import everything, and for anything else.
const START: Duration = Duration::from_secs(90);
const ANSWER: Duration = Duration::from_secs(30);

type Answer = std::result::Result<Value, String>;

/// The process. Dropping it ends it.
pub struct Python {
    child: Child,
    orders: ChildStdin,
    answers: Receiver<String>,
    /// It did not answer in time, so that nobody knows what a later answer is to.
    lost: bool,
    /// Versions, as it says them.
    pub versions: Value,
}

impl Python {
    /// Starts `python3` from the path; `Err` says why there is none.
    pub fn start() -> std::result::Result<Self, String> {
        let mut child = Command::new("python3")
            .args(["-c", SCRIPT])
            .env("FLASHINFER_DISABLE_JIT", "1")
            // The module that this crate calls, and not another implementation.
            .env("FLASHINFER_USE_CUDA_NORM", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("python3 cannot be run: {error}"))?;
        let (orders, output) = (child.stdin.take(), child.stdout.take());
        let (Some(orders), Some(output)) = (orders, output) else {
            return Err("python3 has no pipes".into());
        };
        let (send, answers) = mpsc::channel();
        thread::spawn(move || {
            BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| send.send(line))
        });
        let mut python = Self { child, orders, answers, lost: false, versions: Value::Null };
        python.versions = python.answer(START)?;
        Ok(python)
    }

    fn answer(&mut self, patience: Duration) -> Answer {
        let line = self.answers.recv_timeout(patience).map_err(|error| {
            self.lost = true;
            format!("python3 does not answer: {error}")
        })?;
        let answer: Value =
            serde_json::from_str(&line).map_err(|error| format!("python3: {error}: {line}"))?;
        match answer.get("error").and_then(Value::as_str) {
            Some(error) => Err(error.into()),
            None => Ok(answer),
        }
    }

    /// Has something done, and waits for the answer.
    pub fn ask(&mut self, order: &Value) -> Answer {
        if self.lost {
            return Err("python3 did not answer before".into());
        }
        writeln!(self.orders, "{order}").map_err(|error| format!("python3: {error}"))?;
        self.answer(ANSWER)
    }

    /// The number under `key` of an answer.
    pub fn number(&mut self, order: &Value, key: &str) -> std::result::Result<f64, String> {
        let answer = self.ask(order)?;
        answer.get(key).and_then(Value::as_f64).ok_or_else(|| format!("python3 said {answer}"))
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
