//! What a model keeps for each token.

use super::layout::{KvLayout, LATENT_WIDTH};
use crate::{
    dtype::DType,
    error::{FlashInferError, Result},
};

/// Element types: those that kernels read, and those that only the CPU has.
const DTYPES: [DType; 6] = [DType::F16, DType::BF16, DType::E4M3, DType::E5M2, DType::F32, DType::F64];

/// What one model keeps for each token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvShape {
    /// Keys and values of heads.
    Heads(HeadsShape),
    /// One row for all heads, of multi-head latent attention.
    Latent(LatentShape),
}

/// Keys and values of heads, in each layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadsShape {
    /// Layers that have keys and values.
    pub num_layers: usize,
    /// Heads of keys and values in a layer.
    pub num_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// The element type. Kernels read `f16`, `bf16`, `e4m3` and `e5m2`; `f32`
    /// and `f64` are for the CPU.
    pub dtype: DType,
    /// The order of dimensions.
    pub layout: KvLayout,
}

/// A row of 512 compressed elements and 64 for the position, in each layer of
/// multi-head latent attention ([`BatchMla`](crate::attention::BatchMla)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentShape {
    /// Layers that have such rows.
    pub num_layers: usize,
    /// The element type. Attention reads `f16` and `bf16`; `f32` and `f64` are
    /// for the CPU.
    pub dtype: DType,
}

impl From<HeadsShape> for KvShape {
    fn from(shape: HeadsShape) -> Self {
        Self::Heads(shape)
    }
}

impl From<LatentShape> for KvShape {
    fn from(shape: LatentShape) -> Self {
        Self::Latent(shape)
    }
}

impl KvShape {
    /// Layers that have keys and values.
    pub fn num_layers(&self) -> usize {
        match self {
            Self::Heads(shape) => shape.num_layers,
            Self::Latent(shape) => shape.num_layers,
        }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Heads(shape) => shape.dtype,
            Self::Latent(shape) => shape.dtype,
        }
    }

    /// Bytes of a page of `page_size` tokens: what all layers keep of them.
    /// Memory divided by it is the number of pages that fit.
    ///
    /// # Errors
    /// A number is 0, the element type is no float, or the product does not fit
    /// the address space.
    ///
    /// ```
    /// # use flashinfer_rs::{DType, kv::{HeadsShape, KvLayout, KvShape, LatentShape}};
    /// let heads = HeadsShape {
    ///     num_layers: 32, num_kv_heads: 8, head_dim: 128, dtype: DType::BF16, layout: KvLayout::Nhd,
    /// };
    /// assert_eq!(KvShape::Heads(heads).page_bytes(16)?, 2 << 20);
    /// let latent = LatentShape { num_layers: 61, dtype: DType::BF16 };
    /// assert_eq!(KvShape::Latent(latent).page_bytes(64)?, 61 * 64 * 576 * 2);
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    pub fn page_bytes(&self, page_size: usize) -> Result<usize> {
        let part = self.part_bytes(page_size)?;
        self.parts().and_then(|parts| part.checked_mul(parts)).ok_or_else(too_large)
    }

    /// Parts of a page, all of one size: keys and values of each layer, or its
    /// rows.
    pub(super) fn parts(&self) -> Option<usize> {
        self.num_layers().checked_mul(self.parts_of_layer())
    }

    pub(super) fn parts_of_layer(&self) -> usize {
        match self {
            Self::Heads(_) => 2,
            Self::Latent(_) => 1,
        }
    }

    /// Bytes of a part of a page.
    pub(super) fn part_bytes(&self, page_size: usize) -> Result<usize> {
        let (heads, width) = match self {
            Self::Heads(shape) => (shape.num_kv_heads, shape.head_dim),
            Self::Latent(_) => (1, LATENT_WIDTH),
        };
        let sizes = [
            ("num_layers", self.num_layers()),
            ("num_kv_heads", heads),
            ("head_dim", width),
            ("page_size", page_size),
        ];
        if let Some((name, _)) = sizes.into_iter().find(|&(_, size)| size == 0) {
            return Err(FlashInferError::invalid("KvShape", name, "0; a cache has at least one"));
        }
        if !DTYPES.contains(&self.dtype()) {
            let names: Vec<_> = DTYPES.iter().map(|dtype| dtype.name()).collect();
            let problem = format!("{}; expected {}", self.dtype(), names.join(" or "));
            return Err(FlashInferError::invalid("KvShape", "dtype", problem));
        }
        [heads, width, self.dtype().size()]
            .into_iter()
            .try_fold(page_size, usize::checked_mul)
            .ok_or_else(too_large)
    }
}

impl HeadsShape {
    /// The dimensions of the keys, or of the values, of one layer in a page.
    pub(crate) fn page_dims(&self, page_size: usize) -> [usize; 3] {
        match self.layout {
            KvLayout::Nhd => [page_size, self.num_kv_heads, self.head_dim],
            KvLayout::Hnd => [self.num_kv_heads, page_size, self.head_dim],
        }
    }
}

/// The cache of a shape is larger than any memory.
pub(super) fn too_large() -> FlashInferError {
    FlashInferError::invalid(
        "PagedKvCache",
        "shapes",
        "the cache does not fit the address space; use fewer pages",
    )
}
