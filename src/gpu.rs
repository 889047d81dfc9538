//! Memory of a GPU: tensors, views of cudarc's slices, and cudarc's streams.
//!
//! [`TensorExt`] gives a slice the methods [`tensor`](TensorExt::tensor) and
//! [`tensor_mut`](TensorExtMut::tensor_mut). The element type of the view is
//! the slice's. What they return holds the slice borrowed and cudarc's own
//! bookkeeping: making it lets the stream wait for earlier work on the slice
//! on other streams, and dropping it records the work enqueued meanwhile. So
//! it must live until the operation has been called, which the lifetimes of
//! [`SliceRef::view`] and [`SliceMut::view_mut`] see to, and it can be used on
//! that one stream only.
//!
//! A [`Tensor`] owns its memory and is used on one stream, so its views need no
//! bookkeeping. Prefer it, above all for work that is captured into a CUDA graph
//! ([`graph`](crate::graph)).
//!
//! To capture views of slices with cudarc's own `begin_capture`, make the views
//! before the capture begins and drop them after it ends: waiting for events of
//! uncaptured work is not allowed in between, and breaks the capture. Such a graph
//! does not keep the slices alive that it works on;
//! `cudarc::driver::CudaGraph::launch` is safe to call all the same, so it is for
//! you to keep them, and tables, workspaces and plans as they were, for as long as
//! the graph is launched.
//!
//! `cudarc` is that crate also where all names of this one are imported:
//!
//! ```
//! use cudarc::driver::CudaSlice;
//! use flashinfer_rs::{gpu::*, *};
//!
//! fn view(slice: &CudaSlice<f32>, stream: &std::sync::Arc<cudarc::driver::CudaStream>) -> Result<()> {
//!     slice.tensor(stream, &[slice.len()]).map(drop)
//! }
//! ```

use std::sync::Arc;

use ::cudarc::driver::{
    CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, DriverError,
    SyncOnDrop, ValidAsZeroBits,
    result::memcpy_htod_async,
    sys::{CUdeviceptr, CUstreamCaptureStatus},
};

use crate::{
    capture,
    device::Device,
    dtype::{DType, Element},
    error::{FlashInferError, Result},
    stream::Stream,
    tensor::{Owner, RawTensor, TensorMut, TensorRef},
};

impl From<&Arc<CudaStream>> for Stream {
    /// The same stream, which it keeps alive.
    fn from(stream: &Arc<CudaStream>) -> Self {
        let context = stream.context();
        let same =
            Self::with_owner(stream.cu_stream().cast(), context.ordinal() as u32, Some(stream.clone()));
        if context.is_primary() { same } else { same.of_another_context() }
    }
}

impl Stream {
    /// cudarc's stream, which this one was made from.
    fn cudarc(&self, op: &'static str) -> Result<Arc<CudaStream>> {
        self.check_usable_here(op)?;
        let stream = self.owner().and_then(|owner| owner.downcast().ok());
        stream.ok_or_else(|| {
            FlashInferError::invalid(
                op,
                "stream",
                "it is a raw stream; make it from cudarc's, with Stream::from(&cuda)",
            )
        })
    }
}

/// A shared view of a cudarc slice on one stream.
#[must_use]
pub struct SliceRef<'a> {
    tensor: TensorRef<'a>,
    _sync: SyncOnDrop<'a>,
    _order: Option<Order>,
}

impl SliceRef<'_> {
    /// The view, to pass to operations.
    pub fn view(&self) -> TensorRef<'_> {
        self.tensor
    }
}

/// An exclusive view of a cudarc slice on one stream.
#[must_use]
pub struct SliceMut<'a> {
    tensor: TensorMut<'a>,
    _sync: SyncOnDrop<'a>,
    _order: Option<Order>,
}

impl SliceMut<'_> {
    /// The view, to read.
    pub fn view(&self) -> TensorRef<'_> {
        self.tensor.as_ref()
    }

    /// The view, to pass to operations that write.
    pub fn view_mut(&mut self) -> TensorMut<'_> {
        self.tensor.reborrow()
    }
}

/// Orders work on another stream than the slice's own: after what was enqueued
/// on the slice's stream before, and, when dropped, before what comes there
/// later, its freeing included. cudarc's events alone remember one use only.
struct Order {
    storage: Arc<CudaStream>,
    stream: Arc<CudaStream>,
}

impl Order {
    /// `None` where one stream is both.
    fn begin(storage: &Arc<CudaStream>, stream: &Arc<CudaStream>) -> Result<Option<Self>> {
        if storage.cu_stream() == stream.cu_stream() {
            return Ok(None);
        }
        stream.join(storage).map_err(|error| {
            FlashInferError::invalid(
                "tensor view",
                "stream",
                format!("it cannot wait for the slice's own stream (during a capture, none can): {error}"),
            )
        })?;
        Ok(Some(Self { storage: storage.clone(), stream: stream.clone() }))
    }
}

impl Drop for Order {
    fn drop(&mut self) {
        self.storage.context().record_err(self.storage.join(&self.stream));
    }
}

/// An owned, contiguous tensor on a device, which is used on one stream.
///
/// Its views need no bookkeeping of cudarc's, so they can be made at any time,
/// while a graph is captured, too. Dropping it frees the memory in the order of
/// the stream. A [`CapturedStep`](crate::graph::CapturedStep) that works on it
/// keeps the memory alive, and lets it be read and written between launches; a
/// graph of cudarc's does not.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use flashinfer_rs::{Stream, gpu::Tensor, norm};
/// use half::f16;
///
/// let stream = Stream::from(&cudarc::driver::CudaContext::new(0)?.new_stream()?);
/// let x = Tensor::from_slice(&stream, &[2, 128], &[f16::ONE; 256])?;
/// let weight = Tensor::from_slice(&stream, &[128], &[f16::ONE; 128])?;
/// let mut out = Tensor::<f16>::zeros(&stream, &[2, 128])?;
/// norm::rmsnorm(&stream, &mut out.view_mut(), &x.view(), &weight.view(), &Default::default())?;
/// assert_eq!(out.to_vec()?.len(), 256);
/// # Ok(()) }
/// ```
pub struct Tensor<T> {
    /// Captured steps have shares of it.
    slice: Arc<CudaSlice<T>>,
    raw: RawTensor,
}

impl<T: Element + DeviceRepr> Tensor<T> {
    /// A tensor of zeros.
    ///
    /// # Errors
    /// [`FlashInferError::Cuda`], such as no memory; the shape is too large;
    /// the stream is not cudarc's, or is being captured.
    pub fn zeros(stream: &Stream, shape: &[usize]) -> Result<Self>
    where
        T: ValidAsZeroBits,
    {
        let (cuda, len) = (stream.cudarc("Tensor::zeros")?, numel(shape)?);
        check_not_captured("Tensor::zeros", &cuda)?;
        Self::of(cuda.alloc_zeros(len.max(1)).map_err(|error| failed("cuMemsetD8Async", error))?, shape)
    }

    /// A tensor of the given elements, in row-major order. Waits for the stream,
    /// which reads them.
    ///
    /// # Errors
    /// As [`zeros`](Self::zeros); also when there are more or fewer elements
    /// than the shape has.
    pub fn from_slice(stream: &Stream, shape: &[usize], elements: &[T]) -> Result<Self> {
        let cuda = stream.cudarc("Tensor::from_slice")?;
        check_not_captured("Tensor::from_slice", &cuda)?;
        check_len("Tensor::from_slice", numel(shape)?, elements.len())?;
        // There are no empty allocations.
        // SAFETY: elements are plain data, and are written before anybody can read them.
        let mut slice =
            unsafe { cuda.alloc(elements.len().max(1)) }.map_err(|error| failed("cuMemAllocAsync", error))?;
        if !elements.is_empty() {
            let copied = cuda.memcpy_htod(elements, &mut slice);
            copied.map_err(|error| failed("cuMemcpyHtoDAsync", error))?;
            // Elements in page-locked memory are not copied before that.
            cuda.synchronize().map_err(|error| failed("cuStreamSynchronize", error))?;
        }
        Self::of(slice, shape)
    }

    /// Takes a slice of cudarc's, whose first elements are the tensor. What was
    /// enqueued with it on other streams comes first.
    ///
    /// # Errors
    /// The slice has fewer elements than the shape, or is not of its device's
    /// primary context.
    pub fn from_cudarc(mut slice: CudaSlice<T>, shape: &[usize]) -> Result<Self> {
        let cuda = slice.stream().clone();
        check_context(&cuda, &cuda)?;
        // Lets the stream wait for what other streams do with the slice.
        drop(slice.device_ptr_mut(&cuda));
        Self::of(slice, shape)
    }

    fn of(slice: CudaSlice<T>, shape: &[usize]) -> Result<Self> {
        let cuda = slice.stream();
        let pointer = slice.device_ptr(cuda).0;
        let (mut raw, len) = raw::<T>((pointer, slice.len()), cuda, 0, shape, None)?;
        raw.check_fits(len)?;
        let slice = Arc::new(slice);
        raw.owner = Some(Owner::of(&slice));
        Ok(Self { slice, raw })
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[i64] {
        self.raw.shape()
    }

    /// The tensor, to read.
    pub fn view(&self) -> TensorRef<'_> {
        TensorRef::new(self.raw)
    }

    /// The tensor, to write.
    pub fn view_mut(&mut self) -> TensorMut<'_> {
        TensorMut::new(self.raw)
    }

    /// Replaces the elements, at the same address: between launches of a captured
    /// step, too. Waits for the stream, which reads them.
    ///
    /// # Errors
    /// As [`from_slice`](Self::from_slice).
    pub fn write(&mut self, elements: &[T]) -> Result<()> {
        check_len("Tensor::write", self.raw.numel() as usize, elements.len())?;
        if elements.is_empty() {
            return Ok(());
        }
        let cuda = self.slice.stream();
        check_not_captured("Tensor::write", cuda)?;
        let pointer = self.raw.data as CUdeviceptr;
        cuda.context().bind_to_thread().map_err(|error| failed("cuCtxSetCurrent", error))?;
        // SAFETY: the tensor has as many elements, and is borrowed exclusively;
        // captured steps work on it in the order of the stream. The elements
        // stay where they are until the stream is done, below.
        unsafe { memcpy_htod_async(pointer, elements, cuda.cu_stream()) }
            .map_err(|error| failed("cuMemcpyHtoDAsync", error))?;
        cuda.synchronize().map_err(|error| failed("cuStreamSynchronize", error))
    }

    /// The elements in row-major order, once the stream's work is done.
    ///
    /// # Errors
    /// [`FlashInferError::Cuda`], also of earlier work; the stream is being
    /// captured.
    pub fn to_vec(&self) -> Result<Vec<T>> {
        let cuda = self.slice.stream();
        check_not_captured("Tensor::to_vec", cuda)?;
        let elements = match self.raw.numel() as usize {
            // Its memory has one, which nobody wrote.
            0 => Vec::new(),
            count => cuda
                .clone_dtoh(&self.slice.slice(..count))
                .map_err(|error| failed("cuMemcpyDtoHAsync", error))?,
        };
        cuda.synchronize().map_err(|error| failed("cuStreamSynchronize", error))?;
        Ok(elements)
    }

    /// The slice, for cudarc's own functions.
    ///
    /// # Errors
    /// A captured step works on the tensor. The tensor is dropped, and the step
    /// goes on with its memory.
    pub fn into_cudarc(self) -> Result<CudaSlice<T>> {
        let mut slice = Arc::try_unwrap(self.slice).map_err(|_| {
            FlashInferError::invalid(
                "Tensor::into_cudarc",
                "self",
                "a captured step works on it; drop that first",
            )
        })?;
        let cuda = slice.stream().clone();
        // Lets other streams wait for what was enqueued with the tensor.
        drop(slice.device_ptr_mut(&cuda));
        Ok(slice)
    }
}

impl<T> std::fmt::Debug for Tensor<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({}, {:?}, {})", self.raw.dtype, self.raw.shape(), self.raw.device)
    }
}

/// Elements of a shape.
fn numel(shape: &[usize]) -> Result<usize> {
    Ok(RawTensor::new(std::ptr::null_mut(), Device::Cpu, DType::F64, shape, None)?.numel() as usize)
}

fn check_len(op: &'static str, wanted: usize, given: usize) -> Result<()> {
    if wanted == given {
        return Ok(());
    }
    Err(FlashInferError::invalid(op, "elements", format!("{given} elements for a shape of {wanted}")))
}

/// Nothing is allocated, uploaded or waited for while the stream is captured.
fn check_not_captured(op: &'static str, cuda: &Arc<CudaStream>) -> Result<()> {
    match cuda.capture_status() {
        Ok(CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE) => Ok(()),
        Ok(_) => Err(FlashInferError::invalid(
            op,
            "stream",
            "it is being captured into a CUDA graph; do this before the capture, or between launches",
        )),
        Err(error) => Err(failed("cuStreamIsCapturing", error)),
    }
}

fn failed(call: &'static str, error: DriverError) -> FlashInferError {
    FlashInferError::Cuda { call, code: error.0 as i32, message: error.to_string() }
}

mod sealed {
    /// cudarc's own storage types, whose pointer and length are trusted.
    pub trait Storage {}
}
impl<T> sealed::Storage for CudaSlice<T> {}
impl<T> sealed::Storage for CudaView<'_, T> {}
impl<T> sealed::Storage for CudaViewMut<'_, T> {}

/// Shared views of cudarc slices and views.
pub trait TensorExt<T: Element>: DevicePtr<T> + sealed::Storage {
    /// A contiguous view for work on `stream`.
    ///
    /// Not to be made while the stream is captured into a CUDA graph: it waits
    /// for events, which breaks the capture, unless cudarc tracks none. A
    /// [`Tensor`]'s views can be made then.
    ///
    /// # Errors
    /// The shape needs more elements than the slice has, the stream is of
    /// another device or not of the device's primary context, or this thread is
    /// capturing a [`CapturedStep`](crate::graph::CapturedStep) and it would wait for events.
    fn tensor<'a>(&'a self, stream: &'a Arc<CudaStream>, shape: &[usize]) -> Result<SliceRef<'a>> {
        self.tensor_strided(stream, shape, None)
    }

    /// A view with strides, in elements.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    fn tensor_strided<'a>(
        &'a self,
        stream: &'a Arc<CudaStream>,
        shape: &[usize],
        strides: Option<&[usize]>,
    ) -> Result<SliceRef<'a>> {
        shared(self, stream, 0, shape, strides)
    }
}
impl<T: Element, S: DevicePtr<T> + sealed::Storage> TensorExt<T> for S {}

/// Exclusive views of cudarc slices and views.
pub trait TensorExtMut<T: Element>: DevicePtrMut<T> + sealed::Storage {
    /// A contiguous view for work on `stream`.
    ///
    /// # Errors
    /// As [`TensorExt::tensor`].
    fn tensor_mut<'a>(&'a mut self, stream: &'a Arc<CudaStream>, shape: &[usize]) -> Result<SliceMut<'a>> {
        self.tensor_mut_strided(stream, shape, None)
    }

    /// A view with strides, in elements.
    ///
    /// # Errors
    /// As [`TensorExt::tensor`]; also when two indices would name one element.
    fn tensor_mut_strided<'a>(
        &'a mut self,
        stream: &'a Arc<CudaStream>,
        shape: &[usize],
        strides: Option<&[usize]>,
    ) -> Result<SliceMut<'a>> {
        exclusive(self, stream, 0, shape, strides)
    }
}
impl<T: Element, S: DevicePtrMut<T> + sealed::Storage> TensorExtMut<T> for S {}

/// A shared view that begins `offset` elements into a slice.
pub(crate) fn shared<'a, T: Element, S: DevicePtr<T> + ?Sized>(
    slice: &'a S,
    stream: &'a Arc<CudaStream>,
    offset: usize,
    shape: &[usize],
    strides: Option<&[usize]>,
) -> Result<SliceRef<'a>> {
    check_context(slice.stream(), stream)?;
    let (len, order) = (slice.len(), Order::begin(slice.stream(), stream)?);
    let (pointer, sync) = slice.device_ptr(stream);
    let (raw, len) = raw::<T>((pointer, len), stream, offset, shape, strides)?;
    raw.check_fits(len)?;
    Ok(SliceRef { tensor: TensorRef::new(raw), _sync: sync, _order: order })
}

/// An exclusive view that begins `offset` elements into a slice.
pub(crate) fn exclusive<'a, T: Element, S: DevicePtrMut<T> + ?Sized>(
    slice: &'a mut S,
    stream: &'a Arc<CudaStream>,
    offset: usize,
    shape: &[usize],
    strides: Option<&[usize]>,
) -> Result<SliceMut<'a>> {
    check_context(slice.stream(), stream)?;
    let (len, order) = (slice.len(), Order::begin(slice.stream(), stream)?);
    let (pointer, sync) = slice.device_ptr_mut(stream);
    let (raw, len) = raw::<T>((pointer, len), stream, offset, shape, strides)?;
    Ok(SliceMut { tensor: TensorMut::checked(raw, len)?, _sync: sync, _order: order })
}

/// The view of what a slice of `len` elements has from `offset` on, and how
/// many elements that are.
fn raw<T: Element>(
    (pointer, len): (CUdeviceptr, usize),
    stream: &Arc<CudaStream>,
    offset: usize,
    shape: &[usize],
    strides: Option<&[usize]>,
) -> Result<(RawTensor, usize)> {
    let Some(rest) = len.checked_sub(offset) else {
        let problem = format!("it begins {offset} elements into a slice of {len}");
        return Err(FlashInferError::invalid("tensor view", "offset", problem));
    };
    let pointer = pointer + (offset * size_of::<T>()) as CUdeviceptr;
    let stream = Stream::with_owner(stream.cu_stream().cast(), stream.context().ordinal() as u32, None);
    let mut raw = RawTensor::new(pointer as *mut _, stream.device(), T::DTYPE, shape, strides)?;
    raw.stream = Some(stream.id());
    Ok((raw, rest))
}

/// Kernel modules work in primary contexts, and views on one device.
fn check_context(storage: &Arc<CudaStream>, stream: &Arc<CudaStream>) -> Result<()> {
    let invalid = |problem: String| Err(FlashInferError::invalid("tensor view", "stream", problem));
    let waits = |of: &Arc<CudaStream>| of.context().is_managing_stream_synchronization();
    if capture::is_active() && (waits(storage) || waits(stream)) {
        return invalid(
            "a step is being captured, and a slice's view waits for events, which breaks the capture; make it \
             before, or use gpu::Tensor"
                .into(),
        );
    }
    if storage.context().ordinal() != stream.context().ordinal() {
        return invalid(format!(
            "the slice is on cuda:{}, the stream on cuda:{}",
            storage.context().ordinal(),
            stream.context().ordinal()
        ));
    }
    if !storage.context().is_primary() || !stream.context().is_primary() {
        return invalid("kernels run in the device's primary context; make it with CudaContext::new".into());
    }
    // cudarc orders streams among each other once `new_stream` has made one.
    // Before, two different ones are the legacy and a per-thread default
    // stream, which nothing orders.
    let context = stream.context();
    if storage.cu_stream() != stream.cu_stream()
        && context.is_event_tracking()
        && !context.is_in_multi_stream_mode()
    {
        return invalid(
            "the slice belongs to another default stream, and cudarc does not order the two; \
             use one stream for both, or streams from CudaContext::new_stream"
                .into(),
        );
    }
    Ok(())
}
