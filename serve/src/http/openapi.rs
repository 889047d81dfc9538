//! `GET /openapi.json`: what the endpoints take and give.

use axum::Json;
use utoipa::{
    Modify, OpenApi,
    openapi::{
        OpenApi as Document,
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

use super::{chat, completions, health, metrics, models, tokenize};

/// The API, as its endpoints describe themselves.
#[derive(OpenApi)]
#[openapi(
    info(title = "flashinfer serve", description = "OpenAI's API over the engine of flashinfer-rs"),
    paths(
        chat::chat_completions,
        completions::completions,
        models::models,
        models::model,
        tokenize::tokenize,
        tokenize::detokenize,
        health::health,
        health::ready,
        health::version,
        metrics::metrics,
    ),
    modifiers(&Keys),
    // A key is needed where the server was started with one.
    security((), ("key" = []))
)]
pub struct Api;

/// How clients show a key.
struct Keys;

impl Modify for Keys {
    fn modify(&self, document: &mut Document) {
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("key", SecurityScheme::Http(bearer));
    }
}

/// The document.
pub async fn openapi() -> Json<Document> {
    Json(Api::openapi())
}
