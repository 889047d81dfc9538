//! The layer norm.

use super::{NormOptions, SHARED_MEMORY, check_plain, check_shared_memory, launch_watched};
use crate::{
    dtype::DType,
    error::Result,
    ffi::{Kernel, Signature, TensorObject, kernels},
    module::ModuleName,
    ops::{FixedFunction, check::Check},
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    struct LayerNorm = "layernorm"(
        out: TensorObject, input: TensorObject, gamma: TensorObject, beta: TensorObject, eps: Float,
    ) -> "void";
}

pub(super) const SIGNATURES: &[Signature] = LayerNorm::SIGNATURES;

static LAYERNORM: FixedFunction = FixedFunction::of(ModuleName::NORM, SIGNATURES);

/// More shared memory than the kernel has of its own, beside the row.
const OWN_SHARED_MEMORY: i64 = 1024;

/// `out = (input − mean) / sqrt(variance + eps) · gamma + beta`, over the last
/// dimension.
///
/// `input` and `out` are `[rows, d]` and `bf16`, the only dtype there is;
/// `gamma` and `beta` are `[d]` and `f32`. All are contiguous. Zero rows are
/// nothing to do. Of the options, `eps` counts.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before
/// anything is launched: a device, stream, dtype, shape, stride or alignment
/// does not fit; the tensor has 2³¹ elements or more; a row does not fit the
/// GPU's shared memory (`2 · d` bytes and 1 KiB), or may need just more than the
/// 48 KiB that there are unasked, where the launcher does not ask (`d` from 24065
/// to 24575). Else what the module or CUDA said.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{gpu::Tensor, norm, Stream};
/// use half::bf16;
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let input = Tensor::from_slice(&stream, &[4, 128], &[bf16::ONE; 4 * 128])?;
/// let gamma = Tensor::from_slice(&stream, &[128], &[1f32; 128])?;
/// let beta = Tensor::<f32>::zeros(&stream, &[128])?;
/// let mut out = Tensor::<bf16>::zeros(&stream, &[4, 128])?;
/// norm::layernorm(
///     &stream,
///     &mut out.view_mut(),
///     &input.view(),
///     &gamma.view(),
///     &beta.view(),
///     &norm::NormOptions::default(),
/// )?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
pub fn layernorm(
    stream: &Stream,
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    gamma: &TensorRef<'_>,
    beta: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    let check = Check::new(LAYERNORM.name(), stream)?;
    check_layernorm(&check, &out.raw, &input.raw, [&gamma.raw, &beta.raw])?;
    if input.numel() == 0 {
        return Ok(());
    }
    let kernel = LayerNorm {
        out: TensorObject::new(&out.raw),
        input: input.into(),
        gamma: gamma.into(),
        beta: beta.into(),
        eps: options.eps,
    };
    // SAFETY: the function has this signature, and the tensors were checked
    // for all that the kernel assumes: device, dtype, shape, contiguity,
    // alignment, 32-bit offsets, and a row that fits the shared memory.
    unsafe { launch_watched(&LAYERNORM, stream, &kernel) }
}

/// All that the kernel assumes.
pub(crate) fn check_layernorm(
    check: &Check<'_>,
    out: &RawTensor,
    input: &RawTensor,
    [gamma, beta]: [&RawTensor; 2],
) -> Result<()> {
    check.tensor("input", input, &[DType::BF16], &[2])?;
    let (shape, d) = (input.shape(), input.shape()[1]);
    if d == 0 || shape[0] > i64::from(i32::MAX) || input.numel() > i64::from(i32::MAX) {
        return check.fail(
            "input",
            format!("its shape is {shape:?}; expected rows that are not empty, and less than 2^31 elements"),
        );
    }
    // Rows of an even length are loaded two elements at a time.
    let vector = if d % 2 == 0 { 2 } else { 1 };
    check_plain(check, "input", input, DType::BF16, shape, 2 * vector)?;
    check_plain(check, "out", out, DType::BF16, shape, 2 * vector)?;
    check_plain(check, "gamma", gamma, DType::F32, &[d], 4 * vector)?;
    check_plain(check, "beta", beta, DType::F32, &[d], 4 * vector)?;
    let row = 2 * d;
    if row < SHARED_MEMORY && row + OWN_SHARED_MEMORY > SHARED_MEMORY {
        return check.fail(
            "input",
            format!(
                "rows of {d} elements need more shared memory than a launch has unasked, and the launcher \
                 asks from 24576 elements on; use rows of another length"
            ),
        );
    }
    check_shared_memory(check, d, row + OWN_SHARED_MEMORY)
}
