//! Attention of one request to keys and values that are plain tensors.
//!
//! There is nothing to plan: the launchers look at the sizes of the tensors
//! and decide on their own whether several blocks divide the keys. Then each
//! block writes its part of the result to scratch memory that nobody tells
//! them the size of, and a second kernel merges the parts. So what they can
//! write at most is computed here, before each launch. Where the merge could
//! not be launched, or the launcher would fail while it decides, it is given
//! no scratch memory, which makes it leave the keys undivided.
//!
//! Source of the contract: `csrc/single_prefill.cu`,
//! `csrc/single_prefill_sm90.cu`, `csrc/single_decode.cu`,
//! `include/flashinfer/attention/{prefill,decode,cascade}.cuh` and
//! `hopper/prefill_sm90.cuh` of FlashInfer 0.6.13.

use std::ffi::c_void;

use super::{
    decode::check_cuda_cores,
    empty_states,
    options::{PrefillRunOptions, RunOptions, check_sm_scale},
    output_scale::OutputScale,
    planned::{MAX_BLOCKS_PER_SM, ROPE_RCP_SCALE, ROPE_RCP_THETA, check_described, check_keys, check_output},
    spec::{AttentionSpec, Backend, Heads},
    workspace::{Need, Workspace},
};
use crate::{
    capture,
    cuda::DeviceAttribute,
    dtype::DType,
    error::{FlashInferError, Result},
    ffi::{DlTensor, Function, Kernel, Signature, TensorObject, kernels},
    kv::KvLayout,
    module::Module,
    ops::check::Check,
    runtime::FlashInferRuntime,
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
    ) -> "void";
    struct DecodeRun = "run"(
        q: Tensor, k: Tensor, v: Tensor, tmp: Tensor, o: Tensor, maybe_lse: OptTensor,
        layout: Int, window_left: Int, maybe_alibi_slopes: OptTensorObject,
        logits_soft_cap: Float, sm_scale: Float, rope_rcp_scale: Float, rope_rcp_theta: Float,
    ) -> "void";
}

pub(in crate::ops) const SIGNATURES: &[(&str, Signature)] = &[
    // Modules with 8-bit queries take other arguments.
    ("single_prefill_with_kv_cache_dtype_q_*16_dtype_kv_*_f16qk_False", Fa2Run::SIGNATURE),
    ("single_prefill_with_kv_cache_dtype_q_*16_dtype_kv_*_f16qk_False_sm90", Fa3Run::SIGNATURE),
    ("single_decode_with_kv_cache_*", DecodeRun::SIGNATURE),
];

const PREFILL_OP: &str = "SinglePrefill::run_with";
const DECODE_OP: &str = "SingleDecode::run_with";
/// The fewest keys that a launcher gives to a block.
const MIN_CHUNK: usize = 256;
/// Queries (times heads of a group) that a block of FlashAttention 2 can work on.
const FA2_TILES: [usize; 3] = [16, 64, 128];
/// With more keys, sums of positions and windows could reach 2³².
const MAX_KEYS: usize = 1 << 30;
/// Head dimensions that the launchers' merge of parts is compiled for.
const MERGED_HEAD_DIMS: [usize; 4] = [64, 128, 256, 512];
/// The most threads of one of its blocks.
const MAX_MERGE_THREADS: usize = 1024;
/// The most blocks in the second dimension of a launch.
const MAX_GRID_Y: usize = 65535;

/// Prefill of one request: attention of any number of queries to the
/// request's keys.
///
/// [`Backend::Auto`] takes FlashAttention 3 on compute capability 9.0 where
/// queries and keys have one width and a module exists, else FlashAttention 2,
/// as [`BatchPrefill`](super::BatchPrefill) does. FlashInfer's wheel has modules
/// of FlashAttention 2 only; one that you build may have others.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{
///     DType, Stream,
///     attention::{AttentionSpec, PrefillRunOptions, SinglePrefill, Workspace},
///     cudarc::Tensor,
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
    run: Function,
}

impl SinglePrefill {
    /// Resolves the module of a spec for the stream's device; downloads the
    /// pinned wheel if no local source holds it and that is allowed.
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: no such module can exist, or not for
    /// this GPU. Else the module cannot be had or opened.
    pub fn new(stream: &Stream, spec: &AttentionSpec) -> Result<Self> {
        spec.check_called()?;
        let (module, fa3) = spec.first_prefill(stream, AttentionSpec::single_prefill_module)?;
        OutputScale::prepare(spec)?;
        Ok(Self { spec: *spec, fa3, module, run: module.function("run")? })
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
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) before anything is
    /// launched: a device, stream, dtype, shape, stride, alignment or mask does
    /// not fit the others or the spec; with [`Mask::Causal`](super::Mask::Causal) there are keys,
    /// but fewer than queries; with FlashAttention 3 a tensor names elements
    /// more than once; the workspace is too small and does not
    /// [grow](Workspace#growth), as during a capture.
    /// [`Unsupported`](FlashInferError::Unsupported): a custom mask with
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
        let check = Check::new(PREFILL_OP, stream)?;
        let (q, k, v, out, lse) = (&q.raw, &k.raw, &v.raw, &out.raw, lse.map(|lse| &lse.raw));
        check.tensor("q", q, &[spec.dtype_q], &[3])?;
        check.tensor("k", k, &[spec.dtype_kv], &[3])?;
        let [rows, num_qo_heads] = [0, 1].map(|axis| q.shape()[axis] as usize);
        let [keys, num_kv_heads] = [0, 1].map(|axis| k.shape()[axis] as usize);
        let work = Work { spec, heads: Heads { num_qo_heads, num_kv_heads }, rows, keys };
        work.heads.check(PREFILL_OP)?;
        check_output(&check, spec, work.heads, rows, q, out, lse)?;
        check_keys(&check, spec, work.heads, keys, [k, v])?;
        if keys > MAX_KEYS {
            return check.fail("k", format!("{keys} keys; at most 2^30"));
        }
        check_described(&check, self.fa3, &[("q", q), ("k", k), ("v", v)])?;
        options.check(&check, spec, work.heads)?;
        check_sm_scale(&check, options.logit_scale(spec))?;
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
        let needed = if self.fa3 { 0 } else { work.on_gpu(stream, Work::fa2_scratch)? };
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
            let keys = empty_states::Keys::One(keys);
            empty_states::Rows { keys, qo_indptr: None, batch: 1, mask: &mask, window_left, sinks: None }
                .mark(stream, lse)
        }
    }
}

/// Decode of one request: attention of one query to all keys, on CUDA cores.
///
/// It has kernels for 1, 2, 3, 4 and 8 query heads per KV head and equal head
/// dimensions. For others, and for keys with other strides, there is
/// [`SinglePrefill`] with one query.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{
///     DType, Stream,
///     attention::{AttentionSpec, Heads, SingleDecode, Workspace},
///     cudarc::Tensor,
/// };
/// use half::f16;
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let mut workspace = Workspace::new(&stream)?;
/// let decode = SingleDecode::new(&stream, &AttentionSpec::new(DType::F16, 128), Heads::new(32, 8))?;
///
/// let q = Tensor::<f16>::zeros(&stream, &[32, 128])?;
/// let k = Tensor::<f16>::zeros(&stream, &[300, 8, 128])?;
/// let v = Tensor::<f16>::zeros(&stream, &[300, 8, 128])?;
/// let mut out = Tensor::<f16>::zeros(&stream, &[32, 128])?;
/// decode.run(&mut workspace, &q.view(), [&k.view(), &v.view()], &mut out.view_mut())?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
#[derive(Clone, Copy, Debug)]
pub struct SingleDecode {
    spec: AttentionSpec,
    heads: Heads,
    module: &'static Module,
    run: Function,
}

impl SingleDecode {
    /// Resolves the module of a spec for these heads; downloads the pinned
    /// wheel if no local source holds it and that is allowed.
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: no such module can exist, or it has no
    /// kernel for the group size; or the spec asks for
    /// [`Backend::Fa2`] or [`Backend::Fa3`]. Else the module cannot be had or
    /// opened.
    pub fn new(stream: &Stream, spec: &AttentionSpec, heads: Heads) -> Result<Self> {
        stream.check_usable_here("SingleDecode::new")?;
        const INSTEAD: &str = "use SinglePrefill with one query";
        let group = heads.check("SingleDecode::new")?;
        if !matches!(spec.backend, Backend::Auto | Backend::CudaCores) {
            return Err(FlashInferError::Unsupported {
                what: format!("decode of one request with Backend::{:?}", spec.backend),
                available: format!("it is on CUDA cores; {INSTEAD}"),
            });
        }
        check_cuda_cores(spec, group, INSTEAD)?;
        let module = FlashInferRuntime::get()?.module(&spec.single_decode_module()?)?;
        OutputScale::prepare(spec)?;
        Ok(Self { spec: *spec, heads, module, run: module.function("run")? })
    }

    /// The module that serves the spec.
    pub fn module(&self) -> &'static Module {
        self.module
    }

    /// The spec.
    pub fn spec(&self) -> &AttentionSpec {
        &self.spec
    }

    /// The heads.
    pub fn heads(&self) -> Heads {
        self.heads
    }

    /// `out = softmax(q · kᵀ · sm_scale) · v` for each head, on the workspace's
    /// stream, with the default options.
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
        self.run_with(workspace, q, kv, out, None, &RunOptions::default())
    }

    /// As [`run`](Self::run), with an LSE and options.
    ///
    /// `q` and `out` are `[num_qo_heads, head_dim]` and contiguous, `lse`, if
    /// given, a contiguous `f32` `[num_qo_heads]` of base-2 logarithms. `k` and
    /// `v` are `[keys, num_kv_heads, head_dim]`, both contiguous (NHD), or both
    /// the [permuted](TensorRef::permute) view of a contiguous
    /// `[num_kv_heads, keys, head_dim]` (HND). Without keys there are zeros, and
    /// −∞.
    ///
    /// Of scores below −50000 see [`attention`](super#very-negative-scores).
    ///
    /// More than 256 keys need scratch memory, up to
    /// 32 · multiprocessors · group size · (2 · head_dim + 4) bytes: the
    /// workspace's float part.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) before anything is
    /// launched: a device, stream, dtype, shape, stride or alignment does not
    /// fit; the float workspace is too small. Else what the module or CUDA
    /// said.
    pub fn run_with(
        &self,
        workspace: &mut Workspace,
        q: &TensorRef<'_>,
        [k, v]: [&TensorRef<'_>; 2],
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        options: &RunOptions<'_>,
    ) -> Result<()> {
        let (spec, heads, stream) = (&self.spec, self.heads, &workspace.stream().clone());
        let check = Check::new(DECODE_OP, stream)?;
        let (q, out, lse) = (&q.raw, &out.raw, lse.map(|lse| &lse.raw));
        let row = |name, tensor: &RawTensor, dtype, rank| {
            check.tensor(name, tensor, &[dtype], &[rank]).and_then(|()| tensor.as_one_row())
        };
        let (q_row, out_row) = (row("q", q, spec.dtype_q, 2)?, row("out", out, spec.dtype_o, 2)?);
        let lse_row = lse.map(|lse| row("lse", lse, DType::F32, 1)).transpose()?;
        check_output(&check, spec, heads, 1, &q_row, &out_row, lse_row.as_ref())?;
        check.contiguous("q", q)?;
        check.tensor("k", &k.raw, &[spec.dtype_kv], &[3])?;
        let keys = k.shape()[0] as usize;
        check_keys(&check, spec, heads, keys, [&k.raw, &v.raw])?;
        let (layout, [k, v]) = stored(&check, [k, v])?;
        options.check(&check, spec, heads)?;
        OutputScale::check_ready(&check, spec.dtype_o, options.v_scale)?;
        if keys == 0 {
            // SAFETY: output and sums were checked.
            return unsafe { write_empty_states(stream, out, lse) };
        }
        let needed = Work { spec, heads, rows: 1, keys }.on_gpu(stream, Work::decode_scratch)?;
        let tmp = scratch(&check, workspace, needed)?;
        let kernel = DecodeRun {
            q: DlTensor::new(q),
            k: DlTensor::new(&k),
            v: DlTensor::new(&v),
            tmp: DlTensor::new(&tmp),
            o: DlTensor::new(out),
            maybe_lse: lse.map(DlTensor::new),
            layout: layout.code(),
            window_left: spec.window_left_code(),
            maybe_alibi_slopes: options.alibi_slopes.as_ref().map(TensorObject::from),
            logits_soft_cap: spec.soft_cap_code(),
            sm_scale: options.logit_scale(spec),
            rope_rcp_scale: ROPE_RCP_SCALE,
            rope_rcp_theta: ROPE_RCP_THETA,
        };
        // SAFETY: all tensors are contiguous, of the dtypes, shapes and
        // alignment of this module, with at least one key; there is a kernel
        // for the group size; the scratch memory is none, or as large as what
        // the kernels can write, and used on its own stream only.
        unsafe {
            kernel.call(&self.run, stream)?;
            OutputScale::apply(stream, out, options.v_scale)
        }
    }
}

/// The layout in which keys and values are stored contiguously, and what they
/// are in it.
fn stored(check: &Check<'_>, kv: [&TensorRef<'_>; 2]) -> Result<(KvLayout, [RawTensor; 2])> {
    for (layout, axes) in [(KvLayout::Nhd, [0, 1, 2]), (KvLayout::Hnd, [1, 0, 2])] {
        let [k, v] = kv.map(|tensor| tensor.permute(&axes).map(|view| view.raw));
        let (k, v) = (k?, v?);
        if k.is_contiguous() && v.is_contiguous() {
            return Ok((layout, [k, v]));
        }
        if k.is_contiguous() {
            return check.fail(
                "v",
                format!(
                    "its strides are {:?}, those of k {:?}; both must be stored alike and without gaps",
                    kv[1].strides(),
                    kv[0].strides()
                ),
            );
        }
    }
    check.fail(
        "k",
        format!(
            "shape {:?} with strides {:?}; it must be contiguous, or the permuted view of a contiguous \
             [heads, keys, head_dim]; SinglePrefill with one query takes other strides",
            kv[0].shape(),
            kv[0].strides()
        ),
    )
}

/// Writes what attention to no keys is.
///
/// # Safety
/// Both must be contiguous tensors on the stream's device.
unsafe fn write_empty_states(stream: &Stream, out: &RawTensor, lse: Option<&RawTensor>) -> Result<()> {
    let cuda = FlashInferRuntime::get()?.cuda();
    [Some(out), lse].into_iter().flatten().for_each(capture::uses);
    // SAFETY: promised by the caller.
    unsafe {
        cuda.zero(stream, out.data, out.numel() as usize * out.dtype.size())?;
        lse.map_or(Ok(()), |lse| cuda.fill(stream, lse.data, f32::NEG_INFINITY, lse.numel() as usize))
    }
}

/// The scratch memory that a launcher is given: the workspace's, which has what
/// is needed, or none if nothing is. If the run is captured, a graph holds it.
fn scratch(check: &Check<'_>, workspace: &mut Workspace, needed: usize) -> Result<RawTensor> {
    if needed == 0 {
        let device = workspace.stream().device();
        return RawTensor::new(std::ptr::null_mut::<c_void>(), device, DType::U8, &[0], None);
    }
    if !workspace.is_held() && FlashInferRuntime::get()?.cuda().is_capturing(workspace.stream())? {
        workspace.hold();
    }
    workspace.reserve(check, Need { float: needed, int: 0 })?;
    workspace.float.as_bytes()
}

/// One run, as launchers see it.
#[derive(Clone, Copy, Debug)]
struct Work<'a> {
    spec: &'a AttentionSpec,
    heads: Heads,
    rows: usize,
    keys: usize,
}

/// What a launcher asks a GPU for.
#[derive(Clone, Copy, Debug)]
struct Capacity {
    multiprocessors: usize,
    /// Bytes of shared memory of each.
    shared_memory: usize,
}

impl Work<'_> {
    /// The scratch memory that is needed on the stream's GPU.
    fn on_gpu(&self, stream: &Stream, bytes: fn(&Self, Capacity) -> usize) -> Result<usize> {
        if self.keys <= MIN_CHUNK {
            return Ok(0);
        }
        let cuda = FlashInferRuntime::get()?.cuda();
        let ask = |attribute| {
            cuda.attribute(stream.ordinal(), attribute).map(|number| number.unsigned_abs() as usize)
        };
        let capacity = Capacity {
            multiprocessors: ask(DeviceAttribute::MultiprocessorCount)?,
            shared_memory: ask(DeviceAttribute::MaxSharedMemoryPerMultiprocessor)?,
        };
        Ok(bytes(self, capacity))
    }

    /// Bytes of the partial outputs of so many chunks of keys, and their LSE.
    fn bytes(&self, chunks: usize) -> usize {
        let Self { spec, heads, rows, .. } = *self;
        let row = spec.head_dim_vo * spec.dtype_o.size() + size_of::<f32>();
        chunks * rows * heads.num_qo_heads * row
    }

    /// Whether the launcher can merge chunks: a block has threads for all heads
    /// of a row, or for one head of the only row.
    fn can_merge(&self) -> bool {
        let Self { spec, heads: Heads { num_qo_heads, .. }, rows, .. } = *self;
        let width = spec.head_dim_vo;
        let vector = (16 / spec.dtype_o.size()).max(width / 32);
        MERGED_HEAD_DIMS.contains(&width)
            && num_qo_heads <= MAX_GRID_Y
            && (rows == 1 || num_qo_heads <= MAX_MERGE_THREADS / (width / vector))
    }

    /// The most bytes that FlashAttention 2 writes, 0 if it must not divide keys.
    ///
    /// It makes as many chunks as there are more blocks on the GPU at once than
    /// tiles of queries, of at least [`MIN_CHUNK`] keys. A block holds its
    /// queries in shared memory. Which tile it picks does not matter here.
    fn fa2_scratch(&self, gpu: Capacity) -> usize {
        if !self.can_merge() {
            return 0;
        }
        let Heads { num_qo_heads, num_kv_heads } = self.heads;
        let packed = self.rows * (num_qo_heads / num_kv_heads);
        let chunks = FA2_TILES.map(|tile| {
            let queries = tile * self.spec.head_dim_qk * self.spec.dtype_q.size();
            let blocks = (gpu.shared_memory / queries).min(MAX_BLOCKS_PER_SM) * gpu.multiprocessors;
            blocks / (num_kv_heads * packed.div_ceil(tile))
        });
        match chunks.into_iter().max().unwrap_or(0).min(self.keys.div_ceil(MIN_CHUNK)) {
            // One chunk is written to the output itself.
            0 | 1 => 0,
            chunks => self.bytes(chunks),
        }
    }

    /// The most bytes that decode writes, 0 if it must not divide keys.
    ///
    /// The launcher divides the keys by the blocks that are on the GPU at once,
    /// divided by the KV heads. If that is zero, the division ends the process.
    fn decode_scratch(&self, gpu: Capacity) -> usize {
        let num_kv_heads = self.heads.num_kv_heads;
        if num_kv_heads > gpu.multiprocessors || !self.can_merge() {
            return 0;
        }
        let blocks = MAX_BLOCKS_PER_SM * gpu.multiprocessors;
        self.bytes((blocks / num_kv_heads).min(self.keys.div_ceil(MIN_CHUNK)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    const H200: Capacity = Capacity { multiprocessors: 132, shared_memory: 228 << 10 };
    const SMALL: Capacity = Capacity { multiprocessors: 16, shared_memory: 100 << 10 };

    fn works(spec: &AttentionSpec) -> impl Iterator<Item = Work<'_>> {
        let heads = [(1, 1), (8, 1), (8, 8), (32, 8), (35, 7), (128, 128), (140, 140), (65535, 65535)];
        let rows = [1, 2, 3, 15, 16, 17, 64, 65, 127, 129, 1000, 8192];
        let keys = [1, 255, 256, 257, 511, 513, 5_000, 131_072, MAX_KEYS];
        let all = heads.into_iter().flat_map(move |heads| rows.map(|rows| (heads, rows)));
        all.flat_map(move |((num_qo_heads, num_kv_heads), rows)| {
            keys.map(|keys| Work { spec, heads: Heads { num_qo_heads, num_kv_heads }, rows, keys })
        })
    }

    /// Chunks of keys, as both launchers count them.
    fn chunks(keys: usize, most: usize) -> usize {
        keys.div_ceil(keys.div_ceil(most).max(256))
    }

    /// Whatever tile and occupancy the launcher of prefill comes to, what it
    /// writes fits. Workspaces of upstream's size, 32 MiB, fit an H200.
    #[test]
    fn prefill_writes_no_more_than_is_computed() {
        let mut divided = 0;
        for head_dim in [64, 128, 256] {
            let spec = AttentionSpec::new(DType::F16, head_dim);
            for (work, gpu) in works(&spec).flat_map(|work| [(work, H200), (work, SMALL)]) {
                let Heads { num_qo_heads, num_kv_heads } = work.heads;
                let bound = work.fa2_scratch(gpu);
                assert!(bound <= 32 << 20, "{work:?}: {bound}");
                // The launcher multiplies in 32 bits.
                assert!(bound == 0 || bound / 2 <= u32::MAX as usize);
                if bound == 0 && !work.can_merge() {
                    continue;
                }
                for (tile, per_sm) in
                    [16, 64, 128].into_iter().flat_map(|tile| (0..=16).map(move |n| (tile, n)))
                {
                    if per_sm * tile * head_dim * 2 > gpu.shared_memory {
                        continue;
                    }
                    let packed = work.rows * num_qo_heads / num_kv_heads;
                    let most = per_sm * gpu.multiprocessors / (num_kv_heads * packed.div_ceil(tile));
                    let count = if most > 0 { chunks(work.keys, most) } else { 0 };
                    let written =
                        if count > 1 { count * work.rows * num_qo_heads * (2 * head_dim + 4) } else { 0 };
                    assert!(written <= bound, "{work:?} on {gpu:?}: {written} of {bound}");
                    divided += usize::from(count > 1);
                }
            }
        }
        assert!(divided > 1000);
    }

    #[test]
    fn decode_writes_no_more_than_is_computed() {
        for head_dim in [64, 128, 256] {
            let spec = AttentionSpec::new(DType::BF16, head_dim);
            let decodes = works(&spec).filter(|work| work.rows == 1 && work.keys > MIN_CHUNK);
            for (work, gpu) in decodes.flat_map(|work| [(work, H200), (work, SMALL)]) {
                let Heads { num_qo_heads, num_kv_heads } = work.heads;
                let bound = work.decode_scratch(gpu);
                // With no scratch memory, nothing is divided. Else the launcher
                // must not divide by zero, with even one block on each.
                assert_eq!(bound == 0, gpu.multiprocessors / num_kv_heads == 0, "{work:?}");
                for per_sm in (1..=MAX_BLOCKS_PER_SM).filter(|_| bound > 0) {
                    let count = chunks(work.keys, per_sm * gpu.multiprocessors / num_kv_heads);
                    let written = count * num_qo_heads * (2 * head_dim + 4);
                    assert!(written <= bound, "{work:?} on {gpu:?}: {written} of {bound}");
                }
            }
        }
    }

    /// Several rows are merged by blocks with a thread for each part of a row's
    /// heads, of which there may be too many.
    #[test]
    fn keys_stay_together_where_parts_cannot_be_merged() {
        let needs = |head_dim, heads, rows| {
            let spec = AttentionSpec::new(DType::F16, head_dim);
            let heads = Heads::new(heads, 1);
            Work { spec: &spec, heads, rows, keys: 100_000 }.fa2_scratch(H200)
        };
        for (head_dim, most) in [(64, 128), (128, 64), (256, 32)] {
            assert!(needs(head_dim, most, 2) > 0 && needs(head_dim, most + 1, 1) > 0);
            assert_eq!(needs(head_dim, most + 1, 2), 0);
        }
        // There is no such merge.
        assert_eq!(needs(96, 8, 1), 0);
    }

    #[test]
    fn layouts_are_told_by_strides() {
        // SAFETY: the address is never followed.
        let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
        let check = Check::new("test", &stream).unwrap();
        let view = |shape: &[usize], strides: Option<&[usize]>| {
            let raw = RawTensor::new(16 as *mut _, Device::Cuda(0), DType::F16, shape, strides).unwrap();
            TensorRef::new(raw)
        };
        let layout = |k: &TensorRef<'_>, v: &TensorRef<'_>| {
            stored(&check, [k, v]).map(|(layout, [k, v])| {
                assert!(k.is_contiguous() && v.is_contiguous());
                (layout, k.shape().to_vec())
            })
        };
        let nhd = view(&[9, 2, 64], None);
        let hnd = view(&[2, 9, 64], None).permute(&[1, 0, 2]).unwrap();
        assert_eq!(layout(&nhd, &nhd).unwrap(), (KvLayout::Nhd, vec![9, 2, 64]));
        assert_eq!(layout(&hnd, &hnd).unwrap(), (KvLayout::Hnd, vec![2, 9, 64]));
        // One head, or one key, is stored both ways.
        for shape in [[9, 1, 64], [1, 9, 64]] {
            let (nhd, hnd) = (view(&shape, None), view(&[shape[1], shape[0], 64], None));
            assert!(layout(&nhd, &hnd.permute(&[1, 0, 2]).unwrap()).is_ok());
        }
        let refused = |k: &TensorRef<'_>, v: &TensorRef<'_>, expected: &str| match layout(k, v) {
            Err(FlashInferError::InvalidArgument { argument, .. }) => assert_eq!(argument, expected),
            other => panic!("{other:?}"),
        };
        refused(&nhd, &hnd, "v");
        refused(&hnd, &nhd, "v");
        let longer = view(&[2, 10, 64], None).permute(&[1, 0, 2]).unwrap().narrow(0, 0, 9).unwrap();
        for other in [longer, view(&[9, 2, 64], Some(&[192, 64, 1])), view(&[9, 2, 64], Some(&[64, 0, 1]))] {
            refused(&other, &nhd, "k");
            refused(&other, &other, "k");
            refused(&nhd, &other, "v");
            refused(&hnd, &other, "v");
        }
    }
}
