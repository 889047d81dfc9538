//! The cargo command that runs the build: whether it may wait for a download.
//!
//! Cargo shares one run of a build script between `check` and `build`, and tells it neither. So
//! this reads the command line of the process that started the script, which is cargo: what looks
//! like a further program (`cargo clippy`, `cargo nextest`, an editor) starts cargo anew. An alias
//! is looked up where cargo does.

use super::Env;
use std::fs;
use std::path::{Path, PathBuf};

/// Commands that make programs. Cargo lets nobody redefine them.
const BUILDS: [&str; 6] = ["build", "run", "test", "bench", "install", "rustc"];
/// Commands that make none.
const CHECKS: [&str; 7] = ["check", "clippy", "doc", "fix", "package", "publish", "rustdoc"];
/// Cargo's own aliases, which can be redefined.
const SHORT: [(&str, &str); 5] = [("b", "build"), ("c", "check"), ("d", "doc"), ("r", "run"), ("t", "test")];

/// What a command is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// It makes programs.
    Builds,
    /// It only looks at the code.
    Checks,
    /// Nobody knows.
    Unknown,
}

/// A cargo command, with its aliases expanded.
#[derive(Clone, Debug, Default)]
pub struct CargoCommand {
    words: Vec<String>,
    folder: PathBuf,
    offline: bool,
}

impl CargoCommand {
    /// The command that started this process, as far as the system tells it.
    pub fn of_parent(env: Env<'_>) -> CargoCommand {
        #[cfg(target_os = "linux")]
        {
            let parent = PathBuf::from(format!("/proc/{}", std::os::unix::process::parent_id()));
            let bytes = fs::read(parent.join("cmdline")).unwrap_or_default();
            let words = bytes.split(|byte| *byte == 0).filter(|word| !word.is_empty());
            let words = words.map(|word| String::from_utf8_lossy(word).into_owned()).collect();
            let folder = fs::read_link(parent.join("cwd")).unwrap_or_default();
            CargoCommand::new(words, &folder, env)
        }
        #[cfg(not(target_os = "linux"))]
        CargoCommand::new(Vec::new(), Path::new(""), env)
    }

    /// A command line, as it was given in `folder`.
    pub fn new(mut words: Vec<String>, folder: &Path, env: Env<'_>) -> CargoCommand {
        let settings = Settings::read(&words, folder, env);
        let mut expanded = Vec::new();
        while let Some(at) = subcommand(&words)
            && !expanded.contains(&words[at])
            && let Some(meaning) = settings.alias(&words[at], env)
        {
            expanded.push(words[at].clone());
            words.splice(at..=at, meaning);
        }
        let own = words.iter().take_while(|word| *word != "--");
        let offline = own.into_iter().any(|word| word == "--offline" || word == "--frozen");
        CargoCommand { folder: folder.into(), offline: offline || settings.offline(), words }
    }

    /// What the command is for.
    pub fn purpose(&self) -> Purpose {
        match subcommand(&self.words).map(|at| self.words[at].as_str()) {
            Some(name) if BUILDS.contains(&name) => Purpose::Builds,
            Some(name) if CHECKS.contains(&name) => Purpose::Checks,
            _ => Purpose::Unknown,
        }
    }

    /// Whether cargo was told to stay off the network, by an option or a configuration file.
    pub fn offline(&self) -> bool {
        self.offline
    }

    /// The folder that cargo was started in.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Where the subcommand of a cargo command line is.
fn subcommand(words: &[String]) -> Option<usize> {
    let program = Path::new(words.first()?).file_stem()?.to_string_lossy();
    if !program.starts_with("cargo") {
        return None;
    }
    let mut at = 1;
    loop {
        match words.get(at)?.as_str() {
            "--config" | "-C" | "-Z" | "--color" => at += 2,
            word if word.starts_with(['-', '+']) => at += 1,
            _ => return Some(at),
        }
    }
}

/// Cargo's configuration: of the command line, then of files, the nearest first.
struct Settings(Vec<toml::Table>);

impl Settings {
    fn read(words: &[String], folder: &Path, env: Env<'_>) -> Settings {
        let read = |path: PathBuf| toml::from_str(&fs::read_to_string(path).ok()?).ok();
        let given = words.windows(2).filter(|pair| pair[0] == "--config").map(|pair| pair[1].as_str());
        let given = given.chain(words.iter().filter_map(|word| word.strip_prefix("--config=")));
        let given: Vec<_> =
            given.filter_map(|text| toml::from_str(text).ok().or(read(folder.join(text)))).collect();
        let home = env("CARGO_HOME").map(PathBuf::from).or_else(|| Some(dirs::home_dir()?.join(".cargo")));
        let folders = folder.ancestors().map(|folder| folder.join(".cargo")).chain(home);
        let files =
            folders.filter_map(|folder| read(folder.join("config")).or(read(folder.join("config.toml"))));
        // Of options, the last holds.
        Settings(given.into_iter().rev().chain(files).collect())
    }

    fn get(&self, table: &str, key: &str) -> Option<&toml::Value> {
        self.0.iter().find_map(|settings| settings.get(table)?.get(key))
    }

    /// What an alias stands for; `None` for what is none.
    fn alias(&self, name: &str, env: Env<'_>) -> Option<Vec<String>> {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
        if BUILDS.contains(&name) || CHECKS.contains(&name) {
            return None;
        }
        if let Some(text) = env(&format!("CARGO_ALIAS_{}", name.to_uppercase().replace('-', "_"))) {
            return Some(words(&text));
        }
        match self.get("alias", name) {
            Some(toml::Value::String(text)) => Some(words(text)),
            Some(toml::Value::Array(list)) => {
                list.iter().map(|word| word.as_str().map(str::to_owned)).collect()
            }
            _ => SHORT.iter().find(|(short, _)| *short == name).map(|(_, long)| vec![(*long).into()]),
        }
    }

    fn offline(&self) -> bool {
        self.get("net", "offline").and_then(toml::Value::as_bool).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(line: &str, folder: &Path) -> CargoCommand {
        let words = line.split(' ').map(str::to_owned).collect();
        CargoCommand::new(words, folder, &|name| (name == "CARGO_HOME").then(|| "/no/such/folder".into()))
    }

    #[test]
    fn commands_are_told_apart() {
        for (line, want) in [
            ("cargo check", Purpose::Checks),
            ("/x/bin/cargo --color always c --all", Purpose::Checks),
            ("cargo +nightly -q clippy", Purpose::Checks),
            ("cargo doc", Purpose::Checks),
            ("cargo --config a=1 fix", Purpose::Checks),
            ("cargo check --quiet --workspace --message-format=json --all-targets", Purpose::Checks),
            ("cargo build", Purpose::Builds),
            ("cargo b --release", Purpose::Builds),
            ("cargo -C folder r", Purpose::Builds),
            ("cargo test check", Purpose::Builds),
            ("cargo unknown", Purpose::Unknown),
            ("make check", Purpose::Unknown),
            ("cargo", Purpose::Unknown),
        ] {
            assert_eq!(command(line, Path::new("/no/such/folder")).purpose(), want, "{line}");
        }
        assert_eq!(CargoCommand::default().purpose(), Purpose::Unknown);
    }

    #[test]
    fn aliases_are_what_cargo_takes_them_for() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("workspace/member");
        fs::create_dir_all(inner.join(".cargo")).unwrap();
        fs::create_dir_all(root.path().join(".cargo")).unwrap();
        let config = "[alias]\nck = 'check --all'\nb = 'check'\nxb = ['build', '--offline']\nck2 = 'ck'\n\
                      check = 'build'\nround = 'round'\nx = 'other'\n";
        fs::write(root.path().join(".cargo/config.toml"), config).unwrap();
        fs::write(inner.join(".cargo/config"), "[alias]\nx = 'run'\n").unwrap();
        for (line, want) in [
            ("cargo ck", Purpose::Checks),
            ("cargo ck2 -v", Purpose::Checks),
            ("cargo b", Purpose::Checks),
            ("cargo r", Purpose::Builds),
            ("cargo xb", Purpose::Builds),
            ("cargo x", Purpose::Builds),
            // Cargo warns of this one, and checks.
            ("cargo check", Purpose::Checks),
            ("cargo round", Purpose::Unknown),
            ("cargo --config alias.y='check' y", Purpose::Checks),
        ] {
            assert_eq!(command(line, &inner).purpose(), want, "{line}");
        }
        assert_eq!(command("cargo x", root.path()).purpose(), Purpose::Unknown);
        assert!(command("cargo xb", &inner).offline() && !command("cargo x", &inner).offline());
        let env = |name: &str| (name == "CARGO_ALIAS_MY_CK").then(|| "check".to_owned());
        let words = vec!["cargo".into(), "my-ck".into()];
        assert_eq!(CargoCommand::new(words, &inner, &env).purpose(), Purpose::Checks);
    }

    #[test]
    fn offline_is_an_option_or_a_setting() {
        let root = tempfile::tempdir().unwrap();
        for (line, want) in [
            ("cargo build --offline", true),
            ("cargo --frozen run", true),
            ("cargo run -- --offline", false),
            ("cargo --config net.offline=true build", true),
            ("cargo build --config=net.offline=true", true),
            ("cargo build", false),
        ] {
            assert_eq!(command(line, root.path()).offline(), want, "{line}");
        }
        fs::create_dir(root.path().join(".cargo")).unwrap();
        fs::write(root.path().join(".cargo/config.toml"), "[net]\noffline = true\n").unwrap();
        assert!(command("cargo build", root.path()).offline());
        assert!(!command("cargo --config net.offline=false build", root.path()).offline());
    }
}
