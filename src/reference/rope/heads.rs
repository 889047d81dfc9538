//! Heads in two parts, of which one is turned.

use super::{DTYPES, QUANTIZED, turns::Turns};
use crate::{
    error::Result,
    reference::{
        host::{HostCheck, Rows, RowsMut},
        page::check_dtype,
    },
    rope::{RopeParts, RopePartsMut},
};

/// Heads in two parts.
pub(super) struct RotaryHeads<'a> {
    pub(super) rope: Rows<'a>,
    pub(super) nope: Option<Rows<'a>>,
    pub(super) heads: usize,
}

impl<'a> RotaryHeads<'a> {
    pub(super) fn new(
        check: HostCheck,
        names: [&'static str; 2],
        parts: &'a RopeParts<'_>,
        tokens: usize,
        turns: &Turns<'_>,
    ) -> Result<Self> {
        let rope = check.rows(names[0], &parts.rope, &DTYPES, &[2, 3])?;
        let nope =
            parts.nope.as_ref().map(|nope| check.rows(names[1], nope, &DTYPES, &[2, 3])).transpose()?;
        let outer = &rope.shape()[..rope.shape().len() - 1];
        if outer[0] != tokens as i64 || rope.width() != turns.rotary_dim {
            return check.fail(
                names[0],
                format!(
                    "its shape is {:?}; expected {tokens} tokens and {} elements that are turned",
                    rope.shape(),
                    turns.rotary_dim
                ),
            );
        }
        if let Some(nope) = &nope {
            check.shape(names[1], nope, &[outer, &[nope.width() as i64]].concat())?;
        }
        Ok(Self { heads: outer.get(1).map_or(1, |&heads| heads as usize), rope, nope })
    }

    pub(super) fn widths(&self) -> [usize; 2] {
        [self.rope.width(), self.nope.as_ref().map_or(0, Rows::width)]
    }

    /// One head: what is turned, then the others, scaled.
    pub(super) fn turned(&self, row: usize, positions: &[i32], turns: &Turns<'_>, scale: f64) -> Vec<f64> {
        let mut head = self.rope.numbers(row);
        turns.turn(&mut head, positions[row / self.heads]);
        head.extend(self.nope.iter().flat_map(|nope| nope.numbers(row)));
        head.iter().map(|number| number * scale).collect()
    }
}

/// Heads in two parts, to write.
pub(super) struct RotaryHeadsMut<'a> {
    pub(super) rope: RowsMut<'a>,
    pub(super) nope: Option<RowsMut<'a>>,
}

impl<'a> RotaryHeadsMut<'a> {
    /// Of the shapes of the input.
    pub(super) fn new(
        check: HostCheck,
        names: [&'static str; 2],
        parts: &'a mut RopePartsMut<'_>,
        like: &RotaryHeads<'_>,
    ) -> Result<Self> {
        let rope = check.rows_mut(names[0], &mut parts.rope, &QUANTIZED, &[2, 3])?;
        check.shape(names[0], &rope.rows, like.rope.shape())?;
        let nope = match (&mut parts.nope, &like.nope) {
            (None, None) => None,
            (Some(nope), Some(like)) => {
                let nope = check.rows_mut(names[1], nope, &QUANTIZED, &[2, 3])?;
                check.shape(names[1], &nope.rows, like.shape())?;
                check_dtype(check, names[1], &nope.rows, &rope.rows)?;
                Some(nope)
            }
            _ => return check.fail(names[1], "there is one exactly if the input has one".into()),
        };
        Ok(Self { rope, nope })
    }

    pub(super) fn write(&mut self, row: usize, head: &[f64]) {
        let (turned, others) = head.split_at(self.rope.rows.width());
        self.rope.write(row, turned);
        if let Some(nope) = &mut self.nope {
            nope.write(row, others);
        }
    }
}
