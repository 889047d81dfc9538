use super::*;
use crate::{
    indices::{AppendIndices, PageIndices, SlotMapping},
    kv::{KvLayout, PagedKvMut},
    reference::testing::{refused, view, view_mut},
    rope::Llama31Scaling,
};

/// The quarter turns of positions 0 to 3, for one pair, then two.
fn quarters(pairs: usize) -> Vec<f64> {
    let turns = [(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)];
    turns.iter().flat_map(|&(cos, sin)| [vec![cos; pairs], vec![sin; pairs]].concat()).collect()
}

fn rotation<'a>(
    table: &'a [f64],
    pairs: usize,
    pos_ids: &'a [i32],
    interleave: bool,
) -> Rotation<'a, &'a [i32]> {
    let cos_sin_cache = view(table, &[table.len() / (2 * pairs), 2 * pairs]);
    Rotation { cos_sin_cache, pos_ids, interleave }
}

#[test]
fn pairs_are_halves_or_neighbours() {
    let table = quarters(2);
    for (interleave, want) in [
        // Pairs (1, 3) and (2, 4), or (1, 2) and (3, 4); a quarter turns
        // (x, y) to (−y, x). The fifth element is none of them.
        (false, [-3.0, -4.0, 1.0, 2.0, 5.0]),
        (true, [-2.0, 1.0, -4.0, 3.0, 5.0]),
    ] {
        let (mut q, mut k) = ([1.0, 2.0, 3.0, 4.0, 5.0], [1.0f32, 2.0, 3.0, 4.0, 5.0]);
        let mut tensors =
            RopeTensors::InPlace { q: view_mut(&mut q, &[1, 1, 5]), k: view_mut(&mut k, &[1, 1, 5]) };
        apply_rope_pos_ids_cos_sin_cache(&mut tensors, &rotation(&table, 2, &[1], interleave)).unwrap();
        assert_eq!(q, want);
        assert_eq!(k.map(f64::from), want);
    }
}

#[test]
fn each_token_has_its_position_and_heads_share_it() {
    let table = quarters(1);
    let (q, k) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [1.0, 0.0, 0.0, 1.0]);
    let (mut q_rope, mut k_rope) = ([0.0; 8], [0.0; 4]);
    let mut tensors = RopeTensors::OutOfPlace {
        q: view(&q, &[2, 2, 2]),
        k: view(&k, &[2, 1, 2]),
        q_rope: view_mut(&mut q_rope, &[2, 2, 2]),
        k_rope: view_mut(&mut k_rope, &[2, 1, 2]),
    };
    apply_rope_pos_ids_cos_sin_cache(&mut tensors, &rotation(&table, 1, &[2, 1], false)).unwrap();
    assert_eq!(q_rope, [-1.0, -2.0, -3.0, -4.0, -6.0, 5.0, -8.0, 7.0]);
    assert_eq!(k_rope, [-1.0, 0.0, -1.0, 0.0]);
}

#[test]
fn angles_are_computed() {
    // Two pairs at position 3: angles 3 and 3 / 100, at half the scale 1.5
    // and 0.015.
    for scale in [1.0, 2.0] {
        let options = RopeOptions { rope_scale: scale, ..RopeOptions::default() };
        let (mut q, mut k) = ([1.0, 1.0, 0.0, 0.0], [0.0; 4]);
        let mut tensors =
            RopeTensors::InPlace { q: view_mut(&mut q, &[1, 1, 4]), k: view_mut(&mut k, &[1, 1, 4]) };
        apply_rope_pos_ids(&mut tensors, &[3], &options).unwrap();
        let angles = [3.0 / scale, 0.03 / scale];
        let want = [angles[0].cos(), angles[1].cos(), angles[0].sin(), angles[1].sin()];
        for (got, want) in q.iter().zip(want) {
            assert!((got - want).abs() < 1e-15, "{got} {want}");
        }
    }
}

#[test]
fn rows_of_requests_count_from_their_offsets() {
    let numbers: Vec<f64> = (0..5 * 8).map(|at| f64::from(at % 7) - 3.0).collect();
    let run = |ragged: bool, llama: bool| {
        let (mut q, mut k) = (numbers.clone(), numbers.clone());
        let mut tensors =
            RopeTensors::InPlace { q: view_mut(&mut q, &[5, 2, 4]), k: view_mut(&mut k, &[5, 2, 4]) };
        let tensors = &mut tensors;
        // Two rows at 10, none, two rows at −1; the last row is nobody's.
        let indptr = RaggedIndices::new(vec![0, 2, 2, 4]).unwrap();
        let (offsets, positions) = ([10, 99, -1], [10, 11, -1, 0, 0]);
        let options = RopeOptions::default();
        let llama_options = Llama31RopeOptions::default();
        match (ragged, llama) {
            (true, false) => apply_rope(tensors, &indptr, &offsets, &options),
            (false, false) => apply_rope_pos_ids(tensors, &positions, &options),
            (true, true) => apply_llama31_rope(tensors, &indptr, &offsets, &llama_options),
            (false, true) => apply_llama31_rope_pos_ids(tensors, &positions, &llama_options),
        }
        .unwrap();
        [q, k]
    };
    // Position 0 of the last row turns nothing.
    assert_eq!(run(true, false), run(false, false));
    assert_eq!(run(true, true), run(false, true));
    assert_ne!(run(true, false), run(true, true));
    assert_eq!(run(true, false)[0][32..], numbers[32..]);
    assert_eq!(Llama31RopeOptions::default().scaling(), Llama31Scaling::default());
}

#[test]
fn quantized_heads_are_scaled_and_land_in_pages() {
    let table = quarters(1);
    let pages = PageIndices::from_requests(2, 2, [(&[1, 0][..], 3)]).unwrap();
    let append = AppendIndices::last_tokens(&pages, &[0, 2]).unwrap();
    // Two tokens at positions 1 and 2, in slots (1, 1) and (0, 0).
    let pos_ids = append.positions().to_vec();
    let rotation = rotation(&table, 1, &pos_ids, false);
    let (q, k) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let options = RopeQuantizeOptions::with_scales(2.0, 10.0);
    let parts = |heads| RopeParts::of_heads(heads, 2).unwrap();
    let input = [parts(view(&q, &[2, 1, 3])), parts(view(&k, &[2, 1, 3]))];
    let want_q = [-4.0, 2.0, 6.0, -8.0, -10.0, 12.0];
    let want_k = [-20.0, 10.0, 30.0, -40.0, -50.0, 60.0];

    let (mut q_out, mut k_out) = ([0.0; 6], [0.0; 6]);
    fn out(heads: &mut [f64; 6]) -> RopePartsMut<'_> {
        RopePartsMut::of_heads(view_mut(heads, &[2, 1, 3]), 2).unwrap()
    }
    let mut outs = [out(&mut q_out), out(&mut k_out)];
    rope_quantize(&mut outs, &input, &rotation, &options).unwrap();
    assert_eq!((q_out, k_out), (want_q, want_k));

    let (mut q_out, mut keys, mut values) = ([0.0; 6], [0.0; 12], [0.0; 12]);
    let cache = PagedKvMut::new(
        view_mut(&mut keys, &[2, 2, 1, 3]),
        view_mut(&mut values, &[2, 2, 1, 3]),
        KvLayout::Nhd,
    );
    let mut target = RopeAppend::Kv { cache, value: view(&k, &[2, 1, 3]) };
    let mut heads = out(&mut q_out);
    rope_quantize_append_paged_kv_cache(
        &mut heads,
        &mut target,
        &input,
        &rotation,
        &SlotMapping::new(&append, &pages),
        &options,
    )
    .unwrap();
    assert_eq!(q_out, want_q);
    let zeros = [0.0; 6];
    assert_eq!(keys[..], [&want_k[3..], &zeros, &want_k[..3]].concat());
    assert_eq!(values, [40.0, 50.0, 60.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 10.0, 20.0, 30.0]);

    let (mut q_out, mut ckv, mut kpe) = ([0.0; 6], [0.0; 4], [0.0; 8]);
    let mut target = RopeAppend::Mla {
        ckv_cache: view_mut(&mut ckv, &[2, 2, 1]),
        kpe_cache: view_mut(&mut kpe, &[2, 2, 2]),
    };
    let flat = [input[0], parts(view(&k, &[2, 3]))];
    let mut heads = out(&mut q_out);
    rope_quantize_append_paged_kv_cache(
        &mut heads,
        &mut target,
        &flat,
        &rotation,
        &SlotMapping::new(&append, &pages),
        &options,
    )
    .unwrap();
    assert_eq!((ckv, kpe), ([60.0, 0.0, 0.0, 30.0], [-40.0, -50.0, 0.0, 0.0, 0.0, 0.0, -20.0, 10.0]));
}

#[test]
fn wrong_input_is_refused_and_nothing_written() {
    let table = quarters(1);
    let (mut q, mut k) = ([7.0; 8], [7.0; 8]);
    let mut run = |shapes: [&[usize]; 2], pos_ids: &[i32], pairs: usize| {
        let mut tensors =
            RopeTensors::InPlace { q: view_mut(&mut q, shapes[0]), k: view_mut(&mut k, shapes[1]) };
        apply_rope_pos_ids_cos_sin_cache(&mut tensors, &rotation(&table, pairs, pos_ids, false))
    };
    let good: [&[usize]; 2] = [&[2, 1, 2]; 2];
    refused(run(good, &[0, 4], 1), "pos_ids");
    refused(run(good, &[0, -1], 1), "pos_ids");
    refused(run(good, &[0], 1), "pos_ids");
    refused(run(good, &[0, 1], 2), "cos_sin_cache");
    refused(run([&[2, 2], &[2, 1, 2]], &[0, 1], 1), "q");
    refused(run([&[2, 1, 2], &[1, 1, 2]], &[0, 1], 1), "k");
    refused(run([&[2, 1, 2], &[2, 1, 4]], &[0, 1], 1), "k");

    let mut computed = |options: &RopeOptions, offsets: &[i32], indptr: Vec<i32>| {
        let mut tensors =
            RopeTensors::InPlace { q: view_mut(&mut q, &[2, 1, 4]), k: view_mut(&mut k, &[2, 1, 4]) };
        apply_rope(&mut tensors, &RaggedIndices::new(indptr).unwrap(), offsets, options)
    };
    let mut options = RopeOptions::default();
    refused(computed(&options, &[0, 0], vec![0, 2]), "offsets");
    refused(computed(&options, &[0], vec![0, 3]), "indptr");
    for rotary_dim in [0, 3, 6] {
        options.rotary_dim = Some(rotary_dim);
        refused(computed(&options, &[0], vec![0, 2]), "rotary_dim");
    }
    refused(computed(&RopeOptions::with_theta(0.0), &[0], vec![0, 2]), "rope_theta");
    options = RopeOptions::default();
    options.rope_scale = f64::NAN;
    refused(computed(&options, &[0], vec![0, 2]), "factor");
    assert_eq!((q, k), ([7.0; 8], [7.0; 8]));
}
