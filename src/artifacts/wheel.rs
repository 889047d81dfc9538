//! Members of a wheel, each with the digest that the wheel's `RECORD` promises.
//!
//! Opening a wheel reads its central directory and its `RECORD`, nothing else, so a wheel of
//! gigabytes costs what its list of names costs. A member is read once: its bytes are streamed,
//! hashed while they flow, and never exceed the size that both lists state. Whatever can be read
//! and sought in will do, a file or a server that answers ranges.

use super::architecture::CudaArchitecture;
use super::digest::Digest;
use super::kernels::{self, ModulePath, WheelKernels, module_path};
use super::record::{self, MAX_RECORD, artifact_hash};
use super::sink::Sink;
use super::version::FlashInferVersion;
use super::{ArtifactError, Member};
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};

/// No provider's manifest is larger, nor a shim's metadata.
const MAX_DESCRIPTION: u64 = 4 << 20;

/// An open wheel: its members and their digests.
#[derive(Debug)]
pub struct Wheel {
    path: PathBuf,
    record_sha256: Digest,
    artifact_hash: String,
    /// Name and version of the package, joined by `-`.
    distribution: String,
    members: Vec<WheelMember>,
    kernels: WheelKernels,
}

/// A member of a wheel.
#[derive(Clone, Debug)]
pub struct WheelMember {
    index: usize,
    name: String,
    size: u64,
    record: Option<(Digest, Option<u64>)>,
}

/// A member whose digest and size are known.
#[derive(Clone, Copy, Debug)]
pub struct Recorded<'a> {
    member: &'a WheelMember,
    /// The digest in `RECORD`.
    pub sha256: Digest,
    /// The size on which the central directory and `RECORD` agree.
    pub size: u64,
}

impl Wheel {
    /// Opens a wheel and validates its list of members.
    ///
    /// # Errors
    /// [`ArtifactError::BadWheel`] when the file is missing, no zip archive, holds a name twice,
    /// has no `RECORD`, or is a provider of modules whose manifest does not describe it;
    /// [`ArtifactError::DigestMismatch`] when that manifest is damaged;
    /// [`ArtifactError::UnsafeMember`] when a name could leave its folder.
    pub fn open(path: &Path) -> Result<Wheel, ArtifactError> {
        Wheel::open_pinned(path, None)
    }

    /// As [`Wheel::open`], of a wheel whose RECORD must have the digest `record_sha256`, if it is
    /// pinned.
    pub(crate) fn open_pinned(path: &Path, record_sha256: Option<Digest>) -> Result<Wheel, ArtifactError> {
        Ok(Wheel::read(path, &mut open(path)?, record_sha256)?.0)
    }

    /// As [`Wheel::open`], of what is open: the wheel and its RECORD, which must have the digest
    /// `expected`. `path` is for messages.
    pub(crate) fn read<R: Read + Seek>(
        path: &Path,
        archive: &mut zip::ZipArchive<R>,
        expected: Option<Digest>,
    ) -> Result<(Wheel, Vec<u8>), ArtifactError> {
        let bad = |reason: String| ArtifactError::wheel(path, reason);
        if archive.has_duplicate_names() {
            return Err(bad("it holds the same member name twice".into()));
        }
        let mut members = Vec::with_capacity(archive.len());
        for index in 0..archive.len() {
            let entry = archive.by_index_data(index).map_err(|e| bad(e.to_string()))?;
            let name = std::str::from_utf8(entry.name_raw())
                .map_err(|_| bad("a member's name is not UTF-8".into()))?;
            check_name(path, name)?;
            if entry.is_file() {
                members.push(WheelMember { index, name: name.into(), size: entry.size(), record: None });
            }
        }
        let (distribution, record) = read_record(path, archive, &members)?;
        let found = Digest::of(&record);
        if let Some(expected) = expected.filter(|expected| *expected != found) {
            let file = format!("RECORD in {}", path.display());
            return Err(ArtifactError::DigestMismatch { file, expected, found });
        }
        let by_name: HashMap<_, _> =
            members.iter().enumerate().map(|(at, member)| (member.name.clone(), at)).collect();
        for (name, digest, size) in record::lines(path, &record)? {
            if let Some(at) = by_name.get(&name) {
                members[*at].record = Some((digest, size));
            }
        }
        let mut wheel = Wheel::new(path, found, distribution, members);
        wheel.kernels = wheel.described(archive)?;
        Ok((wheel, record))
    }

    /// A wheel of which only the RECORD is at hand: its members can be found, and not be read.
    pub(crate) fn listed(path: &Path, record: &[u8]) -> Result<Wheel, ArtifactError> {
        let mut members = Vec::new();
        for (name, digest, size) in record::lines(path, record)? {
            check_name(path, &name)?;
            let size =
                size.ok_or_else(|| ArtifactError::wheel(path, format!("RECORD states no size of {name}")))?;
            members.push(WheelMember { index: 0, name, size, record: Some((digest, Some(size))) });
        }
        let folders = members.iter().filter_map(|member| member.name.split_once(".dist-info/"));
        let distribution = folders.map(|(name, _)| name.to_owned()).next().unwrap_or_default();
        let mut wheel = Wheel::new(path, Digest::of(record), distribution, members);
        // The manifest is not at hand; the provider's name says the same.
        if let Some(provider) = wheel.provider()? {
            let architecture =
                kernels::architecture_of(provider).map_err(|e| ArtifactError::wheel(path, e))?;
            wheel.kernels.architectures = vec![architecture];
        }
        Ok(wheel)
    }

    fn new(path: &Path, record_sha256: Digest, distribution: String, members: Vec<WheelMember>) -> Wheel {
        let artifact_hash = artifact_hash(record_sha256);
        let kernels = WheelKernels { version: kernels::version_of(&distribution), ..WheelKernels::default() };
        Wheel { path: path.into(), record_sha256, artifact_hash, distribution, members, kernels }
    }

    /// The provider whose modules the wheel holds, if it is one's.
    fn provider(&self) -> Result<Option<&str>, ArtifactError> {
        kernels::provider(self.module_paths()).map_err(|reason| ArtifactError::wheel(&self.path, reason))
    }

    fn module_paths(&self) -> impl Iterator<Item = ModulePath<'_>> {
        self.members.iter().filter_map(|member| module_path(&member.name))
    }

    /// What an open wheel says of its kernels.
    fn described<R: Read + Seek>(
        &self,
        archive: &mut zip::ZipArchive<R>,
    ) -> Result<WheelKernels, ArtifactError> {
        let version = self.kernels.version;
        let (mut architectures, mut shim_of) = (Vec::new(), Vec::new());
        if let Some(provider) = self.provider()? {
            let bad = |reason: String| ArtifactError::wheel(&self.path, format!("manifest.json: {reason}"));
            let manifest = self.text(archive, |name| kernels::is_manifest(name, provider))?;
            let manifest =
                manifest.ok_or_else(|| bad(format!("there is none of the provider {provider}")))?;
            let modules: BTreeSet<_> = self.module_paths().map(|module| module.name).collect();
            let read = kernels::read_manifest(&manifest, provider, &self.distribution, &modules);
            architectures = read.map_err(bad)?;
        } else if kernels::is_shim(&self.distribution) && self.module_paths().next().is_none() {
            let place = format!("{}.dist-info/METADATA", self.distribution);
            let metadata = self.text(archive, |name| name == place)?.unwrap_or_default();
            shim_of = kernels::read_requirements(&String::from_utf8_lossy(&metadata));
        }
        Ok(WheelKernels { version, architectures, shim_of })
    }

    /// The content of a small member, which must have the digest that RECORD promises.
    fn text<R: Read + Seek>(
        &self,
        archive: &mut zip::ZipArchive<R>,
        is_it: impl Fn(&str) -> bool,
    ) -> Result<Option<Vec<u8>>, ArtifactError> {
        let Some(member) = self.members.iter().find(|member| is_it(&member.name)) else { return Ok(None) };
        let bad = |reason: String| ArtifactError::wheel(&self.path, format!("{}: {reason}", member.name));
        let recorded = self.recorded(member)?;
        if member.size > MAX_DESCRIPTION {
            return Err(bad(format!("it has {} bytes", member.size)));
        }
        let mut bytes = Vec::new();
        let entry = entry(archive, member.index).map_err(bad)?;
        entry.take(member.size + 1).read_to_end(&mut bytes).map_err(|e| bad(e.to_string()))?;
        let found = Digest::of(&bytes);
        if found != recorded.sha256 {
            let file = format!("{} in {}", member.name, self.path.display());
            return Err(ArtifactError::DigestMismatch { file, expected: recorded.sha256, found });
        }
        Ok(Some(bytes))
    }

    /// Its RECORD.
    pub(crate) fn record(&self) -> Result<Vec<u8>, ArtifactError> {
        Ok(Wheel::read(&self.path, &mut open(&self.path)?, Some(self.record_sha256))?.1)
    }

    /// The digest of the wheel's `RECORD`, as a pin may state it.
    pub fn record_sha256(&self) -> Digest {
        self.record_sha256
    }

    /// Where the wheel is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A short digest of `RECORD`: the name of this wheel's folder in the cache.
    pub fn artifact_hash(&self) -> &str {
        &self.artifact_hash
    }

    /// Name and version of the wheel's package, as in `flashinfer_jit_cache-0.6.13+cu130`.
    pub fn distribution(&self) -> &str {
        &self.distribution
    }

    /// The version of FlashInfer whose modules the wheel holds, if it is one of FlashInfer's wheels
    /// and has a released version.
    pub fn version(&self) -> Option<FlashInferVersion> {
        self.kernels.version
    }

    /// What the modules were compiled for, where the wheel is a provider; nothing where it is for all
    /// GPUs.
    pub fn architectures(&self) -> &[CudaArchitecture] {
        &self.kernels.architectures
    }

    /// The architectures of the providers that the wheel requires, where it is a shim, which holds no
    /// module itself.
    pub fn shim_of(&self) -> &[CudaArchitecture] {
        &self.kernels.shim_of
    }

    /// The member, if the wheel holds it.
    ///
    /// # Errors
    /// [`ArtifactError::BadWheel`] when two members fit, when `RECORD` has no digest for it, or
    /// when its two sizes disagree.
    pub fn find(&self, member: &Member) -> Result<Option<Recorded<'_>>, ArtifactError> {
        let suffix = member.suffix();
        let is_it = |name: &str| match member {
            Member::Module(module) => module_path(name).is_some_and(|path| path.name == module),
            _ => has_suffix(name, &suffix),
        };
        let mut fitting = self.members.iter().filter(|member| is_it(&member.name));
        let Some(found) = fitting.next() else {
            return Ok(None);
        };
        if let Some(second) = fitting.next() {
            let reason = format!("both {} and {} are {member}", found.name, second.name);
            return Err(ArtifactError::wheel(&self.path, reason));
        }
        self.recorded(found).map(Some)
    }

    /// A member with its digest.
    fn recorded<'a>(&self, member: &'a WheelMember) -> Result<Recorded<'a>, ArtifactError> {
        let bad = |reason: String| ArtifactError::wheel(&self.path, reason);
        let (sha256, size) =
            member.record.ok_or_else(|| bad(format!("RECORD has no SHA-256 of {}", member.name)))?;
        if let Some(size) = size.filter(|size| *size != member.size) {
            return Err(bad(format!(
                "{} has {} bytes by the central directory and {size} by RECORD",
                member.name, member.size
            )));
        }
        Ok(Recorded { member, sha256, size: member.size })
    }

    /// The names of the modules in the wheel, sorted.
    pub fn modules(&self) -> Vec<String> {
        let mut names: Vec<_> = self.module_paths().map(|module| module.name.to_owned()).collect();
        names.sort();
        names
    }

    /// Reads every member, and compares it with the digest that `RECORD` promises; `step` is told of
    /// the bytes that are read and of all. Only what cannot be in `RECORD` is left out, itself and
    /// its signatures.
    #[cfg(feature = "fetch")]
    pub(crate) fn verify(&self, step: impl Fn(u64, u64)) -> Result<(), ArtifactError> {
        self.verify_in(&mut open(&self.path)?, step)
    }

    /// As [`Wheel::verify`], of an open wheel.
    #[cfg(any(feature = "fetch", test, fuzzing))]
    pub(crate) fn verify_in<R: Read + Seek>(
        &self,
        archive: &mut zip::ZipArchive<R>,
        step: impl Fn(u64, u64),
    ) -> Result<(), ArtifactError> {
        let record = format!("{}.dist-info/RECORD", self.distribution);
        let members = || self.members.iter().filter(|member| !member.name.starts_with(&record));
        let total = members().fold(0u64, |all, member| all.saturating_add(member.size));
        let mut done = 0;
        for member in members() {
            let expected = self.recorded(member)?.sha256;
            let bad = |e: &dyn std::fmt::Display| {
                ArtifactError::wheel(&self.path, format!("member {}: {e}", member.name))
            };
            let entry = entry(archive, member.index).map_err(|e| bad(&e))?;
            let read = Digest::of_reader(&mut entry.take(member.size + 1), |_| ()).map_err(|e| bad(&e))?;
            if read != (expected, member.size) {
                let file = format!("{} in {}", member.name, self.path.display());
                return Err(ArtifactError::DigestMismatch { file, expected, found: read.0 });
            }
            done += member.size;
            step(done, total);
        }
        Ok(())
    }

    /// Streams a member into `sink`.
    pub(crate) fn copy(&self, recorded: Recorded<'_>, sink: &mut Sink) -> Result<(), ArtifactError> {
        self.copy_from(&mut open(&self.path)?, recorded, sink)
    }

    /// Streams a member of an open wheel into `sink`.
    pub(crate) fn copy_from<R: Read + Seek>(
        &self,
        archive: &mut zip::ZipArchive<R>,
        recorded: Recorded<'_>,
        sink: &mut Sink,
    ) -> Result<(), ArtifactError> {
        let name = &recorded.member.name;
        let bad = |e: &dyn std::fmt::Display| ArtifactError::wheel(&self.path, format!("member {name}: {e}"));
        let mut entry = entry(archive, recorded.member.index).map_err(|e| bad(&e))?;
        if entry.name_raw() != name.as_bytes() {
            return Err(bad(&"the file has changed since it was opened"));
        }
        sink.fill(&mut entry, |e| bad(&e))
    }
}

fn has_suffix(path: &str, suffix: &str) -> bool {
    match path.strip_suffix(suffix) {
        Some(rest) => rest.is_empty() || rest.ends_with('/'),
        None => false,
    }
}

fn open(path: &Path) -> Result<zip::ZipArchive<BufReader<File>>, ArtifactError> {
    let file = File::open(path).map_err(|e| ArtifactError::wheel(path, e.to_string()))?;
    archive(path, BufReader::new(file))
}

/// The central directory of a wheel. A wheel has nothing before its first member, so nothing is
/// searched for from front to back.
pub(crate) fn archive<R: Read + Seek>(path: &Path, wheel: R) -> Result<zip::ZipArchive<R>, ArtifactError> {
    let config = zip::read::Config { archive_offset: zip::read::ArchiveOffset::Known(0) };
    zip::ZipArchive::with_config(config, wheel)
        .map_err(|e| ArtifactError::wheel(path, format!("it cannot be read as a zip: {e}")))
}

/// Opens a member for reading, unless it is said to have more bytes compressed than it can: an
/// endless stream need not yield anything, and its digest would never be known.
fn entry<R: Read + Seek>(
    archive: &mut zip::ZipArchive<R>,
    index: usize,
) -> Result<zip::read::ZipFile<'_, R>, String> {
    let entry = archive.by_index(index).map_err(|e| e.to_string())?;
    let (compressed, size) = (entry.compressed_size(), entry.size());
    if compressed.saturating_sub(size) > size / 8 + 1024 {
        return Err(format!("it has {size} bytes, and {compressed} compressed by the central directory"));
    }
    Ok(entry)
}

fn check_name(wheel: &Path, name: &str) -> Result<(), ArtifactError> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.starts_with('/') || name.as_bytes().get(1) == Some(&b':') {
        "it is absolute"
    } else if name.contains('\\') {
        "it holds a backslash"
    } else if name.chars().any(char::is_control) {
        "it holds a control character"
    } else if name.trim_end_matches('/').split('/').any(|c| matches!(c, ".." | "." | "")) {
        "a component of it is empty, `.` or `..`"
    } else {
        return Ok(());
    };
    Err(ArtifactError::UnsafeMember { wheel: wheel.into(), name: name.into(), reason })
}

fn read_record<R: Read + Seek>(
    path: &Path,
    archive: &mut zip::ZipArchive<R>,
    members: &[WheelMember],
) -> Result<(String, Vec<u8>), ArtifactError> {
    let bad = |reason: String| ArtifactError::wheel(path, reason);
    let mut records = members.iter().filter_map(|member| {
        let distribution = member.name.strip_suffix(".dist-info/RECORD")?;
        (!distribution.contains('/')).then_some((distribution, member))
    });
    let (distribution, record) = match (records.next(), records.next()) {
        (Some(record), None) => record,
        (None, _) => return Err(bad("it has no .dist-info/RECORD".into())),
        (Some(_), Some(_)) => return Err(bad("it has more than one .dist-info/RECORD".into())),
    };
    if record.size > MAX_RECORD {
        return Err(bad(format!("its RECORD has {} bytes", record.size)));
    }
    let mut bytes = Vec::new();
    let entry = entry(archive, record.index).map_err(|e| bad(format!("RECORD: {e}")))?;
    entry.take(record.size + 1).read_to_end(&mut bytes).map_err(|e| bad(format!("RECORD: {e}")))?;
    if bytes.len() as u64 != record.size {
        return Err(bad("its RECORD does not have the stated size".into()));
    }
    Ok((distribution.to_owned(), bytes))
}

/// Refuses a wheel whose name says that it is for other machines than Linux on `arch`. A name
/// that says nothing is no reason.
pub(crate) fn check_machine(wheel: &Path, arch: &str) -> Result<(), ArtifactError> {
    let name = wheel.file_name().unwrap_or_default().to_string_lossy();
    let parts: Vec<_> = name.strip_suffix(".whl").unwrap_or_default().split('-').collect();
    // name-version[-build]-python-abi-platform[.platform…]
    let [_, _, .., _, _, platforms] = parts.as_slice() else { return Ok(()) };
    let fits = |platform: &str| {
        let system = platform.strip_suffix(arch).and_then(|system| system.strip_suffix('_'));
        platform == "any" || system.is_some_and(|system| system.contains("linux"))
    };
    if platforms.split('.').any(fits) {
        return Ok(());
    }
    let (found, expected) = ((*platforms).to_owned(), format!("linux_{arch}"));
    Err(ArtifactError::OtherMachine { wheel: wheel.into(), found, expected })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_match_whole_components() {
        let suffix = Member::TvmFfi.suffix();
        assert!(has_suffix("tvm_ffi/lib/libtvm_ffi.so", &suffix));
        assert!(has_suffix("x.data/purelib/tvm_ffi/lib/libtvm_ffi.so", &suffix));
        assert!(!has_suffix("not_tvm_ffi/lib/libtvm_ffi.so", &suffix));
        assert!(!has_suffix("tvm_ffi/lib/libtvm_ffi.so.bak", &suffix));
    }

    #[test]
    fn a_wheels_name_tells_its_machine() {
        let fits = |name: &str| check_machine(Path::new(name), "x86_64").is_ok();
        for name in [
            "w.whl",
            "a-1.whl",
            "a-1-py3-none-any.whl",
            "a-1+b.c-cp39-abi3-linux_x86_64.whl",
            "x/a-1-2-cp39-abi3-manylinux_2_27_aarch64.manylinux_2_28_x86_64.whl",
            "not-a-wheel-of-any-linux_aarch64.zip",
        ] {
            assert!(fits(name), "{name}");
        }
        for platform in
            ["linux_aarch64", "manylinux2014_i686.linux_armv7l", "win_amd64", "macosx_11_0_x86_64"]
        {
            let text = check_machine(Path::new(&format!("a-1-cp39-abi3-{platform}.whl")), "x86_64");
            let text = text.unwrap_err().to_string();
            assert!(text.contains(platform) && text.contains("linux_x86_64"), "{text}");
        }
    }

    #[test]
    fn names_that_leave_their_folder_are_refused() {
        let wheel = Path::new("w.whl");
        for name in ["", "/etc/passwd", "../a", "a/../../b", "a//b", "a\\b", "C:/a", "a\0b", "./a", "a\nb"] {
            assert!(check_name(wheel, name).is_err(), "{name:?}");
        }
        for name in ["a", "a/b.so", "a/", "..a/b..", "a.data/purelib/x"] {
            assert!(check_name(wheel, name).is_ok(), "{name:?}");
        }
    }
}
