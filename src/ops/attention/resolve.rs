//! Which module serves an attention: the first that can be had.

use super::{
    modules::{Family, SINGLE, unsupported},
    published::{is_published, unpublished},
    spec::{AttentionSpec, Backend},
};
use crate::{
    artifacts::FlashInferVersion,
    error::Result,
    module::{Module, ModuleName},
    runtime::FlashInferRuntime,
    stream::Stream,
};

impl AttentionSpec {
    /// The first module that can be had, in order of preference, and its
    /// backend. Of several backends, those count for which a module can exist.
    ///
    /// What a local source holds comes first, since it may be of a wheel that a
    /// user built. The module's version of FlashInfer is that of the first source
    /// that holds it. Nothing is downloaded for a module that FlashInfer does not
    /// publish.
    pub(super) fn first_module(
        &self,
        family: Family,
        backends: &[Backend],
    ) -> Result<(&'static Module, Backend)> {
        self.check_called()?;
        let (mut refusal, mut possible, mut first) = (None, Vec::new(), None);
        for &backend in backends {
            // What the oldest version refuses, no later one has.
            match self.module(FlashInferVersion::OLDEST, family, backend) {
                Ok(name) => {
                    possible.push(backend);
                    first.get_or_insert(name);
                }
                Err(error) => refusal = Some(error),
            }
        }
        if let Some(error) = refusal.filter(|_| first.is_none()) {
            return Err(error);
        }
        let named = |backend: Backend| move |version| self.module(version, family, backend).ok();
        let runtime = FlashInferRuntime::get()?;
        let local: Vec<_> = possible.iter().map(|&backend| named(backend)).collect();
        if let Some((place, module)) = runtime.first_local(&local)? {
            return Ok((module, possible[place]));
        }
        let versions = runtime.store().pinned_versions();
        let published =
            |backend: &Backend| versions.iter().any(|&version| is_published(self, version, family, *backend));
        let published: Vec<Backend> = possible.iter().copied().filter(published).collect();
        if published.is_empty() {
            if family == Family::Single {
                versions.iter().try_for_each(|&version| SINGLE.check(version))?;
            }
            let name = first.as_ref().map_or("", ModuleName::as_str);
            return Err(unpublished(self, family, possible, name));
        }
        let named: Vec<_> = published.iter().map(|&backend| named(backend)).collect();
        match runtime.first_of(&named) {
            Ok((place, module)) => Ok((module, published[place])),
            Err(error) if family == Family::Single => Err(SINGLE.explain(runtime, error)),
            Err(error) => Err(error),
        }
    }

    /// The first module of prefill that can be had for a device, and whether it
    /// is FlashAttention 3. [`Backend::Auto`] prefers that where the GPU has it,
    /// unless values have another width than keys: there it takes one request a
    /// plan only.
    pub(super) fn first_prefill(&self, stream: &Stream, family: Family) -> Result<(&'static Module, bool)> {
        let capability = FlashInferRuntime::get()?.compute_capability(stream.ordinal())?;
        let backends = match flash_attention(self.backend, capability)? {
            [Backend::Fa3, Backend::Fa2] if self.head_dim_qk != self.head_dim_vo => {
                &[Backend::Fa2, Backend::Fa3]
            }
            backends => backends,
        };
        let (module, backend) = self.first_module(family, backends)?;
        Ok((module, backend == Backend::Fa3))
    }

    /// Refuses modules that exist, but take other arguments than this crate
    /// passes.
    fn check_called(&self) -> Result<()> {
        if self.dtype_q.size() == 1 {
            return unsupported(
                format!("queries of dtype {}", self.dtype_q),
                "this crate calls modules with f16 and bf16 queries only",
            );
        }
        Ok(())
    }
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
