//! Head dimensions, groups, lengths and backends.

use crate::*;

fn shapes<T: Number>(head_dim: usize) {
    shapes_on::<T>(Backend::CudaCores, &[1, 2, 3, 4, 8], head_dim);
}

fn shapes_on<T: Number>(backend: Backend, groups: &[usize], head_dim: usize) {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for &group in groups {
        for page_size in [1, 16, 64] {
            for (layout, joined) in LAYOUTS.into_iter().flat_map(|layout| [(layout, false), (layout, true)]) {
                let case = Case {
                    lens: ragged(page_size),
                    page_size,
                    group,
                    head_dim,
                    layout,
                    joined,
                    backend,
                    ..Case::default()
                };
                let Some(decode) = (match head_dim {
                    64 | 128 if backend != Backend::Fa3 => decode_of::<T, T>(&gpu, &case),
                    _ => optional_decode_of::<T, T>(&gpu, &case),
                }) else {
                    return;
                };
                Problem::<T, T>::new(&gpu, rng, case).check(&gpu, &decode, &mut workspace);
            }
        }
    }
}

/// Decode through prefill, with group sizes that the kernel on CUDA cores has
/// not, too.
#[test]
fn f16_on_tensor_cores() {
    for head_dim in [64, 128, 256] {
        shapes_on::<f16>(Backend::Fa2, &[1, 4, 5, 7, 8, 16], head_dim);
    }
}

#[test]
fn bf16_on_tensor_cores() {
    for head_dim in [64, 128, 256] {
        shapes_on::<bf16>(Backend::Fa2, &[1, 6, 8, 12], head_dim);
    }
}

#[test]
fn on_fa3() {
    if has_fa3() {
        for head_dim in [64, 128] {
            shapes_on::<f16>(Backend::Fa3, &[1, 4, 5], head_dim);
            shapes_on::<bf16>(Backend::Fa3, &[3, 8], head_dim);
        }
    }
}

/// What is picked, and that it can be asked for.
#[test]
fn backends() {
    let Some(gpu) = Gpu::start() else { return };
    let picked = |backend, group| {
        decode_of::<f16, f16>(&gpu, &Case { backend, group, ..Case::default() }).unwrap().backend()
    };
    for group in [1, 2] {
        assert_eq!(picked(Backend::Auto, group), Backend::CudaCores);
    }
    for group in [3, 4, 5, 8, 16] {
        assert_eq!(picked(Backend::Auto, group), Backend::Fa2);
    }
    assert_eq!([picked(Backend::Fa2, 1), picked(Backend::CudaCores, 8)], [Backend::Fa2, Backend::CudaCores]);
    for (group, expected) in [(1, Backend::CudaCores), (2, Backend::Fa2)] {
        let case = Case { backend: Backend::Auto, group, ..Case::default() };
        let Some(decode) = optional_decode_of::<bf16, F8E4M3>(&gpu, &case) else { return };
        assert_eq!(decode.backend(), expected);
    }
}

typed_tests! {
    f16_64: shapes::<f16>(64);
    f16_128: shapes::<f16>(128);
    f16_256: shapes::<f16>(256);
    bf16_64: shapes::<bf16>(64);
    bf16_128: shapes::<bf16>(128);
    bf16_256: shapes::<bf16>(256);
}

/// Requests, heads and pages at random, on both kernels.
#[test]
fn random_batches() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for _ in 0..24 {
        let page_size = [1, 2, 5, 16, 64, 128][rng.below(6)];
        let longest = [20, 300, 4000][rng.below(3)];
        let lens = (0..1 + rng.below(12)).map(|_| match rng.below(5) {
            0 => 0,
            1 => page_size * (1 + rng.below(3)),
            _ => 1 + rng.below(longest),
        });
        let case = Case {
            lens: lens.collect(),
            page_size,
            kv_heads: [1, 2, 3, 4, 8][rng.below(5)],
            group: [1, 2, 3, 4, 8][rng.below(5)],
            head_dim: [64, 128][rng.below(2)],
            layout: LAYOUTS[rng.below(2)],
            joined: rng.below(2) == 0,
            ..Case::default()
        };
        for backend in [Backend::CudaCores, Backend::Fa2] {
            let case = Case { backend, ..case.clone() };
            let Some(f16s) = decode_of::<f16, f16>(&gpu, &case) else { return };
            let Some(bf16s) = decode_of::<bf16, bf16>(&gpu, &case) else { return };
            Problem::<f16, f16>::new(&gpu, rng, case.clone()).check(&gpu, &f16s, &mut workspace);
            Problem::<bf16, bf16>::new(&gpu, rng, case).check(&gpu, &bf16s, &mut workspace);
        }
    }
}

/// One long request is divided among blocks, also beside short and empty ones.
#[test]
fn split_kv() {
    fn run<T: Number>(gpu: &Gpu, rng: &mut Rng, lens: &[usize], page_size: usize) {
        let case = Case { lens: lens.to_vec(), page_size, kv_heads: 8, ..Case::default() };
        let Some(decode) = decode_of::<T, T>(gpu, &case) else { return };
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let splits = Problem::<T, T>::new(gpu, rng, case).check(gpu, &decode, &mut workspace);
        assert!(splits, "{lens:?} in pages of {page_size} was not split");
    }
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    run::<f16>(&gpu, rng, &[20_000], 16);
    run::<bf16>(&gpu, rng, &[20_000], 64);
    run::<f16>(&gpu, rng, &[3, 5_001, 0, 4_096, 1], 1);
}

/// Contexts of 131072 tokens with few heads, which all blocks share.
fn long_context<T: Number>(backend: Backend) {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for (page_size, group, lens) in
        [(16, 1, vec![131_072]), (64, 8, vec![131_071, 3, 0, 65]), (1, 4, vec![1, 131_072])]
    {
        let case = Case { lens, page_size, kv_heads: 1, group, backend, ..Case::default() };
        let Some(decode) = decode_of::<T, T>(&gpu, &case) else { return };
        let problem = Problem::<T, T>::new(&gpu, rng, case);
        assert!(problem.check(&gpu, &decode, &mut workspace), "{:?} was not split", problem.case);
    }
}

#[test]
fn long_context_on_cuda_cores() {
    long_context::<f16>(Backend::CudaCores);
    long_context::<bf16>(Backend::CudaCores);
}

#[test]
fn long_context_on_tensor_cores() {
    long_context::<f16>(Backend::Fa2);
    long_context::<bf16>(Backend::Fa2);
}

/// A batch that fills the GPU is not split, but for captured launches on
/// tensor cores, which always are.
#[test]
fn large_batch() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let lens: Vec<usize> = (0..1024).map(|_| rng.below(40)).collect();
    for (backend, group) in [(Backend::CudaCores, 1), (Backend::Fa2, 1), (Backend::Fa2, 4)] {
        let case = Case { lens: lens.clone(), kv_heads: 8, group, head_dim: 64, backend, ..Case::default() };
        let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, case);
        let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for graph in [None, Some(table.host().batch_size())] {
            let plan = decode.plan(&mut workspace, &table, &options_of(graph)).unwrap();
            let splits = backend == Backend::Fa2 && graph.is_some();
            assert_eq!(plan.splits_kv(), splits, "{backend:?}, {graph:?}: {:?}", plan.numbers());
            problem.check_run(&gpu, &plan);
        }
    }
}

/// Offsets in a cache of more than 2³² elements are 64-bit.
#[test]
fn cache_beyond_32_bits() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    // The same two pages, once as a small cache and once as the first and the
    // last page of 8 GiB.
    let case = Case { lens: vec![32], kv_heads: 8, joined: true, ..Case::default() };
    let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
    let small_table = PageIndices::from_requests(2, 16, [(&[1, 0][..], 32)]).unwrap();
    let problem = Problem::<f16, f16>::with_table(&gpu, rng, case, small_table);
    let page = 2 * 16 * 8 * 128;
    let pages = (1usize << 32) / page + 2;
    let mut storage = gpu.cuda.alloc_zeros::<f16>(pages * page).unwrap();
    let (first, last) = problem.cache.tensors[0].host.split_at(page);
    gpu.cuda.memcpy_htod(first, &mut storage.slice_mut(..page)).unwrap();
    gpu.cuda.memcpy_htod(last, &mut storage.slice_mut((pages - 1) * page..)).unwrap();
    let table = PageIndices::from_requests(pages, 16, [(&[pages as i32 - 1, 0][..], 32)]).unwrap();
    let table = PageTable::new(&gpu.stream, table).unwrap();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
    let (mut out, mut lse) = problem.outputs(&gpu);
    plan.run_with(
        &problem.q.device_view(),
        &PagedKv::joined(storage.tensor(&gpu.cuda, &[pages, 2, 16, 8, 128]).unwrap().view(), KvLayout::Nhd)
            .unwrap(),
        &mut out.device_view_mut(),
        Some(&mut lse.device_view_mut()),
        &problem.case.options(),
    )
    .unwrap();
    problem.verify(&out, Some(&lse));
}

#[test]
fn empty_batches() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for lens in [vec![0; 3], vec![0]] {
        let case = Case { lens, ..Case::default() };
        let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, case);
        let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
        for graph in [None, Some(table.host().batch_size())] {
            let plan = decode.plan(&mut workspace, &table, &options_of(graph)).unwrap();
            problem.check_run(&gpu, &plan);
        }
    }
    // Without requests a run does nothing, but still looks at its arguments.
    let case = Case { lens: vec![], ..Case::default() };
    let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
    let problem = Problem::<f16, f16>::new(&gpu, rng, case);
    let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
    let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
    assert!(plan.numbers().is_empty() && !plan.splits_kv());
    problem.check_run(&gpu, &plan);
    let one = Mirrored::<f16>::random(&gpu, rng, &[1, 8, 128]);
    let (mut out, _) = problem.outputs(&gpu);
    let call = plan.run(&one.device_view(), &problem.cache.device_view(), &mut out.device_view_mut());
    refused(call, "q");
}
