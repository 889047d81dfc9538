//! Packing of bits, in FlashInfer's module `quantization`.
//!
//! Tensors have one dimension and are contiguous. What is packed is `bool` or
//! `u8`, whose bytes are 0 or 1; of other bytes the packed bits are not
//! specified. Source of the contract: `csrc/quantization.cu`,
//! `include/flashinfer/quantization.cuh` of FlashInfer 0.6.13.
//!
//! A custom mask of attention, packed on the device:
//!
//! ```no_run
//! # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use flashinfer_rs::{
//!     Stream, gpu::Tensor, quantization::{self, BitOrder},
//!     indices::{MaskIndices, PackedIndices, PackedTable},
//! };
//! let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
//! // One request of 2 queries and 5 keys, one of 1 query and 3 keys.
//! let mask = MaskIndices::new([(2, 5), (1, 3)])?;
//! let segments = PackedTable::new(&stream, PackedIndices::of_mask(&mask)?)?;
//! let visible = Tensor::from_slice(&stream, &[13], &[1u8; 13])?;
//! let mut bits = Tensor::<u8>::zeros(&stream, &[mask.num_bytes()])?;
//! let order = BitOrder::Little;
//! quantization::segment_packbits(&stream, &mut bits.view_mut(), &visible.view(), &segments, order)?;
//! # Ok(()) }
//! # #[cfg(not(feature = "cudarc"))] fn main() {}
//! ```

use std::ffi::CStr;

use super::{FixedFunction, check::Check};
pub use crate::indices::BitOrder;
use crate::{
    dtype::DType,
    error::Result,
    ffi::{DlTensor, Kernel, Signature, kernels},
    indices::{PackedIndices, PackedTable},
    module::ModuleName,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::{RawTensor, TensorMut, TensorRef},
};

kernels! {
    struct Packbits = "packbits"(x: Tensor, bitorder: Str, y: Tensor) -> "void";
    struct SegmentPackbits = "segment_packbits"(
        x: Tensor, input_indptr: Tensor, output_indptr: Tensor, bitorder: Str, y: Tensor,
    ) -> "void";
}

impl ModuleName {
    /// Packing of bits.
    pub const QUANTIZATION: Self = Self::fixed("quantization");
}

pub(super) const SIGNATURES: &[(&str, &[Signature])] =
    &[("quantization", Packbits::SIGNATURES), ("quantization", SegmentPackbits::SIGNATURES)];

static PACKBITS: FixedFunction = FixedFunction::of(ModuleName::QUANTIZATION, Packbits::SIGNATURES);
static SEGMENT_PACKBITS: FixedFunction =
    FixedFunction::of(ModuleName::QUANTIZATION, SegmentPackbits::SIGNATURES);

/// Element types of what is packed.
const DTYPES: [DType; 2] = [DType::U8, DType::Bool];

/// The name that kernels take.
fn name(bitorder: BitOrder) -> &'static CStr {
    match bitorder {
        BitOrder::Big => c"big",
        BitOrder::Little => c"little",
    }
}

/// Packs the `n` elements of `x` into `y`, `[⌈n / 8⌉]` of `u8`, eight to a
/// byte; what the last byte lacks is 0. No elements are nothing to do.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument) before anything
/// is launched: a device, dtype, shape or stride does not fit. Else what the
/// module or CUDA said.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{Stream, gpu::Tensor, quantization::{self, BitOrder}};
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let x = Tensor::from_slice(&stream, &[9], &[1u8, 0, 1, 1, 0, 0, 1, 1, 1])?;
/// let mut y = Tensor::<u8>::zeros(&stream, &[2])?;
/// quantization::packbits(&stream, &mut y.view_mut(), &x.view(), BitOrder::Big)?;
/// assert_eq!(y.to_vec()?, [0b1011_0011, 0b1000_0000]);
/// # Ok(()) }
/// # #[cfg(not(feature = "cudarc"))] fn main() {}
/// ```
pub fn packbits(stream: &Stream, y: &mut TensorMut<'_>, x: &TensorRef<'_>, bitorder: BitOrder) -> Result<()> {
    let check = Check::new(PACKBITS.name(), stream)?;
    check_packbits(&check, &y.raw, &x.raw)?;
    if x.raw.numel() == 0 {
        return Ok(());
    }
    let kernel = Packbits { x: x.into(), bitorder: name(bitorder), y: DlTensor::new(&y.raw) };
    // SAFETY: tensors and offsets were checked above.
    unsafe { launch(stream, &PACKBITS, &kernel) }
}

/// All that the kernel of [`packbits`] assumes.
pub(crate) fn check_packbits(check: &Check<'_>, y: &RawTensor, x: &RawTensor) -> Result<()> {
    check.tensor("x", x, &DTYPES, &[1])?;
    let elements = x.numel();
    check_tensors(check, [y, x], [elements.unsigned_abs().div_ceil(8) as i64, elements])
}

/// Packs each segment of `x` as [`packbits`] does, into whole bytes of its own;
/// `y` is `[num_bytes]` of `u8`. No segments are nothing to do.
///
/// A capture into a CUDA graph bakes in the number of segments and the tensors:
/// a table that is updated before a replay must keep that number and end within
/// the tensors.
///
/// # Errors
/// As [`packbits`]; also when `segments` is for another number of elements or
/// belongs to another stream.
pub fn segment_packbits(
    stream: &Stream,
    y: &mut TensorMut<'_>,
    x: &TensorRef<'_>,
    segments: &PackedTable,
    bitorder: BitOrder,
) -> Result<()> {
    let check = Check::new(SEGMENT_PACKBITS.name(), stream)?;
    check.on_stream("segments", segments.stream())?;
    check_segment_packbits(&check, &y.raw, &x.raw, segments.host())?;
    if segments.host().num_elements() == 0 {
        return Ok(());
    }
    let (input_indptr, output_indptr) = (segments.input_indptr()?, segments.output_indptr()?);
    let kernel = SegmentPackbits {
        x: x.into(),
        input_indptr: DlTensor::new(&input_indptr),
        output_indptr: DlTensor::new(&output_indptr),
        bitorder: name(bitorder),
        y: DlTensor::new(&y.raw),
    };
    // SAFETY: tensors and offsets were checked above.
    unsafe { launch(stream, &SEGMENT_PACKBITS, &kernel) }
}

/// All that the kernel of [`segment_packbits`] assumes.
pub(crate) fn check_segment_packbits(
    check: &Check<'_>,
    y: &RawTensor,
    x: &RawTensor,
    segments: &PackedIndices,
) -> Result<()> {
    check_tensors(check, [y, x], [segments.num_bytes() as i64, segments.num_elements() as i64])
}

/// Bytes to write and elements to read. The launchers compare nothing with `y`.
fn check_tensors(check: &Check<'_>, [y, x]: [&RawTensor; 2], [bytes, elements]: [i64; 2]) -> Result<()> {
    for (argument, tensor, dtypes, len) in [("x", x, &DTYPES[..], elements), ("y", y, &[DType::U8], bytes)] {
        check.plain(argument, tensor, dtypes, &[len], 1)?;
    }
    Ok(())
}

/// Launches on the stream's device, which the launchers leave to their caller,
/// and asks whether it worked, which `segment_packbits` does not.
///
/// # Safety
/// The kernel must be the function's. Both tensors must be contiguous and on
/// the stream's device, and `y` must have the bytes that the elements of `x`
/// make; offsets, if any, must end with both tensors.
unsafe fn launch<K: Kernel>(stream: &Stream, function: &FixedFunction, kernel: &K) -> Result<()> {
    let runtime = FlashInferRuntime::get()?;
    let cuda = runtime.cuda();
    let function = function.get(runtime)?;
    let _device = cuda.on_device_of(stream)?;
    // SAFETY: promised by the caller. The kernels read and write single bytes,
    // which need no alignment.
    cuda.watch_launch(|| unsafe { kernel.call(function, stream) }).map(drop)
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;

    use super::*;
    use crate::{device::Device, error::FlashInferError};

    fn view(device: Device, dtype: DType, len: usize, stride: usize) -> RawTensor {
        RawTensor::new(4096 as *mut c_void, device, dtype, &[len], Some(&[stride])).unwrap()
    }

    #[test]
    fn tensors_have_the_sizes_of_the_segments() {
        // SAFETY: nothing is enqueued on the stream.
        let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
        let check = Check::new("segment_packbits", &stream).unwrap();
        let gpu = Device::Cuda(0);
        let (y, x) = (view(gpu, DType::U8, 3, 1), view(gpu, DType::Bool, 20, 1));
        assert!(check_tensors(&check, [&y, &x], [3, 20]).is_ok());
        let refused =
            |y: &RawTensor, x: &RawTensor, expected: &str| match check_tensors(&check, [y, x], [3, 20]) {
                Err(FlashInferError::InvalidArgument { argument, .. }) => assert_eq!(argument, expected),
                other => panic!("expected `{expected}` to be refused, got {other:?}"),
            };
        for wrong in [
            view(gpu, DType::I8, 20, 1),
            view(gpu, DType::U8, 19, 1),
            view(gpu, DType::U8, 20, 2),
            view(Device::Cpu, DType::U8, 20, 1),
            view(Device::Cuda(1), DType::U8, 20, 1),
        ] {
            refused(&y, &wrong, "x");
        }
        for wrong in [
            view(gpu, DType::Bool, 3, 1),
            view(gpu, DType::U8, 4, 1),
            view(gpu, DType::U8, 2, 1),
            view(gpu, DType::U8, 3, 2),
            view(Device::Cpu, DType::U8, 3, 1),
        ] {
            refused(&wrong, &x, "y");
        }
    }
}
