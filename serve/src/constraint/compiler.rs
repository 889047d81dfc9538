//! Constraints into grammars, for the tokens of one model.

use std::{
    sync::{Arc, OnceLock},
    thread,
};

use llguidance::{
    Matcher, ParserFactory,
    api::{GrammarWithLexer, ParserLimits, TopLevelGrammar},
    earley::SlicedBiasComputer,
};
use serde_json::{Value, json};
use toktrie::{ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

use super::{Constraint, Grammar, InvalidConstraint, schema};
use crate::text::Text;

/// The most bytes of all schemas of a constraint.
const MAX_SCHEMA_BYTES: usize = 256 << 10;
/// The most bytes of a regular expression, and of a line of rules. What is longer may take seconds
/// for each token.
const MAX_LINE_BYTES: usize = 4 << 10;
/// The most bytes of rules.
const MAX_RULE_BYTES: usize = 64 << 10;
/// Rules are compiled one within the other, so that a stack has to have room for all of them.
const COMPILER_STACK_BYTES: usize = 512 << 20;
/// The most blanks in a row between what JSON needs: enough for any indentation, and no model
/// writes blanks for ever.
const JSON_BLANKS: &str = r"[\x20\x0A\x0D\x09]{1,64}";
/// The longest token that a grammar may take; others never come.
const MAX_TOKEN_BYTES: usize = 512;
/// The most states of a grammar's lexer, of about 2 kB.
const MAX_LEXER_STATES: usize = 50_000;

/// What is said of a constraint at which the library fails.
const NOT_COMPILED: &str = "it is none that can be compiled";

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
        let grammars = sources(constraint).map_err(invalid)?;
        let compile = || {
            let factory = self.factory.get_or_init(|| factory(&self.text));
            let factory = factory.as_ref().map_err(String::clone)?;
            let parser = factory.create_parser(TopLevelGrammar { grammars, max_tokens: None });
            Grammar::new(Matcher::new(Ok(parser.map_err(|error| reason(&error))?)))
        };
        let compiled = thread::scope(|scope| {
            let compiler = thread::Builder::new().stack_size(COMPILER_STACK_BYTES);
            let compiler = compiler.name("constraint".into()).spawn_scoped(scope, compile);
            let compiler = compiler.map_err(|error| format!("no thread can be started: {error}"))?;
            compiler.join().unwrap_or_else(|_| Err(NOT_COMPILED.into()))
        });
        compiled.map_err(invalid)
    }

    /// Whether it is of the tokens of this compiler.
    pub fn is_of(&self, grammar: &Grammar) -> bool {
        let factory = self.factory.get().and_then(|factory| factory.as_ref().ok());
        factory.is_some_and(|factory| grammar.is_of(factory.tok_env()))
    }
}

/// The grammars of a constraint, as the library reads them; the first is the answer's.
fn sources(constraint: &Constraint) -> Result<Vec<GrammarWithLexer>, String> {
    match constraint {
        Constraint::JsonObject => json([&json!({ "type": "object" })]),
        Constraint::JsonSchema(schema) => json([schema]),
        Constraint::Regex(regex) => {
            check_bytes(regex.len(), MAX_LINE_BYTES, "it")?;
            Ok(vec![GrammarWithLexer::from_regex(regex)])
        }
        Constraint::Lark { rules, schemas } => {
            check_bytes(rules.len(), MAX_RULE_BYTES, "it")?;
            let longest = rules.lines().map(str::len).max().unwrap_or(0);
            check_bytes(longest, MAX_LINE_BYTES, "a line of it")?;
            if rules.contains("%json") {
                return Err("it has `%json`; expected `@name`, and the schema of that name".into());
            }
            let mut grammars = vec![GrammarWithLexer::from_lark(rules.clone())];
            for (name, grammar) in schemas.keys().zip(json(schemas.values())?) {
                grammars.push(GrammarWithLexer { name: Some(name.clone()), ..grammar });
            }
            Ok(grammars)
        }
    }
}

/// The grammars of schemas, which are checked, and then have few blanks in a row.
fn json<'a>(schemas: impl IntoIterator<Item = &'a Value>) -> Result<Vec<GrammarWithLexer>, String> {
    let mut bytes = 0;
    let grammar = |schema: &Value| {
        // Before anything else walks over it.
        schema::check(schema)?;
        bytes += schema.to_string().len();
        check_bytes(bytes, MAX_SCHEMA_BYTES, "it")?;
        let mut schema = schema.clone();
        if let Value::Object(keywords) = &mut schema {
            keywords.insert("x-guidance".into(), json!({ "whitespace_pattern": JSON_BLANKS }));
        }
        Ok(GrammarWithLexer::from_json_schema(schema))
    };
    schemas.into_iter().map(grammar).collect()
}

fn check_bytes(bytes: usize, most: usize, what: &str) -> Result<(), String> {
    match bytes <= most {
        true => Ok(()),
        false => Err(format!("{what} has {bytes} bytes; expected at most {most}")),
    }
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
        return NOT_COMPILED.into();
    }
    let text = text.split("\n<").next().unwrap_or_default();
    if text == "NoExtensionBias" {
        return "no token of the model can follow".into();
    }
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join("; ").chars().take(MAX_CHARS).collect()
}
