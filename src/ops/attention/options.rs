//! Options of plans and of runs, which all attention operations share.

use super::{
    mask::Mask,
    spec::{AttentionSpec, Heads},
};
use crate::{
    dtype::DType,
    error::{FlashInferError, Result},
    ops::check::Check,
    tensor::TensorRef,
};

/// How a step is planned. What an operation cannot do is an error.
///
/// ```
/// use flashinfer_rs::attention::{PlanOptions, Split};
///
/// // Causal, for a CUDA graph whose tensors have 64 rows.
/// let options = PlanOptions::causal().with_graph(64);
/// // The same for any batch, bit for bit.
/// let steady = PlanOptions::causal().with_split(Split::fixed(64));
/// # assert_eq!((options.graph, steady.split.fixed_split_size), (Some(64), Some(64)));
/// ```
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct PlanOptions<'p> {
    /// Which keys each query sees. Prefill has all masks; attention of mixed
    /// batches, latent attention, and the last level of a cascade
    /// [`Mask::None`] and [`Mask::Causal`].
    pub mask: Mask<'p>,
    /// `Some(rows)`: runs are captured into a CUDA graph, which is replayed
    /// while later plans on the same workspace and tables change what it works
    /// on. Tensors have this many rows, of which each plan uses as many as its
    /// batch has queries. For decode, it is the number of requests of the table.
    ///
    /// Heads must stay, and but for [`BatchAttention`](super::BatchAttention)
    /// the number of requests, of which each takes a row at least: fill the batch
    /// up with [`BatchTables::update_padded`](crate::kv::BatchTables::update_padded), or
    /// [`update_by_row`](crate::kv::BatchTables::update_by_row) where requests have several new tokens.
    /// The workspace does not [grow](super::Workspace#growth) any more. Latent attention has no
    /// such plans.
    pub graph: Option<usize>,
    /// How the keys of a request are divided among blocks, where
    /// FlashAttention 2 is planned: [`BatchPrefill`](super::BatchPrefill),
    /// [`MultiLevelCascade`](super::MultiLevelCascade) and
    /// [`BatchDecode`](super::BatchDecode) with
    /// [`Backend::Fa2`](super::Backend::Fa2).
    pub split: Split,
}

impl<'p> PlanOptions<'p> {
    /// With [`Mask::Causal`].
    pub fn causal() -> Self {
        Self::default().with_mask(Mask::Causal)
    }

    /// With another mask.
    #[must_use]
    pub fn with_mask(mut self, mask: Mask<'p>) -> Self {
        self.mask = mask;
        self
    }

    /// For a CUDA graph whose tensors have so many rows.
    #[must_use]
    pub fn with_graph(mut self, rows: usize) -> Self {
        self.graph = Some(rows);
        self
    }

    /// With keys divided in another way.
    #[must_use]
    pub fn with_split(mut self, split: Split) -> Self {
        self.split = split;
        self
    }

    /// Whether the mask is causal, for an operation that knows no other.
    pub(super) fn is_causal(&self, what: &str) -> Result<bool> {
        match self.mask {
            Mask::None => Ok(false),
            Mask::Causal => Ok(true),
            Mask::Custom { .. } | Mask::MultiItem(_) => Err(FlashInferError::Unsupported {
                what: format!("{what} with a custom or a multi-item mask"),
                available: "there are Mask::None and Mask::Causal; BatchPrefill has the others".into(),
            }),
        }
    }
}

/// How the keys of a request are divided among blocks, whose partial results
/// are merged. By default the planner divides them so that the GPU is busy.
///
/// Sums are rounded, so that an output depends a little on how keys are
/// divided: by default on the number and the lengths of the other requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Split {
    /// So many pages (of ragged keys, so many keys) in each part, whatever the
    /// batch is: a request has the same output, bit for bit, alone and in any
    /// batch. Each launch is as large as its parts are many, so a plan for a
    /// graph cannot have it.
    ///
    /// Kernels also have tiles of 16, 64 or 128 rows (a row is a query's head,
    /// among those that share a KV head). One size serves the whole batch, by
    /// the mean of its requests: up to 16 rows, up to 64, or more. Between
    /// batches of two sizes outputs can differ. With one query for each request,
    /// as in decode, there is one size.
    pub fixed_split_size: Option<usize>,
    /// Each request's keys stay whole: as independent of the batch as with a
    /// fixed size, for graphs, too, but slow where few requests have many keys.
    /// A graph of decode has blocks for its requests alone then, and for any
    /// batch of its size otherwise.
    pub disable_split_kv: bool,
    /// Blocks that another kernel needs on the GPU at the same time. The planner
    /// leaves room for them: it counts on two blocks on each multiprocessor, less
    /// these, when it decides into how many parts it divides keys.
    pub num_colocated_ctas: usize,
}

impl Split {
    /// Parts of so many pages.
    pub const fn fixed(pages: usize) -> Self {
        Self { fixed_split_size: Some(pages), disable_split_kv: false, num_colocated_ctas: 0 }
    }

    /// Undivided keys.
    pub const fn disabled() -> Self {
        Self { fixed_split_size: None, disable_split_kv: true, num_colocated_ctas: 0 }
    }

    /// Parts for a GPU on which another kernel has so many blocks.
    pub const fn beside(num_colocated_ctas: usize) -> Self {
        Self { fixed_split_size: None, disable_split_kv: false, num_colocated_ctas }
    }

    /// Refuses whatever is asked of a planner that has no such arguments.
    pub(super) fn refuse(&self, what: &str) -> Result<()> {
        if *self == Self::default() {
            return Ok(());
        }
        Err(FlashInferError::Unsupported {
            what: format!("{self:?} for {what}"),
            available:
                "FlashAttention 2 can be told how to divide keys: BatchPrefill, MultiLevelCascade and \
                        BatchDecode with Backend::Fa2"
                    .into(),
        })
    }

    /// Refuses numbers that the planner of FlashAttention 2 does not take, or
    /// takes for others.
    pub(super) fn check(&self, check: &Check<'_>, page_size: usize, for_graph: bool) -> Result<()> {
        let most = i32::MAX as usize;
        if self.num_colocated_ctas > most {
            let blocks = self.num_colocated_ctas;
            return check.fail("split", format!("num_colocated_ctas is {blocks}; it must be below 2^31"));
        }
        let Some(pages) = self.fixed_split_size else { return Ok(()) };
        if pages == 0 || pages.checked_mul(page_size).is_none_or(|tokens| tokens > most) {
            return check.fail(
                "split",
                format!(
                    "fixed_split_size is {pages} pages of {page_size} tokens; it must be at least 1, and below \
                     2^31 tokens"
                ),
            );
        }
        if self.disable_split_kv {
            return check.fail(
                "split",
                format!(
                    "fixed_split_size is {pages} pages, and disable_split_kv is set; give one of the two"
                ),
            );
        }
        if for_graph {
            return Err(FlashInferError::Unsupported {
                what: "a plan for a CUDA graph with fixed_split_size".into(),
                available: "the number of parts would change the launch; Split::disabled() makes results \
                            independent of the batch, too"
                    .into(),
            });
        }
        Ok(())
    }
}

/// Options of a run of decode, prefill or attention of one request.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct RunOptions<'a> {
    /// The factor on query-key products, `1/√head_dim_qk` if `None`. On tensor
    /// cores it must be at least 1e-3, together with [`k_scale`](Self::k_scale).
    ///
    /// Of scores below −50000 see [`attention`](super#very-negative-scores).
    pub sm_scale: Option<f64>,
    /// What keys were divided by when they were quantized; 1 if `None`. It is
    /// multiplied into `sm_scale`; products grow as it gets smaller.
    pub k_scale: Option<f64>,
    /// What values were divided by when they were quantized; 1 if `None`. The
    /// output is multiplied by it: by FlashAttention 3 (without sinks) and the
    /// kernels of [`BatchAttention`](super::BatchAttention) themselves, after
    /// the others by a small kernel of this crate, on all rows that a graph has.
    pub v_scale: Option<f32>,
    /// Programmatic dependent launch; `None` uses it where the GPU has it
    /// (compute capability 9.0 and newer). Pass `Some(false)` when the kernel
    /// just before writes index arrays, masks, slopes or sinks. The kernels for
    /// one request do not have it.
    pub enable_pdl: Option<bool>,
    /// Contiguous `f32` `[num_qo_heads]`: with
    /// [`PosEncodingMode::Alibi`](super::PosEncodingMode::Alibi), what is added to a logit times the
    /// place of the key among its request's, less that of the query among its request's queries.
    pub alibi_slopes: Option<TensorRef<'a>>,
    /// Contiguous `f32` `[num_qo_heads]`: with
    /// [`attention_sink`](AttentionSpec::attention_sink), each head's logit of
    /// a key that has no value.
    pub sinks: Option<TensorRef<'a>>,
}

impl RunOptions<'_> {
    /// The default options with another `sm_scale`.
    pub fn with_sm_scale(sm_scale: f64) -> Self {
        Self { sm_scale: Some(sm_scale), ..Self::default() }
    }

    /// The factor on query-key products.
    pub(crate) fn logit_scale(&self, spec: &AttentionSpec) -> f64 {
        self.sm_scale.unwrap_or_else(|| spec.default_sm_scale()) * self.k_scale.unwrap_or(1.0)
    }

    /// Slopes and sinks are there exactly if the spec's kernels read them, and
    /// scales are numbers.
    pub(super) fn check(&self, check: &Check<'_>, spec: &AttentionSpec, heads: Heads) -> Result<()> {
        if let Some(v_scale) = self.v_scale.filter(|scale| !scale.is_finite()) {
            return check.fail("v_scale", format!("{v_scale}; it must be finite"));
        }
        let k_scale = self.k_scale.unwrap_or(1.0);
        if !k_scale.is_finite() {
            return check.fail("k_scale", format!("{k_scale}; it must be finite"));
        }
        if !self.logit_scale(spec).is_finite() {
            return check.fail("sm_scale", format!("{:?} times k_scale is not finite", self.sm_scale));
        }
        let per_head =
            |name, given: &Option<TensorRef<'_>>, expected: bool, asks: &str| match (given, expected) {
                (None, false) => Ok(()),
                (Some(tensor), true) => {
                    check.tensor(name, &tensor.raw, &[DType::F32], &[1])?;
                    check.shape(name, &tensor.raw, &[heads.num_qo_heads as i64])?;
                    check.contiguous(name, &tensor.raw)?;
                    check.aligned(name, &tensor.raw, size_of::<f32>())
                }
                (None, true) => {
                    check.fail(name, format!("missing; a spec with {asks} reads one number for each head"))
                }
                (Some(_), false) => check.fail(name, format!("given, but only a spec with {asks} reads it")),
            };
        per_head(
            "alibi_slopes",
            &self.alibi_slopes,
            spec.pos_encoding_mode == super::PosEncodingMode::Alibi,
            "PosEncodingMode::Alibi",
        )?;
        per_head("sinks", &self.sinks, spec.attention_sink, "attention_sink")
    }
}

/// Options of a prefill that has no plan: the mask, and those of the run.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct PrefillRunOptions<'a> {
    /// Which keys each query sees.
    pub mask: Mask<'a>,
    /// Scales, slopes and sinks.
    pub run: RunOptions<'a>,
}

impl<'a> PrefillRunOptions<'a> {
    /// A mask, and other options of the run than the default ones.
    pub fn new(mask: Mask<'a>, run: RunOptions<'a>) -> Self {
        Self { mask, run }
    }

    /// With [`Mask::Causal`].
    pub fn causal() -> Self {
        Self::new(Mask::Causal, RunOptions::default())
    }
}

/// The smallest factor on query-key products.
///
/// Kernels on tensor cores hide a key by making its product −50000 before they
/// apply the factor. With a smaller factor, or a negative one, hidden keys
/// would count.
const MIN_SM_SCALE: f64 = 1e-3;

/// Refuses a factor with which hidden keys would count.
pub(super) fn check_sm_scale(check: &Check<'_>, sm_scale: f64) -> Result<()> {
    if sm_scale >= MIN_SM_SCALE && sm_scale.is_finite() {
        return Ok(());
    }
    check.fail(
        "sm_scale",
        format!("{sm_scale}, times the scale of keys if there is one; it must be finite and at least {MIN_SM_SCALE}"),
    )
}
