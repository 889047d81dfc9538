//! What is refused.

use crate::*;

/// What there can be no module for.
#[test]
fn impossible_specs() {
    let Some(gpu) = Gpu::start() else { return };
    let spec = AttentionSpec::new(DType::F16, 128);
    for spec in [
        spec.with_backend(Backend::CudaCores),
        spec.with_backend(Backend::Fa3),
        spec.with_window_left(100),
        spec.with_head_dim_vo(64),
        spec.with_kv_dtype(DType::I8),
        spec.with_logits_soft_cap(0.0),
        AttentionSpec::new(DType::F32, 128),
    ] {
        let error = BatchAttention::new(&gpu.stream, &spec, case().heads()).unwrap_err();
        assert!(matches!(error, FlashInferError::Unsupported { .. }), "{spec:?}: {error}");
    }
}

#[test]
fn wrong_queries_and_outputs() {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
    let Some(attention) = attention_of::<f16, f16>(&gpu, &case()) else { return };
    let problem = Problem::<f16, f16>::new(&gpu, rng, case());
    let (case, tables) = (&problem.case, Tables::new(&gpu, &problem));
    let mut workspace = workspace_of(&gpu, &attention);
    let eager = plan(&attention, &mut workspace, &tables, case).unwrap();
    {
        let kv = cache(&problem.kv).device_view();
        refuse_queries_and_outputs(&gpu, &other, rng, &problem.q, &mut |q, out, lse| {
            eager.run_with(q, &kv, out, lse, &case.options())
        });
    }
    // The refused calls left everything usable.
    check_run(&gpu, &eager, &problem);
    // Planned for a graph, tensors have the graph's rows.
    let options = graph_options(case, problem.queries.total() + 1);
    let graph =
        attention.plan(&mut workspace, PagedBatch::new(&tables.queries, pages(&tables)), &options).unwrap();
    let (mut out, _) = problem.outputs(&gpu);
    refused(run(&graph, &problem, &mut out, None), "q");
    out.assert_untouched();
}

#[test]
fn wrong_caches() {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
    let Some(attention) = attention_of::<f16, f16>(&gpu, &case()) else { return };
    let problem = Problem::<f16, f16>::new(&gpu, rng, case());
    let (case, tables) = (&problem.case, Tables::new(&gpu, &problem));
    let mut workspace = workspace_of(&gpu, &attention);
    let plan = plan(&attention, &mut workspace, &tables, case).unwrap();
    let (mut out, mut lse) = problem.outputs(&gpu);
    {
        let q = problem.q.device_view();
        let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
        refuse_caches(&gpu, &other, rng, problem_pages(&problem), &mut |kv| {
            plan.run_with(&q, kv, &mut out.reborrow(), Some(&mut lse.reborrow()), &case.options())
        });
    }
    out.assert_untouched();
    lse.assert_untouched();
    // Heads that are not the plan's.
    let more = Problem::<f16, f16>::new(&gpu, rng, Case { kv_heads: 4, ..case.clone() });
    let call = plan.run_with(
        &problem.q.device_view(),
        &cache(&more.kv).device_view(),
        &mut out.device_view_mut(),
        None,
        &case.options(),
    );
    refused(call, "kv.k");
    out.assert_untouched();
    // The refused calls left everything usable.
    check_run(&gpu, &plan, &problem);
}

#[test]
fn wrong_plans() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
    let Some(attention) = attention_of::<f16, f16>(&gpu, &case()) else { return };
    let problem = Problem::<f16, f16>::new(&gpu, rng, case());
    let (case, tables) = (&problem.case, Tables::new(&gpu, &problem));
    let (options, total) = (options_of(case), problem.queries.total());
    let (queries, keys) = (&tables.queries, pages(&tables));
    let mut workspace = workspace_of(&gpu, &attention);
    for (num_qo_heads, num_kv_heads) in [(7, 2), (0, 2), (8, 0), (65536, 65536)] {
        let heads = Heads::new(num_qo_heads, num_kv_heads);
        refused(BatchAttention::new(&gpu.stream, attention.spec(), heads), "heads");
    }
    for rows in [0, total - 1] {
        let options = graph_options(case, rows);
        refused(attention.plan(&mut workspace, PagedBatch::new(queries, keys), &options), "graph");
    }
    let options_of_a_huge_graph = graph_options(case, usize::MAX);
    refused(
        attention.plan(&mut workspace, PagedBatch::new(queries, keys), &options_of_a_huge_graph),
        "graph",
    );
    let fewer = RaggedTable::new(&gpu.stream, RaggedIndices::from_lens([total]).unwrap()).unwrap();
    refused(attention.plan(&mut workspace, PagedBatch::new(&fewer, keys), &options), "queries");
    // Of another stream; keys of another GPU are refused for that.
    let elsewhere = Tables::new(&other, &problem);
    let on_this_gpu = other.stream.ordinal() == gpu.stream.ordinal();
    let [keys_alone, both] = if on_this_gpu { ["queries", "workspace"] } else { ["table"; 2] };
    refused(attention.plan(&mut workspace, PagedBatch::new(&elsewhere.queries, keys), &options), "queries");
    refused(
        attention.plan(&mut workspace, PagedBatch::new(queries, pages(&elsewhere)), &options),
        keys_alone,
    );
    let foreign =
        attention.plan(&mut workspace, PagedBatch::new(&elsewhere.queries, pages(&elsewhere)), &options);
    refused(foreign, both);
    // A workspace grows to what is needed, and from nothing to no more.
    let mut grows = Workspace::with_sizes(&gpu.stream, 0, 0).unwrap();
    check(&gpu, &attention, &mut grows, &problem);
    assert_eq!(grows.float_bytes(), attention.float_bytes());
    assert!(grows.int_bytes() <= Workspace::DEFAULT_INT_BYTES);
    // What these kernels cannot do.
    let indices =
        MaskTable::new(&gpu.stream, MaskIndices::new(case.requests.iter().copied()).unwrap()).unwrap();
    let bits = gpu.cuda.alloc_zeros::<u8>(indices.host().num_bytes()).unwrap();
    let bits = bits.tensor(&gpu.cuda, &[bits.len()]).unwrap();
    let mask = Mask::Custom { indices: &indices, bits: bits.view() };
    let splits = [Split::fixed(8), Split::disabled(), Split::beside(1)];
    for wrong in splits.map(|split| options.with_split(split)).into_iter().chain([options.with_mask(mask)]) {
        let error = attention.plan(&mut workspace, PagedBatch::new(queries, keys), &wrong).unwrap_err();
        assert!(matches!(error, FlashInferError::Unsupported { .. }), "{error}");
    }
    // During a capture, which goes on.
    let (_, call) = capture(&gpu, || {
        attention
            .plan(&mut workspace, PagedBatch::new(queries, keys), &options)
            .map(|plan| plan.numbers().to_vec())
    });
    refused(call, "workspace");
    // The refused calls left everything usable.
    check(&gpu, &attention, &mut workspace, &problem);
}
