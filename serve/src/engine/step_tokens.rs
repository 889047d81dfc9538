//! How many tokens steps compute.

/// How often steps computed how many tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTokens {
    steps: [u64; Self::BOUNDS.len() + 1],
    sum: u64,
}

impl StepTokens {
    /// Numbers of tokens between which steps are counted, as vLLM has them.
    pub const BOUNDS: [usize; 13] = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384];

    /// Counts a step of so many tokens.
    pub(super) fn observe(&mut self, tokens: usize) {
        self.steps[Self::BOUNDS.partition_point(|bound| *bound < tokens)] += 1;
        self.sum += tokens as u64;
    }

    /// The steps of at most as many tokens as each of [`BOUNDS`](Self::BOUNDS), and of more than
    /// the one before; and last those of more than all.
    pub fn steps(&self) -> &[u64] {
        &self.steps
    }

    /// The tokens of all steps.
    pub fn sum(&self) -> u64 {
        self.sum
    }
}

#[test]
fn steps_are_counted_between_bounds() {
    let mut tokens = StepTokens::default();
    [1, 1, 2, 8, 9, 16384, 16385].into_iter().for_each(|count| tokens.observe(count));
    assert_eq!(tokens.steps(), [2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]);
    assert_eq!(tokens.sum(), 32790);
}
