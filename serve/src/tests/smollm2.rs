//! The pinned model says what it is known to say.

use super::*;

/// Prompts and what greedy decoding adds to them.
pub const CHAT: (&[u32], &[u32]) = (
    &[
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712,
        8182, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198,
    ],
    &[504, 3575, 282, 4649, 314, 7042, 30, 2],
);
pub const STORY: (&[u32], &[u32]) = (
    &[6403, 1980, 253, 655],
    &[
        28, 260, 2240, 282, 23324, 27108, 436, 253, 15114, 39228, 28, 351, 25854, 41658, 284, 14055, 9018,
        30, 1249, 347, 260, 929, 3514, 411, 28, 260, 2240, 2585, 288, 5946, 624, 2798,
    ],
);
pub const CAPITAL: (&[u32], &[u32]) = (
    &[504, 3575, 282, 4649, 314],
    &[7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33],
);

pub struct Loaded {
    pub model: Model,
    pub text: Arc<Text>,
    pub ends: Ends,
    pub layers: Vec<Layer>,
}

/// A question, asked as the model's template asks.
pub fn ask(text: &Text, system: Option<&str>, question: &str) -> Vec<u32> {
    let system = system.map(|system| Message::new(Role::System, system));
    let messages: Vec<_> = system.into_iter().chain([Message::new(Role::User, question)]).collect();
    text.render_chat(&messages, &[], &ChatOptions::default()).unwrap()
}

/// The pinned model, loaded once; `None`, after saying why, where it cannot be reached.
pub fn loaded() -> Option<&'static Loaded> {
    static LOADED: OnceLock<Option<Loaded>> = OnceLock::new();
    let load = || {
        let store = Store::open(hub::store_config().unwrap()).unwrap();
        let path = match store.locate(&hub::smollm2(), Fetch::Allowed) {
            Ok(located) => located.path,
            Err(error @ ArtifactError::NotFound { .. }) => {
                required::skip(required::MODEL, error);
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        let model = Model::open(&path).unwrap();
        let text = Arc::new(Text::from_gguf(&model.content).unwrap());
        let (ends, layers) = (model.ends().unwrap(), model.layers().collect::<Result<_>>().unwrap());
        Some(Loaded { model, text, ends, layers })
    };
    LOADED.get_or_init(load).as_ref()
}

impl Loaded {
    pub fn cpu(&self, pool: &PageAllocator) -> Cpu {
        let layers = self.layers.iter().cloned().map(Ok);
        Cpu::new(&self.model.config, self.ends.clone(), layers, pool).unwrap()
    }
}

#[test]
fn the_tokenizer_gives_the_known_ids() {
    let Some(Loaded { text, .. }) = loaded() else { return };
    assert_eq!(ask(text, None, "What is the capital of France?"), CHAT.0);
    assert_eq!(text.encode("Once upon a time"), STORY.0);
    assert_eq!(text.encode("The capital of France is"), CAPITAL.0);
    // Digits stand alone.
    assert_eq!(text.encode("2013"), [34, 32, 33, 35]);
    assert_eq!(text.encode(""), [0u32; 0]);
    let other = ask(text, Some("Be brief."), "Hi");
    assert_eq!((other[0], other.last()), (1, Some(&198)));
    assert!(text.ends().contains(&2) && !text.ends().contains(&1));
}

#[test]
fn text_comes_back_at_character_boundaries() {
    let Some(Loaded { text, .. }) = loaded() else { return };
    for whole in ["The capital of France is Paris.", "naïve — 東京 🦀🧪 é", " two  spaces\n\tand a tab"]
    {
        let ids = text.encode(whole);
        let mut stream = text.stream();
        let mut pieces: Vec<_> = ids.iter().map(|&id| stream.push(id)).collect();
        pieces.push(stream.finish());
        assert_eq!(pieces.concat(), whole);
        assert!(!pieces.concat().contains(char::REPLACEMENT_CHARACTER));
    }
    // Half a character at the end is told, and special tokens are no text.
    let crab = text.encode("🦀");
    assert!(crab.len() > 1);
    let mut stream = text.stream();
    assert_eq!(stream.push(crab[0]), "");
    assert_eq!(stream.finish(), "\u{fffd}");
    assert_eq!(text.stream().push(2), "");
}

#[test]
fn greedy_decoding_gives_the_known_ids() {
    let Some(loaded) = loaded() else { return };
    let pool = PageAllocator::new(8, 16).unwrap();
    check_known_ids(&mut loaded.cpu(&pool), &pool);
}

/// Greedy decoding of one prompt after the other.
pub fn check_known_ids(engine: &mut dyn Backend, pool: &PageAllocator) {
    for (prompt, expected) in [CHAT, STORY, CAPITAL] {
        assert_eq!(solo(engine, pool, prompt, expected.len(), limits(64, 0)).0, expected);
    }
    assert_eq!(pool.used_pages(), 0);
}

#[test]
fn a_mixed_batch_gives_the_same_ids() {
    let Some(loaded) = loaded() else { return };
    // Pages of 5 tokens, so that chunks and pages end in different places.
    let pool = PageAllocator::new(26, 5).unwrap();
    check_mixed_batch(&mut loaded.cpu(&pool), &pool);
}

/// The three prompts, of which some are read while others decode.
pub fn check_mixed_batch(engine: &mut dyn Backend, pool: &PageAllocator) {
    let mut requests = Requests::new(pool, engine.vocab_size(), limits(7, 0));
    let (mut steps, mut mixed) = (0, 0);
    while steps < 5 || !requests.scheduler.is_done() {
        // The first decodes while the second prompt is read, 7 tokens in a step.
        let joining = match steps {
            0 => Some(STORY),
            2 => Some(CHAT),
            4 => Some(CAPITAL),
            _ => None,
        };
        if let Some((prompt, _)) = joining {
            requests.submit(prompt, &greedy(16)).unwrap();
        }
        let before = requests.scheduler.stats();
        requests.step(engine);
        let after = requests.scheduler.stats();
        mixed += usize::from(after.read > before.read && after.decoded > before.decoded);
        steps += 1;
    }
    assert!(mixed >= 5, "{mixed} of {steps} steps were mixed");
    assert_eq!(requests.scheduler.stats().preemptions, 0);
    for (request, (_, expected)) in [STORY, CHAT, CAPITAL].into_iter().enumerate() {
        assert_eq!(requests.answer(request).ids(), expected[..expected.len().min(16)]);
    }
    drop(requests);
    assert_eq!(pool.used_pages(), 0);
}

#[test]
fn few_pages_and_a_shared_prefix_give_the_same_ids() {
    let Some(loaded) = loaded() else { return };
    let pool = PageAllocator::new(17, 3).unwrap();
    check_few_pages(&mut loaded.cpu(&pool), &pool, &loaded.text);
}

/// Three prompts and drafts, in 17 pages of 3 tokens.
pub fn check_few_pages(engine: &mut dyn Backend, pool: &PageAllocator, text: &Text) {
    // The second question has the system prompt and more in common with the first.
    let italy = ask(text, None, "What is the capital of Italy?");
    let common = CHAT.0.iter().zip(&italy).take_while(|(a, b)| a == b).count();
    assert!(common > 26, "{common} tokens");
    let alone = solo(engine, pool, &italy, 16, limits(24, 0)).0;
    let mut requests = Requests::new(pool, engine.vocab_size(), limits(24, 2));
    for prompt in [STORY.0, CHAT.0, &italy] {
        requests.submit(prompt, &greedy(16)).unwrap();
    }
    requests.finish(engine);
    let stats = requests.scheduler.stats();
    assert!(stats.preemptions > 0 && stats.recomputed > 0, "{stats:?}");
    assert_eq!(stats.saved, common / pool.page_size() * pool.page_size(), "{stats:?}");
    for (request, answer) in [&STORY.1[..16], CHAT.1, &alone].into_iter().enumerate() {
        assert_eq!(requests.answer(request).ids(), answer);
    }
    drop(requests);
    assert_eq!(pool.used_pages(), 0);
}

#[test]
fn drafts_save_steps_and_change_no_id() {
    let Some(loaded) = loaded() else { return };
    let pool = PageAllocator::new(16, 5).unwrap();
    check_drafts(&mut loaded.cpu(&pool), &pool, &loaded.text);
}

/// A prompt that repeats itself, with and without drafts.
pub fn check_drafts(engine: &mut dyn Backend, pool: &PageAllocator, text: &Text) {
    let prompt = text.encode("red blue red blue red blue red blue red");
    let (plain, stats) = solo(engine, pool, &prompt, 20, limits(64, 0));
    assert_eq!((stats.steps, stats.drafted), (20, 0));
    let (drafted, stats) = solo(engine, pool, &prompt, 20, limits(64, 4));
    assert_eq!(drafted, plain);
    assert_eq!(stats.steps + stats.accepted, 20, "{stats:?}");
    assert!(stats.steps <= 8, "{stats:?}");
}

/// A model that drafts for itself has every draft right, greedy or drawn: both draw with the same
/// random numbers.
#[test]
fn a_model_that_drafts_for_itself_is_right() {
    let Some(loaded) = loaded() else { return };
    let pool = PageAllocator::new(16, 16).unwrap();
    check_draft_model(&mut loaded.cpu(&pool), &pool, |pool| loaded.cpu(pool));
}

/// Answers with drafts of the model itself.
pub fn check_draft_model<B: Backend + 'static>(
    engine: &mut dyn Backend,
    pool: &PageAllocator,
    load: impl FnOnce(&PageAllocator) -> B,
) {
    let drawn = SamplingParams { temperature: 0.8, top_p: 0.9, seed: Some(7), ..greedy(24) };
    let answers = |requests: &mut Requests, engine: &mut dyn Backend| {
        for params in [&greedy(24), &drawn] {
            requests.submit(STORY.0, params).unwrap();
        }
        requests.finish(engine);
        [0, 1].map(|request| requests.answer(request).ids())
    };
    let mut plain = Requests::new(pool, engine.vocab_size(), limits(64, 0));
    let want = answers(&mut plain, engine);
    assert_eq!(want[0], STORY.1[..24]);
    let model = draft_model(16, 16, &limits(64, 4), |pool, _| load(pool));
    let mut drafted = Requests::new(pool, engine.vocab_size(), limits(64, 4)).with_draft_model(model);
    assert_eq!(answers(&mut drafted, engine), want);
    let stats = drafted.scheduler.stats();
    assert!(stats.accepted * 10 > stats.drafted * 9 && stats.steps <= 8, "{stats:?}");
}

#[test]
fn logits_of_several_tokens_are_those_of_single_steps() {
    let Some(loaded) = loaded() else { return };
    let pool = PageAllocator::new(8, 4).unwrap();
    let (mut cpu, tokens) = (loaded.cpu(&pool), CAPITAL.0);
    let mut batch = Batch::new(&pool);
    let mut compute = |tokens: &[u32], outputs: &[usize], batch: &mut Batch| {
        batch.append([tokens.len()]).unwrap();
        let outputs: Vec<_> = outputs.iter().copied().map(Output::greedy).collect();
        let best = cpu.step(&Step { batch, tokens: &StepToken::known(tokens), outputs: &outputs }).unwrap();
        (cpu.logits().unwrap(), self::tokens(&best))
    };
    batch.push(Sequence::new(&pool)).unwrap();
    let mut singles = Vec::new();
    for token in tokens.chunks(1) {
        singles.extend(compute(token, &[0], &mut batch).0);
    }
    batch.truncate(0, 0).unwrap();
    // A step that wants no logits, and one like a draft of two tokens.
    assert_eq!(compute(&tokens[..2], &[], &mut batch), (vec![], vec![]));
    let (together, best) = compute(&tokens[2..], &[0, 1, 2], &mut batch);
    let vocab = loaded.model.config.vocab_size;
    assert_eq!(together.len(), 3 * vocab);
    for (a, b) in together.iter().zip(&singles[2 * vocab..]) {
        assert!((a - b).abs() < 1e-3, "{a} and {b}");
    }
    assert_eq!(best[2], CAPITAL.1[0]);
}
