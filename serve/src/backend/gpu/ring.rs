//! The ring in which chosen tokens reach the host: page-locked memory, of which each step in
//! flight has a slot.

use std::{collections::VecDeque, sync::Arc};

use cudarc::driver::{CudaEvent, CudaStream};
use flashinfer_rs::gpu::Tensor;

use super::memory::Pinned;
use crate::{Result, backend::Output};

/// Steps in flight at most: one that is computed, and one that follows.
const SLOTS: usize = 2;

/// See the [module](self).
pub struct Ring {
    /// Where copies are made, beside what is computed.
    copies: Arc<CudaStream>,
    free: Vec<Slot>,
    in_flight: VecDeque<InFlight>,
}

/// Memory for what a step chooses.
struct Slot {
    chosen: Pinned<i32>,
    /// When that is chosen.
    computed: CudaEvent,
    /// When it is here.
    copied: CudaEvent,
}

/// A step that was not collected.
pub struct InFlight {
    /// Where its outputs are among the rows of logits.
    pub at: Vec<usize>,
    /// Those of them of which the host looks at the logits.
    pub looked_at: Vec<LookedAt>,
    slot: Slot,
}

/// An output of which the host looks at the logits.
pub struct LookedAt {
    pub index: usize,
    pub output: Output,
}

impl Ring {
    /// For steps of so many rows of logits.
    pub fn new(cuda: &Arc<CudaStream>, rows: usize) -> Result<Self> {
        let slot = |_| -> Result<_> {
            let event = || cuda.context().new_event(None);
            Ok(Slot { chosen: Pinned::zeros(cuda, rows)?, computed: event()?, copied: event()? })
        };
        let free = (0..SLOTS).map(slot).collect::<Result<_>>()?;
        Ok(Self { copies: cuda.context().new_stream()?, free, in_flight: VecDeque::new() })
    }

    /// The step that was enqueued last, if it was not collected.
    pub fn last(&self) -> Option<&InFlight> {
        self.in_flight.back()
    }

    /// Whether a step can be enqueued now.
    ///
    /// # Errors
    /// Two are in flight, or one whose logits the next would overwrite.
    pub fn check(&self) -> Result<()> {
        match self.last() {
            Some(last) if self.free.is_empty() || !last.looked_at.is_empty() => {
                Err("a step was enqueued before the one before it was collected".into())
            }
            _ => Ok(()),
        }
    }

    /// Enqueues the copy of what a step chooses, whose outputs are at these rows. Only the step
    /// after the next may choose others there: it is enqueued when this one is collected.
    pub fn push(
        &mut self,
        cuda: &CudaStream,
        chosen: &Tensor<i32>,
        at: &[usize],
        outputs: &[Output],
    ) -> Result<()> {
        let mut slot = self.free.pop().ok_or("two steps are in flight")?;
        if let Some(last) = at.last()
            && let Err(error) = slot.copy(cuda, &self.copies, chosen, last + 1)
        {
            self.free.push(slot);
            return Err(error);
        }
        let looked_at = outputs.iter().enumerate().filter(|(_, output)| output.needs_logits());
        let looked_at = looked_at.map(|(index, output)| LookedAt { index, output: output.clone() });
        self.in_flight.push_back(InFlight { at: at.to_vec(), looked_at: looked_at.collect(), slot });
        Ok(())
    }

    /// Takes the oldest step out. It is to be given back.
    ///
    /// # Errors
    /// None is in flight.
    pub fn pop(&mut self) -> Result<InFlight> {
        Ok(self.in_flight.pop_front().ok_or("no step is in flight")?)
    }

    /// Takes the slot of a step back.
    pub fn give_back(&mut self, step: InFlight) {
        self.free.push(step.slot);
    }
}

impl Slot {
    fn copy(
        &mut self,
        cuda: &CudaStream,
        copies: &CudaStream,
        chosen: &Tensor<i32>,
        len: usize,
    ) -> Result<()> {
        self.computed.record(cuda)?;
        copies.wait(&self.computed)?;
        self.chosen.download(copies, chosen, 0, len)?;
        Ok(self.copied.record(copies)?)
    }
}

impl InFlight {
    /// What was chosen, row by row, once that is there. Waits as fast as can be.
    pub fn chosen(&self) -> Result<&[i32]> {
        if !self.at.is_empty() {
            self.slot.copied.synchronize()?;
        }
        self.slot.chosen.as_slice()
    }
}
