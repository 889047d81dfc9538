//! Latent attention on the GPU against the CPU reference.
//!
//! Cache slots that hold no token are NaN, and so are outputs beforehand, so
//! that whatever is read or left out by mistake shows. Each case runs on
//! FlashAttention 2, and on 3 where the GPU has it.
#![cfg(feature = "cudarc")]

mod common;

use common::{Gpu, Mirrored, Number, Rng, assert_same_bits, at_hand, cache::random_table, refused, say};
use flashinfer_rs::{
    DType, FlashInferError, ModuleName, PageIndices, PageTable, TensorMut, TensorRef,
    attention::{Backend, BatchMla, MlaPlan, MlaQuery, MlaSpec, PagedBatch, PlanOptions, Split, Workspace},
    gpu::TensorExtMut,
    indices::{AppendIndices, AppendTable, RaggedIndices, RaggedTable, SlotMapping},
    kv::MlaCache,
    page, reference,
};
use half::{bf16, f16};

/// The largest absolute error of a base-2 LSE.
const LSE_BOUND: f64 = 1e-2;
/// DeepSeek's, with 128 and 64 dimensions before absorption.
const SM_SCALE: f64 = 0.07216878364870322;

/// One step.
#[derive(Clone, Debug)]
struct Case {
    /// Queries and tokens of each request.
    requests: Vec<(usize, usize)>,
    num_heads: usize,
    page_size: usize,
    causal: bool,
    /// Queries and cache each in one tensor of 576.
    joined: bool,
    sm_scale: f64,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            requests: vec![(1, 1), (1, 15), (1, 16), (1, 17), (1, 131)],
            num_heads: 16,
            page_size: 16,
            causal: false,
            joined: false,
            sm_scale: SM_SCALE,
        }
    }
}

impl Case {
    fn queries(&self) -> RaggedIndices {
        RaggedIndices::from_lens(self.requests.iter().map(|request| request.0)).unwrap()
    }

    fn lens(&self) -> Vec<usize> {
        self.requests.iter().map(|request| request.1).collect()
    }

    fn options(&self) -> PlanOptions<'static> {
        if self.causal { PlanOptions::causal() } else { PlanOptions::default() }
    }
}

/// The widths of a tensor's parts: one tensor, or two.
fn widths(joined: bool) -> &'static [usize] {
    if joined { &[576] } else { &[512, 64] }
}

/// A case with its tensors, and what the reference makes of them.
struct Problem<T> {
    case: Case,
    table: PageIndices,
    queries: RaggedTable,
    q: Vec<Mirrored<T>>,
    cache: Vec<Mirrored<T>>,
    want: Vec<f64>,
    want_lse: Vec<f64>,
}

fn query_of<'a>(views: &[flashinfer_rs::TensorRef<'a>]) -> MlaQuery<'a> {
    match views {
        [q] => MlaQuery::joined(*q).unwrap(),
        [nope, pe] => MlaQuery::new(*nope, *pe),
        _ => unreachable!("one tensor or two"),
    }
}

fn cache_of<'a>(views: &[flashinfer_rs::TensorRef<'a>]) -> MlaCache<'a> {
    match views {
        [cache] => MlaCache::joined(*cache).unwrap(),
        [ckv, kpe] => MlaCache::new(*ckv, *kpe),
        _ => unreachable!("one tensor or two"),
    }
}

impl<T: Number> Problem<T> {
    fn new(gpu: &Gpu, rng: &mut Rng, case: Case) -> Self {
        let table = random_table(rng, case.page_size, &case.lens());
        Self::with_table(gpu, rng, case, table)
    }

    fn with_table(gpu: &Gpu, rng: &mut Rng, case: Case, table: PageIndices) -> Self {
        let n = case.queries().total();
        let q = widths(case.joined)
            .iter()
            .map(|&width| Mirrored::random(gpu, rng, &[n, case.num_heads, width]))
            .collect();
        let cache = widths(case.joined)
            .iter()
            .map(|&width| {
                let mut host = vec![T::POISON; table.num_pages() * case.page_size * width];
                for request in 0..table.batch_size() {
                    for position in 0..table.seq_len(request) {
                        let page = table.pages(request)[position / case.page_size] as usize;
                        let start = (page * case.page_size + position % case.page_size) * width;
                        let row = &mut host[start..start + width];
                        if row[0].bits() == T::POISON.bits() {
                            row.fill_with(|| T::from_f64(rng.unit()));
                        }
                    }
                }
                Mirrored::new(gpu, &[table.num_pages(), case.page_size, width], host)
            })
            .collect();
        Self::solve(gpu, case, table, q, cache)
    }

    /// Fills in what the reference says.
    fn solve(
        gpu: &Gpu,
        case: Case,
        table: PageIndices,
        q: Vec<Mirrored<T>>,
        cache: Vec<Mirrored<T>>,
    ) -> Self {
        let queries = case.queries();
        let (n, heads) = (queries.total(), case.num_heads);
        let mut want = vec![f64::NAN; n * heads * 512];
        let mut want_lse = vec![f64::NAN; n * heads];
        let mask = if case.causal { reference::HostMask::Causal } else { reference::HostMask::None };
        reference::batch_mla(
            &MlaSpec::new(T::DTYPE, case.sm_scale),
            &query_of(&q.iter().map(Mirrored::view).collect::<Vec<_>>()),
            &cache_of(&cache.iter().map(Mirrored::view).collect::<Vec<_>>()),
            &queries,
            &table,
            &mut TensorMut::from_slice(&mut want, &[n, heads, 512]).unwrap(),
            Some(&mut TensorMut::from_slice(&mut want_lse, &[n, heads]).unwrap()),
            mask,
        )
        .unwrap();
        let queries = RaggedTable::new(&gpu.stream, queries).unwrap();
        Self { case, table, queries, q, cache, want, want_lse }
    }

    /// Plans the step.
    fn plan<'p>(
        &'p self,
        mla: &BatchMla,
        workspace: &'p mut Workspace,
        table: &'p PageTable,
    ) -> flashinfer_rs::Result<MlaPlan<'p>> {
        mla.plan(workspace, PagedBatch::new(&self.queries, table), &self.case.options())
    }

    fn outputs(&self, gpu: &Gpu) -> (Mirrored<T>, Mirrored<f32>) {
        let (n, heads) = (self.queries.host().total(), self.case.num_heads);
        (Mirrored::poisoned(gpu, &[n, heads, 512]), Mirrored::poisoned(gpu, &[n, heads]))
    }

    /// Plans and runs on each backend, and compares with the reference.
    #[track_caller]
    fn check(&self, gpu: &Gpu, workspace: &mut Workspace) {
        for mla in backends::<T>(gpu, &self.case) {
            let table = PageTable::new(&gpu.stream, self.table.clone()).unwrap();
            let plan = self.plan(&mla, workspace, &table).unwrap();
            self.check_run(gpu, &plan);
        }
    }

    /// Runs a plan and compares with the reference.
    #[track_caller]
    fn check_run(&self, gpu: &Gpu, plan: &MlaPlan<'_>) -> (Vec<T>, Vec<f32>) {
        let (mut out, mut lse) = self.outputs(gpu);
        self.run(plan, &mut out, Some(&mut lse)).unwrap();
        self.verify(plan, &out, &lse);
        (out.download(), lse.download())
    }

    fn run(
        &self,
        plan: &MlaPlan<'_>,
        out: &mut Mirrored<T>,
        lse: Option<&mut Mirrored<f32>>,
    ) -> flashinfer_rs::Result<()> {
        let mut lse = lse.map(|lse| lse.device_view_mut());
        plan.run_with(
            &query_of(&device_views(&self.q)),
            &cache_of(&device_views(&self.cache)),
            &mut out.device_view_mut(),
            lse.as_mut(),
        )
    }

    #[track_caller]
    fn verify(&self, plan: &MlaPlan<'_>, out: &Mirrored<T>, lse: &Mirrored<f32>) {
        let what = format!("{:?} {:?}", plan.backend(), self.case);
        out.assert_close(&what, &self.want, T::BOUND);
        for (at, (&got, &want)) in lse.download().iter().zip(&self.want_lse).enumerate() {
            let got = f64::from(got);
            let agrees = if want.is_finite() { (got - want).abs() <= LSE_BOUND } else { got == want };
            assert!(agrees, "{what}: LSE {at} is {got}, not {want}");
        }
    }
}

fn device_views<T: Number>(tensors: &[Mirrored<T>]) -> Vec<TensorRef<'_>> {
    tensors.iter().map(|tensor| tensor.device_view()).collect()
}

/// Latent attention on FlashAttention 2, and on 3 where the GPU has it.
fn backends<T: Number>(gpu: &Gpu, case: &Case) -> Vec<BatchMla> {
    let mut backends = vec![Backend::Fa2];
    match gpu.compute_capability() {
        (9, 0) => backends.push(Backend::Fa3),
        (major, minor) => say(&format!("FlashAttention 3 skipped: it has no code for {major}.{minor}")),
    }
    let spec = MlaSpec::new(T::DTYPE, case.sm_scale);
    let new = |backend| BatchMla::new(&gpu.stream, &spec.with_backend(backend), case.num_heads);
    backends.into_iter().filter_map(|backend| at_hand(gpu, new(backend))).collect()
}

fn check<T: Number>(gpu: &Gpu, rng: &mut Rng, workspace: &mut Workspace, case: Case) {
    Problem::<T>::new(gpu, rng, case).check(gpu, workspace);
}

/// One query for each request: lengths around the ends of pages and of the
/// kernels' tiles, and a request without tokens.
fn decode<T: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for num_heads in [16, 64, 128] {
        for page_size in [1, 16, 64] {
            let lens = [1, page_size + 1, 0, 63, 64, 65, 131];
            let requests = lens.map(|len| (1, len)).to_vec();
            check::<T>(&gpu, rng, &mut workspace, Case { requests, num_heads, page_size, ..Case::default() });
        }
    }
}

typed_tests! {
    decode_f16: decode::<f16>();
    decode_bf16: decode::<bf16>();
}

/// Several queries at the end of each request, masked: with tiles of one block
/// and of two, whole prompts, and chunks after a prefix.
fn chunked_prefill<T: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for page_size in [1, 16, 64] {
        for (num_heads, requests) in [
            (16, vec![(5, 5), (3, 70), (1, 64), (37, 140)]),
            (16, vec![(2, 66), (1, 3), (6, 6)]),
            (64, vec![(9, 9), (3, 129), (1, 1)]),
            (128, vec![(3, 65), (2, 2), (1, 64)]),
        ] {
            let case = Case { requests, num_heads, page_size, causal: true, ..Case::default() };
            check::<T>(&gpu, rng, &mut workspace, case);
        }
    }
}

typed_tests! {
    chunked_prefill_f16: chunked_prefill::<f16>();
    chunked_prefill_bf16: chunked_prefill::<bf16>();
}

/// Several queries that all see all tokens, also more queries than tokens.
#[test]
fn without_mask() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for num_heads in [16, 64] {
        let requests = vec![(5, 3), (3, 70), (12, 64)];
        check::<f16>(&gpu, rng, &mut workspace, Case { requests, num_heads, ..Case::default() });
    }
}

/// Requests without queries, and without tokens.
#[test]
fn empty_requests() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for (causal, requests) in [
        (true, vec![(0, 0), (3, 20), (0, 33), (1, 5), (0, 0)]),
        (false, vec![(0, 0), (3, 20), (2, 0), (0, 33), (1, 0), (1, 64)]),
        (false, vec![(1, 0), (6, 0)]),
    ] {
        for num_heads in [16, 128] {
            let case = Case { requests: requests.clone(), num_heads, causal, ..Case::default() };
            check::<bf16>(&gpu, rng, &mut workspace, case);
        }
    }
}

/// With 128 heads and few queries on average the planner would take tiles that
/// end inside a query, if requests without queries counted.
#[test]
fn causal_tiles_beside_empty_requests() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for kv_len in [1, 64, 65, 66] {
        let requests = vec![(kv_len.min(2), kv_len), (0, 9), (0, 9), (0, 9), (0, 9), (0, 9)];
        let case = Case { requests, num_heads: 128, page_size: 1, causal: true, ..Case::default() };
        check::<f16>(&gpu, rng, &mut workspace, case);
    }
}

/// Long requests are divided among blocks, whose results are merged.
#[test]
fn split_kv() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for (num_heads, page_size, causal, requests) in [
        (16, 16, false, vec![(1, 9000)]),
        (16, 1, true, vec![(2, 3001), (1, 5), (1, 700)]),
        (128, 64, true, vec![(2, 1100)]),
        (8, 64, true, vec![(10, 1500), (0, 0), (3, 3)]),
    ] {
        let case = Case { requests, num_heads, page_size, causal, ..Case::default() };
        check::<bf16>(&gpu, rng, &mut workspace, case);
    }
}

/// Any number of heads without a mask; with one, any that divides the tile,
/// and any whose queries fit one tile.
#[test]
fn other_head_counts() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for num_heads in [1, 3, 5, 20, 40, 96, 130] {
        let requests = vec![(1, 65), (2, 33), (4, 64)];
        check::<f16>(&gpu, rng, &mut workspace, Case { requests, num_heads, ..Case::default() });
    }
    for num_heads in [1, 2, 4, 8, 32] {
        let requests = vec![(1, 65), (40, 100), (4, 64)];
        let case = Case { requests, num_heads, causal: true, ..Case::default() };
        check::<f16>(&gpu, rng, &mut workspace, case);
    }
    let case = Case { requests: vec![(3, 65), (1, 64)], num_heads: 20, causal: true, ..Case::default() };
    check::<f16>(&gpu, rng, &mut workspace, case);
    // A single query needs no mask, whatever the number of heads.
    for num_heads in [20, 96, 200] {
        let case = Case { requests: vec![(1, 65), (1, 1)], num_heads, causal: true, ..Case::default() };
        check::<f16>(&gpu, rng, &mut workspace, case);
    }
}

/// Both parts in one tensor of 576, for queries and cache.
#[test]
fn joined_tensors() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for page_size in [1, 16, 64] {
        let case = Case { page_size, joined: true, ..Case::default() };
        check::<bf16>(&gpu, rng, &mut workspace, case.clone());
        let requests = vec![(5, 5), (3, 70), (8, 131)];
        check::<f16>(&gpu, rng, &mut workspace, Case { requests, causal: true, num_heads: 64, ..case });
    }
}

/// Queries and outputs as some of a tensor's heads.
#[test]
fn strided_rows() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let case = Case { requests: vec![(2, 40), (1, 900)], causal: true, ..Case::default() };
    let Problem { table, cache, .. } = Problem::<f16>::new(&gpu, rng, case.clone());
    let (n, heads) = (3, case.num_heads);
    let q = widths(false)
        .iter()
        .map(|&width| Mirrored::random(&gpu, rng, &[n, heads + 5, width]).narrowed(1, 2, heads))
        .collect();
    let problem = Problem::solve(&gpu, case, table, q, cache);
    for mla in backends::<f16>(&gpu, &problem.case) {
        let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
        let plan = problem.plan(&mla, &mut workspace, &table).unwrap();
        // Heads outermost, with a gap behind each row.
        let storage = [heads, n, 576];
        let mut out = Mirrored::<f16>::poisoned(&gpu, &storage).narrowed(2, 64, 512).permuted(&[1, 0, 2]);
        let (_, mut lse) = problem.outputs(&gpu);
        problem.run(&plan, &mut out, Some(&mut lse)).unwrap();
        let mut want = vec![f64::NAN; storage.iter().product()];
        for (at, row) in problem.want.chunks(512).enumerate() {
            let (query, head) = (at / heads, at % heads);
            let start = (head * n + query) * 576 + 64;
            want[start..start + 512].copy_from_slice(row);
        }
        out.assert_close(&format!("{:?} strided", plan.backend()), &want, f16::BOUND);
    }
}

/// The output has the same bits with and without LSE, and in each of several
/// runs of one plan.
#[test]
fn runs_of_one_plan_agree() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let case = Case { requests: vec![(1, 3000), (1, 16), (1, 0)], ..Case::default() };
    let problem = Problem::<bf16>::new(&gpu, rng, case);
    for mla in backends::<bf16>(&gpu, &problem.case) {
        let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
        let plan = problem.plan(&mla, &mut workspace, &table).unwrap();
        let (want, _) = problem.check_run(&gpu, &plan);
        for with_lse in [false, true, false] {
            let (mut out, mut lse) = problem.outputs(&gpu);
            problem.run(&plan, &mut out, with_lse.then_some(&mut lse)).unwrap();
            assert_same_bits("another run", &out.download(), &want);
        }
    }
}

/// Plans made one after the other on one workspace, without waiting.
#[test]
fn back_to_back_plans() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let problems: Vec<_> = [(1, 700), (3, 9), (1, 64), (2, 1300), (1, 1)]
        .into_iter()
        .map(|request| {
            let requests = vec![request, (1, 33)];
            Problem::<f16>::new(&gpu, rng, Case { requests, causal: true, ..Case::default() })
        })
        .collect();
    for mla in backends::<f16>(&gpu, &problems[0].case) {
        let mut done = Vec::new();
        for problem in problems.iter().cycle().take(15) {
            let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
            let plan = problem.plan(&mla, &mut workspace, &table).unwrap();
            let (mut out, mut lse) = problem.outputs(&gpu);
            problem.run(&plan, &mut out, Some(&mut lse)).unwrap();
            done.push((problem, out));
        }
        for (problem, out) in done {
            out.assert_close("back to back", &problem.want, f16::BOUND);
        }
    }
}

#[test]
fn sm_scale() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for sm_scale in [0.001, 0.01, 0.3] {
        check::<bf16>(&gpu, rng, &mut workspace, Case { sm_scale, ..Case::default() });
        let requests = vec![(5, 5), (3, 70), (2, 1200)];
        let case = Case { sm_scale, requests, causal: true, ..Case::default() };
        check::<f16>(&gpu, rng, &mut workspace, case);
    }
}

/// Contexts of 131072 tokens, for one query and for a masked chunk of several.
#[test]
fn long_context() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for (num_heads, page_size, causal, requests) in
        [(16, 64, false, vec![(1, 131_072)]), (4, 16, true, vec![(3, 131_071), (0, 0), (2, 9), (1, 65)])]
    {
        let case = Case { requests, num_heads, page_size, causal, ..Case::default() };
        check::<bf16>(&gpu, rng, &mut workspace, case);
    }
}

#[test]
fn large_batch() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let requests = (0..1024).map(|_| (1, rng.below(9))).collect();
    check::<bf16>(&gpu, rng, &mut workspace, Case { requests, page_size: 4, ..Case::default() });
}

/// Requests that begin with the same pages.
#[test]
fn shared_pages() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let case = Case { requests: vec![(2, 40), (1, 50), (3, 32)], causal: true, ..Case::default() };
    let requests = [(&[5, 2, 0][..], 40), (&[5, 2, 7, 1][..], 50), (&[5, 2][..], 32)];
    let table = PageIndices::from_requests(9, 16, requests).unwrap();
    Problem::<bf16>::with_table(&gpu, rng, case, table).check(&gpu, &mut workspace);
}

/// What `append_paged_mla_kv_cache` wrote is what queries see.
#[test]
fn appended_tokens() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let case =
        Case { requests: vec![(4, 40), (1, 17), (2, 2)], joined: true, causal: true, ..Case::default() };
    let problem = Problem::<bf16>::new(&gpu, rng, case);
    let (table, host) = (&problem.table, &problem.cache[0].host);
    // Every token of every request, in order.
    let mut rows = Vec::new();
    for request in 0..table.batch_size() {
        for position in 0..table.seq_len(request) {
            let page = table.pages(request)[position / 16] as usize;
            let start = (page * 16 + position % 16) * 576;
            rows.extend_from_slice(&host[start..start + 576]);
        }
    }
    let tokens = rows.len() / 576;
    let tokens_of = RaggedIndices::from_lens(problem.case.lens()).unwrap();
    let append = AppendIndices::last_tokens(table, tokens_of.indptr()).unwrap();
    let append = AppendTable::new(&gpu.stream, append).unwrap();
    let table = PageTable::new(&gpu.stream, table.clone()).unwrap();
    let rows = Mirrored::new(&gpu, &[tokens, 576], rows);
    let shape = problem.cache[0].shape();
    let mut parts = [512, 64].map(|width| Mirrored::<bf16>::poisoned(&gpu, &[shape[0], shape[1], width]));
    {
        let new = rows.device_view();
        let [ckv, kpe] = &mut parts;
        let (mut ckv, mut kpe) = (ckv.device_view_mut(), kpe.device_view_mut());
        page::append_paged_mla_kv_cache(
            &gpu.stream,
            &new.narrow(1, 0, 512).unwrap(),
            &new.narrow(1, 512, 64).unwrap(),
            &SlotMapping::new(&append, &table),
            [&mut ckv.reborrow(), &mut kpe.reborrow()],
        )
        .unwrap();
    }
    let problem = Problem { cache: parts.into(), ..problem };
    for mla in backends::<bf16>(&gpu, &problem.case) {
        let plan = problem.plan(&mla, &mut workspace, &table).unwrap();
        problem.check_run(&gpu, &plan);
    }
}

/// Random steps.
#[test]
fn sweep() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for _ in 0..40 {
        let causal = rng.below(2) == 0;
        let num_heads = [1usize, 8, 16, 64, 128][rng.below(5)];
        let requests = (0..1 + rng.below(6)).map(|_| {
            let queries = rng.below(2 + 128 / num_heads.max(16));
            let longest = [20, 70, 300][rng.below(3)];
            let len = rng.below(longest);
            (queries, if causal { len.max(queries) } else { len })
        });
        let case = Case {
            requests: requests.collect(),
            num_heads,
            page_size: [1, 3, 16, 64][rng.below(4)],
            causal,
            joined: rng.below(2) == 0,
            ..Case::default()
        };
        if rng.below(2) == 0 {
            check::<f16>(&gpu, rng, &mut workspace, case);
        } else {
            check::<bf16>(&gpu, rng, &mut workspace, case);
        }
    }
}

#[test]
fn nothing_to_do() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for requests in [vec![], vec![(0, 0)], vec![(0, 40), (0, 3)]] {
        let problem = Problem::<f16>::new(&gpu, rng, Case { requests, ..Case::default() });
        for mla in backends::<f16>(&gpu, &problem.case) {
            let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
            let plan = problem.plan(&mla, &mut workspace, &table).unwrap();
            assert!(plan.numbers().is_empty());
            let (mut out, mut lse) = problem.outputs(&gpu);
            problem.run(&plan, &mut out, Some(&mut lse)).unwrap();
            gpu.synchronize();
        }
    }
}

#[test]
fn backends_are_chosen_and_named() {
    let Some(gpu) = Gpu::start() else { return };
    let spec = MlaSpec::new(DType::BF16, SM_SCALE);
    let auto = BatchMla::new(&gpu.stream, &spec, 16).unwrap();
    let hopper = gpu.compute_capability().0 == 9;
    let expected = if hopper { Backend::Fa3 } else { Backend::Fa2 };
    assert_eq!(auto.backend(), expected);
    let version = auto.module().version().unwrap();
    assert_eq!(auto.module().name(), &spec.module(version, expected).unwrap());
    if !hopper {
        let named = BatchMla::new(&gpu.stream, &spec.with_backend(Backend::Fa3), 16);
        assert!(matches!(named, Err(FlashInferError::Unsupported { .. })));
    }
    let wide = BatchMla::new(&gpu.stream, &MlaSpec::new(DType::F32, SM_SCALE), 16);
    assert!(matches!(wide, Err(FlashInferError::Unsupported { .. })));
    // Modules that are not there are not a panic.
    assert!(gpu.runtime.module(&ModuleName::new("batch_mla_attention_of_nobody")).is_err());
}

#[test]
fn wrong_input_to_plan() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let other = gpu.elsewhere();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let table = PageTable::new(&gpu.stream, random_table(rng, 16, &[3, 40])).unwrap();
    for mla in backends::<f16>(&gpu, &Case::default()) {
        let mut plan = |lens: &[usize], num_heads, causal| {
            let queries = RaggedIndices::from_lens(lens.iter().copied())?;
            let queries = RaggedTable::new(&gpu.stream, queries)?;
            let mla = BatchMla::new(&gpu.stream, mla.spec(), num_heads)?;
            let options = if causal { PlanOptions::causal() } else { PlanOptions::default() };
            mla.plan(&mut workspace, PagedBatch::new(&queries, &table), &options).map(drop)
        };
        plan(&[3, 1], 16, true).unwrap();
        refused(plan(&[1], 16, false), "queries");
        refused(plan(&[1, 1, 1], 16, false), "queries");
        refused(plan(&[4, 1], 16, true), "queries");
        refused(plan(&[1, 1], 0, false), "num_heads");
        refused(plan(&[1 << 20, 1], 1 << 12, false), "num_heads");
        refused(plan(&[3, 40], 20, true), "num_heads");
        // Too much for one plan, by far and by a little.
        refused(plan(&[1 << 24, 1], 16, false), "queries");
        refused(plan(&[1 << 14, 1], 128, false), "queries");

        let queries = RaggedTable::new(&gpu.stream, RaggedIndices::from_lens([1, 1]).unwrap()).unwrap();
        let options = PlanOptions::default();
        let mut foreign = Workspace::new(&other.stream).unwrap();
        refused(mla.plan(&mut foreign, PagedBatch::new(&queries, &table), &options), "workspace");
        // It grows from nothing, to about this.
        let mut grows = Workspace::with_sizes(&gpu.stream, 0, 0).unwrap();
        mla.plan(&mut grows, PagedBatch::new(&queries, &table), &options).unwrap();
        // What these kernels cannot do.
        let splits = [Split::fixed(8), Split::disabled(), Split::beside(1)];
        for wrong in splits.map(|split| options.with_split(split)).into_iter().chain([options.with_graph(2)])
        {
            let error = mla.plan(&mut grows, PagedBatch::new(&queries, &table), &wrong).unwrap_err();
            assert!(matches!(error, FlashInferError::Unsupported { .. }), "{error}");
        }
        assert!(grows.float_bytes() <= 20 << 20 && grows.int_bytes() <= 600_000, "{grows:?}");
    }
}

/// The largest step that is let through.
#[test]
fn as_much_work_as_a_plan_holds() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    // Each request is a work item; a plan has room for 16384, less one for
    // each multiprocessor.
    let requests = vec![(1, 1); 16_100];
    check::<f16>(&gpu, rng, &mut workspace, Case { requests, num_heads: 1, page_size: 1, ..Case::default() });
    let table = PageTable::new(&gpu.stream, random_table(rng, 1, &vec![1; 16_500])).unwrap();
    let queries = RaggedIndices::from_lens(vec![1; 16_500]).unwrap();
    let queries = RaggedTable::new(&gpu.stream, queries).unwrap();
    for mla in backends::<f16>(&gpu, &Case { num_heads: 1, ..Case::default() }) {
        refused(
            mla.plan(&mut workspace, PagedBatch::new(&queries, &table), &PlanOptions::default()),
            "queries",
        );
    }
}

#[test]
fn wrong_input_to_run() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let other = gpu.elsewhere();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let case = Case { requests: vec![(2, 40), (1, 3)], ..Case::default() };
    let problem = Problem::<f16>::new(&gpu, rng, case);
    let pages = problem.table.num_pages();
    let mut half = |shape: &[usize]| Mirrored::<f16>::random(&gpu, rng, shape);
    let good = [half(&[3, 16, 512]), half(&[3, 16, 64]), half(&[pages, 16, 512]), half(&[pages, 16, 64])];
    // What to put in place of one of these, and what is then refused.
    let names = ["q.nope", "q.pe", "cache.ckv", "cache.kpe"];
    let mut wrong = vec![
        (0, half(&[2, 16, 512]), "q.nope"),
        (0, half(&[3, 8, 512]), "q.nope"),
        (0, half(&[3, 16, 64]), "q.nope"),
        (0, half(&[48, 512]), "q.nope"),
        (1, half(&[3, 16, 512]), "q.pe"),
        (1, half(&[3, 8, 64]), "q.pe"),
        (2, half(&[pages - 1, 16, 512]), "cache.ckv"),
        (2, half(&[pages, 8, 512]), "cache.ckv"),
        (2, half(&[pages, 16, 256]), "cache.ckv"),
        (2, half(&[pages * 16, 512]), "cache.ckv"),
        (3, half(&[pages - 1, 16, 64]), "cache.kpe"),
        (3, half(&[pages, 16, 128]), "cache.kpe"),
    ];
    for (at, name) in names.into_iter().enumerate() {
        let shape = good[at].shape();
        let [a, b, width] = [shape[0], shape[1], shape[2]];
        // Elements of a row apart; rows at odd addresses.
        wrong.push((at, half(&[a, width, b]).permuted(&[0, 2, 1]), name));
        wrong.push((at, half(&[a, b, width + 1]).narrowed(2, 0, width), name));
        wrong.push((at, half(&[a, b, width + 8]).narrowed(2, 4, width), name));
    }
    for mla in backends::<f16>(&gpu, &problem.case) {
        let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
        let plan = problem.plan(&mla, &mut workspace, &table).unwrap();
        let (mut out, mut lse) = problem.outputs(&gpu);
        let run = |tensors: [&Mirrored<f16>; 4], out: &mut Mirrored<f16>, lse: &mut Mirrored<f32>| {
            let shown = tensors.map(|tensor| tensor.device_view());
            plan.run_with(
                &MlaQuery::new(shown[0], shown[1]),
                &MlaCache::new(shown[2], shown[3]),
                &mut out.device_view_mut(),
                Some(&mut lse.device_view_mut()),
            )
        };
        for (at, tensor, argument) in &wrong {
            let mut tensors = good.each_ref();
            tensors[*at] = tensor;
            refused(run(tensors, &mut out, &mut lse), argument);
        }
        for sm_scale in [0.0, -0.1, 1e-4, f64::NAN, f64::INFINITY] {
            let spec = MlaSpec::new(DType::F16, sm_scale).with_backend(mla.backend());
            refused(BatchMla::new(&gpu.stream, &spec, 16), "sm_scale");
        }
        for shape in [[2, 16, 512], [3, 16, 64], [3, 8, 512]] {
            let mut out = Mirrored::poisoned(&gpu, &shape);
            refused(run(good.each_ref(), &mut out, &mut lse), "out");
        }
        for shape in [[2, 16], [16, 3]] {
            let mut lse = Mirrored::poisoned(&gpu, &shape);
            refused(run(good.each_ref(), &mut out, &mut lse), "lse");
        }
        let mut strided = Mirrored::poisoned(&gpu, &[3, 17]).narrowed(1, 0, 16);
        refused(run(good.each_ref(), &mut out, &mut strided), "lse");

        // Another dtype, another stream.
        let brain = Mirrored::<bf16>::poisoned(&gpu, &[3, 16, 512]);
        let shown = good.each_ref().map(|tensor| tensor.device_view());
        let cache = MlaCache::new(shown[2], shown[3]);
        let guard = brain.device_view();
        let q = MlaQuery::new(guard, shown[1]);
        refused(plan.run(&q, &cache, &mut out.device_view_mut()), "q.nope");
        let elsewhere = good[1].copied_to(&other);
        let q = MlaQuery::new(shown[0], elsewhere.device_view());
        refused(plan.run(&q, &cache, &mut out.device_view_mut()), "q.pe");
        let q = MlaQuery::new(shown[0], shown[1]);
        let mut foreign = other.cuda.alloc_zeros::<f16>(3 * 16 * 512).unwrap();
        let mut foreign = foreign.tensor_mut(&other.cuda, &[3, 16, 512]).unwrap();
        refused(plan.run(&q, &cache, &mut foreign.view_mut()), "out");

        out.assert_untouched();
        lse.assert_untouched();
    }
}
