//! Bounds in time: how slow a transfer may be, and how often one may be tried in vain.

use super::{ArtifactError, Broken, FetchOptions};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The longest pause between two attempts, whatever a server asks for.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How fast a body comes, seen by a thread that cuts it off when it is too slow: a read may wait
/// for long without a byte of the body, while bytes of its encryption drip.
pub(super) struct Pace {
    shared: Arc<Shared>,
}

struct Shared {
    options: FetchOptions,
    state: Mutex<PaceState>,
    ended: Condvar,
}

#[derive(Default)]
struct PaceState {
    /// When the read began that waits now.
    reading: Option<Instant>,
    /// What reads have waited in this window, and what they brought.
    waited: Duration,
    came: u64,
    ended: bool,
    slow: bool,
}

impl PaceState {
    fn stop(&mut self, now: Instant) {
        if let Some(since) = self.reading.take() {
            self.waited += now.saturating_duration_since(since);
        }
    }
}

impl Pace {
    /// `cut` must end a read that waits.
    pub(super) fn watch(options: &FetchOptions, cut: impl FnOnce() + Send + 'static) -> Result<Pace, Broken> {
        let shared = Shared { options: options.clone(), state: Mutex::default(), ended: Condvar::new() };
        let shared = Arc::new(shared);
        if shared.least() > 0 {
            let watched = Arc::clone(&shared);
            let name = "flashinfer-rs pace".to_owned();
            let spawned = thread::Builder::new().name(name).spawn(move || watched.run(cut));
            spawned.map_err(|e| Broken::Lasting(format!("a thread cannot be started: {e}")))?;
        }
        Ok(Pace { shared })
    }

    pub(super) fn begin(&self) {
        self.shared.lock().reading = Some(Instant::now());
    }

    /// A read has brought `bytes`. Returns why there are no more, if so.
    pub(super) fn end(&self, bytes: usize) -> Option<String> {
        let mut state = self.shared.lock();
        state.stop(Instant::now());
        state.came += bytes as u64;
        let options = &self.shared.options;
        state.slow.then(|| {
            format!(
                "fewer than {} bytes came in {} s",
                self.shared.least(),
                options.rate_window.as_secs_f32()
            )
        })
    }
}

impl Drop for Pace {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.ended.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, PaceState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn least(&self) -> u64 {
        self.options.least()
    }

    fn run(&self, cut: impl FnOnce()) {
        let window = self.options.rate_window;
        let mut state = self.lock();
        while !state.ended {
            let now = Instant::now();
            let reading = state.reading.is_some();
            state.stop(now);
            state.reading = reading.then_some(now);
            if state.waited >= window {
                if state.came < self.least() {
                    state.slow = true;
                    drop(state);
                    return cut();
                }
                (state.waited, state.came) = (Duration::ZERO, 0);
            }
            let left = (window - state.waited).max(window / 8);
            state = self.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// How often an attempt may be made in vain, and the pauses between them.
pub(crate) struct Patience<'a> {
    options: &'a FetchOptions,
    vain: u32,
    reached: bool,
    gained: u64,
}

impl Patience<'_> {
    pub(crate) fn new(options: &FetchOptions) -> Patience<'_> {
        Patience { options, vain: 0, reached: false, gained: 0 }
    }

    /// An attempt brought this many bytes that were not there before. Returns whether it was
    /// worth it, with those before; if not, it was in vain.
    pub(crate) fn gain(&mut self, bytes: u64) -> bool {
        self.reached |= bytes > 0;
        self.gained += bytes;
        let worthwhile = bytes > 0 && self.gained >= self.options.least();
        if worthwhile {
            (self.vain, self.gained) = (0, 0);
        }
        worthwhile
    }

    /// An attempt was made in vain: waits before the next one, or says why there is none.
    pub(crate) fn pause(
        &mut self,
        broken: Broken,
        failed: impl FnOnce(String) -> ArtifactError,
    ) -> Result<(), ArtifactError> {
        let (reason, asked) = match broken {
            Broken::Disk(e) => return Err(e),
            Broken::Lasting(reason) if !self.reached => return Err(failed(reason)),
            Broken::Lasting(reason) => (reason, Duration::ZERO),
            Broken::Passing(reason) => (reason, Duration::ZERO),
            Broken::Busy(reason, asked) => (reason, asked),
        };
        self.reached = true;
        self.vain += 1;
        if self.vain >= self.options.attempts {
            let what = match self.gained {
                0 => "nothing new".to_owned(),
                gained => format!("{gained} bytes together"),
            };
            return Err(failed(format!(
                "{} attempts in a row brought {what}, the last one: {reason}",
                self.vain
            )));
        }
        let pause = self.options.retry_delay.saturating_mul(1 << (self.vain - 1).min(10));
        thread::sleep(pause.max(asked).min(LONGEST_PAUSE));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_that_bring_little_are_counted() {
        let options = FetchOptions {
            min_rate: 100,
            rate_window: Duration::from_secs(1),
            attempts: 3,
            retry_delay: Duration::ZERO,
            ..FetchOptions::default()
        };
        let mut patience = Patience::new(&options);
        let failed = |reason| ArtifactError::Download { what: "x".into(), reason };
        let vain = |patience: &mut Patience<'_>| patience.pause(Broken::Passing("r".into()), failed);
        for _ in 0..10 {
            assert!(!patience.gain(60));
            vain(&mut patience).unwrap();
            assert!(patience.gain(60));
        }
        for _ in 0..2 {
            assert!(!patience.gain(1));
            vain(&mut patience).unwrap();
        }
        assert!(!patience.gain(1));
        let e = vain(&mut patience).unwrap_err().to_string();
        assert!(e.contains("3 attempts in a row brought 3 bytes together"), "{e}");
    }

    #[test]
    fn only_waiting_counts() {
        let options = FetchOptions {
            min_rate: 1000,
            rate_window: Duration::from_millis(80),
            ..FetchOptions::default()
        };
        let cut = Arc::new(Mutex::new(false));
        let flag = Arc::clone(&cut);
        let pace = Pace::watch(&options, move || *flag.lock().unwrap() = true).unwrap();
        // Whoever reads is busy with something else.
        thread::sleep(Duration::from_millis(300));
        assert!(!*cut.lock().unwrap());
        pace.begin();
        assert_eq!(pace.end(1000), None);
        pace.begin();
        let start = Instant::now();
        while !*cut.lock().unwrap() {
            assert!(start.elapsed() < Duration::from_secs(20), "it is never cut");
            thread::sleep(Duration::from_millis(2));
        }
        let reason = pace.end(0).unwrap();
        assert!(reason.contains("fewer than 80 bytes came in 0.08 s"), "{reason}");
    }
}
