//! What the operations that draw have in common: parameters, random numbers,
//! rows to draw from, and where tokens go.

use crate::{
    dtype::DType,
    error::Result,
    indices::BoundedTable,
    ops::check::Check,
    tensor::{RawTensor, TensorMut, TensorRef},
};

/// A parameter of all requests, or of each.
///
/// `T` is `f64` for probabilities and temperatures, whose tensors are `f32`,
/// and `u32` for `top_k`, whose tensors are integers: `i32`, but for the
/// functions that draw of the dtype of their output.
#[derive(Clone, Copy, Debug)]
pub enum Parameter<'a, T = f64> {
    /// One number.
    Value(T),
    /// A contiguous tensor of a number for each row.
    PerRow(TensorRef<'a>),
}

impl<T> From<T> for Parameter<'_, T> {
    fn from(value: T) -> Self {
        Self::Value(value)
    }
}

/// A parameter as kernels take it: a tensor, or else a number.
pub(crate) type KernelParameter<T> = (Option<RawTensor>, T);

impl<T> Parameter<'_, T> {
    /// Checks the parameter. The kernel reads `len` numbers of a tensor; the
    /// module wants to see as many as there are `rows`, and does not look at
    /// more than the address afterwards.
    pub(crate) fn check(
        self,
        check: &Check<'_>,
        argument: &'static str,
        dtype: DType,
        [len, rows]: [i64; 2],
    ) -> Result<KernelParameter<Option<T>>> {
        match self {
            Self::Value(value) => Ok((None, Some(value))),
            Self::PerRow(tensor) => {
                check.plain(argument, &tensor.raw, &[dtype], &[len], tensor.raw.dtype.size())?;
                let raw = &tensor.raw;
                let mut own = RawTensor::new(raw.data, raw.device, dtype, &[rows as usize], None)?;
                own.owner = raw.owner;
                Ok((Some(own), None))
            }
        }
    }
}

impl Parameter<'_, f64> {
    /// A number must satisfy `allowed` as the `f32` that the kernel makes of it.
    pub(crate) fn float(
        self,
        check: &Check<'_>,
        argument: &'static str,
        (allowed, rule): Rule,
        lens: [i64; 2],
    ) -> Result<KernelParameter<f64>> {
        let (tensor, value) = self.check(check, argument, DType::F32, lens)?;
        match value {
            Some(value) if !allowed(value as f32) => {
                check.fail(argument, format!("{value}; it must be {rule}"))
            }
            value => Ok((tensor, value.unwrap_or_default())),
        }
    }
}

/// Which numbers a parameter may be, also in words.
pub(crate) type Rule = (fn(f32) -> bool, &'static str);

/// Probabilities of which something is left.
pub(crate) const TOP_P: Rule = (|p| p > 0.0 && p <= 1.0, "above 0, and at most 1, which keeps everything");
/// Fractions of the largest probability.
pub(crate) const MIN_P: Rule =
    (|p| (0.0..=1.0).contains(&p), "at least 0, which keeps everything, and at most 1");
/// Temperatures with a reciprocal.
pub(crate) const TEMPERATURE: Rule = (
    |t| t.is_normal() && t > 0.0,
    "a finite number above 0 (the kernel takes 0 for infinity; to take the likeliest token, use argmax)",
);
/// Temperatures of which 0 takes the likeliest token.
pub(crate) const TEMPERATURE_OR_0: Rule =
    (|t| t.is_finite() && t >= 0.0, "a finite number of at least 0, which takes the likeliest token");

impl Parameter<'_, u32> {
    pub(crate) fn count(
        self,
        check: &Check<'_>,
        argument: &'static str,
        dtype: DType,
        lens: [i64; 2],
        vocab: i64,
    ) -> Result<KernelParameter<i64>> {
        let (tensor, value) = self.check(check, argument, dtype, lens)?;
        match value {
            Some(0) => check.fail(argument, "0; it must be at least 1".into()),
            value => Ok((tensor, value.map_or(0, |value| i64::from(value).min(vocab)))),
        }
    }
}

/// A place in Philox's random numbers.
///
/// Each row of a call has a sequence of its own, in which `offset` numbers are
/// skipped. Rows are numbered by their place in the batch, so a request's numbers
/// change with it; [`sample`](super::sample) takes a number for each row instead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Philox {
    /// Which numbers.
    pub seed: u64,
    /// How many are behind.
    pub offset: u64,
}

impl Philox {
    /// A place.
    pub const fn new(seed: u64, offset: u64) -> Self {
        Self { seed, offset }
    }

    /// This place, for one call that makes these draws; and moves on behind it.
    ///
    /// ```
    /// # use flashinfer_rs::sampling::{Draws, Philox};
    /// let mut random = Philox::new(7, 0);
    /// assert_eq!(random.take(Draws::Filtered { rows: 3 }), Philox::new(7, 0));
    /// assert_eq!(random, Philox::new(7, 96));
    /// ```
    pub const fn take(&mut self, draws: Draws) -> Self {
        let here = *self;
        self.offset = here.offset.wrapping_add(draws.advance());
        here
    }
}

/// The draws of one call, by which an offset moves on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Draws {
    /// [`sampling_from_logits`](super::sampling_from_logits).
    Logits {
        /// Rows of the output.
        rows: usize,
        /// Tokens of the vocabulary.
        vocab: usize,
    },
    /// [`sampling_from_probs`](super::sampling_from_probs) and
    /// [`min_p_sampling_from_probs`](super::min_p_sampling_from_probs): one for
    /// each row.
    Probs {
        /// Rows of the output.
        rows: usize,
    },
    /// The functions with `top_k`, `top_p` or both, which may draw repeatedly.
    Filtered {
        /// Rows of the output.
        rows: usize,
    },
    /// [`chain_speculative_sampling`](super::chain_speculative_sampling).
    Chain {
        /// Requests.
        rows: usize,
        /// Drafted tokens of each.
        drafts: usize,
    },
}

impl Draws {
    /// By how much the offset moves on, a multiple of 4: as upstream's Python
    /// does it, but for chains, which read one number more than it counts.
    pub const fn advance(self) -> u64 {
        let numbers = match self {
            Self::Logits { rows, vocab } => (rows as u64).wrapping_mul(vocab as u64),
            Self::Probs { rows } => rows as u64,
            Self::Filtered { rows } => (rows as u64).wrapping_mul(32),
            Self::Chain { rows, drafts } => (rows as u64).wrapping_mul(drafts as u64 + 2),
        };
        numbers.wrapping_add(3) & !3
    }
}

/// Where a call's random numbers come from.
#[derive(Clone, Copy, Debug)]
pub enum Random<'a> {
    /// Numbers of the host. A captured CUDA graph repeats them.
    Philox(Philox),
    /// A contiguous device tensor `[seed, offset]`, of `i64` or `u64`, read when
    /// the kernel runs: write another offset before a captured graph is
    /// replayed.
    Device(TensorRef<'a>),
}

impl From<Philox> for Random<'_> {
    fn from(philox: Philox) -> Self {
        Self::Philox(philox)
    }
}

/// The last arguments of every function that draws.
pub(super) struct KernelRandom {
    pub(super) seed_arr: Option<RawTensor>,
    pub(super) seed: i64,
    pub(super) offset_arr: Option<RawTensor>,
    pub(super) offset: i64,
}

impl Random<'_> {
    pub(super) fn check(&self, check: &Check<'_>) -> Result<KernelRandom> {
        match self {
            // The module takes all 64 bits for a number without a sign.
            Self::Philox(Philox { seed, offset }) => Ok(KernelRandom {
                seed_arr: None,
                seed: seed.cast_signed(),
                offset_arr: None,
                offset: offset.cast_signed(),
            }),
            Self::Device(pair) => {
                check.plain("random", &pair.raw, &[DType::I64, DType::U64], &[2], 8)?;
                let (seed, offset) = (pair.narrow(0, 0, 1)?, pair.narrow(0, 1, 1)?);
                Ok(KernelRandom {
                    seed_arr: Some(seed.raw),
                    seed: 0,
                    offset_arr: Some(offset.raw),
                    offset: 0,
                })
            }
        }
    }
}

/// Device numbers below a bound, by which a kernel looks something up.
#[derive(Clone, Copy, Debug)]
pub struct Indices<'a> {
    source: ValueSource<'a>,
    bound: usize,
}

#[derive(Clone, Copy, Debug)]
enum ValueSource<'a> {
    Table(&'a BoundedTable),
    Tensor(TensorRef<'a>),
}

impl<'a> From<&'a BoundedTable> for Indices<'a> {
    fn from(table: &'a BoundedTable) -> Self {
        Self { source: ValueSource::Table(table), bound: table.host().bound() }
    }
}

impl<'a> Indices<'a> {
    /// Numbers that the device made, such as the tokens of a draft model.
    ///
    /// # Safety
    /// When work that uses them runs, all numbers must be in `0..bound`.
    pub unsafe fn from_device_unchecked(tensor: TensorRef<'a>, bound: usize) -> Self {
        Self { source: ValueSource::Tensor(tensor), bound }
    }

    /// Checks that there are as many as the shape says, and none that is not
    /// below `limit`. A table has one dimension, however many the shape has.
    pub(super) fn check(
        &self,
        check: &Check<'_>,
        argument: &'static str,
        dtype: DType,
        shape: &[i64],
        limit: i64,
    ) -> Result<RawTensor> {
        if self.bound as u64 > limit as u64 {
            return check.fail(
                argument,
                format!("they are below {}; for these tensors they must be below {limit}", self.bound),
            );
        }
        let raw = match &self.source {
            ValueSource::Tensor(tensor) => tensor.raw,
            ValueSource::Table(table) => {
                let flat = table.values(dtype == DType::I64)?;
                if flat.shape()[0] != shape.iter().product::<i64>() {
                    return check.fail(argument, format!("{} numbers; expected {shape:?}", flat.shape()[0]));
                }
                let mut sizes = [0; 2];
                for (size, &wanted) in sizes.iter_mut().zip(shape) {
                    *size = wanted as usize;
                }
                let mut raw = RawTensor::new(flat.data, flat.device, dtype, &sizes[..shape.len()], None)?;
                (raw.stream, raw.owner) = (flat.stream, flat.owner);
                raw
            }
        };
        check.plain(argument, &raw, &[dtype], shape, raw.dtype.size())?;
        Ok(raw)
    }
}

/// Where drawn tokens go.
#[derive(Debug)]
pub struct Samples<'a> {
    /// The tokens: `[rows]`, `i32` or `i64`, contiguous.
    pub output: TensorMut<'a>,
    /// 1 where a token could be drawn: `[rows]`, `u8` or bool, contiguous.
    pub valid: TensorMut<'a>,
}

impl<'a> Samples<'a> {
    /// Tokens and whether they are any. They are checked where they are used.
    pub fn new(output: TensorMut<'a>, valid: TensorMut<'a>) -> Self {
        Self { output, valid }
    }
}

/// Options of the functions that draw.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct SamplingOptions<'a> {
    /// Where random numbers come from. The default is seed 0 and offset 0.
    pub random: Random<'a>,
    /// Sums in an order that does not change from run to run. The default is
    /// true, as upstream's.
    pub deterministic: bool,
    /// The row of probabilities or logits for each row of the output; without,
    /// both have the same rows.
    pub indices: Option<Indices<'a>>,
}

impl Default for SamplingOptions<'_> {
    fn default() -> Self {
        Self { random: Random::Philox(Philox::default()), deterministic: true, indices: None }
    }
}

impl<'a> SamplingOptions<'a> {
    /// The default options with these random numbers.
    pub fn with_random(random: impl Into<Random<'a>>) -> Self {
        Self { random: random.into(), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_move_on_by_multiples_of_4() {
        let mut random = Philox::new(1, u64::MAX - 3);
        assert_eq!(random.take(Draws::Probs { rows: 5 }), Philox::new(1, u64::MAX - 3));
        assert_eq!(random, Philox::new(1, 4), "it wraps");
        assert_eq!(Draws::Probs { rows: 0 }.advance(), 0);
        assert_eq!(Draws::Logits { rows: 3, vocab: 50257 }.advance(), 150772);
        assert_eq!(Draws::Filtered { rows: 7 }.advance(), 224);
        // Three drafts: a number for each, one for each behind the first that
        // is refused and that one again, one for the replacement.
        assert_eq!(Draws::Chain { rows: 1, drafts: 3 }.advance(), 8);
    }
}
