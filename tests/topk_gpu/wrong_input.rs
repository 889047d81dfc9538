//! Nothing to select, and what is refused.

use crate::*;

#[test]
fn nothing_to_select() {
    let Some(gpu) = start(Gpu::start) else { return };
    let (rng, row_states) = (&mut Rng::new(), &mut RowStates::new(&gpu.stream).unwrap());
    for [rows, len, k] in [[0, 100, 5], [3, 100, 0], [0, 0, 0]] {
        let input = Mirrored::<f32>::random(&gpu, rng, &[rows, len]);
        let mut output = Output::poisoned(&gpu, rows, k);
        for options in unsorted() {
            output.select(&gpu, row_states, &input, &options).unwrap();
        }
        let (values, indices) = output.download(&gpu);
        assert!(values.is_empty() && indices == [POISON]);
    }
    for [rows, len, k] in [[0, 100, 5], [3, 100, 0]] {
        let sparse = Sparse::<f16>::random(&gpu, rng, [rows, len, k], false, false);
        let (mut output, entries) = (ints(&gpu, &[]), ints(&gpu, &sparse.table));
        let offsets = ints(&gpu, &sparse.offsets);
        for options in unsorted() {
            sparse.page_table(&gpu, row_states, &mut output, &entries, &options).unwrap();
            sparse.ragged(&gpu, row_states, &mut output, &offsets, &options).unwrap();
        }
        assert_eq!(download(&gpu, &output), [POISON]);
    }
}

#[test]
fn wrong_input() {
    let Some(gpu) = start(Gpu::start) else { return };
    let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
    let mut row_states = RowStates::new(&gpu.stream).unwrap();
    let mut foreign = RowStates::new(&other.stream).unwrap();
    let input = Mirrored::<f16>::random(&gpu, rng, &[4, 6000]);
    let plain = options(|_| ());
    let mut output = Output::<f16>::poisoned(&gpu, 4, 100);
    refused(output.select(&gpu, &mut foreign, &input, &plain), "input");
    let mut select = |input: &Mirrored<f16>, rows, k, options: &TopKOptions| {
        Output::<f16>::poisoned(&gpu, rows, k).select(&gpu, &mut row_states, input, options)
    };
    refused(select(&input, 3, 100, &plain), "values");
    refused(select(&input, 4, 6001, &plain), "values");
    let padded = Mirrored::<f16>::random(&gpu, rng, &[4, 6008]).narrowed(1, 0, 6000);
    refused(select(&padded, 4, 100, &plain), "input");
    for change in [
        (|options| options.sorted = true) as fn(&mut TopKOptions),
        |options| options.dsa_graph_safe = true,
        |options| options.tie_break = TieBreak::Small,
    ] {
        refused(select(&input, 4, 2049, &options(change)), "options");
    }
    output.values.assert_untouched();

    let sparse = Sparse::<f16>::random(&gpu, rng, [4, 6000, 100], true, true);
    let (table, offsets) = (ints(&gpu, &sparse.table), ints(&gpu, &sparse.offsets));
    let mut output = ints(&gpu, &[POISON; 400]);
    {
        let mut output = output.tensor_mut(&gpu.cuda, &[4, 100]).unwrap();
        let mut output = output.view_mut();
        let input = sparse.input.device_view();
        let table = table.tensor(&gpu.cuda, &[3, 6003]).unwrap();
        let offsets = offsets.tensor(&gpu.cuda, &[4]).unwrap();
        let (table, offsets) = (table.view(), offsets.view());
        let mut both =
            |rows: &RowTable, table: &TensorRef<'_>, offsets: &TensorRef<'_>, options: &TopKOptions| {
                let states = &mut row_states;
                [
                    topk::radix_topk_page_table_transform(states, &mut output, &input, table, rows, options),
                    topk::radix_topk_ragged_transform(states, &mut output, &input, offsets, rows, options),
                ]
            };
        let mut refuse =
            |rows: RowIndices, table: &TensorRef<'_>, offsets: &TensorRef<'_>, expected: [&str; 2]| {
                let rows = RowTable::new(&gpu.stream, rows).unwrap();
                for (call, expected) in both(&rows, table, offsets, &plain).into_iter().zip(expected) {
                    refused(call, expected);
                }
            };
        let rows = || sparse.rows.clone();
        refuse(RowIndices::new([5; 3]).unwrap(), &table, &offsets, ["rows"; 2]);
        refuse(RowIndices::new([0, 0, 6001, 0]).unwrap(), &table, &offsets, ["rows"; 2]);
        let (narrow, few) = (table.narrow(1, 0, 10).unwrap(), offsets.narrow(0, 0, 3).unwrap());
        refuse(rows(), &narrow, &few, ["src_page_table", "offsets"]);
        let requests = rows().with_row_to_batch([0, 1, 3, 2]).unwrap();
        refuse(requests, &table, &few, ["src_page_table", "offsets"]);
        let elsewhere = RowTable::new(&other.stream, rows()).unwrap();
        for call in both(&elsewhere, &table, &offsets, &plain) {
            refused(call, "rows");
        }
        let here = RowTable::new(&gpu.stream, rows()).unwrap();
        let sorted = options(|options| options.sorted = true);
        for call in both(&here, &table, &offsets, &sorted) {
            refused(call, "options");
        }
    }
    assert_eq!(download(&gpu, &output), [POISON; 400]);
}

#[test]
fn filtered_is_implemented() {
    let Some(gpu) = start(Gpu::start) else { return };
    let can = topk::can_implement_filtered_topk(&gpu.stream).unwrap();
    match gpu.compute_capability() {
        (8, 0) | (9, 0) | (10, _) => assert!(can),
        (8, 6 | 9) | (12, _) => assert!(!can),
        other => say(&format!("compute capability {other:?}: {can}")),
    }
}
