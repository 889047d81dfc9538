//! A paged KV cache of candle tensors.

#[cfg(feature = "candle-cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Result, Tensor};

use super::{
    op::{candle_dtype, check_cache_dtype, check_dtype, invalid},
    tensor,
};
use crate::kv::{HeadsShape, KvShape, LATENT_WIDTH, PageAllocator, StorageClaim, check_copies};

const CACHE: &str = "PagedCache";

/// The memory of the pages of a [`PageAllocator`] for one model: for each layer
/// one candle tensor that holds keys and values, which is changed in place.
///
/// A layer's tensor is `[num_pages, 2, page_size, num_kv_heads, head_dim]`, or
/// with [`KvLayout::Hnd`](crate::kv::KvLayout::Hnd) `[num_pages, 2, num_kv_heads, page_size, head_dim]`:
/// keys at 0 of the second dimension, values at 1. Of latent attention
/// ([`KvShape::Latent`]) it is `[num_pages, page_size, 576]`: in each row 512
/// compressed elements, and 64 for the position. It starts as zeros.
///
/// Sequences, batches and prefixes are those of [`kv`](crate::kv), as are the
/// rules: a page that several sequences use is copied before one of them appends
/// to it, by [`StepTables::update`](super::StepTables::update) and [`append`](Self::append).
///
/// Two sequences that share a prefix, a step of each, and the attention of both:
///
/// ```
/// use candle_core::{Device, Tensor};
/// use flashinfer_rs::{
///     DType,
///     attention::{AttentionSpec, Heads},
///     candle::{PagedDecode, PagedPrefill, StepTables, PagedCache},
///     kv::{Batch, HeadsShape, PageAllocator, Sequence, KvLayout},
/// };
///
/// // With `Device::new_cuda(0)` and f16 or bf16 this runs on the GPU.
/// let (device, dtype) = (Device::Cpu, DType::F32);
/// let heads = Heads::new(4, 2);
/// let shape = HeadsShape { num_layers: 2, num_kv_heads: 2, head_dim: 64, dtype, layout: KvLayout::Nhd };
/// let pool = PageAllocator::new(8, 16)?;
/// let mut cache = PagedCache::new(&device, &pool, shape)?;
/// let mut tables = StepTables::new(&device);
/// let spec = AttentionSpec::new(dtype, 64);
/// let mut prefill = PagedPrefill::new(&device, &spec, heads)?;
/// let mut decode = PagedDecode::new(&device, &spec, heads)?;
/// let random = |tokens, heads| Tensor::randn(0f32, 1.0, (tokens, heads, 64), &device);
///
/// // A prompt of 20 tokens.
/// let mut batch = Batch::new(&pool);
/// batch.push(Sequence::new(&pool))?;
/// batch.append([20])?;
/// let step = tables.update(&batch, &mut cache)?;
/// let plan = prefill.plan(&step, true)?;
/// for layer in 0..2 {
///     let (q, k, v) = (random(20, 4)?, random(20, 2)?, random(20, 2)?);
///     cache.append(&step, layer, &k, &v)?;
///     assert_eq!(plan.run(&q, &cache, layer)?.dims(), [20, 4, 64]);
/// }
///
/// // A second sequence begins alike. Both go on with a token of their own: the
/// // full page stays shared, and of the other one a copy is made.
/// batch.push(batch.sequences()[0].fork())?;
/// batch.append([1, 1])?;
/// let step = tables.update(&batch, &mut cache)?;
/// let plan = decode.plan(&step)?;
/// for layer in 0..2 {
///     let (q, k, v) = (random(2, 4)?, random(2, 2)?, random(2, 2)?);
///     cache.append(&step, layer, &k, &v)?;
///     assert_eq!(plan.run(&q, &cache, layer)?.dims(), [2, 4, 64]);
/// }
/// assert_eq!(pool.used_pages(), 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct PagedCache {
    claim: StorageClaim,
    shape: KvShape,
    layers: Vec<Tensor>,
}

impl PagedCache {
    /// Zeros for the pages of a pool, allocated by candle on `device`.
    ///
    /// Elements are `f16` or `bf16`, on the CPU also `f32` and `f64`; those of heads also
    /// `e4m3`.
    ///
    /// # Errors
    /// The shape is impossible, the device has no such elements, the pool has a
    /// cache already, or memory is short.
    pub fn new(device: &Device, allocator: &PageAllocator, shape: impl Into<KvShape>) -> Result<Self> {
        let shape = shape.into();
        shape.check(allocator).map_err(tensor::error)?;
        let dtype = candle_dtype(CACHE, "dtype", shape.dtype())?;
        let (pages, page_size) = (allocator.num_pages(), allocator.page_size());
        let dims = match shape {
            KvShape::Heads(heads) => {
                check_cache_dtype(CACHE, "dtype", dtype, device)?;
                let [rows, columns, width] = heads.page_dims(page_size);
                vec![pages, 2, rows, columns, width]
            }
            KvShape::Latent(_) => {
                check_dtype(CACHE, "dtype", dtype, device)?;
                vec![pages, page_size, LATENT_WIDTH]
            }
        };
        let claim = allocator.claim_storage().map_err(tensor::error)?;
        let layer = |_| Tensor::zeros(&dims[..], dtype, device);
        let layers = (0..shape.num_layers()).map(layer).collect::<Result<_>>()?;
        Ok(Self { claim, shape, layers })
    }

    /// The pool whose pages these are.
    pub fn allocator(&self) -> &PageAllocator {
        self.claim.allocator()
    }

    /// What the model keeps for each token.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// The shape of a cache of heads.
    pub(super) fn heads(&self, op: &'static str) -> Result<&HeadsShape> {
        match &self.shape {
            KvShape::Heads(shape) => Ok(shape),
            KvShape::Latent(_) => {
                invalid(op, "cache", "it has rows of latent attention, and no heads".into())
            }
        }
    }

    /// Refuses a cache of heads.
    pub(super) fn check_latent(&self, op: &'static str) -> Result<()> {
        match &self.shape {
            KvShape::Latent(_) => Ok(()),
            KvShape::Heads(_) => invalid(op, "cache", "it has heads, and no rows of latent attention".into()),
        }
    }

    /// The device of all layers.
    pub fn device(&self) -> &Device {
        // There is a layer: `KvShape::check` refuses none.
        self.layers[0].device()
    }

    /// Keys and values of a layer.
    ///
    /// # Errors
    /// There is no such layer.
    pub fn layer(&self, layer: usize) -> Result<&Tensor> {
        match self.layers.get(layer) {
            Some(tensor) => Ok(tensor),
            None => invalid(CACHE, "layer", format!("{layer}; the model has {}", self.layers.len())),
        }
    }

    /// Makes the copies of pages that are due, in all layers; on a device, in
    /// the order of its stream. See [`kv::PagedKvCache`](crate::kv::PagedKvCache).
    ///
    /// # Errors
    /// Copies are due while the stream is being captured into a graph, or what
    /// CUDA said. Copies that were not made stay due.
    pub fn copy_pages(&mut self) -> Result<()> {
        if self.allocator().pending_copies() == 0 {
            return Ok(());
        }
        if let Some(stream) = tensor::stream(self.device()) {
            check_copies(&stream).map_err(tensor::error)?;
        }
        self.allocator().make_copies(|source, target| {
            self.layers.iter().try_for_each(|layer| layer.inplace_op1(&CopyPage { source, target }))
        })
    }
}

impl std::fmt::Debug for PagedCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PagedCache")
            .field("allocator", self.allocator())
            .field("shape", &self.shape)
            .field("device", self.device())
            .finish()
    }
}

/// The copy of a page of a layer.
struct CopyPage {
    source: usize,
    target: usize,
}

impl CopyPage {
    /// Where the two pages begin in the storage, and their elements.
    fn places(&self, layout: &Layout) -> ([usize; 2], usize) {
        let page = layout.stride()[0];
        ([self.source, self.target].map(|at| layout.start_offset() + at * page), page)
    }
}

impl InplaceOp1 for CopyPage {
    fn name(&self) -> &'static str {
        "copy_page"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (places, len) = self.places(layout);
        tensor::copy_on_cpu(storage, places, len)
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let (places, len) = self.places(layout);
        let stream = storage.device.cuda_stream();
        tensor::copy_on_cuda(storage, places, len, &stream)
    }
}
