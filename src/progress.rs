//! The progress of downloads: a bar on a terminal, plain lines elsewhere.

use std::{
    io::{self, IsTerminal, Write},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::artifacts::{Progress, ProgressFn};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// The pause between two plain lines about the same file.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Shows progress on stderr: a bar on a terminal, a line now and then elsewhere. For
/// [`StoreConfig::progress`](crate::artifacts::StoreConfig::progress).
pub fn terminal() -> ProgressFn {
    if io::stderr().is_terminal() { bar() } else { lines() }
}

fn bar() -> ProgressFn {
    let current: Mutex<Option<ProgressBar>> = Mutex::new(None);
    Arc::new(move |progress| {
        let mut current = current.lock().unwrap_or_else(PoisonError::into_inner);
        let show = |bar: &ProgressBar, done: u64, total: Option<u64>| {
            if let Some(total) = total {
                bar.set_length(total);
            }
            bar.set_position(done);
        };
        match *progress {
            Progress::Started { file, done, total } => {
                let bar = current.insert(new_bar(file));
                show(bar, done, total);
                bar.reset_eta();
            }
            Progress::Bytes { file, done, total } => {
                show(current.get_or_insert_with(|| new_bar(file)), done, total);
            }
            Progress::Verifying { file, done, total } => {
                let bar = current.get_or_insert_with(|| new_bar(&format!("checking {file}")));
                show(bar, done, Some(total));
                if done == total {
                    bar.finish_and_clear();
                    *current = None;
                }
            }
            Progress::Waiting { file, waited } => {
                let bar = current.get_or_insert_with(|| new_bar(file));
                bar.set_message(format!(
                    "{file}: another process has it, waiting for {} s",
                    waited.as_secs()
                ));
                bar.tick();
            }
            Progress::Lockless { folder, reason } => {
                let warning = lockless(folder, reason);
                match &*current {
                    Some(bar) => bar.println(warning),
                    None => drop(writeln!(io::stderr(), "{warning}")),
                }
            }
            Progress::Done { .. } => {
                if let Some(bar) = current.take() {
                    bar.finish_and_clear();
                }
            }
        }
    })
}

fn lockless(folder: &Path, reason: &str) -> String {
    format!("warning: {} has no locks ({reason}): processes may do the same work at once", folder.display())
}

fn new_bar(message: &str) -> ProgressBar {
    let template = "{msg}\n{wide_bar} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style).with_message(message.to_owned())
}

fn lines() -> ProgressFn {
    let last: Mutex<Option<Instant>> = Mutex::new(None);
    Arc::new(move |progress| {
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|at| at.elapsed() >= LINE_INTERVAL);
        let of =
            |total: Option<u64>| total.map_or(String::new(), |total| format!(" of {}", HumanBytes(total)));
        let line = match *progress {
            Progress::Started { file, done: 0, total } => format!("{file}: downloading{}", of(total)),
            Progress::Started { file, done, total } => {
                format!("{file}: resuming at {}{}", HumanBytes(done), of(total))
            }
            Progress::Bytes { file, done, total } if due => {
                format!("{file}: {}{}", HumanBytes(done), of(total))
            }
            Progress::Verifying { file, done, total } if due => {
                format!("{file}: checked {}{}", HumanBytes(done), of(Some(total)))
            }
            Progress::Waiting { file, waited } if due => {
                format!("{file}: another process has it, waiting for {} s", waited.as_secs())
            }
            Progress::Lockless { folder, reason } => lockless(folder, reason),
            Progress::Done { file, .. } => format!("{file}: complete"),
            _ => return,
        };
        *last = Some(Instant::now());
        // Nobody may be reading.
        let _ = writeln!(io::stderr(), "{line}");
    })
}
