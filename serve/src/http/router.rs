//! Which path is whose.

use std::{any::Any, sync::Arc};

use axum::{
    Router,
    extract::DefaultBodyLimit,
    http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header},
    middleware::{from_fn_with_state, map_response},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{AllowOrigin, CorsLayer},
};

use super::{
    Server, auth, chat, completions, error::ApiError, extract::MAX_BODY_BYTES, health, log, metrics, models,
    openapi, page, tokenize,
};

/// All endpoints of a server.
pub fn router(server: &Arc<Server>) -> Router {
    let keyed = Router::new()
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/models", get(models::models))
        .route("/v1/models/{*id}", get(models::model))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route_layer(from_fn_with_state(server.clone(), auth::check));
    let open = Router::new()
        .route("/", get(page::page))
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .route("/version", get(health::version))
        .route("/metrics", get(metrics::metrics))
        .route("/openapi.json", get(openapi::openapi));
    let router = keyed
        .merge(open)
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES));
    let router = match cors(&server.options.cors) {
        Some(cors) => router.layer(cors),
        None => router,
    };
    router
        .layer(CatchPanicLayer::custom(panicked))
        .layer(map_response(protect))
        .layer(from_fn_with_state(server.clone(), log::log))
        .with_state(server.clone())
}

async fn not_found(method: Method, uri: Uri) -> ApiError {
    let path = super::error::shorten(uri.path());
    let message = format!("there is no {method} {path}; GET /openapi.json lists what there is");
    ApiError::of_status(StatusCode::NOT_FOUND, message)
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    let path = super::error::shorten(uri.path());
    let message = format!("{path} does not take {method}; expected a method of the header Allow");
    ApiError::of_status(StatusCode::METHOD_NOT_ALLOWED, message)
}

/// What a handler that panics answers. The panic's own message is on the standard error.
fn panicked(_: Box<dyn Any + Send>) -> Response {
    tracing::error!("a request's task panicked");
    ApiError::internal().into_response()
}

/// Browsers take each answer as what it is said to be.
async fn protect(mut response: Response) -> Response {
    let nosniff = HeaderValue::from_static("nosniff");
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, nosniff);
    response
}

/// Lets pages of these origins ask; `None` for no origins.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    let allowed = match origins {
        [] => return None,
        origins if origins.iter().any(|origin| origin == "*") => AllowOrigin::any(),
        // They were checked when they came.
        origins => AllowOrigin::list(origins.iter().filter_map(|origin| origin.parse().ok())),
    };
    let headers: [HeaderName; 3] = [header::AUTHORIZATION, header::CONTENT_TYPE, log::REQUEST_ID];
    let layer = CorsLayer::new().allow_origin(allowed).allow_methods([Method::GET, Method::POST]);
    Some(layer.allow_headers(headers).expose_headers([log::REQUEST_ID, header::RETRY_AFTER]))
}
