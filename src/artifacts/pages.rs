//! Pages of a package index: the simple index, in its HTML form (PEP 503) or its JSON form
//! (PEP 691). A page is bounded in size and in time, and is no more than a hint: what a link leads
//! to is accepted by its digest only.

use super::http::{self, Address, Client};
use super::pins::Pin;
use super::{ArtifactError, Digest, FetchOptions};
use html5gum::{DefaultEmitter, StartTag, Token, Tokenizer};
use percent_encoding::percent_decode_str;
use std::collections::HashMap;
use ureq::http::header;
use url::Url;

const MAX_PAGE: u64 = 4 << 20;
/// No address is longer. A page of millions of links to a long one would take long to resolve.
pub(super) const MAX_ADDRESS: usize = 8 << 10;
const ACCEPT: &str = "application/vnd.pypi.simple.v1+json, \
                      application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1";

/// A file that a page lists.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) file: String,
    /// Where it is, as the page writes it.
    pub(super) reference: String,
    sha256: Option<String>,
}

/// Asks an index where the pinned file of a package is.
pub(crate) fn find(
    index: &Address,
    package: &str,
    pin: &Pin,
    options: &FetchOptions,
) -> Result<Address, ArtifactError> {
    let page = index.page_of(&normalized(package));
    let failed = |reason: String| ArtifactError::Download { what: page.shown(), reason };
    let (text, at) = get(&page, options).map_err(failed)?;
    let (links, base) = read(&text, at.url()).map_err(failed)?;
    let mut named = links.iter().filter(|link| link.file == pin.file);
    let found = named.find_map(|link| Some((link, index.link(&base, &link.reference).ok()?)));
    let Some((link, address)) = found else {
        let count = links.len();
        return Err(failed(format!("the index lists {count} files of it, none of them {}", pin.file)));
    };
    match link.sha256.as_deref().and_then(Digest::from_hex) {
        Some(listed) if listed != pin.sha256 => Err(failed(format!(
            "the index lists {} with SHA-256 {listed}, expected {}",
            pin.file, pin.sha256
        ))),
        _ => Ok(address),
    }
}

/// A page's text and its own address, to which redirects led.
fn get(page: &Address, options: &FetchOptions) -> Result<(String, Address), String> {
    let accept = [(header::ACCEPT, ACCEPT)];
    let (at, status, body) = http::read_page(&mut Client::new(options), page, &accept, options, MAX_PAGE)?;
    match status.is_success() {
        true => Ok((String::from_utf8_lossy(&body).into_owned(), at)),
        false => Err(format!("HTTP status {status}")),
    }
}

/// A package's name as it stands in an index's addresses.
fn normalized(package: &str) -> String {
    let parts = package.split(['-', '_', '.']).filter(|part| !part.is_empty());
    parts.collect::<Vec<_>>().join("-").to_ascii_lowercase()
}

/// The links of a page, whichever form it has, and the address that they refer to.
pub(super) fn read(text: &str, at: &Url) -> Result<(Vec<Link>, Url), String> {
    if text.trim_start().starts_with('{') {
        return Ok((json_links(text)?, at.clone()));
    }
    Ok(html_links(text, at))
}

fn json_links(text: &str) -> Result<Vec<Link>, String> {
    #[derive(serde::Deserialize)]
    struct IndexPage {
        files: Vec<Entry>,
    }
    #[derive(serde::Deserialize)]
    struct Entry {
        filename: String,
        url: String,
        #[serde(default)]
        hashes: HashMap<String, String>,
    }
    // The parser's own message may repeat what the page holds.
    let page: IndexPage = serde_json::from_str(text).map_err(|e| {
        format!("the page is no JSON simple index, by its line {}, column {}", e.line(), e.column())
    })?;
    let link = |mut entry: Entry| Link {
        sha256: entry.hashes.remove("sha256"),
        file: entry.filename,
        reference: entry.url,
    };
    Ok(page.files.into_iter().filter(|entry| entry.url.len() <= MAX_ADDRESS).map(link).collect())
}

fn html_links(text: &str, at: &Url) -> (Vec<Link>, Url) {
    // So that links in scripts are none.
    let mut emitter = DefaultEmitter::default();
    emitter.naively_switch_states(true);
    let (mut links, mut base) = (Vec::new(), None);
    for token in Tokenizer::new_with_emitter(text, emitter) {
        let Ok(Token::StartTag(tag)) = token else { continue };
        match (tag.name.as_slice(), href(&tag)) {
            (b"base", Some(reference)) if base.is_none() => {
                base = at.join(&reference).ok().filter(|base| !base.cannot_be_a_base());
            }
            (b"a", Some(reference)) => links.push(html_link(reference)),
            _ => {}
        }
    }
    (links, base.unwrap_or_else(|| at.clone()))
}

fn href(tag: &StartTag<()>) -> Option<String> {
    let value = tag.attributes.get(b"href".as_slice())?;
    (value.len() <= MAX_ADDRESS).then(|| String::from_utf8_lossy(value).into_owned())
}

fn html_link(reference: String) -> Link {
    let (path, fragment) = reference.trim().split_once('#').unwrap_or((reference.trim(), ""));
    let path = path.split('?').next().unwrap_or_default();
    let file = percent_decode_str(path.rsplit(['/', '\\']).next().unwrap_or_default());
    let file = file.decode_utf8_lossy().into_owned();
    let sha256 = fragment.split('&').find_map(|part| part.strip_prefix("sha256=")).map(str::to_owned);
    Link { file, sha256, reference }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::{Duration, Instant};

    fn page() -> Url {
        Url::parse("https://host.example/simple/pkg/").unwrap()
    }

    fn resolved(text: &str) -> Vec<(String, String, Option<String>)> {
        let (links, base) = read(text, &page()).unwrap();
        let url = |link: &Link| base.join(&link.reference).map(|url| url.to_string()).unwrap_or_default();
        links.into_iter().map(|link| (link.file.clone(), url(&link), link.sha256)).collect()
    }

    #[test]
    fn html_pages_give_links() {
        let page = r#"<!DOCTYPE html><html><head><base href="/files/"><base href="/no/"></head><body>
            <!-- <a href="no.whl">no</a> --><script>"<a href='no.whl'>"</script>
            <A data-x='1' HREF='pkg-1%2Bcu.whl#sha256=ab&amp;y=1'>pkg-1+cu.whl</A><br/>
            <a class="x" href=two.whl>two</a> <a>none</a>
            <a href=" ../three.whl
            ">three</a>
            <a href="https&#58;//o.example/four.whl?a=1&amp;b=2">four</a>"#;
        let want = [
            ("pkg-1+cu.whl", "https://host.example/files/pkg-1%2Bcu.whl#sha256=ab&y=1", Some("ab")),
            ("two.whl", "https://host.example/files/two.whl", None),
            ("three.whl", "https://host.example/three.whl", None),
            ("four.whl", "https://o.example/four.whl?a=1&b=2", None),
        ];
        let want = want.map(|(file, url, sha256)| (file.into(), url.into(), sha256.map(str::to_owned)));
        assert_eq!(resolved(page), want);
    }

    #[test]
    fn json_pages_give_links() {
        let page = r#" {"meta":{"api-version":"1.0"},"files":[
            {"filename":"a.whl","url":"../a.whl","hashes":{"sha256":"ab"},"size":1},
            {"filename":"b.whl","url":"https://o.example/b.whl"}]}"#;
        let want = [
            ("a.whl".into(), "https://host.example/simple/a.whl".into(), Some("ab".into())),
            ("b.whl".into(), "https://o.example/b.whl".into(), None),
        ];
        assert_eq!(resolved(page), want);
        let secret = r#"{"files":[{"filename":"a","url":"u","hashes":"secret"}]}"#;
        for bad in [r#"{"x":1}"#, secret, &"{\"files\":".repeat(100_000), "{"] {
            let e = read(bad, &self::page()).unwrap_err();
            assert!(e.contains("line 1, column") && !e.contains("secret"), "{e}");
        }
    }

    #[test]
    fn a_base_that_is_none_is_passed_over() {
        for base in
            ["x:?y://z", "mailto:a@b", "data:text/html,x", "https://", "http://[", "//", "http://a:b/"]
        {
            let links = resolved(&format!("<base href='{base}'><a href='x.whl'>x</a>"));
            assert_eq!(links[0].1, "https://host.example/simple/pkg/x.whl", "{base}");
        }
    }

    #[test]
    fn broken_html_ends() {
        for page in [
            "<",
            "<a",
            "<a href",
            "<a href=",
            "<a href='x",
            "<a é='x' ü>",
            "<a =>",
            "&#;",
            "<!--",
            "<script>",
        ] {
            assert!(resolved(page).len() <= 1, "{page}");
        }
    }

    #[test]
    fn names_are_normalized() {
        assert_eq!(normalized("Apache_TVM..-ffi"), "apache-tvm-ffi");
    }

    /// Time grows with the text, not with its square, which would take minutes here.
    #[test]
    fn long_pages_are_read_in_linear_time() {
        let size = 1 << 18;
        let repeated = |text: &str| text.repeat(size / text.len());
        let inside = |before: &str, text: &str| format!("{before}{}", repeated(text));
        for page in [
            repeated("&"),
            repeated("<"),
            repeated("&amp"),
            repeated("<a href=x>"),
            repeated("<!--"),
            repeated("<!"),
            repeated("</"),
            inside("<a href='", "&"),
            inside("<a href='", "&#"),
            inside("<a href='", "&notit"),
            inside("<a ", "x "),
            inside("<a ", "x='y'"),
            inside("<a href=", "%"),
            inside("<script>", "</scrip"),
            inside("<title>", "</titl"),
            inside("<!--", "--!-"),
            inside("<![CDATA[", "]]"),
            inside("<!doctype ", "public "),
            inside("<base href='", "../"),
            inside(&format!("<base href='/{}/'>", "x".repeat(MAX_ADDRESS - 20)), "<a href='../x'>"),
            inside("{\"files\":[", "{\"filename\":\"\",\"url\":\"\"},"),
            inside("{\"files\":", "["),
        ] {
            let start = Instant::now();
            if let Ok((links, base)) = read(&page, &self::page()) {
                let named = links.iter().filter(|link| link.file == "x");
                let _ = named.filter(|link| base.join(&link.reference).is_err()).count();
            }
            let took = start.elapsed();
            assert!(took < Duration::from_secs(20), "{took:?}: {}", &page[..40]);
        }
    }

    proptest! {
        #[test]
        fn any_page_is_read(text in r#"(<base href=|<a href=|</?[a-z!-]{0,4}|["'>{&#;:?/= ]|sha256=|&amp;|\PC){0,40}"#) {
            if let Ok((links, base)) = read(&text, &page()) {
                for link in links {
                    let _ = base.join(&link.reference);
                }
            }
        }

        /// A link's file is the last part of the address that the `url` crate makes of it.
        #[test]
        fn files_are_the_last_part_of_the_address(reference in "[a-zA-Z0-9./?#:@%+_~ -]{0,30}") {
            let quoted = format!("<a href=\"{reference}\">");
            let link = read(&quoted, &page()).unwrap().0.remove(0);
            let url = page().join(&link.reference);
            if let Ok(url) = url && url.scheme() == "https" && link.file.ends_with(char::is_alphanumeric) {
                let last = url.path_segments().unwrap().next_back().unwrap();
                let last = percent_decode_str(last).decode_utf8_lossy().into_owned();
                // `//host` has no path.
                prop_assert!(link.file == last || (last.is_empty() && url.host_str() != Some("host.example")));
            }
        }
    }
}
