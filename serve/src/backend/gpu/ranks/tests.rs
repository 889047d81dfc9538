//! Sums of two GPUs.

use std::{env, ptr::from_mut};

use cudarc::{
    driver::{LaunchConfig, result},
    nvrtc::Ptx,
};
use half::f16;
use test_support::{Rng, say};

use super::{
    super::{programmatic, start},
    *,
};
use crate::{
    backend::graph, group::tests::with_two_processes, model::synthetic::Shape, tests::gpu::ranks::turn_of_two,
};

const ROWS: usize = 8;
const WIDTH: usize = 4096;
const REPLAYS: usize = 20;

/// A kernel that lets the next one begin and writes later, and the sum of what it writes on both GPUs, added to a
/// residual and normed, too, as they are and in a graph. Until it is written, it is no number. Ranks are processes, as
/// NCCL may have other kernels for threads, and graphs are its own work, or go with other work.
#[test]
fn sums_wait_for_what_they_add_up() {
    let Some(_turn) = turn_of_two() else { return };
    let test = "backend::gpu::ranks::tests::sums_wait_for_what_they_add_up";
    let nccl = |mixing| [("FLASHINFER_SUMS", "nccl"), ("NCCL_GRAPH_MIXING_SUPPORT", mixing)];
    with_two_processes(test, &[&nccl("0"), &nccl("1"), &[]], check_sums);
}

/// Rows of two processes are added up, to a residual, too, and normed, by FlashInfer's kernel and by NCCL: as they
/// are, and in a graph.
#[test]
fn rows_are_added_up_and_normed() {
    let Some(_turn) = turn_of_two() else { return };
    let test = "backend::gpu::ranks::tests::rows_are_added_up_and_normed";
    with_two_processes(test, &[&[], &[("FLASHINFER_SUMS", "nccl")]], |group| {
        let (f16, bf16) = ((DType::F16, 1e-3), (DType::BF16, 8e-3));
        for ((dtype, bound), width) in [(f16, WIDTH), (bf16, 576), (bf16, 7168), (f16, 2880)] {
            check_rows(&group, dtype, width, bound);
        }
    });
}

fn check_rows(group: &Group, dtype: DType, width: usize, bound: f64) {
    let Rank { rank, size } = group.rank();
    let cuda = start(&Shape::Llama8b.config().unwrap(), rank).unwrap();
    let stream = Stream::from(&cuda);
    let ranks = Ranks::meet(group, &cuda, Some((dtype, width))).unwrap();
    let wants_nccl = env::var("FLASHINFER_SUMS").is_ok();
    if wants_nccl {
        assert!(ranks.fused.is_none());
    } else if ranks.fused.is_none() {
        return say("skipped: there is no module trtllm_comm, so that NCCL alone adds up");
    }
    // Both ranks know what both have.
    let mut rng = Rng::seeded(group.gather(Rng::new().bits()).unwrap()[0]);
    let mut numbers = |count| -> Vec<_> { (0..count).map(|_| rng.unit() as f32).collect() };
    let tensor =
        |numbers: &[f32], shape: &[usize]| HalfTensor::rounded(&stream, dtype, shape, numbers).unwrap();
    let options = NormOptions::with_eps(1e-5);
    // More rows than there is memory for, which NCCL adds up, and the ends of what there is.
    for rows in [1, 64, 256, 3, 257, 2, 200, 8] {
        let count = rows * width;
        let parts: Vec<_> = (0..size).map(|_| numbers(count)).collect();
        let (residual, weight) = (numbers(count), numbers(width));
        let shape = [rows, width];
        let [mut sum, mut x] = [(); 2].map(|()| tensor(&parts[rank], &shape));
        let (mut to, weight) = (tensor(&residual, &shape), tensor(&weight, &[width]));
        let run = |sum: &mut HalfTensor, x: &mut HalfTensor, to: &mut HalfTensor| -> Result<()> {
            ranks.all_reduce(&mut sum.view_mut())?;
            let (mut x, mut to) = (x.view_mut(), to.view_mut());
            // SAFETY: nothing begins early.
            unsafe { ranks.all_reduce_add_norm(&mut x, &mut to, &weight.view(), &options, false) }
        };
        run(&mut sum, &mut x, &mut to).unwrap();
        cuda.synchronize().unwrap();
        // What was rounded to 16 bits.
        let rounded: Vec<_> = parts.iter().map(|part| tensor(part, &shape).to_f64()).collect();
        let (residual, weight) = (tensor(&residual, &shape).to_f64(), weight.to_f64());
        let add = |of: &[Vec<f64>], at: usize| of.iter().map(|part| part[at]).sum::<f64>();
        let sums: Vec<_> = (0..count).map(|at| add(&rounded, at)).collect();
        let added: Vec<_> = sums.iter().zip(&residual).map(|(sum, residual)| sum + residual).collect();
        let normed = added.chunks(width).flat_map(|row| {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / width as f64;
            row.iter().zip(&weight).map(move |(x, weight)| x / (mean + 1e-5).sqrt() * weight)
        });
        let normed: Vec<_> = normed.collect();
        for (name, out, expected) in [("sums", &sum, sums), ("residual", &to, added), ("norm", &x, normed)] {
            let error = relative_error(&out.to_f64(), &expected);
            assert!(error <= bound, "{name} of {rows} rows of {width} {dtype} are off by {error}");
        }
    }
    // A graph adds up again what it has made of ones: twice as much each time, on both ranks.
    let mut ones = tensor(&vec![1.0; ROWS * width], &[ROWS, width]);
    // SAFETY: all that it works on outlives it.
    let step = unsafe { graph::capture(&stream, || ranks.all_reduce(&mut ones.view_mut())) }.unwrap();
    (0..10).for_each(|_| step.launch(&()).unwrap());
    cuda.synchronize().unwrap();
    assert!(ones.to_f64().iter().all(|&x| x == 1024.0));
}

fn relative_error(out: &[f64], expected: &[f64]) -> f64 {
    let norm = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut out.iter().zip(expected).map(|(out, expected)| out - expected))
        / norm(&mut expected.iter().copied())
}

fn check_sums(group: Arc<Group>) {
    let rank = group.rank().rank;
    let cuda = start(&Shape::Llama8b.config().unwrap(), rank).unwrap();
    let (stream, dtype) = (Stream::from(&cuda), DType::F16);
    let ranks = Ranks::meet(&group, &cuda, Some((dtype, WIDTH))).unwrap();
    let module = cuda.context().load_module(Ptx::from_src(include_str!("late.ptx"))).unwrap();
    let late = module.load_function("late").unwrap();
    let shape = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
    let mut out = ranks.zeros(dtype, &[ROWS, WIDTH]).unwrap();
    assert!(matches!(out, HalfTensor::Registered(_)), "GPUs do not reach each other's memory");
    let write_late = |out: &mut TensorMut<'_>| -> Result<()> {
        let mut address = out.data_ptr();
        let (mut count, mut number) = ((ROWS * WIDTH) as u32, f16::from_f32((rank + 1) as f32).to_bits());
        let mut arguments =
            [from_mut(&mut address).cast(), from_mut(&mut count).cast(), from_mut(&mut number).cast()];
        // SAFETY: so many numbers of two bytes are there, and these are what the kernel takes. It waits for
        // what is before it, and behind it is a sum, which waits or is held back.
        unsafe {
            let bytes = ROWS * WIDTH * dtype.size();
            result::memset_d8_async(address as u64, 0xff, bytes, cuda.cu_stream())?;
            programmatic::launch(&cuda, &late, shape, &mut arguments)
        }
    };
    // How many numbers are not what they should be at their columns.
    let wrong = |out: &HalfTensor, expected: &dyn Fn(usize) -> f64, bound: f64| {
        cuda.synchronize().unwrap();
        let numbers = out.to_f64();
        let right = numbers.iter().enumerate().filter(|&(at, x)| (x - expected(at % WIDTH)).abs() <= bound);
        numbers.len() - right.count()
    };

    let run = |out: &mut HalfTensor| {
        let mut out = out.view_mut();
        write_late(&mut out)?;
        ranks.all_reduce(&mut out)
    };
    run(&mut out).unwrap();
    assert_eq!(wrong(&out, &|_| 3.0, 0.0), 0, "not in a graph");
    // SAFETY: all that it works on outlives it.
    let step = unsafe { graph::capture(&stream, || run(&mut out)) }.unwrap();
    for replay in 0..REPLAYS {
        step.launch(&()).unwrap();
        assert_eq!(wrong(&out, &|_| 3.0, 0.0), 0, "in replay {replay}");
    }

    if ranks.fused.is_none() {
        say("there is no module trtllm_comm, or it is not wanted: NCCL alone adds up what is normed");
    }
    let begun = |column: usize| (column % 7) as f32;
    let residual: Vec<_> = (0..ROWS * WIDTH).map(|at| begun(at % WIDTH)).collect();
    let mut residual = HalfTensor::rounded(&stream, dtype, &[ROWS, WIDTH], &residual).unwrap();
    let weight: Vec<_> = (0..WIDTH).map(|column| 1.0 + (column % 5) as f32 / 4.0).collect();
    let gpu_weight = HalfTensor::rounded(&stream, dtype, &[WIDTH], &weight).unwrap();
    let options = NormOptions::with_eps(1e-5);
    let run = |out: &mut HalfTensor, residual: &mut HalfTensor| {
        let (mut out, mut residual) = (out.view_mut(), residual.view_mut());
        write_late(&mut out)?;
        // SAFETY: the fill in front of the late kernel begins when all before it is over.
        unsafe { ranks.all_reduce_add_norm(&mut out, &mut residual, &gpu_weight.view(), &options, true) }
    };
    let check = |out: &HalfTensor, residual: &HalfTensor, time: usize| {
        let added = |column| f64::from(begun(column)) + 3.0 * time as f64;
        assert_eq!(wrong(residual, &added, 0.0), 0, "residual, time {time}");
        let mean = (0..WIDTH).map(|column| added(column).powi(2)).sum::<f64>() / WIDTH as f64;
        let normed = |column: usize| added(column) / (mean + 1e-5).sqrt() * f64::from(weight[column]);
        assert_eq!(wrong(out, &normed, 2e-3), 0, "norm, time {time}");
    };
    run(&mut out, &mut residual).unwrap();
    check(&out, &residual, 1);
    // SAFETY: all that it works on outlives it.
    let step = unsafe { graph::capture(&stream, || run(&mut out, &mut residual)) }.unwrap();
    for replay in 0..REPLAYS {
        step.launch(&()).unwrap();
        check(&out, &residual, replay + 2);
    }
}
