//! Batch prefill over pages on the GPU against the CPU reference.
//!
//! Cache slots that hold no token are NaN, and so are outputs beforehand, so
//! that whatever is read or left out by mistake shows.
#![cfg(feature = "cudarc")]

mod common;

use common::{
    Gpu, Number, Rng,
    attention::refuse_caches,
    cache::table_among,
    prefill::{Captured, Case, Kind, Kv, On, Problem, Tables, prefill_of},
    refused,
};
use cudarc::driver::CudaSlice;
use flashinfer_rs::{
    DType, FlashInferError, PageIndices, PageTable,
    attention::{AttentionSpec, Backend, BatchPrefill, Heads, PagedBatch, Workspace},
    gpu::TensorExt,
    kv::{KvLayout, PagedKv},
};
use float8::F8E4M3;
use half::{bf16, f16};

prefill_tests!(Paged: shared_pages, graph_of_long_keys, cache_beyond_32_bits, wrong_caches);

const FA2: On = On { kind: Kind::Paged, backend: Backend::Fa2 };

const FA3: On = On { backend: Backend::Fa3, ..FA2 };

#[test]
fn multi_item_scoring_fa2() {
    FA2.multi_item_scoring::<f16>();
    FA2.multi_item_scoring::<bf16>();
}

#[test]
fn multi_item_scoring_fa3() {
    FA3.multi_item_scoring::<f16>();
    FA3.multi_item_scoring::<bf16>();
}

#[test]
fn multi_item_scoring_of_many_keys() {
    FA2.multi_item_scoring_of_many_keys();
    FA3.multi_item_scoring_of_many_keys();
}

#[test]
fn multi_item_scoring_of_parts_fa2() {
    FA2.multi_item_scoring_of_parts();
}

#[test]
fn multi_item_scoring_of_parts_fa3() {
    FA3.multi_item_scoring_of_parts();
}

/// What is picked, and what cannot be asked for.
#[test]
fn backends() {
    let Some(gpu) = Gpu::start() else { return };
    let auto = On { backend: Backend::Auto, ..FA2 };
    let hopper = gpu.compute_capability().0 == 9;
    fn picked<T: Number>(gpu: &Gpu, case: &Case, hopper: bool) {
        let fa3 = Case { on: On { backend: Backend::Fa3, ..FA2 }, ..case.clone() };
        // Without the module of FlashAttention 3, 2 is picked.
        let available = hopper && prefill_of::<T, T>(gpu, &fa3).is_some();
        let want = if available { Backend::Fa3 } else { Backend::Fa2 };
        if let Some(prefill) = prefill_of::<T, T>(gpu, case) {
            assert_eq!(prefill.backend(), want);
        }
    }
    for head_dim in [64, 128] {
        let case = auto.case().head_dim(head_dim);
        picked::<f16>(&gpu, &case, hopper);
        picked::<bf16>(&gpu, &case, hopper);
    }
    if let Some(prefill) = prefill_of::<f16, f16>(&gpu, &auto.case().head_dim(256)) {
        assert_eq!(prefill.backend(), Backend::Fa2);
    }
    if let Some(prefill) = prefill_of::<bf16, F8E4M3>(&gpu, &auto.case()) {
        assert_eq!(prefill.backend(), Backend::Fa2);
    }
    let spec = AttentionSpec::new(DType::F16, 128);
    for spec in [
        spec.with_backend(Backend::CudaCores),
        spec.with_kv_dtype(DType::E4M3).with_backend(Backend::Fa3),
        AttentionSpec::new(DType::F32, 128),
        spec.with_kv_dtype(DType::I8),
        spec.with_logits_soft_cap(0.0),
        spec.with_window_left(u32::MAX),
    ] {
        let error = BatchPrefill::new(&gpu.stream, &spec, Heads::new(8, 2)).unwrap_err();
        assert!(matches!(error, FlashInferError::Unsupported { .. }), "{spec:?}: {error}");
    }
}

impl On {
    /// Requests that begin with the same pages.
    fn shared_pages(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let case = Case { requests: vec![(8, 40), (18, 50), (32, 32)], ..self.case() };
        let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
        let requests = [(&[5, 2, 0][..], 40), (&[5, 2, 7, 1][..], 50), (&[5, 2][..], 32)];
        for causal in [true, false] {
            let case = Case { causal, ..case.clone() };
            let table = PageIndices::from_requests(9, 16, requests).unwrap();
            let kv = Kv::paged(&gpu, rng, &case, table);
            Problem::<f16, f16>::with_kv(&gpu, rng, case, kv).check(&gpu, &prefill, &mut workspace);
        }
    }

    /// One graph for few queries and heads over short and very long requests,
    /// whose keys are divided among the blocks of the captured launch.
    fn graph_of_long_keys(self) {
        const PAGES: usize = 2600;
        const ROWS: usize = 8;
        let Some(gpu) = Gpu::start_alone() else { return };
        let rng = &mut Rng::new();
        let case = Case { kv_heads: 1, group: 2, ..self.case() };
        let Some(prefill) = prefill_of::<bf16, bf16>(&gpu, &case) else { return };
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let problem = |rng: &mut Rng, requests: [(usize, usize); 2]| {
            let case = Case { requests: requests.to_vec(), ..case.clone() };
            let table = table_among(rng, PAGES, case.page_size, &case.key_lens());
            let kv = Kv::paged(&gpu, rng, &case, table);
            Problem::<bf16, bf16>::with_kv(&gpu, rng, case, kv)
        };
        let first = problem(rng, [(1, 5), (2, 9)]);
        let mut tables = Tables::with_capacity(&gpu, &first, 2, PAGES);
        let mut captured = Captured::new(&gpu, &prefill, first, ROWS, &mut workspace, &tables);
        for requests in [
            [(1, 40_000), (1, 3)],
            [(1, 5), (2, 9)],
            [(3, 17_000), (5, 24_001)],
            [(0, 0), (8, 41_000)],
            [(4, 4), (0, 33_333)],
        ] {
            let step = problem(rng, requests);
            captured.replay(&gpu, &prefill, &step, &mut workspace, &mut tables);
        }
    }

    /// Offsets in a cache of more than 2³² elements are 64-bit.
    fn cache_beyond_32_bits(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        // The same two pages, once as a small cache and once as the first and
        // the last page of 8 GiB.
        let case = Case { requests: vec![(20, 32)], kv_heads: 8, joined: true, ..self.case() };
        let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
        let small = PageIndices::from_requests(2, 16, [(&[1, 0][..], 32)]).unwrap();
        let kv = Kv::paged(&gpu, rng, &case, small);
        let problem = Problem::<f16, f16>::with_kv(&gpu, rng, case.clone(), kv);
        let Kv::Paged { cache, .. } = &problem.kv else { unreachable!("pages") };
        let page = 2 * 16 * 8 * 128;
        let pages = (1usize << 32) / page + 2;
        let mut storage: CudaSlice<f16> = gpu.cuda.alloc_zeros(pages * page).unwrap();
        let (first, last) = cache.tensors[0].host.split_at(page);
        gpu.cuda.memcpy_htod(first, &mut storage.slice_mut(..page)).unwrap();
        gpu.cuda.memcpy_htod(last, &mut storage.slice_mut((pages - 1) * page..)).unwrap();
        let table = PageIndices::from_requests(pages, 16, [(&[pages as i32 - 1, 0][..], 32)]).unwrap();
        let table = PageTable::new(&gpu.stream, table).unwrap();
        let queries = Tables::new(&gpu, &problem).queries;
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let plan = prefill
            .plan_paged(&mut workspace, PagedBatch::new(&queries, &table), &case.plan_options())
            .unwrap();
        let (mut out, mut lse) = problem.outputs(&gpu);
        let storage = storage.tensor(&gpu.cuda, &[pages, 2, 16, 8, 128]).unwrap();
        plan.run_with(
            &problem.q.device_view(),
            &PagedKv::joined(storage.view(), KvLayout::Nhd).unwrap(),
            &mut out.device_view_mut(),
            Some(&mut lse.device_view_mut()),
            &case.options(),
        )
        .unwrap();
        problem.verify(&out, Some(&lse));
    }

    fn wrong_caches(self) {
        let Some(gpu) = Gpu::start() else { return };
        let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
        let case = self.case();
        let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, case.clone());
        let Kv::Paged { table, .. } = &problem.kv else { unreachable!("pages") };
        let queries = Tables::new(&gpu, &problem).queries;
        let on_device = PageTable::new(&gpu.stream, table.clone()).unwrap();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let plan = prefill
            .plan_paged(&mut workspace, PagedBatch::new(&queries, &on_device), &case.plan_options())
            .unwrap();
        let (mut out, mut lse) = problem.outputs(&gpu);
        {
            let q = problem.q.device_view();
            let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
            refuse_caches(&gpu, &other, rng, table.num_pages(), &mut |kv| {
                plan.run_with(&q, kv, &mut out.reborrow(), Some(&mut lse.reborrow()), &case.options())
            });
        }
        out.assert_untouched();
        lse.assert_untouched();
        // Heads that are not the plan's.
        let more = Case { kv_heads: 4, ..case.clone() };
        let more = Problem::<f16, f16>::new(&gpu, rng, more);
        let Kv::Paged { cache, .. } = &more.kv else { unreachable!("pages") };
        let call = plan.run_with(
            &problem.q.device_view(),
            &cache.device_view(),
            &mut out.device_view_mut(),
            None,
            &case.options(),
        );
        refused(call, "kv.k");
        out.assert_untouched();
        // The refused calls left everything usable.
        problem.check(&gpu, &prefill, &mut Workspace::new(&gpu.stream).unwrap());
    }
}
