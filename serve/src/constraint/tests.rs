//! Constraints that are refused, and what random models answer under others.

use std::{collections::BTreeMap, sync::Arc};

use flashinfer_rs::kv::PageAllocator;
use regex_automata::meta::Regex;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::{Constraint, Grammar};
use crate::{
    backend::simulated::{Language, Simulated},
    engine::{Engine, EngineConfig},
    llm::{Completion, complete},
    request::{Finish, Request, SubmitError},
    sampling::SamplingParams,
    scheduler::Limits,
    tests::{bytes, sentencepiece},
    text::Text,
};

/// Tokenizers of both kinds.
pub fn texts() -> [Arc<Text>; 2] {
    let pieces = [
        ("{\"", -1.0, 1),
        ("\":", -1.0, 1),
        ("▁{", -1.0, 1),
        ("▁▁", -1.0, 1),
        ("true", -1.0, 1),
        ("é", -1.0, 1),
        ("\",", -1.0, 1),
        ("▁\"a", -1.0, 1),
    ];
    [bytes::text("gpt-2"), sentencepiece::with(&pieces).text().unwrap()]
}

/// An engine on random numbers, with few pages, and drafts for those who may have them.
pub fn engine(text: &Arc<Text>, pages: usize) -> Engine {
    let language = Language { vocab_size: text.vocab_size(), nan: 0 };
    let limits = Limits {
        step_tokens: 32,
        chunk_tokens: 32,
        max_running: 16,
        context: 4000,
        draft: 3,
        ends: text.ends().clone(),
    };
    let config = EngineConfig { page_size: 4, num_pages: pages, ..EngineConfig::new(limits) };
    let load = move |pool: &PageAllocator, limits: &mut Limits| {
        Ok(Simulated::new(pool, limits.step_capacity(), language))
    };
    Engine::start(config, text.clone(), load).unwrap()
}

pub fn drawn(seed: u64, max_tokens: usize) -> SamplingParams {
    SamplingParams {
        temperature: 1.0,
        seed: Some(seed),
        max_tokens: Some(max_tokens),
        ..SamplingParams::default()
    }
}

/// The answers to a request of this number under a constraint.
pub fn answers(engine: &Engine, grammar: &Grammar, params: SamplingParams) -> Vec<Completion> {
    let prompt = vec![40 + params.seed.unwrap_or(0) as u32 % 9, 41, 42];
    let request = Request { grammar: Some(grammar.clone()), ..Request::new(prompt, params) };
    complete(engine.submit(request).unwrap()).unwrap()
}

/// Whether a value is what its schema says.
type Check = fn(&Value) -> bool;

/// Schemas, and what is true of their values.
fn schemas() -> Vec<(Value, Check)> {
    let text = json!({ "type": "string", "maxLength": 4 });
    let no_others = json!(false);
    vec![
        (json!({ "type": "integer", "minimum": -20, "maximum": 300 }), |it| {
            // It may be -0.
            it.as_f64().is_some_and(|it| (-20.0..=300.0).contains(&it) && it.fract() == 0.0)
        }),
        (json!({ "type": "boolean" }), Value::is_boolean),
        (json!({ "enum": ["red", "green", 3, null] }), |it| {
            [json!("red"), json!("green"), json!(3), Value::Null].contains(it)
        }),
        (json!({ "const": { "a": [1, "é"] } }), |it| *it == json!({ "a": [1, "é"] })),
        (json!({ "type": "string", "minLength": 2, "maxLength": 5 }), |it| {
            it.as_str().is_some_and(|it| (2..=5).contains(&it.chars().count()))
        }),
        (json!({ "type": "string", "pattern": "^[a-c]{2}-[0-9]{1,3}$" }), |it| {
            let (left, right) = it.as_str().and_then(|it| it.split_once('-')).unwrap();
            left.len() == 2 && right.parse::<u32>().is_ok_and(|number| number < 1000)
        }),
        (
            json!({ "type": "array", "items": { "type": "number", "minimum": -9, "maximum": 9 }, "minItems": 1, "maxItems": 3 }),
            |it| {
                it.as_array().is_some_and(|it| (1..=3).contains(&it.len()) && it.iter().all(Value::is_number))
            },
        ),
        (
            json!({ "type": "object", "properties": { "name": text, "age": { "type": "integer" } },
                    "required": ["name", "age"], "additionalProperties": no_others }),
            |it| it["name"].is_string() && it["age"].is_i64() | it["age"].is_number() && keys(it) == 2,
        ),
        (
            json!({ "type": "object", "properties": { "a": { "type": "null" }, "b": { "type": "boolean" } },
                    "required": ["b"], "additionalProperties": no_others }),
            |it| it["b"].is_boolean() && it["a"].is_null() && keys(it) <= 2,
        ),
        (
            json!({ "anyOf": [{ "type": "boolean" }, { "$ref": "#/$defs/pair" }],
                    "$defs": { "pair": { "type": "array", "prefixItems": [{ "const": 1 }, { "type": "null" }],
                                         "minItems": 2, "items": false } } }),
            |it| it.is_boolean() || *it == json!([1, null]),
        ),
        (
            json!({ "$ref": "#/$defs/list",
                    "$defs": { "list": { "type": "object", "required": ["next"],
                                         "properties": { "next": { "anyOf": [{ "type": "null" },
                                                                             { "$ref": "#/$defs/list" }] } },
                                         "additionalProperties": no_others } } }),
            |it| {
                let mut it = it;
                while it.is_object() {
                    assert_eq!(keys(it), 1);
                    it = &it["next"];
                }
                it.is_null()
            },
        ),
    ]
}

fn keys(value: &Value) -> usize {
    value.as_object().map_or(0, |map| map.len())
}

#[test]
fn every_answer_of_a_random_model_is_of_its_schema() {
    for text in texts() {
        let engine = engine(&text, 300);
        let mut complete = 0;
        for (schema, check) in schemas() {
            let grammar = engine.compile(&Constraint::JsonSchema(schema.clone())).unwrap();
            for seed in 0..12 {
                for answer in answers(&engine, &grammar, SamplingParams { n: 2, ..drawn(seed, 300) }) {
                    if answer.end.finish == Finish::MaxTokens {
                        // Cut off within an answer, or in numbers and lists without an end.
                        assert_eq!(answer.tokens.len(), 300, "{schema}: {}", answer.text);
                        continue;
                    }
                    assert_eq!(answer.end.finish.reason(), "stop", "{schema}");
                    let value: Value = serde_json::from_str(&answer.text)
                        .unwrap_or_else(|error| panic!("{schema}: {error}: {}", answer.text));
                    assert!(check(&value), "{schema}: {}", answer.text);
                    complete += 1;
                }
            }
        }
        assert!(complete > 200, "{complete}");
    }
}

#[test]
fn a_json_object_is_an_object_whatever_the_model_says() {
    for text in texts() {
        let engine = engine(&text, 2000);
        let grammar = engine.compile(&Constraint::JsonObject).unwrap();
        for seed in 0..30 {
            // What ends an answer soon is likely, so that many do.
            let likely = |it: &str| (text.encode(it).last().copied().unwrap(), 6.0);
            let logit_bias = ["\"", "}", "]", "1"].map(likely).into();
            let params = SamplingParams { logit_bias, ..drawn(seed, 1000) };
            let answer = answers(&engine, &grammar, params).remove(0);
            // Numbers may be larger than `f64`.
            match serde_json::from_str::<BTreeMap<String, IgnoredAny>>(&answer.text) {
                Ok(_) => assert_eq!(answer.end.finish, Finish::Complete, "{answer:?}"),
                Err(error) => assert!(error.is_eof() && answer.end.finish == Finish::MaxTokens, "{answer:?}"),
            }
        }
    }
}

#[test]
fn regular_expressions_and_grammars_are_followed() {
    for text in texts() {
        let engine = engine(&text, 300);
        for (constraint, expected) in [
            (Constraint::Regex(r"[ab]{3}( c|,)?".into()), "[ab]{3}( c|,)?"),
            (Constraint::Regex(r"(?i)a/b".into()), "(?i)a/b"),
            (Constraint::Regex(r" a|b".into()), " a|b"),
            (Constraint::lark("start: \"(\" inner \")\"\ninner: /[abc]/+"), r"\([abc]+\)"),
            (
                Constraint::Lark {
                    rules: "start: \"x\" @flag".into(),
                    schemas: [("flag".into(), json!({ "type": "boolean" }))].into(),
                },
                "x(true|false)",
            ),
        ] {
            let grammar = engine.compile(&constraint).unwrap();
            let regex = Regex::new(&format!("^(?:{expected})$")).unwrap();
            for seed in 0..20 {
                let answer = answers(&engine, &grammar, drawn(seed, 400)).remove(0);
                assert_eq!(answer.end.finish.reason(), "stop", "{constraint:?}: {answer:?}");
                assert!(regex.is_match(&answer.text), "{constraint:?}: {:?}", answer.text);
            }
        }
    }
}

#[test]
fn answers_are_the_same_alone_and_beside_others_that_take_their_pages() {
    let [text, _] = texts();
    let schema = json!({ "type": "array", "items": { "type": "string", "maxLength": 9 }, "minItems": 6, "maxItems": 9 });
    let run = |pages: usize, together: bool| {
        let engine = engine(&text, pages);
        let grammar = engine.compile(&Constraint::JsonSchema(schema.clone())).unwrap();
        let submit = |seed: u64| {
            // Every other one is free to say what it likes.
            let grammar = (seed.is_multiple_of(2)).then(|| grammar.clone());
            let params = SamplingParams { n: 2, ..drawn(seed, 120) };
            engine.submit(Request { grammar, ..Request::new(vec![7, seed as u32], params) }).unwrap()
        };
        let answers: Vec<_> = match together {
            true => {
                (0..6).map(submit).collect::<Vec<_>>().into_iter().map(|it| complete(it).unwrap()).collect()
            }
            false => (0..6).map(|seed| complete(submit(seed)).unwrap()).collect(),
        };
        let stats = engine.status().stats;
        let ids: Vec<Vec<u32>> = answers
            .into_iter()
            .flatten()
            .map(|answer| answer.tokens.iter().map(|token| token.id).collect())
            .collect();
        (ids, stats)
    };
    let (alone, _) = run(400, false);
    let (together, stats) = run(60, true);
    assert!(stats.preemptions > 0 && stats.drafted > 0, "{stats:?}");
    assert_eq!(alone, together);
}

#[test]
fn ends_come_where_the_grammar_accepts_and_limits_hold() {
    let [text, _] = texts();
    let engine = engine(&text, 300);
    let end = *text.ends().first().unwrap();
    let letters = engine.compile(&Constraint::Regex("a{4,}".into())).unwrap();
    // The model wants to end at once.
    let eager = SamplingParams { logit_bias: [(end, 100.0)].into(), ..drawn(1, 50) };
    let answer = answers(&engine, &letters, eager.clone()).remove(0);
    assert_eq!((&*answer.text, answer.end.finish), ("aaaa", Finish::EndToken(end)));
    // Some tokens first.
    let answer = answers(&engine, &letters, SamplingParams { min_tokens: 7, ..eager.clone() }).remove(0);
    assert_eq!((&*answer.text, answer.end.finish), ("aaaaaaa", Finish::EndToken(end)));
    // What is complete ends, without a token for it, and however many tokens there should be.
    let word = engine.compile(&Constraint::Regex("abc".into())).unwrap();
    for min_tokens in [0, 40] {
        let answer = answers(&engine, &word, SamplingParams { min_tokens, ..eager.clone() }).remove(0);
        assert_eq!((&*answer.text, answer.end.finish), ("abc", Finish::Complete));
    }
    // An optional end that may not come yet is no dead end.
    let optional = engine.compile(&Constraint::lark("start: \"ab\" \"c\"?")).unwrap();
    let answer = answers(&engine, &optional, SamplingParams { min_tokens: 40, ..eager.clone() }).remove(0);
    assert_eq!((&*answer.text, answer.end.finish.reason()), ("abc", "stop"));
    let cut = answers(&engine, &word, SamplingParams { max_tokens: Some(2), ..eager }).remove(0);
    assert_eq!((&*cut.text, cut.end.finish), ("ab", Finish::MaxTokens));
    // A stop string ends it, too.
    let params = SamplingParams { stop: vec!["bc".into()], ..drawn(1, 50) };
    let answer = answers(&engine, &word, params).remove(0);
    assert_eq!((&*answer.text, answer.end.finish), ("a", Finish::StopString("bc".into())));
}

#[test]
fn control_tokens_come_where_a_grammar_names_them() {
    let [text, _] = texts();
    let engine = engine(&text, 300);
    let bos = 256;
    let grammar = engine.compile(&Constraint::lark(format!("start: <[{bos}]> \"a\""))).unwrap();
    let request = |shown| Request {
        grammar: Some(grammar.clone()),
        shown,
        ..Request::new(vec![1], SamplingParams { max_tokens: Some(9), ..SamplingParams::default() })
    };
    let answer = complete(engine.submit(request(vec![bos])).unwrap()).unwrap().remove(0);
    assert_eq!((&*answer.text, answer.tokens[0].id), ("<s>a", bos));
    let answer = complete(engine.submit(request(Vec::new())).unwrap()).unwrap().remove(0);
    assert_eq!((&*answer.text, answer.tokens[0].id), ("a", bos));
    // Its name in text is none.
    let name = engine.compile(&Constraint::Regex("<s>".into())).unwrap();
    assert_eq!(answers(&engine, &name, drawn(1, 9))[0].tokens.len(), 3);
}

#[test]
fn what_cannot_be_used_is_named() {
    let [text, _] = texts();
    let engine = engine(&text, 30);
    let schema = |schema: Value| engine.compile(&Constraint::JsonSchema(schema)).unwrap_err().to_string();
    let mut deep = json!({ "type": "null" });
    (0..100).for_each(|_| deep = json!({ "type": "array", "items": deep }));
    let mut deep_value = json!(1);
    (0..100).for_each(|_| deep_value = json!([deep_value]));
    for (error, expected) in [
        (schema(json!([])), "#: an array; expected an object or a boolean"),
        (schema(json!(false)), "schema is false"),
        (schema(json!({ "type": "strnig" })), "strnig"),
        (schema(json!({ "not": { "type": "null" } })), "#: the keyword `not` is not supported"),
        (
            schema(json!({ "properties": { "a/b": { "uniqueItems": true } } })),
            "#/properties/a/b: the keyword `uniqueItems` is not supported",
        ),
        (schema(json!({ "anyOf": [{}, { "dependencies": {} }] })), "#/anyOf/1: the keyword `dependencies`"),
        (schema(json!({ "items": { "foo": 1 } })), "#/items: the keyword `foo` is not supported"),
        (schema(json!({ "x-guidance": { "lenient": true } })), "#: the keyword `x-guidance`"),
        (schema(json!({ "properties": [] })), "#/properties: an array; expected an object"),
        (schema(json!({ "anyOf": {} })), "#/anyOf: an object; expected an array"),
        (schema(json!({ "$ref": "https://example.com/a" })), "expected a place in this schema"),
        (schema(json!({ "$ref": "#/$defs/a" })), "$defs"),
        (schema(json!({ "type": "string", "format": "color" })), "Unknown format: color"),
        (schema(json!({ "type": "string", "pattern": "(" })), "the JSON schema cannot be used"),
        (
            schema(json!({ "type": "string", "minLength": 3, "maxLength": 2 })),
            "the JSON schema cannot be used",
        ),
        // The library's own message cuts a character in two.
        (schema(json!({ "$ref": ["é".repeat(99)] })), "the JSON schema cannot be used"),
        (schema(deep), "nested deeper than 64"),
        (schema(json!({ "const": deep_value })), "#/const: values are nested deeper than 64"),
        (schema(json!({ "enum": vec!["long"; 99_999] })), "expected at most 262144"),
        (
            schema(json!({ "pattern": "a".repeat(5000) })),
            "#/pattern: it has 5000 bytes; expected at most 4096",
        ),
    ] {
        assert!(error.contains(expected), "{error}\n--- expected\n{expected}");
        assert!(error.starts_with("the JSON schema cannot be used: "), "{error}");
        assert!(error.len() < 600 && !error.contains('\n') && !error.contains("backtrace"), "{error}");
    }
    let long = "a".repeat(5000);
    for (constraint, expected) in [
        (Constraint::Regex(long.clone()), "it has 5000 bytes; expected at most 4096"),
        (Constraint::lark(format!("start: \"{long}\"")), "a line of it has 5009 bytes"),
        (Constraint::lark("\n".repeat(70_000)), "it has 70000 bytes"),
        (Constraint::lark("start: %json {}"), "expected `@name`"),
        (Constraint::lark("start: @nothing"), "nothing"),
        (Constraint::Regex("(a".into()), "the regular expression cannot be used: "),
        (Constraint::lark(""), "the grammar cannot be used: "),
        (Constraint::lark("start: missing"), "missing"),
        (Constraint::lark("begin: \"a\""), "the grammar cannot be used: "),
    ] {
        let error = engine.compile(&constraint).expect_err(expected).to_string();
        assert!(error.contains(expected), "{constraint:?}: {error}");
    }
}

#[test]
fn deep_and_long_constraints_do_not_exhaust_a_stack() {
    let [text, _] = texts();
    let engine = engine(&text, 300);
    let nested = |len: usize, open: &str, close: &str| format!("{}a{}", open.repeat(len), close.repeat(len));
    let chain = |count: usize| -> String { (0..count).map(|at| format!("r{at}: r{}\n", at + 1)).collect() };
    for constraint in [
        Constraint::Regex(nested(2000, "(", ")")),
        Constraint::Regex(nested(200, "(", ")*")),
        Constraint::Regex("a|".repeat(2000) + "b"),
        Constraint::Regex("a?".repeat(2048)),
        Constraint::lark(format!("start: {}", nested(800, "(\"b\"\n", ")").replace('a', "\"a\""))),
        Constraint::lark(format!("start: r0\n{}r4000: \"b\"", chain(4000))),
        Constraint::lark(format!("start: A\nA: {}", "B ".repeat(2000) + "\nB: \"a\"?")),
        Constraint::JsonSchema(json!({ "const": "a".repeat(200_000) })),
        Constraint::JsonSchema(json!({ "type": "string", "pattern": "ab?".repeat(1300) })),
        Constraint::JsonSchema(json!({ "type": "string", "minLength": 100_000 })),
    ] {
        // Refused or followed, and the engine goes on.
        if let Ok(grammar) = engine.compile(&constraint) {
            let request = Request { grammar: Some(grammar), ..Request::new(vec![1], drawn(1, 20)) };
            assert!(engine.submit(request).unwrap().last().unwrap().end.is_some());
        }
    }
    assert!(matches!(engine.status().health, crate::engine::Health::Well));
}

#[test]
fn a_grammar_that_grows_too_large_ends_its_own_answer_only() {
    let [text, _] = texts();
    let engine = engine(&text, 600);
    let rules = "start: e\ne: \"a\" | e e | e e e | e e e e | e e e e e";
    let ambiguous = engine.compile(&Constraint::lark(rules)).unwrap();
    let other = engine.submit(Request::new(vec![2], drawn(2, 600))).unwrap();
    let request = Request {
        grammar: Some(ambiguous),
        ..Request::new(
            vec![1],
            SamplingParams {
                // It never ends.
                min_tokens: 2000,
                ..drawn(1, 2000)
            },
        )
    };
    let last = engine.submit(request).unwrap().last().unwrap();
    let Some(Finish::Failed(problem)) = last.end.map(|end| end.finish) else { panic!("it was followed") };
    assert!(problem.starts_with("its constraint cannot be followed: ") && problem.len() < 500, "{problem}");
    let other = complete(other).unwrap();
    assert_ne!(other[0].end.finish.reason(), "error");
}

#[test]
fn a_grammar_of_another_engine_is_refused() {
    let [text, _] = texts();
    let (one, other) = (engine(&text, 30), engine(&text, 30));
    let grammar = one.compile(&Constraint::JsonObject).unwrap();
    let request = Request { grammar: Some(grammar), ..Request::new(vec![1], drawn(1, 2)) };
    let error = other.submit(request).err().unwrap();
    assert!(matches!(error, SubmitError::Constraint(_)), "{error}");
    assert!(error.to_string().contains("another engine"));
}
