//! What an engine computes with.

use crate::{backend::Backend, scheduler::DraftModel};

/// A model, and one that drafts for it if there is one.
pub struct Models {
    pub(super) model: Box<dyn Backend>,
    pub(super) draft: Option<DraftModel>,
}

impl Models {
    /// Has `draft` make the drafts of the answers of this model, whose vocabulary it has.
    #[must_use]
    pub fn with_draft(self, draft: Option<DraftModel>) -> Self {
        Self { draft, ..self }
    }
}

impl<B: Backend + 'static> From<B> for Models {
    fn from(model: B) -> Self {
        Self { model: Box::new(model), draft: None }
    }
}
