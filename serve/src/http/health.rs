//! Whether a server is well.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    Server,
    error::{ApiError, ErrorBody},
};
use crate::{
    Llm,
    engine::{Health, Status},
};

/// A step that takes longer than this is taken for one that never ends, and an engine that computes nothing for
/// so long for one that never will, as after a failure of its GPU.
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
    match trouble(&llm.engine().status(), Instant::now()) {
        Some(trouble) => Err(ApiError::unavailable(trouble)),
        None => Ok(()),
    }
}

/// Why an engine is not taken for one that lives.
fn trouble(status: &Status, now: Instant) -> Option<&'static str> {
    let for_long = |since: Option<Instant>| since.is_some_and(|since| now > since + STALLED);
    match status.health {
        Health::Dead(_) => Some("the engine has died; start the server again"),
        _ if for_long(status.step_since) => Some("a step does not end; start the server again"),
        _ if for_long(status.unwell_since) => {
            Some("the engine has computed nothing for minutes; start the server again")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_computes_nothing_for_minutes_is_not_alive() {
        let now = Instant::now();
        let well = Status::default();
        let unwell =
            Status { health: Health::Unwell("x".into()), unwell_since: Some(now), ..Status::default() };
        let stalled = Status { step_since: Some(now), ..Status::default() };
        let dead = Status { health: Health::Dead("x".into()), ..Status::default() };
        for (status, soon, late) in [
            (well, None, None),
            (unwell, None, Some("computed nothing")),
            (stalled, None, Some("does not end")),
            (dead, Some("has died"), Some("has died")),
        ] {
            for (waited, want) in [(STALLED, soon), (STALLED + Duration::from_secs(1), late)] {
                let trouble = trouble(&status, now + waited);
                let same =
                    trouble.zip(want).map_or(trouble == want, |(trouble, want)| trouble.contains(want));
                assert!(same, "{trouble:?}, not {want:?}");
            }
        }
    }
}
