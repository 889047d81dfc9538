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
