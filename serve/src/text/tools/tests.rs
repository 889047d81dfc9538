//! Calls in texts that are cut everywhere, formats of templates, and calls of random models.

mod parameters;

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::{NoToolFormat, ToolFormat, ToolParser, ToolPiece};
use crate::{
    constraint::tests::{answers, drawn, engine, texts},
    text::tests::templates,
};

const FORMATS: [ToolFormat; 11] = [
    ToolFormat::Hermes,
    ToolFormat::Llama,
    ToolFormat::Mistral,
    ToolFormat::MistralArgs,
    ToolFormat::Granite,
    ToolFormat::Jamba,
    ToolFormat::InternLm2,
    ToolFormat::DeepSeekV3,
    ToolFormat::DeepSeekV31,
    ToolFormat::Qwen3Coder,
    ToolFormat::Glm,
];

/// The tools that are known.
fn tools() -> Vec<Value> {
    let tool = |name, parameters| json!({ "type": "function", "function": { "name": name, "parameters": parameters } });
    vec![
        tool("now", Value::Null),
        tool("add \"é\"", json!({ "type": "object" })),
        tool("add", parameters::schema()),
    ]
}

/// What was said: text, and the names and arguments of calls.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Said {
    text: String,
    calls: Vec<(String, String)>,
}

/// What comes of pieces.
fn parse<'a>(format: ToolFormat, pieces: impl IntoIterator<Item = &'a str>) -> Said {
    let mut parser = ToolParser::new(format, &tools());
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
    let parser = ToolParser::new(ToolFormat::Mistral, &[]).push(r#"[TOOL_CALLS][{"name": "f"}]"#);
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
    assert_eq!(ToolFormat::of(template), Ok(ToolFormat::MistralArgs));
    let parser = ToolParser::new(ToolFormat::MistralArgs, &[]).push("[TOOL_CALLS]f[ARGS]{}");
    let ToolPiece::Call { id, .. } = &parser[0] else { panic!("{parser:?}") };
    assert!(id.len() == 9 && id.chars().all(|c| c.is_ascii_alphanumeric()));
}

#[test]
fn calls_in_other_lists_and_marks_are_found_wherever_the_text_is_cut() {
    let sum = r#"{"a": 1, "b": {"c": ["}", "\"]"]}}"#;
    let calls = [("add", sum), ("now", "{}")];
    let [one, two] = calls.map(|(name, of)| format!("{{\"name\": \"{name}\", \"arguments\": {of}}}"));
    check(ToolFormat::Granite, &format!("<|tool_call|>[{one}, {two}]"), "", &calls);
    check(ToolFormat::Granite, &format!("So. <|tool_call|> [{one},\n{two}] !"), "So. !", &calls);
    check(ToolFormat::Jamba, &format!("So.<tool_calls>[\n  {one},{two}\n]</tool_calls>"), "So.", &calls);
    let [one, two] = [one, two].map(|call| call.replace("arguments", "parameters"));
    let call = |call| format!("<|action_start|><|plugin|>\n{call}<|action_end|>");
    check(ToolFormat::InternLm2, &format!("So. {}\n{}", call(one), call(two)), "So.", &calls);
    for text in
        ["<|tool_call|>", "<|tool_call|>[1]", "<|action_start|> {}", "<|action_start|><|interpreter|>"]
    {
        for format in [ToolFormat::Granite, ToolFormat::InternLm2] {
            check(format, text, text, &[]);
        }
    }
}

#[test]
fn calls_of_deepseek_are_found_wherever_the_text_is_cut() {
    let sum = r#"{"a": 1, "b": {"c": ["}", "```", "<｜tool▁call▁end｜>"]}}"#;
    let v3 = |name: &str, arguments: &str| {
        format!(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"
        )
    };
    let v31 = |name: &str, arguments: &str| {
        format!("<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>")
    };
    let calls = [("add", sum), ("now", "{}"), ("é", "{\"x\": null}")];
    for (format, between, written) in [
        (ToolFormat::DeepSeekV3, "\n", calls.map(|(name, of)| v3(name, of))),
        (ToolFormat::DeepSeekV31, "", calls.map(|(name, of)| v31(name, of))),
    ] {
        let check = |text: &str, said: &str, calls: &[(&str, &str)]| check(format, text, said, calls);
        let list = written.join(between);
        check(&format!("<｜tool▁calls▁begin｜>{list}<｜tool▁calls▁end｜>"), "", &calls);
        check(
            &format!("I look.\n\n<｜tool▁calls▁begin｜>\n{list}\n<｜tool▁calls▁end｜>\n"),
            "I look.",
            &calls,
        );
        // Without the marks around all calls, and without those at the end.
        check(&list, "", &calls);
        check(written[0].trim_end_matches("<｜tool▁call▁end｜>"), "", &calls[..1]);
        // A mark behind which no call comes is text, and one in it counts.
        check(&format!("<｜tool▁calls▁begin｜>no {}", written[1]), "<｜tool▁calls▁begin｜>no", &calls[1..2]);
        for text in [
            "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n[1]\n```",
            "<｜tool▁call▁begin｜>now\n{}",
            "<｜tool▁sep｜>now",
        ] {
            check(text, text, &[]);
        }
    }
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
        // What begins with this is a call of GLM, whatever its name.
        let is_call = |format| format == ToolFormat::Glm && text.contains("</tool_call>");
        for format in FORMATS.into_iter().filter(|format| !is_call(*format)) {
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
            Just("<|tool_call|>"), Just("<tool_calls>"), Just("</tool_calls>"), Just("<|action_start|>"), Just("<|plugin|>"), Just("<|action_end|>"),
            Just("<｜tool▁calls▁begin｜>"), Just("<｜tool▁call▁begin｜>"), Just("function"), Just("<｜tool▁sep｜>"), Just("```json"), Just("```"),
            Just("<function="), Just("now>"), Just("add>"), Just("<parameter="), Just("text>"), Just("</parameter>"), Just("</function>"),
            Just("<arg_key>"), Just("</arg_key>"), Just("<arg_value>"), Just("</arg_value>"), Just("now"), Just("text"),
        ], 0..14),
        cuts in prop::collection::vec(0..200usize, 0..6),
    ) {
        let text = parts.concat();
        for format in FORMATS {
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut % (text.len() + 1)).chain([0, text.len()]).collect();
            cuts.retain(|cut| text.is_char_boundary(*cut));
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
    assert_eq!(of(Ok(ToolFormat::Hermes)), ["qwen2.5", "qwen3", "hermes2-tools"]);
    assert_eq!(of(Ok(ToolFormat::Llama)), ["llama3.1", "llama3.2"]);
    assert_eq!(of(Ok(ToolFormat::Mistral)), ["mistral-nemo", "mistral-v3"]);
    assert_eq!(of(Ok(ToolFormat::Granite)), ["granite3.3"]);
    assert_eq!(of(Err(NoToolFormat::NotRead)), ["gpt-oss"]);
    // What templates have in common that are as these models' are.
    let each = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ call.arguments }}";
    for (marks, format) in [
        (
            "<tool_call> <function= <parameter= </parameter> </function> </tool_call>",
            Ok(ToolFormat::Qwen3Coder),
        ),
        ("<tool_call> <arg_key> </arg_key> <arg_value> </arg_value> </tool_call>", Ok(ToolFormat::Glm)),
        (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜> ```json",
            Ok(ToolFormat::DeepSeekV3),
        ),
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜> <｜tool▁sep｜>", Ok(ToolFormat::DeepSeekV31)),
        ("<|tool_call|>", Ok(ToolFormat::Granite)),
        ("<tool_calls>[]</tool_calls>", Ok(ToolFormat::Jamba)),
        ("<|action_start|><|plugin|>", Ok(ToolFormat::InternLm2)),
        // Hunyuan, Kimi K2, and Python as Llama 4 has it.
        ("<tool_calls><tool_call>name ```json", Err(NoToolFormat::NotRead)),
        ("<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>", Err(NoToolFormat::NotRead)),
        ("[f(x=1)]", Err(NoToolFormat::NotRead)),
    ] {
        assert_eq!(ToolFormat::of(&format!("{each}{marks}")), format, "{marks}");
        assert_eq!(ToolFormat::of(marks), Err(NoToolFormat::NotTold), "{marks}");
    }
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
                    // A character may be cut off.
                    assert!(said.text.is_empty() || answer.text.ends_with('\u{fffd}'), "{}", answer.text);
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
