//! A day of requests, by the backend's clock.

use std::time::{Duration, Instant};

use test_support::{
    Rng,
    alone::{is_alone, resident},
};

use super::{
    super::{
        testing::Faulty,
        traffic::{Arrivals, Asked, Traffic},
    },
    *,
};
use crate::backend::simulated::Costs;

const HOURS: usize = 24;
const HOUR: Duration = Duration::from_secs(3600);
/// So slow that a day has no more steps than a test has time for.
const COSTS: Costs =
    Costs { step: Duration::from_secs(5), token: Duration::from_millis(50), host: Duration::ZERO };
const NUM_PAGES: usize = 44;
const PAGE_SIZE: usize = 4;
const NAME: &str = "scheduler::tests::day::a_day_of_requests_loses_no_page_and_no_memory";

/// The mean time between requests: most of them come around noon, more than can be answered.
fn mean(hour: usize) -> Duration {
    let from_noon = (hour as f64 - 12.0).abs();
    COSTS.step.mul_f64(0.6 + (from_noon / 4.0).powi(2))
}

/// A prompt that begins as one in four others does, and how it is to be answered.
fn next(rng: &mut Rng, limits: &Limits, language: Language) -> Asked {
    let family = rng.below(4) as u64;
    let own = 1 + rng.below(10);
    let prompt: Vec<_> =
        tokens(family, 10).into_iter().chain(tokens(rng.bits() >> 32, own)).map(|id| id % 16).collect();
    let params = SamplingParams {
        temperature: [0.0, 0.0, 1.0][rng.below(3)],
        seed: Some(rng.bits()),
        n: 1 + rng.below(8) / 7,
        ..greedy(1 + rng.below(40))
    };
    let alone = solo(&prompt, &params, limits, NUM_PAGES * PAGE_SIZE, language);
    Asked { prompt, params, alone }
}

#[test]
#[cfg(target_os = "linux")]
fn a_day_of_requests_loses_no_page_and_no_memory() {
    if !is_alone(NAME) {
        return;
    }
    let language = Language { vocab_size: 16, nan: 0 };
    let limits = Limits {
        step_tokens: 24,
        chunk_tokens: 24,
        max_running: 12,
        context: 80,
        draft: 3,
        ends: [0].into(),
    };
    let (pool, requests, backend) = speaking(NUM_PAGES, PAGE_SIZE, limits.clone(), language);
    let backend = Faulty { backend: backend.with_costs(COSTS), one_in: 150, calls: 0 };
    let mut traffic = Traffic::new(requests, backend, &pool);
    let (mut sizes, begin) = (Vec::new(), Instant::now());
    for hour in 0..HOURS {
        let next = |rng: &mut Rng| next(rng, &limits, language);
        let arrivals = Arrivals { mean: mean(hour), patience: COSTS.step * 20, max_waiting: 64, next: &next };
        traffic.run(HOUR, |faulty| faulty.backend.clock(), &arrivals);
        sizes.push(resident());
    }
    let (stats, ended) = (traffic.requests.scheduler.stats(), traffic.ended);
    eprintln!("{ended:?} in {:?}, {stats:?}, {sizes:?}", begin.elapsed());
    for (what, count) in [
        ("whole", ended.whole),
        ("cancelled", ended.cancelled),
        ("steps failed", stats.failed_steps),
        ("refused", ended.refused),
        ("preemptions", stats.preemptions),
        ("saved", stats.saved),
        ("accepted", stats.accepted),
    ] {
        assert!(count >= 50, "{count} {what}");
    }
    // The first hours fill the prefix cache and the allocator.
    let (early, late) = (sizes[HOURS / 2], *sizes.last().unwrap());
    assert!(late < early + (1 << 20), "{sizes:?}");
    drop(traffic);
    assert_eq!(pool.free_pages(), NUM_PAGES);
}
