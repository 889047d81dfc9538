//! A line of the log for each request, and the id that it shares with the answer.

use std::{
    io::{self, IsTerminal},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue},
    middleware::Next,
    response::Response,
};
use clap::ValueEnum;
use http_body::{Body as _, Frame, SizeHint};
use tracing_subscriber::{filter::LevelFilter, fmt, prelude::*};

use super::{Server, life::Active, types::usage::Usage};

/// The header of a request's id.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Paths that are asked again and again, of which only failures are logged.
const PROBES: [&str; 3] = ["/health", "/ready", "/metrics"];
/// The longest id that is taken from a request.
const MAX_ID: usize = 128;

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people
    #[default]
    Text,
    /// Lines of JSON
    Json,
}

impl LogFormat {
    /// Has the process write its log to the standard error.
    ///
    /// # Errors
    /// It has a log already.
    pub fn install(self) -> crate::Result<()> {
        let registry = tracing_subscriber::registry().with(LevelFilter::INFO);
        let colours = io::stderr().is_terminal();
        let layer = fmt::layer().with_writer(io::stderr).with_target(false).with_ansi(colours);
        match self {
            Self::Text => registry.with(layer).try_init()?,
            Self::Json => registry.with(layer.json().flatten_event(true)).try_init()?,
        }
        Ok(())
    }
}

/// What is logged of a request when it has ended.
pub struct RequestLog {
    id: String,
    begin: Instant,
    outcome: Mutex<Option<Outcome>>,
}

/// What came of a request, as far as an engine was asked.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Its tokens, if it was answered.
    pub usage: Usage,
    /// When the first token came, after the request.
    pub first_token: Option<Duration>,
    /// Why each answer ended.
    pub finish: Vec<&'static str>,
}

impl RequestLog {
    fn new(headers: &HeaderMap) -> Self {
        let given = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok());
        let given = given.filter(|id| (1..=MAX_ID).contains(&id.len()));
        let id = given.map_or_else(|| format!("{:032x}", rand::random::<u128>()), String::from);
        Self { id, begin: Instant::now(), outcome: Mutex::default() }
    }

    /// The request's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// When the request came.
    pub fn begin(&self) -> Instant {
        self.begin
    }

    /// Notes what came of the request.
    pub fn note(&self, outcome: Outcome) {
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
    }
}

/// Gives a request its id, counts it as long as it is answered, and logs how it ended. What was
/// said is never logged.
pub async fn log(State(server): State<Arc<Server>>, mut request: Request, next: Next) -> Response {
    let log = Arc::new(RequestLog::new(request.headers()));
    request.extensions_mut().insert(log.clone());
    let mut line = Line {
        log: log.clone(),
        method: request.method().to_string(),
        path: request.uri().path().to_owned(),
        status: 0,
        whole: false,
        _active: server.life.begin(),
    };
    let mut response = next.run(request).await;
    line.status = response.status().as_u16();
    // It came out of a header, or has digits only.
    if let Ok(id) = HeaderValue::from_str(log.id()) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response.map(|body| {
        line.whole = body.is_end_stream();
        Body::new(LoggedBody { body, line })
    })
}

/// A request's line, which is written when this is dropped.
struct Line {
    log: Arc<RequestLog>,
    method: String,
    path: String,
    /// 0 if the client left before there was one.
    status: u16,
    /// Whether the client was given all of the answer.
    whole: bool,
    _active: Active,
}

impl Drop for Line {
    fn drop(&mut self) {
        let Self { log, method, path, status, whole, .. } = self;
        if *status == 200 && PROBES.contains(&path.as_str()) {
            return;
        }
        let outcome = log.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = outcome.as_ref();
        let milliseconds = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        tracing::info!(
            request_id = log.id,
            method,
            path = super::error::shorten(path),
            status,
            whole,
            ms = milliseconds(log.begin.elapsed()),
            first_token_ms = outcome.and_then(|outcome| outcome.first_token).map(milliseconds),
            prompt_tokens = outcome.map(|outcome| outcome.usage.prompt_tokens),
            cached_tokens = outcome.map(|outcome| outcome.usage.prompt_tokens_details.cached_tokens),
            completion_tokens = outcome.map(|outcome| outcome.usage.completion_tokens),
            finish = outcome.map(|outcome| outcome.finish.join(",")),
            "request"
        );
    }
}

/// A body, and the line that is written when it was sent or given up.
struct LoggedBody {
    body: Body,
    line: Line,
}

impl http_body::Body for LoggedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        self.line.whole |= matches!(frame, Poll::Ready(None)) || self.body.is_end_stream();
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
