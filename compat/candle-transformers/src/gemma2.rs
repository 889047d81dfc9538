//! Gemma 2 over a paged cache, with its sliding window and its soft cap.
//!
//! candle-transformers' model hands neither to flash attention, and has no window without it. This one reads
//! the same files and the same [`Config`]; its attention is [`PagedGemma2`]'s.

mod paged;

use candle_core::{Module, Result, Tensor};
use candle_nn::{Embedding, Linear, VarBuilder, embedding, linear_b};
pub use candle_transformers::models::gemma2::Config;
use flashinfer_rs::{
    attention::Heads,
    candle::{RotaryEmbedding, TokenPositions, rms_norm, rope},
    rope::{RopeFrequencies, RopeScaling},
};
pub use paged::PagedGemma2;

/// All of the model but attention, which its caller computes.
pub struct Gemma2 {
    config: Config,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: Norm,
    lm_head: Linear,
    rotary: RotaryEmbedding,
}

impl Gemma2 {
    /// The weights by Hugging Face's names.
    pub fn new(config: &Config, weights: VarBuilder) -> Result<Self> {
        let weights = weights.pp("model");
        let embedding = embedding(config.vocab_size, config.hidden_size, weights.pp("embed_tokens"))?;
        let layer = |at| Layer::new(config, weights.pp("layers").pp(at));
        let frequencies = RopeFrequencies::new(config.head_dim, config.rope_theta, &RopeScaling::None)
            .map_err(candle_core::Error::wrap)?;
        Ok(Self {
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            norm: Norm::new(config, weights.pp("norm"))?,
            lm_head: Linear::new(embedding.embeddings().clone(), None),
            rotary: RotaryEmbedding::new(weights.device(), &frequencies, config.max_position_embeddings)?,
            embedding,
            config: config.clone(),
        })
    }

    /// What it was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Heads of a layer.
    pub fn heads(&self) -> Heads {
        Heads::new(self.config.num_attention_heads, self.config.num_key_value_heads)
    }

    /// The factor on products of queries and keys.
    pub fn sm_scale(&self) -> f64 {
        1.0 / (self.config.query_pre_attn_scalar as f64).sqrt()
    }

    /// How many tokens before its own a query of a layer sees; `None` is all. Every second layer has a
    /// window, the first among them.
    pub fn window_left(&self, layer: usize) -> Option<usize> {
        self.config.sliding_window.filter(|_| layer.is_multiple_of(2)).map(|window| window.saturating_sub(1))
    }

    /// Logits, `(rows, vocab_size)`, of the rows that `last` names.
    ///
    /// `tokens` are all new tokens, those of a sequence one after the other, and `positions` where each stands
    /// in its own. `attend` is given a layer, and its queries, keys and values, `(tokens, heads, head_dim)`; it
    /// keeps the keys and values, and returns the attention of the queries.
    pub fn forward<'p>(
        &self,
        tokens: &Tensor,
        positions: impl Into<TokenPositions<'p>>,
        last: &Tensor,
        mut attend: impl FnMut(usize, [&Tensor; 3]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let positions = positions.into();
        let mut hidden = (self.embedding.forward(tokens)? * (self.config.hidden_size as f64).sqrt())?;
        for (at, layer) in self.layers.iter().enumerate() {
            let normed = layer.input_norm.forward(&hidden)?;
            let heads = |projection: &Linear| {
                projection.forward(&normed)?.reshape((normed.dim(0)?, (), self.config.head_dim))
            };
            let (q, k) = rope(&heads(&layer.q_proj)?, &heads(&layer.k_proj)?, &self.rotary, positions)?;
            let out = attend(at, [&q, &k, &heads(&layer.v_proj)?])?.flatten_from(1)?;
            let out = layer.post_attention_norm.forward(&layer.o_proj.forward(&out)?)?;
            hidden = (hidden + out)?;
            let out = layer.mlp.forward(&layer.pre_feedforward_norm.forward(&hidden)?)?;
            hidden = (hidden + layer.post_feedforward_norm.forward(&out)?)?;
        }
        let rows = self.norm.forward(&hidden.index_select(last, 0)?)?;
        capped(self.lm_head.forward(&rows)?, self.config.final_logit_softcapping)
    }
}

/// `cap · tanh(logits / cap)`.
fn capped(logits: Tensor, cap: Option<f64>) -> Result<Tensor> {
    match cap {
        Some(cap) => (logits / cap)?.tanh()? * cap,
        None => Ok(logits),
    }
}

struct Layer {
    input_norm: Norm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    post_attention_norm: Norm,
    pre_feedforward_norm: Norm,
    mlp: Mlp,
    post_feedforward_norm: Norm,
}

impl Layer {
    fn new(config: &Config, weights: VarBuilder) -> Result<Self> {
        let norm = |name| Norm::new(config, weights.pp(name));
        let (hidden, attention, bias) = (config.hidden_size, weights.pp("self_attn"), config.attention_bias);
        let [qo, kv] =
            [config.num_attention_heads, config.num_key_value_heads].map(|heads| heads * config.head_dim);
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            q_proj: linear_b(hidden, qo, bias, attention.pp("q_proj"))?,
            k_proj: linear_b(hidden, kv, bias, attention.pp("k_proj"))?,
            v_proj: linear_b(hidden, kv, bias, attention.pp("v_proj"))?,
            o_proj: linear_b(qo, hidden, bias, attention.pp("o_proj"))?,
            post_attention_norm: norm("post_attention_layernorm")?,
            pre_feedforward_norm: norm("pre_feedforward_layernorm")?,
            mlp: Mlp::new(config, weights.pp("mlp"))?,
            post_feedforward_norm: norm("post_feedforward_layernorm")?,
        })
    }
}

struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    activation: candle_nn::Activation,
}

impl Mlp {
    fn new(config: &Config, weights: VarBuilder) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            gate_proj: linear_b(hidden, inner, false, weights.pp("gate_proj"))?,
            up_proj: linear_b(hidden, inner, false, weights.pp("up_proj"))?,
            down_proj: linear_b(inner, hidden, false, weights.pp("down_proj"))?,
            activation: config.hidden_activation,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let gate = self.activation.forward(&self.gate_proj.forward(x)?)?;
        self.down_proj.forward(&(gate * self.up_proj.forward(x)?)?)
    }
}

/// RMS norm whose weights are kept less 1.
struct Norm {
    weight: Tensor,
    eps: f32,
}

impl Norm {
    fn new(config: &Config, weights: VarBuilder) -> Result<Self> {
        let weight = (weights.get(config.hidden_size, "weight")? + 1.0)?;
        Ok(Self { weight, eps: config.rms_norm_eps as f32 })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, &self.weight, self.eps)
    }
}
