//! Attention of mixed batches on the GPU against the CPU reference.
//!
//! Cache slots that hold no token are NaN, and so are outputs beforehand, so
//! that whatever is read or left out by mistake shows.
#![cfg(feature = "cudarc")]

mod common;

use common::{
    Gpu, Mirrored, Number, Rng, assert_same_bits,
    attention::{capture, refuse_caches, refuse_queries_and_outputs},
    cache::{Cache, LAYOUTS, repeating_table, table_among},
    prefill::{Case, KeyTable, Kind, Kv, On, Problem, Tables},
    refused, say,
};
use cudarc::driver::CudaSlice;
use flashinfer_rs::{
    DType, FlashInferError, PageIndices, PageTable, Result,
    artifacts::FlashInferVersion,
    attention::{
        AttentionSpec, Backend, BatchAttention, BatchAttentionPlan, Heads, Mask, PlanOptions, Split,
        Workspace,
    },
    cudarc::TensorExt,
    indices::{MaskIndices, MaskTable, RaggedIndices, RaggedTable},
    kv::{KvLayout, PagedKv},
};
use float8::F8E4M3;
use half::{bf16, f16};

/// Work items of one kind of tile that a plan has room for.
const MAX_WORKS: usize = 65536;

/// Decodes and prefills together, with empty requests among them: 8 query
/// heads on 2 KV heads of 128, pages of 16, causal.
fn case() -> Case {
    On { kind: Kind::Paged, backend: Backend::Fa2 }.case()
}

/// A case with and without causal masking.
fn both(case: Case) -> [Case; 2] {
    [true, false].map(|causal| Case { causal, ..case.clone() })
}

fn options_of(case: &Case) -> PlanOptions<'static> {
    case.plan_options()
}

fn graph_options(case: &Case, rows: usize) -> PlanOptions<'static> {
    case.graph_options(rows)
}

/// `None`, said on stderr, if no source holds the module.
fn attention_of<T: Number, K: Number>(gpu: &Gpu, case: &Case) -> Option<BatchAttention> {
    let spec = case.spec::<T, K>();
    match BatchAttention::new(&gpu.stream, &spec, case.heads()) {
        Ok(attention) => Some(attention),
        Err(FlashInferError::Artifact(reason)) => {
            say(&format!(
                "skipped: no source holds {}: {reason}",
                spec.batch_attention_module(FlashInferVersion::OLDEST).unwrap()
            ));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// A workspace for up to 8 KV heads.
fn workspace_of(gpu: &Gpu, attention: &BatchAttention) -> Workspace {
    let most = BatchAttention::new(&gpu.stream, attention.spec(), Heads::new(8, 8)).unwrap();
    let bytes = most.float_bytes();
    Workspace::with_sizes(&gpu.stream, bytes, Workspace::DEFAULT_INT_BYTES).unwrap()
}

fn pages(tables: &Tables) -> &PageTable {
    let KeyTable::Paged(table) = &tables.keys else { unreachable!("pages") };
    table
}

fn cache<K>(kv: &Kv<K>) -> &Cache<K> {
    let Kv::Paged { cache, .. } = kv else { unreachable!("pages") };
    cache
}

fn plan<'p>(
    attention: &BatchAttention,
    workspace: &'p mut Workspace,
    tables: &'p Tables,
    case: &Case,
) -> Result<BatchAttentionPlan<'p>> {
    attention.plan(workspace, &tables.queries, pages(tables), &options_of(case))
}

fn run<T: Number, K: Number>(
    plan: &BatchAttentionPlan<'_>,
    problem: &Problem<T, K>,
    out: &mut Mirrored<T>,
    lse: Option<&mut Mirrored<f32>>,
) -> Result<()> {
    let mut lse = lse.map(|lse| lse.device_view_mut());
    plan.run_with(
        &problem.q.device_view(),
        &cache(&problem.kv).device_view(),
        &mut out.device_view_mut(),
        lse.as_mut().map(|lse| lse.reborrow()).as_mut(),
        &problem.case.options(),
    )
}

/// Runs a plan and compares with the reference.
#[track_caller]
fn check_run<T: Number, K: Number>(
    gpu: &Gpu,
    plan: &BatchAttentionPlan<'_>,
    problem: &Problem<T, K>,
) -> (Vec<T>, Vec<f32>) {
    let (mut out, mut lse) = problem.outputs(gpu);
    run(plan, problem, &mut out, Some(&mut lse)).unwrap();
    problem.verify(&out, Some(&lse));
    (out.download(), lse.download())
}

/// Plans, runs, and compares with the reference.
#[track_caller]
fn check<T: Number, K: Number>(
    gpu: &Gpu,
    attention: &BatchAttention,
    workspace: &mut Workspace,
    problem: &Problem<T, K>,
) {
    let tables = Tables::new(gpu, problem);
    let plan = plan(attention, workspace, &tables, &problem.case).unwrap();
    check_run(gpu, &plan, problem);
}

/// Checks each of the cases; stops at the first whose module is missing.
fn check_all<T: Number, K: Number>(cases: impl IntoIterator<Item = Case>) {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = None;
    for case in cases {
        let Some(attention) = attention_of::<T, K>(&gpu, &case) else { return };
        let workspace = workspace.get_or_insert_with(|| workspace_of(&gpu, &attention));
        check(&gpu, &attention, workspace, &Problem::<T, K>::new(&gpu, rng, case));
    }
}

/// A case in every layout, storage and page size.
fn stored(case: Case) -> Vec<Case> {
    let mut cases = Vec::new();
    for page_size in [1, 16, 64] {
        for (layout, joined) in LAYOUTS.into_iter().flat_map(|layout| [(layout, false), (layout, true)]) {
            cases.push(Case { page_size, layout, joined, ..case.clone() });
        }
    }
    cases
}

/// Group sizes, layouts, page sizes, causal and not.
fn shapes<T: Number>(head_dim: usize) {
    let groups = [1, 3, 4, 8].map(|group| Case { group, ..case().head_dim(head_dim) });
    let odd = [2, 5, 6, 7, 12, 17, 33, 130].map(|group| Case { group, ..case().head_dim(head_dim) });
    check_all::<T, T>(groups.into_iter().flat_map(stored).chain(odd).flat_map(both));
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

/// Queries and tokens at and beside the edges of tiles (16 and 128 rows, 64
/// and 128 tokens), of rows that one query fills in part.
#[test]
fn tiles() {
    let lens = [1, 15, 16, 17, 31, 32, 33, 42, 43, 63, 64, 65, 127, 128, 129, 130];
    let equal = lens.map(|len| (len, len)).to_vec();
    let more_tokens = lens.map(|len| (len, len + 62)).to_vec();
    let tokens = [1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257].map(|len| (1, len)).to_vec();
    for (requests, groups) in [(equal, [1, 3, 4]), (more_tokens, [1, 3, 4]), (tokens, [1, 16, 17])] {
        let cases = groups.map(|group| Case { requests: requests.clone(), kv_heads: 1, group, ..case() });
        check_all::<f16, f16>(cases.into_iter().flat_map(both));
    }
}

/// Chunks of prompts beside decodes, of lengths at and beside the ends of
/// pages, some divided among blocks.
#[test]
fn mixed() {
    let requests = vec![
        (1, 1500),
        (64, 200),
        (1, 1),
        (1, 64),
        (1, 65),
        (60, 400),
        (0, 0),
        (17, 18),
        (1, 63),
        (128, 128),
        (3, 700),
        (1, 129),
    ];
    for page_size in [1, 16, 64, 100] {
        for group in [1, 5] {
            let case = Case { requests: requests.clone(), page_size, group, ..case() };
            check_all::<bf16, bf16>(both(case));
        }
    }
}

/// Any mixture.
fn random_batches<T: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = None;
    for _ in 0..32 {
        let case = case().randomized(rng);
        let Some(attention) = attention_of::<T, T>(&gpu, &case) else { return };
        let workspace = workspace.get_or_insert_with(|| workspace_of(&gpu, &attention));
        check(&gpu, &attention, workspace, &Problem::<T, T>::new(&gpu, rng, case));
    }
}

#[test]
fn random_batches_f16() {
    random_batches::<f16>();
}

#[test]
fn random_batches_bf16() {
    random_batches::<bf16>();
}

/// A decode over 131072 tokens beside short prefills: all blocks share in it.
#[test]
fn long_context_beside_prefills() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let requests = vec![(1, 131_072), (40, 40), (16, 100), (1, 17), (128, 128)];
    for page_size in [16, 1] {
        let case = Case { requests: requests.clone(), page_size, ..case() };
        let Some(attention) = attention_of::<bf16, bf16>(&gpu, &case) else { return };
        let mut workspace = workspace_of(&gpu, &attention);
        let table = repeating_table(rng, 8192 / page_size, page_size, &case.key_lens());
        let kv = Kv::paged(&gpu, rng, &case, table);
        check(&gpu, &attention, &mut workspace, &Problem::<bf16, bf16>::with_kv(&gpu, rng, case, kv));
    }
}

/// Few queries and many tokens: tiles of both kinds are divided among blocks,
/// in more parts than a warp merges at once.
#[test]
fn parts_are_merged() {
    for (kv_heads, group, requests) in [
        (2, 4, vec![(40, 3000), (3, 5000)]),
        (1, 4, vec![(1, 20_000)]),
        (1, 3, vec![(43, 2000), (1, 1), (5, 2500), (0, 9), (2, 64)]),
        (8, 1, vec![(20, 2600), (1, 4000)]),
    ] {
        let case = Case { requests, kv_heads, group, ..case() };
        check_all::<f16, f16>(both(case.clone()));
        check_all::<bf16, bf16>(both(case));
    }
}

/// A decode step of 1024 requests.
#[test]
fn decode_of_1024_requests() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let requests = (0..1024).map(|at| (1, if at % 97 == 0 { 0 } else { 1 + rng.below(160) })).collect();
    let case = Case { requests, ..case() };
    let Some(attention) = attention_of::<bf16, bf16>(&gpu, &case) else { return };
    let mut workspace = workspace_of(&gpu, &attention);
    let table = repeating_table(rng, 512, case.page_size, &case.key_lens());
    let kv = Kv::paged(&gpu, rng, &case, table);
    check(&gpu, &attention, &mut workspace, &Problem::<bf16, bf16>::with_kv(&gpu, rng, case, kv));
}

/// As many work items as a plan has room for, and one more of either kind.
#[test]
fn as_much_work_as_a_plan_holds() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let one = Case { requests: vec![(1, 17)], causal: false, kv_heads: 8, group: 1, ..case() };
    let Some(attention) = attention_of::<f16, f16>(&gpu, &one) else { return };
    let mut workspace = workspace_of(&gpu, &attention);
    let problem = |rng: &mut Rng, request, count| {
        let case = Case { requests: vec![request; count], ..one.clone() };
        let table = repeating_table(rng, 40, case.page_size, &case.key_lens());
        let kv = Kv::paged(&gpu, rng, &case, table);
        Problem::<f16, f16>::with_kv(&gpu, rng, case, kv)
    };
    let small = Tables::new(&gpu, &problem(rng, (1, 17), 1));
    let blocks = plan(&attention, &mut workspace, &small, &one).unwrap().numbers()[1] as usize;
    let most = (MAX_WORKS - 2 * blocks) / one.kv_heads;
    check(&gpu, &attention, &mut workspace, &problem(rng, (1, 17), most));
    for queries in [1, 17] {
        let case = Case { requests: vec![(queries, 17); most + 1], ..one.clone() };
        let table = repeating_table(rng, 40, case.page_size, &case.key_lens());
        let table = PageTable::new(&gpu.stream, table).unwrap();
        let queries = RaggedTable::new(&gpu.stream, case.queries()).unwrap();
        let call = attention.plan(&mut workspace, &queries, &table, &options_of(&case));
        refused(call, "queries");
    }
}

/// Requests without queries, and without tokens.
#[test]
fn empty_requests() {
    for requests in [
        vec![(3, 0), (5, 20), (130, 0), (1, 1), (0, 0), (0, 9), (1, 0)],
        vec![(0, 40), (0, 0), (1, 3000)],
        vec![(3, 0), (130, 0), (1, 0)],
    ] {
        for group in [1, 4] {
            check_all::<bf16, bf16>(both(Case { requests: requests.clone(), group, ..case() }));
        }
    }
}

/// Batches without queries, and without requests.
#[test]
fn nothing_to_do() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let Some(attention) = attention_of::<f16, f16>(&gpu, &case()) else { return };
    let mut workspace = workspace_of(&gpu, &attention);
    for requests in [vec![(0, 5), (0, 0)], vec![(0, 0)], vec![]] {
        let problem = Problem::<f16, f16>::new(&gpu, rng, Case { requests, ..case() });
        let (case, tables) = (&problem.case, Tables::new(&gpu, &problem));
        let empty = plan(&attention, &mut workspace, &tables, case).unwrap();
        assert!(empty.numbers().is_empty() && empty.replay_key().is_err());
        check_run(&gpu, &empty, &problem);
        // A run still looks at its arguments.
        let one = Mirrored::<f16>::random(&gpu, rng, &case.q_shape(1));
        let (mut out, _) = problem.outputs_of(&gpu, 1);
        let call = empty.run_with(
            &one.device_view(),
            &cache(&problem.kv).device_view(),
            &mut out.device_view_mut(),
            None,
            &case.options(),
        );
        refused(call, "q");
        // In a graph there may be rows for queries that are not there.
        let queries = &tables.queries;
        let idle = attention.plan(&mut workspace, queries, pages(&tables), &graph_options(case, 4)).unwrap();
        let q = Mirrored::<f16>::random(&gpu, rng, &case.q_shape(4));
        let (mut out, mut lse) = problem.outputs_of(&gpu, 4);
        idle.run_with(
            &q.device_view(),
            &cache(&problem.kv).device_view(),
            &mut out.device_view_mut(),
            Some(&mut lse.device_view_mut()),
            &case.options(),
        )
        .unwrap();
        out.assert_untouched();
        lse.assert_untouched();
    }
}

/// Without a mask there may be more queries than tokens; with one it is refused.
#[test]
fn more_queries_than_tokens() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let Some(attention) = attention_of::<f16, f16>(&gpu, &case()) else { return };
    let mut workspace = workspace_of(&gpu, &attention);
    for requests in [vec![(20, 5)], vec![(300, 100)], vec![(5, 9), (130, 129), (7, 7)]] {
        let [causal, unmasked] = both(Case { requests, ..case() });
        let problem = Problem::<f16, f16>::new(&gpu, rng, unmasked);
        let tables = Tables::new(&gpu, &problem);
        refused(plan(&attention, &mut workspace, &tables, &causal), "queries");
        check(&gpu, &attention, &mut workspace, &problem);
    }
}

/// The output has the same bits with and without LSE, in each run, and
/// whatever is said about programmatic dependent launch.
#[test]
fn lse_and_pdl_change_nothing() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for requests in [case().requests, vec![(3, 6000), (40, 400)]] {
        let problem = Problem::<f16, f16>::new(&gpu, rng, Case { requests, ..case() });
        let Some(attention) = attention_of::<f16, f16>(&gpu, &problem.case) else { return };
        let mut workspace = workspace_of(&gpu, &attention);
        let tables = Tables::new(&gpu, &problem);
        let plan = plan(&attention, &mut workspace, &tables, &problem.case).unwrap();
        let (want, _) = check_run(&gpu, &plan, &problem);
        for enable_pdl in [None, Some(false), Some(true)] {
            let (mut out, _) = problem.outputs(&gpu);
            let mut options = problem.case.options();
            options.enable_pdl = enable_pdl;
            plan.run_with(
                &problem.q.device_view(),
                &cache(&problem.kv).device_view(),
                &mut out.device_view_mut(),
                None,
                &options,
            )
            .unwrap();
            assert_same_bits("without LSE", &out.download(), &want);
        }
    }
}

#[test]
fn sm_scale() {
    for requests in [case().requests, vec![(1, 5000), (30, 1000)]] {
        let cases = [0.01, 0.05, 0.5].map(|scale| Case {
            requests: requests.clone(),
            sm_scale: Some(scale),
            ..case()
        });
        check_all::<bf16, bf16>(cases.into_iter().flat_map(both));
    }
}

/// Hidden products are −50000 before they are scaled, so a factor of 0, one
/// below 0 or a tiny one would unmask them.
#[test]
fn sm_scale_that_unmasks() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for sm_scale in [0.0, -0.1, 1e-6, f64::NAN, f64::INFINITY] {
        let mut problem = Problem::<f16, f16>::new(&gpu, rng, case());
        problem.case.sm_scale = Some(sm_scale);
        let Some(attention) = attention_of::<f16, f16>(&gpu, &problem.case) else { return };
        let (mut workspace, tables) = (workspace_of(&gpu, &attention), Tables::new(&gpu, &problem));
        let plan = plan(&attention, &mut workspace, &tables, &problem.case).unwrap();
        let (mut out, mut lse) = problem.outputs(&gpu);
        refused(run(&plan, &problem, &mut out, Some(&mut lse)), "sm_scale");
        out.assert_untouched();
        lse.assert_untouched();
    }
}

/// Soft caps that bend the logits much and little.
#[test]
fn logits_soft_cap() {
    for requests in [case().requests, vec![(3, 5000), (64, 64)]] {
        let cases = [1.0, 5.0, 50.0].map(|soft_cap| Case {
            requests: requests.clone(),
            soft_cap: Some(soft_cap),
            sm_scale: Some(0.15),
            ..case()
        });
        check_all::<bf16, bf16>(cases.into_iter().flat_map(both));
    }
}

/// 16-bit queries over 8-bit keys and values.
#[test]
fn e4m3() {
    for requests in [case().requests, vec![(3, 5000), (64, 300)]] {
        let groups = [1, 4].map(|group| Case { requests: requests.clone(), group, ..case() });
        check_all::<bf16, F8E4M3>(groups.into_iter().flat_map(stored).flat_map(both));
    }
}

/// Scales of quantized keys and values, which these are not.
#[test]
fn scales() {
    for kv_scales in [(0.5, 0.125), (2.0, 3.5), (1.0, -1.0)] {
        let case = Case { kv_scales: Some(kv_scales), ..case() };
        check_all::<bf16, bf16>([case.clone()]);
        check_all::<f16, f16>([case]);
    }
}

/// Queries as the first heads of a joined query-key-value projection.
#[test]
fn strided_queries() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for case in both(Case { requests: vec![(5, 20), (1, 2000), (40, 900)], ..case() }) {
        let Some(attention) = attention_of::<f16, f16>(&gpu, &case) else { return };
        let mut workspace = workspace_of(&gpu, &attention);
        let shape = [case.queries().total(), case.kv_heads * (case.group + 2), 128];
        let q = Mirrored::<f16>::random(&gpu, rng, &shape).narrowed(1, 0, case.heads().num_qo_heads);
        let table = table_among(rng, 200, case.page_size, &case.key_lens());
        let kv = Kv::paged(&gpu, rng, &case, table);
        check(&gpu, &attention, &mut workspace, &Problem::<f16, f16>::solve(case, q, kv));
    }
}

/// Requests that begin with the same pages.
#[test]
fn shared_pages() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let requests = [(&[5, 2, 0][..], 40), (&[5, 2, 7, 1][..], 50), (&[5, 2][..], 32), (&[5, 8][..], 17)];
    for case in both(Case { requests: vec![(8, 40), (18, 50), (32, 32), (1, 17)], ..case() }) {
        let Some(attention) = attention_of::<f16, f16>(&gpu, &case) else { return };
        let mut workspace = workspace_of(&gpu, &attention);
        let table = PageIndices::from_requests(9, 16, requests).unwrap();
        let kv = Kv::paged(&gpu, rng, &case, table);
        check(&gpu, &attention, &mut workspace, &Problem::<f16, f16>::with_kv(&gpu, rng, case, kv));
    }
}

/// Offsets in a cache are 32-bit: 2³² elements are read to the end, more are
/// refused.
#[test]
fn cache_of_32_bits() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    // The same two pages, once as a small cache and once as the first and the
    // last but one page of 8 GiB and a page.
    let case = Case { requests: vec![(20, 32)], kv_heads: 8, joined: true, ..case() };
    let Some(attention) = attention_of::<f16, f16>(&gpu, &case) else { return };
    let small = PageIndices::from_requests(2, 16, [(&[1, 0][..], 32)]).unwrap();
    let kv = Kv::paged(&gpu, rng, &case, small);
    let problem = Problem::<f16, f16>::with_kv(&gpu, rng, case.clone(), kv);
    let page = 2 * 16 * 8 * 128;
    let pages = (1usize << 32) / page;
    let mut storage: CudaSlice<f16> = gpu.cuda.alloc_zeros((pages + 1) * page).unwrap();
    let (first, last) = cache(&problem.kv).tensors[0].host.split_at(page);
    gpu.cuda.memcpy_htod(first, &mut storage.slice_mut(..page)).unwrap();
    gpu.cuda.memcpy_htod(last, &mut storage.slice_mut((pages - 1) * page..pages * page)).unwrap();
    let table = PageIndices::from_requests(pages, 16, [(&[pages as i32 - 1, 0][..], 32)]).unwrap();
    let table = PageTable::new(&gpu.stream, table).unwrap();
    let queries = RaggedTable::new(&gpu.stream, case.queries()).unwrap();
    let mut workspace = workspace_of(&gpu, &attention);
    let plan = attention.plan(&mut workspace, &queries, &table, &options_of(&case)).unwrap();
    let (mut out, mut lse) = problem.outputs(&gpu);
    {
        let storage = storage.tensor(&gpu.cuda, &[pages + 1, 2, 16, 8, 128]).unwrap();
        let (q, mut out, mut lse) = (problem.q.device_view(), out.device_view_mut(), lse.device_view_mut());
        let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
        let mut run = |pages| {
            let kv = PagedKv::joined(storage.view().narrow(0, 0, pages).unwrap(), KvLayout::Nhd).unwrap();
            plan.run_with(&q, &kv, &mut out, Some(&mut lse), &case.options())
        };
        refused(run(pages + 1), "kv.k");
        run(pages).unwrap();
    }
    problem.verify(&out, Some(&lse));
}

/// Steps that follow each other without waiting, each planned on the
/// workspace of the one before and run for two layers.
#[test]
fn steps_share_a_workspace() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let case = case();
    let Some(attention) = attention_of::<f16, f16>(&gpu, &case) else { return };
    let steps = [
        vec![(9, 900), (3, 3), (0, 0)],
        vec![(129, 129)],
        vec![(17, 17), (1, 2500), (64, 64)],
        vec![(1, 40), (1, 700), (1, 1)],
    ]
    .map(|requests| Problem::<f16, f16>::new(&gpu, rng, Case { requests, ..case.clone() }));
    let mut workspace = workspace_of(&gpu, &attention);
    let mut tables = Tables::with_capacity(&gpu, &steps[0], 3, 200);
    for _ in 0..5 {
        let mut outputs: Vec<_> = steps.iter().map(|step| [step.outputs(&gpu), step.outputs(&gpu)]).collect();
        for (step, layers) in steps.iter().zip(&mut outputs) {
            tables.update(&gpu, step);
            let plan = plan(&attention, &mut workspace, &tables, &case).unwrap();
            for (out, lse) in layers {
                run(&plan, step, out, Some(lse)).unwrap();
            }
        }
        for (step, layers) in steps.iter().zip(&outputs) {
            layers.iter().for_each(|(out, lse)| step.verify(out, Some(lse)));
        }
    }
}

/// Replays with other lengths, other numbers of requests and of queries.
fn graph_replay<T: Number>() {
    const PAGES: usize = 400;
    const ROWS: usize = 160;
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    for case in both(case()) {
        let Some(attention) = attention_of::<T, T>(&gpu, &case) else { return };
        let mut workspace = workspace_of(&gpu, &attention);
        let heads = case.heads();
        let problem = |rng: &mut Rng, requests| {
            let case = Case { requests, ..case.clone() };
            let table = table_among(rng, PAGES, case.page_size, &case.key_lens());
            let kv = Kv::paged(&gpu, rng, &case, table);
            Problem::<T, T>::with_kv(&gpu, rng, case, kv)
        };
        let mut first = problem(rng, vec![(1, 1), (5, 20)]);
        let mut tables = Tables::with_capacity(&gpu, &first, 8, PAGES);
        let mut q = Mirrored::<T>::poisoned(&gpu, &case.q_shape(ROWS));
        let (mut out, mut lse) = first.outputs_of(&gpu, ROWS);
        let options = graph_options(&case, ROWS);
        let plan = attention.plan(&mut workspace, &tables.queries, pages(&tables), &options).unwrap();
        let (graph, captured) = {
            let (q, kv) = (q.device_view(), cache(&first.kv).device_view());
            let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
            let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
            capture(&gpu, || plan.run_with(&q, &kv, &mut out, Some(&mut lse), &case.options()))
        };
        captured.unwrap();
        out.assert_untouched(); // captured is not run
        let (graph, key) = (graph.expect("a graph"), plan.replay_key().ok());
        assert!(key.is_some());
        let Kv::Paged { cache: resident, .. } = &mut first.kv else { unreachable!("pages") };
        for requests in [
            vec![(1, 1), (5, 20)],
            vec![(2, 2), (6, 21), (1, 1), (34, 34), (17, 65), (8, 8)],
            vec![(1, 3000), (1, 1), (1, 2), (1, 3), (1, 4), (1, 5)],
            vec![(100, 700)],
            vec![(160, 160)],
            vec![(3, 50), (0, 31), (4, 5), (0, 0), (1, 900)],
            vec![(0, 7)],
            vec![(20, 64); 8],
        ] {
            let step = problem(rng, requests);
            tables.update(&gpu, &step);
            let mut rows = vec![T::POISON; q.host.len()];
            let used = step.queries.total() * heads.num_qo_heads * case.head_dim_qk;
            rows[..used].copy_from_slice(&step.q.host[..used]);
            q.upload(&rows);
            for (tensor, source) in resident.tensors.iter_mut().zip(&cache(&step.kv).tensors) {
                tensor.upload(&source.host);
            }
            out.upload(&vec![T::POISON; out.host.len()]);
            lse.upload(&vec![f32::NAN; lse.host.len()]);
            let plan = attention.plan(&mut workspace, &tables.queries, pages(&tables), &options).unwrap();
            assert_eq!(plan.replay_key().ok(), key);
            graph.launch().unwrap();
            step.verify(&out, Some(&lse));
            // The same plan, run directly.
            let (mut direct, mut direct_lse) = step.outputs_of(&gpu, ROWS);
            plan.run_with(
                &q.device_view(),
                &resident.device_view(),
                &mut direct.device_view_mut(),
                Some(&mut direct_lse.device_view_mut()),
                &case.options(),
            )
            .unwrap();
            assert_same_bits("replay and run", &out.download(), &direct.download());
            assert_same_bits("replay and run: LSE", &lse.download(), &direct_lse.download());
        }
    }
}

#[test]
fn graph_replay_f16() {
    graph_replay::<f16>();
}

#[test]
fn graph_replay_bf16() {
    graph_replay::<bf16>();
}

/// Which plans a captured graph may be replayed after.
#[test]
fn can_replay() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let case = Case { requests: vec![(3, 10), (20, 20), (1, 30)], ..case() };
    let Some(attention) = attention_of::<f16, f16>(&gpu, &case) else { return };
    let mut workspace = workspace_of(&gpu, &attention);
    let problem = Problem::<f16, f16>::new(&gpu, rng, case.clone());
    let mut tables = Tables::with_capacity(&gpu, &problem, 4, 50);
    let mut key = |tables: &Tables, case: &Case, options: &PlanOptions<'_>| {
        let attention = attention_of::<f16, f16>(&gpu, case).expect("the module");
        let plan = attention.plan(&mut workspace, &tables.queries, pages(tables), options);
        plan.unwrap().replay_key().ok()
    };
    let captured = key(&tables, &case, &graph_options(&case, 40));
    assert!(captured.is_some());
    assert_eq!(key(&tables, &case, &graph_options(&case, 40)), captured);
    assert_eq!(key(&tables, &case, &options_of(&case)), None);
    // Tensors, masks and heads are baked in.
    for (other, rows) in [
        (case.clone(), 41),
        (Case { causal: false, ..case.clone() }, 40),
        (Case { group: 1, ..case.clone() }, 40),
        (Case { kv_heads: 1, ..case.clone() }, 40),
    ] {
        assert_ne!(key(&tables, &other, &graph_options(&other, rows)), captured, "{other:?} {rows}");
    }
    // The number of requests is not.
    for requests in [vec![(3, 10), (20, 50)], vec![(3, 10), (20, 20), (1, 30), (0, 0)]] {
        let table = table_among(rng, problem_pages(&problem), case.page_size, &lens(&requests));
        let case = Case { requests, ..case.clone() };
        let kv = Kv::paged(&gpu, rng, &case, table);
        tables.update(&gpu, &Problem::<f16, f16>::with_kv(&gpu, rng, case.clone(), kv));
        assert_eq!(key(&tables, &case, &graph_options(&case, 40)), captured, "{case:?}");
    }
}

fn lens(requests: &[(usize, usize)]) -> Vec<usize> {
    requests.iter().map(|&(_, tokens)| tokens).collect()
}

/// Pages of a problem's cache.
fn problem_pages<K>(problem: &Problem<f16, K>) -> usize {
    cache(&problem.kv).shape.pages
}

/// Two threads, each with a stream, a workspace and tables of its own: their
/// launches each want the whole GPU.
#[test]
fn two_streams_at_once() {
    fn work(gpu: &Gpu, mut rng: Rng, case: &Case, attention: &BatchAttention) {
        let mut workspace = workspace_of(gpu, attention);
        let problems = [vec![(1, 1), (40, 300)], vec![(3, 4000), (7, 7)], vec![(130, 130), (1, 900)]]
            .map(|requests| Problem::<f16, f16>::new(gpu, &mut rng, Case { requests, ..case.clone() }));
        let mut tables = Tables::with_capacity(gpu, &problems[0], 2, 300);
        let mut first: Vec<(Vec<f16>, Vec<f32>)> = Vec::new();
        for iteration in 0..150 {
            let problem = &problems[iteration % problems.len()];
            tables.update(gpu, problem);
            let plan = plan(attention, &mut workspace, &tables, case).unwrap();
            if iteration < problems.len() {
                first.push(check_run(gpu, &plan, problem));
                continue;
            }
            let (mut out, mut lse) = problem.outputs(gpu);
            for _ in 0..4 {
                run(&plan, problem, &mut out, Some(&mut lse)).unwrap();
            }
            let (want, want_lse) = &first[iteration % problems.len()];
            assert_same_bits("output", &out.download(), want);
            assert_same_bits("LSE", &lse.download(), want_lse);
        }
    }
    let Some(gpu) = Gpu::start() else { return };
    let cases = [case(), Case { group: 1, causal: false, ..case() }];
    let attentions = cases.each_ref().map(|case| attention_of::<f16, f16>(&gpu, case));
    let [Some(one), Some(two)] = &attentions else { return };
    let other = gpu.fork();
    std::thread::scope(|scope| {
        let threads = [(&gpu, one), (&other, two)].into_iter().zip(&cases).map(|((gpu, attention), case)| {
            let rng = Rng::new();
            scope.spawn(move || work(gpu, rng, case, attention))
        });
        for thread in threads.collect::<Vec<_>>() {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
}

/// What there can be no module for.
#[test]
fn impossible_specs() {
    let Some(gpu) = Gpu::start() else { return };
    let spec = AttentionSpec::new(DType::F16, 128);
    for spec in [
        spec.with_backend(Backend::CudaCores),
        spec.with_backend(Backend::Fa3),
        spec.with_window_left(100),
        spec.with_head_dim_vo(64),
        spec.with_kv_dtype(DType::I8),
        spec.with_logits_soft_cap(0.0),
        AttentionSpec::new(DType::F32, 128),
    ] {
        let error = BatchAttention::new(&gpu.stream, &spec, case().heads()).unwrap_err();
        assert!(matches!(error, FlashInferError::Unsupported { .. }), "{spec:?}: {error}");
    }
}

#[test]
fn wrong_queries_and_outputs() {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.fork());
    let Some(attention) = attention_of::<f16, f16>(&gpu, &case()) else { return };
    let problem = Problem::<f16, f16>::new(&gpu, rng, case());
    let (case, tables) = (&problem.case, Tables::new(&gpu, &problem));
    let mut workspace = workspace_of(&gpu, &attention);
    let eager = plan(&attention, &mut workspace, &tables, case).unwrap();
    {
        let kv = cache(&problem.kv).device_view();
        refuse_queries_and_outputs(&gpu, &other, rng, &problem.q, &mut |q, out, lse| {
            eager.run_with(q, &kv, out, lse, &case.options())
        });
    }
    // The refused calls left everything usable.
    check_run(&gpu, &eager, &problem);
    // Planned for a graph, tensors have the graph's rows.
    let options = graph_options(case, problem.queries.total() + 1);
    let graph = attention.plan(&mut workspace, &tables.queries, pages(&tables), &options).unwrap();
    let (mut out, _) = problem.outputs(&gpu);
    refused(run(&graph, &problem, &mut out, None), "q");
    out.assert_untouched();
}

#[test]
fn wrong_caches() {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.fork());
    let Some(attention) = attention_of::<f16, f16>(&gpu, &case()) else { return };
    let problem = Problem::<f16, f16>::new(&gpu, rng, case());
    let (case, tables) = (&problem.case, Tables::new(&gpu, &problem));
    let mut workspace = workspace_of(&gpu, &attention);
    let plan = plan(&attention, &mut workspace, &tables, case).unwrap();
    let (mut out, mut lse) = problem.outputs(&gpu);
    {
        let q = problem.q.device_view();
        let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
        refuse_caches(&gpu, &other, rng, problem_pages(&problem), &mut |kv| {
            plan.run_with(&q, kv, &mut out.reborrow(), Some(&mut lse.reborrow()), &case.options())
        });
    }
    out.assert_untouched();
    lse.assert_untouched();
    // Heads that are not the plan's.
    let more = Problem::<f16, f16>::new(&gpu, rng, Case { kv_heads: 4, ..case.clone() });
    let call = plan.run_with(
        &problem.q.device_view(),
        &cache(&more.kv).device_view(),
        &mut out.device_view_mut(),
        None,
        &case.options(),
    );
    refused(call, "kv.k");
    out.assert_untouched();
    // The refused calls left everything usable.
    check_run(&gpu, &plan, &problem);
}

#[test]
fn wrong_plans() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.fork());
    let Some(attention) = attention_of::<f16, f16>(&gpu, &case()) else { return };
    let problem = Problem::<f16, f16>::new(&gpu, rng, case());
    let (case, tables) = (&problem.case, Tables::new(&gpu, &problem));
    let (options, total) = (options_of(case), problem.queries.total());
    let (queries, keys) = (&tables.queries, pages(&tables));
    let mut workspace = workspace_of(&gpu, &attention);
    for (num_qo_heads, num_kv_heads) in [(7, 2), (0, 2), (8, 0), (65536, 65536)] {
        let heads = Heads::new(num_qo_heads, num_kv_heads);
        refused(BatchAttention::new(&gpu.stream, attention.spec(), heads), "heads");
    }
    for rows in [0, total - 1] {
        let options = graph_options(case, rows);
        refused(attention.plan(&mut workspace, queries, keys, &options), "graph");
    }
    let options_of_a_huge_graph = graph_options(case, usize::MAX);
    refused(attention.plan(&mut workspace, queries, keys, &options_of_a_huge_graph), "graph");
    let fewer = RaggedTable::new(&gpu.stream, RaggedIndices::from_lens([total]).unwrap()).unwrap();
    refused(attention.plan(&mut workspace, &fewer, keys, &options), "queries");
    // Of another stream.
    let elsewhere = Tables::new(&other, &problem);
    refused(attention.plan(&mut workspace, &elsewhere.queries, keys, &options), "queries");
    refused(attention.plan(&mut workspace, queries, pages(&elsewhere), &options), "queries");
    let foreign = attention.plan(&mut workspace, &elsewhere.queries, pages(&elsewhere), &options);
    refused(foreign, "workspace");
    // A workspace grows to what is needed, and from nothing to no more.
    let mut grows = Workspace::with_sizes(&gpu.stream, 0, 0).unwrap();
    check(&gpu, &attention, &mut grows, &problem);
    assert_eq!(grows.float_bytes(), attention.float_bytes());
    assert!(grows.int_bytes() <= Workspace::DEFAULT_INT_BYTES);
    // What these kernels cannot do.
    let indices =
        MaskTable::new(&gpu.stream, MaskIndices::new(case.requests.iter().copied()).unwrap()).unwrap();
    let bits = gpu.cuda.alloc_zeros::<u8>(indices.host().num_bytes()).unwrap();
    let bits = bits.tensor(&gpu.cuda, &[bits.len()]).unwrap();
    let mask = Mask::Custom { indices: &indices, bits: bits.view() };
    let splits = [Split::fixed(8), Split::disabled(), Split::beside(1)];
    for wrong in splits.map(|split| options.with_split(split)).into_iter().chain([options.with_mask(mask)]) {
        let error = attention.plan(&mut workspace, queries, keys, &wrong).unwrap_err();
        assert!(matches!(error, FlashInferError::Unsupported { .. }), "{error}");
    }
    // During a capture, which goes on.
    let (_, call) = capture(&gpu, || {
        attention.plan(&mut workspace, queries, keys, &options).map(|plan| plan.numbers().to_vec())
    });
    refused(call, "workspace");
    // The refused calls left everything usable.
    check(&gpu, &attention, &mut workspace, &problem);
}
