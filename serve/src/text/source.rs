//! The source of a chat template, as far as its literals are concerned.

/// Where a literal of a template stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// It may be written.
    Written,
    /// Other strings are compared with it, or searched for it.
    Sought,
}

/// Methods whose arguments are sought.
const SEARCHES: [&str; 12] = [
    "split",
    "rsplit",
    "startswith",
    "endswith",
    "find",
    "rfind",
    "index",
    "count",
    "strip",
    "lstrip",
    "rstrip",
    "replace",
];

/// Gives each literal of a template that may be written to `mark`: the text outside of tags,
/// and strings. Makes transformers' `{% generation %}`, which tells trainers what is an
/// answer, a block that does nothing.
pub fn rewrite(source: &str, mark: impl Fn(&str) -> String) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = ["{{", "{%", "{#"].iter().filter_map(|open| rest.find(open)).min() {
        out += &mark(&rest[..at]);
        let (open, inside) = rest[at..].split_at(2);
        let close = match open {
            "{{" => "}}",
            "{%" => "%}",
            _ => "#}",
        };
        out += open;
        let end = if open == "{#" { inside.find(close) } else { end_of_tag(inside, close) };
        let (inside, behind) = inside.split_at(end.unwrap_or(inside.len()));
        match open {
            "{#" => out += inside,
            _ => out += &rewrite_tag(inside, &mark),
        }
        rest = behind;
        if let Some(behind) = rest.strip_prefix(close) {
            out += close;
            rest = behind;
        }
    }
    out + &mark(rest)
}

/// Where a tag closes: not within a string.
fn end_of_tag(inside: &str, close: &str) -> Option<usize> {
    let mut at = 0;
    while at < inside.len() {
        let rest = &inside[at..];
        if rest.starts_with(close) {
            return Some(at);
        }
        at += string_length(rest).unwrap_or_else(|| rest.chars().next().map_or(1, char::len_utf8));
    }
    None
}

/// The length of the string that a text starts with, with its quotes.
fn string_length(text: &str) -> Option<usize> {
    let quote = text.chars().next().filter(|c| ['"', '\''].contains(c))?;
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

fn rewrite_tag(inside: &str, mark: &impl Fn(&str) -> String) -> String {
    let name = inside.trim_matches(|c: char| c.is_whitespace() || ['-', '+'].contains(&c));
    match name {
        "generation" => return inside.replacen(name, "if true", 1),
        "endgeneration" => return inside.replacen(name, "endif", 1),
        _ => {}
    }
    let (mut out, mut at) = (String::with_capacity(inside.len()), 0);
    while let Some(first) = inside[at..].chars().next() {
        match string_length(&inside[at..]) {
            Some(length) => {
                let literal = &inside[at..at + length];
                match use_of(&inside[..at], &inside[at + length..]) {
                    Use::Written => {
                        out += &[&literal[..1], &mark(&literal[1..length - 1]), &literal[..1]].concat()
                    }
                    Use::Sought => out += literal,
                }
                at += length;
            }
            None => {
                out.push(first);
                at += first.len_utf8();
            }
        }
    }
    out
}

/// What a string is for, by what stands before and behind it in its tag.
fn use_of(before: &str, behind: &str) -> Use {
    let (before, behind) = (before.trim_end(), behind.trim_start());
    let word_before = before.rsplit(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
    let compared = before.ends_with("==")
        || before.ends_with("!=")
        || word_before == "in"
        || ["==", "!=", "in ", "not in "].iter().any(|operator| behind.starts_with(operator));
    let called = before.strip_suffix('(').is_some_and(|before| {
        SEARCHES
            .iter()
            .any(|name| before.strip_suffix(name).is_some_and(|rest| rest.trim_end().ends_with('.')))
    });
    if compared || called { Use::Sought } else { Use::Written }
}

#[cfg(test)]
mod tests {
    use super::rewrite;

    #[test]
    fn what_is_written_is_marked() {
        let mark = |text: &str| text.replace('<', "≪");
        for (source, expected) in [
            ("<a>{{ '<b>' }}<c>", "≪a>{{ '≪b>' }}≪c>"),
            ("{# <a> '<b>' #}<c>", "{# <a> '<b>' #}≪c>"),
            (r#"{{ "<a\"%}}<" + x }}"#, r#"{{ "≪a\"%}}≪" + x }}"#),
            (
                "{% if '<a>' in x and x != '<b>' or '<c>' == x %}<",
                "{% if '<a>' in x and x != '<b>' or '<c>' == x %}≪",
            ),
            ("{% set x = y.split('<a>')[0] + '<b>' %}", "{% set x = y.split('<a>')[0] + '≪b>' %}"),
            (
                "{{ y.replace('<a>', '<b>') | replace('<c>', '') }}",
                "{{ y.replace('<a>', '≪b>') | replace('≪c>', '') }}",
            ),
            ("{{ main('<a>') }}", "{{ main('≪a>') }}"),
            ("{%- generation -%}<{% endgeneration %}", "{%- if true -%}≪{% endif %}"),
            // Tags and strings that do not end.
            ("{{ '<a", "{{ '<a"),
            ("{% <", "{% <"),
            ("{# <", "{# <"),
            ("é{{ é '<é' }}", "é{{ é '≪é' }}"),
        ] {
            assert_eq!(rewrite(source, mark), expected, "{source}");
        }
    }
}
