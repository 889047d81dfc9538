//! A GGUF file of the llama architecture: its configuration, and its weights
//! one layer at a time.
//!
//! Weights are dequantized to `f32` as they are read, in the shape in which
//! both backends multiply: `[out, in]`, with the projections of queries, keys
//! and values in one matrix, those of gate and up, and those of all experts. A
//! model without experts is one of a single expert. A backend takes each
//! layer as it comes and keeps it in its own form, so that no more than one
//! layer is held twice.

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
};

use candle_core::{
    DType, Device, Tensor,
    quantized::gguf_file::{Content, Value},
};
use flashinfer_rs::{
    attention::Heads,
    kv::{HeadsShape, KvLayout},
    rope::{RopeFrequencies, RopeScaling, YarnScaling},
};

pub mod synthetic;

use crate::Result;

/// The head dimensions that FlashInfer's attention kernels are compiled for.
const HEAD_DIMS: [usize; 3] = [64, 128, 256];

/// How many of a head's elements FlashInfer's kernels turn at a time.
const ROTARY_MULTIPLE: usize = 8;
/// What divides the frequencies of the rotary embedding, where a file has it.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// All tensors that are none of a layer's.
const OUTSIDE: [&str; 4] = ["token_embd.weight", "output_norm.weight", "output.weight", ROPE_FREQS];
/// Those of a layer: of all, of layers without experts, and of layers with them,
/// where files that were made early have a tensor for each expert.
const INSIDE: [&str; 10] = [
    "attn_norm.weight",
    "attn_q.weight",
    "attn_q.bias",
    "attn_k.weight",
    "attn_k.bias",
    "attn_v.weight",
    "attn_v.bias",
    "attn_output.weight",
    "attn_output.bias",
    "ffn_norm.weight",
];
const DENSE: [&str; 6] =
    ["ffn_gate.weight", "ffn_gate.bias", "ffn_up.weight", "ffn_up.bias", "ffn_down.weight", "ffn_down.bias"];
const ROUTED: [&str; 4] =
    ["ffn_gate_inp.weight", "ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight"];
const EACH: [&str; 3] = ["ffn_gate", "ffn_up", "ffn_down"];

/// The sizes of a model, and its rotary embedding.
#[derive(Clone, Debug)]
pub struct Config {
    pub num_layers: usize,
    pub hidden_size: usize,
    /// Of each expert.
    pub intermediate_size: usize,
    pub experts: Option<Experts>,
    pub biases: Biases,
    pub vocab_size: usize,
    pub heads: Heads,
    pub head_dim: usize,
    /// The most tokens that the model was trained for.
    pub context_length: usize,
    pub rms_eps: f64,
    /// The rotary embedding, scaled as the file says. It turns neighbouring
    /// elements: GGUF files hold the rows of Q and K in that order.
    pub rope: RopeFrequencies,
}

/// Experts, of which a router chooses some for each token. They share the token
/// by the softmax of their scores.
#[derive(Clone, Copy, Debug)]
pub struct Experts {
    pub count: usize,
    /// How many a token has.
    pub used: usize,
}

/// What has biases, in some layer at least; other layers then have zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Biases {
    pub qkv: bool,
    pub attention_output: bool,
    pub gate_up: bool,
    pub down: bool,
}

/// A matrix `[out, in]`, and what is added to its products, `[out]`; `f32`.
#[derive(Clone)]
pub struct Linear {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

/// The weights of one layer.
#[derive(Clone)]
pub struct Layer {
    pub attention_norm: Vec<f32>,
    /// Rows for queries, then keys, then values.
    pub qkv: Linear,
    pub attention_output: Linear,
    pub mlp_norm: Vec<f32>,
    /// The scores of experts.
    pub router: Option<Linear>,
    /// For each expert, rows for the gate, then for up.
    pub gate_up: Linear,
    /// Columns for each expert.
    pub down: Linear,
}

/// What comes before the first layer and after the last.
#[derive(Clone)]
pub struct Ends {
    /// `[vocab_size, hidden_size]`.
    pub embedding: Tensor,
    pub norm: Vec<f32>,
    /// `[vocab_size, hidden_size]`; `None` if it is the embedding.
    pub head: Option<Tensor>,
}

/// An open file.
pub struct Model {
    path: PathBuf,
    file: File,
    pub content: Content,
    pub config: Config,
}

impl Model {
    /// Reads everything but the tensors.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| format!("cannot open the model {}: {e}", path.display()))?;
        let content = Content::read(&mut BufReader::new(&file))
            .map_err(|e| format!("{} is not a usable GGUF file: {}", path.display(), plain(e)))?;
        let config = Config::read(&content, &file)
            .map_err(|e| format!("{} is not a model that this program runs: {e}", path.display()))?;
        Ok(Self { path: path.into(), file, content, config })
    }

    /// The embedding, the last norm and the output head.
    pub fn ends(&self) -> Result<Ends> {
        let Config { vocab_size, hidden_size, .. } = self.config;
        let tied = !self.content.tensor_infos.contains_key("output.weight");
        let head = (!tied).then(|| self.tensor("output.weight", &[vocab_size, hidden_size]));
        Ok(Ends {
            embedding: self.tensor("token_embd.weight", &[vocab_size, hidden_size])?,
            norm: self.vector("output_norm")?,
            head: head.transpose()?,
        })
    }

    /// The layers, each read when its turn comes.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = Result<Layer>> {
        (0..self.config.num_layers).map(|index| self.layer(index))
    }

    fn layer(&self, index: usize) -> Result<Layer> {
        let Config { hidden_size: hidden, intermediate_size: inner, heads, head_dim, .. } = self.config;
        let Biases { qkv, attention_output, gate_up, down } = self.config.biases;
        let (qo, kv) = (heads.num_qo_heads * head_dim, heads.num_kv_heads * head_dim);
        let name = |name: &str| format!("blk.{index}.{name}");
        let (router, gate_up, down) = match self.config.experts {
            None => (
                None,
                self.linear(index, &[("ffn_gate", inner), ("ffn_up", inner)], hidden, gate_up)?,
                self.linear(index, &[("ffn_down", hidden)], inner, down)?,
            ),
            Some(Experts { count, .. }) => {
                let experts = |name: &str, out, input| self.experts(index, name, [count, out, input]);
                let gate_up = [experts("ffn_gate", inner, hidden)?, experts("ffn_up", inner, hidden)?];
                let gate_up = Tensor::cat(&gate_up, 1)?.reshape((count * 2 * inner, hidden))?;
                let down = experts("ffn_down", hidden, inner)?;
                let down = down.permute((1, 0, 2))?.reshape((hidden, count * inner))?;
                let alone = |weight| Linear { weight, bias: None };
                let router = self.tensor(&name("ffn_gate_inp.weight"), &[count, hidden])?;
                (Some(alone(router)), alone(gate_up), alone(down))
            }
        };
        Ok(Layer {
            attention_norm: self.vector(&name("attn_norm"))?,
            qkv: self.linear(index, &[("attn_q", qo), ("attn_k", kv), ("attn_v", kv)], hidden, qkv)?,
            attention_output: self.linear(index, &[("attn_output", hidden)], qo, attention_output)?,
            mlp_norm: self.vector(&name("ffn_norm"))?,
            router,
            gate_up,
            down,
        })
    }

    /// Matrices of these names and heights in one, with zeros for a bias that is
    /// missing, if there are any.
    fn linear(&self, index: usize, parts: &[(&str, usize)], input: usize, biased: bool) -> Result<Linear> {
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for &(name, out) in parts {
            weights.push(self.tensor(&format!("blk.{index}.{name}.weight"), &[out, input])?);
            let bias = format!("blk.{index}.{name}.bias");
            biases.push(match self.content.tensor_infos.contains_key(&bias) {
                true => self.tensor(&bias, &[out])?,
                false => Tensor::zeros(out, DType::F32, &Device::Cpu)?,
            });
        }
        let bias = biased.then(|| Tensor::cat(&biases, 0)).transpose()?;
        Ok(Linear { weight: Tensor::cat(&weights, 0)?, bias })
    }

    /// The matrices of all experts, in one tensor or in one each.
    fn experts(&self, index: usize, name: &str, [count, out, input]: [usize; 3]) -> Result<Tensor> {
        let each = |expert: usize| format!("blk.{index}.{name}.{expert}.weight");
        if !self.content.tensor_infos.contains_key(&each(0)) {
            return self.tensor(&format!("blk.{index}.{name}_exps.weight"), &[count, out, input]);
        }
        let all = (0..count).map(|expert| self.tensor(&each(expert), &[out, input]));
        Ok(Tensor::stack(&all.collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// The weight of a norm.
    fn vector(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.tensor(&format!("{name}.weight"), &[self.config.hidden_size])?.to_vec1()?)
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = tensor(&self.content, &self.file, name, shape);
        tensor.map_err(|e| format!("{}: {e}", self.path.display()).into())
    }
}

/// A tensor of a file, which must have this shape.
fn tensor(content: &Content, mut file: &File, name: &str, shape: &[usize]) -> Result<Tensor> {
    let broken = |problem: String| format!("tensor {name}: {problem}");
    let info = content.tensor_infos.get(name).ok_or_else(|| broken("it is missing".into()))?;
    if info.shape.dims() != shape {
        return Err(broken(format!("its shape is {:?}; expected {shape:?}", info.shape.dims())).into());
    }
    let mut read = || content.tensor(&mut file, name, &Device::Cpu)?.dequantize(&Device::Cpu);
    let tensor = read().and_then(|tensor| tensor.to_dtype(DType::F32));
    Ok(tensor.map_err(|e| broken(plain(e)))?)
}

/// Refuses a file with a tensor that is not used: answers would not be the model's.
fn check_tensors(content: &Content, num_layers: usize, experts: Option<Experts>) -> Result<()> {
    let of_expert = |name: &str| {
        let mut parts = name.split('.');
        let each = parts.next().is_some_and(|name| EACH.contains(&name));
        let number = parts.next().and_then(|number| number.parse::<usize>().ok());
        each && number.is_some() && parts.eq(["weight"])
    };
    let of_layer = |name: &str| {
        INSIDE.contains(&name)
            || match experts {
                None => DENSE.contains(&name),
                Some(_) => ROUTED.contains(&name) || of_expert(name),
            }
    };
    let used = |name: &&String| match name.strip_prefix("blk.").and_then(|name| name.split_once('.')) {
        Some((layer, name)) => layer.parse().is_ok_and(|layer: usize| layer < num_layers) && of_layer(name),
        None => OUTSIDE.contains(&name.as_str()),
    };
    match content.tensor_infos.keys().filter(|name| !used(name)).min() {
        Some(name) => Err(format!("it has a tensor {name}, which this program does not support").into()),
        None => Ok(()),
    }
}

/// An error of candle without the backtrace that it may carry.
pub fn plain(error: candle_core::Error) -> String {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => plain(*inner),
        error => error.to_string(),
    }
}

impl Config {
    /// How many experts there are; one if there is nothing to choose from.
    pub fn num_experts(&self) -> usize {
        self.experts.map_or(1, |experts| experts.count)
    }

    /// What the model keeps for each token.
    pub fn kv_shape(&self, dtype: flashinfer_rs::DType, layout: KvLayout) -> HeadsShape {
        HeadsShape {
            num_layers: self.num_layers,
            num_kv_heads: self.heads.num_kv_heads,
            head_dim: self.head_dim,
            dtype,
            layout,
        }
    }

    fn read(content: &Content, file: &File) -> Result<Self> {
        let architecture = content.metadata.get("general.architecture").map(Value::to_string);
        match architecture {
            Some(Ok(name)) if name == "llama" => {}
            Some(Ok(name)) => return Err(format!("its architecture is {name}; expected llama").into()),
            _ => return Err("general.architecture is missing".into()),
        }
        let metadata = |key: &str| content.metadata.get(&format!("llama.{key}"));
        let count = |key: &str| match metadata(key).map(Value::to_u64) {
            None => Ok(None),
            Some(Ok(value @ 1..=0xffff_ffff)) => Ok(Some(value as usize)),
            Some(_) => Err(format!("llama.{key} is not a positive number: {:?}", metadata(key))),
        };
        let need = |key: &str| count(key)?.ok_or_else(|| format!("llama.{key} is missing"));
        let real = |key: &str| match metadata(key).map(Value::to_f32) {
            None => Ok(None),
            Some(Ok(value)) if value.is_finite() && value > 0.0 => Ok(Some(f64::from(value))),
            Some(_) => Err(format!("llama.{key} is not a positive number: {:?}", metadata(key))),
        };

        let hidden_size = need("embedding_length")?;
        let num_qo_heads = need("attention.head_count")?;
        let num_kv_heads = count("attention.head_count_kv")?.unwrap_or(num_qo_heads);
        let heads = Heads { num_qo_heads, num_kv_heads };
        if heads.group_size().is_none() {
            return Err(format!("{num_qo_heads} query heads cannot share {num_kv_heads} KV heads").into());
        }
        let head_dim = count("attention.key_length")?.unwrap_or(hidden_size / num_qo_heads);
        if !HEAD_DIMS.contains(&head_dim) {
            return Err(format!("its heads have {head_dim} dimensions; expected one of {HEAD_DIMS:?}").into());
        }
        if count("attention.value_length")?.is_some_and(|value| value != head_dim) {
            return Err(format!("llama.attention.value_length is not the head dimension, {head_dim}").into());
        }
        let num_layers = need("block_count")?;
        let experts = match metadata("expert_count").map(Value::to_u64) {
            None | Some(Ok(0)) => None,
            Some(_) => Some(Experts { count: need("expert_count")?, used: need("expert_used_count")? }),
        };
        if let Some(Experts { count, used }) = experts.filter(|experts| experts.used > experts.count) {
            return Err(format!("it uses {used} experts of {count}").into());
        }
        // What other files of this architecture may ask for.
        for (key, usual) in [("attention.scale", (head_dim as f64).powf(-0.5)), ("expert_weights_scale", 1.0)]
        {
            if let Some(value) = real(key)?.filter(|value| (value / usual - 1.0).abs() > 1e-6) {
                return Err(format!("llama.{key} is {value}; expected {usual}").into());
            }
        }
        check_tensors(content, num_layers, experts)?;
        let biased = |names: &[&str]| {
            let names: Vec<_> = names.iter().map(|name| format!(".{name}.bias")).collect();
            content.tensor_infos.keys().any(|tensor| names.iter().any(|name| tensor.ends_with(name)))
        };
        let biases = Biases {
            qkv: biased(&["attn_q", "attn_k", "attn_v"]),
            attention_output: biased(&["attn_output"]),
            gate_up: biased(&["ffn_gate", "ffn_up"]),
            down: biased(&["ffn_down"]),
        };
        let embedding = content.tensor_infos.get("token_embd.weight").map(|info| info.shape.dims());
        let Some(&[vocab_size, _]) = embedding else {
            return Err("the tensor token_embd.weight is missing, or no matrix".into());
        };
        let context_length = need("context_length")?;

        // A factor without a type means linear scaling.
        let factor = real("rope.scaling.factor")?.or(real("rope.scale_linear")?).unwrap_or(1.0);
        let scaling = match metadata("rope.scaling.type").map(Value::to_string) {
            Some(Ok(name)) if name == "none" => RopeScaling::None,
            Some(Ok(name)) if name == "yarn" => {
                let old_context_len = count("rope.scaling.original_context_length")?;
                let mut yarn = YarnScaling::new(factor, old_context_len.unwrap_or(context_length) as f64);
                yarn.beta_fast = real("rope.scaling.yarn_beta_fast")?.unwrap_or(yarn.beta_fast);
                yarn.beta_slow = real("rope.scaling.yarn_beta_slow")?.unwrap_or(yarn.beta_slow);
                RopeScaling::Yarn(yarn)
            }
            Some(Ok(name)) if name != "linear" => {
                let expected = "expected none, linear or yarn";
                return Err(format!("its rotary embedding is scaled as `{name}`; {expected}").into());
            }
            None | Some(Ok(_)) => RopeScaling::Linear { factor },
            Some(Err(_)) => return Err("llama.rope.scaling.type is no string".into()),
        };
        let rotary_dim = count("rope.dimension_count")?.unwrap_or(head_dim);
        if rotary_dim > head_dim || !rotary_dim.is_multiple_of(ROTARY_MULTIPLE) {
            let expected = format!("a multiple of {ROTARY_MULTIPLE} up to {head_dim}");
            return Err(format!("llama.rope.dimension_count is {rotary_dim}; expected {expected}").into());
        }
        let theta = real("rope.freq_base")?.unwrap_or(1e4);
        let mut rope = RopeFrequencies::new(rotary_dim, theta, &scaling)?;
        // Llama 3.1 and later have their scaling in a tensor, which divides.
        if content.tensor_infos.contains_key(ROPE_FREQS) {
            let factors = tensor(content, file, ROPE_FREQS, &[rotary_dim / 2])?.to_vec1::<f32>()?;
            let scaled = rope.inv_freq().iter().zip(factors).map(|(freq, factor)| freq / f64::from(factor));
            rope = RopeFrequencies::from_inv_freq(scaled.collect(), rope.attention_factor())
                .map_err(|e| format!("tensor {ROPE_FREQS}: {e}"))?;
        }
        if let Some(factor) = real("rope.scaling.attn_factor")? {
            rope = RopeFrequencies::from_inv_freq(rope.inv_freq().into(), rope.attention_factor() * factor)?;
        }
        Ok(Self {
            num_layers,
            hidden_size,
            intermediate_size: need("feed_forward_length")?,
            experts,
            biases,
            vocab_size,
            heads,
            head_dim,
            context_length,
            rms_eps: real("attention.layer_norm_rms_epsilon")?
                .ok_or("llama.attention.layer_norm_rms_epsilon is missing")?,
            rope,
        })
    }
}
