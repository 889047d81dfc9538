//! What comes of a request's prompts, all in one.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{
    StreamExt,
    stream::{self, BoxStream, SelectAll},
};

use super::{
    Server,
    error::ApiError,
    log::{Outcome, RequestLog},
    metrics::AnswerTimes,
    types::{chat::StopReason, usage::Usage},
};
use crate::{
    Llm,
    engine::{End, Event, Events},
    request::{Finish, Request},
    sampling::InvalidParameter,
    scheduler::Token,
};

/// The answers to several prompts while they come. Dropping it cancels those that have not ended.
pub struct Answers {
    server: Arc<Server>,
    log: Arc<RequestLog>,
    events: SelectAll<BoxStream<'static, (usize, Event)>>,
    /// The answers to each prompt.
    n: usize,
    /// Tokens of the prompts that were not read yet.
    unread: Vec<Option<usize>>,
    choices: Vec<Choice>,
    usage: Usage,
    /// When the engine was given them.
    submitted: Instant,
    first_token: Option<Duration>,
}

/// What is measured of an answer.
#[derive(Clone, Debug, Default)]
struct Choice {
    tokens: usize,
    first: Option<Instant>,
    last: Option<Instant>,
    finish: Option<&'static str>,
}

/// What came of one of the answers.
pub struct Answered {
    /// Its number: answers to one prompt follow each other.
    pub choice: usize,
    pub event: Event,
}

/// Refuses more answers to one request than may ever wait.
pub fn check_count(llm: &Llm, choices: usize) -> Result<(), ApiError> {
    let most = llm.engine().config().max_queued;
    if choices > most {
        let expected = format!("at most {most}, which is all that may wait");
        return Err(InvalidParameter { name: "n", given: format!("{choices} in all"), expected }.into());
    }
    Ok(())
}

impl Answers {
    /// Gives requests to the engine, all with the same parameters: all of them, or none.
    ///
    /// # Errors
    /// One could never be answered, or the queue is full.
    pub fn submit(
        server: &Arc<Server>,
        log: &Arc<RequestLog>,
        requests: Vec<Request>,
    ) -> Result<Self, ApiError> {
        let llm = server.llm()?;
        let engine = llm.engine();
        let choices = requests.iter().map(|request| request.params.n).fold(0, usize::saturating_add);
        check_count(llm, choices)?;
        let n = requests.first().map_or(1, |request| request.params.n);
        requests.iter().for_each(|request| server.metrics.asked(&request.params));
        let unread = requests.iter().map(|request| Some(request.prompt.len())).collect();
        let submitted = Instant::now();
        // Those that were taken are cancelled if one is not.
        let submit = |request| engine.submit(request);
        let events = requests.into_iter().map(submit).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            server: server.clone(),
            log: log.clone(),
            events: events.into_iter().enumerate().map(|(prompt, events)| stream(prompt, events)).collect(),
            n,
            unread,
            choices: vec![Choice::default(); choices],
            usage: Usage::default(),
            submitted,
            first_token: None,
        })
    }

    /// The number of answers.
    pub fn len(&self) -> usize {
        self.choices.len()
    }

    /// What all answers took that have ended.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// What comes next; `None` once all answers have ended.
    ///
    /// # Errors
    /// An answer failed. None of the others is of use then.
    pub async fn next(&mut self) -> Option<Result<Answered, ApiError>> {
        let (prompt, event) = self.events.next().await?;
        let choice = prompt * self.n + event.choice;
        self.measure(choice, &event);
        if let Some(Finish::NoNumbers | Finish::Failed(_) | Finish::Cancelled) =
            event.end.as_ref().map(|end| &end.finish)
        {
            return Some(Err(ApiError::internal()));
        }
        Some(Ok(Answered { choice, event }))
    }

    fn measure(&mut self, choice: usize, event: &Event) {
        let (now, metrics, begin) = (Instant::now(), &self.server.metrics, self.log.begin());
        let (prompt, first) = (choice / self.n, choice.is_multiple_of(self.n));
        let choice = &mut self.choices[choice];
        let further = match &event.end {
            Some(end) => end.usage.completion_tokens - choice.tokens,
            None => event.tokens.len(),
        };
        if further > 0 {
            if self.first_token.is_none() {
                let took = now - begin;
                self.first_token = Some(took);
                metrics.first_token(took);
            }
            if let Some(tokens) = self.unread[prompt].take() {
                metrics.read(tokens);
            }
            if let Some(last) = choice.last {
                metrics.further_tokens(now - last, further);
            }
            metrics.generated(further);
            choice.tokens += further;
            choice.first.get_or_insert(now);
            choice.last = Some(now);
        }
        let Some(End { finish, usage, started }) = &event.end else { return };
        if let Finish::NoNumbers | Finish::Failed(_) = finish {
            tracing::error!(request_id = self.log.id(), reason = %finish, "an answer failed");
        }
        choice.finish = Some(finish.reason());
        self.usage.add(usage, first);
        let started = started.unwrap_or(now);
        let (first, last) = (choice.first.unwrap_or(now), choice.last.unwrap_or(now));
        let times = AnswerTimes {
            all: now - begin,
            queued: started - self.submitted,
            prefill: first - started,
            decode: last - first,
        };
        metrics.ended(finish.reason(), usage.completion_tokens, &times);
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        for choice in self.choices.iter_mut().filter(|choice| choice.finish.is_none()) {
            choice.finish = Some(Finish::Cancelled.reason());
            self.server.metrics.finished(Finish::Cancelled.reason());
        }
        let mut usage = self.usage;
        usage.completion_tokens = self.choices.iter().map(|choice| choice.tokens).sum();
        self.log.note(Outcome {
            usage,
            first_token: self.first_token,
            finish: self.choices.iter().filter_map(|choice| choice.finish).collect(),
        });
    }
}

fn stream(prompt: usize, events: Events) -> BoxStream<'static, (usize, Event)> {
    stream::unfold(events, move |mut events| async move {
        let event = events.recv().await?;
        Some(((prompt, event), events))
    })
    .boxed()
}

/// The ids of tokens.
pub fn ids(tokens: &[Token]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}

/// What ended an answer, if it was not the model.
pub fn stop_reason(finish: &Finish) -> Option<StopReason> {
    match finish {
        Finish::StopString(stop) => Some(StopReason::Text(stop.clone())),
        Finish::StopToken(token) => Some(StopReason::Token(*token)),
        _ => None,
    }
}
