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
//! crate gives it; both are contiguous. The head dimension is 64, 128, 256 or
//! 512. A state without keys has `v` of 0 and an `s` of −∞, or of about −50000
//! where a kernel gives that (its infinity): it changes nothing that it is
//! merged with. Two states that both have −∞ give NaN, except in
//! [`merge_states`], which gives 0 and −50000.
//!
//! Source of the contract: `csrc/cascade.cu`,
//! `include/flashinfer/attention/{cascade,state}.cuh` of FlashInfer 0.6.13.
//!
//! A decode step of three requests that begin with the same 64 tokens:
//!
//! ```no_run
//! # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use flashinfer_rs::{
//!     DType, FlashInferRuntime, PageIndices, PageTable, Stream,
//!     attention::{AttentionSpec, BatchDecode, Heads, PlanMode, RunOptions, Workspace},
//!     cascade::{self, State, StateMut},
//!     cudarc::{TensorExt, TensorExtMut},
//!     kv::{KvLayout, PagedKv},
//! };
//! use half::f16;
//! let cuda = cudarc::driver::CudaContext::new(0)?.new_stream()?;
//! let stream = Stream::from(&cuda);
//! let heads = Heads { num_qo_heads: 32, num_kv_heads: 8 };
//! let decode = BatchDecode::new(FlashInferRuntime::get()?, &AttentionSpec::new(DType::F16, 128), heads)?;
//! let mut workspace = Workspace::new(&stream)?;
//!
//! let prefix = PageIndices::from_requests(9, 16, [(&[0, 1, 2, 3][..], 64); 3])?;
//! let own = PageIndices::from_requests(9, 16, [(&[4][..], 5), (&[5, 6][..], 20), (&[7][..], 1)])?;
//! let k = cuda.alloc_zeros::<f16>(9 * 16 * 8 * 128)?;
//! let (k, q) = (k.tensor(&cuda, &[9, 16, 8, 128])?, cuda.alloc_zeros::<f16>(3 * 32 * 128)?);
//! let kv = PagedKv::new(k.view(), k.view(), KvLayout::Nhd);
//! let q = q.tensor(&cuda, &[3, 32, 128])?;
//!
//! let mut v = [cuda.alloc_zeros::<f16>(3 * 32 * 128)?, cuda.alloc_zeros::<f16>(3 * 32 * 128)?];
//! let mut s = [cuda.alloc_zeros::<f32>(3 * 32)?, cuda.alloc_zeros::<f32>(3 * 32)?];
//! for (indices, (v, s)) in [prefix, own].into_iter().zip(v.iter_mut().zip(&mut s)) {
//!     let table = PageTable::new(&stream, indices)?;
//!     let plan = decode.plan(&mut workspace, &table, PlanMode::Eager)?;
//!     let (mut v, mut s) = (v.tensor_mut(&cuda, &[3, 32, 128])?, s.tensor_mut(&cuda, &[3, 32])?);
//!     plan.run(&q.view(), &kv, &mut v.view_mut(), Some(&mut s.view_mut()), &RunOptions::default())?;
//! }
//! // The first state becomes that of all tokens.
//! let ([v, v_own], [s, s_own]) = (&mut v, &mut s);
//! let (mut v, mut s) = (v.tensor_mut(&cuda, &[3, 32, 128])?, s.tensor_mut(&cuda, &[3, 32])?);
//! let (v_own, s_own) = (v_own.tensor(&cuda, &[3, 32, 128])?, s_own.tensor(&cuda, &[3, 32])?);
//! cascade::merge_state_in_place(
//!     &stream,
//!     &mut StateMut::new(v.view_mut(), s.view_mut()),
//!     &State::new(v_own.view(), s_own.view()),
//!     None,
//! )?;
//! # Ok(()) }
//! # #[cfg(not(feature = "cudarc"))] fn main() {}
//! ```

use super::{FixedFunction, check::Check};
use crate::{
    dtype::DType,
    error::Result,
    ffi::{DlTensor, Kernel, Signature, kernels},
    module::ModuleName,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    struct MergeState = "merge_state"(
        v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor, v_merged: Tensor, s_merged: Tensor,
    ) -> "void";
    struct MergeStateInPlace = "merge_state_in_place"(
        v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: OptTensor,
    ) -> "void";
    struct MergeStates = "merge_states"(v: Tensor, s: Tensor, v_merged: Tensor, s_merged: Tensor) -> "void";
}

pub(super) const SIGNATURES: &[(&str, Signature)] = &[
    ("cascade", MergeState::SIGNATURE),
    ("cascade", MergeStateInPlace::SIGNATURE),
    ("cascade", MergeStates::SIGNATURE),
];

static MERGE_STATE: FixedFunction = FixedFunction::of(ModuleName::CASCADE, &MergeState::SIGNATURE);
static MERGE_STATE_IN_PLACE: FixedFunction =
    FixedFunction::of(ModuleName::CASCADE, &MergeStateInPlace::SIGNATURE);
static MERGE_STATES: FixedFunction = FixedFunction::of(ModuleName::CASCADE, &MergeStates::SIGNATURE);

/// Element types of outputs.
const DTYPES: [DType; 2] = [DType::F16, DType::BF16];
/// Head dimensions that the kernels are compiled for.
pub(super) const HEAD_DIMS: [i64; 4] = [64, 128, 256, 512];
/// The most threads of a block.
const MAX_THREADS: i64 = 1024;
/// The most blocks in the second dimension of a launch.
const MAX_GRID_Y: i64 = 65535;

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
/// fit, a tensor is not contiguous or spans 2³² elements, or there is no
/// kernel for the head dimension. Else what the module or CUDA said.
pub fn merge_state(stream: &Stream, merged: &mut StateMut<'_>, a: &State<'_>, b: &State<'_>) -> Result<()> {
    let check = Check::new("merge_state", stream)?;
    let shape = Shape::of(&check, "a.v", &a.v.raw)?;
    shape.check(&check, ["a.v", "a.s"], [&a.v.raw, &a.s.raw])?;
    shape.check(&check, ["b.v", "b.s"], [&b.v.raw, &b.s.raw])?;
    shape.check(&check, ["merged.v", "merged.s"], [&merged.v.raw, &merged.s.raw])?;
    if shape.is_empty() {
        return Ok(());
    }
    let ([v_a, s_a], [v_b, s_b]) = (shape.fold([&a.v.raw, &a.s.raw])?, shape.fold([&b.v.raw, &b.s.raw])?);
    let [v_merged, s_merged] = shape.fold([&merged.v.raw, &merged.s.raw])?;
    let kernel = MergeState {
        v_a: DlTensor::new(&v_a),
        s_a: DlTensor::new(&s_a),
        v_b: DlTensor::new(&v_b),
        s_b: DlTensor::new(&s_b),
        v_merged: DlTensor::new(&v_merged),
        s_merged: DlTensor::new(&s_merged),
    };
    // SAFETY: all states are contiguous and aligned, of one shape and dtype
    // that the kernel has, below 2^32 elements, and folded so that a block
    // has threads for all heads.
    unsafe { kernel.call(MERGE_STATE.get(FlashInferRuntime::get()?)?, stream) }.map(drop)
}

/// Turns `state` into the state of its keys and those of `other` together,
/// in the rows that `mask` names, or in all.
///
/// In each state `v` is `[rows, heads, head_dim]` and `s` `[rows, heads]`, all
/// of one shape; `mask` is a contiguous `[rows]` of `u8` or bool, not 0 where
/// a row is merged. Zero rows are nothing to do.
///
/// # Errors
/// As [`merge_state`]; also when there is a mask and a row's heads need more
/// than 1024 threads: that is 128 heads of 64 elements, 64 of 128, or 32 of
/// 256 or 512.
pub fn merge_state_in_place(
    stream: &Stream,
    state: &mut StateMut<'_>,
    other: &State<'_>,
    mask: Option<&TensorRef<'_>>,
) -> Result<()> {
    let check = Check::new("merge_state_in_place", stream)?;
    let mut shape = Shape::of(&check, "state.v", &state.v.raw)?;
    shape.check(&check, ["state.v", "state.s"], [&state.v.raw, &state.s.raw])?;
    shape.check(&check, ["other.v", "other.s"], [&other.v.raw, &other.s.raw])?;
    if let Some(mask) = mask {
        check.plain("mask", &mask.raw, &[DType::U8, DType::Bool], &[shape.rows], 1)?;
        // A row has one place in the mask, so it cannot become several.
        shape.check_threads(&check, "state.v")?;
        shape.heads_per_block = shape.heads;
    }
    if shape.is_empty() {
        return Ok(());
    }
    let [v, s] = shape.fold([&state.v.raw, &state.s.raw])?;
    let [v_other, s_other] = shape.fold([&other.v.raw, &other.s.raw])?;
    let kernel = MergeStateInPlace {
        v: DlTensor::new(&v),
        s: DlTensor::new(&s),
        v_other: DlTensor::new(&v_other),
        s_other: DlTensor::new(&s_other),
        mask: mask.map(|mask| DlTensor::new(&mask.raw)),
    };
    // SAFETY: as in `merge_state`; the mask has a byte for each row, which
    // were not folded if there is one.
    unsafe { kernel.call(MERGE_STATE_IN_PLACE.get(FlashInferRuntime::get()?)?, stream) }.map(drop)
}

/// Merges any number of states: `states.v` is `[rows, states, heads,
/// head_dim]`, `states.s` `[rows, states, heads]`, `merged.v` `[rows, heads,
/// head_dim]` and `merged.s` `[rows, heads]`. Zero rows are nothing to do.
///
/// # Errors
/// As [`merge_state`]; also when there are no states, or fewer states than
/// rows and a row's heads need more than 1024 threads: that is 128 heads of
/// 64 elements, 64 of 128, or 32 of 256 or 512.
pub fn merge_states(stream: &Stream, merged: &mut StateMut<'_>, states: &State<'_>) -> Result<()> {
    let check = Check::new("merge_states", stream)?;
    let shape = Shape::of(&check, "merged.v", &merged.v.raw)?;
    shape.check(&check, ["merged.v", "merged.s"], [&merged.v.raw, &merged.s.raw])?;
    let (v, s) = (&states.v.raw, &states.s.raw);
    check.tensor("states.v", v, &[shape.dtype], &[4])?;
    let count = v.shape()[1];
    if count == 0 {
        return check.fail("states.v", format!("its shape is {:?}; there must be a state", v.shape()));
    }
    check.shape("states.v", v, &[shape.rows, count, shape.heads, shape.head_dim])?;
    check.tensor("states.s", s, &[DType::F32], &[3])?;
    check.shape("states.s", s, &[shape.rows, count, shape.heads])?;
    check_storage(&check, ["states.v", "states.s"], [v, s])?;
    // With many states a block serves one head, with few all heads of a row.
    if count < shape.rows {
        shape.check_threads(&check, "states.v")?;
    } else if shape.heads > MAX_GRID_Y {
        return check
            .fail("states.v", format!("{} heads; at most {MAX_GRID_Y} can be launched", shape.heads));
    }
    if shape.is_empty() {
        return Ok(());
    }
    let kernel = MergeStates {
        v: DlTensor::new(v),
        s: DlTensor::new(s),
        v_merged: DlTensor::new(&merged.v.raw),
        s_merged: DlTensor::new(&merged.s.raw),
    };
    // SAFETY: all tensors are contiguous, aligned, of the shapes and dtypes
    // that the kernel derives from the first, and below 2^32 elements; the
    // launch it picks has threads for all heads.
    unsafe { kernel.call(MERGE_STATES.get(FlashInferRuntime::get()?)?, stream) }.map(drop)
}

/// The sizes that all states of a call share.
struct Shape {
    dtype: DType,
    rows: i64,
    heads: i64,
    head_dim: i64,
    /// Heads of a row that one block serves; the others become further rows.
    heads_per_block: i64,
}

impl Shape {
    fn of(check: &Check<'_>, argument: &'static str, v: &RawTensor) -> Result<Self> {
        check.tensor(argument, v, &DTYPES, &[3])?;
        let (rows, heads, head_dim) = (v.shape()[0], v.shape()[1], v.shape()[2]);
        if !HEAD_DIMS.contains(&head_dim) {
            return check.fail(argument, format!("head_dim {head_dim}; the kernel has {HEAD_DIMS:?}"));
        }
        let mut shape = Self { dtype: v.dtype, rows, heads, head_dim, heads_per_block: heads };
        let most = max_heads(v.dtype, head_dim);
        if heads > most {
            shape.heads_per_block = (1..=most).rev().find(|group| heads % group == 0).unwrap_or(1);
        }
        Ok(shape)
    }

    fn is_empty(&self) -> bool {
        self.rows == 0 || self.heads == 0
    }

    fn check_threads(&self, check: &Check<'_>, argument: &'static str) -> Result<()> {
        let most = max_heads(self.dtype, self.head_dim);
        if self.heads <= most {
            return Ok(());
        }
        check.fail(
            argument,
            format!(
                "{} heads of {} elements; a block of {MAX_THREADS} threads serves {most}",
                self.heads, self.head_dim
            ),
        )
    }

    /// Checks a state of this shape.
    fn check(&self, check: &Check<'_>, names: [&'static str; 2], [v, s]: [&RawTensor; 2]) -> Result<()> {
        check.tensor(names[0], v, &[self.dtype], &[3])?;
        check.shape(names[0], v, &[self.rows, self.heads, self.head_dim])?;
        check.tensor(names[1], s, &[DType::F32], &[2])?;
        check.shape(names[1], s, &[self.rows, self.heads])?;
        check_storage(check, names, [v, s])
    }

    /// A checked state with as many heads in a row as one block serves.
    /// Contiguous rows and heads follow each other, so the memory is the same.
    fn fold(&self, [v, s]: [&RawTensor; 2]) -> Result<[RawTensor; 2]> {
        let heads = self.heads_per_block as usize;
        let rows = (self.rows * self.heads) as usize / heads;
        let shape = [rows, heads, self.head_dim as usize];
        Ok([
            RawTensor::new(v.data, v.device, v.dtype, &shape, None)?,
            RawTensor::new(s.data, s.device, s.dtype, &shape[..2], None)?,
        ])
    }
}

/// Heads for which a block has threads.
fn max_heads(dtype: DType, head_dim: i64) -> i64 {
    let vector = (16 / dtype.size() as i64).max(head_dim / 32);
    MAX_THREADS / (head_dim / vector)
}

/// Whether the merge of any number of states can be launched, as other
/// launchers do it on their own. One row always has a block for each head.
pub(super) fn can_merge(dtype: DType, rows: usize, heads: usize, head_dim: usize) -> bool {
    let (heads, head_dim) = (heads as i64, head_dim as i64);
    HEAD_DIMS.contains(&head_dim) && heads <= MAX_GRID_Y && (rows == 1 || heads <= max_heads(dtype, head_dim))
}

/// The kernels compute offsets from shapes, in 32 bits, and move 16 bytes of
/// `v` at a time.
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
    use crate::device::Device;

    #[test]
    fn heads_beyond_a_block_become_rows() {
        // SAFETY: the address is never followed.
        let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
        let check = Check::new("test", &stream).unwrap();
        for (heads, head_dim, per_block) in [
            (32, 512, 32),
            (128, 512, 32),
            (33, 512, 11),
            (37, 256, 1),
            (128, 64, 128),
            (129, 64, 43),
            (72, 128, 36),
        ] {
            let new = |dtype, shape: &[usize]| {
                RawTensor::new(16 as *mut _, Device::Cuda(0), dtype, shape, None).unwrap()
            };
            let v = new(DType::F16, &[6, heads, head_dim]);
            let shape = Shape::of(&check, "v", &v).unwrap();
            let [v, s] = shape.fold([&v, &new(DType::F32, &[6, heads])]).unwrap();
            let rows = (6 * heads) as i64 / per_block;
            assert_eq!(v.shape(), [rows, per_block, head_dim as i64], "{heads} heads of {head_dim}");
            assert_eq!(s.shape(), [rows, per_block]);
        }
    }
}
