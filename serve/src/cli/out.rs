//! What commands print. Whoever closes it has read enough, which is no failure.

use std::{
    fmt,
    io::{self, ErrorKind, Write},
};

use crate::Error;

/// The standard output.
pub struct Output;

/// Nobody reads the standard output any more.
#[derive(Debug)]
struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the standard output is closed")
    }
}

impl std::error::Error for Closed {}

/// Tells a closed output from other pipes that break.
fn closed(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::BrokenPipe => io::Error::new(ErrorKind::BrokenPipe, Closed),
        _ => error,
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::stdout().write(bytes).map_err(closed)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush().map_err(closed)
    }
}

/// Whether a command ended because nobody reads what it prints.
pub fn is_closed(error: &Error) -> bool {
    error.downcast_ref().and_then(io::Error::get_ref).is_some_and(|cause| cause.is::<Closed>())
}

/// Prints a line to the standard output, or has the function return that it cannot.
macro_rules! say {
    ($($text:tt)*) => {{
        use ::std::io::Write as _;
        ::std::writeln!($crate::cli::out::Output, $($text)*)?
    }};
}
pub(super) use say;

/// Prints a line to the standard error, where it is read.
macro_rules! note {
    ($($text:tt)*) => {{
        use ::std::io::Write as _;
        let _ = ::std::writeln!(::std::io::stderr(), $($text)*);
    }};
}
pub(super) use note;
