//! FlashInfer's operations, one file or folder for each module family.

pub mod activation;
pub mod attention;
pub mod cascade;
mod check;
mod function;
pub mod gdn;
pub mod gemm;
pub mod norm;
pub mod page;
pub mod quantization;
pub mod rope;
pub mod sampling;
mod signatures;
pub mod topk;

use function::{FixedFunction, enable_pdl};
pub use signatures::signatures;
