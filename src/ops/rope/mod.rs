//! Rotary position embeddings, in FlashInfer's module `rope`.
//!
//! The first `rotary_dim` elements of each head are turned in pairs, by angles
//! that grow with the token's position; the others are copied. Pairs are
//! elements `i` and `i + rotary_dim / 2` (GPT-NeoX, Llama in Hugging Face's
//! form), or with `interleave` elements `2i` and `2i + 1` (GPT-J, Meta's
//! Llama); `interleave` is the opposite of `is_neox` in upstream's Python.
//!
//! - [`apply_rope`], [`apply_rope_pos_ids`] and their Llama 3.1 forms compute
//!   angles on the device, in `f32` and with its fast functions. The error of an
//!   angle grows with the position: at 1000 it is around 1e-4, at 100000 around 1e-2.
//! - [`apply_rope_pos_ids_cos_sin_cache`] looks cosines and sines up, in a
//!   [`CosSinCache`] or the caller's own table. [`RopeFrequencies`] computes
//!   them in `f64`, for YaRN, too. It is the one for long contexts.
//! - [`rope_quantize`] also rounds to 8-bit floats, and
//!   [`rope_quantize_append_paged_kv_cache`] writes these to a paged cache.
//!
//! Queries and keys are `f16` or `bf16` `[tokens, heads, head_dim]`, all of one
//! call the same; tokens and heads may be strided, with all addresses and
//! strides multiples of 16 bytes. Source of the contract: `csrc/rope.cu`,
//! `include/flashinfer/pos_enc.cuh`, `rope.py` of FlashInfer 0.6.13.
//!
//! ```no_run
//! # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use flashinfer_rs::{
//!     BoundedIndices, BoundedTable, Stream,
//!     cudarc::TensorExtMut,
//!     rope::{self, CosSinCache, RopeFrequencies, RopeScaling, RopeTensors, Rotation, YarnScaling},
//! };
//! use half::bf16;
//! let cuda = cudarc::driver::CudaContext::new(0)?.new_stream()?;
//! let stream = Stream::from(&cuda);
//! // Once for a model:
//! let scaling = RopeScaling::Yarn(YarnScaling::new(4.0, 32768.0));
//! let cache = CosSinCache::new(&stream, &RopeFrequencies::new(128, 1e6, &scaling)?, 131072)?;
//! // Once for a batch: two tokens of one sequence, one of another.
//! let positions = BoundedTable::new(&stream, BoundedIndices::new(131072, vec![7, 8, 4000])?)?;
//! // In each layer, 32 query and 8 key heads in place:
//! let (mut q, mut k) = (cuda.alloc_zeros::<bf16>(3 * 32 * 128)?, cuda.alloc_zeros::<bf16>(3 * 8 * 128)?);
//! let (mut q, mut k) = (q.tensor_mut(&cuda, &[3, 32, 128])?, k.tensor_mut(&cuda, &[3, 8, 128])?);
//! rope::apply_rope_pos_ids_cos_sin_cache(
//!     &stream,
//!     &mut RopeTensors::InPlace { q: q.view_mut(), k: k.view_mut() },
//!     &Rotation::new(cache.view()?, &positions),
//! )?;
//! # Ok(()) }
//! # #[cfg(not(feature = "cudarc"))] fn main() {}
//! ```

mod frequencies;
mod positions;
mod quantize;

pub use frequencies::{CosSinCache, Llama31Scaling, RopeFrequencies, RopeScaling, YarnScaling};
pub use positions::Positions;
pub use quantize::{
    RopeAppend, RopeParts, RopePartsMut, RopeQuantizeOptions, rope_quantize,
    rope_quantize_append_paged_kv_cache,
};
pub(crate) use quantize::{check_quantize, check_quantize_append};

use self::frequencies::positive;
use super::{FixedFunction, check::Check};
use crate::{
    dtype::DType,
    error::Result,
    ffi::{DlTensor, Kernel, Signature, kernels},
    indices::{RaggedIndices, RaggedTable},
    module::ModuleName,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    struct ApplyRope = "apply_rope"(
        q: Tensor, k: Tensor, q_rope: Tensor, k_rope: Tensor, indptr: Tensor, offsets: Tensor,
        rotary_dim: Int, interleave: Bool, rope_scale: Float, rope_theta: Float,
    ) -> "void";
    struct ApplyLlama31Rope = "apply_llama31_rope"(
        q: Tensor, k: Tensor, q_rope: Tensor, k_rope: Tensor, indptr: Tensor, offsets: Tensor,
        rotary_dim: Int, interleave: Bool, rope_scale: Float, rope_theta: Float,
        low_freq_factor: Float, high_freq_factor: Float, old_context_length: Float,
    ) -> "void";
    struct ApplyRopePosIds = "apply_rope_pos_ids"(
        q: Tensor, k: Tensor, q_rope: Tensor, k_rope: Tensor, pos_ids: Tensor,
        rotary_dim: Int, interleave: Bool, rope_scale: Float, rope_theta: Float,
    ) -> "void";
    struct ApplyLlama31RopePosIds = "apply_llama31_rope_pos_ids"(
        q: Tensor, k: Tensor, q_rope: Tensor, k_rope: Tensor, pos_ids: Tensor,
        rotary_dim: Int, interleave: Bool, rope_scale: Float, rope_theta: Float,
        low_freq_factor: Float, high_freq_factor: Float, old_context_length: Float,
    ) -> "void";
    struct ApplyRopePosIdsCosSinCache = "apply_rope_pos_ids_cos_sin_cache"(
        q: Tensor, k: Tensor, q_rope: Tensor, k_rope: Tensor, cos_sin_cache: Tensor, pos_ids: Tensor,
        interleave: Bool,
    ) -> "void";
}

impl ModuleName {
    /// Rotary position embeddings.
    pub const ROPE: Self = Self::fixed("rope");
}

pub(super) const SIGNATURES: &[(&str, Signature)] = &[
    ("rope", ApplyRope::SIGNATURE),
    ("rope", ApplyLlama31Rope::SIGNATURE),
    ("rope", ApplyRopePosIds::SIGNATURE),
    ("rope", ApplyLlama31RopePosIds::SIGNATURE),
    ("rope", ApplyRopePosIdsCosSinCache::SIGNATURE),
    ("rope", quantize::RopeQuantize::SIGNATURE),
    ("rope", quantize::RopeQuantizeAppend::SIGNATURE),
];

const fn function(signature: &Signature) -> FixedFunction {
    FixedFunction::of(ModuleName::ROPE, signature)
}

static APPLY: FixedFunction = function(&ApplyRope::SIGNATURE);
static APPLY_LLAMA31: FixedFunction = function(&ApplyLlama31Rope::SIGNATURE);
static APPLY_POS_IDS: FixedFunction = function(&ApplyRopePosIds::SIGNATURE);
static APPLY_LLAMA31_POS_IDS: FixedFunction = function(&ApplyLlama31RopePosIds::SIGNATURE);
static APPLY_CACHE: FixedFunction = function(&ApplyRopePosIdsCosSinCache::SIGNATURE);

/// Element types of queries and keys.
const DTYPES: [DType; 2] = [DType::F16, DType::BF16];
/// Head dimensions that kernels are compiled for.
const HEAD_DIMS: [i64; 4] = [64, 128, 256, 512];
/// What a grid's second dimension, which counts heads and parts, is limited to.
const MAX_GRID_Y: i64 = 65535;

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
/// [`RopeScaling::Llama31`] with `rope_scale` as `factor`.
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
    /// sines, such as [`CosSinCache::view`].
    pub cos_sin_cache: TensorRef<'a>,
    /// The position of each token, all below the number of rows; with
    /// `interleave` below the last row, because kernels read up to 32 bytes
    /// beyond a row.
    pub pos_ids: P,
    /// Pairs are neighbours, not elements of two halves. Default `false`.
    pub interleave: bool,
}

impl<'a> Rotation<'a> {
    /// Of pairs in two halves.
    pub fn new(cos_sin_cache: TensorRef<'a>, pos_ids: impl Into<Positions<'a>>) -> Self {
        Self { cos_sin_cache, pos_ids: pos_ids.into(), interleave: false }
    }

    /// Of pairs of neighbours.
    pub fn interleaved(cos_sin_cache: TensorRef<'a>, pos_ids: impl Into<Positions<'a>>) -> Self {
        Self { interleave: true, ..Self::new(cos_sin_cache, pos_ids) }
    }

    /// The positions of `tokens` tokens, each of which has its row in the table,
    /// which was checked.
    fn positions(&self, check: &Check<'_>, tokens: i64) -> Result<RawTensor> {
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
    fn check_table(&self, check: &Check<'_>) -> Result<()> {
        let cache = &self.cos_sin_cache.raw;
        check.tensor("cos_sin_cache", cache, &[DType::F32], &[2])?;
        check.contiguous("cos_sin_cache", cache)?;
        check.aligned("cos_sin_cache", cache, 16)
    }

    /// Positions below a number have their rows. Returns what they may be below.
    fn check_positions(&self, check: &Check<'_>, below: usize) -> Result<usize> {
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

/// Turns queries and keys of sequences whose rows lie one after the other.
///
/// Request `i` has the rows `indptr[i]..indptr[i + 1]`, the first of which is
/// at position `offsets[i]`; rows behind the last request's stay as they are.
/// `offsets` are `i32`, and any number is fine. `head_dim` is 64, 128, 256 or 512.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before
/// anything is launched: a device, stream, dtype, shape, stride or alignment
/// does not fit, `indptr` ends beyond the rows, or an option is out of its
/// range. Else what the module or CUDA said.
pub fn apply_rope<'p>(
    stream: &Stream,
    tensors: &mut RopeTensors<'_>,
    indptr: &RaggedTable,
    offsets: impl Into<Positions<'p>>,
    options: &RopeOptions,
) -> Result<()> {
    let check = Check::new(APPLY.name(), stream)?;
    let Some(call) = ragged(&check, tensors, indptr, offsets.into(), options)? else { return Ok(()) };
    let Ragged { tensors, indptr, offsets } = &call;
    // SAFETY: tensors and positions were checked above.
    unsafe {
        launch(stream, &APPLY, || ApplyRope {
            q: DlTensor::new(&tensors.q),
            k: DlTensor::new(&tensors.k),
            q_rope: DlTensor::new(&tensors.q_rope),
            k_rope: DlTensor::new(&tensors.k_rope),
            indptr: DlTensor::new(indptr),
            offsets: DlTensor::new(offsets),
            rotary_dim: tensors.rotary_dim,
            interleave: options.interleave,
            rope_scale: options.rope_scale,
            rope_theta: options.rope_theta,
        })
    }
}

/// [`apply_rope`] with Llama 3.1's frequencies.
///
/// # Errors
/// As [`apply_rope`].
pub fn apply_llama31_rope<'p>(
    stream: &Stream,
    tensors: &mut RopeTensors<'_>,
    indptr: &RaggedTable,
    offsets: impl Into<Positions<'p>>,
    options: &Llama31RopeOptions,
) -> Result<()> {
    let check = Check::new(APPLY_LLAMA31.name(), stream)?;
    let call = ragged(&check, tensors, indptr, offsets.into(), &options.rope)?;
    options.scaling().check(check.op())?;
    let Some(call) = call else { return Ok(()) };
    let Ragged { tensors, indptr, offsets } = &call;
    // SAFETY: tensors and positions were checked above.
    unsafe {
        launch(stream, &APPLY_LLAMA31, || ApplyLlama31Rope {
            q: DlTensor::new(&tensors.q),
            k: DlTensor::new(&tensors.k),
            q_rope: DlTensor::new(&tensors.q_rope),
            k_rope: DlTensor::new(&tensors.k_rope),
            indptr: DlTensor::new(indptr),
            offsets: DlTensor::new(offsets),
            rotary_dim: tensors.rotary_dim,
            interleave: options.rope.interleave,
            rope_scale: options.rope.rope_scale,
            rope_theta: options.rope.rope_theta,
            low_freq_factor: options.low_freq_factor,
            high_freq_factor: options.high_freq_factor,
            old_context_length: options.old_context_len,
        })
    }
}

/// Turns queries and keys by the position of each token.
///
/// `pos_ids` has one for each token; any number is fine. `head_dim` is 64, 128,
/// 256 or 512.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before
/// anything is launched: a device, stream, dtype, shape, stride or alignment
/// does not fit, or an option is out of its range. Else what the module or CUDA
/// said.
pub fn apply_rope_pos_ids<'p>(
    stream: &Stream,
    tensors: &mut RopeTensors<'_>,
    pos_ids: impl Into<Positions<'p>>,
    options: &RopeOptions,
) -> Result<()> {
    let check = Check::new(APPLY_POS_IDS.name(), stream)?;
    let Some((tensors, pos_ids)) = by_position(&check, tensors, pos_ids.into(), options)? else {
        return Ok(());
    };
    // SAFETY: tensors and positions were checked above.
    unsafe {
        launch(stream, &APPLY_POS_IDS, || ApplyRopePosIds {
            q: DlTensor::new(&tensors.q),
            k: DlTensor::new(&tensors.k),
            q_rope: DlTensor::new(&tensors.q_rope),
            k_rope: DlTensor::new(&tensors.k_rope),
            pos_ids: DlTensor::new(&pos_ids),
            rotary_dim: tensors.rotary_dim,
            interleave: options.interleave,
            rope_scale: options.rope_scale,
            rope_theta: options.rope_theta,
        })
    }
}

/// [`apply_rope_pos_ids`] with Llama 3.1's frequencies.
///
/// # Errors
/// As [`apply_rope_pos_ids`].
pub fn apply_llama31_rope_pos_ids<'p>(
    stream: &Stream,
    tensors: &mut RopeTensors<'_>,
    pos_ids: impl Into<Positions<'p>>,
    options: &Llama31RopeOptions,
) -> Result<()> {
    let check = Check::new(APPLY_LLAMA31_POS_IDS.name(), stream)?;
    let call = by_position(&check, tensors, pos_ids.into(), &options.rope)?;
    options.scaling().check(check.op())?;
    let Some((tensors, pos_ids)) = call else { return Ok(()) };
    // SAFETY: tensors and positions were checked above.
    unsafe {
        launch(stream, &APPLY_LLAMA31_POS_IDS, || ApplyLlama31RopePosIds {
            q: DlTensor::new(&tensors.q),
            k: DlTensor::new(&tensors.k),
            q_rope: DlTensor::new(&tensors.q_rope),
            k_rope: DlTensor::new(&tensors.k_rope),
            pos_ids: DlTensor::new(&pos_ids),
            rotary_dim: tensors.rotary_dim,
            interleave: options.rope.interleave,
            rope_scale: options.rope.rope_scale,
            rope_theta: options.rope.rope_theta,
            low_freq_factor: options.low_freq_factor,
            high_freq_factor: options.high_freq_factor,
            old_context_length: options.old_context_len,
        })
    }
}

/// Turns queries and keys by cosines and sines from a table, whose row length
/// is `rotary_dim`. This is upstream's `apply_rope_with_cos_sin_cache`.
///
/// With a `head_dim` of 64, 128, 256 or 512, `rotary_dim` is a multiple of what
/// [`RopeOptions::rotary_dim`] says, with any other of 32 (with interleaved
/// pairs of 16). There, pairs of two halves are turned in place only if
/// `rotary_dim / 16` is a power of two up to 32: of other widths a head's two
/// halves may be turned by different warps, which do not wait for each other.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before
/// anything is launched: a device, stream, dtype, shape, stride or alignment
/// does not fit, or a position may have no row. Else what the module or CUDA
/// said.
pub fn apply_rope_pos_ids_cos_sin_cache(
    stream: &Stream,
    tensors: &mut RopeTensors<'_>,
    rotation: &Rotation<'_>,
) -> Result<()> {
    let check = Check::new(APPLY_CACHE.name(), stream)?;
    let tensors = check_by_table(&check, tensors, rotation)?;
    let pos_ids = rotation.positions(&check, tensors.tokens)?;
    if tensors.is_empty() {
        return Ok(());
    }
    // SAFETY: tensors and positions were checked above.
    unsafe {
        launch(stream, &APPLY_CACHE, || ApplyRopePosIdsCosSinCache {
            q: DlTensor::new(&tensors.q),
            k: DlTensor::new(&tensors.k),
            q_rope: DlTensor::new(&tensors.q_rope),
            k_rope: DlTensor::new(&tensors.k_rope),
            cos_sin_cache: (&rotation.cos_sin_cache).into(),
            pos_ids: DlTensor::new(&pos_ids),
            interleave: rotation.interleave,
        })
    }
}

/// All that the kernels of [`apply_rope_pos_ids_cos_sin_cache`] assume but of positions.
pub(crate) fn check_by_table<P>(
    check: &Check<'_>,
    tensors: &RopeTensors<'_>,
    rotation: &Rotation<'_, P>,
) -> Result<Checked> {
    let in_place = matches!(tensors, RopeTensors::InPlace { .. });
    let tensors = Checked::new(check, tensors)?;
    rotation.check_table(check)?;
    let rotary_dim = rotation.cos_sin_cache.raw.shape()[1];
    let fail = |problem| check.fail("cos_sin_cache", problem);
    if rotary_dim > tensors.head_dim {
        return fail(format!("its rows are for {rotary_dim} elements, heads have {}", tensors.head_dim));
    }
    if HEAD_DIMS.contains(&tensors.head_dim) {
        let vector = vector_of(tensors.head_dim);
        check_rotary_dim(check, "cos_sin_cache", rotary_dim, vector, rotation.interleave)?;
        check_grid_y(check, "q", tensors.heads())?;
    } else {
        quantize::check_rope_dim(check, "cos_sin_cache", rotary_dim, rotation.interleave)?;
        let threads = rotary_dim / quantize::VECTOR;
        if in_place && !rotation.interleave && 32 % threads != 0 {
            return fail(format!(
                "with head_dim {}, halves of {rotary_dim} elements cannot be turned in place; use \
                 RopeTensors::OutOfPlace",
                tensors.head_dim
            ));
        }
        let parts = (tensors.head_dim + rotary_dim - 1) / rotary_dim;
        check_grid_y(check, "q", tensors.heads().saturating_mul(parts))?;
    }
    Ok(tensors)
}

/// Positions on the host have their rows.
pub(crate) fn check_host_positions(check: &Check<'_>, rotation: &Rotation<'_, &[i32]>) -> Result<()> {
    let last = rotation.pos_ids.iter().max().map_or(-1, |&last| i64::from(last));
    rotation.check_positions(check, (last + 1).max(0) as usize).map(drop)
}

/// Checked queries and keys.
pub(crate) struct Checked {
    q: RawTensor,
    k: RawTensor,
    q_rope: RawTensor,
    k_rope: RawTensor,
    tokens: i64,
    head_dim: i64,
    /// Set where options say it.
    rotary_dim: i64,
}

impl Checked {
    fn new(check: &Check<'_>, tensors: &RopeTensors<'_>) -> Result<Self> {
        let (q, k, q_rope, k_rope) = match tensors {
            RopeTensors::InPlace { q, k } => (q.raw, k.raw, q.raw, k.raw),
            RopeTensors::OutOfPlace { q, k, q_rope, k_rope } => (q.raw, k.raw, q_rope.raw, k_rope.raw),
        };
        check.tensor("q", &q, &DTYPES, &[3])?;
        check.tensor("k", &k, &[q.dtype], &[3])?;
        let (tokens, head_dim) = (q.shape()[0], q.shape()[2]);
        check.shape("k", &k, &[tokens, k.shape()[1], head_dim])?;
        for (name, tensor, shape) in
            [("q", &q, &q), ("k", &k, &k), ("q_rope", &q_rope, &q), ("k_rope", &k_rope, &k)]
        {
            check.tensor(name, tensor, &[q.dtype], &[3])?;
            check.shape(name, tensor, shape.shape())?;
            check.last_dim_contiguous(name, tensor)?;
            check.aligned(name, tensor, 16)?;
        }
        if q.shape().iter().chain(k.shape()).any(|&size| size > i64::from(i32::MAX)) {
            return check.fail(
                "q",
                format!("shapes {:?} and {:?}; sizes are at most 2^31 − 1", q.shape(), k.shape()),
            );
        }
        Ok(Self { q, k, q_rope, k_rope, tokens, head_dim, rotary_dim: head_dim })
    }

    /// With what options say about angles that are computed.
    fn with_options(check: &Check<'_>, tensors: &RopeTensors<'_>, options: &RopeOptions) -> Result<Self> {
        let mut checked = Self::new(check, tensors)?;
        if !HEAD_DIMS.contains(&checked.head_dim) {
            return check.fail("q", format!("head_dim {}; the kernels have {HEAD_DIMS:?}", checked.head_dim));
        }
        if let Some(rotary_dim) = options.rotary_dim {
            checked.rotary_dim = i64::try_from(rotary_dim).unwrap_or(i64::MAX);
        }
        let (rotary_dim, head_dim) = (checked.rotary_dim, checked.head_dim);
        if rotary_dim > head_dim {
            return check.fail("rotary_dim", format!("{rotary_dim} of heads of {head_dim} elements"));
        }
        check_rotary_dim(check, "rotary_dim", rotary_dim, vector_of(head_dim), options.interleave)?;
        positive(check.op(), "rope_scale", options.rope_scale)?;
        positive(check.op(), "rope_theta", options.rope_theta)?;
        Ok(checked)
    }

    /// Of queries and keys.
    fn heads(&self) -> i64 {
        self.q.shape()[1] + self.k.shape()[1]
    }

    fn is_empty(&self) -> bool {
        self.tokens == 0 || self.heads() == 0
    }
}

/// Elements that a thread loads at a time.
fn vector_of(head_dim: i64) -> i64 {
    (head_dim / 32).max(8)
}

/// Vectors end where what is turned ends, and with halves in the middle, too.
fn check_rotary_dim(
    check: &Check<'_>,
    argument: &'static str,
    rotary_dim: i64,
    vector: i64,
    interleave: bool,
) -> Result<()> {
    let multiple = if interleave { vector } else { 2 * vector };
    if rotary_dim > 0 && rotary_dim % multiple == 0 {
        return Ok(());
    }
    check.fail(
        argument,
        format!(
            "{rotary_dim} elements are turned; {} that must be a multiple of {multiple}, and not 0",
            if interleave { "with interleaved pairs" } else { "with pairs of two halves" }
        ),
    )
}

fn check_grid_y(check: &Check<'_>, argument: &'static str, blocks: i64) -> Result<()> {
    if blocks <= MAX_GRID_Y {
        return Ok(());
    }
    check.fail(
        argument,
        format!("the heads need {blocks} blocks side by side; the GPU has {MAX_GRID_Y}; split them"),
    )
}

/// The arguments of an embedding by sequences.
struct Ragged {
    tensors: Checked,
    indptr: RawTensor,
    offsets: RawTensor,
}

/// `None` if there is nothing to do.
fn ragged(
    check: &Check<'_>,
    tensors: &RopeTensors<'_>,
    indptr: &RaggedTable,
    offsets: Positions<'_>,
    options: &RopeOptions,
) -> Result<Option<Ragged>> {
    check.on_stream("indptr", indptr.stream())?;
    let tensors = check_ragged(check, tensors, indptr.host(), options)?;
    let offsets = offsets.checked(check, "offsets", &[DType::I32], indptr.host().batch_size() as i64)?;
    let nothing = indptr.host().total() == 0 || tensors.is_empty();
    Ok(if nothing { None } else { Some(Ragged { tensors, indptr: indptr.indptr()?, offsets }) })
}

/// All that the kernels of [`apply_rope`] and [`apply_llama31_rope`] assume but of offsets.
pub(crate) fn check_ragged(
    check: &Check<'_>,
    tensors: &RopeTensors<'_>,
    indptr: &RaggedIndices,
    options: &RopeOptions,
) -> Result<Checked> {
    let tensors = Checked::with_options(check, tensors, options)?;
    let (rows, batch) = (indptr.total(), indptr.batch_size());
    if rows as i64 > tensors.tokens {
        return check
            .fail("indptr", format!("it ends at {rows}, but there are {} rows of queries", tensors.tokens));
    }
    if (batch as i64).saturating_mul(tensors.heads()) > i64::from(i32::MAX) {
        return check.fail(
            "indptr",
            format!("{batch} requests of {} heads; a launch has fewer than 2^31 blocks", tensors.heads()),
        );
    }
    Ok(tensors)
}

/// The tensors and positions of an embedding by tokens; `None` if there is
/// nothing to do.
fn by_position(
    check: &Check<'_>,
    tensors: &RopeTensors<'_>,
    pos_ids: Positions<'_>,
    options: &RopeOptions,
) -> Result<Option<(Checked, RawTensor)>> {
    let tensors = check_by_position(check, tensors, options)?;
    let pos_ids = pos_ids.checked(check, "pos_ids", &[DType::I32, DType::I64], tensors.tokens)?;
    Ok(if tensors.is_empty() { None } else { Some((tensors, pos_ids)) })
}

/// All that the kernels of [`apply_rope_pos_ids`] and [`apply_llama31_rope_pos_ids`] assume but of
/// positions.
pub(crate) fn check_by_position(
    check: &Check<'_>,
    tensors: &RopeTensors<'_>,
    options: &RopeOptions,
) -> Result<Checked> {
    let tensors = Checked::with_options(check, tensors, options)?;
    check_grid_y(check, "q", tensors.heads())?;
    Ok(tensors)
}

/// Calls a function of the module.
///
/// # Safety
/// The kernel must be the function's. Its tensors must be all that the kernels
/// assume: device, dtype, shape, last stride, alignment, vectors that end where
/// what is turned ends, caches that fit their page table. Index values must be
/// the device copies of checked ones, or promised to be below the rows of the
/// table, or decide no address.
unsafe fn launch<K: Kernel>(
    stream: &Stream,
    function: &FixedFunction,
    kernel: impl FnOnce() -> K,
) -> Result<()> {
    // SAFETY: promised by the caller.
    unsafe { kernel().call(function.get(FlashInferRuntime::get()?)?, stream) }.map(drop)
}
