//! Layouts of a paged KV cache, and views of one.

use crate::{
    error::{FlashInferError, Result},
    tensor::{TensorMut, TensorRef},
};

/// The order of dimensions in a paged cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvLayout {
    /// `[pages, page_size, heads, head_dim]`.
    #[default]
    Nhd,
    /// `[pages, heads, page_size, head_dim]`.
    Hnd,
}

impl KvLayout {
    /// The code that kernels take.
    pub(crate) const fn code(self) -> i64 {
        match self {
            Self::Nhd => 0,
            Self::Hnd => 1,
        }
    }

    /// Page size and heads of a 4-dimensional cache shape.
    pub(crate) fn page_size_and_heads(self, shape: &[i64]) -> (i64, i64) {
        match self {
            Self::Nhd => (shape[1], shape[2]),
            Self::Hnd => (shape[2], shape[1]),
        }
    }
}

/// A paged KV cache to read: two tensors of one shape and the same strides.
#[derive(Clone, Copy, Debug)]
pub struct PagedKv<'a> {
    /// Keys, 4-dimensional in the order of `layout`.
    pub k: TensorRef<'a>,
    /// Values, of the shape and strides of `k`.
    pub v: TensorRef<'a>,
    /// The order of dimensions.
    pub layout: KvLayout,
}

impl<'a> PagedKv<'a> {
    /// A cache of two tensors. They are checked where they are used.
    pub fn new(k: TensorRef<'a>, v: TensorRef<'a>, layout: KvLayout) -> Self {
        Self { k, v, layout }
    }

    /// A cache that holds keys and values in one tensor `[pages, 2, …]`.
    ///
    /// # Errors
    /// The tensor's second dimension is not 2.
    pub fn joined(kv: TensorRef<'a>, layout: KvLayout) -> Result<Self> {
        if kv.rank() != 5 || kv.shape()[1] != 2 {
            return Err(joined_shape(kv.shape()));
        }
        Ok(Self { k: kv.select(1, 0)?, v: kv.select(1, 1)?, layout })
    }
}

/// A paged KV cache to write. See [`PagedKv`].
#[derive(Debug)]
pub struct PagedKvMut<'a> {
    /// Keys, 4-dimensional in the order of `layout`.
    pub k: TensorMut<'a>,
    /// Values, of the shape and strides of `k`.
    pub v: TensorMut<'a>,
    /// The order of dimensions.
    pub layout: KvLayout,
}

impl<'a> PagedKvMut<'a> {
    /// A cache of two tensors. They are checked where they are used.
    pub fn new(k: TensorMut<'a>, v: TensorMut<'a>, layout: KvLayout) -> Self {
        Self { k, v, layout }
    }

    /// A cache that holds keys and values in one tensor `[pages, 2, …]`.
    ///
    /// # Errors
    /// The tensor's second dimension is not 2.
    pub fn joined(kv: TensorMut<'a>, layout: KvLayout) -> Result<Self> {
        if kv.rank() != 5 || kv.shape()[1] != 2 {
            return Err(joined_shape(kv.shape()));
        }
        let (k, v) = kv.unbind_pair(1)?;
        Ok(Self { k, v, layout })
    }

    /// The cache, to read.
    pub fn as_ref(&self) -> PagedKv<'_> {
        PagedKv { k: self.k.as_ref(), v: self.v.as_ref(), layout: self.layout }
    }
}

fn joined_shape(shape: &[i64]) -> FlashInferError {
    FlashInferError::invalid(
        "PagedKv",
        "kv",
        format!("its shape is {shape:?}; expected five dimensions [pages, 2, …]"),
    )
}

/// Widths of the two parts of a row of latent attention.
pub(crate) const MLA_DIMS: [i64; 2] = [512, 64];
/// Elements of a row.
pub(crate) const LATENT_WIDTH: usize = (MLA_DIMS[0] + MLA_DIMS[1]) as usize;

/// A paged cache of latent attention, to read.
///
/// [`append_paged_mla_kv_cache`](crate::page::append_paged_mla_kv_cache) writes it.
#[derive(Clone, Copy, Debug)]
pub struct MlaCache<'a> {
    /// Compressed keys and values, `[pages, page_size, 512]`.
    pub ckv: TensorRef<'a>,
    /// The keys' positions, `[pages, page_size, 64]`.
    pub kpe: TensorRef<'a>,
}

impl<'a> MlaCache<'a> {
    /// A cache of two tensors. They are checked where they are used.
    pub fn new(ckv: TensorRef<'a>, kpe: TensorRef<'a>) -> Self {
        Self { ckv, kpe }
    }

    /// A cache that holds both parts in one tensor `[pages, page_size, 576]`.
    ///
    /// # Errors
    /// The tensor has not three dimensions of which the last is 576.
    pub fn joined(cache: TensorRef<'a>) -> Result<Self> {
        let [ckv, kpe] = split_latent("MlaCache", "cache", cache)?;
        Ok(Self { ckv, kpe })
    }
}

/// A paged cache of latent attention, to write. See [`MlaCache`].
#[derive(Debug)]
pub struct MlaCacheMut<'a> {
    /// Compressed keys and values, `[pages, page_size, 512]`.
    pub ckv: TensorMut<'a>,
    /// The keys' positions, `[pages, page_size, 64]`.
    pub kpe: TensorMut<'a>,
}

impl<'a> MlaCacheMut<'a> {
    /// A cache of two tensors. They are checked where they are used.
    pub fn new(ckv: TensorMut<'a>, kpe: TensorMut<'a>) -> Self {
        Self { ckv, kpe }
    }

    /// A cache that holds both parts in one tensor `[pages, page_size, 576]`.
    ///
    /// # Errors
    /// The tensor has not three dimensions of which the last is 576.
    pub fn joined(cache: TensorMut<'a>) -> Result<Self> {
        split_latent("MlaCacheMut", "cache", cache.as_ref())?;
        let (ckv, kpe) = cache.split_at(2, MLA_DIMS[0] as usize)?;
        Ok(Self { ckv, kpe })
    }

    /// The cache, to read.
    pub fn as_ref(&self) -> MlaCache<'_> {
        MlaCache { ckv: self.ckv.as_ref(), kpe: self.kpe.as_ref() }
    }
}

/// The two parts of a tensor's last dimension.
pub(crate) fn split_latent<'a>(
    op: &'static str,
    argument: &'static str,
    tensor: TensorRef<'a>,
) -> Result<[TensorRef<'a>; 2]> {
    let [ckv, kpe] = MLA_DIMS.map(|dim| dim as usize);
    if tensor.rank() != 3 || tensor.shape()[2] as usize != ckv + kpe {
        return Err(FlashInferError::invalid(
            op,
            argument,
            format!(
                "its shape is {:?}; expected three dimensions, the last of {}",
                tensor.shape(),
                ckv + kpe
            ),
        ));
    }
    Ok([tensor.narrow(2, 0, ckv)?, tensor.narrow(2, ckv, kpe)?])
}
