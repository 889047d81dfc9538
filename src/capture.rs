//! What a thread captures into a [`CapturedStep`](crate::graph::CapturedStep), while it does.
//!
//! A graph holds addresses. So while one is captured, whoever enqueues work says here which
//! memory it uses, which index arrays, and of which plan it is; the step keeps the memory,
//! and looks at the rest before it is launched. All of this costs a look at a thread-local
//! value where nothing is captured.

use std::{
    any::Any,
    cell::{Cell, RefCell},
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    device::Device,
    error::{FlashInferError, Result},
    stream::{Stream, StreamId},
    tensor::RawTensor,
};

/// The name that errors bear.
pub(crate) const OP: &str = "CapturedStep";

/// What operations were told of index arrays, and captured work takes for granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Numbers that launches have baked in.
    pub sizes: [usize; 4],
    /// What all positions are below, where it may change.
    pub below: usize,
    /// Arrays that were checked against each other have one stamp; 0 for those that are not.
    pub stamp: u64,
}

impl Facts {
    /// Arrays that keep these numbers in every launch.
    pub(crate) fn of<const N: usize>(numbers: [usize; N]) -> Self {
        let mut sizes = [0; 4];
        sizes[..N].copy_from_slice(&numbers);
        Self { sizes, below: 0, stamp: 0 }
    }
}

/// The facts of arrays on a device, as they are now.
pub(crate) type Current = Arc<Mutex<Facts>>;

/// Index arrays that captured work reads, other than a plan's.
struct Table {
    op: &'static str,
    current: Current,
    captured: Facts,
    /// What positions have to stay below.
    limit: usize,
}

/// What was captured so far.
#[derive(Default)]
pub(crate) struct Record {
    memory: Vec<Arc<dyn Any + Send + Sync>>,
    tables: Vec<Table>,
    /// The keys of plans whose runs were captured.
    pub(crate) plans: Vec<Box<dyn Any + Send>>,
    /// Nodes of the graph that operations of this crate made.
    pub(crate) nodes: usize,
    problem: Option<FlashInferError>,
}

/// Counts the nodes of the graph that a stream is being captured into.
pub(crate) type CountNodes = fn(&Stream) -> Result<usize>;

struct Recorder {
    stream: StreamId,
    count_nodes: CountNodes,
    /// Whether memory is accepted whose owner is not known.
    unchecked: bool,
    record: Record,
}

thread_local! {
    static ACTIVE: Cell<bool> = const { Cell::new(false) };
    /// Whether a plan answers for the index arrays that are read now.
    static COVERED: Cell<bool> = const { Cell::new(false) };
    static RECORDER: RefCell<Option<Recorder>> = const { RefCell::new(None) };
}

fn with<R>(record: impl FnOnce(&mut Recorder) -> R) -> Option<R> {
    if !ACTIVE.get() {
        return None;
    }
    RECORDER.with_borrow_mut(|recorder| recorder.as_mut().map(record))
}

/// Whether this thread is capturing a step.
pub(crate) fn is_active() -> bool {
    ACTIVE.get()
}

/// A thread's capture, until it is dropped.
pub(crate) struct Recording {
    _private: (),
}

impl Recording {
    pub(crate) fn start(stream: &Stream, count_nodes: CountNodes, unchecked: bool) -> Result<Self> {
        if is_active() {
            return Err(FlashInferError::invalid(OP, "body", "this thread is capturing another step"));
        }
        let record = Record::default();
        RECORDER.set(Some(Recorder { stream: stream.id(), count_nodes, unchecked, record }));
        ACTIVE.set(true);
        Ok(Self { _private: () })
    }

    /// What was captured.
    pub(crate) fn finish(self) -> Result<Record> {
        let mut record = with(|recorder| std::mem::take(&mut recorder.record)).unwrap_or_default();
        record.problem.take().map_or(Ok(record), Err)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        ACTIVE.set(false);
        COVERED.set(false);
        RECORDER.set(None);
    }
}

/// A kernel is about to be given this tensor.
pub(crate) fn uses(tensor: &RawTensor) {
    if !is_active() || tensor.device == Device::Cpu || tensor.numel() == 0 {
        return;
    }
    match tensor.owner {
        // SAFETY: a view's memory is alive while the view is.
        Some(owner) => keep(unsafe { owner.share() }),
        None => uses_foreign(),
    }
}

/// Work is about to use memory that somebody else owns, it is not known who.
pub(crate) fn uses_foreign() {
    refuse(|| {
        FlashInferError::invalid(
            OP,
            "body",
            "it uses memory that cannot be kept alive: a view of a slice (TensorExt) or of a raw pointer; use \
             gpu::Tensor, or CapturedStep::capture_unchecked",
        )
    });
}

/// Captured work relies on this value.
pub(crate) fn keep(memory: Arc<dyn Any + Send + Sync>) {
    with(|recorder| {
        let kept = &mut recorder.record.memory;
        if !kept.iter().any(|kept| Arc::ptr_eq(kept, &memory)) {
            kept.push(memory);
        }
    });
}

/// Something cannot be captured, unless the caller answers for it.
fn refuse(problem: impl FnOnce() -> FlashInferError) {
    with(|recorder| {
        if !recorder.unchecked {
            recorder.record.problem.get_or_insert_with(problem);
        }
    });
}

/// Work is about to read these index arrays.
pub(crate) fn reads(op: &'static str, current: &Current) {
    if COVERED.get() {
        return;
    }
    with(|recorder| {
        let tables = &mut recorder.record.tables;
        if !tables.iter().any(|table| Arc::ptr_eq(&table.current, current)) {
            let captured = *current.lock().unwrap_or_else(PoisonError::into_inner);
            tables.push(Table { op, current: current.clone(), captured, limit: usize::MAX });
        }
    });
}

/// Work reads positions that have to stay below a number.
pub(crate) fn limit(op: &'static str, current: &Current, below: usize) {
    reads(op, current);
    with(|recorder| {
        let mut tables = recorder.record.tables.iter_mut();
        if let Some(table) = tables.find(|table| Arc::ptr_eq(&table.current, current)) {
            table.limit = table.limit.min(below);
        }
    });
}

/// Until it is dropped, a plan answers for the index arrays that are read.
pub(crate) struct Covered(bool);

impl Drop for Covered {
    fn drop(&mut self) {
        COVERED.set(self.0);
    }
}

/// A plan is about to be run. `key` is what tells which plans can take its place.
pub(crate) fn runs<K: PartialEq + Send + 'static>(key: impl FnOnce() -> Result<K>) -> Result<Covered> {
    let covered = Covered(COVERED.replace(is_active()));
    if !is_active() {
        return Ok(covered);
    }
    let key = key()?;
    with(|recorder| {
        let plans = &mut recorder.record.plans;
        if !plans.iter().any(|other| other.downcast_ref() == Some(&key)) {
            plans.push(Box::new(key));
        }
    });
    Ok(covered)
}

/// Enqueues work of this crate on a stream.
pub(crate) fn enqueue<R>(stream: &Stream, work: impl FnOnce() -> Result<R>) -> Result<R> {
    let counted = with(|recorder| {
        let Recorder { count_nodes, record, .. } = &*recorder;
        (recorder.stream == stream.id()).then_some((*count_nodes, record.nodes))
    });
    let Some((count, known)) = counted.flatten() else { return work() };
    let before = count(stream)?;
    let result = work()?;
    // What a closure enqueues that a module calls meanwhile is among these.
    let added = count(stream)?.saturating_sub(before);
    with(|recorder| recorder.record.nodes = known + added);
    Ok(result)
}

impl Record {
    /// Whether index arrays still are what captured work takes for granted.
    pub(crate) fn check(&self) -> Result<()> {
        let mut now = [Facts::of([]); 8];
        let mut more;
        let now = match now.get_mut(..self.tables.len()) {
            Some(few) => few,
            None => {
                more = vec![Facts::of([]); self.tables.len()];
                &mut more[..]
            }
        };
        for (now, table) in now.iter_mut().zip(&self.tables) {
            *now = *table.current.lock().unwrap_or_else(PoisonError::into_inner);
            let wrong = |problem: String| Err(FlashInferError::invalid(OP, table.op, problem));
            if now.sizes != table.captured.sizes {
                return wrong(format!(
                    "its sizes are {:?}; the step was captured with {:?}; fill the batch up \
                     (BatchTables::update_padded; update_by_row where requests have several new tokens), or \
                     capture another step",
                    now.sizes, table.captured.sizes
                ));
            }
            if now.below > table.limit {
                return wrong(format!(
                    "its positions are below {}; the step was captured for positions below {}",
                    now.below, table.limit
                ));
            }
        }
        for (at, table) in self.tables.iter().enumerate() {
            for (other, second) in self.tables.iter().enumerate().take(at) {
                let agreed = table.captured.stamp != 0 && table.captured.stamp == second.captured.stamp;
                if agreed && now[at].stamp != now[other].stamp {
                    return Err(FlashInferError::invalid(
                        OP,
                        table.op,
                        format!(
                            "it no longer belongs to the {} it was checked against; update both",
                            second.op
                        ),
                    ));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{dtype::DType, tensor::Owner};

    fn stream() -> Stream {
        // SAFETY: the legacy default stream, which nothing is enqueued on here.
        unsafe { Stream::from_raw(std::ptr::null_mut(), 0) }
    }

    fn start(unchecked: bool) -> Recording {
        Recording::start(&stream(), |_| Ok(0), unchecked).unwrap()
    }

    fn tensor(owner: Option<Owner>) -> RawTensor {
        let mut raw = RawTensor::new(4096 as *mut _, Device::Cuda(0), DType::F32, &[4], None).unwrap();
        raw.owner = owner;
        raw
    }

    #[test]
    fn memory_is_kept_as_long_as_the_record() {
        let memory = Arc::new(7u8);
        let view = tensor(Some(Owner::of(&memory)));
        uses(&view); // nothing is being captured
        assert_eq!(Arc::strong_count(&memory), 1);
        let recording = start(false);
        uses(&view);
        uses(&view);
        let record = recording.finish().unwrap();
        assert_eq!(Arc::strong_count(&memory), 2);
        assert!(!is_active());
        drop(record);
        assert_eq!(Arc::strong_count(&memory), 1);
    }

    #[test]
    fn memory_of_unknown_owners_is_refused() {
        let recording = start(false);
        uses(&tensor(None));
        let problem = recording.finish().err().unwrap().to_string();
        assert!(problem.contains("cannot be kept alive"), "{problem}");
        let recording = start(true);
        uses(&tensor(None));
        recording.finish().unwrap();
        // The host's, and none, need no owner.
        let recording = start(false);
        let mut host = tensor(None);
        host.device = Device::Cpu;
        uses(&host);
        uses(&RawTensor::new(std::ptr::null_mut(), Device::Cuda(0), DType::F32, &[0], None).unwrap());
        recording.finish().unwrap();
    }

    /// A module may call a closure that enqueues something, too.
    #[test]
    fn work_within_work_is_counted_once() {
        thread_local! { static NODES: Cell<usize> = const { Cell::new(0) } }
        let add = |nodes| -> Result<()> {
            NODES.set(NODES.get() + nodes);
            Ok(())
        };
        let recording = Recording::start(&stream(), |_| Ok(NODES.get()), false).unwrap();
        // Of others.
        add(10).unwrap();
        enqueue(&stream(), || {
            add(1)?;
            enqueue(&stream(), || add(3))?;
            add(1)
        })
        .unwrap();
        enqueue(&stream(), || add(2)).unwrap();
        assert_eq!(recording.finish().unwrap().nodes, 7);
    }

    #[test]
    fn a_thread_captures_one_step() {
        let recording = start(false);
        assert!(Recording::start(&stream(), |_| Ok(0), false).is_err());
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(!is_active()));
        });
        drop(recording);
        start(false).finish().unwrap();
    }

    #[test]
    fn plans_without_a_key_are_refused() {
        let none = || Err::<i32, _>(FlashInferError::invalid(OP, "plan", "it has no key"));
        drop(runs(none).unwrap()); // nothing is being captured
        let recording = start(false);
        assert!(runs(none).err().unwrap().to_string().contains("it has no key"));
        for key in [3, 4, 3] {
            drop(runs(|| Ok(key)).unwrap());
        }
        assert_eq!(recording.finish().unwrap().plans.len(), 2);
    }

    #[test]
    fn index_arrays_stay_what_was_captured() {
        let now = |facts| Arc::new(Mutex::new(facts));
        let pages = now(Facts { stamp: 5, ..Facts::of([4, 100, 16]) });
        let append = now(Facts { stamp: 5, below: 9, ..Facts::of([4]) });
        let recording = start(false);
        reads("PageTable", &pages);
        limit("AppendTable", &append, 10);
        {
            let _covered = runs(|| Ok(1)).unwrap();
            reads("a plan's", &now(Facts::of([1])));
        }
        let record = recording.finish().unwrap();
        assert_eq!(record.tables.len(), 2);
        let set = |table: &Current, facts| *table.lock().unwrap() = facts;
        let problem = || record.check().unwrap_err().to_string();
        record.check().unwrap();
        set(&pages, Facts { stamp: 6, ..Facts::of([4, 100, 16]) });
        assert!(problem().contains("no longer belongs"));
        set(&append, Facts { stamp: 6, below: 10, ..Facts::of([4]) });
        record.check().unwrap();
        set(&append, Facts { stamp: 6, below: 11, ..Facts::of([4]) });
        assert!(problem().contains("positions are below 11; the step was captured for positions below 10"));
        set(&append, Facts { stamp: 6, below: 3, ..Facts::of([3]) });
        assert!(problem().contains("AppendTable") && problem().contains("update_padded"));
    }
}
