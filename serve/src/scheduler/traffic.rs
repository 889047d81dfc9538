//! For tests: requests that arrive, are answered and leave at random, on any backend and by any clock.

use std::{collections::BTreeMap, time::Duration};

use flashinfer_rs::kv::PageAllocator;
use test_support::Rng;

use super::testing::{Answer, Requests};
use crate::{backend::Backend, request::Finish, sampling::SamplingParams};

/// A request, and what its answers are when it is alone.
#[derive(Clone, Debug)]
pub struct Asked {
    pub prompt: Vec<u32>,
    pub params: SamplingParams,
    pub alone: Vec<Answer>,
}

/// A request that was taken.
struct Open {
    asked: Asked,
    /// Answers that have not ended.
    answers: usize,
    /// When its caller has left, if it does.
    leaves: Option<Duration>,
}

/// How answers ended.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ended {
    /// As each does that is alone.
    pub whole: usize,
    pub cancelled: usize,
    /// By steps that failed.
    pub failed: usize,
    /// Requests that were not taken, as many waited.
    pub refused: usize,
}

/// What arrives.
pub struct Arrivals<'a> {
    /// The mean time between two of them.
    pub mean: Duration,
    /// How long a caller waits for an answer, one in eight times; the mean.
    pub patience: Duration,
    /// Requests that may wait.
    pub max_waiting: usize,
    /// The next one.
    pub next: &'a dyn Fn(&mut Rng) -> Asked,
}

/// Requests to a backend.
pub struct Traffic<B> {
    pub requests: Requests,
    pub backend: B,
    pub ended: Ended,
    pool: PageAllocator,
    rng: Rng,
    /// What the clock was put forward, as there was nothing to do.
    skipped: Duration,
    open: BTreeMap<usize, Open>,
}

fn exponential(rng: &mut Rng, mean: Duration) -> Duration {
    let fraction = (rng.bits() >> 11) as f64 / (1u64 << 53) as f64;
    mean.mul_f64(-(1.0 - fraction).ln())
}

impl<B: Backend> Traffic<B> {
    pub fn new(requests: Requests, backend: B, pool: &PageAllocator) -> Self {
        let (ended, skipped, open) = Default::default();
        Self { requests, backend, ended, pool: pool.clone(), rng: Rng::new(), skipped, open }
    }

    /// Has requests arrive for so long, by the backend's clock, and waits until all have ended. Then no
    /// page is in use but those of cached prefixes.
    pub fn run(&mut self, time: Duration, clock: impl Fn(&B) -> Duration, arrivals: &Arrivals<'_>) {
        let mut at = clock(&self.backend) + self.skipped;
        let until = at + time;
        loop {
            let now = clock(&self.backend) + self.skipped;
            while at <= now && at < until {
                self.arrive(now, arrivals);
                at += exponential(&mut self.rng, arrivals.mean);
            }
            self.leave(now);
            if self.requests.scheduler.is_done() {
                if at >= until {
                    break;
                }
                self.skipped += at.saturating_sub(now);
                continue;
            }
            let report = self.requests.step(&mut self.backend);
            for update in report.updates.iter().filter(|update| update.finish.is_some()) {
                self.end(update.request.0 as usize, update.choice);
            }
        }
        assert!(self.open.is_empty() && self.requests.answers.is_empty());
        assert_eq!(self.pool.used_pages(), self.requests.scheduler.prefixes.num_pages());
        assert_eq!(self.pool.pending_copies(), 0);
    }

    fn arrive(&mut self, now: Duration, arrivals: &Arrivals<'_>) {
        if self.requests.scheduler.waiting() >= arrivals.max_waiting {
            self.ended.refused += 1;
            return;
        }
        let asked = (arrivals.next)(&mut self.rng);
        let request = self.requests.submit(&asked.prompt, &asked.params).unwrap();
        let impatient = self.rng.below(8) == 0;
        let leaves = impatient.then(|| now + exponential(&mut self.rng, arrivals.patience));
        self.open.insert(request, Open { answers: asked.params.n, asked, leaves });
    }

    /// Cancels what callers do not wait for any more.
    fn leave(&mut self, now: Duration) {
        let gone = |(request, open): (&usize, &Open)| {
            open.leaves.is_some_and(|leaves| leaves <= now).then_some(*request)
        };
        let gone: Vec<_> = self.open.iter().filter_map(gone).collect();
        for request in gone {
            self.requests.cancel(request, None);
            for choice in 0..self.open[&request].asked.params.n {
                if self.requests.answers.contains_key(&(request, choice)) {
                    self.end(request, choice);
                }
            }
        }
    }

    /// Compares an answer that has ended, and forgets it.
    fn end(&mut self, request: usize, choice: usize) {
        let got = self.requests.answers.remove(&(request, choice)).unwrap();
        let open = self.open.get_mut(&request).unwrap();
        let (asked, want) = (&open.asked, &open.asked.alone[choice]);
        let count = match &got.finish {
            Some(Finish::Cancelled) => &mut self.ended.cancelled,
            Some(Finish::Failed(_)) => &mut self.ended.failed,
            finish => {
                assert_eq!((finish, got.tokens.len()), (&want.finish, want.tokens.len()), "{asked:?}");
                &mut self.ended.whole
            }
        };
        *count += 1;
        assert_eq!(got.tokens[..], want.tokens[..got.tokens.len()], "{asked:?}");
        open.answers -= 1;
        if open.answers == 0 {
            self.open.remove(&request);
        }
    }
}
