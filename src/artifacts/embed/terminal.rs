//! The progress of a build's downloads.
//!
//! Cargo keeps what a build script prints until the script ends. So this writes to the terminal
//! that cargo runs in. Where there is none, as in CI, it prints a line every ten seconds, which
//! `cargo build -vv` shows as it comes.

use super::super::{Progress, ProgressFn};
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Tells of progress on the terminal, or in the log of the build.
pub fn progress() -> ProgressFn {
    let terminal = File::options().write(true).open("/dev/tty").ok();
    let progress_lines = match terminal {
        Some(terminal) => TerminalProgress::new(Box::new(terminal), true),
        None => TerminalProgress::new(Box::new(io::stderr()), false),
    };
    let progress_lines = Mutex::new(progress_lines);
    Arc::new(move |progress| {
        let mut progress_lines = progress_lines.lock().unwrap_or_else(PoisonError::into_inner);
        // A terminal that is gone must not end the build.
        let _ = progress_lines.show(progress, Instant::now());
    })
}

/// Writes progress, not too often.
struct TerminalProgress {
    out: Box<dyn Write + Send>,
    /// Whether a line may be overwritten by the next.
    terminal: bool,
    announced: Option<String>,
    /// When the last line was written.
    last_line: Option<Instant>,
    /// Whether the last line is to go.
    passing: bool,
}

impl TerminalProgress {
    fn new(out: Box<dyn Write + Send>, terminal: bool) -> TerminalProgress {
        TerminalProgress { out, terminal, announced: None, last_line: None, passing: false }
    }

    fn show(&mut self, progress: &Progress<'_>, now: Instant) -> io::Result<()> {
        let megabytes = |bytes: u64| bytes / 1_000_000;
        let of = |done: u64, total: Option<u64>| match total {
            Some(total) => format!("{} of {} MB", megabytes(done), megabytes(total)),
            None => format!("{} MB", megabytes(done)),
        };
        let line = match *progress {
            Progress::Started { file, .. } if self.announced.as_deref() != Some(file) => {
                self.announced = Some(file.into());
                let what = "to embed kernels, once for this machine; FLASHINFER_RS_EMBED=off builds without";
                return self.line(&format!("Downloading {} {what}", short(file)), now);
            }
            Progress::Done { file, .. } => {
                self.announced = None;
                return self.line(&format!("Downloaded {}", short(file)), now);
            }
            Progress::Started { file, done, total } | Progress::Bytes { file, done, total } => {
                format!("Downloading {}: {}", short(file), of(done, total))
            }
            Progress::Verifying { file, done, total } => {
                format!("Verifying {}: {}", short(file), of(done, Some(total)))
            }
            Progress::Waiting { file, waited } => {
                format!("Waiting for another process that has {}: {} s", short(file), waited.as_secs())
            }
            Progress::Lockless { folder, reason } => {
                let what = "processes may do the same work at once";
                return self.line(&format!("{} has no locks ({reason}): {what}", folder.display()), now);
            }
        };
        let pause = if self.terminal { Duration::from_millis(250) } else { Duration::from_secs(10) };
        if self.last_line.is_some_and(|last_line| now.duration_since(last_line) < pause) {
            return Ok(());
        }
        match self.terminal {
            true => {
                (self.last_line, self.passing) = (Some(now), true);
                // Cargo's own line begins where the cursor is, so that goes back to the start.
                write!(self.out, "\r\x1b[K{line}\r")?;
                self.out.flush()
            }
            false => self.line(&line, now),
        }
    }

    /// A line that stays.
    fn line(&mut self, line: &str, now: Instant) -> io::Result<()> {
        (self.last_line, self.passing) = (Some(now), false);
        let start = if self.terminal { "\r\x1b[K" } else { "" };
        writeln!(self.out, "{start}flashinfer-rs: {line}")?;
        self.out.flush()
    }
}

impl Drop for TerminalProgress {
    fn drop(&mut self) {
        if self.passing {
            let _ = write!(self.out, "\r\x1b[K").and_then(|()| self.out.flush());
        }
    }
}

/// The name and version of a wheel.
fn short(file: &str) -> String {
    let words: Vec<_> = file.splitn(3, '-').take(2).collect();
    let version = |text: &str| text.split('+').next().unwrap_or_default().to_owned();
    match words[..] {
        [name, versioned] => format!("{name} {}", version(versioned)),
        _ => file.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    const FILE: &str = "flashinfer_jit_cache-0.6.13+cu130-cp39-abi3-manylinux_2_28_x86_64.whl";

    /// What is written of a download of 100 steps, one each 100 ms.
    fn download(terminal: bool) -> String {
        let written = Written::default();
        let mut progress_lines = TerminalProgress::new(Box::new(written.clone()), terminal);
        let (start, total) = (Instant::now(), Some(1_700_000_000));
        progress_lines.show(&Progress::Started { file: FILE, done: 0, total: None }, start).unwrap();
        progress_lines.show(&Progress::Started { file: FILE, done: 0, total }, start).unwrap();
        for step in 1..=100 {
            let progress = Progress::Bytes { file: FILE, done: step * 17_000_000, total };
            progress_lines.show(&progress, start + Duration::from_millis(100) * step as u32).unwrap();
        }
        let done = Progress::Done { file: FILE, path: std::path::Path::new("/x") };
        progress_lines.show(&done, start + Duration::from_secs(11)).unwrap();
        String::from_utf8(written.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_terminal_shows_one_line_that_changes() {
        let text = download(true);
        let lines: Vec<_> = text.split('\n').collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(
            lines[0].contains("flashinfer-rs: Downloading flashinfer_jit_cache 0.6.13 to embed"),
            "{text}"
        );
        let steps = lines[1].matches("of 1700 MB\r").count();
        assert!((20..=40).contains(&steps), "{steps}: {text}");
        assert!(lines[1].ends_with("flashinfer-rs: Downloaded flashinfer_jit_cache 0.6.13"), "{text}");
        // Nothing wraps.
        assert!(text.split(['\r', '\n']).all(|line| line.len() < 160));
    }

    #[test]
    fn a_log_gets_few_whole_lines() {
        let text = download(false);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines.iter().all(|line| line.starts_with("flashinfer-rs: ")), "{text}");
        assert!(lines[1].contains("1700 of 1700 MB"), "{text}");
        assert!(!text.contains(['\r', '\x1b']), "{text}");
    }
}
