//! What every attention plan shares: scratch memory, the call of the planner,
//! and the numbers that come back.

use super::workspace::Workspace;
use crate::{
    cuda::DeviceBuffer,
    error::{FlashInferError, Result},
    ffi::{Object, Value},
    ops::check::Check,
    runtime::FlashInferRuntime,
    tensor::{DType, Device, RawTensor},
};

/// How a plan will be run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PlanMode {
    /// Each plan is launched anew.
    #[default]
    Eager,
    /// Runs are captured into a CUDA graph, which is replayed while later
    /// plans on the same workspace and page table change what it works on.
    /// Their batch size and heads must stay; pad the batch with
    /// [`PageIndices::pad_to`](crate::PageIndices::pad_to).
    CudaGraph,
}

/// A plan's numbers, as the module gave them and as it takes them back.
#[derive(Debug)]
pub(super) struct PlanInfo {
    pub(super) object: Object,
    pub(super) numbers: Box<[i64]>,
}

impl PlanInfo {
    /// Takes over what a planner returned: an array of `len` integers.
    fn new(value: Value, len: usize) -> Result<Self> {
        let numbers = match &value {
            Value::Object(object) => object.to_ints().filter(|numbers| numbers.len() == len),
            _ => None,
        };
        match (value, numbers) {
            (Value::Object(object), Some(numbers)) => Ok(Self { object, numbers: numbers.into() }),
            (value, _) => Err(FlashInferError::TvmFfiCall {
                function: "plan".into(),
                kind: "TypeError".into(),
                message: format!("expected {len} integers, the module returned {value:?}"),
                traceback: String::new(),
            }),
        }
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
        let bytes = |buffer: &DeviceBuffer| {
            RawTensor::new(buffer.as_ptr(), buffer.stream().device(), DType::U8, &[buffer.len()], None)
        };
        Ok(Self { float: bytes(&workspace.float)?, int: bytes(&workspace.int)? })
    }
}

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

/// Lets `call` run a planner, which writes up to `needed` bytes of index
/// arrays to the page-locked buffer it is given and enqueues their copy to the
/// workspace. The planner returns `len` numbers.
///
/// Planners write their arrays before they count them, so what they can need
/// at most must fit beforehand.
pub(super) fn make_plan(
    check: &Check<'_>,
    workspace: &mut Workspace,
    needed: usize,
    len: usize,
    call: impl FnOnce(&RawTensor) -> Result<Value>,
) -> Result<PlanInfo> {
    let available = workspace.staging.len().min(workspace.int.len());
    if needed > available {
        return check.fail(
            "workspace",
            format!(
                "this batch needs up to {needed} bytes for index arrays, the workspace has {available}; \
                 make it with_sizes of at least that"
            ),
        );
    }
    let stream = workspace.float.stream().clone();
    workspace.staging.stage(&stream, |staging| {
        let pinned =
            RawTensor::new(staging.as_mut_ptr().cast(), Device::Cpu, DType::U8, &[staging.len()], None)?;
        call(&pinned).and_then(|value| PlanInfo::new(value, len))
    })
}
