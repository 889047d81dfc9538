//! Gemma 2: norms on both sides, soft caps, and a window in every other layer.

use super::{Activation, Architecture, AttentionScale, Windows};

pub const GEMMA2: Architecture = Architecture {
    name: "gemma2",
    post_norms: true,
    unit_offset_norms: true,
    scaled_embedding: true,
    overflows_f16: true,
    activation: Activation::GeluTanh,
    // The model of 27 billion parameters.
    attention_scale: AttentionScale::HiddenPerHead { num_layers: 46 },
    default_window: Some(4096),
    windows: Windows::AllButEach(2),
    ..Architecture::PLAIN
};
