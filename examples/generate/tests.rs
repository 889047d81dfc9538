//! The pinned model says what it is known to say.

use std::sync::OnceLock;

use flashinfer_rs::{
    artifacts::ArtifactError,
    kv::{Batch, Sequence},
};

use crate::{
    Fetch, Member, PageAllocator, Requests, Result, Store, StoreConfig, Text,
    cpu::Cpu,
    engine::{Engine, Step},
    model::{Ends, Layer, Model},
};

/// Prompts and what greedy decoding adds to them.
const CHAT: (&[u32], &[u32]) = (
    &[
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712,
        8182, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198,
    ],
    &[504, 3575, 282, 4649, 314, 7042, 30, 2],
);
const STORY: (&[u32], &[u32]) = (
    &[6403, 1980, 253, 655],
    &[
        28, 260, 2240, 282, 23324, 27108, 436, 253, 15114, 39228, 28, 351, 25854, 41658, 284, 14055, 9018,
        30, 1249, 347, 260, 929, 3514, 411, 28, 260, 2240, 2585, 288, 5946, 624, 2798,
    ],
);
const CAPITAL: (&[u32], &[u32]) = (
    &[504, 3575, 282, 4649, 314],
    &[7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33],
);

struct Loaded {
    model: Model,
    text: Text,
    ends: Ends,
    layers: Vec<Layer>,
}

/// The pinned model, loaded once; `None`, after saying why, where it cannot be reached.
fn loaded() -> Option<&'static Loaded> {
    static LOADED: OnceLock<Option<Loaded>> = OnceLock::new();
    let load = || {
        let store = Store::open(StoreConfig::from_env().unwrap()).unwrap();
        let path = match store.locate(&Member::SmolLm2, Fetch::Allowed) {
            Ok(located) => located.path,
            Err(error @ ArtifactError::NotFound { .. }) => {
                eprintln!("skipped: the model is not at hand: {error}");
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        let model = Model::open(&path).unwrap();
        let text = Text::from_gguf(&model.content).unwrap();
        let (ends, layers) = (model.ends().unwrap(), model.layers().collect::<Result<_>>().unwrap());
        Some(Loaded { model, text, ends, layers })
    };
    LOADED.get_or_init(load).as_ref()
}

impl Loaded {
    fn cpu(&self, pool: &PageAllocator) -> Cpu {
        let layers = self.layers.iter().cloned().map(Ok);
        Cpu::new(&self.model.config, self.ends.clone(), layers, pool).unwrap()
    }
}

#[test]
fn the_tokenizer_gives_the_known_ids() {
    let Some(Loaded { text, .. }) = loaded() else { return };
    assert_eq!(text.encode_chat(None, "What is the capital of France?").unwrap(), CHAT.0);
    assert_eq!(text.encode("Once upon a time").unwrap(), STORY.0);
    assert_eq!(text.encode("The capital of France is").unwrap(), CAPITAL.0);
    // Digits stand alone.
    assert_eq!(text.encode("2013").unwrap(), [34, 32, 33, 35]);
    assert_eq!(text.encode("").unwrap(), [0u32; 0]);
    let other = text.encode_chat(Some("Be brief."), "Hi").unwrap();
    assert_eq!((other[0], other.last()), (1, Some(&198)));
    assert!(text.is_end(2) && !text.is_end(1));
}

#[test]
fn text_comes_back_at_character_boundaries() {
    let Some(Loaded { text, .. }) = loaded() else { return };
    for whole in ["The capital of France is Paris.", "naïve — 東京 🦀🧪 é", " two  spaces\n\tand a tab"]
    {
        let ids = text.encode(whole).unwrap();
        let mut stream = text.stream();
        let mut pieces: Vec<_> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        assert_eq!(pieces.concat(), whole);
        assert!(!pieces.concat().contains(char::REPLACEMENT_CHARACTER));
    }
    // Half a character at the end is told, and special tokens are no text.
    let crab = text.encode("🦀").unwrap();
    assert!(crab.len() > 1);
    let mut stream = text.stream();
    assert_eq!(stream.push(crab[0]).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");
    assert_eq!(text.stream().push(2).unwrap(), "");
}

#[test]
fn greedy_decoding_gives_the_known_ids() {
    let Some(loaded) = loaded() else { return };
    let pool = PageAllocator::new(8, 16).unwrap();
    let (mut cpu, mut requests) = (loaded.cpu(&pool), Requests::new(&pool));
    for (prompt, expected) in [CHAT, STORY, CAPITAL] {
        requests.push(prompt.into()).unwrap();
        while requests.all()[0].answer().len() < expected.len() {
            requests.step(&mut cpu, 64).unwrap();
        }
        assert_eq!(requests.remove(0).unwrap().answer(), expected);
    }
    assert_eq!(pool.used_pages(), 0);
}

#[test]
fn a_mixed_batch_gives_the_same_ids() {
    let Some(loaded) = loaded() else { return };
    // Pages of 5 tokens, so that chunks and pages end in different places.
    let pool = PageAllocator::new(26, 5).unwrap();
    let (mut cpu, mut requests) = (loaded.cpu(&pool), Requests::new(&pool));
    let (mut steps, mut mixed, mut ended) = (0, 0, 0);
    while ended < 3 {
        // The first decodes while the second prompt is read, 7 tokens in a step.
        let joining = match steps {
            0 => Some(STORY),
            2 => Some(CHAT),
            4 => Some(CAPITAL),
            _ => None,
        };
        if let Some((prompt, _)) = joining {
            requests.push(prompt.into()).unwrap();
        }
        let reading = requests.all().iter().filter(|request| request.answer().is_empty()).count();
        mixed += usize::from((1..requests.all().len()).contains(&reading));
        requests.step(&mut cpu, 7).unwrap();
        steps += 1;
        for index in (0..requests.all().len()).rev() {
            let request = &requests.all()[index];
            let case = [CHAT, STORY, CAPITAL].into_iter().find(|case| case.0 == request.prompt());
            let (_, expected) = case.expect("one of the three prompts");
            if request.answer().len() == expected.len() {
                assert_eq!(requests.remove(index).unwrap().answer(), expected);
                ended += 1;
            }
        }
    }
    assert!(mixed >= 5, "{mixed} of {steps} steps were mixed");
    assert_eq!(pool.used_pages(), 0);
}

#[test]
fn logits_of_several_tokens_are_those_of_single_steps() {
    let Some(loaded) = loaded() else { return };
    let pool = PageAllocator::new(8, 4).unwrap();
    let (mut cpu, tokens) = (loaded.cpu(&pool), CAPITAL.0);
    let mut batch = Batch::new(&pool);
    let mut compute = |tokens: &[u32], outputs: &[usize], batch: &mut Batch| {
        batch.append([tokens.len()]).unwrap();
        cpu.step(&Step { batch, tokens, outputs }).unwrap();
        (cpu.logits().unwrap(), cpu.greedy().unwrap())
    };
    batch.push(Sequence::new(&pool)).unwrap();
    let mut singles = Vec::new();
    for token in tokens.chunks(1) {
        singles.extend(compute(token, &[0], &mut batch).0);
    }
    batch.truncate(0, 0).unwrap();
    // A step that wants no logits, and one like a draft of two tokens.
    assert_eq!(compute(&tokens[..2], &[], &mut batch), (vec![], vec![]));
    let (together, greedy) = compute(&tokens[2..], &[0, 1, 2], &mut batch);
    let vocab = loaded.model.config.vocab_size;
    assert_eq!(together.len(), 3 * vocab);
    for (a, b) in together.iter().zip(&singles[2 * vocab..]) {
        assert!((a - b).abs() < 1e-3, "{a} and {b}");
    }
    assert_eq!(greedy[2], CAPITAL.1[0]);
}

#[test]
fn prompts_that_do_not_fit_are_refused() {
    let pool = PageAllocator::new(2, 4).unwrap();
    let mut requests = Requests::new(&pool);
    let text = requests.push(vec![0; 8]).unwrap_err().to_string();
    assert!(text.contains("8 tokens") && text.contains("--cache-tokens"), "{text}");
    assert!(requests.push(Vec::new()).unwrap_err().to_string().contains("empty"));
    requests.push(vec![0; 7]).unwrap();
    assert!(requests.has_room(0));
}
