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
//! - [`rope_append_paged_kv_cache`] also writes keys and values to a paged cache, from compute
//!   capability 9.0 on.
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
//!     Stream, gpu::Tensor, rope::{self, CosSinCache, RopeFrequencies, RopeScaling,
//!     RopeTensors, Rotation, YarnScaling}, indices::{BoundedIndices, BoundedTable},
//! };
//! use half::bf16;
//! let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
//! // Once for a model:
//! let scaling = RopeScaling::Yarn(YarnScaling::new(4.0, 32768.0));
//! let cache = CosSinCache::new(&stream, &RopeFrequencies::new(128, 1e6, &scaling)?, 131072)?;
//! // Once for a batch: two tokens of one sequence, one of another.
//! let positions = BoundedTable::new(&stream, BoundedIndices::new(131072, vec![7, 8, 4000])?)?;
//! // In each layer, 32 query and 8 key heads in place:
//! let mut q = Tensor::<bf16>::zeros(&stream, &[3, 32, 128])?;
//! let mut k = Tensor::<bf16>::zeros(&stream, &[3, 8, 128])?;
//! rope::apply_rope_pos_ids_cos_sin_cache(
//!     &stream,
//!     &mut RopeTensors::InPlace { q: q.view_mut(), k: k.view_mut() },
//!     &Rotation::new(cache.view()?, &positions),
//! )?;
//! # Ok(()) }
//! # #[cfg(not(feature = "cudarc"))] fn main() {}
//! ```

mod append;
mod checks;
mod frequencies;
mod options;
mod positions;
mod quantize;

pub(crate) use append::check_rope_append;
pub use append::rope_append_paged_kv_cache;
pub(crate) use checks::{check_by_position, check_by_table, check_host_positions, check_ragged};
pub use frequencies::{CosSinCache, Llama31Scaling, RopeFrequencies, RopeScaling, YarnScaling};
pub use options::{Llama31RopeOptions, RopeOptions, RopeTensors, Rotation};
pub use positions::Positions;
pub use quantize::{
    RopeAppend, RopeParts, RopePartsMut, RopeQuantizeOptions, rope_quantize,
    rope_quantize_append_paged_kv_cache,
};
pub(crate) use quantize::{check_quantize, check_quantize_append};

use self::checks::Checked;
use super::{FixedFunction, check::Check};
use crate::{
    dtype::DType,
    error::Result,
    ffi::{DlTensor, Kernel, Signature, kernels},
    indices::RaggedTable,
    module::ModuleName,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::RawTensor,
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

pub(super) const SIGNATURES: &[(&str, &[Signature])] = &[
    ("rope", ApplyRope::SIGNATURES),
    ("rope", ApplyLlama31Rope::SIGNATURES),
    ("rope", ApplyRopePosIds::SIGNATURES),
    ("rope", ApplyLlama31RopePosIds::SIGNATURES),
    ("rope", ApplyRopePosIdsCosSinCache::SIGNATURES),
    ("rope", quantize::RopeQuantize::SIGNATURES),
    ("rope", quantize::RopeQuantizeAppend::SIGNATURES),
];

const fn function(declared: &'static [Signature]) -> FixedFunction {
    FixedFunction::of(ModuleName::ROPE, declared)
}

static APPLY: FixedFunction = function(ApplyRope::SIGNATURES);
static APPLY_LLAMA31: FixedFunction = function(ApplyLlama31Rope::SIGNATURES);
static APPLY_POS_IDS: FixedFunction = function(ApplyRopePosIds::SIGNATURES);
static APPLY_LLAMA31_POS_IDS: FixedFunction = function(ApplyLlama31RopePosIds::SIGNATURES);
static APPLY_CACHE: FixedFunction = function(ApplyRopePosIdsCosSinCache::SIGNATURES);

/// Element types of queries and keys.
const DTYPES: [DType; 2] = [DType::F16, DType::BF16];

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
