//! Batched products of 8-bit floats by cuBLASLt.

use crate::{
    artifacts::Fetch,
    cuda::DeviceBuffer,
    device::Device,
    dtype::DType,
    error::{FlashInferError, Result},
    ffi::{DlTensor, Kernel, Signature, kernels},
    module::ModuleName,
    ops::{FixedFunction, check::Check},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    struct Bmm = "bmm_fp8" {
        a: Tensor, b: Tensor, d: Tensor, a_scale: Tensor, b_scale: Tensor, workspace_buffer: Tensor,
        cublas_handle: Int,
    } {
        "0.6.13": (a, b, d, a_scale, b_scale, workspace_buffer, cublas_handle) -> "void";
        "0.7.0": (a, b, d, a_scale, b_scale, workspace_buffer) -> "void";
    }
    struct GetAlgos = "bmm_fp8_get_algos" {
        a: Tensor, b: Tensor, d: Tensor, a_scale: Tensor, b_scale: Tensor, workspace_buffer: Tensor,
        cublas_handle: Int, algo_buffer: Tensor,
    } {
        "0.6.13": (a, b, d, a_scale, b_scale, workspace_buffer, cublas_handle, algo_buffer) -> "int";
        "0.7.0": (a, b, d, a_scale, b_scale, workspace_buffer, algo_buffer) -> "int";
    }
    struct RunWithAlgo = "bmm_fp8_run_with_algo" {
        a: Tensor, b: Tensor, d: Tensor, a_scale: Tensor, b_scale: Tensor, workspace_buffer: Tensor,
        cublas_handle: Int, algo_buffer: Tensor, algo_idx: Int,
    } {
        "0.6.13": (
            a, b, d, a_scale, b_scale, workspace_buffer, cublas_handle, algo_buffer, algo_idx,
        ) -> "void";
        "0.7.0": (a, b, d, a_scale, b_scale, workspace_buffer, algo_buffer, algo_idx) -> "void";
    }
}

pub(super) const SIGNATURES: &[(&str, &[Signature])] =
    &[("gemm", Bmm::SIGNATURES), ("gemm", GetAlgos::SIGNATURES), ("gemm", RunWithAlgo::SIGNATURES)];

static BMM: FixedFunction = FixedFunction::of(ModuleName::GEMM, Bmm::SIGNATURES);
static GET_ALGOS: FixedFunction = FixedFunction::of(ModuleName::GEMM, GetAlgos::SIGNATURES);
static RUN_WITH_ALGO: FixedFunction = FixedFunction::of(ModuleName::GEMM, RunWithAlgo::SIGNATURES);

const OP: &str = "bmm_fp8";

/// Element types of factors and of products.
const FACTORS: [DType; 2] = [DType::E4M3, DType::E5M2];
const PRODUCTS: [DType; 2] = [DType::F16, DType::BF16];
/// The alignment that cuBLASLt chooses algorithms for: the module leaves its
/// default.
const ALIGNMENT: usize = 256;
/// The oldest compute capability with products of 8-bit floats.
const MIN_CAPABILITY: (i32, i32) = (8, 9);
/// A `cublasLtMatmulAlgo_t`.
type RawAlgorithm = [u64; 8];
/// Upstream's limit.
const MAX_ALGORITHMS: usize = 100;

/// cuBLASLt on one stream: a handle of its device, and scratch memory.
///
/// Products on one stream share it, because they run one after the other.
/// Another stream needs another one. The handle is the process's own for that
/// device; the memory is freed in stream order when this is dropped.
pub struct CublasLt {
    handle: usize,
    workspace: DeviceBuffer,
}

impl CublasLt {
    /// Bytes of scratch memory, as upstream has it: 32 MiB.
    pub const WORKSPACE_BYTES: usize = 32 << 20;

    /// Opens cuBLAS if it is not open, and allocates scratch memory. It does
    /// not download: [preload](FlashInferRuntime::preload) [`ModuleName::GEMM`]
    /// before where cuBLAS may be missing.
    ///
    /// # Errors
    /// cuBLAS is nowhere; the error lists the places.
    /// [`FlashInferError::Unsupported`]: the GPU's compute capability is below
    /// 8.9. [`FlashInferError::Cuda`].
    pub fn new(stream: &Stream) -> Result<Self> {
        stream.check_usable_here(OP)?;
        let runtime = FlashInferRuntime::get()?;
        check_capability(runtime.compute_capability(stream.ordinal())?, stream.device())?;
        let (cuda, cublas) = (runtime.cuda(), runtime.cublas(Fetch::Forbidden)?);
        // First, because it refuses a stream that is being captured: a new handle
        // would break the capture.
        let workspace = DeviceBuffer::new(cuda, stream, Self::WORKSPACE_BYTES)?;
        Ok(Self { handle: cublas.handle(cuda, stream)?, workspace })
    }

    /// The stream that the products run on.
    pub fn stream(&self) -> &Stream {
        self.workspace.stream()
    }
}

fn check_capability((major, minor): (i32, i32), device: Device) -> Result<()> {
    if (major, minor) >= MIN_CAPABILITY {
        return Ok(());
    }
    let (least, point) = MIN_CAPABILITY;
    Err(FlashInferError::Unsupported {
        what: format!("{OP} on {device}, of compute capability {major}.{minor}"),
        available: format!("products of 8-bit floats need {least}.{point} or newer"),
    })
}

impl std::fmt::Debug for CublasLt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CublasLt({} bytes, {:?})", self.workspace.len(), self.stream())
    }
}

/// What [`bmm_fp8`] multiplies.
#[derive(Clone, Copy, Debug)]
pub struct BmmFp8Input<'a> {
    /// `[b, m, k]`, `e4m3` or `e5m2`, contiguous.
    pub a: TensorRef<'a>,
    /// `[b, k, n]`, `e4m3` or `e5m2`, column-major: contiguous weights of
    /// `[b, n, k]`, seen through [`permute(&[0, 2, 1])`](TensorRef::permute).
    /// Not both are `e5m2`.
    pub b: TensorRef<'a>,
    /// The factor of `a`: one `f32` on the device, `[1]`.
    pub a_scale: TensorRef<'a>,
    /// The factor of `b`.
    pub b_scale: TensorRef<'a>,
}

/// The sizes and types that an algorithm is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    device: Device,
    batch: i64,
    sizes: [i64; 3],
    dtypes: [DType; 3],
}

/// One of cuBLASLt's algorithms for products of certain sizes and types on a
/// certain device. Others are refused.
#[derive(Clone, Copy, Debug)]
pub struct Algorithm {
    raw: RawAlgorithm,
    problem: Problem,
}

/// `out[i] = a_scale · a[i] · b_scale · b[i]`, for each of a batch, with the
/// algorithm that cuBLASLt thinks best.
///
/// `out` is `[b, m, n]`, `f16` or `bf16`, contiguous. `k` is a multiple of 16
/// and `n` of 8; cuBLASLt may ask for more, in an error of its own. The
/// addresses of `a`, `b` and `out` are multiples of 256. No rows or columns are
/// nothing to do. Sums are computed with fewer bits than `f32` has (what cuBLAS
/// calls fast accumulation).
///
/// It can be captured into a CUDA graph. Call once before the first capture,
/// because the first call loads the kernel.
///
/// # Errors
/// [`InvalidArgument`](FlashInferError::InvalidArgument) before anything is
/// launched: a device, stream, dtype, shape, stride or alignment does not fit.
/// Else what the module or CUDA said; among others, that cuBLASLt has no
/// algorithm for these sizes.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{
///     FlashInferRuntime, ModuleName, Stream,
///     gpu::Tensor,
///     gemm::*,
/// };
/// use float8::F8E4M3;
/// use half::bf16;
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// FlashInferRuntime::get()?.preload([&ModuleName::GEMM])?;
/// let mut cublas = CublasLt::new(&stream)?;
/// // 48 rows of 64, times a linear layer's weight of 80 × 64.
/// let rows = Tensor::from_slice(&stream, &[1, 48, 64], &[F8E4M3::from_f64(1.0); 48 * 64])?;
/// let weight = Tensor::from_slice(&stream, &[1, 80, 64], &[F8E4M3::from_f64(2.0); 80 * 64])?;
/// let scale = Tensor::from_slice(&stream, &[1], &[0.5f32])?;
/// let mut out = Tensor::<bf16>::zeros(&stream, &[1, 48, 80])?;
/// let input = BmmFp8Input {
///     a: rows.view(),
///     b: weight.view().permute(&[0, 2, 1])?,
///     a_scale: scale.view(),
///     b_scale: scale.view(),
/// };
/// bmm_fp8(&mut cublas, &mut out.view_mut(), &input)?;
/// // Or with one of the algorithms; which is fastest, only measuring tells.
/// let algorithms = bmm_fp8_get_algos(&mut cublas, &mut out.view_mut(), &input)?;
/// bmm_fp8_run_with_algo(&mut cublas, &mut out.view_mut(), &input, &algorithms[0])?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
pub fn bmm_fp8(cublas: &mut CublasLt, out: &mut TensorMut<'_>, input: &BmmFp8Input<'_>) -> Result<()> {
    let stream = cublas.stream();
    Problem::check(&Check::new(OP, stream)?, &out.raw, input)?;
    if out.raw.numel() == 0 {
        return Ok(());
    }
    let workspace = cublas.workspace.as_bytes()?;
    let kernel = Bmm {
        a: (&input.a).into(),
        b: (&input.b).into(),
        d: DlTensor::new(&out.raw),
        a_scale: (&input.a_scale).into(),
        b_scale: (&input.b_scale).into(),
        workspace_buffer: DlTensor::new(&workspace),
        cublas_handle: cublas.handle as i64,
    };
    let function = BMM.get(FlashInferRuntime::get()?)?;
    // SAFETY: the function has this signature. Tensors were checked for all that
    // is assumed of them: device, dtype, shape, layout, alignment, 32-bit sizes.
    // The handle is one of this device, and the scratch memory is used by this
    // stream only and, through `&mut`, by one product at a time.
    unsafe { kernel.call(function, stream) }.map(drop)
}

/// The algorithms that cuBLASLt has for a product, at most 100, the one that it
/// thinks best first. None for an empty product.
///
/// Nothing is computed: the tensors are looked at for their sizes and types,
/// for which alone the algorithms serve. Upstream measures all of them when it
/// tunes.
///
/// # Errors
/// As [`bmm_fp8`].
pub fn bmm_fp8_get_algos(
    cublas: &mut CublasLt,
    out: &mut TensorMut<'_>,
    input: &BmmFp8Input<'_>,
) -> Result<Vec<Algorithm>> {
    let stream = cublas.stream();
    let problem = Problem::check(&Check::new(OP, stream)?, &out.raw, input)?;
    if out.raw.numel() == 0 {
        return Ok(Vec::new());
    }
    let workspace = cublas.workspace.as_bytes()?;
    let mut raw: [RawAlgorithm; MAX_ALGORITHMS] = [[0; 8]; MAX_ALGORITHMS];
    let buffer = algo_buffer(raw.as_flattened_mut())?;
    let kernel = GetAlgos {
        a: (&input.a).into(),
        b: (&input.b).into(),
        d: DlTensor::new(&out.raw),
        a_scale: (&input.a_scale).into(),
        b_scale: (&input.b_scale).into(),
        workspace_buffer: DlTensor::new(&workspace),
        cublas_handle: cublas.handle as i64,
        algo_buffer: DlTensor::new(&buffer),
    };
    let function = GET_ALGOS.get(FlashInferRuntime::get()?)?;
    // SAFETY: as in `bmm_fp8`; the buffer has room for as many algorithms as its
    // size says.
    let count = i64::try_from(unsafe { kernel.call(function, stream) }?)?;
    let count = usize::try_from(count).unwrap_or(0);
    Ok(raw.iter().take(count).map(|&raw| Algorithm { raw, problem }).collect())
}

/// [`bmm_fp8`] with a certain algorithm.
///
/// # Errors
/// As [`bmm_fp8`]; also when the algorithm is one for other sizes, types or
/// another device.
pub fn bmm_fp8_run_with_algo(
    cublas: &mut CublasLt,
    out: &mut TensorMut<'_>,
    input: &BmmFp8Input<'_>,
    algorithm: &Algorithm,
) -> Result<()> {
    let stream = cublas.stream();
    let check = Check::new(OP, stream)?;
    let problem = Problem::check(&check, &out.raw, input)?;
    if problem != algorithm.problem {
        return check.fail(
            "algorithm",
            format!(
                "it is for {:?}; this is {problem:?}, which has algorithms of its own",
                algorithm.problem
            ),
        );
    }
    let workspace = cublas.workspace.as_bytes()?;
    let mut raw = algorithm.raw;
    let buffer = algo_buffer(&mut raw)?;
    let kernel = RunWithAlgo {
        a: (&input.a).into(),
        b: (&input.b).into(),
        d: DlTensor::new(&out.raw),
        a_scale: (&input.a_scale).into(),
        b_scale: (&input.b_scale).into(),
        workspace_buffer: DlTensor::new(&workspace),
        cublas_handle: cublas.handle as i64,
        algo_buffer: DlTensor::new(&buffer),
        algo_idx: 0,
    };
    let function = RUN_WITH_ALGO.get(FlashInferRuntime::get()?)?;
    // SAFETY: as in `bmm_fp8`; the algorithm is one that cuBLASLt gave for this
    // problem and this size of scratch memory.
    unsafe { kernel.call(function, stream) }.map(drop)
}

/// Algorithms on the host, as the tensor that the module takes.
fn algo_buffer(raw: &mut [u64]) -> Result<RawTensor> {
    RawTensor::new(raw.as_mut_ptr().cast(), Device::Cpu, DType::U8, &[size_of_val(raw)], None)
}

impl Problem {
    /// All that cuBLASLt is told of the tensors, and takes on trust.
    pub(crate) fn check(check: &Check<'_>, out: &RawTensor, input: &BmmFp8Input<'_>) -> Result<Self> {
        let (a, b) = (&input.a.raw, &input.b.raw);
        check.tensor("a", a, &FACTORS, &[3])?;
        check.tensor("b", b, &FACTORS, &[3])?;
        check.tensor("out", out, &PRODUCTS, &[3])?;
        if (a.dtype, b.dtype) == (DType::E5M2, DType::E5M2) {
            return check.fail("b", "both factors are e5m2, for which cuBLASLt has no kernel".into());
        }
        let (batch, m, k, n) = (a.shape()[0], a.shape()[1], a.shape()[2], b.shape()[2]);
        check.shape("b", b, &[batch, k, n])?;
        check.shape("out", out, &[batch, m, n])?;
        for (name, what, size, multiple) in
            [("a", "b", batch, 1), ("a", "m", m, 1), ("a", "k", k, 16), ("b", "n", n, 8)]
        {
            if size % multiple != 0 || size > i64::from(i32::MAX) {
                return check.fail(
                    name,
                    format!("{what} is {size}; it must be a multiple of {multiple}, and below 2^31"),
                );
            }
        }
        if k == 0 {
            return check.fail("a", "k is 0; there is nothing to sum".into());
        }
        for (name, tensor) in [("a", a), ("b", b), ("out", out)] {
            // The module computes these distances in 32 bits.
            if batch > 1 && tensor.numel() / batch > i64::from(i32::MAX) {
                return check.fail(
                    name,
                    format!(
                        "its shape is {:?}; in a batch, a matrix has fewer than 2^31 elements",
                        tensor.shape()
                    ),
                );
            }
        }
        check.contiguous("a", a)?;
        check.contiguous("out", out)?;
        if !input.b.permute(&[0, 2, 1])?.is_contiguous() {
            return check.fail(
                "b",
                format!(
                    "shape {:?} with strides {:?}; it must be column-major: contiguous [b, n, k], permuted",
                    b.shape(),
                    b.strides()
                ),
            );
        }
        for (name, tensor) in [("a", a), ("b", b), ("out", out)] {
            if !(tensor.data as usize).is_multiple_of(ALIGNMENT) {
                return check.fail(
                    name,
                    format!("it starts at {:p}; the address must be a multiple of {ALIGNMENT}", tensor.data),
                );
            }
        }
        for (name, scale) in [("a_scale", &input.a_scale.raw), ("b_scale", &input.b_scale.raw)] {
            check.tensor(name, scale, &[DType::F32], &[1])?;
            check.shape(name, scale, &[1])?;
            check.aligned(name, scale, 4)?;
        }
        Ok(Self { device: a.device, batch, sizes: [m, n, k], dtypes: [a.dtype, b.dtype, out.dtype] })
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;

    use super::*;

    const GPU: Device = Device::Cuda(0);

    fn view(address: usize, dtype: DType, shape: &[usize]) -> TensorRef<'static> {
        // SAFETY: the address is compared, never followed.
        unsafe { TensorRef::from_raw_parts(address as *const c_void, GPU, dtype, shape, None) }.unwrap()
    }

    /// A product of `[2, 3, 32]` and `[2, 32, 48]`.
    fn good() -> (TensorRef<'static>, BmmFp8Input<'static>) {
        let input = BmmFp8Input {
            a: view(4096, DType::E4M3, &[2, 3, 32]),
            b: view(4096, DType::E4M3, &[2, 48, 32]).permute(&[0, 2, 1]).unwrap(),
            a_scale: view(4, DType::F32, &[1]),
            b_scale: view(4, DType::F32, &[1]),
        };
        (view(4096, DType::BF16, &[2, 3, 48]), input)
    }

    fn check(out: &TensorRef<'_>, input: &BmmFp8Input<'_>) -> Result<Problem> {
        // SAFETY: nothing is enqueued on the stream.
        let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
        Problem::check(&Check::new(OP, &stream).unwrap(), &out.raw, input)
    }

    #[track_caller]
    fn refused(out: TensorRef<'_>, input: BmmFp8Input<'_>, expected: &str) {
        match check(&out, &input) {
            Err(FlashInferError::InvalidArgument { argument, problem, .. }) => {
                assert_eq!(argument, expected, "{problem}");
            }
            other => panic!("expected `{expected}` to be refused, got {other:?}"),
        }
    }

    fn column_major(dtype: DType, [b, k, n]: [usize; 3]) -> TensorRef<'static> {
        view(4096, dtype, &[b, n, k]).permute(&[0, 2, 1]).unwrap()
    }

    #[test]
    fn products_are_checked() {
        let (out, input) = good();
        let problem = check(&out, &input).unwrap();
        assert_eq!((problem.batch, problem.sizes), (2, [3, 48, 32]));
        for (a, b, allowed) in [
            (DType::E4M3, DType::E5M2, true),
            (DType::E5M2, DType::E4M3, true),
            (DType::E5M2, DType::E5M2, false),
        ] {
            let input =
                BmmFp8Input { a: view(4096, a, &[2, 3, 32]), b: column_major(b, [2, 32, 48]), ..input };
            assert_eq!(check(&out, &input).is_ok(), allowed, "{a} {b}");
        }
        refused(out, BmmFp8Input { a: view(4096, DType::F16, &[2, 3, 32]), ..input }, "a");
        refused(view(4096, DType::F32, &[2, 3, 48]), input, "out");
        refused(view(4096, DType::E4M3, &[2, 3, 48]), input, "out");
        refused(view(4096, DType::F16, &[2, 4, 48]), input, "out");
        refused(out, BmmFp8Input { b: column_major(DType::E4M3, [1, 32, 48]), ..input }, "b");
        refused(out, BmmFp8Input { b: column_major(DType::E4M3, [2, 48, 48]), ..input }, "b");
        // Row-major.
        refused(out, BmmFp8Input { b: view(4096, DType::E4M3, &[2, 32, 48]), ..input }, "b");
        refused(out, BmmFp8Input { a: view(4096, DType::E4M3, &[3, 32]), ..input }, "a");
        let transposed = view(4096, DType::E4M3, &[2, 32, 3]).permute(&[0, 2, 1]).unwrap();
        refused(out, BmmFp8Input { a: transposed, ..input }, "a");
        for scale in [view(4, DType::F64, &[1]), view(4, DType::F32, &[2]), view(2, DType::F32, &[1])] {
            refused(out, BmmFp8Input { a_scale: scale, ..input }, "a_scale");
            refused(out, BmmFp8Input { b_scale: scale, ..input }, "b_scale");
        }
        let unaligned = 4096 + 128;
        refused(out, BmmFp8Input { a: view(unaligned, DType::E4M3, &[2, 3, 32]), ..input }, "a");
        refused(view(unaligned, DType::BF16, &[2, 3, 48]), input, "out");
        let b = view(unaligned, DType::E4M3, &[2, 48, 32]).permute(&[0, 2, 1]).unwrap();
        refused(out, BmmFp8Input { b, ..input }, "b");
    }

    #[test]
    fn sizes_are_what_cublas_takes() {
        let run = |[b, m, k, n]: [usize; 4]| {
            let (_, input) = good();
            let input = BmmFp8Input {
                a: view(4096, DType::E4M3, &[b, m, k]),
                b: column_major(DType::E4M3, [b, k, n]),
                ..input
            };
            match check(&view(4096, DType::F16, &[b, m, n]), &input) {
                Ok(_) => None,
                Err(FlashInferError::InvalidArgument { argument, .. }) => Some(argument),
                Err(other) => panic!("{other}"),
            }
        };
        assert_eq!(run([1, 1, 16, 8]), None);
        assert_eq!(run([0, 3, 16, 8]), None);
        assert_eq!(run([1, 0, 16, 8]), None);
        assert_eq!(run([1, 3, 16, 0]), None);
        assert_eq!(run([1, 3, 0, 8]), Some("a"));
        assert_eq!(run([1, 3, 24, 8]), Some("a"));
        assert_eq!(run([1, 3, 16, 12]), Some("b"));
        assert_eq!(run([1, 1 << 31, 16, 8]), Some("a"));
        // Matrices of 2³¹ elements, alone and in a batch.
        assert_eq!(run([1, 1 << 15, 1 << 16, 8]), None);
        assert_eq!(run([2, 1 << 15, 1 << 16, 8]), Some("a"));
        assert_eq!(run([2, 8, 1 << 16, 1 << 15]), Some("b"));
        assert_eq!(run([2, 1 << 16, 16, 1 << 15]), Some("out"));
    }

    #[test]
    fn gpus_without_8_bit_floats_are_refused() {
        for capability in [(8, 9), (9, 0), (10, 0), (12, 1)] {
            check_capability(capability, GPU).unwrap();
        }
        for capability in [(7, 5), (8, 0), (8, 6)] {
            let error = check_capability(capability, GPU).unwrap_err();
            assert!(matches!(error, FlashInferError::Unsupported { .. }), "{error}");
            assert!(error.to_string().contains("8.9 or newer"), "{error}");
        }
    }
}
