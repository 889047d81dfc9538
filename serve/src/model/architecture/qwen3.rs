//! Qwen3, which norms queries and keys.

use super::Architecture;

pub const QWEN3: Architecture = Architecture { name: "qwen3", qk_norm: true, ..Architecture::PLAIN };
