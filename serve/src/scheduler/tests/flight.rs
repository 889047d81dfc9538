//! Steps that are enqueued while the one before them is computed.

use std::sync::{Arc, Mutex};

use super::*;
use crate::backend::{Backend, Sample, Step, StepToken};

/// What a backend was asked, in order: a step of so many rows, with tokens that are still to be
/// chosen or without, or to collect one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Enqueue { rows: usize, ahead: bool },
    Collect,
}

/// Tells what it was asked.
struct Listening {
    backend: Simulated,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Backend for Listening {
    fn vocab_size(&self) -> usize {
        self.backend.vocab_size()
    }

    fn is_asynchronous(&self) -> bool {
        self.backend.is_asynchronous()
    }

    fn enqueue(&mut self, step: &Step<'_>) -> Result<()> {
        let ahead = step.tokens.iter().any(|token| matches!(token, StepToken::Chosen(_)));
        self.calls.lock().unwrap().push(Call::Enqueue { rows: step.tokens.len(), ahead });
        self.backend.enqueue(step)
    }

    fn collect(&mut self) -> Result<Vec<Sample>> {
        self.calls.lock().unwrap().push(Call::Collect);
        self.backend.collect()
    }

    fn logits(&self) -> Result<Vec<f32>> {
        self.backend.logits()
    }
}

/// Requests to a backend that tells what it is asked.
fn listening(limits: Limits) -> (Requests, Listening, Arc<Mutex<Vec<Call>>>) {
    let (_, requests, backend) = setup(100, 4, limits);
    let calls = Arc::<Mutex<Vec<Call>>>::default();
    (requests, Listening { backend, calls: calls.clone() }, calls)
}

const fn enqueue(rows: usize, ahead: bool) -> Call {
    Call::Enqueue { rows, ahead }
}

use Call::Collect;

/// The prompt, and then each step before the one before it is collected. The last one is known.
#[test]
fn a_step_is_enqueued_before_the_one_before_it_is_collected() {
    let (mut requests, mut backend, calls) = listening(limits(16, 0));
    requests.submit(&tokens(1, 6), &greedy(4)).unwrap();
    requests.finish(&mut backend);
    let want = [
        enqueue(6, false),
        enqueue(1, true),
        Collect,
        enqueue(1, true),
        Collect,
        enqueue(1, true),
        Collect,
        Collect,
    ];
    assert_eq!(calls.lock().unwrap()[..], want);
    assert_eq!(requests.scheduler.stats().surplus, 0);
}

/// An end that only the token tells is seen one step later, and its row is dropped; one that is
/// known keeps its row as long as another goes on.
#[test]
fn what_follows_an_end_is_dropped() {
    let (mut requests, mut backend, calls) = listening(limits(16, 0));
    let alone = &solo(&tokens(1, 6), &greedy(9), &limits(16, 0), 400, vocab(1000))[0];
    let stop = SamplingParams { stop_token_ids: vec![alone.ids()[2]], ..greedy(9) };
    requests.submit(&tokens(1, 6), &stop).unwrap();
    requests.step(&mut backend);
    requests.finish(&mut backend);
    let last = calls.lock().unwrap().len();
    assert_eq!(requests.answer(0).ids(), alone.ids()[..3]);
    assert_eq!(calls.lock().unwrap()[last - 3..], [enqueue(1, true), Collect, Collect]);
    let stats = requests.scheduler.stats();
    assert_eq!((stats.surplus, stats.decoded, stats.steps, stats.ended), (1, 2, 4, 1));
    // Two, of which one has a token less.
    for max_tokens in [3, 4] {
        requests.submit(&tokens(2, 6), &greedy(max_tokens)).unwrap();
        requests.step(&mut backend);
    }
    requests.finish(&mut backend);
    assert_eq!(requests.answer(1).ids(), requests.answer(2).ids()[..3]);
}

/// Who comes waits for the step in flight, and no longer.
#[test]
fn a_request_is_admitted_after_the_step_in_flight() {
    let (mut requests, mut backend, calls) = listening(limits(16, 0));
    requests.submit(&tokens(1, 6), &greedy(20)).unwrap();
    requests.step(&mut backend);
    requests.submit(&tokens(2, 6), &greedy(20)).unwrap();
    requests.step(&mut backend);
    requests.step(&mut backend);
    let want =
        [enqueue(6, false), enqueue(1, true), Collect, Collect, enqueue(7, false), enqueue(2, true), Collect];
    assert_eq!(calls.lock().unwrap()[..], want);
    assert_eq!(requests.answer(1).tokens.len(), 1);
}

/// One that may not run does not have the others wait.
#[test]
fn who_cannot_start_holds_up_nobody() {
    let (mut requests, mut backend, calls) = listening(Limits { max_running: 1, ..limits(16, 0) });
    for request in 0..2 {
        requests.submit(&tokens(request, 6), &greedy(3)).unwrap();
    }
    requests.step(&mut backend);
    assert_eq!(calls.lock().unwrap()[1], enqueue(1, true));
    requests.finish(&mut backend);
    assert_eq!(requests.scheduler.stats().surplus, 0);
}

/// What the host has to know first is waited for: logits.
#[test]
fn a_step_that_depends_on_logits_waits_for_them() {
    let (mut requests, mut backend, calls) = listening(limits(16, 0));
    requests.submit(&tokens(1, 6), &SamplingParams { logprobs: Some(1), ..greedy(5) }).unwrap();
    requests.submit(&tokens(2, 6), &greedy(5)).unwrap();
    requests.finish(&mut backend);
    assert!(calls.lock().unwrap().iter().all(|call| !matches!(call, Call::Enqueue { ahead: true, .. })));
}

/// Nor is a step under penalties enqueued ahead where there may be drafts.
#[test]
fn penalties_wait_where_there_may_be_drafts() {
    let (mut requests, mut backend, calls) = listening(limits(16, 2));
    requests.submit(&tokens(1, 6), &SamplingParams { presence_penalty: 0.1, ..greedy(5) }).unwrap();
    requests.finish(&mut backend);
    assert!(!calls.lock().unwrap().contains(&enqueue(1, true)));
}

/// Penalties are not waited for: what the last token changes is found where that is chosen.
#[test]
fn steps_under_penalties_are_enqueued_ahead_and_change_no_answer() {
    let none = || SamplingParams { logit_bias: [(1, 0.5), (4, -1.0)].into(), min_tokens: 9, ..greedy(60) };
    let all =
        SamplingParams { repetition_penalty: 1.2, presence_penalty: 0.4, frequency_penalty: 0.3, ..none() };
    let penalties = [
        SamplingParams { repetition_penalty: 1.5, ..none() },
        SamplingParams { presence_penalty: 1.5, ..none() },
        SamplingParams { frequency_penalty: 0.7, ..none() },
        SamplingParams { temperature: 0.8, top_k: 4, seed: Some(5), ..all.clone() },
        SamplingParams { stop_token_ids: vec![3], ..all },
    ];
    let (prompt, language) = ([0, 1, 2, 0], vocab(6));
    let plain = &solo(&prompt, &none(), &limits(16, 0), 400, language)[0];
    for params in penalties {
        let (_, mut requests, backend) = speaking(100, 4, limits(16, 0), language);
        let calls = Arc::<Mutex<Vec<Call>>>::default();
        let mut backend = Listening { backend, calls: calls.clone() };
        requests.submit(&prompt, &params).unwrap();
        requests.submit(&[5, 5], &greedy(60)).unwrap();
        requests.finish(&mut backend);
        let alone = &solo(&prompt, &params, &limits(16, 0), 400, language)[0];
        assert_ne!(alone.ids(), plain.ids(), "{params:?}");
        compare(requests.answer(0), alone, &format!("{params:?}"));
        let calls = calls.lock().unwrap();
        let known = calls.iter().filter(|call| matches!(call, Call::Enqueue { ahead: false, .. }));
        assert_eq!(known.count(), 1, "the prompts alone");
    }
}

/// The step after a draft waits for what of it was right. Where n-grams have nothing to say, or
/// what they say is wrong, steps are enqueued ahead as without drafts.
#[test]
fn a_step_waits_for_drafts_that_are_right() {
    let (_, mut requests, backend) = speaking(100, 4, limits(16, 2), vocab(1));
    let calls = Arc::<Mutex<Vec<Call>>>::default();
    let mut repeating = Listening { backend, calls: calls.clone() };
    requests.submit(&[0, 0, 0], &greedy(30)).unwrap();
    requests.finish(&mut repeating);
    let ahead = |call: &&Call| matches!(call, Call::Enqueue { ahead: true, .. });
    // Only the last token is none of a draft.
    assert_eq!(calls.lock().unwrap().iter().filter(ahead).count(), 0);
    assert_eq!(requests.scheduler.stats().accepted, 20);

    let (mut requests, mut backend, calls) = listening(limits(16, 2));
    requests.submit(&tokens(1, 6), &greedy(30)).unwrap();
    requests.finish(&mut backend);
    assert_eq!(calls.lock().unwrap().iter().filter(ahead).count(), 29);

    // Of two tokens, pairs come all the time, and what followed them does not tell.
    let (_, mut requests, backend) = speaking(200, 4, limits(16, 2), vocab(6));
    let calls = Arc::<Mutex<Vec<Call>>>::default();
    let mut confused = Listening { backend, calls: calls.clone() };
    requests.submit(&[0, 1, 2], &greedy(500)).unwrap();
    requests.finish(&mut confused);
    let drafts = requests.scheduler.stats().drafts;
    assert!((1..100).contains(&drafts), "{drafts}");
    assert!(calls.lock().unwrap().iter().filter(ahead).count() > 300);
}

/// Random numbers, biases and bans are those of the position, known or not.
#[test]
fn answers_that_are_drawn_are_the_same() {
    let params = SamplingParams {
        temperature: 0.9,
        top_p: 0.95,
        seed: Some(4),
        logit_bias: [(5, 3.0)].into(),
        stop_token_ids: vec![5],
        min_tokens: 7,
        ..greedy(40)
    };
    let (mut requests, mut backend, calls) = listening(limits(16, 0));
    requests.submit(&tokens(1, 6), &params).unwrap();
    requests.finish(&mut backend);
    let alone = &solo(&tokens(1, 6), &params, &limits(16, 0), 400, vocab(1000))[0];
    compare(requests.answer(0), alone, "solo");
    assert!(calls.lock().unwrap().contains(&enqueue(1, true)));
}

/// A page that the next step needs and that is not free has it wait, and then somebody stops.
#[test]
fn a_step_for_which_no_page_is_free_is_not_enqueued_ahead() {
    let (_, mut requests, backend) = setup(6, 4, limits(16, 0));
    let calls = Arc::<Mutex<Vec<Call>>>::default();
    let mut backend = Listening { backend, calls: calls.clone() };
    for request in 0..2 {
        requests.submit(&tokens(request, 7), &greedy(9)).unwrap();
    }
    requests.finish(&mut backend);
    for request in 0..2 {
        let alone = &solo(&tokens(request, 7), &greedy(9), &limits(16, 0), 24, vocab(1000))[0];
        compare(requests.answer(request as usize), alone, "solo");
    }
    assert!(requests.scheduler.stats().preemptions > 0);
}

/// A request that leaves while two steps know of it: its rows are dropped, others' are not.
#[test]
fn who_leaves_is_dropped_from_the_step_in_flight() {
    let (mut requests, mut backend, _) = listening(limits(32, 0));
    for request in 0..3 {
        requests.submit(&tokens(request, 6), &greedy(10)).unwrap();
    }
    requests.step(&mut backend);
    requests.step(&mut backend);
    requests.cancel(1, None);
    requests.finish(&mut backend);
    assert_eq!(requests.answer(1).tokens.len(), 2);
    assert_eq!(requests.scheduler.stats().surplus, 1);
    for request in [0, 2] {
        let alone = &solo(&tokens(request, 6), &greedy(10), &limits(32, 0), 400, vocab(1000))[0];
        compare(requests.answer(request as usize), alone, "solo");
    }
}
