//! Whether a build may download.

use super::super::ArtifactError;
use super::super::config::flag;
use super::Build;
use super::command::Purpose;
use super::machine::sign_of_cuda;
use super::mode::Mode;
use std::fmt;

/// Why a build script does not download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoNetwork {
    /// A setting of the environment or an option of cargo.
    Offline(&'static str),
    /// By [`Mode::Auto`]: no kernel runs on this machine.
    NoCuda,
    /// The command needs no linked program, so it does not wait for one.
    OnlyChecks,
    /// The cache folder cannot be written.
    NoCache,
}

impl fmt::Display for NoNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NoNetwork::Offline(why) => why,
            NoNetwork::NoCuda => "this machine has neither NVIDIA's driver nor a CUDA toolkit",
            NoNetwork::OnlyChecks => {
                "checks and editors do not wait for downloads; FLASHINFER_RS_EMBED=require makes a \
                 build fetch it"
            }
            NoNetwork::NoCache => "the cache folder cannot be written",
        })
    }
}

/// Whether and why a build script must not download.
///
/// # Errors
/// [`ArtifactError::Setting`] when a switch is neither on nor off.
pub(super) fn no_network(build: &Build<'_>, mode: Mode) -> Result<Option<NoNetwork>, ArtifactError> {
    let env = build.env;
    if env("DOCS_RS").is_some() {
        return Ok(Some(NoNetwork::Offline("docs.rs has no network (DOCS_RS)")));
    }
    let by_editor = ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER"].into_iter().filter_map(env);
    let by_editor = by_editor.into_iter().any(|set| set.contains("rust-analyzer") || set.contains("clippy"));
    let only_checks = match build.command.purpose() {
        Purpose::Checks => true,
        Purpose::Builds => by_editor,
        // Waiting for what nobody asked for is worse than leaving it out.
        Purpose::Unknown => by_editor || mode == Mode::Auto,
    };
    if only_checks && mode == Mode::Require {
        return Ok(Some(NoNetwork::OnlyChecks));
    }
    for (variable, why) in [
        ("FLASHINFER_RS_OFFLINE", "FLASHINFER_RS_OFFLINE forbids it"),
        ("CARGO_NET_OFFLINE", "CARGO_NET_OFFLINE forbids it"),
    ] {
        if flag(variable, env(variable).as_deref())? {
            return Ok(Some(NoNetwork::Offline(why)));
        }
    }
    if build.command.offline() {
        return Ok(Some(NoNetwork::Offline("cargo is offline (--offline, --frozen or net.offline)")));
    }
    if mode == Mode::Auto && sign_of_cuda(build.root, env).is_none() {
        return Ok(Some(NoNetwork::NoCuda));
    }
    Ok(only_checks.then_some(NoNetwork::OnlyChecks))
}

#[cfg(test)]
mod tests {
    use super::super::{CargoCommand, Env};
    use super::*;
    use std::fs;
    use std::path::Path;

    /// Why a build by `line` does not download.
    fn reason(env: Env<'_>, line: &str, root: &Path, mode: Mode) -> Result<Option<NoNetwork>, ArtifactError> {
        let words = line.split(' ').map(str::to_owned).collect();
        let command = CargoCommand::new(words, Path::new("/no/such/folder"), env);
        let target = ("linux", "x86_64");
        let build = Build { env, command, root, progress: None, out_dir: root, target, embed: true };
        no_network(&build, mode)
    }

    /// A machine with NVIDIA's driver.
    fn able() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("proc/driver/nvidia")).unwrap();
        root
    }

    #[test]
    fn only_builds_on_machines_with_cuda_download() {
        let (able, bare) = (able(), tempfile::tempdir().unwrap());
        let (env, only_checks) = (|_: &str| None, Some(NoNetwork::OnlyChecks));
        for (line, auto, require) in [
            ("cargo build", None, None),
            ("cargo r --release", None, None),
            ("cargo check", only_checks, only_checks),
            ("cargo clippy", only_checks, only_checks),
            // Nobody knows what these are for.
            ("cargo xb", only_checks, None),
            ("bazel", only_checks, None),
        ] {
            assert_eq!(reason(&env, line, able.path(), Mode::Auto).unwrap(), auto, "{line}");
            assert_eq!(reason(&env, line, able.path(), Mode::Require).unwrap(), require, "{line}");
            let without = reason(&env, line, bare.path(), Mode::Auto).unwrap();
            assert_eq!(without, Some(NoNetwork::NoCuda), "{line}");
            assert_eq!(reason(&env, line, bare.path(), Mode::Require).unwrap(), require, "{line}");
        }
        for line in ["cargo build --offline", "cargo run --frozen"] {
            let found = reason(&env, line, able.path(), Mode::Auto).unwrap();
            assert!(matches!(found, Some(NoNetwork::Offline(_))), "{line}");
        }
    }

    #[test]
    fn the_environment_forbids_downloads() {
        let able = able();
        for (name, value, offline) in [
            ("DOCS_RS", "1", true),
            ("CARGO_NET_OFFLINE", "true", true),
            ("CARGO_NET_OFFLINE", "false", false),
            ("FLASHINFER_RS_OFFLINE", "1", true),
            ("FLASHINFER_RS_OFFLINE", "0", false),
            ("RUSTC_WRAPPER", "/x/rust-analyzer", true),
            ("RUSTC_WRAPPER", "sccache", false),
        ] {
            let env = |asked: &str| (asked == name).then(|| value.to_owned());
            let found = reason(&env, "cargo build", able.path(), Mode::Auto).unwrap();
            assert_eq!(found.is_some(), offline, "{name}={value}");
        }
        let env = |asked: &str| (asked == "FLASHINFER_RS_OFFLINE").then(|| "maybe".to_owned());
        assert!(reason(&env, "cargo build", able.path(), Mode::Auto).is_err());
    }
}
