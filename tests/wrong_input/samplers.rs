//! Sampling.

use crate::*;

#[test]
fn samplers() {
    let stream = stream();
    let on = |device, dtype, shape: &[usize]| tensor(ALIGNED, device, dtype, shape, None);
    let f32s = |shape: &[usize]| on(GPU, DType::F32, shape);
    let samples = |output: DType, valid: DType, rows: usize| {
        Samples::new(tensor_mut(GPU, output, &[rows]), tensor_mut(GPU, valid, &[rows]))
    };
    let good = || samples(DType::I32, DType::U8, 4);
    let (probs, options) = (f32s(&[4, 64]), SamplingOptions::default());
    let names = ["sampling", "top_p_sampling", "top_k_sampling", "min_p_sampling", "top_k_top_p_sampling"]
        .map(|name| format!("{name}_from_probs"));
    // The same arguments to all functions that draw from probabilities.
    let all =
        |mut samples: Samples<'_>, probs: TensorRef<'_>, options: &SamplingOptions<'_>, argument: &str| {
            let calls = [
                sampling::sampling_from_probs(&stream, &mut samples, &probs, options),
                sampling::top_p_sampling_from_probs(&stream, &mut samples, &probs, 0.5.into(), options),
                sampling::top_k_sampling_from_probs(&stream, &mut samples, &probs, 5.into(), options),
                sampling::min_p_sampling_from_probs(&stream, &mut samples, &probs, 0.5.into(), options),
                sampling::top_k_top_p_sampling_from_probs(
                    &stream,
                    &mut samples,
                    &probs,
                    5.into(),
                    0.5.into(),
                    options,
                ),
            ];
            for (call, name) in calls.into_iter().zip(&names) {
                refused(call, name, argument);
            }
        };
    for dtype in [DType::F16, DType::BF16, DType::F64, DType::I32] {
        all(good(), on(GPU, dtype, &[4, 64]), &options, "probs");
    }
    for shape in [&[4][..], &[4, 1, 64], &[4, 0], &[1, (1 << 23) + 1], &[1 << 20, 4097], &[1 << 31, 1]] {
        all(good(), f32s(shape), &options, "probs");
    }
    all(good(), on(Device::Cpu, DType::F32, &[4, 64]), &options, "probs");
    all(good(), on(Device::Cuda(1), DType::F32, &[4, 64]), &options, "probs");
    all(good(), tensor(ALIGNED, GPU, DType::F32, &[4, 64], Some(&[128, 1])), &options, "probs");
    all(good(), tensor(ALIGNED + 8, GPU, DType::F32, &[4, 64], None), &options, "probs");
    all(good(), tensor(ALIGNED + 4, GPU, DType::F32, &[4, 66], None), &options, "probs");
    for dtype in [DType::U32, DType::I16, DType::F32] {
        all(samples(dtype, DType::U8, 4), probs, &options, "output");
    }
    all(samples(DType::I64, DType::U8, 3), probs, &options, "output");
    all(samples(DType::I64, DType::I32, 4), probs, &options, "valid");
    let short = Samples::new(tensor_mut(GPU, DType::I32, &[4]), tensor_mut(GPU, DType::U8, &[3]));
    all(short, probs, &options, "valid");

    // SAFETY: never used: every call is refused.
    let indices = |dtype, shape: &[usize], bound| unsafe {
        Indices::from_device_unchecked(on(GPU, dtype, shape), bound)
    };
    for (dtype, shape, bound) in [
        (DType::I32, &[4][..], 5),
        (DType::I64, &[4], 4),
        (DType::I32, &[5], 4),
        (DType::I32, &[4, 1], 4),
        (DType::I32, &[4], usize::MAX),
    ] {
        let mut options = options;
        options.indices = Some(indices(dtype, shape, bound));
        all(good(), probs, &options, "indices");
    }
    for pair in [
        on(GPU, DType::I32, &[2]),
        on(GPU, DType::U64, &[1]),
        on(GPU, DType::U64, &[2, 1]),
        on(Device::Cpu, DType::U64, &[2]),
        tensor(ALIGNED + 4, GPU, DType::I64, &[2], None),
        tensor(ALIGNED, GPU, DType::I64, &[2], Some(&[2])),
    ] {
        all(good(), probs, &SamplingOptions::with_random(Random::Device(pair)), "random");
    }

    // Parameters.
    let (top_p, top_k, min_p) = (&names[1], &names[2], &names[3]);
    let both = &names[4];
    for value in [0.0, -0.1, 1.1, f64::NAN, f64::INFINITY, 1e-60] {
        let p = Parameter::Value(value);
        refused(
            sampling::top_p_sampling_from_probs(&stream, &mut good(), &probs, p, &options),
            top_p,
            "top_p",
        );
        let call =
            sampling::top_k_top_p_sampling_from_probs(&stream, &mut good(), &probs, 1.into(), p, &options);
        refused(call, both, "top_p");
    }
    for value in [-0.1, 1.1, f64::NAN] {
        let p = Parameter::Value(value);
        refused(
            sampling::min_p_sampling_from_probs(&stream, &mut good(), &probs, p, &options),
            min_p,
            "min_p",
        );
    }
    let call = sampling::top_k_sampling_from_probs(&stream, &mut good(), &probs, 0.into(), &options);
    refused(call, top_k, "top_k");
    for wrong in [
        f32s(&[5]),
        f32s(&[4, 1]),
        on(GPU, DType::F16, &[4]),
        on(Device::Cpu, DType::F32, &[4]),
        tensor(ALIGNED, GPU, DType::F32, &[4], Some(&[2])),
        tensor(ALIGNED + 2, GPU, DType::F32, &[4], None),
    ] {
        let p = Parameter::PerRow(wrong);
        refused(
            sampling::top_p_sampling_from_probs(&stream, &mut good(), &probs, p, &options),
            top_p,
            "top_p",
        );
        refused(
            sampling::min_p_sampling_from_probs(&stream, &mut good(), &probs, p, &options),
            min_p,
            "min_p",
        );
    }
    // As many as the kernel looks up: of outputs, or of rows.
    let mut mapped = options;
    mapped.indices = Some(indices(DType::I64, &[9], 4));
    let nine = || samples(DType::I64, DType::U8, 9);
    let k = |dtype, len: usize| Parameter::PerRow(on(GPU, dtype, &[len]));
    for wrong in [k(DType::I64, 4), k(DType::I32, 9)] {
        let call = sampling::top_k_sampling_from_probs(&stream, &mut nine(), &probs, wrong, &mapped);
        refused(call, top_k, "top_k");
    }
    let call = sampling::min_p_sampling_from_probs(
        &stream,
        &mut nine(),
        &probs,
        Parameter::PerRow(f32s(&[4])),
        &mapped,
    );
    refused(call, min_p, "min_p");
    let nine_ps = Parameter::PerRow(f32s(&[9]));
    refused(
        sampling::top_p_sampling_from_probs(&stream, &mut nine(), &probs, nine_ps, &mapped),
        top_p,
        "top_p",
    );
    let call = sampling::top_k_top_p_sampling_from_probs(
        &stream,
        &mut nine(),
        &probs,
        k(DType::I64, 9),
        0.5.into(),
        &mapped,
    );
    refused(call, both, "top_k");

    // Logits: more random numbers than there are.
    let from_logits = |rows: usize, logits: TensorRef<'_>, options: &SamplingOptions<'_>, argument: &str| {
        let mut output = tensor_mut(GPU, DType::I32, &[rows]);
        let call = sampling::sampling_from_logits(&stream, &mut output, &logits, options);
        refused(call, "sampling_from_logits", argument);
    };
    from_logits(4, on(GPU, DType::F16, &[4, 64]), &options, "logits");
    from_logits(5, probs, &options, "output");
    let mut many = options;
    many.indices = Some(indices(DType::I32, &[1 << 26], 4));
    from_logits(1 << 26, probs, &many, "output");
}

#[test]
fn largest_logits_and_top_p() {
    let stream = stream();
    let on = |device, dtype, shape: &[usize]| tensor(ALIGNED, device, dtype, shape, None);
    let argmax = |output: (DType, &[usize]), logits: TensorRef<'_>, argument: &str| {
        let mut output = tensor_mut(GPU, output.0, output.1);
        refused(sampling::argmax(&stream, &mut output, &logits), "argmax", argument);
    };
    let good = on(GPU, DType::F16, &[4, 64]);
    let inputs = [
        on(Device::Cpu, DType::F16, &[4, 64]),
        on(Device::Cuda(1), DType::F16, &[4, 64]),
        on(GPU, DType::F64, &[4, 64]),
        on(GPU, DType::E4M3, &[4, 64]),
        on(GPU, DType::F16, &[256]),
        on(GPU, DType::F16, &[4, 0]),
        on(GPU, DType::F16, &[1, (1 << 23) + 1]),
        tensor(ALIGNED, GPU, DType::F16, &[4, 64], Some(&[128, 1])),
        tensor(ALIGNED + 2, GPU, DType::F16, &[4, 64], None),
    ];
    for logits in inputs {
        argmax((DType::I32, &[4]), logits, "logits");
    }
    for output in [(DType::F32, &[4][..]), (DType::U8, &[4]), (DType::I64, &[3]), (DType::I32, &[4, 1])] {
        argmax(output, good, "output");
    }

    let top_p = |out: TensorMut<'_>, probs: TensorRef<'_>, top_p: Parameter<'_>, argument: &str| {
        let mut out = out;
        let call = sampling::top_p_renorm_probs(&stream, &mut out, &probs, top_p);
        refused(call, "top_p_renorm_probs", argument);
    };
    let good = on(GPU, DType::F32, &[4, 64]);
    let out = || tensor_mut(GPU, DType::F32, &[4, 64]);
    for probs in inputs {
        top_p(out(), probs, 0.5.into(), "probs");
    }
    top_p(tensor_mut(GPU, DType::F32, &[4, 63]), good, 0.5.into(), "out");
    top_p(tensor_mut(GPU, DType::F16, &[4, 64]), good, 0.5.into(), "out");
    for number in [0.0, -0.5, 1.1, f64::NAN, 1e-60] {
        top_p(out(), good, number.into(), "top_p");
    }
    for rows in [on(GPU, DType::F32, &[5]), on(GPU, DType::F64, &[4]), on(Device::Cpu, DType::F32, &[4])] {
        top_p(out(), good, Parameter::PerRow(rows), "top_p");
    }
}

#[test]
fn sampling_steps() {
    let stream = stream();
    let on = |device, dtype, shape: &[usize]| tensor(ALIGNED, device, dtype, shape, None);
    let run = |output: (DType, &[usize]),
               logits: (Device, DType, &[usize]),
               options: &SampleOptions<'_>,
               argument| {
        let mut logits = tensor_mut(logits.0, logits.1, logits.2);
        let call = sampling::sample(&stream, &mut tensor_mut(GPU, output.0, output.1), &mut logits, options);
        refused(call, "sample", argument);
    };
    let good = SampleOptions::new(on(GPU, DType::F32, &[4]));
    let (tokens, f32s): ((_, &[usize]), (_, _, &[usize])) = ((DType::I32, &[4]), (GPU, DType::F32, &[4, 64]));
    for logits in [
        (Device::Cpu, DType::F32, &[4, 64][..]),
        (Device::Cuda(1), DType::F32, &[4, 64]),
        (GPU, DType::F16, &[4, 64]),
        (GPU, DType::F32, &[256]),
        (GPU, DType::F32, &[4, 0]),
        (GPU, DType::F32, &[1, (1 << 23) + 1]),
    ] {
        run(tokens, logits, &good, "logits");
    }
    for output in [(DType::F32, &[4][..]), (DType::U8, &[4]), (DType::I64, &[3]), (DType::I32, &[4, 1])] {
        run(output, f32s, &good, "output");
    }
    for uniforms in [on(GPU, DType::F64, &[4]), on(GPU, DType::F32, &[5]), on(Device::Cpu, DType::F32, &[4])]
    {
        run(tokens, f32s, &SampleOptions::new(uniforms), "uniforms");
    }
    let with = |change: &dyn Fn(&mut SampleOptions<'static>), argument| {
        let mut options = good;
        change(&mut options);
        run(tokens, f32s, &options, argument);
    };
    for temperature in [-1.0, f64::NAN, f64::INFINITY, 1e300] {
        with(&|options| options.temperature = temperature.into(), "temperature");
    }
    for top_p in [0.0, -0.5, 1.1, f64::NAN, 1e-60] {
        with(&|options| options.top_p = top_p.into(), "top_p");
    }
    for min_p in [-0.5, 1.1, f64::NAN] {
        with(&|options| options.min_p = min_p.into(), "min_p");
    }
    for rows in [on(GPU, DType::F32, &[5]), on(GPU, DType::F64, &[4]), on(Device::Cpu, DType::F32, &[4])] {
        with(&|options| options.temperature = Parameter::PerRow(rows), "temperature");
        with(&|options| options.top_p = Parameter::PerRow(rows), "top_p");
        with(&|options| options.min_p = Parameter::PerRow(rows), "min_p");
        with(&|options| options.top_k = Parameter::PerRow(rows), "top_k");
    }
    with(&|options| options.top_k = Parameter::PerRow(on(GPU, DType::I64, &[4])), "top_k");
}

#[test]
fn chains() {
    let stream = stream();
    let on = |device, dtype, shape: &[usize]| tensor(ALIGNED, device, dtype, shape, None);
    let f32s = |shape: &[usize]| on(GPU, DType::F32, shape);
    // SAFETY: never used: every call is refused.
    let ids = |tensor, bound| unsafe { Indices::from_device_unchecked(tensor, bound) };
    let good_ids = ids(on(GPU, DType::I32, &[3, 2]), 64);
    let (draft, target) = (f32s(&[3, 2, 64]), f32s(&[3, 3, 64]));
    let run = |tokens: &[usize], counts: [&[usize]; 2], input: ChainInput<'_>, argument: &str| {
        let make = |shape: &[usize]| tensor_mut(GPU, DType::I32, shape);
        let mut samples = ChainSamples::new(make(tokens), make(counts[0]), make(counts[1]));
        let options = SamplingOptions::with_random(Philox::new(1, 2));
        let call = sampling::chain_speculative_sampling(&stream, &mut samples, &input, &options);
        refused(call, "chain_speculative_sampling", argument);
    };
    let input = |input: ChainInput<'_>, argument: &str| run(&[3, 3], [&[3], &[3]], input, argument);
    input(ChainInput::new(f32s(&[6, 64]), good_ids, target), "draft_probs");
    input(ChainInput::new(f32s(&[3, 0, 64]), good_ids, target), "draft_probs");
    input(ChainInput::new(on(GPU, DType::F16, &[3, 2, 64]), good_ids, target), "draft_probs");
    input(ChainInput::new(on(Device::Cpu, DType::F32, &[3, 2, 64]), good_ids, target), "draft_probs");
    for shape in [[3, 2, 64], [2, 3, 64], [3, 3, 63], [3, 4, 64]] {
        input(ChainInput::new(draft, good_ids, f32s(&shape)), "target_probs");
    }
    let odd = tensor(ALIGNED + 8, GPU, DType::F32, &[3, 3, 64], None);
    input(ChainInput::new(draft, good_ids, odd), "target_probs");
    for wrong in [
        ids(on(GPU, DType::I32, &[3, 2]), 65),
        ids(on(GPU, DType::I32, &[2, 3]), 64),
        ids(on(GPU, DType::I32, &[6]), 64),
        ids(on(GPU, DType::I64, &[3, 2]), 64),
        ids(tensor(ALIGNED, GPU, DType::I32, &[3, 2], Some(&[4, 1])), 64),
        ids(on(Device::Cuda(1), DType::I32, &[3, 2]), 64),
    ] {
        input(ChainInput::new(draft, wrong, target), "draft_token_ids");
    }
    let good = ChainInput::new(draft, good_ids, target);
    run(&[3, 2], [&[3], &[3]], good, "output_token_ids");
    run(&[9], [&[3], &[3]], good, "output_token_ids");
    run(&[3, 3], [&[2], &[3]], good, "output_accepted_token_num");
    run(&[3, 3], [&[3], &[3, 1]], good, "output_emitted_draft_token_num");
    // The kernel counts elements in 32 bits.
    let large_ids = ids(on(GPU, DType::I32, &[1 << 22, 2]), 64);
    let large = ChainInput::new(f32s(&[1 << 22, 2, 512]), large_ids, f32s(&[1 << 22, 3, 512]));
    input(large, "target_probs");

    let mut mapped = SamplingOptions::default();
    mapped.indices = Some(good_ids);
    let make = |shape: &[usize]| tensor_mut(GPU, DType::I32, shape);
    let mut samples = ChainSamples::new(make(&[3, 3]), make(&[3]), make(&[3]));
    let call = sampling::chain_speculative_sampling(&stream, &mut samples, &good, &mapped);
    refused(call, "chain_speculative_sampling", "indices");
}
