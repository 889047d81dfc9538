//! Drafts without a second model: what came after the last tokens when they
//! came before.

/// The shortest run of tokens that is looked for, and the longest.
const RUN: std::ops::RangeInclusive<usize> = 2..=4;

/// At most `most` tokens that may come next: those that followed the longest
/// run of tokens that is also the end of all, the latest if there are several.
/// A continuation that reaches the end goes on with the draft itself, as a text
/// does that repeats.
pub fn draft(tokens: &[u32], most: usize) -> Vec<u32> {
    if most == 0 {
        return Vec::new();
    }
    let run = |end: &usize| {
        let before = tokens[..*end].iter().rev().zip(tokens.iter().rev());
        before.take(*RUN.end()).take_while(|(a, b)| a == b).count()
    };
    let (mut longest, mut from) = (RUN.start() - 1, tokens.len());
    for end in (1..tokens.len()).rev() {
        let len = run(&end);
        if len > longest {
            (longest, from) = (len, end);
        }
        if longest == *RUN.end() {
            break;
        }
    }
    let mut draft = Vec::new();
    while from < tokens.len() && draft.len() < most {
        let at = from + draft.len();
        draft.push(tokens.get(at).copied().unwrap_or_else(|| draft[at - tokens.len()]));
    }
    draft
}

#[cfg(test)]
mod tests {
    use super::*;

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
