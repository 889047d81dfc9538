//! What filters leave of a row.

use super::parameters::{counts, floats};
use crate::{
    dtype::DType,
    error::Result,
    ops::check::Check,
    reference::host::HostCheck,
    sampling::{MIN_P, Parameter, TOP_P, check_rows},
    tensor::RawTensor,
};

/// Which tokens of a row may be drawn: those of equal probability all or none.
#[derive(Clone, Copy, Debug)]
pub enum Filter<'a> {
    /// All with a probability above 0.
    None,
    /// Those that fewer than this many are likelier than: with 1, all of the likeliest.
    TopK(Parameter<'a, u32>),
    /// Those that less than this probability is likelier than.
    TopP(Parameter<'a>),
    /// Those of at least this fraction of the largest probability.
    MinP(Parameter<'a>),
    /// Those that pass both, each of the whole row.
    TopKTopP(Parameter<'a, u32>, Parameter<'a>),
}

impl Filter<'_> {
    /// The function of [`sampling`](crate::sampling) that draws through it.
    pub(super) fn kernel(&self) -> &'static str {
        match self {
            Self::None => "sampling_from_probs",
            Self::TopK(_) => "top_k_sampling_from_probs",
            Self::TopP(_) => "top_p_sampling_from_probs",
            Self::MinP(_) => "min_p_sampling_from_probs",
            Self::TopKTopP(..) => "top_k_top_p_sampling_from_probs",
        }
    }

    /// What that function checks of probabilities and parameters.
    pub(super) fn check_as_kernel(
        &self,
        check: &Check<'_>,
        probs: &RawTensor,
        rows_of_output: Option<i64>,
    ) -> Result<()> {
        let vocab = check_rows(check, "probs", probs, &[DType::F32], 2)?;
        let rows = probs.shape()[0];
        let by_output = [rows_of_output.unwrap_or(rows), rows];
        match *self {
            Self::None => Ok(()),
            Self::TopK(k) => k.count(check, "top_k", DType::I32, by_output, vocab).map(drop),
            Self::TopP(p) => p.float(check, "top_p", TOP_P, [rows; 2]).map(drop),
            Self::MinP(p) => p.float(check, "min_p", MIN_P, by_output).map(drop),
            Self::TopKTopP(k, p) => {
                k.count(check, "top_k", DType::I32, [rows; 2], vocab)?;
                p.float(check, "top_p", TOP_P, [rows; 2]).map(drop)
            }
        }
    }
}

/// The tokens of one row that pass.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Limits {
    top_k: u32,
    top_p: f64,
    min_p: f64,
}

impl Limits {
    pub(super) const NONE: Self = Self { top_k: u32::MAX, top_p: f64::INFINITY, min_p: 0.0 };

    /// The sum of the numbers that pass; the others become 0.
    pub(super) fn apply(self, probs: &mut [f64]) -> f64 {
        probs.iter_mut().filter(|x| x.is_nan() || **x < 0.0).for_each(|x| *x = 0.0);
        let mut least = match self.min_p {
            0.0 => 0.0,
            min_p => min_p * probs.iter().copied().fold(0.0, f64::max),
        };
        if self.top_k < u32::MAX || self.top_p != f64::INFINITY {
            let mut order: Vec<f64> = probs.iter().copied().filter(|&x| x > 0.0).collect();
            order.sort_unstable_by(|a, b| b.total_cmp(a));
            let (mut likelier, mut at) = (0.0, 0);
            let mut threshold = f64::INFINITY;
            while at < order.len() && at < self.top_k as usize && likelier < self.top_p {
                threshold = order[at];
                while order.get(at) == Some(&threshold) {
                    likelier += threshold;
                    at += 1;
                }
            }
            if at == 0 {
                probs.fill(0.0);
            }
            least = least.max(threshold);
        }
        probs.iter_mut().filter(|x| **x < least || least.is_nan()).for_each(|x| *x = 0.0);
        probs.iter().sum()
    }
}

/// The limits of each row, read once.
pub(super) struct Rules {
    pub(super) limits: Vec<Limits>,
    /// Whether the kernel looks them up by the row of the output.
    pub(super) by_output: bool,
}

impl Rules {
    pub(super) fn of(
        check: HostCheck,
        filter: &Filter<'_>,
        source_rows: usize,
        output_rows: usize,
    ) -> Result<Self> {
        let by_output = matches!(filter, Filter::TopK(_) | Filter::MinP(_));
        let mut limits = vec![Limits::NONE; if by_output { output_rows } else { source_rows }];
        let len = limits.len();
        let (top_k, top_p, min_p) = match *filter {
            Filter::None => (None, None, None),
            Filter::TopK(k) => (Some(k), None, None),
            Filter::TopP(p) => (None, Some(p), None),
            Filter::MinP(p) => (None, None, Some(p)),
            Filter::TopKTopP(k, p) => (Some(k), Some(p), None),
        };
        if let Some(top_k) = top_k {
            for (limits, value) in limits.iter_mut().zip(counts(check, top_k, len)?) {
                limits.top_k = value;
            }
        }
        if let Some(top_p) = top_p {
            for (limits, value) in limits.iter_mut().zip(floats(check, "top_p", TOP_P, top_p, len)?) {
                limits.top_p = if value >= 1.0 { f64::INFINITY } else { value };
            }
        }
        if let Some(min_p) = min_p {
            for (limits, value) in limits.iter_mut().zip(floats(check, "min_p", MIN_P, min_p, len)?) {
                limits.min_p = value;
            }
        }
        Ok(Self { limits, by_output })
    }
}
