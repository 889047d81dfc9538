//! Head dimensions, lengths, and how they are mixed.

use crate::*;

/// Group sizes, layouts, page sizes, causal and not.
fn shapes<T: Number>(head_dim: usize) {
    let groups = [1, 3, 4, 8].map(|group| Case { group, ..case().head_dim(head_dim) });
    let odd = [2, 5, 6, 7, 12, 17, 33, 130].map(|group| Case { group, ..case().head_dim(head_dim) });
    check_all::<T, T>(groups.into_iter().flat_map(stored).chain(odd).flat_map(both));
}

typed_tests! {
    f16_64: shapes::<f16>(64);
    f16_128: shapes::<f16>(128);
    f16_256: shapes::<f16>(256);
    bf16_64: shapes::<bf16>(64);
    bf16_128: shapes::<bf16>(128);
    bf16_256: shapes::<bf16>(256);
}

/// Queries and tokens at and beside the edges of tiles (16 and 128 rows, 64
/// and 128 tokens), of rows that one query fills in part.
#[test]
fn tiles() {
    let lens = [1, 15, 16, 17, 31, 32, 33, 42, 43, 63, 64, 65, 127, 128, 129, 130];
    let equal = lens.map(|len| (len, len)).to_vec();
    let more_tokens = lens.map(|len| (len, len + 62)).to_vec();
    let tokens = [1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257].map(|len| (1, len)).to_vec();
    for (requests, groups) in [(equal, [1, 3, 4]), (more_tokens, [1, 3, 4]), (tokens, [1, 16, 17])] {
        let cases = groups.map(|group| Case { requests: requests.clone(), kv_heads: 1, group, ..case() });
        check_all::<f16, f16>(cases.into_iter().flat_map(both));
    }
}

/// Chunks of prompts beside decodes, of lengths at and beside the ends of
/// pages, some divided among blocks.
#[test]
fn mixed() {
    let requests = vec![
        (1, 1500),
        (64, 200),
        (1, 1),
        (1, 64),
        (1, 65),
        (60, 400),
        (0, 0),
        (17, 18),
        (1, 63),
        (128, 128),
        (3, 700),
        (1, 129),
    ];
    for page_size in [1, 16, 64, 100] {
        for group in [1, 5] {
            let case = Case { requests: requests.clone(), page_size, group, ..case() };
            check_all::<bf16, bf16>(both(case));
        }
    }
}

/// Any mixture.
fn random_batches<T: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = None;
    for _ in 0..32 {
        let case = case().randomized(rng);
        let Some(attention) = attention_of::<T, T>(&gpu, &case) else { return };
        let workspace = workspace.get_or_insert_with(|| workspace_of(&gpu, &attention));
        check(&gpu, &attention, workspace, &Problem::<T, T>::new(&gpu, rng, case));
    }
}

typed_tests! {
    random_batches_f16: random_batches::<f16>();
    random_batches_bf16: random_batches::<bf16>();
}

/// A decode over 131072 tokens beside short prefills: all blocks share in it.
#[test]
fn long_context_beside_prefills() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let requests = vec![(1, 131_072), (40, 40), (16, 100), (1, 17), (128, 128)];
    for page_size in [16, 1] {
        let case = Case { requests: requests.clone(), page_size, ..case() };
        let Some(attention) = attention_of::<bf16, bf16>(&gpu, &case) else { return };
        let mut workspace = workspace_of(&gpu, &attention);
        let table = repeating_table(rng, 8192 / page_size, page_size, &case.key_lens());
        let kv = Kv::paged(&gpu, rng, &case, table);
        check(&gpu, &attention, &mut workspace, &Problem::<bf16, bf16>::with_kv(&gpu, rng, case, kv));
    }
}

/// Few queries and many tokens: tiles of both kinds are divided among blocks,
/// in more parts than a warp merges at once.
#[test]
fn parts_are_merged() {
    for (kv_heads, group, requests) in [
        (2, 4, vec![(40, 3000), (3, 5000)]),
        (1, 4, vec![(1, 20_000)]),
        (1, 3, vec![(43, 2000), (1, 1), (5, 2500), (0, 9), (2, 64)]),
        (8, 1, vec![(20, 2600), (1, 4000)]),
    ] {
        let case = Case { requests, kv_heads, group, ..case() };
        check_all::<f16, f16>(both(case.clone()));
        check_all::<bf16, bf16>(both(case));
    }
}

/// A decode step of 1024 requests.
#[test]
fn decode_of_1024_requests() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let requests = (0..1024).map(|at| (1, if at % 97 == 0 { 0 } else { 1 + rng.below(160) })).collect();
    let case = Case { requests, ..case() };
    let Some(attention) = attention_of::<bf16, bf16>(&gpu, &case) else { return };
    let mut workspace = workspace_of(&gpu, &attention);
    let table = repeating_table(rng, 512, case.page_size, &case.key_lens());
    let kv = Kv::paged(&gpu, rng, &case, table);
    check(&gpu, &attention, &mut workspace, &Problem::<bf16, bf16>::with_kv(&gpu, rng, case, kv));
}

/// As many work items as a plan has room for, and one more of either kind.
#[test]
fn as_much_work_as_a_plan_holds() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let one = Case { requests: vec![(1, 17)], causal: false, kv_heads: 8, group: 1, ..case() };
    let Some(attention) = attention_of::<f16, f16>(&gpu, &one) else { return };
    let mut workspace = workspace_of(&gpu, &attention);
    let problem = |rng: &mut Rng, request, count| {
        let case = Case { requests: vec![request; count], ..one.clone() };
        let table = repeating_table(rng, 40, case.page_size, &case.key_lens());
        let kv = Kv::paged(&gpu, rng, &case, table);
        Problem::<f16, f16>::with_kv(&gpu, rng, case, kv)
    };
    let small = Tables::new(&gpu, &problem(rng, (1, 17), 1));
    let blocks = plan(&attention, &mut workspace, &small, &one).unwrap().numbers()[1] as usize;
    let most = (MAX_WORKS - 2 * blocks) / one.kv_heads;
    check(&gpu, &attention, &mut workspace, &problem(rng, (1, 17), most));
    for queries in [1, 17] {
        let case = Case { requests: vec![(queries, 17); most + 1], ..one.clone() };
        let table = repeating_table(rng, 40, case.page_size, &case.key_lens());
        let table = PageTable::new(&gpu.stream, table).unwrap();
        let queries = RaggedTable::new(&gpu.stream, case.queries()).unwrap();
        let call = attention.plan(&mut workspace, PagedBatch::new(&queries, &table), &options_of(&case));
        refused(call, "queries");
    }
}

/// Requests without queries, and without tokens.
#[test]
fn empty_requests() {
    for requests in [
        vec![(3, 0), (5, 20), (130, 0), (1, 1), (0, 0), (0, 9), (1, 0)],
        vec![(0, 40), (0, 0), (1, 3000)],
        vec![(3, 0), (130, 0), (1, 0)],
    ] {
        for group in [1, 4] {
            check_all::<bf16, bf16>(both(Case { requests: requests.clone(), group, ..case() }));
        }
    }
}

/// Batches without queries, and without requests.
#[test]
fn nothing_to_do() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let Some(attention) = attention_of::<f16, f16>(&gpu, &case()) else { return };
    let mut workspace = workspace_of(&gpu, &attention);
    for requests in [vec![(0, 5), (0, 0)], vec![(0, 0)], vec![]] {
        let problem = Problem::<f16, f16>::new(&gpu, rng, Case { requests, ..case() });
        let (case, tables) = (&problem.case, Tables::new(&gpu, &problem));
        let empty = plan(&attention, &mut workspace, &tables, case).unwrap();
        assert!(empty.numbers().is_empty() && empty.replay_key().is_err());
        check_run(&gpu, &empty, &problem);
        // A run still looks at its arguments.
        let one = Mirrored::<f16>::random(&gpu, rng, &case.q_shape(1));
        let (mut out, _) = problem.outputs_of(&gpu, 1);
        let call = empty.run_with(
            &one.device_view(),
            &cache(&problem.kv).device_view(),
            &mut out.device_view_mut(),
            None,
            &case.options(),
        );
        refused(call, "q");
        // In a graph there may be rows for queries that are not there.
        let queries = &tables.queries;
        let idle = attention
            .plan(&mut workspace, PagedBatch::new(queries, pages(&tables)), &graph_options(case, 4))
            .unwrap();
        let q = Mirrored::<f16>::random(&gpu, rng, &case.q_shape(4));
        let (mut out, mut lse) = problem.outputs_of(&gpu, 4);
        idle.run_with(
            &q.device_view(),
            &cache(&problem.kv).device_view(),
            &mut out.device_view_mut(),
            Some(&mut lse.device_view_mut()),
            &case.options(),
        )
        .unwrap();
        out.assert_untouched();
        lse.assert_untouched();
    }
}

/// Without a mask there may be more queries than tokens; with one it is refused.
#[test]
fn more_queries_than_tokens() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let Some(attention) = attention_of::<f16, f16>(&gpu, &case()) else { return };
    let mut workspace = workspace_of(&gpu, &attention);
    for requests in [vec![(20, 5)], vec![(300, 100)], vec![(5, 9), (130, 129), (7, 7)]] {
        let [causal, unmasked] = both(Case { requests, ..case() });
        let problem = Problem::<f16, f16>::new(&gpu, rng, unmasked);
        let tables = Tables::new(&gpu, &problem);
        refused(plan(&attention, &mut workspace, &tables, &causal), "queries");
        check(&gpu, &attention, &mut workspace, &problem);
    }
}

/// Offsets in a cache are 32-bit: 2³² elements are read to the end, more are
/// refused.
#[test]
fn cache_of_32_bits() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    // The same two pages, once as a small cache and once as the first and the
    // last but one page of 8 GiB and a page.
    let case = Case { requests: vec![(20, 32)], kv_heads: 8, joined: true, ..case() };
    let Some(attention) = attention_of::<f16, f16>(&gpu, &case) else { return };
    let small = PageIndices::from_requests(2, 16, [(&[1, 0][..], 32)]).unwrap();
    let kv = Kv::paged(&gpu, rng, &case, small);
    let problem = Problem::<f16, f16>::with_kv(&gpu, rng, case.clone(), kv);
    let page = 2 * 16 * 8 * 128;
    let pages = (1usize << 32) / page;
    let mut storage: CudaSlice<f16> = gpu.cuda.alloc_zeros((pages + 1) * page).unwrap();
    let (first, last) = cache(&problem.kv).tensors[0].host.split_at(page);
    gpu.cuda.memcpy_htod(first, &mut storage.slice_mut(..page)).unwrap();
    gpu.cuda.memcpy_htod(last, &mut storage.slice_mut((pages - 1) * page..pages * page)).unwrap();
    let table = PageIndices::from_requests(pages, 16, [(&[pages as i32 - 1, 0][..], 32)]).unwrap();
    let table = PageTable::new(&gpu.stream, table).unwrap();
    let queries = RaggedTable::new(&gpu.stream, case.queries()).unwrap();
    let mut workspace = workspace_of(&gpu, &attention);
    let plan = attention.plan(&mut workspace, PagedBatch::new(&queries, &table), &options_of(&case)).unwrap();
    let (mut out, mut lse) = problem.outputs(&gpu);
    {
        let storage = storage.tensor(&gpu.cuda, &[pages + 1, 2, 16, 8, 128]).unwrap();
        let (q, mut out, mut lse) = (problem.q.device_view(), out.device_view_mut(), lse.device_view_mut());
        let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
        let mut run = |pages| {
            let kv = PagedKv::joined(storage.view().narrow(0, 0, pages).unwrap(), KvLayout::Nhd).unwrap();
            plan.run_with(&q, &kv, &mut out, Some(&mut lse), &case.options())
        };
        refused(run(pages + 1), "kv.k");
        run(pages).unwrap();
    }
    problem.verify(&out, Some(&lse));
}
