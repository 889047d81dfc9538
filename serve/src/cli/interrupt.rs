//! Ctrl-C: it stops the answer that is being made, and the program where none is.

use std::sync::{Arc, Mutex, PoisonError};

use crate::{Result, exit};

/// What the exit code of programs is that Ctrl-C ended.
const EXIT_CODE: i32 = 130;

type Stop = Box<dyn FnOnce() + Send>;

/// What Ctrl-C does. There is one in a process.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<Mutex<Option<Stop>>>);

impl Interrupt {
    /// Takes Ctrl-C over.
    pub fn install() -> Result<Self> {
        let interrupt = Self::default();
        let installed = interrupt.clone();
        ctrlc::set_handler(move || installed.raise())
            .map_err(|error| format!("Ctrl-C cannot be taken over: {error}"))?;
        Ok(interrupt)
    }

    /// Does some work that Ctrl-C ends by calling `stop`.
    pub fn during<T>(&self, stop: impl FnOnce() + Send + 'static, work: impl FnOnce() -> T) -> T {
        self.set(Some(Box::new(stop)));
        let done = work();
        self.set(None);
        done
    }

    /// As Ctrl-C does.
    fn raise(&self) {
        let stop = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        match stop {
            Some(stop) => stop(),
            None => exit::at_once(EXIT_CODE),
        }
    }

    fn set(&self, stop: Option<Stop>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = stop;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn work_is_stopped() {
        let interrupt = Interrupt::default();
        let (stop, stopped) = mpsc::channel();
        let raised = interrupt.clone();
        let done = interrupt.during(
            move || stop.send(()).unwrap(),
            || {
                raised.raise();
                stopped.recv().is_ok()
            },
        );
        assert!(done && interrupt.0.lock().unwrap().is_none());
    }
}
