//! Which keys queries see, and the requests that a batch is for kernels.

use crate::{Result, indices::MaskIndices};

/// The queries and keys of one sequence, or of one request.
pub(super) type Lens = (usize, usize);

/// How far from its position a query sees: query `r` of a sequence with `q`
/// queries and `k` keys is at position `k − q + r`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    /// Keys before its position; `None` is all.
    pub(super) left: Option<usize>,
    /// Keys after its position; `None` is all.
    pub(super) right: Option<usize>,
}

impl Window {
    /// FlashAttention's reading of its arguments, for sequences of up to
    /// `max_keys` keys: a wider side has no limit. With a left side, though,
    /// the right one is `max_keys` then, which hides keys from queries that
    /// lie further before all keys.
    pub(super) fn new([left, right]: [Option<usize>; 2], max_keys: usize) -> Self {
        let [left, right] = [left, right].map(|side| side.filter(|&side| side <= max_keys));
        Self { left, right: right.or(left.map(|_| max_keys)) }
    }

    /// Without the sides that hide nothing in these sequences.
    fn needed(self, sequences: &[Lens]) -> Self {
        let hides = |far: fn(&Lens) -> usize, side: &usize| {
            sequences.iter().any(|lens| lens.0 > 0 && lens.1 > 0 && side.saturating_add(1) < far(lens))
        };
        Self {
            left: self.left.filter(|side| hides(|lens| lens.1, side)),
            right: self.right.filter(|side| hides(|lens| lens.0, side)),
        }
    }

    /// Whether a query at a position sees a key.
    fn sees(self, position: i64, key: i64) -> bool {
        self.left.is_none_or(|left| key >= position - left as i64)
            && self.right.is_none_or(|right| key <= position + right as i64)
    }
}

/// Which keys queries see, in the kernels' terms.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Visible {
    /// All, or those in a window to the left.
    All { left: Option<usize> },
    /// Those up to a query's position, or those of them in a window.
    Causal { left: Option<usize> },
    /// Those in the window, and in the ranges of each sequence, if there are
    /// any, those in a range that its position is in.
    Bits { window: Window, ranges: Vec<Vec<[i64; 2]>> },
}

impl Visible {
    pub(super) fn new(window: Window, sequences: &[Lens], ranges: Vec<Vec<[i64; 2]>>) -> Self {
        let window = window.needed(sequences);
        let behind = sequences.iter().all(|&(queries, keys)| queries <= keys || keys == 0);
        match window {
            Window { left: None, right: None } => Self::All { left: None },
            _ if ranges.iter().any(|ranges| !ranges.is_empty()) => Self::Bits { window, ranges },
            Window { left, right: Some(0) } => Self::Causal { left },
            // Kernels count a window from a position without a sign.
            Window { left, right: None } if behind => Self::All { left },
            _ => Self::Bits { window, ranges: Vec::new() },
        }
    }

    /// The window that kernels are told.
    pub(super) fn left(&self) -> Option<usize> {
        match *self {
            Self::All { left } | Self::Causal { left } => left,
            Self::Bits { .. } => None,
        }
    }

    /// No query sees a key after its position.
    pub(super) fn is_causal(&self, sequences: &[Lens]) -> bool {
        match self {
            Self::Causal { .. } => true,
            Self::All { .. } => sequences.iter().all(|&(queries, _)| queries <= 1),
            Self::Bits { .. } => false,
        }
    }

    /// The requests that sequences are, with so many unused rows of keys after
    /// each but the last.
    pub(super) fn requests(&self, sequences: &[Lens], gap: usize) -> Vec<Request> {
        let mut requests = Vec::with_capacity(2 * sequences.len());
        for (sequence, &(queries, keys)) in sequences.iter().enumerate() {
            if sequence > 0 && gap > 0 {
                requests.push(Request { sequence: None, queries: 0, keys: gap });
            }
            // Queries before all keys see none, and kernels with a causal mask
            // want no more queries than keys.
            let blind = match self {
                Self::Causal { .. } if keys > 0 => queries.saturating_sub(keys),
                _ => 0,
            };
            if blind > 0 {
                requests.push(Request { sequence: None, queries: blind, keys: 0 });
            }
            requests.push(Request { sequence: Some(sequence), queries: queries - blind, keys });
        }
        requests
    }

    /// The packed mask of these requests, where it is one.
    pub(super) fn pack(&self, requests: &[Request]) -> Result<Option<(MaskIndices, Vec<u8>)>> {
        let Self::Bits { window, ranges } = self else { return Ok(None) };
        let indices = MaskIndices::new(requests.iter().map(|request| (request.queries, request.keys)))?;
        let mut bits = vec![0u8; indices.num_bytes()];
        for (request, &first) in requests.iter().zip(indices.mask_indptr()) {
            let ranges = request.sequence.and_then(|at| ranges.get(at)).map_or(&[][..], Vec::as_slice);
            for query in 0..request.queries {
                let position = (request.keys + query) as i64 - request.queries as i64;
                let around = |range: &&[i64; 2]| (range[0]..range[1]).contains(&position);
                for key in 0..request.keys {
                    let mut theirs = ranges.iter().filter(around);
                    let at = key as i64;
                    if window.sees(position, at) || theirs.any(|range| (range[0]..range[1]).contains(&at)) {
                        let bit = query * request.keys + key;
                        bits[first as usize + bit / 8] |= 1 << (bit % 8);
                    }
                }
            }
        }
        Ok(Some((indices, bits)))
    }
}

/// A request: a sequence, queries that see nothing, or rows that nobody reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// The sequence whose keys these are.
    pub(super) sequence: Option<usize>,
    pub(super) queries: usize,
    pub(super) keys: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_RANGES: Vec<Vec<[i64; 2]>> = Vec::new();

    fn visible(sides: [Option<usize>; 2], sequences: &[Lens]) -> Visible {
        let max_keys = sequences.iter().map(|lens| lens.1).max().unwrap();
        Visible::new(Window::new(sides, max_keys), sequences, NO_RANGES)
    }

    #[test]
    fn direct_options_are_used_where_they_exist() {
        let bits = |left, right| Visible::Bits { window: Window { left, right }, ranges: NO_RANGES };
        assert_eq!(visible([None, Some(0)], &[(3, 8)]), Visible::Causal { left: None });
        assert_eq!(visible([Some(2), Some(0)], &[(3, 8)]), Visible::Causal { left: Some(2) });
        assert_eq!(visible([Some(2), None], &[(3, 8)]), Visible::All { left: Some(2) });
        assert_eq!(visible([Some(2), Some(1)], &[(3, 8)]), bits(Some(2), Some(1)));
        assert_eq!(visible([Some(2), None], &[(9, 8)]), bits(Some(2), None));
        // Of a window wider than the keys nothing is left, nor of one that
        // hides nothing, nor of a causal mask with one query.
        let all = Visible::All { left: None };
        assert_eq!(visible([Some(9), None], &[(3, 8)]), all);
        assert_eq!(visible([Some(7), Some(2)], &[(3, 8)]), all);
        assert_eq!(visible([None, Some(0)], &[(1, 8), (1, 3), (0, 5), (4, 0)]), all);
        assert_eq!(visible([Some(6), Some(0)], &[(1, 8)]), Visible::All { left: Some(6) });
        // Sides are compared with what was said of the keys, whatever that is.
        let widest = |sides| Visible::new(Window::new(sides, usize::MAX), &[(3, 8)], NO_RANGES);
        assert_eq!(widest([Some(usize::MAX), Some(usize::MAX)]), all);
        assert_eq!(widest([Some(2), None]), Visible::All { left: Some(2) });
        // Queries that lie further before all keys than there are keys.
        assert_eq!(visible([Some(3), None], &[(9, 3)]), bits(None, Some(3)));
    }

    #[test]
    fn requests_leave_out_what_is_not_seen() {
        let request = |sequence, queries, keys| Request { sequence, queries, keys };
        let (all, causal) = (Visible::All { left: None }, Visible::Causal { left: None });
        assert_eq!(
            all.requests(&[(2, 5), (2, 5)], 3),
            [request(Some(0), 2, 5), request(None, 0, 3), request(Some(1), 2, 5)]
        );
        assert_eq!(
            causal.requests(&[(7, 5), (2, 0), (1, 1)], 0),
            [request(None, 2, 0), request(Some(0), 5, 5), request(Some(1), 2, 0), request(Some(2), 1, 1)]
        );
    }

    #[test]
    fn masks_are_packed_by_window_and_ranges() {
        let mask = |visible: Visible, sequences: &[Lens], gap| {
            let (indices, bits) = visible.pack(&visible.requests(sequences, gap)).unwrap().unwrap();
            let request = indices.batch_size() - 1;
            let (queries, keys) = indices.shapes()[request];
            let row =
                |query| (0..keys).map(|key| u8::from(indices.sees(&bits, request, query, key))).collect();
            (0..queries).map(row).collect::<Vec<Vec<u8>>>()
        };
        // Positions 2 and 3, one key to each side.
        let window = Window { left: Some(1), right: Some(1) };
        let visible = Visible::Bits { window, ranges: NO_RANGES };
        assert_eq!(mask(visible, &[(2, 4), (2, 4)], 3), [[0, 1, 1, 1], [0, 0, 1, 1]]);
        // Positions −1 to 1: the first sees nothing of itself or to the left.
        let window = Window { left: Some(1), right: Some(0) };
        let visible = Visible::Bits { window, ranges: vec![vec![[0, 2], [5, 5]]] };
        assert_eq!(mask(visible, &[(3, 2)], 0), [[0, 0], [1, 1], [1, 1]]);
    }
}
