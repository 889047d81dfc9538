//! Merging partial attention results, in FlashInfer's module `cascade`.
//!
//! Attention over a set of keys is a [`State`]: the normalized output `v` and
//! the logarithm `s` of the sum of exponentials. The states of two disjoint
//! sets of keys merge into that of their union, whatever computed them. So a
//! prefix that many requests share can be attended to once, and merged with
//! what each request sees of its own. Merging is associative and commutative
//! but for rounding. [`MultiLevelCascade`](crate::attention::MultiLevelCascade)
//! does that with batch prefill.
//!
//! `v` is `f16` or `bf16`, `s` is `f32` in base 2, as every attention of this
//! crate gives it; both are contiguous. The head dimension is a multiple of 8,
//! up to 1024. A state without keys is what attention gives for no keys, a `v`
//! of 0 and an `s` of −∞: it changes nothing that it is merged with, and merging
//! nothing else gives it again. Its `v` is not looked at.
//!
//! This is a kernel of this crate. That of FlashInfer 0.6.13, in its module
//! `cascade`, takes −50000 for −∞, so that a state below it counts for nothing,
//! and gives NaN for two states of −∞.
//!
//! A decode step of three requests that begin with the same 64 tokens:
//!
//! ```no_run
//! # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use flashinfer_rs::{
//!     DType, PageIndices, PageTable, Stream,
//!     attention::{AttentionSpec, BatchDecode, Heads, PlanOptions, RunOptions, Workspace},
//!     cascade::{self, State, StateMut},
//!     gpu::Tensor,
//!     kv::{KvLayout, PagedKv},
//! };
//! use half::f16;
//! let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
//! let decode = BatchDecode::new(&stream, &AttentionSpec::new(DType::F16, 128), Heads::new(32, 8))?;
//! let mut workspace = Workspace::new(&stream)?;
//!
//! let prefix = PageIndices::from_requests(9, 16, [(&[0, 1, 2, 3][..], 64); 3])?;
//! let own = PageIndices::from_requests(9, 16, [(&[4][..], 5), (&[5, 6][..], 20), (&[7][..], 1)])?;
//! let k = Tensor::<f16>::zeros(&stream, &[9, 16, 8, 128])?;
//! let kv = PagedKv::new(k.view(), k.view(), KvLayout::Nhd);
//! let q = Tensor::<f16>::zeros(&stream, &[3, 32, 128])?;
//!
//! let state = || Ok::<_, flashinfer_rs::FlashInferError>((
//!     Tensor::<f16>::zeros(&stream, &[3, 32, 128])?,
//!     Tensor::<f32>::zeros(&stream, &[3, 32])?,
//! ));
//! let mut states = [state()?, state()?];
//! for (indices, (v, s)) in [prefix, own].into_iter().zip(&mut states) {
//!     let table = PageTable::new(&stream, indices)?;
//!     let plan = decode.plan(&mut workspace, &table, &PlanOptions::default())?;
//!     let lse = &mut s.view_mut();
//!     plan.run_with(&q.view(), &kv, &mut v.view_mut(), Some(lse), &RunOptions::default())?;
//! }
//! // The first state becomes that of all tokens.
//! let [(v, s), (v_own, s_own)] = &mut states;
//! cascade::merge_state_in_place(
//!     &stream,
//!     &mut StateMut::new(v.view_mut(), s.view_mut()),
//!     &State::new(v_own.view(), s_own.view()),
//!     None,
//! )?;
//! # Ok(()) }
//! # #[cfg(not(feature = "cudarc"))] fn main() {}
//! ```

use std::ffi::c_void;

use super::check::Check;
use crate::{
    cuda::PtxKernel,
    dtype::DType,
    error::Result,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

const PTX: &str = concat!(include_str!("merge_states.ptx"), "\0");
static F16: PtxKernel = PtxKernel::new(PTX, c"merge_states_f16");
static BF16: PtxKernel = PtxKernel::new(PTX, c"merge_states_bf16");

/// Threads of a block.
const THREADS: u64 = 256;
/// Elements of an output that a thread works on.
const VECTOR: u64 = 8;
/// Threads that keep a GPU busy.
const MANY_THREADS: u64 = 1 << 16;

/// Element types of outputs.
const DTYPES: [DType; 2] = [DType::F16, DType::BF16];
const MAX_HEAD_DIM: i64 = 1024;

/// The result of attention over some keys, to read.
#[derive(Clone, Copy, Debug)]
pub struct State<'a> {
    /// Normalized outputs.
    pub v: TensorRef<'a>,
    /// Base-2 logarithms of the sums of exponentials: the shape of `v`
    /// without its last dimension.
    pub s: TensorRef<'a>,
}

impl<'a> State<'a> {
    /// A state of outputs and their LSE. They are checked where they are used.
    pub fn new(v: TensorRef<'a>, s: TensorRef<'a>) -> Self {
        Self { v, s }
    }
}

/// The result of attention over some keys, to write. See [`State`].
#[derive(Debug)]
pub struct StateMut<'a> {
    /// Normalized outputs.
    pub v: TensorMut<'a>,
    /// Base-2 logarithms of the sums of exponentials.
    pub s: TensorMut<'a>,
}

impl<'a> StateMut<'a> {
    /// A state of outputs and their LSE. They are checked where they are used.
    pub fn new(v: TensorMut<'a>, s: TensorMut<'a>) -> Self {
        Self { v, s }
    }
}

/// Writes the state of the keys of `a` and `b` together.
///
/// In each state `v` is `[rows, heads, head_dim]` and `s` `[rows, heads]`, all
/// of one shape. Zero rows are nothing to do.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before
/// anything is launched: a device, stream, dtype, shape or alignment does not
/// fit, a tensor is not contiguous or spans 2³² elements; or the stream is
/// being captured and no states of this dtype were merged before, which
/// compiles the kernel. Else what CUDA said.
pub fn merge_state(stream: &Stream, merged: &mut StateMut<'_>, a: &State<'_>, b: &State<'_>) -> Result<()> {
    let check = Check::new("merge_state", stream)?;
    let shape = check_merge_state(&check, merged, a, b)?;
    let states = States { count: 1, of: [&a.v.raw, &a.s.raw], other: Some([&b.v.raw, &b.s.raw]), mask: None };
    // SAFETY: all states are contiguous and aligned, of this shape and dtype,
    // and below 2^32 elements.
    unsafe { shape.merge(&check, stream, &states, [&merged.v.raw, &merged.s.raw]) }
}

/// All that the kernel of [`merge_state`] assumes.
pub(crate) fn check_merge_state(
    check: &Check<'_>,
    merged: &StateMut<'_>,
    a: &State<'_>,
    b: &State<'_>,
) -> Result<Shape> {
    let shape = Shape::of(check, "a.v", &a.v.raw)?;
    shape.check(check, ["a.v", "a.s"], [&a.v.raw, &a.s.raw])?;
    shape.check(check, ["b.v", "b.s"], [&b.v.raw, &b.s.raw])?;
    shape.check(check, ["merged.v", "merged.s"], [&merged.v.raw, &merged.s.raw])?;
    Ok(shape)
}

/// Turns `state` into the state of its keys and those of `other` together,
/// in the rows that `mask` names, or in all.
///
/// In each state `v` is `[rows, heads, head_dim]` and `s` `[rows, heads]`, all
/// of one shape; `mask` is a contiguous `[rows]` of `u8` or bool, not 0 where
/// a row is merged. Zero rows are nothing to do.
///
/// # Errors
/// As [`merge_state`].
pub fn merge_state_in_place(
    stream: &Stream,
    state: &mut StateMut<'_>,
    other: &State<'_>,
    mask: Option<&TensorRef<'_>>,
) -> Result<()> {
    let check = Check::new("merge_state_in_place", stream)?;
    let shape = check_merge_state_in_place(&check, state, other, mask)?;
    let target = [&state.v.raw, &state.s.raw];
    let other = Some([&other.v.raw, &other.s.raw]);
    let states = States { count: 1, of: target, other, mask: mask.map(|mask| &mask.raw) };
    // SAFETY: as in `merge_state`; the mask has a byte for each row. The kernel
    // reads what it merges before it writes.
    unsafe { shape.merge(&check, stream, &states, target) }
}

/// All that the kernel of [`merge_state_in_place`] assumes.
pub(crate) fn check_merge_state_in_place(
    check: &Check<'_>,
    state: &StateMut<'_>,
    other: &State<'_>,
    mask: Option<&TensorRef<'_>>,
) -> Result<Shape> {
    let shape = Shape::of(check, "state.v", &state.v.raw)?;
    shape.check(check, ["state.v", "state.s"], [&state.v.raw, &state.s.raw])?;
    shape.check(check, ["other.v", "other.s"], [&other.v.raw, &other.s.raw])?;
    if let Some(mask) = mask {
        check.plain("mask", &mask.raw, &[DType::U8, DType::Bool], &[shape.rows], 1)?;
    }
    Ok(shape)
}

/// Merges any number of states: `states.v` is `[rows, states, heads,
/// head_dim]`, `states.s` `[rows, states, heads]`, `merged.v` `[rows, heads,
/// head_dim]` and `merged.s` `[rows, heads]`. Zero rows are nothing to do.
///
/// # Errors
/// As [`merge_state`]; also when there are no states.
pub fn merge_states(stream: &Stream, merged: &mut StateMut<'_>, states: &State<'_>) -> Result<()> {
    let check = Check::new("merge_states", stream)?;
    let shape = check_merge_states(&check, merged, states)?;
    let (v, s) = (&states.v.raw, &states.s.raw);
    let count = v.shape()[1];
    let states = States { count: count as u64, of: [v, s], other: None, mask: None };
    // SAFETY: as in `merge_state`; there are `count` states in each row.
    unsafe { shape.merge(&check, stream, &states, [&merged.v.raw, &merged.s.raw]) }
}

/// All that the kernel of [`merge_states`] assumes.
pub(crate) fn check_merge_states(
    check: &Check<'_>,
    merged: &StateMut<'_>,
    states: &State<'_>,
) -> Result<Shape> {
    let shape = Shape::of(check, "merged.v", &merged.v.raw)?;
    shape.check(check, ["merged.v", "merged.s"], [&merged.v.raw, &merged.s.raw])?;
    let (v, s) = (&states.v.raw, &states.s.raw);
    check.tensor("states.v", v, &[shape.dtype], &[4])?;
    let count = v.shape()[1];
    if count == 0 {
        return check.fail("states.v", format!("its shape is {:?}; there must be a state", v.shape()));
    }
    check.shape("states.v", v, &[shape.rows, count, shape.heads, shape.head_dim])?;
    check.tensor("states.s", s, &[DType::F32], &[3])?;
    check.shape("states.s", s, &[shape.rows, count, shape.heads])?;
    check_storage(check, ["states.v", "states.s"], [v, s])?;
    Ok(shape)
}

/// Has the kernel compiled, which a capture does not allow.
pub(super) fn prepare(dtype: DType) -> Result<()> {
    kernel(dtype).load(FlashInferRuntime::get()?.cuda()).map(drop)
}

/// Whether states of this head dimension can be merged.
pub(super) fn has_head_dim(head_dim: i64) -> bool {
    head_dim > 0 && head_dim <= MAX_HEAD_DIM && head_dim % VECTOR as i64 == 0
}

fn kernel(dtype: DType) -> &'static PtxKernel {
    if dtype == DType::BF16 { &BF16 } else { &F16 }
}

/// Checked states to merge.
struct States<'a> {
    /// States of each row that lie one after the other.
    count: u64,
    of: [&'a RawTensor; 2],
    /// One more of each row.
    other: Option<[&'a RawTensor; 2]>,
    mask: Option<&'a RawTensor>,
}

/// The sizes that all states of a call share.
pub(crate) struct Shape {
    dtype: DType,
    rows: i64,
    heads: i64,
    head_dim: i64,
}

impl Shape {
    fn of(check: &Check<'_>, argument: &'static str, v: &RawTensor) -> Result<Self> {
        check.tensor(argument, v, &DTYPES, &[3])?;
        let (rows, heads, head_dim) = (v.shape()[0], v.shape()[1], v.shape()[2]);
        if !has_head_dim(head_dim) {
            return check.fail(
                argument,
                format!("head_dim {head_dim}; expected a multiple of {VECTOR} up to {MAX_HEAD_DIM}"),
            );
        }
        Ok(Self { dtype: v.dtype, rows, heads, head_dim })
    }

    /// Checks a state of this shape.
    fn check(&self, check: &Check<'_>, names: [&'static str; 2], [v, s]: [&RawTensor; 2]) -> Result<()> {
        check.tensor(names[0], v, &[self.dtype], &[3])?;
        check.shape(names[0], v, &[self.rows, self.heads, self.head_dim])?;
        check.tensor(names[1], s, &[DType::F32], &[2])?;
        check.shape(names[1], s, &[self.rows, self.heads])?;
        check_storage(check, names, [v, s])
    }

    /// Threads for an output, and among how many of those its states are
    /// divided.
    fn threads(&self, states: u64) -> [u64; 2] {
        let units = (self.rows * self.heads) as u64;
        let lanes = self.head_dim as u64 / VECTOR;
        let idle = MANY_THREADS / (units * lanes).max(1);
        [lanes, idle.clamp(1, (THREADS / lanes).min(states))]
    }

    /// Enqueues the kernel.
    ///
    /// # Safety
    /// All tensors must have been checked to be of this shape.
    unsafe fn merge(
        &self,
        check: &Check<'_>,
        stream: &Stream,
        states: &States<'_>,
        merged: [&RawTensor; 2],
    ) -> Result<()> {
        let units = (self.rows * self.heads) as u64;
        if units == 0 {
            return Ok(());
        }
        let (cuda, kernel) = (FlashInferRuntime::get()?.cuda(), kernel(self.dtype));
        if !kernel.is_loaded() && cuda.is_capturing(stream)? {
            return check.fail(
                "stream",
                "it is being captured, and the kernel has to be compiled first; merge once before the capture"
                    .into(),
            );
        }
        let [v, s] = states.of;
        let others = [0, 1].map(|at| states.other.map(|other| other[at]));
        let tensors = [Some(v), Some(s), others[0], others[1], states.mask, Some(merged[0]), Some(merged[1])];
        let address = |tensor: Option<&RawTensor>| tensor.map_or(0, |tensor| tensor.data as u64);
        let [v, s] = [v, s].map(|tensor| tensor.data as u64);
        let [v_other, s_other] = others.map(address);
        let [v_merged, s_merged] = merged.map(|tensor| tensor.data as u64);
        let [lanes, parts] = self.threads(states.count + u64::from(states.other.is_some()));
        let mut wide = [v, s, v_other, s_other, address(states.mask), v_merged, s_merged, units];
        let mut narrow = [states.count, self.heads as u64, lanes, parts].map(|number| number as u32);
        let mut args = [std::ptr::null_mut::<c_void>(); 12];
        let sources = wide.iter_mut().map(|number| (&raw mut *number).cast());
        let sources = sources.chain(narrow.iter_mut().map(|number| (&raw mut *number).cast()));
        args.iter_mut().zip(sources).for_each(|(arg, source)| *arg = source);
        let blocks = units.div_ceil(THREADS / (lanes * parts)) as u32;
        // SAFETY: the kernel takes 8 numbers of 64 bits, then 4 of 32, which
        // describe checked tensors; below 2^32 elements, none of the numbers
        // is too large. A block has threads for at least one unit.
        unsafe { kernel.launch(cuda, stream, [blocks, THREADS as u32], &mut args, &tensors) }
    }
}

/// The kernel moves 16 bytes of `v` at a time.
fn check_storage(check: &Check<'_>, names: [&'static str; 2], [v, s]: [&RawTensor; 2]) -> Result<()> {
    for (name, tensor, alignment) in [(names[0], v, 16), (names[1], s, size_of::<f32>())] {
        check.contiguous(name, tensor)?;
        check.aligned(name, tensor, alignment)?;
        check.offsets_in_32_bits(name, tensor)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_fit_a_block() {
        for head_dim in (8..=MAX_HEAD_DIM).step_by(8) {
            assert!(has_head_dim(head_dim));
            for (rows, heads, states) in [(1, 1, 1), (1, 1, 2), (1, 1, 300), (3, 8, 40), (8192, 32, 8)] {
                let shape = Shape { dtype: DType::F16, rows, heads, head_dim };
                let [lanes, parts] = shape.threads(states);
                assert_eq!(lanes * 8, head_dim as u64);
                assert!(lanes * parts <= THREADS && (1..=states).contains(&parts), "{head_dim} {states}");
            }
        }
        for head_dim in [-8, 0, 4, 100, 1032] {
            assert!(!has_head_dim(head_dim));
        }
    }
}
