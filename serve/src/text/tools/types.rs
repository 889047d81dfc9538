//! The types of arguments that are not written as JSON.

use serde::de::IgnoredAny;
use serde_json::Value;

/// The most references and alternatives within each other that are followed.
const MAX_DEPTH: usize = 16;

/// Types of JSON values, as bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Types(u8);

impl Types {
    const NONE: Self = Self(0);
    pub const NULL: Self = Self(1);
    const BOOLEAN: Self = Self(2);
    const NUMBER: Self = Self(4);
    pub const STRING: Self = Self(8);
    const ARRAY: Self = Self(16);
    pub const OBJECT: Self = Self(32);
    /// Of what no schema says anything.
    pub const ANY: Self = Self(63);

    /// Those that values of a schema may have, whose references are to parts of `root`.
    pub fn of(schema: &Value, root: &Value) -> Self {
        Self::within(schema, root, 0)
    }

    fn within(schema: &Value, root: &Value, depth: usize) -> Self {
        let inner = |schema| Self::within(schema, root, depth + 1);
        if depth > MAX_DEPTH {
            return Self::ANY;
        }
        let mut types = match &schema["type"] {
            Value::String(name) => Self::named(name),
            Value::Array(names) => Self::any_of(names.iter().filter_map(Value::as_str).map(Self::named)),
            _ => Self::ANY,
        };
        if let Some(value) = schema.get("const") {
            types = types.and(Self::of_value(value));
        }
        if let Value::Array(values) = &schema["enum"] {
            types = types.and(Self::any_of(values.iter().map(Self::of_value)));
        }
        for keyword in ["anyOf", "oneOf"] {
            if let Value::Array(schemas) = &schema[keyword] {
                types = types.and(Self::any_of(schemas.iter().map(inner)));
            }
        }
        if let Value::Array(schemas) = &schema["allOf"] {
            types = schemas.iter().map(inner).fold(types, Self::and);
        }
        match referred(schema, root) {
            Some(schema) => types.and(inner(schema)),
            None => types,
        }
    }

    /// Whether there is one of these among them.
    pub fn have(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether there are no others.
    pub fn is_within(self, one: Self, other: Self) -> bool {
        self.0 & !(one.0 | other.0) == 0
    }

    /// The JSON of an argument that is written as text: its own, if it is that of a value of one of these
    /// types that is no string; else that of a string.
    pub fn json(self, text: &str) -> String {
        let json = match text.trim() {
            // As templates that print them show the model.
            "True" => "true",
            "False" => "false",
            "None" => "null",
            json => json,
        };
        let written = match json.bytes().next() {
            Some(b'n') => Self::NULL,
            Some(b't' | b'f') => Self::BOOLEAN,
            Some(b'-' | b'0'..=b'9') => Self::NUMBER,
            Some(b'[') => Self::ARRAY,
            Some(b'{') => Self::OBJECT,
            _ => Self::NONE,
        };
        match self.have(written) && serde_json::from_str::<IgnoredAny>(json).is_ok() {
            true => json.into(),
            false => Value::from(text).to_string(),
        }
    }

    /// A type of a schema that is none of JSON's.
    pub fn unknown(schema: &Value) -> Option<&Value> {
        let types = match &schema["type"] {
            Value::Array(types) => types.as_slice(),
            Value::Null => &[],
            one => std::slice::from_ref(one),
        };
        types.iter().find(|name| name.as_str().map(Self::named).is_none_or(|types| types == Self::ANY))
    }

    fn named(name: &str) -> Self {
        match name {
            "null" => Self::NULL,
            "boolean" => Self::BOOLEAN,
            "integer" | "number" => Self::NUMBER,
            "string" => Self::STRING,
            "array" => Self::ARRAY,
            "object" => Self::OBJECT,
            _ => Self::ANY,
        }
    }

    const fn of_value(value: &Value) -> Self {
        match value {
            Value::Null => Self::NULL,
            Value::Bool(_) => Self::BOOLEAN,
            Value::Number(_) => Self::NUMBER,
            Value::String(_) => Self::STRING,
            Value::Array(_) => Self::ARRAY,
            Value::Object(_) => Self::OBJECT,
        }
    }

    fn any_of(types: impl Iterator<Item = Self>) -> Self {
        types.fold(Self::NONE, |any, types| Self(any.0 | types.0))
    }

    const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// The part of `root` that a schema refers to.
pub fn referred<'a>(schema: &Value, root: &'a Value) -> Option<&'a Value> {
    root.pointer(schema["$ref"].as_str()?.strip_prefix('#')?)
}
