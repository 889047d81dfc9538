//! Whether decode divides keys among blocks: where nothing is divided, nothing has to be merged,
//! which is a kernel less for each layer.

/// Blocks of FlashAttention 2 that its planner counts on for each multiprocessor.
const BLOCKS: usize = 2;
/// Keys that a block reads sooner than two could merge what they made of halves.
pub const UNDIVIDED: usize = 256;

/// What a GPU can divide keys into.
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    /// Parts of all requests that its blocks can have at once.
    most: usize,
}

impl Parts {
    /// For a GPU of so many multiprocessors, and a model of so many heads of keys.
    pub fn new(multiprocessors: usize, num_kv_heads: usize) -> Self {
        Self { most: BLOCKS * multiprocessors / num_kv_heads.max(1) }
    }

    /// Whether requests of these lengths are divided: if there are blocks left once each is in parts
    /// of half the longest.
    pub fn divides(self, lens: impl Iterator<Item = usize> + Clone) -> bool {
        let longest = lens.clone().max().unwrap_or(0);
        let half = longest.div_ceil(2).max(1);
        longest > UNDIVIDED && lens.map(|len| len.div_ceil(half).max(1)).sum::<usize>() <= self.most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_divided_where_blocks_would_be_idle() {
        // An H200, and the heads of SmolLM2 and of Llama 8B.
        let [small, large] = [3, 8].map(|heads| Parts::new(132, heads));
        let even = |parts: Parts, requests, len| parts.divides(std::iter::repeat_n(len, requests));
        assert!(!even(small, 1, 256) && even(small, 1, 257) && even(small, 44, 4096));
        assert!(!even(small, 45, 4096) && !even(large, 64, 1024) && even(large, 16, 1024));
        // One long request among many short ones.
        assert!(large.divides(std::iter::once(32768).chain(std::iter::repeat_n(300, 31))));
        assert!(!large.divides(std::iter::once(32768).chain(std::iter::repeat_n(300, 32))));
        assert!(!large.divides(std::iter::empty()) && !large.divides([0, 0].into_iter()));
    }
}
