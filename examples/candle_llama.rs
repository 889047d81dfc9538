//! SmolLM2-135M-Instruct through candle-transformers' llama, with candle's own
//! attention and with flash attention: what they answer, and how fast.
//!
//! It belongs to `compat/candle-transformers`, whose manifest puts FlashInfer's
//! kernels in candle-flash-attn's place. From that folder, on a machine with an
//! NVIDIA GPU and nvcc, which candle's own kernels need:
//!
//! `cargo run --release --example candle_llama -- --context 4096`
//!
//! and without either:
//!
//! `../without-cuda cargo run --release --example candle_llama -- --cpu`
//!
//! The model is fetched once. Where the original candle-flash-attn is built in,
//! the heading says so (docs/candle.md tells how).

#[allow(dead_code, reason = "what only `generate` uses")]
#[path = "generate"]
mod generate {
    pub mod chat;
    pub mod model;
    pub mod sentencepiece;
    pub mod splits;
    pub mod tokenizer;
}

use std::{
    any::type_name_of_val,
    collections::HashMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Config, Llama};
use clap::{Parser, ValueEnum};
use flashinfer_rs::{
    FlashInferRuntime,
    artifacts::{Fetch, Member, Store, StoreConfig},
    rope::{RopeFrequencies, RopeScaling},
};

// The modules look for each other where `generate` has them, at the root.
use crate::generate::{
    chat,
    model::{self, Model},
    sentencepiece, splits,
    tokenizer::Text,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Runs candle-transformers' llama with flash attention and without.
#[derive(Parser)]
struct Cli {
    /// The question
    #[arg(long, default_value = "What is the capital of France?")]
    prompt: String,
    /// Tokens to decode, those after the answer's end included
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// Repeat the question in the message, until the prompt has at least so many tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    context: usize,
    /// Compute on the CPU, though there may be a GPU
    #[arg(long)]
    cpu: bool,
    /// The element type; f16 on a GPU and f32 on the CPU if none is given
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Runs to time after one that is not; the fastest counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Only flash attention
    #[arg(long, conflicts_with = "eager_only")]
    flash_only: bool,
    /// Only candle's own attention
    #[arg(long)]
    eager_only: bool,
    /// A GGUF file of the llama architecture, instead of SmolLM2-135M-Instruct
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F16,
    Bf16,
    F32,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let model = Model::open(&match &cli.model {
        Some(path) => path.clone(),
        None => pinned_model()?,
    })?;
    let (device, place) = match cli.cpu {
        true => (Device::Cpu, "the CPU, as asked".to_owned()),
        false => match find_gpu() {
            Ok(()) => (Device::new_cuda(0)?, "the GPU".to_owned()),
            Err(error) => (Device::Cpu, format!("the CPU, as no GPU can be used: {error}")),
        },
    };
    let dtype = match cli.dtype {
        Some(Dtype::F16) => DType::F16,
        Some(Dtype::Bf16) => DType::BF16,
        Some(Dtype::F32) => DType::F32,
        None if device.is_cpu() => DType::F32,
        None => DType::F16,
    };
    let text = Text::from_gguf(&model.content)?;
    let prompt = prompt(&text, &cli.prompt, cli.context)?;
    let positions = prompt.len() + cli.tokens as usize;
    println!("{} tokens of prompt, {} decoded, {dtype:?}, on {place}", prompt.len(), cli.tokens);
    println!("flash attention is {}\n", type_name_of_val(&candle_flash_attn::flash_attn));

    let weights = weights(&model)?;
    let mut times = Vec::new();
    for (flash, name) in [(false, "eager"), (true, "flash")] {
        if (flash && cli.eager_only) || (!flash && cli.flash_only) {
            continue;
        }
        let config = config(&model, flash, positions)?;
        let weights = VarBuilder::from_tensors(weights.clone(), dtype, &device);
        let llama = Llama::load(weights, &config)?;
        let run = || run(&llama, &config, dtype, &device, &prompt, cli.tokens);
        let warm_up = run()?;
        let runs = (0..cli.runs).map(|_| run()).collect::<Result<Vec<_>>>()?;
        let fastest = |time: fn(&Run) -> Duration| runs.iter().map(time).min().unwrap_or_default();
        let (prefill, decode) = (fastest(|run| run.prefill), fastest(|run| run.decode));

        let ended = |id: &u32| text.ends().contains(id);
        let answer = warm_up.ids.split_inclusive(ended).next().unwrap_or_default();
        let mut stream = text.stream();
        let said: String = answer.iter().map(|&id| stream.push(id)).collect();
        println!("{name}: {said}{}\n       {answer:?}", stream.finish());
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64();
        println!(
            "       prefill {:.1} ms, {:.0} tokens/s; decode {:.3} ms a token, {:.1} tokens/s; \
             the first prefill took {:.1} ms\n",
            prefill.as_secs_f64() * 1e3,
            rate(prompt.len(), prefill),
            decode.as_secs_f64() * 1e3 / f64::from(cli.tokens - 1),
            rate(cli.tokens as usize - 1, decode),
            warm_up.prefill.as_secs_f64() * 1e3,
        );
        times.push((warm_up.ids, prefill, decode));
    }
    if let [(eager_ids, eager_prefill, eager_decode), (flash_ids, flash_prefill, flash_decode)] = &times[..] {
        let faster = |eager: &Duration, flash: &Duration| eager.as_secs_f64() / flash.as_secs_f64();
        println!(
            "flash / eager, tokens per second: prefill {:.2}, decode {:.2}",
            faster(eager_prefill, flash_prefill),
            faster(eager_decode, flash_decode),
        );
        match eager_ids.iter().zip(flash_ids).position(|(eager, flash)| eager != flash) {
            None => println!("all {} ids agree", eager_ids.len()),
            Some(at) => {
                println!("the ids differ from token {} on", at + 1);
                // Rounding may decide between tokens that are nearly as likely, but not in `f32`.
                if dtype == DType::F32 {
                    return Err("the two disagree".into());
                }
            }
        }
    }
    Ok(())
}

/// The model's file, fetched if no local source has it.
fn pinned_model() -> Result<PathBuf> {
    Ok(Store::open(StoreConfig::from_env()?)?.locate(&Member::SmolLm2, Fetch::Allowed)?.path)
}

/// Fails where there is no GPU. candle is not asked: it ends the program if it was
/// built without CUDA.
fn find_gpu() -> Result<()> {
    match FlashInferRuntime::get()?.device_count()? {
        0 => Err("there is none".into()),
        _ => Ok(()),
    }
}

/// The ids of a chat whose message is the question, as often as it takes.
fn prompt(text: &Text, question: &str, tokens: usize) -> Result<Vec<u32>> {
    let mut message = question.to_owned();
    loop {
        let ids = text.encode_chat(None, &message)?;
        if ids.len() >= tokens {
            return Ok(ids);
        }
        let missing = (tokens - ids.len()).div_ceil(ids.len());
        message += &format!(" {question}").repeat(missing);
    }
}

/// A run's tokens, and how long it took to compute the first and the others.
struct Run {
    ids: Vec<u32>,
    prefill: Duration,
    decode: Duration,
}

/// Decodes greedily after a prompt.
fn run(
    llama: &Llama,
    config: &Config,
    dtype: DType,
    device: &Device,
    prompt: &[u32],
    count: u32,
) -> Result<Run> {
    let mut cache = Cache::new(true, dtype, config, device)?;
    let mut ids = Vec::with_capacity(count as usize);
    // The id comes back to the host, so that it waits for all that led to it.
    let mut step = |tokens: &[u32], before: usize| -> Result<u32> {
        let logits = llama.forward(&Tensor::new(tokens, device)?.unsqueeze(0)?, before, &mut cache)?;
        Ok(logits.squeeze(0)?.argmax(0)?.to_scalar()?)
    };
    device.synchronize()?;
    let start = Instant::now();
    ids.push(step(prompt, 0)?);
    let prefill = start.elapsed();
    for before in prompt.len()..prompt.len() + count as usize - 1 {
        ids.push(step(&ids[ids.len() - 1..], before)?);
    }
    device.synchronize()?;
    Ok(Run { ids, prefill, decode: start.elapsed() - prefill })
}

/// The model's sizes as candle's llama takes them, for so many positions.
fn config(model: &Model, use_flash_attn: bool, positions: usize) -> Result<Config> {
    let sizes = &model.config;
    let theta = model.content.metadata.get("llama.rope.freq_base").map_or(Ok(1e4), |value| value.to_f32())?;
    let plain = RopeFrequencies::new(sizes.head_dim, f64::from(theta), &RopeScaling::None)?;
    let [scaled, wide] = [
        sizes.rope.inv_freq() != plain.inv_freq(),
        sizes.head_dim * sizes.heads.num_qo_heads != sizes.hidden_size,
    ];
    let biased = model.content.tensor_infos.keys().any(|name| name.ends_with(".bias"));
    if scaled || wide || biased || sizes.experts.is_some() {
        let unsupported = "a scaled rotary embedding, wide heads, biases or experts";
        return Err(format!("the model has {unsupported}, which this program does not support").into());
    }
    Ok(Config {
        hidden_size: sizes.hidden_size,
        intermediate_size: sizes.intermediate_size,
        vocab_size: sizes.vocab_size,
        num_hidden_layers: sizes.num_layers,
        num_attention_heads: sizes.heads.num_qo_heads,
        num_key_value_heads: sizes.heads.num_kv_heads,
        use_flash_attn,
        rms_norm_eps: sizes.rms_eps,
        rope_theta: theta,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling: None,
        max_position_embeddings: positions.max(sizes.context_length),
        tie_word_embeddings: model.ends()?.head.is_none(),
    })
}

/// The weights by the names and in the order that candle's llama has them.
fn weights(model: &Model) -> Result<HashMap<String, Tensor>> {
    let (config, ends) = (&model.config, model.ends()?);
    let vector = |values: &[f32]| Tensor::new(values, &Device::Cpu);
    let mut weights = HashMap::from([
        ("model.embed_tokens.weight".to_owned(), ends.embedding),
        ("model.norm.weight".to_owned(), vector(&ends.norm)?),
    ]);
    weights.extend(ends.head.map(|head| ("lm_head.weight".to_owned(), head)));
    // GGUF files have the rows of queries and keys in the order of a rotary embedding that turns
    // neighbours; candle's turns a head's first half with its second.
    let halves = |rows: Tensor, heads: usize| -> Result<Tensor> {
        let (out, input) = rows.dims2()?;
        let pairs = rows.reshape((heads, config.head_dim / 2, 2, input))?;
        Ok(pairs.transpose(1, 2)?.reshape((out, input))?)
    };
    let (qo, kv) = (config.heads.num_qo_heads, config.heads.num_kv_heads);
    for (index, layer) in model.layers().enumerate() {
        let layer = layer?;
        let rows = |start: usize, heads: usize| {
            layer.qkv.weight.narrow(0, start * config.head_dim, heads * config.head_dim)
        };
        let inner = config.intermediate_size;
        let named = [
            ("input_layernorm", vector(&layer.attention_norm)?),
            ("post_attention_layernorm", vector(&layer.mlp_norm)?),
            ("self_attn.q_proj", halves(rows(0, qo)?, qo)?),
            ("self_attn.k_proj", halves(rows(qo, kv)?, kv)?),
            ("self_attn.v_proj", rows(qo + kv, kv)?),
            ("self_attn.o_proj", layer.attention_output.weight),
            ("mlp.gate_proj", layer.gate_up.weight.narrow(0, 0, inner)?),
            ("mlp.up_proj", layer.gate_up.weight.narrow(0, inner, inner)?),
            ("mlp.down_proj", layer.down.weight),
        ];
        weights.extend(named.map(|(name, tensor)| (format!("model.layers.{index}.{name}.weight"), tensor)));
    }
    Ok(weights)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What SmolLM2 answers, its end included.
    const ANSWER: [u32; 8] = [504, 3575, 282, 4649, 314, 7042, 30, 2];

    #[test]
    fn both_say_what_the_capital_of_france_is() {
        let model = Model::open(&pinned_model().unwrap()).unwrap();
        let text = Text::from_gguf(&model.content).unwrap();
        let prompt = prompt(&text, "What is the capital of France?", 0).unwrap();
        let weights = weights(&model).unwrap();
        for flash in [false, true] {
            let config = config(&model, flash, prompt.len() + ANSWER.len()).unwrap();
            let weights = VarBuilder::from_tensors(weights.clone(), DType::F32, &Device::Cpu);
            let llama = Llama::load(weights, &config).unwrap();
            let run = run(&llama, &config, DType::F32, &Device::Cpu, &prompt, ANSWER.len() as u32).unwrap();
            assert_eq!(run.ids, ANSWER, "flash attention: {flash}");
        }
    }

    #[test]
    fn a_prompt_is_as_long_as_asked() {
        let model = Model::open(&pinned_model().unwrap()).unwrap();
        let text = Text::from_gguf(&model.content).unwrap();
        let lengths = [0, 37, 38, 500].map(|tokens| prompt(&text, "Why?", tokens).unwrap().len());
        assert!(
            lengths[0] < 37 && (37..60).contains(&lengths[1]) && (500..530).contains(&lengths[3]),
            "{lengths:?}"
        );
    }
}
