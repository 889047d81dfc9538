//! Norms on the GPU against the CPU reference.
#![cfg(feature = "cudarc")]

mod common;

mod norm_gpu {
    mod fused_dit_layernorm;
    mod gemma_rmsnorm;
    mod layernorm;
    mod quant;
    mod rmsnorm;
}
