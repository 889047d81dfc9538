//! Options of a run, which all attention kernels share.

use super::{planned::Heads, spec::AttentionSpec};
use crate::{dtype::DType, error::Result, ops::check::Check, tensor::TensorRef};

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
    /// [`PosEncodingMode::Alibi`](super::PosEncodingMode::Alibi), what is
    /// added to a logit for each position that the key lies after the query.
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
