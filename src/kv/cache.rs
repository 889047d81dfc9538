//! The memory of a pool's pages.

use std::ffi::c_void;

use super::{
    pages::{PageAllocator, StorageClaim},
    shape::{KvShape, too_large},
};
use crate::{
    cuda::DeviceBuffer,
    device::Device,
    error::{FlashInferError, Result},
    kv::{
        KvLayout, PagedKv, PagedKvMut,
        layout::{LATENT_WIDTH, MlaCache, MlaCacheMut},
    },
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

const OP: &str = "PagedKvCache";

/// Copies of pages can be enqueued: the stream is usable here, and is not being
/// captured into a graph, which would make them again in every replay.
pub(crate) fn check_copies(stream: &Stream) -> Result<()> {
    stream.check_usable_here(OP)?;
    if FlashInferRuntime::get()?.cuda().is_capturing(stream)? {
        return Err(FlashInferError::invalid(
            OP,
            "stream",
            "it is being captured into a CUDA graph while copies of pages are due; \
             call copy_pages or BatchTables::update before the capture, and before each replay",
        ));
    }
    Ok(())
}

/// Where pages of models of several shapes begin: at a multiple of so many
/// bytes.
const PAGE_ALIGNMENT: usize = 256;

/// The memory of the pages of a [`PageAllocator`]: keys and values of all
/// layers of one model, or of several that share the pool. Models of latent
/// attention have a row for each token in their place ([`KvShape::Latent`]), which
/// is one tensor `[pages, page_size, 576]` in each layer.
///
/// Models are numbered as their shapes were given ([`KvLayer`] names a layer of one). A page that a sequence of
/// one model gives back can serve any other, so memory goes where it is needed;
/// each page is as large as the largest model needs. Models whose layers need
/// equally many bytes, as one model's do, have a contiguous tensor
/// `[pages, …]` for the keys and one for the values of each layer. For models
/// that differ, all layers of a page lie together, and the views of a layer
/// have a stride of a whole page. Kernels that count offsets in 32 bits (those
/// of [`BatchAttention`](crate::attention::BatchAttention)) then reach no
/// further than 2³² elements of the whole cache.
///
/// Device memory is allocated and freed in the order of one stream, on which
/// alone views of it are used. It starts as zeros.
///
/// # Copies
///
/// When tokens are appended to a page that several sequences use, the sequence
/// gets a page of its own, to which the old content has to be copied. The pool
/// knows which copies are due. [`copy_pages`](Self::copy_pages) makes them, and
/// whatever is needed to write to pages does so first:
/// [`layer_mut`](Self::layer_mut) and [`BatchTables::update`](super::BatchTables::update).
pub struct PagedKvCache {
    claim: StorageClaim,
    shapes: Vec<KvShape>,
    pieces: Pieces,
    memory: Memory,
}

/// How the bytes of a page lie in memory: `count` pieces of `bytes`, `distance`
/// from one to the next, the first of them `step` behind that of the page
/// before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pieces {
    step: usize,
    count: usize,
    bytes: usize,
    distance: usize,
}

impl Pieces {
    /// For these models, and the size of it all.
    fn new(num_pages: usize, page_size: usize, shapes: &[KvShape]) -> Result<(Self, usize)> {
        let (mut parts, mut page, mut count, mut same) = (0, 0, 0, true);
        for shape in shapes {
            let part = shape.part_bytes(page_size)?;
            page = page.max(shape.page_bytes(page_size)?);
            count = count.max(shape.parts().ok_or_else(too_large)?);
            same &= parts == 0 || parts == part;
            parts = part;
        }
        if page == 0 {
            return Err(FlashInferError::invalid(OP, "shapes", "there are none; give one for each model"));
        }
        let pieces = if same {
            let distance = num_pages.checked_mul(parts).ok_or_else(too_large)?;
            Self { step: parts, count, bytes: parts, distance }
        } else {
            let page = page.checked_next_multiple_of(PAGE_ALIGNMENT).ok_or_else(too_large)?;
            Self { step: page, count: 1, bytes: page, distance: page }
        };
        let page = pieces.count.checked_mul(pieces.bytes);
        let total =
            page.and_then(|page| page.checked_mul(num_pages)).filter(|&total| total <= isize::MAX as usize);
        Ok((pieces, total.ok_or_else(too_large)?))
    }
}

#[cfg(feature = "candle")]
impl KvShape {
    /// Refuses an impossible shape, and one of which a pool's pages do not fit the
    /// address space.
    pub(crate) fn check(&self, pool: &PageAllocator) -> Result<()> {
        Pieces::new(pool.num_pages(), pool.page_size(), &[*self]).map(drop)
    }
}

/// A layer of a [`PagedKvCache`]: a number alone where the cache is of one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayer {
    /// `None`: of the only one.
    model: Option<usize>,
    number: usize,
}

impl KvLayer {
    /// A layer of one of several models, which are numbered as their shapes were given.
    pub fn of_model(model: usize, layer: usize) -> Self {
        Self { model: Some(model), number: layer }
    }
}

impl From<usize> for KvLayer {
    fn from(number: usize) -> Self {
        Self { model: None, number }
    }
}

enum Memory {
    Host(Vec<u128>),
    Device(DeviceBuffer),
}

impl PagedKvCache {
    /// Device memory for the pages of a pool, used on `stream` alone.
    ///
    /// # Errors
    /// There is no shape or an impossible one, the pool has a cache already,
    /// the stream is being captured, or
    /// [`Cuda`](FlashInferError::Cuda), for example because memory is short.
    pub fn new<S: Into<KvShape> + Copy>(
        stream: &Stream,
        allocator: &PageAllocator,
        shapes: &[S],
    ) -> Result<Self> {
        stream.check_usable_here(OP)?;
        Self::with_memory(allocator, shapes, |bytes| {
            let cuda = FlashInferRuntime::get()?.cuda();
            Ok(Memory::Device(DeviceBuffer::zeroed(cuda, stream, bytes)?))
        })
    }

    /// Host memory for the pages of a pool, for the
    /// [CPU reference](mod@crate::reference).
    ///
    /// # Errors
    /// There is no shape or an impossible one, or the pool has a cache already.
    pub fn on_host<S: Into<KvShape> + Copy>(allocator: &PageAllocator, shapes: &[S]) -> Result<Self> {
        Self::with_memory(allocator, shapes, |bytes| {
            Ok(Memory::Host(vec![0; bytes.div_ceil(size_of::<u128>())]))
        })
    }

    fn with_memory(
        allocator: &PageAllocator,
        shapes: &[impl Into<KvShape> + Copy],
        memory: impl FnOnce(usize) -> Result<Memory>,
    ) -> Result<Self> {
        let shapes: Vec<KvShape> = shapes.iter().map(|&shape| shape.into()).collect();
        let (pieces, bytes) = Pieces::new(allocator.num_pages(), allocator.page_size(), &shapes)?;
        let claim = allocator.claim_storage()?;
        Ok(Self { claim, shapes, pieces, memory: memory(bytes)? })
    }

    /// The pool whose pages these are.
    pub fn allocator(&self) -> &PageAllocator {
        self.claim.allocator()
    }

    /// The shapes of the models.
    pub fn shapes(&self) -> &[KvShape] {
        &self.shapes
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.allocator().num_pages() * self.pieces.count * self.pieces.bytes
    }

    /// The stream on which the cache is used; `None` for host memory.
    pub fn stream(&self) -> Option<&Stream> {
        match &self.memory {
            Memory::Host(_) => None,
            Memory::Device(buffer) => Some(buffer.stream()),
        }
    }

    /// Keys and values of a layer, to read: `layer(3)` where the cache is of one model, else
    /// [`KvLayer::of_model`].
    ///
    /// # Errors
    /// There is no such model or layer, it is of latent attention, or no model is named though
    /// there are several.
    pub fn layer(&self, layer: impl Into<KvLayer>) -> Result<PagedKv<'_>> {
        let (layout, [k, v]) = self.heads(self.start(), layer.into())?;
        Ok(PagedKv::new(TensorRef::new(k), TensorRef::new(v), layout))
    }

    /// Keys and values of a layer, to write. Makes the pending copies
    /// first.
    ///
    /// # Errors
    /// As [`layer`](Self::layer) and [`copy_pages`](Self::copy_pages).
    pub fn layer_mut(&mut self, layer: impl Into<KvLayer>) -> Result<PagedKvMut<'_>> {
        self.copy_pages()?;
        let start = self.start_mut();
        let (layout, [k, v]) = self.heads(start, layer.into())?;
        Ok(PagedKvMut::new(TensorMut::new(k), TensorMut::new(v), layout))
    }

    /// The rows of a layer of latent attention, to read.
    ///
    /// # Errors
    /// There is no such model or layer, it has heads, or no model is named though there are
    /// several.
    pub fn latent(&self, layer: impl Into<KvLayer>) -> Result<MlaCache<'_>> {
        MlaCache::joined(TensorRef::new(self.rows(self.start(), layer.into())?))
    }

    /// The rows of a layer of latent attention, to write. Makes the pending
    /// copies first.
    ///
    /// # Errors
    /// As [`latent`](Self::latent) and [`copy_pages`](Self::copy_pages).
    pub fn latent_mut(&mut self, layer: impl Into<KvLayer>) -> Result<MlaCacheMut<'_>> {
        self.copy_pages()?;
        let start = self.start_mut();
        MlaCacheMut::joined(TensorMut::new(self.rows(start, layer.into())?))
    }

    /// Makes the copies of pages that are due, for all layers; on a device, in
    /// the order of the stream.
    ///
    /// # Errors
    /// Copies are due while the stream is being captured into a graph, which
    /// would make them again in every replay; or
    /// [`Cuda`](FlashInferError::Cuda). Copies that were not made stay due.
    pub fn copy_pages(&mut self) -> Result<()> {
        if self.allocator().pending_copies() == 0 {
            return Ok(());
        }
        let (start, pieces) = (self.start_mut(), self.pieces);
        let page_at = |page: usize| start.cast::<u8>().wrapping_add(page * pieces.step);
        match &self.memory {
            Memory::Host(_) => self.allocator().make_copies(|source, target| {
                for offset in (0..pieces.count).map(|piece| piece * pieces.distance) {
                    let from = page_at(source).wrapping_add(offset);
                    let to = page_at(target).wrapping_add(offset);
                    // SAFETY: both pages are of the pool, so these pieces lie
                    // in the memory, which `&mut self` borrows; pieces of
                    // different pages do not overlap.
                    unsafe { from.copy_to_nonoverlapping(to, pieces.bytes) };
                }
                Ok(())
            }),
            Memory::Device(buffer) => {
                let stream = buffer.stream();
                check_copies(stream)?;
                let cuda = FlashInferRuntime::get()?.cuda();
                self.allocator().make_copies(|source, target| {
                    let ends = [page_at(source), page_at(target)].map(<*mut u8>::cast);
                    // SAFETY: as above; the memory is of the stream's device,
                    // and all work on it is in the order of that stream.
                    unsafe { cuda.copy_rows(stream, ends, pieces.count, pieces.bytes, pieces.distance) }
                })
            }
        }
    }

    fn start(&self) -> *mut c_void {
        match &self.memory {
            Memory::Host(memory) => memory.as_ptr().cast_mut().cast(),
            Memory::Device(buffer) => buffer.as_ptr(),
        }
    }

    fn start_mut(&mut self) -> *mut c_void {
        match &mut self.memory {
            Memory::Host(memory) => memory.as_mut_ptr().cast(),
            Memory::Device(buffer) => buffer.as_ptr(),
        }
    }

    /// Keys and values of a layer in memory that starts there.
    fn heads(&self, start: *mut c_void, layer: KvLayer) -> Result<(KvLayout, [RawTensor; 2])> {
        let (pages, page_size) = (self.allocator().num_pages(), self.allocator().page_size());
        let KvShape::Heads(shape) = self.shape(layer)? else {
            return Err(wrong_kind("it keeps rows of latent attention; use latent and latent_mut"));
        };
        let [rows, columns, width] = shape.page_dims(page_size);
        let sizes = [pages, rows, columns, width];
        let strides = [self.pieces.step / shape.dtype.size(), columns * width, width, 1];
        let part = |part: usize| self.part(start, &shape.into(), part, &sizes, &strides);
        Ok((shape.layout, [part(2 * layer.number)?, part(2 * layer.number + 1)?]))
    }

    /// The rows of a layer of latent attention in memory that starts there.
    fn rows(&self, start: *mut c_void, layer: KvLayer) -> Result<RawTensor> {
        let (pages, page_size) = (self.allocator().num_pages(), self.allocator().page_size());
        let shape = self.shape(layer)?;
        let KvShape::Latent(_) = shape else {
            return Err(wrong_kind("it keeps heads; use layer and layer_mut"));
        };
        let strides = [self.pieces.step / shape.dtype().size(), LATENT_WIDTH, 1];
        self.part(start, &shape, layer.number, &[pages, page_size, LATENT_WIDTH], &strides)
    }

    /// The shape of a model that has such a layer.
    fn shape(&self, KvLayer { model, number }: KvLayer) -> Result<KvShape> {
        let missing = |argument, what: String| Err(FlashInferError::invalid(OP, argument, what));
        let models = self.shapes.len();
        if model.is_none() && models > 1 {
            let problem =
                format!("none is named; the cache has {models}: KvLayer::of_model(model, {number})");
            return missing("model", problem);
        }
        let model = model.unwrap_or(0);
        let Some(shape) = self.shapes.get(model) else {
            return missing("model", format!("{model}; the cache has {models}"));
        };
        if number >= shape.num_layers() {
            return missing("layer", format!("{number}; the model has {}", shape.num_layers()));
        }
        Ok(*shape)
    }

    /// A part of all pages.
    fn part(
        &self,
        start: *mut c_void,
        shape: &KvShape,
        part: usize,
        sizes: &[usize],
        strides: &[usize],
    ) -> Result<RawTensor> {
        // The parts of a page are pieces, or lie in its only one.
        let distance = if self.pieces.count > 1 {
            self.pieces.distance
        } else {
            shape.part_bytes(self.allocator().page_size())?
        };
        let data = start.cast::<u8>().wrapping_add(part * distance).cast();
        let device = self.stream().map_or(Device::Cpu, Stream::device);
        let mut raw = RawTensor::new(data, device, shape.dtype(), sizes, Some(strides))?;
        raw.stream = self.stream().map(Stream::id);
        raw.owner = match &self.memory {
            Memory::Host(_) => None,
            Memory::Device(buffer) => Some(buffer.owner()),
        };
        Ok(raw)
    }
}

fn wrong_kind(problem: &str) -> FlashInferError {
    FlashInferError::invalid(OP, "model", problem)
}

impl std::fmt::Debug for PagedKvCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PagedKvCache")
            .field("allocator", self.allocator())
            .field("shapes", &self.shapes)
            .field("stream", &self.stream())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{LatentShape, shape::HeadsShape},
        *,
    };
    use crate::dtype::DType;

    const SHAPE: HeadsShape =
        HeadsShape { num_layers: 3, num_kv_heads: 2, head_dim: 64, dtype: DType::F16, layout: KvLayout::Nhd };

    /// First and last byte of each page's part, in all layers of all models.
    fn spans(cache: &PagedKvCache, model: usize) -> Vec<Vec<(usize, usize)>> {
        let shape = cache.shapes[model];
        let pages = cache.allocator().num_pages();
        let part = shape.part_bytes(cache.allocator().page_size()).unwrap();
        (0..pages)
            .map(|page| {
                let layers = (0..shape.num_layers()).flat_map(|layer| {
                    let views = match shape {
                        KvShape::Heads(_) => {
                            let kv = cache.layer(KvLayer::of_model(model, layer)).unwrap();
                            vec![kv.k, kv.v]
                        }
                        // Positions lie in the rows.
                        KvShape::Latent(_) => {
                            vec![cache.latent(KvLayer::of_model(model, layer)).unwrap().ckv]
                        }
                    };
                    views.into_iter().map(move |view| {
                        let step = view.strides()[0] as usize * shape.dtype().size();
                        let start = view.data_ptr() as usize + page * step;
                        (start, start + part)
                    })
                });
                layers.collect()
            })
            .collect()
    }

    /// Pages of whatever models do not overlap, nor do the parts of a page, and
    /// all lie in the memory.
    #[test]
    fn pages_lie_apart() {
        let wide = HeadsShape { num_kv_heads: 5, num_layers: 2, ..SHAPE };
        let latent = KvShape::Latent(LatentShape { num_layers: 3, dtype: DType::F16 });
        let cases: [&[KvShape]; 8] = [
            &[SHAPE.into()],
            &[HeadsShape { layout: KvLayout::Hnd, dtype: DType::E4M3, ..SHAPE }.into()],
            &[SHAPE.into(), HeadsShape { num_layers: 1, ..SHAPE }.into()],
            &[SHAPE.into(), wide.into()],
            &[
                wide.into(),
                HeadsShape { dtype: DType::E4M3, head_dim: 3, num_kv_heads: 1, ..SHAPE }.into(),
                SHAPE.into(),
            ],
            &[latent],
            &[latent, SHAPE.into()],
            // Parts of one size: 9 heads of 64.
            &[HeadsShape { num_kv_heads: 9, ..SHAPE }.into(), latent],
        ];
        for shapes in cases {
            let pool = PageAllocator::new(4, 5).unwrap();
            let cache = PagedKvCache::on_host(&pool, shapes).unwrap();
            let Memory::Host(memory) = &cache.memory else { panic!("host memory") };
            let start = memory.as_ptr() as usize;
            let all: Vec<_> = (0..shapes.len()).map(|model| spans(&cache, model)).collect();
            for model in &all {
                for (page, spans) in model.iter().enumerate() {
                    let mut others: Vec<_> = all
                        .iter()
                        .flat_map(|model| model.iter().enumerate())
                        .filter(|(other, _)| *other != page)
                        .flat_map(|(_, spans)| spans)
                        .collect();
                    others.extend(spans);
                    for (at, span) in spans.iter().enumerate() {
                        assert!(span.0 >= start && span.1 <= start + cache.bytes());
                        let own = others.len() - spans.len() + at;
                        let overlaps = |other: &(usize, usize)| span.0 < other.1 && other.0 < span.1;
                        let mut rest = others.iter().enumerate().filter(|(index, _)| *index != own);
                        assert!(!rest.any(|(_, other)| overlaps(other)), "{shapes:?}: page {page}");
                    }
                }
            }
        }
    }

    #[test]
    fn layers_of_equal_size_are_contiguous() {
        let pool = PageAllocator::new(4, 5).unwrap();
        let contiguous = |shapes: &[HeadsShape]| {
            let cache = PagedKvCache::on_host(&pool, shapes).unwrap();
            let kv = cache.layer(KvLayer::of_model(0, 2)).unwrap();
            kv.k.is_contiguous() && kv.v.is_contiguous()
        };
        assert!(contiguous(&[SHAPE]));
        assert!(contiguous(&[SHAPE, HeadsShape { num_layers: 7, layout: KvLayout::Hnd, ..SHAPE }]));
        assert!(!contiguous(&[SHAPE, HeadsShape { dtype: DType::E4M3, ..SHAPE }]));
    }

    #[test]
    fn impossible_caches_are_refused() {
        let problem = |result: Result<PagedKvCache>| result.unwrap_err().to_string();
        let pool = PageAllocator::new(4, 5).unwrap();
        let with = |shape: HeadsShape| problem(PagedKvCache::on_host(&pool, &[shape]));
        assert!(problem(PagedKvCache::on_host::<KvShape>(&pool, &[])).contains("there are none"));
        assert!(with(HeadsShape { num_layers: 0, ..SHAPE }).contains("num_layers: 0"));
        assert!(with(HeadsShape { num_kv_heads: 0, ..SHAPE }).contains("num_kv_heads: 0"));
        assert!(with(HeadsShape { head_dim: 0, ..SHAPE }).contains("head_dim: 0"));
        assert!(with(HeadsShape { dtype: DType::I32, ..SHAPE }).contains("i32; expected f16 or"));
        for shape in [
            HeadsShape { head_dim: usize::MAX, ..SHAPE },
            HeadsShape { num_layers: usize::MAX / 2, ..SHAPE },
            HeadsShape { num_layers: 1 << 52, ..SHAPE },
        ] {
            assert!(with(shape).contains("address space"));
        }
        for shape in [
            LatentShape { num_layers: 0, dtype: DType::F16 },
            LatentShape { num_layers: 1, dtype: DType::I8 },
        ] {
            let problem = problem(PagedKvCache::on_host(&pool, &[shape]));
            assert!(
                problem.contains("num_layers: 0") || problem.contains("i8; expected f16 or"),
                "{problem}"
            );
        }
        // A refusal does not claim the pool; a cache does, while it lives.
        let cache = PagedKvCache::on_host(&pool, &[SHAPE]).unwrap();
        assert!(with(SHAPE).contains("has a cache already"));
        assert!(
            cache
                .layer(KvLayer::of_model(1, 0))
                .unwrap_err()
                .to_string()
                .contains("model: 1; the cache has 1")
        );
        assert!(cache.layer(3).unwrap_err().to_string().contains("layer: 3; the model has 3"));
        assert!(cache.latent(0).unwrap_err().to_string().contains("it keeps heads"));
        drop(cache);
        let mut cache =
            PagedKvCache::on_host(&pool, &[LatentShape { num_layers: 2, dtype: DType::F32 }]).unwrap();
        assert!(cache.layer(0).unwrap_err().to_string().contains("latent attention"));
        assert!(cache.layer_mut(0).is_err() && cache.latent_mut(1).is_ok());
        assert!(cache.latent_mut(2).unwrap_err().to_string().contains("layer: 2; the model has 2"));
        drop(cache);
        // Of several models, one has to be named.
        let mut cache = PagedKvCache::on_host(&pool, &[SHAPE, SHAPE]).unwrap();
        let error = cache.layer(1).unwrap_err().to_string();
        assert_eq!(error, "PagedKvCache: model: none is named; the cache has 2: KvLayer::of_model(model, 1)");
        assert!(cache.layer_mut(1).is_err() && cache.layer(KvLayer::of_model(1, 1)).is_ok());
        drop(cache);
        assert_eq!(
            PagedKvCache::on_host(&pool, &[SHAPE]).unwrap().bytes(),
            4 * KvShape::Heads(SHAPE).page_bytes(5).unwrap()
        );
    }
}
