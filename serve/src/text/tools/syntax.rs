//! What is written around calls of tools, by format.

use super::ToolFormat;

/// Marks and other words, one after the other. Blanks at their ends are written as they are here,
/// and read as any or none.
pub type Words = &'static [&'static str];

/// How calls are written.
#[derive(Debug)]
pub struct Syntax {
    /// Those of the marks in `open` and `call_open` at which calls may begin in text.
    pub entries: Words,
    /// Before all calls.
    pub open: Words,
    /// Between two of them.
    pub between: Words,
    /// Behind all.
    pub close: Words,
    /// Before each.
    pub call_open: Words,
    /// What a call is.
    pub form: Form,
    /// Behind each.
    pub call_close: Words,
}

/// What a call is.
#[derive(Debug)]
pub enum Form {
    /// `{"name": …, "arguments": {…}}`, with this key for the arguments.
    Object { arguments: &'static str },
    /// The name, and an object of the arguments.
    NamedObject {
        /// A word after which the model may write an id, behind the name.
        id: Option<&'static str>,
        behind_name: Words,
    },
    /// The name, and each argument for itself.
    NamedParameters { behind_name: Words, words: ParameterWords },
}

/// How arguments are written of which each stands for itself. A string is written as it is, and
/// other values as JSON.
#[derive(Clone, Copy, Debug)]
pub struct ParameterWords {
    /// Before a key.
    pub open: &'static str,
    /// Between a key and its value.
    pub behind_key: Words,
    /// Behind a value.
    pub close: Words,
    /// Behind all arguments.
    pub end: &'static str,
}

impl ParameterWords {
    /// Whether a value stands in lines of its own.
    pub fn has_lines(&self) -> bool {
        self.close.first() == Some(&"\n")
    }

    /// The mark behind a value.
    pub fn close_mark(&self) -> &'static str {
        marks(self.close).first().copied().unwrap_or_default()
    }

    /// The marks that end a value. The first should, and the others do where it was forgotten.
    pub fn ends_of_value(&self) -> [&'static str; 3] {
        [self.close_mark(), self.open, self.end]
    }
}

impl Syntax {
    /// All words, without blanks at their ends.
    pub fn marks(&self) -> Vec<&'static str> {
        let mut words = [self.open, self.call_open, self.call_close, self.close].concat();
        match &self.form {
            Form::Object { .. } => {}
            Form::NamedObject { id, behind_name } => {
                words.extend(id);
                words.extend(*behind_name);
            }
            Form::NamedParameters { behind_name, words: of } => {
                words.extend([*behind_name, &[of.open], of.behind_key, of.close, &[of.end]].concat());
            }
        }
        marks(&words)
    }
}

/// Words without blanks at their ends, and without those that are blanks only.
pub fn marks(words: &[&'static str]) -> Vec<&'static str> {
    words.iter().map(|word| word.trim()).filter(|word| !word.is_empty()).collect()
}

impl ToolFormat {
    /// How its calls are written.
    pub(super) const fn syntax(self) -> &'static Syntax {
        match self {
            Self::Hermes => &HERMES,
            Self::Llama => &LLAMA,
            Self::Mistral => &MISTRAL,
            Self::MistralArgs => &MISTRAL_ARGS,
            Self::Granite => &GRANITE,
            Self::Jamba => &JAMBA,
            Self::InternLm2 => &INTERN_LM2,
            Self::Qwen3Coder => &QWEN3_CODER,
            Self::Glm => &GLM,
            Self::DeepSeekV3 => &DEEP_SEEK_V3,
            Self::DeepSeekV31 => &DEEP_SEEK_V31,
        }
    }
}

const ARGUMENTS: Form = Form::Object { arguments: "arguments" };
const PARAMETERS: Form = Form::Object { arguments: "parameters" };

static HERMES: Syntax = Syntax {
    entries: &["<tool_call>"],
    open: &[],
    between: &["\n"],
    close: &[],
    call_open: &["<tool_call>", "\n"],
    form: ARGUMENTS,
    call_close: &["\n", "</tool_call>"],
};

/// The mark is left away where all that is said is a call, which is how it is written.
static LLAMA: Syntax = Syntax {
    entries: &["<|python_tag|>"],
    open: &[],
    between: &["; "],
    close: &[],
    call_open: &[],
    form: PARAMETERS,
    call_close: &[],
};

static MISTRAL: Syntax = list(&["[TOOL_CALLS]"], &["[TOOL_CALLS]", "["], &["]"]);
static GRANITE: Syntax = list(&["<|tool_call|>"], &["<|tool_call|>", "["], &["]"]);
static JAMBA: Syntax = list(&["<tool_calls>"], &["<tool_calls>", "["], &["]", "</tool_calls>"]);

static MISTRAL_ARGS: Syntax = Syntax {
    entries: &["[TOOL_CALLS]"],
    open: &[],
    between: &[],
    close: &[],
    call_open: &["[TOOL_CALLS]"],
    form: Form::NamedObject { id: Some("[CALL_ID]"), behind_name: &["[ARGS]"] },
    call_close: &[],
};

static INTERN_LM2: Syntax = Syntax {
    entries: &["<|action_start|>"],
    open: &[],
    between: &["\n"],
    close: &[],
    call_open: &["<|action_start|>", "<|plugin|>", "\n"],
    form: PARAMETERS,
    call_close: &["\n", "<|action_end|>"],
};

/// The first mark is sometimes forgotten.
static QWEN3_CODER: Syntax = Syntax {
    entries: &["<tool_call>", "<function="],
    open: &[],
    between: &["\n"],
    close: &[],
    call_open: &["<tool_call>", "\n", "<function="],
    form: Form::NamedParameters {
        behind_name: &[">", "\n"],
        words: ParameterWords {
            open: "<parameter=",
            behind_key: &[">", "\n"],
            close: &["\n", "</parameter>", "\n"],
            end: "</function>",
        },
    },
    call_close: &["\n", "</tool_call>"],
};

static GLM: Syntax = Syntax {
    entries: &["<tool_call>"],
    open: &[],
    between: &["\n"],
    close: &[],
    call_open: &["<tool_call>"],
    form: Form::NamedParameters {
        behind_name: &["\n"],
        words: ParameterWords {
            open: "<arg_key>",
            behind_key: &["</arg_key>", "\n", "<arg_value>"],
            close: &["</arg_value>", "\n"],
            end: "</tool_call>",
        },
    },
    call_close: &[],
};

static DEEP_SEEK_V3: Syntax = Syntax {
    between: &["\n"],
    call_open: &["<｜tool▁call▁begin｜>", "function", "<｜tool▁sep｜>"],
    form: Form::NamedObject { id: None, behind_name: &["\n```json\n"] },
    call_close: &["\n```", "<｜tool▁call▁end｜>"],
    ..DEEP_SEEK_V31
};

const DEEP_SEEK_V31: Syntax = Syntax {
    entries: &["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"],
    open: &["<｜tool▁calls▁begin｜>"],
    between: &[],
    close: &["<｜tool▁calls▁end｜>"],
    call_open: &["<｜tool▁call▁begin｜>"],
    form: Form::NamedObject { id: None, behind_name: &["<｜tool▁sep｜>"] },
    call_close: &["<｜tool▁call▁end｜>"],
};

/// A JSON array of calls.
const fn list(entries: Words, open: Words, close: Words) -> Syntax {
    Syntax { entries, open, between: &[", "], close, call_open: &[], form: ARGUMENTS, call_close: &[] }
}
