//! How many tokens of an answer's drafts are right, and so how long the next one is.

/// What is thought of the first draft, so that it has four tokens.
const FIRST: f64 = 0.75;
/// How much the last token that was drafted counts beside all before it.
const WEIGHT: f64 = 0.125;
/// How likely a token of a draft has to be right, with all before it.
const WORTHWHILE: f64 = 0.3;
/// Where an estimate drifts to while nothing tells how good drafts are, and how much of the way
/// each token goes: a token is drafted again after some hundred of them.
const DRIFT: (f64, f64) = (0.35, 1.0 / 128.0);

/// An estimate of how likely a drafted token is right if those before it are.
#[derive(Clone, Copy, Debug)]
pub struct Acceptance(f64);

impl Default for Acceptance {
    fn default() -> Self {
        Self(FIRST)
    }
}

impl Acceptance {
    /// Of so many drafted tokens, the first `right` were.
    pub fn observe(&mut self, drafted: usize, right: usize) {
        for _ in 0..right {
            self.0 += (1.0 - self.0) * WEIGHT;
        }
        if right < drafted {
            self.0 -= self.0 * WEIGHT;
        }
    }

    /// Nothing was drafted for a token, so that nobody knows.
    pub fn drift(&mut self) {
        let (to, share) = DRIFT;
        self.0 += (to - self.0).max(0.0) * share;
    }

    /// How many tokens are worth a draft, up to `most`.
    pub fn len(self, most: usize) -> usize {
        let all_right = std::iter::successors(Some(self.0), |all| Some(all * self.0));
        all_right.take(most).take_while(|all| *all >= WORTHWHILE).count()
    }

    /// How many tokens of a draft are right, in the mean.
    pub fn expected(self, len: usize) -> f64 {
        std::iter::successors(Some(self.0), |all| Some(all * self.0)).take(len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafts_grow_while_they_are_right_and_end_while_they_are_wrong() {
        let mut acceptance = Acceptance::default();
        assert_eq!((acceptance.len(8), acceptance.len(2), acceptance.len(0)), (4, 2, 0));
        acceptance.observe(4, 4);
        acceptance.observe(4, 4);
        assert_eq!(acceptance.len(8), 8);
        assert!(acceptance.expected(8) > 5.0 && acceptance.expected(8) < 8.0);
        let mut wrong = 0;
        while acceptance.len(8) > 0 {
            acceptance.observe(acceptance.len(8), 0);
            wrong += 1;
        }
        assert!((3..16).contains(&wrong), "{wrong}");
        // After a while one token is tried, and what is right has drafts come back.
        let mut tokens = 0;
        while acceptance.len(8) == 0 {
            acceptance.drift();
            tokens += 1;
        }
        assert!((30..300).contains(&tokens), "{tokens}");
        assert_eq!(acceptance.len(8), 1);
        (0..4).for_each(|_| acceptance.observe(1, 1));
        assert!(acceptance.len(8) > 1);
    }
}
