//! Steps that fail.

use super::*;

/// A failure where a step has this token.
fn because_of(token: u32) -> impl FnMut(&[u32]) -> Option<String> {
    move |tokens| tokens.contains(&token).then(|| format!("the token {token} is too much"))
}

#[test]
fn a_step_that_fails_ends_only_what_cannot_be_computed_alone() {
    let (pool, mut requests, backend) = setup(60, 4, limits(32, 0));
    let mut backend = backend.with_failure(because_of(999));
    let prompts = [tokens(1, 6), vec![5, 999, 6], tokens(2, 7), tokens(1, 6)];
    let mut failures = Vec::new();
    for prompt in &prompts {
        requests.submit(prompt, &greedy(6)).unwrap();
    }
    while !requests.scheduler.is_done() {
        failures.push(requests.step(&mut backend).failure);
    }
    let problem = "the token 999 is too much".to_owned();
    // Nobody else loses a token, and the next step is as ever.
    assert_eq!(failures[0], Some(problem.clone()));
    assert!(failures[1..].iter().all(Option::is_none));
    assert_eq!(requests.answer(1).finish, Some(Finish::Failed(problem)));
    for request in [0, 2, 3] {
        let alone = &solo(&prompts[request], &greedy(6), &limits(32, 0), 240, vocab(1000))[0];
        compare(requests.answer(request), alone, "solo");
    }
    let stats = requests.scheduler.stats();
    assert_eq!((stats.failed_steps, stats.ended), (1, 4));
    // Nothing of the failed request is cached.
    let again = requests.submit(&prompts[1], &greedy(6)).unwrap();
    requests.finish(&mut backend);
    assert_eq!(requests.answer(again).cached_tokens, 0);
    drop(requests);
    assert_eq!(pool.free_pages(), 60);
}

#[test]
fn a_prompt_of_nan_has_no_log_probabilities() {
    let language = Language { vocab_size: 4, nan: 20 };
    let prompts: Vec<Vec<u32>> =
        (0..400).map(|seed| tokens(seed, 20).iter().map(|id| id % 4).collect()).collect();
    let (mut ended, mut answered) = (0, 0);
    for prompt in prompts {
        let (pool, mut requests, mut backend) = speaking(40, 4, limits(8, 0), language);
        let params = SamplingParams { prompt_logprobs: Some(1), ..greedy(1) };
        let request = requests.submit(&prompt, &params).unwrap();
        requests.finish(&mut backend);
        let is_nan =
            |len: usize| language.logits(prompt[..len].iter().copied()).iter().any(|logit| logit.is_nan());
        let answer = requests.answer(request);
        match (1..=prompt.len()).any(is_nan) {
            true => assert_eq!((&answer.finish, &answer.tokens[..]), (&Some(Finish::NoNumbers), &[][..])),
            false => assert_eq!((answer.tokens.len(), answer.prompt_logprobs.len()), (1, prompt.len() - 1)),
        }
        ended += usize::from(answer.tokens.is_empty());
        answered += answer.tokens.len();
        assert!(requests.scheduler.make_free(pool.num_pages()));
    }
    assert!(ended > 20 && answered > 20, "{ended} {answered}");
}

/// Forks write to copies of pages. A step that fails before copies are made does not
/// lose them.
#[test]
fn copies_outlive_a_failed_step() {
    let mut steps = 0;
    let fails = move |_: &[u32]| {
        steps += 1;
        (steps % 3 == 0).then(|| "it is the third".to_owned())
    };
    let (pool, mut requests, backend) = setup(60, 4, limits(32, 2));
    let mut backend = backend.with_failure(fails);
    let params = SamplingParams { temperature: 1.0, seed: Some(1), n: 2, ..greedy(9) };
    requests.submit(&tokens(1, 6), &params).unwrap();
    requests.finish(&mut backend);
    let alone = solo(&tokens(1, 6), &params, &limits(32, 2), 240, vocab(1000));
    for (choice, alone) in alone.iter().enumerate() {
        let got = &requests.answers[&(0, choice)];
        match got.finish {
            Some(Finish::Failed(_)) => assert_eq!(got.tokens[..], alone.tokens[..got.tokens.len()]),
            _ => compare(got, alone, "solo"),
        }
    }
    assert!(requests.scheduler.stats().failed_steps > 0);
    drop(requests);
    assert_eq!((pool.free_pages(), pool.pending_copies()), (60, 0));
}

#[test]
fn a_backend_that_is_broken_fails_everything_and_loses_nothing() {
    let (pool, mut requests, backend) = setup(60, 4, limits(8, 0));
    let mut backend = backend.with_failure(|_| Some("no device".into()));
    for request in 0..5 {
        requests.submit(&tokens(request, 6), &greedy(6)).unwrap();
    }
    requests.finish(&mut backend);
    for request in 0..5 {
        assert_eq!(requests.answer(request).finish, Some(Finish::Failed("no device".into())));
    }
    assert_eq!(pool.free_pages(), 60);
}
