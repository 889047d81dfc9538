//! Gemma 3, of text: Gemma 2 with normed queries and keys in place of the soft
//! cap of attention, and windows in five of six layers, which turn faster.

use super::{Architecture, AttentionScale, Windows, gemma2::GEMMA2};

pub const GEMMA3: Architecture = Architecture {
    name: "gemma3",
    qk_norm: true,
    // The model of 27 billion parameters.
    attention_scale: AttentionScale::HiddenPerHead { num_layers: 62 },
    default_window: None,
    windows: Windows::AllButEach(6),
    window_rope_base: Some(1e4),
    ..GEMMA2
};
