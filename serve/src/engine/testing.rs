//! For tests: steps that wait.

use std::sync::{Arc, Condvar, Mutex};

use crate::backend::simulated::{Language, Simulated};

/// The bytes of ASCII.
pub const ASCII: Language = Language { vocab_size: 128, nan: 0 };

/// A door that steps wait at.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    pub fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    /// Waits until the gate is open.
    pub fn pass(&self) {
        let (open, changed) = &*self.0;
        drop(changed.wait_while(open.lock().unwrap(), |open| !*open).unwrap());
    }

    /// A backend whose steps wait until the gate is open.
    pub fn before(&self, backend: Simulated) -> Simulated {
        let gate = self.clone();
        backend.with_failure(move |_| {
            gate.pass();
            None
        })
    }
}
