//! What a spec and a run ask for.

use crate::*;

/// The output has the same bits with and without LSE, in each run, and
/// whatever is said about programmatic dependent launch.
#[test]
fn lse_and_pdl_change_nothing() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for requests in [case().requests, vec![(3, 6000), (40, 400)]] {
        let problem = Problem::<f16, f16>::new(&gpu, rng, Case { requests, ..case() });
        let Some(attention) = attention_of::<f16, f16>(&gpu, &problem.case) else { return };
        let mut workspace = workspace_of(&gpu, &attention);
        let tables = Tables::new(&gpu, &problem);
        let plan = plan(&attention, &mut workspace, &tables, &problem.case).unwrap();
        let (want, _) = check_run(&gpu, &plan, &problem);
        for enable_pdl in [None, Some(false), Some(true)] {
            let (mut out, _) = problem.outputs(&gpu);
            let mut options = problem.case.options();
            options.enable_pdl = enable_pdl;
            plan.run_with(
                &problem.q.device_view(),
                &cache(&problem.kv).device_view(),
                &mut out.device_view_mut(),
                None,
                &options,
            )
            .unwrap();
            assert_same_bits("without LSE", &out.download(), &want);
        }
    }
}

#[test]
fn sm_scale() {
    for requests in [case().requests, vec![(1, 5000), (30, 1000)]] {
        let cases = [0.01, 0.05, 0.5].map(|scale| Case {
            requests: requests.clone(),
            sm_scale: Some(scale),
            ..case()
        });
        check_all::<bf16, bf16>(cases.into_iter().flat_map(both));
    }
}

/// Hidden products are −50000 before they are scaled, so a factor of 0, one
/// below 0 or a tiny one would unmask them.
#[test]
fn sm_scale_that_unmasks() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for sm_scale in [0.0, -0.1, 1e-6, f64::NAN, f64::INFINITY] {
        let mut problem = Problem::<f16, f16>::new(&gpu, rng, case());
        problem.case.sm_scale = Some(sm_scale);
        let Some(attention) = attention_of::<f16, f16>(&gpu, &problem.case) else { return };
        let (mut workspace, tables) = (workspace_of(&gpu, &attention), Tables::new(&gpu, &problem));
        let plan = plan(&attention, &mut workspace, &tables, &problem.case).unwrap();
        let (mut out, mut lse) = problem.outputs(&gpu);
        refused(run(&plan, &problem, &mut out, Some(&mut lse)), "sm_scale");
        out.assert_untouched();
        lse.assert_untouched();
    }
}

/// Soft caps that bend the logits much and little.
#[test]
fn logits_soft_cap() {
    for requests in [case().requests, vec![(3, 5000), (64, 64)]] {
        let cases = [1.0, 5.0, 50.0].map(|soft_cap| Case {
            requests: requests.clone(),
            soft_cap: Some(soft_cap),
            sm_scale: Some(0.15),
            ..case()
        });
        check_all::<bf16, bf16>(cases.into_iter().flat_map(both));
    }
}

/// 16-bit queries over 8-bit keys and values.
#[test]
fn e4m3() {
    for requests in [case().requests, vec![(3, 5000), (64, 300)]] {
        let groups = [1, 4].map(|group| Case { requests: requests.clone(), group, ..case() });
        check_all::<bf16, F8E4M3>(groups.into_iter().flat_map(stored).flat_map(both));
    }
}

/// Scales of quantized keys and values, which these are not.
#[test]
fn scales() {
    for kv_scales in [(0.5, 0.125), (2.0, 3.5), (1.0, -1.0)] {
        let case = Case { kv_scales: Some(kv_scales), ..case() };
        check_all::<bf16, bf16>([case.clone()]);
        check_all::<f16, f16>([case]);
    }
}

/// Queries as the first heads of a joined query-key-value projection.
#[test]
fn strided_queries() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for case in both(Case { requests: vec![(5, 20), (1, 2000), (40, 900)], ..case() }) {
        let Some(attention) = attention_of::<f16, f16>(&gpu, &case) else { return };
        let mut workspace = workspace_of(&gpu, &attention);
        let shape = [case.queries().total(), case.kv_heads * (case.group + 2), 128];
        let q = Mirrored::<f16>::random(&gpu, rng, &shape).narrowed(1, 0, case.heads().num_qo_heads);
        let table = table_among(rng, 200, case.page_size, &case.key_lens());
        let kv = Kv::paged(&gpu, rng, &case, table);
        check(&gpu, &attention, &mut workspace, &Problem::<f16, f16>::solve(case, q, kv));
    }
}

/// Requests that begin with the same pages.
#[test]
fn shared_pages() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let requests = [(&[5, 2, 0][..], 40), (&[5, 2, 7, 1][..], 50), (&[5, 2][..], 32), (&[5, 8][..], 17)];
    for case in both(Case { requests: vec![(8, 40), (18, 50), (32, 32), (1, 17)], ..case() }) {
        let Some(attention) = attention_of::<f16, f16>(&gpu, &case) else { return };
        let mut workspace = workspace_of(&gpu, &attention);
        let table = PageIndices::from_requests(9, 16, requests).unwrap();
        let kv = Kv::paged(&gpu, rng, &case, table);
        check(&gpu, &attention, &mut workspace, &Problem::<f16, f16>::with_kv(&gpu, rng, case, kv));
    }
}
