//! Products of segments of rows with a weight for each segment.

use std::ffi::c_void;

use super::{
    backend::{GemmBackend, OP, backends},
    sizes::Sizes,
};
use crate::{
    cuda::{DeviceAttribute, DeviceBuffer, PtxKernel},
    dtype::DType,
    error::{FlashInferError, Result},
    ffi::{DlTensor, Kernel, KernelFunction, Signature, kernels},
    indices::SegmentTable,
    module::ModuleName,
    ops::check::Check,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    struct CutlassSm80 = "cutlass_segment_gemm"(
        workspace_buffer: Tensor, all_problems: Tensor, x_ptr: Tensor, w_ptr: Tensor, y_ptr: Tensor,
        x_ld: Tensor, w_ld: Tensor, y_ld: Tensor, empty_x_data: Tensor, weight_column_major: Bool,
    ) -> "void";
    struct CutlassSm90 = "cutlass_segment_gemm_sm90"(
        float_workspace_buffer: Tensor, int_workspace_buffer: Tensor, all_problems: Tensor, x_ptr: Tensor,
        w_ptr: Tensor, y_ptr: Tensor, x_stride: Tensor, weight_stride: Tensor, y_stride: Tensor,
        empty_x_data: Tensor, empty_y_data: Tensor, weight_column_major: Bool,
    ) -> "void";
}

pub(super) const SIGNATURES: &[(&str, &[Signature])] =
    &[("gemm", CutlassSm80::SIGNATURES), ("gemm_sm90", CutlassSm90::SIGNATURES)];

/// Writes addresses, strides and sizes for each segment.
static WRITE_ARGS: PtxKernel =
    PtxKernel::new(concat!(include_str!("segment.ptx"), "\0"), c"segment_gemm_args");
const THREADS: u32 = 128;
/// What it writes for each segment: six 64-bit numbers and three of 32 bits.
const ARGS_BYTES: usize = 6 * 8 + 3 * 4;

/// Bytes that `gemm_sm90` needs for each multiprocessor: two tensor maps.
const TENSOR_MAP_BYTES: usize = 2 * 128;
/// What [`SegmentGemm::run`] multiplies.
#[derive(Clone, Copy, Debug)]
pub struct SegmentGemmInput<'a> {
    /// The rows of all segments, `[rows, d_in]`. Rows may be strided.
    pub x: TensorRef<'a>,
    /// The weights, contiguous: `[num_weights, d_in, d_out]`, or
    /// `[num_weights, d_out, d_in]` if they are column-major.
    pub weights: TensorRef<'a>,
    /// Whether a weight's columns are contiguous, which are its rows if it is
    /// written `[d_out, d_in]` as in linear layers.
    pub weight_column_major: bool,
}

impl<'a> SegmentGemmInput<'a> {
    /// Rows, and weights of `[d_in, d_out]` each.
    pub fn row_major(x: TensorRef<'a>, weights: TensorRef<'a>) -> Self {
        Self { x, weights, weight_column_major: false }
    }

    /// Rows, and weights of `[d_out, d_in]` each.
    pub fn column_major(x: TensorRef<'a>, weights: TensorRef<'a>) -> Self {
        Self { x, weights, weight_column_major: true }
    }
}

/// Products of segments of rows with a weight for each segment, on one stream:
/// `out[rows of i] = x[rows of i] · weights[weight_indices[i]]`. Upstream's
/// `SegmentGEMMWrapper`.
///
/// It holds the memory in which a kernel finds the addresses of its segments.
/// They are written by a small kernel of this crate before each product, so a
/// [`SegmentTable`] serves any tensors, and a run can be captured into a CUDA
/// graph. The graph bakes in the tensors and the number of segments; a table
/// that is updated before a replay must keep that number (with empty segments),
/// and name no more rows and weights than the tensors have. Run once before the
/// first capture, because the first run loads the kernel.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{
///     Stream, gpu::Tensor, gemm::{GemmBackend, SegmentGemm,
///     SegmentGemmInput}, indices::{SegmentIndices, SegmentTable},
/// };
/// use half::bf16;
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// // 10 rows in four segments, which use two weights of 256 × 128 in turn.
/// let segments = SegmentIndices::from_lens([1, 2, 3, 4])?.with_weight_indices(&[0, 1, 0, 1])?;
/// let table = SegmentTable::new(&stream, segments)?;
/// let mut gemm = SegmentGemm::new(&stream, 4, GemmBackend::Auto)?;
/// let x = Tensor::from_slice(&stream, &[10, 128], &[bf16::ONE; 10 * 128])?;
/// let weights = Tensor::<bf16>::zeros(&stream, &[2, 256, 128])?;
/// let mut out = Tensor::<bf16>::zeros(&stream, &[10, 256])?;
/// gemm.run(&mut out.view_mut(), &SegmentGemmInput::column_major(x.view(), weights.view()), &table)?;
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
pub struct SegmentGemm {
    function: KernelFunction,
    backend: GemmBackend,
    max_segments: usize,
    /// Addresses, strides and sizes.
    args: DeviceBuffer,
    /// Tensor maps of `gemm_sm90`.
    tensor_maps: DeviceBuffer,
}

impl SegmentGemm {
    /// Loads a module, and allocates for up to `max_segments`. May download, as
    /// [`preload`](FlashInferRuntime::preload) does.
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: the GPU has no such backend. No module
    /// can be had, or its cuBLAS; [`FlashInferError::Cuda`].
    pub fn new(stream: &Stream, max_segments: usize, backend: GemmBackend) -> Result<Self> {
        stream.check_usable_here(OP)?;
        let runtime = FlashInferRuntime::get()?;
        let cuda = runtime.cuda();
        let capability = runtime.compute_capability(stream.ordinal())?;
        let multiprocessors = cuda.attribute(stream.ordinal(), DeviceAttribute::MultiprocessorCount)?;
        let backends = backends(backend, capability, multiprocessors)?;
        let named: Vec<_> = backends.iter().map(|&backend| move |_| Some(Self::module_of(backend))).collect();
        let (place, module) = runtime.first_of(&named)?;
        let backend = backends[place];
        let declared =
            if backend == GemmBackend::Sm90 { CutlassSm90::SIGNATURES } else { CutlassSm80::SIGNATURES };
        let Some(bytes) = max_segments.checked_mul(ARGS_BYTES).filter(|_| max_segments <= i32::MAX as usize)
        else {
            return Err(FlashInferError::invalid(
                OP,
                "max_segments",
                format!("{max_segments}; at most 2^31 - 1 can be counted"),
            ));
        };
        let maps = usize::try_from(multiprocessors).unwrap_or(0) * TENSOR_MAP_BYTES;
        let new = Self {
            function: module.kernel(declared)?,
            backend,
            max_segments,
            args: DeviceBuffer::new(cuda, stream, bytes)?,
            tensor_maps: DeviceBuffer::new(cuda, stream, maps)?,
        };
        // Last, because allocating refuses a stream that is being captured.
        WRITE_ARGS.load(cuda)?;
        Ok(new)
    }

    fn module_of(backend: GemmBackend) -> ModuleName {
        if backend == GemmBackend::Sm90 { ModuleName::GEMM_SM90 } else { ModuleName::GEMM }
    }

    /// The backend that was picked.
    pub fn backend(&self) -> GemmBackend {
        self.backend
    }

    /// The most segments of a table.
    pub fn max_segments(&self) -> usize {
        self.max_segments
    }

    /// The stream that the products run on.
    pub fn stream(&self) -> &Stream {
        self.args.stream()
    }

    /// Multiplies each segment with its weight.
    ///
    /// `out` is `[rows, d_out]`, contiguous. Rows, weights and output are `f16`
    /// or `bf16`, all the same; with [`GemmBackend::Sm90`] rows and weights may
    /// also be `e4m3` or `e5m2`, the same for both, with column-major weights
    /// and either output. Sums are computed in `f32`; those of 8-bit floats with
    /// fewer bits (what CUTLASS calls fast accumulation). `d_in` and `d_out` are
    /// multiples of 8, `d_in` of 16 for 8-bit floats; addresses, and the stride
    /// of `x`, are multiples of 16 bytes. No rows are nothing to do.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument) before anything is
    /// launched: a device, stream, dtype, shape, stride or alignment does not
    /// fit, `segments` is for another number of rows, names a weight that there
    /// is not, or has more than [`max_segments`](Self::max_segments). Else what
    /// the module or CUDA said.
    pub fn run(
        &mut self,
        out: &mut TensorMut<'_>,
        input: &SegmentGemmInput<'_>,
        segments: &SegmentTable,
    ) -> Result<()> {
        let stream = self.args.stream();
        let check = Check::new(OP, stream)?;
        check.on_stream("segments", segments.stream())?;
        let count = segments.host().batch_size();
        if count > self.max_segments {
            let problem = format!(
                "{count} of them; this SegmentGemm was made for {}: make another by \
                 SegmentGemm::new(&stream, {count}, GemmBackend::{:?})",
                self.max_segments, self.backend
            );
            return check.fail("segments", problem);
        }
        let sizes = Sizes::check(&check, self.backend, &out.raw, input, segments.host())?;
        if out.raw.numel() == 0 {
            return Ok(());
        }
        let cuda = FlashInferRuntime::get()?.cuda();
        // The launchers take any error in this thread for their own; that of
        // Sm90 ends the process over it.
        cuda.check_healthy(stream)?;
        // SAFETY: the buffer has room for so many segments, and the table's
        // arrays have that many entries.
        unsafe { self.write_args(&sizes, count, [&input.x.raw, &input.weights.raw, &out.raw], segments) }?;
        let array = |place: usize, dtype, shape: &[usize]| {
            let start = self.args.as_ptr().cast::<u8>().wrapping_add(place * count * 8).cast();
            let mut raw = RawTensor::new(start, stream.device(), dtype, shape, None)?;
            raw.owner = Some(self.args.owner());
            Ok::<_, FlashInferError>(raw)
        };
        let numbers = |place| array(place, DType::I64, &[count]);
        let [x_ptr, w_ptr, y_ptr] = [numbers(0)?, numbers(1)?, numbers(2)?];
        let [x_ld, w_ld, y_ld] = [numbers(3)?, numbers(4)?, numbers(5)?];
        let problems = array(6, DType::I32, &[count, 3])?;
        let scratch = self.tensor_maps.as_bytes()?;
        let [x_ptr, w_ptr, y_ptr] = [&x_ptr, &w_ptr, &y_ptr].map(DlTensor::new);
        let [x_ld, w_ld, y_ld] = [&x_ld, &w_ld, &y_ld].map(DlTensor::new);
        let weight_column_major = input.weight_column_major;
        // What both calls below rely on: the functions have these signatures. The arrays
        // were written from checked values: every segment's rows lie in `x` and
        // `out`, its weight among the weights, for these element types, strides
        // and alignments. The scratch memory is used by this stream only and,
        // through `&mut self`, by one product at a time; it has two tensor maps
        // for each multiprocessor. The GPU has the right compute capability,
        // checked when this was made.
        if self.backend == GemmBackend::Sm90 {
            let kernel = CutlassSm90 {
                float_workspace_buffer: DlTensor::new(&scratch),
                int_workspace_buffer: DlTensor::new(&scratch),
                all_problems: DlTensor::new(&problems),
                x_ptr,
                w_ptr,
                y_ptr,
                x_stride: x_ld,
                weight_stride: w_ld,
                y_stride: y_ld,
                empty_x_data: (&input.x).into(),
                empty_y_data: DlTensor::new(&out.raw),
                weight_column_major,
            };
            // SAFETY: see above.
            unsafe { kernel.call(&self.function, stream) }.map(drop)
        } else {
            // This kernel adds to what the output holds.
            let bytes = out.raw.numel() as usize * out.raw.dtype.size();
            // SAFETY: the output is contiguous, and of so many bytes.
            unsafe { cuda.zero(stream, out.raw.data, bytes) }?;
            let kernel = CutlassSm80 {
                workspace_buffer: DlTensor::new(&scratch),
                all_problems: DlTensor::new(&problems),
                x_ptr,
                w_ptr,
                y_ptr,
                x_ld,
                w_ld,
                y_ld,
                empty_x_data: (&input.x).into(),
                weight_column_major,
            };
            // SAFETY: see above.
            unsafe { kernel.call(&self.function, stream) }.map(drop)
        }
    }

    /// Enqueues the kernel that writes addresses, strides and sizes.
    ///
    /// # Safety
    /// `self.args` must have room for `count` segments, and the table as many.
    unsafe fn write_args(
        &self,
        sizes: &Sizes,
        count: usize,
        tensors: [&RawTensor; 3],
        segments: &SegmentTable,
    ) -> Result<()> {
        let [x, w, y] = tensors;
        let bytes = |elements: i64, of: &RawTensor| elements as u64 * of.dtype.size() as u64;
        let [starts, lens, weights] = segments.addresses().map(|address| address as u64);
        let mut wide: [u64; 13] = [
            self.args.as_ptr() as u64,
            starts,
            lens,
            weights,
            x.data as u64,
            w.data as u64,
            y.data as u64,
            bytes(sizes.x_ld, x),
            bytes(sizes.k * sizes.n, w),
            bytes(sizes.n, y),
            sizes.x_ld as u64,
            sizes.w_ld as u64,
            sizes.n as u64,
        ];
        let mut narrow: [u32; 3] = [sizes.n as u32, sizes.k as u32, count as u32];
        let mut args = [std::ptr::null_mut::<c_void>(); 16];
        let sources = wide.iter_mut().map(|number| (&raw mut *number).cast());
        let sources = sources.chain(narrow.iter_mut().map(|number| (&raw mut *number).cast()));
        for (arg, source) in args.iter_mut().zip(sources) {
            *arg = source;
        }
        let blocks = (count as u32).div_ceil(THREADS);
        let cuda = FlashInferRuntime::get()?.cuda();
        // SAFETY: the kernel takes 13 numbers of 64 bits, then 3 of 32, in this
        // order, reads `count` entries of each array, and writes the arguments of
        // as many segments.
        unsafe {
            WRITE_ARGS.launch(cuda, self.args.stream(), [blocks, THREADS], &mut args, &tensors.map(Some))
        }
    }
}

impl std::fmt::Debug for SegmentGemm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SegmentGemm({:?}, {} segments, {:?})", self.backend, self.max_segments, self.stream())
    }
}
