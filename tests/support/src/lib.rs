//! What tests and benchmarks share: random numbers from a printed seed, what a machine must have,
//! libraries of C, counted allocations, and whether draws follow a distribution.

pub mod c_library;
pub mod chi_square;
pub mod counting;
pub mod required;
mod rng;

pub use rng::{Rng, say};
