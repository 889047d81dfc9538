//! What a wheel of FlashInfer says of the kernels in it.
//!
//! Up to 0.6.18.post1 a wheel holds the modules for all GPUs. From 0.7.0 on there is a *provider*
//! for each architecture, whose `manifest.json` describes it, and a *shim*, which has the old
//! wheel's name, holds no module and requires the providers.
//!
//! ```text
//! flashinfer_jit_cache/jit_cache/NAME/NAME.so                   a module for all GPUs
//! flashinfer_jit_cache/providers/sm90a/jit_cache/NAME/NAME.so   one of the provider sm90a
//! flashinfer_jit_cache/providers/sm90a/manifest.json
//! ```

use super::Package;
use super::architecture::CudaArchitecture;
use super::version::FlashInferVersion;
use std::collections::BTreeSet;

/// The version of `manifest.json` that is understood.
const SCHEMA: u64 = 1;

/// What a wheel says of its kernels.
#[derive(Debug, Default)]
pub(crate) struct WheelKernels {
    /// The version of FlashInfer, where the wheel is one of FlashInfer's and has a released one.
    pub(crate) version: Option<FlashInferVersion>,
    /// What a provider's code was compiled for; nothing where it is for all GPUs.
    pub(crate) architectures: Vec<CudaArchitecture>,
    /// The providers that a shim requires; nothing where the wheel is none.
    pub(crate) shim_of: Vec<CudaArchitecture>,
}

/// Whether a package, by its name and version, is FlashInfer's cache of modules, or a provider of it.
pub(crate) fn is_flashinfers(distribution: &str) -> bool {
    distribution.starts_with(Package::JitCache.key())
}

/// Whether a package, by its name and version, is one that providers belong to.
pub(crate) fn is_shim(distribution: &str) -> bool {
    let (name, _) = distribution.split_once('-').unwrap_or_default();
    name == Package::JitCache.key()
        && version_of(distribution).is_some_and(|version| version >= FlashInferVersion::PROVIDERS)
}

/// The version in `name-version[-…]`, if it is one of FlashInfer's releases.
pub(crate) fn version_of(distribution: &str) -> Option<FlashInferVersion> {
    let version = distribution.split('-').nth(1)?;
    is_flashinfers(distribution).then(|| FlashInferVersion::parse(version)).flatten()
}

/// The architecture of the provider that a package is, by its name, also with what follows it;
/// `None` where it is none.
pub(crate) fn provider_of(distribution: &str) -> Option<CudaArchitecture> {
    let name = distribution.split('-').next()?;
    CudaArchitecture::parse(name.strip_prefix(Package::JitCache.key())?.strip_prefix('_')?)
}

/// A module's place in a wheel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ModulePath<'a> {
    /// The provider, if it is one's.
    pub(crate) provider: Option<&'a str>,
    pub(crate) name: &'a str,
}

/// The module that a member of a wheel is, if it is one.
pub(crate) fn module_path(member: &str) -> Option<ModulePath<'_>> {
    let mut parts = member.rsplit('/');
    let (file, name) = (parts.next()?, parts.next()?);
    if file.strip_suffix(".so")? != name || parts.next()? != "jit_cache" {
        return None;
    }
    let provider = match parts.next()? {
        "flashinfer_jit_cache" => return Some(ModulePath { provider: None, name }),
        provider => provider,
    };
    let provided = (parts.next()?, parts.next()?) == ("providers", "flashinfer_jit_cache");
    provided.then_some(ModulePath { provider: Some(provider), name })
}

/// The one provider whose modules these are; `None` where they are for all GPUs.
///
/// # Errors
/// They are of several.
pub(crate) fn provider<'a>(modules: impl Iterator<Item = ModulePath<'a>>) -> Result<Option<&'a str>, String> {
    let providers: BTreeSet<_> = modules.map(|module| module.provider).collect();
    if providers.len() > 1 {
        let name = |provider: &Option<&str>| provider.unwrap_or("all GPUs").to_owned();
        let names: Vec<_> = providers.iter().map(name).collect();
        return Err(format!("it holds modules for {}; expected a wheel for each", names.join(" and for ")));
    }
    Ok(providers.into_iter().next().flatten())
}

/// What a provider was compiled for, by its name alone.
pub(crate) fn architecture_of(provider: &str) -> Result<CudaArchitecture, String> {
    CudaArchitecture::parse(provider)
        .ok_or_else(|| format!("its provider {provider:?} is no architecture such as sm90a"))
}

/// Whether a member of a wheel is the provider's `manifest.json`.
pub(crate) fn is_manifest(member: &str, provider: &str) -> bool {
    let end = format!("flashinfer_jit_cache/providers/{provider}/manifest.json");
    member.strip_suffix(&end).is_some_and(|folder| folder.is_empty() || folder.ends_with('/'))
}

/// A provider's description of itself.
#[derive(serde::Deserialize)]
struct Manifest {
    schema_version: u64,
    provider_id: String,
    distribution: String,
    version: String,
    cuda_architectures: Vec<String>,
    modules: BTreeSet<String>,
}

/// What a provider was compiled for, by its manifest, which must be that of this provider, in this
/// package, with these modules.
///
/// # Errors
/// What is wrong with the manifest.
pub(crate) fn read_manifest(
    manifest: &[u8],
    provider: &str,
    distribution: &str,
    modules: &BTreeSet<&str>,
) -> Result<Vec<CudaArchitecture>, String> {
    let manifest: Manifest = serde_json::from_slice(manifest).map_err(|e| e.to_string())?;
    if manifest.schema_version != SCHEMA {
        return Err(format!("schema_version is {}; expected {SCHEMA}", manifest.schema_version));
    }
    let package = format!("{}-{}", manifest.distribution.replace(['-', '.'], "_"), manifest.version);
    for (key, found, expected) in [
        ("provider_id", &*manifest.provider_id, provider),
        ("distribution and version", &package, distribution),
    ] {
        if found != expected {
            return Err(format!("{key} are of {found}; expected {expected}"));
        }
    }
    let listed: BTreeSet<&str> = manifest.modules.iter().map(String::as_str).collect();
    if let Some(name) = listed.difference(modules).next() {
        return Err(format!("it lists the module {name}, which the wheel does not hold"));
    }
    if let Some(name) = modules.difference(&listed).next() {
        return Err(format!("it does not list the module {name}, which the wheel holds"));
    }
    let architectures = manifest.cuda_architectures.iter().map(|name| {
        CudaArchitecture::parse(name).ok_or_else(|| format!("{name:?} is no architecture such as sm_90a"))
    });
    let architectures = architectures.collect::<Result<Vec<_>, _>>()?;
    match architectures.is_empty() {
        true => Err("it lists no architecture".into()),
        false => Ok(architectures),
    }
}

/// The providers that a shim requires, by its `METADATA`.
pub(crate) fn read_requirements(metadata: &str) -> Vec<CudaArchitecture> {
    let headers = metadata.lines().take_while(|line| !line.is_empty());
    let required = headers.filter_map(|line| line.strip_prefix("Requires-Dist: flashinfer-jit-cache-"));
    let names = required.filter_map(|package| package.split(|c: char| !c.is_ascii_alphanumeric()).next());
    names.filter_map(CudaArchitecture::parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_told_by_their_paths() {
        let module = |provider, name| Some(ModulePath { provider, name });
        for (path, want) in [
            ("w.data/purelib/flashinfer_jit_cache/jit_cache/norm/norm.so", module(None, "norm")),
            ("flashinfer_jit_cache/jit_cache/norm/norm.so", module(None, "norm")),
            (
                "w.data/purelib/flashinfer_jit_cache/providers/sm90a/jit_cache/norm/norm.so",
                module(Some("sm90a"), "norm"),
            ),
            ("flashinfer_jit_cache/providers/sm80/jit_cache/a/a.so", module(Some("sm80"), "a")),
            ("flashinfer_jit_cache/jit_cache/norm/other.so", None),
            ("xflashinfer_jit_cache/jit_cache/norm/norm.so", None),
            ("flashinfer_jit_cache/jit_cache/norm.so", None),
            ("flashinfer_jit_cache/sm90a/jit_cache/norm/norm.so", None),
            ("other/providers/sm90a/jit_cache/norm/norm.so", None),
            ("norm/norm.so", None),
        ] {
            assert_eq!(module_path(path), want, "{path}");
        }
    }

    #[test]
    fn versions_are_those_of_flashinfers_packages() {
        for (distribution, version, shim) in [
            ("flashinfer_jit_cache-0.6.13+cu130", Some(FlashInferVersion::new(0, 6, 13)), false),
            (
                "flashinfer_jit_cache-0.7.4+cu130-cp39-abi3-any.whl",
                Some(FlashInferVersion::new(0, 7, 4)),
                true,
            ),
            ("flashinfer_jit_cache_sm90a-0.7.4+cu130", Some(FlashInferVersion::new(0, 7, 4)), false),
            ("flashinfer_jit_cache-0.8.0rc1+cu130", None, false),
            ("mine-0.7.4", None, false),
            ("w", None, false),
        ] {
            assert_eq!(version_of(distribution), version, "{distribution}");
            assert_eq!(is_shim(distribution), shim, "{distribution}");
        }
    }

    #[test]
    fn a_shim_names_its_providers() {
        let metadata = "Metadata-Version: 2.4\nName: flashinfer-jit-cache\nVersion: 0.7.4+cu130\n\
                        Requires-Dist: flashinfer-jit-cache-sm80==0.7.4+cu130\n\
                        Requires-Dist: flashinfer-jit-cache-sm90a (==0.7.4+cu130)\n\
                        Requires-Dist: something-else>=1\n\nRequires-Dist: flashinfer-jit-cache-sm75\n";
        let names: Vec<_> = read_requirements(metadata).iter().map(ToString::to_string).collect();
        assert_eq!(names, ["sm80", "sm90a"]);
    }
}
