//! What tests and benchmarks share: random numbers from a printed seed, what a machine must have,
//! libraries of C, counted allocations, whether draws follow a distribution, seeds of fuzzing, a server that speaks TLS,
//! processes that run one test, and GPUs with little memory.

pub mod alone;
pub mod ballast;
pub mod c_library;
pub mod chi_square;
pub mod counting;
pub mod replay;
pub mod required;
mod rng;
mod time;
pub mod tls;

pub use rng::{Rng, say};
pub use time::seconds;
