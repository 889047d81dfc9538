//! What selects an attention module.

use crate::{
    dtype::DType,
    error::{FlashInferError, Result},
    module::{Module, ModuleName},
    ops::{check::Check, page::CacheShape},
    runtime::FlashInferRuntime,
    stream::Stream,
};

/// Heads of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query (and output) heads, a multiple of `num_kv_heads`.
    pub num_qo_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
}

impl Heads {
    /// So many query heads over so many key and value heads. They are checked
    /// where they are used.
    pub const fn new(num_qo_heads: usize, num_kv_heads: usize) -> Self {
        Self { num_qo_heads, num_kv_heads }
    }

    /// Query heads per KV head; `None` unless that is a whole number.
    pub fn group_size(&self) -> Option<usize> {
        let group = self.num_qo_heads.checked_div(self.num_kv_heads)?;
        (group > 0 && group * self.num_kv_heads == self.num_qo_heads).then_some(group)
    }

    /// Refuses what no kernel can launch; returns the group size.
    pub(super) fn check(&self, op: &'static str) -> Result<usize> {
        let Self { num_qo_heads, num_kv_heads } = *self;
        // Heads are dimensions of launch grids, which have 65535 places.
        match self.group_size() {
            Some(group) if num_qo_heads <= 65535 => Ok(group),
            _ => Err(FlashInferError::invalid(
                op,
                "heads",
                format!(
                    "{num_qo_heads} query heads over {num_kv_heads} KV heads; \
                     expected a multiple, and at most 65535 of them"
                ),
            )),
        }
    }

    /// The cache has the plan's KV heads, of the spec's width.
    pub(super) fn check_cache(&self, check: &Check<'_>, cache: CacheShape, head_dim: usize) -> Result<()> {
        if (cache.heads, cache.head_dim) == (self.num_kv_heads as i64, head_dim as i64) {
            return Ok(());
        }
        check.fail(
            "kv.k",
            format!(
                "it has {} heads of {} elements; the plan is for {} of {head_dim}",
                cache.heads, cache.head_dim, self.num_kv_heads
            ),
        )
    }
}

/// Which kernels serve an attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backend {
    /// The fastest that the GPU and the spec allow; see each operation for
    /// what it picks. What was picked can be asked for.
    #[default]
    Auto,
    /// Dot products on CUDA cores: decode with few query heads per KV head.
    CudaCores,
    /// FlashAttention 2 on tensor cores, on compute capability 8.0 and newer.
    Fa2,
    /// FlashAttention 3, on compute capability 9.0 exactly (`_sm90` modules).
    Fa3,
}

/// How kernels encode positions, by FlashInfer's name. Models that rotate
/// queries and keys beforehand need none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PosEncodingMode {
    /// Not at all.
    #[default]
    None,
    /// ALiBi: a logit gets a head's slope times the key's position less the
    /// query's index among its request's queries. (Counting from the query's
    /// own position would add the same to all logits of a query. So it does
    /// not change the output, but the LSE.) No wheel that FlashInfer publishes
    /// has such modules; one that you build may.
    Alibi,
}

impl PosEncodingMode {
    /// The number in module names.
    const fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Alibi => 2,
        }
    }
}

/// The properties of an attention that its kernels are compiled for.
///
/// ```
/// # use flashinfer_rs::{DType, attention::AttentionSpec};
/// let spec = AttentionSpec::new(DType::BF16, 128).with_window_left(1023);
/// assert!(spec.decode_module()?.as_str().contains("use_swa_True"));
/// # Ok::<(), flashinfer_rs::FlashInferError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct AttentionSpec {
    /// Element type of queries.
    pub dtype_q: DType,
    /// Element type of keys and values.
    pub dtype_kv: DType,
    /// Element type of the output.
    pub dtype_o: DType,
    /// Width of a query and key head.
    pub head_dim_qk: usize,
    /// Width of a value head.
    pub head_dim_vo: usize,
    /// Keys left of a query's own position that it sees, as in FlashInfer:
    /// with `Some(w)`, the last `w + 1` keys. `None` sees all. Values of keys
    /// that the window hides are still multiplied by 0, so they must be finite;
    /// FlashAttention 3 does so with the first keys of a request, however far
    /// they are from the window.
    pub window_left: Option<u32>,
    /// `Some(cap)` turns logits into `cap · tanh(logits / cap)`.
    pub logits_soft_cap: Option<f32>,
    /// How kernels encode positions.
    pub pos_encoding_mode: PosEncodingMode,
    /// Each head has a sink: a key without a value, whose logit takes part in
    /// the softmax; see [`RunOptions::sinks`](super::RunOptions::sinks). Its
    /// modules are for prefill, and for decode through it.
    pub attention_sink: bool,
    /// Which kernels serve it.
    pub backend: Backend,
}

impl AttentionSpec {
    /// One element type and one head dimension for everything; no window, no cap.
    pub const fn new(dtype: DType, head_dim: usize) -> Self {
        Self {
            dtype_q: dtype,
            dtype_kv: dtype,
            dtype_o: dtype,
            head_dim_qk: head_dim,
            head_dim_vo: head_dim,
            window_left: None,
            logits_soft_cap: None,
            pos_encoding_mode: PosEncodingMode::None,
            attention_sink: false,
            backend: Backend::Auto,
        }
    }

    /// Other kernels than [`Backend::Auto`] picks.
    #[must_use]
    pub const fn with_backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// Values of another width than queries and keys.
    #[must_use]
    pub const fn with_head_dim_vo(mut self, head_dim: usize) -> Self {
        self.head_dim_vo = head_dim;
        self
    }

    /// Keys and values of another element type.
    #[must_use]
    pub const fn with_kv_dtype(mut self, dtype: DType) -> Self {
        self.dtype_kv = dtype;
        self
    }

    /// A sliding window; see [`window_left`](Self::window_left).
    #[must_use]
    pub const fn with_window_left(mut self, window_left: u32) -> Self {
        self.window_left = Some(window_left);
        self
    }

    /// A soft cap; see [`logits_soft_cap`](Self::logits_soft_cap).
    #[must_use]
    pub const fn with_logits_soft_cap(mut self, cap: f32) -> Self {
        self.logits_soft_cap = Some(cap);
        self
    }

    /// Positions encoded by the kernels; see [`PosEncodingMode`].
    #[must_use]
    pub const fn with_pos_encoding_mode(mut self, mode: PosEncodingMode) -> Self {
        self.pos_encoding_mode = mode;
        self
    }

    /// A sink for each head; see [`attention_sink`](Self::attention_sink).
    #[must_use]
    pub const fn with_attention_sink(mut self) -> Self {
        self.attention_sink = true;
        self
    }

    /// The factor on query-key products unless a run names another: `1/√head_dim_qk`.
    pub fn default_sm_scale(&self) -> f64 {
        1.0 / (self.head_dim_qk as f64).sqrt()
    }

    /// The module of paged batch decode on CUDA cores.
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: no such module can exist, because its
    /// head dimensions differ, or a dtype or option is out of range.
    pub fn decode_module(&self) -> Result<ModuleName> {
        self.check_on_cuda_cores()?;
        Ok(ModuleName::new(format!("batch_decode_with_kv_cache_{}", self.combination(INDEXED))))
    }

    /// The module of decode of one request on CUDA cores.
    ///
    /// # Errors
    /// As [`decode_module`](Self::decode_module).
    pub fn single_decode_module(&self) -> Result<ModuleName> {
        self.check_on_cuda_cores()?;
        Ok(ModuleName::new(format!("single_decode_with_kv_cache_{}", self.combination(""))))
    }

    /// The module of batch prefill with FlashAttention 2, or 3 (`fa3`).
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: no such module can exist.
    pub fn prefill_module(&self, fa3: bool) -> Result<ModuleName> {
        self.check_on_tensor_cores(fa3)?;
        let suffix = if fa3 { "_sm90" } else { "" };
        if self.attention_sink {
            return Ok(ModuleName::new(format!(
                "batch_prefill_with_attention_sink_kv_cache_{}_use_swa_{}_{suffix}",
                self.types(INDEXED),
                python_bool(self.window_left.is_some()),
            )));
        }
        let combination = self.combination(INDEXED);
        Ok(ModuleName::new(format!("batch_prefill_with_kv_cache_{combination}_f16qk_False{suffix}")))
    }

    /// The module of prefill of one request with FlashAttention 2, or 3 (`fa3`).
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: no such module can exist.
    pub fn single_prefill_module(&self, fa3: bool) -> Result<ModuleName> {
        self.check_on_tensor_cores(fa3)?;
        if self.attention_sink {
            return unsupported(
                "prefill of one request with attention sinks",
                "use BatchPrefill with a batch of one",
            );
        }
        let suffix = if fa3 { "_sm90" } else { "" };
        let combination = self.combination("");
        Ok(ModuleName::new(format!("single_prefill_with_kv_cache_{combination}_f16qk_False{suffix}")))
    }

    /// The module of attention of mixed batches.
    ///
    /// # Errors
    /// [`FlashInferError::Unsupported`]: no such module can exist. There is
    /// none with a sliding window, and its kernels read keys and values with
    /// the same strides, so their head dimensions must be equal.
    pub fn batch_attention_module(&self) -> Result<ModuleName> {
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
            "batch_attention_with_kv_cache_{}_posenc_0_use_logits_soft_cap_{}_use_profiler_false",
            self.types(INDEXED),
            self.logits_soft_cap.is_some(),
        )))
    }

    /// The first module at hand that serves prefill on a device, and whether it
    /// is FlashAttention 3; `name` makes its name. [`Backend::Auto`] takes
    /// FlashAttention 3 where the GPU has it and a module exists, else 2; for
    /// values of another width than keys always 2, because 3 then cannot keep
    /// the requests of a batch apart.
    pub(super) fn first_prefill(
        &self,
        stream: &Stream,
        name: fn(&Self, bool) -> Result<ModuleName>,
    ) -> Result<(&'static Module, bool)> {
        let runtime = FlashInferRuntime::get()?;
        // FlashAttention 3 keeps requests apart where values are as wide as keys only.
        let asked = match self.backend {
            Backend::Auto if self.head_dim_qk != self.head_dim_vo => Backend::Fa2,
            asked => asked,
        };
        let backends = flash_attention(asked, runtime.compute_capability(stream.ordinal())?)?;
        let (module, backend) =
            first_module(runtime, backends, |backend| name(self, backend == Backend::Fa3))?;
        Ok((module, backend == Backend::Fa3))
    }

    /// Refuses modules that exist, but take other arguments than this crate
    /// passes.
    pub(super) fn check_called(&self) -> Result<()> {
        if self.dtype_q.size() == 1 {
            return unsupported(
                format!("queries of dtype {}", self.dtype_q),
                "this crate calls modules with f16 and bf16 queries only",
            );
        }
        Ok(())
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

    /// The output's offsets fit 32 bits. Planners count blocks in as many, so
    /// it has to be known before they run.
    pub(super) fn check_output_size(&self, check: &Check<'_>, rows: usize, heads: Heads) -> Result<()> {
        let elements = rows.checked_mul(heads.num_qo_heads).and_then(|all| all.checked_mul(self.head_dim_vo));
        if elements.is_some_and(|all| all <= u32::MAX as usize) {
            return Ok(());
        }
        check.fail(
            "heads",
            format!(
                "{rows} queries with {} heads of {} elements are 2^32 elements or more; split the batch",
                heads.num_qo_heads, self.head_dim_vo
            ),
        )
    }

    /// The window as kernels take it: −1 for none.
    pub(super) fn window_left_code(&self) -> i64 {
        self.window_left.map_or(-1, i64::from)
    }

    /// The soft cap as kernels take it: 0 for none.
    pub(super) fn soft_cap_code(&self) -> f64 {
        self.logits_soft_cap.map_or(0.0, f64::from)
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
        self.check_16_bit_queries()
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
            return self.check_16_bit_queries();
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

/// With a smaller cap, hidden keys would count.
const MIN_SOFT_CAP: f32 = 1e-3;
/// What names of batch kernels have after the element types.
const INDEXED: &str = "_dtype_idx_i32";

/// The first module at hand, in order of preference, and its backend; `name`
/// makes its name. Of several backends, those count for which a module can
/// exist.
pub(super) fn first_module(
    runtime: &FlashInferRuntime,
    backends: &[Backend],
    name: impl Fn(Backend) -> Result<ModuleName>,
) -> Result<(&'static Module, Backend)> {
    let mut refusal = None;
    let (mut possible, mut names) = (Vec::new(), Vec::new());
    for &backend in backends {
        match name(backend) {
            Ok(name) => {
                possible.push(backend);
                names.push(name);
            }
            Err(error) => refusal = Some(error),
        }
    }
    if let Some(error) = refusal.filter(|_| names.is_empty()) {
        return Err(error);
    }
    let (place, module) = runtime.first_of(&names)?;
    Ok((module, possible[place]))
}

/// The backends of FlashAttention that may serve on a GPU of this compute
/// capability, the best first.
pub(super) fn flash_attention(asked: Backend, (major, minor): (i32, i32)) -> Result<&'static [Backend]> {
    match asked {
        Backend::Fa2 => Ok(&[Backend::Fa2]),
        Backend::Fa3 if major == 9 => Ok(&[Backend::Fa3]),
        Backend::Fa3 => unsupported(
            format!("FlashAttention 3 on compute capability {major}.{minor}"),
            "it needs 9.0; use Backend::Fa2 or Backend::Auto",
        ),
        Backend::CudaCores => {
            unsupported("FlashAttention on CUDA cores", "there are Backend::Fa2 and Backend::Fa3")
        }
        Backend::Auto if major == 9 => Ok(&[Backend::Fa3, Backend::Fa2]),
        Backend::Auto => Ok(&[Backend::Fa2]),
    }
}

fn unsupported<T>(what: impl Into<String>, available: &str) -> Result<T> {
    Err(FlashInferError::Unsupported { what: what.into(), available: available.into() })
}

/// Module names are made by Python.
const fn python_bool(value: bool) -> &'static str {
    if value { "True" } else { "False" }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            spec.batch_attention_module().unwrap().as_str(),
            "batch_attention_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_head_dim_qk_128_\
             head_dim_vo_128_posenc_0_use_logits_soft_cap_false_use_profiler_false"
        );
        assert_eq!(
            AttentionSpec::new(DType::F16, 64)
                .with_kv_dtype(DType::E4M3)
                .with_logits_soft_cap(30.0)
                .batch_attention_module()
                .unwrap()
                .as_str(),
            "batch_attention_with_kv_cache_dtype_q_f16_dtype_kv_e4m3_dtype_o_f16_dtype_idx_i32_head_dim_qk_64_\
             head_dim_vo_64_posenc_0_use_logits_soft_cap_true_use_profiler_false"
        );
        assert!(spec.with_window_left(7).batch_attention_module().is_err());
        assert!(spec.with_head_dim_vo(64).batch_attention_module().is_err());
        assert!(spec.with_logits_soft_cap(0.0).batch_attention_module().is_err());
        assert!(AttentionSpec::new(DType::F32, 128).batch_attention_module().is_err());
    }

    #[test]
    fn flash_attention_3_needs_compute_capability_9() {
        use Backend::{Auto, CudaCores, Fa2, Fa3};
        assert_eq!(flash_attention(Auto, (9, 0)).unwrap(), [Fa3, Fa2]);
        assert_eq!(flash_attention(Fa3, (9, 0)).unwrap(), [Fa3]);
        for capability in [(8, 0), (8, 9), (10, 0), (12, 0)] {
            assert_eq!(flash_attention(Auto, capability).unwrap(), [Fa2]);
            assert_eq!(flash_attention(Fa2, capability).unwrap(), [Fa2]);
            let error = flash_attention(Fa3, capability).unwrap_err();
            assert!(error.to_string().contains("it needs 9.0"), "{error}");
        }
        assert!(flash_attention(CudaCores, (9, 0)).is_err());
    }

    #[test]
    fn impossible_specs_are_refused() {
        let spec = AttentionSpec::new(DType::F16, 128);
        assert!(AttentionSpec::new(DType::F32, 128).decode_module().is_err());
        assert!(spec.with_kv_dtype(DType::I8).decode_module().is_err());
        assert!(spec.with_kv_dtype(DType::BF16).decode_module().is_err());
        assert!(spec.with_attention_sink().decode_module().is_err());
        assert!(spec.with_attention_sink().with_logits_soft_cap(30.0).prefill_module(false).is_err());
        assert!(spec.with_attention_sink().single_prefill_module(true).is_err());
        assert!(spec.with_pos_encoding_mode(PosEncodingMode::Alibi).prefill_module(true).is_err());
        assert!(AttentionSpec::new(DType::E4M3, 128).prefill_module(false).is_err());
        let eight_bits =
            |head_dim| AttentionSpec { dtype_o: DType::F16, ..AttentionSpec::new(DType::E4M3, head_dim) };
        assert!(eight_bits(128).prefill_module(true).is_ok());
        assert!(eight_bits(64).prefill_module(true).is_err());
        assert!(AttentionSpec { head_dim_vo: 64, ..spec }.decode_module().is_err());
        for cap in [0.0, 1e-4, -1.0, f32::NAN, f32::INFINITY] {
            assert!(spec.with_logits_soft_cap(cap).decode_module().is_err());
        }
        assert!(spec.with_window_left(u32::MAX).decode_module().is_err());
    }
}
