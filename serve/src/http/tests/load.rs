//! Many clients at a time, of which a third leave midway.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicUsize, Ordering},
};

use serde_json::json;

use super::*;

const CLIENTS: usize = 512;

/// The prompt and the length of an answer; there are few different ones.
fn request(number: usize) -> (String, usize) {
    let number = number % 23;
    let last = char::from(b'A' + number as u8);
    (format!("{}{last}", "word ".repeat(number % 7)), 3 + number * 2)
}

#[test]
fn many_clients_are_answered_as_if_each_were_alone() {
    let config = EngineConfig { num_pages: 400, ..config() };
    let server = TestServer::with(options(), llm(config, |backend| backend));
    let solo: HashMap<_, _> = (0..23)
        .map(|number| {
            let (prompt, tokens) = request(number);
            let answer = server.complete(&completion(prompt, tokens)).ok();
            (number, answer["choices"][0]["text"].as_str().unwrap().to_owned())
        })
        .collect();
    let (begin, left, refused) = (Instant::now(), AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (server, solo, left, refused) = (&server, &solo, &left, &refused);
            let work = move || {
                let (prompt, tokens) = request(client);
                let body = completion(prompt, tokens);
                if client % 3 == 0 {
                    let mut stream = server.stream("/v1/completions", &with(body, json!({"stream": true})));
                    stream.next_data();
                    stream.leave();
                    left.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                loop {
                    let response = server.complete(&body);
                    if response.status == 429 {
                        refused.fetch_add(1, Ordering::Relaxed);
                        thread::sleep(Duration::from_millis(20));
                        continue;
                    }
                    assert_eq!(response.ok()["choices"][0]["text"], solo[&(client % 23)]);
                    return;
                }
            };
            thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, work).unwrap();
        }
    });
    println!("{CLIENTS} clients took {:?}, {left:?} left, {refused:?} refused", begin.elapsed());
    assert!(begin.elapsed() < Duration::from_secs(120));
    server.until_idle();
    let status = server.status();
    assert_eq!(status.stats.begun.max(status.stats.ended), status.stats.ended, "{status:?}");
}
