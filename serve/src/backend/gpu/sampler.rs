//! The choice of tokens on the GPU, for steps in which not all rows are greedy.

use cudarc::driver::CudaStream;
use flashinfer_rs::{
    Stream, TensorMut, TensorRef,
    gpu::Tensor,
    indices::{LogitEdit, LogitEditTable, LogitEdits},
    sampling::{Parameter, SampleOptions, edit_logits, sample},
};

use super::{kernels::Kernels, last_edits::LastEdits, memory::Pinned, tokens::source};
use crate::{
    Result,
    backend::{Output, Step},
};

/// Parameters that are numbers: rows of one tensor, which is uploaded at once.
const NUMBERS: usize = 4;
const UNIFORM: usize = 0;
const TEMPERATURE: usize = 1;
const TOP_P: usize = 2;
const MIN_P: usize = 3;

/// The parameters of rows, at addresses that stay, so that a captured graph reads those
/// that were set last.
pub struct Sampler {
    rows: usize,
    vocab_size: usize,
    /// `[NUMBERS, rows]`.
    numbers: Tensor<f32>,
    numbers_on_host: Pinned<f32>,
    top_k: Tensor<i32>,
    top_k_on_host: Pinned<i32>,
    edits: LogitEditTable,
    last_edits: LastEdits,
    max_edits: usize,
    /// Logits that are edited, `[rows, vocab_size]`; those of the model stay.
    logits: Tensor<f32>,
}

impl Sampler {
    /// Room for so many rows and edits, and for as many edits of last tokens.
    pub fn new(
        cuda: &CudaStream,
        stream: &Stream,
        rows: usize,
        max_edits: usize,
        vocab_size: usize,
    ) -> Result<Self> {
        let none = LogitEdits::none(vocab_size, rows);
        Ok(Self {
            rows,
            vocab_size,
            numbers: Tensor::zeros(stream, &[NUMBERS, rows])?,
            numbers_on_host: Pinned::zeros(cuda, NUMBERS * rows)?,
            top_k: Tensor::zeros(stream, &[rows])?,
            top_k_on_host: Pinned::zeros(cuda, rows)?,
            edits: LogitEditTable::with_capacity(stream, none, rows, max_edits)?,
            last_edits: LastEdits::new(cuda, stream, rows, max_edits)?,
            max_edits,
            logits: Tensor::zeros(stream, &[rows, vocab_size])?,
        })
    }

    /// Whether there is room for so many rows and edits.
    pub fn fits(&self, rows: usize, edits: usize) -> bool {
        rows <= self.rows && edits <= self.max_edits
    }

    /// How many edits there is room for.
    pub fn max_edits(&self) -> usize {
        self.max_edits
    }

    /// Uploads the parameters of a step whose logits have so many rows. `at` are the
    /// rows of the outputs, which ascend; others are greedy. `before` are the rows of the outputs of
    /// the step before.
    pub fn set(
        &mut self,
        cuda: &CudaStream,
        step: &Step<'_>,
        at: &[usize],
        rows: usize,
        before: &[usize],
    ) -> Result<()> {
        let (mut edits, mut last_edits) = (vec![&[][..]; rows], vec![None; rows]);
        let numbers = self.numbers_on_host.as_mut_slice()?;
        let mut top_k = vec![0; self.rows];
        numbers.fill(0.0);
        for (output, &row) in step.outputs.iter().zip(at) {
            let Output { uniform, temperature, top_p, min_p, .. } = *output;
            for (of, number) in
                [(UNIFORM, uniform), (TEMPERATURE, temperature), (TOP_P, top_p), (MIN_P, min_p)]
            {
                numbers[of * self.rows + row] = number;
            }
            // More than there are tokens keeps all.
            top_k[row] = i32::try_from(output.top_k).unwrap_or(0);
            edits[row] = &output.edits;
            if let Some(last) = &output.last_edit {
                last_edits[row] = Some((source(step.tokens[output.row], before)?, last));
            }
        }
        self.last_edits.set(cuda, &last_edits)?;
        let edits = edits.into_iter().map(|row: &[LogitEdit]| row.iter().copied());
        let edits = LogitEdits::new(self.vocab_size, edits)?;
        // These stay as they are from step to step, mostly.
        if *self.edits.host() != edits {
            self.edits.update(edits)?;
        }
        if self.top_k_on_host.as_slice()? != top_k {
            self.top_k_on_host.as_mut_slice()?.copy_from_slice(&top_k);
            self.top_k_on_host.upload(cuda, &mut self.top_k, self.rows)?;
        }
        self.numbers_on_host.upload(cuda, &mut self.numbers, NUMBERS * self.rows)
    }

    /// Enqueues the choice of a token for each row of logits, with what was set. `chosen_before` is
    /// what the step before chose, row by row.
    pub fn enqueue(
        &mut self,
        kernels: &Kernels,
        stream: &Stream,
        tokens: &mut TensorMut<'_>,
        logits: &TensorRef<'_>,
        chosen_before: &TensorRef<'_>,
    ) -> Result<()> {
        let rows = tokens.numel();
        let mut edited = self.logits.view_mut().narrow(0, 0, rows)?;
        kernels.copy(logits, &mut edited)?;
        edit_logits(stream, &mut edited, &self.edits)?;
        kernels.edit_last(&mut edited, logits, &self.last_edits, chosen_before)?;
        let numbers = |of| self.numbers.view().select(0, of)?.narrow(0, 0, rows);
        let mut options = SampleOptions::new(numbers(UNIFORM)?);
        options.temperature = Parameter::PerRow(numbers(TEMPERATURE)?);
        options.top_k = Parameter::PerRow(self.top_k.view().narrow(0, 0, rows)?);
        options.top_p = Parameter::PerRow(numbers(TOP_P)?);
        options.min_p = Parameter::PerRow(numbers(MIN_P)?);
        Ok(sample(stream, tokens, &mut edited, &options)?)
    }
}
