//! Bodies of requests: JSON, whose wrong fields are named.

use std::{collections::BTreeSet, sync::Arc};

use axum::{
    body::Bytes,
    extract::{FromRequest, Request},
    http::{HeaderMap, StatusCode, header},
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{
    Server,
    error::ApiError,
    turns::{Turn, Turns},
    types::{
        unsupported,
        values::{MAX_VALUES, values},
    },
};

/// The most bytes of a body.
pub const MAX_BODY_BYTES: usize = 8 << 20;
/// The most bytes of a body that is no large one.
const MAX_SMALL_BYTES: usize = 64 << 10;

/// A request's body.
pub trait RequestBody: Sized {
    /// Reads it from its fields.
    ///
    /// # Errors
    /// A field is missing, or is not what it should be.
    fn read(fields: &mut Fields) -> Result<Self, ApiError>;
}

/// The fields of a JSON object.
pub struct Fields {
    object: Value,
    /// Those that no section has.
    unknown: Option<BTreeSet<String>>,
}

impl Fields {
    fn new(object: Map<String, Value>) -> Self {
        Self { object: Value::Object(object), unknown: None }
    }

    /// Reads those that a type has.
    ///
    /// # Errors
    /// One is missing, or is not what it should be; it is named.
    pub fn section<T: DeserializeOwned>(&mut self) -> Result<T, ApiError> {
        let (mut track, mut unknown) = (serde_path_to_error::Track::new(), BTreeSet::new());
        let tracked = serde_path_to_error::Deserializer::new(&self.object, &mut track);
        let section = serde_ignored::deserialize(tracked, |path| {
            if let serde_ignored::Path::Map { parent: &serde_ignored::Path::Root, key } = path {
                unknown.insert(key);
            }
        });
        let section = section.map_err(|error| invalid(&track.path().to_string(), &error))?;
        self.unknown = Some(match self.unknown.take() {
            None => unknown,
            Some(before) => &before & &unknown,
        });
        Ok(section)
    }

    /// Refuses fields that ask for what this server does not do, and returns those that
    /// nobody knows.
    fn rest(self) -> Result<Vec<String>, ApiError> {
        let mut nobodys = Vec::new();
        for name in self.unknown.unwrap_or_default() {
            if !unsupported::check(&name, &self.object[name.as_str()])? {
                nobodys.push(name);
            }
        }
        Ok(nobodys)
    }
}

/// What is wrong about a field.
fn invalid(path: &str, error: &serde_json::Error) -> ApiError {
    let message = in_words_of_json(error.to_string());
    let missing = message.strip_prefix("missing field `").and_then(|rest| rest.split('`').next());
    let name = match (path, missing) {
        ("." | "", Some(field)) => field.to_owned(),
        (path, Some(field)) => format!("{path}.{field}"),
        (path, None) => path.to_owned(),
    };
    match name.as_str() {
        "." | "" => ApiError::invalid(format!("the body is not what was expected: {message}")),
        name => ApiError::parameter(name, format!("{name}: {message}")),
    }
}

/// What serde says, with JSON's names of types for Rust's.
fn in_words_of_json(message: String) -> String {
    let Some((given, expected)) = message.rsplit_once(", expected ") else { return message };
    let given = given.replace("invalid type: map", "invalid type: object");
    let given = given.replace("invalid type: sequence", "invalid type: array");
    let expected = match expected {
        "a map" => "an object",
        // The name of one of an enum's values.
        "string or map" => "a string",
        "a sequence" => "an array",
        "f32" | "f64" => "a number",
        "u8" | "u16" | "u32" | "u64" | "usize" => "an integer that is not negative",
        "i8" | "i16" | "i32" | "i64" | "isize" => "an integer",
        struct_or_enum if struct_or_enum.starts_with("struct ") => "an object",
        struct_or_enum if struct_or_enum.contains(" tagged enum ") => "an object with a `type`",
        other => other,
    };
    format!("{given}, expected {expected}")
}

/// A request's body, read.
pub struct Body<T> {
    /// That of a large one, until the request is given to the engine. First, as what is bound first is
    /// dropped last.
    pub turn: Option<Turn>,
    pub request: T,
}

impl<T: RequestBody + Send + 'static> FromRequest<Arc<Server>> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, server: &Arc<Server>) -> Result<Self, ApiError> {
        // Bodies are not read in vain.
        server.llm()?;
        check_content_type(request.headers())?;
        let bytes =
            tokio::time::timeout(server.options.body_timeout, Bytes::from_request(request, &())).await;
        let bytes = bytes.map_err(|_| {
            ApiError::of_status(StatusCode::REQUEST_TIMEOUT, "the body did not come in time; send it again")
        })?;
        let bytes = bytes.map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => {
                let message = format!("the body is too large; expected at most {MAX_BODY_BYTES} bytes");
                ApiError::of_status(StatusCode::PAYLOAD_TOO_LARGE, message)
            }
            _ => ApiError::invalid("the body broke off; send it again"),
        })?;
        let turn = match bytes.len() > MAX_SMALL_BYTES {
            true => Some(Turns::of(&server.turns.large).await?),
            false => None,
        };
        let (request, ignored) = match &turn {
            Some(turn) => server.turns.compute(turn.clone(), move || read(&bytes)).await??,
            None => read(&bytes)?,
        };
        server.ignored.note(ignored);
        Ok(Self { turn, request })
    }
}

/// A body, and the fields that nobody knows.
fn read<T: RequestBody>(bytes: &[u8]) -> Result<(T, Vec<String>), ApiError> {
    if values(bytes) > MAX_VALUES {
        return Err(ApiError::invalid(format!(
            "the body has too many values; expected at most {MAX_VALUES}"
        )));
    }
    let object: Value = serde_json::from_slice(bytes)
        .map_err(|error| ApiError::invalid(format!("the body is not JSON: {error}")))?;
    let Value::Object(object) = object else {
        return Err(ApiError::invalid("the body is not a JSON object; expected one"));
    };
    let mut fields = Fields::new(object);
    let request = T::read(&mut fields)?;
    Ok((request, fields.rest()?))
}

fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let given = headers.get(header::CONTENT_TYPE).map(|value| value.to_str().unwrap_or_default());
    let essence = given.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    match essence.eq_ignore_ascii_case("application/json") {
        true => Ok(()),
        false => {
            let message = "the header Content-Type is missing or another; expected application/json";
            Err(ApiError::of_status(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
        }
    }
}
