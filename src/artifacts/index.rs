//! Registry packages by name.
//!
//! A pin names a package, never a host. The machine's own settings say where packages come from:
//! an index address, read here as a simple index (the HTML form of PEP 503 or the JSON form of
//! PEP 691), and where that does not help, pip, which knows the machine's default index, its
//! proxies and its certificates. Whatever the way, only a file with the pin's digest is accepted.

use super::cache::{Cache, Tell};
use super::fetch::{self, Address, adopt, download, percent_decode};
use super::pins::Pin;
use super::{ArtifactError, Digest, FetchOptions, Progress};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use ureq::ResponseExt;
use ureq::http::header;

const MAX_PAGE: u64 = 64 << 20;
const ACCEPT: &str = "application/vnd.pypi.simple.v1+json, \
                      application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1";

/// A package to obtain.
pub(crate) struct Request<'a> {
    pub(crate) package: &'a str,
    pub(crate) version: &'a str,
    pub(crate) arch: &'a str,
    pub(crate) index_url: Option<&'a str>,
}

/// Obtains a package: from the index of the settings, else with pip.
pub(crate) fn obtain(
    cache: &Cache,
    pin: &Pin,
    request: &Request<'_>,
    options: &FetchOptions,
    tell: Tell<'_>,
) -> Result<PathBuf, ArtifactError> {
    let mut reasons = Vec::new();
    if let Some((url, told_by)) = index(request.index_url) {
        let found = find(&url, request.package, pin, options);
        match found.and_then(|address| download(cache, pin, &address, options, tell)) {
            Ok(path) => return Ok(path),
            Err(e @ (ArtifactError::DigestMismatch { .. } | ArtifactError::Cache { .. })) => {
                return Err(e);
            }
            Err(e) => reasons.push(format!("by the index that {told_by} names: {e}")),
        }
    }
    match pip(cache, pin, request, options, tell) {
        Ok(path) => return Ok(path),
        Err(Pip::Final(e)) => return Err(e),
        Err(Pip::Failed(reason)) => reasons.push(format!("by pip: {reason}")),
    }
    Err(ArtifactError::Download {
        what: format!("{} (package {} {})", pin.file, request.package, request.version),
        reason: reasons.join("; "),
    })
}

/// Where the index of the settings has the pinned file; `None` where the settings name no index.
pub(crate) fn address(
    package: &str,
    pin: &Pin,
    index_url: Option<&str>,
    options: &FetchOptions,
) -> Result<Option<Address>, ArtifactError> {
    index(index_url).map(|(url, _)| find(&url, package, pin, options)).transpose()
}

/// The index to ask, and what names it.
fn index(index_url: Option<&str>) -> Option<(String, String)> {
    let env = |name: &str| std::env::var(name).ok();
    match index_url {
        Some(url) => Some((url.to_owned(), "the configuration".to_owned())),
        None => configured_index(&env, &|path| fs::read_to_string(path).ok()),
    }
}

/// The index address of the settings, and what names it.
fn configured_index(
    env: &dyn Fn(&str) -> Option<String>,
    read: &dyn Fn(&Path) -> Option<String>,
) -> Option<(String, String)> {
    let set = |name: &str| env(name).filter(|value| !value.trim().is_empty());
    for name in ["FLASHINFER_RS_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"] {
        if let Some(value) = set(name) {
            return Some((unnamed(value.trim()).into(), name.into()));
        }
    }
    let files = pip_configurations(&set);
    files.into_iter().find_map(|file| {
        let url = ini_index_url(&read(&file)?)?;
        Some((url, file.display().to_string()))
    })
}

/// uv writes an index as `name=address`, too.
fn unnamed(value: &str) -> &str {
    match value.split_once('=') {
        Some((name, url)) if !name.contains([':', '/']) => url,
        _ => value,
    }
}

/// pip's configuration files, the strongest first.
fn pip_configurations(env: &dyn Fn(&str) -> Option<String>) -> Vec<PathBuf> {
    let mut files = Vec::new();
    if let Some(file) = env("PIP_CONFIG_FILE") {
        if file == "/dev/null" {
            // pip's own way to say: no configuration at all.
            return files;
        }
        files.push(PathBuf::from(file));
    }
    if let Some(venv) = env("VIRTUAL_ENV") {
        files.push(PathBuf::from(venv).join("pip.conf"));
    }
    let home = env("HOME").map(PathBuf::from);
    let config = env("XDG_CONFIG_HOME").map(PathBuf::from);
    let config = config.or_else(|| home.as_ref().map(|home| home.join(".config")));
    files.extend(config.map(|folder| folder.join("pip/pip.conf")));
    files.extend(home.map(|home| home.join(".pip/pip.conf")));
    files.push("/etc/xdg/pip/pip.conf".into());
    files.push("/etc/pip.conf".into());
    files
}

/// `index-url` of `[download]`, else of `[global]`.
fn ini_index_url(text: &str) -> Option<String> {
    let (mut section, mut global, mut download) = (String::new(), None, None);
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            section = name.trim().to_ascii_lowercase();
        } else if !line.starts_with(['#', ';'])
            && let Some((key, value)) = line.split_once(['=', ':'])
        {
            let key = key.trim().to_ascii_lowercase().replace('_', "-");
            let value = value.trim();
            if key == "index-url" && !value.is_empty() {
                match section.as_str() {
                    "global" => global = Some(value.to_owned()),
                    "download" => download = Some(value.to_owned()),
                    _ => {}
                }
            }
        }
    }
    download.or(global)
}

/// A package's name as it stands in an index's addresses.
fn normalized(package: &str) -> String {
    let parts = package.split(['-', '_', '.']).filter(|part| !part.is_empty());
    parts.collect::<Vec<_>>().join("-").to_ascii_lowercase()
}

/// A file that an index page lists.
#[derive(Debug, PartialEq, Eq)]
struct Link {
    file: String,
    url: String,
    sha256: Option<String>,
}

/// Asks an index where the pinned file is.
fn find(index_url: &str, package: &str, pin: &Pin, options: &FetchOptions) -> Result<Address, ArtifactError> {
    let index = Address::new(index_url);
    let url = format!("{}/{}/", index.url.trim_end_matches('/'), normalized(package));
    let page = Address { url, authorization: index.authorization.clone() };
    let failed = |reason: String| ArtifactError::Download { what: page.shown().into(), reason };
    let mut request = fetch::agent(options).get(&page.url).header(header::ACCEPT, ACCEPT);
    if let Some(authorization) = &page.authorization {
        request = request.header(header::AUTHORIZATION, authorization);
    }
    let response = request.call().map_err(|e| failed(e.to_string()))?;
    if !response.status().is_success() {
        return Err(failed(format!("HTTP status {}", response.status())));
    }
    let base = response.get_uri().to_string();
    let mut text = String::new();
    let mut body = response.into_body().into_reader().take(MAX_PAGE);
    body.read_to_string(&mut text).map_err(|e| failed(e.to_string()))?;
    let links = read_page(&text, &base).map_err(failed)?;
    let count = links.len();
    let link = links.into_iter().find(|link| link.file == pin.file);
    let Some(link) = link else {
        return Err(failed(format!("the index lists {count} files of it, none of them {}", pin.file)));
    };
    if let Some(listed) = link.sha256.as_deref().and_then(Digest::from_hex)
        && listed != pin.sha256
    {
        return Err(failed(format!(
            "the index lists {} with SHA-256 {listed}, expected {}",
            pin.file, pin.sha256
        )));
    }
    let mut address = Address::new(&link.url);
    if address.authorization.is_none() && origin(&address.url) == origin(&page.url) {
        address.authorization = page.authorization;
    }
    Ok(address)
}

/// The links of an index page, whichever form it has.
fn read_page(text: &str, base: &str) -> Result<Vec<Link>, String> {
    if text.trim_start().starts_with('{') { json_links(text, base) } else { Ok(html_links(text, base)) }
}

fn json_links(text: &str, base: &str) -> Result<Vec<Link>, String> {
    #[derive(serde::Deserialize)]
    struct Page {
        files: Vec<Entry>,
    }
    #[derive(serde::Deserialize)]
    struct Entry {
        filename: String,
        url: String,
        #[serde(default)]
        hashes: std::collections::HashMap<String, String>,
    }
    let page: Page =
        serde_json::from_str(text).map_err(|e| format!("the page is no JSON simple index: {e}"))?;
    let link = |mut entry: Entry| Link {
        url: resolve(base, &entry.url),
        sha256: entry.hashes.remove("sha256"),
        file: entry.filename,
    };
    Ok(page.files.into_iter().map(link).collect())
}

fn html_links(text: &str, base: &str) -> Vec<Link> {
    let mut base = base.to_owned();
    let mut links = Vec::new();
    let mut rest = text;
    while let Some((_, after)) = rest.split_once('<') {
        if let Some(comment) = after.strip_prefix("!--") {
            rest = comment.split_once("-->").map_or("", |(_, rest)| rest);
            continue;
        }
        let (name, href, tail) = tag(after);
        rest = tail;
        match (name.as_str(), href) {
            ("base", Some(href)) => base = resolve(&base, &href),
            ("a", Some(href)) => links.extend(html_link(&base, &href)),
            _ => {}
        }
    }
    links
}

fn html_link(base: &str, href: &str) -> Option<Link> {
    let (path, fragment) = href.split_once('#').unwrap_or((href, ""));
    let url = resolve(base, path);
    let end = url.find('?').unwrap_or(url.len());
    let file = percent_decode(url[..end].rsplit('/').next()?);
    let sha256 = fragment.split('&').find_map(|part| part.strip_prefix("sha256="));
    Some(Link { file: String::from_utf8(file).ok()?, sha256: sha256.map(str::to_owned), url })
}

/// Reads a tag after its `<`: its name, its `href`, and the text after it.
fn tag(text: &str) -> (String, Option<String>, &str) {
    let end = text.find(|c: char| c.is_whitespace() || c == '>' || c == '/').unwrap_or(text.len());
    let name = text[..end].to_ascii_lowercase();
    let (mut rest, mut href) = (&text[end..], None);
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_whitespace() || c == '/');
        if rest.is_empty() {
            return (name, href, rest);
        }
        if let Some(tail) = rest.strip_prefix('>') {
            return (name, href, tail);
        }
        // The first character belongs to the name, whatever it is.
        let end = rest
            .char_indices()
            .skip(1)
            .find(|(_, c)| c.is_whitespace() || "=>/".contains(*c))
            .map_or(rest.len(), |(at, _)| at);
        let key = rest[..end].to_ascii_lowercase();
        rest = rest[end..].trim_start();
        let Some(value) = rest.strip_prefix('=') else {
            continue;
        };
        let value = value.trim_start();
        let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''));
        let (value, tail) = match quote {
            Some(quote) => value[1..].split_once(quote).unwrap_or((&value[1..], "")),
            None => {
                let end = value.find(|c: char| c.is_whitespace() || c == '>');
                value.split_at(end.unwrap_or(value.len()))
            }
        };
        if key == "href" {
            href.get_or_insert_with(|| entities(value.trim()));
        }
        rest = tail;
    }
}

/// Decodes character references.
fn entities(text: &str) -> String {
    let (mut decoded, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once('&') {
        decoded.push_str(before);
        let reference = after.split_once(';').and_then(|(name, tail)| {
            let c = match name {
                "amp" => '&',
                "lt" => '<',
                "gt" => '>',
                "quot" => '"',
                "apos" => '\'',
                _ => {
                    let number = name.strip_prefix('#')?;
                    let code = match number.strip_prefix(['x', 'X']) {
                        Some(hex) => u32::from_str_radix(hex, 16).ok()?,
                        None => number.parse().ok()?,
                    };
                    char::from_u32(code)?
                }
            };
            Some((c, tail))
        });
        match reference {
            Some((c, tail)) => {
                decoded.push(c);
                rest = tail;
            }
            None => {
                decoded.push('&');
                rest = after;
            }
        }
    }
    decoded.push_str(rest);
    decoded
}

fn origin(url: &str) -> &str {
    let after = url.find("://").map_or(0, |at| at + 3);
    let end = url[after..].find(['/', '?', '#']);
    &url[..end.map_or(url.len(), |at| after + at)]
}

/// Resolves a reference against the address of its page.
fn resolve(base: &str, reference: &str) -> String {
    let reference = reference.split('#').next().unwrap_or_default();
    let scheme = base.split_once("://").map_or("https", |(scheme, _)| scheme);
    if let Some((start, _)) = reference.split_once(':')
        && !start.is_empty()
        && start.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
    {
        return reference.into();
    }
    if reference.starts_with("//") {
        return format!("{scheme}:{reference}");
    }
    let host = origin(base);
    let base = base.split(['?', '#']).next().unwrap_or_default();
    let (path, query) = match reference.find('?') {
        Some(at) => reference.split_at(at),
        None => (reference, ""),
    };
    let joined = match (path.starts_with('/'), base[host.len()..].rfind('/')) {
        (true, _) => path.to_owned(),
        (false, Some(at)) => format!("{}{path}", &base[host.len()..=host.len() + at]),
        (false, None) => format!("/{path}"),
    };
    let mut parts: Vec<&str> = Vec::new();
    let mut segments = joined.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            ".." => {
                parts.pop();
            }
            "." => {}
            segment => {
                parts.push(segment);
                continue;
            }
        }
        if last {
            parts.push("");
        }
    }
    format!("{host}/{}{query}", parts.join("/"))
}

enum Pip {
    Failed(String),
    Final(ArtifactError),
}

/// Has pip download the package into a folder next to the wheels.
fn pip(
    cache: &Cache,
    pin: &Pin,
    request: &Request<'_>,
    options: &FetchOptions,
    tell: Tell<'_>,
) -> Result<PathBuf, Pip> {
    tell(&Progress::Started { file: &pin.file, done: 0, total: None });
    let folder = cache.scratch(pin).map_err(Pip::Final)?;
    let mut reasons = Vec::new();
    for program in [&["python3", "-m", "pip"][..], &["pip"]] {
        let mut command = Command::new(program[0]);
        command.args(&program[1..]).args([
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--disable-pip-version-check",
            "--no-input",
            "--progress-bar=off",
            "--python-version=312",
            "--implementation=cp",
            "--abi=abi3",
            "--abi=none",
        ]);
        for platform in ["manylinux2014", "manylinux_2_17", "manylinux_2_27", "manylinux_2_28"] {
            command.arg(format!("--platform={platform}_{}", request.arch));
        }
        command.arg("-d").arg(folder.path());
        command.arg(format!("{}=={}", request.package, request.version));
        match run(&mut command, options.pip_timeout) {
            Ok(()) => {
                let file = folder.path().join(&pin.file);
                if file.is_file() {
                    return adopt(cache, pin, &file).map_err(Pip::Final);
                }
                reasons.push(format!("`{}` brought another file", program.join(" ")));
            }
            Err(reason) => reasons.push(format!("`{}`: {reason}", program.join(" "))),
        }
    }
    Err(Pip::Failed(reasons.join("; ")))
}

/// Runs a program to its end, or to the limit.
fn run(command: &mut Command, limit: Duration) -> Result<(), String> {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command.stderr(Stdio::piped()).spawn().map_err(|e| e.to_string())?;
    let mut stderr = child.stderr.take();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(stderr) = &mut stderr {
            let _ = stderr.read_to_end(&mut text);
        }
        text
    });
    let start = Instant::now();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if start.elapsed() < limit => std::thread::sleep(Duration::from_millis(20)),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("it ran for more than {} s", limit.as_secs()));
            }
            Err(e) => return Err(e.to_string()),
        }
    };
    if status.success() {
        return Ok(());
    }
    let text = reader.join().unwrap_or_default();
    Err(format!("{status}: {}", tail(&String::from_utf8_lossy(&text))))
}

/// The last lines of a program's complaint, without credentials.
fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let last = &lines[lines.len().saturating_sub(4)..];
    let words = last.iter().flat_map(|line| line.split(' '));
    let clean = words.map(|word| match word.find("://") {
        None => word.to_owned(),
        Some(_) => {
            let at = word.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(0);
            let (start, url) = word.split_at(at);
            format!("{start}{}", Address::new(url).url)
        }
    });
    clean.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "https://host.example/simple/pkg/";

    #[test]
    fn references_are_resolved() {
        for (reference, want) in [
            ("a.whl", "https://host.example/simple/pkg/a.whl"),
            ("../../f/a.whl", "https://host.example/f/a.whl"),
            ("../../../../a.whl", "https://host.example/a.whl"),
            ("/f/a.whl?x=1#sha256=2", "https://host.example/f/a.whl?x=1"),
            ("//other.example/a.whl", "https://other.example/a.whl"),
            ("http://other.example/a", "http://other.example/a"),
            ("./", "https://host.example/simple/pkg/"),
        ] {
            assert_eq!(resolve(PAGE, reference), want, "{reference}");
        }
        assert_eq!(resolve("http://h", "a"), "http://h/a");
    }

    #[test]
    fn html_pages_give_links() {
        let page = r#"<!DOCTYPE html><html><head><base href="/files/"></head><body>
            <!-- <a href="no.whl">no</a> -->
            <A data-x='1' HREF='pkg-1%2Bcu.whl#sha256=ab&amp;y=1'>pkg-1+cu.whl</A><br/>
            <a class="x" href=two.whl>two</a> <a>none</a>
            <a href="https&#58;//o.example/three.whl?a=1&amp;b=2">three</a>"#;
        let links = html_links(page, PAGE);
        let got: Vec<_> =
            links.iter().map(|l| (l.file.as_str(), l.url.as_str(), l.sha256.as_deref())).collect();
        assert_eq!(
            got,
            [
                ("pkg-1+cu.whl", "https://host.example/files/pkg-1%2Bcu.whl", Some("ab")),
                ("two.whl", "https://host.example/files/two.whl", None),
                ("three.whl", "https://o.example/three.whl?a=1&b=2", None),
            ]
        );
    }

    #[test]
    fn broken_html_ends() {
        for page in ["<", "<a", "<a href", "<a href=", "<a href='x", "<a é='x' ü>", "<a =>", "&#;"] {
            let links = html_links(page, PAGE);
            assert!(links.len() <= 1, "{page}: {links:?}");
        }
    }

    #[test]
    fn json_pages_give_links() {
        let page = r#"{"meta":{"api-version":"1.0"},"files":[
            {"filename":"a.whl","url":"../a.whl","hashes":{"sha256":"ab"}},
            {"filename":"b.whl","url":"https://o.example/b.whl"}]}"#;
        let links = read_page(page, PAGE).unwrap();
        assert_eq!(links[0].url, "https://host.example/simple/a.whl");
        assert_eq!(links[0].sha256.as_deref(), Some("ab"));
        assert_eq!(links[1].sha256, None);
        assert!(read_page("{\"x\":1}", PAGE).is_err());
    }

    #[test]
    fn settings_are_read_in_order() {
        let env = |pairs: &'static [(&str, &str)]| {
            move |name: &str| {
                let pair = pairs.iter().find(|(key, _)| *key == name);
                pair.map(|(_, value)| (*value).to_owned())
            }
        };
        let none = |_: &Path| None;
        let url = |found: Option<(String, String)>| found.map(|(url, _)| url);
        let all = env(&[("PIP_INDEX_URL", "https://p/"), ("UV_INDEX_URL", "u=https://u/")]);
        assert_eq!(url(configured_index(&all, &none)).as_deref(), Some("https://u/"));
        let files = env(&[("HOME", "/h"), ("VIRTUAL_ENV", "/v")]);
        let read = |path: &Path| match path.to_str() {
            Some("/h/.config/pip/pip.conf") => {
                Some("[install]\nindex-url=https://i/\n[global]\n# x\nindex_url = https://g/?a=b".into())
            }
            _ => None,
        };
        assert_eq!(url(configured_index(&files, &read)).as_deref(), Some("https://g/?a=b"));
        let off = env(&[("HOME", "/h"), ("PIP_CONFIG_FILE", "/dev/null")]);
        assert_eq!(configured_index(&off, &read), None);
    }

    #[test]
    fn names_are_normalized() {
        assert_eq!(normalized("Apache_TVM..-ffi"), "apache-tvm-ffi");
    }

    #[test]
    fn complaints_lose_credentials() {
        let text = "x\nERROR: cannot reach (https://me:secret@host.example/a)\n";
        let shown = tail(text);
        assert!(!shown.contains("secret") && shown.contains("host.example"), "{shown}");
    }
}
