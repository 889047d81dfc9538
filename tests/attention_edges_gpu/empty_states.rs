//! States of nothing, (0, −∞): what each attention gives where a query sees no
//! key, and what merges make of it.

use crate::common::{
    Gpu, Mirrored, Number, Rng, at_hand,
    attention::capture,
    ops::{Batch, Op},
};
use flashinfer_rs::{
    DType, PageIndices, PageTable, TensorMut,
    attention::{
        AttentionSpec, Backend, BatchAttention, BatchDecode, BatchPrefill, Heads, Mask, PagedBatch,
        PlanOptions, PrefillRunOptions, RunOptions, SinglePrefill, Workspace,
    },
    cascade::{self, State, StateMut},
    gpu::TensorExt,
    indices::{MaskIndices, MaskTable, RaggedIndices, RaggedTable},
    kv::{KvLayout, PagedKv},
    reference,
};
use half::{bf16, f16};

const HEADS: Heads = Heads::new(4, 2);

/// Requests without keys, among others, in each operation. One long enough to
/// be divided among blocks.
#[test]
fn requests_without_keys() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut wrong = Vec::new();
    for op in Op::all(&gpu) {
        for requests in [
            &[(1, 0)][..],
            &[(3, 0), (2, 0)],
            &[(2, 0), (1, 5), (40, 0), (3, 130), (1, 0), (0, 0), (5, 1)],
            &[(1, 0), (1, 20_000), (1, 0)],
        ] {
            let batch = Batch::random(rng, op, requests);
            let (results, (out, lse)) = (batch.run(&gpu), batch.expected());
            if !results.is_close((&out, &lse)) {
                let least = results.lse.iter().copied().fold(f32::INFINITY, f32::min);
                wrong.push(format!("{op:?} {requests:?}: the least LSE is {least}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Rows that a custom mask hides every key from; also those of which a window
/// leaves only hidden keys, where a module is at hand.
#[test]
fn rows_whose_keys_are_all_hidden() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for window in [None, Some(9)] {
        let mut spec = AttentionSpec::new(DType::BF16, 128).with_backend(Backend::Fa2);
        spec.window_left = window;
        let prefill = match BatchPrefill::new(&gpu.stream, &spec, HEADS) {
            Ok(prefill) => prefill,
            Err(error) if window.is_some() => {
                crate::common::say(&format!("windows skipped: {error}"));
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        let shapes = [(5, 3), (70, 200), (1, 0), (4, 1000), (9, 9)];
        let indices = MaskIndices::new(shapes).unwrap();
        let mut bits = Vec::new();
        for (queries, keys) in shapes {
            for query in 0..queries {
                // Every third row sees nothing, others their first or last key.
                bits.extend((0..keys).map(|key| match query % 3 {
                    0 => false,
                    1 => key == 0,
                    _ => key + 1 == keys,
                }));
            }
        }
        let packed = indices.pack(&bits).unwrap();
        let queries = RaggedIndices::from_lens(shapes.map(|shape| shape.0)).unwrap();
        let keys = RaggedIndices::from_lens(shapes.map(|shape| shape.1)).unwrap();
        let (n, m) = (queries.total(), keys.total());
        let q = Mirrored::<bf16>::random(&gpu, rng, &[n, 4, 128]);
        let [k, v] = [0; 2].map(|_| Mirrored::<bf16>::random(&gpu, rng, &[m, 2, 128]));
        let (mut want, mut want_lse) = (vec![0.0f64; n * 4 * 128], vec![0.0f64; n * 4]);
        reference::batch_prefill_ragged(
            &spec,
            &q.view(),
            [&k.view(), &v.view()],
            &queries,
            &keys,
            &mut TensorMut::from_slice(&mut want, &[n, 4, 128]).unwrap(),
            Some(&mut TensorMut::from_slice(&mut want_lse, &[n, 4]).unwrap()),
            reference::HostMask::Custom(&indices, &packed),
            &RunOptions::default(),
        )
        .unwrap();
        assert!(want_lse.contains(&f64::NEG_INFINITY));
        let device_bits = gpu.cuda.clone_htod(&packed).unwrap();
        let device_bits = device_bits.tensor(&gpu.cuda, &[packed.len()]).unwrap();
        let table = MaskTable::new(&gpu.stream, indices.clone()).unwrap();
        let (queries_table, keys_table) = (
            RaggedTable::new(&gpu.stream, queries.clone()).unwrap(),
            RaggedTable::new(&gpu.stream, keys.clone()).unwrap(),
        );
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for rows in [None, Some(n + 3)] {
            let total = rows.unwrap_or(n);
            let mut host = q.host.clone();
            host.resize(total * 4 * 128, bf16::NAN);
            let q = Mirrored::new(&gpu, &[total, 4, 128], host);
            let mut options =
                PlanOptions::default().with_mask(Mask::Custom { indices: &table, bits: device_bits.view() });
            options.graph = rows;
            let plan = prefill.plan_ragged(&mut workspace, &queries_table, &keys_table, &options).unwrap();
            let mut out = Mirrored::<bf16>::poisoned(&gpu, &[total, 4, 128]);
            let mut lse = Mirrored::<f32>::poisoned(&gpu, &[total, 4]);
            plan.run_with(
                &q.device_view(),
                [&k.device_view(), &v.device_view()],
                &mut out.device_view_mut(),
                Some(&mut lse.device_view_mut()),
                &RunOptions::default(),
            )
            .unwrap();
            let part = out.view().narrow(0, 0, n).unwrap();
            out.assert_part_close("hidden rows", &part, &want, bf16::BOUND);
            crate::common::attention::assert_lse("hidden rows", &lse, &want_lse);
        }
        // Each request alone.
        let single = match SinglePrefill::new(&gpu.stream, &spec) {
            Ok(single) => single,
            Err(error) => {
                crate::common::say(&format!("one request skipped: {error}"));
                continue;
            }
        };
        for (request, shape) in shapes.into_iter().enumerate() {
            let indices = MaskIndices::new([shape]).unwrap();
            let first: usize = shapes[..request].iter().map(|shape| shape.0 * shape.1).sum();
            let packed = indices.pack(&bits[first..first + shape.0 * shape.1]).unwrap();
            let device_bits = gpu.cuda.clone_htod(&[&packed[..], &[0]].concat()).unwrap();
            let device_bits = device_bits.tensor(&gpu.cuda, &[packed.len() + 1]).unwrap();
            let table = MaskTable::new(&gpu.stream, indices).unwrap();
            let (row, key) = (queries.indptr()[request] as usize, keys.indptr()[request] as usize);
            let mut out = Mirrored::<bf16>::poisoned(&gpu, &[shape.0, 4, 128]);
            let mut lse = Mirrored::<f32>::poisoned(&gpu, &[shape.0, 4]);
            single
                .run_with(
                    &mut workspace,
                    &q.device_view().narrow(0, row, shape.0).unwrap(),
                    [
                        &k.device_view().narrow(0, key, shape.1).unwrap(),
                        &v.device_view().narrow(0, key, shape.1).unwrap(),
                    ],
                    &mut out.device_view_mut(),
                    Some(&mut lse.device_view_mut()),
                    &PrefillRunOptions::new(
                        Mask::Custom { indices: &table, bits: device_bits.view() },
                        RunOptions::default(),
                    ),
                )
                .unwrap();
            let rows = row * 4..(row + shape.0) * 4;
            out.assert_close("one request", &want[rows.start * 128..rows.end * 128], bf16::BOUND);
            crate::common::attention::assert_lse("one request", &lse, &want_lse[rows]);
        }
    }
}

/// A graph that was captured with keys everywhere is right for requests that
/// have none when it is replayed.
#[test]
fn graphs_of_requests_that_lose_their_keys() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    let spec = AttentionSpec::new(DType::F16, 128);
    let table_of = |lens: [usize; 4]| {
        let pages: Vec<i32> = (0..64).collect();
        let requests =
            lens.iter().enumerate().map(|(at, &len)| (&pages[at * 16..at * 16 + len.div_ceil(16)], len));
        PageIndices::from_requests(64, 16, requests).unwrap()
    };
    let [k, v] = [0; 2].map(|_| Mirrored::<f16>::random(&gpu, rng, &[64, 16, 2, 128]));
    let q = Mirrored::<f16>::random(&gpu, rng, &[4, 4, 128]);
    let kv_host = PagedKv::new(k.view(), v.view(), KvLayout::Nhd);
    let (full, empty) = ([20, 200, 1, 40], [20, 0, 1, 0]);
    let verify = |what: &str, lens: [usize; 4], out: &Mirrored<f16>, lse: &Mirrored<f32>| {
        let (mut want, mut want_lse) = (vec![0.0f64; 4 * 4 * 128], vec![0.0f64; 16]);
        reference::batch_decode(
            &spec,
            &q.view(),
            &kv_host,
            &table_of(lens),
            &mut TensorMut::from_slice(&mut want, &[4, 4, 128]).unwrap(),
            Some(&mut TensorMut::from_slice(&mut want_lse, &[4, 4]).unwrap()),
            &RunOptions::default(),
        )
        .unwrap();
        out.assert_close(what, &want, f16::BOUND);
        crate::common::attention::assert_lse(what, lse, &want_lse);
    };
    // What is captured, by kind of plan.
    for kind in ["CUDA cores", "tensor cores", "prefill", "prefill, fa2", "mixed"] {
        let mut table = PageTable::with_capacity(&gpu.stream, table_of(full), 4, 64).unwrap();
        let rows = RaggedTable::new(&gpu.stream, RaggedIndices::from_lens([1; 4]).unwrap()).unwrap();
        let mut workspace =
            Workspace::with_sizes(&gpu.stream, 320 << 20, Workspace::DEFAULT_INT_BYTES).unwrap();
        let mut out = Mirrored::<f16>::poisoned(&gpu, &[4, 4, 128]);
        let mut lse = Mirrored::<f32>::poisoned(&gpu, &[4, 4]);
        let mut graph = None;
        for lens in [full, empty, full] {
            table.update(table_of(lens)).unwrap();
            let backend = match kind {
                "CUDA cores" => Backend::CudaCores,
                "prefill" | "mixed" => Backend::Auto,
                _ => Backend::Fa2,
            };
            let spec = spec.with_backend(backend);
            let (q, k, v) = (q.device_view(), k.device_view(), v.device_view());
            let kv = PagedKv::new(k, v, KvLayout::Nhd);
            let options = RunOptions::default();
            macro_rules! take {
                ($plan:expr) => {{
                    let plan = $plan.unwrap();
                    if graph.is_none() {
                        let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
                        let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
                        let (captured, run) =
                            capture(&gpu, || plan.run_with(&q, &kv, &mut out, Some(&mut lse), &options));
                        run.unwrap();
                        graph = Some((captured.unwrap(), plan.replay_key().ok()));
                    }
                    let (graph, key) = graph.as_ref().unwrap();
                    assert_eq!(&plan.replay_key().ok(), key, "{kind}");
                    graph.launch().unwrap();
                    gpu.synchronize();
                }};
            }
            if kind.ends_with("cores") {
                let decode = BatchDecode::new(&gpu.stream, &spec, HEADS);
                let Some(decode) = at_hand(&gpu, decode) else { continue };
                take!(decode.plan(
                    &mut workspace,
                    &table,
                    &PlanOptions::default().with_graph(table.host().batch_size())
                ));
            } else if kind == "mixed" {
                let mixed = BatchAttention::new(&gpu.stream, &spec, HEADS);
                let Some(mixed) = at_hand(&gpu, mixed) else { continue };
                let options = PlanOptions::default().with_graph(4);
                take!(mixed.plan(&mut workspace, PagedBatch::new(&rows, &table), &options));
            } else {
                let prefill = BatchPrefill::new(&gpu.stream, &spec, HEADS);
                let Some(prefill) = at_hand(&gpu, prefill) else { continue };
                let options = PlanOptions::default().with_graph(4);
                take!(prefill.plan_paged(&mut workspace, PagedBatch::new(&rows, &table), &options));
            }
            verify(kind, lens, &out, &lse);
        }
    }
}

/// A state on the device: outputs of one number, and its LSE.
fn state(gpu: &Gpu, rows: &[(f32, f32)], head_dim: usize) -> (Mirrored<f16>, Mirrored<f32>) {
    let v = rows.iter().flat_map(|row| vec![f16::from_f32(row.0); head_dim]).collect();
    let s = rows.iter().map(|row| row.1).collect();
    (Mirrored::new(gpu, &[rows.len(), 1, head_dim], v), Mirrored::new(gpu, &[rows.len(), 1], s))
}

/// Merging with nothing changes nothing, however small the other's LSE is, and
/// nothing with nothing is nothing.
#[test]
fn merges_with_nothing() {
    let Some(gpu) = Gpu::start() else { return };
    const NOTHING: (f32, f32) = (0.0, f32::NEG_INFINITY);
    let states =
        [NOTHING, (1.0, -60000.0), (2.0, -50000.0), (3.0, 0.0), (-1.5, 3e4), (4.0, -1e6), (5.0, -3e38)];
    // An output that nobody should look at.
    let odd = (f32::NAN, f32::NEG_INFINITY);
    for head_dim in [64, 96, 128, 512] {
        for nothing in [NOTHING, odd] {
            let a: Vec<_> = states.iter().flat_map(|&s| [s, nothing]).collect();
            let b: Vec<_> = states.iter().flat_map(|&s| [nothing, s]).collect();
            let want: Vec<_> = states.iter().flat_map(|&s| [s, s]).collect();
            let check = |what: &str, v: &Mirrored<f16>, s: &Mirrored<f32>| {
                let (v, s) = (v.download(), s.download());
                for (row, want) in want.iter().enumerate() {
                    let got = (v[row * head_dim].to_f32(), s[row]);
                    assert_eq!(got, *want, "{what} of {:?} with {:?}", a[row], b[row]);
                    assert!(v[row * head_dim..(row + 1) * head_dim].iter().all(|v| v.to_f32() == want.0));
                }
            };
            let ((a_v, a_s), (b_v, b_s)) = (state(&gpu, &a, head_dim), state(&gpu, &b, head_dim));
            let poison = vec![(f32::NAN, f32::NAN); a.len()];
            let (mut v, mut s) = state(&gpu, &poison, head_dim);
            cascade::merge_state(
                &gpu.stream,
                &mut StateMut::new(v.device_view_mut(), s.device_view_mut()),
                &State::new(a_v.device_view(), a_s.device_view()),
                &State::new(b_v.device_view(), b_s.device_view()),
            )
            .unwrap();
            check("merge_state", &v, &s);

            let (mut v, mut s) = state(&gpu, &a, head_dim);
            cascade::merge_state_in_place(
                &gpu.stream,
                &mut StateMut::new(v.device_view_mut(), s.device_view_mut()),
                &State::new(b_v.device_view(), b_s.device_view()),
                None,
            )
            .unwrap();
            check("merge_state_in_place", &v, &s);

            for count in [2, 3, 40] {
                // The pair among others that are nothing.
                let all = |at: usize, row: usize| match at {
                    0 => a[row],
                    1 => b[row],
                    _ => nothing,
                };
                let all: Vec<_> =
                    (0..a.len()).flat_map(|row| (0..count).map(move |at| all(at, row))).collect();
                let (v, s) = state(&gpu, &all, head_dim);
                let v = Mirrored::new(&gpu, &[a.len(), count, 1, head_dim], v.host);
                let s = Mirrored::new(&gpu, &[a.len(), count, 1], s.host);
                let (mut merged_v, mut merged_s) = state(&gpu, &poison, head_dim);
                cascade::merge_states(
                    &gpu.stream,
                    &mut StateMut::new(merged_v.device_view_mut(), merged_s.device_view_mut()),
                    &State::new(v.device_view(), s.device_view()),
                )
                .unwrap();
                check("merge_states", &merged_v, &merged_s);
            }
        }
    }
}
