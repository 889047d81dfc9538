//! What a file says about its tokenizer. Nothing else in `text` reads files.

use candle_core::quantized::gguf_file::{Content, Value};

use crate::{Result, model::gguf};

/// The keys of a file that begin with `tokenizer.`.
#[derive(Clone, Copy)]
pub struct Metadata<'a>(&'a Content);

impl<'a> Metadata<'a> {
    pub const fn new(content: &'a Content) -> Self {
        Self(content)
    }

    fn get(self, key: &str) -> Option<&'a Value> {
        self.0.metadata.get(&format!("tokenizer.{key}"))
    }

    /// The model's architecture, if the file has one.
    pub fn architecture(self) -> Option<&'a str> {
        self.0.metadata.get("general.architecture")?.to_string().ok().map(String::as_str)
    }

    pub fn string(self, key: &str) -> Result<Option<&'a str>> {
        let text = |value: &'a Value| match value {
            Value::String(text) => Ok(text.as_str()),
            _ => Err(format!("tokenizer.{key} is no string").into()),
        };
        self.get(key).map(text).transpose()
    }

    pub fn flag(self, key: &str) -> Result<Option<bool>> {
        let flag = |value: &Value| match value {
            Value::Bool(flag) => Ok(*flag),
            _ => Err(format!("tokenizer.{key} is not true or false").into()),
        };
        self.get(key).map(flag).transpose()
    }

    /// A number, or a list of them.
    pub fn integers(self, key: &str) -> Result<Option<Vec<i64>>> {
        let all = |value: &Value| match value {
            Value::Array(all) => all.iter().map(integer).collect(),
            one => integer(one).map(|one| vec![one]),
        };
        let problem = || format!("tokenizer.{key} are not all integers").into();
        self.get(key).map(|value| all(value).ok_or_else(problem)).transpose()
    }

    pub fn floats(self, key: &str) -> Result<Option<Vec<f32>>> {
        let float = |value: &Value| match value {
            Value::F32(number) => Some(*number),
            Value::F64(number) => Some(*number as f32),
            _ => None,
        };
        let all = |value: &Value| match value {
            Value::Array(all) => all.iter().map(float).collect(),
            _ => None,
        };
        let problem = || format!("tokenizer.{key} are not all f32").into();
        self.get(key).map(|value| all(value).ok_or_else(problem)).transpose()
    }

    pub fn strings(self, key: &str) -> Result<Vec<&'a str>> {
        let text = |value: &'a Value| value.to_string().ok().map(String::as_str);
        let all = match self.get(key) {
            Some(Value::Array(all)) => all.iter().map(text).collect(),
            _ => None,
        };
        all.ok_or_else(|| format!("tokenizer.{key} is missing, or no array of strings").into())
    }
}

fn integer(value: &Value) -> Option<i64> {
    gguf::integer(value).and_then(|number| i64::try_from(number).ok())
}
