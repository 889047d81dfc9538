//! Appending to a paged KV cache on the CPU.

use super::host::{FLOATS, HostCheck, Rows, RowsMut};
use crate::{
    error::Result,
    indices::{HostSlotMapping, PageIndices},
    kv::{KvLayout, PagedKvMut},
    page,
    tensor::{TensorMut, TensorRef},
};

/// Where the rows of a paged cache lie.
#[derive(Clone, Copy)]
pub(super) struct HostCacheShape {
    pub(super) heads: usize,
    page_size: usize,
    layout: KvLayout,
}

impl HostCacheShape {
    /// The sizes of a 4-dimensional cache, compared with a page table.
    pub(super) fn new(
        check: HostCheck,
        keys: &Rows<'_>,
        layout: KvLayout,
        table: &PageIndices,
    ) -> Result<Self> {
        let (page_size, heads) = layout.page_size_and_heads(keys.shape());
        check_pages(check, "kv.k", keys.shape()[0], page_size, table)?;
        Ok(Self { heads: heads as usize, page_size: page_size as usize, layout })
    }

    /// The row of one head of one token.
    pub(super) fn row(self, page: usize, slot: usize, head: usize) -> usize {
        match self.layout {
            KvLayout::Nhd => (page * self.page_size + slot) * self.heads + head,
            KvLayout::Hnd => (page * self.heads + head) * self.page_size + slot,
        }
    }
}

/// The cache has the page size and at least the pages that the table was
/// checked for.
pub(super) fn check_pages(
    check: HostCheck,
    argument: &'static str,
    pages: i64,
    page_size: i64,
    table: &PageIndices,
) -> Result<()> {
    if page_size as usize != table.page_size() {
        return check.fail(
            argument,
            format!("its pages hold {page_size} tokens, those of the page table {}", table.page_size()),
        );
    }
    if (pages as usize) < table.num_pages() {
        return check.fail(
            argument,
            format!("it has {pages} pages, but the page table was checked for {}", table.num_pages()),
        );
    }
    Ok(())
}

/// Page and slot of a request's token.
pub(super) fn place(table: &PageIndices, request: usize, position: usize) -> (usize, usize) {
    let page = table.pages(request)[position / table.page_size()];
    (page as usize, position % table.page_size())
}

/// Page and slot of each appended token, in order.
pub(super) fn places(slots: &HostSlotMapping<'_>) -> impl Iterator<Item = (usize, usize)> {
    let tokens = slots.append.batch_indices().iter().zip(slots.append.positions());
    tokens.map(|(&request, &position)| place(slots.pages, request as usize, position as usize))
}

/// [`page::append_paged_kv_cache`](crate::page::append_paged_kv_cache) on the
/// CPU: copies new keys and values to their places in a paged cache, bit by bit.
///
/// `key` and `value` are `[tokens, heads, head_dim]`, of the cache's dtype
/// (`f16`, `bf16`, `e4m3`, `e5m2`, `f32` or `f64`). Of two tokens for one place the later one stays.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit, or the arrays of `slots` are of different states of a batch.
/// Nothing was written.
pub fn append_paged_kv_cache(
    key: &TensorRef<'_>,
    value: &TensorRef<'_>,
    slots: &HostSlotMapping<'_>,
    cache: &mut PagedKvMut<'_>,
) -> Result<()> {
    let check = HostCheck { op: "reference::append_paged_kv_cache" };
    slots.check(check.op)?;
    check.as_kernel(|check| page::check_append(check, [&key.raw, &value.raw], slots, cache))?;
    let layout = cache.layout;
    let mut keys = check.rows_mut("kv.k", &mut cache.k, &FLOATS, &[4])?;
    let mut values = check.rows_mut("kv.v", &mut cache.v, &FLOATS, &[4])?;
    check_dtype(check, "kv.v", &values.rows, &keys.rows)?;
    check.shape("kv.v", &values.rows, keys.rows.shape())?;
    let shape = HostCacheShape::new(check, &keys.rows, layout, slots.pages)?;
    let key = check.rows("key", key, &FLOATS, &[3])?;
    let value = check.rows("value", value, &FLOATS, &[3])?;
    for (name, new) in [("key", &key), ("value", &value)] {
        check_dtype(check, name, new, &keys.rows)?;
        check.shape(name, new, &[slots.append.len() as i64, shape.heads as i64, keys.rows.width() as i64])?;
    }
    for (token, (page, slot)) in places(slots).enumerate() {
        for head in 0..shape.heads {
            let (to, from) = (shape.row(page, slot, head), token * shape.heads + head);
            keys.copy(to, &key, from);
            values.copy(to, &value, from);
        }
    }
    Ok(())
}

/// [`page::append_paged_mla_kv_cache`](crate::page::append_paged_mla_kv_cache)
/// on the CPU.
///
/// `ckv` and `kpe` are `[tokens, width]`, the caches `[pages, page_size,
/// width]`, each pair with a width of its own (the kernel's are 512 and 64),
/// all of one dtype.
///
/// # Errors
/// As [`append_paged_kv_cache`].
pub fn append_paged_mla_kv_cache(
    ckv: &TensorRef<'_>,
    kpe: &TensorRef<'_>,
    slots: &HostSlotMapping<'_>,
    caches: [&mut TensorMut<'_>; 2],
) -> Result<()> {
    let check = HostCheck { op: "reference::append_paged_mla_kv_cache" };
    slots.check(check.op)?;
    let [ckv_cache, kpe_cache] = caches;
    check.as_kernel(|check| {
        let caches = [&ckv_cache.raw, &kpe_cache.raw];
        page::check_append_mla(check, [&ckv.raw, &kpe.raw], slots, caches)
    })?;
    let ckv_cache = check.rows_mut("ckv_cache", ckv_cache, &FLOATS, &[3])?;
    let kpe_cache = check.rows_mut("kpe_cache", kpe_cache, &FLOATS, &[3])?;
    let ckv = check.rows("ckv", ckv, &FLOATS, &[2])?;
    let kpe = check.rows("kpe", kpe, &FLOATS, &[2])?;
    let shape = ckv_cache.rows.shape();
    let (pages, page_size) = (shape[0], shape[1]);
    check_pages(check, "ckv_cache", pages, page_size, slots.pages)?;
    check_dtype(check, "kpe_cache", &kpe_cache.rows, &ckv_cache.rows)?;
    check.shape("kpe_cache", &kpe_cache.rows, &[pages, page_size, kpe_cache.rows.width() as i64])?;
    for (name, new, cache) in [("ckv", &ckv, &ckv_cache), ("kpe", &kpe, &kpe_cache)] {
        check_dtype(check, name, new, &cache.rows)?;
        check.shape(name, new, &[slots.append.len() as i64, cache.rows.width() as i64])?;
    }
    for (mut cache, new) in [(ckv_cache, ckv), (kpe_cache, kpe)] {
        copy_tokens(&mut cache, &new, slots);
    }
    Ok(())
}

fn copy_tokens(cache: &mut RowsMut<'_>, new: &Rows<'_>, slots: &HostSlotMapping<'_>) {
    for (token, (page, slot)) in places(slots).enumerate() {
        cache.copy(page * slots.pages.page_size() + slot, new, token);
    }
}

pub(super) fn check_dtype(
    check: HostCheck,
    argument: &'static str,
    tensor: &Rows<'_>,
    like: &Rows<'_>,
) -> Result<()> {
    if tensor.dtype() == like.dtype() {
        return Ok(());
    }
    check.fail(argument, format!("its dtype is {}; expected {}", tensor.dtype(), like.dtype()))
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::{
        indices::{AppendIndices, SlotMapping},
        kv::PagedKv,
        reference::testing::{refused, view, view_mut},
    };

    /// Two requests in three pages of two tokens: pages 2, 0 with 3 tokens,
    /// page 1 with 1 token.
    fn table() -> PageIndices {
        PageIndices::from_requests(3, 2, [(&[2, 0][..], 3), (&[1][..], 1)]).unwrap()
    }

    #[test]
    fn tokens_land_in_their_pages() {
        let table = table();
        // The last two tokens of the first request, the only one of the second.
        let append = AppendIndices::last_tokens(&table, &[0, 2, 3]).unwrap();
        let (key, value) = ([1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [-1.0f32, -2.0, -3.0, -4.0, -5.0, -6.0]);
        let (mut k, mut v) = ([0.0f32; 12], [0.0f32; 12]);
        let mut cache =
            PagedKvMut::new(view_mut(&mut k, &[3, 2, 2, 1]), view_mut(&mut v, &[3, 2, 2, 1]), KvLayout::Nhd);
        let (key, value) = (view(&key, &[3, 2, 1]), view(&value, &[3, 2, 1]));
        append_paged_kv_cache(&key, &value, &SlotMapping::new(&append, &table), &mut cache).unwrap();
        // Page 0 slot 0: position 2. Page 1 slot 0: the second request.
        // Page 2 slot 1: position 1.
        assert_eq!(k, [3.0, 4.0, 0.0, 0.0, 5.0, 6.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0]);
        assert_eq!(v, k.map(|x| if x == 0.0 { 0.0 } else { -x }));

        let (mut k, mut v) = ([0.0f32; 12], [0.0f32; 12]);
        let mut cache =
            PagedKvMut::new(view_mut(&mut k, &[3, 2, 2, 1]), view_mut(&mut v, &[3, 2, 2, 1]), KvLayout::Hnd);
        append_paged_kv_cache(&key, &value, &SlotMapping::new(&append, &table), &mut cache).unwrap();
        // Each page is [head, slot] now.
        assert_eq!(k, [3.0, 0.0, 4.0, 0.0, 5.0, 0.0, 6.0, 0.0, 0.0, 1.0, 0.0, 2.0]);
    }

    #[test]
    fn mla_caches_may_be_parts_of_one_tensor() {
        let table = table();
        let append = AppendIndices::new(&table, vec![1, 0], vec![0, 2]).unwrap();
        let (ckv, kpe) = ([1.0f32, 2.0, 3.0, 4.0], [5.0f32, 6.0]);
        // Two slices with the strides of one tensor [3, 2, 3], cut behind each
        // other; here they are simply two tensors with gaps.
        let (mut a, mut b) = ([0.0f32; 18], [0.0f32; 18]);
        let mut ckv_cache = view_mut(&mut a, &[3, 2, 3]).narrow(2, 0, 2).unwrap();
        let mut kpe_cache = view_mut(&mut b, &[3, 2, 3]).narrow(2, 2, 1).unwrap();
        append_paged_mla_kv_cache(
            &view(&ckv, &[2, 2]),
            &view(&kpe, &[2, 1]),
            &SlotMapping::new(&append, &table),
            [&mut ckv_cache, &mut kpe_cache],
        )
        .unwrap();
        let mut expected = [0.0f32; 18];
        expected[6..8].copy_from_slice(&[1.0, 2.0]); // page 1, slot 0
        expected[0..2].copy_from_slice(&[3.0, 4.0]); // page 0, slot 0
        assert_eq!(a, expected);
        let mut expected = [0.0f32; 18];
        (expected[8], expected[2]) = (5.0, 6.0);
        assert_eq!(b, expected);
    }

    #[test]
    fn bits_are_kept() {
        let table = PageIndices::from_requests(1, 4, [(&[0][..], 4)]).unwrap();
        let append = AppendIndices::last_tokens(&table, &[0, 4]).unwrap();
        // A signalling NaN with a payload, −0, a subnormal, an infinity.
        let key = [0x7d01u16, 0x8000, 0x0001, 0xfc00].map(f16::from_bits);
        let (mut k, mut v) = ([f16::ONE; 4], [f16::ONE; 4]);
        let shape = [1, 4, 1, 1];
        let mut cache = PagedKvMut::new(view_mut(&mut k, &shape), view_mut(&mut v, &shape), KvLayout::Nhd);
        let new = view(&key, &[4, 1, 1]);
        append_paged_kv_cache(&new, &new, &SlotMapping::new(&append, &table), &mut cache).unwrap();
        assert_eq!(k.map(f16::to_bits), key.map(f16::to_bits));
        assert_eq!(v.map(f16::to_bits), key.map(f16::to_bits));
    }

    #[test]
    fn wrong_input_is_refused_and_nothing_written() {
        let table = table();
        let append = AppendIndices::last_tokens(&table, &[0, 2, 3]).unwrap();
        let (new, wide) = ([1.0f32; 6], [1.0f64; 6]);
        let (mut k, mut v) = ([7.0f32; 12], [7.0f32; 12]);
        let mut run = |key: &TensorRef<'_>,
                       value: &TensorRef<'_>,
                       append: &AppendIndices,
                       [k_shape, v_shape]: [&[usize]; 2],
                       table: &PageIndices| {
            let (k, v) = (view_mut(&mut k, k_shape), view_mut(&mut v, v_shape));
            append_paged_kv_cache(
                key,
                value,
                &SlotMapping::new(append, table),
                &mut PagedKvMut::new(k, v, KvLayout::Nhd),
            )
        };
        let good = view(&new, &[3, 2, 1]);
        let shape: [&[usize]; 2] = [&[3, 2, 2, 1]; 2];
        refused(run(&view(&new, &[2, 2, 1]), &good, &append, shape, &table), "key");
        refused(run(&good, &view(&wide, &[3, 2, 1]), &append, shape, &table), "value");
        refused(run(&good, &view(&new, &[3, 1, 2]), &append, shape, &table), "value");
        refused(run(&good, &good, &append, [&[2, 2, 2, 1]; 2], &table), "kv.k");
        refused(run(&good, &good, &append, [&[3, 1, 2, 1]; 2], &table), "kv.k");
        refused(run(&good, &good, &append, [&[3, 4, 1]; 2], &table), "kv.k");
        refused(run(&good, &good, &append, [&[3, 2, 2, 1], &[3, 2, 1, 2]], &table), "kv.v");
        let other = PageIndices::from_requests(3, 2, [(&[2, 0][..], 3), (&[1][..], 1)]).unwrap();
        refused(run(&good, &good, &append, shape, &other), "append");
        assert_eq!((k, v), ([7.0; 12], [7.0; 12]));

        let (ckv, mut a, mut b) = ([1.0f32; 6], [7.0f32; 12], [7.0f32; 6]);
        let ckv = view(&ckv, &[3, 2]);
        let mut a_view = view_mut(&mut a, &[3, 2, 2]);
        let mut b_view = view_mut(&mut b, &[3, 2, 1]);
        refused(
            append_paged_mla_kv_cache(
                &ckv,
                &ckv,
                &SlotMapping::new(&append, &table),
                [&mut a_view, &mut b_view],
            ),
            "kpe",
        );
        refused(
            append_paged_mla_kv_cache(
                &ckv,
                &ckv,
                &SlotMapping::new(&append, &table),
                [&mut b_view, &mut a_view],
            ),
            "ckv",
        );
        assert_eq!((a, b), ([7.0; 12], [7.0; 6]));
    }

    #[test]
    fn joined_storage_is_two_strided_caches() {
        let table = PageIndices::from_requests(2, 1, [(&[1, 0][..], 2)]).unwrap();
        let append = AppendIndices::last_tokens(&table, &[0, 2]).unwrap();
        let (key, value, mut kv) = ([1.0f32, 2.0], [3.0f32, 4.0], [0.0f32; 4]);
        let mut cache = PagedKvMut::joined(view_mut(&mut kv, &[2, 2, 1, 1, 1]), KvLayout::Nhd).unwrap();
        append_paged_kv_cache(
            &view(&key, &[2, 1, 1]),
            &view(&value, &[2, 1, 1]),
            &SlotMapping::new(&append, &table),
            &mut cache,
        )
        .unwrap();
        assert_eq!(kv, [2.0, 4.0, 1.0, 3.0]);
        assert!(PagedKv::joined(view(&kv, &[2, 1, 2, 1, 1]), KvLayout::Nhd).is_err());
    }
}
