//! The files that a build generates.

use super::super::digest::Digest;
use super::super::{ArtifactError, Located};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// The generated files. What an earlier build left is removed first.
pub(super) struct Bundle {
    out_dir: PathBuf,
    code: String,
    count: usize,
}

impl Bundle {
    /// An empty bundle.
    pub(super) fn start(out_dir: &Path) -> Result<Bundle, ArtifactError> {
        let folder = out_dir.join("bundle");
        let failed = |e| ArtifactError::cache(&folder, "prepare the folder", e);
        match fs::remove_dir_all(&folder) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
            _ => fs::create_dir_all(&folder).map_err(failed)?,
        }
        Ok(Bundle { out_dir: out_dir.into(), code: String::new(), count: 0 })
    }

    /// How many members there are.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Adds a member that lies in the cache.
    pub(super) fn add(&mut self, located: &Located) -> Result<(), ArtifactError> {
        let Located { path, member, version, architectures, .. } = located;
        let output = self.out_dir.join(format!("bundle/{}.zst", self.count));
        let (sha256, size) =
            compress(path, &output).map_err(|e| ArtifactError::cache(&output, "write", e))?;
        // <cache>/<artifact hash>/<name>/<file>
        let folder = path.ancestors().nth(2).and_then(Path::file_name);
        let artifact_hash = folder.unwrap_or_default().to_string_lossy();
        let _ = writeln!(
            self.code,
            "    BundledMember {{ suffix: {:?}, artifact_hash: {artifact_hash:?}, \
             version: {}, architectures: &[{}], sha256: Digest::new({:?}), size: {size}, \
             zstd: include_bytes!(concat!(env!(\"OUT_DIR\"), \"/bundle/{}.zst\")) }},",
            member.suffix(),
            version.map_or_else(|| "None".into(), |version| format!("Some({})", version.code())),
            architectures.iter().map(|architecture| architecture.code() + ", ").collect::<String>(),
            sha256.as_bytes(),
            self.count
        );
        self.count += 1;
        Ok(())
    }

    /// Writes the code that includes the members.
    pub(super) fn finish(self) -> Result<(), ArtifactError> {
        let path = self.out_dir.join("bundle.rs");
        let code = format!("pub(super) static BUNDLE: &[BundledMember] = &[\n{}];\n", self.code);
        fs::write(&path, code).map_err(|e| ArtifactError::cache(&path, "write", e))
    }
}

fn compress(from: &Path, to: &Path) -> io::Result<(Digest, u64)> {
    const LEVEL: i32 = 6;
    struct Tee<'a> {
        encoder: zstd::stream::write::Encoder<'a, File>,
        input: File,
    }
    impl io::Read for Tee<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let n = self.input.read(buffer)?;
            io::Write::write_all(&mut self.encoder, &buffer[..n])?;
            Ok(n)
        }
    }
    let encoder = zstd::stream::write::Encoder::new(File::create(to)?, LEVEL)?;
    let input = File::open(from)?;
    let mut tee = Tee { encoder, input };
    let hashed = Digest::of_reader(&mut tee, |_| ())?;
    tee.encoder.finish()?;
    Ok(hashed)
}
