//! The dynamic loader, and the platforms that FlashInfer has kernels for. The crate builds on
//! others, too, for what runs on the CPU; there, no library opens.

#[cfg(all(target_os = "linux", not(flashinfer_rs_no_kernels)))]
pub(crate) use linux::*;
#[cfg(any(not(target_os = "linux"), flashinfer_rs_no_kernels))]
pub(crate) use other::*;

use crate::{
    artifacts::embed::{PLATFORMS, has_kernels},
    error::{FlashInferError, Result},
};

/// Refuses a platform without kernels.
///
/// # Errors
/// [`FlashInferError::Unsupported`], which names those that have some.
pub(crate) fn check_platform(os: &str, arch: &str) -> Result<()> {
    if has_kernels(os, arch) && !cfg!(flashinfer_rs_no_kernels) {
        return Ok(());
    }
    let platforms = PLATFORMS.map(|(os, arch)| format!("{os}-{arch}")).join(" and ");
    Err(FlashInferError::Unsupported {
        what: format!("FlashInfer's kernels on {os}-{arch}"),
        available: format!("they are built for {platforms}; `reference` computes the same on the CPU"),
    })
}

#[cfg(all(target_os = "linux", not(flashinfer_rs_no_kernels)))]
mod linux {
    use std::{ffi::c_int, mem::MaybeUninit, ptr};

    pub(crate) use libc::{RTLD_GLOBAL, RTLD_LAZY, RTLD_LOCAL, RTLD_NOLOAD, RTLD_NOW};
    pub(crate) use libloading::os::unix::Library;

    /// The libraries that are in the process, as one.
    pub(crate) fn process() -> Option<Library> {
        Some(Library::this())
    }

    /// Puts the handler of SIGSEGV back when dropped. Loading `libtvm_ffi` replaces
    /// it, which would lose Rust's message for stack overflows.
    pub(crate) struct SignalHandler(Option<libc::sigaction>);

    const SIGNAL: c_int = libc::SIGSEGV;

    impl SignalHandler {
        pub(crate) fn save() -> Self {
            let mut action = MaybeUninit::uninit();
            // SAFETY: a null new action only reads the current one into `action`.
            let read = unsafe { libc::sigaction(SIGNAL, ptr::null(), action.as_mut_ptr()) } == 0;
            // SAFETY: initialized by the successful call.
            Self(read.then(|| unsafe { action.assume_init() }))
        }
    }

    impl Drop for SignalHandler {
        fn drop(&mut self) {
            if let Some(action) = &self.0 {
                // SAFETY: the action was in force when it was saved.
                unsafe { libc::sigaction(SIGNAL, action, ptr::null_mut()) };
            }
        }
    }
}

#[cfg(any(not(target_os = "linux"), flashinfer_rs_no_kernels))]
mod other {
    use std::{convert::Infallible, ffi::OsStr, ops::Deref};

    use libloading::{AsSymbolName, Error};

    pub(crate) const RTLD_NOW: i32 = 0;
    pub(crate) const RTLD_LAZY: i32 = 0;
    pub(crate) const RTLD_LOCAL: i32 = 0;
    pub(crate) const RTLD_GLOBAL: i32 = 0;
    pub(crate) const RTLD_NOLOAD: i32 = 0;

    /// A library that was opened: there is none.
    #[derive(Debug)]
    pub(crate) struct Library(Infallible);

    pub(crate) struct Symbol<T>(Infallible, std::marker::PhantomData<T>);

    impl<T> Deref for Symbol<T> {
        type Target = T;

        fn deref(&self) -> &T {
            match self.0 {}
        }
    }

    impl Library {
        /// # Safety
        /// None.
        pub(crate) unsafe fn open<P: AsRef<OsStr>>(_: Option<P>, _: i32) -> Result<Self, Error> {
            Err(Error::DlOpenUnknown)
        }

        /// # Safety
        /// None.
        pub(crate) unsafe fn get<T>(&self, _: impl AsSymbolName) -> Result<Symbol<T>, Error> {
            match self.0 {}
        }
    }

    pub(crate) fn process() -> Option<Library> {
        None
    }

    pub(crate) struct SignalHandler;

    impl SignalHandler {
        pub(crate) fn save() -> Self {
            Self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_without_kernels_are_refused_with_those_that_have_some() {
        for (os, arch) in
            [("windows", "x86_64"), ("macos", "aarch64"), ("linux", "riscv64"), ("freebsd", "x86_64")]
        {
            let error = check_platform(os, arch).unwrap_err().to_string();
            for words in [&format!("{os}-{arch}"), "linux-x86_64 and linux-aarch64", "`reference`"] {
                assert!(error.contains(words), "no word of {words} in: {error}");
            }
        }
        for arch in ["x86_64", "aarch64"] {
            assert_eq!(check_platform("linux", arch).is_ok(), !cfg!(flashinfer_rs_no_kernels));
        }
    }

    /// As on a platform without kernels; see `.ci/run`.
    #[cfg(flashinfer_rs_no_kernels)]
    #[test]
    fn the_runtime_says_that_there_are_no_kernels() {
        let error = crate::FlashInferRuntime::get().unwrap_err();
        assert!(matches!(error, FlashInferError::Unsupported { .. }), "{error}");
        // SAFETY: nothing opens.
        assert!(unsafe { Library::open(Some("libc.so.6"), RTLD_NOW) }.is_err());
    }
}
