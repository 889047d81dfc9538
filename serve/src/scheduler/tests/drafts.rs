//! Drafts in steps.

use std::time::Duration;

use super::*;
use crate::backend::simulated::Costs;

#[test]
fn drafts_save_steps_and_change_nothing() {
    // One token follows all others, so that every draft is right.
    let steps = |draft: usize| {
        let (_, mut requests, mut backend) = speaking(20, 4, limits(64, draft), vocab(1));
        requests.submit(&[0, 0, 0, 0], &greedy(31)).unwrap();
        requests.finish(&mut backend);
        let stats = requests.scheduler.stats();
        assert_eq!(requests.answer(0).ids(), [0; 31]);
        assert_eq!(stats.accepted, stats.drafted);
        stats.steps
    };
    assert_eq!((steps(0), steps(1), steps(4)), (31, 16, 7));
}

/// A token that is drawn is that of its position, whether it was guessed or not; and
/// penalties count what was guessed before it.
#[test]
fn drafts_of_drawn_tokens_change_nothing() {
    let params = SamplingParams {
        temperature: 0.7,
        seed: Some(3),
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        frequency_penalty: 0.1,
        ..greedy(200)
    };
    let answer = |draft: usize| {
        let (_, mut requests, mut backend) = speaking(100, 4, limits(64, draft), vocab(3));
        requests.submit(&[0, 1, 2, 0, 1, 2], &params).unwrap();
        requests.finish(&mut backend);
        (requests.answer(0).ids(), requests.scheduler.stats())
    };
    let ((plain, _), (drafted, stats)) = (answer(0), answer(4));
    assert_eq!(plain, drafted);
    assert!(stats.accepted > 20 && stats.accepted < stats.drafted, "{stats:?}");
}

/// The time that answers take, and how many tokens of drafts were right.
fn time(draft: usize, requests: u32, language: Language, costs: Costs) -> (Duration, usize) {
    let (_, mut all, backend) = speaking(2000, 4, Limits { context: 4000, ..limits(64, draft) }, language);
    let mut backend = backend.with_costs(costs);
    for request in 0..requests {
        let prompt: Vec<_> =
            tokens(request.into(), 8).iter().map(|id| id % language.vocab_size as u32).collect();
        all.submit(&prompt, &greedy(800)).unwrap();
    }
    while !all.scheduler.is_done() {
        let before = backend.clock();
        all.step(&mut backend);
        all.scheduler.observe_time(backend.clock() - before);
    }
    (backend.clock(), all.scheduler.stats().accepted)
}

/// On the clock, answers take no longer with drafts, whatever they are and a step costs, but for what
/// the few steps in which that is found out; and less where drafts are right and cheap.
#[test]
fn drafts_never_take_longer_than_none() {
    let us = Duration::from_micros;
    let cheap = Costs { step: us(1000), token: us(2), host: us(50) };
    let waiting = Costs { host: us(900), ..cheap };
    let rows = Costs { step: us(100), token: us(500), host: us(20) };
    for costs in [cheap, waiting, rows] {
        for language in [1, 2, 3, 6, 20, 100].map(vocab) {
            for requests in [1, 2, 7] {
                let (without, _) = time(0, requests, language, costs);
                let (with, accepted) = time(4, requests, language, costs);
                let ratio = with.as_secs_f64() / without.as_secs_f64();
                assert!(ratio < 1.04, "{ratio} with {costs:?} {language:?}, {requests} requests");
                if language.vocab_size == 1 && costs != rows {
                    assert!(ratio < 0.5 && accepted > 500, "{ratio} {accepted} with {costs:?}");
                }
            }
        }
    }
}
