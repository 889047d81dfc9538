//! Which keys each query of a batch sees, where neither "all" nor "those up to
//! its position" says it.

use super::packed::{BitOrder, pack};
use crate::error::{FlashInferError, Result};

/// Where each request's part of a packed custom mask lies.
///
/// A custom mask has one bit for each query and key of a request: bit
/// `query · kv_len + key` of the request's part, counted from the lowest bit
/// of its first byte, is 1 if the query sees the key. Parts start at whole
/// bytes and lie one after the other; this is what
/// [`segment_packbits`](crate::quantization::segment_packbits) makes of
/// [`PackedIndices::of_mask`](crate::PackedIndices::of_mask) in little bit
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
    /// # use flashinfer_rs::MaskIndices;
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

const OP: &str = "MaskIndices";

/// The prompts of a batch whose items are scored independently, for multi-item
/// scoring.
///
/// A request's tokens are a prefix and then items, each of which begins with a
/// delimiter. Tokens of the prefix see what is before them, and themselves.
/// Tokens of an item see the prefix, and their item from the token after its
/// delimiter up to themselves; the delimiter sees the prefix only.
#[derive(Clone, Debug)]
pub struct ItemIndices {
    pub(super) prefix_len: Vec<u32>,
    /// For each token after the prefix its place in its item, in rows of
    /// `row_len`, padded with zeros.
    pub(super) token_pos_in_items: Vec<u16>,
    /// The longest item of each request, and then as often the largest number,
    /// for kernels that must not skip keys.
    pub(super) max_item_len: Vec<u16>,
    row_len: usize,
    lens: Vec<usize>,
}

impl ItemIndices {
    /// The prompts of a batch: of each request the length of its prefix, and
    /// of its items, without their delimiters. After the last item comes
    /// another delimiter, as upstream has it: a prefix of 5 tokens and items of
    /// 3 and 2 are `5 + (1 + 3) + (1 + 2) + 1` tokens.
    ///
    /// # Errors
    /// A prefix is empty, an item has 65535 tokens or more, or the batch has
    /// 2³¹ tokens or more, rows padded to the longest request's.
    ///
    /// ```
    /// # use flashinfer_rs::ItemIndices;
    /// let items = ItemIndices::new([(5, &[3, 2][..])])?;
    /// assert_eq!(items.token_pos_in_items(), [0, 1, 2, 3, 0, 1, 2, 0]);
    /// assert_eq!(items.seq_len(0), 13);
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    pub fn new<'r>(requests: impl IntoIterator<Item = (usize, &'r [usize])>) -> Result<Self> {
        const OP: &str = "ItemIndices";
        let invalid = |argument, problem| Err(FlashInferError::invalid(OP, argument, problem));
        let (mut prefix_len, mut rows, mut max_item_len) = (Vec::new(), Vec::new(), Vec::new());
        for (request, (prefix, items)) in requests.into_iter().enumerate() {
            let mut row = Vec::new();
            let Some(prefix) = u32::try_from(prefix).ok().filter(|&prefix| prefix > 0 && prefix < 1 << 31)
            else {
                return invalid(
                    "prefix",
                    format!(
                        "request {request}: {prefix} tokens; a delimiter sees nothing else, so it must be 1 to 2^31 - 1"
                    ),
                );
            };
            for &len in items {
                let Some(len) = u16::try_from(len).ok().filter(|&len| len < u16::MAX) else {
                    return invalid(
                        "items",
                        format!("request {request}: an item of {len} tokens; at most 65534"),
                    );
                };
                row.extend(0..=len);
            }
            row.push(0);
            max_item_len.push(row.iter().copied().max().unwrap_or_default());
            prefix_len.push(prefix);
            rows.push(row);
        }
        max_item_len.extend(std::iter::repeat_n(u16::MAX, rows.len()));
        let row_len = rows.iter().map(Vec::len).max().unwrap_or_default();
        let widest = prefix_len.iter().map(|&prefix| prefix as usize).max().unwrap_or_default();
        if row_len.saturating_add(widest).checked_mul(rows.len()).is_none_or(|all| all > i32::MAX as usize) {
            return invalid(
                "requests",
                format!(
                    "{} requests of up to {row_len} tokens after prefixes of up to {widest}; 2^31 tokens or more, so split the batch",
                    rows.len()
                ),
            );
        }
        let lens = rows.iter().zip(&prefix_len).map(|(row, &prefix)| prefix as usize + row.len()).collect();
        let mut token_pos_in_items = Vec::with_capacity(row_len * rows.len());
        for row in &rows {
            token_pos_in_items.extend_from_slice(row);
            token_pos_in_items.extend(std::iter::repeat_n(0, row_len - row.len()));
        }
        Ok(Self { prefix_len, token_pos_in_items, max_item_len, row_len, lens })
    }

    /// The number of requests.
    pub fn batch_size(&self) -> usize {
        self.prefix_len.len()
    }

    /// Tokens of each request's prefix.
    pub fn prefix_len(&self) -> &[u32] {
        &self.prefix_len
    }

    /// The place in its item of each token after the prefix, 0 for delimiters;
    /// a row for each request, padded with zeros.
    pub fn token_pos_in_items(&self) -> &[u16] {
        &self.token_pos_in_items
    }

    /// The length of a row of [`token_pos_in_items`](Self::token_pos_in_items).
    pub fn token_pos_in_items_len(&self) -> usize {
        self.row_len
    }

    /// The longest item of each request.
    pub fn max_item_len(&self) -> &[u16] {
        &self.max_item_len[..self.batch_size()]
    }

    /// Tokens of a request.
    ///
    /// # Panics
    /// If there is no such request.
    pub fn seq_len(&self, request: usize) -> usize {
        self.lens[request]
    }

    /// Whether the token at one position of a request sees another.
    pub(crate) fn sees(&self, request: usize, position: usize, key: usize) -> bool {
        let prefix = self.prefix_len[request] as usize;
        let own = |position: usize| {
            usize::from(self.token_pos_in_items[request * self.row_len + position - prefix])
        };
        key <= position && (key < prefix || position < key + own(position))
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

    #[test]
    fn items_see_the_prefix_and_themselves() {
        // Positions: prefix 0 1, delimiter 2, item 3 4, delimiter 5.
        let items = ItemIndices::new([(2, &[2][..]), (1, &[][..])]).unwrap();
        let seen = |position| (0..6).filter(|&key| items.sees(0, position, key)).collect::<Vec<_>>();
        let expected: [&[usize]; 6] = [&[0], &[0, 1], &[0, 1], &[0, 1, 3], &[0, 1, 3, 4], &[0, 1]];
        for (position, expected) in expected.into_iter().enumerate() {
            assert_eq!(seen(position), expected, "position {position}");
        }
        assert_eq!(items.token_pos_in_items(), [0, 1, 2, 0, 0, 0, 0, 0]);
        assert_eq!((items.max_item_len(), items.prefix_len()), (&[2, 0][..], &[2, 1][..]));
        assert_eq!((items.seq_len(0), items.seq_len(1), items.token_pos_in_items_len()), (6, 2, 4));
    }

    #[test]
    fn items_are_checked() {
        let problem = |prefix, items: &[usize]| ItemIndices::new([(prefix, items)]).unwrap_err().to_string();
        assert!(problem(0, &[1]).contains("0 tokens"));
        assert!(problem(1 << 31, &[1]).contains("2^31"));
        assert!(problem(1, &[65535]).contains("65535 tokens"));
        assert!(problem((1 << 31) - 1, &[1]).contains("2^31"));
        assert!(ItemIndices::new([(1, &[65534][..])]).is_ok());
    }
}
