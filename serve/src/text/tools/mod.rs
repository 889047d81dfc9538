//! Calls of tools: how a model writes them, found by its template; a constraint that has it
//! write some; and what it called.

mod call;
mod constraint;
mod object;
mod parameters;
mod parser;
mod syntax;
#[cfg(test)]
mod tests;
mod types;

use rand::distr::{Alphanumeric, SampleString};

pub use self::parser::{ToolParser, ToolPiece};
use super::Text;

/// How a model writes calls of tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>` for each: Hermes, Qwen and others.
    Hermes,
    /// `{"name": …, "parameters": {…}}`, behind `<|python_tag|>` or as all that is said: Llama 3.
    Llama,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`: Mistral.
    Mistral,
    /// `[TOOL_CALLS]name[ARGS]{…}` for each, with `[CALL_ID]…` behind the name in some: later
    /// Mistral.
    MistralArgs,
    /// `<|tool_call|>[{"name": …, "arguments": {…}}, …]`: Granite 3.
    Granite,
    /// `<tool_calls>[{"name": …, "arguments": {…}}, …]</tool_calls>`: Jamba.
    Jamba,
    /// `<|action_start|><|plugin|>{"name": …, "parameters": {…}}<|action_end|>`: InternLM 2.
    InternLm2,
    /// `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>` for
    /// each: Qwen3-Coder.
    Qwen3Coder,
    /// `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>` for each:
    /// GLM 4.5 and later.
    Glm,
    /// Between marks of their own `function`, the name, and the arguments as a block of JSON:
    /// DeepSeek V3 and R1.
    DeepSeekV3,
    /// Between the same marks the name and the arguments: DeepSeek V3.1.
    DeepSeekV31,
}

/// Why a model cannot be offered tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoToolFormat {
    /// There is no template, or none that has a place for tools.
    #[error("the model's chat template does not tell it of tools")]
    NotTold,
    /// The template has tools called in none of the forms of [`ToolFormat`].
    #[error("the model's chat template has tools called in a form that is not read here")]
    NotRead,
}

impl ToolFormat {
    /// That of a chat template.
    ///
    /// # Errors
    /// It has no place for tools, or they are called in another form.
    pub(super) fn of(template: &str) -> Result<Self, NoToolFormat> {
        let has = |mark: &str| template.contains(mark);
        if !has("tools") {
            return Err(NoToolFormat::NotTold);
        }
        Ok(if has("[TOOL_CALLS]") {
            if has("[ARGS]") { Self::MistralArgs } else { Self::Mistral }
        } else if has("<｜tool▁call▁begin｜>") {
            if has("```json") { Self::DeepSeekV3 } else { Self::DeepSeekV31 }
        } else if has("<function=") && has("<parameter=") {
            Self::Qwen3Coder
        } else if has("<arg_key>") && has("<arg_value>") {
            Self::Glm
        } else if has("<|action_start|>") && has("<|plugin|>") {
            Self::InternLm2
        } else if has("<|tool_call|>") {
            Self::Granite
        } else if has("<tool_call>") && has("arguments") && !has("<function=") && !has("<tool_calls>") {
            Self::Hermes
        } else if has("<tool_calls>") && has("arguments") && !has("<tool_call>") {
            Self::Jamba
        } else if has("\"parameters\": ") && has("<|start_header_id|>") {
            Self::Llama
        } else {
            return Err(NoToolFormat::NotRead);
        })
    }

    /// The control tokens that are marks of calls, for
    /// [`Request::shown`](crate::request::Request::shown).
    pub fn control_tokens(self, text: &Text) -> Vec<u32> {
        self.syntax().marks().into_iter().filter_map(|mark| text.control_id(mark)).collect()
    }

    /// A name for a call: for Mistral's templates of nine letters and digits, as they want it.
    fn new_id(self) -> String {
        let random = |len| Alphanumeric.sample_string(&mut rand::rng(), len);
        match self {
            Self::Mistral | Self::MistralArgs => random(9),
            _ => format!("call_{}", random(24)),
        }
    }
}
