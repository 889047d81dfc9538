//! Gemma 2's attention: two kinds of layers over one paged cache.

use candle_core::{Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use flashinfer_rs::{
    DType,
    attention::AttentionSpec,
    candle::{
        PagedCache, PagedDecode, PagedDecodePlan, PagedPrefill, PagedPrefillPlan, PagedRunOptions, Step,
        StepTables,
    },
    kv::{Batch, HeadsShape, KvLayout, PageAllocator},
};

use super::{Config, Gemma2};

/// Gemma 2, and the keys and values of the sequences of a pool.
pub struct PagedGemma2 {
    model: Gemma2,
    device: Device,
    cache: PagedCache,
    tables: StepTables,
    /// Of layers with a window, and of those without.
    kinds: [LayerKind; 2],
}

impl PagedGemma2 {
    /// The model of these weights, on their device and of their dtype: on CUDA `f16` or `bf16`, and FlashInfer
    /// has modules with window and cap for head dimensions 64, 128 and 256.
    pub fn new(config: &Config, weights: VarBuilder, pool: &PageAllocator) -> Result<Self> {
        let (device, dtype) = (weights.device().clone(), DType::try_from(weights.dtype())?);
        let model = Gemma2::new(config, weights)?;
        let shape = HeadsShape {
            num_layers: config.num_hidden_layers,
            num_kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            dtype,
            layout: KvLayout::Nhd,
        };
        let kind = |layer| LayerKind::new(&model, &device, dtype, layer);
        Ok(Self {
            cache: PagedCache::new(&device, pool, shape)?,
            tables: StepTables::new(&device),
            kinds: [kind(0)?, kind(1)?],
            model,
            device,
        })
    }

    /// Logits, `(requests, vocab_size)`, of each request's last token. `tokens` are the new ones, those that
    /// the batch has room for since its last [`append`](Batch::append): prompts, parts of prompts and single
    /// tokens, one request after the other.
    ///
    /// # Errors
    /// There are more or fewer tokens, or none of a request; the batch is of another pool.
    pub fn forward(&mut self, batch: &Batch, tokens: &[u32]) -> Result<Tensor> {
        let queries = batch.queries();
        let mut last = Vec::with_capacity(batch.len());
        for request in 0..batch.len() {
            if queries.len(request) == 0 {
                bail!("request {request} has no new token; append one to each, or take the request out")
            }
            last.push(queries.indptr()[request + 1] as u32 - 1);
        }
        if batch.is_empty() {
            bail!("the batch has no request; push one")
        }
        if tokens.len() != queries.total() {
            bail!("{} tokens for a batch with {} new ones; expected as many", tokens.len(), queries.total())
        }
        let Self { model, device, cache, tables, kinds } = self;
        let step = tables.update(batch, cache)?;
        let decodes = queries.total() == batch.len();
        let [windowed, full] = kinds.each_mut().map(|kind| kind.plan(&step, decodes));
        let plans = [windowed?, full?];
        let options = PagedRunOptions::with_sm_scale(model.sm_scale());
        let [tokens, last] = [tokens, &last[..]].map(|numbers| Tensor::new(numbers, device));
        model.forward(&tokens?, &step, &last?, |layer, [q, k, v]| {
            cache.append(&step, layer, k, v)?;
            plans[layer % 2].run(q, cache, layer, &options)
        })
    }
}

/// Layers that share plans.
struct LayerKind {
    prefill: PagedPrefill,
    decode: PagedDecode,
}

impl LayerKind {
    /// The kind of a layer. One without a window gets one as long as the context, which hides nothing: so
    /// both kinds are served by the same modules.
    fn new(model: &Gemma2, device: &Device, dtype: DType, layer: usize) -> Result<Self> {
        let config = model.config();
        let window_left = model.window_left(layer).unwrap_or(config.max_position_embeddings);
        let mut spec = AttentionSpec::new(dtype, config.head_dim)
            .with_window_left(u32::try_from(window_left).unwrap_or(u32::MAX));
        spec.logits_soft_cap = config.attn_logit_softcapping.map(|cap| cap as f32);
        Ok(Self {
            prefill: PagedPrefill::new(device, &spec, model.heads())?,
            decode: PagedDecode::new(device, &spec, model.heads())?,
        })
    }

    fn plan<'p>(&'p mut self, step: &'p Step<'_>, decodes: bool) -> Result<Plan<'p>> {
        Ok(match decodes {
            true => Plan::Decode(self.decode.plan(step)?.into()),
            false => Plan::Prefill(self.prefill.plan(step, true)?.into()),
        })
    }
}

/// A step's plan for layers of a kind.
enum Plan<'p> {
    Prefill(Box<PagedPrefillPlan<'p>>),
    Decode(Box<PagedDecodePlan<'p>>),
}

impl Plan<'_> {
    fn run(
        &self,
        q: &Tensor,
        cache: &PagedCache,
        layer: usize,
        options: &PagedRunOptions<'_>,
    ) -> Result<Tensor> {
        match self {
            Self::Prefill(plan) => plan.run_with(q, cache, layer, options),
            Self::Decode(plan) => plan.run_with(q, cache, layer, options),
        }
    }
}
