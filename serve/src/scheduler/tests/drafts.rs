//! Drafts in steps.

use super::*;

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
