//! Calls in texts that are cut everywhere, formats of templates, and calls of random models.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::{ToolFormat, ToolParser, ToolPiece};
use crate::{
    constraint::tests::{answers, drawn, engine, texts},
    text::tests::templates,
};

const FORMATS: [ToolFormat; 4] =
    [ToolFormat::Hermes, ToolFormat::Llama, ToolFormat::Mistral, ToolFormat::MistralArgs];

/// What was said: text, and the names and arguments of calls.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Said {
    text: String,
    calls: Vec<(String, String)>,
}

/// What comes of pieces.
fn parse<'a>(format: ToolFormat, pieces: impl IntoIterator<Item = &'a str>) -> Said {
    let mut parser = ToolParser::new(format, ["add", "now", "add \"é\""]);
    let mut out = Vec::new();
    pieces.into_iter().for_each(|piece| out.extend(parser.push(piece)));
    let calls = parser.calls();
    out.extend(parser.finish());
    let mut said = Said::default();
    let mut ids = Vec::new();
    for piece in out {
        match piece {
            ToolPiece::Text(text) => said.text += &text,
            ToolPiece::Call { index, id, name } => {
                assert_eq!(index, said.calls.len());
                assert!(!ids.contains(&id));
                ids.push(id);
                said.calls.push((name, String::new()));
            }
            // Of the call that was last begun.
            ToolPiece::Arguments { index, text } => {
                assert_eq!(index + 1, said.calls.len());
                said.calls[index].1 += &text;
            }
        }
    }
    assert_eq!(calls, said.calls.len());
    said
}

/// What comes of a text, wherever it is cut.
fn parse_cut(format: ToolFormat, text: &str) -> Said {
    let whole = parse(format, [text]);
    for (at, _) in text.char_indices() {
        assert_eq!(parse(format, [&text[..at], &text[at..]]), whole, "cut at {at}: {text:?}");
    }
    let characters = text.char_indices().map(|(at, c)| &text[at..at + c.len_utf8()]);
    assert_eq!(parse(format, characters), whole, "{text:?}");
    whole
}

fn check(format: ToolFormat, text: &str, said: &str, calls: &[(&str, &str)]) {
    let calls = calls.iter().map(|(name, arguments)| ((*name).to_owned(), (*arguments).to_owned()));
    let expected = Said { text: said.into(), calls: calls.collect() };
    assert_eq!(parse_cut(format, text), expected, "{text:?}");
}

#[test]
fn calls_of_hermes_are_found_wherever_the_text_is_cut() {
    let check = |text: &str, said: &str, calls: &[(&str, &str)]| check(ToolFormat::Hermes, text, said, calls);
    let sum = r#"{"a": 1, "b": {"c": ["}", "\"]"]}}"#;
    check(
        &format!("<tool_call>\n{{\"name\": \"add\", \"arguments\": {sum}}}\n</tool_call>"),
        "",
        &[("add", sum)],
    );
    check(
        "I look.\n\n<tool_call>{\"name\":\"now\",\"arguments\":{}}</tool_call>\n<tool_call>\n{\"name\": \"é\", \"arguments\": {\"x\": 1.5e3}}\n</tool_call>\n",
        "I look.",
        &[("now", "{}"), ("é", "{\"x\": 1.5e3}")],
    );
    // Arguments first, as a string, or none.
    check(r#"<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>"#, "", &[("add", "{\"a\": 1}")]);
    check(
        r#"<tool_call>{"name": "add", "arguments": "{\"a\": \"\\n\"}"}</tool_call>!"#,
        "!",
        &[("add", r#"{"a": "\n"}"#)],
    );
    check(r#"<tool_call>{"name": "now"}</tool_call>"#, "", &[("now", "{}")]);
    check(r#"<tool_call>{"name": "now", "arguments": null}</tool_call>"#, "", &[("now", "{}")]);
    // Text goes on behind a call; one that is not closed, and one that is cut off.
    check("a <tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call> b", "a b", &[("now", "{}")]);
    check(
        "<tool_call>{\"name\": \"now\", \"arguments\": {}}\n<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1",
        "",
        &[("now", "{}"), ("add", "{\"a\": 1")],
    );
}

#[test]
fn calls_of_llama_are_found_wherever_the_text_is_cut() {
    let check = |text: &str, said: &str, calls: &[(&str, &str)]| check(ToolFormat::Llama, text, said, calls);
    check(r#"{"name": "add", "parameters": {"a": 1}}"#, "", &[("add", "{\"a\": 1}")]);
    check(
        "\n {\"type\": \"function\", \"name\": \"add\", \"parameters\": {\"a\": 1}}; {\"name\": \"now\", \"parameters\": {}}",
        "",
        &[("add", "{\"a\": 1}"), ("now", "{}")],
    );
    // A mark says that it is one, whatever its name.
    check(r#"Hm. <|python_tag|>{"name": "other", "parameters": {}}"#, "Hm.", &[("other", "{}")]);
    // JSON that is an answer comes back, and so does what is not at the beginning.
    for text in [
        r#"{"name": "Ada", "parameters": {"a": 1}}"#,
        r#" {"answer": 42}"#,
        r#"So: {"name": "add", "parameters": {"a": 1}}"#,
        "{",
        "{}",
        "{\"name\": \"add\"",
        "<|python_tag|>print(1)",
        "<|python",
    ] {
        check(text, text, &[]);
    }
}

#[test]
fn calls_of_mistral_are_found_wherever_the_text_is_cut() {
    let check =
        |text: &str, said: &str, calls: &[(&str, &str)]| check(ToolFormat::Mistral, text, said, calls);
    check(
        r#"[TOOL_CALLS] [{"name": "add", "arguments": {"a": [1, 2]}}, {"name": "now", "arguments": {}, "id": "abcdefghi"}]"#,
        "",
        &[("add", "{\"a\": [1, 2]}"), ("now", "{}")],
    );
    check(r#"Yes [TOOL_CALLS]{"name": "now", "arguments": {}}"#, "Yes", &[("now", "{}")]);
    check("[TOOL_CALLS] [{\"name\": \"now\", \"arguments\": {}},", "", &[("now", "{}")]);
    let parser = ToolParser::new(ToolFormat::Mistral, []).push(r#"[TOOL_CALLS][{"name": "f"}]"#);
    let ToolPiece::Call { id, .. } = &parser[0] else { panic!("{parser:?}") };
    assert!(id.len() == 9 && id.chars().all(|c| c.is_ascii_alphanumeric()));
}

#[test]
fn calls_of_later_mistral_are_found_wherever_the_text_is_cut() {
    let check =
        |text: &str, said: &str, calls: &[(&str, &str)]| check(ToolFormat::MistralArgs, text, said, calls);
    let sum = r#"{"a": 1, "b": {"c": ["}", "\"]"]}}"#;
    check(
        &format!("[TOOL_CALLS]add[ARGS]{sum}[TOOL_CALLS]now[ARGS]{{}}"),
        "",
        &[("add", sum), ("now", "{}")],
    );
    check(
        "I look. [TOOL_CALLS] add \"é\"[CALL_ID]abcdefghi[ARGS] {\"x\": 1}\n",
        "I look.",
        &[("add \"é\"", "{\"x\": 1}")],
    );
    check("[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]add[AR", "", &[("now", "{}")]);
    // A second mark counts.
    check("[TOOL_CALLS]no [TOOL_CALLS]now[ARGS]{}", "[TOOL_CALLS]no", &[("now", "{}")]);
    for text in [
        "[TOOL_CALLS]add[ARGS]1",
        "[TOOL_CALLS]add[ARGS]",
        "[TOOL_CALLS][ARGS]{}",
        "[TOOL_CALLS]a\nb[ARGS]{}",
        "[TOOL_CALLS]add[CALL_ID]abc",
        "[TOOL_CALLS]add[CALL_ID]abc[X",
        "add[ARGS]{}",
    ] {
        check(text, text, &[]);
    }
    let template =
        "{% for tool in tools %}…{% endfor %}[TOOL_CALLS]{{ call.name }}[ARGS]{{ call.arguments }}";
    assert_eq!(ToolFormat::of(template), Some(ToolFormat::MistralArgs));
    let parser = ToolParser::new(ToolFormat::MistralArgs, []).push("[TOOL_CALLS]f[ARGS]{}");
    let ToolPiece::Call { id, .. } = &parser[0] else { panic!("{parser:?}") };
    assert!(id.len() == 9 && id.chars().all(|c| c.is_ascii_alphanumeric()));
}

#[test]
fn what_is_no_call_comes_back_as_it_was() {
    for text in [
        "",
        " \n",
        "plain text \n\n",
        "1 < 2, <tool, <tool_call",
        "<tool_call> no object </tool_call>",
        "<tool_call><tool_call>",
        "<tool_call>{\"nam",
        "<tool_call>{\"name\": 5, \"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": \"a\", \"other\": 1}</tool_call>",
        "<tool_call>{\"name\": \"a\" \"arguments\": {}}</tool_call>",
        "<tool_call>{\"arguments\": {\"a\": ]}}</tool_call>",
        "<tool_call>{}</tool_call>  ",
        "[TOOL_CALLS]",
        "[TOOL_CALLS] none",
        "[TOOL_CALLS] [1, 2]",
    ] {
        for format in FORMATS {
            check(format, text, text, &[]);
        }
    }
    // A second mark counts.
    let text = "<tool_call> <tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    check(ToolFormat::Hermes, text, "<tool_call>", &[("f", "{}")]);
}

proptest! {
    #[test]
    fn cuts_make_no_difference(
        parts in prop::collection::vec(prop_oneof![
            Just("<tool_call>"), Just("</tool_call>"), Just("[TOOL_CALLS]"), Just("[ARGS]"), Just("[CALL_ID]"), Just("<|python_tag|>"), Just("{"), Just("}"),
            Just("["), Just("]"), Just(","), Just(";"), Just(":"), Just("\"name\""), Just("\"arguments\""), Just("\"now\""),
            Just("{\"name\": \"now\", \"arguments\": {"), Just("}}"), Just(" "), Just("\n"), Just("a"), Just("\\"), Just("1"),
        ], 0..14),
        cuts in prop::collection::vec(0..200usize, 0..6),
    ) {
        let text = parts.concat();
        for format in FORMATS {
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut % (text.len() + 1)).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]);
            let said = parse(format, pieces);
            prop_assert_eq!(&said, &parse(format, [text.as_str()]));
            if said.calls.is_empty() {
                prop_assert_eq!(&said.text, &text);
            }
        }
    }
}

#[test]
fn templates_say_how_tools_are_called() {
    let formats: Vec<_> = templates::models()
        .into_iter()
        .map(|(model, template)| {
            let text = templates::file(&model, &template).text().unwrap();
            (model.name, text.tool_format())
        })
        .collect();
    let of = |format| {
        let names = formats.iter().filter(|(_, of)| *of == format).map(|(name, _)| name.as_str());
        names.collect::<Vec<_>>()
    };
    assert_eq!(of(Some(ToolFormat::Hermes)), ["qwen2.5", "qwen3", "hermes2-tools"]);
    assert_eq!(of(Some(ToolFormat::Llama)), ["llama3.1", "llama3.2"]);
    assert_eq!(of(Some(ToolFormat::Mistral)), ["mistral-nemo", "mistral-v3"]);
}

#[test]
fn random_models_call_what_they_have_to() {
    let tools = [
        json!({ "type": "function", "function": { "name": "now" } }),
        json!({ "type": "function", "function": { "name": "add \"é\"", "parameters": {
            "type": "object", "properties": { "a": { "type": "integer", "minimum": 0, "maximum": 99 } },
            "required": ["a"], "additionalProperties": false } } }),
    ];
    for text in texts() {
        let engine = engine(&text, 600);
        for format in FORMATS {
            // One that must be called, and any.
            for (offered, parallel) in [(&tools[1..], false), (&tools[1..], true), (&tools[..], true)] {
                let constraint = format.constraint(&text, offered, parallel, None).unwrap();
                let grammar = engine.compile(&constraint).unwrap();
                let mut complete = 0;
                for seed in 0..8 {
                    let likely = |it: &str| (text.encode(it).last().copied().unwrap(), 4.0);
                    let logit_bias = ["\"", "}", "]", "1"].map(likely).into();
                    let params = crate::SamplingParams { logit_bias, ..drawn(seed, 900) };
                    let answer = answers(&engine, &grammar, params).remove(0);
                    let said = parse(format, [answer.text.as_str()]);
                    assert_eq!(said.text, "", "{}", answer.text);
                    if answer.end.finish.reason() != "stop" {
                        continue;
                    }
                    complete += 1;
                    assert!(!said.calls.is_empty() && (parallel || said.calls.len() == 1), "{}", answer.text);
                    for (name, arguments) in said.calls {
                        let object = serde_json::from_str::<BTreeMap<String, IgnoredAny>>(&arguments);
                        assert!(object.is_ok(), "{arguments}");
                        match name.as_str() {
                            "now" => assert_eq!(offered.len(), 2),
                            _ => {
                                let arguments: Value = serde_json::from_str(&arguments).unwrap();
                                let a = arguments["a"].as_f64();
                                assert!(a.is_some_and(|a| (0.0..100.0).contains(&a)), "{arguments}");
                            }
                        }
                    }
                }
                assert!(complete > 2, "{format:?}: {complete}");
            }
        }
    }
}

#[test]
fn tools_that_cannot_be_called_are_named() {
    let [text, _] = texts();
    let error =
        |tools: &[Value]| ToolFormat::Hermes.constraint(&text, tools, true, None).unwrap_err().to_string();
    assert!(error(&[]).contains("it is empty"));
    assert!(error(&[json!({ "function": {} })]).contains("tool 0 has no `function` with a `name`"));
    let tool = json!({ "function": { "name": "f", "parameters": { "not": {} } } });
    let constraint = ToolFormat::Hermes.constraint(&text, &[tool], true, None).unwrap();
    let error = engine(&text, 30).compile(&constraint).unwrap_err().to_string();
    assert!(error.contains("#: the keyword `not` is not supported"), "{error}");
}
