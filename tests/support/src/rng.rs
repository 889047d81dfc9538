//! Random numbers from a seed that a test prints.

use std::{
    io::Write,
    time::{SystemTime, UNIX_EPOCH},
};

/// Prints to stderr past the test runner's capture, so that a skipped test
/// says so.
pub fn say(message: &str) {
    let name = std::thread::current().name().unwrap_or("test").to_owned();
    let _ = writeln!(std::io::stderr(), "{message} ({name})");
}

/// Random numbers (splitmix64) from a seed that is printed.
pub struct Rng(u64);

impl Rng {
    /// Seeded from `FLASHINFER_RS_TEST_SEED`, else from the clock.
    #[expect(clippy::new_without_default, reason = "it prints")]
    pub fn new() -> Self {
        let seed = match std::env::var("FLASHINFER_RS_TEST_SEED") {
            Ok(seed) => seed.parse().expect("FLASHINFER_RS_TEST_SEED is a number"),
            Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_nanos() as u64,
        };
        say(&format!("FLASHINFER_RS_TEST_SEED={seed}"));
        Self(seed)
    }

    /// The numbers of a seed.
    pub fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number in `0..bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.bits() % bound as u64) as usize
    }

    /// Uniform in ±√3, so that mean and variance are 0 and 1.
    pub fn unit(&mut self) -> f64 {
        let fraction = (self.bits() >> 11) as f64 / (1u64 << 53) as f64;
        (fraction - 0.5) * 12f64.sqrt()
    }

    /// `0..len` in random order.
    pub fn permutation(&mut self, len: usize) -> Vec<i32> {
        let mut order: Vec<i32> = (0..len as i32).collect();
        for at in (1..len).rev() {
            order.swap(at, self.below(at + 1));
        }
        order
    }
}
