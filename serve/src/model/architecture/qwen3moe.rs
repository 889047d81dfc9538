//! Qwen3-MoE: Qwen3 with experts.

use super::{Architecture, Routing, qwen3::QWEN3};

pub const QWEN3_MOE: Architecture = Architecture {
    name: "qwen3moe",
    routing: Some(Routing { normalize: true, shared_expert: false }),
    ..QWEN3
};
