//! Views of an engine's memory: an address, a shape, and strides.

use std::ffi::c_void;

use flashinfer_rs::{
    DType, Device, Result, TensorMut, TensorRef,
    kv::{KvLayout, PagedKv, PagedKvMut},
};

/// Rows of heads: queries, new keys and values, outputs.
#[derive(Clone, Copy)]
pub struct Rows {
    pub data: *mut c_void,
    pub device: Device,
    /// `[rows, heads, head_dim]`.
    pub shape: [usize; 3],
    /// In elements.
    pub strides: [usize; 3],
}

impl Rows {
    /// A row's heads lie side by side.
    pub fn rows_first(data: *mut c_void, device: Device, shape: [usize; 3]) -> Self {
        Self { data, device, shape, strides: [shape[1] * shape[2], shape[2], 1] }
    }

    /// A head's rows lie side by side.
    pub fn heads_first(data: *mut c_void, device: Device, shape: [usize; 3]) -> Self {
        Self { data, device, shape, strides: [shape[2], shape[0] * shape[2], 1] }
    }

    /// # Safety
    /// As [`TensorRef::from_raw_parts`].
    pub unsafe fn read<'a>(self) -> Result<TensorRef<'a>> {
        let strides = Some(&self.strides[..]);
        // SAFETY: promised by the caller.
        unsafe { TensorRef::from_raw_parts(self.data, self.device, DType::BF16, &self.shape, strides) }
    }

    /// # Safety
    /// As [`TensorMut::from_raw_parts`].
    pub unsafe fn write<'a>(self) -> Result<TensorMut<'a>> {
        let strides = Some(&self.strides[..]);
        // SAFETY: promised by the caller.
        unsafe { TensorMut::from_raw_parts(self.data, self.device, DType::BF16, &self.shape, strides) }
    }
}

/// The sizes of a layer's cache.
#[derive(Clone, Copy)]
pub struct CacheShape {
    pub pages: usize,
    pub page_size: usize,
    pub heads: usize,
    pub head_dim: usize,
}

/// A layer's paged cache. Keys and values have the same strides.
#[derive(Clone, Copy)]
pub struct LayerCache {
    k: *mut c_void,
    v: *mut c_void,
    device: Device,
    layout: KvLayout,
    shape: [usize; 4],
    strides: [usize; 4],
}

impl LayerCache {
    /// Keys and values apart, each `[pages, heads, page_size, head_dim]`.
    pub fn split([k, v]: [*mut c_void; 2], device: Device, shape: CacheShape) -> Self {
        let CacheShape { pages, page_size, heads, head_dim } = shape;
        Self {
            k,
            v,
            device,
            layout: KvLayout::Hnd,
            shape: [pages, heads, page_size, head_dim],
            strides: [heads * page_size * head_dim, page_size * head_dim, head_dim, 1],
        }
    }

    /// A layer of a cache `[pages, layers, 2, page_size, heads, head_dim]`, in which a page holds the
    /// keys and values of all layers, to be copied as one.
    pub fn page_first(
        cache: *mut c_void,
        device: Device,
        shape: CacheShape,
        layer: usize,
        layers: usize,
    ) -> Self {
        let CacheShape { pages, page_size, heads, head_dim } = shape;
        let half = page_size * heads * head_dim;
        let part = |index: usize| cache.wrapping_byte_add(index * half * DType::BF16.size());
        Self {
            k: part(2 * layer),
            v: part(2 * layer + 1),
            device,
            layout: KvLayout::Nhd,
            shape: [pages, page_size, heads, head_dim],
            strides: [layers * 2 * half, heads * head_dim, head_dim, 1],
        }
    }

    /// # Safety
    /// As [`TensorRef::from_raw_parts`], for keys and for values.
    pub unsafe fn read<'a>(self) -> Result<PagedKv<'a>> {
        // SAFETY: promised by the caller.
        let [k, v] = [self.k, self.v].map(|part| unsafe {
            TensorRef::from_raw_parts(part, self.device, DType::BF16, &self.shape, Some(&self.strides))
        });
        Ok(PagedKv::new(k?, v?, self.layout))
    }

    /// # Safety
    /// As [`TensorMut::from_raw_parts`], for keys and for values.
    pub unsafe fn write<'a>(self) -> Result<PagedKvMut<'a>> {
        // SAFETY: promised by the caller.
        let [k, v] = [self.k, self.v].map(|part| unsafe {
            TensorMut::from_raw_parts(part, self.device, DType::BF16, &self.shape, Some(&self.strides))
        });
        Ok(PagedKvMut::new(k?, v?, self.layout))
    }
}
