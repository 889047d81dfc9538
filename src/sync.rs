//! Locks of what threads meet in: the standard library's. `tests/schedules.rs` puts others in their place,
//! which try the schedules of threads.

pub(crate) use std::sync::{Arc, Mutex, PoisonError};
