//! What ends all ranks: the first of them that fails.

use std::{
    io::{self, Write},
    net::{Shutdown, TcpStream},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use crate::{Result, exit};

/// Called once, with why the ranks cannot go on, on any thread. What they compute may never end, so
/// that a program [ends its process](end_process).
pub type OnFailure = fn(&str);

/// How long a process that is done may take to end.
const ENDING: Duration = Duration::from_secs(5);

/// Says why, and ends this process with status 1, whatever its threads and its GPU wait for.
pub fn end_process(reason: &str) {
    // Nobody may read it any more.
    let _ = writeln!(io::stderr(), "error: {reason}");
    exit::at_once(1)
}

/// Sees to it that this process, which is done, ends within seconds: its GPU may wait for one that
/// ended before.
pub fn end_soon() {
    thread::spawn(|| {
        thread::sleep(ENDING);
        exit::at_once(0)
    });
}

/// Why ranks ended.
pub struct Failure {
    first: Mutex<Option<String>>,
    connections: Mutex<Vec<TcpStream>>,
    ending: AtomicBool,
    on_failure: OnFailure,
}

impl Failure {
    pub(super) fn new(on_failure: OnFailure) -> Self {
        Self {
            first: Mutex::default(),
            connections: Mutex::default(),
            ending: AtomicBool::new(false),
            on_failure,
        }
    }

    /// Has a failure close a connection, so that nobody waits for it.
    pub(super) fn closes(&self, connection: &TcpStream) -> Result<()> {
        lock(&self.connections).push(connection.try_clone()?);
        Ok(())
    }

    /// Ends all ranks, unless they are ending: `tell` is called before connections are closed.
    pub(super) fn fail_after(&self, reason: &str, tell: impl FnOnce()) {
        {
            let mut first = lock(&self.first);
            if self.is_ending() || first.is_some() {
                return;
            }
            *first = Some(reason.to_owned());
        }
        tell();
        for connection in lock(&self.connections).iter() {
            // It may be closed.
            let _ = connection.shutdown(Shutdown::Both);
        }
        (self.on_failure)(reason);
    }

    /// Ends all ranks, unless they are ending. The others hear that this one has ended.
    pub fn fail(&self, reason: &str) {
        self.fail_after(reason, || {});
    }

    /// Why the ranks ended.
    pub fn reason(&self) -> String {
        lock(&self.first).clone().unwrap_or_else(|| "the ranks have ended".into())
    }

    /// All connections.
    #[cfg(test)]
    pub(super) fn connections_for_tests(&self) -> MutexGuard<'_, Vec<TcpStream>> {
        lock(&self.connections)
    }

    /// From now on it is no failure that ranks end.
    pub(super) fn set_ending(&self) {
        self.ending.store(true, Ordering::Release);
    }

    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }
}

/// Nothing panics while what ranks share is half changed; a connection is written whole, or is of no use.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Stops a thread that waits for this to be dropped.
pub struct Stopper(#[expect(dead_code, reason = "it is dropped")] pub(super) mpsc::Sender<()>);
