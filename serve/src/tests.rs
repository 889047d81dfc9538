//! The pinned model says what it is known to say, and other files are refused
//! or run as they should be.

mod architectures;
pub(crate) mod bytes;
pub(crate) mod forward;
mod gpu;
mod keys;
mod sentencepiece;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    slice,
    sync::{Arc, OnceLock},
};

use candle_core::{
    Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
};
use flashinfer_rs::{
    artifacts::{ArtifactError, Fetch, Store},
    kv::{Batch, PageAllocator, Sequence},
};

use tempfile::TempDir;
use test_support::required;

use crate::{
    Result,
    backend::{Backend, Output, Sample, Step, cpu::Cpu},
    cli::answers::{Asked, answer},
    engine::{Engine, EngineConfig},
    hub,
    model::{Ends, Layer, Model},
    request::{Finish, Request},
    scheduler::{
        Limits, Stats,
        testing::{Requests, greedy},
    },
    text::{ChatOptions, EncodeOptions, Message, Role, Text},
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
    text: Arc<Text>,
    ends: Ends,
    layers: Vec<Layer>,
}

/// A question, asked as the model's template asks.
fn ask(text: &Text, system: Option<&str>, question: &str) -> Vec<u32> {
    let system = system.map(|system| Message::new(Role::System, system));
    let messages: Vec<_> = system.into_iter().chain([Message::new(Role::User, question)]).collect();
    text.render_chat(&messages, &[], &ChatOptions::default()).unwrap()
}

/// The pinned model, loaded once; `None`, after saying why, where it cannot be reached.
fn loaded() -> Option<&'static Loaded> {
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
    fn cpu(&self, pool: &PageAllocator) -> Cpu {
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

/// Limits for the known answers, of which only the first ends by itself.
fn limits(step_tokens: usize, draft: usize) -> Limits {
    Limits { step_tokens, max_running: 64, context: 8192, draft, ends: [2].into() }
}

/// What a request is answered when it is alone.
fn solo(
    engine: &mut dyn Backend,
    pool: &PageAllocator,
    prompt: &[u32],
    max_tokens: usize,
    limits: Limits,
) -> (Vec<u32>, Stats) {
    let mut requests = Requests::new(pool, engine.vocab_size(), limits);
    requests.submit(prompt, &greedy(max_tokens)).unwrap();
    requests.finish(engine);
    (requests.answer(0).ids(), requests.scheduler.stats())
}

/// The tokens after the outputs of a step, all of which have one.
fn tokens(samples: &[Sample]) -> Vec<u32> {
    samples.iter().map(|sample| sample.token.expect("logits that are numbers")).collect()
}

/// Four requests, of which the second and the last hold a token that makes NaN: these
/// end without an answer. Gives the prompts and answers of the others.
fn check_no_numbers(engine: &mut dyn Backend, pool: &PageAllocator) -> [(&'static [u32], Vec<u32>); 2] {
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
            events: Ok(engine.submit(Request { prompt: prompt.to_vec(), params: greedy(3) }).unwrap()),
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

#[test]
fn greedy_decoding_gives_the_known_ids() {
    let Some(loaded) = loaded() else { return };
    let pool = PageAllocator::new(8, 16).unwrap();
    check_known_ids(&mut loaded.cpu(&pool), &pool);
}

/// Greedy decoding of one prompt after the other.
fn check_known_ids(engine: &mut dyn Backend, pool: &PageAllocator) {
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
fn check_mixed_batch(engine: &mut dyn Backend, pool: &PageAllocator) {
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
fn check_few_pages(engine: &mut dyn Backend, pool: &PageAllocator, text: &Text) {
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
fn check_drafts(engine: &mut dyn Backend, pool: &PageAllocator, text: &Text) {
    let prompt = text.encode("red blue red blue red blue red blue red");
    let (plain, stats) = solo(engine, pool, &prompt, 20, limits(64, 0));
    assert_eq!((stats.steps, stats.drafted), (20, 0));
    let (drafted, stats) = solo(engine, pool, &prompt, 20, limits(64, 4));
    assert_eq!(drafted, plain);
    assert_eq!(stats.steps + stats.accepted, 20, "{stats:?}");
    assert!(stats.steps <= 8, "{stats:?}");
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
        let best = cpu.step(&Step { batch, tokens, outputs: &outputs }).unwrap();
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

/// A small file, of this metadata and tensors of these shapes.
pub(crate) struct Tiny {
    metadata: BTreeMap<&'static str, Value>,
    tensors: BTreeMap<String, Vec<usize>>,
    /// The elements of a tensor, by its name, shape and their place.
    value: fn(&str, &[usize], usize) -> f32,
}

impl Tiny {
    /// A model of one layer and one head of 64. Elements are a function of their
    /// place, twice that in an output head. What divides frequencies counts from 1.
    fn new() -> Self {
        let metadata = [
            ("general.architecture", Value::String("llama".into())),
            ("llama.block_count", Value::U32(1)),
            ("llama.context_length", Value::U32(64)),
            ("llama.embedding_length", Value::U32(64)),
            ("llama.feed_forward_length", Value::U32(96)),
            ("llama.attention.head_count", Value::U32(1)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ];
        let tensors = [
            ("token_embd.weight", vec![32, 64]),
            ("output_norm.weight", vec![64]),
            ("blk.0.attn_norm.weight", vec![64]),
            ("blk.0.attn_q.weight", vec![64, 64]),
            ("blk.0.attn_k.weight", vec![64, 64]),
            ("blk.0.attn_v.weight", vec![64, 64]),
            ("blk.0.attn_output.weight", vec![64, 64]),
            ("blk.0.ffn_norm.weight", vec![64]),
            ("blk.0.ffn_gate.weight", vec![96, 64]),
            ("blk.0.ffn_up.weight", vec![96, 64]),
            ("blk.0.ffn_down.weight", vec![64, 96]),
        ];
        let tensors = tensors.map(|(name, shape)| (name.to_owned(), shape));
        let value = |name: &str, _: &[usize], at: usize| match name {
            "rope_freqs.weight" => 1.0 + at as f32,
            "output.weight" => (at as f32 * 0.7).sin() * 0.5,
            _ => (at as f32 * 0.7).sin() * 0.25,
        };
        Self { metadata: metadata.into(), tensors: tensors.into(), value }
    }

    /// The tokenizer that the metadata describes.
    fn text(&self) -> crate::Result<Arc<Text>> {
        let content = gguf_file::Content {
            magic: gguf_file::VersionedMagic::GgufV3,
            metadata: self.metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect(),
            tensor_infos: std::collections::HashMap::new(),
            tensor_data_offset: 0,
        };
        Text::from_gguf(&content).map(Arc::new)
    }

    pub(crate) fn write(&self, folder: &TempDir) -> PathBuf {
        let tensor = |name: &str, shape: &[usize]| {
            let values: Vec<_> =
                (0..shape.iter().product()).map(|at| (self.value)(name, shape, at)).collect();
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
            QTensor::quantize(&tensor, GgmlDType::F32).unwrap()
        };
        let tensors: Vec<_> =
            self.tensors.iter().map(|(name, shape)| (name.as_str(), tensor(name, shape))).collect();
        let metadata: Vec<_> = self.metadata.iter().map(|(key, value)| (*key, value)).collect();
        let path = folder.path().join("tiny.gguf");
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        gguf_file::write(&mut File::create(&path).unwrap(), &metadata, &tensors).unwrap();
        path
    }
}

/// The engine for a file, or why there is none.
fn engine(path: &Path) -> Result<Cpu> {
    let model = Model::open(path)?;
    let pool = PageAllocator::new(4, 4)?;
    Cpu::new(&model.config, model.ends()?, model.layers(), &pool)
}

#[test]
fn files_that_cannot_be_run_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |path: &Path, expected: &str| {
        let text = engine(path).err().expect("no engine").to_string();
        assert!(text.contains(expected), "{expected:?} is not in: {text}");
        assert!(text.contains(path.to_str().unwrap()), "{text}");
    };
    for (key, value, expected) in [
        (
            "general.architecture",
            Value::String("gpt2".into()),
            "its architecture is gpt2; expected one of llama, qwen2,",
        ),
        (
            "llama.attention.key_length",
            Value::U32(63),
            "its heads have 63 dimensions; expected an even number",
        ),
        ("llama.attention.head_count_kv", Value::U32(3), "cannot share 3 KV heads"),
        ("llama.attention.head_count", Value::U32(0), "head_count is 0; expected a positive number"),
        ("llama.rope.dimension_count", Value::U32(72), "is 72; expected a multiple of 8 up to 64"),
        ("llama.rope.dimension_count", Value::U32(20), "is 20; expected a multiple of 8 up to 64"),
        ("llama.expert_count", Value::U32(8), "llama.expert_used_count is missing"),
        ("llama.expert_count", Value::String("8".into()), "expert_count is \"8\"; expected a number"),
        ("llama.attention.scale", Value::F32(-0.25), "attention.scale is -0.25; expected a number from 0 on"),
        (
            "llama.rope.scaling.type",
            Value::String("longrope".into()),
            "rope_factors_long.weight: it is missing",
        ),
        ("llama.rope.scaling.type", Value::String("dynamic".into()), "`dynamic`; expected none, linear"),
        ("llama.rope.scaling.type", Value::U32(1), "rope.scaling.type is 1; expected text"),
        ("llama.rope.scaling.factor", Value::F32(-1.0), "scaling.factor is -1; expected a number from 0 on"),
        ("llama.rope.scaling.factor", Value::F32(f32::NAN), "scaling.factor is NaN; expected a number"),
        ("llama.feed_forward_length", Value::U32(97), "blk.0.ffn_gate.weight: its shape is [96, 64]"),
        ("llama.block_count", Value::U32(2), "blk.1.attn_q.weight: it is missing"),
    ] {
        let mut tiny = Tiny::new();
        tiny.metadata.insert(key, value);
        refused(&tiny.write(&folder), expected);
    }
    for (name, expected) in [
        ("blk.0.attn_norm.bias", "it has a tensor blk.0.attn_norm.bias, which this program does not support"),
        ("output.bias", "it has a tensor output.bias"),
        ("blk.1.attn_q.bias", "it has a tensor blk.1.attn_q.bias"),
        ("blk.0.ffn_gate_inp.weight", "it has a tensor blk.0.ffn_gate_inp.weight"),
        ("blk.0.ffn_gate.0.weight", "it has a tensor blk.0.ffn_gate.0.weight"),
        ("blk.0.ffn_up.bias", "blk.0.ffn_up.bias: its shape is [64]; expected [96]"),
        ("rope_freqs.weight", "rope_freqs.weight: its shape is [64]; expected [32]"),
    ] {
        let mut tiny = Tiny::new();
        tiny.tensors.insert(name.into(), vec![64]);
        refused(&tiny.write(&folder), expected);
    }
    let mut tiny = Tiny::new();
    tiny.metadata.remove("llama.context_length");
    refused(&tiny.write(&folder), "llama.context_length is missing");

    let path = Tiny::new().write(&folder);
    assert!(engine(&path).is_ok());
    let whole = fs::read(&path).unwrap();
    for (len, expected) in [
        (whole.len() - 40, ".weight: it needs"),
        (100, "not a usable GGUF file"),
        (0, "not a usable GGUF file"),
    ] {
        fs::write(&path, &whole[..len]).unwrap();
        refused(&path, expected);
    }
    fs::write(&path, b"no model at all").unwrap();
    refused(&path, "not a usable GGUF file");
    fs::remove_file(&path).unwrap();
    refused(&path, "cannot open the model");
}

impl Tiny {
    /// The logits of three tokens, but for the second's.
    fn logits(&self, folder: &TempDir) -> Vec<f32> {
        let mut cpu = engine(&self.write(folder)).unwrap();
        let pool = PageAllocator::new(4, 4).unwrap();
        let mut batch = Batch::new(&pool);
        batch.push(Sequence::new(&pool)).unwrap();
        batch.append([3]).unwrap();
        let outputs = [0, 2].map(Output::greedy);
        cpu.step(&Step { batch: &batch, tokens: &[5, 0, 31], outputs: &outputs }).unwrap();
        cpu.logits().unwrap()
    }
}

/// As the bar shows it that loading has.
#[test]
fn bytes_are_counted_as_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open(&Tiny::new().write(&folder)).unwrap();
    let numbers: usize = Tiny::new().tensors.values().map(|shape| shape.iter().product::<usize>()).sum();
    assert_eq!((model.bytes(), model.bytes_read()), (4 * numbers as u64, 0));
    let _ends = model.ends().unwrap();
    let ends = model.bytes_read();
    assert_eq!(ends, 4 * (32 * 64 + 64));
    assert!(model.layers().all(|layer| layer.is_ok() && model.bytes_read() > ends));
    assert_eq!(model.bytes_read(), model.bytes());
}

#[test]
fn a_head_of_its_own_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let mut tiny = Tiny::new();
    let tied = tiny.logits(&folder);
    assert!(tied.len() == 64 && tied.iter().any(|logit| logit.abs() > 1e-3));
    tiny.tensors.insert("output.weight".into(), vec![32, 64]);
    let doubled: Vec<_> = tied.iter().map(|logit| logit * 2.0).collect();
    assert_eq!(tiny.logits(&folder), doubled);
}

#[test]
fn rotary_embeddings_are_scaled_as_the_file_says() {
    let folder = tempfile::tempdir().unwrap();
    let with = |metadata: &[(&'static str, Value)]| {
        let mut tiny = Tiny::new();
        tiny.metadata.extend(metadata.iter().cloned());
        tiny
    };
    let rope = |tiny: &Tiny| {
        let config = Model::open(&tiny.write(&folder)).unwrap().config;
        config.ropes[0].for_length(config.context_length).clone()
    };
    let name = |name: &str| ("llama.rope.scaling.type", Value::String(name.into()));
    let factor = ("llama.rope.scaling.factor", Value::F32(4.0));
    let check = |tiny: &Tiny, attention_factor: f64, expected: &dyn Fn(usize) -> f64| {
        let rope = rope(tiny);
        assert!((rope.attention_factor() - attention_factor).abs() < 1e-9, "{}", rope.attention_factor());
        for (pair, freq) in rope.inv_freq().iter().enumerate() {
            let expected = expected(pair);
            assert!((freq / expected - 1.0).abs() < 1e-9, "pair {pair}: {freq}, expected {expected}");
        }
        rope.inv_freq().len()
    };
    let plain = |pair: usize| 1e4f64.powf(-(pair as f64) / 32.0);

    let none = with(&[]);
    assert_eq!(check(&none, 1.0, &plain), 32);
    check(&with(&[name("none"), factor.clone()]), 1.0, &plain);
    check(&with(&[name("linear")]), 1.0, &plain);
    let base = with(&[("llama.rope.freq_base", Value::F32(5e5))]);
    check(&base, 1.0, &|pair| 5e5f64.powf(-(pair as f64) / 32.0));
    let linear = with(&[name("linear"), factor.clone()]);
    for tiny in [&linear, &with(slice::from_ref(&factor))] {
        check(tiny, 1.0, &|pair| plain(pair) / 4.0);
    }
    check(&with(&[("llama.rope.scale_linear", Value::F32(2.0))]), 1.0, &|pair| plain(pair) / 2.0);
    let partial = with(&[("llama.rope.dimension_count", Value::U32(32))]);
    assert_eq!(check(&partial, 1.0, &|pair| plain(2 * pair)), 16);

    // Within 64 positions, the context, pair 0 turns 10.2 times, pair 8 once,
    // and pairs from 9 on less: that is the ramp from pair 0 to pair 9.
    let yarn = |pair: usize| {
        let ramp = (pair as f64 / 9.0).min(1.0);
        plain(pair) * (1.0 - ramp) + plain(pair) / 4.0 * ramp
    };
    let attention = 0.1 * 4f64.ln() + 1.0;
    check(&with(&[name("yarn"), factor.clone()]), attention, &yarn);
    let longer = [
        name("yarn"),
        factor.clone(),
        ("llama.context_length", Value::U32(256)),
        ("llama.rope.scaling.original_context_length", Value::U32(64)),
        ("llama.rope.scaling.attn_factor", Value::F32(0.5)),
    ];
    check(&with(&longer), attention / 2.0, &yarn);

    // What a tensor says divides, after scaling by metadata.
    let mut tensor = with(slice::from_ref(&factor));
    tensor.tensors.insert("rope_freqs.weight".into(), vec![32]);
    check(&tensor, 1.0, &|pair| plain(pair) / 4.0 / (1.0 + pair as f64));

    // The first token is at position 0, which turns nothing.
    let logits = none.logits(&folder);
    for tiny in [linear, partial, tensor] {
        let other = tiny.logits(&folder);
        assert_eq!(other[..32], logits[..32]);
        assert_ne!(other[32..], logits[32..]);
    }
}

#[test]
fn other_tokenizers_are_refused_or_split_as_they_say() {
    let strings = |all: &[&str]| Value::Array(all.iter().map(|s| Value::String((*s).into())).collect());
    let mut tiny = Tiny::new();
    let mut read = |key: &'static str, value: Value| {
        tiny.metadata.insert(key, value);
        tiny.text().map_err(|e| e.to_string())
    };
    let refused = |text: Result<Arc<Text>, String>, expected: &str| {
        let problem = text.err().expect("no tokenizer");
        assert!(problem.contains(expected), "{expected:?} is not in: {problem}");
    };
    refused(read("tokenizer.ggml.pre", Value::String("chaotic".into())), "has no tokenizer");
    refused(read("tokenizer.ggml.model", Value::String("bert".into())), "tokenizer.ggml.tokens");
    refused(read("tokenizer.ggml.model", Value::String("gpt2".into())), "tokenizer.ggml.tokens");
    let tokens = ["1", "2", "3", "4", "12", "123", "a", "Ġ", "Ġa", "Ã", "©", "Ġab", "<s>", "</s>", "  é"];
    refused(
        read("tokenizer.ggml.tokens", strings(&tokens)),
        "splits text as `chaotic`; expected one of default",
    );
    refused(read("tokenizer.ggml.pre", Value::String("smollm".into())), "tokenizer.ggml.merges");
    assert!(read("tokenizer.ggml.merges", strings(&["1 2", "12 3", "Ġ a"])).is_ok());
    // Tokens of the control, and one of the user, which is text as it is.
    let types = (0..15).map(|id| Value::I32([1, 3, 3, 4][usize::saturating_sub(id, 11)]));
    assert!(read("tokenizer.ggml.token_type", Value::Array(types.collect())).is_ok());
    refused(read("tokenizer.ggml.add_eos_token", Value::Bool(true)), "eos_token_id is missing, or no token");
    read("tokenizer.ggml.eos_token_id", Value::U32(13)).unwrap();
    refused(read("tokenizer.ggml.add_bos_token", Value::U32(1)), "add_bos_token is not true or false");
    read("tokenizer.ggml.bos_token_id", Value::U32(12)).err().expect("no tokenizer");
    let text = read("tokenizer.ggml.add_bos_token", Value::Bool(true)).unwrap();
    let eos = EncodeOptions { eos: true, ..EncodeOptions::default() };
    assert_eq!(text.encode_with("a1", &eos), [12, 6, 0, 13]);
    // What is to be continued has not ended.
    assert_eq!(text.encode("a1"), [12, 6, 0]);
    assert!(text.ends().contains(&13));
    let text = read("tokenizer.ggml.add_eos_token", Value::Bool(false)).unwrap();
    let control = EncodeOptions { control: true, ..EncodeOptions::default() };
    assert_eq!(text.encode_with("</s>a   éé", &control), [12, 13, 6, 7, 14, 9, 10]);
    let mut stream = text.stream();
    assert_eq!(
        text.encode_with("</s>a   éé", &control).into_iter().map(|id| stream.push(id)).collect::<String>(),
        "a   éé"
    );
    read("tokenizer.ggml.add_bos_token", Value::Bool(false)).unwrap();
    // The one joins up to three digits, the other none.
    for (pre, expected) in [("llama-bpe", [5, 3, 8].as_slice()), ("smollm", [0, 1, 2, 3, 8].as_slice())] {
        let text = read("tokenizer.ggml.pre", Value::String(pre.into())).unwrap();
        assert_eq!(text.encode("1234 a"), expected, "{pre}");
        assert!(!text.has_chat_template());
    }
    // Without a name, text is split as always was; some names imply BOS, and that
    // a part is taken whole, which no merge makes here.
    tiny.metadata.remove("tokenizer.ggml.add_bos_token");
    for (pre, expected) in [
        (None, [5, 3, 8, 8].as_slice()),
        (Some("default"), &[5, 3, 8, 8]),
        (Some("gpt-2"), &[5, 3, 8, 8]),
        (Some("tekken"), &[12, 0, 1, 2, 3, 8, 11]),
        (Some("pixtral"), &[12, 5, 3, 8, 11]),
    ] {
        tiny.metadata.remove("tokenizer.ggml.pre");
        tiny.metadata.extend(pre.map(|pre| ("tokenizer.ggml.pre", Value::String(pre.into()))));
        let text = tiny.text().unwrap();
        // There is no token `b`.
        let ids = text.encode("1234 a ab");
        assert_eq!(ids, expected, "{pre:?}");
    }
}
