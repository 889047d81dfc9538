//! A GPU that has little memory.

use cudarc::driver::{CudaContext, result, sys::CUdeviceptr};

/// The least that is taken at once.
const PAGE: usize = 2 << 20;

/// Memory of a GPU that nothing else gets, until this is dropped.
pub struct Ballast(Vec<CUdeviceptr>);

impl Ballast {
    /// Takes all memory of the context's GPU but so many bytes, to the accuracy of a large page.
    pub fn leaving(context: &CudaContext, left: usize) -> Self {
        // What was freed goes back to the device.
        context.synchronize().unwrap();
        let mut taken = Vec::new();
        let mut size = 64 << 30;
        while size >= PAGE {
            let (free, _) = result::mem_get_info().unwrap();
            let fits = left.checked_add(size).is_some_and(|wanted| free >= wanted);
            // SAFETY: the address is only freed again.
            match fits.then(|| unsafe { result::malloc_sync(size) }) {
                Some(Ok(address)) => taken.push(address),
                _ => size /= 2,
            }
        }
        Self(taken)
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        for address in self.0.drain(..) {
            // SAFETY: allocated above, used by nothing, and freed once.
            unsafe { result::free_sync(address) }.unwrap();
        }
    }
}
