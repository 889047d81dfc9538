//! Drafts by a second model: the same one, which makes mistakes.

use std::sync::{Arc, Mutex};

use super::{
    super::testing::{Faulty, Mistaken},
    *,
};
use crate::{
    backend::{Backend, Sample, Step},
    tests::draft_model,
};

/// Requests whose drafts are made by the same model, of which one token in so many is another.
fn drafted(pages: usize, limits: Limits, language: Language, mistakes: u64) -> (Requests, Simulated) {
    let (_, requests, backend) = speaking(100, 4, limits.clone(), language);
    let model = draft_model(pages, 4, &limits, |pool, capacity| Mistaken {
        backend: Simulated::new(pool, capacity, language),
        one_in: mistakes,
        tokens: 0,
    });
    (requests.with_draft_model(model), backend)
}

#[test]
fn a_model_that_agrees_has_all_drafts_right() {
    for temperature in [0.0, 0.9] {
        let params = SamplingParams {
            temperature,
            seed: Some(3),
            repetition_penalty: 1.2,
            frequency_penalty: 0.1,
            top_p: 0.9,
            logprobs: Some(2),
            ..greedy(30)
        };
        let (mut requests, mut backend) = drafted(100, limits(64, 4), vocab(1000), 0);
        requests.submit(&tokens(1, 9), &params).unwrap();
        requests.finish(&mut backend);
        compare(
            requests.answer(0),
            &solo(&tokens(1, 9), &params, &limits(64, 4), 400, vocab(1000))[0],
            "solo",
        );
        let stats = requests.scheduler.stats();
        // With the prompt comes a draft of 4, as with each further token.
        assert_eq!((stats.steps, stats.drafted, stats.accepted), (6, 24, 24), "{stats:?}");
    }
}

#[test]
fn drafts_follow_how_many_are_right() {
    let answer = |mistakes| {
        let (mut requests, mut backend) = drafted(200, limits(64, 8), vocab(1000), mistakes);
        requests.submit(&tokens(1, 9), &greedy(300)).unwrap();
        requests.finish(&mut backend);
        compare(
            requests.answer(0),
            &solo(&tokens(1, 9), &greedy(300), &limits(64, 8), 400, vocab(1000))[0],
            "solo",
        );
        requests.scheduler.stats()
    };
    let (right, mixed, wrong) = (answer(0), answer(4), answer(1));
    assert!(right.steps < 40, "{right:?}");
    assert!((100..200).contains(&mixed.steps) && mixed.accepted * 5 > mixed.drafted * 2, "{mixed:?}");
    assert!(wrong.steps == 300 && (1..25).contains(&wrong.drafted), "{wrong:?}");
}

/// A long prompt is read in parts, without drafts until then; one that its cache or its context
/// cannot hold has none.
#[test]
fn what_a_model_cannot_hold_is_not_drafted() {
    let answer = |pages: usize, prompt: usize| {
        let (mut requests, mut backend) = drafted(pages, limits(16, 4), vocab(1000), 0);
        requests.submit(&tokens(1, prompt), &greedy(20)).unwrap();
        requests.finish(&mut backend);
        let alone = &solo(&tokens(1, prompt), &greedy(20), &limits(16, 4), 400, vocab(1000))[0];
        compare(requests.answer(0), alone, "solo");
        requests.scheduler.stats()
    };
    assert!(answer(100, 60).accepted > 8);
    let small = answer(5, 10);
    assert!((1..9).contains(&small.accepted), "{small:?}");
    assert_eq!(answer(5, 60).drafted, 0);
}

/// Those that leave, and those that stop, give the model's pages back, too; what several have in
/// common is read once.
#[test]
fn pages_of_the_model_go_round() {
    // Room for two at a time; the model's cache for one and a half.
    let language = vocab(50);
    let limits = Limits { context: 60, ..limits(32, 3) };
    let (_, requests, mut backend) = speaking(20, 4, limits.clone(), language);
    let model = draft_model(12, 4, &limits, |pool, capacity| Simulated::new(pool, capacity, language));
    let mut requests = requests.with_draft_model(model);
    let prompt = |request: u64| -> Vec<u32> {
        [tokens(0, 8), tokens(1 + request % 5, 4)].concat().iter().map(|id| id % 50).collect()
    };
    for request in 0..40 {
        requests.submit(&prompt(request), &greedy(20)).unwrap();
        requests.step(&mut backend);
        if request % 7 == 3 {
            requests.cancel(request as usize, None);
        }
    }
    requests.finish(&mut backend);
    let stats = requests.scheduler.stats();
    assert!(stats.preemptions > 0 && stats.accepted > 200, "{stats:?}");
    for request in (0..40).filter(|request| request % 7 != 3) {
        let alone = &solo(&prompt(request), &greedy(20), &limits, 80, language)[0];
        compare(requests.answer(request as usize), alone, "solo");
    }
}

/// How many tokens and outputs the steps of a backend have.
struct Counted {
    backend: Simulated,
    steps: Arc<Mutex<Vec<(usize, usize)>>>,
}

impl Backend for Counted {
    fn vocab_size(&self) -> usize {
        self.backend.vocab_size()
    }

    fn is_asynchronous(&self) -> bool {
        self.backend.is_asynchronous()
    }

    fn enqueue(&mut self, step: &Step<'_>) -> Result<()> {
        self.steps.lock().unwrap().push((step.tokens.len(), step.outputs.len()));
        self.backend.enqueue(step)
    }

    fn collect(&mut self) -> Result<Vec<Sample>> {
        self.backend.collect()
    }

    fn logits(&self) -> Result<Vec<f32>> {
        self.backend.logits()
    }
}

/// All tokens of its small steps have an output, as far as the backend was made for so many.
#[test]
fn small_steps_of_the_model_have_an_output_for_each_token() {
    let limits = Limits { max_running: 1, ..limits(64, 4) };
    assert_eq!(limits.step_capacity().outputs, 5);
    let (_, requests, mut backend) = speaking(100, 4, limits.clone(), vocab(1000));
    let steps = Arc::new(Mutex::new(Vec::new()));
    let model = draft_model(100, 4, &limits, |pool, capacity| Counted {
        backend: Simulated::new(pool, capacity, vocab(1000)),
        steps: steps.clone(),
    });
    let mut requests = requests.with_draft_model(model);
    requests.submit(&tokens(1, 9), &greedy(30)).unwrap();
    requests.finish(&mut backend);
    compare(requests.answer(0), &solo(&tokens(1, 9), &greedy(30), &limits, 400, vocab(1000))[0], "solo");
    assert_eq!(requests.scheduler.stats().accepted, 24);
    // The prompt; what the model chose after a draft, and the last token of that; a draft's tokens.
    let mut steps = steps.lock().unwrap().clone();
    assert_eq!(steps.remove(0), (9, 1));
    steps.sort_unstable();
    steps.dedup();
    assert_eq!(steps, [(1, 1), (2, 2)]);
}

/// A model that fails is not asked again, and no answer ends by it.
#[test]
fn a_model_that_fails_leaves_answers_without_drafts() {
    let limits = limits(64, 4);
    let (_, requests, mut backend) = setup(100, 4, limits.clone());
    let model = draft_model(100, 4, &limits, |pool, capacity| {
        let mut steps = 0;
        Simulated::new(pool, capacity, vocab(1000)).with_failure(move |_| {
            steps += 1;
            (steps > 10).then(|| "no device".into())
        })
    });
    let mut requests = requests.with_draft_model(model);
    for request in 0..3 {
        requests.submit(&tokens(request, 9), &greedy(40)).unwrap();
    }
    requests.finish(&mut backend);
    for request in 0..3 {
        let alone = &solo(&tokens(request, 9), &greedy(40), &limits, 400, vocab(1000))[0];
        compare(requests.answer(request as usize), alone, "solo");
    }
    let stats = requests.scheduler.stats();
    assert!(stats.accepted > 0 && stats.steps > 20 && stats.failed_steps == 0, "{stats:?}");
}

/// NaN of the draft model ends a draft, and that of the model an answer.
#[test]
fn a_draft_model_of_nan_drafts_less() {
    let limits = limits(64, 4);
    let (_, requests, mut backend) = setup(100, 4, limits.clone());
    let nan = Language { vocab_size: 1000, nan: 4 };
    let model = draft_model(100, 4, &limits, |pool, capacity| Simulated::new(pool, capacity, nan));
    let mut requests = requests.with_draft_model(model);
    requests.submit(&tokens(1, 9), &greedy(60)).unwrap();
    requests.finish(&mut backend);
    compare(requests.answer(0), &solo(&tokens(1, 9), &greedy(60), &limits, 400, vocab(1000))[0], "solo");
    let stats = requests.scheduler.stats();
    assert!(stats.accepted == stats.drafted && stats.drafted < stats.drafts * 4, "{stats:?}");
}

/// A backend that fails now and then, drafted for by one that is mistaken now and then.
#[test]
fn faults_of_the_model_leave_the_drafts_right() {
    let (mut requests, backend) = drafted(100, limits(64, 4), vocab(1000), 5);
    let mut backend = Faulty { backend, one_in: 9, calls: 1 };
    for request in 0..6 {
        requests.submit(&tokens(request, 9), &greedy(40)).unwrap();
    }
    requests.finish(&mut backend);
    for request in 0..6 {
        let alone = &solo(&tokens(request, 9), &greedy(40), &limits(64, 4), 400, vocab(1000))[0];
        let got = requests.answer(request as usize);
        match got.finish {
            Some(Finish::Failed(_)) => assert_eq!(got.tokens[..], alone.tokens[..got.tokens.len()]),
            _ => compare(got, alone, "solo"),
        }
    }
    assert!(requests.scheduler.stats().failed_steps > 0 && requests.scheduler.stats().accepted > 0);
}
