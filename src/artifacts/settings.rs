//! Which package indexes this machine's settings name: those of this crate, uv and pip.

use super::ArtifactError;
use super::http::Address;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

const OWN: &str = "FLASHINFER_RS_INDEX_URL";

/// An index that settings name.
pub(crate) struct Index {
    /// Where it is, or why that is not known.
    pub(crate) address: Result<Address, String>,
    /// The variable or the file that names it.
    pub(crate) told_by: String,
}

/// The indexes to ask, in order: the one of the configuration alone, or all of the machine.
pub(crate) fn indexes(index_url: Option<&str>) -> Result<Vec<Index>, ArtifactError> {
    let env = |name: &str| std::env::var_os(name).map(|value| OsStr::to_string_lossy(&value).into_owned());
    if let Some(url) = index_url.map(str::to_owned).or_else(|| env(OWN).filter(|url| !url.trim().is_empty()))
    {
        let address = Address::of_settings(url.trim()).map_err(|reason| ArtifactError::Setting {
            variable: OWN,
            value: "(not shown: it may hold a password)".into(),
            expected: format!("the address of a package index, here or in StoreConfig::index_url: {reason}"),
        })?;
        return Ok(vec![Index { address: Ok(address), told_by: "the configuration".into() }]);
    }
    let read = |path: &Path| fs::read(path).ok().map(|text| String::from_utf8_lossy(&text).into_owned());
    let named = of_the_machine(&env, &read).into_iter();
    Ok(named.map(|(url, told_by)| Index { address: Address::of_settings(&url), told_by }).collect())
}

/// The addresses of the indexes that uv and pip would ask, and what names them: the default
/// index, then the others.
fn of_the_machine(
    env: &dyn Fn(&str) -> Option<String>,
    read: &dyn Fn(&Path) -> Option<String>,
) -> Vec<(String, String)> {
    let set = |name: &str| env(name).filter(|value| !value.trim().is_empty());
    let pip = match set("PIP_NO_INDEX").is_some_and(|value| is_true(&value)) {
        true => None,
        false => Some(pip_options(&set, read)),
    };
    let of_uv = |name: &str| Some((set(name)?, name.to_owned()));
    let of_pip = |name: &str, key: &str| {
        let options = pip.as_ref()?;
        of_uv(name).or_else(|| options(key))
    };
    let default = of_uv("UV_DEFAULT_INDEX").or_else(|| of_uv("UV_INDEX_URL"));
    let default = default.or_else(|| of_pip("PIP_INDEX_URL", "index-url"));
    let others =
        [of_uv("UV_INDEX"), of_uv("UV_EXTRA_INDEX_URL"), of_pip("PIP_EXTRA_INDEX_URL", "extra-index-url")];
    let mut named: Vec<(String, String)> = Vec::new();
    for (value, told_by) in [default].into_iter().chain(others).flatten() {
        for url in value.split_whitespace().map(unnamed) {
            if named.iter().all(|(known, _)| known != url) {
                named.push((url.into(), told_by.clone()));
            }
        }
    }
    named
}

/// uv writes an index as `name=address`, too.
fn unnamed(value: &str) -> &str {
    match value.split_once('=') {
        Some((name, url)) if !name.contains([':', '/']) => url,
        _ => value,
    }
}

/// A switch as pip reads it.
fn is_true(value: &str) -> bool {
    matches!(value.trim().to_ascii_lowercase().as_str(), "1" | "y" | "yes" | "t" | "true" | "on")
}

/// Options of `pip download` in pip's configuration files, each with the file that it is in.
fn pip_options(
    env: &dyn Fn(&str) -> Option<String>,
    read: &dyn Fn(&Path) -> Option<String>,
) -> impl Fn(&str) -> Option<(String, String)> {
    let files = pip_files(env, read);
    let option = move |key: &str| {
        // Its own section wins, in whichever file it is.
        ["download", "global"].into_iter().find_map(|section| {
            files.iter().find_map(|(file, options)| {
                let mut fitting = options.iter().rev().filter(|o| o.section == section && o.key == key);
                let value = fitting.find(|option| !option.value.trim().is_empty())?.value.clone();
                Some((value, file.display().to_string()))
            })
        })
    };
    move |key: &str| {
        let no_index = option("no-index").is_some_and(|(value, _)| is_true(&value));
        option(key).filter(|_| !no_index)
    }
}

/// What pip's configuration files hold, the strongest first.
fn pip_files(
    env: &dyn Fn(&str) -> Option<String>,
    read: &dyn Fn(&Path) -> Option<String>,
) -> Vec<(PathBuf, Vec<PipOption>)> {
    let mut paths = Vec::new();
    let named = env("PIP_CONFIG_FILE").map(PathBuf::from);
    if named.as_deref() == Some(Path::new("/dev/null")) {
        // pip's own way to say: no configuration at all.
        return Vec::new();
    }
    // One that exists stands for the user's.
    let stands_for_users = named.as_deref().is_some_and(|file| read(file).is_some());
    paths.extend(named);
    paths.extend(env("VIRTUAL_ENV").map(|venv| PathBuf::from(venv).join("pip.conf")));
    if !stands_for_users {
        let home = env("HOME").map(PathBuf::from);
        let config = env("XDG_CONFIG_HOME").map(PathBuf::from);
        let config = config.or_else(|| Some(home.as_ref()?.join(".config")));
        paths.extend(config.map(|folder| folder.join("pip/pip.conf")));
        paths.extend(home.map(|home| home.join(".pip/pip.conf")));
    }
    paths.push("/etc/pip.conf".into());
    let system = env("XDG_CONFIG_DIRS").unwrap_or_else(|| "/etc/xdg".into());
    let system: Vec<_> = std::env::split_paths(&system).map(|folder| folder.join("pip/pip.conf")).collect();
    paths.extend(system.into_iter().rev());
    let read = |path: PathBuf| {
        let options = ini(&read(&path)?);
        Some((path, options))
    };
    paths.into_iter().filter_map(read).collect()
}

/// A line of a configuration file, with those that continue it.
struct PipOption {
    section: String,
    key: String,
    value: String,
}

/// Reads a configuration file as Python's `configparser` does, which pip has: a line that is
/// indented further than its option continues the value; comments have lines of their own. A
/// value in quotes, which pip would take literally, loses them.
fn ini(text: &str) -> Vec<PipOption> {
    let mut options: Vec<PipOption> = Vec::new();
    let (mut section, mut indent, mut open) = (String::new(), 0, false);
    for line in text.trim_start_matches('\u{feff}').lines() {
        let content = line.trim();
        let depth = line.len() - line.trim_start().len();
        if content.is_empty() || content.starts_with(['#', ';']) {
            continue;
        }
        if open && depth > indent {
            if let Some(option) = options.last_mut() {
                option.value.push('\n');
                option.value.push_str(unquoted(content));
            }
            continue;
        }
        (indent, open) = (depth, false);
        if let Some((name, _)) = content.strip_prefix('[').and_then(|name| name.rsplit_once(']')) {
            section = name.into();
        } else if let Some((key, value)) = content.split_once(['=', ':']) {
            let key = key.trim().to_ascii_lowercase().replace('_', "-");
            let key = key.strip_prefix("--").unwrap_or(&key).to_owned();
            options.push(PipOption { section: section.clone(), key, value: unquoted(value.trim()).into() });
            open = true;
        }
    }
    options
}

fn unquoted(value: &str) -> &str {
    let within = |quote| value.strip_prefix(quote)?.strip_suffix(quote);
    within('"').or_else(|| within('\'')).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn named(env: &[(&str, &str)], files: &[(&str, &str)]) -> Vec<(String, String)> {
        let value = |name: &str| {
            let pair = env.iter().find(|(key, _)| *key == name);
            pair.map(|(_, value)| (*value).to_owned())
        };
        let text = |path: &Path| {
            let file = files.iter().find(|(name, _)| Path::new(name) == path);
            file.map(|(_, text)| (*text).to_owned())
        };
        of_the_machine(&value, &text)
    }

    fn urls(env: &[(&str, &str)], files: &[(&str, &str)]) -> Vec<String> {
        named(env, files).into_iter().map(|(url, _)| url).collect()
    }

    #[test]
    fn variables_are_read_in_order() {
        let all = [
            ("UV_DEFAULT_INDEX", "u=https://u/?a=b"),
            ("UV_INDEX_URL", "https://v/"),
            ("PIP_INDEX_URL", " https://p/ "),
            ("UV_INDEX", "w=https://w/ https://x/"),
            ("PIP_EXTRA_INDEX_URL", "https://x/\nhttps://y/"),
        ];
        let files = [("/etc/pip.conf", "[global]\nindex-url=https://f/\nextra-index-url=https://z/")];
        let others = ["https://w/", "https://x/", "https://y/"];
        for (from, first) in [(0, "https://u/?a=b"), (1, "https://v/"), (2, "https://p/"), (3, "https://f/")]
        {
            assert_eq!(urls(&all[from..], &files), [&[first], &others[..]].concat());
        }
        assert_eq!(urls(&[("PIP_NO_INDEX", "1"), all[2], all[3]], &files), ["https://w/", "https://x/"]);
        assert_eq!(urls(&[("UV_DEFAULT_INDEX", " ")], &files), ["https://f/", "https://z/"]);
        assert_eq!(named(&all[2..3], &[]), [("https://p/".to_owned(), "PIP_INDEX_URL".to_owned())]);
    }

    #[test]
    fn files_are_read_as_pip_reads_them() {
        let index = |name: &str| format!("[global]\nindex-url = https://{name}/\n");
        let texts = [
            "/c",
            "/v/pip.conf",
            "/h/.config/pip/pip.conf",
            "/h/.pip/pip.conf",
            "/etc/pip.conf",
            "/b/pip/pip.conf",
            "/a/pip/pip.conf",
        ]
        .map(|path| (path, index(path.trim_start_matches('/').replace(['/', '.'], "-").as_str())));
        let files = texts.each_ref().map(|(path, text)| (*path, text.as_str()));
        let env =
            [("PIP_CONFIG_FILE", "/c"), ("VIRTUAL_ENV", "/v"), ("HOME", "/h"), ("XDG_CONFIG_DIRS", "/a:/b")];
        for from in 0..files.len() {
            let want = format!("https://{}/", files[from].0.trim_start_matches('/').replace(['/', '.'], "-"));
            assert_eq!(urls(&env, &files[from..]), [want]);
        }
        // A file that is named stands for the user's, and /dev/null for all.
        assert_eq!(urls(&env, &[("/c", ""), files[2], files[4]]), ["https://etc-pip-conf/"]);
        assert!(urls(&[("PIP_CONFIG_FILE", "/dev/null"), ("HOME", "/h")], &files).is_empty());
        // The section of the command wins over files that are stronger.
        let own = ("/etc/pip.conf", "[download]\nindex-url=https://d/");
        assert_eq!(urls(&env, &[files[0], own]), ["https://d/"]);
        let none = ("/etc/pip.conf", "[global]\nno-index = true");
        assert!(urls(&env, &[files[0], none]).is_empty());
    }

    #[test]
    fn the_syntax_is_that_of_configparser() {
        let index = |text: &str| urls(&[], &[("/etc/pip.conf", text)]);
        for (text, want) in [
            ("[global]\nindex-url=https://i/", "https://i/"),
            ("[global]\nindex_url : https://i:8/s?a=b;c#d", "https://i:8/s?a=b;c#d"),
            ("[global]\n--INDEX-URL = https://i/", "https://i/"),
            ("\u{feff}[global] ; note\r\nindex-url = \"https://i/\"\r\n", "https://i/"),
            ("[global]\nindex-url = 'https://i/'", "https://i/"),
            ("[global]\nindex-url =\n    https://i/\n", "https://i/"),
            ("[global]\n  index-url = https://i/\n  timeout = 5", "https://i/"),
            ("[global]\ntimeout = 5\n  index-url = https://no/\nindex-url = https://i/", "https://i/"),
            ("[install]\nindex-url=https://no/\n[global]\n# x\nindex-url=https://i/", "https://i/"),
            ("[global]\nindex-url=https://no/\nindex-url=https://i/\nindex-url=", "https://i/"),
        ] {
            assert_eq!(index(text), [want], "{text:?}");
        }
        let two = "[global]\nextra-index-url =\n    https://a/\n    # no\n\n    https://b/";
        assert_eq!(index(two), ["https://a/", "https://b/"]);
        for none in [
            "",
            "index-url=https://no/",
            "[Global]\nindex-url=https://no/",
            "[",
            "[]\n=\n:",
            "[global]\nindex-url",
        ] {
            assert!(index(none).is_empty(), "{none:?}");
        }
    }

    proptest! {
        #[test]
        fn any_file_is_read(text in r#"(\[global\]|index-url|[=:"'#; \n\t\[\]]|\PC){0,60}"#) {
            let _ = urls(&[("UV_INDEX", &text)], &[("/etc/pip.conf", &text)]);
        }
    }
}
