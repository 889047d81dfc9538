//! Bits in bytes, and segments of them.

use super::{
    MaskIndices, RaggedIndices,
    table::{Array, Arrays, MAX_ARRAYS, OnDevice},
};
use crate::{capture::Facts, error::Result, stream::Stream, tensor::RawTensor};

/// Which bit of a byte comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum BitOrder {
    /// The highest. Upstream's default, and NumPy's.
    #[default]
    Big,
    /// The lowest, as custom masks of attention have it.
    Little,
}

/// Packs eight to a byte; what the last byte lacks is 0.
pub(crate) fn pack(bits: &[bool], order: BitOrder) -> impl Iterator<Item = u8> {
    let place = move |at: usize| match order {
        BitOrder::Big => 7 - at,
        BitOrder::Little => at,
    };
    bits.chunks(8).map(move |bits| {
        bits.iter().enumerate().fold(0, |byte, (at, &bit)| byte | u8::from(bit) << place(at))
    })
}

/// Segments of a boolean tensor that are packed each on its own: segment `i`
/// is `input_indptr[i]..input_indptr[i + 1]`, and its bytes are
/// `output_indptr[i]..output_indptr[i + 1]`.
#[derive(Clone, Debug)]
pub struct PackedIndices {
    input: RaggedIndices,
    output: RaggedIndices,
}

impl PackedIndices {
    /// Segments of these offsets into the tensor.
    ///
    /// # Errors
    /// There are too many bytes, which needs 2³¹ segments or so.
    ///
    /// ```
    /// # use flashinfer_rs::{indices::{PackedIndices, RaggedIndices}};
    /// let segments = PackedIndices::new(RaggedIndices::new(vec![0, 4, 4, 13])?)?;
    /// assert_eq!(segments.output_indptr(), [0, 1, 1, 3]);
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    pub fn new(input: RaggedIndices) -> Result<Self> {
        let output =
            RaggedIndices::from_lens((0..input.batch_size()).map(|segment| input.len(segment).div_ceil(8)))?;
        Ok(Self { input, output })
    }

    /// Segments of these lengths, which may be 0, one after the other.
    ///
    /// # Errors
    /// They have 2³¹ elements or more.
    pub fn from_lens(lens: impl IntoIterator<Item = usize>) -> Result<Self> {
        Self::new(RaggedIndices::from_lens(lens)?)
    }

    /// The requests' parts of a custom mask, which with [`BitOrder::Little`]
    /// are packed as [`MaskIndices`] says.
    ///
    /// # Errors
    /// As [`from_lens`](Self::from_lens).
    pub fn of_mask(mask: &MaskIndices) -> Result<Self> {
        Self::from_lens(mask.shapes().iter().map(|(queries, keys)| queries * keys))
    }

    /// The number of segments.
    pub fn batch_size(&self) -> usize {
        self.input.batch_size()
    }

    /// Where each segment starts and ends, in elements.
    pub fn input_indptr(&self) -> &[i32] {
        self.input.indptr()
    }

    /// Where each packed segment starts and ends, in bytes.
    pub fn output_indptr(&self) -> &[i32] {
        self.output.indptr()
    }

    /// Elements of all segments.
    pub fn num_elements(&self) -> usize {
        self.input.total()
    }

    /// Bytes of all packed segments.
    pub fn num_bytes(&self) -> usize {
        self.output.total()
    }
}

impl Arrays for PackedIndices {
    fn facts(&self) -> Facts {
        Facts::of([self.batch_size(), self.num_elements(), self.num_bytes()])
    }
    const OP: &'static str = "PackedTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::I32(self.input_indptr()), Array::I32(self.output_indptr()), Array::EMPTY]
    }
}

/// Segments of a boolean tensor on a device. See [`PackedIndices`].
pub type PackedTable = OnDevice<PackedIndices>;

impl PackedTable {
    /// Uploads segments, with room for up to `max_segments` in later updates.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when there are more segments than that.
    pub fn with_capacity(stream: &Stream, host: PackedIndices, max_segments: usize) -> Result<Self> {
        let (have, entries) = ((host.batch_size(), max_segments, "segments"), max_segments.saturating_add(1));
        Self::allocate_for(stream, host, have, [entries, entries, 0])
    }

    pub(crate) fn input_indptr(&self) -> Result<RawTensor> {
        self.array(0)
    }

    pub(crate) fn output_indptr(&self) -> Result<RawTensor> {
        self.array(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_have_bytes_of_their_own() {
        let segments = PackedIndices::from_lens([4, 3, 0, 17, 8]).unwrap();
        assert_eq!(segments.input_indptr(), [0, 4, 7, 7, 24, 32]);
        assert_eq!(segments.output_indptr(), [0, 1, 2, 2, 5, 6]);
        assert_eq!((segments.batch_size(), segments.num_elements(), segments.num_bytes()), (5, 32, 6));
        let mask = MaskIndices::new([(2, 5), (0, 4), (3, 8)]).unwrap();
        let segments = PackedIndices::of_mask(&mask).unwrap();
        assert_eq!(segments.output_indptr(), mask.mask_indptr());
        // A mask has up to 2³¹ bytes; its elements are counted in 32 bits here.
        assert!(PackedIndices::of_mask(&MaskIndices::new([(1 << 16, 1 << 16)]).unwrap()).is_err());
        assert!(PackedIndices::from_lens([(1 << 31) - 1]).is_ok());
    }
}
