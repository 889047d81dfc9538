//! Lengths, heads and strides.

use super::*;

impl On {
    /// Group sizes, layouts, page sizes, causal and not.
    pub fn shapes<T: Number>(self, head_dim: usize) {
        let groups = [1, 4, 5, 8].map(|group| Case { group, ..self.case().head_dim(head_dim) });
        let stored = groups.into_iter().flat_map(|case| self.stored(case));
        check_all::<T, T>(stored.flat_map(Self::both));
    }

    /// Requests, heads, pages and masks at random.
    pub fn random_batches(self, head_dim: usize) {
        let mut rng = Rng::new();
        let mut cases =
            || (0..16).map(|_| self.case().head_dim(head_dim).randomized(&mut rng)).collect::<Vec<_>>();
        let (first, second) = (cases(), cases());
        check_all::<f16, f16>(first);
        check_all::<bf16, bf16>(second);
    }

    /// Queries and keys at and beside the edges of tiles (16, 64, 128 and 192
    /// queries; 96, 128 and 192 keys).
    pub fn tiles<T: Number>(self) {
        let equal = [1, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193, 200].map(|len| (len, len));
        let more_keys = vec![(128, 129), (127, 256), (193, 300), (0, 96), (200, 201), (1, 193), (129, 384)];
        for requests in [equal.to_vec(), more_keys] {
            for (head_dim, group) in [(64, 1), (128, 2)] {
                let case = Case { requests: requests.clone(), kv_heads: 1, group, ..self.case() };
                check_all::<T, T>(Self::both(case.head_dim(head_dim)));
            }
        }
    }

    /// Prompts that are continued: fewer queries than keys.
    pub fn chunked_prefill(self) {
        let requests = vec![(64, 300), (1, 500), (100, 1000), (17, 18), (128, 640)];
        let cases = [1, 4].map(|group| Case { requests: requests.clone(), group, ..self.case() });
        check_all::<bf16, bf16>(cases.into_iter().flat_map(Self::both));
    }

    /// Few queries and many keys, which FlashAttention 2 divides among blocks.
    pub fn long_keys(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for requests in [vec![(3, 20_000)], vec![(1, 5_001), (20, 4_096), (0, 9), (2, 2)]] {
            for case in Self::both(Case { requests, ..self.case() }) {
                let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
                let problem = Problem::<f16, f16>::new(&gpu, rng, case);
                let splits = problem.check(&gpu, &prefill, &mut workspace);
                assert_eq!(splits, self.backend == Backend::Fa2, "{:?}", problem.case);
            }
        }
    }

    /// Chunks at the end of 131072 keys: in two tiles, with many heads, and
    /// beside short requests.
    pub fn keys_of_128k(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for (group, causal, requests) in [
            (1, true, vec![(130, 131_072)]),
            (8, true, vec![(3, 131_071), (0, 0), (17, 40), (1, 1)]),
            (2, false, vec![(9, 131_072)]),
        ] {
            let case = Case { requests, causal, kv_heads: 1, group, ..self.case() };
            let Some(prefill) = prefill_of::<bf16, bf16>(&gpu, &case) else { return };
            let problem = Problem::<bf16, bf16>::new(&gpu, rng, case);
            let splits = problem.check(&gpu, &prefill, &mut workspace);
            assert_eq!(splits, self.backend == Backend::Fa2, "{:?}", problem.case);
        }
    }

    /// So many requests that each head of FlashAttention 3 has the same schedule.
    pub fn many_requests(self) {
        let requests = (0..4200).map(|at| (at % 3, at % 3 + at % 5)).collect();
        let case = Case { requests, kv_heads: 1, group: 2, ..self.case() };
        check_all::<f16, f16>(Self::both(case.head_dim(64)));
    }

    /// 1024 requests of random lengths, some without queries or keys.
    pub fn batch_of_1024(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for case in Self::both(self.case()) {
            let requests = (0..1024).map(|_| {
                let queries = rng.below(6);
                (queries, if rng.below(20) == 0 { 0 } else { queries + rng.below(70) })
            });
            let case = Case { requests: requests.collect(), ..case };
            let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
            Problem::<f16, f16>::new(&gpu, rng, case).check(&gpu, &prefill, &mut workspace);
        }
    }

    /// Requests with queries but no keys, beside others.
    pub fn no_keys_for_some(self) {
        let requests = vec![(3, 0), (5, 20), (130, 0), (1, 1), (200, 0)];
        check_all::<f16, f16>(Self::both(Case { requests, ..self.case() }));
    }

    /// No request has keys.
    pub fn no_keys_at_all(self) {
        check_all::<f16, f16>(Self::both(Case { requests: vec![(3, 0), (130, 0)], ..self.case() }));
    }

    /// More queries than keys with a causal mask: the first see nothing. It
    /// may be refused, but not answered wrongly.
    pub fn more_queries_than_keys(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for requests in [vec![(20, 5)], vec![(300, 100)], vec![(5, 9), (130, 129), (7, 7)]] {
            let case = Case { requests, group: 1, ..self.case() };
            let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
            let problem = Problem::<f16, f16>::new(&gpu, rng, case);
            let (case, tables) = (&problem.case, Tables::new(&gpu, &problem));
            let plan = tables.plan(&prefill, &mut workspace, &case.plan_options());
            match plan {
                Ok(plan) => drop(problem.check_run(&gpu, &plan)),
                refusal => refused(refusal, "queries"),
            }
        }
    }

    /// Queries as the first heads of a joined query-key-value projection, and
    /// ragged keys and values as the others.
    pub fn strided(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for case in Self::both(self.case()).into_iter().flat_map(Case::parts) {
            let (heads, all_heads) = (case.heads(), case.kv_heads * (case.group + 2));
            let part = |rng: &mut Rng, rows, first, count| {
                Mirrored::<f16>::random(&gpu, rng, &[rows, all_heads, 128]).narrowed(1, first, count)
            };
            let q = part(rng, case.queries().total(), 0, heads.num_qo_heads);
            let kv = match self.kind {
                Kind::Paged => {
                    let table = table_among(rng, 100, case.page_size, &case.key_lens());
                    Kv::paged(&gpu, rng, &case, table)
                }
                Kind::Ragged | Kind::Single => {
                    let keys = RaggedIndices::from_lens(case.key_lens()).unwrap();
                    let k = part(rng, keys.total(), heads.num_qo_heads, case.kv_heads);
                    let v = part(rng, keys.total(), heads.num_qo_heads + case.kv_heads, case.kv_heads);
                    Kv::Ragged { keys, k, v }
                }
            };
            if !check_problem(&gpu, &Problem::<f16, f16>::solve(case, q, kv), &mut workspace) {
                return;
            }
        }
    }

    /// The only head of a wider tensor. Nobody steps over it, so its stride,
    /// which is no multiple of 16 bytes, should not matter.
    pub fn one_head_with_an_uneven_stride(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let case = Case { kv_heads: 1, group: 1, ..self.case() };
        let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
        let rows = case.queries().total();
        let q = Mirrored::<f16>::random(&gpu, rng, &[rows, 8, 130]).narrowed(1, 0, 1).narrowed(2, 0, 128);
        let even = Problem::<f16, f16>::new(&gpu, rng, case.clone());
        let problem = Problem::solve(case, q, even.kv);
        let (case, tables) = (&problem.case, Tables::new(&gpu, &problem));
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let plan = tables.plan(&prefill, &mut workspace, &case.plan_options()).unwrap();
        let (mut out, mut lse) = problem.outputs(&gpu);
        match problem.run(&plan, &mut out, Some(&mut lse), &case.options()) {
            Ok(()) => problem.verify(&out, Some(&lse)),
            refusal => refused(refusal, "q"),
        }
    }

    /// Heads that are one head, told by a stride of 0: FlashAttention 3 may
    /// refuse them, but not answer wrongly.
    pub fn query_heads_that_repeat(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let case = self.case();
        let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
        let shape = case.q_shape(case.queries().total());
        let mut q = Mirrored::<f16>::random(&gpu, rng, &shape);
        let repeated: Vec<f16> =
            q.host.chunks(shape[1] * shape[2]).flat_map(|row| row[..shape[2]].repeat(shape[1])).collect();
        let even = Problem::<f16, f16>::new(&gpu, rng, case.clone());
        q.upload(&repeated);
        q.host = repeated;
        let problem = Problem::solve(case, q, even.kv);
        let (case, tables) = (&problem.case, Tables::new(&gpu, &problem));
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let plan = tables.plan(&prefill, &mut workspace, &case.plan_options()).unwrap();
        let (mut out, mut lse) = problem.outputs(&gpu);
        let strides = [shape[1] * shape[2], 0, 1];
        let result = {
            let q = gpu.cuda.clone_htod(&problem.q.host).unwrap();
            let q = q.tensor_strided(&gpu.cuda, &shape, Some(&strides)).unwrap();
            let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
            let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
            plan.run(&q.view(), &problem.kv.device_view(), &mut out, Some(&mut lse), &case.options())
        };
        match result {
            Ok(()) => problem.verify(&out, Some(&lse)),
            refusal => {
                assert_eq!(self.backend, Backend::Fa3);
                refused(refusal, "q");
                out.assert_untouched();
            }
        }
    }

    /// Batches without queries, and without requests.
    pub fn nothing_to_do(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for requests in [vec![(0, 5), (0, 0)], vec![(0, 0)], vec![]] {
            let case = Case { requests, ..self.case() };
            let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
            let problem = Problem::<f16, f16>::new(&gpu, rng, case);
            let (case, tables) = (&problem.case, Tables::new(&gpu, &problem));
            let plan = tables.plan(&prefill, &mut workspace, &case.plan_options()).unwrap();
            assert!(plan.numbers().is_empty() && plan.replay_key().is_none());
            problem.check_run(&gpu, &plan);
            // A run still looks at its arguments.
            let one = Mirrored::<f16>::random(&gpu, rng, &[1, 8, 128]);
            let (mut out, _) = problem.outputs_of(&gpu, 1);
            {
                let (one, mut out) = (one.device_view(), out.device_view_mut());
                let call =
                    plan.run(&one, &problem.kv.device_view(), &mut out.reborrow(), None, &case.options());
                refused(call, "q");
            }
            // In a graph there may be rows for queries that are not there.
            let plan = tables.plan(&prefill, &mut workspace, &case.graph_options(4)).unwrap();
            let (mut out, mut lse) = problem.outputs_of(&gpu, 4);
            {
                let q = Mirrored::<f16>::random(&gpu, rng, &[4, 8, 128]);
                let (q, mut out, mut lse) = (q.device_view(), out.device_view_mut(), lse.device_view_mut());
                let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
                plan.run(&q, &problem.kv.device_view(), &mut out, Some(&mut lse), &case.options()).unwrap();
            }
            out.assert_untouched();
            lse.assert_untouched();
        }
    }
}
