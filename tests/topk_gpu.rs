//! Top-k selection on the GPU against the CPU reference.
#![cfg(feature = "cudarc")]

mod common;

use std::cmp::Ordering;

use common::{Gpu, Mirrored, Number, Rng, assert_same_bits, attention::capture, refused, say};
use cudarc::driver::{CudaSlice, result::ctx};
use flashinfer_rs::{
    ModuleName, Result, TensorMut, TensorRef,
    cudarc::{TensorExt, TensorExtMut},
    indices::{RowIndices, RowTable},
    reference,
    topk::{self, RowStates, TieBreak, TopKOptions},
};
use half::{bf16, f16};

/// What outputs of integers are filled with beforehand.
const POISON: i32 = i32::MIN;

fn start(start: fn() -> Option<Gpu>) -> Option<Gpu> {
    let gpu = start()?;
    gpu.runtime.preload([&ModuleName::TOPK]).expect("the module topk");
    Some(gpu)
}

fn options(change: impl FnOnce(&mut TopKOptions)) -> TopKOptions {
    let mut options = TopKOptions::default();
    change(&mut options);
    options
}

/// Every way of asking for unsorted output.
fn unsorted() -> [TopKOptions; 5] {
    [
        options(|_| ()),
        options(|options| options.deterministic = true),
        options(|options| options.tie_break = TieBreak::Small),
        options(|options| options.tie_break = TieBreak::Large),
        options(|options| options.dsa_graph_safe = true),
    ]
}

/// The kernels have these options for that `k`.
fn have(options: &TopKOptions, k: usize) -> bool {
    k <= 2048 || !(options.sorted || options.dsa_graph_safe || options.tie_break != TieBreak::None)
}

/// Integers on the device, of which there is at least one.
fn ints(gpu: &Gpu, integers: &[i32]) -> CudaSlice<i32> {
    gpu.cuda.clone_htod(if integers.is_empty() { &[POISON][..] } else { integers }).unwrap()
}

fn download(gpu: &Gpu, integers: &CudaSlice<i32>) -> Vec<i32> {
    let content = gpu.cuda.clone_dtoh(integers).unwrap();
    gpu.synchronize();
    content
}

/// Where a selection goes.
struct Output<T> {
    values: Mirrored<T>,
    indices: CudaSlice<i32>,
    shape: [usize; 2],
}

impl<T: Number> Output<T> {
    fn poisoned(gpu: &Gpu, rows: usize, k: usize) -> Self {
        let indices = ints(gpu, &vec![POISON; rows * k]);
        Self { values: Mirrored::poisoned(gpu, &[rows, k]), indices, shape: [rows, k] }
    }

    fn select(
        &mut self,
        gpu: &Gpu,
        row_states: &mut RowStates,
        input: &Mirrored<T>,
        options: &TopKOptions,
    ) -> Result<()> {
        let mut values = self.values.device_view_mut();
        let mut indices = self.indices.tensor_mut(&gpu.cuda, &self.shape).unwrap();
        let input = input.device_view();
        topk::radix_topk(row_states, &mut values.reborrow(), &mut indices.view_mut(), &input, options)
    }

    fn download(&self, gpu: &Gpu) -> (Vec<T>, Vec<i32>) {
        (self.values.download(), download(gpu, &self.indices))
    }

    /// What is on the device is a selection from `input` that has the options.
    #[track_caller]
    fn verify(&self, gpu: &Gpu, input: &Mirrored<T>, options: &TopKOptions) {
        let ([rows, k], len) = (self.shape, input.shape()[1]);
        let what = format!("{} {rows}x{len}, k {k}, {options:?}", T::DTYPE);
        let (mut want, mut want_indices) = (vec![0f64; rows * k], vec![0i32; rows * k]);
        reference::radix_topk(
            &mut TensorMut::from_slice(&mut want, &[rows, k]).unwrap(),
            &mut TensorMut::from_slice(&mut want_indices, &[rows, k]).unwrap(),
            &input.view(),
            options,
        )
        .unwrap();
        let (values, indices) = self.download(gpu);
        for row in 0..rows {
            let part = row * k..(row + 1) * k;
            let (values, indices) = (&values[part.clone()], &indices[part.clone()]);
            let scores = &input.host[row * len..(row + 1) * len];
            let places: Vec<_> = indices.iter().map(|&index| index as usize).collect();
            verify_places(&format!("{what}: row {row}"), scores, &places, &want[part.clone()]);
            let of_row: Vec<_> = places.iter().map(|&place| scores[place]).collect();
            assert_same_bits(&format!("{what}: values of row {row}"), values, &of_row);
            if options.sorted {
                let in_order = values.windows(2).all(|pair| descending(&pair[0], &pair[1]).is_le());
                assert!(in_order, "{what}: row {row} is not sorted");
            }
            if options.tie_break != TieBreak::None {
                assert_eq!(indices, &want_indices[part], "{what}: row {row}");
            }
        }
    }
}

fn descending<T: Number>(a: &T, b: &T) -> Ordering {
    b.to_f64().total_cmp(&a.to_f64())
}

/// No place is selected twice, and the scores there are the wanted ones, in
/// some order.
#[track_caller]
fn verify_places<T: Number>(what: &str, scores: &[T], places: &[usize], want: &[f64]) {
    let mut once: Vec<_> = places.to_vec();
    once.sort_unstable();
    once.dedup();
    let inside = once.last().is_none_or(|&last| last < scores.len());
    assert!(inside && once.len() == places.len(), "{what}: places {places:?} of {}", scores.len());
    let mut got: Vec<_> = places.iter().map(|&place| scores[place].to_f64()).collect();
    let mut want = want.to_vec();
    for numbers in [&mut got, &mut want] {
        numbers.sort_unstable_by(f64::total_cmp);
    }
    let differs = got.iter().zip(&want).position(|(got, want)| got.to_bits() != want.to_bits());
    assert!(got.len() == want.len(), "{what}: {} selected, not {}", got.len(), want.len());
    assert_eq!(differs.map(|at| (got[at], want[at])), None, "{what}: not the largest");
}

/// Selects with these options into memory of its own, and verifies it.
#[track_caller]
fn check<T: Number>(
    gpu: &Gpu,
    row_states: &mut RowStates,
    input: &Mirrored<T>,
    k: usize,
    options: &TopKOptions,
) {
    let mut output = Output::poisoned(gpu, input.shape()[0], k);
    output.select(gpu, row_states, input, options).unwrap();
    output.verify(gpu, input, options);
}

/// All options that there are for this `k`.
#[track_caller]
fn check_all<T: Number>(gpu: &Gpu, row_states: &mut RowStates, input: &Mirrored<T>, k: usize) {
    for mut options in unsorted() {
        for sorted in [false, true] {
            options.sorted = sorted;
            if have(&options, k) {
                check(gpu, row_states, input, k, &options);
            }
        }
    }
}

/// Rows, their length, `k`. Rows of 16 bits that are longer than 16384, and of
/// 32 bits that are longer than 32768 and few, share blocks; so do large `k`.
const SIZES: [[usize; 3]; 21] = [
    [1, 1, 1],
    [3, 2, 1],
    [5, 7, 7],
    [2, 31, 5],
    [4, 100, 100],
    [7, 1000, 999],
    [3, 1023, 1],
    [1, 2048, 2048],
    [2, 2049, 2048],
    [3, 4096, 2049],
    [2, 5000, 5000],
    [300, 8192, 64],
    [2000, 130, 16],
    [5, 32_000, 50],
    [1, 32_001, 2048],
    [20, 32_768, 256],
    [3, 50_257, 40],
    [2, 128_256, 2048],
    [1, 256_000, 1],
    [2, 256_000, 4000],
    [17, 256_000, 100],
];

fn sizes<T: Number>() {
    let Some(gpu) = start(Gpu::start) else { return };
    let (rng, row_states) = (&mut Rng::new(), &mut RowStates::new(&gpu.stream).unwrap());
    for [rows, len, k] in SIZES {
        let input = Mirrored::<T>::random(&gpu, rng, &[rows, len]);
        if rows * len > 1 << 21 {
            check(&gpu, row_states, &input, k, &options(|_| ()));
            check(&gpu, row_states, &input, k, &options(|options| options.deterministic = true));
            check(&gpu, row_states, &input, k, &options(|options| options.tie_break = TieBreak::Large));
        } else {
            check_all(&gpu, row_states, &input, k);
        }
    }
    for _ in 0..20 {
        let [rows, len] = [1 + rng.below(9), 1 + rng.below(60_000)];
        let k = 1 + rng.below(len.min(3000));
        check_all(&gpu, row_states, &Mirrored::<T>::random(&gpu, rng, &[rows, len]), k);
    }
}

#[test]
fn sizes_f32() {
    sizes::<f32>();
}

#[test]
fn sizes_f16() {
    sizes::<f16>();
}

#[test]
fn sizes_bf16() {
    sizes::<bf16>();
}

/// More rows than there are groups of blocks for, so that each group works off
/// several: groups of two blocks, of one, and of one whose rows are short.
#[test]
fn more_rows_than_groups() {
    let Some(gpu) = start(Gpu::start) else { return };
    let (rng, row_states) = (&mut Rng::new(), &mut RowStates::new(&gpu.stream).unwrap());
    for [rows, len, k] in [[100, 120_000, 100], [300, 20_000, 64], [3000, 2500, 2100]] {
        let input = Mirrored::<bf16>::random(&gpu, rng, &[rows, len]);
        for deterministic in [false, true] {
            let options = options(|options| options.deterministic = deterministic);
            check(&gpu, row_states, &input, k, &options);
        }
    }
}

/// Rows that need most blocks, and rows that need more than there are. Alone,
/// because blocks that wait for each other must all run at once.
#[test]
fn rows_of_millions() {
    let Some(gpu) = start(Gpu::start_alone) else { return };
    if gpu.runtime.compute_capability(0).unwrap() != (9, 0) {
        return say("skipped: how long rows may be is known for compute capability 9.0");
    }
    let (rng, row_states) = (&mut Rng::new(), &mut RowStates::new(&gpu.stream).unwrap());
    let input = Mirrored::<f32>::random(&gpu, rng, &[1, 5_500_001]);
    check(&gpu, row_states, &input, 1000, &options(|_| ()));
    check(&gpu, row_states, &input, 3000, &options(|options| options.deterministic = true));
    let input = Mirrored::<f32>::random(&gpu, rng, &[1, 9_000_000]);
    let mut output = Output::poisoned(&gpu, 1, 10);
    refused(output.select(&gpu, row_states, &input, &options(|_| ())), "input");
    check(&gpu, row_states, &input, 10, &options(|options| options.tie_break = TieBreak::Small));
}

/// Few different numbers, all the same, and so many in one step of the search
/// that *filtered* has no room for them.
fn ties<T: Number>() {
    let Some(gpu) = start(Gpu::start) else { return };
    let (rng, row_states) = (&mut Rng::new(), &mut RowStates::new(&gpu.stream).unwrap());
    let few = [-1.0, -0.0, 0.0, 2.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN];
    for [rows, len, k] in [[3, 40, 7], [4, 3000, 1000], [2, 70_000, 2048], [2, 70_000, 3000], [3, 150_000, 2]]
    {
        for kinds in [1, 2, 4, 7] {
            let numbers = (0..rows * len).map(|_| T::from_f64(few[rng.below(kinds)])).collect();
            check_all(&gpu, row_states, &Mirrored::<T>::new(&gpu, &[rows, len], numbers), k);
        }
        let close = (0..rows * len).map(|_| T::from_f64(1.0 + rng.unit() * 1e-4)).collect();
        check_all(&gpu, row_states, &Mirrored::<T>::new(&gpu, &[rows, len], close), k);
    }
}

#[test]
fn ties_f32() {
    ties::<f32>();
}

#[test]
fn ties_f16() {
    ties::<f16>();
}

#[test]
fn ties_bf16() {
    ties::<bf16>();
}

/// Where a NaN stands whose sign bit is set is not specified; that each place
/// is selected once, with its value, is.
#[test]
fn negative_nan() {
    let Some(gpu) = start(Gpu::start) else { return };
    let (rng, row_states) = (&mut Rng::new(), &mut RowStates::new(&gpu.stream).unwrap());
    for [rows, len, k] in [[3, 5000, 100], [3, 60_000, 2000], [2, 90_000, 4000]] {
        let number = |rng: &mut Rng| match rng.below(5) {
            0 => f32::from_bits(0xff80_0001 + rng.below(1 << 20) as u32),
            _ => rng.unit() as f32,
        };
        let numbers = (0..rows * len).map(|_| number(rng)).collect();
        let input = Mirrored::<f32>::new(&gpu, &[rows, len], numbers);
        for options in unsorted().into_iter().filter(|options| have(options, k)) {
            let mut output = Output::poisoned(&gpu, rows, k);
            output.select(&gpu, row_states, &input, &options).unwrap();
            let (values, indices) = output.download(&gpu);
            for row in 0..rows {
                let scores = &input.host[row * len..(row + 1) * len];
                let places: Vec<_> = indices[row * k..(row + 1) * k].iter().map(|&at| at as usize).collect();
                let of_row: Vec<_> = places.iter().map(|&place| scores[place]).collect();
                assert_same_bits("values", &values[row * k..(row + 1) * k], &of_row);
                let themselves: Vec<_> = of_row.iter().map(|value| f64::from(*value)).collect();
                verify_places(&format!("{options:?}"), scores, &places, &themselves);
            }
        }
    }
}

/// The same bits in the same order, every time.
fn repeats<T: Number>() {
    let Some(gpu) = start(Gpu::start) else { return };
    let (rng, row_states) = (&mut Rng::new(), &mut RowStates::new(&gpu.stream).unwrap());
    for [rows, len, k] in [[3, 4000, 500], [2, 256_000, 2000], [70, 20_000, 64], [1, 120_000, 5000]] {
        let numbers = (0..rows * len).map(|_| T::from_f64((rng.unit() * 50.0).round())).collect();
        let input = Mirrored::<T>::new(&gpu, &[rows, len], numbers);
        for sorted in [false, true] {
            let options = options(|options| (options.deterministic, options.sorted) = (true, sorted));
            if !have(&options, k) {
                continue;
            }
            let mut output = Output::poisoned(&gpu, rows, k);
            output.select(&gpu, row_states, &input, &options).unwrap();
            output.verify(&gpu, &input, &options);
            let (values, indices) = output.download(&gpu);
            for _ in 0..20 {
                let mut output = Output::poisoned(&gpu, rows, k);
                output.select(&gpu, row_states, &input, &options).unwrap();
                let again = output.download(&gpu);
                assert_same_bits("values", &again.0, &values);
                assert_eq!(again.1, indices);
            }
        }
    }
}

#[test]
fn repeats_f32() {
    repeats::<f32>();
}

#[test]
fn repeats_f16() {
    repeats::<f16>();
}

/// Parts of rows of scores, and what the transforms make of places in them.
struct Sparse<T> {
    input: Mirrored<T>,
    rows: RowIndices,
    k: usize,
    /// `[requests, width]`, each entry another number.
    table: Vec<i32>,
    requests: usize,
    width: usize,
    offsets: Vec<i32>,
}

impl<T: Number> Sparse<T> {
    /// Lengths around `k`, none and all among them; with parts that start
    /// anywhere, and rows of any of a few requests.
    fn random(gpu: &Gpu, rng: &mut Rng, [rows, len, k]: [usize; 3], starts: bool, requests: bool) -> Self {
        let lengths: Vec<usize> = (0..rows)
            .map(|_| {
                let some =
                    [0, 1, k.saturating_sub(1), k, k + 1, len, rng.below(len + 1), len - rng.below(len)];
                some[rng.below(some.len())].min(len)
            })
            .collect();
        let mut indices = RowIndices::new(lengths.iter().copied()).unwrap();
        if starts {
            let starts: Vec<_> = lengths.iter().map(|length| rng.below(len - length + 1)).collect();
            indices = indices.with_row_starts(starts).unwrap();
        }
        if requests {
            indices = indices.with_row_to_batch((0..rows).map(|_| rng.below(3))).unwrap();
        }
        let (requests, width) = (if requests { 3 } else { rows }, len + 3);
        Self {
            input: Mirrored::random(gpu, rng, &[rows, len]),
            rows: indices,
            k,
            table: rng.permutation(requests * width),
            requests,
            width,
            offsets: (0..rows).map(|_| rng.below(1 << 20) as i32 - 1000).collect(),
        }
    }

    fn shape(&self) -> [usize; 2] {
        [self.rows.len(), self.k]
    }

    fn page_table(
        &self,
        gpu: &Gpu,
        row_states: &mut RowStates,
        output: &mut CudaSlice<i32>,
        table: &CudaSlice<i32>,
        options: &TopKOptions,
    ) -> Result<()> {
        topk::radix_topk_page_table_transform(
            row_states,
            &mut output.tensor_mut(&gpu.cuda, &self.shape()).unwrap().view_mut(),
            &self.input.device_view(),
            &table.tensor(&gpu.cuda, &[self.requests, self.width]).unwrap().view(),
            &RowTable::new(&gpu.stream, self.rows.clone()).unwrap(),
            options,
        )
    }

    fn ragged(
        &self,
        gpu: &Gpu,
        row_states: &mut RowStates,
        output: &mut CudaSlice<i32>,
        offsets: &CudaSlice<i32>,
        options: &TopKOptions,
    ) -> Result<()> {
        topk::radix_topk_ragged_transform(
            row_states,
            &mut output.tensor_mut(&gpu.cuda, &self.shape()).unwrap().view_mut(),
            &self.input.device_view(),
            &offsets.tensor(&gpu.cuda, &[self.offsets.len()]).unwrap().view(),
            &RowTable::new(&gpu.stream, self.rows.clone()).unwrap(),
            options,
        )
    }

    /// What the reference makes of it: entries of the page table, and indices.
    fn expected(&self, options: &TopKOptions) -> [Vec<i32>; 2] {
        let shape = self.shape();
        let mut entries = vec![0; shape[0] * shape[1]];
        let mut indices = entries.clone();
        reference::radix_topk_page_table_transform(
            &mut TensorMut::from_slice(&mut entries, &shape).unwrap(),
            &self.input.view(),
            &TensorRef::from_slice(&self.table, &[self.requests, self.width]).unwrap(),
            &self.rows,
            options,
        )
        .unwrap();
        reference::radix_topk_ragged_transform(
            &mut TensorMut::from_slice(&mut indices, &shape).unwrap(),
            &self.input.view(),
            &TensorRef::from_slice(&self.offsets, &[self.offsets.len()]).unwrap(),
            &self.rows,
            options,
        )
        .unwrap();
        [entries, indices]
    }

    fn start(&self, row: usize) -> usize {
        self.rows.row_starts().map_or(0, |starts| starts[row] as usize)
    }

    fn length(&self, row: usize) -> usize {
        self.rows.lengths()[row] as usize
    }

    /// The scores of a row's part.
    fn scores(&self, row: usize) -> &[T] {
        &self.input.host[row * self.input.shape()[1]..][self.start(row)..][..self.length(row)]
    }

    /// `got` has the entries or indices of places that are a right selection,
    /// as `wanted` has. `place` gives the place in a row's part.
    #[track_caller]
    fn verify(
        &self,
        what: &str,
        options: &TopKOptions,
        got: &[i32],
        wanted: &[i32],
        place: impl Fn(usize, i32) -> usize,
    ) {
        let [rows, k] = self.shape();
        for row in 0..rows {
            let part = row * k..(row + 1) * k;
            let (got, wanted, len) = (&got[part.clone()], &wanted[part], self.length(row));
            let what =
                format!("{what} {} {len} of {}, k {k}, {options:?}, row {row}", T::DTYPE, self.width - 3);
            // What there is no choice in, and the order of it, is as it must be.
            if len <= k || options.tie_break != TieBreak::None {
                assert_eq!(got, wanted, "{what}");
            }
            let selected = k.min(len);
            let places = |entries: &[i32]| -> Vec<_> {
                entries[..selected].iter().map(|&entry| place(row, entry)).collect()
            };
            let scores = self.scores(row);
            let want: Vec<_> = places(wanted).into_iter().map(|place| scores[place].to_f64()).collect();
            verify_places(&what, scores, &places(got), &want);
        }
    }

    /// Both transforms, with every option.
    #[track_caller]
    fn check(&self, gpu: &Gpu, row_states: &mut RowStates) {
        let [rows, k] = self.shape();
        let (table, offsets) = (ints(gpu, &self.table), ints(gpu, &self.offsets));
        let mut place_of = vec![0; self.table.len()];
        for (place, &entry) in self.table.iter().enumerate() {
            place_of[entry as usize] = place;
        }
        for options in unsorted().into_iter().filter(|options| have(options, k)) {
            let [want_entries, want_indices] = self.expected(&options);
            let mut output = ints(gpu, &vec![POISON; rows * k]);
            self.page_table(gpu, row_states, &mut output, &table, &options).unwrap();
            self.verify("page table", &options, &download(gpu, &output), &want_entries, |row, entry| {
                let request = self.rows.row_to_batch().map_or(row, |requests| requests[row] as usize);
                assert!((0..self.table.len() as i32).contains(&entry), "{entry} is no entry");
                place_of[entry as usize].wrapping_sub(request * self.width + self.start(row))
            });
            let mut output = ints(gpu, &vec![POISON; rows * k]);
            self.ragged(gpu, row_states, &mut output, &offsets, &options).unwrap();
            self.verify("ragged", &options, &download(gpu, &output), &want_indices, |row, index| {
                index.wrapping_sub(self.offsets[row]) as usize
            });
        }
    }
}

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

#[test]
fn transforms_f32() {
    transforms::<f32>();
}

#[test]
fn transforms_f16() {
    transforms::<f16>();
}

#[test]
fn transforms_bf16() {
    transforms::<bf16>();
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

#[test]
fn graph_replay_of_filtered() {
    graph_replay::<f32>([5, 3000, 100]);
}

#[test]
fn graph_replay_of_radix() {
    graph_replay::<f16>([3, 130_000, 700]);
}

#[test]
fn wrong_input() {
    let Some(gpu) = start(Gpu::start) else { return };
    let (rng, other) = (&mut Rng::new(), gpu.fork());
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
    match gpu.runtime.compute_capability(0).unwrap() {
        (8, 0) | (9, 0) | (10, _) => assert!(can),
        (8, 6 | 9) | (12, _) => assert!(!can),
        other => say(&format!("compute capability {other:?}: {can}")),
    }
}

/// The launchers make the tensors' device current; afterwards it is what it was
/// before.
#[test]
fn the_current_device_is_put_back() {
    let Some(first) = start(Gpu::start) else { return };
    if first.runtime.device_count().unwrap() < 2 {
        return say("skipped: there is one GPU only");
    }
    let second = first.on_device(1);
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
