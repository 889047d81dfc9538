//! Products of segments of rows with a weight for each segment.

use std::ffi::c_void;

use crate::{
    cuda::{DeviceAttribute, DeviceBuffer, PtxKernel},
    dtype::DType,
    error::{FlashInferError, Result},
    ffi::{DlTensor, Kernel, KernelFunction, Signature, kernels},
    indices::{SegmentIndices, SegmentTable},
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

const OP: &str = "segment_gemm";

/// Element types of outputs, and of rows and weights.
const HALVES: &[DType] = &[DType::F16, DType::BF16];
/// Element types of rows and weights that `gemm_sm90` takes.
const HALVES_AND_BYTES: &[DType] = &[DType::F16, DType::BF16, DType::E4M3, DType::E5M2];

/// Writes addresses, strides and sizes for each segment.
static WRITE_ARGS: PtxKernel =
    PtxKernel::new(concat!(include_str!("segment.ptx"), "\0"), c"segment_gemm_args");
const THREADS: u32 = 128;
/// What it writes for each segment: six 64-bit numbers and three of 32 bits.
const ARGS_BYTES: usize = 6 * 8 + 3 * 4;

/// Bytes that `gemm_sm90` needs for each multiprocessor: two tensor maps.
const TENSOR_MAP_BYTES: usize = 2 * 128;
/// Fewer multiprocessors than this need not be filled by clusters of four, and
/// the launch would fail.
const MIN_MULTIPROCESSORS: i32 = 16;
/// Tiles that the kernels count in 32 bits, where each segment's rows and the
/// columns may be rounded up to a cluster of 2 × 2.
const MAX_TILES: i64 = i32::MAX as i64 / 4;

/// Which kernels compute a segment GEMM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GemmBackend {
    /// As upstream: [`Sm90`](Self::Sm90) on compute capability 9.0, else
    /// [`Sm80`](Self::Sm80); the other, if its module alone is at hand.
    #[default]
    Auto,
    /// The module `gemm`, on compute capability 8.0 and newer, for `f16` and
    /// `bf16`. It needs cuBLAS to be opened. Upstream launches it with four
    /// blocks, whatever the GPU, so it is slow.
    Sm80,
    /// The module `gemm_sm90`, on compute capability 9.0 exactly; also for 8-bit
    /// floats.
    Sm90,
}

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
///     Stream, cudarc::{TensorExt, TensorExtMut}, gemm::{GemmBackend, SegmentGemm,
///     SegmentGemmInput}, indices::{SegmentIndices, SegmentTable},
/// };
/// use half::bf16;
/// let cuda = cudarc::driver::CudaContext::new(0)?.new_stream()?;
/// let stream = Stream::from(&cuda);
/// // 10 rows in four segments, which use two weights of 256 × 128 in turn.
/// let segments = SegmentIndices::from_lens([1, 2, 3, 4])?.with_weight_indices(&[0, 1, 0, 1])?;
/// let table = SegmentTable::new(&stream, segments)?;
/// let mut gemm = SegmentGemm::new(&stream, 4, GemmBackend::Auto)?;
/// let (x, weights) = (cuda.clone_htod(&[bf16::ONE; 10 * 128])?, cuda.alloc_zeros::<bf16>(2 * 256 * 128)?);
/// let mut out = cuda.alloc_zeros::<bf16>(10 * 256)?;
/// let (x, weights) = (x.tensor(&cuda, &[10, 128])?, weights.tensor(&cuda, &[2, 256, 128])?);
/// gemm.run(
///     &mut out.tensor_mut(&cuda, &[10, 256])?.view_mut(),
///     &SegmentGemmInput::column_major(x.view(), weights.view()),
///     &table,
/// )?;
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

/// The backends that a GPU has, in order of preference.
fn backends(
    asked: GemmBackend,
    (major, minor): (i32, i32),
    multiprocessors: i32,
) -> Result<&'static [GemmBackend]> {
    use GemmBackend::{Auto, Sm80, Sm90};
    let sm90 = (major, minor) == (9, 0) && multiprocessors >= MIN_MULTIPROCESSORS;
    match asked {
        Auto if sm90 => Ok(&[Sm90, Sm80]),
        Auto | Sm80 if major >= 8 => Ok(&[Sm80]),
        Sm90 if sm90 => Ok(&[Sm90]),
        _ => Err(FlashInferError::Unsupported {
            what: format!(
                "{OP} with backend {asked:?} on compute capability {major}.{minor} with {multiprocessors} \
                 multiprocessors"
            ),
            available: format!(
                "Sm80 needs 8.0 or newer, Sm90 needs 9.0 exactly and {MIN_MULTIPROCESSORS} multiprocessors"
            ),
        }),
    }
}

/// Sizes and strides in elements, checked.
#[derive(Debug, PartialEq)]
struct Sizes {
    n: i64,
    k: i64,
    x_ld: i64,
    w_ld: i64,
}

impl Sizes {
    /// All that the kernels assume of tensors and segments.
    fn check(
        check: &Check<'_>,
        backend: GemmBackend,
        out: &RawTensor,
        input: &SegmentGemmInput<'_>,
        segments: &SegmentIndices,
    ) -> Result<Self> {
        let (x, weights) = (&input.x.raw.with_plain_unit_strides(), &input.weights.raw);
        let sm90 = backend == GemmBackend::Sm90;
        check.tensor("x", x, if sm90 { HALVES_AND_BYTES } else { HALVES }, &[2])?;
        check.tensor("weights", weights, &[x.dtype], &[3])?;
        let bytes = x.dtype.size() == 1;
        if bytes && !input.weight_column_major {
            return check.fail(
                "weights",
                format!("row-major weights of {}; only column-major ones have a kernel", x.dtype),
            );
        }
        let same = [x.dtype];
        check.tensor("out", out, if bytes { HALVES } else { &same }, &[2])?;
        let (rows, k) = (x.shape()[0], x.shape()[1]);
        let n = weights.shape()[if input.weight_column_major { 1 } else { 2 }];
        let per_weight = if input.weight_column_major { [n, k] } else { [k, n] };
        check.shape("weights", weights, &[weights.shape()[0], per_weight[0], per_weight[1]])?;
        check.shape("out", out, &[rows, n])?;
        let multiple = 16 / x.dtype.size() as i64;
        for (name, what, size, multiple) in [("x", "d_in", k, multiple), ("weights", "d_out", n, 8)] {
            if size % multiple != 0 || size > i64::from(i32::MAX) {
                return check.fail(
                    name,
                    format!("{what} is {size}; it must be a multiple of {multiple}, and below 2^31"),
                );
            }
        }
        if k == 0 {
            return check.fail("x", "d_in is 0; there is nothing to sum".into());
        }
        check.last_dim_contiguous("x", x)?;
        check.aligned("x", x, 16)?;
        if rows > 1 && (x.strides()[0] < k || x.strides()[0] > i64::from(i32::MAX)) {
            return check.fail(
                "x",
                format!("its strides are {:?}; rows must not overlap, nor be 2^31 apart", x.strides()),
            );
        }
        for (name, tensor) in [("weights", weights), ("out", out)] {
            check.contiguous(name, tensor)?;
            check.aligned(name, tensor, 16)?;
        }
        if segments.num_rows() as i64 != rows {
            return check.fail(
                "segments",
                format!("they have {} rows, the tensors have {rows}", segments.num_rows()),
            );
        }
        if segments.num_weights() as i64 > weights.shape()[0] {
            return check.fail(
                "segments",
                format!(
                    "they need {} weights, of which there are {}",
                    segments.num_weights(),
                    weights.shape()[0]
                ),
            );
        }
        // Tiles have 128 rows and columns; each segment may start one of its own.
        let tiles = (rows / 128 + segments.batch_size() as i64) * (n / 128 + 1);
        if tiles > MAX_TILES {
            return check.fail(
                "segments",
                format!("up to {tiles} tiles of 128 × 128; at most {MAX_TILES} can be counted"),
            );
        }
        let w_ld = if input.weight_column_major { k } else { n };
        Ok(Self { n, k, x_ld: x.strides()[0], w_ld })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    const GPU: Device = Device::Cuda(0);

    fn view(address: usize, dtype: DType, shape: &[usize], strides: Option<&[usize]>) -> TensorRef<'static> {
        // SAFETY: the address is compared, never followed.
        unsafe { TensorRef::from_raw_parts(address as *const c_void, GPU, dtype, shape, strides) }.unwrap()
    }

    fn packed(dtype: DType, shape: &[usize]) -> TensorRef<'static> {
        view(4096, dtype, shape, None)
    }

    /// The argument that is refused, if any, of a product of two segments.
    fn refused(
        backend: GemmBackend,
        out: TensorRef<'_>,
        input: SegmentGemmInput<'_>,
        lens: [usize; 2],
    ) -> Option<&'static str> {
        // SAFETY: nothing is enqueued on the stream.
        let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
        let segments = SegmentIndices::from_lens(lens).unwrap();
        match Sizes::check(&Check::new(OP, &stream).unwrap(), backend, &out.raw, &input, &segments) {
            Ok(_) => None,
            Err(FlashInferError::InvalidArgument { argument, .. }) => Some(argument),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn backends_follow_the_gpu() {
        use GemmBackend::{Auto, Sm80, Sm90};
        assert_eq!(backends(Auto, (9, 0), 132).unwrap(), [Sm90, Sm80]);
        assert_eq!(backends(Auto, (9, 0), 14).unwrap(), [Sm80]);
        for capability in [(8, 0), (8, 9), (10, 0), (12, 1)] {
            assert_eq!(backends(Auto, capability, 100).unwrap(), [Sm80]);
            let text = backends(Sm90, capability, 100).unwrap_err().to_string();
            assert!(text.contains("Sm90") && text.contains("9.0 exactly"), "{text}");
        }
        assert_eq!(backends(Sm80, (9, 0), 132).unwrap(), [Sm80]);
        assert_eq!(backends(Sm90, (9, 0), 16).unwrap(), [Sm90]);
        assert!(backends(Sm90, (9, 0), 14).is_err());
        assert!(backends(Auto, (7, 5), 40).unwrap_err().to_string().contains("7.5"));
    }

    #[test]
    fn types_have_kernels() {
        let run = |backend, x, w, y, column_major: bool| {
            let weights = if column_major { [2, 48, 32] } else { [2, 32, 48] };
            let input = SegmentGemmInput {
                x: packed(x, &[5, 32]),
                weights: packed(w, &weights),
                weight_column_major: column_major,
            };
            refused(backend, packed(y, &[5, 48]), input, [2, 3])
        };
        use DType::{BF16, E4M3, E5M2, F16, F32};
        for backend in [GemmBackend::Sm80, GemmBackend::Sm90] {
            for column_major in [false, true] {
                assert_eq!(run(backend, F16, F16, F16, column_major), None);
                assert_eq!(run(backend, BF16, BF16, BF16, column_major), None);
                assert_eq!(run(backend, F16, F16, BF16, column_major), Some("out"));
                assert_eq!(run(backend, F16, BF16, F16, column_major), Some("weights"));
                assert_eq!(run(backend, F32, F32, F32, column_major), Some("x"));
            }
        }
        for byte in [E4M3, E5M2] {
            assert_eq!(run(GemmBackend::Sm80, byte, byte, F16, true), Some("x"));
            assert_eq!(run(GemmBackend::Sm90, byte, byte, F16, true), None);
            assert_eq!(run(GemmBackend::Sm90, byte, byte, BF16, true), None);
            assert_eq!(run(GemmBackend::Sm90, byte, byte, F16, false), Some("weights"));
            assert_eq!(run(GemmBackend::Sm90, byte, byte, byte, true), Some("out"));
        }
        assert_eq!(run(GemmBackend::Sm90, E4M3, E5M2, F16, true), Some("weights"));
    }

    #[test]
    fn sizes_fit_together() {
        let half = |shape: &[usize]| packed(DType::F16, shape);
        let run = |y: TensorRef<'_>, x, w, lens| {
            refused(GemmBackend::Sm80, y, SegmentGemmInput::row_major(x, w), lens)
        };
        let (y, x, w) = (half(&[5, 48]), half(&[5, 32]), half(&[2, 32, 48]));
        assert_eq!(run(y, x, w, [2, 3]), None);
        assert_eq!(run(y, x, half(&[3, 32, 48]), [5, 0]), None);
        assert_eq!(run(y, x, w, [2, 2]), Some("segments"));
        assert_eq!(run(y, x, half(&[1, 32, 48]), [2, 3]), Some("segments"));
        assert_eq!(run(half(&[4, 48]), x, w, [2, 3]), Some("out"));
        assert_eq!(run(half(&[5, 32]), x, w, [2, 3]), Some("out"));
        assert_eq!(run(y, half(&[5, 40]), w, [2, 3]), Some("weights"));
        assert_eq!(run(y, half(&[5, 1, 32]), w, [2, 3]), Some("x"));
        assert_eq!(run(y, x, half(&[32, 48]), [2, 3]), Some("weights"));
        // Not multiples of 8.
        assert_eq!(run(y, half(&[5, 36]), half(&[2, 36, 48]), [2, 3]), Some("x"));
        assert_eq!(run(half(&[5, 44]), x, half(&[2, 32, 44]), [2, 3]), Some("weights"));
        assert_eq!(run(y, half(&[5, 0]), half(&[2, 0, 48]), [2, 3]), Some("x"));
        let bytes = |k: usize| {
            let (x, w) = (packed(DType::E4M3, &[5, k]), packed(DType::E4M3, &[2, 48, k]));
            refused(GemmBackend::Sm90, y, SegmentGemmInput::column_major(x, w), [2, 3])
        };
        assert_eq!((bytes(32), bytes(40)), (None, Some("x")));
    }

    #[test]
    fn layouts_and_addresses_fit() {
        let half = |address, shape: &[usize], strides| view(address, DType::F16, shape, strides);
        let run = |y, x, w| refused(GemmBackend::Sm80, y, SegmentGemmInput::row_major(x, w), [2, 3]);
        let (y, x, w) =
            (half(4096, &[5, 48], None), half(4096, &[5, 32], None), half(4096, &[2, 32, 48], None));
        // Rows with gaps, but of whole vectors.
        assert_eq!(run(y, half(4096, &[5, 32], Some(&[40, 1])), w), None);
        assert_eq!(run(y, half(4096, &[5, 32], Some(&[36, 1])), w), Some("x"));
        assert_eq!(run(y, half(4096, &[5, 32], Some(&[24, 1])), w), Some("x"));
        assert_eq!(run(y, half(4096, &[5, 32], Some(&[0, 1])), w), Some("x"));
        assert_eq!(run(y, half(4096, &[5, 32], Some(&[1 << 31, 1])), w), Some("x"));
        assert_eq!(run(y, half(4096, &[5, 32], Some(&[64, 2])), w), Some("x"));
        assert_eq!(run(half(4096, &[5, 48], Some(&[56, 1])), x, w), Some("out"));
        assert_eq!(run(y, x, half(4096, &[2, 32, 48], Some(&[2048, 48, 1]))), Some("weights"));
        assert_eq!(run(y, x, half(4096, &[2, 32, 48], Some(&[1536, 1, 32]))), Some("weights"));
        for (place, argument) in ["out", "x", "weights"].into_iter().enumerate() {
            let mut address = [4096; 3];
            address[place] += 8;
            let [y, x, w] = address;
            let tensors = [half(y, &[5, 48], None), half(x, &[5, 32], None), half(w, &[2, 32, 48], None)];
            assert_eq!(run(tensors[0], tensors[1], tensors[2]), Some(argument));
        }
    }

    /// One row may have any stride, which no kernel needs.
    #[test]
    fn the_stride_of_one_row_is_replaced() {
        // SAFETY: nothing is enqueued on the stream.
        let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
        let check = Check::new(OP, &stream).unwrap();
        let x = view(4096, DType::BF16, &[1, 32], Some(&[3, 1]));
        let input = SegmentGemmInput::column_major(x, packed(DType::BF16, &[1, 48, 32]));
        let out = packed(DType::BF16, &[1, 48]);
        let segments = SegmentIndices::from_lens([1]).unwrap();
        let sizes = Sizes::check(&check, GemmBackend::Sm90, &out.raw, &input, &segments).unwrap();
        assert_eq!(sizes, Sizes { n: 48, k: 32, x_ld: 32, w_ld: 32 });
    }

    #[test]
    fn tiles_are_counted_in_32_bits() {
        let half = |shape: &[usize]| packed(DType::F16, shape);
        let run = |rows: usize, n: usize| {
            let input = SegmentGemmInput::row_major(half(&[rows, 8]), half(&[2, 8, n]));
            refused(GemmBackend::Sm80, half(&[rows, n]), input, [rows, 0])
        };
        assert_eq!(run(1 << 22, 1 << 20), None);
        assert_eq!(run(1 << 24, 1 << 21), Some("segments"));
    }
}
