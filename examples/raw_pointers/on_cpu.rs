//! The same steps by the reference, in memory of the process, with the checks of the kernels.

use flashinfer_rs::{
    DType, Device, TensorRef,
    attention::RunOptions,
    indices::{RaggedIndices, SlotMapping},
    reference::{self, HostMask},
};
use half::bf16;

use crate::{
    Result,
    memory::Memory,
    model::{Buffers, Mode, Step, specs},
    sample::Logits,
};

/// The outputs of each step's layers.
pub fn steps(steps: &[Step]) -> Result<Vec<Vec<Vec<bf16>>>> {
    let mut memory = Memory::host();
    let buffers = Buffers::new(&mut memory)?;
    // What the kernels would refuse of dtypes, shapes, strides and addresses is refused here.
    let _strict = reference::strict();
    let (specs, options) = (specs(), RunOptions::default());
    let step = |step: &Step| -> Result<Vec<Vec<bf16>>> {
        buffers.write(&memory, step)?;
        let pages = step.pages()?;
        let append = step.append(&pages)?;
        let queries = RaggedIndices::from_lens(step.new)?;
        for (layer, [key, value]) in buffers.layers(step.rows()) {
            let spec = &specs[layer.kind];
            // SAFETY: the buffers are as large as that, live as long as `memory`, and are this thread's.
            let (key, value, mut cache) = unsafe { (key.read()?, value.read()?, layer.cache.write()?) };
            reference::append_paged_kv_cache(&key, &value, &SlotMapping::new(&append, &pages), &mut cache)?;
            // SAFETY: as above.
            let (q, mut out) = unsafe { (layer.q.read()?, layer.out.write()?) };
            let (kv, mask) = (cache.as_ref(), HostMask::Causal);
            match step.mode {
                Mode::Prefill => reference::batch_prefill_paged(
                    spec, &q, &kv, &queries, &pages, &mut out, None, mask, &options,
                )?,
                Mode::Decode | Mode::Captured => {
                    reference::batch_decode(spec, &q, &kv, &pages, &mut out, None, &options)?
                }
            }
        }
        buffers.outputs(&memory, step.rows())
    };
    steps.iter().map(step).collect()
}

/// The token of each row.
pub fn sample(batch: &Logits) -> Result<Vec<i32>> {
    let (device, shape) = (Device::Cpu, [batch.rows, batch.vocab]);
    // SAFETY: the parts are as large as that, and nobody writes them.
    let (logits, options) = unsafe {
        (TensorRef::from_raw_parts(batch.logits, device, DType::F32, &shape, None)?, batch.options(device)?)
    };
    let tokens = reference::sample(&logits, &options)?;
    Ok(tokens.into_iter().map(|token| token.unwrap_or(-1)).collect())
}
