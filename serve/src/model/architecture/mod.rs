//! What the files of an architecture have in common. Each has a file here with
//! one table; adding one is such a file, and a line in [`ALL`].

mod gemma2;
mod gemma3;
mod llama;
mod phi3;
mod qwen2;
mod qwen2moe;
mod qwen3;
mod qwen3moe;

/// All architectures that this program runs.
const ALL: [&Architecture; 8] = [
    &llama::LLAMA,
    &qwen2::QWEN2,
    &qwen3::QWEN3,
    &gemma2::GEMMA2,
    &gemma3::GEMMA3,
    &phi3::PHI3,
    &qwen2moe::QWEN2_MOE,
    &qwen3moe::QWEN3_MOE,
];

/// How the gate of an MLP is activated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// GELU by its approximation with `tanh`.
    GeluTanh,
}

/// Which layers have sliding windows, where a file has a window and does not
/// name its layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Windows {
    /// Every layer.
    All,
    /// All but each `n`-th.
    AllButEach(usize),
}

/// What the scale of queries times keys is, where a file does not say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionScale {
    /// `1 / sqrt(head_dim)`.
    HeadDim,
    /// Of models of so many layers `1 / sqrt(hidden_size / num_qo_heads)`, of
    /// others [`HeadDim`](Self::HeadDim).
    HiddenPerHead { num_layers: usize },
}

/// How a router's scores become shares, where a file does not say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routing {
    /// Whether the shares of a token's experts are divided by their sum.
    pub normalize: bool,
    /// Whether an expert that every token has is added.
    pub shared_expert: bool,
}

/// What the files of an architecture have in common.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Architecture {
    /// `general.architecture`, and what its keys start with.
    pub name: &'static str,
    /// Whether rotary embeddings turn neighbouring elements, as GGUF files of
    /// the llama family are stored; others turn those half a head apart (NeoX).
    pub interleave: bool,
    /// Whether queries and keys are normed head by head, before they are turned.
    pub qk_norm: bool,
    /// Whether what attention and the MLP make is normed before it is added.
    pub post_norms: bool,
    /// Whether norms were trained as `1 + weight`. Files hold the sum.
    pub unit_offset_norms: bool,
    /// Whether embeddings are multiplied by `sqrt(hidden_size)`.
    pub scaled_embedding: bool,
    /// Whether numbers of these models are too large for `f16`.
    pub overflows_f16: bool,
    pub activation: Activation,
    pub attention_scale: AttentionScale,
    /// The window of a file without a key for it.
    pub default_window: Option<usize>,
    pub windows: Windows,
    /// The base of rotary frequencies of layers with windows, if it is not that
    /// of the others. Those are not scaled then.
    pub window_rope_base: Option<f64>,
    /// `None` if there are no experts.
    pub routing: Option<Routing>,
}

impl Architecture {
    /// The plainest: what most of them are.
    const PLAIN: Self = Self {
        name: "",
        interleave: false,
        qk_norm: false,
        post_norms: false,
        unit_offset_norms: false,
        scaled_embedding: false,
        overflows_f16: false,
        activation: Activation::Silu,
        attention_scale: AttentionScale::HeadDim,
        default_window: None,
        windows: Windows::All,
        window_rope_base: None,
        routing: None,
    };

    /// The architecture of a name.
    pub fn of(name: &str) -> Option<&'static Self> {
        ALL.into_iter().find(|architecture| architecture.name == name)
    }

    /// The names of all.
    pub fn names() -> impl Iterator<Item = &'static str> {
        ALL.into_iter().map(|architecture| architecture.name)
    }
}
