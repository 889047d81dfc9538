//! The KV cache's memory on the GPU, byte by byte against the same steps on the
//! host.
#![cfg(feature = "cudarc")]

mod common;
mod kv_gpu {
    mod append;
    mod fp8;
    mod rows;
}

use common::{
    Gpu, Mirrored, Number, Rng, assert_same_bits, at_hand, attention::capture, cache::LAYOUTS, refused,
};
use cudarc::driver::result::memcpy_dtoh_sync;
use flashinfer_rs::{
    DType, FlashInferError, TensorMut, TensorRef,
    attention::{
        AttentionSpec, Backend, BatchDecode, BatchMla, Heads, MlaQuery, MlaSpec, PlanOptions, RunOptions,
        Workspace,
    },
    kv::{
        Batch, BatchCapacity, BatchTables, HeadsShape, KvLayer, KvLayout, KvShape, LatentShape,
        PageAllocator, PagedKvCache, Sequence,
    },
    page, reference,
};
use float8::F8E4M3;
use half::{bf16, f16};

const CAPACITY: BatchCapacity = BatchCapacity { requests: 8, pages: 400, tokens: 512 };

/// One pool's cache and the batch of each model.
struct Side {
    pool: PageAllocator,
    cache: PagedKvCache,
    batches: Vec<Batch>,
}

impl Side {
    fn new(
        pages: usize,
        page_size: usize,
        shapes: &[KvShape],
        stream: Option<&flashinfer_rs::Stream>,
    ) -> Self {
        let pool = PageAllocator::new(pages, page_size).unwrap();
        let cache = match stream {
            Some(stream) => PagedKvCache::new(stream, &pool, shapes).unwrap(),
            None => PagedKvCache::on_host(&pool, shapes).unwrap(),
        };
        Self { batches: shapes.iter().map(|_| Batch::new(&pool)).collect(), pool, cache }
    }
}

/// The same steps on the host and on the device. Pools give away pages in the
/// same order, so that all memory must be the same.
struct Pair<'g> {
    gpu: &'g Gpu,
    host: Side,
    device: Side,
    /// Of each model.
    tables: Vec<BatchTables>,
}

impl<'g> Pair<'g> {
    fn new(gpu: &'g Gpu, pages: usize, page_size: usize, shapes: &[impl Into<KvShape> + Copy]) -> Self {
        let shapes: &Vec<_> = &shapes.iter().map(|&shape| shape.into()).collect();
        let device = Side::new(pages, page_size, shapes, Some(&gpu.stream));
        let tables =
            device.batches.iter().map(|batch| BatchTables::new(&gpu.stream, batch, CAPACITY).unwrap());
        Self { gpu, host: Side::new(pages, page_size, shapes, None), tables: tables.collect(), device }
    }

    /// Changes a model's batch on both sides.
    fn change(&mut self, model: usize, change: impl Fn(&PageAllocator, &mut Batch)) {
        for side in [&mut self.host, &mut self.device] {
            change(&side.pool, &mut side.batches[model]);
        }
    }

    fn push(&mut self, model: usize) {
        self.change(model, |pool, batch| batch.push(Sequence::new(pool)).unwrap());
    }

    fn fork(&mut self, model: usize, request: usize) {
        self.change(model, |_, batch| batch.push(batch.sequences()[request].fork()).unwrap());
    }

    /// New tokens, whose keys and values are written in all layers. `false` if
    /// there are too few pages.
    fn append<T: Number>(&mut self, rng: &mut Rng, model: usize, new_tokens: &[usize]) -> bool {
        let append = |side: &mut Side| match side.batches[model].append(new_tokens.iter().copied()) {
            Ok(()) => true,
            Err(FlashInferError::OutOfPages { .. }) => false,
            Err(error) => panic!("{error}"),
        };
        let fits = append(&mut self.host);
        assert_eq!(append(&mut self.device), fits);
        let (host, device) = (&self.host.batches[model], &self.device.batches[model]);
        assert_eq!(host.pages().indices(), device.pages().indices());
        assert_eq!(self.host.pool.pending_copies(), self.device.pool.pending_copies());
        if fits {
            self.tables[model].update(device, &mut self.device.cache).unwrap();
            assert_eq!(self.device.pool.pending_copies(), 0);
            for layer in 0..self.host.cache.shapes()[model].num_layers() {
                let rows = self.rows::<T>(rng, model);
                self.write_host(model, layer, &rows);
                self.write_device(model, layer, &rows);
            }
        }
        fits
    }

    /// Keys and values of a layer's new tokens, or the two parts of their rows.
    fn rows<T: Number>(&self, rng: &mut Rng, model: usize) -> [Mirrored<T>; 2] {
        let tokens = self.host.batches[model].queries().total();
        match self.host.cache.shapes()[model] {
            KvShape::Heads(shape) => {
                let size = [tokens, shape.num_kv_heads, shape.head_dim];
                [(); 2].map(|()| Mirrored::random(self.gpu, rng, &size))
            }
            KvShape::Latent(_) => [512, 64].map(|width| Mirrored::random(self.gpu, rng, &[tokens, width])),
        }
    }

    fn write_host<T: Number>(&mut self, model: usize, layer: usize, [k, v]: &[Mirrored<T>; 2]) {
        let Side { cache, batches, .. } = &mut self.host;
        if let KvShape::Latent(_) = cache.shapes()[model] {
            let (batch, rows) =
                (&batches[model], &mut cache.latent_mut(KvLayer::of_model(model, layer)).unwrap());
            let parts = [&mut rows.ckv, &mut rows.kpe];
            reference::append_paged_mla_kv_cache(&k.view(), &v.view(), &batch.slots(), parts).unwrap();
            return;
        }
        let (batch, kv) = (&batches[model], &mut cache.layer_mut(KvLayer::of_model(model, layer)).unwrap());
        reference::append_paged_kv_cache(&k.view(), &v.view(), &batch.slots(), kv).unwrap();
    }

    fn write_device<T: Number>(&mut self, model: usize, layer: usize, [k, v]: &[Mirrored<T>; 2]) {
        let (stream, tables, cache) = (&self.gpu.stream, &self.tables[model], &mut self.device.cache);
        if let KvShape::Latent(_) = cache.shapes()[model] {
            let (k, v, rows) = (
                k.device_view(),
                v.device_view(),
                &mut cache.latent_mut(KvLayer::of_model(model, layer)).unwrap(),
            );
            let parts = [&mut rows.ckv, &mut rows.kpe];
            page::append_paged_mla_kv_cache(stream, &k, &v, &tables.slots(), parts).unwrap();
            return;
        }
        page::append_paged_kv_cache(
            stream,
            &k.device_view(),
            &v.device_view(),
            &tables.slots(),
            &mut cache.layer_mut(KvLayer::of_model(model, layer)).unwrap(),
        )
        .unwrap();
    }

    /// The tensors of a layer: keys and values, or the rows, in two parts.
    fn layer(side: &Side, model: usize, layer: usize) -> [flashinfer_rs::TensorRef<'_>; 2] {
        match side.cache.shapes()[model] {
            KvShape::Heads(_) => {
                let kv = side.cache.layer(KvLayer::of_model(model, layer)).unwrap();
                [kv.k, kv.v]
            }
            KvShape::Latent(_) => {
                let rows = side.cache.latent(KvLayer::of_model(model, layer)).unwrap();
                [rows.ckv, rows.kpe]
            }
        }
    }

    /// All of the memory that a model's layers span.
    #[track_caller]
    fn assert_same<T: Number>(&self, model: usize) {
        for layer in 0..self.host.cache.shapes()[model].num_layers() {
            let (host, device) =
                (Self::layer(&self.host, model, layer), Self::layer(&self.device, model, layer));
            for (host, device) in host.into_iter().zip(device) {
                assert_eq!((host.shape(), host.strides()), (device.shape(), device.strides()));
                let reach = host.shape().iter().zip(host.strides()).map(|(size, stride)| (size - 1) * stride);
                let len = reach.sum::<i64>() as usize + 1;
                self.gpu.synchronize();
                let mut got = vec![T::POISON; len];
                // SAFETY: all the view's pages lie in the cache's memory, the
                // last of them at its end; nothing is being written.
                unsafe { memcpy_dtoh_sync(&mut got, device.data_ptr() as u64) }.unwrap();
                // SAFETY: the same, of host memory that is aligned to 16 bytes.
                let want = unsafe { std::slice::from_raw_parts(host.data_ptr().cast::<T>(), len) };
                assert_same_bits(&format!("model {model}, layer {layer}"), &got, want);
            }
        }
    }
}

/// Forks, appends, truncations and ends in random order, as an engine has them.
fn random_steps<T: Number>(pair: &mut Pair<'_>, rng: &mut Rng, model: usize, steps: usize) {
    let page_size = pair.host.pool.page_size();
    for _ in 0..steps {
        let len = pair.host.batches[model].len();
        if len == 0 {
            pair.push(model);
            continue;
        }
        let request = rng.below(len);
        match rng.below(8) {
            0 if len < CAPACITY.requests => pair.push(model),
            1 | 2 if len < CAPACITY.requests => pair.fork(model, request),
            3 => {
                let keep = rng.below(pair.host.batches[model].sequences()[request].len() + 1);
                pair.change(model, |_, batch| batch.truncate(request, keep).unwrap());
            }
            4 if len > 3 => pair.change(model, |_, batch| drop(batch.remove(request).unwrap())),
            _ => {
                let most = if rng.below(2) == 0 { 2 } else { 2 * page_size };
                let new_tokens: Vec<usize> = (0..len).map(|_| rng.below(most)).collect();
                if !pair.append::<T>(rng, model, &new_tokens) {
                    pair.change(model, |_, batch| drop(batch.remove(request).unwrap()));
                }
            }
        }
    }
}

fn one_model<T: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for (layout, page_size) in LAYOUTS.into_iter().flat_map(|layout| [(layout, 4), (layout, 16)]) {
        let shape = HeadsShape { num_layers: 3, num_kv_heads: 2, head_dim: 64, dtype: T::DTYPE, layout };
        let mut pair = Pair::new(&gpu, 40, page_size, &[shape]);
        // A fork and its parent, both of which go on in a page that is half full.
        pair.push(0);
        assert!(pair.append::<T>(rng, 0, &[page_size + 2]));
        pair.fork(0, 0);
        let shared = pair.device.batches[0].sequences()[1].pages().to_vec();
        assert!(pair.append::<T>(rng, 0, &[1, 1]));
        let own = [0, 1].map(|request| pair.device.batches[0].sequences()[request].pages().to_vec());
        assert_eq!((own[0][0], own[1][0]), (shared[0], shared[0]));
        assert_ne!(own[0][1], own[1][1]);
        pair.assert_same::<T>(0);
        random_steps::<T>(&mut pair, rng, 0, 60);
        pair.assert_same::<T>(0);
    }
}

typed_tests! {
    f16_pages: one_model::<f16>();
    bf16_pages: one_model::<bf16>();
    e4m3_pages: one_model::<F8E4M3>();
}

/// Rows of latent attention: forks, copies and ends, beside a model of heads, too.
#[test]
fn latent_pages() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let latent = KvShape::Latent(LatentShape { num_layers: 3, dtype: DType::BF16 });
    let heads =
        HeadsShape { num_layers: 2, num_kv_heads: 3, head_dim: 64, dtype: DType::F16, layout: KvLayout::Hnd };
    for shapes in [&[latent][..], &[latent, heads.into()]] {
        let mut pair = Pair::new(&gpu, 40, 8, shapes);
        pair.push(0);
        assert!(pair.append::<bf16>(rng, 0, &[10]));
        pair.fork(0, 0);
        assert!(pair.append::<bf16>(rng, 0, &[1, 1]));
        pair.assert_same::<bf16>(0);
        for _ in 0..8 {
            random_steps::<bf16>(&mut pair, rng, 0, 8);
            if shapes.len() > 1 {
                random_steps::<f16>(&mut pair, rng, 1, 8);
            }
        }
        pair.assert_same::<bf16>(0);
        // Attention reads the rows where they lie.
        pair.change(0, |_, batch| {
            while !batch.is_empty() {
                drop(batch.remove(0).unwrap());
            }
        });
        pair.push(0);
        pair.push(0);
        assert!(pair.append::<bf16>(rng, 0, &[20, 3]));
        pair.fork(0, 0);
        assert!(pair.append::<bf16>(rng, 0, &[1, 1, 1]));
        let spec = MlaSpec::new(DType::BF16, 1.0 / 24.0);
        let Some(mla) = at_hand(&gpu, BatchMla::new(&gpu.stream, &spec, 16)) else { return };
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let (tables, batch) = (&pair.tables[0], &pair.host.batches[0]);
        let queries = tables.queries.host();
        let plan = mla.plan(&mut workspace, tables, &PlanOptions::default()).unwrap();
        let q = [512, 64].map(|width| Mirrored::<bf16>::random(&gpu, rng, &[3, 16, width]));
        let mut out = flashinfer_rs::gpu::Tensor::<bf16>::zeros(&gpu.stream, &[3, 16, 512]).unwrap();
        for layer in (0..3).map(|layer| KvLayer::of_model(0, layer)) {
            let (nope, pe) = (q[0].device_view(), q[1].device_view());
            let query = MlaQuery::new(nope, pe);
            plan.run(&query, &pair.device.cache.latent(layer).unwrap(), &mut out.view_mut()).unwrap();
            let mut want = vec![0f64; 3 * 16 * 512];
            let query = MlaQuery::new(q[0].view(), q[1].view());
            let rows = &pair.host.cache.latent(layer).unwrap();
            let want_view = &mut flashinfer_rs::TensorMut::from_slice(&mut want, &[3, 16, 512]).unwrap();
            reference::batch_mla(
                &spec,
                &query,
                rows,
                queries,
                batch.pages(),
                want_view,
                None,
                reference::HostMask::None,
            )
            .unwrap();
            let got = out.to_vec().unwrap();
            let far =
                got.iter().zip(&want).map(|(got, want)| (got.to_f64() - want).abs()).fold(0.0, f64::max);
            assert!(far < 2e-2, "{layer:?}: {far}");
        }
    }
}

/// Models of other shapes and dtypes take the pages that each other gave back.
#[test]
fn two_models_share_a_pool() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let large = HeadsShape {
        num_layers: 3,
        num_kv_heads: 4,
        head_dim: 128,
        dtype: DType::BF16,
        layout: KvLayout::Nhd,
    };
    let small = HeadsShape {
        num_layers: 2,
        num_kv_heads: 3,
        head_dim: 64,
        dtype: DType::E4M3,
        layout: KvLayout::Hnd,
    };
    let mut pair = Pair::new(&gpu, 24, 8, &[large, small]);
    for _ in 0..12 {
        random_steps::<bf16>(&mut pair, rng, 0, 8);
        random_steps::<F8E4M3>(&mut pair, rng, 1, 8);
    }
    pair.assert_same::<bf16>(0);
    pair.assert_same::<F8E4M3>(1);
}

/// Keys and values of a page lie further apart than CUDA copies in one call,
/// which is 2³¹ bytes.
#[test]
fn parts_of_a_page_that_are_far_apart() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let (heads, head_dim, page_size) = (8, 128, 64);
    let shape =
        HeadsShape { num_layers: 1, num_kv_heads: heads, head_dim, dtype: DType::F16, layout: KvLayout::Nhd };
    let row = heads * head_dim;
    let pool = PageAllocator::new((1usize << 31) / (2 * page_size * row) + 1, page_size).unwrap();
    let mut cache = PagedKvCache::new(&gpu.stream, &pool, &[shape]).unwrap();
    let mut batch = Batch::new(&pool);
    batch.push(Sequence::new(&pool)).unwrap();
    batch.append([5]).unwrap();
    let mut tables = BatchTables::new(&gpu.stream, &batch, CAPACITY).unwrap();
    tables.update(&batch, &mut cache).unwrap();
    let new = [(); 2].map(|()| Mirrored::<f16>::random(&gpu, rng, &[5, heads, head_dim]));
    {
        let (k, v) = (new[0].device_view(), new[1].device_view());
        let mut kv = cache.layer_mut(0).unwrap();
        page::append_paged_kv_cache(&gpu.stream, &k, &v, &tables.slots(), &mut kv).unwrap();
    }
    batch.push(batch.sequences()[0].fork()).unwrap();
    batch.append([1, 1]).unwrap();
    assert_eq!(pool.pending_copies(), 1);
    cache.copy_pages().unwrap();
    gpu.synchronize();
    let layer = cache.layer(0).unwrap();
    assert!(layer.v.data_ptr() as usize - layer.k.data_ptr() as usize > i32::MAX as usize);
    for sequence in batch.sequences() {
        let first = sequence.pages()[0] as usize * page_size * row;
        for (part, new) in [layer.k, layer.v].iter().zip(&new) {
            let mut got = vec![f16::NAN; 5 * row];
            // SAFETY: a page of the pool lies in the cache's memory; nothing is being written.
            unsafe { memcpy_dtoh_sync(&mut got, part.data_ptr() as u64 + 2 * first as u64) }.unwrap();
            assert_same_bits("a copied page", &got, &new.host);
        }
    }
}

/// Kernels of attention read layers of both kinds of memory: contiguous ones,
/// and those of pages that hold all layers.
#[test]
fn attention_over_layers() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let heads = Heads::new(8, 4);
    let backends = [Backend::CudaCores, Backend::Fa2, Backend::Fa3, Backend::Auto];
    for (layout, differ) in LAYOUTS.into_iter().flat_map(|layout| [(layout, false), (layout, true)]) {
        let shape = HeadsShape { num_layers: 2, num_kv_heads: 4, head_dim: 128, dtype: DType::F16, layout };
        let other = HeadsShape { num_kv_heads: if differ { 1 } else { 4 }, ..shape };
        let mut pair = Pair::new(&gpu, 40, 16, &[shape, other]);
        for _ in 0..3 {
            pair.push(0);
        }
        assert!(pair.append::<f16>(rng, 0, &[50, 1, 33]));
        pair.fork(0, 2);
        assert!(pair.append::<f16>(rng, 0, &[1, 1, 1, 1]));
        pair.change(0, |_, batch| batch.truncate(0, 40).unwrap());
        assert!(pair.append::<f16>(rng, 0, &[1, 1, 1, 1]));
        let (table, size) = (&pair.tables[0].pages, [4, heads.num_qo_heads, 128]);
        let options = RunOptions::default();
        let q = Mirrored::<f16>::random(&gpu, rng, &size);
        for backend in backends {
            let spec = AttentionSpec::new(DType::F16, 128).with_backend(backend);
            let decode = BatchDecode::new(&gpu.stream, &spec, heads);
            let Some(decode) = at_hand(&gpu, decode) else { continue };
            let mut workspace = Workspace::new(&gpu.stream).unwrap();
            let plan = decode.plan(&mut workspace, table, &PlanOptions::default()).unwrap();
            for layer in (0..shape.num_layers).map(|layer| KvLayer::of_model(0, layer)) {
                let mut want = vec![f64::NAN; q.host.len()];
                let host = &pair.host;
                reference::batch_decode(
                    &spec,
                    &q.view(),
                    &host.cache.layer(layer).unwrap(),
                    host.batches[0].pages(),
                    &mut TensorMut::from_slice(&mut want, &size).unwrap(),
                    None,
                    &options,
                )
                .unwrap();
                let mut out = Mirrored::<f16>::poisoned(&gpu, &size);
                plan.run_with(
                    &q.device_view(),
                    &pair.device.cache.layer(layer).unwrap(),
                    &mut out.device_view_mut(),
                    None,
                    &options,
                )
                .unwrap();
                out.assert_close(&format!("{backend:?}, {layout:?}"), &want, f16::BOUND);
            }
        }
    }
}

/// One graph for steps with and without copies, of sequences that come and go.
#[test]
fn graph_replay() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    let shape =
        HeadsShape { num_layers: 2, num_kv_heads: 2, head_dim: 64, dtype: DType::F16, layout: KvLayout::Nhd };
    let mut pair = Pair::new(&gpu, 30, 4, &[shape]);
    pair.push(0);
    assert!(pair.append::<f16>(rng, 0, &[6]));
    pair.fork(0, 0);
    // Copies that are due are not captured, and stay due.
    pair.change(0, |_, batch| batch.append([1, 1]).unwrap());
    let (_graph, during) = capture(&gpu, || pair.device.cache.layer_mut(0).map(drop));
    refused(during, "stream");
    let batch = &pair.device.batches[0];
    let (_graph, during) = capture(&gpu, || pair.tables[0].update(batch, &mut pair.device.cache));
    refused(during, "stream");
    assert_eq!(pair.device.pool.pending_copies(), 1);
    pair.tables[0].update(batch, &mut pair.device.cache).unwrap();
    let mut layers = [(); 2].map(|()| pair.rows::<f16>(rng, 0));
    let (graph, captured) = {
        let shown = layers.each_ref().map(|rows| rows.each_ref().map(|rows| rows.device_view()));
        let (cache, tables) = (&mut pair.device.cache, &pair.tables[0]);
        capture(&gpu, || {
            shown.iter().enumerate().try_for_each(|(layer, [k, v])| {
                page::append_paged_kv_cache(&gpu.stream, k, v, &tables.slots(), &mut cache.layer_mut(layer)?)
            })
        })
    };
    captured.unwrap();
    let graph = graph.expect("a graph");
    for step in 0..12 {
        if step > 0 {
            match step % 4 {
                1 => {
                    pair.change(0, |_, batch| drop(batch.remove(0).unwrap()));
                    pair.fork(0, 0);
                }
                2 => pair.change(0, |_, batch| batch.truncate(1, 5).unwrap()),
                _ => {}
            }
            pair.change(0, |_, batch| batch.append([1, 1]).unwrap());
            let batch = &pair.device.batches[0];
            pair.tables[0].update(batch, &mut pair.device.cache).unwrap();
        }
        for (layer, rows) in layers.iter_mut().enumerate() {
            for rows in rows.iter_mut() {
                rows.host = rows.host.iter().map(|_| f16::from_f64(rng.unit())).collect();
                let content = rows.host.clone();
                rows.upload(&content);
            }
            pair.write_host(0, layer, rows);
        }
        graph.launch().unwrap();
        gpu.synchronize();
        pair.assert_same::<f16>(0);
    }
}

#[test]
fn wrong_input() {
    let Some(gpu) = Gpu::start() else { return };
    let shape =
        HeadsShape { num_layers: 1, num_kv_heads: 2, head_dim: 64, dtype: DType::F16, layout: KvLayout::Nhd };
    let mut pair = Pair::new(&gpu, 8, 4, &[shape]);
    // 2 TiB. Nothing is left of the failure, in the pool or on the device.
    let pool = PageAllocator::new(1 << 20, 1 << 10).unwrap();
    let huge = HeadsShape { num_layers: 4, ..shape };
    match PagedKvCache::new(&gpu.stream, &pool, &[huge]) {
        Err(FlashInferError::Cuda { code: 2, .. }) => {}
        other => panic!("{other:?}"),
    }
    pair.push(0);
    assert!(pair.append::<f16>(&mut Rng::new(), 0, &[5]));
    pair.assert_same::<f16>(0);
    refused(PagedKvCache::new(&gpu.stream, &pair.device.pool, &[shape]).map(drop), "allocator");
    PagedKvCache::on_host(&PageAllocator::new(4, 4).unwrap(), &[shape]).unwrap();
    // Caches, tables and batches that do not belong together.
    let other = gpu.elsewhere();
    let batch = &pair.device.batches[0];
    let mut elsewhere = BatchTables::new(&other.stream, batch, CAPACITY).unwrap();
    refused(elsewhere.update(batch, &mut pair.device.cache), "cache");
    refused(pair.tables[0].update(batch, &mut pair.host.cache), "cache");
    refused(pair.tables[0].update(&pair.host.batches[0], &mut pair.host.cache), "cache");
    let pool = PageAllocator::new(8, 4).unwrap();
    let mut cache = PagedKvCache::new(&gpu.stream, &pool, &[shape]).unwrap();
    refused(pair.tables[0].update(&Batch::new(&pool), &mut cache), "batch");
    let small = |requests, pages, tokens| {
        BatchTables::new(&gpu.stream, batch, BatchCapacity { requests, pages, tokens }).map(drop)
    };
    small(1, 2, 5).unwrap();
    refused(small(0, 2, 5), "capacity");
    refused(small(1, 1, 5), "capacity");
    refused(small(1, 2, 4), "capacity");
    // Views are for the cache's stream.
    let new = Mirrored::<f16>::random(&other, &mut Rng::new(), &[5, 2, 64]);
    let call = page::append_paged_kv_cache(
        &other.stream,
        &new.copied_to(&other).device_view(),
        &new.copied_to(&other).device_view(),
        &elsewhere.slots(),
        &mut pair.device.cache.layer_mut(0).unwrap(),
    );
    refused(call, "kv.k");
    // Arrays of another state of the batch are not used.
    let empty: [f16; 0] = [];
    let none = TensorRef::from_slice(&empty, &[0, 2, 64]).unwrap();
    pair.change(0, |_, batch| batch.truncate(0, 3).unwrap());
    let batch = &pair.device.batches[0];
    pair.tables[0].pages.update(batch.pages().clone()).unwrap();
    let call = page::append_paged_kv_cache(
        &gpu.stream,
        &none,
        &none,
        &pair.tables[0].slots(),
        &mut pair.device.cache.layer_mut(0).unwrap(),
    );
    refused(call, "append");
}
