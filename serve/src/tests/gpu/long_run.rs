//! Random requests to a deterministic engine for as long as is asked: `FLASHINFER_RS_TEST_SECONDS`.

use std::time::Instant;

use cudarc::driver::result;
use test_support::{
    Rng,
    alone::{is_alone, resident},
    seconds,
};

use super::*;
use crate::scheduler::{
    testing::Answer,
    traffic::{Arrivals, Asked, Traffic},
};

/// Requests of which each arrival is one.
const KINDS: usize = 160;
/// Few, so that requests preempt each other.
const NUM_PAGES: usize = 80;
/// What is looked at in between.
const PART: Duration = Duration::from_secs(10);

/// Prompts that begin alike, of all lengths, and how they are answered.
fn kinds(loaded: &Loaded, gpu: &mut Gpu, pool: &PageAllocator, limits: &Limits, rng: &mut Rng) -> Vec<Asked> {
    let systems =
        ["", "You are a poet. ", "Answer in one short sentence, as a teacher would. ", "def f(x):\n"];
    let words = ["rain", "glass", "rivers", "prime numbers", "a small village", "cats", "one two one two"];
    let kind = |_| {
        let mut text = systems[rng.below(systems.len())].to_owned();
        (0..1 + rng.below(30)).for_each(|_| text += &format!("{} ", words[rng.below(words.len())]));
        let prompt = loaded.text.encode(&text);
        let params = SamplingParams {
            temperature: [0.0, 0.0, 0.8][rng.below(3)],
            seed: Some(rng.bits()),
            ..greedy(1 + rng.below(80))
        };
        let mut requests = Requests::new(pool, gpu.vocab_size(), Limits { draft: 0, ..limits.clone() });
        requests.submit(&prompt, &params).unwrap();
        requests.finish(gpu);
        let alone: Vec<Answer> = vec![requests.answer(0).clone()];
        Asked { prompt, params, alone }
    };
    (0..KINDS).map(kind).collect()
}

#[test]
#[ignore = "takes as long as it is told: FLASHINFER_RS_TEST_SECONDS, a minute unless it is set"]
fn random_requests_are_answered_as_if_each_were_alone() {
    let Some(_turn) = turn() else { return };
    if !is_alone("tests::gpu::long_run::random_requests_are_answered_as_if_each_were_alone") {
        return;
    }
    let (time, loaded) = (seconds(60), loaded().expect("the pinned model"));
    let pool = PageAllocator::new(NUM_PAGES, 16).unwrap();
    let limits = Limits {
        step_tokens: 256,
        chunk_tokens: 256,
        max_running: 48,
        context: 2000,
        draft: 3,
        ends: [2].into(),
    };
    let mut gpu = loaded.gpu_with(&pool, GpuOptions { deterministic: true, ..GpuOptions::new(256) });
    let kinds = kinds(loaded, &mut gpu, &pool, &limits, &mut Rng::new());
    let requests = Requests::new(&pool, gpu.vocab_size(), limits);
    let mut traffic = Traffic::new(requests, gpu, &pool);
    let next = |rng: &mut Rng| kinds[rng.below(KINDS)].clone();
    let (begin, mut sizes) = (Instant::now(), Vec::new());
    while begin.elapsed() < time {
        let arrivals = Arrivals {
            // In turn more than can be answered, and less.
            mean: Duration::from_micros([500, 4000, 20_000][sizes.len() % 3]),
            patience: Duration::from_millis(200),
            max_waiting: 300,
            next: &next,
        };
        let part = PART.min(time / 3);
        traffic.run(part, |_| begin.elapsed(), &arrivals);
        let (free, _) = result::mem_get_info().unwrap();
        sizes.push((free, resident()));
        let (took, sizes) = (begin.elapsed(), sizes.last());
        eprintln!("{took:.0?}: {:?}, bytes free and resident {sizes:?}", traffic.ended);
    }
    let (stats, ended) = (traffic.requests.scheduler.stats(), traffic.ended);
    eprintln!("{:?}: {ended:?}, {stats:?}, bytes free and resident {sizes:?}", begin.elapsed());
    for (what, count) in [
        ("whole", ended.whole),
        ("cancelled", ended.cancelled),
        ("refused", ended.refused),
        ("preemptions", stats.preemptions),
        ("saved", stats.saved),
        ("accepted", stats.accepted),
    ] {
        assert!(count > 0, "nothing was {what}");
    }
    assert_eq!(ended.failed, 0);
    // The first parts capture graphs, and fill the prefix cache and the allocators.
    let ((early_free, early), (late_free, late)) = (sizes[sizes.len() / 2], *sizes.last().unwrap());
    assert!(late_free + (64 << 20) > early_free && late < early + (64 << 20), "{sizes:?}");
    drop(traffic);
    assert_eq!(pool.free_pages(), NUM_PAGES);
}
