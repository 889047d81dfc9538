//! The largest logit, by a kernel of this crate.

use std::ffi::c_void;

use super::{KERNEL_DTYPES, check_rows};
use crate::{
    cuda::PtxKernel,
    dtype::DType,
    error::Result,
    ops::check::Check,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{TensorMut, TensorRef},
};

const PTX: &str = concat!(include_str!("argmax.ptx"), "\0");
static F32: PtxKernel = PtxKernel::new(PTX, c"argmax_f32");
static F16: PtxKernel = PtxKernel::new(PTX, c"argmax_f16");
static BF16: PtxKernel = PtxKernel::new(PTX, c"argmax_bf16");

const THREADS: u32 = 1024;

/// The token of the largest logit of each row, the first of those that are
/// equal; **−1 where a logit is NaN**, as all are when numbers overflowed in a
/// model. One kernel, and no random numbers: what greedy decoding takes.
///
/// `logits` is `[rows, vocab]`, `f32`, `f16` or `bf16`, contiguous; `output`
/// `[rows]`, `i32` or `i64`. Infinities are ordered as numbers are, and −0
/// equals 0, so of a row of −∞ the token is 0. No rows are nothing to do.
///
/// Call once before the first capture into a CUDA graph, because the first call
/// compiles the kernel.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before anything
/// is launched: a device, stream, dtype, shape, stride or alignment does not
/// fit, there are 2³² elements, or the stream is being captured and the kernel
/// is not compiled yet. Else what CUDA said.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{Stream, gpu::Tensor, sampling::argmax};
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let logits = Tensor::<f32>::zeros(&stream, &[8, 32000])?;
/// let mut tokens = Tensor::<i32>::zeros(&stream, &[8])?;
/// argmax(&stream, &mut tokens.view_mut(), &logits.view())?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
pub fn argmax(stream: &Stream, output: &mut TensorMut<'_>, logits: &TensorRef<'_>) -> Result<()> {
    let check = Check::new("argmax", stream)?;
    let vocab = check_rows(&check, "logits", &logits.raw, &KERNEL_DTYPES, 2)?;
    let rows = logits.raw.shape()[0];
    let places = &output.raw;
    check.plain("output", places, &[DType::I32, DType::I64], &[rows], places.dtype.size())?;
    if rows == 0 {
        return Ok(());
    }
    let kernel = match logits.raw.dtype {
        DType::F16 => &F16,
        DType::BF16 => &BF16,
        _ => &F32,
    };
    check.compiled("logits", kernel)?;
    let tensors = [Some(&logits.raw), Some(places)];
    let (mut input, mut output) = (logits.raw.data, places.data);
    let (mut vocab, mut wide) = (vocab as u32, u32::from(places.dtype == DType::I64));
    let mut args: [*mut c_void; 4] =
        [(&raw mut input).cast(), (&raw mut output).cast(), (&raw mut vocab).cast(), (&raw mut wide).cast()];
    // SAFETY: the kernel takes two addresses and two 32-bit numbers. A block
    // reads a row of `vocab` numbers of this dtype, and writes the row's place.
    unsafe {
        kernel.launch(FlashInferRuntime::get()?.cuda(), stream, [rows as u32, THREADS], &mut args, &tensors)
    }
}
