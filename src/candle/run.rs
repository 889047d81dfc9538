//! Options of a run over candle's tensors.

use candle_core::{DType, Device, Result, Tensor};

use super::{
    op::{check_like, invalid},
    tensor,
};
use crate::attention;

/// Options of a run of [`PagedDecodePlan`](super::PagedDecodePlan) and
/// [`PagedPrefillPlan`](super::PagedPrefillPlan).
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct PagedRunOptions<'a> {
    /// The factor on query-key products, `1/√head_dim` if `None`. On tensor cores it
    /// must be at least 1e-3, together with [`k_scale`](Self::k_scale).
    pub sm_scale: Option<f64>,
    /// What keys of a cache of 8 bits were divided by; 1 if `None`.
    pub k_scale: Option<f64>,
    /// What values were divided by; 1 if `None`.
    pub v_scale: Option<f32>,
    /// `f32` `(num_qo_heads)`: with
    /// [`PosEncodingMode::Alibi`](attention::PosEncodingMode::Alibi), what is added to a logit times
    /// the place of the key among its request's, less that of the query among the new ones.
    pub alibi_slopes: Option<&'a Tensor>,
    /// `f32` `(num_qo_heads)`, with a spec of
    /// [`attention_sink`](attention::AttentionSpec::attention_sink): each head's logit
    /// of a key that has no value.
    pub sinks: Option<&'a Tensor>,
}

impl PagedRunOptions<'_> {
    /// The default options with another `sm_scale`.
    pub fn with_sm_scale(sm_scale: f64) -> Self {
        Self { sm_scale: Some(sm_scale), ..Self::default() }
    }

    /// Calls `run` with the same options for kernels, on the stream of a device.
    pub(super) fn with_views<R>(
        &self,
        op: &'static str,
        num_qo_heads: usize,
        device: &Device,
        run: impl FnOnce(&attention::RunOptions<'_>) -> Result<R>,
    ) -> Result<R> {
        let scales = [
            ("sm_scale", self.sm_scale),
            ("k_scale", self.k_scale),
            ("v_scale", self.v_scale.map(f64::from)),
        ];
        for (argument, scale) in scales {
            finite(op, argument, scale.unwrap_or(1.0))?;
        }
        if self.alibi_slopes.is_some() && self.sinks.is_some() {
            return invalid(op, "sinks", "given with alibi_slopes; no spec reads both".into());
        }
        let numbers = match (self.alibi_slopes, self.sinks) {
            (Some(slopes), _) => Some(per_head(op, "alibi_slopes", slopes, num_qo_heads, device)?),
            (None, sinks) => {
                sinks.map(|sinks| per_head(op, "sinks", sinks, num_qo_heads, device)).transpose()?
            }
        };
        tensor::with_view(numbers.as_ref(), device, |numbers| {
            let (alibi_slopes, sinks) = if self.sinks.is_some() { (None, numbers) } else { (numbers, None) };
            let Self { sm_scale, k_scale, v_scale, .. } = *self;
            // What is read may come from the kernel just before.
            let enable_pdl = numbers.is_some().then_some(false);
            run(&attention::RunOptions { sm_scale, k_scale, v_scale, enable_pdl, alibi_slopes, sinks })
        })
    }
}

/// Refuses what is no number.
pub(super) fn finite(op: &'static str, argument: &'static str, number: f64) -> Result<()> {
    if number.is_finite() {
        return Ok(());
    }
    invalid(op, argument, format!("{number}; expected a finite number"))
}

/// A number for each query head, as kernels read them.
pub(super) fn per_head(
    op: &'static str,
    argument: &'static str,
    numbers: &Tensor,
    num_qo_heads: usize,
    device: &Device,
) -> Result<Tensor> {
    check_like(op, argument, numbers, &[num_qo_heads], DType::F32, device)?;
    numbers.contiguous()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel that begins before the one before it is over could read sinks or slopes that are not there.
    #[test]
    fn what_is_read_beside_queries_is_waited_for() {
        let device = Device::Cpu;
        let numbers = Tensor::ones(4, DType::F32, &device).unwrap();
        let plain = PagedRunOptions::default();
        let sinks = PagedRunOptions { sinks: Some(&numbers), ..plain };
        let slopes = PagedRunOptions { alibi_slopes: Some(&numbers), ..plain };
        for (options, expected) in [(plain, None), (sinks, Some(false)), (slopes, Some(false))] {
            let enable_pdl = options.with_views("test", 4, &device, |options| Ok(options.enable_pdl));
            assert_eq!(enable_pdl.unwrap(), expected);
        }
        for options in [
            PagedRunOptions { sm_scale: Some(f64::NAN), ..plain },
            PagedRunOptions { k_scale: Some(f64::INFINITY), ..plain },
            PagedRunOptions { v_scale: Some(f32::NAN), ..plain },
        ] {
            let error = options.with_views("test", 4, &device, |_| Ok(())).unwrap_err().to_string();
            assert!(error.contains("expected a finite number"), "{error}");
        }
    }
}
