//! What the unit tests of the reference share.

use crate::{Element, FlashInferError, TensorMut, TensorRef, error::Result};

pub fn view<'a, T: Element>(slice: &'a [T], shape: &[usize]) -> TensorRef<'a> {
    TensorRef::from_slice(slice, shape).unwrap()
}

pub fn view_mut<'a, T: Element>(slice: &'a mut [T], shape: &[usize]) -> TensorMut<'a> {
    TensorMut::from_slice(slice, shape).unwrap()
}

/// An operation is refused, and for that argument.
#[track_caller]
pub fn refused(result: Result<()>, expected: &str) {
    match result {
        Err(FlashInferError::InvalidArgument { argument, .. }) => assert_eq!(argument, expected),
        other => panic!("expected {expected} to be refused, got {other:?}"),
    }
}
