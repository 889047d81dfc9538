//! What unit tests of attention share.

use crate::{
    error::{FlashInferError, Result},
    ops::check::Check,
    stream::Stream,
};

/// Calls with the checks of a test, on a stream that nothing is enqueued on.
pub(super) fn on_a_stream<R>(use_check: impl FnOnce(&Check<'_>) -> R) -> R {
    // SAFETY: the legacy default stream; nothing is enqueued on it.
    let stream = unsafe { Stream::from_raw(std::ptr::null_mut(), 0) };
    use_check(&Check::new("test", &stream).unwrap())
}

/// The argument was refused.
#[track_caller]
pub(super) fn refused<T: std::fmt::Debug>(result: Result<T>, expected: &str) {
    match result {
        Err(FlashInferError::InvalidArgument { argument, .. }) => assert_eq!(argument, expected),
        other => panic!("expected {expected} to be refused, got {other:?}"),
    }
}
