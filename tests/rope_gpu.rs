//! Rotary embeddings on the GPU against the CPU reference.
#![cfg(feature = "cudarc")]

mod common;
mod rope_gpu {
    mod append;
    mod quantize;
}

use common::{
    Gpu, Mirrored, Number, Rng, assert_same_bits, attention::capture, cache::random_table, refused,
};
use flashinfer_rs::{
    Result, TensorMut, TensorRef,
    gpu::TensorExt,
    indices::{AppendIndices, AppendTable, BoundedIndices, BoundedTable, RaggedIndices, RaggedTable},
    reference,
    rope::{
        self, CosSinCache, Llama31RopeOptions, Positions, RopeFrequencies, RopeOptions, RopeScaling,
        RopeTensors, Rotation, YarnScaling,
    },
};
use half::{bf16, f16};

/// An operation, or its reference, on some tensors.
type Apply<'f> = &'f dyn Fn(&mut RopeTensors<'_>) -> Result<()>;

/// Runs an operation on tensors of its own and then in place, and compares both
/// with the reference.
#[track_caller]
fn check<T: Number>(
    gpu: &Gpu,
    what: &str,
    [mut q, mut k]: [Mirrored<T>; 2],
    bound: f64,
    op: Apply<'_>,
    reference: Apply<'_>,
) {
    let mut q_rope = Mirrored::<T>::poisoned(gpu, &q.shape());
    let mut k_rope = Mirrored::<T>::poisoned(gpu, &k.shape());
    let (mut want_q, mut want_k) = (q_rope.wide(), k_rope.wide());
    reference(&mut RopeTensors::OutOfPlace {
        q: q.view(),
        k: k.view(),
        q_rope: q_rope.view_of(&mut want_q),
        k_rope: k_rope.view_of(&mut want_k),
    })
    .unwrap();
    op(&mut RopeTensors::OutOfPlace {
        q: q.device_view(),
        k: k.device_view(),
        q_rope: q_rope.device_view_mut(),
        k_rope: k_rope.device_view_mut(),
    })
    .unwrap();
    q_rope.assert_close(&format!("{what}: q_rope"), &want_q, bound);
    k_rope.assert_close(&format!("{what}: k_rope"), &want_k, bound);
    q.assert_untouched();
    k.assert_untouched();
    check_in_place(what, [&mut q, &mut k], bound, op, reference);
}

#[track_caller]
fn check_in_place<T: Number>(
    what: &str,
    [q, k]: [&mut Mirrored<T>; 2],
    bound: f64,
    op: Apply<'_>,
    reference: Apply<'_>,
) {
    let (mut want_q, mut want_k) = (q.wide(), k.wide());
    let (q_view, k_view) = (q.view_of(&mut want_q), k.view_of(&mut want_k));
    reference(&mut RopeTensors::InPlace { q: q_view, k: k_view }).unwrap();
    let (mut q_shown, mut k_shown) = (q.device_view_mut(), k.device_view_mut());
    op(&mut RopeTensors::InPlace { q: q_shown.reborrow(), k: k_shown.reborrow() }).unwrap();
    q.assert_close(&format!("{what}: q in place"), &want_q, bound);
    k.assert_close(&format!("{what}: k in place"), &want_k, bound);
}

/// `[tokens, heads, head_dim]` of queries and keys.
fn random<T: Number>(
    gpu: &Gpu,
    rng: &mut Rng,
    tokens: usize,
    heads: [usize; 2],
    head_dim: usize,
) -> [Mirrored<T>; 2] {
    heads.map(|heads| Mirrored::random(gpu, rng, &[tokens, heads, head_dim]))
}

/// Positions at which angles that are computed in f32 are good to 1e-4.
fn positions(rng: &mut Rng, tokens: usize) -> Vec<i32> {
    (0..tokens).map(|_| rng.below(1000) as i32).collect()
}

/// Tokens, heads of queries and keys, head dimension.
const SIZES: [(usize, [usize; 2], usize); 7] = [
    (1, [1, 1], 64),
    (7, [8, 2], 128),
    (33, [5, 1], 256),
    (19, [3, 3], 512),
    (6, [0, 2], 128),
    (6, [3, 0], 64),
    (257, [32, 8], 128),
];

/// All of a head or a part, in halves and in neighbours.
fn turned(head_dim: usize) -> Vec<(Option<usize>, bool)> {
    let (halves, neighbours) = if head_dim == 512 { (32, 16) } else { (16, 8) };
    vec![
        (None, false),
        (None, true),
        (Some(head_dim / 2), false),
        (Some(head_dim / 2), true),
        (Some(halves), false),
        (Some(neighbours), true),
        (Some(3 * halves), false),
        (Some(3 * neighbours), true),
    ]
}

fn pos_ids_sizes<T: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for (tokens, heads, head_dim) in SIZES {
        let pos_ids = positions(rng, tokens);
        let host = BoundedIndices::new(1000, pos_ids.clone()).unwrap();
        let table = BoundedTable::new(&gpu.stream, host).unwrap();
        for (rotary_dim, interleave) in turned(head_dim) {
            let mut options = RopeOptions::default();
            (options.rotary_dim, options.interleave) = (rotary_dim, interleave);
            let what = format!("{tokens} {heads:?} {head_dim} {options:?}");
            check::<T>(
                &gpu,
                &what,
                random(&gpu, rng, tokens, heads, head_dim),
                T::BOUND,
                &|tensors| rope::apply_rope_pos_ids(&gpu.stream, tensors, &table, &options),
                &|tensors| reference::apply_rope_pos_ids(tensors, &pos_ids, &options),
            );
            let mut llama = Llama31RopeOptions::default();
            (llama.rope.rotary_dim, llama.rope.interleave) = (rotary_dim, interleave);
            check::<T>(
                &gpu,
                &format!("llama 3.1: {what}"),
                random(&gpu, rng, tokens, heads, head_dim),
                T::BOUND,
                &|tensors| rope::apply_llama31_rope_pos_ids(&gpu.stream, tensors, &table, &llama),
                &|tensors| reference::apply_llama31_rope_pos_ids(tensors, &pos_ids, &llama),
            );
        }
    }
}

typed_tests! {
    pos_ids_f16: pos_ids_sizes::<f16>();
    pos_ids_bf16: pos_ids_sizes::<bf16>();
}

/// Scales, bases and Llama 3.1's factors count.
#[test]
fn options() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let pos_ids = positions(rng, 9);
    let host = BoundedIndices::new(1000, pos_ids.clone()).unwrap();
    let table = BoundedTable::new(&gpu.stream, host).unwrap();
    for (rope_scale, rope_theta) in [(4.0, 1e4), (1.0, 1e6), (0.5, 500.0)] {
        let mut options = RopeOptions::with_theta(rope_theta);
        options.rope_scale = rope_scale;
        check::<f16>(
            &gpu,
            &format!("{options:?}"),
            random(&gpu, rng, 9, [4, 2], 128),
            f16::BOUND,
            &|tensors| rope::apply_rope_pos_ids(&gpu.stream, tensors, &table, &options),
            &|tensors| reference::apply_rope_pos_ids(tensors, &pos_ids, &options),
        );
        let mut llama = Llama31RopeOptions::default();
        (llama.low_freq_factor, llama.high_freq_factor, llama.old_context_len) = (2.0, 9.0, 1000.0);
        llama.rope = options;
        check::<f16>(
            &gpu,
            &format!("{llama:?}"),
            random(&gpu, rng, 9, [4, 2], 128),
            f16::BOUND,
            &|tensors| rope::apply_llama31_rope_pos_ids(&gpu.stream, tensors, &table, &llama),
            &|tensors| reference::apply_llama31_rope_pos_ids(tensors, &pos_ids, &llama),
        );
    }
}

/// Sequences one after the other, from positions of their own, also negative
/// ones; rows behind the last stay.
#[test]
fn sequences() {
    fn run<T: Number>(gpu: &Gpu, rng: &mut Rng) {
        for (lens, heads, head_dim) in [
            (vec![1], [1, 1], 64),
            (vec![5, 0, 17, 1, 130], [4, 2], 128),
            (vec![0, 3], [2, 1], 256),
            (vec![9, 40], [1, 2], 512),
        ] {
            let tokens: usize = lens.iter().sum();
            let indptr = RaggedIndices::from_lens(lens.iter().copied()).unwrap();
            let table = RaggedTable::new(&gpu.stream, indptr.clone()).unwrap();
            let offsets: Vec<i32> = lens.iter().map(|_| rng.below(800) as i32 - 100).collect();
            let device = gpu.cuda.clone_htod(&offsets).unwrap();
            let shown = device.tensor(&gpu.cuda, &[offsets.len()]).unwrap();
            for (rotary_dim, interleave) in turned(head_dim) {
                let mut options = RopeOptions::default();
                (options.rotary_dim, options.interleave) = (rotary_dim, interleave);
                let mut llama = Llama31RopeOptions::default();
                (llama.rope.rotary_dim, llama.rope.interleave) = (rotary_dim, interleave);
                let what = format!("{lens:?} {heads:?} {head_dim} {options:?}");
                let op: Apply<'_> =
                    &|tensors| rope::apply_rope(&gpu.stream, tensors, &table, shown.view(), &options);
                let want: Apply<'_> = &|tensors| reference::apply_rope(tensors, &indptr, &offsets, &options);
                check::<T>(gpu, &what, random(gpu, rng, tokens, heads, head_dim), T::BOUND, op, want);
                let [mut q, mut k] = random::<T>(gpu, rng, tokens + 3, heads, head_dim);
                check_in_place(&what, [&mut q, &mut k], T::BOUND, op, want);
                check::<T>(
                    gpu,
                    &format!("llama 3.1: {what}"),
                    random(gpu, rng, tokens, heads, head_dim),
                    T::BOUND,
                    &|tensors| rope::apply_llama31_rope(&gpu.stream, tensors, &table, shown.view(), &llama),
                    &|tensors| reference::apply_llama31_rope(tensors, &indptr, &offsets, &llama),
                );
            }
        }
    }
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    run::<f16>(&gpu, rng);
    run::<bf16>(&gpu, rng);
}

/// A table on both sides.
struct Cache {
    host: Vec<f32>,
    device: CosSinCache,
}

impl Cache {
    fn new(gpu: &Gpu, rotary_dim: usize, max_pos: usize) -> Self {
        let scaling = RopeScaling::Yarn(YarnScaling::new(4.0, 4096.0));
        let frequencies = RopeFrequencies::new(rotary_dim, 1e4, &scaling).unwrap();
        let device = CosSinCache::new(&gpu.stream, &frequencies, max_pos).unwrap();
        assert_eq!((device.max_pos(), device.rotary_dim()), (max_pos, rotary_dim));
        Self { host: frequencies.cos_sin_rows(max_pos), device }
    }

    fn rotation<'a>(&'a self, pos_ids: &'a [i32], interleave: bool) -> Rotation<'a, &'a [i32]> {
        let shape = [self.device.max_pos(), self.device.rotary_dim()];
        Rotation { cos_sin_cache: TensorRef::from_slice(&self.host, &shape).unwrap(), pos_ids, interleave }
    }

    fn on_device<'a>(&'a self, pos_ids: Positions<'a>, interleave: bool) -> Rotation<'a> {
        Rotation { cos_sin_cache: self.device.view().unwrap(), pos_ids, interleave }
    }
}

/// Head dimension, what is turned of it, and whether halves may be turned in
/// place.
const CACHE_DIMS: [(usize, usize, bool); 14] = [
    (64, 64, true),
    (128, 128, true),
    (128, 48, true),
    (256, 64, true),
    (512, 512, true),
    (512, 96, true),
    (192, 128, true),
    (192, 64, true),
    (576, 64, true),
    (80, 64, true),
    (72, 64, true),
    (96, 96, false),
    (192, 192, false),
    (1024, 1024, false),
];

fn cos_sin_cache<T: Number>() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    for (head_dim, rotary_dim, in_place) in CACHE_DIMS {
        let max_pos = 3000;
        let cache = Cache::new(&gpu, rotary_dim, max_pos);
        for (tokens, heads) in [(1, [1, 1]), (37, [5, 2]), (300, [2, 1])] {
            let mut pos_ids: Vec<i32> = (0..tokens).map(|_| rng.below(max_pos) as i32).collect();
            pos_ids[tokens / 2] = max_pos as i32 - 1;
            let host = BoundedIndices::new(max_pos, pos_ids.clone()).unwrap();
            let table = BoundedTable::new(&gpu.stream, host).unwrap();
            for interleave in [false, true] {
                let what = format!("{tokens} {heads:?}, {rotary_dim} of {head_dim}, {interleave}");
                let rotation = cache.rotation(&pos_ids, interleave);
                let on_device = cache.on_device((&table).into(), interleave);
                let op: Apply<'_> =
                    &|tensors| rope::apply_rope_pos_ids_cos_sin_cache(&gpu.stream, tensors, &on_device);
                let want: Apply<'_> =
                    &|tensors| reference::apply_rope_pos_ids_cos_sin_cache(tensors, &rotation);
                let [q, k] = random::<T>(&gpu, rng, tokens, heads, head_dim);
                if in_place || interleave {
                    check::<T>(&gpu, &what, [q, k], T::BOUND, op, want);
                    continue;
                }
                let mut outs = [&q, &k].map(|tensor| Mirrored::<T>::poisoned(&gpu, &tensor.shape()));
                let mut wide = outs.each_ref().map(Mirrored::wide);
                {
                    let [want_q, want_k] = &mut wide;
                    let (q_rope, k_rope) = (outs[0].view_of(want_q), outs[1].view_of(want_k));
                    want(&mut RopeTensors::OutOfPlace { q: q.view(), k: k.view(), q_rope, k_rope }).unwrap();
                    let [q_rope, k_rope] = &mut outs;
                    op(&mut RopeTensors::OutOfPlace {
                        q: q.device_view(),
                        k: k.device_view(),
                        q_rope: q_rope.device_view_mut(),
                        k_rope: k_rope.device_view_mut(),
                    })
                    .unwrap();
                }
                for (out, want) in outs.iter().zip(&wide) {
                    out.assert_close(&what, want, T::BOUND);
                }
            }
        }
    }
}

typed_tests! {
    cos_sin_cache_f16: cos_sin_cache::<f16>();
    cos_sin_cache_bf16: cos_sin_cache::<bf16>();
}

/// So many tokens that a block turns all heads of its tokens.
#[test]
fn many_tokens() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let tokens = 40_000;
    let pos_ids = positions(rng, tokens);
    let table = BoundedTable::new(&gpu.stream, BoundedIndices::new(1000, pos_ids.clone()).unwrap()).unwrap();
    let options = RopeOptions::default();
    check::<f16>(
        &gpu,
        "many tokens",
        random(&gpu, rng, tokens, [2, 1], 64),
        f16::BOUND,
        &|tensors| rope::apply_rope_pos_ids(&gpu.stream, tensors, &table, &options),
        &|tensors| reference::apply_rope_pos_ids(tensors, &pos_ids, &options),
    );
    let cache = Cache::new(&gpu, 64, 1000);
    for interleave in [false, true] {
        let rotation = cache.rotation(&pos_ids, interleave);
        let on_device = cache.on_device((&table).into(), interleave);
        check::<f16>(
            &gpu,
            "many tokens from a table",
            random(&gpu, rng, tokens, [2, 1], 64),
            f16::BOUND,
            &|tensors| rope::apply_rope_pos_ids_cos_sin_cache(&gpu.stream, tensors, &on_device),
            &|tensors| reference::apply_rope_pos_ids_cos_sin_cache(tensors, &rotation),
        );
    }
}

/// A table is as good far out as near; computed angles are not.
#[test]
fn long_contexts() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let (tokens, max_pos) = (64, 100_000);
    let pos_ids: Vec<i32> = (0..tokens).map(|_| (max_pos - 1 - rng.below(1000)) as i32).collect();
    let host = BoundedIndices::new(max_pos, pos_ids.clone()).unwrap();
    let table = BoundedTable::new(&gpu.stream, host).unwrap();
    let cache = Cache::new(&gpu, 64, max_pos);
    let rotation = cache.rotation(&pos_ids, false);
    let on_device = cache.on_device((&table).into(), false);
    check::<f16>(
        &gpu,
        "far out, from a table",
        random(&gpu, rng, tokens, [4, 1], 64),
        f16::BOUND,
        &|tensors| rope::apply_rope_pos_ids_cos_sin_cache(&gpu.stream, tensors, &on_device),
        &|tensors| reference::apply_rope_pos_ids_cos_sin_cache(tensors, &rotation),
    );
    let options = RopeOptions::default();
    check::<f16>(
        &gpu,
        "far out, computed",
        random(&gpu, rng, tokens, [4, 1], 64),
        1e-1,
        &|tensors| rope::apply_rope_pos_ids(&gpu.stream, tensors, &table, &options),
        &|tensors| reference::apply_rope_pos_ids(tensors, &pos_ids, &options),
    );
}

/// Queries and keys as parts of one projection, turned where they are.
#[test]
fn parts_of_one_tensor() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let cache = Cache::new(&gpu, 64, 500);
    let pos_ids: Vec<i32> = (0..21).map(|_| rng.below(500) as i32).collect();
    let table = BoundedTable::new(&gpu.stream, BoundedIndices::new(500, pos_ids.clone()).unwrap()).unwrap();
    fn split(qkv: TensorMut<'_>) -> RopeTensors<'_> {
        let (q, rest) = qkv.split_at(1, 6).unwrap();
        RopeTensors::InPlace { q, k: rest.split_at(1, 2).unwrap().0 }
    }
    for head_dim in [128, 192] {
        for interleave in [false, true] {
            let mut qkv = Mirrored::<bf16>::random(&gpu, rng, &[21, 10, head_dim]);
            let mut want = qkv.wide();
            let rotation = cache.rotation(&pos_ids, interleave);
            let view = qkv.view_of(&mut want);
            reference::apply_rope_pos_ids_cos_sin_cache(&mut split(view), &rotation).unwrap();
            rope::apply_rope_pos_ids_cos_sin_cache(
                &gpu.stream,
                &mut split(qkv.device_view_mut()),
                &cache.on_device((&table).into(), interleave),
            )
            .unwrap();
            qkv.assert_close("parts of one tensor", &want, bf16::BOUND);
        }
    }
}

/// Heads outermost, gaps behind heads.
#[test]
fn strided() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let pos_ids = positions(rng, 13);
    let table = BoundedTable::new(&gpu.stream, BoundedIndices::new(1000, pos_ids.clone()).unwrap()).unwrap();
    let options = RopeOptions::default();
    let q = Mirrored::<f16>::random(&gpu, rng, &[4, 13, 128]).permuted(&[1, 0, 2]);
    let k = Mirrored::<f16>::random(&gpu, rng, &[13, 2, 136]).narrowed(2, 8, 128);
    check(
        &gpu,
        "strided",
        [q, k],
        f16::BOUND,
        &|tensors| rope::apply_rope_pos_ids(&gpu.stream, tensors, &table, &options),
        &|tensors| reference::apply_rope_pos_ids(tensors, &pos_ids, &options),
    );
}

/// Positions of every kind turn alike.
#[test]
fn kinds_of_positions() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let pages = random_table(rng, 4, &[30, 7]);
    let append = AppendIndices::last_tokens(&pages, &[0, 9, 12]).unwrap();
    let pos_ids = append.positions().to_vec();
    let append = AppendTable::new(&gpu.stream, append).unwrap();
    let table = BoundedTable::new(&gpu.stream, BoundedIndices::new(30, pos_ids.clone()).unwrap()).unwrap();
    let narrow = gpu.cuda.clone_htod(&pos_ids).unwrap();
    let wide = gpu.cuda.clone_htod(&pos_ids.iter().map(|&at| i64::from(at)).collect::<Vec<_>>()).unwrap();
    let (narrow, wide) = (narrow.tensor(&gpu.cuda, &[12]).unwrap(), wide.tensor(&gpu.cuda, &[12]).unwrap());
    let cache = Cache::new(&gpu, 128, 30);
    let [q, k] = random::<f16>(&gpu, rng, 12, [2, 1], 128);
    let turn = |op: Apply<'_>| {
        let mut outs = [&q, &k].map(|tensor| Mirrored::<f16>::poisoned(&gpu, &tensor.shape()));
        let [q_rope, k_rope] = &mut outs;
        op(&mut RopeTensors::OutOfPlace {
            q: q.device_view(),
            k: k.device_view(),
            q_rope: q_rope.device_view_mut(),
            k_rope: k_rope.device_view_mut(),
        })?;
        Ok::<_, flashinfer_rs::FlashInferError>(outs.map(|out| out.download()))
    };
    let looked_up = |pos_ids: Positions<'_>| {
        let rotation = cache.on_device(pos_ids, false);
        turn(&|tensors| rope::apply_rope_pos_ids_cos_sin_cache(&gpu.stream, tensors, &rotation))
    };
    let options = RopeOptions::default();
    let computed = |pos_ids: Positions<'_>| {
        turn(&|tensors| rope::apply_rope_pos_ids(&gpu.stream, tensors, pos_ids, &options)).unwrap()
    };
    // SAFETY: all positions are below 30.
    let promised = unsafe {
        [
            Positions::from_device_unchecked(narrow.view(), 30),
            Positions::from_device_unchecked(wide.view(), 30),
        ]
    };
    let want = looked_up((&table).into()).unwrap();
    for pos_ids in [(&append).into(), promised[0], promised[1]] {
        for (got, want) in looked_up(pos_ids).unwrap().iter().zip(&want) {
            assert_same_bits("looked up", got, want);
        }
    }
    let want = computed((&table).into());
    for pos_ids in [(&append).into(), narrow.view().into(), wide.view().into()] {
        for (got, want) in computed(pos_ids).iter().zip(&want) {
            assert_same_bits("computed", got, want);
        }
    }
    // What the host does not know is not looked up.
    refused(looked_up(narrow.view().into()), "pos_ids");
    refused(looked_up(wide.view().into()), "pos_ids");
    // The cache has a row for position 30, too, which neighbours cannot use.
    let cases = [(31, false, true), (30, true, true), (32, false, false), (31, true, false)];
    for (num_positions, interleave, fits) in cases {
        let host = BoundedIndices::new(num_positions, pos_ids.clone()).unwrap();
        let table = BoundedTable::new(&gpu.stream, host).unwrap();
        let rotation = cache.on_device((&table).into(), interleave);
        let call = turn(&|tensors| rope::apply_rope_pos_ids_cos_sin_cache(&gpu.stream, tensors, &rotation));
        if fits { drop(call.unwrap()) } else { refused(call, "pos_ids") }
    }
}

/// A graph sees positions that are updated between replays.
#[test]
fn graph_replay() {
    let Some(gpu) = Gpu::start_alone() else { return };
    let rng = &mut Rng::new();
    let (tokens, max_pos) = (17, 2000);
    let cache = Cache::new(&gpu, 128, max_pos);
    let random_positions = |rng: &mut Rng| {
        BoundedIndices::new(max_pos, (0..tokens).map(|_| rng.below(max_pos) as i32).collect()).unwrap()
    };
    let mut table = BoundedTable::with_capacity(&gpu.stream, random_positions(rng), tokens).unwrap();
    let [q, k] = random::<f16>(&gpu, rng, tokens, [8, 2], 128);
    let mut q_rope = Mirrored::<f16>::poisoned(&gpu, &q.shape());
    let mut k_rope = Mirrored::<f16>::poisoned(&gpu, &k.shape());
    let mut computed = [&q, &k].map(|tensor| Mirrored::<f16>::poisoned(&gpu, &tensor.shape()));
    let graph = {
        let (q, k) = (q.device_view(), k.device_view());
        let (mut q_rope, mut k_rope) = (q_rope.device_view_mut(), k_rope.device_view_mut());
        let [q_computed, k_computed] = &mut computed;
        let (mut q_computed, mut k_computed) = (q_computed.device_view_mut(), k_computed.device_view_mut());
        let rotation = cache.on_device((&table).into(), false);
        let mut looked_up =
            RopeTensors::OutOfPlace { q, k, q_rope: q_rope.reborrow(), k_rope: k_rope.reborrow() };
        let mut by_angle =
            RopeTensors::OutOfPlace { q, k, q_rope: q_computed.reborrow(), k_rope: k_computed.reborrow() };
        let options = RopeOptions::default();
        // Functions are resolved before the capture.
        rope::apply_rope_pos_ids_cos_sin_cache(&gpu.stream, &mut looked_up, &rotation).unwrap();
        rope::apply_rope_pos_ids(&gpu.stream, &mut by_angle, &table, &options).unwrap();
        let (graph, result) = capture(&gpu, || {
            rope::apply_rope_pos_ids_cos_sin_cache(&gpu.stream, &mut looked_up, &rotation)?;
            rope::apply_rope_pos_ids(&gpu.stream, &mut by_angle, &table, &options)
        });
        result.unwrap();
        graph.expect("a graph")
    };
    for _ in 0..3 {
        let positions = random_positions(rng);
        let pos_ids = positions.values().to_vec();
        table.update(positions).unwrap();
        for out in [&mut q_rope, &mut k_rope].into_iter().chain(&mut computed) {
            let poison = vec![f16::POISON; out.host.len()];
            out.upload(&poison);
        }
        graph.launch().unwrap();
        let (mut want_q, mut want_k) = (q_rope.wide(), k_rope.wide());
        let mut want = |reference: Apply<'_>| {
            reference(&mut RopeTensors::OutOfPlace {
                q: q.view(),
                k: k.view(),
                q_rope: q_rope.view_of(&mut want_q),
                k_rope: k_rope.view_of(&mut want_k),
            })
            .unwrap();
            [want_q.clone(), want_k.clone()]
        };
        let rotation = cache.rotation(&pos_ids, false);
        let looked_up = want(&|tensors| reference::apply_rope_pos_ids_cos_sin_cache(tensors, &rotation));
        let by_angle =
            want(&|tensors| reference::apply_rope_pos_ids(tensors, &pos_ids, &RopeOptions::default()));
        q_rope.assert_close("replayed q", &looked_up[0], f16::BOUND);
        k_rope.assert_close("replayed k", &looked_up[1], f16::BOUND);
        computed[0].assert_close("replayed q, computed", &by_angle[0], f16::BOUND);
        computed[1].assert_close("replayed k, computed", &by_angle[1], f16::BOUND);
    }
}

#[test]
fn nothing_to_do() {
    let Some(gpu) = Gpu::start() else { return };
    let rng = &mut Rng::new();
    let cache = Cache::new(&gpu, 64, 10);
    let table = BoundedTable::new(&gpu.stream, BoundedIndices::new(10, vec![]).unwrap()).unwrap();
    let ragged = RaggedTable::new(&gpu.stream, RaggedIndices::new(vec![0]).unwrap()).unwrap();
    let [mut q, mut k] = random::<f16>(&gpu, rng, 3, [2, 1], 64).map(|tensor| tensor.narrowed(0, 0, 0));
    {
        let (mut q, mut k) = (q.device_view_mut(), k.device_view_mut());
        let mut tensors = RopeTensors::InPlace { q: q.reborrow(), k: k.reborrow() };
        let (options, llama) = (RopeOptions::default(), Llama31RopeOptions::default());
        let rotation = cache.on_device((&table).into(), false);
        rope::apply_rope(&gpu.stream, &mut tensors, &ragged, &table, &options).unwrap();
        rope::apply_llama31_rope(&gpu.stream, &mut tensors, &ragged, &table, &llama).unwrap();
        rope::apply_rope_pos_ids(&gpu.stream, &mut tensors, &table, &options).unwrap();
        rope::apply_llama31_rope_pos_ids(&gpu.stream, &mut tensors, &table, &llama).unwrap();
        rope::apply_rope_pos_ids_cos_sin_cache(&gpu.stream, &mut tensors, &rotation).unwrap();
    }
    q.assert_untouched();
    k.assert_untouched();
    // A cache of no positions.
    let frequencies = RopeFrequencies::new(64, 1e4, &RopeScaling::None).unwrap();
    let empty = CosSinCache::new(&gpu.stream, &frequencies, 0).unwrap();
    assert_eq!(empty.view().unwrap().shape(), [1, 64]);
}

/// What only a device can show: tables of other streams, sequences beyond the
/// rows. `tests/wrong_input.rs` has the rest.
#[test]
fn wrong_input() {
    let Some(gpu) = Gpu::start() else { return };
    let (rng, other) = (&mut Rng::new(), gpu.elsewhere());
    let cache = Cache::new(&gpu, 64, 10);
    let foreign_cache = Cache::new(&other, 64, 10);
    let positions = |gpu: &Gpu, positions: Vec<i32>| {
        BoundedTable::new(&gpu.stream, BoundedIndices::new(10, positions).unwrap()).unwrap()
    };
    let ragged = |gpu: &Gpu, indptr: Vec<i32>| {
        RaggedTable::new(&gpu.stream, RaggedIndices::new(indptr).unwrap()).unwrap()
    };
    let good = positions(&gpu, vec![1, 2, 3]);
    let [mut q, mut k] = random::<f16>(&gpu, rng, 3, [2, 1], 64);
    {
        let (mut q, mut k) = (q.device_view_mut(), k.device_view_mut());
        let mut tensors = RopeTensors::InPlace { q: q.reborrow(), k: k.reborrow() };
        let options = RopeOptions::default();

        let foreign = positions(&other, vec![1, 2, 3]);
        let few = positions(&gpu, vec![1, 2]);
        for bad in [&foreign, &few] {
            let call = rope::apply_rope_pos_ids(&gpu.stream, &mut tensors, bad, &options);
            refused(call, "pos_ids");
            let rotation = cache.on_device(bad.into(), false);
            let call = rope::apply_rope_pos_ids_cos_sin_cache(&gpu.stream, &mut tensors, &rotation);
            refused(call, "pos_ids");
        }
        let rotation = foreign_cache.on_device((&good).into(), false);
        let call = rope::apply_rope_pos_ids_cos_sin_cache(&gpu.stream, &mut tensors, &rotation);
        refused(call, "cos_sin_cache");

        let mut apply = |indptr: &RaggedTable, offsets: &BoundedTable, argument: &str| {
            let call = rope::apply_rope(&gpu.stream, &mut tensors, indptr, offsets, &options);
            refused(call, argument);
            let llama = Llama31RopeOptions::default();
            let call = rope::apply_llama31_rope(&gpu.stream, &mut tensors, indptr, offsets, &llama);
            refused(call, argument);
        };
        let one = positions(&gpu, vec![0]);
        apply(&ragged(&gpu, vec![0, 4]), &one, "indptr");
        apply(&ragged(&other, vec![0, 3]), &one, "indptr");
        apply(&ragged(&gpu, vec![0, 3]), &good, "offsets");
        apply(&ragged(&gpu, vec![0, 3]), &positions(&other, vec![0]), "offsets");
        let wide = gpu.cuda.clone_htod(&[0i64]).unwrap();
        let wide = wide.tensor(&gpu.cuda, &[1]).unwrap();
        let call =
            rope::apply_rope(&gpu.stream, &mut tensors, &ragged(&gpu, vec![0, 3]), wide.view(), &options);
        refused(call, "offsets");
        refused(
            CosSinCache::new(
                &gpu.stream,
                &RopeFrequencies::new(64, 1e4, &RopeScaling::None).unwrap(),
                1 << 30,
            )
            .map(drop),
            "max_pos",
        );
    }
    other.synchronize();
    q.assert_untouched();
    k.assert_untouched();
}
