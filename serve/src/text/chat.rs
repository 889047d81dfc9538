//! Chats as a model was trained to read them.

use std::{collections::HashSet, sync::Arc};

use serde_json::{Map, Value};

use super::{
    MAX_CHAT_BYTES,
    error::ChatError,
    marks::{Rendered, StandIns},
    message::{ArgumentsAs, Message, Role},
    metadata::Metadata,
    names::Names,
    source,
    template::Template,
    vocabulary::Vocabulary,
};
use crate::Result;

/// How a chat is written.
#[derive(Clone, Debug)]
pub struct ChatOptions {
    /// The text ends where the model's answer begins. True by default.
    pub add_generation_prompt: bool,
    /// The text ends with the last message's, which the model goes on with; not together with
    /// [`add_generation_prompt`](Self::add_generation_prompt). False by default.
    pub continue_final_message: bool,
    /// The most tokens: a chat that cannot be as few is an error, [`ChatError::TooManyTokens`], before they
    /// are counted. Any number by default.
    pub max_tokens: Option<usize>,
    /// Further variables of the template, such as `enable_thinking`.
    pub variables: Map<String, Value>,
    /// The time that templates are told; that of the call by default.
    pub now: Option<jiff::Zoned>,
}

impl Default for ChatOptions {
    fn default() -> Self {
        Self {
            add_generation_prompt: true,
            continue_final_message: false,
            max_tokens: None,
            variables: Map::new(),
            now: None,
        }
    }
}

/// The chat templates of a file.
pub struct Chat {
    usual: Source,
    /// Used when there are tools, if the file has one.
    tool_use: Option<Source>,
    /// The names of control tokens.
    names: Arc<Names>,
    /// The variables `bos_token` and others, by the files' keys.
    tokens: Vec<(&'static str, String)>,
}

/// A template, compiled with the stand-ins that are used unless messages have them.
struct Source {
    text: String,
    stand_ins: StandIns,
    template: Result<Template, ChatError>,
}

impl Source {
    fn new(text: &str, names: &Names) -> Result<Self> {
        let stand_ins = StandIns::new(names, &HashSet::new())?;
        let template = template(text, &stand_ins, names);
        Ok(Self { text: text.into(), stand_ins, template })
    }
}

fn template(text: &str, stand_ins: &StandIns, names: &Names) -> Result<Template, ChatError> {
    Template::new(source::rewrite(text, |literal| stand_ins.mark(literal, names)))
}

impl Chat {
    /// The templates of a file, if there are any. What is wrong about one is added to
    /// `warnings`, and an error when it is used.
    pub fn read(
        metadata: Metadata<'_>,
        vocabulary: &Vocabulary,
        control: &Arc<Names>,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Self>> {
        let Some(usual) = metadata.string("chat_template")? else { return Ok(None) };
        let usual = Source::new(usual, control)?;
        let tool_use =
            metadata.string("chat_template.tool_use")?.map(|text| Source::new(text, control)).transpose()?;
        for source in [Some(&usual), tool_use.as_ref()].into_iter().flatten() {
            if let Err(problem) = source.template.as_ref().map_err(Clone::clone).and_then(Template::check) {
                warnings.push(problem.to_string());
            }
        }
        let mut tokens = Vec::new();
        for (variable, key) in [
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("unk_token", "unknown_token_id"),
            ("pad_token", "padding_token_id"),
        ] {
            let id = metadata.integers(&format!("ggml.{key}"))?.and_then(|ids| ids.first().copied());
            let token = id.and_then(|id| vocabulary.tokens.get(usize::try_from(id).ok()?));
            tokens.extend(token.map(|token| (variable, token.clone())));
        }
        Ok(Some(Self { usual, tool_use, names: Arc::clone(control), tokens }))
    }

    /// The template for chats with tools.
    pub fn tool_template(&self) -> &str {
        &self.tool_use.as_ref().unwrap_or(&self.usual).text
    }

    /// The chat as the template writes it.
    ///
    /// # Errors
    /// What the template raises, and what goes wrong in it; a last message that cannot be
    /// continued; a chat of more than 16 MiB.
    pub fn render(&self, messages: &[Message], tools: &[Value], options: &ChatOptions) -> Result<Rendered> {
        let rendered = self.render_calls(ArgumentsAs::Object, messages, tools, options);
        let has_calls = messages.iter().any(|message| !message.tool_calls.is_empty());
        match rendered {
            Err(error) if has_calls && matches!(error.downcast_ref(), Some(ChatError::Template(_))) => {
                self.render_calls(ArgumentsAs::Text, messages, tools, options).map_err(|_| error)
            }
            rendered => rendered,
        }
    }

    /// The same, where the template takes calls' arguments so.
    fn render_calls(
        &self,
        arguments: ArgumentsAs,
        messages: &[Message],
        tools: &[Value],
        options: &ChatOptions,
    ) -> Result<Rendered> {
        let mut variables = options.variables.clone();
        let messages = messages.iter().map(|message| message.for_template(arguments));
        let mut messages = messages.collect::<Result<Vec<_>>>()?;
        let end = if options.continue_final_message { Some(mark_end(&mut messages)?) } else { None };
        variables.insert("messages".into(), messages.into());
        if !tools.is_empty() {
            variables.insert("tools".into(), tools.into());
        }
        variables.insert("add_generation_prompt".into(), options.add_generation_prompt.into());
        let used = private_characters(&serde_json::to_string(&variables)?);
        let source = match &self.tool_use {
            Some(source) if !tools.is_empty() => source,
            _ => &self.usual,
        };
        let (own_stand_ins, own_template);
        let (stand_ins, template) = if source.stand_ins.are_free_of(&used) {
            (&source.stand_ins, source.template.as_ref().map_err(Clone::clone)?)
        } else {
            own_stand_ins = StandIns::new(&self.names, &used)?;
            own_template = template(&source.text, &own_stand_ins, &self.names)?;
            (&own_stand_ins, &own_template)
        };
        for (variable, token) in &self.tokens {
            variables.entry(*variable).or_insert_with(|| stand_ins.mark(token, &self.names).into());
        }
        let mut text = template.render(&variables, options.now.as_ref())?;
        if let Some(end) = end {
            let at = text.rfind(end).ok_or(
                "the chat template does not write the last message as it is, so it cannot be continued",
            )?;
            text.truncate(at);
        }
        Ok(stand_ins.unmark(&text, MAX_CHAT_BYTES).ok_or(ChatError::TooLong { most: MAX_CHAT_BYTES })?)
    }
}

/// Adds a character that is in none of the messages to the end of the last one.
fn mark_end(messages: &mut [Value]) -> Result<char> {
    let used = private_characters(&serde_json::to_string(messages)?);
    let end = ('\u{f0000}'..='\u{ffffd}').find(|c| !used.contains(c));
    let end = end.ok_or("the messages use up Unicode's private characters")?;
    let last = messages.last_mut().filter(|last| last["role"] == Role::Assistant.name());
    let content = last.and_then(|last| last.get_mut("content"));
    let Some(Value::String(content)) = content else {
        return Err("only a last message of the assistant can be continued".into());
    };
    content.push(end);
    Ok(end)
}

/// The characters of a text that may be stand-ins.
fn private_characters(text: &str) -> HashSet<char> {
    text.chars().filter(|c| *c >= '\u{f0000}').collect()
}
