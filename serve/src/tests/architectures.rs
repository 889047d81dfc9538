//! Tiny models of every architecture, and what Hugging Face transformers computes
//! with them: files that `tests/data/tiny/make.py` wrote.

use std::path::PathBuf;

use candle_core::quantized::gguf_file::Value;
use flashinfer_rs::kv::{Batch, PageAllocator, Sequence};

use crate::{
    backend::{Backend, Output, Step, StepToken, cpu::Cpu},
    model::{Model, gguf::integer},
};

/// The files, without their ending.
pub const NAMES: [&str; 10] =
    ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "qwen2moe", "qwen3moe"];

/// A tiny model, and what is right.
pub struct Expected {
    pub model: Model,
    pub tokens: Vec<u32>,
    /// Of all tokens, `[tokens, vocab_size]`.
    pub logits: Vec<f32>,
    /// Of the first tokens alone, where a cache has no room for more.
    pub prefix_logits: Vec<f32>,
}

pub fn path(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/data/tiny", &format!("{name}.gguf")].iter().collect()
}

pub fn load(name: &str) -> Expected {
    let model = Model::open(&path(name)).unwrap();
    let array = |key: &str| match &model.content.metadata[key] {
        Value::Array(values) => values.clone(),
        other => panic!("{other:?}"),
    };
    let logits = |key: &str| array(key).iter().map(|value| value.to_f32().unwrap()).collect();
    let tokens = array("tiny.tokens").iter().map(|token| integer(token).unwrap() as u32).collect();
    let (whole, prefix) = (logits("tiny.logits"), logits("tiny.prefix_logits"));
    Expected { tokens, logits: whole, prefix_logits: prefix, model }
}

/// The logits after each token, of a backend that reads them in parts.
pub fn logits(backend: &mut dyn Backend, pool: &PageAllocator, tokens: &[u32]) -> Vec<f32> {
    let mut batch = Batch::new(pool);
    batch.push(Sequence::new(pool)).unwrap();
    let (first, rest) = tokens.split_at(tokens.len() * 2 / 3);
    let mut all = Vec::new();
    for tokens in [first].into_iter().chain(rest.chunks(1)) {
        batch.append([tokens.len()]).unwrap();
        let outputs: Vec<_> = (0..tokens.len()).map(Output::greedy).collect();
        backend.step(&Step { batch: &batch, tokens: &StepToken::known(tokens), outputs: &outputs }).unwrap();
        all.extend(backend.logits().unwrap());
    }
    all
}

/// The largest difference of a row, relative to the norm of what is right.
pub fn worst(got: &[f32], want: &[f32], vocab_size: usize) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |row: &mut dyn Iterator<Item = f64>| row.map(|value| value * value).sum::<f64>().sqrt();
    let rows = got.chunks_exact(vocab_size).zip(want.chunks_exact(vocab_size));
    let off = rows.map(|(got, want)| {
        let off = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(*a) - f64::from(*b)));
        off / norm(&mut want.iter().map(|value| f64::from(*value)))
    });
    off.fold(0.0, |worst, off| if off > worst || off.is_nan() { off } else { worst })
}

#[test]
fn logits_agree_with_transformers() {
    let mut report = Vec::new();
    for name in NAMES {
        let Expected { model, tokens, logits: whole, prefix_logits } = load(name);
        let vocab_size = model.config.vocab_size;
        let prefix = prefix_logits.len() / vocab_size;
        for (expected, tokens) in [(&whole, &tokens[..]), (&prefix_logits, &tokens[..prefix])] {
            // As many pages as there are tokens: what depends on a sequence's length shows.
            let pool = PageAllocator::new(tokens.len() / 4, 4).unwrap();
            let mut cpu = Cpu::new(&model.config, model.ends().unwrap(), model.layers(), &pool).unwrap();
            let off = worst(&logits(&mut cpu, &pool, tokens), expected, vocab_size);
            report.push(format!("{name}, {} tokens: {off:.1e}", tokens.len()));
            assert!(off < 2e-5, "{}", report.join("\n"));
        }
    }
    println!("{}", report.join("\n"));
}

/// What each architecture has of its own shows in the logits, so that the files
/// would find out if it were left out.
#[test]
fn what_an_architecture_has_matters() {
    use crate::model::config::Config;
    type Change = fn(&mut Config);
    let without_window: Change = |config| config.layers.iter_mut().for_each(|layer| layer.window = None);
    let other_window: Change = |config| {
        config.layers.iter_mut().for_each(|layer| layer.window = layer.window.map(|window| window + 1));
    };
    let changes: [(&str, &str, Change); 14] = [
        ("mistral", "no window", without_window),
        ("mistral", "a wider window", other_window),
        ("gemma2", "no window", without_window),
        ("gemma3", "a wider window", other_window),
        ("phi3", "a wider window", other_window),
        ("gemma2", "no soft cap of attention", |config| config.attention_soft_cap = None),
        ("gemma2", "no soft cap of logits", |config| config.final_soft_cap = None),
        ("gemma2", "no scale of embeddings", |config| config.embedding_scale = 1.0),
        ("gemma3", "another activation", |config| {
            config.activation = crate::model::architecture::Activation::Silu;
        }),
        ("gemma3", "one rotary embedding", |config| {
            config.layers.iter_mut().for_each(|layer| layer.rope = 0);
        }),
        ("qwen3", "another scale of attention", |config| config.attention_scale *= 1.01),
        ("qwen2moe", "shares that sum to 1", |config| {
            config.experts.as_mut().unwrap().normalize = true;
        }),
        ("mixtral", "shares that do not", |config| config.experts.as_mut().unwrap().normalize = false),
        ("llama", "a scale of residuals", |config| config.residual_scale = 0.99),
    ];
    for (name, what, change) in changes {
        let Expected { model, tokens, logits: want, .. } = load(name);
        let mut config = model.config.clone();
        change(&mut config);
        let pool = PageAllocator::new(6, 4).unwrap();
        let mut cpu = Cpu::new(&config, model.ends().unwrap(), model.layers(), &pool).unwrap();
        let off = worst(&logits(&mut cpu, &pool, &tokens), &want, config.vocab_size);
        assert!(off > 1e-3, "{name} with {what} is off by {off:.1e} only");
    }
}
