//! Top-k selection on the GPU against the CPU reference.
#![cfg(feature = "cudarc")]

mod common;

mod topk_gpu {
    mod streams;
    mod transforms;
    mod wrong_input;
}

use common::{Gpu, Mirrored, Number, Rng, assert_same_bits, attention::capture, refused, say};
use cudarc::driver::{CudaSlice, result::ctx};
use flashinfer_rs::{
    ModuleName, Result, TensorMut, TensorRef,
    gpu::{TensorExt, TensorExtMut},
    indices::{RowIndices, RowTable},
    reference,
    topk::{self, RowStates, TieBreak, TopKOptions},
};
use half::{bf16, f16};
use std::{cmp::Ordering, time::Instant};
use test_support::seconds;

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

/// Selects into other memory what was selected before: the same bits in the same order.
#[track_caller]
fn check_again<T: Number>(
    gpu: &Gpu,
    row_states: &mut RowStates,
    input: &Mirrored<T>,
    options: &TopKOptions,
    (values, indices): &(Vec<T>, Vec<i32>),
) {
    let rows = input.shape()[0];
    let mut output = Output::poisoned(gpu, rows, indices.len() / rows);
    output.select(gpu, row_states, input, options).unwrap();
    let again = output.download(gpu);
    assert_same_bits("values", &again.0, values);
    assert_eq!(again.1, *indices);
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

typed_tests! {
    sizes_f32: sizes::<f32>();
    sizes_f16: sizes::<f16>();
    sizes_bf16: sizes::<bf16>();
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
    if gpu.compute_capability() != (9, 0) {
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

typed_tests! {
    ties_f32: ties::<f32>();
    ties_f16: ties::<f16>();
    ties_bf16: ties::<bf16>();
}

/// More scores that are nearly the same than *filtered* has room for: it reads rows again, byte by byte, and
/// before 0.7 its warps do not wait for each other between bytes (`docs/soundness.md`). For as long as is asked.
#[test]
fn rows_that_are_read_again() {
    let Some(gpu) = start(Gpu::start) else { return };
    let (rng, row_states) = (&mut Rng::new(), &mut RowStates::new(&gpu.stream).unwrap());
    let [rows, len, k] = [528, 20_000, 40];
    // All between 2 and 2.5, which the first step does not tell apart; of some twenty of them the second byte is
    // the largest.
    let score = |rng: &mut Rng| {
        let fraction = rng.below(1 << 20) as f32 / (1 << 20) as f32;
        if rng.below(1000) == 0 { 2.485 + fraction * 0.014 } else { 2.01 + fraction * 0.47 }
    };
    let input = Mirrored::<f32>::new(&gpu, &[rows, len], (0..rows * len).map(|_| score(rng)).collect());
    let options = options(|options| options.tie_break = TieBreak::Small);
    let mut output = Output::poisoned(&gpu, rows, k);
    output.select(&gpu, row_states, &input, &options).unwrap();
    output.verify(&gpu, &input, &options);
    let first = output.download(&gpu);
    let (begin, time) = (Instant::now(), seconds(1));
    let mut selected = 0;
    while begin.elapsed() < time {
        check_again(&gpu, row_states, &input, &options, &first);
        selected += rows;
    }
    say(&format!("{selected} rows were selected from"));
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
            let first = output.download(&gpu);
            (0..20).for_each(|_| check_again(&gpu, row_states, &input, &options, &first));
        }
    }
}

typed_tests! {
    repeats_f32: repeats::<f32>();
    repeats_f16: repeats::<f16>();
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
