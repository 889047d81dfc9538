//! FlashInfer's operations, one file or folder for each module family. It has the names of its
//! modules, what it calls of them, the checks before, and the calls.

pub mod activation;
pub mod attention;
pub mod cascade;
pub(crate) mod check;
mod function;
pub mod gdn;
pub mod gemm;
mod gone;
pub mod norm;
pub mod page;
pub mod quantization;
pub mod rope;
pub mod sampling;
mod signatures;
pub mod topk;

use crate::{ffi::Signature, module::ModuleName};
use function::{FixedFunction, enable_pdl};

impl ModuleName {
    /// The modules of what the layers of a language model call beside attention, and of sampling: for
    /// [`preload`](crate::FlashInferRuntime::preload).
    pub const LAYERS: [Self; 7] = [
        Self::NORM,
        Self::ROPE,
        Self::PAGE,
        Self::SILU_AND_MUL,
        Self::GELU_AND_MUL,
        Self::GELU_TANH_AND_MUL,
        Self::SAMPLING,
    ];
}

/// Every function that this crate calls: a pattern of the modules that export it,
/// see [`ModuleName::matches`](crate::ModuleName::matches), and the signatures that
/// versions of it have, oldest first.
///
/// [`Signature::find`] holds them against what a module prints of itself.
pub fn signatures() -> Vec<(&'static str, &'static [Signature])> {
    [
        activation::SIGNATURES,
        &attention::signatures(),
        gdn::SIGNATURES,
        &gemm::signatures(),
        &norm::signatures(),
        page::SIGNATURES,
        quantization::SIGNATURES,
        rope::SIGNATURES,
        sampling::SIGNATURES,
        topk::SIGNATURES,
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use crate::artifacts::Digest;

    /// The PTX is what `ptx.sh` made of the source beside it.
    #[test]
    fn ptx_is_made_of_its_source() {
        macro_rules! sources {
            ($($folder:literal $name:literal $($header:literal)?,)*) => {
                [$((
                    $name,
                    concat!(
                        $(include_str!(concat!($folder, $header)),)?
                        include_str!(concat!($folder, $name, ".cu")),
                    ),
                    include_str!(concat!($folder, $name, ".ptx")),
                ),)*]
            };
        }
        for (name, source, ptx) in sources![
            "" "merge_states",
            "attention/" "empty_states",
            "rope/" "append",
            "sampling/" "argmax" "rows.cuh",
            "sampling/" "chain",
            "sampling/" "edit_logits",
            "sampling/" "sample" "rows.cuh",
            "sampling/" "top_p" "rows.cuh",
        ] {
            let line = format!("// Made of {name}.cu by ptx.sh: sha256 {}", Digest::of(source.as_bytes()));
            assert_eq!(ptx.lines().next(), Some(line.as_str()), "run src/ops/ptx.sh");
        }
    }
}
