//! The machine's proxies, as curl and pip read them.
//!
//! | request | the first that is set and not empty |
//! |---|---|
//! | https | `https_proxy`, `HTTPS_PROXY`, `all_proxy`, `ALL_PROXY` |
//! | http | `http_proxy`, `HTTP_PROXY` (not in a CGI program, whose clients could set it), `all_proxy`, `ALL_PROXY` |
//!
//! `no_proxy`, else `NO_PROXY`, lists by commas or blanks what is asked directly: a host with its
//! subdomains (`example.com`, `.example.com`, `*.example.com`), perhaps with a port, an IP address
//! or a network (`10.0.0.0/8`), or all (`*`, alone). A setting that cannot be followed is an
//! error, never a direct connection.

use percent_encoding::percent_decode_str;
use std::net::IpAddr;
use ureq::{Proxy, ProxyProtocol};
use url::{Host, Url};

/// A variable and its value.
type Setting = (&'static str, String);

/// The proxies of the environment.
pub(crate) struct Proxies {
    http: Option<Setting>,
    https: Option<Setting>,
    excluded: String,
}

impl Proxies {
    pub(crate) fn from_env() -> Proxies {
        let value = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        Proxies::new(&value)
    }

    fn new(env: &dyn Fn(&str) -> Option<String>) -> Proxies {
        let first = |names: &[&'static str]| {
            let set = |name: &&'static str| {
                let value = env(name)?.trim().to_owned();
                (!value.is_empty()).then_some((*name, value))
            };
            names.iter().find_map(set)
        };
        let http: &[_] = match env("REQUEST_METHOD") {
            None => &["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"],
            Some(_) => &["http_proxy", "all_proxy", "ALL_PROXY"],
        };
        Proxies {
            http: first(http),
            https: first(&["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"]),
            excluded: first(&["no_proxy", "NO_PROXY"]).map(|(_, list)| list).unwrap_or_default(),
        }
    }

    /// The proxy for an address, and the variable that names it. The error does not repeat its
    /// value.
    pub(crate) fn of(&self, url: &Url) -> Result<Option<(&'static str, Proxy)>, String> {
        let setting = if url.scheme() == "https" { &self.https } else { &self.http };
        let Some((variable, value)) = setting else { return Ok(None) };
        if excluded(&self.excluded, url) {
            return Ok(None);
        }
        let proxy = proxy(value).ok_or_else(|| {
            format!(
                "{variable} names no proxy that can be used: expected [scheme://][user:password@]host[:port], \
                 with a scheme of http, https, socks4, socks4a, socks5 and socks5h, and with odd \
                 characters of user and password percent-encoded"
            )
        })?;
        Ok(Some((*variable, proxy)))
    }
}

fn proxy(value: &str) -> Option<Proxy> {
    let url = match value.contains("://") {
        true => Url::parse(value),
        false => Url::parse(&format!("http://{value}")),
    };
    let url = url.ok()?;
    let protocol = match url.scheme() {
        "http" => ProxyProtocol::Http,
        "https" => ProxyProtocol::Https,
        "socks4" => ProxyProtocol::Socks4,
        "socks4a" => ProxyProtocol::Socks4A,
        "socks5" => ProxyProtocol::Socks5,
        "socks5h" => ProxyProtocol::Socks5h,
        _ => return None,
    };
    // What follows the host has no meaning. With an `@`, it is the end of a password.
    if value.ends_with('@') || url.path().contains('@') || url.query().or(url.fragment()).is_some() {
        return None;
    }
    let text = |part: &str| Some(percent_decode_str(part).decode_utf8().ok()?.into_owned());
    let mut proxy = Proxy::builder(protocol).host(url.host_str().filter(|host| !host.is_empty())?);
    if let Some(port) = url.port() {
        proxy = proxy.port(port);
    }
    if !url.username().is_empty() || url.password().is_some() {
        proxy = proxy.username(&text(url.username())?).password(&text(url.password().unwrap_or_default())?);
    }
    proxy.build().ok()
}

/// Whether the list of exceptions has the address's host.
fn excluded(list: &str, url: &Url) -> bool {
    let Some(host) = url.host() else { return false };
    let entries = list.split(|c: char| c == ',' || c.is_whitespace());
    list == "*"
        || entries.filter(|entry| !entry.is_empty()).any(|entry| {
            let (name, port) = match entry.rsplit_once(':') {
                Some((name, port)) if !name.contains(':') || name.ends_with(']') => (name, Some(port)),
                _ => (entry, None),
            };
            let port = port.is_none_or(|port| port.parse() == Ok(url.port_or_known_default().unwrap_or(0)));
            port && match &host {
                Host::Ipv4(ip) => is_address(name, (*ip).into()),
                Host::Ipv6(ip) => is_address(name, (*ip).into()),
                Host::Domain(host) => is_domain(name, host),
            }
        })
}

fn is_domain(name: &str, host: &str) -> bool {
    let name = name.strip_prefix('*').unwrap_or(name);
    let name = name.strip_prefix('.').unwrap_or(name).trim_end_matches('.').to_ascii_lowercase();
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let before = host.strip_suffix(&name);
    !name.is_empty() && before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// Whether `name` is this address or a network with it.
fn is_address(name: &str, ip: IpAddr) -> bool {
    let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    let Some((network, bits)) = name.split_once('/') else { return name.parse() == Ok(ip) };
    let Ok(bits) = bits.parse::<u32>() else { return false };
    match (network.parse(), ip) {
        (Ok(IpAddr::V4(network)), IpAddr::V4(ip)) if bits <= 32 => {
            (network.to_bits() ^ ip.to_bits()).checked_shr(32 - bits).unwrap_or(0) == 0
        }
        (Ok(IpAddr::V6(network)), IpAddr::V6(ip)) if bits <= 128 => {
            (network.to_bits() ^ ip.to_bits()).checked_shr(128 - bits).unwrap_or(0) == 0
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(env: &[(&str, &str)], url: &str) -> Result<Option<(&'static str, Proxy)>, String> {
        let value = |name: &str| {
            let pair = env.iter().find(|(key, _)| *key == name);
            pair.map(|(_, value)| (*value).to_owned())
        };
        Proxies::new(&value).of(&Url::parse(url).unwrap())
    }

    #[test]
    fn variables_are_read_in_order() {
        let all = ["https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"]
            .map(|name| (name, "proxy:1"));
        let chosen = |env: &[(&str, &str)], url: &str| of(env, url).unwrap().map(|(name, _)| name);
        assert_eq!(chosen(&all, "https://h"), Some("https_proxy"));
        assert_eq!(chosen(&all[1..], "https://h"), Some("HTTPS_PROXY"));
        assert_eq!(chosen(&all[2..], "https://h"), Some("all_proxy"));
        assert_eq!(chosen(&all[2..4], "https://h"), None);
        assert_eq!(chosen(&all, "http://h"), Some("http_proxy"));
        assert_eq!(chosen(&all[3..], "http://h"), Some("HTTP_PROXY"));
        assert_eq!(chosen(&[all[3], ("REQUEST_METHOD", "GET")], "http://h"), None);
        assert_eq!(chosen(&[("https_proxy", " "), all[5]], "https://h"), Some("ALL_PROXY"));
        assert_eq!(chosen(&[], "https://h"), None);
    }

    #[test]
    fn proxies_are_read() {
        for (value, protocol, host, port, user, password) in [
            ("proxy", ProxyProtocol::Http, "proxy", 80, None, None),
            ("proxy:3128", ProxyProtocol::Http, "proxy", 3128, None, None),
            ("http://proxy:3128/", ProxyProtocol::Http, "proxy", 3128, None, None),
            ("HTTPS://[::1]", ProxyProtocol::Https, "[::1]", 443, None, None),
            (
                "socks5h://me:p%40s%20s@127.0.0.1",
                ProxyProtocol::Socks5h,
                "127.0.0.1",
                1080,
                Some("me"),
                Some("p@s s"),
            ),
            ("socks5://h:9", ProxyProtocol::Socks5, "h", 9, None, None),
            ("socks4a://h", ProxyProtocol::Socks4A, "h", 1080, None, None),
            ("me:p@s^s@proxy:1", ProxyProtocol::Http, "proxy", 1, Some("me"), Some("p@s^s")),
        ] {
            let (name, proxy) = of(&[("ALL_PROXY", value)], "https://h").unwrap().unwrap();
            assert_eq!((name, proxy.protocol(), proxy.host()), ("ALL_PROXY", protocol, host), "{value}");
            assert_eq!((proxy.port(), proxy.username(), proxy.password()), (port, user, password), "{value}");
        }
    }

    #[test]
    fn what_is_no_proxy_is_an_error_without_its_value() {
        for value in [
            "socks://secret:1",
            "ftp://secret",
            "http://",
            "socks5://",
            "me:12/secret@proxy:1",
            "me:secret/x@proxy:1",
            "me:12?secret@proxy:1",
            "me:12#secret@proxy:1",
            "http://me:%FF@secret",
            "http://secret:99999",
            "http://me:secret@",
        ] {
            let e = of(&[("https_proxy", value)], "https://h").unwrap_err();
            assert!(e.contains("https_proxy") && !e.contains("secret"), "{value}: {e}");
            // What is excluded does not need it.
            assert_eq!(of(&[("https_proxy", value), ("NO_PROXY", "h")], "https://h"), Ok(None));
        }
    }

    #[test]
    fn exceptions_are_read_as_curl_and_pip_do() {
        for (list, yes, no) in [
            (
                "a.example, b.example",
                &["http://b.example", "http://x.a.example"][..],
                &["http://xa.example"][..],
            ),
            (" a.example\tb.example,", &["http://a.example", "http://B.example."], &["http://example"]),
            (".a.example", &["http://a.example", "http://x.a.example"], &["http://ba.example"]),
            ("*.a.example", &["http://x.a.example"], &["http://ba.example"]),
            ("a.example:8080", &["http://a.example:8080"], &["http://a.example", "http://a.example:80"]),
            ("a.example:443", &["https://a.example"], &["http://a.example"]),
            (
                "127.0.0.1,::1",
                &["http://127.0.0.1:9", "http://[::1]:9"],
                &["http://127.0.0.2", "http://[::2]"],
            ),
            ("[::1]:8", &["http://[::1]:8"], &["http://[::1]"]),
            (
                "10.0.0.0/8, fe80::/10",
                &["http://10.9.8.7", "http://[fe80::1]"],
                &["http://11.0.0.1", "http://[fd00::1]"],
            ),
            ("0.0.0.0/0", &["http://1.2.3.4"], &["http://[::1]", "http://a.example"]),
            ("10.0.0.0/33,10.0.0.0/x", &[], &["http://10.0.0.0"]),
            ("*", &["http://a.example", "http://[::1]"], &[]),
            ("*,x", &["http://x"], &["http://a.example"]),
            (".,,*.", &[], &["http://a.example", "http://a.example."]),
            ("", &[], &["http://a.example"]),
        ] {
            let direct = |url: &str| of(&[("all_proxy", "p"), ("no_proxy", list)], url).unwrap().is_none();
            for url in yes {
                assert!(direct(url), "{list:?} {url}");
            }
            for url in no {
                assert!(!direct(url), "{list:?} {url}");
            }
        }
        let both = [("all_proxy", "p"), ("no_proxy", "a"), ("NO_PROXY", "b")];
        assert!(of(&both, "http://a").unwrap().is_none() && of(&both, "http://b").unwrap().is_some());
    }
}
