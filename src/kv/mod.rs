//! The KV cache: pages, and the sequences that use them. The index arrays that tell kernels
//! where everything lies are in [`indices`](crate::indices).
//!
//! # Pages and sequences
//!
//! A [`PageAllocator`] is a pool of page numbers. A [`Sequence`] owns pages of
//! it, shares them with its forks, and gives them back when it is truncated or
//! dropped. A [`PrefixCache`] keeps pages of sequences that are gone, for others
//! that begin with the same tokens. A [`Batch`] holds the sequences of a step
//! and their index arrays. None of these needs a GPU: they count.
//!
//! The memory is a [`PagedKvCache`], on a device or on the host, of one model or
//! of several that share the pool. It makes the copies of pages on which
//! sequences no longer agree.
//!
//! ```
//! use flashinfer_rs::{
//!     DType, FlashInferError, TensorRef, reference,
//!     kv::{Batch, HeadsShape, PageAllocator, PagedKvCache, PrefixCache, Sequence, KvLayout},
//! };
//!
//! // 8 pages of 4 tokens, for a model of 2 layers, in host memory.
//! let pool = PageAllocator::new(8, 4)?;
//! let shape = HeadsShape {
//!     num_layers: 2, num_kv_heads: 1, head_dim: 2, dtype: DType::F32, layout: KvLayout::Nhd,
//! };
//! let mut cache = PagedKvCache::on_host(&pool, &[shape])?;
//! let mut prefixes = PrefixCache::new(&pool);
//!
//! // A step: room for the prompt's tokens, then their keys and values, layer by layer.
//! let prompt = [11, 12, 13, 14, 15, 16];
//! let mut batch = Batch::new(&pool);
//! batch.push(Sequence::new(&pool))?;
//! batch.append([prompt.len()])?;
//! let rows = [0.5f32; 6 * 2];
//! for layer in 0..2 {
//!     let rows = TensorRef::from_slice(&rows, &[6, 1, 2])?;
//!     let kv = &mut cache.layer_mut(layer)?;
//!     reference::append_paged_kv_cache(&rows, &rows, &batch.slots(), kv)?;
//! }
//! prefixes.insert(&prompt, &batch.sequences()[0])?;
//!
//! // A second answer to the same prompt shares its pages, until both append:
//! // then one of the two gets its own copy of the half full page.
//! batch.push(batch.sequences()[0].fork())?;
//! assert_eq!((pool.used_pages(), pool.pending_copies()), (2, 0));
//! batch.append([1, 1])?;
//! assert_eq!((pool.used_pages(), pool.pending_copies()), (3, 1));
//! assert_eq!(batch.pages().indptr(), [0, 2, 4]);
//! assert_eq!(batch.append_indices().positions(), [6, 6]);
//! cache.layer_mut(0)?; // copies first
//! assert_eq!(pool.pending_copies(), 0);
//!
//! // A draft is rejected, and both end. The full page of the prompt stays cached.
//! batch.truncate(1, 6)?;
//! drop(batch);
//! assert_eq!(pool.used_pages(), 1);
//! let mut next = prefixes.lookup(&[11, 12, 13, 14, 20]);
//! assert_eq!(next.len(), 4);
//!
//! // What does not fit is an error, and changes nothing.
//! assert!(matches!(next.append(100), Err(FlashInferError::OutOfPages { needed: 25, free: 7 })));
//! drop(next);
//! assert_eq!(prefixes.evict(10), 1);
//! assert_eq!(pool.free_pages(), 8);
//! # Ok::<(), FlashInferError>(())
//! ```
//!
//! On a device, [`BatchTables`] hold the arrays; see their
//! [`update`](BatchTables::update).
//!
//! ```no_run
//! # use flashinfer_rs::{kv::*, page::append_paged_kv_cache, Result, Stream, TensorRef};
//! # fn step(stream: &Stream, pool: &PageAllocator, shape: HeadsShape, k: TensorRef<'_>, v: TensorRef<'_>) -> Result<()> {
//! let mut cache = PagedKvCache::new(stream, pool, &[shape])?;
//! let mut batch = Batch::new(pool);
//! let capacity = BatchCapacity { requests: 64, pages: 64 * 256, tokens: 8192 };
//! let mut tables = BatchTables::new(stream, &batch, capacity)?;
//!
//! batch.push(Sequence::new(pool))?;
//! batch.append([100])?;
//! tables.update(&batch, &mut cache)?;
//! for layer in 0..shape.num_layers {
//!     // `k` and `v` are [100, num_kv_heads, head_dim].
//!     append_paged_kv_cache(stream, &k, &v, &tables.slots(), &mut cache.layer_mut(layer)?)?;
//!     // Plans of attention take `&tables`, runs `cache.layer(layer)?`.
//! }
//! # Ok(())
//! # }
//! ```

mod batch;
mod cache;
pub(crate) mod layout;
mod mirror;
mod pages;
mod prefix;
mod sequence;
mod shape;

pub use batch::{Batch, BatchCapacity, BatchTables};
pub use cache::{KvLayer, PagedKvCache};
pub use layout::{KvLayout, MlaCache, MlaCacheMut, PagedKv, PagedKvMut};
pub use mirror::{BatchMirror, BatchSnapshot, RequestSnapshot};
pub use pages::{PageAllocator, PageCopy};
pub use prefix::{PrefixCache, PrefixStats};
pub use sequence::Sequence;
pub use shape::{HeadsShape, KvShape, LatentShape};
#[cfg(feature = "candle")]
pub(crate) use {
    cache::check_copies,
    layout::{LATENT_WIDTH, MLA_DIMS},
    pages::StorageClaim,
};
