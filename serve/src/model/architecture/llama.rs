//! Llama, and what has its network: Mistral, SmolLM2, and Mixtral, which has
//! experts.

use super::{Architecture, Routing};

pub const LLAMA: Architecture = Architecture {
    name: "llama",
    interleave: true,
    routing: Some(Routing { normalize: true, shared_expert: false }),
    ..Architecture::PLAIN
};
