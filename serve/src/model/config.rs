//! What a network computes, apart from its weights: sizes, norms, windows,
//! rotary embedding, experts.

use candle_core::quantized::{GgmlDType, gguf_file::Value};
use flashinfer_rs::{
    DType,
    attention::Heads,
    kv::{HeadsShape, KvLayout},
};

use super::{
    architecture::{Activation, Architecture, AttentionScale, Windows},
    gguf::{Gguf, integer},
    keys::{Keys, brief},
    rope::Rope,
};
use crate::Result;

/// The most dimensions of a head: twice those of any model that is known.
const MAX_HEAD_DIM: usize = 1024;

/// What a network computes, apart from its weights.
#[derive(Clone, Debug)]
pub struct Config {
    pub architecture: &'static Architecture,
    /// What a GPU computes in, `F16` or `BF16`: `BF16` if numbers of the
    /// architecture overflow `f16`, or if the file's matrices are in it.
    pub dtype: DType,
    pub hidden_size: usize,
    pub vocab_size: usize,
    /// The most tokens that the model was trained for.
    pub context_length: usize,
    /// Added to the mean of squares in all norms.
    pub rms_eps: f64,
    pub heads: Heads,
    pub head_dim: usize,
    /// What queries times keys are multiplied by.
    pub attention_scale: f64,
    /// `Some(cap)` turns scaled queries times keys into `cap · tanh(x / cap)`.
    pub attention_soft_cap: Option<f64>,
    /// In order; their number is that of the model's layers.
    pub layers: Vec<LayerConfig>,
    /// The rotary embeddings that layers choose from.
    pub ropes: Vec<Rope>,
    /// Of an MLP, or of each expert.
    pub intermediate_size: usize,
    pub activation: Activation,
    pub experts: Option<Experts>,
    pub biases: Biases,
    /// What embeddings are multiplied by.
    pub embedding_scale: f64,
    /// What attention and the MLP make is multiplied by this before it is added.
    pub residual_scale: f64,
    /// `Some(cap)` turns logits into `cap · tanh(logits / cap)`.
    pub final_soft_cap: Option<f64>,
}

/// What one layer has of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerConfig {
    /// `Some(n)`: a token sees the last `n` tokens, itself among them.
    pub window: Option<usize>,
    /// Which of the rotary embeddings.
    pub rope: usize,
}

/// Experts, of which a router chooses some for each token: those with the
/// highest scores, of equal ones the first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Experts {
    pub count: usize,
    /// How many a token has.
    pub used: usize,
    pub gating: Gating,
    /// Whether the shares of a token's experts are divided by their sum.
    pub normalize: bool,
    /// What shares are multiplied by, at last.
    pub scale: f64,
    /// The width of an expert that every token has, which is added.
    pub shared: Option<usize>,
}

/// How scores become shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gating {
    /// The softmax of the scores of all experts.
    Softmax,
    /// The sigmoid of each score.
    Sigmoid,
}

/// What has biases, in some layer at least; other layers then have zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    pub qkv: bool,
    pub attention_output: bool,
    pub gate_up: bool,
    pub down: bool,
}

impl Config {
    /// How many layers there are.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// How many experts there are; one if there is nothing to choose from.
    pub fn num_experts(&self) -> usize {
        self.experts.map_or(1, |experts| experts.count)
    }

    /// The width of queries, and that of keys, which values have, too.
    pub fn widths(&self) -> [usize; 2] {
        [self.heads.num_qo_heads, self.heads.num_kv_heads].map(|heads| heads * self.head_dim)
    }

    /// What the model keeps for each token.
    pub fn kv_shape(&self, dtype: DType, layout: KvLayout) -> HeadsShape {
        HeadsShape {
            num_layers: self.layers.len(),
            num_kv_heads: self.heads.num_kv_heads,
            head_dim: self.head_dim,
            dtype,
            layout,
        }
    }

    /// Reads it, and refuses keys that are not used and may matter.
    pub(super) fn read(gguf: &Gguf) -> Result<Self> {
        let metadata = &gguf.metadata;
        let name = match metadata.get("general.architecture") {
            Some(Value::String(name)) => name,
            _ => return Err("general.architecture is missing, or no text".into()),
        };
        let Some(architecture) = Architecture::of(name) else {
            let expected = Architecture::names().collect::<Vec<_>>().join(", ");
            return Err(format!("its architecture is {name}; expected one of {expected}").into());
        };
        match metadata.get("general.type") {
            Some(Value::String(kind)) if kind != "model" => {
                return Err(format!("general.type is {kind}; expected model").into());
            }
            _ => {}
        }
        let keys = Keys::new(architecture.name, metadata);
        let config = Self::of_keys(architecture, &keys, gguf)?;
        keys.check()?;
        Ok(config)
    }

    fn of_keys(architecture: &'static Architecture, keys: &Keys<'_>, gguf: &Gguf) -> Result<Self> {
        let hidden_size = keys.need("embedding_length")?;
        let num_layers = num_layers(keys, gguf)?;
        let context_length = keys.need("context_length")?;
        let heads = heads(keys)?;
        let head_dim = head_dim(keys, hidden_size, heads)?;
        let vocab_size = vocab_size(gguf, hidden_size)?;
        let per_head = match architecture.attention_scale {
            AttentionScale::HiddenPerHead { num_layers: of } if of == num_layers => {
                hidden_size / heads.num_qo_heads
            }
            _ => head_dim,
        };
        let windows = windows(architecture, keys, num_layers)?;
        let mut ropes = vec![Rope::read(keys, gguf, head_dim, context_length)?];
        ropes.extend(Rope::of_windows(keys, head_dim, architecture.window_rope_base)?);
        let last = ropes.len() - 1;
        let layer = |window: Option<usize>| LayerConfig { window, rope: window.map_or(0, |_| last) };
        let (intermediate_size, experts) = experts(architecture, keys)?;
        let embedding_scale = keys.real("embedding_scale")?;
        let scaled = if architecture.scaled_embedding { (hidden_size as f64).sqrt() } else { 1.0 };
        if let Some(name) = keys.text("hidden_activation")? {
            return Err(format!("{} is {name}; expected none", keys.name("hidden_activation")).into());
        }
        Ok(Self {
            architecture,
            dtype: match architecture.overflows_f16 || is_bf16(gguf) {
                true => DType::BF16,
                false => DType::F16,
            },
            hidden_size,
            vocab_size,
            context_length,
            rms_eps: keys
                .real("attention.layer_norm_rms_epsilon")?
                .ok_or_else(|| format!("{} is missing", keys.name("attention.layer_norm_rms_epsilon")))?,
            heads,
            head_dim,
            attention_scale: match keys.real_or_zero("attention.scale")? {
                Some(scale) if scale > 0.0 => scale,
                _ => (per_head as f64).sqrt().recip(),
            },
            attention_soft_cap: cap(keys, "attn_logit_softcapping")?,
            layers: windows.into_iter().map(layer).collect(),
            ropes,
            intermediate_size,
            activation: architecture.activation,
            experts,
            biases: biases(gguf),
            embedding_scale: embedding_scale.unwrap_or(scaled),
            residual_scale: keys.real("residual_scale")?.unwrap_or(1.0),
            final_soft_cap: cap(keys, "final_logit_softcapping")?,
        })
    }
}

/// The layers, each of which has tensors.
fn num_layers(keys: &Keys<'_>, gguf: &Gguf) -> Result<usize> {
    let (num_layers, tensors) = (keys.need("block_count")?, gguf.tensors.len());
    if num_layers > tensors {
        let name = keys.name("block_count");
        return Err(
            format!("{name} is {num_layers}; expected at most one for each of {tensors} tensors").into()
        );
    }
    Ok(num_layers)
}

fn heads(keys: &Keys<'_>) -> Result<Heads> {
    let num_qo_heads = keys.need("attention.head_count")?;
    let num_kv_heads = keys.count("attention.head_count_kv")?.unwrap_or(num_qo_heads);
    if !num_qo_heads.is_multiple_of(num_kv_heads) {
        return Err(format!("its {num_qo_heads} heads cannot share {num_kv_heads} KV heads evenly").into());
    }
    Ok(Heads { num_qo_heads, num_kv_heads })
}

fn head_dim(keys: &Keys<'_>, hidden_size: usize, heads: Heads) -> Result<usize> {
    let head_dim = keys.count("attention.key_length")?.unwrap_or(hidden_size / heads.num_qo_heads);
    for key in ["attention.value_length", "attention.key_length_swa", "attention.value_length_swa"] {
        if let Some(value) = keys.count(key)?.filter(|&value| value != head_dim) {
            return Err(
                format!("{} is {value}; expected the head dimension, {head_dim}", keys.name(key)).into()
            );
        }
    }
    if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > MAX_HEAD_DIM {
        let expected = format!("expected an even number up to {MAX_HEAD_DIM}");
        return Err(format!("its heads have {head_dim} dimensions; {expected}").into());
    }
    Ok(head_dim)
}

/// The rows of the embedding, which are as many as the tokenizer's tokens at
/// least.
fn vocab_size(gguf: &Gguf, hidden_size: usize) -> Result<usize> {
    let embedding = gguf.tensors.get("token_embd.weight").ok_or("tensor token_embd.weight: it is missing")?;
    let vocab_size = match *embedding.shape {
        [vocab_size, columns] if columns == hidden_size => vocab_size,
        _ => {
            let shape = &embedding.shape;
            let expected = format!("expected 2 dimensions, the last of them {hidden_size}");
            return Err(format!("tensor token_embd.weight: its shape is {shape:?}; {expected}").into());
        }
    };
    match gguf.metadata.get("tokenizer.ggml.tokens") {
        Some(Value::Array(tokens)) if tokens.len() > vocab_size => {
            let tokens = tokens.len();
            let problem = format!("tokenizer.ggml.tokens has {tokens} tokens");
            Err(format!("{problem}, and token_embd.weight {vocab_size} rows; expected one for each").into())
        }
        _ => Ok(vocab_size),
    }
}

/// The window of each layer.
fn windows(architecture: &Architecture, keys: &Keys<'_>, num_layers: usize) -> Result<Vec<Option<usize>>> {
    const PATTERN: &str = "attention.sliding_window_pattern";
    let window = keys.count_or_zero("attention.sliding_window")?.or(architecture.default_window);
    let window = window.filter(|&window| window > 0);
    let each = |n: usize| (0..num_layers).map(|layer| n == 0 || layer % n < n - 1).collect();
    let has: Vec<bool> = match (keys.value(PATTERN), architecture.windows) {
        (None, Windows::All) => vec![true; num_layers],
        (None, Windows::AllButEach(n)) => each(n),
        (Some(Value::Array(values)), _) => {
            let flags = values.iter().map(|value| match value {
                Value::Bool(value) => Some(*value),
                value => integer(value).map(|value| value != 0),
            });
            match flags.collect::<Option<Vec<_>>>().filter(|flags| flags.len() == num_layers) {
                Some(flags) => flags,
                None => {
                    let expected = format!("true or false for each of {num_layers} layers");
                    let value = brief(&Value::Array(values.clone()));
                    return Err(format!("{} is {value}; expected {expected}", keys.name(PATTERN)).into());
                }
            }
        }
        (Some(_), _) => each(keys.count_or_zero(PATTERN)?.unwrap_or(0)),
    };
    Ok(has.into_iter().map(|has| window.filter(|_| has)).collect())
}

/// The width of an MLP or expert, and the experts.
fn experts(architecture: &Architecture, keys: &Keys<'_>) -> Result<(usize, Option<Experts>)> {
    let count = keys.count_or_zero("expert_count")?.filter(|&count| count > 0);
    let used = keys.count_or_zero("expert_used_count")?.filter(|&used| used > 0);
    let (count, routing) = match (count, architecture.routing) {
        (Some(count), Some(routing)) => (count, routing),
        (None, _) => return Ok((keys.need("feed_forward_length")?, None)),
        (Some(count), None) => {
            return Err(format!("{} is {count}; expected none", keys.name("expert_count")).into());
        }
    };
    let used = used.ok_or_else(|| format!("{} is missing", keys.name("expert_used_count")))?;
    if used > count {
        return Err(format!("it uses {used} experts of {count}").into());
    }
    let dense = keys.count_or_zero("feed_forward_length")?.filter(|&len| len > 0);
    let missing = || format!("{} is missing", keys.name("feed_forward_length"));
    let intermediate_size = match keys.count("expert_feed_forward_length")? {
        Some(len) => len,
        // Files that were made early: the width of all experts of a token.
        None if routing.shared_expert => dense.ok_or_else(missing)? / used,
        None => dense.ok_or_else(missing)?,
    };
    let shared = keys.count_or_zero("expert_shared_feed_forward_length")?;
    let shared_count = keys.count_or_zero("expert_shared_count")?;
    let shared = match routing.shared_expert {
        true => Some(shared.filter(|&len| len > 0).or(dense).ok_or_else(missing)?),
        false => None,
    };
    if let Some(number) = shared_count.filter(|&number| number > usize::from(shared.is_some())) {
        let name = keys.name("expert_shared_count");
        return Err(format!("{name} is {number}; expected {}", usize::from(shared.is_some())).into());
    }
    const GATING: &str = "expert_gating_func";
    let normalize = keys.flag("expert_weights_norm")?.unwrap_or(routing.normalize);
    let (gating, normalize) = match keys.count_or_zero(GATING)? {
        None | Some(0 | 1) => (Gating::Softmax, normalize),
        Some(2) => (Gating::Sigmoid, normalize),
        // The softmax of the scores of those that are used.
        Some(3) => (Gating::Softmax, true),
        Some(number) => {
            let expected = "expected 1 (softmax), 2 (sigmoid) or 3 (softmax of those used)";
            return Err(format!("{} is {number}; {expected}", keys.name(GATING)).into());
        }
    };
    let scale = keys.real_or_zero("expert_weights_scale")?.filter(|scale| *scale > 0.0).unwrap_or(1.0);
    Ok((intermediate_size, Some(Experts { count, used, gating, normalize, scale, shared })))
}

fn cap(keys: &Keys<'_>, key: &'static str) -> Result<Option<f64>> {
    Ok(keys.real_or_zero(key)?.filter(|cap| *cap > 0.0))
}

fn biases(gguf: &Gguf) -> Biases {
    let any = |names: &[&str]| {
        let names: Vec<_> = names.iter().map(|name| format!(".{name}.bias")).collect();
        gguf.tensors.keys().any(|tensor| names.iter().any(|name| tensor.ends_with(name)))
    };
    Biases {
        qkv: any(&["attn_q", "attn_k", "attn_v", "attn_qkv"]),
        attention_output: any(&["attn_output"]),
        gate_up: any(&["ffn_gate", "ffn_up"]),
        down: any(&["ffn_down"]),
    }
}

/// Whether some matrix of a layer is in `bf16`.
fn is_bf16(gguf: &Gguf) -> bool {
    let mut layers = gguf.tensors.iter().filter(|(name, _)| name.starts_with("blk."));
    layers.any(|(_, info)| info.dtype == GgmlDType::BF16 && info.shape.len() > 1)
}
