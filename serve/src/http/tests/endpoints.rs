use serde_json::json;

use super::*;

#[test]
fn models_are_listed_by_their_names() {
    let names = vec!["test".into(), "org/other".into()];
    let server = TestServer::with(ServerOptions { names, ..options() }, llm(config(), |backend| backend));
    let list = server.get("/v1/models").ok();
    let ids: Vec<_> =
        list["data"].as_array().unwrap().iter().map(|card| card["id"].as_str().unwrap()).collect();
    assert_eq!((ids, &list["data"][0]["max_model_len"]), (vec!["test", "org/other"], &json!(CONTEXT)));
    for path in ["/v1/models/org/other", "/v1/models/org%2Fother"] {
        assert_eq!(server.get(path).ok()["id"], "org/other");
    }
    let other = with(chat("x", 1), json!({"model": "org/other"}));
    assert_eq!(server.chat(&other).ok()["model"], "org/other");
}

#[test]
fn texts_become_tokens_and_come_back() {
    let server = TestServer::start();
    let tokens = server.post("/tokenize", &json!({"prompt": "ok the é", "return_token_strs": true})).ok();
    assert_eq!(
        (&tokens["count"], &tokens["max_model_len"]),
        (&json!(tokens["tokens"].as_array().unwrap().len()), &json!(CONTEXT))
    );
    assert_eq!(tokens["token_strs"][0], "ok");
    let back = server.post("/detokenize", &json!({"tokens": tokens["tokens"]})).ok();
    assert_eq!(back["prompt"], "ok the é");
    let messages = json!([{"role": "user", "content": "x"}]);
    let chat = server.post("/tokenize", &json!({"messages": messages})).ok();
    assert_eq!(chat["token_strs"], serde_json::Value::Null);
    let text = server.post("/detokenize", &json!({"tokens": chat["tokens"]})).ok();
    assert_eq!(text["prompt"], "user: x\nassistant: ");
    for wrong in [json!({}), json!({"prompt": "x", "messages": messages})] {
        assert_eq!(server.post("/tokenize", &wrong).error(400)["param"], "prompt");
    }
    assert_eq!(server.post("/detokenize", &json!({"tokens": [9999]})).error(400)["param"], "tokens");
}

#[test]
fn metrics_have_vllms_names() {
    let server = TestServer::start();
    server.chat(&with(chat("Hello", 7), json!({"n": 2}))).ok();
    server.until_idle();
    let metrics = server.get("/metrics");
    assert!(metrics.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    let value = |name: &str| {
        let line = metrics.body.lines().find(|line| line.starts_with(&format!("vllm:{name}{{")));
        let line = line.unwrap_or_else(|| panic!("{name} is missing: {}", metrics.body));
        assert!(line.contains("model_name=\"test\"") && line.contains("engine=\"0\""), "{line}");
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    for (name, expected) in [
        ("num_requests_running", 0.0),
        ("num_requests_waiting", 0.0),
        ("kv_cache_usage_perc", 0.0),
        ("num_preemptions_total", 0.0),
        ("generation_tokens_total", 14.0),
        ("time_to_first_token_seconds_count", 1.0),
        ("inter_token_latency_seconds_count", 12.0),
        ("e2e_request_latency_seconds_count", 2.0),
        ("request_queue_time_seconds_count", 2.0),
        ("request_prefill_time_seconds_count", 2.0),
        ("request_decode_time_seconds_count", 2.0),
        ("request_inference_time_seconds_count", 2.0),
        ("request_generation_tokens_sum", 14.0),
        ("request_params_n_sum", 2.0),
    ] {
        assert_eq!(value(name), expected, "{name}");
    }
    assert!(value("prompt_tokens_total") > 10.0);
    // Each of the answers has the prompt, and the second finds it.
    assert_eq!(value("prefix_cache_queries_total"), 2.0 * value("prompt_tokens_total"));
    assert!(value("prefix_cache_hits_total") > 10.0);
    // An answer's times are parts of the whole.
    let (prefill, decode) =
        (value("request_prefill_time_seconds_sum"), value("request_decode_time_seconds_sum"));
    assert!((value("request_inference_time_seconds_sum") - prefill - decode).abs() < 1e-6);
    let engine = value("request_queue_time_seconds_sum") + prefill + decode;
    assert!(prefill > 0.0 && engine <= value("e2e_request_latency_seconds_sum"));
    // What was computed is counted step by step: each token but the last of each answer is.
    let computed = value("prefix_cache_queries_total") - value("prefix_cache_hits_total") + 2.0 * 6.0;
    assert_eq!(value("iteration_tokens_total_sum"), computed);
    assert!(value("iteration_tokens_total_count") >= 7.0);
    assert!(metrics.body.contains("# TYPE vllm:iteration_tokens_total histogram\n"), "{}", metrics.body);
    assert!(metrics.body.contains("le=\"16384.0\"} "), "{}", metrics.body);
    assert!(metrics.body.contains("block_size=\"4\",num_gpu_blocks=\"1600\"} 1\n"), "{}", metrics.body);
    let ended = |reason: &str, count: usize| {
        let line = format!("finished_reason=\"{reason}\"}} {count}\n");
        assert!(metrics.body.contains(&line), "{line} in {}", metrics.body);
    };
    for (reason, count) in [("length", 2), ("stop", 0), ("abort", 0), ("error", 0)] {
        ended(reason, count);
    }
    assert!(metrics.body.ends_with("# EOF\n"));
}

#[test]
fn each_documented_path_is_there() {
    let server = TestServer::start();
    let document = server.get("/openapi.json").ok();
    let paths = document["paths"].as_object().unwrap();
    assert_eq!(paths.len(), 10);
    for (path, methods) in paths {
        for method in methods.as_object().unwrap().keys() {
            let method = method.to_ascii_uppercase();
            let path = path.replace("{id}", "test");
            let body = (method == "POST").then_some("{}");
            let response = client::send(server.address, &method, &path, &[], body);
            let expected = if method == "POST" { 400 } else { 200 };
            assert_eq!(response.status, expected, "{method} {path}: {response:?}");
        }
    }
    let fields = document["components"]["schemas"]["ChatRequest"].to_string();
    for field in ["messages", "top_k", "stream_options", "max_completion_tokens", "logit_bias"] {
        assert!(fields.contains(&format!("\"{field}\"")), "{fields}");
    }
}

#[test]
fn the_page_loads_nothing_from_elsewhere() {
    let server = TestServer::start();
    let page = server.get("/");
    let policy = page.header("content-security-policy").unwrap();
    assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
    let nonce = policy.split("'nonce-").nth(1).unwrap().split('\'').next().unwrap();
    assert_eq!(page.body.matches(&format!("nonce=\"{nonce}\"")).count(), 2);
    assert!(!page.body.contains("http://") && !page.body.contains("https://") && !page.body.contains("{{"));
    assert_ne!(server.get("/").header("content-security-policy"), Some(policy));
}

#[test]
fn ids_of_requests_are_taken_or_made() {
    let server = TestServer::start();
    let send = |id: &str| {
        let body = chat("x", 1).to_string();
        client::send(server.address, "POST", "/v1/chat/completions", &[("X-Request-Id", id)], Some(&body))
    };
    let taken = send("my-id");
    assert_eq!((taken.header("x-request-id"), &taken.ok()["id"]), (Some("my-id"), &json!("chatcmpl-my-id")));
    let long = "x".repeat(200);
    for made in [send(""), send(&long)] {
        assert_eq!(made.header("x-request-id").unwrap().len(), 32);
    }
    assert_eq!(server.get("/nowhere").header("x-request-id").unwrap().len(), 32);
}

#[test]
fn pages_of_other_origins_ask_only_where_it_is_allowed() {
    let ask = |server: &TestServer| {
        let headers = [("Origin", "https://a.example"), ("Access-Control-Request-Method", "POST")];
        let answer = client::send(server.address, "OPTIONS", "/v1/chat/completions", &headers, None);
        answer.header("access-control-allow-origin").map(str::to_owned)
    };
    assert_eq!(ask(&TestServer::start()), None);
    let allowed = |origin: &str| {
        let options = ServerOptions { cors: vec![origin.into()], ..options() };
        ask(&TestServer::with(options, llm(config(), |backend| backend)))
    };
    assert_eq!(allowed("https://a.example").as_deref(), Some("https://a.example"));
    assert_eq!(allowed("https://b.example"), None);
    assert_eq!(allowed("*").as_deref(), Some("*"));
}
