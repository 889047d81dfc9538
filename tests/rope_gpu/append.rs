//! Rotary embeddings whose keys go to a cache of 16 bits, on the GPU against the CPU reference.

use crate::common::{
    Gpu, Mirrored, Number, Rng,
    cache::{Cache, CacheShape, LAYOUTS},
    refused,
};
use flashinfer_rs::{indices::SlotMapping, kv::KvLayout, reference, rope};
use half::{bf16, f16};

use super::quantize::{Angles, Tokens, assert_rounded_alike};

/// A GPU that has the kernel.
fn start() -> Option<Gpu> {
    Gpu::start().filter(|gpu| gpu.compute_capability().0 >= 9)
}

fn append<T: Number>() {
    let Some(gpu) = start() else { return };
    let rng = &mut Rng::new();
    for page_size in [1, 16] {
        let tokens = Tokens::new(&gpu, rng, page_size);
        // All of a head is turned, a part of it, and no multiple of 32; other numbers of heads than
        // blocks have; no queries.
        for (q_heads, heads, head_dim, rotary_dim) in
            [(9, 3, 64, 64), (32, 8, 128, 128), (3, 3, 128, 48), (4, 1, 256, 64), (0, 2, 512, 512)]
        {
            for (layout, interleave) in
                LAYOUTS.into_iter().flat_map(|layout| [(layout, false), (layout, true)])
            {
                let angles = Angles::new(&gpu, rotary_dim, interleave);
                let pages = tokens.table.num_pages();
                let shape = CacheShape { pages, page_size, heads, head_dim, layout, joined: interleave };
                // Rows of one tensor, as a product makes them.
                let all = Mirrored::<T>::random(&gpu, rng, &[tokens.len(), q_heads + 2 * heads, head_dim]);
                let k = all.narrowed(1, q_heads, heads);
                let v = Mirrored::<T>::random(&gpu, rng, &[tokens.len(), heads + 1, head_dim])
                    .narrowed(1, 1, heads);
                let mut q = Mirrored::<T>::random(&gpu, rng, &[tokens.len(), q_heads, head_dim]);
                let mut cache = Cache::<T>::poisoned(&gpu, shape);
                let (mut want_q, mut want) = (q.host.clone(), cache.hosts());
                reference::rope_append_paged_kv_cache(
                    &mut q.view_of(&mut want_q),
                    [&k.view(), &v.view()],
                    &angles.on_host(tokens.append.positions()),
                    &SlotMapping::new(&tokens.append, &tokens.table),
                    &mut cache.view_of(&mut want),
                )
                .unwrap();
                rope::rope_append_paged_kv_cache(
                    &gpu.stream,
                    &mut q.device_view_mut(),
                    [&k.device_view(), &v.device_view()],
                    &angles.on_device(&tokens.device_append),
                    &SlotMapping::new(&tokens.device_append, &tokens.device_table),
                    &mut cache.device_view_mut(),
                )
                .unwrap();
                let what = format!("{shape:?}, {rotary_dim} turned, {interleave}");
                assert_rounded_alike(&format!("{what}: q"), &q.download(), &want_q);
                for (tensor, want) in cache.tensors.iter().zip(&want) {
                    assert_rounded_alike(&what, &tensor.download(), want);
                }
                k.assert_untouched();
                v.assert_untouched();
            }
        }
    }
}

crate::typed_tests! {
    append_f16: append::<f16>();
    append_bf16: append::<bf16>();
}

#[test]
fn wrong_input_is_refused() {
    let Some(gpu) = start() else { return };
    let rng = &mut Rng::new();
    let tokens = Tokens::new(&gpu, rng, 16);
    let pages = tokens.table.num_pages();
    let layout = KvLayout::Nhd;
    let shape = CacheShape { pages, page_size: 16, heads: 2, head_dim: 128, layout, joined: false };
    let run = |rng: &mut Rng, rows: usize, heads: usize, head_dim: usize, rotary_dim: usize| {
        let angles = Angles::new(&gpu, rotary_dim, false);
        let mut q = Mirrored::<f16>::random(&gpu, rng, &[rows, 4, head_dim]);
        let k = Mirrored::<f16>::random(&gpu, rng, &[tokens.len(), heads, 128]);
        let mut cache = Cache::<f16>::poisoned(&gpu, shape);
        let appended = rope::rope_append_paged_kv_cache(
            &gpu.stream,
            &mut q.device_view_mut(),
            [&k.device_view(); 2],
            &angles.on_device(&tokens.device_append),
            &SlotMapping::new(&tokens.device_append, &tokens.device_table),
            &mut cache.device_view_mut(),
        );
        q.assert_untouched();
        appended
    };
    refused(run(rng, tokens.len() - 1, 2, 128, 128), "q");
    refused(run(rng, tokens.len(), 2, 64, 64), "q");
    refused(run(rng, tokens.len(), 3, 128, 128), "key");
    refused(run(rng, tokens.len(), 2, 128, 256), "cos_sin_cache");
    refused(run(rng, tokens.len(), 2, 128, 40), "cos_sin_cache");
}
