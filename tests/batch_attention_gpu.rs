//! Attention of mixed batches on the GPU against the CPU reference.
//!
//! Cache slots that hold no token are NaN, and so are outputs beforehand, so
//! that whatever is read or left out by mistake shows.
#![cfg(feature = "cudarc")]

mod common;

mod batch_attention_gpu {
    mod options;
    mod plans;
    mod shapes;
    mod wrong_input;
}

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
        AttentionSpec, Backend, BatchAttention, BatchAttentionPlan, Heads, Mask, PagedBatch, PlanOptions,
        Split, Workspace,
    },
    gpu::TensorExt,
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
    attention.plan(workspace, PagedBatch::new(&tables.queries, pages(tables)), &options_of(case))
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

/// Pages of a problem's cache.
fn problem_pages<K>(problem: &Problem<f16, K>) -> usize {
    cache(&problem.kv).shape.pages
}
