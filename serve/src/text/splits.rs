//! Where byte-level BPE tokenizers split text, by the names that GGUF files give.
//!
//! The names, which of them share a rule, and what each of them implies are those
//! of llama.cpp (`src/llama-vocab.cpp`). The rules are those of the tokenizers
//! that the models were published with (`tokenizer.json`), or what llama.cpp has
//! in their place. A rule is a list of steps: each is looked for in what the
//! ones before it left, and both what it finds and what lies between stand alone.
//! The patterns' look ahead, `\s+(?!\S)|\s+`, is done by hand, so that no text takes more
//! than linear time.

mod step;

pub use step::Splits;
use step::Step::{self, Pattern, Thousands, Words};

use crate::Result;

/// What a name stands for.
pub struct Pre {
    names: &'static [&'static str],
    steps: &'static [Step],
    /// A part that is a token is taken whole, whatever merges would make of it.
    pub ignore_merges: bool,
    /// Text starts with BOS unless the file says otherwise.
    pub add_bos: bool,
}

/// A rule that implies nothing else.
const fn rule(names: &'static [&'static str], steps: &'static [Step]) -> Pre {
    Pre { names, steps, ignore_merges: false, add_bos: false }
}

/// Endings of English words, in letters of either case.
macro_rules! endings {
    () => {
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    };
}

/// Letters, with what is before them if that is no digit and ends no line.
macro_rules! word {
    () => {
        r"[^\r\n\p{L}\p{N}]?\p{L}+"
    };
}

/// Endings, and words.
macro_rules! words {
    () => {
        concat!(endings!(), "|", word!())
    };
}

/// A word that has small letters last, or one of capitals; and what may follow.
macro_rules! cased_words {
    ($ending:expr) => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            $ending,
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            $ending
        )
    };
}

/// Words, digits and symbols, and then line ends.
macro_rules! text {
    ($words:expr, $digits:expr, $symbols:expr) => {
        Words(concat!($words, "|", $digits, "|", $symbols, r"|\s*[\r\n]+"))
    };
}

/// Symbols, with a space before them and line ends behind.
macro_rules! symbols {
    () => {
        r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    };
}

/// The same, where a slash may be among the line ends.
macro_rules! symbols_slash {
    () => {
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
    };
}

const GPT2: Step = Words(r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+");
const LLAMA3: Step = text!(words!(), r"\p{N}{1,3}", symbols!());
const QWEN2: Step = text!(words!(), r"\p{N}", symbols!());
/// Words up to a space or what ends a clause, in several scripts.
const CLAUSES: Step = Pattern(" ?[^\\s()|.,!?\u{2026}\u{3002}\u{ff0c}\u{3001}\u{964}\u{6d4}\u{60c}]+");
/// Chinese characters, kana and hangul, and what lies before and between them.
const EAST_ASIAN: Step = Pattern(r"[\u{800}-\u{9fa5}\u{ac00}-\u{d7ff}]+");
/// Chinese characters and kana.
const HAN_KANA: Step = Pattern(r"[\u{4e00}-\u{9fa5}\u{3040}-\u{30ff}]+");
/// What stands before letters, here also symbols of ASCII, and then text in which
/// marks belong to letters.
const DEEPSEEK3: Step =
    text!(r"[!-/:-@\[-`{-~][A-Za-z]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+", r" ?[\p{P}\p{S}]+[\r\n]*");
/// Letters that have a case, of those that there were when it was written.
const CASED: Step = Pattern(concat!(
    r"\s?[",
    r"\u{41}-\u{5a}\u{61}-\u{7a}\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}",
    r"\u{1c4}-\u{293}\u{295}-\u{2af}\u{370}-\u{373}\u{376}-\u{377}\u{37b}-\u{37d}\u{37f}",
    r"\u{386}\u{388}-\u{38a}\u{38c}\u{38e}-\u{3a1}\u{3a3}-\u{3f5}\u{3f7}-\u{481}",
    r"\u{48a}-\u{52f}\u{531}-\u{556}\u{10a0}-\u{10c5}\u{13a0}-\u{13f5}\u{13f8}-\u{13fd}",
    r"\u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}\u{1d79}-\u{1d9a}",
    r"\u{1e00}-\u{1f15}\u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\u{1f50}-\u{1f57}",
    r"\u{1f59}\u{1f5b}\u{1f5d}\u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}",
    r"\u{1fc2}-\u{1fc4}\u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}\u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}",
    r"\u{1ff2}-\u{1ff4}\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\u{210a}-\u{2113}\u{2115}",
    r"\u{2119}-\u{211d}\u{2124}\u{2126}\u{2128}\u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}",
    r"\u{213c}-\u{213f}\u{2145}-\u{2149}\u{214e}\u{2183}-\u{2184}\u{2c00}-\u{2c7b}",
    r"\u{2c7e}-\u{2ce4}\u{2ceb}-\u{2cee}\u{2cf2}-\u{2cf3}\u{a640}-\u{a66d}\u{a680}-\u{a69b}",
    r"\u{a722}-\u{a76f}\u{a771}-\u{a787}\u{a78b}-\u{a78e}\u{ab70}-\u{abbf}\u{fb00}-\u{fb06}",
    r"\u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}\u{10400}-\u{1044f}",
    r"\u{104b0}-\u{104d3}\u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}",
    r"\u{118a0}-\u{118df}\u{1e900}-\u{1e943}",
    r"]+"
));

static KNOWN: &[Pre] = &[
    rule(&["default"], &[Pattern(r"[\p{P}$+<=>^~|]+"), GPT2, Pattern(r"\p{N}+"), Pattern("[0-9][0-9][0-9]")]),
    Pre {
        ignore_merges: true,
        add_bos: true,
        ..rule(
            &[
                "llama-bpe",
                "llama3",
                "llama-v3",
                "falcon3",
                "falcon-h1",
                "pixtral",
                "midm-2.0",
                "lfm2",
                "jina-v5-nano",
            ],
            &[LLAMA3],
        )
    },
    Pre {
        ignore_merges: true,
        add_bos: true,
        ..rule(&["tekken"], &[text!(cased_words!(""), r"\p{N}", symbols_slash!())])
    },
    Pre { ignore_merges: true, ..rule(&["minicpm5"], &[Pattern(r"\p{N}{1,3}"), LLAMA3]) },
    rule(&["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], &[LLAMA3]),
    rule(
        &[
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
        ],
        &[QWEN2],
    ),
    rule(
        &["qwen35"],
        &[text!(
            concat!(endings!(), r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"),
            r"\p{N}",
            r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        )],
    ),
    rule(&["ufakzeka"], &[text!(word!(), r"\p{N}", symbols!())]),
    rule(&["seed-coder"], &[text!(words!(), r"\p{N}", r" ?[^\s\p{L}\p{N}]+")]),
    rule(
        &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"],
        &[text!(cased_words!(concat!(endings!(), "?")), r"\p{N}{1,3}", symbols_slash!())],
    ),
    rule(
        &["bailingmoe", "bailingmoe2", "llada-moe"],
        &[Words(concat!(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"|\s*[\r\n]"
        ))],
    ),
    rule(
        &["exaone-moe"],
        &[Words(concat!(
            endings!(),
            r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?",
            r"|\s*[\r\n]"
        ))],
    ),
    rule(
        &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "roberta-bpe",
            "jina-es",
            "jina-de",
            "jina-v1-en",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v2-code",
        ],
        &[GPT2],
    ),
    rule(
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[Pattern(r"\p{N}"), GPT2],
    ),
    rule(&["falcon"], &[Pattern(r"[\p{P}$+<=>^~|`]+"), GPT2, Pattern("[0-9][0-9][0-9]")]),
    rule(
        &["deepseek-llm"],
        &[
            Pattern(r"[\r\n]"),
            CASED,
            Pattern(r"\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+"),
            Pattern(r"\s+$"),
            EAST_ASIAN,
            Pattern(r"\p{N}+"),
        ],
    ),
    rule(
        &["deepseek-coder"],
        &[Pattern(r"[\r\n]"), Pattern(r"\s?\p{L}+"), Pattern(r"\s?\p{P}+"), EAST_ASIAN, Pattern(r"\p{N}")],
    ),
    rule(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        &[Pattern(r"\p{N}{1,3}"), HAN_KANA, DEEPSEEK3],
    ),
    rule(&["poro-chat", "bloom", "gpt3-finnish"], &[CLAUSES]),
    rule(&["viking"], &[CLAUSES, Pattern(r"\p{N}")]),
    // Numbers in groups of three from the right; all else is left to merges.
    rule(&["superbpe"], &[Pattern(r"\p{N}+"), Thousands]),
];

impl Pre {
    /// What a name stands for.
    pub fn of(name: &str) -> Result<&'static Self> {
        KNOWN.iter().find(|pre| pre.names.contains(&name)).ok_or_else(|| {
            let known: Vec<_> = Self::names().collect();
            format!("its tokenizer splits text as `{name}`; expected one of {}", known.join(", ")).into()
        })
    }

    /// All names.
    pub fn names() -> impl Iterator<Item = &'static str> {
        KNOWN.iter().flat_map(|pre| pre.names).copied()
    }

    /// The rule, ready to be used.
    pub fn splits(&self) -> Result<Splits> {
        Splits::new(self.steps)
    }
}

#[cfg(test)]
mod tests;
