//! What selects a module of multi-head latent attention.

use super::spec::Backend;
use crate::{
    artifacts::FlashInferVersion,
    dtype::DType,
    error::{FlashInferError, Result},
    kv::layout::MLA_DIMS,
    module::ModuleName,
};

/// The properties of a latent attention.
///
/// ```
/// # use flashinfer_rs::{DType, artifacts::FlashInferVersion, attention::{Backend, MlaSpec}};
/// let module = MlaSpec::new(DType::BF16, 0.07).module(FlashInferVersion::new(0, 6, 13), Backend::Fa3)?;
/// assert!(module.as_str().starts_with("batch_mla_attention_") && module.as_str().ends_with("_sm90"));
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct MlaSpec {
    /// Element type of queries, cache and output: `f16` or `bf16`.
    pub dtype: DType,
    /// Width of the compressed part, and of the output: 512.
    pub head_dim_ckv: usize,
    /// Width of the position part: 64.
    pub head_dim_kpe: usize,
    /// The factor on query-key products, at least 0.001.
    ///
    /// It is that of the model before absorption: with 128 and 64 dimensions
    /// without and with position, `1/√192`, times what the model's scaling of
    /// positions asks for. The dimensions here do not tell, so there is no
    /// default.
    pub sm_scale: f64,
    /// Which kernels serve it: FlashAttention 2 or 3.
    pub backend: Backend,
}

/// From this version on, names say how plans are returned.
const PLAN_NAMED: FlashInferVersion = FlashInferVersion::new(0, 7, 0);

impl MlaSpec {
    /// DeepSeek's dimensions, 512 and 64.
    pub const fn new(dtype: DType, sm_scale: f64) -> Self {
        let [ckv, kpe] = MLA_DIMS;
        Self {
            dtype,
            head_dim_ckv: ckv as usize,
            head_dim_kpe: kpe as usize,
            sm_scale,
            backend: Backend::Auto,
        }
    }

    /// Other kernels than [`Backend::Auto`] picks.
    #[must_use]
    pub const fn with_backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// The module of this spec with the kernels of `backend`, as a version of
    /// FlashInfer names it: the wheel that holds it tells which is meant.
    /// [`Backend::Auto`] is decided by the GPU, so it has no module.
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: there is no such module.
    pub fn module(&self, version: FlashInferVersion, backend: Backend) -> Result<ModuleName> {
        let unsupported = |what: String, available: &str| {
            Err(FlashInferError::Unsupported { what, available: available.into() })
        };
        if !matches!(self.dtype, DType::F16 | DType::BF16) {
            return unsupported(
                format!("latent attention of dtype {}", self.dtype),
                "there are f16 and bf16",
            );
        }
        if [self.head_dim_ckv, self.head_dim_kpe] != MLA_DIMS.map(|dim| dim as usize) {
            return unsupported(
                format!(
                    "latent attention of head dimensions {} and {}",
                    self.head_dim_ckv, self.head_dim_kpe
                ),
                "there is 512 and 64",
            );
        }
        let suffix = match backend {
            Backend::Fa2 => "",
            Backend::Fa3 => "_sm90",
            Backend::Auto | Backend::CudaCores => {
                return unsupported(
                    format!("a module of latent attention for Backend::{backend:?}"),
                    "there are Backend::Fa2 and Backend::Fa3",
                );
            }
        };
        Ok(ModuleName::new(format!(
            "batch_mla_attention_dtype_q_{0}_dtype_kv_{0}_dtype_o_{0}_dtype_idx_i32_head_dim_ckv_{1}_head_dim_kpe_{2}_\
             profiler_False{3}{suffix}",
            self.dtype,
            self.head_dim_ckv,
            self.head_dim_kpe,
            if version >= PLAN_NAMED { "_planabi2" } else { "" },
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_upstreams() {
        let spec = MlaSpec::new(DType::F16, 1.0);
        let name = "batch_mla_attention_dtype_q_f16_dtype_kv_f16_dtype_o_f16_dtype_idx_i32_head_dim_ckv_512_\
                    head_dim_kpe_64_profiler_False";
        let old = FlashInferVersion::new(0, 6, 13);
        for (version, plan) in [(old, ""), (FlashInferVersion::new(0, 7, 4), "_planabi2")] {
            let module = |backend| spec.module(version, backend).unwrap().to_string();
            assert_eq!(module(Backend::Fa2), format!("{name}{plan}"));
            assert_eq!(module(Backend::Fa3), format!("{name}{plan}_sm90"));
        }
        assert!(spec.module(old, Backend::Auto).is_err());
        for dtype in [DType::F32, DType::E4M3, DType::E5M2, DType::I8] {
            assert!(MlaSpec::new(dtype, 1.0).module(old, Backend::Fa2).is_err());
        }
        assert!(MlaSpec { head_dim_ckv: 256, ..spec }.module(old, Backend::Fa2).is_err());
        assert!(MlaSpec { head_dim_kpe: 0, ..spec }.module(old, Backend::Fa2).is_err());
    }
}
