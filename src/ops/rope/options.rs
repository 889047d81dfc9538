//! What is turned, and how.

use super::{frequencies::Llama31Scaling, positions::Positions};
use crate::{
    dtype::DType,
    error::Result,
    ops::check::Check,
    tensor::{RawTensor, TensorMut, TensorRef},
};

/// Queries and keys to turn: `[tokens, heads, head_dim]`, with the same tokens
/// and head dimension.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "views are inline, so that making one allocates nothing")]
pub enum RopeTensors<'a> {
    /// The results replace the input.
    InPlace {
        /// Queries.
        q: TensorMut<'a>,
        /// Keys.
        k: TensorMut<'a>,
    },
    /// The results go to tensors of their own.
    OutOfPlace {
        /// Queries.
        q: TensorRef<'a>,
        /// Keys.
        k: TensorRef<'a>,
        /// Turned queries, of the shape of `q`.
        q_rope: TensorMut<'a>,
        /// Turned keys, of the shape of `k`.
        k_rope: TensorMut<'a>,
    },
}

/// Options of operations that compute angles themselves.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct RopeOptions {
    /// Elements of a head that are turned, the first ones; all if `None`. A
    /// multiple of 16, with `interleave` of 8 (of 32 and 16 if `head_dim` is 512).
    pub rotary_dim: Option<usize>,
    /// Pairs are neighbours, not elements of two halves. Default `false`.
    pub interleave: bool,
    /// What positions are divided by. Default 1; for Llama 3.1 the factor for
    /// slow frequencies, 8.
    pub rope_scale: f64,
    /// The base of frequencies. Default 1e4, for Llama 3.1 5e5.
    pub rope_theta: f64,
}

impl Default for RopeOptions {
    fn default() -> Self {
        Self { rotary_dim: None, interleave: false, rope_scale: 1.0, rope_theta: 1e4 }
    }
}

impl RopeOptions {
    /// All is turned, with frequencies of another base.
    pub fn with_theta(rope_theta: f64) -> Self {
        Self { rope_theta, ..Self::default() }
    }
}

/// Options of Llama 3.1's embeddings, whose frequencies are those of
/// [`RopeScaling::Llama31`](super::RopeScaling::Llama31) with `rope_scale` as `factor`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Llama31RopeOptions {
    /// The options of all embeddings.
    pub rope: RopeOptions,
    /// Default 1. See [`Llama31Scaling`].
    pub low_freq_factor: f64,
    /// Default 4. See [`Llama31Scaling`].
    pub high_freq_factor: f64,
    /// Default 8192. See [`Llama31Scaling`].
    pub old_context_len: f64,
}

impl Default for Llama31RopeOptions {
    fn default() -> Self {
        let Llama31Scaling { factor, low_freq_factor, high_freq_factor, old_context_len } =
            Llama31Scaling::default();
        let rope = RopeOptions { rope_scale: factor, ..RopeOptions::with_theta(5e5) };
        Self { rope, low_freq_factor, high_freq_factor, old_context_len }
    }
}

impl Llama31RopeOptions {
    pub(crate) fn scaling(&self) -> Llama31Scaling {
        Llama31Scaling {
            factor: self.rope.rope_scale,
            low_freq_factor: self.low_freq_factor,
            high_freq_factor: self.high_freq_factor,
            old_context_len: self.old_context_len,
        }
    }
}

/// Which cosines and sines each token is turned by: rows of a table, by position.
#[derive(Clone, Copy, Debug)]
pub struct Rotation<'a, P = Positions<'a>> {
    /// Contiguous `f32` `[rows, rotary_dim]`: in each row the cosines, then the
    /// sines, such as [`CosSinCache::view`](super::CosSinCache::view).
    pub cos_sin_cache: TensorRef<'a>,
    /// The position of each token, all below the number of rows; with
    /// `interleave` below the last row, because kernels read up to 32 bytes
    /// beyond a row.
    pub pos_ids: P,
    /// Pairs are neighbours, not elements of two halves. Default `false`.
    pub interleave: bool,
}

impl<'a> Rotation<'a> {
    /// Of pairs in two halves, the first and the second half of `rotary_dim`: the
    /// NeoX style, which Hugging Face's llama has.
    pub fn new(cos_sin_cache: TensorRef<'a>, pos_ids: impl Into<Positions<'a>>) -> Self {
        Self { cos_sin_cache, pos_ids: pos_ids.into(), interleave: false }
    }

    /// Of pairs of neighbours: the GPT-J style, which Meta's llama, and the rows of
    /// llama in GGUF files, have.
    pub fn interleaved(cos_sin_cache: TensorRef<'a>, pos_ids: impl Into<Positions<'a>>) -> Self {
        Self { interleave: true, ..Self::new(cos_sin_cache, pos_ids) }
    }

    /// The positions of `tokens` tokens, each of which has its row in the table,
    /// which was checked.
    pub(super) fn positions(&self, check: &Check<'_>, tokens: i64) -> Result<RawTensor> {
        let pos_ids = self.pos_ids.checked(check, "pos_ids", &[DType::I32, DType::I64], tokens)?;
        let Some(positions) = self.pos_ids.num_positions() else {
            return check.fail(
                "pos_ids",
                "positions in a plain tensor may name rows that the cache has not; use a BoundedTable, or \
                 Positions::from_device_unchecked"
                    .into(),
            );
        };
        let limit = self.check_positions(check, positions)?;
        self.pos_ids.limit(limit);
        Ok(pos_ids)
    }
}

impl<P> Rotation<'_, P> {
    /// All that kernels assume of the table.
    pub(super) fn check_table(&self, check: &Check<'_>) -> Result<()> {
        let cache = &self.cos_sin_cache.raw;
        check.tensor("cos_sin_cache", cache, &[DType::F32], &[2])?;
        check.contiguous("cos_sin_cache", cache)?;
        check.aligned("cos_sin_cache", cache, 16)
    }

    /// Positions below a number have their rows. Returns what they may be below.
    pub(super) fn check_positions(&self, check: &Check<'_>, below: usize) -> Result<usize> {
        let cache = &self.cos_sin_cache.raw;
        let (rows, rotary_dim) = (cache.shape()[0], cache.shape()[1]);
        let usable = rows - i64::from(self.interleave);
        // A bound may be any number; see `BoundedIndices`.
        let positions = i64::try_from(below).unwrap_or(i64::MAX);
        if positions > usable.max(0) {
            return check.fail(
                "pos_ids",
                format!(
                    "positions are below {positions}, but cos_sin_cache has {rows} rows{}",
                    if self.interleave {
                        ", of which kernels cannot use the last with interleave"
                    } else {
                        ""
                    }
                ),
            );
        }
        // Kernels multiply a position by the row's length in 32 bits.
        if positions.saturating_mul(rotary_dim) > i64::from(u32::MAX) {
            return check.fail(
                "cos_sin_cache",
                format!("{positions} rows of {rotary_dim} elements are 2^32 or more"),
            );
        }
        Ok(usable.max(0).min(i64::from(u32::MAX) / rotary_dim.max(1)) as usize)
    }
}
