//! The models that there are.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
};

use super::{
    Server,
    error::{ApiError, ErrorBody},
    types::models::{ModelCard, ModelList},
};

/// The names of the model.
#[utoipa::path(
    get, path = "/v1/models", tag = "models",
    responses(
        (status = 200, body = ModelList),
        (status = 401, description = "The key is missing or wrong", body = ErrorBody),
        (status = 503, description = "The model is being loaded, or the server shuts down", body = ErrorBody),
    )
)]
pub async fn models(State(server): State<Arc<Server>>) -> Result<Json<ModelList>, ApiError> {
    let data = server.options.names.iter().map(|name| server.card(name)).collect::<Result<_, _>>()?;
    Ok(Json(ModelList { object: "list", data }))
}

/// One of them.
#[utoipa::path(
    get, path = "/v1/models/{id}", tag = "models",
    params(("id" = String, Path, description = "A name, which may have slashes")),
    responses(
        (status = 200, body = ModelCard),
        (status = 401, description = "The key is missing or wrong", body = ErrorBody),
        (status = 404, description = "There is no such model", body = ErrorBody),
        (status = 503, description = "The model is being loaded, or the server shuts down", body = ErrorBody),
    )
)]
pub async fn model(
    State(server): State<Arc<Server>>,
    id: Result<Path<String>, axum::extract::rejection::PathRejection>,
) -> Result<Json<ModelCard>, ApiError> {
    // What is no text is no name.
    let id = id.map_or_else(|_| String::new(), |Path(id)| id);
    server.card(&server.name(Some(&id))?).map(Json)
}

impl Server {
    fn card(&self, name: &str) -> Result<ModelCard, ApiError> {
        let llm = self.llm()?;
        Ok(ModelCard {
            id: name.into(),
            object: "model",
            created: self.created,
            owned_by: "flashinfer-rs",
            root: self.name.clone(),
            max_model_len: self.max_model_len(llm),
        })
    }
}
