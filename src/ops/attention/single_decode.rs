//! Decode of one request, whose keys and values are plain tensors.
//!
//! Source of the contract: `csrc/single_decode.cu` and
//! `include/flashinfer/attention/decode.cuh` of FlashInfer 0.6.13.

use super::{
    batch_run::BatchRun,
    decode::check_cuda_cores,
    modules::Family,
    options::RunOptions,
    output_scale::OutputScale,
    planned::{ROPE_RCP_SCALE, ROPE_RCP_THETA, check_keys, check_output},
    single_scratch::{SingleWork, scratch, write_empty_states},
    spec::{AttentionSpec, Backend, Heads},
    workspace::Workspace,
};
use crate::{
    dtype::DType,
    error::{FlashInferError, Result},
    ffi::{DlTensor, Kernel, KernelFunction, Signature, TensorObject, kernels},
    kv::KvLayout,
    module::Module,
    ops::check::Check,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    struct Run = "run"(
        q: Tensor, k: Tensor, v: Tensor, tmp: Tensor, o: Tensor, maybe_lse: OptTensor,
        layout: Int, window_left: Int, maybe_alibi_slopes: OptTensorObject,
        logits_soft_cap: Float, sm_scale: Float, rope_rcp_scale: Float, rope_rcp_theta: Float,
    ) -> "void";
}

pub(in crate::ops) const SIGNATURES: &[(&str, &[Signature])] =
    &[("single_decode_with_kv_cache_*", Run::SIGNATURES)];

const NEW_OP: &str = "SingleDecode::new";
const OP: &str = "SingleDecode::run_with";

/// Decode of one request: attention of one query to all keys, on CUDA cores.
///
/// It has kernels for 1, 2, 3, 4 and 8 query heads per KV head and equal head
/// dimensions. For others, and for keys with other strides, there is
/// [`SinglePrefill`](super::SinglePrefill) with one query.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{
///     DType, Stream,
///     attention::{AttentionSpec, Heads, SingleDecode, Workspace},
///     gpu::Tensor,
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
    run: KernelFunction,
}

impl SingleDecode {
    /// Resolves the module of a spec for these heads; downloads the pinned
    /// wheel if no local source holds it and that is allowed.
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: no such module can exist, or it is in no
    /// local source and FlashInfer publishes none, or it has no kernel for the
    /// group size; or the spec asks for
    /// [`Backend::Fa2`] or [`Backend::Fa3`]. Else the module cannot be had or
    /// opened.
    pub fn new(stream: &Stream, spec: &AttentionSpec, heads: Heads) -> Result<Self> {
        stream.check_usable_here(NEW_OP)?;
        check_single_decode_spec(spec, heads)?;
        let (module, _) = spec.first_module(Family::Single, &[Backend::CudaCores])?;
        OutputScale::prepare(spec)?;
        Ok(Self { spec: *spec, heads, module, run: module.kernel(Run::SIGNATURES)? })
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
        kv: [&TensorRef<'_>; 2],
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        options: &RunOptions<'_>,
    ) -> Result<()> {
        let (spec, heads, stream) = (&self.spec, self.heads, &workspace.stream().clone());
        let check = Check::new(OP, stream)?;
        let (q, out, lse) = (&q.raw, &out.raw, lse.map(|lse| &lse.raw));
        let run = BatchRun { spec, heads, rows: 1, q, out, lse, options };
        let (layout, [k, v]) = check_single_decode(&check, &run, kv)?;
        let keys = kv[0].shape()[0] as usize;
        OutputScale::check_ready(&check, spec.dtype_o, options.v_scale)?;
        if keys == 0 {
            // SAFETY: output and sums were checked.
            return unsafe { write_empty_states(stream, out, lse) };
        }
        let needed = SingleWork { spec, heads, rows: 1, keys }.on_gpu(stream, SingleWork::decode_scratch)?;
        let tmp = scratch(&check, workspace, needed)?;
        let kernel = Run {
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

/// Refuses what decode of one request has no kernel for.
pub(crate) fn check_single_decode_spec(spec: &AttentionSpec, heads: Heads) -> Result<()> {
    const INSTEAD: &str = "use SinglePrefill with one query";
    let group = heads.check(NEW_OP)?;
    if !matches!(spec.backend, Backend::Auto | Backend::CudaCores) {
        return Err(FlashInferError::Unsupported {
            what: format!("decode of one request with Backend::{:?}", spec.backend),
            available: format!("it is on CUDA cores; {INSTEAD}"),
        });
    }
    check_cuda_cores(spec, group, INSTEAD)
}

/// All that the kernel assumes of a run of one request, whose query has no axis of its own. Gives
/// how keys and values are stored.
pub(crate) fn check_single_decode(
    check: &Check<'_>,
    run: &BatchRun<'_>,
    kv: [&TensorRef<'_>; 2],
) -> Result<(KvLayout, [RawTensor; 2])> {
    let BatchRun { spec, heads, q, out, lse, options, .. } = *run;
    let row = |name, tensor: &RawTensor, dtype, rank| {
        check.tensor(name, tensor, &[dtype], &[rank]).and_then(|()| tensor.as_one_row())
    };
    let (q_row, out_row) = (row("q", q, spec.dtype_q, 2)?, row("out", out, spec.dtype_o, 2)?);
    let lse_row = lse.map(|lse| row("lse", lse, DType::F32, 1)).transpose()?;
    check_output(check, spec, heads, 1, &q_row, &out_row, lse_row.as_ref())?;
    check.contiguous("q", q)?;
    let [k, v] = kv.map(|tensor| &tensor.raw);
    check.tensor("k", k, &[spec.dtype_kv], &[3])?;
    check_keys(check, spec, heads, k.shape()[0] as usize, [k, v])?;
    let stored = stored(check, kv)?;
    options.check(check, spec, heads)?;
    Ok(stored)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

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
