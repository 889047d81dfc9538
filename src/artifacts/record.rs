//! A wheel's `RECORD`: the digest and the size of each member.

use super::ArtifactError;
use super::digest::Digest;
use std::collections::HashSet;
use std::path::Path;

/// Length of the short hexadecimal digest that names a wheel's folder in the cache.
pub(crate) const ARTIFACT_HASH_LEN: usize = 24;

/// No wheel's RECORD is larger.
pub(crate) const MAX_RECORD: u64 = 64 << 20;

/// The folder in the cache for what a wheel with this RECORD holds.
pub(crate) fn artifact_hash(record_sha256: Digest) -> String {
    let mut hash = record_sha256.to_string();
    hash.truncate(ARTIFACT_HASH_LEN);
    hash
}

/// The lines of `RECORD` that state a SHA-256: path, digest, size if there is one.
pub(crate) fn lines(
    wheel: &Path,
    record: &[u8],
) -> Result<Vec<(String, Digest, Option<u64>)>, ArtifactError> {
    let bad = |reason: String| ArtifactError::wheel(wheel, reason);
    let record = std::str::from_utf8(record).map_err(|_| bad("RECORD is not UTF-8".into()))?;
    let (mut lines, mut names) = (Vec::new(), HashSet::new());
    for line in record.lines().filter(|line| !line.trim().is_empty()) {
        let (name, digest, size) =
            read_line(line).ok_or_else(|| bad(format!("RECORD has the line {line:?}")))?;
        let Some(digest) = digest else { continue };
        if !names.insert(name.clone()) {
            return Err(bad(format!("RECORD lists {name} twice")));
        }
        lines.push((name, digest, size));
    }
    Ok(lines)
}

/// One line of `RECORD`: path, SHA-256 if there is one, size if there is one.
fn read_line(line: &str) -> Option<(String, Option<Digest>, Option<u64>)> {
    let (name, rest) = match line.strip_prefix('"') {
        None => {
            let (name, rest) = line.split_once(',')?;
            (name.to_owned(), rest)
        }
        Some(quoted) => {
            let (mut name, mut rest) = (String::new(), quoted);
            loop {
                let (part, after) = rest.split_once('"')?;
                name.push_str(part);
                match after.strip_prefix('"') {
                    Some(more) => {
                        name.push('"');
                        rest = more;
                    }
                    None => break (name, after.strip_prefix(',')?),
                }
            }
        }
    };
    let (digest, size) = rest.split_once(',')?;
    let digest = match digest.split_once('=') {
        Some(("sha256", digest)) => Some(Digest::from_base64(digest)?),
        Some(_) => None,
        None if digest.is_empty() => None,
        None => return None,
    };
    let size = match size.trim() {
        "" => None,
        size => Some(size.parse().ok()?),
    };
    Some((name, digest, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_lines_are_read_with_csv_quoting() {
        let digest = Digest::of(b"");
        let hash = "sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU";
        for (line, name, want, size) in [
            (format!("a/b.so,{hash},0"), "a/b.so", Some(digest), Some(0)),
            (format!("\"a,\"\"b\"\".so\",{hash},7"), "a,\"b\".so", Some(digest), Some(7)),
            ("x/RECORD,,".into(), "x/RECORD", None, None),
            ("a,md5=00,3".into(), "a", None, Some(3)),
        ] {
            assert_eq!(read_line(&line), Some((name.into(), want, size)), "{line}");
        }
        for line in ["a", "a,sha256=xx,1", "\"a,,", "a,nonsense,1", "a,,many"] {
            assert_eq!(read_line(line), None, "{line}");
        }
    }
}
