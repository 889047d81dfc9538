//! Byte-pair encoding: neighbours are joined, the best pair first.

use std::{cmp::Reverse, collections::BinaryHeap, ops::Range};

/// A part of a text, and the token that it is, if it is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    pub bytes: Range<usize>,
    pub id: Option<u32>,
}

/// What two neighbours become.
#[derive(Clone, Copy, Debug)]
pub struct Join {
    /// The lowest is joined first; of equal ones the leftmost.
    pub rank: u32,
    pub id: u32,
}

/// Nothing comes before, or behind.
const NONE: usize = usize::MAX;

/// Symbols as a list that can lose members.
struct List {
    symbols: Vec<Symbol>,
    before: Vec<usize>,
    behind: Vec<usize>,
}

impl List {
    fn new(symbols: Vec<Symbol>) -> Self {
        let count = symbols.len();
        let before = (0..count).map(|at| at.checked_sub(1).unwrap_or(NONE)).collect();
        let behind = (1..=count).map(|at| if at < count { at } else { NONE }).collect();
        Self { symbols, before, behind }
    }

    /// Whether a pair is still as it was when it was found.
    fn has(&self, pair: &Pair) -> bool {
        self.behind[pair.left] == pair.right && self.symbols[pair.right].bytes.end == pair.end
    }

    /// Makes a pair one symbol, in the left one's place.
    fn join(&mut self, pair: &Pair) {
        let next = self.behind[pair.right];
        self.symbols[pair.left] =
            Symbol { bytes: self.symbols[pair.left].bytes.start..pair.end, id: Some(pair.id) };
        self.symbols[pair.right].bytes = pair.end..pair.end;
        self.behind[pair.left] = next;
        self.behind[pair.right] = NONE;
        if next != NONE {
            self.before[next] = pair.left;
        }
    }
}

/// A pair that may be joined. The order of fields is that in which pairs are joined.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Pair {
    rank: u32,
    left: usize,
    right: usize,
    end: usize,
    id: u32,
}

/// Joins neighbours as long as `join` has something for a pair. Takes n log n steps.
pub fn merge(symbols: Vec<Symbol>, join: impl Fn(&Symbol, &Symbol) -> Option<Join>) -> Vec<Symbol> {
    let mut list = List::new(symbols);
    let find = |list: &List, left: usize, right: usize| {
        let (a, b) = (list.symbols.get(left)?, list.symbols.get(right)?);
        join(a, b).map(|Join { rank, id }| Reverse(Pair { rank, left, right, end: b.bytes.end, id }))
    };
    let neighbours = 1..list.symbols.len();
    let mut queue: BinaryHeap<_> = neighbours.filter_map(|right| find(&list, right - 1, right)).collect();
    while let Some(Reverse(pair)) = queue.pop() {
        if list.has(&pair) {
            list.join(&pair);
            queue.extend(find(&list, list.before[pair.left], pair.left));
            queue.extend(find(&list, pair.left, list.behind[pair.left]));
        }
    }
    list.symbols.retain(|symbol| !symbol.bytes.is_empty());
    list.symbols
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::{prop_assert_eq, proptest};

    use super::*;

    fn symbols(text: &str) -> Vec<Symbol> {
        let symbol = |(at, c): (usize, char)| Symbol { bytes: at..at + c.len_utf8(), id: Some(c as u32) };
        text.char_indices().map(symbol).collect()
    }

    /// The rank of a whole of `a` and `b` is its length taken from the right, by a table.
    fn rank(whole: &str) -> Option<u32> {
        let ranks =
            [("ab", 3), ("ba", 3), ("aa", 1), ("aab", 0), ("abab", 2), ("aaaa", 1), ("bb", 5), ("aabb", 5)];
        ranks.iter().find(|(known, _)| *known == whole).map(|(_, rank)| *rank)
    }

    /// The rule, step by step: the best pair of all, the leftmost of equals.
    fn slow(text: &str) -> Vec<String> {
        let mut parts: Vec<String> = text.chars().map(String::from).collect();
        loop {
            let pairs = parts.windows(2).enumerate();
            let ranked = pairs.filter_map(|(at, pair)| Some((rank(&pair.concat())?, at)));
            let Some((_, at)) = ranked.min() else { return parts };
            let right = parts.remove(at + 1);
            parts[at] += &right;
        }
    }

    fn fast(text: &str) -> Vec<String> {
        let join = |left: &Symbol, right: &Symbol| {
            rank(&text[left.bytes.start..right.bytes.end]).map(|rank| Join { rank, id: 0 })
        };
        merge(symbols(text), join).iter().map(|symbol| text[symbol.bytes.clone()].into()).collect()
    }

    proptest! {
        #[test]
        fn pairs_are_joined_by_the_rule(text in "[ab]{0,30}|[abc]{0,30}") {
            prop_assert_eq!(fast(&text), slow(&text));
        }
    }

    #[test]
    fn a_million_symbols_take_no_square_of_steps() {
        let start = Instant::now();
        let text = "a".repeat(1_000_000);
        assert_eq!(fast(&text), vec!["aaaa"; 250_000]);
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    }
}
