//! What `flashinfer-serve` computes on a CPU. A package of its own, so that tests have it with
//! optimization.
//!
//! | | |
//! |---|---|
//! | [`matrix`] | a matrix in the bytes of a file, and its numbers |
//! | [`weights`] | a matrix to multiply with |
//! | [`product`] | rows times the transpose of matrices |
//! | [`attention`] | a query's attention to keys and values |
//! | [`gate`] | what an MLP does between its products |
//! | `format` | the types of blocks that files have |
//! | `packed` | blocks, repacked in panels of 16 rows |
//! | `activations` | rows of activations in 16 bits |
//! | `instructions` | vector instructions for integers |
//!
//! Activations are rounded to 16 bits, in blocks of 32 with a scale each, to be multiplied by the
//! codes of weights as integers. llama.cpp, and candle's `QMatMul`, round them to 8 bits, which changes
//! answers: the first greedy token of SmolLM2 for a chat is another one than that of its weights in
//! `f32`. Sixteen bits are finer than an `f16`, and unpacking codes takes as long as products.
//! Weights of plain numbers are multiplied in `f32`.
//!
//! Instructions are chosen when the program runs: for integers by `instructions`, which has
//! AVX-512 with VNNI and AVX2, all with the same results; for `f32` by [`pulp`]. What is to use
//! them is inlined into the function that has them: loops, not iterators that take closures, which
//! the compiler makes functions of their own, without these instructions.

mod activations;
pub mod attention;
mod exp;
mod format;
pub mod gate;
mod half;
mod instructions;
pub mod matrix;
mod packed;
pub mod product;
pub mod weights;

pub use self::{attention::Attention, gate::Gate, matrix::Matrix, product::multiply, weights::Weights};
