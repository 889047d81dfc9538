//! The tokens of a step, some of which the step before chooses on the GPU.

use cudarc::driver::CudaStream;
use flashinfer_rs::{Stream, TensorRef, cudarc::Tensor};

use super::{kernels::Kernels, memory::Pinned, rows::Rows};
use crate::{Result, backend::StepToken};

/// The source of a row that has no token.
const NONE: i32 = -1;

/// Tokens at an address that stays.
pub struct Tokens {
    rows: Rows,
    /// As `choose_tokens` reads them.
    sources: Tensor<i32>,
    sources_on_host: Pinned<i32>,
    /// The sources that were uploaded last.
    uploaded: Vec<i32>,
}

impl Tokens {
    /// Room for so many, of a vocabulary of so many.
    pub fn new(cuda: &CudaStream, stream: &Stream, capacity: usize, vocab_size: usize) -> Result<Self> {
        Ok(Self {
            rows: Rows::new(cuda, stream, capacity, vocab_size)?,
            sources: Tensor::zeros(stream, &[capacity])?,
            sources_on_host: Pinned::zeros(cuda, capacity)?,
            uploaded: Vec::new(),
        })
    }

    /// Has the GPU have these tokens, and then as many that are none as make `len` of them.
    /// `chosen` is what the step before chooses, and `at` the rows of its outputs among them.
    ///
    /// # Errors
    /// A token is not of the vocabulary, or of no output; or there is no room. Then nothing was
    /// enqueued.
    pub fn set(
        &mut self,
        cuda: &CudaStream,
        kernels: &Kernels,
        tokens: &[StepToken],
        len: usize,
        chosen: &TensorRef<'_>,
        at: &[usize],
    ) -> Result<()> {
        if tokens.iter().all(|token| matches!(token, StepToken::Known(_))) {
            let known = tokens.iter().filter_map(|token| match token {
                StepToken::Known(token) => Some(*token as usize),
                StepToken::Chosen(_) => None,
            });
            return self.rows.set(cuda, &known.collect::<Vec<_>>(), len);
        }
        let source = |token: &StepToken| match *token {
            StepToken::Known(token) if (token as usize) < self.rows.bound() => Ok(token as i32),
            StepToken::Chosen(output) if output < at.len() => Ok(-2 - at[output] as i32),
            _ => Err(format!("{token:?} is no token of the vocabulary, and of no output of the step before")),
        };
        let mut sources = tokens.iter().map(source).collect::<Result<Vec<_>, _>>()?;
        if sources.len() > len {
            return Err(format!("{} tokens of {len}", sources.len()).into());
        }
        sources.resize(len, NONE);
        let bound = self.rows.bound();
        let mut rows = self.rows.view_mut().narrow(0, 0, len)?;
        if self.uploaded != sources {
            self.uploaded.clear();
            let host = self.sources_on_host.as_mut_slice()?;
            let host = host.get_mut(..len).ok_or("there is no room for the tokens of the step")?;
            host.copy_from_slice(&sources);
            self.sources_on_host.upload(cuda, &mut self.sources, len)?;
            self.uploaded = sources;
        }
        kernels.choose_tokens(&mut rows, &self.sources.view(), chosen, bound)
    }

    /// The tokens.
    pub fn rows(&self) -> &Rows {
        &self.rows
    }
}
