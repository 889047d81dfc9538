//! Members embedded in the program at build time.
//!
//! The build script writes each member as its own zstd frame and a table that includes them all.
//! Whatever comes out of a frame is compared with the member's digest before it is used, like
//! the content of any other source.

use super::digest::Digest;
use super::sink::Sink;
use super::{ArtifactError, CudaArchitecture, FlashInferVersion, Member};
use std::path::Path;

/// One embedded member.
#[derive(Clone, Copy, Debug)]
pub struct BundledMember {
    /// The member's path suffix, as [`Member::suffix`] gives it.
    pub suffix: &'static str,
    /// The wheel that the member came from: a digest of its `RECORD`.
    pub artifact_hash: &'static str,
    /// The version of FlashInfer that it is of, where that is known.
    pub version: Option<FlashInferVersion>,
    /// What its code was compiled for, where its wheel was a provider's.
    pub architectures: &'static [CudaArchitecture],
    /// The member's digest.
    pub sha256: Digest,
    /// The member's size in bytes.
    pub size: u64,
    /// The member, compressed with zstd.
    pub zstd: &'static [u8],
}

#[cfg(flashinfer_rs_bundle)]
mod generated {
    #[allow(unused_imports, reason = "an empty bundle needs none, and not every member has a version")]
    use super::super::{CudaArchitecture, FlashInferVersion, architecture::Features};
    #[allow(unused_imports, reason = "an empty bundle holds no digest")]
    use super::{BundledMember, Digest};
    include!(concat!(env!("OUT_DIR"), "/bundle.rs"));
}

/// The members that the build script embedded; empty without the feature `embed`.
pub fn embedded() -> &'static [BundledMember] {
    #[cfg(flashinfer_rs_bundle)]
    return generated::BUNDLE;
    #[cfg(not(flashinfer_rs_bundle))]
    &[]
}

impl BundledMember {
    pub(crate) fn is(&self, member: &Member) -> bool {
        self.suffix == member.suffix()
    }

    /// Decompresses the member into `sink`.
    pub(crate) fn copy(&self, sink: &mut Sink) -> Result<(), ArtifactError> {
        let what = || Path::new("the embedded bundle").join(self.suffix);
        let bad = |e: std::io::Error| ArtifactError::wheel(&what(), e.to_string());
        let mut decoder = zstd::stream::read::Decoder::with_buffer(self.zstd).map_err(bad)?;
        sink.fill(&mut decoder, bad)
    }
}
