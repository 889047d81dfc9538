//! Kernels of FlashInfer's as functions of TVM-FFI's own crate, against the CPU. Needs `tvm-ffi-config` to build.
#![cfg(all(feature = "tvm-ffi", feature = "cudarc"))]

mod common;

use common::{Gpu, Mirrored, Number, Rng};
use flashinfer_rs::{ModuleName, ffi::DlTensor};
use half::{bf16, f16};
use tvm_ffi::{AnyView, DLDevice, DLDeviceType, with_stream};

/// `silu_and_mul` of random rows into poisoned ones, called by that crate on the stream of a test.
fn silu_and_mul<T: Number>(gpu: &Gpu, rng: &mut Rng, [rows, dim]: [usize; 2]) {
    let input = Mirrored::<T>::random(gpu, rng, &[rows, 2 * dim]);
    let mut out = Mirrored::<T>::poisoned(gpu, &[rows, dim]);
    let module = gpu.runtime.module(&ModuleName::SILU_AND_MUL).unwrap();
    let device = DLDevice::new(DLDeviceType::kDLCUDA, gpu.cuda.context().ordinal() as i32);
    {
        let (input, out) = (input.device_view(), out.device_view_mut());
        let (input, out) = (DlTensor::from(&input), DlTensor::from(&out));
        // SAFETY: contiguous tensors of one type on the stream's device, the second with rows twice as
        // long, all of whole vectors; both outlive the call, and the stream is waited for below.
        let called = unsafe {
            let function = module.function("silu_and_mul").unwrap().to_tvm_ffi().unwrap();
            let (input, out) = (input.to_tvm_ffi(), out.to_tvm_ffi());
            let args = [AnyView::from(&out), AnyView::from(&input), AnyView::from(&false)];
            with_stream(&device, gpu.cuda.cu_stream().cast(), || function.call_packed(&args))
        };
        assert!(called.unwrap().try_as::<()>().is_some());
    }
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let row = |row: &[f64]| (0..dim).map(|at| silu(row[at]) * row[dim + at]).collect::<Vec<_>>();
    let expected: Vec<f64> = input.wide().chunks(2 * dim).flat_map(row).collect();
    out.assert_close("silu_and_mul", &expected, T::BOUND);
}

#[test]
fn a_kernel_is_a_function_there() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for shape in [[1, 64], [7, 128], [33, 4096]] {
        silu_and_mul::<f16>(&gpu, rng, shape);
        silu_and_mul::<bf16>(&gpu, rng, shape);
    }
}
