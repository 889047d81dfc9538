//! Selection into page tables and ragged indices.

use crate::*;

fn transforms<T: Number>() {
    let Some(gpu) = start(Gpu::start) else { return };
    let (rng, row_states) = (&mut Rng::new(), &mut RowStates::new(&gpu.stream).unwrap());
    for sizes in [
        [1, 1, 1],
        [7, 40, 8],
        [6, 5, 9],
        [5, 1000, 100],
        [33, 4096, 256],
        [4, 8191, 2048],
        [5, 8192, 2049],
        [3, 3000, 5000],
        [4, 100_000, 64],
        [4, 100_000, 3000],
        [3, 256_000, 512],
    ] {
        for (starts, requests) in [(false, false), (true, false), (false, true), (true, true)] {
            Sparse::<T>::random(&gpu, rng, sizes, starts, requests).check(&gpu, row_states);
        }
    }
}

typed_tests! {
    transforms_f32: transforms::<f32>();
    transforms_f16: transforms::<f16>();
    transforms_bf16: transforms::<bf16>();
}

/// Entries of the page table and offsets may be any numbers: they are copied
/// and added to, and lead nowhere.
#[test]
fn entries_and_offsets_lead_nowhere() {
    let Some(gpu) = start(Gpu::start) else { return };
    let (rng, row_states) = (&mut Rng::new(), &mut RowStates::new(&gpu.stream).unwrap());
    for sizes in [[5, 1000, 100], [4, 100_000, 64]] {
        let mut sparse = Sparse::<f32>::random(&gpu, rng, sizes, true, true);
        let options = options(|options| options.deterministic = true);
        let mut run = |sparse: &Sparse<f32>| {
            let poisoned = vec![POISON; sizes[0] * sizes[2]];
            let [mut entries, mut indices] = [ints(&gpu, &poisoned), ints(&gpu, &poisoned)];
            let (table, offsets) = (ints(&gpu, &sparse.table), ints(&gpu, &sparse.offsets));
            sparse.page_table(&gpu, row_states, &mut entries, &table, &options).unwrap();
            sparse.ragged(&gpu, row_states, &mut indices, &offsets, &options).unwrap();
            [download(&gpu, &entries), download(&gpu, &indices)]
        };
        let [entries, indices] = run(&sparse);
        let old = sparse.offsets.clone();
        sparse.table.iter_mut().for_each(|entry| *entry ^= i32::MIN);
        sparse.offsets.iter_mut().for_each(|offset| *offset = i32::MIN);
        let [far_entries, far_indices] = run(&sparse);
        for (at, row) in (0..sizes[0] * sizes[2]).map(|at| (at, at / sizes[2])) {
            if at % sizes[2] >= sparse.length(row) {
                assert_eq!([far_entries[at], far_indices[at]], [-1; 2], "beyond row {row}");
                continue;
            }
            assert_eq!(far_entries[at], entries[at] ^ i32::MIN, "place {at}");
            assert_eq!(far_indices[at], (indices[at] - old[row]).wrapping_add(i32::MIN), "place {at}");
        }
    }
}

/// Groups of blocks that work off several rows, some of which need no search.
#[test]
fn transforms_of_more_rows_than_groups() {
    let Some(gpu) = start(Gpu::start) else { return };
    let (rng, row_states) = (&mut Rng::new(), &mut RowStates::new(&gpu.stream).unwrap());
    Sparse::<bf16>::random(&gpu, rng, [140, 120_000, 64], true, true).check(&gpu, row_states);
}
