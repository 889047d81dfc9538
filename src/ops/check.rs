//! The checks that stand before every launch, and before the CPU's twins of kernels where they are
//! strict.

use crate::{
    cuda::PtxKernel,
    device::Device,
    dtype::DType,
    error::{FlashInferError, Result},
    runtime::FlashInferRuntime,
    stream::Stream,
    tensor::RawTensor,
};

/// Checks the arguments of one operation, on one stream or on the host.
pub(crate) struct Check<'s> {
    op: &'static str,
    /// `None` on the host.
    stream: Option<&'s Stream>,
}

impl<'s> Check<'s> {
    /// Also refuses a stream that does not exist in this thread.
    pub(crate) fn new(op: &'static str, stream: &'s Stream) -> Result<Self> {
        stream.check_usable_here(op)?;
        Ok(Self { op, stream: Some(stream) })
    }

    /// Of tensors in host memory.
    pub(crate) fn on_host(op: &'static str) -> Self {
        Self { op, stream: None }
    }

    /// Where the work goes; `None` on the host, where no limit of a GPU is known.
    pub(crate) fn stream(&self) -> Option<&'s Stream> {
        self.stream
    }

    /// Where tensors are.
    pub(crate) fn device(&self) -> Device {
        self.stream.map_or(Device::Cpu, Stream::device)
    }

    /// The operation's name.
    pub(crate) fn op(&self) -> &'static str {
        self.op
    }

    pub(crate) fn fail<T>(&self, argument: &'static str, problem: String) -> Result<T> {
        Err(FlashInferError::invalid(self.op, argument, problem))
    }

    /// The stream that a value of ours is tied to is this operation's.
    pub(crate) fn on_stream(&self, argument: &'static str, stream: &Stream) -> Result<()> {
        match self.stream {
            Some(own) if own != stream => {
                self.fail(argument, format!("it belongs to {stream:?}, but the operation runs on {own:?}"))
            }
            _ => Ok(()),
        }
    }

    /// Has a kernel of this crate compiled, before anything is launched. A
    /// capture does not allow it.
    pub(crate) fn compiled(&self, argument: &'static str, kernel: &PtxKernel) -> Result<()> {
        let Some(stream) = self.stream.filter(|_| !kernel.is_loaded()) else { return Ok(()) };
        let cuda = FlashInferRuntime::get()?.cuda();
        if cuda.is_capturing(stream)? {
            return self.fail(
                argument,
                "the stream is being captured, and its kernel has to be compiled first; call once before the \
                 capture"
                    .into(),
            );
        }
        kernel.load(cuda).map(drop)
    }

    /// Device, stream, element type and number of dimensions.
    pub(crate) fn tensor(
        &self,
        argument: &'static str,
        tensor: &RawTensor,
        dtypes: &[DType],
        ranks: &[usize],
    ) -> Result<()> {
        if tensor.device != self.device() {
            let place = if self.stream.is_some() { "but the stream is on" } else { "expected" };
            return self.fail(argument, format!("it is on {}, {place} {}", tensor.device, self.device()));
        }
        if tensor.stream.is_some_and(|stream| self.stream.is_none_or(|own| own.id() != stream)) {
            return self.fail(
                argument,
                "the view was made for another stream; make it with the stream that the operation runs on"
                    .into(),
            );
        }
        if !dtypes.contains(&tensor.dtype) {
            let names: Vec<_> = dtypes.iter().map(|dtype| dtype.name()).collect();
            return self
                .fail(argument, format!("its dtype is {}; expected {}", tensor.dtype, names.join(" or ")));
        }
        if !ranks.contains(&tensor.shape().len()) {
            return self
                .fail(argument, format!("its shape is {:?}; expected {ranks:?} dimensions", tensor.shape()));
        }
        Ok(())
    }

    pub(crate) fn shape(&self, argument: &'static str, tensor: &RawTensor, expected: &[i64]) -> Result<()> {
        if tensor.shape() == expected {
            return Ok(());
        }
        self.fail(argument, format!("its shape is {:?}; expected {expected:?}", tensor.shape()))
    }

    /// One of these dtypes, exactly this shape, contiguous, and at a multiple of
    /// `alignment` bytes.
    pub(crate) fn plain(
        &self,
        argument: &'static str,
        tensor: &RawTensor,
        dtypes: &[DType],
        shape: &[i64],
        alignment: usize,
    ) -> Result<()> {
        self.tensor(argument, tensor, dtypes, &[shape.len()])?;
        self.shape(argument, tensor, shape)?;
        self.contiguous(argument, tensor)?;
        self.aligned(argument, tensor, alignment)
    }

    /// The last dimension has stride 1, also where its size is 1.
    pub(crate) fn last_dim_contiguous(&self, argument: &'static str, tensor: &RawTensor) -> Result<()> {
        if tensor.strides().last() == Some(&1) {
            return Ok(());
        }
        self.fail(argument, format!("its strides are {:?}; the last must be 1", tensor.strides()))
    }

    pub(crate) fn contiguous(&self, argument: &'static str, tensor: &RawTensor) -> Result<()> {
        if tensor.is_contiguous() {
            return Ok(());
        }
        self.fail(
            argument,
            format!(
                "shape {:?} with strides {:?}; it must be contiguous: copy it, and what is written, to rows without \
                 gaps",
                tensor.shape(),
                tensor.strides()
            ),
        )
    }

    /// The address, and every stride but the last, are multiples of `bytes`, a
    /// power of two.
    pub(crate) fn aligned(&self, argument: &'static str, tensor: &RawTensor, bytes: usize) -> Result<()> {
        let size = tensor.dtype.size() as i64;
        let outer = tensor.shape().iter().zip(tensor.strides()).take(tensor.shape().len().saturating_sub(1));
        // Without a division: this runs before every launch.
        let mask = bytes - 1;
        let misaligned = |stride: i64| (stride * size) as usize & mask != 0;
        if tensor.data as usize & mask != 0 {
            return self.fail(
                argument,
                format!("it starts at {:p}; the address must be a multiple of {bytes}", tensor.data),
            );
        }
        // Without elements, strides mean nothing.
        if tensor.numel() > 0 && outer.into_iter().any(|(&dim, &stride)| dim > 1 && misaligned(stride)) {
            return self.fail(
                argument,
                format!(
                    "its strides are {:?} elements of {size} bytes; all but the last must be multiples of {bytes} bytes",
                    tensor.strides()
                ),
            );
        }
        Ok(())
    }

    /// No two indices name one element, where hardware that copies tiles is told
    /// the strides.
    pub(crate) fn distinct(&self, argument: &'static str, tensor: &RawTensor) -> Result<()> {
        if !tensor.may_overlap() {
            return Ok(());
        }
        self.fail(
            argument,
            format!(
                "shape {:?} with strides {:?} names elements more than once, which FlashAttention 3 does not \
                 take; use Backend::Fa2, or copy it",
                tensor.shape(),
                tensor.strides()
            ),
        )
    }

    /// Element offsets stay below 2³², where the kernel computes them in 32 bits.
    pub(crate) fn offsets_in_32_bits(&self, argument: &'static str, tensor: &RawTensor) -> Result<()> {
        let mut axes = tensor.shape().iter().zip(tensor.strides());
        let last = axes.try_fold(0i64, |last, (&size, &stride)| {
            let reach = (size - 1).max(0).checked_mul(stride)?;
            last.checked_add(reach).filter(|_| stride <= i64::from(u32::MAX))
        });
        if last.is_some_and(|last| last <= i64::from(u32::MAX)) {
            return Ok(());
        }
        self.fail(
            argument,
            format!(
                "shape {:?} with strides {:?} spans 2^32 elements or more, which the kernel cannot address; split it",
                tensor.shape(),
                tensor.strides()
            ),
        )
    }
}
