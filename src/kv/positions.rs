//! Positions of tokens on the host, checked once.

use crate::error::{FlashInferError, Result};

/// The position of each token in its sequence, as rotary embeddings take it.
///
/// Positions decide which row of a cosine and sine cache a kernel reads, so
/// they are checked against the number of rows that there are.
#[derive(Clone, Debug)]
pub struct PositionIndices {
    num_positions: usize,
    pub(super) positions: Vec<i32>,
}

impl PositionIndices {
    /// Checks that each position is below `num_positions`, the number of
    /// positions of the model, which caches have rows for.
    ///
    /// # Errors
    /// A position is negative, or not below `num_positions`; that is 2³¹ or more.
    ///
    /// ```
    /// # use flashinfer_rs::PositionIndices;
    /// // The second and third token of one sequence, the first of another.
    /// let positions = PositionIndices::new(4096, vec![1, 2, 0])?;
    /// assert_eq!(positions.len(), 3);
    /// assert!(PositionIndices::new(4096, vec![4096]).is_err());
    /// # Ok::<(), flashinfer_rs::FlashInferError>(())
    /// ```
    pub fn new(num_positions: usize, positions: Vec<i32>) -> Result<Self> {
        let invalid =
            |argument, problem: String| Err(FlashInferError::invalid("PositionIndices", argument, problem));
        if num_positions > i32::MAX as usize {
            return invalid(
                "num_positions",
                format!("{num_positions}; positions are 32-bit, so at most {}", i32::MAX),
            );
        }
        let outside = |&position: &i32| usize::try_from(position).map_or(true, |at| at >= num_positions);
        if let Some(token) = positions.iter().position(outside) {
            return invalid(
                "positions",
                format!("token {token} is at {}, outside 0..{num_positions}", positions[token]),
            );
        }
        Ok(Self { num_positions, positions })
    }

    /// The number that all positions are below.
    pub fn num_positions(&self) -> usize {
        self.num_positions
    }

    /// The number of tokens.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Each token's position.
    pub fn positions(&self) -> &[i32] {
        &self.positions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_checked() {
        let positions = PositionIndices::new(8, vec![7, 0, 7]).unwrap();
        assert_eq!((positions.len(), positions.num_positions()), (3, 8));
        assert!(PositionIndices::new(0, vec![]).unwrap().is_empty());
        let problem = |num, positions| PositionIndices::new(num, positions).unwrap_err().to_string();
        assert!(problem(8, vec![0, 8]).contains("token 1 is at 8, outside 0..8"));
        assert!(problem(8, vec![-1]).contains("at -1"));
        assert!(problem(0, vec![0]).contains("outside 0..0"));
        assert!(problem(1 << 31, vec![]).contains("32-bit"));
    }
}
