//! Whether decode divides keys among blocks: where nothing is divided, nothing has to be merged,
//! which is a kernel less for each layer.

/// Blocks of FlashAttention 2 that its planner counts on for each multiprocessor.
const BLOCKS: usize = 2;
/// Numbers of a head's keys that a block reads sooner than several could merge what they made of parts.
const UNDIVIDED: usize = 64 << 10;
/// Keys beyond which a request is divided beside short ones, whatever its heads, on a GPU that has more than twice as many
/// multiprocessors as the model has heads of keys.
pub const MOST_UNDIVIDED: usize = 2 * UNDIVIDED / 64;

/// What a GPU can divide keys into.
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    multiprocessors: usize,
    num_kv_heads: usize,
    /// Keys that are not worth dividing.
    undivided: usize,
}

impl Parts {
    /// For a GPU of so many multiprocessors, and a model of so many heads of keys, which are as wide as this.
    pub fn new(multiprocessors: usize, num_kv_heads: usize, head_dim: usize) -> Self {
        Self { multiprocessors, num_kv_heads: num_kv_heads.max(1), undivided: UNDIVIDED / head_dim.max(64) }
    }

    /// Whether requests of these lengths are divided: if a block reads the longest, less what is not worth
    /// dividing, for longer than one block on each multiprocessor would read all keys, which takes about as long as
    /// memory takes; and if there are blocks left once each request is in parts of half the longest.
    pub fn divides(self, lens: impl Iterator<Item = usize> + Clone) -> bool {
        let Self { multiprocessors, num_kv_heads, undivided } = self;
        let (longest, all) = (lens.clone().max().unwrap_or(0), lens.clone().sum::<usize>());
        let half = longest.div_ceil(2).max(1);
        longest.saturating_sub(undivided) * multiprocessors > all * num_kv_heads
            && lens.map(|len| len.div_ceil(half).max(1)).sum::<usize>() * num_kv_heads
                <= BLOCKS * multiprocessors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_divided_where_blocks_would_be_idle() {
        // An H200, and the heads of SmolLM2 and of Llama 8B.
        let [small, large] = [(3, 64), (8, 128)].map(|(heads, width)| Parts::new(132, heads, width));
        let even = |parts: Parts, requests, len| parts.divides(std::iter::repeat_n(len, requests));
        assert!(!even(small, 1, 1024) && even(small, 1, MOST_UNDIVIDED) && even(small, 22, 4096));
        assert!(!even(small, 44, 4096) && !even(large, 1, 512) && even(large, 1, 640));
        assert!(even(large, 8, 1024) && !even(large, 8, 896) && !even(large, 16, 4096));
        // One long request among many short ones.
        assert!(large.divides(std::iter::once(32768).chain(std::iter::repeat_n(300, 31))));
        assert!(!large.divides(std::iter::once(32768).chain(std::iter::repeat_n(300, 32))));
        assert!(!large.divides(std::iter::empty()) && !large.divides([0, 0].into_iter()));
    }
}
