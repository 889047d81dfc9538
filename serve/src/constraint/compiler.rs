//! Constraints into grammars, for the tokens of one model.

use std::sync::{Arc, OnceLock};

use llguidance::{
    Matcher, ParserFactory,
    api::{GrammarWithLexer, ParserLimits, TopLevelGrammar},
    earley::SlicedBiasComputer,
};
use serde_json::{Value, json};
use toktrie::{ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

use super::{Constraint, Grammar, InvalidConstraint, schema};
use crate::text::Text;

/// The most bytes of a constraint.
const MAX_BYTES: usize = 256 << 10;
/// The most blanks in a row between what JSON needs: enough for any indentation, and no model
/// writes blanks for ever.
const JSON_BLANKS: &str = r"[\x20\x0A\x0D\x09]{1,64}";
/// The longest token that a grammar may take; others never come.
const MAX_TOKEN_BYTES: usize = 512;
/// The most states of a grammar's lexer, of about 2 kB.
const MAX_LEXER_STATES: usize = 50_000;

/// What compiles constraints: the model's tokens as a tree, which is made when the first
/// constraint comes.
pub struct Compiler {
    text: Arc<Text>,
    factory: OnceLock<Result<ParserFactory, String>>,
}

impl Compiler {
    /// For the tokens of a tokenizer.
    pub fn new(text: &Arc<Text>) -> Self {
        Self { text: text.clone(), factory: OnceLock::new() }
    }

    /// Compiles a constraint.
    ///
    /// # Errors
    /// It is too large, cannot be read, or accepts nothing.
    pub fn compile(&self, constraint: &Constraint) -> Result<Grammar, InvalidConstraint> {
        let invalid = |problem| InvalidConstraint { kind: constraint.kind(), problem };
        let grammar = source(constraint).map_err(invalid)?;
        let factory = self.factory.get_or_init(|| factory(&self.text));
        let factory = factory.as_ref().map_err(|problem| invalid(problem.clone()))?;
        let parser = factory.create_parser(TopLevelGrammar::from_grammar(grammar));
        let parser = parser.map_err(|error| invalid(reason(&error)))?;
        Grammar::new(Matcher::new(Ok(parser))).map_err(invalid)
    }

    /// Whether it is of the tokens of this compiler.
    pub fn is_of(&self, grammar: &Grammar) -> bool {
        let factory = self.factory.get().and_then(|factory| factory.as_ref().ok());
        factory.is_some_and(|factory| grammar.is_of(factory.tok_env()))
    }
}

/// The grammar of a constraint, as the library reads it.
fn source(constraint: &Constraint) -> Result<GrammarWithLexer, String> {
    let check_size = |bytes| match bytes {
        ..=MAX_BYTES => Ok(()),
        _ => Err(format!("it has {bytes} bytes; expected at most {MAX_BYTES}")),
    };
    Ok(match constraint {
        Constraint::JsonObject => {
            GrammarWithLexer::from_json_schema(with_few_blanks(json!({ "type": "object" })))
        }
        Constraint::JsonSchema(schema) => {
            // Before anything walks over it.
            schema::check(schema)?;
            check_size(schema.to_string().len())?;
            GrammarWithLexer::from_json_schema(with_few_blanks(schema.clone()))
        }
        Constraint::Regex(regex) => {
            check_size(regex.len())?;
            GrammarWithLexer::from_regex(regex)
        }
        Constraint::Lark(grammar) => {
            check_size(grammar.len())?;
            GrammarWithLexer::from_lark(grammar.clone())
        }
    })
}

/// A schema in whose JSON there are not too many blanks in a row.
pub fn with_few_blanks(mut schema: Value) -> Value {
    if let Value::Object(keywords) = &mut schema {
        keywords.insert("x-guidance".into(), json!({ "whitespace_pattern": JSON_BLANKS }));
    }
    schema
}

/// What makes parsers for the tokens of a model.
fn factory(text: &Text) -> Result<ParserFactory, String> {
    let words: Vec<_> = (0..text.vocab_size() as u32).map(|id| word(text, id)).collect();
    let count = u32::try_from(words.len()).map_err(|_| "there are too many tokens".to_owned())?;
    let mut trie = TokTrie::from(&TokRxInfo::new(count, INVALID_TOKEN), &words);
    let ends: Vec<_> = text.ends().iter().copied().collect();
    if !ends.is_empty() {
        trie = trie.with_eos_tokens(&ends);
    }
    let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let slices = SlicedBiasComputer::json_slices();
    let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
        .map_err(|error| reason(&error))?;
    *factory.limits_mut() =
        ParserLimits { max_lexer_states: MAX_LEXER_STATES, verbose_errors: false, ..ParserLimits::default() };
    factory.quiet();
    Ok(factory)
}

/// The bytes of a token; of a control token its name behind a mark. None of one that no
/// grammar may take.
fn word(text: &Text, id: u32) -> Vec<u8> {
    const MARK: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
    let bytes = text.token_bytes(id);
    match bytes.first() {
        _ if bytes.len() > MAX_TOKEN_BYTES => Vec::new(),
        Some(_) if text.is_control(id) => [&[MARK], bytes].concat(),
        Some(&MARK) => Vec::new(),
        _ => bytes.into(),
    }
}

/// What the library says of a problem, without its state.
pub fn reason(error: &impl std::fmt::Display) -> String {
    const MAX_CHARS: usize = 400;
    let text = error.to_string();
    if text.starts_with("panic: ") {
        return "it is none that can be compiled".into();
    }
    let text = text.split("\n<").next().unwrap_or_default();
    if text == "NoExtensionBias" {
        return "no token of the model can follow".into();
    }
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join("; ").chars().take(MAX_CHARS).collect()
}
