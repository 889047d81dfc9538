//! Changes of some logits of each row.

use super::table::{Array, Arrays, MAX_ARRAYS, OnDevice};
use crate::{
    capture::Facts,
    error::{FlashInferError, Result},
    stream::Stream,
};

const OP: &str = "LogitEdits";

/// What becomes of one token's logit: it is divided by `repetition_penalty` where it is above 0,
/// else multiplied by it; then `bias` is added.
///
/// A repetition penalty above 1 makes a token less likely, as in Hugging Face's transformers and
/// in vLLM. Presence and frequency penalties are a negative bias; a bias of −∞ bans the token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitEdit {
    /// The token, below the size of the vocabulary.
    pub token: u32,
    /// A finite number above 0; 1 changes nothing.
    pub repetition_penalty: f32,
    /// A finite number, or −∞; 0 changes nothing.
    pub bias: f32,
}

impl LogitEdit {
    /// A logit bias.
    pub const fn bias(token: u32, bias: f32) -> Self {
        Self { token, repetition_penalty: 1.0, bias }
    }

    /// The token cannot be drawn.
    pub const fn ban(token: u32) -> Self {
        Self::bias(token, f32::NEG_INFINITY)
    }

    /// The edited logit.
    pub(crate) fn apply(self, logit: f32) -> f32 {
        let penalty = self.repetition_penalty;
        (if logit > 0.0 { logit / penalty } else { logit * penalty }) + self.bias
    }
}

/// The edits of each row of a matrix of logits. Most rows have none, or few.
#[derive(Clone, Debug, PartialEq)]
pub struct LogitEdits {
    vocab: usize,
    indptr: Vec<i32>,
    tokens: Vec<i32>,
    /// A penalty and a bias for each token.
    numbers: Vec<f32>,
}

impl LogitEdits {
    /// Checks the edits of rows of `vocab` logits.
    ///
    /// # Errors
    /// A token is not below `vocab`; those of a row do not ascend (one that has several reasons
    /// to be edited needs one edit: biases add, penalties multiply); a penalty or a bias is not
    /// what [`LogitEdit`] says; there are 2³¹ edits.
    ///
    /// ```
    /// use flashinfer_rs::indices::{LogitEdit, LogitEdits};
    /// let edits = LogitEdits::new(100, [vec![LogitEdit::bias(3, 0.5), LogitEdit::ban(7)], vec![]])?;
    /// assert_eq!((edits.rows(), edits.len()), (2, 2));
    /// assert!(LogitEdits::new(100, [[LogitEdit::ban(100)]]).is_err());
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    pub fn new<Row: IntoIterator<Item = LogitEdit>>(
        vocab: usize,
        rows: impl IntoIterator<Item = Row>,
    ) -> Result<Self> {
        let mut edits = Self { vocab, indptr: vec![0], tokens: Vec::new(), numbers: Vec::new() };
        for (row, of_row) in rows.into_iter().enumerate() {
            let mut last = None;
            for edit in of_row {
                edits.push(last, edit).map_err(|problem| {
                    FlashInferError::invalid(
                        OP,
                        "rows",
                        format!("row {row}, token {}: {problem}", edit.token),
                    )
                })?;
                last = Some(edit.token);
            }
            edits.indptr.push(edits.tokens.len() as i32);
        }
        Ok(edits)
    }

    fn push(&mut self, last: Option<u32>, edit: LogitEdit) -> std::result::Result<(), String> {
        let LogitEdit { token, repetition_penalty, bias } = edit;
        if token as usize >= self.vocab || i32::try_from(token).is_err() {
            return Err(format!("the vocabulary has {} tokens", self.vocab));
        }
        if let Some(last) = last.filter(|&last| last >= token) {
            return Err(format!("it follows {last}; tokens of a row must ascend, with one edit for each"));
        }
        if !(repetition_penalty.is_finite() && repetition_penalty > 0.0) {
            return Err(format!("repetition_penalty is {repetition_penalty}; it must be finite and above 0"));
        }
        if !(bias.is_finite() || bias == f32::NEG_INFINITY) {
            return Err(format!("bias is {bias}; it must be finite, or -inf, which bans the token"));
        }
        if self.tokens.len() == i32::MAX as usize {
            return Err("there are 2^31 edits; split the batch".into());
        }
        self.tokens.push(token as i32);
        self.numbers.extend([repetition_penalty, bias]);
        Ok(())
    }

    /// No edits of this many rows.
    pub fn none(vocab: usize, rows: usize) -> Self {
        Self { vocab, indptr: vec![0; rows + 1], tokens: Vec::new(), numbers: Vec::new() }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.indptr.len() - 1
    }

    /// What all tokens are below.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// The number of edits of all rows.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether no logit is changed.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The edits of one row.
    pub(crate) fn row(&self, row: usize) -> impl Iterator<Item = LogitEdit> {
        let range = self.indptr[row] as usize..self.indptr[row + 1] as usize;
        let numbers = self.numbers[2 * range.start..2 * range.end].chunks_exact(2);
        self.tokens[range].iter().zip(numbers).map(|(&token, numbers)| LogitEdit {
            token: token as u32,
            repetition_penalty: numbers[0],
            bias: numbers[1],
        })
    }

    /// Whether they are edits of a matrix of this shape.
    pub(crate) fn check_fits(&self, [rows, vocab]: [i64; 2]) -> std::result::Result<(), String> {
        if self.rows() as u64 == rows as u64 && self.vocab as u64 <= vocab as u64 {
            return Ok(());
        }
        Err(format!(
            "they are for {} rows of {} tokens, given are {rows} rows of {vocab}",
            self.rows(),
            self.vocab
        ))
    }
}

impl Arrays for LogitEdits {
    fn facts(&self) -> Facts {
        Facts::of([self.rows(), self.vocab])
    }
    const OP: &'static str = "LogitEditTable";
    fn arrays(&self) -> [Array<'_>; MAX_ARRAYS] {
        [Array::I32(&self.indptr), Array::I32(&self.tokens), Array::F32(&self.numbers)]
    }
}

/// The edits of logits on a device. See [`LogitEdits`].
pub type LogitEditTable = OnDevice<LogitEdits>;

impl LogitEditTable {
    /// Uploads edits, with room for up to `max_rows` rows and `max_edits` edits in later updates.
    ///
    /// # Errors
    /// As [`new`](Self::new); also when there are more than that.
    pub fn with_capacity(
        stream: &Stream,
        host: LogitEdits,
        max_rows: usize,
        max_edits: usize,
    ) -> Result<Self> {
        let capacity = [max_rows.saturating_add(1), max_edits, max_edits.saturating_mul(2)];
        for (have, room, what) in [(host.rows(), max_rows, "rows"), (host.len(), max_edits, "edits")] {
            if have > room {
                let problem = format!("{have} {what} for a capacity of {room}");
                return Err(FlashInferError::invalid(LogitEdits::OP, "capacity", problem));
            }
        }
        Self::allocate(stream, host, capacity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::indices::problem;

    #[test]
    fn edits_are_checked() {
        let edit = |token, repetition_penalty, bias| LogitEdit { token, repetition_penalty, bias };
        let rows = [vec![edit(1, 2.0, -0.5), LogitEdit::ban(9)], vec![], vec![LogitEdit::bias(0, 1.0)]];
        let edits = LogitEdits::new(10, rows.clone()).unwrap();
        assert_eq!((edits.rows(), edits.len(), edits.vocab()), (3, 3, 10));
        assert_eq!(edits.indptr, [0, 2, 2, 3]);
        assert_eq!(edits.numbers, [2.0, -0.5, 1.0, f32::NEG_INFINITY, 1.0, 1.0]);
        for (row, of_row) in rows.iter().enumerate() {
            assert_eq!(edits.row(row).collect::<Vec<_>>(), *of_row);
        }
        let wrong = |edits: &[LogitEdit]| problem(LogitEdits::new(10, [vec![], edits.to_vec()]));
        assert!(wrong(&[LogitEdit::ban(10)]).contains("row 1, token 10: the vocabulary has 10 tokens"));
        assert!(wrong(&[LogitEdit::ban(u32::MAX)]).contains("vocabulary"));
        assert!(problem(LogitEdits::new(usize::MAX, [[LogitEdit::ban(1 << 31)]])).contains("vocabulary"));
        assert!(wrong(&[LogitEdit::ban(4), LogitEdit::bias(4, 1.0)]).contains("it follows 4"));
        assert!(wrong(&[LogitEdit::ban(4), LogitEdit::ban(3)]).contains("must ascend"));
        for penalty in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert!(wrong(&[edit(1, penalty, 0.0)]).contains("repetition_penalty"), "{penalty}");
        }
        for bias in [f32::NAN, f32::INFINITY] {
            assert!(wrong(&[edit(1, 1.0, bias)]).contains("bias"), "{bias}");
        }
        assert!(LogitEdits::none(10, 3).is_empty());
        assert_eq!(LogitEdits::none(10, 2), LogitEdits::new(10, [[]; 2]).unwrap());
        assert!(edits.check_fits([3, 10]).is_ok() && edits.check_fits([3, 11]).is_ok());
        let other = edits.check_fits([2, 10]).unwrap_err();
        assert!(other.contains("3 rows of 10 tokens, given are 2 rows of 10"), "{other}");
        assert!(edits.check_fits([3, 9]).is_err());
    }

    #[test]
    fn positive_logits_are_divided_and_others_multiplied() {
        let edit = LogitEdit { token: 0, repetition_penalty: 2.0, bias: -0.25 };
        assert_eq!([3.0, -3.0, 0.0].map(|logit| edit.apply(logit)), [1.25, -6.25, -0.25]);
        assert_eq!(LogitEdit::ban(0).apply(7.0), f32::NEG_INFINITY);
        assert_eq!(edit.apply(f32::NEG_INFINITY), f32::NEG_INFINITY);
        assert!(LogitEdit::ban(0).apply(f32::NAN).is_nan());
    }
}
