//! What tests of attention share, whatever runs it.

use cudarc::driver::{
    CudaGraph,
    sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
};
use flashinfer_rs::{
    Result, TensorMut, TensorRef,
    gpu::TensorExtMut,
    kv::{KvLayout, PagedKv},
};
use half::{bf16, f16};

use super::{Gpu, Mirrored, Rng, assert_same_bits, refused};

/// The largest absolute error of a base-2 LSE. Products are summed in f32 for
/// every dtype, so it does not depend on it.
const LSE_BOUND: f64 = 1e-2;

/// Compares the first sums that a device wrote with the reference's; those
/// beyond are what was uploaded.
#[track_caller]
pub fn assert_lse(what: &str, lse: &Mirrored<f32>, want: &[f64]) {
    let got = lse.download();
    for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
        let got = f64::from(got);
        let agrees = if want.is_finite() { (got - want).abs() <= LSE_BOUND } else { got == want };
        assert!(agrees, "{what}: LSE {at} is {got}, not {want}");
    }
    assert_same_bits("LSE beyond the batch", &got[want.len()..], &lse.host[want.len()..]);
}

/// Captures what `work` enqueues into a graph.
pub fn capture<R>(gpu: &Gpu, work: impl FnOnce() -> R) -> (Option<CudaGraph>, R) {
    gpu.cuda.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
    let result = work();
    (gpu.cuda.end_capture(CUgraphInstantiate_flags(0)).unwrap(), result)
}

/// A run with given queries, output and sums.
pub type Run<'r> =
    &'r mut dyn FnMut(&TensorRef<'_>, &mut TensorMut<'_>, Option<&mut TensorMut<'_>>) -> Result<()>;

/// Everything about queries, outputs and sums that a plan for `q`, whose heads
/// are 128 wide and at least 8, must refuse.
pub fn refuse_queries_and_outputs(gpu: &Gpu, other: &Gpu, rng: &mut Rng, q: &Mirrored<f16>, run: Run<'_>) {
    refuse_unlike(gpu, other, rng, q, "q", run);
}

/// As [`refuse_queries_and_outputs`], for what is planned or not: queries of
/// another number or of other heads than the output's are refused as `unlike`.
pub fn refuse_unlike(gpu: &Gpu, other: &Gpu, rng: &mut Rng, q: &Mirrored<f16>, unlike: &str, run: Run<'_>) {
    let [rows, heads, 128] = q.shape()[..] else { panic!("queries of shape {:?}", q.shape()) };
    let shape = [rows, heads, 128];
    let mut out = Mirrored::<f16>::poisoned(gpu, &shape);
    let mut lse = Mirrored::<f32>::poisoned(gpu, &[rows, heads]);
    {
        let (mut out, mut lse) = (out.device_view_mut(), lse.device_view_mut());
        let mut refuse_as = |q: TensorRef<'_>, argument: &str| {
            refused(run(&q, &mut out.reborrow(), Some(&mut lse.reborrow())), argument);
        };
        let on_device = q.device_view();
        let good = on_device;
        refuse_as(good.narrow(0, 0, rows - 1).unwrap(), unlike);
        refuse_as(good.narrow(1, 0, heads / 2).unwrap(), unlike);
        let mut refuse = |q: TensorRef<'_>| refuse_as(q, "q");
        refuse(Mirrored::<bf16>::random(gpu, rng, &shape).device_view());
        refuse(Mirrored::<f32>::random(gpu, rng, &shape).device_view());
        refuse(good.select(1, 0).unwrap());
        refuse(good.narrow(2, 0, 64).unwrap());
        let columns = Mirrored::<f16>::random(gpu, rng, &[rows, 128, heads]).permuted(&[0, 2, 1]);
        refuse(columns.device_view());
        let odd = Mirrored::<f16>::random(gpu, rng, &[rows, heads, 136]).narrowed(2, 1, 128);
        refuse(odd.device_view());
        let uneven = Mirrored::<f16>::random(gpu, rng, &[rows, heads, 130]).narrowed(2, 0, 128);
        refuse(uneven.device_view());
        refuse(q.view()); // on the host
        refuse(q.copied_to(other).device_view());
    }
    other.synchronize();
    out.assert_untouched();
    lse.assert_untouched();

    let q = q.device_view();
    macro_rules! refuse {
        ($out:expr, $lse:expr, $on:expr, $expected:expr) => {{
            let (out_gpu, lse_gpu): (&Gpu, &Gpu) = $on;
            let (mut out, mut lse) = ($out.copied_to(out_gpu), $lse.copied_to(lse_gpu));
            refused(run(&q, &mut out.device_view_mut(), Some(&mut lse.device_view_mut())), $expected);
            other.synchronize();
            out.assert_untouched();
            lse.assert_untouched();
        }};
    }
    let half = |shape: &[usize]| Mirrored::<f16>::poisoned(gpu, shape);
    let single = |shape: &[usize]| Mirrored::<f32>::poisoned(gpu, shape);
    let (here, sums) = ((gpu, gpu), || single(&[rows, heads]));
    refuse!(Mirrored::<bf16>::poisoned(gpu, &shape), sums(), here, "out");
    refuse!(single(&shape), sums(), here, "out");
    refuse!(half(&[rows, heads * 128]), sums(), here, "out");
    refuse!(half(&[rows, heads / 2, 128]), sums(), here, "out");
    refuse!(half(&[rows, heads + 1, 128]).narrowed(1, 0, heads), sums(), here, "out");
    refuse!(half(&[heads, rows, 128]).permuted(&[1, 0, 2]), sums(), here, "out");
    refuse!(half(&shape), sums(), (other, gpu), "out");
    refuse!(half(&shape), half(&[rows, heads]), here, "lse");
    refuse!(half(&shape), single(&[rows * heads]), here, "lse");
    refuse!(half(&shape), single(&[rows, heads / 2]), here, "lse");
    refuse!(half(&shape), single(&[rows, heads + 1]).narrowed(1, 0, heads), here, "lse");
    refuse!(half(&shape), sums(), (gpu, other), "lse");
    // An output at an odd element, and on the host.
    let poison = vec![f16::NAN; rows * heads * 128 + 1];
    let mut odd = gpu.cuda.clone_htod(&poison).unwrap();
    {
        let mut part = odd.slice_mut(1..);
        let mut out = part.tensor_mut(&gpu.cuda, &shape).unwrap();
        refused(run(&q, &mut out.view_mut(), None), "out");
    }
    assert_same_bits("untouched", &gpu.cuda.clone_dtoh(&odd).unwrap(), &poison);
    let mut host = vec![f16::NAN; rows * heads * 128];
    let mut view = TensorMut::from_slice(&mut host, &shape).unwrap();
    refused(run(&q, &mut view, None), "out");
}

/// Everything about caches that a plan for 2 heads of 128 in `pages` pages of
/// 16 tokens must refuse.
pub fn refuse_caches(
    gpu: &Gpu,
    other: &Gpu,
    rng: &mut Rng,
    pages: usize,
    run: &mut dyn FnMut(&PagedKv<'_>) -> Result<()>,
) {
    let nhd = KvLayout::Nhd;
    let good = Mirrored::<f16>::random(gpu, rng, &[pages, 16, 2, 128]);
    let good_guard = good.device_view();
    let good_view = good_guard;
    macro_rules! both {
        ($tensor:expr, $layout:expr) => {{
            let tensor = $tensor;
            let guard = tensor.device_view();
            refused(run(&PagedKv::new(guard, guard, $layout)), "kv.k");
        }};
    }
    both!(Mirrored::<bf16>::random(gpu, rng, &[pages, 16, 2, 128]), nhd);
    both!(Mirrored::<f16>::random(gpu, rng, &[pages, 32, 128]), nhd);
    both!(Mirrored::<f16>::random(gpu, rng, &[pages - 1, 16, 2, 128]), nhd);
    both!(Mirrored::<f16>::random(gpu, rng, &[pages, 15, 2, 128]), nhd);
    both!(Mirrored::<f16>::random(gpu, rng, &[pages, 16, 3, 128]), nhd);
    both!(Mirrored::<f16>::random(gpu, rng, &[pages, 16, 2, 64]), nhd);
    both!(Mirrored::<f16>::random(gpu, rng, &[pages, 16, 2, 128]), KvLayout::Hnd);
    both!(Mirrored::<f16>::random(gpu, rng, &[pages, 16, 2, 136]).narrowed(3, 1, 128), nhd);
    both!(Mirrored::<f16>::random(gpu, rng, &[pages, 16, 2, 130]).narrowed(3, 0, 128), nhd);
    both!(Mirrored::<f16>::random(gpu, rng, &[pages, 16, 128, 2]).permuted(&[0, 1, 3, 2]), nhd);
    let mut refuse =
        |k: TensorRef<'_>, v: TensorRef<'_>, expected| refused(run(&PagedKv::new(k, v, nhd)), expected);
    let brains = Mirrored::<bf16>::random(gpu, rng, &[pages, 16, 2, 128]);
    refuse(good_view, brains.device_view(), "kv.v");
    let more = Mirrored::<f16>::random(gpu, rng, &[pages + 1, 16, 2, 128]);
    refuse(good_view, more.device_view(), "kv.v");
    let spread = Mirrored::<f16>::random(gpu, rng, &[pages, 16, 3, 128]).narrowed(2, 0, 2);
    refuse(good_view, spread.device_view(), "kv.v");
    refuse(good.view(), good_view, "kv.k"); // on the host
    refuse(good_view, good.view(), "kv.v");
    refuse(good.copied_to(other).device_view(), good_view, "kv.k");
    refuse(good_view, good.copied_to(other).device_view(), "kv.v");
    other.synchronize();
}
