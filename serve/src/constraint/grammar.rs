//! The state of one answer under a constraint.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use llguidance::{Matcher, api::StopReason};
use toktrie::{SimpleVob, TokEnv};

use super::compiler::reason;

/// The longest that it may take to find the tokens that may come next: a thousand times what it
/// usually does.
const MAX_TIME: Duration = Duration::from_secs(2);

/// A compiled constraint, and how far an answer has come under it.
pub struct Grammar {
    matcher: Box<Matcher>,
    /// The tokens that may come next; `None` until they are asked for.
    allowed: Option<Arc<SimpleVob>>,
}

impl Grammar {
    /// Before the first token.
    pub(super) fn new(matcher: Matcher) -> Result<Self, String> {
        let mut grammar = Self { matcher: Box::new(matcher), allowed: None };
        grammar.advance()?;
        if grammar.allowed().is_none_or(|allowed| allowed.is_zero()) {
            return Err("it accepts nothing".into());
        }
        Ok(grammar)
    }

    /// Takes the next token of the answer, which is one of those that are allowed.
    ///
    /// # Errors
    /// Why the answer cannot go on.
    pub(crate) fn push(&mut self, token: u32) -> Result<(), String> {
        self.allowed = None;
        self.matcher.consume_token(token).map_err(|error| reason(&error))
    }

    /// Whether the answer is complete, and nothing can follow.
    pub(crate) fn is_complete(&self) -> bool {
        let reason = self.matcher.stop_reason();
        reason != StopReason::NotStopped && reason.is_ok()
    }

    /// Finds the tokens that may come next.
    ///
    /// # Errors
    /// Why none can be found; or that it takes too long, as others wait for it.
    pub(crate) fn advance(&mut self) -> Result<(), String> {
        if self.allowed.is_none() {
            let begin = Instant::now();
            let allowed = self.matcher.compute_mask_or_eos().map_err(|error| reason(&error))?;
            if begin.elapsed() > MAX_TIME {
                return Err(format!("it takes longer than {MAX_TIME:?} to find the next tokens"));
            }
            self.allowed = Some(Arc::new(allowed));
        }
        Ok(())
    }

    /// The tokens that may come next, once they were found.
    pub(crate) fn allowed(&self) -> Option<&Arc<SimpleVob>> {
        self.allowed.as_ref()
    }

    /// Whether it is of these tokens.
    pub(super) fn is_of(&self, tokens: &TokEnv) -> bool {
        self.matcher.tok_env().is_ok_and(|own| Arc::ptr_eq(&own, tokens))
    }
}

/// A state of its own, which waits for no other.
impl Clone for Grammar {
    fn clone(&self) -> Self {
        Self { matcher: Box::new(self.matcher.deep_clone()), allowed: self.allowed.clone() }
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").field("stop_reason", &self.matcher.stop_reason()).finish_non_exhaustive()
    }
}
