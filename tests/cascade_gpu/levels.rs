//! Attention of several levels against attention over complete page tables.

use flashinfer_rs::{
    DType, FlashInferError, TensorRef,
    attention::{Backend, CascadeWorkspace, MultiLevelCascade, PagedBatch, PlanOptions},
    indices::{RaggedIndices, RaggedTable},
    kv::PagedKv,
};

use crate::common::{
    attention::{capture, refuse_caches, refuse_queries_and_outputs},
    cache::LAYOUTS,
    prefill::{Case, Kind, Kv, On, Problem, prefill_of},
};
use crate::*;

const FA2: On = On { kind: Kind::Paged, backend: Backend::Fa2 };
const FA3: On = On { backend: Backend::Fa3, ..FA2 };

/// Sequences that share what they begin with.
#[derive(Clone, Debug)]
struct Tree {
    /// Queries of each sequence.
    queries: Vec<usize>,
    /// For each request of each level, how many sequences it covers and
    /// its tokens. But for a sequence's last, they fill whole pages.
    levels: Vec<Vec<(usize, usize)>>,
}

impl Tree {
    /// One prefix of all, and what each sequence has after it: queries and
    /// tokens.
    fn shared(prefix: usize, own: &[(usize, usize)]) -> Self {
        let own_tokens = own.iter().map(|&(_, tokens)| (1, tokens)).collect();
        let queries = own.iter().map(|&(queries, _)| queries).collect();
        Self { queries, levels: vec![vec![(own.len(), prefix)], own_tokens] }
    }

    fn pages(&self, page_size: usize) -> usize {
        self.levels.iter().flatten().map(|(_, tokens)| tokens.div_ceil(page_size)).sum()
    }

    /// Queries and pages of each level, and the pages of each sequence.
    fn tables(
        &self,
        rng: &mut Rng,
        num_pages: usize,
        page_size: usize,
    ) -> (Vec<(RaggedIndices, PageIndices)>, PageIndices) {
        let lens: Vec<usize> = self.levels.iter().flatten().map(|&(_, tokens)| tokens).collect();
        let parts = table_among(rng, num_pages, page_size, &lens);
        let table = |requests: &[(Vec<i32>, usize)]| {
            let requests = requests.iter().map(|(pages, len)| (&pages[..], *len));
            PageIndices::from_requests(num_pages, page_size, requests).unwrap()
        };
        let mut sequences = vec![(Vec::new(), 0); self.queries.len()];
        let mut part = 0;
        let mut levels = Vec::new();
        for level in &self.levels {
            let (mut first, mut rows, mut requests) = (0, Vec::new(), Vec::new());
            for &(covers, tokens) in level {
                let covered = first..first + covers;
                rows.push(self.queries[covered.clone()].iter().sum());
                for (pages, len) in &mut sequences[covered] {
                    pages.extend_from_slice(parts.pages(part));
                    *len += tokens;
                }
                requests.push((parts.pages(part).to_vec(), tokens));
                (first, part) = (first + covers, part + 1);
            }
            assert_eq!(first, self.queries.len(), "a level covers all sequences");
            levels.push((RaggedIndices::from_lens(rows).unwrap(), table(&requests)));
        }
        (levels, table(&sequences))
    }
}

/// The tables of each level on the device.
struct Tables(Vec<(RaggedTable, PageTable)>);

impl Tables {
    fn new(gpu: &Gpu, levels: &[(RaggedIndices, PageIndices)]) -> Self {
        Self::with_capacity(gpu, levels, 0)
    }

    /// With room for more pages.
    fn with_capacity(gpu: &Gpu, levels: &[(RaggedIndices, PageIndices)], pages: usize) -> Self {
        let tables = levels.iter().map(|(queries, table)| {
            let (batch, pages) = (table.batch_size(), pages.max(table.indices().len()));
            (
                RaggedTable::new(&gpu.stream, queries.clone()).unwrap(),
                PageTable::with_capacity(&gpu.stream, table.clone(), batch, pages).unwrap(),
            )
        });
        Self(tables.collect())
    }

    fn update(&mut self, levels: &[(RaggedIndices, PageIndices)]) {
        for ((queries, table), (new_queries, new_table)) in self.0.iter_mut().zip(levels) {
            queries.update(new_queries.clone()).unwrap();
            table.update(new_table.clone()).unwrap();
        }
    }

    fn levels(&self) -> Vec<PagedBatch<'_>> {
        self.0.iter().map(|(queries, table)| PagedBatch::new(queries, table)).collect()
    }
}

type Levels = Vec<(RaggedIndices, PageIndices)>;

/// A tree with the numbers of a case whose requests are its sequences.
fn problem<T: Number>(
    gpu: &Gpu,
    rng: &mut Rng,
    case: &Case,
    tree: &Tree,
    num_pages: usize,
) -> (Problem<T, T>, Levels) {
    let (levels, flat) = tree.tables(rng, num_pages, case.page_size);
    let lens = flat.seq_lens().into_iter().map(|len| len as usize);
    let case = Case { requests: tree.queries.iter().copied().zip(lens).collect(), ..case.clone() };
    let kv = Kv::paged(gpu, rng, &case, flat);
    (Problem::with_kv(gpu, rng, case, kv), levels)
}

fn options(case: &Case) -> PlanOptions<'static> {
    case.plan_options()
}

fn cascade_of<T: Number>(gpu: &Gpu, case: &Case) -> Option<MultiLevelCascade> {
    prefill_of::<T, T>(gpu, case)?;
    let cascade = MultiLevelCascade::new(&gpu.stream, &case.spec::<T, T>(), case.heads()).unwrap();
    assert_eq!(cascade.backend(), case.on.backend);
    Some(cascade)
}

/// Compares a cascade with the reference over complete page tables, as the
/// flat kernels are.
fn check<T: Number>(cases: impl IntoIterator<Item = (Case, Tree)>) {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    // Partial results of many blocks with wide tiles let them grow.
    let mut workspace = CascadeWorkspace::new(&gpu.stream, 3).unwrap();
    let mut flat_workspace = Workspace::new(&gpu.stream).unwrap();
    for (case, tree) in cases {
        let Some(prefill) = prefill_of::<T, T>(&gpu, &case) else { return };
        let Some(cascade) = cascade_of::<T>(&gpu, &case) else { return };
        let num_pages = tree.pages(case.page_size) + 3;
        let (problem, levels) = problem::<T>(&gpu, rng, &case, &tree, num_pages);
        problem.check(&gpu, &prefill, &mut flat_workspace);
        let (tables, case) = (Tables::new(&gpu, &levels), &problem.case);
        let plan = cascade.plan(&mut workspace, &tables.levels(), &options(case)).unwrap();
        assert!(plan.replay_key().is_err());
        let Kv::Paged { cache, .. } = &problem.kv else { unreachable!("pages") };
        let (mut out, mut lse) = problem.outputs(&gpu);
        let (mut out_alone, _) = problem.outputs(&gpu);
        {
            let (q, cache) = (problem.q.device_view(), cache.device_view());
            let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
            let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
            plan.run_with(&q, &cache, &mut out, Some(&mut lse), &case.options()).unwrap();
            let mut out = out_alone.device_view_mut();
            plan.run_with(&q, &cache, &mut out.reborrow(), None, &case.options()).unwrap();
        }
        problem.verify(&out, Some(&lse));
        assert_same_bits("without LSE", &out_alone.download(), &out.download());
    }
}

/// A decode step: one query each, also where nothing comes after the prefix.
fn decode(page_size: usize) -> Vec<Tree> {
    let prefix = 304 / page_size * page_size;
    vec![
        Tree::shared(prefix, &[1, 16, 17, 0, 77].map(|own| (1, own))),
        Tree::shared(4096, &[(1, 5)]),
        Tree::shared(page_size, &[(1, 0), (1, 200)]),
        Tree::shared(0, &[(1, 3), (1, 0)]),
    ]
}

/// Chunks of prompts: several queries each, and a sequence without any.
fn chunks(page_size: usize) -> Vec<Tree> {
    let prefix = 304 / page_size * page_size;
    vec![
        Tree::shared(prefix, &[(5, 20), (33, 33), (1, 1), (0, 7), (130, 200), (1, 0)]),
        Tree::shared(5120, &[(3, 3), (2, 64)]),
    ]
}

/// Three levels: two prompts, each continued in two ways or not, and what
/// sequences have of their own. And one level, which is plain prefill.
fn other_levels() -> Vec<Tree> {
    let own = [(1, 5), (1, 64), (1, 1), (1, 0), (1, 33)].to_vec();
    let three = vec![vec![(2, 256), (3, 128)], vec![(1, 64), (1, 0), (2, 192), (1, 64)], own.clone()];
    let all = vec![vec![(5, 640)], vec![(4, 64), (1, 3200)], own.clone()];
    vec![
        Tree { queries: vec![1; 5], levels: three.clone() },
        Tree { queries: vec![5, 64, 1, 1, 20], levels: three },
        Tree { queries: vec![3, 60, 1, 0, 33], levels: all },
        Tree { queries: vec![3, 60, 1, 0, 33], levels: vec![own] },
        Tree { queries: vec![0; 2], levels: vec![vec![(2, 64)], vec![(1, 3), (1, 0)]] },
    ]
}

/// The trees and how their levels are masked, by the reference alone: the
/// states of all levels merge into those over complete page tables.
#[test]
fn levels_merge_into_the_whole() {
    let rng = &mut Rng::new();
    let spec = AttentionSpec::new(DType::F64, 8);
    for page_size in [1, 16, 64] {
        let mut trees = [decode(page_size), chunks(page_size)].concat();
        if page_size == 64 {
            trees.extend(other_levels());
        }
        for (tree, causal) in trees.iter().flat_map(|tree| [(tree, true), (tree, false)]) {
            let num_pages = tree.pages(page_size) + 1;
            let (levels, flat) = tree.tables(rng, num_pages, page_size);
            let rows = tree.queries.iter().sum();
            let mut numbers = |len: usize| -> Vec<f64> { (0..len).map(|_| rng.unit()).collect() };
            let cache_len = num_pages * page_size * 8;
            let (q, k, v) = (numbers(rows * 2 * 8), numbers(cache_len), numbers(cache_len));
            let cache = |of| TensorRef::from_slice(of, &[num_pages, page_size, 1, 8]).unwrap();
            let run = |queries: &RaggedIndices, table: &PageIndices, mask| {
                let (mut out, mut lse) = (vec![f64::NAN; rows * 2 * 8], vec![f64::NAN; rows * 2]);
                reference::batch_prefill_paged(
                    &spec,
                    &TensorRef::from_slice(&q, &[rows, 2, 8]).unwrap(),
                    &PagedKv::new(cache(&k), cache(&v), KvLayout::Nhd),
                    queries,
                    table,
                    &mut TensorMut::from_slice(&mut out, &[rows, 2, 8]).unwrap(),
                    Some(&mut TensorMut::from_slice(&mut lse, &[rows, 2]).unwrap()),
                    mask,
                    &RunOptions::default(),
                )
                .unwrap();
                (out, lse)
            };
            let last_mask = if causal { reference::HostMask::Causal } else { reference::HostMask::None };
            let queries = RaggedIndices::from_lens(tree.queries.iter().copied()).unwrap();
            let (want, want_lse) = run(&queries, &flat, last_mask);
            let ((queries, table), others) = levels.split_last().unwrap();
            let (mut out, mut lse) = run(queries, table, last_mask);
            for (queries, table) in others {
                let (other, other_lse) = run(queries, table, reference::HostMask::None);
                let mut state = StateMut::new(
                    TensorMut::from_slice(&mut out, &[rows, 2, 8]).unwrap(),
                    TensorMut::from_slice(&mut lse, &[rows, 2]).unwrap(),
                );
                let other = State::new(
                    TensorRef::from_slice(&other, &[rows, 2, 8]).unwrap(),
                    TensorRef::from_slice(&other_lse, &[rows, 2]).unwrap(),
                );
                reference::merge_state_in_place(&mut state, &other, None).unwrap();
            }
            let close = |got: &[f64], want: &[f64], bound: f64| {
                got.iter().zip(want).all(|(got, want)| got == want || (got - want).abs() <= bound)
            };
            assert!(close(&out, &want, 1e-9), "{tree:?}, causal: {causal}");
            assert!(close(&lse, &want_lse, 1e-9), "{tree:?}, causal: {causal}");
        }
    }
}

fn shapes<T: Number>(on: On, head_dim: usize) {
    let mut cases = Vec::new();
    for (at, (page_size, group)) in [(1, 1), (16, 4), (64, 8), (16, 5)].into_iter().enumerate() {
        let (layout, joined) = (LAYOUTS[at % 2], at >= 2);
        let case = Case { page_size, group, layout, joined, ..on.case().head_dim(head_dim) };
        let mut trees = [decode(page_size), chunks(page_size)].concat();
        if page_size == 64 {
            trees.extend(other_levels());
        }
        for (tree, causal) in trees.iter().flat_map(|tree| [(tree, true), (tree, false)]) {
            cases.push((Case { causal, ..case.clone() }, tree.clone()));
        }
    }
    check::<T>(cases);
}

macro_rules! shapes {
    ($($name:ident: $on:ident $ty:ty, $head_dim:literal;)*) => {
        $(#[test]
        fn $name() {
            shapes::<$ty>($on, $head_dim);
        })*
    };
}
shapes! {
    fa2_f16_64: FA2 f16, 64;
    fa2_f16_128: FA2 f16, 128;
    fa2_f16_256: FA2 f16, 256;
    fa2_bf16_64: FA2 bf16, 64;
    fa2_bf16_128: FA2 bf16, 128;
    fa2_bf16_256: FA2 bf16, 256;
    fa3_f16_64: FA3 f16, 64;
    fa3_f16_128: FA3 f16, 128;
    fa3_bf16_64: FA3 bf16, 64;
    fa3_bf16_128: FA3 bf16, 128;
}

/// One graph, replayed while the lengths of all levels and the number of
/// queries change.
fn graph_replay(on: On) {
    const PAGES: usize = 300;
    const ROWS: usize = 90;
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    let case = on.case();
    let Some(cascade) = cascade_of::<bf16>(&gpu, &case) else { return };
    let heads = case.heads();
    let graph_options = PlanOptions::causal().with_graph(ROWS);
    let mut workspace = CascadeWorkspace::new(&gpu.stream, 2).unwrap();
    let first = Tree::shared(64, &[(1, 5), (1, 1), (3, 20)]);
    let (first, levels) = problem::<bf16>(&gpu, rng, &case, &first, PAGES);
    let mut tables = Tables::with_capacity(&gpu, &levels, PAGES);
    let mut q = Mirrored::<bf16>::poisoned(&gpu, &case.q_shape(ROWS));
    let (mut out, mut lse) = first.outputs_of(&gpu, ROWS);
    let Kv::Paged { mut cache, .. } = first.kv else { unreachable!("pages") };
    let (graph, key) = {
        let plan = cascade.plan(&mut workspace, &tables.levels(), &graph_options).unwrap();
        let (q, cache) = (q.device_view(), cache.device_view());
        let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
        let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
        let (graph, run) =
            capture(&gpu, || plan.run_with(&q, &cache, &mut out, Some(&mut lse), &case.options()));
        run.unwrap();
        (graph.expect("a graph"), plan.replay_key().ok())
    };
    assert!(key.is_some());
    out.assert_untouched(); // captured is not run
    for tree in [
        Tree::shared(64, &[(1, 5), (1, 1), (3, 20)]),
        Tree::shared(3200, &[(1, 5), (1, 0), (1, 9)]),
        Tree::shared(16, &[(60, 60), (20, 700), (10, 10)]),
        Tree::shared(0, &[(1, 1), (0, 0), (0, 40)]),
        Tree::shared(320, &[(30, 31); 3]),
    ] {
        let (problem, levels) = problem::<bf16>(&gpu, rng, &case, &tree, PAGES);
        tables.update(&levels);
        let used = problem.queries.total();
        let per_row = heads.num_qo_heads * case.head_dim_qk;
        let mut content = vec![bf16::NAN; ROWS * per_row];
        content[..used * per_row].copy_from_slice(&problem.q.host[..used * per_row]);
        q.upload(&content);
        let Kv::Paged { cache: new, .. } = &problem.kv else { unreachable!("pages") };
        for (tensor, source) in cache.tensors.iter_mut().zip(&new.tensors) {
            tensor.upload(&source.host);
        }
        out.upload(&vec![bf16::NAN; ROWS * per_row]);
        lse.upload(&vec![f32::NAN; ROWS * heads.num_qo_heads]);
        let plan = cascade.plan(&mut workspace, &tables.levels(), &graph_options).unwrap();
        assert_eq!(plan.replay_key().ok(), key);
        graph.launch().unwrap();
        // Rows beyond the batch's mean nothing.
        let of_batch = |out: &Mirrored<bf16>, lse: &Mirrored<f32>| {
            let (mut v, mut s) = (out.download(), lse.download());
            v.truncate(used * per_row);
            s.truncate(used * heads.num_qo_heads);
            let v = Mirrored::new(&gpu, &[used, heads.num_qo_heads, case.head_dim_vo], v);
            (v, Mirrored::new(&gpu, &[used, heads.num_qo_heads], s))
        };
        let (replayed, replayed_lse) = of_batch(&out, &lse);
        problem.verify(&replayed, Some(&replayed_lse));
        let (mut out, mut lse) = problem.outputs_of(&gpu, ROWS);
        {
            let (q, cache) = (q.device_view(), cache.device_view());
            let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
            let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
            plan.run_with(&q, &cache, &mut out, Some(&mut lse), &case.options()).unwrap();
        }
        let (direct, direct_lse) = of_batch(&out, &lse);
        assert_same_bits("replay and run", &replayed.host, &direct.host);
        assert_same_bits("replay and run: LSE", &replayed_lse.host, &direct_lse.host);
    }
    // Another number of requests on a level makes another graph.
    let (_, levels) = problem::<bf16>(&gpu, rng, &case, &Tree::shared(64, &[(1, 5), (1, 1)]), PAGES);
    let fewer = Tables::new(&gpu, &levels);
    let plan = cascade.plan(&mut workspace, &fewer.levels(), &graph_options).unwrap();
    assert_ne!(plan.replay_key().ok(), key);
}

#[test]
fn fa2_graph_replay() {
    graph_replay(FA2);
}

#[test]
fn fa3_graph_replay() {
    graph_replay(FA3);
}

#[test]
fn wrong_plans() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
    let case = FA2.case();
    let Some(cascade) = cascade_of::<f16>(&gpu, &case) else { return };
    let eager = PlanOptions::causal();
    let mut workspace = CascadeWorkspace::with_sizes(&gpu.stream, 2, 16 << 20, 4 << 20).unwrap();
    let mut tables =
        |tree: Tree, num_pages, page_size| Tables::new(&gpu, &tree.tables(rng, num_pages, page_size).0);
    let right = tables(Tree::shared(64, &[(1, 5), (3, 20)]), 20, 16);
    let fewer_rows = tables(Tree::shared(64, &[(1, 5), (2, 20)]), 20, 16);
    let more_pages = tables(Tree::shared(64, &[(1, 5), (3, 20)]), 21, 16);
    let larger_pages = tables(Tree::shared(64, &[(1, 5), (3, 20)]), 20, 32);
    let short = tables(Tree::shared(64, &[(1, 5), (3, 2)]), 20, 16);
    let (good, own) = (right.levels(), right.levels()[1]);
    let mut plan = |levels: &[PagedBatch<'_>], options: &PlanOptions<'_>| {
        cascade.plan(&mut workspace, levels, options).map(drop)
    };
    plan(&good, &eager).unwrap();
    refused(plan(&[], &eager), "levels");
    for wrong in [&fewer_rows, &more_pages, &larger_pages] {
        refused(plan(&[wrong.levels()[0], own], &eager), "levels");
    }
    refused(plan(&[good[0], good[0], own], &eager), "workspace");
    // Only the last level can have too few keys for a causal mask.
    let too_short = plan(&short.levels(), &eager);
    assert!(too_short.as_ref().is_err_and(|error| error.to_string().contains("level 1")), "{too_short:?}");
    refused(too_short, "queries");
    plan(&short.levels(), &PlanOptions::default()).unwrap();
    let wrong = Heads::new(7, 2);
    refused(MultiLevelCascade::new(&gpu.stream, &case.spec::<f16, f16>(), wrong), "heads");
    let graph = eager.with_graph(3);
    refused(plan(&good, &graph), "graph");
    let mut elsewhere = CascadeWorkspace::new(&other.stream, 2).unwrap();
    refused(cascade.plan(&mut elsewhere, &good, &eager), "workspace");
    let mut grows = CascadeWorkspace::with_sizes(&gpu.stream, 2, 0, 0).unwrap();
    cascade.plan(&mut grows, &good, &eager).unwrap();
    let (_, (plan, new)) = capture(&gpu, || {
        (
            cascade.plan(&mut workspace, &good, &eager).map(drop),
            CascadeWorkspace::new(&gpu.stream, 1).map(drop),
        )
    });
    refused(plan, "workspace");
    refused(new, "stream");
    cascade.plan(&mut workspace, &good, &eager).unwrap();
    for spec in [
        case.spec::<f16, f16>().with_window_left(7),
        AttentionSpec::new(case.spec::<f16, f16>().dtype_q, 100),
    ] {
        let error = MultiLevelCascade::new(&gpu.stream, &spec, case.heads()).unwrap_err();
        assert!(matches!(error, FlashInferError::Unsupported { .. }), "{error}");
    }
}

#[test]
fn wrong_input_to_run() {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
    let case = FA2.case();
    let Some(cascade) = cascade_of::<f16>(&gpu, &case) else { return };
    let tree = Tree::shared(64, &[(1, 5), (3, 20), (1, 0)]);
    let (problem, levels) = problem::<f16>(&gpu, rng, &case, &tree, 12);
    let tables = Tables::new(&gpu, &levels);
    let mut workspace = CascadeWorkspace::new(&gpu.stream, 2).unwrap();
    let plan = cascade.plan(&mut workspace, &tables.levels(), &PlanOptions::default()).unwrap();
    let Kv::Paged { cache, .. } = &problem.kv else { unreachable!("pages") };
    let cache = cache.device_view();
    let options = RunOptions::default();
    refuse_queries_and_outputs(&gpu, &other, rng, &problem.q, &mut |q, out, lse| {
        plan.run_with(q, &cache, out, lse, &options)
    });
    let (mut out, mut lse) = problem.outputs(&gpu);
    {
        let q = problem.q.device_view();
        let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
        refuse_caches(&gpu, &other, rng, 12, &mut |kv| {
            plan.run_with(&q, kv, &mut out.reborrow(), Some(&mut lse.reborrow()), &options)
        });
    }
    out.assert_untouched();
    lse.assert_untouched();
}
