//! Plans, workspaces and streams that follow one another.

use crate::*;

/// One plan serves all layers of a step, each with its own queries and cache.
#[test]
fn layers_share_a_plan() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for lens in [Case::default().lens, vec![3000, 1, 0]] {
        let case = Case { lens, kv_heads: 8, ..Case::default() };
        let Some(decode) = decode_of::<bf16, bf16>(&gpu, &case) else { return };
        let indices = random_table(rng, case.page_size, &case.lens);
        let layers: Vec<_> = (0..4)
            .map(|_| Problem::<bf16, bf16>::with_table(&gpu, rng, case.clone(), indices.clone()))
            .collect();
        let table = PageTable::new(&gpu.stream, indices).unwrap();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
        let mut outputs: Vec<_> = layers.iter().map(|layer| layer.outputs(&gpu)).collect();
        // All are enqueued before the first is looked at.
        for (layer, (out, lse)) in layers.iter().zip(&mut outputs) {
            layer.run(&plan, out, Some(lse), &case.options());
        }
        for (layer, (out, lse)) in layers.iter().zip(&outputs) {
            layer.verify(out, Some(lse));
        }
    }
}

/// Steps of different lengths that follow each other without waiting, each
/// planned on the workspace of the one before.
#[test]
fn steps_share_a_workspace() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let case = Case { kv_heads: 8, ..Case::default() };
    let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
    let steps: Vec<_> = [vec![900, 3, 0], vec![1, 1, 1], vec![17, 2500, 64], vec![0, 0, 5]]
        .map(|lens| Problem::<f16, f16>::new(&gpu, rng, Case { lens, ..case.clone() }))
        .into_iter()
        .collect();
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    let mut table = PageTable::with_capacity(&gpu.stream, steps[0].table.clone(), 3, 200).unwrap();
    for _ in 0..5 {
        let mut outputs: Vec<_> = steps.iter().map(|step| step.outputs(&gpu)).collect();
        for (step, (out, lse)) in steps.iter().zip(&mut outputs) {
            table.update(step.table.clone()).unwrap();
            let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
            step.run(&plan, out, Some(lse), &case.options());
        }
        for (step, (out, lse)) in steps.iter().zip(&outputs) {
            step.verify(out, Some(lse));
        }
    }
}

/// Workspaces and tables are dropped while the work that uses them waits, and
/// others take their memory at once, on this stream and on another.
#[test]
fn buffers_are_freed_after_their_last_use() {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
    let case = Case { lens: vec![3000, 1, 0, 700], kv_heads: 8, ..Case::default() };
    let Some(decode) = decode_of::<f16, f16>(&gpu, &case) else { return };
    let problem = Problem::<f16, f16>::new(&gpu, rng, case.clone());
    let indices = random_table(rng, case.page_size, &[17, 900, 64, 5]);
    problem.check(&gpu, &decode, &mut Workspace::new(&gpu.stream).unwrap()); // loads the kernel
    let mut busy = gpu.cuda.alloc_zeros::<u8>(1 << 30).unwrap();
    let mut outputs: Vec<_> = (0..20).map(|_| problem.outputs(&gpu)).collect();
    gpu.synchronize();
    for (out, lse) in &mut outputs {
        gpu.cuda.memset_zeros(&mut busy).unwrap(); // what the run waits for
        let table = PageTable::new(&gpu.stream, problem.table.clone()).unwrap();
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
        problem.run(&plan, out, Some(lse), &case.options());
        drop((workspace, table));
        for stream in [&gpu.stream, &other.stream] {
            let table = PageTable::new(stream, indices.clone()).unwrap();
            decode.plan(&mut Workspace::new(stream).unwrap(), &table, &PlanOptions::default()).unwrap();
        }
    }
    outputs.iter().for_each(|(out, lse)| problem.verify(out, Some(lse)));
}

/// Two threads, each with a stream, a workspace and tables of its own.
#[test]
fn two_streams_at_once() {
    fn work(gpu: &Gpu, mut rng: Rng, group: usize) {
        let case = Case { kv_heads: 8, group, ..Case::default() };
        let Some(decode) = decode_of::<f16, f16>(gpu, &case) else { return };
        let mut workspace = Workspace::new(&gpu.stream).unwrap();
        let problems = [vec![1, 40, 0, 300], vec![4000, 7, 7, 7], vec![17, 16, 15, 64]]
            .map(|lens| Problem::<f16, f16>::new(gpu, &mut rng, Case { lens, ..case.clone() }));
        let mut table = PageTable::with_capacity(&gpu.stream, problems[0].table.clone(), 4, 300).unwrap();
        let mut first: Vec<(Vec<f16>, Vec<f32>)> = Vec::new();
        for iteration in 0..150 {
            let at = iteration % problems.len();
            let problem = &problems[at];
            table.update(problem.table.clone()).unwrap();
            let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
            if iteration < problems.len() {
                first.push(problem.check_run(gpu, &plan));
                continue;
            }
            let (mut out, mut lse) = problem.outputs(gpu);
            for _ in 0..4 {
                problem.run(&plan, &mut out, Some(&mut lse), &case.options());
            }
            assert_same_bits("output", &out.download(), &first[at].0);
            assert_same_bits("LSE", &lse.download(), &first[at].1);
        }
    }
    let Some(gpu) = Gpu::start() else { return };
    let other = gpu.elsewhere();
    let (rng, other_rng) = (Rng::new(), Rng::new());
    std::thread::scope(|scope| {
        let threads = [scope.spawn(|| work(&gpu, rng, 4)), scope.spawn(|| work(&other, other_rng, 1))];
        for thread in threads {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
}
