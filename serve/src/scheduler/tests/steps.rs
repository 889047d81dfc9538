//! Budgets, parts of prompts, preemption, fairness and prefixes, step by step.

use std::time::Duration;

use super::*;
use crate::backend::simulated::Costs;

/// The requests that run.
fn running(requests: &Requests) -> Vec<u64> {
    requests.scheduler.running().iter().map(|choice| choice.request.0).collect()
}

#[test]
fn a_shared_prompt_is_computed_once() {
    // Five pages of 4 tokens and 3 tokens more are the same for all.
    for len in [20, 23] {
        let (_, mut requests, mut backend) = setup(200, 4, limits(64, 0));
        for question in 1..=10 {
            requests.submit(&[tokens(0, len), tokens(question, 5)].concat(), &greedy(6)).unwrap();
        }
        requests.finish(&mut backend);
        let stats = requests.scheduler.stats();
        assert_eq!((stats.saved, stats.read), (9 * 20, 10 * (len + 5) - 9 * 20));
        assert_eq!((stats.decoded, stats.recomputed, stats.preemptions), (10 * 5, 0, 0));
        assert!(stats.pages <= 5 + 10 * (len + 5 + 5 - 20).div_ceil(4), "{stats:?}");
        for request in 0..10 {
            let cached = if request == 0 { 0 } else { 20 };
            assert_eq!(requests.answer(request).cached_tokens, cached);
        }
    }
}

#[test]
fn the_last_request_gives_its_pages_back_and_resumes() {
    // Each fits alone, but both do not.
    let (_, mut requests, mut backend) = setup(8, 4, limits(16, 0));
    let prompts = [tokens(1, 8), tokens(2, 8)];
    for prompt in &prompts {
        requests.submit(prompt, &greedy(20)).unwrap();
    }
    let mut steps = Vec::new();
    while !requests.scheduler.is_done() {
        requests.step(&mut backend);
        steps.push((running(&requests), requests.scheduler.stats().preemptions));
    }
    assert_eq!(steps[0], (vec![0, 1], 0));
    let stopped = steps.iter().position(|(_, preemptions)| *preemptions == 1).unwrap();
    assert!(steps[stopped..].iter().any(|(running, _)| *running == [0]));
    assert!(steps[stopped..].iter().any(|(running, _)| *running == [1]));
    // The first was never held up.
    assert_eq!(steps.iter().filter(|(running, _)| running.contains(&0)).count(), 19);
    let stats = requests.scheduler.stats();
    assert!(stats.preemptions == 1 && stats.recomputed > 0, "{stats:?}");
    for (request, prompt) in prompts.iter().enumerate() {
        let alone = &solo(prompt, &greedy(20), &limits(16, 0), 32, vocab(1000))[0];
        compare(requests.answer(request), alone, "solo");
        // What it found of its own is not what others had cached.
        assert_eq!(requests.answer(request).cached_tokens, 0);
    }
}

#[test]
fn prompts_are_read_in_parts_while_others_decode() {
    let (_, mut requests, backend) = setup(100, 4, limits(8, 0));
    // No step is in flight when a request comes.
    let mut backend = backend.synchronous();
    let mut work = |requests: &mut Requests| {
        let before = requests.scheduler.stats();
        requests.step(&mut backend);
        let after = requests.scheduler.stats();
        (after.read - before.read, after.decoded - before.decoded)
    };
    requests.submit(&tokens(1, 3), &greedy(12)).unwrap();
    assert_eq!(work(&mut requests), (3, 0));
    requests.submit(&tokens(2, 16), &greedy(12)).unwrap();
    requests.submit(&tokens(3, 2), &greedy(12)).unwrap();
    assert_eq!(work(&mut requests), (7, 1));
    assert_eq!(work(&mut requests), (7, 1));
    // The third gets what the second leaves.
    assert_eq!(work(&mut requests), (4, 1));
    assert_eq!(work(&mut requests), (0, 3));
    // Nobody waits: one token of each.
    while !requests.scheduler.is_done() {
        assert_eq!(work(&mut requests).0, 0);
    }
    assert_eq!(work(&mut requests), (0, 0));
}

#[test]
fn no_more_run_than_may() {
    let (_, mut requests, mut backend) = setup(100, 4, Limits { max_running: 3, ..limits(64, 0) });
    for request in 0..7 {
        requests.submit(&tokens(request, 5), &greedy(4)).unwrap();
    }
    let mut seen = Vec::new();
    while !requests.scheduler.is_done() {
        requests.step(&mut backend);
        seen.push((requests.scheduler.running().len(), requests.scheduler.waiting()));
    }
    // Three start, and when they end, three others.
    assert_eq!(
        seen,
        [(3, 4), (3, 4), (3, 4), (0, 4), (3, 1), (3, 1), (3, 1), (0, 1), (1, 0), (1, 0), (1, 0), (0, 0)]
    );
    assert!((0..7).all(|request| requests.answer(request).tokens.len() == 4));
}

/// Beside answers that go on, a step that reads has no more tokens than a chunk; without, all that it
/// may have.
#[test]
fn prompts_are_read_in_chunks_beside_answers() {
    let limits = Limits { chunk_tokens: 5, ..limits(16, 0) };
    let (_, mut requests, mut backend) = setup(200, 4, limits.clone());
    let mut read = |requests: &mut Requests| {
        let before = requests.scheduler.stats().read;
        requests.step(&mut backend);
        requests.scheduler.stats().read - before
    };
    // Nobody waits for these.
    requests.submit(&tokens(0, 20), &greedy(12)).unwrap();
    assert_eq!([16, 4], [(); 2].map(|()| read(&mut requests)));
    for prompt in 1..=2 {
        requests.submit(&tokens(prompt, 7), &greedy(3)).unwrap();
    }
    // The step in flight is without them; then two prompts share the chunk.
    assert_eq!([0, 4, 4, 3, 3], [(); 5].map(|()| read(&mut requests)));
    requests.finish(&mut backend);
    for (request, (len, answer)) in [(20, 12), (7, 3), (7, 3)].into_iter().enumerate() {
        let alone = &solo(&tokens(request as u64, len), &greedy(answer), &limits, 800, vocab(1000))[0];
        compare(requests.answer(request), alone, "solo");
    }
}

/// A long prompt does not hold up those that decode by more than a part of it: on the
/// clock no token of theirs takes longer than a full step.
#[test]
fn a_long_prompt_delays_nobody_by_more_than_a_part() {
    let costs =
        Costs { step: Duration::from_millis(2), token: Duration::from_micros(100), ..Costs::default() };
    let (_, mut requests, backend) = setup(400, 4, Limits { context: 2000, ..limits(32, 0) });
    let mut backend = backend.with_costs(costs);
    requests.submit(&tokens(1, 4), &greedy(60)).unwrap();
    requests.step(&mut backend);
    let long = requests.submit(&tokens(2, 1000), &greedy(1)).unwrap();
    let mut last = backend.clock();
    let full = costs.step + costs.token * 32;
    while requests.answer(0).finish.is_none() {
        let before = requests.answer(0).tokens.len();
        requests.step(&mut backend);
        assert_eq!(requests.answer(0).tokens.len(), before + 1);
        assert!(backend.clock() - last <= full);
        last = backend.clock();
    }
    // The prompt took the rest of each step: 31 tokens of it.
    assert_eq!(requests.answer(long).tokens.len(), 1);
    assert_eq!(requests.scheduler.stats().steps, 60);
}

/// Requests are begun in the order in which they came, whatever their lengths.
#[test]
fn answers_begin_in_the_order_of_their_requests() {
    let (_, mut requests, mut backend) = setup(60, 4, limits(16, 0));
    let lens = [30, 2, 90, 1, 1, 50, 3];
    for (request, len) in lens.into_iter().enumerate() {
        requests.submit(&tokens(request as u64, len), &greedy(8)).unwrap();
    }
    let mut begun = Vec::new();
    while !requests.scheduler.is_done() {
        let report = requests.step(&mut backend);
        for update in report.updates {
            if !begun.contains(&update.request.0) {
                begun.push(update.request.0);
            }
        }
    }
    assert_eq!(begun, [0, 1, 2, 3, 4, 5, 6]);
}

#[test]
fn prompts_that_never_fit_are_refused() {
    let (_, mut requests, mut backend) = setup(2, 4, limits(16, 0));
    let mut refused = |len: usize| requests.submit(&vec![0; len], &greedy(20)).unwrap_err().to_string();
    let text = refused(8);
    assert!(text.contains("8 tokens") && text.contains("--cache-tokens"), "{text}");
    let text = refused(1000);
    assert!(text.contains("the model's context 1000"), "{text}");
    assert!(refused(0).contains("empty"));
    let text = requests.submit(&[5, 1000], &greedy(20)).unwrap_err().to_string();
    assert!(text.contains("the token 1000") && text.contains("below 1000"), "{text}");
    // The largest that fits gets as many tokens as there is room for, and one.
    requests.submit(&[0; 7], &greedy(20)).unwrap();
    requests.finish(&mut backend);
    let answer = requests.answer(0);
    assert_eq!((answer.tokens.len(), &answer.finish), (2, &Some(Finish::Cache)));
}

#[test]
fn every_token_of_the_context_is_used() {
    let (_, mut requests, mut backend) = setup(20, 4, Limits { context: 30, ..limits(16, 0) });
    requests.submit(&tokens(0, 29), &SamplingParams::default()).unwrap();
    requests.submit(&tokens(1, 3), &SamplingParams::default()).unwrap();
    requests.finish(&mut backend);
    for (request, len) in [(0, 2), (1, 28)] {
        let answer = requests.answer(request);
        assert_eq!((answer.tokens.len(), &answer.finish), (len, &Some(Finish::Context)));
    }
}
