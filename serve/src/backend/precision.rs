//! How many bits numbers have that a GPU keeps.

use clap::ValueEnum;
use flashinfer_rs::DType;

/// The type of weights, or of keys and values, on a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    /// The 16-bit floats that the model computes in
    #[default]
    Auto,
    /// 8-bit floats of 4 bits of exponent and 3 of mantissa
    E4m3,
}

impl Precision {
    /// The type, of a model that computes in another.
    pub fn dtype(self, computed: DType) -> DType {
        match self {
            Self::Auto => computed,
            Self::E4m3 => DType::E4M3,
        }
    }
}
