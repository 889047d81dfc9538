//! What [`fused_qk_rmsnorm_rope`](super::fused_qk_rmsnorm_rope)(super::fused_qk_rmsnorm_rope) takes, and what its kernel assumes
//! of it.

use super::check_plain;
use crate::{
    dtype::DType,
    error::Result,
    ops::check::Check,
    tensor::{TensorMut, TensorRef},
};

/// A block has a warp of 32 threads for each head.
pub(super) const MAX_HEADS: i64 = 32;

/// Head dimensions that the kernel is compiled for.
pub(super) const HEAD_DIMS: [usize; 3] = [64, 128, 256];

/// Rotary embedding by position in a video: some channels of a head turn with
/// the frame, some with the height, some with the width.
///
/// Channel pair `i` of `n` channels turns by `position · base^(−2i/n)`. With a
/// `factor` other than 1 that is YaRN's: frequencies go over to `1/factor` of
/// that between pair `low` and pair `high` (from `low` down as they are, from
/// `high` up divided), and results are multiplied by `attention_factor`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Rope3d {
    /// Channels that turn with frame, height and width: even numbers, whose sum
    /// is the head dimension.
    pub channels: [usize; 3],
    /// The base of frequencies. Upstream's default is 10000.
    pub base: f32,
    /// YaRN's scaling factor; 1, the default, is off.
    pub factor: f32,
    /// The pair up to which YaRN keeps frequencies; 0 by default.
    pub low: f32,
    /// The pair from which YaRN divides frequencies; 0 by default.
    pub high: f32,
    /// YaRN's factor of results. 1 by default, and if `factor` is 1.
    pub attention_factor: f32,
}

impl Rope3d {
    /// Channels of frame, height and width, and upstream's defaults.
    pub fn new(channels: [usize; 3]) -> Self {
        Self { channels, base: 1e4, factor: 1.0, low: 0.0, high: 0.0, attention_factor: 1.0 }
    }

    /// The sum of channels.
    pub fn head_dim(&self) -> usize {
        self.channels.iter().fold(0, |sum, &channels| sum.saturating_add(channels))
    }

    /// What makes no sense anywhere.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        if self.channels.iter().any(|channels| channels % 2 != 0) || self.head_dim() == 0 {
            return Err(("rope.channels", format!("{:?}; expected even numbers, not all 0", self.channels)));
        }
        let positive = |number: f32| number.is_finite() && number > 0.0;
        if !positive(self.base) || !positive(self.factor) {
            let problem = format!("base {} and factor {}; both must be above 0", self.base, self.factor);
            return Err(("rope", problem));
        }
        if ![self.low, self.high, self.attention_factor].iter().all(|number| number.is_finite()) {
            return Err(("rope", format!("{self:?}; all numbers must be finite")));
        }
        if self.factor == 1.0 && self.attention_factor != 1.0 {
            return Err((
                "rope.attention_factor",
                format!("{} without YaRN (factor 1); it must be 1", self.attention_factor),
            ));
        }
        Ok(())
    }
}

/// Options of [`fused_qk_rmsnorm_rope`](super::fused_qk_rmsnorm_rope).
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct FusedQkOptions {
    /// Added to the mean of squares; 1e-6 by default.
    pub eps: f64,
    /// Which channels turn together: neighbours (`true`, the default), or those
    /// half a head apart, as in NeoX.
    pub interleave: bool,
    /// Whether queries and keys are normed (the default) or turned only.
    pub is_qk_norm: bool,
    /// Whether results are `e4m3` and not `bf16`; not by default.
    pub output_fp8: bool,
    /// Multiplies queries and keys if `output_fp8`; 1 by default.
    pub output_quant_scale: f64,
    /// Multiplies values if `output_fp8`; 1 by default.
    pub v_quant_scale: f64,
}

impl Default for FusedQkOptions {
    fn default() -> Self {
        Self {
            eps: 1e-6,
            interleave: true,
            is_qk_norm: true,
            output_fp8: false,
            output_quant_scale: 1.0,
            v_quant_scale: 1.0,
        }
    }
}

/// What [`fused_qk_rmsnorm_rope`](super::fused_qk_rmsnorm_rope) reads: `bf16`, contiguous.
#[derive(Clone, Copy, Debug)]
pub struct QkvInput<'a> {
    /// `[tokens, (q_heads + k_heads + v_heads) · head_dim]`, or
    /// `[batch, seq_len, ..]`: all query heads, then key heads, then value heads.
    pub qkv: TensorRef<'a>,
    /// `[q_heads · head_dim]`.
    pub q_weight: TensorRef<'a>,
    /// `[k_heads · head_dim]`.
    pub k_weight: TensorRef<'a>,
    /// Patches in a video: frames, height, width (upstream's `ppf`, `pph` and
    /// `ppw`). Their product is `seq_len`; tokens are in that order.
    pub patches: [usize; 3],
}

/// What [`fused_qk_rmsnorm_rope`](super::fused_qk_rmsnorm_rope) writes: contiguous, `bf16`, or `e4m3` with
/// `output_fp8`. The shapes say how many heads there are.
#[derive(Debug)]
pub struct QkvOutput<'a> {
    /// `[tokens, q_heads, head_dim]`, or `[batch, seq_len, q_heads, head_dim]`
    /// like the input.
    pub q: TensorMut<'a>,
    /// The same with `k_heads`.
    pub k: TensorMut<'a>,
    /// The same with `v_heads`.
    pub v: TensorMut<'a>,
}

/// Sizes of checked tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QkvShape {
    pub(crate) tokens: i64,
    /// Of queries, keys and values.
    pub(crate) heads: [i64; 3],
    pub(crate) head_dim: i64,
}

/// The sizes of tensors whose shapes fit together, else what does not.
pub(crate) fn qkv_shape(
    out: &QkvOutput<'_>,
    input: &QkvInput<'_>,
    rope: &Rope3d,
) -> Result<QkvShape, (&'static str, String)> {
    let qkv = input.qkv.shape();
    let Some((&width, rows)) = qkv.split_last().filter(|(_, rows)| matches!(rows.len(), 1 | 2)) else {
        return Err(("qkv", format!("its shape is {qkv:?}; expected [tokens, ..] or [batch, seq_len, ..]")));
    };
    let head_dim = rope.head_dim() as i64;
    let mut heads = [0; 3];
    for ((name, out), heads) in
        [("out.q", &out.q), ("out.k", &out.k), ("out.v", &out.v)].into_iter().zip(&mut heads)
    {
        match out.shape().split_last_chunk::<2>() {
            Some((out_rows, &[count, d])) if out_rows == rows && d == head_dim && count > 0 => *heads = count,
            _ => {
                return Err((
                    name,
                    format!(
                        "its shape is {:?}; expected {rows:?}, a number of heads and {head_dim}, the sum of \
                         rope.channels",
                        out.shape()
                    ),
                ));
            }
        }
    }
    let joined: i64 = heads.iter().sum();
    if joined.checked_mul(head_dim) != Some(width) {
        return Err((
            "qkv",
            format!("its rows have {width} elements; the outputs have {joined} heads of {head_dim} in all"),
        ));
    }
    for (name, weight, heads) in
        [("q_weight", &input.q_weight, heads[0]), ("k_weight", &input.k_weight, heads[1])]
    {
        if weight.shape() != [heads * head_dim] {
            return Err((
                name,
                format!("its shape is {:?}; expected [{}]", weight.shape(), heads * head_dim),
            ));
        }
    }
    let patches = input.patches;
    let seq_len = patches.iter().try_fold(1i64, |product, &patches| {
        product.checked_mul(i64::try_from(patches).ok()?).filter(|&product| product <= i64::from(i32::MAX))
    });
    let Some(seq_len) = seq_len.filter(|&seq_len| seq_len > 0) else {
        return Err(("patches", format!("{patches:?}; expected a product above 0 and below 2^31")));
    };
    let tokens: i64 = rows.iter().product();
    if tokens % seq_len != 0 || rows.get(1).is_some_and(|&rows| rows != seq_len) {
        return Err(("patches", format!("{patches:?} are {seq_len} tokens; qkv has {rows:?}")));
    }
    Ok(QkvShape { tokens, heads, head_dim })
}

/// All that the kernel assumes.
pub(crate) fn check_fused_qk_rmsnorm_rope(
    check: &Check<'_>,
    out: &QkvOutput<'_>,
    input: &QkvInput<'_>,
    rope: &Rope3d,
    options: &FusedQkOptions,
) -> Result<QkvShape> {
    let shape = qkv_shape(out, input, rope).or_else(|(argument, problem)| check.fail(argument, problem))?;
    let result = if options.output_fp8 { DType::E4M3 } else { DType::BF16 };
    for (name, tensor, dtype) in [
        ("qkv", &input.qkv.raw, DType::BF16),
        ("q_weight", &input.q_weight.raw, DType::BF16),
        ("k_weight", &input.k_weight.raw, DType::BF16),
        ("out.q", &out.q.raw, result),
        ("out.k", &out.k.raw, result),
        ("out.v", &out.v.raw, result),
    ] {
        check_plain(check, name, tensor, dtype, tensor.shape(), 16)?;
    }
    for (name, heads) in ["out.q", "out.k", "out.v"].into_iter().zip(shape.heads) {
        if heads > MAX_HEADS {
            return check.fail(name, format!("{heads} heads; a block has threads for {MAX_HEADS}"));
        }
    }
    if shape.tokens > i64::from(i32::MAX) {
        return check.fail("qkv", format!("{} tokens; a launch has fewer than 2^31", shape.tokens));
    }
    Ok(shape)
}
