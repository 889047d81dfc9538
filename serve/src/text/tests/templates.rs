//! Templates of public models against what jinja2 makes of them; `make.py` beside the data
//! says how.

use std::{collections::BTreeMap, fs, path::PathBuf, thread};

use candle_core::quantized::gguf_file::Value;
use jiff::{civil::date, tz::TimeZone};
use serde::Deserialize;

use super::{ChatOptions, File, Message, Role, control_of, decode};
use crate::text::{ChatError, names::Names};

#[derive(Deserialize)]
pub struct Chat {
    name: String,
    messages: Vec<Message>,
    #[serde(default)]
    tools: Vec<serde_json::Value>,
    #[serde(default = "yes")]
    add_generation_prompt: bool,
    #[serde(default)]
    variables: serde_json::Map<String, serde_json::Value>,
}

const fn yes() -> bool {
    true
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Text(String),
    Error(String),
}

#[derive(Deserialize)]
pub struct Model {
    pub name: String,
    pub bos: String,
    pub eos: String,
    pub control: Vec<String>,
    chats: BTreeMap<String, Outcome>,
}

fn read(name: &str) -> String {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/templates");
    fs::read_to_string(folder.join(name)).unwrap()
}

/// The models, with their templates.
pub fn models() -> Vec<(Model, String)> {
    let models: Vec<Model> = serde_json::from_str(&read("expected.json")).unwrap();
    let template = |model: &Model| read(&format!("{}.jinja", model.name));
    models
        .into_iter()
        .map(|model| (template(&model), model))
        .map(|(template, model)| (model, template))
        .collect()
}

/// A file of a model with a token for each byte.
pub fn file(model: &Model, template: &str) -> File {
    let control: Vec<_> = model.control.iter().map(String::as_str).collect();
    let id = |name: &str| Value::U32(258 + control.iter().position(|token| *token == name).unwrap() as u32);
    File::byte_level(&control)
        .with("chat_template", Value::String(template.into()))
        .with("ggml.bos_token_id", id(&model.bos))
        .with("ggml.eos_token_id", id(&model.eos))
}

fn options(chat: &Chat) -> ChatOptions {
    ChatOptions {
        add_generation_prompt: chat.add_generation_prompt,
        variables: chat.variables.clone(),
        now: Some(date(2026, 7, 6).at(9, 5, 3, 0).to_zoned(TimeZone::UTC).unwrap()),
        ..ChatOptions::default()
    }
}

#[test]
fn templates_of_public_models_write_what_jinja2_writes() {
    let chats: Vec<Chat> = serde_json::from_str(&read("chats.json")).unwrap();
    let models = models();
    assert!(models.len() > 10);
    let mut wrong = Vec::new();
    for (model, template) in &models {
        let text = file(model, template).text().unwrap();
        assert_eq!(text.warnings(), [""; 0], "{}", model.name);
        let names = Names::new(model.control.iter().map(|name| (name.as_str(), 0)));
        for chat in &chats {
            let place = format!("{}, {}", model.name, chat.name);
            let ids = text.render_chat(&chat.messages, &chat.tools, &options(chat));
            match (&model.chats[&chat.name], ids) {
                (Outcome::Text(expected), Ok(ids)) => {
                    if decode(&text, &ids) != *expected {
                        wrong.push(format!("{place}:\n{}\n--- expected\n{expected}", decode(&text, &ids)));
                        continue;
                    }
                    // No message has a name of one, so all are the template's.
                    let expected = names.split(expected, |_| true);
                    let expected: Vec<_> = expected
                        .iter()
                        .filter(|piece| piece.token.is_some())
                        .map(|piece| piece.text)
                        .collect();
                    assert_eq!(control_of(&text, &ids), expected, "{place}");
                }
                (Outcome::Error(expected), Err(error)) => {
                    assert!(error.to_string().contains(expected), "{place}: {error}");
                }
                (Outcome::Text(_), Err(error)) => wrong.push(format!("{place}: {error}")),
                (Outcome::Error(expected), Ok(ids)) => {
                    wrong
                        .push(format!("{place}: {}\n--- expected an error, {expected}", decode(&text, &ids)));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n======\n"));
}

fn render(template: &str, messages: &[Message]) -> Result<String, String> {
    let file = File::byte_level(&["<s>", "</s>"])
        .with("chat_template", Value::String(template.into()))
        .with("ggml.bos_token_id", Value::U32(258));
    let text = file.text().unwrap();
    let ids = text.render_chat(messages, &[], &ChatOptions::default());
    ids.map(|ids| decode(&text, &ids)).map_err(|error| error.to_string())
}

#[test]
fn values_are_written_as_python_writes_them() {
    for (expression, expected) in [
        ("none", "None"),
        ("true ~ ''", "True"),
        ("(1 == 1) | string", "True"),
        (
            "[1, 2.0, 'it\\'s', \"a\\n\", none, true, {'k': []}]",
            r#"[1, 2.0, "it's", 'a\n', None, True, {'k': []}]"#,
        ),
        ("1e-7", "1e-07"),
        ("1e22", "1e+22"),
        ("{'a': [1, {'b': 'é<&>\"'}], 'c': none} | tojson", r#"{"a": [1, {"b": "é<&>\""}], "c": null}"#),
        ("{'a': [1, {}], 'b': []} | tojson(indent=2)", "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": []\n}"),
        ("{'b': 1, 'a': 'é'} | tojson(sort_keys=true, ensure_ascii=true)", r#"{"a": "\u00e9", "b": 1}"#),
        ("[1, 2] | tojson(separators=(',', ':'))", "[1,2]"),
        ("'ab'.removeprefix('a') + 'ab'.removesuffix('b')", "ba"),
        ("missing", ""),
    ] {
        let written = render(&format!("{{{{ {expression} }}}}"), &[]);
        assert_eq!(written.as_deref(), Ok(expected), "{expression}");
    }
}

#[test]
fn what_a_template_does_not_take_is_said() {
    let user = [Message::new(Role::User, "Hi")];
    let raised = render("\n{% if true %}{{ raise_exception('Only ' ~ 2 ~ ' turns') }}{% endif %}", &user);
    assert_eq!(raised.unwrap_err(), "the model's chat template does not take these messages: Only 2 turns");
    let failed = render("\n{{ messages[0].content.foo() }}", &user).unwrap_err();
    assert!(failed.starts_with("the model's chat template fails in line 2: "), "{failed}");
    let endless =
        render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", &user);
    assert!(endless.unwrap_err().contains("fuel"));
    let long = render("{% for a in range(99999) %}{{ 'abcdefgh' * 99999 }}{% endfor %}", &user);
    assert_eq!(long.unwrap_err(), "the model's chat template writes more than 64 MiB");
    // One that is no template is a warning, as text can still be continued.
    let file = File::byte_level(&[]).with("chat_template", Value::String("{% if %}".into()));
    let text = file.text().unwrap();
    assert!(text.warnings()[0].contains("chat template fails in line 1"), "{:?}", text.warnings());
    let error = text.render_chat(&user, &[], &ChatOptions::default()).unwrap_err();
    assert!(error.to_string().contains("chat template fails in line 1"), "{error}");
}

#[test]
fn blocks_for_trainers_and_loop_controls_are_known() {
    let template = "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}\
                    {%- generation %} {{ m.content }} {%- endgeneration %};{% endfor %}";
    let messages: Vec<_> = ["a", "b", "c"].map(|text| Message::new(Role::User, text)).into();
    assert_eq!(render(template, &messages).as_deref(), Ok(" a; b;"));
}

#[test]
fn arguments_of_calls_are_objects() {
    let message = |arguments: &str| -> Message {
        let json = format!(
            r#"{{"role": "assistant", "content": null, "tool_calls": [
                {{"id": "1", "type": "function", "function": {{"name": "f", "arguments": {arguments}}}}}]}}"#
        );
        serde_json::from_str(&json).unwrap()
    };
    let template = "{{ messages[0].tool_calls[0].function.arguments | tojson }}";
    for arguments in [r#"{"b":1,"a":2}"#, r#""{\"b\":1,\"a\":2}""#] {
        assert_eq!(render(template, &[message(arguments)]).as_deref(), Ok(r#"{"b": 1, "a": 2}"#));
    }
    // Or their text, where a template joins it to other text.
    let joined = "{{ 'f: ' + messages[0].tool_calls[0].function.arguments }}";
    for arguments in [r#"{"b":1,"a":2}"#, r#""{\"b\":1,\"a\":2}""#] {
        assert_eq!(render(joined, &[message(arguments)]).as_deref(), Ok(r#"f: {"b":1,"a":2}"#));
    }
    let error = render(template, &[message(r#""[1]""#)]).unwrap_err();
    assert!(error.contains("the call of `f`") && error.contains("expected a JSON object"), "{error}");
    let parts =
        r#"{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}"#;
    assert_eq!(
        render("{{ messages[0].content }}", &[serde_json::from_str(parts).unwrap()]).as_deref(),
        Ok("a\nb")
    );
}

#[test]
fn chats_that_are_too_long_are_refused_before_they_are_tokenized() {
    let file = File::byte_level(&["<s>", "</s>"])
        .with("chat_template", Value::String("<s>{{ messages[0].content * 1000 }}".into()))
        .with("ggml.bos_token_id", Value::U32(258));
    let text = file.text().unwrap();
    let render = |content: &str, max_tokens| {
        let options = ChatOptions { max_tokens, ..ChatOptions::default() };
        text.render_chat(&[Message::new(Role::User, content)], &[], &options)
    };
    // No token has more than four bytes.
    assert_eq!(text.fewest_tokens(4000), 1000);
    assert_eq!(render("abcd", Some(1001)).unwrap().len(), 4001);
    let error = render("abcd", Some(1000)).unwrap_err();
    assert_eq!(error.downcast_ref(), Some(&ChatError::TooManyTokens { fewest: 1001, most: 1000 }));
    let error = render(&"a".repeat(20_000), None).unwrap_err();
    assert_eq!(error.to_string(), "the chat is too long; expected at most 16777216 bytes");
}

#[test]
fn long_texts_are_tokenized_one_at_a_time() {
    let text = File::byte_level(&[]).text().unwrap();
    let (short, long) = ("a".repeat(1_000_000), "a".repeat(1_100_000));
    thread::scope(|scope| {
        let alone = text.alone.lock().unwrap();
        let waiting = scope.spawn(|| text.encode(&long).len());
        for _ in 0..2 {
            assert_eq!(text.encode(&short).len(), short.len());
        }
        assert!(!waiting.is_finished());
        drop(alone);
        assert_eq!(waiting.join().unwrap(), long.len());
    });
}
