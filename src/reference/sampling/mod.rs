//! Sampling on the CPU.
//!
//! What a filter leaves of a row is computed exactly, and one number decides
//! the token. The numbers are those of the kernels: the same Philox, a sequence
//! for each row of the output. So without a filter, with `min_p`, and in chains
//! the tokens are those of the GPU, save where sums in `f32` fall on the other
//! side of a number. The kernels of the other filters draw repeatedly, and that
//! of logits draws a number for each token: they give other tokens of the same
//! distribution.

mod parameters;
mod sample;

pub use sample::{edit_logits, sample};

use super::{
    host::{Check, Rows},
    strict,
};
use crate::{
    dtype::DType,
    error::Result,
    indices::BoundedIndices,
    ops::check::Check as KernelCheck,
    sampling::{
        KERNEL_DTYPES, MIN_P, Parameter, Philox, TEMPERATURE, TOP_P, check_chain, check_rows, check_softmax,
        check_top_k, check_top_p_renorm_probs,
    },
    tensor::{RawTensor, TensorMut, TensorRef},
};
use parameters::{counts, floats};

/// Element types of matrices beside the wide ones.
const DTYPES: [DType; 2] = [DType::F16, DType::BF16];

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
    fn kernel(&self) -> &'static str {
        match self {
            Self::None => "sampling_from_probs",
            Self::TopK(_) => "top_k_sampling_from_probs",
            Self::TopP(_) => "top_p_sampling_from_probs",
            Self::MinP(_) => "min_p_sampling_from_probs",
            Self::TopKTopP(..) => "top_k_top_p_sampling_from_probs",
        }
    }

    /// What that function checks of probabilities and parameters.
    fn check_as_kernel(
        &self,
        check: &KernelCheck<'_>,
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
struct Limits {
    top_k: u32,
    top_p: f64,
    min_p: f64,
}

impl Limits {
    const NONE: Self = Self { top_k: u32::MAX, top_p: f64::INFINITY, min_p: 0.0 };

    /// The sum of the numbers that pass; the others become 0.
    fn apply(self, probs: &mut [f64]) -> f64 {
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
struct Rules {
    limits: Vec<Limits>,
    /// Whether the kernel looks them up by the row of the output.
    by_output: bool,
}

impl Rules {
    fn of(check: Check, filter: &Filter<'_>, source_rows: usize, output_rows: usize) -> Result<Self> {
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

/// Reads, changes and writes each row.
fn map_rows(
    check: Check,
    name: &'static str,
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    change: impl FnOnce(&Rows<'_>) -> Result<Box<dyn Fn(usize, &mut [f64])>>,
) -> Result<()> {
    let input = check.rows(name, input, &DTYPES, &[2])?;
    let mut out = check.rows_mut("out", out, &DTYPES, &[2])?;
    check.shape("out", &out.rows, input.shape())?;
    if input.width() == 0 {
        return check.fail(name, format!("its shape is {:?}; a row has at least 1 element", input.shape()));
    }
    let change = change(&input)?;
    let mut row = vec![0.0; input.width()];
    for at in 0..input.count() {
        input.read(at, &mut row);
        change(at, &mut row);
        out.write(at, &row);
    }
    Ok(())
}

fn softmax_row(row: &mut [f64], temperature: f64) {
    let factor = if temperature == 0.0 { 0.0 } else { 1.0 / temperature };
    row.iter_mut().for_each(|x| *x *= factor);
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    row.iter_mut().for_each(|x| *x = (*x - max).exp());
    let sum: f64 = row.iter().sum();
    row.iter_mut().for_each(|x| *x /= sum);
}

/// [`sampling::softmax`](crate::sampling::softmax) on the CPU.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit, or a parameter is out of its range. Nothing was
/// written.
pub fn softmax(out: &mut TensorMut<'_>, logits: &TensorRef<'_>, temperature: Parameter<'_>) -> Result<()> {
    let check = Check { op: "reference::softmax" };
    check.as_kernel(|check| check_softmax(check, &out.raw, &logits.raw, temperature))?;
    map_rows(check, "logits", out, logits, |rows| {
        let temperatures = floats(check, "temperature", TEMPERATURE, temperature, rows.count())?;
        Ok(Box::new(move |at, row| softmax_row(row, temperatures[at])))
    })
}

/// The distribution that is drawn from: what the filter leaves, divided by its
/// sum. With [`Filter::TopK`] and [`Filter::TopP`] this is
/// [`sampling::top_k_renorm_probs`](crate::sampling::top_k_renorm_probs) and
/// [`sampling::top_p_renorm_probs`](crate::sampling::top_p_renorm_probs) on the
/// CPU. A row of which nothing is left is 0.
///
/// # Errors
/// As [`softmax`].
pub fn filtered_probs(out: &mut TensorMut<'_>, probs: &TensorRef<'_>, filter: &Filter<'_>) -> Result<()> {
    let check = Check { op: "reference::filtered_probs" };
    match *filter {
        Filter::TopK(top_k) => strict::as_kernel("top_k_renorm_probs", |check| {
            check_top_k(check, "probs", &out.raw, &probs.raw, top_k)
        })?,
        Filter::TopP(top_p) => strict::as_kernel("top_p_renorm_probs", |check| {
            check_top_p_renorm_probs(check, &out.raw, &probs.raw, top_p)
        })?,
        // No kernel writes these.
        Filter::None | Filter::MinP(_) | Filter::TopKTopP(..) => {}
    }
    map_rows(check, "probs", out, probs, |rows| {
        let rules = Rules::of(check, filter, rows.count(), rows.count())?;
        Ok(Box::new(move |at, row| {
            let sum = rules.limits[at].apply(row);
            if sum > 0.0 {
                row.iter_mut().for_each(|x| *x /= sum);
            }
        }))
    })
}

/// [`sampling::top_k_mask_logits`](crate::sampling::top_k_mask_logits) on the
/// CPU, for logits without NaN.
///
/// # Errors
/// As [`softmax`].
pub fn top_k_mask_logits(
    out: &mut TensorMut<'_>,
    logits: &TensorRef<'_>,
    top_k: Parameter<'_, u32>,
) -> Result<()> {
    let check = Check { op: "reference::top_k_mask_logits" };
    check.as_kernel(|check| check_top_k(check, "logits", &out.raw, &logits.raw, top_k))?;
    map_rows(check, "logits", out, logits, |rows| {
        let top_k = counts(check, top_k, rows.count())?;
        Ok(Box::new(move |at, row| {
            let mut order = row.to_vec();
            order.sort_unstable_by(|a, b| b.total_cmp(a));
            let least = match top_k[at] as usize {
                0 => f64::INFINITY,
                k => order[k.min(order.len()) - 1],
            };
            row.iter_mut().filter(|x| **x < least).for_each(|x| *x = f64::NEG_INFINITY);
        }))
    })
}

/// [`sampling::argmax`](crate::sampling::argmax) on the CPU: the token of the
/// largest logit of each row, the first of those that are equal; `None`, for
/// which the GPU has −1, where a logit is NaN.
///
/// # Errors
/// As [`softmax`].
///
/// ```
/// use flashinfer_rs::{TensorRef, reference};
/// let logits = [0.5f32, 2.0, 2.0, 1.0, f32::NAN, 1.0];
/// let tokens = reference::argmax(&TensorRef::from_slice(&logits, &[2, 3])?)?;
/// assert_eq!(tokens, [Some(1), None]);
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
pub fn argmax(logits: &TensorRef<'_>) -> Result<Vec<Option<i32>>> {
    let check = Check { op: "reference::argmax" };
    check.as_kernel(|check| check_rows(check, "logits", &logits.raw, &KERNEL_DTYPES, 2))?;
    let rows = check.rows("logits", logits, &DTYPES, &[2])?;
    if rows.width() == 0 {
        let problem = format!("its shape is {:?}; a row has at least 1 element", rows.shape());
        return check.fail("logits", problem);
    }
    let of_row = |row: Vec<f64>| {
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let place = row.iter().position(|&logit| logit == largest)?;
        (!row.iter().any(|logit| logit.is_nan())).then_some(place as i32)
    };
    Ok((0..rows.count()).map(|row| of_row(rows.numbers(row))).collect())
}

/// [`sampling::sampling_from_logits`](crate::sampling::sampling_from_logits)
/// on the CPU: a token for each row, or for each of `indices`.
///
/// # Errors
/// As [`softmax`]; also when `indices` may be beyond the rows.
pub fn sampling_from_logits(
    logits: &TensorRef<'_>,
    indices: Option<&BoundedIndices>,
    random: Philox,
) -> Result<Vec<Option<i32>>> {
    let check = Check { op: "reference::sampling_from_logits" };
    check.as_kernel(|check| check_rows(check, "logits", &logits.raw, &[DType::F32], 2))?;
    draw_rows(check, "logits", logits, &Filter::None, indices, random, |row| softmax_row(row, 1.0))
}

/// The functions of [`sampling`](crate::sampling) that draw from probabilities,
/// on the CPU: a token for each row, or for each of `indices`; `None` where
/// nothing passes the filter.
///
/// A tensor of parameters has a number for each row of `probs`, but for
/// [`Filter::TopK`] and [`Filter::MinP`] for each token, as the kernels' have.
///
/// # Errors
/// As [`softmax`]; also when `indices` may be beyond the rows.
pub fn sampling_from_probs(
    probs: &TensorRef<'_>,
    filter: &Filter<'_>,
    indices: Option<&BoundedIndices>,
    random: Philox,
) -> Result<Vec<Option<i32>>> {
    let check = Check { op: "reference::sampling_from_probs" };
    let rows_of_output = indices.map(|indices| indices.values().len() as i64);
    strict::as_kernel(filter.kernel(), |check| filter.check_as_kernel(check, &probs.raw, rows_of_output))?;
    draw_rows(check, "probs", probs, filter, indices, random, |_| ())
}

fn draw_rows(
    check: Check,
    name: &'static str,
    source: &TensorRef<'_>,
    filter: &Filter<'_>,
    indices: Option<&BoundedIndices>,
    random: Philox,
    to_probs: impl Fn(&mut [f64]),
) -> Result<Vec<Option<i32>>> {
    let rows = check.rows(name, source, &DTYPES, &[2])?;
    if let Some(indices) = indices.filter(|indices| indices.bound() > rows.count()) {
        let problem = format!("they are below {}; there are {} rows", indices.bound(), rows.count());
        return check.fail("indices", problem);
    }
    let count = indices.map_or(rows.count(), |indices| indices.values().len());
    let rules = Rules::of(check, filter, rows.count(), count)?;
    let mut row = vec![0.0; rows.width()];
    // What was read and filtered last, which many tokens may be drawn from.
    let mut last = None;
    let mut sum = 0.0;
    let draws = (0..count).map(|at| {
        let from = indices.map_or(at, |indices| indices.values()[at] as usize);
        let limits = rules.limits[if rules.by_output { at } else { from }];
        if last != Some((from, limits)) {
            rows.read(from, &mut row);
            to_probs(&mut row);
            sum = limits.apply(&mut row);
            last = Some((from, limits));
        }
        // Without a filter, kernels take a row for a distribution.
        let scale = if limits == Limits::NONE { 1.0 } else { sum };
        pick(&row, Sequence::new(random, at as u64).uniform() * scale)
    });
    Ok(draws.collect())
}

/// The first token up to which the sum exceeds a number; the last token if none.
fn pick(row: &[f64], number: f64) -> Option<i32> {
    let (mut sum, mut last) = (0.0, None);
    for (token, &x) in row.iter().enumerate().filter(|(_, x)| **x > 0.0) {
        sum += x;
        last = Some(token as i32);
        if sum > number {
            break;
        }
    }
    last
}

/// What [`chain_speculative_sampling`] draws, as
/// [`sampling::ChainSamples`](crate::sampling::ChainSamples) has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainDraws {
    /// `drafts + 1` for each request.
    pub output_token_ids: Vec<i32>,
    /// One for each request.
    pub output_accepted_token_num: Vec<i32>,
    /// One for each request.
    pub output_emitted_draft_token_num: Vec<i32>,
}

/// [`sampling::chain_speculative_sampling`](crate::sampling::chain_speculative_sampling)
/// on the CPU: `draft_probs` is `[batch, drafts, vocab]`, `target_probs`
/// `[batch, drafts + 1, vocab]`, and `draft_token_ids` holds `batch * drafts`
/// numbers below `vocab`.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit.
pub fn chain_speculative_sampling(
    draft_probs: &TensorRef<'_>,
    draft_token_ids: &BoundedIndices,
    target_probs: &TensorRef<'_>,
    random: Philox,
) -> Result<ChainDraws> {
    let check = Check { op: "reference::chain_speculative_sampling" };
    check.as_kernel(|check| check_chain(check, &draft_probs.raw, &target_probs.raw))?;
    let draft = check.rows("draft_probs", draft_probs, &DTYPES, &[3])?;
    let target = check.rows("target_probs", target_probs, &DTYPES, &[3])?;
    let (batch, drafts, vocab) = (draft.shape()[0], draft.shape()[1], draft.shape()[2]);
    check.shape("target_probs", &target, &[batch, drafts + 1, vocab])?;
    let (batch, drafts, vocab) = (batch as usize, drafts as usize, vocab as usize);
    let ids = draft_token_ids.values();
    if draft_token_ids.bound() > vocab || ids.len() != batch * drafts {
        let problem = format!(
            "{} numbers below {}; expected {} below {vocab}",
            ids.len(),
            draft_token_ids.bound(),
            batch * drafts
        );
        return check.fail("draft_token_ids", problem);
    }
    let mut draws = ChainDraws {
        output_token_ids: vec![-1; batch * (drafts + 1)],
        output_accepted_token_num: vec![0; batch],
        output_emitted_draft_token_num: vec![0; batch],
    };
    let (mut p, mut q) = (vec![0.0; vocab], vec![0.0; vocab]);
    for request in 0..batch {
        let mut numbers = Sequence::new(random, request as u64);
        let mut accepts = |place: usize, p: &mut [f64], q: &mut [f64]| {
            draft.read(request * drafts + place, p);
            target.read(request * (drafts + 1) + place, q);
            let id = ids[request * drafts + place] as usize;
            numbers.uniform() * p[id] < q[id]
        };
        let output = &mut draws.output_token_ids[request * (drafts + 1)..][..drafts + 1];
        let mut emitted = 0;
        while emitted < drafts && accepts(emitted, &mut p, &mut q) {
            output[emitted] = ids[request * drafts + emitted];
            emitted += 1;
        }
        let more = (emitted..drafts).filter(|&place| accepts(place, &mut p, &mut q)).count();
        target.read(request * (drafts + 1) + emitted, &mut q);
        if emitted < drafts {
            draft.read(request * drafts + emitted, &mut p);
            q.iter_mut().zip(&p).for_each(|(q, p)| *q = (*q - p).max(0.0));
        }
        output[emitted] = pick(&q, numbers.uniform() * q.iter().sum::<f64>()).unwrap_or(-1);
        draws.output_accepted_token_num[request] = (emitted + more) as i32;
        draws.output_emitted_draft_token_num[request] = emitted as i32;
    }
    Ok(draws)
}

/// The random numbers of one row: Philox 4×32 with 10 rounds, as cuRAND counts
/// them.
struct Sequence {
    seed: u64,
    row: u64,
    /// The number that comes next.
    next: u64,
}

impl Sequence {
    fn new(random: Philox, row: u64) -> Self {
        Self { seed: random.seed, row, next: random.offset }
    }

    /// A number in `(0, 1]`.
    fn uniform(&mut self) -> f64 {
        let block = philox(self.seed, [self.next / 4, self.row]);
        let bits = block[(self.next % 4) as usize];
        self.next = self.next.wrapping_add(1);
        let step = 2f32.powi(-32);
        f64::from(bits as f32 * step + step / 2.0)
    }
}

/// Four random numbers for a key and a counter.
fn philox(key: u64, counter: [u64; 2]) -> [u32; 4] {
    const FACTORS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
    const STEPS: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
    let halves = |wide: u64| [wide as u32, (wide >> 32) as u32];
    let product = |a: u32, b: u32| halves(u64::from(a) * u64::from(b));
    let [[mut a, mut b], [mut c, mut d]] = counter.map(halves);
    let mut key = halves(key);
    for _ in 0..10 {
        let ([low_a, high_a], [low_c, high_c]) = (product(FACTORS[0], a), product(FACTORS[1], c));
        (a, b, c, d) = (high_c ^ b ^ key[0], low_c, high_a ^ d ^ key[1], low_a);
        key = [key[0].wrapping_add(STEPS[0]), key[1].wrapping_add(STEPS[1])];
    }
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::reference::testing::{refused, view, view_mut};

    /// The known answers that the authors of Philox published.
    #[test]
    fn philox_is_philox() {
        assert_eq!(philox(0, [0, 0]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox(u64::MAX, [u64::MAX, u64::MAX]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        let mut numbers = Sequence::new(Philox::new(0, 0), 0);
        assert_eq!(numbers.uniform(), f64::from(0x6627_e8d5u32 as f32 / 2f32.powi(32) + 2f32.powi(-33)));
        let mut later = Sequence::new(Philox::new(0, 5), 0);
        for _ in 0..4 {
            numbers.uniform();
        }
        assert_eq!(numbers.uniform(), later.uniform());
    }

    fn filtered(probs: &[f64], filter: Filter<'_>) -> Vec<f64> {
        let mut out = vec![f64::NAN; probs.len()];
        let shape = [1, probs.len()];
        filtered_probs(&mut view_mut(&mut out, &shape), &view(probs, &shape), &filter).unwrap();
        out
    }

    #[test]
    fn filters_by_hand() {
        let probs = [0.125, 0.5, 0.125, 0.25];
        assert_eq!(filtered(&probs, Filter::None), probs);
        assert_eq!(filtered(&probs, Filter::TopK(1.into())), [0.0, 1.0, 0.0, 0.0]);
        let two = [0.0, 2.0 / 3.0, 0.0, 1.0 / 3.0];
        assert_eq!(filtered(&probs, Filter::TopK(2.into())), two);
        // Ties pass together.
        assert_eq!(filtered(&probs, Filter::TopK(3.into())), probs);
        assert_eq!(filtered(&probs, Filter::TopK(9.into())), probs);
        assert_eq!(filtered(&probs, Filter::TopP(0.5.into())), [0.0, 1.0, 0.0, 0.0]);
        assert_eq!(filtered(&probs, Filter::TopP(0.51.into())), two);
        assert_eq!(filtered(&probs, Filter::TopP(0.75.into())), two);
        assert_eq!(filtered(&probs, Filter::TopP(0.8.into())), probs);
        assert_eq!(filtered(&probs, Filter::TopP(1.0.into())), probs);
        assert_eq!(filtered(&probs, Filter::MinP(0.5.into())), two);
        assert_eq!(filtered(&probs, Filter::MinP(0.0.into())), probs);
        assert_eq!(filtered(&probs, Filter::TopKTopP(3.into(), 0.6.into())), two);
        assert_eq!(filtered(&probs, Filter::TopKTopP(1.into(), 0.9.into())), [0.0, 1.0, 0.0, 0.0]);
        // NaN is no probability.
        assert_eq!(filtered(&[f64::NAN, 0.5, 0.5], Filter::TopK(1.into())), [0.0, 0.5, 0.5]);
        assert_eq!(filtered(&[0.0, f64::NAN], Filter::TopP(0.5.into())), [0.0, 0.0]);
    }

    #[test]
    fn parameters_of_each_row() {
        let probs = [0.125, 0.5, 0.125, 0.25].repeat(3);
        let mut out = [f64::NAN; 12];
        let (top_k, top_p) = ([1i32, 0, -1], [0.5f32, 0.7, 2.0]);
        let filter = Filter::TopK(Parameter::PerRow(view(&top_k, &[3])));
        filtered_probs(&mut view_mut(&mut out, &[3, 4]), &view(&probs, &[3, 4]), &filter).unwrap();
        assert_eq!(out, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.125, 0.5, 0.125, 0.25]);
        let filter = Filter::TopP(Parameter::PerRow(view(&top_p, &[3])));
        filtered_probs(&mut view_mut(&mut out, &[3, 4]), &view(&probs, &[3, 4]), &filter).unwrap();
        assert_eq!(out[..4], [0.0, 1.0, 0.0, 0.0]);
        assert_eq!(out[8..], probs[..4]);
        // By the row of the output: the same row with two numbers.
        let indices = BoundedIndices::new(3, vec![2, 2]).unwrap();
        let filter = Filter::TopK(Parameter::PerRow(view(&[1i64, 0], &[2])));
        let draws =
            sampling_from_probs(&view(&probs, &[3, 4]), &filter, Some(&indices), Philox::default()).unwrap();
        assert_eq!(draws, [Some(1), None]);
    }

    #[test]
    fn masks_and_softmax_by_hand() {
        let logits = [1.0, -3.0, 1.0, 2.0];
        let mut out = [f64::NAN; 4];
        let mut mask = |k: u32| {
            top_k_mask_logits(&mut view_mut(&mut out, &[1, 4]), &view(&logits, &[1, 4]), k.into()).unwrap();
            out
        };
        let hidden = f64::NEG_INFINITY;
        assert_eq!(mask(1), [hidden, hidden, hidden, 2.0]);
        assert_eq!(mask(2), [1.0, hidden, 1.0, 2.0]);
        assert_eq!(mask(4), logits);
        assert_eq!(mask(u32::MAX), logits);
        let logits = [0.0, 2f64.ln(), hidden];
        let mut soft = [f64::NAN; 3];
        softmax(&mut view_mut(&mut soft, &[1, 3]), &view(&logits, &[1, 3]), 1.0.into()).unwrap();
        assert!((soft[0] - 1.0 / 3.0).abs() < 1e-15 && soft[2] == 0.0, "{soft:?}");
        softmax(&mut view_mut(&mut soft, &[1, 3]), &view(&logits, &[1, 3]), 0.5.into()).unwrap();
        assert!((soft[0] - 0.2).abs() < 1e-15 && (soft[1] - 0.8).abs() < 1e-15, "{soft:?}");
    }

    /// What the kernels do with rows and parameters that mean nothing.
    #[test]
    fn senseless_numbers_are_no_probabilities() {
        const INF: f64 = f64::INFINITY;
        assert_eq!(filtered(&[f64::NAN, -3.0, 0.5, 0.25], Filter::TopP(0.5.into())), [0.0, 0.0, 1.0, 0.0]);
        let infinite = [0.5, INF, 0.25, -INF];
        for filter in [Filter::TopP(0.5.into()), Filter::TopP(1.0.into())] {
            let got = filtered(&infinite, filter);
            assert!(got[1].is_nan() && [got[0], got[2], got[3]] == [0.0; 3], "{got:?}");
        }
        for nothing in [0.0f32, -1.0, f32::NAN, f32::NEG_INFINITY] {
            let nothing = [nothing];
            let top_p = Filter::TopP(Parameter::PerRow(view(&nothing, &[1])));
            assert_eq!(filtered(&infinite, top_p), [0.0; 4], "{nothing:?}");
        }
        for everything in [1.0f32, 2.0, f32::INFINITY] {
            let everything = [everything];
            let top_p = Filter::TopP(Parameter::PerRow(view(&everything, &[1])));
            assert_eq!(filtered(&[0.25, 0.25, 0.5, 0.0], top_p), [0.25, 0.25, 0.5, 0.0]);
        }
        assert_eq!(filtered(&[0.25], Filter::MinP(Parameter::PerRow(view(&[f32::NAN], &[1])))), [0.0]);
    }

    /// Among neighbouring numbers, upstream's search for the threshold does not end.
    #[test]
    fn neighbouring_numbers_have_a_threshold() {
        let row = [0x3eae_147b, 0x3eae_147a, 0x3ea3_d70a].map(|bits| f64::from(f32::from_bits(bits)));
        let got = filtered(&row, Filter::TopP(0.6.into()));
        assert!((got[0] - 0.5).abs() < 1e-6 && (got[1] - 0.5).abs() < 1e-6 && got[2] == 0.0, "{got:?}");
    }

    #[test]
    fn the_first_of_the_largest() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        let rows = [
            ([1.0, 3.0, 3.0], Some(1)),
            ([0.0; 3], Some(0)),
            ([-1.0, -0.0, 0.0], Some(1)),
            ([9.999999e-7, 1e-6, 0.0], Some(1)),
            ([-inf; 3], Some(0)),
            ([1.0, inf, inf], Some(1)),
            ([nan, 1.0, 2.0], None),
            ([inf, 1.0, -nan], None),
        ];
        let (logits, want): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        let logits = logits.concat();
        assert_eq!(argmax(&view(&logits, &[want.len(), 3])).unwrap(), want);
        refused(argmax(&view(&logits[..0], &[2, 0])).map(drop), "logits");
        refused(argmax(&view(&logits, &[24])).map(drop), "logits");
    }

    /// `top_k` 1 keeps all tokens that are the likeliest, and draws any of them.
    #[test]
    fn ties_are_all_likeliest() {
        let row = [0.4f32, 0.4, 0.2];
        let all = BoundedIndices::new(1, vec![0; 100]).unwrap();
        let tokens =
            sampling_from_probs(&view(&row, &[1, 3]), &Filter::TopK(1.into()), Some(&all), Philox::new(7, 0))
                .unwrap();
        for token in 0..3 {
            assert_eq!(tokens.contains(&Some(token)), token < 2, "{token}");
        }
    }

    #[test]
    fn what_is_certain_is_drawn() {
        let mut probs = [0.0f32; 5 * 7];
        let hot = [3, 0, 6, 6, 2];
        hot.iter().enumerate().for_each(|(row, &token)| probs[row * 7 + token as usize] = 1.0);
        let (probs, random) = (view(&probs, &[5, 7]), Philox::new(3, 4));
        let want: Vec<_> = hot.iter().map(|&token| Some(token)).collect();
        for filter in [
            Filter::None,
            Filter::TopK(1.into()),
            Filter::TopP(0.1.into()),
            Filter::MinP(1.0.into()),
            Filter::TopKTopP(3.into(), 1.0.into()),
        ] {
            assert_eq!(sampling_from_probs(&probs, &filter, None, random).unwrap(), want);
        }
        let zeros = [0.0f32; 7];
        assert_eq!(sampling_from_probs(&view(&zeros, &[1, 7]), &Filter::None, None, random).unwrap(), [None]);
    }

    #[test]
    fn draws_follow_probabilities() {
        let probs = [0.125f32, 0.5, 0.0, 0.125, 0.25];
        let indices = BoundedIndices::new(1, vec![0; 1 << 14]).unwrap();
        let count = |filter| {
            let mut counts = [0.0; 5];
            for token in
                sampling_from_probs(&view(&probs, &[1, 5]), &filter, Some(&indices), Philox::new(9, 8))
                    .unwrap()
            {
                counts[token.unwrap() as usize] += 1.0 / f64::from(1 << 14);
            }
            counts
        };
        for filter in [Filter::None, Filter::TopP(0.7.into()), Filter::MinP(0.25.into())] {
            let want = filtered(&probs.map(f64::from), filter);
            let got = count(filter);
            assert!(got.iter().zip(&want).all(|(got, want)| (got - want).abs() < 0.02), "{got:?} {want:?}");
        }
    }

    #[test]
    fn chains_by_hand() {
        // Upstream's own example: the first draft is accepted, as the target has
        // as much, the second is refused, as the target has nothing.
        let draft = [0.0f32, 0.2, 0.6, 0.2, 0.0, 1.0, 0.0, 0.0];
        let target = [0.0f32, 0.1, 0.6, 0.3, 1.0, 0.0, 0.0, 0.0, 0.7, 0.1, 0.1, 0.1];
        let ids = BoundedIndices::new(4, vec![2, 1]).unwrap();
        for seed in 0..20 {
            let draws = chain_speculative_sampling(
                &view(&draft, &[1, 2, 4]),
                &ids,
                &view(&target, &[1, 3, 4]),
                Philox::new(seed, 0),
            )
            .unwrap();
            // `u` may be 1, which does not accept; these seeds have none.
            assert_eq!(draws.output_token_ids, [2, 0, -1]);
            assert_eq!(
                (draws.output_accepted_token_num, draws.output_emitted_draft_token_num),
                (vec![1], vec![1])
            );
        }
    }

    /// Whatever the draft, the first token is distributed as the target's.
    #[test]
    fn chains_are_distributed_as_the_target() {
        let (batch, vocab) = (1 << 14, 3);
        let (draft, target) = ([0.5f32, 0.25, 0.25], [0.25f32, 0.5, 0.25, 0.125, 0.125, 0.75]);
        let draws_of_draft = sampling_from_probs(
            &view(&draft, &[1, vocab]),
            &Filter::None,
            Some(&BoundedIndices::new(1, vec![0; batch]).unwrap()),
            Philox::new(1, 0),
        )
        .unwrap();
        let ids = BoundedIndices::new(vocab, draws_of_draft.into_iter().flatten().collect()).unwrap();
        let draws = chain_speculative_sampling(
            &view(&draft.repeat(batch), &[batch, 1, vocab]),
            &ids,
            &view(&target.repeat(batch), &[batch, 2, vocab]),
            Philox::new(2, 0),
        )
        .unwrap();
        let part = |place: usize, token: i32| {
            let of = |pair: &&[i32]| pair[place] >= 0;
            let pairs = || draws.output_token_ids.chunks(2).filter(of);
            pairs().filter(|pair| pair[place] == token).count() as f64 / pairs().count() as f64
        };
        for (place, want) in target.chunks(vocab).enumerate() {
            for (token, &want) in want.iter().enumerate() {
                let got = part(place, token as i32);
                assert!((got - f64::from(want)).abs() < 0.02, "token {token} at {place}: {got}");
            }
        }
        // A draft is accepted with the probability that both have in common.
        let emitted = draws.output_emitted_draft_token_num.iter().sum::<i32>();
        assert!((f64::from(emitted) / batch as f64 - 0.75).abs() < 0.02);
    }

    #[test]
    fn wrong_input_is_refused() {
        let probs = [0.25f32; 4];
        let mut out = [7.0f32; 4];
        let one = view(&probs, &[1, 4]);
        let mut run = |filter| filtered_probs(&mut view_mut(&mut out, &[1, 4]), &one, &filter);
        refused(run(Filter::TopK(0.into())), "top_k");
        for top_p in [0.0, -1.0, 1.5, f64::NAN, 1e-60] {
            refused(run(Filter::TopP(top_p.into())), "top_p");
        }
        refused(run(Filter::MinP(1.5.into())), "min_p");
        refused(run(Filter::TopP(Parameter::PerRow(view(&probs, &[4])))), "top_p");
        refused(run(Filter::TopK(Parameter::PerRow(view(&[1i32; 4], &[4])))), "top_k");
        refused(run(Filter::TopK(Parameter::PerRow(view(&probs, &[4])))), "top_k");
        for temperature in [0.0, -1.0, f64::INFINITY, f64::NAN] {
            refused(softmax(&mut view_mut(&mut out, &[1, 4]), &one, temperature.into()), "temperature");
        }
        refused(softmax(&mut view_mut(&mut out, &[2, 2]), &one, 1.0.into()), "out");
        let indices = BoundedIndices::new(2, vec![0]).unwrap();
        let call = sampling_from_probs(&one, &Filter::None, Some(&indices), Philox::default());
        refused(call.map(drop), "indices");
        let ids = BoundedIndices::new(2, vec![0, 1]).unwrap();
        let cube = view(&probs, &[1, 1, 4]);
        refused(chain_speculative_sampling(&cube, &ids, &cube, Philox::default()).map(drop), "target_probs");
        let wide = [0.25f32; 8];
        let call = chain_speculative_sampling(&cube, &ids, &view(&wide, &[1, 2, 4]), Philox::default());
        refused(call.map(drop), "draft_token_ids");
        assert_eq!(out, [7.0; 4]);
    }

    proptest! {
        /// What passes is what has few enough likelier ones, by counting.
        #[test]
        fn filters_are_their_definition(
            raw in prop::collection::vec(0u8..20, 1..40),
            top_k in 1u32..45,
            top_p in 0.01f64..1.0,
        ) {
            let sum: f64 = raw.iter().map(|&x| f64::from(x)).sum();
            prop_assume!(sum > 0.0);
            let probs: Vec<f64> = raw.iter().map(|&x| f64::from(x) / sum).collect();
            let got = filtered(&probs, Filter::TopKTopP(top_k.into(), top_p.into()));
            let top_p = f64::from(top_p as f32);
            for (token, &x) in probs.iter().enumerate() {
                let likelier = probs.iter().filter(|&&other| other > x);
                let (count, mass) = (likelier.clone().count() as u32, likelier.sum::<f64>());
                // Where a sum meets the limit, its order decides.
                if (mass - top_p).abs() > 1e-9 {
                    prop_assert_eq!(got[token] > 0.0, x > 0.0 && count < top_k && mass < top_p);
                }
            }
            prop_assert!((got.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
    }
}
