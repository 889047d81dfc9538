//! Prefill of one request on the GPU against the CPU reference. Outputs are NaN
//! beforehand.
#![cfg(feature = "cudarc")]

mod common;

use common::{
    Gpu, Mirrored, Number, Rng,
    attention::refuse_unlike,
    prefill::{Case, CaseMask, DeviceMask, Kind, Kv, Masked, On, Problem, check_all, check_problem},
    refused,
    single::{self, Single},
};
use flashinfer_rs::{
    DType, FlashInferError, TensorRef,
    attention::{AttentionSpec, Backend, Mask, PosEncodingMode, RunOptions, SinglePrefill, Workspace},
    gpu::TensorExt,
    indices::{ItemIndices, ItemTable, MaskIndices, MaskTable, RaggedIndices},
    kv::KvLayout,
};
use half::{bf16, f16};

prefill_tests! { @all Single:
    f16_64: shapes::<f16>(64);
    f16_128: shapes::<f16>(128);
    bf16_64: shapes::<bf16>(64);
    bf16_128: shapes::<bf16>(128);
    f16_tiles: tiles::<f16>();
    bf16_tiles: tiles::<bf16>();
    random_batches_64: random_batches(64);
    random_batches_128: random_batches(128);
    chunked_prefill: chunked_prefill();
    edges_of_chunks: edges_of_chunks();
    many_keys: many_keys();
    no_keys: no_keys_for_some();
    more_queries_than_keys: more_queries_than_keys_are_refused();
    lse_changes_nothing: lse_changes_nothing();
    scratch_is_asked_for: scratch_is_asked_for();
    sm_scale: sm_scale();
    sm_scale_that_unmasks: sm_scale_that_unmasks_is_refused();
    sliding_window: sliding_window();
    sliding_window_without_causal: sliding_window_without_causal();
    v_scale_without_quantization: v_scale_without_quantization();
    strided: strided();
    part_of_a_cache: part_of_a_cache();
    one_head_with_an_uneven_stride: one_head_of_a_wider_tensor();
    heads_that_repeat: heads_that_repeat();
    nothing_to_do: no_queries();
    f16_graph_replay: replay::<f16>();
    bf16_graph_replay: replay::<bf16>();
    two_streams_at_once: two_streams();
    wrong_queries_and_outputs: wrong_tensors();
    wrong_keys_and_values: wrong_keys();
    wrong_masks: masks_that_do_not_fit();
    wrong_options: wrong_options();
}

prefill_tests! { @fa2 Single:
    f16_custom_masks: custom_masks::<f16>();
    bf16_custom_masks: custom_masks::<bf16>();
    long_custom_mask: long_custom_mask();
    custom_mask_and_window: custom_mask_and_window();
    graph_replay_of_custom_masks: replay_of_custom_masks();
    more_heads_than_a_merge_has_threads_for: more_heads_than_a_merge_has_threads_for();
    alibi: alibi();
    f16_256: shapes::<f16>(256);
    logits_soft_cap: logits_soft_cap();
    sliding_window_and_soft_cap: sliding_window_and_soft_cap();
    f16_over_e4m3: e4m3::<f16>();
    bf16_over_e4m3: e4m3::<bf16>();
}

/// What is picked without being asked for, and what there is not.
#[test]
fn backends() {
    let Some(gpu) = Gpu::start() else { return };
    let hopper = gpu.compute_capability().0 == 9;
    let case = |backend| On { kind: Kind::Single, backend }.case();
    for head_dim in [64, 128] {
        let of = |backend| Single::of::<bf16, bf16>(&gpu, &case(backend).head_dim(head_dim));
        let fa3 = hopper && of(Backend::Fa3).is_some();
        // The core is there, or its absence is allowed, and said.
        if let Some(Single::Prefill(prefill)) = of(Backend::Auto) {
            assert_eq!(prefill.backend(), if fa3 { Backend::Fa3 } else { Backend::Fa2 });
            assert_eq!(prefill.module().name().as_str().ends_with("_sm90"), fa3);
        }
    }
    let spec = AttentionSpec::new(DType::BF16, 128);
    let mut unlike = vec![
        spec.with_backend(Backend::CudaCores),
        spec.with_attention_sink(),
        spec.with_kv_dtype(DType::F16),
        spec.with_pos_encoding_mode(PosEncodingMode::Alibi).with_backend(Backend::Fa3),
    ];
    let mut eight_bits = AttentionSpec::new(DType::E4M3, 128);
    eight_bits.dtype_o = DType::BF16;
    unlike.push(eight_bits);
    if !hopper {
        unlike.push(spec.with_backend(Backend::Fa3));
    }
    for spec in unlike {
        match SinglePrefill::new(&gpu.stream, &spec) {
            Err(FlashInferError::Unsupported { .. }) => {}
            other => panic!("{spec:?}: {other:?}"),
        }
    }
}

impl On {
    fn of(self, requests: &[(usize, usize)]) -> Case {
        Case { requests: requests.to_vec(), ..self.case() }
    }

    fn both_of(self, requests: &[(usize, usize)]) -> [Case; 2] {
        [true, false].map(|causal| Case { causal, ..self.of(requests) })
    }

    /// Keys at and beside multiples of 256, of which blocks get no fewer.
    fn edges_of_chunks(self) {
        let keys = [255, 256, 257, 511, 512, 513, 767, 1025];
        for queries in [1, 2, 40] {
            let cases = self.both_of(&keys.map(|keys| (queries, keys)));
            check_all::<f16, f16>(cases.map(|case| Case { kv_heads: 1, ..case }));
        }
    }

    /// Few queries over so many keys that every block of the GPU has some, and
    /// more queries, whose tiles leave fewer blocks.
    fn many_keys(self) {
        let few = Case { kv_heads: 1, group: 2, ..self.of(&[(3, 131_072)]) };
        check_all::<f16, f16>([few.clone(), Case { causal: false, layout: KvLayout::Hnd, ..few.clone() }]);
        check_all::<bf16, bf16>(
            [Case { requests: vec![(1, 131_072)], group: 5, ..few.clone() }.head_dim(64)],
        );
        check_all::<bf16, bf16>([Case { requests: vec![(60, 10_000), (300, 2_100)], ..few }]);
    }

    fn more_queries_than_keys_are_refused(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for case in self.of(&[(20, 5), (300, 100), (130, 129)]).parts() {
            let Some(single) = Single::of::<f16, f16>(&gpu, &case) else { return };
            let problem = Problem::<f16, f16>::new(&gpu, rng, case.clone());
            let (mut out, _) = problem.outputs(&gpu);
            let plain = DeviceMask::Plain;
            refused(single.run_problem(&gpu, &problem, &mut workspace, &plain, &mut out, None), "queries");
            out.assert_untouched();
            assert!(check_problem(
                &gpu,
                &Problem::<f16, f16>::new(&gpu, rng, Case { causal: false, ..case }),
                &mut workspace
            ));
        }
    }

    fn lse_changes_nothing(self) {
        single::lse_changes_nothing(self.both_of(&[(1, 1), (33, 40), (3, 6_000), (9, 0)]));
    }

    fn scratch_is_asked_for(self) {
        let fa2 = self.backend == Backend::Fa2;
        for requests in [[(3, 20_000)], [(1, 257)], [(50, 3_000)]] {
            single::scratch_is_asked_for(Case { kv_heads: 1, ..self.of(&requests) }, fa2);
        }
        for requests in [[(3, 256)], [(1, 0)]] {
            single::scratch_is_asked_for(Case { causal: false, ..self.of(&requests) }, false);
        }
        // So many heads that there is no block left for a second part.
        let heads = Case { kv_heads: 1_100, group: 1, ..self.of(&[(1, 257)]) };
        single::scratch_is_asked_for(heads.head_dim(64), false);
    }

    fn sm_scale_that_unmasks_is_refused(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for sm_scale in [0.0, -0.1, 1e-6, f64::NAN, f64::INFINITY] {
            let case = Case { sm_scale: Some(sm_scale), ..self.of(&[(9, 20)]) };
            let Some(single) = Single::of::<f16, f16>(&gpu, &case) else { return };
            let problem = Problem::<f16, f16>::new(&gpu, rng, case);
            let (mut out, _) = problem.outputs(&gpu);
            let plain = DeviceMask::Plain;
            refused(single.run_problem(&gpu, &problem, &mut workspace, &plain, &mut out, None), "sm_scale");
            out.assert_untouched();
        }
    }

    /// What is behind the last key is not looked at, wherever that is.
    fn part_of_a_cache(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for requests in [[(33, 131)], [(1, 300)], [(5, 3_000)], [(200, 200)]] {
            for case in self.both_of(&requests) {
                for layout in [KvLayout::Nhd, KvLayout::Hnd] {
                    let case = Case { layout, ..case.clone() };
                    let q = Mirrored::random(&gpu, rng, &case.q_shape(requests[0].0));
                    let kv = single::cached(&gpu, rng, &case, 77);
                    if !check_problem(&gpu, &Problem::<bf16, bf16>::solve(case, q, kv), &mut workspace) {
                        return;
                    }
                }
            }
        }
    }

    /// The only head of wider tensors. Nobody steps over it, so its stride,
    /// which is no multiple of 16 bytes, does not matter.
    fn one_head_of_a_wider_tensor(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let case = Case { kv_heads: 1, group: 1, ..self.of(&[(20, 300)]) };
        let mut part =
            |rows| Mirrored::random(&gpu, rng, &[rows, 8, 130]).narrowed(1, 0, 1).narrowed(2, 0, 128);
        let (q, k, v) = (part(20), part(300), part(300));
        let kv = Kv::Ragged { keys: RaggedIndices::from_lens([300]).unwrap(), k, v };
        check_problem(&gpu, &Problem::<f16, f16>::solve(case, q, kv), &mut workspace);
    }

    /// One head of keys and values that stands for all, with a stride of 0.
    /// FlashAttention 3 describes tensors to hardware, and does not take it.
    fn heads_that_repeat(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let case = Case { kv_heads: 2, ..self.of(&[(20, 300)]) };
        let Some(single) = Single::of::<f16, f16>(&gpu, &case) else { return };
        let mut one = || Mirrored::<f16>::random(&gpu, rng, &[300, 128]);
        let (k, v) = (one(), one());
        let twice = |one: &Mirrored<f16>| {
            let rows = one.host.chunks(128).flat_map(|row| [row, row]).flatten().copied().collect();
            Mirrored::new(&gpu, &[300, 2, 128], rows)
        };
        let kv = Kv::Ragged { keys: RaggedIndices::from_lens([300]).unwrap(), k: twice(&k), v: twice(&v) };
        let q = Mirrored::random(&gpu, rng, &case.q_shape(20));
        let problem = Problem::<f16, f16>::solve(case, q, kv);
        let (mut out, _) = problem.outputs(&gpu);
        let call = {
            let [k, v] = [&k, &v].map(|one| gpu.cuda.clone_htod(&one.host).unwrap());
            let repeat = |one| TensorExt::tensor_strided(one, &gpu.cuda, &[300, 2, 128], Some(&[128, 0, 1]));
            let (k, v) = (repeat(&k).unwrap(), repeat(&v).unwrap());
            single.run(
                &mut workspace,
                &problem.q.device_view(),
                [&k.view(), &v.view()],
                &mut out.device_view_mut(),
                None,
                (Mask::Causal, &problem.case.options()),
            )
        };
        if self.backend == Backend::Fa3 {
            refused(call, "k");
            out.assert_untouched();
        } else {
            call.unwrap();
            problem.verify(&out, None);
        }
    }

    /// The parts of a row's heads can be merged by one block, or keys are not
    /// divided; see `keys_stay_together_where_parts_cannot_be_merged`.
    fn more_heads_than_a_merge_has_threads_for(self) {
        for (head_dim, group) in [(64, 128), (64, 130), (128, 64), (128, 66)] {
            let case = Case { kv_heads: 1, group, ..self.of(&[(10, 600), (1, 600)]) };
            check_all::<f16, f16>([case.head_dim(head_dim)]);
        }
    }

    fn no_queries(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for case in self.of(&[(0, 5), (0, 0)]).parts() {
            let problem = Problem::<f16, f16>::new(&gpu, rng, case);
            if !check_problem(&gpu, &problem, &mut workspace) {
                return;
            }
            let Some(single) = Single::of::<f16, f16>(&gpu, &problem.case) else { return };
            // A run still looks at its arguments.
            let (mut out, _) = problem.outputs_of(&gpu, 1);
            let plain = DeviceMask::Plain;
            refused(single.run_problem(&gpu, &problem, &mut workspace, &plain, &mut out, None), "out");
            out.assert_untouched();
        }
    }

    fn replay<T: Number>(self) {
        let cases = [(3, 5_000), (40, 40), (7, 0)].map(|request| self.of(&[request]));
        single::graph_replay::<T>(
            cases.into_iter().chain([Case { causal: false, ..self.of(&[(130, 257)]) }]),
        );
    }

    fn replay_of_custom_masks(self) {
        let masked = Masked::Custom(0.4);
        single::graph_replay::<f16>(
            [(3, 5_000), (40, 50)].map(|request| Case { masked: masked.clone(), ..self.of(&[request]) }),
        );
    }

    fn two_streams(self) {
        let requests = [(1, 1), (40, 300), (3, 4_000), (130, 130), (5, 0)];
        single::two_streams_at_once([
            self.of(&requests),
            Case { group: 1, causal: false, ..self.of(&requests) },
        ]);
    }

    /// A case whose tensors the tests of wrong input are made for.
    fn right(self) -> Case {
        self.of(&[(9, 20)])
    }

    fn wrong_tensors(self) {
        let Some(gpu) = Gpu::start() else { return };
        let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
        let Some(single) = Single::of::<f16, f16>(&gpu, &self.right()) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, self.right());
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let mut elsewhere = Workspace::new(&other.stream).unwrap();
        {
            let Kv::Ragged { k, v, .. } = &problem.kv else { unreachable!("keys of one request") };
            let (k, v) = (k.device_view(), v.device_view());
            let (kv, options) = ([&k, &v], (Mask::Causal, &RunOptions::default()));
            refuse_unlike(&gpu, &other, rng, &problem.q, "out", &mut |q, out, lse| {
                single.run(&mut workspace, q, kv, out, lse, options)
            });
            // Runs go to the workspace's stream, for which these views are not.
            let (q, (mut out, _)) = (problem.q.device_view(), problem.outputs(&gpu));
            {
                let mut out = out.device_view_mut();
                refused(single.run(&mut elsewhere, &q, kv, &mut out.reborrow(), None, options), "q");
            }
            out.assert_untouched();
        }
        // The refused calls left everything usable.
        single.check(&gpu, &problem, &mut workspace);
    }

    fn wrong_keys(self) {
        let Some(gpu) = Gpu::start() else { return };
        let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
        let Some(single) = Single::of::<f16, f16>(&gpu, &self.right()) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, self.right());
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let (mut out, mut lse) = problem.outputs(&gpu);
        {
            let (q, mut out, mut lse) =
                (problem.q.device_view(), out.device_view_mut(), lse.device_view_mut());
            let good = Mirrored::<f16>::random(&gpu, rng, &[20, 2, 128]);
            let good_guard = good.device_view();
            let good_view = good_guard;
            let mut call = |k: &TensorRef<'_>, v: &TensorRef<'_>, expected| {
                let options = (Mask::Causal, &RunOptions::default());
                let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
                let call = single.run(&mut workspace, &q, [k, v], &mut out, Some(&mut lse), options);
                refused(call, expected);
            };
            // As keys and as values; what is said of the number of keys, and of
            // heads, is what values do not share.
            let mut refuse = |bad: TensorRef<'_>, unlike: bool| {
                call(&bad, &good_view, if unlike { "v" } else { "k" });
                call(&good_view, &bad, "v");
            };
            refuse(Mirrored::<bf16>::random(&gpu, rng, &[20, 2, 128]).device_view(), false);
            refuse(Mirrored::<f32>::random(&gpu, rng, &[20, 2, 128]).device_view(), false);
            refuse(Mirrored::<f16>::random(&gpu, rng, &[20, 256]).device_view(), false);
            refuse(Mirrored::<f16>::random(&gpu, rng, &[21, 2, 128]).device_view(), true);
            refuse(good_view.narrow(0, 0, 19).unwrap(), true);
            refuse(good_view.narrow(1, 0, 1).unwrap(), true);
            refuse(good_view.narrow(2, 0, 64).unwrap(), false);
            let columns = Mirrored::<f16>::random(&gpu, rng, &[20, 128, 2]).permuted(&[0, 2, 1]);
            refuse(columns.device_view(), false);
            let odd = Mirrored::<f16>::random(&gpu, rng, &[20, 2, 136]).narrowed(2, 1, 128);
            refuse(odd.device_view(), false);
            let uneven = Mirrored::<f16>::random(&gpu, rng, &[20, 2, 130]).narrowed(2, 0, 128);
            refuse(uneven.device_view(), false);
            refuse(good.view(), false); // on the host
            refuse(good.copied_to(&other).device_view(), false);
            let three = Mirrored::<f16>::random(&gpu, rng, &[20, 3, 128]);
            let three = three.device_view();
            call(&three, &three, "heads");
            // So many keys that positions could not be added up.
            let (shape, strides) = ([(1 << 30) + 1, 2, 128], Some(&[0, 128, 1][..]));
            let (data, device) = (good_view.data_ptr(), good_view.device());
            // SAFETY: the first key, again and again.
            let many =
                unsafe { TensorRef::from_raw_parts(data, device, DType::F16, &shape, strides) }.unwrap();
            let (mask, mut out) = ((Mask::None, &RunOptions::default()), out.reborrow());
            let error = single.run(&mut workspace, &q, [&many, &many], &mut out, None, mask).unwrap_err();
            assert!(error.to_string().contains("at most 2^30"), "{error}");
        }
        other.synchronize();
        out.assert_untouched();
        lse.assert_untouched();
        // The refused calls left everything usable.
        single.check(&gpu, &problem, &mut workspace);
    }

    fn masks_that_do_not_fit(self) {
        let Some(gpu) = Gpu::start() else { return };
        let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
        let Some(single) = Single::of::<f16, f16>(&gpu, &self.right()) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, self.right());
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let (mut out, mut lse) = problem.outputs(&gpu);
        let unsupported = |call| match call {
            Err(FlashInferError::Unsupported { .. }) => {}
            other => panic!("{other:?}"),
        };
        let mut call = |mask: &DeviceMask| {
            single.run_problem(&gpu, &problem, &mut workspace, mask, &mut out, Some(&mut lse))
        };
        // 9 queries over 20 keys are 180 bits in 23 bytes.
        let shapes: [&[(usize, usize)]; 5] = [&[], &[(9, 19)], &[(20, 9)], &[(9, 20), (0, 0)], &[(9, 20)]];
        for (shapes, bytes, stream) in
            shapes.iter().map(|&shapes| (shapes, 22, &gpu.stream)).chain([(shapes[4], 23, &other.stream)])
        {
            let indices = MaskIndices::new(shapes.iter().copied()).unwrap();
            let mask = DeviceMask::Custom {
                indices: MaskTable::new(stream, indices).unwrap(),
                bits: gpu.cuda.alloc_zeros::<u8>(bytes).unwrap(),
            };
            match self.backend {
                Backend::Fa3 => unsupported(call(&mask)),
                _ => refused(call(&mask), "mask"),
            }
        }
        let items = ItemIndices::new([(20, &[][..])]).unwrap();
        unsupported(call(&DeviceMask::Items(ItemTable::new(&gpu.stream, items).unwrap())));
        out.assert_untouched();
        lse.assert_untouched();
        // The refused calls left everything usable.
        assert!(matches!(problem.mask, CaseMask::Plain { causal: true }));
        single.check(&gpu, &problem, &mut workspace);
    }

    fn wrong_options(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let Some(single) = Single::of::<f16, f16>(&gpu, &self.right()) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, self.right());
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let numbers = Mirrored::<f32>::random(&gpu, rng, &[8]);
        let (mut out, _) = problem.outputs(&gpu);
        {
            let Kv::Ragged { k, v, .. } = &problem.kv else { unreachable!("keys of one request") };
            let (q, k, v, mut out) =
                (problem.q.device_view(), k.device_view(), v.device_view(), out.device_view_mut());
            let (kv, numbers) = ([&k, &v], numbers.device_view());
            let mut refuse = |set: &dyn Fn(&mut RunOptions<'_>), expected| {
                let mut options = RunOptions::default();
                set(&mut options);
                let mut out = out.reborrow();
                let call = single.run(&mut workspace, &q, kv, &mut out, None, (Mask::None, &options));
                refused(call, expected);
            };
            refuse(&|options| options.v_scale = Some(f32::NAN), "v_scale");
            refuse(&|options| options.k_scale = Some(f64::INFINITY), "k_scale");
            refuse(&|options| options.k_scale = Some(1e-4), "sm_scale");
            for (sinks, expected) in [(true, "sinks"), (false, "alibi_slopes")] {
                let mut options = RunOptions::default();
                let given = Some(numbers);
                (options.sinks, options.alibi_slopes) = if sinks { (given, None) } else { (None, given) };
                let mut out = out.reborrow();
                let mask = (Mask::None, &options);
                refused(single.run(&mut workspace, &q, kv, &mut out, None, mask), expected);
            }
        }
        out.assert_untouched();
        // The refused calls left everything usable.
        single.check(&gpu, &problem, &mut workspace);
    }
}
