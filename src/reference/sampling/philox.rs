//! The random numbers of the kernels.

use crate::sampling::Philox;

/// The random numbers of one row: Philox 4×32 with 10 rounds, as cuRAND counts
/// them.
pub(super) struct PhiloxSequence {
    seed: u64,
    row: u64,
    /// The number that comes next.
    next: u64,
}

impl PhiloxSequence {
    pub(super) fn new(random: Philox, row: u64) -> Self {
        Self { seed: random.seed, row, next: random.offset }
    }

    /// A number in `(0, 1]`.
    pub(super) fn uniform(&mut self) -> f64 {
        let block = philox(self.seed, [self.next / 4, self.row]);
        let bits = block[(self.next % 4) as usize];
        self.next = self.next.wrapping_add(1);
        let step = 2f32.powi(-32);
        f64::from(bits as f32 * step + step / 2.0)
    }
}

/// Four random numbers for a key and a counter.
pub(super) fn philox(key: u64, counter: [u64; 2]) -> [u32; 4] {
    const FACTORS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
    const STEPS: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
    let halves = |wide: u64| [wide as u32, (wide >> 32) as u32];
    let product = |a: u32, b: u32| halves(u64::from(a) * u64::from(b));
    let [[mut a, mut b], [mut c, mut d]] = counter.map(halves);
    let mut key = halves(key);
    for _ in 0..10 {
        let ([low_a, high_a], [low_c, high_c]) = (product(FACTORS[0], a), product(FACTORS[1], c));
        (a, b, c, d) = (high_c ^ b ^ key[0], low_c, high_a ^ d ^ key[1], low_a);
        key = [key[0].wrapping_add(STEPS[0]), key[1].wrapping_add(STEPS[1])];
    }
    [a, b, c, d]
}
