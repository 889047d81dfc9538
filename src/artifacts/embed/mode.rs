//! How much a build insists on a bundle: `FLASHINFER_RS_EMBED`.

use super::super::ArtifactError;
use super::Env;

/// How much the build insists on a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Embed what can be had.
    Auto,
    /// Fail when anything is missing.
    Require,
    /// Embed nothing.
    Off,
}

impl Mode {
    /// Reads `FLASHINFER_RS_EMBED`.
    ///
    /// # Errors
    /// [`ArtifactError::Setting`] for any other value.
    pub fn from_env(env: Env<'_>) -> Result<Mode, ArtifactError> {
        let value = env("FLASHINFER_RS_EMBED").unwrap_or_default();
        match value.trim().to_ascii_lowercase().as_str() {
            "" | "auto" => Ok(Mode::Auto),
            "require" => Ok(Mode::Require),
            "off" => Ok(Mode::Off),
            _ => Err(ArtifactError::Setting {
                variable: "FLASHINFER_RS_EMBED",
                value,
                expected: "`auto`, `require` or `off`".into(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_listed_when_one_is_unknown() {
        let env = |_: &str| Some("sometimes".to_owned());
        let text = Mode::from_env(&env).unwrap_err().to_string();
        for want in ["sometimes", "auto", "require", "off"] {
            assert!(text.contains(want), "{text}");
        }
    }
}
