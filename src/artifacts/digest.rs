//! SHA-256 digests and the two ways in which wheels and pins write them.

use sha2::Digest as _;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};

/// A SHA-256 digest. Displays as lower-case hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// A digest from its bytes.
    pub const fn new(bytes: [u8; 32]) -> Digest {
        Digest(bytes)
    }

    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(sha2::Sha256::digest(bytes).into())
    }

    /// The digest and the length of what `reader` yields; `step` is called with the bytes so far.
    ///
    /// # Errors
    /// Those of reading.
    pub fn of_reader(reader: &mut impl Read, mut step: impl FnMut(u64)) -> io::Result<(Digest, u64)> {
        let mut hasher = Hasher::default();
        pump(
            reader,
            |e| e,
            |bytes| {
                hasher.update(bytes);
                step(hasher.len());
                Ok(())
            },
        )?;
        Ok((hasher.digest(), hasher.len()))
    }

    /// The digest and the length of an open file, from its current position.
    ///
    /// # Errors
    /// Those of reading.
    pub fn of_file(mut file: &File) -> io::Result<(Digest, u64)> {
        Digest::of_reader(&mut file, |_| ())
    }

    /// Reads 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Digest> {
        let text = text.as_bytes();
        if text.len() != 64 {
            return None;
        }
        let nibble = |c: u8| (c as char).to_digit(16);
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
            *byte = (nibble(pair[0])? * 16 + nibble(pair[1])?) as u8;
        }
        Some(Digest(bytes))
    }

    /// Reads the URL-safe base64 of `RECORD`, with or without padding.
    pub fn from_base64(text: &str) -> Option<Digest> {
        let text = text.trim_end_matches('=');
        let (mut bytes, mut bits, mut held) = (Vec::with_capacity(33), 0u32, 0u32);
        for c in text.bytes() {
            let value = match c {
                b'A'..=b'Z' => c - b'A',
                b'a'..=b'z' => c - b'a' + 26,
                b'0'..=b'9' => c - b'0' + 52,
                b'-' => 62,
                b'_' => 63,
                _ => return None,
            };
            bits = (bits << 6) | u32::from(value);
            held += 6;
            if held >= 8 {
                held -= 8;
                bytes.push((bits >> held) as u8);
                bits &= (1 << held) - 1;
            }
        }
        (bits == 0).then_some(())?;
        bytes.try_into().ok().map(Digest)
    }

    /// The digest's bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Hashes and counts bytes as they pass.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hasher {
    state: sha2::Sha256,
    len: u64,
}

impl Hasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.state.update(bytes);
        self.len += bytes.len() as u64;
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The digest of the bytes so far.
    pub(crate) fn digest(&self) -> Digest {
        Digest(self.state.clone().finalize().into())
    }
}

/// Reads to the end and hands each piece on.
pub(crate) fn pump<E>(
    reader: &mut (impl Read + ?Sized),
    unreadable: impl Fn(io::Error) -> E,
    mut take: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; 1 << 17];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => take(&buffer[..n])?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(unreadable(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_and_base64_name_the_same_digest() {
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let base64 = "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU";
        let digest = Digest::of(b"");
        assert_eq!(digest.to_string(), hex);
        assert_eq!(Digest::from_hex(hex), Some(digest));
        assert_eq!(Digest::from_base64(base64), Some(digest));
        assert_eq!(Digest::from_base64(&format!("{base64}=")), Some(digest));
    }

    #[test]
    fn malformed_digests_are_refused() {
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        for bad in ["", "e3", &hex[1..], &hex.replace('e', "g"), &hex.replace("e3", "é")] {
            assert_eq!(Digest::from_hex(bad), None, "{bad}");
        }
        let base64 = "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU";
        for bad in ["", "47DE", &base64[1..], &base64.replace('-', "+"), &base64.replace("FU", "FV")] {
            assert_eq!(Digest::from_base64(bad), None, "{bad}");
        }
    }
}
