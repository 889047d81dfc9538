//! Prefill over pages, over ragged keys and of one request: cases, plans,
//! comparison.

use cudarc::driver::{CudaGraph, CudaSlice, DevicePtr};
use flashinfer_rs::{
    DType, FlashInferError, PageIndices, PageTable, Result, TensorMut, TensorRef,
    attention::{
        AttentionSpec, Backend, BatchPrefill, Heads, Mask, PagedBatch, PlanOptions, PosEncodingMode,
        PrefillPlan, ReplayKey, RunOptions, Workspace,
    },
    indices::{ItemIndices, ItemTable, MaskIndices, MaskTable, RaggedIndices, RaggedTable},
    kv::{KvLayout, PagedKv},
    reference,
};

use super::{
    Gpu, Mirrored, Number, Rng, assert_same_bits, at_hand,
    attention::{assert_lse, capture},
    cache::{Cache, CacheShape, LAYOUTS, random_table},
    is_not_at_hand, say,
    single::{self, Single},
};

/// Where keys and values lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Paged,
    Ragged,
    /// Of one request, without a plan; decode on [`Backend::CudaCores`]. See
    /// [`single`](super::single).
    Single,
}

/// What a test is about.
#[derive(Clone, Copy, Debug)]
pub struct On {
    pub kind: Kind,
    pub backend: Backend,
}

/// One prefill.
#[derive(Clone, Debug)]
pub struct Case {
    pub on: On,
    /// Queries and keys of each request.
    pub requests: Vec<(usize, usize)>,
    pub causal: bool,
    pub page_size: usize,
    pub kv_heads: usize,
    pub group: usize,
    pub head_dim_qk: usize,
    pub head_dim_vo: usize,
    pub layout: KvLayout,
    pub joined: bool,
    pub window_left: Option<u32>,
    pub soft_cap: Option<f32>,
    pub sm_scale: Option<f64>,
    pub masked: Masked,
    pub sinks: bool,
    pub alibi: bool,
    /// Scales of quantized keys and values.
    pub kv_scales: Option<(f64, f32)>,
}

/// A mask that is more than causal or not.
#[derive(Clone, Debug, Default)]
pub enum Masked {
    #[default]
    No,
    /// Each key is seen with this probability.
    Custom(f64),
    /// Prefixes, and items without their delimiters.
    Items(Vec<(usize, Vec<usize>)>),
}

/// A mask on the host.
pub enum CaseMask {
    Plain { causal: bool },
    Custom(MaskIndices, Vec<u8>),
    Items(ItemIndices),
}

impl CaseMask {
    fn random(rng: &mut Rng, case: &Case) -> Self {
        match &case.masked {
            Masked::No => Self::Plain { causal: case.causal },
            Masked::Custom(density) => {
                let indices = MaskIndices::new(case.requests.iter().copied()).unwrap();
                let pairs = case.requests.iter().map(|(queries, keys)| queries * keys).sum();
                let mask: Vec<bool> =
                    (0..pairs).map(|_| rng.below(1000) < (density * 1000.0) as usize).collect();
                let bits = indices.pack(&mask).unwrap();
                Self::Custom(indices, bits)
            }
            Masked::Items(requests) => Self::Items(
                ItemIndices::new(requests.iter().map(|(prefix, items)| (*prefix, &items[..]))).unwrap(),
            ),
        }
    }

    fn reference(&self) -> reference::HostMask<'_> {
        match self {
            Self::Plain { causal: true } => reference::HostMask::Causal,
            Self::Plain { causal: false } => reference::HostMask::None,
            Self::Custom(indices, bits) => reference::HostMask::Custom(indices, bits),
            Self::Items(items) => reference::HostMask::MultiItem(items),
        }
    }
}

/// A mask on the device.
pub enum DeviceMask {
    Plain,
    Custom { indices: MaskTable, bits: CudaSlice<u8> },
    Items(ItemTable),
}

impl DeviceMask {
    /// With room for this many more requests and bytes.
    pub fn new(gpu: &Gpu, host: &CaseMask, requests: usize, bytes: usize) -> Self {
        match host {
            CaseMask::Plain { .. } => Self::Plain,
            CaseMask::Custom(indices, bits) => {
                let batch = indices.batch_size() + requests;
                // The bytes after the last are not read.
                let bits: Vec<u8> = bits.iter().copied().chain(vec![0; 3 + bytes]).collect();
                Self::Custom {
                    indices: MaskTable::with_capacity(&gpu.stream, indices.clone(), batch).unwrap(),
                    bits: gpu.cuda.clone_htod(&bits).unwrap(),
                }
            }
            CaseMask::Items(items) => Self::Items(ItemTable::new(&gpu.stream, items.clone()).unwrap()),
        }
    }

    pub fn update(&mut self, gpu: &Gpu, host: &CaseMask) {
        match (self, host) {
            (Self::Plain, CaseMask::Plain { .. }) => {}
            (Self::Custom { indices, bits }, CaseMask::Custom(new, new_bits)) => {
                indices.update(new.clone()).unwrap();
                gpu.cuda.memcpy_htod(&[&new_bits[..], &[0]].concat(), bits).unwrap();
            }
            _ => unreachable!("masks of a kind that can be updated"),
        }
    }

    /// The mask; that of the case if it is a plain one.
    pub fn or<'p>(&'p self, gpu: &Gpu, plain: Mask<'p>) -> Mask<'p> {
        match self {
            Self::Plain => plain,
            Self::Custom { indices, bits } => {
                let (address, len) = (bits.device_ptr(&gpu.cuda).0, bits.len());
                // SAFETY: the slice lives as long as the view.
                let bits = unsafe {
                    TensorRef::from_raw_parts(
                        address as *const _,
                        gpu.stream.device(),
                        DType::U8,
                        &[len],
                        None,
                    )
                };
                Mask::Custom { indices, bits: bits.unwrap() }
            }
            Self::Items(items) => Mask::MultiItem(items),
        }
    }
}

impl Case {
    pub fn spec<T: Number, K: Number>(&self) -> AttentionSpec {
        let mut spec = AttentionSpec::new(T::DTYPE, self.head_dim_qk)
            .with_head_dim_vo(self.head_dim_vo)
            .with_kv_dtype(K::DTYPE)
            .with_backend(self.on.backend);
        (spec.window_left, spec.logits_soft_cap) = (self.window_left, self.soft_cap);
        spec.attention_sink = self.sinks;
        if self.alibi {
            spec = spec.with_pos_encoding_mode(PosEncodingMode::Alibi);
        }
        spec
    }

    /// This case with other requests, heads, pages and mask, at random.
    #[must_use]
    pub fn randomized(self, rng: &mut Rng) -> Self {
        let causal = rng.below(2) == 0;
        let page_size = [1, 2, 5, 16, 64, 128][rng.below(6)];
        let longest = [20, 300, 1200][rng.below(3)];
        let requests = (0..1 + rng.below(10)).map(|_| {
            let tokens = match rng.below(5) {
                0 => 0,
                1 => page_size * (1 + rng.below(3)),
                _ => 1 + rng.below(longest),
            };
            let queries = [0, 1, 1, 1 + rng.below(40)][rng.below(4)];
            (if causal && tokens > 0 { queries.min(tokens) } else { queries }, tokens)
        });
        Self {
            requests: requests.collect(),
            causal,
            page_size,
            kv_heads: [1, 2, 3, 4, 8][rng.below(5)],
            group: 1 + rng.below(8),
            layout: LAYOUTS[rng.below(2)],
            joined: rng.below(2) == 0,
            ..self
        }
    }

    #[must_use]
    pub fn head_dim(mut self, head_dim: usize) -> Self {
        (self.head_dim_qk, self.head_dim_vo) = (head_dim, head_dim);
        self
    }

    pub fn heads(&self) -> Heads {
        Heads::new(self.kv_heads * self.group, self.kv_heads)
    }

    pub fn plan_options(&self) -> PlanOptions<'static> {
        if self.causal { PlanOptions::causal() } else { PlanOptions::default() }
    }

    pub fn graph_options(&self, rows: usize) -> PlanOptions<'static> {
        let mut options = self.plan_options();
        options.graph = Some(rows);
        options
    }

    /// Without slopes and sinks, which a problem has.
    pub fn options(&self) -> RunOptions<'static> {
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
            head_dim: self.head_dim_qk,
            layout: self.layout,
            joined: self.joined,
        }
    }

    pub fn q_shape(&self, rows: usize) -> [usize; 3] {
        [rows, self.kv_heads * self.group, self.head_dim_qk]
    }

    /// The case of each request, where each is run alone.
    pub fn parts(self) -> Vec<Self> {
        if self.on.kind != Kind::Single {
            return vec![self];
        }
        let alone = |&request| Self { requests: vec![request], ..self.clone() };
        self.requests.iter().map(alone).collect()
    }

    pub fn queries(&self) -> RaggedIndices {
        RaggedIndices::from_lens(self.requests.iter().map(|&(queries, _)| queries)).unwrap()
    }

    pub fn key_lens(&self) -> Vec<usize> {
        self.requests.iter().map(|&(_, keys)| keys).collect()
    }
}

/// Keys and values, and which of them are each request's.
#[expect(clippy::large_enum_variant, reason = "a test has one")]
pub enum Kv<K> {
    Paged { table: PageIndices, cache: Cache<K> },
    Ragged { keys: RaggedIndices, k: Mirrored<K>, v: Mirrored<K> },
}

impl<K: Number> Kv<K> {
    pub fn paged(gpu: &Gpu, rng: &mut Rng, case: &Case, table: PageIndices) -> Self {
        let cache = Cache::random(gpu, rng, case.cache_shape(table.num_pages()), &table);
        Self::Paged { table, cache }
    }

    fn random(gpu: &Gpu, rng: &mut Rng, case: &Case) -> Self {
        match case.on.kind {
            Kind::Paged => {
                let table = random_table(rng, case.page_size, &case.key_lens());
                Self::paged(gpu, rng, case, table)
            }
            Kind::Ragged | Kind::Single => {
                let (keys, heads) = (RaggedIndices::from_lens(case.key_lens()).unwrap(), case.kv_heads);
                let mut part = |width| match case.layout {
                    KvLayout::Nhd => Mirrored::random(gpu, rng, &[keys.total(), heads, width]),
                    KvLayout::Hnd => {
                        Mirrored::random(gpu, rng, &[heads, keys.total(), width]).permuted(&[1, 0, 2])
                    }
                };
                let (k, v) = (part(case.head_dim_qk), part(case.head_dim_vo));
                Self::Ragged { keys, k, v }
            }
        }
    }

    /// The tensors on the device, and the copies on the host.
    pub fn tensors_mut(&mut self) -> Vec<&mut Mirrored<K>> {
        match self {
            Self::Paged { cache, .. } => cache.tensors.iter_mut().collect(),
            Self::Ragged { k, v, .. } => vec![k, v],
        }
    }

    pub fn hosts(&self) -> Vec<&[K]> {
        match self {
            Self::Paged { cache, .. } => cache.tensors.iter().map(|tensor| &tensor.host[..]).collect(),
            Self::Ragged { k, v, .. } => vec![&k.host, &v.host],
        }
    }
}

/// Index values on the device.
pub struct Tables {
    pub queries: RaggedTable,
    pub keys: KeyTable,
    pub mask: DeviceMask,
}

pub enum KeyTable {
    Paged(PageTable),
    Ragged(RaggedTable),
}

impl Tables {
    pub fn new<T, K>(gpu: &Gpu, problem: &Problem<T, K>) -> Self {
        Self {
            queries: RaggedTable::new(&gpu.stream, problem.queries.clone()).unwrap(),
            keys: match &problem.kv {
                Kv::Paged { table, .. } => {
                    KeyTable::Paged(PageTable::new(&gpu.stream, table.clone()).unwrap())
                }
                Kv::Ragged { keys, .. } => {
                    KeyTable::Ragged(RaggedTable::new(&gpu.stream, keys.clone()).unwrap())
                }
            },
            mask: DeviceMask::new(gpu, &problem.mask, 0, 0),
        }
    }

    /// With room for other problems.
    pub fn with_capacity<T, K>(gpu: &Gpu, problem: &Problem<T, K>, batch: usize, pages: usize) -> Self {
        let ragged =
            |host: &RaggedIndices| RaggedTable::with_capacity(&gpu.stream, host.clone(), batch).unwrap();
        Self {
            queries: ragged(&problem.queries),
            keys: match &problem.kv {
                Kv::Paged { table, .. } => KeyTable::Paged(
                    PageTable::with_capacity(&gpu.stream, table.clone(), batch, pages).unwrap(),
                ),
                Kv::Ragged { keys, .. } => KeyTable::Ragged(ragged(keys)),
            },
            mask: DeviceMask::new(gpu, &problem.mask, batch, 1 << 17),
        }
    }

    pub fn update<T, K>(&mut self, gpu: &Gpu, problem: &Problem<T, K>) {
        self.mask.update(gpu, &problem.mask);
        self.queries.update(problem.queries.clone()).unwrap();
        match (&mut self.keys, &problem.kv) {
            (KeyTable::Paged(on_device), Kv::Paged { table, .. }) => on_device.update(table.clone()),
            (KeyTable::Ragged(on_device), Kv::Ragged { keys, .. }) => on_device.update(keys.clone()),
            _ => unreachable!("tables of one kind"),
        }
        .unwrap();
    }

    /// The options with the mask that is on the device, if there is one.
    pub fn masked<'p>(&'p self, gpu: &Gpu, options: PlanOptions<'p>) -> PlanOptions<'p> {
        let mut masked = options;
        masked.mask = self.mask.or(gpu, options.mask);
        masked
    }

    pub fn plan<'p>(
        &'p self,
        prefill: &BatchPrefill,
        workspace: &'p mut Workspace,
        options: &PlanOptions<'p>,
    ) -> Result<Plan<'p>> {
        match &self.keys {
            KeyTable::Paged(table) => {
                prefill.plan_paged(workspace, PagedBatch::new(&self.queries, table), options).map(Plan::Paged)
            }
            KeyTable::Ragged(keys) => {
                prefill.plan_ragged(workspace, &self.queries, keys, options).map(Plan::Ragged)
            }
        }
    }
}

/// A plan of either kind.
#[derive(Debug)]
pub enum Plan<'p> {
    Paged(PrefillPlan<'p, PageTable>),
    Ragged(PrefillPlan<'p, RaggedTable>),
}

impl Plan<'_> {
    pub fn replay_key(&self) -> Option<ReplayKey> {
        match self {
            Self::Paged(plan) => plan.replay_key().ok(),
            Self::Ragged(plan) => plan.replay_key().ok(),
        }
    }

    pub fn numbers(&self) -> &[i64] {
        match self {
            Self::Paged(plan) => plan.numbers(),
            Self::Ragged(plan) => plan.numbers(),
        }
    }

    /// Whether FlashAttention 2 divides the keys of a request among blocks,
    /// which the last of its 15 numbers says; 3 never does.
    pub fn splits_kv(&self) -> bool {
        self.numbers().get(14).is_some_and(|&split| split != 0)
    }

    pub fn run(
        &self,
        q: &TensorRef<'_>,
        kv: &DeviceKv<'_>,
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        options: &RunOptions<'_>,
    ) -> Result<()> {
        match (self, kv) {
            (Self::Paged(plan), DeviceKv::Paged(kv)) => plan.run_with(q, kv, out, lse, options),
            (Self::Ragged(plan), DeviceKv::Ragged([k, v])) => plan.run_with(q, [k, v], out, lse, options),
            _ => unreachable!("a plan of the keys' kind"),
        }
    }
}

/// Views of keys and values on the device.
pub enum DeviceKv<'a> {
    Paged(PagedKv<'a>),
    Ragged([TensorRef<'a>; 2]),
}

impl<K: Number> Kv<K> {
    pub fn device_view(&self) -> DeviceKv<'_> {
        match self {
            Self::Paged { cache, .. } => DeviceKv::Paged(cache.device_view()),
            Self::Ragged { k, v, .. } => DeviceKv::Ragged([k.device_view(), v.device_view()]),
        }
    }
}

/// A case with its tensors, and what the reference makes of them.
pub struct Problem<T, K> {
    pub case: Case,
    pub queries: RaggedIndices,
    pub q: Mirrored<T>,
    pub kv: Kv<K>,
    pub mask: CaseMask,
    /// Slopes and sinks of the heads, if the case has them.
    pub(super) per_head: [Option<Mirrored<f32>>; 2],
    want: Vec<f64>,
    want_lse: Vec<f64>,
}

impl<T: Number, K: Number> Problem<T, K> {
    pub fn new(gpu: &Gpu, rng: &mut Rng, case: Case) -> Self {
        let kv = Kv::random(gpu, rng, &case);
        Self::with_kv(gpu, rng, case, kv)
    }

    pub fn with_kv(gpu: &Gpu, rng: &mut Rng, case: Case, kv: Kv<K>) -> Self {
        let q = Mirrored::random(gpu, rng, &case.q_shape(case.queries().total()));
        let mask = CaseMask::random(rng, &case);
        let per_head = [(case.alibi, 0.1), (case.sinks, 2.0)].map(|(given, scale)| {
            given.then(|| Mirrored::random_scaled(gpu, rng, &[case.heads().num_qo_heads], scale))
        });
        Self::solve_with(case, q, kv, mask, per_head)
    }

    /// Fills in what the reference says.
    pub fn solve(case: Case, q: Mirrored<T>, kv: Kv<K>) -> Self {
        assert!(matches!(case.masked, Masked::No) && !case.sinks && !case.alibi);
        let mask = CaseMask::Plain { causal: case.causal };
        Self::solve_with(case, q, kv, mask, [None, None])
    }

    fn solve_with(
        case: Case,
        q: Mirrored<T>,
        kv: Kv<K>,
        mask: CaseMask,
        per_head: [Option<Mirrored<f32>>; 2],
    ) -> Self {
        let (queries, heads) = (case.queries(), case.heads().num_qo_heads);
        let (rows, width) = (queries.total(), case.head_dim_vo);
        let (mut want, mut want_lse) = (vec![f64::NAN; rows * heads * width], vec![f64::NAN; rows * heads]);
        let mut out = TensorMut::from_slice(&mut want, &[rows, heads, width]).unwrap();
        let mut lse = TensorMut::from_slice(&mut want_lse, &[rows, heads]).unwrap();
        let (spec, mut options) = (case.spec::<T, K>(), case.options());
        [options.alibi_slopes, options.sinks] =
            per_head.each_ref().map(|tensor| tensor.as_ref().map(Mirrored::view));
        let mask_of = mask.reference();
        match &kv {
            Kv::Paged { table, cache } => reference::batch_prefill_paged(
                &spec,
                &q.view(),
                &cache.view(),
                &queries,
                table,
                &mut out,
                Some(&mut lse),
                mask_of,
                &options,
            ),
            Kv::Ragged { k, v, .. } if case.on.kind == Kind::Single => single::reference(
                case.on.backend,
                &spec,
                &q.view(),
                [&k.view(), &v.view()],
                &mut out,
                &mut lse,
                (mask_of, &options),
            ),
            Kv::Ragged { keys, k, v } => reference::batch_prefill_ragged(
                &spec,
                &q.view(),
                [&k.view(), &v.view()],
                &queries,
                keys,
                &mut out,
                Some(&mut lse),
                mask_of,
                &options,
            ),
        }
        .unwrap();
        Self { case, queries, q, kv, mask, per_head, want, want_lse }
    }

    /// Outputs of so many rows.
    pub fn outputs_of(&self, gpu: &Gpu, rows: usize) -> (Mirrored<T>, Mirrored<f32>) {
        let heads = self.case.heads().num_qo_heads;
        let out = Mirrored::poisoned(gpu, &[rows, heads, self.case.head_dim_vo]);
        (out, Mirrored::poisoned(gpu, &[rows, heads]))
    }

    pub fn outputs(&self, gpu: &Gpu) -> (Mirrored<T>, Mirrored<f32>) {
        self.outputs_of(gpu, self.queries.total())
    }

    /// Plans and runs eagerly, compares with the reference, and says whether
    /// the plan split requests.
    #[track_caller]
    pub fn check(&self, gpu: &Gpu, prefill: &BatchPrefill, workspace: &mut Workspace) -> bool {
        let tables = Tables::new(gpu, self);
        let options = tables.masked(gpu, self.case.plan_options());
        let plan = tables.plan(prefill, workspace, &options).unwrap();
        self.check_run(gpu, &plan);
        plan.splits_kv()
    }

    /// Runs a plan and compares with the reference.
    #[track_caller]
    pub fn check_run(&self, gpu: &Gpu, plan: &Plan<'_>) -> (Vec<T>, Vec<f32>) {
        let (mut out, mut lse) = self.outputs(gpu);
        self.run(plan, &mut out, Some(&mut lse), &self.case.options()).unwrap();
        self.verify(&out, Some(&lse));
        (out.download(), lse.download())
    }

    pub fn run(
        &self,
        plan: &Plan<'_>,
        out: &mut Mirrored<T>,
        lse: Option<&mut Mirrored<f32>>,
        options: &RunOptions<'_>,
    ) -> Result<()> {
        let mut lse = lse.map(|lse| lse.device_view_mut());
        let per_head =
            self.per_head.each_ref().map(|tensor| tensor.as_ref().map(|tensor| tensor.device_view()));
        let mut options = *options;
        [options.alibi_slopes, options.sinks] = per_head;
        let options = &options;
        plan.run(
            &self.q.device_view(),
            &self.kv.device_view(),
            &mut out.device_view_mut(),
            lse.as_mut(),
            options,
        )
    }

    /// Compares the batch's rows with the reference; those beyond are poison.
    #[track_caller]
    pub fn verify(&self, out: &Mirrored<T>, lse: Option<&Mirrored<f32>>) {
        let what = format!("prefill {:?}", self.case);
        // The reference reads the same keys and values, so their dtype does not
        // widen the bound.
        let part = out.view().narrow(0, 0, self.queries.total()).unwrap();
        out.assert_part_close(&what, &part, &self.want, T::BOUND);
        if let Some(lse) = lse {
            assert_lse(&what, lse, &self.want_lse);
        }
    }
}

/// The prefill of a case, if it is [`available`].
pub fn prefill_of<T: Number, K: Number>(gpu: &Gpu, case: &Case) -> Option<BatchPrefill> {
    let spec = case.spec::<T, K>();
    let prefill = available::<T, K, _>(gpu, case, BatchPrefill::new(&gpu.stream, &spec, case.heads()))?;
    if case.on.backend != Backend::Auto {
        assert_eq!(prefill.backend(), case.on.backend);
    }
    Some(prefill)
}

/// What serves a case; `None`, said on stderr, if no source holds its module,
/// or if the GPU has no FlashAttention 3. The modules of the core bundle must
/// be there.
pub fn available<T: Number, K: Number, P>(gpu: &Gpu, case: &Case, made: Result<P>) -> Option<P> {
    let fa3 = case.on.backend == Backend::Fa3;
    let core = !fa3
        && T::DTYPE == K::DTYPE
        && matches!((case.head_dim_qk, case.head_dim_vo), (64, 64) | (128, 128))
        && (case.window_left, case.soft_cap) == (None, None)
        && !case.sinks
        && !case.alibi;
    match made {
        Ok(made) => Some(made),
        Err(reason) if !core && is_not_at_hand(&reason) => {
            say(&format!("skipped: no source holds the module of {:?}: {reason}", case.spec::<T, K>()));
            None
        }
        Err(error @ FlashInferError::Unsupported { .. }) if fa3 && gpu.compute_capability().0 != 9 => {
            say(&format!("skipped: {error}"));
            None
        }
        Err(error) => at_hand(gpu, Err(error)),
    }
}

/// Checks each of the cases; stops at the first whose module is missing.
pub fn check_all<T: Number, K: Number>(cases: impl IntoIterator<Item = Case>) {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    // Partial results of many heads with wide tiles let it grow.
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for case in cases.into_iter().flat_map(Case::parts) {
        if !check_problem(&gpu, &Problem::<T, K>::new(&gpu, rng, case), &mut workspace) {
            return;
        }
    }
}

/// Checks a problem with what serves its case; `false` if the module is missing.
#[track_caller]
pub fn check_problem<T: Number, K: Number>(
    gpu: &Gpu,
    problem: &Problem<T, K>,
    workspace: &mut Workspace,
) -> bool {
    if problem.case.on.kind == Kind::Single {
        let single = Single::of::<T, K>(gpu, &problem.case);
        return single.map(|single| single.check(gpu, problem, workspace)).is_some();
    }
    let prefill = prefill_of::<T, K>(gpu, &problem.case);
    prefill.map(|prefill| problem.check(gpu, &prefill, workspace)).is_some()
}

/// A captured run: the graph, its plan's key, and the tensors it works on.
pub struct Captured<T> {
    graph: CudaGraph,
    key: Option<ReplayKey>,
    rows: usize,
    q: Mirrored<T>,
    kv: Kv<T>,
    out: Mirrored<T>,
    lse: Mirrored<f32>,
}

impl<T: Number> Captured<T> {
    /// Captures one run for batches like the problem's, which is not looked
    /// at otherwise, of up to `rows` queries.
    pub fn new(
        gpu: &Gpu,
        prefill: &BatchPrefill,
        problem: Problem<T, T>,
        rows: usize,
        workspace: &mut Workspace,
        tables: &Tables,
    ) -> Self {
        let (mut out, mut lse) = problem.outputs_of(gpu, rows);
        let case = &problem.case;
        let q = Mirrored::poisoned(gpu, &case.q_shape(rows));
        let options = tables.masked(gpu, case.graph_options(rows));
        let plan = tables.plan(prefill, workspace, &options).unwrap();
        let (graph, run) = {
            let (q, kv) = (q.device_view(), problem.kv.device_view());
            let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
            let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
            capture(gpu, || plan.run(&q, &kv, &mut out, Some(&mut lse), &case.options()))
        };
        run.unwrap();
        out.assert_untouched(); // captured is not run
        let (graph, key) = (graph.expect("a graph"), plan.replay_key());
        assert!(key.is_some());
        Self { graph, key, rows, q, kv: problem.kv, out, lse }
    }

    /// Replays for a problem: updates the tables, plans, uploads, launches,
    /// compares with the reference, with the same plan run directly, and with
    /// an eager plan.
    #[track_caller]
    pub fn replay(
        &mut self,
        gpu: &Gpu,
        prefill: &BatchPrefill,
        problem: &Problem<T, T>,
        workspace: &mut Workspace,
        tables: &mut Tables,
    ) {
        tables.update(gpu, problem);
        let used = problem.queries.total() * problem.case.heads().num_qo_heads * problem.case.head_dim_qk;
        let mut q = vec![T::POISON; self.q.host.len()];
        q[..used].copy_from_slice(&problem.q.host[..used]);
        self.q.upload(&q);
        for (tensor, source) in self.kv.tensors_mut().into_iter().zip(problem.kv.hosts()) {
            tensor.upload(source);
        }
        self.out.upload(&vec![T::POISON; self.out.host.len()]);
        self.lse.upload(&vec![f32::NAN; self.lse.host.len()]);
        let (case, options) = (&problem.case, tables.masked(gpu, problem.case.graph_options(self.rows)));
        let plan = tables.plan(prefill, workspace, &options).unwrap();
        assert_eq!(plan.replay_key(), self.key);
        self.graph.launch().unwrap();
        problem.verify(&self.out, Some(&self.lse));
        let (mut out, mut lse) = problem.outputs_of(gpu, self.rows);
        {
            let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
            let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
            plan.run(
                &self.q.device_view(),
                &self.kv.device_view(),
                &mut out,
                Some(&mut lse),
                &case.options(),
            )
            .unwrap();
        }
        problem.verify(&out, Some(&lse));
        assert_same_bits("replay and run", &self.out.download(), &out.download());
        assert_same_bits("replay and run: LSE", &self.lse.download(), &lse.download());
        problem.check(gpu, prefill, &mut Workspace::new(&gpu.stream).unwrap());
    }
}
