//! Rotary embeddings.

use crate::*;

/// Queries and keys to turn, from one address.
fn rope_tensors(q: TensorRef<'static>, k: TensorRef<'static>) -> RopeTensors<'static> {
    let out = |like: &TensorRef<'_>| {
        let shape: Vec<usize> = like.shape().iter().map(|&size| size as usize).collect();
        tensor_mut(GPU, DType::F16, &shape)
    };
    let (q_rope, k_rope) = (out(&q), out(&k));
    RopeTensors::OutOfPlace { q, k, q_rope, k_rope }
}

#[test]
fn rotary_embeddings() {
    let stream = stream();
    let pos = |len: usize| Positions::from(tensor(ALIGNED, GPU, DType::I32, &[len], None));
    let (good, good_k) = (half(&[8, 4, 128]), half(&[8, 2, 128]));

    let run =
        |mut tensors: RopeTensors<'_>, pos_ids: Positions<'_>, options: &RopeOptions, argument: &str| {
            let call = rope::apply_rope_pos_ids(&stream, &mut tensors, pos_ids, options);
            refused(call, "apply_rope_pos_ids", argument);
            let mut llama = Llama31RopeOptions::default();
            llama.rope = *options;
            let call = rope::apply_llama31_rope_pos_ids(&stream, &mut tensors, pos_ids, &llama);
            refused(call, "apply_llama31_rope_pos_ids", argument);
        };
    let plain = RopeOptions::default();
    let on = |device, dtype, shape: &[usize]| tensor(ALIGNED, device, dtype, shape, None);
    for dtype in [DType::F32, DType::E4M3, DType::I16] {
        run(rope_tensors(on(GPU, dtype, &[8, 4, 128]), good_k), pos(8), &plain, "q");
    }
    run(rope_tensors(on(Device::Cpu, DType::F16, &[8, 4, 128]), good_k), pos(8), &plain, "q");
    run(rope_tensors(half(&[8, 512]), good_k), pos(8), &plain, "q");
    for head_dim in [32, 96, 192, 1024] {
        run(rope_tensors(half(&[8, 4, head_dim]), half(&[8, 2, head_dim])), pos(8), &plain, "q");
    }
    run(rope_tensors(good, on(GPU, DType::BF16, &[8, 2, 128])), pos(8), &plain, "k");
    run(rope_tensors(good, on(Device::Cuda(1), DType::F16, &[8, 2, 128])), pos(8), &plain, "k");
    run(rope_tensors(good, half(&[7, 2, 128])), pos(8), &plain, "k");
    run(rope_tensors(good, half(&[8, 2, 64])), pos(8), &plain, "k");
    let strided = |strides: &[usize]| tensor(ALIGNED, GPU, DType::F16, &[8, 4, 128], Some(strides));
    run(rope_tensors(strided(&[1024, 256, 2]), good_k), pos(8), &plain, "q");
    run(rope_tensors(strided(&[1024, 132, 1]), good_k), pos(8), &plain, "q");
    run(rope_tensors(tensor(ALIGNED + 8, GPU, DType::F16, &[8, 4, 128], None), good_k), pos(8), &plain, "q");
    run(rope_tensors(half(&[1 << 31, 1, 64]), half(&[1 << 31, 1, 64])), pos(1 << 31), &plain, "q");
    run(rope_tensors(half(&[8, 65535, 64]), half(&[8, 1, 64])), pos(8), &plain, "q");
    let with = |q_rope, k_rope| RopeTensors::OutOfPlace { q: good, k: good_k, q_rope, k_rope };
    let out = |dtype, shape: &[usize]| tensor_mut(GPU, dtype, shape);
    let out_k = || out(DType::F16, &[8, 2, 128]);
    run(with(out(DType::BF16, &[8, 4, 128]), out_k()), pos(8), &plain, "q_rope");
    run(with(out(DType::F16, &[8, 3, 128]), out_k()), pos(8), &plain, "q_rope");
    run(with(out(DType::F16, &[8, 4, 128]), out(DType::F16, &[8, 2, 64])), pos(8), &plain, "k_rope");
    run(rope_tensors(good, good_k), pos(7), &plain, "pos_ids");
    for dtype in [DType::U32, DType::F32, DType::I16] {
        run(rope_tensors(good, good_k), on(GPU, dtype, &[8]).into(), &plain, "pos_ids");
    }
    run(rope_tensors(good, good_k), on(Device::Cpu, DType::I32, &[8]).into(), &plain, "pos_ids");
    let gaps = tensor(ALIGNED, GPU, DType::I32, &[8], Some(&[2]));
    run(rope_tensors(good, good_k), gaps.into(), &plain, "pos_ids");
    let odd = tensor(ALIGNED + 4, GPU, DType::I64, &[8], None);
    run(rope_tensors(good, good_k), odd.into(), &plain, "pos_ids");

    let mut options = plain;
    // Halves are whole vectors of 8 elements, neighbours end with one.
    for (rotary_dim, interleave) in
        [(0, false), (8, false), (24, false), (120, false), (144, false), (0, true), (4, true), (136, true)]
    {
        (options.rotary_dim, options.interleave) = (Some(rotary_dim), interleave);
        run(rope_tensors(good, good_k), pos(8), &options, "rotary_dim");
    }
    options.rotary_dim = Some(usize::MAX);
    run(rope_tensors(good, good_k), pos(8), &options, "rotary_dim");
    // Of 16 where heads have 512.
    for (rotary_dim, interleave) in [(16, false), (48, false), (8, true), (24, true)] {
        (options.rotary_dim, options.interleave) = (Some(rotary_dim), interleave);
        run(rope_tensors(half(&[8, 1, 512]), half(&[8, 1, 512])), pos(8), &options, "rotary_dim");
    }
    for number in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        run(rope_tensors(good, good_k), pos(8), &RopeOptions::with_theta(number), "rope_theta");
        let mut options = plain;
        options.rope_scale = number;
        run(rope_tensors(good, good_k), pos(8), &options, "rope_scale");
    }
    for (low, high, old, argument) in [
        (4.0, 4.0, 8192.0, "low_freq_factor"),
        (5.0, 4.0, 8192.0, "low_freq_factor"),
        (0.0, 4.0, 8192.0, "low_freq_factor"),
        (1.0, f64::NAN, 8192.0, "high_freq_factor"),
        (1.0, 4.0, 0.0, "old_context_len"),
    ] {
        let mut llama = Llama31RopeOptions::default();
        (llama.low_freq_factor, llama.high_freq_factor, llama.old_context_len) = (low, high, old);
        let call = rope::apply_llama31_rope_pos_ids(&stream, &mut rope_tensors(good, good_k), pos(8), &llama);
        refused(call, "apply_llama31_rope_pos_ids", argument);
    }
}

#[test]
fn rotary_embeddings_from_a_table() {
    let stream = stream();
    // SAFETY: nothing is launched, so nothing reads the positions.
    let pos = |len: usize, num_positions| unsafe {
        Positions::from_device_unchecked(tensor(ALIGNED, GPU, DType::I32, &[len], None), num_positions)
    };
    let table = |rows: usize, rotary_dim: usize| tensor(ALIGNED, GPU, DType::F32, &[rows, rotary_dim], None);
    let run = |mut tensors: RopeTensors<'_>, rotation: Rotation<'_>, argument: &str| {
        let call = rope::apply_rope_pos_ids_cos_sin_cache(&stream, &mut tensors, &rotation);
        refused(call, "apply_rope_pos_ids_cos_sin_cache", argument);
    };
    let of = |head_dim| rope_tensors(half(&[8, 4, head_dim]), half(&[8, 2, head_dim]));
    // Positions without rows.
    run(of(128), Rotation::new(table(100, 128), pos(8, 101)), "pos_ids");
    run(of(128), Rotation::interleaved(table(100, 128), pos(8, 100)), "pos_ids");
    run(of(128), Rotation::interleaved(table(0, 128), pos(8, 1)), "pos_ids");
    // A bound above every i64.
    run(of(128), Rotation::new(table(100, 128), pos(8, usize::MAX)), "pos_ids");
    run(of(128), Rotation::new(table(100, 128), tensor(ALIGNED, GPU, DType::I32, &[8], None)), "pos_ids");
    run(of(128), Rotation::new(table(100, 128), pos(7, 100)), "pos_ids");
    run(of(128), Rotation::new(table(1 << 26, 128), pos(8, 1 << 26)), "cos_sin_cache");

    let wrong = |table| Rotation::new(table, pos(8, 1));
    let on = |device, dtype, shape: &[usize]| tensor(ALIGNED, device, dtype, shape, None);
    run(of(128), wrong(on(GPU, DType::F16, &[100, 128])), "cos_sin_cache");
    run(of(128), wrong(on(Device::Cpu, DType::F32, &[100, 128])), "cos_sin_cache");
    run(of(128), wrong(on(GPU, DType::F32, &[100 * 128])), "cos_sin_cache");
    run(of(128), wrong(tensor(ALIGNED, GPU, DType::F32, &[100, 128], Some(&[256, 1]))), "cos_sin_cache");
    run(of(128), wrong(tensor(ALIGNED + 8, GPU, DType::F32, &[100, 128], None)), "cos_sin_cache");
    for (head_dim, rotary_dim) in [
        (128, 0),
        (128, 24),
        (128, 144),
        (512, 48),
        (192, 0),
        (192, 16),
        (192, 48),
        (192, 224),
        (32768, 16416),
    ] {
        run(of(head_dim), wrong(table(100, rotary_dim)), "cos_sin_cache");
    }
    for (head_dim, rotary_dim) in [(128, 4), (512, 24), (192, 24)] {
        let rotation = Rotation::interleaved(table(100, rotary_dim), pos(8, 1));
        run(of(head_dim), rotation, "cos_sin_cache");
    }
    // Halves of these widths belong to two warps.
    for (head_dim, rotary_dim) in [(96, 96), (192, 192), (1024, 1024), (1024, 160)] {
        let in_place = |heads| tensor_mut(GPU, DType::F16, &[8, heads, head_dim]);
        let tensors = RopeTensors::InPlace { q: in_place(4), k: in_place(2) };
        run(tensors, wrong(table(100, rotary_dim)), "cos_sin_cache");
    }
    // More blocks side by side than a grid has, one for each head and part.
    let many = |heads, head_dim| rope_tensors(half(&[8, heads, head_dim]), half(&[8, 1, head_dim]));
    run(many(65535, 128), wrong(table(100, 128)), "q");
    run(many(32767, 192), wrong(table(100, 128)), "q");
}

#[test]
fn quantizing_rotary_embeddings() {
    let stream = stream();
    // SAFETY: nothing is launched, so nothing reads the positions.
    let pos_ids =
        unsafe { Positions::from_device_unchecked(tensor(ALIGNED, GPU, DType::I32, &[8], None), 100) };
    let table = |rotary_dim: usize| tensor(ALIGNED, GPU, DType::F32, &[100, rotary_dim], None);
    let on = |dtype, shape: &[usize]| tensor(ALIGNED, GPU, dtype, shape, None);
    let parts = |rope, nope| RopeParts { rope, nope: Some(nope) };
    let out = |dtype, shape: &[usize], nope: &[usize]| RopePartsMut {
        rope: tensor_mut(GPU, dtype, shape),
        nope: Some(tensor_mut(GPU, dtype, nope)),
    };
    let (q, k) = (parts(half(&[8, 4, 64]), half(&[8, 4, 128])), parts(half(&[8, 2, 64]), half(&[8, 2, 128])));
    let e4m3 = DType::E4M3;
    let outs = || [out(e4m3, &[8, 4, 64], &[8, 4, 128]), out(e4m3, &[8, 2, 64], &[8, 2, 128])];
    let run = |mut out: [RopePartsMut<'_>; 2], input: [RopeParts<'_>; 2], table, argument: &str| {
        let options = RopeQuantizeOptions::default();
        let call = rope::rope_quantize(&stream, &mut out, &input, &Rotation::new(table, pos_ids), &options);
        refused(call, "rope_quantize", argument);
    };
    let brain = |shape: &[usize]| on(DType::BF16, shape);
    run(outs(), [parts(on(DType::F32, &[8, 4, 64]), q.nope.unwrap()), k], table(64), "q.rope");
    run(outs(), [parts(q.rope, brain(&[8, 4, 128])), k], table(64), "q.nope");
    run(outs(), [q, parts(brain(&[8, 2, 64]), brain(&[8, 2, 128]))], table(64), "k.rope");
    run(outs(), [RopeParts { rope: q.rope, nope: None }, k], table(64), "k.nope");
    run(outs(), [q, RopeParts { rope: k.rope, nope: None }], table(64), "k.nope");
    run(outs(), [parts(half(&[8, 64]), half(&[8, 128])), k], table(64), "q.rope");
    run(outs(), [parts(q.rope, half(&[8, 3, 128])), k], table(64), "q.nope");
    run(outs(), [q, parts(half(&[7, 2, 64]), half(&[7, 2, 128]))], table(64), "k.rope");
    run(outs(), [q, parts(half(&[8, 2, 32]), half(&[8, 2, 128]))], table(64), "k.rope");
    run(outs(), [q, parts(half(&[8, 1, 64]), half(&[8, 1, 128]))], table(64), "k_out.rope");
    run(outs(), [q, parts(half(&[8, 64]), half(&[8, 128]))], table(64), "k_out.rope");
    run(outs(), [q, k], table(128), "cos_sin_cache");
    let half_out = [out(DType::F16, &[8, 4, 64], &[8, 4, 128]), out(e4m3, &[8, 2, 64], &[8, 2, 128])];
    run(half_out, [q, k], table(64), "q_out.rope");
    let mixed = [out(e4m3, &[8, 4, 64], &[8, 4, 128]), out(DType::E5M2, &[8, 2, 64], &[8, 2, 128])];
    run(mixed, [q, k], table(64), "k_out.rope");
    let few = [out(e4m3, &[8, 3, 64], &[8, 3, 128]), out(e4m3, &[8, 2, 64], &[8, 2, 128])];
    run(few, [q, k], table(64), "q_out.rope");
    let short = [out(e4m3, &[8, 4, 64], &[8, 4, 64]), out(e4m3, &[8, 2, 64], &[8, 2, 128])];
    run(short, [q, k], table(64), "q_out.nope");
    // 48 elements are no two halves of vectors of 16.
    let all = |rotary_dim: usize, heads: usize| {
        let rope = |heads| RopeParts { rope: half(&[8, heads, rotary_dim]), nope: None };
        let out = |heads| RopePartsMut { rope: tensor_mut(GPU, e4m3, &[8, heads, rotary_dim]), nope: None };
        ([out(heads), out(1)], [rope(heads), rope(1)])
    };
    for rotary_dim in [0, 16, 48, 16416] {
        let (out, input) = all(rotary_dim, 4);
        run(out, input, table(rotary_dim), "cos_sin_cache");
    }
    let (out, input) = all(64, 65535);
    run(out, input, table(64), "q.rope");
    let strided = |strides: &[usize]| tensor(ALIGNED, GPU, DType::F16, &[8, 4, 64], Some(strides));
    for strides in [&[512, 128, 2][..], &[512, 68, 1], &[1 << 33, 64, 1]] {
        run(outs(), [parts(strided(strides), q.nope.unwrap()), k], table(64), "q.rope");
    }
    for (scale, argument) in [(f64::NAN, "quant_scale_q"), (f64::INFINITY, "quant_scale_kv")] {
        let options = match argument {
            "quant_scale_q" => RopeQuantizeOptions::with_scales(scale, 1.0),
            _ => RopeQuantizeOptions::with_scales(1.0, scale),
        };
        let rotation = Rotation::new(table(64), pos_ids);
        let call = rope::rope_quantize(&stream, &mut outs(), &[q, k], &rotation, &options);
        refused(call, "rope_quantize", argument);
    }
    // Heads without so many elements.
    assert!(RopeParts::of_heads(half(&[8, 4, 64]), 65).is_err());
    assert!(RopePartsMut::of_heads(tensor_mut(GPU, e4m3, &[8, 4, 64]), 65).is_err());
    assert!(RopeParts::of_heads(half(&[]), 0).is_err());
}
