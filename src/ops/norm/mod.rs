//! RMS and layer norms, in FlashInfer's module `norm`.
//!
//! | function | computes | tensors |
//! |---|---|---|
//! | [`rmsnorm`], [`gemma_rmsnorm`] | the RMS norm of each row, times `weight` or `weight + 1` | `f16` or `bf16` |
//! | [`fused_add_rmsnorm`], [`gemma_fused_add_rmsnorm`] | the same of `input + residual`, in place | `f16` or `bf16` |
//! | [`rmsnorm_quant`], [`fused_add_rmsnorm_quant`] | the same divided by a scale, as 8-bit floats | `f16` or `bf16` to `e4m3` or `e5m2` |
//! | [`layernorm`] | the layer norm of each row, with `gamma` and `beta` | `bf16`; `gamma` and `beta` are `f32` |
//! | [`fused_qk_rmsnorm_rope`] | RMS norm and 3D rotary embedding of queries and keys, and a copy of values, from one joined tensor | `bf16` to `bf16` or `e4m3` |
//! | [`fused_dit_layernorm`] | gate, residual, layer norm, scale and shift of a diffusion transformer | `bf16`; biases, `gamma` and `beta` are `f32` |
//!
//! Sums are computed in `f32`. Source of the contract: `csrc/norm.cu`,
//! `include/flashinfer/norm.cuh` and `include/flashinfer/norm/` of FlashInfer
//! 0.6.13.

use std::sync::{Mutex, PoisonError};

use super::{FixedFunction, check::Check};
use crate::{
    cuda::DeviceAttribute,
    dtype::DType,
    error::Result,
    ffi::{Kernel, Signature},
    module::ModuleName,
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::RawTensor,
};

mod fused_dit_layernorm;
mod fused_qk_rmsnorm_rope;
mod layernorm;
mod qkv;
mod rmsnorm;

pub(crate) use fused_dit_layernorm::check_fused_dit_layernorm;
pub use fused_dit_layernorm::{Biased, DitInput, DitMode, DitOutput, fused_dit_layernorm};
pub use fused_qk_rmsnorm_rope::{RopeTable, fused_qk_rmsnorm_rope};
pub(crate) use layernorm::check_layernorm;
pub use layernorm::layernorm;
pub use qkv::{FusedQkOptions, QkvInput, QkvOutput, Rope3d};
pub(crate) use qkv::{check_fused_qk_rmsnorm_rope, qkv_shape};
pub(crate) use rmsnorm::{
    check_fused_add_rmsnorm, check_fused_add_rmsnorm_quant, check_rmsnorm, check_rmsnorm_quant,
};
pub use rmsnorm::{
    fused_add_rmsnorm, fused_add_rmsnorm_quant, gemma_fused_add_rmsnorm, gemma_rmsnorm, rmsnorm,
    rmsnorm_quant,
};

impl ModuleName {
    /// RMS and layer norms.
    pub const NORM: Self = Self::fixed("norm");
}

pub(super) fn signatures() -> Vec<(&'static str, &'static [Signature])> {
    let others = [layernorm::SIGNATURES, fused_qk_rmsnorm_rope::SIGNATURES, fused_dit_layernorm::SIGNATURES];
    rmsnorm::SIGNATURES.iter().chain(&others).map(|&declared| ("norm", declared)).collect()
}

/// Options of the norms.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct NormOptions {
    /// Added to the mean of squares, or to the variance. Upstream's default is 1e-6.
    pub eps: f64,
    /// Programmatic dependent launch. `None` uses it where the GPU has it
    /// (compute capability 9.0 and newer), but not for the quantizing norms;
    /// see [`rmsnorm_quant`]. Layer norms never use it.
    pub enable_pdl: Option<bool>,
}

impl Default for NormOptions {
    fn default() -> Self {
        Self { eps: 1e-6, enable_pdl: None }
    }
}

impl NormOptions {
    /// The default options with another `eps`.
    pub fn with_eps(eps: f64) -> Self {
        Self { eps, ..Self::default() }
    }
}

/// What every GPU gives a block without being asked.
const SHARED_MEMORY: i64 = 48 * 1024;

/// A block may have `needed` bytes of shared memory for a row of `d` elements.
fn check_shared_memory(check: &Check<'_>, d: i64, needed: i64) -> Result<()> {
    let Some(stream) = check.stream().filter(|_| needed > SHARED_MEMORY) else { return Ok(()) };
    let cuda = FlashInferRuntime::get()?.cuda();
    let available = cuda.attribute(stream.ordinal(), DeviceAttribute::MaxSharedMemoryPerBlockOptin)?;
    if needed > i64::from(available) {
        return check.fail(
            "input",
            format!("rows of {d} elements need {needed} bytes of shared memory; the GPU has {available}"),
        );
    }
    Ok(())
}

/// [`Check::plain`] for launchers that look at the stride of a single element,
/// too.
fn check_plain(
    check: &Check<'_>,
    name: &'static str,
    tensor: &RawTensor,
    dtype: DType,
    shape: &[i64],
    alignment: usize,
) -> Result<()> {
    check.plain(name, tensor, &[dtype], shape, alignment)?;
    check.last_dim_contiguous(name, tensor)
}

/// Held during each launch. The module sets a kernel's limit of shared memory,
/// which is the process's, to what this launch needs, and then launches: two
/// threads with rows of different lengths would fail each other's launches.
/// It also looks up frequency tables in a map that is not made for threads.
static LAUNCH: Mutex<()> = Mutex::new(());

/// Calls a function of the module, which says itself whether it was launched.
///
/// # Safety
/// The kernel must be the function's, and its tensors all that it assumes.
unsafe fn launch(function: &FixedFunction, stream: &Stream, kernel: &impl Kernel) -> Result<()> {
    let runtime = FlashInferRuntime::get()?;
    let function = function.get(runtime)?;
    let _launch = LAUNCH.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: promised by the caller.
    let launched = unsafe { kernel.call(function, stream) };
    if launched.is_err() {
        // What it has said is not left to a later call.
        runtime.cuda().last_error();
    }
    launched.map(drop)
}

/// Calls a function of the module that does not: layer norms do not look
/// whether they were launched, and `fused_qk_rmsnorm_rope` ends the process over
/// any error it finds.
///
/// # Safety
/// As [`launch`].
unsafe fn launch_watched(function: &FixedFunction, stream: &Stream, kernel: &impl Kernel) -> Result<()> {
    // SAFETY: promised by the caller.
    FlashInferRuntime::get()?.cuda().watch_launch(|| unsafe { launch(function, stream, kernel) })
}
