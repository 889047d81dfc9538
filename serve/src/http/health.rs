//! Whether a server is well.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    Server,
    error::{ApiError, ErrorBody},
};
use crate::{Llm, engine::Health};

/// A step that takes longer than this is taken for one that never ends.
const STALLED: Duration = Duration::from_secs(300);

/// How a server is.
#[derive(Debug, Serialize, ToSchema)]
pub struct HealthStatus {
    /// `ok`
    pub status: &'static str,
}

/// A server's version.
#[derive(Debug, Serialize, ToSchema)]
pub struct Version {
    pub version: &'static str,
}

/// Whether the server is alive: its engine, once it is loaded, has not died or come to a halt.
#[utoipa::path(
    get, path = "/health", tag = "server",
    responses(
        (status = 200, description = "It is alive", body = HealthStatus),
        (status = 503, description = "Start it again", body = ErrorBody),
    )
)]
pub async fn health(State(server): State<Arc<Server>>) -> Result<Json<HealthStatus>, ApiError> {
    match server.llm.get() {
        Some(llm) => alive(llm).map(|()| ok()),
        None => Ok(ok()),
    }
}

/// Whether the server takes requests: its model is loaded, the engine computes, and it is not
/// about to end.
#[utoipa::path(
    get, path = "/ready", tag = "server",
    responses(
        (status = 200, description = "It takes requests", body = HealthStatus),
        (status = 503, description = "It does not, for now", body = ErrorBody),
    )
)]
pub async fn ready(State(server): State<Arc<Server>>) -> Result<Json<HealthStatus>, ApiError> {
    let llm = server.llm()?;
    alive(llm)?;
    match llm.engine().status().health {
        Health::Well => Ok(ok()),
        // The reason is in the log.
        Health::Unwell(_) | Health::Dead(_) => Err(ApiError::unavailable("the engine computes nothing")),
    }
}

/// The server's version.
#[utoipa::path(get, path = "/version", tag = "server", responses((status = 200, body = Version)))]
pub async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

fn ok() -> Json<HealthStatus> {
    Json(HealthStatus { status: "ok" })
}

fn alive(llm: &Llm) -> Result<(), ApiError> {
    let status = llm.engine().status();
    let stalled = status.step_since.is_some_and(|since| since.elapsed() > STALLED);
    match status.health {
        Health::Dead(_) => Err(ApiError::unavailable("the engine has died; start the server again")),
        _ if stalled => Err(ApiError::unavailable("a step does not end; start the server again")),
        _ => Ok(()),
    }
}
