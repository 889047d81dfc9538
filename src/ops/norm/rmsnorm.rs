//! RMS norms, also of a sum and also quantized.

use super::{NormOptions, check_plain, check_shared_memory, launch};
use crate::{
    dtype::DType,
    error::Result,
    ffi::{DlTensor, Kernel, Signature, kernels},
    module::ModuleName,
    ops::{FixedFunction, check::Check, enable_pdl},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    struct Norm = "rmsnorm"(out: Tensor, input: Tensor, weight: Tensor, eps: Float, enable_pdl: Bool) -> "void";
    struct NormQuant = "rmsnorm_quant"(
        out: Tensor, input: Tensor, weight: Tensor, scale: Tensor, eps: Float, enable_pdl: Bool,
    ) -> "void";
    struct FusedAddNorm = "fused_add_rmsnorm"(
        input: Tensor, residual: Tensor, weight: Tensor, eps: Float, enable_pdl: Bool,
    ) -> "void";
    struct FusedAddNormQuant = "fused_add_rmsnorm_quant"(
        out: Tensor, input: Tensor, residual: Tensor, weight: Tensor, scale: Tensor, eps: Float, enable_pdl: Bool,
    ) -> "void";
}

/// Gemma's norms take what the plain ones take.
const GEMMA_NORM: &[Signature] = &[Signature { function: "gemma_rmsnorm", ..Norm::SIGNATURES[0] }];
const GEMMA_FUSED_ADD_NORM: &[Signature] =
    &[Signature { function: "gemma_fused_add_rmsnorm", ..FusedAddNorm::SIGNATURES[0] }];

pub(super) const SIGNATURES: &[&[Signature]] = &[
    Norm::SIGNATURES,
    GEMMA_NORM,
    FusedAddNorm::SIGNATURES,
    GEMMA_FUSED_ADD_NORM,
    NormQuant::SIGNATURES,
    FusedAddNormQuant::SIGNATURES,
];

static RMSNORM: FixedFunction = FixedFunction::of(ModuleName::NORM, Norm::SIGNATURES);
static GEMMA_RMSNORM: FixedFunction = FixedFunction::of(ModuleName::NORM, GEMMA_NORM);
static FUSED_ADD_RMSNORM: FixedFunction = FixedFunction::of(ModuleName::NORM, FusedAddNorm::SIGNATURES);
static GEMMA_FUSED_ADD_RMSNORM: FixedFunction = FixedFunction::of(ModuleName::NORM, GEMMA_FUSED_ADD_NORM);
static RMSNORM_QUANT: FixedFunction = FixedFunction::of(ModuleName::NORM, NormQuant::SIGNATURES);
static FUSED_ADD_RMSNORM_QUANT: FixedFunction =
    FixedFunction::of(ModuleName::NORM, FusedAddNormQuant::SIGNATURES);

/// Element types of the norms.
const DTYPES: [DType; 2] = [DType::F16, DType::BF16];
/// Element types of quantized results.
const QUANTIZED: [DType; 2] = [DType::E4M3, DType::E5M2];

/// `out = input / sqrt(mean(input²) + eps) · weight`, over the last dimension.
///
/// `input` and `out` are `[rows, d]`, or `[rows, heads, d]` for the norm of
/// query or key heads; `weight` is `[d]`. Zero rows are nothing to do.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before
/// anything is launched: a device, dtype, shape, stride or alignment does not
/// fit, or the tensor spans 2³² elements. Else what the module or CUDA said.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{gpu::Tensor, norm, Stream};
/// use half::f16;
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let input = Tensor::from_slice(&stream, &[4, 128], &[f16::ONE; 4 * 128])?;
/// let weight = Tensor::from_slice(&stream, &[128], &[f16::ONE; 128])?;
/// let mut out = Tensor::<f16>::zeros(&stream, &[4, 128])?;
/// let options = norm::NormOptions::default();
/// norm::rmsnorm(&stream, &mut out.view_mut(), &input.view(), &weight.view(), &options)?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
pub fn rmsnorm(
    stream: &Stream,
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    norm(&RMSNORM, &[2, 3], stream, out, input, weight, options)
}

/// [`rmsnorm`] with `weight + 1` in place of `weight`, as Gemma has it.
/// `input` and `out` are `[rows, d]`.
///
/// # Errors
/// As [`rmsnorm`].
pub fn gemma_rmsnorm(
    stream: &Stream,
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    norm(&GEMMA_RMSNORM, &[2], stream, out, input, weight, options)
}

/// `residual += input`, then `input = rmsnorm(residual) · weight`, in one
/// kernel. Both are `[rows, d]` and written; `weight` is `[d]`.
///
/// # Errors
/// As [`rmsnorm`]; also when a row does not fit the GPU's shared memory
/// (`4 · d` bytes and 128).
pub fn fused_add_rmsnorm(
    stream: &Stream,
    input: &mut TensorMut<'_>,
    residual: &mut TensorMut<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    fused_add_norm(&FUSED_ADD_RMSNORM, stream, input, residual, weight, options)
}

/// [`fused_add_rmsnorm`] with `weight + 1` in place of `weight`.
///
/// # Errors
/// As [`fused_add_rmsnorm`].
pub fn gemma_fused_add_rmsnorm(
    stream: &Stream,
    input: &mut TensorMut<'_>,
    residual: &mut TensorMut<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    fused_add_norm(&GEMMA_FUSED_ADD_RMSNORM, stream, input, residual, weight, options)
}

/// [`rmsnorm`] divided by `scale`, as 8-bit floats: `out = input /
/// sqrt(mean(input²) + eps) · weight / scale`, cut off at ±448 and rounded.
///
/// `input` is `[rows, d]`, `f16` or `bf16`; `out` has its shape and is `e4m3` or
/// `e5m2`; `weight` is `[d]`, of the dtype of `input`; `scale` is `[1]`, `f32`.
/// The cut is at ±448, the largest of `e4m3`, for `e5m2`, too, and NaN becomes 448. With
/// FlashInfer 0.7, `e5m2` is cut off at its own largest number, ±57344, which NaN becomes.
///
/// Programmatic dependent launch is off here unless asked for, unlike
/// upstream's default: the kernel reads `scale` before it waits for the kernel
/// in front of it. Ask for it where that one does not write the scale, as with
/// scales that were calibrated beforehand; else an old scale may be used.
///
/// # Errors
/// As [`rmsnorm`].
pub fn rmsnorm_quant(
    stream: &Stream,
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    weight: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    let function = &RMSNORM_QUANT;
    let check = Check::new(function.name(), stream)?;
    check_rmsnorm_quant(&check, &out.raw, &input.raw, &weight.raw, &scale.raw)?;
    if input.numel() == 0 {
        return Ok(());
    }
    let kernel = NormQuant {
        out: DlTensor::new(&out.raw),
        input: input.into(),
        weight: weight.into(),
        scale: scale.into(),
        eps: options.eps,
        enable_pdl: options.enable_pdl.unwrap_or(false),
    };
    // SAFETY: as in `norm`; the scale is one number.
    unsafe { launch(function, stream, &kernel) }
}

/// `residual += input`, then `out = rmsnorm(residual) · weight / scale` as
/// 8-bit floats, in one kernel. `input` stays as it is.
///
/// `input`, `residual` and `out` are `[rows, d]`; the rest is as for
/// [`rmsnorm_quant`], also that programmatic dependent launch is off unless
/// asked for.
///
/// # Errors
/// As [`fused_add_rmsnorm`].
pub fn fused_add_rmsnorm_quant(
    stream: &Stream,
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    residual: &mut TensorMut<'_>,
    weight: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    let function = &FUSED_ADD_RMSNORM_QUANT;
    let check = Check::new(function.name(), stream)?;
    let rows = [&input.raw, &residual.raw];
    check_fused_add_rmsnorm_quant(&check, &out.raw, rows, &weight.raw, &scale.raw)?;
    if input.numel() == 0 {
        return Ok(());
    }
    let kernel = FusedAddNormQuant {
        out: DlTensor::new(&out.raw),
        input: input.into(),
        residual: DlTensor::new(&residual.raw),
        weight: weight.into(),
        scale: scale.into(),
        eps: options.eps,
        enable_pdl: options.enable_pdl.unwrap_or(false),
    };
    // SAFETY: as in `norm`; a row fits the shared memory, and the scale is one
    // number.
    unsafe { launch(function, stream, &kernel) }
}

fn norm(
    function: &FixedFunction,
    ranks: &[usize],
    stream: &Stream,
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    let check = Check::new(function.name(), stream)?;
    check_rmsnorm(&check, &out.raw, &input.raw, &weight.raw, ranks)?;
    if input.numel() == 0 {
        return Ok(());
    }
    let kernel = Norm {
        out: DlTensor::new(&out.raw),
        input: input.into(),
        weight: weight.into(),
        eps: options.eps,
        enable_pdl: enable_pdl(FlashInferRuntime::get()?, options.enable_pdl, stream.ordinal())?,
    };
    // SAFETY: the function has this signature, and the tensors were checked
    // for all that the kernel assumes: device, dtype, shape, last stride,
    // vector alignment and 32-bit offsets.
    unsafe { launch(function, stream, &kernel) }
}

fn fused_add_norm(
    function: &FixedFunction,
    stream: &Stream,
    input: &mut TensorMut<'_>,
    residual: &mut TensorMut<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    let check = Check::new(function.name(), stream)?;
    check_fused_add_rmsnorm(&check, [&input.raw, &residual.raw], &weight.raw)?;
    if input.numel() == 0 {
        return Ok(());
    }
    let kernel = FusedAddNorm {
        input: DlTensor::new(&input.raw),
        residual: DlTensor::new(&residual.raw),
        weight: weight.into(),
        eps: options.eps,
        enable_pdl: enable_pdl(FlashInferRuntime::get()?, options.enable_pdl, stream.ordinal())?,
    };
    // SAFETY: as in `norm`; a row fits the shared memory.
    unsafe { launch(function, stream, &kernel) }
}

/// All that the kernels of [`rmsnorm`] and [`gemma_rmsnorm`] assume.
pub(crate) fn check_rmsnorm(
    check: &Check<'_>,
    out: &RawTensor,
    input: &RawTensor,
    weight: &RawTensor,
    ranks: &[usize],
) -> Result<()> {
    check_rows(check, &[("input", input), ("out", out)], None, weight, ranks)
}

/// All that the kernels of [`fused_add_rmsnorm`] and [`gemma_fused_add_rmsnorm`] assume.
pub(crate) fn check_fused_add_rmsnorm(
    check: &Check<'_>,
    [input, residual]: [&RawTensor; 2],
    weight: &RawTensor,
) -> Result<()> {
    check_rows(check, &[("input", input), ("residual", residual)], None, weight, &[2])?;
    check_row_memory(check, input)
}

/// All that the kernel of [`rmsnorm_quant`] assumes.
pub(crate) fn check_rmsnorm_quant(
    check: &Check<'_>,
    out: &RawTensor,
    input: &RawTensor,
    weight: &RawTensor,
    scale: &RawTensor,
) -> Result<()> {
    check_rows(check, &[("input", input)], Some(out), weight, &[2])?;
    check_plain(check, "scale", scale, DType::F32, &[1], 4)
}

/// All that the kernel of [`fused_add_rmsnorm_quant`] assumes.
pub(crate) fn check_fused_add_rmsnorm_quant(
    check: &Check<'_>,
    out: &RawTensor,
    [input, residual]: [&RawTensor; 2],
    weight: &RawTensor,
    scale: &RawTensor,
) -> Result<()> {
    check_rows(check, &[("input", input), ("residual", residual)], Some(out), weight, &[2])?;
    check_plain(check, "scale", scale, DType::F32, &[1], 4)?;
    check_row_memory(check, input)
}

/// Tensors of one shape, normed over their last dimension by `weight`. The
/// first decides dtype and shape; `quantized` has the shape only.
fn check_rows(
    check: &Check<'_>,
    rows: &[(&'static str, &RawTensor)],
    quantized: Option<&RawTensor>,
    weight: &RawTensor,
    ranks: &[usize],
) -> Result<()> {
    let (first_name, first) = rows[0];
    check.tensor(first_name, first, &DTYPES, ranks)?;
    let (dtype, shape) = (first.dtype, first.shape());
    let d = shape[shape.len() - 1];
    if d == 0 || shape.iter().any(|&size| size > i64::from(i32::MAX)) {
        return check.fail(
            first_name,
            format!("its shape is {shape:?}; the last dimension must not be 0, and all be below 2^31"),
        );
    }
    // The kernels load vectors of up to 16 bytes, as long as they divide a row,
    // and store as many elements of a narrower type.
    let vector = 1 << (16 / dtype.size() as u32).trailing_zeros().min(d.trailing_zeros());
    let rows = rows.iter().map(|&(name, tensor)| (name, tensor, std::slice::from_ref(&dtype)));
    for (name, tensor, dtypes) in rows.chain(quantized.map(|out| ("out", out, &QUANTIZED[..]))) {
        check.tensor(name, tensor, dtypes, ranks)?;
        check.shape(name, tensor, shape)?;
        check.last_dim_contiguous(name, tensor)?;
        check.aligned(name, tensor, vector * tensor.dtype.size())?;
        check.offsets_in_32_bits(name, tensor)?;
    }
    if first.numel() / d > i64::from(i32::MAX) {
        return check.fail(first_name, format!("its shape is {shape:?}; a launch has fewer than 2^31 rows"));
    }
    check_plain(check, "weight", weight, dtype, &[d], vector * dtype.size())
}

/// A row of the fused norms fits the GPU's shared memory: in `f32`, with a
/// partial sum for each of up to 32 warps.
fn check_row_memory(check: &Check<'_>, input: &RawTensor) -> Result<()> {
    let d = input.shape()[1];
    check_shared_memory(check, d, 4 * (d + 32))
}
