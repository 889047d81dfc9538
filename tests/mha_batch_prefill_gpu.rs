//! Batch prefill over ragged keys and values on the GPU against the CPU
//! reference. Outputs are NaN beforehand.
#![cfg(feature = "cudarc")]

mod common;

use common::{
    Gpu, Mirrored, Number, Rng,
    prefill::{Case, Kind, Kv, On, Problem, Tables, check_all, prefill_of},
    refused,
};
use flashinfer_rs::{
    FlashInferError, TensorRef,
    attention::{Backend, BatchPrefill, Heads, Workspace},
    indices::RaggedIndices,
};
use half::{bf16, f16};

prefill_tests!(Ragged: values_of_another_width, neighbours_of_nan, wrong_keys_and_values);

const FA2: On = On { kind: Kind::Ragged, backend: Backend::Fa2 };

/// What is picked without being asked for.
#[test]
fn backends() {
    let Some(gpu) = Gpu::start() else { return };
    let hopper = gpu.compute_capability().0 == 9;
    for (qk, vo) in [(64, 64), (128, 128), (192, 128)] {
        let case = |backend| {
            let case = On { backend, ..FA2 }.case();
            Case { head_dim_qk: qk, head_dim_vo: vo, ..case }
        };
        let available = hopper && prefill_of::<bf16, bf16>(&gpu, &case(Backend::Fa3)).is_some();
        // Of values of another width it takes one request a plan, so FlashAttention 2 comes first.
        let other = qk != vo && prefill_of::<bf16, bf16>(&gpu, &case(Backend::Fa2)).is_some();
        let want = if available && !other { Backend::Fa3 } else { Backend::Fa2 };
        if let Some(prefill) = prefill_of::<bf16, bf16>(&gpu, &case(Backend::Auto)) {
            assert_eq!(prefill.backend(), want);
        }
    }
}

/// A batch that was planned last is not planned again, with tables of its own
/// or not; another one is, and takes its place.
#[test]
fn equal_batches_are_planned_once() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for backend in [Backend::Fa2, Backend::Fa3] {
        let case = |keys| Case { requests: vec![(3, 9), (7, keys)], ..On { backend, ..FA2 }.case() };
        let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case(30)) else { continue };
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        for (keys, plans) in [(30, 1), (30, 1), (3000, 2), (30, 3), (31, 4), (31, 4)] {
            let problem = Problem::<f16, f16>::new(&gpu, rng, case(keys));
            let tables = Tables::new(&gpu, &problem);
            for _ in 0..2 {
                let options = problem.case.plan_options();
                let plan = tables.plan(&prefill, &mut workspace, &options).unwrap();
                problem.check_run(&gpu, &plan);
            }
            assert_eq!(workspace.plans_made(), plans, "{keys} keys, {backend:?}");
        }
        // Nor does a plan that is refused, because a graph may hold the workspace,
        // take the place of the one before.
        let problem = Problem::<f16, f16>::new(&gpu, rng, case(31));
        let (tables, options) =
            (Tables::new(&gpu, &problem), problem.case.graph_options(problem.queries.total()));
        let one = BatchPrefill::new(&gpu.stream, prefill.spec(), Heads::new(1, 1)).unwrap();
        let mut held = Workspace::with_sizes(&gpu.stream, 0, 0).unwrap();
        tables.plan(&one, &mut held, &options).unwrap();
        for _ in 0..2 {
            refused(tables.plan(&prefill, &mut held, &options).map(drop), "workspace");
        }
        tables.plan(&one, &mut held, &options).unwrap();
        assert_eq!(held.plans_made(), 1);
        gpu.synchronize();
    }
}

impl On {
    /// DeepSeek's prefill: queries and keys of 192, values of 128. FlashAttention
    /// 3 takes one request a plan, and refuses more before it changes anything.
    fn values_of_another_width(self) {
        let case = Case { group: 1, head_dim_qk: 192, ..self.case() };
        let batches = [case.requests.clone(), vec![(129, 129), (64, 300), (200, 256)]];
        let fa3 = self.backend == Backend::Fa3;
        let plans = batches.iter().flat_map(|requests| requests.chunks(if fa3 { 1 } else { requests.len() }));
        let cases = plans.map(|requests| Case { requests: requests.to_vec(), ..case.clone() });
        let masks = |case: Case| [true, false].map(|causal| Case { causal, ..case.clone() });
        check_all::<bf16, bf16>(cases.flat_map(masks));
        if !fa3 {
            return;
        }
        let Some(gpu) = Gpu::start() else { return };
        let Some(prefill) = prefill_of::<bf16, bf16>(&gpu, &case) else { return };
        let mut workspace = Workspace::with_sizes(&gpu.stream, 0, 0).unwrap();
        let sizes = |workspace: &Workspace| [workspace.float_bytes(), workspace.int_bytes()];
        let before = sizes(&workspace);
        // What decides are keys behind those of a request that has queries.
        let refusals = [vec![(5, 9), (7, 9)], vec![(5, 9), (0, 7)]].map(|requests| (requests, None));
        let graph = (vec![(5, 9), (0, 0)], Some(5));
        for (requests, graph) in refusals.into_iter().chain([graph]) {
            let problem =
                Problem::<bf16, bf16>::new(&gpu, &mut Rng::new(), Case { requests, ..case.clone() });
            let mut options = problem.case.plan_options();
            options.graph = graph;
            match Tables::new(&gpu, &problem).plan(&prefill, &mut workspace, &options) {
                Err(FlashInferError::Unsupported { what, available }) => {
                    assert!(
                        what.contains("192 and 128") && available.contains("each request on its own"),
                        "{what}"
                    );
                }
                other => panic!("{:?}: {:?}", problem.case.requests, other.map(drop)),
            }
        }
        assert_eq!(sizes(&workspace), before);
    }

    /// A request whose keys and values are NaN spoils its own outputs only.
    fn neighbours_of_nan(self) {
        let Some(gpu) = Gpu::start() else { return };
        let rng = &mut Rng::new();
        let case = Case { requests: vec![(5, 20), (7, 30), (9, 40)], ..self.case() };
        let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, case);
        let (case, tables) = (&problem.case, Tables::new(&gpu, &problem));
        let Kv::Ragged { keys, k, v } = &problem.kv else { unreachable!("ragged keys") };
        let spoiled = |tensor: &Mirrored<f16>| {
            let (mut host, row) = (tensor.host.clone(), case.kv_heads * 128);
            host[20 * row..50 * row].fill(f16::NAN);
            Mirrored::new(&gpu, &tensor.shape(), host)
        };
        let spoiled = Kv::Ragged { keys: keys.clone(), k: spoiled(k), v: spoiled(v) };
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let plan = tables.plan(&prefill, &mut workspace, &case.plan_options()).unwrap();
        let (mut out, _) = problem.outputs(&gpu);
        let (want, _) = problem.check_run(&gpu, &plan);
        {
            let (q, mut out) = (problem.q.device_view(), out.device_view_mut());
            plan.run(&q, &spoiled.device_view(), &mut out.reborrow(), None, &case.options()).unwrap();
        }
        let (got, row) = (out.download(), case.heads().num_qo_heads * 128);
        let same = |rows: std::ops::Range<usize>| {
            let part = rows.start * row..rows.end * row;
            got[part.clone()].iter().zip(&want[part]).all(|(got, want)| got.bits() == want.bits())
        };
        let isolated = same(0..5) && same(12..21);
        assert!(got[5 * row..12 * row].iter().all(|number| number.is_nan()));
        assert!(isolated, "NaN of one request came to another");
        if self.backend != Backend::Fa3 {
            return;
        }
        // Keys and values whose rows are differently far apart are no pages.
        let narrow = Mirrored::<f16>::random(&gpu, rng, &[keys.total(), case.kv_heads, 128]);
        let wide = Mirrored::<f16>::random(&gpu, rng, &[keys.total(), 2 * case.kv_heads, 128]);
        let wide = wide.narrowed(1, 0, case.kv_heads);
        let apart = Kv::Ragged { keys: keys.clone(), k: narrow, v: wide };
        let q = problem.q.device_view();
        let mut out = out.device_view_mut();
        let call = plan.run(&q, &apart.device_view(), &mut out.reborrow(), None, &case.options());
        refused(call, "v");
    }

    fn wrong_keys_and_values(self) {
        let Some(gpu) = Gpu::start() else { return };
        let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
        let case = self.case();
        let Some(prefill) = prefill_of::<f16, f16>(&gpu, &case) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, case.clone());
        let tables = Tables::new(&gpu, &problem);
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let plan = tables.plan(&prefill, &mut workspace, &case.plan_options()).unwrap();
        let common::prefill::Plan::Ragged(ragged) = &plan else { unreachable!("ragged keys") };
        let rows = RaggedIndices::from_lens(case.key_lens()).unwrap().total();
        let (mut out, mut lse) = problem.outputs(&gpu);
        {
            let q = problem.q.device_view();
            let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
            let good = Mirrored::<f16>::random(&gpu, rng, &[rows, 2, 128]);
            let good_guard = good.device_view();
            let good_view = good_guard;
            let mut refuse = |bad: TensorRef<'_>| {
                for (k, v, expected) in [(&bad, &good_view, "k"), (&good_view, &bad, "v")] {
                    let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
                    let call = ragged.run_with(&q, [k, v], &mut out, Some(&mut lse), &case.options());
                    refused(call, expected);
                }
            };
            refuse(Mirrored::<bf16>::random(&gpu, rng, &[rows, 2, 128]).device_view());
            refuse(Mirrored::<f32>::random(&gpu, rng, &[rows, 2, 128]).device_view());
            refuse(Mirrored::<f16>::random(&gpu, rng, &[rows, 256]).device_view());
            refuse(Mirrored::<f16>::random(&gpu, rng, &[rows + 1, 2, 128]).device_view());
            refuse(good_view.narrow(0, 0, rows - 1).unwrap());
            refuse(good_view.narrow(1, 0, 1).unwrap());
            refuse(good_view.narrow(2, 0, 64).unwrap());
            refuse(Mirrored::<f16>::random(&gpu, rng, &[rows, 128, 2]).permuted(&[0, 2, 1]).device_view());
            refuse(Mirrored::<f16>::random(&gpu, rng, &[rows, 2, 136]).narrowed(2, 1, 128).device_view());
            refuse(Mirrored::<f16>::random(&gpu, rng, &[rows, 2, 130]).narrowed(2, 0, 128).device_view());
            refuse(good.view()); // on the host
            refuse(good.copied_to(&other).device_view());
        }
        other.synchronize();
        out.assert_untouched();
        lse.assert_untouched();
        // The refused calls left everything usable.
        problem.check_run(&gpu, &plan);
    }
}
