//! Texts without the secrets that addresses in them may hold.

/// `text` with what may be a secret left out: user and password of an address, its path and its
/// query, and whatever else looks like a part of them.
///
/// It rather takes away too much: where an `@` follows an address in its line, all that lies
/// between is taken for a password with odd characters.
pub(crate) fn addresses(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(line).collect();
    lines.join("\n")
}

fn line(text: &str) -> String {
    let mut shown = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("://") {
        words(before, &mut shown);
        shown.push_str("://");
        let host = after.rsplit_once('@').map_or(after, |(_, host)| host);
        let end = host.find(|c: char| !c.is_alphanumeric() && !"-._:[]…".contains(c)).unwrap_or(host.len());
        let (host, after) = host.split_at(end);
        shown.push_str(host);
        // The rest of the address: up to a blank, which no address has.
        let end = after.find(char::is_whitespace).unwrap_or(after.len());
        if after[..end].contains(['/', '?', '#']) && !host.ends_with('…') {
            shown.push_str("/…");
        }
        rest = &after[end..];
    }
    words(rest, &mut shown);
    shown
}

/// Adds a text without a scheme, in which paths and queries may stand alone.
fn words(text: &str, shown: &mut String) {
    for word in text.split_inclusive(char::is_whitespace) {
        let (word, blank) = match word.char_indices().next_back() {
            Some((at, c)) if c.is_whitespace() => word.split_at(at),
            _ => (word, ""),
        };
        let word = match word.rsplit_once('@') {
            Some((secret, host)) if secret.contains(':') => {
                shown.push('…');
                host
            }
            _ => word,
        };
        let directory = word.starts_with('/') && word.len() > 1 && word.ends_with('/');
        match word.find('?') {
            Some(at) if at + 1 < word.len() => shown.extend([&word[..at], "?…"]),
            _ if directory => shown.push_str("/…"),
            _ => shown.push_str(word),
        }
        shown.push_str(blank);
    }
}

#[cfg(test)]
mod tests {
    use super::addresses;

    #[test]
    fn secrets_are_left_out() {
        for (text, want) in [
            ("no address at all", "no address at all"),
            ("(https://me:secret@host.example/a) failed", "(https://host.example/… failed"),
            ("https://host.example:80/secret/x?t=secret#secret end", "https://host.example:80/… end"),
            ("https://me:se cret/s@ecret@host.example", "https://host.example"),
            ("https://secret%40@[::1]:8/x", "https://[::1]:8/…"),
            ("url: /secret/pkg/ (Caused by x)", "url: /… (Caused by x)"),
            ("at /simple/pkg/?token=secret.", "at /simple/pkg/?…"),
            ("me:secret@host.example:3128 refused", "…host.example:3128 refused"),
            ("http://a.example/x http://b.example", "http://a.example/… http://b.example"),
            ("/usr/bin/python3: No module named pip", "/usr/bin/python3: No module named pip"),
            ("two\nlines https://t@h", "two\nlines https://h"),
            ("://", "://"),
        ] {
            assert_eq!(addresses(text), want);
            assert_eq!(addresses(&addresses(text)), want, "once more");
        }
    }
}
