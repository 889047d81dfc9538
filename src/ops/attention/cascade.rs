//! Cascade attention: queries that share pages attend to them once.
//!
//! A batch whose requests begin with the same tokens is divided into *levels*,
//! from pages that many requests share to those that are one request's own. A
//! level is a batch of its own over the same queries: on the first, all
//! queries may be one request, so that its keys are read once for all of them;
//! on the last, each request stands for itself. Each level gives a state,
//! outputs and LSE, and the states merge into that of all keys; see
//! [`cascade`](mod@crate::cascade). Which rows are together on a level, and
//! over which pages, is up to the caller. No page may be a query's on two
//! levels, or its keys count twice.

use super::{
    mask::Mask,
    options::{PlanOptions, RunOptions},
    paged_batch::PagedBatch,
    planned::{ReplayKey, run_over_pages},
    prefill::{BatchPrefill, PrefillPlan},
    spec::{AttentionSpec, Backend, Heads, PosEncodingMode},
    workspace::{Workspace, grown},
};
use crate::{
    cascade::{self, State, StateMut},
    cuda::DeviceBuffer,
    dtype::DType,
    error::{FlashInferError, Result},
    indices::PageTable,
    kv::PagedKv,
    module::Module,
    ops::check::Check,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

const PLAN_OP: &str = "MultiLevelCascade::plan";
/// The call that makes a workspace of other sizes, up to these.
const CONSTRUCTOR: &str = "CascadeWorkspace::with_sizes(&stream, levels";
/// Each part of the memory for states starts at a multiple of this many bytes.
const ALIGNMENT: usize = 256;

/// Attention of several levels over one paged cache.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{
///     DType, PageIndices, PageTable, Stream, attention::{AttentionSpec, CascadeWorkspace,
///     Heads, MultiLevelCascade, PagedBatch, PlanOptions}, gpu::Tensor, kv::{KvLayout,
///     PagedKv}, indices::{RaggedIndices, RaggedTable},
/// };
/// use half::f16;
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let spec = AttentionSpec::new(DType::F16, 128);
/// let attention = MultiLevelCascade::new(&stream, &spec, Heads::new(32, 8))?;
/// let mut workspace = CascadeWorkspace::new(&stream, 2)?;
///
/// // A decode step of three requests that begin with the same 64 tokens.
/// let all = RaggedTable::new(&stream, RaggedIndices::from_lens([3])?)?;
/// let each = RaggedTable::new(&stream, RaggedIndices::from_lens([1, 1, 1])?)?;
/// let shared = PageIndices::from_requests(9, 16, [(&[0, 1, 2, 3][..], 64)])?;
/// let own = PageIndices::from_requests(9, 16, [(&[4][..], 5), (&[5, 6][..], 20), (&[7][..], 1)])?;
/// let (shared, own) = (PageTable::new(&stream, shared)?, PageTable::new(&stream, own)?);
/// let levels =
///     [PagedBatch::new(&all, &shared), PagedBatch::new(&each, &own)];
/// let plan = attention.plan(&mut workspace, &levels, &PlanOptions::default())?;
///
/// // For each layer:
/// let q = Tensor::<f16>::zeros(&stream, &[3, 32, 128])?;
/// let kv = Tensor::<f16>::zeros(&stream, &[9, 16, 8, 128])?;
/// let mut out = Tensor::<f16>::zeros(&stream, &[3, 32, 128])?;
/// plan.run(&q.view(), &PagedKv::new(kv.view(), kv.view(), KvLayout::Nhd), &mut out.view_mut())?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
#[derive(Clone, Copy, Debug)]
pub struct MultiLevelCascade {
    prefill: BatchPrefill,
    dtype_o: DType,
    head_dim: usize,
}

/// The workspaces of a cascade, one for each level, and memory for the state
/// of a level while it waits to be merged.
///
/// As a [`Workspace`], it belongs to one stream, one plan at a time borrows it,
/// and all of it [grows](Workspace#growth) until a graph may hold it.
pub struct CascadeWorkspace {
    levels: Vec<Workspace>,
    states: DeviceBuffer,
    /// Whether a CUDA graph may hold the states.
    held: bool,
}

impl CascadeWorkspace {
    /// A workspace for up to so many levels, each of the default sizes.
    ///
    /// # Errors
    /// As [`Workspace::new`].
    pub fn new(stream: &Stream, levels: usize) -> Result<Self> {
        Self::with_sizes(stream, levels, Workspace::DEFAULT_FLOAT_BYTES, Workspace::DEFAULT_INT_BYTES)
    }

    /// A workspace with other sizes of each level, in bytes. What states take
    /// is known to plans only.
    ///
    /// # Errors
    /// As [`Workspace::new`].
    pub fn with_sizes(stream: &Stream, levels: usize, float_bytes: usize, int_bytes: usize) -> Result<Self> {
        stream.check_usable_here("CascadeWorkspace")?;
        let cuda = FlashInferRuntime::get()?.cuda();
        Ok(Self {
            states: DeviceBuffer::new(cuda, stream, 0)?,
            levels: (0..levels)
                .map(|_| Workspace::made_by(CONSTRUCTOR, stream, [float_bytes, int_bytes]))
                .collect::<Result<_>>()?,
            held: false,
        })
    }

    /// The stream that the workspace belongs to.
    pub fn stream(&self) -> &Stream {
        self.states.stream()
    }
}

impl std::fmt::Debug for CascadeWorkspace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CascadeWorkspace({:?}, {} bytes for states)", self.levels, self.states.len())
    }
}

impl MultiLevelCascade {
    /// Resolves the module of batch prefill for the stream's device; downloads
    /// the pinned wheel if no local source holds it and that is allowed. Has
    /// the kernel compiled that merges.
    ///
    /// # Errors
    /// As [`BatchPrefill::new`]; also [`FlashInferError::Unsupported`]: the spec
    /// has a sliding window or ALiBi, which count positions across levels, or
    /// attention sinks, which would count once for each level; the head
    /// dimension is not a multiple of 8 up to 1024. Else the module cannot be
    /// had or opened.
    pub fn new(stream: &Stream, spec: &AttentionSpec, heads: Heads) -> Result<Self> {
        check_spec(spec)?;
        let prefill = BatchPrefill::new(stream, spec, heads)?;
        cascade::prepare(spec.dtype_o)?;
        Ok(Self { prefill, dtype_o: spec.dtype_o, head_dim: spec.head_dim_vo })
    }

    /// The module of batch prefill.
    pub fn module(&self) -> &'static Module {
        self.prefill.module()
    }

    /// The heads.
    pub fn heads(&self) -> Heads {
        self.prefill.heads()
    }

    /// The kernels that were picked: FlashAttention 2 or 3.
    pub fn backend(&self) -> Backend {
        self.prefill.backend()
    }

    /// Plans each level: which queries are together, and over which pages. All levels
    /// have the same queries in the same order. Levels come in any order but for the last, which
    /// alone has the mask: with [`Mask::Causal`](super::Mask::Causal), its queries
    /// see its keys up to their position. All keys of the other levels are seen in
    /// any case. In a plan for a graph, each level's number of requests must stay.
    ///
    /// # Errors
    /// As [`BatchPrefill::plan_paged`] for each level; also when there are no
    /// levels or more than the workspace is for, and when levels differ in
    /// their number of queries or in the cache that their tables are for; and
    /// [`FlashInferError::Unsupported`] for custom and multi-item masks.
    pub fn plan<'p>(
        &self,
        workspace: &'p mut CascadeWorkspace,
        levels: &[PagedBatch<'p>],
        options: &PlanOptions<'_>,
    ) -> Result<CascadePlan<'p>> {
        let Some(last) = levels.last() else {
            return Err(FlashInferError::invalid(
                PLAN_OP,
                "levels",
                "there are none; a cascade has one or more",
            ));
        };
        let check = Check::new(PLAN_OP, last.queries.stream())?;
        let causal = options.is_causal("a cascade")?;
        if levels.len() > workspace.levels.len() {
            let available = workspace.levels.len();
            return check.fail(
                "workspace",
                format!("it is for {available} levels; the cascade has {}", levels.len()),
            );
        }
        let cache = |level: &PagedBatch<'_>| (level.table.host().num_pages(), level.table.host().page_size());
        let total = last.queries.host().total();
        for (at, level) in levels.iter().enumerate() {
            let rows = level.queries.host().total();
            if rows != total {
                return check.fail("levels", format!("level {at} has {rows} queries, the last has {total}"));
            }
            if cache(level) != cache(last) {
                return check.fail(
                    "levels",
                    format!(
                        "the tables of level {at} and of the last are for other caches: {:?} and {:?} \
                         (pages, tokens in a page)",
                        cache(level),
                        cache(last)
                    ),
                );
            }
        }
        let CascadeWorkspace { levels: workspaces, states, held } = workspace;
        let plan = |((at, level), workspace): ((usize, &PagedBatch<'p>), &'p mut Workspace)| {
            let mask = if causal && at + 1 == levels.len() { Mask::Causal } else { Mask::None };
            let own = PlanOptions { mask, graph: options.graph, split: options.split };
            self.prefill
                .plan_paged(workspace, *level, &own)
                .map_err(|error| error.in_part(&format!("level {at}")))
        };
        let plans: Vec<_> =
            levels.iter().enumerate().zip(workspaces.iter_mut()).map(plan).collect::<Result<_>>()?;
        let rows = options.graph.unwrap_or(total);
        let shape = StateShape {
            dtype: self.dtype_o,
            rows,
            heads: self.heads().num_qo_heads,
            head_dim: self.head_dim,
        };
        let needed = if plans.len() > 1 { shape.bytes() } else { 0 };
        let available = states.len();
        if needed > available && *held {
            return check.fail(
                "workspace",
                format!(
                    "{needed} bytes are needed for states; it has {available}, and does not grow, because a CUDA \
                     graph may hold its memory: make another with CascadeWorkspace::new, and begin with the \
                     largest batch"
                ),
            );
        }
        if needed > available {
            let stream = states.stream().clone();
            let bytes = grown(available, needed);
            *states = DeviceBuffer::new(FlashInferRuntime::get()?.cuda(), &stream, bytes)?;
        }
        *held |= options.graph.is_some() && needed > 0;
        Ok(CascadePlan { levels: plans, states, shape })
    }
}

/// Refuses what levels cannot compute apart from each other.
fn check_spec(spec: &AttentionSpec) -> Result<()> {
    let unsupported = |what: String, available: &str| {
        Err(FlashInferError::Unsupported { what, available: available.into() })
    };
    if spec.window_left.is_some() {
        return unsupported(
            "a cascade with a sliding window".into(),
            "windows reach across levels; use BatchPrefill over complete page tables",
        );
    }
    if spec.attention_sink {
        return unsupported(
            "a cascade with attention sinks".into(),
            "each level would count them; use BatchPrefill over complete page tables",
        );
    }
    if spec.pos_encoding_mode != PosEncodingMode::None {
        return unsupported(
            "a cascade with encoded positions".into(),
            "levels count positions from their own first key; use BatchPrefill over complete page tables",
        );
    }
    if !cascade::has_head_dim(spec.head_dim_vo as i64) {
        return unsupported(
            format!("a cascade with head dimension {}", spec.head_dim_vo),
            "states of multiples of 8 up to 1024 can be merged",
        );
    }
    Ok(())
}

/// The sizes of a state.
#[derive(Clone, Copy, Debug, PartialEq)]
struct StateShape {
    dtype: DType,
    rows: usize,
    heads: usize,
    head_dim: usize,
}

impl StateShape {
    /// Where the LSE of a state, and that of another one, start, and where
    /// they end. Plans bound the elements of an output, so nothing overflows.
    fn offsets(&self) -> [usize; 3] {
        let sums = self.rows * self.heads;
        let s = (sums * self.head_dim * self.dtype.size()).next_multiple_of(ALIGNMENT);
        let other = s + (sums * size_of::<f32>()).next_multiple_of(ALIGNMENT);
        [s, other, other + sums * size_of::<f32>()]
    }

    fn bytes(&self) -> usize {
        self.offsets()[2]
    }
}

/// One step's plan of a cascade, ready to run for each layer.
///
/// It borrows its workspace and tables, as [`DecodePlan`](super::DecodePlan)
/// does.
pub struct CascadePlan<'p> {
    levels: Vec<PrefillPlan<'p, PageTable>>,
    states: &'p DeviceBuffer,
    shape: StateShape,
}

impl<'p> CascadePlan<'p> {
    run_over_pages!();

    /// Attention of each query to the pages of its requests on all levels.
    ///
    /// Arguments are those of prefill over pages
    /// ([`PrefillPlan::run_with`](super::PrefillPlan)). Outputs of levels are
    /// rounded to their dtype before they are merged. A query without keys on
    /// any level gets zeros, and −∞. Planned for a graph,
    /// rows of `out` and `lse` beyond the batch's are overwritten with numbers
    /// that mean nothing.
    ///
    /// Of scores below −50000 see [`attention`](super#very-negative-scores).
    ///
    /// # Errors
    /// As [`DecodePlan::run_with`](super::DecodePlan::run_with).
    pub fn run_with(
        &self,
        q: &TensorRef<'_>,
        kv: &PagedKv<'_>,
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        options: &RunOptions<'_>,
    ) -> Result<()> {
        let Some((last, others)) = self.levels.split_last() else { return Ok(()) };
        if others.is_empty() {
            return last.run_with(q, kv, out, lse, options);
        }
        let [mut v, mut s, sums] = self.states()?;
        let mut lse = lse.map_or(sums, TensorMut::reborrow);
        last.run_with(q, kv, out, Some(&mut lse), options)?;
        for level in others {
            level.run_with(q, kv, &mut v, Some(&mut s), options)?;
            let mut state = StateMut::new(out.reborrow(), lse.reborrow());
            cascade::merge_state_in_place(
                self.stream(),
                &mut state,
                &State::new(v.as_ref(), s.as_ref()),
                None,
            )?;
        }
        Ok(())
    }

    /// Memory for the outputs and the LSE of a level, and for the LSE of all.
    fn states(&self) -> Result<[TensorMut<'_>; 3]> {
        let StateShape { dtype, rows, heads, head_dim } = self.shape;
        let [s, sums, _] = self.shape.offsets();
        let part = |offset: usize, dtype, shape: &[usize]| {
            let start = self.states.as_ptr().cast::<u8>().wrapping_add(offset).cast();
            let mut raw = RawTensor::new(start, self.stream().device(), dtype, shape, None)?;
            raw.owner = Some(self.states.owner());
            Ok::<_, FlashInferError>(TensorMut::new(raw))
        };
        Ok([
            part(0, dtype, &[rows, heads, head_dim])?,
            part(s, DType::F32, &[rows, heads])?,
            part(sums, DType::F32, &[rows, heads])?,
        ])
    }

    /// The stream that runs go to.
    pub fn stream(&self) -> &Stream {
        self.states.stream()
    }

    /// The plans of the levels, in their order.
    pub fn levels(&self) -> &[PrefillPlan<'p, PageTable>] {
        &self.levels
    }

    /// What a graph that captures runs of this plan bakes in: replay it only
    /// after a plan with an equal key.
    ///
    /// # Errors
    /// It was not planned for a graph.
    pub fn replay_key(&self) -> Result<CascadeReplayKey> {
        let levels = self.levels.iter().map(PrefillPlan::replay_key).collect::<Result<_>>()?;
        Ok(CascadeReplayKey { levels, states: self.states.as_ptr() as usize, shape: self.shape })
    }
}

impl std::fmt::Debug for CascadePlan<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CascadePlan")
            .field("levels", &self.levels)
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

/// The [`ReplayKey`] of a cascade.
#[derive(Clone, Debug, PartialEq)]
pub struct CascadeReplayKey {
    levels: Box<[ReplayKey]>,
    states: usize,
    shape: StateShape,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_apart_from_each_other_only() {
        let spec = AttentionSpec::new(DType::F16, 128);
        check_spec(&spec).unwrap();
        check_spec(&spec.with_logits_soft_cap(30.0)).unwrap();
        for spec in [
            spec.with_window_left(7),
            spec.with_attention_sink(),
            spec.with_pos_encoding_mode(PosEncodingMode::Alibi),
            spec.with_head_dim_vo(100),
        ] {
            assert!(matches!(check_spec(&spec), Err(FlashInferError::Unsupported { .. })), "{spec:?}");
        }
    }

    #[test]
    fn parts_of_states_do_not_overlap() {
        for (rows, heads, head_dim) in [(0, 8, 128), (1, 1, 64), (3, 5, 64), (1000, 32, 512)] {
            let shape = StateShape { dtype: DType::BF16, rows, heads, head_dim };
            let [s, sums, end] = shape.offsets();
            assert!(s >= rows * heads * head_dim * 2 && s.is_multiple_of(ALIGNMENT));
            assert!(sums >= s + rows * heads * 4 && sums.is_multiple_of(ALIGNMENT));
            assert_eq!(end, sums + rows * heads * 4);
        }
    }
}
