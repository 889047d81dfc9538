//! Streams, threads, devices and graphs.

use crate::*;

/// Launches whose blocks wait for each other, on two streams at once.
#[test]
fn two_streams() {
    let Some(gpu) = start(Gpu::start) else { return };
    let rng = &mut Rng::new();
    let streams = [gpu.fork(), gpu.fork()];
    let mut row_states = streams.each_ref().map(|gpu| RowStates::new(&gpu.stream).unwrap());
    let inputs = streams.each_ref().map(|gpu| Mirrored::<f32>::random(gpu, rng, &[7, 256_000]));
    let plain = [options(|_| ()), options(|options| options.deterministic = true)];
    let mut outputs = streams
        .each_ref()
        .map(|gpu| std::array::from_fn::<_, 40, _>(|_| Output::<f32>::poisoned(gpu, 7, 300)));
    for step in 0..40 {
        for (at, gpu) in streams.iter().enumerate() {
            let options = &plain[(step + at) % 2];
            outputs[at][step].select(gpu, &mut row_states[at], &inputs[at], options).unwrap();
        }
    }
    for step in [0, 1, 2, 20, 37, 38, 39] {
        for (at, gpu) in streams.iter().enumerate() {
            outputs[at][step].verify(gpu, &inputs[at], &plain[(step + at) % 2]);
        }
    }
}

/// Each launch sets the kernel's limit of shared memory to what it needs.
#[test]
fn threads_with_different_sizes() {
    let Some(gpu) = start(Gpu::start) else { return };
    std::thread::scope(|scope| {
        for len in [20_000, 40_000, 80_000, 110_000] {
            let gpu = &gpu;
            scope.spawn(move || {
                let (gpu, rng) = (gpu.fork(), &mut Rng::new());
                let mut row_states = RowStates::new(&gpu.stream).unwrap();
                let input = Mirrored::<f16>::random(&gpu, rng, &[2, len]);
                let mut output = Output::poisoned(&gpu, 2, 100);
                let options = options(|_| ());
                for _ in 0..500 {
                    output.select(&gpu, &mut row_states, &input, &options).unwrap();
                }
                output.verify(&gpu, &input, &options);
            });
        }
    });
}

/// A captured graph selects from what tensors and rows hold at its replay.
fn graph_replay<T: Number>(sizes: [usize; 3]) {
    let Some(gpu) = start(Gpu::start_alone) else { return };
    let rng = &mut Rng::new();
    let mut row_states = RowStates::new(&gpu.stream).unwrap();
    let [rows, len, k] = sizes;
    for options in unsorted() {
        let mut sparse = Sparse::<T>::random(&gpu, rng, sizes, true, true);
        let mut selected = Output::poisoned(&gpu, rows, k);
        let (mut entries, table) = (ints(&gpu, &vec![POISON; rows * k]), ints(&gpu, &sparse.table));
        let mut row_table = RowTable::new(&gpu.stream, sparse.rows.clone()).unwrap();
        let graph = {
            let input = sparse.input.device_view();
            let mut values = selected.values.device_view_mut();
            let mut indices = selected.indices.tensor_mut(&gpu.cuda, &[rows, k]).unwrap();
            let mut entries = entries.tensor_mut(&gpu.cuda, &[rows, k]).unwrap();
            let table = table.tensor(&gpu.cuda, &[sparse.requests, sparse.width]).unwrap();
            let (input, table) = (input, table.view());
            let (mut values, mut indices) = (values.reborrow(), indices.view_mut());
            let mut entries = entries.view_mut();
            let mut run = || {
                topk::radix_topk(&mut row_states, &mut values, &mut indices, &input, &options)?;
                topk::radix_topk_page_table_transform(
                    &mut row_states,
                    &mut entries,
                    &input,
                    &table,
                    &row_table,
                    &options,
                )
            };
            run().unwrap();
            gpu.synchronize();
            let (graph, captured) = capture(&gpu, run);
            captured.unwrap();
            graph.expect("a graph")
        };
        for _ in 0..3 {
            let next = Sparse::<T>::random(&gpu, rng, sizes, true, true);
            row_table.update(next.rows.clone()).unwrap();
            sparse.input.upload(&next.input.host);
            graph.launch().unwrap();
            selected.verify(&gpu, &next.input, &options);
            // The table is that of the capture.
            let next = Sparse { table: sparse.table.clone(), ..next };
            let got = download(&gpu, &entries);
            let [want, _] = next.expected(&options);
            let mut place_of = vec![0; next.table.len()];
            for (place, &entry) in next.table.iter().enumerate() {
                place_of[entry as usize] = place;
            }
            next.verify(&format!("replay, rows of {len}"), &options, &got, &want, |row, entry| {
                let request = next.rows.row_to_batch().unwrap()[row] as usize;
                place_of[entry as usize].wrapping_sub(request * next.width + next.start(row))
            });
        }
    }
}

typed_tests! {
    graph_replay_of_filtered: graph_replay::<f32>([5, 3000, 100]);
    graph_replay_of_radix: graph_replay::<f16>([3, 130_000, 700]);
}

/// The launchers make the tensors' device current; afterwards it is what it was
/// before.
#[test]
fn the_current_device_is_put_back() {
    let Some(first) = start(Gpu::start) else { return };
    if first.runtime.device_count().unwrap() < 2 {
        return say("skipped: there is one GPU only");
    }
    let second = first.on_another();
    let mut row_states = RowStates::new(&second.stream).unwrap();
    let input = Mirrored::<f32>::random(&second, &mut Rng::new(), &[3, 100_000]);
    let (mut output, plain) = (Output::poisoned(&second, 3, 50), options(|_| ()));
    {
        let mut values = output.values.device_view_mut();
        let mut indices = output.indices.tensor_mut(&second.cuda, &[3, 50]).unwrap();
        let input = input.device_view();
        first.cuda.context().bind_to_thread().unwrap();
        let (mut values, mut indices) = (values.reborrow(), indices.view_mut());
        topk::radix_topk(&mut row_states, &mut values, &mut indices, &input, &plain).unwrap();
        assert!(topk::can_implement_filtered_topk(&second.stream).is_ok());
        assert_eq!(ctx::get_current().unwrap(), Some(first.cuda.context().cu_ctx()));
    }
    output.verify(&second, &input, &plain);
}
