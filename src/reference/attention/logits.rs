//! How products of queries and keys become weights.

use super::super::host::HostCheck;
use crate::{
    attention::{AttentionSpec, MaskKind, PosEncodingMode, RunOptions},
    error::Result,
    indices::{ItemIndices, MaskIndices, RaggedIndices, check_shapes},
    tensor::TensorRef,
};

/// [`attention::Mask`](crate::attention::Mask) on the CPU: which keys each
/// query sees, besides what a sliding window hides.
#[derive(Clone, Copy, Debug, Default)]
pub enum HostMask<'a> {
    /// All keys.
    #[default]
    None,
    /// Those up to its position.
    Causal,
    /// Those whose bit is set.
    Custom(&'a MaskIndices, &'a [u8]),
    /// The prefix, and its own item up to its position.
    MultiItem(&'a ItemIndices),
}

impl HostMask<'_> {
    pub(super) fn kind(&self) -> MaskKind {
        match self {
            Self::None => MaskKind::None,
            Self::Causal => MaskKind::Causal,
            Self::Custom(..) => MaskKind::Custom,
            Self::MultiItem(_) => MaskKind::MultiItem,
        }
    }
}

/// What ALiBi adds to a logit for each unit of a head's slope.
#[derive(Clone, Copy)]
pub(super) enum Alibi {
    /// The key's position less the query's index, before the soft cap.
    FlashInfer,
    /// Minus the distance of the key from the query's position, after the cap.
    #[cfg(feature = "candle")]
    FlashAttention,
}

/// How products of queries and keys become logits, and which keys are seen.
pub(super) struct Logits<'a> {
    sm_scale: f64,
    soft_cap: Option<f64>,
    window_left: Option<usize>,
    mask: HostMask<'a>,
    /// For each head, or empty.
    slopes: Vec<f64>,
    pub(super) alibi: Alibi,
    pub(super) sinks: Vec<f64>,
    pub(super) v_scale: f64,
}

impl<'a> Logits<'a> {
    pub(super) fn new(
        check: HostCheck,
        spec: &AttentionSpec,
        mask: HostMask<'a>,
        options: &RunOptions<'_>,
    ) -> Result<Self> {
        if spec.head_dim_qk == 0 || spec.head_dim_vo == 0 {
            return check.fail(
                "spec",
                format!("head dimensions {} and {}; neither may be 0", spec.head_dim_qk, spec.head_dim_vo),
            );
        }
        let soft_cap = spec.logits_soft_cap.map(f64::from);
        if soft_cap.is_some_and(|cap| !(cap > 0.0 && cap.is_finite())) {
            return check
                .fail("spec", format!("logits_soft_cap {soft_cap:?}; it must be positive and finite"));
        }
        let per_head = |name, given: &Option<TensorRef<'_>>, read: bool| match given {
            Some(tensor) if read => Ok(check.rows(name, tensor, &[], &[1])?.numbers(0)),
            None if !read => Ok(Vec::new()),
            Some(_) => check.fail(name, "given, but the spec does not read it".into()),
            None => check.fail(name, "missing; the spec reads one number for each head".into()),
        };
        let alibi = spec.pos_encoding_mode == PosEncodingMode::Alibi;
        Ok(Self {
            sm_scale: options.logit_scale(spec),
            soft_cap,
            window_left: spec.window_left.map(|left| left as usize),
            mask,
            slopes: per_head("alibi_slopes", &options.alibi_slopes, alibi)?,
            alibi: Alibi::FlashInfer,
            sinks: per_head("sinks", &options.sinks, spec.attention_sink)?,
            v_scale: options.v_scale.unwrap_or(1.0).into(),
        })
    }

    /// Mask, slopes and sinks are those of a batch.
    pub(super) fn check(
        &self,
        check: HostCheck,
        queries: &RaggedIndices,
        kv_len: impl Fn(usize) -> usize,
        heads: usize,
    ) -> Result<()> {
        for (name, numbers) in [("alibi_slopes", &self.slopes), ("sinks", &self.sinks)] {
            if !numbers.is_empty() && numbers.len() != heads {
                return check.fail(name, format!("{} numbers for {heads} heads", numbers.len()));
            }
        }
        match self.mask {
            HostMask::None | HostMask::Causal => Ok(()),
            HostMask::Custom(indices, bits) => {
                let batch = (0..queries.batch_size()).map(|request| (queries.len(request), kv_len(request)));
                match check_shapes(indices.shapes(), batch) {
                    Err(problem) => check.fail("mask", problem),
                    Ok(()) if bits.len() < indices.num_bytes() => check.fail(
                        "mask",
                        format!("{} bytes; the batch needs {}", bits.len(), indices.num_bytes()),
                    ),
                    Ok(()) => Ok(()),
                }
            }
            HostMask::MultiItem(items) => {
                let batch = queries.batch_size();
                if items.batch_size() != batch || (0..batch).any(|at| kv_len(at) > items.seq_len(at)) {
                    return check.fail("items", "they are of other requests than the batch".into());
                }
                Ok(())
            }
        }
    }

    /// The logit of a key for a query with this index and this position.
    pub(super) fn of(&self, product: f64, head: usize, key: usize, place: [i64; 2]) -> f64 {
        let slope = self.slopes.get(head).copied().unwrap_or_default();
        let capped = |logit: f64| self.soft_cap.map_or(logit, |cap| cap * (logit / cap).tanh());
        let logit = product * self.sm_scale;
        match self.alibi {
            Alibi::FlashInfer => capped(logit + slope * (key as i64 - place[0]) as f64),
            #[cfg(feature = "candle")]
            Alibi::FlashAttention => capped(logit) - slope * (place[1] - key as i64).abs() as f64,
        }
    }

    /// The keys that a query sees: one of `count` in a request of `len` keys.
    pub(super) fn seen(&self, request: usize, query: usize, count: usize, len: usize) -> Vec<usize> {
        let position = position(query, count, len);
        let start = self.window_left.map_or(0, |left| position - left as i64);
        let end =
            if let HostMask::Causal | HostMask::MultiItem(_) = self.mask { position + 1 } else { len as i64 };
        let place = |position: i64| position.clamp(0, len as i64) as usize;
        let keys = place(start)..place(end);
        match self.mask {
            HostMask::None | HostMask::Causal => keys.collect(),
            HostMask::Custom(indices, bits) => {
                keys.filter(|&key| indices.sees(bits, request, query, key)).collect()
            }
            HostMask::MultiItem(items) => {
                keys.filter(|&key| items.sees(request, position as usize, key)).collect()
            }
        }
    }
}

/// Where a query stands among the keys of its request: one of `count`, the last
/// of which is at the last key. It may lie before all keys.
pub(super) fn position(query: usize, count: usize, len: usize) -> i64 {
    len as i64 - count as i64 + query as i64
}

/// Turns logits into weights; returns the base-2 logarithm of the sum of their
/// exponentials, −∞ for none.
pub(in crate::reference) fn softmax(logits: &mut [f64]) -> f64 {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if logits.is_empty() {
        return max;
    }
    logits.iter_mut().for_each(|logit| *logit = (*logit - max).exp());
    let sum: f64 = logits.iter().sum();
    logits.iter_mut().for_each(|weight| *weight /= sum);
    max * std::f64::consts::LOG2_E + sum.log2()
}
