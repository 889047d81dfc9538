//! Errors as OpenAI's API says them.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::{IntoResponses, ToSchema};

use crate::{request::SubmitError, sampling::InvalidParameter, shorten};

/// The seconds after which a client may try again what was refused for lack of room.
const RETRY_AFTER: u32 = 1;
/// The same while the model is loaded, or the server shuts down.
const RETRY_LATER: u32 = 5;

/// Why a request is not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    retry_after: Option<u32>,
}

/// An error as it is sent.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// What was wrong, what was expected, and what to do.
    pub message: String,
    /// The kind of error.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The parameter that is wrong, if one is.
    #[schema(required)]
    pub param: Option<String>,
    /// The error in a word, if there is one.
    #[schema(required)]
    pub code: Option<&'static str>,
}

/// The errors of endpoints that take a body.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "it is read by the macro that documents endpoints")]
pub enum BodyErrors {
    /// The body is no JSON, or a parameter is wrong
    #[response(status = 400)]
    BadRequest(ErrorBody),
    /// The key is missing or wrong
    #[response(status = 401)]
    Unauthorized(ErrorBody),
    /// There is no such model
    #[response(status = 404)]
    NotFound(ErrorBody),
    /// The body did not come in time
    #[response(status = 408)]
    RequestTimeout(ErrorBody),
    /// The body is too large
    #[response(status = 413)]
    PayloadTooLarge(ErrorBody),
    /// The body is not said to be JSON
    #[response(status = 415)]
    UnsupportedMediaType(ErrorBody),
    /// The queue is full: try again after the seconds of `Retry-After`
    #[response(status = 429)]
    TooManyRequests(ErrorBody),
    /// The server failed
    #[response(status = 500)]
    InternalServerError(ErrorBody),
    /// The model is being loaded, or the server shuts down: try again after the seconds of
    /// `Retry-After`
    #[response(status = 503)]
    ServiceUnavailable(ErrorBody),
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// Something about the request is wrong.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A parameter is wrong.
    pub fn parameter(name: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(name.into()), ..Self::invalid(message) }
    }

    /// A parameter asks for what this server does not do.
    pub fn unsupported(name: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::parameter(name, message) }
    }

    /// A prompt, or what is asked for, is longer than the model's context.
    pub fn context(name: &str, message: impl Into<String>) -> Self {
        Self { code: Some("context_length_exceeded"), ..Self::parameter(name, message) }
    }

    /// There is no such model.
    pub fn no_model(name: &str) -> Self {
        let message =
            format!("the model `{}` does not exist; GET /v1/models lists those that do", shorten(name));
        Self {
            status: StatusCode::NOT_FOUND,
            code: Some("model_not_found"),
            ..Self::parameter("model", message)
        }
    }

    /// A status whose reason is the protocol's.
    pub fn of_status(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, ..Self::invalid(message) }
    }

    /// The key is missing or wrong.
    pub fn no_key() -> Self {
        let message = "the API key is missing or wrong; expected the header `Authorization: Bearer KEY`";
        Self { code: Some("invalid_api_key"), ..Self::of_status(StatusCode::UNAUTHORIZED, message) }
    }

    /// The server cannot answer for now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", message);
        Self { retry_after: Some(RETRY_LATER), ..error }
    }

    /// The server failed. Its log says why, and the client does not learn it.
    pub fn internal() -> Self {
        let message =
            "the server could not compute the answer; its log has the reason under this x-request-id";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// The same error, with another parameter's name if it has one.
    pub fn renamed(self, from: &str, to: &str) -> Self {
        match self.param.as_deref() == Some(from) {
            true => Self { param: Some(to.into()), ..self },
            false => self,
        }
    }

    /// What is sent.
    pub fn body(&self) -> ErrorBody {
        let Self { kind, message, param, code, .. } = self.clone();
        ErrorBody { error: ErrorDetail { message, kind, param, code } }
    }
}

/// The beginning of what a client sent, for messages.
pub fn shorten(text: &str) -> String {
    shorten::shorten(text, 100)
}

impl From<InvalidParameter> for ApiError {
    fn from(error: InvalidParameter) -> Self {
        Self::parameter(error.name, error.to_string())
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::Parameter(parameter) => parameter.into(),
            SubmitError::Constraint(_) => Self::parameter("response_format", message),
            SubmitError::EmptyPrompt | SubmitError::UnknownToken { .. } => Self::parameter("prompt", message),
            SubmitError::Context { .. } | SubmitError::Cache { .. } => Self::context("prompt", message),
            SubmitError::QueueFull { .. } => Self {
                code: Some("rate_limit_exceeded"),
                retry_after: Some(RETRY_AFTER),
                ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
            },
            SubmitError::Dead(reason) => {
                tracing::error!(reason, "the engine is gone");
                Self::internal()
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
