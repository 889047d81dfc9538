//! What comes of a request, as text. This runs where it is asked for, not on the
//! engine's thread.

use std::{collections::VecDeque, mem, sync::Arc, time::Instant};

use async_channel::Receiver;

use super::{Cancel, Shared};
use crate::{
    backend::Logprobs,
    request::{Finish, Request, RequestId, Usage},
    scheduler::{Token, Update},
    text::{Stops, Stream, Text},
};

/// What came of one of the answers to a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Which answer, below [`n`](crate::sampling::SamplingParams::n).
    pub choice: usize,
    /// The text that follows what came before: whole characters, and nothing of a stop
    /// string. Often empty.
    pub text: String,
    /// The tokens whose text this is, or begins with this. Those of a stop string never
    /// come.
    pub tokens: Vec<Token>,
    /// How likely the prompt's tokens were, but for the first: once, of the first answer, where it
    /// is asked for.
    pub prompt_logprobs: Vec<Logprobs>,
    /// How the answer ended: its last event.
    pub end: Option<End>,
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// Why.
    pub finish: Finish,
    /// What it took.
    pub usage: Usage,
    /// When the engine began with it; `None` if it only waited.
    pub started: Option<Instant>,
}

/// The answers to a request while they come.
///
/// As an iterator it waits for each event, and in a task of any runtime
/// [`recv`](Self::recv) does. It ends after the last event of the last answer; each
/// answer has exactly one event with an [`End`], also when the engine dies. Dropping it
/// cancels what has not ended.
///
/// At most one event for each token waits here to be taken.
pub struct Events {
    id: RequestId,
    prompt_tokens: usize,
    answers: Vec<Answer>,
    open: usize,
    updates: Receiver<Update>,
    cancel: Cancel,
    shared: Arc<Shared>,
    ready: VecDeque<Event>,
}

/// An answer on its way to text.
struct Answer {
    /// `None` once it has ended.
    stream: Option<Stream>,
    stops: Stops,
    min_tokens: usize,
    tokens: usize,
    cached_tokens: usize,
    started: Option<Instant>,
    /// What is said of the prompt's tokens with the next event.
    prompt_logprobs: Vec<Logprobs>,
    /// Bytes of text that were made of tokens, those held back included.
    made: usize,
    /// Bytes of text that went out.
    out: usize,
    /// Tokens that did not go out, and where the text of each begins.
    held: VecDeque<(usize, Token)>,
}

impl Answer {
    fn new(text: &Arc<Text>, request: &Request) -> Self {
        let params = &request.params;
        let mut stream = text.stream().showing(request.shown.clone());
        if request.grammar.is_some() {
            stream = stream.with_first_space();
        }
        Self {
            stream: Some(stream),
            stops: Stops::new(params.stop.clone()),
            min_tokens: params.min_tokens,
            tokens: 0,
            cached_tokens: 0,
            started: None,
            prompt_logprobs: Vec::new(),
            made: 0,
            out: 0,
            held: VecDeque::new(),
        }
    }

    /// Takes a piece of text, and gives what can go out and whether a stop string came.
    fn piece(&mut self, piece: &str) -> (String, Option<String>) {
        self.made += piece.len();
        // Before there are enough tokens, nothing ends the answer.
        match self.tokens <= self.min_tokens && self.min_tokens > 0 {
            true => (piece.to_owned(), None),
            false => self.stops.push(piece),
        }
    }

    /// The tokens whose text goes out now, at least its beginning; `all` if what follows
    /// is not part of a stop string.
    fn release(&mut self, text: &str, all: bool) -> Vec<Token> {
        self.out += text.len();
        let goes = |(begins, _): &(usize, Token)| all || *begins < self.out;
        let count = self.held.iter().take_while(|held| goes(held)).count();
        self.held.drain(..count).map(|(_, token)| token).collect()
    }
}

impl Events {
    pub(super) fn new(
        id: RequestId,
        request: &Request,
        text: &Arc<Text>,
        updates: Receiver<Update>,
        cancel: Cancel,
        shared: Arc<Shared>,
    ) -> Self {
        let n = request.params.n;
        Self {
            id,
            prompt_tokens: request.prompt.len(),
            answers: (0..n).map(|_| Answer::new(text, request)).collect(),
            open: n,
            updates,
            cancel,
            shared,
            ready: VecDeque::new(),
        }
    }

    /// The request's number, for [`Engine::cancel`](super::Engine::cancel).
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// How many answers there are to be.
    pub fn choices(&self) -> usize {
        self.answers.len()
    }

    /// The next event, as soon as it is there; `None` after the last.
    pub async fn recv(&mut self) -> Option<Event> {
        while self.ready.is_empty() && self.open > 0 {
            let update = self.updates.recv().await;
            self.take(update.ok());
        }
        self.ready.pop_front()
    }

    /// Takes an update; without one the engine is gone.
    fn take(&mut self, update: Option<Update>) {
        let Some(update) = update else {
            let reason = self.shared.reason();
            for choice in 0..self.answers.len() {
                self.end(choice, Vec::new(), String::new(), Finish::Failed(reason.clone()));
            }
            return;
        };
        let Update { choice, token, mut finish, cached_tokens, started, prompt_logprobs, .. } = update;
        let answer = &mut self.answers[choice];
        answer.prompt_logprobs.extend(prompt_logprobs);
        (answer.cached_tokens, answer.started) = (cached_tokens, started);
        let Some(stream) = &mut answer.stream else { return };
        let (mut text, mut stop) = (String::new(), None);
        if let Some(token) = token {
            answer.tokens += 1;
            let hidden = finish.as_ref().is_some_and(Finish::hides_last_token);
            let piece = if hidden { String::new() } else { stream.push(token.id) };
            if !hidden {
                answer.held.push_back((answer.made, token));
            }
            (text, stop) = answer.piece(&piece);
            if let Some(stop) = stop.clone() {
                if finish.is_none() {
                    self.cancel.send(self.id, Some(choice));
                }
                finish = Some(Finish::StopString(stop));
            }
        }
        let all = stop.is_none() && answer.stops.held() == 0;
        let tokens = answer.release(&text, all);
        match finish {
            Some(finish) => self.end(choice, tokens, text, finish),
            None => {
                let prompt_logprobs = mem::take(&mut answer.prompt_logprobs);
                self.ready.push_back(Event { choice, text, tokens, prompt_logprobs, end: None });
            }
        }
    }

    /// Makes the last event of an answer, if there was none, with what was held back.
    fn end(&mut self, choice: usize, mut tokens: Vec<Token>, mut text: String, mut finish: Finish) {
        let answer = &mut self.answers[choice];
        let Some(stream) = answer.stream.take() else { return };
        if !matches!(finish, Finish::StopString(_)) {
            let (mut rest, stop) = answer.piece(&stream.finish());
            match stop.clone() {
                Some(stop) => finish = Finish::StopString(stop),
                None => rest += &answer.stops.finish(),
            }
            tokens.extend(answer.release(&rest, stop.is_none()));
            text += &rest;
        }
        self.open -= 1;
        let usage = Usage {
            prompt_tokens: self.prompt_tokens,
            cached_tokens: answer.cached_tokens,
            completion_tokens: answer.tokens,
        };
        let end = End { finish, usage, started: answer.started };
        let prompt_logprobs = mem::take(&mut answer.prompt_logprobs);
        self.ready.push_back(Event { choice, text, tokens, prompt_logprobs, end: Some(end) });
    }
}

impl Iterator for Events {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        while self.ready.is_empty() && self.open > 0 {
            let update = self.updates.recv_blocking();
            self.take(update.ok());
        }
        self.ready.pop_front()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if self.open > 0 {
            self.cancel.send(self.id, None);
        }
    }
}
