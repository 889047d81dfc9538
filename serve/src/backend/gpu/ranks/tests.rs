//! Sums of two GPUs.

use std::ptr::from_mut;

use cudarc::{
    driver::{LaunchConfig, result},
    nvrtc::Ptx,
};
use half::f16;

use super::{
    super::{programmatic, start},
    *,
};
use crate::{
    backend::graph,
    group::tests::with_two_processes,
    model::synthetic::Shape,
    tests::gpu::{ranks::has_two, turn},
};

const ROWS: usize = 8;
const WIDTH: usize = 4096;
const REPLAYS: usize = 20;

/// A kernel that lets the next one begin and writes later, and the sum of what it writes on both GPUs, as they are
/// and in a graph. Until it is written, it is no number. Ranks are processes, as NCCL may have other kernels for threads,
/// and graphs are its own work, or go with other work.
#[test]
fn sums_wait_for_what_they_add_up() {
    let Some(_turn) = turn() else { return };
    if !has_two() {
        return;
    }
    let test = "backend::gpu::ranks::tests::sums_wait_for_what_they_add_up";
    let mixing = |value| [("NCCL_GRAPH_MIXING_SUPPORT", value)];
    with_two_processes(test, &[&mixing("0"), &mixing("1")], check_sums);
}

fn check_sums(group: Arc<Group>) {
    let rank = group.rank().rank;
    let cuda = start(&Shape::Llama8b.config().unwrap(), rank).unwrap();
    let (stream, dtype) = (Stream::from(&cuda), DType::F16);
    let ranks = Ranks::meet(&group, &cuda).unwrap();
    let module = cuda.context().load_module(Ptx::from_src(include_str!("late.ptx"))).unwrap();
    let late = module.load_function("late").unwrap();
    let shape = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
    let mut out = ranks.zeros(dtype, &[ROWS, WIDTH]).unwrap();
    assert!(matches!(out, HalfTensor::Registered(_)), "GPUs do not reach each other's memory");
    let run = |out: &mut HalfTensor| -> Result<()> {
        let mut out = out.view_mut();
        let mut address = out.data_ptr();
        let (mut count, mut number) = ((ROWS * WIDTH) as u32, f16::from_f32((rank + 1) as f32).to_bits());
        let mut arguments =
            [from_mut(&mut address).cast(), from_mut(&mut count).cast(), from_mut(&mut number).cast()];
        // SAFETY: so many numbers of two bytes are there, and these are what the kernel takes. It waits for
        // what is before it, and behind it is a sum, which is held back.
        unsafe {
            let bytes = ROWS * WIDTH * dtype.size();
            result::memset_d8_async(address as u64, 0xff, bytes, cuda.cu_stream())?;
            programmatic::launch(&cuda, &late, shape, &mut arguments)?;
        }
        ranks.all_reduce(&mut out)
    };
    run(&mut out).unwrap();
    assert_eq!(wrong_sums(&cuda, &out), 0, "not in a graph");
    // SAFETY: all that it works on outlives it.
    let step = unsafe { graph::capture(&stream, || run(&mut out)) }.unwrap();
    for replay in 0..REPLAYS {
        step.launch(&()).unwrap();
        assert_eq!(wrong_sums(&cuda, &out), 0, "in replay {replay}");
    }
}

/// How many numbers are not what two ranks add up to.
fn wrong_sums(cuda: &CudaStream, out: &HalfTensor) -> usize {
    cuda.synchronize().unwrap();
    out.to_f64().into_iter().filter(|&sum| sum != 3.0).count()
}
