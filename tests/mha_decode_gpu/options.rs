//! What a spec and a run ask for.

use crate::*;

/// The output has the same bits with and without LSE, and with and without
/// programmatic dependent launch.
#[test]
fn lse_and_pdl_change_nothing() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for lens in [vec![1, 16, 33, 0], vec![6000, 2]] {
        let case = Case { lens, ..Case::default() };
        let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, case);
        let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
        let (want, _) = problem.check_run(&gpu, &plan);
        let dependent = gpu.compute_capability().0 >= 9;
        for enable_pdl in [Some(false), dependent.then_some(true)] {
            let (mut out, _) = problem.outputs(&gpu);
            let mut options = problem.case.options();
            options.enable_pdl = enable_pdl;
            problem.run(&plan, &mut out, None, &options);
            assert_same_bits("without LSE", &out.download(), &want);
        }
    }
}

#[test]
fn sm_scale() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for sm_scale in [0.0, 0.01, 0.5, -0.1] {
        let case = Case { sm_scale: Some(sm_scale), ..Case::default() };
        let Some(decode) = decode_of::<bf16, bf16>(&gpu, &case) else { return };
        Problem::<bf16, bf16>::new(&gpu, rng, case).check(&gpu, &decode, &mut workspace);
    }
    let problem = Problem::<bf16, bf16>::new(&gpu, rng, Case::default());
    let Some(decode) = decode_of::<bf16, bf16>(&gpu, &problem.case) else { return };
    let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
    let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
    let (mut out, _) = problem.outputs(&gpu);
    for sm_scale in [f64::NAN, f64::INFINITY] {
        let (q, cache, options) =
            (problem.q.device_view(), problem.cache.device_view(), RunOptions::with_sm_scale(sm_scale));
        let call = plan.run_with(&q, &cache, &mut out.device_view_mut(), None, &options);
        refused(call, "sm_scale");
    }
    out.assert_untouched();
}

/// Queries as the first heads of a joined query-key-value projection.
#[test]
fn strided_queries() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let case = Case::default();
    let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let [batch, heads, head_dim] = case.q_shape();
    let table = random_table(rng, case.page_size, &case.lens);
    let cache = Cache::random(&gpu, rng, case.cache_shape(table.num_pages()), &table);
    let q = Mirrored::<f16>::random(&gpu, rng, &[batch, heads + 4, head_dim]).narrowed(1, 0, heads);
    Problem::<f16, f16>::solve(case, table, q, cache, [None, None]).check(&gpu, &decode, &mut workspace);
}

/// Requests that begin with the same pages.
#[test]
fn shared_pages() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let case = Case { lens: vec![40, 50, 32], ..Case::default() };
    let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
    let requests = [(&[5, 2, 0][..], 40), (&[5, 2, 7, 1][..], 50), (&[5, 2][..], 32)];
    let table = PageIndices::from_requests(9, 16, requests).unwrap();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    Problem::<f16, f16>::with_table(&gpu, rng, case, table).check(&gpu, &decode, &mut workspace);
}

/// Sliding windows: shorter and longer than requests, at and beside page ends,
/// and in a request that is split.
#[test]
fn sliding_window() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for window_left in [0, 1, 15, 16, 17, 76, 1000] {
        for lens in [Case::default().lens, vec![5000, 3]] {
            let case = Case { lens, window_left: Some(window_left), ..Case::default() };
            let Some(decode) = optional_decode_of::<bf16, bf16>(&gpu, &case) else { return };
            Problem::<bf16, bf16>::new(&gpu, rng, case).check(&gpu, &decode, &mut workspace);
        }
    }
}

/// Soft caps that bend the logits much and little.
#[test]
fn logits_soft_cap() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for soft_cap in [1.0, 5.0, 50.0] {
        for lens in [Case::default().lens, vec![5000, 3]] {
            let case = Case { lens, soft_cap: Some(soft_cap), sm_scale: Some(0.15), ..Case::default() };
            let Some(decode) = optional_decode_of::<bf16, bf16>(&gpu, &case) else { return };
            Problem::<bf16, bf16>::new(&gpu, rng, case).check(&gpu, &decode, &mut workspace);
        }
    }
}

/// Both, as Gemma has them.
#[test]
fn sliding_window_and_soft_cap() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for (window_left, soft_cap, lens) in [(15, 50.0, vec![1, 16, 17, 100, 0]), (1023, 30.0, vec![3000])] {
        let case = Case {
            lens,
            head_dim: 256,
            group: 2,
            window_left: Some(window_left),
            soft_cap: Some(soft_cap),
            ..Case::default()
        };
        let Some(decode) = optional_decode_of::<bf16, bf16>(&gpu, &case) else { return };
        Problem::<bf16, bf16>::new(&gpu, rng, case).check(&gpu, &decode, &mut workspace);
    }
}

/// No module of FlashInfer's wheels has ALiBi; one that is at hand is tested.
#[test]
fn alibi() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for backend in [Backend::CudaCores, Backend::Fa2] {
        for lens in [ragged(16), vec![5_000, 3]] {
            let case = Case { lens, alibi: true, backend, ..Case::default() };
            let Some(decode) = optional_decode_of::<f16, f16>(&gpu, &case) else { return };
            Problem::<f16, f16>::new(&gpu, rng, case).check(&gpu, &decode, &mut workspace);
        }
    }
}

/// Sinks, on the kernels that have them.
#[test]
fn attention_sinks() {
    let has_fa3 = has_fa3();
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for (lens, window_left) in [(ragged(16), None), (vec![6000, 1, 0, 300], Some(127)), (vec![9000], None)] {
        for backend in [Backend::Auto, Backend::Fa2, Backend::Fa3] {
            let case = Case {
                lens: lens.clone(),
                head_dim: 64,
                group: 8,
                sinks: true,
                window_left,
                backend,
                ..Case::default()
            };
            if backend == Backend::Fa3 && !has_fa3 {
                continue;
            }
            let Some(decode) = optional_decode_of::<bf16, bf16>(&gpu, &case) else { return };
            assert_ne!(decode.backend(), Backend::CudaCores);
            let splits = Problem::<bf16, bf16>::new(&gpu, rng, case).check(&gpu, &decode, &mut workspace);
            assert!(!splits || decode.backend() == Backend::Fa2);
        }
    }
    let spec = AttentionSpec::new(DType::BF16, 64).with_attention_sink().with_backend(Backend::CudaCores);
    let error = BatchDecode::new(&gpu.stream, &spec, Heads::new(8, 8)).unwrap_err();
    assert!(matches!(error, FlashInferError::Unsupported { .. }), "{error}");
}

fn e4m3_cache<T: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for (page_size, group, layout) in [(1, 1, KvLayout::Nhd), (16, 4, KvLayout::Hnd), (64, 8, KvLayout::Nhd)]
    {
        for lens in [ragged(page_size), vec![5000, 3]] {
            let plain = Case { lens, page_size, group, layout, joined: group == 4, ..Case::default() };
            for backend in [Backend::CudaCores, Backend::Fa2] {
                for kv_scales in [None, Some((0.6, 2.7))] {
                    let case = Case { backend, kv_scales, ..plain.clone() };
                    let Some(decode) = optional_decode_of::<T, F8E4M3>(&gpu, &case) else { return };
                    Problem::<T, F8E4M3>::new(&gpu, rng, case).check(&gpu, &decode, &mut workspace);
                }
            }
        }
    }
}

typed_tests! {
    f16_over_e4m3_cache: e4m3_cache::<f16>();
    bf16_over_e4m3_cache: e4m3_cache::<bf16>();
}

/// With parts of one size, and with undivided keys, a request has the same bits
/// alone and in any batch; as the planner divides keys, it has not.
#[test]
fn splits_that_do_not_depend_on_the_batch() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let case =
        |lens: Vec<usize>| Case { lens, kv_heads: 2, group: 4, backend: Backend::Fa2, ..Case::default() };
    let alone = case(vec![5000]);
    let Some(decode) = decode_of::<bf16, bf16>(&gpu, &alone) else { return };
    let one = Problem::<bf16, bf16>::new(&gpu, rng, alone.clone());
    let mut differs = 0;
    for split in [Split::fixed(7), Split::fixed(64), Split::disabled(), Split::default()] {
        let plain = PlanOptions::default().with_split(split);
        let (want, want_lse) = {
            let table = PageTable::new(&gpu.stream, one.table.clone()).unwrap();
            let plan = decode.plan(&mut workspace, &table, &plain).unwrap();
            assert_eq!(plan.splits_kv(), split != Split::disabled(), "{split:?}");
            one.check_run(&gpu, &plan)
        };
        for others in [vec![3], vec![70_000, 1, 0], vec![1000; 200]] {
            // The request stands last, over the same pages, which the others share.
            let rows = others.len() + 1;
            let pages = one.table.pages(0);
            let page_size = one.table.page_size();
            let long: Vec<i32> = pages.iter().copied().cycle().take(70_000 / page_size).collect();
            let of = |len: usize| (&long[..len.div_ceil(page_size)], len);
            let requests = others.iter().map(|&len| of(len)).chain([(pages, 5000)]);
            let table = PageIndices::from_requests(one.table.num_pages(), page_size, requests).unwrap();
            let table = PageTable::new(&gpu.stream, table).unwrap();
            let q = Mirrored::<bf16>::new(&gpu, &[rows, 8, 128], one.q.host.repeat(rows));
            let graph = (split.fixed_split_size.is_none()).then_some(rows);
            for graph in [None].into_iter().chain(graph.map(Some)) {
                let mut options = plain;
                options.graph = graph;
                let plan = decode.plan(&mut workspace, &table, &options).unwrap();
                let mut out = Mirrored::<bf16>::poisoned(&gpu, &[rows, 8, 128]);
                let mut lse = Mirrored::<f32>::poisoned(&gpu, &[rows, 8]);
                plan.run_with(
                    &q.device_view(),
                    &one.cache.device_view(),
                    &mut out.device_view_mut(),
                    Some(&mut lse.device_view_mut()),
                    &one.case.options(),
                )
                .unwrap();
                let (out, lse) = (out.download(), lse.download());
                let (out, lse) = (&out[(rows - 1) * 8 * 128..], &lse[(rows - 1) * 8..]);
                if split == Split::default() {
                    differs += usize::from(out.iter().zip(&want).any(|(a, b)| a.to_bits() != b.to_bits()));
                } else {
                    assert_same_bits(&format!("{split:?}, {rows} requests"), out, &want);
                    assert_same_bits(&format!("{split:?}, {rows} requests: LSE"), lse, &want_lse);
                }
            }
        }
    }
    assert!(differs > 0, "the planner's own way should have shown that this test can fail");
}
