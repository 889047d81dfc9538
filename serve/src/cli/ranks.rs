//! What a process does that is one rank of several, and not the first.

use crate::Result;

/// Leaves it to rank 0 when this process ends: that drains, and then says so.
///
/// # Errors
/// No handler can be set.
#[cfg(unix)]
pub fn ignore_signals() -> Result<()> {
    use tokio::{
        runtime::Builder,
        signal::unix::{SignalKind, signal},
    };
    // What is set stays when these are gone.
    Builder::new_current_thread().enable_io().build()?.block_on(async {
        let _ = signal(SignalKind::interrupt())?;
        let _ = signal(SignalKind::terminate())?;
        Ok(())
    })
}

/// Without signals there is nothing to ignore.
#[cfg(not(unix))]
pub fn ignore_signals() -> Result<()> {
    Ok(())
}
