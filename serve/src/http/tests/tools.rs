//! Answers that have to be JSON, and calls of tools, of a model that says anything.

use serde_json::{Value, json};

use super::*;

/// A template by which tools are called as Hermes calls them.
const TEMPLATE: &str = "{% if tools %}{{ tools | tojson }} <tool_call>arguments{% endif %}\
                        {% for message in messages %}{{ message.content }}\n{% endfor %}";

/// What other templates write of calls.
const QWEN3_CODER: &str =
    "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>";
const OTHERS: [&str; 5] = [
    QWEN3_CODER,
    "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "<|tool_call|>[{}]",
];

/// A template that writes this of calls.
fn template(calls: &str) -> String {
    TEMPLATE.replace("<tool_call>", calls)
}

fn server() -> TestServer {
    TestServer::with(options(), llm_with(TEMPLATE))
}

/// A chat whose answer is drawn.
fn drawn(fields: Value) -> Value {
    let body = json!({
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 600, "temperature": 1, "seed": 4,
    });
    with(body, fields)
}

fn tools() -> Value {
    let tool = |name: &str, key: &str| {
        let parameters = json!({
            "type": "object", "properties": {(key): {"enum": ["one", "two"]}}, "required": [key],
            "additionalProperties": false,
        });
        json!({"type": "function", "function": {"name": name, "description": "A tool", "parameters": parameters}})
    };
    json!([tool("first", "a"), tool("second", "b")])
}

#[test]
fn answers_are_json_of_their_schema() {
    let server = server();
    let schema = json!({
        "type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, 2]}}, "required": ["a", "b"],
        "additionalProperties": false,
    });
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": true}});
    let body = drawn(json!({"response_format": format, "n": 4}));
    let whole = server.chat(&body).ok();
    for choice in whole["choices"].as_array().unwrap() {
        let answer: Value = serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
        assert!(answer["a"].is_boolean() && answer["b"].is_u64(), "{answer}");
        assert_eq!((answer.as_object().unwrap().len(), &choice["finish_reason"]), (2, &json!("stop")));
    }
    let completion = json!({
        "prompt": "x", "max_tokens": 600, "temperature": 1, "seed": 1, "response_format": body["response_format"],
    });
    let answer = server.complete(&completion).ok()["choices"][0]["text"].clone();
    assert!(serde_json::from_str::<Value>(answer.as_str().unwrap()).unwrap()["a"].is_boolean());
    let object = server.chat(&drawn(json!({"response_format": {"type": "json_object"}}))).ok();
    assert!(object["choices"][0]["message"]["content"].as_str().unwrap().trim_start().starts_with('{'));
}

#[test]
fn schemas_that_cannot_be_used_are_refused() {
    let server = server();
    for schema in [json!({"type": "no such type"}), json!({"not": {}}), json!({"no such keyword": 1})] {
        let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
        let error = server.chat(&drawn(json!({"response_format": format}))).error(400);
        assert_eq!(error["param"], "response_format", "{schema}: {error}");
    }
    let mut wrong = tools();
    wrong[0]["function"]["parameters"] = json!({"type": "no such type"});
    let error = server.chat(&drawn(json!({"tools": wrong, "tool_choice": "required"}))).error(400);
    assert_eq!(error["param"], "tools", "{error}");
}

#[test]
fn tools_are_called_where_they_have_to_be() {
    let templates = OTHERS.iter().map(|calls| template(calls)).chain([TEMPLATE.into()]);
    for template in templates {
        tools_are_called_by(&TestServer::with(options(), llm_with(&template)));
    }
}

fn tools_are_called_by(server: &TestServer) {
    let named = json!({"type": "function", "function": {"name": "second"}});
    for (choice, names, finish_reason) in
        [(json!("required"), &["first", "second"][..], "tool_calls"), (named, &["second"], "stop")]
    {
        let body = drawn(json!({"tools": tools(), "tool_choice": choice, "parallel_tool_calls": false}));
        let whole = server.chat(&body).ok()["choices"][0].clone();
        assert_eq!(
            (&whole["finish_reason"], &whole["message"]["content"]),
            (&json!(finish_reason), &Value::Null)
        );
        let calls = whole["message"]["tool_calls"].as_array().unwrap();
        assert_eq!((calls.len(), &calls[0]["type"]), (1, &json!("function")));
        let function = &calls[0]["function"];
        assert!(names.contains(&function["name"].as_str().unwrap()), "{function}");
        let arguments: Value = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
        let key = if function["name"] == "first" { "a" } else { "b" };
        assert!(["one", "two"].contains(&arguments[key].as_str().unwrap()), "{arguments}");

        let chunks = server.stream("/v1/chat/completions", &with(body, json!({"stream": true}))).chunks();
        let deltas: Vec<_> = chunks
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["delta"]["tool_calls"].as_array().cloned())
            .flatten()
            .collect();
        assert_eq!((&deltas[0]["function"]["name"], &deltas[0]["index"]), (&function["name"], &json!(0)));
        assert!(deltas[0]["id"].is_string() && deltas[1..].iter().all(|delta| delta.get("id").is_none()));
        let streamed: String =
            deltas.iter().filter_map(|delta| delta["function"]["arguments"].as_str()).collect();
        assert_eq!(streamed, function["arguments"].as_str().unwrap());
        assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], finish_reason);
        let marks = ["tool_call>", "<function", "<arg_", "｜", "tool_call|>"];
        let is_shown = |mark: &&str| chunks.iter().any(|chunk| chunk.to_string().contains(*mark));
        assert_eq!(marks.iter().find(|mark| is_shown(mark)), None);
    }
}

#[test]
fn an_answer_is_json_or_calls_where_both_are_asked_for() {
    let server = server();
    let schema = json!({
        "type": "object", "properties": {"c": {"type": "boolean"}}, "required": ["c"], "additionalProperties": false,
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    // The model would rather begin with `{` than with `<`.
    let asked = drawn(json!({"tools": tools(), "response_format": format, "n": 4}));
    let likes_calls = with(asked.clone(), json!({"logit_bias": {"60": 100}}));
    let texts = server.chat(&asked).ok()["choices"].clone();
    let calls = server.chat(&likes_calls).ok()["choices"].clone();
    for choice in texts.as_array().unwrap() {
        let answer: Value = serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
        assert!(answer["c"].is_boolean() && choice["finish_reason"] == "stop", "{choice}");
    }
    for choice in calls.as_array().unwrap() {
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        assert!(!calls.is_empty() && choice["finish_reason"] == "tool_calls", "{choice}");
        for call in calls {
            let arguments: Value =
                serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
            let key = if call["function"]["name"] == "first" { "a" } else { "b" };
            assert!(["one", "two"].contains(&arguments[key].as_str().unwrap()), "{call}");
        }
    }
    // Tools of which one has to be called come before.
    let body = drawn(json!({"tools": tools(), "response_format": format, "tool_choice": "required"}));
    assert!(server.chat(&body).ok()["choices"][0]["message"]["tool_calls"].is_array());
}

#[test]
fn tools_that_cannot_be_called_are_refused() {
    let server = server();
    for (fields, param) in [
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tools": tools(), "tool_choice": "always"}), "tool_choice"),
        (
            json!({"tools": tools(), "tool_choice": {"type": "function", "function": {"name": "third"}}}),
            "tool_choice",
        ),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
    ] {
        assert_eq!(server.chat(&drawn(fields.clone())).error(400)["param"], param, "{fields}");
    }
    // Tools that are not to be called are not told of.
    let prompt = |fields| {
        server.chat(&drawn(with(json!({"max_tokens": 1}), fields))).ok()["usage"]["prompt_tokens"].clone()
    };
    let none = prompt(json!({}));
    assert_eq!(prompt(json!({"tools": tools(), "tool_choice": "none"})), none);
    assert!(prompt(json!({"tools": tools()})).as_u64() > none.as_u64());
    // A template that does not tell of tools, and one that has them called in another form.
    let python = "{% if tools %}{{ tools | tojson }} [f(x=1)]{% endif %}{{ messages[0].content }}";
    let other = TestServer::with(options(), llm_with(python));
    for (server, why) in
        [(TestServer::start(), "does not tell it of tools"), (other, "form that is not read")]
    {
        let error = server.chat(&with(chat("x", 1), json!({"tools": tools()}))).error(400);
        assert_eq!(error["param"], "tools");
        assert!(error["message"].as_str().unwrap().contains(why), "{error}");
    }
    // Where strings have no quotes, not all that is said of them holds.
    let server = TestServer::with(options(), llm_with(&template(QWEN3_CODER)));
    let mut dates = tools();
    dates[0]["function"]["parameters"]["properties"]["a"] = json!({"type": "string", "format": "date"});
    let error = server.chat(&drawn(json!({"tools": dates, "tool_choice": "required"}))).error(400);
    assert_eq!(error["param"], "tools");
    assert!(error["message"].as_str().unwrap().contains("`a`: the keyword `format`"), "{error}");
    server.chat(&drawn(json!({"tools": dates, "max_tokens": 1}))).ok();
}
