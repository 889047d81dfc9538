//! RMS norms, in FlashInfer's module `norm`.
//!
//! Tensors are `f16` or `bf16`, all of one call the same; sums are computed in
//! `f32`. Rows may be strided; elements of a row are adjacent. Source of the
//! contract: `csrc/norm.cu`, `include/flashinfer/norm.cuh` of FlashInfer 0.6.13.

use std::sync::{Mutex, PoisonError};

use super::{FixedFunction, check::Check, enable_pdl};
use crate::{
    cuda::DeviceAttribute,
    error::Result,
    ffi::{DlTensor, Kernel, Signature, kernels},
    module::ModuleName,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{DType, RawTensor, TensorMut, TensorRef},
};

kernels! {
    struct Norm = "rmsnorm"(out: Tensor, input: Tensor, weight: Tensor, eps: Float, enable_pdl: Bool) -> "void";
    struct FusedAddNorm = "fused_add_rmsnorm"(
        input: Tensor, residual: Tensor, weight: Tensor, eps: Float, enable_pdl: Bool,
    ) -> "void";
}

/// Gemma's norms take what the plain ones take.
const GEMMA_NORM: Signature = Signature { function: "gemma_rmsnorm", ..Norm::SIGNATURE };
const GEMMA_FUSED_ADD_NORM: Signature =
    Signature { function: "gemma_fused_add_rmsnorm", ..FusedAddNorm::SIGNATURE };

pub(super) const SIGNATURES: &[(&str, Signature)] = &[
    ("norm", Norm::SIGNATURE),
    ("norm", GEMMA_NORM),
    ("norm", FusedAddNorm::SIGNATURE),
    ("norm", GEMMA_FUSED_ADD_NORM),
];

static RMSNORM: FixedFunction = FixedFunction::of(ModuleName::NORM, &Norm::SIGNATURE);
static GEMMA_RMSNORM: FixedFunction = FixedFunction::of(ModuleName::NORM, &GEMMA_NORM);
static FUSED_ADD_RMSNORM: FixedFunction = FixedFunction::of(ModuleName::NORM, &FusedAddNorm::SIGNATURE);
static GEMMA_FUSED_ADD_RMSNORM: FixedFunction = FixedFunction::of(ModuleName::NORM, &GEMMA_FUSED_ADD_NORM);

/// Element types of the norms.
const DTYPES: [DType; 2] = [DType::F16, DType::BF16];

/// Options of the norms.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct NormOptions {
    /// Added to the mean of squares. Upstream's default is 1e-6.
    pub eps: f64,
    /// Programmatic dependent launch; `None` uses it where the GPU has it
    /// (compute capability 9.0 and newer).
    pub enable_pdl: Option<bool>,
}

impl Default for NormOptions {
    fn default() -> Self {
        Self { eps: 1e-6, enable_pdl: None }
    }
}

impl NormOptions {
    /// The default options with another `eps`.
    pub fn with_eps(eps: f64) -> Self {
        Self { eps, ..Self::default() }
    }
}

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
/// use flashinfer_rs::{cudarc::{TensorExt, TensorExtMut}, norm, Stream};
/// use half::f16;
/// let cuda = cudarc::driver::CudaContext::new(0)?.default_stream();
/// let stream = Stream::from(&cuda);
/// let (input, weight) = (cuda.clone_htod(&[f16::ONE; 4 * 128])?, cuda.clone_htod(&[f16::ONE; 128])?);
/// let mut out = cuda.alloc_zeros::<f16>(4 * 128)?;
/// norm::rmsnorm(
///     &stream,
///     &mut out.tensor_mut(&cuda, &[4, 128])?.view_mut(),
///     &input.tensor(&cuda, &[4, 128])?.view(),
///     &weight.tensor(&cuda, &[128])?.view(),
///     &norm::NormOptions::default(),
/// )?;
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
/// (`4 · d` bytes).
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
    check_pair(&check, [("input", &input.raw), ("out", &out.raw)], &weight.raw, ranks)?;
    launch(stream, &out.raw, function, options, |enable_pdl| Norm {
        out: DlTensor::new(&out.raw),
        input: input.into(),
        weight: weight.into(),
        eps: options.eps,
        enable_pdl,
    })
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
    check_pair(&check, [("input", &input.raw), ("residual", &residual.raw)], &weight.raw, &[2])?;
    check_shared_memory(&check, stream, &input.raw)?;
    launch(stream, &input.raw, function, options, |enable_pdl| FusedAddNorm {
        input: DlTensor::new(&input.raw),
        residual: DlTensor::new(&residual.raw),
        weight: weight.into(),
        eps: options.eps,
        enable_pdl,
    })
}

/// Two tensors of one shape, normed over their last dimension by `weight`.
/// The first decides dtype and shape.
fn check_pair(
    check: &Check<'_>,
    pair: [(&'static str, &RawTensor); 2],
    weight: &RawTensor,
    ranks: &[usize],
) -> Result<()> {
    let (first_name, first) = pair[0];
    check.tensor(first_name, first, &DTYPES, ranks)?;
    let (dtype, shape) = (first.dtype, first.shape());
    let d = shape[shape.len() - 1];
    if d == 0 || shape.iter().any(|&size| size > i64::from(i32::MAX)) {
        return check.fail(
            first_name,
            format!("its shape is {shape:?}; the last dimension must not be 0, and none above 2^31"),
        );
    }
    // The kernels load vectors of up to 16 bytes, as long as they divide a row.
    let vector = dtype.size() << (16 / dtype.size() as u32).trailing_zeros().min(d.trailing_zeros());
    for (name, tensor) in pair {
        check.tensor(name, tensor, &[dtype], ranks)?;
        check.shape(name, tensor, shape)?;
        check.last_dim_contiguous(name, tensor)?;
        check.aligned(name, tensor, vector)?;
        check.offsets_in_32_bits(name, tensor)?;
    }
    if first.numel() / d > i64::from(i32::MAX) {
        return check.fail(first_name, format!("its shape is {shape:?}; at most 2^31 rows can be launched"));
    }
    check.tensor("weight", weight, &[dtype], &[1])?;
    check.shape("weight", weight, &[d])?;
    check.last_dim_contiguous("weight", weight)?;
    check.aligned("weight", weight, vector)
}

/// A row of the fused norms fits the GPU's shared memory.
fn check_shared_memory(check: &Check<'_>, stream: &Stream, input: &RawTensor) -> Result<()> {
    // One row in f32, and a partial sum for each of up to 32 warps.
    let needed = 4 * (input.shape()[1] + 32);
    if needed <= 48 * 1024 {
        return Ok(()); // every GPU has that much
    }
    let cuda = FlashInferRuntime::get()?.cuda();
    let available = cuda.attribute(stream.ordinal(), DeviceAttribute::MaxSharedMemoryPerBlockOptin)?;
    if needed > i64::from(available) {
        return check.fail(
            "input",
            format!(
                "rows of {} elements need {needed} bytes of shared memory; the GPU has {available}",
                input.shape()[1]
            ),
        );
    }
    Ok(())
}

/// Held during each launch. The module sets a kernel's limit of shared memory,
/// which is the process's, to what this launch needs, and then launches: two
/// threads with rows of different lengths would fail each other's launches.
static LAUNCH: Mutex<()> = Mutex::new(());

/// Launches a checked norm; nothing for zero rows.
fn launch<K: Kernel>(
    stream: &Stream,
    tensor: &RawTensor,
    function: &FixedFunction,
    options: &NormOptions,
    kernel: impl FnOnce(bool) -> K,
) -> Result<()> {
    if tensor.numel() == 0 {
        return Ok(());
    }
    let runtime = FlashInferRuntime::get()?;
    let function = function.get(runtime)?;
    let kernel = kernel(enable_pdl(runtime, options.enable_pdl, stream.ordinal())?);
    let _launch = LAUNCH.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: the function has this signature, and the tensors were checked
    // for all that the kernel assumes: device, dtype, shape, last stride,
    // vector alignment and 32-bit offsets.
    unsafe { kernel.call(function, stream) }.map(drop)
}
