//! From logits to probabilities, and filters that write matrices.

use std::sync::{Mutex, PoisonError};

use super::{
    KERNEL_DTYPES, Parameter, SamplingWorkspace, check_like, check_rows, function,
    options::{KernelParameter, TEMPERATURE},
    workspace::check_room,
};
use crate::{
    dtype::DType,
    error::Result,
    ffi::{DlTensor, Kernel, Signature, kernels},
    ops::{FixedFunction, check::Check, enable_pdl, topk::check_row_bytes},
    runtime::FlashInferRuntime,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    pub(super) struct Softmax = "softmax"(
        workspace: Tensor, logits: Tensor, output: Tensor, maybe_temperature_arr: OptTensor, temperature: Float,
        enable_pdl: Bool,
    ) -> "void";
    pub(super) struct TopKRenorm = "top_k_renorm_probs" {
        input: Tensor, output: Tensor, maybe_top_k_arr: OptTensor, top_k: Int, is_deterministic: Bool,
        row_states: Tensor,
    } {
        "0.6.13": (input, output, maybe_top_k_arr, top_k, row_states) -> "void";
        "0.7.1": (input, output, maybe_top_k_arr, top_k, is_deterministic, row_states) -> "void";
    }
}

/// The mask takes what the first renormalization takes.
pub(super) const TOP_K_MASK: &[Signature] =
    &[Signature { function: "top_k_mask_logits", ..TopKRenorm::SIGNATURES[0] }];

static SOFTMAX: FixedFunction = function(Softmax::SIGNATURES);
static TOP_K_RENORM: FixedFunction = function(TopKRenorm::SIGNATURES);
static TOP_K_MASK_LOGITS: FixedFunction = function(TOP_K_MASK);

/// What a block of radix top-k has in its shared memory before its part of a
/// row: histograms.
const HISTOGRAM_BYTES: i64 = 2080;
/// What a block of `top_k_renorm_probs` has there besides, at most: two of
/// CUB's `BlockReduce`. Its launcher does not count them.
const SUM_BYTES: i64 = 512;

/// Held during launches of kernels whose need of shared memory depends on the
/// vocabulary. The module sets a kernel's limit, which is the process's, and
/// then launches: two threads with other vocabularies would fail each other's
/// launches.
static LAUNCH: Mutex<()> = Mutex::new(());

/// Options of [`softmax`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct SoftmaxOptions<'a> {
    /// What logits are divided by. The default is 1. In a tensor, 0 makes a
    /// row uniform.
    pub temperature: Parameter<'a>,
    /// Programmatic dependent launch; `None` uses it where the GPU has it
    /// (compute capability 9.0 and newer), but not with a tensor of
    /// temperatures: kernels read that before they wait for the kernel in
    /// front of them, which may still be writing it.
    pub enable_pdl: Option<bool>,
}

impl Default for SoftmaxOptions<'_> {
    fn default() -> Self {
        Self { temperature: Parameter::Value(1.0), enable_pdl: None }
    }
}

impl<'a> SoftmaxOptions<'a> {
    /// The default options with another temperature.
    pub fn with_temperature(temperature: impl Into<Parameter<'a>>) -> Self {
        Self { temperature: temperature.into(), ..Self::default() }
    }
}

/// `out = softmax(logits / temperature)`, over the last dimension, on the
/// workspace's stream.
///
/// Both are `[rows, vocab]`, `f32`, contiguous. A logit of -∞ has probability
/// 0; a row of nothing else becomes NaN, as one with +∞ may. No rows are
/// nothing to do.
///
/// With modules of 0.6, all probabilities of a row may be off by one factor where
/// its largest logit over the temperature is a large number: of up to 1.002 at
/// 42000, and 2.7 at 3·10⁷. Rows whose largest logit is 0 are right
/// (`docs/soundness.md`, "What a kernel itself gets wrong").
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before
/// anything is launched: a device, stream, dtype, shape, stride or alignment
/// does not fit, there are 2³² elements, the workspace is too small, or the
/// temperature is not a finite number above 0. Else what the module or CUDA
/// said.
pub fn softmax(
    workspace: &mut SamplingWorkspace,
    out: &mut TensorMut<'_>,
    logits: &TensorRef<'_>,
    options: &SoftmaxOptions<'_>,
) -> Result<()> {
    softmax_of(workspace, &out.raw, &logits.raw, options)
}

/// [`softmax`], which may replace the logits if the module [does](replaces_logits).
pub(super) fn softmax_of(
    workspace: &mut SamplingWorkspace,
    out: &RawTensor,
    logits: &RawTensor,
    options: &SoftmaxOptions<'_>,
) -> Result<()> {
    let (scratch, _, room) = workspace.parts();
    let stream = scratch.stream();
    let check = Check::new("softmax", stream)?;
    let (temperatures, temperature) = check_softmax(&check, out, logits, options.temperature)?;
    check_room(&check, room, [logits.shape()[0], logits.shape()[1]])?;
    if logits.shape()[0] == 0 {
        return Ok(());
    }
    let runtime = FlashInferRuntime::get()?;
    let function = SOFTMAX.get(runtime)?;
    let asked = options.enable_pdl.or(temperatures.map(|_| false));
    let scratch = scratch.as_bytes()?;
    let kernel = Softmax {
        workspace: DlTensor::new(&scratch),
        logits: DlTensor::new(logits),
        output: DlTensor::new(out),
        maybe_temperature_arr: temperatures.as_ref().map(DlTensor::new),
        temperature,
        enable_pdl: enable_pdl(runtime, asked, stream.ordinal())?,
    };
    let _launch = LAUNCH.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: tensors were checked for all that the kernels assume: device,
    // dtype, shape, contiguity, vector alignment, 32-bit offsets, a temperature
    // for each row. The scratch memory is large enough, and used on this
    // stream only, by one call at a time. Numbers decide no address.
    unsafe { kernel.call(function, stream) }.map(drop)
}

/// Whether [`softmax_of`] may replace the logits. With the kernels of 0.6 each thread
/// reads what it writes. Those of 0.7 write parts of results into outputs first, and
/// refuse it; both have come by the version in which `top_k_renorm_probs` takes
/// `is_deterministic`.
pub(super) fn replaces_logits(runtime: &FlashInferRuntime) -> Result<bool> {
    Ok(TOP_K_RENORM.get(runtime)?.variant() == 0)
}

/// All that the kernels of [`softmax`] assume but the scratch memory.
pub(crate) fn check_softmax(
    check: &Check<'_>,
    out: &RawTensor,
    logits: &RawTensor,
    temperature: Parameter<'_>,
) -> Result<KernelParameter<f64>> {
    check_rows(check, "logits", logits, &[DType::F32], 2)?;
    check_like(check, "out", out, logits)?;
    temperature.float(check, "temperature", TEMPERATURE, [logits.shape()[0]; 2])
}

/// Keeps the `top_k` largest probabilities of each row, and all equal to the
/// smallest of them; divides them by their sum, and makes the others 0. On the
/// workspace's stream.
///
/// `out` and `probs` are `[rows, vocab]`, both `f32`, `f16` or `bf16`,
/// contiguous. `top_k` is at least 1; a tensor of them is `i32`, and 0 in it
/// keeps nothing. No rows are nothing to do. A sum below 10⁻⁸ counts as 10⁻⁸.
///
/// Where blocks share a row (on an H200 from 57593 elements of `f32` on, or 115185 of 16 bits), modules of 0.7
/// add up their sums as multiples of 2⁻⁴⁴, so that results are the same each time: what is kept of a row must
/// add up to less than 2²⁰, else they are wrong, and below 10⁻⁶ they are less exact. Those of 0.6 add them up in
/// the order in which blocks come: where three or more share a row, results may differ in their last bits from one
/// run to the next. [`top_k_mask_logits`] and [`softmax`] after it make the same ones each time.
///
/// # Errors
/// As [`softmax`]; also when a row needs more blocks than can
/// [share it](crate::topk#kernels), or parts of it fill their shared memory, so that
/// none is left to add them up: on an H200, where rows of `f32` have 57465 to 57592
/// elements, or twice, three times, … as many.
pub fn top_k_renorm_probs(
    workspace: &mut SamplingWorkspace,
    out: &mut TensorMut<'_>,
    probs: &TensorRef<'_>,
    top_k: Parameter<'_, u32>,
) -> Result<()> {
    top_k_renorm_of(workspace, &out.raw, &probs.raw, top_k)
}

/// [`top_k_renorm_probs`], which may replace the probabilities: each thread reads what
/// it writes.
pub(super) fn top_k_renorm_of(
    workspace: &mut SamplingWorkspace,
    out: &RawTensor,
    probs: &RawTensor,
    top_k: Parameter<'_, u32>,
) -> Result<()> {
    radix((&TOP_K_RENORM, "probs", SUM_BYTES), workspace, out, probs, top_k)
}

/// Keeps the `top_k` largest logits of each row, and all equal to the smallest
/// of them; makes the others -∞. On the workspace's stream.
///
/// Tensors are as those of [`top_k_renorm_probs`]. NaN counts as larger than
/// any number where it has no sign, and becomes -∞ (if it is among the `top_k`
/// smallest kept, so does everything).
///
/// # Errors
/// As [`softmax`]; also when a row needs more blocks than can
/// [share it](crate::topk#kernels).
pub fn top_k_mask_logits(
    workspace: &mut SamplingWorkspace,
    out: &mut TensorMut<'_>,
    logits: &TensorRef<'_>,
    top_k: Parameter<'_, u32>,
) -> Result<()> {
    radix((&TOP_K_MASK_LOGITS, "logits", 0), workspace, &out.raw, &logits.raw, top_k)
}

fn radix(
    (function, name, sum_bytes): (&FixedFunction, &'static str, i64),
    workspace: &mut SamplingWorkspace,
    out: &RawTensor,
    input: &RawTensor,
    top_k: Parameter<'_, u32>,
) -> Result<()> {
    let (scratch, row_states, _) = workspace.parts();
    let stream = scratch.stream();
    let check = Check::new(function.name(), stream)?;
    let (top_ks, top_k) = check_top_k(&check, name, out, input, top_k)?;
    let vocab = input.shape()[1];
    if input.shape()[0] == 0 {
        return Ok(());
    }
    let runtime = FlashInferRuntime::get()?;
    check_row_bytes(&check, name, input, row_states.max_row_bytes(function)?)?;
    let (shared, size) = (row_states.shared_bytes(), input.dtype.size() as i64);
    let [_, part] = parts(vocab, size, shared);
    if HISTOGRAM_BYTES + part * size + sum_bytes > shared {
        return check.fail(
            name,
            format!(
                "rows of {vocab} elements in parts of {part} leave none of a block's {shared} bytes of shared memory \
                 to add them up; lengthen rows by zeros, or use top_k_mask_logits before softmax"
            ),
        );
    }
    let row_states = row_states.as_bytes()?;
    let kernel = TopKRenorm {
        input: DlTensor::new(input),
        output: DlTensor::new(out),
        maybe_top_k_arr: top_ks.as_ref().map(DlTensor::new),
        top_k,
        is_deterministic: true,
        row_states: DlTensor::new(&row_states),
    };
    let function = function.get(runtime)?;
    let _launch = LAUNCH.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: as in `softmax_of`. The row states are zeros between launches,
    // those on this stream are the only ones to use them, they have room for
    // all rows that share multiprocessors, and all blocks of a row run at once,
    // so that they can wait for each other.
    unsafe { kernel.call(function, stream) }.map(drop)
}

/// All that the kernels of radix top-k assume but what the GPU decides.
pub(crate) fn check_top_k(
    check: &Check<'_>,
    name: &'static str,
    out: &RawTensor,
    input: &RawTensor,
    top_k: Parameter<'_, u32>,
) -> Result<KernelParameter<i64>> {
    let vocab = check_rows(check, name, input, &KERNEL_DTYPES, 2)?;
    check_like(check, "out", out, input)?;
    top_k.count(check, "top_k", DType::I32, [input.shape()[0]; 2], vocab)
}

/// How many blocks share a row, whose elements have this size, and the most
/// elements that one of them holds in its shared memory, as the launchers of
/// radix top-k divide it.
fn parts(vocab: i64, size: i64, shared: i64) -> [i64; 2] {
    const THREADS: i64 = 1024;
    let vector = 1 << vocab.trailing_zeros().min((16 / size as u32).trailing_zeros());
    let most = ((shared - HISTOGRAM_BYTES).max(0) / size / vector * vector).max(vector * THREADS);
    let blocks = vocab.unsigned_abs().div_ceil(most as u64);
    let part = vocab.unsigned_abs().div_ceil(blocks).next_multiple_of(vector as u64);
    [blocks as i64, (part as i64).min(most)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::sampling::MAX_VOCAB;

    /// An H200's.
    const SHARED: i64 = 227 << 10;

    #[test]
    fn blocks_of_a_row_are_the_launchers() {
        // 57592 numbers of 4 bytes fit.
        for (vocab, size, expected) in [
            (57592, 4, [1, 57592]),
            (57593, 4, [2, 28797]),
            (128256, 4, [3, 42752]),
            (128256, 2, [2, 64128]),
            (256000, 4, [5, 51200]),
            (7, 2, [1, 7]),
        ] {
            assert_eq!(parts(vocab, size, SHARED), expected, "{vocab} of {size} bytes");
        }
        // However little there is, a block takes a vector for each thread.
        assert_eq!(parts(8192, 4, 0), [2, 4096]);
    }

    /// Rows that are let through fit an H200's 132 multiprocessors, a block on
    /// each, beside the 16 KiB that `RowStates` leaves free.
    #[test]
    fn blocks_of_a_row_run_at_once() {
        for size in [2, 4] {
            let longest = MAX_VOCAB.min(132 * (SHARED - (16 << 10)) / size);
            for vocab in (longest - 20_000..=longest).step_by(7).chain([longest, 1 << 22]) {
                let [blocks, part] = parts(vocab, size, SHARED);
                assert!(blocks <= 132 && HISTOGRAM_BYTES + part * size <= SHARED, "{vocab} of {size} bytes");
            }
        }
    }

    /// The last block of a row has something left: the kernel does not look.
    #[test]
    fn no_block_starts_behind_its_row() {
        for shared in [64, 99, 163, 227].map(|kib| kib << 10) {
            for size in [2, 4] {
                for vocab in (1 << 15..MAX_VOCAB).step_by(9973).chain([MAX_VOCAB]) {
                    let [blocks, part] = parts(vocab, size, shared);
                    assert!((blocks - 1) * part < vocab, "{vocab} in {blocks} parts of {part}");
                    assert!(blocks * part >= vocab, "{vocab} in {blocks} parts of {part}");
                }
            }
        }
    }

    /// Neither has any part of a row whose softmax is divided, whose result
    /// would else never be written.
    #[test]
    fn no_slice_of_a_softmax_is_empty() {
        for vocab in (24576..=MAX_VOCAB).step_by(1013).chain([24577, MAX_VOCAB - 1, MAX_VOCAB]) {
            let slices = (vocab + 8191) / 8192;
            let vector = 1 << vocab.trailing_zeros().min(2);
            let slice = (vocab + slices - 1) / slices;
            let slice = (slice + vector - 1) / vector * vector;
            assert!((slices - 1) * slice < vocab, "{vocab}");
        }
    }
}
