//! The steps on a GPU: what an engine does around the recipes.

use std::{ffi::c_void, sync::Arc};

use cudarc::driver::CudaStream;
use flashinfer_rs::{
    PageTable, Stream,
    attention::PagedBatch,
    graph::CapturedStep,
    indices::{AppendTable, RaggedIndices, RaggedTable, SlotMapping},
};
use half::bf16;

use crate::{
    Result,
    append::append,
    captured::{capture, launch},
    decode::{DecodeKind, Layer, decode, device_table},
    memory::Memory,
    model::{Buffers, HEADS, LAYERS, Mode, PAGES, REQUESTS, Step, specs},
    prefill::{PrefillKind, prefill},
    sample::{self, Logits},
    views::Rows,
};

/// Made once, and used in every step.
struct Engine {
    stream: Stream,
    decode: Vec<DecodeKind>,
    prefill: Vec<PrefillKind>,
    pages: PageTable,
    append: AppendTable,
    queries: RaggedTable,
    /// The engine's own block table: `indptr`, `indices`, `last_page_len`.
    block_table: [*mut c_void; 3],
    captured: Option<CapturedStep>,
}

impl Engine {
    fn new(stream: Stream, memory: &mut Memory, first: &Step) -> Result<Self> {
        let pages = first.pages()?;
        let mut of_decode = Vec::new();
        let mut of_prefill = Vec::new();
        for spec in &specs() {
            of_decode.push(DecodeKind::new(&stream, spec, HEADS)?);
            of_prefill.push(PrefillKind::new(&stream, spec, HEADS)?);
        }
        let (append, queries) = (first.append(&pages)?, RaggedIndices::from_lens(first.new)?);
        let [indptr, indices, last_page_len] =
            [REQUESTS + 1, PAGES, REQUESTS].map(|len| memory.take(4 * len));
        Ok(Self {
            decode: of_decode,
            prefill: of_prefill,
            append: AppendTable::with_capacity(&stream, append, first.rows())?,
            pages: PageTable::with_capacity(&stream, pages, REQUESTS, PAGES)?,
            queries: RaggedTable::with_capacity(&stream, queries, REQUESTS)?,
            block_table: [indptr?, indices?, last_page_len?],
            captured: None,
            stream,
        })
    }

    fn append_all(&self, pages: &PageTable, layers: &[(Layer, [Rows; 2])]) -> Result<()> {
        let slots = SlotMapping::new(&self.append, pages);
        for (layer, new) in layers {
            // SAFETY: the buffers are as large as that, and outlive the engine and its stream's work.
            unsafe { append(&self.stream, *new, &slots, layer.cache)? };
        }
        Ok(())
    }

    fn run(&mut self, memory: &Memory, step: &Step, layers: [(Layer, [Rows; 2]); LAYERS]) -> Result<()> {
        let attention = layers.map(|(layer, _)| layer);
        let pages = step.pages()?;
        self.append.update(step.append(&pages)?)?;
        match step.mode {
            Mode::Prefill => {
                self.pages.update(pages)?;
                self.queries.update(RaggedIndices::from_lens(step.new)?)?;
                self.append_all(&self.pages, &layers)?;
                let batch = PagedBatch::new(&self.queries, &self.pages);
                // SAFETY: as in `append_all`.
                unsafe { prefill(&mut self.prefill, batch, &attention)? };
            }
            Mode::Decode => {
                let [indptr, indices, last_page_len] = self.block_table;
                // SAFETY: there is room for the numbers of all pages and requests, and nothing reads them.
                unsafe {
                    memory.write(indptr, pages.indptr())?;
                    memory.write(indices, pages.indices())?;
                    memory.write(last_page_len, pages.last_page_len())?;
                }
                let arrays = self.block_table.map(|array| array.cast_const().cast());
                // SAFETY: they were just written from the same numbers, and stay until the next step.
                let table = unsafe { device_table(&self.stream, pages, arrays) };
                self.append_all(&table, &layers)?;
                // SAFETY: as in `append_all`.
                unsafe { decode(&mut self.decode, &table, &attention)? };
            }
            Mode::Captured => {
                self.pages.update(pages)?;
                if self.captured.is_none() {
                    let slots = SlotMapping::new(&self.append, &self.pages);
                    // SAFETY: as in `append_all`; the step is the engine's.
                    let step = unsafe { capture(&self.stream, &mut self.decode, &slots, &layers)? };
                    self.captured = Some(step);
                }
                if let Some(captured) = &self.captured {
                    launch(captured, &mut self.decode, &self.pages)?;
                }
            }
        }
        Ok(())
    }
}

/// The outputs of each step's layers.
pub fn steps(cuda: &Arc<CudaStream>, steps: &[Step]) -> Result<Vec<Vec<Vec<bf16>>>> {
    // SAFETY: a stream of the device's primary context, which outlives the engine.
    let stream = unsafe { Stream::from_raw(cuda.cu_stream().cast(), cuda.context().ordinal() as u32) };
    let mut memory = Memory::gpu(cuda.clone(), 16 << 20)?;
    let buffers = Buffers::new(&mut memory)?;
    let mut engine = Engine::new(stream, &mut memory, &steps[0])?;
    let step = |step: &Step| {
        buffers.write(&memory, step)?;
        engine.run(&memory, step, buffers.layers(step.rows()))?;
        buffers.outputs(&memory, step.rows())
    };
    steps.iter().map(step).collect()
}

/// The token of each row.
pub fn sample(cuda: &Arc<CudaStream>, host: &Memory, batch: &Logits) -> Result<Vec<i32>> {
    // SAFETY: as above.
    let stream = unsafe { Stream::from_raw(cuda.cu_stream().cast(), cuda.context().ordinal() as u32) };
    let mut memory = Memory::gpu(cuda.clone(), 1 << 20)?;
    let Logits { rows, vocab, .. } = *batch;
    let mut copy = |part: *const c_void, len: usize| -> Result<*mut c_void> {
        let to = memory.take(4 * len)?;
        // SAFETY: both parts have so many numbers of 32 bits.
        unsafe { memory.write(to, &host.read::<u32>(part, len)?)? };
        Ok(to)
    };
    let batch = Logits {
        logits: copy(batch.logits, rows * vocab)?,
        uniforms: copy(batch.uniforms, rows)?,
        temperatures: copy(batch.temperatures, rows)?,
        top_ks: copy(batch.top_ks, rows)?,
        rows,
        vocab,
    };
    let tokens = memory.take(4 * rows)?;
    // SAFETY: the parts are as large as that, and live as long as `memory`.
    unsafe {
        sample::sample(&stream, &batch, tokens)?;
        memory.read(tokens, rows)
    }
}
