//! Tensors in memory that NCCL gave, which the kernels of all ranks reach.

use std::{any::Any, rc::Rc};

use flashinfer_rs::{TensorMut, TensorRef};

/// A contiguous tensor in memory that others keep.
pub struct Registered {
    tensor: TensorMut<'static>,
    /// What keeps the memory allocated.
    _memory: Rc<dyn Any>,
}

impl Registered {
    /// # Safety
    /// The memory is there for as long as `memory` is kept, and nobody else reads or writes it but work
    /// that is ordered with that of this tensor.
    pub unsafe fn new(tensor: TensorMut<'static>, memory: Rc<dyn Any>) -> Self {
        Self { tensor, _memory: memory }
    }

    /// The tensor, to read.
    pub fn view(&self) -> TensorRef<'_> {
        self.tensor.as_ref()
    }

    /// The tensor, to write.
    pub fn view_mut(&mut self) -> TensorMut<'_> {
        self.tensor.reborrow()
    }
}
