//! `GET /v1/models`.

use serde::Serialize;
use utoipa::ToSchema;

/// The names of the model that is served.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelList {
    /// `list`
    pub object: &'static str,
    pub data: Vec<ModelCard>,
}

/// A name of the model.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelCard {
    pub id: String,
    /// `model`
    pub object: &'static str,
    /// When the server started, in seconds since 1970.
    pub created: u64,
    pub owned_by: &'static str,
    /// The first of the model's names.
    pub root: String,
    /// The most tokens of a prompt and its answer.
    pub max_model_len: usize,
}
