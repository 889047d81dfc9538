//! Addresses, whose secrets are kept apart and never shown.

use super::super::ArtifactError;
use base64::prelude::{BASE64_STANDARD, Engine};
use percent_encoding::percent_decode_str;
use std::fmt;
use std::str::FromStr;
use ureq::http::HeaderValue;
use url::Url;

/// The address of a file or a page on a server, by `https` or `http`, with the credentials that
/// are good there.
///
/// It is read by [`str::parse`]. A user name and a password in it become credentials, and a
/// fragment is left out. Shown as text, it has neither credentials nor query.
#[derive(Clone)]
pub struct Address {
    url: Url,
    authorization: Option<HeaderValue>,
    /// Whether its path, too, may hold a secret.
    private: bool,
}

impl Address {
    /// Reads an address of the pin table. The error does not repeat it.
    pub(crate) fn new(text: &str) -> Result<Address, String> {
        Address::from_url(Url::parse(text).map_err(|e| e.to_string())?, false)
    }

    /// Reads an address of the settings. The error does not repeat it.
    pub(crate) fn of_settings(text: &str) -> Result<Address, String> {
        let url = Url::parse(text).map_err(|e| e.to_string())?;
        let behind = [Some(url.path()), url.query(), url.fragment()].into_iter().flatten();
        // Such a user or password ends early, and its rest would go to a host that is none.
        let split = behind.into_iter().any(|part| part.contains('@'));
        match Address::from_url(url, true) {
            Ok(_) if split => Err("there is an `@` behind the host: a user name or password with `/`, \
                                   `?`, `#` or `@` has them percent-encoded, as %2F, %3F, %23 and %40"
                .into()),
            address => address,
        }
    }

    fn from_url(mut url: Url, private: bool) -> Result<Address, String> {
        match url.scheme() {
            "http" | "https" => {}
            "file" => {
                return Err("a `file:` address is not fetched from: name the wheel, or its folder, in \
                            FLASHINFER_RS_WHEELS"
                    .into());
            }
            // Not repeated: `user:password@host` without a scheme would be one.
            _ => return Err("it does not begin with `https://` or `http://`".into()),
        }
        let mut authorization = None;
        if !url.username().is_empty() || url.password().is_some() {
            let mut pair: Vec<u8> = percent_decode_str(url.username()).collect();
            pair.push(b':');
            pair.extend(percent_decode_str(url.password().unwrap_or_default()));
            let value = HeaderValue::from_str(&format!("Basic {}", BASE64_STANDARD.encode(pair)));
            authorization = value.ok().map(|mut value| {
                value.set_sensitive(true);
                value
            });
            // Both succeed where there is a host, and http and https have one.
            let _ = url.set_username("");
            let _ = url.set_password(None);
        }
        url.set_fragment(None);
        Ok(Address { url, authorization, private })
    }

    /// The same address, at which this token is the credentials. It goes to no other host, also
    /// where the server redirects. `None` if the token has characters that no header may have.
    pub fn with_bearer_token(mut self, token: &str) -> Option<Address> {
        let mut value = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
        value.set_sensitive(true);
        self.authorization = Some(value);
        Some(self)
    }

    pub(crate) fn url(&self) -> &Url {
        &self.url
    }

    pub(crate) fn authorization(&self) -> Option<&HeaderValue> {
        self.authorization.as_ref()
    }

    /// The page of a package in the index at this address.
    pub(crate) fn page_of(&self, package: &str) -> Address {
        let mut page = self.clone();
        if let Ok(mut path) = page.url.path_segments_mut() {
            path.pop_if_empty().push(package).push("");
        }
        page
    }

    /// What a page at `base` refers to. Credentials of this address go along to its own origin.
    pub(crate) fn link(&self, base: &Url, reference: &str) -> Result<Address, String> {
        let url = base.join(reference).map_err(|e| e.to_string())?;
        let mut link = Address::from_url(url, self.private)?;
        if link.authorization.is_none() && self.lends_to(&link.url) {
            link.authorization.clone_from(&self.authorization);
        }
        Ok(link)
    }

    /// Whether credentials for this address are good for another one: of the same origin, or the
    /// same host's by https.
    fn lends_to(&self, other: &Url) -> bool {
        let upgraded = || {
            self.url.scheme() == "http"
                && other.scheme() == "https"
                && self.url.host() == other.host()
                && self.url.port().is_none()
                && other.port().is_none()
        };
        self.url.origin() == other.origin() || upgraded()
    }

    /// The address in an error: without its query, which may hold a token, and without the
    /// folders of a private one, which may, too.
    pub(crate) fn shown(&self) -> String {
        let origin = self.url.origin().ascii_serialization();
        if !self.private {
            return format!("{origin}{}", self.url.path());
        }
        let mut names = self.url.path().split('/').filter(|name| !name.is_empty());
        match (names.next_back(), names.next()) {
            (None, _) => origin,
            (Some(name), None) => format!("{origin}/{name}"),
            (Some(name), Some(_)) => format!("{origin}/…/{name}"),
        }
    }
}

impl FromStr for Address {
    type Err = ArtifactError;

    /// # Errors
    /// [`ArtifactError::BadAddress`], which does not repeat the address: it may hold a secret.
    fn from_str(text: &str) -> Result<Address, ArtifactError> {
        Address::new(text).map_err(|reason| ArtifactError::BadAddress { reason })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown())
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn basic(pair: &str) -> String {
        format!("Basic {}", BASE64_STANDARD.encode(pair))
    }

    #[test]
    fn credentials_are_kept_apart() {
        for (user, pair) in [
            ("me:p%40ss", "me:p@ss"),
            ("me:p@ss", "me:p@ss"),
            ("token", "token:"),
            (":secret", ":secret"),
            ("m%C3%A9:s<e>c^r|e\"t", "mé:s<e>c^r|e\"t"),
            ("me:100%", "me:100%"),
        ] {
            let address = Address::new(&format!("https://{user}@host.example:8080/simple/?token=1#x"));
            let address = address.unwrap();
            assert_eq!(address.url.as_str(), "https://host.example:8080/simple/?token=1");
            assert_eq!(address.authorization.as_ref().unwrap(), &basic(pair), "{user}");
            assert_eq!(address.shown(), "https://host.example:8080/simple/");
            assert_eq!(format!("{address:?}"), address.shown());
        }
        for plain in ["https://host.example/a@b", "https://@host.example/a@b"] {
            let plain = Address::new(plain).unwrap();
            assert_eq!((plain.url.path(), plain.authorization), ("/a@b", None));
        }
    }

    #[test]
    fn settings_show_neither_path_nor_query() {
        let index = Address::of_settings("https://me:secret@host.example/secret/simple?t=secret").unwrap();
        let page = index.page_of("a-b");
        assert_eq!(page.url.as_str(), "https://host.example/secret/simple/a-b/?t=secret");
        assert_eq!(page.shown(), "https://host.example/…/a-b");
        let link = page.link(&page.url, "../secret/x.whl?t=secret#sha256=secret").unwrap();
        assert_eq!(link.shown(), "https://host.example/…/x.whl");
        assert_eq!(Address::of_settings("http://h/").unwrap().page_of("p").url.as_str(), "http://h/p/");
    }

    #[test]
    fn what_is_no_address_is_refused_without_repeating_it() {
        for (bad, want) in [
            ("", "relative URL"),
            ("me:secret@host/simple", "begin with `https://`"),
            ("secret", "relative URL"),
            ("http://me:se/cret@host/simple", "port"),
            ("http://me:12/secret@host/simple", "%2F"),
            ("http://me:12#secret@host/simple", "%2F"),
            ("http://me:12?secret@host/simple", "%2F"),
            ("http://me:x@secret:y/simple", "port"),
            ("file:///secret/wheels", "FLASHINFER_RS_WHEELS"),
            ("ftp://secret/", "begin with `https://`"),
            ("https://", "host"),
        ] {
            let e = Address::of_settings(bad).unwrap_err();
            assert!(e.contains(want) && !e.contains("secret"), "{bad}: {e}");
        }
    }

    #[test]
    fn credentials_stay_with_their_origin() {
        let from = |url: &str| Address::new(url).unwrap();
        for (page, reference, kept) in [
            ("https://me:p@h/a/", "b", true),
            ("https://me:p@h/a/", "https://h:443/b", true),
            ("https://me:p@h/a/", "https://H/b", true),
            ("https://me:p@h/a/", "https://h:444/b", false),
            ("https://me:p@h/a/", "https://h.example/b", false),
            ("https://me:p@h/a/", "http://h/b", false),
            ("http://me:p@h/a/", "https://h/b", true),
            ("http://me:p@h:80/a/", "https://h/b", true),
            ("http://me:p@h:81/a/", "https://h/b", false),
            ("http://me:p@h/a/", "//other/b", false),
        ] {
            let page = from(page);
            let link = page.link(&page.url, reference).unwrap();
            assert_eq!(link.authorization.is_some(), kept, "{page:?} {reference}");
        }
        let page = from("https://me:p@h/");
        let link = page.link(&page.url, "https://you:q@other/").unwrap();
        assert_eq!(link.authorization.unwrap(), basic("you:q"));
        for bad in ["file:///etc/passwd", "x:?y://z", "https://", "javascript:1"] {
            assert!(page.link(&page.url, bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn links_are_those_of_the_url_crate(
            base in "https?://[a-z.]{1,8}(:[0-9]{1,4})?/[ -~]{0,20}",
            reference in "[ -~é]{0,30}",
        ) {
            let Ok(page) = Address::new(&base) else { return Ok(()) };
            let joined = Url::parse(&base).unwrap().join(&reference);
            let joined = joined.ok().filter(|url| matches!(url.scheme(), "http" | "https"));
            let link = page.link(page.url(), &reference);
            prop_assert_eq!(link.is_ok(), joined.is_some());
            if let (Ok(link), Some(url)) = (link, joined) {
                prop_assert_eq!(link.url.path(), url.path());
                prop_assert_eq!(link.url.query(), url.query());
                prop_assert_eq!(link.url.origin(), url.origin());
                prop_assert!(link.url.username().is_empty() && link.url.password().is_none());
                // The client's own type for addresses takes what is not refused here.
                let _ = link.url.as_str().parse::<ureq::http::Uri>();
            }
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,60}") {
            for read in [Address::new, Address::of_settings] {
                if let Ok(address) = read(&text) {
                    let _ = address.page_of(&text).shown();
                }
            }
        }
    }
}
