//! Random schedules: every answer is what its request gets when it is alone, every
//! token is counted, and no page is lost.

use std::{cell::Cell, collections::BTreeSet};

use flashinfer_rs::kv::Sequence;
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

use super::{
    super::testing::{Faulty, Mistaken},
    *,
};
use crate::tests::draft_model;

/// A request that comes while others run.
#[derive(Clone, Debug)]
struct Arrival {
    /// Steps before it.
    steps: usize,
    prompt: Vec<u32>,
    params: SamplingParams,
    /// Steps after which it is cancelled.
    leaves: Option<usize>,
}

/// Requests that come while others run.
#[derive(Clone, Debug)]
struct Schedule {
    page_size: usize,
    num_pages: usize,
    language: Language,
    limits: Limits,
    backend: Kind,
    drafter: Option<Drafter>,
    /// Whether what nobody uses is evicted after every step.
    evicts: bool,
    arrivals: Vec<Arrival>,
}

/// How the backend takes steps.
#[derive(Clone, Copy, Debug)]
struct Kind {
    asynchronous: bool,
    /// One in so many calls fails; 0 for none.
    faults: u64,
}

/// A model that drafts.
#[derive(Clone, Copy, Debug)]
struct Drafter {
    num_pages: usize,
    /// One token in so many is another than the model's; 0 for none.
    mistakes: u64,
    /// One in so many calls fails; 0 for none.
    faults: u64,
}

fn params() -> impl Strategy<Value = SamplingParams> {
    let chosen = (prop_oneof![Just(0.0f32), Just(1.0), Just(0.3)], 0..3u32, any::<u64>(), 0.5..2.0f32);
    let penalties = (prop_oneof![2 => Just(1.0f32), 1 => Just(1.3)], prop_oneof![Just(0.0f32), Just(0.7)]);
    let ends = (1..24usize, 0..4usize, prop::bool::weighted(0.3), prop::bool::weighted(0.2));
    let n = prop_oneof![4 => Just(1usize), 1 => 2..4usize];
    (chosen, penalties, ends, n).prop_map(
        |(
            (temperature, top_k, seed, bias),
            (repetition_penalty, penalty),
            (max_tokens, min, stops, ignore_eos),
            n,
        )| {
            SamplingParams {
                temperature,
                top_k,
                seed: Some(seed),
                repetition_penalty,
                presence_penalty: penalty,
                frequency_penalty: penalty,
                logit_bias: if stops { [(0, bias)].into() } else { [].into() },
                logprobs: stops.then_some(1),
                prompt_logprobs: (ignore_eos || min == 0).then_some(min),
                stop_token_ids: if stops { vec![2] } else { vec![] },
                min_tokens: min.min(max_tokens),
                max_tokens: Some(max_tokens),
                n,
                ignore_eos,
                ..SamplingParams::default()
            }
        },
    )
}

fn schedule() -> impl Strategy<Value = Schedule> {
    let draft = prop_oneof![1 => Just(0), 1 => 0..5usize];
    let limits = (1..14usize, 1..14usize, 1..14usize, 6..60usize, draft, any::<bool>()).prop_map(
        |(step_tokens, chunk_tokens, max_running, context, draft, ends)| {
            let ends = if ends { [0].into() } else { [].into() };
            Limits { step_tokens, chunk_tokens, max_running, context, draft, ends }
        },
    );
    // Prompts that begin alike, or are the beginnings of each other.
    let prompt = (0..3u32, 0..20usize, prop::collection::vec(0..2u32, 1..12));
    let prompt = prompt.prop_map(|(family, shared, own)| {
        let shared = (0..shared as u32).map(|at| (at * family) % 3);
        shared.chain(own).collect()
    });
    let steps = prop_oneof![2 => Just(0), 1 => 0..6usize];
    let leaves = prop_oneof![4 => Just(None), 1 => (0..12usize).prop_map(Some)];
    let params = prop_oneof![1 => (1..24usize).prop_map(greedy), 1 => params()];
    let arrival = (steps, prompt, params, leaves).prop_map(|(steps, prompt, params, leaves)| Arrival {
        steps,
        prompt,
        params,
        leaves,
    });
    let arrivals = prop::collection::vec(arrival, 1..16);
    let evicts = prop::bool::weighted(0.3);
    let nan = prop_oneof![Just(0), Just(20)];
    let language = (3..5usize, nan).prop_map(|(vocab_size, nan)| Language { vocab_size, nan });
    let drafter = (1..24usize, 0..4u64, prop_oneof![3 => Just(0), 1 => 3..60u64])
        .prop_map(|(num_pages, mistakes, faults)| Drafter { num_pages, mistakes, faults });
    let drafter = prop::option::weighted(0.4, drafter);
    let backend = (any::<bool>(), prop_oneof![2 => Just(0), 1 => 3..30u64])
        .prop_map(|(asynchronous, faults)| Kind { asynchronous, faults });
    (1..6usize, 1..24usize, language, limits, (backend, drafter), evicts, arrivals).prop_map(
        |(page_size, num_pages, language, limits, (backend, drafter), evicts, mut arrivals)| {
            if language.nan > 0 {
                // An answer could end while its prompt is read, which is not counted here.
                arrivals.iter_mut().for_each(|arrival| arrival.params.prompt_logprobs = None);
            }
            Schedule { page_size, num_pages, language, limits, backend, drafter, evicts, arrivals }
        },
    )
}

/// What came of a schedule.
#[derive(Default)]
struct Outcome {
    stats: Stats,
    failed: usize,
    cancelled: usize,
    broken: usize,
}

/// Runs a schedule to its end, and compares every answer.
fn run(schedule: &Schedule) -> Outcome {
    let Schedule { page_size, num_pages, language, ref limits, backend: kind, drafter, evicts, ref arrivals } =
        *schedule;
    let (cache, most) = (num_pages * page_size, (num_pages * page_size).min(limits.context));
    let (pool, mut requests, backend) = speaking(num_pages, page_size, limits.clone(), language);
    if let Some(Drafter { num_pages, mistakes, faults }) = drafter {
        let model = draft_model(num_pages, page_size, limits, |pool, capacity| {
            let backend = Simulated::new(pool, capacity, language);
            let backend = Mistaken { backend, one_in: mistakes, tokens: arrivals.len() as u64 };
            Faulty { backend, one_in: faults, calls: arrivals.len() as u64 }
        });
        requests = requests.with_draft_model(model);
    }
    let backend = if kind.asynchronous { backend } else { backend.synchronous() };
    let mut backend = Faulty { backend, one_in: kind.faults, calls: arrivals.len() as u64 };
    let mut leaving: Vec<(usize, usize)> = Vec::new();
    let mut now = 0;
    let mut step = |requests: &mut Requests, leaving: &mut Vec<(usize, usize)>| {
        requests.step(&mut backend);
        now += 1;
        leaving.retain(|&(request, steps)| {
            if steps <= now {
                requests.cancel(request, None);
            }
            steps > now
        });
        if evicts {
            // All that no running choice uses can go.
            let scheduler = &mut requests.scheduler;
            scheduler.make_free(num_pages);
            let used: BTreeSet<_> = scheduler.batch.sequences().iter().flat_map(Sequence::pages).collect();
            assert_eq!(pool.used_pages(), used.len());
        }
        now
    };
    let mut taken: Vec<&Arrival> = Vec::new();
    for arrival in arrivals {
        let mut now = 0;
        for _ in 0..arrival.steps {
            now = step(&mut requests, &mut leaving);
        }
        // What can never fit is refused, and nothing else.
        let submitted = requests.submit(&arrival.prompt, &arrival.params);
        assert_eq!(submitted.is_ok(), arrival.prompt.len() < most, "{submitted:?}");
        if let Ok(request) = submitted {
            taken.push(arrival);
            leaving.extend(arrival.leaves.map(|steps| (request, now + steps)));
        }
    }
    // The first choice that has not ended gets further in every step, but for those that compute
    // what follows an end.
    let alone: Vec<_> =
        taken.iter().map(|it| solo(&it.prompt, &it.params, limits, cache, language)).collect();
    let tokens = |(answers, it): (&Vec<Answer>, &&Arrival)| {
        answers.iter().map(|answer| it.prompt.len() + answer.tokens.len() + 1).sum::<usize>()
    };
    let enough: usize = alone.iter().zip(&taken).map(tokens).sum();
    for _ in 0..enough {
        step(&mut requests, &mut leaving);
    }
    let scheduler = &requests.scheduler;
    assert!(scheduler.is_done(), "{enough} steps are not enough");
    let (mut failed, mut cancelled, mut broken, mut begun, mut once) = (0, 0, 0, 0, 0);
    for (&(request, choice), got) in &requests.answers {
        let want = &alone[request][choice];
        begun += usize::from(!got.tokens.is_empty());
        match got.finish {
            Some(Finish::Cancelled | Finish::Failed(_)) => {
                cancelled += usize::from(got.finish == Some(Finish::Cancelled));
                broken += usize::from(got.finish != Some(Finish::Cancelled));
                assert_eq!(got.tokens[..], want.tokens[..got.tokens.len()]);
            }
            _ => compare(got, want, &format!("request {request}, choice {choice}")),
        }
        failed += usize::from(got.finish == Some(Finish::NoNumbers));
        once += (taken[request].prompt.len() + got.tokens.len()).saturating_sub(1);
    }
    if drafter.is_some_and(|drafter| drafter.faults == 0) {
        assert!(matches!(scheduler.drafted_by, DraftedBy::Model(_)), "the draft model failed");
    }
    let stats = scheduler.stats();
    assert_eq!((stats.begun, stats.ended), (begun, requests.answers.len()));
    assert!(kind.faults > 0 || stats.failed_steps == 0);
    // Every token was computed as often as was counted, or by a step that failed.
    let counted = stats.read + stats.decoded + stats.surplus;
    let rows = backend.backend.rows();
    assert!(rows >= counted && (kind.faults > 0 || rows == counted), "{rows} {stats:?}");
    let computed = stats.read + stats.decoded + stats.saved + stats.accepted;
    let expected = once + failed + stats.recomputed + stats.drafted;
    // Those that were cancelled, or failed, may not have been read to the end.
    assert!(computed <= expected && (cancelled + broken > 0 || computed == expected), "{stats:?}");
    // Only cached prefixes are left, and all of them can go.
    assert_eq!(pool.used_pages(), scheduler.prefixes.num_pages());
    assert_eq!(pool.pending_copies(), 0);
    assert!(requests.scheduler.make_free(num_pages));
    drop(requests);
    assert_eq!(pool.free_pages(), num_pages);
    Outcome { stats, failed, cancelled, broken }
}

#[test]
fn random_schedules_answer_as_if_each_request_were_alone() {
    let (preemptions, recomputed, saved, accepted, failures, cancelled) = Default::default();
    let (surplus, failed_steps, broken, by_model) = Default::default();
    let add = |sum: &Cell<usize>, more: usize| sum.set(sum.get() + more);
    let mut runner = TestRunner::new(Config { cases: 4500, failure_persistence: None, ..Config::default() });
    runner
        .run(&schedule(), |schedule| {
            let outcome = run(&schedule);
            add(&failures, outcome.failed);
            add(&cancelled, outcome.cancelled);
            add(&broken, outcome.broken);
            add(&surplus, outcome.stats.surplus);
            add(&failed_steps, outcome.stats.failed_steps);
            add(&preemptions, outcome.stats.preemptions);
            add(&recomputed, outcome.stats.recomputed);
            add(&saved, outcome.stats.saved);
            add(if schedule.drafter.is_some() { &by_model } else { &accepted }, outcome.stats.accepted);
            Ok(())
        })
        .unwrap();
    for (what, count) in [
        ("preemptions", preemptions),
        ("tokens computed again", recomputed),
        ("tokens saved", saved),
        ("tokens of n-grams accepted", accepted),
        ("tokens of a draft model accepted", by_model),
        ("requests failed", failures),
        ("requests cancelled", cancelled),
        ("steps failed", failed_steps),
        ("answers that a fault ended", broken),
        ("tokens computed for nothing", surplus),
    ] {
        assert!(count.get() > 300, "{} {what}", count.get());
    }
}

#[test]
fn a_long_schedule_ends_with_no_page_lost() {
    // 300 requests that share 24 pages and three system prompts.
    let arrivals = (0..300).map(|request| {
        let mut prompt: Vec<_> = tokens(request % 3, 12);
        prompt.extend(tokens(100 + request, 1 + request as usize % 7));
        let prompt = prompt.into_iter().map(|token| token % 3).collect();
        Arrival { steps: request as usize % 5, prompt, params: greedy(30), leaves: None }
    });
    let Outcome { stats, .. } = run(&Schedule {
        page_size: 4,
        num_pages: 24,
        language: vocab(3),
        limits: Limits { context: 80, ..limits(16, 3) },
        backend: Kind { asynchronous: true, faults: 0 },
        drafter: None,
        evicts: false,
        arrivals: arrivals.collect(),
    });
    assert!(stats.preemptions > 20 && stats.saved > 1000 && stats.accepted > 100, "{stats:?}");
}
