//! Streams of server-sent events.

use std::{collections::VecDeque, convert::Infallible, time::Duration};

use axum::{
    http::{HeaderName, HeaderValue},
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::stream;
use serde::Serialize;

use super::{
    answers::{Answered, Answers},
    types::usage::Usage,
};

/// The event after the last one.
const DONE: &str = "[DONE]";

/// How answers become chunks of a stream.
pub trait Chunks: Send + 'static {
    /// A chunk.
    type Chunk: Serialize;

    /// What is sent of what came.
    fn answered(&mut self, answered: Answered) -> Vec<Self::Chunk>;

    /// A chunk that says what all answers took.
    fn usage(&mut self, usage: Usage) -> Self::Chunk;
}

/// What is still to be sent.
struct Sending<C> {
    answers: Answers,
    chunks: C,
    include_usage: bool,
    ready: VecDeque<Event>,
    done: bool,
}

impl<C: Chunks> Sending<C> {
    async fn next(&mut self) -> Option<Event> {
        while self.ready.is_empty() && !self.done {
            match self.answers.next().await {
                Some(Ok(answered)) => {
                    let chunks = self.chunks.answered(answered);
                    self.ready.extend(chunks.iter().map(event));
                }
                Some(Err(error)) => self.finish(Some(event(&error.body()))),
                None => {
                    let usage = self.include_usage.then(|| self.chunks.usage(self.answers.usage()));
                    self.finish(usage.as_ref().map(event));
                }
            }
        }
        self.ready.pop_front()
    }

    fn finish(&mut self, last: Option<Event>) {
        self.ready.extend(last);
        self.ready.push_back(Event::default().data(DONE));
        self.done = true;
    }
}

/// An event of JSON.
fn event(data: &impl Serialize) -> Event {
    // Chunks have no keys but strings, so this does not fail.
    Event::default().data(serde_json::to_string(data).unwrap_or_default())
}

/// Sends answers while they come: chunks, the usage if it is wanted, and the mark of the end. In
/// silence, a comment is sent now and then.
pub fn response(
    answers: Answers,
    chunks: impl Chunks,
    include_usage: bool,
    keep_alive: Duration,
) -> Response {
    let sending = Sending { answers, chunks, include_usage, ready: VecDeque::new(), done: false };
    let events = stream::unfold(sending, |mut sending| async move {
        let event = sending.next().await?;
        Some((Ok::<_, Infallible>(event), sending))
    });
    let events = Sse::new(events).keep_alive(KeepAlive::new().interval(keep_alive).text("keep-alive"));
    let mut response = events.into_response();
    // Proxies are not to collect what is sent.
    let name = HeaderName::from_static("x-accel-buffering");
    response.headers_mut().insert(name, HeaderValue::from_static("no"));
    response
}
