//! What steps take in turn: the memory that is uploaded for one while the one before is computed.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream};
use flashinfer_rs::{Stream, gpu::Tensor, kv::PageAllocator, uploads::upload_beside};

use super::{rows::Rows, sampler::Sampler, tables::Tables, tokens::Tokens};
use crate::Result;

/// How many there are.
pub const LANES: usize = 2;

/// The memory of every other step.
pub struct Lane {
    /// The tokens of the step.
    pub tokens: Tokens,
    /// What it chooses, row by row of logits.
    pub chosen: Tensor<i32>,
    /// The rows whose logits are wanted.
    pub selected: Rows,
    /// Made when the first step samples.
    pub sampler: Option<Sampler>,
    pub tables: Tables,
    /// When the step is computed.
    pub computed: CudaEvent,
}

impl Lane {
    /// Room for steps of so many tokens. See [`Tables::new`] for `by_row`.
    pub fn new(
        cuda: &Arc<CudaStream>,
        stream: &Stream,
        pool: &PageAllocator,
        tokens: usize,
        by_row: bool,
    ) -> Result<Self> {
        Ok(Self {
            tokens: Tokens::new(cuda, stream, tokens)?,
            chosen: Tensor::zeros(stream, &[tokens])?,
            selected: Rows::new(cuda, stream, tokens, tokens)?,
            sampler: None,
            tables: Tables::new(stream, pool, tokens, by_row)?,
            computed: cuda.context().new_event(None)?,
        })
    }
}

/// Uploads of a step beside the one that is computed.
pub struct Uploads {
    cuda: Arc<CudaStream>,
    stream: Stream,
    ready: CudaEvent,
    done: CudaEvent,
    /// Whether memory was replaced since uploads began last.
    moved: bool,
}

impl Uploads {
    pub fn new(main: &CudaStream) -> Result<Self> {
        let cuda = main.context().new_stream()?;
        let event = || main.context().new_event(None);
        Ok(Self { stream: Stream::from(&cuda), cuda, ready: event()?, done: event()?, moved: true })
    }

    /// Memory is being replaced, in the order of the main stream.
    pub fn set_moved(&mut self) {
        self.moved = true;
    }

    /// Begins those for a lane, or goes on with them: they are made when the lane's last step is
    /// computed, and where memory was replaced, when all is that was enqueued.
    pub fn begin(&mut self, main: &CudaStream, computed: &CudaEvent) -> Result<()> {
        match self.moved {
            true => {
                self.ready.record(main)?;
                self.cuda.wait(&self.ready)?;
            }
            false => self.cuda.wait(computed)?,
        }
        self.moved = false;
        Ok(())
    }

    /// Has `work` upload to a lane for which uploads were begun, on the stream that it is given.
    pub fn make<R>(&self, work: impl FnOnce(&CudaStream) -> R) -> R {
        // SAFETY: the stream waits for the last step that read what is replaced, or for all, and the
        // main stream waits for it before the next step. Pages were copied before. `work` is of this
        // module's callers, which upload in it and do no more.
        unsafe { upload_beside(&self.stream, || work(&self.cuda)) }
    }

    /// Has what is enqueued from now on wait for them.
    pub fn finish(&self, main: &CudaStream) -> Result<()> {
        self.done.record(&self.cuda)?;
        Ok(main.wait(&self.done)?)
    }
}
