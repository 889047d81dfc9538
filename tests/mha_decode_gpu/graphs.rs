//! Decode in CUDA graphs.

use crate::*;

#[test]
fn graph_replay_on_fa3() {
    if has_fa3() {
        graph_replay(Backend::Fa3, Split::default());
    }
}

/// A captured step: the graph, the plan's numbers, and the tensors that the
/// graph works on.
struct Captured<T> {
    graph: CudaGraph,
    key: Option<ReplayKey>,
    split: Split,
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
    split: Split,
) -> Captured<T> {
    let [batch, heads, _] = case.q_shape();
    let q = Mirrored::poisoned(gpu, &case.q_shape());
    let cache = Cache::poisoned(gpu, case.cache_shape(pages));
    let mut out = Mirrored::poisoned(gpu, &case.q_shape());
    let mut lse = Mirrored::poisoned(gpu, &[batch, heads]);
    let plan = decode.plan(workspace, table, &for_graph(table).with_split(split)).unwrap();
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
    Captured { graph, key, split, q, cache, out, lse }
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
        let plan = decode.plan(workspace, &*table, &for_graph(table).with_split(self.split)).unwrap();
        assert_eq!(plan.replay_key().ok(), self.key);
        if self.split == Split::disabled() {
            assert_eq!(plan.numbers()[0], table.host().batch_size() as i64, "blocks beyond the tiles");
        }
        self.graph.launch().unwrap();
        problem.verify(&self.out, Some(&self.lse));
        let (direct, direct_lse) = problem.check_run(gpu, &plan);
        assert_same_bits("replay and run", &self.out.download(), &direct);
        assert_same_bits("replay and run: LSE", &self.lse.download(), &direct_lse);
        problem.check(gpu, decode, &mut Workspace::new(&gpu.stream).unwrap());
    }
}

/// Replays with other lengths, and with fewer requests than were captured.
fn graph_replay(backend: Backend, split: Split) {
    fn run<T: Number>(
        gpu: &Gpu,
        rng: &mut Rng,
        (backend, split, group): (Backend, Split, usize),
        layout: KvLayout,
        joined: bool,
    ) {
        const PAGES: usize = 400;
        let case = Case { kv_heads: 8, group, layout, joined, backend, ..Case::default() };
        let batch = case.lens.len();
        let Some(decode) = decode_of::<T, T>(gpu, &case) else { return };
        let first = table_among(rng, PAGES, case.page_size, &case.lens);
        let mut table = PageTable::with_capacity(&gpu.stream, first, batch, PAGES).unwrap();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let mut captured = capture::<T>(gpu, &decode, &case, PAGES, &mut workspace, &table, split);
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
    run::<f16>(&gpu, rng, (backend, split, 4), KvLayout::Nhd, false);
    run::<bf16>(&gpu, rng, (backend, split, 4), KvLayout::Hnd, true);
    if split == Split::disabled() {
        // More query heads on a KV head than the smallest tile has rows.
        run::<f16>(&gpu, rng, (backend, split, 20), KvLayout::Nhd, false);
    }
}

#[test]
fn graph_replay_on_cuda_cores() {
    graph_replay(Backend::CudaCores, Split::default());
}

#[test]
fn graph_replay_on_tensor_cores() {
    graph_replay(Backend::Fa2, Split::default());
}

/// Undivided, a graph has the blocks of its requests alone, whatever their lengths.
#[test]
fn graph_replay_of_undivided_keys() {
    graph_replay(Backend::Fa2, Split::disabled());
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
        let mut captured =
            capture::<bf16>(&gpu, &decode, &case, PAGES, &mut workspace, &table, Split::default());
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
        let mut captured =
            capture::<f16>(&gpu, &decode, &case, PAGES, &mut workspace, &table, Split::default());
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
