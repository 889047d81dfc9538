//! How long a test runs that could run for ever.

use std::{env, time::Duration};

/// The seconds of `FLASHINFER_RS_TEST_SECONDS`, else so many.
pub fn seconds(usual: u64) -> Duration {
    let said = env::var("FLASHINFER_RS_TEST_SECONDS").ok();
    let seconds = said.map(|said| said.parse().expect("FLASHINFER_RS_TEST_SECONDS is a number"));
    Duration::from_secs(seconds.unwrap_or(usual))
}
