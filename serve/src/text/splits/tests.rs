//! Splits that were worked out by hand.

use std::time::{Duration, Instant};

use super::{KNOWN, Pre};

/// The parts of a text; what lies between bars is what is expected.
fn check(name: &str, expected: &str) {
    let text = expected.replace('|', "");
    let mut parts = Vec::new();
    Pre::of(name).unwrap().splits().unwrap().each(&text, |part| parts.push(part));
    assert_eq!(parts.join("|"), expected, "{name}");
}

#[test]
fn digits_stand_in_groups() {
    check("llama-bpe", "In| |201|3| it| cost| $|123|456|7|.|50");
    check("minicpm5", "In| |201|3| it");
    check("dbrx", "x|123|45");
    check("deepseek-v3", "x|123|45");
    check("qwen2", "In| |2|0|1|3| it");
    check("tekken", "In| |2|0|1|3| it");
    check("seed-coder", "x|1|2");
    check("gpt-4o", "In| |201|3| it");
    check("gpt-2", "In| 2013| it| 1234567");
    check("smollm", "In| |2|0|1|3| it");
    check("deepseek-coder", "In| |2|0|1|3| it");
    check("deepseek-llm", "In| |2013| it");
    check("viking", "In| |2|0|1|3| it");
    check("bloom", "In| 2013| it");
    // From the left, behind what is left of a space.
    check("falcon", "In| |201|3| it|123|456|7");
    check("default", "In| |201|3| it");
    // From the right; words are left to merges.
    check("superbpe", "In the year |1|234|567| there were |12|345| or |123");
    // Digits of other scripts are digits.
    check("llama-bpe", "٢٠١|٣");
    check("qwen2", "٢|٠|½");
}

#[test]
fn words_end_where_they_should() {
    // Endings: in small letters, in both cases, or none.
    check("gpt-2", "I|'m| you|'re| IT|'|S| we|'ll|ing");
    check("llama-bpe", "I|'m| IT|'S| we|'LL| they|'ve|x");
    check("qwen2", "I|'M| o|'clock");
    check("ufakzeka", "Ankara|'da| I|'m");
    check("bailingmoe", "I|'M| it|'Ll| x|'re");
    // What is before letters goes with them.
    check("llama-bpe", "a| (|b|)| -|c| --|d|\tx|_y|(z");
    check("gpt-2", "a| (|b|)| -|c|\t|x|_|y");
    // Where small letters are followed by capitals, and with endings behind or apart.
    check("tekken", "Hello|World| the|HTMLParser| ÉCOLE| école|'s");
    check("gpt-4o", "Hello|World's| don't| DON'T| HTMLParser");
    check("llama-bpe", "HelloWorld");
    check("tekken", "a|/b| https|://|x| ok|!/\n");
    check("gpt-4o", "ok|!//\n|b");
    check("llama-bpe", "ok|!/|b|!\n");
    // Marks belong to letters in some.
    check("qwen2", "e|\u{301}x");
    check("qwen35", "e\u{301}x");
    check("deepseek-v3", "e\u{301}x");
    check("tekken", "e\u{301}x");
}

#[test]
fn spaces_and_lines_stand_where_they_should() {
    check("gpt-2", "a|  | b| \n");
    check("llama-bpe", "a|  | b| \n\n|  | c|.\n\n|d|  ");
    check("gpt-2", "a|\n|\n|b");
    check("bailingmoe", "a| \n\n| b");
    check("seed-coder", "a|.|\n\n|b");
    check("qwen2", "a|.\n\n|b");
    check("deepseek-coder", "a|\n|\n|b| c|,| d");
    check("deepseek-llm", "a|\n|b| | c|,| d|  ");
    check("default", "a|...| b|=| c|$");
    check("falcon", "a|`|b|...| c");
    check("bloom", "a|,| b| c|. (|d|)");
}

#[test]
fn scripts_are_told_apart() {
    check("deepseek-v3", "abc|東京です|ok");
    check("deepseek-v3", "x|.foo| +=|bar|=baz");
    check("deepseek-llm", "Привет| мир|東京|，|ok");
    check("deepseek-llm", "ա");
    check("exaone-moe", "hello world| |1|2| x y");
    check("llama-bpe", "東京です|🦀🧪");
}

#[test]
fn all_names_can_be_used() {
    let mut names = std::collections::BTreeSet::new();
    for pre in KNOWN {
        let (text, mut parts) = ("naïve — 東京 🦀 1234\r\n\tend's  ", String::new());
        pre.splits().unwrap().each(text, |part| parts += part);
        assert_eq!(parts, text, "{:?}", pre.names);
        assert!(pre.names.iter().all(|name| names.insert(name)), "a name is there twice");
    }
    assert!(names.len() > 60);
    let docs = include_str!("../../../../docs/serve.md");
    for name in names {
        assert!(docs.contains(&format!("`{name}`")), "docs/serve.md does not name {name}");
    }
    let problem = Pre::of("chaotic").err().expect("no such name").to_string();
    assert!(problem.contains("`chaotic`; expected one of default, llama-bpe, llama3"), "{problem}");
    assert!(problem.contains("superbpe"), "{problem}");
}

#[test]
fn no_rule_takes_a_square_of_time() {
    let runs = ["a", "A", "e\u{301}", "\u{301}", "東", "1", "½", " ", "\n", " \n", "!", "a ", "'"];
    for pre in KNOWN {
        let splits = pre.splits().unwrap();
        for run in runs {
            // In 200,000 characters, a square would take minutes.
            let text = run.repeat(200_000 / run.chars().count()) + "x";
            let (start, mut length) = (Instant::now(), 0);
            splits.each(&text, |part| length += part.len());
            assert_eq!(length, text.len());
            let took = start.elapsed();
            assert!(took < Duration::from_secs(20), "{:?}: {took:?} for a run of {run:?}", pre.names);
        }
    }
}
