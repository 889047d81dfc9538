//! Custom masks and multi-item scoring.

use super::*;

impl On {
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

    pub fn wrong_masks(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let case = Case { requests: vec![(2, 9), (3, 5)], ..self.case() };
        let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, case.clone());
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let (tables, other) = (Tables::new(&gpu, &problem), gpu.elsewhere());
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
}
