//! Paged batch decode on the GPU against the CPU reference.
//!
//! Cache slots that hold no token are NaN, and so are outputs beforehand, so
//! that whatever is read or left out by mistake shows.
#![cfg(feature = "cudarc")]

mod common;

mod mha_decode_gpu {
    mod graphs;
    mod options;
    mod plans;
    mod shapes;
    mod single;
    mod wrong_input;
}

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
    gpu::TensorExt,
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

/// Whether FlashAttention 3 can run here; else says why not.
fn has_fa3() -> bool {
    let Some(gpu) = Gpu::start() else { return false };
    let case = Case { backend: Backend::Fa3, ..Case::default() };
    let hopper = gpu.compute_capability().0 == 9;
    if !hopper {
        say("skipped: FlashAttention 3 needs compute capability 9.0");
    }
    hopper && optional_decode_of::<f16, f16>(&gpu, &case).is_some()
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
        let (mut rng, other) = (Rng::new(), gpu.elsewhere());
        let problem = Problem::new(&gpu, &mut rng, Case { lens: vec![5, 20, 0], ..Case::default() });
        Self { gpu, other, rng, problem }
    }
}
