//! Prefill and decode of one request: what runs the problems of prefill, and the
//! tests that both have in common.

use flashinfer_rs::{
    FlashInferError, Result, TensorMut, TensorRef,
    attention::{
        AttentionSpec, Backend, Mask, PrefillRunOptions, RunOptions, SingleDecode, SinglePrefill, Workspace,
    },
    indices::RaggedIndices,
    kv::KvLayout,
    reference,
};
use half::f16;

use super::{
    Gpu, Mirrored, Number, Rng, assert_same_bits,
    attention::capture,
    prefill::{Case, CaseMask, DeviceKv, DeviceMask, Kv, Masked, Problem, available},
};

/// What runs a case of [`Kind::Single`](super::prefill::Kind::Single).
#[derive(Clone, Copy)]
pub enum Single {
    Prefill(SinglePrefill),
    Decode(SingleDecode),
}

impl Single {
    /// What serves a case, if it is [`available`].
    pub fn of<T: Number, K: Number>(gpu: &Gpu, case: &Case) -> Option<Self> {
        let spec = case.spec::<T, K>();
        if case.on.backend == Backend::CudaCores {
            let decode = SingleDecode::new(&gpu.stream, &spec, case.heads());
            return available::<T, K, _>(gpu, case, decode).map(Self::Decode);
        }
        let prefill = SinglePrefill::new(&gpu.stream, &spec);
        let prefill = available::<T, K, _>(gpu, case, prefill)?;
        if case.on.backend != Backend::Auto {
            assert_eq!(prefill.backend(), case.on.backend);
        }
        Some(Self::Prefill(prefill))
    }

    /// Runs with tensors of prefill. Decode gets the first of their rows, and
    /// no mask, since the query sees all keys.
    pub fn run(
        &self,
        workspace: &mut Workspace,
        q: &TensorRef<'_>,
        kv: [&TensorRef<'_>; 2],
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        (mask, options): (Mask<'_>, &RunOptions<'_>),
    ) -> Result<()> {
        match self {
            Self::Prefill(prefill) => {
                prefill.run_with(workspace, q, kv, out, lse, &PrefillRunOptions::new(mask, *options))
            }
            Self::Decode(decode) => {
                let mut out = out.reborrow().select(0, 0)?;
                let mut lse = lse.map(|lse| lse.reborrow().select(0, 0)).transpose()?;
                decode.run_with(workspace, &q.select(0, 0)?, kv, &mut out, lse.as_mut(), options)
            }
        }
    }

    /// Runs a problem with the mask that is on the device, if there is one.
    pub fn run_problem<T: Number, K: Number>(
        &self,
        gpu: &Gpu,
        problem: &Problem<T, K>,
        workspace: &mut Workspace,
        mask: &DeviceMask,
        out: &mut Mirrored<T>,
        lse: Option<&mut Mirrored<f32>>,
    ) -> Result<()> {
        let mut lse = lse.map(|lse| lse.device_view_mut());
        let slopes = problem.per_head[0].as_ref().map(|slopes| slopes.device_view());
        let mut options = problem.case.options();
        options.alibi_slopes = slopes;
        let DeviceKv::Ragged(kv) = problem.kv.device_view() else { unreachable!("keys of one request") };
        self.run(
            workspace,
            &problem.q.device_view(),
            [&kv[0], &kv[1]],
            &mut out.device_view_mut(),
            lse.as_mut().map(|lse| lse.reborrow()).as_mut(),
            (mask.or(gpu, plain(&problem.mask)), &options),
        )
    }

    /// Runs a problem and compares with the reference.
    #[track_caller]
    pub fn check<T: Number, K: Number>(
        &self,
        gpu: &Gpu,
        problem: &Problem<T, K>,
        workspace: &mut Workspace,
    ) -> (Vec<T>, Vec<f32>) {
        let mask = DeviceMask::new(gpu, &problem.mask, 0, 0);
        let (mut out, mut lse) = problem.outputs(gpu);
        self.run_problem(gpu, problem, workspace, &mask, &mut out, Some(&mut lse)).unwrap();
        problem.verify(&out, Some(&lse));
        (out.download(), lse.download())
    }
}

/// A mask that needs nothing on the device.
fn plain(mask: &CaseMask) -> Mask<'static> {
    if matches!(mask, CaseMask::Plain { causal: true }) { Mask::Causal } else { Mask::None }
}

/// What the reference makes of tensors of prefill, or of their first rows.
pub fn reference(
    backend: Backend,
    spec: &AttentionSpec,
    q: &TensorRef<'_>,
    kv: [&TensorRef<'_>; 2],
    out: &mut TensorMut<'_>,
    lse: &mut TensorMut<'_>,
    (mask, options): (reference::HostMask<'_>, &RunOptions<'_>),
) -> Result<()> {
    if backend != Backend::CudaCores {
        return reference::single_prefill(spec, q, kv, out, Some(lse), mask, options);
    }
    let (mut out, mut lse) = (out.reborrow().select(0, 0)?, lse.reborrow().select(0, 0)?);
    reference::single_decode(spec, &q.select(0, 0)?, kv, &mut out, Some(&mut lse), options)
}

/// Keys and values of a case in a cache with room for more tokens, which are
/// NaN.
pub fn cached<K: Number>(gpu: &Gpu, rng: &mut Rng, case: &Case, room: usize) -> Kv<K> {
    let (&[(_, keys)], heads) = (&case.requests[..], case.kv_heads) else { panic!("one request: {case:?}") };
    let mut part = |width: usize| {
        let all = keys + room;
        let (shape, tokens, blocks) = match case.layout {
            KvLayout::Nhd => ([all, heads, width], [keys, all].map(|tokens| tokens * heads), 1),
            KvLayout::Hnd => ([heads, all, width], [keys, all], heads),
        };
        let mut host = vec![K::POISON; all * heads * width];
        for block in host.chunks_exact_mut(tokens[1] * width).take(blocks) {
            block[..tokens[0] * width].fill_with(|| K::from_f64(rng.unit()));
        }
        let tensor = Mirrored::new(gpu, &shape, host);
        match case.layout {
            KvLayout::Nhd => tensor.narrowed(0, 0, keys),
            KvLayout::Hnd => tensor.narrowed(1, 0, keys).permuted(&[1, 0, 2]),
        }
    };
    let (k, v) = (part(case.head_dim_qk), part(case.head_dim_vo));
    Kv::Ragged { keys: RaggedIndices::from_lens([keys]).unwrap(), k, v }
}

/// The output has the same bits with and without LSE.
pub fn lse_changes_nothing(cases: impl IntoIterator<Item = Case>) {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for case in cases.into_iter().flat_map(Case::parts) {
        let Some(single) = Single::of::<f16, f16>(&gpu, &case) else { return };
        let problem = Problem::<f16, f16>::new(&gpu, rng, case);
        let (want, _) = single.check(&gpu, &problem, &mut workspace);
        let (mut out, _) = problem.outputs(&gpu);
        single.run_problem(&gpu, &problem, &mut workspace, &DeviceMask::Plain, &mut out, None).unwrap();
        assert_same_bits("without LSE", &out.download(), &want);
    }
}

/// A run lets the workspace grow to the scratch memory that it needs, if any:
/// `divided` says whether it does. A captured run needs what is there, and says so.
pub fn scratch_is_asked_for(case: Case, divided: bool) {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    let Some(single) = Single::of::<f16, f16>(&gpu, &case) else { return };
    let problem = Problem::<f16, f16>::new(&gpu, rng, case);
    let with = |bytes| Workspace::with_sizes(&gpu.stream, bytes, 0).unwrap();
    let mut grows = with(0);
    single.check(&gpu, &problem, &mut grows);
    let needed = grows.float_bytes();
    assert_eq!(needed > 1, divided, "{needed}");
    if !divided {
        return;
    }
    let mask = DeviceMask::new(&gpu, &problem.mask, 0, 0);
    let (mut out, mut lse) = problem.outputs(&gpu);
    let mut captured = |workspace: &mut Workspace| {
        let DeviceKv::Ragged(kv) = problem.kv.device_view() else { unreachable!("keys of one request") };
        let (q, mut out, mut lse) = (problem.q.device_view(), out.device_view_mut(), lse.device_view_mut());
        let (q, k, v) = (q, kv[0], kv[1]);
        let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
        let (mask, options) = (mask.or(&gpu, plain(&problem.mask)), problem.case.options());
        capture(&gpu, || single.run(workspace, &q, [&k, &v], &mut out, Some(&mut lse), (mask, &options))).1
    };
    let refused = |result: Result<()>| match result {
        Err(FlashInferError::InvalidArgument { argument: "workspace", problem: text, .. }) => {
            assert!(text.contains(&format!("Workspace::with_sizes(&stream, {needed}, 1)")), "{text}");
        }
        other => panic!("{needed} bytes are needed, but {other:?}"),
    };
    let (mut small, mut enough) = (with(needed - 1), with(needed));
    refused(captured(&mut small));
    assert_eq!(small.float_bytes(), needed - 1);
    captured(&mut enough).unwrap();
    // Before a capture it may grow.
    let mut warm = with(needed - 1);
    single.check(&gpu, &problem, &mut warm);
    captured(&mut warm).unwrap();
    assert!(warm.float_bytes() >= needed);
    single.check(&gpu, &problem, &mut enough);
}

/// One captured run is replayed on other numbers at the same addresses.
pub fn graph_replay<T: Number>(cases: impl IntoIterator<Item = Case>) {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    for case in cases {
        let Some(single) = Single::of::<T, T>(&gpu, &case) else { return };
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let mut captured = Problem::<T, T>::new(&gpu, rng, case.clone());
        if case.kv_scales.is_some() || !matches!(case.masked, Masked::No) {
            // The kernels for scales, and for queries that see no key, are compiled at their first use,
            // which a capture does not allow.
            single.check(&gpu, &captured, &mut workspace);
        }
        let mut mask = DeviceMask::new(&gpu, &captured.mask, 0, 0);
        let (mut out, mut lse) = captured.outputs(&gpu);
        let (graph, run) = {
            let DeviceKv::Ragged(kv) = captured.kv.device_view() else { unreachable!("keys of one request") };
            let (q, mut out, mut lse) =
                (captured.q.device_view(), out.device_view_mut(), lse.device_view_mut());
            let (q, k, v) = (q, kv[0], kv[1]);
            let (mut out, mut lse) = (out.reborrow(), lse.reborrow());
            let (mask, options) = (mask.or(&gpu, plain(&captured.mask)), case.options());
            let run = || single.run(&mut workspace, &q, [&k, &v], &mut out, Some(&mut lse), (mask, &options));
            capture(&gpu, run)
        };
        run.unwrap();
        out.assert_untouched(); // captured is not run
        lse.assert_untouched();
        let graph = graph.expect("a graph");
        for _ in 0..3 {
            let step = Problem::<T, T>::new(&gpu, rng, case.clone());
            captured.q.upload(&step.q.host);
            for (tensor, source) in captured.kv.tensors_mut().into_iter().zip(step.kv.hosts()) {
                tensor.upload(source);
            }
            mask.update(&gpu, &step.mask);
            out.upload(&vec![T::POISON; out.host.len()]);
            lse.upload(&vec![f32::NAN; lse.host.len()]);
            graph.launch().unwrap();
            step.verify(&out, Some(&lse));
            let (want, want_lse) = single.check(&gpu, &step, &mut Workspace::new(&gpu.stream).unwrap());
            assert_same_bits("replay and run", &out.download(), &want);
            assert_same_bits("replay and run: LSE", &lse.download(), &want_lse);
        }
    }
}

/// Two threads, each with a stream and a workspace of its own, and the requests
/// of one of the cases in turn.
pub fn two_streams_at_once(cases: [Case; 2]) {
    fn work(gpu: &Gpu, mut rng: Rng, case: Case) {
        let Some(single) = Single::of::<f16, f16>(gpu, &case) else { return };
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let parts = case.parts().into_iter();
        let problems: Vec<_> = parts.map(|case| Problem::<f16, f16>::new(gpu, &mut rng, case)).collect();
        let want: Vec<_> =
            problems.iter().map(|problem| single.check(gpu, problem, &mut workspace)).collect();
        for iteration in 0..150 {
            let at = iteration % problems.len();
            let (problem, (want, want_lse)) = (&problems[at], &want[at]);
            let (mut out, mut lse) = problem.outputs(gpu);
            for _ in 0..4 {
                let (out, lse) = (&mut out, Some(&mut lse));
                single.run_problem(gpu, problem, &mut workspace, &DeviceMask::Plain, out, lse).unwrap();
            }
            assert_same_bits("output", &out.download(), want);
            assert_same_bits("LSE", &lse.download(), want_lse);
        }
    }
    let Some(gpu) = Gpu::start() else { return };
    let other = gpu.elsewhere();
    std::thread::scope(|scope| {
        let threads = [&gpu, &other].into_iter().zip(cases).map(|(gpu, case)| {
            let rng = Rng::new();
            scope.spawn(move || work(gpu, rng, case))
        });
        for thread in threads.collect::<Vec<_>>() {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
}
