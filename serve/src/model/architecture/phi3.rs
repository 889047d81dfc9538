//! Phi-3, Phi-3.5 and Phi-4, whose matrices of queries, keys and values are
//! one, as are those of gate and up.

use super::Architecture;

pub const PHI3: Architecture = Architecture { name: "phi3", ..Architecture::PLAIN };
