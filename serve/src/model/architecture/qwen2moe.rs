//! Qwen1.5-MoE and Qwen2-MoE: experts, one that every token has among them,
//! and shares that do not sum to 1.

use super::{Architecture, Routing, qwen2::QWEN2};

pub const QWEN2_MOE: Architecture = Architecture {
    name: "qwen2moe",
    routing: Some(Routing { normalize: false, shared_expert: true }),
    ..QWEN2
};
