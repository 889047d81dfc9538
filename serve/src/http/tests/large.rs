//! Bodies that would take much memory or time.

use super::*;

impl TestServer {
    /// How many large bodies may be worked on now.
    fn turns(&self) -> usize {
        self.server.turns.large.available_permits()
    }
}

/// More bytes than a small body has.
const LARGE: usize = 100_000;

#[test]
fn bodies_of_too_many_values_are_refused_before_they_are_read() {
    let server = TestServer::start();
    for value in ["0", "[]", "{}", "\"\""] {
        let body = format!("{{\"prompt\": [{value}{}]}}", format!(",{value}").repeat(1 << 20));
        let response = client::send(server.address, "POST", "/v1/completions", &[], Some(&body));
        let error = response.error(400);
        assert_eq!(error["message"], "the body has too many values; expected at most 1048576", "{value}");
    }
    let arguments = format!("{{\"x\": [0{}]}}", ",0".repeat(1 << 20));
    let call = json!({"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}});
    let messages = json!([{"role": "assistant", "content": null, "tool_calls": [call]}]);
    let error = server.chat(&json!({"messages": messages})).error(400);
    assert_eq!(error["message"], "arguments of calls have too many values; expected at most 1048576");
    let body = json!({"prompt": "x", "logit_bias": vec![0; 1_000_000]});
    assert_eq!(server.complete(&body).error(400)["param"], "logit_bias");
    // What is in a string is no value.
    let text = r#"\",[{:,\\"#.repeat(200_000);
    let error = server.complete(&completion(text, 1)).error(400);
    assert_eq!(error["code"], "context_length_exceeded", "{error}");
}

/// Where it is sure that they do not fit, before they are counted: no token here has more than 12 bytes.
#[test]
fn what_cannot_fit_is_refused_before_it_is_tokenized() {
    let server = TestServer::start();
    let prompts = json!(["x", "x".repeat(12 * CONTEXT)]);
    for (error, tokens) in [
        (server.complete(&completion(prompts, 1)).error(400), 400),
        // The template adds 18 bytes.
        (server.chat(&chat(&"x".repeat(12 * CONTEXT), 1)).error(400), 402),
    ] {
        assert_eq!(error["code"], "context_length_exceeded");
        let said = format!("the prompt has at least {tokens}; shorten ");
        assert!(error["message"].as_str().unwrap().contains(&said), "{error}");
    }
    // Or else they are counted.
    let error = server.complete(&completion("x".repeat(4 * CONTEXT), 1)).error(400);
    assert!(error["message"].as_str().unwrap().contains("the prompt has 1600;"), "{error}");
    let error = server.complete(&completion(vec![7; 12 * CONTEXT], 1)).error(400);
    assert!(error["message"].as_str().unwrap().contains("the prompt has 4800;"), "{error}");
    let error = server.complete(&completion(vec!["x"; 1025], 1)).error(400);
    assert_eq!(error["message"], "n is 1025 in all; expected at most 1024, which is all that may wait");
    // What is only tokenized fits more.
    let text = "x".repeat(1_000_001);
    let error = server.post("/tokenize", &json!({"prompt": text})).error(400);
    assert_eq!(error["message"], "prompt has 1000001 tokens; expected at most 1000000");
    // Tokens of twelve bytes each.
    let tokens = json!({"tokens": vec![269; 800_000]});
    let error = server.post("/detokenize", &tokens).error(400);
    assert_eq!(error["message"], "the text of tokens has 9600000 bytes; expected at most 8388608");
}

#[test]
fn large_bodies_take_turns_and_small_ones_do_not_wait() {
    let server = TestServer::start();
    let large = json!({"prompt": "x".repeat(LARGE)});
    let turns = server.turns();
    assert!(turns > 0);
    assert_eq!(server.post("/tokenize", &large).ok()["count"], LARGE);
    let all = server.server.turns.large.clone().try_acquire_many_owned(turns as u32).unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| server.post("/tokenize", &large).ok()["count"].clone());
        for _ in 0..20 {
            assert_eq!(server.chat(&chat("x", 2)).ok()["usage"]["completion_tokens"], 2);
            thread::sleep(Duration::from_millis(5));
        }
        assert!(!waiting.is_finished());
        drop(all);
        assert_eq!(waiting.join().unwrap(), LARGE);
    });
    assert_eq!(server.turns(), turns);
}

/// With each kind of answer, while the engine is at none of them.
#[test]
fn a_turn_ends_before_the_answer_does_and_with_each_error() {
    let gate = Gate::default();
    let before = gate.clone();
    let server = TestServer::with(options(), llm(config(), move |backend| before.before(backend)));
    let turns = server.turns();
    let padded = |fields: Value| with(fields, json!({"user": "x".repeat(LARGE)}));
    assert_eq!(server.chat(&padded(chat("x", 0))).error(400)["param"], "max_tokens");
    assert_eq!(server.turns(), turns);
    let bodies = [
        ("/v1/chat/completions", padded(chat("x", 3))),
        ("/v1/completions", padded(completion("x", 3))),
        ("/v1/completions", padded(with(completion("x", 3), json!({"stream": true})))),
    ];
    let clients: Vec<_> =
        bodies.iter().map(|(path, body)| client::ask(server.address, path, &[], body)).collect();
    // With one turn left, that of each ends, or the others would wait.
    let other_turns = server.server.turns.large.clone().try_acquire_many_owned(turns as u32 - 1);
    for _ in 0..20 {
        assert_eq!(server.post("/tokenize", &json!({"prompt": "x".repeat(LARGE)})).ok()["count"], LARGE);
        thread::sleep(Duration::from_millis(5));
    }
    drop(other_turns);
    until(|| server.turns() == turns);
    gate.open();
    server.until_idle();
    drop(clients);
}

/// What it was for may take memory until then.
#[test]
fn who_leaves_keeps_a_turn_until_what_has_begun_is_done() {
    // It ends when its steps are used up, after 0.1 s or more.
    let long = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let server = TestServer::with(options(), llm_with(long));
    let turns = server.turns();
    let body = chat(&"x".repeat(LARGE), 1);
    let ask = |_| client::ask(server.address, "/v1/chat/completions", &[], &body);
    let begin = Instant::now();
    let alone = server.chat(&body).error(400);
    let one_takes = begin.elapsed();
    assert!(alone["message"].as_str().unwrap().contains("fuel"), "{alone}");
    // All but the first wait for a turn, and do so no longer.
    let clients: Vec<_> = (0..40 * turns).map(ask).collect();
    until(|| server.turns() == 0);
    drop(clients);
    let begin = Instant::now();
    thread::sleep(one_takes / 4);
    assert_eq!(server.turns(), 0);
    until(|| server.turns() == turns);
    assert!(begin.elapsed() < 20 * one_takes, "{:?} after {one_takes:?}", begin.elapsed());
}
