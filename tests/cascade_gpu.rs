//! Merging attention states on the GPU against the CPU reference.
#![cfg(feature = "cudarc")]

mod common;

use common::{
    Gpu, Number, Rng, Tensor, assert_same_bits,
    cache::{Cache, CacheShape, table_among},
    refused,
};
use flashinfer_rs::{
    ModuleName, PageIndices, PageTable, TensorMut,
    attention::{AttentionSpec, BatchDecode, Heads, PlanMode, RunOptions, Workspace},
    cascade::{self, State, StateMut},
    cudarc::TensorExt,
    page::KvLayout,
    reference,
};
use half::{bf16, f16};

/// The largest absolute error of a base-2 LSE that the kernels compute in f32.
const S_BOUND: f64 = 1e-4;
/// The most that the LSE of a state without keys is, where a kernel has given
/// its own infinity.
const S_OF_NOTHING: f64 = -4e4;

fn start() -> Option<Gpu> {
    let gpu = Gpu::start()?;
    gpu.runtime.preload([&ModuleName::CASCADE]).expect("the module cascade");
    Some(gpu)
}

/// Outputs and LSE on the device.
struct Held<T> {
    v: Tensor<T>,
    s: Tensor<f32>,
}

impl<T: Number> Held<T> {
    /// A state of this shape of `v`; some LSE far apart.
    fn random(gpu: &Gpu, rng: &mut Rng, shape: &[usize]) -> Self {
        let v = Tensor::random(gpu, rng, shape);
        Self { v, s: Tensor::random_scaled(gpu, rng, &shape[..shape.len() - 1], 4.0) }
    }

    fn poisoned(gpu: &Gpu, shape: &[usize]) -> Self {
        Self { v: Tensor::poisoned(gpu, shape), s: Tensor::poisoned(gpu, &shape[..shape.len() - 1]) }
    }

    /// No keys: zeros, and −∞.
    fn empty(gpu: &Gpu, shape: &[usize]) -> Self {
        let count = shape.iter().product::<usize>();
        let sums = count / shape[shape.len() - 1];
        Self {
            v: Tensor::new(gpu, shape, vec![T::from_f64(0.0); count]),
            s: Tensor::new(gpu, &shape[..shape.len() - 1], vec![f32::NEG_INFINITY; sums]),
        }
    }

    fn copy(&self, gpu: &Gpu) -> Self {
        Self {
            v: Tensor::new(gpu, &self.v.shape(), self.v.host.clone()),
            s: Tensor::new(gpu, &self.s.shape(), self.s.host.clone()),
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
    fn assert_close(&self, gpu: &Gpu, what: &str, want: &(Vec<f64>, Vec<f64>)) {
        self.v.assert_close(gpu, what, &want.0, T::BOUND);
        assert_sums(what, &self.s.download(gpu), &want.1, S_BOUND);
    }
}

#[track_caller]
fn assert_sums(what: &str, got: &[f32], want: &[f64], bound: f64) {
    for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
        let got = f64::from(got);
        let agrees = if want > S_OF_NOTHING { (got - want).abs() <= bound } else { got <= S_OF_NOTHING };
        assert!(agrees, "{what}: LSE {at} is {got}, not {want}");
    }
}

/// Calls an operation with a state to write and one to read.
fn with<T: Number, R>(
    gpu: &Gpu,
    target: &mut Held<T>,
    source: &Held<T>,
    op: impl FnOnce(&mut StateMut<'_>, &State<'_>) -> R,
) -> R {
    let (mut v, mut s) = (target.v.on_mut(gpu), target.s.on_mut(gpu));
    let (source_v, source_s) = (source.v.on(gpu), source.s.on(gpu));
    op(&mut StateMut::new(v.view_mut(), s.view_mut()), &State::new(source_v.view(), source_s.view()))
}

/// Heads of 64, 128, 256 and 512 elements, also more of them than a block has
/// threads for.
const SHAPES: [[usize; 3]; 12] = [
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
    with(gpu, &mut merged, a, |merged, a| {
        let (v, s) = (b.v.on(gpu), b.s.on(gpu));
        cascade::merge_state(&gpu.stream, merged, a, &State::new(v.view(), s.view())).unwrap();
    });
    merged.assert_close(gpu, &format!("merge_state {shape:?}"), &want);

    let mut in_place = a.copy(gpu);
    with(gpu, &mut in_place, b, |state, other| {
        cascade::merge_state_in_place(&gpu.stream, state, other, None).unwrap();
    });
    in_place.assert_close(gpu, &format!("merge_state_in_place {shape:?}"), &want);
}

fn pairs<T: Number>() {
    let Some(gpu) = start() else { return };
    let rng = &mut Rng::new();
    for shape in SHAPES {
        check_pair::<T>(&gpu, &Held::random(&gpu, rng, &shape), &Held::random(&gpu, rng, &shape));
    }
}

#[test]
fn pairs_f16() {
    pairs::<f16>();
}

#[test]
fn pairs_bf16() {
    pairs::<bf16>();
}

/// A state without keys changes nothing, on either side.
#[test]
fn one_state_without_keys() {
    let Some(gpu) = start() else { return };
    let rng = &mut Rng::new();
    let shape = [5, 8, 128];
    let (some, none) = (Held::<f16>::random(&gpu, rng, &shape), Held::empty(&gpu, &shape));
    check_pair(&gpu, &some, &none);
    check_pair(&gpu, &none, &some);
}

/// Two of them give NaN in a pair, and a state without keys among several.
#[test]
fn only_states_without_keys() {
    let Some(gpu) = start() else { return };
    let none = Held::<f16>::empty(&gpu, &[2, 4, 64]);
    let mut merged = Held::<f16>::empty(&gpu, &[2, 4, 64]);
    with(&gpu, &mut merged, &none, |state, other| {
        cascade::merge_state_in_place(&gpu.stream, state, other, None).unwrap();
    });
    assert!(merged.s.download(&gpu).iter().all(|s| s.is_nan()));
    assert!(merged.v.download(&gpu).iter().all(|v| v.is_nan()));
    for count in [2, 3, 40] {
        let mut merged = Held::<f16>::poisoned(&gpu, &[3, 4, 64]);
        let states = Held::<f16>::empty(&gpu, &[3, count, 4, 64]);
        with(&gpu, &mut merged, &states, |merged, states| {
            cascade::merge_states(&gpu.stream, merged, states).unwrap();
        });
        merged.assert_close(&gpu, "nothing", &(vec![0.0; 3 * 4 * 64], vec![f64::NEG_INFINITY; 12]));
    }
}

#[test]
fn masks() {
    let Some(gpu) = start() else { return };
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
        with(&gpu, &mut merged, &b, |state, other| {
            cascade::merge_state_in_place(&gpu.stream, state, other, Some(&device_mask.view())).unwrap();
        });
        merged.assert_close(&gpu, &format!("masked {shape:?}"), &wide);
        let (v, s) = (merged.v.download(&gpu), merged.s.download(&gpu));
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
    let Some(gpu) = start() else { return };
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
    with(gpu, &mut merged, states, |merged, states| {
        cascade::merge_states(&gpu.stream, merged, states).unwrap();
    });
    merged.assert_close(gpu, &format!("merge_states {shape:?}"), &want);
}

#[test]
fn several_f16() {
    several::<f16>();
}

#[test]
fn several_bf16() {
    several::<bf16>();
}

/// States without keys among others, also as the first.
#[test]
fn several_with_empty_ones() {
    let Some(gpu) = start() else { return };
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
        states = Held { v: Tensor::new(&gpu, &shape, v), s: Tensor::new(&gpu, &shape[..3], s) };
        check_states(&gpu, &states);
    }
}

#[test]
fn nothing_to_merge() {
    let Some(gpu) = start() else { return };
    for [rows, heads] in [[0, 8], [4, 0]] {
        let mut target = Held::<f16>::poisoned(&gpu, &[rows, heads, 128]);
        let source = Held::<f16>::poisoned(&gpu, &[rows, heads, 128]);
        with(&gpu, &mut target, &source, |state, other| {
            cascade::merge_state_in_place(&gpu.stream, state, other, None).unwrap();
            cascade::merge_state(&gpu.stream, state, other, other).unwrap();
        });
        let states = Held::<f16>::poisoned(&gpu, &[rows, 3, heads, 128]);
        with(&gpu, &mut target, &states, |merged, states| {
            cascade::merge_states(&gpu.stream, merged, states).unwrap();
        });
        gpu.synchronize();
    }
}

/// Decode over the pages that requests share, merged with decode over their
/// own, is decode over all.
fn shared_prefix<T: Number>() {
    let Some(gpu) = start() else { return };
    let rng = &mut Rng::new();
    let heads = Heads { num_qo_heads: 16, num_kv_heads: 4 };
    let decode =
        BatchDecode::new(gpu.runtime, &AttentionSpec::new(T::DTYPE, 128), heads).expect("the module");
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
        let q = Tensor::<T>::random(&gpu, rng, &[batch, heads.num_qo_heads, 128]);
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
            let plan = decode.plan(&mut workspace, &table, PlanMode::Eager).unwrap();
            plan.run(
                &q.on(&gpu).view(),
                &cache.on(&gpu).kv(),
                &mut state.v.on_mut(&gpu).view_mut(),
                Some(&mut state.s.on_mut(&gpu).view_mut()),
                &RunOptions::default(),
            )
            .unwrap();
            state
        };
        let (mut merged, own, gpu_flat) = (run(prefix), run(own), run(flat.clone()));
        with(&gpu, &mut merged, &own, |state, other| {
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
            state.v.assert_close(&gpu, what, &want.0, 2.0 * T::BOUND);
            assert_sums(what, &state.s.download(&gpu), &want.1, 1e-2);
        }
    }
}

#[test]
fn shared_prefix_f16() {
    shared_prefix::<f16>();
}

#[test]
fn shared_prefix_bf16() {
    shared_prefix::<bf16>();
}

/// What needs device slices to show; the rest is in `wrong_input.rs`.
#[test]
fn wrong_stream() {
    let Some(gpu) = start() else { return };
    let other = gpu.fork();
    let mut state = Held::<f16>::poisoned(&gpu, &[2, 4, 64]);
    let source = Held::<f16>::empty(&gpu, &[2, 4, 64]);
    let call = with(&gpu, &mut state, &source, |state, source| {
        cascade::merge_state_in_place(&other.stream, state, source, None)
    });
    refused(call, "state.v");
    state.v.assert_untouched(&gpu);
    state.s.assert_untouched(&gpu);
}
