//! Templates of chats: a question to the model, as it was trained to be asked.
//!
//! A file's template is a program, of which only the mark of a well-known format
//! is looked for. Llama 3's and Mistral's formats are those of their model cards.

/// A well-known format.
struct Format {
    /// What templates of this format contain.
    mark: &'static str,
    /// The mark is a token, too.
    token: bool,
    /// What comes first, what is around a system prompt, and around a question.
    open: &'static str,
    system: [&'static str; 2],
    user: [&'static str; 2],
}

const CHATML: Format = Format {
    mark: "<|im_start|>",
    token: true,
    open: "",
    system: ["<|im_start|>system\n", "<|im_end|>\n"],
    user: ["<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"],
};
const LLAMA3: Format = Format {
    mark: "<|start_header_id|>",
    token: true,
    open: "",
    system: ["<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"],
    user: [
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ],
};
const LLAMA2: Format = Format {
    mark: "<<SYS>>",
    token: false,
    open: "[INST] ",
    system: ["<<SYS>>\n", "\n<</SYS>>\n\n"],
    user: ["", " [/INST]"],
};
/// Mistral's, which has spaces inside its marks, then only behind the first, then
/// none, and then marks for the system prompt.
const MISTRAL: Format = Format { mark: " [/INST]", system: ["", "\n\n"], ..LLAMA2 };
const MISTRAL_V3: Format = Format { mark: "[INST] ", user: ["", "[/INST]"], ..MISTRAL };
const MISTRAL_TEKKEN: Format = Format { mark: "[INST]", open: "[INST]", ..MISTRAL_V3 };
const MISTRAL_V7: Format = Format {
    mark: "[SYSTEM_PROMPT]",
    open: "",
    system: ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"],
    user: ["[INST]", "[/INST]"],
    ..LLAMA2
};

/// In this order: templates may have the marks of those behind theirs, too.
static KNOWN: [&Format; 7] = [&CHATML, &LLAMA3, &LLAMA2, &MISTRAL_V7, &MISTRAL, &MISTRAL_V3, &MISTRAL_TEKKEN];

/// Whether a part of a template is text as it is, and not put together.
fn is_text(part: &str) -> bool {
    // What follows a string that ends.
    let mut behind_quotes = part.split(['\'', '"']).skip(1);
    !part.contains(['{', '}']) && !behind_quotes.any(|rest| rest.trim_start().starts_with(['+', '~']))
}

/// How a model is asked.
pub struct Chat {
    format: &'static Format,
    /// The file's own system prompt.
    system: Option<String>,
}

impl Chat {
    /// The formats, for messages.
    pub const NAMES: &str = "ChatML, Llama 3, Llama 2 or Mistral";

    /// The format of a file's template, for a vocabulary.
    pub fn find(template: &str, is_token: impl Fn(&str) -> bool) -> Option<Self> {
        // Within strings, line ends may be written out.
        let template = template.replace("\\n", "\n");
        let fits =
            |format: &&&Format| template.contains(format.mark) && (!format.token || is_token(format.mark));
        let format = *KNOWN.iter().find(fits)?;
        let [before, after] = format.system;
        let found = template.split_once(before).filter(|_| format.token);
        let system = found.and_then(|(_, rest)| rest.split_once(after)).map(|(system, _)| system);
        let system = system.filter(|system| is_text(system)).map(String::from);
        Some(Self { format, system })
    }

    /// The text up to where the model's answer begins. The system prompt is the
    /// file's own if none is given.
    pub fn question(&self, system: Option<&str>, user: &str) -> String {
        let around = |[before, after]: [&str; 2], text: &str| [before, text, after].concat();
        let system = system.or(self.system.as_deref());
        let system = system.map_or(String::new(), |system| around(self.format.system, system));
        [self.format.open, &system, &around(self.format.user, user)].concat()
    }
}
