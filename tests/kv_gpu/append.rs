//! Appending to paged caches on the GPU, bit by bit against the CPU reference.

use crate::common::{
    Gpu, Mirrored, Number, Rng, assert_same_bits,
    cache::{Cache, CacheShape, LAYOUTS, random_table, table_among},
    refused,
};
use flashinfer_rs::{
    PageIndices, PageTable, Result, TensorMut, TensorRef,
    indices::{AppendIndices, AppendTable, SlotMapping},
    kv::{KvLayout, PagedKvMut},
    page, reference,
};
use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};

/// Appends, on both sides, and compares all of the cache.
#[track_caller]
fn check<T: Number>(
    gpu: &Gpu,
    [key, value]: [&Mirrored<T>; 2],
    append: &AppendIndices,
    cache: &mut Cache<T>,
    table: &PageIndices,
) {
    let mut want = cache.hosts();
    reference::append_paged_kv_cache(
        &key.view(),
        &value.view(),
        &SlotMapping::new(append, table),
        &mut cache.view_of(&mut want),
    )
    .unwrap();
    let device_append = AppendTable::new(&gpu.stream, append.clone()).unwrap();
    let device_table = PageTable::new(&gpu.stream, table.clone()).unwrap();
    page::append_paged_kv_cache(
        &gpu.stream,
        &key.device_view(),
        &value.device_view(),
        &SlotMapping::new(&device_append, &device_table),
        &mut cache.device_view_mut(),
    )
    .unwrap();
    for (tensor, want) in cache.tensors.iter().zip(&want) {
        assert_same_bits(&format!("{:?}", cache.shape), &tensor.download(), want);
    }
}

/// Requests with and without earlier tokens, that end before, at and after the
/// end of a page; one gets no new token, one is empty.
fn ragged(page_size: usize) -> (Vec<usize>, Vec<i32>) {
    let requests = [
        (1, 1),
        (page_size, page_size),
        (page_size + 1, 1),
        (2 * page_size, page_size + 1),
        (5, 0),
        (0, 0),
        (3 * page_size + 2, 2 * page_size),
    ];
    let mut append_indptr = vec![0];
    for (len, new) in requests {
        append_indptr.push(append_indptr[append_indptr.len() - 1] + new.min(len) as i32);
    }
    (requests.map(|(len, _)| len).to_vec(), append_indptr)
}

fn layouts_and_sizes<T: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for page_size in [1, 16, 64] {
        for (head_dim, heads) in [(64, 5), (128, 2), (256, 1), (512, 1)] {
            for (layout, joined) in LAYOUTS.into_iter().flat_map(|layout| [(layout, false), (layout, true)]) {
                let (lens, append_indptr) = ragged(page_size);
                let table = random_table(rng, page_size, &lens);
                let append = AppendIndices::last_tokens(&table, &append_indptr).unwrap();
                let shape =
                    CacheShape { pages: table.num_pages(), page_size, heads, head_dim, layout, joined };
                let new = [append.len(), heads, head_dim];
                let key = Mirrored::<T>::random(&gpu, rng, &new);
                let value = Mirrored::random(&gpu, rng, &new);
                check(&gpu, [&key, &value], &append, &mut Cache::poisoned(&gpu, shape), &table);
            }
        }
    }
}

crate::typed_tests! {
    f16_caches: layouts_and_sizes::<f16>();
    bf16_caches: layouts_and_sizes::<bf16>();
    e4m3_caches: layouts_and_sizes::<F8E4M3>();
    e5m2_caches: layouts_and_sizes::<F8E5M2>();
}

const SMALL: CacheShape =
    CacheShape { pages: 8, page_size: 4, heads: 2, head_dim: 64, layout: KvLayout::Nhd, joined: false };

/// Keys and values with strides of their own, as parts of a joined projection.
#[test]
fn strided_rows() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let (lens, append_indptr) = ragged(SMALL.page_size);
    let table = random_table(rng, SMALL.page_size, &lens);
    let append = AppendIndices::last_tokens(&table, &append_indptr).unwrap();
    let tokens = append.len();
    let key = Mirrored::<f16>::random(&gpu, rng, &[tokens, 7, 64]).narrowed(1, 3, 2);
    let value = Mirrored::random(&gpu, rng, &[2, tokens, 72]).narrowed(2, 8, 64).permuted(&[1, 0, 2]);
    for (layout, joined) in [(KvLayout::Nhd, true), (KvLayout::Hnd, false)] {
        let shape = CacheShape { pages: table.num_pages(), layout, joined, ..SMALL };
        check(&gpu, [&key, &value], &append, &mut Cache::poisoned(&gpu, shape), &table);
    }
}

/// Tokens of several requests in any order, not only each request's last.
#[test]
fn explicit_positions() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let lens = [9, 1, 30];
    let table = random_table(rng, 4, &lens);
    let all: Vec<(i32, i32)> =
        (0..3).flat_map(|request| (0..lens[request as usize] as i32).map(move |at| (request, at))).collect();
    let chosen: Vec<(i32, i32)> =
        rng.permutation(all.len())[..25].iter().map(|&at| all[at as usize]).collect();
    let (requests, positions) = chosen.into_iter().unzip();
    let append = AppendIndices::new(&table, requests, positions).unwrap();
    let key = Mirrored::<bf16>::random(&gpu, rng, &[25, 2, 64]);
    let value = Mirrored::random(&gpu, rng, &[25, 2, 64]);
    let shape = CacheShape { pages: table.num_pages(), ..SMALL };
    check(&gpu, [&key, &value], &append, &mut Cache::poisoned(&gpu, shape), &table);
}

#[test]
fn no_tokens() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let nothing = Mirrored::<f16>::random(&gpu, rng, &[1, 2, 64]).narrowed(0, 0, 0);
    for lens in [&[9, 1][..], &[]] {
        let table = random_table(rng, 4, lens);
        let append = AppendIndices::last_tokens(&table, &vec![0; lens.len() + 1]).unwrap();
        let mut cache = Cache::poisoned(&gpu, CacheShape { pages: table.num_pages(), ..SMALL });
        check(&gpu, [&nothing, &nothing], &append, &mut cache, &table);
        cache.assert_untouched();
    }
}

/// As many heads as a block has threads for; one more is refused.
#[test]
fn head_limits() {
    fn run<T: Number>(gpu: &Gpu, rng: &mut Rng, head_dim: usize, most: usize) {
        let table = random_table(rng, 4, &[6, 3]);
        let append = AppendIndices::last_tokens(&table, &[0, 2, 5]).unwrap();
        for heads in [most, most + 1] {
            let shape = CacheShape { pages: table.num_pages(), heads, head_dim, ..SMALL };
            let new = Mirrored::<T>::random(gpu, rng, &[5, heads, head_dim]);
            let mut cache = Cache::poisoned(gpu, shape);
            if heads == most {
                check(gpu, [&new, &new], &append, &mut cache, &table);
            } else {
                let device_append = AppendTable::new(&gpu.stream, append.clone()).unwrap();
                let device_table = PageTable::new(&gpu.stream, table.clone()).unwrap();
                let call = page::append_paged_kv_cache(
                    &gpu.stream,
                    &new.device_view(),
                    &new.device_view(),
                    &SlotMapping::new(&device_append, &device_table),
                    &mut cache.device_view_mut(),
                );
                refused(call, "kv.k");
                cache.assert_untouched();
            }
        }
    }
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    run::<f16>(&gpu, rng, 64, 128);
    run::<bf16>(&gpu, rng, 128, 64);
    run::<f16>(&gpu, rng, 256, 32);
    run::<f16>(&gpu, rng, 512, 32);
    run::<F8E4M3>(&gpu, rng, 64, 256);
    run::<F8E5M2>(&gpu, rng, 128, 128);
}

/// A batch that grows token by token, with tables that are updated in place
/// and never waited for.
#[test]
fn growing_batch() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let (batch, steps, page_size) = (3, 40, 4);
    let final_table = random_table(rng, page_size, &vec![steps; batch]);
    let shape = CacheShape { pages: final_table.num_pages(), ..SMALL };
    let mut cache = Cache::<f16>::poisoned(&gpu, shape);
    let mut want = cache.hosts();
    // Step n has n + 1 tokens in each request.
    let table_at = |step: usize| {
        let requests = (0..batch).map(|request| {
            let pages = (step + 1).div_ceil(page_size);
            (&final_table.pages(request)[..pages], step + 1)
        });
        PageIndices::from_requests(shape.pages, page_size, requests).unwrap()
    };
    let one_each: Vec<i32> = (0..=batch as i32).collect();
    let append_at = |table: &PageIndices| AppendIndices::last_tokens(table, &one_each).unwrap();
    let first = table_at(0);
    let mut append = AppendTable::with_capacity(&gpu.stream, append_at(&first), batch).unwrap();
    let mut table =
        PageTable::with_capacity(&gpu.stream, first, batch, batch * steps.div_ceil(page_size)).unwrap();
    let rows: Vec<_> = (0..steps).map(|_| Mirrored::<f16>::random(&gpu, rng, &[batch, 2, 64])).collect();
    {
        let mut cache = cache.device_view_mut();
        for (step, new) in rows.iter().enumerate() {
            let host = table_at(step);
            append.update(append_at(&host)).unwrap();
            table.update(host).unwrap();
            let new = new.device_view();
            page::append_paged_kv_cache(
                &gpu.stream,
                &new,
                &new,
                &SlotMapping::new(&append, &table),
                &mut cache,
            )
            .unwrap();
        }
    }
    for (step, new) in rows.iter().enumerate() {
        let host = table_at(step);
        reference::append_paged_kv_cache(
            &new.view(),
            &new.view(),
            &SlotMapping::new(&append_at(&host), &host),
            &mut cache.view_of(&mut want),
        )
        .unwrap();
    }
    for (tensor, want) in cache.tensors.iter().zip(&want) {
        assert_same_bits("grown cache", &tensor.download(), want);
    }
    let too_many = AppendIndices::last_tokens(&final_table, &[0, 2, 3, 4]).unwrap();
    refused(append.update(too_many), "capacity");
    let larger = random_table(rng, page_size, &vec![1; batch + 1]);
    refused(table.update(larger), "capacity");
}

/// Offsets in a cache of more than 2³² elements are 64-bit.
#[test]
fn cache_beyond_32_bits() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let (page_size, heads, head_dim) = (16, 8, 128);
    let page = 2 * page_size * heads * head_dim;
    let pages = (1usize << 32) / page + 2;
    // 4 GiB of e4m3 on the device alone, all zeros.
    let mut storage = gpu.cuda.alloc_zeros::<F8E4M3>(pages * page).unwrap();
    let last = pages as i32 - 1;
    let table = PageIndices::from_requests(pages, page_size, [(&[last, 0][..], 32)]).unwrap();
    let append = AppendIndices::last_tokens(&table, &[0, 32]).unwrap();
    let key = Mirrored::<F8E4M3>::random(&gpu, rng, &[32, heads, head_dim]);
    let value = Mirrored::random(&gpu, rng, &[32, heads, head_dim]);
    {
        use flashinfer_rs::gpu::TensorExtMut;
        let mut kv = storage.tensor_mut(&gpu.cuda, &[pages, 2, page_size, heads, head_dim]).unwrap();
        page::append_paged_kv_cache(
            &gpu.stream,
            &key.device_view(),
            &value.device_view(),
            &SlotMapping::new(
                &AppendTable::new(&gpu.stream, append).unwrap(),
                &PageTable::new(&gpu.stream, table).unwrap(),
            ),
            &mut PagedKvMut::joined(kv.view_mut(), KvLayout::Nhd).unwrap(),
        )
        .unwrap();
    }
    let download = |page_at: usize| {
        let got = gpu.cuda.clone_dtoh(&storage.slice(page_at * page..(page_at + 1) * page)).unwrap();
        gpu.synchronize();
        got
    };
    let half = page / 2;
    assert_same_bits("last page", &download(pages - 1), &[&key.host[..half], &value.host[..half]].concat());
    assert_same_bits("first page", &download(0), &[&key.host[half..], &value.host[half..]].concat());
    // Where 32-bit arithmetic would have put the last page.
    assert_same_bits("page 1", &download(1), &vec![F8E4M3::from_f64(0.0); page]);
}

/// The two caches of multi-head latent attention as parts of one tensor
/// `[pages, page_size, 576]`.
fn latent_parts(whole: TensorMut<'_>) -> [TensorMut<'_>; 2] {
    whole.split_at(2, 512).unwrap().into()
}

#[test]
fn latent_caches() {
    fn run<T: Number>(gpu: &Gpu, rng: &mut Rng, page_size: usize) {
        let (lens, append_indptr) = ragged(page_size);
        let table = random_table(rng, page_size, &lens);
        let append = AppendIndices::last_tokens(&table, &append_indptr).unwrap();
        let (pages, tokens) = (table.num_pages(), append.len());
        let device_append = AppendTable::new(&gpu.stream, append.clone()).unwrap();
        let device_table = PageTable::new(&gpu.stream, table.clone()).unwrap();
        let ckv = Mirrored::<T>::random(gpu, rng, &[tokens, 528]).narrowed(1, 16, 512);
        let kpe = Mirrored::<T>::random(gpu, rng, &[tokens, 64]);

        let mut caches = [512, 64].map(|width| Mirrored::<T>::poisoned(gpu, &[pages, page_size, width]));
        let mut want = caches.each_ref().map(|cache| cache.host.clone());
        {
            let [a, b] = &mut want;
            let (mut a, mut b) = (caches[0].view_of(a), caches[1].view_of(b));
            reference::append_paged_mla_kv_cache(
                &ckv.view(),
                &kpe.view(),
                &SlotMapping::new(&append, &table),
                [&mut a, &mut b],
            )
            .unwrap();
            let [a, b] = &mut caches;
            let (mut a, mut b) = (a.device_view_mut(), b.device_view_mut());
            page::append_paged_mla_kv_cache(
                &gpu.stream,
                &ckv.device_view(),
                &kpe.device_view(),
                &SlotMapping::new(&device_append, &device_table),
                [&mut a.reborrow(), &mut b.reborrow()],
            )
            .unwrap();
        }
        for (cache, want) in caches.iter().zip(&want) {
            assert_same_bits("latent cache", &cache.download(), want);
        }

        let mut whole = Mirrored::<T>::poisoned(gpu, &[pages, page_size, 576]);
        let mut want = whole.host.clone();
        {
            let [mut a, mut b] = latent_parts(whole.view_of(&mut want));
            reference::append_paged_mla_kv_cache(
                &ckv.view(),
                &kpe.view(),
                &SlotMapping::new(&append, &table),
                [&mut a, &mut b],
            )
            .unwrap();
            let mut shown = whole.device_view_mut();
            let [mut a, mut b] = latent_parts(shown.reborrow());
            page::append_paged_mla_kv_cache(
                &gpu.stream,
                &ckv.device_view(),
                &kpe.device_view(),
                &SlotMapping::new(&device_append, &device_table),
                [&mut a, &mut b],
            )
            .unwrap();
        }
        assert_same_bits("joined latent cache", &whole.download(), &want);
    }
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for page_size in [1, 16, 64] {
        run::<f16>(&gpu, rng, page_size);
        run::<bf16>(&gpu, rng, page_size);
        run::<F8E4M3>(&gpu, rng, page_size);
        run::<F8E5M2>(&gpu, rng, page_size);
    }
}

#[test]
fn wrong_input() {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
    let host_table = table_among(rng, SMALL.pages, SMALL.page_size, &[9, 3]);
    let host_append = AppendIndices::last_tokens(&host_table, &[0, 4, 5]).unwrap();
    let mut table = PageTable::new(&gpu.stream, host_table.clone()).unwrap();
    let append = AppendTable::new(&gpu.stream, host_append.clone()).unwrap();
    let new = Mirrored::<f16>::random(&gpu, rng, &[5, 2, 64]);
    let mut cache = Cache::<f16>::poisoned(&gpu, SMALL);
    {
        let new_guard = new.device_view();
        let good = new_guard;
        let mut shown = cache.device_view_mut();
        let mut run = |key: TensorRef<'_>, value: TensorRef<'_>| {
            page::append_paged_kv_cache(
                &gpu.stream,
                &key,
                &value,
                &SlotMapping::new(&append, &table),
                &mut shown,
            )
        };
        let brains = Mirrored::<bf16>::random(&gpu, rng, &[5, 2, 64]);
        let bytes = Mirrored::<F8E4M3>::random(&gpu, rng, &[5, 2, 64]);
        refused(run(brains.device_view(), good), "key");
        refused(run(good, bytes.device_view()), "value");
        refused(run(good.select(1, 0).unwrap(), good), "key");
        refused(run(good.narrow(0, 0, 4).unwrap(), good), "key");
        refused(run(good, good.narrow(1, 0, 1).unwrap()), "value");
        refused(run(good, good.narrow(2, 0, 56).unwrap()), "value");
        let odd = Mirrored::<f16>::random(&gpu, rng, &[5, 2, 72]).narrowed(2, 1, 64);
        refused(run(odd.device_view(), good), "key");
        let uneven = Mirrored::<f16>::random(&gpu, rng, &[5, 2, 66]).narrowed(2, 0, 64);
        refused(run(good, uneven.device_view()), "value");
        let columns = Mirrored::<f16>::random(&gpu, rng, &[5, 64, 2]).permuted(&[0, 2, 1]);
        refused(run(columns.device_view(), good), "key");
        refused(run(new.view(), good), "key"); // on the host
        refused(run(good, new.copied_to(&other).device_view()), "value");
    }
    other.synchronize();
    {
        // The tables, one by one, on another stream.
        let elsewhere = AppendTable::new(&other.stream, host_append.clone()).unwrap();
        let mut shown = cache.device_view_mut();
        let new = new.device_view();
        let call = page::append_paged_kv_cache(
            &gpu.stream,
            &new,
            &new,
            &SlotMapping::new(&elsewhere, &table),
            &mut shown,
        );
        refused(call, "append");
        let elsewhere = PageTable::new(&other.stream, host_table.clone()).unwrap();
        let call = page::append_paged_kv_cache(
            &gpu.stream,
            &new,
            &new,
            &SlotMapping::new(&append, &elsewhere),
            &mut shown,
        );
        refused(call, "table");
    }
    {
        let new = new.device_view();
        let call = page::append_paged_kv_cache(
            &gpu.stream,
            &new,
            &new,
            &SlotMapping::new(&append, &table),
            &mut cache.copied_to(&other).device_view_mut(),
        );
        refused(call, "kv.k");
    }
    other.synchronize();
    {
        // The table has moved on since the destinations were checked.
        table.update(table_among(rng, SMALL.pages, SMALL.page_size, &[10, 4])).unwrap();
        let new = new.device_view();
        let call = page::append_paged_kv_cache(
            &gpu.stream,
            &new,
            &new,
            &SlotMapping::new(&append, &table),
            &mut cache.device_view_mut(),
        );
        refused(call, "append");
    }
    cache.assert_untouched();
    // The refused calls left everything usable.
    check(&gpu, [&new, &new], &host_append, &mut cache, &host_table);
}

#[test]
fn wrong_caches() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let host_table = table_among(rng, SMALL.pages, SMALL.page_size, &[9, 3]);
    let append = AppendIndices::last_tokens(&host_table, &[0, 4, 5]).unwrap();
    let append = AppendTable::new(&gpu.stream, append).unwrap();
    let table = PageTable::new(&gpu.stream, host_table).unwrap();

    #[track_caller]
    fn refuse<K: Number, V: Number>(
        gpu: &Gpu,
        (append, table): (&AppendTable, &PageTable),
        new: &Mirrored<K>,
        (mut k, mut v): (Mirrored<K>, Mirrored<V>),
        layout: KvLayout,
        expected: &str,
    ) {
        let call: Result<()> = page::append_paged_kv_cache(
            &gpu.stream,
            &new.device_view(),
            &new.device_view(),
            &SlotMapping::new(append, table),
            &mut PagedKvMut::new(k.device_view_mut(), v.device_view_mut(), layout),
        );
        refused(call, expected);
        k.assert_untouched();
        v.assert_untouched();
    }

    let tables = (&append, &table);
    let new = Mirrored::<f16>::random(&gpu, rng, &[5, 2, 64]);
    let nhd = KvLayout::Nhd;
    macro_rules! half {
        ($($size:expr),*) => {
            Mirrored::<f16>::poisoned(&gpu, &[$($size),*])
        };
    }
    let singles = Mirrored::<f32>::random(&gpu, rng, &[5, 2, 64]);
    let single_caches = [0, 1].map(|_| Mirrored::<f32>::poisoned(&gpu, &[8, 4, 2, 64]));
    let [k, v] = single_caches;
    refuse(&gpu, tables, &singles, (k, v), nhd, "kv.k");
    let brains = Mirrored::<bf16>::poisoned(&gpu, &[8, 4, 2, 64]);
    refuse(&gpu, tables, &new, (half!(8, 4, 2, 64), brains), nhd, "kv.v");
    refuse(&gpu, tables, &new, (half!(8, 8, 64), half!(8, 8, 64)), nhd, "kv.k");
    refuse(&gpu, tables, &new, (half!(8, 4, 2, 64), half!(8, 4, 1, 64)), nhd, "kv.v");
    // Seven pages for a table of eight; pages of five tokens; the other layout.
    refuse(&gpu, tables, &new, (half!(7, 4, 2, 64), half!(7, 4, 2, 64)), nhd, "kv.k");
    refuse(&gpu, tables, &new, (half!(8, 5, 2, 64), half!(8, 5, 2, 64)), nhd, "kv.k");
    refuse(&gpu, tables, &new, (half!(8, 4, 2, 64), half!(8, 4, 2, 64)), KvLayout::Hnd, "kv.k");
    // Different strides; rows that are not adjacent, not aligned, misaligned.
    let spread = half!(8, 4, 3, 64).narrowed(2, 0, 2);
    refuse(&gpu, tables, &new, (half!(8, 4, 2, 64), spread), nhd, "kv.v");
    let columns = || half!(8, 4, 64, 2).permuted(&[0, 1, 3, 2]);
    refuse(&gpu, tables, &new, (columns(), columns()), nhd, "kv.k");
    let uneven = || half!(8, 4, 2, 66).narrowed(3, 0, 64);
    refuse(&gpu, tables, &new, (uneven(), uneven()), nhd, "kv.k");
    let odd = |start| half!(8, 4, 2, 72).narrowed(3, start, 64);
    refuse(&gpu, tables, &new, (odd(1), odd(1)), nhd, "kv.k");
    refuse(&gpu, tables, &new, (odd(0), odd(1)), nhd, "kv.v");
    // A head dimension without a kernel.
    let narrow = Mirrored::<f16>::random(&gpu, rng, &[5, 2, 96]);
    refuse(&gpu, tables, &narrow, (half!(8, 4, 2, 96), half!(8, 4, 2, 96)), nhd, "kv.k");
}

#[test]
fn wrong_latent_input() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let host_table = table_among(rng, 8, 4, &[9, 3]);
    let host_append = AppendIndices::last_tokens(&host_table, &[0, 4, 5]).unwrap();
    let append = AppendTable::new(&gpu.stream, host_append).unwrap();
    let table = PageTable::new(&gpu.stream, host_table.clone()).unwrap();
    let stale = PageTable::new(&gpu.stream, table_among(rng, 8, 4, &[9, 3])).unwrap();

    #[track_caller]
    fn refuse<T: Number, U: Number>(
        gpu: &Gpu,
        (append, table): (&AppendTable, &PageTable),
        [ckv, kpe]: [&Mirrored<T>; 2],
        (mut ckv_cache, mut kpe_cache): (Mirrored<T>, Mirrored<U>),
        expected: &str,
    ) {
        let call = page::append_paged_mla_kv_cache(
            &gpu.stream,
            &ckv.device_view(),
            &kpe.device_view(),
            &SlotMapping::new(append, table),
            [&mut ckv_cache.device_view_mut(), &mut kpe_cache.device_view_mut()],
        );
        refused(call, expected);
        ckv_cache.assert_untouched();
        kpe_cache.assert_untouched();
    }

    let tables = (&append, &table);
    let ckv = Mirrored::<f16>::random(&gpu, rng, &[5, 512]);
    let kpe = Mirrored::<f16>::random(&gpu, rng, &[5, 64]);
    let good = [&ckv, &kpe];
    macro_rules! half {
        ($($size:expr),*) => {
            Mirrored::<f16>::poisoned(&gpu, &[$($size),*])
        };
    }
    let caches = || (half!(8, 4, 512), half!(8, 4, 64));
    refuse(&gpu, (&append, &stale), good, caches(), "append");
    refuse(&gpu, tables, [&kpe, &ckv], caches(), "ckv");
    refuse(&gpu, tables, [&ckv, &ckv], caches(), "kpe");
    refuse(&gpu, tables, good, (half!(8, 4, 64), half!(8, 4, 64)), "ckv_cache");
    refuse(&gpu, tables, good, (half!(8, 4, 512), half!(8, 4, 512)), "kpe_cache");
    refuse(&gpu, tables, good, (half!(7, 4, 512), half!(7, 4, 64)), "ckv_cache");
    refuse(&gpu, tables, good, (half!(8, 5, 512), half!(8, 5, 64)), "ckv_cache");
    refuse(&gpu, tables, good, (half!(8, 4, 512), half!(7, 4, 64)), "kpe_cache");
    let brains = Mirrored::<bf16>::poisoned(&gpu, &[8, 4, 64]);
    refuse(&gpu, tables, good, (half!(8, 4, 512), brains), "kpe_cache");
    let odd = half!(8, 4, 520).narrowed(2, 1, 512);
    refuse(&gpu, tables, good, (odd, half!(8, 4, 64)), "ckv_cache");
    let short = Mirrored::<f16>::random(&gpu, rng, &[4, 512]);
    refuse(&gpu, tables, [&short, &kpe], caches(), "ckv");
}
