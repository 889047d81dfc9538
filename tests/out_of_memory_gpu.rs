//! A GPU that has too little memory: whatever asks for some gives an error, and succeeds once there is more.
#![cfg(feature = "cudarc")]

mod common;

use common::{Gpu, say};
use flashinfer_rs::{
    DType, FlashInferError, Result,
    attention::{CascadeWorkspace, Workspace},
    gpu::Tensor,
    kv::{HeadsShape, KvLayout, PageAllocator, PagedKvCache},
};
use test_support::ballast::Ballast;

/// Bytes of each, of which some have several parts.
const BYTES: usize = 96 << 20;
/// What the GPU is left more of from one round to the next.
const STEP: usize = 8 << 20;

/// What asks for memory.
type Ask = (&'static str, fn(&Gpu) -> Result<()>);

const ALL: [Ask; 4] = [
    ("a tensor", |gpu| Tensor::<u8>::zeros(&gpu.stream, &[BYTES]).map(drop)),
    ("a workspace", |gpu| Workspace::with_sizes(&gpu.stream, BYTES / 2, BYTES / 2).map(drop)),
    ("a workspace of a cascade", |gpu| CascadeWorkspace::new(&gpu.stream, 2).map(drop)),
    ("a cache", |gpu| {
        let shape = HeadsShape {
            num_layers: 3,
            num_kv_heads: 8,
            head_dim: 128,
            dtype: DType::F16,
            layout: KvLayout::Nhd,
        };
        let pool = PageAllocator::new(BYTES / (3 * 2 * 16 * 8 * 128 * 2), 16)?;
        PagedKvCache::new(&gpu.stream, &pool, &[shape]).map(drop)
    }),
];

#[test]
fn too_little_memory_is_an_error_and_nothing_else() {
    let Some(gpu) = Gpu::start_alone() else { return };
    for (what, ask) in ALL {
        ask(&gpu).unwrap();
        let (mut refused, mut given) = (0, 0);
        for left in (0..80).map(|round| round * STEP) {
            let ballast = Ballast::leaving(gpu.cuda.context(), left);
            match ask(&gpu) {
                Err(error @ FlashInferError::Cuda { code: 2, .. }) => {
                    assert!(error.to_string().contains("free device memory"), "{error}");
                    refused += 1;
                }
                Err(error) => panic!("{what}, {left} bytes: {error}"),
                Ok(()) => given += 1,
            }
            drop(ballast);
            // What failed left nothing behind.
            ask(&gpu).unwrap();
            gpu.synchronize();
        }
        say(&format!("{what}: refused {refused} times, given {given} times"));
        assert!(refused > 0 && given > 0, "{what}: refused {refused} times, given {given} times");
    }
}
