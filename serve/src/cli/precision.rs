//! `--weights` and `--kv`: the bits of what a GPU keeps.

use crate::backend::precision::Precision;

/// The bits of what a GPU keeps.
#[derive(Clone, Copy, clap::Args)]
pub struct PrecisionArgs {
    /// The type of weights on a GPU
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    pub weights: Precision,
    /// The type of the KV cache on a GPU
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    pub kv: Precision,
}
