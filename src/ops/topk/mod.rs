//! Selecting the largest of each row, in FlashInfer's module `topk`.
//!
//! [`radix_topk`] is what upstream's Python calls `top_k`. The two transforms
//! are for sparse attention: they select among a request's keys by scores, and
//! give where those keys lie in the cache instead of their positions.
//!
//! Scores are `f32`, `f16` or `bf16`, contiguous, and aligned to the largest
//! power of two that divides a row's bytes, but no more than 16. A row has
//! fewer than 2³⁰ of them. They are compared by their bits: −0 is below 0, and
//! NaN above everything. (A NaN whose sign bit is set is below everything, or,
//! with `f32`, above all numbers; which of the two depends on the kernel.)
//!
//! # Kernels
//! One of two kernels is launched. *Filtered* gives each row a block of
//! threads; it takes `k` up to 2048, and a GPU for which
//! [`can_implement_filtered_topk`] is true. *Radix* holds a row in the shared
//! memory of as many blocks as that takes; these blocks wait for each other, so
//! they must all run at once, and a row must fit the shared memory of the whole
//! GPU (7 million `f32` on an H200). [`TopKOptions::tie_break`] and
//! [`TopKOptions::dsa_graph_safe`] ask for *filtered*; without them, upstream's
//! rule decides by rows, their length, dtype and `k`. The environment variable
//! `FLASHINFER_TOPK_ALGO`, which the module reads in every call, overrides that
//! rule with `filtered` or `multi_cta`.
//!
//! On GPUs of 16 multiprocessors or fewer, and on compute capability 12.x with a
//! module before 0.7, those blocks may wait for each other forever: there a row
//! must fit the shared memory of one block, unless *filtered* is asked for. Both
//! kernels have races between warps, which delays by compute-sanitizer bring out:
//! `docs/soundness.md`, "Top-k selection", says which, and what follows.
//!
//! Upstream has selection by clusters of blocks, too (`fast_topk_clusters_*`),
//! which its Python uses on compute capability 10.x. It is not offered:
//! `docs/modules.md` says why.
//!
//! Source of the contract: `csrc/topk.cu`, `include/flashinfer/topk.cuh`,
//! `topk.py` of FlashInfer 0.6.13.
//!
//! ```no_run
//! # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use flashinfer_rs::{
//!     Stream,
//!     gpu::Tensor,
//!     topk::{self, RowStates, TopKOptions},
//! };
//! let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
//! let mut row_states = RowStates::new(&stream)?;
//! let logits = Tensor::from_slice(&stream, &[4, 32000], &[0.5f32; 4 * 32000])?;
//! let mut values = Tensor::<f32>::zeros(&stream, &[4, 50])?;
//! let mut indices = Tensor::<i32>::zeros(&stream, &[4, 50])?;
//! let mut options = TopKOptions::default();
//! options.sorted = true;
//! let (mut values, mut indices) = (values.view_mut(), indices.view_mut());
//! topk::radix_topk(&mut row_states, &mut values, &mut indices, &logits.view(), &options)?;
//! # Ok(()) }
//! # #[cfg(not(feature = "cudarc"))] fn main() {}
//! ```

mod checks;
mod clusters;
mod options;
mod row_states;
#[cfg(test)]
mod tests;

pub(crate) use checks::{check_page_table_transform, check_ragged_transform, check_topk};
pub use options::{TieBreak, TopKOptions};
pub use row_states::RowStates;
pub(crate) use row_states::check_row_bytes;

use std::sync::{Mutex, PoisonError};

use clusters::{CLUSTERS, CLUSTERS_PAGE_TABLE_TRANSFORM, CLUSTERS_RAGGED_TRANSFORM};

use super::{FixedFunction, check::Check};
use crate::{
    error::{FlashInferError, Result},
    ffi::{DlTensor, Kernel, Signature, Value, kernels},
    indices::RowTable,
    module::ModuleName,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    struct RadixTopk = "radix_topk" {
        input: Tensor, output_indices: Tensor, output_values: Tensor, maybe_row_states_buffer: OptTensor,
        top_k: Int, sorted_output: Bool, deterministic: Bool, tie_break: Int, dsa_graph_safe: Bool,
    } {
        "0.6.13": (
            input, output_indices, output_values, maybe_row_states_buffer,
            top_k, sorted_output, deterministic, tie_break, dsa_graph_safe,
        ) -> "void";
        "0.6.18": (
            input, output_indices, output_values: OptTensor, maybe_row_states_buffer,
            top_k, sorted_output, deterministic, tie_break, dsa_graph_safe,
        ) -> "void";
    }
    struct PageTableTransform = "radix_topk_page_table_transform" {
        input: Tensor, output_page_table: Tensor, src_page_table: Tensor, maybe_row_to_batch: OptTensor,
        lengths: Tensor, maybe_row_states_buffer: OptTensor, top_k: Int, deterministic: Bool,
        tie_break: Int, page_size: Int, dsa_graph_safe: Bool, maybe_row_starts: OptTensor,
        maybe_page_table_row_starts: OptTensor, maybe_output_raw_indices: OptTensor,
    } {
        "0.6.13": (
            input, output_page_table, src_page_table, maybe_row_to_batch,
            lengths, maybe_row_states_buffer, top_k, deterministic,
            tie_break, dsa_graph_safe, maybe_row_starts,
        ) -> "void";
        "0.6.18": (
            input, output_page_table, src_page_table, maybe_row_to_batch,
            lengths, maybe_row_states_buffer, top_k, deterministic,
            tie_break, page_size, dsa_graph_safe, maybe_row_starts,
            maybe_page_table_row_starts, maybe_output_raw_indices,
        ) -> "void";
    }
    struct RaggedTransform = "radix_topk_ragged_transform"(
        input: Tensor, output_indices: Tensor, offsets: Tensor, lengths: Tensor,
        maybe_row_states_buffer: OptTensor, top_k: Int, deterministic: Bool, tie_break: Int,
        dsa_graph_safe: Bool, maybe_row_starts: OptTensor,
    ) -> "void";
}

const CAN_IMPLEMENT_FILTERED: &[Signature] =
    &[Signature { function: "can_implement_filtered_topk", since: "0.6.13", args: &[], result: "bool" }];

impl ModuleName {
    /// Selecting the largest.
    pub const TOPK: Self = Self::fixed("topk");
}

pub(super) const SIGNATURES: &[(&str, &[Signature])] = &[
    ("topk", RadixTopk::SIGNATURES),
    ("topk", PageTableTransform::SIGNATURES),
    ("topk", RaggedTransform::SIGNATURES),
    ("topk", CAN_IMPLEMENT_FILTERED),
    ("topk", CLUSTERS),
    ("topk", CLUSTERS_PAGE_TABLE_TRANSFORM),
    ("topk", CLUSTERS_RAGGED_TRANSFORM),
];

static RADIX_TOPK: FixedFunction = FixedFunction::of(ModuleName::TOPK, RadixTopk::SIGNATURES);
static PAGE_TABLE_TRANSFORM: FixedFunction =
    FixedFunction::of(ModuleName::TOPK, PageTableTransform::SIGNATURES);
static RAGGED_TRANSFORM: FixedFunction = FixedFunction::of(ModuleName::TOPK, RaggedTransform::SIGNATURES);
static CAN_IMPLEMENT: FixedFunction = FixedFunction::of(ModuleName::TOPK, CAN_IMPLEMENT_FILTERED);

/// Held during each launch. The launchers set a kernel's limit of shared
/// memory, which is the process's, to what this launch needs, and then launch.
static LAUNCH: Mutex<()> = Mutex::new(());

/// Whether the stream's GPU has the shared memory that *filtered* needs, 128 KiB
/// for each multiprocessor (compute capability 8.0, 9.0, 10.x; not 8.6, 8.9,
/// 12.x). See the [module](self) for what needs *filtered*.
///
/// # Errors
/// The module is missing; or what it said.
pub fn can_implement_filtered_topk(stream: &Stream) -> Result<bool> {
    stream.check_usable_here(CAN_IMPLEMENT.name())?;
    let runtime = FlashInferRuntime::get()?;
    let function = CAN_IMPLEMENT.get(runtime)?;
    // It asks the current device.
    let _device = runtime.cuda().on_device_of(stream)?;
    // SAFETY: the function takes nothing and launches nothing.
    match unsafe { function.function().call(&[]) }? {
        Value::Bool(can) => Ok(can),
        other => Err(FlashInferError::TvmFfiCall {
            function: CAN_IMPLEMENT.name().into(),
            kind: "TypeError".into(),
            message: format!("expected a bool, the module returned {other:?}"),
            traceback: String::new(),
        }),
    }
}

/// The `k` largest of each row: their `values`, of the dtype of `input`, and
/// `indices`, `i32`, both `[rows, k]`. `input` is `[rows, d]` with `d ≥ k`. On
/// the stream of `row_states`. No rows, or a `k` of 0, are nothing to do.
///
/// Call once before the first capture into a CUDA graph, because the first call
/// loads the kernel. A graph keeps the address of `row_states`: replay it on
/// their stream, while they live.
///
/// # Errors
/// [`InvalidArgument`](FlashInferError::InvalidArgument) before anything is
/// launched: a device, stream, dtype, shape, stride or alignment does not fit,
/// an option is not for that `k`, an output has more than 2³² elements, or rows are too
/// long. Else what the module or CUDA said; `operation not supported` where
/// `options` ask for *filtered* on a GPU that cannot implement it.
pub fn radix_topk(
    row_states: &mut RowStates,
    values: &mut TensorMut<'_>,
    indices: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    options: &TopKOptions,
) -> Result<()> {
    let stream = &row_states.stream().clone();
    let check = Check::new(RADIX_TOPK.name(), stream)?;
    let (values, indices, input) = (&values.raw, &indices.raw, &input.raw);
    let k = check_topk(&check, [values, indices, input], options, row_states.max_row_bytes(&RADIX_TOPK)?)?;
    if indices.numel() == 0 {
        return Ok(());
    }
    let deterministic = is_deterministic(options, row_states, input);
    let states = row_states.as_bytes()?;
    let kernel = RadixTopk {
        input: DlTensor::new(input),
        output_indices: DlTensor::new(indices),
        output_values: DlTensor::new(values),
        maybe_row_states_buffer: Some(DlTensor::new(&states)),
        top_k: k,
        sorted_output: options.sorted,
        deterministic,
        tie_break: options.tie_break as i64,
        dsa_graph_safe: options.dsa_graph_safe,
    };
    // SAFETY: tensors, `k`, parts of rows and row states were checked above, and
    // the launch before left the row states zero.
    unsafe { launch(stream, &RADIX_TOPK, &kernel) }
}

/// For each row of `input`, `[rows, max_len]`, the entries of a page table for
/// the `k` largest scores of the row's part: `output_page_table` is `[rows, k]`,
/// `src_page_table` `[requests, width]`, both `i32`. On the stream of
/// `row_states`.
///
/// A row's part and its request are those of `rows`; an element of the part at
/// place `i` of the row stands for entry `i` of the request. Of a part that has
/// `k` elements or fewer all are selected, in order; what `k` has beyond that is
/// −1. Entries are copied and not looked at.
///
/// A capture into a CUDA graph bakes in the shapes of the tensors, and whether
/// there are `row_starts` and `row_to_batch`: a table that is updated before a
/// replay must keep to them.
///
/// # Errors
/// As [`radix_topk`]; also when `rows` are others in number than those of
/// `input`, end beyond those of `input` or of `src_page_table`, are of a request
/// that it does not have, or belong to another stream; and for
/// [`TopKOptions::sorted`].
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{
///     Stream, gpu::Tensor, topk::{self, RowStates, TopKOptions},
///     indices::{RowIndices, RowTable},
/// };
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let scores = Tensor::from_slice(&stream, &[2, 4096], &[0.5f32; 2 * 4096])?;
/// let table = Tensor::from_slice(&stream, &[2, 4096], &(0..2 * 4096).collect::<Vec<i32>>())?;
/// let mut selected = Tensor::<i32>::zeros(&stream, &[2, 256])?;
/// topk::radix_topk_page_table_transform(
///     &mut RowStates::new(&stream)?,
///     &mut selected.view_mut(),
///     &scores.view(),
///     &table.view(),
///     &RowTable::new(&stream, RowIndices::new([4000, 17])?)?,
///     &TopKOptions::default(),
/// )?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
pub fn radix_topk_page_table_transform(
    row_states: &mut RowStates,
    output_page_table: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    src_page_table: &TensorRef<'_>,
    rows: &RowTable,
    options: &TopKOptions,
) -> Result<()> {
    let stream = &row_states.stream().clone();
    let check = Check::new(PAGE_TABLE_TRANSFORM.name(), stream)?;
    check.on_stream("rows", rows.stream())?;
    let (output, input) = (&output_page_table.raw, &input.raw);
    let max_row_bytes = row_states.max_row_bytes(&PAGE_TABLE_TRANSFORM)?;
    let tensors = [output, input, &src_page_table.raw];
    let k = check_page_table_transform(&check, tensors, rows.host(), options, max_row_bytes)?;
    if output.numel() == 0 {
        return Ok(());
    }
    let (lengths, row_starts, row_to_batch) = (rows.lengths()?, rows.row_starts()?, rows.row_to_batch()?);
    // Where each row is a request, modules of 0.7 want as many requests.
    let table = match &row_to_batch {
        None => src_page_table.narrow(0, 0, input.shape()[0] as usize)?,
        Some(_) => *src_page_table,
    };
    let deterministic = is_deterministic(options, row_states, input);
    if deterministic && !options.asks_for_filtered() {
        // Places are selected, written to the output, and looked up from there.
        // Where blocks saw different thresholds, some are not written.
        let bytes = output.numel() as usize * output.dtype.size();
        // SAFETY: the output is contiguous, exclusive, and on the stream's device.
        unsafe { FlashInferRuntime::get()?.cuda().zero(stream, output.data, bytes) }?;
    }
    let states = row_states.as_bytes()?;
    let kernel = PageTableTransform {
        input: DlTensor::new(input),
        output_page_table: DlTensor::new(output),
        src_page_table: (&table).into(),
        maybe_row_to_batch: row_to_batch.as_ref().map(DlTensor::new),
        lengths: DlTensor::new(&lengths),
        maybe_row_states_buffer: Some(DlTensor::new(&states)),
        top_k: k,
        deterministic,
        tie_break: options.tie_break as i64,
        page_size: 1,
        dsa_graph_safe: options.dsa_graph_safe,
        maybe_row_starts: row_starts.as_ref().map(DlTensor::new),
        maybe_page_table_row_starts: None,
        maybe_output_raw_indices: None,
    };
    // SAFETY: tensors, `k`, parts of rows and row states were checked above, and
    // the launch before left the row states zero.
    unsafe { launch(stream, &PAGE_TABLE_TRANSFORM, &kernel) }
}

/// As [`radix_topk_page_table_transform`] for keys that lie one after the
/// other: `output_indices`, `[rows, k]`, are the selected places, counted from
/// the start of the row's part, plus the row's entry of `offsets`, `[rows]`;
/// both `i32`. The requests of `rows` do not matter.
///
/// # Errors
/// As [`radix_topk_page_table_transform`].
pub fn radix_topk_ragged_transform(
    row_states: &mut RowStates,
    output_indices: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    offsets: &TensorRef<'_>,
    rows: &RowTable,
    options: &TopKOptions,
) -> Result<()> {
    let stream = &row_states.stream().clone();
    let check = Check::new(RAGGED_TRANSFORM.name(), stream)?;
    check.on_stream("rows", rows.stream())?;
    let (output, input, offsets) = (&output_indices.raw, &input.raw, &offsets.raw);
    let max_row_bytes = row_states.max_row_bytes(&RAGGED_TRANSFORM)?;
    let tensors = [output, input, offsets];
    let k = check_ragged_transform(&check, tensors, rows.host(), options, max_row_bytes)?;
    if output.numel() == 0 {
        return Ok(());
    }
    let (lengths, row_starts) = (rows.lengths()?, rows.row_starts()?);
    let deterministic = is_deterministic(options, row_states, input);
    let states = row_states.as_bytes()?;
    let kernel = RaggedTransform {
        input: DlTensor::new(input),
        output_indices: DlTensor::new(output),
        offsets: DlTensor::new(offsets),
        lengths: DlTensor::new(&lengths),
        maybe_row_states_buffer: Some(DlTensor::new(&states)),
        top_k: k,
        deterministic,
        tie_break: options.tie_break as i64,
        dsa_graph_safe: options.dsa_graph_safe,
        maybe_row_starts: row_starts.as_ref().map(DlTensor::new),
    };
    // SAFETY: tensors, `k`, parts of rows and row states were checked above, and
    // the launch before left the row states zero.
    unsafe { launch(stream, &RAGGED_TRANSFORM, &kernel) }
}

/// Whether a selection has to be deterministic: if it is to be, or if *radix*
/// would else mix up rows, or write behind a row's `k` places: blocks that
/// share a row may see different thresholds, and only the deterministic
/// selection counts what it writes.
///
/// A tie break gives the order of indices by that alone. Launchers of 0.6 add it themselves.
fn is_deterministic(options: &TopKOptions, row_states: &RowStates, input: &RawTensor) -> bool {
    options.deterministic
        || options.tie_break != TieBreak::None
        || !options.asks_for_filtered() && row_states.has_races(input)
}

/// Calls a function of the module.
///
/// # Safety
/// The kernel must be the function's. Its tensors must be all that the kernels
/// assume: device, dtype, shape, contiguity, alignment, 32-bit offsets; `k`
/// neither 0 nor more than a row of `radix_topk` or than the kernel asked for
/// holds. Parts of rows must end within input and page table. The row states
/// must be those of this stream: zeros, and large enough for any launch on its
/// GPU.
unsafe fn launch<K: Kernel>(stream: &Stream, function: &FixedFunction, kernel: &K) -> Result<()> {
    let runtime = FlashInferRuntime::get()?;
    let function = function.get(runtime)?;
    // The launchers make the input's device current, and leave it so.
    let _device = runtime.cuda().on_device_of(stream)?;
    let _launch = LAUNCH.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: promised by the caller.
    unsafe { kernel.call(function, stream) }.map(drop)
}
