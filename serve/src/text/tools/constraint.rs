//! What has a model call tools.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{
    ToolFormat,
    syntax::{Form, ParameterWords},
    types::{Types, referred},
};
use crate::{
    constraint::{Constraint, InvalidConstraint, check_schema},
    text::Text,
};

/// The keywords of an object's schema of which each argument can be written for itself, and those
/// that its arguments' schemas may refer to.
const OBJECT: [&str; 4] = ["type", "properties", "required", "additionalProperties"];
const DEFINITIONS: [&str; 2] = ["$defs", "definitions"];
/// Those of a schema of strings that hold where they are not written as JSON.
const STRING: [&str; 5] = ["type", "enum", "const", "minLength", "maxLength"];
/// Those that say nothing of what is accepted.
const ANNOTATIONS: [&str; 8] =
    ["$schema", "$id", "$comment", "title", "description", "default", "examples", "strict"];

impl ToolFormat {
    /// A constraint by which a model calls one of these tools, or, if `parallel`, one after the
    /// other, and says nothing else, but for JSON of the schema `otherwise`, if there is one, in
    /// place of calls. The tools are those of OpenAI's API:
    /// `{"type": "function", "function": {"name": …, "parameters": …}}`.
    ///
    /// # Errors
    /// There is none, or one has no name. Where the model writes each argument for itself: a name or
    /// a value that would not be read as it is, or a schema that cannot be kept so.
    pub fn constraint(
        self,
        text: &Text,
        tools: &[Value],
        parallel: bool,
        otherwise: Option<Value>,
    ) -> Result<Constraint, InvalidConstraint> {
        let problem = |problem| InvalidConstraint { kind: "list of tools", problem };
        if tools.is_empty() {
            return Err(problem("it is empty; expected at least one".into()));
        }
        let mut rules = Rules { text, lines: String::new(), schemas: BTreeMap::new() };
        for (at, tool) in tools.iter().enumerate() {
            rules.add_tool(self, at, &tool["function"]).map_err(problem)?;
        }
        let syntax = self.syntax();
        let [open, between, close, call_open, call_close] =
            [syntax.open, syntax.between, syntax.close, syntax.call_open, syntax.call_close]
                .map(|words| rules.words(words));
        let any: Vec<_> = (0..tools.len()).map(|at| format!("tool_{at}")).collect();
        // Calls that need no mark are all that is said, so that there is one.
        let parallel = parallel && self != Self::Llama;
        let more = if parallel { format!("({between} call)*") } else { String::new() };
        let Rules { lines, mut schemas, .. } = rules;
        let mut start = "start: calls".to_owned();
        if let Some(schema) = otherwise {
            start += " | @answer";
            schemas.insert("answer".into(), schema);
        }
        let rules = format!(
            "{start}\ncalls: {open} call {more} {close}\ncall: {call_open} tool {call_close}\ntool: {}\n{lines}",
            any.join("\n | ")
        );
        Ok(Constraint::Lark { rules, schemas })
    }
}

/// Rules of tools, as they are added.
struct Rules<'a> {
    text: &'a Text,
    lines: String,
    schemas: BTreeMap<String, Value>,
}

impl Rules<'_> {
    /// Adds the rule of a tool: of what is between the words before and behind a call.
    fn add_tool(&mut self, format: ToolFormat, at: usize, function: &Value) -> Result<(), String> {
        let name = function["name"].as_str().filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| format!("tool {at} has no `function` with a `name`"))?;
        let form = &format.syntax().form;
        let is_written_bare = !matches!(form, Form::Object { .. });
        if is_written_bare && (name.trim() != name || name.contains(['<', '>', '[', ']', '{', '}', '\n'])) {
            return Err(format!(
                "the name of tool {at} has brackets, line ends or blanks at its ends, as the model cannot \
                 write it; expected letters, digits, `_` and `-`"
            ));
        }
        let parameters = function.get("parameters").filter(|schema| !schema.is_null()).cloned();
        let parameters = parameters.unwrap_or_else(|| json!({ "type": "object" }));
        let rule = match form {
            Form::Object { arguments } => {
                let begin = literal(&format!("{{\"name\": {}, \"{arguments}\": ", Value::from(name)));
                format!("{begin} {} \"}}\"", self.json(format!("arguments_{at}"), parameters))
            }
            Form::NamedObject { behind_name, .. } => {
                let arguments = self.json(format!("arguments_{at}"), parameters);
                format!("{} {} {arguments}", literal(name), self.words(behind_name))
            }
            Form::NamedParameters { behind_name, words } => {
                check_schema(&parameters).map_err(|problem| format!("tool {at}: {problem}"))?;
                let arguments = self.parameters(at, words, &parameters);
                let arguments = arguments.map_err(|problem| {
                    format!("tool {at}: {problem}, as the model writes each argument for itself, and strings without quotes")
                })?;
                let [behind_name, end] = [self.words(behind_name), self.words(&[words.end])];
                format!("{} {behind_name} {arguments} {end}", literal(name))
            }
        };
        self.lines += &format!("tool_{at}: {rule}\n");
        Ok(())
    }

    /// Arguments that are written each for itself.
    fn parameters(&mut self, tool: usize, words: &ParameterWords, schema: &Value) -> Result<String, String> {
        let object = schema.as_object().ok_or("its `parameters` are no object")?;
        check_keywords(object, &[&OBJECT[..], &DEFINITIONS].concat())?;
        if !Types::of(schema, schema).have(Types::OBJECT) {
            return Err("its `parameters` have another type than `object`".into());
        }
        let required = match &schema["required"] {
            Value::Null => Some(Vec::new()),
            required => required.as_array().and_then(|names| names.iter().map(Value::as_str).collect()),
        };
        let required: Vec<_> = required.ok_or("its `required` is no list of names")?;
        let mut properties = schema["properties"].as_object().cloned().unwrap_or_default();
        for name in &required {
            properties.entry(*name).or_insert(Value::Bool(true));
        }
        let mut rules = String::new();
        for (at, (key, property)) in properties.iter().enumerate() {
            if key.is_empty() || key.trim() != key || key.contains(['<', '>', '\n']) {
                return Err(format!("its parameter {key:?} cannot be named"));
            }
            let place = format!("{tool}_{at}");
            let value = self.value(&place, words, property, object);
            let value = value.map_err(|problem| format!("its parameter `{key}`: {problem}"))?;
            let [open, behind_key] = [self.words(&[words.open]), self.words(words.behind_key)];
            self.lines += &format!("parameter_{place}: {open} {} {behind_key} ({value})\n", literal(key));
            let optional = if required.contains(&key.as_str()) { "" } else { "?" };
            rules += &format!(" parameter_{place}{optional}");
        }
        Ok(rules)
    }

    /// A value of one argument, and the words behind it.
    fn value(
        &mut self,
        place: &str,
        words: &ParameterWords,
        schema: &Value,
        root: &Map<String, Value>,
    ) -> Result<String, String> {
        let close = self.words(words.close);
        let types = Types::of(schema, &Value::Object(root.clone()));
        if !types.have(Types::STRING) {
            let mut schema = schema.clone();
            if let Value::Object(schema) = &mut schema {
                let definitions = root.iter().filter(|(key, _)| DEFINITIONS.contains(&key.as_str()));
                schema.extend(definitions.map(|(key, value)| (key.clone(), value.clone())));
            }
            return Ok(format!("{} {close}", self.json(format!("value_{place}"), schema)));
        }
        let alternatives = texts(schema, &Value::Object(root.clone()), 0)?;
        let mut rules = Vec::new();
        for (at, alternative) in alternatives.into_iter().enumerate() {
            rules.push(match alternative {
                Alternative::Literal(text) => {
                    if words.ends_of_value().iter().any(|mark| text.contains(mark)) {
                        return Err(format!("its value {text:?} has a mark of the model's own"));
                    }
                    format!("{} {close}", literal(&text))
                }
                Alternative::Length(from, to) => self.free_text(&format!("{place}_{at}"), words, from, to),
            });
        }
        Ok(rules.join("\n | "))
    }

    /// Text of so many characters, and the words behind it.
    fn free_text(&mut self, place: &str, words: &ParameterWords, from: u64, to: Option<u64>) -> String {
        let to = to.map_or_else(String::new, |to| to.to_string());
        let marks: Vec<_> = words.ends_of_value().iter().map(|mark| mark.replace('/', "\\/")).collect();
        let marks = marks.join("|");
        self.lines += &format!("TEXT_{place}: /(?s:.{{{from},{to}}})/ & ~/(?s:.*)({marks})(?s:.*)/\n");
        let close = self.words(words.close);
        match self.text.control_id(words.close_mark()) {
            // A token that is not text ends it.
            Some(_) => format!("TEXT_{place} {close}"),
            None => {
                self.lines += &format!("text_{place}[lazy]: TEXT_{place} {close}\n");
                format!("text_{place}")
            }
        }
    }

    /// JSON of a schema.
    fn json(&mut self, name: String, schema: Value) -> String {
        let rule = format!("@{name}");
        self.schemas.insert(name, schema);
        rule
    }

    /// Words as they are written: of each its token, if it is one that text cannot have.
    fn words(&self, words: &[&str]) -> String {
        let rule = |word: &&str| match self.text.control_id(word) {
            Some(id) => format!("<[{id}]>"),
            None => literal(word),
        };
        words.iter().map(rule).collect::<Vec<_>>().join(" ")
    }
}

/// What a string may be that is not written as JSON.
enum Alternative {
    Literal(String),
    /// Text of at least, and at most, so many characters.
    Length(u64, Option<u64>),
}

/// What strings of a schema may be, and `null`.
fn texts(schema: &Value, root: &Value, depth: usize) -> Result<Vec<Alternative>, String> {
    const MAX_DEPTH: usize = 16;
    let Some(keywords) = schema.as_object() else {
        return match schema {
            Value::Bool(true) => Ok(vec![Alternative::Length(0, None)]),
            _ => Err("its schema accepts nothing".into()),
        };
    };
    if depth > MAX_DEPTH {
        return Err(format!("its schemas are nested deeper than {MAX_DEPTH}"));
    }
    if let Some(schema) = referred(schema, root) {
        check_keywords(keywords, &["$ref"])?;
        return texts(schema, root, depth + 1);
    }
    if let Some(schemas) = ["anyOf", "oneOf"].iter().find_map(|keyword| schema[keyword].as_array()) {
        check_keywords(keywords, &["anyOf", "oneOf"])?;
        let schemas = schemas.iter().map(|schema| texts(schema, root, depth + 1));
        return Ok(schemas.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect());
    }
    if let Some(place) = keywords.get("$ref") {
        return Err(format!("its `$ref` is {place}, which is no place in the schema"));
    }
    check_keywords(keywords, &STRING)?;
    let null = || Alternative::Literal("null".into());
    if let Some(values) =
        schema.get("const").map(std::slice::from_ref).or_else(|| schema["enum"].as_array().map(Vec::as_slice))
    {
        let literal = |value: &Value| match value {
            Value::String(text) => Ok(Alternative::Literal(text.clone())),
            Value::Null => Ok(null()),
            other => Err(format!("{other} beside strings cannot be told from them")),
        };
        return values.iter().map(literal).collect();
    }
    if let Some(name) = Types::unknown(schema) {
        return Err(format!("the type {name} is not known"));
    }
    let types = Types::of(schema, root);
    if types == Types::NULL {
        return Ok(vec![null()]);
    }
    if !types.have(Types::STRING) {
        return Err(format!("values of the type {} beside strings cannot be told from them", schema["type"]));
    }
    if types != Types::ANY && !types.is_within(Types::STRING, Types::NULL) {
        return Err(format!("of {} some cannot be told from strings", schema["type"]));
    }
    let length = |keyword: &str| match &schema[keyword] {
        Value::Null => Ok(None),
        length => length.as_u64().map(Some).ok_or_else(|| format!("its `{keyword}` is no length")),
    };
    let (from, to) = (length("minLength")?.unwrap_or(0), length("maxLength")?);
    match to {
        Some(to) if to < from => Err(format!("no text has at least {from} and at most {to} characters")),
        to => Ok(vec![Alternative::Length(from, to)]),
    }
}

/// Says which of a schema's keywords is none of those that hold.
fn check_keywords(keywords: &Map<String, Value>, known: &[&str]) -> Result<(), String> {
    let unknown =
        keywords.keys().map(String::as_str).find(|key| !known.contains(key) && !ANNOTATIONS.contains(key));
    match unknown {
        Some(keyword) => Err(format!("the keyword `{keyword}` cannot be kept")),
        None => Ok(()),
    }
}

/// A text in a rule.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}
