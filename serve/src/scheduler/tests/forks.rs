//! Several answers to one request.

use super::*;

fn several(n: usize) -> SamplingParams {
    SamplingParams { temperature: 1.0, seed: Some(5), n, ..greedy(9) }
}

#[test]
fn the_prompt_of_several_answers_is_read_once() {
    // The prompt ends within a page, which is copied for each of the others.
    for len in [20, 22] {
        let (pool, mut requests, mut backend) = setup(100, 4, limits(16, 0));
        let prompt = tokens(1, len);
        requests.submit(&prompt, &several(4)).unwrap();
        requests.finish(&mut backend);
        let stats = requests.scheduler.stats();
        // The others compute the last token, for the logits after it.
        assert_eq!((stats.read, stats.saved, stats.recomputed), (len + 3, 3 * (len - 1), 0));
        let alone = solo(&prompt, &several(4), &limits(16, 0), 400, vocab(1000));
        for (choice, alone) in alone.iter().enumerate() {
            compare(&requests.answers[&(0, choice)], alone, "solo");
        }
        // They are answers of their own.
        assert_ne!(alone[0].tokens, alone[1].tokens);
        assert_eq!(pool.used_pages(), len / 4);
    }
}

#[test]
fn several_answers_need_no_more_pages_than_their_own() {
    // The prompt has 5 full pages and a half; each answer has its copy of the half and
    // at most 2 more.
    let (_, mut requests, mut backend) = setup(5 + 4 * 4, 4, limits(32, 0));
    requests.submit(&tokens(1, 22), &several(4)).unwrap();
    requests.finish(&mut backend);
    let stats = requests.scheduler.stats();
    assert_eq!(stats.preemptions, 0);
    assert!(stats.pages <= 5 + 4 * 3, "{stats:?}");
}

#[test]
fn answers_that_do_not_fit_together_come_one_after_the_other() {
    let (pool, mut requests, mut backend) = setup(8, 4, limits(16, 2));
    let prompt = tokens(1, 22);
    requests.submit(&prompt, &several(3)).unwrap();
    requests.finish(&mut backend);
    let alone = solo(&prompt, &several(3), &limits(16, 2), 32, vocab(1000));
    for (choice, alone) in alone.iter().enumerate() {
        compare(&requests.answers[&(0, choice)], alone, "solo");
    }
    drop(requests);
    assert_eq!(pool.free_pages(), 8);
}

#[test]
fn an_answer_that_is_cancelled_leaves_the_others() {
    let (_, mut requests, mut backend) = setup(100, 4, limits(16, 0));
    let prompt = tokens(1, 22);
    requests.submit(&prompt, &several(3)).unwrap();
    // The first reads the prompt, in two parts; it leaves between them.
    requests.step(&mut backend);
    requests.cancel(0, Some(0));
    requests.finish(&mut backend);
    let alone = solo(&prompt, &several(3), &limits(16, 0), 400, vocab(1000));
    assert_eq!(requests.answers[&(0, 0)].finish, Some(Finish::Cancelled));
    for choice in [1, 2] {
        compare(&requests.answers[&(0, choice)], &alone[choice], "solo");
    }
    // The second went on where the first was.
    assert_eq!(requests.answers[&(0, 1)].cached_tokens, 16);
}
