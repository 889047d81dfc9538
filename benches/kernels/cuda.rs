//! What the benchmark calls below this crate: `libcudart`'s launch, and the
//! stream of `libtvm_ffi`.

use std::{
    ffi::{c_char, c_int, c_uint, c_void},
    ptr,
};

use flashinfer_rs::Stream;
use libloading::os::unix::Library;

use crate::Result;

/// A kernel that does nothing.
const EMPTY_PTX: &std::ffi::CStr =
    c".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry empty() { ret; }\n";
/// `kDLCUDA`.
const CUDA: i32 = 2;

#[derive(Clone, Copy)]
#[repr(C)]
struct Dim3(c_uint, c_uint, c_uint);

type LoadData = unsafe extern "C" fn(
    *mut *mut c_void,
    *const c_void,
    *mut c_int,
    *mut *mut c_void,
    c_uint,
    *mut c_int,
    *mut *mut c_void,
    c_uint,
) -> c_int;
type GetKernel = unsafe extern "C" fn(*mut *const c_void, *mut c_void, *const c_char) -> c_int;
type Launch = unsafe extern "C" fn(*const c_void, Dim3, Dim3, *mut *mut c_void, usize, *mut c_void) -> c_int;
type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
type SetStream = unsafe extern "C" fn(i32, i32, *mut c_void, *mut *mut c_void) -> c_int;

/// A bare `cudaLaunchKernel` of an empty kernel.
#[derive(Clone, Copy)]
pub struct BareLaunch {
    launch: Launch,
    kernel: *const c_void,
    stream: *mut c_void,
}

fn checked(call: &str, code: c_int) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(format!("{call} failed with code {code}").into()) }
}

impl BareLaunch {
    pub fn new(stream: &Stream) -> Result<Self> {
        // SAFETY: the runtime has loaded the library, which is found by its
        // name; the types are those of CUDA 13's headers.
        unsafe {
            let cudart = Library::open(Some("libcudart.so.13"), libc::RTLD_NOW | libc::RTLD_NOLOAD)?;
            let load_data: LoadData = *cudart.get(b"cudaLibraryLoadData\0")?;
            let get_kernel: GetKernel = *cudart.get(b"cudaLibraryGetKernel\0")?;
            let launch: Launch = *cudart.get(b"cudaLaunchKernel\0")?;
            let (mut library, mut kernel) = (ptr::null_mut(), ptr::null());
            let (ints, values) = (ptr::null_mut::<c_int>, ptr::null_mut::<*mut c_void>);
            let ptx = EMPTY_PTX.as_ptr().cast();
            checked(
                "cudaLibraryLoadData",
                load_data(&mut library, ptx, ints(), values(), 0, ints(), values(), 0),
            )?;
            checked("cudaLibraryGetKernel", get_kernel(&mut kernel, library, c"empty".as_ptr()))?;
            Ok(Self { launch, kernel, stream: stream.as_raw() })
        }
    }

    pub fn launch(&self, times: usize) -> Result<()> {
        for _ in 0..times {
            // SAFETY: the kernel takes nothing and touches nothing.
            let code = unsafe {
                (self.launch)(self.kernel, Dim3(1, 1, 1), Dim3(32, 1, 1), ptr::null_mut(), 0, self.stream)
            };
            checked("cudaLaunchKernel", code)?;
        }
        Ok(())
    }
}

/// The driver's version and that of `libcudart`, as CUDA writes them.
pub fn versions() -> Result<[String; 2]> {
    let of = |name: &[u8]| -> Result<String> {
        let mut version = 0;
        // SAFETY: as in `BareLaunch::new`; one int is written.
        unsafe {
            let cudart = Library::open(Some("libcudart.so.13"), libc::RTLD_NOW | libc::RTLD_NOLOAD)?;
            let get: GetVersion = *cudart.get(name)?;
            checked("a version", get(&mut version))?;
        }
        Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
    };
    Ok([of(b"cudaDriverGetVersion\0")?, of(b"cudaRuntimeGetVersion\0")?])
}

/// Makes the stream that of all calls of this thread which name none.
pub fn set_stream(stream: &Stream) -> Result<()> {
    // SAFETY: the runtime has loaded the library for all; only a handle is stored.
    let code = unsafe {
        let set: SetStream = *Library::this().get(b"TVMFFIEnvSetStream\0")?;
        set(CUDA, stream.ordinal() as i32, stream.as_raw(), ptr::null_mut())
    };
    checked("TVMFFIEnvSetStream", code)
}
