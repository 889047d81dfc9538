//! Steps, graphs and streams that follow one another.

use crate::*;

/// Steps that follow each other without waiting, each planned on the
/// workspace of the one before and run for two layers.
#[test]
fn steps_share_a_workspace() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let case = case();
    let Some(attention) = attention_of::<f16, f16>(&gpu, &case) else { return };
    let steps = [
        vec![(9, 900), (3, 3), (0, 0)],
        vec![(129, 129)],
        vec![(17, 17), (1, 2500), (64, 64)],
        vec![(1, 40), (1, 700), (1, 1)],
    ]
    .map(|requests| Problem::<f16, f16>::new(&gpu, rng, Case { requests, ..case.clone() }));
    let mut workspace = workspace_of(&gpu, &attention);
    let mut tables = Tables::with_capacity(&gpu, &steps[0], 3, 200);
    for _ in 0..5 {
        let mut outputs: Vec<_> = steps.iter().map(|step| [step.outputs(&gpu), step.outputs(&gpu)]).collect();
        for (step, layers) in steps.iter().zip(&mut outputs) {
            tables.update(&gpu, step);
            let plan = plan(&attention, &mut workspace, &tables, &case).unwrap();
            for (out, lse) in layers {
                run(&plan, step, out, Some(lse)).unwrap();
            }
        }
        for (step, layers) in steps.iter().zip(&outputs) {
            layers.iter().for_each(|(out, lse)| step.verify(out, Some(lse)));
        }
    }
}

/// Replays with other lengths, other numbers of requests and of queries.
fn graph_replay<T: Number>() {
    const PAGES: usize = 400;
    const ROWS: usize = 160;
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    for case in both(case()) {
        let Some(attention) = attention_of::<T, T>(&gpu, &case) else { return };
        let mut workspace = workspace_of(&gpu, &attention);
        let heads = case.heads();
        let problem = |rng: &mut Rng, requests| {
            let case = Case { requests, ..case.clone() };
            let table = table_among(rng, PAGES, case.page_size, &case.key_lens());
            let kv = Kv::paged(&gpu, rng, &case, table);
            Problem::<T, T>::with_kv(&gpu, rng, case, kv)
        };
        let mut first = problem(rng, vec![(1, 1), (5, 20)]);
        let mut tables = Tables::with_capacity(&gpu, &first, 8, PAGES);
        let mut q = Mirrored::<T>::poisoned(&gpu, &case.q_shape(ROWS));
        let (mut out, mut lse) = first.outputs_of(&gpu, ROWS);
        let options = graph_options(&case, ROWS);
        let plan = attention
            .plan(&mut workspace, PagedBatch::new(&tables.queries, pages(&tables)), &options)
            .unwrap();
        let (graph, captured) = {
            let (q, kv) = (q.device_view(), cache(&first.kv).device_view());
            let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
            let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
            capture(&gpu, || plan.run_with(&q, &kv, &mut out, Some(&mut lse), &case.options()))
        };
        captured.unwrap();
        out.assert_untouched(); // captured is not run
        let (graph, key) = (graph.expect("a graph"), plan.replay_key().ok());
        assert!(key.is_some());
        let Kv::Paged { cache: resident, .. } = &mut first.kv else { unreachable!("pages") };
        for requests in [
            vec![(1, 1), (5, 20)],
            vec![(2, 2), (6, 21), (1, 1), (34, 34), (17, 65), (8, 8)],
            vec![(1, 3000), (1, 1), (1, 2), (1, 3), (1, 4), (1, 5)],
            vec![(100, 700)],
            vec![(160, 160)],
            vec![(3, 50), (0, 31), (4, 5), (0, 0), (1, 900)],
            vec![(0, 7)],
            vec![(20, 64); 8],
        ] {
            let step = problem(rng, requests);
            tables.update(&gpu, &step);
            let mut rows = vec![T::POISON; q.host.len()];
            let used = step.queries.total() * heads.num_qo_heads * case.head_dim_qk;
            rows[..used].copy_from_slice(&step.q.host[..used]);
            q.upload(&rows);
            for (tensor, source) in resident.tensors.iter_mut().zip(&cache(&step.kv).tensors) {
                tensor.upload(&source.host);
            }
            out.upload(&vec![T::POISON; out.host.len()]);
            lse.upload(&vec![f32::NAN; lse.host.len()]);
            let plan = attention
                .plan(&mut workspace, PagedBatch::new(&tables.queries, pages(&tables)), &options)
                .unwrap();
            assert_eq!(plan.replay_key().ok(), key);
            graph.launch().unwrap();
            step.verify(&out, Some(&lse));
            // The same plan, run directly.
            let (mut direct, mut direct_lse) = step.outputs_of(&gpu, ROWS);
            plan.run_with(
                &q.device_view(),
                &resident.device_view(),
                &mut direct.device_view_mut(),
                Some(&mut direct_lse.device_view_mut()),
                &case.options(),
            )
            .unwrap();
            assert_same_bits("replay and run", &out.download(), &direct.download());
            assert_same_bits("replay and run: LSE", &lse.download(), &direct_lse.download());
        }
    }
}

typed_tests! {
    graph_replay_f16: graph_replay::<f16>();
    graph_replay_bf16: graph_replay::<bf16>();
}

/// Which plans a captured graph may be replayed after.
#[test]
fn can_replay() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let case = Case { requests: vec![(3, 10), (20, 20), (1, 30)], ..case() };
    let Some(attention) = attention_of::<f16, f16>(&gpu, &case) else { return };
    let mut workspace = workspace_of(&gpu, &attention);
    let problem = Problem::<f16, f16>::new(&gpu, rng, case.clone());
    let mut tables = Tables::with_capacity(&gpu, &problem, 4, 50);
    let mut key = |tables: &Tables, case: &Case, options: &PlanOptions<'_>| {
        let attention = attention_of::<f16, f16>(&gpu, case).expect("the module");
        let plan = attention.plan(&mut workspace, PagedBatch::new(&tables.queries, pages(tables)), options);
        plan.unwrap().replay_key().ok()
    };
    let captured = key(&tables, &case, &graph_options(&case, 40));
    assert!(captured.is_some());
    assert_eq!(key(&tables, &case, &graph_options(&case, 40)), captured);
    assert_eq!(key(&tables, &case, &options_of(&case)), None);
    // Tensors, masks and heads are baked in.
    for (other, rows) in [
        (case.clone(), 41),
        (Case { causal: false, ..case.clone() }, 40),
        (Case { group: 1, ..case.clone() }, 40),
        (Case { kv_heads: 1, ..case.clone() }, 40),
    ] {
        assert_ne!(key(&tables, &other, &graph_options(&other, rows)), captured, "{other:?} {rows}");
    }
    // The number of requests is not.
    for requests in [vec![(3, 10), (20, 50)], vec![(3, 10), (20, 20), (1, 30), (0, 0)]] {
        let table = table_among(rng, problem_pages(&problem), case.page_size, &lens(&requests));
        let case = Case { requests, ..case.clone() };
        let kv = Kv::paged(&gpu, rng, &case, table);
        tables.update(&gpu, &Problem::<f16, f16>::with_kv(&gpu, rng, case.clone(), kv));
        assert_eq!(key(&tables, &case, &graph_options(&case, 40)), captured, "{case:?}");
    }
}

fn lens(requests: &[(usize, usize)]) -> Vec<usize> {
    requests.iter().map(|&(_, tokens)| tokens).collect()
}

/// Two threads, each with a stream, a workspace and tables of its own: their
/// launches each want the whole GPU.
#[test]
fn two_streams_at_once() {
    fn work(gpu: &Gpu, mut rng: Rng, case: &Case, attention: &BatchAttention) {
        let mut workspace = workspace_of(gpu, attention);
        let problems = [vec![(1, 1), (40, 300)], vec![(3, 4000), (7, 7)], vec![(130, 130), (1, 900)]]
            .map(|requests| Problem::<f16, f16>::new(gpu, &mut rng, Case { requests, ..case.clone() }));
        let mut tables = Tables::with_capacity(gpu, &problems[0], 2, 300);
        let mut first: Vec<(Vec<f16>, Vec<f32>)> = Vec::new();
        for iteration in 0..150 {
            let problem = &problems[iteration % problems.len()];
            tables.update(gpu, problem);
            let plan = plan(attention, &mut workspace, &tables, case).unwrap();
            if iteration < problems.len() {
                first.push(check_run(gpu, &plan, problem));
                continue;
            }
            let (mut out, mut lse) = problem.outputs(gpu);
            for _ in 0..4 {
                run(&plan, problem, &mut out, Some(&mut lse)).unwrap();
            }
            let (want, want_lse) = &first[iteration % problems.len()];
            assert_same_bits("output", &out.download(), want);
            assert_same_bits("LSE", &lse.download(), want_lse);
        }
    }
    let Some(gpu) = Gpu::start() else { return };
    let cases = [case(), Case { group: 1, causal: false, ..case() }];
    let attentions = cases.each_ref().map(|case| attention_of::<f16, f16>(&gpu, case));
    let [Some(one), Some(two)] = &attentions else { return };
    let other = gpu.fork();
    std::thread::scope(|scope| {
        let threads = [(&gpu, one), (&other, two)].into_iter().zip(&cases).map(|((gpu, attention), case)| {
            let rng = Rng::new();
            scope.spawn(move || work(gpu, rng, case, attention))
        });
        for thread in threads.collect::<Vec<_>>() {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
}
