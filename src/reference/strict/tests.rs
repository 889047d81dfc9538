//! The strict CPU path refuses in the words of the kernels' checks, where an operation needs more
//! of a device than a stream. The others are compared in `tests/wrong_input/strict.rs`.

use std::ffi::c_void;

use crate::{
    attention::{
        AttentionSpec, Backend, BatchRun, Heads, MaskKind, MlaQuery, MlaRun, MlaSpec, RunOptions,
        check_mla_plan, check_mla_spec, check_single_decode, check_single_decode_spec, check_single_prefill,
    },
    device::Device,
    dtype::DType,
    error::Result,
    gdn::{GdnInput, GdnOptions, GdnOutput, InitialState, check_gdn_prefill},
    gemm::{BmmFp8Input, GemmBackend, Problem, SegmentGemmInput, Sizes},
    indices::{PackedIndices, PageIndices, RaggedIndices, RowIndices, SegmentIndices, SequenceIndices},
    kv::MlaCache,
    ops::check::Check,
    quantization::{BitOrder, check_segment_packbits},
    reference,
    stream::Stream,
    tensor::{TensorMut, TensorRef},
    topk::{TieBreak, TopKOptions, check_page_table_transform, check_ragged_transform, check_topk},
};

/// A dtype, a shape, and how far the address is from a multiple of 256.
#[derive(Clone, Copy)]
struct Of<'a>(DType, &'a [usize], usize);

/// Where a call's tensors are.
#[derive(Clone, Copy)]
struct On(Device);

impl On {
    /// An address that is compared and never followed: every call is refused.
    fn at(self, Of(dtype, shape, offset): Of<'_>) -> TensorRef<'static> {
        let address = ((1usize << 20) + offset) as *const c_void;
        // SAFETY: nobody follows the address.
        unsafe { TensorRef::from_raw_parts(address, self.0, dtype, shape, None) }.unwrap()
    }

    fn out(self, Of(dtype, shape, offset): Of<'_>) -> TensorMut<'static> {
        let address = ((1usize << 40) + offset) as *mut c_void;
        // SAFETY: nobody follows the address.
        unsafe { TensorMut::from_raw_parts(address, self.0, dtype, shape, None) }.unwrap()
    }
}

/// The call is refused with this in the words, and with the same words by the kernel's checks of
/// tensors on a GPU and by the strict CPU path of tensors in host memory.
#[track_caller]
fn refused_alike(
    words: &str,
    op: &'static str,
    checks: impl Fn(&Check<'_>, On) -> Result<()>,
    call: impl Fn(On) -> Result<()>,
) {
    // SAFETY: nothing is enqueued on the stream.
    let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
    let on_gpu = checks(&Check::new(op, &stream).unwrap(), On(Device::Cuda(0))).unwrap_err().to_string();
    let _strict = reference::strict();
    assert_eq!(call(On(Device::Cpu)).unwrap_err().to_string(), on_gpu);
    assert!(on_gpu.contains(words), "{on_gpu}");
}

use DType::{BF16, E4M3, E5M2, F16, F32, F64, I32, U8};

#[test]
fn prefill_of_one_request() {
    let run = |words: &str, spec: AttentionSpec, tensors: [Of<'_>; 4], lse: Option<Of<'_>>, sm_scale: f64| {
        let options = RunOptions::with_sm_scale(sm_scale);
        refused_alike(
            words,
            "SinglePrefill::run_with",
            |check, on| {
                let [q, k, v] = [0, 1, 2].map(|at| on.at(tensors[at]));
                let (out, lse) = (on.out(tensors[3]), lse.map(|lse| on.out(lse)));
                let (tensors, lse) = ([&q.raw, &k.raw, &v.raw, &out.raw], lse.as_ref().map(|lse| &lse.raw));
                check_single_prefill(check, &spec, spec.backend == Backend::Fa3, tensors, lse, &options)
                    .map(drop)
            },
            |on| {
                let [q, k, v] = [0, 1, 2].map(|at| on.at(tensors[at]));
                let (mut out, mut lse) = (on.out(tensors[3]), lse.map(|lse| on.out(lse)));
                let mask = reference::HostMask::Causal;
                reference::single_prefill(&spec, &q, [&k, &v], &mut out, lse.as_mut(), mask, &options)
            },
        );
    };
    let spec = AttentionSpec::new(F16, 64);
    let [q, kv, out] = [Of(F16, &[3, 4, 64], 0), Of(F16, &[9, 2, 64], 0), Of(F16, &[3, 4, 64], 0)];
    run("q: its dtype is f32", spec, [Of(F32, q.1, 0), kv, kv, out], None, 0.125);
    run("q: its dtype is bf16", spec, [Of(BF16, q.1, 0), kv, kv, out], None, 0.125);
    run("q: its shape", spec, [Of(F16, &[3, 256], 0), kv, kv, out], None, 0.125);
    run("k: its dtype is f32", spec, [q, Of(F32, kv.1, 0), kv, out], None, 0.125);
    run("v: its shape", spec, [q, kv, Of(F16, &[8, 2, 64], 0), out], None, 0.125);
    run("k: it starts at", spec, [q, Of(F16, kv.1, 8), kv, out], None, 0.125);
    run("out: its dtype is f32", spec, [q, kv, kv, Of(F32, out.1, 0)], None, 0.125);
    run("lse: its dtype is f64", spec, [q, kv, kv, out], Some(Of(F64, &[3, 4], 0)), 0.125);
    run("sm_scale", spec, [q, kv, kv, out], None, 1e-4);
    // Masks and specs that no kernel has; what is said of a batch's is in `src/ops/attention`.
    let refused = |spec: &AttentionSpec, queries: usize, mask: reference::HostMask<'_>| {
        let on = On(Device::Cpu);
        let (q, kv) = (on.at(Of(F16, &[queries, 4, 64], 0)), on.at(kv));
        let (mut out, options) = (on.out(Of(F16, &[queries, 4, 64], 0)), RunOptions::default());
        let _strict = reference::strict();
        let call = reference::single_prefill(spec, &q, [&kv, &kv], &mut out, None, mask, &options);
        call.unwrap_err().to_string()
    };
    assert!(refused(&spec, 10, reference::HostMask::Causal).contains("10 queries over 9 keys"));
    let items = crate::indices::ItemIndices::new([(3, &[6][..])]).unwrap();
    assert!(refused(&spec, 3, reference::HostMask::MultiItem(&items)).contains("keys that are not paged"));
    let fa3 = spec.with_backend(Backend::Fa3);
    assert!(refused(&fa3, 3, reference::HostMask::None).contains("no attention of one request"));
    assert!(refused(&AttentionSpec::new(F16, 96), 3, reference::HostMask::None).contains("64, 128 and 256"));
    assert!(
        refused(&spec.with_backend(Backend::CudaCores), 3, reference::HostMask::None).contains("CUDA cores")
    );
}

#[test]
fn decode_of_one_request() {
    let run = |words: &str, q: Of<'_>, k: Of<'_>, v: Of<'_>, lse: Of<'_>| {
        let (spec, options) = (AttentionSpec::new(F16, 64), RunOptions::default());
        refused_alike(
            words,
            "SingleDecode::run_with",
            |check, on| {
                let (q, k, v, out, lse) =
                    (on.at(q), on.at(k), on.at(v), on.out(Of(F16, &[4, 64], 0)), on.out(lse));
                let (q, out, lse) = (&q.raw, &out.raw, Some(&lse.raw));
                let run = BatchRun {
                    spec: &spec,
                    heads: Heads::new(4, 2),
                    rows: 1,
                    q,
                    out,
                    lse,
                    options: &options,
                };
                check_single_decode(check, &run, [&k, &v]).map(drop)
            },
            |on| {
                let (mut out, mut lse) = (on.out(Of(F16, &[4, 64], 0)), on.out(lse));
                let (q, k, v) = (on.at(q), on.at(k), on.at(v));
                reference::single_decode(&spec, &q, [&k, &v], &mut out, Some(&mut lse), &options)
            },
        );
    };
    let [q, kv, lse] = [Of(F16, &[4, 64], 0), Of(F16, &[9, 2, 64], 0), Of(F32, &[4], 0)];
    run("q: its dtype is f32", Of(F32, q.1, 0), kv, kv, lse);
    run("q: its shape", Of(F16, &[4, 1, 64], 0), kv, kv, lse);
    run("k: its dtype is bf16", q, Of(BF16, kv.1, 0), kv, lse);
    run("v: it starts at", q, kv, Of(F16, kv.1, 8), lse);
    run("lse: its dtype is f64", q, kv, kv, Of(F64, lse.1, 0));
    // Seven query heads on one, and tensor cores.
    let on = On(Device::Cpu);
    let refused = |spec: AttentionSpec, q_heads: usize| {
        let (q, mut out) = (on.at(Of(F16, &[q_heads, 64], 0)), on.out(Of(F16, &[q_heads, 64], 0)));
        let kv = on.at(Of(F16, &[9, 1, 64], 0));
        let _strict = reference::strict();
        let call = reference::single_decode(&spec, &q, [&kv, &kv], &mut out, None, &RunOptions::default());
        let said = call.unwrap_err().to_string();
        assert_eq!(said, check_single_decode_spec(&spec, Heads::new(q_heads, 1)).unwrap_err().to_string());
        said
    };
    assert!(refused(AttentionSpec::new(F16, 64), 7).contains("7 query heads per KV head"));
    assert!(refused(AttentionSpec::new(F16, 64).with_backend(Backend::Fa2), 4).contains("Backend::Fa2"));
}

#[test]
fn masks_of_batches() {
    let on = On(Device::Cpu);
    let spec = AttentionSpec::new(F16, 64);
    let (q, kv) = (on.at(Of(F16, &[3, 4, 64], 0)), on.at(Of(F16, &[2, 2, 64], 0)));
    let [queries, keys] = [3, 2].map(|len| RaggedIndices::from_lens([len]).unwrap());
    let (mut out, options) = (on.out(Of(F16, &[3, 4, 64], 0)), RunOptions::default());
    let (strict, mask) = (reference::strict(), reference::HostMask::Causal);
    let said = reference::batch_prefill_ragged(
        &spec,
        &q,
        [&kv, &kv],
        &queries,
        &keys,
        &mut out,
        None,
        mask,
        &options,
    );
    drop(strict);
    // SAFETY: nothing is enqueued on the stream.
    let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
    let check = Check::new("BatchPrefill::plan_ragged", &stream).unwrap();
    let on_gpu = MaskKind::Causal.check(&check, &spec, false, [(3, 2)], false).unwrap_err().to_string();
    assert_eq!(said.unwrap_err().to_string(), on_gpu);
    assert!(on_gpu.contains("3 queries over 2 keys"), "{on_gpu}");
}

#[test]
fn latent_attention() {
    let table = PageIndices::from_requests(8, 16, [(&[7, 0][..], 20)]).unwrap();
    let queries = RaggedIndices::from_lens([2]).unwrap();
    let run = |words: &str, q: [Of<'_>; 2], cache: [Of<'_>; 2], out: Of<'_>| {
        let of = |on: On, [a, b]: [Of<'_>; 2]| (on.at(a), on.at(b));
        refused_alike(
            words,
            "MlaPlan::run_with",
            |check, on| {
                let ((nope, pe), (ckv, kpe), out) = (of(on, q), of(on, cache), on.out(out));
                let (q, cache) = (MlaQuery::new(nope, pe), MlaCache::new(ckv, kpe));
                let run =
                    MlaRun { dtype: F16, rows: 2, num_heads: 16, q: &q, cache: &cache, out: &out, lse: None };
                run.check(check, &table)
            },
            |on| {
                let ((nope, pe), (ckv, kpe), mut out) = (of(on, q), of(on, cache), on.out(out));
                let (q, cache) = (MlaQuery::new(nope, pe), MlaCache::new(ckv, kpe));
                let (spec, mask) = (MlaSpec::new(F16, 0.1), reference::HostMask::Causal);
                reference::batch_mla(&spec, &q, &cache, &queries, &table, &mut out, None, mask)
            },
        );
    };
    let (nope, pe) = (Of(F16, &[2, 16, 512], 0), Of(F16, &[2, 16, 64], 0));
    let (ckv, kpe) = (Of(F16, &[8, 16, 512], 0), Of(F16, &[8, 16, 64], 0));
    run("q.nope: its dtype is f32", [Of(F32, nope.1, 0), pe], [ckv, kpe], nope);
    run("q.pe: its shape", [nope, Of(F16, &[2, 16, 32], 0)], [ckv, kpe], nope);
    run("cache.ckv: its dtype is bf16", [nope, pe], [Of(BF16, ckv.1, 0), kpe], nope);
    run("cache.kpe: it starts at", [nope, pe], [ckv, Of(F16, kpe.1, 8)], nope);
    run("out: its dtype is f64", [nope, pe], [ckv, kpe], Of(F64, nope.1, 0));

    // What the spec and the plan refuse.
    let on = On(Device::Cpu);
    let refused = |spec: MlaSpec, num_heads: usize, queries: usize| {
        let q = MlaQuery::new(
            on.at(Of(F16, &[queries, num_heads, 512], 0)),
            on.at(Of(F16, &[queries, num_heads, 64], 0)),
        );
        let cache = MlaCache::new(on.at(ckv), on.at(kpe));
        let mut out = on.out(Of(F16, &[queries, num_heads, 512], 0));
        let (queries, mask) = (RaggedIndices::from_lens([queries]).unwrap(), reference::HostMask::Causal);
        let _strict = reference::strict();
        let call = reference::batch_mla(&spec, &q, &cache, &queries, &table, &mut out, None, mask);
        call.unwrap_err().to_string()
    };
    // SAFETY: nothing is enqueued on the stream.
    let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
    let spec = MlaSpec::new(F16, 1e-4);
    let on_gpu = check_mla_spec(&Check::new("BatchMla::new", &stream).unwrap(), &spec, 16);
    assert_eq!(refused(spec, 16, 1), on_gpu.unwrap_err().to_string());
    let said = refused(MlaSpec::new(F32, 0.1), 16, 1);
    assert!(said.contains("latent attention of dtype f32"), "{said}");
    // 20 tokens for 21 queries; and tiles that end inside of a query.
    let spec = MlaSpec::new(F16, 0.1);
    for (num_heads, len) in [(16, 21), (24, 20)] {
        let queries = RaggedIndices::from_lens([len]).unwrap();
        let check = Check::new("BatchMla::plan", &stream).unwrap();
        let on_gpu = check_mla_plan(&check, &queries, &table, num_heads, true).unwrap_err().to_string();
        assert_eq!(refused(spec, num_heads, len), on_gpu);
    }
}

#[test]
fn gated_delta_rule() {
    let sequences = SequenceIndices::from_lens([3, 2]).unwrap();
    let run = |words: &str, q: Of<'_>, v: Of<'_>, gate: Of<'_>, state: Of<'_>, scale: f64| {
        let (sequences, options) = (&sequences, GdnOptions::with_scale(scale));
        let input = |on: On| GdnInput {
            alpha: Some(on.at(gate)),
            state: InitialState::Zeros,
            ..GdnInput::new(on.at(q), on.at(q), on.at(v))
        };
        let output = |on: On| GdnOutput { output: on.out(Of(F16, &[5, 4, 128], 0)), state: on.out(state) };
        refused_alike(
            words,
            "gdn_prefill",
            |check, on| check_gdn_prefill(check, &output(on), &input(on), sequences, &options),
            |on| reference::gdn_prefill(&mut output(on), &input(on), sequences, &options),
        );
    };
    let (q, v) = (Of(F16, &[5, 2, 128], 0), Of(F16, &[5, 4, 128], 0));
    let (gate, state) = (Of(F32, &[5, 4], 0), Of(F32, &[2, 4, 128, 128], 0));
    run("q: its dtype is f32", Of(F32, q.1, 0), v, gate, state, 1.0);
    run("q: head_dim 64", Of(F16, &[5, 2, 64], 0), v, gate, state, 1.0);
    run("v: its dtype is bf16", q, Of(BF16, v.1, 0), gate, state, 1.0);
    run("v: it starts at", q, Of(F16, v.1, 8), gate, state, 1.0);
    run("alpha: its dtype is f64", q, v, Of(F64, gate.1, 0), state, 1.0);
    run("output_state: its dtype is f64", q, v, gate, Of(F64, state.1, 0), 1.0);
    run("scale", q, v, gate, state, 0.0);
}

#[test]
fn products_of_8_bit_floats() {
    let run = |words: &str, a: Of<'_>, b: Of<'_>, out: Of<'_>, scale: Of<'_>| {
        let input = |on: On| BmmFp8Input {
            a: on.at(a),
            b: on.at(b).permute(&[0, 2, 1]).unwrap(),
            a_scale: on.at(scale),
            b_scale: on.at(Of(F32, &[1], 0)),
        };
        refused_alike(
            words,
            "bmm_fp8",
            |check, on| Problem::check(check, &on.out(out).raw, &input(on)).map(drop),
            |on| reference::bmm_fp8(&mut on.out(out), &input(on)),
        );
    };
    let (a, b) = (Of(E4M3, &[2, 3, 32], 0), Of(E4M3, &[2, 48, 32], 0));
    let (out, scale) = (Of(BF16, &[2, 3, 48], 0), Of(F32, &[1], 0));
    run("a: its dtype is f16", Of(F16, a.1, 0), b, out, scale);
    run("both factors are e5m2", Of(E5M2, a.1, 0), Of(E5M2, b.1, 0), out, scale);
    run("a: k is 24", Of(E4M3, &[2, 3, 24], 0), Of(E4M3, &[2, 48, 24], 0), out, scale);
    run("b: it starts at", a, Of(E4M3, b.1, 128), out, scale);
    run("out: its dtype is f32", a, b, Of(F32, out.1, 0), scale);
    run("a_scale: its dtype is f64", a, b, out, Of(F64, scale.1, 0));
}

#[test]
fn products_of_segments() {
    let segments = SegmentIndices::from_lens([2, 3]).unwrap();
    let run = |words: &str, x: Of<'_>, weights: Of<'_>, column_major: bool, out: Of<'_>| {
        let input = |on: On| SegmentGemmInput {
            x: on.at(x),
            weights: on.at(weights),
            weight_column_major: column_major,
        };
        refused_alike(
            words,
            "segment_gemm",
            |check, on| {
                let out = on.out(out);
                Sizes::check(check, GemmBackend::Sm90, &out.raw, &input(on), &segments).map(drop)
            },
            |on| reference::segment_gemm(&mut on.out(out), &input(on), &segments),
        );
    };
    let (x, weights, out) = (Of(F16, &[5, 32], 0), Of(F16, &[2, 48, 32], 0), Of(F16, &[5, 48], 0));
    run("x: its dtype is f32", Of(F32, x.1, 0), weights, true, out);
    run("weights: its dtype is bf16", x, Of(BF16, weights.1, 0), true, out);
    run("row-major weights of e4m3", Of(E4M3, x.1, 0), Of(E4M3, &[2, 32, 48], 0), false, out);
    run("d_in is 36", Of(F16, &[5, 36], 0), Of(F16, &[2, 48, 36], 0), true, out);
    run("x: it starts at", Of(F16, x.1, 8), weights, true, out);
    run("out: its dtype is f32", x, weights, true, Of(F32, out.1, 0));
    run("segments: they have 5 rows", Of(F16, &[6, 32], 0), weights, true, Of(F16, &[6, 48], 0));
}

#[test]
fn selection() {
    const ROOM: i64 = i64::MAX;
    let topk = |words: &str, values: Of<'_>, indices: Of<'_>, input: Of<'_>, options: &TopKOptions| {
        refused_alike(
            words,
            "radix_topk",
            |check, on| {
                let (values, indices, input) = (on.out(values), on.out(indices), on.at(input));
                check_topk(check, [&values.raw, &indices.raw, &input.raw], options, ROOM).map(drop)
            },
            |on| reference::radix_topk(&mut on.out(values), &mut on.out(indices), &on.at(input), options),
        );
    };
    let plain = TopKOptions::default();
    let (values, indices, input) = (Of(F32, &[3, 2], 0), Of(I32, &[3, 2], 0), Of(F32, &[3, 8], 0));
    topk("input: its dtype is f64", values, indices, Of(F64, input.1, 0), &plain);
    topk("values: its dtype is f64", Of(F64, values.1, 0), indices, input, &plain);
    topk("indices: its dtype is f32", values, Of(F32, indices.1, 0), input, &plain);
    topk("input: it starts at", values, indices, Of(F32, input.1, 4), &plain);
    let small = TopKOptions { tie_break: TieBreak::Small, ..plain };
    let (wide, places) = (Of(F32, &[1, 2049], 0), Of(I32, &[1, 2049], 0));
    topk("k is 2049", wide, places, Of(F32, &[1, 4096], 0), &small);

    let rows = RowIndices::new([8, 5, 8]).unwrap();
    let transforms = |words: &str,
                      output: Of<'_>,
                      input: Of<'_>,
                      other: Of<'_>,
                      paged,
                      options: &TopKOptions| {
        let op = ["radix_topk_ragged_transform", "radix_topk_page_table_transform"][usize::from(paged)];
        refused_alike(
            words,
            op,
            |check, on| {
                let (output, input, other) = (on.out(output), on.at(input), on.at(other));
                let tensors = [&output.raw, &input.raw, &other.raw];
                if paged {
                    check_page_table_transform(check, tensors, &rows, options, ROOM).map(drop)
                } else {
                    check_ragged_transform(check, tensors, &rows, options, ROOM).map(drop)
                }
            },
            |on| {
                let (mut output, input, other) = (on.out(output), on.at(input), on.at(other));
                if paged {
                    reference::radix_topk_page_table_transform(&mut output, &input, &other, &rows, options)
                } else {
                    reference::radix_topk_ragged_transform(&mut output, &input, &other, &rows, options)
                }
            },
        );
    };
    for (paged, other) in [(true, Of(I32, &[3, 8], 0)), (false, Of(I32, &[3], 0))] {
        transforms("input: its dtype is f64", indices, Of(F64, input.1, 0), other, paged, &plain);
        transforms("its dtype is f32", indices, input, Of(F32, other.1, 0), paged, &plain);
        transforms("its dtype is i64", Of(DType::I64, indices.1, 0), input, other, paged, &plain);
        let sorted = TopKOptions { sorted: true, ..plain };
        transforms("the transforms give no values", indices, input, other, paged, &sorted);
    }
}

#[test]
fn packing_of_segments() {
    let segments = PackedIndices::from_lens([4, 5]).unwrap();
    for (words, y, x) in [
        ("x: its dtype is i32", Of(U8, &[2], 0), Of(I32, &[9], 0)),
        ("x: its shape", Of(U8, &[2], 0), Of(U8, &[8], 0)),
        ("y: its dtype is f32", Of(F32, &[2], 0), Of(U8, &[9], 0)),
    ] {
        refused_alike(
            words,
            "segment_packbits",
            |check, on| check_segment_packbits(check, &on.out(y).raw, &on.at(x).raw, &segments),
            |on| reference::segment_packbits(&mut on.out(y), &on.at(x), &segments, BitOrder::Big),
        );
    }
}
