//! What a spec and a run ask for.

use super::*;

impl On {
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

    /// Scales of quantized values, which are large and small here.
    pub fn v_scale_without_quantization(self) {
        for kv_scales in [(0.5, 0.125), (2.0, 3.5), (1.0, -1.0)] {
            let case = Case { kv_scales: Some(kv_scales), ..self.case() };
            check_all::<bf16, bf16>([case.clone()]);
            check_all::<f16, f16>([case]);
        }
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
            let dependent = gpu.compute_capability().0 >= 9;
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
}
