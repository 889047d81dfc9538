//! Which kernels compute a segment GEMM on a GPU.

use crate::error::{FlashInferError, Result};

/// The operation, in errors.
pub(super) const OP: &str = "segment_gemm";

/// Fewer multiprocessors than this need not be filled by clusters of four, and
/// the launch would fail.
const MIN_MULTIPROCESSORS: i32 = 16;

/// Which kernels compute a segment GEMM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GemmBackend {
    /// As upstream: [`Sm90`](Self::Sm90) on compute capability 9.0, else
    /// [`Sm80`](Self::Sm80); the other, if its module alone is at hand.
    #[default]
    Auto,
    /// The module `gemm`, on compute capability 8.0 and newer, for `f16` and
    /// `bf16`. It needs cuBLAS to be opened. Upstream launches it with four
    /// blocks, whatever the GPU, so it is slow.
    Sm80,
    /// The module `gemm_sm90`, on compute capability 9.0 exactly; also for 8-bit
    /// floats.
    Sm90,
}

/// The backends that a GPU has, in order of preference.
pub(super) fn backends(
    asked: GemmBackend,
    (major, minor): (i32, i32),
    multiprocessors: i32,
) -> Result<&'static [GemmBackend]> {
    use GemmBackend::{Auto, Sm80, Sm90};
    let sm90 = (major, minor) == (9, 0) && multiprocessors >= MIN_MULTIPROCESSORS;
    match asked {
        Auto if sm90 => Ok(&[Sm90, Sm80]),
        Auto | Sm80 if major >= 8 => Ok(&[Sm80]),
        Sm90 if sm90 => Ok(&[Sm90]),
        _ => Err(FlashInferError::Unsupported {
            what: format!(
                "{OP} with backend {asked:?} on compute capability {major}.{minor} with {multiprocessors} \
                 multiprocessors"
            ),
            available: format!(
                "Sm80 needs 8.0 or newer, Sm90 needs 9.0 exactly and {MIN_MULTIPROCESSORS} multiprocessors"
            ),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_follow_the_gpu() {
        use GemmBackend::{Auto, Sm80, Sm90};
        assert_eq!(backends(Auto, (9, 0), 132).unwrap(), [Sm90, Sm80]);
        assert_eq!(backends(Auto, (9, 0), 14).unwrap(), [Sm80]);
        for capability in [(8, 0), (8, 9), (10, 0), (12, 1)] {
            assert_eq!(backends(Auto, capability, 100).unwrap(), [Sm80]);
            let text = backends(Sm90, capability, 100).unwrap_err().to_string();
            assert!(text.contains("Sm90") && text.contains("9.0 exactly"), "{text}");
        }
        assert_eq!(backends(Sm80, (9, 0), 132).unwrap(), [Sm80]);
        assert_eq!(backends(Sm90, (9, 0), 16).unwrap(), [Sm90]);
        assert!(backends(Sm90, (9, 0), 14).is_err());
        assert!(backends(Auto, (7, 5), 40).unwrap_err().to_string().contains("7.5"));
    }
}
