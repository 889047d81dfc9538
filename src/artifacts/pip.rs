//! pip, which knows the machine's default index, its proxies and its certificates.
//!
//! It runs in an empty folder of ours, so that nothing in the caller's working folder is executed
//! or read in its name: `python -m pip` would run a `pip.py` there, and a relative entry of `PATH`
//! a program. Variables that name a file by a relative path name it absolutely there.

use super::cache::Files;
use super::download::adopt;
use super::pins::Pin;
use super::{ArtifactError, FetchOptions, OnProgress, Progress, program, redact};
use std::collections::VecDeque;
use std::env;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Variables with a path in them that pip and Python read.
const PATHS: [&str; 13] = [
    "PIP_CONFIG_FILE",
    "PIP_CERT",
    "PIP_CLIENT_CERT",
    "PIP_CACHE_DIR",
    "PIP_CONSTRAINT",
    "PIP_FIND_LINKS",
    "PIP_LOG",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "VIRTUAL_ENV",
    "NETRC",
];
/// How much of what pip complains of is kept.
const COMPLAINT: usize = 16 << 10;

/// Why pip brought nothing.
pub(crate) enum Failure {
    /// It could not.
    Failed(String),
    /// What it brought is wrong, or cannot be kept.
    Final(ArtifactError),
}

/// Has pip download a package, and publishes it.
pub(crate) fn obtain(
    wheels: &Files,
    pin: &Pin,
    requirement: &str,
    arch: &str,
    options: &FetchOptions,
    on_progress: OnProgress<'_>,
) -> Result<PathBuf, Failure> {
    on_progress(&Progress::Started { file: &pin.file, done: 0, total: None });
    let folder = wheels.scratch(&pin.file).map_err(Failure::Final)?;
    let [empty, brought] = ["empty", "wheels"].map(|name| folder.path().join(name));
    for folder in [&empty, &brought] {
        let made = fs::create_dir(folder);
        made.map_err(|e| Failure::Final(ArtifactError::cache(folder, "create the folder", e)))?;
    }
    let mut reasons = Vec::new();
    for words in [&["python3", "-m", "pip"][..], &["pip"]] {
        let shown = words.join(" ");
        let Some(program) = program::find(words[0]) else {
            reasons.push(format!("`{shown}`: no absolute folder of PATH has {}", words[0]));
            continue;
        };
        let mut command = Command::new(program);
        command.args(&words[1..]).args([
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--disable-pip-version-check",
            "--no-input",
            "--progress-bar=off",
            "--python-version=312",
            "--implementation=cp",
            "--abi=abi3",
            "--abi=cp312",
            "--abi=none",
        ]);
        for platform in ["manylinux2014", "manylinux_2_17", "manylinux_2_27", "manylinux_2_28"] {
            command.arg(format!("--platform={platform}_{arch}"));
        }
        command.arg("-d").arg(&brought).arg(requirement);
        confine(&mut command, &empty);
        match run(&mut command, options.pip_timeout) {
            Ok(()) => {
                let file = brought.join(&pin.file);
                if file.is_file() {
                    return adopt(wheels, &pin.file, pin.sha256, &file).map_err(Failure::Final);
                }
                reasons.push(format!("`{shown}` brought another file"));
            }
            Err(reason) => reasons.push(format!("`{shown}`: {reason}")),
        }
    }
    Err(Failure::Failed(reasons.join("; ")))
}

/// Keeps a program away from the caller's working folder.
fn confine(command: &mut Command, folder: &Path) {
    // `PATH` is for what pip itself starts.
    for variable in ["PATH", "PYTHONPATH"] {
        if let Some(list) = env::var_os(variable) {
            command.env(variable, program::absolute_only(&list));
        }
    }
    for variable in PATHS {
        let path = env::var_os(variable).map(PathBuf::from);
        // A value that is no path, such as a list of addresses, exists nowhere.
        if let Some(path) = path.filter(|path| path.is_relative() && path.exists())
            && let Ok(path) = std::path::absolute(path)
        {
            command.env(variable, path);
        }
    }
    // As `-P`, which Python knows from 3.11 on; before, the empty folder must do.
    command.env("PYTHONSAFEPATH", "1").current_dir(folder);
}

/// Runs a program to its end, or to the limit.
fn run(command: &mut Command, limit: Duration) -> Result<(), String> {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command.stderr(Stdio::piped()).spawn().map_err(|e| e.to_string())?;
    let complaint: Arc<Mutex<VecDeque<u8>>> = Arc::default();
    let kept = Arc::clone(&complaint);
    let stderr = child.stderr.take();
    let reader = thread::spawn(move || stderr.map(|stderr| keep_tail(stderr, &kept)));
    let start = Instant::now();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if start.elapsed() < limit => thread::sleep(Duration::from_millis(20)),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("it ran for more than {} s", limit.as_secs()));
            }
            Err(e) => return Err(e.to_string()),
        }
    };
    if status.success() {
        return Ok(());
    }
    // Something that it started may hold the pipe for longer than it ran.
    for _ in 0..50 {
        if reader.is_finished() {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    let complaint: Vec<u8> =
        complaint.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
    Err(format!("{status}: {}", last_lines(&String::from_utf8_lossy(&complaint))))
}

/// Reads to the end, and keeps the last bytes.
fn keep_tail(mut from: impl Read, kept: &Mutex<VecDeque<u8>>) {
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(&buffer[..n]);
        let surplus = kept.len().saturating_sub(COMPLAINT);
        kept.drain(..surplus);
    }
}

/// The last lines of a program's complaint, without credentials.
fn last_lines(text: &str) -> String {
    let text = redact::addresses(text);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(4)..].join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_told_without_credentials() {
        let text = "x\n1\n2\n\nERROR: cannot reach (https://me:se/cret@host.example/a)\nend\n";
        assert_eq!(last_lines(text), "1 2 ERROR: cannot reach (https://host.example/… end");
    }

    #[test]
    fn a_complaint_without_end_is_cut() {
        let kept = Mutex::default();
        keep_tail(std::io::repeat(b'x').take(1 << 20).chain(&b"end"[..]), &kept);
        let kept = kept.into_inner().unwrap();
        assert_eq!(kept.len(), COMPLAINT);
        assert_eq!(kept.iter().rev().take(3).collect::<Vec<_>>(), [&b'd', &b'n', &b'e']);
    }
}
