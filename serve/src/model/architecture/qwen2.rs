//! Qwen2 and Qwen2.5, whose queries, keys and values have biases.

use super::Architecture;

pub const QWEN2: Architecture = Architecture { name: "qwen2", ..Architecture::PLAIN };
