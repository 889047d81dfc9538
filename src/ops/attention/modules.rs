//! The modules of an attention: their names, and which there can be.

use std::fmt;

use super::spec::{AttentionSpec, Backend, PosEncodingMode};
use crate::{
    artifacts::FlashInferVersion,
    dtype::DType,
    error::{FlashInferError, Result},
    module::ModuleName,
    ops::gone::Gone,
};

/// A family of attention modules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// Decode on CUDA cores, and prefill on tensor cores, of batches.
    Batch,
    /// The same of one request.
    Single,
    /// Prefill and decode of a batch together, on tensor cores.
    Mixed,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Batch => "attention of batches",
            Self::Single => "attention of one request",
            Self::Mixed => "attention of mixed batches",
        })
    }
}

/// Attention of one request.
pub(super) const SINGLE: Gone = Gone {
    what: "attention of one request",
    since: FlashInferVersion::new(0, 6, 18),
    instead: "use BatchDecode or BatchPrefill with a batch of one, or name a wheel of FlashInfer 0.6.13",
};
/// From this version on, names of FlashAttention 2 over pages, and of mixed
/// batches, say that keys and values have the same strides.
const STRIDES_NAMED: FlashInferVersion = FlashInferVersion::new(0, 7, 0);

/// Names of modules, as FlashInfer's own build makes them. They differ by
/// version: the wheel that holds a module tells which is meant.
impl AttentionSpec {
    /// The module of paged batch decode on CUDA cores, which has one name in all
    /// versions.
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: no such module can exist, or be right, because its
    /// head dimensions differ or are not 64, 128, 256 or 512, or a dtype or option is out of range.
    pub fn decode_module(&self) -> Result<ModuleName> {
        self.check_on_cuda_cores()?;
        Ok(ModuleName::new(format!("batch_decode_with_kv_cache_{}", self.combination(INDEXED))))
    }

    /// The module of decode of one request on CUDA cores.
    ///
    /// # Errors
    /// As [`decode_module`](Self::decode_module); also, from 0.6.18 on there is
    /// none.
    pub fn single_decode_module(&self, version: FlashInferVersion) -> Result<ModuleName> {
        self.check_on_cuda_cores()?;
        SINGLE.check(version)?;
        Ok(ModuleName::new(format!("single_decode_with_kv_cache_{}", self.combination(""))))
    }

    /// The module of batch prefill with FlashAttention 2, or 3 (`fa3`).
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: no such module can exist, or be right with
    /// its [head dimensions](AttentionSpec::head_dim_qk).
    pub fn prefill_module(&self, version: FlashInferVersion, fa3: bool) -> Result<ModuleName> {
        self.check_on_tensor_cores(fa3)?;
        let suffix = if fa3 { "_sm90" } else { "" };
        if self.attention_sink {
            return Ok(ModuleName::new(format!(
                "batch_prefill_with_attention_sink_kv_cache_{}_use_swa_{}_{suffix}",
                self.types(INDEXED),
                python_bool(self.window_left.is_some()),
            )));
        }
        let suffix = if fa3 { suffix } else { strides(version) };
        let combination = self.combination(INDEXED);
        Ok(ModuleName::new(format!("batch_prefill_with_kv_cache_{combination}_f16qk_False{suffix}")))
    }

    /// The module of prefill of one request with FlashAttention 2, or 3 (`fa3`).
    ///
    /// # Errors
    /// As [`prefill_module`](Self::prefill_module); from 0.6.18 on there is none.
    pub fn single_prefill_module(&self, version: FlashInferVersion, fa3: bool) -> Result<ModuleName> {
        self.check_on_tensor_cores(fa3)?;
        if self.attention_sink {
            return unsupported(
                "prefill of one request with attention sinks",
                "use BatchPrefill with a batch of one",
            );
        }
        SINGLE.check(version)?;
        let suffix = if fa3 { "_sm90" } else { "" };
        let combination = self.combination("");
        Ok(ModuleName::new(format!("single_prefill_with_kv_cache_{combination}_f16qk_False{suffix}")))
    }

    /// The module of attention of mixed batches.
    ///
    /// # Errors
    /// As [`prefill_module`](Self::prefill_module). There is
    /// none with a sliding window, and its kernels read keys and values with
    /// the same strides, so their head dimensions must be equal.
    pub fn batch_attention_module(&self, version: FlashInferVersion) -> Result<ModuleName> {
        self.check_on_tensor_cores(false)?;
        if let Some(window) = self.window_left {
            return unsupported(
                format!("attention of mixed batches with window_left {window}"),
                "BatchPrefill and BatchDecode have sliding windows",
            );
        }
        if self.head_dim_qk != self.head_dim_vo {
            return unsupported(
                format!(
                    "attention of mixed batches with head dimensions {} and {}",
                    self.head_dim_qk, self.head_dim_vo
                ),
                "it needs head_dim_qk == head_dim_vo",
            );
        }
        if self.attention_sink || self.pos_encoding_mode != PosEncodingMode::None {
            return unsupported(
                "attention of mixed batches with sinks or encoded positions",
                "BatchPrefill and BatchDecode have them",
            );
        }
        Ok(ModuleName::new(format!(
            "batch_attention_with_kv_cache_{}_posenc_0_use_logits_soft_cap_{}_use_profiler_false{}",
            self.types(INDEXED),
            self.logits_soft_cap.is_some(),
            strides(version),
        )))
    }

    /// The module of a family with the kernels of a backend.
    pub(super) fn module(
        &self,
        version: FlashInferVersion,
        family: Family,
        backend: Backend,
    ) -> Result<ModuleName> {
        let fa3 = backend == Backend::Fa3;
        match (family, backend) {
            (Family::Batch, Backend::CudaCores) => self.decode_module(),
            (Family::Batch, _) => self.prefill_module(version, fa3),
            (Family::Single, Backend::CudaCores) => self.single_decode_module(version),
            (Family::Single, _) => self.single_prefill_module(version, fa3),
            (Family::Mixed, _) => self.batch_attention_module(version),
        }
    }

    /// Element types and head dimensions, as all names have them.
    fn types(&self, indexed: &str) -> String {
        format!(
            "dtype_q_{}_dtype_kv_{}_dtype_o_{}{indexed}_head_dim_qk_{}_head_dim_vo_{}",
            self.dtype_q, self.dtype_kv, self.dtype_o, self.head_dim_qk, self.head_dim_vo,
        )
    }

    /// The part of a name that most kernels share.
    fn combination(&self, indexed: &str) -> String {
        format!(
            "{}_posenc_{}_use_swa_{}_use_logits_cap_{}",
            self.types(indexed),
            self.pos_encoding_mode.code(),
            python_bool(self.window_left.is_some()),
            python_bool(self.logits_soft_cap.is_some()),
        )
    }
    fn check_on_cuda_cores(&self) -> Result<()> {
        self.check()?;
        if self.head_dim_qk != self.head_dim_vo {
            return unsupported(
                format!(
                    "decode on CUDA cores with head dimensions {} and {}",
                    self.head_dim_qk, self.head_dim_vo
                ),
                "it needs head_dim_qk == head_dim_vo; use Backend::Fa2 or Backend::Auto",
            );
        }
        if self.attention_sink {
            return unsupported("attention sinks on CUDA cores", "there are Backend::Fa2 and Backend::Fa3");
        }
        self.check_16_bit_queries()?;
        self.check_head_dims("decode on CUDA cores", WIDTHS.contains(&self.head_dim_qk))
    }

    fn check_on_tensor_cores(&self, fa3: bool) -> Result<()> {
        self.check()?;
        if self.attention_sink
            && (self.logits_soft_cap, self.pos_encoding_mode) != (None, PosEncodingMode::None)
        {
            return unsupported(
                "attention sinks with a soft cap or encoded positions",
                "attention sinks can have a sliding window only",
            );
        }
        if !fa3 {
            self.check_16_bit_queries()?;
            return self.check_pieces();
        }
        if self.dtype_q != self.dtype_kv {
            return unsupported(
                format!("FlashAttention 3 with {} queries over {} keys", self.dtype_q, self.dtype_kv),
                "it needs keys and values of the queries' dtype; Backend::Fa2 converts 8-bit ones",
            );
        }
        if self.dtype_q.size() == 2 && self.dtype_q != self.dtype_o {
            return unsupported(
                format!("FlashAttention 3 with {} queries and {} outputs", self.dtype_q, self.dtype_o),
                "outputs of 16-bit queries have their dtype",
            );
        }
        if self.dtype_q.size() == 1 && matches!(self.head_dim_qk, 64 | 192) {
            return unsupported(
                format!(
                    "FlashAttention 3 with {} queries and head_dim_qk {}",
                    self.dtype_q, self.head_dim_qk
                ),
                "8-bit queries have head dimensions 128 and 256",
            );
        }
        if self.pos_encoding_mode != PosEncodingMode::None {
            return unsupported("FlashAttention 3 with encoded positions", "use Backend::Fa2");
        }
        Ok(())
    }

    /// FlashAttention 2 fetches rows in pieces of 128 bytes, or of 64 where values have no more, and leaves out
    /// what is no whole piece (FlashInfer's 4299, 4976).
    fn check_pieces(&self) -> Result<()> {
        let dims = [self.head_dim_qk, self.head_dim_vo];
        let are_multiples = |of| dims.iter().all(|dim| *dim > 0 && dim.is_multiple_of(of));
        let whole = are_multiples(128) || dims == [64; 2] || (self.dtype_kv.size() == 2 && are_multiples(64));
        self.check_head_dims("FlashAttention 2", whole && WIDTHS.contains(&self.head_dim_vo))
    }

    fn check_head_dims(&self, kernels: &str, fit: bool) -> Result<()> {
        if fit {
            return Ok(());
        }
        let dims = shown((self.head_dim_qk, self.head_dim_vo));
        unsupported(
            format!("{kernels} of {} keys with head dimension {dims}", self.dtype_kv),
            "FlashInfer's wheels have head dimensions 64, 128 and 256; kernels are right for these and 512, and FlashAttention 2 for \
             queries and keys of other multiples of 64 (of 128 where keys have 8 bits); compute other heads as wider \
             ones, whose last elements are zeros",
        )
    }

    fn check_16_bit_queries(&self) -> Result<()> {
        if self.dtype_q.size() != 2 {
            return unsupported(
                format!("queries of dtype {}", self.dtype_q),
                "there are f16 and bf16; FlashAttention 3 has 8-bit ones",
            );
        }
        if self.dtype_kv.size() == 2 && self.dtype_kv != self.dtype_q {
            return unsupported(
                format!("{} queries over {} keys", self.dtype_q, self.dtype_kv),
                "16-bit keys and values have the queries' dtype",
            );
        }
        Ok(())
    }

    /// What no kernel can do.
    fn check(&self) -> Result<()> {
        for (name, dtype) in [("queries", self.dtype_q), ("keys and values", self.dtype_kv)] {
            if !matches!(dtype, DType::F16 | DType::BF16 | DType::E4M3 | DType::E5M2) {
                return unsupported(format!("{name} of dtype {dtype}"), "there are f16, bf16, e4m3 and e5m2");
            }
        }
        if !matches!(self.dtype_o, DType::F16 | DType::BF16) {
            return unsupported(format!("outputs of dtype {}", self.dtype_o), "there are f16 and bf16");
        }
        // Kernels subtract it from positions in 32 bits.
        if self.window_left.is_some_and(|window| window >= 1 << 30) {
            return unsupported(format!("window_left of {:?}", self.window_left), "it must be below 2^30");
        }
        // The kernels would apply sm_scale twice.
        if self.pos_encoding_mode == PosEncodingMode::Alibi && self.logits_soft_cap.is_some() {
            return unsupported("ALiBi with a soft cap", "there is either");
        }
        // Kernels on tensor cores hide a key by making its capped logit −50000,
        // before they multiply by the cap. Also refuses NaN.
        if self.logits_soft_cap.is_some_and(|cap| !(cap >= MIN_SOFT_CAP && cap.is_finite())) {
            return unsupported(
                format!("logits_soft_cap of {:?}", self.logits_soft_cap),
                "it must be finite and at least 0.001",
            );
        }
        Ok(())
    }
}

/// Widths of values that kernels which merge the parts of a request are compiled for (`DISPATCH_HEAD_DIM`). On CUDA
/// cores the threads of a head, which add up a score by halves, are a power of two with these.
const WIDTHS: [usize; 4] = [64, 128, 256, 512];
/// With a smaller cap, hidden keys would count.
const MIN_SOFT_CAP: f32 = 1e-3;
/// What names of batch kernels have after the element types.
const INDEXED: &str = "_dtype_idx_i32";

/// What names say of strides.
fn strides(version: FlashInferVersion) -> &'static str {
    if version >= STRIDES_NAMED { "_kv_stride_equal" } else { "" }
}

/// As in "64" and "192/128".
pub(super) fn shown((qk, vo): (usize, usize)) -> String {
    if qk == vo { qk.to_string() } else { format!("{qk}/{vo}") }
}

pub(super) fn unsupported<T>(what: impl Into<String>, available: &str) -> Result<T> {
    Err(FlashInferError::Unsupported { what: what.into(), available: available.into() })
}

/// Module names are made by Python.
const fn python_bool(value: bool) -> &'static str {
    if value { "True" } else { "False" }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: FlashInferVersion = FlashInferVersion::OLDEST;

    #[test]
    fn names_are_upstreams() {
        let spec = AttentionSpec::new(DType::F16, 128);
        assert_eq!(
            spec.decode_module().unwrap().as_str(),
            "batch_decode_with_kv_cache_dtype_q_f16_dtype_kv_f16_dtype_o_f16_dtype_idx_i32_head_dim_qk_128_\
             head_dim_vo_128_posenc_0_use_swa_False_use_logits_cap_False"
        );
        let spec = AttentionSpec::new(DType::BF16, 256)
            .with_kv_dtype(DType::E4M3)
            .with_window_left(7)
            .with_logits_soft_cap(30.0);
        assert_eq!(
            spec.decode_module().unwrap().as_str(),
            "batch_decode_with_kv_cache_dtype_q_bf16_dtype_kv_e4m3_dtype_o_bf16_dtype_idx_i32_head_dim_qk_256_\
             head_dim_vo_256_posenc_0_use_swa_True_use_logits_cap_True"
        );
    }

    #[test]
    fn names_of_mixed_batches_are_upstreams() {
        let spec = AttentionSpec::new(DType::BF16, 128);
        assert_eq!(
            spec.batch_attention_module(OLD).unwrap().as_str(),
            "batch_attention_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_128_\
             head_dim_vo_128_posenc_0_use_logits_soft_cap_false_use_profiler_false"
        );
        assert_eq!(
            AttentionSpec::new(DType::F16, 64)
                .with_kv_dtype(DType::E4M3)
                .with_logits_soft_cap(30.0)
                .batch_attention_module(OLD)
                .unwrap()
                .as_str(),
            "batch_attention_with_kv_cache_dtype_q_f16_dtype_kv_e4m3_dtype_o_f16_dtype_idx_i32_head_dim_qk_64_\
             head_dim_vo_64_posenc_0_use_logits_soft_cap_true_use_profiler_false"
        );
        assert!(spec.with_window_left(7).batch_attention_module(OLD).is_err());
        assert!(spec.with_head_dim_vo(64).batch_attention_module(OLD).is_err());
        assert!(spec.with_logits_soft_cap(0.0).batch_attention_module(OLD).is_err());
        assert!(AttentionSpec::new(DType::F32, 128).batch_attention_module(OLD).is_err());
    }

    #[test]
    fn names_follow_the_version() {
        let version = |text| FlashInferVersion::parse(text).unwrap();
        let spec = AttentionSpec::new(DType::BF16, 128);
        let sinks = AttentionSpec::new(DType::BF16, 64).with_attention_sink();
        for (at, single, strides) in [
            ("0.6.13", true, false),
            ("0.6.16.post3", true, false),
            ("0.6.18", false, false),
            ("0.6.18.post1", false, false),
            ("0.7.0", false, true),
            ("0.7.4", false, true),
        ] {
            let ends = |name: Result<ModuleName>| name.unwrap().as_str().ends_with("_kv_stride_equal");
            assert_eq!(ends(spec.prefill_module(version(at), false)), strides, "{at}");
            assert_eq!(ends(spec.batch_attention_module(version(at))), strides, "{at}");
            assert!(!ends(spec.prefill_module(version(at), true)));
            assert!(!ends(sinks.prefill_module(version(at), false)));
            assert_eq!(spec.single_decode_module(version(at)).is_ok(), single, "{at}");
            assert_eq!(spec.single_prefill_module(version(at), false).is_ok(), single, "{at}");
        }
        let gone = spec.single_decode_module(version("0.7.4")).unwrap_err().to_string();
        for part in [
            "in FlashInfer 0.7.4, which has had none since 0.6.18",
            "BatchDecode",
            "a wheel of FlashInfer 0.6.13",
        ] {
            assert!(gone.contains(part), "{gone}");
        }
    }

    /// Heads that kernels would read in part, or beyond their memory.
    #[test]
    fn head_dimensions_of_no_kernel_are_refused() {
        for head_dim in [0, 32, 48, 80, 96, 112, 160, 192, 1024] {
            let spec = AttentionSpec::new(DType::F16, head_dim);
            assert!(spec.decode_module().is_err() && spec.single_decode_module(OLD).is_err(), "{head_dim}");
        }
        for head_dim in [64, 128, 256, 512] {
            assert!(
                AttentionSpec::new(DType::BF16, head_dim).with_kv_dtype(DType::E5M2).decode_module().is_ok()
            );
        }
        for (dims, wide, narrow) in [
            ([64, 64], true, true),
            ([128, 128], true, true),
            ([256, 128], true, true),
            ([512, 512], true, true),
            ([192, 128], true, false),
            ([192, 192], false, false),
            ([128, 192], false, false),
            ([320, 256], true, false),
            ([384, 256], true, true),
            ([128, 64], true, false),
            ([64, 128], true, false),
            ([80, 80], false, false),
            ([96, 96], false, false),
            ([128, 96], false, false),
            ([16, 64], false, false),
            ([0, 0], false, false),
            ([1024, 1024], false, false),
        ] {
            let spec = AttentionSpec::new(DType::F16, dims[0]).with_head_dim_vo(dims[1]);
            for (spec, fits) in [(spec, wide), (spec.with_kv_dtype(DType::E4M3), narrow)] {
                assert_eq!(spec.prefill_module(OLD, false).is_ok(), fits, "{spec:?}");
                assert_eq!(spec.single_prefill_module(OLD, false).is_ok(), fits, "{spec:?}");
                let mixed = fits && dims[0] == dims[1];
                assert_eq!(spec.batch_attention_module(OLD).is_ok(), mixed, "{spec:?}");
            }
        }
    }

    #[test]
    fn impossible_specs_are_refused() {
        let spec = AttentionSpec::new(DType::F16, 128);
        assert!(AttentionSpec::new(DType::F32, 128).decode_module().is_err());
        assert!(spec.with_kv_dtype(DType::I8).decode_module().is_err());
        assert!(spec.with_kv_dtype(DType::BF16).decode_module().is_err());
        assert!(spec.with_attention_sink().decode_module().is_err());
        assert!(spec.with_attention_sink().with_logits_soft_cap(30.0).prefill_module(OLD, false).is_err());
        assert!(spec.with_attention_sink().single_prefill_module(OLD, true).is_err());
        assert!(spec.with_pos_encoding_mode(PosEncodingMode::Alibi).prefill_module(OLD, true).is_err());
        assert!(AttentionSpec::new(DType::E4M3, 128).prefill_module(OLD, false).is_err());
        let eight_bits =
            |head_dim| AttentionSpec { dtype_o: DType::F16, ..AttentionSpec::new(DType::E4M3, head_dim) };
        assert!(eight_bits(128).prefill_module(OLD, true).is_ok());
        assert!(eight_bits(64).prefill_module(OLD, true).is_err());
        assert!(AttentionSpec { head_dim_vo: 64, ..spec }.decode_module().is_err());
        for cap in [0.0, 1e-4, -1.0, f32::NAN, f32::INFINITY] {
            assert!(spec.with_logits_soft_cap(cap).decode_module().is_err());
        }
        assert!(spec.with_window_left(u32::MAX).decode_module().is_err());
    }
}
