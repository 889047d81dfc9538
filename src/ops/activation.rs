//! Gated activations, in FlashInfer's modules `silu_and_mul`, `gelu_and_mul`
//! and `gelu_tanh_and_mul`.
//!
//! Each takes `[.., 2 · d]` and gives `[.., d]`: the activation of the first
//! half of each row, times the second half, computed in `f32`. Tensors are `f16`
//! or `bf16`, both the same, and contiguous; `d` is a multiple of 8. Source of
//! the contract: `flashinfer/jit/activation.py` and
//! `include/flashinfer/activation.cuh` of FlashInfer 0.6.13.
//!
//! ```no_run
//! # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use flashinfer_rs::{
//!     Stream,
//!     activation::{self, ActivationOptions},
//!     gpu::Tensor,
//! };
//! use half::bf16;
//! let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
//! let gate_and_up = Tensor::from_slice(&stream, &[4, 2 * 256], &[bf16::ONE; 4 * 2 * 256])?;
//! let mut out = Tensor::<bf16>::zeros(&stream, &[4, 256])?;
//! let options = ActivationOptions::default();
//! activation::silu_and_mul(&stream, &mut out.view_mut(), &gate_and_up.view(), &options)?;
//! # Ok(()) }
//! # #[cfg(not(feature = "cudarc"))] fn main() {}
//! ```

use super::{FixedFunction, check::Check, enable_pdl};
use crate::{
    dtype::DType,
    error::Result,
    ffi::{DlTensor, Kernel, Signature, kernels},
    module::ModuleName,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    struct ActAndMul = "silu_and_mul"(out: Tensor, input: Tensor, enable_pdl: Bool) -> "void";
}

const GELU: &[Signature] = &[Signature { function: "gelu_and_mul", ..ActAndMul::SIGNATURES[0] }];
const GELU_TANH: &[Signature] = &[Signature { function: "gelu_tanh_and_mul", ..ActAndMul::SIGNATURES[0] }];

impl ModuleName {
    /// `silu(a) · b`.
    pub const SILU_AND_MUL: Self = Self::fixed("silu_and_mul");
    /// `gelu(a) · b`.
    pub const GELU_AND_MUL: Self = Self::fixed("gelu_and_mul");
    /// `gelu(a) · b`, by the approximation with `tanh`.
    pub const GELU_TANH_AND_MUL: Self = Self::fixed("gelu_tanh_and_mul");
}

pub(super) const SIGNATURES: &[(&str, &[Signature])] =
    &[("silu_and_mul", ActAndMul::SIGNATURES), ("gelu_and_mul", GELU), ("gelu_tanh_and_mul", GELU_TANH)];

static SILU_AND_MUL: FixedFunction = FixedFunction::of(ModuleName::SILU_AND_MUL, ActAndMul::SIGNATURES);
static GELU_AND_MUL: FixedFunction = FixedFunction::of(ModuleName::GELU_AND_MUL, GELU);
static GELU_TANH_AND_MUL: FixedFunction = FixedFunction::of(ModuleName::GELU_TANH_AND_MUL, GELU_TANH);

/// Options of the activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ActivationOptions {
    /// Programmatic dependent launch; `None` uses it where the GPU has it
    /// (compute capability 9.0 and newer).
    pub enable_pdl: Option<bool>,
}

/// `out = silu(a) · b`, where `silu(x) = x / (1 + exp(−x))` and each row of
/// `input` is `a` and then `b`.
///
/// `input` is `[.., 2 · d]` with up to five dimensions, `out` is `[.., d]`. No
/// rows are nothing to do. It cannot be done in place.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before
/// anything is launched: a device, stream, dtype or shape does not fit, a
/// tensor is not contiguous or not aligned to 16 bytes, `d` is no multiple of 8
/// or 2³⁰ and more, or there are 2³¹ rows or more. Else what the module or CUDA
/// said.
pub fn silu_and_mul(
    stream: &Stream,
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    options: &ActivationOptions,
) -> Result<()> {
    act_and_mul(&SILU_AND_MUL, stream, out, input, options)
}

/// `out = gelu(a) · b`, where `gelu(x) = x / 2 · (1 + erf(x / √2))`; else as
/// [`silu_and_mul`].
///
/// # Errors
/// As [`silu_and_mul`].
pub fn gelu_and_mul(
    stream: &Stream,
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    options: &ActivationOptions,
) -> Result<()> {
    act_and_mul(&GELU_AND_MUL, stream, out, input, options)
}

/// [`gelu_and_mul`] by the approximation
/// `gelu(x) = x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))`.
///
/// The kernel takes the hardware's `tanh`, which is good to about 11 bits.
///
/// # Errors
/// As [`silu_and_mul`].
pub fn gelu_tanh_and_mul(
    stream: &Stream,
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    options: &ActivationOptions,
) -> Result<()> {
    act_and_mul(&GELU_TANH_AND_MUL, stream, out, input, options)
}

fn act_and_mul(
    function: &FixedFunction,
    stream: &Stream,
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    options: &ActivationOptions,
) -> Result<()> {
    if check_act_and_mul(&Check::new(function.name(), stream)?, &out.raw, &input.raw)? == 0 {
        return Ok(());
    }
    let runtime = FlashInferRuntime::get()?;
    let kernel = ActAndMul {
        out: DlTensor::new(&out.raw),
        input: input.into(),
        enable_pdl: enable_pdl(runtime, options.enable_pdl, stream.ordinal())?,
    };
    let function = function.get(runtime)?;
    // The launcher changes the current device, and leaves it so.
    let _device = runtime.cuda().on_device_of(stream)?;
    // SAFETY: the function has this signature; the tensors were checked for
    // device, dtype, shape, contiguity and alignment, rows start at multiples
    // of 16 bytes, and the numbers of rows and elements fit the launch. The
    // kernel computes offsets in 64 bits.
    runtime.cuda().watch_launch(|| unsafe { kernel.call(function, stream) }.map(drop))
}

/// All that the kernels assume. Returns the number of rows.
pub(crate) fn check_act_and_mul(check: &Check<'_>, out: &RawTensor, input: &RawTensor) -> Result<i64> {
    check.tensor("input", input, &[DType::F16, DType::BF16], &[1, 2, 3, 4, 5])?;
    check.tensor("out", out, &[input.dtype], &[input.shape().len()])?;
    let Some(d) = halved(input.shape(), out.shape()) else {
        return check.fail(
            "out",
            format!(
                "its shape is {:?}, that of input {:?}; expected half of input's last dimension, and the others alike",
                out.shape(),
                input.shape()
            ),
        );
    };
    if d == 0 || d % 8 != 0 || d >= 1 << 30 {
        return check.fail(
            "out",
            format!("its rows have {d} elements; the kernel takes multiples of 8 below 2^30, and not 0"),
        );
    }
    for (name, tensor) in [("input", input), ("out", out)] {
        check.contiguous(name, tensor)?;
        check.aligned(name, tensor, 16)?;
    }
    let rows = out.numel() / d;
    if rows > i64::from(i32::MAX) {
        return check.fail("input", format!("{rows} rows; a launch has fewer than 2^31"));
    }
    Ok(rows)
}

/// The last dimension of `out`, if the shape is that of `input` but for the
/// last dimension, which is twice as large there.
pub(crate) fn halved(input: &[i64], out: &[i64]) -> Option<i64> {
    let ((&wide, rows), (&d, out_rows)) = (input.split_last()?, out.split_last()?);
    (rows == out_rows && d.checked_mul(2) == Some(wide)).then_some(d)
}
