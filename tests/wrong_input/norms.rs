//! Norms.

use crate::*;

#[test]
fn norms() {
    let (stream, options) = (stream(), NormOptions::default());
    for (name, op) in NORMS {
        let run = |input: TensorRef<'_>, weight: TensorRef<'_>| {
            op(&stream, &mut tensor_mut(GPU, DType::F16, &[8, 64]), &input, &weight, &options)
        };
        let (good, weight) = (half(&[8, 64]), half(&[64]));
        for dtype in [DType::F32, DType::F64, DType::E4M3, DType::I32, DType::U8] {
            refused(run(tensor(ALIGNED, GPU, dtype, &[8, 64], None), weight), name, "input");
        }
        refused(run(tensor(ALIGNED, GPU, DType::BF16, &[8, 64], None), weight), name, "out");
        refused(run(good, tensor(ALIGNED, GPU, DType::BF16, &[64], None)), name, "weight");
        refused(run(tensor(ALIGNED, Device::Cpu, DType::F16, &[8, 64], None), weight), name, "input");
        refused(run(tensor(ALIGNED, Device::Cuda(1), DType::F16, &[8, 64], None), weight), name, "input");
        refused(run(good, tensor(ALIGNED, Device::Cuda(1), DType::F16, &[64], None)), name, "weight");
        refused(run(half(&[64]), weight), name, "input");
        refused(run(half(&[2, 2, 2, 64]), weight), name, "input");
        refused(run(half(&[8, 0]), half(&[0])), name, "input");
        refused(run(half(&[9, 64]), weight), name, "out");
        refused(run(half(&[8, 128]), weight), name, "out");
        refused(run(good, half(&[65])), name, "weight");
        refused(run(good, half(&[1, 64])), name, "weight");
        let strided = |strides: &[usize]| tensor(ALIGNED, GPU, DType::F16, &[8, 64], Some(strides));
        refused(run(strided(&[128, 2]), weight), name, "input");
        refused(run(strided(&[1, 8]), weight), name, "input");
        refused(run(strided(&[65, 1]), weight), name, "input");
        refused(run(strided(&[1 << 33, 1]), weight), name, "input");
        refused(run(good, tensor(ALIGNED, GPU, DType::F16, &[64], Some(&[2]))), name, "weight");
        for odd in [2, 4, 8] {
            refused(run(tensor(ALIGNED + odd, GPU, DType::F16, &[8, 64], None), weight), name, "input");
            refused(run(good, tensor(ALIGNED + odd, GPU, DType::F16, &[64], None)), name, "weight");
        }
        // The kernels count rows in 32 bits.
        refused(run(half(&[1 << 33, 64]), weight), name, "input");
    }
    let mut heads = tensor_mut(GPU, DType::F16, &[4, 2, 64]);
    let call = norm::gemma_rmsnorm(&stream, &mut heads, &half(&[4, 2, 64]), &half(&[64]), &options);
    refused(call, "gemma_rmsnorm", "input");
}

#[test]
fn fused_norms() {
    type FusedAdd =
        fn(&Stream, &mut TensorMut<'_>, &mut TensorMut<'_>, &TensorRef<'_>, &NormOptions) -> Result<()>;
    let ops: [(&str, FusedAdd); 2] = [
        ("fused_add_rmsnorm", norm::fused_add_rmsnorm),
        ("gemma_fused_add_rmsnorm", norm::gemma_fused_add_rmsnorm),
    ];
    let (stream, options) = (stream(), NormOptions::default());
    for (name, op) in ops {
        let run = |mut input: TensorMut<'_>, mut residual: TensorMut<'_>, weight: TensorRef<'_>| {
            op(&stream, &mut input, &mut residual, &weight, &options)
        };
        let make = |dtype, shape: &[usize]| tensor_mut(GPU, dtype, shape);
        let good = || make(DType::F16, &[8, 64]);
        let weight = half(&[64]);
        refused(run(make(DType::F32, &[8, 64]), good(), weight), name, "input");
        refused(run(good(), make(DType::BF16, &[8, 64]), weight), name, "residual");
        refused(run(make(DType::F16, &[8, 1, 64]), good(), weight), name, "input");
        refused(run(good(), make(DType::F16, &[4, 64]), weight), name, "residual");
        refused(run(good(), tensor_mut(Device::Cpu, DType::F16, &[8, 64]), weight), name, "residual");
        refused(run(good(), good().permute(&[1, 0]).unwrap(), weight), name, "residual");
        refused(run(good(), good(), half(&[32])), name, "weight");
    }
}

#[test]
fn quantizing_norms() {
    let (stream, options) = (stream(), NormOptions::default());
    let on = |dtype, shape: &[usize]| tensor(ALIGNED, GPU, dtype, shape, None);
    let refuse = |out: DType, input: TensorRef<'_>, weight: TensorRef<'_>, scale: TensorRef<'_>, expected| {
        let make = |dtype| tensor_mut(GPU, dtype, &[8, 64]);
        let call = norm::rmsnorm_quant(&stream, &mut make(out), &input, &weight, &scale, &options);
        refused(call, "rmsnorm_quant", expected);
        let call = norm::fused_add_rmsnorm_quant(
            &stream,
            &mut make(out),
            &input,
            &mut make(DType::F16),
            &weight,
            &scale,
            &options,
        );
        refused(call, "fused_add_rmsnorm_quant", expected);
    };
    let (input, weight, scale) = (half(&[8, 64]), half(&[64]), on(DType::F32, &[1]));
    for out in [DType::F16, DType::U8, DType::I8, DType::F32] {
        refuse(out, input, weight, scale, "out");
    }
    refuse(DType::E4M3, on(DType::F32, &[8, 64]), weight, scale, "input");
    refuse(DType::E4M3, on(DType::E4M3, &[8, 64]), weight, scale, "input");
    refuse(DType::E4M3, half(&[8, 0]), half(&[0]), scale, "input");
    refuse(DType::E5M2, tensor(ALIGNED, GPU, DType::F16, &[8, 64], Some(&[66, 1])), weight, scale, "input");
    refuse(DType::E5M2, input, half(&[32]), scale, "weight");
    refuse(DType::E5M2, input, on(DType::BF16, &[64]), scale, "weight");
    refuse(DType::E5M2, input, tensor(ALIGNED + 8, GPU, DType::F16, &[64], None), scale, "weight");
    for scale in [
        on(DType::F16, &[1]),
        on(DType::F64, &[1]),
        on(DType::F32, &[2]),
        on(DType::F32, &[]),
        on(DType::F32, &[1, 1]),
        tensor(ALIGNED, Device::Cpu, DType::F32, &[1], None),
        tensor(ALIGNED + 2, GPU, DType::F32, &[1], None),
    ] {
        refuse(DType::E4M3, input, weight, scale, "scale");
    }
    let call = norm::rmsnorm_quant(
        &stream,
        &mut tensor_mut(GPU, DType::E4M3, &[8, 2, 64]),
        &half(&[8, 2, 64]),
        &weight,
        &scale,
        &options,
    );
    refused(call, "rmsnorm_quant", "input");
    let mut residual = tensor_mut(GPU, DType::BF16, &[8, 64]);
    let mut out = tensor_mut(GPU, DType::E4M3, &[8, 64]);
    let call =
        norm::fused_add_rmsnorm_quant(&stream, &mut out, &input, &mut residual, &weight, &scale, &options);
    refused(call, "fused_add_rmsnorm_quant", "residual");
}

#[test]
fn layer_norms() {
    let (stream, options) = (stream(), NormOptions::default());
    let on = |dtype, shape: &[usize]| tensor(ALIGNED, GPU, dtype, shape, None);
    let run = |out: &[usize], input: TensorRef<'_>, gamma: TensorRef<'_>, beta: TensorRef<'_>, expected| {
        let mut out = tensor_mut(GPU, DType::BF16, out);
        let call = norm::layernorm(&stream, &mut out, &input, &gamma, &beta, &options);
        refused(call, "layernorm", expected);
    };
    let (input, vector) = (on(DType::BF16, &[8, 64]), on(DType::F32, &[64]));
    let refuse = |input, gamma, beta, expected| run(&[8, 64], input, gamma, beta, expected);
    refuse(half(&[8, 64]), vector, vector, "input");
    refuse(on(DType::BF16, &[512]), vector, vector, "input");
    refuse(on(DType::BF16, &[8, 0]), vector, vector, "input");
    refuse(tensor(ALIGNED, GPU, DType::BF16, &[8, 64], Some(&[72, 1])), vector, vector, "input");
    refuse(tensor(ALIGNED + 2, GPU, DType::BF16, &[8, 64], None), vector, vector, "input");
    refuse(on(DType::BF16, &[8, 32]), vector, vector, "out");
    refuse(on(DType::BF16, &[4, 64]), vector, vector, "out");
    refuse(input, on(DType::BF16, &[64]), vector, "gamma");
    refuse(input, vector, on(DType::F32, &[32]), "beta");
    refuse(input, tensor(ALIGNED + 4, GPU, DType::F32, &[64], None), vector, "gamma");
    refuse(input, vector, tensor(ALIGNED, GPU, DType::F32, &[64], Some(&[2])), "beta");
    // The kernel counts elements in 32 bits, and the launcher does not ask for
    // memory just below its limit.
    run(&[1 << 25, 64], on(DType::BF16, &[1 << 25, 64]), vector, vector, "input");
    for d in [24065, 24575] {
        let vector = on(DType::F32, &[d]);
        run(&[8, d], on(DType::BF16, &[8, d]), vector, vector, "input");
    }
    let mut halves = tensor_mut(GPU, DType::F16, &[8, 64]);
    refused(norm::layernorm(&stream, &mut halves, &input, &vector, &vector, &options), "layernorm", "out");
}
