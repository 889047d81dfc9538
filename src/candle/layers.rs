//! RMS norm and gated activation.

use candle_core::{DType, Result, Shape, Tensor};

use super::op::{Apply, Op, check_dtype, check_like, fitting, invalid, rows};
use crate::{
    activation::{self, ActivationOptions},
    norm::{self, NormOptions},
    reference,
    stream::Stream,
    tensor::{TensorMut, TensorRef},
};

const RMS_NORM: &str = "rms_norm";
const SILU_AND_MUL: &str = "silu_and_mul";

struct RmsNorm {
    options: NormOptions,
    output: (Shape, DType),
}

impl Op<2> for RmsNorm {
    const NAME: &'static str = RMS_NORM;

    fn output(&self) -> (Shape, DType) {
        self.output.clone()
    }

    fn on_cpu(&self, out: &mut TensorMut<'_>, [x, weight]: [TensorRef<'_>; 2]) -> crate::Result<()> {
        reference::rmsnorm(out, &x, &weight, &self.options)
    }

    fn on_cuda(
        &self,
        stream: &Stream,
        out: &mut TensorMut<'_>,
        [x, weight]: [TensorRef<'_>; 2],
    ) -> crate::Result<()> {
        norm::rmsnorm(stream, out, &x, &weight, &self.options)
    }
}

/// `x / sqrt(mean(x²) + eps) · weight`, over the last dimension, with the
/// signature of `candle_nn::ops::rms_norm`.
///
/// `x` has any dimensions before the last, `weight` is `(d)`, both of one dtype:
/// `f16` or `bf16`, on the CPU also `f32` and `f64`. The sum is computed in
/// `f32` on CUDA, in `f64` on the CPU. The result is contiguous. A tensor of two
/// or three dimensions may have any strides that are multiples of 16 bytes; what
/// kernels do not take is copied. Nothing waits. There is no gradient.
///
/// # Errors
/// Devices, dtypes or shapes do not fit; the last dimension is 0. Nothing was
/// launched. Else what the module or CUDA said.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[[3f32, 4.0], [0.0, 0.0]], &Device::Cpu)?;
/// let weight = Tensor::new(&[1f32, 2.0], &Device::Cpu)?;
/// let y = flashinfer_rs::candle::rms_norm(&x, &weight, 1e-6)?.to_vec2::<f32>()?;
/// assert!((y[0][0] - 3.0 / 12.5f32.sqrt()).abs() < 1e-5 && y[1] == [0.0, 0.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    check_dtype(RMS_NORM, "x", x.dtype(), x.device())?;
    let Some(&d) = x.dims().last().filter(|&&d| d > 0) else {
        return invalid(
            RMS_NORM,
            "x",
            format!("its shape is {:?}; there must be something to norm", x.dims()),
        );
    };
    check_like(RMS_NORM, "weight", weight, &[d], x.dtype(), x.device())?;
    if x.elem_count() == 0 {
        return Ok(x.clone());
    }
    let strided = !x.is_contiguous() && matches!(x.rank(), 2 | 3);
    let input = if strided { fitting(x)? } else { rows(x)? };
    let options = NormOptions::with_eps(eps.into());
    let op = RmsNorm { options, output: (input.shape().clone(), x.dtype()) };
    input.apply_op2_no_bwd(&fitting(weight)?, &Apply(op))?.reshape(x.shape())
}

struct SiluAndMul {
    output: (Shape, DType),
}

impl Op<1> for SiluAndMul {
    const NAME: &'static str = SILU_AND_MUL;

    fn output(&self) -> (Shape, DType) {
        self.output.clone()
    }

    fn on_cpu(&self, out: &mut TensorMut<'_>, [x]: [TensorRef<'_>; 1]) -> crate::Result<()> {
        reference::silu_and_mul(out, &x, &ActivationOptions::default())
    }

    fn on_cuda(
        &self,
        stream: &Stream,
        out: &mut TensorMut<'_>,
        [x]: [TensorRef<'_>; 1],
    ) -> crate::Result<()> {
        activation::silu_and_mul(stream, out, &x, &ActivationOptions::default())
    }
}

/// `silu(gate) · up`, where each row of `x` is `gate` and then `up`: from
/// `(…, 2 · d)` to `(…, d)`.
///
/// In candle's terms `x.chunk(2, D::Minus1)` is gate and up, and the result is
/// `gate.silu()? * up`; a gate and an up projection whose weights are joined, the
/// gate's first, give such an `x` in one multiplication. `x` is `f16` or `bf16`
/// with `d` a multiple of 8, on the CPU also `f32` and `f64` with any `d`. What
/// is not contiguous is copied. Nothing waits. There is no gradient.
///
/// # Errors
/// The dtype or the last dimension does not fit. Nothing was launched. Else what
/// the module or CUDA said.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let gate_and_up = Tensor::new(&[[0f32, 20.0, 3.0, 4.0]], &Device::Cpu)?;
/// let y = flashinfer_rs::candle::silu_and_mul(&gate_and_up)?.to_vec2::<f32>()?;
/// assert!(y[0][0] == 0.0 && (y[0][1] - 80.0).abs() < 1e-4);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn silu_and_mul(x: &Tensor) -> Result<Tensor> {
    check_dtype(SILU_AND_MUL, "x", x.dtype(), x.device())?;
    let mut dims = x.dims().to_vec();
    let Some(last) = dims.last_mut().filter(|last| **last > 0 && last.is_multiple_of(2)) else {
        let problem = format!("its shape is {:?}; the last dimension is two halves", x.dims());
        return invalid(SILU_AND_MUL, "x", problem);
    };
    *last /= 2;
    let d = *last;
    if x.elem_count() == 0 {
        return x.narrow(x.rank() - 1, 0, d);
    }
    let input = rows(x)?;
    let op = SiluAndMul { output: ((input.dims()[0], d).into(), x.dtype()) };
    input.apply_op1_no_bwd(&Apply(op))?.reshape(dims)
}
