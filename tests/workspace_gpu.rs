//! What plans take of a workspace: computed before the planner of a real module
//! runs, and enough for it; and when a workspace grows.
#![cfg(feature = "cudarc")]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Gpu, Rng, attention::capture, cache::repeating_table, is_0_7, refused, say};
use flashinfer_rs::{
    DType, FlashInferError, PageIndices, PageTable, Result,
    attention::{
        AttentionSpec, Backend, BatchAttention, BatchDecode, BatchMla, BatchPrefill, CascadeWorkspace, Heads,
        MlaSpec, MultiLevelCascade, PagedBatch, PlanOptions, Split, Workspace,
    },
    indices::{RaggedIndices, RaggedTable},
};

/// Where the planners say that their arrays are.
#[derive(Clone, Copy, Debug)]
enum Planner {
    CudaCores,
    Fa2,
    /// FlashAttention 2 of FlashInfer 0.7.
    Fa2Later,
    Fa3,
    /// For heads of so many elements.
    Mixed(usize),
    Mla,
}

impl Planner {
    /// The bytes of partial results and of index arrays up to the end of the last
    /// array, from a plan's numbers.
    fn taken(self, numbers: &[i64], heads: Heads, head_dim: usize) -> [usize; 2] {
        let n: Vec<usize> = numbers.iter().map(|&number| number as usize).collect();
        match self {
            // Chunks; outputs, sums; the flags, or the size of a chunk.
            Self::CudaCores if n[9] == 0 => [0, n[7] + 4],
            Self::CudaCores => {
                let sums = heads.num_qo_heads * n[0] * 4;
                assert!(n[2] >= n[1] + sums * head_dim, "{n:?}");
                [n[2] + sums, n[6] + n[0]]
            }
            // Work, tile; the size of a chunk, the rows of a graph; sums, flags.
            Self::Fa2 if n[14] == 0 && n[13] == 0 => [0, n[9] + 4],
            Self::Fa2 if n[14] == 0 => [0, n[2] + 4],
            Self::Fa2 => {
                let sums = heads.num_qo_heads * n[0] * n[3] * 4;
                assert!(n[11] >= n[10] + sums * head_dim, "{n:?}");
                [n[11] + sums, n[12] + n[0]]
            }
            // The offsets to merge by, of all rows; flags for graphs.
            Self::Fa2Later => {
                let sums =
                    heads.num_qo_heads * (n[0] * n[3]).div_ceil(heads.num_qo_heads / heads.num_kv_heads) * 4;
                assert!(n[14] == 0 || n[11] >= n[10] + sums * head_dim, "{n:?}");
                let float = if n[14] == 0 { 0 } else { n[11] + sums };
                let indices = if n[14] == 0 { n[9] + 4 } else { n[7] + 4 * (n[1] + 1) };
                [float, if n[13] == 0 { indices } else { n[12] + n[0] }]
            }
            // Arrays of one size, which fill up to 12 bytes less than from one to the next.
            Self::Fa3 => [0, n[7] + (n[5] - n[4]) - 12],
            // Outputs are first, then come sums. The number of rows to merge is the last index.
            Self::Mixed(head_dim) => [n[24] + n[24] / (2 * head_dim) * 4, n[27] + 4],
            Self::Mla => [n[17] + n[17] / (2 * 512) * 4, n[15] + 4 * 16384],
        }
    }

    /// How much more may have been asked for.
    fn slack(self) -> usize {
        match self {
            // Only the module knows how many blocks there are at once.
            Self::CudaCores => usize::MAX,
            Self::Fa3 => 12,
            _ => 0,
        }
    }
}

/// A batch of any family.
struct Batch {
    queries: RaggedTable,
    table: PageTable,
    /// The keys of the same requests, one after the other.
    keys: RaggedTable,
    causal: bool,
    heads: Heads,
    /// Rows of a graph.
    rows: usize,
}

impl Batch {
    fn random(gpu: &Gpu, rng: &mut Rng, requests: [usize; 3]) -> Self {
        let page_size = [1, 5, 16, 64, 256][rng.below(5)];
        let (requests, longest) = (requests[rng.below(3)], [40, 400, 6000][rng.below(3)]);
        let (requests, most) = (1 + rng.below(requests), [2, 9, 40][rng.below(3)]);
        // The first has a token and a query, so that there is something to plan.
        let lens: Vec<usize> = (0..requests).map(|at| rng.below(longest).max(usize::from(at == 0))).collect();
        let causal = rng.below(2) == 0;
        let queries = lens.iter().enumerate().map(|(at, &len)| {
            let queries = rng.below(most).max(usize::from(at == 0));
            if causal { queries.min(len) } else { queries }
        });
        let queries = RaggedIndices::from_lens(queries).unwrap();
        let num_kv_heads = [1, 2, 3, 8][rng.below(4)];
        Self {
            causal,
            heads: Heads::new(num_kv_heads * [1, 2, 4, 8][rng.below(4)], num_kv_heads),
            rows: queries.total().max(requests) + rng.below(50),
            queries: RaggedTable::new(&gpu.stream, queries).unwrap(),
            table: PageTable::new(&gpu.stream, repeating_table(rng, 100, page_size, &lens)).unwrap(),
            keys: RaggedTable::new(&gpu.stream, RaggedIndices::from_lens(lens).unwrap()).unwrap(),
        }
    }

    fn plan_options(&self, graph: bool) -> PlanOptions<'static> {
        let mut options = if self.causal { PlanOptions::causal() } else { PlanOptions::default() };
        options.graph = graph.then_some(self.rows);
        options
    }

    fn decode_options(&self, graph: bool) -> PlanOptions<'static> {
        let mut options = PlanOptions::default();
        options.graph = graph.then_some(self.table.host().batch_size());
        options
    }
}

/// A plan on a workspace, for a graph or not; gives its numbers.
type Plan<'a> = &'a dyn Fn(&mut Workspace, bool) -> Result<Vec<i64>>;

/// How FlashAttention 2 can be told to divide keys, but by itself.
fn splits(rng: &mut Rng, batch: &Batch) -> [Split; 4] {
    let table = batch.table.host();
    // Parts of a third of the longest request, and of all of it or less.
    let longest = table.indptr().windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or(1);
    let blocks = [1, 100, 260, 1000][rng.below(4)] + rng.below(4);
    let parts = [longest / 3 + 1, longest - rng.below(2).min(longest - 1)];
    [Split::fixed(parts[0]), Split::fixed(parts[1]), Split::disabled(), Split::beside(blocks)]
}

/// Makes a workspace one whose memory a graph may hold, with a plan for one query
/// of one head, which takes less than 2 KiB.
struct Holder {
    prefill: BatchPrefill,
    one: (RaggedTable, PageTable),
}

impl Holder {
    fn new(gpu: &Gpu) -> Self {
        let spec = AttentionSpec::new(DType::BF16, 128).with_backend(Backend::Fa3);
        let one = RaggedIndices::from_lens([1]).unwrap();
        let table = PageIndices::from_requests(1, 16, [(&[0][..], 1)]).unwrap();
        Self {
            prefill: BatchPrefill::new(&gpu.stream, &spec, Heads::new(1, 1)).expect("FlashAttention 3"),
            one: (RaggedTable::new(&gpu.stream, one).unwrap(), PageTable::new(&gpu.stream, table).unwrap()),
        }
    }

    fn hold(&self, workspace: &mut Workspace) {
        let options = PlanOptions::default().with_graph(1);
        let (queries, table) = &self.one;
        self.prefill.plan_paged(workspace, PagedBatch::new(queries, table), &options).unwrap();
    }
}

fn sizes(workspace: &Workspace) -> [usize; 2] {
    [workspace.float_bytes(), workspace.int_bytes()]
}

/// The workspace was refused by this crate, which states the bytes and the call.
#[track_caller]
fn refused_with_sizes<T: std::fmt::Debug>(result: Result<T>, need: [usize; 2], call: &str) {
    match result {
        Err(FlashInferError::InvalidArgument { argument: "workspace", problem, .. }) => {
            for bytes in need.into_iter().filter(|&bytes| bytes > 1) {
                assert!(problem.contains(&bytes.to_string()), "{bytes}: {problem}");
            }
            assert!(problem.contains(call), "{call}: {problem}");
        }
        other => panic!("a held workspace was to be refused for {need:?}: {other:?}"),
    }
}

/// What is checked, and what no source holds.
struct Checks<'g> {
    gpu: &'g Gpu,
    holder: Holder,
    planned: BTreeMap<String, usize>,
    skipped: BTreeSet<String>,
}

impl Checks<'_> {
    /// What was made; `None` if no source holds its module.
    fn made<T>(&mut self, made: Result<T>) -> Option<T> {
        match made {
            Ok(made) => Some(made),
            Err(error @ (FlashInferError::Artifact(_) | FlashInferError::Unsupported { .. })) => {
                let error = error.to_string();
                self.skipped.insert(error.lines().next().unwrap_or_default().into());
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// All that a spec serves but mixed batches.
    fn of_attention(&mut self, batch: &Batch, spec: &AttentionSpec, split: Split) {
        let (gpu, heads, head_dim, backend) = (self.gpu, batch.heads, spec.head_dim_vo, spec.backend);
        let planner = |module| match backend {
            Backend::CudaCores => Planner::CudaCores,
            Backend::Fa3 => Planner::Fa3,
            _ if is_0_7(module) => Planner::Fa2Later,
            _ => Planner::Fa2,
        };
        let more = [(spec.window_left.is_some(), ", window"), (spec.attention_sink, ", sinks")];
        let more: String = more.iter().filter(|(asked, _)| *asked).map(|(_, name)| *name).collect();
        let way = if split == Split::default() { String::new() } else { format!(", {}", name_of(split)) };
        let family = |name| format!("{name} {backend:?} {}{more}{way}", spec.head_dim_qk);
        // A launch that is captured has a fixed number of parts.
        let graphs = if split.fixed_split_size.is_some() { &[false][..] } else { &[false, true] };
        // Pages hold keys and values of one width.
        let paged = spec.head_dim_qk == head_dim;
        let decode = paged.then(|| BatchDecode::new(&gpu.stream, spec, heads));
        if let Some(decode) = decode.and_then(|decode| self.made(decode)) {
            self.check(
                &family("decode"),
                graphs,
                planner(decode.module()),
                batch,
                head_dim,
                &|workspace, graph| {
                    let options = batch.decode_options(graph).with_split(split);
                    Ok(decode.plan(workspace, &batch.table, &options)?.numbers().to_vec())
                },
            );
        }
        if backend == Backend::CudaCores {
            return;
        }
        let Some(prefill) = self.made(BatchPrefill::new(&gpu.stream, spec, heads)) else { return };
        if paged {
            self.check(
                &family("paged"),
                graphs,
                planner(prefill.module()),
                batch,
                head_dim,
                &|workspace, graph| {
                    let (queries, options) = (&batch.queries, batch.plan_options(graph).with_split(split));
                    let plan =
                        prefill.plan_paged(workspace, PagedBatch::new(queries, &batch.table), &options);
                    Ok(plan?.numbers().to_vec())
                },
            );
        }
        // A page of ragged keys is one key.
        let page_size = batch.table.host().page_size();
        let mut of_keys = split;
        of_keys.fixed_split_size = split.fixed_split_size.map(|pages| pages * page_size);
        self.check(
            &family("ragged"),
            graphs,
            planner(prefill.module()),
            batch,
            head_dim,
            &|workspace, graph| {
                let (queries, options) = (&batch.queries, batch.plan_options(graph).with_split(of_keys));
                let plan = prefill.plan_ragged(workspace, queries, &batch.keys, &options);
                Ok(plan?.numbers().to_vec())
            },
        );
    }

    /// From nothing, a workspace grows to what a plan takes, which is what the
    /// planner says it took. With as much the planner succeeds, and with a byte
    /// less nobody calls it.
    #[track_caller]
    fn check(
        &mut self,
        family: &str,
        graphs: &[bool],
        planner: Planner,
        batch: &Batch,
        head_dim: usize,
        plan: Plan<'_>,
    ) {
        let with = |[float, int]: [usize; 2]| Workspace::with_sizes(&self.gpu.stream, float, int).unwrap();
        for &graph in graphs {
            let what = format!("{family}, graph {graph}, {:?}", batch.heads);
            let mut nothing = with([0, 0]);
            let numbers = plan(&mut nothing, graph).unwrap_or_else(|error| panic!("{what}: {error}"));
            let need = sizes(&nothing);
            for (need, taken) in need.into_iter().zip(planner.taken(&numbers, batch.heads, head_dim)) {
                let least = taken.max(1);
                assert!(
                    need >= least && need - least <= planner.slack(),
                    "{what}: {need} bytes computed, {taken} taken: {numbers:?}"
                );
            }
            let mut exact = with(need);
            assert_eq!(plan(&mut exact, graph).unwrap(), numbers, "{what}");
            assert_eq!(sizes(&exact), need, "{what}");
            for part in 0..2 {
                let mut less = need;
                less[part] = (less[part] - 1).max(1);
                let mut small = with(less);
                self.holder.hold(&mut small);
                // What holds it takes something, too.
                if less != need && sizes(&small) == less {
                    refused_with_sizes(plan(&mut small, graph), need, "Workspace::with_sizes(&stream, ");
                    assert_eq!(sizes(&small), less);
                    self.holder.hold(&mut small);
                    *self.planned.entry(format!("{family}, refused")).or_default() += 1;
                }
            }
            let mut enough = with(need);
            self.holder.hold(&mut enough);
            if sizes(&enough) == need {
                assert_eq!(plan(&mut enough, graph).unwrap(), numbers, "{what}");
            }
            *self.planned.entry(family.into()).or_default() += 1;
        }
    }
}

#[test]
fn planners_find_what_they_take() {
    let Some(gpu) = Gpu::start() else { return };
    if gpu.compute_capability().0 != 9 {
        say("skipped: it holds workspaces with FlashAttention 3, which needs compute capability 9.0");
        return;
    }
    let (rng, holder) = (&mut Rng::new(), Holder::new(&gpu));
    let mut checks = Checks { gpu: &gpu, holder, planned: BTreeMap::new(), skipped: BTreeSet::new() };
    for _ in 0..16 {
        let (batch, plain) =
            (Batch::random(&gpu, rng, [3, 40, 300]), |head_dim| AttentionSpec::new(DType::BF16, head_dim));
        let (heads, window) = (batch.heads, rng.below(3000) as u32);
        for spec in [
            plain(64),
            plain(128),
            plain(256),
            plain(192).with_head_dim_vo(128),
            plain(128).with_window_left(window),
            plain(256).with_window_left(window).with_logits_soft_cap(30.0),
            plain(64).with_attention_sink(),
            plain(64).with_attention_sink().with_window_left(window),
        ] {
            for backend in [Backend::CudaCores, Backend::Fa2, Backend::Fa3] {
                // Of values of another width, FlashAttention 3 takes one request a plan.
                let alone = backend == Backend::Fa3 && spec.head_dim_qk != spec.head_dim_vo;
                let one = alone.then(|| Batch::random(&gpu, rng, [1; 3]));
                let batch = one.as_ref().unwrap_or(&batch);
                checks.of_attention(batch, &spec.with_backend(backend), Split::default());
            }
            // Of few requests, since each part takes memory.
            let few = Batch::random(&gpu, rng, [1, 3, 40]);
            for split in splits(rng, &few) {
                // Windows without a causal mask keep keys whole.
                if split.fixed_split_size.is_none() || spec.window_left.is_none() || few.causal {
                    checks.of_attention(&few, &spec.with_backend(Backend::Fa2), split);
                }
            }
        }
        if let Some(attention) = checks.made(BatchAttention::new(&gpu.stream, &plain(128), heads)) {
            checks.check("mixed", &[false, true], Planner::Mixed(128), &batch, 128, &|workspace, graph| {
                let options = batch.plan_options(graph);
                let plan = attention.plan(workspace, PagedBatch::new(&batch.queries, &batch.table), &options);
                Ok(plan?.numbers().to_vec())
            });
        }
        for backend in [Backend::Fa2, Backend::Fa3] {
            let spec = MlaSpec::new(DType::BF16, 1.0).with_backend(backend);
            let (queries, num_heads) = (&batch.queries, [16, 128][rng.below(2)]);
            let Some(mla) = checks.made(BatchMla::new(&gpu.stream, &spec, num_heads)) else { continue };
            checks.check(
                &format!("MLA {backend:?}"),
                &[false],
                Planner::Mla,
                &batch,
                512,
                &|workspace, _| {
                    let options = PlanOptions::default();
                    Ok(mla
                        .plan(workspace, PagedBatch::new(queries, &batch.table), &options)?
                        .numbers()
                        .to_vec())
                },
            );
        }
    }
    gpu.synchronize();
    for reason in &checks.skipped {
        say(&format!("skipped: {reason}"));
    }
    say(&format!("{} plans and refusals", checks.planned.values().sum::<usize>()));
    for name in ["decode CudaCores", "decode Fa2", "decode Fa3", "paged Fa2", "paged Fa3", "ragged Fa2"] {
        assert_eq!(checks.planned[&format!("{name} 128")], 32, "{name}");
    }
    for (way, times) in [("fixed", 32), ("disabled", 32), ("beside", 32)] {
        for name in ["decode Fa2", "paged Fa2", "ragged Fa2"] {
            assert_eq!(checks.planned[&format!("{name} 128, {way}")], times, "{name}, {way}");
        }
    }
}

fn name_of(split: Split) -> &'static str {
    match split {
        Split { fixed_split_size: Some(_), .. } => "fixed",
        Split { disable_split_kv: true, .. } => "disabled",
        _ => "beside",
    }
}

/// Options for a graph of the table's requests.
fn for_graph(table: &PageTable) -> PlanOptions<'static> {
    PlanOptions::default().with_graph(table.host().batch_size())
}

/// 512 requests of one page on 32 query heads and 8 KV heads, for a graph: more
/// than a workspace has by default, which the planner used to find out. Partial results
/// of FlashInfer 0.7 take a quarter, for groups of four heads: there, 2048 requests.
#[test]
fn the_first_plan_for_a_graph_lets_it_grow() {
    let Some(gpu) = Gpu::start() else { return };
    let heads = Heads::new(32, 8);
    let spec = AttentionSpec::new(DType::BF16, 128).with_backend(Backend::Fa2);
    let decode = BatchDecode::new(&gpu.stream, &spec, heads).expect("the module");
    let group = if is_0_7(decode.module()) { 4 } else { 1 };
    let table = |requests: usize| {
        let pages: Vec<i32> = (0..requests as i32).collect();
        let table = PageIndices::from_requests(4096, 16, pages.chunks(1).map(|page| (page, 1))).unwrap();
        PageTable::new(&gpu.stream, table).unwrap()
    };
    let [few, some, many] = [256, 512, 1024].map(|requests| requests * group);
    let (small, large, larger) = (table(few), table(some), table(many));
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let default = [Workspace::DEFAULT_FLOAT_BYTES, Workspace::DEFAULT_INT_BYTES];
    assert_eq!(sizes(&workspace), default);
    decode.plan(&mut workspace, &large, &for_graph(&large)).unwrap();
    // By half of what it was.
    assert_eq!(sizes(&workspace), [192 << 20, 8 << 20]);
    // What a graph holds stays; what is no larger still fits.
    let floats = |requests: usize| {
        let rows = ((requests * 4 / 16 + requests - 1) * 16).div_ceil(group);
        32 * rows * (128 + 1) * 4
    };
    let need = [floats(many), 8 << 20];
    let call = format!("Workspace::with_sizes(&stream, {}, {})", need[0], need[1]);
    refused_with_sizes(decode.plan(&mut workspace, &larger, &for_graph(&larger)), [need[0], 1], &call);
    assert_eq!(sizes(&workspace), [192 << 20, 8 << 20]);
    let key = |workspace: &mut Workspace, table| {
        decode.plan(workspace, table, &for_graph(table)).unwrap().replay_key().unwrap()
    };
    let before = key(&mut workspace, &small);
    decode.plan(&mut workspace, &larger, &PlanOptions::default()).unwrap();
    key(&mut workspace, &large);
    assert_eq!(key(&mut workspace, &small), before, "larger batches changed where its arrays are");
    // The call that the error names.
    let mut named = Workspace::with_sizes(&gpu.stream, need[0], need[1]).unwrap();
    key(&mut named, &small);
    key(&mut named, &larger);
    assert_eq!(sizes(&named), need);
    // Plans for one launch do not stop it.
    let mut eager = Workspace::with_sizes(&gpu.stream, 0, 0).unwrap();
    for table in [&small, &larger, &large] {
        decode.plan(&mut eager, table, &PlanOptions::default()).unwrap();
    }
    key(&mut eager, &large);
    assert!(eager.float_bytes() >= floats(some));
    refused_with_sizes(decode.plan(&mut eager, &larger, &for_graph(&larger)), [need[0], 1], "with_sizes");
    gpu.synchronize();
}

/// A capture lets nothing grow, and goes on.
#[test]
fn captures_do_not_move_memory() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let heads = Heads::new(32, 8);
    let spec = AttentionSpec::new(DType::F16, 128).with_backend(Backend::Fa2);
    let decode = BatchDecode::new(&gpu.stream, &spec, heads).expect("the module");
    let table = PageIndices::from_requests(1, 16, [(&[0][..], 1)]).unwrap();
    let table = PageTable::new(&gpu.stream, table).unwrap();
    let mut workspace = Workspace::with_sizes(&gpu.stream, 0, 0).unwrap();
    let (_, plan) = capture(&gpu, || {
        decode.plan(&mut workspace, &table, &for_graph(&table)).map(|plan| plan.numbers().to_vec())
    });
    refused(plan, "workspace");
    assert_eq!(sizes(&workspace), [1, 1]);
    decode.plan(&mut workspace, &table, &for_graph(&table)).unwrap();
}

/// The workspaces of levels, and the memory for states, which is there only where
/// there are several levels.
#[test]
fn cascades() {
    let Some(gpu) = Gpu::start() else { return };
    let heads = Heads::new(8, 2);
    let spec = AttentionSpec::new(DType::F16, 128).with_backend(Backend::Fa2);
    let cascade = MultiLevelCascade::new(&gpu.stream, &spec, heads).expect("the module");
    let tables = |requests: usize| {
        let all = RaggedTable::new(&gpu.stream, RaggedIndices::from_lens([requests]).unwrap()).unwrap();
        let each = RaggedIndices::from_lens(vec![1; requests]).unwrap();
        let shared = PageIndices::from_requests(2, 16, [(&[0][..], 16)]).unwrap();
        let own = PageIndices::from_requests(2, 16, vec![(&[1][..], 3); requests]).unwrap();
        let page_table = |table| PageTable::new(&gpu.stream, table).unwrap();
        (all, page_table(shared), RaggedTable::new(&gpu.stream, each).unwrap(), page_table(own))
    };
    let plan = |workspace: &mut CascadeWorkspace, requests: usize, levels: usize, graph: bool| {
        let (all, shared, each, own) = tables(requests);
        let of = [PagedBatch::new(&all, &shared), PagedBatch::new(&each, &own)];
        let mut options = PlanOptions::default();
        options.graph = graph.then_some(requests);
        cascade.plan(workspace, &of[2 - levels..], &options).map(drop)
    };
    let mut workspace = CascadeWorkspace::with_sizes(&gpu.stream, 2, 0, 0).unwrap();
    plan(&mut workspace, 4, 2, false).unwrap();
    plan(&mut workspace, 40, 2, false).unwrap();
    plan(&mut workspace, 40, 2, true).unwrap();
    for graph in [true, false] {
        plan(&mut workspace, 40, 2, graph).unwrap();
    }
    let call = "CascadeWorkspace::with_sizes(&stream, levels, ";
    let result = plan(&mut workspace, 4000, 2, true);
    assert!(result.as_ref().is_err_and(|error| error.to_string().contains("level 0")), "{result:?}");
    refused_with_sizes(result, [1, 1], call);
    // Large workspaces of levels, but states of few rows.
    let mut workspace = CascadeWorkspace::with_sizes(&gpu.stream, 2, 512 << 20, 8 << 20).unwrap();
    plan(&mut workspace, 400, 1, true).unwrap();
    plan(&mut workspace, 40, 2, true).unwrap();
    let states = 400 * 8 * 128 * 2 + 2 * 400 * 8 * 4;
    refused_with_sizes(plan(&mut workspace, 400, 2, true), [states, 1], "CascadeWorkspace::new");
    plan(&mut workspace, 40, 2, true).unwrap();
    gpu.synchronize();
}
