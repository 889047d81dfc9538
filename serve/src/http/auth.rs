//! Keys that clients have to show.

use std::{fmt, sync::Arc};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, header},
    middleware::Next,
    response::Response,
};
use subtle::ConstantTimeEq;

use super::{Server, error::ApiError};

/// What a client has to show. It is never printed.
#[derive(Clone)]
pub struct ApiKey(String);

impl ApiKey {
    /// # Errors
    /// The key is empty, or no header can have it.
    pub fn new(key: impl Into<String>) -> crate::Result<Self> {
        let key = key.into();
        match !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic()) {
            true => Ok(Self(key)),
            false => {
                Err("the API key is empty or has characters that no header can have; expected letters, \
                          digits and signs of ASCII"
                    .into())
            }
        }
    }

    /// Whether a request shows the key. The time that this takes does not depend on how much of a
    /// wrong key is right.
    fn is_shown(&self, headers: &HeaderMap) -> bool {
        let shown = headers.get(header::AUTHORIZATION).map_or(&b""[..], |value| value.as_bytes());
        let (scheme, key) = shown.split_at(shown.len().min("Bearer ".len()));
        scheme.eq_ignore_ascii_case(b"Bearer ") && bool::from(key.ct_eq(self.0.as_bytes()))
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey")
    }
}

/// Lets requests through that show the key, if one is needed.
pub async fn check(
    State(server): State<Arc<Server>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    match &server.options.api_key {
        Some(key) if !key.is_shown(request.headers()) => Err(ApiError::no_key()),
        _ => Ok(next.run(request).await),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_key_opens() {
        let key = ApiKey::new("sk-1").unwrap();
        let shows = |value: &str| {
            key.is_shown(&HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]))
        };
        assert!(shows("Bearer sk-1") && shows("bearer sk-1"));
        for wrong in ["Bearer sk-2", "Bearer sk-", "Bearer sk-11", "Bearer", "sk-1", "Basic sk-1", ""] {
            assert!(!shows(wrong), "{wrong}");
        }
        assert!(!key.is_shown(&HeaderMap::new()));
        assert!(ApiKey::new("").is_err() && ApiKey::new("a b").is_err());
        assert_eq!(format!("{key:?}"), "ApiKey");
    }
}
