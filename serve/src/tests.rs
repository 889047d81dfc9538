//! Models of files: the pinned one, and small ones that are made here.

mod architectures;
pub mod bytes;
mod files;
pub mod forward;
pub mod gpu;
mod keys;
mod no_numbers;
pub mod sentencepiece;
mod smollm2;
mod tiny;
mod tokenizers;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    slice,
    sync::{Arc, OnceLock},
};

use candle_core::{
    Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
};
use flashinfer_rs::{
    artifacts::{ArtifactError, Fetch, Store},
    kv::{Batch, PageAllocator, Sequence},
};

use tempfile::TempDir;
use test_support::required;

use crate::{
    Result,
    backend::{Backend, Output, Sample, Step, StepCapacity, StepToken, cpu::Cpu},
    cli::answers::{Asked, answer},
    engine::{Engine, EngineConfig},
    hub,
    model::{Ends, Layer, Model},
    request::{Finish, Request},
    sampling::SamplingParams,
    scheduler::{
        DraftModel, Limits, Stats,
        testing::{Requests, greedy},
    },
    text::{ChatOptions, EncodeOptions, Message, Role, Text},
};

pub use self::tiny::{Tiny, engine};
use self::{no_numbers::*, smollm2::*};

/// Limits for the known answers, of which only the first ends by itself.
fn limits(step_tokens: usize, draft: usize) -> Limits {
    Limits { step_tokens, chunk_tokens: step_tokens, max_running: 64, context: 8192, draft, ends: [2].into() }
}

/// What a request is answered when it is alone.
fn solo(
    engine: &mut dyn Backend,
    pool: &PageAllocator,
    prompt: &[u32],
    max_tokens: usize,
    limits: Limits,
) -> (Vec<u32>, Stats) {
    let mut requests = Requests::new(pool, engine.vocab_size(), limits);
    requests.submit(prompt, &greedy(max_tokens)).unwrap();
    requests.finish(engine);
    (requests.answer(0).ids(), requests.scheduler.stats())
}

/// A model that drafts, in so many pages of its own, for steps of such limits.
pub fn draft_model<B: Backend + 'static>(
    num_pages: usize,
    page_size: usize,
    limits: &Limits,
    backend: impl FnOnce(&PageAllocator, StepCapacity) -> B,
) -> DraftModel {
    let pool = PageAllocator::new(num_pages, page_size).unwrap();
    let capacity = limits.step_capacity();
    let backend = Box::new(backend(&pool, capacity));
    DraftModel::new(backend, &pool, limits.step_tokens, limits.context).with_few_tokens(capacity.outputs)
}

/// The tokens after the outputs of a step, all of which have one.
fn tokens(samples: &[Sample]) -> Vec<u32> {
    samples.iter().map(|sample| sample.token.expect("logits that are numbers")).collect()
}
