//! What one request of a batch holds does not show in another's results, even
//! if it is NaN: a neighbour of NaN, of infinity and of zeros leaves the same
//! bits.
#![cfg(feature = "cudarc")]

mod common;

use common::{
    Gpu, Mirrored, Number, Rng, assert_same_bits,
    gdn::{Case, D, Problem, Results, watched},
    ops::{Batch, Op},
    say,
};
use flashinfer_rs::{
    FlashInferError,
    cascade::{self, State, StateMut},
    gdn::GdnWorkspace,
    gemm::{GemmBackend, SegmentGemm, SegmentGemmInput},
    indices::{SegmentIndices, SegmentTable},
    topk::{self, RowStates, TopKOptions},
};
use half::{bf16, f16};

const ODD: [f64; 3] = [0.0, f64::NAN, f64::INFINITY];

/// Every attention, with the clean request before and behind its neighbour.
#[test]
fn attention() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut wrong = Vec::new();
    for op in Op::all(&gpu) {
        for requests in [
            [(1, 1), (1, 200)],
            [(5, 37), (7, 61)],
            [(130, 300), (140, 290)],
            [(1, 9000), (1, 30)],
            [(60, 5000), (3, 700)],
        ] {
            let random = Batch::random(rng, op, &requests);
            // Long ones take the CPU a while; of those, bits are compared.
            let expected = (requests[0].1 < 1000).then(|| random.expected());
            for odd in [0, 1] {
                let (mut batch, clean) = (random.clone(), 1 - odd);
                let mut first: Option<common::ops::Results> = None;
                for number in ODD {
                    batch.fill(odd, [number; 3]);
                    let results = batch.part(&batch.run(&gpu), clean);
                    let what = format!("{op:?} {requests:?}: request {clean} beside {number}");
                    let finite = results.out.iter().all(|o| o.is_finite());
                    let close = expected.as_ref().is_none_or(|(out, lse)| {
                        results.is_close((
                            &part(out, &batch, clean, op.widths()[1]),
                            &part(lse, &batch, clean, 1),
                        ))
                    });
                    let same = first.as_ref().is_none_or(|first| {
                        let bits = |results: &common::ops::Results| -> Vec<u32> {
                            let out = results.out.iter().map(|o| o.bits());
                            out.chain(results.lse.iter().map(|s| s.bits())).collect()
                        };
                        bits(first) == bits(&results)
                    });
                    if !(finite && close && same) {
                        wrong.push(format!("{what}: finite {finite}, right {close}, the same {same}"));
                    }
                    first.get_or_insert(results);
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A request's part of what is expected of a batch.
fn part(all: &[f64], batch: &Batch, request: usize, width: usize) -> Vec<f64> {
    let queries: Vec<_> = batch.requests.iter().map(|request| request.0).collect();
    let per_query = all.len() / queries.iter().sum::<usize>();
    assert!(per_query.is_multiple_of(width));
    let first: usize = queries[..request].iter().sum();
    all[first * per_query..(first + queries[request]) * per_query].to_vec()
}

/// Products of segments.
#[test]
fn segments() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for backend in [GemmBackend::Sm80, GemmBackend::Sm90] {
        let mut gemm = match SegmentGemm::new(&gpu.stream, 2, backend) {
            Ok(gemm) => gemm,
            Err(error @ FlashInferError::Unsupported { .. }) => {
                say(&format!("{backend:?} skipped: {error}"));
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        for lens in [[1, 1], [5, 70], [200, 3]] {
            for odd in [0, 1] {
                let (rows, k, n) = (lens[0] + lens[1], 64, 128);
                let x = Mirrored::<bf16>::random(&gpu, rng, &[rows, k]);
                let weights = Mirrored::<bf16>::random(&gpu, rng, &[2, n, k]);
                let table = SegmentTable::new(&gpu.stream, SegmentIndices::from_lens(lens).unwrap()).unwrap();
                let split = |segment: usize| if segment == 0 { 0..lens[0] } else { lens[0]..rows };
                let mut first = None;
                for number in ODD {
                    let (mut x_host, mut w_host) = (x.host.clone(), weights.host.clone());
                    let own = split(odd);
                    x_host[own.start * k..own.end * k].fill(bf16::from_f64(number));
                    w_host[odd * n * k..(odd + 1) * n * k].fill(bf16::from_f64(number));
                    let (x, weights) =
                        (Mirrored::new(&gpu, &[rows, k], x_host), Mirrored::new(&gpu, &[2, n, k], w_host));
                    let mut out = Mirrored::<bf16>::poisoned(&gpu, &[rows, n]);
                    let (x_view, w_view) = (x.device_view(), weights.device_view());
                    let input = SegmentGemmInput::column_major(x_view, w_view);
                    gemm.run(&mut out.device_view_mut(), &input, &table).unwrap();
                    let clean = split(1 - odd);
                    let out = out.download()[clean.start * n..clean.end * n].to_vec();
                    assert!(out.iter().all(|o| o.to_f64().is_finite()), "{backend:?} {lens:?} {number}");
                    let first = first.get_or_insert_with(|| out.clone());
                    assert_same_bits(&format!("{backend:?} {lens:?} beside {number}"), &out, first);
                }
            }
        }
    }
}

/// Merges, of rows and of heads.
#[test]
fn merges() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for (rows, heads, count) in [(2, 1, 2), (2, 3, 40), (5, 2, 3)] {
        let v = Mirrored::<f16>::random(&gpu, rng, &[rows, count, heads, 128]);
        let s = Mirrored::<f32>::random(&gpu, rng, &[rows, count, heads]);
        let mut first: Option<[Vec<u32>; 2]> = None;
        for number in ODD {
            let (mut v, mut s) = (v.host.clone(), s.host.clone());
            // All of row 1.
            v[count * heads * 128..2 * count * heads * 128].fill(f16::from_f64(number));
            s[count * heads..2 * count * heads].fill(number as f32);
            let v = Mirrored::new(&gpu, &[rows, count, heads, 128], v);
            let s = Mirrored::new(&gpu, &[rows, count, heads], s);
            let mut merged_v = Mirrored::<f16>::poisoned(&gpu, &[rows, heads, 128]);
            let mut merged_s = Mirrored::<f32>::poisoned(&gpu, &[rows, heads]);
            cascade::merge_states(
                &gpu.stream,
                &mut StateMut::new(merged_v.device_view_mut(), merged_s.device_view_mut()),
                &State::new(v.device_view(), s.device_view()),
            )
            .unwrap();
            let clean = |at: usize, width: usize| at / (heads * width) != 1;
            let bits = [merged_v.download().iter().map(|v| v.bits()).enumerate()]
                .map(|all| all.filter(|(at, _)| clean(*at, 128)).map(|(_, bits)| bits).collect::<Vec<_>>());
            let [v_bits] = bits;
            let sums = merged_s.download();
            let s_bits: Vec<_> =
                sums.iter().enumerate().filter(|(at, _)| clean(*at, 1)).map(|(_, s)| s.bits()).collect();
            let all = [v_bits, s_bits];
            assert_eq!(&all, first.get_or_insert_with(|| all.clone()), "beside {number}");
        }
    }
}

/// Selections from rows.
#[test]
fn selections() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut states = RowStates::new(&gpu.stream).unwrap();
    for (width, k) in [(300, 8), (5000, 256), (200_000, 100)] {
        let input = Mirrored::<f32>::random(&gpu, rng, &[2, width]);
        let mut first: Option<Vec<u32>> = None;
        for number in ODD {
            let mut host = input.host.clone();
            host[width..].fill(number as f32);
            let input = Mirrored::new(&gpu, &[2, width], host);
            let mut values = Mirrored::<f32>::poisoned(&gpu, &[2, k]);
            let mut places = gpu.cuda.alloc_zeros::<i32>(2 * k).unwrap();
            {
                use flashinfer_rs::gpu::TensorExtMut;
                topk::radix_topk(
                    &mut states,
                    &mut values.device_view_mut(),
                    &mut places.tensor_mut(&gpu.cuda, &[2, k]).unwrap().view_mut(),
                    &input.device_view(),
                    &TopKOptions::default(),
                )
                .unwrap();
            }
            let mut bits: Vec<u32> = values.download()[..k].iter().map(|value| value.bits()).collect();
            bits.sort_unstable();
            assert_eq!(&bits, first.get_or_insert_with(|| bits.clone()), "{width}: beside {number}");
        }
    }
}

/// Replaces the tokens of a range.
fn fill(problem: &mut Problem<bf16>, gpu: &Gpu, tokens: std::ops::Range<usize>, number: f64) {
    for tensor in [&mut problem.q, &mut problem.k, &mut problem.v] {
        let shape = tensor.shape();
        let row = shape[1] * shape[2];
        let mut host = tensor.host.clone();
        host[tokens.start * row..tokens.end * row].fill(bf16::from_f64(number));
        *tensor = Mirrored::new(gpu, &shape, host);
    }
}

/// How many results of the first sequence are NaN, if the second is.
fn gdn_beside_nan(gpu: &Gpu, rng: &mut Rng, case: &Case, pad: usize) -> usize {
    let mut problem = Problem::<bf16>::random(gpu, rng, case);
    let first = case.lens[0];
    fill(&mut problem, gpu, first..case.tokens(), f64::NAN);
    // Tokens that change nothing: no key, no value, no update, nothing forgotten.
    let padding = first - pad..first;
    fill(&mut problem, gpu, padding.clone(), 0.0);
    let heads = case.state_heads();
    for (gate, neutral) in [(&mut problem.alpha, 1.0), (&mut problem.beta, 0.0)] {
        let Some(tensor) = gate else { continue };
        let mut host = tensor.host.clone();
        host[padding.start * heads..padding.end * heads].fill(neutral);
        host[first * heads..].fill(f32::NAN);
        *tensor = Mirrored::new(gpu, &tensor.shape(), host);
    }
    let workspace = GdnWorkspace::new(&gpu.stream).unwrap();
    let mut results = Results::poisoned(gpu, case);
    problem.run(&workspace, &case.table(gpu), problem.start(), &mut results).unwrap();
    let (output, state) = (results.output.download(), results.state.download());
    // The same sequence alone, without what fills its last tile.
    let alone_case = Case { lens: vec![first - pad], ..case.clone() };
    let mut alone = Problem::<bf16>::random(gpu, rng, &alone_case);
    let cut = |tensor: &Mirrored<bf16>| {
        let mut shape = tensor.shape();
        shape[0] = first - pad;
        let len: usize = shape.iter().product();
        Mirrored::new(gpu, &shape, tensor.host[..len].to_vec())
    };
    (alone.q, alone.k, alone.v) = (cut(&problem.q), cut(&problem.k), cut(&problem.v));
    let gate = |tensor: &Option<Mirrored<f32>>| {
        let host = |tensor: &Mirrored<f32>| tensor.host[..(first - pad) * heads].to_vec();
        tensor.as_ref().map(|tensor| Mirrored::new(gpu, &[first - pad, heads], host(tensor)))
    };
    (alone.alpha, alone.beta) = (gate(&problem.alpha), gate(&problem.beta));
    alone.state = problem
        .state
        .as_ref()
        .map(|state| Mirrored::new(gpu, &[1, heads, D, D], state.host[..heads * D * D].to_vec()));
    let mut expected = Results::poisoned(gpu, &alone_case);
    alone.run(&workspace, &alone_case.table(gpu), alone.start(), &mut expected).unwrap();
    let own = &output[..(first - pad) * heads * D];
    let (want_out, want_state) = (expected.output.download(), expected.state.download());
    // NaN is not near.
    let near = |a: f64, b: f64| (a - b).abs() <= 2e-2 * b.abs().max(1.0);
    let outputs = own.iter().zip(&want_out).filter(|(a, b)| !near(a.to_f64(), b.to_f64())).count();
    let states = state[..heads * D * D].iter().zip(&want_state);
    outputs + states.filter(|(a, b)| !near(f64::from(**a), f64::from(**b))).count()
}

/// Sequences of whole tiles of 64 tokens keep to themselves, and a sequence is
/// made one by tokens that change nothing, as `gdn` says. Others do not, which
/// is the limit that it states.
#[test]
fn gdn_sequences() {
    watched(|gpu, rng| {
        for bits in 0..8 {
            let [alpha, beta, state] = [1, 2, 4].map(|bit| bits & bit != 0);
            let case = |lens: &[usize]| Case { alpha, beta, state, ..Case::new(lens, [2, 2, 4]) };
            assert_eq!(gdn_beside_nan(gpu, rng, &case(&[64, 70]), 0), 0, "{bits}");
            assert_eq!(gdn_beside_nan(gpu, rng, &case(&[192, 1]), 0), 0, "{bits}");
            for pad in [1, 27, 63] {
                assert_eq!(gdn_beside_nan(gpu, rng, &case(&[64, 70]), pad), 0, "{bits}, {pad} tokens");
                assert_eq!(gdn_beside_nan(gpu, rng, &case(&[192, 70]), pad), 0, "{bits}, {pad} tokens");
            }
            let spread = gdn_beside_nan(gpu, rng, &case(&[100, 70]), 0);
            eprintln!("alpha {alpha}, beta {beta}, state {state}: {spread} results beside NaN");
            assert!(spread > 0, "it keeps to itself: say so in `gdn` and docs/soundness.md");
        }
    });
}
