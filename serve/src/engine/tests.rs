//! The engine on the simulated backend, whose tokens are the bytes of ASCII.

mod endurance;
mod schedules;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    testing::{ASCII, Gate},
    *,
};
use crate::{
    backend::{
        Backend, sampler,
        simulated::{Language, Simulated},
    },
    request::{Finish, Usage},
    sampling::SamplingParams,
    scheduler::{Choice, testing::greedy},
    tests::bytes,
};

fn limits() -> Limits {
    Limits { step_tokens: 32, chunk_tokens: 32, max_running: 16, context: 400, draft: 0, ends: [0].into() }
}

fn config() -> EngineConfig {
    EngineConfig { page_size: 4, num_pages: 400, ..EngineConfig::new(limits()) }
}

/// An engine on a backend that `change` makes of the simulated one.
fn start<B: Backend + 'static>(
    config: EngineConfig,
    change: impl FnOnce(Simulated) -> B + Send + 'static,
) -> Engine {
    let load = |pool: &PageAllocator, limits: &mut Limits| {
        Ok(change(Simulated::new(pool, limits.step_capacity(), ASCII)))
    };
    Engine::start(config, bytes::text("gpt-2"), load).unwrap()
}

fn request(prompt: &str, params: &SamplingParams) -> Request {
    Request::new(prompt.bytes().map(u32::from).collect(), params.clone())
}

fn seeded(seed: u64, max_tokens: usize) -> SamplingParams {
    SamplingParams { temperature: 1.0, seed: Some(seed), ..greedy(max_tokens) }
}

/// The tokens that a request is answered when it is alone, and why they end.
fn solo(request: &Request) -> (Vec<u32>, Finish) {
    let mut choice = Choice::of(RequestId(0), request.clone(), &limits()).next().unwrap();
    while choice.finish().is_none() {
        let logits = ASCII.logits(choice.tokens().iter().copied());
        let samples = sampler::sample(&choice.outputs(0, &[]), &logits, ASCII.vocab_size).unwrap();
        choice.push(samples[0].token.unwrap(), &limits(), 1600);
    }
    (choice.answer().to_vec(), choice.finish().cloned().unwrap())
}

/// The text of tokens.
fn text(tokens: &[u32]) -> String {
    tokens.iter().map(|&token| char::from(token as u8)).collect()
}

/// The text, tokens and end of the first answer.
fn collect(events: impl Iterator<Item = Event>) -> (String, Vec<u32>, End) {
    let (mut text, mut tokens, mut end) = (String::new(), Vec::new(), None);
    for event in events.filter(|event| event.choice == 0) {
        assert!(end.is_none(), "an event after the end: {event:?}");
        text += &event.text;
        tokens.extend(event.tokens.iter().map(|token| token.id));
        end = event.end;
    }
    (text, tokens, end.expect("an end"))
}

/// Waits until an engine's status is as it should be.
fn until(engine: &Engine, what: impl Fn(&Status) -> bool) -> Status {
    let begin = Instant::now();
    loop {
        let status = engine.status();
        if what(&status) {
            return status;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{status:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn requests_of_many_threads_are_answered_as_if_each_were_alone() {
    let engine = start(config(), |backend| backend);
    thread::scope(|scope| {
        for caller in 0..8 {
            let engine = &engine;
            scope.spawn(move || {
                for number in 0..20 {
                    let params = if number % 2 == 0 { greedy(12) } else { seeded(caller * 100 + number, 12) };
                    let request = request(&format!("shared words {caller} {number}"), &params);
                    let (tokens, finish) = solo(&request);
                    let (got, ids, end) = collect(engine.submit(request.clone()).unwrap());
                    let shown = tokens.len() - usize::from(finish.hides_last_token());
                    assert_eq!((got, &ids[..]), (text(&tokens[..shown]), &tokens[..shown]));
                    assert_eq!(end.finish, finish);
                    let Usage { prompt_tokens, cached_tokens, completion_tokens } = end.usage;
                    assert_eq!((prompt_tokens, completion_tokens), (request.prompt.len(), tokens.len()));
                    assert!(cached_tokens < prompt_tokens);
                }
            });
        }
    });
    let status = until(&engine, |status| status.stats.ended == 160);
    assert_eq!((status.running, status.waiting, status.answered), (0, 0, 160));
    assert_eq!(status.health, Health::Well);
    assert!(status.stats.saved > 0 && status.time_to_first_token > Duration::ZERO, "{status:?}");
}

#[test]
fn several_answers_come_as_choices_of_one_request() {
    let engine = start(config(), |backend| backend);
    let params = SamplingParams { n: 3, logprobs: Some(2), ..seeded(1, 20) };
    let mut texts = [const { String::new() }; 3];
    let mut ends = 0;
    for event in engine.submit(request("several", &params)).unwrap() {
        assert!(event.tokens.iter().all(|token| token.logprobs.as_ref().unwrap().top.len() == 2));
        texts[event.choice] += &event.text;
        ends += usize::from(event.end.is_some());
    }
    assert_eq!(ends, 3);
    assert!(texts[0] != texts[1] && texts[1] != texts[2]);
    let alone = solo(&request("several", &params)).0;
    assert!(text(&alone).starts_with(&texts[0]));
}

#[test]
fn stop_strings_end_answers_and_are_never_shown() {
    let engine = start(config(), |backend| backend);
    // Without the end token, so that all answers are long.
    let long = SamplingParams { ignore_eos: true, ..seeded(7, 60) };
    let all = text(&solo(&request("stop", &long)).0);
    // Each is split over several tokens.
    for stop in [&all[30..31], &all[30..33], &all[20..28]] {
        let at = all.find(stop).unwrap();
        let params = SamplingParams { stop: vec!["no such text".into(), stop.into()], ..long.clone() };
        let (got, tokens, end) = collect(engine.submit(request("stop", &params)).unwrap());
        assert_eq!((got.as_str(), text(&tokens)), (&all[..at], all[..at].to_owned()));
        assert_eq!(end.finish, Finish::StopString(stop.to_owned()));
        assert_eq!(end.usage.completion_tokens, at + stop.len());
        assert_eq!(end.finish.reason(), "stop");
    }
    // The beginning of one at the end is shown.
    let params = SamplingParams { stop: vec![format!("{}~never", &all[58..])], ..long.clone() };
    let (got, _, end) = collect(engine.submit(request("stop", &params)).unwrap());
    assert_eq!((got, end.finish), (all.clone(), Finish::MaxTokens));
    // What comes before there are enough tokens ends nothing.
    let stop = all[2..4].to_owned();
    let params = SamplingParams { stop: vec![stop.clone()], min_tokens: 10, ..long };
    let (got, ..) = collect(engine.submit(request("stop", &params)).unwrap());
    let rest = all[10..].find(&stop).map_or(all.len(), |at| 10 + at);
    assert_eq!(got, all[..rest]);
    // The engine has stopped, too.
    until(&engine, |status| status.running + status.waiting == 0);
}

#[test]
fn requests_that_are_cancelled_or_dropped_end_within_a_step() {
    let engine = start(config(), |backend| backend);
    let endless = SamplingParams { ignore_eos: true, ..greedy(390) };
    let mut cancelled = engine.submit(request("one", &endless)).unwrap();
    let mut dropped = engine.submit(request("two", &endless)).unwrap();
    assert!(cancelled.next().is_some() && dropped.next().is_some());
    engine.cancel(cancelled.id());
    drop(dropped);
    let (_, _, end) = collect(cancelled);
    assert_eq!((end.finish.reason(), end.finish), ("abort", Finish::Cancelled));
    let status = until(&engine, |status| status.stats.ended == 2);
    assert_eq!((status.running, status.waiting), (0, 0));
    assert!(status.stats.decoded < 700, "{status:?}");
    // Of no request, or one that has ended.
    engine.cancel(RequestId(99));
    collect(engine.submit(request("three", &greedy(3))).unwrap());
}

#[test]
fn the_queue_is_bounded_by_answers_and_by_tokens() {
    let gate = Gate::default();
    let at = gate.clone();
    let config = EngineConfig { max_queued: 4, max_queued_tokens: 100, ..config() };
    let engine = start(config, move |backend| at.before(backend));
    let submit =
        |len: usize, n: usize| engine.submit(request(&"x".repeat(len), &SamplingParams { n, ..greedy(2) }));
    let refused = |len, n| submit(len, n).err().expect("a full queue").to_string();
    // One that is alone is taken, however long it is.
    let long = submit(300, 1).unwrap();
    let text = refused(10, 1);
    assert!(text.contains("1 answers to prompts of 300 tokens") && text.contains("4 and 100"), "{text}");
    until(&engine, |status| status.step_since.is_some());
    gate.open();
    collect(long);
    let waiting: Vec<_> = [submit(20, 3), submit(60, 1)].into_iter().map(Result::unwrap).collect();
    drop(waiting);
    assert!(refused(20, 5).contains("n is 5; expected at most 4"));
    let status = until(&engine, |status| status.running + status.waiting == 0 && status.stats.ended == 5);
    assert_eq!(status.step_since, None);
    collect(submit(20, 4).unwrap());
}

#[test]
fn what_can_never_be_answered_is_refused_when_it_comes() {
    let engine = start(EngineConfig { num_pages: 50, ..config() }, |backend| backend);
    let refused = |request: Request| engine.submit(request).err().expect("an error").to_string();
    assert!(refused(request("", &greedy(1))).contains("the prompt is empty"));
    let text = refused(request(&"x".repeat(200), &greedy(1)));
    assert!(text.contains("200 tokens, and the cache holds 200"), "{text}");
    let text = refused(request(&"x".repeat(400), &greedy(1)));
    assert!(text.contains("400 tokens, and the model's context 400"), "{text}");
    let params = SamplingParams { top_p: 7.0, ..greedy(1) };
    assert!(refused(request("x", &params)).contains("top_p is 7"));
    let unknown = Request::new(vec![128], greedy(1));
    assert!(refused(unknown).contains("the token 128"));
    assert_eq!(engine.status(), Status::default());
}

#[test]
fn a_request_that_cannot_be_computed_does_not_make_the_engine_unwell() {
    // The token of `!` cannot be computed.
    let engine = start(config(), |backend| {
        backend.with_failure(|tokens| tokens.contains(&33).then(|| "no `!`".into()))
    });
    let params = SamplingParams { logit_bias: [(33, -100.0)].into(), ..greedy(5) };
    let (_, _, end) = collect(engine.submit(request("a!", &params)).unwrap());
    assert_eq!(end.finish, Finish::Failed("no `!`".into()));
    let (got, ..) = collect(engine.submit(request("a", &params)).unwrap());
    let (tokens, finish) = solo(&request("a", &params));
    assert_eq!(got, text(&tokens[..tokens.len() - usize::from(finish.hides_last_token())]));
    assert_eq!(engine.status().health, Health::Well);
    assert_eq!(engine.status().stats.failed_steps, 1);
}

#[test]
fn an_engine_that_computes_nothing_is_unwell_until_it_does() {
    let broken = Arc::new(AtomicBool::new(true));
    let is_broken = broken.clone();
    let engine = start(config(), move |backend| {
        backend.with_failure(move |_| is_broken.load(Ordering::Relaxed).then(|| "no device".into()))
    });
    assert_eq!(engine.status().health, Health::Well);
    let requests: Vec<_> = (0..3).map(|_| engine.submit(request("x", &greedy(5))).unwrap()).collect();
    for events in requests {
        assert_eq!(collect(events).2.finish, Finish::Failed("no device".into()));
    }
    let unwell = until(&engine, |status| status.health == Health::Unwell("no device".into()));
    assert!(unwell.unwell_since.is_some());
    // It finds out by itself, as nobody may ask it anything any more.
    broken.store(false, Ordering::Relaxed);
    let well = until(&engine, |status| status.health == Health::Well);
    assert_eq!(well.unwell_since, None);
    assert_eq!(collect(engine.submit(request("x", &greedy(5))).unwrap()).2.usage.prompt_tokens, 1);
    let used = until(&engine, |status| status.running == 0).used_pages;
    assert!(used <= 2, "{used} pages");
}

#[test]
fn a_dead_engine_gives_errors_to_all() {
    let gate = Gate::default();
    let at = gate.clone();
    let engine = start(config(), move |backend| {
        let mut steps = 0;
        let gate = at.clone();
        backend.with_failure(move |_| {
            gate.pass();
            steps += 1;
            assert!(steps < 3, "a fault of the backend");
            None
        })
    });
    let params = SamplingParams { ignore_eos: true, n: 2, ..greedy(50) };
    let requests: Vec<_> = (0..3).map(|_| engine.submit(request("x", &params)).unwrap()).collect();
    gate.open();
    for events in requests {
        let mut ends = 0;
        for end in events.filter_map(|event| event.end) {
            let Finish::Failed(reason) = end.finish else { panic!("{end:?}") };
            assert!(reason.contains("panicked: a fault of the backend"), "{reason}");
            ends += 1;
        }
        assert_eq!(ends, 2);
    }
    let Health::Dead(reason) = engine.status().health else { panic!("{:?}", engine.status()) };
    assert!(reason.contains("a fault of the backend"), "{reason}");
    let error = engine.submit(request("x", &params)).err().expect("an error");
    assert!(matches!(&error, SubmitError::Dead(reason) if reason.contains("a fault")), "{error}");
    engine.cancel(RequestId(0));
}

#[test]
fn an_engine_that_is_dropped_ends_what_is_open() {
    let engine = start(config(), |backend| backend);
    let endless = SamplingParams { ignore_eos: true, ..greedy(390) };
    let requests: Vec<_> = (0..20).map(|_| engine.submit(request("x", &endless)).unwrap()).collect();
    drop(engine);
    for events in requests {
        let (_, _, end) = collect(events);
        if end.finish != Finish::MaxTokens {
            assert_eq!(end.finish, Finish::Failed("it was shut down".into()));
        }
    }
}

#[test]
fn an_engine_that_cannot_be_loaded_does_not_start() {
    let load = |result: fn() -> Result<Simulated>| {
        let engine =
            Engine::start(config(), bytes::text("gpt-2"), move |_: &PageAllocator, _: &mut Limits| result());
        engine.err().expect("no engine").to_string()
    };
    assert_eq!(load(|| Err("no weights".into())), "no weights");
    assert!(load(|| panic!("no device")).contains("panicked: no device"));
    let zero = EngineConfig { max_queued: 0, ..config() };
    let never = |_: &PageAllocator, _: &mut Limits| -> Result<Simulated> { unreachable!() };
    let error = Engine::start(zero, bytes::text("gpt-2"), never).err().expect("no engine").to_string();
    assert_eq!(error, "max_queued is 0; expected at least 1");
}

/// Events can be waited for by a task, without a runtime of the engine's.
#[test]
fn events_can_be_awaited() {
    use std::{
        pin::pin,
        task::{Context, Poll, Wake, Waker},
    };
    struct Unpark(thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let engine = start(config(), |backend| backend);
    let params = seeded(3, 9);
    let mut events = engine.submit(request("task", &params)).unwrap();
    let all = async {
        let mut all = Vec::new();
        while let Some(event) = events.recv().await {
            all.push(event);
        }
        all
    };
    let (mut all, waker) = (pin!(all), Waker::from(Arc::new(Unpark(thread::current()))));
    let all = loop {
        match all.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(all) => break all,
            Poll::Pending => thread::park_timeout(Duration::from_secs(60)),
        }
    };
    let (got, ..) = collect(all.into_iter());
    let (tokens, finish) = solo(&request("task", &params));
    assert_eq!(got, text(&tokens[..tokens.len() - usize::from(finish.hides_last_token())]));
}

/// A caller that does not take its events holds nobody up.
#[test]
fn slow_callers_hold_nobody_up() {
    let engine = start(config(), |backend| backend);
    let long = SamplingParams { ignore_eos: true, ..greedy(300) };
    let slow = engine.submit(request("slow", &long)).unwrap();
    let (sender, receiver) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (got, ..) = collect(engine.submit(request("fast", &greedy(20))).unwrap());
            sender.send(got).unwrap();
        });
        let got = receiver.recv_timeout(Duration::from_secs(60));
        assert_ne!(got, Err(RecvTimeoutError::Timeout));
    });
    until(&engine, |status| status.running == 0);
    assert_eq!(collect(slow).1.len(), 300);
}

#[test]
fn a_step_that_hangs_does_not_hold_up_who_drops_the_engine() {
    let gate = Gate::default();
    let at_gate = gate.clone();
    let timeout = Duration::from_millis(200);
    let engine = start(EngineConfig { shutdown_timeout: timeout, ..config() }, move |it| at_gate.before(it));
    let mut events = engine.submit(request("abc", &greedy(2))).unwrap();
    let since = until(&engine, |status| status.step_since.is_some()).step_since.unwrap();
    assert!(since.elapsed() < Duration::from_secs(60));
    let begin = Instant::now();
    drop(engine);
    assert!(begin.elapsed() >= timeout && begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    // Whoever waits hears of the end when the step is over at last.
    gate.open();
    let end = events.by_ref().find_map(|event| event.end).unwrap();
    assert_eq!(end.finish, Finish::Failed("it was shut down".into()));
    assert!(events.next().is_none());
}

#[test]
fn the_queue_has_room_for_all_cancellations() {
    let gate = Gate::default();
    let at = gate.clone();
    let engine = start(EngineConfig { max_queued: 4, ..config() }, move |backend| at.before(backend));
    let requests: Vec<_> = (0..4).map(|_| engine.submit(request("x", &greedy(9))).unwrap()).collect();
    until(&engine, |status| status.step_since.is_some());
    for _ in 0..1000 {
        requests.iter().for_each(|events| engine.cancel(events.id()));
    }
    gate.open();
    assert!(requests.into_iter().all(|events| collect(events).2.finish == Finish::Cancelled));
}
