//! The head of a table.

use super::super::out::say;
use crate::Result;

/// Prints a table's columns, apart from what is before it.
pub fn head(columns: &[&str]) -> Result<()> {
    say!("");
    say!("| {} |", columns.join(" | "));
    say!("|{}", "---|".repeat(columns.len()));
    Ok(())
}
