//! A cache in e4m3 with scales from end to end: quantized, appended, attended to.
//!
//! What attention gives is compared twice: with the reference over the numbers
//! that the cache holds, which is what the kernels are to compute, and with the
//! reference over the keys and values before they were quantized, which is what
//! a model wants.

use crate::common::{
    Gpu, Mirrored, Number, Rng,
    cache::{Cache, CacheShape, random_table},
    say,
};
use flashinfer_rs::{
    DType, FlashInferError, PageIndices, PageTable, Result, TensorMut, TensorRef,
    attention::{
        AttentionSpec, Backend, BatchDecode, BatchPrefill, Heads, PagedBatch, PlanOptions, RunOptions,
        Workspace,
    },
    indices::{AppendIndices, AppendTable, RaggedIndices, RaggedTable, SlotMapping},
    kv::{KvLayout, PagedKv, PagedKvMut},
    page,
    reference::{self, HostMask},
    rope::{
        self, CosSinCache, RopeAppend, RopeFrequencies, RopeOptions, RopeParts, RopePartsMut,
        RopeQuantizeOptions, RopeScaling, RopeTensors, Rotation,
    },
};
use float8::F8E4M3;
use half::{bf16, f16};

const HEAD_DIM: usize = 128;
const HEADS: Heads = Heads::new(8, 2);
/// Keys and values are within ±√3, so within ±87 when quantized; e4m3 reaches to
/// 448. With a larger scale, `sm_scale` times its inverse would be below what
/// kernels on tensor cores take.
const QUANT_SCALE: f64 = 50.0;
/// The error that e4m3's three bits of mantissa make, relative to a row.
const QUANTIZED: f64 = 5e-2;

/// Tokens of requests in a cache, and the queries of their last ones.
struct Problem {
    table: PageIndices,
    append: AppendIndices,
    queries: RaggedIndices,
    shape: CacheShape,
    device_table: PageTable,
    device_append: AppendTable,
}

impl Problem {
    /// Requests of so many queries and tokens; all tokens are appended.
    fn new(gpu: &Gpu, rng: &mut Rng, requests: &[(usize, usize)], layout: KvLayout) -> Self {
        let lens: Vec<usize> = requests.iter().map(|&(_, tokens)| tokens).collect();
        let table = random_table(rng, 16, &lens);
        let all = RaggedIndices::from_lens(lens).unwrap();
        let append = AppendIndices::last_tokens(&table, all.indptr()).unwrap();
        let queries = RaggedIndices::from_lens(requests.iter().map(|&(queries, _)| queries)).unwrap();
        let shape = CacheShape {
            pages: table.num_pages(),
            page_size: 16,
            heads: HEADS.num_kv_heads,
            head_dim: HEAD_DIM,
            layout,
            joined: false,
        };
        let device_table = PageTable::new(&gpu.stream, table.clone()).unwrap();
        let device_append = AppendTable::new(&gpu.stream, append.clone()).unwrap();
        Self { table, append, queries, shape, device_table, device_append }
    }

    fn q_shape(&self) -> [usize; 3] {
        [self.queries.total(), HEADS.num_qo_heads, HEAD_DIM]
    }

    fn kv_shape(&self) -> [usize; 3] {
        [self.append.len(), HEADS.num_kv_heads, HEAD_DIM]
    }

    fn cache_dims(&self) -> [usize; 4] {
        let CacheShape { pages, page_size, heads, head_dim, layout, .. } = self.shape;
        match layout {
            KvLayout::Nhd => [pages, page_size, heads, head_dim],
            KvLayout::Hnd => [pages, heads, page_size, head_dim],
        }
    }

    /// The position of each query.
    fn query_positions(&self) -> Vec<i32> {
        let of = |request| {
            let (len, queries) = (self.table.seq_len(request), self.queries.len(request));
            (len - queries..len).map(|position| position as i32)
        };
        (0..self.table.batch_size()).flat_map(of).collect()
    }

    /// A cache in f64 that `write` fills.
    fn exact(&self, write: impl FnOnce(PagedKvMut<'_>) -> Result<()>) -> [Vec<f64>; 2] {
        let dims = self.cache_dims();
        let mut exact = [(); 2].map(|()| vec![f64::NAN; dims.iter().product()]);
        let [k, v] = &mut exact;
        let view = |numbers| TensorMut::from_slice(numbers, &dims).unwrap();
        write(PagedKvMut::new(view(k), view(v), self.shape.layout)).unwrap();
        exact
    }

    /// Attention in f64.
    fn solve(&self, q: &TensorRef<'_>, kv: &PagedKv<'_>, options: &RunOptions<'_>) -> Vec<f64> {
        let mut want = vec![f64::NAN; self.q_shape().iter().product()];
        reference::batch_prefill_paged(
            &AttentionSpec::new(q.dtype(), HEAD_DIM).with_kv_dtype(kv.k.dtype()),
            q,
            kv,
            &self.queries,
            &self.table,
            &mut TensorMut::from_slice(&mut want, &self.q_shape()).unwrap(),
            None,
            HostMask::Causal,
            options,
        )
        .unwrap();
        want
    }

    /// Runs decode (where each request has one query) and prefill on all
    /// kernels that there are, and compares them with both references: over the
    /// cache with the queries as they are on the device, and over what `exact`
    /// holds with the queries `exact_q`.
    #[track_caller]
    fn attend<T: Number>(
        &self,
        gpu: &Gpu,
        (q, cache): (&Mirrored<T>, &Cache<F8E4M3>),
        (exact_q, exact): (&TensorRef<'_>, &[Vec<f64>; 2]),
        options: &RunOptions<'_>,
    ) {
        let (dims, layout) = (self.cache_dims(), self.shape.layout);
        let stored: Vec<_> = cache.tensors.iter().map(|tensor| tensor.download()).collect();
        let stored = [&stored[0], &stored[1]].map(|rows| TensorRef::from_slice(rows, &dims).unwrap());
        let turned = q.download();
        let turned = TensorRef::from_slice(&turned, &self.q_shape()).unwrap();
        let of_cache = self.solve(&turned, &PagedKv::new(stored[0], stored[1], layout), options);
        let [k, v] = exact.each_ref().map(|rows| TensorRef::from_slice(rows, &dims).unwrap());
        let of_model = self.solve(exact_q, &PagedKv::new(k, v, layout), &RunOptions::default());

        let spec = AttentionSpec::new(T::DTYPE, HEAD_DIM).with_kv_dtype(DType::E4M3);
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let mut ran = 0;
        let decodes = (0..self.queries.batch_size()).all(|request| self.queries.len(request) == 1);
        for backend in [Backend::CudaCores, Backend::Fa2].into_iter().filter(|_| decodes) {
            let spec = spec.with_backend(backend);
            let Some(decode) = at_hand(BatchDecode::new(&gpu.stream, &spec, HEADS)) else { continue };
            let plan = decode.plan(&mut workspace, &self.device_table, &PlanOptions::default()).unwrap();
            let mut out = Mirrored::<T>::poisoned(gpu, &self.q_shape());
            plan.run_with(&q.device_view(), &cache.device_view(), &mut out.device_view_mut(), None, options)
                .unwrap();
            let what = format!("decode on {backend:?}");
            out.assert_close(&format!("{what}, over the cache"), &of_cache, T::BOUND);
            out.assert_close(&format!("{what}, over the model's numbers"), &of_model, QUANTIZED);
            ran += 1;
        }
        if let Some(prefill) = at_hand(BatchPrefill::new(&gpu.stream, &spec, HEADS)) {
            let queries = RaggedTable::new(&gpu.stream, self.queries.clone()).unwrap();
            let causal = PlanOptions::causal();
            let plan = prefill
                .plan_paged(&mut workspace, PagedBatch::new(&queries, &self.device_table), &causal)
                .unwrap();
            let mut out = Mirrored::<T>::poisoned(gpu, &self.q_shape());
            plan.run_with(&q.device_view(), &cache.device_view(), &mut out.device_view_mut(), None, options)
                .unwrap();
            let what = format!("prefill on {:?}", prefill.backend());
            out.assert_close(&format!("{what}, over the cache"), &of_cache, T::BOUND);
            out.assert_close(&format!("{what}, over the model's numbers"), &of_model, QUANTIZED);
            ran += 1;
        }
        if ran == 0 {
            say("no attention over e4m3 was run");
        }
    }
}

/// `None`, said on stderr, if no source holds the module.
fn at_hand<A>(attention: Result<A>) -> Option<A> {
    match attention {
        Ok(attention) => Some(attention),
        Err(FlashInferError::Artifact(reason)) => {
            say(&format!("skipped: no source holds a module for e4m3 keys: {reason}"));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// One query for each request, or several; queries and tokens.
const DECODE: [(usize, usize); 5] = [(1, 1), (1, 16), (1, 17), (1, 77), (1, 700)];
const PREFILL: [(usize, usize); 4] = [(1, 1), (16, 16), (5, 40), (100, 333)];

/// The scales that undo `QUANT_SCALE`.
fn scales() -> RunOptions<'static> {
    let mut options = RunOptions::default();
    (options.k_scale, options.v_scale) = (Some(1.0 / QUANT_SCALE), Some((1.0 / QUANT_SCALE) as f32));
    options
}

/// Queries small enough for keys' errors to stay small in the exponent.
fn queries<T: Number>(gpu: &Gpu, rng: &mut Rng, problem: &Problem) -> Mirrored<T> {
    Mirrored::random_scaled(gpu, rng, &problem.q_shape(), 0.25)
}

/// Keys and values that the host quantizes, because upstream has no kernel for
/// that alone, and that are appended as they are.
fn quantized_by_the_host<T: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for (requests, layout) in
        [(&DECODE[..], KvLayout::Nhd), (&DECODE, KvLayout::Hnd), (&PREFILL, KvLayout::Nhd)]
    {
        let problem = Problem::new(&gpu, rng, requests, layout);
        let shape = problem.kv_shape();
        let numbers: [Vec<f64>; 2] =
            [(); 2].map(|()| (0..shape.iter().product()).map(|_| rng.unit()).collect());
        let [k, v] = numbers.each_ref().map(|numbers| {
            let quantized = numbers.iter().map(|number| F8E4M3::from_f64(number * QUANT_SCALE)).collect();
            Mirrored::new(&gpu, &shape, quantized)
        });
        let mut cache = Cache::<F8E4M3>::poisoned(&gpu, problem.shape);
        page::append_paged_kv_cache(
            &gpu.stream,
            &k.device_view(),
            &v.device_view(),
            &SlotMapping::new(&problem.device_append, &problem.device_table),
            &mut cache.device_view_mut(),
        )
        .unwrap();
        let exact = problem.exact(|mut cache| {
            let [k, v] = numbers.each_ref().map(|numbers| TensorRef::from_slice(numbers, &shape).unwrap());
            reference::append_paged_kv_cache(
                &k,
                &v,
                &SlotMapping::new(&problem.append, &problem.table),
                &mut cache,
            )
        });
        let q = queries::<T>(&gpu, rng, &problem);
        problem.attend(&gpu, (&q, &cache), (&q.view(), &exact), &scales());
    }
}

crate::typed_tests! {
    quantized_by_the_host_f16: quantized_by_the_host::<f16>();
    quantized_by_the_host_bf16: quantized_by_the_host::<bf16>();
}

/// Keys are turned, quantized and appended with values by one kernel, queries
/// are turned by another.
fn turned_and_quantized<T: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let frequencies = RopeFrequencies::new(HEAD_DIM, 1e4, &RopeScaling::None).unwrap();
    let angles = CosSinCache::new(&gpu.stream, &frequencies, 1000).unwrap();
    let options = RopeQuantizeOptions::with_scales(1.0, QUANT_SCALE);
    for (requests, layout) in [(&DECODE[..], KvLayout::Nhd), (&PREFILL, KvLayout::Hnd)] {
        let problem = Problem::new(&gpu, rng, requests, layout);
        let [k, v] = [(); 2].map(|()| Mirrored::<T>::random(&gpu, rng, &problem.kv_shape()));
        // No query heads: those of attention stay 16-bit.
        let no_heads = [problem.append.len(), 0, HEAD_DIM];
        let no_queries = Mirrored::<T>::poisoned(&gpu, &no_heads);
        let mut nothing = Mirrored::<F8E4M3>::poisoned(&gpu, &no_heads);
        let mut cache = Cache::<F8E4M3>::poisoned(&gpu, problem.shape);
        rope::rope_quantize_append_paged_kv_cache(
            &gpu.stream,
            &mut RopePartsMut { rope: nothing.device_view_mut(), nope: None },
            &mut RopeAppend::Kv { cache: cache.device_view_mut(), value: v.device_view() },
            &[
                RopeParts { rope: no_queries.device_view(), nope: None },
                RopeParts { rope: k.device_view(), nope: None },
            ],
            &Rotation::new(angles.view().unwrap(), &problem.device_append),
            &SlotMapping::new(&problem.device_append, &problem.device_table),
            &options,
        )
        .unwrap();

        let mut q = queries::<T>(&gpu, rng, &problem);
        let pos_ids = problem.query_positions();
        let device_pos_ids = flashinfer_rs::indices::BoundedTable::new(
            &gpu.stream,
            flashinfer_rs::indices::BoundedIndices::new(1000, pos_ids.clone()).unwrap(),
        )
        .unwrap();
        // Keys go along that nobody wants.
        let mut no_keys = Mirrored::<T>::poisoned(&gpu, &[pos_ids.len(), 0, HEAD_DIM]);
        rope::apply_rope_pos_ids_cos_sin_cache(
            &gpu.stream,
            &mut RopeTensors::InPlace { q: q.device_view_mut(), k: no_keys.device_view_mut() },
            &Rotation::new(angles.view().unwrap(), &device_pos_ids),
        )
        .unwrap();

        // In f64: turned keys and queries, nothing quantized.
        let (plain, shape) = (RopeOptions::default(), problem.kv_shape());
        let mut exact_k = k.wide();
        let mut exact_q = q.wide();
        let mut none: [f64; 0] = [];
        fn turn(
            heads: &mut [f64],
            shape: &[usize; 3],
            none: &mut [f64],
            pos_ids: &[i32],
            options: &RopeOptions,
        ) {
            let k = TensorMut::from_slice(none, &[shape[0], 0, shape[2]]).unwrap();
            let q = TensorMut::from_slice(heads, shape).unwrap();
            reference::apply_rope_pos_ids(&mut RopeTensors::InPlace { q, k }, pos_ids, options).unwrap();
        }
        turn(&mut exact_k, &shape, &mut none, problem.append.positions(), &plain);
        turn(&mut exact_q, &problem.q_shape(), &mut none, &pos_ids, &plain);
        q.assert_close("turned queries", &exact_q, T::BOUND);
        let exact = problem.exact(|mut cache| {
            let exact_k = TensorRef::from_slice(&exact_k, &shape).unwrap();
            let exact_v = v.wide();
            let exact_v = TensorRef::from_slice(&exact_v, &shape).unwrap();
            reference::append_paged_kv_cache(
                &exact_k,
                &exact_v,
                &SlotMapping::new(&problem.append, &problem.table),
                &mut cache,
            )
        });
        let exact_q = TensorRef::from_slice(&exact_q, &problem.q_shape()).unwrap();
        problem.attend(&gpu, (&q, &cache), (&exact_q, &exact), &scales());
    }
}

crate::typed_tests! {
    turned_and_quantized_f16: turned_and_quantized::<f16>();
    turned_and_quantized_bf16: turned_and_quantized::<bf16>();
}
