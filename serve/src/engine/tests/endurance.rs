//! A million requests.

use test_support::alone::{is_alone, resident};

use super::*;

const REQUESTS: usize = 1_000_000;
const NAME: &str = "engine::tests::endurance::memory_does_not_grow_over_a_million_requests";

/// Requests that end, fail, are cancelled, dropped and refused.
#[test]
#[cfg(target_os = "linux")]
fn memory_does_not_grow_over_a_million_requests() {
    if !is_alone(NAME) {
        return;
    }
    let limits = Limits {
        step_tokens: 128,
        chunk_tokens: 128,
        max_running: 32,
        context: 64,
        draft: 0,
        ends: [0].into(),
    };
    let config = EngineConfig { num_pages: 100, page_size: 4, max_queued: 2000, ..EngineConfig::new(limits) };
    let engine = Engine::start(config, bytes::text("gpt-2"), |pool, limits| {
        let backend = Simulated::new(pool, limits.step_capacity(), Language { vocab_size: 8, nan: 0 });
        Ok(backend.with_failure(|tokens| tokens.contains(&7).then(|| "no 7".into())))
    });
    let engine = engine.unwrap();
    let (mut open, mut sizes) = (Vec::new(), Vec::new());
    for number in 0..REQUESTS {
        let mut prompt: Vec<_> = (0..5).map(|digit| (number / 6usize.pow(digit) % 6) as u32 + 1).collect();
        if number % 1000 == 0 {
            prompt.push(7);
        }
        let params = if number % 9 == 0 { seeded(number as u64, 2) } else { greedy(1) };
        match engine.submit(Request::new(prompt, params)) {
            Ok(events) => open.push(events),
            Err(SubmitError::QueueFull { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        if open.len() == 1000 {
            for (at, events) in open.drain(..).enumerate() {
                match at % 50 {
                    0 => drop(events),
                    1 => engine.cancel(events.id()),
                    _ => drop(collect(events)),
                }
            }
        }
        if number % (REQUESTS / 10) == REQUESTS / 20 {
            sizes.push(resident());
        }
    }
    drop(open);
    let status = until(&engine, |status| status.running + status.waiting == 0);
    assert!(status.stats.ended > REQUESTS * 9 / 10, "{status:?}");
    assert!(status.used_pages <= 100);
    let queue = *engine.shared.queue();
    assert_eq!((queue.answers, queue.tokens), (0, 0));
    // The first tenths fill the prefix cache and the allocator.
    let (early, late) = (sizes[2], *sizes.last().unwrap());
    assert!(late < early + (4 << 20), "{sizes:?}");
}
