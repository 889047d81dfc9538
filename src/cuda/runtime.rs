//! The process's CUDA runtime: devices, errors, work that is enqueued.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    sync::OnceLock,
};

use super::symbols::{CAPTURE_NONE, CudaError, DEVICE_TO_DEVICE, MAX_PITCH, Symbols, missing};
use crate::{
    capture,
    error::{FlashInferError, Result},
    loader::Library,
    stream::Stream,
};

/// A property of a device, which never changes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum DeviceAttribute {
    MultiprocessorCount,
    ComputeCapabilityMajor,
    ComputeCapabilityMinor,
    MaxSharedMemoryPerMultiprocessor,
    MaxSharedMemoryPerBlockOptin,
}

impl DeviceAttribute {
    /// How many there are.
    const COUNT: usize = 5;

    /// Its number in `cudaDeviceAttr`.
    fn code(self) -> c_int {
        match self {
            Self::MultiprocessorCount => 16,
            Self::ComputeCapabilityMajor => 75,
            Self::ComputeCapabilityMinor => 76,
            Self::MaxSharedMemoryPerMultiprocessor => 81,
            Self::MaxSharedMemoryPerBlockOptin => 97,
        }
    }
}

/// Devices whose properties are asked for once; of further ones, each time.
const KEPT_DEVICES: usize = 32;

/// The process's CUDA runtime library.
#[derive(Debug)]
pub(crate) struct CudaRuntime {
    pub(super) symbols: Symbols,
    error_string: unsafe extern "C" fn(CudaError) -> *const c_char,
    /// What was asked for, by device.
    attributes: [[OnceLock<i32>; DeviceAttribute::COUNT]; KEPT_DEVICES],
}

static CUDA_RUNTIME: OnceLock<CudaRuntime> = OnceLock::new();

impl CudaRuntime {
    /// Looks up the functions in an open `libcudart` and makes them the
    /// process's. The first library stays.
    pub(crate) fn install(library: Library, name: &str) -> Result<&'static Self> {
        let runtime = Self {
            symbols: Symbols::load(&library, name)?,
            // SAFETY: as in `Symbols::load`.
            error_string: unsafe {
                *library.get("cudaGetErrorString").map_err(|_| missing(name, "cudaGetErrorString"))?
            },
            attributes: [const { [const { OnceLock::new() }; DeviceAttribute::COUNT] }; KEPT_DEVICES],
        };
        // Never unloaded: kernel modules and the pointers above depend on it.
        std::mem::forget(library);
        Ok(CUDA_RUNTIME.get_or_init(|| runtime))
    }

    /// The process's CUDA runtime, if [`install`](Self::install) has run.
    pub(crate) fn get() -> Option<&'static Self> {
        CUDA_RUNTIME.get()
    }

    pub(super) fn check(&self, call: &'static str, code: CudaError) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        self.last_error();
        // SAFETY: the function takes any code and returns a static string.
        let message = unsafe { CStr::from_ptr((self.error_string)(code)) };
        Err(FlashInferError::Cuda { call, code, message: message.to_string_lossy().into_owned() })
    }

    /// The last failure in this thread. The runtime remembers it until it is
    /// asked, and modules that ask after a launch would take one that was
    /// reported already for theirs. That of a kernel it never forgets.
    pub(crate) fn last_error(&self) -> CudaError {
        // SAFETY: no arguments.
        unsafe { (self.symbols.get_last_error)() }
    }

    /// Forgets what an earlier call left in this thread, such as "not ready",
    /// and reports what stays.
    fn check_last_error(&self) -> Result<()> {
        if self.last_error() == 0 {
            return Ok(());
        }
        self.check("an earlier launch", self.last_error())
    }

    fn integer(&self, call: &'static str, get: unsafe extern "C" fn(*mut c_int) -> CudaError) -> Result<i32> {
        let mut value = 0;
        // SAFETY: the function writes one int through the pointer.
        self.check(call, unsafe { get(&mut value) })?;
        Ok(value)
    }

    /// The version of `libcudart`, as 1000 × major + 10 × minor.
    pub(crate) fn runtime_version(&self) -> Result<i32> {
        self.integer("cudaRuntimeGetVersion", self.symbols.runtime_get_version)
    }

    /// The newest CUDA version that the driver serves; 0 without a driver.
    pub(crate) fn driver_version(&self) -> Result<i32> {
        self.integer("cudaDriverGetVersion", self.symbols.driver_get_version)
    }

    /// The number of visible CUDA devices.
    pub(crate) fn device_count(&self) -> Result<i32> {
        self.integer("cudaGetDeviceCount", self.symbols.get_device_count)
    }

    /// A property of a device, which is asked for once.
    pub(crate) fn attribute(&self, ordinal: u32, attribute: DeviceAttribute) -> Result<i32> {
        let kept = self.attributes.get(ordinal as usize).map(|kept| &kept[attribute as usize]);
        if let Some(&value) = kept.and_then(OnceLock::get) {
            return Ok(value);
        }
        let mut value = 0;
        // SAFETY: writes one int through the pointer.
        let code =
            unsafe { (self.symbols.device_get_attribute)(&mut value, attribute.code(), ordinal as c_int) };
        self.check("cudaDeviceGetAttribute", code)?;
        Ok(kept.map_or(value, |kept| *kept.get_or_init(|| value)))
    }

    /// The multiprocessors of a device.
    pub(crate) fn multiprocessors(&self, ordinal: u32) -> Result<usize> {
        Ok(self.attribute(ordinal, DeviceAttribute::MultiprocessorCount)?.unsigned_abs() as usize)
    }

    /// Major and minor compute capability of a device.
    pub(crate) fn compute_capability(&self, ordinal: u32) -> Result<(i32, i32)> {
        Ok((
            self.attribute(ordinal, DeviceAttribute::ComputeCapabilityMajor)?,
            self.attribute(ordinal, DeviceAttribute::ComputeCapabilityMinor)?,
        ))
    }

    /// Whether work enqueued on the stream goes into a CUDA graph.
    pub(crate) fn is_capturing(&'static self, stream: &Stream) -> Result<bool> {
        let _device = self.on_device_of(stream)?;
        let mut status = CAPTURE_NONE;
        // SAFETY: the stream is alive (it is borrowed); one int is written.
        let code = unsafe { (self.symbols.stream_is_capturing)(stream.as_raw(), &mut status) };
        self.check("cudaStreamIsCapturing", code)?;
        Ok(status != CAPTURE_NONE)
    }

    /// Reports a failure of the stream's device, for launchers that end the
    /// process over one, or never return, whoever caused it.
    pub(crate) fn check_healthy(&'static self, stream: &Stream) -> Result<()> {
        // Any call reports a failure of the device.
        self.is_capturing(stream)?;
        self.check_last_error()
    }

    /// Enqueues the writing of zeros.
    ///
    /// # Safety
    /// `data` must point to that many bytes of the stream's device.
    pub(crate) unsafe fn zero(&'static self, stream: &Stream, data: *mut c_void, bytes: usize) -> Result<()> {
        let _device = self.on_device_of(stream)?;
        capture::enqueue(stream, || {
            // SAFETY: promised by the caller; the stream is alive.
            let code = unsafe { (self.symbols.memset_async)(data, 0, bytes, stream.as_raw()) };
            self.check("cudaMemsetAsync", code)
        })
    }

    /// Enqueues the writing of `count` times the same number. The runtime sets
    /// bytes only, so this sets the first byte of each number, then the second,
    /// and so on.
    ///
    /// # Safety
    /// `data` must point to that many numbers of the stream's device.
    pub(crate) unsafe fn fill(
        &'static self,
        stream: &Stream,
        data: *mut c_void,
        number: f32,
        count: usize,
    ) -> Result<()> {
        let _device = self.on_device_of(stream)?;
        for (at, byte) in number.to_le_bytes().into_iter().enumerate() {
            let first = data.cast::<u8>().wrapping_add(at).cast();
            capture::enqueue(stream, || {
                let (pitch, width) = (size_of::<f32>(), 1);
                // SAFETY: promised by the caller; the stream is alive.
                let code = unsafe {
                    (self.symbols.memset_2d_async)(first, pitch, byte.into(), width, count, stream.as_raw())
                };
                self.check("cudaMemset2DAsync", code)
            })?;
        }
        Ok(())
    }

    /// Waits for all work on the stream's device.
    pub(crate) fn wait_for_device_of(&'static self, stream: &Stream) -> Result<()> {
        let _device = self.on_device_of(stream)?;
        // SAFETY: no arguments.
        self.check("cudaDeviceSynchronize", unsafe { (self.symbols.device_synchronize)() })
    }

    /// Runs a launcher that learns of its launch from the last error of this
    /// thread, or that does not look at all.
    ///
    /// It finds no error of an earlier call to take for its own, and leaves
    /// none of its own to a later one. After a kernel failed, nothing is
    /// launched.
    pub(crate) fn watch_launch<T>(&self, launch: impl FnOnce() -> Result<T>) -> Result<T> {
        self.check_last_error()?;
        let (launched, code) = (launch(), self.last_error());
        let launched = launched?;
        self.check("a launch", code)?;
        Ok(launched)
    }

    /// Enqueues the copy of `rows` rows of `bytes` bytes each, `pitch` bytes
    /// from one to the next, to others that are as far apart.
    ///
    /// # Safety
    /// Both pointers must be to such rows of the stream's device, which do not
    /// overlap.
    pub(crate) unsafe fn copy_rows(
        &'static self,
        stream: &Stream,
        [source, target]: [*mut c_void; 2],
        rows: usize,
        bytes: usize,
        pitch: usize,
    ) -> Result<()> {
        let _device = self.on_device_of(stream)?;
        let kind = DEVICE_TO_DEVICE;
        if rows > 1 && pitch <= MAX_PITCH {
            let copy = self.symbols.memcpy_2d_async;
            // SAFETY: promised by the caller; the stream is alive.
            let code = unsafe { copy(target, pitch, source, pitch, bytes, rows, kind, stream.as_raw()) };
            return self.check("cudaMemcpy2DAsync", code);
        }
        for row in 0..rows {
            let at = |data: *mut c_void| data.cast::<u8>().wrapping_add(row * pitch).cast();
            // SAFETY: as above.
            let code = unsafe {
                (self.symbols.memcpy_async)(at(target), at(source).cast_const(), bytes, kind, stream.as_raw())
            };
            self.check("cudaMemcpyAsync", code)?;
        }
        Ok(())
    }

    /// Makes the stream's device current until the guard is dropped.
    pub(crate) fn on_device_of(&'static self, stream: &Stream) -> Result<DeviceGuard> {
        let previous = self.integer("cudaGetDevice", self.symbols.get_device)?;
        let wanted = stream.ordinal() as c_int;
        if previous == wanted {
            return Ok(DeviceGuard { runtime: self, restore: None });
        }
        // SAFETY: takes a number.
        self.check("cudaSetDevice", unsafe { (self.symbols.set_device)(wanted) })?;
        Ok(DeviceGuard { runtime: self, restore: Some(previous) })
    }
}

/// Puts the device back that was current before.
pub(crate) struct DeviceGuard {
    runtime: &'static CudaRuntime,
    restore: Option<c_int>,
}

impl Drop for DeviceGuard {
    fn drop(&mut self) {
        if let Some(device) = self.restore {
            // SAFETY: takes a number; it was current before.
            unsafe { (self.runtime.symbols.set_device)(device) };
        }
    }
}
