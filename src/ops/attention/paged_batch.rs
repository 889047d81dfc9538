//! The requests that a plan over pages is for.

use crate::{
    indices::{PageTable, RaggedTable},
    kv::BatchTables,
};

/// The requests that a plan over pages is for: the queries of each, and its pages.
///
/// [`BatchTables`] become one by themselves. Tables that are kept apart are put
/// together.
///
/// ```
/// use flashinfer_rs::{
///     PageTable, Result,
///     attention::{BatchPrefill, PagedBatch, PlanOptions, Workspace},
///     indices::RaggedTable,
///     kv::BatchTables,
/// };
///
/// fn plan(
///     prefill: &BatchPrefill, workspace: &mut Workspace, tables: &BatchTables, queries: &RaggedTable, table: &PageTable,
/// ) -> Result<()> {
///     let options = PlanOptions::causal();
///     prefill.plan_paged(workspace, tables, &options)?;
///     prefill.plan_paged(workspace, PagedBatch::new(queries, table), &options)?;
///     Ok(())
/// }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct PagedBatch<'p> {
    /// The queries of each request.
    pub queries: &'p RaggedTable,
    /// The pages of each request.
    pub table: &'p PageTable,
}

impl<'p> PagedBatch<'p> {
    /// Of as many requests as both tables are of, which plans check.
    pub const fn new(queries: &'p RaggedTable, table: &'p PageTable) -> Self {
        Self { queries, table }
    }
}

impl<'p> From<&'p BatchTables> for PagedBatch<'p> {
    fn from(tables: &'p BatchTables) -> Self {
        Self::new(&tables.queries, &tables.pages)
    }
}
