//! The end of the process, whatever its threads do.

/// Ends the process with a status, and waits for nothing: neither threads, which may be at work on a GPU, nor what
/// libraries have for a usual exit, which waits for that, or takes it from under threads that use it.
#[cfg(unix)]
pub fn at_once(status: i32) -> ! {
    // SAFETY: it takes any status; nothing of the process is used afterwards.
    unsafe { libc::_exit(status) }
}

/// As well as it can be done elsewhere.
#[cfg(not(unix))]
pub fn at_once(status: i32) -> ! {
    std::process::exit(status)
}
