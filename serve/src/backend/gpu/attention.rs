//! Attention of all layers: those that differ in nothing share a plan.

use flashinfer_rs::{
    FlashInferError, Result, Stream, TensorMut, TensorRef,
    attention::{
        AttentionSpec, Backend, BatchDecode, BatchPrefill, DecodePlan, PlanOptions, PrefillPlan, ReplayKey,
        RunOptions, Split, Workspace,
    },
    indices::PageTable,
    kv::{BatchTables, PagedKv},
};

use super::{GpuOptions, heads::HeadWidths, lanes::LANES, split::Parts};
use crate::model::Config;

/// Bytes for partial results, and for index arrays, that workspaces have at first.
const FIRST_BYTES: [usize; 2] = [32 << 20, 8 << 20];
/// Bytes for partial results beyond which they do not grow.
const MAX_FLOAT_BYTES: usize = 4 << 30;

/// Layers of one kind.
struct Kind {
    spec: AttentionSpec,
    decode: BatchDecode,
    prefill: BatchPrefill,
    /// For each lane.
    workspaces: [Workspace; LANES],
}

/// The kernels and scratch memory of attention.
pub struct Attention {
    kinds: Vec<Kind>,
    /// The kind of each layer.
    layers: Vec<usize>,
    sm_scale: f64,
    /// What decode can divide keys into; `None` if it is not to.
    parts: Option<Parts>,
}

impl Attention {
    /// Loads the modules of all layers, for sequences of up to so many tokens.
    ///
    /// If some layers have windows, the others have one that nothing is beyond: all
    /// are served by the same modules then.
    ///
    /// If it is to be deterministic, decode gives a row the same results in any batch.
    pub fn new(
        stream: &Stream,
        config: &Config,
        widths: HeadWidths,
        positions: usize,
        GpuOptions { deterministic, kv, .. }: GpuOptions,
        multiprocessors: usize,
    ) -> Result<Self> {
        let parts =
            (!deterministic).then(|| Parts::new(multiprocessors, config.heads.num_kv_heads, widths.padded));
        let mut attention =
            Self { kinds: Vec::new(), layers: Vec::new(), sm_scale: config.attention_scale, parts };
        let windowed = config.layers.iter().any(|layer| layer.window.is_some());
        for layer in &config.layers {
            let mut spec =
                AttentionSpec::new(config.dtype, widths.padded).with_kv_dtype(kv.dtype(config.dtype));
            spec.logits_soft_cap = config.attention_soft_cap.map(|cap| cap as f32);
            let window = layer.window.unwrap_or(positions).clamp(1, i32::MAX as usize);
            spec.window_left = windowed.then_some(window as u32 - 1);
            if deterministic {
                // The one whose planner can be told how to divide keys.
                spec.backend = Backend::Fa2;
            }
            let known = attention.kinds.iter().position(|kind| kind.spec == spec);
            attention.layers.push(known.unwrap_or(attention.kinds.len()));
            if known.is_none() {
                let workspace = || Workspace::with_sizes(stream, FIRST_BYTES[0], FIRST_BYTES[1]);
                attention.kinds.push(Kind {
                    spec,
                    decode: BatchDecode::new(stream, &spec, config.heads)?,
                    prefill: BatchPrefill::new(stream, &spec, config.heads)?,
                    workspaces: [workspace()?, workspace()?],
                });
            }
        }
        Ok(attention)
    }

    /// Whether a plan failed because a workspace is too small, which cannot grow by
    /// itself once a graph may hold its memory.
    pub fn is_too_small(error: &FlashInferError) -> bool {
        matches!(error, FlashInferError::InvalidArgument { argument: "workspace", .. })
    }

    /// Replaces the workspaces by larger ones, unless they are as large as they get.
    /// Graphs that hold the old ones do not fit plans of the new ones.
    pub fn grow(&mut self, stream: &Stream) -> Result<bool> {
        let workspaces = self.kinds.iter_mut().flat_map(|kind| &mut kind.workspaces);
        let mut grown = false;
        for workspace in workspaces.filter(|workspace| workspace.float_bytes() < MAX_FLOAT_BYTES) {
            let (float, int) = (2 * workspace.float_bytes(), 2 * workspace.int_bytes());
            *workspace = Workspace::with_sizes(stream, float, int)?;
            grown = true;
        }
        Ok(grown)
    }

    /// Has workspaces that are too small for all that is divided.
    #[cfg(test)]
    pub fn shrink(&mut self, stream: &Stream) -> Result<()> {
        for workspace in self.kinds.iter_mut().flat_map(|kind| &mut kind.workspaces) {
            *workspace = Workspace::with_sizes(stream, 1 << 10, FIRST_BYTES[1])?;
        }
        Ok(())
    }

    /// Bytes for partial results that all workspaces have.
    pub fn workspace_bytes(&self) -> usize {
        self.kinds.iter().flat_map(|kind| &kind.workspaces).map(Workspace::float_bytes).sum()
    }

    /// Plans a lane's step of one new token for each of these requests; for a graph of so many
    /// requests, if any.
    pub fn plan_decode<'p>(
        &'p mut self,
        lane: usize,
        pages: &'p PageTable,
        graph: Option<usize>,
    ) -> Result<Plans<'p>> {
        let parts = self.parts;
        let plan = |kind: &'p mut Kind| {
            let mut options = PlanOptions::default();
            options.graph = graph;
            // Only the planner of FlashAttention 2 can be told.
            if kind.decode.backend() == Backend::Fa2 {
                let window = kind.spec.window_left.map_or(usize::MAX, |left| left as usize + 1);
                let lens = pages.host().seq_lens().into_iter().map(|len| (len as usize).min(window));
                options.split = match parts {
                    Some(parts) if parts.divides(lens) => Split::default(),
                    _ => Split::disabled(),
                };
            }
            kind.decode.plan(&mut kind.workspaces[lane], pages, &options)
        };
        let plans = self.kinds.iter_mut().map(plan).collect::<Result<_>>()?;
        Ok(Plans { plans: OfKinds::Decode(plans), layers: &self.layers, sm_scale: self.sm_scale })
    }

    /// Plans a lane's step of any new tokens.
    pub fn plan_prefill<'p>(&'p mut self, lane: usize, tables: &'p BatchTables) -> Result<Plans<'p>> {
        let options = PlanOptions::causal();
        let plan = |kind: &'p mut Kind| kind.prefill.plan_paged(&mut kind.workspaces[lane], tables, &options);
        let plans = self.kinds.iter_mut().map(plan).collect::<Result<_>>()?;
        Ok(Plans { plans: OfKinds::Prefill(plans), layers: &self.layers, sm_scale: self.sm_scale })
    }
}

/// A plan for each kind of layers.
enum OfKinds<'p> {
    Decode(Vec<DecodePlan<'p>>),
    Prefill(Vec<PrefillPlan<'p, PageTable>>),
}

/// The plans of a step.
pub struct Plans<'p> {
    plans: OfKinds<'p>,
    layers: &'p [usize],
    sm_scale: f64,
}

impl<'p> Plans<'p> {
    /// Attention of a layer: queries `[rows, num_qo_heads, head_dim]` over the
    /// layer's cache.
    pub fn run(
        &self,
        layer: usize,
        q: &TensorRef<'_>,
        kv: &PagedKv<'_>,
        out: &mut TensorMut<'_>,
    ) -> Result<()> {
        let (kind, options) = (self.layers[layer], RunOptions::with_sm_scale(self.sm_scale));
        match &self.plans {
            OfKinds::Decode(plans) => plans[kind].run_with(q, kv, out, None, &options),
            OfKinds::Prefill(plans) => plans[kind].run_with(q, kv, out, None, &options),
        }
    }

    /// The plans that a captured step can be launched with: those of decode.
    pub fn decode(&self) -> &[DecodePlan<'p>] {
        match &self.plans {
            OfKinds::Decode(plans) => plans,
            OfKinds::Prefill(_) => &[],
        }
    }

    /// What tells which graph they fit; none if they are not for a graph.
    pub fn replay_keys(&self) -> Option<Vec<ReplayKey>> {
        let keys = self.decode().iter().map(|plan| plan.replay_key().ok()).collect::<Option<Vec<_>>>()?;
        (!keys.is_empty()).then_some(keys)
    }
}
