//! What is wrong is refused, with its name.

use serde_json::{Value, json};

use super::*;

#[test]
fn wrong_fields_are_named() {
    let server = TestServer::start();
    for (fields, param) in [
        (json!({"temperature": -1}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"temperature": 1e300}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"top_k": 4_294_967_296_u64}), "top_k"),
        (json!({"min_p": 2}), "min_p"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"presence_penalty": 3}), "presence_penalty"),
        (json!({"frequency_penalty": -3}), "frequency_penalty"),
        (json!({"n": 0}), "n"),
        (json!({"n": 129}), "n"),
        (json!({"n": -1}), "n"),
        (json!({"n": u64::MAX}), "n"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 1.5}), "max_tokens"),
        (json!({"max_tokens": u64::MAX}), "max_tokens"),
        (json!({"max_completion_tokens": 0}), "max_completion_tokens"),
        (json!({"min_tokens": 8}), "min_tokens"),
        (json!({"seed": 9_223_372_036_854_775_808_u64}), "seed"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": [1]}), "stop"),
        (json!({"stop": vec!["x"; 2000]}), "stop"),
        (json!({"stop_token_ids": [128]}), "stop_token_ids"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias"),
        (json!({"logit_bias": {"1": "x"}}), "logit_bias.1"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"logprobs": 1}), "logprobs"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"response_format": {"type": "yaml"}}), "response_format.type"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "Hello"}), "messages"),
        (json!({"messages": [{"content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "boss", "content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user", "content": 1}]}), "messages[0].content"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
            "messages[0].content[0].text",
        ),
        (json!({"chat_template_kwargs": []}), "chat_template_kwargs"),
        (json!({"best_of": 2}), "best_of"),
        (json!({"functions": [{"name": "f"}]}), "functions"),
        (json!({"modalities": ["text", "audio"]}), "modalities"),
        (json!({"audio": {"voice": "x"}}), "audio"),
        (json!({"store": true}), "store"),
        (json!({"prompt_logprobs": 1}), "prompt_logprobs"),
        (json!({"guided_json": {}}), "guided_json"),
    ] {
        let error = server.chat(&with(chat("x", 4), fields.clone())).error(400);
        assert_eq!(error["param"], param, "{fields}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    // In the words of JSON, not of Rust.
    for (fields, message) in [
        (json!({"tools": {}}), "tools: invalid type: object, expected an array"),
        (json!({"tools": [null]}), "tools[0]: invalid type: null, expected an object"),
        (
            json!({"messages": [{"role": 1}]}),
            "messages[0].role: invalid type: integer `1`, expected a string",
        ),
        (
            json!({"response_format": "json"}),
            "response_format: invalid type: string \"json\", expected an object with a `type`",
        ),
        (json!({"temperature": [1]}), "temperature: invalid type: array, expected a number"),
        (
            json!({"stop_token_ids": [-1]}),
            "stop_token_ids[0]: invalid value: integer `-1`, expected an integer that is not negative",
        ),
        (json!({"seed": 1.5}), "seed: invalid type: floating point `1.5`, expected an integer"),
        (
            json!({"continue_final_message": true, "add_generation_prompt": false}),
            "only a last message of the assistant can be continued",
        ),
    ] {
        assert_eq!(server.chat(&with(chat("x", 4), fields)).error(400)["message"], message);
    }
    for n in [json!(0), json!(129), json!(u64::MAX)] {
        let body = with(completion(json!(["x", "y"]), 1), json!({"n": n, "echo": true}));
        assert_eq!(server.complete(&body).error(400)["param"], "n");
    }
    assert_eq!(server.complete(&json!({"model": "test"})).error(400)["param"], "prompt");
    assert_eq!(server.chat(&json!({"model": "test"})).error(400)["param"], "messages");
    assert_eq!(
        server.complete(&with(completion("x", 1), json!({"suffix": "y"}))).error(400)["param"],
        "suffix"
    );
    assert_eq!(server.status().stats.steps, 0);
}

#[test]
fn defaults_of_fields_that_have_no_effect_are_accepted() {
    let server = TestServer::start();
    let defaults = json!({
        "best_of": 1, "functions": [], "function_call": "auto", "modalities": ["text"], "audio": null,
        "store": false, "parallel_tool_calls": true, "prompt_logprobs": null, "service_tier": "auto",
        "metadata": {"a": "b"}, "user": "me", "use_beam_search": false, "length_penalty": 1.0,
        "skip_special_tokens": true, "response_format": {"type": "text"}, "tools": [], "tool_choice": "none",
        "temperature": null, "top_p": null, "n": null, "stop": null, "logprobs": null, "top_logprobs": 0,
        "seed": null, "stream_options": null, "logit_bias": null, "top_k": -1,
    });
    let answer = |body: Value| server.chat(&body).ok()["choices"].clone();
    let mut defaults = with(chat("x", 4), defaults);
    defaults["temperature"] = json!(0);
    assert_eq!(answer(defaults), answer(chat("x", 4)));
    // Fields that nobody knows are noted once.
    for _ in 0..2 {
        answer(with(chat("x", 4), json!({"rid": "1", "no_such_field": {"a": [1]}})));
    }
    let known = server.server.ignored.0.lock().unwrap().clone();
    assert_eq!(known.into_iter().collect::<Vec<_>>(), ["no_such_field", "rid"]);
}

#[test]
fn bodies_that_are_none_are_refused() {
    let server = TestServer::start();
    let send = |headers: &[(&str, &str)], body: &str| {
        client::send(server.address, "POST", "/v1/chat/completions", headers, Some(body))
    };
    for body in ["", "{", "[]", "1", "null", "{\"messages\": 1e999}", "{\"a\": \"\\ud800\"}", "\u{feff}{}"] {
        assert_eq!(send(&[], body).error(400)["type"], "invalid_request_error", "{body}");
    }
    let deep = format!("{{\"messages\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    send(&[], &deep).error(400);
    let good = chat("x", 1).to_string();
    send(&[("Content-Type", "")], &good).error(415);
    send(&[("Content-Type", "text/plain")], &good).error(415);
    assert_eq!(send(&[("Content-Type", "Application/JSON; charset=utf-8")], &good).status, 200);
    let large = format!("{{\"messages\": \"{}\"}}", "x".repeat(17 << 20));
    send(&[], &large).error(413);
}

#[test]
fn other_paths_methods_and_models_are_refused() {
    let server = TestServer::start();
    server.get("/v1/engines").error(404);
    let refused = server.get("/v1/completions");
    refused.error(405);
    assert_eq!(refused.header("allow"), Some("POST"));
    for body in [with(chat("x", 1), json!({"model": "gpt-4"})), with(chat("x", 1), json!({"model": ""}))] {
        let error = server.chat(&body).error(404);
        assert_eq!((&error["param"], &error["code"]), (&json!("model"), &json!("model_not_found")));
    }
    server.get("/v1/models/gpt-4").error(404);
    server.get("/v1/models/%ff").error(404);
    let broken = client::send_raw(server.address, b"nonsense\r\n\r\n");
    assert_eq!(broken.status, 400);
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let gate = Gate::default();
    let at = gate.clone();
    let config = EngineConfig { max_queued: 2, ..config() };
    let server = TestServer::with(options(), llm(config, move |backend| at.before(backend)));
    let streams: Vec<_> = (0..2)
        .map(|_| server.stream("/v1/completions", &with(completion("x", 4), json!({"stream": true}))))
        .collect();
    let refused = server.complete(&completion("x", 4));
    assert_eq!(refused.error(429)["code"], "rate_limit_exceeded");
    assert_eq!(refused.header("retry-after"), Some("1"));
    // Those that can never be taken are another matter.
    assert_eq!(server.complete(&completion(json!(["x", "y", "z"]), 4)).error(400)["param"], "n");
    gate.open();
    assert!(streams.into_iter().all(|stream| !stream.chunks().is_empty()));
    server.complete(&completion("x", 4)).ok();
}
