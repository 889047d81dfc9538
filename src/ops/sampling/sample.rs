//! A whole sampling step, by a kernel of this crate.
//!
//! Upstream's kernels take one seed, and number the rows of a call, so that what a request
//! draws depends on its place in the batch. This one takes a random number for each row, and
//! does in one launch what engines do one after the other.

use std::{ffi::c_void, ptr};

use super::{
    Parameter, check_rows,
    options::{KernelParameter, MIN_P, TEMPERATURE_OR_0, TOP_P},
};
use crate::{
    cuda::PtxKernel,
    dtype::DType,
    error::Result,
    ops::check::Check,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

static SAMPLE: PtxKernel = PtxKernel::new(concat!(include_str!("sample.ptx"), "\0"), c"sample");
const THREADS: u32 = 1024;

/// How [`sample`] draws. Each parameter is one for all rows, or one for each.
///
/// A number that is out of its range is an error. Tensors are not looked at: what the kernel
/// makes of other numbers in them is said below.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct SampleOptions<'a> {
    /// A random number of at least 0 and below 1 for each row, `[rows]`, `f32`, contiguous: the
    /// row's token is the one where the sum of probabilities exceeds it. Numbers beyond count
    /// as the nearest within, NaN as 0.
    pub uniforms: TensorRef<'a>,
    /// What logits are divided by; 0 takes the likeliest token, as [`argmax`](super::argmax)
    /// does, whatever the other parameters are. The default is 1. A tensor is `f32`; less than
    /// 0 and NaN count as 0.
    pub temperature: Parameter<'a>,
    /// How many of the likeliest tokens are kept, and all as likely as the last of them; 0, the
    /// default, keeps all. A tensor is `i32`; less than 0 counts as 0.
    pub top_k: Parameter<'a, u32>,
    /// The fewest of the likeliest tokens are kept whose share of the probability, of all that
    /// the other filters keep, is at least this, and all as likely as the last of them. Above
    /// 0; 1, the default, keeps all. A tensor is `f32`; more counts as 1; of 0, less, and NaN,
    /// only the likeliest are kept.
    pub top_p: Parameter<'a>,
    /// Tokens are kept that are at least this fraction as likely as the likeliest. 0, the
    /// default, keeps all. A tensor is `f32`; less than 0 and NaN count as 0, more than 1 as 1.
    pub min_p: Parameter<'a>,
}

impl<'a> SampleOptions<'a> {
    /// Temperature 1 and no filter, with these random numbers.
    pub fn new(uniforms: TensorRef<'a>) -> Self {
        Self {
            uniforms,
            temperature: Parameter::Value(1.0),
            top_k: Parameter::Value(0),
            top_p: Parameter::Value(1.0),
            min_p: Parameter::Value(0.0),
        }
    }
}

/// Draws the token of each row from its logits: by temperature, then min-p, then top-k, then
/// top-p, in vLLM's order, and then by the row's random number.
///
/// `output` is `[rows]`, `i32` or `i64`; `logits` `[rows, vocab]`, `f32`, contiguous, and of no
/// use afterwards: rows with a temperature above 0 are overwritten. No rows are nothing to do.
///
/// - A row's token depends on its logits and its parameters alone, not on where it is in the
///   batch, nor on what else is: the same numbers give the same token, and so does
///   [`reference::sample`](crate::reference::sample) on the CPU. Make a row's random number of
///   the request's seed and its count of tokens, and a seed gives the same text in any batch.
/// - **−1** is the token of a row that holds NaN, and of one of nothing but −∞, in which no
///   token is allowed. Other rows are not disturbed. Of several +∞ one is drawn.
/// - A token's weight is rounded to a multiple of 2⁻⁴⁰ of the likeliest's, down: tokens less
///   likely than that are never drawn. The random number's own steps, of 2⁻²⁴ where it is
///   made of 24 bits, are coarser.
/// - One launch, which allocates nothing. In a captured CUDA graph everything is read anew:
///   write other random numbers into `uniforms` before each replay.
///
/// Call once before the first capture into a CUDA graph, because the first call compiles the
/// kernel.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before anything is launched: a
/// device, stream, dtype, shape, stride or alignment does not fit, there are 2³² elements, a
/// parameter is out of its range, or the stream is being captured and the kernel is not compiled
/// yet. Else what CUDA said.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{Stream, gpu::Tensor, sampling::*};
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let (rows, vocab) = (3, 32000);
/// let mut logits = Tensor::<f32>::zeros(&stream, &[rows, vocab])?;
/// let mut tokens = Tensor::<i32>::zeros(&stream, &[rows])?;
///
/// // Of each request: a random number, and here a temperature. The last one is greedy.
/// let uniforms = Tensor::from_slice(&stream, &[rows], &[0.25f32, 0.875, 0.0])?;
/// let temperatures = Tensor::from_slice(&stream, &[rows], &[0.7f32, 1.0, 0.0])?;
///
/// let mut options = SampleOptions::new(uniforms.view());
/// options.temperature = Parameter::PerRow(temperatures.view());
/// options.top_p = 0.9.into();
/// sample(&stream, &mut tokens.view_mut(), &mut logits.view_mut(), &options)?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
pub fn sample(
    stream: &Stream,
    output: &mut TensorMut<'_>,
    logits: &mut TensorMut<'_>,
    options: &SampleOptions<'_>,
) -> Result<()> {
    let check = Check::new("sample", stream)?;
    let parameters = check_sample(&check, &logits.raw, options)?;
    let [rows, vocab] = [0, 1].map(|axis| logits.raw.shape()[axis]);
    let places = &output.raw;
    check.plain("output", places, &[DType::I32, DType::I64], &[rows], places.dtype.size())?;
    if rows == 0 {
        return Ok(());
    }
    check.compiled("logits", &SAMPLE)?;
    let (temperatures, mut temperature) = parameters.temperature;
    let (top_ks, mut top_k) = parameters.top_k;
    let (top_ps, mut top_p) = parameters.top_p;
    let (min_ps, mut min_p) = parameters.min_p;
    let tensors = [
        Some(&logits.raw),
        Some(places),
        Some(&options.uniforms.raw),
        temperatures.as_ref(),
        top_ks.as_ref(),
        top_ps.as_ref(),
        min_ps.as_ref(),
    ];
    let address = |tensor: Option<&RawTensor>| tensor.map_or(ptr::null_mut(), |tensor| tensor.data);
    let mut addresses = tensors.map(address);
    let [logits, output, uniforms, temperatures, top_ks, top_ps, min_ps] =
        addresses.each_mut().map(|address| (address as *mut *mut c_void).cast::<c_void>());
    let (mut vocab, mut wide) = (vocab as u32, u32::from(places.dtype == DType::I64));
    let mut args: [*mut c_void; 13] = [
        logits,
        output,
        uniforms,
        temperatures,
        (&raw mut temperature).cast(),
        top_ks,
        (&raw mut top_k).cast(),
        top_ps,
        (&raw mut top_p).cast(),
        min_ps,
        (&raw mut min_p).cast(),
        (&raw mut vocab).cast(),
        (&raw mut wide).cast(),
    ];
    // SAFETY: the kernel takes seven addresses, of which those of parameters may be null, and
    // six numbers of 32 bits, in this order. A block reads and writes a row of `vocab` numbers,
    // no more than 2²³, reads the row's number of each tensor that there is, and writes the row's
    // place. No number decides an address, or that a loop goes on.
    unsafe {
        SAMPLE.launch(FlashInferRuntime::get()?.cuda(), stream, [rows as u32, THREADS], &mut args, &tensors)
    }
}

/// The parameters of [`sample`] as its kernel takes them.
pub(crate) struct SampleParameters {
    temperature: KernelParameter<f32>,
    /// 0 keeps all.
    top_k: KernelParameter<i32>,
    top_p: KernelParameter<f32>,
    min_p: KernelParameter<f32>,
}

/// All that the kernel assumes but where tokens go.
pub(crate) fn check_sample(
    check: &Check<'_>,
    logits: &RawTensor,
    options: &SampleOptions<'_>,
) -> Result<SampleParameters> {
    let vocab = check_rows(check, "logits", logits, &[DType::F32], 2)?;
    let rows = logits.shape()[0];
    check.plain("uniforms", &options.uniforms.raw, &[DType::F32], &[rows], 4)?;
    let float = |parameter: Parameter<'_>, name, rule| -> Result<KernelParameter<f32>> {
        let (tensor, number) = parameter.float(check, name, rule, [rows; 2])?;
        Ok((tensor, number as f32))
    };
    let (top_ks, top_k) = options.top_k.check(check, "top_k", DType::I32, [rows; 2])?;
    Ok(SampleParameters {
        temperature: float(options.temperature, "temperature", TEMPERATURE_OR_0)?,
        // As many as there are tokens keep all, too.
        top_k: (top_ks, top_k.map_or(0, |top_k| i64::from(top_k).min(vocab) as i32)),
        top_p: float(options.top_p, "top_p", TOP_P)?,
        min_p: float(options.min_p, "min_p", MIN_P)?,
    })
}
