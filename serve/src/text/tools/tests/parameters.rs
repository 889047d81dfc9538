//! Calls whose arguments stand each for itself.

use super::*;
use crate::constraint::InvalidConstraint;

/// Arguments of all kinds.
pub fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "text": { "type": "string" },
            "color": { "$ref": "#/$defs/color" },
            "maybe": { "anyOf": [{ "type": "string" }, { "type": "null" }], "default": null },
            "count": { "type": "integer" },
            "share": { "type": ["number", "string"] },
            "on": { "type": "boolean" },
            "list": { "type": "array", "items": { "type": "string" } },
            "object": { "$ref": "#/$defs/pair" },
            "loop": { "$ref": "#/$defs/loop" },
            "any": {},
        },
        "required": ["text"],
        "$defs": {
            "color": { "type": "string", "enum": ["red", "green"] },
            "pair": { "type": "object", "properties": { "a": { "type": "integer" } } },
            "loop": { "$ref": "#/$defs/loop" },
        },
    })
}

/// A call of `add` with these arguments, each as it is between the marks.
fn written(format: ToolFormat, arguments: &[(&str, &str)]) -> String {
    let one = |(key, value): &(&str, &str)| match format {
        ToolFormat::Glm => format!("<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"),
        _ => format!("<parameter={key}>\n{value}\n</parameter>\n"),
    };
    let arguments: String = arguments.iter().map(one).collect();
    match format {
        ToolFormat::Glm => format!("<tool_call>add\n{arguments}</tool_call>"),
        _ => format!("<tool_call>\n<function=add>\n{arguments}</function>\n</tool_call>"),
    }
}

const OF_PARAMETERS: [ToolFormat; 2] = [ToolFormat::Qwen3Coder, ToolFormat::Glm];

#[test]
fn arguments_are_of_their_schemas_types() {
    for format in OF_PARAMETERS {
        for (key, value, json) in [
            ("text", "", r#""""#),
            ("text", "7", r#""7""#),
            ("text", "null", r#""null""#),
            (
                "text",
                " \"é\"\n\n\t\\ 😀 </param>\n <parameter </",
                r#"" \"é\"\n\n\t\\ 😀 </param>\n <parameter </""#,
            ),
            ("color", "red", r#""red""#),
            ("color", "true", r#""true""#),
            ("maybe", "null", "null"),
            ("maybe", "None", "null"),
            ("maybe", "42", r#""42""#),
            ("count", "42", "42"),
            ("count", " -123456789012345678901234567890 ", "-123456789012345678901234567890"),
            ("count", "four\nfive", r#""four\nfive""#),
            ("count", "NaN", r#""NaN""#),
            ("share", "0.5e3", "0.5e3"),
            ("share", "1/2", r#""1/2""#),
            ("share", "true", r#""true""#),
            ("on", "true", "true"),
            ("on", "False", "false"),
            ("list", "[\"a\", \"]\"]", "[\"a\", \"]\"]"),
            ("list", "[\"a\"", r#""[\"a\"""#),
            ("object", "{\"a\": {\"b\": [1, null]}}", "{\"a\": {\"b\": [1, null]}}"),
            ("object", "\n{\n  \"a\": 1\n}\n", "{\n  \"a\": 1\n}"),
            ("loop", "{}", "{}"),
            ("any", "1", "1"),
            ("any", "\"1\"", r#""\"1\"""#),
            ("any", "one", r#""one""#),
            ("other", "[]", "[]"),
            ("oth\"er", "x", r#""x""#),
        ] {
            let arguments = format!("{{{}: {json}}}", json!(key));
            assert!(serde_json::from_str::<Value>(&arguments).is_ok(), "{arguments}");
            check(format, &written(format, &[(key, value)]), "", &[("add", &arguments)]);
        }
    }
}

#[test]
fn calls_of_parameters_are_found_wherever_the_text_is_cut() {
    for format in OF_PARAMETERS {
        let check = |text: &str, said: &str, calls: &[(&str, &str)]| check(format, text, said, calls);
        let call = written(format, &[("text", "a\nb"), ("count", "1"), ("text", "c")]);
        let arguments = r#"{"text": "a\nb", "count": 1, "text": "c"}"#;
        check(&call, "", &[("add", arguments)]);
        let none = written(format, &[]);
        check(&format!("I look.\n{none}\n{call}\n"), "I look.", &[("add", "{}"), ("add", arguments)]);
        check(&format!("{none} and"), " and", &[("add", "{}")]);
        // Without line ends, and a tool that nobody knows, whose arguments may be anything.
        let unknown = call.replace("add", "é.f").replace('\n', "");
        check(&unknown, "", &[("é.f", r#"{"text": "ab", "count": 1, "text": "c"}"#)]);
        // What is cut off is not whole.
        let cut = call.find("\nb").unwrap();
        check(&call[..cut], "", &[("add", "{\"text\": \"a")]);
        // What follows an argument that does not belong there ends the call.
        let broken = call.replacen("</parameter>\n", "</parameter>\nNo", 1);
        let broken = broken.replacen("</arg_value>\n", "</arg_value>\nNo", 1);
        let said = parse_cut(format, &broken);
        assert_eq!(said.calls[0], ("add".into(), r#"{"text": "a\nb"}"#.into()));
        assert!(said.text.starts_with("\nNo<"), "{said:?}");
    }
}

#[test]
fn what_qwen3_coder_forgets_is_forgiven() {
    let check =
        |text: &str, said: &str, calls: &[(&str, &str)]| check(ToolFormat::Qwen3Coder, text, said, calls);
    check("So: <function=now>\n</function>\n</tool_call>", "So:", &[("now", "{}")]);
    let arguments = r#"{"text": "a", "count": 1}"#;
    check("<function=add><parameter=text>a<parameter=count>1</function>", "", &[("add", arguments)]);
    check(
        "<tool_call><function=add><parameter=text>\na\n</parameter><parameter=count>1</parameter></tool_call>!",
        "!",
        &[("add", arguments)],
    );
    for text in [
        "<tool_call>now</tool_call>",
        "<tool_call>\n{\"name\": \"now\"}",
        "<function=>",
        "<function=now",
        "<function=now></tool_call>",
        "<function=now> x <function=",
        "<function=now><parameter=a\n>",
        "<parameter=a>1</parameter>",
    ] {
        check(text, text, &[]);
    }
}

#[test]
fn a_mark_of_glm_without_a_call_is_text() {
    let check = |text: &str, said: &str, calls: &[(&str, &str)]| check(ToolFormat::Glm, text, said, calls);
    check("<tool_call>now</tool_call>", "", &[("now", "{}")]);
    check("<tool_call>no <tool_call>now</tool_call>", "<tool_call>no", &[("now", "{}")]);
    for text in ["<tool_call></tool_call>", "<tool_call>now\nthen</tool_call>", "<tool_call>f<arg_value>"] {
        check(text, text, &[]);
    }
}

#[test]
fn random_models_give_the_arguments_that_they_have_to() {
    let parameters = json!({
        "type": "object",
        "properties": {
            "text": { "type": "string", "minLength": 1, "maxLength": 6 },
            "maybe": { "anyOf": [{ "$ref": "#/$defs/color" }, { "type": "null" }] },
            "list": { "type": "array", "items": { "$ref": "#/$defs/color" }, "maxItems": 2 },
            "free": { "type": "string" },
        },
        "required": ["text", "list"],
        "additionalProperties": false,
        "$defs": { "color": { "enum": ["red", "light\n\"green\""] } },
    });
    let tools = [json!({ "function": { "name": "paint", "parameters": parameters } })];
    let colors = [json!("red"), json!("light\n\"green\"")];
    for text in texts() {
        let engine = engine(&text, 600);
        for format in OF_PARAMETERS {
            let grammar = engine.compile(&format.constraint(&text, &tools, true, None).unwrap()).unwrap();
            let mut complete = 0;
            for seed in 0..8 {
                let likely = |it: &str| (text.encode(it).last().copied().unwrap(), 5.0);
                let logit_bias = ["<", "]", "/"].map(likely).into();
                let params = crate::SamplingParams { logit_bias, ..drawn(seed, 1500) };
                let answer = answers(&engine, &grammar, params).remove(0);
                let mut parser = ToolParser::new(format, &tools);
                let mut pieces = parser.push(&answer.text);
                pieces.extend(parser.finish());
                if answer.end.finish.reason() != "stop" {
                    continue;
                }
                complete += 1;
                let mut calls = 0;
                for piece in pieces {
                    match piece {
                        ToolPiece::Text(said) => panic!("{said:?} of {}", answer.text),
                        ToolPiece::Call { name, .. } => assert_eq!(name, "paint"),
                        ToolPiece::Arguments { text, .. } => {
                            calls += 1;
                            let it: Value = serde_json::from_str(&text).unwrap();
                            let length = it["text"].as_str().unwrap().chars().count();
                            assert!((1..=6).contains(&length), "{text}");
                            assert!(it["maybe"].is_null() || colors.contains(&it["maybe"]), "{text}");
                            let list = it["list"].as_array().unwrap();
                            assert!(
                                list.len() <= 2 && list.iter().all(|color| colors.contains(color)),
                                "{text}"
                            );
                            assert!(it.get("free").is_none_or(Value::is_string), "{text}");
                        }
                    }
                }
                assert!(calls > 0, "{}", answer.text);
            }
            assert!(complete > 2, "{format:?}: {complete}");
        }
    }
}

#[test]
fn schemas_that_do_not_hold_argument_by_argument_are_refused() {
    let [text, _] = texts();
    let of_tool = |name: &str, parameters: Value| -> Result<_, InvalidConstraint> {
        let tool = json!({ "function": { "name": name, "parameters": parameters } });
        ToolFormat::Glm.constraint(&text, &[tool], true, None)
    };
    let object = |property: Value| json!({ "type": "object", "properties": { "a": property } });
    for (parameters, problem) in [
        (json!({ "anyOf": [] }), "tool 0: the keyword `anyOf` cannot be kept"),
        (json!({ "type": "array" }), "another type than `object`"),
        (json!(1), "#: a number"),
        (json!(true), "no object"),
        (object(json!({ "type": "string", "pattern": "^a$" })), "its parameter `a`: the keyword `pattern`"),
        (object(json!({ "type": ["string", "integer"] })), "cannot be told from strings"),
        (object(json!({ "enum": ["a", 1] })), "1 beside strings"),
        (object(json!({ "anyOf": [{ "type": "string" }, { "type": "array" }] })), "beside strings"),
        (object(json!({ "enum": ["</arg_value>"] })), "mark of the model's own"),
        (json!({ "type": "object", "properties": { "<a>": {} } }), "cannot be named"),
        (json!({ "properties": [] }), "tool 0: #/properties: an array; expected an object"),
        (json!({ "required": 1 }), "no list of names"),
        (json!({ "required": [1] }), "no list of names"),
        (object(json!(5)), "#/properties/a: a number"),
        (object(json!({ "type": "strin" })), "the type \"strin\" is not known"),
        (object(json!({ "type": ["string", 1] })), "the type 1 is not known"),
        (object(json!({ "$ref": "#/nowhere" })), "no place in the schema"),
        (object(json!({ "$ref": "#/properties/a" })), "nested deeper than 16"),
        (object(json!({ "type": "string", "maxLength": -1 })), "its `maxLength` is no length"),
        (object(json!({ "type": "string", "minLength": 5, "maxLength": 2 })), "at least 5 and at most 2"),
    ] {
        let error = of_tool("f", parameters.clone()).unwrap_err().to_string();
        assert!(error.contains(problem), "{parameters}: {error}");
    }
    let error = of_tool("a<b", Value::Null).unwrap_err().to_string();
    assert!(error.contains("the name of tool 0 has brackets"), "{error}");
    let all = of_tool("f", schema()).unwrap_err().to_string();
    assert!(all.contains("its parameter `share`"), "{all}");
}
