//! Edits of the logits of tokens that are known on the GPU only: what penalties make of the last token
//! of each row.

use cudarc::driver::CudaStream;
use flashinfer_rs::{Stream, TensorRef, gpu::Tensor};

use super::{memory::Pinned, tokens::NO_TOKEN};
use crate::{Result, backend::LastEdit};

/// Where a row's token comes from, as those of `Tokens` do, and how its logit is edited.
pub type RowEdit<'a> = (i32, &'a LastEdit);

/// The edits of rows, at addresses that stay.
pub struct LastEdits {
    rows: usize,
    /// The source of each row's token; where the other edits of each row begin, and where the last ones
    /// end; and the tokens of those.
    indices: Tensor<i32>,
    indices_on_host: Pinned<i32>,
    /// The repetition penalty and bias of most tokens, row by row; and then those of the others.
    numbers: Tensor<f32>,
    numbers_on_host: Pinned<f32>,
    /// What was uploaded last.
    uploaded: (Vec<i32>, Vec<f32>),
}

impl LastEdits {
    /// Room for those of so many rows, with so many other edits.
    pub fn new(cuda: &CudaStream, stream: &Stream, rows: usize, max_others: usize) -> Result<Self> {
        let (indices, numbers) = (2 * rows + 1 + max_others, 2 * (rows + max_others));
        Ok(Self {
            rows,
            indices: Tensor::zeros(stream, &[indices])?,
            indices_on_host: Pinned::zeros(cuda, indices)?,
            numbers: Tensor::zeros(stream, &[numbers])?,
            numbers_on_host: Pinned::zeros(cuda, numbers)?,
            uploaded: (Vec::new(), Vec::new()),
        })
    }

    /// Uploads the edits of rows, as far as they are not there already. Rows that are `None` or missing
    /// have none.
    ///
    /// # Errors
    /// There is no room for them. Then nothing was uploaded.
    pub fn set(&mut self, cuda: &CudaStream, edits: &[Option<RowEdit<'_>>]) -> Result<()> {
        let (indices, numbers) = arrays(edits, self.rows)?;
        let room = self.indices_on_host.len();
        if edits.len() > self.rows || indices.len() > room {
            let (given, rows) = (indices.len() - 2 * self.rows - 1, self.rows);
            return Err(format!(
                "last edits of {} rows, with {given} of other tokens; there is room for {rows}, with {}",
                edits.len(),
                room - 2 * rows - 1
            )
            .into());
        }
        if self.uploaded.0 != indices {
            self.uploaded.0.clear();
            self.indices_on_host.as_mut_slice()?[..indices.len()].copy_from_slice(&indices);
            self.indices_on_host.upload(cuda, &mut self.indices, indices.len())?;
            self.uploaded.0 = indices;
        }
        if self.uploaded.1 != numbers {
            self.uploaded.1.clear();
            self.numbers_on_host.as_mut_slice()?[..numbers.len()].copy_from_slice(&numbers);
            self.numbers_on_host.upload(cuda, &mut self.numbers, numbers.len())?;
            self.uploaded.1 = numbers;
        }
        Ok(())
    }

    /// How many rows there is room for.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// `[rows]` sources, `[rows + 1]` places that ascend, and as many tokens as the last of these says.
    pub fn indices(&self) -> TensorRef<'_> {
        self.indices.view()
    }

    /// Two for each row, and two for each of those tokens.
    pub fn numbers(&self) -> TensorRef<'_> {
        self.numbers.view()
    }
}

/// The indices and numbers of the edits of so many rows.
fn arrays(edits: &[Option<RowEdit<'_>>], rows: usize) -> Result<(Vec<i32>, Vec<f32>)> {
    let (mut sources, mut places, mut tokens) = (vec![NO_TOKEN; rows], vec![0; rows + 1], Vec::new());
    let (mut most, mut others) = (vec![0.0; 2 * rows], Vec::new());
    for row in 0..rows {
        if let Some((source, edit)) = edits.get(row).copied().flatten() {
            sources[row] = source;
            most[2 * row..][..2].copy_from_slice(&[edit.repetition_penalty, edit.bias]);
            for other in &edit.others {
                tokens.push(i32::try_from(other.token)?);
                others.extend([other.repetition_penalty, other.bias]);
            }
        }
        places[row + 1] = i32::try_from(tokens.len())?;
    }
    Ok(([sources, places, tokens].concat(), [most, others].concat()))
}

#[cfg(test)]
mod tests {
    use flashinfer_rs::indices::LogitEdit;

    use super::*;

    #[test]
    fn the_edits_of_rows_lie_one_behind_the_other() {
        let none = LastEdit { repetition_penalty: 1.5, bias: 0.0, others: vec![] };
        let others = vec![LogitEdit::bias(3, -1.0), LogitEdit::ban(9)];
        let two = LastEdit { repetition_penalty: 1.0, bias: -0.5, others };
        let (indices, numbers) =
            arrays(&[Some((-2, &two)), None, Some((7, &none)), Some((-3, &two))], 5).unwrap();
        let (sources, places) = ([-2, -1, 7, -3, -1], [0, 2, 2, 2, 4, 4]);
        assert_eq!(indices, [&sources[..], &places, &[3, 9, 3, 9]].concat());
        let most = [1.0, -0.5, 0.0, 0.0, 1.5, 0.0, 1.0, -0.5, 0.0, 0.0];
        let others = [1.0, -1.0, 1.0, f32::NEG_INFINITY];
        assert_eq!(numbers, [&most[..], &others, &others].concat());
        assert_eq!(arrays(&[], 1).unwrap(), (vec![-1, 0, 0], vec![0.0; 2]));
    }
}
