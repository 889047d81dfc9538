//! Versions of FlashInfer.

use std::fmt;

/// A released version of FlashInfer, as in `0.7.4` or `0.6.18.post1`.
///
/// Names of modules, and the arguments that their functions take, differ by version. The wheel that
/// holds a module tells which it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlashInferVersion {
    major: u32,
    minor: u32,
    patch: u32,
    /// 0 for the release itself.
    post: u32,
}

impl FlashInferVersion {
    /// The versions whose kernels this crate calls, from the oldest on. `docs/soundness.md` says of
    /// each what its kernels need; a wheel of another version is refused.
    pub const CALLED: [FlashInferVersion; 2] =
        [FlashInferVersion::new(0, 6, 13), FlashInferVersion::new(0, 7, 4)];

    /// The oldest of them, which has every family of modules.
    pub const OLDEST: FlashInferVersion = FlashInferVersion::CALLED[0];

    /// The newest of them.
    pub const NEWEST: FlashInferVersion = FlashInferVersion::CALLED[FlashInferVersion::CALLED.len() - 1];

    /// The version that wheels are split by architecture from: one provider for each.
    pub const PROVIDERS: FlashInferVersion = FlashInferVersion::new(0, 7, 0);

    /// A version, as in `new(0, 7, 4)`.
    pub const fn new(major: u32, minor: u32, patch: u32) -> FlashInferVersion {
        FlashInferVersion { major, minor, patch, post: 0 }
    }

    /// A release after that version, as in `new(0, 6, 18).post(1)`.
    #[must_use]
    pub const fn post(self, post: u32) -> FlashInferVersion {
        FlashInferVersion { post, ..self }
    }

    /// Reads `0.7.4` or `0.6.18.post1`, also with a label, as in `0.7.4+cu130`. `None` for
    /// anything else, such as what precedes a release.
    pub fn parse(text: &str) -> Option<FlashInferVersion> {
        let number = |text: &str| {
            text.bytes().all(|digit| digit.is_ascii_digit()).then(|| text.parse().ok()).flatten()
        };
        let (text, _) = text.split_once('+').unwrap_or((text, ""));
        let (text, post) = match text.split_once(".post") {
            Some((text, post)) => (text, number(post)?),
            None => (text, 0),
        };
        let mut parts = text.split('.').map(number);
        let version = FlashInferVersion::new(parts.next()??, parts.next()??, parts.next()??).post(post);
        parts.next().is_none().then_some(version)
    }

    /// The expression of this value, for generated code.
    pub(crate) fn code(self) -> String {
        let FlashInferVersion { major, minor, patch, post } = self;
        format!("FlashInferVersion::new({major}, {minor}, {patch}).post({post})")
    }

    /// Whether this crate calls its kernels.
    pub fn is_called(self) -> bool {
        FlashInferVersion::CALLED.contains(&self)
    }
}

impl fmt::Display for FlashInferVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)?;
        match self.post {
            0 => Ok(()),
            post => write!(f, ".post{post}"),
        }
    }
}

/// The versions that this crate calls, in words: "0.6.13 and 0.7.4".
pub(crate) fn called() -> String {
    FlashInferVersion::CALLED.map(|version| version.to_string()).join(" and ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_written() {
        for text in ["0.6.13", "0.6.18.post1", "0.7.4", "1.10.0"] {
            let version = FlashInferVersion::parse(text).unwrap();
            assert_eq!(version.to_string(), text);
            assert_eq!(FlashInferVersion::parse(&format!("{text}+cu130")), Some(version));
        }
        for text in ["", "0.7", "0.7.4.1", "0.7.4rc1", "0.8.0.dev20261101", "v0.7.4", "0.7.4.post", "0.+7.4"]
        {
            assert_eq!(FlashInferVersion::parse(text), None, "{text}");
        }
    }

    #[test]
    fn versions_are_in_the_order_of_their_release() {
        let ordered =
            ["0.6.13", "0.6.16", "0.6.16.post3", "0.6.18", "0.7.0", "0.7.2.post1", "0.7.4", "0.10.0"];
        let ordered = ordered.map(|text| FlashInferVersion::parse(text).unwrap());
        assert!(ordered.is_sorted_by(|a, b| a < b));
        assert!(FlashInferVersion::CALLED.is_sorted());
    }
}
