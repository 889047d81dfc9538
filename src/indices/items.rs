//! Multi-item prompts: a prefix, and items that see it and themselves.

use super::table::{Array, Arrays, MAX_ARRAYS, OnDevice};
use crate::{
    capture::Facts,
    error::{FlashInferError, Result},
    tensor::RawTensor,
};

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
    /// # use flashinfer_rs::indices::ItemIndices;
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

impl Arrays for ItemIndices {
    fn facts(&self) -> Facts {
        Facts::of([self.batch_size(), self.row_len])
    }
    const OP: &'static str = "ItemTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::U32(&self.prefix_len), Array::U16(&self.max_item_len), Array::U16(&self.token_pos_in_items)]
    }
}

/// The items of multi-item prompts on a device. See [`ItemIndices`].
pub type ItemTable = OnDevice<ItemIndices>;

impl ItemTable {
    pub(crate) fn prefix_len(&self) -> Result<RawTensor> {
        self.array(0)
    }

    /// The longest item of each request; or, for kernels that must not skip
    /// the keys that this makes invisible, the largest number.
    pub(crate) fn max_item_len(&self, skips: bool) -> Result<RawTensor> {
        let (both, batch) = (self.array(1)?, self.host().batch_size());
        let start = if skips { 0 } else { batch };
        let data = both.data.cast::<u16>().wrapping_add(start).cast();
        let mut one = RawTensor::new(data, both.device, both.dtype, &[batch], None)?;
        (one.stream, one.owner) = (both.stream, both.owner);
        Ok(one)
    }

    pub(crate) fn token_pos_in_items(&self) -> Result<RawTensor> {
        self.array(2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
