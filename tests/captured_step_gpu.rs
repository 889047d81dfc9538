//! Captured steps on the GPU: what they compute, what they are refused for, and what they
//! keep alive.
#![cfg(feature = "cudarc")]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use common::{Gpu, Rng, assert_same_bits, at_hand, refused};
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use flashinfer_rs::{
    DType, FlashInferError, PageIndices, PageTable, Result, activation,
    attention::{
        AttentionSpec, Backend, BatchAttention, BatchDecode, BatchPrefill, CascadeWorkspace, DecodePlan,
        Heads, MultiLevelCascade, PagedBatch, PlanOptions, SingleDecode, Workspace,
    },
    gemm::{GemmBackend, SegmentGemm, SegmentGemmInput},
    gpu::{Tensor, TensorExt},
    graph::CapturedStep,
    indices::{RaggedIndices, RaggedTable, SegmentIndices, SegmentTable},
    kv::{
        Batch, BatchCapacity, BatchTables, HeadsShape, KvLayout, PageAllocator, PagedKv, PagedKvCache,
        Sequence,
    },
    norm, page,
    rope::{
        CosSinCache, RopeFrequencies, RopeScaling, RopeTensors, Rotation, apply_rope_pos_ids_cos_sin_cache,
    },
    sampling,
};
use half::f16;

const LAYERS: usize = 2;
const HEADS: Heads = Heads::new(8, 2);
const HEAD_DIM: usize = 128;
const PAGES: usize = 64;
const CAPACITY: BatchCapacity = BatchCapacity { requests: 8, pages: 64, tokens: 64 };

/// What uploads a batch that is filled up.
type Update = fn(&mut BatchTables, &Batch, &mut PagedKvCache, usize) -> Result<()>;

/// Plans for a graph of as many requests as there are.
fn for_graph(tables: &BatchTables) -> PlanOptions<'static> {
    PlanOptions::default().with_graph(tables.pages.host().batch_size())
}

/// A model of attention only, and a batch.
struct Model<'g> {
    gpu: &'g Gpu,
    rng: Rng,
    decode: BatchDecode,
    pool: PageAllocator,
    cache: PagedKvCache,
    batch: Batch,
    tables: BatchTables,
    workspace: Workspace,
    /// Rows of a step, for keys and values too.
    q: Tensor<f16>,
    kv: [Tensor<f16>; 2],
    out: Tensor<f16>,
}

fn zeros(gpu: &Gpu, rows: usize, heads: usize) -> Tensor<f16> {
    Tensor::zeros(&gpu.stream, &[rows, heads, HEAD_DIM]).unwrap()
}

/// A step: new keys and values to their pages, and attention, in all layers.
fn run(
    gpu: &Gpu,
    plan: &DecodePlan<'_>,
    tables: &BatchTables,
    cache: &mut PagedKvCache,
    (q, [k, v], out): (&Tensor<f16>, &[Tensor<f16>; 2], &mut Tensor<f16>),
) -> Result<()> {
    (0..LAYERS).try_for_each(|layer| {
        let kv = &mut cache.layer_mut(layer)?;
        page::append_paged_kv_cache(&gpu.stream, &k.view(), &v.view(), &tables.slots(), kv)?;
        plan.run(&q.view(), &kv.as_ref(), &mut out.view_mut())
    })
}

impl<'g> Model<'g> {
    /// With `rows` requests of some tokens each.
    fn new(gpu: &'g Gpu, rows: usize, backend: Backend) -> Self {
        let spec = AttentionSpec::new(DType::F16, HEAD_DIM).with_backend(backend);
        let decode = BatchDecode::new(&gpu.stream, &spec, HEADS).unwrap();
        let pool = PageAllocator::new(PAGES, 4).unwrap();
        let shape = HeadsShape {
            num_layers: LAYERS,
            num_kv_heads: HEADS.num_kv_heads,
            head_dim: HEAD_DIM,
            dtype: DType::F16,
            layout: KvLayout::Nhd,
        };
        let cache = PagedKvCache::new(&gpu.stream, &pool, &[shape]).unwrap();
        let mut batch = Batch::new(&pool);
        for _ in 0..rows {
            batch.push(Sequence::new(&pool)).unwrap();
        }
        batch.append(vec![1; rows]).unwrap();
        let tables = BatchTables::new(&gpu.stream, &batch, CAPACITY).unwrap();
        let workspace = Workspace::new(&gpu.stream).unwrap();
        let kv = [(); 2].map(|()| zeros(gpu, rows, HEADS.num_kv_heads));
        let [q, out] = [(); 2].map(|()| zeros(gpu, rows, HEADS.num_qo_heads));
        let mut model =
            Self { gpu, rng: Rng::new(), decode, pool, cache, batch, tables, workspace, q, kv, out };
        model.new_inputs();
        model
    }

    fn new_inputs(&mut self) {
        let [k, v] = &mut self.kv;
        for tensor in [&mut self.q, k, v] {
            let count = tensor.shape().iter().product::<i64>();
            let numbers: Vec<_> = (0..count).map(|_| f16::from_f64(self.rng.unit())).collect();
            tensor.write(&numbers).unwrap();
        }
    }

    fn capture(&mut self) -> Result<CapturedStep> {
        let Self { gpu, decode, cache, batch, tables, workspace, q, kv, out, .. } = self;
        tables.update(batch, cache)?;
        let plan = decode.plan(workspace, &tables.pages, &for_graph(tables))?;
        run(gpu, &plan, tables, cache, (q, kv, out))?;
        CapturedStep::capture(&gpu.stream, || run(gpu, &plan, tables, cache, (q, kv, out)))
    }

    /// Launches, and runs the same plan as it is; the rows of the batch of both.
    fn launch(&mut self, step: &CapturedStep, update: Update) -> [Vec<f16>; 2] {
        self.new_inputs();
        let rows = self.q.shape()[0] as usize;
        let Self { gpu, decode, cache, batch, tables, workspace, q, kv, out, .. } = self;
        out.write(&vec![f16::NAN; rows * HEADS.num_qo_heads * HEAD_DIM]).unwrap();
        update(tables, batch, cache, rows).unwrap();
        let plan = decode.plan(workspace, &tables.pages, &for_graph(tables)).unwrap();
        step.launch(&plan).unwrap();
        let launched = out.to_vec().unwrap();
        let mut direct = zeros(gpu, rows, HEADS.num_qo_heads);
        run(gpu, &plan, tables, cache, (q, kv, &mut direct)).unwrap();
        let direct = direct.to_vec().unwrap();
        let tokens = batch.queries().total();
        [launched, direct].map(|all| all[..tokens * HEADS.num_qo_heads * HEAD_DIM].to_vec())
    }
}

#[test]
fn a_step_follows_its_batch() {
    let Some(gpu) = Gpu::start_alone() else { return };
    for backend in [Backend::CudaCores, Backend::Fa2] {
        let mut model = Model::new(&gpu, 4, backend);
        let step = model.capture().unwrap();
        assert!(step.nodes() >= 2 * LAYERS, "{step:?}");
        let free = model.pool.free_pages();
        for time in 0..12 {
            if matches!(time, 3 | 6) {
                model.batch.remove(time / 3).unwrap();
            }
            model.batch.append(vec![1; model.batch.len()]).unwrap();
            let [launched, direct] = model.launch(&step, BatchTables::update_padded);
            assert!(launched.iter().all(|number| number.is_finite()), "{backend:?}, step {time}");
            assert_same_bits("launched and run", &launched, &direct);
        }
        // One page is the padding's, until it is given back.
        let used = |model: &Model<'_>| model.pool.used_pages();
        let before = used(&model);
        model.tables.release_padding();
        assert_eq!(used(&model), before - 1);
        drop(model.batch);
        assert_eq!((model.pool.free_pages(), free), (PAGES, PAGES - 4));
    }
}

/// Drafts row by row, between steps of one token for each request.
#[test]
fn a_step_takes_drafts() {
    let Some(gpu) = Gpu::start_alone() else { return };
    for backend in [Backend::CudaCores, Backend::Fa2] {
        let mut model = Model::new(&gpu, 8, backend);
        let step = model.capture().unwrap();
        (0..5).for_each(|_| drop(model.batch.remove(0).unwrap()));
        for new in [[1, 1, 1], [3, 1, 2], [4, 0, 4], [1, 1, 1], [0, 7, 0]] {
            model.batch.append(new).unwrap();
            let update = if new == [1; 3] { BatchTables::update_padded } else { BatchTables::update_by_row };
            let [launched, direct] = model.launch(&step, update);
            assert!(launched.iter().all(|number| number.is_finite()), "{backend:?}, {new:?}");
            assert_same_bits("launched and run", &launched, &direct);
            // Some are not accepted.
            let len = model.batch.sequences()[0].len();
            model.batch.truncate(0, len.saturating_sub(2)).unwrap();
        }
    }
}

#[test]
fn plans_and_tables_that_do_not_fit_are_refused() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let mut model = Model::new(&gpu, 3, Backend::Auto);
    let step = model.capture().unwrap();
    refused(step.launch(&()), "plans");
    let Model { decode, batch, tables, workspace, cache, pool, .. } = &mut model;
    // An eager plan, and one on another workspace.
    refused(step.launch(&decode.plan(workspace, &tables.pages, &PlanOptions::default()).unwrap()), "plans");
    let mut other = Workspace::new(&gpu.stream).unwrap();
    let problem = step.launch(&decode.plan(&mut other, &tables.pages, &for_graph(tables)).unwrap());
    assert!(problem.unwrap_err().to_string().contains("another workspace"));
    // Another number of requests: more, and fewer that are not filled up.
    batch.push(Sequence::new(pool)).unwrap();
    batch.append([1; 4]).unwrap();
    tables.update(batch, cache).unwrap();
    let plan = decode.plan(workspace, &tables.pages, &for_graph(tables)).unwrap();
    assert!(step.launch(&plan).unwrap_err().to_string().contains("for 4 requests"));
    refused(tables.update_padded(batch, cache, 3), "requests");
    batch.remove(3).unwrap();
    batch.remove(2).unwrap();
    batch.append([1; 2]).unwrap();
    tables.update(batch, cache).unwrap();
    let plan = decode.plan(workspace, &tables.pages, &for_graph(tables)).unwrap();
    refused(step.launch(&plan), "plans");
    // Filled up it fits again. New tokens of another state of the batch do not.
    tables.update_padded(batch, cache, 3).unwrap();
    step.launch(&decode.plan(workspace, &tables.pages, &for_graph(tables)).unwrap()).unwrap();
    let pages = tables.pages.host().clone();
    tables.update(batch, cache).unwrap();
    tables.pages.update(pages).unwrap();
    let plan = decode.plan(workspace, &tables.pages, &for_graph(tables)).unwrap();
    refused(step.launch(&plan), "AppendTable");
    gpu.synchronize();
}

#[test]
fn plans_that_are_not_for_graphs_are_not_captured() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let mut model = Model::new(&gpu, 2, Backend::Auto);
    let Model { decode, batch, tables, workspace, cache, q, kv, out, .. } = &mut model;
    tables.update(batch, cache).unwrap();
    let plan = decode.plan(workspace, &tables.pages, &PlanOptions::default()).unwrap();
    run(&gpu, &plan, tables, cache, (q, kv, out)).unwrap();
    let problem = CapturedStep::capture(&gpu.stream, || run(&gpu, &plan, tables, cache, (q, kv, out)));
    assert!(problem.unwrap_err().to_string().contains("not made for a CUDA graph"));
    run(&gpu, &plan, tables, cache, (q, kv, out)).unwrap();
    gpu.synchronize();
}

#[test]
fn two_plans_in_one_step() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let mut model = Model::new(&gpu, 2, Backend::Fa2);
    let spec = AttentionSpec::new(DType::F16, HEAD_DIM).with_backend(Backend::CudaCores);
    let second = BatchDecode::new(&gpu.stream, &spec, HEADS).unwrap();
    let mut more = Workspace::new(&gpu.stream).unwrap();
    let Model { decode, batch, tables, workspace, cache, q, kv, out, .. } = &mut model;
    tables.update(batch, cache).unwrap();
    let step = {
        let a = decode.plan(workspace, &tables.pages, &for_graph(tables)).unwrap();
        let b = second.plan(&mut more, &tables.pages, &for_graph(tables)).unwrap();
        let mut both =
            || [&a, &b].into_iter().try_for_each(|plan| run(&gpu, plan, tables, cache, (q, kv, out)));
        both().unwrap();
        CapturedStep::capture(&gpu.stream, both).unwrap()
    };
    batch.append([1; 2]).unwrap();
    tables.update(batch, cache).unwrap();
    let a = decode.plan(workspace, &tables.pages, &for_graph(tables)).unwrap();
    refused(step.launch(&a), "plans");
    let b = second.plan(&mut more, &tables.pages, &for_graph(tables)).unwrap();
    refused(step.launch(&b), "plans");
    step.launch(&(&a, &b)).unwrap();
    step.launch(&[b, a][..]).unwrap();
    gpu.synchronize();
}

/// Prefill, mixed batches and cascades: captured for short requests, launched for longer ones.
#[test]
fn all_kinds_of_plans() {
    let Some(gpu) = Gpu::start_alone() else { return };
    const ROWS: usize = 12;
    let stream = &gpu.stream;
    let cache_shape = [PAGES, 4, HEADS.num_kv_heads, HEAD_DIM];
    let mut rng = Rng::new();
    let mut random = |shape: &[usize]| {
        let numbers: Vec<_> = (0..shape.iter().product()).map(|_| f16::from_f64(rng.unit())).collect();
        Tensor::from_slice(stream, shape, &numbers).unwrap()
    };
    let [k, v] = [(); 2].map(|()| random(&cache_shape));
    let q = random(&[ROWS, HEADS.num_qo_heads, HEAD_DIM]);
    let kv = || PagedKv::new(k.view(), v.view(), KvLayout::Nhd);
    let all: Vec<i32> = (0..PAGES as i32).collect();
    let pages = |tokens: [usize; 2]| {
        let [a, b] = tokens.map(|tokens| tokens.div_ceil(4));
        PageIndices::from_requests(PAGES, 4, [(&all[..a], tokens[0]), (&all[20..20 + b], tokens[1])]).unwrap()
    };
    let steps = [([9, 7], [2, 5]), ([60, 12], [3, 4]), ([5, 80], [5, 1])];
    for backend in [Backend::Fa2, Backend::Fa3] {
        let spec = AttentionSpec::new(DType::F16, HEAD_DIM).with_backend(backend);
        let Some(prefill) = at_hand(&gpu, BatchPrefill::new(stream, &spec, HEADS)) else { return };
        let mixed = BatchAttention::new(stream, &AttentionSpec::new(DType::F16, HEAD_DIM), HEADS);
        let Some(mixed) = at_hand(&gpu, mixed) else { return };
        let cascade = MultiLevelCascade::new(stream, &spec, HEADS).unwrap();
        let [mut first, mut second] = [(); 2].map(|()| Workspace::new(stream).unwrap());
        let mut levels = CascadeWorkspace::new(stream, 2).unwrap();
        let mut outs = [(); 3].map(|()| zeros(&gpu, ROWS, HEADS.num_qo_heads));
        let mut table = PageTable::with_capacity(stream, pages(steps[0].0), 2, PAGES).unwrap();
        let mut queries =
            RaggedTable::with_capacity(stream, RaggedIndices::from_lens(steps[0].1).unwrap(), 2).unwrap();
        let mut step = None;
        for (tokens, new) in steps {
            table.update(pages(tokens)).unwrap();
            queries.update(RaggedIndices::from_lens(new).unwrap()).unwrap();
            let graph = PlanOptions::causal().with_graph(ROWS);
            let a = prefill.plan_paged(&mut first, PagedBatch::new(&queries, &table), &graph).unwrap();
            let b = mixed.plan(&mut second, PagedBatch::new(&queries, &table), &graph).unwrap();
            let graph = PlanOptions::default().with_graph(ROWS);
            let level = PagedBatch::new(&queries, &table);
            let c = cascade.plan(&mut levels, &[level, level], &graph).unwrap();
            let run = |outs: &mut [Tensor<f16>; 3]| {
                let [x, y, z] = outs;
                a.run(&q.view(), &kv(), &mut x.view_mut())?;
                b.run(&q.view(), &kv(), &mut y.view_mut())?;
                c.run(&q.view(), &kv(), &mut z.view_mut())
            };
            let mut direct = [(); 3].map(|()| zeros(&gpu, ROWS, HEADS.num_qo_heads));
            run(&mut direct).unwrap();
            let step = step.get_or_insert_with(|| CapturedStep::capture(stream, || run(&mut outs)).unwrap());
            refused(step.launch(&(&a, &b)), "plans");
            step.launch(&(&c, &a, &b)).unwrap();
            let rows = new.iter().sum::<usize>() * HEADS.num_qo_heads * HEAD_DIM;
            for (kind, (out, direct)) in ["prefill", "mixed", "cascade"].iter().zip(outs.iter().zip(&direct))
            {
                let [out, direct] = [out, direct].map(|tensor| tensor.to_vec().unwrap()[..rows].to_vec());
                let what = format!("{kind}, {backend:?}");
                assert!(out.iter().any(|&number| number != f16::ZERO), "{what}");
                assert_same_bits(&what, &out, &direct);
            }
        }
    }
}

/// Workspaces of operations without plans are kept, too, and so are index arrays.
#[test]
fn workspaces_are_kept() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let stream = &gpu.stream;
    let numbers =
        |count: usize| -> Vec<f32> { (0..count).map(|at| (at * 37 % 101) as f32 / 101.0).collect() };
    let halves = |count: usize| -> Vec<f16> { numbers(count).into_iter().map(f16::from_f32).collect() };
    let mut probs = Tensor::<f32>::zeros(stream, &[4, 40000]).unwrap();
    let mut kept = Tensor::<f32>::zeros(stream, &[4, 40000]).unwrap();
    let mut product = Tensor::<f16>::zeros(stream, &[24, 64]).unwrap();
    let mut attention = Tensor::<f16>::zeros(stream, &[HEADS.num_qo_heads, HEAD_DIM]).unwrap();
    let (step, before) = {
        let logits = Tensor::from_slice(stream, &[4, 40000], &numbers(160_000)).unwrap();
        let mut sampler = sampling::SamplingWorkspace::new(stream, 4, 40000).unwrap();
        let mut gemm = SegmentGemm::new(stream, 2, GemmBackend::Auto).unwrap();
        let segments = SegmentTable::new(stream, SegmentIndices::from_lens([10, 14]).unwrap()).unwrap();
        let x = Tensor::from_slice(stream, &[24, 128], &halves(24 * 128)).unwrap();
        let weights = Tensor::from_slice(stream, &[2, 64, 128], &halves(2 * 64 * 128)).unwrap();
        let spec = AttentionSpec::new(DType::F16, HEAD_DIM);
        let Some(decode) = at_hand(&gpu, SingleDecode::new(stream, &spec, HEADS)) else { return };
        let mut workspace = Workspace::new(stream).unwrap();
        let q = Tensor::from_slice(stream, &[HEADS.num_qo_heads, HEAD_DIM], &halves(8 * HEAD_DIM)).unwrap();
        let shape = [5000, HEADS.num_kv_heads, HEAD_DIM];
        let kv = [(); 2].map(|()| Tensor::from_slice(stream, &shape, &halves(5000 * 2 * HEAD_DIM)).unwrap());
        let mut work = || {
            sampling::softmax(&mut sampler, &mut probs.view_mut(), &logits.view(), &Default::default())?;
            sampling::top_k_renorm_probs(&mut sampler, &mut kept.view_mut(), &probs.view(), 7.into())?;
            let input = SegmentGemmInput::column_major(x.view(), weights.view());
            gemm.run(&mut product.view_mut(), &input, &segments)?;
            let (k, v) = (kv[0].view(), kv[1].view());
            decode.run(&mut workspace, &q.view(), [&k, &v], &mut attention.view_mut())
        };
        work().unwrap();
        let step = CapturedStep::capture(stream, work).unwrap();
        (step, (kept.to_vec().unwrap(), product.to_vec().unwrap(), attention.to_vec().unwrap()))
    };
    gpu.synchronize();
    let nan = vec![f16::NAN; 1 << 20];
    let others: Vec<_> = (0..150).map(|_| Tensor::from_slice(stream, &[1 << 20], &nan).unwrap()).collect();
    for _ in 0..3 {
        kept.write(&vec![f32::NAN; 160_000]).unwrap();
        product.write(&vec![f16::NAN; 24 * 64]).unwrap();
        attention.write(&vec![f16::NAN; 8 * HEAD_DIM]).unwrap();
        step.launch(&()).unwrap();
        assert_same_bits("top-k", &kept.to_vec().unwrap(), &before.0);
        assert_same_bits("segments", &product.to_vec().unwrap(), &before.1);
        assert_same_bits("one request", &attention.to_vec().unwrap(), &before.2);
    }
    let untouched = others.iter().all(|other| other.to_vec().unwrap().iter().all(|number| number.is_nan()));
    assert!(untouched);
}

/// Whoever owned what a step works on is gone, and others have taken what memory is free.
#[test]
fn memory_is_kept() {
    let Some(gpu) = Gpu::start_alone() else { return };
    const ROWS: usize = 512;
    let numbers: Vec<_> = (0..ROWS * 256).map(|at| f16::from_f64((at % 97) as f64 / 97.0)).collect();
    let mut out = Tensor::<f16>::zeros(&gpu.stream, &[ROWS, 256]).unwrap();
    let (step, before) = {
        let x = Tensor::from_slice(&gpu.stream, &[ROWS, 256], &numbers).unwrap();
        let weight = Tensor::from_slice(&gpu.stream, &[256], &[f16::ONE; 256]).unwrap();
        let mut norm = || {
            norm::rmsnorm(&gpu.stream, &mut out.view_mut(), &x.view(), &weight.view(), &Default::default())
        };
        norm().unwrap();
        let step = CapturedStep::capture(&gpu.stream, norm).unwrap();
        assert!(x.into_cudarc().is_err());
        (step, out.to_vec().unwrap())
    };
    let mut model = Model::new(&gpu, 2, Backend::Auto);
    let attention = model.capture().unwrap();
    drop(model);
    let others: Vec<_> = (0..64)
        .map(|_| Tensor::from_slice(&gpu.stream, &[ROWS, 256], &vec![f16::NAN; ROWS * 256]).unwrap())
        .collect();
    out.write(&vec![f16::NAN; ROWS * 256]).unwrap();
    step.launch(&()).unwrap();
    assert_same_bits("a step whose input was dropped", &out.to_vec().unwrap(), &before);
    // Of this one there can be no plan any more.
    let mut model = Model::new(&gpu, 2, Backend::Auto);
    let Model { decode, batch, tables, workspace, cache, .. } = &mut model;
    tables.update(batch, cache).unwrap();
    refused(attention.launch(&decode.plan(workspace, &tables.pages, &for_graph(tables)).unwrap()), "plans");
    drop((step, attention, others));
    gpu.synchronize();
}

#[test]
fn a_body_that_fails_leaves_the_stream_usable() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let x = Tensor::from_slice(&gpu.stream, &[2, 256], &[f16::ONE; 512]).unwrap();
    let mut out = Tensor::<f16>::zeros(&gpu.stream, &[2, 256]).unwrap();
    let weight = Tensor::from_slice(&gpu.stream, &[256], &[f16::ONE; 256]).unwrap();
    let slice = gpu.cuda.alloc_zeros::<f16>(512).unwrap();
    let logits = Tensor::<f16>::zeros(&gpu.stream, &[2, 256]).unwrap();
    let mut tokens = Tensor::<i32>::zeros(&gpu.stream, &[2]).unwrap();
    let stream = &gpu.stream;
    let mut norm =
        || norm::rmsnorm(stream, &mut out.view_mut(), &x.view(), &weight.view(), &Default::default());
    norm().unwrap();
    let fails = |problem: Result<CapturedStep>, words: &str| {
        let problem = problem.unwrap_err().to_string();
        common::say(&problem);
        assert!(problem.contains(words), "{problem}");
        gpu.synchronize();
    };
    let mine = || FlashInferError::Unsupported { what: "my body".into(), available: "nothing".into() };
    fails(CapturedStep::capture(stream, || norm().and_then(|()| Err(mine()))), "my body");
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        CapturedStep::capture(stream, || {
            norm().unwrap();
            panic!("expected: a body that panics")
        })
    }));
    assert!(panicked.is_err());
    // A first call compiles a kernel; allocations, waits and views of slices are refused.
    let mut first = || sampling::argmax(stream, &mut tokens.view_mut(), &logits.view());
    fails(CapturedStep::capture(stream, &mut first), "before the capture");
    fails(CapturedStep::capture(stream, || Tensor::<f16>::zeros(stream, &[4]).map(drop)), "being captured");
    fails(CapturedStep::capture(stream, || logits.to_vec().map(drop)), "being captured");
    fails(CapturedStep::capture(stream, || slice.tensor(&gpu.cuda, &[512]).map(drop)), "gpu::Tensor");
    fails(
        CapturedStep::capture(stream, || CapturedStep::capture(stream, || Ok(())).map(drop)),
        "another step",
    );
    // Modules whose kernels were not launched before: it works, or the error says so.
    let wide = Tensor::<f16>::zeros(stream, &[2, 256]).unwrap();
    let mut narrow = Tensor::<f16>::zeros(stream, &[2, 128]).unwrap();
    let mut activate =
        || activation::silu_and_mul(stream, &mut narrow.view_mut(), &wide.view(), &Default::default());
    let cold = CapturedStep::capture(stream, &mut activate);
    common::say(&format!("a first call of a module: {cold:?}"));
    activate().unwrap();
    gpu.synchronize();
    // The body broke the capture without saying so.
    let waits = || {
        norm().unwrap();
        assert!(gpu.cuda.synchronize().is_err());
        Ok(())
    };
    fails(CapturedStep::capture(stream, waits), "broke the capture");
    first().unwrap();
    let step = CapturedStep::capture(stream, || norm().and_then(|()| first())).unwrap();
    step.launch(&()).unwrap();
    gpu.synchronize();
    // A step is not launched into the capture of another graph.
    let inside = CapturedStep::capture(stream, || step.launch(&()));
    fails(inside, "would not keep this step alive");
}

#[test]
fn work_of_others_is_not_captured() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let x = Tensor::from_slice(&gpu.stream, &[2, 256], &[f16::ONE; 512]).unwrap();
    let mut out = Tensor::<f16>::zeros(&gpu.stream, &[2, 256]).unwrap();
    let weight = Tensor::from_slice(&gpu.stream, &[256], &[f16::ONE; 256]).unwrap();
    let slice = gpu.cuda.clone_htod(&[f16::ONE; 512]).unwrap();
    let other = gpu.cuda.alloc_zeros::<u8>(16).unwrap();
    let stream = &gpu.stream;
    let mut norm = |x: &flashinfer_rs::TensorRef<'_>| {
        norm::rmsnorm(stream, &mut out.view_mut(), x, &weight.view(), &Default::default())
    };
    norm(&x.view()).unwrap();
    let address = other.tensor(&gpu.cuda, &[16]).unwrap().view().data_ptr() as u64;
    let foreign = || {
        // SAFETY: the slice has 16 bytes, and outlives all launches here.
        unsafe { cudarc::driver::result::memset_d8_async(address, 1, 16, gpu.cuda.cu_stream()) }.unwrap();
    };
    let refuse = |problem: Result<CapturedStep>, words: &str| {
        let problem = problem.unwrap_err().to_string();
        assert!(problem.contains(words), "{problem}");
    };
    let step = CapturedStep::capture(stream, || {
        foreign();
        norm(&x.view())
    });
    refuse(step, "capture_unchecked");
    // SAFETY: the slice is dropped last.
    let step = unsafe {
        CapturedStep::capture_unchecked(stream, || {
            foreign();
            norm(&x.view())
        })
    }
    .unwrap();
    step.launch(&()).unwrap();
    assert_eq!(gpu.cuda.clone_dtoh(&other).unwrap(), [1; 16]);
    // Another thread's work on the stream.
    let step = CapturedStep::capture(stream, || {
        std::thread::scope(|scope| scope.spawn(|| norm(&x.view())).join().unwrap())
    });
    refuse(step, "called in this thread");
    // A capture that is not the one that began.
    let step = CapturedStep::capture(stream, || {
        norm(&x.view())?;
        drop(gpu.cuda.end_capture(CUgraphInstantiate_flags(0)).unwrap());
        gpu.cuda.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        foreign();
        Ok(())
    });
    refuse(step, "began another");
    // A view of a slice.
    let guard = slice.tensor(&gpu.cuda, &[2, 256]).unwrap();
    refuse(CapturedStep::capture(stream, || norm(&guard.view())), "cannot be kept alive");
    norm(&x.view()).unwrap();
    gpu.synchronize();
}

/// Positions grow with each step, and a table of cosines and sines ends.
#[test]
fn positions_stay_below_the_rows_of_a_table() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let mut model = Model::new(&gpu, 1, Backend::Auto);
    let frequencies = RopeFrequencies::new(HEAD_DIM, 10000.0, &RopeScaling::None).unwrap();
    let cosines = CosSinCache::new(&gpu.stream, &frequencies, 6).unwrap();
    let Model { batch, tables, cache, q, kv, .. } = &mut model;
    tables.update(batch, cache).unwrap();
    let mut turn = || {
        let rotation = Rotation::new(cosines.view()?, &tables.append);
        let (q, k) = (q.view_mut(), kv[0].view_mut());
        apply_rope_pos_ids_cos_sin_cache(&gpu.stream, &mut RopeTensors::InPlace { q, k }, &rotation)
    };
    turn().unwrap();
    let step = CapturedStep::capture(&gpu.stream, &mut turn).unwrap();
    let mut launched = 0;
    for _ in 1..9 {
        batch.append([1]).unwrap();
        tables.update(batch, cache).unwrap();
        match step.launch(&()) {
            Ok(()) => launched += 1,
            Err(problem) => assert!(problem.to_string().contains("positions are below"), "{problem}"),
        }
    }
    assert_eq!(launched, 6);
    gpu.synchronize();
}
