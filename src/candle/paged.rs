//! A paged KV cache of candle tensors, and the index arrays of a step.

#[cfg(feature = "candle-cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, DType, Device, InplaceOp1, InplaceOp3, Layout, Result, Tensor};

use super::{
    op::{check_cache_dtype, check_like, fitting, invalid},
    tensor,
};
#[cfg(feature = "candle-cuda")]
use crate::page;
use crate::{
    kv::{
        self, Batch, BatchCapacity, HeadsShape, KvLayout, PageAllocator, PagedKvMut, StorageClaim,
        check_copies,
    },
    reference,
    stream::Stream,
};

const CACHE: &str = "PagedCache";
const APPEND: &str = "PagedCache::append";
const TABLES: &str = "StepTables";

/// The memory of the pages of a [`PageAllocator`] for one model: for each layer
/// one candle tensor that holds keys and values, which is changed in place.
///
/// A layer's tensor is `[num_pages, 2, page_size, num_kv_heads, head_dim]`, or
/// with [`KvLayout::Hnd`] `[num_pages, 2, num_kv_heads, page_size, head_dim]`:
/// keys at 0 of the second dimension, values at 1. It starts as zeros.
///
/// Sequences, batches and prefixes are those of [`kv`](crate::kv), as are the
/// rules: a page that several sequences use is copied before one of them appends
/// to it, by [`StepTables::update`] and [`append`](Self::append).
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
    shape: HeadsShape,
    dtype: DType,
    layers: Vec<Tensor>,
}

impl PagedCache {
    /// Zeros for the pages of a pool, allocated by candle on `device`.
    ///
    /// Elements are `f16` or `bf16`, on the CPU also `f32` and `f64`.
    ///
    /// # Errors
    /// The shape is impossible, the device has no such elements, the pool has a
    /// cache already, or memory is short.
    pub fn new(device: &Device, allocator: &PageAllocator, shape: HeadsShape) -> Result<Self> {
        shape.check(allocator).map_err(tensor::error)?;
        let Some(dtype) = tensor::of_ours(shape.dtype) else {
            return invalid(CACHE, "dtype", format!("{}; candle has no such elements", shape.dtype));
        };
        check_cache_dtype(CACHE, "dtype", dtype, device)?;
        let [rows, columns, width] = shape.page_dims(allocator.page_size());
        let claim = allocator.claim_storage().map_err(tensor::error)?;
        let layer = |_| Tensor::zeros((allocator.num_pages(), 2, rows, columns, width), dtype, device);
        let layers = (0..shape.num_layers).map(layer).collect::<Result<_>>()?;
        Ok(Self { claim, shape, dtype, layers })
    }

    /// The pool whose pages these are.
    pub fn allocator(&self) -> &PageAllocator {
        self.claim.allocator()
    }

    /// What the model keeps for each token.
    pub fn shape(&self) -> &HeadsShape {
        &self.shape
    }

    /// The device of all layers.
    pub fn device(&self) -> &Device {
        // There is a layer: `HeadsShape` refuses none.
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

    /// Writes keys and values of a step's new tokens to their pages. Makes the
    /// pending copies of pages first.
    ///
    /// `k` and `v` are `(tokens, num_kv_heads, head_dim)` of the cache's dtype, a
    /// row for each token of [`Batch::append_indices`]. They may be views, also
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
        step.check_cache(APPEND, self)?;
        let tensor = self.layer(layer)?.clone();
        let tokens = step.batch.append_indices().len();
        let shape = [tokens, self.shape.num_kv_heads, self.shape.head_dim];
        for (name, rows) in [("k", k), ("v", v)] {
            check_like(APPEND, name, rows, &shape, self.dtype, self.device())?;
        }
        self.copy_pages()?;
        if tokens == 0 {
            return Ok(());
        }
        tensor.inplace_op3(&fitting(k)?, &fitting(v)?, &Append { step, layout: self.shape.layout })
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

/// The keys and values of a step's new tokens, to a layer.
struct Append<'a> {
    step: &'a Step<'a>,
    layout: KvLayout,
}

impl InplaceOp3 for Append<'_> {
    fn name(&self) -> &'static str {
        "append_paged_kv_cache"
    }

    fn cpu_fwd(
        &self,
        cache: &mut CpuStorage,
        cache_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<()> {
        let (k, v) = (tensor::on_cpu(k, k_layout)?, tensor::on_cpu(v, v_layout)?);
        let cache = PagedKvMut::joined(tensor::on_cpu_mut(cache, cache_layout)?, self.layout);
        let batch = self.step.batch;
        let append = |mut cache| reference::append_paged_kv_cache(&k, &v, &batch.slots(), &mut cache);
        cache.and_then(append).map_err(tensor::error)
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(
        &self,
        cache: &mut CudaStorage,
        cache_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<()> {
        let cuda = cache.device.cuda_stream();
        let (k, v) = (tensor::on_cuda(k, k_layout, &cuda)?, tensor::on_cuda(v, v_layout, &cuda)?);
        let mut cache = tensor::on_cuda_mut(cache, cache_layout, &cuda)?;
        let append = |tables: &kv::BatchTables| {
            let mut kv = PagedKvMut::joined(cache.view_mut(), self.layout)?;
            let (stream, k, v) = (Stream::from(&cuda), k.view(), v.view());
            page::append_paged_kv_cache(&stream, &k, &v, &tables.slots(), &mut kv)
        };
        self.step.on_cuda().and_then(append).map_err(tensor::error)
    }
}

/// The index arrays of a [`Batch`] on a candle device: nothing on the CPU, where
/// the batch's own are used, else arrays that are uploaded once for a step.
///
/// They belong to the stream of the device. With candle's default, which is each
/// thread's own default stream, they can be used only in the thread that made
/// them; with `Device::new_cuda_with_stream` in any.
#[derive(Debug)]
pub struct StepTables {
    device: Device,
    on_cuda: Option<(kv::BatchTables, BatchCapacity)>,
}

/// A batch, ready to be computed: what [`StepTables::update`] makes.
///
/// It borrows the batch and the arrays, so that neither can change while a plan
/// is made from it and run:
///
/// ```compile_fail,E0502
/// # use flashinfer_rs::{candle::{PagedDecode, StepTables, PagedCache}, kv::Batch};
/// # fn step(mut batch: Batch, mut tables: StepTables, mut cache: PagedCache, mut decode: PagedDecode) -> candle_core::Result<()> {
/// let step = tables.update(&batch, &mut cache)?;
/// batch.append([1]).unwrap(); // the step is of the batch as it was
/// decode.plan(&step)?;
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Step<'s> {
    pub(super) batch: &'s Batch,
    pub(super) device: &'s Device,
    tables: Option<&'s kv::BatchTables>,
}

/// Room that tables have at least.
const MIN_CAPACITY: BatchCapacity = BatchCapacity { requests: 64, pages: 4096, tokens: 1024 };

fn holds(capacity: &BatchCapacity, needed: &BatchCapacity) -> bool {
    capacity.requests >= needed.requests && capacity.pages >= needed.pages && capacity.tokens >= needed.tokens
}

impl StepTables {
    /// Tables for steps on a device. They grow with the batches they are given.
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), on_cuda: None }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Makes everything ready for a step: copies the pages that are to be
    /// copied, then uploads the arrays, all in the order of the device's stream.
    /// To be called after the batch changed.
    ///
    /// Nothing waits, but for an upload if the one before the last has not
    /// finished. When a batch is larger than all before it, arrays are allocated.
    ///
    /// # Errors
    /// Batch, cache and tables are not of one pool and one device; the stream is
    /// being captured, or is another thread's; the device is neither the CPU nor
    /// a CUDA device; or what CUDA said.
    pub fn update<'s>(&'s mut self, batch: &'s Batch, cache: &mut PagedCache) -> Result<Step<'s>> {
        if batch.allocator() != cache.allocator() {
            return invalid(TABLES, "cache", "it is the memory of another pool than the batch's".into());
        }
        check_device(TABLES, cache, &self.device)?;
        cache.copy_pages()?;
        if let Some(stream) = tensor::stream(&self.device) {
            upload(&mut self.on_cuda, batch, &stream).map_err(tensor::error)?;
        }
        Ok(Step { batch, device: &self.device, tables: self.on_cuda.as_ref().map(|(tables, _)| tables) })
    }
}

/// Uploads a batch, to larger tables if it has to be.
fn upload(
    on_cuda: &mut Option<(kv::BatchTables, BatchCapacity)>,
    batch: &Batch,
    stream: &Stream,
) -> crate::Result<()> {
    let needed = BatchCapacity {
        requests: batch.len(),
        pages: batch.pages().indices().len(),
        tokens: batch.append_indices().len(),
    };
    match on_cuda {
        Some((tables, capacity)) if holds(capacity, &needed) => tables.upload(batch),
        _ => {
            let old = on_cuda.as_ref().map_or(MIN_CAPACITY, |&(_, capacity)| capacity);
            let room = |needed: usize, old: usize| needed.max(1).next_power_of_two().max(old);
            let capacity = BatchCapacity {
                requests: room(needed.requests, old.requests),
                pages: room(needed.pages, old.pages),
                tokens: room(needed.tokens, old.tokens),
            };
            *on_cuda = Some((kv::BatchTables::new(stream, batch, capacity)?, capacity));
            Ok(())
        }
    }
}

/// The cache is on this very device: of another one of the same GPU the stream
/// may be another.
fn check_device(op: &'static str, cache: &PagedCache, device: &Device) -> Result<()> {
    if device.same_device(cache.device()) {
        return Ok(());
    }
    let (at, expected) = (cache.device(), device);
    invalid(
        op,
        "cache",
        format!("it is on {at:?}, the tables are on {expected:?}; make both from one Device"),
    )
}

impl Step<'_> {
    /// The batch.
    pub fn batch(&self) -> &Batch {
        self.batch
    }

    /// The cache has the memory of the batch's pages, where the arrays are.
    pub(super) fn check_cache(&self, op: &'static str, cache: &PagedCache) -> Result<()> {
        if self.batch.allocator() != cache.allocator() {
            return invalid(op, "cache", "it is the memory of another pool than the step's".into());
        }
        check_device(op, cache, self.device)
    }

    /// The arrays on a CUDA device.
    pub(super) fn on_cuda(&self) -> crate::Result<&kv::BatchTables> {
        let missing = || crate::FlashInferError::invalid(TABLES, "device", "its arrays are not on CUDA");
        self.tables.ok_or_else(missing)
    }
}
