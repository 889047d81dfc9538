//! What selects an attention module.

use crate::{
    dtype::DType,
    error::{FlashInferError, Result},
    ops::{check::Check, page::CacheShape},
};

/// Heads of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query (and output) heads, a multiple of `num_kv_heads`.
    pub num_qo_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
}

impl Heads {
    /// So many query heads over so many key and value heads. They are checked
    /// where they are used.
    pub const fn new(num_qo_heads: usize, num_kv_heads: usize) -> Self {
        Self { num_qo_heads, num_kv_heads }
    }

    /// Query heads per KV head; `None` unless that is a whole number.
    pub fn group_size(&self) -> Option<usize> {
        let group = self.num_qo_heads.checked_div(self.num_kv_heads)?;
        (group > 0 && group * self.num_kv_heads == self.num_qo_heads).then_some(group)
    }

    /// Refuses what no kernel can launch; returns the group size.
    pub(super) fn check(&self, op: &'static str) -> Result<usize> {
        let Self { num_qo_heads, num_kv_heads } = *self;
        // Heads are dimensions of launch grids, which have 65535 places.
        match self.group_size() {
            Some(group) if num_qo_heads <= 65535 => Ok(group),
            _ => Err(FlashInferError::invalid(
                op,
                "heads",
                format!(
                    "{num_qo_heads} query heads over {num_kv_heads} KV heads; \
                     expected a multiple, and at most 65535 of them"
                ),
            )),
        }
    }

    /// The cache has the plan's KV heads, of the spec's width.
    pub(super) fn check_cache(&self, check: &Check<'_>, cache: CacheShape, head_dim: usize) -> Result<()> {
        if (cache.heads, cache.head_dim) == (self.num_kv_heads as i64, head_dim as i64) {
            return Ok(());
        }
        check.fail(
            "kv.k",
            format!(
                "it has {} heads of {} elements; the plan is for {} of {head_dim}",
                cache.heads, cache.head_dim, self.num_kv_heads
            ),
        )
    }
}

/// Which kernels serve an attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backend {
    /// The fastest that the GPU and the spec allow, of the modules that are at
    /// hand. `docs/attention.md` has the rule for each operation, and what was
    /// measured; each has a `backend` that says what was picked.
    #[default]
    Auto,
    /// Dot products on CUDA cores: decode with few query heads per KV head.
    CudaCores,
    /// FlashAttention 2 on tensor cores, on compute capability 8.0 and newer.
    Fa2,
    /// FlashAttention 3, on compute capability 9.0 exactly (`_sm90` modules).
    /// FlashInfer's kernels of prefill have a race, which was seen under
    /// compute-sanitizer alone (`docs/attention.md`).
    Fa3,
}

/// How kernels encode positions, by FlashInfer's name. Models that rotate
/// queries and keys beforehand need none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PosEncodingMode {
    /// Not at all.
    #[default]
    None,
    /// ALiBi: a logit gets a head's slope times the key's position less the
    /// query's index among its request's queries. (Counting from the query's
    /// own position would add the same to all logits of a query. So it does
    /// not change the output, but the LSE.) No wheel that FlashInfer publishes
    /// has such modules; one that you build may.
    Alibi,
}

impl PosEncodingMode {
    /// The number in module names.
    pub(super) const fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Alibi => 2,
        }
    }
}

/// The properties of an attention that its kernels are compiled for.
///
/// ```
/// # use flashinfer_rs::{DType, attention::AttentionSpec};
/// let spec = AttentionSpec::new(DType::BF16, 128).with_window_left(1023);
/// assert!(spec.decode_module()?.as_str().contains("use_swa_True"));
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct AttentionSpec {
    /// Element type of queries.
    pub dtype_q: DType,
    /// Element type of keys and values.
    pub dtype_kv: DType,
    /// Element type of the output.
    pub dtype_o: DType,
    /// Width of a query and key head: that of values, or with FlashAttention 2 another multiple of 64 (of 128
    /// where keys have 8 bits), with FlashAttention 3 192 over values of 128.
    pub head_dim_qk: usize,
    /// Width of a value head: 64, 128, 256 or 512, of which FlashInfer's wheels have the first three.
    pub head_dim_vo: usize,
    /// Keys left of a query's own position that it sees, as in FlashInfer:
    /// with `Some(w)`, the last `w + 1` keys. `None` sees all. Values of keys
    /// that the window hides are still multiplied by 0, so they must be finite;
    /// FlashAttention 3 does so with the first keys of a request, however far
    /// they are from the window.
    pub window_left: Option<u32>,
    /// `Some(cap)` turns logits into `cap · tanh(logits / cap)`.
    pub logits_soft_cap: Option<f32>,
    /// How kernels encode positions.
    pub pos_encoding_mode: PosEncodingMode,
    /// Each head has a sink: a key without a value, whose logit takes part in
    /// the softmax; see [`RunOptions::sinks`](super::RunOptions::sinks). Its
    /// modules are for prefill, and for decode through it.
    pub attention_sink: bool,
    /// Which kernels serve it.
    pub backend: Backend,
}

impl AttentionSpec {
    /// One element type and one head dimension for everything; no window, no cap.
    pub const fn new(dtype: DType, head_dim: usize) -> Self {
        Self {
            dtype_q: dtype,
            dtype_kv: dtype,
            dtype_o: dtype,
            head_dim_qk: head_dim,
            head_dim_vo: head_dim,
            window_left: None,
            logits_soft_cap: None,
            pos_encoding_mode: PosEncodingMode::None,
            attention_sink: false,
            backend: Backend::Auto,
        }
    }

    /// Other kernels than [`Backend::Auto`] picks.
    #[must_use]
    pub const fn with_backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// Values of another width than queries and keys.
    #[must_use]
    pub const fn with_head_dim_vo(mut self, head_dim: usize) -> Self {
        self.head_dim_vo = head_dim;
        self
    }

    /// Keys and values of another element type.
    #[must_use]
    pub const fn with_kv_dtype(mut self, dtype: DType) -> Self {
        self.dtype_kv = dtype;
        self
    }

    /// A sliding window; see [`window_left`](Self::window_left).
    #[must_use]
    pub const fn with_window_left(mut self, window_left: u32) -> Self {
        self.window_left = Some(window_left);
        self
    }

    /// A soft cap; see [`logits_soft_cap`](Self::logits_soft_cap).
    #[must_use]
    pub const fn with_logits_soft_cap(mut self, cap: f32) -> Self {
        self.logits_soft_cap = Some(cap);
        self
    }

    /// Positions encoded by the kernels; see [`PosEncodingMode`].
    #[must_use]
    pub const fn with_pos_encoding_mode(mut self, mode: PosEncodingMode) -> Self {
        self.pos_encoding_mode = mode;
        self
    }

    /// A sink for each head; see [`attention_sink`](Self::attention_sink).
    #[must_use]
    pub const fn with_attention_sink(mut self) -> Self {
        self.attention_sink = true;
        self
    }

    /// The factor on query-key products unless a run names another: `1/√head_dim_qk`.
    pub fn default_sm_scale(&self) -> f64 {
        1.0 / (self.head_dim_qk as f64).sqrt()
    }
    /// The output's offsets fit 32 bits. Planners count blocks in as many, so
    /// it has to be known before they run.
    pub(super) fn check_output_size(&self, check: &Check<'_>, rows: usize, heads: Heads) -> Result<()> {
        let elements = rows.checked_mul(heads.num_qo_heads).and_then(|all| all.checked_mul(self.head_dim_vo));
        if elements.is_some_and(|all| all <= u32::MAX as usize) {
            return Ok(());
        }
        check.fail(
            "heads",
            format!(
                "{rows} queries with {} heads of {} elements are 2^32 elements or more; split the batch",
                heads.num_qo_heads, self.head_dim_vo
            ),
        )
    }

    /// Pages hold keys and values of one width.
    pub(super) fn check_paged(&self) -> Result<()> {
        if self.head_dim_qk == self.head_dim_vo {
            return Ok(());
        }
        Err(FlashInferError::Unsupported {
            what: format!("a paged cache with head dimensions {} and {}", self.head_dim_qk, self.head_dim_vo),
            available: "keys and values of different widths can be ragged; see BatchPrefill::plan_ragged"
                .into(),
        })
    }

    /// The window as kernels take it: −1 for none.
    pub(super) fn window_left_code(&self) -> i64 {
        self.window_left.map_or(-1, i64::from)
    }

    /// The soft cap as kernels take it: 0 for none.
    pub(super) fn soft_cap_code(&self) -> f64 {
        self.logits_soft_cap.map_or(0.0, f64::from)
    }
}
