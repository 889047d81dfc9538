//! The way back under many schedules of threads: its own source, with locks and channels that try them.
//! A schedule in which somebody waits for ever is an error.

use async_channel::Receiver;
use shuttle::future::block_on;

use self::{
    sync::{Arc, mpsc, thread},
    waiting::{MAX_STEPS, Waiting},
};
use crate::{
    request::{Finish, RequestId},
    scheduler::{Token, Update},
};

#[expect(clippy::duplicate_mod, reason = "with other locks and channels")]
#[path = "../waiting.rs"]
mod waiting;

/// In the place of the engine's.
mod sync {
    pub use shuttle::{
        sync::{Arc, Mutex, MutexGuard, mpsc},
        thread,
    };
    pub use std::sync::PoisonError;
}

const SCHEDULES: usize = 2_000;

fn update(id: u64, finish: Option<Finish>) -> Update {
    Update {
        request: RequestId(id),
        choice: 0,
        token: Some(Token { id: id as u32, logprobs: None }),
        finish,
        cached_tokens: 0,
        started: None,
        prompt_logprobs: Vec::new(),
    }
}

/// Takes all that comes until the end, or until nothing can come any more.
fn listen(id: u64, updates: &Receiver<Update>) -> Option<Finish> {
    while let Ok(update) = block_on(updates.recv()) {
        assert_eq!((update.request, update.token.unwrap().id), (RequestId(id), id as u32));
        if update.finish.is_some() {
            assert!(block_on(updates.recv()).is_err(), "an update after the end");
            return update.finish;
        }
    }
    None
}

/// An engine that takes so many commands and dies: each gets a token, and then its end.
fn engine(commands: mpsc::Receiver<u64>, updates: mpsc::SyncSender<Vec<Update>>, takes: usize) {
    for id in commands.iter().take(takes) {
        for finish in [None, Some(Finish::MaxTokens)] {
            let _ = updates.send(vec![update(id, finish)]);
        }
    }
    // As `Worker::run`: nothing can be asked any more, before those who wait hear that nothing comes.
    drop(commands);
}

#[test]
fn every_caller_hears_an_end_or_that_none_comes() {
    shuttle::check_random(
        || {
            const CALLERS: u64 = 3;
            let waiting = Arc::<Waiting>::default();
            let (updates, steps) = mpsc::sync_channel(2);
            let hands_out = waiting.hand_out(steps).unwrap();
            let (commands, receiver) = mpsc::sync_channel(1);
            let engine = thread::spawn(move || engine(receiver, updates, 2));
            let callers: Vec<_> = (0..CALLERS)
                .map(|id| {
                    let (waiting, commands) = (waiting.clone(), commands.clone());
                    thread::spawn(move || {
                        let updates = waiting.add(RequestId(id), 1);
                        commands.send(id).is_ok().then(|| listen(id, &updates))
                    })
                })
                .collect();
            let heard: Vec<_> = callers.into_iter().map(|caller| caller.join().unwrap()).collect();
            engine.join().unwrap();
            hands_out.join().unwrap();
            // Two were taken; the third was refused, or hears that the engine is gone.
            let ended = heard.iter().filter(|heard| **heard == Some(Some(Finish::MaxTokens))).count();
            assert_eq!(ended, 2, "{heard:?}");
        },
        SCHEDULES,
    );
}

#[test]
fn a_cancellation_is_sent_once_whoever_asks_for_it() {
    shuttle::check_random(
        || {
            let waiting = Arc::<Waiting>::default();
            let (updates, steps) = mpsc::sync_channel(MAX_STEPS);
            let hands_out = waiting.hand_out(steps).unwrap();
            let (mine, other) = (waiting.add(RequestId(0), 1), waiting.add(RequestId(1), 1));
            let cancel = |choice| {
                let waiting = waiting.clone();
                thread::spawn(move || waiting.cancel(RequestId(0), choice))
            };
            let cancelling = [cancel(None), cancel(None), cancel(Some(0))];
            let engine = thread::spawn(move || {
                updates.send(vec![update(0, None), update(1, None)]).unwrap();
                updates.send(vec![update(0, Some(Finish::Cancelled)), update(1, None)]).unwrap();
                updates.send(vec![update(1, Some(Finish::MaxTokens))]).unwrap();
            });
            assert_eq!(listen(0, &mine), Some(Finish::Cancelled));
            assert_eq!(listen(1, &other), Some(Finish::MaxTokens), "of the other request nothing is lost");
            engine.join().unwrap();
            hands_out.join().unwrap();
            let [all, again, _] = cancelling.map(|thread| thread.join().unwrap());
            assert!(!(all && again), "sent twice");
            assert!(!waiting.cancel(RequestId(0), None));
        },
        SCHEDULES,
    );
}

#[test]
fn nobody_waits_for_an_engine_that_dies_while_they_ask() {
    shuttle::check_random(
        || {
            let waiting = Arc::<Waiting>::default();
            let (updates, steps) = mpsc::sync_channel(2);
            let hands_out = waiting.hand_out(steps).unwrap();
            let (commands, receiver) = mpsc::sync_channel(4);
            let dying = thread::spawn(move || engine(receiver, updates, 0));
            let updates = waiting.add(RequestId(7), 2);
            if commands.send(7).is_ok() {
                assert_eq!(listen(7, &updates), None);
            }
            dying.join().unwrap();
            hands_out.join().unwrap();
        },
        SCHEDULES,
    );
}
