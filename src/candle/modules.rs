//! The kernels of a spec, or what there are instead.

use candle_core::Result;

use super::tensor;
use crate::{
    FlashInferError, FlashInferRuntime,
    attention::{AttentionSpec, PosEncodingMode},
};

/// What `new` finds for the spec of an operation.
pub(super) fn resolve<K>(
    op: &str,
    spec: &AttentionSpec,
    new: impl FnOnce() -> crate::Result<K>,
) -> Result<K> {
    let found = || {
        if !is_published(spec) {
            // A download would not bring it.
            FlashInferRuntime::get()?.module(&spec.prefill_module(false)?)?;
        }
        new()
    };
    found().map_err(|error| match error {
        FlashInferError::Artifact(_) => tensor::error(error).context(what_exists(op, spec)),
        error => tensor::error(error),
    })
}

/// Whether FlashInfer publishes modules of such a spec.
fn is_published(spec: &AttentionSpec) -> bool {
    matches!(spec.head_dim_qk, 64 | 128 | 256) && spec.pos_encoding_mode != PosEncodingMode::Alibi
}

/// What FlashInfer publishes, where a module is missing.
fn what_exists(op: &str, spec: &AttentionSpec) -> String {
    let alibi = spec.pos_encoding_mode == PosEncodingMode::Alibi;
    let options = [
        (spec.window_left.is_some(), " with a window"),
        (spec.logits_soft_cap.is_some(), " with a soft cap"),
        (alibi, " with ALiBi"),
    ];
    let options: String = options.into_iter().filter(|(given, _)| *given).map(|(_, name)| name).collect();
    format!(
        "{op} of {} and head dimension {}{options} needs a module that is not at hand; FlashInfer \
         publishes modules of f16 and bf16 with head dimensions 64, 128 and 256, and none with ALiBi. Name a \
         wheel that has it in RuntimeConfig::wheels or FLASHINFER_RS_WHEELS",
        spec.dtype_q, spec.head_dim_qk
    )
}
