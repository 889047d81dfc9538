//! What attention operations share: the checks of their tensors, scratch
//! memory, the call of the planner, and the numbers that come back.

use std::{cell::Cell, marker::PhantomData, sync::Arc};

use super::{
    mask::MaskTensors,
    spec::{AttentionSpec, Heads},
    workspace::{Need, Workspace},
};
use crate::{
    cuda,
    device::Device,
    dtype::DType,
    error::{FlashInferError, Result},
    ffi::{Object, Value},
    indices::{PageIndices, RaggedIndices},
    ops::check::Check,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::RawTensor,
};

/// A plan's numbers, as the module gave them and as it takes them back.
#[derive(Clone, Debug)]
pub(super) struct PlanInfo {
    pub(super) object: Object,
    pub(super) numbers: Arc<[i64]>,
}

impl PlanInfo {
    /// Takes over what a planner returned: an array of `len` integers. Planners
    /// that leave the copy of the page-locked buffer to the caller return it with
    /// the number of bytes to copy, of which there can be `room`.
    fn new(value: &Value, len: usize, room: usize) -> Result<(Self, Option<usize>)> {
        let Value::Object(object) = value else { return Err(Self::unexpected(value, len)) };
        let (object, to_copy) = match object.to_object_and_int() {
            Some((object, bytes)) => (object, Some(bytes)),
            None => (object.clone(), None),
        };
        let numbers = object.ints().filter(|numbers: &Arc<[i64]>| numbers.len() == len);
        let to_copy = to_copy.map(|bytes| usize::try_from(bytes).ok().filter(|&bytes| bytes <= room));
        match (numbers, to_copy) {
            (Some(numbers), None) => Ok((Self { object, numbers }, None)),
            (Some(numbers), Some(Some(bytes))) => Ok((Self { object, numbers }, Some(bytes))),
            _ => Err(Self::unexpected(value, len)),
        }
    }

    #[cold]
    fn unexpected(value: &Value, len: usize) -> FlashInferError {
        FlashInferError::TvmFfiCall {
            function: "plan".into(),
            kind: "TypeError".into(),
            message: format!(
                "expected {len} integers, or these and the bytes to copy of what was reserved; the module returned \
                 {value:?}"
            ),
            traceback: String::new(),
        }
    }
}

/// What a planner has left in the workspace that a plan borrows. The plan's
/// runs use the workspace one after the other, so it can move to another
/// thread, but not be shared.
#[derive(Debug)]
pub(super) struct Planned<'p> {
    pub(super) scratch: Scratch,
    /// `None` when there is nothing to do.
    pub(super) info: Option<PlanInfo>,
    one_thread: PhantomData<Cell<&'p mut Workspace>>,
}

impl Planned<'_> {
    /// What a planner has left in a workspace, from which the plan borrows.
    pub(super) fn new(workspace: &Workspace, info: Option<PlanInfo>) -> Result<Self> {
        Ok(Self { scratch: Scratch::of(workspace)?, info, one_thread: PhantomData })
    }

    /// The plan's numbers, as the module gave them.
    pub(super) fn numbers(&self) -> &[i64] {
        self.info.as_ref().map_or(&[], |info| &info.numbers)
    }
}

/// What a captured run has baked into its graph. Two plans with equal keys can
/// take turns in one graph: they launch the same kernels on the same
/// addresses, with the same sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplayKey {
    numbers: Arc<[i64]>,
    spec: AttentionSpec,
    shape: ReplayShape,
    /// The mode of the mask, and the length of its rows of items.
    mask: [i64; 2],
    addresses: Box<[usize]>,
}

/// The sizes that a captured run has baked in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct ReplayShape {
    pub(super) heads: Heads,
    pub(super) batch: usize,
    /// Rows of queries and outputs.
    pub(super) rows: usize,
    /// Rows or pages of keys, as the tables have them.
    pub(super) keys: usize,
}

impl ReplayKey {
    /// Plans for graphs have keys, if there is work.
    pub(super) fn missing(for_graph: bool) -> FlashInferError {
        let problem = if for_graph {
            "there is nothing to do in its batch, so there is nothing to capture"
        } else {
            "it was not made for a CUDA graph: the next plan may move its memory and change its launches; plan for a \
             graph, and then capture"
        };
        FlashInferError::invalid("ReplayKey", "plan", problem)
    }

    /// The key of a plan whose runs read index arrays at these addresses.
    pub(super) fn new(
        info: &PlanInfo,
        spec: &AttentionSpec,
        shape: ReplayShape,
        scratch: &Scratch,
        indices: impl IntoIterator<Item = usize>,
        mask: &MaskTensors,
    ) -> Self {
        let own = [&scratch.float, &scratch.int].map(|array| array.data as usize);
        let addresses = own.into_iter().chain(indices).chain(mask.addresses()).collect();
        let (numbers, mask) = (info.numbers.clone(), [mask.mode, mask.token_pos_in_items_len]);
        Self { numbers, spec: *spec, shape, mask, addresses }
    }
}

impl ReplayKey {
    /// Why a captured step cannot be launched with any of these plans.
    pub(crate) fn unlike(&self, plans: &[Self]) -> String {
        const AGAIN: &str = "; capture another step for it";
        let [plan] = plans else {
            return match plans.len() {
                0 => "none of them was made for a CUDA graph; plan for a graph again, and launch with that plan".into(),
                count => format!("none of the {count} has the addresses and sizes of a captured one{AGAIN}"),
            };
        };
        let (was, is) = (&self.shape, &plan.shape);
        if (was.batch, was.rows) != (is.batch, is.rows) {
            return format!(
                "the plan is for {} requests with {} queries, the step was captured for {} with {}; fill the batch \
                 up (BatchTables::update_padded; update_by_row where requests have several new tokens), or capture \
                 another step",
                is.batch, is.rows, was.batch, was.rows
            );
        }
        let what = match () {
            () if self.spec != plan.spec || was != is => {
                "another kind of attention, other heads or another cache"
            }
            () if self.mask != plan.mask => "another mask",
            () if self.addresses != plan.addresses => "another workspace or other tables",
            () => "other launches: another module, or a batch that the captured launch does not serve",
        };
        format!("the plan is for {what}{AGAIN}")
    }
}

/// The workspace's device buffers, as the byte tensors that kernels take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scratch {
    pub(super) float: RawTensor,
    pub(super) int: RawTensor,
}

impl Scratch {
    pub(super) fn of(workspace: &Workspace) -> Result<Self> {
        Ok(Self { float: workspace.float.as_bytes()?, int: workspace.int.as_bytes()? })
    }
}

/// The most blocks that a multiprocessor of any GPU runs at once, of kernels with
/// 128 threads or more.
pub(super) const MAX_BLOCKS_PER_SM: usize = 2048 / 128;
/// Tokens of a chunk of keys at least, in whole pages. It is the same where decode
/// on CUDA cores and FlashAttention 2 are planned.
pub(super) const LEAST_CHUNK: usize = 128;

/// The checks that come before any planning: the workspace is of the
/// operation's stream, which is not being captured.
pub(super) fn check_workspace(check: &Check<'_>, workspace: &Workspace) -> Result<()> {
    check.on_stream("workspace", workspace.stream())?;
    if FlashInferRuntime::get()?.cuda().is_capturing(workspace.stream())? {
        return check.fail(
            "workspace",
            "its stream is being captured into a CUDA graph; plan before the capture and capture only runs"
                .into(),
        );
    }
    Ok(())
}

/// The stream that is checked is on the GPU that a module was resolved for.
pub(super) fn check_gpu(check: &Check<'_>, argument: &'static str, ordinal: u32) -> Result<()> {
    let device = check.device();
    if device == Device::Cuda(ordinal) {
        return Ok(());
    }
    check.fail(argument, format!("it is on {device}; the module is for cuda:{ordinal}"))
}

/// Queries and a page table are of as many requests.
pub(super) fn check_requests(check: &Check<'_>, queries: &RaggedIndices, table: &PageIndices) -> Result<()> {
    let [queries, table] = [queries.batch_size(), table.batch_size()];
    if queries == table {
        return Ok(());
    }
    check.fail("queries", format!("they are of {queries} requests, the page table is of {table}"))
}

/// Checks queries, outputs and sums of a plan for `rows` queries. What the
/// kernels assume of them is the same in decode and prefill.
pub(super) fn check_output(
    check: &Check<'_>,
    spec: &AttentionSpec,
    heads: Heads,
    rows: usize,
    q: &RawTensor,
    out: &RawTensor,
    lse: Option<&RawTensor>,
) -> Result<()> {
    let (rows, heads) = (rows as i64, heads.num_qo_heads as i64);
    check.tensor("q", q, &[spec.dtype_q], &[3])?;
    check.shape("q", q, &[rows, heads, spec.head_dim_qk as i64])?;
    check.last_dim_contiguous("q", q)?;
    check.aligned("q", q, 16)?;
    check.offsets_in_32_bits("q", q)?;
    check.tensor("out", out, &[spec.dtype_o], &[3])?;
    check.shape("out", out, &[rows, heads, spec.head_dim_vo as i64])?;
    check.contiguous("out", out)?;
    check.aligned("out", out, 16)?;
    check.offsets_in_32_bits("out", out)?;
    check_lse(check, lse, rows, heads)
}

/// Tensors that FlashAttention 3 describes to the hardware name each element
/// once; other strides the driver may refuse, which its launchers ignore.
pub(super) fn check_described(
    check: &Check<'_>,
    fa3: bool,
    tensors: &[(&'static str, &RawTensor)],
) -> Result<()> {
    tensors.iter().filter(|_| fa3).try_for_each(|(name, tensor)| check.distinct(name, tensor))
}

/// Rows of the tensors of a plan: the queries of the batch, or the number that
/// a graph has been given, which must be as large and no less than `least`.
pub(super) fn check_rows(
    check: &Check<'_>,
    graph: Option<usize>,
    queries: usize,
    least: usize,
) -> Result<usize> {
    match graph {
        None => Ok(queries),
        Some(rows) if (queries.max(least)..=i32::MAX as usize).contains(&rows) => Ok(rows),
        Some(rows) => check.fail(
            "graph",
            format!(
                "{rows} rows; the batch needs at least {}, and there can be no more than 2^31",
                queries.max(least)
            ),
        ),
    }
}

/// What upstream passes for the scale and the base of rotary embeddings, which
/// modules without them do not read.
pub(super) const ROPE_RCP_SCALE: f64 = 1.0;
pub(super) const ROPE_RCP_THETA: f64 = 1e-4;

/// Checks keys and values that lie one after the other.
pub(super) fn check_keys(
    check: &Check<'_>,
    spec: &AttentionSpec,
    heads: Heads,
    keys: usize,
    [k, v]: [&RawTensor; 2],
) -> Result<()> {
    for (name, tensor, width) in [("k", k, spec.head_dim_qk), ("v", v, spec.head_dim_vo)] {
        check.tensor(name, tensor, &[spec.dtype_kv], &[3])?;
        check.shape(name, tensor, &[keys as i64, heads.num_kv_heads as i64, width as i64])?;
        check.last_dim_contiguous(name, tensor)?;
        check.aligned(name, tensor, 16)?;
        check.offsets_in_32_bits(name, tensor)?;
    }
    Ok(())
}

/// Checks the sums of exponentials that a run may write.
pub(super) fn check_lse(check: &Check<'_>, lse: Option<&RawTensor>, rows: i64, heads: i64) -> Result<()> {
    let Some(lse) = lse else { return Ok(()) };
    check.tensor("lse", lse, &[DType::F32], &[2])?;
    check.shape("lse", lse, &[rows, heads])?;
    check.contiguous("lse", lse)?;
    check.aligned("lse", lse, size_of::<f32>())
}

/// An index array on the host, as planners take it.
pub(super) fn host_indices(array: &[i32]) -> Result<RawTensor> {
    RawTensor::new(array.as_ptr().cast_mut().cast(), Device::Cpu, DType::I32, &[array.len()], None)
}

/// A call of a planner.
#[derive(Clone, Copy, Debug)]
pub(super) struct Planning {
    /// What it takes of the workspace.
    pub(super) need: Need,
    /// Whether runs are captured into a graph, which then holds the workspace.
    pub(super) for_graph: bool,
    /// Whether index arrays that it leaves out are zeros, and not a part of an
    /// earlier plan.
    pub(super) clear: bool,
    /// How many numbers it returns.
    pub(super) numbers: usize,
}

/// Lets `call` run a planner, which writes index arrays to the page-locked
/// buffer it is given and enqueues their copy to the workspace on the stream that it is
/// given, or says how much there is to copy.
///
/// Before, the workspace has grown to what the planner needs, or the call is
/// refused: no planner finds one that is too small.
pub(super) fn make_plan(
    check: &Check<'_>,
    workspace: &mut Workspace,
    planning: Planning,
    call: impl FnOnce(&Scratch, &RawTensor, &Stream) -> Result<Value>,
) -> Result<PlanInfo> {
    let Planning { need, for_graph, clear, numbers } = planning;
    workspace.reserve(check, need)?;
    workspace.forget_plan();
    let scratch = Scratch::of(workspace)?;
    let stream = workspace.stream().clone();
    let copies = cuda::upload_stream(&stream);
    let info = workspace.staging.stage(&stream, |staging| {
        if clear {
            staging[..need.int].fill(0);
        }
        let pinned =
            RawTensor::new(staging.as_mut_ptr().cast(), Device::Cpu, DType::U8, &[staging.len()], None)?;
        let (info, to_copy) = PlanInfo::new(&call(&scratch, &pinned, &copies)?, numbers, need.int)?;
        if let Some(bytes) = to_copy {
            // SAFETY: the buffer is page-locked, and not written again before the
            // copy is done.
            unsafe { cuda::upload(&staging[..bytes], &workspace.int, 0) }?;
        }
        Ok(info)
    })?;
    if for_graph {
        workspace.hold();
    }
    Ok(info)
}

/// `run` of a plan over pages, beside its `run_with`.
macro_rules! run_over_pages {
    () => {
        /// Runs as `run_with`, without an LSE and with the default options.
        ///
        /// # Errors
        /// Those of `run_with`.
        pub fn run(&self, q: &TensorRef<'_>, kv: &PagedKv<'_>, out: &mut TensorMut<'_>) -> Result<()> {
            self.run_with(q, kv, out, None, &RunOptions::default())
        }
    };
}
pub(super) use run_over_pages;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ffi::Arg;

    #[test]
    fn planners_return_numbers_and_what_to_copy() {
        // SAFETY: numbers only.
        let numbers = unsafe { Object::array([3i64, 1, 4].map(Arg::from)) };
        let of =
            |value: &Value| PlanInfo::new(value, 3, 64).map(|(info, bytes)| (info.numbers.to_vec(), bytes));
        assert_eq!(of(&Value::Object(numbers.clone())).unwrap(), (vec![3, 1, 4], None));
        let with = |bytes: i64| {
            // SAFETY: an object and a number.
            Value::Object(unsafe { Object::array([Arg::from(&numbers), bytes.into()]) })
        };
        assert_eq!(of(&with(64)).unwrap(), (vec![3, 1, 4], Some(64)));
        // More than was reserved, no number of bytes, other numbers.
        for wrong in [with(65), with(-1), Value::Int(3), Value::None] {
            let error = of(&wrong).unwrap_err();
            assert!(error.to_string().contains("expected 3 integers"), "{error}");
        }
        assert!(PlanInfo::new(&with(8), 4, 64).is_err());
        drop(with(8));
        assert_eq!(numbers.strong_count(), 1);
    }
}
