use serde_json::{Value, json};

use super::*;

/// The contents of the pieces of an answer.
fn content(chunks: &[Value], index: usize) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
    let own = choices.filter(|choice| choice["index"] == index);
    own.filter_map(|choice| choice["delta"]["content"].as_str()).collect()
}

#[test]
fn a_chat_is_answered_whole_and_streamed_alike() {
    let server = TestServer::start();
    let body = chat("Hello", 12);
    let whole = server.chat(&body).ok();
    assert_eq!((&whole["object"], &whole["model"]), (&json!("chat.completion"), &json!("test")));
    let choice = &whole["choices"][0];
    assert_eq!((&choice["index"], &choice["finish_reason"]), (&json!(0), &json!("length")));
    assert_eq!((&choice["message"]["role"], &choice["logprobs"]), (&json!("assistant"), &Value::Null));
    let prompt = "user: Hello\nassistant: ";
    let answer = choice["message"]["content"].as_str().unwrap().to_owned();
    assert_eq!(answer.len(), 12);
    assert_eq!(whole["usage"]["completion_tokens"], 12);
    assert_eq!(whole["usage"]["total_tokens"], prompt.len() + 12);

    let streamed = with(body, json!({"stream": true, "stream_options": {"include_usage": true}}));
    let chunks = server.stream("/v1/chat/completions", &streamed).chunks();
    assert_eq!(content(&chunks, 0), answer);
    let first = &chunks[0]["choices"][0];
    assert_eq!(first["delta"], json!({"role": "assistant", "content": ""}));
    assert!(chunks[1..].iter().all(|chunk| chunk["choices"][0]["delta"].get("role").is_none()));
    let (usage, last) = (&chunks[chunks.len() - 1], &chunks[chunks.len() - 2]);
    assert_eq!(
        (&last["choices"][0]["finish_reason"], &last["choices"][0]["delta"]),
        (&json!("length"), &json!({}))
    );
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 12);
    // The prompt was read before.
    assert!(usage["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0);
    assert!(chunks[..chunks.len() - 1].iter().all(|chunk| chunk.get("usage").is_none()));
    let id = chunks[0]["id"].as_str().unwrap();
    assert!(id.starts_with("chatcmpl-") && chunks.iter().all(|chunk| chunk["id"] == id));
    assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk"));
}

#[test]
fn several_answers_have_their_numbers() {
    let server = TestServer::start();
    let body = with(chat("Hello", 8), json!({"n": 3, "temperature": 1.0, "seed": 5}));
    let whole = server.chat(&body).ok();
    let choices = whole["choices"].as_array().unwrap();
    let answers: Vec<_> =
        choices.iter().map(|choice| choice["message"]["content"].as_str().unwrap()).collect();
    assert_eq!(choices.iter().map(|choice| choice["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2]);
    assert!(answers[0] != answers[1] && answers[1] != answers[2]);
    assert_eq!(whole["usage"]["completion_tokens"], 24);
    let chunks = server.stream("/v1/chat/completions", &with(body.clone(), json!({"stream": true}))).chunks();
    for (index, answer) in answers.iter().enumerate() {
        assert_eq!(&content(&chunks, index), answer);
    }
    // A seed of any sign is one.
    let negative =
        |seed: i64| server.chat(&with(body.clone(), json!({"seed": seed}))).ok()["choices"].clone();
    assert_eq!(negative(-5), negative(-5));
    assert_ne!(negative(-5), negative(-6));
}

#[test]
fn log_probabilities_come_with_tokens() {
    let server = TestServer::start();
    let body = with(chat("Hello", 5), json!({"logprobs": true, "top_logprobs": 3}));
    let whole = server.chat(&body).ok();
    let content = whole["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(content.len(), 5);
    let text: String = content.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!(whole["choices"][0]["message"]["content"], text);
    for token in &content {
        assert_eq!(token["bytes"], json!(token["token"].as_str().unwrap().as_bytes()));
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!((top.len(), &top[0]["logprob"]), (3, &token["logprob"]));
        assert!(token["logprob"].as_f64().unwrap() < 0.0);
    }
    let chunks = server.stream("/v1/chat/completions", &with(body.clone(), json!({"stream": true}))).chunks();
    let streamed: Vec<_> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().cloned())
        .flatten()
        .collect();
    assert_eq!(streamed, content);
    let without = with(body, json!({"logprobs": false}));
    assert_eq!(server.chat(&without).error(400)["param"], "top_logprobs");
}

#[test]
fn answers_stop_where_they_are_told_to() {
    let server = TestServer::start();
    let all = server.chat(&chat("Hello", 30)).ok()["choices"][0]["message"]["content"].clone();
    let all = all.as_str().unwrap();
    for stop in [json!(all[10..13]), json!(["no such text", all[10..13]])] {
        let body = with(chat("Hello", 30), json!({"stop": stop}));
        let at = all.find(&all[10..13]).unwrap();
        let whole = server.chat(&body).ok();
        let choice = &whole["choices"][0];
        assert_eq!(
            (&choice["message"]["content"], &choice["finish_reason"]),
            (&json!(all[..at]), &json!("stop"))
        );
        assert_eq!(choice["stop_reason"], all[10..13]);
        let chunks = server.stream("/v1/chat/completions", &with(body, json!({"stream": true}))).chunks();
        assert_eq!(content(&chunks, 0), all[..at]);
    }
    let token = u32::from(all.as_bytes()[4]);
    let choice =
        server.chat(&with(chat("Hello", 30), json!({"stop_token_ids": [token]}))).ok()["choices"][0].clone();
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!(token)));
}

#[test]
fn messages_are_what_templates_take() {
    let server = TestServer::start();
    let usage = |messages: Value| {
        let body = with(chat("", 1), json!({"messages": messages}));
        server.chat(&body).ok()["usage"]["prompt_tokens"].clone()
    };
    let parts =
        json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
    assert_eq!(usage(parts), usage(json!([{"role": "user", "content": "a\nb"}])));
    usage(json!([{"role": "developer", "content": "x"}, {"role": "user", "content": "y", "name": "z"}]));
    usage(json!([
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": null,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "z", "tool_call_id": "1"},
    ]));
    let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]);
    let error = server.chat(&with(chat("", 1), json!({"messages": image}))).error(400);
    assert_eq!(error["param"], "messages[0].content[0].type");
    assert!(error["message"].as_str().unwrap().contains("image_url"), "{error}");
}

#[test]
fn the_last_message_is_continued() {
    let server = TestServer::start();
    let messages = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "And so"}]);
    let body = with(chat("", 6), json!({"messages": messages, "continue_final_message": true}));
    let chat = server.chat(&body).ok();
    let text = "user: x\nassistant: And so";
    let continued = server.complete(&completion(text, 6)).ok();
    assert_eq!(chat["choices"][0]["message"]["content"], continued["choices"][0]["text"]);
    let both = with(body.clone(), json!({"add_generation_prompt": true}));
    assert_eq!(server.chat(&both).error(400)["param"], "continue_final_message");
    let user = with(body, json!({"messages": [{"role": "user", "content": "x"}]}));
    assert_eq!(server.chat(&user).error(400)["param"], "messages");
}

#[test]
fn an_answer_is_as_long_as_the_context_allows() {
    let server = TestServer::start();
    let mut body = chat("x", 1);
    body.as_object_mut().unwrap().remove("max_tokens");
    let usage = server.chat(&body).ok()["usage"].clone();
    assert!(usage["total_tokens"].as_u64().unwrap() >= CONTEXT as u64, "{usage}");
    let limit =
        |fields: Value| server.chat(&with(body.clone(), fields)).ok()["usage"]["completion_tokens"].clone();
    assert_eq!(limit(json!({"max_completion_tokens": 3, "max_tokens": 9})), 3);
    let error = server.chat(&with(body.clone(), json!({"max_completion_tokens": CONTEXT}))).error(400);
    assert_eq!(
        (&error["param"], &error["code"]),
        (&json!("max_completion_tokens"), &json!("context_length_exceeded"))
    );
    let error = server.chat(&chat(&"x".repeat(500), 1)).error(400);
    assert_eq!(error["param"], "messages");
    assert!(error["message"].as_str().unwrap().contains("maximum context length is 400 tokens"), "{error}");
}
