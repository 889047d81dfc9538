//! Steps that are captured into a CUDA graph once, and launched again and again.
//!
//! Launching a graph costs the host one call for all the kernels of a step. A graph has the
//! addresses and sizes of its first run baked in, so it can be launched later only if all of
//! them still are what they were. A [`CapturedStep`] sees to that: it shares the memory that it
//! works on, and each [`launch`](CapturedStep::launch) compares plans and index arrays with
//! those of the capture.
//!
//! # What is baked in
//!
//! - The number of requests and of new tokens. Fill a smaller batch up with
//!   [`BatchTables::update_padded`](crate::kv::BatchTables::update_padded); larger ones need a
//!   step of their own. Engines keep one step for each power of two.
//! - Addresses of tensors, of index arrays, of the cache and of the workspace; heads, the number
//!   of pages, the kind of mask, scales, seeds, and every other number that was passed.
//! - Not the contents: write new tokens to the same tensors, update the same tables, plan on the
//!   same workspace, and launch.
//!
//! # How
//!
//! 1. **Warm up**: run the same work once as it is. First calls load kernels, which a capture may
//!    not allow, and compile the crate's own, which it does not.
//! 2. **Plan for a graph**, and [`capture`](CapturedStep::capture) the runs. Tensors are
//!    [`gpu::Tensor`](crate::gpu::Tensor)s. Nothing is computed yet.
//! 3. For each step, update the tables, plan again, and [`launch`](CapturedStep::launch) with the
//!    new plan.
//!
//! The capture is CUDA's "thread local" one: other threads can go on as they like, on other
//! streams; in this thread, what would break the capture is refused.
//!
//! cudarc's own graphs serve as well, at your own risk: nothing is kept alive for them, and
//! nothing is compared. `docs/soundness.md` says what its user answers for.

use std::marker::PhantomData;

use crate::{
    capture::{self, Record, Recording},
    cuda::{Capture, Graph},
    error::{FlashInferError, Result},
    indices::{PageTable, RaggedTable},
    ops::attention::{BatchAttentionPlan, CascadePlan, DecodePlan, PrefillPlan, ReplayKey},
    runtime::FlashInferRuntime,
    stream::Stream,
};

/// A step of work on one stream, captured into a CUDA graph.
///
/// It has a share of all device memory that its operations use: tensors, index arrays,
/// workspaces, caches. Dropping those frees nothing that the step needs, and between launches
/// they can be read, written and updated, in the order of the stream. It can move to
/// another thread, but not be shared.
///
/// ```no_run
/// # #[cfg(feature = "cudarc")] mod example {
/// use flashinfer_rs::{
///     Result, Stream,
///     attention::{BatchDecode, PlanOptions, Workspace},
///     gpu::Tensor,
///     graph::CapturedStep,
///     kv::{Batch, BatchTables, PagedKvCache},
/// };
/// use half::bf16;
///
/// fn decode(
///     stream: &Stream,
///     decode: &BatchDecode,
///     (batch, cache, tables): (&mut Batch, &mut PagedKvCache, &mut BatchTables),
///     (q, out): (&mut Tensor<bf16>, &mut Tensor<bf16>),
/// ) -> Result<()> {
///     let (size, layers, mut workspace) = (batch.len(), 0..2, Workspace::new(stream)?);
///     let options = PlanOptions::default().with_graph(size);
///     tables.update(batch, cache)?;
///     let plan = decode.plan(&mut workspace, &*tables, &options)?;
///     let mut run = || {
///         layers.clone().try_for_each(|layer| {
///             let kv = cache.layer(layer)?;
///             plan.run(&q.view(), &kv, &mut out.view_mut())
///         })
///     };
///     run()?; // loads the kernels
///     let step = CapturedStep::capture(stream, run)?;
///     for _ in 0..100 {
///         batch.append(vec![1; batch.len()])?;
///         tables.update_padded(batch, cache, size)?;
///         // New queries: q.write(…)
///         step.launch(&decode.plan(&mut workspace, &*tables, &options)?)?;
///         // Results: out.to_vec()
///     }
///     Ok(())
/// }
/// # }
/// ```
pub struct CapturedStep {
    /// Goes before what it works on.
    graph: Graph,
    nodes: usize,
    record: Record,
    /// Launches of a graph are not made by two threads at once.
    not_shared: PhantomData<std::cell::Cell<()>>,
}

impl CapturedStep {
    /// Captures the operations of this crate that `body` enqueues on `stream`, from this
    /// thread, without running them.
    ///
    /// The capture ends in any case, also if `body` fails or panics; then the stream can be used
    /// as before.
    ///
    /// # Errors
    /// What `body` returns. [`InvalidArgument`](FlashInferError::InvalidArgument): a plan in it
    /// was not made for a graph, or is of latent attention; it uses tensors that cannot be kept
    /// alive (views of cudarc slices or of raw pointers); it enqueues work that is not this
    /// crate's, which [`capture_unchecked`](Self::capture_unchecked) takes; something in it broke
    /// the capture, or is a first call that has to compile a kernel: run the same work once before;
    /// the thread is capturing already. Else what CUDA said.
    pub fn capture(stream: &Stream, body: impl FnOnce() -> Result<()>) -> Result<Self> {
        Self::capture_as(stream, body, false)
    }

    /// As [`capture`](Self::capture), together with work of others: cudarc's functions, cuBLAS,
    /// kernels of your own; and with views of slices that were made before.
    ///
    /// # Safety
    /// All memory that `body` uses otherwise than through [`gpu::Tensor`](crate::gpu::Tensor)
    /// and values of this crate must stay alive as long as the step, in stream order, and whatever
    /// that work takes for granted must be so at each launch.
    pub unsafe fn capture_unchecked(stream: &Stream, body: impl FnOnce() -> Result<()>) -> Result<Self> {
        Self::capture_as(stream, body, true)
    }

    fn capture_as(stream: &Stream, body: impl FnOnce() -> Result<()>, unchecked: bool) -> Result<Self> {
        stream.check_usable_here(capture::OP)?;
        let cuda = FlashInferRuntime::get()?.cuda();
        let count_nodes = |stream: &Stream| FlashInferRuntime::get()?.cuda().captured_nodes(stream);
        // Dropped in the other order: the capture ends first.
        let recording = Recording::start(stream, count_nodes, unchecked)?;
        let capture = Capture::begin(cuda, stream)?;
        body()?;
        let ended = capture.end();
        let record = recording.finish()?;
        let (graph, nodes) = ended?;
        if nodes.all != record.nodes && !unchecked {
            return Err(FlashInferError::invalid(
                capture::OP,
                "body",
                format!(
                    "{} kernels, copies and fills were captured, of which {} are operations of this crate, \
                     called in this thread; take the others out, or use capture_unchecked",
                    nodes.all, record.nodes
                ),
            ));
        }
        Ok(Self { graph, nodes: nodes.work, record, not_shared: PhantomData })
    }

    /// Enqueues the step. `plans` are the current ones of all plans whose runs were captured, in
    /// any order: a plan, a tuple or a slice of them, or `&()` if there are none.
    ///
    /// # Errors
    /// [`InvalidArgument`](FlashInferError::InvalidArgument), and nothing is enqueued: no plan
    /// has the addresses and sizes of a captured one; index arrays have another number of
    /// entries, or no longer belong together; the stream is being captured, or is another
    /// thread's. Else what CUDA said.
    pub fn launch<P: Plans + ?Sized>(&self, plans: &P) -> Result<()> {
        self.stream().check_usable_here(capture::OP)?;
        if FlashInferRuntime::get()?.cuda().is_capturing(self.stream())? {
            return Err(FlashInferError::invalid(
                capture::OP,
                "stream",
                "it is being captured, and that graph would not keep this step alive",
            ));
        }
        let captured = || self.record.plans.iter().filter_map(|key| key.downcast_ref::<ReplayKey>());
        if captured().next().is_some() {
            let mut current = Vec::new();
            plans.keys(&mut |key| current.push(key));
            if let Some(missing) = captured().find(|captured| !current.contains(captured)) {
                return Err(FlashInferError::invalid(capture::OP, "plans", missing.unlike(&current)));
            }
        }
        self.record.check()?;
        // SAFETY: the step has a share of all memory that the work uses. The plans, which are
        // borrowed, say that what is in their workspaces is of their tables as they are now; as
        // their keys are those that were captured, the launches have the right sizes for them.
        // Other index arrays were just compared with what the work takes for granted.
        unsafe { self.graph.launch() }
    }

    /// The stream that the step was captured on, and is launched on.
    pub fn stream(&self) -> &Stream {
        self.graph.stream()
    }

    /// Kernels, copies, fills and whatever else the graph does, of others too: all nodes but empty ones.
    pub fn nodes(&self) -> usize {
        self.nodes
    }
}

impl std::fmt::Debug for CapturedStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CapturedStep({} nodes, {:?})", self.nodes(), self.stream())
    }
}

/// Plans that a step is launched with. Implemented by plans that can be captured, and by
/// references, tuples and slices of them.
pub trait Plans: sealed::Keyed {}
impl<P: sealed::Keyed + ?Sized> Plans for P {}

pub(crate) mod sealed {
    use super::ReplayKey;

    pub trait Keyed {
        /// Gives the keys of the plans to `put`.
        fn keys(&self, put: &mut dyn FnMut(ReplayKey));
    }
}

impl sealed::Keyed for () {
    fn keys(&self, _: &mut dyn FnMut(ReplayKey)) {}
}

impl sealed::Keyed for DecodePlan<'_> {
    fn keys(&self, put: &mut dyn FnMut(ReplayKey)) {
        self.replay_key().into_iter().for_each(put);
    }
}

impl sealed::Keyed for PrefillPlan<'_, PageTable> {
    fn keys(&self, put: &mut dyn FnMut(ReplayKey)) {
        self.replay_key().into_iter().for_each(put);
    }
}

impl sealed::Keyed for PrefillPlan<'_, RaggedTable> {
    fn keys(&self, put: &mut dyn FnMut(ReplayKey)) {
        self.replay_key().into_iter().for_each(put);
    }
}

impl sealed::Keyed for BatchAttentionPlan<'_> {
    fn keys(&self, put: &mut dyn FnMut(ReplayKey)) {
        self.replay_key().into_iter().for_each(put);
    }
}

impl sealed::Keyed for CascadePlan<'_> {
    fn keys(&self, put: &mut dyn FnMut(ReplayKey)) {
        self.levels().iter().for_each(|level| level.keys(put));
    }
}

impl<P: sealed::Keyed + ?Sized> sealed::Keyed for &P {
    fn keys(&self, put: &mut dyn FnMut(ReplayKey)) {
        (**self).keys(put);
    }
}

impl<P: sealed::Keyed> sealed::Keyed for [P] {
    fn keys(&self, put: &mut dyn FnMut(ReplayKey)) {
        self.iter().for_each(|plan| plan.keys(put));
    }
}

macro_rules! tuples {
    ($(($($name:ident $place:tt),+))*) => {$(
        impl<$($name: sealed::Keyed),+> sealed::Keyed for ($($name,)+) {
            fn keys(&self, put: &mut dyn FnMut(ReplayKey)) {
                $(self.$place.keys(put);)+
            }
        }
    )*};
}
tuples! { (A 0) (A 0, B 1) (A 0, B 1, C 2) (A 0, B 1, C 2, D 3) }
