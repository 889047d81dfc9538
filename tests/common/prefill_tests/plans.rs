//! Plans: the same again, in graphs, of several streams, and wrong ones.

use super::*;

impl On {
    /// Many runs of one plan with thousands of tiles have the same bits.
    pub fn runs_agree(self) {
        const RUNS: usize = 100;
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for head_dim in [64, 128] {
            let requests = (0..264).map(|at| (1 + at % 40, 1 + at % 40 + 3 * (at % 7))).collect();
            let case = Case { requests, kv_heads: 4, ..self.case().head_dim(head_dim) };
            let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { continue };
            let problem = Problem::<f16, f16>::new(&gpu, rng, case);
            let (case, tables) = (&problem.case, Tables::new(&gpu, &problem));
            let plan = tables.plan(&prefill, &mut workspace, &case.plan_options()).unwrap();
            let (want, _) = problem.check_run(&gpu, &plan);
            let mut differing = 0;
            for _ in 0..RUNS {
                let (mut out, _) = problem.outputs(&gpu);
                problem.run(&plan, &mut out, None, &case.options()).unwrap();
                let got = out.download();
                differing += usize::from(got.iter().zip(&want).any(|(a, b)| a.to_bits() != b.to_bits()));
            }
            assert_eq!(differing, 0, "of {RUNS} runs of {case:?}");
        }
    }

    /// Steps that follow each other without waiting, each planned on the
    /// workspace of the one before and run for two layers.
    pub fn steps_share_a_workspace(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let case = self.case();
        let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
        let steps = [vec![(9, 900), (3, 3), (0, 0)], vec![(129, 129)], vec![(17, 17), (5, 2500), (64, 64)]]
            .map(|requests| Problem::<f16, f16>::new(&gpu, rng, Case { requests, ..case.clone() }));
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let mut tables = Tables::with_capacity(&gpu, &steps[0], 3, 200);
        for _ in 0..5 {
            let mut outputs: Vec<_> =
                steps.iter().map(|step| [step.outputs(&gpu), step.outputs(&gpu)]).collect();
            for (step, layers) in steps.iter().zip(&mut outputs) {
                tables.update(&gpu, step);
                let plan = tables.plan(&prefill, &mut workspace, &case.plan_options()).unwrap();
                for (out, lse) in layers {
                    step.run(&plan, out, Some(lse), &case.options()).unwrap();
                }
            }
            for (step, layers) in steps.iter().zip(&outputs) {
                layers.iter().for_each(|(out, lse)| step.verify(out, Some(lse)));
            }
        }
    }

    /// A batch padded to `batch` requests. Ragged tensors in a graph keep their
    /// size, so there one without queries has the keys that are left of 3100.
    fn padded(self, case: &Case, mut requests: Vec<(usize, usize)>, batch: usize) -> Case {
        requests.resize(batch - 1, (0, 0));
        let keys: usize = requests.iter().map(|&(_, keys)| keys).sum();
        requests.push((0, if self.kind == Kind::Ragged { 3100 - keys } else { 0 }));
        Case { requests, ..case.clone() }
    }

    /// Replays with other lengths, with more and fewer queries, and with fewer
    /// requests than were captured.
    pub fn graph_replay<T: Number>(self) {
        Self::both(self.case()).into_iter().for_each(|case| self.replayed::<T>(case));
    }

    pub fn graph_replay_of_custom_masks(self) {
        self.replayed::<f16>(Case { masked: Masked::Custom(0.4), ..self.case() });
    }

    /// Windows without a causal mask, whose keys are not divided.
    pub fn graph_replay_of_windows(self) {
        for (window_left, causal) in [(100, false), (3, false), (100, true)] {
            self.replayed::<bf16>(Case { window_left: Some(window_left), causal, ..self.case() });
        }
    }

    fn replayed<T: Number>(self, case: Case) {
        const PAGES: usize = 400;
        const ROWS: usize = 160;
        const BATCH: usize = 7;
        let Some(gpu) = Gpu::start_alone() else { return };
        let rng = &mut Rng::new();
        let Some(prefill) = prefill_of::<T, T>(&gpu, &case) else { return };
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let problem = |rng: &mut Rng, requests| {
            let case = self.padded(&case, requests, BATCH);
            match self.kind {
                Kind::Ragged | Kind::Single => Problem::<T, T>::new(&gpu, rng, case),
                Kind::Paged => {
                    let table = table_among(rng, PAGES, case.page_size, &case.key_lens());
                    let kv = Kv::paged(&gpu, rng, &case, table);
                    Problem::with_kv(&gpu, rng, case, kv)
                }
            }
        };
        if self.kind != Kind::Single {
            // What a larger batch leaves in the workspace must not matter.
            let crowd = Case {
                requests: (0..200).map(|at| (1, 1 + at % 30)).collect(),
                masked: Masked::No,
                ..case.clone()
            };
            let crowd = Problem::<T, T>::new(&gpu, rng, crowd);
            for _ in 0..2 {
                crowd.check(&gpu, &prefill, &mut workspace);
            }
        }
        let first = problem(rng, vec![(1, 1), (5, 20), (0, 0), (33, 33), (16, 64)]);
        let mut tables = Tables::with_capacity(&gpu, &first, BATCH, PAGES);
        let mut captured = Captured::new(&gpu, &prefill, first, ROWS, &mut workspace, &tables);
        for requests in [
            vec![(1, 1), (5, 20), (0, 0), (33, 33), (16, 64)],
            vec![(2, 2), (6, 21), (1, 1), (34, 34), (17, 65), (8, 8)],
            vec![(1, 3000), (1, 1), (1, 2), (1, 3), (1, 4), (1, 5)],
            vec![(100, 700)],
            vec![(160, 160)],
            vec![(3, 50), (0, 31), (4, 5)],
            vec![],
            vec![(20, 64); 6],
        ] {
            let step = problem(rng, requests);
            captured.replay(&gpu, &prefill, &step, &mut workspace, &mut tables);
        }
    }

    /// Which plans a captured graph may be replayed after.
    pub fn can_replay(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let case = Case { requests: vec![(3, 10), (20, 20), (1, 30)], ..self.case() };
        if prefill_of::<f16, f16>(&gpu, &case).is_none() {
            return;
        }
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let problem = Problem::<f16, f16>::new(&gpu, rng, case.clone());
        let mut tables = Tables::with_capacity(&gpu, &problem, 4, 50);
        let mut key = |tables: &Tables, case: &Case, options: &PlanOptions<'static>| {
            let prefill = prefill_of::<f16, f16>(&gpu, case).expect("the module");
            tables.plan(&prefill, &mut workspace, options).unwrap().replay_key()
        };
        let captured = key(&tables, &case, &case.graph_options(40));
        assert!(captured.is_some());
        assert_eq!(key(&tables, &case, &case.graph_options(40)), captured);
        assert_eq!(key(&tables, &case, &case.plan_options()), None);
        let others =
            [Case { causal: false, ..case.clone() }, Case { group: 1, ..case.clone() }].map(|other| {
                let options = other.graph_options(40);
                (other, options)
            });
        for (other, options) in others {
            assert_ne!(key(&tables, &other, &options), captured, "{other:?}");
        }
        // Launches have the batch size baked in.
        for requests in [vec![(3, 10), (20, 50)], vec![(3, 10), (20, 20), (1, 30), (0, 0)]] {
            let case = Case { requests, ..case.clone() };
            tables.update(&gpu, &Problem::<f16, f16>::new(&gpu, rng, case.clone()));
            assert_ne!(key(&tables, &case, &case.graph_options(40)), captured, "{case:?}");
        }
    }

    /// Two threads, each with a stream, a workspace and tables of its own.
    pub fn two_streams_at_once(self) {
        fn work(gpu: &Gpu, mut rng: Rng, case: &Case, prefill: &BatchPrefill) {
            let mut workspace = Workspace::new(&gpu.stream).unwrap();
            let problems = [vec![(1, 1), (40, 300)], vec![(3, 4000), (7, 7)], vec![(130, 130)]]
                .map(|requests| Problem::<f16, f16>::new(gpu, &mut rng, Case { requests, ..case.clone() }));
            let mut tables = Tables::with_capacity(gpu, &problems[0], 2, 300);
            let mut first: Vec<(Vec<f16>, Vec<f32>)> = Vec::new();
            for iteration in 0..150 {
                let problem = &problems[iteration % problems.len()];
                tables.update(gpu, problem);
                let plan = tables.plan(prefill, &mut workspace, &case.plan_options()).unwrap();
                if iteration < problems.len() {
                    first.push(problem.check_run(gpu, &plan));
                    continue;
                }
                let (mut out, mut lse) = problem.outputs(gpu);
                for _ in 0..4 {
                    problem.run(&plan, &mut out, Some(&mut lse), &case.options()).unwrap();
                }
                let (want, want_lse) = &first[iteration % problems.len()];
                assert_same_bits("output", &out.download(), want);
                assert_same_bits("LSE", &lse.download(), want_lse);
            }
        }
        let Some(gpu) = Gpu::start() else { return };
        let cases = [self.case(), Case { group: 1, causal: false, ..self.case() }];
        let prefills = cases.each_ref().map(|case| prefill_of::<f16, f16>(&gpu, case));
        let [Some(one), Some(two)] = &prefills else { return };
        let other = gpu.elsewhere();
        std::thread::scope(|scope| {
            let threads =
                [(&gpu, one), (&other, two)].into_iter().zip(&cases).map(|((gpu, prefill), case)| {
                    let rng = Rng::new();
                    scope.spawn(move || work(gpu, rng, case, prefill))
                });
            for thread in threads.collect::<Vec<_>>() {
                if let Err(panic) = thread.join() {
                    std::panic::resume_unwind(panic);
                }
            }
        });
    }

    pub fn wrong_queries_and_outputs(self) {
        let Some(gpu) = Gpu::start() else { return };
        let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
        let case = self.case();
        let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, case.clone());
        let tables = Tables::new(&gpu, &problem);
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let plan = tables.plan(&prefill, &mut workspace, &case.plan_options()).unwrap();
        refuse_queries_and_outputs(&gpu, &other, rng, &problem.q, &mut |q, out, lse| {
            plan.run(q, &problem.kv.device_view(), out, lse, &RunOptions::default())
        });
        // The refused calls left everything usable.
        problem.check_run(&gpu, &plan);
        // Planned for a graph, tensors have the graph's rows.
        let rows = problem.queries.total() + 1;
        let plan = tables.plan(&prefill, &mut workspace, &case.graph_options(rows)).unwrap();
        let (mut out, _) = problem.outputs(&gpu);
        refused(problem.run(&plan, &mut out, None, &case.options()), "q");
        out.assert_untouched();
    }

    pub fn wrong_plans(self) {
        let Some(gpu) = Gpu::start_alone() else { return };
        let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
        let case = self.case();
        let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, case.clone());
        let tables = Tables::new(&gpu, &problem);
        let eager = case.plan_options();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for (num_qo_heads, num_kv_heads) in [(7, 2), (0, 2), (8, 0), (65536, 65536)] {
            let heads = Heads::new(num_qo_heads, num_kv_heads);
            refused(BatchPrefill::new(&gpu.stream, prefill.spec(), heads), "heads");
        }
        let (requests, total) = (problem.queries.batch_size(), problem.queries.total());
        for rows in [0, requests, total - 1, usize::MAX] {
            let plan = tables.plan(&prefill, &mut workspace, &case.graph_options(rows));
            refused(plan, "graph");
        }
        // One request less, and no queries for more requests than rows.
        let fewer = RaggedIndices::from_lens([total]).unwrap();
        let mut wrong = Tables::new(&gpu, &problem);
        wrong.queries = RaggedTable::new(&gpu.stream, fewer).unwrap();
        refused(wrong.plan(&prefill, &mut workspace, &eager), "queries");
        wrong.queries =
            RaggedTable::new(&gpu.stream, RaggedIndices::from_lens(vec![0; requests]).unwrap()).unwrap();
        let plan = wrong.plan(&prefill, &mut workspace, &case.graph_options(requests - 1));
        refused(plan, "graph");
        // Of another stream.
        let mut elsewhere = Workspace::new(&other.stream).unwrap();
        refused(tables.plan(&prefill, &mut elsewhere, &eager), "workspace");
        let mut wrong = Tables::new(&gpu, &problem);
        wrong.keys = match &problem.kv {
            Kv::Paged { table, .. } => KeyTable::Paged(PageTable::new(&other.stream, table.clone()).unwrap()),
            Kv::Ragged { keys, .. } => {
                KeyTable::Ragged(RaggedTable::new(&other.stream, keys.clone()).unwrap())
            }
        };
        refused(wrong.plan(&prefill, &mut workspace, &eager), "keys");
        // During a capture, which goes on.
        let (_, plan) = capture(&gpu, || {
            tables.plan(&prefill, &mut workspace, &eager).map(|plan| plan.numbers().to_vec())
        });
        refused(plan, "workspace");
        // The refused calls left everything usable.
        problem.check(&gpu, &prefill, &mut workspace);
        // A workspace grows from nothing.
        problem.check(&gpu, &prefill, &mut Workspace::with_sizes(&gpu.stream, 0, 0).unwrap());
    }
}
