//! Appends to a paged cache of candle tensors.

#[cfg(feature = "candle-cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, InplaceOp3, Layout, Result, Tensor};

use super::{
    op::{check_like, fitting},
    paged::PagedCache,
    step::Step,
    tensor,
};
use crate::{
    kv::{HeadsShape, KvLayout, MLA_DIMS, MlaCacheMut, PagedKvMut},
    reference,
    tensor::{TensorMut, TensorRef},
};
#[cfg(feature = "candle-cuda")]
use crate::{page, stream::Stream};

const APPEND: &str = "PagedCache::append";
const APPEND_LATENT: &str = "PagedCache::append_latent";

impl PagedCache {
    /// Writes keys and values of a step's new tokens to their pages. Makes the
    /// pending copies of pages first.
    ///
    /// `k` and `v` are `(tokens, num_kv_heads, head_dim)` of the cache's dtype, a
    /// row for each token of [`Batch::append_indices`](crate::kv::Batch::append_indices). They may be views, also
    /// of one tensor. On CUDA, strides that are multiples of 16 bytes are read as
    /// they are, others copied; the work goes to the stream of the cache's
    /// device. Nothing waits.
    ///
    /// # Errors
    /// The step is of another pool or device; there is no such layer; device,
    /// dtype or shape of `k` or `v` do not fit; the kernel has no such head
    /// dimension (64, 128, 256, 512); `k` or `v` is a view of the layer itself.
    /// Nothing was written. Else what the module or CUDA said.
    pub fn append(&mut self, step: &Step<'_>, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        let HeadsShape { num_kv_heads, head_dim, layout, .. } = *self.heads(APPEND)?;
        let shape = [num_kv_heads, head_dim];
        let new =
            [NewRows { name: "k", rows: k, shape: &shape }, NewRows { name: "v", rows: v, shape: &shape }];
        self.write(APPEND, step, layer, new, Append { step, parts: RowParts::KeysAndValues(layout) })
    }

    /// Writes a step's new rows of latent attention to their pages. Makes the pending
    /// copies of pages first.
    ///
    /// `ckv` is `(tokens, 512)`, `kpe` `(tokens, 64)`; they may be the parts of one
    /// tensor. The rest is as in [`append`](Self::append).
    ///
    /// # Errors
    /// As [`append`](Self::append); also when the cache has heads.
    pub fn append_latent(&mut self, step: &Step<'_>, layer: usize, ckv: &Tensor, kpe: &Tensor) -> Result<()> {
        self.check_latent(APPEND_LATENT)?;
        let [ckv_dim, kpe_dim] = MLA_DIMS.map(|dim| [dim as usize]);
        let new = [
            NewRows { name: "ckv", rows: ckv, shape: &ckv_dim },
            NewRows { name: "kpe", rows: kpe, shape: &kpe_dim },
        ];
        self.write(APPEND_LATENT, step, layer, new, Append { step, parts: RowParts::Latent })
    }

    /// Checks a step's new rows, and writes them.
    fn write(
        &mut self,
        op: &'static str,
        step: &Step<'_>,
        layer: usize,
        new: [NewRows<'_>; 2],
        append: Append<'_>,
    ) -> Result<()> {
        step.check_cache(op, self)?;
        let tensor = self.layer(layer)?.clone();
        let tokens = step.batch.append_indices().len();
        for NewRows { name, rows, shape } in &new {
            let shape: Vec<_> = std::iter::once(tokens).chain(shape.iter().copied()).collect();
            check_like(op, name, rows, &shape, tensor.dtype(), self.device())?;
        }
        self.copy_pages()?;
        if tokens == 0 {
            return Ok(());
        }
        tensor.inplace_op3(&fitting(new[0].rows)?, &fitting(new[1].rows)?, &append)
    }
}

/// What a step's new tokens bring: a row for each, of this shape.
struct NewRows<'a> {
    name: &'static str,
    rows: &'a Tensor,
    shape: &'a [usize],
}

/// What the two parts of a row are.
enum RowParts {
    KeysAndValues(KvLayout),
    /// `ckv` and `kpe`.
    Latent,
}

/// The rows of a step's new tokens, to a layer.
struct Append<'a> {
    step: &'a Step<'a>,
    parts: RowParts,
}

impl Append<'_> {
    fn on_cpu(&self, cache: TensorMut<'_>, [a, b]: [&TensorRef<'_>; 2]) -> crate::Result<()> {
        let slots = self.step.batch.slots();
        match self.parts {
            RowParts::KeysAndValues(layout) => {
                let mut cache = PagedKvMut::joined(cache, layout)?;
                reference::append_paged_kv_cache(a, b, &slots, &mut cache)
            }
            RowParts::Latent => {
                let MlaCacheMut { mut ckv, mut kpe } = MlaCacheMut::joined(cache)?;
                reference::append_paged_mla_kv_cache(a, b, &slots, [&mut ckv, &mut kpe])
            }
        }
    }

    #[cfg(feature = "candle-cuda")]
    fn on_cuda(
        &self,
        stream: &Stream,
        cache: TensorMut<'_>,
        [a, b]: [&TensorRef<'_>; 2],
    ) -> crate::Result<()> {
        let slots = self.step.on_cuda()?.slots();
        match self.parts {
            RowParts::KeysAndValues(layout) => {
                page::append_paged_kv_cache(stream, a, b, &slots, &mut PagedKvMut::joined(cache, layout)?)
            }
            RowParts::Latent => {
                let MlaCacheMut { mut ckv, mut kpe } = MlaCacheMut::joined(cache)?;
                page::append_paged_mla_kv_cache(stream, a, b, &slots, [&mut ckv, &mut kpe])
            }
        }
    }
}

impl InplaceOp3 for Append<'_> {
    fn name(&self) -> &'static str {
        match self.parts {
            RowParts::KeysAndValues(_) => "append_paged_kv_cache",
            RowParts::Latent => "append_paged_mla_kv_cache",
        }
    }

    fn cpu_fwd(
        &self,
        cache: &mut CpuStorage,
        cache_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<()> {
        let (a, b) = (tensor::on_cpu(a, a_layout)?, tensor::on_cpu(b, b_layout)?);
        self.on_cpu(tensor::on_cpu_mut(cache, cache_layout)?, [&a, &b]).map_err(tensor::error)
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(
        &self,
        cache: &mut CudaStorage,
        cache_layout: &Layout,
        a: &CudaStorage,
        a_layout: &Layout,
        b: &CudaStorage,
        b_layout: &Layout,
    ) -> Result<()> {
        let cuda = cache.device.cuda_stream();
        let (a, b) = (tensor::on_cuda(a, a_layout, &cuda)?, tensor::on_cuda(b, b_layout, &cuda)?);
        let mut cache = tensor::on_cuda_mut(cache, cache_layout, &cuda)?;
        let (stream, a, b) = (Stream::from(&cuda), a.view(), b.view());
        self.on_cuda(&stream, cache.view_mut(), [&a, &b]).map_err(tensor::error)
    }
}
