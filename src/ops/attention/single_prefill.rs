//! Prefill of one request, whose keys and values are plain tensors.
//!
//! Source of the contract: `csrc/single_prefill.cu`, `csrc/single_prefill_sm90.cu`,
//! `include/flashinfer/attention/prefill.cuh` and `hopper/prefill_sm90.cuh` of
//! FlashInfer 0.6.13.

use super::{
    empty_states,
    modules::Family,
    options::{PrefillRunOptions, RunOptions, check_sm_scale},
    output_scale::OutputScale,
    planned::{ROPE_RCP_SCALE, ROPE_RCP_THETA, check_described, check_keys, check_output},
    single_scratch::{MAX_KEYS, SingleWork, scratch, write_empty_states},
    spec::{AttentionSpec, Backend, Heads},
    workspace::Workspace,
};
use crate::{
    error::Result,
    ffi::{DlTensor, Kernel, KernelFunction, Signature, TensorObject, kernels},
    kv::KvLayout,
    module::Module,
    ops::check::Check,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
struct Fa2Run = "run"(
    q: Tensor, k: Tensor, v: Tensor, tmp: Tensor, o: Tensor, maybe_lse: OptTensor,
    mask_mode: Int, layout: Int, window_left: Int,
    maybe_custom_mask: OptTensorObject, maybe_alibi_slopes: OptTensorObject,
    maybe_k_cache_sf: OptTensorObject, maybe_v_cache_sf: OptTensorObject,
    logits_soft_cap: Float, sm_scale: Float, rope_rcp_scale: Float, rope_rcp_theta: Float,
) -> "void";
struct Fa3Run = "run"(
    q: Tensor, k: Tensor, v: Tensor, tmp: Tensor, o: Tensor, maybe_lse: OptTensor,
    mask_mode: Int, layout: Int, window_left: Int,
    maybe_scale_v: OptTensorObject, logits_soft_cap: Float, sm_scale: Float, scale_v_scalar: Float,
) -> "void";}

pub(in crate::ops) const SIGNATURES: &[(&str, &[Signature])] = &[
    // Modules with 8-bit queries take other arguments.
    ("single_prefill_with_kv_cache_dtype_q_*16_dtype_kv_*_f16qk_False", Fa2Run::SIGNATURES),
    ("single_prefill_with_kv_cache_dtype_q_*16_dtype_kv_*_f16qk_False_sm90", Fa3Run::SIGNATURES),
];

const OP: &str = "SinglePrefill::run_with";

/// Prefill of one request: attention of any number of queries to the
/// request's keys.
///
/// What [`Backend::Auto`] picks, FlashAttention 2 or 3, [`backend`](Self::backend)
/// says. FlashInfer's wheels have modules of FlashAttention 2 only; one that you
/// build may have others.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{
///     DType, Stream,
///     attention::{AttentionSpec, PrefillRunOptions, SinglePrefill, Workspace},
///     gpu::Tensor,
/// };
/// use half::f16;
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let prefill = SinglePrefill::new(&stream, &AttentionSpec::new(DType::F16, 128))?;
/// let mut workspace = Workspace::new(&stream)?;
///
/// // The last 100 of 300 tokens, with 32 query heads on 8 KV heads.
/// let q = Tensor::<f16>::zeros(&stream, &[100, 32, 128])?;
/// let k = Tensor::<f16>::zeros(&stream, &[300, 8, 128])?;
/// let v = Tensor::<f16>::zeros(&stream, &[300, 8, 128])?;
/// let mut out = Tensor::<f16>::zeros(&stream, &[100, 32, 128])?;
/// let (kv, causal) = ([&k.view(), &v.view()], PrefillRunOptions::causal());
/// prefill.run_with(&mut workspace, &q.view(), kv, &mut out.view_mut(), None, &causal)?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
#[derive(Clone, Copy, Debug)]
pub struct SinglePrefill {
    spec: AttentionSpec,
    fa3: bool,
    module: &'static Module,
    run: KernelFunction,
}

impl SinglePrefill {
    /// Resolves the module of a spec for the stream's device; downloads the
    /// pinned wheel if no local source holds it and that is allowed.
    ///
    /// # Errors
    /// [`Unsupported`](crate::FlashInferError::Unsupported): no such module can exist, or not for
    /// this GPU; or it is in no local source, and FlashInfer publishes none. Else
    /// the module cannot be had or opened.
    pub fn new(stream: &Stream, spec: &AttentionSpec) -> Result<Self> {
        let (module, fa3) = spec.first_prefill(stream, Family::Single)?;
        OutputScale::prepare(spec)?;
        let declared = if fa3 { Fa3Run::SIGNATURES } else { Fa2Run::SIGNATURES };
        Ok(Self { spec: *spec, fa3, module, run: module.kernel(declared)? })
    }

    /// The module that serves the spec.
    pub fn module(&self) -> &'static Module {
        self.module
    }

    /// The kernels that were picked: FlashAttention 2 or 3.
    pub fn backend(&self) -> Backend {
        if self.fa3 { Backend::Fa3 } else { Backend::Fa2 }
    }

    /// Attention of each query to all keys, on the workspace's stream.
    ///
    /// # Errors
    /// As [`run_with`](Self::run_with).
    pub fn run(
        &self,
        workspace: &mut Workspace,
        q: &TensorRef<'_>,
        kv: [&TensorRef<'_>; 2],
        out: &mut TensorMut<'_>,
    ) -> Result<()> {
        self.run_with(workspace, q, kv, out, None, &PrefillRunOptions::default())
    }

    /// Attention of each query to the keys that the mask shows, on the
    /// workspace's stream.
    ///
    /// `q` is `[queries, num_qo_heads, head_dim_qk]`, `k`
    /// `[keys, num_kv_heads, head_dim_qk]`, `v`
    /// `[keys, num_kv_heads, head_dim_vo]`, each with any strides but for the
    /// last; keys that are stored as `[num_kv_heads, keys, head_dim_qk]` (HND)
    /// are a [permuted](TensorRef::permute) view. `out` is
    /// `[queries, num_qo_heads, head_dim_vo]` and contiguous, `lse`, if given,
    /// a contiguous `f32` `[queries, num_qo_heads]` of base-2 logarithms. A
    /// query that sees no key gets zeros, and −∞. Zero queries are nothing to do.
    ///
    /// Of scores below −50000 see [`attention`](super#very-negative-scores).
    ///
    /// A [`Mask::Custom`](super::Mask::Custom) is that of a batch of this one
    /// request; [`Mask::MultiItem`](super::Mask::MultiItem) is for paged keys.
    ///
    /// With FlashAttention 2, few queries over many keys need scratch memory,
    /// at most about as much as the multiprocessors have shared memory (32 MiB
    /// on an H200): the workspace's float part.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before anything is
    /// launched: a device, stream, dtype, shape, stride, alignment or mask does
    /// not fit the others or the spec; with [`Mask::Causal`](super::Mask::Causal) there are keys,
    /// but fewer than queries; with FlashAttention 3 a tensor names elements
    /// more than once; the workspace is too small and does not
    /// [grow](Workspace#growth), as during a capture.
    /// [`Unsupported`](crate::FlashInferError::Unsupported): a custom mask with
    /// FlashAttention 3, or a multi-item mask. Else what the module or CUDA
    /// said.
    pub fn run_with(
        &self,
        workspace: &mut Workspace,
        q: &TensorRef<'_>,
        [k, v]: [&TensorRef<'_>; 2],
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        options: &PrefillRunOptions<'_>,
    ) -> Result<()> {
        let PrefillRunOptions { mask, run: options } = options;
        let (spec, stream) = (&self.spec, &workspace.stream().clone());
        let check = Check::new(OP, stream)?;
        let (q, k, v, out, lse) = (&q.raw, &k.raw, &v.raw, &out.raw, lse.map(|lse| &lse.raw));
        let work = check_single_prefill(&check, spec, self.fa3, [q, k, v, out], lse, options)?;
        let SingleWork { rows, keys, .. } = work;
        let scale = options.v_scale.filter(|_| !self.fa3);
        OutputScale::check_ready(&check, spec.dtype_o, scale)?;
        mask.check(&check, spec, self.fa3, std::iter::once((rows, keys)), false)?;
        if rows == 0 {
            return Ok(());
        }
        if keys == 0 {
            // SAFETY: output and sums were checked.
            return unsafe { write_empty_states(stream, out, lse) };
        }
        let needed = if self.fa3 { 0 } else { work.on_gpu(stream, SingleWork::fa2_scratch)? };
        let tmp = scratch(&check, workspace, needed)?;
        if mask.is_custom() && lse.is_some() {
            empty_states::check_ready(&check, stream)?;
        }
        let [q, k, v, out] = [q, k, v, out].map(|tensor| tensor.with_plain_unit_strides());
        let mask = mask.tensors(self.fa3)?;
        macro_rules! run {
            ($kernel:ident { $($own:ident: $value:expr),* $(,)? }) => {
                $kernel {
                    q: DlTensor::new(&q),
                    k: DlTensor::new(&k),
                    v: DlTensor::new(&v),
                    tmp: DlTensor::new(&tmp),
                    o: DlTensor::new(&out),
                    maybe_lse: lse.map(DlTensor::new),
                    mask_mode: mask.mode,
                    // The launcher of FlashAttention 3 reads sizes as if there
                    // were no other, so the layout is said by strides.
                    layout: KvLayout::Nhd.code(),
                    window_left: spec.window_left_code(),
                    logits_soft_cap: spec.soft_cap_code(),
                    sm_scale: options.logit_scale(spec),
                    $($own: $value,)*
                }
                .call(&self.run, stream)
            };
        }
        // SAFETY: all tensors have the dtypes, shapes, strides and alignment of
        // this module, with at least one query and one key; a custom mask has a
        // bit for each pair of them; the scratch memory is none, or as large as
        // what the kernels can write, and used on its own stream only.
        unsafe {
            if self.fa3 {
                run!(Fa3Run { maybe_scale_v: None, scale_v_scalar: options.v_scale.unwrap_or(1.0).into() })?;
                return Ok(());
            }
            run!(Fa2Run {
                maybe_custom_mask: mask.custom.as_ref().map(|[bits, _]| TensorObject::new(bits)),
                maybe_alibi_slopes: options.alibi_slopes.as_ref().map(TensorObject::from),
                maybe_k_cache_sf: None,
                maybe_v_cache_sf: None,
                rope_rcp_scale: ROPE_RCP_SCALE,
                rope_rcp_theta: ROPE_RCP_THETA,
            })?;
            OutputScale::apply(stream, &out, options.v_scale)?;
            // Without a custom mask, every query sees a key.
            let Some(lse) = lse.filter(|_| mask.custom.is_some()) else { return Ok(()) };
            let window_left = spec.window_left_code();
            let keys = empty_states::KeyLengths::One(keys);
            empty_states::EmptyRows { keys, qo_indptr: None, batch: 1, mask: &mask, window_left, sinks: None }
                .mark(stream, lse)
        }
    }
}

/// All that the kernels assume of tensors and options, but for the mask.
pub(crate) fn check_single_prefill<'s>(
    check: &Check<'_>,
    spec: &'s AttentionSpec,
    fa3: bool,
    [q, k, v, out]: [&RawTensor; 4],
    lse: Option<&RawTensor>,
    options: &RunOptions<'_>,
) -> Result<SingleWork<'s>> {
    check.tensor("q", q, &[spec.dtype_q], &[3])?;
    check.tensor("k", k, &[spec.dtype_kv], &[3])?;
    let [rows, num_qo_heads] = [0, 1].map(|axis| q.shape()[axis] as usize);
    let [keys, num_kv_heads] = [0, 1].map(|axis| k.shape()[axis] as usize);
    let work = SingleWork { spec, heads: Heads { num_qo_heads, num_kv_heads }, rows, keys };
    work.heads.check(OP)?;
    check_output(check, spec, work.heads, rows, q, out, lse)?;
    check_keys(check, spec, work.heads, keys, [k, v])?;
    if keys > MAX_KEYS {
        return check.fail("k", format!("{keys} keys; at most 2^30"));
    }
    check_described(check, fa3, &[("q", q), ("k", k), ("v", v)])?;
    options.check(check, spec, work.heads)?;
    check_sm_scale(check, options.logit_scale(spec))?;
    Ok(work)
}
