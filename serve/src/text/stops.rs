//! Stop strings in text that comes in pieces.

/// Text on its way out, of which nothing is let through that is, or may become, a stop
/// string.
#[derive(Clone, Debug)]
pub struct Stops {
    strings: Vec<String>,
    /// What may be the beginning of a stop string.
    held: String,
}

impl Stops {
    /// Nothing held back.
    pub fn new(strings: Vec<String>) -> Self {
        Self { strings, held: String::new() }
    }

    /// Takes a piece, and gives the text that can go out; and the stop string that ended
    /// it, if one did: of several the one that begins first, of these the longest.
    pub fn push(&mut self, piece: &str) -> (String, Option<String>) {
        self.held.push_str(piece);
        let found = self.strings.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop)));
        let first = found.min_by_key(|(at, stop)| (*at, usize::MAX - stop.len()));
        if let Some((at, stop)) = first {
            let stop = stop.clone();
            self.held.truncate(at);
            return (self.finish(), Some(stop));
        }
        let begins = |at: &usize| self.strings.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let mut starts = self.held.char_indices().map(|(at, _)| at);
        let keep = starts.find(begins).unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// What is held back, when nothing more comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes that are held back.
    pub fn held(&self) -> usize {
        self.held.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The text that goes out for pieces, and the stop string.
    fn run(strings: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut stops = Stops::new(strings.iter().copied().map(String::from).collect());
        let mut out = String::new();
        for piece in pieces {
            let (text, stop) = stops.push(piece);
            out += &text;
            if stop.is_some() {
                assert_eq!(stops.held(), 0);
                return (out, stop);
            }
        }
        (out + &stops.finish(), None)
    }

    #[test]
    fn stop_strings_are_found_across_pieces() {
        let end = |text: &str, stop: &str| (text.to_owned(), Some(stop.to_owned()));
        assert_eq!(run(&["STOP"], &["a S", "TO", "Pb"]), end("a ", "STOP"));
        assert_eq!(run(&["STOP"], &["a S", "TO", "b"]), ("a STOb".into(), None));
        assert_eq!(run(&["aab"], &["aa", "ab"]), end("a", "aab"));
        // The first in the text, and then the longest.
        assert_eq!(run(&["cd", "bc"], &["abcd"]), end("a", "bc"));
        assert_eq!(run(&["b", "bc"], &["abcd"]), end("a", "bc"));
        assert_eq!(run(&["éß"], &["é", "é", "ß!"]), end("é", "éß"));
        assert_eq!(run(&[], &["a", "b"]), ("ab".into(), None));
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(text in "[ab]{0,12}", cuts in prop::collection::vec(0..12usize, 0..6)) {
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(text.len())).chain([0, text.len()]).collect();
            cuts.sort_unstable();
            let pieces: Vec<_> = cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]).collect();
            // None begins with another, which would be found a piece earlier.
            let strings = ["aab", "bba"];
            let first = strings.iter().filter_map(|stop| Some((text.find(stop)?, *stop))).min();
            let expected = match first {
                Some((at, stop)) => (text[..at].to_owned(), Some(stop.to_owned())),
                None => (text.clone(), None),
            };
            // Of two that overlap the one that is whole first counts, as text cannot wait.
            let whole = strings.iter().filter_map(|stop| Some((text.find(stop)? + stop.len(), *stop))).min();
            prop_assume!(whole.map(|it| it.1) == first.map(|it| it.1));
            prop_assert_eq!(run(&strings, &pieces), expected);
        }
    }
}
