//! What the kernels of a segment GEMM assume of tensors and segments.

use super::{GemmBackend, SegmentGemmInput};
use crate::{dtype::DType, error::Result, indices::SegmentIndices, ops::check::Check, tensor::RawTensor};

/// Element types of outputs, and of rows and weights.
const HALVES: &[DType] = &[DType::F16, DType::BF16];
/// Element types of rows and weights that `gemm_sm90` takes.
const HALVES_AND_BYTES: &[DType] = &[DType::F16, DType::BF16, DType::E4M3, DType::E5M2];

/// Tiles that the kernels count in 32 bits, where each segment's rows and the
/// columns may be rounded up to a cluster of 2 × 2.
const MAX_TILES: i64 = i32::MAX as i64 / 4;

/// Sizes and strides in elements, checked.
#[derive(Debug, PartialEq)]
pub(crate) struct Sizes {
    pub(super) n: i64,
    pub(super) k: i64,
    pub(super) x_ld: i64,
    pub(super) w_ld: i64,
}

impl Sizes {
    /// All that the kernels assume of tensors and segments.
    pub(crate) fn check(
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
    use std::ffi::c_void;

    use super::{super::backend::OP, *};
    use crate::{device::Device, error::FlashInferError, stream::Stream, tensor::TensorRef};

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
