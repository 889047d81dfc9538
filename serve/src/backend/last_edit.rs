//! How the logit of an answer's last token is edited, which the host may not know yet.

use flashinfer_rs::indices::LogitEdit;

use super::Output;

/// How the logit of a row's own token is edited, in place of what [`Output::edits`] say of it: what
/// penalties make of a token depends on whether it is the last one, and that may still be chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct LastEdit {
    /// The repetition penalty of a token that is none of the others.
    pub repetition_penalty: f32,
    /// Its bias.
    pub bias: f32,
    /// The edits of tokens that have another, in ascending order of tokens, each of which is there at
    /// most once.
    pub others: Vec<LogitEdit>,
}

impl LastEdit {
    /// The edit of this token, if it is the row's.
    pub fn of(&self, token: u32) -> LogitEdit {
        let Self { repetition_penalty, bias, ref others } = *self;
        match others.binary_search_by_key(&token, |edit| edit.token) {
            Ok(at) => others[at],
            Err(_) => LogitEdit { token, repetition_penalty, bias },
        }
    }
}

impl Output {
    /// The same, once it is known that this is the row's token.
    #[must_use]
    pub fn after(&self, token: u32) -> Self {
        let mut output = self.clone();
        if let Some(last) = output.last_edit.take() {
            let (edit, edits) = (last.of(token), &mut output.edits);
            match edits.binary_search_by_key(&token, |edit| edit.token) {
                Ok(at) => edits[at] = edit,
                Err(at) => edits.insert(at, edit),
            }
        }
        output
    }

    /// The outputs of a step of these tokens, row by row.
    ///
    /// # Errors
    /// A row is none of the step's.
    pub fn after_tokens(outputs: &[Self], tokens: &[u32]) -> crate::Result<Vec<Self>> {
        let after = |output: &Self| match tokens.get(output.row) {
            Some(&token) => Ok(output.after(token)),
            None => Err(format!("an output of row {}; the step has {}", output.row, tokens.len()).into()),
        };
        outputs.iter().map(after).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_edit_of_the_last_token_takes_the_place_of_another() {
        let edit = |token, bias| LogitEdit { token, repetition_penalty: 1.5, bias };
        let others = vec![edit(4, -0.5), LogitEdit::ban(7)];
        let last_edit = Some(LastEdit { repetition_penalty: 1.5, bias: -0.25, others });
        let (edits, none) = (vec![edit(2, 1.0), edit(4, 0.25)], Output::greedy(1));
        let output = Output { edits: edits.clone(), last_edit, ..none.clone() };
        let after = |token| {
            let after = output.after(token);
            assert_eq!(after, Output { edits: after.edits.clone(), ..none.clone() });
            after.edits
        };
        assert_eq!(after(1), [edit(1, -0.25), edit(2, 1.0), edit(4, 0.25)]);
        assert_eq!(after(2), [edit(2, -0.25), edit(4, 0.25)]);
        assert_eq!(after(4), [edit(2, 1.0), edit(4, -0.5)]);
        assert_eq!(after(7), [edit(2, 1.0), edit(4, 0.25), LogitEdit::ban(7)]);
        let outputs = [none, Output { row: 2, ..output }];
        let known = Output::after_tokens(&outputs, &[9, 9, 4]).unwrap();
        assert_eq!((known[0].edits.len(), &known[1].edits[..]), (0, &[edit(2, 1.0), edit(4, -0.5)][..]));
        let text = Output::after_tokens(&outputs, &[9, 9]).unwrap_err().to_string();
        assert_eq!(text, "an output of row 2; the step has 2");
    }
}
