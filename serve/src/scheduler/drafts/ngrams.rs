//! Drafts without a second model: what came after the last tokens when they
//! came before.

use std::collections::HashMap;

/// The longest run of tokens that is looked for. The shortest is a pair.
const LONGEST: usize = 4;
/// The most places of a pair that are looked at, from the latest on.
const PLACES: usize = 64;

/// Where pairs of tokens are in an answer and its prompt.
#[derive(Clone, Debug, Default)]
pub struct Ngrams {
    /// The latest place behind each pair.
    latest: HashMap<[u32; 2], usize>,
    /// For each place but the last, the one before it behind the same pair; 0 if there is none.
    before: Vec<usize>,
}

impl Ngrams {
    /// At most `most` tokens that may come next: those that followed the longest
    /// run of tokens that is also the end of all, the latest if there are several.
    /// A continuation that reaches the end goes on with the draft itself, as a text
    /// does that repeats. The tokens are those of the last call, and what came since.
    pub fn draft(&mut self, tokens: &[u32], most: usize) -> Vec<u32> {
        self.extend(tokens);
        let Some(from) = self.find(tokens) else { return Vec::new() };
        let mut draft = Vec::new();
        for at in from..from + most {
            draft.push(tokens.get(at).copied().unwrap_or_else(|| draft[at - tokens.len()]));
        }
        draft
    }

    /// Takes in the places before the last, which nothing follows yet.
    fn extend(&mut self, tokens: &[u32]) {
        for place in self.before.len()..tokens.len() {
            let pair = place.checked_sub(2).map(|begin| [tokens[begin], tokens[begin + 1]]);
            self.before.push(pair.and_then(|pair| self.latest.insert(pair, place)).unwrap_or(0));
        }
    }

    /// The latest place behind the longest run that is also the end.
    fn find(&self, tokens: &[u32]) -> Option<usize> {
        let run = |place: &usize| {
            let pairs = tokens[..*place].iter().rev().zip(tokens.iter().rev());
            pairs.take(LONGEST).take_while(|(a, b)| a == b).count()
        };
        let latest = self.latest.get(tokens.last_chunk::<2>()?).copied();
        let earlier = |place: &usize| Some(self.before[*place]).filter(|place| *place > 0);
        let mut best: Option<(usize, usize)> = None;
        for place in std::iter::successors(latest, earlier).take(PLACES) {
            let len = run(&place);
            if best.is_none_or(|(longest, _)| len > longest) {
                best = Some((len, place));
            }
            if len == LONGEST {
                break;
            }
        }
        best.map(|(_, place)| place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(tokens: &[u32], most: usize) -> Vec<u32> {
        let draft = Ngrams::default().draft(tokens, most);
        // The same where tokens came one by one.
        let mut ngrams = Ngrams::default();
        (0..tokens.len()).for_each(|len| drop(ngrams.draft(&tokens[..len], most)));
        assert_eq!(ngrams.draft(tokens, most), draft);
        draft
    }

    #[test]
    fn drafts_are_what_followed_the_longest_run() {
        assert_eq!(draft(&[1, 2, 3, 9, 1, 2], 2), [3, 9]);
        // The latest of several, and of a longer run rather than a later one.
        assert_eq!(draft(&[1, 2, 3, 1, 2, 4, 1, 2], 1), [4]);
        assert_eq!(draft(&[7, 1, 2, 3, 1, 2, 4, 7, 1, 2], 1), [3]);
        // What repeats goes on.
        assert_eq!(draft(&[8, 1, 2, 1, 2], 5), [1, 2, 1, 2, 1]);
        assert_eq!(draft(&[6, 6, 6], 3), [6, 6, 6]);
        for none in [&[1, 2, 3, 2][..], &[5], &[]] {
            assert_eq!(draft(none, 4), [0u32; 0]);
        }
        assert_eq!(draft(&[6, 6, 6], 0), [0u32; 0]);
    }
}
