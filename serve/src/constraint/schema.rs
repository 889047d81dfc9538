//! Which JSON schemas can be used: those of which every keyword is checked.

use serde_json::Value;

/// The most schemas within each other.
const MAX_DEPTH: usize = 64;

/// The most bytes of a regular expression. What is longer may take seconds for each token.
const MAX_PATTERN_BYTES: usize = 4 << 10;

/// Keywords that the grammar checks, whose values are no schemas.
const CHECKED: [&str; 18] = [
    "$ref",
    "const",
    "enum",
    "type",
    "minItems",
    "maxItems",
    "required",
    "minProperties",
    "maxProperties",
    "minLength",
    "maxLength",
    "pattern",
    "format",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
];

/// Others that it checks, by what they hold: lists of schemas, a schema, schemas by names.
const LISTS: [&str; 4] = ["anyOf", "oneOf", "allOf", "prefixItems"];
const SCHEMAS: [&str; 3] = ["items", "additionalItems", "additionalProperties"];
const MAPS: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];

/// Keywords that say nothing of what is accepted.
const ANNOTATIONS: [&str; 11] = [
    "$schema",
    "$id",
    "$comment",
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "strict",
];

/// Says what of a schema cannot be used, and where.
pub fn check(schema: &Value) -> Result<(), String> {
    check_at(schema, "#", 0)
}

/// As [`check`], of a schema within `depth` others.
fn check_at(schema: &Value, place: &str, depth: usize) -> Result<(), String> {
    if depth > MAX_DEPTH {
        return Err(format!("its schemas are nested deeper than {MAX_DEPTH}"));
    }
    let keywords = match schema {
        Value::Bool(_) => return Ok(()),
        Value::Object(keywords) => keywords,
        other => return Err(format!("{place}: {}; expected an object or a boolean", kind(other))),
    };
    let inner = |schema: &Value, names: &str| check_at(schema, &format!("{place}/{names}"), depth + 1);
    for (keyword, value) in keywords {
        let keyword = keyword.as_str();
        let [holds_list, holds_map] = [LISTS.contains(&keyword), MAPS.contains(&keyword)];
        match value {
            Value::Object(map) if holds_map => {
                let long = map.keys().find(|name| name.len() > MAX_PATTERN_BYTES);
                if let Some(name) = long {
                    let bytes = name.len();
                    return Err(format!(
                        "{place}/{keyword}: a name has {bytes} bytes; expected at most {MAX_PATTERN_BYTES}"
                    ));
                }
                map.iter().try_for_each(|(name, schema)| inner(schema, &format!("{keyword}/{name}")))?;
            }
            // `items` may be a list in older drafts.
            Value::Array(list) if holds_list || keyword == "items" => {
                list.iter().enumerate().try_for_each(|(at, it)| inner(it, &format!("{keyword}/{at}")))?;
            }
            schema if SCHEMAS.contains(&keyword) => inner(schema, keyword)?,
            other if holds_list || holds_map => {
                let expected = if holds_map { "an object" } else { "an array" };
                return Err(format!("{place}/{keyword}: {}; expected {expected}", kind(other)));
            }
            Value::String(uri) if keyword == "$ref" && !uri.starts_with('#') => {
                return Err(format!(
                    "{place}: `$ref` is {uri:?}; expected a place in this schema, which begins with #"
                ));
            }
            Value::String(pattern) if keyword == "pattern" && pattern.len() > MAX_PATTERN_BYTES => {
                let bytes = pattern.len();
                return Err(format!(
                    "{place}/pattern: it has {bytes} bytes; expected at most {MAX_PATTERN_BYTES}"
                ));
            }
            value if CHECKED.contains(&keyword) => check_depth(value, place, keyword)?,
            _ if ANNOTATIONS.contains(&keyword) => {}
            _ => return Err(format!("{place}: the keyword `{keyword}` is not supported")),
        }
    }
    Ok(())
}

/// Refuses values within each other, of `const` and `enum`, that are too deep.
fn check_depth(value: &Value, place: &str, keyword: &str) -> Result<(), String> {
    fn fits(value: &Value, room: usize) -> bool {
        room > 0
            && match value {
                Value::Array(list) => list.iter().all(|inner| fits(inner, room - 1)),
                Value::Object(map) => map.values().all(|inner| fits(inner, room - 1)),
                _ => true,
            }
    }
    match fits(value, MAX_DEPTH) {
        true => Ok(()),
        false => Err(format!("{place}/{keyword}: values are nested deeper than {MAX_DEPTH}")),
    }
}

/// What a value is.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
