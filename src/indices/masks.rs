//! Custom masks: which keys each query sees, bit by bit.

use super::{
    packed::{BitOrder, pack},
    table::{Array, Arrays, MAX_ARRAYS, OnDevice},
};
use crate::{
    capture::Facts,
    error::{FlashInferError, Result},
    stream::Stream,
    tensor::RawTensor,
};

const OP: &str = "MaskIndices";

/// Where each request's part of a packed custom mask lies.
///
/// A custom mask has one bit for each query and key of a request: bit
/// `query · kv_len + key` of the request's part, counted from the lowest bit
/// of its first byte, is 1 if the query sees the key. Parts start at whole
/// bytes and lie one after the other; this is what
/// [`segment_packbits`](crate::quantization::segment_packbits) makes of
/// [`PackedIndices::of_mask`](crate::indices::PackedIndices::of_mask) in little bit
/// order. The bits themselves are a tensor, which can be on the device only.
#[derive(Clone, Debug)]
pub struct MaskIndices {
    pub(super) mask_indptr: Vec<i32>,
    shapes: Vec<(usize, usize)>,
}

impl MaskIndices {
    /// The parts of a batch whose requests have these numbers of queries and keys.
    ///
    /// # Errors
    /// The mask has 2³¹ bytes or more.
    ///
    /// ```
    /// # use flashinfer_rs::indices::MaskIndices;
    /// // One request of 2 queries and 5 keys, one of 1 query and 3 keys.
    /// let indices = MaskIndices::new([(2, 5), (1, 3)])?;
    /// let bits = indices.pack(&[
    ///     true, false, false, true, false,
    ///     true, false, false, true, true,
    ///     false, true, true,
    /// ])?;
    /// assert_eq!(bits, [0b0010_1001, 0b11, 0b110]);
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    pub fn new(shapes: impl IntoIterator<Item = (usize, usize)>) -> Result<Self> {
        let shapes: Vec<_> = shapes.into_iter().collect();
        let (mut mask_indptr, mut end) = (vec![0i32], 0usize);
        for (request, &(queries, keys)) in shapes.iter().enumerate() {
            let bytes = queries.checked_mul(keys).map(|bits| bits.div_ceil(8));
            end = end.saturating_add(bytes.unwrap_or(usize::MAX));
            let Ok(end) = i32::try_from(end) else {
                return Err(FlashInferError::invalid(
                    OP,
                    "shapes",
                    format!("up to request {request}, the mask has 2^31 bytes or more; split the batch"),
                ));
            };
            mask_indptr.push(end);
        }
        Ok(Self { mask_indptr, shapes })
    }

    /// Packs a mask of one `bool` for each query and key, row by row, requests
    /// one after the other.
    ///
    /// # Errors
    /// `mask` has another number of elements than the requests have pairs of
    /// queries and keys.
    pub fn pack(&self, mask: &[bool]) -> Result<Vec<u8>> {
        let expected: usize = self.shapes.iter().map(|(queries, keys)| queries * keys).sum();
        if mask.len() != expected {
            return Err(FlashInferError::invalid(
                OP,
                "mask",
                format!("{} elements; the requests have {expected} pairs of queries and keys", mask.len()),
            ));
        }
        let mut packed = Vec::with_capacity(self.num_bytes());
        let mut rest = mask;
        for (queries, keys) in &self.shapes {
            let (part, others) = rest.split_at(queries * keys);
            packed.extend(pack(part, BitOrder::Little));
            rest = others;
        }
        Ok(packed)
    }

    /// The number of requests.
    pub fn batch_size(&self) -> usize {
        self.shapes.len()
    }

    /// Queries and keys of each request.
    pub fn shapes(&self) -> &[(usize, usize)] {
        &self.shapes
    }

    /// Where each request's part starts and ends, in bytes.
    pub fn mask_indptr(&self) -> &[i32] {
        &self.mask_indptr
    }

    /// Bytes of the packed mask.
    pub fn num_bytes(&self) -> usize {
        self.mask_indptr[self.mask_indptr.len() - 1] as usize
    }

    /// Whether a query sees a key, by a packed mask.
    pub(crate) fn sees(&self, bits: &[u8], request: usize, query: usize, key: usize) -> bool {
        let bit = query * self.shapes[request].1 + key;
        bits[self.mask_indptr[request] as usize + bit / 8] >> (bit % 8) & 1 == 1
    }
}

/// Checks a mask's requests against the queries and keys of a batch.
pub(crate) fn check_shapes(
    masked: &[(usize, usize)],
    batch: impl ExactSizeIterator<Item = (usize, usize)>,
) -> std::result::Result<(), String> {
    if masked.len() != batch.len() {
        return Err(format!("it is for {} requests, the batch has {}", masked.len(), batch.len()));
    }
    for (request, (&masked, batch)) in masked.iter().zip(batch).enumerate() {
        if masked != batch {
            return Err(format!(
                "request {request}: it is for {} queries over {} keys, the batch has {} over {}",
                masked.0, masked.1, batch.0, batch.1
            ));
        }
    }
    Ok(())
}

impl Arrays for MaskIndices {
    fn facts(&self) -> Facts {
        Facts::of([self.batch_size(), self.num_bytes()])
    }
    const OP: &'static str = "MaskTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::I32(&self.mask_indptr), Array::EMPTY, Array::EMPTY]
    }
}

/// The parts of a packed custom mask on a device. See [`MaskIndices`].
pub type MaskTable = OnDevice<MaskIndices>;

impl MaskTable {
    /// Uploads the parts of a mask, with room for up to `max_batch` requests in
    /// later updates.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when there are more requests than that.
    pub fn with_capacity(stream: &Stream, host: MaskIndices, max_batch: usize) -> Result<Self> {
        let room = (host.batch_size(), max_batch, "requests");
        Self::allocate_for(stream, host, room, [max_batch.saturating_add(1), 0, 0])
    }

    pub(crate) fn mask_indptr(&self) -> Result<RawTensor> {
        self.array(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn packed_bits_are_the_masks(
            shapes in prop::collection::vec((0usize..5, 0usize..20), 0..6),
            seed: u64,
        ) {
            let indices = MaskIndices::new(shapes.clone()).unwrap();
            let total: usize = shapes.iter().map(|(q, k)| q * k).sum();
            let mask: Vec<bool> = (0..total).map(|at| seed.rotate_left(at as u32 * 7 % 64) & 1 == 1).collect();
            let bits = indices.pack(&mask).unwrap();
            prop_assert_eq!(bits.len(), indices.num_bytes());
            let mut at = 0;
            for (request, &(queries, keys)) in shapes.iter().enumerate() {
                for query in 0..queries {
                    for key in 0..keys {
                        prop_assert_eq!(indices.sees(&bits, request, query, key), mask[at]);
                        at += 1;
                    }
                }
            }
        }
    }

    #[test]
    fn masks_are_checked() {
        let indices = MaskIndices::new([(2, 5), (1, 3)]).unwrap();
        assert_eq!(indices.mask_indptr(), [0, 2, 3]);
        assert!(indices.pack(&[true; 12]).unwrap_err().to_string().contains("12 elements"));
        assert!(MaskIndices::new([(1 << 20, 1 << 14)]).is_err());
        assert!(MaskIndices::new([(usize::MAX, 2)]).is_err());
        assert!(MaskIndices::new([(1 << 20, (1 << 14) - 8); 1]).is_ok());
        let check = |batch: &[(usize, usize)]| check_shapes(indices.shapes(), batch.iter().copied());
        assert!(check(&[(2, 5), (1, 3)]).is_ok());
        assert!(check(&[(2, 5), (1, 4)]).unwrap_err().contains("request 1: it is for 1 queries over 3 keys"));
        assert!(check(&[(2, 5)]).unwrap_err().contains("for 2 requests, the batch has 1"));
    }
}
