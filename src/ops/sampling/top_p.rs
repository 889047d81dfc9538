//! Renormalizing by `top_p`, by a kernel of this crate.
//!
//! Upstream's kernel for rows shorter than 2048 narrows a range by arithmetic on
//! floats until its ends meet, which those of neighbouring numbers never do, nor
//! those of infinite ones. Its others take `top_p` of a row's sum in place of 1,
//! and need scratch memory. This one searches among the bits of the numbers, with
//! sums of integers: for any numbers it ends, and gives the same each time.

use std::{ffi::c_void, ptr};

use super::{
    Parameter, check_like, check_rows,
    options::{KernelParameter, TOP_P},
};
use crate::{
    cuda::PtxKernel,
    dtype::DType,
    error::Result,
    ffi::{ArgKind, Signature},
    ops::check::Check,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

/// Upstream's function. It is declared so that a change of the wheel is seen, and
/// not called.
pub(super) const UPSTREAM: &[Signature] = &[Signature {
    function: "top_p_renorm_probs",
    since: "0.6.13",
    args: &[
        ("probs", ArgKind::Tensor),
        ("renorm_probs", ArgKind::Tensor),
        ("maybe_top_p_arr", ArgKind::OptTensor),
        ("top_p", ArgKind::Float),
        ("is_deterministic", ArgKind::Bool),
        ("workspace", ArgKind::Tensor),
    ],
    result: "void",
}];

static RENORM: PtxKernel = PtxKernel::new(concat!(include_str!("top_p.ptx"), "\0"), c"top_p_renorm");
const THREADS: u32 = 1024;

/// Keeps the fewest of the largest probabilities of each row that together
/// reach `top_p`, and all equal to the smallest of them; divides them by their
/// sum, and makes the others 0. Of a row that does not reach `top_p`, and with
/// 1, it keeps everything.
///
/// `out` and `probs` are `[rows, vocab]`, `f32`, contiguous. `top_p` is in
/// `(0, 1]`; a tensor of them is `f32`: more than 1 in it counts as 1, and 0,
/// less, or NaN keeps nothing. No rows are nothing to do.
///
/// Numbers may be any: NaN and negative ones count as 0, and a row that holds
/// infinity becomes NaN there, and 0 elsewhere. Numbers are summed as multiples of
/// 2⁻⁴⁵ of the largest one (2⁻³⁹ in the longest rows), rounded down, so that the
/// order does not matter.
///
/// Call once before the first capture into a CUDA graph, because the first call
/// compiles the kernel.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before anything
/// is launched: a device, stream, dtype, shape, stride or alignment does not
/// fit, there are 2³² elements, `top_p` is out of its range, or the stream is
/// being captured and the kernel is not compiled yet. Else what CUDA said.
pub fn top_p_renorm_probs(
    stream: &Stream,
    out: &mut TensorMut<'_>,
    probs: &TensorRef<'_>,
    top_p: Parameter<'_>,
) -> Result<()> {
    let check = Check::new("top_p_renorm_probs", stream)?;
    let (top_ps, top_p) = check_top_p_renorm_probs(&check, &out.raw, &probs.raw, top_p)?;
    let [rows, vocab] = [0, 1].map(|axis| probs.raw.shape()[axis]);
    if rows == 0 {
        return Ok(());
    }
    check.compiled("probs", &RENORM)?;
    let (mut input, mut output) = (probs.raw.data, out.raw.data);
    let tensors = [Some(&probs.raw), Some(&out.raw), top_ps.as_ref()];
    let mut top_ps = top_ps.map_or(ptr::null_mut(), |top_ps| top_ps.data);
    let (mut top_p, mut vocab) = (top_p as f32, vocab as u32);
    let mut args: [*mut c_void; 5] = [
        (&raw mut input).cast(),
        (&raw mut output).cast(),
        (&raw mut top_ps).cast(),
        (&raw mut top_p).cast(),
        (&raw mut vocab).cast(),
    ];
    // SAFETY: the kernel takes three addresses, a 32-bit float and a 32-bit
    // number, no more than 2²³. A block reads a row of `vocab` numbers and the
    // row's `top_p`, if there is a tensor of them, and writes as many numbers.
    unsafe {
        RENORM.launch(FlashInferRuntime::get()?.cuda(), stream, [rows as u32, THREADS], &mut args, &tensors)
    }
}

/// All that the kernel assumes.
pub(crate) fn check_top_p_renorm_probs(
    check: &Check<'_>,
    out: &RawTensor,
    probs: &RawTensor,
    top_p: Parameter<'_>,
) -> Result<KernelParameter<f64>> {
    check_rows(check, "probs", probs, &[DType::F32], 2)?;
    check_like(check, "out", out, probs)?;
    top_p.float(check, "top_p", TOP_P, [probs.shape()[0]; 2])
}
