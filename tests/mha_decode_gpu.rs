//! Paged batch decode on the GPU against the CPU reference.
//!
//! Cache slots that hold no token are NaN, and so are outputs beforehand, so
//! that whatever is read or left out by mistake shows.
#![cfg(feature = "cudarc")]

mod common;

use common::{
    Gpu, Mirrored, Number, Rng, assert_same_bits, at_hand,
    attention::{assert_lse, capture as capture_graph, refuse_caches, refuse_queries_and_outputs},
    cache::{Cache, CacheShape, LAYOUTS, random_table, repeating_table, table_among},
    is_not_at_hand, refused, say,
};
use cudarc::driver::CudaGraph;
use flashinfer_rs::{
    DType, FlashInferError, PageIndices, PageTable, TensorMut,
    attention::{
        AttentionSpec, Backend, BatchDecode, DecodePlan, Heads, Mask, PlanOptions, PosEncodingMode,
        ReplayKey, RunOptions, Split, Workspace,
    },
    cudarc::TensorExt,
    indices::{MaskIndices, MaskTable},
    kv::{KvLayout, PagedKv},
    reference,
};
use float8::F8E4M3;
use half::{bf16, f16};

/// One decode step.
#[derive(Clone, Debug)]
struct Case {
    lens: Vec<usize>,
    page_size: usize,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    layout: KvLayout,
    joined: bool,
    window_left: Option<u32>,
    soft_cap: Option<f32>,
    sm_scale: Option<f64>,
    /// Scales of quantized keys and values.
    kv_scales: Option<(f64, f32)>,
    sinks: bool,
    alibi: bool,
    backend: Backend,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            lens: vec![1, 15, 16, 17, 0, 77],
            page_size: 16,
            kv_heads: 2,
            group: 4,
            head_dim: 128,
            layout: KvLayout::Nhd,
            joined: false,
            window_left: None,
            soft_cap: None,
            sm_scale: None,
            kv_scales: None,
            sinks: false,
            alibi: false,
            backend: Backend::CudaCores,
        }
    }
}

impl Case {
    fn spec<T: Number, K: Number>(&self) -> AttentionSpec {
        let mut spec = AttentionSpec::new(T::DTYPE, self.head_dim).with_kv_dtype(K::DTYPE);
        spec.window_left = self.window_left;
        spec.logits_soft_cap = self.soft_cap;
        spec.attention_sink = self.sinks;
        if self.alibi {
            spec = spec.with_pos_encoding_mode(PosEncodingMode::Alibi);
        }
        spec.with_backend(self.backend)
    }

    fn heads(&self) -> Heads {
        Heads::new(self.kv_heads * self.group, self.kv_heads)
    }

    fn options(&self) -> RunOptions<'static> {
        let mut options = RunOptions::default();
        options.sm_scale = self.sm_scale;
        (options.k_scale, options.v_scale) = self.kv_scales.unzip();
        options
    }

    fn cache_shape(&self, pages: usize) -> CacheShape {
        CacheShape {
            pages,
            page_size: self.page_size,
            heads: self.kv_heads,
            head_dim: self.head_dim,
            layout: self.layout,
            joined: self.joined,
        }
    }

    fn q_shape(&self) -> [usize; 3] {
        [self.lens.len(), self.kv_heads * self.group, self.head_dim]
    }
}

/// A case with its tensors, and what the reference makes of them.
struct Problem<T, K> {
    case: Case,
    table: PageIndices,
    q: Mirrored<T>,
    cache: Cache<K>,
    /// Slopes and sinks of the heads, if the case has them.
    per_head: [Option<Mirrored<f32>>; 2],
    want: Vec<f64>,
    want_lse: Vec<f64>,
}

impl<T: Number, K: Number> Problem<T, K> {
    fn new(gpu: &Gpu, rng: &mut Rng, case: Case) -> Self {
        let table = random_table(rng, case.page_size, &case.lens);
        Self::with_table(gpu, rng, case, table)
    }

    fn with_table(gpu: &Gpu, rng: &mut Rng, case: Case, table: PageIndices) -> Self {
        let q = Mirrored::random(gpu, rng, &case.q_shape());
        let cache = Cache::random(gpu, rng, case.cache_shape(table.num_pages()), &table);
        let per_head = [(case.alibi, 0.1), (case.sinks, 1.0)].map(|(given, scale)| {
            given.then(|| Mirrored::random_scaled(gpu, rng, &[case.heads().num_qo_heads], scale))
        });
        Self::solve(case, table, q, cache, per_head)
    }

    /// Fills in what the reference says.
    fn solve(
        case: Case,
        table: PageIndices,
        q: Mirrored<T>,
        cache: Cache<K>,
        per_head: [Option<Mirrored<f32>>; 2],
    ) -> Self {
        let mut options = case.options();
        [options.alibi_slopes, options.sinks] =
            per_head.each_ref().map(|tensor| tensor.as_ref().map(Mirrored::view));
        let [batch, heads, head_dim] = case.q_shape();
        let mut want = vec![f64::NAN; batch * heads * head_dim];
        let mut want_lse = vec![f64::NAN; batch * heads];
        reference::batch_decode(
            &case.spec::<T, K>(),
            &q.view(),
            &cache.view(),
            &table,
            &mut TensorMut::from_slice(&mut want, &[batch, heads, head_dim]).unwrap(),
            Some(&mut TensorMut::from_slice(&mut want_lse, &[batch, heads]).unwrap()),
            &options,
        )
        .unwrap();
        Self { case, table, q, cache, per_head, want, want_lse }
    }

    fn outputs(&self, gpu: &Gpu) -> (Mirrored<T>, Mirrored<f32>) {
        let [batch, heads, head_dim] = self.case.q_shape();
        (Mirrored::poisoned(gpu, &[batch, heads, head_dim]), Mirrored::poisoned(gpu, &[batch, heads]))
    }

    /// Plans and runs eagerly, compares with the reference, and says whether
    /// the plan split requests.
    #[track_caller]
    fn check(&self, gpu: &Gpu, decode: &BatchDecode, workspace: &mut Workspace) -> bool {
        let table = PageTable::new(&gpu.stream, self.table.clone()).unwrap();
        let plan = decode.plan(workspace, &table, &PlanOptions::default()).unwrap();
        self.check_run(gpu, &plan);
        plan.splits_kv()
    }

    /// Runs a plan and compares with the reference.
    #[track_caller]
    fn check_run(&self, gpu: &Gpu, plan: &DecodePlan<'_>) -> (Vec<T>, Vec<f32>) {
        let (mut out, mut lse) = self.outputs(gpu);
        self.run(plan, &mut out, Some(&mut lse), &self.case.options());
        self.verify(&out, Some(&lse));
        (out.download(), lse.download())
    }

    #[track_caller]
    fn run(
        &self,
        plan: &DecodePlan<'_>,
        out: &mut Mirrored<T>,
        lse: Option<&mut Mirrored<f32>>,
        options: &RunOptions<'_>,
    ) {
        let mut lse = lse.map(|lse| lse.device_view_mut());
        let per_head =
            self.per_head.each_ref().map(|tensor| tensor.as_ref().map(|tensor| tensor.device_view()));
        let mut options = *options;
        [options.alibi_slopes, options.sinks] = per_head;
        plan.run_with(
            &self.q.device_view(),
            &self.cache.device_view(),
            &mut out.device_view_mut(),
            lse.as_mut(),
            &options,
        )
        .unwrap();
    }

    #[track_caller]
    fn verify(&self, out: &Mirrored<T>, lse: Option<&Mirrored<f32>>) {
        let what = format!("decode {:?}", self.case);
        // The reference reads the same keys and values, so their dtype does not
        // widen the bound.
        out.assert_close(&what, &self.want, T::BOUND);
        if let Some(lse) = lse {
            assert_lse(&what, lse, &self.want_lse);
        }
    }
}

/// The decode of a case, if its module is [`at_hand`].
#[track_caller]
fn decode_of<T: Number, K: Number>(gpu: &Gpu, case: &Case) -> Option<BatchDecode> {
    at_hand(gpu, BatchDecode::new(&gpu.stream, &case.spec::<T, K>(), case.heads()))
}

/// The decode of a case; `None`, said on stderr, if no source holds its module.
fn optional_decode_of<T: Number, K: Number>(gpu: &Gpu, case: &Case) -> Option<BatchDecode> {
    let spec = case.spec::<T, K>();
    match BatchDecode::new(&gpu.stream, &spec, case.heads()) {
        Ok(decode) => Some(decode),
        Err(reason) if is_not_at_hand(&reason) => {
            say(&format!("skipped: no source holds the module of {spec:?}: {reason}"));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Lengths around the ends of pages, length 1, and a request without tokens.
fn ragged(page_size: usize) -> Vec<usize> {
    vec![1, page_size, page_size + 1, 0, (page_size - 1).max(1), 3 * page_size + 5, 131]
}

fn shapes<T: Number>(head_dim: usize) {
    shapes_on::<T>(Backend::CudaCores, &[1, 2, 3, 4, 8], head_dim);
}

fn shapes_on<T: Number>(backend: Backend, groups: &[usize], head_dim: usize) {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for &group in groups {
        for page_size in [1, 16, 64] {
            for (layout, joined) in LAYOUTS.into_iter().flat_map(|layout| [(layout, false), (layout, true)]) {
                let case = Case {
                    lens: ragged(page_size),
                    page_size,
                    group,
                    head_dim,
                    layout,
                    joined,
                    backend,
                    ..Case::default()
                };
                let Some(decode) = (match head_dim {
                    64 | 128 if backend != Backend::Fa3 => decode_of::<T, T>(&gpu, &case),
                    _ => optional_decode_of::<T, T>(&gpu, &case),
                }) else {
                    return;
                };
                Problem::<T, T>::new(&gpu, rng, case).check(&gpu, &decode, &mut workspace);
            }
        }
    }
}

/// Decode through prefill, with group sizes that the kernel on CUDA cores has
/// not, too.
#[test]
fn f16_on_tensor_cores() {
    for head_dim in [64, 128, 256] {
        shapes_on::<f16>(Backend::Fa2, &[1, 4, 5, 7, 8, 16], head_dim);
    }
}

#[test]
fn bf16_on_tensor_cores() {
    for head_dim in [64, 128, 256] {
        shapes_on::<bf16>(Backend::Fa2, &[1, 6, 8, 12], head_dim);
    }
}

/// Whether FlashAttention 3 can run here; else says why not.
fn has_fa3() -> bool {
    let Some(gpu) = Gpu::start() else { return false };
    let case = Case { backend: Backend::Fa3, ..Case::default() };
    let hopper = gpu.runtime.compute_capability(0).unwrap().0 == 9;
    if !hopper {
        say("skipped: FlashAttention 3 needs compute capability 9.0");
    }
    hopper && optional_decode_of::<f16, f16>(&gpu, &case).is_some()
}

#[test]
fn on_fa3() {
    if has_fa3() {
        for head_dim in [64, 128] {
            shapes_on::<f16>(Backend::Fa3, &[1, 4, 5], head_dim);
            shapes_on::<bf16>(Backend::Fa3, &[3, 8], head_dim);
        }
    }
}

#[test]
fn graph_replay_on_fa3() {
    if has_fa3() {
        graph_replay(Backend::Fa3);
    }
}

/// What is picked, and that it can be asked for.
#[test]
fn backends() {
    let Some(gpu) = Gpu::start() else { return };
    let picked = |backend, group| {
        decode_of::<f16, f16>(&gpu, &Case { backend, group, ..Case::default() }).unwrap().backend()
    };
    for group in [1, 2] {
        assert_eq!(picked(Backend::Auto, group), Backend::CudaCores);
    }
    for group in [3, 4, 5, 8, 16] {
        assert_eq!(picked(Backend::Auto, group), Backend::Fa2);
    }
    assert_eq!([picked(Backend::Fa2, 1), picked(Backend::CudaCores, 8)], [Backend::Fa2, Backend::CudaCores]);
    for (group, expected) in [(1, Backend::CudaCores), (2, Backend::Fa2)] {
        let case = Case { backend: Backend::Auto, group, ..Case::default() };
        let Some(decode) = optional_decode_of::<bf16, F8E4M3>(&gpu, &case) else { return };
        assert_eq!(decode.backend(), expected);
    }
}

#[test]
fn f16_64() {
    shapes::<f16>(64);
}

#[test]
fn f16_128() {
    shapes::<f16>(128);
}

#[test]
fn f16_256() {
    shapes::<f16>(256);
}

#[test]
fn bf16_64() {
    shapes::<bf16>(64);
}

#[test]
fn bf16_128() {
    shapes::<bf16>(128);
}

#[test]
fn bf16_256() {
    shapes::<bf16>(256);
}

/// Requests, heads and pages at random, on both kernels.
#[test]
fn random_batches() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for _ in 0..24 {
        let page_size = [1, 2, 5, 16, 64, 128][rng.below(6)];
        let longest = [20, 300, 4000][rng.below(3)];
        let lens = (0..1 + rng.below(12)).map(|_| match rng.below(5) {
            0 => 0,
            1 => page_size * (1 + rng.below(3)),
            _ => 1 + rng.below(longest),
        });
        let case = Case {
            lens: lens.collect(),
            page_size,
            kv_heads: [1, 2, 3, 4, 8][rng.below(5)],
            group: [1, 2, 3, 4, 8][rng.below(5)],
            head_dim: [64, 128][rng.below(2)],
            layout: LAYOUTS[rng.below(2)],
            joined: rng.below(2) == 0,
            ..Case::default()
        };
        for backend in [Backend::CudaCores, Backend::Fa2] {
            let case = Case { backend, ..case.clone() };
            let Some(f16s) = decode_of::<f16, f16>(&gpu, &case) else { return };
            let Some(bf16s) = decode_of::<bf16, bf16>(&gpu, &case) else { return };
            Problem::<f16, f16>::new(&gpu, rng, case.clone()).check(&gpu, &f16s, &mut workspace);
            Problem::<bf16, bf16>::new(&gpu, rng, case).check(&gpu, &bf16s, &mut workspace);
        }
    }
}

/// One long request is divided among blocks, also beside short and empty ones.
#[test]
fn split_kv() {
    fn run<T: Number>(gpu: &Gpu, rng: &mut Rng, lens: &[usize], page_size: usize) {
        let case = Case { lens: lens.to_vec(), page_size, kv_heads: 8, ..Case::default() };
        let Some(decode) = decode_of::<T, T>(gpu, &case) else { return };
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let splits = Problem::<T, T>::new(gpu, rng, case).check(gpu, &decode, &mut workspace);
        assert!(splits, "{lens:?} in pages of {page_size} was not split");
    }
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    run::<f16>(&gpu, rng, &[20_000], 16);
    run::<bf16>(&gpu, rng, &[20_000], 64);
    run::<f16>(&gpu, rng, &[3, 5_001, 0, 4_096, 1], 1);
}

/// Contexts of 131072 tokens with few heads, which all blocks share.
fn long_context<T: Number>(backend: Backend) {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for (page_size, group, lens) in
        [(16, 1, vec![131_072]), (64, 8, vec![131_071, 3, 0, 65]), (1, 4, vec![1, 131_072])]
    {
        let case = Case { lens, page_size, kv_heads: 1, group, backend, ..Case::default() };
        let Some(decode) = decode_of::<T, T>(&gpu, &case) else { return };
        let problem = Problem::<T, T>::new(&gpu, rng, case);
        assert!(problem.check(&gpu, &decode, &mut workspace), "{:?} was not split", problem.case);
    }
}

#[test]
fn long_context_on_cuda_cores() {
    long_context::<f16>(Backend::CudaCores);
    long_context::<bf16>(Backend::CudaCores);
}

#[test]
fn long_context_on_tensor_cores() {
    long_context::<f16>(Backend::Fa2);
    long_context::<bf16>(Backend::Fa2);
}

/// A batch that fills the GPU is not split, but for captured launches on
/// tensor cores, which always are.
#[test]
fn large_batch() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let lens: Vec<usize> = (0..1024).map(|_| rng.below(40)).collect();
    for (backend, group) in [(Backend::CudaCores, 1), (Backend::Fa2, 1), (Backend::Fa2, 4)] {
        let case = Case { lens: lens.clone(), kv_heads: 8, group, head_dim: 64, backend, ..Case::default() };
        let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, case);
        let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for graph in [None, Some(table.host().batch_size())] {
            let plan = decode.plan(&mut workspace, &table, &options_of(graph)).unwrap();
            let splits = backend == Backend::Fa2 && graph.is_some();
            assert_eq!(plan.splits_kv(), splits, "{backend:?}, {graph:?}: {:?}", plan.numbers());
            problem.check_run(&gpu, &plan);
        }
    }
}

/// The output has the same bits with and without LSE, and with and without
/// programmatic dependent launch.
#[test]
fn lse_and_pdl_change_nothing() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for lens in [vec![1, 16, 33, 0], vec![6000, 2]] {
        let case = Case { lens, ..Case::default() };
        let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, case);
        let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
        let (want, _) = problem.check_run(&gpu, &plan);
        let dependent = gpu.runtime.compute_capability(0).unwrap().0 >= 9;
        for enable_pdl in [Some(false), dependent.then_some(true)] {
            let (mut out, _) = problem.outputs(&gpu);
            let mut options = problem.case.options();
            options.enable_pdl = enable_pdl;
            problem.run(&plan, &mut out, None, &options);
            assert_same_bits("without LSE", &out.download(), &want);
        }
    }
}

#[test]
fn sm_scale() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for sm_scale in [0.0, 0.01, 0.5, -0.1] {
        let case = Case { sm_scale: Some(sm_scale), ..Case::default() };
        let Some(decode) = decode_of::<bf16, bf16>(&gpu, &case) else { return };
        Problem::<bf16, bf16>::new(&gpu, rng, case).check(&gpu, &decode, &mut workspace);
    }
    let problem = Problem::<bf16, bf16>::new(&gpu, rng, Case::default());
    let Some(decode) = decode_of::<bf16, bf16>(&gpu, &problem.case) else { return };
    let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
    let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
    let (mut out, _) = problem.outputs(&gpu);
    for sm_scale in [f64::NAN, f64::INFINITY] {
        let (q, cache, options) =
            (problem.q.device_view(), problem.cache.device_view(), RunOptions::with_sm_scale(sm_scale));
        let call = plan.run_with(&q, &cache, &mut out.device_view_mut(), None, &options);
        refused(call, "sm_scale");
    }
    out.assert_untouched();
}

/// Queries as the first heads of a joined query-key-value projection.
#[test]
fn strided_queries() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let case = Case::default();
    let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let [batch, heads, head_dim] = case.q_shape();
    let table = random_table(rng, case.page_size, &case.lens);
    let cache = Cache::random(&gpu, rng, case.cache_shape(table.num_pages()), &table);
    let q = Mirrored::<f16>::random(&gpu, rng, &[batch, heads + 4, head_dim]).narrowed(1, 0, heads);
    Problem::<f16, f16>::solve(case, table, q, cache, [None, None]).check(&gpu, &decode, &mut workspace);
}

/// Requests that begin with the same pages.
#[test]
fn shared_pages() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let case = Case { lens: vec![40, 50, 32], ..Case::default() };
    let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
    let requests = [(&[5, 2, 0][..], 40), (&[5, 2, 7, 1][..], 50), (&[5, 2][..], 32)];
    let table = PageIndices::from_requests(9, 16, requests).unwrap();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    Problem::<f16, f16>::with_table(&gpu, rng, case, table).check(&gpu, &decode, &mut workspace);
}

/// Sliding windows: shorter and longer than requests, at and beside page ends,
/// and in a request that is split.
#[test]
fn sliding_window() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for window_left in [0, 1, 15, 16, 17, 76, 1000] {
        for lens in [Case::default().lens, vec![5000, 3]] {
            let case = Case { lens, window_left: Some(window_left), ..Case::default() };
            let Some(decode) = optional_decode_of::<bf16, bf16>(&gpu, &case) else { return };
            Problem::<bf16, bf16>::new(&gpu, rng, case).check(&gpu, &decode, &mut workspace);
        }
    }
}

/// Soft caps that bend the logits much and little.
#[test]
fn logits_soft_cap() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for soft_cap in [1.0, 5.0, 50.0] {
        for lens in [Case::default().lens, vec![5000, 3]] {
            let case = Case { lens, soft_cap: Some(soft_cap), sm_scale: Some(0.15), ..Case::default() };
            let Some(decode) = optional_decode_of::<bf16, bf16>(&gpu, &case) else { return };
            Problem::<bf16, bf16>::new(&gpu, rng, case).check(&gpu, &decode, &mut workspace);
        }
    }
}

/// Both, as Gemma has them.
#[test]
fn sliding_window_and_soft_cap() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for (window_left, soft_cap, lens) in [(15, 50.0, vec![1, 16, 17, 100, 0]), (1023, 30.0, vec![3000])] {
        let case = Case {
            lens,
            head_dim: 256,
            group: 2,
            window_left: Some(window_left),
            soft_cap: Some(soft_cap),
            ..Case::default()
        };
        let Some(decode) = optional_decode_of::<bf16, bf16>(&gpu, &case) else { return };
        Problem::<bf16, bf16>::new(&gpu, rng, case).check(&gpu, &decode, &mut workspace);
    }
}

/// No module of FlashInfer's wheels has ALiBi; one that is at hand is tested.
#[test]
fn alibi() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for backend in [Backend::CudaCores, Backend::Fa2] {
        for lens in [ragged(16), vec![5_000, 3]] {
            let case = Case { lens, alibi: true, backend, ..Case::default() };
            let Some(decode) = optional_decode_of::<f16, f16>(&gpu, &case) else { return };
            Problem::<f16, f16>::new(&gpu, rng, case).check(&gpu, &decode, &mut workspace);
        }
    }
}

/// Sinks, on the kernels that have them.
#[test]
fn attention_sinks() {
    let has_fa3 = has_fa3();
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for (lens, window_left) in [(ragged(16), None), (vec![6000, 1, 0, 300], Some(127)), (vec![9000], None)] {
        for backend in [Backend::Auto, Backend::Fa2, Backend::Fa3] {
            let case = Case {
                lens: lens.clone(),
                head_dim: 64,
                group: 8,
                sinks: true,
                window_left,
                backend,
                ..Case::default()
            };
            if backend == Backend::Fa3 && !has_fa3 {
                continue;
            }
            let Some(decode) = optional_decode_of::<bf16, bf16>(&gpu, &case) else { return };
            assert_ne!(decode.backend(), Backend::CudaCores);
            let splits = Problem::<bf16, bf16>::new(&gpu, rng, case).check(&gpu, &decode, &mut workspace);
            assert!(!splits || decode.backend() == Backend::Fa2);
        }
    }
    let spec = AttentionSpec::new(DType::BF16, 64).with_attention_sink().with_backend(Backend::CudaCores);
    let error = BatchDecode::new(&gpu.stream, &spec, Heads::new(8, 8)).unwrap_err();
    assert!(matches!(error, FlashInferError::Unsupported { .. }), "{error}");
}

fn e4m3_cache<T: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for (page_size, group, layout) in [(1, 1, KvLayout::Nhd), (16, 4, KvLayout::Hnd), (64, 8, KvLayout::Nhd)]
    {
        for lens in [ragged(page_size), vec![5000, 3]] {
            let plain = Case { lens, page_size, group, layout, joined: group == 4, ..Case::default() };
            for backend in [Backend::CudaCores, Backend::Fa2] {
                for kv_scales in [None, Some((0.6, 2.7))] {
                    let case = Case { backend, kv_scales, ..plain.clone() };
                    let Some(decode) = optional_decode_of::<T, F8E4M3>(&gpu, &case) else { return };
                    Problem::<T, F8E4M3>::new(&gpu, rng, case).check(&gpu, &decode, &mut workspace);
                }
            }
        }
    }
}

#[test]
fn f16_over_e4m3_cache() {
    e4m3_cache::<f16>();
}

#[test]
fn bf16_over_e4m3_cache() {
    e4m3_cache::<bf16>();
}

/// Offsets in a cache of more than 2³² elements are 64-bit.
#[test]
fn cache_beyond_32_bits() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    // The same two pages, once as a small cache and once as the first and the
    // last page of 8 GiB.
    let case = Case { lens: vec![32], kv_heads: 8, joined: true, ..Case::default() };
    let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
    let small_table = PageIndices::from_requests(2, 16, [(&[1, 0][..], 32)]).unwrap();
    let problem = Problem::<f16, f16>::with_table(&gpu, rng, case, small_table);
    let page = 2 * 16 * 8 * 128;
    let pages = (1usize << 32) / page + 2;
    let mut storage = gpu.cuda.alloc_zeros::<f16>(pages * page).unwrap();
    let (first, last) = problem.cache.tensors[0].host.split_at(page);
    gpu.cuda.memcpy_htod(first, &mut storage.slice_mut(..page)).unwrap();
    gpu.cuda.memcpy_htod(last, &mut storage.slice_mut((pages - 1) * page..)).unwrap();
    let table = PageIndices::from_requests(pages, 16, [(&[pages as i32 - 1, 0][..], 32)]).unwrap();
    let table = PageTable::new(&gpu.stream, table).unwrap();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
    let (mut out, mut lse) = problem.outputs(&gpu);
    plan.run_with(
        &problem.q.device_view(),
        &PagedKv::joined(storage.tensor(&gpu.cuda, &[pages, 2, 16, 8, 128]).unwrap().view(), KvLayout::Nhd)
            .unwrap(),
        &mut out.device_view_mut(),
        Some(&mut lse.device_view_mut()),
        &problem.case.options(),
    )
    .unwrap();
    problem.verify(&out, Some(&lse));
}

#[test]
fn empty_batches() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for lens in [vec![0; 3], vec![0]] {
        let case = Case { lens, ..Case::default() };
        let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, case);
        let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
        for graph in [None, Some(table.host().batch_size())] {
            let plan = decode.plan(&mut workspace, &table, &options_of(graph)).unwrap();
            problem.check_run(&gpu, &plan);
        }
    }
    // Without requests a run does nothing, but still looks at its arguments.
    let case = Case { lens: vec![], ..Case::default() };
    let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
    let problem = Problem::<f16, f16>::new(&gpu, rng, case);
    let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
    let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
    assert!(plan.numbers().is_empty() && !plan.splits_kv());
    problem.check_run(&gpu, &plan);
    let one = Mirrored::<f16>::random(&gpu, rng, &[1, 8, 128]);
    let (mut out, _) = problem.outputs(&gpu);
    let call = plan.run(&one.device_view(), &problem.cache.device_view(), &mut out.device_view_mut());
    refused(call, "q");
}

/// One plan serves all layers of a step, each with its own queries and cache.
#[test]
fn layers_share_a_plan() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for lens in [Case::default().lens, vec![3000, 1, 0]] {
        let case = Case { lens, kv_heads: 8, ..Case::default() };
        let Some(decode) = decode_of::<bf16, bf16>(&gpu, &case) else { return };
        let indices = random_table(rng, case.page_size, &case.lens);
        let layers: Vec<_> = (0..4)
            .map(|_| Problem::<bf16, bf16>::with_table(&gpu, rng, case.clone(), indices.clone()))
            .collect();
        let table = PageTable::new(&gpu.stream, indices).unwrap();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
        let mut outputs: Vec<_> = layers.iter().map(|layer| layer.outputs(&gpu)).collect();
        // All are enqueued before the first is looked at.
        for (layer, (out, lse)) in layers.iter().zip(&mut outputs) {
            layer.run(&plan, out, Some(lse), &case.options());
        }
        for (layer, (out, lse)) in layers.iter().zip(&outputs) {
            layer.verify(out, Some(lse));
        }
    }
}

/// Steps of different lengths that follow each other without waiting, each
/// planned on the workspace of the one before.
#[test]
fn steps_share_a_workspace() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let case = Case { kv_heads: 8, ..Case::default() };
    let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
    let steps: Vec<_> = [vec![900, 3, 0], vec![1, 1, 1], vec![17, 2500, 64], vec![0, 0, 5]]
        .map(|lens| Problem::<f16, f16>::new(&gpu, rng, Case { lens, ..case.clone() }))
        .into_iter()
        .collect();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let mut table = PageTable::with_capacity(&gpu.stream, steps[0].table.clone(), 3, 200).unwrap();
    for _ in 0..5 {
        let mut outputs: Vec<_> = steps.iter().map(|step| step.outputs(&gpu)).collect();
        for (step, (out, lse)) in steps.iter().zip(&mut outputs) {
            table.update(step.table.clone()).unwrap();
            let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
            step.run(&plan, out, Some(lse), &case.options());
        }
        for (step, (out, lse)) in steps.iter().zip(&outputs) {
            step.verify(out, Some(lse));
        }
    }
}

/// Workspaces and tables are dropped while the work that uses them waits, and
/// others take their memory at once, on this stream and on another.
#[test]
fn buffers_are_freed_after_their_last_use() {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.fork());
    let case = Case { lens: vec![3000, 1, 0, 700], kv_heads: 8, ..Case::default() };
    let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
    let problem = Problem::<f16, f16>::new(&gpu, rng, case.clone());
    let indices = random_table(rng, case.page_size, &[17, 900, 64, 5]);
    problem.check(&gpu, &decode, &mut Workspace::new(&gpu.stream).unwrap()); // loads the kernel
    let mut busy = gpu.cuda.alloc_zeros::<u8>(1 << 30).unwrap();
    let mut outputs: Vec<_> = (0..20).map(|_| problem.outputs(&gpu)).collect();
    gpu.synchronize();
    for (out, lse) in &mut outputs {
        gpu.cuda.memset_zeros(&mut busy).unwrap(); // what the run waits for
        let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
        problem.run(&plan, out, Some(lse), &case.options());
        drop((workspace, table));
        for stream in [&gpu.stream, &other.stream] {
            let table = PageTable::new(stream, indices.clone()).unwrap();
            decode.plan(&mut Workspace::new(stream).unwrap(), &table, &PlanOptions::default()).unwrap();
        }
    }
    outputs.iter().for_each(|(out, lse)| problem.verify(out, Some(lse)));
}

/// A captured step: the graph, the plan's numbers, and the tensors that the
/// graph works on.
struct Captured<T> {
    graph: CudaGraph,
    key: Option<ReplayKey>,
    q: Mirrored<T>,
    cache: Cache<T>,
    out: Mirrored<T>,
    lse: Mirrored<f32>,
}

/// Captures one run for batches of the case's size in a cache of this many
/// pages.
fn capture<T: Number>(
    gpu: &Gpu,
    decode: &BatchDecode,
    case: &Case,
    pages: usize,
    workspace: &mut Workspace,
    table: &PageTable,
) -> Captured<T> {
    let [batch, heads, _] = case.q_shape();
    let q = Mirrored::poisoned(gpu, &case.q_shape());
    let cache = Cache::poisoned(gpu, case.cache_shape(pages));
    let mut out = Mirrored::poisoned(gpu, &case.q_shape());
    let mut lse = Mirrored::poisoned(gpu, &[batch, heads]);
    let plan = decode.plan(workspace, table, &for_graph(table)).unwrap();
    let key = plan.replay_key().ok();
    let graph = {
        let (q, cache) = (q.device_view(), cache.device_view());
        let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
        let (graph, run) = capture_graph(gpu, || {
            plan.run_with(&q, &cache, &mut out.reborrow(), Some(&mut lse.reborrow()), &case.options())
        });
        run.unwrap();
        graph.expect("a graph")
    };
    out.assert_untouched(); // captured is not run
    Captured { graph, key, q, cache, out, lse }
}

impl<T: Number> Captured<T> {
    /// Replays for a problem: updates the table, plans, uploads, launches,
    /// compares with the reference, with the same plan run directly, and with
    /// an eager plan.
    #[track_caller]
    fn replay(
        &mut self,
        gpu: &Gpu,
        decode: &BatchDecode,
        problem: &Problem<T, T>,
        workspace: &mut Workspace,
        table: &mut PageTable,
    ) {
        table.update(problem.table.clone()).unwrap();
        self.q.upload(&problem.q.host);
        for (tensor, source) in self.cache.tensors.iter_mut().zip(&problem.cache.tensors) {
            tensor.upload(&source.host);
        }
        self.out.upload(&vec![T::POISON; self.out.host.len()]);
        self.lse.upload(&vec![f32::NAN; self.lse.host.len()]);
        let plan = decode.plan(workspace, table, &for_graph(table)).unwrap();
        assert_eq!(plan.replay_key().ok(), self.key);
        self.graph.launch().unwrap();
        problem.verify(&self.out, Some(&self.lse));
        let (direct, direct_lse) = problem.check_run(gpu, &plan);
        assert_same_bits("replay and run", &self.out.download(), &direct);
        assert_same_bits("replay and run: LSE", &self.lse.download(), &direct_lse);
        problem.check(gpu, decode, &mut Workspace::new(&gpu.stream).unwrap());
    }
}

/// Replays with other lengths, and with fewer requests than were captured.
fn graph_replay(backend: Backend) {
    fn run<T: Number>(gpu: &Gpu, rng: &mut Rng, backend: Backend, layout: KvLayout, joined: bool) {
        const PAGES: usize = 400;
        let case = Case { kv_heads: 8, layout, joined, backend, ..Case::default() };
        let batch = case.lens.len();
        let Some(decode) = decode_of::<T, T>(gpu, &case) else { return };
        let first = table_among(rng, PAGES, case.page_size, &case.lens);
        let mut table = PageTable::with_capacity(&gpu.stream, first, batch, PAGES).unwrap();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let mut captured = capture::<T>(gpu, &decode, &case, PAGES, &mut workspace, &table);
        for lens in [
            vec![1, 15, 16, 17, 0, 77],
            vec![2, 16, 17, 18, 1, 78],
            vec![3000, 1, 1, 1, 1, 1],
            vec![700, 0, 31],
            vec![5],
            vec![],
            vec![64; 6],
        ] {
            let table_of_step = table_among(rng, PAGES, case.page_size, &lens).pad_to(batch).unwrap();
            let mut padded = lens;
            padded.resize(batch, 0);
            let step = Case { lens: padded, ..case.clone() };
            let problem = Problem::<T, T>::with_table(gpu, rng, step, table_of_step);
            captured.replay(gpu, &decode, &problem, &mut workspace, &mut table);
        }
    }
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    run::<f16>(&gpu, rng, backend, KvLayout::Nhd, false);
    run::<bf16>(&gpu, rng, backend, KvLayout::Hnd, true);
}

#[test]
fn graph_replay_on_cuda_cores() {
    graph_replay(Backend::CudaCores);
}

#[test]
fn graph_replay_on_tensor_cores() {
    graph_replay(Backend::Fa2);
}

/// One graph for few heads over short and very long contexts, whose tokens are
/// divided among the blocks of the captured launch.
fn graph_of_long_contexts(backend: Backend) {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    const PAGES: usize = 8300;
    for group in [1, 8] {
        let case = Case { lens: vec![20; 2], kv_heads: 1, group, backend, ..Case::default() };
        let Some(decode) = decode_of::<bf16, bf16>(&gpu, &case) else { return };
        let first = table_among(rng, PAGES, case.page_size, &case.lens);
        let mut table = PageTable::with_capacity(&gpu.stream, first, 2, PAGES).unwrap();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let mut captured = capture::<bf16>(&gpu, &decode, &case, PAGES, &mut workspace, &table);
        for lens in [[131_072, 1], [5, 0], [70_000, 61_001], [0, 131_072], [20, 20]] {
            let table_of_step = table_among(rng, PAGES, case.page_size, &lens);
            let step = Case { lens: lens.to_vec(), ..case.clone() };
            let problem = Problem::<bf16, bf16>::with_table(&gpu, rng, step, table_of_step);
            captured.replay(&gpu, &decode, &problem, &mut workspace, &mut table);
        }
    }
}

#[test]
fn graph_of_long_contexts_on_cuda_cores() {
    graph_of_long_contexts(Backend::CudaCores);
}

#[test]
fn graph_of_long_contexts_on_tensor_cores() {
    graph_of_long_contexts(Backend::Fa2);
}

/// One request that takes every block of the captured launch, beside 31 that
/// are padding: each of those needs a block too.
#[test]
fn graph_with_padding_and_one_long_request() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    const PAGES: usize = 64;
    for (backend, group) in [(Backend::CudaCores, 1), (Backend::CudaCores, 4), (Backend::Fa2, 4)] {
        let case = Case { lens: vec![20; 32], kv_heads: 8, group, backend, ..Case::default() };
        let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
        let first = repeating_table(rng, PAGES, case.page_size, &case.lens);
        let mut table = PageTable::with_capacity(&gpu.stream, first, 32, 4000).unwrap();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let mut captured = capture::<f16>(&gpu, &decode, &case, PAGES, &mut workspace, &table);
        for long_at in [0, 31] {
            let mut lens = vec![0; 32];
            lens[long_at] = 40_000;
            let table_of_step = repeating_table(rng, PAGES, case.page_size, &lens);
            let problem = Problem::with_table(&gpu, rng, Case { lens, ..case.clone() }, table_of_step);
            captured.replay(&gpu, &decode, &problem, &mut workspace, &mut table);
        }
        let table_of_step = repeating_table(rng, PAGES, case.page_size, &case.lens);
        let problem = Problem::with_table(&gpu, rng, case.clone(), table_of_step);
        captured.replay(&gpu, &decode, &problem, &mut workspace, &mut table);
    }
}

/// Options for a graph of so many requests, or none.
fn options_of(graph: Option<usize>) -> PlanOptions<'static> {
    let mut options = PlanOptions::default();
    options.graph = graph;
    options
}

/// Options for a graph of the table's requests.
fn for_graph(table: &PageTable) -> PlanOptions<'static> {
    options_of(Some(table.host().batch_size()))
}

/// Which plans a captured graph may be replayed after.
#[test]
fn can_replay() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let case = Case { lens: vec![10, 20, 30], kv_heads: 8, ..Case::default() };
    let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let first = table_among(rng, 50, case.page_size, &case.lens);
    let mut table = PageTable::with_capacity(&gpu.stream, first, 4, 50).unwrap();
    let mut plan_of = |decode: &BatchDecode, table: &PageTable, options: &PlanOptions<'_>| {
        let plan = decode.plan(&mut workspace, table, options).unwrap();
        plan.replay_key().ok()
    };
    let captured = plan_of(&decode, &table, &for_graph(&table));
    assert!(captured.is_some());
    assert_eq!(plan_of(&decode, &table, &for_graph(&table)), captured);
    assert_eq!(plan_of(&decode, &table, &PlanOptions::default()), None);
    for other in [Case { group: 1, ..case.clone() }, Case { backend: Backend::Fa2, ..case.clone() }] {
        let Some(other) = decode_of::<f16, f16>(&gpu, &other) else { return };
        assert_ne!(plan_of(&other, &table, &for_graph(&table)), captured);
    }

    // Launches have the batch size baked in.
    for lens in [&[10, 20][..], &[10, 20, 30, 40]] {
        table.update(table_among(rng, 50, case.page_size, lens)).unwrap();
        let plan = decode.plan(&mut workspace, &table, &for_graph(&table)).unwrap();
        assert_ne!(plan.replay_key().ok(), captured, "captured for 3 requests, planned for {}", lens.len());
    }
}

/// Two threads, each with a stream, a workspace and tables of its own.
#[test]
fn two_streams_at_once() {
    fn work(gpu: &Gpu, mut rng: Rng, group: usize) {
        let case = Case { kv_heads: 8, group, ..Case::default() };
        let Some(decode) = decode_of::<f16, f16>(gpu, &case) else { return };
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let problems = [vec![1, 40, 0, 300], vec![4000, 7, 7, 7], vec![17, 16, 15, 64]]
            .map(|lens| Problem::<f16, f16>::new(gpu, &mut rng, Case { lens, ..case.clone() }));
        let mut table = PageTable::with_capacity(&gpu.stream, problems[0].table.clone(), 4, 300).unwrap();
        let mut first: Vec<(Vec<f16>, Vec<f32>)> = Vec::new();
        for iteration in 0..150 {
            let at = iteration % problems.len();
            let problem = &problems[at];
            table.update(problem.table.clone()).unwrap();
            let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
            if iteration < problems.len() {
                first.push(problem.check_run(gpu, &plan));
                continue;
            }
            let (mut out, mut lse) = problem.outputs(gpu);
            for _ in 0..4 {
                problem.run(&plan, &mut out, Some(&mut lse), &case.options());
            }
            assert_same_bits("output", &out.download(), &first[at].0);
            assert_same_bits("LSE", &lse.download(), &first[at].1);
        }
    }
    let Some(gpu) = Gpu::start() else { return };
    let other = gpu.fork();
    let (rng, other_rng) = (Rng::new(), Rng::new());
    std::thread::scope(|scope| {
        let threads = [scope.spawn(|| work(&gpu, rng, 4)), scope.spawn(|| work(&other, other_rng, 1))];
        for thread in threads {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
}

/// What tests of wrong input start from.
struct Bench {
    gpu: Gpu,
    other: Gpu,
    rng: Rng,
    problem: Problem<f16, f16>,
}

impl Bench {
    fn start() -> Option<Self> {
        Gpu::start().map(Self::on)
    }

    fn on(gpu: Gpu) -> Self {
        let (mut rng, other) = (Rng::new(), gpu.fork());
        let problem = Problem::new(&gpu, &mut rng, Case { lens: vec![5, 20, 0], ..Case::default() });
        Self { gpu, other, rng, problem }
    }
}

#[test]
fn wrong_queries_and_outputs() {
    let Some(Bench { gpu, other, mut rng, problem }) = Bench::start() else { return };
    let rng = &mut rng;
    let Some(decode) = decode_of::<f16, f16>(&gpu, &problem.case) else { return };
    let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
    let cache = problem.cache.device_view();
    refuse_queries_and_outputs(&gpu, &other, rng, &problem.q, &mut |q, out, lse| {
        plan.run_with(q, &cache, out, lse, &RunOptions::default())
    });
    // The refused calls left everything usable.
    problem.check_run(&gpu, &plan);
}

#[test]
fn wrong_caches() {
    let Some(Bench { gpu, other, mut rng, problem }) = Bench::start() else { return };
    let rng = &mut rng;
    let Some(decode) = decode_of::<f16, f16>(&gpu, &problem.case) else { return };
    let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
    let (mut out, mut lse) = problem.outputs(&gpu);
    {
        let q = problem.q.device_view();
        let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
        refuse_caches(&gpu, &other, rng, problem.table.num_pages(), &mut |kv| {
            let options = RunOptions::default();
            plan.run_with(&q, kv, &mut out.reborrow(), Some(&mut lse.reborrow()), &options)
        });
    }
    out.assert_untouched();
    lse.assert_untouched();
    // The refused calls left everything usable.
    problem.check_run(&gpu, &plan);
}

#[test]
fn wrong_plans() {
    let Some(Bench { gpu, other, problem, .. }) = Bench::start() else { return };
    let Some(decode) = decode_of::<f16, f16>(&gpu, &problem.case) else { return };
    let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let new = |backend, num_qo_heads, num_kv_heads| {
        let spec = problem.case.spec::<f16, f16>().with_backend(backend);
        BatchDecode::new(&gpu.stream, &spec, Heads::new(num_qo_heads, num_kv_heads))
    };
    for (num_qo_heads, num_kv_heads) in [(7, 2), (0, 2), (8, 0), (65536, 65536)] {
        for backend in [Backend::CudaCores, Backend::Fa2, Backend::Auto] {
            refused(new(backend, num_qo_heads, num_kv_heads), "heads");
        }
    }
    for (num_qo_heads, num_kv_heads) in [(10, 2), (12, 2), (16, 1)] {
        let error = new(Backend::CudaCores, num_qo_heads, num_kv_heads).unwrap_err();
        assert!(matches!(error, FlashInferError::Unsupported { .. }), "{error}");
        assert_eq!(new(Backend::Auto, num_qo_heads, num_kv_heads).unwrap().backend(), Backend::Fa2);
    }
    let mut elsewhere = Workspace::new(&other.stream).unwrap();
    refused(decode.plan(&mut elsewhere, &table, &PlanOptions::default()), "workspace");
    problem.check(&gpu, &decode, &mut Workspace::with_sizes(&gpu.stream, 0, 0).unwrap());
    problem.check(&gpu, &decode, &mut workspace);
}

/// What decode cannot do, and numbers that the planner does not take.
#[test]
fn wrong_options() {
    let Some(Bench { gpu, problem, .. }) = Bench::start() else { return };
    let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
    let requests = table.host().batch_size();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let indices = MaskIndices::new(problem.case.lens.iter().map(|&len| (1, len))).unwrap();
    let bits = gpu.cuda.alloc_zeros::<u8>(indices.num_bytes()).unwrap();
    let bits = bits.tensor(&gpu.cuda, &[bits.len()]).unwrap();
    let indices = MaskTable::new(&gpu.stream, indices).unwrap();
    let plain = PlanOptions::default();
    let masked = plain.with_mask(Mask::Custom { indices: &indices, bits: bits.view() });
    for backend in [Backend::CudaCores, Backend::Fa2] {
        let Some(decode) = decode_of::<f16, f16>(&gpu, &Case { backend, ..problem.case.clone() }) else {
            return;
        };
        let mut unsupported = |options: &PlanOptions<'_>| {
            let error = decode.plan(&mut workspace, &table, options).unwrap_err();
            assert!(
                matches!(error, FlashInferError::Unsupported { .. }),
                "{backend:?}, {options:?}: {error}"
            );
        };
        unsupported(&masked);
        if backend == Backend::CudaCores {
            for split in [Split::fixed(8), Split::disabled(), Split::beside(1)] {
                unsupported(&plain.with_split(split));
            }
        } else {
            unsupported(&for_graph(&table).with_split(Split::fixed(8)));
            let both = |pages| {
                let mut split = Split::fixed(pages);
                split.disable_split_kv = true;
                split
            };
            let tokens = i32::MAX as usize / problem.case.page_size;
            let wrong = [0, tokens + 1, 1 << 31, usize::MAX].map(Split::fixed);
            for split in wrong.into_iter().chain([both(8), Split::beside(1 << 31), Split::beside(usize::MAX)])
            {
                refused(decode.plan(&mut workspace, &table, &plain.with_split(split)), "split");
            }
            for split in [Split::fixed(tokens), Split::fixed(1), Split::beside(i32::MAX as usize)] {
                let plan = decode.plan(&mut workspace, &table, &plain.with_split(split)).unwrap();
                problem.check_run(&gpu, &plan);
            }
        }
        for rows in [0, requests - 1, requests + 1, usize::MAX] {
            refused(decode.plan(&mut workspace, &table, &plain.with_graph(rows)), "graph");
        }
        // A query sees all keys with a causal mask, too.
        let plan = decode.plan(&mut workspace, &table, &PlanOptions::causal()).unwrap();
        problem.check_run(&gpu, &plan);
    }
}

/// With parts of one size, and with undivided keys, a request has the same bits
/// alone and in any batch; as the planner divides keys, it has not.
#[test]
fn splits_that_do_not_depend_on_the_batch() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let case =
        |lens: Vec<usize>| Case { lens, kv_heads: 2, group: 4, backend: Backend::Fa2, ..Case::default() };
    let alone = case(vec![5000]);
    let Some(decode) = decode_of::<bf16, bf16>(&gpu, &alone) else { return };
    let one = Problem::<bf16, bf16>::new(&gpu, rng, alone.clone());
    let mut differs = 0;
    for split in [Split::fixed(7), Split::fixed(64), Split::disabled(), Split::default()] {
        let plain = PlanOptions::default().with_split(split);
        let (want, want_lse) = {
            let table = PageTable::new(&gpu.stream, one.table.clone()).unwrap();
            let plan = decode.plan(&mut workspace, &table, &plain).unwrap();
            assert_eq!(plan.splits_kv(), split != Split::disabled(), "{split:?}");
            one.check_run(&gpu, &plan)
        };
        for others in [vec![3], vec![70_000, 1, 0], vec![1000; 200]] {
            // The request stands last, over the same pages, which the others share.
            let rows = others.len() + 1;
            let pages = one.table.pages(0);
            let page_size = one.table.page_size();
            let long: Vec<i32> = pages.iter().copied().cycle().take(70_000 / page_size).collect();
            let of = |len: usize| (&long[..len.div_ceil(page_size)], len);
            let requests = others.iter().map(|&len| of(len)).chain([(pages, 5000)]);
            let table = PageIndices::from_requests(one.table.num_pages(), page_size, requests).unwrap();
            let table = PageTable::new(&gpu.stream, table).unwrap();
            let q = Mirrored::<bf16>::new(&gpu, &[rows, 8, 128], one.q.host.repeat(rows));
            let graph = (split.fixed_split_size.is_none()).then_some(rows);
            for graph in [None].into_iter().chain(graph.map(Some)) {
                let mut options = plain;
                options.graph = graph;
                let plan = decode.plan(&mut workspace, &table, &options).unwrap();
                let mut out = Mirrored::<bf16>::poisoned(&gpu, &[rows, 8, 128]);
                let mut lse = Mirrored::<f32>::poisoned(&gpu, &[rows, 8]);
                plan.run_with(
                    &q.device_view(),
                    &one.cache.device_view(),
                    &mut out.device_view_mut(),
                    Some(&mut lse.device_view_mut()),
                    &one.case.options(),
                )
                .unwrap();
                let (out, lse) = (out.download(), lse.download());
                let (out, lse) = (&out[(rows - 1) * 8 * 128..], &lse[(rows - 1) * 8..]);
                if split == Split::default() {
                    differs += usize::from(out.iter().zip(&want).any(|(a, b)| a.to_bits() != b.to_bits()));
                } else {
                    assert_same_bits(&format!("{split:?}, {rows} requests"), out, &want);
                    assert_same_bits(&format!("{split:?}, {rows} requests: LSE"), lse, &want_lse);
                }
            }
        }
    }
    assert!(differs > 0, "the planner's own way should have shown that this test can fail");
}

/// What allocates, uploads or plans is refused during a capture, which goes on.
#[test]
fn nothing_but_runs_is_captured() {
    let Some(Bench { gpu, problem, .. }) = Gpu::start_alone().map(Bench::on) else { return };
    let Some(decode) = decode_of::<f16, f16>(&gpu, &problem.case) else { return };
    let mut table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let (_, (plan, update, new_table, new_workspace)) = capture_graph(&gpu, || {
        (
            decode.plan(&mut workspace, &table, &for_graph(&table)).map(|plan| plan.numbers().to_vec()),
            table.update(problem.table.clone()),
            PageTable::new(&gpu.stream, problem.table.clone()).map(drop),
            Workspace::new(&gpu.stream).map(drop),
        )
    });
    refused(plan, "workspace");
    refused(update, "stream");
    refused(new_table, "stream");
    refused(new_workspace, "stream");
    problem.check(&gpu, &decode, &mut workspace);
}
