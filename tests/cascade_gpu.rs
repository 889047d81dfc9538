//! Merging attention states, and attention of several levels, on the GPU
//! against the CPU reference.
#![cfg(feature = "cudarc")]

mod common;

mod cascade_gpu {
    mod levels;
}

use common::{
    Gpu, Mirrored, Number, Rng, assert_same_bits, at_hand,
    cache::{Cache, CacheShape, table_among},
    refused,
};
use flashinfer_rs::{
    PageIndices, PageTable, TensorMut,
    attention::{AttentionSpec, BatchDecode, Heads, PlanOptions, RunOptions, Workspace},
    cascade::{self, State, StateMut},
    gpu::TensorExt,
    kv::KvLayout,
    reference,
};
use half::{bf16, f16};

/// The largest absolute error of a base-2 LSE that the kernels compute in f32.
const S_BOUND: f64 = 1e-4;

/// Outputs and LSE on the device.
struct Held<T> {
    v: Mirrored<T>,
    s: Mirrored<f32>,
}

impl<T: Number> Held<T> {
    /// A state of this shape of `v`; some LSE far apart.
    fn random(gpu: &Gpu, rng: &mut Rng, shape: &[usize]) -> Self {
        let v = Mirrored::random(gpu, rng, shape);
        Self { v, s: Mirrored::random_scaled(gpu, rng, &shape[..shape.len() - 1], 4.0) }
    }

    fn poisoned(gpu: &Gpu, shape: &[usize]) -> Self {
        Self { v: Mirrored::poisoned(gpu, shape), s: Mirrored::poisoned(gpu, &shape[..shape.len() - 1]) }
    }

    /// No keys: zeros, and −∞.
    fn empty(gpu: &Gpu, shape: &[usize]) -> Self {
        let count = shape.iter().product::<usize>();
        let sums = count / shape[shape.len() - 1];
        Self {
            v: Mirrored::new(gpu, shape, vec![T::from_f64(0.0); count]),
            s: Mirrored::new(gpu, &shape[..shape.len() - 1], vec![f32::NEG_INFINITY; sums]),
        }
    }

    fn copy(&self, gpu: &Gpu) -> Self {
        Self {
            v: Mirrored::new(gpu, &self.v.shape(), self.v.host.clone()),
            s: Mirrored::new(gpu, &self.s.shape(), self.s.host.clone()),
        }
    }

    fn view(&self) -> State<'_> {
        State::new(self.v.view(), self.s.view())
    }

    /// What the reference makes of the host copy.
    fn solve(&self, op: impl FnOnce(&mut StateMut<'_>)) -> (Vec<f64>, Vec<f64>) {
        let (mut v, mut s) = (self.v.wide(), self.s.wide());
        op(&mut StateMut::new(
            TensorMut::from_slice(&mut v, &self.v.shape()).unwrap(),
            TensorMut::from_slice(&mut s, &self.s.shape()).unwrap(),
        ));
        (v, s)
    }

    #[track_caller]
    fn assert_close(&self, what: &str, want: &(Vec<f64>, Vec<f64>)) {
        self.v.assert_close(what, &want.0, T::BOUND);
        assert_sums(what, &self.s.download(), &want.1, S_BOUND);
    }
}

#[track_caller]
fn assert_sums(what: &str, got: &[f32], want: &[f64], bound: f64) {
    for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
        let got = f64::from(got);
        let agrees = if want.is_finite() { (got - want).abs() <= bound } else { got == want };
        assert!(agrees, "{what}: LSE {at} is {got}, not {want}");
    }
}

/// Calls an operation with a state to write and one to read.
fn with<T: Number, R>(
    target: &mut Held<T>,
    source: &Held<T>,
    op: impl FnOnce(&mut StateMut<'_>, &State<'_>) -> R,
) -> R {
    let (mut v, mut s) = (target.v.device_view_mut(), target.s.device_view_mut());
    let (source_v, source_s) = (source.v.device_view(), source.s.device_view());
    op(&mut StateMut::new(v.reborrow(), s.reborrow()), &State::new(source_v, source_s))
}

/// Heads of many widths, also more of them than a block has threads for.
const SHAPES: [[usize; 3]; 16] = [
    [3, 5, 8],
    [4, 3, 96],
    [2, 7, 192],
    [2, 3, 1024],
    [1, 1, 64],
    [7, 32, 64],
    [3, 128, 64],
    [5, 130, 64],
    [5, 40, 128],
    [3, 65, 128],
    [300, 8, 128],
    [3, 32, 256],
    [2, 37, 256],
    [4, 16, 512],
    [3, 128, 512],
    [70_000, 1, 64],
];

fn check_pair<T: Number>(gpu: &Gpu, a: &Held<T>, b: &Held<T>) {
    let shape = a.v.shape();
    let mut merged = Held::poisoned(gpu, &shape);
    let want = merged.solve(|merged| reference::merge_state(merged, &a.view(), &b.view()).unwrap());
    with(&mut merged, a, |merged, a| {
        let (v, s) = (b.v.device_view(), b.s.device_view());
        cascade::merge_state(&gpu.stream, merged, a, &State::new(v, s)).unwrap();
    });
    merged.assert_close(&format!("merge_state {shape:?}"), &want);

    let mut in_place = a.copy(gpu);
    with(&mut in_place, b, |state, other| {
        cascade::merge_state_in_place(&gpu.stream, state, other, None).unwrap();
    });
    in_place.assert_close(&format!("merge_state_in_place {shape:?}"), &want);
}

fn pairs<T: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for shape in SHAPES {
        check_pair::<T>(&gpu, &Held::random(&gpu, rng, &shape), &Held::random(&gpu, rng, &shape));
    }
}

typed_tests! {
    pairs_f16: pairs::<f16>();
    pairs_bf16: pairs::<bf16>();
}

/// A state without keys changes nothing, on either side.
#[test]
fn one_state_without_keys() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let shape = [5, 8, 128];
    let (some, none) = (Held::<f16>::random(&gpu, rng, &shape), Held::empty(&gpu, &shape));
    check_pair(&gpu, &some, &none);
    check_pair(&gpu, &none, &some);
}

/// Two of them give nothing again, and so do many.
#[test]
fn only_states_without_keys() {
    let Some(gpu) = Gpu::start() else { return };
    let none = Held::<f16>::empty(&gpu, &[2, 4, 64]);
    check_pair(&gpu, &none, &none);
    for count in [2, 3, 40] {
        check_states(&gpu, &Held::<f16>::empty(&gpu, &[3, count, 4, 64]));
    }
}

#[test]
fn masks() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for [rows, heads, head_dim] in [[1, 8, 128], [33, 128, 64], [70, 64, 128], [9, 32, 512]] {
        let shape = [rows, heads, head_dim];
        let (a, b) = (Held::<bf16>::random(&gpu, rng, &shape), Held::random(&gpu, rng, &shape));
        let mask: Vec<u8> = (0..rows).map(|_| [0, 1, 255][rng.below(3)]).collect();
        let host_mask = flashinfer_rs::TensorRef::from_slice(&mask, &[rows]).unwrap();
        // Rows that are not merged keep their bits.
        let (mut v, mut s) = (a.v.host.clone(), a.s.host.clone());
        let mut state = StateMut::new(
            TensorMut::from_slice(&mut v, &shape).unwrap(),
            TensorMut::from_slice(&mut s, &shape[..2]).unwrap(),
        );
        reference::merge_state_in_place(&mut state, &b.view(), Some(&host_mask)).unwrap();
        let wide = (v.iter().map(|v| v.to_f64()).collect(), s.iter().map(|&s| f64::from(s)).collect());
        let device_mask = gpu.cuda.clone_htod(&mask).unwrap();
        let device_mask = device_mask.tensor(&gpu.cuda, &[rows]).unwrap();
        let mut merged = a.copy(&gpu);
        with(&mut merged, &b, |state, other| {
            cascade::merge_state_in_place(&gpu.stream, state, other, Some(&device_mask.view())).unwrap();
        });
        merged.assert_close(&format!("masked {shape:?}"), &wide);
        let (v, s) = (merged.v.download(), merged.s.download());
        for row in (0..rows).filter(|&row| mask[row] == 0) {
            let v_row = row * heads * head_dim..(row + 1) * heads * head_dim;
            assert_same_bits("kept", &v[v_row.clone()], &a.v.host[v_row]);
            let s_row = row * heads..(row + 1) * heads;
            assert_same_bits("kept", &s[s_row.clone()], &a.s.host[s_row]);
        }
    }
}

/// Few states of many rows, where a block serves a row; many states of few
/// rows, where a block serves a head.
fn several<T: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for [heads, head_dim] in [[1, 64], [128, 64], [40, 128], [32, 256], [16, 512]] {
        for [rows, count] in [[1, 1], [5, 1], [9, 2], [9, 8], [3, 3], [2, 5], [1, 17], [1, 300]] {
            let states = Held::<T>::random(&gpu, rng, &[rows, count, heads, head_dim]);
            check_states(&gpu, &states);
        }
    }
    // Many states, and more heads than a block has threads for.
    check_states(&gpu, &Held::<T>::random(&gpu, rng, &[2, 4, 100, 512]));
}

fn check_states<T: Number>(gpu: &Gpu, states: &Held<T>) {
    let shape = states.v.shape();
    let mut merged = Held::<T>::poisoned(gpu, &[shape[0], shape[2], shape[3]]);
    let want = merged.solve(|merged| reference::merge_states(merged, &states.view()).unwrap());
    with(&mut merged, states, |merged, states| {
        cascade::merge_states(&gpu.stream, merged, states).unwrap();
    });
    merged.assert_close(&format!("merge_states {shape:?}"), &want);
}

typed_tests! {
    several_f16: several::<f16>();
    several_bf16: several::<bf16>();
}

/// States without keys among others, also as the first.
#[test]
fn several_with_empty_ones() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for [rows, count] in [[9, 4], [3, 70]] {
        let shape = [rows, count, 4, 128];
        let mut states = Held::<f16>::random(&gpu, rng, &shape);
        let (mut v, mut s) = (states.v.host.clone(), states.s.host.clone());
        for at in 0..s.len() {
            if at / 4 % count == 0 || rng.below(3) == 0 {
                s[at] = f32::NEG_INFINITY;
                v[at * 128..(at + 1) * 128].fill(f16::ZERO);
            }
        }
        states = Held { v: Mirrored::new(&gpu, &shape, v), s: Mirrored::new(&gpu, &shape[..3], s) };
        check_states(&gpu, &states);
    }
}

#[test]
fn nothing_to_merge() {
    let Some(gpu) = Gpu::start() else { return };
    for [rows, heads] in [[0, 8], [4, 0]] {
        let mut target = Held::<f16>::poisoned(&gpu, &[rows, heads, 128]);
        let source = Held::<f16>::poisoned(&gpu, &[rows, heads, 128]);
        with(&mut target, &source, |state, other| {
            cascade::merge_state_in_place(&gpu.stream, state, other, None).unwrap();
            cascade::merge_state(&gpu.stream, state, other, other).unwrap();
        });
        let states = Held::<f16>::poisoned(&gpu, &[rows, 3, heads, 128]);
        with(&mut target, &states, |merged, states| {
            cascade::merge_states(&gpu.stream, merged, states).unwrap();
        });
        gpu.synchronize();
    }
}

/// Decode over the pages that requests share, merged with decode over their
/// own, is decode over all.
fn shared_prefix<T: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let heads = Heads::new(16, 4);
    let decode = BatchDecode::new(&gpu.stream, &AttentionSpec::new(T::DTYPE, 128), heads);
    let Some(decode) = at_hand(&gpu, decode) else { return };
    let mut workspace = Workspace::new(&gpu.stream).unwrap();
    for (page_size, prefix_pages, own_lens) in
        [(16, 4, vec![1, 16, 17, 0, 77]), (1, 300, vec![5, 1]), (64, 1, vec![200, 3, 64])]
    {
        let batch = own_lens.len();
        let own_pages: usize = own_lens.iter().map(|len: &usize| len.div_ceil(page_size)).sum();
        let num_pages = prefix_pages + own_pages + 2;
        // The first request of this table has the prefix, the others their own.
        let lens: Vec<usize> = [&[prefix_pages * page_size], &own_lens[..]].concat();
        let parts = table_among(rng, num_pages, page_size, &lens);
        let shape = CacheShape {
            pages: num_pages,
            page_size,
            heads: heads.num_kv_heads,
            head_dim: 128,
            layout: KvLayout::Nhd,
            joined: false,
        };
        let cache = Cache::<T>::random(&gpu, rng, shape, &parts);
        let q = Mirrored::<T>::random(&gpu, rng, &[batch, heads.num_qo_heads, 128]);
        let table = |of: &dyn Fn(usize) -> (Vec<i32>, usize)| {
            let requests: Vec<_> = (0..batch).map(of).collect();
            let requests = requests.iter().map(|(pages, len)| (&pages[..], *len));
            PageIndices::from_requests(num_pages, page_size, requests).unwrap()
        };
        let prefix = table(&|_| (parts.pages(0).to_vec(), lens[0]));
        let own = table(&|request| (parts.pages(request + 1).to_vec(), own_lens[request]));
        let flat = table(&|request| {
            ([parts.pages(0), parts.pages(request + 1)].concat(), lens[0] + own_lens[request])
        });
        let mut run = |indices: PageIndices| {
            let mut state = Held::<T>::poisoned(&gpu, &[batch, heads.num_qo_heads, 128]);
            let table = PageTable::new(&gpu.stream, indices).unwrap();
            let plan = decode.plan(&mut workspace, &table, &PlanOptions::default()).unwrap();
            plan.run_with(
                &q.device_view(),
                &cache.device_view(),
                &mut state.v.device_view_mut(),
                Some(&mut state.s.device_view_mut()),
                &RunOptions::default(),
            )
            .unwrap();
            state
        };
        let (mut merged, own, gpu_flat) = (run(prefix), run(own), run(flat.clone()));
        with(&mut merged, &own, |state, other| {
            cascade::merge_state_in_place(&gpu.stream, state, other, None).unwrap();
        });
        let want = merged.solve(|state| {
            reference::batch_decode(
                &AttentionSpec::new(T::DTYPE, 128),
                &q.view(),
                &cache.view(),
                &flat,
                &mut state.v,
                Some(&mut state.s),
                &RunOptions::default(),
            )
            .unwrap();
        });
        for (what, state) in [("two levels", &merged), ("one level", &gpu_flat)] {
            // Two levels round three times.
            state.v.assert_close(what, &want.0, 2.0 * T::BOUND);
            assert_sums(what, &state.s.download(), &want.1, 1e-2);
        }
    }
}

typed_tests! {
    shared_prefix_f16: shared_prefix::<f16>();
    shared_prefix_bf16: shared_prefix::<bf16>();
}

/// What needs device slices to show; the rest is in `wrong_input.rs`.
#[test]
fn wrong_stream() {
    let Some(gpu) = Gpu::start() else { return };
    let other = gpu.elsewhere();
    let mut state = Held::<f16>::poisoned(&gpu, &[2, 4, 64]);
    let source = Held::<f16>::empty(&gpu, &[2, 4, 64]);
    let call = with(&mut state, &source, |state, source| {
        cascade::merge_state_in_place(&other.stream, state, source, None)
    });
    refused(call, "state.v");
    state.v.assert_untouched();
    state.s.assert_untouched();
}
