//! Vector instructions for products of integers, chosen when the program runs.
//!
//! All give the same numbers, to the last bit: integers are exact, and what is done with `f32`
//! is a product or a sum of two numbers, rounded each time.

mod plain;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::packed::{ROWS, VECTOR};

/// What a set of instructions can do with a part of a panel's rows.
pub trait Instructions: Copy {
    /// The codes of four columns.
    type Codes: Copy;
    /// An integer of each row.
    type Sums: Copy;
    /// A number of each row.
    type Numbers: Copy;
    /// In how many parts a panel is taken.
    const PARTS: usize;

    /// Calls `task` where the instructions may be used.
    fn run(self, task: impl Task);
    fn codes(self, codes: &[u8; VECTOR], part: usize) -> Self::Codes;
    fn sums(self, start: i32) -> Self::Sums;
    /// Adds to each row's sum the products of its four codes, which are unsigned, with four of
    /// activations, which are signed: 16 bits of `x` each, the lowest first.
    fn add_products(self, sums: Self::Sums, codes: Self::Codes, x: i64) -> Self::Sums;
    fn numbers(self, sums: Self::Sums) -> Self::Numbers;
    fn load(self, numbers: &[f32; ROWS], part: usize) -> Self::Numbers;
    fn splat(self, number: f32) -> Self::Numbers;
    fn multiply(self, a: Self::Numbers, b: Self::Numbers) -> Self::Numbers;
    fn add(self, a: Self::Numbers, b: Self::Numbers) -> Self::Numbers;
    fn store(self, numbers: Self::Numbers, to: &mut [f32; ROWS], part: usize);
}

/// What uses instructions. Its parts are to be inlined, without closures that use them.
pub trait Task {
    /// Does it.
    fn run<I: Instructions>(self, instructions: I);
}

/// A set of instructions that this processor has.
#[derive(Clone, Copy, Debug)]
pub enum Available {
    #[cfg(target_arch = "x86_64")]
    Avx512(x86::Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(x86::Avx2),
    Plain(plain::Plain),
}

impl Available {
    /// Those that there are, the best one first.
    pub fn all() -> impl Iterator<Item = Self> {
        let plain = [Some(Self::Plain(plain::Plain))];
        #[cfg(target_arch = "x86_64")]
        let vectors = [x86::Avx512::detect().map(Self::Avx512), x86::Avx2::detect().map(Self::Avx2)];
        #[cfg(not(target_arch = "x86_64"))]
        let vectors = [];
        vectors.into_iter().chain(plain).flatten()
    }

    /// The best.
    pub fn best() -> Self {
        Self::all().next().unwrap_or(Self::Plain(plain::Plain))
    }

    /// Runs a task with them.
    pub fn run(self, task: impl Task) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(instructions) => instructions.run(task),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(instructions) => instructions.run(task),
            Self::Plain(instructions) => instructions.run(task),
        }
    }
}
