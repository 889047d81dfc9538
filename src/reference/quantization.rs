//! Packing of bits on the CPU.

use super::host::{HostCheck, RowsMut};
use crate::{
    dtype::DType,
    error::Result,
    indices::{BitOrder, PackedIndices, pack},
    quantization,
    tensor::{TensorMut, TensorRef},
};

/// [`quantization::packbits`](crate::quantization::packbits) on the CPU: `x` is
/// `[n]` of `u8` or bool, `y` `[⌈n / 8⌉]` of `u8`. Every byte that is not 0 is
/// a 1.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit. Nothing was written.
///
/// ```
/// use flashinfer_rs::{TensorMut, TensorRef, quantization::BitOrder, reference};
/// let (x, mut y) = ([1u8, 0, 1, 1, 0, 0, 1, 1, 1], [0u8; 2]);
/// let x = TensorRef::from_slice(&x, &[9])?;
/// reference::packbits(&mut TensorMut::from_slice(&mut y, &[2])?, &x, BitOrder::Big)?;
/// assert_eq!(y, [0b1011_0011, 0b1000_0000]);
/// reference::packbits(&mut TensorMut::from_slice(&mut y, &[2])?, &x, BitOrder::Little)?;
/// assert_eq!(y, [0b1100_1101, 0b0000_0001]);
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
pub fn packbits(y: &mut TensorMut<'_>, x: &TensorRef<'_>, bitorder: BitOrder) -> Result<()> {
    let check = HostCheck { op: "reference::packbits" };
    check.as_kernel(|check| quantization::check_packbits(check, &y.raw, &x.raw))?;
    let bits = check.flags("x", x)?;
    let mut y = check.rows_mut("y", y, &[DType::U8], &[1])?;
    check.shape("y", &y.rows, &[bits.len().div_ceil(8) as i64])?;
    write(&mut y, pack(&bits, bitorder));
    Ok(())
}

/// [`quantization::segment_packbits`](crate::quantization::segment_packbits) on
/// the CPU: each segment of `x` as [`packbits`] does it.
///
/// # Errors
/// As [`packbits`]; also when `segments` is for another number of elements.
pub fn segment_packbits(
    y: &mut TensorMut<'_>,
    x: &TensorRef<'_>,
    segments: &PackedIndices,
    bitorder: BitOrder,
) -> Result<()> {
    let check = HostCheck { op: "reference::segment_packbits" };
    check.as_kernel(|check| quantization::check_segment_packbits(check, &y.raw, &x.raw, segments))?;
    let bits = check.flags("x", x)?;
    if bits.len() != segments.num_elements() {
        return check
            .fail("x", format!("{} elements; the segments have {}", bits.len(), segments.num_elements()));
    }
    let mut y = check.rows_mut("y", y, &[DType::U8], &[1])?;
    check.shape("y", &y.rows, &[segments.num_bytes() as i64])?;
    let parts = segments.input_indptr().windows(2).map(|ends| &bits[ends[0] as usize..ends[1] as usize]);
    write(&mut y, parts.flat_map(|part| pack(part, bitorder)));
    Ok(())
}

fn write(y: &mut RowsMut<'_>, bytes: impl Iterator<Item = u8>) {
    y.write(0, &bytes.map(f64::from).collect::<Vec<_>>());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::testing::{refused, view, view_mut};

    #[test]
    fn segments_are_packed_each_on_its_own() {
        let x = [1u8, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1];
        let segments = PackedIndices::from_lens([4, 0, 3, 4]).unwrap();
        let mut y = [0xffu8; 3];
        segment_packbits(&mut view_mut(&mut y, &[3]), &view(&x, &[11]), &segments, BitOrder::Big).unwrap();
        assert_eq!(y, [0b1011_0000, 0b0010_0000, 0b1101_0000]);
        segment_packbits(&mut view_mut(&mut y, &[3]), &view(&x, &[11]), &segments, BitOrder::Little).unwrap();
        assert_eq!(y, [0b1101, 0b100, 0b1011]);
        let all = PackedIndices::from_lens([11]).unwrap();
        let (mut one, mut other) = ([0u8; 2], [0u8; 2]);
        segment_packbits(&mut view_mut(&mut one, &[2]), &view(&x, &[11]), &all, BitOrder::Big).unwrap();
        packbits(&mut view_mut(&mut other, &[2]), &view(&x, &[11]), BitOrder::Big).unwrap();
        assert_eq!(one, other);
    }

    #[test]
    fn nothing_is_packed_to_nothing() {
        let none: [u8; 0] = [];
        packbits(&mut view_mut(&mut [0u8; 0], &[0]), &view(&none, &[0]), BitOrder::Big).unwrap();
        let empty = PackedIndices::from_lens([0, 0]).unwrap();
        segment_packbits(&mut view_mut(&mut [0u8; 0], &[0]), &view(&none, &[0]), &empty, BitOrder::Big)
            .unwrap();
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let (x, segments) = ([1u8; 9], PackedIndices::from_lens([4, 5]).unwrap());
        refused(packbits(&mut view_mut(&mut [0u8; 1], &[1]), &view(&x, &[9]), BitOrder::Big), "y");
        refused(packbits(&mut view_mut(&mut [0i32; 2], &[2]), &view(&x, &[9]), BitOrder::Big), "y");
        refused(packbits(&mut view_mut(&mut [0u8; 2], &[2]), &view(&[1i32; 9], &[9]), BitOrder::Big), "x");
        let segment = |y: &mut [u8], x: &[u8]| {
            let (bytes, elements) = (y.len(), x.len());
            segment_packbits(&mut view_mut(y, &[bytes]), &view(x, &[elements]), &segments, BitOrder::Big)
        };
        refused(segment(&mut [0; 2], &[1; 8]), "x");
        refused(segment(&mut [0; 3], &x), "y");
    }
}
