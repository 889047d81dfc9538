//! On which stream a thread's uploads are made.

use std::cell::RefCell;

use crate::stream::Stream;

thread_local! {
    /// The stream that this thread's uploads are made on, if not on those that they are for.
    static BESIDE: RefCell<Option<Stream>> = const { RefCell::new(None) };
}

/// Gives the thread its former stream for uploads back.
struct Former(Option<Stream>);

impl Drop for Former {
    fn drop(&mut self) {
        BESIDE.set(self.0.take());
    }
}

/// Has the uploads of `work` be made on a stream beside those that they are for.
pub(crate) fn upload_beside<R>(stream: &Stream, work: impl FnOnce() -> R) -> R {
    let _former = Former(BESIDE.replace(Some(stream.clone())));
    work()
}

/// The stream that uploads for a stream are made on.
pub(crate) fn upload_stream(stream: &Stream) -> Stream {
    let beside = BESIDE.with_borrow(|beside| beside.clone());
    beside.filter(|beside| beside.ordinal() == stream.ordinal()).unwrap_or_else(|| stream.clone())
}

/// Whether uploads for a stream are made on another.
pub(super) fn is_beside(stream: &Stream) -> bool {
    BESIDE.with_borrow(|beside| beside.as_ref().is_some_and(|beside| beside.ordinal() == stream.ordinal()))
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn uploads_are_made_beside_while_they_are_asked_for() {
        // Handles only; nothing is enqueued.
        let stream = |handle: usize, ordinal| Stream::with_owner(handle as *mut _, ordinal, None);
        let (own, beside, other) = (stream(0x5000, 0), stream(0x6000, 0), stream(0x7000, 1));
        let copies = |of: &Stream| (upload_stream(of).as_raw() as usize, is_beside(of));
        upload_beside(&beside, || {
            assert_eq!([copies(&own), copies(&other)], [(0x6000, true), (0x7000, false)]);
            upload_beside(&other, || {
                assert_eq!([copies(&own), copies(&other)].map(|it| it.1), [false, true])
            });
            assert_eq!(copies(&own), (0x6000, true));
        });
        let panicked = catch_unwind(AssertUnwindSafe(|| upload_beside(&beside, || panic!("in the work"))));
        assert!(panicked.is_err());
        assert_eq!(copies(&own), (0x5000, false));
    }
}
