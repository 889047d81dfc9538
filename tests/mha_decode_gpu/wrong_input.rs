//! What is refused.

use crate::*;

#[test]
fn wrong_queries_and_outputs() {
    let Some(Bench { gpu, other, mut rng, problem }) = Bench::start() else { return };
    let rng = &mut rng;
    let Some(decode) = decode_of::<f16, f16>(&gpu, &problem.case) else { return };
    let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
    let cache = problem.cache.device_view();
    refuse_queries_and_outputs(&gpu, &other, rng, &problem.q, &mut |q, out, lse| {
        plan.run_with(q, &cache, out, lse, &RunOptions::default())
    });
    // The refused calls left everything usable.
    problem.check_run(&gpu, &plan);
}

#[test]
fn wrong_caches() {
    let Some(Bench { gpu, other, mut rng, problem }) = Bench::start() else { return };
    let rng = &mut rng;
    let Some(decode) = decode_of::<f16, f16>(&gpu, &problem.case) else { return };
    let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
    let (mut out, mut lse) = problem.outputs(&gpu);
    {
        let q = problem.q.device_view();
        let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
        refuse_caches(&gpu, &other, rng, problem.table.num_pages(), &mut |kv| {
            let options = RunOptions::default();
            plan.run_with(&q, kv, &mut out.reborrow(), Some(&mut lse.reborrow()), &options)
        });
    }
    out.assert_untouched();
    lse.assert_untouched();
    // The refused calls left everything usable.
    problem.check_run(&gpu, &plan);
}

#[test]
fn wrong_plans() {
    let Some(Bench { gpu, other, problem, .. }) = Bench::start() else { return };
    let Some(decode) = decode_of::<f16, f16>(&gpu, &problem.case) else { return };
    let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let new = |backend, num_qo_heads, num_kv_heads| {
        let spec = problem.case.spec::<f16, f16>().with_backend(backend);
        BatchDecode::new(&gpu.stream, &spec, Heads::new(num_qo_heads, num_kv_heads))
    };
    for (num_qo_heads, num_kv_heads) in [(7, 2), (0, 2), (8, 0), (65536, 65536)] {
        for backend in [Backend::CudaCores, Backend::Fa2, Backend::Auto] {
            refused(new(backend, num_qo_heads, num_kv_heads), "heads");
        }
    }
    for (num_qo_heads, num_kv_heads) in [(10, 2), (12, 2), (16, 1)] {
        let error = new(Backend::CudaCores, num_qo_heads, num_kv_heads).unwrap_err();
        assert!(matches!(error, FlashInferError::Unsupported { .. }), "{error}");
        assert_eq!(new(Backend::Auto, num_qo_heads, num_kv_heads).unwrap().backend(), Backend::Fa2);
    }
    let mut elsewhere = Workspace::new(&other.stream).unwrap();
    refused(decode.plan(&mut elsewhere, &table, &PlanOptions::default()), "workspace");
    problem.check(&gpu, &decode, &mut Workspace::with_sizes(&gpu.stream, 0, 0).unwrap());
    problem.check(&gpu, &decode, &mut workspace);
}

/// What decode cannot do, and numbers that the planner does not take.
#[test]
fn wrong_options() {
    let Some(Bench { gpu, problem, .. }) = Bench::start() else { return };
    let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
    let requests = table.host().batch_size();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let indices = MaskIndices::new(problem.case.lens.iter().map(|&len| (1, len))).unwrap();
    let bits = gpu.cuda.alloc_zeros::<u8>(indices.num_bytes()).unwrap();
    let bits = bits.tensor(&gpu.cuda, &[bits.len()]).unwrap();
    let indices = MaskTable::new(&gpu.stream, indices).unwrap();
    let plain = PlanOptions::default();
    let masked = plain.with_mask(Mask::Custom { indices: &indices, bits: bits.view() });
    for backend in [Backend::CudaCores, Backend::Fa2] {
        let Some(decode) = decode_of::<f16, f16>(&gpu, &Case { backend, ..problem.case.clone() }) else {
            return;
        };
        let mut unsupported = |options: &PlanOptions<'_>| {
            let error = decode.plan(&mut workspace, &table, options).unwrap_err();
            assert!(
                matches!(error, FlashInferError::Unsupported { .. }),
                "{backend:?}, {options:?}: {error}"
            );
        };
        unsupported(&masked);
        if backend == Backend::CudaCores {
            for split in [Split::fixed(8), Split::disabled(), Split::beside(1)] {
                unsupported(&plain.with_split(split));
            }
        } else {
            unsupported(&for_graph(&table).with_split(Split::fixed(8)));
            let both = |pages| {
                let mut split = Split::fixed(pages);
                split.disable_split_kv = true;
                split
            };
            let tokens = i32::MAX as usize / problem.case.page_size;
            let wrong = [0, tokens + 1, 1 << 31, usize::MAX].map(Split::fixed);
            for split in wrong.into_iter().chain([both(8), Split::beside(1 << 31), Split::beside(usize::MAX)])
            {
                refused(decode.plan(&mut workspace, &table, &plain.with_split(split)), "split");
            }
            for split in [Split::fixed(tokens), Split::fixed(1), Split::beside(i32::MAX as usize)] {
                let plan = decode.plan(&mut workspace, &table, &plain.with_split(split)).unwrap();
                problem.check_run(&gpu, &plan);
            }
        }
        for rows in [0, requests - 1, requests + 1, usize::MAX] {
            refused(decode.plan(&mut workspace, &table, &plain.with_graph(rows)), "graph");
        }
        // A query sees all keys with a causal mask, too.
        let plan = decode.plan(&mut workspace, &table, &PlanOptions::causal()).unwrap();
        problem.check_run(&gpu, &plan);
    }
}
