//! The pinned model says what it is known to say.

use std::sync::OnceLock;

use flashinfer_rs::artifacts::ArtifactError;

use crate::{
    Fetch, Member, Result, Store, StoreConfig, Text,
    cpu::Cpu,
    engine::{Batch, CacheSize, Chunk, Engine},
    model::{Ends, Layer, Model},
    requests::{self, Pages, Request},
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
        28, 260, 2240, 282, 23324, 27108, 436, 253, 15114, 39228, 28, 351, 25854, 41658, 284, 14055, 9018, 30,
        1249, 347, 260, 929, 3514, 411, 28, 260, 2240, 2585, 288, 5946, 624, 2798,
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
    fn cpu(&self, size: CacheSize) -> Cpu {
        let layers = self.layers.iter().cloned().map(Ok);
        Cpu::new(&self.model.config, self.ends.clone(), layers, size).unwrap()
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
    for whole in ["The capital of France is Paris.", "naïve — 東京 🦀🧪 é", " two  spaces\n\tand a tab"] {
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
    let size = CacheSize::for_tokens(128, 16);
    let mut cpu = loaded.cpu(size);
    let mut pages = Pages::new(size);
    for (prompt, expected) in [CHAT, STORY, CAPITAL] {
        let mut request = Request::new(prompt.into(), size).unwrap();
        while request.answer().len() < expected.len() {
            requests::step(&mut cpu, &mut pages, &mut [&mut request], 64).unwrap();
        }
        assert_eq!(request.answer(), expected);
        pages.release(&mut request);
    }
    assert_eq!(pages.used(), 0);
}

#[test]
fn a_mixed_batch_gives_the_same_ids() {
    let Some(loaded) = loaded() else { return };
    // Pages of 5 tokens, so that chunks and pages end in different places.
    let size = CacheSize::for_tokens(130, 5);
    let mut cpu = loaded.cpu(size);
    let mut pages = Pages::new(size);
    let cases = [STORY, CHAT, CAPITAL];
    let mut requests = cases.map(|(prompt, _)| Request::new(prompt.into(), size).unwrap());
    let (mut steps, mut mixed) = (0, 0);
    loop {
        // The second prompt is read while the first request decodes, 7 tokens
        // in a step; the third joins later.
        let joined = if steps < 4 { 2 } else { 3 };
        let mut active: Vec<_> = requests[..joined]
            .iter_mut()
            .zip(cases)
            .filter(|(request, (_, expected))| request.answer().len() < expected.len())
            .map(|(request, _)| request)
            .collect();
        if active.is_empty() {
            break;
        }
        mixed += usize::from(
            active.iter().any(|r| r.answer().is_empty()) && active.iter().any(|r| !r.answer().is_empty()),
        );
        let computed = requests::step(&mut cpu, &mut pages, &mut active, 7).unwrap();
        assert!((1..=7).contains(&computed));
        steps += 1;
    }
    assert!(mixed >= 5, "{mixed} of {steps} steps were mixed");
    for (request, (_, expected)) in requests.iter().zip(cases) {
        assert_eq!(request.answer(), expected);
    }
}

#[test]
fn logits_of_several_tokens_are_those_of_single_steps() {
    let Some(loaded) = loaded() else { return };
    let size = CacheSize::for_tokens(32, 4);
    let (mut cpu, tokens) = (loaded.cpu(size), CAPITAL.0);
    let mut singles = Vec::new();
    for cached in 0..tokens.len() {
        let chunk = Chunk {
            tokens: &tokens[cached..=cached],
            cached,
            pages: &[6, 1][..=cached / 4],
            outputs: 1,
        };
        cpu.step(&Batch::new(size, &[chunk]).unwrap()).unwrap();
        singles.extend(cpu.logits().unwrap());
    }
    // A draft of three tokens after two, and a chunk that wants none.
    let chunk = |range: std::ops::Range<usize>, outputs| Chunk {
        tokens: &tokens[range.clone()],
        cached: range.start,
        pages: &[3, 0][..range.end.div_ceil(4)],
        outputs,
    };
    cpu.step(&Batch::new(size, &[chunk(0..2, 0)]).unwrap()).unwrap();
    assert!(cpu.logits().unwrap().is_empty() && cpu.greedy().unwrap().is_empty());
    cpu.step(&Batch::new(size, &[chunk(2..5, 3)]).unwrap()).unwrap();
    let together = cpu.logits().unwrap();
    let vocab = loaded.model.config.vocab_size;
    assert_eq!(together.len(), 3 * vocab);
    for (a, b) in together.iter().zip(&singles[2 * vocab..]) {
        assert!((a - b).abs() < 1e-3, "{a} and {b}");
    }
    assert_eq!(cpu.greedy().unwrap()[2], CAPITAL.1[0]);
}
