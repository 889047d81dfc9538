//! Requests that leave.

use super::*;

#[test]
fn requests_leave_from_wherever_they_are() {
    let (pool, mut requests, mut backend) = setup(40, 4, limits(8, 0));
    for request in 0..4 {
        requests.submit(&tokens(request, 12), &greedy(10)).unwrap();
    }
    for _ in 0..3 {
        requests.step(&mut backend);
    }
    // One decodes, one reads, two wait.
    let running: Vec<_> = requests.scheduler.running().iter().map(|choice| choice.request.0).collect();
    assert_eq!((running, requests.scheduler.waiting()), (vec![0, 1], 2));
    for request in [0, 1, 3] {
        requests.cancel(request, None);
        // A second time is nothing.
        requests.cancel(request, None);
    }
    assert_eq!((requests.scheduler.running().len(), requests.scheduler.waiting()), (0, 1));
    requests.finish(&mut backend);
    let alone = &solo(&tokens(2, 12), &greedy(10), &limits(8, 0), 160, vocab(1000))[0];
    compare(requests.answer(2), alone, "solo");
    for request in [0, 1, 3] {
        assert_eq!(requests.answer(request).finish, Some(Finish::Cancelled));
    }
    assert_eq!(requests.scheduler.stats().ended, 4);
    requests.cancel(2, None);
    requests.cancel(77, None);
    drop(requests);
    assert_eq!(pool.free_pages(), 40);
}

/// What a request has read stays for others when it leaves.
#[test]
fn what_was_read_is_cached_when_its_request_leaves() {
    let (_, mut requests, mut backend) = setup(40, 4, limits(8, 0));
    let prompt = tokens(1, 24);
    requests.submit(&prompt, &greedy(5)).unwrap();
    requests.step(&mut backend);
    requests.step(&mut backend);
    requests.cancel(0, None);
    requests.submit(&prompt, &greedy(5)).unwrap();
    requests.finish(&mut backend);
    assert_eq!(requests.answer(1).cached_tokens, 16);
    assert_eq!(requests.scheduler.stats().read, 24);
}
