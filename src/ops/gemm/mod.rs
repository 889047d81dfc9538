//! Matrix products, in FlashInfer's modules `gemm` and `gemm_sm90`: products of
//! segments with a weight each ([`SegmentGemm`]), and batched products of 8-bit
//! floats ([`bmm_fp8`]).
//!
//! The module `gemm` links against NVIDIA's cuBLAS. It is looked for as the
//! CUDA runtime is: in the process, on the loader's path, in CUDA installations
//! and Python environments, in wheels at hand; and
//! [`preload`](crate::FlashInferRuntime::preload) of
//! [`ModuleName::GEMM`](crate::ModuleName::GEMM) downloads the pinned wheel
//! (about 500 MB) where it is nowhere. `gemm_sm90` does without.
//!
//! Source of the contract: `csrc/group_gemm.cu`, `csrc/group_gemm_sm90.cu`,
//! `csrc/bmm_fp8.cu`, `include/flashinfer/gemm/` and `gemm/gemm_base.py` of
//! FlashInfer 0.6.13.

mod backend;
mod bmm_fp8;
mod segment;
mod sizes;

pub use backend::GemmBackend;
pub use bmm_fp8::{Algorithm, BmmFp8Input, CublasLt, bmm_fp8, bmm_fp8_get_algos, bmm_fp8_run_with_algo};
pub use segment::{SegmentGemm, SegmentGemmInput};
pub(crate) use {bmm_fp8::Problem, sizes::Sizes};

use crate::{ffi::Signature, module::ModuleName};

impl ModuleName {
    /// Segment GEMM for compute capability 8.0 and newer, and GEMM of 8-bit floats.
    pub const GEMM: Self = Self::fixed("gemm");
    /// Segment GEMM for compute capability 9.0.
    pub const GEMM_SM90: Self = Self::fixed("gemm_sm90");
}

pub(super) fn signatures() -> Vec<(&'static str, &'static [Signature])> {
    [segment::SIGNATURES, bmm_fp8::SIGNATURES].concat()
}
