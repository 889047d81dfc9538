//! The tokens of a step, some of which the step before chooses on the GPU.

use cudarc::driver::CudaStream;
use flashinfer_rs::{Stream, TensorRef, gpu::Tensor};

use super::memory::Pinned;
use crate::{Result, backend::StepToken};

/// The source of a row that has no token.
pub const NO_TOKEN: i32 = -1;

/// Where a token comes from, as kernels read it: the token; or `-2 - row` for what the step before
/// chose of a row. `at` are the rows of the outputs of that step.
///
/// # Errors
/// The token is of no output.
pub fn source(token: StepToken, at: &[usize]) -> Result<i32> {
    match token {
        StepToken::Known(token) => Ok(i32::try_from(token)?),
        StepToken::Chosen(output) => match at.get(output) {
            Some(&row) => Ok(-2 - i32::try_from(row)?),
            None => Err(format!("the step before has no output {output}").into()),
        },
    }
}

/// Where tokens come from, at an address that stays.
pub struct Tokens {
    /// See [`source`]; or [`NO_TOKEN`].
    sources: Tensor<i32>,
    on_host: Pinned<i32>,
    /// Those that were uploaded last.
    uploaded: Vec<i32>,
}

impl Tokens {
    /// Room for so many.
    pub fn new(cuda: &CudaStream, stream: &Stream, capacity: usize) -> Result<Self> {
        Ok(Self {
            sources: Tensor::zeros(stream, &[capacity])?,
            on_host: Pinned::zeros(cuda, capacity)?,
            uploaded: Vec::new(),
        })
    }

    /// Uploads where these tokens come from, and then as many that are none as make `len` of them;
    /// unless that is what was uploaded last. `at` are the rows of the outputs of the step before.
    ///
    /// # Errors
    /// A token is of no output; or there is no room. Then nothing was uploaded.
    pub fn set(&mut self, cuda: &CudaStream, tokens: &[StepToken], len: usize, at: &[usize]) -> Result<()> {
        let mut sources = tokens.iter().map(|&token| source(token, at)).collect::<Result<Vec<_>>>()?;
        if sources.len() > len || len > self.on_host.len() {
            let room = self.on_host.len();
            return Err(format!("{} tokens of {len}; there is room for {room}", sources.len()).into());
        }
        sources.resize(len, NO_TOKEN);
        if self.uploaded != sources {
            self.uploaded.clear();
            self.on_host.as_mut_slice()?[..len].copy_from_slice(&sources);
            self.on_host.upload(cuda, &mut self.sources, len)?;
            self.uploaded = sources;
        }
        Ok(())
    }

    /// The sources, of as many tokens as there is room for.
    pub fn sources(&self) -> TensorRef<'_> {
        self.sources.view()
    }
}
