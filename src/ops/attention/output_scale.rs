//! Multiplying an output by the scale of its values.
//!
//! Values that were quantized are too small or too large by one factor, and so
//! is the output. FlashAttention 3 takes the factor; after the other kernels,
//! upstream's Python multiplies with another library. This crate does it with
//! a kernel of its own, as PTX, which the driver compiles when it is first used.

use std::ffi::c_void;

use super::spec::AttentionSpec;
use crate::{
    cuda::PtxKernel, dtype::DType, error::Result, ops::check::Check, runtime::FlashInferRuntime,
    stream::Stream, tensor::RawTensor,
};

const PTX: &str = concat!(include_str!("output_scale.ptx"), "\0");
static F16: PtxKernel = PtxKernel::new(PTX, c"scale_f16");
static BF16: PtxKernel = PtxKernel::new(PTX, c"scale_bf16");

const THREADS: u32 = 256;
/// Blocks that keep any GPU busy; each thread takes several pairs.
const MAX_BLOCKS: u64 = 2048;

/// The kernels that scale outputs.
pub(super) struct OutputScale;

impl OutputScale {
    /// Has the kernel compiled with which values are scaled back that the spec
    /// says are quantized.
    pub(super) fn prepare(spec: &AttentionSpec) -> Result<()> {
        if spec.dtype_kv.size() > 1 {
            return Ok(());
        }
        Self::kernel(spec.dtype_o).load(FlashInferRuntime::get()?.cuda()).map(drop)
    }

    /// Has the kernel compiled that a run needs, before anything is launched.
    /// A capture does not allow it.
    pub(super) fn check_ready(check: &Check<'_>, dtype: DType, scale: Option<f32>) -> Result<()> {
        if factor(scale).is_none() {
            return Ok(());
        }
        check.compiled("v_scale", Self::kernel(dtype))
    }

    fn kernel(dtype: DType) -> &'static PtxKernel {
        if dtype == DType::BF16 { &BF16 } else { &F16 }
    }

    /// Enqueues `out *= scale`; nothing if there is none, or it is 1.
    ///
    /// # Safety
    /// `out` must be a contiguous `f16` or `bf16` tensor on the stream's
    /// device, aligned to 4 bytes, of an even number of elements.
    pub(super) unsafe fn apply(stream: &Stream, out: &RawTensor, scale: Option<f32>) -> Result<()> {
        let Some(mut scale) = factor(scale).filter(|_| out.numel() > 0) else { return Ok(()) };
        let (mut data, mut pairs) = (out.data, out.numel() as u64 / 2);
        let blocks = pairs.div_ceil(THREADS.into()).min(MAX_BLOCKS) as u32;
        let mut args: [*mut c_void; 3] =
            [(&raw mut data).cast(), (&raw mut pairs).cast(), (&raw mut scale).cast()];
        let cuda = FlashInferRuntime::get()?.cuda();
        // SAFETY: the kernel takes an address, a 64-bit number and a 32-bit
        // float, and writes that many pairs of elements.
        unsafe { Self::kernel(out.dtype).launch(cuda, stream, [blocks, THREADS], &mut args, &[Some(out)]) }
    }
}

/// What there is to multiply by.
fn factor(scale: Option<f32>) -> Option<f32> {
    scale.filter(|scale| *scale != 1.0)
}
