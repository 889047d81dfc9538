//! The tests that prefill over pages and over ragged keys have in common.

use flashinfer_rs::{
    FlashInferError, PageTable,
    attention::{Backend, BatchPrefill, Heads, Mask, PlanOptions, RunOptions, Workspace},
    cudarc::TensorExt,
    indices::{ItemIndices, ItemTable, MaskIndices, MaskTable, RaggedIndices, RaggedTable},
    kv::KvLayout,
};
use float8::F8E4M3;
use half::{bf16, f16};

use super::{
    Gpu, Mirrored, Number, Rng, assert_same_bits,
    attention::{capture, refuse_queries_and_outputs},
    cache::{LAYOUTS, table_among},
    prefill::{
        Captured, Case, KeyTable, Kind, Kv, Masked, On, Problem, Tables, check_all, check_problem, prefill_of,
    },
    refused,
};

/// The tests of a kind for both backends, each a method of [`On`]: those that
/// the kinds share, and those that are named.
#[macro_export]
macro_rules! prefill_tests {
    (@call $method:ident [$($ty:ty)?] [$($argument:expr),*]) => {
        ON.$method$(::<$ty>)?($($argument),*)
    };
    (@on $module:ident $backend:ident $kind:ident $($name:ident $method:ident $ty:tt $arguments:tt)*) => {
        mod $module {
            use super::*;
            const ON: On = On { kind: Kind::$kind, backend: Backend::$backend };
            $(#[test]
            fn $name() {
                $crate::prefill_tests!(@call $method $ty $arguments);
            })*
        }
    };
    (@all $kind:ident: $($name:ident: $method:ident $(::<$ty:ty>)? ($($argument:expr),*);)*) => {
        $crate::prefill_tests!(@on fa2 Fa2 $kind $($name $method [$($ty)?] [$($argument),*])*);
        $crate::prefill_tests!(@on fa3 Fa3 $kind $($name $method [$($ty)?] [$($argument),*])*);
    };
    (@fa2 $kind:ident: $($name:ident: $method:ident $(::<$ty:ty>)? ($($argument:expr),*);)*) => {
        $crate::prefill_tests!(@on fa2_only Fa2 $kind $($name $method [$($ty)?] [$($argument),*])*);
    };
    ($kind:ident: $($own:ident),*) => {
        $crate::prefill_tests! { @fa2 $kind:
            f16_256: shapes::<f16>(256);
            bf16_256: shapes::<bf16>(256);
            logits_soft_cap: logits_soft_cap();
            sliding_window_and_soft_cap: sliding_window_and_soft_cap();
            f16_over_e4m3: e4m3::<f16>();
            bf16_over_e4m3: e4m3::<bf16>();
            f16_custom_masks: custom_masks::<f16>();
            bf16_custom_masks: custom_masks::<bf16>();
            long_custom_mask: long_custom_mask();
            custom_mask_and_window: custom_mask_and_window();
            graph_replay_of_custom_masks: graph_replay_of_custom_masks();
            alibi: alibi();
        }
        $crate::prefill_tests! { @all $kind:
            f16_64: shapes::<f16>(64);
            f16_128: shapes::<f16>(128);
            bf16_64: shapes::<bf16>(64);
            bf16_128: shapes::<bf16>(128);
            f16_tiles: tiles::<f16>();
            bf16_tiles: tiles::<bf16>();
            random_batches_64: random_batches(64);
            random_batches_128: random_batches(128);
            chunked_prefill: chunked_prefill();
            long_keys: long_keys();
            keys_of_128k: keys_of_128k();
            many_requests: many_requests();
            batch_of_1024: batch_of_1024();
            no_keys_for_some: no_keys_for_some();
            no_keys_at_all: no_keys_at_all();
            more_queries_than_keys: more_queries_than_keys();
            lse_and_pdl_change_nothing: lse_and_pdl_change_nothing();
            sm_scale: sm_scale();
            sm_scale_that_unmasks: sm_scale_that_unmasks();
            sliding_window: sliding_window();
            sliding_window_without_causal: sliding_window_without_causal();
            strided: strided();
            one_head_with_an_uneven_stride: one_head_with_an_uneven_stride();
            query_heads_that_repeat: query_heads_that_repeat();
            nothing_to_do: nothing_to_do();
            steps_share_a_workspace: steps_share_a_workspace();
            f16_graph_replay: graph_replay::<f16>();
            bf16_graph_replay: graph_replay::<bf16>();
            graph_replay_of_windows: graph_replay_of_windows();
            can_replay: can_replay();
            two_streams_at_once: two_streams_at_once();
            runs_agree: runs_agree();
            attention_sinks: attention_sinks();
            attention_sinks_and_window: attention_sinks_and_window();
            v_scale_without_quantization: v_scale_without_quantization();
            wrong_masks: wrong_masks();
            wrong_slopes_and_sinks: wrong_slopes_and_sinks();
            wrong_queries_and_outputs: wrong_queries_and_outputs();
            wrong_plans: wrong_plans();
            $($own: $own();)*
        }
    };
}

impl On {
    pub fn case(self) -> Case {
        Case {
            on: self,
            requests: vec![(1, 1), (5, 20), (0, 7), (33, 33), (16, 64), (0, 0), (2, 131)],
            causal: true,
            page_size: 16,
            kv_heads: 2,
            group: 4,
            head_dim_qk: 128,
            head_dim_vo: 128,
            layout: KvLayout::Nhd,
            joined: false,
            window_left: None,
            soft_cap: None,
            sm_scale: None,
            masked: Masked::No,
            sinks: false,
            alibi: false,
            kv_scales: None,
        }
    }

    /// A case with and without causal masking.
    fn both(case: Case) -> [Case; 2] {
        [true, false].map(|causal| Case { causal, ..case.clone() })
    }

    /// A case in every layout, storage and page size; ragged keys have one, and
    /// those of one request only layouts.
    fn stored(self, case: Case) -> Vec<Case> {
        match self.kind {
            Kind::Ragged => return vec![case],
            Kind::Single => return LAYOUTS.map(|layout| Case { layout, ..case.clone() }).into(),
            Kind::Paged => {}
        }
        let mut cases = Vec::new();
        for page_size in [1, 16, 64] {
            for (layout, joined) in LAYOUTS.into_iter().flat_map(|layout| [(layout, false), (layout, true)]) {
                cases.push(Case { page_size, layout, joined, ..case.clone() });
            }
        }
        cases
    }

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

    /// Each key hidden at random: some queries see nothing, some everything.
    pub fn custom_masks<T: Number>(self) {
        let requests = vec![(1, 1), (5, 20), (0, 7), (33, 33), (16, 64), (0, 0), (7, 3), (130, 131)];
        for density in [0.5, 0.03, 0.0, 1.0] {
            let plain = Case { masked: Masked::Custom(density), requests: requests.clone(), ..self.case() };
            let groups = [(64, 1), (128, 4), (128, 5)];
            let cases = groups.map(|(head_dim, group)| Case { group, ..plain.clone() }.head_dim(head_dim));
            check_all::<T, T>(cases.into_iter().flat_map(|case| self.stored(case)));
        }
    }

    /// Keys of a request divided among blocks, each of which reads its part of
    /// the mask.
    pub fn long_custom_mask(self) {
        let masked = Masked::Custom(0.3);
        check_all::<f16, f16>([Case { requests: vec![(3, 20_000), (17, 4_097)], masked, ..self.case() }]);
    }

    pub fn custom_mask_and_window(self) {
        let case = Case { masked: Masked::Custom(0.7), ..self.case() };
        check_all::<bf16, bf16>([0, 5, 40].map(|left| Case { window_left: Some(left), ..case.clone() }));
    }

    /// Prompts whose items are scored at once, computed from the first token
    /// on, or from within the prefix, an item, or the last token.
    pub fn multi_item_scoring<T: Number>(self) {
        let prompts = [
            (5, vec![3, 2, 4]),
            (1, vec![]),
            (100, vec![1; 40]),
            (64, vec![63, 64, 65, 0, 7]),
            (300, vec![200, 5, 90, 130]),
            (95, vec![500]),
            (700, vec![20; 30]),
        ];
        let len = |(prefix, items): &(usize, Vec<usize>)| {
            prefix + items.iter().map(|len| len + 1).sum::<usize>() + 1
        };
        for (group, page_size, head_dim) in [(1, 1, 64), (4, 16, 128), (5, 64, 128)] {
            for cut in 0..4 {
                let requests = prompts.iter().enumerate().map(|(at, prompt)| {
                    let (all, prefix) = (len(prompt), prompt.0);
                    // Everything, all but part of the prefix, the items, or the end.
                    let queries = [all, all - prefix / 2, all - prefix, 1 + at % 2][cut];
                    (queries.min(all), all)
                });
                let case = Case {
                    requests: requests.collect(),
                    group,
                    page_size,
                    masked: Masked::Items(prompts.to_vec()),
                    ..self.case()
                };
                check_all::<T, T>([case.head_dim(head_dim)]);
            }
        }
    }

    /// Prompts of which the first tokens are there, and a request that is
    /// padding; keys are divided among blocks by FlashAttention 2.
    pub fn multi_item_scoring_of_parts(self) {
        let prompts = vec![(4_000, vec![300; 9]), (5, vec![9; 3]), (1, vec![]), (2_000, vec![1; 1_500])];
        let masked = Masked::Items(prompts);
        for requests in [
            vec![(2, 6_000), (7, 20), (0, 0), (9, 5_001)],
            vec![(200, 6_710), (0, 0), (0, 0), (64, 5_001)],
            vec![(5, 3_000), (20, 20), (2, 2), (10, 1_000)],
        ] {
            check_all::<f16, f16>([Case { requests, masked: masked.clone(), ..self.case() }]);
        }
    }

    /// As many keys as FlashAttention 2 may have, and one more.
    pub fn multi_item_scoring_of_many_keys(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for keys in [65_535, 65_536] {
            let prompt = (500, vec![9; 6_600]);
            let case = Case {
                requests: vec![(3, keys)],
                kv_heads: 1,
                masked: Masked::Items(vec![prompt]),
                ..self.case()
            };
            let Some(prefill) = prefill_of::<bf16, bf16>(&gpu, &case) else { return };
            let problem = Problem::<bf16, bf16>::new(&gpu, rng, case);
            let tables = Tables::new(&gpu, &problem);
            let options = tables.masked(&gpu, problem.case.plan_options());
            match tables.plan(&prefill, &mut workspace, &options) {
                Ok(plan) => drop(problem.check_run(&gpu, &plan)),
                Err(FlashInferError::Unsupported { .. }) => {
                    assert_eq!((self.backend, keys), (Backend::Fa2, 65_536));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn sinks(self, window_left: Option<u32>) {
        let requests =
            vec![(1, 1), (5, 20), (0, 7), (33, 33), (16, 64), (0, 0), (2, 131), (130, 400), (3, 6_000)];
        for group in [1, 8] {
            let case = Case { requests: requests.clone(), group, sinks: true, window_left, ..self.case() };
            // Without a causal mask, a window hides no later keys.
            let cases = Self::both(case.head_dim(64));
            check_all::<bf16, bf16>(cases.into_iter().flat_map(|case| self.stored(case)));
        }
    }

    pub fn attention_sinks(self) {
        self.sinks(None);
    }

    pub fn attention_sinks_and_window(self) {
        for left in [0, 7, 127, 500] {
            self.sinks(Some(left));
        }
    }

    /// No module of FlashInfer's wheels has ALiBi; one that is at hand is tested.
    pub fn alibi(self) {
        for (group, requests) in [(1, self.case().requests), (4, vec![(3, 6_000), (130, 200)])] {
            check_all::<f16, f16>(Self::both(Case { requests, group, alibi: true, ..self.case() }));
        }
    }

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

    /// Scales of quantized values, which are large and small here.
    pub fn v_scale_without_quantization(self) {
        for kv_scales in [(0.5, 0.125), (2.0, 3.5), (1.0, -1.0)] {
            let case = Case { kv_scales: Some(kv_scales), ..self.case() };
            check_all::<bf16, bf16>([case.clone()]);
            check_all::<f16, f16>([case]);
        }
    }

    pub fn wrong_masks(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let case = Case { requests: vec![(2, 9), (3, 5)], ..self.case() };
        let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, case.clone());
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let (tables, other) = (Tables::new(&gpu, &problem), gpu.fork());
        let shapes: [&[(usize, usize)]; 4] =
            [&[(2, 9)], &[(2, 9), (3, 4)], &[(2, 9), (2, 5)], &[(2, 9), (3, 5)]];
        let bits = gpu.cuda.alloc_zeros::<u8>(5).unwrap();
        for shapes in shapes {
            let right = shapes == case.requests;
            let indices =
                MaskTable::new(&gpu.stream, MaskIndices::new(shapes.iter().copied()).unwrap()).unwrap();
            for len in [4, 5] {
                let bits = bits.tensor(&gpu.cuda, &[len]).unwrap();
                let mask = Mask::Custom { indices: &indices, bits: bits.view() };
                let plan = tables.plan(&prefill, &mut workspace, &PlanOptions::default().with_mask(mask));
                match plan {
                    Err(FlashInferError::Unsupported { .. }) => assert_eq!(self.backend, Backend::Fa3),
                    // Three bytes and two.
                    Ok(_) => assert!(right && len == 5 && self.backend == Backend::Fa2),
                    refusal => refused(refusal, "mask"),
                }
            }
        }
        // A prompt that is too short, another batch, another stream.
        let prompts: [&[(usize, &[usize])]; 3] = [&[(5, &[]), (5, &[])], &[(9, &[])], &[(9, &[]), (5, &[])]];
        for (prompts, gpu) in prompts.into_iter().flat_map(|prompts| [(prompts, &gpu), (prompts, &other)]) {
            let items = ItemIndices::new(prompts.iter().copied()).unwrap();
            let items = ItemTable::new(&gpu.stream, items).unwrap();
            let options = PlanOptions::default().with_mask(Mask::MultiItem(&items));
            match tables.plan(&prefill, &mut workspace, &options) {
                Err(FlashInferError::Unsupported { .. }) => assert_eq!(self.kind, Kind::Ragged),
                Ok(_) => {
                    assert!(prompts.len() == 2 && prompts[0].0 == 9 && gpu.stream == *workspace.stream())
                }
                refusal => refused(refusal, "items"),
            }
        }
        problem.check(&gpu, &prefill, &mut workspace);
    }

    pub fn wrong_slopes_and_sinks(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let numbers = Mirrored::<f32>::random(&gpu, rng, &[2, 16]);
        let halves = Mirrored::<f16>::random(&gpu, rng, &[8]);
        for sinks in [false, true] {
            let case = Case { sinks, ..self.case().head_dim(64) };
            let Some(prefill) = prefill_of::<bf16, bf16>(&gpu, &case) else { continue };
            let problem = Problem::<bf16, bf16>::new(&gpu, rng, case.clone());
            let mut workspace = Workspace::new(&gpu.stream).unwrap();
            let tables = Tables::new(&gpu, &problem);
            let plan = tables.plan(&prefill, &mut workspace, &case.plan_options()).unwrap();
            let (mut out, _) = problem.outputs(&gpu);
            let (numbers, halves) = (numbers.device_view(), halves.device_view());
            let row = numbers.select(0, 0).unwrap();
            let right = row.narrow(0, 0, 8).unwrap();
            let spread = numbers.permute(&[1, 0]).unwrap();
            let mut call = |slopes, sinks, v_scale, k_scale| {
                let mut options = RunOptions::default();
                (options.alibi_slopes, options.sinks) = (slopes, sinks);
                (options.v_scale, options.k_scale) = (v_scale, k_scale);
                plan.run(
                    &problem.q.device_view(),
                    &problem.kv.device_view(),
                    &mut out.device_view_mut(),
                    None,
                    &options,
                )
            };
            let wrong = [None, Some(row), Some(halves), Some(spread.narrow(0, 0, 8).unwrap())];
            for wrong in wrong.into_iter().filter(|wrong| sinks || wrong.is_some()) {
                refused(call(None, wrong, None, None), "sinks");
            }
            let needed = sinks.then_some(right);
            refused(call(Some(right), needed, None, None), "alibi_slopes");
            refused(call(None, needed, Some(f32::NAN), None), "v_scale");
            refused(call(None, needed, None, Some(f64::INFINITY)), "k_scale");
            refused(call(None, needed, None, Some(1e-4)), "sm_scale");
            out.assert_untouched();
            problem.check(&gpu, &prefill, &mut Workspace::new(&gpu.stream).unwrap());
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

    /// The output has the same bits with and without LSE, and with and without
    /// programmatic dependent launch.
    pub fn lse_and_pdl_change_nothing(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        for requests in [self.case().requests, vec![(3, 6000), (40, 40)]] {
            let case = Case { requests, ..self.case() };
            let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
            let problem = Problem::<f16, f16>::new(&gpu, rng, case);
            let (case, tables) = (&problem.case, Tables::new(&gpu, &problem));
            let mut workspace = Workspace::new(&gpu.stream).unwrap();
            let plan = tables.plan(&prefill, &mut workspace, &case.plan_options()).unwrap();
            let (want, _) = problem.check_run(&gpu, &plan);
            let dependent = gpu.runtime.compute_capability(0).unwrap().0 >= 9;
            for enable_pdl in [Some(false), dependent.then_some(true)] {
                let (mut out, _) = problem.outputs(&gpu);
                let mut options = case.options();
                options.enable_pdl = enable_pdl;
                problem.run(&plan, &mut out, None, &options).unwrap();
                assert_same_bits("without LSE", &out.download(), &want);
            }
        }
    }

    pub fn sm_scale(self) {
        let cases = [0.01, 0.05, 0.5].map(|scale| Case { sm_scale: Some(scale), ..self.case() });
        check_all::<bf16, bf16>(cases.into_iter().flat_map(Self::both));
    }

    /// Masked products are −50000 before they are scaled, so a factor of 0, one
    /// below 0 or a tiny one unmasks them. It may be refused, but not answered
    /// wrongly.
    pub fn sm_scale_that_unmasks(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for sm_scale in [0.0, -0.1, 1e-6] {
            let case = Case { sm_scale: Some(sm_scale), ..self.case() };
            let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
            let problem = Problem::<f16, f16>::new(&gpu, rng, case);
            let (case, tables) = (&problem.case, Tables::new(&gpu, &problem));
            let plan = tables.plan(&prefill, &mut workspace, &case.plan_options()).unwrap();
            let (mut out, mut lse) = problem.outputs(&gpu);
            match problem.run(&plan, &mut out, Some(&mut lse), &case.options()) {
                Ok(()) => problem.verify(&out, Some(&lse)),
                Err(FlashInferError::InvalidArgument { .. }) => {
                    out.assert_untouched();
                    lse.assert_untouched();
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Windows shorter and longer than requests, at and beside page ends.
    pub fn sliding_window(self) {
        for requests in [self.case().requests, vec![(64, 300), (200, 200), (1, 5000)]] {
            let windows = [0, 1, 15, 16, 127, 1000];
            check_all::<bf16, bf16>(windows.map(|window| Case {
                requests: requests.clone(),
                window_left: Some(window),
                ..self.case()
            }));
        }
    }

    /// Without a causal mask a window has no end: each query also sees all keys
    /// after its position, in a request that is split, too.
    pub fn sliding_window_without_causal(self) {
        for requests in [self.case().requests, vec![(1, 77), (300, 5000)]] {
            check_all::<bf16, bf16>([0, 16, 1000].map(|window| Case {
                requests: requests.clone(),
                window_left: Some(window),
                causal: false,
                ..self.case()
            }));
        }
    }

    /// Soft caps that bend the logits much and little.
    pub fn logits_soft_cap(self) {
        for requests in [self.case().requests, vec![(3, 5000), (64, 64)]] {
            let cases = [1.0, 5.0, 50.0].map(|soft_cap| Case {
                requests: requests.clone(),
                soft_cap: Some(soft_cap),
                sm_scale: Some(0.15),
                ..self.case()
            });
            check_all::<bf16, bf16>(cases.into_iter().flat_map(Self::both));
        }
    }

    /// Both, as Gemma has them.
    pub fn sliding_window_and_soft_cap(self) {
        check_all::<bf16, bf16>([(15, 50.0), (63, 30.0)].map(|(window_left, soft_cap)| Case {
            group: 2,
            window_left: Some(window_left),
            soft_cap: Some(soft_cap),
            ..self.case().head_dim(256)
        }));
    }

    /// 16-bit queries over 8-bit keys and values.
    pub fn e4m3<T: Number>(self) {
        for requests in [self.case().requests, vec![(3, 5000), (64, 300)]] {
            let groups = [1, 4].map(|group| Case { requests: requests.clone(), group, ..self.case() });
            let stored = groups.into_iter().flat_map(|case| self.stored(case));
            let scaled = Case { requests, kv_scales: Some((0.6, 2.7)), ..self.case() };
            check_all::<T, F8E4M3>(stored.chain([scaled]).flat_map(Self::both));
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
        let other = gpu.fork();
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
        let (rng, other) = (&mut Rng::new(), gpu.fork());
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
        let (rng, other) = (&mut Rng::new(), gpu.fork());
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
