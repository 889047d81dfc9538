//! Logits that are no numbers.

use super::*;

/// Four requests, of which the second and the last hold a token that makes NaN: these
/// end without an answer. Gives the prompts and answers of the others.
pub fn check_no_numbers(engine: &mut dyn Backend, pool: &PageAllocator) -> [(&'static [u32], Vec<u32>); 2] {
    const PROMPTS: [&[u32]; 4] =
        [&[11, 3, 5], &[2, forward::INFINITE, 4, 9], &[20, 21, 22, 23, 24], &[forward::INFINITE]];
    let limits = Limits { ends: [].into(), ..limits(16, 2) };
    let mut requests = Requests::new(pool, engine.vocab_size(), limits);
    for prompt in PROMPTS {
        requests.submit(prompt, &greedy(10)).unwrap();
    }
    requests.finish(engine);
    for failed in [1, 3] {
        let answer = requests.answer(failed);
        assert_eq!((answer.ids(), &answer.finish), (vec![], &Some(Finish::NoNumbers)));
    }
    let answers = [0, 2].map(|request| {
        assert_eq!(requests.answer(request).finish, Some(Finish::MaxTokens));
        (PROMPTS[request], requests.answer(request).ids())
    });
    assert!(answers.iter().all(|(_, answer)| answer.len() == 10));
    drop(requests);
    assert_eq!(pool.used_pages(), 0);
    answers
}

#[test]
fn requests_of_nan_end_and_the_others_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open(&forward::with_an_infinite_token().write(&folder)).unwrap();
    let pool = PageAllocator::new(32, 4).unwrap();
    let mut cpu = Cpu::new(&model.config, model.ends().unwrap(), model.layers(), &pool).unwrap();
    for (prompt, expected) in check_no_numbers(&mut cpu, &pool) {
        let limits = Limits { ends: [].into(), ..limits(16, 0) };
        assert_eq!(solo(&mut cpu, &pool, prompt, 10, limits).0, expected);
    }
}

#[test]
fn the_error_names_requests_of_nan() {
    let folder = tempfile::tempdir().unwrap();
    let mut tiny = sentencepiece::with(&[]);
    let nan = |name: &str, shape: &[usize], at: usize| match name {
        "token_embd.weight" if at / shape[1] == forward::INFINITE as usize => f32::NAN,
        _ => (at as f32 * 0.7).sin() * 0.25,
    };
    let vocab = tiny.tensors["token_embd.weight"].clone();
    tiny.tensors.insert("output.weight".into(), vocab);
    tiny.value = nan;
    let model = Model::open(&tiny.write(&folder)).unwrap();
    let text = Arc::new(Text::from_gguf(&model.content).unwrap());
    let config = EngineConfig { page_size: 4, num_pages: 8, ..EngineConfig::new(limits(16, 0)) };
    let outcome = |prompts: &[&[u32]]| {
        let (ends, layers) = (model.ends().unwrap(), model.layers().collect::<Vec<_>>());
        let parts = model.config.clone();
        let load =
            move |pool: &PageAllocator, _: &mut Limits| Cpu::new(&parts, ends, layers.into_iter(), pool);
        let engine = Engine::start(config.clone(), text.clone(), load).unwrap();
        let asked = prompts.iter().enumerate().map(|(index, prompt)| Asked {
            name: if prompts.len() > 1 { format!("line {}", index + 1) } else { String::new() },
            heading: None,
            events: Ok(engine.submit(Request::new(prompt.to_vec(), greedy(3))).unwrap()),
        });
        let summary = answer(&engine, asked, &mut Vec::new()).unwrap();
        (summary.to_string(), summary.check().map_err(|error| error.to_string()))
    };
    let bad: &[u32] = &[forward::INFINITE];
    let (summary, error) = outcome(&[&[5], bad, &[6], bad]);
    assert!(summary.contains("4 prompts") && summary.contains("no numbers (2)"), "{summary}");
    let error = error.unwrap_err();
    assert!(error.starts_with("line 2, line 4: the model's logits are no numbers"), "{error}");
    assert!(outcome(&[bad]).1.unwrap_err().starts_with("the model's logits are no numbers"));
    assert_eq!(outcome(&[&[5], &[6]]).1, Ok(()));
}
