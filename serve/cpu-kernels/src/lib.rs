//! What flashinfer-serve computes on a CPU: products with matrices that stay in the types of
//! GGUF files, and attention.
//!
//! | module | its job |
//! |---|---|
//! | [`matrix`] | a matrix in the bytes of a file, and its numbers |
//! | [`product`] | rows times the transpose of matrices |
//! | [`attention`] | a query's attention to keys and values |
//! | `blocks`, `k_blocks` | the numbers of a block of each type |
//!
//! Weights become `f32` in the processor's cache, a few rows at a time, and are multiplied by
//! activations in `f32`. llama.cpp, and candle's `QMatMul`, round activations to 8 bits instead,
//! for products of integers. That is about twice as fast where the instructions are there, but
//! changes answers: greedy tokens of SmolLM2 are others than those of its weights in `f32`. And
//! candle has no vector instructions for `Q4_1`, `Q5_0` and `Q5_1`.
//!
//! Instructions (AVX2 with FMA, NEON) are chosen when the program runs, by [`pulp`]. What is to
//! use them is inlined into its `vectorize`: loops, not iterators that take closures, which the
//! compiler makes functions of their own, without these instructions.

pub mod attention;
mod blocks;
mod k_blocks;
pub mod matrix;
pub mod product;

pub use self::{attention::Attention, matrix::Matrix, product::multiply};
