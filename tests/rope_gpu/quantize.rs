//! Rotary embeddings rounded to 8-bit floats, on the GPU against the CPU
//! reference.

use crate::common::{
    Gpu, Mirrored, Number, Rng, assert_same_bits,
    attention::capture,
    cache::{Cache, CacheShape, LAYOUTS, random_table},
    refused,
};
use flashinfer_rs::{
    PageIndices, PageTable, TensorMut, TensorRef,
    indices::{AppendIndices, AppendTable, BoundedIndices, BoundedTable, SlotMapping},
    kv::KvLayout,
    reference,
    rope::{
        self, CosSinCache, RopeAppend, RopeFrequencies, RopeParts, RopePartsMut, RopeQuantizeOptions,
        RopeScaling, Rotation,
    },
};
use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};

const MAX_POS: usize = 700;

/// A table on both sides.
pub(super) struct Angles {
    host: Vec<f32>,
    device: CosSinCache,
    interleave: bool,
}

impl Angles {
    pub(super) fn new(gpu: &Gpu, rotary_dim: usize, interleave: bool) -> Self {
        let frequencies = RopeFrequencies::new(rotary_dim, 1e4, &RopeScaling::None).unwrap();
        let device = CosSinCache::new(&gpu.stream, &frequencies, MAX_POS).unwrap();
        Self { host: frequencies.cos_sin_rows(MAX_POS), device, interleave }
    }

    pub(super) fn on_host<'a>(&'a self, pos_ids: &'a [i32]) -> Rotation<'a, &'a [i32]> {
        let shape = [MAX_POS, self.device.rotary_dim()];
        let cos_sin_cache = TensorRef::from_slice(&self.host, &shape).unwrap();
        Rotation { cos_sin_cache, pos_ids, interleave: self.interleave }
    }

    pub(super) fn on_device<'a>(&'a self, pos_ids: impl Into<rope::Positions<'a>>) -> Rotation<'a> {
        Rotation { interleave: self.interleave, ..Rotation::new(self.device.view().unwrap(), pos_ids) }
    }
}

/// Half a unit in the last place of an f32 between 4 and 8, twice.
const CANCELLED: f64 = 4.8e-7;

/// The numbers agree but for few, which are neighbours: the kernel computes in
/// f32 what the reference computes in f64, so rounding may differ at a tie. Where
/// terms of up to a few units cancel, their own rounding in f32 is left.
#[track_caller]
pub(super) fn assert_rounded_alike<T: Number>(what: &str, got: &[T], want: &[T]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let mut differ = 0;
    for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
        let equal = got.bits() == want.bits() || got.to_f64() == want.to_f64();
        let near = got.bits().abs_diff(want.bits()) <= 1 || (got.to_f64() - want.to_f64()).abs() <= CANCELLED;
        assert!(equal || near, "{what}: element {at} is {got:?}, not {want:?}");
        differ += usize::from(!equal);
    }
    assert!(differ <= 4 + got.len() / 200, "{what}: {differ} of {} differ", got.len());
}

fn parts(heads: TensorRef<'_>, rotary_dim: usize) -> RopeParts<'_> {
    RopeParts::of_heads(heads, rotary_dim).unwrap()
}

fn parts_mut(heads: TensorMut<'_>, rotary_dim: usize) -> RopePartsMut<'_> {
    RopePartsMut::of_heads(heads, rotary_dim).unwrap()
}

fn on_device(gpu: &Gpu, pos_ids: &[i32]) -> BoundedTable {
    BoundedTable::new(&gpu.stream, BoundedIndices::new(MAX_POS, pos_ids.to_vec()).unwrap()).unwrap()
}

/// Quantizes heads on the device.
#[track_caller]
fn run<T: Number, Q: Number>(
    gpu: &Gpu,
    [q, k]: [&Mirrored<T>; 2],
    [q_out, k_out]: [&mut Mirrored<Q>; 2],
    (angles, pos_ids): (&Angles, &BoundedTable),
    options: &RopeQuantizeOptions,
) {
    let rotary_dim = angles.device.rotary_dim();
    rope::rope_quantize(
        &gpu.stream,
        &mut [parts_mut(q_out.device_view_mut(), rotary_dim), parts_mut(k_out.device_view_mut(), rotary_dim)],
        &[parts(q.device_view(), rotary_dim), parts(k.device_view(), rotary_dim)],
        &angles.on_device(pos_ids),
        options,
    )
    .unwrap();
}

/// Quantizes heads on both sides and compares. Queries and keys are split at
/// `rotary_dim`, outputs are seen as the storage says.
#[track_caller]
fn check<T: Number, Q: Number>(
    gpu: &Gpu,
    what: &str,
    [q, k]: [&Mirrored<T>; 2],
    [q_out, k_out]: [&mut Mirrored<Q>; 2],
    (angles, pos_ids): (&Angles, &[i32]),
    options: &RopeQuantizeOptions,
) {
    let rotary_dim = angles.device.rotary_dim();
    let (mut want_q, mut want_k) = (q_out.host.clone(), k_out.host.clone());
    let (q_view, k_view) = (q_out.view_of(&mut want_q), k_out.view_of(&mut want_k));
    reference::rope_quantize(
        &mut [parts_mut(q_view, rotary_dim), parts_mut(k_view, rotary_dim)],
        &[parts(q.view(), rotary_dim), parts(k.view(), rotary_dim)],
        &angles.on_host(pos_ids),
        options,
    )
    .unwrap();
    run(gpu, [q, k], [q_out, k_out], (angles, &on_device(gpu, pos_ids)), options);
    assert_rounded_alike(&format!("{what}: q"), &q_out.download(), &want_q);
    assert_rounded_alike(&format!("{what}: k"), &k_out.download(), &want_k);
}

fn positions(rng: &mut Rng, tokens: usize) -> Vec<i32> {
    let mut pos_ids: Vec<i32> = (0..tokens).map(|_| rng.below(MAX_POS) as i32).collect();
    pos_ids[tokens / 2] = MAX_POS as i32 - 1;
    pos_ids
}

/// Tokens, heads of queries and keys, head dimension, what is turned of it.
const SIZES: [(usize, [usize; 2], usize, usize); 9] = [
    (1, [1, 1], 64, 64),
    (7, [8, 2], 128, 128),
    (33, [5, 1], 128, 64),
    (100, [2, 2], 128, 32),
    (9, [3, 1], 192, 128),
    (9, [3, 1], 96, 96),
    (5, [16, 1], 576, 64),
    (4, [2, 1], 1024, 1024),
    (300, [32, 8], 128, 128),
];

fn sizes<T: Number, Q: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for (tokens, [q_heads, k_heads], head_dim, rotary_dim) in SIZES {
        for interleave in [false, true] {
            let angles = Angles::new(&gpu, rotary_dim, interleave);
            let pos_ids = positions(rng, tokens);
            let q = Mirrored::<T>::random(&gpu, rng, &[tokens, q_heads, head_dim]);
            // Keys of one head may come without a dimension for it.
            let k_shape = [tokens, k_heads, head_dim];
            let k_shape = if k_heads == 1 { &[tokens, head_dim][..] } else { &k_shape };
            let k = Mirrored::<T>::random(&gpu, rng, k_shape);
            for options in [RopeQuantizeOptions::default(), RopeQuantizeOptions::with_scales(0.37, 55.0)] {
                let mut q_out = Mirrored::<Q>::poisoned(&gpu, &q.shape());
                let mut k_out = Mirrored::<Q>::poisoned(&gpu, &k.shape());
                let what = format!("{tokens} {q_heads} {k_heads} {rotary_dim} of {head_dim}, {interleave}");
                check(&gpu, &what, [&q, &k], [&mut q_out, &mut k_out], (&angles, &pos_ids), &options);
                q.assert_untouched();
                k.assert_untouched();
            }
        }
    }
}

crate::typed_tests! {
    f16_to_e4m3: sizes::<f16, F8E4M3>();
    bf16_to_e4m3: sizes::<bf16, F8E4M3>();
    f16_to_e5m2: sizes::<f16, F8E5M2>();
}

/// What does not fit becomes the largest number.
#[test]
fn beyond_the_largest_number() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let angles = Angles::new(&gpu, 64, false);
    let q = Mirrored::<f16>::random(&gpu, rng, &[5, 2, 80]);
    let k = Mirrored::<f16>::random(&gpu, rng, &[5, 1, 80]);
    let mut outs = [2, 1].map(|heads| Mirrored::<F8E4M3>::poisoned(&gpu, &[5, heads, 80]));
    let [q_out, k_out] = &mut outs;
    let options = RopeQuantizeOptions::with_scales(1e6, -1e6);
    check(&gpu, "large", [&q, &k], [q_out, k_out], (&angles, &[0, 1, 2, 3, 4]), &options);
    let large = outs[1].download().iter().filter(|number| number.to_f64().abs() == 448.0).count();
    assert!(large > 380, "{large} of 400");
}

/// Gaps, parts of one projection, and a last part that no vector fills.
#[test]
fn strided() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for (rotary_dim, interleave) in [(64, false), (48, true)] {
        let angles = Angles::new(&gpu, rotary_dim, interleave);
        let pos_ids = positions(rng, 13);
        let q = Mirrored::<bf16>::random(&gpu, rng, &[13, 9, 96]).narrowed(2, 0, 83).narrowed(1, 2, 4);
        let k = Mirrored::<bf16>::random(&gpu, rng, &[3, 13, 96]).narrowed(2, 8, 83).permuted(&[1, 0, 2]);
        let mut q_out =
            Mirrored::<F8E4M3>::poisoned(&gpu, &[13, 5, 112]).narrowed(2, 16, 83).narrowed(1, 0, 4);
        let mut k_out = Mirrored::poisoned(&gpu, &[13, 3, 96]).narrowed(2, 0, 83);
        let options = RopeQuantizeOptions::with_scales(2.0, 3.0);
        check(&gpu, "strided", [&q, &k], [&mut q_out, &mut k_out], (&angles, &pos_ids), &options);
    }
}

/// With and without programmatic dependent launch the bits are the same, also
/// where each launch overwrites what the one before wrote.
#[test]
fn pdl() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let angles = Angles::new(&gpu, 128, false);
    let pos_ids = positions(rng, 200);
    let q = Mirrored::<f16>::random(&gpu, rng, &[200, 8, 128]);
    let k = Mirrored::<f16>::random(&gpu, rng, &[200, 2, 128]);
    let table = on_device(&gpu, &pos_ids);
    let bits = |enable_pdl| {
        let mut outs = [8, 2].map(|heads| Mirrored::<F8E4M3>::poisoned(&gpu, &[200, heads, 128]));
        let [q_out, k_out] = &mut outs;
        let mut options = RopeQuantizeOptions::default();
        options.enable_pdl = enable_pdl;
        for _ in 0..10 {
            run(&gpu, [&q, &k], [q_out, k_out], (&angles, &table), &options);
        }
        check(&gpu, "pdl", [&q, &k], [q_out, k_out], (&angles, &pos_ids), &options);
        outs.map(|out| out.download())
    };
    if gpu.compute_capability().0 >= 9 {
        for (with, without) in bits(true).iter().zip(&bits(false)) {
            assert_same_bits("PDL", with, without);
        }
    }
}

/// Requests with and without earlier tokens, that end before, at and after the
/// end of a page; one gets no new token, one is empty.
fn ragged(page_size: usize) -> (Vec<usize>, Vec<i32>) {
    let lens = vec![1, page_size, page_size + 1, 2 * page_size, 5, 0, 3 * page_size + 2];
    let new = [1, page_size, 1, page_size + 1, 0, 0, 2 * page_size];
    let mut append_indptr = vec![0];
    for (&len, new) in lens.iter().zip(new) {
        append_indptr.push(append_indptr[append_indptr.len() - 1] + new.min(len) as i32);
    }
    (lens, append_indptr)
}

/// What is appended, on both sides.
pub(super) struct Tokens {
    pub(super) table: PageIndices,
    pub(super) append: AppendIndices,
    pub(super) device_table: PageTable,
    pub(super) device_append: AppendTable,
}

impl Tokens {
    pub(super) fn new(gpu: &Gpu, rng: &mut Rng, page_size: usize) -> Self {
        let (lens, append_indptr) = ragged(page_size);
        let table = random_table(rng, page_size, &lens);
        let append = AppendIndices::last_tokens(&table, &append_indptr).unwrap();
        let device_table = PageTable::new(&gpu.stream, table.clone()).unwrap();
        let device_append = AppendTable::new(&gpu.stream, append.clone()).unwrap();
        Self { table, append, device_table, device_append }
    }

    pub(super) fn len(&self) -> usize {
        self.append.len()
    }
}

/// Appends keys and values on both sides and compares queries and caches.
#[track_caller]
fn check_append<T: Number, Q: Number>(
    gpu: &Gpu,
    [q, k, v]: [&Mirrored<T>; 3],
    cache: &mut Cache<Q>,
    angles: &Angles,
    tokens: &Tokens,
    options: &RopeQuantizeOptions,
) {
    let rotary_dim = angles.device.rotary_dim();
    let what = format!("{:?}, {rotary_dim} turned, {}", cache.shape, angles.interleave);
    let mut q_out = Mirrored::<Q>::poisoned(gpu, &q.shape());
    let (mut want_q, mut want) = (q_out.host.clone(), cache.hosts());
    reference::rope_quantize_append_paged_kv_cache(
        &mut parts_mut(q_out.view_of(&mut want_q), rotary_dim),
        &mut RopeAppend::Kv { cache: cache.view_of(&mut want), value: v.view() },
        &[parts(q.view(), rotary_dim), parts(k.view(), rotary_dim)],
        &angles.on_host(tokens.append.positions()),
        &SlotMapping::new(&tokens.append, &tokens.table),
        options,
    )
    .unwrap();
    rope::rope_quantize_append_paged_kv_cache(
        &gpu.stream,
        &mut parts_mut(q_out.device_view_mut(), rotary_dim),
        &mut RopeAppend::Kv { cache: cache.device_view_mut(), value: v.device_view() },
        &[parts(q.device_view(), rotary_dim), parts(k.device_view(), rotary_dim)],
        &angles.on_device(&tokens.device_append),
        &SlotMapping::new(&tokens.device_append, &tokens.device_table),
        options,
    )
    .unwrap();
    assert_rounded_alike(&format!("{what}: q"), &q_out.download(), &want_q);
    for (tensor, want) in cache.tensors.iter().zip(&want) {
        assert_rounded_alike(&what, &tensor.download(), want);
    }
}

fn append<T: Number, Q: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for page_size in [1, 16] {
        let tokens = Tokens::new(&gpu, rng, page_size);
        for (q_heads, heads, head_dim, rotary_dim) in
            [(8, 2, 128, 128), (3, 3, 128, 64), (4, 1, 256, 64), (0, 2, 64, 64), (5, 1, 96, 96)]
        {
            for (layout, joined) in LAYOUTS.into_iter().flat_map(|layout| [(layout, false), (layout, true)]) {
                let angles = Angles::new(&gpu, rotary_dim, joined);
                let shape = CacheShape {
                    pages: tokens.table.num_pages(),
                    page_size,
                    heads,
                    head_dim,
                    layout,
                    joined,
                };
                let q = Mirrored::<T>::random(&gpu, rng, &[tokens.len(), q_heads, head_dim]);
                let k = Mirrored::random(&gpu, rng, &[tokens.len(), heads, head_dim]);
                let v =
                    Mirrored::random(&gpu, rng, &[tokens.len(), heads + 1, head_dim]).narrowed(1, 1, heads);
                let mut options = RopeQuantizeOptions::with_scales(3.0, 40.0);
                options.enable_pdl = layout == KvLayout::Hnd && gpu.compute_capability().0 >= 9;
                let mut cache = Cache::<Q>::poisoned(&gpu, shape);
                check_append(&gpu, [&q, &k, &v], &mut cache, &angles, &tokens, &options);
            }
        }
    }
}

crate::typed_tests! {
    append_f16_as_e4m3: append::<f16, F8E4M3>();
    append_bf16_as_e4m3: append::<bf16, F8E4M3>();
    append_bf16_as_e5m2: append::<bf16, F8E5M2>();
}

/// The caches of latent attention as parts of one tensor.
#[test]
fn append_latent() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for (page_size, interleave) in [(1, false), (16, true), (64, false)] {
        let tokens = Tokens::new(&gpu, rng, page_size);
        let angles = Angles::new(&gpu, 64, interleave);
        let q = Mirrored::<bf16>::random(&gpu, rng, &[tokens.len(), 16, 576]);
        let k = Mirrored::<bf16>::random(&gpu, rng, &[tokens.len(), 576]);
        let mut q_out = Mirrored::<F8E4M3>::poisoned(&gpu, &q.shape());
        let mut cache = Mirrored::<F8E4M3>::poisoned(&gpu, &[tokens.table.num_pages(), page_size, 576]);
        let (mut want_q, mut want) = (q_out.host.clone(), cache.host.clone());
        let options = RopeQuantizeOptions::with_scales(3.0, 40.0);
        fn latent(cache: TensorMut<'_>) -> RopeAppend<'_> {
            let (ckv_cache, kpe_cache) = cache.split_at(2, 512).unwrap();
            RopeAppend::Mla { ckv_cache, kpe_cache }
        }
        reference::rope_quantize_append_paged_kv_cache(
            &mut parts_mut(q_out.view_of(&mut want_q), 64),
            &mut latent(cache.view_of(&mut want)),
            &[parts(q.view(), 64), parts(k.view(), 64)],
            &angles.on_host(tokens.append.positions()),
            &SlotMapping::new(&tokens.append, &tokens.table),
            &options,
        )
        .unwrap();
        rope::rope_quantize_append_paged_kv_cache(
            &gpu.stream,
            &mut parts_mut(q_out.device_view_mut(), 64),
            &mut latent(cache.device_view_mut()),
            &[parts(q.device_view(), 64), parts(k.device_view(), 64)],
            &angles.on_device(&tokens.device_append),
            &SlotMapping::new(&tokens.device_append, &tokens.device_table),
            &options,
        )
        .unwrap();
        assert_rounded_alike("latent q", &q_out.download(), &want_q);
        assert_rounded_alike("latent cache", &cache.download(), &want);
    }
}

/// A graph sees tables that are updated between replays.
#[test]
fn graph_replay() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    let (page_size, pages) = (4, 40);
    let one_each = [0, 1, 2, 3];
    let step = |rng: &mut Rng| {
        let lens: Vec<usize> = (0..3).map(|_| 1 + rng.below(30)).collect();
        let table = crate::common::cache::table_among(rng, pages, page_size, &lens);
        let append = AppendIndices::last_tokens(&table, &one_each).unwrap();
        (table, append)
    };
    let (table, append) = step(rng);
    let mut device_table = PageTable::with_capacity(&gpu.stream, table, 3, pages).unwrap();
    let mut device_append = AppendTable::with_capacity(&gpu.stream, append, 3).unwrap();
    let angles = Angles::new(&gpu, 128, false);
    let q = Mirrored::<f16>::random(&gpu, rng, &[3, 4, 128]);
    let k = Mirrored::<f16>::random(&gpu, rng, &[3, 2, 128]);
    let shape =
        CacheShape { pages, page_size, heads: 2, head_dim: 128, layout: KvLayout::Nhd, joined: false };
    let options = RopeQuantizeOptions::with_scales(2.0, 20.0);
    let mut cache = Cache::<F8E4M3>::poisoned(&gpu, shape);
    let mut q_out = Mirrored::<F8E4M3>::poisoned(&gpu, &[3, 4, 128]);
    let graph = {
        let (q, k) = (q.device_view(), k.device_view());
        let mut q_out = q_out.device_view_mut();
        let rotation = angles.on_device(&device_append);
        let mut run = || {
            rope::rope_quantize_append_paged_kv_cache(
                &gpu.stream,
                &mut parts_mut(q_out.reborrow(), 128),
                &mut RopeAppend::Kv { cache: cache.device_view_mut(), value: k },
                &[parts(q, 128), parts(k, 128)],
                &rotation,
                &SlotMapping::new(&device_append, &device_table),
                &options,
            )
        };
        // The function is resolved before the capture.
        run().unwrap();
        let (graph, result) = capture(&gpu, &mut run);
        result.unwrap();
        graph.expect("a graph")
    };
    for _ in 0..3 {
        let (table, append) = step(rng);
        device_table.update(table.clone()).unwrap();
        device_append.update(append.clone()).unwrap();
        for tensor in cache.tensors.iter_mut().chain([&mut q_out]) {
            let poison = vec![F8E4M3::POISON; tensor.host.len()];
            tensor.upload(&poison);
        }
        graph.launch().unwrap();
        let (mut want_q, mut want) = (q_out.host.clone(), cache.hosts());
        reference::rope_quantize_append_paged_kv_cache(
            &mut parts_mut(q_out.view_of(&mut want_q), 128),
            &mut RopeAppend::Kv { cache: cache.view_of(&mut want), value: k.view() },
            &[parts(q.view(), 128), parts(k.view(), 128)],
            &angles.on_host(append.positions()),
            &SlotMapping::new(&append, &table),
            &options,
        )
        .unwrap();
        assert_rounded_alike("replayed q", &q_out.download(), &want_q);
        for (tensor, want) in cache.tensors.iter().zip(&want) {
            assert_rounded_alike("replayed cache", &tensor.download(), want);
        }
    }
}

/// What only a device can show: tables and caches that do not fit each other,
/// and calls with nothing to do. `tests/wrong_input.rs` has the rest.
#[test]
fn wrong_input() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let page_size = 4;
    let (tokens, others) = (Tokens::new(&gpu, rng, page_size), Tokens::new(&gpu, rng, page_size));
    let len = tokens.len();
    let angles = Angles::new(&gpu, 64, false);
    let shape = CacheShape {
        pages: tokens.table.num_pages(),
        page_size,
        heads: 2,
        head_dim: 128,
        layout: KvLayout::Nhd,
        joined: false,
    };
    let q = Mirrored::<f16>::random(&gpu, rng, &[len, 4, 128]);
    let k = Mirrored::<f16>::random(&gpu, rng, &[len, 2, 128]);
    let mut q_out = Mirrored::<F8E4M3>::poisoned(&gpu, &[len, 4, 128]);

    #[track_caller]
    fn refuse<Q: Number>(
        gpu: &Gpu,
        (q, k, v): (TensorRef<'_>, TensorRef<'_>, TensorRef<'_>),
        q_out: &mut Mirrored<F8E4M3>,
        (shape, angles): (CacheShape, &Angles),
        tables: (&AppendTable, &PageTable),
        expected: &str,
    ) {
        let rotary_dim = angles.device.rotary_dim();
        let mut cache = Cache::<Q>::poisoned(gpu, shape);
        let call = rope::rope_quantize_append_paged_kv_cache(
            &gpu.stream,
            &mut parts_mut(q_out.device_view_mut(), rotary_dim),
            &mut RopeAppend::Kv { cache: cache.device_view_mut(), value: v },
            &[parts(q, rotary_dim), parts(k, rotary_dim)],
            &angles.on_device(tables.0),
            &SlotMapping::new(tables.0, tables.1),
            &RopeQuantizeOptions::default(),
        );
        refused(call, expected);
        q_out.assert_untouched();
        cache.assert_untouched();
    }

    let (q_shown, k_shown) = (q.device_view(), k.device_view());
    let (q_view, k_view) = (q_shown, k_shown);
    let good = (q_view, k_view, k_view);
    let tables = (&tokens.device_append, &tokens.device_table);
    let with = (shape, &angles);
    let out = &mut q_out;
    refuse::<F8E4M3>(&gpu, good, out, with, (tables.0, &others.device_table), "append");
    refuse::<F8E4M3>(&gpu, good, out, with, (&others.device_append, tables.1), "append");
    refuse::<F8E5M2>(&gpu, good, out, with, tables, "kv.k");
    refuse::<f16>(&gpu, good, out, with, tables, "kv.k");
    let fewer = CacheShape { pages: shape.pages - 1, ..shape };
    refuse::<F8E4M3>(&gpu, good, out, (fewer, &angles), tables, "kv.k");
    let heads = CacheShape { heads: 3, ..shape };
    refuse::<F8E4M3>(&gpu, good, out, (heads, &angles), tables, "kv.k");
    let narrow = CacheShape { head_dim: 64, ..shape };
    refuse::<F8E4M3>(&gpu, good, out, (narrow, &angles), tables, "kv.k");
    let slots = CacheShape { page_size: 2, ..shape };
    refuse::<F8E4M3>(&gpu, good, out, (slots, &angles), tables, "kv.k");
    let few = k_view.narrow(0, 0, len - 1).unwrap();
    refuse::<F8E4M3>(&gpu, (q_view, few, k_view), out, with, tables, "k.rope");
    refuse::<F8E4M3>(&gpu, (q_view, k_view, few), out, with, tables, "value");
    refuse::<F8E4M3>(&gpu, (q_view, k_view, k_view.narrow(2, 0, 64).unwrap()), out, with, tables, "value");
    let half = q_view.narrow(1, 0, 2).unwrap();
    refuse::<F8E4M3>(&gpu, (half, k_view, k_view), out, with, tables, "q_out.rope");
    // 32 elements of 128 are not turned, which is no multiple of 96.
    let uneven = Angles::new(&gpu, 96, false);
    refuse::<F8E4M3>(&gpu, good, out, (shape, &uneven), tables, "q.nope");

    // No tokens are nothing to do.
    let nobody = AppendIndices::last_tokens(&tokens.table, &[0; 8]).unwrap();
    let nobody = AppendTable::new(&gpu.stream, nobody).unwrap();
    let none = [&q_view, &k_view].map(|view| view.narrow(0, 0, 0).unwrap());
    let mut cache = Cache::<F8E4M3>::poisoned(&gpu, shape);
    let mut empty = Mirrored::<F8E4M3>::poisoned(&gpu, &[0, 4, 128]);
    rope::rope_quantize_append_paged_kv_cache(
        &gpu.stream,
        &mut parts_mut(empty.device_view_mut(), 64),
        &mut RopeAppend::Kv { cache: cache.device_view_mut(), value: none[1] },
        &[parts(none[0], 64), parts(none[1], 64)],
        &angles.on_device(&nobody),
        &SlotMapping::new(&nobody, &tokens.device_table),
        &RopeQuantizeOptions::default(),
    )
    .unwrap();
    cache.assert_untouched();
}
