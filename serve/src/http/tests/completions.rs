use serde_json::{Value, json};

use super::*;

fn text(choice: &Value) -> &str {
    choice["text"].as_str().unwrap()
}

#[test]
fn a_text_is_continued_whole_and_streamed_alike() {
    let server = TestServer::start();
    let whole = server.complete(&completion("Once", 9)).ok();
    assert_eq!(whole["object"], "text_completion");
    let answer = text(&whole["choices"][0]).to_owned();
    assert_eq!((answer.len(), &whole["choices"][0]["finish_reason"]), (9, &json!("length")));
    let streamed =
        with(completion("Once", 9), json!({"stream": true, "stream_options": {"include_usage": true}}));
    let chunks = server.stream("/v1/completions", &streamed).chunks();
    let (usage, chunks) = chunks.split_last().unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]["total_tokens"]), (&json!([]), &json!(13)));
    assert_eq!(chunks.iter().map(|chunk| text(&chunk["choices"][0])).collect::<String>(), answer);
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
    // 16 tokens, unless it is said.
    let mut short = completion("Once", 9);
    short.as_object_mut().unwrap().remove("max_tokens");
    assert_eq!(server.complete(&short).ok()["usage"]["completion_tokens"], 16);
}

#[test]
fn prompts_come_in_four_forms() {
    let server = TestServer::start();
    let tokens: Vec<u32> = "Once".bytes().map(u32::from).collect();
    let answer = |prompt: Value| server.complete(&completion(prompt, 6)).ok()["choices"].clone();
    let alone = answer(json!("Once"));
    assert_eq!(answer(json!(["Once"])), alone);
    assert_eq!(answer(json!(tokens)), alone);
    assert_eq!(answer(json!([tokens])), alone);
    // Several prompts, each with several answers.
    let body = with(completion(json!(["Once", "Twice"]), 6), json!({"n": 2, "temperature": 1, "seed": 3}));
    let both = server.complete(&body).ok();
    let choices = both["choices"].as_array().unwrap();
    assert_eq!(
        choices.iter().map(|choice| choice["index"].as_u64().unwrap()).collect::<Vec<_>>(),
        [0, 1, 2, 3]
    );
    let second = server.complete(&with(body, json!({"prompt": "Twice"}))).ok();
    assert_eq!(
        [&choices[2]["text"], &choices[3]["text"]],
        [0, 1].map(|index| &second["choices"][index]["text"])
    );
    assert_eq!(both["usage"]["prompt_tokens"], 9);
    for wrong in [
        json!([]),
        json!(""),
        json!(["x", ""]),
        json!([[]]),
        json!(["x", 1]),
        json!([-1]),
        json!({}),
        json!([4096]),
    ] {
        let error = server.complete(&completion(wrong.clone(), 1)).error(400);
        assert_eq!(error["param"], "prompt", "{wrong}: {error}");
    }
}

#[test]
fn the_prompt_is_echoed() {
    let server = TestServer::start();
    let plain = server.complete(&completion("Once", 4)).ok();
    let echoed = with(completion("Once", 4), json!({"echo": true}));
    let expected = format!("Once{}", text(&plain["choices"][0]));
    assert_eq!(text(&server.complete(&echoed).ok()["choices"][0]), expected);
    let chunks = server.stream("/v1/completions", &with(echoed.clone(), json!({"stream": true}))).chunks();
    assert_eq!(chunks.iter().map(|chunk| text(&chunk["choices"][0])).collect::<String>(), expected);
    // The prompt alone.
    let alone = server.complete(&with(echoed, json!({"max_tokens": 0}))).ok();
    assert_eq!(text(&alone["choices"][0]), "Once");
    assert_eq!(server.complete(&completion("Once", 0)).error(400)["param"], "max_tokens");
}

#[test]
fn an_echo_has_the_prompts_log_probabilities() {
    let server = TestServer::start();
    let logprobs = |body: &Value| server.complete(body).ok()["choices"][0]["logprobs"].clone();
    let ask = |prompt: &[u8], fields| with(completion(prompt, 3), with(json!({"logprobs": 2}), fields));
    let prompt = "Once upon a time, there was a prompt. ".repeat(9).into_bytes();
    let echoed = logprobs(&ask(&prompt, json!({"echo": true})));
    let array = |logprobs: &Value, key: &str| logprobs[key].as_array().unwrap().clone();
    assert_eq!(array(&echoed, "tokens").len(), prompt.len() + 3);
    assert_eq!(array(&echoed, "text_offset"), (0..prompt.len() + 3).map(Value::from).collect::<Vec<_>>());
    let (chosen, top) = (array(&echoed, "token_logprobs"), array(&echoed, "top_logprobs"));
    assert!(chosen[0].is_null() && top[0].is_null());
    // Each is what the model says of the next token, where the prompt ends before it.
    for at in [1, 2, 17, 300, prompt.len() - 1] {
        let next = logprobs(&ask(&prompt[..at], json!({"logit_bias": {(prompt[at].to_string()): 100}})));
        assert_eq!(next["token_logprobs"][0], chosen[at], "{at}");
        assert_eq!(next["top_logprobs"][0], top[at], "{at}");
    }
    let answer = logprobs(&ask(&prompt, json!({})));
    assert_eq!(array(&answer, "token_logprobs"), chosen[prompt.len()..]);
    // The same again, where the prompt is cached, of the prompt alone, and in a stream.
    assert_eq!(logprobs(&ask(&prompt, json!({"echo": true}))), echoed);
    let alone = logprobs(&ask(&prompt, json!({"echo": true, "max_tokens": 0})));
    assert_eq!(array(&alone, "token_logprobs"), chosen[..prompt.len()]);
    let body = ask(&prompt, json!({"echo": true, "stream": true, "n": 2, "temperature": 1}));
    let chunks = server.stream("/v1/completions", &body).chunks();
    for index in 0..2 {
        let of = chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == index);
        let streamed: Vec<_> = of.flat_map(|choice| array(&choice["logprobs"], "token_logprobs")).collect();
        assert_eq!((streamed.len(), &streamed[..prompt.len()]), (prompt.len() + 3, &chosen[..prompt.len()]));
    }
}

#[test]
fn ids_of_tokens_are_given_where_they_are_asked_for() {
    let server = TestServer::start();
    let ids = |text: &str| json!(text.bytes().collect::<Vec<_>>());
    let body = with(completion("Once", 4), json!({"return_token_ids": true}));
    let whole = server.complete(&body).ok()["choices"][0].clone();
    assert_eq!((&whole["prompt_token_ids"], &whole["token_ids"]), (&ids("Once"), &ids(text(&whole))));
    let chunks = server.stream("/v1/completions", &with(body, json!({"stream": true}))).chunks();
    let choices: Vec<_> = chunks.iter().map(|chunk| &chunk["choices"][0]).collect();
    assert_eq!(choices[0]["prompt_token_ids"], ids("Once"));
    assert!(choices[1..].iter().all(|choice| choice.get("prompt_token_ids").is_none()));
    let all = |choices: &[&Value]| -> Vec<Value> {
        choices.iter().filter_map(|choice| choice["token_ids"].as_array().cloned()).flatten().collect()
    };
    assert_eq!(json!(all(&choices)), whole["token_ids"]);

    let body = with(chat("x", 4), json!({"return_token_ids": true}));
    let whole = server.chat(&body).ok();
    assert_eq!(whole["prompt_token_ids"], ids("user: x\nassistant: "));
    let chunks = server.stream("/v1/chat/completions", &with(body, json!({"stream": true}))).chunks();
    assert_eq!(chunks[0]["prompt_token_ids"], whole["prompt_token_ids"]);
    let choices: Vec<_> = chunks.iter().map(|chunk| &chunk["choices"][0]).collect();
    assert_eq!(json!(all(&choices)), whole["choices"][0]["token_ids"]);
    let plain = server.chat(&chat("x", 4)).ok();
    assert!(plain.get("prompt_token_ids").is_none() && plain["choices"][0].get("token_ids").is_none());
}

#[test]
fn log_probabilities_have_offsets() {
    let server = TestServer::start();
    let body = with(completion("Once", 4), json!({"logprobs": 2}));
    let whole = server.complete(&body).ok();
    let logprobs = &whole["choices"][0]["logprobs"];
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3]));
    let tokens: String =
        logprobs["tokens"].as_array().unwrap().iter().map(|token| token.as_str().unwrap()).collect();
    assert_eq!(tokens, text(&whole["choices"][0]));
    for (at, top) in logprobs["top_logprobs"].as_array().unwrap().iter().enumerate() {
        let token = logprobs["tokens"][at].as_str().unwrap();
        assert_eq!((top.as_object().unwrap().len(), &top[token]), (2, &logprobs["token_logprobs"][at]));
    }
    let chunks = server.stream("/v1/completions", &with(body, json!({"stream": true}))).chunks();
    let offsets: Vec<_> = chunks
        .iter()
        .flat_map(|chunk| chunk["choices"][0]["logprobs"]["text_offset"].as_array().unwrap().clone())
        .collect();
    assert_eq!(json!(offsets), logprobs["text_offset"]);
}
